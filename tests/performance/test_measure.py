"""`tinytorch bench` and `tinytorch compare`: what they find and print. Their figures are not tests."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import tinytorch as t
from tinytorch import cli
from tinytorch.m20_benchmarking_appendix import load_report, save_report
from tinytorch.milestones.program import UsageError
from tinytorch.profiling import measure


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)


def bench(tmp_path: Path, *options: str, model: str = "mlp") -> list[str]:
    words = ["bench", model, "--seconds", "0.03", "--out", str(tmp_path)]
    return [*words, *(("--batch-size", "1", "--batch-size", "4") if "--batch-size" not in options else ()), *options]


def test_a_report_and_a_table_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    assert call(*bench(tmp_path, "--scenario", "server", "--bound", "5000")) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 80
    assert "mlp: 101,770 parameters, 0.408 MB on disk" in text
    assert "queries a second with 99 of 100 within 5 s" in text
    report = load_report(tmp_path / "report.json")
    assert [one.name for one in report.measurements] == ["batch 1", "batch 4"]
    assert all(len(one.raw_times) + len(one.discarded) >= 20 for one in report.measurements)
    rows = report.results["batches"]
    assert [row["throughput"] for row in rows] == pytest.approx([one.throughput for one in report.measurements])
    assert rows[0]["peak_bytes"] > 4 * (128 + 10)
    assert report.settings["scenario"] == "server"
    load = report.results["server"]
    assert load["rate"] > 0
    assert all(len(each["latencies"]) == 1000 for each in load["loads"])
    for name in ("latency.png", "server.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_other_scenarios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*bench(tmp_path, "--scenario", "single-stream", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["single-stream"]["p90"] == found["batches"][0]["p90"]
    assert call(*bench(tmp_path, "--scenario", "offline")) == 0
    found = load_report(tmp_path / "report.json").results
    assert found["offline"]["throughput"] == max(row["throughput"] for row in found["batches"])
    assert f"in batches of {found['offline']['batch']}" in capsys.readouterr().out


def test_growth_over_batch_width_and_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [word for size in (16, 64, 256) for word in ("--batch-size", str(size))]
    assert call(*bench(tmp_path, *sizes, "--over", "batch", "--json")) == 0
    found = json.loads(capsys.readouterr().out)["over batch"]
    assert found["sizes"] == [16, 64, 256]
    slope = (math.log(found["seconds"][2]) - math.log(found["seconds"][0])) / math.log(16)
    assert found["exponent"] == pytest.approx(slope, abs=1e-9)  # three sizes at equal distances: the ends decide
    assert call(*bench(tmp_path, "--over", "width")) == 0
    assert "time grows with width to the power of" in capsys.readouterr().out
    names = [one.name for one in load_report(tmp_path / "report.json").measurements]
    assert names == ["batch 1", "batch 4", *(f"over width {width}" for width in (64, 128, 256, 512))]
    assert (tmp_path / "width.png").exists()
    assert measure.scaling_of("gpt", "length", (), None).sizes == (8, 16, 32, 64)


def test_what_cannot_grow_is_said(tmp_path: Path) -> None:
    for model, over, message in (("mlp", "length", "no language model"), ("mlp", "batch", "needs three sizes"),
                                 (str(tmp_path), "width", "has the width that it was trained with")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            measure.scaling_of(model, over, (1, 2), None)


def test_threads_are_those_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr(measure, "median_with", lambda threads, name, device: 0.1 / threads)
    found = measure.over_threads("mlp", None)
    assert found.sizes == (1, 2, 4)
    assert found.exponent == pytest.approx(-1)
    monkeypatch.setattr(measure.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    with pytest.raises(UsageError, match="needs four cores, and there are 2"):
        measure.over_threads("mlp", None)


def test_a_process_is_given_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def fake_run(command: list[str], env: dict[str, str], **options: object) -> subprocess.CompletedProcess:
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, "0.5\n", "")

    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setattr(subprocess, "run", fake_run)
    assert measure.median_with(3, "mlp", None) == 0.5
    assert {seen[name] for name in measure.THREADS} == {"3"}
    assert "OPENBLAS_CORETYPE" not in seen


@pytest.mark.slow
def test_a_process_measures_a_network() -> None:
    assert 0 < measure.median_with(1, "mlp", None) < 1
    with pytest.raises(UsageError, match="lstm failed with 1 threads"):
        measure.median_with(1, "lstm", None)


def test_a_server_answers_those_who_ask() -> None:
    work = measure.workload("mlp", None, 8)
    assert measure.answering(work)(3).shape == (3, 10)
    assert not work.model.training


def test_two_networks_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    assert call("compare", "mlp", "cnn", "--batch-size", "8", "--margin", "0.5") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "B is slower, by more than 50 %" in text
    assert "101,770" in text
    assert "545,098" in text
    found = measure.compare_models("cnn", "mlp", 8, 0.5)
    assert found["verdict"] == "faster"
    assert found["interval"][0] < found["ratio"] < found["interval"][1]
    assert found["models"][1]["bytes"] == pytest.approx(4 * 101_770, rel=0.01)


def test_what_weighs_less_on_disk_is_seen() -> None:
    work = measure.workload("mlp", None, 1)
    before = measure.describe(work)
    work.model = t.nn.Linear(784, 10)
    after = measure.describe(work)
    assert (before["parameters"], after["parameters"]) == (101_770, 7_850)
    assert before["bytes"] - after["bytes"] == pytest.approx(4 * (101_770 - 7_850), rel=0.01)


def test_two_reports_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*bench(tmp_path)) == 0
    before, same = tmp_path / "report.json", tmp_path / "same.json"
    report = load_report(before)
    steady = [replace(one, raw_times=tuple(1e-3 + 1e-6 * (i % 7) for i in range(100))) for one in report.measurements]
    save_report(replace(report, measurements=tuple(steady)), before)
    save_report(replace(report, measurements=tuple(steady)), same)
    slower = [replace(one, raw_times=tuple(1.3 * x for x in one.raw_times)) for one in steady]
    save_report(replace(report, measurements=(steady[0], slower[1])), tmp_path / "slower.json")
    capsys.readouterr()
    assert call("compare", str(before), str(same), "--json") == 0
    assert [row["verdict"] for row in json.loads(capsys.readouterr().out)["measurements"]] == ["equal", "equal"]
    assert call("compare", str(before), str(tmp_path / "slower.json")) == 1
    assert "something became slower" in capsys.readouterr().out
    assert call("compare", str(tmp_path / "slower.json"), str(before)) == 0
