"""Layer norm and batch norm, both ways, and sums over all axes but one, or over the first ones.

Arithmetic is nothing here and memory is all. A row of layer norm stays in the first-level cache between the pass that
finds its mean and the pass that uses it; so do, to a lesser degree, the planes of one channel of batch norm. Backward,
one pass serves the sums that the input's gradient needs and those that are the weight's and the bias's gradients.

Deviations are taken from a first guess of the mean, and the rest is taken away afterwards: where the mean is 1000 times
the standard deviation, a float32 has no room for the mean's last digits, but it has for the deviation's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from tinytorch.kernels.cpu.jit import kernel, plain, run
from tinytorch.kernels.cpu.layouts import arranged
from tinytorch.kernels.cpu.lines import load_some, store_some
from tinytorch.kernels.cpu.vectors import LANES, address, blank, broadcast, fma, keep, load, store, total

BLOCK = 8192  # elements that are worth to be dealt out to a core; but for a core's own sums
MOST_BLOCKS = 64


@kernel(forceinline=True)
def not_negative(variance):
    """0 where rounding left less of a variance; nan stays nan."""
    return variance * 0 if variance < 0 else variance


@kernel(forceinline=True)
def sum_of(values, count):
    """The sum of `count` float32 from an address on."""
    a = b = blank()
    for i in range(0, count, 2 * LANES):
        a = a + load_some(values + 4 * i, count - i)
        b = b + load_some(values + 4 * (i + LANES), count - i - LANES)
    return total(a + b)


@kernel(forceinline=True)
def deviations(values, guess, rest):
    """x - guess for a vector of which `rest` lanes, or all, are there; 0 in the others."""
    result = load_some(values, rest) - guess
    return result if rest >= LANES else keep(result, rest)


# -- layer norm: x (rows, columns), weight and bias (columns,) ---------------------------------------------------------


@kernel
def normalize_rows(x, weight, bias, eps, out, mean, variance, start, stop):
    """out = weight (x - mean) / sqrt(variance + eps) + bias, for the rows from start to stop."""
    columns = x.shape[1]
    count = np.float32(columns)
    for row in range(start, stop):
        values, result = address(x) + 4 * row * columns, address(out) + 4 * row * columns
        about = sum_of(values, columns) / count
        guess = broadcast(about)
        sums = squares = blank()
        for i in range(0, columns, LANES):
            deviation = deviations(values + 4 * i, guess, columns - i)
            sums = sums + deviation
            squares = fma(deviation, deviation, squares)
        rest = total(sums) / count
        square = not_negative(total(squares) / count - rest * rest)
        mean[row], variance[row] = about + rest, square
        scale, left = broadcast(np.float32(1 / math.sqrt(square + eps))), broadcast(rest)
        for i in range(0, columns, LANES):
            deviation = load_some(values + 4 * i, columns - i) - guess - left
            slope = load_some(address(weight) + 4 * i, columns - i) * scale
            shifted = fma(deviation, slope, load_some(address(bias) + 4 * i, columns - i))
            store_some(result + 4 * i, shifted, columns - i)


@kernel(parallel=True)
def normalize_rows_parallel(x, weight, bias, eps, out, mean, variance, start, stop):
    size = max(1, BLOCK // x.shape[1])
    for block in prange((stop - start + size - 1) // size):
        first = start + block * size
        normalize_rows(x, weight, bias, eps, out, mean, variance, first, min(first + size, stop))


@kernel
def rows_backward(g, x, weight, mean, variance, eps, out, sums, start, stop):
    """out = the gradient carried to x; sums (blocks, 2, columns) = Σ g x̂ and Σ g over each block's rows.

    For the blocks from start to stop. Sums of sums are more precise, and each core has memory of its own.
    """
    columns, blocks = x.shape[1], len(sums)
    count = np.float32(columns)
    for block in range(start, stop):
        sums[block] = 0
        to_weight = address(sums) + 8 * block * columns
        to_bias = to_weight + 4 * columns
        for row in range(len(x) * block // blocks, len(x) * (block + 1) // blocks):
            skip = 4 * row * columns
            slopes, values, result = address(g) + skip, address(x) + skip, address(out) + skip
            guess, r = broadcast(mean[row]), np.float32(1 / math.sqrt(variance[row] + eps))
            inners = products = rests = blank()
            for i in range(0, columns, LANES):
                inner = load_some(slopes + 4 * i, columns - i) * load_some(address(weight) + 4 * i, columns - i)
                deviation = deviations(values + 4 * i, guess, columns - i)
                inners = inners + inner
                products = fma(inner, deviation, products)
                rests = rests + deviation
            rest = total(rests) / count  # what the mean lost when it became a float32
            average = total(inners) / count
            along = broadcast((total(products) / count - rest * average) * (r * r))
            left, scale, average = broadcast(rest), broadcast(r), broadcast(average)
            for i in range(0, columns, LANES):
                there = columns - i
                slope, deviation = load_some(slopes + 4 * i, there), load_some(values + 4 * i, there) - guess - left
                inner = slope * load_some(address(weight) + 4 * i, there) - average
                store_some(result + 4 * i, scale * (inner - deviation * along), there)
                products = fma(slope, deviation * scale, load_some(to_weight + 4 * i, there))
                store_some(to_weight + 4 * i, products, there)
                store_some(to_bias + 4 * i, load_some(to_bias + 4 * i, there) + slope, there)


@kernel(parallel=True)
def rows_backward_parallel(g, x, weight, mean, variance, eps, out, sums, start, stop):
    for block in prange(start, stop):
        rows_backward(g, x, weight, mean, variance, eps, out, sums, block, block + 1)


# -- batch norm: x (pictures, channels, inner), weight and bias (channels,) --------------------------------------------


@kernel
def normalize_planes(x, weight, bias, eps, out, mean, variance, start, stop):
    """out = weight (x - mean) / sqrt(variance + eps) + bias, for the channels from start to stop.

    The sums over a plane are float32, those of all planes float64.
    """
    pictures, channels, inner = x.shape
    count = pictures * inner
    for channel in range(start, stop):
        about = sum_of(address(x) + 4 * channel * inner, inner) / np.float32(inner)
        guess = broadcast(about)
        rest, square = 0.0, 0.0
        for picture in range(pictures):
            values = address(x) + 4 * (picture * channels + channel) * inner
            sums = squares = blank()
            for i in range(0, inner, LANES):
                deviation = deviations(values + 4 * i, guess, inner - i)
                sums = sums + deviation
                squares = fma(deviation, deviation, squares)
            rest += total(sums)
            square += total(squares)
        rest /= count
        square = not_negative(square / count - rest * rest)
        mean[channel], variance[channel] = about + rest, square
        scale = weight[channel] / math.sqrt(square + eps)
        slope, shift = broadcast(np.float32(scale)), broadcast(np.float32(bias[channel] - rest * scale))
        for picture in range(pictures):
            skip = 4 * (picture * channels + channel) * inner
            for i in range(0, inner, LANES):
                value = load_some(address(x) + skip + 4 * i, inner - i)
                store_some(address(out) + skip + 4 * i, fma(value - guess, slope, shift), inner - i)


@kernel(parallel=True)
def normalize_planes_parallel(x, weight, bias, eps, out, mean, variance, start, stop):
    for channel in prange(start, stop):
        normalize_planes(x, weight, bias, eps, out, mean, variance, channel, channel + 1)


@kernel
def planes_backward(g, x, weight, mean, variance, eps, out, sums, start, stop):
    """out = the gradient carried to x; sums[0] = Σ g x̂, sums[1] = Σ g; for the channels from start to stop."""
    pictures, channels, inner = x.shape
    count = pictures * inner
    for channel in range(start, stop):
        guess, r = broadcast(mean[channel]), 1 / math.sqrt(variance[channel] + eps)
        average, along, rest = 0.0, 0.0, 0.0
        for picture in range(pictures):
            skip = 4 * (picture * channels + channel) * inner
            slopes = products = rests = blank()
            for i in range(0, inner, LANES):
                slope = load_some(address(g) + skip + 4 * i, inner - i)
                deviation = deviations(address(x) + skip + 4 * i, guess, inner - i)
                slopes = slopes + slope
                products = fma(slope, deviation, products)
                rests = rests + deviation
            average += total(slopes)
            along += total(products)
            rest += total(rests)
        rest /= count  # what the mean lost when it became a float32
        along -= rest * average
        sums[0, channel], sums[1, channel] = along * r, average
        scale, turn = broadcast(np.float32(weight[channel] * r)), broadcast(np.float32(along * r * r / count))
        middle, left = broadcast(np.float32(average / count)), broadcast(np.float32(rest))
        for picture in range(pictures):
            skip = 4 * (picture * channels + channel) * inner
            for i in range(0, inner, LANES):
                slope = load_some(address(g) + skip + 4 * i, inner - i) - middle
                deviation = load_some(address(x) + skip + 4 * i, inner - i) - guess - left
                store_some(address(out) + skip + 4 * i, (slope - deviation * turn) * scale, inner - i)


@kernel(parallel=True)
def planes_backward_parallel(g, x, weight, mean, variance, eps, out, sums, start, stop):
    for channel in prange(start, stop):
        planes_backward(g, x, weight, mean, variance, eps, out, sums, channel, channel + 1)


@kernel
def add_planes(x, out, start, stop):
    """out = the sum of each channel's planes, for the channels from start to stop."""
    pictures, channels, inner = x.shape
    for channel in range(start, stop):
        result = 0.0
        for picture in range(pictures):
            result += sum_of(address(x) + 4 * (picture * channels + channel) * inner, inner)
        out[channel] = result


@kernel(parallel=True)
def add_planes_parallel(x, out, start, stop):
    for channel in prange(start, stop):
        add_planes(x, out, channel, channel + 1)


# -- sums over the leading axes: x (rows, columns) ---------------------------------------------------------------------

WIDE = 128  # columns that are added up at once: half a kilobyte of a row
RUN = 64  # rows that are, before their sum is added to the others': sums of sums are more precise


@kernel
def add_rows(x, out, start, stop):
    """out = the sum of the rows, for the blocks of WIDE columns from start to stop."""
    rows, columns = x.shape
    sums = np.empty(WIDE, np.float32)
    for block in range(start, stop):
        first, count = block * WIDE, min(WIDE, columns - block * WIDE)
        place = address(out) + 4 * first
        for i in range(0, count, LANES):
            store_some(place + 4 * i, blank(), count - i)
        for begin in range(0, rows, RUN):
            sums[:] = 0
            end = min(begin + RUN, rows)
            for row in range(begin, end, 2):
                values, there = address(x) + 4 * (row * columns + first), 4 * columns if row + 1 < end else 0
                for i in range(0, count, LANES):
                    value = load_some(values + 4 * i, count - i)
                    if there:
                        value = value + load_some(values + there + 4 * i, count - i)
                    store(address(sums) + 4 * i, load(address(sums) + 4 * i) + value)
            for i in range(0, count, LANES):
                total_now = load_some(place + 4 * i, count - i) + load(address(sums) + 4 * i)
                store_some(place + 4 * i, total_now, count - i)


@kernel(parallel=True)
def add_rows_parallel(x, out, start, stop):
    for block in prange(start, stop):
        add_rows(x, out, block, block + 1)


# -- entry points ------------------------------------------------------------------------------------------------------


def normalize(
    xp: Any, x: np.ndarray, weight: np.ndarray | None = None, bias: np.ndarray | None = None, *, dims: Any, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """weight (x - mean) / sqrt(variance + eps) + bias, the mean, the variance; over axes that `layout` knows."""
    rows, shape, statistics = arranged(x.shape, tuple(dims), None if weight is None else weight.shape)
    out = np.empty(x.shape, np.float32)
    if not x.size:
        return out, np.full(statistics, np.nan, np.float32), np.full(statistics, np.nan, np.float32)
    mean, variance = np.empty(statistics, np.float32), np.empty(statistics, np.float32)
    scale = np.ones(shape[1], np.float32) if weight is None else plain(weight).reshape(-1)
    shift = np.zeros(shape[1], np.float32) if bias is None else plain(bias).reshape(-1)
    kernels = (normalize_rows, normalize_rows_parallel) if rows else (normalize_planes, normalize_planes_parallel)
    run(*kernels, x.size, plain(x).reshape(shape), scale, shift, eps, out.reshape(shape), mean.reshape(-1),
        variance.reshape(-1), 0, shape[0] if rows else shape[1])  # fmt: skip
    return out, mean, variance


def normalize_gradients(
    xp: Any, g: np.ndarray, x: np.ndarray, weight: np.ndarray | None, mean: np.ndarray, variance: np.ndarray, *,
    dims: Any, eps: float, shape: tuple | None,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """The gradients of `normalize` carried to x and, with a shape, to weight and bias, which have that shape."""
    rows, seen, _ = arranged(x.shape, tuple(dims), None if weight is None else weight.shape)
    out = np.empty(x.shape, np.float32)
    scale = np.ones(seen[1], np.float32) if weight is None else plain(weight).reshape(-1)
    arrays = plain(g).reshape(seen), plain(x).reshape(seen), scale, plain(mean).reshape(-1), plain(variance).reshape(-1)
    if not x.size:
        sums = np.zeros((2, seen[1]), np.float32)
    elif rows:
        blocks = max(1, min(MOST_BLOCKS, seen[0] // 32))
        parts = np.empty((blocks, 2, seen[1]), np.float32)
        run(rows_backward, rows_backward_parallel, x.size, *arrays, eps, out.reshape(seen), parts, 0, blocks)
        sums = np.add.reduce(parts, axis=0)
    else:
        sums = np.empty((2, seen[1]), np.float32)
        run(planes_backward, planes_backward_parallel, x.size, *arrays, eps, out.reshape(seen), sums, 0, seen[1])
    return (out,) if shape is None else (out, sums[0].reshape(shape), sums[1].reshape(shape))


def channel_sums(x: np.ndarray) -> np.ndarray:
    """The sums over all axes but axis 1: (N, C, …) -> (C,)."""
    out, shape = np.empty(x.shape[1], np.float32), (*x.shape[:2], math.prod(x.shape[2:]))
    run(add_planes, add_planes_parallel, x.size // 4, plain(x).reshape(shape), out, 0, x.shape[1])
    return out


def sum_over_all_but_channels(xp: Any, x: np.ndarray, *, dim: tuple, keepdim: bool = False) -> np.ndarray:
    """`sum` over the axes 0, 2 and 3 of (N, C, H, W)."""
    return channel_sums(x)


def sum_over_leading(xp: Any, x: np.ndarray, *, dim: tuple, keepdim: bool = False) -> np.ndarray:
    """`sum` over the first axes, which are `dim`."""
    kept = x.shape[len(dim) :]
    out, columns = np.empty(kept, np.float32), math.prod(kept)
    rows = plain(x).reshape(math.prod(x.shape[: len(dim)]), columns)
    run(add_rows, add_rows_parallel, x.size // 4, rows, out.reshape(-1), 0, -(-columns // WIDE))
    return out.reshape((1,) * len(dim) + kept) if keepdim else out
