"""Products of matrices against float64, however both lie in memory; the same bits on any number of cores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import LAYOUTS, XP, laid_out, near
from tests.kernels.place import cpu_only
from tinytorch.kernels.cpu import matmul as kernels
from tinytorch.kernels.cpu.amx import permitted
from tinytorch.kernels.cpu.jit import kernel
from tinytorch.kernels.cpu.lines import copy_block
from tinytorch.kernels.cpu.matmul import (
    BLOCK,
    DEPTH,
    NARROW_ROWS,
    NOTHING,
    STRIP,
    TOGETHER,
    WIDE,
    linear,
    linear_gradients,
    linear_relu,
    matmul,
    product,
)
from tinytorch.kernels.cpu.tiles import ROWS, VECTOR_BYTES, transpose, turn
from tinytorch.kernels.cpu.vectors import LANES

pytestmark = cpu_only


@pytest.fixture(params=["vectors", pytest.param("amx", marks=pytest.mark.skipif(not permitted(), reason="no AMX"))])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """How large products are made: all of them, that a test of it may be small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "worth_splitting", lambda *sizes: request.param == "amx" and min(sizes) > 0)
        yield request.param


either_way = pytest.mark.usefixtures("way")
seeds = st.integers(0, 1 << 30)
sizes = st.integers(0, 80)
rows = sizes | st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
columns = sizes | st.sampled_from([n for i in (1, 2, 3) for n in range(i * STRIP - 1, i * STRIP + 2)])
depths = sizes | st.integers(DEPTH - 1, DEPTH + 2 * LANES) | st.integers(DEPTH + 1, 2100)
LAYS = (*LAYOUTS, "window", "turned window", "every second row", "backwards", "rows backwards",
        "turned rows backwards", "same rows", "same columns")  # fmt: skip
lays = st.sampled_from(LAYS)


def lay(array: np.ndarray, how: str) -> np.ndarray:
    """As `laid_out`, for a matrix; of "same rows" and "same columns", the first one stands for all."""
    if how.startswith("turned "):
        return lay(array.T, how.removeprefix("turned ")).T
    if how == "window":
        wide = np.full((array.shape[0] + 3, array.shape[1] + 5), np.nan, array.dtype)
        view = wide[1:-2, 3:-2]
        view[...] = array
        return view
    if how == "every second row":
        return np.repeat(array, 2, axis=0)[::2]
    if how == "backwards":
        return np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]
    if how == "rows backwards":
        return np.ascontiguousarray(array[::-1])[::-1]
    if how == "same rows":
        return np.broadcast_to(array[:1], array.shape) if array.size else array
    if how == "same columns":
        return np.broadcast_to(array[:, :1], array.shape) if array.size else array
    return laid_out(array, how)


def whole(seed: int, *shape: int) -> np.ndarray:
    """Whole numbers so small that float32 has their products' sums exactly, whatever is added first."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype("float32")


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def exact(a: np.ndarray, b: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    return a.astype("float64") @ b.astype("float64") + (0 if bias is None else bias)


def check(out: np.ndarray, expected: np.ndarray) -> None:
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, expected)


# -- values ------------------------------------------------------------------------------------------------------------


@either_way
@given(rows, depths, columns, lays, lays, st.booleans(), seeds)
@example(BLOCK + 1, DEPTH + 1, STRIP + 1, "plain", "turned", True, 0)
@example(2 * BLOCK + 3, 2 * DEPTH + 5, 2 * STRIP, "turned", "plain", True, 0)
@example(BLOCK + 5, DEPTH + 7, 3 * STRIP - LANES, "turned window", "turned window", True, 0)
@example(5, LANES - 1, STRIP + 3, "rows backwards", "rows backwards", True, 0)
@example(5, LANES - 1, STRIP + 3, "plain", "turned rows backwards", True, 0)
@example(5, DEPTH + 1, STRIP + 3, "plain", "turned rows backwards", True, 0)
def test_any_shape_and_layout(M: int, K: int, N: int, left: str, right: str, biased: bool, seed: int) -> None:
    a, b = lay(whole(seed, M, K), left), lay(whole(seed + 1, K, N), right)
    bias = whole(seed + 2, N) if biased else NOTHING
    check(product(a, b, bias), exact(a, b, bias if biased else None))


@either_way
@given(st.lists(st.integers(0, 9), max_size=3), depths, columns, lays, st.sampled_from(LAYOUTS), st.booleans(), seeds)
@example([7, 3], 0, 5, "plain", "plain", True, 0)
@example([], 0, 5, "plain", "plain", True, 0)
@example([3], 2 * LANES + 1, 4 * LANES + 3, "turned", "strided", True, 0)
@example([2, 150], 40, 2 * STRIP + 1, "plain", "turned", True, 0)
def test_leading_axes(lead: list, K: int, N: int, lay_weight: str, lay_x: str, biased: bool, seed: int) -> None:
    x = laid_out(whole(seed, *lead, 2, K), lay_x)  # two axes at least, as where the kernels are attached
    weight = lay(whole(seed + 1, N, K), lay_weight)
    bias = laid_out(whole(seed + 2, N), lay_x) if biased else None
    out = exact(x, weight.T, bias)
    check(linear(XP, x, weight, bias), out)
    check(linear_relu(XP, x, weight, bias), np.maximum(out, 0))
    check(matmul(XP, x, weight.T), exact(x, weight.T))


@either_way
@pytest.mark.parametrize(
    ("M", "K", "N"), [(64, 40, 64), (1, DEPTH, 300), (300, 2100, 70), (BLOCK + 9, DEPTH + 20, STRIP + 5), (300, 7, 300)]
)
def test_precision(M: int, K: int, N: int) -> None:
    a, weight, bias = numbers(0, M, K), numbers(1, N, K), numbers(2, N)
    near(linear(XP, a, weight, bias), exact(a, weight.T, bias))
    near(matmul(XP, np.asfortranarray(a), np.ascontiguousarray(weight.T)), exact(a, weight.T))


@either_way
@given(st.lists(st.integers(1, 9), min_size=1, max_size=2), sizes, sizes, st.sampled_from(LAYOUTS), seeds)
@example([50, 40], 60, 70, "plain", 0)
def test_gradients_of_linear(lead: list, K: int, N: int, layout: str, seed: int) -> None:
    g, x = (laid_out(whole(seed + i, *lead, n + 1), layout) for i, n in enumerate((N, K)))
    weight = laid_out(whole(seed + 2, N + 1, K + 1), layout)
    flat_g, flat_x = (array.reshape(-1, array.shape[-1]) for array in (g, x))
    expected = exact(g, weight), exact(flat_g.T, flat_x), flat_g.sum(axis=0, dtype="float64")
    for tracked in ((0, 1, 2), (1,), (0, 2), ()):
        found = linear_gradients(XP, g, x, weight, tracked=tracked)
        assert len(found) == len(tracked)
        for i, gradient in zip(tracked, found, strict=True):
            check(gradient, expected[i])


@either_way
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("left", "right"), [("plain", "plain"), ("plain", "turned"), ("turned", "turned")])
def test_nan_and_infinity_stay_in_their_row_or_column(bad: float, left: str, right: str) -> None:
    """Tiles compute some rows twice and some lanes for nobody; what stands there must not get into others' results."""
    for M, K, N in ((1, 3, 1), (ROWS + 1, LANES + 1, LANES + 1), (NARROW_ROWS + 3, 70, 3), (40, DEPTH + 3, STRIP + 2)):
        a, b, bias = whole(0, M, K), whole(1, K, N), whole(2, N)
        b[K // 2] = 1  # as nothing times infinity is nan
        clean = product(lay(a, left), lay(b, right), bias)
        for row in {0, M // 2, M - 1}:
            spoilt = a.copy()
            spoilt[row, K // 2] = bad
            out = product(lay(spoilt, left), lay(b, right), bias)
            np.testing.assert_array_equal(out[row], np.full(N, bad))
            np.testing.assert_array_equal(np.delete(out, row, 0), np.delete(clean, row, 0))
        a[:, K - 1] = 1
        clean = product(lay(a, left), lay(b, right), bias)
        for column in {0, N // 2, N - 1}:
            spoilt, spoilt_bias = b.copy(), bias.copy()
            spoilt[K - 1, column] = spoilt_bias[column] = bad
            for out in (product(lay(a, left), lay(spoilt, right), bias),
                        product(lay(a, left), lay(b, right), spoilt_bias)):  # fmt: skip
                np.testing.assert_array_equal(out[:, column], np.full(M, bad))
                np.testing.assert_array_equal(np.delete(out, column, 1), np.delete(clean, column, 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_stay_where_they_are_among_few_rows(bad: float) -> None:
    for K in (1, LANES - 1, LANES + 1):
        x, weight, bias = np.ones((3, K), "float32"), np.ones((TOGETHER + 2, K), "float32"), whole(0, TOGETHER + 2)
        clean = linear(XP, x, weight, bias)
        for array, place in ((x, (1, K - 1)), (x, (0, 0)), *((weight, (n, K // 2)) for n in range(len(weight)))):
            array[place] = bad
            expected = clean.copy()
            expected[place[0] if array is x else (slice(None), place[0])] = bad
            np.testing.assert_array_equal(linear(XP, x, weight, bias), expected)
            array[place] = 1


# -- memory ------------------------------------------------------------------------------------------------------------


def multiplied(
    a: np.ndarray, b: np.ndarray, bias: np.ndarray, out: np.ndarray, block: int = LANES, parts: int = 0,
    by_blocks: bool = True,
) -> np.ndarray:  # fmt: skip
    """`out`, filled on one core, or in several parts."""
    jobs = -(-out.shape[0] // block) * -(-out.shape[1] // STRIP)
    function = kernels.multiply_on_cores if parts else kernels.multiply_serially
    function(
        parts, jobs, a.ctypes.data, *a.strides, b.ctypes.data, *b.strides, bias, out, a.shape[1], block,
        by_blocks,
    )  # fmt: skip
    return out


EDGE_ROWS = (1, ROWS // 2, ROWS // 2 + 1, ROWS, ROWS + 1, NARROW_ROWS + 1, 2 * LANES + 3)
EDGE_COLUMNS = (1, LANES - 1, LANES, LANES + 1, STRIP - 1, STRIP, STRIP + 1, STRIP + LANES, 2 * STRIP + LANES + 3)
EDGE_DEPTHS = (0, 1, LANES - 1, LANES, LANES + 1, 2 * LANES, 2 * LANES + 3)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("right_turned", [False, True])
@pytest.mark.parametrize("left_turned", [False, True])
def test_at_protected_pages(left_turned: bool, right_turned: bool, end: bool) -> None:
    cases = [(M, K, N) for M in EDGE_ROWS for N in EDGE_COLUMNS for K in EDGE_DEPTHS]
    cases += [(ROWS + 1, K, N) for K in (DEPTH + 1, DEPTH + LANES + 3) for N in EDGE_COLUMNS]
    for case, (M, K, N) in enumerate(cases):
        a, b = whole(case, M, K), whole(case + 1, K, N)
        a = guarded(a.T, end).T if left_turned else guarded(a, end)
        b = guarded(b.T, end).T if right_turned else guarded(b, end)
        bias = guarded(whole(case + 2, N if case % 2 else 0), end)
        out = multiplied(a, b, bias, guarded_empty((M, N), end=end))
        np.testing.assert_array_equal(out, exact(a, b, bias if len(bias) else None))


@pytest.mark.parametrize("end", [True, False])
def test_few_rows_at_protected_pages(end: bool) -> None:
    for M in (1, 2, LANES - 1):
        for N in range(1, 2 * TOGETHER + 2):
            for K in EDGE_DEPTHS:
                x, weight = guarded(whole(N, M, K), end), guarded(whole(K, N, K), end)
                bias = guarded(whole(K + 1, N if K % 2 else 0), end)
                out = guarded_empty((M, N), end=end)
                kernels.dot_rows(0, -(-N // TOGETHER), x, weight, bias, out)
                np.testing.assert_array_equal(out, exact(x, weight.T, bias if len(bias) else None))


@pytest.mark.parametrize("end", [True, False])
def test_a_strip_at_protected_pages(end: bool) -> None:
    """What is packed fits a scratch of just its size, and a tile reads no more than that."""
    for depth in EDGE_DEPTHS:
        for columns in (1, LANES - 1, LANES, LANES + 1, STRIP - 1, STRIP):
            b = whole(depth, depth, columns)
            for right in (guarded(b, end), guarded(b.T, end).T):
                vectors = -(-columns // LANES)
                strip = guarded_empty((vectors * (depth + 1) - 1) * LANES, end=end)
                kernels.pack_columns(strip.ctypes.data, right.ctypes.data, *right.strides, depth, columns)
                for column in range(columns):
                    first = column // LANES * (depth + 1) * LANES + column % LANES
                    np.testing.assert_array_equal(strip[first::LANES][:depth], b[:, column])
                for rows in (1, ROWS // 2, ROWS, NARROW_ROWS, NARROW_ROWS + 1):
                    a, start = guarded(whole(rows, rows, depth), end), guarded(whole(1, vectors * LANES), end)
                    target = guarded_empty((rows, vectors * LANES), end=end)
                    kernels.product_rows(
                        start.ctypes.data, 0, a.ctypes.data, a.strides[0], LANES * a.strides[0], 4, strip.ctypes.data,
                        depth, target.ctypes.data, target.strides[0], rows, vectors > 1,
                    )  # fmt: skip
                    np.testing.assert_array_equal(target[:, :columns], exact(a, b, start[:columns]))


@kernel
def turn_block(target, source, step, last):
    transpose(target, VECTOR_BYTES, source, step, last)


@pytest.mark.parametrize("end", [True, False])
def test_copies_and_turns_at_protected_pages(end: bool) -> None:
    for rows in (0, 1, 5):
        for columns in (1, LANES - 1, LANES, LANES + 1, STRIP):
            source, target = guarded(whole(0, rows, columns), end), guarded_empty((rows, columns), end=end)
            copy_block(target.ctypes.data, 4 * columns, source.ctypes.data, 4 * columns, rows, columns)
            np.testing.assert_array_equal(target, source)
    for channels in (1, 2, LANES - 1, LANES):
        for pixels in (1, LANES - 1, LANES, LANES + 1, 3 * LANES - 1):
            source, target = guarded(whole(0, channels, pixels), end), guarded_empty((pixels, LANES), end=end)
            turn(target.ctypes.data, source.ctypes.data, pixels, pixels, channels)
            np.testing.assert_array_equal(target[:, :channels], source.T)
    for count in (1, LANES // 2, LANES):
        source, target = guarded(whole(0, count, LANES), end), guarded_empty((LANES, LANES), end=end)
        turn_block(target.ctypes.data, source.ctypes.data, source.strides[0], count - 1)
        np.testing.assert_array_equal(target[:, :count], source.T)
        assert (target[:, count:] == source[-1:].T).all()  # the last row stands for those that are not there


# -- cores -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right"), [("plain", "plain"), ("plain", "turned"), ("turned", "plain")])
def test_cores_and_blocks_change_no_bit(left: str, right: str) -> None:
    shapes = (5 * LANES + 3, 70, 3 * STRIP + 5), (BLOCK + 40, DEPTH + 30, STRIP + LANES), (3, 9, 5), (130, 40, 1)
    for M, K, N in shapes:
        a, b, bias = lay(numbers(0, M, K), left), lay(numbers(1, K, N), right), numbers(2, N)
        expected = multiplied(a, b, bias, np.empty((M, N), "float32"), BLOCK)
        near(expected, exact(a, b, bias))
        for block in (LANES, 3 * LANES, BLOCK, 4 * BLOCK):
            for parts, by_blocks in itertools.product((0, 1, 2, 3, 5), (True, False)):
                out = multiplied(a, b, bias, np.full((M, N), np.nan, "float32"), block, parts, by_blocks)
                np.testing.assert_array_equal(out, expected)


def test_cores_change_no_bit_of_few_rows() -> None:
    for M, K, N in ((1, 70, 30), (5, 200, 3), (LANES - 1, 9, 4 * TOGETHER + 1)):
        x, weight, bias = numbers(0, M, K), numbers(1, N, K), numbers(2, N)
        results = [np.full((M, N), np.nan, "float32") for _ in range(5)]
        kernels.dot_rows_serially(1, -(-N // TOGETHER), x, weight, bias, results[0])
        near(results[0], exact(x, weight.T, bias))
        for out, parts in zip(results[1:], (1, 2, 3, 5), strict=True):
            kernels.dot_rows_on_cores(parts, -(-N // TOGETHER), x, weight, bias, out)
            np.testing.assert_array_equal(out, results[0])


def test_cores_change_no_bit_of_gradients() -> None:
    for M, N, K in ((70, 3 * WIDE + 5, 40), (5, 9, STRIP + 3), (300, 20, 70)):
        g, x, weight = numbers(0, M, N), numbers(1, M, K), numbers(2, N, K)
        expected = exact(g, weight), exact(g.T, x), g.sum(axis=0, dtype="float64")
        for wanted in ((True, True, True), (False, True, True), (True, False, False)):
            results = []
            for parts in (0, 1, 2, 3, 5):
                to_x, to_weight, sums = out = [
                    np.full(e.shape if there else (0,) * e.ndim, np.nan, "float32")
                    for e, there in zip(expected, wanted, strict=True)
                ]
                products = kernels.planned(g, weight, NOTHING, to_x), kernels.planned(g.T, x, NOTHING, to_weight)
                (kernels.gradients_on_cores if parts else kernels.gradients_serially)(parts, *products, g, sums)
                results.append(out)
            for i in (i for i in range(3) if wanted[i]):
                near(results[0][i], expected[i])
                for out in results[1:]:
                    np.testing.assert_array_equal(out[i], results[0][i])


def test_any_number_of_cores_gives_the_same_bits(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are smaller where there are more cores, and a core has its own if there are rows enough."""
    columns = 3 * STRIP - 6
    a, weight, bias = numbers(0, 300, 200), numbers(1, columns, 200), numbers(2, columns)
    results, launched = [], []

    def run(serial: Any, parallel: Any, work: int, parts: int, *rest: Any) -> Any:
        launched.append(rest[-2:])
        return (parallel if parts > 1 else serial)(parts, *rest)

    monkeypatch.setattr(kernels, "run", run)
    for parts in (1, 2, 5):
        monkeypatch.setattr(kernels, "cores", lambda parts=parts: parts)
        results.append(linear(XP, a, weight, bias))
        np.testing.assert_array_equal(results[-1], results[0])
    assert len(set(launched)) == (3 if way == "vectors" else 1)
    near(results[0], exact(a, weight.T, bias))
