"""Convolutions, pooling, normalisation and resizing against PyTorch's: values, all gradients, states, text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import tinytorch as t
import tinytorch.nn.functional as F
from tests.reference.near import DEVICES, as_numpy, assert_near, dtypes, many, seeds, some
from tinytorch import nn

torch = pytest.importorskip("torch")
TF = torch.nn.functional

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
layouts = st.sampled_from(["plain", "transposed", "flipped", "strided", "expanded"])


def drawn(seed: int, *shape: int, dtype: str = "float64", layout: str = "plain", ties: bool = False) -> np.ndarray:
    """Random values that lie in memory in some way; with `ties`, few different ones."""
    rng = np.random.default_rng(seed)

    def values(shape: tuple) -> np.ndarray:
        return (rng.integers(-2, 3, shape) if ties else rng.normal(size=shape)).astype(dtype)

    if layout == "transposed":
        return np.swapaxes(values((*shape[:-2], shape[-1], shape[-2])), -1, -2)
    if layout == "flipped":
        return values(shape)[..., ::-1]
    if layout == "strided":
        return values((*shape[:-1], 2 * shape[-1]))[..., ::2]
    if layout == "expanded":
        return np.broadcast_to(values((*shape[:-2], 1, shape[-1])), shape)
    return values(shape)


def compare(
    ours: Callable, theirs: Callable, *arrays: np.ndarray, tolerance: float = 0.0, devices: Sequence[str] = ("cpu",)
) -> None:
    """Both libraries on the same arrays: values, and the gradient of every floating input; ours on each device."""
    dtype = next(a.dtype.name for a in arrays if a.dtype.kind == "f")
    tolerance = tolerance or TOLERANCE[dtype]
    other = [torch.tensor(a.copy(), requires_grad=a.dtype.kind == "f") for a in arrays]
    expected = theirs(*other)
    values, *indices = expected if isinstance(expected, tuple) else (expected,)
    weights = drawn(1, *values.shape, dtype=dtype)
    values.backward(torch.tensor(weights))
    for device in devices:
        own = [(t.from_numpy(a) if device == "cpu" else t.tensor(a, device=device)) for a in arrays]
        for x in own:
            x.requires_grad_(x.dtype.is_floating_point)
        out = ours(*own)
        if indices:
            out, places = out
            np.testing.assert_array_equal(as_numpy(places), as_numpy(indices[0]), err_msg=device)
        assert_near(out, values, tolerance, f"values on {device}")
        out.backward(t.tensor(weights, device=device))
        for i, (x, y) in enumerate(zip(own, other, strict=True)):
            if x.dtype.is_floating_point and not (x.grad is None and not y.grad.any()):
                assert_near(x.grad, y.grad, tolerance, f"gradient of input {i} on {device}")


everywhere = partial(compare, devices=DEVICES)


def both(function: str, **attributes: Any) -> tuple[Callable, Callable]:
    """The function of that name in both libraries."""
    return partial(getattr(F, function), **attributes), partial(getattr(TF, function), **attributes)


# -- convolution -------------------------------------------------------------------------------------------------------


@st.composite
def geometries(draw: Callable, axes: int, transposed: bool = False) -> dict:
    """Shapes and attributes of a convolution that PyTorch can do."""
    groups = draw(st.integers(1, 3))
    depthwise = draw(st.booleans())
    per_group = (1, 1) if depthwise else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    ends = {"size": (1, 9), "kernel": (1, 4), "stride": (1, 4), "padding": (0, 3), "dilation": (1, 3)}
    numbers = {name: tuple(draw(st.integers(*pair)) for _ in range(axes)) for name, pair in ends.items()}
    span = [d * (k - 1) + 1 for k, d in zip(numbers["kernel"], numbers["dilation"], strict=True)]
    if not transposed:
        assume(all(n + 2 * p >= w for n, p, w in zip(numbers["size"], numbers["padding"], span, strict=True)))
    return {**numbers, "groups": groups, "per_group": per_group, "bias": draw(st.booleans()),
            "batch": draw(st.sampled_from([None, 0, 1, 2, 5]))}  # fmt: skip


def convolution_inputs(g: dict, seed: int, dtype: str, layout: str, transposed: bool = False) -> list[np.ndarray]:
    inputs, outputs = g["per_group"]
    lead = () if g["batch"] is None else (g["batch"],)
    x = drawn(seed, *lead, inputs * g["groups"], *g["size"], dtype=dtype, layout=layout)
    first, second = (inputs * g["groups"], outputs) if transposed else (outputs * g["groups"], inputs)
    weight = drawn(seed + 1, first, second, *g["kernel"], dtype=dtype, layout=layout)
    return [x, weight, *([drawn(seed + 2, outputs * g["groups"], dtype=dtype)] if g["bias"] else [])]


@many
@given(geometries(2), seeds, dtypes, layouts)
def test_conv2d(g: dict, seed: int, dtype: str, layout: str) -> None:
    attributes = {name: g[name] for name in ("stride", "padding", "dilation", "groups")}
    everywhere(*both("conv2d", **attributes), *convolution_inputs(g, seed, dtype, layout))


@some
@given(geometries(1), seeds, dtypes, layouts)
def test_conv1d(g: dict, seed: int, dtype: str, layout: str) -> None:
    attributes = {name: g[name] for name in ("stride", "padding", "dilation", "groups")}
    everywhere(*both("conv1d", **attributes), *convolution_inputs(g, seed, dtype, layout))


@pytest.mark.parametrize("axes", [1, 2])
def test_transposed_convolutions(axes: int) -> None:
    @some
    @given(geometries(axes, transposed=True), seeds, dtypes, layouts, st.data())
    def check(g: dict, seed: int, dtype: str, layout: str, data: Any) -> None:
        most = [max(s, d) - 1 for s, d in zip(g["stride"], g["dilation"], strict=True)]
        extra = tuple(data.draw(st.integers(0, n)) for n in most)
        parts = zip(g["size"], g["kernel"], g["stride"], g["padding"], g["dilation"], extra, strict=True)
        assume(all((n - 1) * s - 2 * p + d * (k - 1) + 1 + e > 0 for n, k, s, p, d, e in parts))
        attributes = {name: g[name] for name in ("stride", "padding", "dilation", "groups")}
        everywhere(*both(f"conv_transpose{axes}d", output_padding=extra, **attributes),
                   *convolution_inputs(g, seed, dtype, layout, transposed=True))  # fmt: skip

    check()


@pytest.mark.parametrize(("function", "axes"), [("conv1d", 1), ("conv2d", 2)])
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # PyTorch's, of a copy that an even kernel costs it
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_named_paddings(function: str, axes: int, padding: str, kernel: int) -> None:
    x, weight = drawn(0, 2, 4, *(7, 6)[:axes]), drawn(1, 6, 2, *(kernel,) * axes)
    everywhere(*both(function, padding=padding, groups=2), x, weight)
    if kernel < 4:
        everywhere(*both(function, padding=padding, dilation=2, groups=2), x, weight)


def test_a_large_batch_in_several_blocks() -> None:
    x, weight, bias = drawn(0, 40, 16, 24, 24), drawn(1, 8, 16, 3, 3), drawn(2, 8)
    everywhere(*both("conv2d", padding=1), x, weight, bias)
    everywhere(*both("conv2d", padding=1, groups=4), x, weight[:, :4], bias)


def test_a_kernel_of_one_pixel_that_meets_the_border() -> None:
    """As many windows as pixels, yet not one window a pixel."""
    for shape, attributes in (((1, 2, 2, 2), {"stride": 3, "padding": 1}), ((1, 2, 1, 1), {"stride": 2, "padding": 1})):
        everywhere(*both("conv2d", **attributes), drawn(0, *shape), drawn(1, 3, 2, 1, 1))
        everywhere(*both("unfold", kernel_size=1, **attributes), drawn(0, *shape))
    attributes = {"padding": 1, "output_padding": 2, "dilation": 3}
    everywhere(*both("conv_transpose2d", **attributes), drawn(0, 1, 2, 1, 1), drawn(1, 2, 3, 1, 1))


# -- pooling -----------------------------------------------------------------------------------------------------------


@st.composite
def poolings(draw: Callable, axes: int, dilated: bool = True) -> dict:
    ends = {"size": (1, 9), "kernel_size": (1, 4), "stride": (1, 4), "dilation": (1, 3 if dilated else 1)}
    numbers = {name: tuple(draw(st.integers(*pair)) for _ in range(axes)) for name, pair in ends.items()}
    numbers["padding"] = tuple(draw(st.integers(0, k // 2)) for k in numbers["kernel_size"])
    ceil_mode = draw(st.booleans())
    names = ("size", "kernel_size", "dilation", "padding")
    assume(all(n + 2 * p >= d * (k - 1) + 1 for n, k, d, p in zip(*(numbers[n] for n in names), strict=True)))
    numbers["stride"] = draw(st.sampled_from([numbers["stride"], None]))
    lead = draw(st.sampled_from([(3,), (1, 2), (2, 3)]))
    return {"shape": (*lead, *numbers.pop("size")), "ceil_mode": ceil_mode, **numbers}


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("ties", [False, True])
def test_max_pool(axes: int, ties: bool) -> None:
    @some
    @given(poolings(axes), seeds, dtypes, layouts)
    def check(g: dict, seed: int, dtype: str, layout: str) -> None:
        x = drawn(seed, *g.pop("shape"), dtype=dtype, layout=layout, ties=ties)
        own, other = both(f"max_pool{axes}d", return_indices=True, **g)
        assume(other(torch.tensor(x.copy()))[0].isfinite().all())  # dilated windows may lie in the border alone
        compare(own, other, x)

    check()


@pytest.mark.parametrize("axes", [1, 2])
def test_avg_pool(axes: int) -> None:
    @some
    @given(poolings(axes, dilated=False), seeds, dtypes, layouts, st.booleans(), st.sampled_from([None, 3, -2]))
    def check(g: dict, seed: int, dtype: str, layout: str, count: bool, divisor: int | None) -> None:
        del g["dilation"]
        x = drawn(seed, *g.pop("shape"), dtype=dtype, layout=layout)
        g |= {} if axes == 1 else {"divisor_override": divisor}
        everywhere(*both(f"avg_pool{axes}d", count_include_pad=count, **g), x)

    check()


@some
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 11), st.integers(1, 11), seeds, dtypes, layouts)
def test_adaptive_pooling(h: int, w: int, oh: int, ow: int, seed: int, dtype: str, layout: str) -> None:
    x = drawn(seed, 2, 3, h, w, dtype=dtype, layout=layout)
    everywhere(*both("adaptive_avg_pool2d", output_size=(oh, ow)), x)
    everywhere(*both("adaptive_avg_pool2d", output_size=1), x)
    everywhere(*both("adaptive_avg_pool2d", output_size=(None, ow)), x[0])
    everywhere(*both("adaptive_avg_pool1d", output_size=ow), x[0])
    everywhere(*both("adaptive_max_pool2d", output_size=(oh, ow), return_indices=True), x)
    ties = drawn(seed, 2, 3, h, w, dtype=dtype, layout=layout, ties=True)
    everywhere(*both("adaptive_max_pool2d", output_size=(oh, None), return_indices=True), ties)


# -- normalisation -----------------------------------------------------------------------------------------------------

NORMS = {
    "BatchNorm1d": [(4, 6), (4, 6, 5), (1, 6, 3)],
    "BatchNorm2d": [(3, 6, 4, 5), (1, 6, 1, 2), (2, 6, 7, 3)],
    "InstanceNorm1d": [(2, 6, 5), (6, 4)],
    "InstanceNorm2d": [(2, 6, 4, 5), (6, 3, 3)],
}


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, shapes in NORMS.items() for shape in shapes])
@pytest.mark.parametrize("options", [
    {}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-3}, {"affine": True}, {"affine": False},
    {"track_running_stats": False}, {"affine": True, "track_running_stats": True}, {"affine": False, "momentum": 0.0},
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_batch_and_instance_norm(name: str, shape: tuple, options: dict, dtype: str) -> None:
    if name.startswith("Instance") and options.get("momentum", 0) is None:
        pytest.skip("PyTorch's instance norm has no such momentum")
    if dtype == "float32" and shape == (1, 6, 1, 2):
        pytest.skip("of two values, whose gradients nearly cancel, PyTorch's are off by 4e-4, the kernel's by 2e-6")
    ours, theirs = getattr(nn, name)(6, dtype=dtype, **options), getattr(torch.nn, name)(6, **options)
    theirs = theirs.to(getattr(torch, dtype))
    if ours.weight is not None:
        with torch.no_grad():
            theirs.weight.copy_(torch.tensor(drawn(1, 6)))
            theirs.bias.copy_(torch.tensor(drawn(2, 6)))
        ours.load_state_dict(theirs.state_dict())
    for layout in ("plain", "transposed", "strided"):
        for i in range(3):
            compare(ours, theirs, drawn(i, *shape, dtype=dtype, layout=layout) * np.asarray(3, dtype) + 1)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(own.grad, other.grad, TOLERANCE[dtype] * 10)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert_near(ours.state_dict()[key], value, TOLERANCE[dtype], key)
    ours.eval(), theirs.eval()
    compare(ours, theirs, drawn(9, *shape, dtype=dtype) * np.asarray(3, dtype) + 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_functional_batch_norm(training: bool, affine: bool) -> None:
    x, average, variance = drawn(0, 3, 4, 5, 2), drawn(1, 4), np.abs(drawn(2, 4)) + 0.1
    parameters = [drawn(3, 4), drawn(4, 4)] if affine else []
    own, other = ([lib.tensor(average.copy()), lib.tensor(variance.copy())] for lib in (t, torch))
    options = {"training": training, "momentum": 0.2}
    compare(lambda x, *p: F.batch_norm(x, *own, *p, **options), lambda x, *p: TF.batch_norm(x, *other, *p, **options),
            x, *parameters)  # fmt: skip
    for a, b in zip(own, other, strict=True):
        assert_near(a, b, 1e-12)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (1, 6, 4, 3), (3, 6, 2, 2)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_group_norm(groups: int, shape: tuple, dtype: str) -> None:
    if len(shape) == 2 and groups == 6:
        pytest.skip("one value a group: the result is zero, and its gradient rounding")
    x, weight, bias = drawn(0, *shape, dtype=dtype), drawn(1, 6, dtype=dtype), drawn(2, 6, dtype=dtype)
    everywhere(*both("group_norm", num_groups=groups), x)
    compare(lambda x, w, b: F.group_norm(x, groups, w, b), lambda x, w, b: TF.group_norm(x, groups, w, b),
            x, weight, bias)  # fmt: skip


def test_second_derivatives_of_norms() -> None:
    x, weight = drawn(0, 3, 4, 2, 2), drawn(1, 4)
    results = []
    for lib, functional, grad in ((t, F, t.autograd.grad), (torch, TF, torch.autograd.grad)):
        a, w = (lib.tensor(v, requires_grad=True) for v in (x, weight))
        out = functional.batch_norm(a, None, None, w, training=True) ** 3
        (first,) = grad(out.sum(), [a], create_graph=True)
        results.append(grad((first**2).sum(), [a, w]))
    for own, other in zip(*results, strict=True):
        assert_near(own, other, 1e-10)


# -- resizing ----------------------------------------------------------------------------------------------------------

PADDINGS = ("zeros", "border", "reflection")
SIZES = [
    *({"size": n} for n in (7, 3, 1)),
    *({"scale_factor": factor} for factor in (2, 3, 0.5, 1.7, 0.4)),
    {"scale_factor": 2.3, "recompute_scale_factor": True},
]


@pytest.mark.parametrize("attributes", SIZES)
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 6), (1, 2, 7, 3)])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear", "linear, corners", "area"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_interpolate(attributes: dict, shape: tuple, mode: str, dtype: str) -> None:
    axes = len(shape) - 2
    options = dict(attributes)
    if mode == "area":
        options.pop("recompute_scale_factor", None)
    options["mode"] = mode.partition(",")[0].replace("linear", "linear" if axes == 1 else "bilinear")
    if "corners" in mode:
        options["align_corners"] = True
    everywhere(*both("interpolate", **options), drawn(0, *shape, dtype=dtype, layout="transposed"))
    if axes == 2 and "size" in options:
        everywhere(*both("interpolate", **{**options, "size": (options["size"], 4)}), drawn(0, *shape, dtype=dtype))


def test_nearest_rounds_as_pytorch_does() -> None:
    for n in range(1, 30):
        x = np.arange(n, dtype=np.float32).reshape(1, 1, n)
        for length in range(1, 60):
            own, other = both("interpolate", size=length)
            np.testing.assert_array_equal(as_numpy(own(t.tensor(x))), as_numpy(other(torch.tensor(x))))
            own, other = both("interpolate", size=length, mode="nearest-exact")
            clear = (2 * np.arange(length) + 1) * n % (2 * length) != 0  # no centre between two elements
            np.testing.assert_array_equal(as_numpy(own(t.tensor(x)))[..., clear],
                                          as_numpy(other(torch.tensor(x)))[..., clear])  # fmt: skip
    for factor in (0.3, 1.1, 1.3, 1.7, 2.1, 3.3, 7.0, 41.0, 49.0):
        x = np.arange(12, dtype=np.float32).reshape(1, 1, 12)
        own, other = both("interpolate", scale_factor=factor)
        np.testing.assert_array_equal(as_numpy(own(t.tensor(x))), as_numpy(other(torch.tensor(x))))


@some
@given(seeds, dtypes, layouts, st.data())
def test_grid_sample(seed: int, dtype: str, layout: str, data: Any) -> None:
    mode, padding = data.draw(st.sampled_from([(m, p) for m in ("bilinear", "nearest") for p in PADDINGS]))
    corners, height, width = data.draw(st.tuples(st.booleans(), st.integers(1, 6), st.integers(1, 6)))
    x = drawn(seed, 2, 3, height, width, dtype=dtype, layout=layout)
    grid = (drawn(seed + 1, 2, 4, 5, 2) * 1.5).astype(dtype)
    attributes = {"mode": mode, "padding_mode": padding, "align_corners": corners}
    if dtype == "float32":  # a place that rounds to the other side of a pixel's edge has another slope
        own, other = both("grid_sample", **attributes)
        assert_near(own(t.tensor(x), t.tensor(grid)), other(torch.tensor(x.copy()), torch.tensor(grid)), 1e-4)
    else:
        everywhere(*both("grid_sample", **attributes), x, grid, tolerance=1e-11)


@pytest.mark.filterwarnings("ignore:Since version 1.3.0")
@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 1, 1, 3)])
def test_affine_grid(corners: bool, size: tuple) -> None:
    theta = drawn(0, 2, 2, 3)
    everywhere(*both("affine_grid", size=size, align_corners=corners), theta)


@pytest.mark.parametrize("layout", ["plain", "transposed", "flipped"])
def test_pixel_shuffle_and_back(layout: str) -> None:
    everywhere(*both("pixel_shuffle", upscale_factor=2), drawn(0, 2, 8, 3, 5, layout=layout))
    everywhere(*both("pixel_shuffle", upscale_factor=3), drawn(0, 9, 2, 2, layout=layout))
    everywhere(*both("pixel_unshuffle", downscale_factor=2), drawn(0, 2, 3, 4, 6, layout=layout))
    everywhere(*both("pixel_unshuffle", downscale_factor=3), drawn(0, 3, 3, 6, layout=layout))


@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded"])
@pytest.mark.parametrize(("pad", "mode"), [
    ((1, 2, 3, 0), "constant"), ((-1, 2, 0, -2), "constant"), ((2, 1, 1, 3), "reflect"), ((1, 2), "reflect"),
    ((4, 3, 1, 6), "replicate"), ((3, 1, 4, 2), "circular"), ((-1, 2, 1, -2), "reflect"), ((-1, 2, 1, 1), "replicate"),
    ((-1, 3, 2, -1), "circular"),
])  # fmt: skip
def test_pads(layout: str, pad: tuple, mode: str) -> None:
    x = drawn(0, 2, 3, 4, 5, layout=layout)
    everywhere(*both("pad", pad=pad, mode=mode), x[0] if len(pad) == 2 else x)


@some
@given(poolings(2), seeds, dtypes, layouts)
def test_unfold_and_fold(g: dict, seed: int, dtype: str, layout: str) -> None:
    shape = g.pop("shape")
    del g["ceil_mode"]
    g["stride"] = g["stride"] or 1
    x = drawn(seed, *shape, dtype=dtype, layout=layout)
    everywhere(*both("unfold", **g), x)
    columns = as_numpy(TF.unfold(torch.tensor(x.copy()), **g))
    everywhere(*both("fold", output_size=shape[-2:], **g), columns)


# -- layers ------------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable, tuple]] = {
    "Conv1d": (lambda n: n.Conv1d(4, 6, 3, 2, 1, groups=2), (2, 4, 9)),
    "Conv1d same": (lambda n: n.Conv1d(4, 6, 3, padding="same", dilation=2, padding_mode="circular"), (2, 4, 9)),
    "Conv1d replicate": (lambda n: n.Conv1d(4, 6, 3, padding=2, bias=False, padding_mode="replicate"), (4, 9)),
    "Conv2d": (lambda n: n.Conv2d(4, 6, (3, 2), (2, 1), (0, 1), groups=2), (2, 4, 6, 7)),
    "Conv2d same": (lambda n: n.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (2, 4, 6, 7)),
    "Conv2d circular": (lambda n: n.Conv2d(4, 6, 3, 2, (2, 1), 1, 1, False, "circular"), (2, 4, 6, 7)),
    "ConvTranspose1d": (lambda n: n.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2), (2, 4, 5)),
    "ConvTranspose2d": (lambda n: n.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, False, 2), (2, 4, 5, 4)),
    "MaxPool1d": (lambda n: n.MaxPool1d(3, 2, 1), (2, 3, 7)),
    "MaxPool2d": (lambda n: n.MaxPool2d((2, 3), ceil_mode=True), (2, 3, 7, 7)),
    "AvgPool1d": (lambda n: n.AvgPool1d(3, padding=1, count_include_pad=False), (2, 3, 7)),
    "AvgPool2d": (lambda n: n.AvgPool2d(3, 2, 1, True, False), (2, 3, 7, 6)),
    "AdaptiveAvgPool1d": (lambda n: n.AdaptiveAvgPool1d(4), (2, 3, 7)),
    "AdaptiveAvgPool2d": (lambda n: n.AdaptiveAvgPool2d((None, 3)), (2, 3, 7, 6)),
    "AdaptiveMaxPool2d": (lambda n: n.AdaptiveMaxPool2d(3), (2, 3, 7, 6)),
    "BatchNorm1d": (lambda n: n.BatchNorm1d(3), (4, 3)),
    "BatchNorm2d": (lambda n: n.BatchNorm2d(3, momentum=None), (4, 3, 2, 2)),
    "GroupNorm": (lambda n: n.GroupNorm(2, 4), (3, 4, 2, 2)),
    "GroupNorm, no bias": (lambda n: n.GroupNorm(2, 4, bias=False), (3, 4, 2, 2)),
    "GroupNorm, plain": (lambda n: n.GroupNorm(2, 4, 1e-3, False), (3, 4, 2, 2)),
    "InstanceNorm1d": (lambda n: n.InstanceNorm1d(3), (2, 3, 4)),
    "InstanceNorm2d": (lambda n: n.InstanceNorm2d(3, affine=True, track_running_stats=True), (2, 3, 4, 4)),
    "Dropout1d": (lambda n: n.Dropout1d(0.2).eval(), (2, 3, 4)),
    "Dropout2d": (lambda n: n.Dropout2d(0.2).eval(), (2, 3, 4, 4)),
    "Upsample": (lambda n: n.Upsample(scale_factor=2), (2, 3, 4, 4)),
    "Upsample to a size": (lambda n: n.Upsample((3, 5), mode="bilinear", align_corners=False), (2, 3, 4, 4)),
    "Upsample by two": (lambda n: n.Upsample(None, (2, 1.5), "bilinear", True), (2, 3, 4, 4)),
    "PixelShuffle": (lambda n: n.PixelShuffle(2), (2, 4, 3, 3)),
    "PixelUnshuffle": (lambda n: n.PixelUnshuffle(2), (2, 3, 4, 4)),
    "PReLU": (lambda n: n.PReLU(3), (2, 3, 4, 4)),
    "PReLU, one": (lambda n: n.PReLU(init=0.1), (2, 3)),
    "ZeroPad2d": (lambda n: n.ZeroPad2d(1), (2, 3, 4, 4)),
    "ConstantPad2d": (lambda n: n.ConstantPad2d((1, 0, 2, -1), 2.5), (2, 3, 4, 4)),
    "ReflectionPad2d": (lambda n: n.ReflectionPad2d((1, 2, 3, 0)), (2, 3, 4, 4)),
    "ReplicationPad2d": (lambda n: n.ReplicationPad2d(2), (3, 4, 4)),
    "CircularPad2d": (lambda n: n.CircularPad2d(2), (2, 3, 4, 4)),
    "Unfold": (lambda n: n.Unfold((2, 3), 1, (0, 1), 2), (2, 3, 4, 5)),
    "Fold": (lambda n: n.Fold((4, 5), (2, 2)), (2, 8, 12)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    make, shape = LAYERS[name]
    ours, theirs = make(nn), make(torch.nn)
    assert repr(ours) == repr(theirs)
    assert {n: x.shape for n, x in ours.state_dict().items()} == {n: x.shape for n, x in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    compare(ours, theirs, drawn(0, *shape, dtype="float32"))
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(own.grad, other.grad, 1e-5)


def test_output_size_of_a_transposed_convolution() -> None:
    ours, theirs = (n.ConvTranspose2d(2, 3, 3, stride=3, padding=1) for n in (nn, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    x = drawn(0, 1, 2, 4, 5, dtype="float32")
    for size in ((10, 14), (12, 13), (1, 3, 11, 15)):
        assert_near(ours(t.tensor(x), output_size=size), theirs(torch.tensor(x), output_size=size), 1e-5)
    with pytest.raises(ValueError, match=r"output_size must be between \(10, 13\) and \(12, 15\), got \(13, 13\)"):
        ours(t.tensor(x), output_size=(13, 13))


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"])
def test_initial_distributions(name: str) -> None:
    t.manual_seed(0)
    torch.manual_seed(0)
    ours, theirs = (getattr(n, name)(32, 64, 5, groups=4) for n in (nn, torch.nn))
    for own, other, tolerance in ((ours.weight, theirs.weight, 0.1), (ours.bias, theirs.bias, 0.35)):
        a, b = as_numpy(own), as_numpy(other)
        assert abs(a.mean()) < tolerance * b.std()
        assert a.std() == pytest.approx(b.std(), rel=tolerance)
        bound = 1 / math.sqrt(math.prod(ours.weight.shape[1:]))
        assert 0.9 * bound < np.abs(a).max() <= bound


# -- networks ----------------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.added = stride, after - before
        self.conv1 = torch.nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(after)
        self.conv2 = torch.nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(after)

    def forward(self, x: Any) -> Any:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(out + TF.pad(x, (0, 0, 0, 0, self.added // 2, self.added // 2)))


class TheirResNet(torch.nn.Module):
    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        for k in range(3):
            first = Block(width * 2 ** max(k - 1, 0), width * 2**k, 1 if k == 0 else 2)
            blocks = [Block(width * 2**k, width * 2**k) for _ in range(n - 1)]
            setattr(self, f"layer{k + 1}", torch.nn.Sequential(first, *blocks))
        self.fc = torch.nn.Linear(4 * width, 10)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def their_cnn() -> Any:
    n = torch.nn
    return n.Sequential(
        n.Conv2d(3, 4, 3, padding=1, bias=False), n.BatchNorm2d(4), n.ReLU(), n.MaxPool2d(2),
        n.Conv2d(4, 6, 3, padding=1, bias=False), n.BatchNorm2d(6), n.ReLU(), n.MaxPool2d(2),
        n.Flatten(), n.Linear(6 * 16, 8), n.ReLU(), n.Linear(8, 10),
    )  # fmt: skip


NETWORKS = {
    "SimpleCNN": (lambda: t.SimpleCNN(size=16, widths=(4, 6), hidden=8, batch_norm=True), their_cnn, (4, 3, 16, 16)),
    "ResNet": (lambda: t.ResNet(14, width=4), lambda: TheirResNet(2, 4), (4, 3, 12, 12)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_their_states(name: str) -> None:
    make, make_theirs, shape = NETWORKS[name]
    ours, theirs = make(), make_theirs()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict({key: torch.tensor(value.numpy().copy()) for key, value in ours.state_dict().items()})
    for net in (ours, theirs):
        net.to("float64" if net is ours else torch.float64)
    for i in range(2):
        compare(ours, theirs, drawn(i, *shape), tolerance=1e-9)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(own.grad, other.grad, 1e-9)
    again = make().to("float64")
    again.load_state_dict(theirs.state_dict())
    again.eval(), theirs.eval(), ours.eval()
    x = drawn(7, *shape)
    assert_near(again(t.tensor(x)), theirs(torch.tensor(x)), 1e-10)
    assert_near(ours(t.tensor(x)), theirs(torch.tensor(x)), 1e-10)
