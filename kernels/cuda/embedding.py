"""The gradient of an embedding: the rows that arrive, each added to the row of its id.

Threads that add to one place would have to do it one after the other, in an order that nobody knows beforehand, and
each order rounds in its own way. A block for each row of the table that looks for its id would read all ids 50,000
times where the table has 50,000 rows. So the ids are sorted first, and rows that belong together are neighbours: a
thread adds PIECE of them up, of one feature, and writes down each sum that is complete. Where an id goes on in the next
pieces, the thread of its first piece takes their sums to its own, in order, in a second launch. So the work grows with
the ids alone, and it matters little how unevenly they are spread.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, float32, int64, uint64

from tinytorch.kernels.cuda.jit import THREADS, blocks_for, helper, kernel, row_by_row, run

__all__ = ["embedding_weight_gradient"]

PIECE = 32  # rows that a thread adds up
WIDE = THREADS // 8  # features that a block has at once; of pieces it has eight, or more where there are fewer features


@helper
def seat():
    """A thread's piece and feature; unsigned, because then no index is asked whether it counts from the end."""
    piece = uint64(cuda.blockIdx.x) * uint64(cuda.blockDim.y) + uint64(cuda.threadIdx.y)
    return piece, uint64(cuda.blockIdx.y) * uint64(cuda.blockDim.x) + uint64(cuda.threadIdx.x)


@kernel
def add_pieces(g, order, ids, padding, out, heads):
    """To row ids[k] of out (V, C) row order[k] of g (n, C) is added, for the places k of each piece of the sorted ids.

    Args:
        order, ids: (n,), where each row lies in g, and its id.
        padding: a row that nothing is added to, or -1.
        heads: (pieces, C), the sum of the rows at a piece's begin whose id another piece has begun.
    """
    piece, feature = seat()
    k = piece * uint64(PIECE)
    if k >= uint64(ids.size) or feature >= uint64(g.shape[1]):
        return
    end = min(k + uint64(PIECE), uint64(ids.size))
    row, total = ids[k], float32(0)
    begun = k > 0 and ids[k - uint64(1)] == row
    while k < end:
        total += g[order[k], feature]
        k += uint64(1)
        following = ids[k] if k < end else int64(-1)
        if following != row:
            if begun:
                heads[piece, feature] = total
            elif row != padding:
                out[row, feature] = total
            begun, row, total = False, following, float32(0)


@kernel
def join_pieces(ids, padding, heads, out):
    """Where a piece begins an id that goes on in the next ones, their heads are added to its row of out."""
    piece, feature = seat()
    first, end = piece * uint64(PIECE), (piece + uint64(1)) * uint64(PIECE)
    if end >= uint64(ids.size) or feature >= uint64(out.shape[1]):
        return
    row = ids[end]
    goes_on = ids[end - uint64(1)] == row
    begun = first > 0 and ids[first - uint64(1)] == row  # then all of the piece is a part of what another one began
    if begun or not goes_on or row == padding:
        return
    total = out[row, feature]
    while end < uint64(ids.size) and ids[end] == row:
        piece += uint64(1)
        total += heads[piece, feature]
        end += uint64(PIECE)
    out[row, feature] = total


def embedding_weight_gradient(
    xp: Any, g: Any, ids: Any, *, rows: int, padding_idx: int | None = None, scale_grad_by_freq: bool = False
) -> Any:
    """g (…, C), each of its rows added to row `ids` (…) of zeros (rows, C): the twin of module 12's.

    Ids are counted modulo `rows`, as CuPy counts them where it looks rows up: nothing is refused here, because the host
    does not wait for the device.
    """
    width, count = g.shape[-1], math.prod(ids.shape)
    out = xp.zeros((rows, width), dtype="float32")  # what no id names is never touched
    if not count * width:
        return out
    ids = xp.cast(xp.reshape(ids, (count,)), "int64") % rows
    order = xp.argsort(ids, stable=True)  # in the order in which they came
    ids = xp.take(ids, order)
    padding, pieces = np.int64(-1 if padding_idx is None else padding_idx % rows), blocks_for(count, PIECE)
    heads = xp.empty((pieces, width), dtype="float32")
    across = min(1 << (width - 1).bit_length(), WIDE)
    blocks, threads = (blocks_for(pieces, THREADS // across), blocks_for(width, across)), (across, THREADS // across)
    run(add_pieces, blocks, threads, row_by_row(g).reshape(count, width), order, ids, padding, out, heads)
    run(join_pieces, blocks, threads, ids, padding, heads, out)
    if scale_grad_by_freq:
        ends = xp.searchsorted(ids, xp.arange(rows + 1))
        times = xp.cast(xp.maximum(ends[1:] - ends[:-1], 1), "float32")
        out /= xp.expand_dims(times, axis=1)
    return out
