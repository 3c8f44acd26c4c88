"""The program that measures compression: that it trains, writes, reports and judges, here on Digits. No figures."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

import tinytorch
from tinytorch.m09_spatial import SimpleCNN
from tinytorch.milestones.cnn import RECIPES, one_cycle
from tinytorch.milestones.pictures import make_batches
from tinytorch.profiling import compression as program


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run, and the program set to Digits."""
    recipe = RECIPES["digits"]
    monkeypatch.setattr(program, "RECIPE", recipe)
    monkeypatch.setattr(program, "STUDENT", partial(SimpleCNN, 1, 10, 8, widths=(8,), hidden=8, batch_norm=True))
    monkeypatch.setattr(program, "EPOCHS", 2)
    monkeypatch.setattr(program, "FINE_TUNING", (1, 0.02))
    tinytorch.manual_seed(0)
    model, batches = recipe.network(), make_batches(recipe, None, 0, 1)[0]
    optimizer, schedule = one_cycle(model, 2 * len(batches), 0.05)
    trainer = tinytorch.Trainer(model, optimizer, recipe.loss, scheduler=schedule, scheduler_interval="step")
    trainer.fit(batches, 2)
    folder = tmp_path / "run"
    folder.mkdir()
    trainer.save(folder / "last.safetensors")
    return folder


@pytest.mark.slow
def test_the_program_measures_and_goes_on_where_it_was(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    arguments = ["--teacher", str(teacher), "--out", str(out), "--seeds", "5"]
    first = program.main(arguments)
    printed = capsys.readouterr().out
    found = {how: json.loads((out / f"student-5-{how}.json").read_text()) for how in ("alone", "taught-4-0.9")}
    assert 0.3 < found["alone"]["test"] <= 1
    rows = json.loads((out / "networks" / "report.json").read_text())
    assert [row["name"] for row in rows] == ["whole", *program.NAMES]
    by_name = {row["name"]: row for row in rows}
    assert by_name["sparse"]["nonzero"] < 0.12 * by_name["whole"]["parameters"]
    assert by_name["shared"]["bytes"] < by_name["sparse"]["bytes"] < by_name["channels-25%"]["bytes"]
    assert by_name["channels-75%"]["flops"] < by_name["channels-25%"]["flops"] < by_name["whole"]["flops"]
    falling = [row["seconds"] for row in rows[:4]]
    better = found["taught-4-0.9"]["test"] > found["alone"]["test"]
    assert first == (0 if better and falling == sorted(falling, reverse=True) else 1)
    assert "gain (points)" in printed
    changed = found["alone"] | {"test": 1.0}
    (out / "student-5-alone.json").write_text(json.dumps(changed))
    assert program.main([*arguments, "--only", "students"]) == 1  # nobody is better than that; and nothing is trained
    assert f"{100.0:.4g}" in capsys.readouterr().out
