"""Quantization against PyTorch's: steps, rounding, gradients, and layers of int8."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytorch
from tests.reference.near import drawn, seeds, some
from tinytorch import nn
from tinytorch.m17_quantization import weight_scale
from tinytorch.quantization import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    QuantizedLinear,
    choose_scale,
    dequantize,
    fake_quantize,
    quantize,
)

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.ao.quantization is to move to torchao
    from torch.ao.quantization import observer as theirs

pytestmark = pytest.mark.filterwarnings("ignore")

zeros = st.integers(-128, 127)
shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def both(seed: int, *shape: int) -> tuple:
    x = drawn(seed, *shape, dtype="float32")
    return tinytorch.tensor(x), torch.tensor(x)


@some
@given(seed=seeds, batches=st.integers(1, 4), positive=st.booleans())
def test_observers_choose_the_same_steps(seed: int, batches: int, positive: bool) -> None:
    pairs = [
        (MinMaxObserver(), theirs.MinMaxObserver(dtype=torch.qint8)),
        (MovingAverageMinMaxObserver(0.1), theirs.MovingAverageMinMaxObserver(0.1, dtype=torch.qint8)),
    ]
    for ours, other in pairs:
        for i in range(batches):
            x, tx = both(seed + i, 5, 7)
            ours(abs(x) if positive else x)
            other(tx.abs() if positive else tx)
        scale, zero_point = ours.calculate_qparams()
        other_scale, other_zero_point = other.calculate_qparams()
        np.testing.assert_allclose(scale.item(), other_scale.item(), rtol=1e-6)
        assert zero_point.item() == other_zero_point.item()


@some
@given(seed=seeds)
def test_weights_have_the_same_scales(seed: int) -> None:
    weight, other = both(seed, 6, 4, 3)
    observer = theirs.PerChannelMinMaxObserver(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127
    )
    observer(other)
    np.testing.assert_allclose(weight_scale(weight).numpy(), observer.calculate_qparams()[0].numpy(), rtol=1e-6)


def nearly(ours: np.ndarray, others: np.ndarray, exact: np.ndarray) -> None:
    """The same integers; where x / scale lies in the middle of two, PyTorch rounds as its vectors happen to."""
    middle = np.abs(np.abs(exact - np.trunc(exact)) - 0.5) < 1e-4
    assert ours.dtype == others.dtype
    np.testing.assert_array_equal(ours[~middle], others[~middle])
    assert np.abs(ours.astype(int) - others.astype(int)).max(initial=0) <= 1


@some
@given(seed=seeds, shape=shapes, scale=st.sampled_from([0.01, 0.031, 0.5]), zero=zeros)
def test_one_scale(seed: int, shape: tuple, scale: float, zero: int) -> None:
    x, tx = both(seed, *shape)
    q, tq = quantize(x, scale, zero), torch.quantize_per_tensor(tx, scale, zero, torch.qint8)
    nearly(q.numpy(), tq.int_repr().numpy(), x.numpy() / scale)
    back = dequantize(tinytorch.tensor(tq.int_repr().numpy()), scale, zero)
    np.testing.assert_allclose(back.numpy(), tq.dequantize().numpy(), rtol=1e-6)


@some
@given(seed=seeds, shape=shapes, dim=st.integers(0, 3))
def test_a_scale_for_each_channel(seed: int, shape: tuple, dim: int) -> None:
    dim %= len(shape)
    x, tx = both(seed, *shape)
    scale, zero = np.random.default_rng(seed).uniform(0.01, 0.1, shape[dim]).astype("float32"), np.arange(shape[dim])
    q = quantize(x, tinytorch.tensor(scale), tinytorch.tensor(zero), dim=dim)
    tq = torch.quantize_per_channel(tx, torch.tensor(scale), torch.tensor(zero), dim, torch.qint8)
    column = scale.reshape([-1 if d == dim else 1 for d in range(len(shape))])
    nearly(q.numpy(), tq.int_repr().numpy(), x.numpy() / column)


@some
@given(seed=seeds, shape=shapes, zero=st.integers(-8, 7), scale=st.sampled_from([0.1, 0.3]))
def test_fake_quantization_and_its_gradient(seed: int, shape: tuple, zero: int, scale: float) -> None:
    x, tx = both(seed, *shape)
    weights, other_weights = both(seed + 1, *shape)
    x.requires_grad = True
    tx.requires_grad_()
    ours = fake_quantize(x, scale, zero, low=-8, high=7)
    other = torch.fake_quantize_per_tensor_affine(tx, scale, zero, -8, 7)
    np.testing.assert_allclose(ours.detach().numpy(), other.detach().numpy(), rtol=1e-5, atol=1e-6)
    (ours * weights).sum().backward()
    (other * other_weights).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), tx.grad.numpy(), rtol=1e-6)


def test_a_dynamic_layer() -> None:
    """PyTorch rounds inputs by one affine scale of 7 bits for the whole batch, ours by a scale for each row."""
    float_layer = torch.nn.Linear(64, 32)
    other = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(float_layer), {torch.nn.Linear}, torch.qint8)
    layer = nn.Linear(64, 32)
    layer.load_state_dict({n: p.detach().numpy() for n, p in float_layer.named_parameters()})
    x, tx = both(0, 40, 64)
    ours, theirs_, exact = QuantizedLinear(64, 32).fill(layer)(x).numpy(), other(tx).numpy(), float_layer(tx).detach()
    errors = [np.sqrt(np.mean((y - exact.numpy()) ** 2)) for y in (ours, theirs_)]
    assert errors[0] < 0.02
    assert errors[0] < errors[1]


def test_a_static_layer() -> None:
    """The sums of PyTorch's kernel, and its rounding of the result, are ours."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(32, 64)).astype("float32"), rng.normal(size=32).astype("float32")
    layer = nn.Linear(64, 32)
    layer.load_state_dict({"weight": weight, "bias": bias})
    ours = QuantizedLinear(64, 32, static=True).fill(layer)
    x = rng.normal(size=(50, 64)).astype("float32")
    scale, zero = choose_scale(tinytorch.tensor(x.min()), tinytorch.tensor(x.max()))
    ours.input_scale, ours.input_zero_point = scale, zero
    scales = ours.weight_scale.numpy()
    other_weight = torch.quantize_per_channel(
        torch.tensor(weight), torch.tensor(scales).double(), torch.zeros(32, dtype=torch.int64), 0, torch.qint8
    )
    np.testing.assert_array_equal(ours.weight.numpy(), other_weight.int_repr().numpy())
    other_x = torch.quantize_per_tensor(torch.tensor(x), scale.item(), zero.item() + 128, torch.quint8)
    packed = torch.ops.quantized.linear_prepack(other_weight, torch.tensor(bias))
    theirs_ = torch.ops.quantized.linear(other_x, packed, 0.2, 128)
    rounded = quantize(ours(tinytorch.tensor(x)), 0.2, 0).numpy().astype(int)
    assert np.abs(rounded - (theirs_.int_repr().numpy().astype(int) - 128)).max() <= 1  # theirs rounds the bias, too
    assert (rounded == theirs_.int_repr().numpy().astype(int) - 128).mean() > 0.98
