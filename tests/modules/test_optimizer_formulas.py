"""Optimizers and schedules against their published formulas, element by element in Python's floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tinytorch.m01_setup import assert_close
from tinytorch.m02_tensor import tensor
from tinytorch.m07_optimizers import SGD, Adam, AdamW, CosineAnnealingLR, LRScheduler, StepLR, rates_of
from tinytorch.m07_optimizers_appendix import (
    EMA,
    Adagrad,
    ConstantLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    Lion,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    RMSprop,
)

STEPS, LR = 6, 0.1


def sgd(w: float, grads: list[float], momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0) -> float:
    velocity = None
    for g in grads:
        g += weight_decay * w
        velocity = g if velocity is None else momentum * velocity + (1 - dampening) * g
        w -= LR * (g + momentum * velocity if nesterov else velocity)
    return w


def adam(w, grads, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, decoupled=False) -> float:
    m = v = largest = 0.0
    for t, g in enumerate(grads, start=1):
        if decoupled:
            w -= LR * weight_decay * w
        else:
            g += weight_decay * w
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        largest = max(largest, v)
        root = math.sqrt((largest if amsgrad else v) / (1 - betas[1] ** t))
        w -= LR * m / (1 - betas[0] ** t) / (root + eps)
    return w


def rmsprop(w: float, grads: list[float], alpha=0.99, eps=1e-8, momentum=0.0, centered=False) -> float:
    square = mean = velocity = 0.0
    for g in grads:
        square, mean = alpha * square + (1 - alpha) * g * g, alpha * mean + (1 - alpha) * g
        variance = square - mean * mean if centered else square
        velocity = momentum * velocity + g / (math.sqrt(variance) + eps)
        w -= LR * velocity
    return w


def adagrad(w: float, grads: list[float], lr_decay=0.0, initial_accumulator_value=0.0, eps=1e-10) -> float:
    total = initial_accumulator_value
    for t, g in enumerate(grads):
        total += g * g
        w -= LR / (1 + t * lr_decay) * g / (math.sqrt(total) + eps)
    return w


def lion(w: float, grads: list[float], betas=(0.9, 0.99), weight_decay=0.0) -> float:
    m = 0.0
    for g in grads:
        w -= LR * weight_decay * w
        w -= LR * math.copysign(1.0, betas[0] * m + (1 - betas[0]) * g)
        m = betas[1] * m + (1 - betas[1]) * g
    return w


def adamw(w: float, grads: list[float], weight_decay=0.01, **options: Any) -> float:
    return adam(w, grads, weight_decay=weight_decay, decoupled=True, **options)


@pytest.mark.parametrize(
    ("make", "formula", "options"),
    [
        (SGD, sgd, {"weight_decay": 0.3}),
        (SGD, sgd, {"momentum": 0.8, "dampening": 0.4}),
        (SGD, sgd, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.3}),
        (Adam, adam, {"betas": (0.7, 0.9), "weight_decay": 0.3}),
        (Adam, adam, {"betas": (0.7, 0.6), "amsgrad": True}),
        (Adam, adam, {"eps": 0.5}),
        (AdamW, adamw, {}),
        (AdamW, adamw, {"weight_decay": 0.4, "eps": 0.1}),
        (RMSprop, rmsprop, {"eps": 0.1}),
        (RMSprop, rmsprop, {"alpha": 0.6, "centered": True, "momentum": 0.8, "eps": 0.1}),
        (Adagrad, adagrad, {"lr_decay": 0.5, "initial_accumulator_value": 0.2, "eps": 0.1}),
        (Lion, lion, {"betas": (0.5, 0.9), "weight_decay": 0.3}),
    ],
    ids=lambda part: getattr(part, "__name__", None) or "-".join(part),
)
def test_steps_follow_the_formula(make: Callable, formula: Callable, options: dict) -> None:
    draw = np.random.default_rng(8)
    start, grads = draw.normal(size=(3, 2)), draw.normal(size=(STEPS, 3, 2)) * [[[1.0], [0.1], [10.0]]]
    w = tensor(start, requires_grad=True)
    optimizer = make([w], lr=LR, **options)
    for g in grads:
        w.grad = tensor(g)
        optimizer.step()
    expected = [[formula(start[i, j], grads[:, i, j].tolist(), **options) for j in range(2)] for i in range(3)]
    assert_close(w, expected, rtol=1e-11, atol=1e-12)


def optimizer() -> SGD:
    return SGD([tensor([1.0], requires_grad=True)], lr=1.0, momentum=0.9)


def restarts(epoch: int, first: int, times: int, lowest: float) -> float:
    length = first
    while epoch >= length:
        epoch, length = epoch - length, length * times
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * epoch / length)) / 2


def one_cycle(step: int, total: int, up: float) -> float:
    """From 0.08 to 2 and down to 0.008, each half a cosine."""
    top = up * total - 1
    start, end, share = (0.08, 2, step / top) if step <= top else (2, 0.008, (step - top) / (total - 1 - top))
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(
    ("make", "rate"),
    [
        (lambda o: StepLR(o, 3, 0.5), lambda t: 0.5 ** (t // 3)),
        (lambda o: MultiStepLR(o, [4, 2, 4], 0.5), lambda t: 0.5 ** ((t >= 2) + 2 * (t >= 4))),
        (lambda o: ExponentialLR(o, 0.8), lambda t: 0.8**t),
        (lambda o: ConstantLR(o, 0.25, 3), lambda t: 0.25 if t < 3 else 1.0),
        (lambda o: CosineAnnealingLR(o, 4, 0.1), lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * t / 4)) / 2),
        (lambda o: CosineAnnealingWarmRestarts(o, 3, 2, 0.1), lambda t: restarts(t, 3, 2, 0.1)),
        (lambda o: CosineAnnealingWarmRestarts(o, 3), lambda t: restarts(t, 3, 1, 0.0)),
        (lambda o: OneCycleLR(o, 2.0, 12, final_div_factor=10.0), lambda t: one_cycle(t, 12, 0.3)),
    ],
)
def test_schedules_follow_the_formula(make: Callable[[SGD], LRScheduler], rate: Callable[[int], float]) -> None:
    steps = 11
    assert_close(rates_of(make(optimizer()), steps), [rate(t) for t in range(steps + 1)], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "metrics", "rates"),
    [
        ({"patience": 1}, [5, 5, 5, 5, 5], [1, 1, 0.5, 0.5, 0.25]),
        ({"patience": 1}, [5, 5, 4, 4, 4], [1, 1, 1, 1, 0.5]),
        ({"patience": 0}, [5, 5, 4, 4, 3], [1, 0.5, 0.5, 0.25, 0.25]),
        ({"patience": 1, "cooldown": 1}, [5, 5, 5, 5, 5, 5], [1, 1, 0.5, 0.5, 0.5, 0.25]),
        ({"patience": 0, "mode": "max"}, [1, 2, 1.5, 3, 3], [1, 1, 0.5, 0.5, 0.25]),
        ({"patience": 0, "threshold": 0.1}, [10, 9.5, 8.9, 8.5], [1, 0.5, 0.5, 0.25]),
        ({"patience": 0, "threshold": 1, "threshold_mode": "abs"}, [10, 9.5, 8.9, 8.5], [1, 0.5, 0.5, 0.25]),
        ({"patience": 0, "min_lr": 0.4}, [5, 5, 5], [1, 0.5, 0.4]),
    ],
)
def test_a_plateau_is_waited_out(options: dict, metrics: list[float], rates: list[float]) -> None:
    made = optimizer()
    schedule, found = ReduceLROnPlateau(made, factor=0.5, **options), []
    for metric in metrics:
        schedule.step(metric)
        found.append(made.param_groups[0]["lr"])
    assert_close(found, rates)


def test_an_error_in_applied_brings_the_weights_back() -> None:
    w = tensor([1.0, 2.0], requires_grad=True)
    average = EMA([w], decay=0.5)
    average.update()
    w.data[...] = [3.0, 4.0]
    average.update()

    def evaluate() -> None:
        with average.applied():
            assert_close(w, [2.0, 3.0])
            raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluate()
    assert_close(w, [3.0, 4.0])
