"""Which kernels the tests of this folder test: those of the CPU, or, with TINYTORCH_TEST_KERNELS=cuda in the
environment, those of the same names in kernels/cuda, on a GPU or (NUMBA_ENABLE_CUDASIM=1) in Numba's simulator.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

WHERE = os.environ.get("TINYTORCH_TEST_KERNELS", "cpu")
SIMULATED = WHERE == "cuda" and os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "0"


def one_shared_array(self: Any, shape: Any, dtype: Any) -> np.ndarray:
    """The simulator's `cuda.shared.array`, which gives two arrays to threads of a block that come at the same time."""
    from numba.np.numpy_support import as_dtype

    frame = sys._getframe(1)
    kind = np.dtype(dtype) if isinstance(dtype, (type, np.dtype)) else as_dtype(dtype)
    new = np.empty(shape, kind)
    return self._allocations.setdefault((frame.f_code.co_filename, frame.f_lineno), new)


if SIMULATED:
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    FakeCUDAShared.array = one_shared_array
    sys.setswitchinterval(1e-4)  # its threads are Python's, and wait for each other all the time
ON_DEVICE = WHERE == "cuda" and not SIMULATED
cpu_only = pytest.mark.skipif(WHERE != "cpu", reason="a matter of the kernels for CPUs")
cuda_only = pytest.mark.skipif(WHERE != "cuda", reason="a matter of the kernels for CUDA")


def kernels(name: str) -> Any:
    """The module of that name under test."""
    return importlib.import_module(f"tinytorch.kernels.{WHERE}.{name}")


def drawn(most: int) -> Any:
    """How many examples Hypothesis tries: a few in the simulator, which takes a tenth of a second for one."""
    return settings(deadline=None, max_examples=max(4, most // 12) if SIMULATED else most)
