"""Numbers made small in one pass: float32 to int8, by a known scale or by one for each row; and int4 undone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from tinytorch.kernels.cpu.jit import cores, kernel, plain, run
from tinytorch.kernels.cpu.lines import load_some, store_some
from tinytorch.kernels.cpu.quantized import rounded, store_bytes
from tinytorch.kernels.cpu.quantized_convolution import channels_last
from tinytorch.kernels.cpu.vectors import (
    I32,
    LANES,
    VECTOR,
    address,
    blank,
    broadcast,
    call,
    fma,
    largest,
    load,
    load_part,
    maximum,
    part_mask,
    splat,
    total,
    vector,
)

__all__ = ["int4_linear", "quantize", "quantize_rows"]


@kernel
def round_all(x, inverse, zero, low, high, out):
    """round(x · inverse) + zero, from low to high."""
    least, most = broadcast(np.float32(low - zero)), broadcast(np.float32(high - zero))
    factor, shift, size = broadcast(inverse), broadcast(np.float32(zero)), len(x)
    for i in range(0, size, LANES):
        value = load_some(address(x) + 4 * i, size - i)
        store_bytes(address(out) + i, rounded(value, factor, least, most, shift), size - i)


@kernel
def round_serial(parts, x, *arguments):
    round_all(x, *arguments)


@kernel(parallel=True)
def round_parallel(parts, x, inverse, zero, low, high, out):
    for part in prange(parts):
        first, last = len(x) * part // parts, len(x) * (part + 1) // parts
        round_all(x[first:last], inverse, zero, low, high, out[first:last])


def quantize(
    xp: Any, x: np.ndarray, scale: np.ndarray, zero_point: Any, *, dim: int | None = None, low: int = -128,
    high: int = 127,
) -> np.ndarray:  # fmt: skip
    """The operation of module 17, for one scale. Pictures whose channels lie side by side stay so."""
    last = x.ndim == 4 and channels_last(x)
    values = plain(x.transpose(0, 2, 3, 1) if last else x)
    out = np.empty(values.shape, np.int8)
    run(round_serial, round_parallel, x.size // 2, cores(), values.reshape(-1), np.float32(1) / np.float32(scale),
        np.int32(zero_point), np.int32(low), np.int32(high), out.reshape(-1))  # fmt: skip
    return out.transpose(0, 3, 1, 2) if last else out


@kernel
def largest_of(row):
    """The largest |x| of a row; nan if something in it is not finite."""
    peak, nothing, start, size = blank(), blank(), address(row), len(row)
    for k in range(0, size // LANES * LANES, LANES):
        x = load(start + 4 * k)
        peak, nothing = maximum(peak, maximum(x, blank() - x)), nothing + (x - x)
    rest = size % LANES
    if rest:
        x = load_part(start + 4 * (size - rest), rest)
        peak, nothing = maximum(peak, maximum(x, blank() - x)), nothing + (x - x)
    return largest(peak) + total(nothing)


@kernel
def round_rows(part, parts, x, scales, out):
    """For each row in a part the scale that takes its largest element to 127, and its elements rounded."""
    for r in range(len(x) * part // parts, len(x) * (part + 1) // parts):
        peak = largest_of(x[r])
        scales[r] = peak / np.float32(127)
        inverse = np.float32(1) / scales[r] if scales[r] > 0 else np.float32(0)
        round_all(x[r], inverse, np.int32(0), np.int32(-127), np.int32(127), out[r])


@kernel
def round_rows_serial(parts, *arguments):
    for part in range(parts):
        round_rows(part, parts, *arguments)


@kernel(parallel=True)
def round_rows_parallel(parts, x, scales, out):
    for part in prange(parts):
        round_rows(part, parts, x, scales, out)


def quantize_rows(xp: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The operation of module 17."""
    rows = plain(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    scales, out = np.empty(len(rows), np.float32), np.empty(rows.shape, np.int8)
    run(round_rows_serial, round_rows_parallel, x.size // 2, cores(), rows, scales, out)
    return out.reshape(x.shape), scales.reshape(x.shape[:-1])


# -- int4 --------------------------------------------------------------------------------------------------------------


@intrinsic
def half_bytes(typing, address, count, upper):
    """`count` bytes from an address on, LANES at the most: their lower halves, or upper ones, less 8, as float32."""

    def generate(context, b, signature, arguments):
        place, count, upper = arguments
        kind, wide = ir.VectorType(ir.IntType(8), LANES), ir.VectorType(I32, LANES)
        name, nothing = f"llvm.masked.load.v{LANES}i8.p0", ir.Constant(kind, [0] * LANES)
        pointer = b.inttoptr(place, kind.as_pointer())
        found = b.zext(call(b, name, kind, [pointer, ir.Constant(I32, 1), part_mask(b, count), nothing]), wide)
        shift, eight = b.shl(b.trunc(upper, I32), ir.Constant(I32, 2)), ir.Constant(wide, [8] * LANES)
        half = b.and_(b.lshr(found, splat(b, shift)), ir.Constant(wide, [15] * LANES))
        return b.sitofp(b.sub(half, eight), VECTOR)

    return vector(types.int64, types.int64, types.int64), generate


@kernel
def unpack_row(packed, scales, group, out):
    """A row of two weights a byte, from address `packed` on, as float32 to address `out`.

    The bytes of a group hold its first half in their lower halves, and its second half in their upper ones.
    """
    half = group // 2
    for g in range(len(scales)):
        for upper in range(2):
            for k in range(0, half, LANES):
                values = half_bytes(packed + g * half + k, half - k, upper) * broadcast(scales[g])
                store_some(out + 4 * (g * group + upper * half + k), values, half - k)


@kernel
def inner_product(a, b, size):
    """The inner product of two rows of float32 at addresses; four sums, so that none waits for another."""
    first, second, third, fourth = blank(), blank(), blank(), blank()
    step, whole = 4 * LANES, size // (4 * LANES) * (4 * LANES)
    for k in range(0, 4 * whole, 4 * step):
        first = fma(load(a + k), load(b + k), first)
        second = fma(load(a + k + step), load(b + k + step), second)
        third = fma(load(a + k + 2 * step), load(b + k + 2 * step), third)
        fourth = fma(load(a + k + 3 * step), load(b + k + 3 * step), fourth)
    for k in range(whole, size, LANES):
        first = fma(load_some(a + 4 * k, size - k), load_some(b + 4 * k, size - k), first)
    return total((first + second) + (third + fourth))


@kernel
def int4_part(part, parts, x, weight, scales, bias, out):
    """x times the transposed weight, plus bias, for a part of the outputs: a row of weights is unpacked, and used with
    all rows of x."""
    depth, outputs = x.shape[1], len(weight)
    unpacked = np.empty(depth, np.float32)
    for n in range(outputs * part // parts, outputs * (part + 1) // parts):
        unpack_row(address(weight) + n * depth // 2, scales[n], depth // scales.shape[1], address(unpacked))
        for m in range(len(x)):
            product = inner_product(address(x) + 4 * m * depth, address(unpacked), depth)
            out[m, n] = product + (bias[n] if len(bias) else np.float32(0))


@kernel
def int4_serial(parts, *arguments):
    for part in range(parts):
        int4_part(part, parts, *arguments)


@kernel(parallel=True)
def int4_parallel(parts, x, weight, scales, bias, out):
    for part in prange(parts):
        int4_part(part, parts, x, weight, scales, bias, out)


def int4_linear(
    xp: Any, x: np.ndarray, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray | None = None
) -> np.ndarray:
    """The operation of module 17, for few rows."""
    rows = plain(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out = np.empty((len(rows), len(weight)), np.float32)
    addends = np.zeros(0, np.float32) if bias is None else plain(bias)
    work = 2 * weight.size * (4 + len(rows)) // LANES
    run(int4_serial, int4_parallel, work, cores(), rows, plain(weight), plain(scale), addends, out)
    return out.reshape(*x.shape[:-1], len(weight))
