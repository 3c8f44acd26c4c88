"""Softmax of rows, its logarithm, and cross-entropy fused with it.

A row belongs to a group of threads of one block: one thread for each element of a short row, the whole block for a long
one. They find the largest element together, then the sum of exponentials, then write the quotients. Each time they go
over the row, which by then lies in the cache. What a thread has found alone goes to the others through shared memory:
in each step half of those that have a number take a second one to theirs, until there is one.

The host does not wait for the device, so nobody can be told there of a target that is no class: its row becomes nan.
"""

from __future__ import annotations

import math
from typing import Any

from numba import cuda, float32

from tinytorch.kernels.cuda.jit import THREADS, blocks_for, helper, kernel, row_by_row, run

__all__ = ["dealt", "log_softmax", "softmax", "softmax_cross_entropy", "softmax_minus_one_hot"]

NARROW = 32  # threads that a row may have for one element each: they run in step
FEWEST = 8  # elements for each of them if there are more


def dealt(rows: int, columns: int) -> tuple[int, tuple[int, int]]:
    """How to launch a kernel for rows: how many blocks, and their shape: (threads of a row, rows). Powers of two."""
    wanted = max(min(columns, NARROW), -(-columns // FEWEST), 1)
    across = min(1 << (wanted - 1).bit_length(), THREADS)
    return blocks_for(rows, THREADS // across), (across, THREADS // across)


# -- a row: what its threads (lanes) do together -----------------------------------------------------------------------


@helper
def largest_of(found, mine):
    """The largest of the numbers that a row's threads have, of which none is nan."""
    lane, here = cuda.threadIdx.x, cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    found[here] = mine
    cuda.syncthreads()
    step = cuda.blockDim.x // 2
    while step > 0:
        if lane < step and found[here + step] > found[here]:
            found[here] = found[here + step]
        cuda.syncthreads()
        step //= 2
    return found[here - lane]


@helper
def total_of(found, mine):
    """The sum of the numbers that a row's threads have."""
    lane, here = cuda.threadIdx.x, cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    found[here] = mine
    cuda.syncthreads()
    step = cuda.blockDim.x // 2
    while step > 0:
        if lane < step:
            found[here] += found[here + step]
        cuda.syncthreads()
        step //= 2
    return found[here - lane]


@helper
def largest_in_row(x, row, columns, found):
    """The largest element; where there is nan, it may be any."""
    result = float32(-math.inf)
    for j in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
        if x[row, j] > result:
            result = x[row, j]
    return largest_of(found, result)


@helper
def sum_of_exponentials(x, row, columns, highest, found):
    """Σ e^(x - highest); nan if there is any nan."""
    result = float32(0)
    for j in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
        result += math.exp(x[row, j] - highest)
    return total_of(found, result)


# -- rows: x (rows, columns), of float32 -------------------------------------------------------------------------------
# A block's last threads may have no row. They take none of the turns, but wait where the others do.


@kernel
def softmax_rows(x, out):
    """out = e^x / Σ e^x."""
    maxima = cuda.shared.array(THREADS, float32)
    sums = cuda.shared.array(THREADS, float32)  # not the same: some thread may still have to read the maximum
    row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    columns = x.shape[1] if row < x.shape[0] else 0
    highest = largest_in_row(x, row, columns, maxima)
    factor = float32(1) / sum_of_exponentials(x, row, columns, highest, sums)
    for j in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
        out[row, j] = math.exp(x[row, j] - highest) * factor


@kernel
def log_softmax_rows(x, out):
    """out = x - log Σ e^x. (x - m) - log s is precise where m is 10,000, and x - (m + log s) is not."""
    maxima = cuda.shared.array(THREADS, float32)
    sums = cuda.shared.array(THREADS, float32)
    row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    columns = x.shape[1] if row < x.shape[0] else 0
    highest = largest_in_row(x, row, columns, maxima)
    denominator = sum_of_exponentials(x, row, columns, highest, sums)
    if columns > 0:
        logarithm = math.log(denominator)
        for j in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
            out[row, j] = (x[row, j] - highest) - logarithm


@kernel
def cross_entropy_rows(x, targets, losses, out):
    """out = softmax of x, losses = -log of its element at each row's target; nan for a target that is none."""
    maxima = cuda.shared.array(THREADS, float32)
    sums = cuda.shared.array(THREADS, float32)
    row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    columns = x.shape[1] if row < x.shape[0] else 0
    highest = largest_in_row(x, row, columns, maxima)
    denominator = sum_of_exponentials(x, row, columns, highest, sums)
    factor = float32(1) / denominator
    for j in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
        out[row, j] = math.exp(x[row, j] - highest) * factor
    if row < x.shape[0] and cuda.threadIdx.x == 0:
        target = targets[row] + columns if targets[row] < 0 else targets[row]
        if 0 <= target < columns:
            losses[row] = math.log(denominator) - (x[row, target] - highest)
        else:
            losses[row] = float32(math.nan)


@kernel
def cross_entropy_backward(scale, probabilities, targets, out):
    """out = scale (p - one_hot(target)); nan for a target that is none."""
    rows, columns = out.shape
    row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    if row < rows:
        target = targets[row] + columns if targets[row] < 0 else targets[row]
        factor = scale[row] if 0 <= target < columns else float32(math.nan)
        for j in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
            out[row, j] = factor * (probabilities[row, j] - (float32(1) if j == target else float32(0)))


# -- entry points ------------------------------------------------------------------------------------------------------


def over_rows(name: str, kernel: Any, xp: Any, x: Any, dim: int) -> Any:
    if dim not in (-1, x.ndim - 1):
        raise ValueError(f"{name}: the kernel goes over the last axis, not over {dim} of shape {x.shape}")
    out = xp.empty(x.shape, dtype="float32")
    if x.size:
        rows = row_by_row(x).reshape(-1, x.shape[-1])
        run(kernel, *dealt(*rows.shape), rows, out.reshape(rows.shape))
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
