"""What a language model writes: `tinytorch generate runs/tinygpt`."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import tinytorch.m14_transformers_appendix
import tinytorch.m19_caching  # noqa: F401 - a cache as it writes
from tinytorch.m11_tokenization import Tokenizer
from tinytorch.m11_tokenization_appendix import load_tokenizer
from tinytorch.m14_transformers import GPT, GPTConfig
from tinytorch.m14_transformers_appendix import unset_model  # and it gives GPT from_pretrained
from tinytorch.milestones.program import UsageError, default_device
from tinytorch.milestones.quantized import FILE, read_quantized
from tinytorch.quantization import load_quantized

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\ufffd"  # shown for an id that the model has and the tokenizer lacks


@dataclass(frozen=True)
class Writer:
    """A language model and its tokenizer.

    Attributes:
        begin: the tokens that each prompt is put behind.
        stops: the tokens that end a text.
    """

    model: GPT
    tokenizer: Tokenizer
    begin: Sequence[int] = ()
    stops: frozenset[int] = frozenset()

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt; for an empty one, something to begin with. UsageError where there are none."""
        try:
            ids = [*self.begin, *(self.tokenizer.encode(prompt) if prompt else ())]
        except ValueError as error:
            raise UsageError(f"--prompt: {error}") from error
        ids = ids or first_tokens(self.tokenizer)
        if max(ids) >= self.model.config.vocab_size:
            raise UsageError(f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model "
                             f"{self.model.config.vocab_size}: they do not belong together")  # fmt: skip
        return ids

    def ids(self, prompt: str, tokens: int, **choices: Any) -> Iterator[int]:
        """The tokens that the model writes behind a prompt, each as soon as it is made, up to one that ends the text.

        Args:
            choices: as `GPT.stream` takes them; ValueError for one that is out of range.
        """
        made = self.model.stream(self.encode(prompt), tokens, **choices)
        return takewhile(lambda id: id not in self.stops, made)

    def decoded(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of each token; an empty one where a character is not complete yet."""
        decoder = self.tokenizer.stream()
        for id in ids:
            try:
                yield decoder.feed(id)
            except ValueError:  # a vocabulary is often padded to a round number
                yield UNKNOWN
        yield decoder.finish()


def first_tokens(tokenizer: Tokenizer) -> list[int]:
    """What a text begins behind: the mark at a document's end, if there is one, else a newline, else any token."""
    special = getattr(tokenizer, "special_tokens", {})
    if END_OF_TEXT in special:
        return [special[END_OF_TEXT]]
    try:
        return tokenizer.encode("\n")
    except ValueError:
        return [0]


def load_writer(folder: str | os.PathLike) -> Writer:
    """The language model of a folder: that of the milestone, or a GPT-2 or Llama of Hugging Face's.

    UsageError, which says what is missing, if there is none.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no language model (config.json, model.safetensors); {advice_for(folder)}")
    try:
        model = load_small(folder) if (folder / FILE).is_file() else GPT.from_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    begin, end = entries.get("bos_token_id"), entries.get("eos_token_id")
    llama = isinstance(begin, int) and entries.get("model_type") == "llama"  # GPT-2 begins without
    stops = frozenset(id for id in (end if isinstance(end, list) else [end]) if isinstance(id, int))
    return Writer(model, tokenizer, (begin,) if llama else (), stops)


def load_small(folder: Path) -> GPT:
    """The language model that `tinytorch quantize` left in a folder."""
    state, about = read_quantized(folder)
    if "gpt" not in about:
        raise UsageError(f"{folder} holds a quantized network that is no language model")
    model: Any = load_quantized(unset_model(GPT, GPTConfig(**about["gpt"])), state)
    return model


def advice_for(folder: Path) -> str:
    """What to do where a folder holds no language model."""
    if (folder / "unfinished").is_dir():
        return "its run is not finished: go on with tinytorch milestone run tinygpt --resume"
    trained = sorted(str(path.parent) for path in folder.parent.glob("*/tokenizer.json"))
    return f"there is one in {', '.join(trained)}" if trained else "train one: tinytorch milestone run tinygpt"


def read_prompt(given: str) -> str:
    """A prompt from the command line; "-" stands for standard input."""
    if given != "-":
        return given
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt -: what came in is not UTF-8, at byte {error.start:,}") from error


def generate(
    run: Path, prompt: str = "", tokens: int = 300, seed: int | None = None, as_json: bool = False,
    device: str | None = None, **choices: Any,
) -> None:  # fmt: skip
    """Print what the model of a folder writes behind a prompt, each piece as soon as it is made; or all of it as JSON.

    Without a seed it takes one by chance, and says which. UsageError where it cannot do what it was asked.
    """
    with default_device(device):
        writer, prompt = load_writer(run), read_prompt(prompt)
        number = secrets.randbelow(1 << 31) if seed is None else seed
        try:
            ids = writer.ids(prompt, tokens, seed=number, **choices)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if as_json:
            print(json.dumps(described(writer, prompt, ids, number), indent=2))
            return
        if seed is None:
            print(f"seed {number}", file=sys.stderr)
        try:
            print_pieces(chain([prompt], writer.decoded(ids)))
        except BrokenPipeError:  # who reads this has had enough; nothing is left to be said at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_pieces(pieces: Iterable[str]) -> None:
    """Print a text as it comes. Its last line is ended, also where it is cut short."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack some characters
    last = "\n"
    try:
        for piece in filter(None, pieces):
            last = piece
            print(piece, end="", flush=True)
    finally:
        if not last.endswith("\n"):
            print(flush=True)


def described(writer: Writer, prompt: str, ids: Iterable[int], seed: int) -> dict[str, Any]:
    """What a model writes, and how fast."""
    started, made = time.perf_counter(), list(ids)
    rate = len(made) / (time.perf_counter() - started)
    text = "".join(writer.decoded(made))
    return {"prompt": prompt, "text": text, "tokens": len(made), "seed": seed, "tokens_per_second": round(rate, 1)}
