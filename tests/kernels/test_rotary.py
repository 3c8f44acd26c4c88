"""The rotary kernel equals module 12's operation, in any layout, and stays in its arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import LAYOUTS, XP, laid_out, near
from tests.kernels.place import SIMULATED, cpu_only, drawn, kernels
from tinytorch import m12_embeddings as m12
from tinytorch.kernels.cpu.vectors import LANES

rotary = kernels("rotary")
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True, scope="module")
def nan_in_new_memory() -> Iterator[None]:
    """What a kernel leaves as it was shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(XP, "empty", lambda shape, dtype: np.full(shape, NAN, dtype))
        yield


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def compare(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> None:
    near(rotary.rotate(XP, x, cos, sin), m12.rotate.function(XP, *(a.astype("float64") for a in (x, cos, sin))))


LEAD, ROWS, HALF = (2, 12, 6) if SIMULATED else (3, 40, 40)


@given(
    st.lists(st.integers(1, LEAD), max_size=4), st.integers(1, ROWS), st.integers(1, HALF), st.sampled_from(LAYOUTS),
    st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 5), st.integers(0, 1 << 30),
)  # fmt: skip
@example([LEAD + 1] * 2, 5 if SIMULATED else 64, 16, "plain", [False] * 6, 0, 0)
@drawn(150)
def test_equals_the_operation(
    lead: list, rows: int, half: int, layout: str, ones: list, dropped: int, seed: int
) -> None:
    shape = (*lead, rows, 2 * half)
    angles = (*(1 if one else n for one, n in zip(ones, shape[:-1], strict=False)), 2 * half)
    angles = angles[min(dropped, len(angles) - 1) :]
    cos, sin = (laid_out(numbers(seed + i, *angles), layout) for i in (1, 2))
    compare(laid_out(numbers(seed, *shape), layout), cos, sin)


def test_heads_keep_their_layout() -> None:
    count, features = (5, 8) if SIMULATED else (20, 32)
    split = numbers(0, 3, count, 3, 4, features)  # (B, T, 3, H, D)
    x = split[:, :, 1].transpose(0, 2, 1, 3)
    compare(x, numbers(1, count, features), numbers(2, count, features))
    out = rotary.rotate(XP, x, numbers(1, count, features), numbers(2, count, features))
    assert out.transpose(0, 2, 1, 3).flags.c_contiguous


@pytest.mark.skipif(not SIMULATED, reason="of NumPy's arrays, only the simulator takes those that lie otherwise")
def test_heads_are_read_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    monkeypatch.setattr(rotary, "readable", lambda x: FakeCUDAArray(np.asarray(x)))
    compare(numbers(0, 2, 5, 3, 2, 6)[:, :, 1].transpose(0, 2, 1, 3), numbers(1, 5, 6), numbers(2, 5, 12)[:, ::2])


def test_the_smaller_one_is_stretched() -> None:
    compare(numbers(0, 6), numbers(1, 6), numbers(2, 6))
    compare(numbers(0, 6), numbers(1, 5, 6), numbers(2, 5, 6))
    compare(numbers(0, 5, 6), numbers(1, 2, 3, 5, 6), numbers(2, 2, 3, 5, 6))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 5, 4), (3, 5, 0)])
def test_empty(shape: tuple) -> None:
    compare(numbers(0, *shape), numbers(1, *shape[-2:]), numbers(2, *shape[-2:]))


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="D even, got x"):
        rotary.rotate(XP, numbers(0, 2, 3), numbers(0, 2, 3), numbers(0, 2, 3))
    with pytest.raises(ValueError, match="D even, got x"):
        rotary.rotate(XP, numbers(0, 2, 4), numbers(0, 2, 6), numbers(0, 2, 6))


def test_nan_and_infinity_go_to_their_pair() -> None:
    x = np.ones((2, 40), np.float32)
    x[0, 3], x[1, 39] = NAN, INF
    out = rotary.rotate(XP, x, *(np.full((2, 40), 0.5, np.float32) for _ in range(2)))
    assert np.flatnonzero(~np.isfinite(out[0])).tolist() == [3, 23]
    assert out[1, [19, 39]].tolist() == [-INF, INF]


@cpu_only
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("half", [1, LANES - 1, LANES, LANES + 1, 3 * LANES])
def test_at_protected_pages(half: int, end: bool) -> None:
    shape = (2, 5, 2 * half)
    x, cos, sin = guarded(numbers(0, *shape), end), guarded(numbers(1, *shape), end), guarded(numbers(2, *shape), end)
    out = guarded_empty(shape, end=end)
    rotary.rotate_into(x, cos, sin, out)
    near(out, m12.rotate.function(XP, *(a.astype("float64") for a in (x, cos, sin))))


@cpu_only
def test_one_core_and_several() -> None:
    lead, x = (1, 3, 7), numbers(0, 3, 7, 50, 24)
    cos, sin = numbers(1, 50, 24), numbers(2, 50, 24)
    results = [np.empty_like(x) for _ in range(3)]
    for out, turn, parts in zip(results, (rotary.turn_all, *[rotary.turn_spread] * 2), (1, 2, 5), strict=True):
        places = np.array([rotary.describe(a) for a in (x, cos, sin, out)])
        turn(parts, lead, 50, 12, places)
    assert all(np.array_equal(results[0], out) for out in results)
