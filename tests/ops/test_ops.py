"""Every operation: values, dtypes, gradients of both orders, and errors, by the rows of `table.py`, on every device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import tinytorch as t
from tests.ops.table import COMPOSITES, OPS, Case, Row
from tinytorch.autograd import gradcheck, gradgradcheck
from tinytorch.backends import backend_of
from tinytorch.m02_tensor import Op, Tensor, observe
from tinytorch.m06_autograd import NON_DIFFERENTIABLE, RULES

ROWS = {**OPS, **COMPOSITES}
TABLE_MODULES = tuple(f"tinytorch.m{number:02}" for number in (2, 3, 4, 5, 9, 12, 13, 16, 17))
SEED = 20_240_607
SMOOTH = [name for name, row in ROWS.items() if row.smooth]

every_row = pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.operation)
smooth_row = pytest.mark.parametrize("name", SMOOTH)


def drawn(row: Row) -> list[Case]:
    """The row's cases, the same in every run: seeded by its name."""
    return list(row.cases(np.random.default_rng([SEED, *row.operation.encode()])))


def is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype == np.float64


def to_tensors(x: Any, dtype: str) -> Any:
    """NumPy arrays as tensors on the default device, floating ones in `dtype`; inside tuples too."""
    if isinstance(x, tuple):
        return tuple(to_tensors(part, dtype) for part in x)
    return t.tensor(x, dtype=dtype if is_float(x) else None) if isinstance(x, np.ndarray) else x


def arguments(case: Case, dtype: str) -> tuple[list, dict]:
    inputs = [to_tensors(x, dtype) for x in case.inputs]
    return inputs, {name: to_tensors(value, dtype) for name, value in case.attributes.items()}


def results(x: Any) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def expected_dtypes(row: Row, inputs: list, count: int, dtype: str) -> list[str]:
    """The dtype of each result, by PyTorch's rules; `dtype` is that of the inputs which are arrays."""
    if row.result == "total":
        return [dtype if dtype.startswith("float") else "int64"]
    if row.result == "float":
        return [dtype if dtype.startswith("float") else "float32"] * count
    if row.result == "with int64":
        return [dtype, "int64"]
    kinds = [x.dtype.name for x in inputs if isinstance(x, np.ndarray)]
    others = [x for x in inputs if isinstance(x, (bool, int, float))]
    if not dtype.startswith("float") and any(isinstance(x, float) for x in others):
        dtype = "float32"
    if dtype == "bool" and any(type(x) is int for x in others):
        dtype = "int64"
    return [(dtype if row.result == "same" and kinds else row.result)] * count


def assert_equal(actual: Tensor, expected: Any, tolerance: float, what: str) -> None:
    assert actual.shape == np.shape(expected), what
    np.testing.assert_allclose(actual.numpy(), expected, rtol=tolerance, atol=tolerance, err_msg=what)


def as_given(x: Any, dtype: str) -> Any:
    """What the operation is given, in float64."""
    return x.astype(dtype).astype(np.float64) if is_float(x) else x


# -- nothing is left out -----------------------------------------------------------------------------------------------


def test_every_operation_has_a_row() -> None:
    of_the_chapters = {name for name, op in Op.registry.items() if op.__module__.startswith(TABLE_MODULES)}
    assert of_the_chapters == set(OPS), (
        "each operation of these modules needs a row in tests/ops/table.py, and nothing else"
    )


def test_every_operation_has_a_gradient_or_is_declared_without() -> None:
    for op in Op.registry.values():
        assert (op in RULES) != (op in NON_DIFFERENTIABLE), f"{op.name}: a rule in m06, or non_differentiable, not both"
    for name, row in OPS.items():
        op = Op.registry[name]
        differentiable = {op.inputs[min(i, len(op.inputs) - 1)] for i in row.smooth}
        ruled = {name for name, rule in RULES[op].rules.items() if rule is not None} if op in RULES else set()
        if name == "fake_quantize":
            continue  # straight through: its rule is not its slope
        assert differentiable == ruled, f"{name}: the row checks the gradients of {differentiable}, there are {ruled}"


@pytest.mark.parametrize("row", OPS.values(), ids=lambda row: row.operation)
def test_a_row_calls_its_operation(row: Row) -> None:
    seen = set()

    def note(op: Op, arrays: list, attributes: dict, proceed: Any) -> Any:
        seen.add(op.name)
        return proceed()

    case = drawn(row)[0]
    inputs, attributes = arguments(case, "float32")
    with observe(note):
        row.call(*inputs, **attributes)
    assert row.operation in seen


# -- values ------------------------------------------------------------------------------------------------------------


@every_row
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_dtypes(row: Row, dtype: str, device: str) -> None:
    tolerance = {"float32": 2e-6 * row.loose, "float64": 1e-13}[dtype]
    for case in drawn(row):
        inputs, attributes = arguments(case, dtype)
        before = [x.clone().numpy() for x in inputs if isinstance(x, Tensor)]
        actual = results(row.call(*inputs, **attributes))
        expected = results(row.reference(*(as_given(x, dtype) for x in case.inputs), **case.attributes))
        assert len(actual) == len(expected)
        given = next((x.dtype.name for x in case.inputs if isinstance(x, np.ndarray) and not is_float(x)), dtype)
        given = dtype if any(is_float(x) for x in case.inputs) else given
        for y, want, wanted_dtype in zip(
            actual, expected, expected_dtypes(row, case.inputs, len(actual), given), strict=True
        ):
            assert_equal(y, want, tolerance, f"{row.operation} {case}")
            assert y.dtype == wanted_dtype, f"{row.operation} {case}"
            assert backend_of(y.data) is backend_of(t.zeros(1).data)
        after = [x.numpy() for x in inputs if isinstance(x, Tensor)]
        for x, y in zip(before, after, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=f"{row.operation} wrote into its input")


@pytest.mark.parametrize("row", [r for r in ROWS.values() if r.integers], ids=lambda row: row.operation)
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_integers(row: Row, dtype: str, device: str) -> None:
    rng = np.random.default_rng([SEED, *row.operation.encode()])
    low = 1 if dtype == "uint8" or row.operation in ("var", "std") else -3
    for case in drawn(row):
        if any(isinstance(x, float) for x in case.inputs) or (row.operation in ("neg", "sub") and dtype == "uint8"):
            continue
        arrays = [rng.integers(low, 4, x.shape).astype(dtype) if isinstance(x, np.ndarray) else x for x in case.inputs]
        inputs, attributes = [to_tensors(x, dtype) for x in arrays], arguments(case, dtype)[1]
        actual = results(row.call(*inputs, **attributes))
        expected = results(row.reference(*(x.astype(np.int64) for x in arrays), **case.attributes))
        for y, want, wanted_dtype in zip(
            actual, expected, expected_dtypes(row, arrays, len(actual), dtype), strict=True
        ):
            assert_equal(y, want, 2e-6, f"{row.operation} {arrays} {case.attributes}")
            assert y.dtype == wanted_dtype, f"{row.operation} {arrays}"


# -- gradients ---------------------------------------------------------------------------------------------------------


def watched(row: Row, case: Case) -> tuple[list, dict, list[Tensor]]:
    """The call's inputs in float64, and those that a gradient is wanted of."""
    inputs, attributes = arguments(case, "float64")
    leaves = []
    for i in row.smooth:
        if i < len(inputs) and isinstance(inputs[i], Tensor) and inputs[i].dtype.is_floating_point:
            inputs[i].requires_grad = True
            leaves.append(inputs[i])
    return inputs, attributes, leaves


def smooth_call(row: Row, attributes: dict) -> Any:
    """The row's call as a function of its inputs alone, with its floating results in one vector.

    What an operation returns beside its result are by-products, without gradients.
    """

    def call(*inputs: Any) -> Tensor:
        outputs = results(row.call(*inputs, **attributes))
        outputs = outputs[:1] if row.operation in OPS else outputs
        return t.cat([y.reshape(-1) for y in outputs if y.dtype.is_floating_point])

    return call


@smooth_row
def test_gradients(name: str, device: str) -> None:
    row = ROWS[name]
    for case in drawn(row):
        inputs, attributes, leaves = watched(row, case)
        if leaves:
            assert gradcheck(smooth_call(row, attributes), inputs), case


@smooth_row
def test_gradients_under_create_graph(name: str, device: str) -> None:
    """What a fused rule computes, its formula in operations says too."""
    row = ROWS[name]
    for case in drawn(row):
        inputs, attributes, leaves = watched(row, case)
        if not leaves:
            continue
        out = smooth_call(row, attributes)(*inputs)
        seed = t.tensor(np.random.default_rng(SEED).normal(size=out.shape))
        fused = t.autograd.grad(out, leaves, seed, retain_graph=True, allow_unused=True)
        composed = t.autograd.grad(out, leaves, seed, create_graph=True, allow_unused=True)
        for x, want in zip(composed, fused, strict=True):
            assert (x is None) == (want is None), case
            if x is not None:
                assert_equal(x.detach(), want.numpy(), 1e-11, f"{name} {case}")


@smooth_row
def test_gradients_of_gradients(name: str, device: str) -> None:
    row = ROWS[name]
    cases = sorted(drawn(row), key=lambda case: sum(np.size(x) for x in case.inputs if is_float(x)), reverse=True)
    large = [case for case in cases if sum(np.size(x) for x in case.inputs if is_float(x)) <= 20]
    for case in large[:4] or cases[-1:]:
        inputs, attributes, leaves = watched(row, case)
        if leaves:
            assert gradgradcheck(smooth_call(row, attributes), inputs), case


@smooth_row
def test_one_input_watched_at_a_time(name: str, device: str) -> None:
    """The gradient of an input is the same whether or not another one is watched too."""
    row = ROWS[name]
    for case in drawn(row)[:4]:
        inputs, attributes, leaves = watched(row, case)
        if len(leaves) < 2:
            continue
        call = smooth_call(row, attributes)
        out = call(*inputs)
        seed = t.tensor(np.random.default_rng(SEED).normal(size=out.shape))
        together = t.autograd.grad(out, leaves, seed)
        for leaf in leaves:
            leaf.requires_grad = False
        for leaf, want in zip(leaves, together, strict=True):
            leaf.requires_grad = True
            (alone,) = t.autograd.grad(call(*inputs), leaf, seed)
            np.testing.assert_array_equal(alone.numpy(), want.numpy())
            leaf.requires_grad = False


@smooth_row
def test_gradients_in_float32(name: str, device: str) -> None:
    """They have the dtype and shape of their inputs, and the values of float64."""
    row = ROWS[name]
    for case in drawn(row):
        inputs, attributes, leaves = watched(row, case)
        if not leaves:
            continue
        narrow, narrow_leaves = [], []
        for x in inputs:
            narrow.append(x.detach().to(t.float32) if isinstance(x, Tensor) and x.dtype == t.float64 else x)
            if any(x is leaf for leaf in leaves):
                narrow_leaves.append(narrow[-1].requires_grad_())
        call = smooth_call(row, attributes)
        wide, out = call(*inputs), call(*narrow)
        seed = t.tensor(np.random.default_rng(SEED).normal(size=out.shape))
        expected = t.autograd.grad(wide, leaves, seed)
        out.backward(seed.to(out.dtype))
        for x, want in zip(narrow_leaves, expected, strict=True):
            assert x.grad.dtype == t.float32
            assert_equal(x.grad, want.numpy(), 2e-5, f"{name} {case}")


def test_operations_without_gradients_record_nothing(device: str) -> None:
    x = t.tensor([[3.0, 1.0], [2.0, 0.5]], requires_grad=True)
    for y in (x > 1, x == 2, x.argmax(), x.argsort(), x.isnan(), x.any(), x // 2, x.nonzero()):
        assert not y.requires_grad
    assert (x * (x > 1)).requires_grad


# -- errors ------------------------------------------------------------------------------------------------------------

BAD = [pytest.param(bad, id=f"{row.operation}-{i}") for row in ROWS.values() for i, bad in enumerate(row.bad)]


@pytest.mark.parametrize("bad", BAD)
def test_errors(bad: Any, device: str) -> None:
    with pytest.raises(bad.error, match=f"(?s){bad.words}"):
        bad.call()


@pytest.mark.parametrize("op", Op.registry.values(), ids=lambda op: op.name)
def test_what_is_no_tensor_is_refused(op: Op) -> None:
    with pytest.raises(TypeError, match=f"{op.name}: expected tensors or numbers, got str cat"):
        op(*["cat"] * max(1, len(op.inputs)))


@pytest.mark.parametrize("op", [op for op in Op.registry.values() if len(op.inputs) > 1], ids=lambda op: op.name)
def test_two_libraries_are_not_mixed(op: Op) -> None:
    here, there = t.ones(2, device="cpu"), t.ones(2, device="array_api_strict")
    with pytest.raises(TypeError, match=f"{op.name}: .*cpu.*array_api_strict.*bring them together with .to"):
        op(here, there, *[here] * (len(op.inputs) - 2))


@pytest.mark.parametrize("op", [op for op in Op.registry.values() if not op.variadic], ids=lambda op: op.name)
def test_too_many_arguments_are_refused(op: Op) -> None:
    count = len(op.inputs) + len(op.attributes) + 1
    with pytest.raises(TypeError, match=rf"{op.name}: takes \({', '.join([*op.inputs, *op.attributes])}\)"):
        op(*[t.ones(2)] * count)


# -- kinks, ties and limits: known values ------------------------------------------------------------------------------

inf, nan = math.inf, math.nan


def slope(function: Any, x: Any) -> list:
    leaf = t.tensor(x, dtype="float64", requires_grad=True)
    function(leaf).sum().backward()
    return leaf.grad.tolist()


@pytest.mark.filterwarnings("ignore:.* encountered in")  # of other libraries than NumPy
@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (t.abs, [-1.0, 0.0, 2.0], [-1, 0, 1]),
        (lambda x: t.relu(x), [-1.0, 0.0, 2.0], [0, 0, 1]),
        (lambda x: t.clamp(x, -1, 1), [-2.0, -1.0, 0.0, 1.0, 2.0], [0, 1, 1, 1, 0]),
        (lambda x: t.maximum(x, 1.0), [0.0, 1.0, 2.0], [0, 0.5, 1]),
        (lambda x: t.minimum(x, 1.0), [0.0, 1.0, 2.0], [1, 0.5, 0]),
        (lambda x: t.amax(x), [1.0, 3.0, 3.0, 2.0], [0, 0.5, 0.5, 0]),
        (lambda x: t.amin(x, dim=0), [1.0, 1.0, 3.0, 1.0], [1 / 3, 1 / 3, 0, 1 / 3]),
        (lambda x: t.max(x, 0).values, [1.0, 3.0, 3.0, 2.0], [0, 1, 0, 0]),  # the first of equals alone
        (t.norm, [0.0, 0.0], [0, 0]),
        (t.norm, [3.0, -4.0], [0.6, -0.8]),
        (t.prod, [2.0, 0.0, 3.0], [0, 6, 0]),
        (t.prod, [0.0, 0.0, 3.0], [0, 0, 0]),
        (t.prod, [2.0, 5.0, 3.0], [15, 6, 10]),
        (lambda x: x**0, [0.0, 2.0], [0, 0]),
        (lambda x: x**1, [0.0, 2.0], [1, 1]),
        (lambda x: x**2, [0.0, -2.0], [0, -4]),
        (lambda x: x**3, [0.0, -2.0], [0, 12]),
        (lambda x: x**-1.0, [2.0, -4.0], [-0.25, -0.0625]),
        (lambda x: 2.0**x, [0.0, 3.0], [math.log(2), 8 * math.log(2)]),
        (lambda x: 0.0**x, [1.0, 2.0], [0, 0]),
        (lambda x: t.logsumexp(x, 0), [-inf, 0.0, 0.0], [0, 0.5, 0.5]),
        (lambda x: t.logsumexp(x, 0), [-inf, -inf], [0, 0]),  # nan in PyTorch; a masked row is to stay harmless
        (t.floor, [1.5, 2.0], [0, 0]),
        (t.sign, [-1.0, 0.0], [0, 0]),
        (lambda x: t.where(x > 0, x, 0 * x), [-1.0, 1.0], [0, 1]),
        (lambda x: x[[0, 0, 1]], [1.0, 2.0, 3.0], [2, 1, 0]),
        (lambda x: t.topk(x, 2).values, [1.0, 3.0, 2.0], [0, 1, 1]),
        (lambda x: t.std(x), [1.0, 3.0], [-(0.5**0.5), 0.5**0.5]),
    ],
)
def test_slopes_where_there_is_a_choice(function: Any, x: list, expected: list, device: str) -> None:
    np.testing.assert_allclose(slope(function, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (t.log, [0.0, -1.0, inf], [-inf, nan, inf]),
        (t.sqrt, [0.0, -1.0, inf], [0, nan, inf]),
        (t.exp, [1e4, -1e4, nan], [inf, 0, nan]),
        (t.rsqrt, [0.0, inf], [inf, 0]),
        (t.erf, [-inf, inf, nan, 0.0], [-1, 1, nan, 0]),
        (t.tanh, [-inf, inf, nan], [-1, 1, nan]),
        (lambda x: 1 / x, [0.0, -0.0, inf], [inf, -inf, 0]),
        (lambda x: t.maximum(x, 1.0), [nan, 0.0], [nan, 1]),
        (lambda x: t.minimum(x, 1.0), [nan, 0.0], [nan, 0]),
        (lambda x: t.clamp(x, -1, 1), [nan, inf, -inf], [nan, 1, -1]),
        (lambda x: t.relu(x), [nan, inf, -inf], [nan, inf, 0]),
        (lambda x: t.amax(x), [1.0, nan], nan),
        (lambda x: t.logsumexp(x, 0), [-inf, -inf], -inf),
        (lambda x: t.logsumexp(x, 0), [inf, 1.0], inf),
        (lambda x: t.logsumexp(x, 0), [1e4, 1e4], 1e4 + math.log(2)),
        (lambda x: t.norm(x, inf), [1.0, -3.0], 3),
        (lambda x: t.norm(x, 0), [0.0, -3.0, 1.0], 2),
        (lambda x: x**0, [0.0, nan, inf], [1, 1, 1]),
        (lambda x: x**0.5, [-1.0, 4.0], [nan, 2]),
        (lambda x: x % 3, [-1.0, 4.0, -3.0], [2, 1, 0]),
        (lambda x: x // 3, [-1.0, 4.0, -3.0], [-1, 1, -1]),
        (t.round, [0.5, 1.5, 2.5, -0.5], [0, 2, 2, 0]),
        (lambda x: t.var(x), [3.0], nan),
        (t.mean, [], nan),
        (t.sum, [], 0),
        (t.prod, [], 1),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(empty slice|[Dd]egrees of freedom|encountered in):")
def test_limits(function: Any, x: list, expected: Any, device: str) -> None:
    np.testing.assert_allclose(function(t.tensor(x, dtype="float64")).numpy(), expected, rtol=1e-12)


def test_sorting_keeps_the_order_of_equals(device: str) -> None:
    x = t.tensor([2.0, 1.0, 2.0, 1.0, 2.0])
    assert t.sort(x).indices.tolist() == [1, 3, 0, 2, 4]
    assert t.sort(x, descending=True).indices.tolist() == [0, 2, 4, 1, 3]
    assert t.topk(x, 2).indices.tolist() == [0, 2]
    assert t.argmax(x).item() == 0
    assert t.min(x, 0).indices.item() == 1
