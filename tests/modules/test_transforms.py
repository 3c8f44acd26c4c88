"""Transforms of whole batches against NumPy, picture by picture."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from tinytorch.m01_setup import manual_seed
from tinytorch.m02_tensor import Tensor, tensor
from tinytorch.m02_tensor_appendix import get_default_device, set_default_device
from tinytorch.m05_losses import cross_entropy
from tinytorch.m10_dataloader import DataLoader, RandomHorizontalFlip, TensorDataset, ToFloat, Transform
from tinytorch.m10_dataloader_appendix import (
    CenterCrop,
    ColorJitter,
    CutMix,
    Cutout,
    Grayscale,
    Lambda,
    MixUp,
    Pad,
    RandomAffine,
    RandomApply,
    RandomChoice,
    RandomErasing,
    RandomRotation,
    RandomVerticalFlip,
    Resize,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    manual_seed(11)


def pictures(count: int = 40, channels: int = 3, height: int = 9, width: int = 12, dtype: str = "u1") -> np.ndarray:
    generator = np.random.default_rng(count + channels)
    if dtype == "u1":
        return generator.integers(1, 255, (count, channels, height, width)).astype("u1")
    return generator.uniform(0.05, 0.95, (count, channels, height, width)).astype(dtype)


def changed(transform: Transform, images: np.ndarray) -> np.ndarray:
    """What a transform makes of pictures; they are left as they were."""
    before = images.copy()
    out = transform(tensor(images)).numpy()
    assert np.array_equal(images, before)
    assert out.dtype == images.dtype
    return out


both = pytest.mark.parametrize("dtype", ["u1", "f4"])

# -- where the pixels are ----------------------------------------------------------------------------------------------


@both
def test_vertical_flips_are_each_pictures_own(dtype: str) -> None:
    images = pictures(200, dtype=dtype)
    out = changed(RandomVerticalFlip(0.3), images)
    flipped = [np.array_equal(after, before[:, ::-1]) for after, before in zip(out, images, strict=True)]
    kept = [np.array_equal(after, before) for after, before in zip(out, images, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 30 < sum(flipped) < 90
    assert np.array_equal(changed(RandomVerticalFlip(1), images), images[:, :, ::-1])
    assert np.array_equal(changed(RandomVerticalFlip(0), images), images)


def test_the_middle_is_cropped() -> None:
    images = pictures(2, height=9, width=12)
    assert np.array_equal(changed(CenterCrop((5, 8)), images), images[:, :, 2:7, 2:10])
    assert np.array_equal(changed(CenterCrop(9), images)[..., 0], images[..., 2])
    assert np.array_equal(changed(CenterCrop((9, 12)), images), images)


@both
@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric"])
def test_borders_are_numpys(mode: str, dtype: str) -> None:
    images = pictures(2, dtype=dtype, height=5, width=7)
    for padding, (left, top, right, bottom) in ((2, (2,) * 4), ((1, 3), (1, 3, 1, 3)), ((4, 0, 1, 2), (4, 0, 1, 2))):
        options = {"constant_values": 7} if mode == "constant" else {}
        expected = np.pad(images, ((0, 0), (0, 0), (top, bottom), (left, right)), mode=mode, **options)
        assert np.array_equal(changed(Pad(padding, fill=7, padding_mode=mode), images), expected)


def test_a_border_wider_than_the_picture_is_refused_where_it_would_repeat() -> None:
    images = tensor(pictures(1, height=3, width=9))
    assert Pad((0, 3), padding_mode="symmetric")(images).shape == (1, 3, 9, 9)
    with pytest.raises(ValueError, match="Pad: reflect pads 3 pixels with 2 at most, not 3"):
        Pad((0, 3), padding_mode="reflect")(images)
    with pytest.raises(ValueError, match="Pad: symmetric pads 3 pixels with 3 at most, not 4"):
        Pad((0, 4), padding_mode="symmetric")(images)


def bilinear(picture: np.ndarray, y: float, x: float) -> np.ndarray:
    """The value (C,) of a picture at a place, in pixels; zeros lie outside."""
    value = np.zeros(picture.shape[0])
    for row, column in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
        if 0 <= row < picture.shape[1] and 0 <= column < picture.shape[2]:
            value += (1 - abs(y - row)) * (1 - abs(x - column)) * picture[:, row, column]
    return value


def test_resizing_is_bilinear() -> None:
    images = pictures(2, height=5, width=7, dtype="f4")
    out = changed(Resize((8, 4)), images)
    for i, row, column in itertools.product(range(2), range(8), range(4)):
        y, x = np.clip((row + 0.5) * 5 / 8 - 0.5, 0, 4), np.clip((column + 0.5) * 7 / 4 - 0.5, 0, 6)
        np.testing.assert_allclose(out[i, :, row, column], bilinear(images[i], y, x), rtol=1e-5)
    images = pictures(2, height=10, width=6)
    assert np.array_equal(changed(Resize(12, "nearest"), images), images.repeat(2, 2).repeat(2, 3))
    assert changed(Resize(4), images).shape == (2, 3, 6, 4)
    assert changed(Resize(9), images).shape == (2, 3, 15, 9)
    means = images.reshape(2, 3, 5, 2, 3, 2).mean((3, 5))
    assert np.abs(changed(Resize(3, "area"), images) - means).max() <= 0.5


def affine_by_hand(
    picture: np.ndarray, degrees: float, shift: tuple, scale: float, shear: tuple, fill: float
) -> np.ndarray:
    """Each pixel of the result looked up where the inverse of the described mapping leads."""
    turn, along_x, along_y = np.radians([degrees, *shear])
    rotation = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]  # clockwise, as y points down
    mapping = scale * np.array(rotation) @ [[1, 0], [np.tan(-along_y), 1]] @ [[1, np.tan(-along_x)], [0, 1]]
    height, width = picture.shape[1:]
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    out = np.zeros(picture.shape)
    for row, column in itertools.product(range(height), range(width)):
        x, y = np.linalg.inv(mapping) @ (np.array([column, row]) - middle - shift) + middle
        out[:, row, column] = bilinear(picture - fill, y, x) + fill
    return out


@both
@pytest.mark.parametrize(
    ("degrees", "scale", "shear"), [(30, 1.0, (0, 0)), (0, 1.4, (0, 0)), (0, 1.0, (15, 0)), (-20, 0.8, (10, -25))]
)
def test_affine_pictures_are_looked_up_backwards(degrees: float, scale: float, shear: tuple, dtype: str) -> None:
    images = pictures(2, height=8, width=11, dtype=dtype)
    fill = 3 if dtype == "u1" else 0.25
    transform = RandomAffine(
        (degrees, degrees), scale=(scale, scale), shear=(shear[0], shear[0], shear[1], shear[1]),
        interpolation="bilinear", fill=fill,
    )  # fmt: skip
    expected = [affine_by_hand(picture.astype(float), degrees, (0, 0), scale, shear, fill) for picture in images]
    np.testing.assert_allclose(changed(transform, images), expected, atol=0.51 if dtype == "u1" else 2e-5)


def test_affine_shifts_are_whole_pixels_within_their_bounds() -> None:
    images = pictures(300, height=8, width=10)
    out = changed(RandomAffine(0, translate=(0.2, 0.25)), images)
    seen = set()
    for before, after in zip(images, out, strict=True):
        padded = np.pad(before, ((0, 0), (3, 3), (3, 3)))
        moved = {(dy, dx): padded[:, 3 - dy : 11 - dy, 3 - dx : 13 - dx] for dy in range(-3, 4) for dx in range(-3, 4)}
        (shift,) = [shift for shift, expected in moved.items() if np.array_equal(after, expected)]
        seen.add(shift)
    assert seen == {(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)}


def test_quarter_turns_are_exact_and_counter_clockwise() -> None:
    images = pictures(3, height=8, width=8)
    for interpolation in ("nearest", "bilinear"):
        assert np.array_equal(changed(RandomRotation((90, 90), interpolation), images), np.rot90(images, axes=(2, 3)))
        clockwise = changed(RandomAffine((90, 90), interpolation=interpolation), images)
        assert np.array_equal(clockwise, np.rot90(images, -1, axes=(2, 3)))
    assert np.array_equal(changed(RandomRotation(0), images), images)


@pytest.mark.parametrize("name", ["degrees", "scale", "shear"])
def test_affine_amounts_are_each_pictures_own_and_within_their_limits(name: str) -> None:
    options = {
        "degrees": {"degrees": 45},
        "scale": {"degrees": 0, "scale": (0.5, 1)},
        "shear": {"degrees": 0, "shear": 30},
    }
    images = np.zeros((200, 1, 61, 61), "f4")
    images[:, :, 30, 50] = images[:, :, 10, 30] = 1  # right of the middle, and above it
    out = changed(RandomAffine(**options[name], interpolation="bilinear"), images)
    places = np.arange(61) - 30
    amounts = []
    for picture in out[:, 0]:
        right = np.where(np.arange(61)[None, :] > 30 + abs(np.arange(61)[:, None] - 30) - 0.5, picture, 0)
        upper = np.where(np.arange(61)[:, None] < 30, picture, 0) - np.where(np.arange(61)[:, None] < 30, right, 0)
        x, y = (right.sum(0) * places).sum() / right.sum(), (right.sum(1) * places).sum() / right.sum()
        top_x, top_y = (upper.sum(0) * places).sum() / upper.sum(), (upper.sum(1) * places).sum() / upper.sum()
        amounts.append({"degrees": math.degrees(math.atan2(y, x)), "scale": math.hypot(x, y) / 20,
                        "shear": math.degrees(math.atan2(top_x, -top_y))}[name])  # fmt: skip
    low, high = {"degrees": (-45, 45), "scale": (0.5, 1), "shear": (-30, 30)}[name]
    slack = 0.04 * (high - low)
    assert low - slack < min(amounts) < low + 2 * slack
    assert high - 2 * slack < max(amounts) < high + slack
    assert np.std(amounts) == pytest.approx((high - low) / math.sqrt(12), rel=0.15)


# -- erasing -----------------------------------------------------------------------------------------------------------


def box_of(erased: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the erased pixels (H, W), which must be a full rectangle."""
    rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
    assert erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    return rows[0], columns[0], len(rows), len(columns)


@both
def test_erased_rectangles_have_the_sizes_and_places_that_are_asked_for(dtype: str) -> None:
    images = pictures(600, height=20, width=30, dtype=dtype)
    out = changed(RandomErasing(0.75, scale=(0.1, 0.2), ratio=(0.5, 2), value=0), images)
    found = []
    for before, after in zip(images, out, strict=True):
        erased = (before != after).any(0)
        assert (after[:, erased] == 0).all()
        assert (before == after)[:, ~erased].all()
        if erased.any():
            found.append(box_of(erased))
    assert 400 < len(found) < 500
    top, left, height, width = np.array(found).T
    areas, ratios = height * width / 600, height / width
    assert (areas.min(), areas.max()) == (pytest.approx(0.1, abs=0.02), pytest.approx(0.2, abs=0.02))
    assert (ratios.min(), ratios.max()) == (pytest.approx(0.5, abs=0.06), pytest.approx(2, abs=0.3))
    assert abs(np.log(ratios).mean()) < 0.1
    assert (top.min(), left.min(), (top + height).max(), (left + width).max()) == (0, 0, 20, 30)


def test_erased_pixels_become_what_is_asked_for() -> None:
    images = pictures(60, height=20, width=20)
    out = changed(RandomErasing(1, value=(0, 255, 255)), images)
    for before, after in zip(images, out, strict=True):
        erased = (before != after).any(0)
        assert (after[:, erased] == np.array([[0], [255], [255]])).all()
    for dtype in ("u1", "f4"):
        images = np.zeros((200, 1, 20, 20), dtype)
        noise = changed(RandomErasing(1, value="random"), images)
        values = noise[noise != 0].astype(float)
        mean, deviation = (127.5, 73.9) if dtype == "u1" else (0, 1)
        assert values.mean() == pytest.approx(mean, abs=0.05 * deviation)
        assert values.std() == pytest.approx(deviation, rel=0.05)


def test_what_fits_nowhere_is_not_erased() -> None:
    images = pictures(20, height=1, width=30)
    assert np.array_equal(changed(RandomErasing(1, scale=(0.5, 0.5), ratio=(1, 1)), images), images)


@both
@pytest.mark.parametrize("size", [3, 4])
def test_cutouts_are_squares_cut_off_at_the_edges(size: int, dtype: str) -> None:
    images = pictures(500, height=7, width=9, dtype=dtype)
    out = changed(Cutout(size, fill=255), images)
    seen = set()
    for before, after in zip(images, out, strict=True):
        erased = (before != after).any(0)
        assert (after[:, erased] == 255).all()
        seen.add(box_of(erased))
    lines = {n: [(max(c - size // 2, 0), min(c - size // 2 + size, n)) for c in range(n)] for n in (7, 9)}
    expected = {(a, c, b - a, d - c) for a, b in lines[7] for c, d in lines[9]}
    assert seen == expected


def test_several_cutouts_erase_more() -> None:
    images = pictures(300, height=16, width=16)
    one, four = ((changed(Cutout(4, count), images) == 0).mean() for count in (1, 4))
    assert 2.5 * one < four < 4 * one


# -- colours -----------------------------------------------------------------------------------------------------------


@both
def test_gray_is_the_weighted_sum(dtype: str) -> None:
    images = pictures(4, dtype=dtype)
    red, green, blue = images.astype(float).transpose(1, 0, 2, 3)
    expected = (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]
    np.testing.assert_allclose(changed(Grayscale(), images), expected, atol=0.501 if dtype == "u1" else 1e-6)
    three = changed(Grayscale(3), images)
    assert (three.shape[1], np.ptp(three, axis=1).max()) == (3, 0)
    assert np.array_equal(changed(Grayscale(), images[:, :1]), images[:, :1])


def jittered(picture: np.ndarray, name: str, amount: float) -> np.ndarray:
    """One change of a picture (3, H, W) of floats, pixel by pixel."""
    gray = 0.2989 * picture[0] + 0.587 * picture[1] + 0.114 * picture[2]
    if name == "brightness":
        return np.clip(picture * amount, 0, 1)
    if name == "contrast":
        return np.clip(amount * picture + (1 - amount) * gray.mean(), 0, 1)
    if name == "saturation":
        return np.clip(amount * picture + (1 - amount) * gray, 0, 1)
    out = np.empty_like(picture)
    for place in np.ndindex(*gray.shape):
        hue, saturation, value = colorsys.rgb_to_hsv(*picture[(slice(None), *place)])
        out[(slice(None), *place)] = colorsys.hsv_to_rgb((hue + amount) % 1, saturation, value)
    return out


AMOUNTS = {"brightness": (0.4, 1.7), "contrast": (0.3, 1.9), "saturation": (0.0, 2.2), "hue": (-0.5, -0.21, 0.3)}


@both
@pytest.mark.parametrize(("name", "amount"), [(name, amount) for name in AMOUNTS for amount in AMOUNTS[name]])
def test_each_change_of_colour_is_its_formula(name: str, amount: float, dtype: str) -> None:
    images = pictures(3, dtype=dtype, height=5)
    images[0, :, 0] = images[0, :1, 0]  # gray, which has no hue
    images[1, :, 1], images[1, 0, 1] = 0, 200 if dtype == "u1" else 0.8  # pure red
    images[1, :, 2] = 0
    scale = 255 if dtype == "u1" else 1
    out = changed(ColorJitter(**{name: (amount, amount)}), images)
    expected = [scale * jittered(picture / scale, name, amount) for picture in images.astype(float)]
    np.testing.assert_allclose(out, expected, atol=0.51 if dtype == "u1" else 2e-6)


def test_colours_change_by_each_pictures_own_amounts_in_every_order() -> None:
    images = np.full((500, 3, 2, 2), 0.3, "f4")
    images[:, 0] = 0.2
    factors = changed(ColorJitter(brightness=0.4), images)[:, 0, 0, 0] / 0.2
    assert factors.min() == pytest.approx(0.6, abs=0.01)
    assert factors.max() == pytest.approx(1.4, abs=0.01)
    assert len(np.unique(factors)) > 450
    jitter, one = ColorJitter((2, 2), (0.5, 0.5), (0.5, 0.5), (0.1, 0.1)), pictures(1, dtype="f4", height=2, width=2)
    amounts = {"brightness": 2, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
    results = []
    for order in itertools.permutations(amounts):
        picture = one[0].astype(float)
        for name in order:
            picture = jittered(picture, name, amounts[name])
        results.append(picture)
    seen = set()
    for _ in range(200):
        found = changed(jitter, one)[0]
        distances = [np.abs(found - picture).max() for picture in results]
        assert min(distances) < 1e-5
        seen.add(int(np.argmin(distances)))
    assert len(seen) > 8


def test_pictures_of_one_channel_have_brightness_and_contrast_only() -> None:
    images = pictures(4, channels=1, dtype="f4")
    assert np.array_equal(changed(ColorJitter(saturation=(0, 0), hue=0.5), images), images)
    contrast = changed(ColorJitter(contrast=(0.5, 0.5)), images)
    np.testing.assert_allclose(contrast, (images + images.mean((1, 2, 3), keepdims=True)) / 2, rtol=1e-5)


def test_no_change_changes_no_bit() -> None:
    images = pictures(4)
    for transform in (ColorJitter(), RandomErasing(0), Pad(0), RandomAffine(0), Resize((9, 12))):
        assert np.array_equal(changed(transform, images), images)


# -- functions and chance ----------------------------------------------------------------------------------------------


def test_functions_and_choices() -> None:
    x = tensor(pictures(2))
    assert Lambda(lambda batch: batch[:1])(x).shape[0] == 1
    seen = {RandomChoice([lambda _: "a", lambda _: "b", lambda _: "c"])(x) for _ in range(100)}
    assert seen == {"a", "b", "c"}
    applied = [RandomApply([lambda n: n + 1, lambda n: 2 * n], p=0.25)(1) for _ in range(400)]
    assert set(applied) == {1, 4}
    assert 60 < applied.count(4) < 140


def test_of_a_batch_with_labels_only_the_pictures_change() -> None:
    images, labels = pictures(2), tensor([3, 4])
    out, kept = CenterCrop(3)((tensor(images), labels))
    assert kept is labels
    assert out.shape == (2, 3, 3, 3)


# -- mixing ------------------------------------------------------------------------------------------------------------


def mixed(mix: MixUp | CutMix, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A batch in which each picture has a label of its own, mixed: so the labels tell with which other one."""
    out, shares = mix((tensor(images), tensor(np.arange(len(images)))))
    assert (str(out.dtype), str(shares.dtype)) == ("float32", "float32")
    assert shares.shape == (len(images), mix.num_classes)
    return out.numpy(), shares.numpy()


@pytest.mark.parametrize("kind", [MixUp, CutMix])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_pictures_and_labels_are_mixed_alike(kind: type, alpha: float) -> None:
    images = pictures(400, dtype="f4", height=10, width=16)
    out, labels = mixed(kind(500, alpha), images)
    np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-5)
    assert (labels >= 0).all()
    partners = []
    for i, (picture, row) in enumerate(zip(out, labels, strict=True)):
        others = [j for j in np.flatnonzero(row) if j != i]
        assert len(others) <= 1
        if not others:
            assert np.array_equal(picture, images[i]) or kind is MixUp
            continue
        (other,) = others
        partners.append(other)
        if kind is MixUp:
            np.testing.assert_allclose(picture, row[i] * images[i] + row[other] * images[other], atol=1e-5)
            continue
        cut = (picture != images[i]).any(0)
        assert np.array_equal(picture[:, cut], images[other][:, cut])
        top, left, height, width = box_of(cut)
        assert row[other] == pytest.approx(height * width / 160, abs=1e-6)
        if (
            top > 0 and left > 0 and top + height < 10 and left + width < 16
        ):  # not cut off: of the picture's proportions
            assert abs(height / 10 - width / 16) < 0.1
    assert len(set(partners)) == len(partners) > 250
    own = labels[np.arange(400), np.arange(400)]
    if kind is MixUp:
        assert own.mean() == pytest.approx(0.5, abs=0.06)
        assert own.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)  # of Beta(alpha, alpha)
    else:
        assert 0.5 < own.mean() < 0.8  # what reaches beyond the picture is cut off


def test_mixed_twice_is_mixed_and_cross_entropy_takes_it() -> None:
    images, labels = tensor(pictures(8, dtype="f4")), tensor([0, 1, 2, 3, 0, 1, 2, 3])
    out, shares = CutMix(4)(MixUp(4)((images, labels)))
    np.testing.assert_allclose(shares.numpy().sum(1), 1, rtol=1e-5)
    assert cross_entropy(out.reshape(8, -1)[:, :4], shares).item() > 0


@pytest.mark.parametrize("kind", [MixUp, CutMix])
def test_what_cannot_be_mixed_is_refused(kind: type) -> None:
    mix, images, labels = kind(3), tensor(pictures(2, dtype="f4")), tensor([0, 2])
    for batch, message in (
        (images, r"expected \(pictures, labels\), two tensors"),
        ((images, [0, 2]), r"expected \(pictures, labels\), two tensors"),
        ((tensor(pictures(2)), labels), r"expected floating pictures .*, got uint8 .*ToFloat"),
        ((images[0], labels), r"expected floating pictures \(N, C, H, W\), got float32 \(3, 9, 12\)"),
        ((images, tensor([0, 3])), r"expected classes 0 … 2, got 0 … 3"),
        ((images, tensor([0, 1, 2])), r"expected 2 labels, or probabilities \(2, 3\), got shape \(3, 3\)"),
        ((images, tensor([[0.5, 0.5]] * 2)), r"got shape \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            mix(batch)
    for options in ({"num_classes": 0}, {"num_classes": 2.0}, {"num_classes": 3, "alpha": 0}):
        with pytest.raises(ValueError, match=f"{kind.__name__}: expected num_classes >= 1 and alpha > 0"):
            kind(**options)


# -- all of them -------------------------------------------------------------------------------------------------------

ALL = [
    RandomVerticalFlip(), CenterCrop(5), Pad(2), Pad(2, padding_mode="reflect"), Resize((6, 15)), Resize(5, "nearest"),
    RandomAffine(20, (0.1, 0.2), (0.8, 1.2), 10), RandomRotation(30, "bilinear", 7), RandomErasing(),
    RandomErasing(1, value="random"), Cutout(4, 2), Grayscale(3), ColorJitter(0.3, 0.3, 0.3, 0.2),
]  # fmt: skip
MIXES = [MixUp(5), CutMix(5)]


@both
@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_every_device_gives_the_same_pictures(transform: Transform, dtype: str, device: str) -> None:
    images, here = pictures(6, dtype=dtype), get_default_device()
    results = []
    for place in ("cpu", device):
        set_default_device(place)
        manual_seed(5)
        out = transform(tensor(images))
        assert out.device == tensor(0).device
        results.append(out.numpy())
    set_default_device(here)
    assert results[0].dtype == results[1].dtype == images.dtype
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1 if dtype == "u1" else 1e-5)


@pytest.mark.parametrize("mix", MIXES, ids=repr)
def test_every_device_mixes_alike(mix: MixUp | CutMix, device: str) -> None:
    images, labels = pictures(6, dtype="f4"), np.array([0, 4, 2, 3, 1, 1])
    results = []
    for place in ("cpu", device):
        manual_seed(5)
        results.append([x.numpy() for x in mix((tensor(images, device=place), tensor(labels, device=place)))])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("transform", [*ALL, *MIXES], ids=repr)
def test_a_loader_gives_the_same_batches_with_workers(transform: Callable) -> None:
    images, labels = tensor(pictures(20, dtype="f4")), tensor(np.arange(20) % 5)
    runs = [
        [(x.tolist(), y.tolist()) for x, y in DataLoader(TensorDataset(images, labels), 8, batch_transform=transform,
                                                         seed=4, num_workers=workers)]
        for workers in (0, 2)
    ]  # fmt: skip
    assert runs[0] == runs[1]


def test_they_say_what_they_are() -> None:
    assert repr(RandomErasing(0.25, value=(1, 2, 3))) == (
        "RandomErasing(p=0.25, scale=(0.02, 0.33), ratio=(0.3, 3.3), value=(1, 2, 3))"
    )
    assert repr(RandomRotation((5, 10))) == "RandomRotation(degrees=(5.0, 10.0), interpolation='nearest', fill=0)"
    assert (
        repr(RandomChoice([MixUp(10), CutMix(10, 0.5)]))
        == "RandomChoice([MixUp(10, alpha=1.0), CutMix(10, alpha=0.5)])"
    )
    assert repr(RandomApply([Lambda(len), Grayscale()], 0.1)) == (
        "RandomApply([Lambda(len), Grayscale(num_output_channels=1)], p=0.1)"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomVerticalFlip(1.5), "RandomVerticalFlip: p must be between 0 and 1, not 1.5"),
        (lambda: RandomErasing(-1), "RandomErasing: p must be"),
        (lambda: RandomApply([], 2), "RandomApply: p must be"),
        (lambda: CenterCrop(0), "CenterCrop: expected sizes >= 1, got 0"),
        (lambda: Resize((3, 0)), "Resize: expected sizes >= 1"),
        (lambda: Resize(3, "cubic"), "Resize: interpolation is bilinear, .*, not 'cubic'"),
        (lambda: Pad((1, 2, 3)), r"Pad: expected 1, 2 or 4 lengths >= 0 as padding, got \(1, 2, 3\)"),
        (lambda: Pad(-1), "Pad: expected 1, 2 or 4 lengths >= 0"),
        (lambda: Pad(1, padding_mode="wrap"), "not 'wrap'"),
        (lambda: RandomAffine(-3), "RandomAffine: degrees is a number >= 0 or a pair in order, not -3"),
        (lambda: RandomRotation((3, 2)), r"RandomRotation: degrees is .*, not \(3, 2\)"),
        (lambda: RandomAffine(3, translate=(0.1, 2)), "RandomAffine: translate is a pair of parts from 0 to 1"),
        (lambda: RandomAffine(3, scale=(0, 1)), "RandomAffine: scale is a pair of factors above 0"),
        (lambda: RandomAffine(3, shear=(3, 1)), r"RandomAffine: shear is .*, not \(3, 1\)"),
        (lambda: RandomAffine(3, interpolation="cubic"), "interpolation is nearest or bilinear, not 'cubic'"),
        (lambda: RandomErasing(scale=(0.3, 0.1)), "RandomErasing: expected a scale from 0 to 1"),
        (lambda: RandomErasing(ratio=(0, 1)), "and a ratio above 0"),
        (lambda: RandomErasing(value="noise"), "not 'noise'"),
        (lambda: Cutout(0), "Cutout: expected a size and a count >= 1, got 0 and 1"),
        (lambda: Grayscale(2), "Grayscale: num_output_channels is 1 or 3, not 2"),
        (lambda: ColorJitter(-0.1), "ColorJitter: brightness is a number >= 0, or a pair from 0 on, in order, not"),
        (lambda: ColorJitter(hue=0.6), "ColorJitter: hue is a number from 0 to 0.5"),
        (lambda: RandomChoice([]), "RandomChoice: expected at least one transform"),
    ],
)
def test_wrong_options_are_refused(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (CenterCrop(10), "CenterCrop: pictures of 9×12 have no part of 10×10; Pad them first"),
        (Grayscale(), "Grayscale: expected pictures of 1 or 3 channels, got 4"),
        (ColorJitter(), "ColorJitter: expected pictures of 1 or 3 channels, got 4"),
        (RandomErasing(value=(1, 2)), "RandomErasing: 2 values for 4 channels"),
        (Pad(1, fill=256), "Pad: uint8 pictures are filled with a whole number from 0 to 255, not 256"),
        (Cutout(1, fill=0.5), "Cutout: uint8 pictures are filled with a whole number"),
        (RandomErasing(value=-1), "RandomErasing: uint8 pictures"),
        (RandomRotation(5, fill=-1), "RandomRotation: uint8 pictures"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(transform: Transform, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transform(tensor(pictures(2, channels=4)))


def test_a_lambda_takes_functions() -> None:
    with pytest.raises(TypeError, match="Lambda: expected a function, got int"):
        Lambda(3)


def test_bytes_and_floats_are_changed_alike() -> None:
    images = tensor(pictures(6))
    for transform in ALL:
        if getattr(transform, "fill", 0) or getattr(transform, "value", 0):  # which differ for bytes and floats
            continue
        manual_seed(3)
        as_bytes: Tensor = ToFloat()(transform(images))
        manual_seed(3)
        np.testing.assert_allclose(
            as_bytes.numpy(), transform(ToFloat()(images)).numpy(), atol=0.51 / 255, err_msg=repr(transform)
        )
    assert RandomHorizontalFlip(1)(images).shape == images.shape
