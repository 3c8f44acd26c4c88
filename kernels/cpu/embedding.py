"""The gradient of an embedding: the rows that arrive, each added to the row of its id.

NumPy sorts the ids, and copies rows to add them up in pairs. A kernel adds each row to its place as it comes. Two cores
must never write to one place, so each has columns of its own and goes through all ids: no locks, and every number is
added up in the same order on any number of cores.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from tinytorch.kernels.cpu.jit import cores, kernel, plain, run
from tinytorch.kernels.cpu.vectors import LANES, address, load, load_part, store, store_part

__all__ = ["embedding_weight_gradient"]

FLOAT = 4  # bytes
WIDE = FLOAT * LANES  # bytes of a vector
LINE = 16  # float32 in a line of the cache, which two cores had better not share


@kernel
def add_rows(g, ids, padding, counts, out, first, stop):
    """To the columns from `first` to `stop` of out (V, C), rows of g (n, C) are added, row i to row ids[i].

    padding: a row that nothing is added to, or -1. counts: how often each id occurs, to divide by; or empty.
    """
    step, rest = FLOAT * out.shape[1], (stop - first) % LANES
    source, target = address(g) + FLOAT * first, address(out) + FLOAT * first
    end = FLOAT * (stop - first - rest)
    for i in range(len(ids)):
        if ids[i] != padding:
            to = target + ids[i] * step
            for j in range(0, end, WIDE):
                store(to + j, load(to + j) + load(source + j))
            if rest:
                store_part(to + end, load_part(to + end, rest) + load_part(source + end, rest), rest)
        source += step
    for row in range(len(counts)):
        if counts[row] > 1:
            times = np.float32(counts[row])
            for j in range(first, stop):
                out[row, j] /= times


@kernel
def add_all(g, ids, padding, counts, out, parts):
    add_rows(g, ids, padding, counts, out, 0, out.shape[1])


@kernel(parallel=True)
def add_spread(g, ids, padding, counts, out, parts):
    lines = (out.shape[1] + LINE - 1) // LINE
    for part in prange(parts):
        first, stop = lines * part // parts * LINE, lines * (part + 1) // parts * LINE
        add_rows(g, ids, padding, counts, out, first, min(stop, out.shape[1]))


def embedding_weight_gradient(
    xp: Any, g: np.ndarray, ids: np.ndarray, *, rows: int, padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> np.ndarray:  # fmt: skip
    """g (…, C), each of its rows added to row `ids` (…) of zeros (rows, C): the twin of module 12's."""
    width, count = g.shape[-1], math.prod(ids.shape)
    flat = plain(ids.astype(np.int64, copy=False).reshape(count))
    if count and not (-rows <= flat.min() and flat.max() < rows):
        raise IndexError(f"embedding_weight_gradient: ids from {flat.min()} to {flat.max()} for {rows} rows")
    if count and flat.min() < 0:
        flat = np.where(flat < 0, flat + rows, flat)  # counted from the end, as NumPy does
    counts = np.bincount(flat, minlength=rows) if scale_grad_by_freq else np.empty(0, np.int64)
    padding = -1 if padding_idx is None else padding_idx % rows
    out = np.zeros((rows, width), np.float32)  # what no id names is never touched
    add(plain(g.reshape(count, width)), flat, padding, counts, out)
    return out


def add(g: np.ndarray, ids: np.ndarray, padding: int, counts: np.ndarray, out: np.ndarray) -> None:
    """`add_rows` for all columns, on as many cores as they are worth."""
    run(add_all, add_spread, g.size, g, ids, padding, counts, out, cores())
