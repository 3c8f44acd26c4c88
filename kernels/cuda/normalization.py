"""Layer norm and batch norm, both ways, and sums over all axes but one, or over the first ones.

A row of layer norm belongs to a group of threads, as in softmax. A channel of batch norm is more than one block can
fetch in time, and blocks cannot wait for each other: one launch has a part of a channel in each block, and finds what
there is to know of it; the next one puts that together and goes over the parts again. So do sums of many rows. Nothing
is added up by whoever comes first: the same numbers give the same bits.

A variance is the mean square of deviations from the part's own mean, and what parts differ by is added after that:
E[x²] - E[x]² would have no digits left where the mean is 1000 times the standard deviation. A mean is kept as two
numbers for the same reason, and taken away in two steps.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda, float32, uint64

from tinytorch.kernels.cpu.layouts import arranged
from tinytorch.kernels.cuda.jit import THREADS, blocks_for, helper, kernel, row_by_row, run
from tinytorch.kernels.cuda.softmax import TAKEN, dealt

__all__ = ["normalize", "normalize_gradients", "sum_over_all_but_channels", "sum_over_leading"]

WIDE = THREADS // 8  # threads of a block that lie along a row: 32 of 256, one warp, fetch 128 bytes side by side
FEWEST = 8  # numbers that a thread should have, before there are more blocks
MOST_CHUNKS = 256  # of rows that are summed up apart
MOST_BLOCKS = 4096  # for all parts of all channels


@helper
def seat():
    """A thread's place in its block, along and down, and the block's size. Unsigned, for softmax's reasons."""
    return uint64(cuda.threadIdx.x), uint64(cuda.threadIdx.y), uint64(cuda.blockDim.x), uint64(cuda.blockDim.y)


@helper
def add_up(sums, place, member, members):
    """Add up what threads have put into each row of sums (kinds, THREADS), where `members` of them, one after the
    other, belong together. Then place - member has the total of those around `place`."""
    cuda.syncthreads()
    left = uint64(members)
    while left > 1:  # an eighth of them take seven others' numbers to theirs
        step = max(left // uint64(TAKEN), uint64(1))
        if member < step:
            for kind in range(sums.shape[0]):
                total, other = sums[kind, place], step
                while other < left:
                    total += sums[kind, place + other]
                    other += step
                sums[kind, place] = total
        cuda.syncthreads()
        left = step


@helper
def not_negative(variance):
    """0 where rounding left less of a variance; nan stays nan."""
    return float32(0) if variance < 0 else variance


# -- layer norm: x (rows, columns), weight and bias (columns,) or None -------------------------------------------------
# A block's last threads may have no row. They take none of the turns, but wait where the others do.


@kernel
def normalize_rows(x, weight, bias, eps, out, mean, variance):
    """out = weight (x - mean) / sqrt(variance + eps) + bias, for each row."""
    sums = cuda.shared.array((1, THREADS), float32)
    squares = cuda.shared.array((2, THREADS), float32)
    lane, y, lanes, tall = seat()
    first, row = y * lanes, uint64(cuda.blockIdx.x) * tall + y
    here, columns = first + lane, uint64(x.shape[1]) if row < uint64(x.shape[0]) else uint64(0)
    count = float32(x.shape[1])

    total = float32(0)
    j = lane
    while j < columns:
        total += x[row, j]
        j += lanes
    sums[0, here] = total
    add_up(sums, here, lane, lanes)
    about = sums[0, first] / count

    total, square = float32(0), float32(0)
    j = lane
    while j < columns:
        deviation = x[row, j] - about
        total += deviation
        square += deviation * deviation
        j += lanes
    squares[0, here], squares[1, here] = total, square
    add_up(squares, here, lane, lanes)
    rest = squares[0, first] / count  # what the mean lost when it became a float32
    square = not_negative(squares[1, first] / count - rest * rest)
    if lane == 0 and columns > 0:
        mean[row], variance[row] = about + rest, square

    scale = float32(1) / math.sqrt(square + eps)
    j = lane
    while j < columns:
        value = (x[row, j] - about - rest) * scale
        if weight is not None:
            value *= weight[j]
        if bias is not None:
            value += bias[j]
        out[row, j] = value
        j += lanes


@kernel
def rows_backward(g, x, weight, mean, variance, eps, out, rests, scales):
    """out = the gradient carried to x, for each row; rests = what its mean lost, scales = 1 / sqrt(variance + eps)."""
    sums = cuda.shared.array((3, THREADS), float32)
    lane, y, lanes, tall = seat()
    first, row = y * lanes, uint64(cuda.blockIdx.x) * tall + y
    here, columns = first + lane, uint64(x.shape[1]) if row < uint64(x.shape[0]) else uint64(0)
    count, guess, scale = float32(x.shape[1]), float32(0), float32(0)
    if columns > 0:
        guess, scale = mean[row], float32(1) / math.sqrt(variance[row] + eps)

    slopes, products, rest = float32(0), float32(0), float32(0)
    j = lane
    while j < columns:
        deviation, slope = x[row, j] - guess, g[row, j]
        if weight is not None:
            slope *= weight[j]
        slopes += slope
        products += slope * deviation
        rest += deviation
        j += lanes
    sums[0, here], sums[1, here], sums[2, here] = slopes, products, rest
    add_up(sums, here, lane, lanes)
    average, rest = sums[0, first] / count, sums[2, first] / count
    turn = (sums[1, first] / count - rest * average) * scale * scale
    if lane == 0 and columns > 0:
        rests[row], scales[row] = rest, scale

    j = lane
    while j < columns:
        slope = g[row, j]
        if weight is not None:
            slope *= weight[j]
        out[row, j] = (slope - average - (x[row, j] - guess - rest) * turn) * scale
        j += lanes


@kernel
def add_slopes(g, x, mean, rests, scales, out):
    """out (chunks, 2, columns) = Σ g x̂ and Σ g over each chunk's rows. A block has WIDE columns of a chunk at most."""
    sums = cuda.shared.array((2, THREADS), float32)
    lane, y, lanes, tall = seat()
    column, columns = uint64(cuda.blockIdx.x) * lanes + lane, uint64(x.shape[1])
    chunk, here = cuda.blockIdx.y, lane * tall + y
    row, end = uint64(x.shape[0] * chunk // out.shape[0]) + y, uint64(x.shape[0] * (chunk + 1) // out.shape[0])
    products, slopes = float32(0), float32(0)
    if column < columns:
        while row < end:
            slope = g[row, column]
            products += slope * ((x[row, column] - mean[row] - rests[row]) * scales[row])
            slopes += slope
            row += tall
    sums[0, here], sums[1, here] = products, slopes
    add_up(sums, here, y, tall)
    if y == 0 and column < columns:
        out[chunk, 0, column], out[chunk, 1, column] = sums[0, here], sums[1, here]


@kernel
def add_rows(x, out):
    """out (chunks, columns) = the sum of each chunk's rows. A block has WIDE columns of a chunk at most."""
    sums = cuda.shared.array((1, THREADS), float32)
    lane, y, lanes, tall = seat()
    column, columns = uint64(cuda.blockIdx.x) * lanes + lane, uint64(x.shape[1])
    chunk, here = cuda.blockIdx.y, lane * tall + y
    row, end = uint64(x.shape[0] * chunk // out.shape[0]) + y, uint64(x.shape[0] * (chunk + 1) // out.shape[0])
    total = float32(0)
    if column < columns:
        while row < end:
            total += x[row, column]
            row += tall
    sums[0, here] = total
    add_up(sums, here, y, tall)
    if y == 0 and column < columns:
        out[chunk, column] = sums[0, here]


# -- batch norm: x (pictures, channels, inner), weight and bias (channels,) or None ------------------------------------
# A channel's numbers are dealt out to blocks: some pictures to each, or one picture's planes cut further. Block (c, p)
# has part p of channel c. A thread's x goes along a plane, its y from picture to picture.


@helper
def ends_of(x, part, parts, cuts):
    """The pictures and the places of their planes, from and to, that a part has."""
    pictures, inner, pieces = uint64(x.shape[0]), uint64(x.shape[2]), uint64(cuts)
    groups, group, piece = uint64(parts) // pieces, uint64(part) // pieces, uint64(part) % pieces
    begin, end = pictures * group // groups, pictures * (group + uint64(1)) // groups
    return begin, end, inner * piece // pieces, inner * (piece + uint64(1)) // pieces


@helper
def count_of(x, part, parts, cuts):
    """How many numbers a part has."""
    begin, end, left, right = ends_of(x, part, parts, cuts)
    return float32((end - begin) * (right - left))


@kernel
def survey_planes(x, cuts, found):
    """found (3, channels, parts): each part's mean as two numbers, and the sum of its squared deviations."""
    sums = cuda.shared.array((1, THREADS), float32)
    squares = cuda.shared.array((2, THREADS), float32)
    lane, y, lanes, tall = seat()
    here, channel, part, parts = y * lanes + lane, cuda.blockIdx.x, cuda.blockIdx.y, uint64(cuda.gridDim.y)
    begin, end, left, right = ends_of(x, part, parts, cuts)
    count = count_of(x, part, parts, cuts)

    total = float32(0)
    n = begin + y
    while n < end:
        i = left + lane
        while i < right:
            total += x[n, channel, i]
            i += lanes
        n += tall
    sums[0, here] = total
    add_up(sums, here, here, THREADS)
    about = sums[0, 0] / count

    total, square = float32(0), float32(0)
    n = begin + y
    while n < end:
        i = left + lane
        while i < right:
            deviation = x[n, channel, i] - about
            total += deviation
            square += deviation * deviation
            i += lanes
        n += tall
    squares[0, here], squares[1, here] = total, square
    add_up(squares, here, here, THREADS)
    if here == 0:
        rest = squares[0, 0] / count
        found[0, channel, part], found[1, channel, part] = about, rest
        found[2, channel, part] = not_negative(squares[1, 0] - rest * squares[0, 0])


@kernel
def normalize_planes(x, weight, bias, eps, cuts, found, out, mean, variance):
    """out = weight (x - mean) / sqrt(variance + eps) + bias. Each block puts what was found of its channel together."""
    sums = cuda.shared.array((1, THREADS), float32)
    squares = cuda.shared.array((1, THREADS), float32)
    lane, y, lanes, tall = seat()
    here, channel, part, parts = y * lanes + lane, cuda.blockIdx.x, cuda.blockIdx.y, uint64(cuda.gridDim.y)

    about, numbers = found[0, channel, 0], float32(x.shape[0] * x.shape[2])
    count, shift, square = float32(0), float32(0), float32(0)
    if here < parts:  # a thread for each part; there are never more parts
        count = count_of(x, here, parts, cuts)
        shift = (found[0, channel, here] - about) + found[1, channel, here]  # from the first part's mean to this one's
        square = found[2, channel, here]
    sums[0, here] = count * shift
    add_up(sums, here, here, THREADS)
    rest = sums[0, 0] / numbers
    squares[0, here] = square + count * (shift - rest) * (shift - rest)
    add_up(squares, here, here, THREADS)
    square = squares[0, 0] / numbers
    if part == 0 and here == 0:
        mean[channel], variance[channel] = about + rest, square

    scale, offset = float32(1) / math.sqrt(square + eps), float32(0)
    if weight is not None:
        scale *= weight[channel]
    if bias is not None:
        offset = bias[channel]
    begin, end, left, right = ends_of(x, part, parts, cuts)
    n = begin + y
    while n < end:
        i = left + lane
        while i < right:
            out[n, channel, i] = (x[n, channel, i] - about - rest) * scale + offset
            i += lanes
        n += tall


@kernel
def survey_slopes(g, x, mean, cuts, found):
    """found (3, channels, parts): each part's Σ g, Σ g (x - mean) and Σ (x - mean)."""
    sums = cuda.shared.array((3, THREADS), float32)
    lane, y, lanes, tall = seat()
    here, channel, part, parts = y * lanes + lane, cuda.blockIdx.x, cuda.blockIdx.y, uint64(cuda.gridDim.y)
    begin, end, left, right = ends_of(x, part, parts, cuts)
    guess = mean[channel]
    slopes, products, rest = float32(0), float32(0), float32(0)
    n = begin + y
    while n < end:
        i = left + lane
        while i < right:
            slope, deviation = g[n, channel, i], x[n, channel, i] - guess
            slopes += slope
            products += slope * deviation
            rest += deviation
            i += lanes
        n += tall
    sums[0, here], sums[1, here], sums[2, here] = slopes, products, rest
    add_up(sums, here, here, THREADS)
    if here < 3:
        found[here, channel, part] = sums[here, 0]


@kernel
def planes_backward(g, x, weight, mean, variance, eps, cuts, found, out, results):
    """out = the gradient carried to x; results[0] = Σ g x̂, results[1] = Σ g, for each channel."""
    sums = cuda.shared.array((3, THREADS), float32)
    lane, y, lanes, tall = seat()
    here, channel, part, parts = y * lanes + lane, cuda.blockIdx.x, cuda.blockIdx.y, uint64(cuda.gridDim.y)
    for kind in range(3):
        sums[kind, here] = found[kind, channel, here] if here < parts else float32(0)
    add_up(sums, here, here, THREADS)

    numbers, guess = float32(x.shape[0] * x.shape[2]), mean[channel]
    scale, rest = float32(1) / math.sqrt(variance[channel] + eps), sums[2, 0] / numbers  # what the mean lost
    along, average = (sums[1, 0] - rest * sums[0, 0]) * scale, sums[0, 0] / numbers
    if part == 0 and here == 0:
        results[0, channel], results[1, channel] = along, sums[0, 0]
    turn = along * scale / numbers
    if weight is not None:
        scale *= weight[channel]
    begin, end, left, right = ends_of(x, part, parts, cuts)
    n = begin + y
    while n < end:
        i = left + lane
        while i < right:
            slope, deviation = g[n, channel, i] - average, x[n, channel, i] - guess - rest
            out[n, channel, i] = (slope - deviation * turn) * scale
            i += lanes
        n += tall


@kernel
def add_planes(x, cuts, out):
    """out (parts, channels) = each part's sum."""
    sums = cuda.shared.array((1, THREADS), float32)
    lane, y, lanes, tall = seat()
    here, channel, part, parts = y * lanes + lane, cuda.blockIdx.x, cuda.blockIdx.y, uint64(cuda.gridDim.y)
    begin, end, left, right = ends_of(x, part, parts, cuts)
    total = float32(0)
    n = begin + y
    while n < end:
        i = left + lane
        while i < right:
            total += x[n, channel, i]
            i += lanes
        n += tall
    sums[0, here] = total
    add_up(sums, here, here, THREADS)
    if here == 0:
        out[part, channel] = sums[0, 0]


# -- entry points ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def cut_up(pictures: int, channels: int, inner: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    """How channels are dealt out: the grid (channels, parts), a block's shape, and in how many pieces planes are cut.

    By the sizes alone, so that every device adds up in the same order.
    """
    parts = max(1, min(THREADS, MOST_BLOCKS // channels, pictures * inner // (FEWEST * THREADS)))
    groups = min(pictures, parts)
    cuts = parts // groups
    tall = min(1 << (pictures // groups).bit_length() - 1, THREADS // WIDE)  # pictures at once, while rows stay wide
    lanes = min(1 << (inner - 1).bit_length(), THREADS // tall)
    return (channels, groups * cuts), (lanes, THREADS // lanes), cuts


def in_chunks(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """How rows are dealt out that are to be added up: the grid (tiles of columns, chunks of rows), a block's shape.

    What one launch leaves of many rows, the next one adds up in one chunk.
    """
    across = min(1 << (max(columns, 1) - 1).bit_length(), WIDE)
    tall = THREADS // across
    chunks = min(MOST_CHUNKS, rows // (2 * FEWEST * tall)) if rows > MOST_CHUNKS else 1
    return (blocks_for(columns, across), max(chunks, 1)), (across, tall)


def flat(array: Any) -> Any:
    return None if array is None else row_by_row(array).reshape(-1)


def sum_of_rows(xp: Any, x: Any) -> Any:
    """(rows, columns) -> (columns,), in two launches at most."""
    grid, threads = in_chunks(*x.shape)
    out = xp.empty((grid[1], x.shape[1]), dtype="float32")
    run(add_rows, grid, threads, x, out)
    return out.reshape(-1) if grid[1] == 1 else sum_of_rows(xp, out)


def normalize(xp: Any, x: Any, weight: Any = None, bias: Any = None, *, dims: Any, eps: float) -> tuple[Any, Any, Any]:
    """weight (x - mean) / sqrt(variance + eps) + bias, the mean, the variance; over axes that `layout` knows."""
    rows, shape, statistics = arranged(x.shape, tuple(dims), None if weight is None else weight.shape)
    out = xp.empty(x.shape, dtype="float32")
    if not x.size:
        return out, *(xp.full(statistics, math.nan, dtype="float32") for _ in range(2))
    mean, variance = (xp.empty(statistics, dtype="float32") for _ in range(2))
    x, single = row_by_row(x).reshape(shape), np.float32(eps)
    results = out.reshape(shape), mean.reshape(-1), variance.reshape(-1)
    if rows:
        run(normalize_rows, *dealt(*shape), x, flat(weight), flat(bias), single, *results)
    else:
        grid, threads, cuts = cut_up(*shape)
        found = xp.empty((3, *grid), dtype="float32")
        run(survey_planes, grid, threads, x, cuts, found)
        run(normalize_planes, grid, threads, x, flat(weight), flat(bias), single, cuts, found, *results)
    return out, mean, variance


def normalize_gradients(
    xp: Any, g: Any, x: Any, weight: Any, mean: Any, variance: Any, *, dims: Any, eps: float, shape: tuple | None
) -> tuple[Any, ...]:
    """The gradients of `normalize` carried to x and, with a shape, to weight and bias, which have that shape."""
    rows, seen, _ = arranged(x.shape, tuple(dims), None if weight is None else weight.shape)
    out, single = xp.empty(x.shape, dtype="float32"), np.float32(eps)
    g, x = row_by_row(g).reshape(seen), row_by_row(x).reshape(seen)
    weight, mean, variance = flat(weight), flat(mean), flat(variance)
    if not x.size:
        sums = xp.zeros((2, seen[1]), dtype="float32")
    elif rows:
        rests, scales = (xp.empty(seen[0], dtype="float32") for _ in range(2))
        run(rows_backward, *dealt(*seen), g, x, weight, mean, variance, single, out.reshape(seen), rests, scales)
        if shape is not None:
            grid, threads = in_chunks(*seen)
            parts = xp.empty((grid[1], 2, seen[1]), dtype="float32")
            run(add_slopes, grid, threads, g, x, mean, rests, scales, parts)
            sums = sum_of_rows(xp, parts.reshape(grid[1], -1)) if grid[1] > 1 else parts
            sums = sums.reshape(2, -1)
    else:
        sums = xp.empty((2, seen[1]), dtype="float32")
        grid, threads, cuts = cut_up(*seen)
        found = xp.empty((3, *grid), dtype="float32")
        run(survey_slopes, grid, threads, g, x, mean, cuts, found)
        run(planes_backward, grid, threads, g, x, weight, mean, variance, single, cuts, found, out.reshape(seen), sums)
    return (out,) if shape is None else (out, sums[0].reshape(shape), sums[1].reshape(shape))


def sum_over_all_but_channels(xp: Any, x: Any, *, dim: tuple, keepdim: bool = False) -> Any:
    """`sum` over the axes 0, 2 and 3 of (N, C, H, W): (C,)."""
    shape = *x.shape[:2], math.prod(x.shape[2:])
    if not x.size:
        return xp.zeros(shape[1], dtype="float32")
    grid, threads, cuts = cut_up(*shape)
    out = xp.empty(grid[::-1], dtype="float32")
    run(add_planes, grid, threads, row_by_row(x).reshape(shape), cuts, out)
    return sum_of_rows(xp, out) if grid[1] > 1 else out.reshape(-1)


def sum_over_leading(xp: Any, x: Any, *, dim: tuple, keepdim: bool = False) -> Any:
    """`sum` over the first axes, which are `dim`."""
    kept, columns = x.shape[len(dim) :], math.prod(x.shape[len(dim) :])
    if not x.size:
        out = xp.zeros(kept, dtype="float32")
    else:
        out = sum_of_rows(xp, row_by_row(x).reshape(-1, columns)).reshape(kept)
    return out.reshape((1,) * len(dim) + kept) if keepdim else out
