"""Module 11: tokenization, or how text becomes numbers and comes back without a scratch.

Learning objectives. After this module you can
1. say what characters, bytes and tokens are, and weigh the size of a vocabulary against the length of a text;
2. train byte-pair encoding by merging the commonest pair, first as five lines say it, then a hundred times faster;
3. encode any text, so that nothing in it is ever unknown, and decode it again to the same text;
4. decode while tokens arrive, without showing half a character;
5. write a tokenizer to a file that other libraries read, and cut a text into windows to learn from.
"""

from __future__ import annotations

import codecs
import json
import operator
import os
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex

from tinytorch.backends import get_backend
from tinytorch.m01_setup import atomic_write, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import Tensor, int64, tensor
from tinytorch.m10_dataloader import DataLoader, Dataset

# %% [markdown]
# # Module 11: Tokenization
#
# A network reads numbers. Text has to be cut into pieces, and each piece gets a number: its id in a vocabulary. How one
# cuts decides what the network has to learn itself, how long its input is, and whether it can read everything.

# %% [markdown]
# ## Mathematical foundations
#
# **Three alphabets.** A *character* is one of Unicode's 1.1 million code points; a text in English uses some 65, one in
# many languages thousands, and there is always one more. UTF-8 writes a character as one to four *bytes*, and there are
# 256 of those, so a vocabulary of bytes has no unknown text; but the text is longest. *Tokens* are strings of bytes.
#
# **The price.** With a vocabulary of $V$ tokens in $D$ dimensions, the tables at both ends of a model have $V D$
# entries each, and a text of $n$ bytes has $n / r$ tokens, where $r$ is the compression in bytes a token. Attention
# costs $(n / r)^2$. So tokens buy a shorter text with a larger table.
#
# **Byte-pair encoding** finds tokens greedily. Let $c(a, b)$ count how often token $a$ stands right before $b$:
#
# $$(a, b) = \arg\max c(a, b), \qquad \text{replace every } a\,b \text{ by a new token } ab, \qquad \text{and again.}$$
#
# The *merges*, in order, are all there is to know. Encoding carries out on a new text what training did on the old
# one: of all neighbours that have a merge, the pair with the earliest merge (its *rank*) goes first.
#
# **Ties** need a rule, or two programs learn different tokens. As in Hugging Face's `tokenizers`: of pairs that are
# equally common, the one with the smaller ids.
#
# **Chunks.** No token should join the end of a word with the beginning of the next, so a regular expression first cuts
# the text into chunks, and merging stays inside them. A text of $10^6$ bytes has some $10^4$ different chunks: to train
# on these, with counts, is the first hundredfold speed-up.
#
# **Why a chunk at a time is enough.** What becomes of a stretch of bytes between two token boundaries depends on these
# bytes alone: nothing outside was ever merged with them. So equal bytes have equal fates, and no two merges of one
# training make the same token.

# %% [markdown]
# ## Implementation
#
# ### What every tokenizer does
# A tokenizer is a table from ids to bytes, and a way to choose ids for a text. Decoding needs the table alone.


# %%
class Tokenizer:
    """Text to ids and back. Subclasses define `encode` and `to_json`.

    Args:
        tokens: the bytes of every id, in order; None where a file leaves an id out.
    """

    def __init__(self, tokens: Iterable[bytes | None]) -> None:
        self._tokens = list(tokens)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the number of rows of an embedding."""
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        raise NotImplementedError(f"{type(self).__name__} must define encode")

    def decode_bytes(self, ids: Any) -> bytes:
        """The bytes of ids: a list, integer tensor or array; or of a single one."""
        whole, table = whole_numbers(ids), self._tokens
        try:
            if not whole or min(whole) >= 0:
                return b"".join(map(table.__getitem__, whole))  # type: ignore[arg-type]
        except (IndexError, TypeError):
            pass
        wrong = [i for i in dict.fromkeys(whole) if not 0 <= i < len(table) or table[i] is None]
        raise ValueError(f"decode: the vocabulary has {len(table)} tokens, and none with the ids {wrong[:10]}")

    def decode(self, ids: Any) -> str:
        """The text of ids. Bytes that are no UTF-8, as where a model stopped within a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for."""
        return self.decode_bytes([id])

    def id_to_token(self, id: int) -> str:
        """A token as text to show: bytes that are no whole character appear as \\xe2."""
        return self.token_bytes(id).decode("utf-8", "backslashreplace")

    def stream(self) -> Stream:
        """A decoder for ids that come one by one."""
        return Stream(self)

    def to_json(self) -> dict[str, Any]:
        """What is saved: the content of a tokenizer.json."""
        raise NotImplementedError(f"{type(self).__name__} must define to_json")

    def save(self, path: str | os.PathLike) -> None:
        """Write Hugging Face's tokenizer.json: into a folder, made if need be, or to a file that is named so (*.json).

        The file holds the old content or the new, never half of it. `load_tokenizer(path)` reads it, and so does
        `tokenizers.Tokenizer.from_file`, with the same ids.
        """
        file = Path(path)
        if file.suffix != ".json":
            file.mkdir(parents=True, exist_ok=True)
            file = file / "tokenizer.json"
        atomic_write(file, json.dumps(self.to_json(), ensure_ascii=False, indent=1).encode())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


def whole_numbers(ids: Any) -> list[int]:
    """Ids as a flat list of Python's integers; TypeError if they are anything else."""
    found = ids.tolist() if hasattr(ids, "tolist") else ids
    try:
        found = list(found) if isinstance(found, Iterable) else [found]
        return found if set(map(type, found)) <= {int} else [operator.index(i) for i in found]
    except TypeError:
        raise TypeError(f"decode: expected a flat list of whole numbers, got {ids!s:.60}") from None


# %% [markdown]
# **Decoding as tokens arrive.** A character's bytes may come in several tokens. UTF-8 says in its first byte how many
# follow, so a decoder knows when a character is still open and holds it back; Python's `codecs` has such decoders.


# %%
class Stream:
    """Turns ids into text one by one: all that is certain so far, and never half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text that this token completes; empty while a character is open."""
        return self._decoder.decode(self.tokenizer.token_bytes(id))

    def finish(self) -> str:
        """What is left when no more will come: U+FFFD for a character that stays open, else nothing."""
        return self._decoder.decode(b"", final=True)


# %% [markdown]
# ### Characters
# The simplest vocabulary: each character that the training text has, in order.


# %%
class CharTokenizer(Tokenizer):
    """A token for each of some characters, in the order of their code points."""

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = sorted(set(characters))
        for character in self.characters:
            if len(character) != 1:
                raise ValueError(f"CharTokenizer: expected single characters, got {character!r}")
        super().__init__(to_bytes(character) for character in self.characters)
        self._ids = {character: id for id, character in enumerate(self.characters)}

    @classmethod
    def train(cls, text: str) -> CharTokenizer:
        """A token for each character that a text has."""
        return cls(text)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; ValueError for characters that the vocabulary lacks."""
        try:
            return list(map(self._ids.__getitem__, text))
        except KeyError:
            unknown = sorted(set(text) - set(self.characters))
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise ValueError(
                f"CharTokenizer: the text has {', '.join(map(repr, unknown[:10]))}{more}, which the vocabulary lacks; "
                f"its {self.vocab_size} characters are {''.join(self.characters)!r:.200}"
            ) from None

    def to_json(self) -> dict[str, Any]:
        """As a model of whole words, after a cut around every character."""
        model = {"type": "WordLevel", "vocab": dict(self._ids), "unk_token": ""}
        return tokenizer_json(model, split_at(r"[\s\S]"), {"type": "Fuse"})


def to_bytes(text: str) -> bytes:
    """A text as UTF-8; ValueError for half of a surrogate pair, which is no character."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has U+{ord(text[error.start]):X}, half of a surrogate pair, which UTF-8 cannot write; read it "
            'with errors="replace", or join the halves: text.encode("utf-16", "surrogatepass").decode("utf-16")'
        ) from None


def split_at(pattern: str) -> dict[str, Any]:
    """A pre-tokenizer of `tokenizers`: each match of a regular expression, and what lies between two, is a chunk."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def tokenizer_json(model: dict, pre_tokenizer: dict, decoder: dict, added_tokens: Sequence[dict] = ()) -> dict:
    """The layout of a tokenizer.json."""
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added_tokens),
            "normalizer": None, "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder,
            "model": model}  # fmt: skip


def test_characters_have_ids_in_order() -> None:
    tokenizer = CharTokenizer.train("to be or not")
    assert "".join(tokenizer.characters) == " benort"
    assert tokenizer.encode("nob") == [3, 4, 1]
    assert tokenizer.decode(tensor([3, 4, 1])) == "nob"
    assert "the text has 'a', 'é', which" in message_of(tokenizer.encode, "éta", error=ValueError)
    assert "none with the ids [7, -1]" in message_of(tokenizer.decode, [3, 7, -1], error=ValueError)
    assert "U+D83D" in message_of(CharTokenizer, "\ud83d", error=ValueError)


# %% [markdown]
# ### Byte-pair encoding as it is meant
# Five lines each: count the pairs, replace one, train, encode. `ids` is a chunk; bytes are the ids 0 to 255. This is
# how Karpathy's minbpe does it, and it is right; but each merge reads the whole text again.

# %%
Pair = tuple[int, int]


def replace_pair(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    """The ids with each `pair`, from the left, replaced by one new id: (1, 2, 1, 2, 3), (1, 2), 9 -> [9, 9, 3]."""
    replaced: list[int] = []
    for id in ids:
        if replaced and (replaced[-1], id) == pair:
            replaced[-1] = new
        else:
            replaced.append(id)
    return replaced


def train_plainly(chunks: Iterable[Sequence[int]], size: int) -> list[Pair]:
    """Up to size - 256 merges: time after time, the commonest pair of neighbours in all chunks."""
    merges: list[Pair] = []
    while 256 + len(merges) < size:
        counts = Counter(pair for ids in chunks for pair in pairwise(ids))
        if not counts:
            break
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        chunks = [replace_pair(ids, merges[-1], 255 + len(merges)) for ids in chunks]
    return merges


def ranks_of(merges: Iterable[Pair]) -> dict[Pair, int]:
    return {pair: rank for rank, pair in enumerate(merges)}


def encode_plainly(ids: Sequence[int], ranks: Mapping[Pair, int]) -> list[int]:
    """The tokens of a chunk: as long as there is a pair with a merge, carry out the earliest."""
    while found := [pair for pair in pairwise(ids) if pair in ranks]:
        first = min(found, key=ranks.__getitem__)
        ids = replace_pair(ids, first, 256 + ranks[first])
    return list(ids)


def test_the_commonest_pair_is_merged() -> None:
    # Wikipedia's example: ZabdZabac, then ZYdZYac with Y = ab, then XdXac
    merges = train_plainly([b"aaabdaaabac"], 259)
    assert merges == [(97, 97), (97, 98), (256, 257)]
    assert encode_plainly(b"aaabdaaabac", ranks_of(merges)) == [258, 100, 258, 97, 99]
    assert encode_plainly(b"aaaab", ranks_of(merges)) == [256, 256, 98]
    assert encode_plainly(b"abcbaab", {(98, 99): 0, (97, 98): 1}) == [97, 256, 98, 97, 257]  # by rank, not by place


# %% [markdown]
# ### Training fast
# The chunks stand in one row, as linked lists: to merge, a place takes over its right neighbour's content, and the
# neighbour drops out. Two dictionaries say how often a pair occurs and where. A merge then visits the places of its
# pair and corrects the counts of the neighbours there; everything else stays as it was.
#
# The commonest pair comes from a heap. Counts change under it, so an entry may be out of date; but a pair that exists
# only ever gets rarer (new ones contain the new token), so an entry is at worst too high, and it is enough to look when
# it comes up: if it is out of date, it goes back with its true count.

# %%
END, GONE = -1, -2  # after each chunk; and where a token was merged into its left neighbour


class Chains:
    """Chunks as linked lists, and for each pair of neighbours its count and its places.

    Args:
        chunks: each as ids, with how often it occurs.
    """

    def __init__(self, chunks: Iterable[tuple[Iterable[int], int]]) -> None:
        self.ids, self.times = list[int](), list[int]()
        for chunk, times in chunks:
            start = len(self.ids)
            self.ids += chunk
            self.ids.append(END)
            self.times += [times] * (len(self.ids) - start)
        self.right = list(range(1, len(self.ids) + 1))
        self.left = list(range(-1, len(self.ids) - 1))  # before the first stands ids[-1], which is an END
        self.counts, self.places = defaultdict[Pair, int](int), defaultdict[Pair, list[int]](list)
        for place, pair in enumerate(pairwise(self.ids)):
            if END not in pair:
                self.counts[pair] += self.times[place]
                self.places[pair].append(place)

    def merge(self, pair: Pair, new: int) -> Iterable[Pair]:
        """Replace a pair by a new token wherever it stands; the pairs that this makes."""
        ids, left, right, counts = self.ids, self.left, self.right, self.counts
        a, b = pair
        made = defaultdict[Pair, list[int]](list)
        for place in self.places.pop(pair):
            gone = right[place]
            if ids[place] != a or ids[gone] != b:
                continue  # of three a's in a row, the first two are merged
            before, after, times = left[place], right[gone], self.times[place]
            ids[place], ids[gone] = new, GONE
            right[place], left[after] = after, place
            if (x := ids[before]) != END:
                counts[x, a] -= times
                counts[x, new] += times
                made[x, new].append(before)
            if (x := ids[after]) != END:
                counts[b, x] -= times
                counts[new, x] += times
                made[new, x].append(place)
        self.places.update(made)
        return made


def train_merges(chunks: Mapping[bytes, int], size: int, progress: bool = False) -> list[Pair]:
    """As `train_plainly`, of chunks with counts, and fast. `progress` shows a bar if it takes longer than 2 seconds."""
    chains, merges = Chains(chunks.items()), list[Pair]()
    heap = [(-count, pair) for pair, count in chains.counts.items()]
    heapify(heap)
    for new in shown(range(256, size), "merges", progress):
        while heap and heap[0][0] != -chains.counts[heap[0][1]]:
            _, pair = heappop(heap)
            if chains.counts[pair] > 0:
                heappush(heap, (-chains.counts[pair], pair))
        if not heap:
            break
        _, pair = heappop(heap)
        merges.append(pair)
        for made in chains.merge(pair, new):
            if chains.counts[made] > 0:
                heappush(heap, (-chains.counts[made], made))
    return merges


def shown(steps: range, name: str, progress: bool) -> Iterator[int]:
    """The steps, with a bar for those that are left after two seconds."""
    start = time.perf_counter()
    for step in steps:
        if progress and time.perf_counter() - start > 2:
            from rich.progress import track

            yield from track(range(step, steps.stop), name, transient=True)
            return
        yield step


def test_fast_training_is_plain_training() -> None:
    draw = random.Random(11)
    for letters in ("a", "ab", "abc", "abcdefgh "):
        chunks = [bytes(ord(draw.choice(letters)) for _ in range(draw.randint(1, 40))) for _ in range(30)]
        merges = train_merges(Counter(chunks * 2), 330)
        assert merges == train_plainly(chunks * 2, 330)
        assert len(merges) > 4


# %% [markdown]
# ### Encoding fast
# Most chunks are short, and most have come before: a dictionary remembers their tokens. A new short chunk keeps the
# rank of each pair in a list beside its ids; `min` and `index` run in C, and a merge changes three ranks.
#
# For a long chunk, such as a megabyte without a space, that would be quadratic. It is merged as in training: linked
# lists, and for each rank the places where its pair stands; a heap says which rank comes next. A merge makes pairs of
# later rank as a rule. If a file's merges stand in an odd order it can make one of an earlier rank, which must go
# first; then the places that are left wait.

# %%
NEVER = 1 << 62  # the rank of a pair without a merge


class Merges:
    """What pairs become: for each pair its rank, and for each rank its pair and the new token."""

    def __init__(self, pairs: Sequence[Pair], products: Sequence[int]) -> None:
        self.pairs, self.products = pairs, products
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}

    def apply(self, ids: Sequence[int]) -> list[int]:
        """The tokens of a chunk."""
        return self.apply_short(ids) if len(ids) < 128 else self.apply_long(ids)

    def apply_short(self, ids: Sequence[int]) -> list[int]:
        ids, rank_of = list(ids), self.ranks.get
        ranks = [rank_of(pair, NEVER) for pair in pairwise(ids)]
        while ranks and (rank := min(ranks)) != NEVER:
            i = ranks.index(rank)
            ids[i : i + 2] = [self.products[rank]]
            del ranks[i]
            if i > 0:
                ranks[i - 1] = rank_of((ids[i - 1], ids[i]), NEVER)
            if i < len(ranks):
                ranks[i] = rank_of((ids[i], ids[i + 1]), NEVER)
        return ids

    def apply_long(self, ids: Sequence[int]) -> list[int]:
        ids = [*ids, END]
        right, left = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
        rank_of, places = self.ranks.get, defaultdict[int, list[int]](list)
        for place, pair in enumerate(pairwise(ids)):
            if (rank := rank_of(pair)) is not None:
                places[rank].append(place)
        heap = list(places)
        heapify(heap)
        while heap:
            rank = heappop(heap)
            (a, b), new, waiting = self.pairs[rank], self.products[rank], iter(sorted(places.pop(rank)))
            made = defaultdict[int, list[int]](list)
            for place in waiting:
                gone = right[place]
                if ids[place] != a or ids[gone] != b:
                    continue
                before, after = left[place], right[gone]
                ids[place], ids[gone] = new, GONE
                right[place], left[after] = after, place
                for start, pair in ((before, (ids[before], new)), (place, (new, ids[after]))):
                    if (later := rank_of(pair)) is not None:
                        made[later].append(start)
                        if later < rank:
                            made[rank] += waiting
            for later, starts in made.items():
                if later not in places:
                    heappush(heap, later)
                places[later] += starts
        return [id for id in ids if id >= 0]


def test_fast_encoding_is_plain_encoding() -> None:
    draw = random.Random(12)
    merges = train_merges(Counter({b"abababcabcaaaabbbb": 3, b"bcbcbcaaaacab": 2}), 280)
    odd = [*merges[::2], *merges[1::2]]
    for order in (merges, odd):
        rules = Merges(order, [256 + merges.index(pair) for pair in order])
        for length in (1, 2, *[7] * 20, 30, 200):
            ids = [draw.choice(b"abcd") for _ in range(length)]
            assert rules.apply_short(ids) == rules.apply_long(ids)
            assert order is odd or rules.apply_long(ids) == encode_plainly(ids, ranks_of(merges))


# %% [markdown]
# ### Chunks
# GPT-2's pattern cuts before words, with their leading space, and apart from digits and punctuation; of several spaces
# the last goes to the word that follows. GPT-4's takes three digits at most, whatever one sign before a word, and line
# breaks together. A pattern of one's own may leave gaps; they are chunks too, or text would get lost.

# %%
PATTERNS = {
    "gpt2": r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "gpt4": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
            r"""\s*[\r\n]+|\s+(?!\S)|\s+""",
    "none": r"[\s\S]+",
}  # fmt: skip


def compiled(pattern: str) -> Any:
    """A pattern by name, or of a regular expression."""
    try:
        return regex.compile(PATTERNS.get(pattern, pattern))
    except regex.error as error:
        message = f"pattern {pattern!r} is none of {', '.join(PATTERNS)}, and no regular expression: {error}"
        raise ValueError(f"BPETokenizer: {message}") from None


def cut(pattern: Any, text: str) -> list[str]:
    """All of a text in chunks: what a compiled pattern matches, and what lies between two matches."""
    chunks = [] if pattern.groups else pattern.findall(text)
    if sum(map(len, chunks)) == len(text):
        return chunks
    ends = [0, *(end for match in pattern.finditer(text) for end in match.span()), len(text)]
    return [text[start:end] for start, end in pairwise(ends) if start < end]


@lru_cache(64)
def finder(names: frozenset[str]) -> Any:
    """What splits a text at special tokens, and keeps them; the longest goes first."""
    return regex.compile(f"({'|'.join(map(regex.escape, sorted(names, key=len, reverse=True)))})")


def test_chunks() -> None:
    text, joined = "I'll pay  $1234 now\n\n ok", "|".join
    assert joined(cut(compiled("gpt2"), text)) == "I|'ll| pay| | $|1234| now|\n\n| ok"
    assert joined(cut(compiled("gpt4"), text)) == "I|'ll| pay| | $|123|4| now|\n\n| ok"
    assert [cut(compiled(pattern), "ab12c") for pattern in (r"\d", r"(\d)")] == [["ab", "1", "2", "c"]] * 2


# %% [markdown]
# ### The tokenizer
# The ids 0 to 255 are the bytes, in GPT-2's order: those first that show as a sign in print. Files show the others as
# signs, too, from U+0100 on, so that a token never holds a space. After the bytes come the merges, and then special
# tokens. What a user writes must not end a document, so encoding takes their names for ordinary text unless it is told
# otherwise.

# %%
PRINTED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTES = bytes(PRINTED) + bytes(sorted(set(range(256)) - set(PRINTED)))  # by id
BYTE_IDS = bytes(sorted(range(256), key=BYTES.__getitem__))
SIGNS = {byte: chr(byte if id < len(PRINTED) else 256 + id - len(PRINTED)) for id, byte in enumerate(BYTES)}


class BPETokenizer(Tokenizer):
    """Byte-pair encoding of bytes: every text has ids, and decodes to itself.

    Args:
        merges: pairs of ids; each makes the next id, from 256 on, unless its bytes are a token already.
        special_tokens: names, which get the ids after the merges; or a mapping from names to ids.
        pattern: what cuts text into chunks: "gpt2", "gpt4", "none" (all of it is one chunk), or a regular expression
            for the package `regex`.
        tokens: for files that number otherwise: the bytes of each id, which `merges` then refers to.
        always: those of the special tokens that are recognised whatever `encode` is told.
        ignore_merges: whether a chunk that is a token gets that id, whatever the merges make of it (as in Llama 3).
        add_prefix_space: whether a text without a space at its beginning is encoded with one; with "gpt2" or "none".

    Raises:
        ValueError: for a merge of ids that are not there yet, special tokens that are empty, double or on the place of
            another token, a vocabulary that lacks bytes, and a pattern that is no regular expression.
    """

    CACHE = 1 << 16  # so many chunks are remembered before it starts anew

    def __init__(
        self, merges: Iterable[Pair], special_tokens: Iterable[str] | Mapping[str, int] = (), pattern: str = "gpt2", *,
        tokens: Iterable[bytes | None] | None = None, always: Iterable[str] = (), ignore_merges: bool = False,
        add_prefix_space: bool = False,
    ) -> None:  # fmt: skip
        table: list[bytes | None] = list(tokens or [bytes([byte]) for byte in BYTES])
        self._ids = {token: id for id, token in enumerate(table) if token is not None}
        if lacking := [byte for byte in range(256) if bytes([byte]) not in self._ids]:
            raise ValueError(f"BPETokenizer: the vocabulary lacks {len(lacking)} of the 256 bytes: {lacking[:10]}")
        self._byte_ids = [self._ids[bytes([byte])] for byte in range(256)]
        self.merges, products = [(a, b) for a, b in merges], []
        for number, pair in enumerate(self.merges):
            a, b = (table[id] if 0 <= id < len(table) else None for id in pair)
            if a is None or b is None:
                raise ValueError(f"BPETokenizer: merge {number} joins {pair}, but there are {len(table)} tokens so far")
            if a + b not in self._ids:
                self._ids[a + b] = len(table)
                table.append(a + b)
            products.append(self._ids[a + b])
        self._merges = Merges(self.merges, products)
        self.special_tokens = enter_special_tokens(table, special_tokens)
        self.always, self.ignore_merges = frozenset(always).intersection(self.special_tokens), ignore_merges
        self.pattern, self.add_prefix_space = pattern, add_prefix_space
        if add_prefix_space and pattern not in ("gpt2", "none"):
            raise ValueError(f'BPETokenizer: add_prefix_space goes with pattern "gpt2" or "none", not {pattern!r}')
        self._pattern, self._cache = compiled(pattern), dict[str, list[int]]()
        self.post_processor: dict | None = None  # what a file has there, for saving it again
        super().__init__(table)

    @classmethod
    def train(
        cls, text: str | Iterable[str], vocab_size: int, special_tokens: Iterable[str] = (), pattern: str = "gpt2",
        progress: bool = False,
    ) -> BPETokenizer:  # fmt: skip
        """Learn the merges of a text, or of several.

        The merges are those of `tokenizers.trainers.BpeTrainer(vocab_size, min_frequency=0, initial_alphabet=
        ByteLevel.alphabet())`: the commonest pair, of equally common ones that with the smaller ids, down to pairs that
        occur once. Special tokens count towards `vocab_size`; their names in the text are text. A text with fewer pairs
        makes a smaller vocabulary.

        `progress` shows a bar if it takes longer than two seconds.
        """
        special_tokens = list(special_tokens)
        if vocab_size < 256 + len(special_tokens):
            least = f"256 bytes and {len(special_tokens)} special tokens"
            raise ValueError(f"BPETokenizer.train: vocab_size must have room for {least}; {vocab_size} is too small")
        counts = Counter[str]()
        for part in [text] if isinstance(text, str) else text:
            counts.update(cut(compiled(pattern), part))
        chunks = {to_bytes(chunk).translate(BYTE_IDS): count for chunk, count in counts.items()}
        return cls(train_merges(chunks, vocab_size - len(special_tokens), progress), special_tokens, pattern)

    def encode(self, text: str, allowed_special: str | Collection[str] = "none") -> list[int]:
        """The ids of a text. Special tokens are recognised by name if allowed ("all", "none" or some), or else text."""
        if not isinstance(text, str):
            raise TypeError(f"encode: expected a str, got {type(text).__name__}")
        if not (names := self._recognised(allowed_special)):
            return self._encode_text(text)
        ids = list[int]()
        for i, part in enumerate(finder(names).split(text)):
            ids += [self.special_tokens[part]] if i % 2 else self._encode_text(part)
        return ids

    def _recognised(self, allowed: str | Collection[str]) -> frozenset[str]:
        if isinstance(allowed, str):
            if allowed not in ("none", "all"):
                raise ValueError(f'encode: allowed_special is "none", "all" or a set of names, not {allowed!r}')
            allowed = self.special_tokens if allowed == "all" else ()
        if unknown := sorted(set(allowed) - self.special_tokens.keys()):
            raise ValueError(f"encode: no special tokens {unknown}; there are {sorted(self.special_tokens)}")
        return self.always.union(allowed)

    def _encode_text(self, text: str) -> list[int]:
        if self.add_prefix_space and text and text[0] != " ":
            text = f" {text}"
        ids, cached = list[int](), self._cache.get
        for chunk in cut(self._pattern, text):
            ids += cached(chunk) or self._encode_chunk(chunk)
        return ids

    def _encode_chunk(self, chunk: str) -> list[int]:
        data = to_bytes(chunk)
        if self.ignore_merges and data in self._ids:
            ids = [self._ids[data]]
        else:
            ids = self._merges.apply([self._byte_ids[byte] for byte in data])
        if len(self._cache) >= self.CACHE:
            self._cache.clear()
        if len(chunk) <= 64:
            self._cache[chunk] = ids
        return ids

    def to_json(self) -> dict[str, Any]:
        """Readable for `tokenizers` from 0.9 on; there, special tokens are always recognised."""
        specials = {id: name for name, id in self.special_tokens.items()}
        signs = {id: visible(token) for token, id in self._ids.items()}
        model = {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": self.ignore_merges,
            "vocab": {token: id for id, token in sorted((signs | specials).items())},
            "merges": [f"{signs[a]} {signs[b]}" for a, b in self.merges],
        }  # fmt: skip
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        added = [{"id": id, "content": name, **flags, "special": name not in self.always}
                 for id, name in sorted(specials.items())]  # fmt: skip
        level = {"type": "ByteLevel", "add_prefix_space": self.add_prefix_space, "trim_offsets": True}
        cutter = level | {"use_regex": self.pattern == "gpt2"}
        if self.pattern not in ("gpt2", "none"):
            split = split_at(PATTERNS.get(self.pattern, self.pattern))
            cutter = {"type": "Sequence", "pretokenizers": [split, cutter]}
        return tokenizer_json(model, cutter, level | {"use_regex": True}, added) | {
            "post_processor": self.post_processor
        }


def visible(token: bytes) -> str:
    """A token as files show it: a sign for each byte."""
    return token.decode("latin-1").translate(SIGNS)


def enter_special_tokens(table: list[bytes | None], given: Iterable[str] | Mapping[str, int]) -> dict[str, int]:
    """Give special tokens their places in the table of tokens; their ids by name."""
    names = list(given)
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"BPETokenizer: special tokens must be different and not empty, got {names}")
    if both := set(names) & {visible(token) for token in table if token is not None}:
        raise ValueError(f"BPETokenizer: {sorted(both)} cannot be special, being ordinary tokens")
    ids = dict(given) if isinstance(given, Mapping) else {name: len(table) + i for i, name in enumerate(names)}
    for name, id in ids.items():
        table += [None] * (id + 1 - len(table))
        if id < 0 or table[id] is not None:
            raise ValueError(f"BPETokenizer: special token {name!r} cannot have the id {id}, which is taken")
        table[id] = to_bytes(name)
    return ids


def test_every_text_comes_back() -> None:
    tokenizer = BPETokenizer.train("the cat and the hat " * 9, 270, ["<|end|>"])
    assert [tokenizer.id_to_token(id) for id in tokenizer.encode("the that!")] == ["the", " ", "t", "hat", "!"]
    for text in ("", "né, 日本 \x00 \U0001f642", "the<|end|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    end = tokenizer.special_tokens["<|end|>"]
    assert end == tokenizer.vocab_size - 1
    assert end not in tokenizer.encode("a<|end|>")
    assert tokenizer.encode("a<|end|>", allowed_special="all") == [*tokenizer.encode("a"), end]


def test_a_stream_never_shows_half_a_character() -> None:
    tokenizer = BPETokenizer([])
    ids, stream = tokenizer.encode("é€!"), tokenizer.stream()
    assert [stream.feed(id) for id in ids] == ["", "é", "", "", "€", "!"]
    broken = [stream.feed(ids[0]), stream.feed(ids[5]), stream.feed(ids[0]), stream.finish()]
    assert broken == ["", "\ufffd!", "", "\ufffd"]
    assert tokenizer.id_to_token(ids[0]) == "\\xc3"


def test_the_file_is_that_of_tokenizers() -> None:
    with tempfile.TemporaryDirectory() as folder:
        BPETokenizer.train("low lower lowest", 258, ["<end>"]).save(folder)
        content = json.loads(Path(folder, "tokenizer.json").read_bytes())
    ids = content["model"]["vocab"]
    assert content["model"]["merges"] == ["l o"]
    assert (ids["!"], ids["Ġ"], ids["lo"], ids["<end>"]) == (0, 220, 256, 257)
    assert [(token["content"], token["id"]) for token in content["added_tokens"]] == [("<end>", 257)]


# %% [markdown]
# ### Windows
# A language model learns to say, after each token of a window, which comes next: the window moved on by one. All ids
# stand in one long tensor, and a batch is gathered from it at once, as module 10 wants it.


# %%
class TokenWindows(Dataset):
    """Windows of a long row of ids: example i is (ids[s : s + length], ids[s + 1 : s + length + 1]), s = i · stride.

    Args:
        ids: list, integer array or tensor; kept as one int64 tensor.
        length: tokens in a window.
        stride: how far apart windows begin: 1 for all there are, `length` for those that do not overlap.
    """

    def __init__(self, ids: Any, length: int, stride: int = 1) -> None:
        self.ids = ids.to(int64) if isinstance(ids, Tensor) else tensor(ids, dtype=int64)
        self.length, self.stride = operator.index(length), operator.index(stride)
        if self.ids.ndim != 1 or min(self.length, self.stride) < 1 or len(self.ids) <= self.length:
            got = f"ids of shape {self.ids.shape}, length {length}, stride {stride}"
            raise ValueError(f"TokenWindows: expected a row of more than `length` ids, and both >= 1, got {got}")

    def __len__(self) -> int:
        return (len(self.ids) - self.length - 1) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.get_batch([index])
        return inputs[0], targets[0]

    def get_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Windows (B, length), and the same moved on by one."""
        xp = get_backend("cpu")
        chosen = xp.asarray(indices, dtype=xp.dtype("int64"))
        starts = xp.where(chosen < 0, chosen + len(self), chosen)
        if bool(xp.any((starts < 0) | (starts >= len(self)))):
            raise IndexError(f"TokenWindows: there are {len(self)} windows, got the numbers {chosen.tolist()}")
        windows = self.ids[starts[:, None] * self.stride + xp.arange(self.length + 1)]
        return windows[:, :-1], windows[:, 1:]


def test_targets_are_inputs_moved_on_by_one() -> None:
    data = TokenWindows(range(10, 20), 4)
    assert len(data) == 6
    inputs, targets = next(iter(DataLoader(data, batch_size=6, shuffle=True, seed=1)))
    assert (targets - inputs).tolist() == [[1] * 4] * 6
    assert sorted(inputs[:, 0].tolist()) == [10, 11, 12, 13, 14, 15]
    assert [part.tolist() for part in data[-1]] == [[15, 16, 17, 18], [16, 17, 18, 19]]
    assert TokenWindows(range(10), 3, stride=3).get_batch([0, 2])[0].tolist() == [[0, 1, 2], [6, 7, 8]]


# %% [markdown]
# ## Systems analysis
#
# How far apart are the plain version and the fast one, and what does a larger vocabulary buy? The text is a made-up
# language of 3,000 words, with Zipf's frequencies, so that the figures need no file. The last table shows why long
# chunks go another way.


# %%
def made_up_text(length: int, seed: int = 0) -> str:
    """Words of syllables, the n-th commonest with a frequency of 1 / n, in lines."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bcdfghklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "ing")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(3000)]
    chosen = draw.choices(words, [1 / n for n in range(1, 3001)], k=length // 4)
    return " ".join(word + draw.choice(["", "", "", "", ",", ".\n"]) for word in chosen)[:length]


def analyze() -> None:
    """Measure training and encoding, plain and fast; tokens and bytes a token by vocabulary; and one long chunk."""
    text = made_up_text(1_000_000)
    part, rows = text[:20_000], list[list]()
    counts = Counter(chunk.encode().translate(BYTE_IDS) for chunk in cut(compiled("gpt2"), part))
    each, merges = list(counts.elements()), train_merges(counts, 512)
    ranks = ranks_of(merges)
    plain = (
        seconds(train_plainly, each, 512, repeat=1),
        seconds(lambda: [encode_plainly(chunk, ranks) for chunk in each]),
    )
    fast = seconds(train_merges, counts, 512), seconds(lambda: BPETokenizer(merges).encode(part))
    for name, slow, quick in zip(("training 256 merges", "encoding"), plain, fast, strict=True):
        rows.append([f"{name}, 20 kB", slow, quick, slow / quick])
    print_table(["", "plain, s", "fast, s", "times"], rows)
    rows = []
    for size in (256, 512, 1024, 2048, 4096):
        start = time.perf_counter()
        tokenizer = BPETokenizer.train(text, size)
        trained = time.perf_counter()
        ids = tokenizer.encode(text)
        rate = len(text) / (time.perf_counter() - trained) / 1e6
        rows.append([size, trained - start, rate, len(ids), len(text) / len(ids), size * 256 * 4 / 2**20])
    print_table(["tokens", "training, s", "encoding, MB/s", "length", "bytes a token", "table of 256, MiB"], rows)
    merger, rows = BPETokenizer.train(text, 1024)._merges, []
    for length in (8, 16, 64, 256, 1024, 4096):
        chunk = text.replace(" ", "").encode().translate(BYTE_IDS)[:length]
        times = (seconds(apply, chunk) for apply in (merger.apply_short, merger.apply_long))
        rows.append([length, *(1e9 * t / length for t in times)])
    print_table(["bytes in a chunk", "ns a byte: by min", "by lists and heap"], rows)


# %% [markdown]
# ## Production context
#
# GPT-2, GPT-4 and Llama 3 use byte-level BPE as it stands here. The libraries are `tokenizers` and, for encoding only,
# `tiktoken`, both in Rust; they keep ranks in a hash table and split with a regular expression, as here. `tiktoken` has
# no list of merges: a pair may merge if its bytes are a token, whose id is the rank. For merges that were trained this
# is the same. SentencePiece (Llama 2, T5) merges characters, falls back to bytes, and treats the space as a letter;
# WordPiece (BERT) counts differently; Unigram goes the other way, from many tokens to fewer. Left out: those, dropout
# of merges, normalisation (NFC), and where in the text a token stands.

# %% [markdown]
# ## Integration testing
#
# A text is encoded, written, cut into windows by a loader with workers, and comes back from the targets as it was.


# %%
def test_text_goes_through_a_loader_and_comes_back() -> None:
    text = made_up_text(3000, seed=3)
    for tokenizer in (CharTokenizer.train(text), BPETokenizer.train(text, 400)):
        ids = tokenizer.encode(text)
        loader = DataLoader(TokenWindows(ids, 16, stride=16), batch_size=4, num_workers=2)
        targets = [id for _, batch in loader for row in batch.tolist() for id in row]
        stream = tokenizer.stream()
        found = "".join(map(stream.feed, targets)) + stream.finish()
        assert found == text[len(tokenizer.decode(ids[0])) :][: len(found)]
        assert len(targets) > len(ids) - 18


# %% [markdown]
# ## Thinking questions
#
# 1. From the second table: by what factor does attention get cheaper from 512 to 4,096 tokens, and what do the two
#    tables of 256 dimensions cost? Where would you stop for a model of one million parameters?
# 2. A model writes one token at a time. Why must a chat program not print `decode([id])` of each?
# 3. "12345" is one token, "12346" two. What does that mean for sums, and what does GPT-4's pattern do about it?
# 4. Thai has no spaces between words. What are its chunks under GPT-2's pattern, and what does that do to its tokens?

# %% [markdown]
# ## Summary
#
# Text becomes bytes, bytes become tokens by the merges that training found, and every text comes back as it was. What
# took a pass over the text for each merge takes visits to the places that change. The ids have no meaning yet: 17 is
# not nearer to 18 than to 400. Module 12 gives each a vector.


if __name__ == "__main__":
    run_module(globals())
