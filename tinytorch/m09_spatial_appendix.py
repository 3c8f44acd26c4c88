"""Module 09, appendix: the rest of what PyTorch has for pictures and signals, and networks that people know by name.

Pooling by averages and to a given size, convolutions of signals and transposed ones, the other normalisations, resizing
and warping. A signal is a picture of height 1, so nothing of one axis is written twice. Resizing to a grid is a matrix
product along each axis. Only what cannot be composed of other operations is an operation of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, ClassVar

from tinytorch.m02_tensor import Tensor, abs, full, mean, op, permute, reshape, tensor, to, unsqueeze
from tinytorch.m02_tensor_appendix import (
    arange,
    clamp,
    empty,
    floor,
    index_select,
    ones_like,
    pad,
    remainder,
    repeat_interleave,
    round,
    squeeze,
    tanh,
)
from tinytorch.m03_activations import relu
from tinytorch.m03_activations_appendix import prelu
from tinytorch.m04_layers import Flatten, Linear, Module, Parameter, Sequential, dropout, kaiming_normal_, overwrite
from tinytorch.m06_autograd import gradient
from tinytorch.m08_training import LOWER
from tinytorch.m09_spatial import (
    BatchNorm,
    BatchNorm2d,
    Conv2d,
    Windows,
    batch_norm,
    check_convolution,
    convolution,
    convolution_input_gradient,
    from_columns,
    lay_windows,
    max_pool2d,
    normalize,
    paddings,
    pair,
    pooling,
    to_columns,
    widened,
)

LOWER.add("convolution")

# -- signals: pictures of height 1 -------------------------------------------------------------------------------------


def single(name: str, what: str, value: Any, least: int = 1) -> int:
    """3 as it is, and (3,) as 3; ValueError for anything else, or below `least`."""
    number = value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
    if not isinstance(number, Integral) or number is True or int(number) < least:
        raise ValueError(f"{name}: {what} must be a whole number >= {least}, got {value!r}")
    return int(number)


def flat(name: str, x: Tensor) -> Tensor:
    """(N, C, L) or (C, L) as pictures of height 1."""
    if x.ndim not in (2, 3):
        raise ValueError(f"{name}: expected an input (N, C, L) or (C, L), got {x.shape}")
    return unsqueeze(x, -2)


def conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """Convolve signals (N, C, L), or one (C, L), with kernels (O, C / groups, K): (N, O, L_out). See `conv2d`."""
    pictures = flat("conv1d", x)
    if x.ndim == 2:
        return conv1d(unsqueeze(x, 0), weight, bias, stride, padding, dilation, groups)[0]
    if weight.ndim != 3:
        raise ValueError(f"conv1d: expected a weight (O, C, K), got {weight.shape}")
    name, kernels = "conv1d (of pictures of height 1)", unsqueeze(weight, -2)
    check_convolution(name, pictures, kernels, bias, groups)
    stride, dilation = (1, single(name, "stride", stride)), (1, single(name, "dilation", dilation))
    borders = padding if isinstance(padding, str) else (0, single(name, "padding", padding, least=0))
    borders = paddings(name, borders, kernels.shape[2:], stride, dilation)
    windows = lay_windows(name, pictures.shape, kernels.shape[2:], stride, borders, dilation)
    return squeeze(convolution(pictures, kernels, bias, windows=windows, groups=groups), -2)


def max_pool1d(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:  # fmt: skip
    """The largest element of each window of (N, C, L) or (C, L). See `max_pool2d`."""
    size, stride, padding = one_axis("max_pool1d", kernel_size, stride, padding)
    dilation = (1, single("max_pool1d", "dilation", dilation))
    out = max_pool2d(flat("max_pool1d", x), size, stride, padding, dilation, ceil_mode, return_indices)
    return tuple(squeeze(part, -2) for part in out) if return_indices else squeeze(out, -2)


def avg_pool1d(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:  # fmt: skip
    """The mean of each window of (N, C, L) or (C, L). See `avg_pool2d`."""
    size, stride, padding = one_axis("avg_pool1d", kernel_size, stride, padding)
    return squeeze(avg_pool2d(flat("avg_pool1d", x), size, stride, padding, ceil_mode, count_include_pad), -2)


def one_axis(name: str, size: Any, stride: Any, padding: Any) -> tuple:
    """What a pooling along one axis is along two."""
    size = (1, single(name, "kernel_size", size))
    stride = size if stride is None else (1, single(name, "stride", stride))
    return size, stride, (0, single(name, "padding", padding, least=0))


# -- average pooling ---------------------------------------------------------------------------------------------------


def divisors(xp: Any, windows: Windows, counted: tuple, divisor: int | None, dtype: Any) -> Any:
    """What each window's sum is divided by, (OH, OW): its elements in the picture and its `counted` borders."""
    lengths = []
    for axis in (0, 1):
        n, k, s = windows.shape[axis], windows.size[axis], windows.stride[axis]
        (before, _), (first, last) = windows.padding[axis], counted[axis]
        starts = [i * s - before for i in range(windows.count[axis])]
        lengths.append([min(start + k, n + last) - max(start, -first) for start in starts])
    if divisor:
        return float(divisor)
    heights, widths = (xp.asarray([float(n) for n in line], dtype=dtype) for line in lengths)
    return xp.reshape(heights, (-1, 1)) * widths


@op
def avg_pool(xp, x, *, windows, counted, divisor):
    """The mean of each window of (…, H, W): (…, OH, OW). See `divisors`."""
    padded = windows.padded(xp, widened(xp, x))
    total = None
    for _, index in windows.places():
        if total is None:
            total = xp.asarray(padded[index], copy=True)
        else:
            total += padded[index]
    return xp.cast(total / divisors(xp, windows, counted, divisor, total.dtype), xp.dtype_name(x))


@op
def avg_pool_gradient(xp, g, *, windows, counted, divisor):
    """The gradient (…, OH, OW) of a mean over windows, carried back: (…, H, W)."""
    share = g / divisors(xp, windows, counted, divisor, g.dtype)
    spread = xp.zeros(windows.padded_shape(tuple(g.shape[:-2])), dtype=g.dtype)
    for _, index in windows.places():
        windows.add(spread, index, share)
    return spread[windows.inner()]


gradient(avg_pool, x=lambda g, windows, counted, divisor: avg_pool_gradient(
    g, windows=windows, counted=counted, divisor=divisor))  # fmt: skip
gradient(avg_pool_gradient, g=lambda h, windows, counted, divisor: avg_pool(
    h, windows=windows, counted=counted, divisor=divisor))  # fmt: skip


def avg_pool2d(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """The mean of each window of (N, C, H, W) or (C, H, W).

    Args:
        stride, ceil_mode: as in `max_pool2d`.
        count_include_pad: whether the zeros of the padding count as elements of a window.
        divisor_override: divide by this number instead.
    """
    if divisor_override == 0:
        raise ValueError("avg_pool2d: divisor_override must not be 0")
    windows = pooling("avg_pool2d", x, kernel_size, stride, padding, 1, ceil_mode)
    borders = pair("avg_pool2d", "padding", padding, least=0) if count_include_pad else (0, 0)
    counted = tuple((border, border) for border in borders)
    return avg_pool(x, windows=windows, counted=counted, divisor=divisor_override)


class AvgPool2d(Module):
    """The mean of each window. See `avg_pool2d`."""

    def __init__(
        self, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernel_size, self.padding = kernel_size, padding
        self.stride = kernel_size if stride is None else stride
        self.ceil_mode, self.count_include_pad, self.divisor_override = ceil_mode, count_include_pad, divisor_override

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
                          self.divisor_override)  # fmt: skip

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class MaxPool1d(Module):
    """The largest element of each window. See `max_pool1d`."""

    def __init__(
        self, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
        self.padding, self.dilation = padding, dilation
        self.return_indices, self.ceil_mode = return_indices, ceil_mode

    def forward(self, x: Tensor) -> Any:
        return max_pool1d(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode,
                          self.return_indices)  # fmt: skip

    def extra_repr(self) -> str:
        return (f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
                f"dilation={self.dilation}, ceil_mode={self.ceil_mode}")  # fmt: skip


class AvgPool1d(Module):
    """The mean of each window. See `avg_pool1d`."""

    def __init__(
        self, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernel_size = (single("AvgPool1d", "kernel_size", kernel_size),)
        self.stride = self.kernel_size if stride is None else (single("AvgPool1d", "stride", stride),)
        self.padding = (single("AvgPool1d", "padding", padding, least=0),)
        self.ceil_mode, self.count_include_pad = ceil_mode, count_include_pad

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool1d(x, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


# -- pooling to a given size -------------------------------------------------------------------------------------------


def output_sizes(name: str, x: Tensor, output_size: Any, axes: int) -> list[int]:
    """The lengths of the last axes of the result; None is the length that there is."""
    if x.ndim not in (axes + 1, axes + 2):
        raise ValueError(f"{name}: expected an input (N, C{', H, W' if axes == 2 else ', L'}) or one without N, "
                         f"got {x.shape}")  # fmt: skip
    given = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size,) * axes
    if len(given) != axes or not all(n is None or (type(n) is int and n > 0) for n in given):
        raise ValueError(f"{name}: output_size must be a whole number >= 1, None or {axes} of these, got {output_size}")
    return [have if n is None else n for n, have in zip(given, x.shape[-axes:], strict=True)]


def spans(n: int, count: int) -> list[tuple[int, int]]:
    """(start, stop) of `count` windows that cover an axis of length n as evenly as whole numbers can."""
    return [(i * n // count, -(-(i + 1) * n // count)) for i in range(count)]


def averaged(x: Tensor, dim: int, count: int) -> Tensor:
    """The axis `dim` averaged to a length."""
    n = x.shape[dim]
    if count == n:
        return x
    if n and count == 1:
        return mean(x, dim=dim, keepdim=True)
    starts, stops = (tensor(ends, device=x.device).reshape(-1, 1) for ends in zip(*spans(n, count), strict=True))
    places = arange(n, device=x.device)
    inside = to((places >= starts) & (places < stops), x.dtype)
    return resampled(x, dim, inside / to(stops - starts, x.dtype))


def resampled(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """Each line along one of the last two axes, multiplied by a matrix (length after, length before)."""
    if dim == -2:
        return matrix @ x
    return reshape(reshape(x, shape=(-1, x.shape[-1])) @ matrix.T, shape=(*x.shape[:-1], matrix.shape[0]))


def adaptive_avg_pool1d(x: Tensor, output_size: Any) -> Tensor:
    """The means of `output_size` windows that cover (N, C, L) or (C, L) evenly."""
    (length,) = output_sizes("adaptive_avg_pool1d", x, output_size, 1)
    return averaged(x, -1, length)


def adaptive_avg_pool2d(x: Tensor, output_size: Any) -> Tensor:
    """The means of windows that cover (N, C, H, W) or (C, H, W) evenly.

    Args:
        output_size: (height, width) of the result; one number for both; None for an axis that stays as it is.
    """
    height, width = output_sizes("adaptive_avg_pool2d", x, output_size, 2)
    return averaged(averaged(x, -1, width), -2, height)


def adaptive_max_pool2d(x: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """The largest elements of windows that cover (N, C, H, W) or (C, H, W) evenly. See `adaptive_avg_pool2d`."""
    sizes, places = output_sizes("adaptive_max_pool2d", x, output_size, 2), []
    for n, count in zip(x.shape[-2:], sizes, strict=True):
        longest = max(stop - start for start, stop in spans(n, count))
        # Windows of one length, side by side: a shorter one repeats its last element, which changes no maximum.
        line = [min(start + i, stop - 1) for start, stop in spans(n, count) for i in range(longest)]
        places.append(tensor(line, device=x.device))
    side_by_side = index_select(index_select(x, x.ndim - 2, places[0]), x.ndim - 1, places[1])
    kernel = tuple(len(line) // count for line, count in zip(places, sizes, strict=True))
    if not return_indices:
        return max_pool2d(side_by_side, kernel)
    out, indices = max_pool2d(side_by_side, kernel, return_indices=True)
    width = len(places[1])
    return out, places[0][indices // width] * x.shape[-1] + places[1][indices % width]


class AdaptivePool(Module):
    """What poolings to a given size share."""

    def __init__(self, output_size: Any) -> None:
        super().__init__()
        self.output_size = output_size

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class AdaptiveAvgPool1d(AdaptivePool):
    """The means of windows that cover a signal evenly. See `adaptive_avg_pool1d`."""

    def forward(self, x: Tensor) -> Tensor:
        return adaptive_avg_pool1d(x, self.output_size)


class AdaptiveAvgPool2d(AdaptivePool):
    """The means of windows that cover a picture evenly. See `adaptive_avg_pool2d`."""

    def forward(self, x: Tensor) -> Tensor:
        return adaptive_avg_pool2d(x, self.output_size)


class AdaptiveMaxPool2d(AdaptivePool):
    """The largest elements of windows that cover a picture evenly. See `adaptive_max_pool2d`."""

    def __init__(self, output_size: Any, return_indices: bool = False) -> None:
        super().__init__(output_size)
        self.return_indices = return_indices

    def forward(self, x: Tensor) -> Any:
        return adaptive_max_pool2d(x, self.output_size, self.return_indices)


# -- transposed convolution --------------------------------------------------------------------------------------------


def conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    """What `conv2d` does to its input's shape, backwards: (N, C, H, W) and (C, O / groups, KH, KW) give (N, O, OH, OW).

    Each element of x puts its multiple of the kernel into the result: the gradient of a convolution is this operation.

    Args:
        stride, padding, dilation: those of the convolution whose input has the result's shape.
        output_padding: rows and columns more at the bottom and at the right, of the shapes that the convolution would
            make the same.
    """
    return transposed("conv_transpose2d", x, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    """(N, C, L) and (C, O / groups, K) give (N, O, L_out). See `conv_transpose2d`."""
    name = "conv_transpose1d (of pictures of height 1)"
    if weight.ndim != 3:
        raise ValueError(f"conv_transpose1d: expected a weight (C, O, K), got {weight.shape}")
    stride, dilation = (1, single(name, "stride", stride)), (1, single(name, "dilation", dilation))
    padding, output_padding = ((0, single(name, what, n, least=0))
                               for what, n in (("padding", padding), ("output_padding", output_padding)))  # fmt: skip
    pictures, kernels = flat("conv_transpose1d", x), unsqueeze(weight, -2)
    return squeeze(transposed(name, pictures, kernels, bias, stride, padding, output_padding, groups, dilation), -2)


def transposed(
    name: str, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, extra: Any, groups: int, dilation: Any
) -> Tensor:
    if x.ndim == 3:
        return transposed(name, unsqueeze(x, 0), weight, bias, stride, padding, extra, groups, dilation)[0]
    check_transposed(name, x, weight, bias, groups)
    stride, dilation = pair(name, "stride", stride), pair(name, "dilation", dilation)
    padding, extra = pair(name, "padding", padding, least=0), pair(name, "output_padding", extra, least=0)
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise ValueError(f"{name}: output_padding must be smaller than stride or dilation, got output_padding {extra}, "
                         f"stride {stride} and dilation {dilation}")  # fmt: skip
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, extra, dilation, strict=True)
    height, width = ((n - 1) * s - 2 * p + d * (k - 1) + 1 + e for n, k, s, p, e, d in axes)
    if height < 1 or width < 1:
        raise ValueError(f"{name}: a padding of {padding} leaves nothing of a result of {height}x{width} "
                         f"(input {x.shape}, weight {weight.shape})")  # fmt: skip
    borders = ((padding[0], padding[0]), (padding[1], padding[1]))
    size, count = (weight.shape[2], weight.shape[3]), (x.shape[2], x.shape[3])
    windows = Windows((height, width), size, stride, borders, dilation, count)
    out = convolution_input_gradient(x, weight, windows=windows, groups=groups)
    return out if bias is None else out + reshape(bias, shape=(-1, 1, 1))


def check_transposed(name: str, x: Tensor, weight: Tensor, bias: Any, groups: int) -> None:
    """An error unless pictures, kernels, bias and groups fit each other."""
    shapes = f"(input {x.shape}, weight {weight.shape}, groups {groups})"
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(f"{name}: expected an input (N, C, H, W) or (C, H, W) and a weight (C, O, KH, KW) {shapes}")
    if type(groups) is not int or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{name}: groups must divide the {weight.shape[0]} input channels {shapes}")
    if x.shape[1] != weight.shape[0]:
        raise ValueError(f"{name}: input has {x.shape[1]} channels, but the weight takes {weight.shape[0]} {shapes}")
    if x.dtype != weight.dtype:
        raise TypeError(f"{name}: input is {x.dtype}, but the weight is {weight.dtype}; "
                        f"input.to({str(weight.dtype)!r}) fits it {shapes}")  # fmt: skip
    outputs = weight.shape[1] * groups
    if bias is not None and (bias.shape != (outputs,) or bias.dtype != x.dtype):
        raise ValueError(f"{name}: expected a {x.dtype} bias ({outputs},), got {bias.dtype} {bias.shape}")


# -- layers of convolutions --------------------------------------------------------------------------------------------


class Convolution(Module):
    """What Conv1d and the transposed convolutions share; a subclass says how many axes a window has, and which way.

    Attributes:
        weight: (out_channels, in_channels / groups, *kernel_size), transposed (in_channels, out_channels / groups, …).
    """

    axes: ClassVar[int] = 2
    transposed: ClassVar[bool] = False
    reset_parameters: Any = Conv2d.reset_parameters

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any, padding: Any, output_padding: Any,
        dilation: Any, groups: int, bias: bool, padding_mode: str, device: Any, dtype: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        if groups < 1 or in_channels < 1 or in_channels % groups or out_channels < 1 or out_channels % groups:
            raise ValueError(f"{name}: groups must divide the channels, got {in_channels} in, {out_channels} out and "
                             f"groups={groups}")  # fmt: skip
        modes = ("zeros",) if self.transposed else ("zeros", "reflect", "replicate", "circular")
        if padding_mode not in modes:
            raise ValueError(f"{name}: padding_mode must be one of {modes}, got {padding_mode!r}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = self.lengths("kernel_size", kernel_size), self.lengths("stride", stride)
        self.dilation, self.padding_mode = self.lengths("dilation", dilation), padding_mode
        named = isinstance(padding, str) and not self.transposed  # "same" and "valid"
        self.padding = padding if named else self.lengths("padding", padding, least=0)
        self.output_padding = self.lengths("output_padding", output_padding, least=0)
        first, second = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        self.weight = Parameter(empty(first, second // groups, *self.kernel_size, dtype=dtype, device=device))
        self.bias = Parameter(empty(out_channels, dtype=dtype, device=device)) if bias else None
        self.reset_parameters()

    def lengths(self, what: str, value: Any, least: int = 1) -> tuple:
        name = type(self).__name__
        return pair(name, what, value, least) if self.axes == 2 else (single(name, what, value, least),)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += "" if self.padding == (0,) * self.axes else f", padding={self.padding}"
        text += "" if self.dilation == (1,) * self.axes else f", dilation={self.dilation}"
        text += "" if self.output_padding == (0,) * self.axes else f", output_padding={self.output_padding}"
        text += "" if self.groups == 1 else f", groups={self.groups}"
        text += "" if self.bias is not None else ", bias=False"
        return text if self.padding_mode == "zeros" else f"{text}, padding_mode={self.padding_mode}"


class Conv1d(Convolution):
    """A convolution of signals with a weight and a bias of its own. Arguments as in `Conv2d`."""

    axes = 1

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1, bias: bool = True, padding_mode: str = "zeros", device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, 0, dilation, groups, bias,
                         padding_mode, device, dtype)  # fmt: skip
        axes = ((1, number) for (number,) in (self.kernel_size, self.stride, self.dilation))
        border = self.padding if isinstance(self.padding, str) else (0, *self.padding)
        _, self.border = paddings("Conv1d", border, *axes)

    def forward(self, x: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            return conv1d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = pad(x, self.border, self.padding_mode)
        return conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class TransposedConvolution(Convolution):
    """What the transposed convolutions share."""

    transposed = True

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0,
        output_padding: Any = 0, groups: int = 1, bias: bool = True, dilation: Any = 1, padding_mode: str = "zeros",
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation, groups,
                         bias, padding_mode, device, dtype)  # fmt: skip

    def padding_for(self, x: Tensor, output_size: Sequence[int] | None) -> tuple:
        """The output_padding by which the result has a size (its last axes, or its whole shape)."""
        if output_size is None:
            return self.output_padding
        wanted = tuple(output_size)[-self.axes :]
        lengths = zip(x.shape[-self.axes :], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        least = tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in lengths)
        most = tuple(n + s - 1 for n, s in zip(least, self.stride, strict=True))
        if len(wanted) != self.axes or not all(a <= n <= b for a, n, b in zip(least, wanted, most, strict=True)):
            raise ValueError(f"{type(self).__name__}: output_size must be between {least} and {most}, got {wanted}")
        return tuple(n - a for n, a in zip(wanted, least, strict=True))


class ConvTranspose1d(TransposedConvolution):
    """A transposed convolution of signals with a weight and a bias of its own. See `conv_transpose2d`."""

    axes = 1

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return conv_transpose1d(x, self.weight, self.bias, self.stride, self.padding, self.padding_for(x, output_size),
                                self.groups, self.dilation)  # fmt: skip


class ConvTranspose2d(TransposedConvolution):
    """A transposed convolution with a weight and a bias of its own. See `conv_transpose2d`."""

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return conv_transpose2d(x, self.weight, self.bias, self.stride, self.padding, self.padding_for(x, output_size),
                                self.groups, self.dilation)  # fmt: skip


# -- windows as columns ------------------------------------------------------------------------------------------------


@op
def windows_to_columns(xp, x, *, windows):
    """The windows of (N, C, H, W) as columns: (N, C · KH · KW, OH · OW)."""
    return xp.squeeze(to_columns(xp, x, windows, 1), axis=1)


@op
def columns_to_windows(xp, columns, *, windows):
    """Columns (N, C · KH · KW, OH · OW) added up where their windows lie: (N, C, H, W)."""
    return from_columns(xp, columns, windows, columns.shape[1] // math.prod(windows.size))


gradient(windows_to_columns, x=lambda g, windows: columns_to_windows(g, windows=windows))
gradient(columns_to_windows, columns=lambda g, windows: windows_to_columns(g, windows=windows))


def windows_over(name: str, shape: tuple, size: Any, dilation: Any, padding: Any, stride: Any) -> Windows:
    """The windows of `unfold` and `fold`."""
    size, stride = pair(name, "kernel_size", size), pair(name, "stride", stride)
    dilation, borders = pair(name, "dilation", dilation), pair(name, "padding", padding, least=0)
    return lay_windows(name, shape, size, stride, tuple((p, p) for p in borders), dilation)


def unfold(x: Tensor, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Tensor:
    """The windows of (N, C, H, W), or (C, H, W), as columns: (N, C · KH · KW, number of windows)."""
    if x.ndim == 3:
        return unfold(unsqueeze(x, 0), kernel_size, dilation, padding, stride)[0]
    if x.ndim != 4:
        raise ValueError(f"unfold: expected an input (N, C, H, W) or (C, H, W), got {x.shape}")
    return windows_to_columns(x, windows=windows_over("unfold", x.shape, kernel_size, dilation, padding, stride))


def fold(x: Tensor, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Tensor:
    """Columns as `unfold` makes them, added up where their windows lie: (N, C, *output_size)."""
    if x.ndim == 2:
        return fold(unsqueeze(x, 0), output_size, kernel_size, dilation, padding, stride)[0]
    shape = pair("fold", "output_size", output_size)
    windows = windows_over("fold", shape, kernel_size, dilation, padding, stride)
    rows, count = math.prod(windows.size), math.prod(windows.count)
    if x.ndim != 3 or x.shape[1] % rows or x.shape[2] != count:
        raise ValueError(f"fold: expected columns (N, a multiple of {rows}, {count}) for {windows.count} windows of "
                         f"{windows.size}, got {x.shape}")  # fmt: skip
    return columns_to_windows(x, windows=windows)


class Unfold(Module):
    """Windows as columns. See `unfold`."""

    def __init__(self, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> None:
        super().__init__()
        self.kernel_size, self.dilation, self.padding, self.stride = kernel_size, dilation, padding, stride

    def forward(self, x: Tensor) -> Tensor:
        return unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)

    def extra_repr(self) -> str:
        return (f"kernel_size={self.kernel_size}, dilation={self.dilation}, padding={self.padding}, "
                f"stride={self.stride}")  # fmt: skip


class Fold(Unfold):
    """Columns added up where their windows lie. See `fold`."""

    def __init__(
        self, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
    ) -> None:
        super().__init__(kernel_size, dilation, padding, stride)
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        return fold(x, self.output_size, self.kernel_size, self.dilation, self.padding, self.stride)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, {super().extra_repr()}"


# -- normalisation -----------------------------------------------------------------------------------------------------


class BatchNorm1d(BatchNorm):
    """Normalise each channel of (N, C) or (N, C, L) over the batch and all places."""

    ranks = (2, 3)


def check_channels(name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    for what, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.shape != x.shape[1:2]:
            raise ValueError(f"{name}: input has {x.shape[1]} channels, but {what} has shape {given.shape}")


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Normalise each group of channels of each element of (N, C, …), then apply weight (C,) and bias (C,)."""
    if x.ndim < 2 or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"group_norm: num_groups must divide the channels of (N, C, …): {num_groups}, {x.shape}")
    check_channels("group_norm", x, weight, bias)
    shape = (x.shape[0], num_groups, x.shape[1] // num_groups, math.prod(x.shape[2:]))
    if math.prod((shape[0], *shape[2:])) == 1:
        raise ValueError(f"group_norm: expected more than one value a group, got {x.shape} in {num_groups} groups")
    weight, bias = (None if p is None else reshape(p, shape=(*shape[1:3], 1)) for p in (weight, bias))
    return reshape(normalize(reshape(x, shape=shape), weight, bias, dims=(2, 3), eps=eps)[0], shape=x.shape)


def instance_norm(
    x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Normalise each channel of each element of (N, C, …), then apply weight (C,) and bias (C,).

    Args:
        running_mean, running_var: averages over the elements, kept as `batch_norm` keeps them.
        use_input_stats: False: normalise by the running averages instead.
    """
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise ValueError("instance_norm: use_input_stats=False needs running_mean and running_var")
        return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    check_channels("instance_norm", x, weight, bias)
    count = math.prod(x.shape[2:])
    if count < 2:
        raise ValueError(f"instance_norm: expected more than one place a channel, got {x.shape}")
    column = (-1, *(1,) * (x.ndim - 2))
    weight, bias = (None if p is None else reshape(p, shape=column) for p in (weight, bias))
    out, average, variance = normalize(x, weight, bias, dims=tuple(range(2, x.ndim)), eps=eps)
    for running, new in ((running_mean, average), (running_var, variance * (count / (count - 1)))):
        if running is not None:
            new = mean(reshape(new, shape=x.shape[:2]), dim=0)
            overwrite(running, to((1 - momentum) * running + momentum * new, running.dtype).data)
    return out


class GroupNorm(Module):
    """Normalise each group of channels of each element. See `group_norm`.

    Args:
        affine, bias: whether there are a weight (num_channels,) and, with it, a bias.
    """

    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, device: Any = None,
        dtype: Any = None, *, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"GroupNorm: num_groups must divide num_channels, got {num_groups} and {num_channels}")
        self.num_groups, self.num_channels, self.eps, self.affine = num_groups, num_channels, eps, affine
        self.weight = Parameter(full((num_channels,), 1.0, dtype=dtype, device=device)) if affine else None
        self.bias = Parameter(full((num_channels,), 0.0, dtype=dtype, device=device)) if affine and bias else None

    def reset_parameters(self) -> None:
        """Weights of one, biases of zero."""
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                overwrite(parameter, value)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
                f"bias={self.bias is not None}")  # fmt: skip


class InstanceNorm(BatchNorm):
    """What instance normalisations share: (N, C, …), or one element without N."""

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = False,
        track_running_stats: bool = False, device: Any = None, dtype: Any = None, *, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == self.ranks[0] - 1:
            return self.forward(unsqueeze(x, 0))[0]
        if x.ndim not in self.ranks or x.shape[1] != self.num_features:
            raise ValueError(f"{type(self).__name__}: expected an input of {self.ranks[0] - 1} or {self.ranks[0]} axes "
                             f"with {self.num_features} channels, got {x.shape}")  # fmt: skip
        use_input_stats = self.training or not self.track_running_stats
        return instance_norm(x, self.running_mean, self.running_var, self.weight, self.bias, use_input_stats,
                             self.momentum or 0.0, self.eps)  # fmt: skip


class InstanceNorm1d(InstanceNorm):
    """Normalise each channel of each element of (N, C, L) or (C, L)."""

    ranks = (3,)


class InstanceNorm2d(InstanceNorm):
    """Normalise each channel of each element of (N, C, H, W) or (C, H, W)."""

    ranks = (4,)


def reset_running_stats(self: BatchNorm) -> None:
    """Forget all batches."""
    for buffer, value in ((self.running_mean, 0), (self.running_var, 1), (self.num_batches_tracked, 0)):
        if buffer is not None:
            overwrite(buffer, value)


def reset_parameters(self: BatchNorm) -> None:
    """Weights of one, biases of zero, and no batch seen."""
    self.reset_running_stats()
    for parameter, value in ((self.weight, 1), (self.bias, 0)):
        if parameter is not None:
            overwrite(parameter, value)


BatchNorm.extend_class(reset_running_stats=reset_running_stats, reset_parameters=reset_parameters)


# -- dropout of channels -----------------------------------------------------------------------------------------------


def dropout2d(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Each channel of each element of (N, C, …) 0 with probability p, else multiplied by 1 / (1 - p)."""
    if x.ndim < 3:
        raise ValueError(f"dropout2d: expected an input (N, C, H, W) or (N, C, L), got {x.shape}")
    mask = dropout(full((*x.shape[:2], *(1,) * (x.ndim - 2)), 1.0, x.dtype, x.device), p, training)
    if not training or p == 0:
        return x
    return x.mul_(mask) if inplace else x * mask


def dropout1d(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Each channel of (N, C, L) or (C, L) 0 with probability p, else multiplied by 1 / (1 - p)."""
    if x.ndim not in (2, 3):
        raise ValueError(f"dropout1d: expected an input (N, C, L) or (C, L), got {x.shape}")
    return dropout2d(x, p, training, inplace) if x.ndim == 3 else dropout2d(x[None], p, training, inplace)[0]


class Dropout1d(Module):
    """While training, each channel of a signal 0 with probability p. See `dropout1d`."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"{type(self).__name__}: p is a probability, between 0 and 1, got {p}")
        self.p, self.inplace = p, inplace

    def forward(self, x: Tensor) -> Tensor:
        return dropout1d(x, self.p, self.training, self.inplace)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


class Dropout2d(Dropout1d):
    """While training, each channel of a picture 0 with probability p. See `dropout2d`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout2d(x, self.p, self.training, self.inplace)


# -- resizing ----------------------------------------------------------------------------------------------------------

LINEAR = {1: "linear", 2: "bilinear"}  # by the number of axes behind (N, C)


def interpolate(
    x: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> Tensor:  # fmt: skip
    """Resize (N, C, L) or (N, C, H, W). The linear modes are matrix products: an infinite pixel spoils its lines.

    Args:
        size, scale_factor: the result's size, or how many times the input's it is; one number or one for each axis.
        mode: "nearest" (as PyTorch has it: the pixel at or before), "nearest-exact", "linear" for one axis and
            "bilinear" for two, "area" (means of windows).
        align_corners: for the linear modes: whether the centres of the corner pixels stay where they are, instead of
            the corners of the picture.
        recompute_scale_factor: compute with the ratio of the lengths, where the scale_factor does not divide evenly.
        antialias: False; smoothing before a picture is made smaller is left out, and "area" does nearly that.
    """
    axes = x.ndim - 2
    if axes not in LINEAR:
        raise ValueError(f"interpolate: expected an input (N, C, L) or (N, C, H, W), got {x.shape}")
    if mode not in (modes := ("nearest", "nearest-exact", "area", LINEAR[axes])) or antialias:
        raise ValueError(f"interpolate: mode must be one of {modes} for an input {x.shape}, without antialias; got "
                         f"mode={mode!r}, antialias={antialias}")  # fmt: skip
    if align_corners is not None and mode != LINEAR[axes]:
        raise ValueError(f"interpolate: align_corners is for mode {LINEAR[axes]!r}, not for {mode!r}")
    lengths, steps = resized("interpolate", x.shape[2:], size, scale_factor, recompute_scale_factor)
    if mode == "area":
        return adaptive_avg_pool1d(x, lengths) if axes == 1 else adaptive_avg_pool2d(x, lengths)
    for dim, length, step in zip(range(-axes, 0), lengths, steps, strict=True):
        if mode == LINEAR[axes]:
            x = resampled(x, dim, hats(x, dim, length, step, bool(align_corners)))
        else:
            x = nearest(x, dim, length, step, mode == "nearest-exact")
    return x


def resized(name: str, shape: tuple, size: Any, factor: Any, recompute: bool | None) -> tuple[list, list]:
    """(lengths after, steps in the input for one in the result) of each axis."""
    if (size is None) == (factor is None):
        raise ValueError(f"{name}: expected either size or scale_factor, got {size} and {factor}")
    given = size if factor is None else factor
    values = list(given) if isinstance(given, (tuple, list)) else [given] * len(shape)
    if len(values) != len(shape) or min(values) <= 0:
        raise ValueError(f"{name}: expected {len(shape)} positive lengths or factors, got {given}")
    lengths = values if factor is None else [math.floor(n * f) for n, f in zip(shape, values, strict=True)]
    if min(lengths) < 1:
        raise ValueError(f"{name}: scale_factor {factor} leaves nothing of {tuple(shape)}")
    if factor is None or recompute:
        return lengths, [n / length for n, length in zip(shape, lengths, strict=True)]
    return lengths, [1 / f for f in values]


def nearest(x: Tensor, dim: int, length: int, step: float, exact: bool) -> Tensor:
    """One axis with the element nearest to each place: at or before it, or, `exact`, nearest to its centre."""
    n = x.shape[dim]
    centres = (arange(length, dtype="float32") + (0.5 if exact else 0.0)) * step  # in float32: PyTorch rounds so
    places = [min(int(place), n - 1) for place in floor(centres).tolist()]
    times = length // n
    if places == [i // max(times, 1) for i in range(length)] and times * n == length:
        return x if times == 1 else repeat_interleave(x, times, dim)
    return index_select(x, dim, tensor(places, device=x.device))


def hats(x: Tensor, dim: int, length: int, step: float, align_corners: bool) -> Tensor:
    """The matrix of linear interpolation: each row has the shares of the two elements that a place lies between."""
    n, places = x.shape[dim], arange(length, dtype="float64", device=x.device)
    if align_corners:
        places = places * ((n - 1) / (length - 1) if length > 1 else 0.0)
    else:
        places = (places + 0.5) * step - 0.5
    distances = unsqueeze(clamp(places, min=0, max=n - 1), 1) - arange(n, dtype="float64", device=x.device)
    return to(clamp(1 - abs(distances), min=0), x.dtype)


class Upsample(Module):
    """Resize pictures. See `interpolate`."""

    def __init__(
        self, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(scale_factor, (tuple, list)):
            scale_factor = tuple(float(factor) for factor in scale_factor)
        elif scale_factor is not None:
            scale_factor = float(scale_factor)
        self.size, self.scale_factor, self.mode = size, scale_factor, mode
        self.align_corners, self.recompute_scale_factor = align_corners, recompute_scale_factor

    def forward(self, x: Tensor) -> Tensor:
        return interpolate(x, self.size, self.scale_factor, self.mode, self.align_corners, self.recompute_scale_factor)

    def extra_repr(self) -> str:
        what = f"size={self.size!r}" if self.scale_factor is None else f"scale_factor={self.scale_factor!r}"
        return f"{what}, mode={self.mode!r}"


def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """Channels laid out as pixels: (…, C r², H, W) gives (…, C, H r, W r)."""
    r = single("pixel_shuffle", "upscale_factor", upscale_factor)
    if x.ndim < 3 or x.shape[-3] % (r * r):
        raise ValueError(f"pixel_shuffle: expected (…, C, H, W) with a multiple of {r * r} channels, got {x.shape}")
    *lead, channels, height, width = x.shape
    split = reshape(x, shape=(-1, channels // (r * r), r, r, height, width))
    return reshape(permute(split, dims=(0, 1, 4, 2, 5, 3)), shape=(*lead, channels // (r * r), height * r, width * r))


def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    """Pixels laid out as channels: (…, C, H r, W r) gives (…, C r², H, W). The reverse of `pixel_shuffle`."""
    r = single("pixel_unshuffle", "downscale_factor", downscale_factor)
    if x.ndim < 3 or x.shape[-2] % r or x.shape[-1] % r:
        raise ValueError(f"pixel_unshuffle: expected (…, C, H, W) with H and W multiples of {r}, got {x.shape}")
    *lead, channels, height, width = x.shape
    split = reshape(x, shape=(-1, channels, height // r, r, width // r, r))
    return reshape(permute(split, dims=(0, 1, 3, 5, 2, 4)), shape=(*lead, channels * r * r, height // r, width // r))


class PixelShuffle(Module):
    """Channels laid out as pixels. See `pixel_shuffle`."""

    def __init__(self, upscale_factor: int) -> None:
        super().__init__()
        self.upscale_factor = upscale_factor

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle(x, self.upscale_factor)

    def extra_repr(self) -> str:
        return f"upscale_factor={self.upscale_factor}"


class PixelUnshuffle(Module):
    """Pixels laid out as channels. See `pixel_unshuffle`."""

    def __init__(self, downscale_factor: int) -> None:
        super().__init__()
        self.downscale_factor = downscale_factor

    def forward(self, x: Tensor) -> Tensor:
        return pixel_unshuffle(x, self.downscale_factor)

    def extra_repr(self) -> str:
        return f"downscale_factor={self.downscale_factor}"


# -- warping -----------------------------------------------------------------------------------------------------------


def affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Where in a picture each pixel of the result comes from, for `grid_sample`: (N, H, W, 2).

    Args:
        theta: (N, 2, 3), what maps (x, y, 1) of the result to (x, y) of the picture; both go from -1 to 1.
        size: (N, C, H, W) of the result.
        align_corners: whether -1 and 1 are the centres of the corner pixels, instead of the corners of the picture.
    """
    if len(size) != 4 or theta.shape != (size[0], 2, 3):
        raise ValueError(f"affine_grid: expected a size (N, C, H, W) and theta (N, 2, 3), got {tuple(size)} and "
                         f"{theta.shape}")  # fmt: skip
    height, width = size[2:]
    rows, columns = (
        [(2 * i / (n - 1) - 1 if n > 1 else 0.0) if align_corners else (2 * i + 1) / n - 1 for i in range(n)]
        for n in (height, width)
    )
    base = tensor([[x, y, 1.0] for y in rows for x in columns], dtype=theta.dtype, device=theta.device)
    return reshape(base @ theta.transpose(1, 2), shape=(size[0], height, width, 2))


def grid_sample(
    x: Tensor, grid: Tensor, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool = False
) -> Tensor:
    """The pixels of (N, C, H, W) at the places of a grid (N, OH, OW, 2): (N, C, OH, OW).

    Args:
        grid: (x, y) of each pixel of the result, from -1 (left, top) to 1. Gradients go to it, too.
        mode: "bilinear" or "nearest".
        padding_mode: what lies outside of the picture: "zeros", "border" (its outermost pixels) or "reflection".
        align_corners: as in `affine_grid`.
    """
    if x.ndim != 4 or grid.ndim != 4 or grid.shape[0] != x.shape[0] or grid.shape[3] != 2:
        raise ValueError(f"grid_sample: expected an input (N, C, H, W) and a grid (N, OH, OW, 2), got {x.shape} and "
                         f"{grid.shape}")  # fmt: skip
    if x.dtype != grid.dtype:
        raise TypeError(f"grid_sample: input is {x.dtype}, but the grid is {grid.dtype}")
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f"grid_sample: mode must be bilinear or nearest, got {mode!r}")
    if padding_mode not in ("zeros", "border", "reflection"):
        raise ValueError(f"grid_sample: padding_mode must be zeros, border or reflection, got {padding_mode!r}")
    columns, rows = (in_pixels(grid[..., k], x.shape[3 - k], padding_mode, align_corners) for k in (0, 1))
    if mode == "nearest":
        return pixels_at(x, round(rows.detach()), round(columns.detach()), ones_like(rows))
    top, left = floor(rows.detach()), floor(columns.detach())
    low, right = rows - top, columns - left
    return (
        pixels_at(x, top, left, (1 - low) * (1 - right)) + pixels_at(x, top, left + 1, (1 - low) * right)
        + pixels_at(x, top + 1, left, low * (1 - right)) + pixels_at(x, top + 1, left + 1, low * right)
    )  # fmt: skip


def in_pixels(places: Tensor, n: int, padding_mode: str, align_corners: bool) -> Tensor:
    """Places from -1 to 1 as pixel numbers of an axis of length n; brought inside unless the mode is "zeros"."""
    places = (places + 1) * ((n - 1) / 2) if align_corners else ((places + 1) * n - 1) / 2
    if padding_mode == "reflection":
        first, length = (0.0, n - 1) if align_corners else (-0.5, n)
        there_and_back = remainder(abs(places - first), 2 * max(length, 1))
        places = length - abs(there_and_back - length) + first
    return places if padding_mode == "zeros" else clamp(places, min=0, max=n - 1)


def pixels_at(x: Tensor, rows: Tensor, columns: Tensor, shares: Tensor) -> Tensor:
    """`shares` of the pixels at whole places (N, OH, OW) of x (N, C, H, W), and 0 outside: (N, C, OH, OW)."""
    count, _, height, width = x.shape
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    rows, columns = (to(n.masked_fill(~inside, 0), "int64") for n in (rows, columns))
    batch = arange(count, device=x.device).reshape(-1, 1, 1)
    picked = permute(x, dims=(0, 2, 3, 1))[batch, rows, columns]
    return permute(picked * unsqueeze(shares * to(inside, x.dtype), -1), dims=(0, 3, 1, 2))


# -- borders, and an activation with weights ---------------------------------------------------------------------------


class Pad2d(Module):
    """What layers that put borders around pictures share. `padding`: one number, or (left, right, top, bottom)."""

    mode: ClassVar[str] = "constant"
    value: float = 0.0

    def __init__(self, padding: Any) -> None:
        super().__init__()
        self.padding = tuple(padding) if isinstance(padding, (tuple, list)) else (padding,) * 4
        if [type(n) for n in self.padding] != [int] * 4:
            raise ValueError(f"{type(self).__name__}: padding must be a number or (left, right, top, bottom), got "
                             f"{padding!r}")  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return pad(x, self.padding, self.mode, self.value)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class ZeroPad2d(Pad2d):
    """Borders of zeros."""


class ConstantPad2d(Pad2d):
    """Borders of a value."""

    def __init__(self, padding: Any, value: float) -> None:
        super().__init__(padding)
        self.value = value

    def extra_repr(self) -> str:
        return f"padding={self.padding}, value={self.value}"


class ReflectionPad2d(Pad2d):
    """Borders in which the picture is mirrored."""

    mode = "reflect"


class ReplicationPad2d(Pad2d):
    """Borders of the outermost pixels."""

    mode = "replicate"


class CircularPad2d(Pad2d):
    """Borders of what stands at the other end."""

    mode = "circular"


class PReLU(Module):
    """x where it is positive, weight * x elsewhere, with one weight or one for each channel of (N, C, …)."""

    def __init__(self, num_parameters: int = 1, init: float = 0.25, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_parameters, self.init = num_parameters, init
        self.weight = Parameter(full((num_parameters,), init, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return prelu(x, self.weight)

    def extra_repr(self) -> str:
        return f"num_parameters={self.num_parameters}"


# -- networks ----------------------------------------------------------------------------------------------------------


class LeNet5(Sequential):
    """(N, 1, 28, 28) to scores (N, classes): two convolutions of 5×5 with tanh and averages, three linear layers."""

    def __init__(self, in_channels: int = 1, classes: int = 10) -> None:
        super().__init__(
            Conv2d(in_channels, 6, 5, padding=2), tanh, AvgPool2d(2),
            Conv2d(6, 16, 5), tanh, AvgPool2d(2),
            Flatten(), Linear(400, 120), tanh, Linear(120, 84), tanh, Linear(84, classes),
        )  # fmt: skip


class ResidualBlock(Module):
    """relu(x + f(x)), where f is two convolutions of 3×3, each normalised.

    Where f halves the picture and widens it, x is halved by taking every second pixel, and widened by channels of zeros
    (option A of the paper): a shortcut without parameters.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.added = stride, channels - in_channels
        self.conv1 = Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            x = pad(x, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return relu(out + x)


class ResNet(Module):
    """The residual networks for CIFAR (He, Zhang, Ren and Sun, 2015, section 4.2): (N, C, H, W) to scores (N, classes).

    A convolution; three stages of n blocks, at the full, half and quarter size; the mean over places; a linear layer.

    Args:
        depth: 6 n + 2 layers with weights: 8, 14, 20, 32, 44, 56, 110. ResNet-20 has 0.27 million parameters.
        width: the channels of the first stage; each further one has twice as many.
    """

    layer2: Sequential
    layer3: Sequential

    def __init__(self, depth: int = 20, in_channels: int = 3, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"ResNet: depth must be 6 n + 2, such as 8, 14, 20 or 56, got {depth}")
        n = depth // 6
        self.conv1 = Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.layer1 = Sequential(*(ResidualBlock(width, width) for _ in range(n)))
        for stage, channels in (("layer2", width * 2), ("layer3", width * 4)):
            blocks = [ResidualBlock(channels, channels) for _ in range(n - 1)]
            self.add_module(stage, Sequential(ResidualBlock(channels // 2, channels, stride=2), *blocks))
        self.fc = Linear(width * 4, classes)
        for module in self.modules():
            if isinstance(module, Conv2d):
                kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(mean(x, dim=(2, 3)))
