"""Products of int8 against NumPy's: exact for all shapes and values; and scaled, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.compiled import ARCHITECTURES, Compiled, needs_compiler
from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.place import SIMULATED, cpu_only, cuda_only, drawn, kernels
from tinytorch.backends import get_backend
from tinytorch.kernels import load
from tinytorch.kernels.cpu.quantized import COLUMNS, DEPTHS, ROWS, Packed
from tinytorch.kernels.cuda.jit import instead_of_launches
from tinytorch.m17_quantization import int8_linear as operation

XP = get_backend("cpu")
quantized = kernels("quantized")
int8_matmul, pack = quantized.int8_matmul, quantized.pack
SIZES = st.one_of(st.integers(0, 2 * COLUMNS + 1), st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 63, 64, 65, 127, 128, 129]))
if SIMULATED:  # where tiles have 16 rows and columns, and 16 depths
    SIZES = st.one_of(st.integers(0, 20), st.sampled_from([0, 1, 15, 16, 17, 31, 33]))


def bytes_of(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Random int8, a quarter of them at the ends of what there is."""
    values = random.integers(-128, 128, shape, dtype=np.int8)
    return np.where(random.random(shape) < 0.25, random.choice(np.array([-128, 127], np.int8), shape), values)


def product(a: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) @ weight.T.astype(np.float64)).astype(np.int64)  # float64 is exact up to 2⁵³, and fast


def linear(a: Any, a_scale: Any, weight: Any, weight_scale: Any, bias: Any = None, zero: Any = 0) -> np.ndarray:
    """The formula, in float64: rows and columns of numbers are given as they are to `int8_linear`."""
    a_scale, zero = (np.asarray(x, np.float64).reshape(-1, 1) for x in (a_scale, zero))
    sums = (a - zero) @ weight.T.astype(np.float64)
    return a_scale * np.asarray(weight_scale, np.float64) * sums + (0 if bias is None else bias)


def int8_linear(
    a: np.ndarray, a_scale: Any, weight: np.ndarray, weight_scale: Any, bias: Any = None, zero: Any = 0
) -> np.ndarray:
    """The kernel's call, in the order of `linear`."""
    return quantized.int8_linear(XP, a, a_scale, zero, weight, weight_scale, bias)


def near(ours: np.ndarray, exact: np.ndarray) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == exact.shape
    np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max(initial=1e-30))


@drawn(100)
@given(M=SIZES, N=SIZES, K=SIZES, seed=st.integers(0, 2**32 - 1))
def test_products_are_exact(M: int, N: int, K: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, weight = bytes_of(random, M, K), bytes_of(random, N, K)
    ours = int8_matmul(XP, a, pack(weight))
    assert (ours.dtype, ours.shape) == (np.int32, (M, N))
    np.testing.assert_array_equal(ours, product(a, weight))


@drawn(100)
@given(
    M=SIZES, N=SIZES, K=SIZES, seed=st.integers(0, 2**32 - 1), each=st.tuples(*[st.booleans()] * 3),
    has_bias=st.booleans(), zeros=st.sampled_from([(0, 1), (-128, 128), (0, 256)]),
)  # fmt: skip
def test_scaled_products(M: int, N: int, K: int, seed: int, each: tuple, has_bias: bool, zeros: tuple) -> None:
    random = np.random.default_rng(seed)
    a, weight = bytes_of(random, M, K), bytes_of(random, N, K)
    a_scale = random.uniform(0.001, 0.1, M if each[0] else ()).astype("float32")
    weight_scale = random.uniform(0.001, 0.1, N if each[1] else ()).astype("float32")
    zero = random.integers(*zeros, M if each[2] else (), dtype=np.int32)
    bias = random.normal(size=N).astype("float32") if has_bias else None
    ours = int8_linear(a, a_scale, weight, weight_scale, bias, zero)
    near(ours, linear(a, a_scale, weight, weight_scale, bias, zero))


def test_the_two_lines_that_it_stands_for() -> None:
    random = np.random.default_rng(0)
    a, weight, bias = bytes_of(random, 5, 40), bytes_of(random, 70, 40), np.arange(70, dtype="float32")
    expected = 0.5 * 0.25 * ((a - np.int32(3)) @ weight.T.astype(np.int32)) + bias
    np.testing.assert_array_equal(int8_linear(a, 0.5, weight, 0.25, bias, 3), expected)


@drawn(100)
@given(
    M=SIZES, N=SIZES, K=SIZES, seed=st.integers(0, 2**32 - 1), each=st.booleans(), has_bias=st.booleans(),
    relu=st.booleans(), rounds=st.booleans(),
)  # fmt: skip
def test_the_operation_gives_the_same_bits(
    M: int, N: int, K: int, seed: int, each: bool, has_bias: bool, relu: bool, rounds: bool
) -> None:
    random = np.random.default_rng(seed)
    a, weight = bytes_of(random, M, K), bytes_of(random, N, K)
    scale = np.asarray(random.uniform(0.001, 0.1, M if each else ()), "float32")
    zero = random.integers(-128, 128, M if each else (), dtype=np.int32)
    bias = random.normal(size=N).astype("float32") if has_bias else None
    out = (np.asarray(0.7, "float32"), np.asarray(-9, "int32")) if rounds else (None, None)
    inputs = a, scale, np.asarray(zero), weight, random.uniform(0.001, 0.1, N).astype("float32"), bias, *out
    ours, theirs = quantized.int8_linear(XP, *inputs, relu=relu), operation.function(XP, *inputs, relu=relu)
    assert ours.dtype == theirs.dtype == (np.int8 if rounds else np.float32)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("value", [-128, -127, 127])
@pytest.mark.parametrize("other", [-128, 127])
def test_the_longest_sums(value: int, other: int) -> None:
    K = 1023 if SIMULATED else 2**17 - 1
    a, weight = np.full((2, K), value, np.int8), np.full((3, K), other, np.int8)
    assert (int8_matmul(XP, a, pack(weight)) == value * other * K).all()
    near(int8_linear(a, 1.0, weight, 1.0, None, value), np.zeros((2, 3)))


@cpu_only
def test_more_rows_than_a_strip_has(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    for M, N, K in ((25, COLUMNS + 1, 20_000), (3000, 2, 40), (500, 3 * COLUMNS, 700)):
        a, weight = bytes_of(random, M, K), bytes_of(random, N, K)
        scale, zero = random.uniform(0.1, 1, M).astype("float32"), random.integers(-9, 9, M)
        expected = product(a, weight)
        for parts in (1, 2, 3, 7):
            monkeypatch.setattr(quantized, "cores", lambda parts=parts: parts)
            np.testing.assert_array_equal(int8_matmul(XP, a, pack(weight)), expected)
            near(int8_linear(a, scale, weight, 2.0, None, zero), linear(a, scale, weight, 2.0, None, zero))


@cpu_only
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    a, weight = bytes_of(random, 200, 300), bytes_of(random, 150, 300)
    scales = random.uniform(0.1, 1, 200).astype("float32"), random.uniform(0.1, 1, 150).astype("float32")
    results = []
    for parts, chosen in ((1, 0), (3, 0), (3, 1), (3, 1)):
        monkeypatch.setattr(quantized, "cores", lambda parts=parts: parts)
        monkeypatch.setattr(quantized, "run", lambda s, p, work, *x, chosen=chosen: (s, p)[chosen](*x))
        results.append(int8_linear(a, scales[0], weight, scales[1]))
    near(results[0], linear(a, scales[0], weight, scales[1]))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_any_layout() -> None:
    random = np.random.default_rng(3)
    M, N = (6, 5) if SIMULATED else (30, 50)
    a, weight = bytes_of(random, M, 20), bytes_of(random, N, 20)
    frozen = a.copy()
    frozen.flags.writeable = False
    every_second = np.repeat(weight, 2, axis=0)[::2]
    for x in (a, np.asfortranarray(a), frozen, np.repeat(a, 2, axis=1)[:, ::2]):
        for w in (weight, np.asfortranarray(weight), every_second):
            np.testing.assert_array_equal(int8_matmul(XP, x, pack(w)), product(a, weight))
    same = np.broadcast_to(a[:1], (M, 20))
    scale = np.broadcast_to(np.float32(0.5), M)
    near(int8_linear(same, scale, weight, 1.0), linear(same, scale, weight, 1.0))


@cuda_only
@pytest.mark.parametrize("M", [1, 15, 16, 17, 33])  # few rows, and tiles
def test_rows_and_columns_at_the_edges_of_tiles(M: int) -> None:
    random = np.random.default_rng(6)
    for N, K in ((1, 1), (17, 15), (3, 65)):
        a, weight = bytes_of(random, M, K), bytes_of(random, N, K)
        a_scale, w_scale = (random.uniform(0.1, 1, n).astype("float32") for n in (M, N))
        zero, bias = random.integers(-128, 128, M), random.normal(size=N).astype("float32")
        near(
            int8_linear(a, a_scale, weight, w_scale, bias, zero), linear(a, a_scale, weight, w_scale, bias, zero)
        )  # fmt: skip


@cuda_only
def test_rows_of_whole_words_are_read_where_they_lie() -> None:
    memory = np.arange(97, dtype=np.int8)
    weight, shifted, odd = memory[:96].reshape(12, 8), memory[1:].reshape(12, 8), memory[:96].reshape(32, 3)
    assert np.shares_memory(pack(weight).words, weight)
    for other in (shifted, odd):  # words begin at every fourth byte
        assert not np.shares_memory(pack(other).words, other)
    for other in (weight, shifted, odd):
        np.testing.assert_array_equal(int8_matmul(XP, other, pack(other)), product(other, other))


def test_rows_on_more_axes() -> None:
    random = np.random.default_rng(7)
    a, weight, scale = bytes_of(random, 2, 3, 12), bytes_of(random, 5, 12), np.float32([[1, 2, 3], [4, 5, 6]])
    near(int8_linear(a, scale, weight, 0.5), 0.5 * scale[..., None] * product(a, weight))


def test_scales_that_are_not_finite_show() -> None:
    ones = np.ones((2, 3), np.int8)
    out = int8_linear(ones, np.array([np.nan, 1], "float32"), ones, np.array([np.inf, 1], "float32"))
    np.testing.assert_array_equal(out, [[np.nan, np.nan], [np.inf, 3]])


# -- protected pages ---------------------------------------------------------------------------------------------------


@cpu_only
@pytest.mark.parametrize("end", [True, False])
def test_nothing_is_touched_outside_of_the_arrays(end: bool) -> None:
    random = np.random.default_rng(4)
    sizes = [1, 2, 3, 4, 5, 6, 7, 11, 13, COLUMNS - 1, COLUMNS, COLUMNS + 1]
    for M in (0, *sizes):
        for N in (0, *sizes[:-3:3], *sizes[-3:]):
            for K in (0, *sizes[:5], 31, 33):
                a, weight = guarded(bytes_of(random, M, K), end), guarded(bytes_of(random, N, K), end)
                packed = pack(weight)
                packed = Packed(packed.shape, *(guarded(x, end) for x in (packed.panels, packed.sums, packed.starts)))
                scales = [random.uniform(0.1, 1, n).astype("float32") for n in (M, N, N)]
                a_scale, weight_scale, bias = (guarded(x, end) for x in scales)
                zero = guarded(random.integers(-9, 9, M, dtype=np.int32), end)
                for scaled in (False, True):
                    for parts in (1, 2):
                        for rounding in ((), (0.5, 3)) if scaled else ((),):
                            out = guarded_empty((M, N if rounding else 4 * N), np.int8, end)
                            quantized.matmul_serial(
                                parts, a, packed.panels, packed.sums, packed.starts, zero, scaled, a_scale,
                                weight_scale, bias, np.float32(-np.inf), np.array(rounding, "float32"), N, out,
                            )  # fmt: skip
                            expected = linear(a, a_scale, weight, weight_scale, bias, zero)
                            if rounding:
                                assert np.abs(out - np.clip(np.rint(0.5 * expected) + 3, -128, 127)).max(initial=0) < 2
                            elif scaled:
                                near(out.view(np.float32), expected)
                            else:
                                np.testing.assert_array_equal(out.view(np.int32), product(a, weight))


@cpu_only
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("count", range(1, ROWS + 1))
def test_a_tile_touches_its_rows_only(count: int, end: bool) -> None:
    random = np.random.default_rng(5)
    rows = next(rows for rows in (1, 2, 4, 6) if rows >= count)
    for steps in (0, 1, 2, 17):
        depth = steps * DEPTHS
        a, weight = bytes_of(random, rows, depth), bytes_of(random, COLUMNS, depth)
        strip, packed = guarded_empty((rows, depth), quantized.STRIP_DTYPE, end), pack(weight)
        quantized.copy_rows(a, 0, strip)
        panels, starts = guarded(packed.panels, end), guarded(packed.starts, end)
        block = guarded_empty((rows, COLUMNS), np.int32, end)
        addresses = [x.ctypes.data for x in (strip, panels, starts, block)]
        quantized.products(count, addresses[0], strip.strides[0], *addresses[1:3], steps, addresses[3])
        np.testing.assert_array_equal(block[:count], product(a, weight)[:count])


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_say_what_would_be_right() -> None:
    a, weight = np.ones((2, 3), np.int8), np.ones((4, 3), np.int8)
    with pytest.raises(ValueError, match=r"pack: expected an int8 array \(N, K\), got float32 of shape \(4, 3\)"):
        pack(weight.astype("float32"))
    with pytest.raises(ValueError, match=r"got int8 of shape \(12,\)"):
        pack(weight.reshape(-1))
    for wrong in (a[:, :2], a.astype("uint8"), a[0]):
        with pytest.raises(ValueError, match=r"int8_matmul: expected int8 \(M, 3\) for a weight \(4, 3\)"):
            int8_matmul(XP, wrong, pack(weight))
    with pytest.raises(ValueError, match=r"int8_linear: bias has shape \(3,\), expected one number or \(4,\)"):
        int8_linear(a, 1.0, weight, 1.0, np.ones(3, "float32"))
    with pytest.raises(ValueError, match=r"x_scale has shape \(4,\), expected one number or \(2,\)"):
        int8_linear(a, np.ones(4, "float32"), weight, 1.0)
    with pytest.raises(ValueError, match=r"x_zero_point has shape \(0,\)"):
        int8_linear(a, 1.0, weight, 1.0, None, np.ones(0, "int32"))


# -- for devices -------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("rows", "name", "zero"), [(3, "multiply_few_rows", 0), (3, "multiply_few_rows", 7), (100, "multiply_by_tiles", 7)]
)
def test_compiled_for_devices(architecture: tuple[int, int], rows: int, name: str, zero: int) -> None:
    of = {each: load(f"tinytorch.kernels.cuda.quantized:{each}") for each in ("int8_matmul", "int8_linear", "pack")}
    a, weight, one = np.ones((rows, 40), np.int8), np.ones((90, 40), np.int8), np.float32(1)
    packed = of["pack"](weight)
    for case in ((), (None,), (np.ones(90, "float32"), one, 3)):
        with instead_of_launches(compiled := Compiled(architecture)):
            if case:
                of["int8_linear"](XP, a, one, zero, weight, one, *case, relu=True, packed=packed)
            else:
                of["int8_matmul"](XP, a, packed)
        listing = compiled.kernels[name]
        assert listing.ptx.count("dp4a.s32.s32") >= (64 if rows > 16 else 4)
        assert listing.doubles == []
        assert not listing.keeps_arrays  # totals are in registers
        machine = listing.assembled(architecture)
        assert machine.spilled == 0
        assert machine.registers <= 80
        assert machine.shared <= 12 << 10
