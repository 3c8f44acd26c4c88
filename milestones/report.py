"""What a milestone shows at its end: figures as files, and a confusion matrix for the terminal.

Figures are drawn with matplotlib, which is imported with the first one, and written under their name only once they are
whole. The colours are Okabe and Ito's, which people with colour-blindness tell apart; where colour says something,
a line's style, a marker's shape or a number says it too.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinytorch.m01_setup import to_numpy
from tinytorch.m01_setup_appendix import BLUE, GREY, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLASS_COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CLASS_MARKERS = "osD^vP"

# -- confusion ---------------------------------------------------------------------------------------------------------


def confusion_matrix(labels: Any, predictions: Any, classes: int) -> np.ndarray:
    """How often each class was taken for each: int64 of shape (classes, classes), [label, prediction].

    Args:
        labels, predictions: whole numbers from 0 to classes - 1, arrays or tensors of shape (N,).
    """
    labels, predictions = to_numpy(labels), to_numpy(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1:
        raise ValueError(f"confusion_matrix: expected (N,) twice, got {labels.shape} and {predictions.shape}")
    for name, values in (("label", labels), ("prediction", predictions)):
        if values.size and values.dtype.kind not in "iu":
            raise ValueError(f"confusion_matrix: expected each {name} to be a whole number, got {values.dtype}")
        if values.size and not 0 <= values.min() <= values.max() < classes:
            wrong = values[(values < 0) | (values >= classes)][0]
            raise ValueError(f"confusion_matrix: {name} {wrong} is not a class, which are 0 to {classes - 1}")
    pairs = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def print_confusion(matrix: Any, class_names: Sequence[str] | None = None, width: int | None = None) -> None:
    """Print a confusion matrix; as a list of the most frequent mistakes where it is wider than `width` columns.

    Args:
        matrix: counts [label, prediction], of shape (classes, classes).
        width: columns to use; by default the terminal's, and 80 where there is none.
    """
    matrix, names = _square(matrix, class_names)
    width = width or shutil.get_terminal_size((80, 24)).columns
    column = max(3, len(f"{matrix.max():d}"), *map(len, names)) + 1
    label = max(5, *map(len, names))
    if label + column * len(names) + 9 <= width:
        _print_square(matrix, names, label, column)
    else:
        _print_mistakes(matrix, names, width)
    right, total = int(np.trace(matrix)), int(matrix.sum())
    print(f"{right:,} of {total:,} right" + (f" ({_percent(right, total)})" if total else ""))


def _print_square(matrix: np.ndarray, names: list[str], label: int, column: int) -> None:
    print(f"{'':{label}} read as")
    print(f"{'label':{label}}" + "".join(f"{name:>{column}}" for name in names) + "    right")
    for name, row, right in zip(names, matrix, np.diag(matrix), strict=True):
        cells = "".join(f"{count or '·':>{column}}" for count in row.tolist())
        print(f"{name:>{label}}{cells} {_percent(right, row.sum()):>8}")


def _print_mistakes(matrix: np.ndarray, names: list[str], width: int, most: int = 15) -> None:
    mistakes = [(matrix[i, j], i, j) for i, j in np.argwhere(matrix) if i != j]
    if mistakes:
        print("the most frequent mistakes:")
    for count, i, j in sorted(mistakes, key=lambda mistake: (-mistake[0], *mistake[1:]))[:most]:
        print(f"{count:>7,} × {names[i]}, read as {names[j]}"[:width])


def _square(matrix: Any, class_names: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    matrix = to_numpy(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"a confusion matrix is square, this has shape {matrix.shape}")
    names = [str(name) for name in (class_names if class_names is not None else range(len(matrix)))]
    if len(names) != len(matrix):
        raise ValueError(f"the confusion matrix has {len(matrix)} classes, but there are {len(names)} names")
    return matrix, names


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def plot_confusion(
    matrix: Any, path: str | os.PathLike, class_names: Sequence[str] | None = None, title: str = "Confusion"
) -> Path:
    """Draw a confusion matrix, what was right in blue and mistakes in orange; returns the path written.

    The shade of a cell is its share of its row; mistakes, which are rare, have a scale of their own.
    """
    matrix, names = _square(matrix, class_names)
    count, mistakes = len(matrix), ~np.eye(len(matrix), dtype=bool)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shares[mistakes] /= shares[mistakes].max(initial=0) or 1
    side = min(max(4.5, 1.6 + 0.52 * count), 12)
    figure = new_figure(side, side + 0.3, title)
    axes = figure.subplots()
    for hidden, colours in ((mistakes, "Blues"), (~mistakes, "Oranges")):
        axes.imshow(np.ma.array(shares, mask=hidden | (matrix == 0)), cmap=colours, vmin=0, vmax=1.3)
    for i, j in np.argwhere(matrix) if count <= 20 else ():
        colour = "white" if shares[i, j] > 0.8 else "black"
        axes.text(j, i, f"{matrix[i, j]}", ha="center", va="center", fontsize=9, color=colour)
    axes.set(xlabel="read as", ylabel="label", xticks=range(count), yticks=range(count))
    long = max(map(len, names)) > 3
    axes.set_xticklabels(names, rotation=45 if long else 0, ha="right" if long else "center")
    axes.set_yticklabels(names)
    edges = np.arange(count + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color="#D8D8D8", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{np.trace(matrix):,} of {matrix.sum():,} right", fontsize=10, color=GREY)
    return save_figure(figure, path)


# -- decisions in the plane --------------------------------------------------------------------------------------------


def plot_decision(
    predict: Callable[[np.ndarray], Any], points: Any, labels: Any, path: str | os.PathLike, title: str = "Decision"
) -> Path:
    """Draw which class is decided on where in the plane, and the points over it; returns the path written.

    Args:
        predict: classes (N,), an array or tensor of whole numbers, for points (N, 2), a float32 array.
        points, labels: (N, 2) and (N,), arrays or tensors. Points that `predict` gets wrong are ringed.
    """
    points, labels = to_numpy(points).astype(np.float32), to_numpy(labels).reshape(-1).astype(int)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) != len(labels) or not len(points):
        raise ValueError(f"plot_decision: expected points (N, 2) and labels (N,), got {points.shape}, {labels.shape}")
    figure = new_figure(5.2, 5.2, title)
    axes = figure.subplots()
    decided = _draw_regions(axes, predict, points)
    for kind in np.unique(labels):
        x, y = points[labels == kind].T
        colour, marker = CLASS_COLOURS[kind % 6], CLASS_MARKERS[kind % 6]
        marks = axes.scatter(x, y, s=42, color=colour, marker=marker, label=f"class {kind}", zorder=3)
        marks.set(edgecolor="white", linewidth=0.8)
    wrong = points[decided != labels]
    if len(wrong):
        rings = axes.scatter(wrong[:, 0], wrong[:, 1], s=130, label="decided wrongly", zorder=4)
        rings.set(facecolor="none", edgecolor="black", linewidth=1.4)
    axes.set_title(f"{len(points) - len(wrong):,} of {len(points):,} points right", fontsize=10, color=GREY)
    axes.set(xlabel="first input", ylabel="second input")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return save_figure(figure, path)


def _draw_regions(axes: Axes, predict: Callable, points: np.ndarray, steps: int = 300) -> np.ndarray:
    """Colour the plane around the points by the class decided on; returns the classes decided for the points."""
    from matplotlib.colors import ListedColormap

    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.15 * np.maximum(high - low, 1e-3)
    xs, ys = np.linspace(low - margin, high + margin, steps, dtype=np.float32).T
    grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    answers = to_numpy(predict(np.concatenate([grid, points])))
    if answers.shape != (len(grid) + len(points),) or (answers % 1 != 0).any():
        raise ValueError(
            f"plot_decision: predict must give a whole number for each of {len(grid) + len(points)} points, it gave "
            f"{answers.dtype} {answers.shape}"
        )
    answers = answers.astype(int)
    regions, extent = answers[: len(grid)].reshape(steps, steps), (xs[0], xs[-1], ys[0], ys[-1])
    colours = ListedColormap(CLASS_COLOURS)
    axes.imshow(regions % 6, cmap=colours, vmin=-0.5, vmax=5.5, alpha=0.2, origin="lower", extent=extent, aspect="auto")
    for kind in np.unique(regions)[:-1]:
        axes.contour(xs, ys, regions > kind, levels=[0.5], colors=GREY, linewidths=1)
    return answers[len(grid) :]


# -- mistakes ----------------------------------------------------------------------------------------------------------


def plot_mistakes(
    images: Any,
    labels: Any,
    predictions: Any,
    confidence: Any,
    path: str | os.PathLike,
    count: int = 25,
    class_names: Sequence[str] | None = None,
    title: str = "Most confident mistakes",
) -> Path:
    """Draw the pictures that were read wrongly, those with the most confidence first; returns the path written.

    Args:
        images: (N, 1, H, W), (N, H, W) or in colour (N, 3, H, W), from 0 to 1; arrays or tensors, like the others.
        confidence: (N,), the probability given to the prediction.
        count: how many pictures at most.
    """
    images, labels, predictions, confidence = (to_numpy(x) for x in (images, labels, predictions, confidence))
    if not len(images) == len(labels) == len(predictions) == len(confidence):
        lengths = ", ".join(str(len(x)) for x in (images, labels, predictions, confidence))
        raise ValueError(f"plot_mistakes: images, labels, predictions and confidence differ in length: {lengths}")
    wrong = np.flatnonzero(labels != predictions)
    chosen = wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
    share = f"{len(wrong):,} of {len(labels):,} read wrongly" + (f", {len(chosen)} shown" if len(chosen) else "")
    name = class_names.__getitem__ if class_names is not None else str
    gap = " " if class_names is None or max(map(len, class_names)) <= 3 else "\n"
    captions = [
        f"{name(label)}, read as{gap}{name(prediction)}\n{100 * sure:.0f} % sure"
        for label, prediction, sure in zip(labels[chosen], predictions[chosen], confidence[chosen], strict=True)
    ]
    return plot_sheet(images[chosen], captions, path, title, share)


def plot_sheet(
    images: Any, captions: Sequence[str], path: str | os.PathLike, title: str = "", note: str = "", columns: int = 0
) -> Path:
    """Draw pictures in rows, each with its caption; returns the path written.

    Args:
        images: (N, 1, H, W), (N, H, W) or in colour (N, 3, H, W), from 0 to 1; an array or a tensor.
        note: a line below the pictures.
        columns: how many pictures a row has; by default so many that the sheet is about square.
    """
    images = to_numpy(images)
    columns = columns or max(3, math.ceil(math.sqrt(len(images))))
    rows, lines = math.ceil(len(images) / columns), max((text.count("\n") + 1 for text in captions), default=1)
    figure = new_figure(1.35 * columns, (1.35 + 0.15 * lines) * rows + 1.0, title)
    figure.supxlabel(note, fontsize=10, color=GREY)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, place, xticks=(), yticks=())
        axes.imshow(picture_of(image), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.spines[:].set_color("#C8C8C8")
        axes.set_title(caption, fontsize=8)
    return save_figure(figure, path)


def picture_of(image: np.ndarray) -> np.ndarray:
    """(1, H, W) or (H, W) as (H, W), and (3, H, W) as (H, W, 3)."""
    if image.ndim == 3:
        return image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    return image


# -- weights -----------------------------------------------------------------------------------------------------------


def plot_filters(weights: Any, path: str | os.PathLike, title: str = "Filters") -> Path:
    """Draw a first layer's kernels; returns the path written.

    Those of colour pictures are colours around grey, which stands for 0; those of one channel are orange where they are
    negative and blue where they are positive. Each is scaled by its own largest weight.

    Args:
        weights: (O, 1, KH, KW) or (O, 3, KH, KW), an array or a tensor.
    """
    weights = to_numpy(weights)
    if weights.ndim != 4 or weights.shape[1] not in (1, 3):
        raise ValueError(f"plot_filters: expected weights (O, 1, KH, KW) or (O, 3, KH, KW), got {weights.shape}")
    scaled = weights / np.maximum(np.abs(weights).max(axis=(1, 2, 3), keepdims=True), 1e-12)
    columns = min(8, len(weights))
    rows = math.ceil(len(weights) / columns)
    figure = new_figure(0.8 * columns + 0.6, 0.8 * rows + 1.0, title)
    colours = _diverging()
    for place, kernel in enumerate(scaled, start=1):
        axes = figure.add_subplot(rows, columns, place, xticks=(), yticks=())
        picture = picture_of(kernel if len(kernel) == 1 else (kernel + 1) / 2)
        axes.imshow(picture, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
        axes.spines[:].set_color("#C8C8C8")
    note = "grey is 0" if weights.shape[1] == 3 else "orange is negative, blue positive"
    figure.supxlabel(f"{len(weights)} of {weights.shape[2]}×{weights.shape[3]}, {note}", fontsize=10, color=GREY)
    return save_figure(figure, path)


def _diverging() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("orange-white-blue", [ORANGE, "white", BLUE])


# -- attention ---------------------------------------------------------------------------------------------------------


def plot_attention(
    weights: Any, tokens: Sequence[str], path: str | os.PathLike, title: str = "Attention", note: str = ""
) -> Path:
    """Draw how much each token takes from which, a square for each head; returns the path written.

    Args:
        weights: (H, T, T), rows that add up to 1; an array or a tensor.
        tokens: T texts. Blanks and line breaks are drawn as signs.
        note: a line below.
    """
    from matplotlib.colors import PowerNorm

    weights, labels = to_numpy(weights), [drawable(token) for token in tokens]
    if weights.ndim != 3 or weights.shape[1:] != (len(labels),) * 2:
        raise ValueError(f"plot_attention: expected weights (H, {len(labels)}, {len(labels)}), got {weights.shape}")
    columns = math.ceil(math.sqrt(len(weights)))
    rows, count = math.ceil(len(weights) / columns), len(labels)
    side = 1.0 + 0.16 * max(count, 10)
    figure = new_figure(side * columns + 0.8, side * rows + 0.8, title)
    figure.supxlabel(note, fontsize=10, color=GREY)
    narrow, scale = max(map(len, labels)) == 1, PowerNorm(0.5, vmin=0, vmax=1)  # small shares are to be seen, too
    for head, part in enumerate(weights):
        axes = figure.add_subplot(rows, columns, head + 1)
        image = axes.imshow(np.ma.masked_equal(part, 0), cmap="Blues", norm=scale, interpolation="nearest")
        axes.set_title(f"head {head + 1}", fontsize=10)
        axes.set_xticks(range(count), labels, fontsize=8, family="monospace", rotation=0 if narrow else 90)
        axes.set_yticks(range(count), labels, fontsize=8, family="monospace")
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.spines[:].set_color("#C8C8C8")
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.5, aspect=30, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.set_label("share", fontsize=10)
    return save_figure(figure, path)


def drawable(text: str) -> str:
    """A text as a figure can show it: signs for blanks, and numbers for characters that its font lacks."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("monospace"))
    signs = {" ": "␣", "\n": "↵", "\t": "⇥", "$": r"\$"}  # $ would begin a formula

    def sign(character: str) -> str:
        if character in signs:
            return signs[character]
        known = character.isprintable() and font.get_char_index(ord(character))
        return character if known else character.encode("unicode_escape").decode().replace("\\", "")

    return "".join(map(sign, text))
