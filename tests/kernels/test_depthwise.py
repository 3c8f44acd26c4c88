"""Depthwise kernels equal module 09's convolution and its gradients, and stay inside of their arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import LAYOUTS, XP, geometries, laid_out, near, windows_of
from tests.kernels.place import SIMULATED, WHERE, cpu_only, drawn, kernels
from tinytorch import m09_spatial as m09
from tinytorch.kernels.cpu import depthwise, lines
from tinytorch.m09_spatial import Windows

if WHERE == "cpu":
    forward, backward = depthwise.depthwise_convolution, depthwise.depthwise_input_gradient
    weigh = depthwise.depthwise_weight_gradient
else:  # where convolutions are the same kernels, whatever the groups
    conv = kernels("convolution")
    forward, backward, weigh = conv.convolution, conv.convolution_input_gradient, conv.convolution_weight_gradient


def randn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def convolved(x: Any, weight: Any, bias: Any, windows: Windows, channels: int, relu: bool) -> Any:
    """Module 09's convolution in float64, and the activation."""
    arrays = [None if a is None else a.astype("float64") for a in (x, weight, bias)]
    out = m09.convolution.function(XP, *arrays, windows=windows, groups=channels)
    return np.maximum(out, 0) if relu else out


@given(
    geometries(5, 2) if SIMULATED else geometries(), st.integers(0, 3), st.integers(1, 2 if SIMULATED else 5),
    st.integers(1, 3), st.sampled_from(LAYOUTS), st.booleans(), st.booleans(), st.integers(0, 1 << 30),
)  # fmt: skip
@drawn(150)
def test_all_three(
    windows: Windows, count: int, channels: int, multiplier: int, layout: str, biased: bool, relu: bool, seed: int
) -> None:
    x = laid_out(randn(seed, count, channels, *windows.shape), layout)
    weight = laid_out(randn(seed + 1, channels * multiplier, 1, *windows.size), layout)
    bias = laid_out(randn(seed + 2, channels * multiplier), layout) if biased else None
    shape: dict[str, Any] = {"windows": windows, "groups": channels}
    out = forward(XP, x, weight, bias, **shape, activation="relu" if relu else None)
    near(out, convolved(x, weight, bias, windows, channels, relu))

    g = laid_out(randn(seed + 3, *out.shape), layout)
    doubles = [a.astype("float64") for a in (g, weight, x)]
    expected = m09.convolution_input_gradient.function(XP, *doubles[:2], **shape)
    near(backward(XP, g, weight, **shape), expected)
    expected = m09.convolution_weight_gradient.function(XP, doubles[0], doubles[2], **shape)
    near(weigh(XP, g, x, **shape), expected)


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 0)])
def test_nan_and_infinity_go_where_windows_see_them(stride: int, padding: int) -> None:
    windows = windows_of((7, 21), 3, stride, padding)
    shape: dict[str, Any] = {"windows": windows, "groups": 2}
    x, weight = np.ones((1, 2, 7, 21), "float32"), np.ones((2, 1, 3, 3), "float32")
    x[0, 0, 2, 0], x[0, 1, 5, 20] = math.nan, math.inf
    out = forward(XP, x, weight, **shape, activation="relu")
    np.testing.assert_array_equal(out, convolved(x, weight, None, windows, 2, relu=True))
    assert np.isnan(out).any()
    assert np.isinf(out).any()
    g = np.ones_like(out)
    gradient = weigh(XP, g, x, **shape)  # a place may be seen by some weights only
    np.testing.assert_allclose(gradient, m09.convolution_weight_gradient.function(XP, g, x, **shape), rtol=1e-6)
    assert np.isinf(gradient).any()
    assert np.isfinite(gradient).any()


@cpu_only
def test_one_core_and_several_give_the_same() -> None:
    shape: dict[str, Any] = {"windows": windows_of((32, 32), 3, 1, 1), "groups": 64}
    x, weight, bias = randn(0, 3, 64, 32, 32), randn(1, 64, 1, 3, 3), randn(2, 64)
    out = forward(XP, x, weight, bias, **shape)
    back = backward(XP, out, weight, **shape)
    gradient = weigh(XP, out, x, **shape)
    shape["groups"] = 1
    for channel in (0, 31, 63):  # so little work is done by one
        one = slice(channel, channel + 1)
        np.testing.assert_array_equal(forward(XP, x[:, one], weight[one], bias[one], **shape), out[:, one])
        np.testing.assert_array_equal(backward(XP, out[:, one], weight[one], **shape), back[:, one])
        np.testing.assert_array_equal(weigh(XP, out[:, one], x[:, one], **shape), gradient[one])


@cpu_only
@pytest.mark.parametrize("end", [True, False])
def test_no_access_outside_of_the_arrays(end: bool) -> None:
    """Each kernel itself, on arrays that end or begin at a protected page."""
    for width in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 34, 47, 48, 49, 65):
        for stride in (1, 2, 3):
            for size, padding, dilation in ((1, 0, 1), (3, 1, 1), (2, 1, 2), (3, 2, 2)):
                windows = windows_of((5, width), size, stride, padding, dilation)
                geometry, channels, elements = depthwise.geometry(windows), 2, size * size
                padded, pitch = depthwise.padded_rows(windows), lines.line_length(windows)
                x, bias = guarded(randn(0, 2, channels, *windows.shape), end), guarded(randn(1, channels, 2), end)
                weight = guarded(randn(2, channels, 2, elements), end)
                out = guarded_empty((2, 2 * channels, *windows.count), end=end)
                pictures = x.reshape(4, *windows.shape)
                depthwise.convolve_pictures(
                    pictures, weight, bias, out, True, *geometry, padded, pitch, 0, 4, 1
                )  # fmt: skip
                as_op = weight.reshape(-1, 1, size, size)
                near(out, convolved(x, as_op, bias.reshape(-1), windows, channels, relu=True))
                back = guarded_empty(pictures.shape, end=end)
                depthwise.carry_pictures(out, weight, back, *geometry, *lines.axis_margins(windows), 0, 4, 1)
                gradient = guarded_empty((2 * channels, elements), end=end)
                depthwise.weigh_outputs(out, x, gradient, *geometry, padded, pitch, 0, 2 * channels, 1)
                assert np.abs(gradient).max() < 1e30
