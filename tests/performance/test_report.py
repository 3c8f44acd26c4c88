"""`tinytorch profile`: what it measures is on the page and in its JSON, and the page needs nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tinytorch import GPT, CharTokenizer, GPTConfig, nn
from tinytorch.m15_profiling import Machine
from tinytorch.milestones import cnn
from tinytorch.milestones.program import UsageError
from tinytorch.profiling import report, workloads
from tinytorch.profiling.workloads import workload


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "STEPS", 2)
    monkeypatch.setattr(report, "LEAST", 0.01)
    monkeypatch.setattr(report, "measure_machine", lambda: Machine(2, (1e11, 2e11), (1e10, 1e10)))


class Page(HTMLParser):
    """The tags of a page that are open, what it refers to, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.addresses, self.rows = list[str](), list[str](), list[list[str]]()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.mark.parametrize("train", [False, True])
def test_the_page_holds_what_was_measured(train: bool, tmp_path: Path) -> None:
    found = report.profile_model("mlp", train, batch_size=8, out=tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert [address for address in page.addresses if not address.startswith("data:image/svg")] == ["trace.json"]
    assert not re.search(r"https?://", re.sub(r'data:[^"]*', "", text))
    rows = {(row[0], row[1]): row for row in page.rows}
    for name, products in (("linear_relu", 784 * 128), ("linear", 128 * 10)):
        assert (rows[name, ""][2], rows[name, ""][5]) == ("1", f"{2 * 8 * products / 1e6:,.1f}")
    assert ("linear_gradients", "backward") in rows if train else all(row[1] != "backward" for row in page.rows)
    shares = [float(row[4].rstrip("%")) for row in page.rows if len(row) == 9 and row[4].endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares) + 0.05)
    flops = 2 * 8 * (784 * 128 + 1280)
    assert found["flops"] > flops if train else found["flops"] == flops
    assert found["batch"] == 8
    assert found["items_per_second"] == pytest.approx(8 / found["seconds"])
    total = sum(row["self_seconds"] for row in found["operations"])
    assert total == pytest.approx(found["profile"]["seconds"])
    json.dumps(found)  # nothing that JSON cannot hold
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_lines_are_the_users_and_the_networks(tmp_path: Path) -> None:
    source = (
        "from tinytorch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(4, 3)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x).relu() if hasattr(x, 'relu') else self.layer(x) < 4\n"
    )
    file = tmp_path / "net_for_report.py"
    file.write_text(source)
    space: dict[str, Any] = {"__name__": "net_for_report"}
    exec(compile(source, str(file), "exec"), space)
    sys.modules["net_for_report"] = type(sys)("net_for_report")
    sys.modules["net_for_report"].__file__ = str(file)
    try:
        work = workloads.of_pictures("net", 2, space["Net"](), (4,), 3)
        measured = report.measure(work, train=False)
        line = next(both for both in report.lines_of(measured) if "forward" in both.name)
        assert line.name == "net_for_report.py:7 Net.forward"
        assert line.source.startswith("return self.layer(x)")
        assert line.seconds == line.forward > 0
        page = report.page(measured, Machine(2, (1e11, 2e11), (1e10, 1e10)), {"trace": "trace.json"})
        assert "&lt; 4" in page  # what stands in a source is no markup
    finally:
        del sys.modules["net_for_report"]


def test_memory_is_watched_while_calls_are_made() -> None:
    class Backend:
        calls = 0

        def memory(self) -> tuple:
            self.calls += 1
            return type("M", (), {"used": self.calls, "peak": 10})

    called: list[int] = []
    xp = Backend()
    found = report.watch_memory(xp, lambda: called.append(1))  # type: ignore[arg-type]
    assert len(found) >= 2
    assert [used for _, used, _ in found] == list(range(1, xp.calls + 1))
    assert called


def test_the_models() -> None:
    assert type(workload("mlp").model) is nn.Sequential
    assert workload("cnn", batch_size=2).forward().shape == (2, 10)
    work = workload("gpt", batch_size=3)
    assert work.forward().shape == (3, 64, 65)
    assert not work.model.training
    before = work.train_step().item()
    assert work.model.training
    assert [work.train_step().item() for _ in range(5)][-1] < before
    assert workload("mlp").inputs[0].tolist() == workload("mlp").inputs[0].tolist()
    for name, batch, wanted in (
        ("nothing", None, "no network 'nothing': name mlp, cnn, gpt"),
        ("mlp", 0, "at least 1"),
    ):
        with pytest.raises(UsageError, match=wanted):
            workload(name, batch_size=batch)


def test_a_language_model_from_its_folder(tmp_path: Path) -> None:
    GPT(GPTConfig(30, 16, 1, 2, 8)).save_pretrained(tmp_path)
    CharTokenizer("abcdefgh ,.\n").save(tmp_path)
    work = workload(str(tmp_path), batch_size=3)
    assert work.forward().shape == (3, 16, 30)  # as long as it can see
    assert work.inputs[0][:, 1:].reshape(-1).tolist() == work.targets.reshape(3, 16)[:, :-1].reshape(-1).tolist()


@pytest.mark.slow
def test_a_network_that_a_milestone_has_trained(tmp_path: Path) -> None:
    cnn.main(["--epochs", "1", "--out", str(tmp_path)])
    work = workload(str(tmp_path))
    assert work.inputs[0].shape == (64, 1, 8, 8)
    assert work.forward().shape == (64, 10)
    assert type(work.optimizer).__name__ == "SGD"
    before = work.train_step().item()
    assert work.train_step().item() != before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["mlp", "--batch", "2", "--out", str(tmp_path), "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["files"]["report"] == str(tmp_path / "report.html")
    assert "examples/s" in output.err
    assert report.main(["nothing"]) == 2
    assert capsys.readouterr().err == (
        "tinytorch: there is no network 'nothing': name mlp, cnn, gpt or the folder of a run\n"
    )
    with pytest.raises(SystemExit) as ended:
        report.main(["mlp", "--batch", "none"])
    assert ended.value.code == 2
    assert "whole number >= 1, not 'none'" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinytorch.profiling", "mlp", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "trace.json"}
