"""AMX's products: numbers split without loss, results as near to the exact ones as NumPy's, and no step too far."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import near
from tests.kernels.place import cpu_only
from tinytorch.kernels.cpu import amx
from tinytorch.kernels.cpu import matmul as kernels
from tinytorch.kernels.cpu.amx import BLOCK, DEPTH, DEPTHS, LEAST_TOO_LARGE, PAIR, PARTS, SIDE, TILE, dealt, permitted
from tinytorch.kernels.cpu.jit import features, kernel
from tinytorch.kernels.cpu.matmul import NOTHING, linear_gradients, product
from tinytorch.kernels.cpu.tiles import line_from
from tinytorch.kernels.cpu.vectors import blank
from tinytorch.m16_acceleration import multiply_in_parts, three_parts

pytestmark = [cpu_only, pytest.mark.skipif(not permitted(), reason="no AMX")]


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Of all magnitudes that have parts."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 10.0 ** rng.integers(-9, 10, shape)).astype("float32")


def usual(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def multiplied(a: np.ndarray, b: np.ndarray, bias: np.ndarray, out: np.ndarray, parts: int = 0, across: int = 1) -> int:
    """Fill `out`, on one core or in several parts."""
    function = amx.multiply_on_cores if parts else amx.multiply_serially
    return function(
        parts, a.ctypes.data, *a.strides, b.ctypes.data, *b.strides, bias, out, a.shape[1], across
    )  # fmt: skip


# -- splitting ---------------------------------------------------------------------------------------------------------


@kernel
def split_into(target, source, line_step, depth_step, lines, depth, left):
    scratch = np.empty((BLOCK + 64) // 4, np.float32)
    bad = amx.too_large(
        amx.split(target, source, line_step, depth_step, lines, depth, left, line_from(scratch), blank())
    )
    return bad + 0 * len(scratch)  # which is kept until here


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16, away from zero if two are as near, as float32."""
    return ((x.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)


def panels_of(lines: np.ndarray, left: bool) -> np.ndarray:
    """What `split` is to make of lines (count, depth): the upper halves of parts, in tiles."""
    padded = np.zeros([-(-n // m) * m for n, m in zip(lines.shape, (SIDE, DEPTHS), strict=True)], np.float32)
    padded[: lines.shape[0], : lines.shape[1]] = lines
    high = bfloat16(padded)
    middle = bfloat16(padded - high)
    low = padded - high - middle
    np.testing.assert_array_equal(high + (middle + low), padded)  # nothing is lost
    np.testing.assert_array_equal(bfloat16(low), low)
    halves = np.stack([(part.view(np.uint32) >> np.uint32(16)).astype(np.uint16) for part in (high, middle, low)])
    tiles = halves.reshape(PARTS, len(padded) // SIDE, SIDE, -1, DEPTHS).transpose(1, 3, 0, 2, 4)
    if left:
        return tiles  # (panel, block, part, row, depth)
    return tiles.reshape(*tiles.shape[:-1], SIDE, 2).transpose(0, 1, 2, 4, 3, 5)  # (…, pair of depths, column, 2)


COUNTS = (1, 2, SIDE - 1, SIDE, SIDE + 1, 2 * SIDE + 3)
EDGE_DEPTHS = (1, 2, 15, 16, 17, DEPTHS - 1, DEPTHS, DEPTHS + 1, 2 * DEPTHS + 17)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("by_lines", [True, False])
def test_numbers_are_split_without_loss_at_protected_pages(by_lines: bool, left: bool, end: bool) -> None:
    for count in COUNTS:
        for depth in EDGE_DEPTHS:
            lines = numbers(count * depth, count, depth)
            expected = panels_of(lines, left)
            laid = guarded(lines, end) if by_lines else guarded(np.ascontiguousarray(lines.T), end).T
            steps = (laid.strides[0], 4) if by_lines else (4, laid.strides[1])
            target = guarded_empty(expected.shape, np.uint16)  # a multiple of a line long: it begins at one
            assert target.ctypes.data % 64 == 0
            assert not split_into(target.ctypes.data, laid.ctypes.data, *steps, count, depth, left)
            np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("by_lines", [True, False])
def test_what_has_no_parts_is_noticed(by_lines: bool) -> None:
    limit = np.array(LEAST_TOO_LARGE, np.uint32).view(np.float32)
    largest = np.nextafter(limit, np.float32(0))
    signs = np.float32(1), np.float32(-1)
    hidden_nan = np.array(0x7F800001, np.uint32).view(np.float32)[()]  # its upper half is infinity's
    lines, target = usual(0, 20, 40), np.empty(4 * BLOCK // 4 + 16, np.float32)
    start = -(-target.ctypes.data // 64) * 64
    for row, column in ((0, 0), (7, 33), (19, 39), (15, 16)):
        for value, bad in ((largest, 0), (limit, 1), (np.float32(math.inf), 1), (np.float32(math.nan), 1),
                           (hidden_nan, 1)):  # fmt: skip
            for sign in signs:
                x = lines.copy()
                x.view(np.uint32)[row, column] = np.copysign(value, sign).view(np.uint32)
                laid = x if by_lines else np.ascontiguousarray(x.T).T
                assert split_into(start, laid.ctypes.data, *laid.strides, *x.shape, True) == bad


# -- products ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 150), st.integers(1, 150) | st.integers(DEPTH - 1, 2 * DEPTH + 40), st.integers(1, 150),
       st.integers(0, 1 << 30))  # fmt: skip
def test_errors_are_those_of_float32(M: int, K: int, N: int, seed: int) -> None:
    """Each two depths are rounded six times, in either direction, beside the sum of all products' magnitudes; what is
    left out is below three more roundings. However much larger some numbers are than others."""
    a, b, out = numbers(seed, M, K), numbers(seed + 1, K, N), np.empty((M, N), "float32")
    assert not multiplied(a, b, NOTHING, out)
    exact = a.astype("float64") @ b.astype("float64")
    scale = np.abs(a).astype("float64") @ np.abs(b).astype("float64")
    assert (np.abs(out - exact) <= (3 + math.sqrt(3 * K + 3)) * 2.0**-24 * scale).all()


def test_smaller_errors_than_numpys() -> None:
    for M, K, N in ((64, 100, 64), (128, 1000, 96), (300, 2000, 128)):
        a, b, out = usual(0, M, K), usual(1, K, N), np.empty((M, N), "float32")
        multiplied(a, b, NOTHING, out)
        exact = a.astype("float64") @ b.astype("float64")
        assert np.abs(out - exact).mean() < np.abs(a @ b - exact).mean()


def test_the_chapters_twin_says_the_same() -> None:
    a, b, out = usual(0, 70, 300), usual(1, 300, 50), np.empty((70, 50), "float32")
    multiplied(a, b, NOTHING, out)
    near(out, multiply_in_parts(a, b))
    for part in three_parts(a):  # which may differ in a last bit, where two numbers are as near
        np.testing.assert_array_equal(part, bfloat16(part))


def test_each_of_the_six_products_counts() -> None:
    """1, 2⁻⁹ and 2⁻¹⁸ are one part each; products down to 2⁻¹⁸ are exact."""
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)):
        x, y = np.float32(1 + 2.0 ** (-9 * i) * (i > 0)), np.float32(1 + 2.0 ** (-9 * j) * (j > 0))
        out = np.empty((1, 1), "float32")
        multiplied(np.full((1, 1), x), np.full((1, 1), y), NOTHING, out)
        assert out[0, 0] == np.float32(x * y)


def test_what_is_lost_of_tiny_numbers_is_tiny() -> None:
    a, b, out = usual(0, 40, 50) * np.float32(1e-36), usual(1, 50, 60) * np.float32(1e10), np.empty((40, 60), "float32")
    multiplied(a, b, NOTHING, out)
    exact = a.astype("float64") @ b.astype("float64")
    assert np.abs(out - exact).max() <= 2.0**-126 * np.abs(b).astype("float64").sum(axis=0).max()


EDGES = (1, SIDE - 1, SIDE, SIDE + 1, PAIR - 1, PAIR, PAIR + 1, PAIR + SIDE, 2 * PAIR + SIDE + 3)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("right_turned", [False, True])
@pytest.mark.parametrize("left_turned", [False, True])
def test_at_protected_pages(left_turned: bool, right_turned: bool, end: bool) -> None:
    cases = [(M, K, N) for M in EDGES for N in EDGES for K in (1, DEPTHS - 1, DEPTHS + 1)]
    cases += [(M, K, N) for M in (3, PAIR + 1) for N in (SIDE + 1, 2 * PAIR) for K in (DEPTH + 1, 2 * DEPTH + 33)]
    for case, (M, K, N) in enumerate(cases):
        rng = np.random.default_rng(case)
        a, b, bias = (rng.integers(-8, 9, shape).astype("float32") for shape in ((M, K), (K, N), N if case % 2 else 0))
        a = guarded(np.ascontiguousarray(a.T), end).T if left_turned else guarded(a, end)
        b = guarded(np.ascontiguousarray(b.T), end).T if right_turned else guarded(b, end)
        out = guarded_empty((M, N), end=end)
        assert not multiplied(a, b, guarded(bias, end), out)
        np.testing.assert_array_equal(out, a.astype("float64") @ b + (bias if len(bias) else 0))


def test_parts_and_pieces_change_no_bit() -> None:
    for M, K, N in ((70, 100, 90), (300, DEPTH + 70, 200), (33, 40, 700), (600, 30, 40), (5, 9, 3)):
        a, b, bias = usual(0, M, K), usual(1, K, N), usual(2, N)
        expected = np.empty((M, N), "float32")
        multiplied(a, b, bias, expected)
        near(expected, a.astype("float64") @ b + bias)
        for parts in (1, 2, 3, 4, 6, 40):
            for across in (n for n in (1, 2, 3, parts) if parts % n == 0):
                out = np.full((M, N), np.nan, "float32")
                assert not multiplied(a, b, bias, out, parts, across)
                np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.4e38])
def test_vectors_do_what_has_no_parts(bad: float) -> None:
    """Any core may be the one that notices it; small and large products, and both of a linear layer's gradients."""
    for M, K, N in ((256, 256, 256), (300, 600, 700)):
        assert kernels.worth_splitting(M, K, N)
        for row, column, factor in ((0, 0, 0), (M - 1, K - 1, 0), (K - 1, N - 1, 1), (3, 5, 1)):
            a, b = np.abs(usual(0, M, K)), np.abs(usual(1, K, N))
            (a, b)[factor][row, column] = bad
            a *= np.float32(0.01)
            with np.errstate(all="ignore"):
                expected = (a.astype("float64") @ b.astype("float64")).astype("float32")
            np.testing.assert_allclose(product(a, b, NOTHING), expected, rtol=1e-5)
    g, x, weight = np.ones((256, 128), "float32"), np.ones((256, 128), "float32"), np.ones((128, 128), "float32")
    x[200, 100] = bad
    assert kernels.worth_splitting(128, 256, 128)
    with np.errstate(all="ignore"):
        to_x, to_weight, sums = linear_gradients(None, g, x, weight, tracked=(0, 1, 2))
        np.testing.assert_allclose(to_weight, g.T.astype("float64") @ x.astype("float64"), rtol=1e-5)
    np.testing.assert_array_equal(to_x, np.full((256, 128), 128, "float32"))
    np.testing.assert_array_equal(sums, np.full(128, 256, "float32"))


def test_gradients_of_a_large_layer() -> None:
    g, x, weight = usual(0, 500, 200), usual(1, 500, 300), usual(2, 200, 300)
    expected = g.astype("float64") @ weight, g.T.astype("float64") @ x, g.sum(axis=0, dtype="float64")
    assert kernels.worth_splitting(200, 500, 300)
    for tracked in ((0, 1, 2), (1,), (0,), (2,), (1, 2)):
        found = linear_gradients(None, g, x, weight, tracked=tracked)
        for i, gradient in zip(tracked, found, strict=True):
            near(gradient, expected[i])


# -- when --------------------------------------------------------------------------------------------------------------


def test_parts_lie_so_that_little_is_split() -> None:
    assert dealt(1, 1000, 10) == 1
    assert dealt(2, 768, 128) == 1  # two halves, one above the other
    assert dealt(2, 128, 768) == 2
    assert dealt(4, 1024, 1024) == 2
    assert dealt(2, 5 * PAIR, 2 * PAIR) == 2  # 5 × 1 tiles at most, and not 3 × 2
    assert dealt(6, 64, 32 * 60) == 6
    assert all(parts % dealt(parts, 300, 200) == 0 for parts in range(1, 20))


def test_only_where_it_pays_for_splitting() -> None:
    assert kernels.worth_splitting(768, 128, 384)
    assert not kernels.worth_splitting(10_000, 1000, 10)
    assert not kernels.worth_splitting(20, 1000, 1000)
    assert not kernels.worth_splitting(64, 64, 64)
    assert not kernels.worth_splitting(1000, 10, 1000)


def test_not_without_the_cpu_or_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = permitted.__wrapped__
    assert ask()
    with monkeypatch.context() as patch:
        patch.setattr(amx, "features", lambda: features() - {"amx-bf16"})
        assert not ask()
    for where, value in (("sys.platform", "win32"), ("platform.machine", lambda: "aarch64")):
        with monkeypatch.context() as patch:
            patch.setattr(f"tinytorch.kernels.cpu.amx.{where}", value)
            assert not ask()
    with monkeypatch.context() as patch:
        patch.setattr(amx, "ARCH_REQ_XCOMP_PERM", 0)  # a system that knows nothing of it
        assert not ask()
    assert TILE * PARTS == BLOCK
