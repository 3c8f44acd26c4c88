"""Appendix to module 11: files of tokenizers, our own and those of other libraries.

`load_tokenizer` reads a tokenizer.json of Hugging Face's `tokenizers`, or GPT-2's pair vocab.json and merges.txt. What
a file asks for is honoured exactly or refused by name: a tokenizer that is nearly right gives a model nonsense to read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import regex

from tinytorch.m01_setup import atomic_write
from tinytorch.m11_tokenization import (
    PATTERNS,
    SIGNS,
    BPETokenizer,
    CharTokenizer,
    Pair,
    Tokenizer,
)

FILE, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
BYTE_OF = {sign: byte for byte, sign in SIGNS.items()}


# -- finding files -----------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer from a folder or a file.

    Args:
        path: a tokenizer.json, or a folder that holds one, or else vocab.json and merges.txt.

    Returns:
        A CharTokenizer for the files that it writes; a BPETokenizer for byte-level BPE. It gives the ids that
        `tokenizers` gives with `encode(text, add_special_tokens=False)`; there, special tokens are always recognised,
        as with `allowed_special="all"` here. A post-processor, which adds tokens for a model, is kept for saving and
        not applied. Where Unicode has got new letters since the library was made, it may cut at them otherwise.

    Raises:
        FileNotFoundError: saying what there should be.
        ValueError: in one line with the file's name, for a damaged or incomplete file, and for a normalizer, model,
            pre-tokenizer, decoder or option that cannot be honoured exactly.
    """
    path = Path(path)
    if path.is_dir():
        if (path / FILE).exists():
            return load_tokenizer(path / FILE)
        missing = [name for name in (VOCABULARY, MERGES) if not (path / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"load_tokenizer: {path} holds no {FILE}, nor {' and '.join(missing)}; what is needed is the first, or "
                f"both {VOCABULARY} and {MERGES}"
            )
        return _honoured(path / VOCABULARY, read_vocabulary, path / VOCABULARY, path / MERGES)
    if not path.exists():
        raise FileNotFoundError(f"load_tokenizer: there is no {path}")
    if path.name in (VOCABULARY, MERGES):
        return load_tokenizer(path.parent)
    return _honoured(path, read_tokenizer_json, path)


def _honoured(path: Path, read: Any, *files: Path) -> Tokenizer:
    """What `read` makes of files; its errors with the file's name before them."""
    try:
        return read(*files)
    except ValueError as error:
        raise ValueError(f"load_tokenizer: {path}: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """An object of a JSON file; ValueError if it is none."""
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"this is no JSON, or only a part of it ({error})") from None
    return an_object(data, "the file")


def an_object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} should be a JSON object, and is {value!r:.60}")
    return value


# -- tokenizer.json ----------------------------------------------------------------------------------------------------


def read_tokenizer_json(file: Path) -> Tokenizer:
    """A tokenizer of Hugging Face's file."""
    data = read_json(file)
    if missing := [name for name in ("model", "pre_tokenizer", "decoder") if name not in data]:
        raise ValueError(f"{', '.join(missing)} missing: this is no {FILE}")
    for name in ("truncation", "padding", "normalizer"):
        if data.get(name) is not None:
            raise refusal(name, data[name])
    model = an_object(data["model"], "model")
    kind = model.get("type", "BPE" if "merges" in model else None)  # old files do not name BPE
    if missing := [name for name in ("vocab", *(["merges"] if kind == "BPE" else [])) if name not in model]:
        raise ValueError(f"the model lacks {' and '.join(missing)}")
    if kind == "BPE":
        return read_bpe(data, model)
    if kind == "WordLevel":
        return read_characters(data, model)
    raise ValueError(f"cannot honour the model {kind!r}, only byte-level BPE, and WordLevel as CharTokenizer writes it")


def refusal(name: str, component: Any, why: str = "") -> ValueError:
    """The error for a component that cannot be honoured."""
    kind = component.get("type", component) if isinstance(component, Mapping) else component
    return ValueError(f"cannot honour the {name} {kind!r:.80}{why and f', {why}'}")


def read_characters(data: dict[str, Any], model: dict[str, Any]) -> CharTokenizer:
    tokenizer = CharTokenizer(an_object(model["vocab"], "vocab"))
    for name in ("pre_tokenizer", "decoder", "added_tokens", "post_processor", "model"):
        if data.get(name) != tokenizer.to_json()[name]:
            raise refusal(name, data.get(name), "which is not as CharTokenizer writes it")
    return tokenizer


def read_bpe(data: dict[str, Any], model: dict[str, Any]) -> BPETokenizer:
    options = {"dropout": (None, 0, 0.0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
               "byte_fallback": (None, False)}  # fmt: skip
    for option, harmless in options.items():
        if model.get(option) not in harmless:
            raise ValueError(f"cannot honour the model's {option} {model[option]!r}")
    decoder = data["decoder"]
    if decoder is not None and an_object(decoder, "decoder").get("type") != "ByteLevel":
        raise refusal("decoder", decoder)
    pattern, add_prefix_space = read_pre_tokenizer(data["pre_tokenizer"])
    specials, always = read_added_tokens(data.get("added_tokens") or [])
    vocabulary = {token: id for token, id in ids_of(model["vocab"]).items() if specials.get(token) != id}
    tokens, merges = read_merges(vocabulary, model["merges"])
    ignore_merges = bool(model.get("ignore_merges"))
    tokenizer = BPETokenizer(merges, specials, pattern, tokens=tokens, always=always, ignore_merges=ignore_merges,
                             add_prefix_space=add_prefix_space)  # fmt: skip
    tokenizer.post_processor = data.get("post_processor")
    return tokenizer


def ids_of(vocabulary: Any) -> dict[str, int]:
    """A vocabulary of a file, checked: different whole numbers >= 0."""
    vocabulary = an_object(vocabulary, "the vocabulary")
    wrong = {token: id for token, id in vocabulary.items() if type(id) is not int or id < 0}
    if wrong:
        raise ValueError(f"ids must be whole numbers >= 0, not {_few(map(repr, wrong.values()))}")
    if len(set(vocabulary.values())) < len(vocabulary):
        seen = dict[int, str]()
        twice = [
            f"{id} ({seen[id]!r}, {token!r})" for token, id in vocabulary.items() if seen.setdefault(id, token) != token
        ]
        raise ValueError(f"several tokens have one id: {_few(twice)}")
    return vocabulary


def read_merges(vocabulary: dict[str, int], lines: Any) -> tuple[list[bytes | None], list[Pair]]:
    """The bytes of each id, and the merges as pairs of ids; of signs that stand for bytes."""
    if foreign := [token for token in vocabulary if not BYTE_OF.keys() >= set(token)]:
        raise ValueError(f"these tokens are not written in the signs of byte-level BPE: {_few(map(repr, foreign))}")
    tokens: list[bytes | None] = [None] * (1 + max(vocabulary.values(), default=-1))
    for token, id in vocabulary.items():
        tokens[id] = bytes(map(BYTE_OF.__getitem__, token))
    merges, missing = list[Pair](), dict[str, None]()
    for number, line in enumerate(lines if isinstance(lines, list) else [lines]):
        parts = line.split(" ") if isinstance(line, str) else line
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"merge {number} is {line!r:.60}, not two tokens")
        a, b = parts
        if lacking := [token for token in (a, b, a + b) if token not in vocabulary]:
            missing |= dict.fromkeys(lacking)
        else:
            merges.append((vocabulary[a], vocabulary[b]))
    if missing:
        raise ValueError(
            f"{len(missing)} tokens of the merges are missing in the vocabulary: {_few(map(repr, missing))}"
        )
    return tokens, merges


def _few(items: Iterable[str]) -> str:
    texts = list(items)
    return ", ".join(texts[:10]) + (f" and {len(texts) - 10} more" if len(texts) > 10 else "")


def read_added_tokens(given: Any) -> tuple[dict[str, int], set[str]]:
    """Ids by name, and the names of those that are recognised in every text because they are not special."""
    specials, always = dict[str, int](), set[str]()
    for token in given:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or type(token.get("id")) is not int:
            raise ValueError(f"an added token should have a content and an id, and is {token!r:.80}")
        for option in ("lstrip", "rstrip", "single_word"):
            if token.get(option):
                raise ValueError(f"cannot honour {option} of the added token {token['content']!r}")
        specials[token["content"]] = token["id"]
        if not token.get("special"):
            always.add(token["content"])
    return specials, always


# What Oniguruma, which `tokenizers` uses, reads otherwise than Python's `regex`: letters of words, \h and some others;
# {2}+, sets within sets, ^ and $ at every line, and flags.
UNLIKE_ESCAPES = frozenset("wWbBhHzZGKXQE")
ESCAPE, SET = regex.compile(r"\\[pP]\{[^}]*\}|\\."), regex.compile(r"\[\^?(?:[^\[\]&]|&(?!&))*\]")
UNLIKE = regex.compile(r"\}\+|[\[$^]|\(\?[a-z]*[msx]|\(\?[a-z-]+\)")


def unlike(pattern: str) -> str:
    """The first part of a pattern that the two would not read alike; empty if there is none."""
    for escape in ESCAPE.findall(pattern):
        if escape[1] in UNLIKE_ESCAPES:
            return escape
    found = UNLIKE.search(SET.sub("_", ESCAPE.sub("_", pattern)))
    return found[0] if found else ""


def read_pre_tokenizer(component: Any) -> tuple[str, bool]:
    """The pattern that cuts, and whether a space is put before, of ByteLevel, or of one Split and ByteLevel."""
    component = an_object(component, "pre_tokenizer") if component is not None else {"type": None}
    parts = component.get("pretokenizers") if component.get("type") == "Sequence" else [component]
    parts = [an_object(part, "a pre-tokenizer") for part in parts or [{"type": "an empty Sequence"}]]
    *before, level = parts
    if level.get("type") != "ByteLevel":
        raise refusal("pre_tokenizer", level, "because only ByteLevel makes bytes of every text")
    prefix = level.get("add_prefix_space")
    if not isinstance(prefix, bool):
        raise refusal("pre_tokenizer", level, f"with add_prefix_space {prefix!r}")
    if not before:
        return ("gpt2" if level.get("use_regex", True) else "none"), prefix
    if len(before) > 1 or before[0].get("type") != "Split":
        odd = next(part for part in before if part.get("type") != "Split" or part is not before[0])
        raise refusal("pre_tokenizer", odd, "only ByteLevel, or one Split before it")
    if level.get("use_regex", True) or prefix:
        raise refusal("pre_tokenizer", level, "which has use_regex or add_prefix_space after a Split")
    if before[0].get("behavior") != "Isolated" or before[0].get("invert"):
        raise refusal("pre_tokenizer", before[0], f"with behavior {before[0].get('behavior')!r}, only 'Isolated'")
    return read_pattern(before[0].get("pattern")), False


def read_pattern(given: Any) -> str:
    """The regular expression of a Split; ValueError for one that Python's `regex` would read otherwise."""
    given = an_object(given, "the pattern of Split")
    if isinstance(given.get("String"), str):
        return regex.escape(given["String"], special_only=True)
    text = given.get("Regex")
    if not isinstance(text, str):
        raise refusal("pattern of Split", given)
    names = {pattern: name for name, pattern in PATTERNS.items()}
    if odd := unlike(text):
        raise refusal("pattern of Split", text, f"for {odd} means something else in Python")
    return names.get(text, text)


# -- vocab.json and merges.txt -----------------------------------------------------------------------------------------


def read_vocabulary(vocabulary_file: Path, merges_file: Path) -> BPETokenizer:
    """GPT-2's files. Tokens of the vocabulary that are no byte and come from no merge are special tokens."""
    vocabulary = ids_of(read_json(vocabulary_file))
    try:
        lines = merges_file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{MERGES} is no text in UTF-8 ({error})") from None
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    made = {line.replace(" ", "") for line in merges} | BYTE_OF.keys()
    specials = {token: id for token, id in sorted(vocabulary.items(), key=lambda item: item[1]) if token not in made}
    ordinary = {token: id for token, id in vocabulary.items() if token in made}
    tokens, pairs = read_merges(ordinary, merges)
    return BPETokenizer(pairs, specials, tokens=tokens)


def save_vocabulary(tokenizer: BPETokenizer, folder: str | os.PathLike) -> None:
    """Write GPT-2's vocab.json and merges.txt. They do not hold the pattern, which readers take to be GPT-2's.

    Raises:
        ValueError: if the tokenizer has another pattern or options that these files cannot say.
    """
    unsaid = [f"{name} {value!r}" for name, value, plain in (
        ("pattern", tokenizer.pattern, "gpt2"), ("ignore_merges", tokenizer.ignore_merges, False),
        ("add_prefix_space", tokenizer.add_prefix_space, False)) if value != plain]  # fmt: skip
    if unsaid:
        raise ValueError(f"save_vocabulary: {VOCABULARY} and {MERGES} cannot say {', '.join(unsaid)}; use save(path)")
    model, folder = tokenizer.to_json()["model"], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / MERGES, "\n".join(["#version: 0.2", *model["merges"], ""]).encode())
    atomic_write(folder / VOCABULARY, json.dumps(model["vocab"], ensure_ascii=False).encode())


# -- tiktoken ----------------------------------------------------------------------------------------------------------


def mergeable_ranks(tokenizer: BPETokenizer) -> dict[bytes, int]:
    """The ranks that `tiktoken.Encoding` takes, which are the ids of all tokens that are not special.

    `tiktoken.Encoding(name, pat_str=PATTERNS[tokenizer.pattern], mergeable_ranks=…, special_tokens=
    tokenizer.special_tokens)` gives the same ids, if the ids follow the order of the merges, as they do after training.
    """
    special = set(tokenizer.special_tokens.values())
    return {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)
            if id not in special and tokenizer._tokens[id] is not None}  # fmt: skip
