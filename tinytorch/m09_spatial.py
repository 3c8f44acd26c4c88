"""Module 09: convolutions, or how a network looks at a picture with a few weights that it uses everywhere.

Learning objectives. After this module you can
1. compute a convolution by hand, and say what stride, padding, dilation and groups do to its result's shape;
2. turn a convolution into matrix products without holding more than a few pictures' windows at a time;
3. derive both of its gradients, and see that each is a convolution's twin;
4. shrink pictures by pooling, and keep signals at their scale by batch normalisation;
5. count the parameters and operations of a CNN, and measure where its time goes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from numbers import Integral
from typing import Any

import tinytorch.m06_autograd_appendix  # noqa: F401 - the rules of 02's appendix, which `pad` is made of
from tinytorch.m01_setup import assert_close, manual_seed, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import (
    Tensor,
    float64,
    mean,
    observe,
    ones,
    op,
    randn,
    reshape,
    sqrt,
    tensor,
    unsqueeze,
    zeros,
)
from tinytorch.m02_tensor import sum as total_of
from tinytorch.m02_tensor_appendix import arange, empty, pad, randint
from tinytorch.m03_activations import relu
from tinytorch.m04_layers import (
    Flatten,
    Linear,
    Module,
    Parameter,
    Sequential,
    fans,
    kaiming_uniform_,
    overwrite,
    uniform_,
    unusual,
)
from tinytorch.m05_losses import cross_entropy
from tinytorch.m06_autograd import gradcheck, gradient, no_grad
from tinytorch.m07_optimizers import SGD
from tinytorch.m08_training import casting, evaluating

# %% [markdown]
# ## Mathematical foundations
#
# A picture is a tensor (channels, height, width). A **convolution** slides a *kernel* over it: at each place it takes
# the inner product of the kernel and the *window* of the picture there,
#
# $$y_{o,i,j} = b_o + \sum_{c,u,v} w_{o,c,u,v} \; x_{c,\; i s + u d - p,\; j s + v d - p},$$
#
# with *stride* $s$ (how far the window moves), *padding* $p$ (zeros around the picture) and *dilation* $d$ (the gaps
# between the elements of a window). There are $\lfloor (n + 2p - d(k - 1) - 1) / s \rfloor + 1$ places along an axis
# of length $n$. With $g$ *groups*, channels are dealt into $g$ parts, and $c$ runs over the part that $o$ is in.
#
# **Why.** A linear layer from 32×32×3 to 32×32×32 has 100 million weights; a 3×3 convolution has 896, because every
# place uses the same ones, and what is near belongs together. A shifted picture has a shifted result.
#
# **As a product.** Write the windows as columns of a matrix $X$ of $(c k^2)$ rows: $Y = W X$. Its gradients are
# $\partial L / \partial W = G X^\top$ and $\partial L / \partial X = W^\top G$, whose columns are added back to where
# the windows came from. Both are linear in both of their inputs, and so are each other's gradients.
#
# **Batch normalisation** (Ioffe and Szegedy, 2015): $y = \gamma \hat x + \beta$, $\hat x = (x - \mu) / \sqrt{\sigma^2 +
# \epsilon}$, with mean and variance of each channel over the batch and all places. Since $\mu$ and $\sigma$ depend on
# every $x$, with $r = 1 / \sqrt{\sigma^2 + \epsilon}$ and $\tilde g = \gamma g$,
#
# $$\partial L / \partial x = r \, (\tilde g - \mathrm{mean}(\tilde g) - \hat x \, \mathrm{mean}(\tilde g \hat x)).$$

# %% [markdown]
# ## Implementation
#
# ### The readable convolution
# Seven loops, one for each index of the formula. It is the definition: whatever is faster must equal it.


# %%
def convolve_by_loops(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, dilation: int = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """(N, C, H, W) and (O, C / groups, KH, KW) give (N, O, OH, OW), one multiplication at a time."""
    outputs, channels, kernel_height, kernel_width = weight.shape
    x = pad(x, (padding,) * 4)
    count, _, height, width = x.shape
    out_height = (height - dilation * (kernel_height - 1) - 1) // stride + 1
    out_width = (width - dilation * (kernel_width - 1) - 1) // stride + 1
    pictures, kernels = x.tolist(), weight.tolist()
    out = zeros(count, outputs, out_height, out_width, dtype=x.dtype).tolist()
    for n in range(count):
        for o in range(outputs):
            first = o // (outputs // groups) * channels  # the first channel of this output's group
            for i in range(out_height):
                for j in range(out_width):
                    total = 0.0 if bias is None else bias[o].item()
                    for c in range(channels):
                        for u in range(kernel_height):
                            for v in range(kernel_width):
                                pixel = pictures[n][first + c][i * stride + u * dilation][j * stride + v * dilation]
                                total += kernels[o][c][u][v] * pixel
                    out[n][o][i][j] = total
    return tensor(out, dtype=x.dtype)


def test_a_difference_kernel_finds_an_edge() -> None:
    picture, kernel = tensor([[[[0.0, 0.0, 5.0, 5.0]] * 3]]), tensor([[[[-1.0, 1.0]]]])  # dark left, bright right
    assert convolve_by_loops(picture, kernel).tolist() == [[[[0, 5, 0]] * 3]]
    assert convolve_by_loops(picture, kernel, dilation=2).tolist() == [[[[5, 5]] * 3]]


# %% [markdown]
# ### How windows lie
# Convolution and pooling share their geometry. The trick that makes both fast without a loop over places: fix one
# element $(u, v)$ of the window, and what *all* windows have there is a single strided slice of the picture. A 3×3
# window is nine slices, however large the picture.


# %%
@dataclass(frozen=True)
class Windows:
    """How `count` windows lie over pictures of `shape` (H, W), padded by ((top, bottom), (left, right))."""

    shape: tuple[int, int]
    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    count: tuple[int, int]

    def places(self) -> Iterator[tuple[tuple[int, ...], tuple]]:
        """((u, v), index): for each element of a window, the index of what all windows have there."""
        for place in itertools.product(*map(range, self.size)):
            along = zip(place, self.dilation, self.count, self.stride, strict=True)
            yield place, (..., *(slice(u * d, u * d + (n - 1) * s + 1, s) for u, d, n, s in along))

    def add(self, out: Any, index: tuple, part: Any) -> None:
        """Add to what windows have at an index of a padded picture; where no two windows meet, there is 0 before."""
        if all(s > d * (k - 1) for k, s, d in zip(self.size, self.stride, self.dilation, strict=True)):
            out[index] = part
        else:
            out[index] += part

    @property
    def trivial(self) -> bool:
        """Whether the windows are the pixels themselves, in their order."""
        return self.size == self.stride == (1, 1) and self.count == self.shape and not any(map(any, self.padding))

    def inner(self) -> tuple:
        """The index of the picture in the padded picture."""
        return (..., *(slice(before, before + n) for (before, _), n in zip(self.padding, self.shape, strict=True)))

    def padded_shape(self, lead: tuple) -> tuple:
        return (*lead, *(n + sum(borders) for n, borders in zip(self.shape, self.padding, strict=True)))

    def padded(self, xp: Any, x: Any, value: float = 0) -> Any:
        """The pictures (…, H, W) with borders of a value; themselves where there is no border."""
        if self.padding == ((0, 0), (0, 0)):
            return x
        out = xp.full(self.padded_shape(x.shape[:-2]), value, dtype=x.dtype)
        out[self.inner()] = x
        return out


@lru_cache(1024)
def lay_windows(name: str, shape: tuple, size: Any, stride: Any, padding: Any, dilation: Any) -> Windows:
    """Windows over pictures of a shape (…, H, W); ValueError where none fits. Pairs as `Windows` has them."""
    count = []
    for n, k, s, (before, after), d in zip(shape[-2:], size, stride, padding, dilation, strict=True):
        span = d * (k - 1) + 1
        if span > n + before + after:
            raise ValueError(f"{name}: a window of {size[0]}x{size[1]} with dilation {tuple(dilation)} does not fit in "
                             f"a picture of {shape[-2]}x{shape[-1]} with padding {tuple(padding)}")  # fmt: skip
        count.append((n + before + after - span) // s + 1)
    return Windows(tuple(shape[-2:]), size, stride, padding, dilation, (count[0], count[1]))


def pair(name: str, what: str, value: Any, least: int = 1) -> tuple[int, int]:
    """3 and (3,) as (3, 3), and (3, 5) as it is; ValueError for anything else, or below `least`."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) == 1:
        values *= 2
    if [*map(type, values)] == [int, int] and min(values) >= least:
        return values  # nearly always, and four times as fast as what follows
    if len(values) != 2 or not all(isinstance(v, Integral) and v is not True and int(v) >= least for v in values):
        raise ValueError(f"{name}: {what} must be a whole number >= {least} or two of them, got {value!r}")
    return int(values[0]), int(values[1])


def test_places_are_what_all_windows_have() -> None:
    windows = lay_windows("test", (5, 6), (2, 2), (2, 1), ((0, 1), (1, 0)), (1, 3))
    assert (windows.count, windows.padded_shape((9,))) == ((3, 4), (9, 6, 7))
    places = list(windows.places())
    assert [place for place, _ in places] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert places[1][1] == (..., slice(0, 5, 2), slice(3, 7, 1))
    message = message_of(lay_windows, "pool", (2, 2), (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), error=ValueError)
    assert "pool: a window of 3x3 with dilation (1, 1) does not fit in a picture of 2x2" in message


# %% [markdown]
# ### Convolution as matrix products
# The windows of a few pictures at a time are laid out as columns, and one product does the rest. For a whole batch the
# columns would take nine times its memory; in blocks of two megabytes, or one picture, they stay in the cache. Forward,
# input gradient and weight gradient are three operations, so that a profiler sees each and a kernel can replace each.

# %%
BLOCK = 1 << 19  # elements in the columns of a block


def blocks(windows: Windows, pictures: int, channels: int) -> Iterator[slice]:
    """Slices of the batch, whose columns have about BLOCK elements, but of one picture at least."""
    step = max(1, BLOCK // max(1, channels * math.prod(windows.size) * math.prod(windows.count)))
    return (slice(start, min(start + step, pictures)) for start in range(0, pictures, step))


def to_columns(xp: Any, x: Any, windows: Windows, groups: int) -> Any:
    """The windows of (n, C, H, W) as (n, groups, C / groups · KH · KW, OH · OW)."""
    if windows.trivial:
        return xp.reshape(x, (x.shape[0], groups, x.shape[1] // groups, -1))
    padded = windows.padded(xp, x)
    columns = xp.empty((*x.shape[:2], *windows.size, *windows.count), dtype=x.dtype)
    for (u, v), index in windows.places():
        columns[:, :, u, v, ...] = padded[index]
    return xp.reshape(columns, (x.shape[0], groups, -1, math.prod(windows.count)))


def from_columns(xp: Any, columns: Any, windows: Windows, channels: int) -> Any:
    """Columns added up where their windows came from: (n, C, H, W). The transpose of `to_columns`."""
    n = columns.shape[0]
    if windows.trivial:
        return xp.reshape(columns, (n, channels, *windows.shape))
    columns = xp.reshape(columns, (n, channels, *windows.size, *windows.count))
    out = xp.zeros(windows.padded_shape((n, channels)), dtype=columns.dtype)
    for (u, v), index in windows.places():
        windows.add(out, index, columns[:, :, u, v, ...])
    return out[windows.inner()]


@op
def convolution(xp, x, weight, bias=None, *, windows, groups):
    """The convolution of (N, C, H, W) with (O, C / groups, KH, KW), plus bias (O,): (N, O, OH, OW). See `conv2d`."""
    count, outputs = x.shape[0], weight.shape[0]
    kernel = xp.reshape(weight, (groups, outputs // groups, -1))
    out = xp.empty((count, outputs, math.prod(windows.count)), dtype=x.dtype)
    for part in blocks(windows, count, x.shape[1]):
        products = xp.matmul(kernel, to_columns(xp, x[part, ...], windows, groups))
        products = xp.reshape(products, (-1, *out.shape[1:]))
        if bias is not None:
            products += xp.reshape(bias, (-1, 1))
        out[part, ...] = products
    return xp.reshape(out, (count, outputs, *windows.count))


@op
def convolution_input_gradient(xp, g, weight, *, windows, groups):
    """The gradient (N, O, OH, OW) of a convolution with a weight, carried to its input: (N, C, H, W)."""
    count, channels = g.shape[0], weight.shape[1] * groups
    kernel = xp.reshape(weight, (groups, weight.shape[0] // groups, -1))
    out = xp.empty((count, channels, *windows.shape), dtype=g.dtype)
    for part in blocks(windows, count, channels):
        grouped = xp.reshape(g[part, ...], (-1, *kernel.shape[:2], math.prod(windows.count)))
        columns = xp.matmul(xp.permute_dims(kernel, (0, 2, 1)), grouped)
        out[part, ...] = from_columns(xp, columns, windows, channels)
    return out


@op
def convolution_weight_gradient(xp, g, x, *, windows, groups):
    """The gradient (N, O, OH, OW) of a convolution of x, carried to its weight: (O, C / groups, KH, KW)."""
    outputs, channels = g.shape[1], x.shape[1]
    shape = (outputs, channels // groups, *windows.size)
    total = xp.zeros((groups, outputs // groups, math.prod(shape[1:])), dtype=g.dtype)
    for part in blocks(windows, x.shape[0], channels):
        columns = to_columns(xp, x[part, ...], windows, groups)
        grouped = xp.reshape(g[part, ...], (-1, *total.shape[:2], math.prod(windows.count)))
        total += xp.sum(xp.matmul(grouped, xp.permute_dims(columns, (0, 1, 3, 2))), axis=0)
    return xp.reshape(total, shape)


# %% [markdown]
# Each of the three is linear in both of its inputs, and has its gradient from the other two.

# %%
# fmt: off
gradient(convolution,
         x=lambda g, weight, windows, groups: convolution_input_gradient(g, weight, windows=windows, groups=groups),
         weight=lambda g, x, windows, groups: convolution_weight_gradient(g, x, windows=windows, groups=groups),
         bias=lambda g: total_of(g, dim=(0, 2, 3)))
gradient(convolution_input_gradient,
         g=lambda h, weight, windows, groups: convolution(h, weight, windows=windows, groups=groups),
         weight=lambda h, g, windows, groups: convolution_weight_gradient(g, h, windows=windows, groups=groups))
gradient(convolution_weight_gradient,
         g=lambda h, x, windows, groups: convolution(x, h, windows=windows, groups=groups),
         x=lambda h, g, windows, groups: convolution_input_gradient(g, h, windows=windows, groups=groups))
# fmt: on


def paddings(name: str, padding: Any, size: tuple, stride: tuple, dilation: tuple) -> Any:
    """((top, bottom), (left, right)) from one number or two, "valid" (none), or "same" (the result has x's size)."""
    padding = 0 if padding == "valid" else padding
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"{name}: padding='same' is for a stride of 1, the stride is {stride}")
        totals = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise ValueError(f"{name}: padding must be 'valid', 'same' or whole numbers, got {padding!r}")
    return tuple((p, p) for p in pair(name, "padding", padding, least=0))


def check_convolution(name: str, x: Any, weight: Any, bias: Any, groups: int) -> None:
    """An error unless pictures, kernels, bias and groups fit each other."""
    shapes = lambda: f"(input {tuple(x.shape)}, weight {tuple(weight.shape)}, groups {groups})"
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(f"{name}: expected an input (N, C, H, W) or (C, H, W) and a weight (O, C, KH, KW) {shapes()}")
    if type(groups) is not int or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{name}: groups must divide the {weight.shape[0]} output channels {shapes()}")
    if x.shape[1] != (taken := weight.shape[1] * groups):
        raise ValueError(f"{name}: input has {x.shape[1]} channels, but the weight takes {taken} {shapes()}")
    if x.dtype != weight.dtype and not casting.wanted:
        fit = f"input.to({str(weight.dtype)!r}) fits it"
        raise TypeError(f"{name}: input is {x.dtype}, but the weight is {weight.dtype}; {fit} {shapes()}")
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or bias.dtype != x.dtype):
        raise ValueError(f"{name}: expected a {x.dtype} bias ({weight.shape[0]},), got {bias.dtype} {bias.shape}")


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """Convolve pictures (N, C, H, W), or one (C, H, W), with kernels (O, C / groups, KH, KW): (N, O, OH, OW).

    Args:
        bias: (O,), added to each output channel.
        stride, padding, dilation: a number, or two, vertical first; padding may be "valid" or "same".
        groups: how many parts the channels are dealt into, which do not see each other.

    Raises:
        ValueError: shapes do not fit each other, or no window fits in the picture.
        TypeError: the input is not of the weight's dtype.
    """
    return convolve(convolution, x, weight, bias, stride, padding, dilation, groups)


def convolve(
    operation: Any, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """`conv2d` by the operation `convolution`, or by one with its signature."""
    if x.ndim == 3:
        return convolve(operation, unsqueeze(x, 0), weight, bias, stride, padding, dilation, groups)[0]
    check_convolution("conv2d", x, weight, bias, groups)
    size, stride, dilation = weight.shape[2:], pair("conv2d", "stride", stride), pair("conv2d", "dilation", dilation)
    borders = paddings("conv2d", padding, size, stride, dilation)
    windows = lay_windows("conv2d", x.shape, size, stride, borders, dilation)
    return operation(x, weight, bias, windows=windows, groups=groups)


def test_fast_convolution_equals_the_loops() -> None:
    for stride, padding, dilation, groups in ((1, 0, 1, 1), (2, 1, 1, 2), (1, 2, 2, 1), (3, 1, 2, 4)):
        x, weight, bias = randn(2, 4, 7, 6), randn(4, 4 // groups, 3, 2), randn(4)
        expected = convolve_by_loops(x, weight, bias, stride, padding, dilation, groups)
        assert_close(conv2d(x, weight, bias, stride, padding, dilation, groups), expected, rtol=1e-4, atol=1e-5)
    assert conv2d(randn(3, 8, 8), randn(5, 3, 3, 4), padding="same").shape == (5, 8, 8)
    message = message_of(conv2d, zeros(1, 3, 8, 8), zeros(4, 1, 3, 3), error=ValueError)
    assert "input has 3 channels, but the weight takes 1 (input (1, 3, 8, 8), weight (4, 1, 3, 3)" in message


def test_gradients_of_a_convolution() -> None:
    x, weight, bias = (randn(*shape, dtype=float64).requires_grad_() for shape in ((2, 4, 5, 4), (2, 2, 3, 2), (2,)))
    assert gradcheck(partial(conv2d, stride=2, padding=1, groups=2), (x, weight, bias))


# %% [markdown]
# ### The layer


# %%
class Conv2d(Module):
    """A convolution with a weight and a bias of its own.

    Args:
        kernel_size, stride, padding, dilation, groups: as `conv2d` takes them.
        padding_mode: what stands in the border: "zeros", "reflect", "replicate" or "circular".

    Attributes:
        weight: (out_channels, in_channels / groups, KH, KW); bias: (out_channels,) or None. Both start uniform on
            ±1/sqrt(in_channels / groups · KH · KW).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1, bias: bool = True, padding_mode: str = "zeros", device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if groups < 1 or in_channels < 1 or in_channels % groups or out_channels < 1 or out_channels % groups:
            channels = f"{in_channels} in, {out_channels} out"
            raise ValueError(f"Conv2d: groups must divide the channels, got {channels}, groups={groups}")
        if padding_mode not in (modes := ("zeros", "reflect", "replicate", "circular")):
            raise ValueError(f"Conv2d: padding_mode must be one of {modes}, got {padding_mode!r}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = pair("Conv2d", "kernel_size", kernel_size), pair("Conv2d", "stride", stride)
        self.dilation, self.padding_mode = pair("Conv2d", "dilation", dilation), padding_mode
        self.borders = paddings("Conv2d", padding, self.kernel_size, self.stride, self.dilation)
        self.padding = padding if isinstance(padding, str) else pair("Conv2d", "padding", padding, least=0)
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = Parameter(empty(*shape, dtype=dtype, device=device))
        self.bias = Parameter(empty(out_channels, dtype=dtype, device=device)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight and the bias anew."""
        kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(fans(self.weight)[0])
            uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            return conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        (top, bottom), (left, right) = self.borders
        x = pad(x, (left, right, top, bottom), self.padding_mode)
        return conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def extra_repr(self) -> str:
        more = unusual(
            padding=(self.padding, (0, 0)), dilation=(self.dilation, (1, 1)), groups=(self.groups, 1),
            bias=(self.bias is not None, True), padding_mode=(self.padding_mode, "zeros"),
        )  # fmt: skip
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}{more}"


def test_conv2d_moves_with_its_picture() -> None:
    layer, x = Conv2d(3, 8, 3, bias=False), randn(2, 3, 9, 9)
    assert_close(layer(x[:, :, 1:, :]), layer(x)[:, :, 1:, :], rtol=1e-4)
    assert repr(Conv2d(3, 8, 3, padding=1)) == "Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    assert 0.9 < layer.weight.abs().amax().item() * math.sqrt(27) <= 1


# %% [markdown]
# ### Pooling
# The largest element of each window: a walk over the four (or nine) slices, never over the windows. Its gradient goes
# to the first of the largest, as in PyTorch; backward finds the places again by comparing, which saves keeping indices.


# %%
@op
def max_pool(xp, x, *, windows):
    """The largest element of each window of (…, H, W): (…, OH, OW). Padding never wins."""
    padded = windows.padded(xp, x, -math.inf if xp.is_floating(x) else xp.iinfo(x.dtype).min)
    out = None
    for _, index in windows.places():
        out = padded[index] if out is None else xp.maximum(out, padded[index])
    return xp.asarray(out, copy=True) if math.prod(windows.size) == 1 else out


def deal(xp: Any, amount: Any, x: Any, out: Any, windows: Windows) -> Iterator[tuple[tuple, Any]]:
    """(index, part) for each element of the windows: the amount where it is the first of the largest, 0 elsewhere."""
    if not xp.is_floating(x):
        x, out = (xp.cast(values, "float64") for values in (x, out))
    padded = windows.padded(xp, x, math.nan)  # what never equals the largest
    for _, index in windows.places():
        part = amount * xp.astype(padded[index] == out, amount.dtype)  # many times faster than a choice by a mask
        amount = amount - part
        yield index, part


@op
def scatter_to_maxima(xp, g, x, largest, *, windows):
    """g (…, OH, OW), each element at the place in (…, H, W) that its window's maximum was taken from."""
    spread = xp.zeros(windows.padded_shape(tuple(x.shape[:-2])), dtype=g.dtype)
    for index, part in deal(xp, g, x, largest, windows):
        windows.add(spread, index, part)
    return spread[windows.inner()]


@op
def gather_from_maxima(xp, values, x, largest, *, windows):
    """The elements of `values` (…, H, W) that stand where the windows' maxima of x were taken from: (…, OH, OW)."""
    padded, picked = windows.padded(xp, values), xp.zeros(tuple(largest.shape), dtype=values.dtype)
    for index, part in deal(xp, xp.ones_like(picked), x, largest, windows):
        picked += padded[index] * part
    return picked


gradient(max_pool, x=lambda g, x, out, windows: scatter_to_maxima(g, x, out, windows=windows))
gradient(scatter_to_maxima, x=None, largest=None,
         g=lambda h, x, largest, windows: gather_from_maxima(h, x, largest, windows=windows))  # fmt: skip
gradient(gather_from_maxima, x=None, largest=None,
         values=lambda g, x, largest, windows: scatter_to_maxima(g, x, largest, windows=windows))  # fmt: skip


def pooling(name: str, x: Tensor, size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Windows:
    """The windows of a pooling. With `ceil_mode`, also those that only begin inside of the picture."""
    if x.ndim not in (3, 4):
        raise ValueError(f"{name}: expected an input (N, C, H, W) or (C, H, W), got {tuple(x.shape)}")
    size = pair(name, "kernel_size", size)
    stride = size if stride is None else pair(name, "stride", stride)
    padding, dilation = pair(name, "padding", padding, least=0), pair(name, "dilation", dilation)
    if 2 * padding[0] > size[0] or 2 * padding[1] > size[1]:
        raise ValueError(f"{name}: padding must be at most half of kernel_size, got {padding} and {size}")
    borders, axes = [(p, p) for p in padding], zip(x.shape[-2:], size, stride, padding, dilation, strict=True)
    for axis, (n, k, s, p, d) in enumerate(axes if ceil_mode else ()):
        rest = n + 2 * p - d * (k - 1) - 1
        last = -(-rest // s)
        last -= last * s >= n + p  # it must not begin in the border
        borders[axis] = p, max(p, last * s - rest + p)
    return lay_windows(name, x.shape, size, stride, tuple(borders), dilation)


def max_pool2d(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:  # fmt: skip
    """The largest element of each window of (N, C, H, W) or (C, H, W).

    Args:
        stride: how far windows are apart; as far as they are wide if None.
        ceil_mode: whether a window that only begins inside of the picture counts.
        return_indices: return (values, indices), where an index is i W + j of the element in its picture.
    """
    windows = pooling("max_pool2d", x, kernel_size, stride, padding, dilation, ceil_mode)
    out = max_pool(x, windows=windows)
    if not return_indices:
        return out
    numbers = arange(math.prod(windows.shape), device=x.device).reshape(windows.shape).expand(x.shape)
    return out, gather_from_maxima(numbers, x.detach(), out.detach(), windows=windows)


def test_max_pool_takes_the_first_of_the_largest() -> None:
    x = tensor([[[1.0, 5.0, 5.0, 0.0], [5.0, 2.0, 1.0, 0.0]]], requires_grad=True)
    out, indices = max_pool2d(x, 2, return_indices=True)
    assert (out.tolist(), indices.tolist()) == ([[[5, 5]]], [[[1, 2]]])
    (out * tensor([2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [[[0, 2, 3, 0], [0, 0, 0, 0]]]
    assert max_pool2d(zeros(1, 1, 5, 5), 2, ceil_mode=True).shape == (1, 1, 3, 3)
    assert max_pool2d(-ones(1, 1, 4, 4), 3, 2, 1).amax().item() == -1  # padding is no picture


# %%
class MaxPool2d(Module):
    """The largest element of each window. See `max_pool2d`."""

    def __init__(
        self, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, kernel_size if stride is None else stride, padding
        self.dilation, self.return_indices, self.ceil_mode = dilation, return_indices, ceil_mode

    def forward(self, x: Tensor) -> Any:
        return max_pool2d(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode,
                          self.return_indices)  # fmt: skip

    def extra_repr(self) -> str:
        return (f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
                f"dilation={self.dilation}, ceil_mode={self.ceil_mode}")  # fmt: skip


# %% [markdown]
# ### Normalising
# One operation standardises over any axes, so that the other norms of later modules are calls of it, too. Its
# by-products are mean and variance: the running averages need them, and backward does. Half-precision inputs are
# computed in float32, because a sum of squares soon overflows at 65504.


# %%
@op
def normalize(xp, x, weight=None, bias=None, *, dims, eps):
    """weight (x - mean) / sqrt(var + eps) + bias, with mean and variance over `dims`; also returns these two.

    weight and bias are of one shape that broadcasts with x's. The variance is the mean square of the deviations.
    """
    wide = widened(xp, x)
    mean = xp.mean(wide, axis=dims, keepdims=True)
    out = wide - mean
    variance = xp.mean(out * out, axis=dims, keepdims=True)
    out *= 1 / xp.sqrt(variance + eps) * (1 if weight is None else widened(xp, weight))
    if bias is not None:
        out += widened(xp, bias)
    return xp.cast(out, xp.dtype_name(x)), mean, variance


def widened(xp: Any, x: Any) -> Any:
    return xp.cast(x, "float32") if xp.dtype_name(x) in ("float16", "bfloat16") else x


@op
def normalize_gradients(xp, g, x, weight, mean, variance, *, dims, eps, shape):
    """The gradients of `normalize` carried to x and, with a shape, to a weight and a bias of that shape.

    r (g w - mean(g w) - x̂ mean(g w x̂)), where r = 1 / sqrt(var + eps); g x̂ and g, summed where they were broadcast.
    """
    kind, g, r = xp.dtype_name(x), widened(xp, g), 1 / xp.sqrt(variance + eps)
    standard = widened(xp, x) - mean
    standard *= r
    found = []
    if shape is not None:
        lead = x.ndim - len(shape)
        axes = tuple(d for d in range(x.ndim) if d < lead or shape[d - lead] == 1)
        found = [xp.reshape(xp.sum(part, axis=axes, keepdims=True), shape) for part in (g * standard, g)]
    out = g * (1 if weight is None else widened(xp, weight))
    projection = xp.mean(out * standard, axis=dims, keepdims=True)
    out -= xp.mean(out, axis=dims, keepdims=True)
    standard *= projection
    out -= standard
    out *= r
    return tuple(xp.cast(part, kind) for part in (out, *found))


# %% [markdown]
# Under `create_graph` the by-products are None. Then the rule says the same with ordinary operations, which have rules
# themselves; the fused one is never recorded, so it has none.


# %%
def normalize_rule(g: Any, x: Any, weight: Any, extras: Any, position: tuple, dims: tuple, eps: float) -> tuple:
    if extras is not None:
        shape = None if weight is None or position == (0,) else tuple(weight.shape)
        found = normalize_gradients(g, x, weight, *extras, dims=dims, eps=eps, shape=shape)
        return found if shape is not None else (*found, None, g)
    centred = x - mean(x, dim=dims, keepdim=True)
    r = 1 / sqrt(mean(centred * centred, dim=dims, keepdim=True) + eps)
    standard, inner = centred * r, g if weight is None else g * weight
    along = standard * mean(inner * standard, dim=dims, keepdim=True)
    return r * (inner - mean(inner, dim=dims, keepdim=True) - along), g * standard, g


gradient(normalize, together=normalize_rule)
gradient(normalize_gradients)


def test_normalize_has_mean_zero_and_variance_one() -> None:
    x = randn(4, 3, 5, dtype=float64) * 3 + 7
    out, mean, _ = normalize(x, dims=(0, 2), eps=0.0)
    assert_close(mean, x.mean((0, 2), keepdim=True))
    assert_close([out.mean((0, 2)).tolist(), (out * out).mean((0, 2)).tolist()], [[0] * 3, [1] * 3])
    weight, bias = randn(3, 1, dtype=float64), randn(3, 1, dtype=float64)
    inputs = [t.requires_grad_() for t in (x.detach(), weight, bias)]
    assert gradcheck(lambda *inputs: normalize(*inputs, dims=(0, 2), eps=0.5)[0], inputs)


# %% [markdown]
# ### Batch normalisation
# While training, each channel is normalised by its own batch; running averages of mean and variance are kept for the
# time when there is no batch, so that a picture's result then does not depend on its neighbours.


# %%
def batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Normalise each channel of (N, C, …) and apply weight (C,) and bias (C,).

    Args:
        running_mean, running_var: (C,), what to normalise by when not `training`; while training they become
            (1 - momentum) old + momentum new, with the unbiased variance. None: the batch's are always used.

    Raises:
        ValueError: a parameter has not one element a channel, or there is one value a channel to train on.
    """
    if x.ndim < 2 or not x.dtype.is_floating_point:
        raise ValueError(f"batch_norm: expected an input (N, C, …) of floats, got {x.dtype} {x.shape}")
    parts = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for what, given in parts.items():
        if given is not None and given.shape != x.shape[1:2]:
            raise ValueError(f"batch_norm: input has {x.shape[1]} channels, but {what} has shape {given.shape}")
    column, dims = (-1, *(1,) * (x.ndim - 2)), (0, *range(2, x.ndim))
    weight, bias = (None if p is None else reshape(p, shape=column) for p in (weight, bias))
    if not training and running_mean is not None and running_var is not None:
        scale = 1 / sqrt(running_var + eps)
        wide = x.to("float32") if x.dtype.itemsize < 4 else x  # in half precision x * scale may overflow
        scale, shift = (reshape(t, shape=column).to(wide.dtype) for t in (scale, -running_mean))
        scale = scale if weight is None else scale * weight
        shift = shift * scale if bias is None else bias + shift * scale
        return (wide * scale + shift).to(x.dtype)
    count = x.numel() // x.shape[1]
    if training and count < 2:
        raise ValueError(f"batch_norm: training needs more than one value a channel, the input has shape {x.shape}")
    out, mean, variance = normalize(x, weight, bias, dims=dims, eps=eps)
    if training:
        for running, new in ((running_mean, mean), (running_var, variance * (count / (count - 1)))):
            if running is not None:
                overwrite(running, ((1 - momentum) * running + momentum * new.reshape(-1)).to(running.dtype).data)
    return out


class BatchNorm(Module):
    """What batch normalisations share; a subclass says which `ranks` its inputs may have.

    Args:
        momentum: the new batch's share in the running averages; None: all batches count alike.
        track_running_stats: whether running averages are kept; otherwise each batch is normalised by itself, always.

    Attributes:
        weight, bias: (C,), start as ones and zeros; running_mean, running_var, num_batches_tracked: buffers.
    """

    ranks: tuple[int, ...] = ()
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, device: Any = None, dtype: Any = None, *, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.weight = Parameter(ones(num_features, dtype=dtype, device=device)) if affine else None
        self.bias = Parameter(zeros(num_features, dtype=dtype, device=device)) if affine and bias else None
        tracked = track_running_stats
        self.register_buffer("running_mean", zeros(num_features, dtype=dtype, device=device) if tracked else None)
        self.register_buffer("running_var", ones(num_features, dtype=dtype, device=device) if tracked else None)
        self.register_buffer("num_batches_tracked", tensor(0, device=device) if tracked else None)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in self.ranks or x.shape[1] != self.num_features:
            ranks = " or ".join(map(str, self.ranks))
            raise ValueError(f"{type(self).__name__}: expected an input of {ranks} axes with {self.num_features} "
                             f"channels in the second, got {x.shape}")  # fmt: skip
        momentum = self.momentum
        if self.training and self.track_running_stats:
            overwrite(self.num_batches_tracked, self.num_batches_tracked.data + 1)
            momentum = 1 / self.num_batches_tracked.item() if momentum is None else momentum
        frozen = self.training and not self.track_running_stats
        running_mean, running_var = (None, None) if frozen else (self.running_mean, self.running_var)
        return batch_norm(x, running_mean, running_var, self.weight, self.bias, self.training, momentum or 0, self.eps)

    def extra_repr(self) -> str:
        return (f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
                f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}")  # fmt: skip


class BatchNorm2d(BatchNorm):
    """Normalise each channel of (N, C, H, W) over the batch and all places."""

    ranks = (4,)


def test_batch_norm_trains_on_the_batch_and_evaluates_by_what_it_saw() -> None:
    layer, x = BatchNorm2d(3, momentum=None), randn(8, 3, 4, 5) * 2 + 3
    out = layer(x)
    assert_close(out.mean((0, 2, 3)), zeros(3), atol=1e-5)
    assert_close(layer.running_mean, x.mean((0, 2, 3)), rtol=1e-4)
    assert_close(layer.running_var, x.permute(1, 0, 2, 3).reshape(3, -1).var(1), rtol=1e-4)
    layer.eval()
    assert_close(layer(x[:1])[0], out[0], rtol=0.01, atol=0.01)  # neighbours do not matter
    assert "one value a channel" in message_of(BatchNorm2d(3), zeros(1, 3, 1, 1), error=ValueError)


# %% [markdown]
# ### Networks
# Convolutions and pooling, then linear layers: the shape of most of them since LeNet-5, which read cheques (LeCun,
# Bottou, Bengio and Haffner, 1998). The appendix has a LeNet-5 of today's parts, and a ResNet.


# %%
class SimpleCNN(Sequential):
    """(N, in_channels, size, size) to scores (N, classes).

    For each of `widths` a convolution of 3×3, ReLU and pooling by 2; then two linear layers.

    Args:
        batch_norm: whether each convolution is normalised.
    """

    def __init__(
        self, in_channels: int = 3, classes: int = 10, size: int = 32, widths: Sequence[int] = (32, 64),
        hidden: int = 128, batch_norm: bool = False,
    ) -> None:  # fmt: skip
        if size >> len(widths) < 1:
            raise ValueError(f"SimpleCNN: pictures of {size}x{size} cannot be halved {len(widths)} times")
        layers: list[Callable] = []
        for before, width in itertools.pairwise((in_channels, *widths)):
            layers.append(Conv2d(before, width, 3, padding=1, bias=not batch_norm))
            layers += [BatchNorm2d(width)] if batch_norm else []
            layers += [relu, MaxPool2d(2)]
        features = widths[-1] * (size >> len(widths)) ** 2
        super().__init__(*layers, Flatten(), Linear(features, hidden), relu, Linear(hidden, classes))


def count_parameters(network: Module) -> int:
    return sum(p.numel() for p in network.parameters())


def layer_flops(places: Any, weight: Any) -> int:
    """The multiplications and additions of a layer: each of its places with all weights that one output has."""
    return 2 * math.prod(places.shape) * math.prod(weight.shape[1:])


def count_flops(network: Module, x: Tensor) -> dict[str, int]:
    """The multiplications and additions of one call, by operation; of those that do most of the work."""
    counts = Counter[str]()

    def observer(operation: Any, arrays: list, attributes: dict, proceed: Callable) -> Any:
        out = proceed()
        name = operation.name.removesuffix("_relu")  # a layer may come in one with its ReLU
        if name in ("convolution", "convolution_input_gradient", "linear"):
            places = arrays[0] if operation is convolution_input_gradient else out  # a transposed convolution's input
            counts[name] += layer_flops(places, arrays[1])
        return out

    with evaluating(network), observe(observer), no_grad():
        network(x)
    return counts


def test_counts_are_those_of_the_formulas() -> None:
    assert count_parameters(net := SimpleCNN()) == 896 + 18_496 + 4096 * 128 + 128 + 1290
    assert net(zeros(2, 3, 32, 32)).shape == (2, 10)
    expected = {"convolution": 2 * (32 * 27 * 1024 + 64 * 288 * 256), "linear": 2 * (4096 * 128 + 1280)}
    assert count_flops(net, zeros(1, 3, 32, 32)) == expected


# %% [markdown]
# ## Systems analysis
#
# Where does a CNN's time go? Almost all arithmetic is in the convolutions, which reach a good part of the product's
# rate. What is left does little arithmetic on large tensors: it costs traffic, and the more so the faster products get.


# %%
def time_by_operation(call: Callable) -> dict[str, float]:
    """Seconds of one call by operation, forward and backward."""
    spent: dict[str, float] = {}

    def observer(operation: Any, arrays: list, attributes: dict, proceed: Callable) -> Any:
        start = time.perf_counter()
        out = proceed()
        spent[operation.name] = spent.get(operation.name, 0.0) + time.perf_counter() - start
        return out

    call()
    with observe(observer):
        call()
    return spent


def analyze() -> None:
    """Measure convolutions against the matrix product, and the parts of a CNN's training step."""
    side = randn(1024, 1024)
    product = 2 * 1024**3 / seconds(lambda: side @ side) / 1e9
    rows = []
    for channels, outputs, size in ((3, 32, 32), (32, 64, 16), (32, 64, 32), (64, 128, 16)):
        x, layer = randn(16, channels, size, size), Conv2d(channels, outputs, 3, padding=1)
        with no_grad():
            taken = seconds(layer, x)
        rate, name = count_flops(layer, x)["convolution"] / taken / 1e9, f"{channels} to {outputs}, {size}x{size}"
        rows.append([name, taken * 1e3, rate, rate / product, 4 * 9 * x.numel()])
    print_table(["3x3, batch 16", "ms", "GFLOP/s", "of a product's", "bytes of all columns"], rows)
    print()
    net, pictures, labels = SimpleCNN(), randn(64, 3, 32, 32), randint(10, (64,))
    spent = time_by_operation(lambda: cross_entropy(net(pictures), labels).backward())
    total = sum(spent.values())
    shares = sorted(spent.items(), key=lambda item: -item[1])[:9]
    print_table(["SimpleCNN, batch 64: a step's", "ms", "share"], [[n, t * 1e3, f"{t / total:.0%}"] for n, t in shares])


# %% [markdown]
# ## Production context
#
# `torch.nn.Conv2d` calls oneDNN on the CPU and cuDNN on CUDA, which choose among several algorithms by shape: direct
# convolution with the picture laid out in blocks of 16 channels, implicit matrix products that build the columns in
# registers and never in memory, Winograd's transform that needs 2.25 times fewer multiplications for 3×3.
# `torch.backends.cudnn.benchmark` times them and keeps the fastest. For inference, batch normalisation is folded into
# the convolution before it (module 17). Left out here: three-dimensional and deformable convolutions.

# %% [markdown]
# ## Integration testing


# %%
def test_a_cnn_learns_where_a_bar_points() -> None:
    manual_seed(1)
    pictures, labels = randn(64, 1, 8, 8) * 0.3, randint(2, (64,))
    for n, label in enumerate(labels.tolist()):
        pictures[n, 0, n % 8 if label else slice(None), slice(None) if label else n % 8] += 1.0
    net = SimpleCNN(1, 2, 8, widths=(4, 8), hidden=16, batch_norm=True)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        cross_entropy(net(pictures), labels).backward()
        optimizer.step()
    assert (net.eval()(pictures).argmax(1) == labels).sum().item() >= 62


# %% [markdown]
# ## Thinking questions
#
# 1. Two 3×3 convolutions in a row see as far as one of 5×5. Which has fewer weights, and which fewer multiplications?
# 2. The columns of a 3×3 convolution hold each pixel nine times. What would a kernel that reads the picture itself have
#    to keep in registers instead, and for how long?
# 3. A network with batch normalisation is trained at batch size 1. What happens, and what would you normalise over?

# %% [markdown]
# ## Summary
#
# A convolution is a matrix product of windows, its gradients are two more, and pooling walks over the same slices. With
# batch normalisation between them they make networks that see. Module 10 brings the pictures.


if __name__ == "__main__":
    run_module(globals())
