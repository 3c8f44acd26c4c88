"""The kernel of an embedding's gradient equals the operation, and stays in its arrays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import LAYOUTS, XP, laid_out, near
from tests.kernels.place import SIMULATED, WHERE, cpu_only, drawn, kernels
from tinytorch.m12_embeddings import embedding_weight_gradient

embedding = kernels("embedding")
layouts = st.sampled_from(LAYOUTS)
longest, widest = (7, 9) if SIMULATED else (20, 70)


def rows_and_ids(seed: int, shape: tuple, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(*shape, width)).astype("float32"), rng.integers(0, rows, shape)


@given(
    st.lists(st.integers(0, longest), max_size=3).map(tuple), st.integers(1, 50), st.integers(0, widest), st.booleans(),
    st.booleans(), layouts, st.sampled_from(["int64", "int32", "uint8"]), st.integers(0, 1 << 30),
)  # fmt: skip
@example((12, 64), 65, 16 if SIMULATED else 128, False, False, "plain", "int64", 0)
@example((12, 64), 65, 5 if SIMULATED else 130, True, True, "strided", "int32", 0)
@drawn(120)
def test_gradient(
    shape: tuple, rows: int, width: int, padded: bool, scaled: bool, layout: str, dtype: str, seed: int
) -> None:  # fmt: skip
    g, ids = rows_and_ids(seed, shape, rows, width)
    ids, options = ids.astype(dtype), {"rows": rows, "scale_grad_by_freq": scaled}
    options["padding_idx"] = seed % (2 * rows) - rows if padded else None  # may be counted from the end
    expected = embedding_weight_gradient.function(XP, g.astype("float64"), ids, **options)
    ids = laid_out(ids, layout) if ids.ndim else ids
    near(embedding.embedding_weight_gradient(XP, laid_out(g, layout), ids, **options), expected)


def test_frequent_and_absent_ids() -> None:
    g, ids = np.ones((1000, 5 if SIMULATED else 40), "float32"), np.full(1000, 3)
    out = embedding.embedding_weight_gradient(XP, g, ids, rows=5)
    assert out.sum(axis=1).tolist() == [0, 0, 0, g.size, 0]
    assert (embedding.embedding_weight_gradient(XP, g, ids, rows=5, scale_grad_by_freq=True)[3] == 1).all()
    assert not embedding.embedding_weight_gradient(XP, g, ids, rows=5, padding_idx=3).any()


def test_one_number_for_all() -> None:
    g, ids = np.broadcast_to(np.float32(2), (6, 40)), np.arange(6) // 2
    assert (embedding.embedding_weight_gradient(XP, g, ids, rows=3) == 4).all()


def test_nan_and_infinity_stay_in_their_row() -> None:
    g, ids = np.ones((4, 20), "float32"), np.array([0, 1, 2, 1])
    g[1, 3], g[2, 4] = np.nan, np.inf
    out = embedding.embedding_weight_gradient(XP, g, ids, rows=3)
    assert np.argwhere(~np.isfinite(out)).tolist() == [[1, 3], [2, 4]]


def test_ids_that_are_no_row() -> None:
    g = np.ones((2, 4), "float32")
    assert embedding.embedding_weight_gradient(XP, g, np.array([-1, 2]), rows=3)[2].tolist() == [2] * 4  # as in NumPy
    for bad in (3, -4, 1 << 40) if WHERE == "cpu" else ():
        with pytest.raises(IndexError, match="for 3 rows"):
            embedding.embedding_weight_gradient(XP, g, np.array([0, bad]), rows=3)


def test_empty() -> None:
    none = np.empty((0, 2), "int64")
    out = embedding.embedding_weight_gradient(XP, np.empty((0, 2, 5), "float32"), none, rows=3)
    assert (out.shape, out.any()) == ((3, 5), False)
    assert embedding.embedding_weight_gradient(XP, np.empty((0, 2, 5), "float32"), none, rows=0).shape == (0, 5)
    out = embedding.embedding_weight_gradient(XP, np.empty((2, 0), "float32"), np.zeros(2, "int64"), rows=3)
    assert out.shape == (3, 0)


@pytest.mark.skipif(WHERE == "cpu", reason="a matter of the kernels for GPUs")
def test_runs_that_begin_and_end_anywhere_in_a_piece() -> None:
    for counts in itertools.product((0, 1, 31, 32), (1, 31, 33, 100), (0, 3)):
        ids = np.random.default_rng(0).permutation(np.repeat([2, 5, 6], counts))
        g = np.random.default_rng(1).normal(size=(len(ids), 3)).astype("float32")
        for padding in (None, 5):
            options = {"rows": 8, "padding_idx": padding}
            expected = embedding_weight_gradient.function(XP, g.astype("float64"), ids, **options)
            near(embedding.embedding_weight_gradient(XP, g, ids, **options), expected)


@cpu_only
@pytest.mark.parametrize("end", [True, False])
def test_at_protected_pages(end: bool) -> None:
    for width in (1, 3, 16, 17, 33, 64):
        g, ids = rows_and_ids(width, (50,), 7, width)
        counts, out = np.bincount(ids, minlength=7), guarded_empty((7, width), end=end)
        given = guarded(g, end), guarded(ids, end), 2, guarded(counts, end), out
        for launch in (embedding.add_all, embedding.add_spread):
            out.fill(0)
            launch(*given, 2)
            options = {"rows": 7, "padding_idx": 2, "scale_grad_by_freq": True}
            near(out, embedding_weight_gradient.function(XP, g.astype("float64"), ids, **options))


@cpu_only
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_cores_change_nothing(parts: int) -> None:
    g, ids = rows_and_ids(0, (300,), 9, 75)
    alone, together = np.zeros((9, 75), "float32"), np.zeros((9, 75), "float32")
    none = np.empty(0, "int64")
    embedding.add_all(g, ids, -1, none, alone, 1)
    embedding.add_spread(g, ids, -1, none, together, parts)
    assert np.array_equal(alone, together)
