"""Rows of pictures as vectors want them: every second pixel beside every second, and windows' sums carried back.

Windows that are `stride` apart read every stride-th pixel of a row, which no vector load does. Dealt out to `stride`
lines, pixel after pixel, what neighbouring windows read lies side by side in one of the lines, at any stride.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from tinytorch.kernels.cpu.jit import kernel
from tinytorch.kernels.cpu.vectors import I32, LANES, blank, floats, load, load_part, store, store_part, vector

__all__ = ["axis_margins", "copy_block", "deal", "even", "every_second", "high", "line_length", "load_some", "low",
           "meetings", "odd", "places", "spread", "store_some", "vectors_of"]  # fmt: skip


def vectors_of(length: int) -> int:
    """A length, rounded up to whole vectors."""
    return -(-length // LANES) * LANES


def _shuffle(what: str, lanes: list[int]) -> Any:
    @intrinsic
    def shuffle(typing, a, b):
        def generate(context, builder, signature, arguments):
            return builder.shuffle_vector(*arguments, ir.Constant(ir.VectorType(I32, LANES), lanes))

        return vector(vector, vector), generate

    shuffle.__doc__ = what
    return shuffle


_TURNS = [lane for pair in zip(range(LANES), range(LANES, 2 * LANES), strict=True) for lane in pair]
even = _shuffle("Lanes 0, 2, 4, … of a, then those of b.", list(range(0, 2 * LANES, 2)))
odd = _shuffle("Lanes 1, 3, 5, … of a, then those of b.", list(range(1, 2 * LANES, 2)))
low = _shuffle("a's and b's lanes in turn, those of their first halves.", _TURNS[:LANES])
high = _shuffle("a's and b's lanes in turn, those of their second halves.", _TURNS[LANES:])
every_second = _shuffle("Lanes 0, 2, 4, … of a and of what follows it, in b from a's last lane on.",
                        [2 * lane + (lane >= LANES // 2) for lane in range(LANES)])  # fmt: skip


@kernel(forceinline=True)
def load_some(address, count):
    """`count` float32, and zeros if that is less than a vector; never more than a vector."""
    return load(address) if count >= LANES else load_part(address, count)


@kernel(forceinline=True)
def store_some(address, value, count):
    """Write the first `count` lanes, all there are if `count` is more."""
    if count >= LANES:
        store(address, value)
    else:
        store_part(address, value, count)


@kernel
def copy_block(target, target_step, source, source_step, rows, columns):
    """Copy some columns of rows; steps in bytes."""
    for row in range(rows):
        for first in range(0, columns, LANES):
            value = load_some(source + row * source_step + 4 * first, columns - first)
            store_some(target + row * target_step + 4 * first, value, columns - first)


@kernel
def deal(row, width, stride, before, lines, pitch):
    """Deal a row of pixels, from address `row` on, out to `stride` lines, each `pitch` float32 behind the last.

    Pixel c goes to line (c + before) % stride, to place (c + before) // stride. Other places stay as they are.
    """
    if stride == 1:
        for c in range(0, width, LANES):
            store_some(lines + 4 * (before + c), load_some(row + 4 * c, width - c), width - c)
    elif stride == 2:
        evens = lines + 4 * (before % 2 * pitch + before // 2)
        odds = lines + 4 * ((before + 1) % 2 * pitch + (before + 1) // 2)
        for c in range(0, width, 2 * LANES):
            a, b = load_some(row + 4 * c, width - c), load_some(row + 4 * (c + LANES), width - c - LANES)
            store_some(evens + 2 * c, even(a, b), (width - c + 1) // 2)
            store_some(odds + 2 * c, odd(a, b), (width - c) // 2)
    else:
        pixels, places = floats(row, width), floats(lines, stride * pitch)
        for c in range(width):
            places[(c + before) % stride * pitch + (c + before) // stride] = pixels[c]


@kernel(inline="always")
def places(size, stride, dilation, pitch):
    """Where column v of the first window lies in lines that a row has been dealt out to, for each v."""
    result = np.empty(size, np.int64)
    for v in range(size):
        result[v] = v * dilation % stride * pitch + v * dilation // stride
    return result


@kernel
def places_sum(lines, step, at, size, stride, dilation):
    """The sum over v of line v's LANES values from place (at - v dilation) / stride on, if that is a whole number."""
    result = blank()
    for v in range(size):
        place = at - v * dilation
        if place % stride == 0:
            result = result + load(lines + v * step + 4 * (place // stride))
    return result


@kernel
def spread(lines, step, count, row, width, size, stride, before, dilation):
    """Carry what windows have in a row back to the row: pixel c is the sum over v of line v's value at
    (c + before - v dilation) / stride, if that is a whole number.

    Args:
        lines: the address of line 0's place 0. Places in front of it and behind its end are read, too, and must be 0:
            (size - 1) dilation / stride of them in front, and to the end of the vector behind.
        step: how many bytes line v + 1 is behind line v; 0 if they are all the same one.
        count: how many places of a line are not 0.
    """
    if stride == 1:
        for c in range(0, width, LANES):
            store_some(row + 4 * c, places_sum(lines, step, c + before, size, 1, dilation), width - c)
    elif stride == 2:
        for c in range(0, width, 2 * LANES):
            a = places_sum(lines, step, c + before, size, 2, dilation)
            b = places_sum(lines, step, c + before + 1, size, 2, dilation)
            store_some(row + 4 * c, low(a, b), width - c)
            if width - c > LANES:
                store_some(row + 4 * (c + LANES), high(a, b), width - c - LANES)
    else:
        pixels = floats(row, width)
        pixels[:] = 0
        hop = step // 4
        values = floats(lines, (size - 1) * hop + count)
        for j in range(count):
            start = j * stride - before
            for v in range(max(0, -(start // dilation)), min(size, (width - 1 - start) // dilation + 1)):
                pixels[start + v * dilation] += values[v * hop + j]


@kernel
def meetings(length, count, size, stride, before, dilation):
    """Which of `count` windows along an axis have which of their elements at each of its `length` places.

    Returns: (counts, pairs), where pairs[r, :counts[r]] are the (window, element) that lie at place r.
    """
    counts, pairs = np.zeros(length, np.int64), np.empty((length, size, 2), np.int64)
    for i in range(count):
        for u in range(size):
            r = i * stride + u * dilation - before
            if 0 <= r < length:
                pairs[r, counts[r], 0] = i
                pairs[r, counts[r], 1] = u
                counts[r] += 1
    return counts, pairs


def line_length(windows: Any) -> int:
    """How long lines must be that rows are dealt out to: for all pixels, and for whole vectors of windows."""
    (left, right), stride = windows.padding[1], windows.stride[1]
    reach = (windows.size[1] - 1) * windows.dilation[1] // stride
    return max(vectors_of(windows.count[1]) + reach, -(-(left + windows.shape[1] + right) // stride))


def axis_margins(windows: Any) -> tuple[int, int]:
    """How many places lines that `spread` reads have in front of their place 0, and from there on."""
    size, count, width, stride = (pair[1] for pair in (windows.size, windows.count, windows.shape, windows.stride))
    front = (size - 1) * windows.dilation[1] // stride + 1
    return front, max(vectors_of(count), windows.padding[1][0] // stride + 1 + vectors_of(-(-width // stride)))
