"""Softmax kernels equal the operations, with masks and extremes too, and stay in their arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import LAYOUTS, XP, laid_out, near
from tests.kernels.place import SIMULATED, WHERE, cpu_only, drawn, kernels
from tinytorch import m03_activations as m03
from tinytorch.kernels.cpu.vectors import LANES
from tinytorch.m05_losses import softmax_cross_entropy
from tinytorch.m06_autograd import softmax_minus_one_hot

softmax = kernels("softmax")
INF, NAN = math.inf, math.nan
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 1 << 30)
columns = st.integers(1, 70) | st.integers(1, 90 if SIMULATED else 600)
side, many = (3, 7) if SIMULATED else (6, 70)
KINDS = ["usual", "large", "masked", "special"]


def scores(seed: int, shape: tuple, kind: str = "usual") -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype("float32") * np.float32(3)
    if kind == "large":
        x = x * 1000 + np.float32(10_000)
    if kind == "masked":
        x[rng.random(shape) < 0.6] = -INF
    if kind == "special":
        for value in (NAN, INF, -INF):
            x[rng.random(shape) < 0.02] = value
    return x


def double(array: np.ndarray) -> np.ndarray:
    return array.astype("float64")


@given(st.lists(st.integers(0, side), max_size=3), columns, layouts, seeds, st.sampled_from(KINDS))
@example([many], 600, "plain", 0, "usual")
@example([many], 600, "plain", 0, "special")
@drawn(150)
def test_softmax_and_its_logarithm(lead: list, columns: int, layout: str, seed: int, kind: str) -> None:
    x = laid_out(scores(seed, (*lead, columns), kind), layout)
    for dim in (-1, x.ndim - 1):
        with np.errstate(invalid="ignore"):
            expected = m03.softmax.function(XP, double(x), dim=dim)
            logarithm = m03.log_softmax.function(XP, double(x), dim=dim)
        near(softmax.softmax(XP, x, dim=dim), expected)
        near(softmax.log_softmax(XP, x, dim=dim), logarithm)


@given(st.integers(0, 12), columns, layouts, seeds, st.sampled_from(KINDS), st.sampled_from(["int64", "int32"]))
@example(many, 600, "plain", 0, "usual", "int64")
@drawn(150)
def test_cross_entropy_both_ways(rows: int, columns: int, layout: str, seed: int, kind: str, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    x = laid_out(scores(seed, (rows, columns), kind), layout)
    targets = laid_out(rng.integers(-columns, columns, rows).astype(dtype), layout)  # -1 is the last class, as in NumPy
    with np.errstate(invalid="ignore"):
        losses, probabilities = softmax_cross_entropy.function(XP, double(x), targets)
    result, found = softmax.softmax_cross_entropy(XP, x, targets)
    near(found, probabilities)
    np.testing.assert_allclose(result, losses, rtol=1e-5, atol=1e-6)  # the logarithm of nearly 1
    scale = laid_out(rng.normal(size=rows).astype("float32"), layout)
    slopes = softmax_minus_one_hot.function(XP, double(scale), probabilities, targets)
    result = softmax.softmax_minus_one_hot(XP, scale, laid_out(found, layout), targets)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, slopes, rtol=1e-5, atol=2e-6)  # p - 1, where p is nearly 1


def test_logarithms_of_large_scores_keep_their_digits() -> None:
    x = np.tile(np.array([10_000, 9_999.5, 9_990], "float32"), (2, 7))
    exact = m03.log_softmax.function(XP, double(x), dim=1)
    np.testing.assert_allclose(softmax.log_softmax(XP, x, dim=1), exact, rtol=3e-7)
    losses = softmax.softmax_cross_entropy(XP, x, np.array([1, 5]))[0]
    np.testing.assert_allclose(losses, -exact[[0, 1], [1, 5]], rtol=3e-7)


def test_probabilities_add_up_to_one() -> None:
    p = softmax.softmax(XP, scores(0, (2, 5000) if SIMULATED else (20, 5000)), dim=1)
    np.testing.assert_allclose(double(p).sum(axis=1), 1, atol=2e-6)
    assert p.min() >= 0


def test_masks_and_extremes() -> None:
    x = np.full((4, 40), -INF, "float32")
    x[0, 39] = 3
    x[1, :2] = 5
    x[3] = -1e4
    x[3, 17] = 1e4
    p = softmax.softmax(XP, x, dim=1)
    assert (p[0, 39], p[0, :39].any()) == (1, False)
    assert p[1, :3].tolist() == [0.5, 0.5, 0]
    assert np.isnan(p[2]).all()  # nothing is possible there
    assert np.flatnonzero(p[3]).tolist() == [17]
    assert softmax.log_softmax(XP, x, dim=1)[3, :2].tolist() == [-2e4, -2e4]
    losses, _ = softmax.softmax_cross_entropy(XP, x, np.array([0, 1, 0, 17]))
    assert losses[[0, 3]].tolist() == [INF, 0]


def test_one_bad_number_spoils_its_row_only() -> None:
    for place in (0, 15, 16, 20):
        for bad in (NAN, INF):
            x = scores(0, (3, 21))
            x[1, place] = bad
            for function in (softmax.softmax, softmax.log_softmax):
                assert np.isnan(function(XP, x, dim=1)).any(axis=1).tolist() == [False, True, False]


@cpu_only
def test_targets_that_are_no_class() -> None:
    x = scores(0, (40, 9))
    for bad in (9, -10, 1 << 40):
        targets = np.zeros(40, "int64")
        targets[39] = bad
        with pytest.raises(IndexError, match="1 targets are not between 0 and 8"):
            softmax.softmax_cross_entropy(XP, x, targets)
        with pytest.raises(IndexError, match="1 targets are not between 0 and 8"):
            softmax.softmax_minus_one_hot(XP, x[:, 0].copy(), x, targets)
    wide, targets = scores(0, (100, 2000)), np.full(100, 2000)
    with pytest.raises(IndexError, match="100 targets"):  # on all cores
        softmax.softmax_cross_entropy(XP, wide, targets)
    with pytest.raises(IndexError, match="100 targets"):
        softmax.softmax_minus_one_hot(XP, wide[:, 0].copy(), wide, targets)


@pytest.mark.skipif(WHERE == "cpu", reason="the kernels for CPUs refuse such targets")
def test_rows_of_targets_that_are_no_class_become_nan() -> None:
    x, targets = scores(0, (6, 9)), np.array([0, 9, 8, -10, -9, 1 << 40])
    bad = [False, True, False, True, False, True]
    losses, probabilities = softmax.softmax_cross_entropy(XP, x, targets)
    assert np.isnan(losses).tolist() == bad
    near(probabilities, m03.softmax.function(XP, double(x), dim=1))
    slopes = softmax.softmax_minus_one_hot(XP, np.ones(6, "float32"), probabilities, targets)
    assert np.isnan(slopes).all(axis=1).tolist() == np.isnan(slopes).any(axis=1).tolist() == bad


@pytest.mark.skipif(WHERE == "cpu", reason="a matter of the kernels for GPUs")
def test_every_row_has_threads_and_none_too_many() -> None:
    for columns in (1, 2, 3, 31, 32, 33, 100, 256, 257, 2048, 5000, 1 << 20):
        for rows in (1, 5, 1000):
            blocks, (across, down) = softmax.dealt(rows, columns)
            assert across * down == softmax.THREADS
            assert across & (across - 1) == 0
            assert across < 2 * columns
            assert (blocks - 1) * down < rows <= blocks * down


def test_empty_and_other_axes() -> None:
    for shape in ((0, 5), (3, 0), (0, 0)):
        x = np.empty(shape, "float32")
        assert softmax.softmax(XP, x, dim=-1).shape == softmax.log_softmax(XP, x, dim=1).shape == shape
    losses, probabilities = softmax.softmax_cross_entropy(XP, np.empty((0, 5), "float32"), np.empty(0, "int64"))
    assert (losses.shape, probabilities.shape) == ((0,), (0, 5))
    with pytest.raises(ValueError, match="log_softmax: the kernel goes over the last axis, not over 0"):
        softmax.log_softmax(XP, np.ones((2, 3), "float32"), dim=0)


# -- memory and cores --------------------------------------------------------------------------------------------------


@cpu_only
@pytest.mark.parametrize("end", [True, False])
def test_at_protected_pages(end: bool) -> None:
    for columns in (*range(1, 2 * LANES + 2), 4 * LANES + 3, 256):
        shape = (3, columns)
        x, targets, scale = scores(columns, shape), np.arange(3) % columns, scores(1, (3,))
        here = [guarded(array, end) for array in (x, targets, scale)]
        for kernel in (softmax.softmax_rows, softmax.log_softmax_rows):
            out, expected = guarded_empty(shape, end=end), np.empty(shape, "float32")
            kernel(here[0], out, 0, 3)
            kernel(x, expected, 0, 3)
            assert np.array_equal(out, expected)
        losses, out = guarded_empty(3, end=end), guarded_empty(shape, end=end)
        assert softmax.cross_entropy_rows(*here[:2], losses, out, 0, 3) == 0
        near(losses, softmax_cross_entropy.function(XP, double(x), targets)[0])
        assert softmax.cross_entropy_backward(here[2], guarded(out, end), here[1], out, 0, 3) == 0


@cpu_only
def test_one_core_and_several() -> None:
    shape = (30, 1000)
    x, targets, scale = scores(0, shape), np.arange(30), scores(1, (30,))

    def outputs() -> tuple[Any, ...]:
        return np.full(30, 7, "float32"), *(np.full(shape, 7, "float32") for _ in range(4))

    alone, together = outputs(), outputs()
    softmax.softmax_rows(x, alone[1], 1, 29)
    softmax.softmax_rows_parallel(x, together[1], 1, 29)
    softmax.log_softmax_rows(x, alone[2], 1, 29)
    softmax.log_softmax_rows_parallel(x, together[2], 1, 29)
    softmax.cross_entropy_rows(x, targets, alone[0], alone[3], 1, 29)
    softmax.cross_entropy_rows_parallel(x, targets, together[0], together[3], 1, 29)
    softmax.cross_entropy_backward(scale, alone[1], targets, alone[4], 1, 29)
    softmax.cross_entropy_backward_parallel(scale, together[1], targets, together[4], 1, 29)
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)
        assert (one[[0, 29]] == 7).all()
