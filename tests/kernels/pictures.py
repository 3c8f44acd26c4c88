"""What the tests of kernels over pictures share: drawn windows, and arrays that lie in all ways."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from tinytorch.backends import get_backend
from tinytorch.m09_spatial import Windows, lay_windows

XP = get_backend("cpu")


@st.composite
def geometries(draw: Any, longest: int = 40, largest_window: int = 5, averages: bool = False) -> Windows:
    """Windows over pictures: of any size, stride, dilation and padding that is not the same on all sides.

    Args:
        averages: only what average pooling takes, where each window has a pixel in it.
    """
    axes = []
    for _ in range(2):
        size, dilation = draw(st.integers(1, largest_window)), 1 if averages else draw(st.integers(1, 3))
        stride = draw(st.one_of(st.integers(1, 3), st.integers(1, 7)))
        most = (size // 2, size // 2) if averages else (size, size + stride)
        padding = draw(st.integers(0, most[0])), draw(st.integers(0, most[1]))
        span = dilation * (size - 1) + 1
        shortest = max(1, span - sum(padding))
        axes.append((draw(st.integers(shortest, max(longest, shortest))), size, stride, padding, dilation))
    shape, *rest = zip(*axes, strict=True)
    return lay_windows("drawn", shape, *rest)


def windows_of(shape: tuple, size: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Windows:
    return lay_windows("test", shape, (size,) * 2, (stride,) * 2, ((padding,) * 2,) * 2, (dilation,) * 2)


def laid_out(array: np.ndarray, how: str) -> np.ndarray:
    """The same values, as another part of the program could hand them over."""
    if how == "plain":
        return array
    if how == "read-only":
        array = array.copy()
        array.setflags(write=False)
        return array
    if how == "turned":
        return np.ascontiguousarray(array.T).T
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1] + 1), 7, array.dtype)  # "strided"
    wide[..., 1::2] = array
    return wide[..., 1::2]


LAYOUTS = ("plain", "read-only", "turned", "strided")


def near(actual: np.ndarray, expected: np.ndarray, rtol: float = 1e-5) -> None:
    """Assert that a float32 result is what float64 gives, but for 1e-5 of its largest finite element."""
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    finite = np.abs(expected[np.isfinite(expected)])
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * float(finite.max(initial=0)))
