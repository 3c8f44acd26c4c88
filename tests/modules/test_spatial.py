"""Module 09 where PyTorch is not needed to say what is right: errors, half precision, state, memory, edges."""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytorch as t
import tinytorch.nn.functional as F
from tinytorch import nn, optim
from tinytorch.m01_setup import assert_close
from tinytorch.m08_training import GradScaler, Trainer
from tinytorch.m09_spatial import BLOCK, convolve_by_loops
from tinytorch.utils.checkpoint import checkpoint

nan, inf = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _seed() -> None:
    t.manual_seed(3)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "words"), [
    (lambda: nn.Conv2d(3, 8, 3, groups=2), "Conv2d: groups must divide the channels, got 3 in, 8 out.* groups=2"),
    (lambda: nn.Conv2d(4, 6, 3, groups=4), "Conv2d: groups must divide the channels, got 4 in, 6 out.* groups=4"),
    (lambda: nn.Conv2d(0, 8, 3), "got 0 in, 8 out"),
    (lambda: nn.Conv2d(3, 8, 0), "Conv2d: kernel_size must be a whole number >= 1 or two of them, got 0"),
    (lambda: nn.Conv2d(3, 8, 2.5), "kernel_size must be a whole number >= 1 or two of them, got 2.5"),
    (lambda: nn.Conv2d(3, 8, (3, 3, 3)), r"kernel_size .* got \(3, 3, 3\)"),
    (lambda: nn.Conv2d(3, 8, 3, stride=-1), "Conv2d: stride .* got -1"),
    (lambda: nn.Conv2d(3, 8, 3, padding=-1), "Conv2d: padding must be a whole number >= 0 or two of them, got -1"),
    (lambda: nn.Conv2d(3, 8, 3, padding="full"), "padding must be 'valid', 'same' or whole numbers, got 'full'"),
    (lambda: nn.Conv2d(3, 8, 3, 2, "same"), r"padding='same' is for a stride of 1, the stride is \(2, 2\)"),
    (lambda: nn.Conv2d(3, 8, 3, padding_mode="mirror"), "padding_mode must be one of .*'circular'.*, got 'mirror'"),
    (lambda: t.SimpleCNN(size=4, widths=(8, 8, 8)), "SimpleCNN: pictures of 4x4 cannot be halved 3 times"),
])  # fmt: skip
def test_layers_that_cannot_be_made(make: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(("call", "words"), [
    (lambda: nn.Conv2d(3, 8, 3)(t.zeros(1, 1, 8, 8)), "conv2d: input has 1 channels, but the weight takes 3"),
    (lambda: nn.Conv2d(3, 8, 5)(t.zeros(1, 3, 4, 8)),
     r"conv2d: a window of 5x5 with dilation \(1, 1\) does not fit in a picture of 4x8 with padding"),
    (lambda: nn.Conv2d(3, 8, 3, dilation=4)(t.zeros(3, 8, 8)), r"3x3 with dilation \(4, 4\) does not fit in .* 8x8"),
    (lambda: nn.Conv2d(3, 8, 3)(t.zeros(8, 8)), r"expected an input \(N, C, H, W\) or \(C, H, W\) .*input \(8, 8\)"),
    (lambda: nn.MaxPool2d(3)(t.zeros(1, 1, 2, 2)), "max_pool2d: a window of 3x3 .* picture of 2x2"),
    (lambda: nn.MaxPool2d(2, padding=2)(t.zeros(1, 1, 9, 9)), r"at most half of kernel_size, got \(2, 2\) and"),
    (lambda: nn.BatchNorm2d(3)(t.zeros(2, 4, 5, 5)),
     r"BatchNorm2d: expected an input of 4 axes with 3 channels in the second, got \(2, 4, 5, 5\)"),
    (lambda: nn.BatchNorm2d(3)(t.zeros(2, 3)), r"expected an input of 4 axes .* got \(2, 3\)"),
    (lambda: nn.BatchNorm2d(3)(t.zeros(1, 3, 1, 1)), r"more than one value a channel, the input has .*\(1, 3, 1, 1\)"),
    (lambda: F.batch_norm(t.zeros(2, 3), t.zeros(4), t.ones(3)), r"3 channels, but running_mean has shape \(4,\)"),
    (lambda: F.batch_norm(t.zeros(2, 3), None, None, t.zeros(2)), r"3 channels, but weight has shape \(2,\)"),
    (lambda: F.batch_norm(t.zeros(3), None, None), r"batch_norm: expected .*\(N, C, …\) of floats, got float32 \(3,\)"),
    (lambda: nn.BatchNorm2d(2).eval()(t.zeros(1, 2, 3, 3, dtype="int64")), "of floats, got int64"),
    (lambda: F.instance_norm(t.zeros(1, 2, 3), use_input_stats=False), "needs running_mean and running_var"),
])  # fmt: skip
def test_inputs_that_do_not_fit(call: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_a_wrong_dtype_comes_with_its_cure() -> None:
    with pytest.raises(TypeError, match=r"input is float64, but the weight is float32; input.to\('float32'\) fits it"):
        nn.Conv2d(1, 1, 1)(t.zeros(1, 1, 2, 2, dtype="float64"))


# -- values ------------------------------------------------------------------------------------------------------------


def test_the_loops_are_the_definition(device: str) -> None:
    rng = np.random.default_rng(0)
    for stride, padding, dilation, groups in ((1, 0, 1, 1), (2, 1, 1, 2), (1, 2, 2, 4), (3, 1, 1, 1)):
        x, weight = (t.tensor(rng.normal(size=s)) for s in ((2, 4, 5, 6), (4, 4 // groups, 2, 3)))
        bias = t.tensor(rng.normal(size=4))
        fast = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        assert_close(fast, convolve_by_loops(x, weight, bias, stride, padding, dilation, groups))


def test_numpys_whole_numbers_are_whole_numbers() -> None:
    three, one = np.int64(3), np.int32(1)
    assert repr(nn.Conv2d(1, 1, three, padding=(one, one))) == repr(nn.Conv2d(1, 1, 3, padding=(1, 1)))
    assert nn.Conv1d(1, 1, three, padding=one)(t.zeros(1, 1, 5)).shape == (1, 1, 5)
    with pytest.raises(ValueError, match="kernel_size must be a whole number >= 1 or two of them, got True"):
        nn.Conv2d(1, 1, True)


def test_geometry_by_hand() -> None:
    x, ones = t.tensor([[[1.0, 2.0, 3.0]]]), t.ones(1, 1, 1, 2)
    assert F.conv2d(x, ones, padding="same").tolist() == [[[3, 5, 3]]]  # of two borders the right one is longer
    assert F.conv2d(x, ones, padding="same", dilation=2).tolist() == [[[2, 4, 2]]]
    pooled = F.max_pool2d(t.ones(1, 1, 3), (1, 2), (1, 3), (0, 1), ceil_mode=True)
    assert pooled.shape == (1, 1, 2)
    assert F.max_pool2d(t.ones(1, 1, 2), (1, 2), (1, 3), (0, 1), ceil_mode=True).shape == (1, 1, 1)
    assert F.max_pool2d(t.ones(1, 1, 5), (1, 2), (1, 2), ceil_mode=True).shape == (1, 1, 3)


def test_max_pool_of_integers_and_of_minus_infinity() -> None:
    x = t.tensor([[[-5, -7, -9], [-6, -8, -4]]])
    assert F.max_pool2d(x, 2, 1, 1).tolist() == [[[-5, -5, -7, -9], [-5, -5, -4, -4], [-6, -6, -4, -4]]]
    assert F.max_pool2d(t.full((1, 2, 2), -inf), 2).tolist() == [[[-inf]]]


def test_a_border_never_holds_the_largest_not_even_of_minus_infinity() -> None:
    x = t.full((1, 1, 4, 4), -inf).requires_grad_()
    out, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    out.sum().backward()
    assert indices.tolist() == [[[[0, 1], [4, 5]]]]
    assert x.grad[0, 0, :2, :2].tolist() == [[1, 1], [1, 1]]


def test_a_window_with_nan_is_nan_and_passes_no_gradient() -> None:
    """The maximum is unknown, so nothing is said to have caused it; the other windows are as ever."""
    x = t.tensor([[[1.0, nan, 3.0, 4.0], [2.0, 0.0, 5.0, 0.0]]], requires_grad=True)
    out = F.max_pool2d(x, 2)
    assert np.isnan(out.tolist()[0][0][0])
    assert out.tolist()[0][0][1] == 5
    out.sum().backward()
    assert x.grad.tolist() == [[[0, 0, 0, 0], [0, 0, 1, 0]]]


def test_convolution_keeps_its_inputs() -> None:
    x, layer = t.randn(2, 3, 6, 6, requires_grad=True), nn.Conv2d(3, 4, 1)
    before = x.detach().clone()
    layer(x).sum().backward()
    assert x.tolist() == before.tolist()
    assert not np.shares_memory(layer(x).numpy(), x.numpy())
    assert not np.shares_memory(F.max_pool2d(x, 1).numpy(), x.numpy())


def test_indices_of_integers_lie_inside_too() -> None:
    _, indices = F.max_pool2d(t.zeros(1, 4, 4, dtype="uint8"), 3, 2, 1, return_indices=True)
    assert indices.tolist() == [[[0, 1], [4, 5]]]


def test_a_weights_gradient_is_that_of_all_blocks() -> None:
    x, layer = t.randn(9, 32, 16, 16), nn.Conv2d(32, 4, 3, padding=1)
    assert BLOCK < 9 * 32 * 9 * 256  # more than one block
    layer(x).sum().backward()
    parts = []
    for picture in x:
        layer_alone = copy.deepcopy(layer)
        layer_alone.zero_grad()
        layer_alone(picture.unsqueeze(0)).sum().backward()
        parts.append(layer_alone.weight.grad)
    assert_close(layer.weight.grad, t.stack(parts).sum(0), rtol=1e-4, atol=1e-2)


def test_borders_of_a_mode_lie_on_their_sides() -> None:
    layer = nn.Conv2d(1, 1, (1, 3), padding=(0, 1), padding_mode="replicate", bias=False)
    layer.load_state_dict({"weight": t.tensor([[[[1.0, 0.0, 0.0]]]])})  # what stands on the left
    assert layer(t.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])).tolist() == [[[[1, 1, 2], [4, 4, 5]]]]


def test_first_biases_go_by_what_a_window_holds() -> None:
    bias = nn.Conv2d(4, 2000, 3).bias
    assert 0.9 < bias.abs().amax().item() * 6 <= 1  # 1 / sqrt(4 · 9)


# -- half precision ----------------------------------------------------------------------------------------------------


def test_batch_norm_of_half_precision_does_not_overflow() -> None:
    """The squares of these values are beyond what float16 holds; so is the sum of them."""
    wide = t.randn(8, 3, 16, 16) * 300 + 1000
    x = wide.half().requires_grad_()
    layer, reference = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    out = layer(x)
    expected = reference(x.detach().float())
    assert out.dtype == t.float16
    assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)
    assert layer.running_mean.dtype == layer.running_var.dtype == t.float32
    assert_close(layer.running_var, reference.running_var, rtol=1e-3)
    (out * t.randn(*x.shape).half()).sum().backward()
    assert x.grad.dtype == t.float16
    assert np.isfinite(x.grad.numpy()).all()
    assert layer.weight.grad.dtype == t.float32


def test_half_precision_in_eval_mode() -> None:
    layer = nn.BatchNorm2d(3)
    for _ in range(3):
        layer(t.randn(8, 3, 4, 4) * 2 + 1)
    x = t.randn(2, 3, 4, 4)
    expected = layer.eval()(x)
    out = layer(x.half())
    assert out.dtype == t.float16
    assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
    assert copy.deepcopy(layer).half()(x.half()).dtype == t.float16
    assert layer(x.half()).dtype == layer.train()(x.half()).dtype == t.float16  # also with float32 parameters


def test_a_cnn_trains_in_mixed_precision() -> None:
    pictures, labels = t.randn(32, 1, 8, 8) * 0.3, t.randint(2, (32,))
    pictures[:, 0, 0] += labels.float().reshape(-1, 1) * 2
    net = t.SimpleCNN(1, 2, 8, widths=(4, 8), hidden=8, batch_norm=True)
    optimizer = optim.Adam(net.parameters(), lr=0.02)
    trainer = Trainer(net, optimizer, nn.CrossEntropyLoss(), precision="float16", scaler=GradScaler(init_scale=256.0))
    history = trainer.fit([(pictures, labels)], 8)
    assert history[-1]["loss"] < history[0]["loss"] / 2
    assert net[0].weight.dtype == net[1].running_mean.dtype == t.float32


# -- state -------------------------------------------------------------------------------------------------------------


def test_running_averages() -> None:
    layer = nn.BatchNorm2d(2, momentum=0.5)
    average, count = layer.running_mean, layer.num_batches_tracked
    layer(t.ones(2, 2, 2, 2) * 4)
    assert layer.running_mean is average  # written in place, as whoever shares it expects
    assert (average.tolist(), layer.running_var.tolist(), count.item()) == ([2, 2], [0.5, 0.5], 1)
    layer.eval()(t.randn(2, 2, 2, 2))
    assert (average.tolist(), layer.num_batches_tracked.item()) == ([2, 2], 1)
    assert not layer.running_mean.requires_grad
    plain = nn.BatchNorm2d(2, momentum=None)
    for value in (1.0, 2.0, 6.0):
        plain(t.ones(3, 2, 1, 1) * value)
    assert_close(plain.running_mean, [3.0, 3.0])


def test_batch_norm_without_tracking_normalises_always() -> None:
    layer, x = nn.BatchNorm2d(2, track_running_stats=False, affine=False).eval(), t.randn(4, 2, 3, 3) * 5 + 2
    assert_close(layer(x).mean((0, 2, 3)), [0.0, 0.0], atol=1e-5)
    assert list(layer.state_dict()) == []
    assert (layer.running_mean, layer.weight, layer.bias) == (None, None, None)


def test_a_channel_that_hardly_varies_does_not_overflow_in_half_precision() -> None:
    layer = nn.BatchNorm2d(1)
    for _ in range(200):
        layer(t.full((8, 1, 4, 4), 300.0))
    layer.eval()
    x = t.full((8, 1, 4, 4), 300.0)
    out = layer(x.half())
    assert out.dtype == t.float16
    assert_close(out, layer(x), atol=1e-3)


def test_training_after_an_evaluation_does_not_disturb_its_gradients() -> None:
    for layer in (nn.BatchNorm2d(2), nn.InstanceNorm2d(2, track_running_stats=True)):
        x = t.ones(2, 2, 3, 3, requires_grad=True)
        out = layer.eval()(x)
        layer.train()(t.randn(4, 2, 3, 3))
        out.sum().backward()
        assert_close(x.grad, t.full((2, 2, 3, 3), (1 + 1e-5) ** -0.5))


def test_averages_that_are_frozen_stay() -> None:
    layer = nn.BatchNorm2d(2)
    layer.track_running_stats = False
    layer(t.randn(4, 2, 3, 3) + 5)
    assert layer.running_mean.tolist() == [0, 0]


def test_norms_are_reset() -> None:
    layer = nn.BatchNorm2d(2)
    fresh = {name: x.tolist() for name, x in layer.state_dict().items()}
    layer(t.randn(4, 2, 3, 3) + 5).sum().backward()
    optim.SGD(layer.parameters(), lr=1.0).step()
    layer.reset_parameters()
    assert {name: x.tolist() for name, x in layer.state_dict().items()} == fresh


def test_counting_changes_nothing() -> None:
    net = t.SimpleCNN(3, 10, 8, widths=(4,), batch_norm=True)
    before = {name: x.tolist() for name, x in net.state_dict().items()}
    assert t.count_flops(net, t.randn(2, 3, 8, 8))["convolution"] == 2 * 2 * 4 * 27 * 64
    assert {name: x.tolist() for name, x in net.state_dict().items()} == before
    assert net.training
    transposed = t.count_flops(nn.ConvTranspose2d(2, 3, 3), t.zeros(1, 2, 5, 5))
    assert transposed == {"convolution_input_gradient": 2 * 25 * 2 * 3 * 9}


def test_networks_are_copied_and_saved(tmp_path: Path) -> None:
    net, x = t.SimpleCNN(size=8, widths=(4,), hidden=4, batch_norm=True), t.randn(4, 3, 8, 8)
    net(x)
    twin = copy.deepcopy(net)
    t.save(net.state_dict(), tmp_path / "net.safetensors")
    expected = net.eval()(x)
    net.train()(x + 1)  # goes on averaging, and the copy does not
    assert_close(twin.eval()(x), expected)
    loaded = t.SimpleCNN(size=8, widths=(4,), hidden=4, batch_norm=True)
    loaded.load_state_dict(t.load(tmp_path / "net.safetensors"))
    assert loaded[1].num_batches_tracked.item() == 1
    assert loaded[1].num_batches_tracked.dtype == t.int64
    assert_close(loaded.eval()(x), expected)


def test_simple_cnn_options() -> None:
    net = t.SimpleCNN(1, 5, 12, widths=(2, 3), hidden=7, batch_norm=True)
    assert net(t.zeros(2, 1, 12, 12)).shape == (2, 5)
    names = [type(layer).__name__ for layer in net]
    assert (names.count("BatchNorm2d"), names.count("Conv2d"), names.count("MaxPool2d")) == (2, 2, 2)
    assert all(layer.bias is None for layer in net if isinstance(layer, nn.Conv2d))  # the norm has one
    plain = t.SimpleCNN(1, 5, 12, widths=(2, 3), hidden=7)
    assert list(plain.state_dict())[:2] == ["0.weight", "0.bias"]


# -- memory, and backward ----------------------------------------------------------------------------------------------


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes that a call needs at the most, beside what there was."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = call()
        peak = tracemalloc.get_traced_memory()[1] - before
        del kept
        return peak
    finally:
        tracemalloc.stop()


def test_a_convolution_never_holds_all_columns() -> None:
    x, layer = t.randn(256, 8, 24, 24), nn.Conv2d(8, 8, 3, padding=1)
    block = 4 * BLOCK
    with t.no_grad():
        forward = peak_of(lambda: layer(x))
    assert forward < x.nbytes + 6 * block < x.nbytes * 9 / 2  # the result, and a few blocks; all columns are 9 x
    x.requires_grad = True
    out = layer(x)
    g = t.ones(*out.shape)
    backward = peak_of(lambda: out.backward(g))
    assert backward < 2 * x.nbytes + 8 * block


def test_nothing_is_recorded_without_gradients() -> None:
    layer, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.MaxPool2d(2)), t.randn(2, 1, 6, 6)
    with t.no_grad():
        assert not layer(x).requires_grad
    assert layer(x).requires_grad
    with t.inference_mode():
        assert layer.eval()(x).shape == (2, 2, 2, 2)


def test_checkpoint_gives_the_same_gradients() -> None:
    net, x = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3)), t.randn(2, 2, 8, 8)
    net(x).square().sum().backward()
    expected = [p.grad.tolist() for p in net.parameters()]
    net.zero_grad()
    checkpoint(net, x).square().sum().backward()
    assert [p.grad.tolist() for p in net.parameters()] == expected


def test_a_frozen_convolution_still_passes_gradients() -> None:
    layer, x = nn.Conv2d(1, 1, 3).freeze(), t.randn(1, 1, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert_close(x.grad.sum(), layer.weight.sum() * 9, rtol=1e-4)


# -- costs -------------------------------------------------------------------------------------------------------------


def test_counts_of_grouped_and_strided_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, (3, 5), stride=2, groups=2), nn.Flatten(), nn.Linear(8 * 3 * 2, 5))
    assert t.count_parameters(net) == 8 * 2 * 15 + 8 + 48 * 5 + 5
    counts = t.count_flops(net, t.zeros(3, 4, 7, 7))
    assert counts == {"convolution": 2 * 3 * 8 * 6 * 2 * 15, "linear": 2 * 3 * 5 * 48}
