"""Optimizers, schedules, clipping and averages: on each array library, in long runs, and with bad input."""

from __future__ import annotations

import json
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from tinytorch.m01_setup import assert_close, to_numpy
from tinytorch.m02_tensor import Tensor, randn, tensor
from tinytorch.m02_tensor_appendix import from_numpy
from tinytorch.m04_layers import Linear, Parameter, Sequential
from tinytorch.m06_autograd import no_grad
from tinytorch.m07_optimizers import (
    SGD,
    Adam,
    AdamW,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    Optimizer,
    SequentialLR,
    StepLR,
    clip_grad_norm_,
)
from tinytorch.m07_optimizers_appendix import (
    EMA,
    Adagrad,
    ConstantLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    Lion,
    OneCycleLR,
    ReduceLROnPlateau,
    RMSprop,
    clip_grad_value_,
)

OPTIMIZERS: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "maximize": True}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (Adam, {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}),
    (AdamW, {"lr": 0.1, "maximize": True}),
    (RMSprop, {"lr": 0.1, "centered": True, "momentum": 0.9, "eps": 1e-2}),
    (Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    (Lion, {"lr": 0.1, "weight_decay": 0.1}),
]
NAMES = [f"{make.__name__}-{'-'.join(options)}" for make, options in OPTIMIZERS]


def weights(*shapes: tuple, seed: int = 0) -> list[Tensor]:
    generator = np.random.default_rng(seed)
    return [tensor(np.asarray(generator.normal(size=shape), "float32"), requires_grad=True) for shape in shapes]


def set_grads(parameters: list[Tensor], generator: np.random.Generator) -> None:
    for p in parameters:
        p.grad = tensor(np.asarray(generator.normal(size=p.shape), "float32"))


# -- what optimizers do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS, ids=NAMES)
def test_every_device_takes_the_same_steps(device: str, make: type[Optimizer], options: dict) -> None:
    here = weights((4, 3), (), (5,))
    there = [tensor(p.numpy(), device="cpu", requires_grad=True) for p in here]
    for parameters in (here, there):
        optimizer, generator = make(parameters, **options), np.random.default_rng(1)
        for _ in range(5):
            for p in parameters:
                p.grad = tensor(np.asarray(generator.normal(size=p.shape), "float32"), device=p.device)
            optimizer.step()
    for p, q in zip(here, there, strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert all(x.device == q.device and x.dtype == q.dtype for x in optimizer_tensors(optimizer, q))


def optimizer_tensors(optimizer: Optimizer, p: Tensor) -> list[Tensor]:
    return [x for x in optimizer.state[p].values() if isinstance(x, Tensor)]


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS, ids=NAMES)
def test_steps_allocate_nothing_and_keep_the_arrays(make: type[Optimizer], options: dict) -> None:
    parameters = weights((300, 200), (300,))
    arrays, optimizer = [p.data for p in parameters], make(parameters, **options)
    set_grads(parameters, np.random.default_rng(2))
    optimizer.step()
    tracemalloc.start()
    for _ in range(3):
        optimizer.step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000  # one array of the larger shape has 240,000 bytes
    assert all(p.data is array for p, array in zip(parameters, arrays, strict=True))


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS, ids=NAMES)
def test_gradients_are_left_as_they_are(make: type[Optimizer], options: dict) -> None:
    parameters = weights((6, 2))
    set_grads(parameters, np.random.default_rng(3))
    before = parameters[0].grad.numpy().copy()
    optimizer = make(parameters, **options)
    optimizer.step()
    optimizer.step()
    assert_close(parameters[0].grad, before, rtol=0, atol=0)


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS, ids=NAMES)
def test_a_bowl_leads_to_its_bottom(make: type[Optimizer], options: dict) -> None:
    (w,) = weights((7,), seed=4)
    sign = -1 if options.get("maximize") else 1
    changed = {"lr": 1.0, "lr_decay": 0.0} if make is Adagrad else {"lr": 0.05, "weight_decay": 0.0}
    optimizer = make([w], **{**options, **changed})
    for _ in range(600):
        optimizer.zero_grad()
        (sign * (w - 1) ** 2).sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.995
    assert_close(w, np.ones(7), atol=0.01)


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS, ids=NAMES)
def test_interrupted_equals_uninterrupted_to_the_bit(make: type[Optimizer], options: dict) -> None:
    whole, first = weights((4, 3), (2,)), weights((4, 3), (2,))
    generators = np.random.default_rng(5), np.random.default_rng(5)
    optimizers = make(whole, **options), make(first, **options)
    for step in range(6):
        if step == 3:
            state = optimizers[1].state_dict()
            second = [tensor(p.detach(), requires_grad=True) for p in first]
            optimizers = optimizers[0], make(second)
            optimizers[1].load_state_dict({**state, "param_groups": json.loads(json.dumps(state["param_groups"]))})
            first = second
        for parameters, optimizer, generator in zip((whole, first), optimizers, generators, strict=True):
            set_grads(parameters, generator)
            optimizer.step()
    for p, q in zip(whole, first, strict=True):
        assert_close(p, q, rtol=0, atol=0)
    assert optimizers[0].param_groups[0].keys() == optimizers[1].param_groups[0].keys()
    for group, restored in zip(*(o.param_groups for o in optimizers), strict=True):
        assert all(group[name] == restored[name] for name in group if name != "params")


def test_a_loaded_state_shares_no_memory_with_the_saved_one() -> None:
    (p,), (q,) = weights((3,)), weights((3,))
    saved, loaded = Adam([p]), Adam([q])
    set_grads([p], np.random.default_rng(6))
    saved.step()
    loaded.load_state_dict(saved.state_dict())
    before = loaded.state[q]["exp_avg"].numpy().copy()
    saved.step()
    assert_close(loaded.state[q]["exp_avg"], before, rtol=0, atol=0)
    assert (saved.state[p]["step"], loaded.state[q]["step"]) == (2, 1)


def test_groups_have_options_of_their_own() -> None:
    a, b, c = weights((2,), (2,), (2,))
    optimizer = SGD([{"params": [a]}, {"params": b, "lr": 0.5, "name": "head"}], lr=0.1)
    optimizer.add_param_group({"params": iter([c]), "lr": 2.0})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5, 2.0]
    assert optimizer.param_groups[1]["name"] == "head"
    before = [p.numpy().copy() for p in (a, b, c)]
    for p in (a, b, c):
        p.grad = tensor([1.0, -1.0])
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    for p, old, lr in zip((a, b, c), before, (0.25, 0.5, 2.0), strict=True):
        assert_close(p, old - lr * np.array([1.0, -1.0]))
    assert optimizer.state_dict() == {
        "state": {},
        "param_groups": [
            {**group, "params": [i]} for i, group in enumerate(optimizer.param_groups)
        ],
    }  # fmt: skip


def test_names_come_along() -> None:
    layer = Linear(3, 2)
    optimizer = Adam(layer.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.param_groups[0]["params"][0] is layer.weight


def test_a_frozen_parameter_is_passed_over() -> None:
    layer = Linear(3, 2)
    layer.weight.requires_grad = False
    optimizer, before = SGD(layer.parameters(), lr=1.0, weight_decay=0.5), layer.weight.numpy().copy()
    layer(randn(4, 3)).sum().backward()
    optimizer.step()
    assert_close(layer.weight, before, rtol=0, atol=0)


def test_a_closure_computes_the_gradients_also_inside_no_grad() -> None:
    (w,) = weights((3,))
    optimizer = SGD([w], lr=0.5)

    def closure() -> Tensor:
        assert w.requires_grad
        optimizer.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        return loss

    expected = float((w.numpy() ** 2).sum())
    with no_grad():
        assert_close(optimizer.step(closure), expected)
    assert_close(w, [0, 0, 0])


def test_zero_grad_can_write_zeros() -> None:
    (w,) = weights((3,))
    w.grad = tensor([1.0, 2.0, 3.0])
    array, optimizer = w.grad.data, SGD([w])
    optimizer.zero_grad(set_to_none=False)
    assert w.grad.data is array
    assert_close(w.grad, [0, 0, 0])
    optimizer.zero_grad()
    assert w.grad is None


def test_backward_after_a_step_is_told_that_the_weight_changed() -> None:
    (w,) = weights((3,))
    loss = (w * w).sum()
    w.grad = tensor([1.0, 1.0, 1.0])
    SGD([w]).step()
    with pytest.raises(RuntimeError, match=r"(?i)in.place|changed|written"):
        loss.backward()


def test_a_step_that_is_no_update_of_ours() -> None:
    class SignSGD(Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        def update(self, xp, parameter, grad, state, scratch, group):
            parameter -= group["lr"] * xp.sign(grad)

    w = Parameter(tensor([1.0, 1.0]))
    w.grad = tensor([5.0, -0.1])
    SignSGD([w], lr=0.5).step()
    assert_close(w, [0.5, 1.5])
    with pytest.raises(NotImplementedError, match="update"):
        Optimizer([w], {"lr": 1.0}).step()


def test_parameters_may_be_updated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c, d = weights((2,), (3,), (2,), (4,))
    for p in (a, b, c):
        p.grad = tensor(np.ones(p.shape, "float32"))
    optimizer = SGD([{"params": [a, b, d]}, {"params": [c], "lr": 2.0}], lr=1.0)
    before, seen = [p.numpy().copy() for p in (a, b, c, d)], []

    def all_but_b(given: Optimizer, group: dict, parameters: list[Tensor]) -> list[Tensor]:
        assert given is optimizer
        seen.append((group["lr"], [id(p) for p in parameters]))
        for p in parameters:
            p.data[...] = 7 if p is not b else p.data
        return [p for p in parameters if p is b]

    monkeypatch.setitem(Optimizer.together, SGD, all_but_b)
    optimizer.step()
    assert seen == [(1.0, [id(a), id(b)]), (2.0, [id(c)])]  # d has no gradient
    assert_close(b, before[1] - 1)
    for p, expected in ((a, [7, 7]), (c, [7, 7]), (d, before[3])):
        assert_close(p, expected)

    class Mine(SGD):
        def update(self, xp, parameter, grad, state, scratch, group):
            parameter[...] = 1

    Mine([a]).step()
    assert_close(a, [1, 1])  # a subclass may do something else: nothing is taken over from its base
    assert len(seen) == 2


def test_repr_shows_the_options_of_each_group() -> None:
    a, b = weights((2,), (2,))
    text = repr(SGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.25))
    assert text.startswith("SGD (\nParameter Group 0\n    dampening: 0\n    lr: 0.25\n")
    assert "Parameter Group 1" in text
    assert "lr: 0.5" in text


def test_float16_weights_keep_their_dtype() -> None:
    w = tensor([1.0, 2.0], dtype="float16", requires_grad=True)
    w.grad = tensor([0.5, -0.5], dtype="float16")
    for make in (SGD, AdamW, Lion):
        make([w], lr=0.5).step()
        assert w.dtype == "float16"
    assert np.isfinite(w.numpy()).all()


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (SGD, {"lr": -1.0}, "SGD: lr must be 0 or more, not -1.0"),
        (Adam, {"lr": math.nan}, "Adam: lr must be 0 or more, not nan"),
        (Adam, {"betas": (1.0, 0.9)}, r"both betas must lie in \[0, 1\), got \(1.0, 0.9\)"),
        (AdamW, {"betas": (0.9, -0.1)}, "both betas"),
        (AdamW, {"eps": -1e-8}, "eps must be 0 or more"),
        (RMSprop, {"alpha": -0.1}, "alpha must be 0 or more"),
        (RMSprop, {"momentum": -0.1}, "momentum must be 0 or more"),
        (Adagrad, {"lr_decay": -1}, "lr_decay must be 0 or more"),
        (Adagrad, {"initial_accumulator_value": -1}, "initial_accumulator_value must be 0 or more"),
        (Lion, {"weight_decay": -1}, "weight_decay must be 0 or more"),
        (SGD, {"nesterov": True}, "nesterov needs momentum > 0 and dampening 0, got momentum 0 and dampening 0"),
        (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov needs"),
    ],
)
def test_options_out_of_range(make: type[Optimizer], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(weights((2,)), **options)
    with pytest.raises(ValueError, match=message):  # in a group, too
        make([{"params": weights((2,)), **options}])


def test_what_is_no_parameter() -> None:
    (w,) = weights((2,))
    cases: list[tuple[Any, type[Exception], str]] = [
        ([], ValueError, "the parameter list is empty"),
        (iter([]), ValueError, "the parameter list is empty"),
        (w, TypeError, "expected a list of tensors or of groups, got a Tensor"),
        ({w}, TypeError, "got a set"),
        ([{"params": {w}}], TypeError, "a set has no order"),
        ([{"lr": 1.0}], TypeError, "a group is a dict with 'params' in it"),
        ([[1.0, 2.0]], TypeError, "expected tensors to optimize, got list"),
        ([w, w], ValueError, r"a parameter of shape \(2,\) is given twice"),
        ([{"params": [w]}, {"params": [w]}], ValueError, "is given twice"),
        ([w * 2], ValueError, "is the result of an operation"),
        ([tensor([1.0])], ValueError, "does not require grad"),
        ([tensor([1, 2])], TypeError, "only tensors of floats"),
        ([("w", w), weights((1,))[0]], ValueError, "1 of 2 parameters have names"),
    ]
    for params, error, message in cases:
        with pytest.raises(error, match=message):
            SGD(params)


def test_a_group_that_is_refused_changes_nothing() -> None:
    a, b = weights((2,), (2,))
    optimizer = SGD([a])
    with pytest.raises(ValueError, match="given twice"):
        optimizer.add_param_group({"params": [b, a]})
    assert len(optimizer.param_groups) == 1


def test_a_gradient_of_another_shape() -> None:
    (w,) = weights((2, 3))
    w.grad = tensor(np.ones((2, 3), "float32"))
    w.data = w.data[0]
    with pytest.raises(ValueError, match=r"SGD: a parameter of shape \(3,\) has a grad of \(2, 3\)"):
        SGD([w]).step()


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    p, q = weights((2, 3), (4,))
    optimizer = Adam([p, q])
    set_grads([p, q], np.random.default_rng(7))
    optimizer.step()
    good = optimizer.state_dict()

    def with_state(i: int, **values: Any) -> dict:
        return {**good, "state": {**good["state"], i: {**good["state"].get(i, {}), **values}}}

    momentum = SGD(weights((2, 3), (4,)), momentum=0.9)
    for x in (momentum_p := momentum.param_groups[0]["params"]):
        x.grad = tensor(np.ones(x.shape, "float32"))
    momentum.step()
    assert len(momentum_p) == 2
    cases = [
        (Adam(weights((2, 3))).state_dict(), r"saved state is of groups of \[1\] parameters; this one has \[2\]"),
        (with_state(1, exp_avg=tensor([1.0])), r"parameter 1, exp_avg, has shape \(1,\), the parameter \(4,\)"),
        (with_state(7, step=1, exp_avg=p, exp_avg_sq=p), "parameter 7 belongs to no group"),
        (momentum.state_dict(), "parameter 0 lacks step, exp_avg, exp_avg_sq"),
        ({**good, "param_groups": [{**good["param_groups"][0], "lr": -1}]}, "lr must be 0 or more"),
    ]
    before = optimizer.state[q]["exp_avg"]
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert optimizer.state[q]["exp_avg"] is before
        assert optimizer.param_groups[0]["lr"] == 1e-3


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_bad_schedules() -> None:
    optimizer, other = SGD(weights((2,))), SGD(weights((2,)))
    no_momentum = Adagrad(weights((2,)))
    cases: list[tuple[type, tuple, dict, type[Exception], str]] = [
        (StepLR, (weights((2,)), 3), {}, TypeError, "expected an optimizer, got list"),
        (StepLR, (optimizer, 0), {}, ValueError, "step_size must be at least 1"),
        (StepLR, (optimizer, 2), {"last_epoch": 5}, KeyError, "no 'initial_lr'"),
        (CosineAnnealingLR, (optimizer, 0), {}, ValueError, "T_max must be at least 1"),
        (CosineAnnealingWarmRestarts, (optimizer, 0), {}, ValueError, "T_0 and T_mult"),
        (CosineAnnealingWarmRestarts, (optimizer, 2, 0.5), {}, ValueError, "got 2, 0.5"),
        (LinearLR, (optimizer,), {"start_factor": 0}, ValueError, "start_factor must lie in"),
        (LinearLR, (optimizer,), {"end_factor": 1.5}, ValueError, "end_factor in"),
        (ConstantLR, (optimizer,), {"factor": 2}, ValueError, "factor must lie in"),
        (LambdaLR, (optimizer, [abs, abs]), {}, ValueError, "expected 1 functions, one for each group, got 2"),
        (OneCycleLR, (optimizer, 0.1), {}, ValueError, "give total_steps, or epochs and steps_per_epoch"),
        (OneCycleLR, (optimizer, 0.1, 0), {}, ValueError, "whole numbers above 0"),
        (OneCycleLR, (optimizer, 0.1, 9), {"pct_start": 1.5}, ValueError, "pct_start"),
        (OneCycleLR, (optimizer, 0.1, 9), {"anneal_strategy": "up"}, ValueError, "'cos' or 'linear', not 'up'"),
        (OneCycleLR, (optimizer, [0.1, 0.2], 9), {}, ValueError, "max_lr: expected 1 values"),
        (OneCycleLR, (no_momentum, 0.1, 9), {}, ValueError, "Adagrad has neither momentum nor betas"),
        (ReduceLROnPlateau, (optimizer, "best"), {}, ValueError, "got 'best' and 'rel'"),
        (ReduceLROnPlateau, (optimizer,), {"factor": 1.0}, ValueError, "factor must be below 1"),
        (ReduceLROnPlateau, (optimizer,), {"min_lr": [0, 0]}, ValueError, "expected 1 values of min_lr"),
        (SequentialLR, (optimizer, [], []), {}, ValueError, "0 schedulers need 0 milestones"),
        (SequentialLR, (optimizer, [StepLR(optimizer, 2)], [3]), {}, ValueError, "1 schedulers need 0 milestones"),
        (SequentialLR, (optimizer, [StepLR(other, 2)], []), {}, ValueError, "belongs to another optimizer"),
        (SequentialLR, (optimizer, [ReduceLROnPlateau(optimizer)], []), {}, ValueError, "which needs a metric"),
        (LRScheduler, (optimizer,), {}, NotImplementedError, "must implement get_lr"),
    ]
    for make, arguments, options, error, message in cases:
        if "last_epoch" in options:
            arguments = (SGD(weights((2,))), *arguments[1:])
        with pytest.raises(error, match=message):
            make(*arguments, **options)


def test_one_cycle_ends() -> None:
    scheduler = OneCycleLR(SGD(weights((2,)), momentum=0.9), 0.1, total_steps=3)
    for _ in range(3):
        scheduler.step()
    with pytest.raises(ValueError, match="step 4 of 3; the cycle is over"):
        scheduler.step()


def test_one_cycle_of_a_single_step_up_starts_at_the_top() -> None:
    optimizer = SGD(weights((2,)))
    OneCycleLR(optimizer, 0.5, total_steps=10, pct_start=0.1, cycle_momentum=False)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_group_added_under_a_schedule_is_noticed() -> None:
    optimizer = SGD(weights((2,)))
    scheduler = LambdaLR(optimizer, lambda epoch: 1.0)
    optimizer.add_param_group({"params": weights((3,), seed=8)})
    with pytest.raises(ValueError, match="LambdaLR was made for 1 groups, the optimizer has 2"):
        scheduler.step()


def test_sequences_nest() -> None:
    optimizer = SGD(weights((2,)), lr=1.0)
    inner = SequentialLR(optimizer, [ConstantLR(optimizer, 0.5, 9), StepLR(optimizer, 1, 0.1)], [2])
    outer = SequentialLR(optimizer, [LinearLR(optimizer, 0.25, total_iters=3), inner], [2])
    seen = [optimizer.param_groups[0]["lr"]]
    for _ in range(5):
        outer.step()
        seen += outer.get_last_lr()
    assert_close(seen, [0.25, 0.5, 0.5, 0.5, 1.0, 0.1])


def test_callable_objects_are_saved_with_their_attributes() -> None:
    class Decay:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, epoch: int) -> float:
            return self.factor**epoch

    saved = LambdaLR(SGD(weights((2,)), lr=1.0), Decay(0.5)).state_dict()
    assert saved["lr_lambdas"] == [{"factor": 0.5}]
    scheduler = LambdaLR(SGD(weights((2,)), lr=1.0), Decay(0.9))
    scheduler.load_state_dict(saved)
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5]


# -- clipping ----------------------------------------------------------------------------------------------------------


def test_clipping_on_every_device(device: str) -> None:
    parameters = weights((3, 2), (4,))
    set_grads(parameters, np.random.default_rng(9))
    grads = [p.grad.numpy().copy() for p in parameters]
    length = math.sqrt(sum(float((g.astype("float64") ** 2).sum()) for g in grads))
    total = clip_grad_norm_((p for p in parameters), length / 4)
    assert_close(total, length)
    for p, g in zip(parameters, grads, strict=True):
        assert_close(p.grad, g / 4, rtol=1e-4)
    clip_grad_value_(parameters, 0.1)
    for p, g in zip(parameters, grads, strict=True):
        assert_close(p.grad, np.clip(g / 4, -0.1, 0.1), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_clipping_what_is_not_finite() -> None:
    a, b = weights((2,), (2,))
    a.grad, b.grad = tensor([math.inf, 1.0]), tensor([1.0, 1.0])
    with pytest.raises(RuntimeError, match="have norm inf"):
        clip_grad_norm_([a, b], 1.0, error_if_nonfinite=True)
    assert_close(b.grad, [1, 1])
    assert clip_grad_norm_([a, b], 1.0).item() == math.inf
    assert_close(b.grad, [0, 0])
    assert math.isnan(a.grad.numpy()[0])


def test_clipping_nothing() -> None:
    (w,) = weights((2,))
    assert clip_grad_norm_(w, 1.0).item() == 0.0
    clip_grad_value_(w, 1.0)
    with pytest.raises(ValueError, match="clip_value must be 0 or more"):
        clip_grad_value_(w, -1.0)


# -- averages ----------------------------------------------------------------------------------------------------------


def test_an_average_of_weights(device: str) -> None:
    model = Sequential(Linear(3, 2), Linear(2, 1))
    ema, generator = EMA(model, decay=0.9), np.random.default_rng(10)
    expected: dict[str, np.ndarray] = {}
    for step in range(5):
        for name, p in model.named_parameters():
            value = generator.normal(size=p.shape).astype("float32")
            with no_grad():
                p.copy_(tensor(value))
            expected[name] = 0.9 * expected[name] + 0.1 * value if step else value
        ema.update()
    last = {name: p.numpy().copy() for name, p in model.named_parameters()}
    with ema.applied():
        for name, p in model.named_parameters():
            assert_close(p, expected[name])
        with pytest.raises(RuntimeError, match=r"EMA.update: the model already holds the averages; call restore\(\)"):
            ema.update()
    for name, p in model.named_parameters():
        assert_close(p, last[name], rtol=0, atol=0)
        assert p.watched
        assert not ema.averages[name].watched
    with pytest.raises(RuntimeError, match=r"EMA.restore: the model holds its own weights"):
        ema.restore()


def test_an_average_can_be_saved() -> None:
    model, other = Linear(3, 2), Linear(3, 2)
    saved, loaded = EMA(model, 0.9), EMA(other, 0.5)
    saved.update()
    loaded.load_state_dict(saved.state_dict())
    assert (loaded.decay, loaded.n_averaged) == (0.9, 1)
    assert_close(loaded.averages["weight"], model.weight, rtol=0, atol=0)
    assert not np.shares_memory(to_numpy(loaded.averages["weight"]), to_numpy(saved.averages["weight"]))
    with pytest.raises(ValueError, match="differ in name or shape: bias, weight"):
        loaded.load_state_dict(EMA(Linear(2, 3)).state_dict())
    with pytest.raises(ValueError, match="differ in name or shape"):
        loaded.load_state_dict(EMA(model.parameters()).state_dict())


def test_a_bad_average() -> None:
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], not 1.5"):
        EMA(Linear(2, 2), 1.5)
    with pytest.raises(ValueError, match="no parameters"):
        EMA([])


def test_an_average_leaves_the_arrays_that_it_was_given_alone() -> None:
    value = np.ones(3, "float32")
    p = Parameter(from_numpy(value))
    ema = EMA([p], decay=0.5)
    ema.update()
    value[...] = 3
    ema.update()
    assert_close(ema.averages["0"], [2, 2, 2])
    assert_close(p, [3, 3, 3])
