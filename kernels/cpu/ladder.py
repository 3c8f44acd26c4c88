"""The rung of module 16's ladder that needs vectors by name: a tile of a product that never leaves the registers.

A core can start two multiplications with additions of whole vectors in each cycle, and has the result of each after
four. So at least eight sums must be on their way at any time, and none of them may go through memory. Here they are
twelve, six rows times two vectors, the most that fit beside their operands in the sixteen registers of a CPU without
AVX-512.
"""

from __future__ import annotations

import numpy as np

from tinytorch.kernels.cpu.jit import kernel
from tinytorch.kernels.cpu.vectors import LANES, address, blank, broadcast, fma, load, store, total

__all__ = ["ROWS", "multiply_add", "multiply_tile", "scratch", "tile_columns"]

ROWS = 6  # of a tile; it has two vectors of columns
STEP = 4 * LANES  # bytes from one vector to the next


@kernel
def tile_columns():
    """How many columns a tile has."""
    return 2 * LANES


@kernel
def scratch(rows, columns):
    """Room for a matrix of float32, whatever stands in it."""
    return np.empty((rows, columns), np.float32)


@kernel
def multiply_tile(panel, strip, tile):
    """tile (6, 2 LANES) = six rows of the left matrix times 2 LANES columns of the right one.

    Args:
        panel: (depth, 6), the rows; what is multiplied at one step lies together.
        strip: (depth, 2 LANES), the columns.
    """
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = e0 = e1 = f0 = f1 = blank()
    for k in range(panel.shape[0]):
        right = address(strip) + 2 * STEP * k
        x, y = load(right), load(right + STEP)
        a, b, c = broadcast(panel[k, 0]), broadcast(panel[k, 1]), broadcast(panel[k, 2])
        a0, b0, c0 = fma(a, x, a0), fma(b, x, b0), fma(c, x, c0)
        a1, b1, c1 = fma(a, y, a1), fma(b, y, b1), fma(c, y, c1)
        d, e, f = broadcast(panel[k, 3]), broadcast(panel[k, 4]), broadcast(panel[k, 5])
        d0, e0, f0 = fma(d, x, d0), fma(e, x, e0), fma(f, x, f0)
        d1, e1, f1 = fma(d, y, d1), fma(e, y, e1), fma(f, y, f1)
    out = address(tile)
    for row, (first, second) in enumerate(((a0, a1), (b0, b1), (c0, c1), (d0, d1), (e0, e1), (f0, f1))):
        store(out + 2 * STEP * row, first)
        store(out + 2 * STEP * row + STEP, second)


@kernel
def multiply_add(turns, x):
    """Nothing but multiplications with additions, 24 LANES operations a turn: how fast can this core be?"""
    a = b = c = d = e = f = g = h = i = j = k = m = blank()
    y = broadcast(x)
    for _ in range(turns):
        a, b, c, d, e, f = fma(a, y, y), fma(b, y, y), fma(c, y, y), fma(d, y, y), fma(e, y, y), fma(f, y, y)
        g, h, i, j, k, m = fma(g, y, y), fma(h, y, y), fma(i, y, y), fma(j, y, y), fma(k, y, y), fma(m, y, y)
    return total(a + b + c + d + e + f + g + h + i + j + k + m)
