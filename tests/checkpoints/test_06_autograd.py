"""After module 06: differentiate any program of tensor operations."""

from __future__ import annotations

import math

import numpy as np

from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Tensor, ones, randn, stack, tensor, where
from tinytorch.m03_activations import tanh
from tinytorch.m04_layers import Linear, Sequential
from tinytorch.m05_losses import cross_entropy
from tinytorch.m06_autograd import grad, no_grad


def test_a_network_learns_a_spiral() -> None:
    manual_seed(1)
    angle = np.linspace(0.5, 2.5 * math.pi, 60)
    arm = np.stack([angle * np.cos(angle), angle * np.sin(angle)], 1) / 3
    points = tensor(np.concatenate([arm, -arm]), dtype="float32")
    labels = tensor([0] * 60 + [1] * 60)
    model = Sequential(Linear(2, 32), tanh, Linear(32, 32), tanh, Linear(32, 2))
    before = cross_entropy(model(points), labels).item()
    velocity = [0.0 * p.detach() for p in model.parameters()]
    for _ in range(400):
        cross_entropy(model(points), labels).backward()
        with no_grad():
            for p, v in zip(model.parameters(), velocity, strict=True):
                v *= 0.9
                v += p.grad
                p -= 0.1 * v
                p.grad = None
    accuracy = (model(points).argmax(1) == labels).to("float32").mean().item()
    assert cross_entropy(model(points), labels).item() < before / 4
    assert accuracy > 0.95


def test_newtons_method_by_second_derivatives() -> None:
    x = tensor(1.0, dtype="float64", requires_grad=True)
    for _ in range(8):
        f = (x**4) / 4 - 3 * x  # smallest at the third root of 3
        (slope,) = grad(f, x, create_graph=True)
        (curvature,) = grad(slope, x)
        with no_grad():
            x -= slope / curvature
    assert_close(x, 3 ** (1 / 3), rtol=1e-12)


def test_gradients_flow_through_a_program_with_branches_and_loops() -> None:
    """A ball is thrown and bounces; which start lets it land at 7?"""

    def flight(speed: Tensor) -> Tensor:
        height, distance, rise = tensor(0.0, dtype="float64"), tensor(0.0, dtype="float64"), speed * 1.0
        for _ in range(60):
            height, distance, rise = height + rise * 0.05, distance + speed * 0.05, rise - 9.81 * 0.05
            rise = where(height < 0, -0.5 * rise, rise)
            height = where(height < 0, 0 * height, height)
        return distance

    speed = tensor(1.0, dtype="float64", requires_grad=True)
    for _ in range(40):
        (slope,) = grad((flight(speed) - 7) ** 2, speed)
        with no_grad():
            speed -= 0.02 * slope
    assert_close(flight(speed), 7.0, rtol=1e-6)


def test_memory_stays_level_over_many_steps() -> None:
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        model = Sequential(Linear(4, 8), tanh, Linear(8, 1))
        nodes = []
        for _ in range(20):
            loss = (model(randn(16, 4)) ** 2).mean()
            nodes.append(weakref.ref(loss.grad_fn))
            loss.backward()
            del loss
        assert [node() for node in nodes] == [None] * 20
    finally:
        gc.enable()


def test_an_input_that_fools_a_classifier() -> None:
    """The gradient with respect to the input: what adversarial examples are made of."""
    weight = tensor([[1.0, -2.0, 0.5], [-1.0, 1.0, 0.5]])
    x = tensor([[0.4, -0.1, 0.3]], requires_grad=True)
    scores = x @ weight.T
    assert scores.argmax(1).item() == 0
    (slope,) = grad(cross_entropy(scores, tensor([0])), x)
    fooled = x.detach() + 0.5 * stack([*slope[0]]).sign() * ones(3)
    assert (fooled @ weight.T).argmax(1).item() == 1
