"""Convolutions and pooling of int8 against their operations: the same bits for all shapes, layouts and bands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.place import cpu_only
from tests.kernels.test_quantized import bytes_of
from tinytorch.backends import get_backend
from tinytorch.kernels.cpu import quantized_convolution as kernels
from tinytorch.m09_spatial import Windows, lay_windows, max_pool
from tinytorch.m17_quantization import int8_convolution

pytestmark = cpu_only

XP = get_backend("cpu")
small = st.integers(1, 3)
pairs = st.tuples(small, small)
borders = st.tuples(st.integers(0, 2), st.integers(0, 2))


def arranged(x: np.ndarray, last: bool) -> np.ndarray:
    """With channels side by side, or as usual."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) if last else x


def scaling(random: np.random.Generator, outputs: int, has_bias: bool, rounds: bool) -> tuple:
    bias = random.normal(size=outputs).astype("float32") if has_bias else None
    out = (np.asarray(0.7, "float32"), np.asarray(-9, "int32")) if rounds else (None, None)
    return random.uniform(0.001, 0.1, outputs).astype("float32"), bias, *out


def compare(x: np.ndarray, zero: int, weight: np.ndarray, others: tuple, windows: Windows, relu: bool) -> None:
    inputs = x, np.asarray(0.02, "float32"), np.asarray(zero, "int32"), weight, *others
    ours = kernels.int8_convolution(XP, *inputs, windows=windows, relu=relu)
    theirs = int8_convolution.function(XP, *inputs, windows=windows, relu=relu)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=60)
@given(
    count=st.integers(0, 3), channels=st.integers(1, 9), outputs=st.sampled_from([1, 5, 31, 32, 33, 64, 70, 130]),
    shape=st.tuples(st.integers(7, 9), st.integers(7, 17)), size=pairs, stride=pairs, dilation=pairs,
    padding=st.tuples(borders, borders), last=st.booleans(), zero=st.sampled_from([-128, 0, 7, 127]),
    has_bias=st.booleans(), rounds=st.booleans(), relu=st.booleans(), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_the_operation_gives_the_same_bits(
    count: int, channels: int, outputs: int, shape: tuple, size: tuple, stride: tuple, dilation: tuple, padding: Any,
    last: bool, zero: int, has_bias: bool, rounds: bool, relu: bool, seed: int,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    windows = lay_windows("test", shape, size, stride, padding, dilation)
    x, weight = bytes_of(random, count, channels, *shape), bytes_of(random, outputs, channels, *size)
    compare(arranged(x, last), zero, weight, scaling(random, outputs, has_bias, rounds), windows, relu)


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_large_pictures_are_done_in_bands(monkeypatch: pytest.MonkeyPatch, stride: tuple) -> None:
    random = np.random.default_rng(0)
    windows = lay_windows("test", (23, 20), (3, 3), stride, ((1, 2), (0, 1)), (2, 1))
    x, weight = bytes_of(random, 2, 5, 23, 20), bytes_of(random, 40, 5, 3, 3)
    for size in (1, 2000, 4000):
        monkeypatch.setattr(kernels, "BAND_BYTES", size)
        kernels.make_plan.cache_clear()
        assert kernels.make_plan(windows, 2, 5, 1)[2][1] > 1
        for cores in (1, 3):
            monkeypatch.setattr(kernels, "cores", lambda cores=cores: cores)
            compare(x, 3, weight, scaling(random, 40, True, True), windows, True)
    kernels.make_plan.cache_clear()


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    windows = lay_windows("test", (9, 9), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    x, weight = bytes_of(random, 5, 8, 9, 9), bytes_of(random, 16, 8, 3, 3)
    for chosen in (0, 1):
        monkeypatch.setattr(kernels, "run", lambda s, p, work, *x, chosen=chosen: (s, p)[chosen](*x))
        compare(x, -5, weight, scaling(random, 16, False, False), windows, False)
        pixels = arranged(x, True)
        np.testing.assert_array_equal(
            kernels.max_pool(XP, pixels, windows=windows), max_pool.function(XP, x, windows=windows)
        )


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(3, 8), st.integers(3, 8)), size=pairs,
    stride=pairs, dilation=st.tuples(st.integers(1, 2), st.just(1)), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_pooling(shape: tuple, size: tuple, stride: tuple, dilation: tuple, seed: int) -> None:
    padding = tuple((n // 2, n // 2) for n in size)
    windows = lay_windows("test", shape, size, stride, padding, dilation)
    x = bytes_of(np.random.default_rng(seed), *shape)
    ours = kernels.max_pool(XP, arranged(x, True), windows=windows)
    assert kernels.channels_last(ours)
    np.testing.assert_array_equal(ours, max_pool.function(XP, x, windows=windows))


def test_what_it_makes_lies_as_the_next_wants_it() -> None:
    random = np.random.default_rng(2)
    windows = lay_windows("test", (4, 4), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))
    x, weight = bytes_of(random, 2, 3, 4, 4), bytes_of(random, 6, 3, 1, 1)
    others = scaling(random, 6, True, True)
    out = kernels.int8_convolution(XP, x, np.float32(0.1), np.int32(0), weight, *others, windows=windows)
    assert (out.shape, kernels.channels_last(out)) == ((2, 6, 4, 4), True)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("outputs", [1, kernels.NARROW, kernels.NARROW + 1, kernels.COLUMNS + 3])
def test_nothing_is_touched_outside_of_the_arrays(end: bool, outputs: int) -> None:
    random = np.random.default_rng(3)
    for channels, size in ((1, (3, 3)), (5, (2, 3)), (8, (1, 1))):
        windows = lay_windows("test", (5, 6), size, (1, 1), ((1, 0), (1, 1)), (1, 1))
        weight = bytes_of(random, outputs, channels, *size)
        packed = kernels.pack_filters(weight)
        panels, starts = guarded(packed.panels, end), guarded(packed.starts, end)
        places, stretches, plan = kernels.make_plan(windows, 2, channels, 1)
        factors, addends = (guarded(random.normal(size=len(starts)).astype("float32"), end) for _ in range(2))
        x = bytes_of(random, 2, channels, 5, 6)
        for last in (False, True):
            pixels = guarded(np.ascontiguousarray(x.transpose(0, 2, 3, 1) if last else x).reshape(-1), end)
            for rounding in (np.zeros(0, "float32"), np.ones(2, "float32")):
                count = 2 * windows.count[0] * windows.count[1] * outputs * (1 if len(rounding) else 4)
                out = guarded_empty(count, np.int8, end)
                kernels.convolve_serial(
                    2, pixels, last, x.shape[1:], np.int32(0), panels, starts,
                    kernels.COLUMNS if outputs > kernels.NARROW else kernels.NARROW, factors, addends,
                    np.float32(-np.inf), rounding, places, stretches, plan, outputs, out,
                )  # fmt: skip
                assert (out != 0x7F).any()
