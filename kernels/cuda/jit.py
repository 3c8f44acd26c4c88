"""How CUDA kernels are compiled, kept and launched.

A kernel is what each of thousands of threads runs, told apart by its number: threads come in blocks, which share a
little fast memory and can wait for each other, and blocks in a grid, which can do neither. Numba compiles a kernel when
it is first launched, and keeps the machine code. With NUMBA_ENABLE_CUDASIM=1 in the environment before Numba is
imported, a thread of Python runs in the place of each of the device's: right or wrong shows there, and nothing about
speed. So kernels use what the simulator knows: no warp shuffles, and each shared array has a line of its own.

Literals are written as float32(0.5): 0.5 is a float64, and draws the arithmetic around it, at 1/32 of the speed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# CuPy's arrays name the stream that they are made on, and Numba would wait for it before each launch. Kernels are
# launched on that very stream, which does one thing after the other.
os.environ.setdefault("NUMBA_CUDA_ARRAY_INTERFACE_SYNC", "0")
os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")  # small inputs are no mistake

import numba
import numpy as np
from numba import cuda

try:
    from numba.cuda.core import config  # of NVIDIA's package numba-cuda, which has settings of its own
except ImportError:
    from numba import config

from tinytorch.kernels.cpu.jit import cached_in

__all__ = [
    "SIMULATED",
    "THREADS",
    "blocks_for",
    "check",
    "helper",
    "instead_of_launches",
    "kernel",
    "readable",
    "row_by_row",
    "run",
]

SOURCES = Path(__file__).parent
SIMULATED = bool(config.ENABLE_CUDASIM)
THREADS = 32 if SIMULATED else 256  # of a block whose threads need no particular number, but a power of two
MOST_BLOCKS = 65535  # along a grid's second and third axis; along the first there may be 2³¹ - 1


def kernel(function: Callable) -> Any:
    """What a grid of threads runs: `run(kernel, blocks, threads, *arguments)` launches it."""
    with cached_in(SOURCES, config) as can:
        return cuda.jit(function, cache=can)


def helper(function: Callable) -> Any:
    """What kernels of the same file call.

    The simulator puts a `cuda` of its own into a kernel's file while it runs it. It would do so again for each call of
    a helper, in all threads at once.
    """
    return function if SIMULATED else cuda.jit(function, device=True)


def blocks_for(count: int, threads: int = THREADS) -> int:
    """How many blocks there must be for `count` threads."""
    return -(-count // threads)


INSTEAD: list[Callable[..., None]] = []
STREAMS: dict[int, Any] = {}  # Numba's, by the address of CuPy's


def run(kernel: Any, blocks: int | tuple, threads: int | tuple, *arguments: Any) -> None:
    """Launch a kernel behind what CuPy was given; it runs while Python goes on. Without blocks, nothing happens."""
    if INSTEAD:
        INSTEAD[-1](kernel, blocks, threads, *arguments)
    elif min(blocks) if isinstance(blocks, tuple) else blocks:
        kernel[blocks, threads, stream_of(arguments)](*arguments)


def stream_of(arguments: tuple) -> Any:
    """The stream that CuPy works on, for CuPy's arrays; the device's usual one for NumPy's, which Numba copies."""
    cupy: Any = sys.modules.get("cupy")
    if cupy is None or not any(isinstance(x, cupy.ndarray) for x in arguments):
        return 0
    address = cupy.cuda.get_current_stream().ptr
    if address not in STREAMS:
        STREAMS[address] = cuda.external_stream(address) if address else 0
    return STREAMS[address]


@contextmanager
def instead_of_launches(function: Callable[..., None]) -> Iterator[None]:
    """For tests: `function(kernel, blocks, threads, *arguments)` is called where a kernel would be launched."""
    INSTEAD.append(function)
    try:
        yield
    finally:
        INSTEAD.pop()


def row_by_row(array: Any) -> Any:
    """The array itself if it lies row by row, as kernels are compiled for; else a copy."""
    writeable = getattr(array.flags, "writeable", True)  # NumPy's are copied back, too; CuPy's always are writeable
    return array if array.flags.c_contiguous and writeable else array.copy()


def readable(x: Any) -> Any:
    """The array as it lies, with steps of any size: heads are views of what one linear layer made.

    NumPy's are copied to the device in any case, which Numba does only for those that lie row by row.
    """
    return row_by_row(x) if isinstance(x, np.ndarray) else x


def count_up(out):
    i = cuda.grid(1)
    if i < out.size:
        out[i] = i


def check() -> str:
    """Run a kernel on the device and look at what it wrote; which Numba compiled it. Any exception: it cannot be."""
    out = np.zeros(2 * THREADS + 1, np.int32)
    kernel(count_up)[blocks_for(len(out)), THREADS](out)
    if (out != np.arange(len(out))).any():
        raise RuntimeError(f"a kernel that counts to {len(out)} wrote {out}")
    own = importlib.util.find_spec("numba_cuda") is not None
    return f"numba-cuda {importlib.metadata.version('numba-cuda')}" if own else f"Numba {numba.__version__}"
