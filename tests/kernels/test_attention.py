"""Attention's kernels equal module 13's operations, whatever hides keys, and stay in their arrays."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import LAYOUTS, XP, laid_out, near
from tests.kernels.place import SIMULATED, cpu_only, cuda_only, drawn, kernels
from tinytorch import m13_attention as m13
from tinytorch.kernels.cpu.attention import KEYS, QUERIES, exp_or_zero
from tinytorch.kernels.cpu.jit import kernel
from tinytorch.kernels.cpu.vectors import LANES, address, address_of, load, store
from tinytorch.m13_attention_appendix import cached_attention

attention = kernels("attention")
INF, NAN = math.inf, math.nan
seeds = st.integers(0, 1 << 30)


def scaled(count: int) -> int:
    """As many, or a twelfth in the simulator, whose tiles are smaller too."""
    return max(1, count // 12) if SIMULATED else count


if SIMULATED:
    leads = st.sampled_from([[], [3], [2, 1], [1, 2, 2], [1, 2, 1, 2]])
    places, features = st.integers(1, 12), st.integers(1, 5) | st.integers(1, 10)
else:
    leads = st.lists(st.integers(1, 3), max_size=4)
    places, features = st.integers(1, 20) | st.integers(1, 150), st.integers(1, 40)
MASKS = ("none", "bool", "added", "hidden rows")
LAYS = (*LAYOUTS, "heads")


@pytest.fixture(autouse=True, scope="module")
def nan_in_new_memory() -> Iterator[None]:
    """What a kernel leaves as it was shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(XP, "empty", lambda shape, dtype: np.full(shape, NAN, dtype))
        yield


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


@cpu_only
def test_gradients_of_pieces_are_pieces() -> None:
    """What a linear layer's output is split into has gradients that fill one memory in the same order; whatever only
    looks like that has gradients of its own."""

    def heads(memory: np.ndarray, *widths: int) -> list[np.ndarray]:
        pieces, start = [], 0
        for width in widths:
            part = memory[..., start : (start := start + 2 * width)]
            pieces.append(part.reshape(*memory.shape[:2], 2, width).swapaxes(1, 2))
        return pieces

    def check(query: np.ndarray, key: np.ndarray, value: np.ndarray, together: bool) -> None:
        g = numbers(1, *query.shape[:-1], value.shape[-1])
        compare(g, query, key, value)
        extras = attention.attention(XP, query, key, value)
        found = attention.attention_gradients(XP, g, query, key, value, None, *extras)
        starts = [address_of(x) for x in found]
        assert [x.strides for x in found] == [x.strides for x in (query, key, value)] or not together
        assert (found[0].base is found[1].base is found[2].base) == together
        if together:
            assert starts == sorted(starts)
            assert found[0].base.nbytes == sum(x.nbytes for x in found)
        assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(found, 2))

    memory = numbers(0, 3, 5, 24)
    query, key, value = heads(memory, 4, 4, 4)
    check(query, key, value, True)
    check(*heads(memory, 3, 3, 6), True)
    check(key, query, value, False)
    check(query, query, value, False)
    check(query, key, key, False)
    check(query, key, value[::-1], False)
    check(query[:2], key[:2], value[:2], False)
    check(query, key, memory[..., 16:].reshape(3, 5, 4, 2).transpose(0, 3, 1, 2), False)
    check(query, key, value.copy(), False)
    check(query, key[:, :1], value[:, :1], False)
    check(*heads(memory[..., :18], 3, 3, 3), False)
    check(*heads(numbers(0, 3, 5, 30)[..., 6:], 4, 4, 4), False)
    check(query, key, memory[..., 8:16].reshape(3, 5, 2, 4).swapaxes(1, 2), False)


@given(
    leads, places, places, features, features, st.sampled_from(MASKS), st.booleans(), st.sampled_from(LAYS),
    st.sampled_from([None, 0.3, 1.0]), seeds,
)  # fmt: skip
@example([2, 3], scaled(150), scaled(150), scaled(40), scaled(24), "none", True, "heads", None, 0)
@example([1, 2], scaled(140), scaled(140), scaled(32), scaled(32), "hidden rows", True, "plain", None, 1)
@example([2], 1, scaled(130), scaled(33), 5, "none", True, "plain", None, 2)
@example([3], scaled(130), 5, 7, scaled(40), "bool", True, "plain", None, 3)
@example([], 9, 10, 10, 9, "none", False, "plain", None, 4)
@drawn(120)
def test_forward_and_backward(
    lead: list, queries: int, keys: int, features: int, width: int, mask: str, is_causal: bool, layout: str,
    scale: float | None, seed: int,
) -> None:  # fmt: skip
    shapes = (queries, width), (queries, features), (keys, features), (keys, width)
    arrays = [lay(numbers(seed + i, *lead, *shape), layout) for i, shape in enumerate(shapes)]
    hidden = mask_of(mask, seed, (*lead, queries, keys))
    compare(*arrays, hidden, is_causal=is_causal, scale=scale)


@given(places, places, st.lists(st.booleans(), min_size=15, max_size=15), st.sampled_from(MASKS), st.booleans(), seeds)
@drawn(60)
def test_leading_axes_broadcast(queries: int, keys: int, ones: list, mask: str, is_causal: bool, seed: int) -> None:
    def lead(i: int) -> tuple:
        return tuple(
            1 if one else n
            for one, n in zip(ones[3 * i : 3 * i + 3], (1, 2, 2) if SIMULATED else (2, 2, 3), strict=True)
        )

    shapes = (queries, 9), (keys, 9), (keys, 5)
    query, key, value = (numbers(seed + i, *lead(i), *shape) for i, shape in enumerate(shapes))
    whole = np.broadcast_shapes(lead(0), lead(1), lead(2))
    over = tuple(1 if one else n for one, n in zip(ones[9:12], whole, strict=True))[ones[12] :]
    hidden = mask_of(mask, seed, (*over, 1 if ones[13] else queries, 1 if ones[14] else keys))
    compare(numbers(3, *whole, queries, 5), query, key, value, hidden, is_causal=is_causal)


def test_one_key_head_for_many_queries() -> None:
    batch, count = (1, 5) if SIMULATED else (2, 70)
    query, key, value = (numbers(i, batch, heads, count, 8) for i, heads in enumerate((6, 2, 2)))
    key, value = (np.broadcast_to(x[:, :, None], (batch, 2, 3, count, 8)) for x in (key, value))
    query = query.reshape(batch, 2, 3, count, 8)
    compare(numbers(3, batch, 2, 3, count, 8), query, key, value, is_causal=True)


def test_rows_that_see_nothing_are_zero() -> None:
    queries, keys = (10, 18) if SIMULATED else (70, 130)
    query, key, value = numbers(0, 2, queries, 8), numbers(1, 2, keys, 8), numbers(2, 2, keys, 8)
    mask, nothing, little = np.ones((queries, keys), bool), [0, queries // 3, queries - 1], queries // 2
    mask[nothing] = False
    mask[little, : keys * 3 // 4] = False  # nothing in the first block of keys
    out, largest, sums = attention.attention(XP, query, key, value, mask)
    assert not out[:, nothing].any()
    assert (largest[:, nothing] == 0).all()
    assert (sums[:, nothing] == 1).all()
    assert out[:, little].any(axis=-1).all()
    gradients = attention.attention_gradients(XP, out + 1, query, key, value, mask, out, largest, sums)
    assert not gradients[0][:, nothing].any()
    assert all(np.isfinite(x).all() for x in gradients)


def test_large_scores() -> None:
    count, later = (12, 8) if SIMULATED else (80, 64)
    query, key, value = numbers(0, 3, count, 8) * 30, numbers(1, 3, count, 8) * 30, numbers(2, 3, count, 8)
    key[:, later:] *= 4  # a later block of keys has the largest scores
    out, largest, _ = attention.attention(XP, query, key, value)
    expected = m13.attention.function(XP, *map(double, (query, key, value)))
    np.testing.assert_allclose(out, expected[0], atol=3e-3)  # scores of 10,000 have three decimals
    near(largest, expected[1])


def test_nan_stays_where_it_is_seen() -> None:
    count, at = (12, 10) if SIMULATED else (70, 66)
    query, key, value = numbers(0, 2, count, 8), numbers(1, 2, count, 8), numbers(2, 2, count, 8)
    key[1, at, 3] = NAN
    out = attention.attention(XP, query, key, value, is_causal=True)[0]
    assert np.isnan(out).any(axis=-1).tolist() == [[False] * count, [False] * at + [True] * (count - at)]
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
    st.integers(0, 2 if SIMULATED else 4), st.integers(1, 3), st.integers(1, 3),
    st.integers(0, 30 if SIMULATED else 90), features, features, st.sampled_from(LAYS),
    st.sampled_from([None, 0.3]), seeds,
)  # fmt: skip
@example(4, 2, 3, 18 if SIMULATED else 90, scaled(40), scaled(16), "heads", None, 0)
@example(3, 1, 2, 30 if SIMULATED else 600, 9, 1, "plain", None, 1)
@drawn(60)
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


@pytest.mark.parametrize("capacity", [10, 30 if SIMULATED else 600])
def test_one_new_token_of_large_scores_or_without_keys(capacity: int) -> None:
    query, key, value = numbers(0, 3, 2, 8) * 30, numbers(1, 3, 2, capacity, 8) * 30, numbers(2, 3, 2, capacity, 5)
    lengths = np.array([capacity, 0, capacity // 2])
    out = attention.cached_attention(XP, query, key, value, lengths)
    np.testing.assert_allclose(out, one_token(query, key, value, lengths), atol=3e-3)


@cpu_only
@pytest.mark.parametrize("end", [True, False])
def test_one_new_token_at_protected_pages(end: bool) -> None:
    for features, width, capacity in ((1, 3, 5), (LANES, LANES + 1, LANES), (2 * LANES + 3, 2 * LANES, 70)):
        shapes = (2, 6, features), (2, 2, capacity, features), (2, 2, capacity, width)
        query, key, value = (guarded(numbers(i, *shape), end) for i, shape in enumerate(shapes))
        lengths, out = guarded(np.array([capacity, capacity // 2]), end), guarded_empty((2, 6, width), end=end)
        attention.cached_into(query, key, value, lengths, out, None)
        near(out, one_token(query, key, value, lengths))


@cpu_only
def test_a_cache_that_does_not_fit() -> None:
    query, key = numbers(0, 2, 6, 8), numbers(1, 2, 3, 10, 8)
    for lengths in ([1, 11], [-1, 2]):
        with pytest.raises(ValueError, match="lengths must be between 0 and 10"):
            attention.cached_attention(XP, query, key, key, np.array(lengths))


@cuda_only  # lengths lie on the device, where nobody complains
@pytest.mark.parametrize("kind", ["int8", "int32", "int64"])
def test_nobody_reads_outside_of_the_cache(kind: str) -> None:
    query, key, value = numbers(0, 2, 6, 8), numbers(1, 2, 3, 10, 8), numbers(2, 2, 3, 10, 5)
    out = attention.cached_attention(XP, query, key, value, np.array([99, -1], kind))
    near(out, one_token(query, key, value, np.array([10, 0])))


# -- memory and cores --------------------------------------------------------------------------------------------------

SIZES = [(1, 1, 1, 1), (3, 5, LANES - 1, LANES + 1), (LANES + 1, KEYS + 3, LANES, 2 * LANES - 1), (70, 65, 3, LANES),
         (QUERIES + 9, KEYS + LANES + 5, 2 * LANES + 3, 5)]  # fmt: skip


@cpu_only
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


@cpu_only
@pytest.mark.parametrize("end", [True, False])
def test_pieces_at_protected_pages(end: bool) -> None:
    """Inputs and gradients, each three pieces of one memory that a protected page follows, or precedes."""
    for rows, width in ((1, 1), (5, LANES - 1), (LANES + 1, LANES + 3), (KEYS + 3, 2 * LANES)):

        def pieces(memory: np.ndarray, rows: int = rows, width: int = width) -> list[np.ndarray]:
            return list(memory.reshape(2, rows, 3, 2, width).transpose(2, 0, 3, 1, 4))

        given = pieces(guarded(numbers(0, 2, rows, 6 * width), end))
        results = pieces(guarded_empty((2, rows, 6 * width), end=end))
        g = guarded(numbers(1, 2, 2, rows, width), end)
        exact = m13.attention.function(XP, *map(double, given))
        slopes = m13.attention_gradients.function(XP, *map(double, (g, *given)), None, *exact)
        extras = [x.astype("float32") for x in exact]
        attention.gradients_into(g, *given, None, *extras, *results, False, None)
        size = max(float(np.abs(x).max()) for x in (g, *slopes))
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


@cpu_only
def test_one_core_and_several() -> None:
    results = []
    for threads in ("1", "2"):
        environment = {**os.environ, "NUMBA_NUM_THREADS": threads}
        done = subprocess.check_output([sys.executable, "-c", ALONE], text=True, env=environment)
        results.append([np.frombuffer(bytes.fromhex(word), np.float32) for word in done.split()])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_twice_is_the_same() -> None:
    g, query, key, value = (numbers(i, 2 if SIMULATED else 5, scaled(100), 16) for i in range(4))
    found = [attention.attention(XP, query, key, value, is_causal=True) for _ in range(2)]
    slopes = [attention.attention_gradients(XP, g, query, key, value, None, *x, is_causal=True) for x in found]
    for one, other in zip((*found[0], *slopes[0]), (*found[1], *slopes[1]), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.skipif(not SIMULATED, reason="of NumPy's arrays, only the simulator takes those that lie otherwise")
def test_arrays_are_read_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    monkeypatch.setattr(attention, "readable", lambda x: FakeCUDAArray(np.asarray(x)))
    arrays = [lay(numbers(i, 1, 2, 9, 5), "heads") for i in range(4)]
    compare(*arrays, mask_of("added", 0, (1, 2, 1, 9)), is_causal=True)
    compare(*arrays[:2], *(np.broadcast_to(x[:, :1], x.shape) for x in arrays[2:]), numbers(5, 9, 1)[::-1])
    query, key, value = arrays[0][..., 0, :], *arrays[1:3]
    near(attention.cached_attention(XP, query, key, value, np.array([9])), one_token(query, key, value, np.array([9])))


@pytest.mark.skipif(not SIMULATED, reason="elsewhere, all tiles are as large")
def test_tiles_as_large_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinytorch.kernels.cuda import jit

    monkeypatch.setattr(jit, "SIMULATED", False)
    monkeypatch.setattr(jit, "helper", lambda function: function)
    spec = importlib.util.find_spec(attention.__name__)
    large = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(large)
    assert large.SIDE > attention.SIDE
    monkeypatch.setattr(sys.modules[__name__], "attention", large)
    compare(numbers(0, 67, 3), numbers(1, 67, 5), numbers(2, 66, 5), numbers(3, 66, 3), is_causal=True)
    query, key, value = numbers(0, 1, 2, 5), numbers(1, 1, 1, 270, 5), numbers(2, 1, 1, 270, 3)
    for capacity, length in ((70, 67), (270, 260)):
        given = query, key[:, :, :capacity], value[:, :, :capacity], np.array([length])
        near(large.cached_attention(XP, *given), one_token(*given))


# -- the exponential ---------------------------------------------------------------------------------------------------


@kernel
def exp_of(x, out):
    for i in range(0, len(x), LANES):
        store(address(out) + 4 * i, exp_or_zero(load(address(x) + 4 * i)))


@cpu_only
def test_exponential() -> None:
    x = np.linspace(-87.29, 88.2, 1 << 20, dtype="float32")
    out = np.empty_like(x)
    exp_of(x, out)
    np.testing.assert_allclose(out, np.exp(x.astype("float64")), rtol=3e-7)
    x = np.array([-INF, -100, -1e30, -88, NAN, 0, -0.0, np.finfo("float32").min] * 2, "float32")
    out = np.empty_like(x)
    exp_of(x, out)
    assert np.array_equal(out, [0, 0, 0, 0, NAN, 1, 1, 0] * 2, equal_nan=True)
