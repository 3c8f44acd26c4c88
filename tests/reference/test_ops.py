"""Every operation of chapter 02 against PyTorch: values, dtypes and gradients, on random shapes and at the edges."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tinytorch as t
import tinytorch.nn.functional as F

torch = pytest.importorskip("torch")
inf, nan = math.inf, math.nan
INTEGERS, FLOATS = ("uint8", "int8", "int16", "int32", "int64"), ("float16", "float32", "float64")
KINDS = ("bool", *INTEGERS, *FLOATS)


def both(array: Any, dtype: str | None = None, requires_grad: bool = False) -> tuple[Any, Any]:
    """The same values as a tensor of either library."""
    array = np.asarray(array)
    array = array.astype(dtype) if dtype else array
    track = requires_grad and array.dtype.kind == "f"
    return t.tensor(array, requires_grad=track), torch.tensor(array.copy(), requires_grad=track)


def same(ours: Any, theirs: Any, tolerance: float = 1e-10) -> None:
    assert str(theirs.dtype).removeprefix("torch.") == ours.dtype
    assert ours.shape == tuple(theirs.shape)
    np.testing.assert_allclose(ours.detach().numpy(), theirs.detach().numpy(), rtol=tolerance, atol=tolerance)


def compare(function: Callable[[Any, Any], Any], *arrays: Any, tolerance: float = 1e-10) -> None:
    """function(library, *tensors) in both libraries: results, and gradients of a random projection of them."""
    ours, theirs = zip(*(both(x, requires_grad=True) for x in arrays), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about views and degrees of freedom
        got, want = function(t, *ours), function(torch, *theirs)
    got, want = (tuple(y) if isinstance(y, (tuple, list)) else (y,) for y in (got, want))
    assert len(got) == len(want)
    rng = np.random.default_rng(5)
    for y, z in zip(got, want, strict=True):
        same(y, z, tolerance)
        assert y.requires_grad == z.requires_grad
        if z.requires_grad:
            seed = rng.uniform(0.5, 1.5, tuple(z.shape))
            y.backward(t.tensor(seed, dtype=y.dtype), retain_graph=True)
            z.backward(torch.tensor(seed, dtype=z.dtype), retain_graph=True)
    for x, y in zip(ours, theirs, strict=True):
        if y.grad is not None:
            assert x.grad is not None, "PyTorch has a gradient here"
            same(x.grad, y.grad, tolerance)


def draw(shape: tuple, seed: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).uniform(low, high, shape)


SHAPES = [(3, 4), (), (2, 1, 3), (0, 2)]
UNARY = [
    "neg",
    "abs",
    "exp",
    "log",
    "sqrt",
    "log1p",
    "expm1",
    "rsqrt",
    "sin",
    "cos",
    "tanh",
    "erf",
    "sign",
    "floor",
    "ceil",
    "round",
    "isnan",
    "isinf",
    "isfinite",
    "square",
    "reciprocal",
    "relu",
    "sigmoid",
    "clone",
    "logical_not",
]
BINARY = [
    "add",
    "sub",
    "mul",
    "div",
    "pow",
    "maximum",
    "minimum",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_and",
    "logical_or",
]


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_elementwise(name: str, dtype: str) -> None:
    for seed, shape in enumerate(SHAPES):
        low = 0.1 if name in ("log", "sqrt", "rsqrt", "log1p") else -2.0
        compare(
            lambda lib, x: getattr(lib, name)(x),
            draw(shape, seed, low).astype(dtype),
            tolerance=1e-10 if dtype == "float64" else 3e-6,
        )


EDGES = [0.0, -0.0, 1.0, -1.0, inf, -inf, nan, 0.5, 1.5, 2.5, -0.5, 1e-30, 1e30, -1e30, 88.0, 1e4, -1e4]


@pytest.mark.parametrize("name", UNARY)
def test_elementwise_at_the_edges(name: str) -> None:
    edges = np.array(EDGES)
    if name in ("abs", "sign", "relu"):
        edges = edges[~np.isnan(edges)]  # the sign of nan is nan, as the array standard has it, and 0 in PyTorch
    compare(lambda lib, x: getattr(lib, name)(x), edges, tolerance=1e-9)


@pytest.mark.parametrize("name", UNARY[:-1])
def test_elementwise_of_integers(name: str) -> None:
    for dtype in ("int64", "int32", "uint8"):
        x, y = both([0, 1, 2, 5], dtype)
        same(getattr(t, name)(x), getattr(torch, name)(y), 3e-6)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("shapes", [((3, 2), (2,)), ((2, 1, 3), (4, 1)), ((), (3,)), ((0, 2), (1, 2)), ((3,), ())])
def test_two_inputs(name: str, shapes: tuple) -> None:
    a, b = draw(shapes[0], 1, 0.2 if name == "pow" else -2), draw(shapes[1], 2)
    compare(lambda lib, x, y: getattr(lib, name)(x, y), a, b)


@pytest.mark.parametrize("name", [*BINARY, "floor_divide", "remainder"])
def test_two_inputs_at_the_edges(name: str) -> None:
    a, b = (np.array(x).ravel() for x in np.meshgrid(EDGES[:10], EDGES[:10]))
    if name in ("floor_divide", "remainder"):
        finite = np.isfinite(a) & np.isfinite(b) & (b != 0)  # NumPy and PyTorch disagree beyond
        a, b = a[finite], b[finite]
    if name == "pow":
        defined = (a != 0) | (b >= 0)  # the slope of a pole
        a, b = a[defined], b[defined]
    stepwise = name == "floor_divide"  # nothing to differentiate here, an error in backward there
    compare(lambda lib, x, y: getattr(lib, name)(*([x.detach(), y.detach()] if stepwise else [x, y])), a, b)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, -1, 0.0, 0.5, 1.5, 2.0, -2.0])
def test_powers_of_numbers(exponent: float) -> None:
    compare(lambda lib, x: x**exponent, np.array([0.0, -1.5, 2.0, 0.3, inf, nan]))
    compare(lambda lib, x: exponent**x, np.array([0.0, 1.0, 2.0, 0.5, 3.0]))


def test_powers_of_zero_and_of_negative_bases() -> None:
    bases, exponents = np.array([0.0, 0.0, 0.0, 2.0, -2.0, -2.0, 5.0]), np.array([0.0, 1.0, 2.0, 0.0, 2.0, 3.0, -1.0])
    compare(lambda lib, a, b: a**b, bases, exponents)
    compare(lambda lib, a: a ** lib.tensor(exponents.tolist(), dtype=lib.float64), bases)


@pytest.mark.parametrize("a", KINDS)
@pytest.mark.parametrize("b", KINDS)
def test_promotion(a: str, b: str) -> None:
    values_a, values_b = np.array([1, 0, 3]), np.array([1, 2, 1])
    (x, y), (u, v) = both(values_a, a), both(values_b, b)
    for name in ("add", "mul", "div", "maximum", "eq", "where", "cat", "pow", "bitwise_and", "floor_divide"):
        if name == "where":
            ours, theirs = t.where(x > 0, x, u), torch.where(y > 0, y, v)
        elif name == "cat":
            ours, theirs = t.cat([x, u]), torch.cat([y, v])
        else:
            try:
                theirs = getattr(torch, name)(y, v)
            except (RuntimeError, ZeroDivisionError):
                continue
            ours = getattr(t, name)(x, u)
        same(ours, theirs, 1e-3)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("number", [True, 2, 1.5])
def test_promotion_with_numbers(dtype: str, number: Any) -> None:
    x, y = both([1, 0, 3], dtype)
    for function in (
        lambda v: v + number,
        lambda v: number * v,
        lambda v: v / number,
        lambda v: v == number,
        lambda v: number + v,
    ):
        same(function(x), function(y), 1e-3)
    same(t.where(x > 0, x, number), torch.where(y > 0, y, number))


# -- reductions --------------------------------------------------------------------------------------------------------

REDUCTIONS = {
    "sum": ({}, {"dim": 0}, {"dim": (0, 2), "keepdim": True}, {"dim": -1}),
    "mean": ({}, {"dim": 0}, {"dim": (0, 2), "keepdim": True}, {"dim": -1}),
    "amax": ({"dim": 0}, {"dim": (0, 2), "keepdim": True}, {"dim": -1}),
    "amin": ({"dim": 0}, {"dim": (0, 2), "keepdim": True}, {"dim": -1}),
    "prod": ({}, {"dim": 0}, {"dim": 1, "keepdim": True}),
    "var": ({}, {"dim": 0}, {"dim": (0, 2), "correction": 0}, {"dim": 2, "keepdim": True}, {"dim": 1, "correction": 2}),
    "std": ({}, {"dim": 0}, {"dim": (0, 2), "correction": 0}, {"dim": 2, "keepdim": True}),
    "logsumexp": ({"dim": 0}, {"dim": (0, 2), "keepdim": True}),
    "cumsum": ({"dim": 0}, {"dim": -1}),
    "argmax": ({}, {"dim": 1}, {"dim": -1, "keepdim": True}),
    "argmin": ({}, {"dim": 1}, {"dim": -1, "keepdim": True}),
    "any": ({}, {"dim": 1}, {"dim": -1, "keepdim": True}),
    "all": ({}, {"dim": 1}, {"dim": -1, "keepdim": True}),
    "max": ({"dim": 1}, {"dim": -1, "keepdim": True}, {}),
    "min": ({"dim": 1}, {"dim": -1, "keepdim": True}, {}),
    "norm": (
        {},
        {"dim": 1},
        {"p": 1, "dim": 2, "keepdim": True},
        {"p": 3.0},
        {"p": inf, "dim": 0},
        {"p": -inf, "dim": 0},
        {"p": 0.5},
    ),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str) -> None:
    for attributes in REDUCTIONS[name]:
        compare(lambda lib, x: getattr(lib, name)(x, **attributes), draw((3, 3, 4), 3))  # noqa: B023


@pytest.mark.parametrize(
    ("name", "attributes", "x"),
    [
        ("amax", {"dim": 0}, [1.0, 3.0, 3.0, 3.0]),
        ("amin", {"dim": 1}, [[1.0, 1.0], [0.0, 2.0]]),
        ("max", {}, [1.0, 3.0, 3.0]),
        ("max", {"dim": 0}, [1.0, 3.0, 3.0]),
        ("min", {"dim": 0}, [1.0, 1.0, 3.0]),
        ("amax", {"dim": 0}, [1.0, nan, 3.0]),
        ("sum", {}, [1.0, inf, -inf]),
        ("mean", {}, []),
        ("sum", {"dim": 1}, np.zeros((2, 0))),
        ("prod", {"dim": 1}, np.zeros((2, 0))),
        ("prod", {}, [2.0, 0.0, 3.0]),
        ("prod", {}, [0.0, 0.0, 3.0]),
        ("prod", {"dim": 1}, [[2.0, 0.0, 3.0], [0.0, 0.0, 1.0], [1.0, 2.0, 3.0]]),
        ("logsumexp", {"dim": 0}, [-inf, 1.0, 2.0]),
        ("logsumexp", {"dim": 0}, [1e4, -1e4, 1e4]),
        ("logsumexp", {"dim": 0}, [inf, 1.0]),
        ("norm", {}, [0.0, 0.0]),
        ("norm", {"dim": 1}, [[0.0, 0.0], [3.0, 4.0]]),
        ("norm", {"p": 1}, [0.0, -2.0]),
        ("norm", {"p": inf}, [2.0, -2.0, 1.0]),
        ("var", {}, [3.0]),
        ("var", {"correction": 0}, [3.0]),
        ("std", {"dim": 0}, [[1.0, 2.0], [3.0, 2.5]]),
        ("cumsum", {"dim": 0}, [1.0, inf, -inf]),
        ("argmax", {}, [1.0, 3.0, 3.0]),
        ("argmin", {}, [1.0, nan, 3.0]),
    ],
)
def test_reductions_at_the_edges(name: str, attributes: dict, x: Any) -> None:
    compare(lambda lib, v: getattr(lib, name)(v, **attributes), np.asarray(x))


def test_values_without_gradients_of_note() -> None:
    x, y = both([-inf, -inf])
    same(t.logsumexp(x, 0), torch.logsumexp(y, 0))
    x, y = both([0.0, -2.0, 3.0])
    same(t.norm(x, 0), torch.norm(y, 0))


@pytest.mark.parametrize("name", ["sum", "prod", "amax", "argmax", "any", "all", "cumsum"])
@pytest.mark.parametrize("dtype", KINDS)
def test_dtypes_of_reductions(name: str, dtype: str) -> None:
    if (name, dtype) in (("argmax", "bool"), ("any", "uint8"), ("all", "uint8")):
        pytest.skip("PyTorch has none, or one of another dtype for historical reasons")
    x, y = both([[1, 0, 1], [1, 1, 1]], dtype)
    same(getattr(t, name)(x, dim=1), getattr(torch, name)(y, dim=1), 1e-3)


# -- bounds and ties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (None, 1.0), (-1.0, None), (-1, 1), (1.0, -1.0)])
def test_clamp_and_its_bounds(bounds: tuple) -> None:
    compare(lambda lib, x: lib.clamp(x, *bounds), np.array([-2.0, -1.0, 0.0, 1.0, 2.0, nan, inf, -inf]))


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_ties(name: str) -> None:
    compare(
        lambda lib, a, b: getattr(lib, name)(a, b),
        np.array([1.0, 2.0, 2.0, nan, inf]),
        np.array([1.0, 2.0, 3.0, 1.0, inf]),
    )


# -- shape and selection -----------------------------------------------------------------------------------------------

INDEX = np.array([[0, 2], [1, 1]])
SHAPE_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "reshape": lambda lib, x: lib.reshape(x, (3, -1)),
    "permute": lambda lib, x: x.permute(2, 0, 1),
    "transpose": lambda lib, x: lib.transpose(x, 0, -1),
    "expand": lambda lib, x: x[:, :1].expand(-1, 5, -1),
    "unsqueeze": lambda lib, x: lib.unsqueeze(x, -2),
    "squeeze": lambda lib, x: x[:1].squeeze(),
    "flatten": lambda lib, x: lib.flatten(x, 1),
    "unflatten": lambda lib, x: lib.unflatten(x, 2, (2, 2)),
    "movedim": lambda lib, x: lib.movedim(x, 0, 2),
    "flip": lambda lib, x: lib.flip(x, (0, 2)),
    "roll": lambda lib, x: lib.roll(x, (1, -2), (0, 2)),
    "roll flat": lambda lib, x: lib.roll(x, 2),
    "split": lambda lib, x: lib.split(x, 2, 1),
    "split sizes": lambda lib, x: lib.split(x, [1, 3], 2),
    "chunk": lambda lib, x: lib.chunk(x, 3, 2),
    "unbind": lambda lib, x: lib.unbind(x, 1),
    "repeat": lambda lib, x: x.repeat(2, 1, 1, 2),
    "repeat_interleave": lambda lib, x: lib.repeat_interleave(x, 2, 1),
    "tril": lambda lib, x: lib.tril(x, -1),
    "triu": lambda lib, x: lib.triu(x, 1),
    "narrow": lambda lib, x: lib.narrow(x, 1, 1, 2),
    "index": lambda lib, x: x[:, [0, 2, 0], None, 1:],
    "index pairs": lambda lib, x: x[lib.tensor(INDEX.tolist()), lib.tensor([0, 1])],
    "index apart": lambda lib, x: x[lib.tensor([0, 1]), :, lib.tensor([3, 0])],
    "mask": lambda lib, x: x[x > 0],
    "masked_select": lambda lib, x: lib.masked_select(x, x > 0.5),
    "masked_fill": lambda lib, x: lib.masked_fill(x, x > 0.5, -3.0),
    "index_select": lambda lib, x: lib.index_select(x, 1, lib.tensor([2, 0, 2])),
    "gather": lambda lib, x: lib.gather(x, 2, lib.tensor([[[0, 3, 3]], [[1, 1, 0]]])),
    "take_along_dim": lambda lib, x: lib.take_along_dim(x, lib.argsort(x, dim=1, stable=True), dim=1),
    "scatter_add": lambda lib, x: x.scatter_add(1, lib.tensor([[[0] * 4, [2] * 4]] * 3), x[:, :2] * 2),
    "sort": lambda lib, x: lib.sort(x, dim=1, descending=True),
    "topk": lambda lib, x: lib.topk(x, 2, dim=2),
    "topk smallest": lambda lib, x: lib.topk(x, 2, dim=0, largest=False),
    "argsort": lambda lib, x: lib.argsort(x, dim=1),
    "nonzero": lambda lib, x: lib.nonzero(x > 0),
    "stack": lambda lib, x: lib.stack([x, x * 2], 1),
    "cat": lambda lib, x: lib.cat([x, x[:1] * 2], 0),
    "outer": lambda lib, x: lib.outer(x[0, 0], x[1, 1]),
    "dot": lambda lib, x: lib.dot(x[0, 0], x[1, 1]),
    "broadcast_tensors": lambda lib, x: lib.broadcast_tensors(x[:, :1], x[0]),
    "matmul": lambda lib, x: x @ x.mT,
    "T of matrix": lambda lib, x: x[0].T @ x[1],
    "std of the mean": lambda lib, x: x.mean(0).std(),
    "where": lambda lib, x: lib.where(x > 0, x, x * x),
}


@pytest.mark.parametrize("name", SHAPE_FUNCTIONS)
def test_shape_and_selection(name: str) -> None:
    compare(SHAPE_FUNCTIONS[name], draw((3, 3, 4), 7))


def test_index_assignment() -> None:
    def assigned(lib: Any, x: Any, value: Any) -> Any:
        y = x * 1
        y[1] = value
        y[:, 0] = 0.5
        y[lib.tensor([0, 2]), lib.tensor([1, 2])] = value[:2]
        y[y > 1.5] = -1.0
        y += value
        return y

    compare(assigned, draw((3, 4), 1), draw((4,), 2))


def test_meshgrid_and_one_hot_and_pad() -> None:
    for indexing in ("ij", "xy"):
        compare(lambda lib, a, b: lib.meshgrid(a, b, indexing=indexing), draw((3,), 1), draw((2,), 2))  # noqa: B023
    x, y = both([[0, 3], [1, 1]])
    same(F.one_hot(x, 5), torch.nn.functional.one_hot(y, 5))
    for pad, value in (((1, 2), 0.0), ((1, 0, 2, 1), 1.5)):
        compare(lambda lib, v: lib.nn.functional.pad(v, pad, value=value), draw((2, 3), 1))  # noqa: B023


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ij,jk->ik", [(2, 3), (3, 4)]),
        ("bij,bkj->bik", [(2, 2, 3), (2, 4, 3)]),
        ("bhqd,bhkd->bhqk", [(2, 2, 3, 4), (2, 2, 5, 4)]),
        ("...ij,...jk", [(2, 2, 3), (3, 2)]),
        ("ij->j", [(2, 3)]),
        ("ij,i,j->", [(2, 3), (2,), (3,)]),
        ("ii->i", [(3, 3)]),
        ("ii", [(3, 3)]),
        ("iij,jk->ik", [(2, 2, 3), (3, 2)]),
        ("i,j", [(2,), (3,)]),
        ("ba", [(2, 3)]),
        ("...,...->...", [(2, 1), (3,)]),
        ("abc,cd->", [(1, 2, 3), (3, 2)]),
    ],
)
def test_einsum(equation: str, shapes: list) -> None:
    compare(lambda lib, *x: lib.einsum(equation, *x), *(draw(shape, i) for i, shape in enumerate(shapes)))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3,), (3,)),
        ((2, 3), (3,)),
        ((3,), (3, 2)),
        ((2, 2, 3), (3, 4)),
        ((5, 1, 2, 3), (4, 3, 2)),
        ((2, 2, 3), (3,)),
        ((0, 3), (3, 2)),
    ],
)
def test_matmul(a: tuple, b: tuple) -> None:
    compare(lambda lib, x, y: x @ y, draw(a, 1), draw(b, 2))


def test_random_expressions() -> None:
    """Chains of operations: what the engine adds to the rules."""
    rng = np.random.default_rng(77)
    steps: list[Callable] = [
        lambda lib, x, y: x * y + x,
        lambda lib, x, y: (x - y).exp().mean(0, keepdim=True),
        lambda lib, x, y: lib.tanh(x) @ y.mT @ x,
        lambda lib, x, y: lib.cat([x, y], 0)[:3],
        lambda lib, x, y: lib.where(x > y, x, y) / 2,
        lambda lib, x, y: x.sum(1, keepdim=True) * y,
        lambda lib, x, y: lib.sigmoid(x) * y,
        lambda lib, x, y: x.amax(1, keepdim=True) - y,
    ]
    for _ in range(25):
        chosen = [steps[i] for i in rng.integers(0, len(steps), 4)]

        def chain(lib: Any, x: Any, y: Any, chosen: list = chosen) -> Any:
            for step in chosen:
                x, y = lib.tanh(step(lib, x, y).expand(3, 3)), x
            return x

        compare(chain, rng.normal(size=(3, 3)), rng.normal(size=(3, 3)), tolerance=1e-9)


@pytest.mark.parametrize("source", ["float64", "int32", "bool"])
@pytest.mark.parametrize("target", KINDS)
def test_casts(source: str, target: str) -> None:
    x, y = both([0, 1, 3], source)
    same(x.to(target), y.to(getattr(torch, target)))


def test_second_derivatives() -> None:
    x = draw((3,), 4)
    ours, theirs = both(x, requires_grad=True)
    for function in (
        lambda v: (v**3).sum(),
        lambda v: (v.exp() * v.sin()).sum(),
        lambda v: v.softmax(0)[0] * v.sum(),
        lambda v: v.norm(),
    ):
        (g,) = t.autograd.grad(function(ours), ours, create_graph=True)
        (h,) = torch.autograd.grad(function(theirs), theirs, create_graph=True)
        same(g, h)
        same(t.autograd.grad((g * g).sum(), ours)[0], torch.autograd.grad((h * h).sum(), theirs)[0])
