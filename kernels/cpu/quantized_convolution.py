"""Convolutions of int8 pictures with int32 sums, scaled and rounded in the same pass; and pooling of what they give.

With a pixel's channels side by side, a row of a window is one stretch of bytes: its pixels' channels, one after the
other. So a convolution is a product as in `quantized.py` whose rows lie in the picture itself: for each window an
address, and for each of its rows a distance from there. Nothing is copied but the picture, once, to a scratch with a
border of zero points and as many channels as an instruction takes at once. A picture that is large is done in bands.

Results lie with their channels side by side, too, which the next convolution and pooling want; to others they are
(N, O, OH, OW) all the same, with other strides. Such a picture is "channels last" in PyTorch's words.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import prange

from tinytorch.kernels.cpu.jit import cores, kernel, plain, run
from tinytorch.kernels.cpu.quantized import (
    COLUMNS,
    DEPTHS,
    MINUS_INFINITY,
    ROWS,
    SHIFT,
    STRIP_DTYPE,
    VECTORS,
    VNNI,
    Packed,
    instructions,
    pack,
    rounding_of,
    store_sums,
    write_row,
)
from tinytorch.kernels.cpu.quantized import add_products as add_products_wide
from tinytorch.kernels.cpu.quantized import first_sums as first_sums_wide
from tinytorch.kernels.cpu.vectors import address, apart

__all__ = ["channels_last", "int8_convolution", "max_pool", "pack_filters"]

NARROW = COLUMNS // 2  # for few outputs: a tile of half the width and twice the height
BAND_BYTES = 128 << 10  # of a scratch: well within a second-level cache
DEPTH_BYTES = STRIP_DTYPE.itemsize
first_sums_narrow, add_products_narrow = instructions(VECTORS // 2)


def channels_last(x: np.ndarray) -> bool:
    """Whether the channels of a picture (N, C, H, W) lie side by side."""
    return x.transpose(0, 2, 3, 1).flags.c_contiguous


def pack_filters(weight: np.ndarray) -> Packed:
    """Prepare a weight of int8, (O, C, KH, KW), for `int8_convolution`: its depths are a window's, row by row."""
    outputs, channels, height, width = weight.shape
    padded = np.zeros((outputs, height, width, -(-channels // DEPTHS) * DEPTHS), np.int8)
    padded[..., :channels] = weight.transpose(0, 2, 3, 1)
    return pack(padded.reshape(outputs, -1), NARROW if outputs <= NARROW else COLUMNS)


# -- tiles -------------------------------------------------------------------------------------------------------------


@kernel
def wide_tile(scratch, windows, runs, steps, panel, starts, block):
    """ROWS windows, whose distances from `scratch` are given, times a panel: their sums, in `block`."""
    apart()
    rows = (scratch + windows[0], scratch + windows[1], scratch + windows[2], scratch + windows[3],
            scratch + windows[4], scratch + windows[5])  # fmt: skip
    sums = first_sums_wide(rows, starts)
    for run_ in range(len(runs)):
        distance = runs[run_]
        for step in range(steps):
            sums = add_products_wide(sums, rows, distance + 4 * step, panel)
            panel += DEPTHS * COLUMNS
    store_sums(block, sums)


@kernel
def narrow_tile(scratch, windows, runs, steps, panel, starts, block):
    """The same for twice as many windows and a panel of half the width."""
    apart()
    rows = (scratch + windows[0], scratch + windows[1], scratch + windows[2], scratch + windows[3],
            scratch + windows[4], scratch + windows[5], scratch + windows[6], scratch + windows[7],
            scratch + windows[8], scratch + windows[9], scratch + windows[10], scratch + windows[11])  # fmt: skip
    sums = first_sums_narrow(rows, starts)
    for run_ in range(len(runs)):
        distance = runs[run_]
        for step in range(steps):
            sums = add_products_narrow(sums, rows, distance + 4 * step, panel)
            panel += DEPTHS * NARROW
    store_sums(block, sums)


@kernel
def write_tile(rows, columns, width, block, where, step, starts, factors, addends, least, rounding):
    """Write factor · sum + bias, or `least` if that is more, of a block so wide; rounded, if there is a rounding.

    All but `least` and `rounding` are addresses and whole numbers.
    """
    apart()
    for r in range(rows):
        write_row(block + 4 * width * r, columns, where + step * r, starts, np.int64(0), np.float32(1), factors,
                  addends, least, rounding)  # fmt: skip


# -- pictures ----------------------------------------------------------------------------------------------------------


@kernel
def copy_band(x, start, last, shape, first, left, zero, scratch):
    """Copy the rows of a picture from `first` on to the scratch (rows, width, channels), with zero points around.

    Args:
        x, start: bytes, and where the picture begins among them.
        last: whether its channels lie side by side.
        shape: of the picture, (C, H, W).
    """
    apart()
    (channels, height, width), flip = shape, np.int8(-SHIFT)
    filler = scratch.dtype.type(np.int8(zero) ^ flip)
    for r in range(scratch.shape[0]):
        row, i = scratch[r], first + r
        if i < 0 or i >= height:
            row[:] = filler
            continue
        row[:left] = filler
        row[left + width :] = filler
        if last and channels == scratch.shape[2]:
            size = width * channels
            source, flat = x[start + i * size : start + (i + 1) * size], row[left : left + width].reshape(-1)
            for k in range(size):
                flat[k] = np.int8(source[k] ^ flip)
        elif last:
            for j in range(width):
                source = x[start + (i * width + j) * channels :]
                for c in range(channels):
                    row[left + j, c] = np.int8(source[c] ^ flip)
        else:
            for c in range(channels):
                source = x[start + (c * height + i) * width :]
                for j in range(width):
                    row[left + j, c] = np.int8(source[j] ^ flip)


@kernel
def convolve_part(
    part, parts, x, last, shape, zero, panels, starts, width, factors, addends, least, rounding, windows, runs, plan,
    outputs, out,
):  # fmt: skip
    """One of the parts of all pairs of a picture and a band of rows.

    Args:
        width: of a panel. factors, addends: one for each column of the panels.
        windows: how far each window of a band is from the scratch's start, in bytes.
        runs: how far a window's stretches are from its start. plan: see `make_plan`.
        out: bytes of (N, OH, OW, O).
    """
    pictures, bands, band_rows, out_height, out_width, stride, top, left, rows, columns, channels, steps = plan
    itemsize, height = 1 if len(rounding) else 4, ROWS * COLUMNS // width
    scratch = np.empty((rows, columns, channels), STRIP_DTYPE)
    scratch[:] = 0  # channels that only fill up
    block, size = np.empty(ROWS * COLUMNS, np.int32), shape[0] * shape[1] * shape[2]
    for job in range(pictures * bands * part // parts, pictures * bands * (part + 1) // parts):
        picture, band = job // bands, job % bands
        start = band * band_rows
        copy_band(x, picture * size, last, shape, start * stride - top, left, zero, scratch)
        count = min(band_rows, out_height - start) * out_width
        target = address(out) + (picture * out_height + start) * out_width * outputs * itemsize
        for panel in range(len(panels)):
            column, weights = panel * width, address(panels) + panel * panels.shape[1]
            for w in range(0, count, height):
                places, begin = windows[w : w + height], address(starts) + 4 * column
                if width == COLUMNS:
                    wide_tile(address(scratch), places, runs, steps, weights, begin, address(block))
                else:
                    narrow_tile(address(scratch), places, runs, steps, weights, begin, address(block))
                write_tile(min(height, count - w), min(width, outputs - column), width, address(block),
                           target + (w * outputs + column) * itemsize, outputs * itemsize, begin,
                           address(factors) + 4 * column, address(addends) + 4 * column, least, rounding)  # fmt: skip


@kernel
def convolve_serial(parts, *arguments):
    for part in range(parts):
        convolve_part(part, parts, *arguments)


@kernel(parallel=True)
def convolve_parallel(
    parts, x, last, shape, zero, panels, starts, width, factors, addends, least, rounding, windows, runs, plan, outputs,
    out,
):  # fmt: skip
    for part in prange(parts):
        convolve_part(part, parts, x, last, shape, zero, panels, starts, width, factors, addends, least, rounding,
                      windows, runs, plan, outputs, out)  # fmt: skip


@lru_cache(256)
def make_plan(windows: Any, pictures: int, channels: int, cores: int) -> tuple[np.ndarray, np.ndarray, tuple]:
    """How pictures are cut into bands: where in a scratch each window of a band begins, where each of a window's
    stretches from there on, both in bytes, and the sizes that `convolve_part` needs."""
    (height, width), (stride_down, stride), (down, across) = windows.size, windows.stride, windows.dilation
    (top, _), (left, right) = windows.padding
    out_height, out_width = windows.count
    deep = -(-channels // DEPTHS) * DEPTHS
    columns, reach, pixel = left + windows.shape[1] + right, down * (height - 1) + 1, deep * DEPTH_BYTES
    fit = (BAND_BYTES // (columns * pixel) - reach) // stride_down + 1  # so many rows of the result
    band_rows = max(1, min(out_height, fit, -(-out_height * pictures // cores)))
    bands, rows = -(-out_height // band_rows), (band_rows - 1) * stride_down + reach
    places = np.arange(band_rows)[:, None] * stride_down * columns + np.arange(out_width) * stride
    places = np.concatenate([places.reshape(-1), np.zeros(2 * ROWS, np.int64)])  # the last tile may be longer
    stretches = np.arange(height)[:, None] * (down * columns) + np.arange(width) * across
    stretches = stretches[:, :1] if across == 1 else stretches
    steps = deep // DEPTHS * (width if across == 1 else 1)
    plan = (pictures, bands, band_rows, out_height, out_width, stride_down, top, left, rows, columns, deep, steps)
    return places * pixel, stretches.reshape(-1) * pixel, plan


def int8_convolution(
    xp: Any, x: np.ndarray, x_scale: np.ndarray, x_zero_point: np.ndarray, weight: np.ndarray,
    weight_scale: np.ndarray, bias: np.ndarray | None = None, out_scale: np.ndarray | None = None,
    out_zero_point: np.ndarray | None = None, *, windows: Any, relu: bool = False,
    packed: Packed | None = None,
) -> np.ndarray:  # fmt: skip
    """The operation of module 17. Without `packed`, the weight is packed at each call."""
    packed = packed or pack_filters(weight)
    pictures, outputs, zero, last = len(x), len(weight), np.int32(x_zero_point), channels_last(x)
    places, stretches, plan = make_plan(windows, pictures, x.shape[1], cores())
    pixels = (x.transpose(0, 2, 3, 1) if last else plain(x)).reshape(-1)
    rounding = rounding_of(out_scale, out_zero_point)
    starts = packed.starts - zero * packed.sums
    factors, addends = np.zeros((2, len(starts)), np.float32)  # for whole vectors
    factors[:outputs] = np.float32(x_scale) * weight_scale
    if bias is not None:
        addends[:outputs] = bias
    out = np.empty((pictures, *windows.count, outputs * (1 if len(rounding) else 4)), np.int8)
    work = pictures * math.prod(windows.count) * packed.panels.size // (768 if VNNI else 128)
    run(
        convolve_serial, convolve_parallel, work, cores(), pixels, last, x.shape[1:], zero, packed.panels, starts,
        COLUMNS if outputs > NARROW else NARROW, factors, addends, np.float32(0) if relu else MINUS_INFINITY, rounding,
        places, stretches, plan, outputs, out.reshape(-1),
    )  # fmt: skip
    return (out if len(rounding) else out.view(np.float32)).transpose(0, 3, 1, 2)


# -- pooling -----------------------------------------------------------------------------------------------------------


@kernel
def keep_larger(best, pixel):
    """best = max(best, pixel), elementwise."""
    for c in range(len(best)):
        best[c] = pixel[c] if pixel[c] > best[c] else best[c]


@kernel
def pool_rows(part, parts, x, out, size, stride, padding, dilation):
    """The largest of each window of (N, H, W, C), whatever the channel, in a part of the rows of out (N, OH, OW, C)."""
    pictures, out_height, out_width = out.shape[:3]
    height, width = x.shape[1:3]
    for row in range(pictures * out_height * part // parts, pictures * out_height * (part + 1) // parts):
        n, i = row // out_height, row % out_height
        out[n, i] = -128
        for u in range(size[0]):
            r = i * stride[0] + u * dilation[0] - padding[0]
            for v in range(size[1]) if 0 <= r < height else range(0):
                for j in range(out_width):
                    s = j * stride[1] + v * dilation[1] - padding[1]
                    if 0 <= s < width:
                        keep_larger(out[n, i, j], x[n, r, s])


@kernel
def pool_serial(parts, *arguments):
    for part in range(parts):
        pool_rows(part, parts, *arguments)


@kernel(parallel=True)
def pool_parallel(parts, x, out, size, stride, padding, dilation):
    for part in prange(parts):
        pool_rows(part, parts, x, out, size, stride, padding, dilation)


def max_pool(xp: Any, x: np.ndarray, *, windows: Any) -> np.ndarray:
    """The largest of each window of int8 pictures (N, C, H, W) whose channels lie side by side, as the result's do."""
    pictures, pixels = len(x), plain(x.transpose(0, 2, 3, 1))
    out = np.empty((pictures, *windows.count, x.shape[1]), np.int8)
    padding = windows.padding[0][0], windows.padding[1][0]
    work = out.size * windows.size[0] * windows.size[1] // 16
    run(pool_serial, pool_parallel, work, cores(), pixels, out, windows.size, windows.stride, padding, windows.dilation)
    return out.transpose(0, 3, 1, 2)
