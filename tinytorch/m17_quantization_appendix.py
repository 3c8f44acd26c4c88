"""Module 17, appendix: weights of four bits, quantized networks from files, and kernels for pictures of int8.

Four bits are for weights alone: two in a byte, with a scale for each group of a row's. They become floats when they are
used; what is gained is memory, a seventh of that of float32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from tinytorch.m02_tensor import Tensor, matmul, op, randn, tensor, zeros
from tinytorch.m02_tensor_appendix import amax, cat, randint
from tinytorch.m04_layers import Linear, Module
from tinytorch.m04_layers_appendix import Identity
from tinytorch.m06_autograd import gradient, no_grad, non_differentiable
from tinytorch.m09_spatial import BatchNorm, Conv2d, Windows, lay_windows, layer_flops, max_pool
from tinytorch.m12_embeddings import Embedding, LearnedPositions
from tinytorch.m15_profiling import count, flop_formula
from tinytorch.m16_acceleration import attach
from tinytorch.m16_acceleration_appendix import CPU, single
from tinytorch.m17_quantization import (
    PACKERS,
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedPositions,
    SampleObserver,
    bytes_like,
    int8_convolution,
    link,
    packer,
    rebuild,
    whole,
)

# -- four bits ---------------------------------------------------------------------------------------------------------


@op
def unpack_int4(xp, packed, scale):
    """Bytes (out, in / 2) of two weights each as floats (out, in).

    Each row's weights have scales in groups, (out, groups). A group's bytes hold its first half in their lower halves,
    and its second half in their upper ones, so that vectors of bytes become vectors of weights. A half byte h stands
    for scale · (h - 8).
    """
    packed, rows = xp.cast(packed, "int32"), packed.shape[0]
    packed = xp.reshape(packed, (*scale.shape, -1))
    halves = xp.concat([packed & 15, packed >> 4], axis=-1) - 8
    return xp.reshape(xp.astype(halves, scale.dtype) * xp.expand_dims(scale, axis=-1), (rows, -1))


@op
def int4_linear(xp, x, weight, scale, bias=None):
    """A linear layer of floats (…, in) and a weight that `unpack_int4` reads: (…, out)."""
    if x.shape[-1] != 2 * weight.shape[1]:
        raise ValueError(f"int4_linear: input has {x.shape[-1]} features, but the weight takes {2 * weight.shape[1]}")
    out = xp.matmul(x, xp.matrix_transpose(unpack_int4.function(xp, weight, scale)))
    return out if bias is None else out + bias


non_differentiable(unpack_int4)
gradient(int4_linear, weight=None, scale=None, bias=None,
         x=lambda g, weight, scale: matmul(g, unpack_int4(weight, scale)))  # fmt: skip


class Int4Linear(Module):
    """A linear layer whose weight has four bits an element, and a scale for each group of `group` in a row.

    Attributes:
        weight: uint8 (out_features, in_features / 2). weight_scale: (out_features, in_features / group).
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Any

    def __init__(self, in_features: int, out_features: int, bias: bool = True, group: int = 32) -> None:
        super().__init__()
        if group < 2 or group % 2 or in_features % group:
            raise ValueError(f"Int4Linear: in_features must be a multiple of the group, an even number, got "
                             f"{in_features} and {group}")  # fmt: skip
        self.in_features, self.out_features, self.group = in_features, out_features, group
        self.register_buffer("weight", zeros(out_features, in_features // 2, dtype="uint8"))
        self.register_buffer("weight_scale", zeros(out_features, in_features // group))
        self.register_buffer("bias", zeros(out_features) if bias else None)

    @no_grad()
    def fill(self, layer: Any) -> Int4Linear:
        """Take a float layer's weight, rounded, and its bias."""
        groups = layer.weight.reshape(self.out_features, -1, self.group)
        self.weight_scale = (amax(groups.abs(), 2) / 7).maximum(2.0**-23)
        halves = (groups / self.weight_scale.unsqueeze(-1)).round().clamp(-8, 7).to("int32") + 8
        first, second = halves[:, :, : self.group // 2], halves[:, :, self.group // 2 :]
        self.weight = (first + second * 16).to("uint8").reshape(self.weight.shape)
        if self.bias is not None:
            self.bias = Tensor(layer.bias.data)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return int4_linear(x, self.weight, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, group={self.group}"


def quantize_int4(model: Module, group: int = 32) -> Module:
    """A copy in eval mode whose linear layers hold four bits a weight; those whose inputs do not divide into groups
    stay as they are."""

    def make(path: str, layer: Any) -> Module:
        if type(layer) is not Linear or layer.in_features % group:
            return layer
        return Int4Linear(layer.in_features, layer.out_features, layer.bias is not None, group).fill(layer)

    return rebuild(copy.deepcopy(model), make).eval()


# -- observers ---------------------------------------------------------------------------------------------------------


class PercentileObserver(SampleObserver):
    """Covers all but a share of the elements at both ends: those beyond the percentile, 99.99 unless given."""

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        self.percentile = percentile

    def covered(self) -> tuple[Tensor, Tensor]:
        super().covered()
        ranked = cat(self.parts).sort()[0]
        outside = round((1 - self.percentile / 100) * (len(ranked) - 1))
        return ranked[outside], ranked[len(ranked) - 1 - outside]


# -- files -------------------------------------------------------------------------------------------------------------


def load_quantized(model: Module, state: Mapping[str, Tensor]) -> Module:
    """The quantized network, in eval mode, whose `state_dict()` this is.

    Args:
        model: a float network of the architecture that was quantized; its values do not matter, and it stays as it is.

    Raises:
        RuntimeError: names or shapes do not fit, as of `load_state_dict`.
    """

    def make(path: str, layer: Any) -> Module:
        def held(name: str) -> Any:
            return state.get(f"{path}.{name}".lstrip("."))

        weight, bias, static = held("weight"), held("bias") is not None, held("input_scale") is not None
        if isinstance(layer, BatchNorm) and held("running_mean") is None:
            return Identity()  # it was folded
        if weight is None or weight.dtype.is_floating_point:
            return layer
        if type(layer) is Embedding:
            return QuantizedEmbedding(*layer.weight.shape)
        if type(layer) is LearnedPositions:
            return QuantizedPositions(*layer.weight.shape)
        if type(layer) is Conv2d:
            sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            return QuantizedConv2d(layer.in_channels, layer.out_channels, *sizes, bias)
        if type(layer) is Linear and weight.dtype == "uint8":
            group = layer.in_features // held("weight_scale").shape[1]
            return Int4Linear(layer.in_features, layer.out_features, bias, group)
        return QuantizedLinear(layer.in_features, layer.out_features, bias, static) if type(layer) is Linear else layer

    made = link(rebuild(copy.deepcopy(model), make)).eval()
    made.load_state_dict(state)
    return made


# -- arithmetic --------------------------------------------------------------------------------------------------------

# For module 15. A product of integers counts as one of floats, so that their rates can be compared.
for _each, _names in ((2, "unpack_int4 dequantize in_range"), (3, "quantize quantize_rows"), (4, "choose_scale"),
                      (5, "fake_quantize")):  # fmt: skip
    flop_formula(*_names.split())(lambda out, *arrays, _each=_each, **attributes: _each * count(out))
flop_formula("int8_linear", "int8_convolution")(
    lambda out, x, x_scale, x_zero_point, weight, *others, **attributes: layer_flops(out, weight)
)
flop_formula("int4_linear")(lambda out, x, weight, *others: 2 * layer_flops(out, weight))

# -- kernels -----------------------------------------------------------------------------------------------------------


def convolves_bytes(
    x: Any, x_scale: Any, x_zero_point: Any, weight: Any, weight_scale: Any, bias: Any = None, out_scale: Any = None,
    out_zero_point: Any = None, *, windows: Windows, **attributes: Any,
) -> bool:  # fmt: skip
    fit = whole(x) and whole(weight) and x.size > 0 and x.shape[1] == weight.shape[1]
    return fit and single(x_scale, weight_scale, bias, out_scale)


def pools_bytes(x: Any, *, windows: Windows) -> bool:
    """Pictures with their channels side by side, as a convolution of int8 gives them."""
    return whole(x) and x.ndim == 4 and x.transpose(0, 2, 3, 1).flags.c_contiguous


FEW_ROWS = 32  # from there on, a weight is better unpacked as a whole, and multiplied as any other


def multiplies_halves(x: Any, weight: Any, scale: Any, bias: Any = None) -> bool:
    fit = single(x, scale, bias) and weight.dtype.char == "B" and x.ndim > 0 and x.shape[-1] == 2 * weight.shape[1]
    return fit and x.size <= FEW_ROWS * x.shape[-1]


def convolution_example(count: int) -> tuple[tuple, dict[str, Any]]:
    outputs = 100 if count % 2 else 16
    x, weight = bytes_like(count, 3, 16, 16), bytes_like(outputs, 3, 3, 3)
    one, zero_point = tensor(0.5).data, tensor(3, dtype="int32").data
    windows = lay_windows("warmup", (16, 16), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    return (x, one, zero_point, weight, abs(randn(outputs)).data, None, one, zero_point), {"windows": windows}


def pool_example(count: int) -> tuple[tuple, dict[str, Any]]:
    x = randint(-128, 128, (count, 16, 16, 8)).to("int8").permute(0, 3, 1, 2).data
    return (x,), {"windows": lay_windows("warmup", (16, 16), (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1))}


def halves_example(count: int) -> tuple[tuple, dict[str, Any]]:
    rows = 1 + count % 2
    weight = randint(0, 256, (64 * count, 32)).to("uint8").data
    return (randn(rows, 64).data, weight, abs(randn(64 * count, 2)).data, randn(64 * count).data), {}


for _operation, _place, _when, _why, _example in (
    (int8_convolution, "quantized_convolution:int8_convolution", convolves_bytes, "float32 scales",
     convolution_example),
    (max_pool, "quantized_convolution:max_pool", pools_bytes, "int8, channels side by side", pool_example),
    (int4_linear, "rounding:int4_linear", multiplies_halves, "float32, up to 32 rows", halves_example),
):  # fmt: skip
    attach(_operation, "numpy", f"{CPU}.{_place}", _when, _why, _example)


PACKERS[int8_convolution] = packer("quantized_convolution:pack_filters", "numpy")
