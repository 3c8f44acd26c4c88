"""`tinytorch quantize`: what it writes can be used, what it says was measured, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tinytorch
from tests.milestones.test_predict import seven
from tinytorch import cli
from tinytorch.m04_layers_appendix import save
from tinytorch.m11_tokenization import CharTokenizer
from tinytorch.milestones import cnn, mlp
from tinytorch.milestones.generate import load_writer
from tinytorch.milestones.predict import load_reader, predict_pictures
from tinytorch.milestones.program import UsageError
from tinytorch.milestones.quantize import measure_latency, quantize_run
from tinytorch.milestones.quantized import FILE, read_quantized


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: pictures, and a model of letters that was not trained."""
    runs = tmp_path_factory.mktemp("runs")
    cnn.main(["--epochs", "3", "--out", str(runs / "cnn")])
    mlp.main(["--epochs", "1", "--out", str(runs / "mlp")])
    text = "the cat sat on the mat; " * 40
    (runs / "text.txt").write_text(text)
    tokenizer = CharTokenizer.train(text)
    model: Any = tinytorch.GPT(tinytorch.GPTConfig(tokenizer.vocab_size, 16, 2, 2, 64))
    model.save_pretrained(runs / "gpt")
    tokenizer.save(runs / "gpt")
    (runs / "gpt" / "report.json").write_text(json.dumps({"text": str(runs / "text.txt")}))
    return runs


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinytorch.milestones import quantize

    monkeypatch.setattr(
        quantize, "measure_latency", lambda models, inputs: measure_latency(models, inputs, budget=0.01)
    )


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_a_network_that_reads_pictures(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small"
    assert call("quantize", runs / "cnn", "--out", out, "--calibrate", 300, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["int8"]["accuracy"] >= found["float32"]["accuracy"] - 0.01
    assert found["int8"]["bytes"] == (out / FILE).stat().st_size
    assert found["times_smaller"] == pytest.approx(found["float32"]["bytes"] / found["int8"]["bytes"], abs=1e-3)
    assert found["times_smaller"] > 3.5
    assert min(found[kind]["milliseconds"] for kind in ("float32", "int8")) > 0
    small, exact = load_reader(out), load_reader(runs / "cnn")
    assert small.model[0].weight.dtype == "int8"
    picture = seven(tmp_path / "seven.png")
    answers = [next(iter(predict_pictures(f, [picture])[0]["probabilities"])) for f in (runs / "cnn", out)]
    assert answers[0] == answers[1]
    shares = [reader.probabilities(tinytorch.zeros(1, 8, 8)) for reader in (small, exact)]
    assert shares[0] == pytest.approx(shares[1], abs=0.1)
    assert call("predict", out, picture) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["--int8", "--int4"])
def test_other_networks(runs: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("quantize", runs / "mlp", kind, "--out", tmp_path / "mlp") == 0
    assert f"{kind.lstrip('-')} " in capsys.readouterr().out
    assert load_reader(tmp_path / "mlp").probabilities(tinytorch.zeros(1, 8, 8))
    assert call("quantize", runs / "gpt", kind, "--out", tmp_path / "gpt", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    exact, small = (found[name]["perplexity"] for name in ("float32", kind.lstrip("-")))
    assert small == pytest.approx(exact, rel=0.02)
    assert small != exact  # each was measured
    text = load_writer(tmp_path / "gpt").tokenizer.decode(list(load_writer(tmp_path / "gpt").ids("the", 8, seed=1)))
    assert len(text) == 8
    assert call("generate", tmp_path / "gpt", "--tokens", 5, "--seed", 1) == 0


@pytest.mark.slow
def test_the_run_has_a_neighbour_if_no_folder_is_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("quantize", runs / "mlp") == 0
    assert (runs / "mlp-int8" / FILE).is_file()
    assert call("quantize", runs / "mlp-int8") == 2
    assert "is quantized already" in capsys.readouterr().err


@pytest.mark.slow
def test_what_it_refuses(runs: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((runs / "nowhere",), "holds no trained network"),
        ((runs / "mlp", runs / "mlp"), "is the run itself"),
        ((runs / "gpt", None, 8, 100), "--calibrate is for int8 pictures"),
        ((runs / "mlp", None, 4, 100), "--calibrate is for int8 pictures"),
        ((runs / "mlp", None, 8, 100, tmp_path), "--root"),
    ):
        with pytest.raises(UsageError, match=words):
            quantize_run(*arguments)
    (tmp_path / "gpt").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "gpt" / name).write_bytes((runs / "gpt" / name).read_bytes())
    for words in ("has no report.json", "names no text that it learned"):
        with pytest.raises(UsageError, match=words):
            quantize_run(tmp_path / "gpt")
        (tmp_path / "gpt" / "report.json").write_text("{}")
    (tmp_path / FILE).write_bytes(b"no")
    with pytest.raises(UsageError, match="not a safetensors file"):
        load_reader(tmp_path)
    save({"x": tinytorch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(UsageError, match="was not written by tinytorch quantize"):
        read_quantized(tmp_path)
    save({"x": tinytorch.zeros(1)}, tmp_path / FILE, {"tinytorch.network": "{}"})
    with pytest.raises(UsageError, match="not a network that reads pictures"):
        load_reader(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="that is no language model"):
        load_writer(tmp_path)
