"""The lesson's CUDA kernels, which have no twin for the CPU; and that CUDA's files can be imported without a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.pictures import XP, geometries, near
from tests.kernels.place import cuda_only
from tinytorch import m09_spatial as m09
from tinytorch.kernels.cuda.convolution import convolution, convolution_by_elements
from tinytorch.kernels.cuda.matmul import TILE, matmul, matmul_by_elements
from tinytorch.m09_spatial import Windows


def randn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@cuda_only
@pytest.mark.parametrize("multiply", [matmul, matmul_by_elements])
@pytest.mark.parametrize("shapes", [
    ((1, 1), (1, 1)), ((3, 5), (5, 2)), ((TILE, TILE), (TILE, TILE)), ((TILE + 1, 2 * TILE + 3), (2 * TILE + 3, 5)),
    ((2, TILE - 1), (TILE - 1, TILE + 2)), ((4,), (4,)), ((4,), (2, 4, 3)), ((2, 3, 4), (4,)), ((2, 3, 4), (4, 5)),
    ((3, 1, 2, 4), (2, 4, 1)), ((2, 0), (0, 3)), ((0, 2), (2, 3)), ((0, 2, 2), (2, 2)),
])  # fmt: skip
def test_matmul(multiply: object, shapes: tuple) -> None:
    a, b = (randn(seed, *shape) for seed, shape in enumerate(shapes))
    out = multiply(XP, a, b)
    near(out, np.asarray(a.astype("float64") @ b.astype("float64")))


@cuda_only
@pytest.mark.parametrize("multiply", [matmul, matmul_by_elements])
def test_matmul_of_arrays_that_do_not_lie_row_by_row(multiply: object) -> None:
    a, b = randn(0, 6, 4).T, randn(1, 6, 10)[:, ::2]
    near(multiply(XP, a, b), a.astype("float64") @ b.astype("float64"))
    a[1, 2] = math.inf  # is nowhere multiplied by the zeros around
    np.testing.assert_array_equal(np.isfinite(multiply(XP, a, b)).all(1), [True, False, True, True])


@cuda_only
@pytest.mark.parametrize("convolve", [convolution, convolution_by_elements])
@given(
    geometries(7, 3), st.integers(1, 2), st.sampled_from([(1, 1, 1), (2, 6, 1), (4, 8, 2), (2, 4, 2)]), st.booleans(),
    st.booleans(), st.integers(0, 1 << 30),
)  # fmt: skip
@settings(deadline=None, max_examples=12)
def test_convolution(
    convolve: Any, windows: Windows, count: int, channels: tuple, biased: bool, relu: bool, seed: int
) -> None:
    inputs, outputs, groups = channels
    x, weight = randn(seed, count, inputs, *windows.shape), randn(seed + 1, outputs, inputs // groups, *windows.size)
    bias = randn(seed + 2, outputs) if biased else None
    out = convolve(XP, x, weight, bias, windows=windows, groups=groups, activation="relu" if relu else None)
    doubles = [None if a is None else a.astype("float64") for a in (x, weight, bias)]
    expected = m09.convolution.function(XP, *doubles, windows=windows, groups=groups)
    near(out, np.maximum(expected, 0) if relu else expected)


@cuda_only
@pytest.mark.parametrize("outputs", [1, 4])
def test_nan_stays_under_relu_and_nothing_gives_nothing(outputs: int) -> None:
    windows = m09.lay_windows("test", (2, 2), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))
    x = np.array([[[[math.nan, -1.0], [2.0, math.inf]]]], "float32")
    weight = np.ones((outputs, 1, 1, 1), "float32")
    out = convolution(XP, x, weight, windows=windows, groups=1, activation="relu")
    np.testing.assert_array_equal(out, [[[[math.nan, 0], [2, math.inf]]] * outputs])
    assert convolution(XP, x[:0], weight, windows=windows, groups=1).shape == (0, outputs, 2, 2)


def test_import_takes_no_gpu(root: Path) -> None:
    files = sorted((root / "kernels" / "cuda").glob("[a-z]*.py"))
    code = "import " + ", ".join(f"tinytorch.kernels.cuda.{file.stem}" for file in files)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    environment.pop("NUMBA_ENABLE_CUDASIM", None)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=root, env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
