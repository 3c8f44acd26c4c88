"""A matrix product on the GPU, twice: one thread for each element, and with tiles that a block of threads shares.

The first is three lines, and slow: each thread fetches a whole row and a whole column from the GPU's memory, two
numbers for each multiplication. In the second a block of 16×16 threads fetches a tile of each matrix into shared
memory, which lies beside the arithmetic units; each number is then used sixteen times before the block goes on.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, float32

from tinytorch.kernels.cuda.jit import MOST_BLOCKS, kernel, row_by_row, run

__all__ = ["matmul", "matmul_by_elements"]

TILE = 16


@kernel
def multiply_by_elements(a, b, out):
    """out (N, M, L) = a (N, M, K) @ b (N, K, L), of float32. Neighbouring threads have neighbouring columns."""
    column, row, first = cuda.grid(3)
    if row < out.shape[1] and column < out.shape[2]:
        for n in range(first, out.shape[0], cuda.gridDim.z):
            total = float32(0)
            for k in range(a.shape[2]):
                total += a[n, row, k] * b[n, k, column]
            out[n, row, column] = total


@kernel
def multiply_by_tiles(a, b, out):
    """out (N, M, L) = a (N, M, K) @ b (N, K, L), of float32; each block of threads has a tile of out at a time."""
    left = cuda.shared.array((TILE, TILE), float32)  # on lines of their own: on one, the simulator takes both for one
    right = cuda.shared.array((TILE, TILE), float32)
    column, row, first = cuda.grid(3)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    for n in range(first, out.shape[0], cuda.gridDim.z):
        total = float32(0)
        for start in range(0, a.shape[2], TILE):
            # Each thread brings one number of each tile; all of them do, also those whose own element is outside.
            left[y, x] = right[y, x] = 0
            if row < a.shape[1] and start + x < a.shape[2]:
                left[y, x] = a[n, row, start + x]
            if start + y < b.shape[1] and column < b.shape[2]:
                right[y, x] = b[n, start + y, column]
            cuda.syncthreads()  # the tiles are there
            for k in range(TILE):
                total += left[y, k] * right[k, x]
            cuda.syncthreads()  # nobody needs them any more
        if row < out.shape[1] and column < out.shape[2]:
            out[n, row, column] = total


def matmul(xp: Any, a: Any, b: Any) -> Any:
    """The matrix product over the last two axes, broadcast over the others; vectors as in NumPy."""
    return launch(multiply_by_tiles, xp, a, b)


def matmul_by_elements(xp: Any, a: Any, b: Any) -> Any:
    """As `matmul`, without tiles."""
    return launch(multiply_by_elements, xp, a, b)


def launch(multiply: Any, xp: Any, a: Any, b: Any) -> Any:
    """The product by one of the kernels, which know stacks of matrices only."""
    left = xp.reshape(a, (1, -1)) if a.ndim == 1 else a
    right = xp.reshape(b, (-1, 1)) if b.ndim == 1 else b
    (rows, depth), columns = left.shape[-2:], right.shape[-1]
    if right.ndim == 2:  # one matrix for all: a stack of left ones is one of more rows
        lead, count, rows = left.shape[:-2], 1, math.prod(left.shape[:-1])
        left, right = xp.reshape(left, (1, rows, depth)), xp.reshape(right, (1, depth, columns))
    else:
        lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        count = math.prod(lead)
        left = xp.reshape(xp.broadcast_to(left, (*lead, rows, depth)), (count, rows, depth))
        right = xp.reshape(xp.broadcast_to(right, (*lead, depth, columns)), (count, depth, columns))
    out = xp.empty((count, rows, columns), dtype=a.dtype)
    if math.prod(out.shape):
        blocks = -(-columns // TILE), -(-rows // TILE), min(count, MOST_BLOCKS)
        run(multiply, blocks, (TILE, TILE, 1), row_by_row(left), row_by_row(right), out)
    return xp.reshape(out, (*lead, *a.shape[:-1][-1:], *b.shape[1:][-1:]))
