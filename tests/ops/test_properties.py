"""Shapes, broadcasting, dtypes and indexing against NumPy, on whatever hypothesis thinks of."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import tinytorch as t
from tinytorch.m02_tensor import DTYPES, Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in")
quick = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])

SIDES = {"min_dims": 0, "max_dims": 4, "min_side": 0, "max_side": 4}
shapes = hnp.array_shapes(**SIDES)
INTEGERS, FLOATS = ("uint8", "int8", "int16", "int32", "int64"), ("float16", "float32", "float64")
KINDS = ("bool", *INTEGERS, *FLOATS)
kinds = st.sampled_from(KINDS)


def values(shape: tuple, dtype: str = "float64", seed: int = 0) -> np.ndarray:
    """Random values of a dtype, none of them zero unless it is bool."""
    rng = np.random.default_rng([seed, *shape])
    if dtype == "bool":
        return rng.random(shape) < 0.5
    return (rng.integers(1, 5, shape) if dtype in INTEGERS else rng.uniform(0.5, 2, shape)).astype(dtype)


def same(actual: Tensor, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=tolerance, atol=tolerance)


def skip_unknown(device: str, *dtypes: str) -> None:
    if "float16" in dtypes and device == "array_api_strict":
        pytest.skip("the array standard has no float16")


# -- broadcasting ------------------------------------------------------------------------------------------------------


@quick
@given(hnp.mutually_broadcastable_shapes(num_shapes=3, max_dims=4, max_side=3, min_side=0))
def test_broadcasting_and_its_gradient(device: str, broadcast: Any) -> None:
    arrays = [values(shape, seed=i) for i, shape in enumerate(broadcast.input_shapes)]
    a, b, c = (t.tensor(x, requires_grad=True) for x in arrays)
    out = a * b + c
    same(out, arrays[0] * arrays[1] + arrays[2])
    assert out.shape == broadcast.result_shape == t.broadcast_shapes(*broadcast.input_shapes)
    seed = values(out.shape, seed=9)
    out.backward(t.tensor(seed))
    # The gradient of a broadcast input: the sum over all places that it was used in.
    wanted = (seed * arrays[1], seed * arrays[0], seed)
    for x, want in zip((a, b, c), wanted, strict=True):
        lead = len(out.shape) - x.ndim
        axes = tuple(range(lead)) + tuple(lead + d for d, n in enumerate(x.shape) if n == 1)
        same(x.grad, np.broadcast_to(want, out.shape).sum(axes, keepdims=True).reshape(x.shape), 1e-9)


@quick
@given(shapes, shapes)
def test_what_numpy_does_not_broadcast_is_an_error(device: str, a: tuple, b: tuple) -> None:
    try:
        expected = np.broadcast_shapes(a, b)
    except ValueError:
        with pytest.raises(ValueError, match="add: "):
            t.zeros(a) + t.zeros(b)
        with pytest.raises(ValueError, match="do not broadcast"):
            t.broadcast_shapes(a, b)
    else:
        assert (t.zeros(a) + t.zeros(b)).shape == expected == t.broadcast_shapes(a, b)


# -- dtypes ------------------------------------------------------------------------------------------------------------


def promoted(a: str, b: str) -> str:
    """PyTorch's answer, from its rule: the stronger kind wins; within a kind, the narrowest that holds both."""
    strength = [("bool",).count, INTEGERS.count, FLOATS.count]
    kind_a, kind_b = (next(i for i, count in enumerate(strength) if count(x)) for x in (a, b))
    if kind_a != kind_b:
        return a if kind_a > kind_b else b
    return np.result_type(a, b).name


@pytest.mark.parametrize("a", KINDS)
@pytest.mark.parametrize("b", KINDS)
def test_promotion_of_two_tensors(device: str, a: str, b: str) -> None:
    skip_unknown(device, a, b)
    if a == b == "bool" and device == "array_api_strict":
        pytest.skip("the array standard does not add booleans")
    x, y = (t.tensor(values((3,), dtype)) for dtype in (a, b))
    assert (x + y).dtype == (y + x).dtype == promoted(a, b)
    assert (x * y).dtype == promoted(a, b)
    assert t.where(x > 1, x, y).dtype == t.cat([x, y]).dtype == promoted(a, b)
    assert (x / y).dtype == (promoted(a, b) if promoted(a, b) in FLOATS else "float32")
    assert (x == y).dtype == (x < y).dtype == "bool"
    same(x + y, values((3,), a).astype(promoted(a, b)) + values((3,), b), 1e-3)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(3,), ()])
def test_python_numbers_are_weak(device: str, dtype: str, shape: tuple) -> None:
    """Tensors without axes are not: they count as any other tensor."""
    skip_unknown(device, dtype)
    x = t.tensor(values(shape, dtype))
    float_dtype = dtype if dtype in FLOATS else "float32"
    integer_dtype = "int64" if dtype == "bool" else dtype
    assert (x + 1).dtype == (1 + x).dtype == (x * 2).dtype == t.maximum(x, 1).dtype == integer_dtype
    assert (x + 0.5).dtype == (0.5 * x).dtype == (x / 2).dtype == float_dtype
    assert (x | True).dtype == dtype if dtype not in FLOATS else True
    assert t.exp(x).dtype == x.mean().dtype == float_dtype


@pytest.mark.parametrize("number", [np.float64(2.0), np.float32(2.0), np.int64(2), np.bool_(True)])
def test_numpy_scalars_beside_tensors_are_numbers(number: Any) -> None:
    x = t.tensor([1.5, 2.5], dtype="float32")
    assert (x * number).dtype == "float32"
    assert (number * x).dtype == "float32"
    same(x * number, np.array([1.5, 2.5]) * number, 1e-6)


@quick
@given(kinds, kinds, shapes)
def test_casts_are_numpys(device: str, source: str, target: str, shape: tuple) -> None:
    assume(not (device == "array_api_strict" and "float16" in (source, target)))
    x = values(shape, source)
    y = t.tensor(x).to(DTYPES[target])
    assert y.dtype == target
    np.testing.assert_array_equal(y.numpy(), x.astype(target))


# -- indexing ----------------------------------------------------------------------------------------------------------


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_basic_indices(device: str, data: Any) -> None:
    x = values(data.draw(shapes))
    index = data.draw(hnp.basic_indices(x.shape, allow_newaxis=True, max_dims=6))
    same(t.tensor(x)[index], x[index])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_integer_array_indices_and_their_gradient(device: str, data: Any) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4))
    index = data.draw(
        hnp.integer_array_indices(shape, result_shape=hnp.array_shapes(min_dims=0, max_dims=2, min_side=0))
    )
    x = values(shape)
    leaf = t.tensor(x, requires_grad=True)
    out = leaf[tuple(t.tensor(part) for part in index)]
    same(out, x[index])
    seed = values(out.shape, seed=3)
    out.backward(t.tensor(seed))
    expected = np.zeros(shape)
    np.add.at(expected, index, seed)
    same(leaf.grad, expected)


@quick
@given(hnp.arrays(bool, shapes))
def test_masks(device: str, mask: np.ndarray) -> None:
    x = values(mask.shape)
    same(t.tensor(x)[t.tensor(mask)], x[mask])
    same(t.masked_select(t.tensor(x), t.tensor(mask)), x[mask])
    changed = t.tensor(x)
    changed[t.tensor(mask)] = -1.0
    same(changed, np.where(mask, -1, x))


@quick
@given(st.data())
def test_assignment_is_numpys(device: str, data: Any) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4))
    if data.draw(st.booleans()):
        index = data.draw(hnp.basic_indices(shape))
    else:
        index = data.draw(hnp.integer_array_indices(shape))
    x, value = values(shape), data.draw(st.sampled_from([0.0, 2, "array"]))
    value = values(x[index].shape, seed=5) if value == "array" else value
    y = t.tensor(x)
    y[index] = t.tensor(value) if isinstance(value, np.ndarray) else value
    x[index] = value
    same(y, x)


# -- shapes ------------------------------------------------------------------------------------------------------------


@quick
@given(st.data())
def test_reductions_over_any_axes(device: str, data: Any) -> None:
    x = values(data.draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=3)))
    axes = data.draw(hnp.valid_tuple_axes(x.ndim, min_size=1))
    keep = data.draw(st.booleans())
    y = t.tensor(x)
    for name, function in {"sum": np.sum, "mean": np.mean, "amax": np.max, "amin": np.min, "all": np.all}.items():
        same(getattr(y, name)(dim=axes, keepdim=keep), function(x, axis=axes, keepdims=keep))
    same(y.logsumexp(dim=axes, keepdim=keep), np.log(np.exp(x).sum(axes, keepdims=keep)))
    same(y.norm(dim=axes, keepdim=keep), np.sqrt((x * x).sum(axes, keepdims=keep)))


@quick
@given(st.data())
def test_permute_and_reshape(device: str, data: Any) -> None:
    x = values(data.draw(shapes))
    dims = tuple(data.draw(st.permutations(range(x.ndim))))
    y = t.tensor(x).permute(dims)
    same(y, x.transpose(dims))
    same(y.reshape(-1) if x.size else y.reshape(0), x.transpose(dims).reshape(-1))
    same(y.flatten(), x.transpose(dims).reshape(-1))
    same(t.tensor(x).T, x.T)


@quick
@given(st.data())
def test_matmul_broadcasts(device: str, data: Any) -> None:
    drawn = data.draw(
        hnp.mutually_broadcastable_shapes(signature=np.matmul.signature, max_dims=2, min_side=0, max_side=3)
    )
    a, b = (values(shape, seed=i) for i, shape in enumerate(drawn.input_shapes))
    same(t.tensor(a) @ t.tensor(b), a @ b)
