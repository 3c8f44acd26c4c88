"""`tinytorch generate`: what it writes and when, which text the same seed gives, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tinytorch
from tinytorch import cli
from tinytorch.m11_tokenization import BPETokenizer, CharTokenizer, Tokenizer
from tinytorch.m14_transformers import GPT, GPTConfig, llama_config
from tinytorch.milestones import generate as generating
from tinytorch.milestones.generate import load_writer

SIZES: dict[str, Any] = {"context_length": 12, "num_layers": 1, "num_heads": 2, "embed_dim": 8}


def save_run(folder: Path, tokenizer: Tokenizer, config: GPTConfig | None = None, **entries: Any) -> GPT:
    """Leave a model that was not trained, but has opinions, in a folder."""
    tinytorch.manual_seed(2)
    model: Any = GPT(config or GPTConfig(tokenizer.vocab_size, **SIZES))
    for weight in {id(p): p for p in (model.tokens.weight, *(model.head.parameters() if model.head else ()))}.values():
        weight.data[...] *= 40
    model.save_pretrained(folder, **entries)
    tokenizer.save(folder)
    return model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a model of a few characters."""
    save_run(tmp_path / "run", CharTokenizer("abcdefgh ,.\né\U0001f642"))
    return tmp_path / "run"


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", *map(str, arguments)])
    return int(ended.value.code or 0)


def written(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The text that a call prints; nothing else happens."""
    assert call(*arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a call is refused."""
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tinytorch: ")
    assert captured.err.count("\n") == 1
    return captured.err


def started(root: Path, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tinytorch", "generate", *map(str, arguments)], cwd=root, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        preexec_fn=None if os.name == "nt" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


# -- what it writes ----------------------------------------------------------------------------------------------------


def test_it_writes_what_the_model_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = load_writer(run)
    ids = writer.tokenizer.encode("bad cafe")
    choices = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.3}
    options = [word for name, value in choices.items() for word in (f"--{name.replace('_', '-')}", value)]
    wanted = writer.tokenizer.decode(writer.model.generate(ids, 40, seed=3, **choices))
    found = written(capsys, run, "--prompt", "bad cafe", "--tokens", "40", "--seed", "3", *options)
    assert found.removesuffix("\n") == wanted.removesuffix("\n")
    assert found.endswith("\n")
    defaults = writer.tokenizer.decode(writer.model.generate(ids, 300, temperature=0.8, seed=3))
    assert written(capsys, run, "--prompt", "bad cafe", "--seed", "3").rstrip("\n") == defaults.rstrip("\n")


def test_the_same_seed_writes_the_same_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [written(capsys, run, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    chosen = []
    for _ in range(2):
        assert call(run) == 0
        captured = capsys.readouterr()
        chosen.append(captured.err.removeprefix("seed ").strip())
        assert written(capsys, run, "--seed", chosen[-1]) == captured.out
    assert chosen[0] != chosen[1]


def test_json_says_all_of_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--seed", 5], []):
        found = json.loads(written(capsys, run, "--prompt", "a", "--tokens", 30, "--json", *options))
        assert list(found) == ["prompt", "text", "tokens", "seed", "tokens_per_second"]
        assert (found["prompt"], found["tokens"], len(found["text"])) == ("a", 30, 30)
        assert found["tokens_per_second"] > 1
        text = written(capsys, run, "--prompt", "a", "--tokens", 30, "--seed", found["seed"])
        assert text.rstrip("\n") == f"a{found['text']}".rstrip("\n")


def test_an_empty_prompt_begins_behind_a_newline_or_the_end_of_a_text(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = load_writer(run)
    wanted = writer.model.generate(writer.tokenizer.encode("\n"), 20, temperature=0)[1:]
    assert written(capsys, run, "--tokens", 20, "--temperature", 0, "--seed", 0).rstrip(
        "\n"
    ) == writer.tokenizer.decode(wanted).rstrip("\n")
    tokenizer = BPETokenizer.train("some text, some more text", 260, ["<|endoftext|>"])
    for folder, first, kind in (
        ("marked", [tokenizer.special_tokens["<|endoftext|>"]], tokenizer),
        ("bytes", tokenizer.encode("\n"), BPETokenizer(tokenizer.merges)),
        ("no newline", [0], CharTokenizer("abc")),
    ):
        save_run(tmp_path / folder, kind)
        writer = load_writer(tmp_path / folder)
        assert writer.encode("") == first
        assert writer.encode("a") == kind.encode("a")


def test_a_prompt_may_be_longer_than_the_context(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "abcdefgh ,." * 20
    found = written(capsys, run, "--prompt", long, "--tokens", 5, "--temperature", 0, "--seed", 0)
    last = written(capsys, run, "--prompt", long[-12:], "--tokens", 5, "--temperature", 0, "--seed", 0)
    assert found.startswith(long)
    assert found[len(long) :] == last[12:]


def test_a_dash_reads_the_prompt_from_standard_input(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in ("é\U0001f642 a\n", ""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode()), encoding="latin-1"))
        found = written(capsys, run, "--prompt", "-", "--seed", 1)
        assert found == written(capsys, run, "--prompt", content, "--seed", 1)
        assert found.startswith(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert "what came in is not UTF-8, at byte 2" in refusal(capsys, run, "--prompt", "-")


def test_half_characters_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = BPETokenizer.train("日本語 \U0001f642 日本 \U0001f642\U0001f642", 262)
    save_run(tmp_path, tokenizer)
    writer = load_writer(tmp_path)
    ids = [*tokenizer.encode("\U0001f642日本"), *tokenizer.encode("é")[:1]]
    pieces = list(writer.decoded(ids))
    assert len(pieces) == len(ids) + 1
    assert "".join(pieces) == "\U0001f642日本\ufffd"
    assert all(piece == "" or piece.isprintable() for piece in pieces)
    made = writer.model.generate(tokenizer.encode("日"), 100, seed=1, temperature=0.8)
    found = written(capsys, tmp_path, "--prompt", "日", "--tokens", 100, "--seed", 1)
    assert found.rstrip("\n") == tokenizer.decode(made).rstrip("\n")


def test_published_models_begin_and_end_as_theirs_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = BPETokenizer.train("some text, some more text", 262, ["<s>", "</s>", "<eot>"])
    begin, *ends = (tokenizer.special_tokens[name] for name in ("<s>", "</s>", "<eot>"))
    llama = llama_config(tokenizer.vocab_size, **SIZES)
    for folder, config, wanted in (("llama", llama, [begin]), ("gpt2", None, [])):
        save_run(tmp_path / folder, tokenizer, config, bos_token_id=begin, eos_token_id=ends)
        assert load_writer(tmp_path / folder).encode("text") == [*wanted, *tokenizer.encode("text")]
        assert load_writer(tmp_path / folder).stops == set(ends)
    assert load_writer(tmp_path / "llama").encode("") == [begin]
    made = load_writer(tmp_path / "llama").model.generate(
        [begin, *tokenizer.encode("text")], 300, seed=1, stop_tokens=ends
    )
    assert made[-1] in ends  # else this seed shows nothing
    options = (tmp_path / "llama", "--prompt", "text", "--temperature", 1, "--seed", 1)
    assert written(capsys, *options).rstrip("\n") == tokenizer.decode(made[1:-1]).rstrip("\n")
    assert json.loads(written(capsys, *options, "--json"))["tokens"] == len(made) - 2 - len(tokenizer.encode("text"))


def test_a_padded_vocabulary_writes_signs_for_what_has_no_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path, CharTokenizer("ab\n"), GPTConfig(64, **SIZES))
    found = json.loads(written(capsys, tmp_path, "--tokens", 50, "--seed", 1, "--json"))
    assert len(found["text"]) == found["tokens"] == 50
    assert set(found["text"]) - set("ab\n") == {"\ufffd"}


# -- when it writes it -------------------------------------------------------------------------------------------------


class Watched(io.StringIO):
    """Keeps what has been flushed."""

    seen = ""

    def flush(self) -> None:
        self.seen = self.getvalue()


@pytest.mark.parametrize(("last", "end"), [("c", "\n"), ("\n", ""), ("", "\n")])
def test_each_piece_is_seen_before_the_next_is_made(last: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, before = Watched(), []

    def pieces() -> Iterator[str]:
        for piece in ("a", "", "b", last):
            before.append(watched.seen)
            yield piece

    monkeypatch.setattr(sys, "stdout", watched)
    generating.print_pieces(pieces())
    assert before == ["", "a", "a", "ab"]
    assert watched.seen == f"ab{last}{end}"


def test_an_interruption_ends_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces() -> Iterator[str]:
        yield "abc"
        raise KeyboardInterrupt

    watched = Watched()
    monkeypatch.setattr(sys, "stdout", watched)
    with pytest.raises(KeyboardInterrupt):
        generating.print_pieces(pieces())
    assert watched.seen == "abc\n"


@pytest.mark.skipif(os.name == "nt", reason="signals differ on Windows")
def test_ctrl_c_ends_it_with_130(run: Path, root: Path) -> None:
    process = started(root, run, "--prompt", "a", "--tokens", 10_000_000, "--seed", 1)
    assert process.stdout is not None
    first = process.stdout.read(20)
    assert len(first) == 20  # it is there long before the end
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + rest).endswith(b"\n")
    assert errors == b"tinytorch: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="pipes differ on Windows")
def test_a_closed_pipe_ends_it_quietly(run: Path, root: Path) -> None:
    process = started(root, run, "--prompt", "a", "--tokens", 10_000_000, "--seed", 1)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(5)[:1] == b"a"
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


def test_what_a_terminal_cannot_show_becomes_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii", newline="\n"))
    generating.print_pieces(iter(["a", "é", "b"]))
    assert content.getvalue() == b"a?b\n"


# -- what it refuses ---------------------------------------------------------------------------------------------------


def test_folders_without_a_model_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, tmp_path / "another")
    assert f"another holds no language model (config.json, model.safetensors); there is one in {run}" in message
    assert "train one: tinytorch milestone run tinygpt" in refusal(capsys, tmp_path / "a" / "b")
    (tmp_path / "begun" / "unfinished").mkdir(parents=True)
    assert "its run is not finished: go on with" in refusal(capsys, tmp_path / "begun")
    content = {name: (run / name).read_bytes() for name in ("tokenizer.json", "model.safetensors", "config.json")}
    for name, reason in (
        ("tokenizer.json", "holds no tokenizer.json"),
        ("model.safetensors", "lacks model.safetensors"),
        ("config.json", "holds no language model"),
    ):
        (run / name).unlink()
        assert reason in refusal(capsys, run)
        (run / name).write_bytes(content[name])
    for name in content:
        (run / name).write_bytes(content[name][:50])
        assert str(run) in refusal(capsys, run)
        (run / name).write_bytes(content[name])
    assert call(run, "--tokens", 1) == 0


def test_prompts_and_choices_are_checked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, run, "--prompt", "xyz é")
    assert (
        "--prompt: CharTokenizer: the text has 'x', 'y', 'z', which the vocabulary lacks; its 14 characters" in message
    )
    assert r"'\udcff'" in refusal(capsys, run, "--prompt", "\udcff")
    assert "top_p must be above 0 and at most 1, got 0.0" in refusal(capsys, run, "--top-p", "0")
    assert "repetition_penalty must be above 0, got -1.0" in refusal(capsys, run, "--repetition-penalty", "-1")
    assert "--temperature" in refusal(capsys, run, "--temperature", "nan")
    assert "temperature must be >= 0, got inf" in refusal(capsys, run, "--temperature", "inf")
    assert "--top-k" in refusal(capsys, run, "--top-k", "0")
    assert "--seed" in refusal(capsys, run, "--seed", "-1")
    assert "--device cuda:99: " in refusal(capsys, run, "--device", "cuda:99")
    save_run(tmp_path / "small", CharTokenizer("abc"), GPTConfig(2, **SIZES))
    message = refusal(capsys, tmp_path / "small", "--prompt", "c")
    assert "the tokenizer has 3 tokens, the model 2: they do not belong together" in message


def test_it_writes_on_every_device(device: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = written(capsys, run, "--prompt", "a", "--tokens", 10, "--temperature", 0, "--seed", 0)
    tinytorch.set_default_device("cpu")
    assert text == written(capsys, run, "--prompt", "a", "--tokens", 10, "--temperature", 0, "--seed", 0)
