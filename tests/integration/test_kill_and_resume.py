"""A training run that is killed again and again ends with the same bits as one that is left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinytorch.m04_layers_appendix import load
from tinytorch.m08_training import read_checkpoint

SCRIPT = Path(__file__).with_name("training_run.py")
SEED, CHAINS, KILLS = 20, 4, 5


def start(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, SCRIPT, folder], stdout=subprocess.PIPE, text=True, env=environment)


def finish(folder: Path) -> None:
    process = start(folder)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert output.endswith("done\n")


def kill_after(folder: Path, step: int, delay: float) -> int:
    """Let a run go on until it has made `step`, and `delay` seconds more, and kill it; returns the step reached."""
    process, reached = start(folder), 0
    assert process.stdout is not None
    for line in process.stdout:
        assert line != "done\n", "it was over before it could be killed"
        reached = int(line.split()[1])
        if reached >= step:
            break
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    return reached


def bits(folder: Path) -> tuple:
    """All that a run left: weights and optimizer state as bytes, everything else as text, and the history."""
    state = load(folder / "final.safetensors")
    tensors = {name: (x.dtype, x.shape, x.numpy().tobytes()) for name, x in state.items()}
    return tensors, dict(state.metadata), (folder / "history.jsonl").read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(folder)
    return bits(folder)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
@pytest.mark.parametrize("chain", range(CHAINS))
def test_killed_runs_end_with_the_same_bits(chain: int, uninterrupted: tuple, tmp_path: Path) -> None:
    draw = random.Random(SEED + chain)
    reached = 0
    for _ in range(KILLS):
        step, delay = reached + draw.randint(1, 9), draw.uniform(0, 0.006)
        reached = kill_after(tmp_path, step, delay)
        files = sorted(tmp_path.glob("*.safetensors"))
        print(f"chain {chain}: killed {delay * 1e3:.2f} ms after step {step}; left {[file.name for file in files]}")
        assert reached < 3 or files
        for file in files:
            assert read_checkpoint(file)
    finish(tmp_path)
    tensors, texts, history = bits(tmp_path)
    for name, expected in uninterrupted[0].items():
        assert tensors[name] == expected, name
    assert (tensors.keys(), texts, history) == (uninterrupted[0].keys(), *uninterrupted[1:])


def test_the_run_has_what_can_go_wrong(uninterrupted: tuple) -> None:
    tensors, texts, history = uninterrupted
    assert {"model.0.weight", "optimizer.state.0.exp_avg", "callbacks.0.1.weights.3.bias"} <= tensors.keys()
    assert "OneCycleLR" in texts["state"]
    assert len(history.splitlines()) == 8
