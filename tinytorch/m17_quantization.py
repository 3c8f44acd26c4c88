"""Module 17: quantization, or how a network does with numbers of one byte what it learned with four.

Learning objectives. After this module you can
1. write a range of floats as 256 steps, say what that costs, and choose the steps for a tensor or for each channel;
2. multiply what was rounded in integers, exactly, and put the scales back in the same pass;
3. find the ranges of activations by looking at a few batches, and say when looking at each input is better;
4. fold batch normalisation away, and train a network that knows it will be rounded;
5. measure what a network has become: bytes, milliseconds and mistakes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from tinytorch.backends import ARRAY_TYPES, backend_of
from tinytorch.kernels import load
from tinytorch.m01_setup import assert_close, manual_seed, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import (
    Op,
    Tensor,
    float64,
    int8,
    int32,
    mean,
    mul,
    ones,
    op,
    randn,
    sqrt,
    stack,
    tensor,
    zeros,
)
from tinytorch.m02_tensor_appendix import Writes, amax, amin, arange, cat, randint
from tinytorch.m03_activations import ReLU, relu
from tinytorch.m04_layers import Dropout, Flatten, Linear, Module, Parameter, Sequential, linear, overwrite
from tinytorch.m04_layers_appendix import Identity
from tinytorch.m05_losses import cross_entropy
from tinytorch.m06_autograd import gradient, no_grad, non_differentiable
from tinytorch.m07_optimizers import SGD
from tinytorch.m09_spatial import (
    BatchNorm,
    Conv2d,
    MaxPool2d,
    SimpleCNN,
    Windows,
    conv2d,
    convolution,
    lay_windows,
    paddings,
)
from tinytorch.m12_embeddings import Embedding, LearnedPositions, check_ids, positions_of
from tinytorch.m16_acceleration import attach, kernels_enabled, reference_kernels
from tinytorch.m16_acceleration_appendix import CPU, CUDA, FOLDERS, single

# %% [markdown]
# ## Mathematical foundations
#
# A float $x$ becomes one of 256 integers $q$ by a **scale** $s$, the width of a step, and a **zero point** $z$, the
# integer that stands for 0:
#
# $$q = \mathrm{clamp}(\mathrm{round}(x / s) + z, \, -128, \, 127), \qquad \hat x = s \, (q - z).$$
#
# **Affine**: $s$ and $z$ are such that a range [low, high] fills all steps: $s = (high - low) / 255$. **Symmetric**:
# $z = 0$ and $s = \max |x| / 127$; half of the steps are wasted on numbers of one sign. 0 is in each range, because
# padding and ReLU make zeros, and those must not be rounded.
#
# **Error.** Inside of the range, $|x - \hat x| \le s / 2$, with variance $s^2 / 12$: one bit fewer doubles the step
# and costs $20 \log_{10} 2 = 6$ decibels. Outside it is what was cut off. A wide range has coarse steps, a narrow
# one cuts; the best lies between.
#
# **Products.** With activations $\hat x = s_x (q - z)$ and weights $\hat w_o = s_o \, p_o$, symmetric and with a scale
# for each output $o$, the scales stand before the sum:
#
# $$y_o = \sum_k \hat w_{ok} \hat x_k + b_o = s_x s_o \Big( \sum_k p_{ok} q_k - z \sum_k p_{ok} \Big) + b_o.$$
#
# Inside of the brackets are integers, and a sum of $K$ products of bytes fits in 32 bits for every $K < 2^{17}$.
#
# **Straight through** (Bengio, Léonard and Courville, 2013). Rounding has the derivative 0 nearly everywhere, and a
# network in which it stands learns nothing. So backward pretends that it was not there: the gradient passes where $x$
# was in the range, and is 0 where it was cut off.
#
# **Folding.** After training, batch normalisation multiplies each channel by $r = \gamma / \sqrt{\sigma^2 + \epsilon}$
# and adds $\beta - \mu r$. So does a convolution before it with weights $r w$ and bias $r (b - \mu) + \beta$.

# %% [markdown]
# ## Implementation
#
# ### To integers and back
# A scale may be one number, or one for each index of an axis: rows of a weight differ in size, and the largest should
# not decide how coarsely all others are rounded.


# %%
@op
def choose_scale(xp, low, high, *, symmetric=False):
    """(scale, zero point) by which all from `low` to `high`, and 0, become int8. Both have the shape of `low`.

    Symmetric: the zero point is 0, and -128 is not used.
    """
    low, high = xp.minimum(low, xp.zeros_like(low)), xp.maximum(high, xp.zeros_like(high))
    step = xp.maximum(-low, high) / 127 if symmetric else (high - low) / 255
    scale = xp.maximum(step, xp.full_like(step, TINY))
    zero_point = xp.zeros_like(scale) if symmetric else -128 - xp.round(low / scale)
    return scale, xp.cast(xp.clip(zero_point, -128, 127), "int32")


@op
def quantize(xp, x, scale, zero_point, *, dim=None, low=-128, high=127):
    """round(x / scale) + zero_point, clamped to what there is from `low` to `high`, as int8; nan becomes `low`.

    dim: the axis of which each index has a scale and a zero point; None: there is one for all.
    """
    scale, zero_point = (along(xp, s, x, dim) for s in (scale, zero_point))
    steps = xp.round(x * (1 / scale)) + zero_point
    steps = xp.where(steps > low, steps, xp.full_like(steps, low))
    return xp.cast(xp.where(steps < high, steps, xp.full_like(steps, high)), "int8")


@op
def dequantize(xp, q, scale, zero_point, *, dim=None):
    """scale · (q - zero_point), in the scale's dtype."""
    kind = xp.dtype_name(scale) if hasattr(scale, "dtype") else xp.default_float
    scale, zero_point = (along(xp, s, q, dim, kind) for s in (scale, zero_point))
    return (xp.astype(q, scale.dtype) - zero_point) * scale


def along(xp: Any, values: Any, x: Any, dim: int | None, dtype: str | None = None) -> Any:
    """A scale or zero point in the dtype of x, or the one given, in a shape that broadcasts with x's."""
    values = xp.asarray(values, dtype=xp.dtype(dtype or xp.dtype_name(x)))
    if values.ndim > (0 if dim is None else 1):
        raise ValueError(f"expected one scale and zero point, or with dim one for each index of it, got dim={dim} "
                         f"and the shape {tuple(values.shape)}")  # fmt: skip
    return values if values.ndim == 0 else xp.reshape(values, (-1, *(1,) * (x.ndim - 1 - dim % x.ndim)))


non_differentiable(choose_scale, quantize, dequantize)
TINY = 2.0**-23  # the least scale, for ranges of nothing


def test_steps_are_where_they_should_be() -> None:
    scale, zero_point = choose_scale(tensor(-1.0), tensor(4.1))
    assert_close(scale, 0.02)
    assert zero_point.item() == -78
    x = tensor([-1.0, 0.0, 0.011, 4.1, 9.0])
    q = quantize(x, scale, zero_point)
    assert q.tolist() == [-128, -78, -77, 127, 127]
    assert_close(dequantize(q, scale, zero_point), [-1.0, 0.0, 0.02, 4.1, 4.1], atol=1e-6)
    assert choose_scale(tensor(-2.54), tensor(1.0), symmetric=True)[1].item() == 0
    assert_close(choose_scale(tensor(3.0), tensor(5.1))[0], 0.02)  # 0 is in each range


def test_a_scale_for_each_row_keeps_small_rows() -> None:
    x = randn(2, 100) * tensor([[100.0], [0.01]])
    scale, zero_point = choose_scale(amin(x, 1), amax(x, 1))
    error = (dequantize(quantize(x, scale, zero_point, dim=0), scale, zero_point, dim=0) - x).abs()
    assert (amax(error, 1) <= 0.501 * scale).all()
    assert "got dim=None and the shape (2,)" in message_of(quantize, x, scale, zero_point, error=ValueError)


# %% [markdown]
# ### Rounding that can be trained
# There and back again: a float tensor that only has values which int8 can hold. Backward lets the gradient through
# where nothing was cut off.


# %%
@op
def fake_quantize(xp, x, scale, zero_point, *, dim=None, low=-128, high=127):
    """dequantize(quantize(x)), in x's dtype; for its gradient, rounding counts as the identity."""
    q = quantize.function(xp, x, scale, zero_point, dim=dim, low=low, high=high)
    scale = xp.asarray(scale, dtype=x.dtype)
    return dequantize.function(xp, q, scale, zero_point, dim=dim)


@op
def in_range(xp, x, scale, zero_point, *, dim=None, low=-128, high=127):
    """1 where `quantize` does not clamp, 0 elsewhere, in x's dtype."""
    scale, zero_point = (along(xp, s, x, dim) for s in (scale, zero_point))
    steps = xp.round(x * (1 / scale)) + zero_point
    return xp.astype((steps >= low) & (steps <= high), x.dtype)


non_differentiable(in_range)
gradient(fake_quantize, scale=None, zero_point=None,
         x=lambda g, x, scale, zero_point, dim, low, high:
         mul(g, in_range(x, scale, zero_point, dim=dim, low=low, high=high)))  # fmt: skip


def test_gradients_go_straight_through() -> None:
    x = tensor([-3.0, -1.1, -0.26, 0.24, 0.6, 0.9], requires_grad=True)
    out = fake_quantize(x, tensor(0.5), tensor(0), low=-2, high=1)
    assert out.tolist() == [-1.0, -1.0, -0.5, 0.0, 0.5, 0.5]
    (out * tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]


# %% [markdown]
# ### Products of integers
# The two operations that do a network's work. Their own code is for reading: sums of products of bytes are exact in
# float64, which every array library multiplies fast. Kernels (`kernels/cpu/quantized.py`) do 64 products in one
# instruction, where a float32 instruction does 16, and are equal to the last bit. Bias, ReLU and, where the next layer
# wants bytes, rounding come in the same pass.


# %%
@op
def int8_linear(
    xp, x, x_scale, x_zero_point, weight, weight_scale, bias=None, out_scale=None, out_zero_point=None, *,
    relu=False, packed=None,
):  # fmt: skip
    """A linear layer of int8 (…, in) and (out, in) with scales; floats (…, out), or int8 with an `out_scale`.

    Args:
        x_scale, x_zero_point: of all of x, or one for each of its rows, (…,). weight_scale: (out,).
        packed: the weight as a kernel reads it; the operation itself does not need it.
    """
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"int8_linear: input has {x.shape[-1]} features, but the weight takes {weight.shape[1]}")
    centred, factor = centre(xp, x, x_zero_point), xp.asarray(x_scale, dtype=weight_scale.dtype)
    factor = factor if factor.ndim == 0 else xp.expand_dims(factor, axis=-1)
    sums = xp.matmul(centred, xp.matrix_transpose(xp.cast(weight, "float64")))
    return finish(xp, sums, factor * weight_scale, bias, relu, out_scale, out_zero_point)


@op
def int8_convolution(
    xp, x, x_scale, x_zero_point, weight, weight_scale, bias=None, out_scale=None, out_zero_point=None, *,
    windows, relu=False, packed=None,
):  # fmt: skip
    """A convolution of int8 (N, C, H, W) and (O, C, KH, KW) with scales; floats (N, O, OH, OW), or int8.

    Arguments as of `int8_linear`, with one scale for all of x, and `windows` as of `convolution`.
    """
    centred, wide = centre(xp, x, x_zero_point), xp.cast(weight, "float64")
    sums = convolution.function(xp, centred, wide, None, windows=windows, groups=1)
    column = lambda values: None if values is None else xp.reshape(values, (-1, 1, 1))
    factor = xp.asarray(x_scale, dtype=weight_scale.dtype) * column(weight_scale)
    return finish(xp, sums, factor, column(bias), relu, out_scale, out_zero_point)


def centre(xp: Any, x: Any, zero_point: Any) -> Any:
    """x - zero_point in float64, for one zero point or one for each row."""
    if xp.dtype_name(x) != "int8":
        raise TypeError(f"expected int8, got {xp.dtype_name(x)}; quantize(…) makes it")
    zero_point = xp.asarray(zero_point, dtype=xp.dtype("float64"))
    return xp.cast(x, "float64") - (zero_point if zero_point.ndim == 0 else xp.expand_dims(zero_point, axis=-1))


def finish(xp: Any, sums: Any, factor: Any, bias: Any, relu: bool, out_scale: Any, out_zero_point: Any) -> Any:
    """What is done with sums of products."""
    out = xp.astype(sums, factor.dtype) * factor
    out = out if bias is None else out + bias
    out = xp.maximum(out, xp.zeros_like(out)) if relu else out
    return out if out_scale is None else quantize.function(xp, out, out_scale, out_zero_point)


non_differentiable(int8_linear, int8_convolution)


def test_integers_compute_what_their_floats_do() -> None:
    x, weight, scales = randint(-128, 128, (4, 6)).to(int8), randint(-127, 128, (3, 6)).to(int8), tensor([0.1, 2, 0.5])
    y = int8_linear(x, tensor(0.3), tensor(-7), weight, scales, ones(3))
    assert_close(y, linear(dequantize(x, 0.3, -7), dequantize(weight, scales, 0, dim=0), ones(3)), atol=0.01)
    rounded = int8_linear(x, tensor(0.3), tensor(-7), weight, scales, ones(3), tensor(9.0), tensor(5), relu=True)
    assert rounded.tolist() == quantize(relu(y), tensor(9.0), tensor(5)).tolist()
    message = message_of(int8_linear, randn(4, 6), tensor(1.0), 0, weight, scales, error=TypeError)
    assert "expected int8, got float32" in message


# %% [markdown]
# ### Looking at each input
# What passes between layers is not known before it is there. The simplest is to look: each row of a batch, a picture or
# a token, gets its own scale by its own largest element. That costs a pass over the input, but a row's result does not
# depend on its neighbours, and nothing has to be learned beforehand.


# %%
@op
def quantize_rows(xp, x):
    """(int8, scales): each row of (…, n) by a symmetric scale of its own; nan for a row in which something is not
    finite. (…, n) and (…,)."""
    peak = xp.max(xp.abs(x), axis=-1) if x.shape[-1] else xp.zeros(x.shape[:-1], dtype=x.dtype)
    scale = xp.where(xp.isfinite(peak), peak / 127, xp.full_like(peak, xp.nan))
    inverse = 1 / xp.where(scale > 0, scale, xp.ones_like(scale))
    steps = xp.round(x * xp.expand_dims(inverse, axis=-1))
    steps = xp.where(steps > -127, steps, xp.full_like(steps, -127))
    return xp.cast(xp.where(steps < 127, steps, xp.full_like(steps, 127)), "int8"), scale


non_differentiable(quantize_rows)


def test_each_row_has_its_own_steps() -> None:
    q, scale = quantize_rows(tensor([[1.0, -127.0, 0.4], [0.01, 0.02, -0.01], [0.0, 0.0, 0.0]]))
    assert q.tolist() == [[1, -127, 0], [64, 127, -64], [0, 0, 0]]
    assert_close(scale, [1.0, 0.02 / 127, 0.0])


# %% [markdown]
# ### Kernels
# As in module 16: attached from outside, under conditions that look at dtypes and sizes only. A kernel reads a weight
# in an order of its own; who keeps a weight keeps that, too, and hands it over as `packed`.


# %%
def whole(x: Any) -> bool:
    """Whether this is an array of int8."""
    return type(x) in ARRAY_TYPES and getattr(x.dtype, "char", "") == "b"


def rounds(x: Any, scale: Any, zero_point: Any, *, dim: Any = None, low: int = -128, high: int = 127) -> bool:
    return dim is None and single(x, scale) and scale.ndim == 0 and x.size >= 1 << 10


def rounds_rows(x: Any) -> bool:
    return single(x) and x.ndim > 0 and x.shape[-1] > 0 and x.size >= 1 << 10


def multiplies(x: Any, x_scale: Any, x_zero_point: Any, weight: Any, scales: Any, *others: Any, **options: Any) -> bool:
    fit = whole(x) and whole(weight) and x.ndim > 0 and x.shape[-1:] == weight.shape[1:]
    return fit and single(x_scale, scales, *others[:2]) and x.size * len(weight) >= 1 << 12


def bytes_like(*shape: int) -> Any:
    return randint(-128, 128, shape).to(int8).data


def linear_example(count: int) -> tuple[tuple, dict[str, Any]]:
    scales, bias = ((abs(randn(n)) + 0.1).data for n in (100, 100))
    return (bytes_like(16 * count, 64), tensor(0.1).data, 3, bytes_like(100, 64), scales, bias), {}


PACKERS = dict[Op, Callable[[Any], Any]]()
for _operation, _place, _when, _why, _example in (
    (quantize, "rounding:quantize", rounds, "float32, one scale, from 1,024 elements",
     lambda count: ((randn(count, 1024).data, tensor(0.02).data, 3), {})),
    (quantize_rows, "rounding:quantize_rows", rounds_rows, "float32, from 1,024 elements",
     lambda count: ((randn(count, 1024).data,), {})),
    (int8_linear, "quantized:int8_linear", multiplies, "int8, from 4,096 products", linear_example),
):  # fmt: skip
    attach(_operation, "numpy", f"{CPU}.{_place}", _when, _why, _example)


attach(int8_linear, "cupy", f"{CUDA}.quantized:int8_linear", multiplies, "int8, float32 scales", linear_example)


def packer(place: str, *backends: str) -> Callable[[Any], Any]:
    """Lays a weight out for a kernel, where kernels run; None elsewhere."""

    def pack(array: Any) -> Any:
        known = (name := backend_of(array).name) in backends and whole(array) and kernels_enabled()
        return load(f"{FOLDERS[name]}.{place}")(array) if known else None

    return pack


PACKERS[int8_linear] = packer("quantized:pack", "numpy", "cupy")


def test_a_kernel_gives_the_same_bits() -> None:
    inputs, _ = linear_example(3)
    with reference_kernels():
        expected = int8_linear(*inputs)
    assert multiplies(*inputs)
    assert int8_linear(*inputs).tolist() == expected.tolist()


# %% [markdown]
# ### Watching a few batches
# Faster, because nothing has to be found at run time: *observers* stand before the layers while a few batches pass,
# and say afterwards which range to use. The largest element that ever came is a poor choice where it is rare. The best
# cut is the one with the smallest error, which can be tried out.


# %%
class MinMaxObserver(Module):
    """Looks at the tensors that pass. `covered()` says which range int8 should cover, `calculate_qparams()` by which
    steps.

    This one covers everything: from the smallest element to the largest that came.
    """

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", tensor(float("inf")))
        self.register_buffer("high", tensor(float("-inf")))

    def forward(self, x: Tensor) -> Tensor:
        with no_grad():
            self.observe(x.detach())
        return x

    def observe(self, x: Tensor) -> None:
        overwrite(self.low, self.low.minimum(amin(x)).data)
        overwrite(self.high, self.high.maximum(amax(x)).data)

    def covered(self) -> tuple[Tensor, Tensor]:
        if self.low.item() > self.high.item():
            name = type(self).__name__
            raise ValueError(f"{name}: nothing has passed yet; call the prepared model with some batches")
        return self.low, self.high

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero point)."""
        return choose_scale(*self.covered())


class MovingAverageMinMaxObserver(MinMaxObserver):
    """Covers what usual batches cover: a moving average of their smallest and largest elements."""

    def __init__(self, averaging_constant: float = 0.01) -> None:
        super().__init__()
        self.averaging_constant = averaging_constant

    def observe(self, x: Tensor) -> None:
        if self.low.item() > self.high.item():
            return super().observe(x)
        for held, new in ((self.low, amin(x)), (self.high, amax(x))):
            overwrite(held, (held + self.averaging_constant * (new - held)).data)


class SampleObserver(MinMaxObserver):
    """Keeps a part of what passed, evenly spread over each batch, for those who want to know more than two numbers."""

    SIZE = 1 << 13  # elements of a batch

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Tensor] = []

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        self.parts.append(x.reshape(-1)[:: max(1, x.numel() // self.SIZE)])


class MSEObserver(SampleObserver):
    """Covers what makes the mean square error smallest, among everything and 63 narrower ranges."""

    CANDIDATES = 64

    def covered(self) -> tuple[Tensor, Tensor]:
        (low, high), sample = super().covered(), cat(self.parts)
        shares = [i / self.CANDIDATES for i in range(self.CANDIDATES, 0, -1)]
        ranges = [(low * share, high * share) for share in shares]
        errors = stack([mean((fake_quantize(sample, *choose_scale(*r)) - sample) ** 2) for r in ranges])
        return ranges[int(errors.argmin().item())]


def test_what_observers_cover() -> None:
    manual_seed(0)
    batches, found, errors = [randn(4000), cat([randn(3999), tensor([9.0])])], [], []
    for observer in (MinMaxObserver(), MovingAverageMinMaxObserver(0.5), MSEObserver()):
        for batch in batches:
            assert observer(batch) is batch
        found.append(observer.covered()[1].item())
        rounded = fake_quantize(cat(batches), *observer.calculate_qparams())
        errors.append(mean((rounded - cat(batches)) ** 2).item())
    assert found[0] == 9
    assert found[0] > found[2] > found[1]
    assert errors.index(min(errors)) == 2
    assert "nothing has passed yet" in message_of(MinMaxObserver().calculate_qparams, error=ValueError)


# %% [markdown]
# ### Layers of integers
# A quantized layer holds its weight as int8, with a scale for each output. It is *static* if it knows the scale of its
# inputs, else it looks at each. Its parts are buffers: they are saved, and nobody trains them. How a kernel reads a
# weight is no state; it is made when first needed, and again when somebody has written to the weight.


# %%
class Int8Layer(Module):
    """What quantized layers share.

    Attributes:
        weight, weight_scale: int8 (out, …), and (out,). bias: (out,) or None.
        input_scale, input_zero_point: of a static layer's inputs; else None.
        relu: whether the result's negative elements become 0.
        following: in a tuple, the static layer that takes the result, which is rounded for it; empty if none does.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Any
    input_scale: Any
    input_zero_point: Any
    operation: Any
    following: tuple[Any, ...]
    _packed: Any

    def hold(self, shape: tuple[int, ...], bias: bool, static: bool) -> None:
        """Have buffers of these shapes, to be filled."""
        self.relu, self.following, self._packed = False, (), None
        self.register_buffer("weight", zeros(*shape, dtype=int8))
        self.register_buffer("weight_scale", zeros(shape[0]))
        self.register_buffer("bias", zeros(shape[0]) if bias else None)
        self.register_buffer("input_scale", tensor(1.0) if static else None)
        self.register_buffer("input_zero_point", tensor(0, dtype=int32) if static else None)

    def fill(self, layer: Module, observer: MinMaxObserver | None = None) -> Int8Layer:
        """Take a float layer's weight and bias, rounded, and what its observer saw."""
        scale = weight_scale(layer.weight)
        self.weight = quantize(layer.weight.detach(), scale, 0, dim=0, low=-127)
        self.weight_scale = scale
        if self.bias is not None:
            self.bias = Tensor(layer.bias.data)
        if observer is not None:
            self.input_scale, self.input_zero_point = observer.calculate_qparams()
        return self

    def compute(self, x: Tensor, **attributes: Any) -> Tensor:
        """The layer's operation on floats, or on int8 that the layer before has rounded for it."""
        scale, zero_point = self.input_scale, self.input_zero_point
        if scale is None:
            (x, scale), zero_point = quantize_rows(x), 0
        elif x.dtype != int8:
            x = quantize(x, scale, zero_point)
        wanted = (None, None)
        if self.following:
            wanted = self.following[0].input_scale, self.following[0].input_zero_point
        return self.operation(x, scale, zero_point, self.weight, self.weight_scale, self.bias, *wanted,
                              relu=self.relu, packed=self.packed(), **attributes)  # fmt: skip

    def packed(self) -> Any:
        """The weight as the operation's kernel reads it, if there is one."""
        array, packer = self.weight.data, PACKERS.get(self.operation, lambda array: None)
        if self._packed is None or self._packed[0] is not array or Writes.since(array, self._packed[1]):
            made = packer(array)
            self._packed = None if made is None else (array, Writes.latest, made)
        return self._packed and self._packed[2]


def weight_scale(weight: Tensor) -> Tensor:
    """A symmetric scale for each output of a weight (out, …)."""
    rows = weight.detach().reshape(weight.shape[0], -1)
    return choose_scale(amin(rows, 1), amax(rows, 1), symmetric=True)[0]


class QuantizedLinear(Int8Layer):
    """A linear layer of int8. See `Int8Layer`."""

    operation = staticmethod(int8_linear)

    def __init__(self, in_features: int, out_features: int, bias: bool = True, static: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.hold((out_features, in_features), bias, static)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)

    def extra_repr(self) -> str:
        kind = "dynamic" if self.input_scale is None else "static"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}{', relu' * self.relu}"


class QuantizedConv2d(Int8Layer):
    """A convolution of int8 with zeros around its pictures, always static. Arguments as of `Conv2d`."""

    operation = staticmethod(int8_convolution)

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, int], stride: tuple[int, int] = (1, 1),
        padding: Any = 0, dilation: tuple[int, int] = (1, 1), bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.padding = in_channels, out_channels, padding
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.hold((out_channels, in_channels, *kernel_size), bias, static=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return self.forward(x.unsqueeze(0))[0]
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"QuantizedConv2d: expected ([N,] {self.in_channels}, H, W), got {x.shape}")
        return self.compute(x, windows=self.windows(x.shape))

    def windows(self, shape: tuple[int, ...]) -> Windows:
        borders = paddings("QuantizedConv2d", self.padding, self.kernel_size, self.stride, self.dilation)
        return lay_windows("QuantizedConv2d", shape, self.kernel_size, self.stride, borders, self.dilation)

    def extra_repr(self) -> str:
        return (f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
                f"padding={self.padding}, bias={self.bias is not None}{', relu' * self.relu}")  # fmt: skip


def test_a_weight_that_was_written_to_is_packed_again() -> None:
    layer, x = QuantizedLinear(5, 3).fill(Linear(5, 3)), randn(2, 5)
    before = layer(x)
    layer.load_state_dict(QuantizedLinear(5, 3).fill(Linear(5, 3)).state_dict())
    assert (layer(x) - before).abs().max().item() > 1e-3
    assert layer.state_dict()["weight"].dtype == int8


# %% [markdown]
# A table needs no product: its rows are looked up, and only those become floats. Read the other way, as the last layer
# of a language model that ties its weights, it is a linear layer.


# %%
class QuantizedEmbedding(Int8Layer):
    """A table of int8 (rows, features) with a scale for each row."""

    operation = staticmethod(int8_linear)

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.hold((num_embeddings, embedding_dim), bias=False, static=False)

    def rows(self, index: Any) -> Tensor:
        q, scale = self.weight[index], self.weight_scale[index]
        return q.to(scale.dtype) * scale.unsqueeze(-1)

    def forward(self, ids: Tensor) -> Tensor:
        check_ids("QuantizedEmbedding", ids, self.num_embeddings)
        return self.rows(ids)

    def scores(self, x: Tensor) -> Tensor:
        """How well vectors (…, features) fit each row: (…, rows)."""
        return self.compute(x)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class QuantizedPositions(QuantizedEmbedding):
    """`LearnedPositions` of int8."""

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        return x + self.rows(positions_of("QuantizedPositions", x, offset, *self.weight.shape))


def test_a_table_is_read_both_ways() -> None:
    layer = Embedding(9, 16)
    table, x = QuantizedEmbedding(9, 16).fill(layer), randn(4, 16)
    assert_close(table(arange(9)), layer.weight, atol=0.02)
    assert_close(table.scores(x), layer.scores(x), atol=0.3)
    assert "index 9 is out of range" in message_of(table, tensor([9]), error=IndexError)


# %% [markdown]
# ### Folding batch normalisation
# Which convolution stands before which norm, no attribute says; but one can watch: what a norm is given is what some
# convolution has just returned.


# %%
def fold_batch_norm(model: Module, example: Tensor) -> Module:
    """A copy in eval mode whose batch norms, where they follow a convolution or a linear layer, are folded into it.

    Args:
        example: a batch that the model takes, to see which layer gets what from which. `Identity` stays in a norm's
            place, so that the others keep their names.
    """
    model, made = copy.deepcopy(model).eval(), dict[int, tuple[Module, Tensor]]()
    calls, pairs = Counter[Module](), dict[Module, Module]()

    def note(layer: Module, inputs: tuple, out: Tensor) -> None:
        calls[layer] += 1
        if isinstance(layer, BatchNorm):
            pairs.update([(layer, made[id(inputs[0])][0])] if id(inputs[0]) in made else [])
        else:
            made[id(out)] = layer, out  # kept, so that no other tensor gets its id

    kinds = (Conv2d, Linear, BatchNorm)
    handles = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, kinds)]
    with no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    once = {norm: layer for norm, layer in pairs.items() if calls[norm] == calls[layer] == 1}
    folded = [norm for norm, layer in once.items() if norm.running_var is not None and fold(norm, layer) is None]
    return rebuild(model, lambda path, layer: Identity() if layer in folded else layer)


@no_grad()
def fold(norm: Any, layer: Any) -> None:
    """Give a layer the weight and bias that do what it and the norm behind it do."""
    factor = 1 / sqrt(norm.running_var + norm.eps)
    factor = factor if norm.weight is None else factor * norm.weight
    shift = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    shift = shift * factor if norm.bias is None else shift * factor + norm.bias
    layer.weight = Parameter(layer.weight * factor.reshape(-1, *(1,) * (layer.weight.ndim - 1)))
    layer.bias = Parameter(shift)


def rebuild(layer: Module, make: Callable[[str, Module], Module], path: str = "", seen: Any = None) -> Module:
    """The module with `make(path, layer)` in each layer's place; what that leaves as it is, is looked into."""
    seen = {} if seen is None else seen
    if layer not in seen:
        seen[layer] = made = make(path, layer)
        for name, child in list(made._own(Module)) if made is layer else ():
            setattr(layer, name, rebuild(child, make, f"{path}.{name}".lstrip("."), seen))
    return seen[layer]


def test_folding_changes_nothing_but_the_work() -> None:
    net, x = SimpleCNN(1, 3, 8, widths=(4, 4), batch_norm=True), randn(6, 1, 8, 8)
    net.add_module("0", Conv2d(1, 4, 3, padding=1))  # with a bias
    overwrite(net[1].weight, tensor([1.0, -2.0, 3.0, 0.5]).data)  # as if it had learned something
    net(x * 2 + 1)
    folded: Any = fold_batch_norm(net, x)
    assert_close(folded(x), net.eval()(x), atol=1e-4)
    assert [type(layer) for layer in (net[1], folded[1])] == [type(net[1]), Identity]


# %% [markdown]
# ### Prepare, look or learn, convert
# `prepare` puts observers before the layers; `prepare_qat` makes them round, too, inputs and weights, so that training
# finds weights which bear it (Jacob and others, 2018). `convert` makes integers of what was prepared, and
# `quantize_dynamic` does with no preparation at all. Each returns a copy.


# %%
class Prepared:
    """What a layer becomes: it looks at its inputs and, in QAT, rounds them and its weight as int8 will be."""

    observer: MinMaxObserver
    rounds: bool

    def seen(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """(input, weight) to compute with. In QAT ranges move while training, and are fixed in eval mode."""
        if self.training or not self.rounds:
            self.observer(x)
        if not self.rounds:
            return x, self.weight
        scale = weight_scale(self.weight)
        weight = fake_quantize(self.weight, scale, 0, dim=0, low=-127)
        return fake_quantize(x, *self.observer.calculate_qparams()), weight


class PreparedLinear(Prepared, Linear):
    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.seen(x)
        return linear(x, weight, self.bias)


class PreparedConv2d(Prepared, Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.seen(x)
        return conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


def quantizable(layer: Module) -> bool:
    """Of convolutions, those of one group with zeros around; no layer of a class of somebody's own."""
    return type(layer) is Linear or (type(layer) is Conv2d and layer.groups == 1 and layer.padding_mode == "zeros")


def prepare(model: Module, observer: Callable[[], MinMaxObserver] = MSEObserver, rounds: bool = False) -> Module:
    """A copy in eval mode with an observer before each linear layer and convolution. Call it with some batches.

    Args:
        observer: makes one.
        rounds: whether the layers round, as `prepare_qat` has them.
    """

    def make(path: str, layer: Any) -> Any:
        if not quantizable(layer):
            return layer
        kind: Any = PreparedLinear if type(layer) is Linear else PreparedConv2d
        made = kind.__new__(kind)
        made.__dict__.update(layer.__dict__)  # of another class, with the same parameters
        made.observer, made.rounds = observer(), rounds
        return made

    return rebuild(copy.deepcopy(model).eval(), make)


def prepare_qat(model: Module, observer: Callable[[], MinMaxObserver] = MovingAverageMinMaxObserver) -> Module:
    """A copy in training mode that rounds as int8 will: train it as usual, a little. Fold batch norms before."""
    return prepare(model, observer, rounds=True).train()


def convert(model: Module) -> Module:
    """The int8 network, in eval mode, of one that was prepared. Tables become int8 as well.

    Layers of a `Sequential` hand int8 on: a part of it, called alone, may return int8.
    """
    return link(rebuild(copy.deepcopy(model), TO_INT8)).eval()


def quantize_dynamic(model: Module) -> Module:
    """A copy in eval mode whose linear layers and tables are int8, and look at each input's range."""
    return rebuild(copy.deepcopy(model), partial(quantized_twin, of=(Linear,))).eval()


def quantized_twin(path: str, layer: Any, of: tuple) -> Module:
    """What a layer of these classes, or a table, is in int8; another layer itself."""
    observer = getattr(layer, "observer", None)
    if type(layer) is Embedding and layer.max_norm is None:
        return QuantizedEmbedding(*layer.weight.shape).fill(layer)
    if type(layer) is LearnedPositions:
        return QuantizedPositions(*layer.weight.shape).fill(layer)
    if type(layer) not in of:
        return layer
    bias = layer.bias is not None
    if isinstance(layer, Linear):
        return QuantizedLinear(layer.in_features, layer.out_features, bias, observer is not None).fill(layer, observer)
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return QuantizedConv2d(*sizes, bias).fill(layer, observer)


TO_INT8 = partial(quantized_twin, of=(PreparedLinear, PreparedConv2d))

# %% [markdown]
# Between two static layers of a `Sequential`, numbers need not become floats. ReLU, max pooling and flattening do the
# same to integers as to their floats, because rounding keeps the order. So a layer rounds its result for the one that
# takes it, and takes the ReLU along; what it gives is equal, bit by bit.


# %%
def link(model: Module) -> Module:
    """Have layers of a `Sequential` hand int8 to each other, and return the model."""
    uses = Counter(layer for module in model.modules() for _, layer in module._own(Module))
    for row in model.modules():
        giver: Any = None
        for name, layer in row._layers().items() if isinstance(row, Sequential) else ():
            static = isinstance(layer, Int8Layer) and layer.input_scale is not None and uses[layer] == 1
            if static:
                if giver is not None:
                    giver.following = (layer,)
                giver = layer
            elif giver is not None and (layer is relu or type(layer) is ReLU):
                giver.relu = True
                row.add_module(name, Identity())
            elif not keeps_order(layer):
                giver = None
    return model


def keeps_order(layer: Any) -> bool:
    """Whether a layer, in eval mode, does the same to integers as to the floats that they stand for."""
    return type(layer) in (Flatten, Identity, Dropout) or (type(layer) is MaxPool2d and not layer.return_indices)


def test_linked_layers_give_the_same_bits() -> None:
    manual_seed(0)
    net, x = SimpleCNN(1, 3, 8, widths=(4, 8), hidden=8), randn(20, 1, 8, 8)
    ready = prepare(net)
    ready(x)
    chained: Any = convert(ready)
    assert (chained[0].relu, chained[0].following[0] is chained[3], type(chained[1])) == (True, True, Identity)
    assert chained[:1](x).dtype == int8
    apart = list(rebuild(ready, TO_INT8))
    out = x
    for layer in apart:
        out = layer(out)
    assert chained(x).tolist() == out.tolist()
    assert (chained(x) - net(x)).abs().max().item() < 0.05


def test_training_goes_through_rounding() -> None:
    manual_seed(0)
    net = prepare_qat(Sequential(Linear(4, 8), relu, Linear(8, 2)))
    x = randn(64, 4)
    target = (x[:, 0] > 0).to("int64")
    optimizer, losses = SGD(net.parameters(), lr=0.5), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert_close(convert(net)(x), net.eval()(x), atol=1e-4)  # what was trained is what computes


# %% [markdown]
# ## Systems analysis
#
# What a layer becomes: bytes, milliseconds at batch 64, and the noise that rounding adds, for layers of growing size.
# The wider, the more the product weighs beside the rounding of its inputs. Then what the number of bits costs.


# %%
def decibels(exact: Tensor, rounded: Tensor) -> float:
    """The signal-to-noise ratio: 10 log10 of what there is over what was lost."""
    noise = mean((rounded - exact).to(float64) ** 2)
    return (10 * (mean(exact.to(float64) ** 2) / noise).log() / tensor(10.0, dtype=float64).log()).item()


def stored_bytes(model: Module) -> int:
    return sum(x.numel() * x.dtype.itemsize for x in model.state_dict().values())


def analyze() -> None:
    """Measure layers of floats and of int8: bytes, time and noise; and what each bit is worth."""
    manual_seed(0)
    rows, x = list[list](), randn(64, 1024)
    for width in (256, 1024, 4096):
        net = Sequential(Linear(1024, width), relu, Linear(width, 10)).eval()
        ready = prepare(net)
        ready(x)
        for name, made in (("float32", net), ("dynamic", quantize_dynamic(net)), ("static", convert(ready))):
            with no_grad():
                rows.append([f"1024-{width}-10", name, stored_bytes(made) / 1e6, seconds(made, x) * 1e3,
                             "" if made is net else f"{decibels(net(x), made(x)):.1f}"])  # fmt: skip
    print_table(["MLP, batch 64", "numbers", "MB", "ms", "signal/noise, dB"], rows)
    print()
    values, rows = randn(1 << 16), []
    for bits in (8, 7, 6, 5, 4, 3, 2):
        most = 2 ** (bits - 1) - 1
        scale = values.abs().max() / most
        rounded = fake_quantize(values, scale, 0, low=-most, high=most)
        rows.append([bits, 2 * most + 1, f"{decibels(values, rounded):.1f}"])
    print_table(["bits", "steps", "signal/noise of normal numbers, dB"], rows)


# %% [markdown]
# ## Production context
#
# `torch.ao.quantization` (now in `torchao`) has these names: observers with `calculate_qparams`, `prepare`,
# `prepare_qat`, `convert`, `quantize_dynamic`, and `fuse_modules` for folding. There a `QConfig` says which observer
# stands where, and in eager mode one marks with `QuantStub` where floats become integers; PyTorch's quantized tensors
# carry scale and zero point with them, where ours are plain int8 and the layers know. Its CPU kernels are oneDNN's and
# FBGEMM's, which use the same instruction, `vpdpbusd`, with activations as uint8. On GPUs, tensor cores multiply int8
# and float8. Large language models are mostly stored with 4 bits a weight, in groups with a scale each (GPTQ, AWQ,
# llama.cpp's GGUF), as in this module's appendix; there memory traffic is what counts. Left out here: int8 attention,
# grouped convolutions, rounding that minimises a layer's error (AdaRound), and smoothing activations into weights.

# %% [markdown]
# ## Integration testing


# %%
def test_a_cnn_reads_bars_as_well_in_int8() -> None:
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
    ready = prepare(fold_batch_norm(net, pictures))
    ready(pictures)
    small = convert(ready)
    assert (small(pictures).argmax(1) == net.eval()(pictures).argmax(1)).sum().item() >= 63
    assert stored_bytes(net) / stored_bytes(small) > 2.5  # scales and biases weigh something in a network this small


# %% [markdown]
# ## Thinking questions
#
# 1. A layer's inputs come from a ReLU. What does an affine range gain over a symmetric one, in decibels?
# 2. Why has a weight a scale for each output, and not for each input? What would the product of integers have to do?
# 3. Dynamic quantization reads each input twice. For which shapes is that a large part of the time?
# 4. A network ends in scores of which only the largest is used. Which error of its last layer can change an answer?
# 5. With 4 bits and a scale of 4 bytes for each group of 32 weights: how many bits a weight is that, and what is gained
#    by half the group?

# %% [markdown]
# ## Summary
#
# A scale and a zero point make a byte of a number; products of bytes are exact, and the scales come behind the sum. A
# few batches tell the ranges, or each input tells its own, and a network can be trained to bear what is lost. It is a
# quarter of its size, and the products four times as fast. Module 18 takes away what a network does not need at all.


if __name__ == "__main__":
    run_module(globals())
