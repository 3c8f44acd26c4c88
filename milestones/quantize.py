"""A trained network in int8, beside what it was: `tinytorch quantize runs/cnn`."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tinytorch
from tinytorch import Tensor, nn
from tinytorch.m08_training import read_checkpoint
from tinytorch.m11_tokenization import TokenWindows
from tinytorch.m14_transformers import next_token_loss
from tinytorch.milestones.generate import load_writer
from tinytorch.milestones.predict import load_reader
from tinytorch.milestones.program import UsageError
from tinytorch.milestones.quantized import FILE, bytes_on_disk, write_quantized
from tinytorch.milestones.runs import settings_of
from tinytorch.milestones.tinygpt import TITLES, read_text
from tinytorch.quantization import convert, fold_batch_norm, prepare, quantize_dynamic, quantize_int4
from tinytorch.utils.data import DataLoader, Subset

CALIBRATE = 1000  # pictures
BATCH = 64  # of which the latency is measured


@dataclass(frozen=True)
class Subject:
    """A float network, and what is needed to make it small and to examine it.

    Attributes:
        inputs: a batch to measure latency with.
        quality: of a network, and `measure`, what that is.
        static: makes such a network int8 after a look at so many inputs; None: there is no need to look.
        about: what `read_quantized` is to know. files: of the run, that whoever uses it needs, too.
    """

    model: nn.Module
    inputs: Tensor
    quality: Callable[[nn.Module], float]
    measure: str
    static: Callable[[nn.Module, int], nn.Module] | None
    about: dict[str, Any]
    files: Sequence[str] = ()


def quantize_run(
    folder: Path, out: Path | None = None, bits: int = 8, calibrate: int | None = None, root: Path | None = None
) -> dict[str, Any]:
    """Write a quantized copy of a run, measure both, and return what was found.

    Args:
        out: where it goes; the run's folder with "-int8" behind it if None.
        bits: 8, or 4 for the weights of linear layers alone.
        calibrate: how many training pictures ranges are found by. Language models look at each token.
        root: the folder with the files of the run's data set, where it is not downloaded.
    """
    out = out or folder.with_name(f"{folder.name}-int{bits}")
    if (folder / FILE).is_file():
        raise UsageError(f"{folder} is quantized already; name the run that it was made of")
    if out.resolve() == folder.resolve():
        raise UsageError(f"--out: {out} is the run itself, which stays as it is; name another folder")
    subject = text_subject(folder, root) if (folder / "tokenizer.json").is_file() else picture_subject(folder, root)
    if calibrate is not None and (subject.static is None or bits == 4):
        raise UsageError("--calibrate is for int8 pictures; language models look at each token, and int4 at weights")
    if bits == 4:
        small = quantize_int4(subject.model)
    elif subject.static is None:
        small = quantize_dynamic(subject.model)
    else:
        small = subject.static(subject.model, calibrate or CALIBRATE)
    file = write_quantized(out, small, subject.about)
    for name in subject.files:
        shutil.copyfile(folder / name, out / name)
    sizes = [bytes_on_disk(subject.model), file.stat().st_size]
    models = [subject.model, small]
    qualities = [subject.quality(model) for model in models]
    latencies = measure_latency(models, subject.inputs)
    rows = [
        {subject.measure: quality, "bytes": size, "milliseconds": round(1e3 * seconds, 4)}
        for quality, size, seconds in zip(qualities, sizes, latencies, strict=True)
    ]
    return {
        "run": str(folder), "out": str(out), "bits": bits, "batch": len(subject.inputs),
        "float32": rows[0], f"int{bits}": rows[1],
        "times_smaller": round(sizes[0] / sizes[1], 3), "times_faster": round(latencies[0] / latencies[1], 3),
    }  # fmt: skip


@tinytorch.no_grad()
def measure_latency(models: Sequence[nn.Module], inputs: Tensor, budget: float = 2.0) -> list[float]:
    """The shortest seconds of a call of each, made in turns: what they take while other programs let them."""
    taken: list[list[float]] = [[] for _ in models]
    for model in models:
        model(inputs)  # kernels are loaded
    begun = time.perf_counter()
    while len(taken[0]) < 5 or (time.perf_counter() - begun < budget and len(taken[0]) < 200):
        for model, times in zip(models, taken, strict=True):
            started = time.perf_counter()
            model(inputs)
            times.append(time.perf_counter() - started)
    return [min(times) for times in taken]


# -- pictures ----------------------------------------------------------------------------------------------------------


def picture_subject(folder: Path, root: Path | None) -> Subject:
    """The network of a run that learned to read pictures."""
    reader = load_reader(folder)
    recipe, state = reader.recipe, read_checkpoint(folder)
    test, training = (recipe.pictures(root, train=train) for train in (False, True))

    @tinytorch.no_grad()
    def accuracy(model: nn.Module) -> float:
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in DataLoader(test, batch_size=500))
        return right / len(test)

    @tinytorch.no_grad()
    def static(model: nn.Module, count: int) -> nn.Module:
        some = range(0, len(training), max(1, len(training) // count))  # not the first, which may be of one kind
        batches: Iterable = DataLoader(Subset(training, some[:count]), batch_size=100)
        ready = prepare(fold_batch_norm(model, inputs))
        for x, _ in batches:
            ready(x)
        return convert(ready)

    inputs = next(iter(DataLoader(test, batch_size=BATCH)))[0]
    return Subject(reader.model, inputs, accuracy, "accuracy", static, {"settings": settings_of(state or {})})


# -- text --------------------------------------------------------------------------------------------------------------


def text_subject(folder: Path, root: Path | None) -> Subject:
    """The network of a run that learned to write. Its perplexity is measured on the part that it did not learn from."""
    writer = load_writer(folder)
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        where = {"data": report.get("data"), "text": Path(report["text"]) if "text" in report else None}
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} has no report.json, which says what text it learned: {error}") from error
    if where["data"] not in TITLES and where["text"] is None:
        raise UsageError(f"{folder / 'report.json'} names no text that it learned (data or text)")
    _, text = read_text(argparse.Namespace(**where, root=root))
    ids = tinytorch.tensor(writer.tokenizer.encode(text[len(text) * 9 // 10 :]))
    windows = TokenWindows(ids, context := writer.model.config.context_length, stride=context)

    @tinytorch.no_grad()
    def perplexity(model: nn.Module) -> float:
        batches = DataLoader(windows, BATCH, seed=0)
        nats = sum(next_token_loss(model(x), y).item() * len(x) for x, y in batches)
        return math.exp(nats / len(windows))

    inputs = next(iter(DataLoader(windows, BATCH, seed=0)))[0]
    return Subject(writer.model, inputs, perplexity, "perplexity", None, {"gpt": asdict(writer.model.config)},
                   ("config.json", "tokenizer.json"))  # fmt: skip
