"""The milestone tinygpt: what it learns from, measures and leaves, and that a killed run ends with the same bits."""

from __future__ import annotations

import filecmp
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

import tinytorch
from tinytorch import Trainer, cli, tensor
from tinytorch.datasets import PythonDocs, Shakespeare
from tinytorch.m08_training import read_checkpoint
from tinytorch.m08_training_appendix import read_history
from tinytorch.m11_tokenization import BPETokenizer, CharTokenizer
from tinytorch.m11_tokenization_appendix import load_tokenizer
from tinytorch.m14_transformers import GPT, GPTConfig, next_token_loss
from tinytorch.milestones import tinygpt
from tinytorch.milestones.tinygpt import Recipe, prepare, validation_nats

SMALL = Recipe(
    layers=2, heads=2, width=16, context=16, batch=8, steps=60, rate=1e-2, warmup=5, stretch=20, looked_at=20
)
RESULTS = {"report.json", "history.jsonl", "samples.txt", "curves.png", "attention.png", "last.safetensors",
           "model.safetensors", "config.json", "tokenizer.json"}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinygpt, "RECIPE", SMALL)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of made-up sentences: after two letters of a word its others are certain."""
    draw = random.Random(3)
    words = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett"]
    lines = (" ".join(draw.choices(words, k=draw.randint(2, 6))) for _ in range(400))
    path = tmp_path / "words.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)


def refusal(capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> str:
    """The one line with which the program refuses, before it has left anything."""
    assert tinygpt.main([*map(str, arguments), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tinygpt: ")
    assert captured.err.count("\n") == 1
    assert names(out) == set()
    return captured.err


# -- what it leaves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_it_learns_any_text_and_leaves_a_model_that_writes(
    kind: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "run", ["--vocab", "300"] if kind == "bpe" else []
    assert tinygpt.main(["--text", str(text), "--tokenizer", kind, *options, "--steps", "50", "--out", str(out)]) == 0
    output = capsys.readouterr().out
    report, rows = report_of(out), read_history(out / "history.jsonl")
    assert names(out) == RESULTS
    assert all(imread(out / name)[..., :3].std() > 0.01 for name in RESULTS if name.endswith(".png"))
    assert (report["text"], report["tokenizer"], report["steps"], report["epochs"]) == (str(text), kind, 50, 3)
    assert report["vocab_size"] == (300 if kind == "bpe" else len(set(text.read_text())))
    assert rows[-1] == report["final"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    (check,) = report["checks"]
    assert check["value"] == report["nats_per_character"]
    assert check["most"] == pytest.approx(report["unigram_nats_per_character"], abs=1e-3)

    steps = [line.split()[1] for line in output.splitlines() if line.startswith("step ")]
    assert steps == ["20/50", "40/50", "50/50"]
    assert [row["step"] for row in report["samples"]] == [20, 40, 50]
    printed = "".join("".join(line[4:].split()) for line in output.splitlines() if line.startswith("  |"))
    for row in report["samples"]:
        assert 100 < len(row["text"]) < 200
        assert "".join(row["text"].split()) in printed
    assert 400 < len(report["sample"]) < 800
    written = (out / "samples.txt").read_text(encoding="utf-8")
    assert all(sample in written for sample in (report["sample"], *(row["text"] for row in report["samples"])))
    assert max(len(line.replace(str(tmp_path), "")) for line in output.splitlines()) <= 80

    # The model and the tokenizer in the folder have the loss that the report says.
    model, tokenizer = GPT.from_pretrained(out), load_tokenizer(out)
    content = text.read_text()
    held_out = tokenizer.encode(content[len(content) * 9 // 10 :])
    trainer = Trainer(model, tinytorch.optim.SGD(model.parameters(), lr=1.0), next_token_loss)
    nats = validation_nats(trainer, tensor(held_out), SMALL.context)
    assert nats / (len(held_out) - 1) == pytest.approx(report["validation_loss"], rel=1e-5)
    assert call("generate", str(out), "--prompt", "alpha", "--tokens", "20", "--seed", "1") == 0
    assert capsys.readouterr().out.startswith("alpha")


def test_the_default_is_pythons_documentation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinygpt, "RECIPE", replace(SMALL, steps=240))  # each Python's text is another; some take longer
    assert tinygpt.main(["--steps", "200", "--json", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == report_of(tmp_path)
    assert (report["data"], report["characters"]) == ("docs", len(PythonDocs().text))
    assert "Python's help" in captured.err
    assert max(len(line.replace(str(tmp_path), "")) for line in captured.err.splitlines()) <= 80
    value, most = report["nats_per_character"], report["checks"][0]["most"]
    assert f"guessing by single tokens' frequencies, without what stands before: {most:g}" in captured.err
    line = f"passed: validation loss on Python's help: {value:.3f} nats/char, must be at most {most:g}\n"
    assert captured.err.endswith(line)


def test_all_steps_must_reach_the_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tinygpt.main(["--out", str(tmp_path)]) == 1
    (check,) = report_of(tmp_path)["checks"]
    assert (check["most"], check["unit"], report_of(tmp_path)["steps"]) == (1.40, "nats/char", SMALL.steps)
    value = check["value"]
    assert capsys.readouterr().err == (
        f"FAILED: validation loss on Python's help: {value:.3f} nats/char, must be at most 1.4: "
        f"{value - 1.4:.3f} above\n"
    )


def test_a_network_for_pictures_is_not_looked_for_here(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tinygpt.main(["--text", str(text), "--steps", "5", "--out", str(tmp_path / "tinygpt")])
    capsys.readouterr()
    assert call("predict", str(tmp_path / "tinygpt"), "a.png") == 2
    assert "not a network that reads pictures" in capsys.readouterr().err
    assert call("predict", str(tmp_path / "cnn"), "a.png") == 2
    assert "train one: tinytorch milestone run cnn" in capsys.readouterr().err


def test_it_runs_on_every_device(device: str, text: Path, tmp_path: Path) -> None:
    assert tinygpt.main(["--text", str(text), "--steps", "30", "--out", str(tmp_path / "run")]) == 0
    assert report_of(tmp_path / "run")["device"] == device


# -- what it measures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [17, 33, 40, 48, 49, 200])
def test_the_loss_is_that_of_every_token_but_the_first(length: int) -> None:
    tinytorch.manual_seed(5)
    model, context = GPT(GPTConfig(11, 16, 1, 2, 8)), 16
    model.tokens.weight.data[...] *= 50  # not of one opinion
    ids = tinytorch.randint(11, (length,))
    wanted = 0.0
    for start in range(0, length - 1, context):
        inputs, targets = ids[start : start + context][: length - 1 - start], ids[start + 1 : start + context + 1]
        with tinytorch.no_grad():
            scores = model(inputs.unsqueeze(0))[0].numpy().astype(np.float64)
        wanted += (np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(scores)), targets.numpy()]).sum()
    trainer = Trainer(model, tinytorch.optim.SGD(model.parameters(), lr=1.0), next_token_loss)
    assert validation_nats(trainer, ids, context) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_text_is_cut_and_counted(kind: str) -> None:
    draw = random.Random(4)
    text = "".join(draw.choices("aab é\n日", k=3000)) + "z"
    material = prepare("a text", text, kind, 300, 16)
    training, held_out = text[:2700], text[2700:]
    tokenizer, first, ids = material.tokenizer, material.training.tolist(), material.validation.tolist()
    assert (tokenizer.decode(first), tokenizer.decode(ids), material.held_out) == (training, held_out, held_out)
    if kind == "char":
        assert "".join(tokenizer.characters) == "".join(sorted(set(text)))
    else:
        assert tokenizer.merges == BPETokenizer.train(training, 300).merges
    content = b"".join(tokenizer.token_bytes(id) for id in ids[1:])
    assert material.bytes == len(content)
    assert material.characters == len(content.decode("utf-8", "ignore"))
    assert material.per_token == material.characters / (len(ids) - 1)
    counts = Counter(first)
    shares = [(counts[id] + 1) / (len(first) + tokenizer.vocab_size) for id in ids[1:]]
    assert material.unigram == pytest.approx(-np.log(shares).mean())


def test_losses_of_characters_and_of_tokens_are_in_the_same_units(text: Path, tmp_path: Path) -> None:
    tinygpt.main(["--text", str(text), "--tokenizer", "bpe", "--steps", "5", "--out", str(tmp_path / "bpe")])
    report, content = report_of(tmp_path / "bpe"), text.read_text()
    held_out = len(content) - len(content) * 9 // 10
    assert report["bits_per_byte"] == pytest.approx(report["nats_per_character"] / math.log(2))  # one byte a character
    tokens = len(load_tokenizer(tmp_path / "bpe").encode(content[-held_out:]))
    total = report["validation_loss"] * (tokens - 1)
    assert report["nats_per_character"] == pytest.approx(total / held_out, rel=0.01)
    assert report["unigram_loss"] / report["unigram_nats_per_character"] == pytest.approx(held_out / tokens, rel=0.01)


def test_attention_maps_are_what_the_heads_compute() -> None:
    tinytorch.manual_seed(6)
    model = GPT(GPTConfig(11, 16, 3, 2, 8))
    ids = [3, 1, 4, 1, 5]
    maps = [x.numpy() for x in tinygpt.attention_maps(model, ids)]
    assert [x.shape for x in maps] == [(2, 5, 5)] * 3
    block = model.blocks[0]
    with tinytorch.no_grad():
        stream = model.tokens(tensor([ids])) + model.positions.weight[:5]
        query, key, _ = (x.numpy()[0].astype(np.float64) for x in block.attention.heads(block.norm1(stream)))
    scores = np.where(np.tril(np.ones((5, 5))), np.exp(query @ key.transpose(0, 2, 1) / 2), 0)
    assert np.allclose(maps[0], scores / scores.sum(-1, keepdims=True), atol=1e-6)


def test_the_learning_rate_rises_and_falls_and_only_matrices_shrink() -> None:
    recipe = Recipe()
    model = recipe.network(65)
    assert sum(p.numel() for p in model.parameters()) == 809_856
    optimizer, schedule = recipe.optimize(model, 2000)
    rates = []
    for _ in range(2000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(recipe.rate / 101)
    assert rates[100] == max(rates) == pytest.approx(recipe.rate)
    assert rates[1050] == pytest.approx(0.55 * recipe.rate)
    assert rates[-1] == pytest.approx(0.1 * recipe.rate, rel=1e-3)
    assert np.all(np.diff(rates[:101]) > 0)
    assert np.all(np.diff(rates[100:]) < 0)
    decayed, others = ([p.ndim for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert (set(decayed), set(others)) == ({2}, {1})
    for steps in (1, 2, 11):  # also where there is no room for a warm-up
        optimizer, schedule = replace(recipe, layers=1).optimize(model, steps)
        for _ in range(steps):
            assert 0 < optimizer.param_groups[0]["lr"] <= recipe.rate
            optimizer.step()
            schedule.step()


# -- resuming ----------------------------------------------------------------------------------------------------------


def stopped_run(root: Path, after: str, number: int, *arguments: str) -> tuple[int, str]:
    """Run the program in a process and send it a signal at the first line that begins with `after`."""
    code = f"""
import sys
from tinytorch import cli
from tinytorch.milestones import tinygpt
tinygpt.RECIPE = tinygpt.{SMALL!r}
cli.main(["milestone", "run", "tinygpt", *sys.argv[1:]])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(after):
            process.send_signal(number)
            break
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
@pytest.mark.skipif(os.name == "nt", reason="signals differ on Windows")
def test_a_killed_run_is_resumed_and_ends_with_the_same_bits(
    name: str, root: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--text", str(text), "--steps", "210", "--seed", "4"]
    assert tinygpt.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    out = tmp_path / "a folder"
    number = getattr(signal, name)
    status, errors = stopped_run(root, "step 60/", number, *arguments, "--out", str(out))
    if name == "SIGINT":
        assert status == 130
        command = f"tinytorch milestone run tinygpt --text {text} --steps 210 --seed 4 --out '{out}' --resume"
        assert errors.strip().splitlines()[0].endswith(f"to go on: {command}")
    else:
        assert status == -number
    assert not names(out) & RESULTS

    assert tinygpt.main([*arguments, "--out", str(out), "--tokenizer", "bpe", "--resume"]) == 2
    assert f"was begun with --text {text} --tokenizer char --steps 210 --seed 4; resume" in capsys.readouterr().err
    content = text.read_text()
    text.write_text(content.replace("alpha", "aplha"))
    assert tinygpt.main([*arguments, "--out", str(out), "--resume"]) == 2
    assert "was learning has changed since it was begun" in capsys.readouterr().err
    text.write_text(content)

    assert tinygpt.main([*arguments, "--out", str(out), "--resume"]) == 0
    step = report_of(out)["resumed_after_step"]
    assert step % 20 == 0
    assert 40 <= step < 210
    assert f"going on after step {step}\n" in capsys.readouterr().out
    assert names(out) == RESULTS
    for file in ("last.safetensors", "model.safetensors", "history.jsonl", "samples.txt", "tokenizer.json"):
        assert filecmp.cmp(out / file, tmp_path / "whole" / file, shallow=False), file
    assert len(read_history(out / "history.jsonl")) == 11


def test_a_run_saved_in_the_middle_of_a_stretch_goes_on_there(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--text", str(text), "--steps", "50"]
    tinygpt.main([*arguments, "--out", str(tmp_path / "whole")])

    class Checkpointing(tinygpt.Checkpointing):
        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.step == 47:  # in the last stretch, which is shorter
                self._save(trainer)
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tinygpt, "Checkpointing", Checkpointing)
        with pytest.raises(KeyboardInterrupt):
            tinygpt.main([*arguments, "--out", str(tmp_path / "run")])
    state = read_checkpoint(tmp_path / "run" / "unfinished")
    assert state["progress"] == {"epoch": 2, "batch": 7, "step": 47}
    assert tinygpt.main([*arguments, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert report_of(tmp_path / "run")["steps"] == 50
    for file in ("last.safetensors", "model.safetensors", "samples.txt"):
        assert filecmp.cmp(tmp_path / "run" / file, tmp_path / "whole" / file, shallow=False), file


# -- refusing ----------------------------------------------------------------------------------------------------------


def test_texts_that_cannot_be_learned_are_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert f"there is no file {tmp_path / 'none'}" in refusal(capsys, out, "--text", tmp_path / "none")
    assert "there is no file" in refusal(capsys, out, "--text", tmp_path)
    bad = tmp_path / "latin.txt"
    bad.write_bytes(b"a line\nna\xefve " * 100)
    message = refusal(capsys, out, "--text", bad)
    assert f"--text: {bad}: not utf-8: byte 9, in line 2, is 0xef" in message
    assert message.endswith("; save it as UTF-8\n")
    bad.write_text("short " * 20)
    assert "latin.txt is too short: its last tenth, for validation, is 12 tokens" in refusal(capsys, out, "--text", bad)
    bad.write_text("")
    assert "is 0 tokens, and must be more than the 16" in refusal(capsys, out, "--text", bad)
    assert "--vocab is for --tokenizer bpe" in refusal(capsys, out, "--text", text, "--vocab", 300)
    assert "--root is where --data shakespeare lies" in refusal(capsys, out, "--root", tmp_path)
    assert "--root is where --data shakespeare lies" in refusal(capsys, out, "--text", text, "--root", tmp_path)


def test_shakespeare_is_read_where_it_lies(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYTORCH_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(Shakespeare, "mirrors", ("http://127.0.0.1:9/",))
    chosen = ["--data", "shakespeare", "--root", tmp_path / "data"]
    assert f"put it into {tmp_path / 'data'}" in refusal(capsys, tmp_path / "out", *chosen)
    (tmp_path / "data").mkdir()
    text.rename(tmp_path / "data" / "input.txt")
    assert "another text" in refusal(capsys, tmp_path / "out", *chosen)
    content = (tmp_path / "data" / "input.txt").read_bytes()
    monkeypatch.setattr(
        Shakespeare, "source", Shakespeare.source._replace(checksum=f"sha256:{sha256(content).hexdigest()}")
    )
    assert tinygpt.main([*map(str, chosen), "--out", str(tmp_path / "out")]) == 0  # these words are no plays
    report = report_of(tmp_path / "out")
    assert (report["data"], report["characters"], report["checks"][0]["most"]) == ("shakespeare", len(content), 1.88)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--epochs", "3"], "--epochs"),
        (["--steps", "0"], "expected a whole number >= 1, not '0'"),
        (["--data", "docs", "--text", "a.txt"], "not allowed with"),
        (["--data", "bible"], "'bible'"),
        (["--vocab", "256"], "expected a whole number >= 257"),
        (["--tokenizer", "words"], "'words'"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments: list, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tinygpt.main(arguments)
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert wanted in errors
    assert errors.count("\n") == 1


def test_a_mark_of_the_byte_order_is_no_character(text: Path, tmp_path: Path) -> None:
    text.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    tinygpt.main(["--text", str(text), "--steps", "1", "--out", str(tmp_path / "run")])
    tokenizer = load_tokenizer(tmp_path / "run")
    assert isinstance(tokenizer, CharTokenizer)
    assert "\ufeff" not in tokenizer.characters


def test_any_text_in_one_line_of_signs_from_everywhere_works(tmp_path: Path) -> None:
    path = tmp_path / "文.txt"
    path.write_text("".join(random.Random(7).choices("日本語かな\U0001f642العربية$ \x00", k=900)), encoding="utf-8")
    for kind in ("char", "bpe"):
        arguments = ["--text", str(path), "--tokenizer", kind, "--steps", "1", "--out", str(tmp_path / "run")]
        assert tinygpt.main(arguments) in (0, 1)
        assert names(tmp_path / "run") == RESULTS
