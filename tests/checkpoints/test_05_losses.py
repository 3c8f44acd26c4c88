"""After module 05: say in one number how wrong a network is, and what that number means."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Tensor, randn, tensor
from tinytorch.m03_activations import ReLU, Softmax
from tinytorch.m05_losses import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    L1Loss,
    MSELoss,
    NLLLoss,
    binary_cross_entropy,
    cross_entropy,
    kl_div,
)


def test_the_best_constant_is_the_mean_or_the_median() -> None:
    """What a loss believes about errors shows in the constant that it likes best."""
    data = np.random.default_rng(1).exponential(size=401)
    candidates = np.linspace(0, 3, 3001)

    def best(loss) -> float:
        return candidates[np.argmin([loss(Tensor(np.full(401, c)), Tensor(data)).item() for c in candidates])]

    assert_close(best(MSELoss()), data.mean(), atol=1e-3)
    assert_close(best(L1Loss()), np.median(data), atol=1e-3)


def test_ignorance_costs_the_logarithm_of_the_number_of_classes() -> None:
    for classes in (2, 10, 50_257):
        assert_close(cross_entropy(Tensor(np.zeros((3, classes))), tensor([0, 1, classes - 1])), math.log(classes))


def test_two_classes_are_one_bit() -> None:
    manual_seed(2)
    scores, bits = randn(20), (randn(20) > 0).to("int64")
    pairs = Tensor(np.stack([np.zeros(20, np.float32), scores.numpy()], axis=1))
    as_bits = BCEWithLogitsLoss()(scores, bits.to("float32"))
    assert_close(as_bits, CrossEntropyLoss()(pairs, bits))
    assert_close(as_bits, binary_cross_entropy(scores.sigmoid(), bits.to("float32")))
    assert_close(as_bits, NLLLoss()(pairs.log_softmax(1), bits))


def test_cross_entropy_is_entropy_plus_divergence() -> None:
    generator = np.random.default_rng(3)
    q, scores = generator.dirichlet(np.ones(6), 9), generator.normal(size=(9, 6))
    entropy = -(q * np.log(q)).sum(1).mean()
    divergence = kl_div(Tensor(scores).log_softmax(1), Tensor(q), reduction="batchmean").item()
    assert_close(cross_entropy(Tensor(scores), Tensor(q)), entropy + divergence)
    assert_close(cross_entropy(Tensor(np.log(q)), Tensor(q)), entropy)  # no scores do better


def test_a_network_is_judged_on_a_batch_with_padding() -> None:
    manual_seed(6)
    first, second = randn(5, 16), randn(16, 4)
    scores = ReLU()(randn(8, 5) @ first) @ second
    labels = tensor([0, 1, -100, 3, 2, -100, 1, 0])
    kept = [i for i, label in enumerate(labels.tolist()) if label >= 0]
    probabilities = Softmax(dim=1)(scores).tolist()
    by_hand = [-math.log(probabilities[i][labels[i].item()]) for i in kept]
    assert_close(cross_entropy(scores, labels), sum(by_hand) / len(kept), rtol=1e-4)
    with pytest.raises(ValueError, match="label 4 at position 3 is out of range"):
        cross_entropy(scores, tensor([0, 1, -100, 4, 2, -100, 1, 0]))
