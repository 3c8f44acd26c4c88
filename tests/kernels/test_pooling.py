"""Pooling kernels equal the operations that they stand in for, whatever the windows, and stay in their arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import LAYOUTS, XP, geometries, laid_out, near, windows_of
from tests.kernels.place import SIMULATED, cpu_only, drawn, kernels
from tinytorch import m09_spatial as m09
from tinytorch import m09_spatial_appendix as appendix
from tinytorch.m09_spatial import Windows

pooling = kernels("pooling")
HALVES = windows_of((8, 6), 2, 2)
drawn_windows = geometries(9, 3) if SIMULATED else geometries()
leads = st.sampled_from([(), (1,), (3,), (2, 3), (0, 2), (2, 0)])
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 1 << 30)


def pixels(seed: int, shape: tuple, special: bool = False) -> np.ndarray:
    """Whole numbers, of which many are equal; and nan and infinities, if asked for."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-4, 5, shape).astype("float32")
    if special and x.size:
        for value in (math.nan, math.inf, -math.inf):
            x[rng.random(shape) < 0.05] = value
    return x


@given(drawn_windows, leads, layouts, seeds, st.booleans())
@example(HALVES, (3,), "plain", 0, False)
@example(windows_of((4, 66), 2, 2), (3,), "plain", 0, True)
@drawn(150)
def test_max_pool_both_ways(windows: Windows, lead: tuple, layout: str, seed: int, special: bool) -> None:
    x = laid_out(pixels(seed, (*lead, *windows.shape), special), layout)
    double = x.astype("float64")
    out = pooling.max_pool(XP, x, windows=windows)
    largest = m09.max_pool.function(XP, double, windows=windows)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, largest)

    g = laid_out(np.random.default_rng(seed).normal(size=out.shape).astype("float32"), layout)
    expected = m09.scatter_to_maxima.function(XP, g.astype("float64"), double, largest, windows=windows)
    near(pooling.scatter_to_maxima(XP, g, x, laid_out(out, layout), windows=windows), expected)

    values = laid_out(np.random.default_rng(seed + 1).normal(size=x.shape).astype("float32"), layout)
    picked = pooling.gather_from_maxima(XP, values, x, out, windows=windows)
    expected = m09.gather_from_maxima.function(XP, values.astype("float64"), double, largest, windows=windows)
    assert picked.dtype == np.float32
    np.testing.assert_array_equal(picked, expected)


@given(drawn_windows, leads, seeds)
@drawn(30)
def test_indices_of_maxima(windows: Windows, lead: tuple, seed: int) -> None:
    x = pixels(seed, (*lead, *windows.shape))
    numbers = np.broadcast_to(np.arange(math.prod(windows.shape)).reshape(windows.shape), x.shape)
    out = pooling.max_pool(XP, x, windows=windows)
    indices = pooling.gather_from_maxima(XP, numbers, x, out, windows=windows)
    assert indices.dtype == np.int64
    np.testing.assert_array_equal(indices, m09.gather_from_maxima.function(XP, numbers, x, out, windows=windows))


@given(
    geometries(9 if SIMULATED else 40, averages=True), leads, layouts, seeds, st.booleans(), st.sampled_from([None, 3])
)
@example(HALVES, (3,), "plain", 0, False, None)
@example(windows_of((4, 66), 2, 2), (3,), "plain", 0, True, 3)
@drawn(150)
def test_avg_pool_both_ways(
    windows: Windows, lead: tuple, layout: str, seed: int, count_padding: bool, divisor: int | None
) -> None:
    counted = windows.padding if count_padding else ((0, 0), (0, 0))
    attributes: dict[str, Any] = {"windows": windows, "counted": counted, "divisor": divisor}
    rng = np.random.default_rng(seed)
    x = laid_out(rng.normal(size=(*lead, *windows.shape)).astype("float32"), layout)
    g = laid_out(rng.normal(size=(*lead, *windows.count)).astype("float32"), layout)
    near(pooling.avg_pool(XP, x, **attributes), appendix.avg_pool.function(XP, x.astype("float64"), **attributes))
    expected = appendix.avg_pool_gradient.function(XP, g.astype("float64"), **attributes)
    near(pooling.avg_pool_gradient(XP, g, **attributes), expected)


@pytest.mark.parametrize("windows", [HALVES, windows_of((8, 6), 3, 1, 1), windows_of((8, 6), 3, 3)])
def test_nan_and_infinity_stay_in_their_windows(windows: Windows) -> None:
    x = np.ones((2, *windows.shape), "float32")
    x[0, 2, 3], x[1, 7, 5] = math.nan, math.inf
    attributes: dict[str, Any] = {"windows": windows, "counted": ((0, 0), (0, 0)), "divisor": None}
    expected = appendix.avg_pool.function(XP, x, **attributes)
    np.testing.assert_allclose(pooling.avg_pool(XP, x, **attributes), expected, rtol=1e-6)
    assert 0 < np.isnan(expected).sum() < 10
    g = np.ones((2, *windows.count), "float32")
    g[0, 0, 1], g[1, -1, 0] = math.nan, -math.inf
    expected = appendix.avg_pool_gradient.function(XP, g, **attributes)
    np.testing.assert_allclose(pooling.avg_pool_gradient(XP, g, **attributes), expected, rtol=1e-6)
    out = pooling.max_pool(XP, x, windows=windows)
    spread = pooling.scatter_to_maxima(XP, g, x, out, windows=windows)
    assert np.isnan(spread).sum() <= 1  # NumPy's twin, which multiplies by 0, has it in the whole window
    assert np.isinf(spread).sum() == 1


@cpu_only
def test_one_core_and_several_give_the_same() -> None:
    for windows in (windows_of((32, 32), 2, 2), windows_of((32, 32), 3, 2, 1), windows_of((32, 32), 4, 4)):
        x = np.random.default_rng(0).normal(size=(64, *windows.shape)).astype("float32")
        out = pooling.max_pool(XP, x, windows=windows)
        whole = pooling.scatter_to_maxima(XP, out, x, out, windows=windows)
        attributes: dict[str, Any] = {"windows": windows, "counted": ((0, 0), (0, 0)), "divisor": None}
        mean = pooling.avg_pool(XP, x, **attributes)
        back = pooling.avg_pool_gradient(XP, mean, **attributes)
        for n in (0, 31, 63):  # so little work is done by one
            np.testing.assert_array_equal(pooling.max_pool(XP, x[n], windows=windows), out[n])
            np.testing.assert_array_equal(
                pooling.scatter_to_maxima(XP, out[n], x[n], out[n], windows=windows), whole[n]
            )
            np.testing.assert_array_equal(pooling.avg_pool(XP, x[n], **attributes), mean[n])
            np.testing.assert_array_equal(pooling.avg_pool_gradient(XP, mean[n], **attributes), back[n])


@cpu_only
@pytest.mark.parametrize("end", [True, False])
def test_no_access_outside_of_the_arrays(end: bool) -> None:
    """Each kernel itself, on arrays that end or begin at a protected page."""
    drawn = [windows_of((4, width), 2, 2) for width in range(2, 80, 2)]
    for width in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 34, 47, 48, 49, 65):
        for stride in (1, 2, 3):
            drawn += [windows_of((3, width), size, stride, padding) for size, padding in ((1, 0), (3, 1), (2, 1))]
            drawn += [windows_of((3, width), 2, stride, 1, 2)]
    for windows in drawn:
        before = (windows.padding[0][0], windows.padding[1][0])
        geometry = (windows.size, windows.stride, before, windows.dilation)
        x = np.random.default_rng(0).normal(size=(2, *windows.shape)).astype("float32")
        x, out = guarded(x, end), guarded_empty((2, *windows.count), end=end)
        heights, widths = (guarded(np.ones(n, "float32"), end) for n in windows.count)
        for largest in (False, True):
            pooling.pool_pictures(
                x, out, largest, heights, widths, *geometry, pooling.line_length(windows), 0, 2, 1
            )  # fmt: skip
        g, back = (
            guarded(np.random.default_rng(1).normal(size=out.shape).astype("float32"), end),
            guarded_empty(x.shape, end=end),
        )
        pooling.spread_pictures(g, back, heights, widths, *geometry, *pooling.axis_margins(windows), 0, 2, 1)
        pooling.scatter_pictures(
            g, x, out, back, *geometry, sum(windows.padding[0]) + windows.shape[0], pooling.line_length(windows),
            *pooling.axis_margins(windows), 0, 2, 1,
        )  # fmt: skip
        near(back, m09.scatter_to_maxima.function(XP, g.astype("float64"), x, out, windows=windows))
