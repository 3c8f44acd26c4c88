"""Which kernels the tests of this folder test: those of the CPU, or, with TINYTORCH_TEST_KERNELS=cuda in the
environment, those of the same names in kernels/cuda, on a GPU or (NUMBA_ENABLE_CUDASIM=1) in Numba's simulator.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import pytest
from hypothesis import settings

WHERE = os.environ.get("TINYTORCH_TEST_KERNELS", "cpu")
SIMULATED = WHERE == "cuda" and os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "0"
if SIMULATED:  # whose threads are Python's, and wait for each other all the time
    sys.setswitchinterval(1e-4)
ON_DEVICE = WHERE == "cuda" and not SIMULATED
cpu_only = pytest.mark.skipif(WHERE != "cpu", reason="a matter of the kernels for CPUs")
cuda_only = pytest.mark.skipif(WHERE != "cuda", reason="a matter of the kernels for CUDA")


def kernels(name: str) -> Any:
    """The module of that name under test."""
    return importlib.import_module(f"tinytorch.kernels.{WHERE}.{name}")


def drawn(most: int) -> Any:
    """How many examples Hypothesis tries: a few in the simulator, which takes a tenth of a second for one."""
    return settings(deadline=None, max_examples=max(4, most // 12) if SIMULATED else most)
