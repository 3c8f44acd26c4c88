"""Pruning against torch.nn.utils.prune: masks, names, what flows back, what an optimizer does; thin layers' SVD."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinytorch import nn, optim
from tinytorch.m01_setup import assert_close
from tinytorch.m18_compression import distillation_loss, k_means
from tinytorch.nn.utils import prune

torch = pytest.importorskip("torch")
torch_prune = pytest.importorskip("torch.nn.utils.prune")

MAKERS = {
    "linear": (lambda lib: lib.nn.Linear(9, 7), (5, 9)),
    "convolution": (lambda lib: lib.nn.Conv2d(3, 8, 3), (2, 3, 6, 6)),
}


class Ours:
    nn = nn


def pair(kind: str, seed: int = 0):
    """Our layer and PyTorch's, of the same weights, and an input for both."""
    torch.manual_seed(seed)
    make, shape = MAKERS[kind]
    theirs, ours = make(torch), make(Ours)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same(ours, theirs) -> None:
    """The same state: names in order, and values."""
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, value in ours.state_dict().items():
        assert value.numpy().tolist() == expected[name].numpy().tolist(), name


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("amounts", [(0.3,), (5,), (0.5, 0.5), (7, 0.25, 3), (0.0,), (1.0,)])
def test_l1_unstructured(kind: str, amounts: tuple) -> None:
    ours, theirs, _ = pair(kind)
    for amount in amounts:
        prune.l1_unstructured(ours, "weight", amount)
        torch_prune.l1_unstructured(theirs, "weight", amount)
        assert_same(ours, theirs)
    assert prune.is_pruned(ours) == torch_prune.is_pruned(theirs)
    assert repr(ours) == repr(theirs)


def test_importance_scores() -> None:
    ours, theirs, _ = pair("linear")
    scores = np.random.default_rng(3).normal(size=(7, 9)).astype(np.float32)
    for amount in (10, 0.5):
        prune.l1_unstructured(ours, "weight", amount, importance_scores=nn.Parameter(scores).abs())
        torch_prune.l1_unstructured(theirs, "weight", amount, importance_scores=torch.tensor(scores))
        assert_same(ours, theirs)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("n", [1, 2, math.inf])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_ln_structured(kind: str, n: float, dim: int) -> None:
    ours, theirs, _ = pair(kind)
    for amount in (0.4, 1):
        prune.ln_structured(ours, "weight", amount, n=n, dim=dim)
        torch_prune.ln_structured(theirs, "weight", amount, n=n, dim=dim)
        assert_same(ours, theirs)


def test_global_unstructured_with_masks_that_are_there() -> None:
    layers = [pair("linear", 0), pair("convolution", 1)]
    ours, theirs = [layer[0] for layer in layers], [layer[1] for layer in layers]
    prune.l1_unstructured(ours[0], "weight", 0.5)
    torch_prune.l1_unstructured(theirs[0], "weight", 0.5)
    for amount in (0.5, 20):
        prune.global_unstructured([(m, "weight") for m in ours], pruning_method=prune.L1Unstructured, amount=amount)
        torch_prune.global_unstructured([(m, "weight") for m in theirs], pruning_method=torch_prune.L1Unstructured,
                                        amount=amount)  # fmt: skip
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)


@pytest.mark.parametrize("amount", [0.3, 11])
def test_random_ones_take_as_many(amount: float) -> None:
    ours, theirs, _ = pair("linear")
    for _ in range(2):
        prune.random_unstructured(ours, "weight", amount)
        torch_prune.random_unstructured(theirs, "weight", amount)
        assert ours.weight_mask.sum().item() == theirs.weight_mask.sum().item()
    ours, theirs, _ = pair("convolution")
    for amount in (0.3, 2):
        prune.random_structured(ours, "weight", amount, dim=0)
        torch_prune.random_structured(theirs, "weight", amount, dim=0)
        kept = [layer.weight_mask.sum((1, 2, 3)).tolist() for layer in (ours, theirs)]
        assert sorted(kept[0]) == sorted(kept[1])


@pytest.mark.parametrize("kind", MAKERS)
def test_training_a_masked_layer(kind: str) -> None:
    ours, theirs, x = pair(kind)
    steps = optim.SGD(ours.parameters(), 0.1, 0.9), torch.optim.SGD(theirs.parameters(), 0.1, 0.9)
    mask = (np.random.default_rng(1).random(ours.weight.shape) > 0.4).astype(np.float32)
    prune.custom_from_mask(ours, "weight", nn.Parameter(mask).detach())
    torch_prune.custom_from_mask(theirs, "weight", torch.tensor(mask))
    for _ in range(3):
        for layer, step, inputs in ((ours, steps[0], nn.Parameter(x).detach()), (theirs, steps[1], torch.tensor(x))):
            step.zero_grad()
            (layer(inputs) ** 2).mean().backward()
            step.step()
        assert_close(ours.weight_orig.grad, theirs.weight_orig.grad, rtol=1e-4, atol=1e-6)
        assert_close(ours.weight_orig, theirs.weight_orig.detach(), rtol=1e-4, atol=1e-6)
    prune.remove(ours, "weight")
    torch_prune.remove(theirs, "weight")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_close(ours.weight, theirs.weight.detach() * torch.tensor(mask), rtol=1e-4, atol=1e-6)
    assert not prune.is_pruned(ours)
    for library, layer in ((prune, ours), (torch_prune, theirs)):
        with pytest.raises(ValueError, match="weight"):
            library.remove(layer, "weight")


def test_a_masked_state_goes_from_pytorch_to_us() -> None:
    ours, theirs, x = pair("convolution")
    torch_prune.l1_unstructured(theirs, "weight", 0.6)
    prune.identity(ours, "weight")
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours(nn.Parameter(x)), theirs(torch.tensor(x)).detach(), rtol=1e-4, atol=1e-5)


def test_distillation_is_that_of_pytorchs_tutorial() -> None:
    rng = np.random.default_rng(2)
    scores, known = (rng.normal(size=(6, 5)).astype(np.float32) for _ in range(2))
    labels = rng.integers(0, 5, 6)
    mine = nn.Parameter(scores)
    loss = distillation_loss(mine, nn.Parameter(known), nn.Parameter(labels, watched=False), 2.0, 0.25)
    loss.backward()
    theirs = torch.tensor(scores, requires_grad=True)
    functional = torch.nn.functional
    soft = functional.kl_div(functional.log_softmax(theirs / 2, 1), functional.softmax(torch.tensor(known) / 2, 1),
                             reduction="batchmean") * 4  # fmt: skip
    expected = 0.25 * soft + 0.75 * functional.cross_entropy(theirs, torch.tensor(labels))
    expected.backward()
    assert_close(loss, expected.detach(), rtol=1e-5)
    assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_k_means_is_at_rest() -> None:
    """Nothing moves any more: each value is its weights' mean, and each weight has the value that is nearest."""
    weights = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codebook = torch.tensor(k_means(nn.Parameter(weights.numpy()), 8, rounds=1000).numpy())
    taken = (weights[:, None] - codebook).abs().argmin(1)
    means = torch.stack([weights[taken == k].mean() for k in range(8)])
    torch.testing.assert_close(codebook, means, rtol=1e-12, atol=1e-12)
