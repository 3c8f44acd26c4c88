"""The milestone fast: it takes trained networks, measures each step, and passes or fails by what it measured."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.image import imread

import tinytorch
from tinytorch import nn
from tinytorch.milestones import cnn, fast, tinygpt
from tinytorch.milestones.fast import Result, Step, fastest, measured, verdicts

SMALL = tinygpt.Recipe(
    layers=2, heads=2, width=16, context=24, batch=8, steps=40, rate=1e-2, warmup=5, stretch=20, looked_at=20
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "SECONDS", 0.01)
    monkeypatch.setattr(fast, "LOOKS", (8,))
    monkeypatch.setattr(tinygpt, "RECIPE", SMALL)
    monkeypatch.setitem(cnn.RECIPES, "digits", replace(cnn.RECIPES["digits"], epochs=4))


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def result(name: str, seconds: float, quality: float) -> Result:
    return Result(Step(name, nn.Identity(), lambda: None), seconds, 1 / seconds, 100, quality)


@pytest.mark.slow
def test_each_step_is_measured(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    draw, words = random.Random(3), ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot"]
    text = tmp_path / "words.txt"
    text.write_text("\n".join(" ".join(draw.choices(words, k=4)) for _ in range(400)), encoding="utf-8")
    tinygpt.main(["--text", str(text), "--out", str(tmp_path / "gpt")])
    capsys.readouterr()

    arguments = ["--cnn", str(tmp_path / "cnn"), "--gpt", str(tmp_path / "gpt"), "--out", str(tmp_path / "fast")]
    status = fast.main(arguments)  # the CNN is trained on the way
    printed, report = capsys.readouterr(), report_of(tmp_path / "fast")
    assert "holds no trained network: first it is trained" in printed.out
    assert max(map(len, printed.out.replace(str(tmp_path), "runs").splitlines())) <= 80
    assert status == (0 if report["passed"] else 1)

    steps = {row["step"]: row for row in report["cnn"]}
    plain, folded, narrow = (steps[name] for name in (
        "as modules 1 to 9 have it", "batch norm folded", "75% of channels removed"))  # fmt: skip
    assert len(steps) == 8
    assert plain["times_faster"] == 1
    assert plain["accuracy"] == steps["kernels"]["accuracy"] == folded["accuracy"] > 0.5
    assert plain["bytes"] > folded["bytes"] > 3.5 * steps["int8"]["bytes"]
    assert folded["bytes"] > 10 * narrow["bytes"]

    texts = {row["step"]: row for row in report["gpt"]}
    assert texts["keys and values cached"]["perplexity"] == texts["as modules 1 to 14 have it"]["perplexity"]
    assert texts["int8"]["bytes"] < texts["kernels"]["bytes"]
    checks = {check["what"]: check for check in report["checks"]}
    assert len(checks) == 5
    assert checks["texts that the cache leaves as they are"]["value"] == 1
    figures = ("steps.png", "pareto.png", "cnn-before.png", "cnn-after.png")
    assert all(imread(tmp_path / "fast" / name)[..., :3].std() > 0.01 for name in figures)


def test_a_step_that_loses_too_much_does_not_count() -> None:
    results = [result("first", 1.0, 0.99), result("good", 0.2, 0.985), result("bad", 0.1, 0.97)]
    assert fastest(results, lambda one: 0.99 - one.quality).step.name == "good"


def test_what_is_checked_is_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [result("first", 1.0, 0.9), result("second", 0.5, 0.895)]

    def compare(a: Step, b: Step, **options: Any) -> Any:
        assert (a.name, b.name) == ("first", "second")
        return SimpleNamespace(ratio=0.12, low=0.11, high=0.13)

    monkeypatch.setattr(fast, "compare", compare)
    speed, loss = verdicts(results, "x", lambda one: 0.9 - one.quality, "lost")
    assert (speed.value, speed.passed) == (0.12, False)
    assert (round(loss.value, 6), loss.passed) == (0.005, True)


def test_a_step_is_called_under_what_it_says(quick: None) -> None:
    seen = []
    step = Step(
        "plain", nn.Linear(4, 4), lambda: seen.append(tinytorch.kernels_enabled()), [tinytorch.reference_kernels]
    )
    found = measured(step, 3, lambda model: 0.25)
    assert seen
    assert not any(seen)
    assert tinytorch.kernels_enabled()
    assert (found.quality, found.size > 80) == (0.25, True)


@pytest.mark.parametrize("wrong", ["--cnn", "--gpt"])
def test_a_folder_of_another_kind_is_refused(
    wrong: str, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("last.safetensors", "config.json"):
        (tmp_path / file).write_bytes(b"{}")
    if wrong == "--gpt":
        assert cnn.main(["--epochs", "1", "--out", str(tmp_path / "cnn")]) in (0, 1)
        capsys.readouterr()
    given = {"--cnn": tmp_path / "cnn", "--gpt": tmp_path} | {wrong: tmp_path}
    assert fast.main([str(x) for pair in given.items() for x in pair] + ["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("fast: ")
