"""Fast, the 2020s: what was learned, ten times faster, with every step of the way measured.

Networks became useful to everyone when they became cheap to run. Song Han and others made them small in "Deep
compression" (2015), Benoit Jacob and others had them compute in 8 bits on processors without a GPU (2018), and every
language model that answers while one waits keeps what it has read in a cache. Here all of that is done to the two
networks of the course, the one that sees and the one that writes: each step is timed beside the first, and examined on
what the network has not learned from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tinytorch
from tinytorch import Trainer, nn, profile, reference_kernels
from tinytorch.compression import prune_channels
from tinytorch.m01_setup_appendix import BLUE, GREY, dress_axes, new_figure, save_figure
from tinytorch.m08_training import accuracy
from tinytorch.m08_training_appendix import ProgressBar
from tinytorch.m19_caching import caching
from tinytorch.milestones import cnn, tinygpt
from tinytorch.milestones.pictures import make_batches
from tinytorch.milestones.predict import load_reader
from tinytorch.milestones.program import Check, Options, UsageError, run
from tinytorch.milestones.quantize import CALIBRATE, Subject, picture_subject, text_subject
from tinytorch.milestones.quantized import bytes_on_disk
from tinytorch.quantization import fold_batch_norm, quantize_dynamic
from tinytorch.utils.benchmark import Candidate, benchmark, compare, plot_pareto
from tinytorch.utils.data import DataLoader

PICTURES, REMOVED = 500, (0.5, 0.75)  # that are read at once, or all there are; shares of each layer's channels
TEXTS, PROMPT = 8, 8  # that are written at once; tokens that each begins with
SECONDS, LOOKS = 1.0, (8, 16)  # that a step is timed for; pairs of the first and the best step
TIMES = 10  # how much faster each network must become
LOST = 0.01  # accuracy that may be lost, and relative perplexity that may be won


Around = Callable[[], AbstractContextManager[Any]]  # makes what something is done under: `reference_kernels`


@dataclass(frozen=True)
class Step:
    """What has been done to a network so far, and how it is called.

    Attributes:
        name: what this step did.
        around: what a call runs under.
    """

    name: str
    model: nn.Module
    call: Callable[[], Any]
    around: Sequence[Around] = ()

    def __call__(self) -> Any:
        with ExitStack() as stack:
            for make in self.around:
                stack.enter_context(make())
            return self.call()


@dataclass(frozen=True)
class Result:
    """A step, measured: seconds of a call, what it makes a second, bytes on disk, and how good it is."""

    step: Step
    seconds: float
    throughput: float
    size: int
    quality: float

    def row(self, first: Result, measure: str) -> dict[str, Any]:
        return {
            "step": self.step.name, "milliseconds": 1e3 * self.seconds, "throughput": self.throughput,
            "times_faster": first.seconds / self.seconds, "bytes": self.size, measure: self.quality,
        }  # fmt: skip


def measured(step: Step, items: int, quality: Callable[[nn.Module], float]) -> Result:
    """Time a step, weigh and examine it; how long a call takes is the median once times have settled."""
    found = benchmark(step, items=items, seconds=SECONDS, least=5)
    return Result(step, found.median, found.throughput, bytes_on_disk(step.model), quality(step.model))


def walk(steps: Sequence[Step], items: int, subject: Subject, unit: str) -> list[Result]:
    """Measure one step after the other, and print each as soon as it is known."""
    print(f"\n{'':<28}{'ms a batch':>11}{unit + '/s':>12}{'times':>8}{'kB':>9}{subject.measure:>12}", flush=True)
    results: list[Result] = []
    for step in steps:
        result = measured(step, items, subject.quality)
        results.append(result)
        quality = f"{100 * result.quality:.2f} %" if subject.measure == "accuracy" else f"{result.quality:.3f}"
        times = f"{results[0].seconds / result.seconds:,.1f}"
        print(f"{result.step.name:<28}{1e3 * result.seconds:>11,.2f}{result.throughput:>12,.0f}{times:>8}"
              f"{result.size / 1e3:>9,.0f}{quality:>12}", flush=True)  # fmt: skip
    return results


def fastest(results: Sequence[Result], loss: Callable[[Result], float]) -> Result:
    """Of the steps that lose little enough, the fastest."""
    return min((one for one in results if loss(one) <= LOST), key=lambda one: one.seconds)


def verdicts(results: Sequence[Result], what: str, loss: Callable[[Result], float], lost: str) -> list[Check]:
    """What is to be checked: the fastest step that is good enough, timed once more in turn with the first."""
    first, best = results[0], fastest(results, loss)
    found = compare(first.step, best.step, margin=0.05, looks=LOOKS, seconds=30.0)
    print(f"{best.step.name}: {1 / found.ratio:.1f} times as fast as the first;\n"
          f"its time is {found.low:.1%} to {found.high:.1%} of that, with 95 % confidence")  # fmt: skip
    return [
        Check(f"time of {what}, beside the plain one", found.ratio, most=1 / TIMES),
        Check(lost, max(0.0, loss(best)), most=LOST),
    ]


# -- the network that sees ---------------------------------------------------------------------------------------------


def vision(arguments: argparse.Namespace) -> tuple[list[Check], list[Result], Subject]:
    """Make a trained CNN fast."""
    recipe, subject = load_reader(arguments.cnn).recipe, picture_subject(arguments.cnn, arguments.root)
    model = subject.model
    inputs = next(iter(DataLoader(recipe.pictures(arguments.root, train=False), PICTURES)))[0]
    print(f"The network of {arguments.cnn} reads {recipe.title}, {len(inputs)} pictures a call")

    def reading(name: str, network: nn.Module, *around: Around) -> Step:
        return Step(name, network, tinytorch.no_grad()(partial(network, inputs)), around)

    narrow = {share: tuned(model, share, inputs, recipe, arguments) for share in REMOVED}
    int8: Any = subject.static
    steps = (
        reading("as modules 1 to 9 have it", model, reference_kernels),
        reading("kernels", model),
        reading("batch norm folded", fold_batch_norm(model, inputs)),
        reading("int8", int8(model, CALIBRATE)),
        *(reading(f"{share:.0%} of channels removed", fold_batch_norm(net, inputs)) for share, net in narrow.items()),
        *(reading(f"{share:.0%} removed, int8", int8(net, CALIBRATE)) for share, net in narrow.items()),
    )
    results = walk(steps, len(inputs), subject, "pictures")
    loss = lambda one: results[0].quality - one.quality
    checks = verdicts(results, "the CNN", loss, "accuracy that the CNN lost")
    for one, name in ((results[0], "before"), (fastest(results, loss), "after")):
        one.step()  # what is done only once is not shown
        with profile() as found:
            one.step()
        found.plot(arguments.out / f"cnn-{name}.png")
    title = f"A CNN that reads {recipe.title}, {len(inputs)} pictures a call"
    plot_pareto([Candidate(one.step.name, one.quality, one.size, one.seconds) for one in results],
                arguments.out / "pareto.png", title)  # fmt: skip
    return checks, results, subject


def tuned(model: nn.Module, share: float, inputs: Any, recipe: Any, arguments: argparse.Namespace) -> nn.Module:
    """The network without a share of its channels; what is left learns a little longer, by the recipe it learned by."""
    epochs = arguments.epochs or max(1, recipe.epochs // 4)
    print(f"{share:.0%} of the channels are removed; what is left learns for {epochs} more", flush=True)
    network = prune_channels(model, inputs, share).train()
    batches, _ = make_batches(recipe, arguments.root, arguments.seed, workers=1)
    optimizer, schedule = recipe.optimize(network, epochs * len(batches))
    trainer = Trainer(network, optimizer, recipe.loss, {"accuracy": accuracy}, schedule, [ProgressBar()],
                      scheduler_interval="step")  # fmt: skip
    trainer.fit(batches, epochs)
    return network.eval()


# -- the network that writes -------------------------------------------------------------------------------------------


def language(arguments: argparse.Namespace) -> tuple[list[Check], list[Result], Subject]:
    """Make a trained GPT write fast."""
    subject = text_subject(arguments.gpt, arguments.text_root)
    model: Any = subject.model
    prompts = subject.inputs[:TEXTS, :PROMPT].tolist()
    tokens = model.config.context_length - PROMPT
    print(f"\nThe network of {arguments.gpt} writes {TEXTS} texts of {tokens} tokens at once")

    def writing(name: str, network: Any, *around: Around) -> Step:
        return Step(name, network, lambda: network.generate(prompts, tokens, seed=arguments.seed), around)

    without_cache = partial(caching, False)
    steps = (
        writing("as modules 1 to 14 have it", model, reference_kernels, without_cache),
        writing("kernels", model, without_cache),
        writing("keys and values cached", model),
        writing("int8", quantize_dynamic(model)),
    )
    results = walk(steps, TEXTS * tokens, subject, "tokens")
    same = sum(a == b for a, b in zip(steps[0](), steps[2](), strict=True)) / TEXTS
    gained = lambda one: one.quality / results[0].quality - 1
    checks = verdicts(results, "writing", gained, "perplexity that the GPT gained")
    return [*checks, Check("texts that the cache leaves as they are", same, least=1.0)], results, subject


# -- both --------------------------------------------------------------------------------------------------------------


def program(arguments: argparse.Namespace) -> tuple[list[Check], dict[str, Any]]:
    tinytorch.manual_seed(arguments.seed)
    ensure(arguments.cnn, "last.safetensors", cnn.main)
    ensure(arguments.gpt, "config.json", tinygpt.main)
    parts = {"cnn": vision(arguments), "gpt": language(arguments)}
    plot_steps([results for _, results, _ in parts.values()], arguments.out / "steps.png")
    rows = {name: [one.row(results[0], subject.measure) for one in results]
            for name, (_, results, subject) in parts.items()}  # fmt: skip
    return [check for checks, *_ in parts.values() for check in checks], {"texts": TEXTS, **rows}


def ensure(folder: Path, file: str, train: Callable[[Sequence[str]], int]) -> None:
    """Train a network into a folder that has none, as its milestone does by itself."""
    if (folder / file).is_file():
        return
    print(f"{folder} holds no trained network: first it is trained", flush=True)
    train(["--out", str(folder)])
    if not (folder / file).is_file():
        raise UsageError(f"{folder}: its network could not be trained")
    print()


def plot_steps(parts: Sequence[Sequence[Result]], path: Path) -> Path:
    """Draw for each network how many times as fast as the first each step is."""
    figure = new_figure(7.5, 1.2 + 0.4 * sum(map(len, parts)), "What each step brings")
    for axes, results, what in zip(
        figure.subplots(len(parts), 1, height_ratios=[len(results) for results in parts]), parts,
        ("the CNN reads", "the GPT writes"), strict=True,
    ):  # fmt: skip
        times = [results[0].seconds / one.seconds for one in results]
        names = [one.step.name for one in results]
        bars = axes.barh(names, times, color=[GREY, *[BLUE] * (len(times) - 1)], height=0.6)
        axes.bar_label(bars, [f"{value:,.1f}x" for value in times], padding=4, fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        dress_axes(axes, f"times as fast as the first, {what}", "")
    return save_figure(figure, path)


def main(argv: Sequence[str]) -> int:
    """Run the program with these command-line arguments; returns its exit status."""
    options = Options("fast", "What was learned (2020s), ten times faster.", epochs="a quarter of the CNN's",
                      example="--cnn runs/cnn --gpt runs/tinygpt")  # fmt: skip
    add = options.add_argument
    add("--cnn", type=Path, default=Path("runs", "cnn"), metavar="RUN", help="a trained CNN, or one will be (runs/cnn)")
    add("--gpt", type=Path, default=Path("runs", "tinygpt"), metavar="RUN", help="the same of a GPT (runs/tinygpt)")
    add("--root", type=Path, metavar="DIR", help="folder with the files of the CNN's pictures (else a download)")
    add("--text-root", type=Path, metavar="DIR", help="folder with the file of the GPT's text (else a download)")
    return run(options, argv, program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
