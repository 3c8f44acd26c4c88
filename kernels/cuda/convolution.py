"""Convolutions on the GPU: forward and both gradients, as products of matrices that are never laid out in memory.

`convolution_by_elements` is as readable as it gets: one thread for each element of the result, and the loops of the
formula in it. Each multiplication fetches two numbers, though. The others have tiles, as `matmul` has: a block of
SIDE × SIDE threads brings a piece of both matrices into shared memory, and each thread multiplies SIDE numbers of the
one by SIDE of the other, which it holds in registers: one fetch for SIDE / 2 multiplications. What the right matrix
would have in a column, the pixels of a window, is read from where it lies in the picture. The next pieces are on their
way from memory while those at hand are multiplied.

The input's gradient is such a convolution, too, and the weight's is a sum over all windows. Where tiles are few and
sums long, blocks share the sums out among them, and a second kernel adds up what they found, always in the same order:
the same inputs give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numba import cuda, float32, float64, int32, int64, uint64

from tinytorch.kernels.cuda.jit import SIMULATED, THREADS, blocks_for, helper, kernel, row_by_row, run

__all__ = [
    "convolution",
    "convolution_by_elements",
    "convolution_input_gradient",
    "convolution_relu",
    "convolution_weight_gradient",
]

SIDE = 4 if SIMULATED else 8  # a tile of 64×64 would take Python a tenth of a second
TILE = SIDE * SIDE  # columns of a tile, and threads of a block
FEW = 4  # results for each pixel, of which tiles would be mostly empty
ENOUGH_BLOCKS = 8 if SIMULATED else 1024  # to keep all of a GPU busy
LEAST_STEPS = 4 if SIMULATED else 32  # of SIDE multiplications each, that are worth a block
MOST_STEPS = 1 << 13  # which are added up before rounding tells


# -- one thread for each element ---------------------------------------------------------------------------------------


@kernel
def convolve_by_elements(x, weight, bias, out, stride, dilation, before, groups, relu):
    """out (N, O, OH, OW) from x (N, C, H, W), weight (O, C / groups, KH, KW) and bias (O,) or None, of float32.

    Args:
        before: the border of zeros above and on the left.
        relu: whether what is negative becomes 0.
    """
    index = cuda.grid(1)
    count, outputs, rows, columns = out.shape
    if index >= count * outputs * rows * columns:
        return
    j, index = index % columns, index // columns
    i, index = index % rows, index // rows
    o, n = index % outputs, index // outputs
    channels, height, width = weight.shape[1], x.shape[2], x.shape[3]
    first = o // (outputs // groups) * channels  # the first channel of this output's group
    total = float32(0)
    if bias is not None:
        total = bias[o]
    for c in range(channels):
        for u in range(weight.shape[2]):
            row = i * stride[0] + u * dilation[0] - before[0]
            if 0 <= row < height:
                for v in range(weight.shape[3]):
                    column = j * stride[1] + v * dilation[1] - before[1]
                    if 0 <= column < width:
                        total += weight[o, c, u, v] * x[n, first + c, row, column]
    if relu and total < 0:  # nan stays
        total = float32(0)
    out[n, o, i, j] = total


@kernel
def carry_by_elements(g, weight, out, stride, dilation, before, groups):
    """The gradient g (N, O, OH, OW) carried to the input, out (N, C, H, W): each pixel looks for its windows."""
    index = cuda.grid(1)
    count, inputs, height, width = out.shape
    if index >= count * inputs * height * width:
        return
    column, index = index % width, index // width
    row, index = index % height, index // height
    c, n = index % inputs, index // inputs
    outputs, channels = weight.shape[0] // groups, weight.shape[1]
    first = c // channels * outputs
    total = float32(0)
    for u in range(weight.shape[2]):
        top = row + before[0] - u * dilation[0]
        if top >= 0 and top % stride[0] == 0 and top // stride[0] < g.shape[2]:
            for v in range(weight.shape[3]):
                left = column + before[1] - v * dilation[1]
                if left >= 0 and left % stride[1] == 0 and left // stride[1] < g.shape[3]:
                    for o in range(first, first + outputs):
                        amount = g[n, o, top // stride[0], left // stride[1]]
                        total += amount * weight[o, c % channels, u, v]
    out[n, c, row, column] = total


@kernel
def weigh_by_elements(g, x, out, stride, dilation, before, groups):
    """The gradient g (N, O, OH, OW) of a convolution of x (N, C, H, W), carried to the weight, out: a block for each
    element, whose threads share the pixels out among them, and add up their sums in pairs.
    """
    sums = cuda.shared.array(THREADS, float32)
    index, t = cuda.blockIdx.x, cuda.threadIdx.x
    v, index = index % out.shape[3], index // out.shape[3]
    u, index = index % out.shape[2], index // out.shape[2]
    c, o = index % out.shape[1], index // out.shape[1]
    first = o // (out.shape[0] // groups) * out.shape[1]
    count, _, rows, columns = g.shape
    total = float32(0)
    for pixel in range(t, count * rows * columns, THREADS):
        j, rest = pixel % columns, pixel // columns
        i, n = rest % rows, rest // rows
        row = i * stride[0] + u * dilation[0] - before[0]
        column = j * stride[1] + v * dilation[1] - before[1]
        if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
            total += g[n, o, i, j] * x[n, first + c, row, column]
    sums[t] = total
    half = THREADS // 2
    while half:
        cuda.syncthreads()
        if t < half:
            sums[t] += sums[t + half]
        half //= 2
    if t == 0:
        out[o, c, u, v] = sums[0]


# -- tiles -------------------------------------------------------------------------------------------------------------


@helper
def column_of(j, x):
    """The column in a tile of the j-th that threads with this x have: pairs, as those are fetched together; and those
    of neighbours side by side, as threads wait for each other to fetch from the same of shared memory's 32 banks."""
    return j // 2 * 2 * SIDE + 2 * x + j % 2


@helper
def multiply(left, right, sums, x, y):
    """Add to thread (x, y)'s sums the products of its columns in left (SIDE, …) and right (SIDE, TILE)."""
    for k in range(SIDE):
        for i in range(sums.shape[0]):
            for j in range(SIDE):
                sums[i, j] += left[k, y * sums.shape[0] + i] * right[k, column_of(j, x)]


@helper
def clear(sums):
    for i in range(sums.shape[0]):
        for j in range(SIDE):
            sums[i, j] = 0


@helper
def first_tap(phase, size, stride, dilation, before, among, step):
    """(first, count, place): of the taps of result number `phase`, that first and every `step`-th meet pixels; and
    where the first one does. See `convolve_for`."""
    first = 0
    while first < step and (phase * stride + first * dilation - before) % among:
        first += 1
    count = (size - first + step - 1) // step if first < step else 0
    return first, count, (phase * stride + first * dilation - before) // among


@lru_cache
def convolve_for(rows: int) -> Any:
    """The kernel whose threads have `rows` × SIDE results each."""
    outputs_of_tile = rows * SIDE
    half, whole = outputs_of_tile // 2, TILE // 2

    @kernel
    def convolve(
        x, weight, bias, out, pictures, results, size, stride, dilation, before, among, step, groups, least, parts, each
    ):
        """Results (parts, N, M, OH, OW) from pictures (N, C, H, W), all arrays flat, and weight (groups, KH, KW,
        C / groups, M / groups). Tap a of result i meets row (i * stride + a * dilation - before) / among, where that is
        whole.

        A convolution has `among` 1. Its input's gradient is one of g, by steps of a fraction: results are parted into
        phases, those of every `among`-th row and column, because the same taps meet pixels for all of a phase.

        Args:
            step: of taps that meet pixels for the same result.
            least: what no result is below of: 0 for a ReLU.
            each: how many steps, of SIDE channels of a tap, each part of the sums has.
        """
        left = cuda.shared.array((SIDE, half), float64).view(np.float32)  # so laid that two can be fetched at once
        right = cuda.shared.array((SIDE, whole), float64).view(np.float32)
        places = cuda.shared.array(TILE, int64)
        sums = cuda.local.array((rows, SIDE), float32)
        weights = cuda.local.array(SIDE, float32)
        pixels = cuda.local.array(SIDE, float32)
        tx, ty = cuda.threadIdx.x & (SIDE - 1), cuda.threadIdx.y & (SIDE - 1)  # as they are, and never negative
        t = ty * SIDE + tx
        count, inputs, height, width = pictures
        _, outputs, out_height, out_width = results
        channels, outputs, plane = inputs // groups, outputs // groups, height * width

        # Which tile this is: of which outputs, of which windows, of which group and phase.
        down, across = (out_height + among[0] - 1) // among[0], (out_width + among[1] - 1) // among[1]
        tiles, index = (outputs + outputs_of_tile - 1) // outputs_of_tile, cuda.blockIdx.x
        first, index = index % tiles * outputs_of_tile, index // tiles
        tiles = (count * down * across + TILE - 1) // TILE
        pixel, index = index % tiles * TILE + t, index // tiles
        group, index = index % groups, index // groups
        part, index = index % parts, index // parts
        i, j = index // among[1], index % among[1]
        a, a_count, top = first_tap(i, size[0], stride[0], dilation[0], before[0], among[0], step[0])
        b_first, b_count, beginning = first_tap(j, size[1], stride[1], dilation[1], before[1], among[1], step[1])

        # Of the thread's window: the picture, the place of its result, and that of its first pixel.
        rest = pixel // across
        n, to_right, to_bottom = rest // down, pixel % across, rest % down
        i, j = i + to_bottom * among[0], j + to_right * among[1]
        exists = n < count and i < out_height and j < out_width
        picture = part * count + n
        places[t] = ((picture * groups + group) * outputs * out_height + i) * out_width + j if exists else -1
        row, beginning = top + to_bottom * stride[0], beginning + to_right * stride[1]
        row_step, column_step = step[0] * dilation[0] // among[0], step[1] * dilation[1] // among[1]
        source = (n * groups + group) * channels * plane

        # The first step of this part.
        steps_of_tap = (channels + SIDE - 1) // SIDE
        begin, end = part * each, min((part + 1) * each, a_count * b_count * steps_of_tap)
        tap, c = begin // max(1, steps_of_tap), begin % max(1, steps_of_tap) * SIDE
        tap_row, tap_column = tap // max(1, b_count), tap % max(1, b_count)
        a, row = a + tap_row * step[0], row + tap_row * row_step
        b, column = b_first + tap_column * step[1], beginning + tap_column * column_step
        b_last = b_first + (b_count - 1) * step[1]

        clear(sums)
        cuda.syncthreads()  # also where a part has no step
        mine = t < outputs_of_tile and first + t < outputs
        for now in range(begin - 1, end):
            if now >= begin:
                for k in range(SIDE):
                    if t < outputs_of_tile:
                        left[k, t] = weights[k]
                    right[k, t] = pixels[k]
            cuda.syncthreads()
            inside = exists and 0 <= row < height and 0 <= column < width
            at = source + c * plane + row * width + column
            weight_at = (((group * size[0] + a) * size[1] + b) * channels + c) * outputs + first + t
            some = channels - c if now < end - 1 else 0
            for k in range(SIDE):
                weights[k] = pixels[k] = float32(0)
                if mine and k < some:
                    weights[k] = weight[uint64(weight_at)]
                if inside and k < some:
                    pixels[k] = x[uint64(at)]
                weight_at += outputs
                at += plane
            c += SIDE
            if c >= channels:
                c, b, column = 0, b + step[1], column + column_step
                if b > b_last:
                    b, column = b_first, beginning
                    a, row = a + step[0], row + row_step
            if now >= begin:
                multiply(left, right, sums, tx, ty)
            cuda.syncthreads()

        for s in range(SIDE):
            place = places[column_of(s, tx)]
            if place >= 0:  # the index of the first output's result
                for r in range(rows):
                    o = first + ty * rows + r
                    if o < outputs:
                        total = sums[r, s]
                        if bias is not None:
                            total += bias[group * outputs + o]
                        out[uint64(place + o * out_height * out_width)] = total if not total < least else least

    return convolve


@lru_cache
def weigh_for(rows: int) -> Any:
    """The kernel whose threads have `rows` × SIDE elements of the weight's gradient each."""
    outputs_of_tile = rows * SIDE
    half, whole = outputs_of_tile // 2 + 2, TILE // 2 + 2  # two more, so that columns do not all begin at one bank

    @kernel
    def weigh(g, x, out, gradients, pictures, size, stride, dilation, before, groups, each):
        """The gradient g, of shape (N, M, OH, OW), of a convolution of x, of shape (N, C, H, W), carried to the weight:
        out (parts, M, C / groups · KH · KW), whose parts are sums over `each` of the N · OH · OW windows. Flat arrays.
        """
        left = cuda.shared.array((SIDE, half), float64).view(np.float32)
        right = cuda.shared.array((SIDE, whole), float64).view(np.float32)
        row_steps = cuda.shared.array(TILE, int32)  # of the tile's taps: where they are in a window,
        column_steps = cuda.shared.array(TILE, int32)
        steps = cuda.shared.array(TILE, int32)  # and in an array
        sums = cuda.local.array((rows, SIDE), float32)
        amounts = cuda.local.array(rows, float32)
        pixels = cuda.local.array(SIDE, float32)
        tx, ty = cuda.threadIdx.x & (SIDE - 1), cuda.threadIdx.y & (SIDE - 1)
        t = ty * SIDE + tx
        _, outputs, down, across = gradients
        count, inputs, height, width = pictures
        channels, outputs, plane, windows = inputs // groups, outputs // groups, height * width, down * across
        taps = channels * size[0] * size[1]

        # Which tile this is: of which outputs, of which taps, of which group, and over which windows.
        tiles, index = (outputs + outputs_of_tile - 1) // outputs_of_tile, cuda.blockIdx.x
        first, index = index % tiles * outputs_of_tile, index // tiles
        tiles = (taps + TILE - 1) // TILE
        tap, index = index % tiles * TILE, index // tiles
        group, part = index % groups, index // groups
        c, rest = (tap + t) // (size[0] * size[1]), (tap + t) % (size[0] * size[1])
        row, column = rest // size[1] * dilation[0], rest % size[1] * dilation[1]
        row_steps[t] = row if c < channels else 1 << 30  # far outside of all pictures
        column_steps[t] = column
        steps[t] = c * plane + row * width + column
        window, last = part * each + tx, min((part + 1) * each, count * windows)
        j, rest = window % across, window // across
        i, n = rest % down, rest // down

        clear(sums)
        for now in range(-1, (last - part * each + SIDE - 1) // SIDE):
            if now >= 0:
                for r in range(rows):
                    left[tx, r * SIDE + ty] = amounts[r]
                for s in range(SIDE):
                    right[tx, s * SIDE + ty] = pixels[s]
            cuda.syncthreads()
            picture = n * groups + group
            at = (picture * outputs + first + ty) * windows + i * across + j
            for r in range(rows):
                amounts[r] = float32(0)
                if window < last and first + r * SIDE + ty < outputs:
                    amounts[r] = g[uint64(at)]
                at += SIDE * windows
            top, beginning = i * stride[0] - before[0], j * stride[1] - before[1]
            at = picture * channels * plane + top * width + beginning
            for s in range(SIDE):
                row, column = top + row_steps[s * SIDE + ty], beginning + column_steps[s * SIDE + ty]
                pixels[s] = float32(0)
                if window < last and 0 <= row < height and 0 <= column < width:
                    pixels[s] = x[uint64(at + steps[s * SIDE + ty])]
            window, j = window + SIDE, j + SIDE
            while j >= across:
                i, j = i + 1, j - across
            while i >= down:
                n, i = n + 1, i - down
            if now >= 0:
                multiply(left, right, sums, tx, ty)
            cuda.syncthreads()

        for s in range(SIDE):
            place = tap + column_of(s, tx)
            if place < taps:
                for r in range(rows):
                    o = first + ty * rows + r
                    if o < outputs:
                        out[uint64(((part * groups + group) * outputs + o) * taps + place)] = sums[r, s]

    return weigh


@kernel
def add_parts(parts, bias, out, windows, least):
    """out (N, M, windows) = the sum of parts (P, N · M · windows), one after the other, plus bias (M,) or None."""
    index = cuda.grid(1)
    if index < out.shape[0]:
        total = float32(0)
        for part in range(parts.shape[0]):
            total += parts[part, index]
        if bias is not None:
            total += bias[index // windows % bias.shape[0]]
        out[index] = total if not total < least else least


# -- launches ----------------------------------------------------------------------------------------------------------


def rows_for(outputs: int) -> int:
    """How many rows of results a thread has: half as many where that is enough for all outputs."""
    return SIDE if 2 * outputs > TILE else SIDE // 2


def flat(xp: Any, array: Any) -> Any:
    return xp.reshape(row_by_row(array), (-1,))


def borders_before(windows: Any) -> tuple[int, int]:
    return windows.padding[0][0], windows.padding[1][0]


def in_parts(xp: Any, out: Any, tiles: int, steps: int, bias: Any, least: float, launch: Callable[..., None]) -> None:
    """Fill `out` by `launch(out, bias, least, parts, each)`: tiles of that many steps. Where they are too few to keep a
    GPU busy, each is made in parts of `each` steps, which are added up at the end."""
    parts = max(1, min(ENOUGH_BLOCKS // tiles, steps // LEAST_STEPS), steps // MOST_STEPS)
    each = max(1, blocks_for(steps, parts))
    parts, size = max(1, blocks_for(steps, each)), math.prod(out.shape)
    flat_out = xp.reshape(out, (size,))
    if parts == 1:
        launch(flat_out, bias, np.float32(least), 1, each)
    else:
        sums = xp.empty((parts, size), dtype="float32")
        launch(xp.reshape(sums, (parts * size,)), None, np.float32(-math.inf), parts, each)
        windows = math.prod(out.shape[2:])
        run(add_parts, blocks_for(size), THREADS, sums, bias, flat_out, windows, np.float32(least))


def launch_tiles(
    xp: Any, x: Any, weight: Any, bias: Any, out: Any, size: tuple, stride: tuple, dilation: tuple, before: tuple,
    among: tuple, least: float,
) -> None:  # fmt: skip
    """Fill `out` as `convolve` does; weight (groups, M / groups, C / groups, KH, KW)."""
    groups, outputs, channels = weight.shape[:3]
    rows, weight = rows_for(outputs), flat(xp, xp.permute_dims(weight, (0, 3, 4, 2, 1)))
    step = tuple(m // math.gcd(m, d) for m, d in zip(among, dilation, strict=True))
    windows = out.shape[0] * math.prod(blocks_for(n, m) for n, m in zip(out.shape[2:], among, strict=True))
    tiles = blocks_for(outputs, rows * SIDE) * blocks_for(windows, TILE) * groups * math.prod(among)
    steps = blocks_for(channels, SIDE) * math.prod(blocks_for(n, m) for n, m in zip(size, step, strict=True))

    def launch(sums: Any, bias: Any, least: Any, parts: int, each: int) -> None:
        run(
            convolve_for(rows), tiles * parts, (SIDE, SIDE), flat(xp, x), weight, bias, sums, x.shape, out.shape, size,
            stride, dilation, before, among, step, groups, least, parts, each,
        )  # fmt: skip

    in_parts(xp, out, tiles, steps, bias, least, launch)


def convolution_by_elements(
    xp: Any, x: Any, weight: Any, bias: Any = None, *, windows: Any, groups: int, activation: str | None = None
) -> Any:
    """As `convolution`, without tiles."""
    out = xp.empty((x.shape[0], weight.shape[0], *windows.count), dtype="float32")
    run(
        convolve_by_elements, blocks_for(math.prod(out.shape)), THREADS, row_by_row(x), row_by_row(weight),
        None if bias is None else row_by_row(bias), out, windows.stride, windows.dilation, borders_before(windows),
        groups, activation == "relu",
    )  # fmt: skip
    return out


def convolution(
    xp: Any, x: Any, weight: Any, bias: Any = None, *, windows: Any, groups: int, activation: str | None = None
) -> Any:
    """The convolution of (N, C, H, W) with (O, C / groups, KH, KW), plus bias (O,): (N, O, OH, OW)."""
    outputs = weight.shape[0] // groups
    if outputs < FEW:
        return convolution_by_elements(xp, x, weight, bias, windows=windows, groups=groups, activation=activation)
    out = xp.empty((x.shape[0], weight.shape[0], *windows.count), dtype="float32")
    if math.prod(out.shape):
        weight = xp.reshape(weight, (groups, outputs, *weight.shape[1:]))
        bias = None if bias is None else row_by_row(bias)
        geometry = windows.size, windows.stride, windows.dilation, borders_before(windows), (1, 1)
        launch_tiles(xp, x, weight, bias, out, *geometry, 0 if activation == "relu" else -math.inf)
    return out


convolution_relu: Callable[..., Any] = partial(convolution, activation="relu")


def convolution_input_gradient(xp: Any, g: Any, weight: Any, *, windows: Any, groups: int) -> Any:
    """The gradient (N, O, OH, OW) of a convolution with a weight, carried to its input: (N, C, H, W)."""
    outputs, channels = weight.shape[0] // groups, weight.shape[1]
    out = xp.empty((g.shape[0], channels * groups, *windows.shape), dtype="float32")
    before = borders_before(windows)
    if channels < FEW:
        run(
            carry_by_elements, blocks_for(math.prod(out.shape)), THREADS, row_by_row(g), row_by_row(weight), out,
            windows.stride, windows.dilation, before, groups,
        )  # fmt: skip
    elif math.prod(out.shape):
        turned = xp.permute_dims(xp.reshape(weight, (groups, outputs, *weight.shape[1:])), (0, 2, 1, 3, 4))
        back = tuple(-d for d in windows.dilation), tuple(-n for n in before)
        launch_tiles(xp, g, turned, None, out, windows.size, (1, 1), *back, windows.stride, -math.inf)
    return out


def convolution_weight_gradient(xp: Any, g: Any, x: Any, *, windows: Any, groups: int) -> Any:
    """The gradient (N, O, OH, OW) of a convolution of x, carried to its weight: (O, C / groups, KH, KW)."""
    outputs, channels = g.shape[1] // groups, x.shape[1] // groups
    out = xp.empty((g.shape[1], channels, *windows.size), dtype="float32")
    shape = windows.size, windows.stride, windows.dilation, borders_before(windows), groups
    if outputs < FEW:
        run(weigh_by_elements, math.prod(out.shape), THREADS, row_by_row(g), row_by_row(x), out, *shape[1:])
        return out
    rows, taps, places = rows_for(outputs), channels * math.prod(windows.size), g.shape[0] * math.prod(windows.count)

    def launch(sums: Any, bias: Any, least: Any, parts: int, each: int) -> None:
        run(
            weigh_for(rows), tiles * parts, (SIDE, SIDE), flat(xp, g), flat(xp, x), sums, g.shape, x.shape, *shape,
            each * SIDE,
        )  # fmt: skip

    tiles = blocks_for(outputs, rows * SIDE) * blocks_for(taps, TILE) * groups
    if tiles:
        in_parts(xp, out, tiles, blocks_for(places, SIDE), None, -math.inf, launch)
    return out
