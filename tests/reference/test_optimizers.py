"""Optimizers and schedules against PyTorch: twenty steps and more, with all options, in float32 and float64."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tinytorch import m07_optimizers, m07_optimizers_appendix
from tinytorch.m01_setup import assert_close
from tinytorch.m02_tensor import tensor as make_tensor
from tinytorch.m02_tensor_appendix import from_numpy
from tinytorch.m07_optimizers import SequentialLR, clip_grad_norm_
from tinytorch.m07_optimizers_appendix import (
    EMA,
    CosineAnnealingWarmRestarts,
    Lion,
    ReduceLROnPlateau,
    clip_grad_value_,
)

torch = pytest.importorskip("torch")

schedules = torch.optim.lr_scheduler
SHAPES = [(5, 3), (4,), (), (2, 3, 2)]
TOLERANCES = {"float32": {"rtol": 1e-6, "atol": 1e-6}, "float64": {"rtol": 1e-12, "atol": 1e-12}}
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    ("Adam", {}),
    ("Adam", {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.05, "amsgrad": True}),
    ("Adam", {"lr": 0.05, "maximize": True, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.05, "weight_decay": 0.2, "amsgrad": True, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.9, "eps": 1e-4, "weight_decay": 0.1, "maximize": True}),
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True, "alpha": 0.9, "eps": 1e-2}),
    ("RMSprop", {"centered": True, "alpha": 0.9, "eps": 1e-2, "momentum": 0.5, "weight_decay": 0.01}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3}),
    ("Adagrad", {"lr": 0.1, "maximize": True}),
]


def ours_called(name: str) -> Callable:
    """Our own class of a name, from the chapter or its appendix."""
    return getattr(m07_optimizers, name, None) or getattr(m07_optimizers_appendix, name)


def twins(dtype: str, seed: int = 0) -> tuple[list, list]:
    """Parameters of our own and PyTorch's, with the same random values."""
    generator = np.random.default_rng(seed)
    values = [np.asarray(generator.normal(size=shape), dtype) for shape in SHAPES]
    ours = [make_tensor(from_numpy(value), requires_grad=True) for value in values]
    return ours, [torch.tensor(value, requires_grad=True) for value in values]


def set_grads(ours: list, theirs: list, generator: np.random.Generator, step: int) -> None:
    """Random gradients of random scale; the second parameter has one at every third step only, the last never."""
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        value = np.asarray(generator.normal(size=p.shape) * 10 ** generator.uniform(-2, 1), str(p.dtype))
        missing = i == len(ours) - 1 or (i == 1 and step % 3)
        p.grad = None if missing else from_numpy(value)
        q.grad = None if missing else torch.tensor(value)


def groups(parameters: list) -> list[dict]:
    return [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.03, "weight_decay": 0.02}]


def assert_same(ours: list, theirs: list, dtype: str) -> None:
    for p, q in zip(ours, theirs, strict=True):
        assert p.dtype == dtype
        assert_close(p, q.detach().numpy(), **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_twenty_steps(name: str, options: dict, grouped: bool, dtype: str) -> None:
    ours, theirs = twins(dtype)
    optimizer = ours_called(name)(groups(ours) if grouped else ours, **options)
    reference = getattr(torch.optim, name)(groups(theirs) if grouped else theirs, **options)
    generator = np.random.default_rng(1)
    for step in range(20):
        set_grads(ours, theirs, generator, step)
        optimizer.step()
        reference.step()
        assert_same(ours, theirs, dtype)
    for p, q in zip(ours, theirs, strict=True):
        for key, value in optimizer.state[p].items():
            expected = reference.state[q][key].numpy()
            assert_close(value, expected, **TOLERANCES[dtype])


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_defaults_are_pytorchs(name: str, options: dict) -> None:
    ours, theirs = twins("float32")
    expected = getattr(torch.optim, name)(theirs, **options).defaults
    actual = ours_called(name)(ours, **options).defaults
    assert actual == {key: expected[key] for key in actual}


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_a_state_saved_by_pytorch_goes_on_here(name: str, options: dict) -> None:
    ours, theirs = twins("float64")
    reference, generator = getattr(torch.optim, name)(theirs, **options), np.random.default_rng(2)
    for step in range(5):
        set_grads(ours, theirs, generator, step)
        reference.step()
    saved = copy.deepcopy(reference.state_dict())
    for values in saved["state"].values():
        for key, value in values.items():
            values[key] = from_numpy(value.numpy())
    optimizer = ours_called(name)(ours)
    optimizer.load_state_dict(saved)
    for p, q in zip(ours, theirs, strict=True):
        p.data[...] = q.detach().numpy()
    for step in range(5):
        set_grads(ours, theirs, generator, step)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs, "float64")
    assert optimizer.state_dict().keys() == reference.state_dict().keys()
    assert optimizer.state_dict()["state"].keys() <= reference.state_dict()["state"].keys()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("betas", "decay"), [((0.9, 0.99), 0.0), ((0.7, 0.95), 0.3)])
def test_lion_follows_its_paper(betas: tuple, decay: float, maximize: bool) -> None:
    generator = np.random.default_rng(3)
    w, m = generator.normal(size=(6, 5)), np.zeros((6, 5))
    p = make_tensor(from_numpy(w), requires_grad=True)
    optimizer = Lion([p], lr=0.01, betas=betas, weight_decay=decay, maximize=maximize)
    for _ in range(20):
        g = generator.normal(size=w.shape)
        p.grad = from_numpy(g)
        optimizer.step()
        g = -g if maximize else g
        w = w - 0.01 * (np.sign(betas[0] * m + (1 - betas[0]) * g) + decay * w)
        m = betas[1] * m + (1 - betas[1]) * g
        assert_close(p, w, rtol=1e-12, atol=1e-12)
    assert Lion([p]).defaults["lr"] == 1e-4


# -- schedules ---------------------------------------------------------------------------------------------------------

SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("StepLR", {"step_size": 3}),
    ("StepLR", {"step_size": 1, "gamma": 0.7}),
    ("MultiStepLR", {"milestones": [2, 5, 5, 11], "gamma": 0.5}),
    ("MultiStepLR", {"milestones": [0, 4]}),
    ("ExponentialLR", {"gamma": 0.8}),
    ("ConstantLR", {}),
    ("ConstantLR", {"factor": 0.25, "total_iters": 3}),
    ("LinearLR", {}),
    ("LinearLR", {"start_factor": 0.1, "end_factor": 0.6, "total_iters": 7}),
    ("CosineAnnealingLR", {"T_max": 20}),
    ("CosineAnnealingLR", {"T_max": 4, "eta_min": 0.01}),
    ("CosineAnnealingWarmRestarts", {"T_0": 5}),
    ("CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2, "eta_min": 0.01}),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 24}),
    ("OneCycleLR", {"max_lr": [0.5, 0.2], "epochs": 6, "steps_per_epoch": 5, "anneal_strategy": "linear"}),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 30, "three_phase": True, "pct_start": 0.4, "final_div_factor": 9.0}),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 26, "cycle_momentum": False, "div_factor": 5.0}),
    ("LambdaLR", {"lr_lambda": lambda epoch: 0.9**epoch}),
    ("LambdaLR", {"lr_lambda": [lambda epoch: 1 / (1 + epoch), lambda epoch: min(epoch, 5) / 5]}),
]


def both_optimizers(kind: str = "SGD") -> tuple[Any, Any]:
    ours, theirs = twins("float64")
    options = {"momentum": 0.9} if kind == "SGD" else {}
    return (
        ours_called(kind)(groups(ours), lr=0.1, **options),
        getattr(torch.optim, kind)(groups(theirs), lr=0.1, **options),
    )


def assert_same_groups(optimizer: Any, reference: Any) -> None:
    for group, expected in zip(optimizer.param_groups, reference.param_groups, strict=True):
        for key in ("lr", "momentum", "betas"):
            if key in group:
                assert_close(group[key], expected[key], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize(("name", "options"), SCHEDULES)
@pytest.mark.filterwarnings("ignore")
def test_schedule(name: str, options: dict, kind: str) -> None:
    optimizer, reference = both_optimizers(kind)
    scheduler = ours_called(name)(optimizer, **options)
    expected = getattr(schedules, name)(reference, **options)
    for step in range(24):
        assert_same_groups(optimizer, reference)
        assert scheduler.last_epoch == expected.last_epoch == step
        assert_close(scheduler.get_last_lr(), expected.get_last_lr(), rtol=1e-12, atol=1e-15)
        scheduler.step()
        expected.step()


@pytest.mark.parametrize(("name", "options"), SCHEDULES)
def test_a_schedule_goes_on_from_json(name: str, options: dict) -> None:
    whole, _ = both_optimizers()
    part, _ = both_optimizers()
    first, second = ours_called(name)(whole, **options), ours_called(name)(part, **options)
    for _ in range(7):
        first.step()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    part.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(7):
        first.step()
        second.step()
        assert [g["lr"] for g in part.param_groups] == [g["lr"] for g in whole.param_groups]
        assert second.get_last_lr() == first.get_last_lr()


@pytest.mark.filterwarnings("ignore")
def test_chained_schedules_multiply() -> None:
    optimizer, reference = both_optimizers()
    pairs = [
        (ours_called(name)(optimizer, **options), getattr(schedules, name)(reference, **options))
        for name, options in SCHEDULES
        if name in ("StepLR", "MultiStepLR", "ExponentialLR", "LinearLR", "ConstantLR", "CosineAnnealingLR")
    ]
    for step in range(24):
        if step == 10:
            optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.2  # by hand
        for scheduler, expected in pairs:
            scheduler.step()
            expected.step()
        assert_same_groups(optimizer, reference)


@pytest.mark.parametrize(("name", "options"), SCHEDULES)
@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.filterwarnings("ignore")
def test_resuming_at_an_epoch(name: str, options: dict, first: int) -> None:
    optimizer, reference = both_optimizers()
    extra = {"max_lr": 0.3, "min_lr": 1e-5, "max_momentum": 0.95, "base_momentum": 0.85}
    for group in [*optimizer.param_groups, *reference.param_groups]:
        group.update(initial_lr=group["lr"], **(extra if name == "OneCycleLR" else {}))
    scheduler = ours_called(name)(optimizer, **options, last_epoch=first)
    expected = getattr(schedules, name)(reference, **options, last_epoch=first)
    for _ in range(12):
        if name == "CosineAnnealingLR" and options["T_max"] == 4:
            break  # at the bottom a rate that did not come down the cosine is anyone's guess
        assert_same_groups(optimizer, reference)
        scheduler.step()
        expected.step()


SEQUENCES = [
    ([("LinearLR", {"total_iters": 4}), ("CosineAnnealingLR", {"T_max": 10})], [4]),
    ([("ConstantLR", {"factor": 0.1}), ("ExponentialLR", {"gamma": 0.9}), ("StepLR", {"step_size": 2})], [3, 9]),
    ([("CosineAnnealingWarmRestarts", {"T_0": 3}), ("MultiStepLR", {"milestones": [0, 3]})], [7]),
    ([("StepLR", {"step_size": 2}), ("CosineAnnealingWarmRestarts", {"T_0": 4, "T_mult": 2})], [5]),
    ([("LambdaLR", {"lr_lambda": lambda e: 0.5**e}), ("LinearLR", {"start_factor": 0.5, "total_iters": 6})], [6]),
    ([("LinearLR", {"total_iters": 4}), ("OneCycleLR", {"max_lr": 0.7, "total_steps": 30})], [4]),
    ([("ExponentialLR", {"gamma": 0.9})], []),
]


@pytest.mark.parametrize(("parts", "milestones"), SEQUENCES)
@pytest.mark.filterwarnings("ignore")
def test_sequence(parts: list, milestones: list) -> None:
    optimizer, reference = both_optimizers()
    again, _ = both_optimizers()
    scheduler, restored = (
        SequentialLR(o, [ours_called(name)(o, **options) for name, options in parts], milestones)
        for o in (optimizer, again)
    )
    expected = schedules.SequentialLR(
        reference, [getattr(schedules, name)(reference, **options) for name, options in parts], milestones
    )
    for _ in range(20):
        assert_same_groups(optimizer, reference)
        assert scheduler.last_epoch == expected.last_epoch
        restored.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
        again.load_state_dict(optimizer.state_dict())
        for each in (scheduler, restored, expected):
            each.step()
        assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        assert_close(scheduler.get_last_lr(), expected.get_last_lr(), rtol=1e-12)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("options", [{}, {"patience": 1, "cooldown": 2, "min_lr": [0.01, 0.001], "threshold": 0.05}])
def test_plateau(mode: str, threshold_mode: str, options: dict) -> None:
    optimizer, reference = both_optimizers()
    options = {"mode": mode, "threshold_mode": threshold_mode, "factor": 0.5, "patience": 2, **options}
    scheduler = ReduceLROnPlateau(optimizer, **options)
    expected = schedules.ReduceLROnPlateau(reference, **options)
    generator = np.random.default_rng(5)
    worst = np.inf if mode == "min" else -np.inf
    for metric in [np.nan, worst, *(generator.normal(size=40) + np.linspace(3, 1, 40)), *np.ones(12)]:
        state = json.loads(json.dumps(scheduler.state_dict(), allow_nan=False))
        scheduler = ReduceLROnPlateau(optimizer)
        scheduler.load_state_dict(state)
        scheduler.step(float(metric))
        expected.step(float(metric))
        assert_same_groups(optimizer, reference)
        assert scheduler.get_last_lr() == expected.get_last_lr()
        assert scheduler.num_bad_epochs == expected.num_bad_epochs


def test_warm_restarts_take_fractions_of_an_epoch() -> None:
    optimizer, reference = both_optimizers()
    options = {"T_0": 3, "T_mult": 2, "eta_min": 0.001}
    scheduler = CosineAnnealingWarmRestarts(optimizer, **options)
    expected = schedules.CosineAnnealingWarmRestarts(reference, **options)
    for epoch in np.arange(0.0, 25.0, 0.35):
        scheduler.step(float(epoch))
        expected.step(float(epoch))
        assert_same_groups(optimizer, reference)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, float("inf"), "inf", 0.5])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_by_norm(max_norm: float, norm_type: Any, dtype: str) -> None:
    p, q = twins(dtype)
    set_grads(p, q, np.random.default_rng(4), 0)
    total = clip_grad_norm_(p, max_norm, norm_type)
    assert_close(total, torch.nn.utils.clip_grad_norm_(q, max_norm, norm_type).numpy(), **TOLERANCES[dtype])
    for a, b in zip(p[:-1], q[:-1], strict=True):
        assert a.grad.dtype == dtype
        assert_close(a.grad, b.grad.numpy(), **TOLERANCES[dtype])


def test_clipping_by_value() -> None:
    p, q = twins("float32")
    set_grads(p, q, np.random.default_rng(6), 0)
    clip_grad_value_(p, 0.25)
    torch.nn.utils.clip_grad_value_(q, 0.25)
    for a, b in zip(p[:-1], q[:-1], strict=True):
        assert_close(a.grad, b.grad.numpy(), rtol=0, atol=0)


def test_ema_is_pytorchs_averaged_model() -> None:
    model = torch.nn.Linear(3, 2).double()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    p = [make_tensor(from_numpy(q.detach().numpy().copy()), requires_grad=True) for q in model.parameters()]
    ema, generator = EMA(p, decay=0.9), np.random.default_rng(7)
    for _ in range(6):
        for a, b in zip(p, model.parameters(), strict=True):
            a.data[...] = generator.normal(size=a.shape)
            b.data = torch.tensor(a.numpy())
        ema.update()
        average.update_parameters(model)
        for a, b in zip(ema.averages.values(), average.parameters(), strict=True):
            assert_close(a, b.detach().numpy(), rtol=1e-12, atol=1e-12)
