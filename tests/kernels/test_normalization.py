"""Normalisation kernels equal the operations both ways, also where the mean is large, and stay in their arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import LAYOUTS, XP, laid_out, near
from tests.kernels.place import SIMULATED, WHERE, cpu_only, drawn, kernels
from tinytorch import m09_spatial as m09
from tinytorch.kernels.cpu.layouts import layout
from tinytorch.kernels.cpu.vectors import LANES

normalization = kernels("normalization")
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 1 << 30)
sizes = st.integers(1, 7) | st.integers(1, 40 if SIMULATED else 150)
few, many, wide, lead = (3, 9, 5, 8) if SIMULATED else (6, 90, 12, 20)
# What cores, or blocks, share: rows, long rows, small pictures, large ones. The simulator's blocks are small.
ROWS, LONG, SMALL, LARGE = (
    ((260, 3), (1, 2, 257), (32, 2, 5, 4), (2, 1, 19, 29)) if SIMULATED else
    ((768, 128), (3, 130, 257), (32, 16, 20, 20), (5, 3, 129, 129))
)  # fmt: skip


@st.composite
def cases(draw: Any) -> tuple[tuple, tuple, tuple]:
    """A shape, the axes to normalise over, and the weight's shape: of layer norm or of batch norm."""
    if draw(st.booleans()):
        lead = draw(st.lists(st.integers(1, few), max_size=2)) + draw(st.lists(st.integers(1, many), max_size=1))
        shape = (*lead, draw(sizes), *draw(st.lists(st.integers(1, 3), max_size=1)))
        axes = range(len(lead), len(shape))
        return shape, tuple(axes if draw(st.booleans()) else (d - len(shape) for d in axes)), shape[len(lead) :]
    inner = draw(st.lists(st.integers(1, wide), min_size=1, max_size=3))
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, min(few, 5))), *inner)
    return shape, (0, *range(2, len(shape))), (shape[1], *(1 for _ in inner))


def values(seed: int, shape: tuple, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, shape).astype("float32")


def double(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else array.astype("float64")


def check_both_ways(
    shape: tuple, dims: tuple, weight_shape: tuple, seed: int, mean: float, layout: str = "plain", affine: bool = True,
    eps: float = 1e-3,
) -> None:  # fmt: skip
    x, g = (laid_out(values(seed + i, shape, m), layout) for i, m in enumerate((mean, 0.5)))
    weight = laid_out(values(seed + 2, weight_shape, 1), layout) if affine else None
    bias = laid_out(values(seed + 3, weight_shape), layout) if affine else None
    exact = m09.normalize.function(XP, double(x), double(weight), double(bias), dims=dims, eps=eps)
    results = normalization.normalize(XP, x, weight, bias, dims=dims, eps=eps)
    near(results[0], exact[0])
    near(results[2], exact[2])
    np.testing.assert_allclose(results[1], exact[1], rtol=1e-6, atol=1e-6 * np.abs(x).max())  # a sum of both signs

    expected = m09.normalize_gradients.function(
        XP, double(g), double(x), double(weight), *exact[1:], dims=dims, eps=eps, shape=weight_shape)  # fmt: skip
    # What is left of differences and sums is compared with what they are made of.
    largest = np.abs(g).max() * (np.abs(weight).max() if affine else 1) / math.sqrt(exact[2].min() + eps)
    gradients = normalization.normalize_gradients(
        XP, g, x, weight, *results[1:], dims=dims, eps=eps, shape=weight_shape)  # fmt: skip
    summed = np.abs(g).sum() / math.prod(weight_shape)
    for result, wanted, scale in zip(gradients, expected, (largest, summed, summed), strict=True):
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=3e-6 * scale)
    only = normalization.normalize_gradients(XP, g, x, weight, *results[1:], dims=dims, eps=eps, shape=None)
    assert len(only) == 1
    assert np.array_equal(only[0], gradients[0])


@given(cases(), seeds, st.sampled_from([0.0, 5.0, 1000.0]), layouts, st.booleans())
@example((ROWS, (1,), ROWS[1:]), 0, 0.0, "plain", True)
@example((LONG, (2,), LONG[2:]), 0, 1000.0, "plain", True)
@example((SMALL, (0, 2, 3), (SMALL[1], 1, 1)), 0, 1000.0, "plain", True)
@example((LARGE, (0, 2, 3), (LARGE[1], 1, 1)), 0, 1000.0, "turned", False)
@drawn(200)
def test_both_ways(case: tuple, seed: int, mean: float, layout: str, affine: bool) -> None:
    check_both_ways(*case, seed, mean, layout, affine)


@pytest.mark.parametrize("case", [
    ((8 if SIMULATED else 64, 96), (1,), (96,)), ((8, 1 if SIMULATED else 3, 16, 16), (0, 2, 3), (-1, 1, 1)),
])  # fmt: skip
def test_large_means_cost_no_digits(case: tuple) -> None:
    """A float32 of 1000 is off by up to 3e-5, which is more than is lost here."""
    shape, dims, weight_shape = case
    weight_shape = (shape[1], *weight_shape[1:])
    x, g, weight = values(0, shape, 1000), values(1, shape), values(2, weight_shape)
    out, mean, variance = normalization.normalize(XP, x, weight, weight, dims=dims, eps=1e-5)
    exact = m09.normalize.function(XP, *(double(a) for a in (x, weight, weight)), dims=dims, eps=1e-5)
    gradients = normalization.normalize_gradients(
        XP, g, x, weight, mean, variance, dims=dims, eps=1e-5, shape=weight_shape)  # fmt: skip
    expected = m09.normalize_gradients.function(
        XP, *(double(a) for a in (g, x, weight)), *exact[1:], dims=dims, eps=1e-5, shape=weight_shape)  # fmt: skip
    for result, wanted in zip((out, *gradients), (exact[0], *expected), strict=True):
        near(result, wanted, rtol=5e-7)


def test_pictures_that_differ_much() -> None:
    """The first plane's mean, which deviations are taken from, may be far from the mean of all."""
    x = values(0, (16, 3, 10, 10)) + np.arange(16, dtype="float32")[::-1, None, None, None] * 100
    exact = m09.normalize.function(XP, double(x), dims=(0, 2, 3), eps=1e-5)
    for result, wanted in zip(normalization.normalize(XP, x, dims=(0, 2, 3), eps=1e-5), exact, strict=True):
        near(result, wanted)


def test_constant_rows_and_planes() -> None:
    """All deviations are one rounding error; their variance is 0, and must not come out below."""
    small, large = [((3, 33), (1,)), ((3, 2, 3, 7), (0, 2, 3))], [((1, 30_011 if SIMULATED else 100_003), (1,))]
    for count, number in enumerate(np.random.default_rng(0).normal(0, 100, 3 if SIMULATED else 300).astype("float32")):
        for shape, dims in small + large if count % 10 == 1 else small:  # only much is rounded below 0
            x = np.full(shape, number)
            out, mean, variance = normalization.normalize(XP, x, dims=dims, eps=0.0)
            most = 1e-12 * (16 / LANES) ** 2 * number**2  # the fewer lanes, the more numbers one after another in each
            assert ((variance >= 0) & (variance <= most)).all()
            np.testing.assert_allclose(mean, np.full(mean.shape, number), rtol=2e-7)
            out = normalization.normalize(XP, x, dims=dims, eps=1e-5)[0]
            assert np.abs(out).max() <= 1e-7 * abs(number) / math.sqrt(1e-5)


def test_nan_and_infinity_stay_in_their_row_or_channel() -> None:
    for bad in (math.nan, math.inf):
        x = values(0, (5, 40))
        x[2, 7] = bad
        out = normalization.normalize(XP, x, dims=(1,), eps=1e-5)[0]
        assert np.isnan(out).any(axis=1).tolist() == [False, False, True, False, False]
        pictures = values(0, (5, 3, 4, 4))
        pictures[3, 1, 2, 2] = bad
        out = normalization.normalize(XP, pictures, dims=(0, 2, 3), eps=1e-5)[0]
        assert np.isnan(out).any(axis=(0, 2, 3)).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("shape", "dims", "weight_shape"),
    [((0, 5), (1,), (5,)), ((3, 0), (1,), (0,)), ((0, 2, 3, 3), (0, 2, 3), (2, 1, 1)),
     ((4, 2, 0), (0, 2), (2, 1)), ((4, 0, 3), (0, 2), (0, 1))],
)  # fmt: skip
def test_empty(shape: tuple, dims: tuple, weight_shape: tuple) -> None:
    x, weight = np.empty(shape, "float32"), np.ones(weight_shape, "float32")
    out, mean, variance = normalization.normalize(XP, x, weight, weight, dims=dims, eps=1e-5)
    assert out.shape == shape
    assert mean.shape == variance.shape == tuple(1 if d in dims else n for d, n in enumerate(shape))
    gradients = normalization.normalize_gradients(
        XP, x, x, weight, mean, variance, dims=dims, eps=1e-5, shape=weight_shape)  # fmt: skip
    assert [part.shape for part in gradients] == [shape, weight_shape, weight_shape]
    assert not gradients[1].any()


@given(st.integers(0, lead), st.integers(1, 9), st.lists(st.integers(0, many), max_size=2), layouts, seeds)
@example(16, 3, [8, 9] if SIMULATED else [32, 32], "plain", 0)
@drawn(60)
def test_channel_sums(pictures: int, channels: int, inner: list, layout: str, seed: int) -> None:
    x = laid_out(values(seed, (pictures, channels, *inner), 1), layout)
    axes = (0, *range(2, x.ndim))
    near(normalization.sum_over_all_but_channels(XP, x, dim=axes), double(x).sum(axis=axes))


@given(st.lists(st.integers(0, lead), min_size=1, max_size=2), st.integers(0, 3), sizes, layouts, st.booleans(), seeds)
@example([1], 1, 1, "plain", False, 0)
@example([193], 1, 2 * normalization.WIDE + 5, "plain", True, 0)
@example([5, 30], 2, normalization.WIDE - 1, "turned", False, 0)
@example([0, 4], 1, 7, "plain", False, 0)
@example([4], 0, 7, "plain", True, 0)
@drawn(150)
def test_sum_over_leading(lead: list, more: int, columns: int, layout: str, keepdim: bool, seed: int) -> None:
    """Over the axes (0,) or (0, 1), of which another one or none is left besides the columns."""
    for kept in ((columns,), (more, columns)):
        x, dim = laid_out(values(seed, (*lead, *kept), 1), layout), (*range(len(lead)),)
        out = normalization.sum_over_leading(XP, x, dim=dim, keepdim=keepdim)
        exact = double(x).sum(axis=dim, keepdims=keepdim)
        assert (out.dtype, out.shape) == (np.float32, exact.shape)
        np.testing.assert_allclose(out, exact, rtol=0, atol=1e-6 * np.abs(x).sum(axis=dim).max(initial=0))


def test_sums_of_many_rows_keep_their_digits() -> None:
    """One sum after another would lose half of each number where a million came before."""
    x = values(0, (1 << 13 if SIMULATED else 1 << 16, 3), 100)
    near(normalization.sum_over_leading(XP, x, dim=(0,)), double(x).sum(axis=0), rtol=1e-6)


def test_nan_and_infinity_stay_in_their_column() -> None:
    for columns in (1, 9) if SIMULATED else (1, LANES - 1, LANES + 3, normalization.WIDE + 5):
        for column in {0, columns // 2, columns - 1}:
            for row, bad in ((0, math.nan), (64, math.inf), (70, math.nan)):
                x = values(0, (71, columns))
                expected = normalization.sum_over_leading(XP, x, dim=(0,))
                x[row, column] = expected[column] = bad
                np.testing.assert_array_equal(normalization.sum_over_leading(XP, x, dim=(0,)), expected)


def test_layout() -> None:
    known = layout
    assert known((4, 8), (1,), (8,)) == known((4, 8), (-1,), None) == known((2, 3, 4), (1, 2), (3, 4)) == "rows"
    assert known((4, 8, 5), (0, 2), (8, 1)) == known((4, 8, 5, 5), (0, -2, -1), None) == "planes"
    assert known((4, 8), (0,), (8,)) == ""  # a channel's numbers do not lie together
    assert known((4, 8, 5, 5), (2, 3), (8, 1, 1)) == ""  # instance norm
    assert known((4, 2, 4, 5), (2, 3), (2, 4, 1)) == ""  # group norm
    assert known((4, 8, 5), (0, 2), (1,)) == known((4, 8), (1,), (1,)) == known((4, 8, 5), (1,), None) == ""
    x = np.ones((4, 8), "float32")
    with pytest.raises(ValueError, match=r"no kernel for \(4, 8\) over \(0,\)"):
        normalization.normalize(XP, x, dims=(0,), eps=1e-5)


@pytest.mark.skipif(WHERE == "cpu", reason="a matter of the kernels for GPUs")
@given(st.integers(1, 1000), st.integers(1, 9000), st.integers(1, 10_000))
@example(1, 1, 1 << 22)
@example(1 << 22, 1, 1)
@settings(deadline=None)
def test_every_channel_is_cut_into_parts_that_are_not_empty(pictures: int, channels: int, inner: int) -> None:
    (first, parts), (lanes, tall), cuts = normalization.cut_up(pictures, channels, inner)
    groups = parts // cuts
    assert (first, lanes * tall, groups * cuts) == (channels, normalization.THREADS, parts)
    assert parts <= normalization.THREADS  # each block has a thread for each part
    assert groups <= pictures
    assert cuts <= inner
    assert parts == 1 or pictures * inner >= parts * normalization.FEWEST * normalization.THREADS
    assert lanes & (lanes - 1) == 0


@pytest.mark.skipif(WHERE == "cpu", reason="a matter of the kernels for GPUs")
def test_launches_are_few() -> None:
    from tinytorch.kernels.cuda.jit import instead_of_launches

    launched: list[str] = []
    x, pictures, w, v = (values(0, shape) for shape in ((300, 3), (40, 3, 8, 8), (3,), (3, 1, 1)))
    mean, none = values(0, (300, 1)), {"eps": 1e-5, "shape": None}
    with instead_of_launches(lambda kernel, *rest: launched.append(kernel.py_func.__name__)):
        for call, expected in (
            (lambda: normalization.normalize(XP, x, w, w, dims=(1,), eps=1e-5), ["normalize_rows"]),
            (lambda: normalization.normalize_gradients(XP, x, x, w, mean, mean, dims=(1,), **none), ["rows_backward"]),
            (lambda: normalization.normalize_gradients(XP, x, x, w, mean, mean, dims=(1,), eps=1e-5, shape=(3,)),
             ["rows_backward", "add_slopes"] + ["add_rows"] * SIMULATED),
            (lambda: normalization.normalize(XP, pictures, v, v, dims=(0, 2, 3), eps=1e-5),
             ["survey_planes", "normalize_planes"]),
            (lambda: normalization.normalize_gradients(XP, pictures, pictures, v, v, v, dims=(0, 2, 3), **none),
             ["survey_slopes", "planes_backward"]),
            (lambda: normalization.sum_over_leading(XP, np.ones((1 << 12, 40), "float32"), dim=(0,)), ["add_rows"] * 2),
        ):  # fmt: skip
            call()
            assert launched == expected
            launched.clear()


# -- memory and cores --------------------------------------------------------------------------------------------------


def arguments(rows: bool, shape: tuple, place: Callable, empty: Callable) -> tuple[list, list]:
    """What the forward and the backward kernel take before start and stop; outputs filled by `empty`."""
    count = shape[0] if rows else shape[1]
    x, g = place(values(0, shape)), place(values(1, shape))
    weight, bias = place(values(2, shape[1:2])), place(values(3, shape[1:2]))
    mean, variance = place(values(4, (count,))), place(values(5, (count,)) ** 2 + 1)
    sums = empty((3, 2, shape[1]) if rows else (2, shape[1]))
    forward = [x, weight, bias, 1e-5, empty(shape), empty((count,)), empty((count,))]
    return forward, [g, x, weight, mean, variance, 1e-5, empty(shape), sums]


@cpu_only
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("columns", [1, 7, 16, 17, 33, 64, 65, 100])
def test_at_protected_pages(columns: int, end: bool) -> None:
    for rows, shape in ((True, (5, columns)), (False, (3, 2, columns))):
        kernels = (
            (normalization.normalize_rows, normalization.rows_backward)
            if rows
            else (normalization.normalize_planes, normalization.planes_backward)
        )
        expected = arguments(rows, shape, lambda array: array, lambda shape: np.empty(shape, "float32"))
        checked = arguments(
            rows, shape, lambda array: guarded(array, end), lambda shape: guarded_empty(shape, end=end))  # fmt: skip
        counts = (shape[0], 3) if rows else (shape[1], shape[1])
        for kernel, count, plain, protected in zip(kernels, counts, expected, checked, strict=True):
            kernel(*plain, 0, count)
            kernel(*protected, 0, count)
            for one, other in zip(plain, protected, strict=True):
                np.testing.assert_array_equal(other, one)
    normalization.add_planes(guarded(values(0, (2, 3, columns)), end), guarded_empty(3, end=end), 0, 3)


@cpu_only
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 64, 65, 194])
def test_sums_of_rows_at_protected_pages(rows: int, end: bool) -> None:
    """Each block by itself writes its columns only."""
    wide = normalization.WIDE
    for columns in (1, LANES - 1, LANES, LANES + 1, 2 * LANES + 3, wide - 1, wide, wide + 1, 2 * wide + LANES + 1):
        x, out = guarded(values(rows, (rows, columns), 1), end), guarded_empty(columns, end=end)
        before = out.copy()
        for block in reversed(range(-(-columns // wide))):
            np.testing.assert_array_equal(out[: (block + 1) * wide], before[: (block + 1) * wide])
            normalization.add_rows(x, out, block, block + 1)
        near(out, double(x).sum(axis=0))


@cpu_only
def test_one_core_and_several() -> None:
    for rows, shape in ((True, (300, 50)), (False, (6, 7, 200))):
        twins = (
            (normalization.normalize_rows, normalization.normalize_rows_parallel),
            (normalization.rows_backward, normalization.rows_backward_parallel),
        ) if rows else (
            (normalization.normalize_planes, normalization.normalize_planes_parallel),
            (normalization.planes_backward, normalization.planes_backward_parallel),
        )  # fmt: skip
        alone, together = (
            arguments(rows, shape, lambda array: array, lambda shape: np.zeros(shape, "float32")) for _ in range(2)
        )
        counts = (shape[0], 3) if rows else (shape[1], shape[1])
        for (serial, parallel), count, first, second in zip(twins, counts, alone, together, strict=True):
            serial(*first, 0, count)
            parallel(*second, 0, count)
            for one, other in zip(first, second, strict=True):
                np.testing.assert_array_equal(one, other)
    out, other = np.zeros(9, "float32"), np.zeros(9, "float32")
    x = values(0, (8, 9, 100))
    normalization.add_planes(x, out, 0, 9)
    normalization.add_planes_parallel(x, other, 0, 9)
    np.testing.assert_array_equal(out, other)
    x = values(0, (150, 3 * normalization.WIDE + 5))
    out, other = np.zeros(x.shape[1], "float32"), np.zeros(x.shape[1], "float32")
    normalization.add_rows(x, out, 0, 4)
    normalization.add_rows_parallel(x, other, 0, 4)
    np.testing.assert_array_equal(out, other)
    assert out.all()
