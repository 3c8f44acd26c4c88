"""Every operation of chapters 02–05 and 09 beside an independent reference: NumPy in float64.

A row says how an operation is called, on which inputs, what it must give, which inputs have a gradient, and which calls
must fail with which words. The functions that are composed of operations have rows too. `test_ops.py` runs the rows on
every device, and fails where an operation has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import tinytorch as t
import tinytorch.nn.functional as F
from tinytorch.m02_tensor import Op

Generator = np.random.Generator
Draw = Callable[[Generator, tuple], np.ndarray]


class Case(NamedTuple):
    """Inputs and attributes of one call. A float64 array stands for one of the floating dtype under test."""

    inputs: tuple[Any, ...]
    attributes: dict[str, Any]


def case(*inputs: Any, **attributes: Any) -> Case:
    return Case(tuple(np.asarray(x) if isinstance(x, np.generic) else x for x in inputs), attributes)


class Bad(NamedTuple):
    """A call that must fail, with this error, and with these words in its message."""

    call: Callable[[], Any]
    error: type[Exception]
    words: str


@dataclass(frozen=True)
class Row:
    """One operation.

    Attributes:
        operation: the Op's name; for a composite, the function's.
        call, reference: the same signature, for tensors and for NumPy arrays.
        cases: draws inputs at which the operation is smooth, if it has gradients.
        smooth: the positions of the inputs that have a gradient.
        result: the dtype of the result: "same" as the promoted inputs, "float" (integers become float32), or a name.
        integers: whether integer inputs in the place of floating ones are tested too.
        loose: how many times the usual tolerance is asked for in float32.
    """

    operation: str
    call: Callable
    reference: Callable
    cases: Callable[[Generator], Iterator[Case]]
    smooth: tuple[int, ...]
    result: str
    integers: bool
    bad: tuple[Bad, ...]
    loose: float


OPS: dict[str, Row] = {}
COMPOSITES: dict[str, Row] = {}


def row(
    operation: str,
    call: Callable,
    reference: Callable,
    cases: Callable[[Generator], Iterator[Case]],
    smooth: Sequence[int] = (0,),
    result: str = "same",
    integers: bool = False,
    bad: Sequence[Bad] = (),
    loose: float = 1,
) -> None:
    table = OPS if operation in Op.registry else COMPOSITES
    assert operation not in table, f"two rows for {operation}"
    table[operation] = Row(operation, call, reference, cases, tuple(smooth), result, integers, tuple(bad), loose)


# -- values ------------------------------------------------------------------------------------------------------------


def normal(rng: Generator, shape: tuple) -> np.ndarray:
    return rng.normal(size=shape)


def positive(rng: Generator, shape: tuple) -> np.ndarray:
    return rng.uniform(0.3, 2.5, size=shape)


def off_zero(rng: Generator, shape: tuple) -> np.ndarray:
    """Of both signs, and at least 0.2 from 0."""
    return rng.choice([-1.0, 1.0], size=shape) * rng.uniform(0.2, 2.0, size=shape)


def off_whole(rng: Generator, shape: tuple) -> np.ndarray:
    """At least 0.1 from every multiple of a half."""
    return rng.integers(-6, 6, size=shape) / 2 + rng.uniform(0.1, 0.4, size=shape)


def distinct(rng: Generator, shape: tuple) -> np.ndarray:
    """No two values closer than 0.1."""
    count = math.prod(shape)
    return (rng.permutation(count).reshape(shape) - count / 2) * 0.2 + rng.uniform(0, 0.1, size=shape)


def whole(rng: Generator, shape: tuple) -> np.ndarray:
    return rng.integers(-4, 5, size=shape)


def logical(rng: Generator, shape: tuple) -> np.ndarray:
    return rng.random(shape) < 0.5


# -- shapes ------------------------------------------------------------------------------------------------------------

SHAPES = ((3, 2), (), (0, 3), (2, 1, 3), (4,))
PAIRS = (
    ((2, 3), (2, 3)),
    ((2, 3), (3,)),
    ((2, 1, 2), (3, 1)),
    ((), (3,)),
    ((), ()),
    ((0, 3), (1, 3)),
    ((1, 1), (2, 1)),
)


def unary(draw: Draw = normal, **attributes: Any) -> Callable:
    """Each shape, with the same attributes."""

    def cases(rng: Generator) -> Iterator[Case]:
        for shape in SHAPES:
            yield case(draw(rng, shape), **attributes)

    return cases


def binary(first: Draw = normal, second: Draw | None = None) -> Callable:
    """Each pair of shapes, and a Python number on either side."""
    second = second or first

    def cases(rng: Generator) -> Iterator[Case]:
        for shape_a, shape_b in PAIRS:
            yield case(first(rng, shape_a), second(rng, shape_b))
        yield case(np.asarray(first(rng, ())).item(), second(rng, (2, 2)))
        yield case(first(rng, (2, 2)), np.asarray(second(rng, ())).item())

    return cases


def apart(rng: Generator) -> Iterator[Case]:
    """Pairs whose elements are never near each other."""
    for shape_a, shape_b in PAIRS:
        yield case(off_zero(rng, shape_a) * 4, rng.uniform(-0.5, 0.5, size=shape_b))
    yield case(off_zero(rng, (3,)) * 4, 0.25)


def with_attributes(shapes: Sequence[tuple], attributes: Sequence[dict], draw: Draw = normal) -> Callable:
    """A shape with each attributes; shapes and attributes are paired off."""

    def cases(rng: Generator) -> Iterator[Case]:
        for shape, given in zip(shapes, attributes, strict=True):
            yield case(draw(rng, shape), **given)

    return cases


REDUCTIONS = (
    ((2, 3), {}),
    ((2, 3), {"keepdim": True}),
    ((2, 3), {"dim": 0}),
    ((2, 1, 3), {"dim": -1, "keepdim": True}),
    ((2, 2, 3), {"dim": (0, -1)}),
    ((2, 1, 3), {"dim": 1}),
    ((), {}),
    ((4,), {"dim": 0}),
)
EMPTY_RESULT = ((0, 3), {"dim": 1})  # nothing to reduce, so that an extreme need not exist
EMPTY_INPUT = ((2, 0), {"dim": 1})  # nothing to reduce over


def reductions(*more: tuple, draw: Draw = normal, tuples: bool = True, **always: Any) -> Callable:
    chosen = [(s, a) for s, a in (*REDUCTIONS, *more) if tuples or not isinstance(a.get("dim"), tuple)]
    return with_attributes([s for s, _ in chosen], [{**a, **always} for _, a in chosen], draw)


def numpy_reduction(function: Callable) -> Callable:
    """NumPy's function with PyTorch's names of the arguments."""
    return lambda x, dim=None, keepdim=False: function(x, axis=dim, keepdims=keepdim)


def one_axis(*more: tuple, draw: Draw = normal, **always: Any) -> Callable:
    """Operations along exactly one axis."""
    pairs = [((2, 3), 0), ((2, 3), -1), ((2, 1, 3), 1), ((4,), 0), ((0, 3), 1), *more]
    return with_attributes([s for s, _ in pairs], [{"dim": d, **always} for _, d in pairs], draw)


def bad(call: Callable[[], Any], error: type[Exception], words: str) -> Bad:
    return Bad(call, error, words)


def does_not_broadcast(name: str, kind: str = "float32") -> Bad:
    return bad(
        lambda: Op.registry[name](t.ones(2, 3, dtype=kind), t.ones(4, dtype=kind)),
        ValueError,
        rf"{name}: .*\(2, 3\).*\(4,\)",
    )


def no_such_axis(name: str, **always: Any) -> Bad:
    return bad(
        lambda: Op.registry[name](t.ones(2, 3), dim=2, **always), (ValueError, IndexError), rf"{name}: .*\(2, 3\)"
    )


def not_for(kind: str, name: str) -> Bad:
    """Refused for a dtype."""
    return bad(lambda: Op.registry[name](t.ones(2, dtype=kind)), (TypeError, ValueError), f"{name}: .*{kind}")


# -- elementwise, two inputs -------------------------------------------------------------------------------------------

row("add", lambda a, b: a + b, np.add, binary(), (0, 1), integers=True, bad=[does_not_broadcast("add")])
row("sub", lambda a, b: a - b, np.subtract, binary(), (0, 1), integers=True, bad=[does_not_broadcast("sub")])
row("mul", lambda a, b: a * b, np.multiply, binary(), (0, 1), integers=True, bad=[does_not_broadcast("mul")])
row(
    "div",
    lambda a, b: a / b,
    np.true_divide,
    binary(normal, off_zero),
    (0, 1),
    "float",
    bad=[does_not_broadcast("div")],
)
row("pow", lambda a, b: a**b, np.power, binary(positive, off_zero), (0, 1), bad=[does_not_broadcast("pow")])
row("maximum", t.maximum, np.maximum, apart, (0, 1), integers=True, bad=[does_not_broadcast("maximum")])
row("minimum", t.minimum, np.minimum, apart, (0, 1), integers=True, bad=[does_not_broadcast("minimum")])


def divisions(rng: Generator) -> Iterator[Case]:
    """Quotients at least 0.1 from whole numbers."""
    for shape_a, shape_b in PAIRS:
        b = rng.choice([-1.0, 1.0], size=shape_b) * rng.uniform(0.5, 1.5, size=shape_b)
        quotient = rng.integers(-3, 3, size=np.broadcast_shapes(shape_a, shape_b)) + 0.5
        quotient = (
            quotient
            if quotient.shape == shape_a
            else np.broadcast_to(quotient.flat[0] if quotient.size else 0.5, shape_a)
        )
        yield case(quotient * (b if b.shape == quotient.shape else 1.0), b if b.shape == quotient.shape else np.sign(b))
    yield case(np.array([3.25, -3.25]), 1.5)


row("floor_divide", lambda a, b: a // b, np.floor_divide, divisions, (), bad=[does_not_broadcast("floor_divide")])
row("remainder", lambda a, b: a % b, np.remainder, divisions, (0, 1), bad=[does_not_broadcast("remainder")])


def few(rng: Generator, shape: tuple) -> np.ndarray:
    """-1, 0 or 1, so that equal ones are frequent."""
    return rng.integers(-1, 2, size=shape).astype(np.float64)


COMPARISONS = {
    "eq": (lambda a, b: a == b, np.equal),
    "ne": (lambda a, b: a != b, np.not_equal),
    "lt": (lambda a, b: a < b, np.less),
    "le": (lambda a, b: a <= b, np.less_equal),
    "gt": (lambda a, b: a > b, np.greater),
    "ge": (lambda a, b: a >= b, np.greater_equal),
}
for _name, (_call, _reference) in COMPARISONS.items():
    row(_name, _call, _reference, binary(few), (), "bool", integers=True, bad=[does_not_broadcast(_name)])


def bits(rng: Generator) -> Iterator[Case]:
    yield from binary(whole)(rng)
    yield from binary(logical)(rng)


for _name, _call, _reference in (
    ("bitwise_and", lambda a, b: a & b, np.bitwise_and),
    ("bitwise_or", lambda a, b: a | b, np.bitwise_or),
    ("bitwise_xor", lambda a, b: a ^ b, np.bitwise_xor),
):
    floats = bad(
        lambda name=_name: Op.registry[name](t.ones(2), t.ones(2)), (TypeError, ValueError), f"{_name}: .*float32"
    )
    row(_name, _call, _reference, bits, (), bad=[does_not_broadcast(_name, "int64"), floats])


def both_kinds_of_bits(rng: Generator) -> Iterator[Case]:
    yield from unary(whole)(rng)
    yield from unary(logical)(rng)


row("bitwise_not", lambda x: ~x, np.invert, both_kinds_of_bits, (), bad=[not_for("float32", "bitwise_not")])

# -- elementwise, one input --------------------------------------------------------------------------------------------

erf = np.vectorize(math.erf, otypes=[np.float64])

row("neg", lambda x: -x, np.negative, unary(), integers=True)
row("abs", abs, np.abs, unary(off_zero), integers=True)
row("exp", t.exp, np.exp, unary(), result="float", integers=True)
row("log", t.log, np.log, unary(positive), result="float")
row("sqrt", t.sqrt, np.sqrt, unary(positive), result="float")
row("rsqrt", t.rsqrt, lambda x: x**-0.5, unary(positive), result="float")
row("log1p", t.log1p, np.log1p, unary(positive), result="float")
row("expm1", t.expm1, np.expm1, unary(), result="float", integers=True)
row("sin", t.sin, np.sin, unary(), result="float", integers=True)
row("cos", t.cos, np.cos, unary(), result="float", integers=True)
row("tanh", t.tanh, np.tanh, unary(), result="float", integers=True)
row("erf", t.erf, erf, unary(), result="float", integers=True)
row("sign", t.sign, np.sign, unary(off_zero), integers=True)
row("floor", t.floor, np.floor, unary(off_whole))
row("ceil", t.ceil, np.ceil, unary(off_whole))
row("round", t.round, np.round, unary(off_whole))


def unusual(rng: Generator) -> Iterator[Case]:
    yield case(np.array([[1.0, np.nan], [np.inf, -np.inf]]))
    yield case(np.array(np.nan))
    yield case(np.zeros((0, 2)))


for _name, _reference in (("isnan", np.isnan), ("isinf", np.isinf), ("isfinite", np.isfinite)):
    row(_name, getattr(t, _name), _reference, unusual, (), "bool")


def clamps(rng: Generator) -> Iterator[Case]:
    for attributes in ({"min": -1.0, "max": 1.0}, {"min": 0.0}, {"max": 0}, {"min": -1, "max": 2}):
        yield case(off_whole(rng, (3, 2)), **attributes)
    yield case(off_whole(rng, ()), min=0.0)
    yield case(off_whole(rng, (0, 2)), min=0.0)


row(
    "clamp",
    t.clamp,
    lambda x, min=None, max=None: np.clip(x, min, max),
    clamps,
    bad=[bad(lambda: t.clamp(t.ones(2)), ValueError, "clamp: expected min, max or both")],
)


def choices(rng: Generator) -> Iterator[Case]:
    for shape_a, shape_b in PAIRS:
        yield case(logical(rng, np.broadcast_shapes(shape_a, shape_b)), normal(rng, shape_a), normal(rng, shape_b))
    yield case(logical(rng, (2, 3)), 1.5, normal(rng, (3,)))
    yield case(logical(rng, (3,)), normal(rng, (2, 1)), 0)


row(
    "where",
    t.where,
    np.where,
    choices,
    (1, 2),
    bad=[bad(lambda: t.where(t.ones(3) > 0, t.ones(2), 0), ValueError, r"where: .*\(3,\).*\(2,\)")],
)

row("square", t.square, np.square, unary(), integers=True)
row("reciprocal", t.reciprocal, np.reciprocal, unary(off_zero))
row("logical_not", t.logical_not, np.logical_not, both_kinds_of_bits, (), "bool")
row("logical_and", t.logical_and, np.logical_and, bits, (), "bool")
row("logical_or", t.logical_or, np.logical_or, bits, (), "bool")


def masked(rng: Generator) -> Iterator[Case]:
    yield case(normal(rng, (3, 2)), logical(rng, (3, 2)), 1.5)
    yield case(normal(rng, (3, 2)), logical(rng, (2,)), -7)
    yield case(normal(rng, ()), logical(rng, ()), 0.0)


row("masked_fill", t.masked_fill, lambda x, mask, value: np.where(mask, value, x), masked)

# -- reductions --------------------------------------------------------------------------------------------------------


def of_nothing(name: str) -> Bad:
    return bad(lambda: Op.registry[name](t.ones(0, 3)), (ValueError, IndexError), rf"{name}: .*\(0, 3\)")


row(
    "sum",
    t.sum,
    numpy_reduction(np.sum),
    reductions(EMPTY_INPUT),
    result="total",
    integers=True,
    bad=[no_such_axis("sum")],
)
row(
    "mean",
    t.mean,
    numpy_reduction(np.mean),
    reductions(EMPTY_RESULT),
    result="float",
    integers=True,
    bad=[no_such_axis("mean")],
)
row(
    "prod",
    t.prod,
    numpy_reduction(np.prod),
    reductions(EMPTY_INPUT, draw=off_zero, tuples=False),
    result="total",
    integers=True,
    bad=[no_such_axis("prod")],
)
row(
    "amax",
    t.amax,
    numpy_reduction(np.max),
    reductions(EMPTY_RESULT, draw=distinct),
    integers=True,
    bad=[no_such_axis("amax"), of_nothing("amax")],
)
row(
    "amin",
    t.amin,
    numpy_reduction(np.min),
    reductions(EMPTY_RESULT, draw=distinct),
    integers=True,
    bad=[no_such_axis("amin"), of_nothing("amin")],
)
row(
    "argmax",
    t.argmax,
    numpy_reduction(np.argmax),
    reductions(EMPTY_RESULT, draw=distinct, tuples=False),
    (),
    "int64",
    integers=True,
    bad=[no_such_axis("argmax"), of_nothing("argmax")],
)
row(
    "argmin",
    t.argmin,
    numpy_reduction(np.argmin),
    reductions(EMPTY_RESULT, draw=distinct, tuples=False),
    (),
    "int64",
    integers=True,
    bad=[no_such_axis("argmin"), of_nothing("argmin")],
)
row("any", t.any, numpy_reduction(np.any), reductions(EMPTY_INPUT, draw=logical), (), "bool", bad=[no_such_axis("any")])
row("all", t.all, numpy_reduction(np.all), reductions(EMPTY_INPUT, draw=logical), (), "bool", bad=[no_such_axis("all")])


def spreads(rng: Generator) -> Iterator[Case]:
    for shape, attributes in REDUCTIONS:
        count = (
            math.prod(shape)
            if "dim" not in attributes
            else math.prod(np.array(shape)[np.array(attributes["dim"])].flat)
        )
        if count > 1:
            yield case(normal(rng, shape), **attributes)
            yield case(normal(rng, shape), correction=0, **attributes)


def numpy_var(x: np.ndarray, dim: Any = None, correction: float = 1, keepdim: bool = False) -> np.ndarray:
    return np.var(x, axis=dim, ddof=correction, keepdims=keepdim)


row("var", t.var, numpy_var, spreads, result="float", integers=True, bad=[no_such_axis("var")])
row("std", t.std, lambda *a, **k: np.sqrt(numpy_var(*a, **k)), spreads, result="float")


def numpy_logsumexp(x: np.ndarray, dim: Any, keepdim: bool = False) -> np.ndarray:
    return np.log(np.sum(np.exp(x), axis=dim, keepdims=keepdim))


def with_dim(rng: Generator) -> Iterator[Case]:
    for shape, attributes in REDUCTIONS:
        if "dim" in attributes:
            yield case(normal(rng, shape), **attributes)


row("logsumexp", t.logsumexp, numpy_logsumexp, with_dim, result="float", integers=True, bad=[no_such_axis("logsumexp")])
row(
    "cumsum",
    t.cumsum,
    lambda x, dim: np.cumsum(x, axis=dim),
    one_axis(((0, 2), 0)),
    result="total",
    integers=True,
    bad=[no_such_axis("cumsum")],
)


def numpy_norm(x: np.ndarray, p: float = 2, dim: Any = None, keepdim: bool = False) -> np.ndarray:
    a = np.abs(x)
    if p == math.inf:
        return np.max(a, axis=dim, keepdims=keepdim)
    if p == -math.inf:
        return np.min(a, axis=dim, keepdims=keepdim)
    if p == 0:
        return np.sum(a != 0, axis=dim, keepdims=keepdim)
    return np.sum(a**p, axis=dim, keepdims=keepdim) ** (1 / p)


def norms(rng: Generator) -> Iterator[Case]:
    for p in (2, 1, 3, 0.5, math.inf, -math.inf):
        yield case(np.abs(distinct(rng, (2, 3))) + 0.05 * np.arange(6).reshape(2, 3) + 0.3, p=p)
        yield case(distinct(rng, (5,)) + 0.77, p=p, dim=0, keepdim=True)


row(
    "vector_norm",
    Op.registry["vector_norm"],
    numpy_norm,
    reductions(draw=off_zero),
    result="float",
    bad=[no_such_axis("vector_norm")],
)
row("norm", t.norm, numpy_norm, norms)
row(
    "max",
    lambda x, dim, keepdim=False: t.max(x, dim, keepdim),
    lambda x, dim, keepdim=False: (x.max(dim, keepdims=keepdim), x.argmax(dim, keepdims=keepdim)),
    one_axis(((2, 2), 1), draw=distinct),
    result="with int64",
)
row(
    "min",
    lambda x, dim, keepdim=False: t.min(x, dim, keepdim),
    lambda x, dim, keepdim=False: (x.min(dim, keepdims=keepdim), x.argmin(dim, keepdims=keepdim)),
    one_axis(((2, 2), 1), draw=distinct),
    result="with int64",
)

# -- shape -------------------------------------------------------------------------------------------------------------


def shaped(*pairs: tuple, **always: Any) -> Callable:
    return with_attributes([s for s, _ in pairs], [{**a, **always} for _, a in pairs])


row(
    "reshape",
    t.reshape,
    lambda x, shape: x.reshape(shape),
    shaped(
        ((2, 3), {"shape": (3, 2)}),
        ((2, 3), {"shape": (-1,)}),
        ((), {"shape": (1, 1)}),
        ((0, 3), {"shape": (3, 0)}),
        ((1,), {"shape": ()}),
    ),
    bad=[bad(lambda: t.ones(2, 3).reshape(4, 2), ValueError, r"reshape: .*\(2, 3\)")],
)
row(
    "permute",
    t.permute,
    lambda x, dims: x.transpose(dims),
    shaped(
        ((2, 3), {"dims": (1, 0)}),
        ((2, 1, 3), {"dims": (2, 0, 1)}),
        ((2, 3, 1), {"dims": (-1, 0, 1)}),
        ((), {"dims": ()}),
    ),
    bad=[bad(lambda: t.ones(2, 3).permute(0, 0), (ValueError, IndexError), r"permute: .*\(2, 3\)")],
)
row(
    "expand",
    lambda x, shape: x.expand(shape),
    lambda x, shape: np.broadcast_to(
        x, [m if n == -1 else n for n, m in zip(shape, (1,) * (len(shape) - x.ndim) + x.shape, strict=True)]
    ),
    shaped(
        ((1, 3), {"shape": (2, 3)}), ((2, 1), {"shape": (3, -1, 2)}), ((), {"shape": (2, 2)}), ((1,), {"shape": (0,)})
    ),
    bad=[bad(lambda: t.ones(2, 3).expand(2, 4), ValueError, r"expand: .*\(2, 3\)")],
)


def indexings(rng: Generator) -> Iterator[Case]:
    for index in (
        1,
        -1,
        (0, 2),
        slice(None, None, 2),
        slice(3, 0, -1),
        (..., 0),
        (None, 1),
        (slice(None), None, slice(1, 3)),
        ...,
        np.array([0, 2, 2]),
        (np.array([[0], [3]]), np.array([0, 0, 2])),
        (slice(None), np.array([2, 0])),
        (np.array([1, 1]), ..., 0),
        np.array([], dtype=np.int64),
        np.array(2),
    ):
        yield case(normal(rng, (4, 3)), index=index)
    yield case(normal(rng, (3, 2)), index=logical(rng, (3, 2)))
    yield case(normal(rng, (3, 2)), index=np.array([True, False, True]))
    yield case(normal(rng, (2, 2)), index=np.zeros((2, 2), dtype=bool))
    yield case(normal(rng, (3,)), index=(np.array([True, False, True]), None))
    yield case(normal(rng, ()), index=())
    yield case(normal(rng, (2, 3, 2)), index=(slice(None), np.array([1, 1]), 0))


row(
    "getitem",
    lambda x, index: x[index],
    lambda x, index: x[index],
    indexings,
    bad=[
        bad(lambda: t.ones(2, 3)[2], IndexError, r"getitem: .*\(2, 3\)"),
        bad(lambda: t.ones(2, 3)[0, 0, 0], IndexError, r"getitem: .*\(2, 3\)"),
        bad(lambda: t.ones(2, 3)[t.tensor([0, 5])], IndexError, r"getitem: .*\(2, 3\)"),
        bad(lambda: t.ones(2, 3)[t.tensor([True, False, True])], IndexError, r"getitem: .*\(2, 3\)"),
    ],
)


def pieces(rng: Generator) -> Iterator[Case]:
    yield case(normal(rng, (2, 3)), normal(rng, (1, 3)))
    yield case(normal(rng, (2, 1)), normal(rng, (2, 3)), normal(rng, (2, 0)), dim=-1)
    yield case(normal(rng, (2, 1, 2)), normal(rng, (2, 2, 2)), dim=1)
    yield case(normal(rng, (3,)))


row(
    "concatenate",
    lambda *tensors, dim=0: t.cat(tensors, dim),
    lambda *arrays, dim=0: np.concatenate(arrays, dim),
    pieces,
    (0, 1, 2),
    bad=[
        bad(lambda: t.cat([t.ones(2, 3), t.ones(2, 4)]), ValueError, r"concatenate: .*\(2, 3\).*\(2, 4\)"),
        bad(lambda: t.cat([]), ValueError, "cat: expected at least one tensor"),
    ],
)


def equals(rng: Generator) -> Iterator[Case]:
    for shape, dim in (((2, 3), 0), ((2, 3), -1), ((), 0), ((0, 2), 1)):
        yield case(normal(rng, shape), normal(rng, shape), normal(rng, shape), dim=dim)


row("stack", lambda *tensors, dim: t.stack(tensors, dim), lambda *arrays, dim: np.stack(arrays, dim), equals, (0, 1, 2))
row(
    "transpose",
    t.transpose,
    lambda x, dim0, dim1: np.swapaxes(x, dim0, dim1),
    shaped(((2, 3), {"dim0": 0, "dim1": 1}), ((2, 3, 1), {"dim0": -1, "dim1": 0})),
)
row(
    "unsqueeze",
    t.unsqueeze,
    lambda x, dim: np.expand_dims(x, dim),
    shaped(((2, 3), {"dim": 0}), ((2, 3), {"dim": -1}), ((2, 3), {"dim": 1}), ((), {"dim": 0})),
)
row(
    "squeeze",
    t.squeeze,
    lambda x, dim=None: np.squeeze(x, dim),
    shaped(
        ((2, 1, 3), {}), ((2, 1, 3), {"dim": 1}), ((1, 2, 1), {"dim": -1}), ((1, 2, 1), {"dim": (0, 2)}), ((1, 1), {})
    ),
)
row(
    "flatten",
    t.flatten,
    lambda x, start_dim=0, end_dim=-1: x.reshape(
        *x.shape[:start_dim], -1, *x.shape[x.ndim if end_dim == -1 else end_dim + 1 :]
    ),
    shaped(((2, 3), {}), ((2, 1, 3), {"start_dim": 1}), ((2, 1, 3), {"start_dim": 0, "end_dim": 1}), ((), {})),
)
row(
    "unflatten",
    t.unflatten,
    lambda x, dim, sizes: x.reshape(*x.shape[: dim % x.ndim], *sizes, *x.shape[dim % x.ndim + 1 :]),
    shaped(((6, 2), {"dim": 0, "sizes": (2, 3)}), ((2, 4), {"dim": -1, "sizes": (2, 2)})),
)
row(
    "movedim",
    t.movedim,
    lambda x, source, destination: np.moveaxis(x, source, destination),
    shaped(
        ((2, 3, 1), {"source": 0, "destination": -1}),
        ((2, 3, 1), {"source": -1, "destination": 0}),
        ((2, 3, 1), {"source": 1, "destination": 1}),
    ),
)
row(
    "flip",
    t.flip,
    lambda x, dims: np.flip(x, dims),
    shaped(((2, 3), {"dims": 0}), ((2, 3), {"dims": (0, -1)}), ((0, 2), {"dims": (1,)}), ((4,), {"dims": [0]})),
    bad=[bad(lambda: t.flip(t.ones(2, 3), 2), (ValueError, IndexError), r"flip: .*\(2, 3\)")],
)
row(
    "roll",
    t.roll,
    lambda x, shifts, dims=None: np.roll(x, shifts, dims),
    shaped(
        ((2, 3), {"shifts": 1}),
        ((2, 3), {"shifts": -2, "dims": 1}),
        ((2, 3), {"shifts": (1, 4), "dims": (0, 1)}),
        ((0, 2), {"shifts": 1, "dims": 0}),
    ),
    bad=[bad(lambda: t.roll(t.ones(2, 3), 1, 2), (ValueError, IndexError), r"roll: .*\(2, 3\)")],
)


def numpy_pad(x: np.ndarray, pad: Sequence[int], value: float = 0.0) -> np.ndarray:
    pairs = [(0, 0)] * (x.ndim - len(pad) // 2) + [tuple(pad[i : i + 2]) for i in range(0, len(pad), 2)][::-1]
    return np.pad(x, pairs, constant_values=value)


row(
    "constant_pad",
    Op.registry["constant_pad"],
    numpy_pad,
    shaped(
        ((2, 3), {"pad": (1, 2)}),
        ((2, 3), {"pad": (0, 1, 2, 0), "value": 1.5}),
        ((0, 2), {"pad": (0, 0, 1, 1)}),
        ((2, 1, 2), {"pad": (1, 1), "value": -1.0}),
    ),
)


def numpy_pad_mode(x: np.ndarray, pad: Sequence[int], mode: str = "constant", value: float = 0.0) -> np.ndarray:
    if mode == "constant":
        out = numpy_pad(x, [max(n, 0) for n in pad], value)
        for i, n in enumerate(pad):
            axis, stop = x.ndim - 1 - i // 2, out.shape[x.ndim - 1 - i // 2]
            out = np.take(out, range(max(-n, 0), stop) if i % 2 == 0 else range(stop - max(-n, 0)), axis)
        return out
    pairs = [(0, 0)] * (x.ndim - len(pad) // 2) + [tuple(pad[i : i + 2]) for i in range(0, len(pad), 2)][::-1]
    for axis, (before, after) in enumerate(pairs):
        n, borders = x.shape[axis], (max(before, 0), max(after, 0))
        left = np.arange(max(-before, 0), n - max(-after, 0))  # a circle is closed after the cut
        if mode == "circular":
            places = np.pad(left, borders, "wrap")
        else:
            places = np.pad(np.arange(n), borders, NUMPY_MODES[mode])
            places = places[max(-before, 0) : len(places) - max(-after, 0)]
        x = np.take(x, places, axis)
    return x


NUMPY_MODES = {"reflect": "reflect", "replicate": "edge"}
row(
    "pad",
    F.pad,
    numpy_pad_mode,
    shaped(
        ((2, 3), {"pad": (-1, 2)}),
        ((4, 3), {"pad": (0, -1, -1, -1), "value": 1.5}),
        ((2, 3), {"pad": (2, 1), "mode": "reflect"}),
        ((3, 2), {"pad": (1, 0, 2, 1), "mode": "reflect"}),
        ((3, 2), {"pad": (1, 2, 0, 4), "mode": "replicate"}),
        ((1, 3, 2), {"pad": (2, 1, 1, 3), "mode": "circular"}),
        ((5,), {"pad": (2, -2), "mode": "reflect"}),
        ((5,), {"pad": (-2, 3), "mode": "circular"}),
        ((3,), {"pad": (0, 0), "mode": "replicate"}),
    ),
    bad=[
        bad(lambda: F.pad(t.ones(2, 3), (1,)), ValueError, "pad: expected a pair for each"),
        bad(lambda: F.pad(t.ones(3), (1, 1, 1, 1)), ValueError, "pad: expected a pair for each of at most 1"),
        bad(
            lambda: F.pad(t.ones(3), (1, -4)), ValueError, r"pad: .* can only cut off what is there; axis 0 .*\(1, -4\)"
        ),
        bad(
            lambda: F.pad(t.ones(3), (1, 1), "mirror"), ValueError, "pad: mode must be constant, reflect, replicate or"
        ),
        bad(lambda: F.pad(t.ones(3), (3, 0), "reflect"), ValueError, "pad: mode 'reflect' has at most 2 elements"),
        bad(lambda: F.pad(t.ones(3), (0, 4), "circular"), ValueError, "pad: mode 'circular' has at most 3 elements"),
        bad(lambda: F.pad(t.ones(0), (0, 1), "replicate"), ValueError, "pad: mode 'replicate' has at most 0 elements"),
    ],
)


def numpy_split(x: np.ndarray, split_size: Any, dim: int = 0) -> tuple:
    if isinstance(split_size, int):
        stops = range(split_size, x.shape[dim], split_size)
    else:
        stops = np.cumsum(split_size)[:-1]
    return tuple(np.split(x, list(stops), dim))


row(
    "split",
    t.split,
    numpy_split,
    shaped(
        ((5, 2), {"split_size": 2}), ((2, 4), {"split_size": [1, 3], "dim": 1}), ((2, 4), {"split_size": 4, "dim": -1})
    ),
    bad=[
        bad(lambda: t.split(t.ones(4), 0), ValueError, "split: expected a split_size"),
        bad(lambda: t.split(t.ones(4), [1, 2]), ValueError, r"split: the lengths \[1, 2\] add up to 3"),
    ],
)
row(
    "chunk",
    t.chunk,
    lambda x, chunks, dim=0: numpy_split(x, -(-x.shape[dim] // chunks), dim),
    shaped(((5, 2), {"chunks": 2}), ((2, 4), {"chunks": 3, "dim": 1}), ((2,), {"chunks": 5})),
    bad=[bad(lambda: t.chunk(t.ones(4), 0), ValueError, "chunk: expected at least 1")],
)
row("unbind", t.unbind, lambda x, dim=0: tuple(np.moveaxis(x, dim, 0)), shaped(((2, 3), {}), ((2, 3), {"dim": -1})))
row(
    "narrow",
    t.narrow,
    lambda x, dim, start, length: np.take(x, range(start, start + length), dim),
    shaped(((4, 2), {"dim": 0, "start": 1, "length": 2}), ((2, 3), {"dim": -1, "start": 0, "length": 2})),
)
row(
    "repeat",
    lambda x, sizes: x.repeat(*sizes),
    lambda x, sizes: np.tile(x, sizes),
    shaped(((2, 3), {"sizes": (2, 1)}), ((2, 1), {"sizes": (2, 1, 3)}), ((3,), {"sizes": (0,)}), ((), {"sizes": (2,)})),
    bad=[bad(lambda: t.ones(2, 2).repeat(3), ValueError, "repeat: expected a count for each of 2 axes")],
)
row(
    "repeat_interleave",
    t.repeat_interleave,
    lambda x, repeats, dim: np.repeat(x, repeats, dim),
    shaped(((2, 3), {"repeats": 2, "dim": 0}), ((2, 3), {"repeats": 3, "dim": -1})),
)
row(
    "tril",
    t.tril,
    lambda x, diagonal=0: np.tril(x, diagonal),
    shaped(((3, 3), {}), ((2, 4), {"diagonal": 1}), ((2, 3, 2), {"diagonal": -1})),
)
row(
    "triu",
    t.triu,
    lambda x, diagonal=0: np.triu(x, diagonal),
    shaped(((3, 3), {}), ((2, 4), {"diagonal": 1}), ((2, 3, 2), {"diagonal": -1})),
)


def vectors(rng: Generator) -> Iterator[Case]:
    for indexing in ("ij", "xy"):
        yield case(normal(rng, (3,)), normal(rng, (2,)), indexing=indexing)
        yield case(normal(rng, (2,)), normal(rng, (1,)), normal(rng, (3,)), indexing=indexing)
    yield case(normal(rng, (3,)), indexing="ij")


row(
    "meshgrid",
    t.meshgrid,
    lambda *x, indexing: tuple(np.meshgrid(*x, indexing=indexing)),
    vectors,
    (0, 1, 2),
    bad=[bad(lambda: t.meshgrid(t.ones(2), indexing="ji"), ValueError, "meshgrid: expected indexing 'ij' or 'xy'")],
)


def broadcasts(rng: Generator) -> Iterator[Case]:
    for shape_a, shape_b in PAIRS:
        yield case(normal(rng, shape_a), normal(rng, shape_b))


row(
    "broadcast_tensors",
    t.broadcast_tensors,
    lambda *x: tuple(np.broadcast_arrays(*x)),
    broadcasts,
    (0, 1),
    bad=[bad(lambda: t.broadcast_tensors(t.ones(2), t.ones(3)), ValueError, r"\(2,\), \(3,\) do not broadcast")],
)


def classes(rng: Generator) -> Iterator[Case]:
    yield case(rng.integers(0, 4, (3, 2)), num_classes=4)
    yield case(np.array([2, 0, 1]))
    yield case(np.array(1), num_classes=3)
    yield case(np.zeros((0,), dtype=np.int64), num_classes=3)


def numpy_one_hot(x: np.ndarray, num_classes: int = -1) -> np.ndarray:
    return np.eye(num_classes if num_classes > 0 else int(x.max()) + 1, dtype=np.int64)[x]


row(
    "one_hot",
    F.one_hot,
    numpy_one_hot,
    classes,
    (),
    "int64",
    bad=[
        bad(lambda: F.one_hot(t.ones(2)), TypeError, "one_hot: expected integers, got float32"),
        bad(lambda: F.one_hot(t.tensor([0, 5]), 3), ValueError, r"one_hot: expected classes 0 … 2, got 0 … 5"),
        bad(lambda: F.one_hot(t.tensor([-1, 1])), ValueError, "one_hot: expected classes"),
    ],
)

# -- selection and sorting ---------------------------------------------------------------------------------------------


def along(rng: Generator) -> Iterator[Case]:
    yield case(normal(rng, (3, 2)), rng.integers(0, 3, (4, 2)), dim=0)
    yield case(normal(rng, (3, 2)), rng.integers(-2, 2, (3, 3)), dim=-1)
    yield case(normal(rng, (2, 3, 2)), rng.integers(0, 3, (2, 1, 2)), dim=1)
    yield case(normal(rng, (4,)), np.zeros((0,), dtype=np.int64), dim=0)


row(
    "take_along_dim",
    t.take_along_dim,
    lambda x, indices, dim: np.take_along_axis(x, indices, dim),
    along,
    bad=[
        bad(
            lambda: t.take_along_dim(t.ones(2, 3), t.tensor([[0.5]]), dim=1),
            (IndexError, ValueError, TypeError),
            r"take_along_dim: .*\(2, 3\)",
        )
    ],
)


def additions(rng: Generator) -> Iterator[Case]:
    yield case(normal(rng, (3, 2)), np.array([[0, 2], [0, 0]]), normal(rng, (2, 2)), dim=0)
    yield case(normal(rng, (2, 3)), np.array([[1, 1], [2, 0]]), normal(rng, (2, 2)), dim=1)
    yield case(normal(rng, (3,)), np.array([0, 0, 0, 2]), normal(rng, (4,)), dim=-1)
    yield case(normal(rng, (2, 2)), np.zeros((0, 2), dtype=np.int64), normal(rng, (0, 2)), dim=0)


def numpy_scatter_add(x: np.ndarray, indices: np.ndarray, values: np.ndarray, dim: int) -> np.ndarray:
    out = x.copy()
    for place in np.ndindex(indices.shape):
        target = list(place)
        target[dim] = indices[place]
        out[tuple(target)] += values[place]
    return out


row(
    "scatter_add",
    Op.registry["scatter_add"],
    numpy_scatter_add,
    additions,
    (0, 2),
    bad=[
        bad(lambda: Op.registry["scatter_add"](t.ones(2), t.tensor([2]), t.ones(1), dim=0), IndexError, "scatter_add: ")
    ],
)


def index_additions(rng: Generator) -> Iterator[Case]:
    yield case(normal(rng, (4, 3)), normal(rng, (3, 3)), index=np.array([0, 2, 0]))
    yield case(normal(rng, (4, 3)), normal(rng, (2,)), index=(np.array([1, 1]), np.array([2, 2])))
    yield case(normal(rng, (3, 2)), normal(rng, (2,)), index=0)


def numpy_index_add(x: np.ndarray, values: np.ndarray, index: Any) -> np.ndarray:
    """One slice of `values` after the other, so that a place that is named twice gets both."""
    out = x.copy()
    index = index if isinstance(index, tuple) else (index,)
    if isinstance(index[0], int):
        out[index[0]] += values
    for k, place in enumerate(zip(*index, strict=True) if not isinstance(index[0], int) else ()):
        out[place] += values[k]
    return out


def raw_index_add(x: Any, values: Any, index: Any) -> Any:
    from tinytorch.m02_tensor import _raw_index

    return Op.registry["index_add"](x, values, index=_raw_index(index))


row(
    "index_add",
    raw_index_add,
    numpy_index_add,
    index_additions,
    (0, 1),
    bad=[bad(lambda: Op.registry["index_add"](t.ones(2, 3), t.ones(4), index=0), ValueError, r"index_add: .*\(4,\)")],
)


def gathers(rng: Generator) -> Iterator[Case]:
    yield case(normal(rng, (3, 2)), index=rng.integers(0, 3, (2, 1)), dim=0)
    yield case(normal(rng, (3, 2)), index=rng.integers(0, 2, (3, 4)), dim=-1)
    yield case(normal(rng, (2, 3, 2)), index=rng.integers(0, 3, (1, 4, 2)), dim=1)


def numpy_gather(x: np.ndarray, dim: int, index: np.ndarray) -> np.ndarray:
    out = np.empty(index.shape)
    for place in np.ndindex(index.shape):
        source = list(place)
        source[dim] = index[place]
        out[place] = x[tuple(source)]
    return out


row(
    "gather",
    t.gather,
    numpy_gather,
    gathers,
    bad=[bad(lambda: t.gather(t.ones(2, 3), 0, t.tensor([0])), ValueError, r"gather: the index has shape \(1,\)")],
)


def selections(rng: Generator) -> Iterator[Case]:
    yield case(normal(rng, (3, 2)), index=np.array([2, 0, 2]), dim=0)
    yield case(normal(rng, (2, 3)), index=np.array([1]), dim=-1)


row("index_select", t.index_select, lambda x, dim, index: np.take(x, index, dim), selections)


def selected(rng: Generator) -> Iterator[Case]:
    yield case(normal(rng, (3, 2)), logical(rng, (3, 2)))
    yield case(normal(rng, (3, 2)), logical(rng, (2,)))
    yield case(normal(rng, (2,)), logical(rng, (3, 2)))


row(
    "masked_select",
    t.masked_select,
    lambda x, mask: np.broadcast_arrays(x, mask)[0][np.broadcast_arrays(x, mask)[1]],
    selected,
)
row(
    "nonzero",
    t.nonzero,
    lambda x: np.stack(np.nonzero(x), 1),
    with_attributes(((3, 2), (2, 1, 3), (4,), (0, 2)), ({},) * 4, logical),
    (),
    "int64",
)


def orders(rng: Generator) -> Iterator[Case]:
    for shape, dim in (((3, 2), 0), ((2, 3), -1), ((2, 2, 3), 1), ((5,), 0), ((0, 2), 0)):
        for descending in (False, True):
            yield case(distinct(rng, shape), dim=dim, descending=descending)


def numpy_argsort(x: np.ndarray, dim: int = -1, descending: bool = False) -> np.ndarray:
    return np.argsort(-x if descending else x, axis=dim, kind="stable")


row("argsort", t.argsort, numpy_argsort, orders, (), "int64", integers=True, bad=[no_such_axis("argsort")])
row(
    "sort",
    t.sort,
    lambda x, **k: (np.take_along_axis(x, numpy_argsort(x, **k), k.get("dim", -1)), numpy_argsort(x, **k)),
    orders,
    result="with int64",
)


def tops(rng: Generator) -> Iterator[Case]:
    for k, attributes in ((2, {}), (1, {"dim": 0}), (3, {"largest": False}), (0, {})):
        yield case(distinct(rng, (2, 4)), k=min(k, 2) if attributes.get("dim") == 0 else k, **attributes)


def numpy_topk(x: np.ndarray, k: int, dim: int = -1, largest: bool = True) -> tuple:
    indices = np.take(numpy_argsort(x, dim, largest), range(k), dim)
    return np.take_along_axis(x, indices, dim), indices


row(
    "topk",
    t.topk,
    numpy_topk,
    tops,
    result="with int64",
    bad=[
        bad(lambda: t.topk(t.ones(2, 3), 4), ValueError, "topk: expected k between 0 and 3"),
        bad(lambda: t.topk(t.ones(2, 3), -1), ValueError, "topk: expected k between 0 and 3"),
    ],
)

# -- linear algebra ----------------------------------------------------------------------------------------------------


def products(rng: Generator) -> Iterator[Case]:
    for a, b in (
        ((2, 3), (3, 2)),
        ((3,), (3,)),
        ((2, 3), (3,)),
        ((3,), (3, 2)),
        ((2, 2, 3), (3, 2)),
        ((2, 1, 3), (1, 3, 2)),
        ((2, 1, 2, 3), (3, 3, 1)),
        ((3,), (2, 3, 2)),
        ((2, 2, 3), (3,)),
        ((0, 3), (3, 2)),
        ((2, 0), (0, 3)),
        ((2, 3), (2, 3, 1)),
    ):
        yield case(normal(rng, a), normal(rng, b))


row(
    "matmul",
    lambda a, b: a @ b,
    np.matmul,
    products,
    (0, 1),
    bad=[
        bad(lambda: t.ones(2, 3) @ t.ones(2, 3), ValueError, r"matmul: \(2, 3\) @ \(2, 3\)"),
        bad(lambda: t.ones(2, 3) @ t.tensor(1.0), ValueError, r"matmul: \(2, 3\) @ \(\)"),
    ],
)


def equations(rng: Generator) -> Iterator[Case]:
    for equation, *shapes in (
        ("ij,jk->ik", (2, 3), (3, 2)),
        ("bij,bjk->bik", (2, 2, 3), (2, 3, 1)),
        ("ij->ji", (2, 3)),
        ("ij->", (2, 3)),
        ("i,j->ij", (2,), (3,)),
        ("ii->i", (3, 3)),
        ("ii->", (3, 3)),
        ("ij,ij->i", (2, 3), (2, 3)),
        ("ij,jk,kl->il", (2, 3), (3, 2), (2, 2)),
        ("i,i,i->", (3,), (3,), (3,)),
    ):
        yield case(*(normal(rng, shape) for shape in shapes), equation=equation)


def shorthand(rng: Generator) -> Iterator[Case]:
    for equation, *shapes in (
        ("ij,jk", (2, 3), (3, 2)),
        ("ba", (2, 3)),
        ("...ij,...jk->...ik", (2, 2, 3), (3, 2)),
        ("...i->...", (2, 3)),
        ("i...,i...->i...", (2, 3), (2,)),
        ("...,...", (2, 1), (3,)),
        ("ii", (3, 3)),
        ("b i , b -> b i", (2, 3), (2,)),
    ):
        yield case(*(normal(rng, shape) for shape in shapes), equation=equation)


def numpy_einsum(*arrays: np.ndarray, equation: str) -> np.ndarray:
    return np.einsum(equation, *arrays)


row(
    "einsum_op",
    lambda *x, equation: t.einsum(equation, *x),
    numpy_einsum,
    equations,
    (0, 1, 2),
    bad=[bad(lambda: t.einsum("ij,jk->ik", t.ones(2, 3), t.ones(2, 3)), ValueError, r"einsum.*\(2, 3\)")],
)
row(
    "einsum",
    lambda *x, equation: t.einsum(equation, *x),
    numpy_einsum,
    shorthand,
    (0, 1, 2),
    bad=[
        bad(lambda: t.einsum("ij,jk", t.ones(2, 3)), ValueError, "einsum: 'ij,jk' takes 2 operands, got 1"),
        bad(
            lambda: t.einsum("ijk->i", t.ones(2, 3)),
            ValueError,
            "einsum: 'ijk' in 'ijk->i' names 3 axes, the operand has 2",
        ),
        bad(lambda: t.einsum("ij->iz", t.ones(2, 3)), ValueError, "einsum: the result 'iz'"),
        bad(lambda: t.einsum("ij->ii", t.ones(2, 3)), ValueError, "einsum: the result 'ii'"),
    ],
)


def two_vectors(*shapes: tuple) -> Callable:
    def cases(rng: Generator) -> Iterator[Case]:
        for a, b in shapes:
            yield case(normal(rng, a), normal(rng, b))

    return cases


row("outer", t.outer, np.outer, two_vectors(((2,), (3,)), ((1,), (1,)), ((0,), (2,))), (0, 1))
row(
    "dot",
    t.dot,
    np.dot,
    two_vectors(((3,), (3,)), ((1,), (1,))),
    (0, 1),
    bad=[
        bad(lambda: t.dot(t.ones(2), t.ones(3)), ValueError, "dot: expected two vectors of one length"),
        bad(lambda: t.dot(t.ones(2, 2), t.ones(2, 2)), ValueError, "dot: expected two vectors"),
    ],
)

# -- dtype, device, copies ---------------------------------------------------------------------------------------------

row(
    "cast",
    lambda x, dtype: Op.registry["cast"](x, dtype=dtype),
    lambda x, dtype: x.astype(dtype),
    unary(dtype="float64"),
    result="float64",
    bad=[bad(lambda: t.ones(2).to("float33"), RuntimeError, "float33")],
)
row("clone", t.clone, np.copy, unary(), integers=True)


def device_moves(rng: Generator) -> Iterator[Case]:
    for shape in SHAPES:
        yield case(normal(rng, shape))


def there_and_back(x: Any) -> Any:
    """To another device and to the first one again."""
    other = "array_api_strict" if x.device == "cpu" else "cpu"
    return x.to(device=other).to(device=x.device)


row(
    "to_device",
    there_and_back,
    lambda x: x,
    device_moves,
    integers=True,
    bad=[bad(lambda: t.ones(2).to("nowhere"), RuntimeError, "there is no device 'nowhere'")],
)


def assignments(rng: Generator) -> Iterator[Case]:
    yield case(normal(rng, (4, 3)), normal(rng, (3,)), index=1)
    yield case(normal(rng, (4, 3)), 2.5, index=(slice(None), 0))
    yield case(normal(rng, (4, 3)), normal(rng, (2, 1)), index=np.array([0, 3]))
    yield case(normal(rng, (4, 3)), normal(rng, ()), index=np.array([[True, False, True]] * 4))
    yield case(normal(rng, (3,)), 1, index=...)


def numpy_index_put(x: np.ndarray, value: Any, index: Any) -> np.ndarray:
    out = x.copy()
    out[index] = value
    return out


def raw_index_put(x: Any, value: Any, index: Any) -> Any:
    from tinytorch.m02_tensor import _raw_index

    return Op.registry["index_put"](x, value, index=_raw_index(index))


row(
    "index_put",
    raw_index_put,
    numpy_index_put,
    assignments,
    (0, 1),
    bad=[
        bad(
            lambda: Op.registry["index_put"](t.ones(2, 3), t.ones(4), index=0),
            ValueError,
            r"index_put: .*\(2, 3\).*\(4,\)",
        ),
        bad(lambda: Op.registry["index_put"](t.ones(2, 3), 1.0, index=5), IndexError, r"index_put: .*\(2, 3\)"),
    ],
)


def overwrites(rng: Generator) -> Iterator[Case]:
    for shape, value in (((2, 3), (3,)), ((2, 3), ()), ((), ()), ((2, 1), (2, 1))):
        yield case(normal(rng, shape), normal(rng, value))
    yield case(normal(rng, (2, 3)), 1.5)


row(
    "overwrite",
    Op.registry["overwrite"],
    lambda x, value: np.broadcast_to(value, x.shape),
    overwrites,
    (1,),
    bad=[bad(lambda: Op.registry["overwrite"](t.ones(2, 3), t.ones(4)), ValueError, r"overwrite: .*\(2, 3\).*\(4,\)")],
)

# -- 03 activations ----------------------------------------------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def numpy_cdf(x: np.ndarray, approximate: str = "none") -> np.ndarray:
    if approximate == "tanh":
        return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * (1 + erf(x / math.sqrt(2)))


def also(*attributes: dict, draw: Draw = normal) -> Callable:
    """Each shape without attributes, and one shape with each of these."""

    def cases(rng: Generator) -> Iterator[Case]:
        yield from unary(draw)(rng)
        for given in attributes:
            yield case(draw(rng, (3, 2)), **given)

    return cases


row("relu", F.relu, lambda x: np.maximum(x, 0), unary(off_zero), integers=True, bad=[not_for("bool", "neg")])
row(
    "leaky_relu",
    F.leaky_relu,
    lambda x, negative_slope=0.01: np.where(x > 0, x, negative_slope * x),
    also({"negative_slope": 0.3}, draw=off_zero),
    result="float",
)
row(
    "hardtanh",
    F.hardtanh,
    lambda x, min_val=-1.0, max_val=1.0: np.clip(x, min_val, max_val),
    also({"min_val": 0.0, "max_val": 1.0}, draw=off_whole),
    result="float",
)
row("sigmoid", F.sigmoid, sigmoid, unary(), result="float", integers=True)


def noisy(rng: Generator) -> Iterator[Case]:
    for shape, p in (((3, 4), 0.3), ((), 0.5), ((2, 0), 0.1), ((5,), 0.0), ((5,), 1.0), ((2, 3, 2), 0.75)):
        noise = rng.uniform(size=shape)
        noise.reshape(-1)[: noise.size // 4] = p if p < 1 else 0  # not below
        yield case(normal(rng, shape), noise, p=p)


row("drop", Op.registry["drop"], lambda x, noise, p: np.where(noise >= p, x / (1 - p if p < 1 else np.inf), 0), noisy,
    (0,))  # fmt: skip
row("silu", F.silu, lambda x: x * sigmoid(x), unary(), result="float", integers=True)
row(
    "gelu_and_cdf",
    Op.registry["gelu_and_cdf"],
    lambda x, approximate="none": (x * numpy_cdf(x, approximate), numpy_cdf(x, approximate)),
    also({"approximate": "tanh"}),
    result="float",
    bad=[bad(lambda: F.gelu(t.ones(2), approximate="erf"), ValueError, "gelu: approximate must be")],
)
row(
    "softplus",
    F.softplus,
    lambda x, beta=1.0, threshold=20.0: np.where(beta * x > threshold, x, np.log1p(np.exp(beta * x)) / beta),
    also({"beta": 2.0}, {"beta": 0.5, "threshold": 1.05}),
    result="float",
)
row(
    "elu",
    F.elu,
    lambda x, alpha=1.0: np.where(x > 0, x, alpha * np.expm1(x)),
    also({"alpha": 0.5}, draw=off_zero),
    result="float",
)


def numpy_softmax(x: np.ndarray, dim: int) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(dim, keepdims=True)


row("softmax", F.softmax, numpy_softmax, one_axis(), result="float", integers=True, bad=[no_such_axis("softmax")])
row(
    "log_softmax",
    F.log_softmax,
    lambda x, dim: np.log(numpy_softmax(x, dim)),
    one_axis(),
    result="float",
    bad=[no_such_axis("log_softmax")],
)

# -- 04 layers, 05 losses ----------------------------------------------------------------------------------------------


def layers(rng: Generator) -> Iterator[Case]:
    for lead in ((2,), (), (2, 3), (0,), (2, 0)):
        yield case(normal(rng, (*lead, 3)), normal(rng, (2, 3)), normal(rng, (2,)))
    yield case(normal(rng, (2, 3)), normal(rng, (1, 3)), None)


row(
    "linear",
    F.linear,
    lambda x, weight, bias=None: x @ weight.T + (0 if bias is None else bias),
    layers,
    (0, 1, 2),
    bad=[
        bad(
            lambda: F.linear(t.ones(64, 512), t.ones(10, 784)),
            ValueError,
            r"linear: input has 512 features, but the weight takes 784 \(input \(64, 512\), weight \(10, 784\)\)",
        ),
        bad(
            lambda: F.linear(t.ones(2, 3), t.ones(4, 3), t.ones(3)),
            ValueError,
            r"linear: expected a float32 bias \(4,\)",
        ),
        bad(lambda: F.linear(t.ones(2, 3, dtype="float64"), t.ones(4, 3)), TypeError, "linear: input is float64"),
    ],
)


row(
    "linear_relu",
    lambda *inputs: Op.registry["linear_relu"](*inputs),
    lambda x, weight, bias=None: np.maximum(x @ weight.T + (0 if bias is None else bias), 0),
    layers,
    (0, 1, 2),
    bad=[
        bad(
            lambda: t.nn.Sequential(t.nn.Linear(784, 10), t.nn.ReLU())(t.ones(64, 512)),
            ValueError,
            r"^linear: input has 512 features, but the weight takes 784 \(input \(64, 512\), weight \(10, 784\)\)",
        ),
    ],
)


def scores(rng: Generator) -> Iterator[Case]:
    yield case(normal(rng, (4, 3)), np.array([0, 2, 1, 1]))
    yield case(normal(rng, (1, 2)), np.array([1]))
    yield case(normal(rng, (0, 3)), np.zeros((0,), dtype=np.int64))


def numpy_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple:
    probabilities = numpy_softmax(logits, 1)
    return -np.log(probabilities[np.arange(len(targets)), targets]), probabilities


row(
    "softmax_cross_entropy",
    Op.registry["softmax_cross_entropy"],
    numpy_cross_entropy,
    scores,
    bad=[bad(lambda: F.cross_entropy(t.ones(2, 3), t.tensor([0, 3])), ValueError, "cross_entropy: ")],
)


def probabilities(rng: Generator) -> Iterator[Case]:
    for shape in SHAPES:
        yield case(rng.uniform(0.1, 0.9, shape), rng.uniform(0, 1, shape))


row(
    "bernoulli_cross_entropy",
    Op.registry["bernoulli_cross_entropy"],
    lambda p, y: -y * np.log(p) - (1 - y) * np.log(1 - p),
    probabilities,
    (0, 1),
    result="float",
    bad=[bad(lambda: F.binary_cross_entropy(t.ones(2) * 2, t.ones(2)), ValueError, "binary_cross_entropy: ")],
)

# -- 09 spatial --------------------------------------------------------------------------------------------------------

Four = Sequence[int]


def numpy_windows(x: np.ndarray, size: Four, stride: Four, padding: Four, dilation: Four, border: float = 0.0) -> Any:
    """((…, OH, OW, KH, KW) values of all windows, the same of each one's place in the flattened padded picture)."""
    pairs = [(0, 0)] * (x.ndim - 2) + [(p, p) for p in padding]
    padded = np.pad(x, pairs, constant_values=border)
    numbers = np.arange(math.prod(padded.shape[-2:])).reshape(padded.shape[-2:])
    spans = tuple(d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True))
    step = (..., slice(None, None, stride[0]), slice(None, None, stride[1]), slice(None, None, dilation[0]),
            slice(None, None, dilation[1]))  # fmt: skip
    window = np.lib.stride_tricks.sliding_window_view
    return window(padded, spans, axis=(-2, -1))[step], window(numbers, spans)[step], padded.shape


def numpy_added(parts: np.ndarray, places: np.ndarray, padded: tuple, padding: Four) -> np.ndarray:
    """(…, OH, OW, KH, KW) added where the windows lie, without the border."""
    lead = parts.shape[:-4]
    flat = np.zeros((math.prod(lead), math.prod(padded[-2:])))
    for line, part in zip(flat, parts.reshape(len(flat), places.size), strict=True):
        np.add.at(line, places.reshape(-1), part)
    out = flat.reshape(*lead, *padded[-2:])
    return out[..., padding[0] : padded[-2] - padding[0], padding[1] : padded[-1] - padding[1]]


GEOMETRIES = (
    {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)},
    {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"stride": (1, 3), "padding": (2, 1), "dilation": (2, 1)},
)


def numpy_conv2d(x: np.ndarray, weight: np.ndarray, bias: Any = None, groups: int = 1, **geometry: Any) -> np.ndarray:
    windows = numpy_windows(x, weight.shape[2:], **geometry)[0]
    inputs, outputs = weight.shape[1], weight.shape[0] // groups
    parts = [
        np.einsum("ncijuv,ocuv->noij", windows[:, g * inputs : (g + 1) * inputs], weight[g * outputs :][:outputs])
        for g in range(groups)
    ]
    out = np.concatenate(parts, axis=1)
    return out if bias is None else out + bias[:, None, None]


def numpy_conv_input(g: np.ndarray, weight: np.ndarray, shape: tuple, groups: int, **geometry: Any) -> np.ndarray:
    inputs, outputs = weight.shape[1], weight.shape[0] // groups
    _, places, padded = numpy_windows(np.zeros(shape), weight.shape[2:], **geometry)
    parts = [
        np.einsum("noij,ocuv->ncijuv", g[:, k * outputs : (k + 1) * outputs], weight[k * outputs :][:outputs])
        for k in range(groups)
    ]
    assert inputs * groups == shape[1]
    return numpy_added(np.concatenate(parts, axis=1), places, padded, geometry["padding"])


def numpy_conv_weight(g: np.ndarray, x: np.ndarray, size: tuple, groups: int, **geometry: Any) -> np.ndarray:
    windows = numpy_windows(x, size, **geometry)[0]
    inputs, outputs = x.shape[1] // groups, g.shape[1] // groups
    parts = [
        np.einsum("noij,ncijuv->ocuv", g[:, k * outputs :][:, :outputs], windows[:, k * inputs :][:, :inputs])
        for k in range(groups)
    ]
    return np.concatenate(parts, axis=0)


def raw_windows(shape: tuple, size: tuple, stride: tuple, padding: tuple, dilation: tuple) -> Any:
    from tinytorch.m09_spatial import lay_windows

    return lay_windows("test", tuple(shape), size, stride, tuple((p, p) for p in padding), dilation)


def raw_conv_input(g: Any, weight: Any, shape: tuple, groups: int, **geometry: Any) -> Any:
    windows = raw_windows(shape, weight.shape[2:], **geometry)
    return Op.registry["convolution_input_gradient"](g, weight, windows=windows, groups=groups)


def raw_conv_relu(x: Any, weight: Any, bias: Any = None, *, groups: int, **geometry: Any) -> Any:
    windows = raw_windows(x.shape, weight.shape[2:], **geometry)
    return Op.registry["convolution_relu"](x, weight, bias, windows=windows, groups=groups)


def raw_conv_weight(g: Any, x: Any, size: tuple, groups: int, **geometry: Any) -> Any:
    windows = raw_windows(x.shape, size, **geometry)
    return Op.registry["convolution_weight_gradient"](g, x, windows=windows, groups=groups)


# x and weight, for a geometry each; the last has as many windows as pixels, and yet not one window a pixel.
CONVOLUTIONS = (
    ((1, 2, 3, 3), (1, 2, 2, 2), 1, GEOMETRIES[0]),
    ((2, 2, 4, 3), (2, 1, 2, 2), 2, GEOMETRIES[1]),
    ((1, 1, 3, 4), (2, 1, 2, 2), 1, GEOMETRIES[2]),
    ((1, 2, 2, 2), (1, 2, 1, 1), 1, GEOMETRIES[0]),
    ((2, 4, 3, 1), (4, 1, 2, 1), 4, GEOMETRIES[0]),
    ((0, 2, 3, 3), (3, 2, 3, 2), 1, GEOMETRIES[0]),
    ((1, 1, 2, 2), (1, 1, 1, 1), 1, {"stride": (3, 3), "padding": (1, 1), "dilation": (1, 1)}),
)


def convolutions(rng: Generator) -> Iterator[Case]:
    for i, (x, weight, groups, geometry) in enumerate(CONVOLUTIONS):
        bias = normal(rng, weight[:1]) if i % 2 else None
        yield case(normal(rng, x), normal(rng, weight), bias, groups=groups, **geometry)


def out_shape(x: tuple, weight: tuple, geometry: dict) -> tuple:
    return (x[0], weight[0], *numpy_windows(np.zeros(x), weight[2:], **geometry)[1].shape[:2])


def input_gradients(rng: Generator) -> Iterator[Case]:
    for x, weight, groups, geometry in CONVOLUTIONS:
        g = normal(rng, out_shape(x, weight, geometry))
        yield case(g, normal(rng, weight), shape=x, groups=groups, **geometry)


def weight_gradients(rng: Generator) -> Iterator[Case]:
    for x, weight, groups, geometry in CONVOLUTIONS:
        g = normal(rng, out_shape(x, weight, geometry))
        yield case(g, normal(rng, x), size=weight[2:], groups=groups, **geometry)


row(
    "convolution",
    F.conv2d,
    numpy_conv2d,
    convolutions,
    (0, 1, 2),
    bad=[
        bad(
            lambda: F.conv2d(t.ones(1, 3, 8, 8), t.ones(4, 1, 3, 3)),
            ValueError,
            r"conv2d: input has 3 channels, but the weight takes 1 \(input \(1, 3, 8, 8\), weight \(4, 1, 3, 3\)",
        ),
        bad(
            lambda: F.conv2d(t.ones(2, 2), t.ones(4, 1, 3, 3)), ValueError, r"conv2d: expected an input \(N, C, H, W\)"
        ),
        bad(lambda: F.conv2d(t.ones(1, 2, 4, 4), t.ones(3, 1, 1, 1), groups=2), ValueError, "groups must divide the 3"),
        bad(lambda: F.conv2d(t.ones(1, 1, 2, 8), t.ones(1, 1, 3, 3)), ValueError, "a window of 3x3 .* 2x8"),
        bad(lambda: F.conv2d(t.ones(1, 1, 4, 4), t.ones(1, 1, 3, 3), stride=0), ValueError, "conv2d: stride must be"),
        bad(
            lambda: F.conv2d(t.ones(1, 1, 4, 4), t.ones(1, 1, 3, 3), stride=2, padding="same"),
            ValueError,
            r"conv2d: padding='same' is for a stride of 1, the stride is \(2, 2\)",
        ),
        bad(
            lambda: F.conv2d(t.ones(1, 1, 4, 4), t.ones(1, 1, 3, 3), padding="full"),
            ValueError,
            "conv2d: padding must be 'valid', 'same'",
        ),
        bad(
            lambda: F.conv2d(t.ones(1, 1, 4, 4, dtype="float64"), t.ones(1, 1, 3, 3)),
            TypeError,
            "conv2d: input is float64, but the weight is float32",
        ),
        bad(
            lambda: F.conv2d(t.ones(1, 1, 4, 4), t.ones(2, 1, 3, 3), t.ones(3)),
            ValueError,
            r"conv2d: expected a float32 bias \(2,\)",
        ),
    ],
    loose=5,
)
row("convolution_input_gradient", raw_conv_input, numpy_conv_input, input_gradients, (0, 1), loose=5)
row("convolution_weight_gradient", raw_conv_weight, numpy_conv_weight, weight_gradients, (0, 1), loose=5)
row("convolution_relu", raw_conv_relu, lambda *x, **geometry: np.maximum(numpy_conv2d(*x, **geometry), 0), convolutions,
    (0, 1, 2), loose=5)  # fmt: skip

POOLINGS = (
    ((2, 2, 4, 3), {"size": (2, 2), **GEOMETRIES[0]}),
    ((1, 5, 4), {"size": (3, 2), "stride": (2, 2), "padding": (1, 0), "dilation": (1, 1)}),
    ((1, 1, 4, 4), {"size": (2, 2), "stride": (1, 1), "padding": (1, 1), "dilation": (2, 2)}),
    ((1, 2, 3, 3), {"size": (1, 1), "stride": (2, 1), "padding": (0, 0), "dilation": (1, 1)}),
    ((0, 2, 4, 4), {"size": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}),
)


def numpy_maxima(x: np.ndarray, **geometry: Any) -> tuple:
    """(values, place of each in the padded picture, the padded shape)."""
    windows, places, padded = numpy_windows(x, border=-np.inf, **geometry)
    flat = windows.reshape(*windows.shape[:-2], math.prod(windows.shape[-2:]))
    numbers = np.broadcast_to(places.reshape(flat.shape[-3:]), flat.shape)
    first = flat.argmax(-1)[..., None]
    return np.take_along_axis(flat, first, -1)[..., 0], np.take_along_axis(numbers, first, -1)[..., 0], padded


def numpy_scatter(g: np.ndarray, x: np.ndarray, _: Any, **geometry: Any) -> np.ndarray:
    places, padded = numpy_maxima(x, **geometry)[1:]
    out = np.zeros((math.prod(x.shape[:-2]), math.prod(padded[-2:])))
    count = math.prod(places.shape[-2:])
    for line, where, part in zip(out, places.reshape(-1, count), g.reshape(-1, count), strict=True):
        np.add.at(line, where, part)
    (top, left), out = geometry["padding"], out.reshape(*x.shape[:-2], *padded[-2:])
    return out[..., top : padded[-2] - top, left : padded[-1] - left]


def numpy_pick(values: np.ndarray, x: np.ndarray, _: Any, **geometry: Any) -> np.ndarray:
    places = numpy_maxima(x, **geometry)[1]
    padded = np.pad(values, [(0, 0)] * (x.ndim - 2) + [(p, p) for p in geometry["padding"]])
    flat, where = (a.reshape(*x.shape[:-2], math.prod(a.shape[-2:])) for a in (padded, places))
    return np.take_along_axis(flat, where, -1).reshape(places.shape)


def maxima_cases(kind: str) -> Callable:
    def cases(rng: Generator) -> Iterator[Case]:
        for shape, geometry in POOLINGS:
            x = distinct(rng, shape)
            out = numpy_maxima(x, **geometry)[0]
            if kind == "pool":
                yield case(x, **geometry)
            else:
                yield case(normal(rng, out.shape if kind == "scatter" else shape), x, out, **geometry)

    return cases


def pooled(operation: str) -> Callable:
    def call(*inputs: Any, size: tuple, **geometry: Any) -> Any:
        x = inputs[0] if operation == "max_pool" else inputs[1]
        return Op.registry[operation](*inputs, windows=raw_windows(x.shape, size, **geometry))

    return call


row(
    "max_pool",
    pooled("max_pool"),
    lambda x, **geometry: numpy_maxima(x, **geometry)[0],
    maxima_cases("pool"),
    bad=[
        bad(lambda: F.max_pool2d(t.ones(4, 4), 2), ValueError, r"max_pool2d: expected an input .* got \(4, 4\)"),
        bad(lambda: F.max_pool2d(t.ones(1, 4, 4), 2, padding=2), ValueError, "padding must be at most half of kernel"),
        bad(lambda: F.max_pool2d(t.ones(1, 4, 4), 5), ValueError, "max_pool2d: a window of 5x5 .* 4x4"),
        bad(lambda: F.max_pool2d(t.ones(1, 4, 4), (2, 2, 2)), ValueError, "max_pool2d: kernel_size must be a whole"),
    ],
)
row("scatter_to_maxima", pooled("scatter_to_maxima"), numpy_scatter, maxima_cases("scatter"))
row("gather_from_maxima", pooled("gather_from_maxima"), numpy_pick, maxima_cases("gather"))

AVERAGES = (
    ((2, 4, 3), {"kernel_size": 2}),
    ((1, 2, 4, 5), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 1)}),
    ((1, 2, 4, 5), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 1), "count_include_pad": False}),
    ((1, 3, 4), {"kernel_size": 2, "divisor_override": 3, "stride": 1}),
)


def numpy_avg(
    x: np.ndarray, kernel_size: Any, stride: Any = None, padding: Any = (0, 0), count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> np.ndarray:  # fmt: skip
    size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    stride = size if stride is None else (stride, stride) if isinstance(stride, int) else stride
    geometry = {"size": size, "stride": stride, "padding": padding, "dilation": (1, 1)}
    counts = numpy_windows(np.ones(x.shape[-2:]), border=float(count_include_pad), **geometry)[0].sum((-2, -1))
    return numpy_windows(x, **geometry)[0].sum((-2, -1)) / (divisor_override or counts)


def numpy_avg_back(g: np.ndarray, shape: tuple, **attributes: Any) -> np.ndarray:
    """The transpose of the mean as a matrix."""
    units = np.eye(math.prod(shape)).reshape(-1, *shape)
    return np.stack([(numpy_avg(unit, **attributes) * g).sum() for unit in units]).reshape(shape)


def raw_avg_back(g: Any, shape: tuple, **attributes: Any) -> Any:
    from tinytorch.m09_spatial import pooling

    size, stride, padding = (attributes.get(name) for name in ("kernel_size", "stride", "padding"))
    windows = pooling("avg_pool2d", t.zeros(shape), size, stride, padding or 0, 1, False)
    borders = padding if padding and attributes.get("count_include_pad", True) else (0, 0)
    counted = tuple((n, n) for n in borders)
    back = Op.registry["avg_pool_gradient"]
    return back(g, windows=windows, counted=counted, divisor=attributes.get("divisor_override"))


def averages(rng: Generator) -> Iterator[Case]:
    for shape, attributes in AVERAGES:
        yield case(normal(rng, shape), **attributes)


def averages_back(rng: Generator) -> Iterator[Case]:
    for shape, attributes in AVERAGES:
        yield case(normal(rng, numpy_avg(np.zeros(shape), **attributes).shape), shape=shape, **attributes)


row(
    "avg_pool",
    F.avg_pool2d,
    numpy_avg,
    averages,
    bad=[
        bad(lambda: F.avg_pool2d(t.ones(1, 4, 4), 2, divisor_override=0), ValueError, "divisor_override must not be 0"),
        bad(lambda: F.avg_pool1d(t.ones(4), 2), ValueError, r"avg_pool1d: expected an input \(N, C, L\)"),
    ],
)
row("avg_pool_gradient", raw_avg_back, numpy_avg_back, averages_back)


def numpy_unfold(x: np.ndarray, kernel_size: tuple, **geometry: Any) -> np.ndarray:
    windows = numpy_windows(x, kernel_size, **geometry)[0]
    return np.moveaxis(windows, (4, 5), (2, 3)).reshape(len(x), x.shape[1] * math.prod(kernel_size), -1)


def numpy_fold(x: np.ndarray, output_size: tuple, kernel_size: tuple, **geometry: Any) -> np.ndarray:
    _, places, padded = numpy_windows(np.zeros(output_size), kernel_size, **geometry)
    parts = x.reshape(len(x), -1, *kernel_size, *places.shape[:2])
    return numpy_added(np.moveaxis(parts, (2, 3), (4, 5)), places, padded, geometry["padding"])


def unfolded(rng: Generator) -> Iterator[Case]:
    for x, weight, _, geometry in CONVOLUTIONS[:4]:
        yield case(normal(rng, x), kernel_size=weight[2:], **geometry)


def folded(rng: Generator) -> Iterator[Case]:
    for x, weight, _, geometry in CONVOLUTIONS[:4]:
        columns = numpy_unfold(normal(rng, x), weight[2:], **geometry)
        yield case(normal(rng, columns.shape), output_size=x[2:], kernel_size=weight[2:], **geometry)


row("windows_to_columns", F.unfold, numpy_unfold, unfolded,
    bad=[bad(lambda: F.unfold(t.ones(3, 3), 2), ValueError, r"unfold: expected an input .* got \(3, 3\)")])  # fmt: skip
row("columns_to_windows", F.fold, numpy_fold, folded,
    bad=[bad(lambda: F.fold(t.ones(1, 8, 3), (3, 3), 2), ValueError,
             r"fold: expected columns \(N, a multiple of 4, 4\) for \(2, 2\) windows")])  # fmt: skip


def numpy_normalize(x: np.ndarray, weight: Any = None, bias: Any = None, *, dims: tuple, eps: float) -> tuple:
    mean, variance = x.mean(dims, keepdims=True), x.var(dims, keepdims=True)
    out = (x - mean) / np.sqrt(variance + eps)
    return out * (1 if weight is None else weight) + (0 if bias is None else bias), mean, variance


NORMALIZED = (
    ((3, 2), (2,), (0,)),
    ((2, 2, 3), (2, 1), (0, 2)),
    ((2, 2, 2, 2), (2, 2, 1), (2, 3)),
    ((2, 5), (5,), (1,)),
    ((0, 3), (3,), (1,)),
)


def normalized(rng: Generator) -> Iterator[Case]:
    for i, (shape, parameters, dims) in enumerate(NORMALIZED):
        weight, bias = (normal(rng, parameters) if i != 1 else None for _ in range(2))
        yield case(normal(rng, shape), weight, bias, dims=dims, eps=0.1)


def normalized_back(rng: Generator) -> Iterator[Case]:
    for i, (shape, parameters, dims) in enumerate(NORMALIZED):
        g, x, weight = normal(rng, shape), normal(rng, shape), normal(rng, parameters)
        _, mean, variance = numpy_normalize(x, dims=dims, eps=0.1)
        given = None if i == 1 else weight
        yield case(g, x, given, mean, variance, dims=dims, eps=0.1, shape=None if i == 3 else parameters)


def numpy_normalize_gradients(
    g: np.ndarray, x: np.ndarray, weight: Any, mean: np.ndarray, variance: np.ndarray, *, dims: tuple, eps: float,
    shape: tuple | None,
) -> tuple:  # fmt: skip
    """By mean and variance as functions of x: the long way."""
    inner, count = g * (1 if weight is None else weight), math.prod(x.shape[d] for d in dims)
    r = 1 / np.sqrt(variance + eps)
    to_variance = (inner * (x - mean) * -0.5 * r**3).sum(dims, keepdims=True)
    to_mean = (-inner * r).sum(dims, keepdims=True)
    found = [inner * r + to_variance * 2 * (x - mean) / count + to_mean / count]
    for part in () if shape is None else (g * (x - mean) * r, g):
        part = part.sum(tuple(range(x.ndim - len(shape))))
        found.append(part.sum(tuple(d for d, n in enumerate(shape) if n == 1), keepdims=True))
    return tuple(found)


row("normalize", Op.registry["normalize"], numpy_normalize, normalized, (0, 1, 2), loose=5)
row("normalize_gradients", Op.registry["normalize_gradients"], numpy_normalize_gradients, normalized_back, (), loose=10)

# What is composed of these and of the operations of 02.


def transposed_cases(rng: Generator) -> Iterator[Case]:
    for x, weight, groups, geometry in CONVOLUTIONS[:3]:
        g = normal(rng, out_shape(x, weight, geometry))
        extra = tuple(
            n + 2 * p - d * (k - 1) - 1 - (o - 1) * s
            for n, k, o, s, p, d in zip(x[2:], weight[2:], g.shape[2:], *geometry.values(), strict=True)
        )
        bias = normal(rng, (x[1],))
        yield case(g, normal(rng, weight), bias, output_padding=extra, groups=groups, **geometry)


def numpy_transposed(
    g: np.ndarray, weight: np.ndarray, bias: np.ndarray, output_padding: tuple, groups: int, **geometry: Any
) -> np.ndarray:
    lengths = zip(g.shape[2:], weight.shape[2:], output_padding, *geometry.values(), strict=True)
    size = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + e for n, k, e, s, p, d in lengths]
    shape = (len(g), weight.shape[1] * groups, *size)
    return numpy_conv_input(g, weight, shape, groups, **geometry) + bias[:, None, None]


row(
    "conv_transpose2d",
    F.conv_transpose2d,
    numpy_transposed,
    transposed_cases,
    (0, 1, 2),
    bad=[
        bad(
            lambda: F.conv_transpose2d(t.ones(1, 3, 8, 8), t.ones(4, 1, 3, 3)),
            ValueError,
            "conv_transpose2d: input has 3 channels, but the weight takes 4",
        ),
        bad(
            lambda: F.conv_transpose2d(t.ones(1, 4, 8, 8), t.ones(4, 1, 3, 3), stride=2, output_padding=2),
            ValueError,
            r"output_padding must be smaller than stride or dilation, got output_padding \(2, 2\)",
        ),
        bad(
            lambda: F.conv_transpose2d(t.ones(1, 4, 1, 8), t.ones(4, 1, 3, 3), padding=2),
            ValueError,
            r"a padding of \(2, 2\) leaves nothing of a result of -1x6",
        ),
    ],
    loose=5,
)


def numpy_adaptive(x: np.ndarray, output_size: tuple) -> np.ndarray:
    out = np.zeros((*x.shape[:-2], *output_size))
    for i, j in np.ndindex(*output_size):
        (top, bottom), (left, right) = (
            (math.floor(k * n / m), math.ceil((k + 1) * n / m))
            for k, n, m in zip((i, j), x.shape[-2:], output_size, strict=True)
        )
        out[..., i, j] = x[..., top:bottom, left:right].mean((-2, -1))
    return out


row(
    "adaptive_avg_pool2d",
    F.adaptive_avg_pool2d,
    numpy_adaptive,
    with_attributes(
        ((2, 5, 4), (1, 2, 3, 3), (1, 2, 4, 2)),
        ({"output_size": (3, 3)}, {"output_size": (1, 1)}, {"output_size": (2, 5)}),
    ),
    bad=[
        bad(lambda: F.adaptive_avg_pool2d(t.ones(2, 2), 1), ValueError, r"adaptive_avg_pool2d: expected an input"),
        bad(lambda: F.adaptive_avg_pool2d(t.ones(1, 2, 2), 0), ValueError, "output_size must be a whole number >= 1"),
    ],
)


def numpy_interpolate(x: np.ndarray, size: tuple, mode: str, align_corners: bool | None = None) -> np.ndarray:
    out = np.zeros((*x.shape[:2], *size))
    for place in np.ndindex(*size):
        shares = []
        for i, n, m in zip(place, x.shape[2:], size, strict=True):
            if mode == "nearest":
                shares.append(np.eye(n)[i * n // m])
                continue
            at = i * (n - 1) / max(m - 1, 1) if align_corners else min(max((i + 0.5) * n / m - 0.5, 0), n - 1)
            low = math.floor(at)
            shares.append(np.eye(n)[low] * (1 - at + low) + np.eye(n)[min(low + 1, n - 1)] * (at - low))
        out[..., place[0], place[1]] = np.einsum("ncij,i,j->nc", x, *shares)
    return out


row(
    "interpolate",
    F.interpolate,
    numpy_interpolate,
    with_attributes(
        ((1, 2, 2, 3), (1, 1, 3, 2), (1, 2, 3, 3), (1, 1, 2, 4)),
        (
            {"size": (4, 9), "mode": "nearest"},
            {"size": (2, 5), "mode": "nearest"},
            {"size": (5, 2), "mode": "bilinear"},
            {"size": (3, 6), "mode": "bilinear", "align_corners": True},
        ),
    ),
    bad=[
        bad(
            lambda: F.interpolate(t.ones(1, 1, 2, 2), 4, 2.0), ValueError, "either size or scale_factor, got 4 and 2.0"
        ),
        bad(lambda: F.interpolate(t.ones(1, 1, 2, 2), 4, mode="bicubic"), ValueError, "mode must be one of"),
        bad(lambda: F.interpolate(t.ones(1, 1, 2, 2), 4, align_corners=True), ValueError, "align_corners is for mode"),
        bad(lambda: F.interpolate(t.ones(1, 1, 2, 2), scale_factor=0.3), ValueError, "scale_factor 0.3 leaves nothing"),
        bad(lambda: F.interpolate(t.ones(2, 2), 4), ValueError, r"expected an input \(N, C, L\) or \(N, C, H, W\)"),
    ],
)


def grids(rng: Generator) -> Iterator[Case]:
    for padding_mode in ("zeros", "border"):
        pixels = rng.integers(-2, 5, (1, 2, 3, 2)) + rng.uniform(0.2, 0.8, (1, 2, 3, 2))  # between two, away from both
        yield case(normal(rng, (1, 2, 4, 3)), (2 * pixels + 1) / np.array([3, 4]) - 1, padding_mode=padding_mode)


def numpy_grid_sample(x: np.ndarray, grid: np.ndarray, padding_mode: str) -> np.ndarray:
    out = np.zeros((len(x), x.shape[1], *grid.shape[1:3]))
    height, width = x.shape[2:]
    for n, i, j in np.ndindex(*grid.shape[:3]):
        column, line = ((g + 1) * m / 2 - 0.5 for g, m in zip(grid[n, i, j], (width, height), strict=True))
        if padding_mode == "border":
            column, line = min(max(column, 0), width - 1), min(max(line, 0), height - 1)
        for v in range(height):
            for u in range(width):
                out[n, :, i, j] += x[n, :, v, u] * max(0, 1 - abs(column - u)) * max(0, 1 - abs(line - v))
    return out


row(
    "grid_sample",
    F.grid_sample,
    numpy_grid_sample,
    grids,
    (0, 1),
    bad=[
        bad(
            lambda: F.grid_sample(t.ones(1, 1, 2, 2), t.ones(2, 2, 2, 2)), ValueError, "grid_sample: expected an input"
        ),
        bad(
            lambda: F.grid_sample(t.ones(1, 1, 2, 2), t.ones(1, 2, 2, 2), "cubic"), ValueError, "mode must be bilinear"
        ),
        bad(
            lambda: F.grid_sample(t.ones(1, 1, 2, 2), t.ones(1, 2, 2, 2), padding_mode="wrap"),
            ValueError,
            "padding_mode must be zeros, border or reflection, got 'wrap'",
        ),
        bad(
            lambda: F.grid_sample(t.ones(1, 1, 2, 2), t.ones(1, 2, 2, 2, dtype="float64")),
            TypeError,
            "grid_sample: input is float32, but the grid is float64",
        ),
    ],
    loose=10,
)
row(
    "group_norm",
    lambda x, w, b: F.group_norm(x, 2, w, b),
    lambda x, w, b: (
        numpy_normalize(x.reshape(len(x), 2, -1), dims=(2,), eps=1e-5)[0].reshape(x.shape) * w[:, None] + b[:, None]
    ),
    lambda rng: iter([case(normal(rng, (2, 6, 2)), normal(rng, (6,)), normal(rng, (6,)))]),
    (0, 1, 2),
    bad=[
        bad(lambda: F.group_norm(t.ones(1, 3, 2), 2), ValueError, r"group_norm: num_groups must divide the channels"),
        bad(lambda: F.group_norm(t.ones(1, 4), 4), ValueError, "group_norm: expected more than one value a group"),
        bad(lambda: F.group_norm(t.ones(2, 4), 2, t.ones(3)), ValueError, r"4 channels, but weight has shape \(3,\)"),
    ],
    loose=5,
)
row(
    "pixel_shuffle",
    F.pixel_shuffle,
    lambda x, upscale_factor: np.block([[[x[..., 0, :, :], x[..., 1, :, :]], [x[..., 2, :, :], x[..., 3, :, :]]]])[
        ..., [0, 2, 1, 3] if x.shape[-2] == 2 else slice(None), :
    ][..., [0, 2, 1, 3]],
    with_attributes(((4, 2, 2),), ({"upscale_factor": 2},)),
    bad=[bad(lambda: F.pixel_shuffle(t.ones(3, 2, 2), 2), ValueError, "with a multiple of 4 channels, got")],
)

# -- 12 embeddings -----------------------------------------------------------------------------------------------------

IDS = ((), (3,), (2, 2), (0,), (2, 0))  # shapes of ids


def lookups(rng: Generator) -> Iterator[Case]:
    for i, shape in enumerate(IDS):
        ids = np.asarray(rng.integers(0, 4, shape), ("int64", "int32", "uint8")[i % 3])
        yield case(ids, normal(rng, (4, 1 + i % 3)))


def numpy_add_rows(
    g: np.ndarray, ids: np.ndarray, rows: int, padding_idx: int | None = None, scale_grad_by_freq: bool = False
) -> np.ndarray:
    """One row after the other."""
    out = np.zeros((rows, g.shape[-1]))
    for i, row in zip(ids.reshape(-1), g.reshape(-1, g.shape[-1]), strict=True):
        out[i] += (i != padding_idx) * row / (np.sum(ids == i) if scale_grad_by_freq else 1)
    return out


def added_rows(rng: Generator) -> Iterator[Case]:
    for i, shape in enumerate(IDS):
        yield case(normal(rng, (*shape, 1 + i % 2)), rng.integers(0, 3, shape), rows=3)
    for count in (1, 7, 8, 9):  # runs of every length up to 9
        yield case(normal(rng, (count, 1)), np.full(count, 1, "int32"), rows=2)
    ids = np.array([2, 0, 2, 2, 1, 0, 2])
    for padding_idx, scaled in ((2, False), (None, True), (0, True)):
        yield case(normal(rng, (7, 2)), ids, rows=4, padding_idx=padding_idx, scale_grad_by_freq=scaled)


def numpy_rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin


def rotations(rng: Generator) -> Iterator[Case]:
    for x, table in (((3, 4), (3, 4)), ((2, 2, 2, 2), (2, 2)), ((2, 2, 3, 2), (2, 1, 3, 2)), ((1, 4), (3, 4)),
                     ((2, 0, 2), (0, 2)), ((4,), (4,))):  # fmt: skip
        yield case(normal(rng, x), normal(rng, table), normal(rng, table))


def bad_look_up(error: type[Exception], words: str, ids: Any, *shape: int, **attributes: Any) -> Bad:
    """A look-up in a weight of ones of a shape."""
    return bad(lambda: F.embedding(ids(), t.ones(*shape), **attributes), error, f"^embedding: {words}")


row(
    "embedding_lookup",
    F.embedding,
    lambda ids, weight: weight[ids],
    lookups,
    (1,),
    bad=[
        bad_look_up(IndexError, "index 70 is out of range for 65 rows$", lambda: t.tensor([3, 70, -1]), 65, 2),
        bad_look_up(IndexError, "index -1 is out of range", lambda: t.tensor([[3], [-1]]), 65, 2),
        bad_look_up(IndexError, "index 0 is out of range for 0 rows", lambda: t.tensor(0), 0, 2),
        bad_look_up(TypeError, r"ids must be integers, got float32 \(2,\); ids.to\('int64'\)", lambda: t.ones(2), 3, 2),
        bad_look_up(TypeError, "ids must be integers, got bool", lambda: t.ones(2) > 0, 3, 2),
        bad_look_up(TypeError, "ids must be a tensor of integers, got list; tensor", lambda: [0, 1], 3, 2),
        bad_look_up(ValueError, r"expected a weight \(rows, features\), got \(3,\)", lambda: t.tensor(0), 3),
        bad_look_up(ValueError, "padding_idx must be one of the 3 rows", lambda: t.tensor(0), 3, 1, padding_idx=3),
        bad_look_up(ValueError, "padding_idx must be .*, got -4", lambda: t.tensor(0), 3, 2, padding_idx=-4),
    ],
)


def turned(*shapes: tuple) -> Any:
    return Op.registry["rotate"](*(t.ones(*shape) for shape in shapes))


row("embedding_weight_gradient", Op.registry["embedding_weight_gradient"], numpy_add_rows, added_rows)
row(
    "rotate",
    Op.registry["rotate"],
    numpy_rotate,
    rotations,
    (0, 1, 2),
    bad=[
        bad(lambda: turned((2, 3), (2, 3), (2, 3)), ValueError, r"rotate: expected .* D even, got x \(2, 3\)"),
        bad(lambda: turned((2, 4), (2, 2), (2, 2)), ValueError, r"cos \(2, 2\)"),
        bad(lambda: turned((2, 4), (2, 4), (4,)), ValueError, r"sin \(4,\)"),
        bad(lambda: turned((3, 4), (2, 4), (2, 4)), ValueError, "^rotate: "),
    ],
)


def raw_embedding_bag(weight: Any, shares: Any = None, *, ids: Any, offsets: Any = None, **attributes: Any) -> Any:
    from tinytorch.m12_embeddings_appendix import embedding_bag

    return embedding_bag(ids, weight, offsets, per_sample_weights=shares, **attributes)


def numpy_embedding_bag(
    weight: np.ndarray, shares: Any = None, *, ids: np.ndarray, offsets: Any = None, mode: str = "mean",
    padding_idx: int | None = None,
) -> np.ndarray:  # fmt: skip
    rows = weight[ids] if shares is None else weight[ids] * shares[..., None]
    parts = zip(ids, rows, strict=True) if offsets is None else zip(
        np.split(ids, offsets[1:]), np.split(rows, offsets[1:]), strict=True
    )  # fmt: skip
    kept = [part[i != padding_idx] if padding_idx is not None else part for i, part in parts]
    reduce = getattr(np, mode)
    return np.stack([reduce(part, axis=0) if len(part) else np.zeros(weight.shape[1]) for part in kept])


def bags(rng: Generator) -> Iterator[Case]:
    ids, flat, offsets = np.array([[0, 2], [1, 1], [2, 0]]), np.array([1, 1, 0, 2, 1]), np.array([0, 2, 2, 3])
    for mode in ("sum", "mean", "max"):
        yield case(distinct(rng, (3, 2)), ids=ids, mode=mode)
        yield case(distinct(rng, (3, 1)), ids=flat, offsets=offsets, mode=mode)
        yield case(distinct(rng, (3, 2)), ids=flat, offsets=offsets, mode=mode, padding_idx=1)
    yield case(normal(rng, (3, 2)), normal(rng, (3, 2)), ids=ids, mode="sum")
    yield case(normal(rng, (3, 1)), normal(rng, (5,)), ids=flat, offsets=offsets, mode="sum", padding_idx=0)


def bad_bag(words: str, *inputs: Any, error: type[Exception] = ValueError, **attributes: Any) -> Bad:
    """A call with ids and offsets as lists, or a weight of 3 rows and what else is given."""

    def call() -> Any:
        ids, offsets = (None if x is None else t.tensor(x, dtype="int64") for x in (*inputs, None)[:2])
        return raw_embedding_bag(t.ones(3, 2), ids=ids, offsets=offsets, **attributes)

    return bad(call, error, f"embedding_bag: {words}")


row(
    "embedding_bag",
    raw_embedding_bag,
    numpy_embedding_bag,
    bags,
    (0, 1),
    bad=[
        bad_bag(r"mode must be one of \('sum', 'mean', 'max'\), got 'min'", [[0]], mode="min"),
        bad_bag("index 3 is out of range for 3 rows", [[0, 3]], error=IndexError),
        bad_bag(r"expected ids \(bags, L\), or \(n,\) with offsets, got \(\)", 0),
        bad_bag(r"each row of ids \(1, 2\) is a bag", [[0, 1]], [0]),
        bad_bag(r"ids \(2,\) need offsets \(bags,\) of integers, got None", [0, 1]),
        bad_bag(r"offsets must rise from 0 to at most 2, got \[1\]", [0, 1], [1]),
        bad_bag(r"offsets must rise from 0 to at most 2, got \[0, 3\]", [0, 1], [0, 3]),
        bad_bag(r"offsets must rise from 0 to at most 2, got \[0, 2, 1\]", [0, 1], [0, 2, 1]),
        bad_bag("with include_last_offset, offsets end with 2", [0, 1], [0, 1], include_last_offset=True),
        bad_bag("2 ids are in no bag", [0, 1], []),
        bad_bag("scale_grad_by_freq is for the modes 'sum' and 'mean'", [[0]], mode="max", scale_grad_by_freq=True),
        bad_bag("padding_idx must be one of the 3 rows, got 5", [[0]], padding_idx=5),
        bad(
            lambda: raw_embedding_bag(t.ones(3, 2), t.ones(1, 2), ids=t.tensor([[0, 1]]), mode="mean"),
            ValueError,
            r"expected per_sample_weights float32 \(1, 2\) and mode 'sum', got float32 \(1, 2\), 'mean'",
        ),
        bad(
            lambda: raw_embedding_bag(t.ones(3, 2), t.ones(2), ids=t.tensor([[0, 1]]), mode="sum"),
            ValueError,
            r"got float32 \(2,\), 'sum'",
        ),
        bad(lambda: raw_embedding_bag(t.ones(3), ids=t.tensor([[0]])), ValueError, r"a weight \(rows, features"),
    ],
)

# -- 13 attention, 14 transformers -------------------------------------------------------------------------------------


def numpy_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: Any = None, *, is_causal: bool = False,
    scale: float | None = None,
) -> tuple:  # fmt: skip
    """One query after the other."""
    lead = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    queries, keys = query.shape[-2], key.shape[-2]
    query, key, value = (np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (query, key, value))
    added = np.zeros((*lead, queries, keys))
    if mask is not None:
        added = added + (np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask)
    out, largest = np.zeros((*lead, queries, value.shape[-1])), np.zeros((*lead, queries, 1))
    sums = np.ones((*lead, queries, 1))
    for place in np.ndindex(*lead, queries):
        *b, q = place
        scores = [
            sum(query[(*b, q)] * key[(*b, k)]) * (query.shape[-1] ** -0.5 if scale is None else scale)
            + (-np.inf if is_causal and k > q else added[(*b, q, k)])
            for k in range(keys)
        ]
        seen = [k for k in range(keys) if scores[k] > -np.inf]
        if seen:
            total = sum(np.exp(scores[k]) for k in seen)
            out[place] = sum(np.exp(scores[k]) / total * value[(*b, k)] for k in seen)
            largest[place] = max(scores)
            sums[place] = total / np.exp(max(scores))
    return out, largest, sums


def attended(rng: Generator) -> Iterator[Case]:
    def inputs(lead: tuple, queries: int, keys: int, features: int = 2) -> list[np.ndarray]:
        return [normal(rng, (*lead, n, d)) for n, d in ((queries, 2), (keys, 2), (keys, features))]

    yield case(*inputs((), 3, 3))
    yield case(*inputs((2,), 2, 3, 1), None, scale=0.3)
    yield case(*inputs((2,), 3, 2), None, is_causal=True)
    yield case(*inputs((), 2, 4), None, is_causal=True)
    yield case(*inputs((2, 1), 2, 3), normal(rng, (2, 3)))
    yield case(*inputs((2,), 2, 3), normal(rng, (2, 1, 3)), is_causal=True)
    yield case(*inputs((), 3, 3), np.array([[True, False, True], [False, True, True], [True, True, True]]))
    yield case(normal(rng, (2, 1, 2, 2)), normal(rng, (3, 2, 2)), normal(rng, (3, 2, 1)))  # leading axes broadcast
    yield case(normal(rng, (0, 2, 2)), normal(rng, (0, 3, 2)), normal(rng, (0, 3, 2)))
    yield case(normal(rng, (2, 0, 2)), normal(rng, (3, 2)), normal(rng, (3, 1)))
    yield case(normal(rng, (2, 3, 2)), normal(rng, (2, 0, 2)), normal(rng, (2, 0, 1)))


def attended_back(rng: Generator) -> Iterator[Case]:
    for i, (inputs, attributes) in enumerate(attended(rng)):
        mask = inputs[3] if len(inputs) > 3 else None
        out, *kept = numpy_attention(*inputs, **attributes)
        wanted = {"mask_gradient": True} if mask is not None and mask.dtype != bool else {}
        if i not in (7, 9):  # there the result has the broadcast shape, and the sum over it is the engine's
            yield case(normal(rng, out.shape), *inputs[:3], mask, out, *kept, **attributes, **wanted)


def numpy_attention_gradients(
    g: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: Any, *kept: np.ndarray,
    is_causal: bool = False, scale: float | None = None, mask_gradient: bool = False,
) -> tuple:  # fmt: skip
    """By the derivative of the softmax as a matrix, row by row."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = np.einsum("...td,...sd->...ts", query, key) * scale
    hidden = np.triu(np.ones(scores.shape[-2:], bool), k=1) if is_causal else np.zeros(scores.shape[-2:], bool)
    if mask is not None:
        hidden = hidden | ~mask if mask.dtype == bool else hidden
        scores = scores if mask.dtype == bool else scores + mask
    weights = np.exp(scores - scores.max(initial=-1e9)) * ~hidden
    weights = weights / weights.sum(-1, keepdims=True)
    jacobian = np.einsum("...ts,su->...tsu", weights, np.eye(weights.shape[-1])) - np.einsum(
        "...ts,...tu->...tsu", weights, weights
    )
    slopes = np.einsum("...te,...se,...tsu->...tu", g, value, jacobian)
    found = [
        np.einsum("...ts,...sd->...td", slopes, key) * scale,
        np.einsum("...ts,...td->...sd", slopes, query) * scale,
        np.einsum("...ts,...te->...se", weights, g),
    ]
    return (*found, slopes) if mask_gradient else tuple(found)


row(
    "attention",
    Op.registry["attention"],
    numpy_attention,
    attended,
    (0, 1, 2, 3),
    bad=[
        bad(lambda: F.scaled_dot_product_attention(t.ones(2), t.ones(2), t.ones(2)), ValueError, "attention: expected"),
        bad(lambda: Op.registry["attention"](t.ones(2, 0), t.ones(2, 0), t.ones(2, 2)), ValueError, "D above 0"),
        bad(lambda: Op.registry["attention"](t.ones(2, 2), t.ones(2, 3), t.ones(2, 3)), ValueError, "2 features, but"),
        bad(lambda: Op.registry["attention"](t.ones(2, 2), t.ones(3, 2), t.ones(2, 2)), ValueError, "3 keys, but 2"),
        bad(
            lambda: Op.registry["attention"](t.ones(2, 2), t.ones(2, 2), t.ones(2, 2, dtype="float64")),
            TypeError,
            "floats of one dtype, got float32, float64",
        ),
        bad(
            lambda: Op.registry["attention"](t.ones(2, 2), t.ones(3, 2), t.ones(3, 2), t.ones(3, 3)),
            ValueError,
            r"the mask must broadcast to \(…, 2, 3\)",
        ),
        bad(
            lambda: Op.registry["attention"](t.ones(2, 2), t.ones(3, 2), t.ones(3, 2), t.ones(2, 3, dtype="int64")),
            TypeError,
            "a mask is of booleans .* got int64",
        ),
    ],
    loose=5,
)
row("attention_gradients", Op.registry["attention_gradients"], numpy_attention_gradients, attended_back, (), loose=20)


def numpy_cached_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, lengths: np.ndarray, *, scale: float | None = None
) -> np.ndarray:
    """One head of one sequence after the other, of only what is filled."""
    out, each = np.zeros((*query.shape[:2], value.shape[-1])), query.shape[1] // key.shape[1]
    for b, h in np.ndindex(*query.shape[:2]):
        n, shared = lengths[b], h // each
        out[b, h] = numpy_attention(query[b, h : h + 1], key[b, shared, :n], value[b, shared, :n], scale=scale)[0][0]
    return out


def cached(rng: Generator) -> Iterator[Case]:
    for batch, heads, groups, capacity, width in ((2, 4, 2, 3, 2), (3, 2, 2, 4, 1), (1, 3, 1, 1, 2), (0, 2, 1, 3, 2)):
        query, lengths = normal(rng, (batch, heads, 2)), np.arange(batch) % (capacity + 1) + (batch == 1)
        key, value = (normal(rng, (batch, groups, capacity, n)) for n in (2, width))
        yield case(query, key, value, lengths)
        yield case(query, key, value, lengths.astype("int32"), scale=0.3)


def cache(query: tuple = (2, 4, 3), key: tuple = (2, 2, 5, 3), lengths: Any = (1, 2)) -> Any:
    return Op.registry["cached_attention"](t.ones(*query), t.ones(*key), t.ones(2, 2, 5, 1), t.tensor(lengths))


row(
    "cached_attention",
    Op.registry["cached_attention"],
    numpy_cached_attention,
    cached,
    (0, 1, 2),
    bad=[
        bad(lambda: cache(query=(2, 3, 3)), ValueError, r"H a multiple of G; got {'queries': \(2, 3, 3\)"),
        bad(lambda: cache(key=(2, 2, 5, 4)), ValueError, r"'keys': \(2, 2, 5, 4\)"),
        bad(lambda: cache(lengths=(1, 2, 3)), ValueError, r"'lengths': \(3,\)"),
        bad(lambda: cache(lengths=(1.0, 2.0)), ValueError, "integers"),
        bad(lambda: cache(lengths=(1, 6)), ValueError, "lengths must be between 0 and 5, got .*1, *6|got .*1 6"),
        bad(lambda: cache(lengths=(-1, 5)), ValueError, "lengths must be between 0 and 5, got .*-1"),
    ],
    loose=5,
)
row(
    "scaled_dot_product_attention",
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    lambda q, k, v: numpy_attention(q, np.repeat(k, 2, -3), np.repeat(v, 2, -3), is_causal=True)[0],
    lambda rng: iter([case(normal(rng, (2, 4, 2, 2)), normal(rng, (2, 2, 2, 2)), normal(rng, (2, 2, 2, 1)))]),
    (0, 1, 2),
    bad=[
        bad(
            lambda: F.scaled_dot_product_attention(t.ones(3, 2, 2), t.ones(2, 2, 2), t.ones(2, 2, 2), enable_gqa=True),
            ValueError,
            "3 query heads cannot share 2 heads of keys",
        )
    ],
    loose=5,
)
row(
    "layer_norm",
    lambda x, w=None, b=None: F.layer_norm(x, x.shape[1:], w, b),
    lambda x, w=None, b=None: numpy_normalize(x, w, b, dims=tuple(range(1, x.ndim)), eps=1e-5)[0],
    lambda rng: iter(
        [
            case(normal(rng, (2, 3)), normal(rng, (3,)), normal(rng, (3,))),
            case(normal(rng, (2, 2, 3)), normal(rng, (2, 3)), normal(rng, (2, 3))),
            case(normal(rng, (2, 4))),
        ]
    ),
    (0, 1, 2),
    bad=[
        bad(lambda: F.layer_norm(t.ones(2, 3), (2,)), ValueError, r"last axes are \(2,\), got float32 \(2, 3\)"),
        bad(lambda: F.layer_norm(t.ones(2, 3), ()), ValueError, "layer_norm: expected floats"),
        bad(lambda: F.layer_norm(t.ones(2, 3), (3,), t.ones(2)), ValueError, r"shape \(3,\), got \(2,\)"),
    ],
    loose=10,
)
row(
    "rms_norm",
    lambda x, w=None: F.rms_norm(x, x.shape[-1:], w, eps=0.1),
    lambda x, w=None: x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.1) * (1 if w is None else w),
    lambda rng: iter([case(normal(rng, (2, 2, 3)), normal(rng, (3,))), case(normal(rng, (4,)))]),
    (0, 1),
    bad=[bad(lambda: F.rms_norm(t.ones(2, 3), (4,)), ValueError, r"rms_norm: expected floats whose last axes are")],
    loose=5,
)


# -- quantization ------------------------------------------------------------------------------------------------------


def along(values: Any, x: np.ndarray, dim: int | None) -> Any:
    return values if dim is None else np.reshape(values, [-1 if d == dim % x.ndim else 1 for d in range(x.ndim)])


def numpy_quantize(
    x: np.ndarray, scale: Any, zero: Any, *, dim: int | None = None, low: int = -128, high: int = 127
) -> np.ndarray:
    return np.clip(np.rint(x / along(scale, x, dim)) + along(zero, x, dim), low, high)


def numpy_dequantize(q: np.ndarray, scale: Any, zero: Any, *, dim: int | None = None) -> np.ndarray:
    return along(scale, q, dim) * (q - along(np.asarray(zero, "float64"), q, dim))


def numpy_choose_scale(low: np.ndarray, high: np.ndarray, *, symmetric: bool = False) -> tuple:
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if symmetric:
        return np.maximum(np.maximum(-low, high) / 127, 2.0**-23), np.zeros(low.shape)
    scale = np.maximum((high - low) / 255, 2.0**-23)
    return scale, np.clip(-128 - np.rint(low / scale), -128, 127)


def steps(rng: Generator) -> Iterator[Case]:
    zeros = rng.integers(-20, 20, 3).astype("int32")
    yield case(normal(rng, (2, 5)), np.array(0.03), np.array(5, "int32"))
    yield case(normal(rng, (3, 2)), np.abs(normal(rng, (3,))) / 30, zeros, dim=0)
    yield case(normal(rng, (2, 3, 2)) * 9, np.abs(normal(rng, (3,))) / 30, zeros, dim=-2, low=-7, high=8)
    yield case(normal(rng, (0, 3)), np.array(0.5), np.array(0, "int32"))


def bytes_of(rng: Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape).astype("int8")


def whole_steps(rng: Generator) -> Iterator[Case]:
    for inputs, attributes in steps(rng):
        kept = {"dim": attributes["dim"]} if "dim" in attributes else {}
        yield case(bytes_of(rng, *inputs[0].shape), *inputs[1:], **kept)


QUANTIZE, CHOOSE = Op.registry["quantize"], Op.registry["choose_scale"]
row(
    "choose_scale",
    lambda low, high, **options: (lambda scale, zero: (scale, zero.to(scale.dtype)))(*CHOOSE(low, high, **options)),
    numpy_choose_scale,
    lambda rng: iter(
        case(normal(rng, (4,)) - shift, normal(rng, (4,)) + shift, symmetric=symmetric)
        for shift in (0, 3)
        for symmetric in (False, True)
    ),
    (),
)
row("quantize", QUANTIZE, numpy_quantize, steps, (), "int8", bad=[
    bad(lambda: QUANTIZE(t.ones(2, 3), t.ones(2), t.zeros(2)), ValueError, r"got dim=None and the shape \(2,\)"),
    bad(lambda: QUANTIZE(t.ones(2, 3), t.ones(2, 1), 0, dim=0), ValueError, r"got dim=0 and the shape \(2, 1\)"),
])  # fmt: skip
row("dequantize", Op.registry["dequantize"], numpy_dequantize, whole_steps, ())
row(
    "fake_quantize",  # its rule is not the slope of a staircase: tests/reference has its gradient
    Op.registry["fake_quantize"],
    lambda x, scale, zero, dim=None, **ends: numpy_dequantize(
        numpy_quantize(x, scale, zero, dim=dim, **ends), scale, zero, dim=dim
    ),
    steps,
    (),
)
row(
    "in_range",
    Op.registry["in_range"],
    lambda x, scale, zero, dim=None, low=-128, high=127: (
        np.abs(numpy_quantize(x, scale, zero, dim=dim, low=-1e9, high=1e9) - (low + high) / 2) <= (high - low) / 2
    ),
    steps,
    (),
)


def numpy_rows(x: np.ndarray) -> tuple:
    scale = np.max(np.abs(x), axis=-1, initial=0) / 127
    return np.rint(x / np.where(scale == 0, 1, scale)[..., None]), scale


row(
    "quantize_rows",
    lambda x: (lambda q, scale: (q.to(scale.dtype), scale))(*Op.registry["quantize_rows"](x)),
    numpy_rows,
    lambda rng: iter([case(normal(rng, (3, 4))), case(normal(rng, (2, 1, 5)) * 0), case(normal(rng, (6,)))]),
    (),
)


def numpy_finish(sums: np.ndarray, factor: Any, bias: Any, relu: bool, scale: Any, zero: Any) -> np.ndarray:
    out = sums * factor + (0 if bias is None else bias)
    out = np.maximum(out, 0) if relu else out
    return out if scale is None else numpy_quantize(out, scale, zero)


def numpy_int8_linear(
    x: Any, x_scale: Any, zero: Any, weight: Any, scales: Any, bias: Any = None, scale: Any = None, z: Any = None,
    relu: bool = False,
) -> np.ndarray:  # fmt: skip
    x_scale, zero = np.asarray(x_scale)[..., None], np.asarray(zero, "float64")[..., None]
    return numpy_finish((x - zero) @ weight.T.astype("float64"), x_scale * scales, bias, relu, scale, z)


def numpy_int8_convolution(
    x: Any, x_scale: Any, zero: Any, weight: Any, scales: Any, bias: Any = None, scale: Any = None, z: Any = None,
    relu: bool = False, **geometry: Any,
) -> np.ndarray:  # fmt: skip
    sums = numpy_conv2d(x - np.float64(zero), weight.astype("float64"), **geometry)
    column = lambda values: None if values is None else np.reshape(values, (-1, 1, 1))
    return numpy_finish(sums, x_scale * column(scales), column(bias), relu, scale, z)


def int8_layers(rng: Generator) -> Iterator[Case]:
    one, zero, scales = np.array(0.02), np.array(3, "int32"), np.abs(normal(rng, (4,)))
    out = np.array(3.0), np.array(-5, "int32")
    yield case(bytes_of(rng, 2, 3), one, zero, bytes_of(rng, 4, 3), scales)
    yield case(bytes_of(rng, 3), one, zero, bytes_of(rng, 4, 3), scales, normal(rng, (4,)), relu=True)
    yield case(bytes_of(rng, 2, 3), one, zero, bytes_of(rng, 4, 3), scales, normal(rng, (4,)), *out, relu=True)
    rows = np.abs(normal(rng, (2, 5))), rng.integers(-9, 9, (2, 5)).astype("int32")
    yield case(bytes_of(rng, 2, 5, 3), *rows, bytes_of(rng, 4, 3), scales, None, *out)


def int8_pictures(rng: Generator) -> Iterator[Case]:
    one, zero, scales = np.array(0.02), np.array(3, "int32"), np.abs(normal(rng, (4,)))
    for shape, size, groups, geometry in CONVOLUTIONS:
        if groups == 1:
            x, weight, few = bytes_of(rng, *shape), bytes_of(rng, *size), scales[: size[0]]
            yield case(x, one, zero, weight, few, **geometry)
            bias = normal(rng, few.shape)
            yield case(x, one, zero, weight, few, bias, np.array(3.0), zero, relu=True, **geometry)


def as_floats(call: Callable) -> Callable:
    """The operation, with what it rounds as floats."""
    return lambda *inputs, **options: call(*inputs, **options).to(inputs[4].dtype)


def raw_int8_convolution(
    x: Any, x_scale: Any, zero: Any, weight: Any, *others: Any, relu: bool = False, **geometry: Any
) -> Any:
    windows = raw_windows(x.shape, weight.shape[2:], **geometry)
    return Op.registry["int8_convolution"](x, x_scale, zero, weight, *others, windows=windows, relu=relu)


INT8_LINEAR = Op.registry["int8_linear"]


def int8_call(x: t.Tensor, features: int) -> Any:
    return INT8_LINEAR(x, t.tensor(1.0), 0, t.ones(4, features, dtype="int8"), t.ones(4))


row("int8_linear", as_floats(INT8_LINEAR), numpy_int8_linear, int8_layers, (), loose=10, bad=[
    bad(lambda: int8_call(t.ones(2, 3, dtype="int8"), 2), ValueError, "input has 3 features, but the weight takes 2"),
    bad(lambda: int8_call(t.ones(2, 2), 2), TypeError, r"expected int8, got float32; quantize\("),
])  # fmt: skip
row("int8_convolution", as_floats(raw_int8_convolution), numpy_int8_convolution, int8_pictures, (), loose=10)


def numpy_unpack(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    packed = packed.reshape(*scale.shape, -1).astype("float64")
    halves = np.concatenate([packed % 16, packed // 16], -1).reshape(len(packed), -1) - 8
    return halves * np.repeat(scale, halves.shape[1] // scale.shape[1], 1)


def halves(rng: Generator) -> Iterator[Case]:
    for groups, half in ((1, 3), (2, 4)):
        yield case(rng.integers(0, 256, (3, half)).astype("uint8"), normal(rng, (3, groups)))


row("unpack_int4", Op.registry["unpack_int4"], numpy_unpack, halves, ())
row(
    "int4_linear",
    Op.registry["int4_linear"],
    lambda x, weight, scale, bias=None: x @ numpy_unpack(weight, scale).T + (0 if bias is None else bias),
    lambda rng: (
        case(normal(rng, shape), *inputs, *others)
        for (inputs, _), shape, others in zip(halves(rng), ((2, 6), (2, 2, 8)), ((), (normal(rng, (3,)),)), strict=True)
    ),
    (0,),
    bad=[
        bad(
            lambda: Op.registry["int4_linear"](t.ones(2, 5), t.ones(3, 3, dtype="uint8"), t.ones(3, 1)),
            ValueError,
            "int4_linear: input has 5 features, but the weight takes 6",
        )
    ],
    loose=10,
)
