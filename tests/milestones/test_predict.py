"""What a trained network says of picture files: how they are prepared, what is answered, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image, ImageDraw

from tinytorch import Trainer, cli, softmax, tensor
from tinytorch.datasets import Digits
from tinytorch.m08_training import read_checkpoint, write_checkpoint
from tinytorch.m08_training_appendix import model_state
from tinytorch.milestones import cnn, mlp, perceptron
from tinytorch.milestones.predict import load_reader, plot_prediction, predict_pictures, read_picture
from tinytorch.milestones.program import UsageError
from tinytorch.utils.data import DataLoader

DIGITS, CIFAR = cnn.RECIPES["digits"], cnn.RECIPES["cifar10"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, one of each program; the cnn's network reads 9 of 10 digits."""
    runs = tmp_path_factory.mktemp("runs")
    cnn.main(["--epochs", "5", "--out", str(runs / "cnn")])
    mlp.main(["--epochs", "1", "--out", str(runs / "mlp")])
    perceptron.main(["--out", str(runs / "perceptron")])
    return runs


def seven(path: Path, paper: object = "white", ink: object = "black", mode: str = "RGB", shift: int = 0) -> Path:
    """A drawn 7; the figure is 120 pixels wide and 170 high."""
    image = Image.new(mode, (280 + 2 * shift, 280), paper)
    draw = ImageDraw.Draw(image)
    draw.line([(80 + shift, 70), (199 + shift, 70), (110 + shift, 239)], fill=ink, width=24, joint="curve")
    image.save(path)
    return path


def pixels_of(path: Path, recipe: object = DIGITS) -> np.ndarray:
    return read_picture(path, recipe)[0].numpy()


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)


# -- preparing ---------------------------------------------------------------------------------------------------------


def test_a_digit_looks_the_same_however_it_was_drawn(tmp_path: Path) -> None:
    picture, prepared = read_picture(seven(tmp_path / "plain.png"), DIGITS)
    wanted = picture.numpy()
    assert prepared == "280x280 RGB, inverted, as its border is light, cut to its ink, scaled to 8x8"
    assert (wanted.shape, wanted.dtype) == ((1, 8, 8), np.float32)
    assert wanted.min() == 0
    assert wanted.max() > 0.8
    assert wanted[0, :2].sum() > wanted[0, 2:4].sum()  # the bar of a 7 is at its top
    others = {
        "light on dark": seven(tmp_path / "dark.png", "black", "white"),
        "at the right of a wide picture": seven(tmp_path / "wide.png", shift=90),
        "grey on grey": seven(tmp_path / "grey.png", 200, 40, "L"),
        "transparent": seven(tmp_path / "clear.png", (0, 0, 0, 0), (0, 0, 0, 255), "RGBA"),
        "lossy": seven(tmp_path / "lossy.jpg"),
        "a palette": seven(tmp_path / "palette.gif", mode="P"),
    }
    assert read_picture(others["light on dark"], DIGITS)[1] == "280x280 RGB, cut to its ink, scaled to 8x8"
    for name, path in others.items():
        assert np.abs(pixels_of(path) - wanted).max() < 0.05, name


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    wanted = pixels_of(seven(tmp_path / "upright.png"))
    with Image.open(tmp_path / "upright.png") as image:
        tags = image.getexif()
        tags[274] = 6  # to be turned by 90 degrees
        image.rotate(90).save(tmp_path / "turned.png", exif=tags)
    assert np.abs(pixels_of(tmp_path / "turned.png") - wanted).max() < 0.05


def test_sixteen_bits_count(tmp_path: Path) -> None:
    wanted = pixels_of(seven(tmp_path / "eight.png"))
    with Image.open(tmp_path / "eight.png") as image:
        values = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(values).save(tmp_path / "sixteen.png")
    assert read_picture(tmp_path / "sixteen.png", DIGITS)[1].startswith("280x280 I;16, inverted")
    assert np.abs(pixels_of(tmp_path / "sixteen.png") - wanted).max() < 0.05


def test_a_picture_of_the_right_size_stays_as_it_is(tmp_path: Path) -> None:
    digit = Digits(train=False).data.numpy()[5, 0] * 15
    Image.fromarray(digit).save(tmp_path / "digit.png")
    picture, prepared = read_picture(tmp_path / "digit.png", DIGITS)
    assert prepared == "8x8 L"
    assert np.allclose(picture.numpy()[0], digit / 255)
    colours = np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "colours.png")
    picture, prepared = read_picture(tmp_path / "colours.png", CIFAR)
    assert prepared == "32x32 RGB"
    assert np.allclose(picture.numpy(), np.moveaxis(colours, -1, 0) / 255)


def test_a_colour_picture_is_cut_to_its_middle_square_and_scaled(tmp_path: Path) -> None:
    blocks = np.random.default_rng(2).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    wide = np.pad(blocks.repeat(4, 0).repeat(4, 1), ((0, 0), (50, 50), (0, 0)))
    Image.fromarray(wide).save(tmp_path / "wide.png")
    picture, prepared = read_picture(tmp_path / "wide.png", CIFAR)
    assert prepared == "228x128 RGB, cut to its middle square, scaled to 32x32"
    assert np.allclose(picture.numpy(), np.moveaxis(blocks, -1, 0) / 255, atol=0.01)
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "high.png")
    assert np.allclose(pixels_of(tmp_path / "high.png", CIFAR), blocks.transpose(2, 1, 0) / 255, atol=0.01)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 9), (3000, 2), (300, 300)])
@pytest.mark.parametrize("colour", ["white", "grey", "black"])
def test_blank_pictures_of_any_size_are_prepared(size: tuple, colour: str, tmp_path: Path) -> None:
    Image.new("RGB", size, colour).save(tmp_path / "blank.png")
    for recipe in (DIGITS, CIFAR, mlp.RECIPES["mnist"]):
        picture, prepared = read_picture(tmp_path / "blank.png", recipe)
        assert picture.shape == recipe.shape
        assert np.ptp(picture.numpy()) == 0
        assert ("all of one colour" in prepared) == (recipe is not CIFAR)


# -- answering ---------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_training_program(trained: Path, tmp_path: Path) -> None:
    test, reader = Digits(train=False), load_reader(trained / "cnn")
    right = 0
    for i, (digit, label) in enumerate(zip(test.data.numpy()[:, 0], test.targets.tolist(), strict=True)):
        Image.fromarray((digit * (255 / 16)).round().astype(np.uint8)).save(tmp_path / "digit.png")
        shares = reader.probabilities(read_picture(tmp_path / "digit.png", reader.recipe)[0])
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        right += int(np.argmax(shares)) == label
        if i == 119:
            break
    report = json.loads((trained / "cnn" / "report.json").read_text(encoding="utf-8"))
    assert right / 120 == pytest.approx(report["checks"][0]["value"], abs=0.08)


@pytest.mark.parametrize("program", [mlp, cnn])
def test_probabilities_are_those_of_the_trainer(program: object, trained: Path) -> None:
    name = program.__name__.rpartition(".")[2]
    recipe, reader = program.RECIPES["digits"], load_reader(trained / name)
    model = recipe.network()
    model.load_state_dict(model_state(trained / name / "last.safetensors"))
    trainer = Trainer(model, recipe.optimize(model, 1)[0], recipe.loss)
    test = recipe.pictures(None, train=False)
    wanted = softmax(trainer.predict(DataLoader(test, 500)), 1).numpy()
    for i in range(0, len(test), 9):
        found = reader.probabilities(tensor(test.data.numpy()[i].astype(np.float32) / 16))
        assert np.abs(np.array(found) - wanted[i]).max() < 1e-6


def test_enlarged_digits_on_large_sheets_are_read(trained: Path, tmp_path: Path) -> None:
    test, reader = Digits(train=False), load_reader(trained / "cnn")
    generator, right = np.random.default_rng(3), 0
    for digit, label in zip(test.data.numpy()[:100, 0], test.targets.tolist(), strict=False):
        sheet = np.full((400, 300), 255, np.uint8)
        top, left = generator.integers(0, 200), generator.integers(0, 100)
        sheet[top : top + 160, left : left + 160] -= digit.repeat(20, 0).repeat(20, 1) * 12
        Image.fromarray(sheet).save(tmp_path / "sheet.png")
        right += int(np.argmax(reader.probabilities(read_picture(tmp_path / "sheet.png", DIGITS)[0]))) == label
    assert right > 75


def test_several_pictures_are_answered_in_order(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = [seven(tmp_path / "a.png"), seven(tmp_path / "b.png", "black", "white")]
    found = predict_pictures(trained / "cnn", paths)
    assert [row["picture"] for row in found] == list(map(str, paths))
    for row in found:
        shares = list(row["probabilities"].values())
        assert shares == sorted(shares, reverse=True)
        assert set(row["probabilities"]) == set("0123456789")
    assert call("predict", str(trained / "cnn"), *map(str, paths), "--json") == 0
    assert json.loads(capsys.readouterr().out) == found
    assert call("predict", str(trained / "cnn"), *map(str, paths), "--top", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [len(line) - len(line.lstrip()) for line in lines] == [0, 2, 2, 0, 2, 2]
    assert max(len(line.replace(str(tmp_path), "")) for line in lines) <= 120
    best, share = next(iter(found[0]["probabilities"].items()))
    assert lines[1].split()[:2] == [best, f"{share:.1%}"]


def test_the_perceptron_with_layers_answers_too(trained: Path, tmp_path: Path) -> None:
    (row,) = predict_pictures(trained / "mlp", [seven(tmp_path / "a.png")])
    assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_the_figure_shows_what_the_network_sees(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, figure = seven(tmp_path / "a.png"), tmp_path / "figure.png"
    assert call("predict", str(trained / "cnn"), str(path), "--figure", str(figure)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"figure: {figure}"
    assert imread(figure)[..., :3].std() > 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_a_figure_with_a_long_title_stays_inside(channels: int, tmp_path: Path) -> None:
    picture = tensor(np.random.default_rng(4).random((channels, 8, 8)).astype(np.float32))
    path = plot_prediction(picture, [0.7, 0.3], ["automobile", "dog"], tmp_path / "a.png", "a long name " * 20)
    shown = imread(path)[..., :3]
    for edge in (shown[:3], shown[-3:], shown[:, :3], shown[:, -3:]):
        assert (edge == 1).all()


# -- refusing ----------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which `predict` refuses."""
    assert call("predict", *map(str, arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tinytorch: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_is_no_picture_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = seven(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("a text", encoding="utf-8")
    (tmp_path / "empty.png").touch()
    content = good.read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    (tmp_path / "damaged.png").write_bytes(flipped)
    cases = {
        "text.png": "not a picture",
        "empty.png": "not a picture",
        "cut.png": "not a picture that can be read",
        "damaged.png": "not a picture that can be read",
        "missing.png": "there is no file",
        ".": "is a folder",
    }
    for name, reason in cases.items():
        message = refusal(capsys, trained / "cnn", good, tmp_path / name)
        assert reason in message
        assert str(tmp_path / name) in message


def test_a_folder_without_a_network_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = seven(tmp_path / "good.png")
    message = refusal(capsys, trained / "perceptron", picture)
    assert f"there is one in {trained / 'cnn'}, {trained / 'mlp'}" in message
    assert "train one: tinytorch milestone run cnn" in refusal(capsys, tmp_path / "a" / "b", picture)
    assert "holds no trained network" in refusal(capsys, picture, picture)


def test_another_kind_of_network_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, place = seven(tmp_path / "good.png"), tmp_path / "last.safetensors"
    state = read_checkpoint(trained / "cnn")
    assert state is not None
    others = [[], [("Settings", {"program": "perceptron", "data": "digits"})], [("Settings", {"program": "none"})]]
    for callbacks in others:
        write_checkpoint({**state, "callbacks": callbacks}, place)
        assert "not a network that reads pictures; the mlp and the cnn do" in refusal(capsys, tmp_path, picture)
    write_checkpoint({**state, "callbacks": [("Settings", {"program": "mlp", "data": "digits"})]}, place)
    assert "of another version of tinytorch; train it again" in refusal(capsys, tmp_path, picture)
    place.write_bytes(np.random.default_rng(5).bytes(500))
    assert str(place) in refusal(capsys, tmp_path, picture)


def test_one_figure_is_for_one_picture(trained: Path, tmp_path: Path) -> None:
    paths = [seven(tmp_path / "a.png"), seven(tmp_path / "b.png")]
    with pytest.raises(UsageError, match="--figure draws one picture, 2 were given"):
        predict_pictures(trained / "cnn", paths, tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()
