"""Products of matrices, with a bias: BLAS's work, done by the threads that do all else.

NumPy's BLAS has threads of its own. A training step that goes from product to kernel and back wakes one set of threads
while the other still holds the cores, which costs more than either's work. So large products run here; what keeps the
arithmetic busy is in `tiles.py`, and what remains is to hand it data in the order that it reads.

GROUP strips of STRIP columns of the right matrix are copied once, DEPTH rows at a time, to a scratch in which a tile
reads one vector after another; a right matrix that lies by columns, as the transposed weight of a linear layer does, is
turned on the way. A left matrix is read where it is, because a tile needs single numbers of it; only one that lies by
columns is copied, too, for its numbers would come from a new page of memory each.

Where the CPU has a unit for matrices, large products are its work: `amx.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from tinytorch.kernels.cpu import amx
from tinytorch.kernels.cpu.elementwise import rectify
from tinytorch.kernels.cpu.jit import cores, kernel, plain, run
from tinytorch.kernels.cpu.lines import copy_block, load_some
from tinytorch.kernels.cpu.normalization import WIDE, add_rows
from tinytorch.kernels.cpu.tiles import (
    FEW_ROWS,
    ROWS,
    VECTOR_BYTES,
    line_from,
    load_tile,
    products_in_steps,
    rows_from,
    store_tile,
    turn,
)
from tinytorch.kernels.cpu.vectors import LANES, address, address_of, apart, blank, fma, store, total

__all__ = ["linear", "linear_gradients", "linear_relu", "matmul"]

STRIP = 2 * LANES  # columns of a tile
GROUP = 4  # strips that are copied at once
DEPTH = 512  # products that are added up in registers; 256 KB of a group, a part of a second-level cache
BLOCK = 256  # rows of results that a job has, for which a strip is copied once
LEAST_BLOCK = 128  # rows that pay for a copy of a strip for each core
NARROW_ROWS = min(2 * ROWS, LANES)  # of a tile of one vector


@kernel(forceinline=True)
def pitch_of(depth):
    """Bytes from one column of copied vectors to the next; at a power of two all would share a few lines of a cache."""
    return (depth + 1) * VECTOR_BYTES


@kernel
def pack_columns(strip, b, depth_step, column_step, depth, columns):
    """Copy `depth` rows of some columns so that a vector follows its upper neighbour; next columns are a pitch on."""
    apart()
    if column_step == 4:
        for k in range(depth):
            for first in range(0, columns, LANES):
                target = strip + first // LANES * pitch_of(depth) + k * VECTOR_BYTES
                store(target, load_some(b + k * depth_step + 4 * first, columns - first))
    else:
        for first in range(0, columns, LANES):
            target, source = strip + first // LANES * pitch_of(depth), b + first * column_step
            turn(target, source, depth, column_step // 4, min(columns - first, LANES))


@kernel
def product_tile(start_rows, starts, left_rows, columns, left_step, depth, rows, places):
    """A tile of results: what lies at `starts` from the first rows on, and the sum over the depths."""
    apart()
    tile = load_tile(start_rows, starts)
    tile = products_in_steps(tile, left_rows, columns, left_step, VECTOR_BYTES, depth)
    store_tile(tile, rows, places)


@kernel
def product_rows(start, start_step, a, row_step, panel_step, left_step, strip, depth, target, target_step, rows, wide):
    """Some rows of results of one strip; addresses, and steps from row to row, in bytes.

    Args:
        row_step: between rows of the left matrix within a panel of LANES rows.
        panel_step: from panel to panel.
        left_step: from depth to depth.
        wide: whether the strip has a second vector.
    """
    second = strip + pitch_of(depth)
    taken = ROWS if wide else NARROW_ROWS
    for row in range(0, rows, taken):
        last = min(taken, rows - row) - 1
        start_row, target_row = start + row * start_step, target + row * target_step
        left_row = a + row // LANES * panel_step + row % LANES * row_step
        if not wide:
            product_tile(
                rows_from(start_row, start_step, last, NARROW_ROWS), (0,),
                rows_from(left_row, row_step, last, NARROW_ROWS), (strip,), left_step, depth,
                rows_from(target_row, target_step, last, NARROW_ROWS), (0,),
            )  # fmt: skip
        elif last < FEW_ROWS:
            product_tile(
                rows_from(start_row, start_step, last, FEW_ROWS), (0, VECTOR_BYTES),
                rows_from(left_row, row_step, last, FEW_ROWS), (strip, second), left_step, depth,
                rows_from(target_row, target_step, last, FEW_ROWS), (0, VECTOR_BYTES),
            )  # fmt: skip
        else:
            product_tile(
                rows_from(start_row, start_step, last, ROWS), (0, VECTOR_BYTES),
                rows_from(left_row, row_step, last, ROWS), (strip, second), left_step, depth,
                rows_from(target_row, target_step, last, ROWS), (0, VECTOR_BYTES),
            )  # fmt: skip


@kernel
def multiply(part, parts, jobs, a, row_step, left_step, b, depth_step, column_step, bias, out, depth, block, by_blocks):
    """One core's share of a product. A job is a block of rows of a strip.

    Args:
        a, b: addresses; the steps from element to element are in bytes.
        bias: (columns,), or of no length.
        by_blocks: whether jobs go from strip to strip through a block, or from block to block through a strip.
    """
    first, last = jobs * part // parts, jobs * (part + 1) // parts
    rows, columns = out.shape
    blocks, strips = -(-rows // block), -(-columns // STRIP)
    by_columns = row_step == 4 and left_step != 4  # then a is copied, too
    most = max(1, min(depth, DEPTH))
    strip = np.empty(GROUP * 2 * (most + 1) * LANES + LANES, np.float32)
    panels = np.empty(-(-block // LANES) * LANES * (most + 1) + LANES if by_columns else 0, np.float32)
    narrow = np.empty((block, STRIP), np.float32)
    start, line = np.zeros(STRIP, np.float32), 4 * columns
    for begin in range(0, max(depth, 1), most):
        deep = min(most, depth - begin)
        packed_block, packed, packed_end = -1, 0, 0
        for job in range(first, last):
            this, top = (job % strips, job // strips) if by_blocks else (job // blocks, job % blocks)
            if not packed <= this < packed_end:  # some strips at once, because next columns lie side by side
                needed = this + last - job if by_blocks else (last - 1) // blocks + 1
                packed, packed_end = this, min(this + GROUP, needed, strips)
                source = b + this * STRIP * column_step + begin * depth_step
                width = min((packed_end - this) * STRIP, columns - this * STRIP)
                pack_columns(line_from(strip), source, depth_step, column_step, deep, width)
            column, top, right = this * STRIP, top * block, line_from(strip) + (this - packed) * 2 * pitch_of(deep)
            some, high = min(STRIP, columns - column), min(block, rows - top)
            for i in range(some if len(bias) > 0 else 0):
                start[i] = bias[column + i]
            left, steps = a + top * row_step + begin * left_step, (row_step, LANES * row_step, left_step)
            if by_columns:
                if packed_block != top:
                    packed_block = top
                    pack_columns(line_from(panels), left, left_step, np.int64(4), deep, high)
                left, steps = line_from(panels), (4, pitch_of(deep), VECTOR_BYTES)
            target, step, whole = address(out) + top * line + 4 * column, line, some % LANES == 0
            if not whole:
                if begin:
                    copy_block(address(narrow), 4 * STRIP, target, line, high, some)
                target, step = address(narrow), 4 * STRIP
            before, before_step = (target, step) if begin else (address(start), 0)
            product_rows(
                before, before_step, left, steps[0], steps[1], steps[2], right, deep, target, step, high,
                some > LANES,
            )  # fmt: skip
            if not whole:
                copy_block(address(out) + top * line + 4 * column, line, target, step, high, some)


@kernel
def multiply_serially(parts, *product):
    multiply(0, 1, *product)


@kernel(parallel=True)
def multiply_on_cores(parts, *product):
    for part in prange(parts):
        multiply(np.int64(part), parts, *product)


# -- few rows ----------------------------------------------------------------------------------------------------------
# One row, as one token of a text that is being written, uses each weight once: the limit is memory, and nothing is
# copied.

TOGETHER = 4  # outputs that are added up side by side


@kernel
def dot_rows(first, last, x, weight, bias, out):
    """out (M, N) = x (M, K) times the transposed weight (N, K), and a bias (N,) or (0,); `first` to `last` of the
    groups of TOGETHER outputs."""
    depth, outputs = weight.shape[1], len(weight)
    for group in range(first, last):
        column = group * TOGETHER
        end = min(TOGETHER, outputs - column) - 1  # the last is repeated
        w0 = address(weight) + 4 * column * depth
        w1, w2, w3 = w0 + 4 * depth * min(1, end), w0 + 4 * depth * min(2, end), w0 + 4 * depth * min(3, end)
        for row in range(len(x)):
            values = address(x) + 4 * row * depth
            a = b = c = d = blank()
            for k in range(0, depth, LANES):
                here, rest = 4 * k, depth - k
                value = load_some(values + here, rest)
                a = fma(value, load_some(w0 + here, rest), a)
                b = fma(value, load_some(w1 + here, rest), b)
                c = fma(value, load_some(w2 + here, rest), c)
                d = fma(value, load_some(w3 + here, rest), d)
            for i, result in enumerate((a, b, c, d)):
                if i <= end:
                    out[row, column + i] = total(result) + (bias[column + i] if len(bias) > 0 else np.float32(0))


@kernel
def dot_rows_serially(parts, groups, *arguments):
    dot_rows(0, groups, *arguments)


@kernel(parallel=True)
def dot_rows_on_cores(parts, groups, x, weight, bias, out):
    for part in prange(parts):
        dot_rows(groups * part // parts, groups * (part + 1) // parts, x, weight, bias, out)


# -- all gradients of a linear layer -----------------------------------------------------------------------------------


@kernel
def gradients_part(part, parts, to_x, to_weight, g, sums):
    """A share of two products and of the sums of g's columns: one launch for three pieces of work, which need not wait
    for each other. A piece that is not wanted has no jobs."""
    multiply(part, parts, *to_x)
    multiply(part, parts, *to_weight)
    blocks = -(-len(sums) // WIDE)
    add_rows(g, sums, blocks * part // parts, blocks * (part + 1) // parts)


@kernel
def gradients_serially(parts, *arguments):
    gradients_part(0, 1, *arguments)


@kernel(parallel=True)
def gradients_on_cores(parts, to_x, to_weight, g, sums):
    for part in prange(parts):
        gradients_part(np.int64(part), parts, to_x, to_weight, g, sums)


# -- entry points ------------------------------------------------------------------------------------------------------

NOTHING = np.empty(0, np.float32)


def planned(a: np.ndarray, b: np.ndarray, bias: np.ndarray, out: np.ndarray) -> tuple[Any, ...]:
    """How many jobs the product of a (M, K) and b (K, N) is, and what else `multiply` needs for them.

    b must lie row by row or column by column. A tall result is dealt to the cores by rows, as the rest of a network's
    work is, so that a core mostly reads what it has written; else each gets some of the columns, and copies no others.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    if not out.size:
        return 0, 0, 4, 4, 0, 4, 4, bias, out, depth, 1, False
    parts, strips = cores(), -(-columns // STRIP)
    if tall := parts > 1 and rows >= max(columns, LEAST_BLOCK * parts):
        blocks = parts * -(-rows // (parts * BLOCK))
    else:
        blocks = max(-(-rows // BLOCK), min(-(-4 * parts // strips), -(-rows // (4 * ROWS))) if parts > 1 else 1)
    block = -(-rows // (blocks * LANES)) * LANES
    jobs, by_blocks = strips * -(-rows // block), tall or a.strides[0] == 4 != a.strides[1]
    return jobs, address_of(a), *a.strides, address_of(b), *b.strides, bias, out, depth, block, by_blocks


# From where on AMX is faster: it has to split rows and columns first, so they must have enough results in common.
LEAST_RESULTS, LEAST_DEPTH, LEAST_PRODUCTS = 60, 32, 1 << 22


def worth_splitting(rows: int, depth: int, columns: int) -> bool:
    """Whether AMX is to do it. It says if it can't, because a factor holds nan, infinity or something near it."""
    shared = rows * columns >= LEAST_RESULTS * (rows + columns)
    return shared and depth >= LEAST_DEPTH and rows * depth * columns >= LEAST_PRODUCTS and amx.permitted()


def operands(a: np.ndarray, b: np.ndarray, bias: np.ndarray, out: np.ndarray) -> tuple[Any, ...]:
    """What AMX's `multiply` needs for the product of a (M, K) and b (K, N), both by rows or by columns."""
    across = amx.dealt(cores(), *out.shape)
    return address_of(a), *a.strides, address_of(b), *b.strides, bias, out, len(b), across


def in_lines(b: np.ndarray) -> np.ndarray:
    """The matrix itself if it lies row by row or column by column; else a copy."""
    return b if 4 in b.strides and min(b.strides) >= 0 else plain(b)


def product(a: np.ndarray, b: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """a (M, K) times b (K, N), and a bias (N,) or (0,)."""
    b, out = in_lines(b), np.empty((len(a), b.shape[1]), np.float32)
    if worth_splitting(len(a), len(b), b.shape[1]):
        a, kernels = in_lines(a), (amx.multiply_serially, amx.multiply_on_cores)
        if not run(*kernels, out.size * len(b) >> 6, cores(), *operands(a, b, bias, out)):
            return out
    run(multiply_serially, multiply_on_cores, out.size * len(b) >> 5, cores(), *planned(a, b, bias, out))
    return out


def matmul(xp: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (…, K) times b (K, N)."""
    if a.ndim == 2:
        return product(a, b, NOTHING)
    return product(a.reshape(math.prod(a.shape[:-1]), a.shape[-1]), b, NOTHING).reshape(*a.shape[:-1], b.shape[1])


def linear(xp: Any, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x (…, K) times the transposed weight (N, K), and the bias (N,)."""
    flat = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    added = NOTHING if bias is None else plain(bias)
    if len(flat) >= LANES:
        out = product(flat, weight.T, added)
    else:
        out = np.empty((len(flat), len(weight)), np.float32)
        groups = -(-len(weight) // TOGETHER)
        run(dot_rows_serially, dot_rows_on_cores, (1 + len(flat)) * weight.size // 8, cores(), groups, plain(flat),
            plain(weight), added, out)  # fmt: skip
    return out if x.ndim == 2 else out.reshape(*x.shape[:-1], len(weight))


def linear_relu(xp: Any, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The same, and 0 in the place of what is below."""
    return rectify(linear(xp, x, weight, bias))


def linear_gradients(xp: Any, g: np.ndarray, x: np.ndarray, weight: np.ndarray, *, tracked: tuple) -> tuple:
    """What g (…, N) is carried to: g W to x (…, K) if 0 is tracked, gᵀ x to the weight (N, K) if 1, and Σ g if 2."""
    outputs, features = weight.shape
    count = math.prod(g.shape[:-1])
    rows, inputs, weight = plain(g.reshape(count, outputs)), in_lines(x.reshape(count, features)), in_lines(weight)
    shapes = (count, features), weight.shape, (outputs,)
    found = [np.empty(shapes[i] if i in tracked else (0,) * len(shapes[i]), np.float32) for i in range(3)]
    work = (found[0].size * outputs + found[1].size * count >> 5) + (rows.size // 4 if 2 in tracked else 0)
    products = (rows, weight, NOTHING, found[0]), (rows.T, inputs, NOTHING, found[1])
    if not worth_splitting(outputs, count, features) or run(
        amx.gradients_serially, amx.gradients_on_cores, work // 2, cores(), *(operands(*p) for p in products), rows,
        found[2],
    ):  # fmt: skip
        run(gradients_serially, gradients_on_cores, work, cores(), *(planned(*p) for p in products), rows, found[2])
    found[0] = found[0].reshape(x.shape) if 0 in tracked else found[0]
    return tuple(found[i] for i in tracked)
