"""The vector polynomials keep the error that they state, and elementwise kernels equal their operations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty
from tests.kernels.pictures import LAYOUTS, XP, laid_out, near
from tests.kernels.place import SIMULATED, WHERE, cpu_only, drawn, kernels
from tinytorch import m02_tensor_appendix as m02
from tinytorch import m03_activations as m03
from tinytorch.backends.numpy import erf as erf64
from tinytorch.kernels.cpu.vectors import LANES
from tinytorch.m02_tensor import exp
from tinytorch.m06_autograd import relu_gradient
from tinytorch.m06_autograd_appendix import gelu_gradient

elementwise = kernels("elementwise")
INF, NAN = math.inf, math.nan
SPECIAL = np.array([NAN, INF, -INF, 0.0, -0.0, 3e38, -3e38, 1e-45, -1e-45, 100.0, -100.0], "float32")
OPERATIONS: dict[str, Any] = {
    "exp": exp, "tanh": m02.tanh, "erf": m02.erf, "sigmoid": m03.sigmoid, "silu": m03.silu, "relu": m03.relu,
}  # fmt: skip
NAMES = sorted(name for name in OPERATIONS if hasattr(elementwise, name))  # CuPy has some of them, in one launch
side, most = (4, 150) if SIMULATED else (9, 5000)
shapes = st.lists(st.integers(0, side), max_size=4).map(tuple) | st.integers(0, most).map(lambda n: (n,))
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 1 << 30)
variants = st.sampled_from(["none", "tanh"])


def numbers(seed: int, shape: tuple, special: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * 4).astype("float32")
    if special and x.size:
        x = np.where(rng.random(shape) < 0.2, rng.choice(SPECIAL, shape), x)
    return x


def arrange(array: np.ndarray, layout: str) -> np.ndarray:
    return laid_out(array, layout) if array.ndim else array


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Φ has an absolute error, which is all that is left where it is nearly 0."""
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# -- the polynomials ---------------------------------------------------------------------------------------------------


def everywhere(low: float, high: float) -> np.ndarray:
    """float32 from `low` to `high`, evenly and by magnitude down to the smallest there is."""
    count = 500 if SIMULATED else 200_000
    tiny = np.geomspace(1e-45, max(abs(low), abs(high)), count)
    x = np.concatenate([np.linspace(low, high, 15 * count // 2 + 1), tiny, -tiny])
    return x[(x >= low) & (x <= high)].astype("float32")


@pytest.mark.parametrize(
    ("name", "low", "high", "units", "absolute"),
    [
        pytest.param("exp", -110, 89, 1.1, INF, marks=cpu_only),
        pytest.param("tanh", -12, 12, 7, 4e-7, marks=cpu_only),
        pytest.param("erf", -6, 6, 8, 5e-7, marks=cpu_only),
        ("sigmoid", -110, 40, 2.5 if WHERE == "cpu" else 4, 1.5e-7),  # CUDA's own exp is off by up to 2 units
    ],
)
def test_stated_errors(name: str, low: float, high: float, units: float, absolute: float) -> None:
    x = everywhere(low, high)
    double = x.astype("float64")
    with np.errstate(under="ignore"):
        exact = {"exp": np.exp, "tanh": np.tanh, "erf": erf64, "sigmoid": lambda x: 1 / (1 + np.exp(-x))}[name](double)
    exact = np.where(exact > np.finfo("float32").max, INF, exact)
    computed = getattr(elementwise, name)(XP, x).astype("float64")
    finite = np.isfinite(exact)
    assert np.array_equal(computed[~finite], exact[~finite])
    error = np.abs(computed[finite] - exact[finite])
    unit = np.spacing(np.abs(exact[finite]).astype("float32")).astype("float64")
    assert (error / unit).max() <= units
    assert error.max() <= absolute
    if name in ("tanh", "erf"):
        assert np.abs(computed).max() == 1
        assert np.array_equal(np.signbit(computed), np.signbit(double))  # odd at ±0 too


@cpu_only
def test_exp_at_the_edges_of_float32() -> None:
    x = np.array([0, -0.0, INF, -INF, NAN, 88.72283, 88.72284, -87.5, -103.9, -103.98, -1e38, 3e38], "float32")
    with np.errstate(over="ignore"):
        expected = np.exp(x.astype("float64")).astype("float32")
    np.testing.assert_array_max_ulp(elementwise.exp(XP, x), expected, maxulp=1)
    assert 0 < float(elementwise.exp(XP, x)[8]) < 2e-45  # the smallest float32 there is


def test_saturation() -> None:
    x = np.array([4.5, -4.5, 9.5, -9.5, 1e5, -3e38, INF, -INF], "float32")
    if WHERE == "cpu":
        assert np.array_equal(elementwise.erf(XP, x), np.sign(x))
        assert np.array_equal(elementwise.tanh(XP, x[2:]), np.sign(x[2:]))
    assert elementwise.sigmoid(XP, x)[4:].tolist() == [1, 0, 1, 0]
    assert elementwise.gelu_and_cdf(XP, x)[0].tolist()[4:6] == elementwise.gelu_and_cdf(
        XP, x, approximate="tanh")[0].tolist()[4:6] == [1e5, 0]  # fmt: skip


# -- against the operations --------------------------------------------------------------------------------------------


@given(st.sampled_from(NAMES), shapes, layouts, seeds, st.booleans())
@drawn(150)
def test_functions(name: str, shape: tuple, layout: str, seed: int, special: bool) -> None:
    x = arrange(numbers(seed, shape, special), layout)
    with np.errstate(all="ignore"):
        expected = OPERATIONS[name].function(XP, x.astype("float64"))
    with np.errstate(over="ignore"):
        near(getattr(elementwise, name)(XP, x), expected.astype("float32").astype("float64"))


@given(variants, shapes, layouts, seeds, st.booleans())
@drawn(100)
def test_gelu_both_ways(approximate: str, shape: tuple, layout: str, seed: int, special: bool) -> None:
    x = numbers(seed, shape, special)
    x = arrange(np.where(np.abs(x) > 1e18, np.float32(NAN), x), layout)  # x² is infinite, and the rest unspecified
    g = numbers(seed + 1, shape)
    if special and g.size:
        g.reshape(-1)[0] = NAN
    double = x.astype("float64")
    out, cdf = elementwise.gelu_and_cdf(XP, x, approximate=approximate)
    expected, share = m03.gelu_and_cdf.function(XP, double, approximate=approximate)
    close(out, expected)
    close(cdf, share)
    expected = gelu_gradient.function(XP, g.astype("float64"), double, share, approximate=approximate)
    result = elementwise.gelu_gradient(XP, arrange(g, layout), x, arrange(cdf, layout), approximate=approximate)
    close(result, expected)


@given(shapes, layouts, seeds, st.booleans())
@drawn(60)
def test_relu_gradient(shape: tuple, layout: str, seed: int, special: bool) -> None:
    g, y = numbers(seed, shape), np.maximum(numbers(seed + 1, shape, special), 0)
    expected = relu_gradient.function(XP, g, y)
    assert np.array_equal(elementwise.relu_gradient(XP, arrange(g, layout), arrange(y, layout)), expected)
    repeated = np.broadcast_to(np.float32(3), shape)
    assert np.array_equal(elementwise.relu_gradient(XP, repeated, y), np.where(y > 0, np.float32(3), 0))


@given(shapes, layouts, seeds, st.sampled_from([0.0, 0.1, 0.5, 0.999, 1.0]))
@drawn(60)
def test_dropout(shape: tuple, layout: str, seed: int, p: float) -> None:
    x = numbers(seed, shape)
    noise = np.random.default_rng(seed).random(shape, "float32")
    noise.reshape(-1)[: noise.size // 4] = p  # kept, as it is not below
    out = elementwise.drop(XP, arrange(x, layout), arrange(noise, layout), p=p)
    expected = (noise >= p).astype("float32") * np.float32(0.0 if p == 1 else 1 / (1 - p))
    assert out.dtype == np.float32
    assert np.array_equal(out, x * expected)


def test_scalars_keep_their_shape() -> None:
    for array in (np.array(0.5, "float32"), np.empty((0, 3), "float32")):
        assert elementwise.silu(XP, array).shape == elementwise.drop(XP, array, array, p=0.5).shape == array.shape
        assert [part.shape for part in elementwise.gelu_and_cdf(XP, array)] == [array.shape] * 2


# -- memory and cores --------------------------------------------------------------------------------------------------

KERNELS: dict[str, tuple[int, int, tuple]] = {  # by name: inputs, outputs, numbers before (4 is silu)
    "apply": (1, 1, (4,)), "gelu": (1, 2, (False,)), "gelu_backward": (3, 1, (False,)), "relu_backward": (2, 1, ()),
}  # fmt: skip


@cpu_only
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_at_protected_pages(name: str, end: bool) -> None:
    serial, (inputs, outputs, before) = getattr(elementwise, name), KERNELS[name]
    for size in (*range(1, 2 * LANES + 2), 4 * LANES + 3, 1024):
        arrays = [numbers(i, (size,)) for i in range(inputs)]
        expected = [np.empty(size, "float32") for _ in range(outputs)]
        serial(*before, *arrays, *expected, 0, size)
        results = [guarded_empty(size, end=end) for _ in range(outputs)]
        serial(*before, *(guarded(array, end) for array in arrays), *results, 0, size)
        for result, wanted in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result, wanted)


@cpu_only
@pytest.mark.parametrize("end", [True, False])
def test_dropout_at_protected_pages(end: bool) -> None:
    for size in range(1, 2 * LANES + 2):
        x, noise = (guarded(np.random.default_rng(i).random(size, "float32"), end) for i in range(2))
        out = guarded_empty(size, end=end)
        elementwise.drop_some(x, noise, np.float32(0.5), np.float32(2), out, 0, size)
        assert np.array_equal(out, np.where(noise >= 0.5, 2 * x, 0))


@cpu_only
@pytest.mark.parametrize("name", KERNELS)
def test_one_core_and_several(name: str) -> None:
    serial, parallel = getattr(elementwise, name), getattr(elementwise, f"{name}_parallel")
    inputs, outputs, before = KERNELS[name]
    for size in (elementwise.BLOCK, 3 * elementwise.BLOCK + 5):
        arrays = [numbers(i, (size,)) for i in range(inputs)]
        alone, together = ([np.full(size, 7, "float32") for _ in range(outputs)] for _ in range(2))
        serial(*before, *arrays, *alone, 3, size - 2)
        parallel(*before, *arrays, *together, 3, size - 2)
        np.testing.assert_array_equal(alone, together)
        assert [part[:3].tolist() + part[-2:].tolist() for part in alone] == [[7] * 5] * outputs


def test_large_arrays_take_all_cores() -> None:
    x = numbers(0, (30, 31) if SIMULATED else (300, 301))
    noise = np.random.default_rng(0).random(x.shape, "float32")
    near(elementwise.silu(XP, x), m03.silu.function(XP, x.astype("float64")))
    mask = np.where(noise >= 0.25, np.float32(1 / 0.75), 0)
    assert np.array_equal(elementwise.drop(XP, x, noise, p=0.25), x * mask)
