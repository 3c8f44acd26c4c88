"""A convolution on the GPU, as readable as it gets: one thread for each element of the result, and the loops of the
formula in it. Neighbouring threads have neighbouring windows, so that what they read lies side by side.
"""

from __future__ import annotations

import math
from typing import Any

from numba import cuda, float32

from tinytorch.kernels.cuda.jit import THREADS, blocks_for, kernel, row_by_row, run

__all__ = ["convolution"]


@kernel
def convolve(x, weight, bias, out, stride, dilation, before, groups, relu):
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


def convolution(
    xp: Any, x: Any, weight: Any, bias: Any = None, *, windows: Any, groups: int, activation: str | None = None
) -> Any:
    """The convolution of (N, C, H, W) with (O, C / groups, KH, KW), plus bias (O,): (N, O, OH, OW)."""
    out = xp.empty((x.shape[0], weight.shape[0], *windows.count), dtype=x.dtype)
    if size := math.prod(out.shape):
        before = windows.padding[0][0], windows.padding[1][0]
        bias = None if bias is None else row_by_row(bias)
        run(
            convolve, blocks_for(size), THREADS, row_by_row(x), row_by_row(weight), bias, out, windows.stride,
            windows.dilation, before, groups, activation == "relu",
        )  # fmt: skip
    return out
