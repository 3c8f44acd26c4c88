"""Activations, their gradients and dropout, each in one pass over the device's memory.

An elementwise operation costs what it reads and writes: a GPU does dozens of multiplications in the time that it takes
to fetch one number. CuPy launches a kernel for each step of a formula, and each of them goes over memory; here one does
them all. exp, tanh, erf and relu have one step, so there is nothing to gain, and they are not here.

Each thread has one element, its neighbour the next one: the 32 numbers that a warp fetches lie side by side.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, float32

from tinytorch.kernels.cuda.jit import THREADS, blocks_for, helper, kernel, row_by_row, run

__all__ = ["drop", "gelu_and_cdf", "gelu_gradient", "relu_gradient", "sigmoid", "silu"]

ROOT_OF_HALF, ROOT_OF_8_OVER_PI = math.sqrt(0.5), math.sqrt(8 / math.pi)
PEAK = 1 / math.sqrt(2 * math.pi)  # of the normal distribution's density

# -- kernels: all arrays are flat, of float32, and of one length -------------------------------------------------------


@helper
def sigmoid_of(v):
    """1 / (1 + e^-v), with no exponent above 0, so that the left tail keeps its digits."""
    e = math.exp(-abs(v))
    return (e if v < 0 else float32(1)) / (float32(1) + e)


@kernel
def sigmoids(x, out):
    i = cuda.grid(1)
    if i < x.size:
        out[i] = sigmoid_of(x[i])


@kernel
def silus(x, out):
    i = cuda.grid(1)
    if i < x.size:
        out[i] = x[i] * sigmoid_of(x[i])


@kernel
def gelu(by_tanh, x, out, cdf):
    """cdf = Φ(x), by erf or by GPT-2's approximation; out = x Φ(x)."""
    i = cuda.grid(1)
    if i < x.size:
        v = x[i]
        if by_tanh:  # (1 + tanh(u / 2)) / 2 is the sigmoid of u, with all digits where it is nearly 0
            share = sigmoid_of((v * v * float32(0.044715) + float32(1)) * v * float32(ROOT_OF_8_OVER_PI))
        else:
            share = float32(0.5) + float32(0.5) * math.erf(v * float32(ROOT_OF_HALF))
        cdf[i] = share
        out[i] = v * share


@kernel
def gelu_backward(by_tanh, g, x, cdf, out):
    """out = g (Φ(x) + x φ(x))."""
    i = cuda.grid(1)
    if i < x.size:
        v, share = x[i], cdf[i]
        if by_tanh:  # Φ = (1 + tanh u) / 2, so φ = 2 Φ (1 - Φ) u'
            slope = (v * v * float32(3 * 0.044715) + float32(1)) * float32(ROOT_OF_8_OVER_PI)
            density = slope * share * (float32(1) - share)
        else:
            density = math.exp(v * v * float32(-0.5)) * float32(PEAK)
        out[i] = g[i] * (share + v * density)


@kernel
def relu_backward(g, y, out):
    i = cuda.grid(1)
    if i < y.size:
        out[i] = g[i] if y[i] > 0 else float32(0)


@kernel
def drop_some(x, noise, p, scale, out):
    """out = scale x where noise >= p, and 0 x elsewhere: nan stays nan."""
    i = cuda.grid(1)
    if i < x.size:
        out[i] = x[i] * (scale if noise[i] >= p else float32(0))


# -- entry points ------------------------------------------------------------------------------------------------------


def flat(array: Any) -> Any:
    return row_by_row(array).reshape(-1)


def sigmoid(xp: Any, x: Any) -> Any:
    """1 / (1 + e^-x)."""
    out = xp.empty(x.shape, dtype="float32")
    run(sigmoids, blocks_for(x.size), THREADS, flat(x), out.reshape(-1))
    return out


def silu(xp: Any, x: Any) -> Any:
    """x / (1 + e^-x)."""
    out = xp.empty(x.shape, dtype="float32")
    run(silus, blocks_for(x.size), THREADS, flat(x), out.reshape(-1))
    return out


def gelu_and_cdf(xp: Any, x: Any, *, approximate: str = "none") -> tuple[Any, Any]:
    """x Φ(x) and Φ(x)."""
    out, cdf = (xp.empty(x.shape, dtype="float32") for _ in range(2))
    run(gelu, blocks_for(x.size), THREADS, approximate != "none", flat(x), out.reshape(-1), cdf.reshape(-1))
    return out, cdf


def gelu_gradient(xp: Any, g: Any, x: Any, cdf: Any, *, approximate: str) -> Any:
    """g (Φ(x) + x φ(x)); g, x and cdf have one shape."""
    out = xp.empty(x.shape, dtype="float32")
    arrays = flat(g), flat(x), flat(cdf)
    run(gelu_backward, blocks_for(x.size), THREADS, approximate != "none", *arrays, out.reshape(-1))
    return out


def relu_gradient(xp: Any, g: Any, y: Any) -> Any:
    """g where y > 0, and 0 elsewhere; g and y have one shape."""
    out = xp.empty(g.shape, dtype="float32")
    run(relu_backward, blocks_for(g.size), THREADS, flat(g), flat(y), out.reshape(-1))
    return out


def drop(xp: Any, x: Any, noise: Any, *, p: float) -> Any:
    """x / (1 - p) where the noise of x's shape, uniform on [0, 1), is at least p; 0 elsewhere."""
    out = xp.empty(x.shape, dtype="float32")
    scale = np.float32(0.0 if p == 1 else 1 / (1 - p))
    run(drop_some, blocks_for(x.size), THREADS, flat(x), flat(noise), np.float32(p), scale, out.reshape(-1))
    return out
