"""The losses of the appendix of module 05 against their formulas in NumPy float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tinytorch import m05_losses_appendix as m
from tinytorch.m01_setup import assert_close
from tinytorch.m02_tensor import tensor

RNG = np.random.default_rng(12)
X, Y, Z = RNG.normal(size=(3, 7, 4))
VARIANCE = RNG.uniform(0.1, 2.0, size=(7, 4))
COUNTS = RNG.integers(0, 5, size=(7, 4)).astype(float)
SIGNS = np.array([1.0, -1, 1, -1, -1, 1, -1])


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def distance(a: np.ndarray, b: np.ndarray, p: float = 2.0) -> np.ndarray:
    return (np.abs(a - b + 1e-6) ** p).sum(-1) ** (1 / p)


def triplet(a: np.ndarray, b: np.ndarray, c: np.ndarray, margin=1.0, p=2.0, swap=False) -> np.ndarray:
    far = np.minimum(distance(a, c, p), distance(b, c, p)) if swap else distance(a, c, p)
    return np.maximum(0, margin + distance(a, b, p) - far)


def poisson(x: np.ndarray, count: np.ndarray, full=False, log_input=True) -> np.ndarray:
    losses = np.exp(x) - count * x if log_input else x - count * np.log(x + 1e-8)
    safe = np.maximum(count, 1)
    stirling = safe * np.log(safe) - safe + np.log(2 * np.pi * safe) / 2
    return losses + np.where(count > 1, stirling, 0) * full


def normal(x: np.ndarray, y: np.ndarray, variance: np.ndarray, full=False, eps=1e-6) -> np.ndarray:
    """-log of the density, without its constant unless `full`."""
    deviation = np.sqrt(np.maximum(variance, eps))
    return np.log(deviation) + ((x - y) / deviation) ** 2 / 2 + full * math.log(math.sqrt(2 * math.pi))


CASES: list[tuple[Callable, Callable, tuple, dict[str, Any]]] = [
    (m.gaussian_nll_loss, normal, (X, Y, VARIANCE), {}),
    (m.gaussian_nll_loss, normal, (X, Y, VARIANCE), {"full": True, "eps": 0.5}),
    (m.poisson_nll_loss, poisson, (X, COUNTS), {"full": True}),
    (m.poisson_nll_loss, poisson, (np.abs(X), COUNTS), {"log_input": False}),
    (m.soft_margin_loss, lambda x, t: np.logaddexp(0, -t * x), (X, np.sign(Y)), {}),
    (m.margin_ranking_loss, lambda a, b, t, margin: np.maximum(0, margin - t * (a - b)), (X, Y, np.sign(Z)),
     {"margin": 0.3}),
    (m.hinge_embedding_loss, lambda x, t, margin: np.where(t > 0, x, np.maximum(0, margin - x)), (X, np.sign(Y)),
     {"margin": 0.7}),
    (m.cosine_embedding_loss,
     lambda a, b, t, margin: np.where(t > 0, 1 - cosine(a, b), np.maximum(0, cosine(a, b) - margin)), (X, Y, SIGNS),
     {"margin": 0.2}),
    (m.triplet_margin_loss, triplet, (X, Y, Z), {}),
    (m.triplet_margin_loss, triplet, (X, Y, Z), {"margin": 2.0, "p": 3.0, "swap": True}),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "formula", "inputs", "options"), CASES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_losses_follow_their_formulas(
    loss: Callable, formula: Callable, inputs: tuple, options: dict, reduction: str
) -> None:
    expected = formula(*inputs, **options)
    expected = expected if reduction == "none" else getattr(np, reduction)(expected)
    found = loss(*map(tensor, inputs), **options, reduction=reduction)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_vectors_of_length_zero_have_no_direction() -> None:
    assert m.cosine_similarity(tensor([[0.0, 0.0]]), tensor([[3.0, 4.0]])).tolist() == [0.0]


def test_a_negative_variance_is_refused() -> None:
    with pytest.raises(ValueError, match="gaussian_nll_loss: a variance is negative"):
        m.gaussian_nll_loss(tensor([1.0]), tensor([1.0]), tensor([-0.1]))
