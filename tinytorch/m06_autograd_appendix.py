"""Module 06, appendix: rules for the operations of the appendices, users' own operations, and tools on graphs.

`Function` for operations with a gradient of the user's own, `checkpoint` (compute again instead of keeping),
`detect_anomaly` (which line made the first NaN), `jacobian`, `hessian`, `vjp`, `jvp`, and `draw`, a picture of a graph.
"""

from __future__ import annotations

import builtins
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tinytorch import m02_tensor_appendix as m02
from tinytorch.backends import backend_of, rng_state, set_rng_state
from tinytorch.m01_setup_appendix import new_figure, save_figure
from tinytorch.m02_tensor import (
    Op,
    Tensor,
    div,
    eq,
    exp,
    expand,
    float64,
    getitem,
    log,
    lt,
    maximum,
    observe,
    op,
    randn,
    stack,
    sum,
    unsqueeze,
    where,
    zeros,
)
from tinytorch.m03_activations import elu, gelu_and_cdf, hardtanh, leaky_relu, sigmoid, silu, softplus
from tinytorch.m04_layers import Module
from tinytorch.m05_losses import bernoulli_cross_entropy
from tinytorch.m06_autograd import (
    Leaf,
    Node,
    _tensor,
    extreme_rule,
    grad,
    gradcheck,
    gradient,
    leaf_of,
    mode,
    non_differentiable,
    raw,
    reduced_count,
    set_grad_enabled,
    spread,
    whole,
)

# -- rules: the operations of 02's appendix and the less common activations of 03 --------------------------------------


@op
def scatter_along_dim(xp, g, indices, *, dim, shape):
    """Zeros of a shape, with g added at the indices along `dim`: what `take_along_dim` does, backwards."""
    if tuple(g.shape) != tuple(indices.shape):
        g, indices = xp.broadcast_arrays(g, indices)
    places = list(xp.meshgrid(*(xp.arange(n) for n in indices.shape), indexing="ij"))
    places[dim] = indices
    return xp.scatter_add(xp.zeros(tuple(shape), dtype=g.dtype), tuple(places), g)


def take_rule(g: Any, x_shape: tuple, indices: Any, dim: int) -> Any:
    lead = tuple(n if d == dim % len(x_shape) else g.shape[d] for d, n in enumerate(x_shape))
    return scatter_along_dim(g, indices, dim=dim, shape=lead)


def bernoulli_rule(g: Any, probabilities: Any, targets: Any) -> Any:
    """(p - t) / (p (1 - p)), with a denominator that is never 0."""
    p = probabilities
    return g * (p - targets) / maximum(p * (1 - p), 1e-12)


def bernoulli_target_rule(g: Any, probabilities: Any) -> Any:
    return g * (maximum(log(1 - probabilities), -100.0) - maximum(log(probabilities), -100.0))


def clamp_rule(g: Any, x: Any, min: Any, max: Any) -> Any:
    """To the elements that were kept, the bounds themselves included."""
    if min is not None:
        g = where(x >= min, g, 0)
    return g if max is None else where(x <= max, g, 0)


def var_rule(g: Any, x: Any, dim: Any, correction: float, keepdim: bool) -> Any:
    count = reduced_count(x.shape, dim)
    centred = x - sum(x, dim=dim, keepdim=True) / count
    return spread(g, x.shape, dim, keepdim) * centred * (2 / (count - correction) if count > correction else math.nan)


def prod_rule(g: Any, x: Any, dim: Any, keepdim: bool) -> Any:
    """The product of the others: out / x; where an element is zero, only it gets the product of the rest."""
    is_zero = eq(x, 0)
    others = where(is_zero, 1, x)
    rest = spread(m02.prod(others, dim=dim, keepdim=True), x.shape, dim, True)
    zero_count = spread(sum(is_zero, dim=dim, keepdim=True), x.shape, dim, True)
    only_zero = where(eq(zero_count, 1), where(is_zero, rest, 0), 0)
    return spread(g, x.shape, dim, keepdim) * where(eq(zero_count, 0), rest / others, only_zero)


def logsumexp_rule(g: Any, x: Any, out: Any, dim: Any, keepdim: bool) -> Any:
    out = spread(out, x.shape, dim, keepdim)
    return spread(g, x.shape, dim, keepdim) * exp(where(eq(x, -math.inf), -math.inf, x - out))


def norm_rule(g: Any, x: Any, out: Any, dim: Any, keepdim: bool) -> Any:
    """x / |x|, and 0 at 0."""
    out = spread(out, x.shape, dim, keepdim)
    return spread(g, x.shape, dim, keepdim) * where(eq(out, 0), 0, x / where(eq(out, 0), 1, out))


def roll_rule(g: Any, shifts: Any, dims: Any) -> Any:
    return m02.roll(g, shifts=tuple(-s for s in shifts) if isinstance(shifts, tuple) else -shifts, dims=dims)


def pad_rule(g: Any, x_shape: tuple, pad: tuple) -> Any:
    """The inner part."""
    begins = [0] * (len(x_shape) - len(pad) // 2) + [pad[i] for i in range(len(pad) - 2, -1, -2)]
    return getitem(g, index=tuple(slice(start, start + n) for start, n in zip(begins, x_shape, strict=True)))


def einsum_rule(g: Any, operands: tuple, equation: str, position: int) -> Any:
    """The same sum with the result in the operand's place; letters that only this operand has were summed: repeat."""
    terms, _, result = equation.partition("->")
    parts = terms.split(",")
    shape = tuple(operands[position].shape)
    own = "".join(dict.fromkeys(parts[position]))  # a letter that stands twice takes a diagonal
    others = [part for i, part in enumerate(parts) if i != position]
    present = "".join(c for c in own if c in result or any(c in part for part in others))
    rest = [x for i, x in enumerate(operands) if i != position]
    g = m02.einsum_op(g, *rest, equation=f"{','.join([result, *others])}->{present}")
    for d, c in enumerate(own):
        if c not in present:
            g = unsqueeze(g, d)
    lengths = (shape[parts[position].index(c)] for c in own)
    g = expand(g, shape=tuple(n if have == 1 else have for n, have in zip(lengths, g.shape, strict=True)))
    return g if own == parts[position] else diagonal(g, own, parts[position], shape)


def diagonal(g: Any, letters: str, wanted: str, shape: tuple) -> Any:
    """g with axes `letters` as one with axes `wanted`, where some stand twice: zero off their diagonals."""
    fresh = iter(c for c in "abcdefghijklmnopqrstuvwxyz" if c not in wanted)
    result, terms, unit_matrices = "", [letters], []
    for c, n in zip(wanted, shape, strict=True):
        if c in result:
            terms.append(c + next(fresh))
            unit_matrices.append(backend_of(raw(g)).eye(n, dtype=raw(g).dtype))
            c = terms[-1][1]
        result += c
    return m02.einsum_op(g, *unit_matrices, equation=f"{','.join(terms)}->{result}")


@op
def gelu_gradient(xp, g, x, cdf, *, approximate):
    """g (Φ(x) + x φ(x)), where φ is the derivative of Φ."""
    out = x * x
    if approximate == "none":
        out *= -0.5
        out = xp.exp(out)
        out *= 1 / math.sqrt(2 * math.pi)
    else:  # Φ = (1 + tanh u) / 2, so φ = 2 Φ (1 - Φ) u'
        out *= 3 * 0.044715
        out += 1
        out *= 2 * math.sqrt(2 / math.pi)
        out *= cdf
        out *= 1 - cdf
    out *= x
    out += cdf
    out *= g
    return out


def gelu_rule(g: Any, x: Any, extras: Any, approximate: str) -> Any:
    """By the fused operation; under create_graph, the same in operations that have rules."""
    if extras is not None:
        return gelu_gradient(g, x, *extras, approximate=approximate)
    if approximate == "none":
        density = exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
        return g * ((1 + m02.erf(x * math.sqrt(0.5))) * 0.5 + x * density)
    c = math.sqrt(2 / math.pi)
    t = m02.tanh((x + x * x * x * 0.044715) * c)
    return g * ((1 + t) * 0.5 + x * (1 - t * t) * (1 + x * x * (3 * 0.044715)) * (0.5 * c))


def silu_rule(g: Any, x: Any) -> Any:
    s = sigmoid(x)
    return g * (s * (1 + x * (1 - s)))


def softplus_rule(g: Any, x: Any, beta: float, threshold: float) -> Any:
    return where(x * beta > threshold, g, g * sigmoid(x * beta))


def elu_rule(g: Any, x: Any, alpha: float) -> Any:
    return where(x > 0, g, g * exp(m02.clamp(x, max=0)) * alpha)


# fmt: off
gradient(leaky_relu,      x=lambda g, x, negative_slope: where(x > 0, g, g * negative_slope))
gradient(hardtanh,        x=lambda g, x, min_val, max_val: where((x > min_val) & (x < max_val), g, 0))
gradient(gelu_and_cdf,    x=gelu_rule)
gradient(gelu_gradient)
gradient(silu,            x=silu_rule)
gradient(softplus,        x=softplus_rule)
gradient(elu,             x=elu_rule)
gradient(bernoulli_cross_entropy, probabilities=bernoulli_rule, targets=bernoulli_target_rule)
gradient(m02.index_put,   x=lambda g, index: m02.index_put(g, 0, index=index),
                          value=lambda g, index: getitem(g, index=index))
gradient(m02.overwrite,   x=None,             value=lambda g: g)
gradient(m02.minimum,     a=lambda g, a, b: where(lt(b, a), 0, where(eq(a, b), g / 2, g)),
                          b=lambda g, a, b: where(lt(a, b), 0, where(eq(a, b), g / 2, g)))
gradient(m02.log1p,       x=lambda g, x: g / (1 + x))
gradient(m02.expm1,       x=lambda g, out: g * (out + 1))
gradient(m02.rsqrt,       x=lambda g, out: g * (out * out * out) * -0.5)
gradient(m02.sin,         x=lambda g, x: g * m02.cos(x))
gradient(m02.cos,         x=lambda g, x: -(g * m02.sin(x)))
gradient(m02.erf,         x=lambda g, x: g * (exp(-(x * x)) * (2 / math.sqrt(math.pi))))
gradient(m02.sign,        x=lambda g: g * 0)
gradient(m02.floor,       x=lambda g: g * 0)
gradient(m02.ceil,        x=lambda g: g * 0)
gradient(m02.round,       x=lambda g: g * 0)
gradient(m02.remainder,   a=lambda g: g,      b=lambda g, a, b: -(g * m02.floor(div(a, b))))
gradient(m02.clamp,       x=clamp_rule)
gradient(m02.amin,        x=extreme_rule)
gradient(m02.var,         x=var_rule)
gradient(m02.prod,        x=prod_rule)
gradient(m02.cumsum,      x=lambda g, dim: m02.flip(m02.cumsum(m02.flip(g, dims=(dim,)), dim=dim), dims=(dim,)))
gradient(m02.logsumexp,   x=logsumexp_rule)
gradient(m02.vector_norm, x=norm_rule)
gradient(m02.flip,        x=lambda g, dims: m02.flip(g, dims=dims))
gradient(m02.roll,        x=roll_rule)
gradient(m02.constant_pad, x=pad_rule)
gradient(m02.take_along_dim, x=take_rule)
gradient(scatter_along_dim,  g=lambda g, indices, dim: m02.take_along_dim(g, indices, dim=dim))
gradient(m02.scatter_add, x=lambda g: g,      values=lambda g, indices, dim: m02.take_along_dim(g, indices, dim=dim))
gradient(m02.index_add,   x=lambda g: g,      values=lambda g, index: getitem(g, index=index))
gradient(m02.einsum_op,   operands=einsum_rule)
# fmt: on
non_differentiable(m02.argmin, m02.any, m02.all, m02.isnan, m02.isinf, m02.isfinite)
non_differentiable(m02.floor_divide, m02.nonzero, m02.argsort)

# -- the mode, and checking second derivatives -------------------------------------------------------------------------


def is_grad_enabled() -> bool:
    """Whether operations are being recorded in this thread."""
    return mode.enabled


def gradgradcheck(function: Callable, inputs: Tensor | Sequence[Tensor], **tolerances: float) -> bool:
    """Compare second derivatives with finite differences of first ones."""
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    checked = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
    output = function(*inputs)
    v = randn(output.shape, dtype=float64, device=output.device).requires_grad_()

    def first_derivatives(v: Tensor, *inputs: Any) -> list[Tensor]:
        y = function(*inputs)
        found = grad(y, [inputs[i] for i in checked], v, create_graph=True, allow_unused=True)
        return [g for g in found if g is not None and g.requires_grad]

    return not first_derivatives(v, *inputs) or gradcheck(first_derivatives, (v, *inputs), **tolerances)


# -- hooks, and what modules gain --------------------------------------------------------------------------------------


def retain_grad(self: Tensor) -> None:
    """Keep the gradient of this result in its `grad` too, not only those of leaves."""
    node = weakref.ref(leaf_of(self))
    if isinstance(self._trace, Node):
        self.register_hook(lambda g: setattr(node(), "grad", g))


def register_hook(self: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
    """Have `hook(gradient)` called when this tensor's gradient is known; what it returns, if anything, replaces it."""
    if not self.watched:
        raise RuntimeError("register_hook: this tensor does not require grad, so no gradient will come")
    node = leaf_of(self)
    node.hooks = [*(node.hooks or ()), partial(call_hook, hook)]


def call_hook(hook: Callable, g: Any) -> Any:
    """A hook sees a tensor and may return another in its place."""
    result = hook(g if isinstance(g, Tensor) else Tensor(g))
    return g if result is None else result if isinstance(g, Tensor) else result.clone().data


Tensor.extend(register_hook=register_hook, retain_grad=retain_grad)


def zero_grad(self: Module, set_to_none: bool = True) -> None:
    """Forget the gradients of all parameters, or set them to zero."""
    for parameter in self.parameters():
        if set_to_none:
            parameter.grad = None
        elif parameter.grad is not None:
            parameter.grad.detach().zero_()


def module_requires_grad_(self: Module, requires_grad: bool = True) -> Module:
    """Start, or stop, recording what is computed from this module's parameters."""
    for parameter in self.parameters():
        parameter.requires_grad_(requires_grad)
    return self


Module.extend_class(zero_grad=zero_grad, requires_grad_=module_requires_grad_)

# -- users' own operations ---------------------------------------------------------------------------------------------


class Context:
    """What a `Function`'s forward hands to its backward. Any attribute may be set on it."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self._saved: tuple = ()
        self._constant: tuple = ()
        self.time = 0  # when forward was done; what it saved must not be written to later

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep inputs, outputs or other tensors. Outputs must be kept in this way, or memory would not return."""
        self._saved = tensors

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        """Say that these outputs have no gradient."""
        self._constant = outputs

    @property
    def saved_tensors(self) -> tuple:
        """What `save_for_backward` was given; an error if one was changed in place since."""
        for x in self._saved:
            if x is not None and m02.Writes.since(raw(x[0] if isinstance(x, tuple) else x), self.time):
                raise RuntimeError("a tensor that a Function saved for backward was changed in place since")
        return tuple(_tensor(x[0], x[1]()) if isinstance(x, tuple) else x for x in self._saved)


class Function:
    """An operation with a gradient of the user's own, as in PyTorch.

        class Cube(Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x ** 3

            @staticmethod
            def backward(ctx, g):
                (x,) = ctx.saved_tensors
                return g * 3 * x ** 2

        y = Cube.apply(x)

    `backward` gets a gradient for each output and returns one for each input, None for those without. It works to
    second order if it is made of tensor operations.
    """

    @staticmethod
    def forward(ctx: Context, *inputs: Any) -> Any:
        raise NotImplementedError("a Function needs a static method forward(ctx, *inputs)")

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> Any:
        raise NotImplementedError("a Function needs a static method backward(ctx, *gradients)")

    @classmethod
    def apply(cls, *inputs: Any) -> Any:
        """Run forward, and record it as one operation."""
        tracked = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.watched]
        context = Context(tuple(i in tracked for i in range(len(inputs))))
        with set_grad_enabled(False):
            returned = cls.forward(context, *inputs)
        results = returned if isinstance(returned, tuple) else (returned,)
        if not all(isinstance(y, Tensor) for y in results):
            raise TypeError(f"{cls.__name__}.forward: expected it to return tensors, got {type(returned).__name__}")
        if not (mode.enabled and tracked):
            return returned
        outputs = [Tensor(y.data) for y in results]
        call = _Call(cls, context, [leaf_of(inputs[i]) for i in tracked], tracked, len(inputs), outputs)
        constant = {id(y) for y in context._constant}
        for i, (y, result) in enumerate(zip(outputs, results, strict=True)):
            if id(result) not in constant and y.dtype.is_floating_point:
                y._trace = _Output(call, i, y.data)
        kept = {id(result): _without_cycle(y) for y, result in zip(outputs, results, strict=True)}
        context._saved, context._constant = tuple(kept.get(id(x), x) for x in context._saved), ()
        context.time = next(m02.Writes.clock)
        return tuple(outputs) if isinstance(returned, tuple) else outputs[0]


def _without_cycle(y: Tensor) -> tuple[Any, Callable[[], Any]]:
    """An output as its own call may keep it: its array, and a weak way to its place in the graph."""
    return y.data, weakref.ref(y._trace) if y.watched else lambda: None


class _Call(Node):
    """One call of a Function. Its gradient is a list with an entry for each output."""

    __slots__ = ("context", "count", "function", "outputs", "tracked")

    def __init__(
        self, function: type[Function], context: Context, parents: list, tracked: list, count: int, outputs: list
    ) -> None:
        super().__init__(None, parents, [], outputs[0].data)
        self.shape, self.function, self.context, self.tracked, self.count = None, function, context, tracked, count
        self.outputs = [(backend_of(y.data), y.data.shape, y.data.dtype) for y in outputs]

    @property
    def name(self) -> str:
        return self.function.__name__

    def gradients(self, g: list, create_graph: bool) -> list[tuple[Any, Any]]:
        if self.values is None:
            raise RuntimeError(
                f"backward has been through {self.name} already; to go through a graph twice, say retain_graph=True"
            )
        given = [
            Tensor(xp.zeros(shape, dtype=dtype)) if part is None else part if isinstance(part, Tensor) else Tensor(part)
            for part, (xp, shape, dtype) in zip(g, self.outputs, strict=True)
        ]
        returned = self.function.backward(self.context, *given)
        parts = returned if isinstance(returned, tuple) else (returned,)
        if len(parts) != self.count:
            raise RuntimeError(f"{self.name}.backward: expected {self.count} gradients, one for each input of forward, "
                               f"got {len(parts)}")  # fmt: skip
        chosen = [parts[i] for i in self.tracked]
        return [
            (parent, part if create_graph or part is None else part.detach().clone().data)  # others may hold it
            for parent, part in zip(self.parents, chosen, strict=True)
        ]

    def free(self) -> None:
        super().free()
        self.context = Context(())  # drops what was saved


class _Output(Node):
    """One output of a Function; it hands its gradient to the call, at its own place."""

    __slots__ = ("place",)

    def __init__(self, call: _Call, place: int, array: Any) -> None:
        super().__init__(None, [call], [], array)
        self.place = place

    @property
    def name(self) -> str:
        return self.parents[0].name if self.parents else "function"

    def gradients(self, g: Any, create_graph: bool) -> list[tuple[Any, Any]]:
        if self.values is None:
            raise RuntimeError("backward has been through this graph already; say retain_graph=True the first time")
        call = self.parents[0]
        return [(call, [g if i == self.place else None for i in range(len(call.outputs))])]


# -- computing again instead of keeping --------------------------------------------------------------------------------


def checkpoint(function: Callable, *args: Any, preserve_rng_state: bool = True, **kwargs: Any) -> Any:
    """Call a function without keeping what backward needs; backward computes it again (Chen et al., 2016).

    The graph is recorded as always, so gradients of any order and `grad` work; only the kept arrays are dropped.

    Args:
        preserve_rng_state: draw the same random numbers the second time, so that dropout drops the same elements.
    """
    if not mode.enabled:
        return function(*args, **kwargs)
    region = _Region(lambda: function(*args, **kwargs), rng_state() if preserve_rng_state else None)
    return region.first()


class _Region:
    """The nodes that a checkpointed call recorded, and how to compute again what they need."""

    def __init__(self, call: Callable, state: dict | None) -> None:
        self.call, self.state = call, state
        self.values: dict[int, list] = {}

    def _run(self) -> tuple[Any, list[Node]]:
        nodes: list[Node] = []
        with listening(lambda result: nodes.append(result._trace)):
            return self.call(), nodes

    def first(self) -> Any:
        out, nodes = self._run()
        for i, node in enumerate(nodes):
            node.values = _Later(self, i)
        return out

    def again(self, i: int) -> list:
        """What the i-th node needs."""
        if i not in self.values:
            now = rng_state()
            if self.state is not None:
                set_rng_state(self.state)
            with set_grad_enabled(True):
                _, nodes = self._run()
            if self.state is not None:
                set_rng_state(now)
            self.values = {k: node.values for k, node in enumerate(nodes)}
        if i not in self.values:
            raise RuntimeError("checkpoint: the function did not record the same operations when it ran again")
        return self.values.pop(i)


class _Later:
    """Stands in the place of a node's values until they are computed again."""

    def __init__(self, region: _Region, place: int) -> None:
        self.region, self.place = region, place

    def __call__(self) -> list:
        return self.region.again(self.place)


@contextmanager
def listening(listener: Callable[[Tensor], None]) -> Iterator[None]:
    """Have `listener(result)` called for each result that is recorded in this thread."""
    before = mode.listeners
    mode.listen((*before, listener))
    try:
        yield
    finally:
        mode.listen(before)


# -- where the first NaN came from -------------------------------------------------------------------------------------


@contextmanager
def detect_anomaly() -> Iterator[None]:
    """Stop at the first NaN, in forward or backward, with the line of the forward pass that it belongs to. Slow."""

    def look(op: Op, arrays: list, attributes: dict, proceed: Callable) -> Any:
        out = proceed()
        first = out[0] if isinstance(out, tuple) else out
        if mode.enabled and _has_nan(first):
            came_in = any(_has_nan(array) for array in arrays)
            what = "was handed a NaN" if came_in else "made the first NaN"
            raise FloatingPointError(f"detect_anomaly: {op.name} {what}, at {user_line()}")
        return out

    def remember(result: Tensor) -> None:
        result._trace.check = partial(check_finite, user_line())

    with observe(look), listening(remember):
        yield


def check_finite(line: str, part: Any, node: Node) -> None:
    """Stop at a NaN in one of the gradients that a node made."""
    if _has_nan(raw(whole(part))):
        raise FloatingPointError(f"the gradient of {node.name} has a NaN; its forward line was {line}")


def _has_nan(array: Any) -> bool:
    if not hasattr(array, "dtype"):
        return False
    xp = backend_of(array)
    return xp.is_floating(array) and bool(xp.any(xp.isnan(array)))


def user_line() -> str:
    """The innermost line of the call stack that is not this package's: "train.py:12 in step"."""
    package = str(Path(__file__).parent)
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename, package):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_ours(file: str, package: str) -> bool:
    return file.startswith(package) or Path(file).name == "contextlib.py"


# -- derivatives as functions ------------------------------------------------------------------------------------------


def _separate(inputs: Any, create_graph: bool) -> tuple[tuple, bool]:
    """The inputs as leaves of their own (or as they are, if their graph matters), and whether there was only one."""
    single = isinstance(inputs, Tensor)
    every = (inputs,) if single else tuple(inputs)
    if create_graph:
        return tuple(x if x.requires_grad else x.detach().requires_grad_() for x in every), single
    return tuple(x.detach().requires_grad_() for x in every), single


def jacobian(function: Callable, inputs: Any, create_graph: bool = False) -> Any:
    """The derivative of each output element with respect to each input element: shape (*output, *input).

    One tensor for one input and one output; a tuple over inputs, or a tuple over outputs of such, otherwise.
    """
    with set_grad_enabled(True):
        leaves, single = _separate(inputs, create_graph)
        outputs = function(*leaves)
        several = isinstance(outputs, tuple)
        result = []
        for y in outputs if several else (outputs,):
            rows = [_row(element, leaves, create_graph) for element in y.reshape(-1)] if y.requires_grad else []
            columns = [
                stack([row[k] for row in rows]).reshape(*y.shape, *x.shape) if rows else _zero((*y.shape, *x.shape), x)
                for k, x in enumerate(leaves)
            ]
            result.append(columns[0] if single else tuple(columns))
    return tuple(result) if several else result[0]


def _row(element: Tensor, leaves: Sequence[Tensor], create_graph: bool) -> list[Tensor]:
    found = grad(element, leaves, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return [_zero(x.shape, x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def _zero(shape: tuple, like: Tensor) -> Tensor:
    return zeros(shape, dtype=like.dtype, device=like.device)


def hessian(function: Callable, inputs: Any, create_graph: bool = False) -> Any:
    """The second derivatives of a function with one output element: shape (*input, *input), nested for several."""

    def gradients(*leaves: Tensor) -> Any:
        y = function(*leaves)
        if y.numel() != 1:
            raise ValueError(f"hessian: expected a function with one output element, its output has shape {y.shape}")
        found = grad(y, leaves, create_graph=True, allow_unused=True)
        found = tuple(_zero(x.shape, x) if g is None else g for g, x in zip(found, leaves, strict=True))
        return found[0] if isinstance(inputs, Tensor) else found

    return jacobian(gradients, inputs, create_graph)


def vjp(function: Callable, inputs: Any, v: Any = None, create_graph: bool = False) -> tuple[Any, Any]:
    """(outputs, vᵀJ): a vector times the Jacobian, at the cost of one backward."""
    with set_grad_enabled(True):
        leaves, single = _separate(inputs, create_graph)
        outputs = function(*leaves)
        found = grad(outputs, leaves, v, create_graph=create_graph, allow_unused=True)
    parts = tuple(_zero(x.shape, x) if g is None else g for g, x in zip(found, leaves, strict=True))
    return _detached(outputs, create_graph), parts[0] if single else parts


def jvp(function: Callable, inputs: Any, v: Any = None, create_graph: bool = False) -> tuple[Any, Any]:
    """(outputs, J v): the Jacobian times a vector. vᵀJ is linear in v, and its own derivative is J (Townsend, 2017)."""
    with set_grad_enabled(True):
        leaves, single = _separate(inputs, create_graph)
        directions = (v,) if isinstance(v, Tensor) else v
        if directions is None:
            if not single or leaves[0].numel() != 1:
                raise ValueError(
                    "jvp: expected a direction v for each input; it is 1 only for one input of one element"
                )
            directions = (m02.ones_like(leaves[0]),)
        outputs = function(*leaves)
        several = isinstance(outputs, tuple)
        every = outputs if several else (outputs,)
        dummies = [m02.zeros_like(y).requires_grad_() for y in every]
        found = grad(every, leaves, dummies, create_graph=True, allow_unused=True)
        pairs = [(g, d) for g, d in zip(found, directions, strict=True) if g is not None and g.requires_grad]
        parts: tuple = tuple(m02.zeros_like(y) for y in every)
        if pairs:
            products = grad(
                [g for g, _ in pairs], dummies, [d for _, d in pairs], None, create_graph, allow_unused=True
            )
            parts = tuple(zero if p is None else p for p, zero in zip(products, parts, strict=True))
    return _detached(outputs, create_graph), parts if several else parts[0]


def _detached(outputs: Any, create_graph: bool) -> Any:
    if create_graph:
        return outputs
    return tuple(y.detach() for y in outputs) if isinstance(outputs, tuple) else outputs.detach()


# -- a picture of a graph ----------------------------------------------------------------------------------------------


def graph_edges(result: Tensor) -> tuple[dict[Any, int], list[tuple[Any, Any]]]:
    """(layer of each node, edges): operations and leaves that a result came from, the result in layer 0."""
    layers, edges, order, stack_ = {}, [], [], [leaf_of(result)]
    while stack_:
        node = stack_.pop()
        if node not in layers:
            layers[node] = 0
            order.append(node)
            edges += [(node, parent) for parent in getattr(node, "parents", ())]
            stack_.extend(getattr(node, "parents", ()))
    for node in sorted(order, key=lambda node: -node.number):  # newest first: a node's layer is final when it is met
        for parent in getattr(node, "parents", ()):
            layers[parent] = builtins.max(layers[parent], layers[node] + 1)
    return layers, edges


def draw(result: Tensor, path: str | Path = "graph.png", names: dict[str, Tensor] | None = None) -> Path:
    """Write a picture of the graph that a result was computed by: operations as boxes, leaves as rounded boxes.

    Args:
        path: the file to write; its ending chooses the format (png, svg, pdf).
        names: what to call leaves, such as `dict(model.named_parameters())`.
    """
    if not result.watched:
        raise RuntimeError(f"draw: this tensor (shape {result.shape}) was not recorded; there is no graph to draw")
    layers, edges = graph_edges(result)
    places = _arranged(layers, edges)
    known = {id(leaf_of(x)): name for name, x in (names or {}).items() if x.watched}
    width = builtins.max(x for x, _ in places.values()) + 1
    depth = builtins.max(layers.values()) + 1
    figure = new_figure(2.0 * width + 0.6, 0.85 * depth + 0.6)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.65, width - 0.35), ylim=(-depth + 0.3, 0.7))
    axes.axis("off")
    boxes = {}
    for node, (x, y) in places.items():
        leaf = isinstance(node, Leaf)
        text = axes.text(x, y, _label(node, known), ha="center", va="center", fontsize=9, bbox={
            "boxstyle": "round,pad=0.4" if leaf else "square,pad=0.4",
            "facecolor": "#fde9c9" if leaf else "#d6e6f5", "edgecolor": "#555555", "linewidth": 0.8})  # fmt: skip
        boxes[node] = text.get_bbox_patch()
    figure.draw_without_rendering()  # gives the boxes their sizes, at which the arrows end
    for child, parent in edges:  # arrows point the way that values flow
        axes.annotate("", places[child], places[parent], arrowprops={
            "arrowstyle": "-|>", "color": "#777777", "linewidth": 1, "shrinkA": 0, "shrinkB": 0,
            "patchA": boxes[parent], "patchB": boxes[child]})  # fmt: skip
    return save_figure(figure, path)


def _label(node: Any, known: dict[int, str]) -> str:
    if not isinstance(node, Leaf):
        return node.name if node.shape is None else f"{node.name}\n{tuple(node.shape)}"
    owner = node.tensor()
    return f"{known.get(id(node), 'leaf')}\n{owner.shape if owner is not None else 'gone'}"


def _arranged(layers: dict[Any, int], edges: list[tuple[Any, Any]]) -> dict[Any, tuple[float, float]]:
    """A place for each node: its layer from top to bottom, and within it in the order of those it leads to."""
    rows: dict[int, list] = {}
    for node, layer in layers.items():
        rows.setdefault(layer, []).append(node)
    widest = builtins.max(len(row) for row in rows.values())
    places: dict[Any, tuple[float, float]] = {}
    for layer in sorted(rows):

        def centre(node: Any) -> float:
            above = [places[child][0] for child, parent in edges if parent is node and child in places]
            return builtins.sum(above) / len(above) if above else 0.0

        row = sorted(rows[layer], key=centre)
        for i, node in enumerate(row):
            places[node] = (i + (widest - len(row)) / 2, -float(layer))
    return places
