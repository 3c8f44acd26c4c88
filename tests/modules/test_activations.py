"""Activations against formulas in NumPy float64, at extreme values, on each array library, and with bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytorch import m03_activations as m
from tinytorch import m03_activations_appendix as more
from tinytorch.m01_setup import assert_close
from tinytorch.m02_tensor import Op, Tensor, tensor
from tinytorch.m02_tensor_appendix import set_default_device

erf = np.vectorize(math.erf)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    shifted = np.exp(x - x.max(axis=axis, keepdims=True))
    return shifted / shifted.sum(axis=axis, keepdims=True)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


# Each activation with a formula that is not the one in the code.
FORMULAS = {
    "relu": (m.ReLU(), lambda x: x * (x > 0)),
    "leaky_relu": (m.LeakyReLU(0.3), lambda x: np.where(x > 0, x, 0.3 * x)),
    "hardtanh": (m.Hardtanh(-0.5, 2.0), lambda x: np.clip(x, -0.5, 2)),
    "sigmoid": (m.Sigmoid(), sigmoid),
    "tanh": (m.Tanh(), lambda x: 2 * sigmoid(2 * x) - 1),
    "silu": (m.SiLU(), lambda x: x * sigmoid(x)),
    "gelu": (m.GELU(), lambda x: x * (1 + erf(x / np.sqrt(2))) / 2),
    "gelu_tanh": (m.GELU("tanh"), lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
    "softplus": (m.Softplus(beta=2.0, threshold=4.0), lambda x: np.where(2 * x > 4, x, softplus(2 * x) / 2)),
    "elu": (m.ELU(0.7), lambda x: np.where(x > 0, x, 0.7 * (np.exp(np.minimum(x, 0)) - 1))),
    "softmax": (m.Softmax(0), lambda x: softmax(x, 0)),
    "log_softmax": (m.LogSoftmax(-1), lambda x: x - np.logaddexp.reduce(x, axis=-1, keepdims=True)),
    "relu6": (more.ReLU6(), lambda x: np.clip(x, 0, 6)),
    "hardsigmoid": (more.Hardsigmoid(), lambda x: np.clip(x / 6 + 0.5, 0, 1)),
    "hardswish": (more.Hardswish(), lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    "mish": (more.Mish(), lambda x: x * np.tanh(softplus(x))),
    "softsign": (more.Softsign(), lambda x: x / (1 + np.abs(x))),
    "logsigmoid": (more.LogSigmoid(), lambda x: -softplus(-x)),
    "tanhshrink": (more.Tanhshrink(), lambda x: x - np.tanh(x)),
    "selu": (more.SELU(), lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x))),
    "softmin": (more.Softmin(1), lambda x: softmax(-x, 1)),
    "threshold": (more.Threshold(0.3, -7.0), lambda x: np.where(x > 0.3, x, -7)),
    "softshrink": (more.Softshrink(0.4), lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.4, 0)),
    "hardshrink": (more.Hardshrink(0.4), lambda x: x * (np.abs(x) > 0.4)),
    "celu": (more.CELU(0.6), lambda x: np.maximum(x, 0) + np.minimum(0, 0.6 * np.expm1(x / 0.6))),
    "glu": (more.GLU(), lambda x: x[..., :2] * sigmoid(x[..., 2:])),
}


@pytest.fixture(params=["cpu", "array_api_strict", "torch"])
def library(request):
    if request.param != "cpu":
        pytest.importorskip(request.param)
    set_default_device(request.param)
    yield request.param
    set_default_device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FORMULAS)
def test_every_activation_on_every_library(name: str, dtype: str, library: str) -> None:
    layer, formula = FORMULAS[name]
    x = 3 * np.random.default_rng(1).standard_normal((5, 4))
    given_x = tensor(x.tolist(), dtype=dtype)
    before = given_x.tolist()
    out = layer(given_x)
    assert out.dtype == dtype
    assert out.device == library
    assert given_x.tolist() == before
    tolerance = 2e-6 if dtype == "float32" else 1e-12
    assert_close(out, formula(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FORMULAS)
def test_nothing_overflows(name: str) -> None:
    """Warnings are errors here: no intermediate value may leave float32, from -10,000 to 10,000."""
    layer, _ = FORMULAS[name]
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(layer(tensor([[-1e4, -89.0, -0.0, 1e-30], [11.5, 89.0, 710.0, 1e4]])).numpy()).all()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_stays_nan(name: str) -> None:
    layer, _ = FORMULAS[name]
    out = layer(tensor([[math.nan] * 4, [1.0] * 4])).numpy()
    assert np.isnan(out[0]).all()
    if name != "softmax":  # over the first axis, so each column holds a nan
        assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("name", [name for name, (layer, _) in FORMULAS.items() if not hasattr(layer, "dim")])
def test_tensors_without_axes_and_without_elements(name: str) -> None:
    layer, formula = FORMULAS[name]
    for x in (-1.3, 0.2, 2.6):
        assert_close(layer(tensor(x)), formula(np.array(x)))
    assert layer(tensor(np.zeros((3, 0, 4)))).shape == (3, 0, 4)


def test_rows_of_an_empty_batch() -> None:
    empty = tensor(np.zeros((0, 4)))
    assert m.softmax(empty, dim=1).shape == m.log_softmax(empty, dim=1).shape == (0, 4)


def test_integers_become_floats_except_for_relu() -> None:
    x = tensor([-2, 3])
    assert m.relu(x).dtype == "int64"
    for function in (m.leaky_relu, m.sigmoid, m.gelu, m.silu, m.softplus, m.elu, m.hardtanh):
        assert function(x).dtype == "float32", function.name
    assert_close(m.softmax(x, dim=0), [math.exp(-5) / (1 + math.exp(-5)), 1 / (1 + math.exp(-5))])


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), st.floats(-100, 100))
def test_softmax_is_a_distribution_that_a_shift_does_not_change(scores: list[float], shift: float) -> None:
    x = np.array(scores)
    p = m.softmax(Tensor(x), dim=0).numpy()
    assert (p >= 0).all()
    assert_close(p.sum(), 1.0, rtol=1e-12)
    assert_close(m.softmax(Tensor(x + shift), dim=0), p, rtol=1e-9, atol=1e-12)
    assert_close(np.exp(m.log_softmax(Tensor(x), dim=0).numpy()), p, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_masked_scores(library: str) -> None:
    x = tensor([[-math.inf, 2.0, -math.inf], [-math.inf] * 3, [0.0, math.inf, 1.0]])
    assert_close(m.softmax(x, dim=1), [[0, 1, 0], [math.nan] * 3, [math.nan] * 3])
    assert_close(m.log_softmax(x, dim=1), [[-math.inf, 0, -math.inf], [math.nan] * 3, [math.nan] * 3])


def test_raw_arrays_stay_raw() -> None:
    x = np.array([-1.0, 2.0])
    assert type(m.relu(x)) is np.ndarray
    assert type(m.softmax(x, -1)) is np.ndarray


def test_bad_input_is_named() -> None:
    x = tensor([[1.0, 2.0]])
    with pytest.raises(ValueError, match='gelu: approximate must be "none" or "tanh", got \'erf\''):
        m.gelu(x, approximate="erf")
    with pytest.raises((ValueError, IndexError), match=r"softmax: .*\(1, 2\)"):
        m.softmax(x, dim=2)
    with pytest.raises(TypeError, match=r"softmax: .*dim"):
        m.softmax(x)
    with pytest.raises(TypeError, match="relu: expected tensors or numbers, got str"):
        m.relu("x")
    with pytest.raises(ValueError, match="glu: axis -1 must have an even length"):
        more.glu(tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="prelu: expected 1 slope or one for each of 2 channels, got 3"):
        more.prelu(x, tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="softshrink: lambd"):
        more.softshrink(x, -1.0)


@pytest.mark.parametrize(("layer", "text"), [
    (m.ReLU(), "ReLU()"), (m.GELU(), "GELU(approximate='none')"), (m.Softmax(dim=-1), "Softmax(dim=-1)"),
    (m.Softplus(), "Softplus(beta=1.0, threshold=20.0)"), (m.Hardtanh(), "Hardtanh(min_val=-1.0, max_val=1.0)"),
    (more.Threshold(0.1, 20.0), "Threshold(threshold=0.1, value=20.0)"), (more.Mish(), "Mish()"),
])  # fmt: skip
def test_layers_show_their_attributes(layer: m.Activation, text: str) -> None:
    assert repr(layer) == text


def test_nothing_here_is_an_operation_that_could_be_composed() -> None:
    mine = {name for name, op in Op.registry.items() if op.__module__.startswith("tinytorch.m03")}
    assert mine == {"relu", "leaky_relu", "hardtanh", "sigmoid", "silu", "gelu_and_cdf", "softplus", "elu", "softmax",
                    "log_softmax"}  # fmt: skip
