"""Figures and tables at the end of a milestone: what they count, and that they are written whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from tinytorch.m02_tensor import tensor
from tinytorch.milestones import report
from tinytorch.milestones.report import (
    confusion_matrix,
    drawable,
    plot_attention,
    plot_confusion,
    plot_decision,
    plot_filters,
    plot_mistakes,
    plot_sheet,
    print_confusion,
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look into."""
    figures: list[Figure] = []
    save = report.save_figure

    def keep(figure: Figure, path: Path) -> Path:
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(report, "save_figure", keep)
    return figures


def is_picture(path: Path) -> bool:
    """Whether a file is a PNG that is not of one colour."""
    return imread(path)[..., :3].std() > 0.01


# -- confusion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [np.asarray, tensor, lambda values: values.astype(np.uint8)])
def test_the_confusion_matrix_counts_pairs(wrap: Callable) -> None:
    generator = np.random.default_rng(1)
    labels, predictions = generator.integers(0, 7, 500), generator.integers(0, 7, 500)
    matrix = confusion_matrix(wrap(labels), wrap(predictions), 8)
    assert matrix.dtype == np.int64
    pairs = list(zip(labels.tolist(), predictions.tolist(), strict=True))
    assert matrix.tolist() == [[pairs.count((i, j)) for j in range(8)] for i in range(8)]
    assert confusion_matrix(np.array([], int), np.array([], int), 3).tolist() == [[0] * 3] * 3


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 3], [0, 1], "label 3 is not a class, which are 0 to 2"),
        ([0, 1], [0, -1], "prediction -1 is not a class"),
        ([0, 1], [0, 1, 2], r"expected \(N,\) twice, got \(2,\) and \(3,\)"),
        ([0.0, 1.0], [0, 1], "label to be a whole number, got float64"),
    ],
)
def test_what_is_no_class_is_refused(labels: list, predictions: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(labels), np.array(predictions), 3)


def a_matrix(classes: int, count: int, seed: int = 2) -> np.ndarray:
    generator = np.random.default_rng(seed)
    labels, predictions = generator.integers(0, classes, (2, count))
    predictions = np.where(generator.random(count) < 0.9, labels, predictions)
    return confusion_matrix(labels, predictions, classes)


@pytest.mark.parametrize(("classes", "count"), [(2, 9), (10, 360), (10, 900_000), (40, 5000), (300, 9999)])
def test_a_confusion_fits_the_terminal(classes: int, count: int, capsys: pytest.CaptureFixture) -> None:
    matrix = a_matrix(classes, count)
    print_confusion(matrix, width=80)
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    right = np.trace(matrix)
    assert f"{right:,} of {count:,} right ({100 * right / count:.1f} %)" in output


def test_a_confusion_fits_every_width(capsys: pytest.CaptureFixture) -> None:
    matrix = a_matrix(10, 3000)
    for width in range(40, 90):
        print_confusion(matrix, width=width)
        assert max(map(len, capsys.readouterr().out.splitlines())) <= width
    print_confusion(matrix, width=54)
    assert "read as\nlabel" in capsys.readouterr().out


def test_a_printed_confusion_shows_every_count(capsys: pytest.CaptureFixture) -> None:
    matrix = a_matrix(10, 3000)
    print_confusion(matrix, width=80)
    for i, line in enumerate(capsys.readouterr().out.splitlines()[2:12]):
        label, *counts, right, sign = line.replace("·", "0").split()
        assert (label, sign) == (str(i), "%")
        assert list(map(int, counts)) == matrix[i].tolist()
        assert float(right) == pytest.approx(100 * matrix[i, i] / matrix[i].sum(), abs=0.05)


def test_a_wide_confusion_is_a_list_of_the_most_frequent_mistakes(capsys: pytest.CaptureFixture) -> None:
    matrix = np.diag(np.full(40, 9))
    matrix[3, 5], matrix[7, 1] = 4, 6
    print_confusion(matrix, [f"kind{i}" for i in range(40)], width=80)
    heading, *mistakes, _ = capsys.readouterr().out.splitlines()
    assert heading == "the most frequent mistakes:"
    assert [line.split() for line in mistakes] == [
        ["6", "×", "kind7,", "read", "as", "kind1"],
        ["4", "×", "kind3,", "read", "as", "kind5"],
    ]


def test_a_class_that_never_occurs_has_no_share(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    print_confusion([[3, 0], [0, 0]])
    assert capsys.readouterr().out.splitlines()[-2].split() == ["1", "·", "·", "-"]
    assert is_picture(plot_confusion([[3, 0], [0, 0]], tmp_path / "confusion.png"))
    print_confusion(np.zeros((2, 2), int))
    assert "0 of 0 right" in capsys.readouterr().out
    for matrix in (np.zeros((2, 3), int), np.zeros((0, 0), int), np.zeros(4, int)):
        with pytest.raises(ValueError, match="square"):
            print_confusion(matrix)
    with pytest.raises(ValueError, match="2 classes, but there are 3 names"):
        print_confusion(np.eye(2, dtype=int), "abc")


def test_a_drawn_confusion_shows_every_count(drawn: list, tmp_path: Path) -> None:
    matrix = a_matrix(10, 3000)
    assert is_picture(plot_confusion(matrix, tmp_path / "confusion.png", list("abcdefghij")))
    (axes,) = drawn[0].axes
    texts = {(round(t.get_position()[1]), round(t.get_position()[0])): int(t.get_text()) for t in axes.texts}
    assert texts == {(i, j): matrix[i, j] for i, j in np.argwhere(matrix)}
    assert [label.get_text() for label in axes.get_yticklabels()] == list("abcdefghij")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("read as", "label")
    assert is_picture(plot_confusion(a_matrix(100, 3000), tmp_path / "many.png"))


# -- decisions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [np.asarray, tensor])
def test_decisions_colour_the_plane_as_predicted(wrap: Callable, drawn: list, tmp_path: Path) -> None:
    points = np.random.default_rng(3).uniform(-1, 1, (80, 2))
    labels = (points[:, 0] > 0).astype(int)

    def predict(given: np.ndarray) -> object:
        assert given.dtype == np.float32
        return wrap((given[:, 0] + given[:, 1] > 0).astype(int))

    assert is_picture(plot_decision(predict, wrap(points), wrap(labels), tmp_path / "plane.png"))
    (axes,) = drawn[0].axes
    (image,) = axes.images
    left, right, bottom, top = image.get_extent()
    assert left < points[:, 0].min() < points[:, 0].max() < right
    assert image.origin == "lower"
    regions = image.get_array()
    x, y = np.meshgrid(np.linspace(left, right, 300), np.linspace(bottom, top, 300))
    clear = abs(x + y) > 1e-3
    assert np.array_equal(regions[clear], (x + y > 0)[clear])
    scatters = {marks.get_label(): marks.get_offsets() for marks in axes.collections if "decided" in marks.get_label()}
    wrong = points[labels != (points.sum(axis=1) > 0)].astype(np.float32)
    assert np.array_equal(scatters["decided wrongly"], wrong)
    assert axes.get_title() == f"{80 - len(wrong)} of 80 points right"


def test_decisions_of_one_class_or_of_many_are_drawn(tmp_path: Path) -> None:
    points = np.random.default_rng(4).uniform(-1, 1, (30, 2))
    assert is_picture(plot_decision(lambda p: np.zeros(len(p), int), points, points[:, 0] > 0, tmp_path / "one.png"))
    eight = lambda p: np.floor(4 * p[:, 0] + 4).clip(0, 7)
    assert is_picture(plot_decision(eight, points, eight(points), tmp_path / "eight.png"))
    assert is_picture(plot_decision(lambda p: p[:, 0] > 0, points[:1], [1], tmp_path / "point.png"))


def test_what_cannot_be_decided_is_refused(tmp_path: Path) -> None:
    points = np.random.default_rng(5).uniform(-1, 1, (30, 2))
    labels = (points[:, 0] > 0).astype(int)
    for predict in (lambda p: p[:, 0], lambda p: p[:5, 0] > 0, lambda p: p > 0):
        with pytest.raises(ValueError, match="whole number for each of 90030 points"):
            plot_decision(predict, points, labels, tmp_path / "plane.png")
    for bad_points, bad_labels in ((points[:, :1], labels), (points, labels[:3]), (points[:0], labels[:0])):
        with pytest.raises(ValueError, match=r"expected points \(N, 2\)"):
            plot_decision(lambda p: p[:, 0] > 0, bad_points, bad_labels, tmp_path / "plane.png")
    assert list(tmp_path.iterdir()) == []


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (8, 8), (3, 8, 8)])
def test_the_most_confident_mistakes_come_first(shape: tuple, drawn: list, tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    images, labels = generator.random((200, *shape)), generator.integers(0, 10, 200)
    predictions = np.where(generator.random(200) < 0.8, labels, (labels + 1) % 10)
    confidence = generator.random(200)
    assert is_picture(plot_mistakes(images, labels, predictions, confidence, tmp_path / "mistakes.png", count=7))
    wrong = sorted((i for i in range(200) if labels[i] != predictions[i]), key=lambda i: -confidence[i])
    assert len(drawn[0].axes) == 7
    for axes, i in zip(drawn[0].axes, wrong, strict=False):
        assert axes.get_title() == f"{labels[i]}, read as {predictions[i]}\n{100 * confidence[i]:.0f} % sure"
        image = np.moveaxis(images[i], 0, -1) if shape[0] == 3 else images[i].reshape(8, 8)
        assert np.array_equal(axes.images[0].get_array(), image)
    assert drawn[0].get_supxlabel() == f"{len(wrong)} of 200 read wrongly, 7 shown"


def test_no_mistakes_and_few_mistakes(drawn: list, tmp_path: Path) -> None:
    images, labels = np.random.default_rng(7).random((5, 1, 8, 8)), np.arange(5)
    sure = np.ones(5)
    assert is_picture(plot_mistakes(images, labels, labels, sure, tmp_path / "none.png"))
    plot_mistakes(tensor(images), tensor(labels), tensor(labels[::-1].copy()), tensor(sure), tmp_path / "four.png")
    assert [len(figure.axes) for figure in drawn] == [0, 4]
    with pytest.raises(ValueError, match="differ in length: 5, 5, 4, 5"):
        plot_mistakes(images, labels, labels[1:], sure, tmp_path / "mistakes.png")


def test_long_names_have_a_line_of_their_own(drawn: list, tmp_path: Path) -> None:
    images = np.random.default_rng(9).random((3, 3, 32, 32))
    kinds = ["automobile", "cat"]
    plot_mistakes(images, [0, 1, 0], [1, 0, 0], [0.5, 0.9, 1.0], tmp_path / "mistakes.png", class_names=kinds)
    captions = [axes.get_title() for axes in drawn[0].axes]
    assert captions == ["cat, read as\nautomobile\n90 % sure", "automobile, read as\ncat\n50 % sure"]


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 0, 1), (25, 0, 5), (26, 0, 5), (32, 8, 4), (5, 4, 2)])
def test_a_sheet_is_full_and_nothing_overlaps(count: int, columns: int, rows: int, drawn: list, tmp_path: Path) -> None:
    images = tensor(np.random.default_rng(10).random((count, 3, 32, 32)))
    captions = ["automobile, read as\nairplane\n100 % sure"] * count
    assert is_picture(plot_sheet(images, captions, tmp_path / "sheet.png", "Title", "note", columns))
    (figure,) = drawn
    grid = figure.axes[0].get_gridspec()
    assert (grid.nrows, len(figure.axes)) == (rows, count)
    assert_nothing_overlaps(figure)
    assert np.array_equal(figure.axes[-1].images[0].get_array(), np.moveaxis(images.numpy()[-1], 0, -1))


def assert_nothing_overlaps(figure: Figure) -> None:
    """All that a figure shows is inside of it, and no two of its pictures or texts meet."""
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    for axes in figure.axes:
        boxes.append(axes.get_window_extent())
        if axes.get_title():
            boxes.append(axes.title.get_window_extent())
    width, height = figure.bbox.size
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[:i])


# -- filters -----------------------------------------------------------------------------------------------------------


def test_filters_of_one_channel_show_signs(drawn: list, tmp_path: Path) -> None:
    weights = np.random.default_rng(11).normal(size=(10, 1, 3, 3)) * np.arange(1, 11).reshape(-1, 1, 1, 1)
    assert is_picture(plot_filters(tensor(weights), tmp_path / "filters.png"))
    (figure,) = drawn
    assert len(figure.axes) == 10
    for axes, kernel in zip(figure.axes, weights, strict=True):
        (image,) = axes.images
        shown = np.asarray(image.get_array())
        assert np.allclose(shown, kernel[0] / np.abs(kernel).max())
        red, _, blue, _ = np.moveaxis(image.to_rgba(shown), -1, 0)
        assert np.array_equal(blue > red, kernel[0] > 0)
    assert figure.get_supxlabel() == "10 of 3×3, orange is negative, blue positive"
    assert_nothing_overlaps(figure)


def test_filters_of_colours_are_colours_around_grey(drawn: list, tmp_path: Path) -> None:
    weights = np.random.default_rng(12).normal(size=(5, 3, 5, 5))
    weights[1] = 0
    assert is_picture(plot_filters(weights, tmp_path / "filters.png"))
    for axes, kernel in zip(drawn[0].axes, weights, strict=True):
        shown = np.asarray(axes.images[0].get_array())
        wanted = 0.5 + kernel / (2 * max(np.abs(kernel).max(), 1e-9))
        assert np.allclose(np.moveaxis(shown, -1, 0), wanted)
    assert drawn[0].get_supxlabel() == "5 of 5×5, grey is 0"


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (4, 3, 3), (4, 9)])
def test_what_has_no_colours_is_no_filter(shape: tuple, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected weights \(O, 1, KH, KW\) or \(O, 3, KH, KW\)"):
        plot_filters(np.ones(shape), tmp_path / "filters.png")
    assert list(tmp_path.iterdir()) == []


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens", ["↵a ␣bcd é", ["the", " cat", "\n", "日本", "$x$", "\x00\\"]], ids=["characters", "tokens"]
)
def test_attention_shows_each_heads_weights(tokens: str | list[str], drawn: list, tmp_path: Path) -> None:
    count = len(tokens)
    weights = np.tril(np.random.default_rng(13).random((5, count, count)))
    weights /= weights.sum(-1, keepdims=True)
    assert is_picture(plot_attention(tensor(weights), list(tokens), tmp_path / "attention.png", "Title", "note"))
    (figure,) = drawn
    *heads, bar = figure.axes
    assert [axes.get_title() for axes in heads] == [f"head {i}" for i in range(1, 6)]
    for axes, part in zip(heads, weights, strict=True):
        (image,) = axes.images
        shown = np.ma.asarray(image.get_array())
        assert np.allclose(shown.filled(0), part)
        assert np.array_equal(shown.mask, part == 0)
        for axis in (axes.xaxis, axes.yaxis):
            assert [label.get_text() for label in axis.get_ticklabels()] == list(map(drawable, tokens))
        turned = {label.get_rotation() for label in axes.get_xticklabels()}
        assert turned == ({0} if isinstance(tokens, str) else {90})  # long ones would run into each other
        darkness = 3 - image.to_rgba(np.array([0.1, 0.5, 1.0]))[:, :3].sum(-1)
        assert (np.diff(darkness) > 0.2).all()
    assert bar.get_ylabel() == "share"
    assert_nothing_overlaps(figure)


def test_what_a_font_lacks_is_drawn_as_a_number() -> None:
    assert drawable("a b\n\t") == "a␣b↵⇥"
    assert drawable("é日\x07") == "éu65e5x07"
    assert drawable("$") == r"\$"


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 4, 4), (3, 3)])
def test_weights_are_of_these_tokens(shape: tuple, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plot_attention: expected weights \(H, 3, 3\)"):
        plot_attention(np.ones(shape), ["a", "b", "c"], tmp_path / "attention.png")
    assert list(tmp_path.iterdir()) == []


# -- files -------------------------------------------------------------------------------------------------------------


def test_an_old_figure_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plot_confusion(np.eye(3, dtype=int), tmp_path / "figure.png")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    for place in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patched:
            patched.setattr(place, fail)
            with pytest.raises(OSError, match="the disk is full"):
                plot_confusion(np.eye(4, dtype=int), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_decides_the_format(tmp_path: Path) -> None:
    matrix = np.eye(3, dtype=int)
    assert b"<svg" in plot_confusion(matrix, tmp_path / "figure.svg").read_bytes()
    assert plot_confusion(matrix, tmp_path / "figure").read_bytes().startswith(b"\x89PNG")


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plot_confusion(a_matrix(10, 300), tmp_path / "confusion.png")
    assert dict(mpl.rcParams) == before


def test_matplotlib_loads_with_the_first_figure_and_pyplot_never(tmp_path: Path) -> None:
    program = f"""
import sys
from tinytorch.milestones import report
assert "matplotlib" not in sys.modules
report.print_confusion([[1, 0], [0, 1]])
assert "matplotlib" not in sys.modules
report.plot_confusion([[1, 0], [0, 1]], {str(tmp_path / "confusion.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
