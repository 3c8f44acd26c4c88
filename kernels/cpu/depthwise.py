"""Depthwise convolution, forward and both gradients: twins of module 09's where each channel has kernels of its own.

There is no matrix product in it: each pixel meets a few weights, and memory is nearly all that it costs. A picture is
laid out once in lines with zeros around, in which each weight of the kernel meets a whole vector of pixels at any
stride. Forward keeps four rows of the result in registers while it walks over the weights. The input gradient sums up
rows of windows for each column of the kernel, and then carries the columns back. The weight gradient is an inner
product of the gradient and the picture at each place of the kernel.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numba import prange

from tinytorch.kernels.cpu.jit import cores, kernel, plain, run
from tinytorch.kernels.cpu.lines import axis_margins, deal, line_length, load_some, meetings, places, spread, store_some
from tinytorch.kernels.cpu.vectors import LANES, address, blank, broadcast, fma, load, maximum, store, total

__all__ = ["depthwise_convolution", "depthwise_input_gradient", "depthwise_weight_gradient"]


@kernel
def lay(picture, height, width, lines, stride, before, pitch):
    """Deal the rows of a picture out to the lines (padded height, stride · pitch), which have zeros elsewhere."""
    for r in range(height):
        line = address(lines) + 4 * (before[0] + r) * stride * pitch
        deal(picture + 4 * r * width, width, stride, before[1], line, pitch)


@kernel
def offsets(size, stride, dilation, pitch):
    """How many bytes each element of a window lies behind its first, in lines."""
    result, along = np.empty(size[0] * size[1], np.int64), places(size[1], stride[1], dilation[1], pitch)
    for u in range(size[0]):
        for v in range(size[1]):
            result[u * size[1] + v] = 4 * (u * dilation[0] * stride[1] * pitch + along[v])
    return result


# -- forward -----------------------------------------------------------------------------------------------------------


@kernel
def finish(row, value, relu, count):
    """The last step of an element of the result: the activation, and to memory."""
    store_some(row, maximum(value, blank()) if relu else value, count)


@kernel
def convolve_pictures(x, weight, bias, out, relu, size, stride, before, dilation, padded, pitch, first, last, parts):
    """Convolve pictures `first` to `last` of x (N · C, H, W) into out (N, O, OH, OW).

    Args:
        weight: (C, O / C, KH · KW), and the bias (C, O / C).
        padded: how many rows the padded picture has.
        pitch: the length of the lines that a picture's row is dealt out to.
        parts: among how many calls the parallel twin deals the pictures out.
    """
    height, width = x.shape[1:]
    rows, columns = out.shape[2:]
    channels, multiplier, elements = weight.shape
    lines = np.zeros((padded, stride[1] * pitch), np.float32)
    places_of, down = offsets(size, stride, dilation, pitch), 4 * stride[0] * stride[1] * pitch
    for n in range(first, last):
        lay(address(x) + 4 * n * height * width, height, width, lines, stride[1], before, pitch)
        for k in range(multiplier):
            weights, start = weight[n % channels, k], bias[n % channels, k]
            result = address(out) + 4 * (n * multiplier + k) * rows * columns
            for j in range(0, columns, LANES):
                window, here, rest = address(lines) + 4 * j, result + 4 * j, columns - j
                for _ in range(rows // 4):
                    a = b = c = d = broadcast(start)
                    for e in range(elements):
                        w, at = broadcast(weights[e]), window + places_of[e]
                        a, b = fma(w, load(at), a), fma(w, load(at + down), b)
                        c, d = fma(w, load(at + 2 * down), c), fma(w, load(at + 3 * down), d)
                    finish(here, a, relu, rest)
                    finish(here + 4 * columns, b, relu, rest)
                    finish(here + 8 * columns, c, relu, rest)
                    finish(here + 12 * columns, d, relu, rest)
                    window += 4 * down
                    here += 16 * columns
                for _ in range(rows % 4):
                    a = broadcast(start)
                    for e in range(elements):
                        a = fma(broadcast(weights[e]), load(window + places_of[e]), a)
                    finish(here, a, relu, rest)
                    window += down
                    here += 4 * columns


@kernel(parallel=True)
def convolve_pictures_parallel(
    x, weight, bias, out, relu, size, stride, before, dilation, padded, pitch, first, last, parts
):  # fmt: skip
    for part in prange(parts):
        start, stop = first + part * (last - first) // parts, first + (part + 1) * (last - first) // parts
        convolve_pictures(
            x, weight, bias, out, relu, size, stride, before, dilation, padded, pitch, start, stop, 1
        )  # fmt: skip


def depthwise_convolution(
    xp: Any, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, *, windows: Any, groups: int,
    activation: str | None = None,
) -> np.ndarray:  # fmt: skip
    """The convolution of (N, C, H, W) with (O, 1, KH, KW), plus bias (O,): (N, O, OH, OW). `groups` is C."""
    count, outputs = x.shape[0], weight.shape[0]
    out = np.empty((count, outputs, *windows.count), np.float32)
    bias = np.zeros(outputs, np.float32) if bias is None else bias
    run(
        convolve_pictures, convolve_pictures_parallel, steps(out, windows) + x.size // 4,
        plain(x).reshape(-1, *windows.shape), by_channel(weight, groups), plain(bias).reshape(groups, -1), out,
        activation == "relu", *geometry(windows), padded_rows(windows), line_length(windows), 0, count * groups,
        cores(),
    )  # fmt: skip
    return out


def by_channel(weight: np.ndarray, channels: int) -> np.ndarray:
    """A weight (O, 1, KH, KW) as (C, O / C, KH · KW)."""
    return plain(weight).reshape(channels, weight.shape[0] // channels, -1)


def geometry(windows: Any) -> tuple:
    """What kernels need to know of windows: size, stride, the borders in front, dilation."""
    return windows.size, windows.stride, (windows.padding[0][0], windows.padding[1][0]), windows.dilation


def padded_rows(windows: Any) -> int:
    return windows.shape[0] + sum(windows.padding[0])


def steps(g: np.ndarray, windows: Any) -> int:
    """About how long a kernel takes for so many windows, in the units of `run`."""
    return math.prod(windows.size) * g.size // 4


# -- the gradient of x -------------------------------------------------------------------------------------------------


@kernel
def carry_pictures(g, weight, out, size, stride, before, dilation, front, behind, first, last, parts):
    """Carry g (N, O, OH, OW) back to pictures `first` to `last` of out (N · C, H, W), by a weight (C, O / C, KH · KW).

    Args:
        front, behind: the margins of the lines that are spread along the picture's rows.
    """
    height, width = out.shape[1:]
    rows, columns = g.shape[2:]
    channels, multiplier, _ = weight.shape
    planes = np.zeros((height, size[1], front + behind), np.float32)
    line = 4 * (front + behind)
    counts, pairs = meetings(height, rows, size[0], stride[0], before[0], dilation[0])
    for n in range(first, last):
        weights = weight[n % channels]
        gradient = address(g) + 4 * n * multiplier * rows * columns
        for r in range(height):
            for j in range(0, columns, LANES):
                there = address(planes) + r * size[1] * line + 4 * (front + j)
                for v in range(size[1]):
                    result = blank()
                    for k in range(multiplier):
                        for at in range(counts[r]):
                            i, u = pairs[r, at, 0], pairs[r, at, 1]
                            row = gradient + 4 * ((k * rows + i) * columns + j)
                            result = fma(
                                broadcast(weights[k, u * size[1] + v]), load_some(row, columns - j), result
                            )  # fmt: skip
                    store(there + v * line, result)
        for r in range(height):
            there, row = address(planes) + r * size[1] * line + 4 * front, address(out) + 4 * (n * height + r) * width
            spread(there, line, columns, row, width, size[1], stride[1], before[1], dilation[1])


@kernel(parallel=True)
def carry_pictures_parallel(g, weight, out, size, stride, before, dilation, front, behind, first, last, parts):
    for part in prange(parts):
        start, stop = first + part * (last - first) // parts, first + (part + 1) * (last - first) // parts
        carry_pictures(g, weight, out, size, stride, before, dilation, front, behind, start, stop, 1)


def turned(windows: Any) -> Any:
    """The windows in which the input gradient is a convolution itself, with the kernel turned by 180°: those at stride
    1 without borders wider than the rest of a window; None for others."""
    if windows.stride != (1, 1):
        return None
    rests = [(k - 1) * d for k, d in zip(windows.size, windows.dilation, strict=True)]
    padding = tuple((rest - a, rest - b) for rest, (a, b) in zip(rests, windows.padding, strict=True))
    if min(map(min, padding)) < 0:
        return None
    return replace(windows, shape=windows.count, padding=padding, count=windows.shape)


def depthwise_input_gradient(xp: Any, g: np.ndarray, weight: np.ndarray, *, windows: Any, groups: int) -> np.ndarray:
    """The gradient (N, O, OH, OW) of a depthwise convolution with a weight, carried to its input: (N, C, H, W)."""
    back = turned(windows)
    if back is not None and groups == weight.shape[0]:
        return depthwise_convolution(xp, g, weight[:, :, ::-1, ::-1], windows=back, groups=groups)
    out = np.empty((g.shape[0], groups, *windows.shape), np.float32)
    run(
        carry_pictures, carry_pictures_parallel, steps(g, windows) + out.size // 2,
        plain(g), by_channel(weight, groups), out.reshape(-1, *windows.shape), *geometry(windows),
        *axis_margins(windows), 0, g.shape[0] * groups, cores(),
    )  # fmt: skip
    return out


# -- the gradient of the weight ----------------------------------------------------------------------------------------


@kernel
def add_products(g, rows, columns, window, down, sums, places_of):
    """Add the products of a gradient (rows, columns), an address, and of the pixels at each place of the windows to a
    vector of sums for each place.

    Args:
        window: the address of the first window's first pixel, in lines; the next row's is `down` bytes on.
    """
    for e in range(len(places_of)):
        a = load(address(sums) + 4 * e * LANES)
        b = c = d = blank()
        for j in range(0, columns, LANES):
            row, pixels, rest = g + 4 * j, window + places_of[e] + 4 * j, columns - j
            for _ in range(rows // 4):  # what is behind a row's end may be infinite, so neither is read there
                a = fma(load_some(row, rest), load_some(pixels, rest), a)
                b = fma(load_some(row + 4 * columns, rest), load_some(pixels + down, rest), b)
                c = fma(load_some(row + 8 * columns, rest), load_some(pixels + 2 * down, rest), c)
                d = fma(load_some(row + 12 * columns, rest), load_some(pixels + 3 * down, rest), d)
                row += 16 * columns
                pixels += 4 * down
            for _ in range(rows % 4):
                a = fma(load_some(row, rest), load_some(pixels, rest), a)
                row += 4 * columns
                pixels += down
        store(address(sums) + 4 * e * LANES, (a + b) + (c + d))


@kernel
def weigh_outputs(g, x, out, size, stride, before, dilation, padded, pitch, first, last, parts):
    """The weight gradient of output channels `first` to `last`: out (O, KH · KW), from g (N, O, OH, OW) and
    x (N, C, H, W). See `convolve_pictures`."""
    count, channels, height, width = x.shape
    outputs, rows, columns = g.shape[1:]
    multiplier = outputs // channels
    lines = np.zeros((padded, stride[1] * pitch), np.float32)
    places_of, down = offsets(size, stride, dilation, pitch), 4 * stride[0] * stride[1] * pitch
    sums = np.empty((multiplier, len(places_of), LANES), np.float32)
    for channel in range(first // multiplier, (last - 1) // multiplier + 1):
        start, stop = max(first, channel * multiplier), min(last, (channel + 1) * multiplier)
        sums[:] = 0
        for n in range(count):
            picture = address(x) + 4 * (n * channels + channel) * height * width
            lay(picture, height, width, lines, stride[1], before, pitch)
            for o in range(start, stop):
                gradient = address(g) + 4 * (n * outputs + o) * rows * columns
                add_products(gradient, rows, columns, address(lines), down, sums[o - start], places_of)
        for o in range(start, stop):
            for e in range(len(places_of)):
                out[o, e] = total(load(address(sums) + 4 * ((o - start) * len(places_of) + e) * LANES))


@kernel(parallel=True)
def weigh_outputs_parallel(g, x, out, size, stride, before, dilation, padded, pitch, first, last, parts):
    for part in prange(parts):
        start, stop = first + part * (last - first) // parts, first + (part + 1) * (last - first) // parts
        weigh_outputs(g, x, out, size, stride, before, dilation, padded, pitch, start, stop, 1)


def depthwise_weight_gradient(xp: Any, g: np.ndarray, x: np.ndarray, *, windows: Any, groups: int) -> np.ndarray:
    """The gradient (N, O, OH, OW) of a depthwise convolution of x, carried to its weight: (O, 1, KH, KW)."""
    outputs = g.shape[1]
    out = np.empty((outputs, math.prod(windows.size)), np.float32)
    run(
        weigh_outputs, weigh_outputs_parallel, steps(g, windows) + x.size // 4,
        plain(g), plain(x), out, *geometry(windows), padded_rows(windows), line_length(windows), 0, outputs, cores(),
    )  # fmt: skip
    return out.reshape(outputs, 1, *windows.size)


depthwise_convolution_relu = partial(depthwise_convolution, activation="relu")
