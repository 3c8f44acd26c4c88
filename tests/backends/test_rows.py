"""What the NumPy backend does faster for large arrays of rows is what it does for others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinytorch.backends import get_backend

xp = get_backend("cpu")
AXES = (-1, 2, 0, (0, 1), (-1,), (0,), (1,), (0, 2), (1, 2), (0, 1, 2), None, -3, (0, -2))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64"])
@pytest.mark.parametrize("layout", ["rows", "transposed", "strided"])
def test_sums_means_and_largest(axis: Any, keepdims: bool, dtype: str, layout: str) -> None:
    x = (np.random.default_rng(0).normal(size=(12, 16, 40)) * 9).astype(dtype)  # over the size where the ways part
    x = x.transpose(1, 0, 2) if layout == "transposed" else x[..., ::2] if layout == "strided" else x
    wide = x.astype("float64")
    tolerance = {"float32": 1e-5, "float64": 1e-12, "float16": 2e-2, "int64": 0}[dtype]
    for ours, exact in ((xp.sum, np.sum), (xp.max, np.max), (xp.mean, np.mean)):
        if ours == xp.mean and dtype == "int64":
            continue
        got, wanted = ours(x, axis=axis, keepdims=keepdims), exact(wide, axis=axis, keepdims=keepdims)
        assert (got.shape, got.dtype) == (wanted.shape, x.dtype)
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * 100)


def test_nan_and_infinity_go_through() -> None:
    x = np.zeros((100, 80), "float32")
    x[0, 3], x[1, 4], x[2, 5], x[3] = np.nan, np.inf, -np.inf, -np.inf
    assert np.isnan(xp.max(x, axis=-1)[0])
    assert xp.max(x, axis=-1)[1:4].tolist() == [np.inf, 0, -np.inf]
    assert np.isnan(xp.sum(x, axis=-1)[0])
    assert xp.sum(x, axis=-1)[1:4].tolist() == [np.inf, -np.inf, -np.inf]


@pytest.mark.parametrize("axis", [2, (0, 2), -3, (0, 0)])
def test_an_axis_that_is_not_there_or_there_twice_is_an_error(axis: Any) -> None:
    with pytest.raises(ValueError, match="axis"):
        xp.sum(np.ones((100, 80), "float32"), axis=axis)


def test_products_of_a_batch_with_one_matrix() -> None:
    rng = np.random.default_rng(1)
    for shape in ((3, 4, 5), (2, 3, 4, 5), (0, 4, 5)):
        a, b = rng.normal(size=shape), rng.normal(size=(5, 6))
        np.testing.assert_allclose(xp.matmul(a, b), a @ b, rtol=1e-12)
        turned = np.swapaxes(rng.normal(size=(*shape[:-2], 5, 4)), -1, -2)
        np.testing.assert_allclose(xp.matmul(turned, b), turned @ b, rtol=1e-12)
    assert xp.matmul(np.zeros((0, 0, 0)), np.zeros((0, 0))).shape == (0, 0, 0)
    assert xp.matmul(np.zeros((2, 3, 0)), np.zeros((0, 4))).tolist() == [[[0.0] * 4] * 3] * 2
