"""What the comparisons with PyTorch share: random inputs, and when two results are near each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

DEVICES = ("cpu", "array_api_strict", "torch")
SLOW = [HealthCheck.filter_too_much, HealthCheck.too_slow]
many = settings(max_examples=60, suppress_health_check=SLOW)
some = settings(max_examples=25, suppress_health_check=SLOW)
dtypes = st.sampled_from(["float32", "float64"])
seeds = st.integers(0, 2**32 - 1)
flags = st.booleans()


def drawn(seed: int, *shape: int, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def as_numpy(x: Any) -> np.ndarray:
    return x.detach().numpy()


def assert_near(ours: Any, theirs: Any, tolerance: float, what: str = "") -> None:
    """Within a tolerance of the largest value."""
    a, b = as_numpy(ours), as_numpy(theirs)
    assert (a.shape, a.dtype) == (b.shape, b.dtype), what
    if b.size:
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).max()), err_msg=what)
