"""The notebook for Colab: what stands in it is its module, and all of its cells run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.milestones.notebook import SOURCE, TARGET, notebook


def test_the_notebook_is_made_of_the_module() -> None:
    assert TARGET.read_text(encoding="utf-8") == notebook(), "run `nox -s notebook`"


def test_cells_have_no_results_and_no_magic() -> None:
    cells = json.loads(TARGET.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) > len(code) >= 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert not any(line.startswith(("!", "%")) for cell in code for line in "".join(cell["source"]).splitlines())


@pytest.mark.slow
def test_all_cells_run_on_the_cpu(root: Path, tmp_path: Path) -> None:
    cells = json.loads(TARGET.read_text(encoding="utf-8"))["cells"]
    program = tmp_path / "cells.py"
    program.write_text("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "computing on the CPU" in run.stdout
    accuracy = float(run.stdout.partition("reads ")[2].partition("%")[0])
    assert accuracy > 95
    assert "def " in run.stdout
    assert SOURCE.exists()
