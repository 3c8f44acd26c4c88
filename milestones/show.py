"""What is in a data set: `tinytorch show data cifar10`."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import tinytorch
from tinytorch.m01_setup import manual_seed
from tinytorch.milestones import cnn
from tinytorch.milestones.program import UsageError
from tinytorch.milestones.report import plot_sheet
from tinytorch.transforms import Compose

COUNT, COLUMNS = 32, 8  # pictures on a sheet, and in a row of it
LINES = 12  # lines of a text that are shown


def data_sets() -> dict[str, Any]:
    """The data sets that need no more than their name, by name in lower case."""
    import tinytorch.datasets as face

    found = {name.lower(): getattr(face, name) for name in dir(face) if name != "TextFile"}
    return {name: kind for name, kind in found.items() if inspect.isclass(kind)}


def describe_data(
    name: str, root: Path | None = None, train: bool = True, augment: bool = False, seed: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What there is to say of a data set; draws a sheet of pictures, or adds "lines" of a text."""
    kinds = data_sets()
    if name.lower() not in kinds:
        raise UsageError(f"no data set {name!r}; there are {', '.join(kinds)}")
    kind = kinds[name.lower()]
    possible = inspect.signature(kind).parameters
    if root is not None and "root" not in possible:
        raise UsageError(f"--root: {name} comes with TinyTorch or Python and needs no files")
    if not train and "train" not in possible:
        raise UsageError(f"--test: {name} has no part for testing")
    given = ({} if root is None else {"root": root}) | ({} if train else {"train": False})
    try:
        data = kind(**given)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    manual_seed(seed)
    if not hasattr(data, "targets"):
        if augment or out is not None:
            raise UsageError(f"--augment and --out are for pictures, {name} is a text")
        return describe_text(data)
    return describe_pictures(data, name.lower(), augment, out or Path("runs", "data", f"{name.lower()}.png"))


def describe_text(data: Any) -> dict[str, Any]:
    start = tinytorch.randint(max(1, len(data) - LINES + 1), (1,)).item()
    return {
        "characters": len(data.text),
        "different_characters": len(set(data.text)),
        "lines": [data[i] for i in range(start, min(start + LINES, len(data)))],
        "number_of_lines": len(data),
        "first_line_shown": start + 1,
    }


def channel_statistics(data: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of pixels from 0 to 1; exact sums, as whole numbers."""
    sums = squares = tinytorch.zeros(data.data.shape[1], dtype=tinytorch.int64, device="cpu")
    for start in range(0, len(data), 1000):  # in parts, as int64 takes eight times the memory
        part = data.data[start : start + 1000].to(tinytorch.int64)
        sums, squares = sums + part.sum((0, 2, 3)), squares + (part * part).sum((0, 2, 3))
    count = data.data.numel() / data.data.shape[1]
    means = [total / count for total in sums.tolist()]
    deviations = [math.sqrt(total / count - m * m) for total, m in zip(squares.tolist(), means, strict=True)]
    return [m / data.white for m in means], [d / data.white for d in deviations]


def describe_pictures(data: Any, name: str, augment: bool, out: Path) -> dict[str, Any]:
    counts = [(data.targets == k).sum().item() for k in range(len(data.classes))]
    chosen = tinytorch.randperm(len(data))[:COUNT]
    changes: tuple = ()
    if augment:
        if name not in cnn.RECIPES:
            learned = ", ".join(key for key in cnn.RECIPES if key in data_sets())
            raise UsageError(f"--augment shows what the cnn is given; it learns {learned}, not {name}")
        changes, chosen = cnn.RECIPES[name].augment, chosen[: COUNT // COLUMNS].repeat_interleave(COLUMNS, 0)
    shown, labels = data.get_batch(chosen)
    shown = Compose(changes)(shown)
    captions = [data.classes[k] for k in labels.tolist()]
    note = "each row is one picture, changed at random" if augment else f"{len(captions)} of {len(data):,}"
    mean, std = channel_statistics(data)
    plot_sheet(shown, captions, out, repr(data), note, COLUMNS)
    return {
        "pictures": len(data),
        "shape": list(data.data.shape[1:]),
        "classes": dict(zip(data.classes, counts, strict=True)),
        "mean": mean,
        "std": std,
        "files": str(data.root),
        "figure": str(out),
    }
