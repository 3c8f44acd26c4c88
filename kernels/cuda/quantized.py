"""Products of int8 matrices with int32 sums, and the scales that turn them into float32 in the same pass.

GPUs since 2016 have an instruction, dp4a, that adds the products of four pairs of bytes to a sum. It takes the four
from one register, so both matrices are read as int32: words of four depths. A block of threads brings a tile of each to
shared memory, and each thread has EACH × EACH sums in registers, rows and columns SIDE apart, so that neighbouring
threads read neighbouring words. Where there are only a few rows, as when a network generates, most of a tile would be
empty, and to read the weight is all there is to do: 32 threads share an output's depths, and add up what they have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from numba import cuda, float32, int8, int32, int64, uint32

from tinytorch.backends import backend_of
from tinytorch.kernels.cuda.instructions import address, dot4, product
from tinytorch.kernels.cuda.jit import SIMULATED, helper, kernel, row_by_row, run

__all__ = ["Packed", "int8_linear", "int8_matmul", "pack"]

SIDE = 4 if SIMULATED else 16  # of a block of threads; the simulator takes a second for a few blocks of 256
EACH = 4  # rows, and columns, of a thread
TILE = SIDE * EACH
DEPTH = SIDE  # words of a tile's rows: those of one row are 64 bytes, which memory gives at once
PITCH = TILE + 2  # of a tile's columns in shared memory: threads that write neighbouring depths hit different banks

FEW = 4  # rows of a block where there are too few for tiles
FEWEST = 16  # rows from which on there are tiles
LANES = 4 if SIMULATED else 32  # threads that share an output
OUTPUTS = 2 if SIMULATED else 8  # of a block, of FEW rows each
MAGIC = float32(3 << 22)  # 1.5 · 2²³: a float32 near it has no bits behind the point


@dataclass(frozen=True)
class Packed:
    """A weight (N, K) of int8 as the kernels read it.

    Attributes:
        words: int32 (N, ⌈K / 4⌉), the weight itself where K can be divided by 4; with zeros behind the last depth.
        sums: int32 (N,), of each output's weights.
    """

    shape: tuple[int, int]
    words: Any
    sums: Any


def pack(weight: Any) -> Packed:
    """Prepare a weight of int8, (N, K) as in a linear layer, for `int8_matmul` and `int8_linear`."""
    if str(weight.dtype) != "int8" or weight.ndim != 2:
        raise ValueError(f"pack: expected an int8 array (N, K), got {weight.dtype} of shape {tuple(weight.shape)}")
    xp = backend_of(weight)
    return Packed(tuple(weight.shape), words_of(xp, weight), weight.sum(axis=1, dtype="int32"))


def words_of(xp: Any, a: Any) -> Any:
    """int8 (M, K) as int32 (M, ⌈K / 4⌉); the array itself, if its rows are whole words, else a copy that has zeros
    behind the last."""
    M, K = a.shape
    a = row_by_row(a)
    if K % 4 or address(a) % 4:
        wide = xp.zeros((M, -(-K // 4) * 4), dtype="int8")
        wide[:, :K] = a
        a = wide
    return a.view("int32")


# -- what becomes of a sum ---------------------------------------------------------------------------------------------


@helper
def one_of(values, i):
    """An element, or the only one for all."""
    return values[i if values.shape[0] > 1 else 0]


@helper
def rounding_of(out_scale, out_zero):
    """1 / scale and zero point of the result; of no meaning if it stays float32."""
    if out_scale is None:
        return float32(1), float32(0)
    return float32(1) / out_scale[0], float32(out_zero[0])


@helper
def write(out, m, n, total, sums, x_scale, x_zero, w_scale, bias, relu, out_scale, rounding):
    """Write a sum to out (M, N): as it is, or x_scale · w_scale · (total - x_zero · sums) + bias, as float32 or, with
    an out_scale, rounded to int8.

    x_scale, x_zero: of each row, or of all. w_scale, bias: of each column, or of all. What is left out is None.
    """
    if x_scale is None:
        out[m, n] = total
    else:
        centred = int64(total)
        if x_zero is not None:
            centred -= int64(one_of(x_zero, m)) * int64(sums[n])
        value = product(float32(centred), one_of(x_scale, m) * one_of(w_scale, n))
        if bias is not None:
            value += one_of(bias, n)
        if relu and value < 0:  # nan stays
            value = float32(0)
        if out_scale is None:
            out[m, n] = value
        else:
            out[m, n] = rounded(value, rounding[0], rounding[1])


@helper
def rounded(value, inverse, zero):
    """round(value · inverse) + zero, clamped to int8. nan becomes -128.

    What lies in the range is rounded, to even in the middle, by adding a number that leaves no bits behind the point.
    """
    low, high, steps = float32(-128) - zero, float32(127) - zero, value * inverse
    steps = steps if steps > low else low
    steps = steps if steps < high else high
    return int8((steps + MAGIC) - MAGIC + zero)


# -- the kernels -------------------------------------------------------------------------------------------------------


@helper
def fetch(matrix, first, column, words):
    """Bring a word of every SIDE-th row from `first` on: zeros behind the last column, anything behind the last row."""
    if column < matrix.shape[1]:
        for i in range(EACH):
            words[i] = matrix[min(first + SIDE * i, matrix.shape[0] - 1), column]
    else:
        for i in range(EACH):
            words[i] = 0


@helper
def add_products(totals, left, right, k, y, x):
    """Multiply the tiles' words number k: of the rows from y on with those of the columns from x on."""
    k = uint32(k)  # of a signed number, each look-up asks whether it is negative
    for i in range(EACH):
        for j in range(EACH):
            totals[i, j] = dot4(totals[i, j], left[k, y + SIDE * i], right[k, x + SIDE * j])


@kernel
def multiply_by_tiles(a, b, out, sums, x_scale, x_zero, w_scale, bias, relu, out_scale, out_zero):
    """out (M, N) from the words a (M, W) and b (N, W); a block for each TILE × TILE of it, row of tiles by row."""
    left = cuda.shared.array((DEPTH, PITCH), int32)
    right = cuda.shared.array((DEPTH, PITCH), int32)
    next_left = cuda.local.array(EACH, int32)  # local arrays are registers, as long as all loops over them are unrolled
    next_right = cuda.local.array(EACH, int32)
    totals = cuda.local.array((EACH, EACH), int32)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    across = (out.shape[1] + TILE - 1) // TILE
    m, n = cuda.blockIdx.x // across * TILE + y, cuda.blockIdx.x % across * TILE
    for i in range(EACH):
        for j in range(EACH):
            totals[i, j] = 0
    fetch(a, m, x, next_left)
    fetch(b, n + y, x, next_right)
    for start in range(DEPTH, a.shape[1] + DEPTH, DEPTH):
        for i in range(EACH):
            left[x, y + SIDE * i], right[x, y + SIDE * i] = next_left[i], next_right[i]
        cuda.syncthreads()  # the tiles are there
        fetch(a, m, start + x, next_left)  # which takes about as long as to use those
        fetch(b, n + y, start + x, next_right)
        for k in range(0, DEPTH, 4):  # four at a time, so that counting is a small part
            add_products(totals, left, right, k, y, x)
            add_products(totals, left, right, k + 1, y, x)
            add_products(totals, left, right, k + 2, y, x)
            add_products(totals, left, right, k + 3, y, x)
        cuda.syncthreads()  # nobody needs them any more
    rounding = rounding_of(out_scale, out_zero)
    for i in range(EACH):
        for j in range(EACH):
            row, column = m + SIDE * i, n + x + SIDE * j
            if row < out.shape[0] and column < out.shape[1]:
                write(
                    out, row, column, totals[i, j], sums, x_scale, x_zero, w_scale, bias, relu, out_scale, rounding
                )  # fmt: skip


@kernel
def multiply_few_rows(a, b, out, sums, x_scale, x_zero, w_scale, bias, relu, out_scale, out_zero):
    """As much for FEW rows at a time; a block for OUTPUTS columns of them."""
    shared = cuda.shared.array((OUTPUTS, FEW, LANES), int32)
    totals = cuda.local.array(FEW, int32)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    across = (out.shape[1] + OUTPUTS - 1) // OUTPUTS
    first, n = cuda.blockIdx.x // across * FEW, cuda.blockIdx.x % across * OUTPUTS + y
    for i in range(FEW):
        totals[i] = 0
    if n < b.shape[0]:
        for k in range(x, b.shape[1], LANES):
            word = b[n, k]
            for i in range(FEW):
                totals[i] = dot4(totals[i], a[min(first + i, a.shape[0] - 1), k], word)
    for i in range(FEW):
        shared[y, i, x] = totals[i]
    cuda.syncthreads()
    if x < FEW and first + x < out.shape[0] and n < out.shape[1]:
        total = int32(0)
        for k in range(LANES):  # each thread begins elsewhere: with a bank of its own
            total += shared[y, x, (k + x) % LANES]
        rounding = rounding_of(out_scale, out_zero)
        write(out, first + x, n, total, sums, x_scale, x_zero, w_scale, bias, relu, out_scale, rounding)


# -- entry points ------------------------------------------------------------------------------------------------------


def int8_matmul(xp: Any, a: Any, packed: Packed) -> Any:
    """a @ weight.T, exactly: int8 (M, K) with a packed (N, K) gives int32 (M, N), for any K below 2¹⁷."""
    return multiply(xp, "int8_matmul", a, packed, "int32", None, None, None, None, False, None, None)


def int8_linear(
    xp: Any, x: Any, x_scale: Any, x_zero_point: Any, weight: Any, weight_scale: Any, bias: Any = None,
    out_scale: Any = None, out_zero_point: Any = None, *, relu: bool = False, packed: Packed | None = None,
) -> Any:  # fmt: skip
    """The operation of module 17. Without `packed`, the weight is packed at each call."""
    packed = packed or pack(weight)
    N, rows = packed.shape[0], x if x.ndim == 2 else xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
    centred = isinstance(x_zero_point, int) and x_zero_point == 0  # as rows are that were rounded by their own scales
    scaling = (
        row_of(xp, "x_scale", x_scale, len(rows), "float32"),
        None if centred else row_of(xp, "x_zero_point", x_zero_point, len(rows), "int32"),
        row_of(xp, "weight_scale", weight_scale, N, "float32"),
        None if bias is None else row_of(xp, "bias", bias, N, "float32"),
        bool(relu),
        None if out_scale is None else row_of(xp, "out_scale", out_scale, 1, "float32"),
        None if out_scale is None else row_of(xp, "out_zero_point", out_zero_point, 1, "int32"),
    )
    out = multiply(xp, "int8_linear", rows, packed, "float32" if out_scale is None else "int8", *scaling)
    return xp.reshape(out, (*x.shape[:-1], N))


def row_of(xp: Any, name: str, values: Any, count: int, dtype: str) -> Any:
    """One number, or one for each, as an array on the device."""
    values = xp.asarray(values, dtype=xp.dtype(dtype))
    if values.size not in (1, count):
        raise ValueError(f"int8_linear: {name} has shape {tuple(values.shape)}, expected one number or ({count},)")
    return row_by_row(xp.reshape(values, (-1,)))


def multiply(xp: Any, name: str, a: Any, packed: Packed, dtype: str, *scaling: Any) -> Any:
    """The product (M, N), as `write` makes it."""
    N, K = packed.shape
    if str(a.dtype) != "int8" or a.ndim != 2 or a.shape[1] != K:
        shape = tuple(a.shape)
        raise ValueError(f"{name}: expected int8 (M, {K}) for a weight {packed.shape}, got {a.dtype} {shape}")
    M = len(a)
    out, words = xp.empty((M, N), dtype=dtype), words_of(xp, a)
    if M < FEWEST:
        blocks = -(-M // FEW) * -(-N // OUTPUTS)
        run(multiply_few_rows, blocks, (LANES, OUTPUTS), words, packed.words, out, packed.sums, *scaling)
    else:
        blocks = -(-M // TILE) * -(-N // TILE)
        run(multiply_by_tiles, blocks, (SIDE, SIDE), words, packed.words, out, packed.sums, *scaling)
    return out
