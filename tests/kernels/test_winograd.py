"""Winograd's convolutions equal module 09's convolution and its input's gradient, and stay inside of their arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import LAYOUTS, XP, laid_out, near
from tests.kernels.place import cpu_only
from tinytorch import m09_spatial as m09
from tinytorch import nn
from tinytorch.kernels.cpu import winograd as kernels
from tinytorch.kernels.cpu.vectors import LANES
from tinytorch.m02_tensor import observe, randn
from tinytorch.m09_spatial import Windows, lay_windows
from tinytorch.m16_acceleration_appendix import convolves_in_pairs

pytestmark = cpu_only


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def windows_of(height: int, width: int, above: int = 1, below: int = 1) -> Windows:
    return lay_windows("test", (height, width), (3, 3), (1, 1), ((above, below), (1, 1)), (1, 1))


def reference(operation: Any, *arrays: Any, windows: Windows) -> np.ndarray:
    doubles = [None if a is None else a.astype("float64") for a in arrays]
    return operation.function(XP, *doubles, windows=windows, groups=1)


def check_both(
    windows: Windows, count: int, channels: int, outputs: int, seed: int = 0, layout: str = "plain",
    biased: bool = True, rectified: bool = True,
) -> None:  # fmt: skip
    shape: dict[str, Any] = {"windows": windows, "groups": 1}
    x = laid_out(numbers(seed, count, channels, *windows.shape), layout)
    weight = laid_out(numbers(seed + 1, outputs, channels, 3, 3), layout)
    bias = laid_out(numbers(seed + 2, outputs), layout) if biased else None
    out = (kernels.convolution_relu if rectified else kernels.convolution)(XP, x, weight, bias, **shape)
    expected = reference(m09.convolution, x, weight, bias, windows=windows)
    near(out, np.maximum(expected, 0) if rectified else expected)
    g = laid_out(numbers(seed + 3, *out.shape), layout)
    near(
        kernels.convolution_input_gradient(XP, g, weight, **shape),
        reference(m09.convolution_input_gradient, g, weight, windows=windows),
    )


@given(
    st.integers(1, 24), st.integers(2, 20), st.integers(0, 3), st.integers(0, 3), st.integers(0, 5), st.integers(1, 6),
    st.integers(1, 20), st.integers(0, 1 << 30), st.sampled_from(LAYOUTS), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
@example(1, 2, 1, 1, 1, 1, 1, 0, "plain", True, True)
@example(16, 8, 1, 1, 5, 16, 17, 0, "plain", True, True)
def test_any_geometry(
    height: int, pairs: int, above: int, below: int, count: int, channels: int, outputs: int, seed: int, layout: str,
    biased: bool, rectified: bool,
) -> None:  # fmt: skip
    height = max(height, 3 - above - below)
    check_both(windows_of(height, 2 * pairs, above, below), count, channels, outputs, seed, layout, biased, rectified)


@pytest.mark.parametrize(
    ("height", "width", "count", "channels", "outputs"),
    [
        (16, 16, 7, 16, 33),
        (32, 32, 3, 40, 16),
        (8, 8, 9, 64, 24),  # several pictures in a job
        (70, 90, 1, 40, 8),  # bands, because a picture is too large for the scratch, the last one overlaps
        (2, 4, 37, 16, 16),  # fewer pairs than lanes
    ],
)
def test_geometries_of_networks(height: int, width: int, count: int, channels: int, outputs: int) -> None:
    check_both(windows_of(height, width), count, channels, outputs)


@pytest.mark.parametrize("width", [8, 32, 34])
def test_nan_goes_where_windows_see_it(width: int) -> None:
    windows, weight = windows_of(7, width), np.abs(numbers(1, 9, 2, 3, 3))
    for place in ((0, 0, 0, 0), (0, 1, 2, width - 1), (1, 0, 6, 5), (1, 1, 3, 0), (2, 0, 6, width - 1)):
        x = numbers(0, 3, 2, 7, width)
        x[place] = math.nan
        out = kernels.convolution_relu(XP, x, weight, windows=windows, groups=1)
        near(out, np.maximum(reference(m09.convolution, x, weight, None, windows=windows), 0))
        assert np.isnan(out).any()


# -- memory and cores --------------------------------------------------------------------------------------------------


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, out: np.ndarray, above: int, cut: tuple) -> Any:
    """`out`, filled on one core, or if `cut` says so on several: (bands, pictures of a job, parts)."""
    bands, pictures, parts = cut
    plan = kernels.pair_plan(x.shape[1:], len(weight), out.shape[2], above, bands, pictures)
    factors = guarded_empty((*weight.shape[:3], 4))
    kernels.to_left_factors(weight, False, factors)
    jobs = -(-len(x) // plan.pictures) * plan.bands
    function = kernels.convolve_pairs_on_cores if parts else kernels.convolve_pairs_serially
    function(parts, jobs, x, factors, bias, out, plan, above, kernels.edges_of(plan.pitch, plan.rows), False)
    return out


@pytest.mark.parametrize("end", [True, False])
def test_at_protected_pages(end: bool) -> None:
    for width in (4, 6, LANES, LANES + 2, 2 * LANES, 2 * LANES + 6):
        for height, above, below in ((1, 1, 1), (5, 1, 1), (4, 0, 0), (3, 3, 0), (2, 0, 2)):
            for channels, outputs, cut in ((1, 9, (1, 2, 0)), (3, 17, (2, 1, 0)), (9, 2, (1, 1, 2))):
                windows = windows_of(height, width, above, below)
                x, weight = guarded(numbers(0, 3, channels, height, width), end), numbers(1, outputs, channels, 3, 3)
                weight, bias = guarded(weight, end), guarded(numbers(2, outputs), end)
                out = guarded_empty((3, outputs, *windows.count), end=end)
                near(
                    convolved(x, weight, bias, out, above, cut),
                    reference(m09.convolution, x, weight, bias, windows=windows),
                )


def test_cores_and_bands_change_no_bit() -> None:
    x, weight, bias = numbers(0, 5, 16, 18, 24), numbers(1, 20, 16, 3, 3), numbers(2, 20)
    results = [
        convolved(x, weight, bias, np.full((5, 20, 18, 24), np.nan, "float32"), 1, cut)
        for cut in ((1, 1, 0), (1, 4, 0), (4, 1, 0), (3, 1, 2), (1, 2, 3))
    ]
    for out in results[1:]:
        np.testing.assert_array_equal(out, results[0])


# -- where it runs -----------------------------------------------------------------------------------------------------


def test_where_it_runs() -> None:
    def runs(x: tuple = (64, 16, 8, 8), weight: tuple = (16, 16, 3, 3), **others: Any) -> bool:
        geometry = {"size": (3, 3), "stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), **others}
        windows = lay_windows("test", x[2:], *geometry.values())
        return convolves_in_pairs(numbers(0, *x), numbers(1, *weight), windows=windows, groups=16 // weight[1])

    assert runs()
    assert runs(padding=((0, 2), (1, 1)))
    assert not runs(x=(99, 16, 8, 7))
    assert not runs(x=(64, 8, 8, 8), weight=(16, 8, 3, 3))
    assert not runs(weight=(8, 16, 3, 3))
    assert not runs(stride=(1, 2))
    assert not runs(dilation=(2, 1))
    assert not runs(padding=((1, 1), (0, 1)))
    assert not runs(x=(63, 16, 8, 8))
    assert not runs(x=(80, 16, 30, 2))
    x, weight = numbers(0, 64, 16, 8, 8), numbers(1, 16, 1, 3, 3)
    assert not convolves_in_pairs(x, weight, windows=windows_of(8, 8), groups=16)


def test_a_layer_of_that_kind_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(kernels, "run", lambda *arguments: calls.append(arguments[0]) or arguments[1](*arguments[3:]))
    layer, x = nn.Conv2d(16, 16, 3, padding=1), randn(64, 16, 8, 8, requires_grad=True)
    with observe(lambda op, arrays, attributes, proceed: proceed()):
        layer(x).sum().backward()
    assert calls == [kernels.convolve_pairs_serially] * 2
