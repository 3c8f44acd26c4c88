"""Module 16, appendix: which kernel stands in for which operation, and when; what is fused; and how to warm up.

`KERNELS` of module 16 is filled here: one `attach` for each pair of an operation and a kernel, with the condition under
which the kernel runs. A condition looks at dtypes and sizes only, so it costs a fraction of a microsecond. Whatever a
kernel is not made for, and what is too small to be worth its call, goes to the operation's own code.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from tinytorch.backends import ARRAY_TYPES, backend_of, get_backend
from tinytorch.kernels import load
from tinytorch.kernels.cpu.layouts import layout
from tinytorch.m02_tensor import Tensor, exp, matmul, op, randn, zeros
from tinytorch.m02_tensor import sum as total_of
from tinytorch.m02_tensor_appendix import Writes, erf, tanh
from tinytorch.m03_activations import ReLU, gelu_and_cdf, log_softmax, relu, sigmoid, silu, softmax
from tinytorch.m04_layers import Linear, attach_fusion, drop, linear
from tinytorch.m05_losses import softmax_cross_entropy
from tinytorch.m06_autograd import gradient, linear_gradients, linear_rule, relu_gradient, softmax_minus_one_hot
from tinytorch.m06_autograd_appendix import gelu_gradient
from tinytorch.m07_optimizers import SGD, Adam, AdamW, Optimizer
from tinytorch.m08_training import LOWER
from tinytorch.m09_spatial import (
    Conv2d,
    Windows,
    convolution,
    convolution_input_gradient,
    convolution_weight_gradient,
    convolve,
    gather_from_maxima,
    lay_windows,
    max_pool,
    normalize,
    normalize_gradients,
    scatter_to_maxima,
)
from tinytorch.m09_spatial_appendix import avg_pool, avg_pool_gradient
from tinytorch.m12_embeddings import embedding_weight_gradient, rotate
from tinytorch.m13_attention import attention, attention_gradients
from tinytorch.m13_attention_appendix import cached_attention, caches
from tinytorch.m15_profiling import CALLS
from tinytorch.m16_acceleration import KERNELS, Kernel, attach, kernels_enabled

# -- fusion ------------------------------------------------------------------------------------------------------------


@op
def convolution_relu(xp, x, weight, bias=None, *, windows, groups):
    """relu(convolution(x, weight, bias)): the maximum is taken before the result is written, once, to memory."""
    return xp.maximum(convolution.function(xp, x, weight, bias, windows=windows, groups=groups), 0)


def convolution_relu_rule(g: Any, x: Any, weight: Any, out: Any, position: tuple, windows: Any, groups: int) -> tuple:
    """The gradient of the ReLU is made once, and serves all three."""
    g = relu_gradient(g, out)
    geometry = {"windows": windows, "groups": groups}
    return (
        convolution_input_gradient(g, weight, **geometry) if 0 in position else None,
        convolution_weight_gradient(g, x, **geometry) if 1 in position else None,
        total_of(g, dim=(0, 2, 3)) if 2 in position else None,
    )


gradient(convolution_relu, together=convolution_relu_rule)


@op
def linear_relu(xp, x, weight, bias=None):
    """relu(linear(x, weight, bias)): what lies in between is not kept."""
    return xp.maximum(linear.function(xp, x, weight, bias), 0)


def linear_relu_rule(g: Any, x: Any, weight: Any, out: Any, position: tuple) -> Any:
    return linear_rule(relu_gradient(g, out), x, weight, position)


gradient(linear_relu, together=linear_relu_rule)
LOWER.update(("convolution_relu", "linear_relu"))


def fuse_convolution(layer: Conv2d, following: Any) -> Callable | None:
    """For a convolution that is followed by a ReLU: both in one."""
    can = layer.padding_mode == "zeros" and is_next(layer, following, relu, ReLU)
    return partial(_convolve_relu, layer) if can else None


def fuse_linear(layer: Linear, following: Any) -> Callable | None:
    """The same for a linear layer."""
    return partial(_linear_relu, layer) if is_next(layer, following, relu, ReLU) else None


def is_next(layer: Any, following: Any, function: Callable, kind: type) -> bool:
    """Whether that function or a layer of that kind follows, and no hook is to see what is in between.

    Those who ask name both, because a fusion gives way to a learner's code if it names what the learner wrote.
    """
    if not (following is function or type(following) is kind) or not kernels_enabled():
        return False
    return not layer._hooks and not getattr(following, "_hooks", None)


def _convolve_relu(layer: Conv2d, x: Tensor) -> Tensor:
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    return convolve(convolution_relu, x, layer.weight, layer.bias, *geometry)


def _linear_relu(layer: Linear, x: Tensor) -> Tensor:
    try:
        return linear_relu(x, layer.weight, layer.bias)
    except (TypeError, ValueError):
        pass
    return relu(layer(x))  # it says by the layer's own name what does not fit


for _kind, _fusion, _both in ((Conv2d, fuse_convolution, _convolve_relu), (Linear, fuse_linear, _linear_relu)):
    attach_fusion(_kind, _fusion)
    CALLS[_both.__code__] = "layer"  # for profiles, it is a call of the layer

# -- conditions --------------------------------------------------------------------------------------------------------

ARRAY: Any = get_backend("cpu").array_type


def single(*arrays: Any) -> bool:
    """Whether all are arrays of float32; None, an input that is left out, does not count."""
    for x in arrays:  # noqa: SIM110 - a third of the time of all(…)
        if x is not None and (type(x) not in ARRAY_TYPES or x.dtype.char != "f"):
            return False
    return True


def of_floats(*arrays: Any, **attributes: Any) -> bool:
    return single(*arrays)


def from_size(least: int) -> Callable[..., bool]:
    """A condition: float32 everywhere, and the first input has at least so many elements."""

    def when(first: Any, *others: Any, **attributes: Any) -> bool:
        return type(first) in ARRAY_TYPES and first.size >= least and single(first, *others)

    return when


FEWEST_PLACES, MOST_STRIDES = 4, 64


def depthwise(weight: Any, groups: int) -> bool:
    return groups > 1 and weight.shape[1] == 1


def convolves(x: Any, weight: Any, bias: Any = None, *, windows: Windows, groups: int) -> bool:
    """Not where pictures are single pixels: a convolution is a product of matrices there."""
    return single(x, weight, bias) and not depthwise(weight, groups) and math.prod(windows.count) >= FEWEST_PLACES


def carries_back(g: Any, weight: Any, *, windows: Windows, groups: int) -> bool:
    """Not to one channel, or by strides that leave nothing to add up: there the kernel's tiles are mostly empty."""
    known = convolves(g, weight, windows=windows, groups=groups)
    return known and weight.shape[1] > 1 and math.prod(windows.stride) <= MOST_STRIDES


FEWEST_CHANNELS, FEWEST_PIXELS = 16, 1 << 12


def convolves_in_pairs(x: Any, weight: Any, bias: Any = None, *, windows: Windows, groups: int) -> bool:
    """3×3 windows a pixel apart, over rows of an even length with a zero at both ends; and some channels, because to
    transform a pixel must pay for itself, and some pixels, for the weights' sake. A gradient comes in x's place."""
    usual = windows.size == (3, 3) and windows.stride == windows.dilation == windows.padding[1] == (1, 1)
    enough = min(weight.shape[:2]) >= FEWEST_CHANNELS and len(x) * math.prod(windows.count) >= FEWEST_PIXELS
    width = windows.shape[1]
    return usual and enough and groups == 1 and width % 2 == 0 and width > 2 and single(x, weight, bias)


def convolves_depthwise(x: Any, weight: Any, bias: Any = None, *, windows: Windows, groups: int) -> bool:
    return depthwise(weight, groups) and single(x, weight, bias)


def weighs(g: Any, x: Any, *, windows: Windows, groups: int) -> bool:
    shared = groups == 1 or x.shape[1] != groups
    return single(g, x) and shared and math.prod(windows.count) >= FEWEST_PLACES


def weighs_depthwise(g: Any, x: Any, *, windows: Windows, groups: int) -> bool:
    return groups > 1 and x.shape[1] == groups and single(g, x)


def normalizes(x: Any, weight: Any = None, bias: Any = None, *, dims: tuple, eps: float) -> bool:
    shapes = {p.shape for p in (weight, bias) if p is not None}
    return single(x, weight, bias) and len(shapes) < 2 and layout(x.shape, tuple(dims), next(iter(shapes), None)) != ""


def normalizes_back(g: Any, x: Any, weight: Any, *statistics: Any, dims: tuple, eps: float, shape: Any) -> bool:
    given = shape if weight is None else weight.shape
    return single(g, x, weight, *statistics) and shape in (None, given) and layout(x.shape, tuple(dims), given) != ""


def of_last_axis(least: int) -> Callable[..., bool]:
    def when(x: Any, *, dim: int) -> bool:
        return type(x) in ARRAY_TYPES and x.size >= least and x.dtype.char == "f" and dim in (-1, x.ndim - 1)

    return when


def classifies(logits: Any, targets: Any) -> bool:
    return single(logits) and targets.dtype.char == "l"


def classifies_back(scale: Any, probabilities: Any, targets: Any) -> bool:
    return single(scale, probabilities) and targets.dtype.char == "l"


def gathers(values: Any, x: Any, largest: Any, *, windows: Windows) -> bool:
    return type(values) in ARRAY_TYPES and values.dtype.char in "fl" and single(x, largest)


def sums_channels(x: Any, *, dim: Any = None, keepdim: bool = False) -> bool:
    """The gradient of a convolution's bias: over all axes but the second."""
    return dim == (0, 2, 3) and not keepdim and single(x) and x.ndim == 4 and x.size >= 1 << 13


def sums_rows(x: Any, *, dim: Any = None, keepdim: bool = False) -> bool:
    """The gradient of a linear layer's bias: over the first axes."""
    leading = type(dim) is tuple and 0 < len(dim) < x.ndim and dim == (*range(len(dim)),)
    return leading and single(x) and x.size >= 1 << 13


def attends(query: Any, key: Any, value: Any, mask: Any = None, **attributes: Any) -> bool:
    """Shapes that do not belong together go to the operation, which says so."""
    if not single(query, key, value) or min(query.ndim, key.ndim, value.ndim) < 2:
        return False
    keys, features = key.shape[-2:]
    if query.shape[-1] != features or features == 0 or value.shape[-2] != keys:
        return False
    pairs = (query.shape[-2], keys)
    return mask is None or (
        mask.dtype.char in "f?"
        and mask.ndim >= 2
        and all(n in (1, m) for n, m in zip(mask.shape[-2:], pairs, strict=True))
    )


def attends_back(
    g: Any, query: Any, key: Any, value: Any, mask: Any, *kept: Any, mask_gradient: bool = False, **attributes: Any
) -> bool:
    return not mask_gradient and single(g, *kept) and attends(query, key, value, mask)


def attends_cached(query: Any, key: Any, value: Any, lengths: Any, **attributes: Any) -> bool:
    known = single(query, key, value) and lengths.dtype.char in "bhilq"
    return known and caches(query.shape, key.shape, value.shape, lengths.shape)


def scatters(g: Any, ids: Any, *, rows: int, **attributes: Any) -> bool:
    return single(g) and g.size >= 1 << 10 and ids.dtype.char == "l"


# Multiplications from which NumPy's BLAS uses threads of its own; earlier where the right matrix lies by columns, as a
# linear layer's transposed weight does. They and the kernels' threads keep each other from the cores, ten times as long
# as a product takes: so from there on products are done here, on one core if they are small.
LEAST_PRODUCT, LEAST_BY_COLUMNS = 1 << 20, 1 << 18
LEAST_ROWS = 4
FEW_ROWS, LEAST_FEW = 16, 1 << 17  # a kernel for few rows, at which BLAS is slow, and what it must multiply at least


def multiplies(a: Any, b: Any) -> bool:
    """Not a product of a few rows or columns, or of matrices whose lengths do not agree."""
    if not single(a, b) or not b.ndim == 2 <= a.ndim or a.shape[-1] != b.shape[0]:
        return False
    return worth_it(LEAST_BY_COLUMNS if b.strides[0] == 4 else LEAST_PRODUCT, a.size, *b.shape)


def multiplies_linear(x: Any, weight: Any, bias: Any = None) -> bool:
    if not single(x, weight, bias) or not weight.ndim == 2 <= x.ndim or x.shape[-1] != weight.shape[1]:
        return False
    few = x.size < FEW_ROWS * weight.shape[1] and x.size * len(weight) >= LEAST_FEW
    enough = few or worth_it(LEAST_BY_COLUMNS, x.size, *weight.shape[::-1])
    return enough and (bias is None or bias.shape == weight.shape[:1])


def multiplies_back(g: Any, x: Any, weight: Any, **attributes: Any) -> bool:
    return single(g, x, weight) and g.ndim > 1 and worth_it(LEAST_PRODUCT, g.size, *weight.shape)


def worth_it(least: int, size: int, depth: int, columns: int) -> bool:
    return size * columns >= least and columns >= 8 and size >= LEAST_ROWS * depth


def turns(x: Any, cos: Any, sin: Any) -> bool:
    return single(x, cos, sin) and cos.shape == sin.shape and x.shape[-1:] == cos.shape[-1:] and not x.shape[-1] % 2


# -- the table ---------------------------------------------------------------------------------------------------------

CPU, CUDA = "tinytorch.kernels.cpu", "tinytorch.kernels.cuda"
FOLDERS = {"numpy": CPU, "cupy": CUDA}
FLOATS = "float32"
SEVERAL, SEVERAL_TEXT = 2048, "float32, from 2,048 elements"
PLACES_TEXT = f"float32, pictures with {FEWEST_PLACES} windows or more"
PAIRS_TEXT = "float32, 3×3, stride 1, padding 1 across, an even width, from 16 channels and 4,096 pixels"
LINEAR_TEXT = "float32, where BLAS would use threads, or of a few rows"
DEPTHWISE_TEXT = "float32, a group for each channel"
NORMS_TEXT = "float32, over the last axes or over all but the second"

_when: Callable[..., bool]

# The same on both: a file and a function of that name in each folder.
for _operation, _place, _when, _why in (
    (softmax, "softmax:softmax", of_last_axis(1), "float32, over the last axis"),
    (log_softmax, "softmax:log_softmax", of_last_axis(1), "float32, over the last axis"),
    (softmax_cross_entropy, "softmax:softmax_cross_entropy", classifies, FLOATS),
    (softmax_minus_one_hot, "softmax:softmax_minus_one_hot", classifies_back, FLOATS),
    (normalize, "normalization:normalize", normalizes, NORMS_TEXT),
    (normalize_gradients, "normalization:normalize_gradients", normalizes_back, NORMS_TEXT),
    (total_of, "normalization:sum_over_all_but_channels", sums_channels, "float32, axes 0, 2 and 3, from 8,192"),
    (total_of, "normalization:sum_over_leading", sums_rows, "float32, over the first axes, from 8,192"),
    (gather_from_maxima, "pooling:gather_from_maxima", gathers, "float32 or int64 values, float32 pictures"),
    (attention, "attention:attention", attends, "float32, a mask of booleans or of float32"),
    (attention_gradients, "attention:attention_gradients", attends_back, "float32, no gradient for the mask"),
    (cached_attention, "attention:cached_attention", attends_cached, FLOATS),
    (rotate, "rotary:rotate", turns, FLOATS),
    (embedding_weight_gradient, "embedding:embedding_weight_gradient", scatters, "float32, from 1,024 elements"),
):  # fmt: skip
    for _backend, _folder in FOLDERS.items():
        attach(_operation, _backend, f"{_folder}.{_place}", _when, _why)

for _operation, _place, _when, _why in (
    (matmul, "matmul:matmul", multiplies, "float32, one right matrix, where BLAS would use threads"),
    (linear, "matmul:linear", multiplies_linear, LINEAR_TEXT),
    (linear_relu, "matmul:linear_relu", multiplies_linear, LINEAR_TEXT),
    (linear_gradients, "matmul:linear_gradients", multiplies_back, "float32, where BLAS would use threads"),
    (relu, "elementwise:relu", from_size(SEVERAL), SEVERAL_TEXT),
    (exp, "elementwise:exp", from_size(SEVERAL), SEVERAL_TEXT),
    (tanh, "elementwise:tanh", from_size(SEVERAL), SEVERAL_TEXT),
    (erf, "elementwise:erf", from_size(SEVERAL), SEVERAL_TEXT),
    (sigmoid, "elementwise:sigmoid", from_size(SEVERAL), SEVERAL_TEXT),
    (silu, "elementwise:silu", from_size(SEVERAL), SEVERAL_TEXT),
    (drop, "elementwise:drop", from_size(SEVERAL), SEVERAL_TEXT),
    (relu_gradient, "elementwise:relu_gradient", from_size(16), FLOATS),
    (gelu_and_cdf, "elementwise:gelu_and_cdf", from_size(16), FLOATS),
    (gelu_gradient, "elementwise:gelu_gradient", from_size(16), FLOATS),
    (convolution, "convolution:convolution", convolves, PLACES_TEXT),
    (convolution_relu, "convolution:convolution_relu", convolves, PLACES_TEXT),
    (convolution_input_gradient, "convolution:convolution_input_gradient", carries_back,
     f"{PLACES_TEXT}, strides to 8, not to one channel"),
    (convolution_weight_gradient, "convolution:convolution_weight_gradient", weighs, PLACES_TEXT),
    (convolution, "winograd:convolution", convolves_in_pairs, PAIRS_TEXT),
    (convolution_relu, "winograd:convolution_relu", convolves_in_pairs, PAIRS_TEXT),
    (convolution_input_gradient, "winograd:convolution_input_gradient", convolves_in_pairs, PAIRS_TEXT),
    (convolution, "depthwise:depthwise_convolution", convolves_depthwise, DEPTHWISE_TEXT),
    (convolution_relu, "depthwise:depthwise_convolution_relu", convolves_depthwise, DEPTHWISE_TEXT),
    (convolution_input_gradient, "depthwise:depthwise_input_gradient", convolves_depthwise, DEPTHWISE_TEXT),
    (convolution_weight_gradient, "depthwise:depthwise_weight_gradient", weighs_depthwise, DEPTHWISE_TEXT),
    (max_pool, "pooling:max_pool", from_size(1), FLOATS),
    (scatter_to_maxima, "pooling:scatter_to_maxima", from_size(1), FLOATS),
    (avg_pool, "pooling:avg_pool", from_size(1), FLOATS),
    (avg_pool_gradient, "pooling:avg_pool_gradient", from_size(1), FLOATS),
):  # fmt: skip
    attach(_operation, "numpy", f"{CPU}.{_place}", _when, _why)

# On a GPU a product is cuBLAS's, and CuPy has exp, tanh, erf and relu as one launch each.
for _operation, _place, _when, _why in (
    (sigmoid, "elementwise:sigmoid", of_floats, FLOATS),
    (silu, "elementwise:silu", of_floats, FLOATS),
    (drop, "elementwise:drop", of_floats, FLOATS),
    (relu_gradient, "elementwise:relu_gradient", of_floats, FLOATS),
    (gelu_and_cdf, "elementwise:gelu_and_cdf", of_floats, FLOATS),
    (gelu_gradient, "elementwise:gelu_gradient", of_floats, FLOATS),
    (convolution, "convolution:convolution", of_floats, FLOATS),
    (convolution_relu, "convolution:convolution_relu", of_floats, FLOATS),
    (convolution_input_gradient, "convolution:convolution_input_gradient", of_floats, FLOATS),
    (convolution_weight_gradient, "convolution:convolution_weight_gradient", of_floats, FLOATS),
    (max_pool, "pooling:max_pool", of_floats, FLOATS),
    (scatter_to_maxima, "pooling:scatter_to_maxima", of_floats, FLOATS),
    (avg_pool, "pooling:avg_pool", of_floats, FLOATS),
    (avg_pool_gradient, "pooling:avg_pool_gradient", of_floats, FLOATS),
):  # fmt: skip
    attach(_operation, "cupy", f"{CUDA}.{_place}", _when, _why)

# -- optimizers --------------------------------------------------------------------------------------------------------

LAID_OUT: WeakKeyDictionary[Optimizer, dict[int, Any]] = WeakKeyDictionary()  # by optimizer and group: where arrays lie


def at_once(name: str) -> Callable:
    """For `Optimizer.together`: updates all parameters of a group that the kernel of that name can, in one launch."""

    def update(optimizer: Any, group: dict[str, Any], parameters: list[Tensor]) -> list[Tensor]:
        if not kernels_enabled() or not parameters or backend_of(parameters[0].data).name not in FOLDERS:
            return parameters
        xp, others = backend_of(parameters[0].data), []
        kernels: Any = importlib.import_module(f"{FOLDERS[xp.name]}.optimizers")
        arrays, grads, recalled = list[Any](), list[Any](), list[tuple]()
        for p in parameters:
            array, grad, state = p.data, p.grad.data, optimizer.state[p]
            if backend_of(array) is xp and kernels.fits(
                array, grad, *[x.data for x in state.values() if type(x) is Tensor]
            ):
                arrays.append(array)
                grads.append(grad)
                recalled.append(optimizer.recall(xp, array, state, group))
            else:
                others.append(p)
        if arrays:
            groups = LAID_OUT.setdefault(optimizer, {})
            if id(group) not in groups:
                groups[id(group)] = kernels.Places()
            getattr(kernels, name)(groups[id(group)], arrays, grads, *zip(*recalled, strict=True), group)
            for array in arrays:
                Writes.note(array)
        return others

    return update


Optimizer.together.update({SGD: at_once("sgd"), Adam: at_once("adam"), AdamW: at_once("adam")})


# -- what `tinytorch kernels` and `tinytorch warmup` tell --------------------------------------------------------------


def describe_kernels() -> dict[str, Any]:
    """What is attached, for which CPU it is compiled, and what has been compiled so far."""
    from tinytorch.kernels.cpu import amx, jit

    files = list(jit.cache_folder().rglob("*.nbc"))
    rows = [
        {"operation": kernel.op.name, "backend": kernel.backend, "why": kernel.why,
         "kernel": kernel.place.removeprefix("tinytorch.kernels.")}
        for kernel in KERNELS
    ]  # fmt: skip
    return {
        "kernels": rows, "state": "on" if kernels_enabled() else "off (TINYTORCH_KERNELS)", "cpu": jit.CPU,
        "lanes": jit.LANES, "amx": amx.permitted(), "cores": jit.cores(), "cache": str(jit.cache_folder()),
        "compiled": len(files), "bytes": sum(file.stat().st_size for file in files),
    }  # fmt: skip


def example(kernel: Kernel, count: int) -> tuple[tuple, dict[str, Any]]:
    """Inputs and attributes that a kernel takes: `count` pictures, or rows; norms take pictures if it is even."""
    if kernel.example is not None:
        return kernel.example(count)
    channels, side = (16, 64 if count < 64 else 8) if "winograd" in kernel.place else (4, 16)  # the least that it takes
    windows = lay_windows("warmup", (side, side), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    halves = lay_windows("warmup", (16, 16), (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1))
    groups = channels if "depthwise" in kernel.place else 1
    x, small = (randn(count, channels, n, n).data for n in (side, 8))
    rows = randn(16 * count, 32).data
    weight, scores = randn(channels, channels // groups, 3, 3).data, randn(count, 4, 16, 16).data
    ids, column = zeros(len(rows), dtype="int64").data, randn(len(rows), 1).data
    full = (zeros(count, dtype="int64") + 16).data
    width = 32 if count % 2 else 256  # products of wide matrices are AMX's, if there is one
    tall, weight_of_linear = randn(4096 // width + count, 256).data, randn(width, 256).data
    geometry, pooled = {"windows": windows, "groups": groups}, {"windows": halves}
    means = {"counted": ((0, 0), (0, 0)), "divisor": None}
    normal, dims = (rows, (1,)) if count % 2 else (x, (0, 2, 3))
    _, mean, variance = normalize.function(get_backend("cpu"), normal, dims=dims, eps=1e-5)
    attended = attention.function(get_backend("cpu"), scores, scores, scores, is_causal=True)
    examples: dict[str, tuple[tuple, dict[str, Any]]] = {
        "matmul": ((tall, randn(256, width).data), {}),
        **dict.fromkeys(("linear", "linear_relu"), ((tall, weight_of_linear), {})),
        "linear_gradients": ((randn(len(tall), width).data, tall, weight_of_linear), {"tracked": (0, 1, 2)}),
        "drop": ((rows, rows), {"p": 0.5}),
        **dict.fromkeys(("relu", "exp", "tanh", "erf", "sigmoid", "silu"), ((rows,), {})),
        "relu_gradient": ((rows, rows), {}),
        "gelu_and_cdf": ((rows,), {}),
        "gelu_gradient": ((rows, rows, rows), {"approximate": "none"}),
        "softmax": ((rows,), {"dim": 1}),
        "log_softmax": ((rows,), {"dim": 1}),
        "softmax_cross_entropy": ((rows, ids), {}),
        "softmax_minus_one_hot": ((column[:, 0], rows, ids), {}),
        "normalize": ((normal,), {"dims": dims, "eps": 1e-5}),
        "normalize_gradients": ((normal, normal, None, mean, variance), {"dims": dims, "eps": 1e-5, "shape": None}),
        "sum": ((x,), {"dim": (0, 2, 3)}) if "channels" in kernel.place else ((rows,), {"dim": (0,)}),
        "convolution": ((x, weight), geometry),
        "convolution_relu": ((x, weight), geometry),
        "convolution_input_gradient": ((x, weight), geometry),
        "convolution_weight_gradient": ((x, x), geometry),
        "max_pool": ((x,), pooled),
        "scatter_to_maxima": ((small, x, small), pooled),
        "gather_from_maxima": ((x, x, small), pooled),
        "avg_pool": ((x,), pooled | means),
        "avg_pool_gradient": ((small,), pooled | means),
        "attention": ((scores,) * 3, {"is_causal": True}),
        "attention_gradients": ((scores, scores, scores, scores, None, *attended), {"is_causal": True}),
        "cached_attention": ((scores[:, :, 0], scores, scores, full), {}),
        "rotate": ((rows, rows, rows), {}),
        "embedding_weight_gradient": ((rows, ids), {"rows": 10}),
    }
    return examples[kernel.op.name]


def warm_up(kernel: Kernel) -> dict[str, Any]:
    """Call a kernel, for one core and for all of them, so that both are compiled; how long that took."""
    start, function = time.perf_counter(), load(kernel.place)
    xp = get_backend("cuda" if kernel.backend == "cupy" else "cpu")
    for count in (1, 2, 512, 513):
        inputs, attributes = example(kernel, count)
        function(xp, *(xp.from_numpy(x) if type(x) is ARRAY else x for x in inputs), **attributes)
    xp.synchronize()
    return {"kernel": kernel.place.removeprefix("tinytorch.kernels."), "seconds": time.perf_counter() - start}


def warm_up_optimizers() -> dict[str, Any]:
    """The same for the kernels of the optimizers."""
    start = time.perf_counter()
    for make in (SGD, Adam):
        for count in (16, 1 << 19):
            p = randn(count, requires_grad=True)
            p.grad = randn(count)
            make([p]).step()
    return {"kernel": "cpu.optimizers", "seconds": time.perf_counter() - start}
