"""The main job, as a new user types it: `tinytorch milestone run` in an empty folder, with no download."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tinytorch.m08_training_appendix import read_history


def test_the_main_job_learns_real_digits(root: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "TINYTORCH_DATA": str(tmp_path / "data"),
        "COLUMNS": "80",
        "MPLBACKEND": "tkagg",  # needs a display, which nothing here may
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    environment.pop("TINYTORCH_DEVICE", None)
    command = [sys.executable, "-m", "tinytorch", "milestone", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""

    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(ord(character) < 32 for line in lines for character in line)
    assert sum(line.startswith("epoch ") for line in lines) == 20
    assert any(line.startswith("label   0   1   2") for line in lines)
    assert lines[-1].startswith("passed: test accuracy on Digits: ")

    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    run = tmp_path / "runs" / "cnn"
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["passed"]
    assert report["checks"][0]["value"] >= 0.98
    assert report["final"] == read_history(run / "history.jsonl")[-1]
    figures = sorted(run.glob("*.png"))
    assert [path.name for path in figures] == ["confusion.png", "curves.png", "filters.png", "mistakes.png"]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in figures)
    assert all((run / name).stat().st_size > 10_000 for name in ("best.safetensors", "last.safetensors"))
