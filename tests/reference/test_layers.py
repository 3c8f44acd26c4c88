"""Layers against PyTorch's: values, what flows back, names and shapes of states, initial distributions, text."""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import pytest

import tinytorch
from tinytorch import nn
from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m04_layers import calculate_gain, fans
from tinytorch.m04_layers_appendix import load, orthogonal_, save, trunc_normal_

torch = pytest.importorskip("torch")

SHAPES = [(5,), (1, 5), (7, 5), (0, 5), (2, 3, 5), (2, 1, 4, 5)]


def both(*shape: int, seed: int = 0):
    """The same random values as our tensor and as PyTorch's."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return tinytorch.tensor(values), torch.tensor(values)


def pair(ours, theirs):
    """Our module with the weights of PyTorch's, and PyTorch's."""
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_forward_and_backward(shape, bias) -> None:
    ours, theirs = pair(nn.Linear(5, 4, bias=bias), torch.nn.Linear(5, 4, bias=bias))
    x, expected_x = both(*shape)
    x.requires_grad = True
    expected_x.requires_grad_()
    out, expected = ours(x), theirs(expected_x)
    assert_close(out, expected.detach(), rtol=1e-5, atol=1e-5)
    weights, expected_weights = both(*out.shape, seed=1)
    (out * weights).sum().backward()
    (expected * expected_weights).sum().backward()
    assert_close(x.grad, expected_x.grad, rtol=1e-4, atol=1e-5)
    for parameter, expected_parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(parameter.grad, expected_parameter.grad, rtol=1e-4, atol=1e-5)


def test_functional_linear() -> None:
    (x, tx), (w, tw), (b, tb) = both(6, 3), both(4, 3, seed=1), both(4, seed=2)
    functional = torch.nn.functional
    assert_close(nn.functional.linear(x, w, b), functional.linear(tx, tw, tb), atol=1e-5)
    assert_close(nn.functional.linear(x, w), functional.linear(tx, tw), atol=1e-5)


@pytest.mark.parametrize("arguments", [(), (0,), (1, 2), (0, 1), (-2,)])
def test_flatten(arguments) -> None:
    x, expected = both(2, 3, 4, 5)
    assert_close(nn.Flatten(*arguments)(x), torch.nn.Flatten(*arguments)(expected))


@pytest.mark.parametrize("arguments", [(1, (2, 3)), (-1, (2, -1)), (2, (4,))])
def test_unflatten(arguments) -> None:
    x, expected = both(2, 6, 4)
    assert_close(nn.Unflatten(*arguments)(x), torch.nn.Unflatten(*arguments)(expected))


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_dropout_scales_as_pytorch_does(p) -> None:
    x, expected = both(200, 200)
    for layer, values in ((nn.Dropout(p), x), (torch.nn.Dropout(p), expected)):
        out = np.asarray(layer(values).tolist())
        kept = out != 0
        assert abs(kept.mean() - (1 - p)) < 0.02
        assert_close(out[kept] * (1 - p), np.asarray(values.tolist())[kept], rtol=1e-5)
    assert_close(nn.Dropout(p).eval()(x), torch.nn.Dropout(p).eval()(expected))


# -- states ------------------------------------------------------------------------------------------------------------


def build(nn, relu):
    """The same network from either library."""
    return nn.Sequential(
        OrderedDict(
            body=nn.Sequential(nn.Flatten(), nn.Linear(12, 8), relu(), nn.Dropout(0.1), nn.Linear(8, 8, bias=False)),
            rows=nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Identity(), nn.Linear(4, 3)),
        )
    )


def networks():
    return build(nn, nn.ReLU).eval(), build(torch.nn, torch.nn.ReLU).eval()


def test_states_are_exchanged_both_ways() -> None:
    ours, theirs = networks()
    x, expected = both(5, 3, 4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours(x), theirs(expected).detach(), rtol=1e-4, atol=1e-5)
    ours, _ = networks()
    theirs.load_state_dict({name: torch.tensor(value.numpy()) for name, value in ours.state_dict().items()})
    assert_close(ours(x), theirs(expected).detach(), rtol=1e-4, atol=1e-5)


def test_files_are_exchanged_both_ways(tmp_path) -> None:
    reference = pytest.importorskip("safetensors.torch")
    ours, theirs = networks()
    x, expected = both(5, 3, 4)
    reference.save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    ours.load_state_dict(load(tmp_path / "theirs.safetensors"))
    assert_close(ours(x), theirs(expected).detach(), rtol=1e-4, atol=1e-5)
    ours, _ = networks()
    save(ours.state_dict(), tmp_path / "ours.safetensors")
    theirs.load_state_dict(reference.load_file(tmp_path / "ours.safetensors"))
    assert_close(ours(x), theirs(expected).detach(), rtol=1e-4, atol=1e-5)


def test_bfloat16_files(tmp_path) -> None:
    reference = pytest.importorskip("safetensors.torch")
    _, expected = both(4, 3)
    reference.save_file({"x": expected.bfloat16()}, tmp_path / "x")
    assert_close(load(tmp_path / "x")["x"], expected.bfloat16().float(), rtol=0, atol=0)


def test_names_of_parts_are_pytorch_s() -> None:
    ours, theirs = networks()
    for of in (lambda m: m.named_parameters(), lambda m: m.named_buffers()):
        assert [name for name, _ in of(ours)] == [name for name, _ in of(theirs)]
    names = [name for name, module in theirs.named_modules() if not isinstance(module, torch.nn.ReLU)]
    assert [name for name, _ in ours.named_modules()] == names  # an activation is a plain callable here


def test_repr_is_pytorch_s() -> None:
    ours, theirs = networks()
    assert repr(ours) == repr(theirs)
    lists = [n.ModuleList([n.Linear(2, 2), n.Linear(2, 2), n.Sequential(n.Linear(2, 1))]) for n in (nn, torch.nn)]
    assert repr(lists[0]) == repr(lists[1])
    tables = [n.ModuleDict({"a": n.Identity(), "b": n.ModuleDict()}) for n in (nn, torch.nn)]
    assert repr(tables[0]) == repr(tables[1])


# -- initial values ----------------------------------------------------------------------------------------------------


def same_distribution(ours, theirs) -> None:
    """Two large samples agree at their quantiles, as samples of one distribution do."""
    a, b = np.sort(np.asarray(ours).ravel()), np.sort(np.asarray(theirs).ravel())
    grid = np.concatenate([a, b])
    distance = np.abs(np.searchsorted(a, grid, "right") / a.size - np.searchsorted(b, grid, "right") / b.size).max()
    assert distance < 1.95 * math.sqrt((a.size + b.size) / (a.size * b.size))  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_linear_starts_as_pytorch_s(name) -> None:
    manual_seed(0)
    torch.manual_seed(0)
    ours = [getattr(nn.Linear(16, 300), name).numpy() for _ in range(20)]
    theirs = [getattr(torch.nn.Linear(16, 300), name).detach().numpy() for _ in range(20)]
    same_distribution(ours, theirs)
    assert 0.98 * 0.25 < np.abs(ours).max() <= 0.25  # 1 / sqrt(16)


@pytest.mark.parametrize("shape", [(80, 120), (40, 20, 3, 5)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kaiming_uniform_", {}),
        ("kaiming_uniform_", {"a": math.sqrt(5)}),
        ("kaiming_uniform_", {"mode": "fan_out", "nonlinearity": "relu"}),
        ("kaiming_normal_", {"nonlinearity": "relu"}),
        ("kaiming_normal_", {"mode": "fan_out", "nonlinearity": "tanh"}),
        ("xavier_uniform_", {}),
        ("xavier_uniform_", {"gain": 3.0}),
        ("xavier_normal_", {"gain": 0.5}),
        ("uniform_", {"a": -2.0, "b": 5.0}),
        ("normal_", {"mean": 1.0, "std": 0.1}),
    ],
)
def test_init_functions(name, options, shape) -> None:
    manual_seed(1)
    torch.manual_seed(1)
    ours = getattr(nn.init, name)(tinytorch.empty(*shape), **options)
    theirs = getattr(torch.nn.init, name)(torch.empty(*shape), **options)
    same_distribution(ours.numpy(), theirs.numpy())


def test_constants() -> None:
    for name, options in (("zeros_", {}), ("ones_", {}), ("constant_", {"val": 0.3})):
        ours = getattr(nn.init, name)(tinytorch.empty(3, 4), **options)
        assert_close(ours, getattr(torch.nn.init, name)(torch.empty(3, 4), **options))


@pytest.mark.parametrize("bounds", [(0.0, 1.0, -2.0, 2.0), (0.0, 0.02, -2.0, 2.0), (1.0, 2.0, 0.0, 1.5)])
def test_truncated_normal(bounds) -> None:
    manual_seed(2)
    torch.manual_seed(2)
    ours = trunc_normal_(tinytorch.empty(20_000), *bounds)
    same_distribution(ours.numpy(), torch.nn.init.trunc_normal_(torch.empty(20_000), *bounds).numpy())


def test_orthogonal() -> None:
    manual_seed(3)
    torch.manual_seed(3)
    ours = [orthogonal_(tinytorch.empty(4, 6), gain=2.0).numpy() for _ in range(500)]
    theirs = [torch.nn.init.orthogonal_(torch.empty(4, 6), gain=2.0).numpy() for _ in range(500)]
    same_distribution([m[0, 0] for m in ours], [m[0, 0] for m in theirs])
    same_distribution([m[2, 5] for m in ours], [m[2, 5] for m in theirs])


@pytest.mark.parametrize(
    ("name", "param"),
    [("linear", None), ("conv2d", None), ("conv_transpose3d", None), ("sigmoid", None), ("tanh", None),
     ("relu", None), ("selu", None), ("leaky_relu", None), ("leaky_relu", 0.2)],
)  # fmt: skip
def test_calculate_gain(name, param) -> None:
    assert calculate_gain(name, param) == pytest.approx(torch.nn.init.calculate_gain(name, param), rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 6)])
def test_fans(shape) -> None:
    assert fans(tinytorch.empty(*shape)) == torch.nn.init._calculate_fan_in_and_fan_out(torch.empty(*shape))
