"""Autograd beyond its chapter: graphs freed and kept, modes, hooks, in-place changes, memory, threads, tools."""

from __future__ import annotations

import gc
import itertools
import math
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tinytorch as t
from tinytorch.autograd import Function, detect_anomaly, draw, grad, gradcheck, gradgradcheck
from tinytorch.autograd.functional import hessian, jacobian, jvp, vjp
from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Op, Tensor, observe
from tinytorch.m02_tensor_appendix import side_by_side, together
from tinytorch.m06_autograd import NON_DIFFERENTIABLE, RULES, gradient, non_differentiable
from tinytorch.utils.checkpoint import checkpoint

RNG = np.random.default_rng(606)


def leaf(*shape: int, dtype: str = "float64") -> Tensor:
    return t.tensor(RNG.uniform(0.5, 2, shape), dtype=dtype, requires_grad=True)


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_what_requires_grad(device: str) -> None:
    x, constant = leaf(3), t.ones(3, dtype="float64")
    y = x * constant
    assert x.requires_grad
    assert x.is_leaf
    assert x.grad_fn is None
    assert not constant.requires_grad
    assert constant.is_leaf
    assert y.requires_grad
    assert not y.is_leaf
    assert y.grad_fn.name == "mul"
    assert not (constant * 2).requires_grad
    assert x.grad is None


def test_integers_cannot_require_grad(device: str) -> None:
    with pytest.raises(RuntimeError, match="only tensors of floats can require grad, this one has dtype int64"):
        t.tensor([1, 2], requires_grad=True)
    assert not (t.ones(2, requires_grad=True).to(t.int64)).requires_grad


def test_requires_grad_can_be_turned_off_for_leaves_only() -> None:
    x = leaf(2)
    (x * 2).sum().backward()
    y = x * 2
    with pytest.raises(RuntimeError, match=r"not a leaf; detach\(\) gives one without"):
        y.requires_grad = False
    x.requires_grad_(False)
    assert not (x * 2).requires_grad
    assert x.grad is None


def test_detach_shares_memory_and_cuts_the_graph(device: str) -> None:
    x = leaf(3)
    y = (x * 2).detach()
    assert not y.requires_grad
    z = x.detach()
    z.zero_()
    assert x.tolist() == [0, 0, 0]
    w = leaf(3)
    (w * w.detach()).sum().backward()
    assert_close(w.grad, w)


# -- backward ----------------------------------------------------------------------------------------------------------


def test_gradients_accumulate_until_they_are_cleared(device: str) -> None:
    x = leaf(2)
    for times in (1, 2, 3):
        (x * 3).sum().backward()
        assert_close(x.grad, [3.0 * times] * 2)
    x.grad = None
    (x * 3).sum().backward()
    assert_close(x.grad, [3, 3])


def test_slices_that_overlap_and_uses_of_the_whole_add_up(device: str) -> None:
    x = leaf(4, 3)
    indices = [np.s_[:2], np.s_[1:3], np.s_[1], np.s_[..., 0], np.s_[-1, 2], np.s_[:, None], [0, 0], np.s_[...]]
    weights = [t.tensor(RNG.normal(size=x[index].shape)) for index in indices]
    expected = np.zeros((4, 3))
    for index, weight in zip(indices, weights, strict=True):
        np.add.at(expected, index, weight.numpy())
    for order in (range(8), reversed(range(8)), (7, 1, 0, 2, 6, 5, 4, 3)):
        x.grad = None
        sum((weights[i] * (x * 1 if i == 7 else x[indices[i]])).sum() for i in order).backward()
        assert_close(x.grad, expected)


def test_the_gradient_of_slices_is_one_array_and_nobody_elses(device: str) -> None:
    x, names, seen = leaf(6), list[str](), list[Tensor]()
    y = x * 1
    y.register_hook(lambda g: seen.append(g))
    with observe(lambda op, arrays, attributes, proceed: names.append(op.name) or proceed()):
        (y[:2].sum() + y[2:4].sum() * 2 + y[4:].sum() * 3).backward()
    assert (names.count("scatter"), names.count("concatenate")) == (0, 1)
    assert [g.tolist() for g in seen] == [[1, 1, 2, 2, 3, 3]]
    names.clear()
    with observe(lambda op, arrays, attributes, proceed: names.append(op.name) or proceed()):
        y = x * 1
        (y[:2].sum() + y[2:4].sum() * 2).backward()  # something is left out
    assert (names.count("scatter"), names.count("concatenate")) == (1, 0)
    part = (x * 1)[:3]
    kept = t.ones(3)
    part.backward(kept)
    assert kept.tolist() == [1, 1, 1]


def test_slices_in_a_row_are_known() -> None:
    """As Python takes an index: whatever is said to be side by side, put together, is what the indices say."""
    whole, known = np.arange(24.0).reshape(4, 6), 0
    pieces = [np.s_[:2], np.s_[2:], np.s_[:, :3], np.s_[:, 3:], np.s_[:, 1:3], np.s_[2:3], np.s_[3:9], np.s_[-1:],
              np.s_[:, ::2], np.s_[:], np.s_[:0], np.s_[..., :3], 0, None, ()]  # fmt: skip
    for count in (1, 2, 3):
        for indices in itertools.permutations(pieces, count):
            row = side_by_side([(index, whole[index]) for index in indices], whole.shape)
            times = np.zeros(whole.shape, int)
            for index in indices:
                np.add.at(times, index, 1)
            if row is not None:
                np.testing.assert_array_equal(np.concatenate(row[0], row[1]), whole)
                assert (times == 1).all()
                known += 1
    assert known > 18


def test_slices_that_lie_together_are_their_memory() -> None:
    """And what is a leaf's is copied: somebody else may hold a slice's gradient."""
    memory = np.arange(24, dtype="float32")
    whole, square = memory.reshape(2, 3, 4), np.arange(16).reshape(4, 4)
    parts = whole[..., :1], whole[..., 1:]
    assert np.shares_memory(together(parts, 2), memory)
    others = (
        ((parts[1], parts[0]), 2), (parts[:1], 2), ((parts[0], parts[1].copy()), 2), ((whole[..., :2],) * 2, 2),
        ((memory[:12].reshape(2, 3, 2), memory[12:].reshape(2, 3, 2)), 2), ((parts[0], parts[1][::-1]), 2),
        ((square.T,), 0),
    )  # fmt: skip
    for arrays, axis in others:
        out = together(arrays, axis)
        np.testing.assert_array_equal(out, np.concatenate(arrays, axis))
        assert not any(np.shares_memory(out, x) for x in (memory, square))
    x, held = t.randn(2, 5, 24, requires_grad=True), list[Tensor]()
    heads = [part.reshape(2, 5, 2, 4).transpose(1, 2) for part in x.split(8, dim=2)]
    for head in heads:
        head.register_hook(held.append)
    for _ in range(2):
        t.nn.functional.scaled_dot_product_attention(*heads).sum().backward(retain_graph=True)
    assert not any(np.shares_memory(x.grad.data, g.data) for g in held)
    first = np.concatenate([g.data.swapaxes(1, 2).reshape(2, 5, 8) for g in held[2::-1]], 2)
    np.testing.assert_allclose(x.grad.data, 2 * first, rtol=1e-5, atol=1e-6)


def test_a_gradient_of_the_output_can_be_given(device: str) -> None:
    x = leaf(2, 3)
    seed = RNG.normal(size=(2, 3))
    (x * x).backward(t.tensor(seed))
    assert_close(x.grad, 2 * seed * x.detach().numpy())


def test_backward_of_a_leaf_itself() -> None:
    x = t.tensor(2.0, requires_grad=True)
    x.backward()
    assert x.grad.item() == 1


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (lambda: t.ones(2).sum().backward(), RuntimeError, "computed from nothing that requires grad"),
        (lambda: leaf(2).exp().backward(), RuntimeError, r"of a tensor of shape \(2,\) a gradient of that shape"),
        (lambda: leaf(2).exp().backward(t.ones(3)), ValueError, r"gradient has shape \(3,\), the tensor \(2,\)"),
        (lambda: grad(leaf(2).sum(), t.ones(2)), RuntimeError, r"input 0 \(shape \(2,\)\) does not require grad"),
        (lambda: grad(leaf(2).sum(), leaf(2)), RuntimeError, "do not depend on input 0; allow_unused=True"),
        (lambda: t.ones(2).register_hook(print), RuntimeError, "does not require grad, so no gradient will come"),
        (lambda: setattr(t.ones(2), "grad", t.ones(2)), RuntimeError, "only be set on a tensor that requires grad"),
        (lambda: setattr(leaf(2), "grad", t.ones(3)), ValueError, r"expected the tensor's shape \(2,\), got \(3,\)"),
        (lambda: gradcheck(lambda x: x, leaf(2, dtype="float32")), ValueError, "expected float64 inputs"),
        (lambda: gradient(t.add, a=lambda g: g), ValueError, "add has its rules already"),
        (lambda: draw(t.ones(2)), RuntimeError, "there is no graph to draw"),
    ],
)
def test_bad_use(wrong: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        wrong()


def test_a_second_backward_needs_the_graph_kept(device: str) -> None:
    x = leaf(2)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert_close(x.grad, 4 * x.detach())
    with pytest.raises(RuntimeError, match=r"freed what it kept.*retain_graph=True"):
        y.backward()


def test_freed_values_are_gone_and_retained_ones_are_not() -> None:
    x = leaf(2)
    y = x.exp()
    z = y.sum()
    z.backward(retain_graph=True)
    assert y.grad_fn.values is not None
    z.backward()
    assert y.grad_fn.values is None


def test_parts_of_a_graph_that_are_shared_are_freed_once(device: str) -> None:
    x = leaf(2)
    shared = x.exp()
    first, second = shared.sum(), (shared * 2).sum()
    first.backward()
    with pytest.raises(RuntimeError, match="exp"):
        second.backward()


def test_an_operation_used_by_many_is_visited_once(device: str) -> None:
    x = leaf(2)
    visits = []
    shared = x * 2
    shared.register_hook(lambda g: visits.append(g.tolist()))
    (shared + shared * 3 + shared.exp() * 0).sum().backward()
    assert visits == [[4, 4]]
    assert_close(x.grad, [8, 8])


def test_a_long_chain_and_a_wide_fan() -> None:
    x = y = t.tensor(1.0, requires_grad=True)
    for _ in range(100_000):
        y = y + 0.5
    y.backward()
    assert x.grad.item() == 1
    z = t.tensor(1.0, requires_grad=True)
    t.stack([z * i for i in range(1000)]).sum().backward()
    assert z.grad.item() == 499_500


def test_a_diamond_of_diamonds_takes_linear_time(device: str) -> None:
    x = y = t.tensor(1.0, dtype="float64", requires_grad=True)
    for _ in range(60):  # 2**60 paths
        y = y * 0.5 + y * 0.5
    y.backward()
    assert x.grad.item() == 1


# -- who owns a gradient -----------------------------------------------------------------------------------------------


def test_leaves_own_their_gradients() -> None:
    x, y = leaf(3), leaf(3)
    (x + y).sum().backward()
    assert not np.shares_memory(x.grad.numpy(), y.grad.numpy())
    x.grad.zero_()
    assert_close(y.grad, [1, 1, 1])


def test_a_given_gradient_is_copied() -> None:
    x, seed = leaf(3), t.ones(3, dtype="float64")
    (x + 0).backward(seed)
    x.grad.mul_(5)
    assert seed.tolist() == [1, 1, 1]
    x.grad = None
    x.backward(seed)
    x.backward(seed)
    assert seed.tolist() == [1, 1, 1]
    assert x.grad.tolist() == [2, 2, 2]


def test_gradients_of_functions_and_hooks_are_owned_too() -> None:
    class Sum(Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            return a + b

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple:
            return g, g

    x, y, held = leaf(3), leaf(3), t.ones(3, dtype="float64")
    Sum.apply(x, y).sum().backward()
    x.grad.zero_()
    assert y.grad.tolist() == [1, 1, 1]
    z = leaf(3)
    z.register_hook(lambda g: held)
    (z * 2).sum().backward()
    z.grad.zero_()
    assert held.tolist() == [1, 1, 1]


def test_expanded_gradients_can_be_written_to() -> None:
    x = leaf(2, 3)
    x.sum().backward()
    x.grad[0, 0] = 7.0
    assert x.grad.tolist() == [[7, 1, 1], [1, 1, 1]]
    x.sum().backward()
    assert x.grad.tolist() == [[8, 2, 2], [2, 2, 2]]


def test_reshaped_gradients_do_not_alias() -> None:
    x, y = leaf(2, 3), leaf(3, 2)
    (x.reshape(6) + y.reshape(6)).sum().backward()
    assert not np.shares_memory(x.grad.numpy(), y.grad.numpy())


# -- grad --------------------------------------------------------------------------------------------------------------


def test_grad_returns_and_touches_no_leaf(device: str) -> None:
    x, y = leaf(2), leaf(2)
    hidden = x * y
    out = (hidden * hidden).sum()
    by_x, by_hidden = grad(out, [x, hidden])
    assert_close(by_x, (2 * x * y * y).detach())
    assert_close(by_hidden, (2 * x * y).detach())
    assert x.grad is None
    assert y.grad is None
    assert not by_x.requires_grad


def test_grad_of_several_outputs_with_weights(device: str) -> None:
    x = leaf(2)
    seed = t.tensor([1.0, -2.0], dtype="float64")
    (found,) = grad([x * 2, (x * x).sum()], x, [seed, None])
    assert_close(found, (2 * seed + 2 * x).detach())


def test_unused_inputs(device: str) -> None:
    x, unused = leaf(2), leaf(2)
    found = grad(x.sum(), [x, unused], allow_unused=True)
    assert found[1] is None
    assert_close(found[0], [1, 1])


def test_derivatives_of_higher_order(device: str) -> None:
    x = t.tensor(1.5, dtype="float64", requires_grad=True)
    y = x**5
    for expected in (5 * 1.5**4, 20 * 1.5**3, 60 * 1.5**2, 120 * 1.5):
        (y,) = grad(y, x, create_graph=True)
        assert_close(y, expected)


def test_create_graph_in_backward(device: str) -> None:
    x = leaf(3)
    (x**3).sum().backward(create_graph=True)
    first = x.grad
    assert first.requires_grad
    x.grad = None
    (first * first).sum().backward()
    assert_close(x.grad, (36 * x**3).detach())


def test_gradient_penalty(device: str) -> None:
    """A gradient inside a loss, with respect to other leaves than the loss's."""
    weight, x = leaf(3), leaf(3)
    (g,) = grad((weight * x.exp()).sum(), x, create_graph=True)
    (g * g).sum().backward()
    assert_close(weight.grad, (2 * weight * (2 * x).exp()).detach())


# -- modes -------------------------------------------------------------------------------------------------------------


def test_no_grad_and_its_inverse() -> None:
    x = leaf(2)
    with t.no_grad():
        assert not t.is_grad_enabled()
        assert not (x * 2).requires_grad
        with t.enable_grad():
            assert (x * 2).requires_grad
            with t.inference_mode():
                assert not (x * 2).requires_grad
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad
    with t.set_grad_enabled(False):
        assert not (x * 2).requires_grad


def test_the_mode_returns_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), t.no_grad():
        raise ZeroDivisionError
    assert t.is_grad_enabled()


@pytest.mark.parametrize("decorate", [t.no_grad, t.no_grad()])
def test_no_grad_as_a_decorator(decorate: Any) -> None:
    @decorate
    def doubled(x: Tensor) -> Tensor:
        """Twice."""
        return x * 2

    assert not doubled(leaf(2)).requires_grad
    assert doubled.__name__ == "doubled"
    assert doubled.__doc__ == "Twice."
    assert t.is_grad_enabled()


def test_no_grad_on_a_generator_holds_inside_it_only() -> None:
    @t.no_grad()
    def halves(x: Tensor) -> Iterator[bool]:
        yield (x * 0.5).requires_grad
        yield (x * 0.25).requires_grad

    x = leaf(2)
    for inside in halves(x):
        assert not inside
        assert (x * 2).requires_grad


def test_recursion_and_reuse_of_one_mode_object() -> None:
    mode = t.no_grad()

    @mode
    def nested(depth: int) -> bool:
        return t.is_grad_enabled() if depth == 0 else nested(depth - 1) or t.is_grad_enabled()

    assert not nested(3)
    with mode, mode:
        pass
    assert t.is_grad_enabled()


def test_modes_of_threads_are_their_own() -> None:
    inside, leave, seen = threading.Event(), threading.Event(), {}

    def quiet() -> None:
        with t.no_grad():
            inside.set()
            leave.wait(5)
            seen["quiet"] = t.is_grad_enabled()

    thread = threading.Thread(target=quiet)
    thread.start()
    assert inside.wait(5)
    assert t.is_grad_enabled()
    assert (leaf(2) * 2).requires_grad
    with t.no_grad():
        other = threading.Thread(target=lambda: seen.setdefault("fresh", t.is_grad_enabled()))
        other.start()
        other.join()
    leave.set()
    thread.join()
    assert seen == {"quiet": False, "fresh": True}


def test_threads_train_side_by_side() -> None:
    results: dict[int, list] = {}

    def work(number: int) -> None:
        x = t.tensor([1.0, 2.0], requires_grad=True)
        for _ in range(50):
            x.grad = None
            (x * x * number).sum().backward()
        results[number] = x.grad.tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [2.0 * i, 4.0 * i] for i in range(4)}


# -- hooks and retained gradients --------------------------------------------------------------------------------------


def test_hooks_see_and_replace_gradients(device: str) -> None:
    x, seen = leaf(2), []
    x.register_hook(lambda g: seen.append(g.tolist()))
    x.register_hook(lambda g: g * 10)
    y = x * 2
    y.register_hook(lambda g: g + 1)
    y.sum().backward()
    assert seen == [[4, 4]]
    assert_close(x.grad, [40, 40])


def test_hooks_are_part_of_a_graph_of_gradients(device: str) -> None:
    x = leaf(2)
    y = x * 1
    y.register_hook(lambda g: g * x)
    (g,) = grad((y * y).sum(), x, create_graph=True)
    assert_close(g, (2 * x * x).detach())
    # g is 2 y x, and the hook is called again on the way through y
    assert_close(grad(g.sum(), x)[0], (2 * x * x + 2 * x).detach())


def test_retain_grad(device: str) -> None:
    x = leaf(2)
    kept, plain = x * 3, x * 2
    kept.retain_grad()
    (kept * kept + plain).sum().backward()
    assert_close(kept.grad, (6 * x).detach())
    assert plain.grad is None


# -- in place ----------------------------------------------------------------------------------------------------------


def test_a_leaf_is_not_changed_while_recording(device: str) -> None:
    x = leaf(2)
    for change in (lambda: x.add_(1), lambda: x.__setitem__(0, 1.0), lambda: x.zero_(), lambda: x.__imul__(2)):
        with pytest.raises(
            RuntimeError, match=r"a leaf that requires grad \(shape \(2,\)\).*under no_grad\(\), or on a clone"
        ):
            change()
    with t.no_grad():
        x += 1
        x.mul_(2)
    assert x.is_leaf
    assert x.requires_grad


def test_results_can_be_changed_in_place(device: str) -> None:
    x, factor = leaf(4), leaf(1)
    y = x * 2
    same = y
    y *= factor
    y[1:3] = 0.0
    y += x
    assert y is same
    (y * t.arange(4)).sum().backward()
    wide = np.array([0.0, 0, 0, 3])
    assert_close(x.grad, wide * 2 * factor.item() + np.arange(4))
    assert_close(factor.grad, [(wide * 2 * x.detach().numpy()).sum()])


def test_a_plain_tensor_joins_the_graph_by_assignment(device: str) -> None:
    x, buffer = leaf(2), t.zeros(2, 2, dtype="float64")
    buffer[0] = x * 3
    buffer[1] = x.exp()
    assert buffer.requires_grad
    buffer.sum().backward()
    assert_close(x.grad, 3 + np.exp(x.detach().numpy()))


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept.add_(1),
        lambda kept: kept.__setitem__(0, 5.0),
        lambda kept: kept[0].zero_(),
        lambda kept: kept.reshape(-1).mul_(2),
        lambda kept: kept.detach().fill_(3),
        lambda kept: kept.T.exp_(),
        lambda kept: kept.uniform_(),
    ],
)
def test_changing_what_backward_needs_is_an_error(change: Any, device: str) -> None:
    if device != "cpu":
        pytest.skip("which changes write through depends on what is a view in the library")
    x, kept = leaf(2, 2), t.ones(2, 2, dtype="float64")
    y = (x * kept).sum()
    change(kept)
    with pytest.raises(
        RuntimeError, match=r"a value that mul of shape \(2, 2\) needs for backward was changed in place"
    ):
        y.backward()


def test_changing_what_backward_does_not_need_is_fine(device: str) -> None:
    x, other = leaf(2), t.ones(2, dtype="float64")
    y = (x + other).sum()
    other.zero_()
    y.backward()
    assert_close(x.grad, [1, 1])


def test_a_change_before_recording_is_fine(device: str) -> None:
    x, kept = leaf(2), t.ones(2, dtype="float64")
    kept.mul_(3)
    (x * kept).sum().backward()
    assert_close(x.grad, [3, 3])


def test_parameters_changed_between_forward_and_backward_are_noticed(device: str) -> None:
    x = leaf(2)
    y = (x * x).sum()
    with t.no_grad():
        x -= 0.1
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


def test_outputs_that_rules_need_are_watched_too(device: str) -> None:
    x = leaf(2)
    y = x.exp()
    with t.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="a value that exp"):
        y.sum().backward()


# -- memory ------------------------------------------------------------------------------------------------------------


def test_graphs_leave_no_cycles() -> None:
    gc.collect()
    gc.disable()
    try:
        x = leaf(3)
        y = (x * x).exp()
        y.retain_grad()
        z = (y.amax() + y.softmax(0).sum() + y.sort().values.sum() + y.reshape(1, 3) @ y).sum()
        watched = [weakref.ref(node) for node in (x, y, z, y.grad_fn, z.grad_fn)]
        z.backward()
        del x, y, z
        assert [ref() for ref in watched] == [None] * 5
    finally:
        gc.enable()


def test_a_graph_that_is_never_walked_is_freed_too() -> None:
    gc.collect()
    gc.disable()
    try:
        x = leaf(3)
        y = x
        for _ in range(5000):
            y = y * 1.01
        ref = weakref.ref(y.grad_fn)
        del y
        assert ref() is None
    finally:
        gc.enable()


def test_graphs_of_gradients_leave_no_cycles() -> None:
    gc.collect()
    gc.disable()
    try:
        x = leaf(3)
        (g,) = grad((x**3).sum(), x, create_graph=True)
        (g * g).sum().backward()
        watched = [weakref.ref(x), weakref.ref(g), weakref.ref(g.grad_fn)]
        del x, g
        assert [ref() for ref in watched] == [None] * 3
    finally:
        gc.enable()


def test_only_what_rules_need_is_kept() -> None:
    x, y = leaf(3), t.ones(3, dtype="float64")
    ref = weakref.ref((x + y).data)
    intermediate = x + y
    array = weakref.ref(intermediate.data)
    out = intermediate.sum()
    del intermediate
    assert array() is None  # neither add nor sum needs it
    assert ref() is None
    assert out.requires_grad


# -- rules of one's own ------------------------------------------------------------------------------------------------


@pytest.fixture
def cube() -> Iterator[Op]:
    def cube(xp: Any, x: Any) -> Any:
        return x * x * x

    operation = Op(cube)
    yield operation
    del Op.registry["cube"]
    RULES.pop(operation, None)
    NON_DIFFERENTIABLE.discard(operation)


def test_a_missing_rule_is_an_error_where_the_operation_is_used(cube: Op) -> None:
    with pytest.raises(NotImplementedError, match=r"cube has no gradient rule: give it one with gradient\(cube, …\)"):
        cube(leaf(2))
    with t.no_grad():
        assert not cube(leaf(2)).requires_grad
    assert cube(t.ones(2)).tolist() == [1, 1]


def test_a_rule_makes_it_differentiable(cube: Op) -> None:
    gradient(cube, x=lambda g, x: g * 3 * x * x)
    assert gradcheck(cube, leaf(3))
    assert gradgradcheck(cube, leaf(3))


def test_a_wrong_rule_is_found(cube: Op) -> None:
    gradient(cube, x=lambda g, x: g * 2.9 * x * x)
    with pytest.raises(AssertionError, match="elements differ"):
        gradcheck(cube, leaf(3))


def test_a_rule_wrong_to_second_order_only_is_found(cube: Op) -> None:
    gradient(cube, x=lambda g, x: g * 3 * (x.detach() if isinstance(x, Tensor) else x) * x)
    assert gradcheck(cube, leaf(3))
    with pytest.raises(AssertionError, match="elements differ"):
        gradgradcheck(cube, leaf(3))


@pytest.mark.parametrize(
    ("rules", "words"),
    [({"z": lambda g: g}, r"it has inputs \('x',\), not \['z'\]"), ({"x": lambda g, w: g}, "a rule asks for 'w'")],
)
def test_rules_that_do_not_fit(cube: Op, rules: dict, words: str) -> None:
    def used() -> None:
        gradient(cube, **rules)
        cube(leaf(2))

    with pytest.raises(TypeError, match=words):
        used()


def test_a_rule_for_all_inputs_is_called_once_and_told_which_are_tracked() -> None:
    calls = []

    def swapped(xp: Any, a: Any, b: Any, c: Any, *, factor: float = 2.0) -> Any:
        return a * b * factor

    operation = Op(swapped)

    def rule(g: Any, a: Any, b: Any, position: tuple, factor: float) -> tuple:
        calls.append(position)
        return g * b * factor, g * a * factor, None

    gradient(operation, together=rule)
    try:
        a, b = t.tensor([2.0, 3.0], requires_grad=True), t.tensor([5.0, 7.0], requires_grad=True)
        operation(a, b, t.ones(2)).sum().backward()
        assert (a.grad.tolist(), b.grad.tolist()) == ([10, 14], [4, 6])
        operation(t.ones(2), b, t.ones(2), factor=3.0).sum().backward()
        assert b.grad.tolist() == [7, 9]
        assert calls == [(0, 1), (1,)]
        (second,) = t.autograd.grad(operation(a, b, 1.0).sum(), [a], create_graph=True)
        assert t.autograd.grad(second.sum(), [b])[0].tolist() == [2, 2]
    finally:
        del RULES[operation], Op.registry["swapped"]


def test_declared_without_gradient(cube: Op) -> None:
    non_differentiable(cube)
    assert not cube(leaf(2)).requires_grad


# -- Function ----------------------------------------------------------------------------------------------------------


class Scaled(Function):
    """x * factor, and the number of times that backward ran."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(x)
        return x * factor

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        Scaled.calls += 1
        (x,) = ctx.saved_tensors
        assert x.shape == g.shape
        return g * ctx.factor, None


class Cube(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * 3 * x**2


class MinMax(Function):
    """Two outputs, one saved, and one without gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple:
        product, total, rounded = a * b, a.exp(), a.round()
        ctx.save_for_backward(a, b, total)
        ctx.mark_non_differentiable(rounded)
        return product, total, rounded

    @staticmethod
    def backward(ctx: Any, product: Tensor, total: Tensor, rounded: Tensor) -> tuple:
        a, b, kept = ctx.saved_tensors
        return product * b + total * kept, product * a


def test_a_function_of_ones_own(device: str) -> None:
    x = leaf(3)
    before = Scaled.calls
    y = Scaled.apply(x, 4.0)
    assert y.grad_fn.name == "Scaled"
    y.sum().backward()
    assert_close(x.grad, [4, 4, 4])
    assert Scaled.calls == before + 1
    assert not Scaled.apply(x.detach(), 2.0).requires_grad
    with t.no_grad():
        assert not Scaled.apply(x, 2.0).requires_grad


def test_functions_pass_both_checks(device: str) -> None:
    assert gradcheck(Cube.apply, leaf(3))
    assert gradgradcheck(Cube.apply, leaf(3))
    assert gradcheck(lambda a, b: MinMax.apply(a, b)[:2], (leaf(3), leaf(3)))
    assert gradcheck(lambda a, b: MinMax.apply(a, b)[1], (leaf(3), leaf(3)))


def test_outputs_without_gradient(device: str) -> None:
    product, total, rounded = MinMax.apply(leaf(2), leaf(2))
    assert product.requires_grad
    assert total.requires_grad
    assert not rounded.requires_grad


def test_a_function_that_saves_its_output_leaves_no_cycle_without_backward() -> None:
    class Exponential(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.exp()
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            return g * y

    gc.collect()
    gc.disable()
    try:
        y = Exponential.apply(leaf(3))
        node = weakref.ref(y.grad_fn)
        del y
        assert node() is None
    finally:
        gc.enable()
    assert gradcheck(Exponential.apply, leaf(3))
    assert gradgradcheck(Exponential.apply, leaf(3))


def test_functions_leave_no_cycles() -> None:
    gc.collect()
    gc.disable()
    try:
        x = leaf(3)
        product, total, _ = MinMax.apply(x, x)
        refs = [weakref.ref(total), weakref.ref(total.grad_fn), weakref.ref(x)]
        (product + total).sum().backward()
        del product, total, x, _
        assert [ref() for ref in refs] == [None] * 3
    finally:
        gc.enable()


def test_wrong_functions_are_named(device: str) -> None:
    class Wrong(Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            return a * b

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    with pytest.raises(
        RuntimeError, match=r"Wrong\.backward: expected 2 gradients, one for each input of forward, got 1"
    ):
        Wrong.apply(leaf(2), leaf(2)).sum().backward()
    y = Cube.apply(leaf(1))
    y.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        y.backward()


def test_what_a_function_saved_is_watched(device: str) -> None:
    x = leaf(2)
    y = Cube.apply(x).sum()
    with t.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


# -- checkpoint --------------------------------------------------------------------------------------------------------


def test_checkpoint_gives_the_same_gradients_from_less_memory(device: str) -> None:
    x, w = leaf(3, 4), leaf(4, 4)
    runs = []

    def block(x: Tensor) -> Tensor:
        runs.append(1)
        for _ in range(3):
            x = t.tanh(x @ w)
        return x

    expected = grad(block(x).sum(), [x, w])
    runs.clear()
    y = checkpoint(block, x)
    assert len(runs) == 1
    y.sum().backward()
    assert len(runs) == 2
    assert_close(x.grad, expected[0], rtol=1e-12)
    assert_close(w.grad, expected[1], rtol=1e-12)


def test_checkpoint_draws_the_same_numbers_again(device: str) -> None:
    manual_seed(4)
    x = leaf(200)
    y = checkpoint(lambda x: x * (t.rand(200) < 0.5), x)
    after = t.rand(3).tolist()
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), (y.detach().numpy() != 0).astype(float))
    manual_seed(4)
    t.rand(200)
    assert t.rand(3).tolist() == after  # and the user's own stream is not disturbed


def test_checkpoint_to_second_order(device: str) -> None:
    assert gradcheck(lambda x: checkpoint(lambda y: (y**3).exp(), x), leaf(2))
    assert gradgradcheck(lambda x: checkpoint(lambda y: y**3, x), leaf(2))


def test_checkpoint_keeps_less() -> None:
    x = leaf(1000)
    ys = []

    def block(x: Tensor) -> Tensor:
        y = x.exp()
        ys.append(weakref.ref(y.data))
        return (y * y).sum()

    out = checkpoint(block, x)
    assert ys[0]() is None
    kept = block(x)
    assert ys[1]() is not None
    assert out.item() == kept.item()


# -- detect_anomaly ----------------------------------------------------------------------------------------------------


def test_the_line_of_the_first_nan_is_named() -> None:
    x = t.tensor([1.0, -1.0], requires_grad=True)
    with (
        pytest.raises(FloatingPointError, match=r"log made the first NaN, at .*test_autograd\.py:\d+ in test_the_line"),
        detect_anomaly(),
    ):
        (x.log() * 2).sum()
    (x.log() * 2).sum()  # no check outside


def test_a_nan_in_backward_is_found_too() -> None:
    x = t.tensor([0.0, 1.0], requires_grad=True)
    with pytest.raises(FloatingPointError, match="NaN"), detect_anomaly():
        (x.sqrt() * 0).sum().backward()


# -- derivatives as functions ------------------------------------------------------------------------------------------


def test_jacobian(device: str) -> None:
    matrix = RNG.normal(size=(3, 2))
    x = leaf(2)
    found = jacobian(lambda x: t.tensor(matrix) @ x + x.sum() ** 2, x)
    assert_close(found, matrix + 2 * x.sum().item(), rtol=1e-10)
    assert x.grad is None
    by_a, by_b = jacobian(lambda a, b: a * b, (leaf(2), t.tensor([3.0, 4.0], dtype="float64")))
    assert_close(by_a, np.diag([3, 4]))
    assert by_b.shape == (2, 2)


def test_hessian(device: str) -> None:
    a = RNG.normal(size=(3, 3))
    found = hessian(lambda x: 0.5 * x @ t.tensor(a) @ x + (x**3).sum(), x := leaf(3))
    assert_close(found, (a + a.T) / 2 + np.diag(6 * x.detach().numpy()), rtol=1e-9)
    blocks = hessian(lambda x, y: (x * x * y).sum(), (u := leaf(2), v := leaf(2)))
    assert_close(blocks[0][0], np.diag(2 * v.detach().numpy()))
    assert_close(blocks[0][1], np.diag(2 * u.detach().numpy()))
    assert_close(blocks[1][1], np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"one output element, its output has shape \(3,\)"):
        hessian(lambda x: x * 2, leaf(3))


def test_products_with_the_jacobian(device: str) -> None:
    x, function = leaf(2), lambda x: t.stack([x[0] * x[1], x[0].exp(), x.sum()])
    full = jacobian(function, x).numpy()
    left, right = RNG.normal(size=3), RNG.normal(size=2)
    out, product = vjp(function, x, t.tensor(left))
    assert_close(out, function(x).detach())
    assert_close(product, left @ full)
    out, product = jvp(function, x, t.tensor(right))
    assert_close(out, function(x).detach())
    assert_close(product, full @ right)


# -- draw --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_draw_writes_a_picture(tmp_path: Any, ending: str) -> None:
    weight, x = leaf(2, 2), t.ones(3, 2, dtype="float64")
    path = draw(t.tanh(x @ weight).sum(), tmp_path / f"graph.{ending}", {"weight": weight})
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    if ending == "svg":
        assert b"weight" in content or content.count(b"<path") > 20


# -- the checks themselves ---------------------------------------------------------------------------------------------


def test_gradcheck_equals_the_mathematics() -> None:
    """The differences it compares with are those of a known function."""
    from tinytorch.m06_autograd import differences

    x = leaf(3)
    slopes = differences(lambda: (x.detach() ** 3).sum(), x, 1e-6)
    assert_close(slopes, 3 * x.detach().numpy() ** 2, rtol=1e-6)


def test_inputs_are_put_back() -> None:
    x = leaf(3)
    before = x.tolist()
    gradcheck(lambda x: x.exp(), x)
    assert x.tolist() == before


def test_gradients_of_float16_and_mixed_dtypes(device: str) -> None:
    if device == "array_api_strict":
        pytest.skip("the array standard has no float16")
    half, single = t.tensor([1.0, 2.0], dtype="float16", requires_grad=True), t.tensor([3.0, 4.0], requires_grad=True)
    (half * single).sum().backward()
    assert half.grad.dtype == "float16"
    assert single.grad.dtype == "float32"
    assert_close(half.grad, [3, 4])
    assert_close(single.grad, [1, 2])


def test_gradients_cross_devices() -> None:
    x = leaf(2)
    y = x.to("array_api_strict").exp()
    y.sum().backward()
    assert x.grad.device == "cpu"
    assert_close(x.grad, np.exp(x.detach().numpy()))
    assert math.isfinite(y.sum().item())
