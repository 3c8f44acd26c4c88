"""What the NumPy backend asks of the C library and of OpenBLAS, each seen in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

CPU_TIME = """
import os, time
import numpy as np, tinytorch
tinytorch.zeros(1)
a = np.ones((700, 700))
used = []
for _ in range(5):
    a @ a
    start = time.process_time()
    time.sleep(0.03)
    used.append(time.process_time() - start)
print(min(used), os.environ.get("OPENBLAS_THREAD_TIMEOUT"))
"""


def run(code: str, **environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OPENBLAS_", "MALLOC_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def openblas_waits() -> bool:
    """Whether NumPy's BLAS is an OpenBLAS with several threads, which wait in a loop if left alone."""
    if not Path("/proc/self/maps").exists() or len(os.sched_getaffinity(0)) == 1:
        return False
    used, _ = run(CPU_TIME.replace(", tinytorch", "").replace("tinytorch.zeros(1)", ""))
    return float(used) > 0.01


def test_blas_threads_sleep_after_a_product() -> None:
    if not openblas_waits():
        pytest.skip("NumPy's BLAS has no threads that wait in a loop")
    used, told = run(CPU_TIME)
    assert float(used) < 0.005
    assert told == "None"  # programs that this one starts know nothing of it


def test_a_time_of_the_users_own_stays() -> None:
    if not openblas_waits():
        pytest.skip("NumPy's BLAS has no threads that wait in a loop")
    used, told = run(CPU_TIME, OPENBLAS_THREAD_TIMEOUT="26")
    assert float(used) > 0.005
    assert told == "26"


LARGE_PAGES = """
import re, tinytorch
from pathlib import Path
address = tinytorch.ones(1 << 18).data.ctypes.data
told = False
for line in Path("/proc/self/smaps").read_text().splitlines():
    if place := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
        here = int(place[1], 16) <= address < int(place[2], 16)
    elif line.startswith("VmFlags:"):
        told |= here and "hg" in line.split()
print(told)
"""


def test_results_lie_in_large_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists() or platform.libc_ver()[0] != "glibc":
        pytest.skip("no large pages, or another C library than glibc")
    assert run(LARGE_PAGES, TINYTORCH_MALLOC="keep") == ["True"]
    assert run(LARGE_PAGES, TINYTORCH_MALLOC="system") == ["False"]
