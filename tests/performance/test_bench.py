"""The benchmark program itself: that it measures, compares and judges. Its figures are not tests."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types

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
    done = run("--rounds", "1", "--budget", "0.1", "--json")
    rows = json.loads(done.stdout)["cases"]
    assert [row["case"] for row in rows] == [case.name for case in bench.CASES if case.device == "cpu"]
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
    monkeypatch.setattr(bench, "measure", lambda library, case, budget: times[library])
    by_ratio = bench.Case("step", bench.mlp_step("SGD"), ratio=1.0)
    assert bench.compare(by_ratio, 3, "torch")["ratio"] == pytest.approx(1.5)
    assert bench.compare(by_ratio, 3, "torch")["within"] is False
    assert bench.compare(by_ratio, 3, None)["within"] is None  # nothing to compare with
    assert bench.compare(bench.Case("op", bench.small_op(False), seconds=4e-3), 1, None)["within"] is True


def test_wrong_arguments_are_named() -> None:
    assert "no case has 'lstm'" in run("--only", "lstm").stderr
    assert "expected at least 1" in run("--rounds", "0").stderr
    assert "expected more than 0 seconds, got 0.0" in run("--budget", "0").stderr


@pytest.mark.parametrize("case", bench.ON_A_GPU, ids=lambda case: case.name)
def test_what_a_gpu_is_measured_with_is_set_on_both_libraries(
    monkeypatch: pytest.MonkeyPatch, case: bench.Case
) -> None:
    """A library that stands in notes what it is told; the programs themselves run on the CPU in the other cases."""
    told: list[tuple] = []
    library = types.SimpleNamespace(
        set_default_device=lambda name: told.append(("device", name)),
        set_float32_matmul_precision=lambda name: told.append(("precision", name)),
        cuda=types.SimpleNamespace(synchronize=lambda: told.append(("wait",))),
        backends=types.SimpleNamespace(cudnn=types.SimpleNamespace(allow_tf32=None)),
    )
    own = dataclasses.replace(case, build=lambda library: lambda: told.append(("call",)))
    monkeypatch.setattr(bench, "CASES", (own,))
    monkeypatch.setitem(sys.modules, "torch", library)  # type: ignore[arg-type]
    assert bench.measure_here("torch", case.name, 0.01) > 0
    assert told[:2] == [("device", "cuda"), ("precision", case.precision)]
    assert told[2:6] == [("call",), ("wait",)] * 2
    assert library.backends.cudnn.allow_tf32 is (case.precision == "high")


def test_the_networks_of_the_gpu_cases_learn_on_the_cpu() -> None:
    import tinytorch

    bench.picture_step(bench.resnet_9, 2)(tinytorch)()
    bench.gpt_step(1, 1, 64, 8, 2)(tinytorch)()
