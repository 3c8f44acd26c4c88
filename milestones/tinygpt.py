"""The transformer, 2017: a network that looks at everything before, and learns to write from text alone.

Ashish Vaswani and seven others left recurrence out in "Attention is all you need": every place of a text looks at every
other at once. In 2018 Alec Radford and others trained only the half that writes, on nothing but text, and called it
GPT. This one has the sizes that Andrej Karpathy's nanoGPT takes for a processor without a GPU. It reads 12 pieces of 64
characters a step, and after a minute or two writes what looks like the text that it learned, from a distance.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import tinytorch
import tinytorch.m14_transformers_appendix  # gives GPT save_pretrained
from tinytorch import Tensor, Trainer, optim
from tinytorch.datasets import PythonDocs, Shakespeare, TextFile
from tinytorch.m01_setup import atomic_write
from tinytorch.m02_tensor import observe
from tinytorch.m08_training import Callback
from tinytorch.m08_training_appendix import Checkpointing, History, ProgressBar, plot_history
from tinytorch.m09_spatial import count_parameters
from tinytorch.m10_dataloader import RandomSampler
from tinytorch.m11_tokenization import BPETokenizer, CharTokenizer, Tokenizer, TokenWindows
from tinytorch.m13_attention import attention_weights
from tinytorch.m14_transformers import GPT, GPTConfig, next_token_loss
from tinytorch.milestones.generate import Writer
from tinytorch.milestones.program import Check, Options, UsageError, run, whole
from tinytorch.milestones.report import drawable, plot_attention
from tinytorch.milestones.runs import Run, Settings, Waiting, carry_out, continue_or_begin
from tinytorch.utils.data import DataLoader, Subset


@dataclass(frozen=True)
class Recipe:
    """How large the network is, and how it learns: as nanoGPT on a CPU.

    Attributes:
        rate: the largest learning rate, after `warmup` steps; at the end it is a tenth of that. nanoGPT's is 1e-3, with
            which Shakespeare ends at 1.89 instead of 1.77.
        stretch: after so many steps it is validated, saved, and writes a sample.
        looked_at: windows that the validation of a stretch reads; the last one reads all.
    """

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    batch: int = 12
    steps: int = 2000
    rate: float = 3e-3
    warmup: int = 100
    stretch: int = 250
    looked_at: int = 256

    def network(self, vocab_size: int) -> GPT:
        return GPT(GPTConfig(vocab_size, self.context, self.layers, self.heads, self.width, mlp="gelu"))

    def optimize(self, model: GPT, steps: int) -> tuple[Any, Any]:
        """AdamW that shrinks matrices only; the learning rate rises in a line, and falls along a cosine."""
        groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
                  {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
        warmup = min(self.warmup, steps // 10)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

        optimizer = optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.99))
        return optimizer, optim.lr_scheduler.LambdaLR(optimizer, factor)


RECIPE = Recipe()
TITLES = {"docs": "Python's help", "shakespeare": "Shakespeare"}
THRESHOLDS = {"docs": 1.40, "shakespeare": 1.88}  # nats a character, after all steps
SEED, TEMPERATURE, SAMPLE, LONG_SAMPLE, ATTENTION = 1, 0.8, 150, 600, 28  # of samples; characters; tokens
VOCABULARY = 1024  # tokens, where they are not characters
AS_IT_IS: dict[str, Any] = {"drop_whitespace": False, "replace_whitespace": False, "expand_tabs": False}

# -- text --------------------------------------------------------------------------------------------------------------


def read_text(arguments: argparse.Namespace) -> tuple[str, str]:
    """What to learn: how it is called, and all of it."""
    if arguments.root is not None and arguments.data != "shakespeare":
        raise UsageError("--root is where --data shakespeare lies; nothing else needs it")
    if arguments.text is None:
        where = {} if arguments.root is None else {"root": arguments.root}
        try:
            data = Shakespeare(**where) if arguments.data == "shakespeare" else PythonDocs()
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(str(error)) from error
        return TITLES[arguments.data], data.text
    try:
        return arguments.text.name, TextFile(arguments.text).text.removeprefix("\ufeff")
    except FileNotFoundError:
        raise UsageError(f"--text: there is no file {arguments.text}") from None
    except ValueError as error:
        raise UsageError(f"--text: {str(error).partition(';')[0]}; save it as UTF-8") from error


@dataclass(frozen=True)
class Material:
    """A text in tokens, the last tenth of it kept apart for validation.

    Attributes:
        held_out: the last tenth as it was written.
        training, validation: ids, int64 (N,).
        characters, bytes: how many the tokens of the validation part stand for, without its first.
        unigram: nats a token of the validation part, where each token has the frequency that it had in training,
            whatever stands before it. Whoever has learned from what stands before does better.
    """

    title: str
    held_out: str
    tokenizer: Tokenizer
    training: Tensor
    validation: Tensor
    characters: int
    bytes: int
    unigram: float

    @property
    def per_token(self) -> float:
        """Characters that a token stands for."""
        return self.characters / (len(self.validation) - 1)


def prepare(title: str, text: str, kind: str, vocab_size: int, context: int) -> Material:
    """Make tokens of a text; UsageError if it is too short.

    Characters are those of all the text. Byte pairs are learned from the training part.
    """
    end = len(text) * 9 // 10
    parts = text[:end], text[end:]
    if kind == "char":
        tokenizer: Tokenizer = CharTokenizer.train(text)
    else:
        tokenizer = BPETokenizer.train(parts[0], vocab_size, progress=sys.stdout.isatty())
    training, validation = (tokenizer.encode(part) for part in parts)
    if min(len(training), len(validation)) <= context:
        raise UsageError(f"{title} is too short: its last tenth, for validation, is {len(validation):,} tokens, "
                         f"and must be more than the {context} that are read at once")  # fmt: skip
    counts, rest = Counter(training), validation[1:]
    total = len(training) + tokenizer.vocab_size  # each token once more than it occurred, so that none is impossible
    nats = -sum(n * math.log((counts[id] + 1) / total) for id, n in Counter(rest).items())
    content = tokenizer.decode_bytes(rest)
    ids = [tinytorch.tensor(x, dtype=tinytorch.int64, device="cpu") for x in (training, validation)]
    characters = max(1, len(content.decode("utf-8", "ignore")))
    return Material(title, parts[1], tokenizer, ids[0], ids[1], characters, len(content), nats / len(rest))


# -- training ----------------------------------------------------------------------------------------------------------


class Stretches(Callback):
    """Cuts a training of so many steps into stretches, which are the epochs of the trainer; the last may be shorter.

    Args:
        sampler: draws the windows of a stretch.
    """

    def __init__(self, recipe: Recipe, steps: int, sampler: RandomSampler) -> None:
        self.recipe, self.steps, self.sampler = recipe, steps, sampler

    def __len__(self) -> int:
        return math.ceil(self.steps / self.recipe.stretch)

    def after(self, epoch: int) -> int:
        """Steps that are done after so many stretches."""
        return min(epoch * self.recipe.stretch, self.steps)

    def on_epoch_start(self, trainer: Trainer) -> None:
        steps = self.after(trainer.epoch + 1) - self.after(trainer.epoch)
        self.sampler.num_samples = steps * self.recipe.batch


class StepBar(ProgressBar):
    """A progress bar that counts steps, and tokens a second."""

    def __init__(self, stretches: Stretches) -> None:
        super().__init__()
        self.stretches = stretches

    def label(self, trainer: Trainer, epoch: int) -> str:
        return f"step {self.stretches.after(epoch):,}/{self.stretches.steps:,}"

    def _rate(self) -> float:
        return self.stretches.recipe.context * super()._rate()


class Samples(Callback):
    """Has the model write a little after each stretch, always from the same seed, and keeps it in a file.

    Attributes:
        rows: {"step", "text"} for each.
    """

    def __init__(self, material: Material, path: Path) -> None:
        self.material, self.path, self.rows = material, path, list[dict[str, Any]]()

    def add(self, model: GPT, step: int, characters: int) -> str:
        """Write about so many characters."""
        writer = Writer(model, self.material.tokenizer)
        tokens = max(1, round(characters / self.material.per_token))
        text = "".join(writer.decoded(writer.ids("", tokens, temperature=TEMPERATURE, seed=SEED)))
        self.rows.append({"step": step, "text": text})
        parts = (f"-- after {row['step']:,} steps\n{row['text']}\n" for row in self.rows)
        atomic_write(self.path, "\n".join(parts).encode())
        lines = (part for line in text.splitlines() for part in wrap(line, 75, **AS_IT_IS) or [""])
        print("\n".join(f"  | {line}".rstrip() for line in lines), flush=True)
        return text

    def on_epoch_end(self, trainer: Trainer) -> None:
        self.add(trainer.model, trainer.step, SAMPLE)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: Any) -> None:
        self.rows = [dict(row) for row in state["rows"]]


def program(arguments: argparse.Namespace) -> tuple[list[Check], dict[str, Any]]:
    recipe, steps = RECIPE, arguments.steps or RECIPE.steps
    if arguments.text is None:
        arguments.data = arguments.data or "docs"
    if arguments.vocab is not None and arguments.tokenizer != "bpe":
        raise UsageError("--vocab is for --tokenizer bpe; characters are as many as the text has")
    vocab_size = arguments.vocab or VOCABULARY
    tinytorch.manual_seed(arguments.seed)
    title, text = read_text(arguments)
    chosen = {"data": arguments.data} if arguments.text is None else {"text": str(arguments.text)}
    sizes = {"vocab": vocab_size} if arguments.tokenizer == "bpe" else {}
    content = hashlib.sha256(text.encode()).hexdigest()
    settings = Settings("tinygpt", content, **chosen, tokenizer=arguments.tokenizer, **sizes, steps=steps,
                        seed=arguments.seed)  # fmt: skip
    material = prepare(title, text, arguments.tokenizer, vocab_size, recipe.context)

    windows = TokenWindows(material.training, recipe.context)
    sampler = RandomSampler(windows, replacement=True, num_samples=recipe.batch * min(recipe.stretch, steps))
    train = DataLoader(windows, recipe.batch, sampler=sampler, seed=arguments.seed)
    held_out = TokenWindows(material.validation, recipe.context, stride=recipe.context)
    some = range(0, len(held_out), math.ceil(len(held_out) / recipe.looked_at))
    validation = DataLoader(Subset(held_out, some), 64, seed=arguments.seed)

    model, work = recipe.network(material.tokenizer.vocab_size), Run(arguments.out, unit="step")
    optimizer, schedule = recipe.optimize(model, steps)
    stretches, waiting = Stretches(recipe, steps, sampler), Waiting()
    samples = Samples(material, work.folder / "samples.txt")
    callbacks = [settings, stretches, waiting, StepBar(stretches), History(work.folder / "history.jsonl"), samples,
                 Checkpointing(work.folder, best=False)]  # fmt: skip
    trainer = Trainer(model, optimizer, next_token_loss, None, schedule, callbacks, clip_norm=1.0,
                      scheduler_interval="step", device=tinytorch.get_default_device())  # fmt: skip
    continue_or_begin(trainer, settings, work, arguments.resume)
    introduce(recipe, model, material)

    def look() -> dict[str, Any]:
        return examine(trainer, material, stretches, samples, work.folder)

    data = (train, len(stretches), validation)
    found, training = carry_out(arguments, trainer, settings, waiting, work, data, look)
    most = THRESHOLDS.get(arguments.data) if steps >= recipe.steps else None
    if most is None:
        most = round(found["unigram_nats_per_character"], 3)
        print(f"\nguessing by single tokens' frequencies, without what stands before: {most:g}")
    check = Check(f"validation loss on {title}", found["nats_per_character"], most=most, unit="nats/char")
    return [check], {
        **chosen,
        "tokenizer": arguments.tokenizer,
        "vocab_size": material.tokenizer.vocab_size,
        "characters": len(text),
        **training,
        **found,
    }


def introduce(recipe: Recipe, model: GPT, material: Material) -> None:
    sizes = f"{recipe.layers} layers, {recipe.heads} heads and {count_parameters(model):,} parameters"
    print(f"A GPT of {sizes} learns {material.title}:\n"
          f"{len(material.training):,} tokens to train on, {len(material.validation):,} for validation;\n"
          f"{material.tokenizer.vocab_size:,} different ones, a token stands for {material.per_token:.2f} characters\n"
          "each line: training/validation loss, in nats a token; tokens a second")  # fmt: skip


# -- examining ---------------------------------------------------------------------------------------------------------


def examine(
    trainer: Trainer, material: Material, stretches: Stretches, samples: Samples, folder: Path
) -> dict[str, Any]:
    """Measure what was learned, draw and save it; what there is to report of it."""
    model: Any = trainer.model
    nats = validation_nats(trainer, material.validation, stretches.recipe.context)
    print(f"\nafter {trainer.step:,} steps it writes")
    text = samples.add(model, trainer.step, LONG_SAMPLE)
    rows = [{**row, "epoch": stretches.after(int(row["epoch"]))} for row in trainer.history]
    title = drawable(material.title).replace("␣", " ")
    plot_history(rows, folder / "curves.png", f"A GPT learns {title}", unit="step")
    draw_attention(model, material, folder / "attention.png")
    model.save_pretrained(folder)
    material.tokenizer.save(folder)
    return {
        "validation_loss": nats / (len(material.validation) - 1),
        "nats_per_character": nats / material.characters,
        "bits_per_byte": nats / material.bytes / math.log(2),
        "unigram_loss": material.unigram,
        "unigram_nats_per_character": material.unigram / material.per_token,
        "samples": samples.rows[:-1],
        "sample": text,
    }


def validation_nats(trainer: Trainer, ids: Tensor, context: int) -> float:
    """The nats of all tokens but the first, in windows that do not overlap, of which the last may be shorter."""
    windows = TokenWindows(ids, context, stride=context)
    read = len(windows) * context
    nats = trainer.evaluate(DataLoader(windows, 64, seed=0))["loss"] * read
    rest = ids[read:].unsqueeze(0)
    if rest.shape[1] > 1:
        nats += trainer.evaluate([(rest[:, :-1], rest[:, 1:])])["loss"] * (rest.shape[1] - 1)
    return nats


@tinytorch.no_grad()
def attention_maps(model: GPT, ids: Sequence[int]) -> list[Tensor]:
    """For each layer the weights (H, T, T) with which the tokens of a text look at each other."""
    seen: list[tuple] = []

    def look(op: Any, arrays: list, attributes: dict, proceed: Any) -> Any:
        if op.name == "attention":
            seen.append((arrays, attributes))
        return proceed()

    with observe(look):
        model(tinytorch.tensor([list(ids)], device=model.tokens.weight.device))
    tensors: list[Any] = [([None if x is None else Tensor(x) for x in arrays], given) for arrays, given in seen]
    return [attention_weights(query, key, *mask, **attributes)[0] for (query, key, _, *mask), attributes in tensors]


def draw_attention(model: GPT, material: Material, path: Path) -> None:
    """How the heads of a layer look at the first line of what the network has not learned from."""
    start = material.held_out.find("\n") + 1
    text = material.held_out[start:].lstrip() or material.held_out
    ids = material.tokenizer.encode(text[:1000])[: min(ATTENTION, model.config.context_length)]
    maps = attention_maps(model, ids)
    layer = len(maps) // 2
    tokens = [material.tokenizer.id_to_token(id) for id in ids]
    plot_attention(maps[layer], tokens, path, f"Layer {layer + 1} of {len(maps)}: who looks where",
                   "each row is a token, and what it takes from those before it")  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the program with these command-line arguments; returns its exit status."""
    options = Options("tinygpt", "A transformer (2017) learns to write, from text alone.",
                      steps=f"{RECIPE.steps:,}", example="--data shakespeare --root ~/data")  # fmt: skip
    what = options.add_mutually_exclusive_group()
    what.add_argument("--data", choices=list(TITLES), help="what to learn: Python's help, plays (docs)")
    what.add_argument("--text", type=Path, metavar="FILE", help="any text in UTF-8")
    options.add_argument("--root", type=Path, metavar="DIR", help="folder with Shakespeare's file (else a download)")
    options.add_argument("--tokenizer", choices=["char", "bpe"], default="char", help="what a token is (char)")
    options.add_argument("--vocab", type=whole(257), metavar="N", help=f"how many tokens bpe makes ({VOCABULARY})")
    options.add_argument("--resume", action="store_true", help="go on with an interrupted run, if there is one")
    options.set_defaults(argv=list(argv))
    return run(options, argv, program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
