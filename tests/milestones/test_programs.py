"""The milestone programs: what they reach and write, and how they end when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

import tinytorch
from tinytorch.m08_training import write_checkpoint
from tinytorch.m08_training_appendix import model_state, read_history
from tinytorch.milestones import mlp, perceptron, xor
from tinytorch.milestones.datasets import digits
from tinytorch.milestones.program import Check

PROGRAMS = {"perceptron": perceptron, "xor": xor, "mlp": mlp}
RESULTS = {"report.json", "history.jsonl", "curves.png", "confusion.png", "mistakes.png", "last.safetensors",
           "best.safetensors"}  # fmt: skip


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def is_picture(path: Path) -> bool:
    """Whether a file is a PNG that is not of one colour."""
    return imread(path)[..., :3].std() > 0.01


def interrupted_run(root: Path, out: Path, after: str, *arguments: str) -> tuple[int, str, str]:
    """Run the mlp in a process and press Ctrl-C at the first line that begins with `after`."""
    command = [sys.executable, "-m", "tinytorch", "milestone", "run", "mlp", "--out", str(out), *arguments]
    process = subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(after):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=60)
    return process.returncode, "".join(lines) + rest, errors


# -- perceptron --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_perceptron_separates_the_points(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert perceptron.main(["--seed", str(seed), "--out", str(tmp_path)]) == 0
    report = report_of(tmp_path)
    assert report["passed"]
    assert report["checks"][0]["value"] == 1.0
    assert 0 < report["corrections"] <= report["corrections_bound"]  # Novikoff's theorem
    assert names(tmp_path) == {"report.json", "decision.png"}
    assert is_picture(tmp_path / "decision.png")
    assert "passed: points on the right side: 100.00 %" in capsys.readouterr().out
    # The line that was written down separates the points of that seed, computed anew in float64.
    tinytorch.manual_seed(seed)
    points, labels, _ = perceptron.separable_points(report["points"])
    *w, b = report["weights"]
    assert (np.sign(points.numpy().astype(np.float64) @ np.array(w) + b) == labels.numpy()).all()


def test_the_perceptrons_rule_corrects_only_what_is_wrong() -> None:
    machine = perceptron.Perceptron()
    points = tinytorch.tensor([[1.0, 2.0], [2.0, 2.0], [-3.0, 0.5], [1.0, -0.5]])
    labels = tinytorch.tensor([1.0, 1.0, -1.0, -1.0])
    assert machine.learn(points, labels) == 2  # the first, as 0 is on neither side, and the last, at 1 − 1 + 1
    assert (machine.w.tolist(), machine.b.tolist()) == ([0.0, 2.5], [0.0])


# -- xor ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_one_layer_fails_on_xor_and_two_do_not(seed: int, tmp_path: Path) -> None:
    assert xor.main(["--seed", str(seed), "--out", str(tmp_path)]) == 0
    values = {check["what"]: check["value"] for check in report_of(tmp_path)["checks"]}
    assert values["two layers"] == 1.0
    assert 0.4 < values["one layer"] <= 0.75
    assert values["the best line of all"] == 0.75
    assert names(tmp_path) == {"report.json", "one_layer.png", "two_layers.png"}
    assert all(is_picture(tmp_path / name) for name in ("one_layer.png", "two_layers.png"))


def test_best_line_finds_the_line_where_there_is_one() -> None:
    points = tinytorch.tensor([[0.0, 1.0], [1.0, 0.9], [-0.5, -1.0], [0.3, -0.7]])
    assert xor.best_line(points, tinytorch.tensor([[1.0], [1.0], [0.0], [0.0]]))[0] == 1.0
    assert xor.best_line(points, tinytorch.tensor([[0.0], [0.0], [1.0], [1.0]]))[0] == 1.0


# -- mlp ---------------------------------------------------------------------------------------------------------------


def test_mlp_writes_everything_and_says_by_how_much_it_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mlp.main(["--epochs", "1", "--out", str(tmp_path / "run")]) == 1
    captured = capsys.readouterr()
    report = report_of(tmp_path / "run")
    value = report["checks"][0]["value"]
    below = 100 * (0.96 - value)
    assert 0.5 < value < 0.96
    assert captured.err == (
        f"FAILED: test accuracy on Digits: {100 * value:.2f} %, must be at least 96 %: {below:.2f} points below\n"
    )
    assert "\x1b" not in captured.out
    assert "\r" not in captured.out
    assert max(len(line.replace(str(tmp_path), "")) for line in captured.out.splitlines()) <= 80
    assert names(tmp_path / "run") == RESULTS
    assert all(is_picture(tmp_path / "run" / name) for name in RESULTS if name.endswith(".png"))
    assert read_history(tmp_path / "run" / "history.jsonl") == [report["final"]]


def test_the_accuracy_is_that_of_the_weights_that_were_saved(tmp_path: Path) -> None:
    mlp.main(["--epochs", "2", "--out", str(tmp_path)])
    weights = {name: x.numpy() for name, x in model_state(tmp_path / "last.safetensors").items()}
    *_, images, labels = digits()
    hidden = np.maximum(images.reshape(len(images), -1) @ weights["1.weight"].T + weights["1.bias"], 0)
    scores = hidden @ weights["4.weight"].T + weights["4.bias"]
    assert report_of(tmp_path)["checks"][0]["value"] == (scores.argmax(1) == labels).mean()


def test_validation_pictures_are_not_trained_on() -> None:
    images, labels, *_ = digits()
    train, validation = mlp.make_batches(images, labels, mlp.RECIPES["digits"], seed=0)
    assert len(train.labels) + len(validation.labels) == len(labels)
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in validation.images)


@pytest.mark.skipif(os.name == "nt", reason="signals differ on Windows")
def test_ctrl_c_and_resume_end_with_the_same_bits(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--epochs", "6", "--seed", "4"]
    assert mlp.main([*arguments, "--out", str(tmp_path / "whole")]) in (0, 1)
    capsys.readouterr()
    out = tmp_path / "a folder"
    status, _, errors = interrupted_run(root, out, "epoch 3/", *arguments)
    assert status == 130
    line = errors.strip().splitlines()[0]
    assert line.endswith(f"to go on: tinytorch milestone run mlp --out '{out}' --epochs 6 --seed 4 --resume")
    assert not names(out) & RESULTS  # nothing is published before it is complete

    assert mlp.main(["--out", str(out), "--epochs", "6", "--seed", "5", "--resume"]) == 2
    assert "was begun with --data digits --epochs 6 --seed 4" in capsys.readouterr().err

    assert mlp.main(["--out", str(out), *arguments, "--resume"]) in (0, 1)
    assert "going on after epoch" in capsys.readouterr().out
    assert names(out) == RESULTS
    for name in ("last.safetensors", "best.safetensors", "history.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_new_run_replaces_results_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--epochs", "2", "--out", str(tmp_path)]
    mlp.main(arguments)
    before = {name: (tmp_path / name).read_bytes() for name in RESULTS}

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlp, "plot_confusion", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mlp.main([*arguments, "--seed", "1"])
    assert {name: (tmp_path / name).read_bytes() for name in RESULTS} == before
    assert (tmp_path / "unfinished" / "last.safetensors").exists()

    with monkeypatch.context() as patch:  # the interrupted run is kept while another is not complete
        patch.setattr(mlp, "plot_confusion", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mlp.main([*arguments, "--seed", "2"])
    assert (tmp_path / "abandoned" / "last.safetensors").exists()

    mlp.main([*arguments, "--seed", "2", "--resume"])
    assert names(tmp_path) == RESULTS
    assert report_of(tmp_path)["seed"] == 2
    assert len(read_history(tmp_path / "history.jsonl")) == 2


def test_resume_without_an_interrupted_run_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mlp.main(["--epochs", "1", "--resume", "--out", str(tmp_path)]) == 1
    assert "there is no interrupted run" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["damaged", "foreign"])
def test_resume_refuses_what_is_not_its_own(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "unfinished" / "last.safetensors"
    path.parent.mkdir()
    if kind == "damaged":
        path.write_bytes(np.random.default_rng(0).bytes(500))
    else:
        write_checkpoint({"callbacks": []}, path)
    content = path.read_bytes()
    assert mlp.main(["--epochs", "1", "--resume", "--out", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert str(path.parent) in errors
    assert path.read_bytes() == content


# -- options, errors and reports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_has_an_example_and_fits(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[name].main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"Example: tinytorch milestone run {name} --" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--data", "cifar"], "'cifar'"),
        (["--epochs", "0"], "expected a whole number >= 1, not '0'"),
        (["--epochs", "two"], "not 'two'"),
        (["--seed", "-1"], "not '-1'"),
        (["more"], "more"),
        (["--sed", "1"], "--sed"),
    ],
)
def test_wrong_arguments_end_with_one_line(
    arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        mlp.main(arguments)
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("mlp: ")
    assert wanted in captured.err
    assert captured.err.endswith("see: tinytorch milestone run mlp --help\n")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_folder_that_cannot_be_written_ends_it_before_any_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert PROGRAMS[name].main(["--out", str(tmp_path / "file" / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"{name}: --out {tmp_path / 'file' / 'run'}: cannot write there")
    assert captured.err.count("\n") == 1


def test_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tinytorch.get_default_device()
    assert xor.main(["--device", "cuda:99", "--out", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("xor: --device cuda:99: ")
    assert errors.count("\n") == 1
    assert tinytorch.get_default_device() == before


def test_missing_mnist_says_what_to_put_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYTORCH_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr("tinytorch.milestones.datasets.MIRRORS", ("http://127.0.0.1:9/",))
    assert mlp.main(["--data", "mnist", "--root", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert "train-images-idx3-ubyte.gz is missing" in errors
    assert f"into {tmp_path}" in errors
    assert errors.count("\n") == 1
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + bytes(20))
    assert mlp.main(["--data", "mnist", "--root", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert f"mlp: {tmp_path / 'train-images-idx3-ubyte'}: truncated" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "status"), [("perceptron", 1), ("xor", 1), ("mlp", 1)])
def test_json_is_all_there_is_on_standard_output(
    name: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert PROGRAMS[name].main(["--epochs", "1", "--json", "--out", str(tmp_path)]) == status
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == report_of(tmp_path)
    assert (report["milestone"], report["passed"]) == (name, False)
    assert "FAILED" in captured.err


@pytest.mark.parametrize("name", ["perceptron", "xor"])
def test_programs_run_on_every_device(name: str, device: str, tmp_path: Path) -> None:
    assert PROGRAMS[name].main(["--out", str(tmp_path)]) == 0
    assert report_of(tmp_path)["device"] == device


def test_mlp_runs_on_every_device(device: str, tmp_path: Path) -> None:
    assert mlp.main(["--epochs", "1", "--out", str(tmp_path)]) == 1
    assert report_of(tmp_path)["checks"][0]["value"] > 0.5


def test_check_says_by_how_much() -> None:
    assert str(Check("a", 0.97, least=0.96)) == "passed: a: 97.00 %, must be at least 96 %"
    assert str(Check("a", 0.95, least=0.96)) == "FAILED: a: 95.00 %, must be at least 96 %: 1.00 points below"
    assert str(Check("a", 0.80, most=0.75)) == "FAILED: a: 80.00 %, must be at most 75 %: 5.00 points above"
    assert str(Check("a", 1.0, least=1.0)) == "passed: a: 100.00 %, must be 100 %"
    assert not Check("a", float("nan"), least=0.5).passed
