"""Rotary positions on the GPU: a thread for each pair of features, and neighbours have neighbouring pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, uint32

from tinytorch.kernels.cuda.jit import THREADS, blocks_for, kernel, readable, run

__all__ = ["rotate"]

LEADS = 3  # axes before the features that the kernel knows


@kernel
def turn(x, cos, sin, out):
    """out (A, B, C, D) = x (A, B, C, D), of which pairs (k, k + D / 2) are turned by angles with cos and sin.

    Each block has a part of a C x D / 2. Numbers are of uint32: their division takes a GPU a fifth of the time.
    """
    half = uint32(x.shape[3] // 2)
    parts = uint32((x.shape[2] * half + cuda.blockDim.x - 1) // cuda.blockDim.x)
    block, second = uint32(cuda.blockIdx.x), uint32(x.shape[1])
    number, pair = uint32(block % parts * cuda.blockDim.x + cuda.threadIdx.x), uint32(block // parts)
    row, low = uint32(number // half), uint32(number % half)
    a, b, high = uint32(pair // second), uint32(pair % second), low + half
    if row < x.shape[2]:
        one, other = x[a, b, row, low], x[a, b, row, high]
        out[a, b, row, low] = one * cos[a, b, row, low] - other * sin[a, b, row, low]
        out[a, b, row, high] = other * cos[a, b, row, high] + one * sin[a, b, row, high]


def rotate(xp: Any, x: Any, cos: Any, sin: Any) -> Any:
    """Turn the pairs (x_k, x_(k + D/2)) of x (…, T, D) by angles with these cosines and sines: module 12's twin."""
    if x.shape[-1] % 2 or x.shape[-1:] != cos.shape[-1:] or cos.shape != sin.shape:
        shapes = f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        raise ValueError(f"rotate: expected (…, T, D) and two (T, D), D even, got x {tuple(x.shape)}, {shapes}")
    shape = np.broadcast_shapes(x.shape, cos.shape)
    if not math.prod(shape):
        return xp.empty(shape, dtype="float32")
    # To the kernel an axis before the features is like the other. So it has them in the order of memory, and the result
    # lies as the input does: heads are views of what one linear layer made.
    x, cos, sin = (xp.broadcast_to(a, shape) for a in (x, cos, sin))
    order = (*sorted(range(len(shape) - 1), key=lambda axis: -x.strides[axis]), len(shape) - 1)
    x, cos, sin = (xp.permute_dims(a, order) for a in (x, cos, sin))
    out = xp.empty(x.shape, dtype="float32")
    rotate_into(xp, x, cos, sin, out)
    return xp.permute_dims(out, tuple(map(order.index, range(len(order)))))


def rotate_into(xp: Any, x: Any, cos: Any, sin: Any, out: Any) -> None:
    """`rotate` of arrays of one shape, which are not empty, into one that lies row by row."""
    lead, features = out.shape[:-1], out.shape[-1]
    if len(lead) > LEADS:
        lead = (math.prod(lead[: 1 - LEADS]), *lead[1 - LEADS :])
    shape = (*(1,) * (LEADS - len(lead)), *lead, features)
    a, b, c = shape[:-1]
    arrays = (readable(xp.reshape(array, shape)) for array in (x, cos, sin))
    run(turn, a * b * blocks_for(c * (features // 2)), THREADS, *arrays, xp.reshape(out, shape))
