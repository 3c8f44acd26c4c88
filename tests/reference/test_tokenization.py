"""Module 11 against `tokenizers` and `tiktoken`: the same merges of the same text, the same ids, the same files."""

from __future__ import annotations

import json
import os
import random
import unicodedata
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel

from tinytorch.m11_tokenization import PATTERNS, BPETokenizer, CharTokenizer, made_up_text
from tinytorch.m11_tokenization_appendix import load_tokenizer, mergeable_ranks, save_vocabulary

SPECIALS = ["<|endoftext|>", "<|end|>", "<|endofprompt|>"]
CODE = (
    'def f(x: int) -> None:\n    """It\'s a test."""\n\tif x >= 10_000 and not y[::-1]:  # wow!!!\r\n\t\treturn {**x}\n'
)
TEXTS = [
    "",
    " ",
    "Hello, world! It's 12345 o'clock; we'll see. DON'T I'VE 'sd ''s",
    CODE,
    "a  b   c\t\t d \n\n\n  e\r\n \r\n f   ",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea\u2764\ufe0f x",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ ที่นี่ ๑๒๓",
    "العربية تُكتب من اليمين إلى اليسار ١٢٣٤",
    "e\u0301 n\u0303o\u0308 \u0915\u094d\u0937 Z\u0351\u036b\u0343a\u0300\u0301\u0302lgo",
    "日本語の文章と한국어, русский текст № 5½²",
    "\x00\x1c\x1d\x1e\x1f\x85\xa0\u2028\u3000\ufeff\u180e\u200b",
    "ſ 'ſ 'S 'LL 'K \u212a",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "x" * 500 + "thethethe" * 80,
]
CORPUS = [made_up_text(30_000), CODE * 5, *TEXTS[2:] * 3, "the cat sat on the mat, " * 20, "a" * 300]

# Letters and emoji that every library's version of Unicode knows, and kinds of signs that patterns tell apart.
OLD = st.one_of(
    st.characters(exclude_categories=["Cs", "Cn"]).filter(lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn"),
    st.characters(min_codepoint=0x1F300, max_codepoint=0x1F64F),  # emoji, from Unicode 6 to 9
    st.characters(min_codepoint=0x0E01, max_codepoint=0x0E3A),  # Thai
    st.characters(min_codepoint=0x0620, max_codepoint=0x066F).filter(lambda c: unicodedata.category(c) != "Cn"),
)
WORDS = st.sampled_from(
    [" the", "'ll", "  ", "\n", "\r\n", "123", "aaaa", "bag", "!?", "é", "e\u0301", "ก็", "한", "\u200d", *SPECIALS]
)
ANY_TEXT = st.lists(st.one_of(st.text(OLD, max_size=6), WORDS), max_size=30).map("".join)


def hugging(pattern: str, model: Any = None) -> tokenizers.Tokenizer:
    """A tokenizer of the library that cuts with one of our patterns."""
    made = tokenizers.Tokenizer(model or models.BPE())
    cutter = ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    if pattern != "gpt2":
        cutter = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"), cutter])
    made.pre_tokenizer, made.decoder = cutter, decoders.ByteLevel()
    return made


def trained(pattern: str, size: int, texts: list[str], specials: list[str] = SPECIALS) -> tokenizers.Tokenizer:
    made = hugging(pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def merges_of(made: tokenizers.Tokenizer) -> list[str]:
    return [" ".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]]


def ids_of(made: tokenizers.Tokenizer, text: str) -> list[int]:
    return made.encode(text, add_special_tokens=False).ids


def by_ranks(ours: BPETokenizer) -> tiktoken.Encoding:
    ranks = mergeable_ranks(ours)
    return tiktoken.Encoding(
        "ours", pat_str=PATTERNS[ours.pattern], mergeable_ranks=ranks, special_tokens=ours.special_tokens
    )


# Ours, the library's from our file, and tiktoken's from our ranks. Where any two bytes are a token, ids show the cuts.
ANY_PAIR = [(a, b) for a in range(256) for b in range(256)]
OURS = {pattern: BPETokenizer.train(CORPUS, 900, SPECIALS, pattern) for pattern in ("gpt2", "gpt4")} | {
    f"{pattern} any pair": BPETokenizer(ANY_PAIR, SPECIALS, pattern) for pattern in ("gpt2", "gpt4")
}
THEIRS = {name: tokenizers.Tokenizer.from_str(json.dumps(ours.to_json())) for name, ours in OURS.items()}
TIK = {name: by_ranks(ours) for name, ours in OURS.items()}
each = pytest.mark.parametrize("name", OURS)
each_pattern = pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])


# -- training ----------------------------------------------------------------------------------------------------------


@each_pattern
def test_the_same_text_gives_the_same_merges(pattern: str) -> None:
    theirs = trained(pattern, 900, CORPUS)
    assert OURS[pattern].to_json()["model"]["merges"] == merges_of(theirs)
    assert theirs.get_vocab_size() == OURS[pattern].vocab_size == 900


@pytest.mark.parametrize("seed", range(40))
def test_ties_are_broken_alike(seed: int) -> None:
    draw = random.Random(seed)
    letters = draw.choice(["a", "ab", "abc", "abcdefgh", "é ü", "aà1!\n"])
    words = ["".join(draw.choices(letters, k=draw.randint(1, 30))) for _ in range(draw.randint(1, 30))]
    texts = [" ".join(words[i::3]) for i in range(3)]
    size = 256 + draw.randint(0, 150)
    ours, theirs = BPETokenizer.train(texts, size), trained("gpt2", size, texts, [])
    assert ours.to_json()["model"]["merges"] == merges_of(theirs)
    assert ours.to_json()["model"]["vocab"] == theirs.get_vocab()


# -- encoding and decoding ---------------------------------------------------------------------------------------------


def check(name: str, text: str) -> None:
    ours, theirs, tik = OURS[name], THEIRS[name], TIK[name]
    ids = ours.encode(text)
    assert ids == tik.encode_ordinary(text)
    assert ours.decode(ids) == text
    stream = ours.stream()
    assert "".join(map(stream.feed, ids)) + stream.finish() == text
    ids = ours.encode(text, allowed_special="all")
    assert ids == ids_of(theirs, text)
    assert ours.decode(ids) == text == theirs.decode(ids, skip_special_tokens=False)


@each
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_chosen_texts(name: str, text: str) -> None:
    check(name, text)
    check(name, f"<|end|>{text}<|endoftext|><|endofprompt|>{text}<|endof")


@each
def test_random_texts(name: str) -> None:
    settings(max_examples=300)(given(ANY_TEXT)(lambda text: check(name, text)))()


@pytest.mark.parametrize("name", ["gpt2 any pair", "gpt4 any pair"])
def test_every_kind_of_character_is_cut_alike(name: str) -> None:
    for start in range(0, 0x30000, 0x100):
        step = 16 if start >= 0x3400 and start not in range(0xA000, 0xAC00) else 1  # mostly letters of one kind
        signs = [chr(i) for i in range(start, start + 0x100, step) if unicodedata.ucd_3_2_0.category(chr(i))[0] != "C"]
        text = "".join(f"ma{c}ma1{c}1 {c}  {c}!{c}'{c}m{c}{c}  " for c in signs)
        assert OURS[name].encode(text) == TIK[name].encode_ordinary(text) == ids_of(THEIRS[name], text)


@each_pattern
def test_special_tokens_by_name(pattern: str) -> None:
    text = "a<|endoftext|>b<|endofprompt|>c"
    for allowed in ({"<|endoftext|>"}, {"<|endofprompt|>"}, {"<|endoftext|>", "<|endofprompt|>"}):
        expected = TIK[pattern].encode(text, allowed_special=allowed, disallowed_special=())
        assert OURS[pattern].encode(text, allowed_special=allowed) == expected


@given(st.lists(st.integers(0, 899), max_size=40))
def test_ids_at_random_are_decoded_alike(ids: list[int]) -> None:
    ours = OURS["gpt2"]
    stream = ours.stream()
    assert ours.decode(ids) == TIK["gpt2"].decode(ids) == "".join(map(stream.feed, ids)) + stream.finish()
    assert ours.decode_bytes(ids) == TIK["gpt2"].decode_bytes(ids)


def test_merges_in_an_odd_order_are_applied_alike() -> None:
    draw = random.Random(5)
    ours = BPETokenizer.train(["abcabdabeabcbcdbcacab" * 3, "aaaabbbbaabb ccaacc"], 300)
    vocab = ours.to_json()["model"]["vocab"]
    for _ in range(20):
        merges = [tuple(merge.split(" ")) for merge in ours.to_json()["model"]["merges"]]
        draw.shuffle(merges)
        theirs = hugging("gpt2", models.BPE(vocab, merges))
        odd = load_from(theirs)
        for length in (5, 20, 60):
            text = "".join(draw.choices("abcde ", k=length)) + "".join(draw.choices("abcd", k=length))
            assert odd.encode(text) == ids_of(theirs, text)


# -- files -------------------------------------------------------------------------------------------------------------


def load_from(made: tokenizers.Tokenizer) -> Any:
    """Our tokenizer from a file of the library."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made.save(f"{folder}/tokenizer.json")
        return load_tokenizer(folder)


def same_ids(ours: Any, theirs: tokenizers.Tokenizer) -> None:
    for text in [*TEXTS, "<|end|>".join(TEXTS)]:
        assert ours.encode(text, allowed_special="all") == ids_of(theirs, text)


@each_pattern
def test_their_file_is_read(pattern: str) -> None:
    theirs = trained(pattern, 700, CORPUS)
    ours = load_from(theirs)
    assert ours.pattern == pattern
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.special_tokens == {name: i for i, name in enumerate(SPECIALS)}  # their trainer puts them first
    same_ids(ours, theirs)
    again = tokenizers.Tokenizer.from_str(json.dumps(ours.to_json()))
    same_ids(ours, again)
    assert json.loads(again.to_str())["model"]["vocab"] == json.loads(theirs.to_str())["model"]["vocab"]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("use_regex", [False, True])
def test_flags_of_byte_level(prefix: bool, use_regex: bool) -> None:
    theirs = trained("gpt2", 700, CORPUS)
    theirs.pre_tokenizer = ByteLevel(add_prefix_space=prefix, use_regex=use_regex)
    ours = load_from(theirs)
    same_ids(ours, theirs)
    same_ids(ours, tokenizers.Tokenizer.from_str(json.dumps(ours.to_json())))


def test_a_file_like_llama_3s(tmp_path: Path) -> None:
    """A Split with its own pattern, merges that are passed over for whole words, tokens added behind, a template."""
    theirs = trained("gpt4", 700, CORPUS, [])
    data = json.loads(theirs.to_str())
    model = data["model"]
    model["vocab"] |= {"Ġmatzz": 700}  # no merge makes it: only ignore_merges finds it
    data["added_tokens"] = json.loads(trained("gpt4", 300, ["x"]).to_str())["added_tokens"]
    for i, token in enumerate(data["added_tokens"]):
        token["id"] = 701 + i
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [702], "tokens": ["<|end|>"]}},
    }
    for ignore in (False, True):
        model["ignore_merges"] = ignore
        (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
        ours, theirs = load_tokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        same_ids(ours, theirs)
        assert ours.encode("a matzz") == ids_of(theirs, "a matzz")
        assert (700 in ours.encode("a matzz")) is ignore
        ours.save(tmp_path / "again")
        again = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
        assert again.encode("the cat").ids == theirs.encode("the cat").ids  # with the template


def test_added_tokens_that_are_not_special_are_always_found() -> None:
    theirs = trained("gpt2", 600, CORPUS)
    theirs.add_tokens([AddedToken("    ", normalized=False), AddedToken("hello there", normalized=False)])
    ours = load_from(theirs)
    assert ours.always == {"    ", "hello there"}
    text = "x    y hello there!"
    assert ours.encode(text) == ids_of(theirs, text)
    assert {600, 601} <= set(ours.encode(text))
    same_ids(ours, tokenizers.Tokenizer.from_str(json.dumps(ours.to_json())))


def test_gpt2s_files_both_ways(tmp_path: Path) -> None:
    ours = OURS["gpt2"]
    save_vocabulary(ours, tmp_path)
    names = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    theirs = hugging("gpt2", models.BPE.from_file(*names))
    theirs.add_special_tokens(SPECIALS)
    same_ids(ours, theirs)
    again = load_tokenizer(tmp_path)
    assert (again.merges, again.special_tokens) == (ours.merges, ours.special_tokens)
    same_ids(again, theirs)
    folder = tmp_path / "theirs"
    folder.mkdir()
    theirs.model.save(str(folder))
    assert load_tokenizer(folder).to_json() == ours.to_json()


def test_a_file_of_characters_is_read_by_the_library(tmp_path: Path) -> None:
    text = "".join(TEXTS)
    ours = CharTokenizer.train(text)
    ours.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == ours.vocab_size
    assert ids_of(theirs, text) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text == ours.decode(ours.encode(text))
    theirs.save(str(tmp_path / "theirs.json"))
    again = load_tokenizer(tmp_path / "theirs.json")
    assert isinstance(again, CharTokenizer)
    assert again.encode(text) == ours.encode(text)
