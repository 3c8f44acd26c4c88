"""Products of int8 matrices with int32 sums, and the scales that turn them into float32 in the same pass.

Newer CPUs have one instruction, `vpdpbusd`, for all of `sums[n] += Σ_k a[k]·w[n, k]` with four depths k and sixteen
columns n: 64 products where a float32 instruction makes 16. LLVM never finds it in a loop, so the kernel calls it. It
wants unsigned bytes on one side: a + 128 takes the place of a, and sums start at -128·Σ_k w[n, k] instead of 0. All
arithmetic is modulo 2³², so this is exact wherever the result fits into an int32: for any K below 2¹⁷. Other CPUs
multiply pairs of int16 and add them up, two depths at a time.

A weight is packed once, in panels of COLUMNS outputs. A strip of rows of `a` is copied to a scratch in the nearer cache
(there 128 is added). Strips and panels are padded, so that no loop has a special case at its end. ROWS rows of a strip
meet a panel in `tile`, which keeps ROWS × COLUMNS sums in registers. The sums go through a small block in the nearest
cache to where they are scaled and written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from tinytorch.kernels.cpu.jit import CPU, cores, features, kernel, plain, run
from tinytorch.kernels.cpu.lines import store_some
from tinytorch.kernels.cpu.vectors import (
    I32,
    LANES,
    VECTOR,
    address,
    apart,
    broadcast,
    call,
    floats,
    load,
    maximum,
    minimum,
    part_mask,
    pointer_at,
    splat,
    vector,
)

__all__ = ["Packed", "int8_linear", "int8_matmul", "pack"]

VNNI = "avx512vnni" in features()
I8, I16 = ir.IntType(8), ir.IntType(16)
ROWS = 6  # of a tile, times VECTORS vectors of sums, leaves just enough of the 32 registers, or 16, for the factors
VECTORS = 4 if CPU == "avx512" else 2
COLUMNS = LANES * VECTORS
DEPTHS = 4 if VNNI else 2  # how many products an instruction adds up; of `a`, they fill four bytes of a strip
SHIFT = 128 if VNNI else 0
STRIP_DTYPE = np.dtype(np.int8 if VNNI else np.int16)
MAGIC = np.float32(3 << 22)  # 1.5 · 2²³: a float32 near it has no bits behind the point
STRIP_BYTES = 96 << 10  # of the scratch: small beside a second-level cache, and malloc need not ask the system for it


@dataclass(frozen=True)
class Packed:
    """A weight (N, K) of int8 in the layout that this CPU's kernel reads; of no use elsewhere: save the weight itself.

    Attributes:
        panels: (⌈N / columns⌉, …): `columns` outputs after another, with zeros behind the last output and depth.
        sums: of each output's weights; zeros behind the last.
        starts: what the sums of products start with.
    """

    shape: tuple[int, int]
    panels: np.ndarray
    sums: np.ndarray
    starts: np.ndarray


def pack(weight: np.ndarray, columns: int = COLUMNS) -> Packed:
    """Prepare a weight of int8, (N, K) as in a linear layer, for `int8_matmul` and `int8_linear`."""
    if weight.dtype != np.int8 or weight.ndim != 2:
        raise ValueError(f"pack: expected an int8 array (N, K), got {weight.dtype} of shape {weight.shape}")
    N, K = weight.shape
    count, depth = -(-N // columns), -(-K // DEPTHS) * DEPTHS
    padded = np.zeros((count * columns, depth), np.int8)
    padded[:N, :K] = weight
    sums = padded.sum(axis=1, dtype=np.int32)
    together = padded.reshape(count, columns, depth).view(f"int{8 * DEPTHS}")  # now (panel, depths, column, DEPTHS)
    panels = np.ascontiguousarray(together.transpose(0, 2, 1)).view(np.int8).reshape(count, columns * depth)
    return Packed((N, K), panels, sums, np.int32(-SHIFT) * sums)


# -- the tile --------------------------------------------------------------------------------------------------------

SUMS, PAIRS, BYTES = ir.VectorType(I32, LANES), ir.VectorType(I16, 2 * LANES), ir.VectorType(I8, 2 * LANES)


class SumsType(types.Type):
    """Numba's type of LANES int32 in a register."""

    def __init__(self) -> None:
        super().__init__(name=f"Vector(int32, {LANES})")


sums_type = SumsType()


@register_model(SumsType)
class SumsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, SUMS)


def instructions(vectors: int) -> tuple[Any, Any]:
    """What a tile is made of that is so many vectors of columns wide: its first sums, and adding products to them."""

    @intrinsic
    def first_sums(typing, rows, starts):
        """For each of the rows the same vectors, from an address on."""
        kind = types.UniTuple(sums_type, rows.count * vectors)

        def generate(context, b, signature, arguments):
            row = [b.load(pointer_at(b, arguments[1], SUMS, 4 * LANES * v), align=4) for v in range(vectors)]
            return context.make_tuple(b, kind, row * rows.count)

        return kind(rows, starts), generate

    @intrinsic
    def add_products(typing, sums, rows, place, panel):
        """Add the products of DEPTHS depths: four bytes at each row's address + `place` with columns at `panel`."""

        def generate(context, b, signature, arguments):
            sums_, rows_, place, panel = arguments
            old, new = cgutils.unpack_tuple(b, sums_, sums.count), []
            columns = [b.load(pointer_at(b, panel, COLUMN, DEPTHS * LANES * v), align=1) for v in range(vectors)]
            for r, row in enumerate(cgutils.unpack_tuple(b, rows_, rows.count)):
                four = splat(b, b.load(pointer_at(b, b.add(row, place), I32), align=4), LANES)
                new += [dot(b, old[vectors * r + v], four, columns[v]) for v in range(vectors)]
            return context.make_tuple(b, sums, new)

        return sums(sums, rows, place, panel), generate

    return first_sums, add_products


def dot_vnni(b: Any, sums: Any, four: Any, columns: Any) -> Any:
    """LLVM: add to each sum four products of unsigned and signed bytes."""
    return call(b, "llvm.x86.avx512.vpdpbusd.512", SUMS, [sums, four, columns])


def dot_pairs(b: Any, sums: Any, two: Any, columns: Any) -> Any:
    """LLVM: add to each sum two products of int16. It sees that x86 has an instruction for this: pmaddwd."""
    factors = b.bitcast(two, PAIRS), b.sext(columns, PAIRS)
    products = b.mul(*(b.sext(x, ir.VectorType(I32, 2 * LANES)) for x in factors))
    odd_and_even = [ir.Constant(ir.VectorType(I32, LANES), list(range(k, 2 * LANES, 2))) for k in (0, 1)]
    halves = [b.shuffle_vector(products, products, places) for places in odd_and_even]
    return b.add(sums, b.add(*halves))


dot, COLUMN = (dot_vnni, SUMS) if VNNI else (dot_pairs, BYTES)
first_sums, add_products = instructions(VECTORS)


@intrinsic
def store_sums(typing, address, sums):
    """Write vector after vector from an address on."""

    def generate(context, b, signature, arguments):
        for v, part in enumerate(cgutils.unpack_tuple(b, arguments[1], sums.count)):
            b.store(part, pointer_at(b, arguments[0], SUMS, 4 * LANES * v), align=4)
        return context.get_dummy_value()

    return types.void(address, sums), generate


@kernel
def tile(rows, panel, starts, steps, block):
    """Rows, given by their addresses, times a panel: as many rows of COLUMNS sums, in `block`."""
    sums = first_sums(rows, starts)
    for step in range(steps):
        sums = add_products(sums, rows, 4 * step, panel + DEPTHS * COLUMNS * step)
    store_sums(block, sums)


@kernel
def products(count, row, width, panel, starts, steps, block):
    """Do as much for `count` rows, `width` bytes apart: with the smallest of four tiles that has so many."""
    second, third, fourth = row + width, row + 2 * width, row + 3 * width
    if count > 4:
        tile((row, second, third, fourth, row + 4 * width, row + 5 * width), panel, starts, steps, block)
    elif count > 2:
        tile((row, second, third, fourth), panel, starts, steps, block)
    elif count > 1:
        tile((row, second), panel, starts, steps, block)
    else:
        tile((row,), panel, starts, steps, block)


# -- strips and panels -------------------------------------------------------------------------------------------------


@kernel
def copy_rows(a, first, strip):
    """Rows of `a` from `first` on, shifted, into the strip. What it has more of, anything, meets zeros of the panel."""
    for r in range(min(len(strip), len(a) - first)):
        for k in range(a.shape[1]):
            strip[r, k] = np.int8(a[first + r, k] ^ np.int8(-SHIFT))  # in eight bits, + 128 flips the uppermost


@kernel
def write_sums(rows, columns, block, where, step):
    """Copy the block's sums to `where`, rows `step` bytes apart; bits are bits, so floats() does for int32."""
    for r in range(rows):
        sums, out = floats(address(block) + 4 * COLUMNS * r, columns), floats(where + step * r, columns)
        for c in range(columns):
            out[c] = sums[c]


@intrinsic
def corrected(typing, sums, weights, zero):
    """LANES sums at an address, less `zero` times the sums of weights at another, as float32."""

    def generate(context, b, signature, arguments):
        found, subtracted = (b.load(pointer_at(b, place, SUMS), align=4) for place in arguments[:2])
        total = b.sub(found, b.mul(subtracted, splat(b, b.trunc(arguments[2], I32), LANES)))
        return b.sitofp(total, VECTOR)

    return vector(types.int64, types.int64, types.int64), generate


@intrinsic
def store_bytes(typing, address, value, count):
    """Write the first `count` lanes, of whole numbers from -128 to 127, as bytes."""

    def generate(context, b, signature, arguments):
        place, value, count = arguments
        numbers = b.trunc(b.fptosi(value, SUMS), ir.VectorType(I8, LANES))
        pointer = b.inttoptr(place, numbers.type.as_pointer())
        mask = part_mask(b, count)
        call(b, f"llvm.masked.store.v{LANES}i8.p0", ir.VoidType(), [numbers, pointer, ir.Constant(I32, 1), mask])
        return context.get_dummy_value()

    return types.void(types.int64, vector, types.int64), generate


@kernel(forceinline=True)
def rounded(value, inverse, low, high, zero):
    """round(value · inverse) + zero, clamped: `low` and `high` are -128 and 127 less the zero point. nan becomes `low`.

    What lies between them is rounded, to even in the middle, by adding a number that leaves no bits behind the point.
    """
    value = minimum(maximum(low, value * inverse), high)
    return ((value + broadcast(MAGIC)) - broadcast(MAGIC)) + zero


@kernel(forceinline=True)
def write_row(block, columns, where, weights, zero, factor, scales, addends, least, rounding):
    """Write factor · scales · (sums - zero · weights) + addends, or `least` if that is more, of a row of a block.

    As float32, or as bytes if there is a `rounding`: 1 / scale and zero point. All but `factor`, `least` and `rounding`
    are addresses and whole numbers. Whole vectors are read, `columns` numbers written.
    """
    if len(rounding):
        inverse, zero_point = broadcast(rounding[0]), broadcast(rounding[1])
        low, high = broadcast(np.float32(-128) - rounding[1]), broadcast(np.float32(127) - rounding[1])
        for c in range(0, columns, LANES):
            value = corrected(block + 4 * c, weights + 4 * c, zero) * (broadcast(factor) * load(scales + 4 * c))
            value = maximum(value + load(addends + 4 * c), broadcast(least))
            store_bytes(where + c, rounded(value, inverse, low, high, zero_point), columns - c)
    else:
        for c in range(0, columns, LANES):
            value = corrected(block + 4 * c, weights + 4 * c, zero) * (broadcast(factor) * load(scales + 4 * c))
            value = maximum(value + load(addends + 4 * c), broadcast(least))
            store_some(where + 4 * c, value, columns - c)


@kernel
def write_scaled(rows, columns, block, where, step, zeros, weights, a_scales, scales, addends, least, rounding):
    """Write a block's rows, each with its own scale and zero point. Arrays are given by their addresses, but `zeros`
    and `a_scales`, of the rows."""
    apart()
    for r in range(rows):
        write_row(block + 4 * COLUMNS * r, columns, where + step * r, weights, np.int64(zeros[r]), a_scales[r],
                  scales, addends, least, rounding)  # fmt: skip


@kernel
def spread(x, first, out):
    """out = x[first : first + len(out)], with zeros behind the last; one number in x stands for all."""
    for i in range(len(out)):
        place = first + i if len(x) != 1 else 0
        out[i] = x[place] if place < len(x) else 0


@kernel
def matmul_part(
    part, parts, a, panels, sums, starts, a_zero, scaled, a_scale, w_scale, bias, least, rounding, N, out
):  # fmt: skip
    """One of the parts of all pairs of a strip and a panel. The bytes of `out` hold (M, N) int32 or, if scaled,
    float32 in their place; or int8, if there is a `rounding`."""
    M, count, depth = len(out), len(panels), panels.shape[1] // COLUMNS
    itemsize = 1 if len(rounding) else 4
    steps, width = depth // DEPTHS, depth // DEPTHS * 4
    height = ROWS * max(min(STRIP_BYTES // (ROWS * max(width, 1)), (M + ROWS - 1) // ROWS), 1)
    pairs = (M + height - 1) // height * count
    strip, block = np.empty((height, depth), STRIP_DTYPE), np.empty((ROWS, COLUMNS), np.int32)
    scales, addends = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32)
    zeros, a_scales = np.empty(height, np.int32), np.empty(height, np.float32)
    copied = -1
    for pair in range(pairs * part // parts, pairs * (part + 1) // parts):
        row, panel = pair // count * height, pair % count
        column = panel * COLUMNS
        if row != copied:
            copy_rows(a, row, strip)
            spread(a_zero, row, zeros)
            spread(a_scale, row, a_scales)
            copied = row
        spread(w_scale, column, scales)
        spread(bias, column, addends)
        columns, last = min(COLUMNS, N - column), min(height, M - row)
        for r in range(0, last, ROWS):
            rows, where, step = min(ROWS, last - r), address(out) + itemsize * ((row + r) * N + column), itemsize * N
            products(
                rows, address(strip) + r * width, width, address(panels) + panel * panels.shape[1],
                address(starts) + 4 * column, steps, address(block),
            )  # fmt: skip
            if scaled:
                write_scaled(rows, columns, address(block), where, step, zeros[r:], address(sums) + 4 * column,
                             a_scales[r:], address(scales), address(addends), least, rounding)  # fmt: skip
            else:
                write_sums(rows, columns, block, where, step)


@kernel
def matmul_serial(parts, *arguments):
    for part in range(parts):
        matmul_part(part, parts, *arguments)


@kernel(parallel=True)
def matmul_parallel(
    parts, a, panels, sums, starts, a_zero, scaled, a_scale, w_scale, bias, least, rounding, N, out
):  # fmt: skip
    for part in prange(parts):
        matmul_part(
            part, parts, a, panels, sums, starts, a_zero, scaled, a_scale, w_scale, bias, least, rounding, N, out
        )


# -- entry points ------------------------------------------------------------------------------------------------------


def int8_matmul(xp: Any, a: np.ndarray, packed: Packed) -> np.ndarray:
    """a @ weight.T, exactly: int8 (M, K) with a packed (N, K) gives int32 (M, N).

    The same in NumPy: `a.astype("int32") @ weight.T.astype("int32")`.
    """
    return multiply("int8_matmul", a, packed, ZERO, False, ONE, ONE, NONE, MINUS_INFINITY, NONE).view(np.int32)


def int8_linear(
    xp: Any, x: np.ndarray, x_scale: np.ndarray, x_zero_point: np.ndarray, weight: np.ndarray,
    weight_scale: np.ndarray, bias: np.ndarray | None = None, out_scale: np.ndarray | None = None,
    out_zero_point: np.ndarray | None = None, *, relu: bool = False, packed: Packed | None = None,
) -> np.ndarray:  # fmt: skip
    """The operation of module 17. Without `packed`, the weight is packed at each call."""
    packed = packed or pack(weight)
    N, rows = packed.shape[0], x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    scales = (
        row_of("x_scale", x_scale, len(rows), np.float32),
        row_of("weight_scale", weight_scale, N, np.float32),
    )
    zero = row_of("x_zero_point", x_zero_point, len(rows), np.int32)
    addend = NONE if bias is None else row_of("bias", bias, N, np.float32)
    rounding = rounding_of(out_scale, out_zero_point)
    least = np.float32(0) if relu else MINUS_INFINITY
    out = multiply("int8_linear", rows, packed, zero, True, *scales, addend, least, rounding)
    return (out if len(rounding) else out.view(np.float32)).reshape(*x.shape[:-1], N)


ZERO, ONE, NONE = np.zeros(1, np.int32), np.ones(1, np.float32), np.zeros(0, np.float32)
MINUS_INFINITY = np.float32(-np.inf)


def rounding_of(scale: np.ndarray | None, zero_point: np.ndarray | None) -> np.ndarray:
    """What a result is quantized by: 1 / scale and the zero point; nothing if it stays float32."""
    if scale is None:
        return NONE
    return np.array([np.float32(1) / np.float32(scale), zero_point], np.float32)


def row_of(name: str, values: Any, count: int, dtype: Any) -> np.ndarray:
    """One number, or one for each, as a plain array."""
    row = np.asarray(values, dtype).reshape(-1)
    if row.size not in (1, count):
        raise ValueError(f"int8_linear: {name} has shape {np.shape(values)}, expected one number or ({count},)")
    return plain(row)


def multiply(name: str, a: np.ndarray, packed: Packed, *scaling: Any) -> np.ndarray:
    (N, K), M = packed.shape, len(a)
    if a.dtype != np.int8 or a.ndim != 2 or a.shape[1] != K:
        raise ValueError(f"{name}: expected int8 (M, {K}) for a weight {packed.shape}, got {a.dtype} {a.shape}")
    rounding = scaling[-1]
    out = np.empty((M, N * (1 if len(rounding) else 4)), np.int8)
    # A second core is worth its waking from 50 µs of one core on: 25 million products, or 5 MB of weights.
    work = max(M * N * K // (768 if VNNI else 128), N * K // 128)
    run(
        matmul_serial, matmul_parallel, work, cores(), plain(a), packed.panels, packed.sums, packed.starts,
        *scaling, N, out,
    )  # fmt: skip
    return out
