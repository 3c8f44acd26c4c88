"""The appendix of module 09 where PyTorch is not needed to say what is right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import tinytorch as t
import tinytorch.nn.functional as F
from tinytorch import nn
from tinytorch.m01_setup import assert_close


@pytest.fixture(autouse=True)
def _seed() -> None:
    t.manual_seed(4)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "words"), [
    (lambda: nn.Conv1d(3, 8, (3, 3)), r"Conv1d: kernel_size must be a whole number >= 1, got \(3, 3\)"),
    (lambda: nn.Conv1d(3, 8, 3, groups=2), "Conv1d: groups must divide the channels, got 3 in, 8 out and groups=2"),
    (lambda: nn.Conv1d(4, 8, 3, 2, "same"), r"Conv1d: padding='same' is for a stride of 1"),
    (lambda: nn.Conv1d(4, 8, 3, padding_mode="wrap"), "Conv1d: padding_mode must be one of .* got 'wrap'"),
    (lambda: nn.ConvTranspose2d(4, 8, 3, padding_mode="reflect"), r"must be one of \('zeros',\), got 'reflect'"),
    (lambda: nn.GroupNorm(3, 8), "GroupNorm: num_groups must divide num_channels, got 3 and 8"),
    (lambda: nn.Dropout2d(1.5), "Dropout2d: p is a probability, between 0 and 1, got 1.5"),
    (lambda: nn.ZeroPad2d((1, 2)), r"ZeroPad2d: padding must be a number or \(left, .*, got \(1, 2\)"),
    (lambda: nn.ZeroPad2d(1.5), "ZeroPad2d: padding must be a number or .* got 1.5"),
    (lambda: nn.ConvTranspose2d(2, 2, 2, padding="same"), "ConvTranspose2d: padding must be a whole number >= 0"),
    (lambda: t.ResNet(18), "ResNet: depth must be 6 n \\+ 2, such as 8, 14, 20 or 56, got 18"),
    (lambda: t.ResNet(2), "ResNet: depth must be"),
    (lambda: nn.Conv1d(2, 3, 3)(t.zeros(1, 2, 3, 3)), r"conv1d: expected an input \(N, C, L\) or \(C, L\)"),
    (lambda: nn.Conv1d(2, 3, 3)(t.zeros(1, 4, 9)), "conv1d .*: input has 4 channels, but the weight takes 2"),
    (lambda: nn.Conv1d(2, 3, 3)(t.zeros(1, 2, 2)), "conv1d .*: a window of 1x3 .* does not fit in a picture of 1x2"),
    (lambda: F.conv1d(t.zeros(1, 2, 2), t.zeros(2, 2)), r"conv1d: expected a weight \(O, C, K\), got \(2, 2\)"),
    (lambda: F.max_pool1d(t.zeros(1, 2, 2), (2, 2)), r"max_pool1d: kernel_size must be a whole number >= 1"),
    (lambda: F.conv_transpose1d(t.zeros(1, 2, 2), t.zeros(2, 2)), r"conv_transpose1d: expected a weight \(C, O, K\)"),
    (lambda: F.conv_transpose2d(t.zeros(1, 2, 2, 2), t.zeros(2, 2, 2, 2), t.zeros(3)), r"a float32 bias \(2,\)"),
    (lambda: F.conv_transpose2d(t.zeros(1, 3, 2, 2), t.zeros(3, 2, 2, 2), groups=2), "groups must divide the 3 input"),
    (lambda: nn.BatchNorm1d(3)(t.zeros(1, 3)), r"more than one value a channel, the input has shape \(1, 3\)"),
    (lambda: nn.BatchNorm1d(3)(t.zeros(2, 3, 4, 4)), r"BatchNorm1d: expected an input of 2 or 3 axes with 3 channels"),
    (lambda: nn.InstanceNorm2d(3)(t.zeros(2, 4, 4, 4)), r"InstanceNorm2d: expected an input of 3 or 4 axes with 3 ch"),
    (lambda: nn.InstanceNorm2d(3)(t.zeros(2, 3, 1, 1)), r"instance_norm: expected more than one place a channel"),
    (lambda: F.dropout2d(t.zeros(2, 3)), r"dropout2d: expected an input \(N, C, H, W\) or \(N, C, L\), got \(2, 3\)"),
    (lambda: F.interpolate(t.zeros(1, 1, 2, 2), (3, 3, 3)), r"expected 2 positive lengths or factors, got \(3, 3, 3\)"),
    (lambda: F.interpolate(t.zeros(1, 1, 2, 2)), "either size or scale_factor, got None and None"),
    (lambda: F.interpolate(t.zeros(1, 1, 2), 2, mode="bilinear"), "mode must be one of .*'linear'"),
    (lambda: F.affine_grid(t.zeros(2, 2, 3), (3, 1, 4, 4)), r"affine_grid: expected a size .* got \(3, 1, 4, 4\) and"),
    (lambda: F.pixel_unshuffle(t.zeros(1, 3, 4), 2), r"with H and W multiples of 2, got \(1, 3, 4\)"),
    (lambda: nn.PReLU(3)(t.zeros(2, 4)), "prelu: expected 1 slope or one for each of 4 channels, got 3"),
])  # fmt: skip
def test_errors_say_what_would_be_right(call: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_wrong_dtypes() -> None:
    with pytest.raises(TypeError, match=r"conv_transpose2d: input is float64, but the weight is float32; input.to"):
        F.conv_transpose2d(t.zeros(1, 2, 2, 2, dtype="float64"), t.zeros(2, 2, 2, 2))


# -- values ------------------------------------------------------------------------------------------------------------


def test_avg_pool_counts_what_it_is_told_to() -> None:
    x = t.ones(1, 1, 3, 3)
    assert_close(F.avg_pool2d(x, 3, 2, 1), t.full((1, 1, 2, 2), 4 / 9))
    assert_close(F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), t.ones(1, 1, 2, 2))
    assert_close(F.avg_pool2d(x, 2, ceil_mode=True), t.ones(1, 1, 2, 2))
    assert F.avg_pool2d(x, 3, divisor_override=3).tolist() == [[[[3]]]]
    assert repr(nn.AvgPool2d(3, 2)) == "AvgPool2d(kernel_size=3, stride=2, padding=0)"


def test_a_transposed_convolution_is_the_transpose() -> None:
    """<conv(x), g> = <x, conv_transpose(g)>: that is what transposing means."""
    x, weight = t.randn(2, 4, 9, 7, dtype="float64"), t.randn(6, 2, 3, 2, dtype="float64")
    options = {"stride": (2, 1), "padding": (1, 0), "groups": 2, "dilation": (2, 1)}
    out = F.conv2d(x, weight, **options)
    g = t.randn(*out.shape, dtype="float64")
    back = F.conv_transpose2d(g, weight, **options)
    assert back.shape == x.shape
    assert_close((out * g).sum(), (x * back).sum())


def test_a_transposed_kernel_of_one_pixel_can_miss_the_picture() -> None:
    """As many windows as pixels, yet the window lies in the border."""
    out = F.conv_transpose1d(t.ones(1, 1, 1), t.ones(1, 1, 1), padding=1, output_padding=2, dilation=3)
    assert out.tolist() == [[[0]]]


def test_folding_what_was_unfolded_counts_the_windows() -> None:
    x = t.randn(2, 3, 5, 6)
    back = F.fold(F.unfold(x, 3, padding=1), (5, 6), 3, padding=1)
    counts = F.fold(F.unfold(t.ones(2, 3, 5, 6), 3, padding=1), (5, 6), 3, padding=1)
    assert counts[0, 0, 2, 2].item() == 9
    assert_close(back, x * counts, rtol=1e-5)


def test_norms_do_not_depend_on_the_neighbours() -> None:
    x = t.randn(3, 6, 4, 4) * 4 + 2
    for layer in (nn.GroupNorm(3, 6), nn.InstanceNorm2d(6)):
        assert_close(layer(x)[1], layer(x[1:2])[0], rtol=1e-4, atol=1e-6)
    groups = nn.GroupNorm(3, 6)(x).reshape(3, 3, -1)
    assert_close(groups.mean(-1), t.zeros(3, 3), atol=1e-5)
    assert_close(groups.var(-1, correction=0), t.ones(3, 3), rtol=1e-4)


def test_norms_of_half_precision() -> None:
    x = t.randn(2, 4, 16, 16) * 300 + 1000
    for layer in (nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)):
        out = layer(x.half())
        assert out.dtype == t.float16
        assert_close(out.float(), layer(x.half().float()), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("layer", [nn.Dropout2d(0.3), nn.Dropout1d(0.3)])
def test_dropout_of_channels(layer: nn.Module) -> None:
    x = t.ones(*((60, 50, 4) if type(layer) is nn.Dropout1d else (60, 50, 2, 2)), requires_grad=True)
    out = layer(x)
    channels = out.reshape(60, 50, 4).detach().numpy()
    assert (channels == channels[..., :1]).all()
    assert abs((channels == 0).mean() - 0.3) < 0.03
    assert np.allclose(channels[channels != 0], 1 / 0.7)
    out.sum().backward()
    assert_close(x.grad, out.detach())
    assert layer.eval()(x) is x
    assert F.dropout2d(x.detach(), 1.0).tolist() == t.zeros(*x.shape).tolist()
    y = t.ones(*x.shape)
    assert F.dropout2d(y, 0.5, inplace=True) is y
    assert (y == 0).any()


def test_dropout_of_a_signal_without_a_batch() -> None:
    out = F.dropout1d(t.ones(400, 3), 0.5).numpy()
    assert (out == out[:, :1]).all()
    assert abs((out == 0).mean() - 0.5) < 0.1


def test_warping_with_the_identity_is_no_change() -> None:
    x = t.randn(2, 3, 5, 7)
    theta = t.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]] * 2)
    for corners in (False, True):
        for mode in ("bilinear", "nearest"):
            grid = F.affine_grid(theta, x.shape, corners)
            assert_close(F.grid_sample(x, grid, mode, align_corners=corners), x, rtol=1e-4, atol=1e-5)
    mirrored = F.affine_grid(theta * t.tensor([[-1.0], [1.0]]), x.shape)
    assert_close(F.grid_sample(x, mirrored), x.flip(3), rtol=1e-4, atol=1e-5)
    half = F.grid_sample(x, F.affine_grid(theta, (2, 3, 2, 2)))
    assert half.shape == (2, 3, 2, 2)


def test_what_lies_outside_of_the_picture() -> None:
    x = t.tensor([[[[1.0, 2.0, 3.0]]]])
    grid = t.tensor([[[[-3.0, 0.0], [3.0, 0.0], [2.0, 0.0]]]])
    assert F.grid_sample(x, grid, "nearest").flatten().tolist() == [0, 0, 0]
    assert F.grid_sample(x, grid, "nearest", "border").flatten().tolist() == [1, 3, 3]
    assert F.grid_sample(x, grid, "nearest", "reflection").flatten().tolist() == [3, 1, 2]
    assert F.grid_sample(x, grid, "nearest", "reflection", True).flatten().tolist() == [3, 1, 2]


def test_resizing() -> None:
    x = t.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    twice = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert nn.Upsample(scale_factor=2)(x).tolist() == [[twice]]
    assert F.interpolate(x, (2, 3), mode="bilinear", align_corners=True).tolist() == [[[[1, 1.5, 2], [3, 3.5, 4]]]]
    assert F.interpolate(x, 1, mode="area").tolist() == [[[[2.5]]]]
    assert F.pixel_shuffle(t.arange(4).reshape(4, 1, 1), 2).tolist() == [[[0, 1], [2, 3]]]
    y = t.randn(2, 8, 3, 3)
    assert F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2).tolist() == y.tolist()


def test_adaptive_pooling_covers_everything() -> None:
    x = t.arange(5, dtype="float32").reshape(1, 1, 5)  # in windows of 2, 3 and 2 elements
    assert_close(F.adaptive_avg_pool1d(x, 3), [[[0.5, 2.0, 3.5]]])
    for sign, values, places in ((1, [1, 3, 4], [1, 3, 4]), (-1, [0, -1, -3], [0, 1, 3])):
        out, indices = F.adaptive_max_pool2d(x.reshape(1, 5, 1) * sign, (3, 1), return_indices=True)
        assert (out.flatten().tolist(), indices.flatten().tolist()) == (values, places)


# -- networks ----------------------------------------------------------------------------------------------------------


def test_resnet_20_has_the_papers_number_of_parameters() -> None:
    assert t.count_parameters(t.ResNet(20)) == 269_722  # 0.27 million
    assert t.count_parameters(t.ResNet(56)) == 853_018  # 0.85 million
    net = t.ResNet(8, in_channels=1, classes=7, width=4)
    assert net(t.randn(2, 1, 16, 12)).shape == (2, 7)
    assert len([m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]) == 8


def test_a_resnets_signal_keeps_its_size() -> None:
    net = t.ResNet(20, width=8)
    weight = net.layer3[1].conv1.weight
    assert float(weight.std()) == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)
    sizes = []
    for stage in (net.layer1, net.layer2, net.layer3):
        stage.register_forward_hook(lambda module, inputs, out: sizes.append(float(out.std())))
    net(t.randn(8, 3, 16, 16))
    assert all(0.5 < size < 4 for size in sizes)


def test_a_block_that_adds_nothing_is_its_shortcut() -> None:
    net = t.ResNet(8, width=4)
    block = net.layer2[0]
    nn.init.zeros_(block.bn2.weight)
    x = t.randn(2, 4, 6, 6).abs()
    out = block(x)
    assert_close(out[:, 2:6], x[:, :, ::2, ::2])
    assert out[:, :2].tolist() == t.zeros(2, 2, 3, 3).tolist()


def test_lenet_reads_digits() -> None:
    net = t.LeNet5()
    assert t.count_parameters(net) == 61_706
    assert net(t.zeros(3, 1, 28, 28)).shape == (3, 10)
