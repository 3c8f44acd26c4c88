"""Attention's kernels equal module 13's operations, whatever hides keys, and stay in their arrays."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import LAYOUTS, XP, laid_out, near
from tinytorch import m13_attention as m13
from tinytorch.kernels.cpu import attention
from tinytorch.kernels.cpu.attention import KEYS, QUERIES, exp_or_zero
from tinytorch.kernels.cpu.jit import kernel
from tinytorch.kernels.cpu.vectors import LANES, address, load, store
from tinytorch.m13_attention_appendix import cached_attention

INF, NAN = math.inf, math.nan
seeds = st.integers(0, 1 << 30)
places = st.integers(1, 20) | st.integers(1, 150)
features = st.integers(1, 40)
MASKS = ("none", "bool", "added", "hidden rows")
LAYS = (*LAYOUTS, "heads")


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def mask_of(kind: str, seed: int, shape: tuple) -> np.ndarray | None:
    rng = np.random.default_rng(seed)
    if kind == "none":
        return None
    if kind == "bool":
        return rng.random(shape) < 0.6
    mask = rng.normal(size=shape).astype("float32") * np.float32(2)
    mask[rng.random(shape) < 0.3] = -INF
    if kind == "hidden rows":
        mask[rng.random(shape[:-1]) < 0.4] = -INF
    return mask


def lay(array: np.ndarray, how: str) -> np.ndarray:
    """As `laid_out`; "heads": (…, H, T, D) as a view of a (…, T, 3, H, D), as attention layers split them."""
    if how != "heads":
        return laid_out(array, how)
    if array.ndim < 3:
        return array
    split = np.full((*array.shape[:-3], array.shape[-2], 3, array.shape[-3], array.shape[-1]), NAN, "float32")
    view = np.swapaxes(split[..., 1, :, :], -3, -2)
    view[...] = array
    return view


def double(array: Any) -> Any:
    return array.astype("float64") if isinstance(array, np.ndarray) and array.dtype != bool else array


def compare(g: Any, query: Any, key: Any, value: Any, mask: Any = None, **options: Any) -> None:
    """Assert that both kernels give what both operations give in float64."""
    exact = m13.attention.function(XP, *map(double, (query, key, value, mask)), **options)
    found = attention.attention(XP, query, key, value, mask, **options)
    near(found[0], exact[0])
    for actual, expected in zip(found[1:], exact[1:], strict=True):  # values may have more leading axes than scores
        near(actual, np.broadcast_to(expected, actual.shape))
    slopes = m13.attention_gradients.function(XP, *map(double, (g, query, key, value, mask)), *exact, **options)
    extras = (found[0], *(x.astype("float32") for x in exact[1:]))  # as the operation returns them
    results = attention.attention_gradients(XP, g, query, key, value, mask, *extras, **options)
    size = max(np.abs(x).max(initial=0) for x in (g, *slopes))  # terms may be larger than their sum
    for actual, expected in zip(results, slopes, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == np.float32
        # a weight of nearly 1 has next to no gradient: what is left of a difference is compared with its terms
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * float(size))


@given(
    st.lists(st.integers(1, 3), max_size=4), places, places, features, features, st.sampled_from(MASKS), st.booleans(),
    st.sampled_from(LAYS), st.sampled_from([None, 0.3, 1.0]), seeds,
)  # fmt: skip
@example([2, 3], 150, 150, 40, 24, "none", True, "heads", None, 0)
@example([1, 2], 140, 140, 32, 32, "hidden rows", True, "plain", None, 1)
@example([2], 1, 130, 33, 5, "none", True, "plain", None, 2)
@example([3], 130, 5, 7, 40, "bool", True, "plain", None, 3)
@settings(deadline=None, max_examples=120)
def test_forward_and_backward(
    lead: list, queries: int, keys: int, features: int, width: int, mask: str, is_causal: bool, layout: str,
    scale: float | None, seed: int,
) -> None:  # fmt: skip
    shapes = (queries, width), (queries, features), (keys, features), (keys, width)
    arrays = [lay(numbers(seed + i, *lead, *shape), layout) for i, shape in enumerate(shapes)]
    hidden = mask_of(mask, seed, (*lead, queries, keys))
    compare(*arrays, hidden, is_causal=is_causal, scale=scale)


@given(places, places, st.lists(st.booleans(), min_size=15, max_size=15), st.sampled_from(MASKS), st.booleans(), seeds)
@settings(deadline=None, max_examples=60)
def test_leading_axes_broadcast(queries: int, keys: int, ones: list, mask: str, is_causal: bool, seed: int) -> None:
    def lead(i: int) -> tuple:
        return tuple(1 if one else n for one, n in zip(ones[3 * i : 3 * i + 3], (2, 2, 3), strict=True))

    shapes = (queries, 9), (keys, 9), (keys, 5)
    query, key, value = (numbers(seed + i, *lead(i), *shape) for i, shape in enumerate(shapes))
    whole = np.broadcast_shapes(lead(0), lead(1), lead(2))
    over = tuple(1 if one else n for one, n in zip(ones[9:12], whole, strict=True))[ones[12] :]
    hidden = mask_of(mask, seed, (*over, 1 if ones[13] else queries, 1 if ones[14] else keys))
    compare(numbers(3, *whole, queries, 5), query, key, value, hidden, is_causal=is_causal)


def test_one_key_head_for_many_queries() -> None:
    query, key, value = numbers(0, 2, 6, 70, 8), numbers(1, 2, 2, 70, 8), numbers(2, 2, 2, 70, 8)
    key, value = (np.broadcast_to(x[:, :, None], (2, 2, 3, 70, 8)) for x in (key, value))
    query = query.reshape(2, 2, 3, 70, 8)
    compare(numbers(3, 2, 2, 3, 70, 8), query, key, value, is_causal=True)


def test_rows_that_see_nothing_are_zero() -> None:
    query, key, value = numbers(0, 2, 70, 8), numbers(1, 2, 130, 8), numbers(2, 2, 130, 8)
    mask = np.ones((70, 130), bool)
    mask[[0, 20, 69]] = False
    mask[30, :100] = False  # nothing in the first block of keys
    out, largest, sums = attention.attention(XP, query, key, value, mask)
    assert not out[:, [0, 20, 69]].any()
    assert (largest[:, 20] == 0).all()
    assert (sums[:, 20] == 1).all()
    assert out[:, 30].any(axis=-1).all()
    gradients = attention.attention_gradients(XP, out + 1, query, key, value, mask, out, largest, sums)
    assert not gradients[0][:, [0, 20, 69]].any()
    assert all(np.isfinite(x).all() for x in gradients)


def test_large_scores() -> None:
    query, key, value = numbers(0, 3, 80, 8) * 30, numbers(1, 3, 80, 8) * 30, numbers(2, 3, 80, 8)
    key[:, 64:] *= 4  # a later block of keys has the largest scores
    out, largest, _ = attention.attention(XP, query, key, value)
    expected = m13.attention.function(XP, *map(double, (query, key, value)))
    np.testing.assert_allclose(out, expected[0], atol=3e-3)  # scores of 10,000 have three decimals
    near(largest, expected[1])


def test_nan_stays_where_it_is_seen() -> None:
    query, key, value = numbers(0, 2, 70, 8), numbers(1, 2, 70, 8), numbers(2, 2, 70, 8)
    key[1, 66, 3] = NAN
    out = attention.attention(XP, query, key, value, is_causal=True)[0]
    assert np.isnan(out).any(axis=-1).tolist() == [[False] * 70, [False] * 66 + [True] * 4]
    value[0, 5, 2] = INF
    assert (attention.attention(XP, query, key, value, is_causal=True)[0][0, 5:, 2] == INF).all()


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0), (0, 0, 0, 0)])
def test_empty(shape: tuple) -> None:
    *lead, queries, keys = shape
    query, key, value = (numbers(0, *lead, n, 4) for n in (queries, keys, keys))
    compare(query, query, key, value)
    compare(query, query, key, value, is_causal=True)
    compare(numbers(0, 2, 5, 0), numbers(0, 2, 5, 3), numbers(1, 2, 6, 3), numbers(0, 2, 6, 0))  # values of no features


def test_what_does_not_fit() -> None:
    query, key = numbers(0, 2, 5, 4), numbers(1, 2, 6, 4)
    with pytest.raises(ValueError, match="do not fit"):
        attention.attention(XP, query, key, key[:, :5])
    with pytest.raises(ValueError, match="do not fit"):
        attention.attention(XP, query, key[..., :3], key)
    with pytest.raises(ValueError, match="broadcast"):
        attention.attention(XP, query, key, key, np.ones((3, 5, 6), bool))
    found = attention.attention(XP, query, key, key)
    with pytest.raises(ValueError, match="no gradient for a mask"):
        attention.attention_gradients(XP, query, query, key, key, None, *found, mask_gradient=True)


def test_heads_merge_without_a_copy() -> None:
    query, key, value = (numbers(i, 2, 3, 10, 8) for i in range(3))
    out = attention.attention(XP, query, key, value)[0]
    assert out.transpose(0, 2, 1, 3).flags.c_contiguous


# -- one new token -----------------------------------------------------------------------------------------------------


def one_token(query: Any, key: Any, value: Any, lengths: Any, scale: float | None = None) -> np.ndarray:
    """What the operation itself gives, in float64."""
    return cached_attention.function(XP, double(query), double(key), double(value), lengths, scale=scale)


@given(
    st.integers(0, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 90), features, features,
    st.sampled_from(LAYS), st.sampled_from([None, 0.3]), seeds,
)  # fmt: skip
@example(4, 2, 3, 90, 40, 16, "heads", None, 0)
@settings(deadline=None, max_examples=60)
def test_one_new_token(
    batch: int, groups: int, each: int, capacity: int, features: int, width: int, layout: str, scale: float | None,
    seed: int,
) -> None:  # fmt: skip
    query = laid_out(numbers(seed, batch, groups * each, features), layout if layout in LAYOUTS else "plain")
    key, value = (lay(numbers(seed + 1, batch, groups, capacity, n), layout) for n in (features, width))
    lengths = np.random.default_rng(seed).integers(0, capacity + 1, batch)
    for i, length in enumerate(lengths):
        for x in (key, value):
            if x.flags.writeable:
                x[i, :, length:] = NAN  # nobody looks there
    near(attention.cached_attention(XP, query, key, value, lengths, scale=scale),
         one_token(query, key, value, lengths, scale))  # fmt: skip


@pytest.mark.parametrize("end", [True, False])
def test_one_new_token_at_protected_pages(end: bool) -> None:
    for features, width, capacity in ((1, 3, 5), (LANES, LANES + 1, LANES), (2 * LANES + 3, 2 * LANES, 70)):
        shapes = (2, 6, features), (2, 2, capacity, features), (2, 2, capacity, width)
        query, key, value = (guarded(numbers(i, *shape), end) for i, shape in enumerate(shapes))
        lengths, out = guarded(np.array([capacity, capacity // 2]), end), guarded_empty((2, 6, width), end=end)
        attention.cached_into(query, key, value, lengths, out, None)
        near(out, one_token(query, key, value, lengths))


def test_a_cache_that_does_not_fit() -> None:
    query, key = numbers(0, 2, 6, 8), numbers(1, 2, 3, 10, 8)
    for lengths in ([1, 11], [-1, 2]):
        with pytest.raises(ValueError, match="lengths must be between 0 and 10"):
            attention.cached_attention(XP, query, key, key, np.array(lengths))


# -- memory and cores --------------------------------------------------------------------------------------------------

SIZES = [(1, 1, 1, 1), (3, 5, LANES - 1, LANES + 1), (LANES + 1, KEYS + 3, LANES, 2 * LANES - 1), (70, 65, 3, LANES),
         (QUERIES + 9, KEYS + LANES + 5, 2 * LANES + 3, 5)]  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("end", [True, False])
def test_at_protected_pages(end: bool, is_causal: bool) -> None:
    for queries, keys, features, width in SIZES:
        for masked in (False, True):
            shapes = (queries, width), (queries, features), (keys, features), (keys, width)
            arrays = [guarded(numbers(i, 2, *shape), end) for i, shape in enumerate(shapes)]
            mask = guarded(numbers(5, 2, queries, keys), end) if masked else None
            g, query, key, value = arrays
            out, rows = guarded_empty(g.shape, end=end), (2, queries, 1)
            largest, sums = guarded_empty(rows, end=end), guarded_empty(rows, end=end)
            attention.attention_into(query, key, value, mask, out, largest, sums, is_causal, None)
            given = [double(x) for x in (query, key, value, mask)]
            exact = m13.attention.function(XP, *given, is_causal=is_causal)
            for actual, expected in zip((out, largest, sums), exact, strict=True):
                near(actual, expected)
            results = [guarded_empty(x.shape, end=end) for x in (query, key, value)]
            attention.gradients_into(*arrays, mask, out, largest, sums, *results, is_causal, None)
            slopes = m13.attention_gradients.function(XP, double(g), *given, *exact, is_causal=is_causal)
            size = max(float(np.abs(x).max()) for x in slopes)
            for actual, expected in zip(results, slopes, strict=True):
                np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * size)


ALONE = """
import numpy as np
from tinytorch.kernels.cpu import attention
rng = np.random.default_rng(0)
g, *inputs = (rng.normal(size=(3, 90, 20)).astype("float32") for _ in range(4))
found = attention.attention(None, *inputs, is_causal=True)
slopes = attention.attention_gradients(None, g, *inputs, None, *found, is_causal=True)
print(*(x.tobytes().hex() for x in (*found, *slopes)))
"""


def test_one_core_and_several() -> None:
    results = []
    for threads in ("1", "2"):
        environment = {**os.environ, "NUMBA_NUM_THREADS": threads}
        done = subprocess.check_output([sys.executable, "-c", ALONE], text=True, env=environment)
        results.append([np.frombuffer(bytes.fromhex(word), np.float32) for word in done.split()])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_twice_is_the_same() -> None:
    g, query, key, value = (numbers(i, 5, 100, 16) for i in range(4))
    found = [attention.attention(XP, query, key, value, is_causal=True) for _ in range(2)]
    slopes = [attention.attention_gradients(XP, g, query, key, value, None, *x, is_causal=True) for x in found]
    for one, other in zip((*found[0], *slopes[0]), (*found[1], *slopes[1]), strict=True):
        assert np.array_equal(one, other)


# -- the exponential ---------------------------------------------------------------------------------------------------


@kernel
def exp_of(x, out):
    for i in range(0, len(x), LANES):
        store(address(out) + 4 * i, exp_or_zero(load(address(x) + 4 * i)))


def test_exponential() -> None:
    x = np.linspace(-87.29, 88.2, 1 << 20, dtype="float32")
    out = np.empty_like(x)
    exp_of(x, out)
    np.testing.assert_allclose(out, np.exp(x.astype("float64")), rtol=3e-7)
    x = np.array([-INF, -100, -1e30, -88, NAN, 0, -0.0, np.finfo("float32").min] * 2, "float32")
    out = np.empty_like(x)
    exp_of(x, out)
    assert np.array_equal(out, [0, 0, 0, 0, NAN, 1, 1, 0] * 2, equal_nan=True)
