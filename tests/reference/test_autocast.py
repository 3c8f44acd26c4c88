"""Mixed precision against PyTorch's: which operation gives which dtype, the loss, and every gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tinytorch as t

torch = pytest.importorskip("torch")


def classify(library: Any, weights: list[np.ndarray], x: np.ndarray, labels: np.ndarray) -> tuple:
    """The dtypes on the way, the loss and the gradients of two layers under autocast."""
    F = library.nn.functional
    first, bias, second = (library.tensor(w, requires_grad=True) for w in weights)
    with library.autocast("cpu", dtype=library.float16):
        hidden = F.gelu(F.linear(library.tensor(x), first, bias))
        scores = library.matmul(hidden, second)
        total = hidden + library.tensor(x[:, :1])
        loss = F.cross_entropy(scores, library.tensor(labels))
    loss.backward()
    kinds = [str(y.dtype).rpartition(".")[2] for y in (hidden, scores, total, F.softmax(scores, dim=-1), loss)]
    return kinds, loss.item(), [np.asarray(w.grad.numpy()) for w in (first, bias, second)]


@pytest.mark.parametrize("seed", range(5))
def test_two_layers_under_autocast(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=s).astype("float32") * 0.3 for s in ((16, 8), (16,), (16, 5))]
    x, labels = rng.normal(size=(12, 8)).astype("float32"), rng.integers(0, 5, 12)
    (kinds, loss, grads), (their_kinds, their_loss, their_grads) = (
        classify(library, weights, x, labels) for library in (t, torch)
    )
    assert kinds == their_kinds
    assert loss == pytest.approx(their_loss, rel=5e-3)
    for ours, theirs in zip(grads, their_grads, strict=True):
        assert ours.dtype == theirs.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=5e-3 * np.abs(theirs).max())
