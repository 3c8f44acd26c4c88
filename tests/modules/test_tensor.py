"""Tensors beyond what their chapter tests: in-place forms, views, printing, protocols, creation, drawing."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import tinytorch as t
from tinytorch.backends import backend_of
from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Op, Tensor, observe
from tinytorch.m02_tensor_appendix import Writes

RNG = np.random.default_rng(2024)

# -- in place ----------------------------------------------------------------------------------------------------------

X, Y = RNG.uniform(0.5, 2, (2, 3)), RNG.uniform(0.5, 2, (3,))
IN_PLACE = {
    "add_": (lambda x, y: x.add_(y), X + Y),
    "sub_": (lambda x, y: x.sub_(y), X - Y),
    "mul_": (lambda x, y: x.mul_(y), X * Y),
    "div_": (lambda x, y: x.div_(y), X / Y),
    "copy_": (lambda x, y: x.copy_(y), np.broadcast_to(Y, X.shape)),
    "fill_": (lambda x, y: x.fill_(2.5), np.full(X.shape, 2.5)),
    "zero_": (lambda x, y: x.zero_(), np.zeros(X.shape)),
    "clamp_": (lambda x, y: x.clamp_(1.0, 1.5), X.clip(1, 1.5)),
    "clamp_ min": (lambda x, y: x.clamp_(min=1.0), X.clip(1)),
    "exp_": (lambda x, y: x.exp_(), np.exp(X)),
    "sqrt_": (lambda x, y: x.sqrt_(), np.sqrt(X)),
    "neg_": (lambda x, y: x.neg_(), -X),
    "pow_": (lambda x, y: x.pow_(3), X**3),
    "masked_fill_": (lambda x, y: x.masked_fill_(x > 1, 0.0), np.where(X > 1, 0, X)),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_forms(name: str, dtype: str, device: str) -> None:
    form, expected = IN_PLACE[name]
    x, y = t.tensor(X, dtype=dtype), t.tensor(Y, dtype=dtype)
    array, view = x.data, x[0]
    before = next(Writes.clock)
    assert form(x, y) is x
    assert x.data is array
    assert x.dtype == dtype
    assert_close(x, expected)
    assert_close(view, expected[0])  # a view lies in the same memory
    assert Writes.since(x.data, before)
    assert Writes.since(view.data, before)
    assert not Writes.since(y.data, before)


def test_operators_in_place(device: str) -> None:
    x, y = t.tensor(X), t.tensor(Y)
    same = x
    x += y
    x -= 1
    x *= 2
    x /= y
    assert x is same
    assert_close(x, (X + Y - 1) * 2 / Y)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda: t.ones(3).add_(t.ones(2, 3)), ValueError, r"add: .*\(3,\).*\(2, 3\)"),
        (lambda: t.ones(2, 3).mul_(t.ones(4)), ValueError, r"mul: .*\(2, 3\).*\(4,\)"),
        (lambda: t.ones(3).copy_(t.ones(2)), ValueError, r"overwrite: .*\(3,\).*\(2,\)"),
        (lambda: t.tensor([1, 2]).add_(0.5), TypeError, "float32 result cannot be written into a .*int64 tensor"),
        (lambda: t.tensor([1, 2]).div_(2), TypeError, "float32 result cannot be written into a .*int64 tensor"),
        (lambda: t.ones(3).__setitem__(5, 1.0), IndexError, r"index_put: .*\(3,\)"),
        (lambda: t.ones(3).__setitem__(slice(0, 2), t.ones(3)), ValueError, r"index_put: .*\(3,\)"),
        (lambda: t.tensor([1, 2]).__setitem__(0, t.tensor(0.5)), TypeError, "cannot be written into"),
    ],
)
def test_in_place_errors(change: Any, error: type, words: str, device: str) -> None:
    with pytest.raises(error, match=f"(?s){words}"):
        change()


def test_integers_in_place_stay_integers(device: str) -> None:
    x = t.tensor([1, 2, 3], dtype="int32")
    x += t.tensor([1, 1, 1], dtype="int64")
    x *= 2
    x[0] = 7
    assert x.tolist() == [7, 6, 8]
    assert x.dtype == "int32"


def test_a_float64_value_is_rounded_into_a_float32_tensor(device: str) -> None:
    x = t.zeros(2)
    x += t.tensor([0.1, 0.2], dtype="float64")
    assert x.dtype == "float32"
    assert_close(x, [0.1, 0.2])


def test_drawing_in_place(device: str) -> None:
    manual_seed(3)
    x = t.zeros(4000)
    array = x.data
    assert x.uniform_(-1, 3) is x
    assert x.data is array
    assert x.amin().item() >= -1
    assert x.amax().item() < 3
    assert abs(x.mean().item() - 1) < 0.1
    x.normal_(5, 0.5)
    assert abs(x.mean().item() - 5) < 0.05
    assert abs(x.std().item() - 0.5) < 0.03


def test_writes_know_memory_and_time() -> None:
    x, other = t.ones(4), t.ones(4)
    start = next(Writes.clock)
    x[1:3].mul_(2)  # through a view
    middle = next(Writes.clock)
    assert Writes.since(x.data, start)
    assert Writes.since(x.reshape(2, 2).T.data, start)
    assert not Writes.since(x.data, middle)
    assert not Writes.since(other.data, start)


# -- views and copies --------------------------------------------------------------------------------------------------

VIEWS = {
    "reshape": lambda x: x.reshape(3, 2),
    "view": lambda x: x.view(-1),
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "permute": lambda x: x.permute(1, 0),
    "expand": lambda x: x.expand(4, 2, 3),
    "slice": lambda x: x[:, 1:],
    "integer": lambda x: x[0],
    "none": lambda x: x[None],
    "narrow": lambda x: x.narrow(1, 0, 2),
    "unbind": lambda x: x.unbind(1)[0],
    "split": lambda x: x.split(1)[0],
    "squeeze": lambda x: x.unsqueeze(0).squeeze(0),
    "detach": lambda x: x.detach(),
}
COPIES = {
    "clone": lambda x: x.clone(),
    "integer array": lambda x: x[[0]],
    "mask": lambda x: x[x > -9],
    "tensor()": lambda x: t.tensor(x),
    "flip": lambda x: x.flip(0),
    "repeat": lambda x: x.repeat(1, 1),
    "cat": lambda x: t.cat([x]),
    "pad": lambda x: t.nn.functional.pad(x, (0, 0)),
    "deepcopy": copy.deepcopy,
    "where": lambda x: t.where(x > -9, x, 0),
    "index_put": lambda x: t.index_put(x, 1.0, index=0),
}


@pytest.mark.parametrize("name", [*VIEWS, *COPIES])
def test_what_shares_memory(name: str) -> None:
    x = t.tensor(X)
    y = {**VIEWS, **COPIES}[name](x)
    assert np.shares_memory(x.numpy(), y.numpy()) == (name in VIEWS)


def test_numpy_shares_memory_both_ways() -> None:
    array = np.array([1.0, 2.0], dtype=np.float32)
    x = t.from_numpy(array)
    array[0] = 5
    assert x.tolist() == [5, 2]
    x += 1
    assert array.tolist() == [6, 3]
    x.numpy()[1] = 9
    assert x[1].item() == 9
    assert np.asarray(x) is not None
    assert np.shares_memory(np.asarray(x), array)
    copied = t.tensor(array)
    array[0] = 0
    assert copied[0].item() == 6


# -- printing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: t.tensor([1.0, 2.5]), "tensor([1. , 2.5])"),
        (lambda: t.tensor([[1, 2], [3, 4]]), "tensor([[1, 2],\n        [3, 4]])"),
        (lambda: t.tensor(True), "tensor(True)"),
        (lambda: t.tensor(1.5, dtype="float64"), "tensor(1.5, dtype=tinytorch.float64)"),
        (lambda: t.tensor([1], dtype="uint8"), "tensor([1], dtype=tinytorch.uint8)"),
        (lambda: t.zeros(0), "tensor([])"),
        (lambda: t.tensor([1.0], requires_grad=True), "tensor([1.], requires_grad=True)"),
        (lambda: t.tensor([1.0], requires_grad=True) * 2, "tensor([2.], grad_fn=<mul>)"),
        (lambda: t.ones(1, device="array_api_strict"), "tensor([1.], device='array_api_strict')"),
    ],
)
def test_repr(make: Any, expected: str) -> None:
    assert repr(make()) == expected


def test_large_tensors_are_abbreviated() -> None:
    text = repr(t.arange(10_000))
    assert "..." in text
    assert len(text) < 200


# -- protocols ---------------------------------------------------------------------------------------------------------


def test_pickling_is_refused() -> None:
    with pytest.raises(TypeError, match=r"tensors are not pickled.*tinytorch\.save"):
        pickle.dumps(t.ones(2))


def test_deepcopy_copies_once_and_keeps_what_is_watched(device: str) -> None:
    x = t.tensor([1.0, 2.0], requires_grad=True)
    (x * 3).sum().backward()
    first, second = copy.deepcopy([x, x])
    assert first is second
    assert first is not x
    assert first.requires_grad
    first.detach().add_(1)
    assert x.tolist() == [1, 2]
    assert first.tolist() == [2, 3]


def test_array_protocol() -> None:
    x = t.tensor(X)
    assert_close(np.asarray(x), X)
    assert np.asarray(x, dtype=np.float32).dtype == np.float32
    assert np.array(x, copy=True) is not x.data
    assert not np.shares_memory(np.array(x), x.data)
    assert_close(np.sin(np.asarray(x)), np.sin(X))


@pytest.mark.parametrize("operation", ["__add__", "__sub__", "__mul__", "__truediv__", "__pow__", "__matmul__"])
def test_numpy_on_the_left_gives_a_tensor(operation: str) -> None:
    array, x = RNG.uniform(1, 2, (2, 2)), RNG.uniform(1, 2, (2, 2))
    out = getattr(np.ndarray, operation)(array, t.tensor(x))
    if out is NotImplemented:
        out = {
            "__add__": lambda: array + t.tensor(x),
            "__sub__": lambda: array - t.tensor(x),
            "__mul__": lambda: array * t.tensor(x),
            "__truediv__": lambda: array / t.tensor(x),
            "__pow__": lambda: array ** t.tensor(x),
            "__matmul__": lambda: array @ t.tensor(x),
        }[operation]()
    assert isinstance(out, Tensor)
    assert_close(out, getattr(array, operation)(x))


def test_dlpack() -> None:
    x = t.tensor(X)
    there = np.from_dlpack(x)
    assert np.shares_memory(there, x.numpy())
    back = t.from_dlpack(np.array([1.0, 2.0]))
    assert back.tolist() == [1, 2]
    assert x.__dlpack_device__() == (1, 0)


def test_python_protocols(device: str) -> None:
    x = t.tensor([3, 1, 2])
    assert len(x) == 3
    assert [y.item() for y in x] == [3, 1, 2]
    assert 2 in x
    assert 7 not in x
    assert ["a", "b", "c", "d"][t.tensor(2)] == "c"
    assert int(t.tensor(2.7)) == 2
    assert float(t.tensor(2)) == 2.0
    assert bool(t.tensor([0.0])) is False
    assert x.size() == (3,)
    assert x.size(0) == 3
    assert x.dim() == 1
    assert x.nbytes == 24
    assert hash(x) == hash(x)
    assert x.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (lambda: bool(t.ones(2)), ValueError, r"truth of a tensor of shape \(2,\) is ambiguous"),
        (lambda: t.ones(2).item(), ValueError, r"item: expected one element, the tensor has shape \(2,\)"),
        (lambda: len(t.tensor(1)), TypeError, "without axes"),
        (lambda: [1, 2][t.tensor(1.0)], TypeError, "not an index"),
        (lambda: Tensor.extend(shape=1), AttributeError, r"Tensor\.shape exists already"),
        (lambda: t.tensor([[1], [1, 2]]), TypeError, "numbers in lists of equal length"),
        (lambda: t.tensor("word"), TypeError, "'word'"),
        (lambda: t.tensor([1.0], colour="red"), TypeError, "no attribute 'colour'"),
        (lambda: t.ones(2, dtype="float33"), TypeError, "no dtype 'float33'"),
        (lambda: t.from_numpy([1]), TypeError, "from_numpy: expected a NumPy array"),
        (lambda: t.arange(0, 3, 0), ValueError, "arange: cannot go from 0 to 3 by 0"),
        (lambda: t.arange(0, 3, -1), ValueError, "arange: cannot go"),
        (lambda: t.set_default_dtype("int64"), TypeError, "expected a floating dtype"),
        (lambda: t.set_default_device("nowhere"), RuntimeError, "there is no device 'nowhere'"),
        (lambda: t.randint(5, 5, (2,)), ValueError, "randint: expected low < high"),
        (lambda: t.bernoulli(t.tensor([1.5])), ValueError, "bernoulli: expected probabilities"),
        (lambda: t.multinomial(t.tensor([0.0, 0.0]), 1), ValueError, "multinomial: expected weights"),
        (lambda: t.multinomial(t.tensor([0.5, -1.0]), 1), ValueError, "multinomial: expected weights"),
        (lambda: t.multinomial(t.tensor([0.5, 0.0]), 2), ValueError, "cannot draw 2 of 1"),
    ],
)
def test_bad_use(wrong: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        wrong()


# -- creation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected", "dtype"),
    [
        (lambda: t.tensor([True, False]), [True, False], "bool"),
        (lambda: t.tensor([1, 2.5]), [1, 2.5], "float32"),
        (lambda: t.tensor(np.array([1.0])), [1.0], "float64"),
        (lambda: t.tensor(0.1, dtype="float64"), 0.1, "float64"),
        (lambda: t.tensor([t.tensor(1.0), t.tensor(2.0)]), [1, 2], "float32"),
        (lambda: t.full((2,), 3), [3, 3], "int64"),
        (lambda: t.full((2,), True), [True, True], "bool"),
        (lambda: t.full((2,), 0.5), [0.5, 0.5], "float32"),
        (lambda: t.arange(4), [0, 1, 2, 3], "int64"),
        (lambda: t.arange(1, 2, 0.25), [1, 1.25, 1.5, 1.75], "float32"),
        (lambda: t.arange(3, 0, -1), [3, 2, 1], "int64"),
        (lambda: t.linspace(0, 1, 5), [0, 0.25, 0.5, 0.75, 1], "float32"),
        (lambda: t.eye(2, 3), [[1, 0, 0], [0, 1, 0]], "float32"),
        (lambda: t.zeros_like(t.tensor([1, 2])), [0, 0], "int64"),
        (lambda: t.ones_like(t.tensor([0.5]), dtype="float64"), [1], "float64"),
        (lambda: t.full_like(t.tensor([0.5]), 2), [2], "float32"),
        (lambda: t.as_tensor([1.5]), [1.5], "float32"),
    ],
)
def test_creation(make: Any, expected: Any, dtype: str, device: str) -> None:
    x = make()
    assert x.dtype == dtype
    assert backend_of(x.data) is backend_of(t.zeros(1).data)
    np.testing.assert_array_equal(x.numpy(), np.array(expected, dtype=dtype))


def test_default_dtype_is_what_floats_become() -> None:
    t.set_default_dtype("float64")
    try:
        assert (
            t.tensor(1.5).dtype
            == t.zeros(2).dtype
            == t.exp(t.tensor([1])).dtype
            == (t.tensor([1]) / 2).dtype
            == "float64"
        )
    finally:
        t.set_default_dtype("float32")
    assert t.tensor(1.5).dtype == (t.tensor([1]) / 2).dtype == "float32"


def test_as_tensor_copies_only_if_it_must() -> None:
    array = np.ones(3)
    assert t.as_tensor(array).data is array
    x = t.ones(3)
    assert t.as_tensor(x) is x
    assert t.as_tensor(array, dtype="float32").dtype == "float32"


def test_a_numpy_scalar_becomes_a_tensor_that_can_be_changed() -> None:
    x = Tensor(np.float64(2.0))
    x += 1
    assert x.item() == 3
    assert t.as_tensor(np.float32(1.5)).dtype == "float32"


def test_devices() -> None:
    x = t.tensor([1.0, 2.0], device="array_api_strict")
    assert x.device == "array_api_strict"
    assert x.to("cpu").device == "cpu"
    assert x.cpu().tolist() == [1, 2]
    assert x.to(t.zeros(1, dtype="float64")).dtype == "float64"
    assert x.to(t.zeros(1)).device == "cpu"
    assert t.device("cuda:1").index == 1
    assert t.device("cuda:1").type == "cuda"
    assert t.device("cpu").index is None


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_draws_have_their_distributions(device: str) -> None:
    manual_seed(11)
    n = 20_000
    assert_close(t.rand(n).mean(), 0.5, atol=0.02)
    assert_close(t.randn(n).std(), 1.0, atol=0.03)
    counts = t.nn.functional.one_hot(t.randint(2, 6, (n,)) - 2, 4).sum(0)
    assert_close(counts / n, [0.25] * 4, atol=0.02)
    assert sorted(t.randperm(50).tolist()) == list(range(50))
    assert t.randperm(50).tolist() != list(range(50))
    assert_close(t.bernoulli(t.full((n,), 0.3)).mean(), 0.3, atol=0.02)
    assert t.rand_like(t.zeros(2, 3)).shape == (2, 3) == t.randn_like(t.zeros(2, 3)).shape


@pytest.mark.filterwarnings("ignore:divide by zero")  # of other libraries than NumPy
@pytest.mark.parametrize("replacement", [False, True])
def test_multinomial(replacement: bool, device: str) -> None:
    manual_seed(5)
    weights = t.tensor([[1.0, 0.0, 3.0], [2.0, 2.0, 0.0]])
    drawn = t.stack([t.multinomial(weights, 1, replacement) for _ in range(1500)]).reshape(1500, 2)
    shares = np.stack([(drawn.numpy() == k).mean(0) for k in range(3)], 1)
    np.testing.assert_allclose(shares, [[0.25, 0, 0.75], [0.5, 0.5, 0]], atol=0.05)


def test_without_replacement_nothing_comes_twice(device: str) -> None:
    drawn = t.multinomial(t.ones(200, 5), 5)
    assert (np.sort(drawn.numpy(), 1) == np.arange(5)).all()


def test_same_seed_same_numbers_on_every_library() -> None:
    drawn = []
    for device in ("cpu", "array_api_strict"):
        manual_seed(9)
        drawn.append(
            [
                t.randn(3, device=device).tolist(),
                t.rand(2, device=device).tolist(),
                t.randperm(5, device=device).tolist(),
            ]
        )
    assert drawn[0] == drawn[1]


# -- the door ----------------------------------------------------------------------------------------------------------


def test_raw_arrays_in_raw_arrays_out() -> None:
    out = t.exp(np.array([0.0, 1.0]))
    assert type(out) is np.ndarray
    assert_close(out, [1, math.e])


def test_an_implementation_stands_in_where_its_condition_holds() -> None:
    calls = []

    def faster(xp: Any, x: Any) -> Any:
        calls.append(x.shape)
        return np.tanh(x)

    t.tanh.implement("numpy", faster, lambda x: x.ndim == 2)
    try:
        assert_close(t.tanh(t.tensor([[0.5]])), [[math.tanh(0.5)]])
        assert_close(t.tanh(t.tensor([0.5])), [math.tanh(0.5)])
    finally:
        t.tanh.implementations.clear()
    assert calls == [(1, 1)]


def test_a_number_that_does_not_fit_is_an_error_of_the_operation(device: str) -> None:
    with pytest.raises(ValueError, match=r"add: .*int8"):
        t.tensor([1], dtype="int8") + 200


def test_observers_nest_and_leave() -> None:
    seen = []

    def observer(label: str) -> Any:
        def look(op: Op, arrays: list, attributes: dict, proceed: Any) -> Any:
            seen.append((label, op.name, attributes))
            return proceed()

        return look

    with observe(observer("outer")):
        with pytest.raises(ValueError, match="add: "), observe(observer("inner")):
            t.ones(2) + t.ones(3)
        t.ones(2).sum(0)
    t.ones(2).sum()
    assert seen == [("inner", "add", {}), ("outer", "add", {}), ("outer", "sum", {"dim": 0})]


def test_an_operation_is_defined_once() -> None:
    def exp(xp: Any, x: Any) -> Any:
        return x

    with pytest.raises(ValueError, match=r"operation 'exp' already, in tinytorch\.m02_tensor"):
        Op(exp)


def test_infinite_results_warn_nobody_but_users_keep_their_warnings() -> None:
    code = (
        "import warnings; warnings.simplefilter('error'); import numpy as np, tinytorch as t; t.zeros(1)\n"
        "assert t.log(t.zeros(2)).tolist() == [-float('inf')] * 2\n"
        "t.zeros(1) / t.zeros(1); t.tensor([-1.0]).sqrt(); t.erf(t.tensor([float('inf')], dtype='float64'))\n"
        "try: np.log(np.zeros(2))\n"
        "except RuntimeWarning: print('kept')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "kept", done.stderr


def test_an_operation_of_the_same_name_is_refused_but_from_its_own_module() -> None:
    """A notebook's cell is run again and again; the operation of another module stays what it is."""
    from tinytorch.m02_tensor import Op, op

    def matmul(xp: Any, a: Any, b: Any) -> Any:
        return a

    with pytest.raises(ValueError, match="there is an operation 'matmul' already"):
        op(matmul)
    assert Op.registry["matmul"] is t.matmul

    def only_here(xp: Any, x: Any) -> Any:
        return x

    op(only_here)
    try:
        second = op(only_here)
        assert Op.registry["only_here"] is second
    finally:
        del Op.registry["only_here"]
