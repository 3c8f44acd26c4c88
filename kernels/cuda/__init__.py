"""Kernels for CUDA devices, compiled by Numba, over arrays of any library that says where on the device they lie.

NumPy's arrays are copied there and back, which is for tests: with NUMBA_ENABLE_CUDASIM=1 in the environment before
Numba is imported, kernels run as Python threads without a GPU. They are compiled when they are first called, so that
importing these files takes no GPU either.
"""

from __future__ import annotations

from typing import Any


def row_by_row(array: Any) -> Any:
    """The array itself if it lies row by row, as kernels are compiled for; else a copy."""
    writeable = getattr(array.flags, "writeable", True)  # NumPy's are copied back, too; CuPy's always are writeable
    return array if array.flags.c_contiguous and writeable else array.copy()
