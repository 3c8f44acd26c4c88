"""Convolution kernels equal module 09's convolution and its gradients, and stay inside of their arrays."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import LAYOUTS, XP, geometries, laid_out, near, windows_of
from tests.kernels.place import SIMULATED, WHERE, cpu_only, drawn, kernels
from tinytorch import m09_spatial as m09
from tinytorch.kernels.cpu.vectors import LANES
from tinytorch.m09_spatial import Windows, lay_windows

conv = kernels("convolution")


def randn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def reference(operation: Any, *arrays: Any, windows: Windows, groups: int) -> np.ndarray:
    doubles = [None if a is None else a.astype("float64") for a in arrays]
    return operation.function(XP, *doubles, windows=windows, groups=groups)


def check_all_three(
    windows: Windows, count: int, channels: int, outputs: int, groups: int, seed: int = 0, layout: str = "plain",
    biased: bool = True, rectified: bool = True,
) -> None:  # fmt: skip
    """Channels and outputs are those of a group."""
    shape: dict[str, Any] = {"windows": windows, "groups": groups}
    x = laid_out(randn(seed, count, channels * groups, *windows.shape), layout)
    weight = laid_out(randn(seed + 1, outputs * groups, channels, *windows.size), layout)
    bias = laid_out(randn(seed + 2, outputs * groups), layout) if biased else None
    out = conv.convolution(XP, x, weight, bias, **shape, activation="relu" if rectified else None)
    expected = reference(m09.convolution, x, weight, bias, **shape)
    near(out, np.maximum(expected, 0) if rectified else expected)
    g = laid_out(randn(seed + 3, *out.shape), layout)
    near(
        conv.convolution_input_gradient(XP, g, weight, **shape),
        reference(m09.convolution_input_gradient, g, weight, **shape),
    )
    near(
        conv.convolution_weight_gradient(XP, g, x, **shape),
        reference(m09.convolution_weight_gradient, g, x, **shape),
    )


@given(
    geometries(5, 3) if SIMULATED else geometries(), st.integers(0, 2 if SIMULATED else 5), st.integers(1, 5),
    st.integers(1, 12 if SIMULATED else 20), st.integers(1, 2 if SIMULATED else 3), st.integers(0, 1 << 30),
    st.sampled_from(LAYOUTS), st.booleans(), st.booleans(),
)  # fmt: skip
@drawn(200)
def test_any_geometry(
    windows: Windows, count: int, channels: int, outputs: int, groups: int, seed: int, layout: str, biased: bool,
    rectified: bool,
) -> None:  # fmt: skip
    check_all_three(windows, count, channels, outputs, groups, seed, layout, biased, rectified)


@pytest.mark.skipif(SIMULATED, reason="too large for the simulator")
@pytest.mark.parametrize(
    ("shape", "size", "stride", "padding", "count", "channels", "outputs"),
    [
        ((32, 32), 3, 1, 1, 5, 3, 32),  # whole vectors in a row
        ((16, 16), 3, 2, 1, 4, 8, 33),  # results of two pictures in a job; outputs that fill no tile
        ((7, 7), 3, 1, 1, 9, 20, 17),  # vectors run over the ends of rows
        ((28, 28), 1, 1, 0, 3, 40, 9),  # the picture itself serves as scratch
        ((28, 28), 1, 2, 0, 3, 9, 40),  # most places of the gradient are seen by no window
        ((2, 3), 3, 1, 1, 37, 5, 12),  # fewer results than lanes
        ((70, 90), 3, 1, 1, 1, 40, 4),  # bands, because a picture is too large for the scratch, the last one overlaps
        ((70, 90), 3, 2, 1, 1, 40, 4),
        ((70, 90), 1, 1, 0, 1, 90, 4),
        ((23, 31), 7, 2, 3, 2, 3, 20),
        ((30, 30), 4, 4, 0, 2, 3, 20),
        ((9, 40), 11, 3, 5, 2, 2, 6),
    ],
)
def test_geometries_of_networks(
    shape: tuple, size: int, stride: int, padding: int, count: int, channels: int, outputs: int
) -> None:
    check_all_three(windows_of(shape, size, stride, padding), count, channels, outputs, groups=1)


TILE = getattr(conv, "TILE", 16)  # of CUDA's kernels: so many results by so many


@pytest.mark.parametrize(
    ("width", "count", "channels", "outputs", "groups"),
    [
        (TILE + 1, 1, 5, TILE + 1, 1),
        (TILE - 1, 1, TILE + 1, 4, 1),
        (TILE // 2, 2, TILE // 2, TILE // 2, 1),  # whole tiles of both heights
        (TILE, 1, TILE, TILE, 1),
        (3, 2, 3, 5, 3),
        (2, 2, 4, 3, 2),
    ],
)
def test_around_the_edges_of_tiles(width: int, count: int, channels: int, outputs: int, groups: int) -> None:
    check_all_three(windows_of((1, width), 1), count, channels, outputs, groups)


@pytest.mark.parametrize(
    ("size", "stride", "dilation"), [(3, 2, 2), (3, 4, 2), (2, 6, 4), (2, 3, 1), (3, 2, 3), (2, 1, 3)]
)
def test_strides_and_dilations_that_meet_some_pixels_only(size: int, stride: int, dilation: int) -> None:
    check_all_three(windows_of((8, 9), size, stride, 2, dilation), 1, 4, 4, 1)


@pytest.mark.skipif(WHERE != "cuda", reason="how CUDA's kernels part sums")
def test_long_sums_are_parted_among_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, run = [], conv.run
    monkeypatch.setattr(conv, "run", lambda kernel, *arguments: (launched.append(kernel), run(kernel, *arguments)))
    channels = (conv.LEAST_STEPS - 1) * conv.SIDE  # so that parts begin amid the channels of a tap
    for size, shape, inputs, outputs in ((2, (2, 3), channels, 4), (1, (7 * conv.LEAST_STEPS, 5), 2, 5)):
        check_all_three(windows_of(shape, size), 1, inputs, outputs, 1)
        assert conv.add_parts in launched
        launched.clear()
    geometry: dict[str, Any] = {"windows": windows_of((2, 3), 2), "groups": 1}
    x, weight = randn(0, 1, channels, 2, 3), randn(1, 4, channels, 2, 2)
    once, again = (conv.convolution(XP, x, weight, **geometry) for _ in range(2))
    np.testing.assert_array_equal(once, again)


def test_nothing_in_gives_nothing_or_the_bias() -> None:
    windows, bias = windows_of((5, 6), 3, 1, 1), randn(0, 4)
    x, weight, g = np.zeros((2, 0, 5, 6), "float32"), np.zeros((4, 0, 3, 3), "float32"), randn(1, 2, 4, 5, 6)
    out = conv.convolution(XP, x, weight, bias, windows=windows, groups=1, activation=None)
    np.testing.assert_array_equal(out, np.broadcast_to(bias[:, None, None], (2, 4, 5, 6)))
    assert conv.convolution_input_gradient(XP, g, weight, windows=windows, groups=1).shape == x.shape
    assert conv.convolution_weight_gradient(XP, g, x, windows=windows, groups=1).shape == weight.shape
    x, weight, g = randn(0, 2, 3, 5, 6), np.zeros((0, 3, 3, 3), "float32"), np.zeros((2, 0, 5, 6), "float32")
    assert conv.convolution(XP, x, weight, None, windows=windows, groups=1).shape == g.shape
    assert not conv.convolution_input_gradient(XP, g, weight, windows=windows, groups=1).any()
    assert conv.convolution_weight_gradient(XP, g, x, windows=windows, groups=1).shape == weight.shape
    windows = lay_windows("test", (0, 6), (3, 3), (1, 1), ((2, 2), (1, 1)), (1, 1))
    x, weight = np.zeros((2, 3, 0, 6), "float32"), randn(0, 4, 3, 3, 3)
    out = conv.convolution(XP, x, weight, bias, windows=windows, groups=1)
    np.testing.assert_array_equal(out, np.broadcast_to(bias[:, None, None], (2, 4, 2, 6)))
    assert not conv.convolution_weight_gradient(XP, out, x, windows=windows, groups=1).any()


@pytest.mark.parametrize(("width", "stride"), [(5, 1), (7, 2)] if SIMULATED else [(32, 1), (21, 1), (32, 2), (7, 2)])
def test_nan_and_infinity_go_where_windows_see_them(width: int, stride: int) -> None:
    shape: dict[str, Any] = {"windows": windows_of((7, width), 3, stride, 1), "groups": 1}
    x, weight = randn(0, 3, 2, 7, width), np.abs(randn(1, 9, 2, 3, 3))
    x[0, 0, 2, 0], x[1, 1, 5, width - 1] = math.nan, math.inf
    out = conv.convolution(XP, x, weight, **shape, activation="relu")
    near(out, np.maximum(reference(m09.convolution, x, weight, None, **shape), 0))
    assert np.isnan(out).any()
    assert np.isinf(out).any()
    g = np.abs(randn(2, *out.shape))
    gradient = conv.convolution_weight_gradient(XP, g[1:], x[1:], **shape)
    near(gradient, reference(m09.convolution_weight_gradient, g[1:], x[1:], **shape))
    assert np.isinf(gradient).any()
    g[0, 3, 1, 1], g[1, 2, 0, 2] = math.nan, math.inf
    back = conv.convolution_input_gradient(XP, g, weight, **shape)
    near(back, reference(m09.convolution_input_gradient, g, weight, **shape))
    assert np.isnan(back).any()
    assert np.isinf(back).any()


@cpu_only
@pytest.mark.parametrize("count", [1, 3, 8])
def test_one_core_and_several_give_the_same(count: int) -> None:
    shape: dict[str, Any] = {"windows": windows_of((30, 32), 3, 1, 1), "groups": 1}
    x, weight, bias = randn(0, count, 24, 30, 32), randn(1, 32, 24, 3, 3), randn(2, 32)

    def compute() -> list[np.ndarray]:
        out = conv.convolution(XP, x, weight, bias, **shape, activation="relu")
        back = conv.convolution_input_gradient(XP, out, weight, **shape)
        return [out, back, conv.convolution_weight_gradient(XP, out, x, **shape)]

    several, again, threads = compute(), compute(), numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        alone = compute()
    finally:
        numba.set_num_threads(threads)
    for one, two in zip(several, again, strict=True):
        np.testing.assert_array_equal(one, two)
    for one, three in zip(several[:2], alone[:2], strict=True):
        np.testing.assert_array_equal(one, three)
    near(alone[2], several[2].astype("float64"))  # each core has sums of its own, which are added up at the end


@cpu_only
def test_without_a_free_pool_sums_are_rounded_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    shape: dict[str, Any] = {"windows": windows_of((32, 32), 3, 1, 1), "groups": 1}
    g, x = randn(0, 7, 32, 32, 32), randn(1, 7, 24, 32, 32)
    expected = conv.convolution_weight_gradient(XP, g, x, **shape)
    monkeypatch.setattr(conv, "run", lambda serial, parallel, work, *arguments: serial(*arguments))
    np.testing.assert_array_equal(conv.convolution_weight_gradient(XP, g, x, **shape), expected)


@cpu_only
@given(geometries(), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9))
@drawn(300)
def test_plans_stay_inside(windows: Windows, channels: int, groups: int, bands: int, pictures: int) -> None:
    """What tiles read lies in the scratch, or directly in the pictures, and what they write in the results."""
    for make, lead in zip((conv.forward_plan, conv.backward_plan), (channels, 2), strict=True):
        plan = make(windows, groups * channels, groups * 2, groups, bands, pictures)
        assert plan.picture_bytes % 4 == 0
        room = plan.pictures * plan.picture_bytes + (0 if plan.direct else 4 * LANES)
        if plan.direct:  # the last band's source begins later, and the last group's too
            room -= 4 * plan.last_band * plan.width + (groups - 1) * lead * 4 * math.prod(windows.shape)
        distances = plan.taps[1::2]
        windows_at = plan.vectors[:, 0]
        if len(distances):
            assert distances.min() >= 0
            assert windows_at.min() >= 0
            assert windows_at.max() + distances.max() + 4 * LANES <= room
            assert plan.pixels[0::2].max() + distances.max() + 4 <= room
        assert (plan.columns[:, 1] >= 0).all()
        assert (plan.columns[:, 2] <= plan.pitch).all()
        seen = plan.columns[:, 0, None] + plan.columns[:, 1:] * plan.column_stride
        real = plan.columns[:, 1] < plan.columns[:, 2]
        assert (seen[real, 0] >= 0).all()
        assert (seen[real, 1] - plan.column_stride < plan.width).all()


@cpu_only
@pytest.mark.parametrize("end", [True, False])
def test_no_access_outside_of_the_arrays(end: bool) -> None:
    """Each kernel itself, on arrays that end or begin at a protected page."""
    for width in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48):
        for stride, size, padding, dilation in ((1, 1, 0, 1), (2, 1, 0, 1), (1, 3, 1, 1), (2, 3, 1, 1), (3, 2, 1, 2)):
            for channels, outputs, bands, pictures in ((1, 9, 1, 2), (3, 17, 2, 1), (9, 2, 1, 1)):
                windows = windows_of((5, width), size, stride, padding, dilation)
                x, g = (
                    guarded(randn(0, 3, *shape), end) for shape in ((channels, 5, width), (outputs, *windows.count))
                )
                weight, bias = guarded(randn(1, outputs, channels, size, size), end), guarded(randn(2, outputs), end)
                plan = conv.forward_plan(windows, channels, outputs, 1, bands, pictures)
                jobs, out = -(-3 // plan.pictures) * plan.bands, guarded_empty(g.shape, end=end)
                conv.convolve(0, jobs, x, weight, bias, out, plan, 1, False)
                near(out, reference(m09.convolution, x, weight, bias, windows=windows, groups=1))

                taps = channels * size * size
                sums = guarded(np.zeros((1, 1, taps, -(-outputs // LANES) * LANES), "float32"), end)
                gradient = guarded_empty((outputs, taps), end=end)
                conv.weight_gradient(0, g, x, sums, gradient, plan, 1, jobs)
                expected = reference(m09.convolution_weight_gradient, g, x, windows=windows, groups=1)
                near(gradient, expected.reshape(outputs, -1))

                if not plan.direct:
                    scratch = guarded(np.zeros(plan.picture_bytes // 4, "float32"), end)
                    for top in {0, plan.last_band}:
                        conv.lay_out(scratch.ctypes.data, x[-1].ctypes.data, plan, top)
                        assert np.isin(scratch, [0, *x[-1].ravel()]).all()

                plan, zeros = conv.backward_plan(windows, channels, outputs, 1, bands, pictures), np.zeros_like
                jobs, back = -(-3 // plan.pictures) * plan.bands, guarded_empty(x.shape, end=end)
                conv.convolve(0, jobs, g, weight, guarded(zeros(bias[:1]).repeat(channels), end), back, plan, 1, False)
                near(back, reference(m09.convolution_input_gradient, g, weight, windows=windows, groups=1))


@cpu_only
def test_a_vector_kernel_of_each_kind_is_what_it_says() -> None:
    block, turned = randn(0, LANES, LANES), np.zeros((LANES, LANES), "float32")
    conv.turn(turned.ctypes.data, block.ctypes.data, LANES, LANES, LANES)
    np.testing.assert_array_equal(turned, block.T)
    for stride in (1, 2, 3):
        for count in (1, LANES - 1, LANES, 2 * LANES + 3):
            source = guarded(randn(1, 3, (count - 1) * stride + 1))
            target = guarded_empty((3, count))
            conv.copy_rows(
                target.ctypes.data, target.strides[0], source.ctypes.data, source.strides[0], 3, count, stride
            )  # fmt: skip
            np.testing.assert_array_equal(target, source[:, ::stride])
    for phases in (1, 2, 3):
        for count in (1, LANES, 2 * LANES - 1, 4 * LANES + 1):
            buffer = guarded(randn(2, phases, -(-count // phases) + LANES))
            target = guarded_empty(count)
            conv.weave(target.ctypes.data, buffer.ctypes.data, buffer.strides[0], phases, count)
            np.testing.assert_array_equal(target, buffer.T.ravel()[:count])
