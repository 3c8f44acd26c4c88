"""Module 03, appendix: the rest of PyTorch's activations.

Each is composed of operations that exist already, and so are their layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinytorch.m02_tensor import Tensor, abs, exp, reshape, where
from tinytorch.m02_tensor_appendix import chunk, log1p, minimum, tanh
from tinytorch.m03_activations import Activation, elu, hardtanh, relu, sigmoid, softmax, softplus

# -- functions ---------------------------------------------------------------------------------------------------------


def relu6(x: Tensor) -> Tensor:
    """x, but at least 0 and at most 6."""
    return hardtanh(x, min_val=0.0, max_val=6.0)


def hardsigmoid(x: Tensor) -> Tensor:
    """A sigmoid of three straight pieces: 0 up to -3, 1 from 3 on."""
    return relu6(x + 3) / 6


def hardswish(x: Tensor) -> Tensor:
    """x hardsigmoid(x)."""
    return x * hardsigmoid(x)


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x))."""
    return x * tanh(softplus(x))


def softsign(x: Tensor) -> Tensor:
    """x / (1 + |x|)."""
    return x / (1 + abs(x))


def logsigmoid(x: Tensor) -> Tensor:
    """log(sigmoid(x)), precise also where the sigmoid itself is too small for its dtype."""
    return minimum(x, 0.0) - log1p(exp(-abs(x)))


def softmin(x: Tensor, dim: int) -> Tensor:
    """softmax(-x) over `dim`: the smallest element has the largest share."""
    return softmax(-x, dim=dim)


def threshold(x: Tensor, threshold: float, value: float) -> Tensor:
    """x where it is above `threshold`, `value` elsewhere."""
    return where(x <= threshold, value, x)


def tanhshrink(x: Tensor) -> Tensor:
    """x - tanh(x)."""
    return x - tanh(x)


def softshrink(x: Tensor, lambd: float = 0.5) -> Tensor:
    """x moved by lambd towards 0, and 0 where |x| <= lambd."""
    if lambd < 0:
        raise ValueError(f"softshrink: lambd must be at least 0, got {lambd}")
    return x - hardtanh(x, min_val=-lambd, max_val=lambd)


def hardshrink(x: Tensor, lambd: float = 0.5) -> Tensor:
    """x, but 0 where |x| <= lambd."""
    return where(abs(x) <= lambd, 0, x)


def selu(x: Tensor) -> Tensor:
    """elu, scaled so that values with mean 0 and variance 1 keep them from layer to layer."""
    return 1.0507009873554804934193349852946 * elu(x, alpha=1.6732632423543772848170429916717)


def celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """max(x, 0) + min(0, alpha * (exp(x / alpha) - 1)): an elu that is smooth at 0 for every alpha."""
    return alpha * elu(x / alpha)


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """The first half along `dim` times the sigmoid of the second half."""
    if x.shape[dim] % 2:
        raise ValueError(f"glu: axis {dim} must have an even length to be halved, the shape is {x.shape}")
    value, gate = chunk(x, 2, dim)
    return value * sigmoid(gate)


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """x where it is positive, weight * x elsewhere.

    Args:
        weight: one slope, or one for each channel: (C,) for x of shape (N, C, …).
    """
    count, channels = weight.numel(), x.shape[1] if x.ndim > 1 else 1
    if count not in (1, channels):
        raise ValueError(f"prelu: expected 1 slope or one for each of {channels} channels, got {count}")
    slope = reshape(weight, shape=() if count == 1 else (count, *(1,) * (x.ndim - 2)))
    return relu(x) + slope * minimum(x, 0.0)


# -- layers ------------------------------------------------------------------------------------------------------------


class ReLU6(Activation):
    """x, but at least 0 and at most 6."""

    operation = relu6


class Hardsigmoid(Activation):
    """A sigmoid of three straight pieces: 0 up to -3, 1 from 3 on."""

    operation = hardsigmoid


class Hardswish(Activation):
    """x hardsigmoid(x)."""

    operation = hardswish


class Mish(Activation):
    """x tanh(softplus(x))."""

    operation = mish


class Softsign(Activation):
    """x / (1 + |x|)."""

    operation = softsign


class LogSigmoid(Activation):
    """log(sigmoid(x))."""

    operation = logsigmoid


class Tanhshrink(Activation):
    """x - tanh(x)."""

    operation = tanhshrink


class SELU(Activation):
    """elu, scaled so that values with mean 0 and variance 1 keep them from layer to layer."""

    operation = selu


@dataclass(eq=False)
class Softmin(Activation):
    """softmax(-x) over `dim`."""

    operation = softmin
    dim: int


@dataclass(eq=False)
class Threshold(Activation):
    """x where it is above `threshold`, `value` elsewhere."""

    operation = threshold
    threshold: float
    value: float


@dataclass(eq=False)
class Softshrink(Activation):
    """x moved by lambd towards 0, and 0 where |x| <= lambd."""

    operation = softshrink
    lambd: float = 0.5


@dataclass(eq=False)
class Hardshrink(Activation):
    """x, but 0 where |x| <= lambd."""

    operation = hardshrink
    lambd: float = 0.5


@dataclass(eq=False)
class CELU(Activation):
    """max(x, 0) + min(0, alpha * (exp(x / alpha) - 1))."""

    operation = celu
    alpha: float = 1.0


@dataclass(eq=False)
class GLU(Activation):
    """The first half along `dim` times the sigmoid of the second half."""

    operation = glu
    dim: int = -1
