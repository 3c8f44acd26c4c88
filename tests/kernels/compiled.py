"""CUDA kernels as compiled for real devices, which takes NVIDIA's compiler and no GPU: `pip install numba-cuda[cu12]`.

with instead_of_launches(compiled := Compiled()):
    convolution(xp, x, weight, windows=windows, groups=1)
compiled.kernels["convolve"].doubles  # lines of machine-independent code that calculate with float64
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

needs_compiler = pytest.mark.skipif(
    find_spec("numba_cuda") is None or os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "0",
    reason="needs NVIDIA's compiler (nox -s tests-ptx), and no simulator",
)
ARCHITECTURES = ((7, 5), (8, 0), (9, 0))  # Turing, which Colab's T4 is; Ampere; Hopper


@dataclass
class Machine:
    """What a kernel takes of a device: registers of a thread, bytes of spilled registers, of shared memory."""

    registers: int
    spilled: int
    shared: int


@dataclass
class Listing:
    """A kernel in PTX. doubles: its lines that calculate with float64."""

    ptx: str

    @property
    def doubles(self) -> list[str]:
        return [line.strip() for line in self.ptx.splitlines() if re.search(r"\.f64", line)]

    @property
    def keeps_arrays(self) -> bool:
        """Whether a thread keeps an array in memory of its own, which is not in registers."""
        return ".local" in self.ptx

    def assembled(self, architecture: tuple[int, int] = (8, 0)) -> Machine:
        """What NVIDIA's assembler says of it."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(self.ptx)
            told = subprocess.run(
                [assembler(), "-v", f"-arch=sm_{architecture[0]}{architecture[1]}", str(source), "-o", "/dev/null"],
                capture_output=True, text=True, check=True,
            ).stderr  # fmt: skip
        numbers = [
            re.search(pattern, told) for pattern in (r"(\d+) registers", r"(\d+) bytes spill st", r"(\d+) bytes smem")
        ]
        return Machine(*(int(found[1]) if found else 0 for found in numbers))


def assembler() -> str:
    """ptxas, on the path or in NVIDIA's wheel."""
    wheels = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin/ptxas")
    return shutil.which("ptxas") or str(next(wheels))


@dataclass
class Compiled:
    """For `instead_of_launches`: compiles what would be launched, for the types of its arguments.

    Attributes:
        kernels: by name, what came of each.
        launches: (name, blocks, threads) in their order.
    """

    architecture: tuple[int, int] = (8, 0)
    kernels: dict[str, Listing] = field(default_factory=dict)
    launches: list[tuple[str, Any, Any]] = field(default_factory=list)

    def __call__(self, kernel: Any, blocks: Any, threads: Any, *arguments: Any) -> None:
        from numba import cuda, typeof

        name, signature = kernel.py_func.__name__, tuple(map(typeof, arguments))
        device = SimpleNamespace(compute_capability=self.architecture)  # which helpers are compiled for
        with patch("numba.cuda.dispatcher.get_current_device", lambda: device):
            ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=self.architecture)
        self.kernels[name] = Listing(ptx)
        self.launches.append((name, blocks, threads))
