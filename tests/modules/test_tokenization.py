"""Module 11: tokenizers, what they promise of every text, and windows over ids."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import rich.progress
from hypothesis import given
from hypothesis import strategies as st

import tinytorch as t
import tinytorch.m11_tokenization as m11
from tinytorch.m10_dataloader import DataLoader, Dataset, take_batch
from tinytorch.m11_tokenization import (
    BYTE_IDS,
    BYTES,
    PATTERNS,
    SIGNS,
    BPETokenizer,
    CharTokenizer,
    Merges,
    Tokenizer,
    TokenWindows,
    compiled,
    cut,
    encode_plainly,
    made_up_text,
    ranks_of,
    train_merges,
    train_plainly,
    visible,
)

TEXT = made_up_text(20_000) + "naïve café, 日本語\n\n\t x = y[1:] ** 2  # ok\r\n" * 3
WORDS = st.lists(st.one_of(st.text(max_size=5), st.sampled_from([" bag", "<|end|>", "  ", "'ll", "123"])), max_size=20)
ANY_TEXT = WORDS.map("".join).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(TEXT, 600, ["<|end|>", "<|end|>of"])


def one_line(function: Any, *args: Any, error: type[Exception] = ValueError, **keywords: Any) -> str:
    with pytest.raises(error) as found:
        function(*args, **keywords)
    assert "\n" not in str(found.value)
    return str(found.value)


# -- every tokenizer ---------------------------------------------------------------------------------------------------


def test_ids_of_many_kinds_are_decoded(bpe: BPETokenizer) -> None:
    ids = bpe.encode("some words")
    for given_ids in (
        ids,
        tuple(ids),
        iter(ids),
        np.array(ids),
        np.array(ids, np.int32),
        list(np.array(ids)),
        t.tensor(ids),
    ):
        assert bpe.decode(given_ids) == "some words"
    assert bpe.decode([]) == bpe.decode(t.tensor([], dtype=t.int64)) == ""
    assert bpe.decode(0) == bpe.decode(t.tensor(0)) == "!"
    for wrong in ([1.0], t.tensor([1.0]), [[1, 2]], t.tensor([[1, 2]]), "ab", None):
        assert "decode: expected a flat list of whole numbers, got " in one_line(bpe.decode, wrong, error=TypeError)


def test_wrong_ids_are_named(bpe: BPETokenizer) -> None:
    message = one_line(bpe.decode, [3, 600, -1, 5, 600, 9999])
    assert message == "decode: the vocabulary has 600 tokens, and none with the ids [600, -1, 9999]"
    for function in (bpe.token_bytes, bpe.id_to_token, bpe.stream().feed):
        assert "none with the ids [-1]" in one_line(function, -1)
    holes = BPETokenizer([], {"<a>": 300})
    assert holes.vocab_size == 301
    assert holes.decode([300, 0]) == "<a>!"
    assert "none with the ids [256, 299]" in one_line(holes.decode, [0, 256, 299])


def test_half_a_character_is_shown_as_bytes_or_replaced(bpe: BPETokenizer) -> None:
    first = bpe.encode("\u20ac")[0]
    assert bpe.token_bytes(first) == b"\xe2"
    assert bpe.id_to_token(first) == "\\xe2"
    assert bpe.decode([first]) == "\ufffd"
    assert bpe.decode_bytes([first, 0]) == b"\xe2!"


@given(st.lists(st.integers(0, 255), max_size=30))
def test_a_stream_gives_what_decode_gives(ids: list[int]) -> None:
    tokenizer = BPETokenizer([])
    stream = tokenizer.stream()
    for _ in range(2):  # it can be used again
        parts = [stream.feed(id) for id in ids]
        assert "".join(parts) + stream.finish() == tokenizer.decode(ids)


def test_a_stream_gives_a_character_with_its_last_byte() -> None:
    tokenizer = BPETokenizer([])
    for text in ("a", "é", "€", "\U0001f600"):
        stream, ids = tokenizer.stream(), tokenizer.encode(text)
        assert [stream.feed(id) for id in ids] == [""] * (len(ids) - 1) + [text]
        assert stream.finish() == ""


def test_what_a_subclass_must_define() -> None:
    plain = Tokenizer([b"a"])
    assert repr(plain) == "Tokenizer(vocab_size=1)"
    assert "Tokenizer must define encode" in one_line(plain.encode, "a", error=NotImplementedError)
    assert "Tokenizer must define to_json" in one_line(plain.to_json, error=NotImplementedError)


def test_lone_surrogates_are_refused(bpe: BPETokenizer) -> None:
    for function in (bpe.encode, CharTokenizer.train, lambda text: BPETokenizer.train(text, 300)):
        assert "the text has U+DC80, half of a surrogate pair" in one_line(function, "ab\udc80c")
    assert "'\\ud83d'" in one_line(CharTokenizer("ab").encode, "a\ud83d")


# -- characters --------------------------------------------------------------------------------------------------------


def test_characters() -> None:
    tokenizer = CharTokenizer.train("héllo \U0001f600\n")
    assert tokenizer.characters == sorted("hélo \U0001f600\n")
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("\nl") == [0, 4 - 1]
    assert CharTokenizer("olleh").encode("hello") == CharTokenizer("helo").encode("hello")
    assert CharTokenizer("").encode("") == []
    assert "expected single characters, got 'ab'" in one_line(CharTokenizer, ["ab", "c"])


def test_unknown_characters_are_listed() -> None:
    tokenizer = CharTokenizer("abc")
    message = one_line(tokenizer.encode, "azyza")
    assert message == "CharTokenizer: the text has 'y', 'z', which the vocabulary lacks; its 3 characters are 'abc'"
    assert "'d', 'e', 'f', 'g', 'h', 'i', 'j', 'k', 'l', 'm' and 3 more" in one_line(
        tokenizer.encode, "abcdefghijklmnop"
    )


# -- training ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.text("abcd", max_size=30), max_size=12), st.integers(256, 320))
def test_fast_training_is_plain_training(words: list[str], size: int) -> None:
    chunks = [word.encode() for word in words]
    merges = train_plainly(chunks, size)
    assert train_merges(Counter(chunks), size) == merges
    for chunk in chunks:
        plain = encode_plainly(chunk, ranks_of(merges))
        rules = Merges(merges, range(256, 256 + len(merges)))
        assert rules.apply_short(chunk) == rules.apply_long(chunk) == rules.apply(chunk) == plain


def test_equally_common_pairs_go_by_ids() -> None:
    assert train_merges({b"cdab": 1}, 257) == [(97, 98)]
    assert train_merges({b"cdab": 1, b"cd": 1}, 257) == [(99, 100)]
    tokenizer = BPETokenizer.train("é! zz", 258)  # 'é' is C3 A9, whose ids come after that of z
    assert [tokenizer.id_to_token(id) for id in (256, 257)] == ["zz", "é"]


def test_training_stops_when_nothing_is_left() -> None:
    tokenizer = BPETokenizer.train("ab ab", 1000, ["<s>"])
    assert tokenizer.vocab_size == 256 + 2 + 1  # ab, and it with its space
    assert BPETokenizer.train("", 300).vocab_size == 256
    assert BPETokenizer.train([], 300).merges == []
    assert BPETokenizer.train("abab", 256).merges == []


def test_texts_are_counted_together_and_not_joined() -> None:
    apart = BPETokenizer.train(iter(["ab", "ba", "ab"]), 257)
    assert apart.id_to_token(256) == "ab"
    assert BPETokenizer.train(["a", "a", "a"], 300).merges == []


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "none", r"\S+"])
def test_no_merge_crosses_a_chunk(pattern: str) -> None:
    tokenizer = BPETokenizer.train("x-y 12345 x" * 50, 400, pattern=pattern)
    learned = [tokenizer.id_to_token(id) for id in range(256, tokenizer.vocab_size)]
    assert len(learned) > 3
    crossing = {"gpt2": r"\S |\d\D|\w-", "gpt4": r"\S |\d\D|\w-|\d{4}", r"\S+": r"\S | \S", "none": "^$"}[pattern]
    assert not [token for token in learned if re.search(crossing, token)]
    assert any(" x" in token for token in learned) is (pattern != r"\S+")


@pytest.mark.parametrize(("size", "special"), [(255, []), (256, ["a", "b"]), (257, ["<a>", "<b>"]), (0, [])])
def test_a_vocabulary_too_small(size: int, special: list[str]) -> None:
    message = one_line(BPETokenizer.train, "text", size, special)
    assert f"room for 256 bytes and {len(special)} special tokens; {size} is too small" in message


def test_long_training_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, clock = [], itertools.count(0.0, 0.5)
    monkeypatch.setattr(m11.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(
        rich.progress, "track", lambda steps, name, **_: (shown.append((name, step)) or step for step in steps)
    )
    steps = range(256, 266)
    assert list(m11.shown(steps, "merges", progress=False)) == list(steps)
    assert shown == []
    assert list(m11.shown(steps, "merges", progress=True)) == list(steps)
    assert shown == [("merges", step) for step in range(260, 266)]  # from two seconds on
    quick = BPETokenizer.train("ab" * 20, 270)
    assert BPETokenizer.train("ab" * 20, 270, progress=True).merges == quick.merges


# -- encoding ----------------------------------------------------------------------------------------------------------


def test_a_merge_that_becomes_possible_goes_before_later_ones() -> None:
    rules = Merges([(256, 97), (97, 98)], [257, 256])  # (ab)a first of all, though ab has to be made before
    for apply in (rules.apply_short, rules.apply_long):
        assert apply(b"abab") == [257, 98]
        assert apply(b"ababab") == [257, 98, 256]


@given(ANY_TEXT)
def test_every_text_comes_back(bpe: BPETokenizer, text: str) -> None:
    for allowed in ("none", "all", {"<|end|>"}):
        assert bpe.decode(bpe.encode(text, allowed)) == text
    plain = [id for chunk in cut(compiled("gpt2"), text)
             for id in encode_plainly(chunk.encode().translate(BYTE_IDS), ranks_of(bpe.merges))]  # fmt: skip
    assert bpe.encode(text) == plain


@given(ANY_TEXT, st.sampled_from([*PATTERNS, r"\w+", r"(a)|(b)", r"x*", " "]))
def test_cutting_loses_nothing(text: str, pattern: str) -> None:
    chunks = cut(compiled(pattern), text)
    assert "".join(chunks) == text
    assert BPETokenizer([], pattern=pattern).decode(BPETokenizer([], pattern=pattern).encode(text)) == text


def test_bytes_have_gpt2s_order() -> None:
    assert sorted(BYTES) == list(range(256))
    assert (BYTES[0], BYTES[255], SIGNS[ord(" ")], SIGNS[0], SIGNS[0xAD]) == (ord("!"), 0xAD, "Ġ", "Ā", "Ń")
    assert [visible(bytes([byte])) for byte in BYTES] == sorted(SIGNS.values())
    assert BPETokenizer([]).encode("! ~\xad") == [0, 220, 93, BYTE_IDS[0xC2], BYTE_IDS[0xAD]]


def test_special_tokens(bpe: BPETokenizer) -> None:
    assert bpe.special_tokens == {"<|end|>": 598, "<|end|>of": 599}
    assert bpe.encode("a<|end|>of", "all") == [*bpe.encode("a"), 599]  # the longest
    assert bpe.encode("a<|end|>of", {"<|end|>"}) == [*bpe.encode("a"), 598, *bpe.encode("of")]
    assert not {598, 599} & set(bpe.encode("a<|end|>of"))
    assert bpe.decode([598, 599]) == "<|end|><|end|>of"
    assert bpe.encode("<|end|><|end|>", "all") == [598, 598]
    message = one_line(bpe.encode, "a", {"<x>", "<|end|>"})
    assert message == "encode: no special tokens ['<x>']; there are ['<|end|>', '<|end|>of']"
    assert '"none", "all" or a set of names, not \'<|end|>\'' in one_line(bpe.encode, "a", "<|end|>")
    assert "expected a str, got bytes" in one_line(bpe.encode, b"a", error=TypeError)
    assert BPETokenizer([], ["a.c"]).encode("abc a.c", "all")[-1] == 256  # its signs are no pattern


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merges": [(0, 256)]}, "merge 0 joins (0, 256), but there are 256 tokens so far"),
        ({"merges": [(0, 1), (-1, 1)]}, "merge 1 joins (-1, 1), but there are 257 tokens so far"),
        ({"special_tokens": ["a", "a"]}, "different and not empty, got ['a', 'a']"),
        ({"special_tokens": [""]}, "different and not empty"),
        ({"special_tokens": ["!"]}, "['!'] cannot be special, being ordinary tokens"),
        ({"special_tokens": {"<a>": 255}}, "'<a>' cannot have the id 255, which is taken"),
        ({"special_tokens": {"<a>": -1}}, "'<a>' cannot have the id -1, which is taken"),
        ({"special_tokens": {"<a>": 256, "<b>": 256}}, "'<b>' cannot have the id 256, which is taken"),
        ({"pattern": "gpt3("}, "pattern 'gpt3(' is none of gpt2, gpt4, none, and no regular expression: missing )"),
        ({"pattern": "gpt4", "add_prefix_space": True}, 'goes with pattern "gpt2" or "none", not \'gpt4\''),
        ({"tokens": [bytes([i]) for i in range(1, 256)]}, "the vocabulary lacks 1 of the 256 bytes: [0]"),
    ],
)
def test_what_cannot_be_a_tokenizer(arguments: dict[str, Any], message: str) -> None:
    assert message in one_line(BPETokenizer, **({"merges": []} | arguments))


def test_two_merges_may_make_the_same_token() -> None:
    ids = BPETokenizer([]).encode("abc")
    tokenizer = BPETokenizer([(ids[0], ids[1]), (ids[1], ids[2]), (256, ids[2]), (ids[0], 257)])
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("abc") == [258]
    assert tokenizer.encode("bc") == [257]


def test_options_of_files() -> None:
    ids = BPETokenizer([]).encode("abc ")
    tokens = [*(bytes([byte]) for byte in BYTES), b"abc"]
    for ignore in (False, True):
        tokenizer = BPETokenizer([], tokens=tokens, ignore_merges=ignore)
        assert tokenizer.encode("abc") == ([256] if ignore else ids[:3])
    prefixed = BPETokenizer([], ["<s>"], add_prefix_space=True)
    assert prefixed.encode("abc") == [ids[3], *ids[:3]] == prefixed.encode(" abc")
    assert prefixed.encode("a<s>b", "all") == [ids[3], ids[0], 256, ids[3], ids[1]]
    assert prefixed.encode("") == []
    always = BPETokenizer([], ["<s>", "<t>"], always=["<s>"])
    assert always.encode("<s>")[0] == 256
    assert 257 not in always.encode("<t>")
    assert always.encode("<t><s>", {"<t>"}) == [257, 256]


def test_the_cache_is_bounded_and_changes_nothing(monkeypatch: pytest.MonkeyPatch, bpe: BPETokenizer) -> None:
    monkeypatch.setattr(BPETokenizer, "CACHE", 50)
    small = BPETokenizer(bpe.merges)
    for _ in range(2):
        assert small.encode(TEXT) == bpe.encode(TEXT)
        assert len(small._cache) <= 50
    small.encode("x" * 5000)
    assert max(map(len, small._cache)) < 100
    first = small.encode("some words")
    first += [1]
    first[0] = 0
    assert small.encode("some words") == bpe.encode("some words")


def test_a_text_without_spaces_is_not_quadratic() -> None:
    draw = random.Random(2)
    tokenizer = BPETokenizer.train("a" * 1000 + made_up_text(5000).replace(" ", ""), 500)
    for letters in ("a", "ลมฟ", "bagin"):
        text = "".join(draw.choices(letters, k=100_000))
        start = time.perf_counter()
        ids = tokenizer.encode(text)
        assert time.perf_counter() - start < 5  # a quadratic way takes minutes
        assert tokenizer.decode(ids) == text
    start = time.perf_counter()
    assert len(BPETokenizer.train("ab" * 50_000 + "a" * 100_000, 330).merges) > 20
    assert time.perf_counter() - start < 5


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.device
def test_windows(device: str) -> None:
    ids = np.arange(100, 150)
    for given_ids in (ids, ids.tolist(), t.tensor(ids), t.tensor(ids.astype(np.int32)), ids.astype(np.uint16)):
        data = TokenWindows(given_ids, 8)
        assert len(data) == 42
        inputs, targets = data.get_batch([0, 41, -1, 7])
        assert (inputs.shape, inputs.dtype, inputs.device.type) == ((4, 8), t.int64, device)
        assert inputs[:, 0].tolist() == [100, 141, 141, 107]
        assert (targets - inputs).tolist() == [[1] * 8] * 4
        assert targets[1].tolist()[-1] == 149  # the last id is learned
    for fast, slow in zip(take_batch(data, [3, 4]), Dataset.get_batch(data, [3, 4]), strict=True):
        assert fast.tolist() == slow.tolist()


@pytest.mark.parametrize(
    ("n", "length", "stride"), [(10, 3, 3), (10, 9, 1), (10, 9, 5), (11, 2, 7), (12, 4, 4), (13, 4, 4)]
)
def test_strides(n: int, length: int, stride: int) -> None:
    data = TokenWindows(range(n), length, stride)
    starts = [start for start in range(0, n, stride) if start + length + 1 <= n]
    assert len(data) == len(starts)
    assert [data[i][0].tolist()[0] for i in range(len(data))] == starts
    assert [data[i][1].tolist()[-1] for i in range(len(data))] == [start + length for start in starts]
    for wrong in (len(data), -len(data) - 1):
        assert f"there are {len(starts)} windows, got the numbers [{wrong}]" in one_line(
            data.get_batch, [wrong], error=IndexError
        )


@pytest.mark.parametrize(
    ("ids", "length", "stride"), [(range(5), 5, 1), (range(5), 0, 1), (range(5), 2, 0), ([], 1, 1), ([[1, 2, 3]], 1, 1)]
)
def test_windows_that_cannot_be(ids: Any, length: int, stride: int) -> None:
    message = one_line(TokenWindows, ids, length, stride)
    assert "expected a row of more than `length` ids" in message
    assert f"length {length}, stride {stride}" in message


def test_windows_go_through_a_loader_in_any_way() -> None:
    data = TokenWindows(range(40), 4, stride=4)
    for workers in (0, 2):
        loader = DataLoader(data, 3, shuffle=True, num_workers=workers, seed=4)
        batches = list(loader)
        assert [inputs.shape for inputs, _ in batches] == [(3, 4)] * 3
        assert sorted(int(row[0]) for inputs, _ in batches for row in inputs) == list(range(0, 36, 4))
