"""The benchmark program itself: that it measures, compares and judges. Its figures are not tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tinytorch.profiling import bench


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tinytorch.profiling.bench", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.slow
def test_every_case_is_measured() -> None:
    done = run("--rounds", "1", "--json")
    rows = json.loads(done.stdout)["cases"]
    assert [row["case"] for row in rows] == [case.name for case in bench.CASES]
    assert all(0 < row.get("seconds", 0.5) < 10 for row in rows)


def test_the_environment_that_slows_openblas_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def fake_run(command: list[str], env: dict, **options: object) -> subprocess.CompletedProcess:
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, "0.5\n", "")

    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setattr(subprocess, "run", fake_run)
    assert bench.measure("tinytorch", "import") == 0.5
    assert "OPENBLAS_CORETYPE" not in seen
    assert "PATH" in seen


def test_the_program_alone_loads_no_array_library() -> None:
    """What it loads is loaded beside PyTorch, too; our NumPy backend changes how the C library gives memory."""
    code = "import sys, tinytorch.profiling.bench; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in loaded if name.startswith(("numpy", "tinytorch.backends"))]


def test_limits_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"tinytorch": 3e-3, "torch": 2e-3}
    monkeypatch.setattr(bench, "measure", lambda library, case: times[library])
    by_ratio = bench.Case("step", bench.mlp_step("SGD"), ratio=1.0)
    assert bench.compare(by_ratio, 3, "torch")["ratio"] == pytest.approx(1.5)
    assert bench.compare(by_ratio, 3, "torch")["within"] is False
    assert bench.compare(by_ratio, 3, None)["within"] is None  # nothing to compare with
    assert bench.compare(bench.Case("op", bench.small_op(False), seconds=4e-3), 1, None)["within"] is True


def test_wrong_arguments_are_named() -> None:
    assert "no case has 'lstm'" in run("--only", "lstm").stderr
    assert "expected at least 1" in run("--rounds", "0").stderr
