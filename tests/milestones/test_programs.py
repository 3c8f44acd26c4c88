"""The milestone programs: what they reach and write, and how they end when something is wrong."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

import tinytorch
from tinytorch.datasets import CIFAR10, MNIST, Digits
from tinytorch.m01_setup import atomic_write
from tinytorch.m08_training import LAST, PREVIOUS, write_checkpoint
from tinytorch.m08_training_appendix import model_state, read_history
from tinytorch.milestones import cnn, mlp, perceptron, pictures, runs, tinygpt, xor
from tinytorch.milestones.program import Check

PROGRAMS = {"perceptron": perceptron, "xor": xor, "mlp": mlp, "cnn": cnn}
ALL = PROGRAMS | {"tinygpt": tinygpt}
READERS = ["mlp", "cnn"]  # those that read pictures
SHARED = {"report.json", "history.jsonl", "curves.png", "confusion.png", "mistakes.png", "last.safetensors",
          "best.safetensors"}  # fmt: skip
RESULTS = {"mlp": SHARED, "cnn": SHARED | {"filters.png"}}


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def is_picture(path: Path) -> bool:
    """Whether a file is a PNG that is not of one colour."""
    return imread(path)[..., :3].std() > 0.01


def interrupted_run(root: Path, name: str, out: Path, after: str, *arguments: str) -> tuple[int, str, str]:
    """Run a program in a process and press Ctrl-C at the first line that begins with `after`."""
    command = [sys.executable, "-m", "tinytorch", "milestone", "run", name, "--out", str(out), *arguments]
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


# -- mlp and cnn -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
def test_readers_write_everything_and_say_by_how_much_they_failed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert PROGRAMS[name].main(["--epochs", "1", "--out", str(tmp_path / "run")]) == 1
    captured = capsys.readouterr()
    report = report_of(tmp_path / "run")
    value, least = report["checks"][0]["value"], PROGRAMS[name].RECIPES["digits"].threshold
    assert 0.4 < value < least
    assert captured.err == (
        f"FAILED: test accuracy on Digits: {100 * value:.2f} %, must be at least {100 * least:g} %: "
        f"{100 * (least - value):.2f} points below\n"
    )
    assert "\x1b" not in captured.out
    assert "\r" not in captured.out
    assert max(len(line.replace(str(tmp_path), "")) for line in captured.out.splitlines()) <= 80
    assert names(tmp_path / "run") == RESULTS[name]
    assert all(is_picture(tmp_path / "run" / file) for file in RESULTS[name] if file.endswith(".png"))
    assert read_history(tmp_path / "run" / "history.jsonl") == [report["final"]]
    assert (report["data"], report["epochs"]) == ("digits", 1)
    assert 0 < report["waiting_share"] < 0.9
    waited = re.search(r"training waited ([\d.]+) % of its time for data", captured.out)
    assert waited is not None
    assert float(waited[1]) == pytest.approx(100 * report["waiting_share"], abs=0.06)  # both are rounded


def test_the_accuracy_is_that_of_the_weights_that_were_saved(tmp_path: Path) -> None:
    mlp.main(["--epochs", "2", "--out", str(tmp_path)])
    weights = {name: x.numpy() for name, x in model_state(tmp_path / "last.safetensors").items()}
    test = Digits(train=False)
    images, labels = (x.numpy() for x in test.get_batch(range(len(test))))
    hidden = np.maximum(images.reshape(len(images), -1) @ weights["1.weight"].T + weights["1.bias"], 0)
    scores = hidden @ weights["4.weight"].T + weights["4.bias"]
    assert report_of(tmp_path)["checks"][0]["value"] == (scores.argmax(1) == labels).mean()


@pytest.mark.parametrize("name", READERS)
def test_validation_pictures_are_not_trained_on(name: str) -> None:
    recipe = dataclasses.replace(PROGRAMS[name].RECIPES["digits"], augment=())
    train, validation = pictures.make_batches(recipe, None, seed=0, workers=0)
    trained_on, held_out = ([image.numpy().tobytes() for images, _ in batches for image in images]
                            for batches in (train, validation))  # fmt: skip
    assert len(trained_on) + len(held_out) == len(Digits())
    assert len(held_out) > 100
    assert not set(trained_on) & set(held_out)


def test_only_training_pictures_are_changed_at_random_and_all_are_normalised() -> None:
    recipe = cnn.RECIPES["digits"]
    train, validation = pictures.make_batches(recipe, None, seed=0, workers=0)
    original = (Digits().data.numpy() / 16 - recipe.mean[0]) / recipe.std[0]
    kept, held_out = np.delete(original, np.s_[9::10], axis=0), original[9::10]
    found = np.concatenate([images.numpy() for images, _ in validation])
    assert np.allclose(found, held_out, atol=1e-5)
    found = np.concatenate([images.numpy() for images, _ in train])
    same = {image.round(3).tobytes() for image in kept.astype(np.float32)}
    unchanged = np.mean([image.round(3).tobytes() in same for image in found])
    assert unchanged == pytest.approx(1 / 9, abs=0.04)  # 3 places by 3, one of which is where it was


def test_batches_do_not_depend_on_workers() -> None:
    loaders = [pictures.make_batches(cnn.RECIPES["digits"], None, 7, workers)[0] for workers in (0, 2)]
    for (images, labels), (others, their_labels) in zip(*loaders, strict=True):
        assert np.array_equal(images.numpy(), others.numpy())
        assert np.array_equal(labels.numpy(), their_labels.numpy())


@pytest.mark.parametrize("name", READERS)
@pytest.mark.skipif(os.name == "nt", reason="signals differ on Windows")
def test_ctrl_c_and_resume_end_with_the_same_bits(
    name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments = PROGRAMS[name].main, ["--epochs", "6", "--seed", "4"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) in (0, 1)
    capsys.readouterr()
    out = tmp_path / "a folder"
    status, _, errors = interrupted_run(root, name, out, "epoch 3/", *arguments)
    assert status == 130
    line = errors.strip().splitlines()[0]
    assert line.endswith(f"to go on: tinytorch milestone run {name} --out '{out}' --epochs 6 --seed 4 --resume")
    assert not names(out) & RESULTS[name]  # nothing is published before it is complete

    assert main(["--out", str(out), "--epochs", "6", "--seed", "5", "--resume"]) == 2
    assert "was begun with --data digits --epochs 6 --seed 4; resume" in capsys.readouterr().err
    other = next(program for program in READERS if program != name)
    assert PROGRAMS[other].main(["--out", str(out), *arguments, "--resume"]) == 2
    assert "was begun with another program" in capsys.readouterr().err

    assert main(["--out", str(out), *arguments, "--resume"]) in (0, 1)
    epoch = report_of(out)["resumed_after_epoch"]
    assert epoch in (2, 3)
    assert f"going on after epoch {epoch}\n" in capsys.readouterr().out
    assert "resumed_after_epoch" not in report_of(tmp_path / "whole")
    assert names(out) == RESULTS[name]
    for file in ("last.safetensors", "best.safetensors", "history.jsonl"):
        assert filecmp.cmp(out / file, tmp_path / "whole" / file, shallow=False), file


def test_a_new_run_replaces_results_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--epochs", "2", "--out", str(tmp_path)]
    mlp.main(arguments)
    before = {file: (tmp_path / file).read_bytes() for file in RESULTS["mlp"]}

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "plot_confusion", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mlp.main([*arguments, "--seed", "1"])
    assert {file: (tmp_path / file).read_bytes() for file in RESULTS["mlp"]} == before
    assert (tmp_path / "unfinished" / "last.safetensors").exists()

    with monkeypatch.context() as patch:  # the interrupted run is kept while another is not complete
        patch.setattr(pictures, "plot_confusion", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mlp.main([*arguments, "--seed", "2"])
    assert (tmp_path / "abandoned" / "last.safetensors").exists()

    mlp.main([*arguments, "--seed", "2", "--resume"])
    assert names(tmp_path) == RESULTS["mlp"]
    assert report_of(tmp_path)["seed"] == 2
    assert len(read_history(tmp_path / "history.jsonl")) == 2


def test_a_run_that_was_interrupted_is_put_aside_in_the_place_of_the_one_before(tmp_path: Path) -> None:
    work = runs.Run(tmp_path)
    for kept in (PREVIOUS, LAST):  # a run may be interrupted while the last is renamed
        work.folder.mkdir(exist_ok=True)
        (work.folder / kept).write_text(kept)
        (work.folder / f"beside {kept}").touch()
        work.begin()
        assert names(work.abandoned) == {kept, f"beside {kept}"}
        assert (work.abandoned / kept).read_text() == kept
        assert names(work.folder) == set()
    (work.folder / "history.jsonl").touch()  # of a run that has saved nothing
    work.begin()
    assert names(work.folder) == set()
    assert names(work.abandoned) == {LAST, f"beside {LAST}"}


def test_a_run_whose_report_cannot_be_written_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--epochs", "1", "--out", str(tmp_path)]

    def full(path: Path, content: bytes) -> None:
        if path.name == "report.json":
            raise OSError(28, "No space left on device")
        atomic_write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("tinytorch.milestones.program.atomic_write", full)
        assert mlp.main(arguments) == 2
    assert capsys.readouterr().err == "mlp: [Errno 28] No space left on device\n"
    assert not (tmp_path / "report.json").exists()
    assert (tmp_path / "unfinished" / LAST).exists()
    assert mlp.main([*arguments, "--resume"]) == 1
    report = report_of(tmp_path)
    assert (report["resumed_after_epoch"], report["epochs"]) == (1, 1)
    assert names(tmp_path) == RESULTS["mlp"]
    assert read_history(tmp_path / "history.jsonl") == [report["final"]]


def test_waiting_is_that_of_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 4.0, 10.0, 12.0])
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=clock.__next__))
    waiting = runs.Waiting()
    assert waiting.share == 0
    for steps, waited in ((2, 0.5), (1, 1.0)):
        trainer: Any = SimpleNamespace(batches=SimpleNamespace(waited=waited))
        waiting.on_epoch_start(trainer)
        for _ in range(steps):
            waiting.on_step_end(trainer)
        waiting.on_epoch_end(trainer)
    assert (waiting.waited, waiting.trained, waiting.share) == (1.5, 6.0, 0.25)


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


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files like CIFAR-10's, of a few noisy pictures whose brightness tells their class."""
    parts = {"train_files": [f"data_batch_{i}.bin" for i in range(1, 6)], "test_files": ["test_batch.bin"]}
    generator, count = np.random.default_rng(8), 40
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for attribute, files in parts.items():
        monkeypatch.setattr(CIFAR10, attribute, dict.fromkeys(files, count))
        for file in files:
            labels = generator.integers(0, 10, (count, 1))
            pixels = 20 * labels + generator.integers(0, 50, (count, 3072))
            (folder / file).write_bytes(np.concatenate([labels, pixels], axis=1).astype(np.uint8).tobytes())
    return tmp_path


def test_cnn_learns_cifar10_and_its_full_network_is_another_run(
    small_cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--data", "cifar10", "--root", str(small_cifar), "--epochs", "1", "--out", str(tmp_path / "run")]
    assert cnn.main(arguments) in (0, 1)
    small = report_of(tmp_path / "run")
    assert (small["data"], small["network"], small["checks"][0]["least"]) == ("cifar10", "A CNN 3-32-64", 0.55)
    assert names(tmp_path / "run") == RESULTS["cnn"]
    assert is_picture(tmp_path / "run" / "filters.png")
    output = capsys.readouterr().out
    assert "180 pictures\nfor training, 20 for validation, 40 for the test" in output
    assert max(len(line.replace(str(tmp_path), "")) for line in output.splitlines()) <= 80

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "plot_confusion", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cnn.main([*arguments, "--full"])
    assert "--full --resume" in capsys.readouterr().err
    assert report_of(tmp_path / "run") == small
    assert cnn.main([*arguments, "--resume"]) == 2
    assert "was begun with --data cifar10 --full --epochs 1 --seed 0; resume" in capsys.readouterr().err
    assert cnn.main([*arguments, "--full", "--resume"]) in (0, 1)
    full = report_of(tmp_path / "run")
    assert (full["full"], full["network"], full["checks"][0]["least"]) == (True, "A CNN 3-32-64-128", 0.75)


def test_full_is_for_cifar10(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cnn.main(["--full", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "cnn: --full is for --data cifar10, not digits\n"


@pytest.mark.parametrize("name", READERS)
def test_digits_need_no_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert PROGRAMS[name].main(["--root", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"{name}: --root: Digits comes with TinyTorch and needs no files; choose another --data\n"
    )


def test_recipes_fit_their_pictures() -> None:
    for program in (mlp, cnn):
        for key, recipe in program.RECIPES.items():
            assert recipe.network()(tinytorch.rand(2, *recipe.shape)).shape == (2, len(recipe.dataset.classes)), key
            assert len(recipe.mean) == len(recipe.std)
            assert len(recipe.mean) in (1, recipe.shape[0])
    assert Digits().data.shape[1:] == cnn.RECIPES["digits"].shape


# -- options, errors and reports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_help_has_an_example_and_fits(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        ALL[name].main(["--help"])
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


@pytest.mark.parametrize("name", ALL)
def test_a_folder_that_cannot_be_written_ends_it_before_any_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert ALL[name].main(["--out", str(tmp_path / "file" / "run")]) == 2
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
    monkeypatch.setattr(MNIST, "mirrors", ("http://127.0.0.1:9/",))
    assert mlp.main(["--data", "mnist", "--root", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert "train-images-idx3-ubyte.gz is missing" in errors
    assert f"into {tmp_path}" in errors
    assert errors.count("\n") == 1
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + bytes(20))
    assert mlp.main(["--data", "mnist", "--root", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert f"mlp: {tmp_path / 'train-images-idx3-ubyte'}: truncated" in capsys.readouterr().err


@pytest.mark.parametrize("name", PROGRAMS)
def test_json_is_all_there_is_on_standard_output(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert PROGRAMS[name].main(["--epochs", "1", "--json", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == report_of(tmp_path)
    assert (report["milestone"], report["passed"]) == (name, False)
    assert "FAILED" in captured.err


@pytest.mark.parametrize("name", ["perceptron", "xor"])
def test_programs_run_on_every_device(name: str, device: str, tmp_path: Path) -> None:
    assert PROGRAMS[name].main(["--out", str(tmp_path)]) == 0
    assert report_of(tmp_path)["device"] == device


@pytest.mark.parametrize("name", READERS)
def test_readers_run_on_every_device(name: str, device: str, tmp_path: Path) -> None:
    assert PROGRAMS[name].main(["--epochs", "1", "--out", str(tmp_path)]) == 1
    assert report_of(tmp_path)["checks"][0]["value"] > 0.4


def test_check_says_by_how_much() -> None:
    assert str(Check("a", 0.97, least=0.96)) == "passed: a: 97.00 %, must be at least 96 %"
    assert str(Check("a", 0.95, least=0.96)) == "FAILED: a: 95.00 %, must be at least 96 %: 1.00 points below"
    assert str(Check("a", 0.80, most=0.75)) == "FAILED: a: 80.00 %, must be at most 75 %: 5.00 points above"
    assert str(Check("a", 1.0, least=1.0)) == "passed: a: 100.00 %, must be 100 %"
    assert not Check("a", float("nan"), least=0.5).passed
    assert str(Check("a", 1.85, most=1.88, unit="nats")) == "passed: a: 1.850 nats, must be at most 1.88"
    assert str(Check("a", 1.9, most=1.88, unit="nats")) == "FAILED: a: 1.900 nats, must be at most 1.88: 0.020 above"
    assert str(Check("a", 0.9, most=0.5, unit="nats")) == "FAILED: a: 0.900 nats, must be at most 0.5: 0.400 above"
    assert not Check("a", float("nan"), most=2.0, unit="nats").passed
