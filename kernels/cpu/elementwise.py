"""Functions of single elements: exp, tanh, erf as polynomials on vectors, and activations and dropout made of them.

An elementwise operation is a pass over memory with arithmetic under it. NumPy makes a pass for each step, with one
core; a kernel makes one for all steps, with all cores. What is left to make fast are the transcendental functions, for
which CPUs have no instruction: a polynomial on a small range, and arithmetic that brings every number there.

Largest errors over all float32, against float64: exp 1.1 units in the last place, also where the result is denormal;
sigmoid 2.5; tanh 7, at most 4e-7; erf 8, at most 5e-7, because both are 1 in most places.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange
from numba.extending import intrinsic

from tinytorch.kernels.cpu.jit import kernel, plain, run
from tinytorch.kernels.cpu.vectors import (
    I32,
    LANES,
    VECTOR,
    address,
    blank,
    broadcast,
    fma,
    load,
    load_part,
    maximum,
    minimum,
    splat,
    store,
    store_part,
    vector,
    where_less,
)

# -- functions of vectors ----------------------------------------------------------------------------------------------
# Each is rounded as it is written: to add up in another order would undo what they do to keep their precision.


@intrinsic
def times_power_of_two(typing, a, shifted):
    """a 2^n in every lane, where `shifted` is n + 1.5 × 2^23: a float32 whose last bits are the integer n.

    2^n has n + 127 as its exponent's bits. Two factors, because 2^-150 and 2^128 are no float32, but a 2^n may be.
    """

    def generate(context, b, signature, arguments):
        def constant(number):
            return splat(b, ir.Constant(I32, number))

        integers = ir.VectorType(I32, LANES)
        n = b.sub(b.bitcast(arguments[1], integers), constant(0x4B400000))
        half = b.ashr(n, constant(1))
        result = arguments[0]
        for exponent in (half, b.sub(n, half)):
            bits = b.shl(b.add(exponent, constant(127)), constant(23))
            result = b.fmul(result, b.bitcast(bits, VECTOR))
        return result

    return vector(vector, vector), generate


@kernel(forceinline=True)
def vexp(x):
    """e^x in every lane.

    x = n log 2 + r with a whole number n, so e^x = 2^n e^r, and |r| <= 0.35, where seven terms of a series are enough.
    n is found by adding 1.5 × 2^23, beside which a float32 has no room for a fraction. log 2 is taken away in two
    parts: n times the first is exact.
    """
    x = minimum(maximum(x, broadcast(-104.0)), broadcast(89.0))  # e^-104 rounds to 0, e^89 to infinity
    shifted = fma(x, broadcast(1.44269504), broadcast(12582912.0))
    n = shifted - broadcast(12582912.0)
    r = fma(n, broadcast(-0.693359375), x)
    r = fma(n, broadcast(2.12194440e-4), r)
    p = fma(broadcast(1.9875691500e-4), r, broadcast(1.3981999507e-3))
    p = fma(p, r, broadcast(8.3334519073e-3))
    p = fma(p, r, broadcast(4.1665795894e-2))
    p = fma(p, r, broadcast(1.6666665459e-1))
    p = fma(p, r, broadcast(5.0000001201e-1))
    p = fma(p, r * r, r) + broadcast(1.0)
    return times_power_of_two(p, shifted)


@kernel(forceinline=True)
def vtanh(x):
    """tanh x in every lane: x P(x²) / Q(x²) on [-9, 9], beyond which it rounds to ±1 (a minimax quotient, Eigen's)."""
    x = minimum(maximum(x, broadcast(-9.0)), broadcast(9.0))
    z = x * x
    p = fma(broadcast(-2.76076847742355e-16), z, broadcast(2.00018790482477e-13))
    p = fma(p, z, broadcast(-8.60467152213735e-11))
    p = fma(p, z, broadcast(5.12229709037114e-08))
    p = fma(p, z, broadcast(1.48572235717979e-05))
    p = fma(p, z, broadcast(6.37261928875436e-04))
    p = fma(p, z, broadcast(4.89352455891786e-03))
    q = fma(broadcast(1.19825839466702e-06), z, broadcast(1.18534705686654e-04))
    q = fma(q, z, broadcast(2.26843463243900e-03))
    q = fma(q, z, broadcast(4.89352518554385e-03))
    return minimum(maximum(x * (p / q), broadcast(-1.0)), broadcast(1.0))  # rounding may lead beyond


@kernel(forceinline=True)
def verf(x):
    """erf x in every lane: x P(x²) / Q(x²) on [-4, 4], beyond which it rounds to ±1 (Eigen's, too)."""
    x = minimum(maximum(x, broadcast(-4.0)), broadcast(4.0))
    z = x * x
    p = fma(broadcast(-2.72614225801306e-10), z, broadcast(2.77068142495902e-08))
    p = fma(p, z, broadcast(-2.10102402082508e-06))
    p = fma(p, z, broadcast(-5.69250639462346e-05))
    p = fma(p, z, broadcast(-7.34990630326855e-04))
    p = fma(p, z, broadcast(-2.95459980854025e-03))
    p = fma(p, z, broadcast(-1.60960333262415e-02))
    q = fma(broadcast(-1.45660718464996e-05), z, broadcast(-2.13374055278905e-04))
    q = fma(q, z, broadcast(-1.68282697438203e-03))
    q = fma(q, z, broadcast(-7.37332916720468e-03))
    q = fma(q, z, broadcast(-1.42647390514189e-02))
    return minimum(maximum(x * (p / q), broadcast(-1.0)), broadcast(1.0))  # rounding may lead beyond


@kernel(forceinline=True)
def vsigmoid(x):
    """1 / (1 + e^-x) in every lane, with no exponent above 0, so that the left tail keeps its digits."""
    e = vexp(minimum(x, blank() - x))
    return where_less(x, blank(), e, broadcast(1.0)) / (broadcast(1.0) + e)


# -- passes over memory ------------------------------------------------------------------------------------------------
# Each kernel goes over the elements from start to stop; the last vector may be a part. Its parallel twin deals out
# blocks of one size, whatever the number of cores.

BLOCK = 8192
EXP, TANH, ERF, SIGMOID, SILU, RELU = range(6)


@kernel(forceinline=True)
def value_of(function, x):
    """One of the functions above, by its number; asked for each vector, which the CPU foresees."""
    if function == EXP:
        return vexp(x)
    if function == TANH:
        return vtanh(x)
    if function == ERF:
        return verf(x)
    if function == SIGMOID:
        return vsigmoid(x)
    if function == SILU:
        return x * vsigmoid(x)
    return maximum(x, blank())  # x where it is nan


@kernel
def apply(function, x, out, start, stop):
    """out = function(x)."""
    for i in range(4 * start, 4 * stop, 4 * LANES):  # in bytes
        rest = stop - i // 4
        if rest >= LANES:
            store(address(out) + i, value_of(function, load(address(x) + i)))
        else:
            store_part(address(out) + i, value_of(function, load_part(address(x) + i, rest)), rest)


@kernel(parallel=True)
def apply_parallel(function, x, out, start, stop):
    for block in prange((stop - start + BLOCK - 1) // BLOCK):
        first = start + block * BLOCK
        apply(function, x, out, first, min(first + BLOCK, stop))


@kernel(forceinline=True)
def normal_cdf(by_tanh, x):
    """Φ(x) in every lane, by erf or by GPT-2's approximation."""
    if by_tanh:
        inner = fma(x * x, broadcast(0.044715), broadcast(1.0)) * x * broadcast(2 * math.sqrt(2 / math.pi))
        return vsigmoid(inner)  # (1 + tanh(u / 2)) / 2, with all digits where it is nearly 0
    return fma(verf(x * broadcast(math.sqrt(0.5))), broadcast(0.5), broadcast(0.5))


@kernel
def gelu(by_tanh, x, out, cdf, start, stop):
    """cdf = Φ(x), out = x Φ(x)."""
    for i in range(4 * start, 4 * stop, 4 * LANES):
        rest = stop - i // 4
        if rest >= LANES:
            v = load(address(x) + i)
            share = normal_cdf(by_tanh, v)
            store(address(cdf) + i, share)
            store(address(out) + i, v * share)
        else:
            v = load_part(address(x) + i, rest)
            share = normal_cdf(by_tanh, v)
            store_part(address(cdf) + i, share, rest)
            store_part(address(out) + i, v * share, rest)


@kernel(parallel=True)
def gelu_parallel(by_tanh, x, out, cdf, start, stop):
    for block in prange((stop - start + BLOCK - 1) // BLOCK):
        first = start + block * BLOCK
        gelu(by_tanh, x, out, cdf, first, min(first + BLOCK, stop))


@kernel(forceinline=True)
def gelu_slope(by_tanh, x, cdf):
    """Φ(x) + x φ(x) in every lane."""
    square = x * x
    if by_tanh:  # Φ = (1 + tanh u) / 2, so φ = 2 Φ (1 - Φ) u'
        density = fma(square, broadcast(3 * 0.044715), broadcast(1.0)) * broadcast(2 * math.sqrt(2 / math.pi))
        density = density * cdf * (broadcast(1.0) - cdf)
    else:
        density = vexp(square * broadcast(-0.5)) * broadcast(1 / math.sqrt(2 * math.pi))
    return fma(x, density, cdf)


@kernel
def gelu_backward(by_tanh, g, x, cdf, out, start, stop):
    """out = g (Φ(x) + x φ(x))."""
    for i in range(4 * start, 4 * stop, 4 * LANES):
        rest = stop - i // 4
        if rest >= LANES:
            slope = gelu_slope(by_tanh, load(address(x) + i), load(address(cdf) + i))
            store(address(out) + i, load(address(g) + i) * slope)
        else:
            slope = gelu_slope(by_tanh, load_part(address(x) + i, rest), load_part(address(cdf) + i, rest))
            store_part(address(out) + i, load_part(address(g) + i, rest) * slope, rest)


@kernel(parallel=True)
def gelu_backward_parallel(by_tanh, g, x, cdf, out, start, stop):
    for block in prange((stop - start + BLOCK - 1) // BLOCK):
        first = start + block * BLOCK
        gelu_backward(by_tanh, g, x, cdf, out, first, min(first + BLOCK, stop))


# These two are simple enough for the compiler to find the vectors.


@kernel
def relu_backward(g, y, out, start, stop):
    """out = g where y > 0, and 0 elsewhere."""
    g, y, out = g[start:stop], y[start:stop], out[start:stop]
    for i in range(len(out)):
        out[i] = g[i] if y[i] > 0 else np.float32(0)


@kernel(parallel=True)
def relu_backward_parallel(g, y, out, start, stop):
    for block in prange((stop - start + BLOCK - 1) // BLOCK):
        first = start + block * BLOCK
        relu_backward(g, y, out, first, min(first + BLOCK, stop))


@kernel
def drop_some(x, noise, p, scale, out, start, stop):
    """out = scale x where noise >= p, and 0 x elsewhere."""
    x, noise, out = x[start:stop], noise[start:stop], out[start:stop]
    for i in range(len(out)):
        factor = scale if noise[i] >= p else np.float32(0)
        out[i] = x[i] * factor


@kernel(parallel=True)
def drop_some_parallel(x, noise, p, scale, out, start, stop):
    for block in prange((stop - start + BLOCK - 1) // BLOCK):
        first = start + block * BLOCK
        drop_some(x, noise, p, scale, out, first, min(first + BLOCK, stop))


# -- entry points ------------------------------------------------------------------------------------------------------


def _apply(function: int, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    out = np.empty(x.shape, np.float32) if out is None else out
    work = x.size // 4 if function == RELU else x.size
    run(apply, apply_parallel, work, function, plain(x).reshape(-1), out.reshape(-1), 0, x.size)
    return out


def relu(xp: Any, x: np.ndarray) -> np.ndarray:
    """max(x, 0); nan stays nan."""
    return _apply(RELU, x)


def rectify(x: np.ndarray) -> np.ndarray:
    """The same where it lies: row by row."""
    return _apply(RELU, x, out=x)


def exp(xp: Any, x: np.ndarray) -> np.ndarray:
    """e^x."""
    return _apply(EXP, x)


def tanh(xp: Any, x: np.ndarray) -> np.ndarray:
    """tanh x."""
    return _apply(TANH, x)


def erf(xp: Any, x: np.ndarray) -> np.ndarray:
    """erf x."""
    return _apply(ERF, x)


def sigmoid(xp: Any, x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x)."""
    return _apply(SIGMOID, x)


def silu(xp: Any, x: np.ndarray) -> np.ndarray:
    """x / (1 + e^-x)."""
    return _apply(SILU, x)


def gelu_and_cdf(xp: Any, x: np.ndarray, *, approximate: str = "none") -> tuple[np.ndarray, np.ndarray]:
    """x Φ(x) and Φ(x)."""
    out, cdf = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)
    by_tanh = approximate != "none"
    run(gelu, gelu_parallel, x.size, by_tanh, plain(x).reshape(-1), out.reshape(-1), cdf.reshape(-1), 0, x.size)
    return out, cdf


def gelu_gradient(xp: Any, g: np.ndarray, x: np.ndarray, cdf: np.ndarray, *, approximate: str) -> np.ndarray:
    """g (Φ(x) + x φ(x)); g, x and cdf have one shape."""
    out = np.empty(x.shape, np.float32)
    arrays = [plain(array).reshape(-1) for array in (g, x, cdf)]
    run(gelu_backward, gelu_backward_parallel, x.size, approximate != "none", *arrays, out.reshape(-1), 0, x.size)
    return out


def relu_gradient(xp: Any, g: np.ndarray, y: np.ndarray) -> np.ndarray:
    """g where y > 0, and 0 elsewhere; g and y have one shape."""
    out = np.empty(g.shape, np.float32)
    run(relu_backward, relu_backward_parallel, g.size // 4, plain(g).reshape(-1), plain(y).reshape(-1),
        out.reshape(-1), 0, g.size)  # fmt: skip
    return out


def drop(xp: Any, x: np.ndarray, noise: np.ndarray, *, p: float) -> np.ndarray:
    """x / (1 - p) where the noise of x's shape, uniform on [0, 1), is at least p; 0 elsewhere."""
    out = np.empty(x.shape, np.float32)
    scale = np.float32(0.0 if p == 1 else 1 / (1 - p))
    run(drop_some, drop_some_parallel, x.size // 2, plain(x).reshape(-1), plain(noise).reshape(-1), np.float32(p),
        scale, out.reshape(-1), 0, x.size)  # fmt: skip
    return out
