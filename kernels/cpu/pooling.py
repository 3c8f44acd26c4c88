"""Max and average pooling, forward and backward: twins of module 09's operations.

Pooling does little arithmetic, so what counts is that each pixel is fetched from memory once. A window's rows are
combined first, whole vectors at a time, into one line that stays in the cache; the line's columns then give a row of
the result. 2×2 windows that lie side by side, the usual ones, need not even the line: two vectors of a row are parted
into their even and odd pixels in registers. Backward finds the places of the maxima again by comparing.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import prange
from numba.extending import intrinsic

from tinytorch.kernels.cpu.jit import cores, kernel, plain, run
from tinytorch.kernels.cpu.lines import (
    axis_margins,
    deal,
    even,
    high,
    line_length,
    load_some,
    low,
    meetings,
    odd,
    places,
    spread,
    store_some,
)
from tinytorch.kernels.cpu.vectors import LANES, address, blank, broadcast, load, store, vector, where_equal

__all__ = ["avg_pool", "avg_pool_gradient", "gather_from_maxima", "max_pool", "scatter_to_maxima"]


@intrinsic
def larger(typing, a, b):
    """The larger in every lane; nan where one of them is."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        either = builder.select(builder.fcmp_ordered(">", a, b), a, b)  # b, if one of them is nan
        return builder.select(builder.fcmp_unordered("uno", a, a), a, either)

    return vector(vector, vector), generate


@kernel(inline="always")
def side_by_side(pictures, results, size, stride, before, dilation):
    """Whether windows of 2×2 lie side by side and cover pictures whole; by the arrays' shapes."""
    whole = pictures[1] == 2 * results[1] and pictures[2] == 2 * results[2]
    return size == (2, 2) and stride == (2, 2) and before == (0, 0) and dilation == (1, 1) and whole


@kernel
def combine(largest, a, b):
    """What is left of two: the larger, or the sum."""
    return larger(a, b) if largest else a + b


# -- forward -----------------------------------------------------------------------------------------------------------


@kernel
def halve(x, out, height, width, largest, scale):
    """A picture of even sides, from address `x` on, in windows of 2×2 side by side, to address `out`."""
    for i in range(height // 2):
        upper, lower = x + 8 * i * width, x + 4 * (2 * i + 1) * width
        for j in range(0, width // 2, LANES):
            rest, at = width - 2 * j, 8 * j
            a = combine(largest, load_some(upper + at, rest), load_some(lower + at, rest))
            at += 4 * LANES
            rest -= LANES
            b = combine(largest, load_some(upper + at, rest), load_some(lower + at, rest))
            total = combine(largest, even(a, b), odd(a, b)) * broadcast(scale)
            store_some(out + 4 * (i * (width // 2) + j), total, width // 2 - j)


@kernel
def pool_pictures(x, out, largest, heights, widths, size, stride, before, dilation, pitch, first, last, parts):
    """Pool pictures `first` to `last` of x (N, H, W) into out (N, OH, OW).

    Args:
        largest: whether to take the largest elements; the sums, if not.
        heights, widths: what out's rows and columns are multiplied by.
        before: the border above and the one on the left.
        pitch: the length of the lines that a picture's row is dealt out to.
        parts: among how many calls the parallel twin deals the pictures out.
    """
    height, width = x.shape[1:]
    rows, columns = out.shape[1:]
    nothing = np.float32(-np.inf) if largest else np.float32(0)
    lines = np.full((rows, stride[1] * pitch), nothing)  # borders stay so
    line, shifts = np.empty(width, np.float32), places(size[1], stride[1], dilation[1], pitch)
    for n in range(first, last):
        picture = address(x) + 4 * n * height * width
        result = address(out) + 4 * n * rows * columns
        if side_by_side(x.shape, out.shape, size, stride, before, dilation):
            halve(picture, result, height, width, largest, heights[0] * widths[0])
            continue
        for i in range(rows):
            top = i * stride[0] - before[0]  # the row in the picture of the window's first
            start = max(0, -(top // dilation[0]))  # the window's first row that is in the picture
            stop = min(size[0], (height - 1 - top) // dilation[0] + 1)
            for c in range(0, width, LANES):
                total = broadcast(nothing)
                for u in range(start, stop):
                    pixels = picture + 4 * ((top + u * dilation[0]) * width + c)
                    total = combine(largest, total, load_some(pixels, width - c))
                store_some(address(line) + 4 * c, total, width - c)
            deal(address(line), width, stride[1], before[1], address(lines) + 4 * i * stride[1] * pitch, pitch)
        for i in range(rows):
            here = address(lines) + 4 * i * stride[1] * pitch
            for j in range(0, columns, LANES):
                total = broadcast(nothing)
                for v in range(size[1]):
                    total = combine(largest, total, load(here + 4 * (shifts[v] + j)))
                total = total * broadcast(heights[i]) * load_some(address(widths) + 4 * j, columns - j)
                store_some(result + 4 * (i * columns + j), total, columns - j)


@kernel(parallel=True)
def pool_pictures_parallel(x, out, largest, heights, widths, size, stride, before, dilation, pitch, first, last, parts):
    for part in prange(parts):
        start, stop = first + part * (last - first) // parts, first + (part + 1) * (last - first) // parts
        pool_pictures(x, out, largest, heights, widths, size, stride, before, dilation, pitch, start, stop, 1)


def pool(x: np.ndarray, windows: Any, largest: bool, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(…, H, W) pooled to (…, OH, OW). See `pool_pictures`."""
    out = np.empty((*x.shape[:-2], *windows.count), np.float32)
    pictures = math.prod(x.shape[:-2])
    x = plain(x).reshape(pictures, *windows.shape)
    before = (windows.padding[0][0], windows.padding[1][0])
    run(
        pool_pictures, pool_pictures_parallel, x.size // 4 + math.prod(windows.size) * out.size // 8,
        x, out.reshape(pictures, *windows.count), largest, heights, widths, windows.size, windows.stride, before,
        windows.dilation, line_length(windows), 0, pictures, cores(),
    )  # fmt: skip
    return out


def max_pool(xp: Any, x: np.ndarray, *, windows: Any) -> np.ndarray:
    """The largest element of each window of (…, H, W): (…, OH, OW)."""
    return pool(x, windows, True, *shares(windows, (), 1))


@lru_cache(256)
def shares(windows: Any, counted: tuple, divisor: int | None) -> list[np.ndarray]:
    """What rows and columns of sums are multiplied by to be means: one over their elements in the picture and its
    `counted` borders; or over the divisor, all in all."""
    if divisor:
        return [np.full(n, value, np.float32) for n, value in zip(windows.count, (1 / divisor, 1), strict=True)]
    result = []
    for axis in (0, 1):
        n, k, s = windows.shape[axis], windows.size[axis], windows.stride[axis]
        (before, _), (first, last) = windows.padding[axis], counted[axis]
        starts = np.arange(windows.count[axis]) * s - before
        lengths = np.minimum(starts + k, n + last) - np.maximum(starts, -first)
        result.append((1 / lengths).astype(np.float32))
    return result


def avg_pool(xp: Any, x: np.ndarray, *, windows: Any, counted: tuple, divisor: int | None) -> np.ndarray:
    """The mean of each window of (…, H, W): (…, OH, OW)."""
    return pool(x, windows, False, *shares(windows, counted, divisor))


# -- backward ----------------------------------------------------------------------------------------------------------


@kernel
def unhalve_maxima(g, x, largest, out, height, width):
    """As `scatter_pictures`, for one picture of even sides in windows of 2×2 side by side; addresses."""
    zeros = blank()
    for i in range(height // 2):
        upper, lower = 8 * i * width, 4 * (2 * i + 1) * width
        for j in range(0, width // 2, LANES):
            left, at = width - 2 * j, 8 * j
            right, behind = left - LANES, at + 4 * LANES
            here = 4 * (i * (width // 2) + j)
            amount, most = load_some(g + here, width // 2 - j), load_some(largest + here, width // 2 - j)
            for row in (upper, lower):
                a, b = load_some(x + row + at, left), load_some(x + row + behind, right)
                evens, odds = even(a, b), odd(a, b)
                first = where_equal(evens, most, amount, zeros)
                amount = where_equal(evens, most, zeros, amount)
                second = where_equal(odds, most, amount, zeros)
                amount = where_equal(odds, most, zeros, amount)
                store_some(out + row + at, low(first, second), left)
                if right > 0:
                    store_some(out + row + behind, high(first, second), right)


@kernel(inline="always")
def place_of(value, picture, top, left, size, dilation):
    """Row and column of a window's first element that equals the value; -1 if none does."""
    height, width = picture.shape
    for u in range(size[0]):
        r = top + u * dilation[0]
        if 0 <= r < height:
            for v in range(size[1]):
                c = left + v * dilation[1]
                if 0 <= c < width and picture[r, c] == value:
                    return r, c
    return -1, -1


@kernel
def scatter_pictures(
    g, x, largest, out, size, stride, before, dilation, padded, pitch, front, behind, first, last, parts
):
    """Carry g (N, OH, OW) to where x (N, H, W) has its windows' `largest` first, for pictures `first` to `last`.

    Each column v of windows has a plane of its own to add to, row by row of the padded picture, so that what is read
    and written again always lies at the same places; `spread` then adds a row's planes up.

    Args:
        padded: how many rows the padded picture has.
        pitch: the length of the lines that x's rows are dealt out to.
        front, behind: the margins of the lines in the planes.
    """
    height, width = x.shape[1:]
    rows, columns = g.shape[1:]
    lines = np.full((padded, stride[1] * pitch), np.float32(np.nan))  # the border equals nothing
    planes = np.zeros((padded, size[1], front + behind), np.float32)
    line, plane = 4 * (front + behind), 4 * size[1] * (front + behind)  # bytes
    zeros, shifts = blank(), places(size[1], stride[1], dilation[1], pitch)
    for n in range(first, last):
        picture, result = address(x) + 4 * n * height * width, address(out) + 4 * n * height * width
        if side_by_side(x.shape, g.shape, size, stride, before, dilation):
            here = 4 * n * rows * columns
            unhalve_maxima(address(g) + here, picture, address(largest) + here, result, height, width)
            continue
        if stride[1] > 2 or columns < 4:  # vectors would be mostly empty
            out[n] = 0
            for i in range(rows):
                for j in range(columns):
                    top, left = i * stride[0] - before[0], j * stride[1] - before[1]
                    r, c = place_of(largest[n, i, j], x[n], top, left, size, dilation)
                    if r >= 0:
                        out[n, r, c] += g[n, i, j]
            continue
        for r in range(height):
            here = address(lines) + 4 * (before[0] + r) * stride[1] * pitch
            deal(picture + 4 * r * width, width, stride[1], before[1], here, pitch)
        planes[:] = 0
        for i in range(rows):
            for j in range(0, columns, LANES):
                here = 4 * ((n * rows + i) * columns + j)
                amount, most = (
                    load_some(address(g) + here, columns - j),
                    load_some(address(largest) + here, columns - j),
                )
                for u in range(size[0]):
                    row = i * stride[0] + u * dilation[0]
                    here = address(lines) + 4 * (row * stride[1] * pitch + j)
                    there = address(planes) + row * plane + 4 * (front + j)
                    for v in range(size[1]):
                        values = load(here + 4 * shifts[v])
                        store(there, load(there) + where_equal(values, most, amount, zeros))
                        amount = where_equal(values, most, zeros, amount)
                        there += line
        for r in range(height):
            there = address(planes) + (before[0] + r) * plane + 4 * front
            spread(there, line, columns, result + 4 * r * width, width, size[1], stride[1], before[1], dilation[1])


@kernel(parallel=True)
def scatter_pictures_parallel(
    g, x, largest, out, size, stride, before, dilation, padded, pitch, front, behind, first, last, parts):  # fmt: skip
    for part in prange(parts):
        start, stop = first + part * (last - first) // parts, first + (part + 1) * (last - first) // parts
        scatter_pictures(
            g, x, largest, out, size, stride, before, dilation, padded, pitch, front, behind, start, stop, 1
        )  # fmt: skip


def scatter_to_maxima(xp: Any, g: np.ndarray, x: np.ndarray, largest: np.ndarray, *, windows: Any) -> np.ndarray:
    """g (…, OH, OW), each element at the place in (…, H, W) that its window's maximum was taken from."""
    out = np.empty(x.shape, np.float32)
    pictures = math.prod(x.shape[:-2])
    g, largest = (plain(array).reshape(pictures, *windows.count) for array in (g, largest))
    x = plain(x).reshape(pictures, *windows.shape)
    (top, bottom), (left, _) = windows.padding
    run(
        scatter_pictures, scatter_pictures_parallel, x.size // 2 + math.prod(windows.size) * g.size // 4,
        g, x, largest, out.reshape(x.shape), windows.size, windows.stride, (top, left), windows.dilation,
        top + windows.shape[0] + bottom, line_length(windows), *axis_margins(windows), 0, pictures, cores(),
    )  # fmt: skip
    return out


@kernel
def unhalve_means(g, out, height, width, share):
    """As `spread_pictures`, for one picture of even sides in windows of 2×2 side by side; addresses."""
    for i in range(height // 2):
        for j in range(0, width // 2, LANES):
            amount = load_some(g + 4 * (i * (width // 2) + j), width // 2 - j) * broadcast(share)
            for row in (2 * i, 2 * i + 1):
                there, rest = out + 4 * (row * width + 2 * j), width - 2 * j
                store_some(there, low(amount, amount), rest)
                if rest > LANES:
                    store_some(there + 4 * LANES, high(amount, amount), rest - LANES)


@kernel
def spread_pictures(g, out, heights, widths, size, stride, before, dilation, front, behind, first, last, parts):
    """Carry g (N, OH, OW), times `heights` and `widths`, to all elements of the windows, (N, H, W), and add up."""
    height, width = out.shape[1:]
    rows, columns = g.shape[1:]
    line = np.zeros(front + behind, np.float32)
    counts, pairs = meetings(height, rows, size[0], stride[0], before[0], dilation[0])
    again = np.zeros(height, np.bool_)  # whether a row lies in the same windows as the row before
    for r in range(1, height):
        again[r] = counts[r] == counts[r - 1]
        for k in range(counts[r]):
            again[r] &= pairs[r, k, 0] == pairs[r - 1, k, 0]
    for n in range(first, last):
        picture, result = address(g) + 4 * n * rows * columns, address(out) + 4 * n * height * width
        if side_by_side(out.shape, g.shape, size, stride, before, dilation):
            unhalve_means(picture, result, height, width, heights[0] * widths[0])
            continue
        for r in range(height):
            there = result + 4 * r * width
            if again[r]:
                for c in range(0, width, LANES):
                    store_some(there + 4 * c, load_some(there + 4 * (c - width), width - c), width - c)
                continue
            for j in range(0, columns, LANES):
                total = blank()
                for k in range(counts[r]):
                    i = pairs[r, k, 0]
                    amount = load_some(picture + 4 * (i * columns + j), columns - j)
                    total = total + amount * broadcast(heights[i])
                total = total * load_some(address(widths) + 4 * j, columns - j)
                store_some(address(line) + 4 * (front + j), total, columns - j)
            spread(address(line) + 4 * front, 0, columns, there, width, size[1], stride[1], before[1], dilation[1])


@kernel(parallel=True)
def spread_pictures_parallel(
    g, out, heights, widths, size, stride, before, dilation, front, behind, first, last, parts):  # fmt: skip
    for part in prange(parts):
        start, stop = first + part * (last - first) // parts, first + (part + 1) * (last - first) // parts
        spread_pictures(g, out, heights, widths, size, stride, before, dilation, front, behind, start, stop, 1)


def avg_pool_gradient(xp: Any, g: np.ndarray, *, windows: Any, counted: tuple, divisor: int | None) -> np.ndarray:
    """The gradient (…, OH, OW) of a mean over windows, carried back: (…, H, W)."""
    out = np.empty((*g.shape[:-2], *windows.shape), np.float32)
    pictures = math.prod(g.shape[:-2])
    g = plain(g).reshape(pictures, *windows.count)
    before = (windows.padding[0][0], windows.padding[1][0])
    run(
        spread_pictures, spread_pictures_parallel, out.size // 4 + math.prod(windows.size) * g.size // 8,
        g, out.reshape(pictures, *windows.shape), *shares(windows, counted, divisor), windows.size, windows.stride,
        before, windows.dilation, *axis_margins(windows), 0, pictures, cores(),
    )  # fmt: skip
    return out


# -- what stands where maxima were taken from --------------------------------------------------------------------------


@kernel
def gather_pictures(values, x, largest, out, size, stride, before, dilation, first, last, parts):
    """What `values` (N or 1, H, W) have where x (N, H, W) has its windows' `largest` (N, OH, OW) first, or 0."""
    for n in range(first, last):
        picked = values[n % len(values)]
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                top, left = i * stride[0] - before[0], j * stride[1] - before[1]
                r, c = place_of(largest[n, i, j], x[n], top, left, size, dilation)
                out[n, i, j] = picked[r, c] if r >= 0 else 0


@kernel(parallel=True)
def gather_pictures_parallel(values, x, largest, out, size, stride, before, dilation, first, last, parts):
    for part in prange(parts):
        start, stop = first + part * (last - first) // parts, first + (part + 1) * (last - first) // parts
        gather_pictures(values, x, largest, out, size, stride, before, dilation, start, stop, 1)


def gather_from_maxima(xp: Any, values: np.ndarray, x: np.ndarray, largest: np.ndarray, *, windows: Any) -> np.ndarray:
    """The elements of `values` (…, H, W) that stand where the windows' maxima of x were taken from: (…, OH, OW)."""
    out = np.empty(largest.shape, values.dtype)
    pictures = math.prod(x.shape[:-2])
    if values.size and not any(values.strides[:-2]):  # one picture, seen as many: the numbers of the places
        values = values[(0,) * (values.ndim - 2)][None]
    values = plain(values).reshape(-1, *windows.shape)
    x, largest = plain(x).reshape(pictures, *windows.shape), plain(largest).reshape(pictures, *windows.count)
    before = (windows.padding[0][0], windows.padding[1][0])
    run(
        gather_pictures, gather_pictures_parallel, 4 * math.prod(windows.size) * out.size,
        values, x, largest, out.reshape(largest.shape), windows.size, windows.stride, before, windows.dilation, 0,
        pictures, cores(),
    )  # fmt: skip
    return out
