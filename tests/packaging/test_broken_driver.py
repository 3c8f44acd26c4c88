"""A driver that is no driver: TinyTorch works on the CPU, and says of CUDA what is missing."""

from __future__ import annotations

import _ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries are put in the way as on Linux")
PROGRAM = """
import tinytorch as t
assert not t.cuda.is_available() and t.cuda.device_count() == 0
x = t.randn(64, 64, requires_grad=True)
(x @ x).relu().softmax(-1).sum().backward()
try:
    t.ones(2, device="cuda")
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(params=["no library at all", "without CUDA's functions"])
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """An environment in which the first libcuda and libnvidia-ml that are found are not NVIDIA's."""
    for name in ("libcuda.so.1", "libcuda.so", "libnvidia-ml.so.1"):
        if request.param == "no library at all":
            (tmp_path / name).write_bytes(b"\x7fELF, it says")
        else:
            shutil.copy(_ctypes.__file__, tmp_path / name)
    return {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def test_the_cpu_works_and_cuda_says_what_is_missing(environment: dict[str, str]) -> None:
    done = run(environment, "-W", "error", "-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    assert "device 'cuda'" in done.stdout


def test_doctor_reports_it_and_goes_on(environment: dict[str, str]) -> None:
    done = run(environment, "-m", "tinytorch", "doctor", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["NumPy"]["status"] == "ok", done.stderr
    assert rows["NVIDIA driver"]["status"] in ("absent", "error")
    assert rows["NVIDIA driver"]["fix"]
