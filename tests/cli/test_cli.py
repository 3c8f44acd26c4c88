"""The command line: what each command prints, and how it ends when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinytorch import cli
from tinytorch.curriculum import MODULES, Module
from tinytorch.milestones import MILESTONES, Milestone


def call(*arguments: str) -> int:
    """The exit status of the command with these arguments, run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)


def start(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinytorch", *arguments]
    return subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command",
    [[], ["doctor"], ["modules"], ["test"], ["milestone"], ["milestone", "list"], ["milestone", "run"], ["show"],
     ["show", "data"], ["predict"], ["generate"], ["profile"], ["quantize"], ["bench"], ["compare"]],
    ids=lambda words: " ".join(words) or "tinytorch",
)  # fmt: skip
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*command, "--help") == 0
    output = capsys.readouterr().out
    assert f"tinytorch {' '.join(command)}".strip() in output.split("Example")[1]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["tset"], "tset"),
        (["doctor", "--jsn"], "--jsn"),
        (["test"], "MODULE"),
        (["test", "99"], "no module '99'; the modules are 01 setup"),
        (["milestone", "run", "alexnet"], "no milestone 'alexnet'; the milestones are perceptron, xor, mlp, cnn"),
        (["milestone", "lst"], "lst"),
        (["milestone"], "Missing command; see: tinytorch milestone --help"),
        (["show"], "Missing command; see: tinytorch show --help"),
        (["show", "data"], "NAME"),
        (["show", "data", "letters"], "no data set 'letters'; there are cifar10, cifar100, digits"),
        (["show", "data", "digits", "--seed", "-1"], "--seed"),
        (["predict"], "RUN"),
        (["predict", "runs"], "PICTURE"),
        (["predict", "nowhere/at all", "a.png"], "nowhere/at all holds no trained network"),
        (["predict", "runs", "a.png", "--top", "0"], "--top"),
        (["bench"], "MODEL"),
        (["bench", "lstm"], "there is no network 'lstm': name mlp, cnn, gpt or the folder of a run"),
        (["bench", "mlp", "--scenario", "multi"], "no 'multi'; choose single-stream, offline, server"),
        (["bench", "mlp", "--over", "depth"], "no 'depth'; choose batch, width, length, threads"),
        (["bench", "mlp", "--batch-size", "0"], "--batch-size"),
        (["compare", "mlp"], "B"),
        (["compare", "mlp", "lstm"], "there is no network 'lstm'"),
        (["compare", "README.md", "README.md"], "README.md is no report of a benchmark"),
        (["generate"], "RUN"),
        (["generate", "nowhere/at all"], "nowhere/at all holds no language model"),
        (["generate", "runs", "--tokens", "0"], "--tokens"),
        (["generate", "runs", "--temperature", "-1"], "--temperature"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_end_with_one_line(
    arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tinytorch: ")
    assert wanted in captured.err
    assert captured.err.count("\n") == 1


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    assert "Commands:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"tinytorch {cli.__version__}\n"


def test_the_version_is_that_of_the_distribution(root: Path) -> None:
    assert f'version = "{cli.__version__}"' in (root / "pyproject.toml").read_text(encoding="utf-8")


def test_modules(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("modules") == 0
    text = capsys.readouterr().out
    assert all(module.name in text for module in MODULES)
    assert call("modules", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["number"] for row in rows] == [module.number for module in MODULES]
    assert "manual_seed" in rows[0]["exports"]["tinytorch"]


def test_milestone_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("milestone", "list") == 0
    assert "perceptron" in capsys.readouterr().out
    assert call("milestone", "list", "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [found.name for found in MILESTONES]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], ("cnn", [])),
        (["--epochs", "3"], ("cnn", ["--epochs", "3"])),
        (["xor"], ("xor", [])),
        (["xor", "--seed", "1", "--help"], ("xor", ["--seed", "1", "--help"])),
    ],
)
def test_milestone_run_hands_its_options_on(
    arguments: list[str], wanted: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(Milestone, "run", lambda self, argv: calls.append((self.name, list(argv))) or 3)
    assert call("milestone", "run", *arguments) == 3
    assert calls == [wanted]


def test_doctor_prints_findings_with_fixes(root: Path, tmp_path: Path) -> None:
    done = start(root, "doctor", "--json", TINYTORCH_DATA=str(tmp_path), OPENBLAS_CORETYPE="Haswell")
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 0
    assert {"Python", "default device", "memory", "data folder", "NumPy", "processor", "Numba", "CuPy"} <= set(found)
    assert found["NumPy"]["status"] == "warning"
    assert "OPENBLAS_CORETYPE" in found["NumPy"]["fix"]
    assert all(row["fix"] for row in found.values() if row["status"] != "ok")
    assert found["data folder"]["detail"] == str(tmp_path)


def test_doctor_fits_eighty_columns(root: Path, tmp_path: Path) -> None:
    done = start(root, "doctor", TINYTORCH_DATA=str(tmp_path), COLUMNS="80")
    lines = done.stdout.splitlines()
    assert len(lines) > 8
    assert max(map(len, lines)) <= 80


def test_doctor_fails_where_the_default_device_cannot_run(root: Path, tmp_path: Path) -> None:
    done = start(root, "doctor", TINYTORCH_DATA=str(tmp_path), TINYTORCH_DEVICE="cuda:99")
    assert done.returncode == 1
    assert "unset TINYTORCH_DEVICE" in " ".join(done.stdout.split())


def test_doctor_survives_broken_packages(root: Path, tmp_path: Path) -> None:
    for name in ("cupy", "pynvml", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('broken on purpose')\n")
    done = start(root, "doctor", "--json", TINYTORCH_DATA=str(tmp_path), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    broken = [row for row in json.loads(done.stdout) if "broken on purpose" in row["detail"]]
    assert {row["name"] for row in broken} == {"CuPy", "GPU", "matplotlib"}
    assert {row["status"] for row in broken} == {"error"}


def test_doctor_without_numpy_says_so_in_one_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('numpy is broken')\n")
    done = start(root, "doctor", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "numpy is broken" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.file)
def test_test_runs_a_module_and_its_checkpoint_alone(module: Module, root: Path) -> None:
    done = start(root, "test", f"{module.number:02}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok    test_" in done.stdout
    assert f"Checkpoint: {module.checkpoint}" in done.stdout
    assert "GFLOP/s" not in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="signals differ on Windows")
def test_ctrl_c_ends_with_130_and_one_line(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from tinytorch import cli; from tinytorch.milestones import Milestone\n"
        "def run(self, argv): print('running', flush=True); time.sleep(60)\n"
        "Milestone.run = run; cli.main(['milestone', 'run'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "tinytorch: interrupted\n"
