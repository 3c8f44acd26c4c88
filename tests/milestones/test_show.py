"""`tinytorch show data`: what it says of pictures and of texts, what it draws, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

import tinytorch
from tinytorch import cli
from tinytorch.datasets import CIFAR10, Digits, PythonDocs
from tinytorch.milestones import report
from tinytorch.milestones.program import UsageError
from tinytorch.milestones.show import LINES, channel_statistics, data_sets, describe_data, describe_text


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look into."""
    figures: list[Figure] = []
    save = report.save_figure
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files like CIFAR-10's, of 5 times 30 pictures."""
    monkeypatch.setattr(CIFAR10, "train_files", dict.fromkeys(CIFAR10.train_files, 30))
    for i, name in enumerate(CIFAR10.train_files):
        generator = np.random.default_rng(i)
        labels, pixels = generator.integers(0, 10, (30, 1)), generator.integers(0, 200, (30, 3072))
        (tmp_path / name).write_bytes(np.concatenate([labels, pixels], axis=1).astype(np.uint8).tobytes())
    return tmp_path


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)


def test_pictures_are_counted_and_drawn(drawn: list, tmp_path: Path) -> None:
    found = describe_data("Digits", out=tmp_path / "sheet.png")
    data = Digits()
    pixels, labels = data.data.numpy() / 16, data.targets.numpy()
    assert (found["pictures"], found["shape"]) == (1437, [1, 8, 8])
    assert list(found["classes"].values()) == np.bincount(labels).tolist()
    assert found["mean"] == pytest.approx([pixels.mean()])
    assert found["std"] == pytest.approx([pixels.std()])
    assert imread(tmp_path / "sheet.png")[..., :3].std() > 0.1
    assert len(drawn[0].axes) == 32
    known = {image.astype(np.float32).tobytes(): label for image, label in zip(pixels[:, 0], labels, strict=True)}
    captions = {}
    for axes in drawn[0].axes:
        image = np.asarray(axes.images[0].get_array(), np.float32).tobytes()
        assert str(known[image]) == axes.get_title()
        captions[image] = axes.get_title()
    assert len(captions) == 32  # no picture twice
    assert len(set(captions.values())) > 5


def test_seed_and_part_choose_the_pictures(tmp_path: Path) -> None:
    sheets = {}
    for name, options in {"a": {}, "same": {}, "seed": {"seed": 1}, "test": {"train": False}}.items():
        describe_data("digits", out=tmp_path / f"{name}.png", **options)
        sheets[name] = imread(tmp_path / f"{name}.png")
    assert np.array_equal(sheets["a"], sheets["same"])
    assert not np.array_equal(sheets["a"], sheets["seed"])
    assert describe_data("digits", train=False, out=tmp_path / "test.png")["pictures"] == 360


def test_statistics_of_many_pictures_are_exact() -> None:
    pictures = np.random.default_rng(6).integers(0, 256, (2500, 3, 6, 5)).astype(np.uint8)
    pictures[:, 1] //= 3
    data = CIFAR10.__bases__[0](tinytorch.tensor(pictures), tinytorch.zeros(2500, dtype=tinytorch.int64))
    mean, std = channel_statistics(data)
    assert mean == pytest.approx((pictures / 255).mean((0, 2, 3)), rel=1e-12)
    assert std == pytest.approx((pictures / 255).std((0, 2, 3)), rel=1e-9)


def test_colour_pictures_are_changed_as_the_cnn_is_given_them(small_cifar: Path, drawn: list) -> None:
    out = small_cifar / "sheet.png"
    found = describe_data("cifar10", small_cifar, augment=True, out=out)
    assert (found["pictures"], found["shape"], found["files"]) == (150, [3, 32, 32], str(small_cifar))
    assert sum(found["classes"].values()) == 150
    (figure,) = drawn
    rows = np.array([axes.images[0].get_array() for axes in figure.axes]).reshape(4, 8, 32, 32, 3)
    assert 0 <= rows.min() < rows.max() <= 1
    titles = np.array([axes.get_title() for axes in figure.axes]).reshape(4, 8)
    assert (titles == titles[:, :1]).all()
    for row in rows:
        assert len({image.tobytes() for image in row}) > 4
        middles = [image[8:24, 8:24] for image in row]
        shifts = (np.s_[8 + y : 24 + y, 8 + x : 24 + x] for y in range(-8, 9) for x in range(-8, 9))
        windows = {row[0][place].tobytes() for place in shifts}
        mirrored = {np.frombuffer(w, row.dtype).reshape(16, 16, 3)[:, ::-1].tobytes() for w in windows}
        assert all(middle.tobytes() in windows | mirrored for middle in middles)


def test_a_text_shows_some_of_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    found = describe_data("pythondocs")
    data = PythonDocs()
    first = found["first_line_shown"]
    assert found["lines"] == data.lines[first - 1 : first + 11]
    assert (found["number_of_lines"], found["characters"]) == (len(data), len(data.text))
    assert describe_data("pythondocs", seed=1)["first_line_shown"] != first
    assert call("show", "data", "pythondocs") == 0
    assert capsys.readouterr().out.splitlines()[-12:] == found["lines"]


@pytest.mark.parametrize(("count", "starts"), [(1, {1}), (LINES, {1}), (LINES + 1, {1, 2})])
def test_every_line_of_a_text_can_be_shown(count: int, starts: set[int]) -> None:
    class Lines(list):
        text = "some letters"

    tinytorch.manual_seed(1)
    data, seen = Lines(map(str, range(count))), set()
    for _ in range(30):
        found = describe_text(data)
        first = found["first_line_shown"]
        assert found["lines"] == data[first - 1 : first - 1 + LINES]
        seen.add(first)
    assert seen == starts


def test_the_figure_goes_to_the_folder_for_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert call("show", "data", "digits") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    figure = Path("runs", "data", "digits.png")
    assert any(line.split() == ["figure", str(figure)] for line in lines)
    assert figure.is_file()
    assert call("show", "data", "digits", "--json", "--out", "other.png") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figure"] == "other.png"
    assert found == describe_data("digits", out=Path("other.png"))


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("letters", {}, "no data set 'letters'; there are cifar10, cifar100, digits, fashionmnist, mnist, pythondocs"),
        ("digits", {"root": Path("folder")}, "--root: digits comes with TinyTorch or Python and needs no files"),
        ("pythondocs", {"train": False}, "--test: pythondocs has no part for testing"),
        ("pythondocs", {"augment": True}, "--augment and --out are for pictures, pythondocs is a text"),
        ("pythondocs", {"out": Path("a.png")}, "--augment and --out are for pictures"),
    ],
)
def test_what_cannot_be_shown_is_refused(name: str, options: dict, wanted: str) -> None:
    with pytest.raises(UsageError) as raised:
        describe_data(name, **options)
    assert wanted in str(raised.value)


def test_missing_files_end_it_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYTORCH_DATA", str(tmp_path / "cache"))
    for kind in set(data_sets().values()):
        if hasattr(kind, "mirrors"):
            monkeypatch.setattr(kind, "mirrors", ("http://127.0.0.1:9/",))
    for name in ("cifar10", "cifar100", "mnist", "fashionmnist", "shakespeare"):
        assert call("show", "data", name, "--root", str(tmp_path)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert f"into {tmp_path}" in captured.err
        assert captured.err.count("\n") == 1
