"""Rounding to int8 and back from int4 against their operations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import LAYOUTS, XP, laid_out
from tests.kernels.place import cpu_only
from tinytorch.kernels.cpu import rounding as kernels
from tinytorch.kernels.cpu.quantized_convolution import channels_last
from tinytorch.kernels.cpu.vectors import LANES
from tinytorch.m17_quantization import quantize, quantize_rows
from tinytorch.m17_quantization_appendix import int4_linear

pytestmark = cpu_only

SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 1e-45, 0.5, 1.5, -2.5, 127.5], "float32")
shapes = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple) | st.integers(0, 500).map(lambda n: (2, n))
seeds = st.integers(0, 1 << 30)


def numbers(seed: int, shape: tuple, special: bool) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = (random.normal(size=shape) * 40).astype("float32")
    return np.where(random.random(shape) < 0.1, random.choice(SPECIAL, shape), x) if special else x


@given(shape=shapes, layout=st.sampled_from(LAYOUTS), seed=seeds, zero=st.integers(-128, 127), ends=st.booleans())
def test_one_scale_for_all(shape: tuple, layout: str, seed: int, zero: int, ends: bool) -> None:
    x = laid_out(numbers(seed, shape, True), layout)
    scale = np.asarray(np.random.default_rng(seed).choice([0.3, 1.0, 1e-30]), "float32")
    options = {"low": -7, "high": 100} if ends else {}
    with np.errstate(all="ignore"):
        expected = quantize.function(XP, x, scale, np.asarray(zero, "int32"), **options)
    ours = kernels.quantize(XP, x, scale, np.asarray(zero, "int32"), **options)
    assert ours.dtype == np.int8
    np.testing.assert_array_equal(ours, expected)


def test_pictures_keep_their_channels_side_by_side() -> None:
    x = numbers(0, (2, 5, 6, 7), False).transpose(0, 3, 1, 2)
    ours = kernels.quantize(XP, x, np.float32(0.5), 3)
    assert channels_last(ours)
    np.testing.assert_array_equal(ours, quantize.function(XP, x, np.asarray(0.5, "float32"), 3))


@given(shape=shapes, layout=st.sampled_from(LAYOUTS), seed=seeds, special=st.booleans())
def test_a_scale_for_each_row(shape: tuple, layout: str, seed: int, special: bool) -> None:
    x = laid_out(numbers(seed, shape, special), layout)
    with np.errstate(all="ignore"):
        expected, scale = quantize_rows.function(XP, x)
    ours, our_scale = kernels.quantize_rows(XP, x)
    np.testing.assert_array_equal(our_scale, scale)
    finite = np.isfinite(scale)
    np.testing.assert_array_equal(ours[finite], expected[finite])


@given(
    rows=st.integers(0, 5), outputs=st.integers(1, 40), groups=st.integers(1, 4), half=st.integers(1, 20), seed=seeds,
    has_bias=st.booleans(),
)  # fmt: skip
def test_int4(rows: int, outputs: int, groups: int, half: int, seed: int, has_bias: bool) -> None:
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, 2 * half * groups)).astype("float32")
    weight = random.integers(0, 256, (outputs, half * groups), dtype=np.uint8)
    scale = random.uniform(0.1, 1, (outputs, groups)).astype("float32")
    bias = random.normal(size=outputs).astype("float32") if has_bias else None
    ours, expected = kernels.int4_linear(XP, x, weight, scale, bias), int4_linear.function(XP, x, weight, scale, bias)
    assert ours.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * max(1, 8 * half * groups))
    one = np.eye(2 * half * groups, dtype="float32")  # each weight alone: no sum that could hide a mistake
    np.testing.assert_allclose(
        kernels.int4_linear(XP, one, weight, scale), int4_linear.function(XP, one, weight, scale)
    )


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("size", [1, 2, LANES - 1, LANES, LANES + 2, 3 * LANES + 5])
def test_nothing_is_touched_outside_of_the_arrays(size: int, end: bool) -> None:
    x = guarded(numbers(1, (3, size), False), end)
    out, scales = guarded_empty((3, size), np.int8, end), guarded_empty(3, "float32", end)
    kernels.round_rows_serial(2, x, scales, out)
    np.testing.assert_array_equal(out, quantize_rows.function(XP, x)[0])
    random = np.random.default_rng(2)
    weight = guarded(random.integers(0, 256, (4, size), dtype=np.uint8), end)
    x = guarded(numbers(3, (3, 2 * size), False), end)
    scale, result = guarded(np.ones((4, 1), "float32"), end), guarded_empty((3, 4), "float32", end)
    kernels.int4_serial(2, x, weight, scale, guarded(np.ones(4, "float32"), end), result)
    expected = int4_linear.function(XP, x, weight, scale, np.ones(4, "float32"))
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=0.1)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, random = numbers(4, (50, 40), False), np.random.default_rng(5)
    weight, scale = random.integers(0, 256, (30, 20), dtype=np.uint8), np.ones((30, 2), "float32")
    calls = (
        lambda: kernels.quantize(XP, x, np.float32(0.7), 3),
        lambda: kernels.quantize_rows(XP, x)[0],
        lambda: kernels.int4_linear(XP, x, weight, scale),
    )
    for call in calls:
        results = []
        for parts, chosen in ((1, 0), (3, 0), (3, 1)):
            monkeypatch.setattr(kernels, "cores", lambda parts=parts: parts)
            monkeypatch.setattr(kernels, "run", lambda s, p, work, *x, chosen=chosen: (s, p)[chosen](*x))
            results.append(call())
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])
