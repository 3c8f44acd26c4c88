"""Module 11, appendix: files of tokenizers, and what is refused of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinytorch.m11_tokenization import PATTERNS, SIGNS, BPETokenizer, CharTokenizer, Tokenizer
from tinytorch.m11_tokenization_appendix import load_tokenizer, mergeable_ranks, save_vocabulary, unlike

TEXT = "the cat and the hat, 1234 naïve <|end|> \U0001f600\n" * 5
O200K = (  # of GPT-4o
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "characters": lambda: CharTokenizer.train(TEXT),
    "no characters": lambda: CharTokenizer(""),
    "bytes": lambda: BPETokenizer([]),
    "gpt2": lambda: BPETokenizer.train(TEXT, 280, ["<|end|>", "<|\u00fc|>"]),
    "gpt4": lambda: BPETokenizer.train(TEXT, 280, ["<|end|>"], "gpt4"),
    "a pattern": lambda: BPETokenizer.train(TEXT, 280, pattern=O200K),
    "not cut": lambda: BPETokenizer.train(TEXT, 280, pattern="none"),
    "options": lambda: BPETokenizer(
        [(64, 65)], {"<a>": 400, "<b>": 300}, always=["<b>"], ignore_merges=True, add_prefix_space=True
    ),
}
each = pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)


def refused(path: Path, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as found:
        load_tokenizer(path)
    message = str(found.value)
    assert "\n" not in message
    assert message.startswith("load_tokenizer: ")
    assert str(path) in message
    return message


# -- ours --------------------------------------------------------------------------------------------------------------


@each
def test_a_saved_tokenizer_comes_back(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.save(tmp_path / "new" / "folder")
    tokenizer.save(tmp_path / "file.json")
    for path in (tmp_path / "new" / "folder", tmp_path / "file.json", str(tmp_path / "file.json")):
        again = load_tokenizer(path)
        assert type(again) is type(tokenizer)
        assert again.vocab_size == tokenizer.vocab_size
        assert again.to_json() == tokenizer.to_json()
        if isinstance(again, BPETokenizer) and isinstance(tokenizer, BPETokenizer):
            assert again.encode(TEXT, "all") == tokenizer.encode(TEXT, "all")
            assert again.encode(TEXT + "<b>") == tokenizer.encode(TEXT + "<b>")
            assert (again.merges, again.pattern) == (tokenizer.merges, tokenizer.pattern)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["tokenizer.json"]


def test_a_post_processor_is_kept(tmp_path: Path) -> None:
    tokenizer = BPETokenizer([], ["<s>"])
    tokenizer.post_processor = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).to_json()["post_processor"] == tokenizer.post_processor


def test_gpt2s_pair_of_files(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train(TEXT, 280, ["<|end|>"])
    save_vocabulary(tokenizer, tmp_path / "new")
    lines = (tmp_path / "new" / "merges.txt").read_text(encoding="utf-8").split("\n")
    assert lines[0] == "#version: 0.2"
    assert len(lines) == len(tokenizer.merges) + 2
    assert lines[-1] == ""
    for path in (tmp_path / "new", tmp_path / "new" / "vocab.json", tmp_path / "new" / "merges.txt"):
        again = load_tokenizer(path)
        assert again.to_json() == tokenizer.to_json()
    tokenizer.save(tmp_path / "new")
    (tmp_path / "new" / "vocab.json").write_text("{}")
    assert load_tokenizer(tmp_path / "new").to_json() == tokenizer.to_json()  # the whole file goes first


def test_merges_of_number_signs_and_windows_line_ends(tmp_path: Path) -> None:
    sign = BPETokenizer([]).encode("#")[0]
    tokenizer = BPETokenizer([(sign, sign), (256, sign)])
    save_vocabulary(tokenizer, tmp_path)
    merges = tmp_path / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert load_tokenizer(tmp_path).encode("###") == [257]


def test_what_gpt2s_files_cannot_say(tmp_path: Path) -> None:
    for tokenizer, text in (
        (TOKENIZERS["gpt4"](), "pattern 'gpt4'"),
        (TOKENIZERS["options"](), "ignore_merges True, add_prefix_space True"),
    ):
        with pytest.raises(ValueError, match=rf"cannot say {text}; use save\(path\)"):
            save_vocabulary(tokenizer, tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_ranks_for_tiktoken() -> None:
    tokenizer = BPETokenizer([(64, 65)], {"<a>": 400})
    ranks = mergeable_ranks(tokenizer)
    assert len(ranks) == 257
    assert (ranks[b"!"], ranks[b"ab"]) == (0, 256)


# -- what is missing ---------------------------------------------------------------------------------------------------


def test_missing_files_are_named(tmp_path: Path) -> None:
    message = refused(tmp_path, FileNotFoundError)
    assert "holds no tokenizer.json, nor vocab.json and merges.txt; what is needed is the first, or both" in message
    (tmp_path / "vocab.json").write_text("{}")
    assert "holds no tokenizer.json, nor merges.txt;" in refused(tmp_path, FileNotFoundError)
    with pytest.raises(FileNotFoundError, match=r"nor merges.txt;"):
        load_tokenizer(tmp_path / "vocab.json")
    assert "there is no" in refused(tmp_path / "other.json", FileNotFoundError)


def changed(change: Callable[[dict[str, Any]], Any], path: Path, tokenizer: str = "gpt4") -> str:
    """The error for the file of a tokenizer after a change of its content."""
    data = TOKENIZERS[tokenizer]().to_json()
    change(data)
    file = path / "tokenizer.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^load_tokenizer: .*tokenizer\.json: ") as found:
        load_tokenizer(path)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_damaged_files(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    whole = json.dumps(TOKENIZERS["gpt4"]().to_json()).encode()
    for content, text in (
        (b"", "this is no JSON, or only a part of it"),
        (whole[:-30], "this is no JSON, or only a part of it"),
        (b"\xff\xfe\x00", "this is no JSON"),
        (b"[1]", "the file should be a JSON object, and is [1]"),
        (b'{"a": 1}', "model, pre_tokenizer, decoder missing: this is no tokenizer.json"),
    ):
        file.write_bytes(content)
        assert text in refused(file)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("model.vocab", "the model lacks vocab"),
        ("model.merges", "the model lacks merges"),
        ("model", "model missing"),
        ("decoder", "decoder missing"),
        ("model.vocab.Ġ", "the vocabulary lacks 1 of the 256 bytes: [32]"),
        ("model.vocab.he", "1 tokens of the merges are missing in the vocabulary: 'he'"),
    ],
)
def test_missing_parts_are_named(path: str, text: str, tmp_path: Path) -> None:
    *parents, name = path.split(".")

    def remove(data: Any) -> None:
        for parent in parents:
            data = data[parent]
        data.pop(name)

    data = TOKENIZERS["gpt4"]().to_json()
    if path == "model.vocab.Ġ":  # in no merge
        data["model"]["merges"] = []
    if path == "model.vocab.he":
        data["model"]["merges"] = ["h e"]
    remove(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert text in refused(tmp_path / "tokenizer.json")


def test_many_missing_tokens_are_counted(tmp_path: Path) -> None:
    lines = [["!", sign * 2] for sign in list(SIGNS.values())[:20]]  # neither what is joined is there, nor the result
    message = changed(lambda data: data["model"].update(merges=lines), tmp_path, "bytes")
    assert "40 tokens of the merges are missing in the vocabulary: '!!', '!!!', " in message
    assert message.endswith(" and 30 more")


# -- what cannot be honoured -------------------------------------------------------------------------------------------

SPLIT = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("part", "value", "text"),
    [
        ("normalizer", {"type": "NFC"}, "cannot honour the normalizer 'NFC'"),
        ("truncation", {"max_length": 5}, "cannot honour the truncation"),
        ("padding", {"strategy": "BatchLongest"}, "cannot honour the padding"),
        ("decoder", {"type": "Metaspace"}, "cannot honour the decoder 'Metaspace'"),
        ("pre_tokenizer", None, "cannot honour the pre_tokenizer None"),
        ("pre_tokenizer", {"type": "Metaspace"}, "cannot honour the pre_tokenizer 'Metaspace'"),
        ("pre_tokenizer", {"type": "ByteLevel"}, "the pre_tokenizer 'ByteLevel', with add_prefix_space None"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}, "the pre_tokenizer 'an empty Sequence'"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [DIGITS, LEVEL]}, "the pre_tokenizer 'Digits'"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [SPLIT, DIGITS, LEVEL]}, "pre_tokenizer 'Digits'"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [SPLIT, SPLIT, LEVEL]}, "or one Split before it"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [LEVEL, SPLIT]}, "the pre_tokenizer 'Split'"),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [SPLIT, LEVEL | {"use_regex": True}]},
            "which has use_regex or add_prefix_space after a Split",
        ),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [SPLIT, LEVEL | {"add_prefix_space": True}]},
            "which has use_regex or add_prefix_space after a Split",
        ),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [SPLIT | {"behavior": "Removed"}, LEVEL]},
            "with behavior 'Removed', only 'Isolated'",
        ),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [SPLIT | {"invert": True}, LEVEL]}, "'Split'"),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": r"\p{N}{1,3}+"}}, LEVEL]},
            "for }+ means something else in Python",
        ),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": "a("}}, LEVEL]},
            "no regular expression",
        ),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {}}, LEVEL]}, "pattern of Split"),
        ("added_tokens", [{"id": 279, "content": "<|end|>", "lstrip": True}], "cannot honour lstrip of the added"),
        ("added_tokens", [{"id": 279, "content": "x", "single_word": True}], "cannot honour single_word of"),
        ("added_tokens", [{"content": "x"}], "an added token should have a content and an id"),
        ("added_tokens", [{"id": 5, "content": "x y"}], "'x y' cannot have the id 5, which is taken"),
    ],
)  # fmt: skip
def test_components_are_refused_by_name(part: str, value: Any, text: str, tmp_path: Path) -> None:
    assert text in changed(lambda data: data.update({part: value}), tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("type", "Unigram", "cannot honour the model 'Unigram'"),
        ("type", "WordPiece", "cannot honour the model 'WordPiece'"),
        ("dropout", 0.1, "cannot honour the model's dropout 0.1"),
        ("byte_fallback", True, "cannot honour the model's byte_fallback True"),
        ("continuing_subword_prefix", "##", "continuing_subword_prefix '##'"),
        ("end_of_word_suffix", "</w>", "end_of_word_suffix '</w>'"),
        ("vocab", [1], "the vocabulary should be a JSON object"),
        ("vocab", {"a": -1, "b": "2"}, "ids must be whole numbers >= 0, not -1, '2'"),
        ("vocab", {"a": 1, "b": 1, "c": 2}, "several tokens have one id: 1 ('a', 'b')"),
        ("vocab", {"▁the": 1, "a": 2}, "these tokens are not written in the signs of byte-level BPE: '▁the'"),
        ("merges", ["a b c"], "merge 0 is 'a b c', not two tokens"),
        ("merges", [["a"]], "merge 0 is ['a'], not two tokens"),
        ("merges", ["t h", [1, 2]], "merge 1 is [1, 2], not two tokens"),
        ("merges", 5, "merge 0 is 5, not two tokens"),
    ],
)
def test_models_are_refused_by_option(option: str, value: Any, text: str, tmp_path: Path) -> None:
    assert text in changed(lambda data: data["model"].update({option: value}), tmp_path)


def test_other_models_of_words_are_refused(tmp_path: Path) -> None:
    def update(**parts: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda data: data.update(parts)

    assert "the pre_tokenizer 'Whitespace'" in changed(
        update(pre_tokenizer={"type": "Whitespace"}), tmp_path, "characters"
    )
    assert "the decoder None" in changed(update(decoder=None), tmp_path, "characters")
    assert "the model 'WordLevel'" in changed(lambda data: data["model"]["vocab"].update(z=99), tmp_path, "characters")
    assert "expected single characters" in changed(
        lambda data: data["model"]["vocab"].update(zz=99), tmp_path, "characters"
    )


def test_harmless_options_are_accepted(tmp_path: Path) -> None:
    data = TOKENIZERS["gpt2"]().to_json()
    old = copy.deepcopy(data)
    del old["model"]["type"], old["model"]["byte_fallback"], old["model"]["ignore_merges"], old["padding"]
    old["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": "", "unk_token": "<|end|>"}
    old["model"]["merges"] = [merge.split(" ") for merge in old["model"]["merges"]]
    old["decoder"] = None
    del old["pre_tokenizer"]["use_regex"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(old), encoding="utf-8")
    assert load_tokenizer(tmp_path).to_json() == data


def test_merges_txt_that_is_damaged(tmp_path: Path) -> None:
    save_vocabulary(BPETokenizer.train(TEXT, 270), tmp_path)
    with open(tmp_path / "merges.txt", "a", encoding="utf-8") as file:
        file.write("q")
    with pytest.raises(ValueError, match=r"merge 14 is 'q', not two tokens"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match=r"vocab\.json: merges\.txt is no text in UTF-8"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "pattern", [*PATTERNS.values(), O200K, r"[^$^&]", r"\\w", r"\$\[\^", r"a&b", r"(?i:x)|(?!y)|(?:z)"]
)
def test_patterns_that_are_read_alike(pattern: str) -> None:
    assert unlike(pattern) == ""


@pytest.mark.parametrize(
    ("pattern", "part"),
    [(r"\w+", r"\w"), (r"\\\b", r"\b"), (r"x{2}+", "}+"), (r"\p{L}{2}+", "}+"), (r"\s+$", "$"), ("^a", "^"),
     ("[[b]]", "["), (r"[a&&b]", "["), ("(?m:a)", "(?m"), ("(?is:a)", "(?is"), ("a(?i)b", "(?i)"), (r"[\h]", r"\h")],
)  # fmt: skip
def test_patterns_that_are_not(pattern: str, part: str) -> None:
    assert unlike(pattern) == part


def test_a_literal_split_is_read(tmp_path: Path) -> None:
    data = TOKENIZERS["gpt4"]().to_json()
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"String": "a.c"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert load_tokenizer(tmp_path).pattern == r"a\.c"
