"""The NumPy backend: the one that is always there."""

from __future__ import annotations

import ctypes
import math
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import array_api_compat.numpy as namespace
import numpy as np

from tinytorch.backends.base import Array, Backend

# log(0) is -inf and 0/0 is nan, silently, as in every deep-learning framework. Only warnings that NumPy attributes to
# this package's own lines are turned off; the user's NumPy code keeps its warnings.
warnings.filterwarnings("ignore", r".* encountered in ", RuntimeWarning, module=r"tinytorch\.")


def keep_freed_memory() -> bool:
    """Have the C library reuse large blocks of memory instead of returning each to the system; whether it could.

    NumPy asks malloc for the memory of every result. By default glibc maps large blocks anew and returns them when they
    are freed, and the first write to each new page costs a page fault: a 400 KB matrix product takes 80 µs with
    reused memory and 220 µs without, a sum of 40 MB 1.6 ms and 3.5. The price is that freed memory stays with the
    process: up to half a gigabyte at the end of its heap, and whatever lies before something that is still in use.
    TINYTORCH_MALLOC=system, or glibc's own MALLOC_ variables, leave things as they are.
    """
    if os.environ.get("TINYTORCH_MALLOC") == "system" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        libc = ctypes.CDLL(None)
        kept = bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT))
    except (OSError, AttributeError, TypeError):  # not glibc: macOS, Windows, musl
        return False
    if kept:
        take_large_pages(libc)
    return kept


def take_large_pages(libc: Any) -> None:
    """Have Linux lay the heap in pages of 2 MB, if it can, for some way ahead of what is in use.

    A processor looks up where a page is before it reads or writes there, and remembers the places of a few thousand:
    with pages of 4 KB, less than one training step touches. A training step of a small GPT takes 0.96 of the time with
    large ones. The heap is made that long at once, because what it grows by later would not be told. No memory is taken
    by that before something is written to it.
    """
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    start = libc.sbrk(0)
    libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(TOLD_AHEAD))))
    start, stop = -(-start // LARGE_PAGE) * LARGE_PAGE, libc.sbrk(0) // LARGE_PAGE * LARGE_PAGE
    if start < stop:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_HUGEPAGE)


M_TRIM_THRESHOLD, M_MMAP_MAX, MADV_HUGEPAGE = -1, -4, 14  # from glibc's malloc.h and Linux's mman.h
MOST_KEPT, TOLD_AHEAD, LARGE_PAGE = 512 << 20, 384 << 20, 2 << 20


def let_blas_threads_sleep() -> bool:
    """Have OpenBLAS's threads wait for work in a loop for 0.1 ms at most; whether they could be told.

    By default they do so for 20 ms after each matrix product, and take turns with whatever else needs their cores: a
    training step of a convolutional network, whose kernels use all cores, took 20 ms with that and 9 without. A tenth
    of a millisecond still serves a product that follows another one. OpenBLAS reads the time when it starts threads,
    so those it has are ended, and it starts new ones for the next product. OPENBLAS_THREAD_TIMEOUT, in powers of two
    of the processor's cycles, leaves things as they are.
    """
    if "OPENBLAS_THREAD_TIMEOUT" in os.environ:
        return False
    try:
        with open("/proc/self/maps") as file:
            places = {line.split(maxsplit=5)[5].strip() for line in file if "openblas" in line}
    except OSError:  # not Linux
        return False
    told = False
    os.environ["OPENBLAS_THREAD_TIMEOUT"] = "18"
    try:
        for place in places:
            library = ctypes.CDLL(place)
            if hasattr(library, "openblas_read_env") and hasattr(library, "blas_thread_shutdown_"):
                library.openblas_read_env()
                library.blas_thread_shutdown_()
                told = True
    except OSError:
        pass
    finally:
        del os.environ["OPENBLAS_THREAD_TIMEOUT"]  # it is no matter of programs that this one starts
    return told


class NumpyBackend(Backend):
    """NumPy on the CPU."""

    name = "numpy"

    def __init__(self) -> None:
        super().__init__(namespace, "cpu", np.ndarray)
        keep_freed_memory()
        let_blas_threads_sleep()

    def native(self, dtype: Any) -> Any:
        return np.dtype(dtype)  # the namespace has NumPy's scalar types in the dtypes' place

    def is_floating(self, array: Array) -> bool:
        return array.dtype.kind == "f"

    def weak(self, number: Any, dtype_name: str) -> Any:
        return float(number) if isinstance(number, np.floating) else number  # NumPy's float64 is weak here, too

    def promote(self, inputs: list, floating: bool = False) -> list:
        # Nearly always all arrays are of one floating dtype, and then there is nothing to do.
        dtype = None
        for x in inputs:
            if isinstance(x, (int, float)):
                continue
            if dtype is None:
                dtype = x.dtype
            elif x.dtype is not dtype:
                return super().promote(inputs, floating)
        if dtype is None:
            return inputs
        if dtype.kind == "f":  # np.float64 is a Python float too, and as weak; NumPy would make the others that wide
            return [float(x) if type(x) is np.float64 else x for x in inputs]
        return super().promote(inputs, floating)

    # The standard's functions reach NumPy's loops through one to three microseconds of Python, which small arrays feel.
    # These are the ones on every training step's way.

    def matmul(self, a: Array, b: Array) -> Array:
        if a.ndim > 2 and b.ndim == 2 and a.size and a.flags.c_contiguous:  # one product, where NumPy makes many
            return np.matmul(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[1])
        return np.matmul(a, b)

    def reshape(self, x: Array, shape: tuple) -> Array:
        return x.reshape(shape)

    def permute_dims(self, x: Array, axes: tuple) -> Array:
        return x.transpose(axes)

    def expand_dims(self, x: Array, axis: int) -> Array:
        return x[(slice(None),) * (axis % (x.ndim + 1)) + (None,)]

    # Of rows, BLAS adds up each or all of them (a product with ones) five times as fast as NumPy's loop,
    # and argmax finds the largest of each four times as fast as max does.

    def sum(self, x: Array, axis: Any = None, keepdims: Any = False) -> Array:
        lead = rows_of(x, axis)
        if lead is None or x.dtype.char not in "fd":
            return np.add.reduce(x, axis=axis, keepdims=keepdims)
        if lead == x.ndim:  # the last axis goes
            total = x.reshape(-1, x.shape[-1]) @ ones(x.shape[-1], x.dtype)
            return total.reshape(*x.shape[:-1], 1) if keepdims else total.reshape(x.shape[:-1])
        rows = math.prod(x.shape[:lead])
        total = ones(rows, x.dtype) @ x.reshape(rows, -1)
        return total.reshape((1,) * lead + x.shape[lead:] if keepdims else x.shape[lead:])

    def mean(self, x: Array, axis: Any = None, keepdims: Any = False) -> Array:
        if x.dtype.itemsize < 4:
            return np.mean(x, axis=axis, keepdims=keepdims)  # adds halves up as singles
        total = self.sum(x, axis, keepdims=True)
        total /= np.asarray(x.size / max(total.size, 1), x.dtype)
        return total if keepdims else total.reshape(()) if axis is None else np.squeeze(total, axis)

    def max(self, x: Array, axis: Any = None, keepdims: Any = False) -> Array:
        if x.ndim and rows_of(x, axis) == x.ndim and x.dtype.kind == "f":
            rows = x.reshape(-1, x.shape[-1])
            largest = rows[np.arange(len(rows)), rows.argmax(axis=1)]  # nan is the largest to both
            return largest.reshape(*x.shape[:-1], 1) if keepdims else largest.reshape(x.shape[:-1])
        return np.maximum.reduce(x, axis=axis, keepdims=keepdims)

    def min(self, x: Array, axis: Any = None, keepdims: Any = False) -> Array:
        return np.minimum.reduce(x, axis=axis, keepdims=keepdims)

    def broadcast_to(self, x: Array, shape: tuple) -> Array:
        if x.size == 1 and len(shape) >= x.ndim:  # one number, repeated without memory: strides of 0
            repeated = np.ndarray(shape, x.dtype, np.asarray(x), 0, (0,) * len(shape))
            repeated.flags.writeable = False
            return repeated
        return np.broadcast_to(x, shape)

    def scatter_add(self, x: Array, index: Any, values: Array) -> Array:
        np.add.at(x, index, values)
        return x

    def erf(self, x: Array) -> Array:
        return erf(x)

    def einsum(self, equation: str, *arrays: Array) -> Array:
        return np.einsum(equation, *arrays, optimize=True)

    def sliding_windows(self, x: Array, size: tuple, stride: tuple, dilation: tuple) -> Array:
        rank = len(size)
        spans = tuple(d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True))
        windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=tuple(range(-rank, 0)))
        steps: Any = (..., *(slice(None, None, s) for s in (*stride, *dilation)))
        return windows[steps]

    def from_numpy(self, array: np.ndarray, wait: bool = True) -> Array:
        return np.asarray(array)

    def to_numpy(self, array: Array) -> np.ndarray:
        return np.asarray(array)

    def owns_memory(self, array: Array) -> bool:
        return type(array) is np.ndarray and array.base is None

    def whole_of(self, arrays: Sequence[Array], axis: int) -> Array | None:
        memory, shape = arrays[0].base, list(arrays[0].shape)
        shape[axis], start = sum(x.shape[axis] for x in arrays), 0
        if type(memory) is not np.ndarray or not memory.flags.c_contiguous or memory.size != math.prod(shape):
            return None
        whole = memory.reshape(shape)
        for x in arrays:
            place = whole[(slice(None),) * axis + (slice(start, start + x.shape[axis]),)]
            lies = place.dtype, place.shape, place.strides, place.ctypes.data
            if lies != (x.dtype, x.shape, x.strides, x.ctypes.data):
                return None
            start += x.shape[axis]
        return whole

    def buffer_id(self, array: Array) -> int:
        while isinstance(array.base, np.ndarray):
            array = array.base
        return id(array)


def rows_of(x: Array, axis: Any) -> int | None:
    """How many leading axes a reduction of a large array takes away; `x.ndim` where it takes the last one instead.

    None: it takes others, or the array is small, or does not lie row by row in memory.
    """
    if axis is None or x.size < 4096 or not x.flags.c_contiguous:
        return None
    axes = sorted(d + x.ndim if d < 0 else d for d in (axis if isinstance(axis, tuple) else (axis,)))
    if axes == [x.ndim - 1]:
        return x.ndim if x.ndim > 1 and x.shape[-1] <= 65536 else None
    return len(axes) if axes == list(range(len(axes))) and len(axes) < x.ndim else None


@lru_cache(maxsize=64)
def ones(count: int, dtype: np.dtype) -> Array:
    """A row of ones to multiply with."""
    return np.ones(count, dtype)


def erf(x: Array) -> Array:
    """The error function, which NumPy lacks: to 1e-16 in float64, to 3e-7 in float32."""
    return _erf_float32(x) if x.dtype == np.float32 else _erf_float64(x)


def _erf_float32(x: Array) -> Array:
    """x P(x²) / Q(x²) on [-4, 4], where float32's erf reaches ±1 (a minimax quotient, as Eigen has it)."""
    x = np.clip(x, np.float32(-4), np.float32(4))
    z = x * x
    return x * (_horner(z, _FLOAT32_P) / _horner(z, _FLOAT32_Q))


def _horner(z: Array, coefficients: tuple) -> Array:
    result = np.full_like(z, coefficients[0])
    for c in coefficients[1:]:
        result *= z
        result += np.float32(c)
    return result


def _erf_float64(x: Array) -> Array:
    """erf by W. J. Cody's rational approximations (Mathematics of Computation 23, 1969)."""
    y = np.minimum(np.abs(x), 10.0).astype(np.float64)  # 1 from 6 on, and infinity is not to be multiplied with
    small, far = y <= 0.46875, y > 4.0
    z = y * y
    inner = y * _rational(z, _SMALL_P, _SMALL_Q)
    outer = np.exp(-np.minimum(z, 700.0))
    middle = 1.0 - outer * _rational(y, _MIDDLE_P, _MIDDLE_Q)
    w = 1.0 / np.maximum(z, 1.0)
    tail = 1.0 - outer / np.maximum(y, 1.0) * (_ONE_OVER_SQRT_PI - w * _rational(w, _FAR_P, _FAR_Q))
    magnitude = np.where(small, inner, np.where(far, tail, middle))
    return np.where(np.isnan(x), x, np.copysign(magnitude, x)).astype(x.dtype)


def _rational(x: Array, numerator: tuple, denominator: tuple) -> Array:
    """A quotient of two polynomials, coefficients of the highest power first."""
    return np.polyval(numerator, x) / np.polyval(denominator, x)


_FLOAT32_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
              -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)  # fmt: skip
_FLOAT32_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
              -1.42647390514189e-02)  # fmt: skip
_ONE_OVER_SQRT_PI = 0.56418958354775628695
_SMALL_P = (1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2,
            3.20937758913846947e3)  # fmt: skip
_SMALL_Q = (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3)
_MIDDLE_P = (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
             2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
             1.23033935479799725e3)  # fmt: skip
_MIDDLE_Q = (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
             3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3)  # fmt: skip
_FAR_P = (1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
          1.60837851487422766e-2, 6.58749161529837803e-4)  # fmt: skip
_FAR_Q = (1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1, 6.05183413124413191e-2,
          2.33520497626869185e-3)  # fmt: skip
