"""Max and average pooling on the GPU, forward and backward: twins of module 09's operations.

A thread has one element of the result, so that threads side by side read pixels side by side. Backward, too: rather
than that each window adds to its pixels, where threads would get in each other's way, each pixel looks at the windows
that it lies in, always in the same order. Whether it is the one that a window's maximum was taken from is found again
by comparing, and only if it equals the maximum, the window's pixels before it are looked at.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, float32, int64, uint32

from tinytorch.kernels.cuda.jit import MOST_BLOCKS, THREADS, blocks_for, helper, kernel, row_by_row, run

__all__ = ["avg_pool", "avg_pool_gradient", "gather_from_maxima", "max_pool", "scatter_to_maxima"]

LONGEST = 64  # that a block of threads may be along its third axis


# -- forward -----------------------------------------------------------------------------------------------------------


@kernel
def pool_maxima(x, out, size, stride, before, dilation):
    """out (N, OH, OW): the largest elements of windows over x (N, H, W), and nan where one of them is."""
    j, i, first = cuda.grid(3)
    if i < out.shape[1] and j < out.shape[2]:
        top, left = i * stride[0] - before[0], j * stride[1] - before[1]
        for n in range(first, out.shape[0], cuda.gridDim.z * cuda.blockDim.z):
            largest = float32(-math.inf)
            for u in range(size[0]):  # rather than `row in range(…)` with a step, which takes divisions
                row = top + u * dilation[0]
                if 0 <= row < x.shape[1]:
                    for v in range(size[1]):
                        column = left + v * dilation[1]
                        if 0 <= column < x.shape[2]:
                            value = x[n, row, column]
                            if value > largest or math.isnan(value):
                                largest = value
            out[n, i, j] = largest


@helper
def counted_elements(i, count, size, stride, before, first, last):
    """Along one axis, how many elements window i has in pictures of `count`, and what of their borders counts."""
    start = i * stride - before
    return min(start + size, count + last) - max(start, -first)


@kernel
def pool_means(x, out, size, stride, before, first, last, divisor):
    """out (N, OH, OW): sums of windows over x (N, H, W), over the divisor; or, if it is 0, over how many elements of
    the picture and of its borders, `first` and `last` along each axis, a window has."""
    j, i, start = cuda.grid(3)
    if i < out.shape[1] and j < out.shape[2]:
        top, left = i * stride[0] - before[0], j * stride[1] - before[1]
        if divisor == float32(0):
            height = counted_elements(i, x.shape[1], size[0], stride[0], before[0], first[0], last[0])
            width = counted_elements(j, x.shape[2], size[1], stride[1], before[1], first[1], last[1])
            divisor = float32(height * width)
        for n in range(start, out.shape[0], cuda.gridDim.z * cuda.blockDim.z):
            total = float32(0)
            for row in range(max(0, top), min(x.shape[1], top + size[0])):
                for column in range(max(0, left), min(x.shape[2], left + size[1])):
                    total += x[n, row, column]
            out[n, i, j] = total / divisor


# -- backward ----------------------------------------------------------------------------------------------------------


@helper
def quotient(a, b):
    """a // b of numbers that are not negative and have 32 bits, because a division of such takes half the time."""
    return int64(uint32(a) // uint32(b))


@helper
def windows_around(position, count, span, stride, before):
    """Along one axis, the first of the windows that span a position, and the one after the last."""
    latest = position + before
    return quotient(max(0, latest - span + stride), stride), min(count, quotient(latest, stride) + 1)


@helper
def find(value, picture, top, left, size, dilation):
    """Row and column in a picture of a window's first element that equals the value; -1 if none does."""
    height, width = picture.shape
    for u in range(size[0]):
        row = top + u * dilation[0]
        if 0 <= row < height:
            for v in range(size[1]):
                column = left + v * dilation[1]
                if 0 <= column < width and picture[row, column] == value:
                    return row, column
    return -1, -1


@kernel
def scatter(g, x, largest, out, size, stride, before, dilation):
    """out (N, H, W): for each pixel of x, the sum of what g (N, OH, OW) has for the windows whose `largest` it is first
    to equal."""
    column, row, first = cuda.grid(3)
    if row < out.shape[1] and column < out.shape[2]:
        top, bottom = windows_around(row, g.shape[1], dilation[0] * (size[0] - 1) + 1, stride[0], before[0])
        left, right = windows_around(column, g.shape[2], dilation[1] * (size[1] - 1) + 1, stride[1], before[1])
        for n in range(first, out.shape[0], cuda.gridDim.z * cuda.blockDim.z):
            total, value = float32(0), x[n, row, column]
            for i in range(top, bottom):
                for j in range(left, right):
                    if largest[n, i, j] == value:
                        above, beside = i * stride[0] - before[0], j * stride[1] - before[1]
                        found = find(value, x[n], above, beside, size, dilation)
                        if found[0] == row and found[1] == column:  # never where it lies between a window's pixels
                            total += g[n, i, j]
            out[n, row, column] = total


@kernel
def gather(values, x, largest, out, size, stride, before, dilation):
    """What `values` (N or 1, H, W) have where x (N, H, W) has its windows' `largest` (N, OH, OW) first, or 0."""
    j, i, first = cuda.grid(3)
    if i < out.shape[1] and j < out.shape[2]:
        top, left = i * stride[0] - before[0], j * stride[1] - before[1]
        for n in range(first, out.shape[0], cuda.gridDim.z * cuda.blockDim.z):
            row, column = find(largest[n, i, j], x[n], top, left, size, dilation)
            out[n, i, j] = 0
            if row >= 0:
                out[n, i, j] = values[n % values.shape[0], row, column]


@kernel
def spread_means(g, out, size, stride, before, first, last, divisor):
    """out (N, H, W): for each pixel, the sum of its shares of what g (N, OH, OW) has for windows. See `pool_means`."""
    column, row, start = cuda.grid(3)
    if row < out.shape[1] and column < out.shape[2]:
        top, bottom = windows_around(row, g.shape[1], size[0], stride[0], before[0])
        left, right = windows_around(column, g.shape[2], size[1], stride[1], before[1])
        for n in range(start, out.shape[0], cuda.gridDim.z * cuda.blockDim.z):
            total = float32(0)
            for i in range(top, bottom):
                height = counted_elements(i, out.shape[1], size[0], stride[0], before[0], first[0], last[0])
                for j in range(left, right):
                    width = counted_elements(j, out.shape[2], size[1], stride[1], before[1], first[1], last[1])
                    total += g[n, i, j] / (float32(height * width) if divisor == float32(0) else divisor)
            out[n, row, column] = total


# -- launches ----------------------------------------------------------------------------------------------------------


def pictures(xp: Any, array: Any) -> Any:
    """(…, H, W) as (N, H, W)."""
    return xp.reshape(row_by_row(array), (math.prod(array.shape[:-2]), *array.shape[-2:]))


def launch(pool: Any, xp: Any, inputs: tuple, out: Any, *attributes: Any) -> Any:
    """Run a kernel on pictures, (…, H, W) each, with a thread for each element of `out`, in blocks that are about as
    wide and high as its pictures, and several of them deep where those are small."""
    *lead, height, width = out.shape
    if math.prod(out.shape):
        across = min(32, 1 << (width - 1).bit_length())
        down = min(THREADS // across, 1 << (height - 1).bit_length())
        deep = min(THREADS // (across * down), LONGEST)
        tiles = -(-math.prod(lead) // deep)
        blocks = blocks_for(width, across), blocks_for(height, down), min(tiles, MOST_BLOCKS)
        run(pool, blocks, (across, down, deep), *(pictures(xp, a) for a in inputs), pictures(xp, out), *attributes)
    return out


def geometry(windows: Any) -> tuple:
    """(size, stride, the border above and on the left) of windows, as kernels take them."""
    (above, _), (left, _) = windows.padding
    return windows.size, windows.stride, (above, left)


def max_pool(xp: Any, x: Any, *, windows: Any) -> Any:
    """The largest element of each window of (…, H, W): (…, OH, OW)."""
    out = xp.empty((*x.shape[:-2], *windows.count), dtype="float32")
    return launch(pool_maxima, xp, (x,), out, *geometry(windows), windows.dilation)


def scatter_to_maxima(xp: Any, g: Any, x: Any, largest: Any, *, windows: Any) -> Any:
    """g (…, OH, OW), each element at the place in (…, H, W) that its window's maximum was taken from."""
    out = xp.empty(x.shape, dtype="float32")
    return launch(scatter, xp, (g, x, largest), out, *geometry(windows), windows.dilation)


def gather_from_maxima(xp: Any, values: Any, x: Any, largest: Any, *, windows: Any) -> Any:
    """The elements of `values` (…, H, W) that stand where the windows' maxima of x were taken from: (…, OH, OW)."""
    out = xp.empty(largest.shape, dtype=values.dtype)
    if math.prod(values.shape) and not any(values.strides[:-2]):  # one picture, seen as many: the numbers of the places
        values = values[(0,) * (values.ndim - 2)]
    return launch(gather, xp, (values, x, largest), out, *geometry(windows), windows.dilation)


def borders(counted: tuple, divisor: int | None) -> tuple:
    """What counts of the borders before and behind pictures, and the divisor, as kernels take them."""
    (above, below), (left, right) = counted
    return (above, left), (below, right), np.float32(divisor or 0)


def avg_pool(xp: Any, x: Any, *, windows: Any, counted: tuple, divisor: int | None) -> Any:
    """The mean of each window of (…, H, W): (…, OH, OW)."""
    out = xp.empty((*x.shape[:-2], *windows.count), dtype="float32")
    return launch(pool_means, xp, (x,), out, *geometry(windows), *borders(counted, divisor))


def avg_pool_gradient(xp: Any, g: Any, *, windows: Any, counted: tuple, divisor: int | None) -> Any:
    """The gradient (…, OH, OW) of a mean over windows, carried back: (…, H, W)."""
    out = xp.empty((*g.shape[:-2], *windows.shape), dtype="float32")
    return launch(spread_means, xp, (g,), out, *geometry(windows), *borders(counted, divisor))
