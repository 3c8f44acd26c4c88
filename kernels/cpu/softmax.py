"""Softmax of rows, its logarithm, and cross-entropy fused with it.

NumPy goes over memory once for the maximum, once for the difference, once for the exponential, once for the sum, once
for the quotient. A kernel goes over a row three times, and the row does not leave the cache in between. Rows are
independent: the cores take blocks of them.

Nothing here may be added up in another order than it is written, except the lanes of a vector: (x - m) - log s is
precise where m is 10,000, and x - (m + log s) is not.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import intrinsic

from tinytorch.kernels.cpu.elementwise import vexp
from tinytorch.kernels.cpu.jit import kernel, plain, run
from tinytorch.kernels.cpu.vectors import (
    LANES,
    address,
    blank,
    broadcast,
    largest,
    load,
    load_part,
    maximum,
    part_mask,
    store,
    store_part,
    total,
    vector,
)

BLOCK = 4096  # elements that are worth to be dealt out to a core

# -- a row -------------------------------------------------------------------------------------------------------------
# `start` is the address of a row of `count` float32.


@intrinsic
def first_lanes(typing, a, count, b):
    """a in the first `count` lanes, b in the others."""

    def generate(context, builder, signature, arguments):
        a, count, b = arguments
        return builder.select(part_mask(builder, count), a, b)

    return vector(vector, types.int64, vector), generate


@kernel(forceinline=True)
def row_maximum(start, count):
    """The largest element; where there is nan, it may be any."""
    result = broadcast(-np.inf)
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        result = maximum(result, load(start + 4 * i))
    if whole < count:
        rest = load_part(start + 4 * whole, count - whole)
        result = maximum(result, first_lanes(rest, count - whole, result))
    return largest(result)


@kernel(forceinline=True)
def row_exponentials(start, count, highest, out):
    """Write e^(x - highest) to another row, and return their sum; nan if there is any nan."""
    result, highest = blank(), broadcast(highest)
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        value = vexp(load(start + 4 * i) - highest)
        store(out + 4 * i, value)
        result = result + value
    if whole < count:
        value = vexp(load_part(start + 4 * whole, count - whole) - highest)
        store_part(out + 4 * whole, value, count - whole)
        result = result + first_lanes(value, count - whole, blank())
    return total(result)


@kernel(forceinline=True)
def row_sum_of_exponentials(start, count, highest):
    """The sum of e^(x - highest)."""
    result, highest = blank(), broadcast(highest)
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        result = result + vexp(load(start + 4 * i) - highest)
    if whole < count:
        value = vexp(load_part(start + 4 * whole, count - whole) - highest)
        result = result + first_lanes(value, count - whole, blank())
    return total(result)


@kernel(forceinline=True)
def row_times(start, count, factor, out):
    """Write factor times the row to another row, which may be itself."""
    factor = broadcast(factor)
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        store(out + 4 * i, load(start + 4 * i) * factor)
    if whole < count:
        store_part(out + 4 * whole, load_part(start + 4 * whole, count - whole) * factor, count - whole)


@kernel(forceinline=True)
def row_minus(start, count, first, second, out):
    """Write (x - first) - second to another row."""
    first, second = broadcast(first), broadcast(second)
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        store(out + 4 * i, load(start + 4 * i) - first - second)
    if whole < count:
        value = load_part(start + 4 * whole, count - whole) - first - second
        store_part(out + 4 * whole, value, count - whole)


# -- rows: x (rows, columns) -------------------------------------------------------------------------------------------
# Each kernel does the rows from start to stop, and its twin deals out blocks of them.


@kernel
def softmax_rows(x, out, start, stop):
    """out = e^x / Σ e^x."""
    columns = x.shape[1]
    for row in range(start, stop):
        source, target = address(x) + 4 * columns * row, address(out) + 4 * columns * row
        denominator = row_exponentials(source, columns, row_maximum(source, columns), target)
        row_times(target, columns, np.float32(1 / denominator), target)


@kernel(parallel=True)
def softmax_rows_parallel(x, out, start, stop):
    size = max(1, BLOCK // x.shape[1])
    for block in prange((stop - start + size - 1) // size):
        first = start + block * size
        softmax_rows(x, out, first, min(first + size, stop))


@kernel
def log_softmax_rows(x, out, start, stop):
    """out = x - log Σ e^x."""
    columns = x.shape[1]
    for row in range(start, stop):
        source, target = address(x) + 4 * columns * row, address(out) + 4 * columns * row
        highest = row_maximum(source, columns)
        logarithm = np.float32(math.log(row_sum_of_exponentials(source, columns, highest)))
        row_minus(source, columns, highest, logarithm, target)


@kernel(parallel=True)
def log_softmax_rows_parallel(x, out, start, stop):
    size = max(1, BLOCK // x.shape[1])
    for block in prange((stop - start + size - 1) // size):
        first = start + block * size
        log_softmax_rows(x, out, first, min(first + size, stop))


@kernel
def cross_entropy_rows(x, targets, losses, out, start, stop):
    """out = softmax of x, losses = -log of its element at each row's target; how many targets are none."""
    columns, wrong = x.shape[1], 0
    for row in range(start, stop):
        source, goal = address(x) + 4 * columns * row, address(out) + 4 * columns * row
        highest = row_maximum(source, columns)
        denominator = row_exponentials(source, columns, highest, goal)
        row_times(goal, columns, np.float32(1 / denominator), goal)
        target = targets[row] + columns if targets[row] < 0 else targets[row]
        if 0 <= target < columns:
            losses[row] = np.float32(math.log(denominator)) - (x[row, target] - highest)
        else:
            wrong += 1
    return wrong


@kernel(parallel=True)
def cross_entropy_rows_parallel(x, targets, losses, out, start, stop):
    size = max(1, BLOCK // x.shape[1])
    wrong = 0
    for block in prange((stop - start + size - 1) // size):
        first = start + block * size
        wrong += cross_entropy_rows(x, targets, losses, out, first, min(first + size, stop))
    return wrong


@kernel
def cross_entropy_backward(scale, probabilities, targets, out, start, stop):
    """out = scale (p - one_hot(target)); how many targets are none."""
    columns, wrong = out.shape[1], 0
    for row in range(start, stop):
        row_times(address(probabilities) + 4 * columns * row, columns, scale[row], address(out) + 4 * columns * row)
        target = targets[row] + columns if targets[row] < 0 else targets[row]
        if 0 <= target < columns:
            out[row, target] -= scale[row]
        else:
            wrong += 1
    return wrong


@kernel(parallel=True)
def cross_entropy_backward_parallel(scale, probabilities, targets, out, start, stop):
    size = max(1, BLOCK // out.shape[1])
    wrong = 0
    for block in prange((stop - start + size - 1) // size):
        first = start + block * size
        wrong += cross_entropy_backward(scale, probabilities, targets, out, first, min(first + size, stop))
    return wrong


# -- entry points ------------------------------------------------------------------------------------------------------


def _over_rows(name: str, serial: Any, parallel: Any, x: np.ndarray, dim: int) -> np.ndarray:
    if dim not in (-1, x.ndim - 1):
        raise ValueError(f"{name}: the kernel goes over the last axis, not over {dim} of shape {x.shape}")
    out = np.empty(x.shape, np.float32)
    if x.size:
        columns = x.shape[-1]
        rows = plain(x).reshape(-1, columns)
        run(serial, parallel, x.size, rows, out.reshape(-1, columns), 0, len(rows))
    return out


def softmax(xp: Any, x: np.ndarray, *, dim: int) -> np.ndarray:
    """e^x / Σ e^x over the last axis; nan where all of x is -inf."""
    return _over_rows("softmax", softmax_rows, softmax_rows_parallel, x, dim)


def log_softmax(xp: Any, x: np.ndarray, *, dim: int) -> np.ndarray:
    """x - log Σ e^x over the last axis."""
    return _over_rows("log_softmax", log_softmax_rows, log_softmax_rows_parallel, x, dim)


def softmax_cross_entropy(xp: Any, logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cross-entropy of each row, and the probabilities: (N, C) and (N,) -> (N,), (N, C)."""
    losses, probabilities = np.empty(len(logits), np.float32), np.empty(logits.shape, np.float32)
    wrong = run(cross_entropy_rows, cross_entropy_rows_parallel, logits.size, plain(logits),
                _int64(targets), losses, probabilities, 0, len(logits))  # fmt: skip
    if wrong:
        raise IndexError(f"softmax_cross_entropy: {wrong} targets are not between 0 and {logits.shape[1] - 1}")
    return losses, probabilities


def softmax_minus_one_hot(xp: Any, scale: np.ndarray, probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """scale (p - one_hot(target)) in each row: (N,), (N, C), (N,) -> (N, C)."""
    out = np.empty(probabilities.shape, np.float32)
    wrong = run(cross_entropy_backward, cross_entropy_backward_parallel, out.size // 4, plain(scale),
                plain(probabilities), _int64(targets), out, 0, len(out))  # fmt: skip
    if wrong:
        raise IndexError(f"softmax_minus_one_hot: {wrong} targets are not between 0 and {probabilities.shape[1] - 1}")
    return out


def _int64(targets: np.ndarray) -> np.ndarray:
    return plain(targets if targets.dtype == np.int64 else targets.astype(np.int64))
