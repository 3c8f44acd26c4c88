"""After module 11: turn any text into numbers and back, and share the tokenizer with other libraries."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tinytorch.m10_dataloader import DataLoader
from tinytorch.m10_dataloader_appendix import PythonDocs
from tinytorch.m11_tokenization import BPETokenizer, CharTokenizer, TokenWindows
from tinytorch.m11_tokenization_appendix import load_tokenizer

ANYTHING = "Größe, 尺寸, \U0001f600!\n\tif x <= 10:  # ยินดี\x00 <|end|>"


@pytest.fixture(scope="module")
def text() -> str:
    return PythonDocs().text[:200_000]


def test_a_vocabulary_is_learned_and_shared(text: str, tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train(text, 1000, ["<|end|>"])
    assert tokenizer.vocab_size == 1000
    ids = tokenizer.encode(text)
    assert len(text.encode()) / len(ids) > 2.5  # bytes a token
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(ANYTHING)) == ANYTHING
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(text[:5000] + ANYTHING, "all") == tokenizer.encode(text[:5000] + ANYTHING, "all")
    assert json.loads((tmp_path / "tokenizer.json").read_bytes())["model"]["type"] == "BPE"


def test_text_is_shown_as_it_is_made(text: str) -> None:
    for tokenizer in (CharTokenizer.train(text + ANYTHING), BPETokenizer.train(text, 300)):
        stream, shown = tokenizer.stream(), []
        for id in tokenizer.encode(ANYTHING):
            shown.append(stream.feed(id))
            assert ANYTHING.startswith("".join(shown))
        assert "".join(shown) + stream.finish() == ANYTHING


def test_a_text_is_read_in_windows(text: str) -> None:
    tokenizer = CharTokenizer.train(text)
    data = TokenWindows(tokenizer.encode(text), 64)
    inputs, targets = next(iter(DataLoader(data, 12, shuffle=True, seed=1)))
    assert inputs.shape == targets.shape == (12, 64)
    for row, following in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert tokenizer.decode(row) in text
        assert tokenizer.decode([row[0], *following]) in text


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CharTokenizer("ab").save(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        CharTokenizer("abc").save(tmp_path)
    monkeypatch.undo()
    assert load_tokenizer(tmp_path).vocab_size == 2
    assert os.listdir(tmp_path) == ["tokenizer.json"]
