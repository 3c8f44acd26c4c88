"""Module 05, appendix: the rest of PyTorch's usual losses, composed of operations that exist already."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from tinytorch.m02_tensor import Tensor, exp, log, sum, where
from tinytorch.m02_tensor_appendix import clamp, minimum, norm
from tinytorch.m03_activations import relu, softplus
from tinytorch.m05_losses import Loss, reduce

# -- functions ---------------------------------------------------------------------------------------------------------


def gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Tensor, *, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """(log(var) + (input - target)² / var) / 2: the surprise at target under a normal distribution.

    Args:
        input: the mean that is predicted.
        var: the variance that is predicted, not negative; it is taken to be at least `eps`.
        full: add the constant log(2 pi) / 2.
    """
    if bool((var < 0).sum() > 0):
        raise ValueError("gaussian_nll_loss: a variance is negative")
    floored = clamp(var, min=eps)
    losses = 0.5 * (log(floored) + (input - target) ** 2 / floored)
    return reduce("gaussian_nll_loss", losses + 0.5 * math.log(2 * math.pi) if full else losses, reduction)


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    *,
    log_input: bool = True,
    full: bool = False,
    eps: float = 1e-8,
    reduction: str = "mean",
) -> Tensor:
    """The surprise at a count under a Poisson distribution, whose rate is exp(input), or input if not `log_input`.

    Args:
        full: add Stirling's approximation of log(target!) for counts above 1.
        eps: added to the rate before its logarithm is taken, if not `log_input`.
    """
    losses = exp(input) - target * input if log_input else input - target * log(input + eps)
    if full:
        counted = where(target > 1, target, 1.0)
        stirling = counted * log(counted) - counted + 0.5 * log(2 * math.pi * counted)
        losses = losses + where(target > 1, stirling, 0.0)
    return reduce("poisson_nll_loss", losses, reduction)


def soft_margin_loss(input: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """log(1 + exp(-target * input)) for targets of -1 and 1."""
    return reduce("soft_margin_loss", softplus(-target * input, threshold=math.inf), reduction)


def margin_ranking_loss(
    input1: Tensor, input2: Tensor, target: Tensor, *, margin: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """max(0, margin - target * (input1 - input2)): target 1 wants input1 above input2, -1 below it."""
    return reduce("margin_ranking_loss", relu(margin - target * (input1 - input2)), reduction)


def hinge_embedding_loss(input: Tensor, target: Tensor, *, margin: float = 1.0, reduction: str = "mean") -> Tensor:
    """The distance `input` where the target is 1, max(0, margin - input) where it is -1."""
    return reduce("hinge_embedding_loss", where(target == -1, relu(margin - input), input), reduction)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The cosine of the angle between vectors along `dim`; lengths count as at least `eps`."""
    lengths = [clamp(norm(x, dim=dim, keepdim=True), min=eps) for x in (x1, x2)]
    return sum((x1 / lengths[0]) * (x2 / lengths[1]), dim=dim)


def cosine_embedding_loss(
    input1: Tensor, input2: Tensor, target: Tensor, *, margin: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """1 - cosine where the target is 1, max(0, cosine - margin) where it is -1: (N, D), (N, D), (N,) -> (N,)."""
    cosine = cosine_similarity(input1, input2, dim=-1)
    return reduce("cosine_embedding_loss", where(target == 1, 1 - cosine, relu(cosine - margin)), reduction)


def pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    """The p-norm of x1 - x2 + eps along the last axis."""
    return norm(x1 - x2 + eps, p, dim=-1, keepdim=keepdim)


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """max(0, margin + distance(anchor, positive) - distance(anchor, negative)): (N, D) each -> (N,).

    Args:
        swap: use the negative's distance from the positive where that is the smaller one.
    """
    near, far = pairwise_distance(anchor, positive, p, eps), pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = minimum(far, pairwise_distance(positive, negative, p, eps))
    return reduce("triplet_margin_loss", relu(margin + near - far), reduction)


# -- losses that remember their attributes -----------------------------------------------------------------------------


@dataclass(eq=False)
class GaussianNLLLoss(Loss):
    """The surprise under a normal distribution, called with mean, target and variance."""

    function = gaussian_nll_loss
    _: KW_ONLY
    full: bool = False
    eps: float = 1e-6


@dataclass(eq=False)
class PoissonNLLLoss(Loss):
    """The surprise at a count under a Poisson distribution."""

    function = poisson_nll_loss
    _: KW_ONLY
    log_input: bool = True
    full: bool = False
    eps: float = 1e-8


class SoftMarginLoss(Loss):
    """log(1 + exp(-target * input)) for targets of -1 and 1."""

    function = soft_margin_loss


@dataclass(eq=False)
class MarginRankingLoss(Loss):
    """max(0, margin - target * (input1 - input2)), called with input1, input2 and target."""

    function = margin_ranking_loss
    margin: float = 0.0


@dataclass(eq=False)
class HingeEmbeddingLoss(Loss):
    """The distance where the target is 1, max(0, margin - distance) where it is -1."""

    function = hinge_embedding_loss
    margin: float = 1.0


@dataclass(eq=False)
class CosineEmbeddingLoss(Loss):
    """1 - cosine where the target is 1, max(0, cosine - margin) where it is -1; called with two inputs and target."""

    function = cosine_embedding_loss
    margin: float = 0.0


@dataclass(eq=False)
class TripletMarginLoss(Loss):
    """max(0, margin + distance to the positive - distance to the negative), called with the three tensors."""

    function = triplet_margin_loss
    margin: float = 1.0
    p: float = 2.0
    eps: float = 1e-6
    swap: bool = False
