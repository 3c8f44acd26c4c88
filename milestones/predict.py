"""What a trained network says of a picture: `tinytorch predict runs/cnn picture.png`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tinytorch
from tinytorch import Tensor, nn
from tinytorch.m01_setup_appendix import BLUE, GREY, dress_axes, new_figure, save_figure
from tinytorch.m08_training import read_checkpoint
from tinytorch.milestones.pictures import Recipe, recipe_of
from tinytorch.milestones.program import UsageError
from tinytorch.milestones.quantized import FILE, read_quantized
from tinytorch.milestones.report import picture_of
from tinytorch.milestones.runs import settings_of
from tinytorch.quantization import load_quantized
from tinytorch.transforms import Normalize

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Reader:
    """A network as a run left it, and the recipe that it followed."""

    model: nn.Module
    recipe: Recipe

    @property
    def classes(self) -> Sequence[str]:
        return self.recipe.dataset.classes  # type: ignore[attr-defined]

    @tinytorch.no_grad()
    def probabilities(self, picture: Tensor) -> list[float]:
        """Of each class, for a picture (channels, height, width) from 0 to 1."""
        batch = Normalize(self.recipe.mean, self.recipe.std)(picture.unsqueeze(0))
        return tinytorch.softmax(self.model(batch), 1)[0].tolist()


def load_reader(folder: str | os.PathLike) -> Reader:
    """The network that a milestone trained in a folder. UsageError, which says what is missing, if there is none."""
    folder = Path(folder)
    small = (folder / FILE).is_file()
    weights, settings = quantized_state(folder) if small else trained_state(folder)
    try:
        recipe = recipe_of(settings)
    except (AttributeError, ImportError, KeyError) as error:
        raise UsageError(f"{folder}: not a network that reads pictures; the mlp and the cnn do") from error
    model = recipe.network()
    try:
        if small:
            model = load_quantized(model, weights)
        else:
            model.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"{folder}: its network is of another version of tinytorch; train it again") from error
    return Reader(model.eval(), recipe)


def trained_state(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The weights that a training left in a folder, and what it was begun with."""
    try:
        state = read_checkpoint(folder)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    if state is None:
        trained = sorted(str(path.parent) for path in folder.parent.glob("*/last.safetensors")
                         if not (path.parent / "tokenizer.json").exists())  # a tinygpt's  # fmt: skip
        advice = f"there is one in {', '.join(trained)}" if trained else "train one: tinytorch milestone run cnn"
        raise UsageError(f"{folder} holds no trained network (last.safetensors); {advice}")
    return state["model"], settings_of(state)


def quantized_state(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The same of what `tinytorch quantize` left there."""
    state, about = read_quantized(folder)
    return state, about.get("settings", {})


# -- pictures ----------------------------------------------------------------------------------------------------------


def read_picture(path: str | os.PathLike, recipe: Recipe) -> tuple[Tensor, str]:
    """A picture file as a network takes it, (channels, height, width) from 0 to 1, and what was done to it in words.

    One channel is for handwriting, which is learned as light on dark in a frame that it fills: a picture with a light
    border is inverted, and cut to its ink. A colour picture is cut to its middle square.
    """
    from PIL import Image

    channels, height, width = recipe.shape
    image, done = open_picture(path, "L" if channels == 1 else "RGB")
    if channels == 1:
        image = light_on_dark(image, done)
    if image.size != (width, height):
        image = cut_to_ink(image, recipe.margin, done) if channels == 1 else cut_to_middle(image, done)
        image = image.resize((width, height), Image.Resampling.BOX if image.width > width else Image.Resampling.BICUBIC)
        done.append(f"scaled to {width}x{height}")
    pixels = np.asarray(image, np.float32).reshape(height, width, channels).transpose(2, 0, 1) / 255
    return tinytorch.tensor(pixels), ", ".join(done)


def open_picture(path: str | os.PathLike, mode: str) -> tuple[Image, list[str]]:
    """A picture file, upright, on white paper where it is transparent, in a mode of PIL's; and what it was."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            done = [f"{file.width}x{file.height} {file.mode}"]
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            paper = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(paper, image.convert("RGBA")).convert(mode), done
    except FileNotFoundError:
        raise UsageError(f"there is no file {os.fspath(path)}") from None
    except IsADirectoryError:
        raise UsageError(f"{os.fspath(path)} is a folder, not a picture") from None
    except UnidentifiedImageError:
        raise UsageError(f"{os.fspath(path)}: not a picture, or of no kind that can be read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{os.fspath(path)}: not a picture that can be read ({error})") from None


def light_on_dark(image: Image, done: list[str]) -> Image:
    """A grey picture, inverted if its border is light."""
    from PIL import ImageOps

    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if border.mean() < 128:
        return image
    done.append("inverted, as its border is light")
    return ImageOps.invert(image)


def cut_to_ink(image: Image, margin: float, done: list[str]) -> Image:
    """The square around what is light in a grey picture, with a margin on each side: a share of what it holds."""
    from PIL import ImageOps

    image = ImageOps.autocontrast(image)  # paper is seldom white, and ink seldom black
    ink = image.point(lambda value: 255 * (value > 127)).getbbox()
    if ink is None:
        done.append("all of one colour")
        return image
    left, top, right, bottom = ink
    reach = (0.5 + margin) * max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    done.append("cut to its ink")
    return image.crop((round(x - reach), round(y - reach), round(x + reach), round(y + reach)))


def cut_to_middle(image: Image, done: list[str]) -> Image:
    """The largest square in the middle of a picture."""
    side = min(image.size)
    if image.width != image.height:
        done.append("cut to its middle square")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


# -- answers -----------------------------------------------------------------------------------------------------------


def predict_pictures(
    folder: str | os.PathLike, paths: Sequence[Path], figure: Path | None = None
) -> list[dict[str, Any]]:
    """What the network of a run takes picture files for, the likeliest first; draws the only one, if that is wanted.

    Returns for each: "picture", "prepared" (what was done to it) and "probabilities" by class.
    """
    if figure is not None and len(paths) != 1:
        raise UsageError(f"--figure draws one picture, {len(paths)} were given")
    reader, found = load_reader(folder), []
    for path in paths:
        picture, prepared = read_picture(path, reader.recipe)
        shares = reader.probabilities(picture)
        if figure is not None:
            plot_prediction(picture, shares, reader.classes, figure, path.name)
        ranked = sorted(zip(reader.classes, shares, strict=True), key=lambda pair: -pair[1])
        found.append({"picture": str(path), "prepared": prepared, "probabilities": dict(ranked)})
    return found


def plot_prediction(
    picture: Tensor, probabilities: Sequence[float], classes: Sequence[str], path: str | os.PathLike, title: str = ""
) -> Path:
    """Draw a picture as the network sees it, and what it takes it for; returns the path written."""
    short = title if len(title) <= 50 else f"{title[:24]}…{title[-24:]}"
    figure = new_figure(7.0, 3.4, short)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    left.imshow(picture_of(picture.numpy()), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    left.set(xticks=(), yticks=())
    left.spines[:].set_color("#C8C8C8")
    left.set_title("as the network sees it", fontsize=10, color=GREY)
    order = sorted(range(len(classes)), key=lambda k: probabilities[k])[-10:]
    right.barh([classes[k] for k in order], [100 * probabilities[k] for k in order], color=BLUE)
    dress_axes(right, "probability (%)", "")
    right.set_xlim(0, 100)
    return save_figure(figure, path)
