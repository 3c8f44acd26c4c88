"""After module 03: bend a line, so that layers add up to more than one, and turn scores into probabilities."""

from __future__ import annotations

import numpy as np

from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Tensor, randn, tensor
from tinytorch.m03_activations import GELU, LeakyReLU, ReLU, Sigmoid, Softmax, Tanh, softmax


def straightness(layers: list) -> float:
    """How far f((a + b) / 2) is from the middle of f(a) and f(b), for random points: 0 if f is a straight line."""
    manual_seed(3)
    a, b = randn(50, 6), randn(50, 6)

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x) if callable(layer) else x @ layer
        return x

    return float((run((a + b) / 2) - (run(a) + run(b)) / 2).abs().amax().item())


def test_only_an_activation_bends_a_chain_of_layers() -> None:
    manual_seed(4)
    first, second = randn(6, 8), randn(8, 3)
    assert straightness([first, second]) < 1e-4
    for activation in (ReLU(), LeakyReLU(), Sigmoid(), Tanh(), GELU()):
        assert straightness([first, activation, second]) > 0.1, activation


def test_a_sum_of_bends_draws_any_curve() -> None:
    """A layer of ReLUs with corners on a grid is the polygon through the points of a curve."""
    knots = np.linspace(-3, 3, 61)
    slopes = np.diff(np.sin(knots)) / np.diff(knots)
    x = np.linspace(-3, 3, 500)
    bends = ReLU()(Tensor(x[:, None] - knots[:-1]))
    curve = bends @ Tensor(np.diff(slopes, prepend=0.0)) + np.sin(-3)
    assert_close(curve, np.sin(x), rtol=0, atol=2e-3)


def test_scores_become_probabilities_whatever_their_size() -> None:
    scores = np.random.default_rng(5).normal(size=(20, 7))
    for scale in (1.0, 100.0, 10_000.0):
        probabilities = Softmax(dim=1)(Tensor(scale * scores))
        assert_close(probabilities.sum(1), np.ones(20))
        assert probabilities.argmax(1).tolist() == scores.argmax(1).tolist()
    masked = np.where(np.tri(7, dtype=bool), 0.0, -np.inf)  # row i sees places 0 … i
    assert_close(softmax(Tensor(masked), dim=1), np.tri(7) / np.arange(1, 8)[:, None])
    assert_close(softmax(tensor([1, 1, 1, 1]), dim=0), [0.25] * 4)
