"""Rotary positions: pairs of features turned by angles, in one pass instead of NumPy's five.

Heads come as views of what one linear layer made, and stay where they are: the result lies in memory as the input does.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from tinytorch.kernels.cpu.attention import FLOAT, MOST_LEADS, ROW, WIDE, begin, describe, flattened, pair_of, readable
from tinytorch.kernels.cpu.jit import cores, kernel, run
from tinytorch.kernels.cpu.vectors import LANES, load, load_part, store, store_part

__all__ = ["rotate"]


@kernel
def turn_rows(first, stop, lead, rows, half, places):
    """Rows from `first` to `stop`, of all pairs' rows one after the other.

    places: what `describe` says of x, cos, sin and out. half: how many pairs of features a row has.
    """
    rest, apart = half % LANES, half * FLOAT  # bytes between the two numbers of a pair
    done = (half - rest) * FLOAT
    x_row, cos_row, sin_row, out_row = places[0, ROW], places[1, ROW], places[2, ROW], places[3, ROW]
    for number in range(first // rows, (stop + rows - 1) // rows):
        pair, begins = pair_of(number, lead), max(first - number * rows, 0)
        x, cos = begin(places[0], pair) + begins * x_row, begin(places[1], pair) + begins * cos_row
        sin, out = begin(places[2], pair) + begins * sin_row, begin(places[3], pair) + begins * out_row
        for _ in range(begins, min(stop - number * rows, rows)):
            for j in range(0, done, WIDE):
                low, high = load(x + j), load(x + apart + j)
                store(out + j, low * load(cos + j) - high * load(sin + j))
                store(out + apart + j, high * load(cos + apart + j) + low * load(sin + apart + j))
            if rest:
                low, high = load_part(x + done, rest), load_part(x + apart + done, rest)
                turned = low * load_part(cos + done, rest) - high * load_part(sin + done, rest)
                store_part(out + done, turned, rest)
                turned = high * load_part(cos + apart + done, rest) + low * load_part(sin + apart + done, rest)
                store_part(out + apart + done, turned, rest)
            x, cos, sin, out = x + x_row, cos + cos_row, sin + sin_row, out + out_row


@kernel
def turn_all(parts, lead, rows, half, places):
    turn_rows(0, lead[0] * lead[1] * lead[2] * rows, lead, rows, half, places)


@kernel(parallel=True)
def turn_spread(parts, lead, rows, half, places):
    count = lead[0] * lead[1] * lead[2] * rows
    for part in numba.prange(parts):
        turn_rows(count * np.int64(part) // parts, count * np.int64(part + 1) // parts, lead, rows, half, places)


def rotate(xp: Any, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn the pairs (x_k, x_(k + D/2)) of x (…, T, D) by angles with these cosines and sines: module 12's twin."""
    if x.shape[-1] % 2 or x.shape[-1:] != cos.shape[-1:] or cos.shape != sin.shape:
        shapes = f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        raise ValueError(f"rotate: expected (…, T, D) and two (T, D), D even, got x {tuple(x.shape)}, {shapes}")
    shape = np.broadcast_shapes(x.shape, cos.shape)
    if not 2 <= len(shape) <= MOST_LEADS + 2:
        flat: Any = (flattened(np.atleast_2d(a), shape[:-2]) for a in (x, cos, sin))
        return rotate(xp, *flat).reshape(shape)
    x, cos, sin = (a if a.shape[-2:] == shape[-2:] else np.broadcast_to(a, shape) for a in (x, cos, sin))
    out = np.empty_like(x) if x.shape == shape else np.empty(shape, np.float32)
    if out.size:
        rotate_into(x, cos, sin, out)
    return out


def rotate_into(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray) -> None:
    """`rotate` of arrays that are not empty, into one that is there."""
    *lead, rows, features = out.shape
    target = out if out.strides[-1] == FLOAT else np.empty(out.shape, np.float32)
    arrays = [readable(x), readable(cos), readable(sin), target]
    run(turn_all, turn_spread, out.size // 4, cores(), (1, 1, 1, *lead)[-MOST_LEADS:], rows, features // 2,
        np.array([describe(a) for a in arrays]))  # fmt: skip
    if target is not out:
        out[...] = target
