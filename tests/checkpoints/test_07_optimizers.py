"""After module 07: follow the gradient downhill, with any of the usual optimizers and schedules."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Tensor, tensor
from tinytorch.m03_activations import Tanh
from tinytorch.m04_layers import Linear, Module, Sequential
from tinytorch.m05_losses import cross_entropy
from tinytorch.m07_optimizers import SGD, Adam, AdamW, CosineAnnealingLR, LinearLR, SequentialLR, clip_grad_norm_
from tinytorch.m07_optimizers_appendix import EMA, Adagrad, Lion, OneCycleLR, ReduceLROnPlateau, RMSprop

OPTIMIZERS: dict[str, Callable] = {
    "SGD": lambda p: SGD(p, lr=0.3),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: Adam(p, lr=0.02),
    "AdamW": lambda p: AdamW(p, lr=0.02),
    "RMSprop": lambda p: RMSprop(p, lr=0.01),
    "Adagrad": lambda p: Adagrad(p, lr=0.2),
    "Lion": lambda p: Lion(p, lr=0.01, weight_decay=0.01),
}


def spirals() -> tuple[Tensor, Tensor]:
    """Two arms of 100 noisy points each: (200, 2) and their classes, which no straight line separates."""
    generator = np.random.default_rng(0)
    angle = np.sqrt(generator.uniform(0.05, 1, (2, 100))) * 2 * np.pi
    turn = np.array([[0.0], [np.pi]])
    points = np.stack([angle * np.cos(angle + turn), angle * np.sin(angle + turn)], axis=-1) / 5
    points += generator.normal(size=points.shape) * 0.02
    return tensor(points.reshape(-1, 2).astype("float32")), tensor(np.repeat([0, 1], 100))


def network(seed: int = 0) -> Sequential:
    manual_seed(seed)
    return Sequential(Linear(2, 32), Tanh(), Linear(32, 32), Tanh(), Linear(32, 2))


def accuracy(model: Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).detach().argmax(1) == y).numpy().mean())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_untangles_two_spirals(name: str) -> None:
    (x, y), model = spirals(), network()
    optimizer = OPTIMIZERS[name](model.parameters())
    assert accuracy(model, x, y) < 0.8
    for _ in range(1500):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if loss.item() < 0.02:
            break
    assert accuracy(model, x, y) >= 0.98


def run(steps: int, interrupt: int | None) -> tuple[Module, EMA]:
    """Train with warm-up, cosine, groups and an average; at `interrupt`, go on with new objects, from saved states."""

    def build() -> tuple:
        model = network()
        decayed, rest = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
        optimizer = AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.02)
        parts = [LinearLR(optimizer, 0.1, total_iters=5), CosineAnnealingLR(optimizer, T_max=steps - 5)]
        return model, optimizer, SequentialLR(optimizer, parts, [5]), EMA(model, 0.9)

    (x, y), parts = spirals(), build()
    for step in range(steps):
        if step == interrupt:
            saved = [part.state_dict() for part in parts]
            saved[2] = json.loads(json.dumps(saved[2]))
            parts = build()
            for part, state in zip(parts, saved, strict=True):
                part.load_state_dict(state)
        model, optimizer, scheduler, ema = parts
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        ema.update()
    return parts[0], parts[3]


def test_a_run_that_is_interrupted_ends_with_the_same_bits() -> None:
    whole, average = run(40, interrupt=None)
    for interrupt in (3, 17):
        model, same_average = run(40, interrupt)
        for p, q in zip(whole.parameters(), model.parameters(), strict=True):
            assert_close(p, q, rtol=0, atol=0)
        for name in average.averages:
            assert_close(average.averages[name], same_average.averages[name], rtol=0, atol=0)


def test_schedules_drive_a_training() -> None:
    (x, y), model = spirals(), network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    cycle, losses = OneCycleLR(optimizer, max_lr=0.5, total_steps=401), []
    for _ in range(400):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        cycle.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
    assert cycle.get_last_lr()[0] < 1e-5
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.95)
    plateau = ReduceLROnPlateau(optimizer, patience=2, eps=0.0)
    for _ in range(4):
        plateau.step(cross_entropy(model(x), y))  # the same each time
    assert plateau.get_last_lr()[0] == pytest.approx(cycle.get_last_lr()[0] * 0.1)
