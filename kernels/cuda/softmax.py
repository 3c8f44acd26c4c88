"""Softmax of rows, its logarithm, and cross-entropy fused with it.

A row belongs to a group of threads of one block: one thread for each element of a short row, the whole block for a long
one. They find the largest element together, then the sum of exponentials, then write the quotients. Each time they go
over the row, which by then lies in the cache. What a thread has found alone goes to the others through shared memory:
in each step an eighth of those that have a number take seven others to theirs, until there is one.

Indices are unsigned, and loops are `while`: Numba asks of each signed index whether it counts from the end, and divides
to know beforehand how many turns a range has whose step it does not know, which makes these kernels four times as long.

The host does not wait for the device, so nobody can be told there of a target that is no class: its row becomes nan.
"""

from __future__ import annotations

import math
from typing import Any

from numba import cuda, float32, uint64

from tinytorch.kernels.cuda.jit import THREADS, blocks_for, helper, kernel, row_by_row, run

__all__ = ["dealt", "log_softmax", "softmax", "softmax_cross_entropy", "softmax_minus_one_hot"]

NARROW = 32  # threads that a row may have for one element each: they run in step
FEWEST = 8  # elements for each of them if there are more
TAKEN = 8  # numbers that a thread makes one of in a step


def dealt(rows: int, columns: int) -> tuple[int, tuple[int, int]]:
    """How to launch a kernel for rows: how many blocks, and their shape: (threads of a row, rows). Powers of two."""
    wanted = max(min(columns, NARROW), -(-columns // FEWEST), 1)
    across = min(1 << (wanted - 1).bit_length(), THREADS)
    return blocks_for(rows, THREADS // across), (across, THREADS // across)


# -- a row: what its threads (lanes) do together -----------------------------------------------------------------------


@helper
def seat():
    """A thread's row, its lane there, how many lanes there are, and its place in its block."""
    lane, lanes, y = uint64(cuda.threadIdx.x), uint64(cuda.blockDim.x), uint64(cuda.threadIdx.y)
    return uint64(cuda.blockIdx.x) * uint64(cuda.blockDim.y) + y, lane, lanes, y * lanes + lane


@helper
def largest_of(found, mine):
    """The largest of the numbers that a row's threads have, of which none is nan."""
    _, lane, left, here = seat()
    found[here] = mine
    cuda.syncthreads()
    while left > 1:
        step = max(left // uint64(TAKEN), uint64(1))
        if lane < step:
            other = step
            while other < left:
                mine = max(mine, found[here + other])
                other += step
            found[here] = mine
        cuda.syncthreads()
        left = step
    return found[here - lane]


@helper
def total_of(found, mine):
    """The sum of the numbers that a row's threads have."""
    _, lane, left, here = seat()
    found[here] = mine
    cuda.syncthreads()
    while left > 1:
        step = max(left // uint64(TAKEN), uint64(1))
        if lane < step:
            other = step
            while other < left:
                mine += found[here + other]
                other += step
            found[here] = mine
        cuda.syncthreads()
        left = step
    return found[here - lane]


@helper
def largest_in_row(x, row, columns, found):
    """The largest element; where there is nan, it may be any."""
    _, j, lanes, _ = seat()
    result = float32(-math.inf)
    while j < columns:
        if x[row, j] > result:
            result = x[row, j]
        j += lanes
    return largest_of(found, result)


@helper
def sum_of_exponentials(x, row, columns, highest, found):
    """Σ e^(x - highest); nan if there is any nan."""
    _, j, lanes, _ = seat()
    result = float32(0)
    while j < columns:
        result += math.exp(x[row, j] - highest)
        j += lanes
    return total_of(found, result)


@helper
def class_of(target, count):
    """A target as an index, which counts from the end where it is negative; `count` where it is no class."""
    target = target + count if target < 0 else target
    return uint64(target if 0 <= target < count else count)


# -- rows: x (rows, columns), of float32 -------------------------------------------------------------------------------
# A block's last threads may have no row. They take none of the turns, but wait where the others do.


@kernel
def softmax_rows(x, out):
    """out = e^x / Σ e^x."""
    maxima = cuda.shared.array(THREADS, float32)
    sums = cuda.shared.array(THREADS, float32)  # not the same: some thread may still have to read the maximum
    row, j, lanes, _ = seat()
    columns = uint64(x.shape[1]) if row < uint64(x.shape[0]) else uint64(0)
    highest = largest_in_row(x, row, columns, maxima)
    factor = float32(1) / sum_of_exponentials(x, row, columns, highest, sums)
    while j < columns:
        out[row, j] = math.exp(x[row, j] - highest) * factor
        j += lanes


@kernel
def log_softmax_rows(x, out):
    """out = x - log Σ e^x. (x - m) - log s is precise where m is 10,000, and x - (m + log s) is not."""
    maxima = cuda.shared.array(THREADS, float32)
    sums = cuda.shared.array(THREADS, float32)
    row, j, lanes, _ = seat()
    columns = uint64(x.shape[1]) if row < uint64(x.shape[0]) else uint64(0)
    highest = largest_in_row(x, row, columns, maxima)
    denominator = sum_of_exponentials(x, row, columns, highest, sums)
    if columns > 0:
        logarithm = math.log(denominator)
        while j < columns:
            out[row, j] = (x[row, j] - highest) - logarithm
            j += lanes


@kernel
def cross_entropy_rows(x, targets, losses, out):
    """out = softmax of x, losses = -log of its element at each row's target; nan for a target that is none."""
    maxima = cuda.shared.array(THREADS, float32)
    sums = cuda.shared.array(THREADS, float32)
    row, j, lanes, _ = seat()
    columns = uint64(x.shape[1]) if row < uint64(x.shape[0]) else uint64(0)
    highest = largest_in_row(x, row, columns, maxima)
    denominator = sum_of_exponentials(x, row, columns, highest, sums)
    if row < uint64(x.shape[0]) and j == 0:
        target = class_of(targets[row], x.shape[1])
        if target < columns:
            losses[row] = math.log(denominator) - (x[row, target] - highest)
        else:
            losses[row] = float32(math.nan)
    factor = float32(1) / denominator
    while j < columns:
        out[row, j] = math.exp(x[row, j] - highest) * factor
        j += lanes


@kernel
def cross_entropy_backward(scale, probabilities, targets, out):
    """out = scale (p - one_hot(target)); nan for a target that is none."""
    row, j, lanes, _ = seat()
    columns = uint64(out.shape[1])
    if row < uint64(out.shape[0]):
        target = class_of(targets[row], out.shape[1])
        factor = scale[row] if target < columns else float32(math.nan)
        while j < columns:
            out[row, j] = factor * (probabilities[row, j] - (float32(1) if j == target else float32(0)))
            j += lanes


# -- entry points ------------------------------------------------------------------------------------------------------


def over_rows(name: str, of_rows: Any, xp: Any, x: Any, dim: int) -> Any:
    if dim not in (-1, x.ndim - 1):
        raise ValueError(f"{name}: the kernel goes over the last axis, not over {dim} of shape {x.shape}")
    out = xp.empty(x.shape, dtype="float32")
    if x.size:
        rows = row_by_row(x).reshape(-1, x.shape[-1])
        run(of_rows, *dealt(*rows.shape), rows, out.reshape(rows.shape))
    return out


def softmax(xp: Any, x: Any, *, dim: int) -> Any:
    """e^x / Σ e^x over the last axis; nan where all of x is -inf."""
    return over_rows("softmax", softmax_rows, xp, x, dim)


def log_softmax(xp: Any, x: Any, *, dim: int) -> Any:
    """x - log Σ e^x over the last axis."""
    return over_rows("log_softmax", log_softmax_rows, xp, x, dim)


def softmax_cross_entropy(xp: Any, logits: Any, targets: Any) -> tuple[Any, Any]:
    """The cross-entropy of each row, and the probabilities: (N, C) and (N,) -> (N,), (N, C)."""
    losses, probabilities = xp.empty(logits.shape[0], dtype="float32"), xp.empty(logits.shape, dtype="float32")
    run(cross_entropy_rows, *dealt(*logits.shape), row_by_row(logits), row_by_row(targets), losses, probabilities)
    return losses, probabilities


def softmax_minus_one_hot(xp: Any, scale: Any, probabilities: Any, targets: Any) -> Any:
    """scale (p - one_hot(target)) in each row: (N,), (N, C), (N,) -> (N, C)."""
    out = xp.empty(probabilities.shape, dtype="float32")
    arrays = row_by_row(scale), row_by_row(probabilities), row_by_row(targets)
    run(cross_entropy_backward, *dealt(*out.shape), *arrays, out)
    return out
