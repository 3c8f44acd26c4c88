"""Module 06: autograd, or how a program tells the derivative of whatever it computed.

Learning objectives. After this module you can
1. derive the gradient of a composed function by the chain rule, from its end to its start;
2. write the gradient rule of an operation, and say which values it needs kept;
3. explain why backward visits operations newest first, once each, and what it frees on the way;
4. check a gradient against finite differences;
5. measure what recording costs in time and what a graph holds in memory.
"""

from __future__ import annotations

import builtins
import functools
import heapq
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ContextDecorator
from typing import Any

from tinytorch.backends import backend_of
from tinytorch.m01_setup import assert_close, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import (
    WATCHED,
    Op,
    Tensor,
    abs,
    add,
    amax,
    argmax,
    attach_recorder,
    bitwise_and,
    bitwise_not,
    bitwise_or,
    bitwise_xor,
    cast,
    clone,
    concatenate,
    div,
    eq,
    exp,
    expand,
    float64,
    ge,
    getitem,
    gt,
    le,
    log,
    lt,
    matmul,
    maximum,
    mean,
    mul,
    ne,
    neg,
    ones,
    op,
    permute,
    pow,
    randn,
    reshape,
    sqrt,
    sub,
    sum,
    tensor,
    to_device,
    transpose,
    unsqueeze,
    where,
    zeros,
)
from tinytorch.m02_tensor_appendix import Writes, is_basic, side_by_side, sign, take_along_dim, tanh, together
from tinytorch.m03_activations import log_softmax, relu, sigmoid, softmax
from tinytorch.m04_layers import Linear, Parameter, Sequential, drop, linear
from tinytorch.m05_losses import cross_entropy, softmax_cross_entropy

# %% [markdown]
# ## Mathematical foundations
#
# A network is a composition $L = f_n(… f_2(f_1(x)))$ that ends in one number. The *chain rule* gives its derivative as
# a product of Jacobians, $\partial L / \partial x = J_n … J_2 J_1$. Multiplied from the left, each step is a row vector
# times a Jacobian, and no Jacobian is ever formed: with $g = \partial L / \partial y$ for an operation $y = f(a, b)$,
#
# $$\partial L / \partial a = g \partial y / \partial a, \quad \partial L / \partial b = g \partial y / \partial b.$$
#
# These *vector–Jacobian products* are the gradient rules. For $y = a b$ they are $g b$ and $g a$; for $Y = A B$,
# $G B^T$ and $A^T G$; for $y = e^x$, $g y$, which needs the output and not the input. Where a value is used twice, its
# gradients **add up**. Where it was broadcast, it was used many times, so its gradient is the **sum** over the
# broadcast axes. One pass from the end to the start costs about two forward passes, whatever the number of inputs:
# *reverse-mode automatic differentiation* (Linnainmaa, 1970).

# %% [markdown]
# ## Implementation
#
# ### Rules
# Modules 02 to 05 know nothing of gradients; they get theirs here, from outside. `gradient(mul, a=…, b=…)` gives a rule
# for each input. The names of a rule's parameters say what it needs kept, and nothing else is kept alive:
#
# - `g`, always first: the gradient with respect to the output;
# - `out`: the output; `extras`: the by-products of an operation that returns a tuple (None under `create_graph`);
# - the name of an input: its value; with `_shape` behind it: its shape only;
# - the name of an attribute: its value; `position`: which of like inputs the rule is for, or which ones are tracked.
#
# Rules are written with operators and Ops. They see raw arrays in an ordinary backward, and tensors when gradients of
# gradients are wanted: the same rule serves every order.


# %%
class Rules:
    """The gradient rules of one operation, one for each input that has a gradient."""

    def __init__(self, op: Op, together: Callable | None, rules: dict[str, Callable | None]) -> None:
        unknown = rules.keys() - set(op.inputs)
        if unknown:
            raise TypeError(f"gradient({op.name}): it has inputs {op.inputs}, not {sorted(unknown)}")
        self.op, self.together, self.rules = op, together, rules
        self.plans: dict[int, Plan | None] = {}

    def plan(self, mask: int, count: int) -> Plan | None:
        """What to keep and what to call when the inputs in the bit mask, of `count`, need gradients."""
        if mask not in self.plans:
            plan = Plan(self, [i for i in range(count) if mask >> i & 1])
            if self.op.variadic:
                return plan
            self.plans[mask] = plan if plan.steps else None
        return self.plans[mask]


class Plan:
    """For one set of tracked inputs: which values to keep, and the rules to call with which of them.

    keep: (kind, key) of each value; steps: (which tracked input, rule, places of its arguments in the kept values), the
    first a list of all of them, with their positions, for a rule that serves all together.
    """

    def __init__(self, rules: Rules, tracked: list[int]) -> None:
        self.op, self.keep, self.steps = rules.op, list[tuple[str, Any]](), list[tuple]()
        self.parent_of_input = {i: k for k, i in enumerate(tracked)}
        if rules.together:
            self.steps = [(list(enumerate(tracked)), rules.together, self._places(rules.together, tuple(tracked)))]
            return
        for k, i in enumerate(tracked):
            name = self.op.inputs[min(i, len(self.op.inputs) - 1)]
            if name not in rules.rules:
                raise NotImplementedError(f"{self.op.name} has no gradient rule for its input {name!r}; give it one "
                                          f"with gradient({self.op.name}, {name}=…)")  # fmt: skip
            rule = rules.rules[name]
            if rule is not None:
                self.steps.append((k, rule, self._places(rule, i)))

    def _places(self, rule: Callable, position: Any) -> tuple[int, ...]:
        return tuple(self._place(name, position) for name in list(inspect.signature(rule).parameters)[1:])

    def _place(self, name: str, position: Any) -> int:
        """Where among the kept values the one that a rule calls `name` stands; it is added if it is new."""
        known, several = dict[str, tuple[str, Any]](), self.op.variadic
        for i, x in enumerate(self.op.inputs):
            known |= {x: ("inputs", None) if several else ("input", i)}
            known |= {f"{x}_shape": ("shapes", None) if several else ("shape", i)}
        known |= {x: ("attribute", x) for x in self.op.attributes}
        known |= {"out": ("out", None), "extras": ("extras", None), "position": ("constant", position)}
        if name not in known:
            raise TypeError(f"gradient({self.op.name}): a rule asks for {name!r}, which the operation does not have")
        if known[name] not in self.keep:
            self.keep.append(known[name])
        return self.keep.index(known[name])

    def kept(self, arrays: list, attributes: dict, out: Any, extras: tuple) -> list:
        """The values that the rules of this plan need."""
        values = []
        for kind, key in self.keep:
            if kind == "input":
                values.append(arrays[key] if key < len(arrays) else None)
            elif kind == "out":
                values.append(out)
            elif kind == "shape":
                values.append(arrays[key].shape)
            elif kind == "attribute":
                values.append(attributes[key] if key in attributes else self.op.attributes[key])
            elif kind == "constant":
                values.append(key)
            elif kind == "extras":
                values.append(tuple(x.data for x in extras))
            else:
                values.append(tuple(arrays) if kind == "inputs" else tuple(getattr(a, "shape", ()) for a in arrays))
        return values


RULES: dict[Op, Rules] = {}
NON_DIFFERENTIABLE: set[Op] = set()


def gradient(op: Op, together: Callable | None = None, **rules: Callable | None) -> None:
    """Give an operation its gradient: a rule for each input by name, or None for an input that has none.

    Or one rule for all others `together`, which returns a tuple: the gradient of each input, None where there is none.
    """
    if op in RULES or op in NON_DIFFERENTIABLE:
        raise ValueError(f"gradient: {op.name} has its rules already")
    RULES[op] = Rules(op, together, rules if together is None else {**dict.fromkeys(op.inputs, together), **rules})


def non_differentiable(*ops: Op) -> None:
    """Declare that the results of these operations do not vary smoothly with any input."""
    NON_DIFFERENTIABLE.update(ops)


# %% [markdown]
# ### The table
# Every operation of the chapters 02 to 05. Summing a gradient back to the shape of a broadcast input, and casting it
# to the input's dtype, happen once, in the engine: so `add` hands on `g` as it is, whatever was broadcast.


# %%
def spread(g: Any, shape: tuple, dim: Any, keepdim: bool) -> Any:
    """A reduction's gradient, repeated over the axes that it reduced."""
    if not keepdim and dim is not None:  # a single number needs no axes
        axes = [d % len(shape) for d in (dim if isinstance(dim, tuple) else (dim,))]
        g = reshape(g, shape=tuple(1 if d in axes else n for d, n in enumerate(shape)))
    return expand(g, shape=tuple(shape))


def reduced_count(shape: tuple, dim: Any) -> int:
    """How many elements each result of a reduction comes from."""
    return math.prod(shape) if dim is None else math.prod(shape[d] for d in (dim if isinstance(dim, tuple) else (dim,)))


def extreme_rule(g: Any, x: Any, out: Any, dim: Any, keepdim: bool) -> Any:
    """To the extreme element; shared equally where several are equal."""
    mask = cast(eq(x, spread(out, x.shape, dim, keepdim)), dtype=str(backend_of(raw(x)).dtype_name(raw(x))))
    return spread(g, x.shape, dim, keepdim) * mask / sum(mask, dim=dim, keepdim=True)


def power_rule(g: Any, a: Any, b: Any) -> Any:
    """b a^(b-1), and 0 where b is 0, even at a = 0."""
    if isinstance(b, (int, float)):
        return g * 0 if b == 0 else mul(g, mul(pow(a, b - 1), b))
    return mul(g, where(eq(b, 0), 0, mul(pow(a, where(eq(b, 0), 1, sub(b, 1))), b)))


def exponent_rule(g: Any, a: Any, out: Any) -> Any:
    """a^b log a, and 0 where a is 0."""
    if isinstance(a, (int, float)):
        return g * out * (math.log(a) if a > 0 else math.nan) if a else g * 0
    return g * where(eq(a, 0), 0, out * log(where(eq(a, 0), 1, a)))


def matmul_left(g: Any, a_shape: tuple, b: Any) -> Any:
    """g bᵀ; a vector counts as a row on the left and as a column on the right."""
    if b.ndim == 1:
        return mul(g, b) if len(a_shape) == 1 else mul(unsqueeze(g, -1), b)
    if len(a_shape) == 1:
        return getitem(matmul(b, unsqueeze(g, -1)), index=(..., 0))
    return matmul(g, transpose(b, -2, -1))


def matmul_right(g: Any, a: Any, b_shape: tuple) -> Any:
    """aᵀ g; where one matrix b served a whole batch, the sum over the batch is one larger product."""
    if a.ndim == 1:
        return mul(g, a) if len(b_shape) == 1 else mul(unsqueeze(a, -1), unsqueeze(g, -2))
    if len(b_shape) == 1:
        return getitem(matmul(transpose(a, -2, -1), unsqueeze(g, -1)), index=(..., 0))
    if len(b_shape) == 2 and a.ndim > 2:
        a, g = reshape(a, shape=(-1, a.shape[-1])), reshape(g, shape=(-1, g.shape[-1]))
    return matmul(transpose(a, -2, -1), g)


@op
def linear_gradients(xp, g, x, weight, *, tracked):
    """The gradients of `linear` carried to those of x (0), weight (1) and bias (2) that are tracked: g W, gᵀ x, Σ g."""
    rows = xp.reshape(g, (-1, g.shape[-1]))
    makers = (lambda: xp.matmul(g, weight), lambda: xp.matmul(rows.T, xp.reshape(x, (-1, x.shape[-1]))),
              lambda: xp.sum(rows, axis=0))  # fmt: skip
    return tuple(makers[i]() for i in tracked)


def linear_rule(g: Any, x: Any, weight: Any, position: tuple) -> Any:
    """The same with operations that have rules themselves, where the gradients are to be differentiated."""
    if isinstance(g, Tensor):
        return matmul(g, weight), matmul_right(x, g, weight.shape), g
    found = dict(zip(position, linear_gradients(g, x, weight, tracked=position), strict=True))
    return found.get(0), found.get(1), found.get(2)


def piece(g: Any, position: int, tensors_shape: tuple, dim: int) -> Any:
    """The part of a concatenation's gradient that belongs to one of its inputs."""
    dim %= g.ndim
    start = builtins.sum(shape[dim] for shape in tensors_shape[:position])
    stop = start + tensors_shape[position][dim]
    return getitem(g, index=(slice(None),) * dim + (slice(start, stop),))


@op
def scatter(xp, g, *, index, shape):
    """Zeros of a shape, with g added at the index: what `x[index]` does, backwards."""
    zero = xp.zeros(tuple(shape), dtype=g.dtype)
    if not is_basic(index):
        return xp.scatter_add(zero, index, g)
    xp.assign(zero, index, g)
    return zero


class Slices:
    """The gradient of a tensor of which slices were taken: the slices' gradients, until all are there."""

    def __init__(self, g: Any, index: Any, shape: tuple) -> None:
        self.parts, self.shape, self.dtype = [(index, g)], tuple(shape), g.dtype

    def array(self) -> Any:
        if in_a_row := side_by_side(self.parts, self.shape):
            return together(*in_a_row)
        (index, g), *others = self.parts
        out = scatter(g, index=index, shape=self.shape)
        for index, g in others:
            backend_of(out).increase(out, index, g)
        return out


def slice_rule(g: Any, x_shape: tuple, index: Any) -> Any:
    """Zeros with g at the index; of several slices of one tensor, the engine makes one array and not one for each."""
    raw_slice = is_basic(index) and not isinstance(g, Tensor)
    return Slices(g, index, x_shape) if raw_slice else scatter(g, index=index, shape=x_shape)


@op
def relu_gradient(xp, g, y):
    """g where y, the output of a ReLU, is above 0, and 0 elsewhere."""
    return g * xp.astype(y > 0, g.dtype)  # many times faster than a choice by a mask


@op
def softmax_minus_one_hot(xp, scale, probabilities, targets):
    """scale (p - one_hot(target)) in each row: what cross-entropy of logits does, backwards."""
    out = probabilities * xp.expand_dims(scale, axis=1)
    hits = (xp.arange(out.shape[0]), targets)
    xp.assign(out, hits, xp.take_index(out, hits) - scale)
    return out


def raw(x: Any) -> Any:
    return x.data if isinstance(x, Tensor) else x


# fmt: off
gradient(add,        a=lambda g: g,                                 b=lambda g: g)
gradient(sub,        a=lambda g: g,                                 b=lambda g: -g)
gradient(mul,        a=lambda g, b: g * b,                          b=lambda g, a: g * a)
gradient(div,        a=lambda g, b: g / b,                          b=lambda g, b, out: -(g * out) / b)
gradient(pow,        a=power_rule,                                  b=exponent_rule)
gradient(maximum,    a=lambda g, a, b: where(lt(a, b), 0, where(eq(a, b), g / 2, g)),
                     b=lambda g, a, b: where(lt(b, a), 0, where(eq(a, b), g / 2, g)))
gradient(matmul,     a=matmul_left,                                 b=matmul_right)
gradient(where,      condition=None,                                a=lambda g, condition: where(condition, g, 0),
                                                                    b=lambda g, condition: where(condition, 0, g))
gradient(neg,        x=lambda g: -g)
gradient(abs,        x=lambda g, x: g * sign(x))
gradient(exp,        x=lambda g, out: g * out)
gradient(log,        x=lambda g, x: g / x)
gradient(sqrt,       x=lambda g, out: g / (2 * out))
gradient(sum,        x=lambda g, x_shape, dim, keepdim: spread(g, x_shape, dim, keepdim))
gradient(mean,       x=lambda g, x_shape, dim, keepdim: spread(g / reduced_count(x_shape, dim), x_shape, dim, keepdim))
gradient(amax,       x=extreme_rule)
gradient(reshape,    x=lambda g, x_shape: reshape(g, shape=x_shape))
gradient(permute,    x=lambda g, dims: permute(g, dims=sorted(range(len(dims)), key=lambda i: dims[i] % len(dims))))
gradient(expand,     x=lambda g: g)
gradient(getitem,    x=slice_rule)
gradient(scatter,    g=lambda g, index: getitem(g, index=index))
gradient(concatenate, tensors=piece)
gradient(cast,       x=lambda g: g)
gradient(clone,      x=lambda g: g)
gradient(to_device,  x=lambda g, device, source: to_device(g, device=source, source=device))
gradient(relu,       x=lambda g, out: relu_gradient(g, out))
gradient(relu_gradient, y=None,                                     g=lambda h, y: relu_gradient(h, y))
gradient(sigmoid,    x=lambda g, out: g * (out * (1 - out)))
gradient(tanh,       x=lambda g, out: g * (1 - out * out))
gradient(softmax,    x=lambda g, out, dim: out * (g - sum(g * out, dim=dim, keepdim=True)))
gradient(log_softmax, x=lambda g, out, dim: g - exp(out) * sum(g, dim=dim, keepdim=True))
gradient(softmax_cross_entropy, targets=None, logits=lambda g, logits, targets, extras: softmax_minus_one_hot(
                     g, extras[0] if extras else softmax(logits, dim=1), targets))
gradient(softmax_minus_one_hot, targets=None,           probabilities=lambda g, scale: g * unsqueeze(scale, 1),
                     scale=lambda g, probabilities, targets: sum(g * probabilities, dim=1) - reshape(
                     take_along_dim(g, unsqueeze(targets, 1), dim=1), shape=(-1,)))
gradient(drop,       noise=None,                                    x=lambda g, noise, p: drop(g, noise, p=p))
gradient(linear,     together=linear_rule)
gradient(linear_gradients)
# fmt: on
non_differentiable(eq, ne, lt, le, gt, ge, argmax, bitwise_and, bitwise_or, bitwise_xor, bitwise_not)


# %% [markdown]
# ### Recording
# Each operation on a tracked tensor leaves a *node*: what to call, what it needs, and the nodes that it came from. It
# keeps arrays, never its own output tensor: no reference cycle. A tensor that tracking starts from has a *leaf*.


# %%
now = Writes.clock.__next__


class Leaf:
    """Where a graph ends: a tensor whose gradient is wanted. `grad` is that gradient, a tensor, or None."""

    __slots__ = ("__weakref__", "grad", "hooks", "number", "tensor")
    hooks: Any

    def __init__(self, owner: Tensor) -> None:
        self.number, self.tensor, self.hooks = now(), weakref.ref(owner), None
        self.grad: Tensor | None = None


class Node:
    """One recorded operation.

    Attributes:
        number: nodes are numbered as they are made, so that newest first is a topological order.
        parents: the nodes and leaves of its tracked inputs.
        values: what its rules need; None once they were used and freed.
        shape, dtype: the output's, in which its gradient must arrive.
    """

    __slots__ = ("__weakref__", "check", "dtype", "grad", "hooks", "number", "parents", "plan", "shape", "values")

    def __init__(self, plan: Any, parents: Sequence, values: Any, out: Any) -> None:
        self.plan, self.parents, self.values = plan, parents, values
        self.shape, self.dtype, self.number = out.shape, out.dtype, now()
        self.grad = self.hooks = self.check = None

    @property
    def name(self) -> str:
        return self.plan.op.name

    def gradients(self, g: Any, create_graph: bool) -> Iterable[tuple[Any, Any]]:
        """(parent, gradient) for each parent, `g` being the gradient of the output."""
        if self.values is None:
            raise RuntimeError(f"backward has been through {self.name} of shape {tuple(self.shape)} already and freed "
                               "what it kept; to go through a graph twice, say retain_graph=True at first")  # fmt: skip
        values = self._unchanged()
        if create_graph:
            values = [self._tracked(kind, key, v) for (kind, key), v in zip(self.plan.keep, values, strict=True)]
        found = list[tuple[Any, Any]]()
        for k, rule, places in self.plan.steps:
            part = rule(g, *[values[i] for i in places])
            found += [(self.parents[j], part[i]) for j, i in k] if type(k) is list else [(self.parents[k], part)]
        return found

    def _unchanged(self) -> list:
        """The kept values; an error if one was written to since."""
        if callable(self.values):  # they were not kept but are computed again
            self.values = self.values()
        if Writes.latest > self.number:
            for (kind, _), value in zip(self.plan.keep, self.values, strict=True):
                kept = value if kind in ("inputs", "extras") else (value,) if kind in ("input", "out") else ()
                if any(hasattr(array, "dtype") and Writes.since(array, self.number) for array in kept or ()):
                    raise RuntimeError(f"a value that {self.name} of shape {tuple(self.shape)} needs for backward was "
                                       "changed in place after it was recorded; change a clone instead, or change it "
                                       "after backward")  # fmt: skip
        return self.values

    def _tracked(self, kind: str, key: Any, value: Any) -> Any:
        """A kept array as the tensor that it was, so that what a rule computes from it is recorded in turn."""
        if kind == "input" and hasattr(value, "dtype"):
            parent = self.plan.parent_of_input.get(key)
            return _tensor(value, None if parent is None else self.parents[parent])
        if kind == "inputs":
            return tuple(self._tracked("input", i, array) for i, array in enumerate(value))
        return _tensor(value, self) if kind == "out" else None if kind == "extras" else value

    def free(self) -> None:
        self.values, self.parents = None, ()


def _tensor(array: Any, trace: Any) -> Tensor:
    result = Tensor(array)
    result._trace = trace
    return result


def leaf_of(x: Tensor) -> Leaf:
    """The leaf of a watched tensor; made when it is first needed."""
    if x._trace is WATCHED:
        x._trace = Leaf(x)
    return x._trace


def check_declared(op: Op) -> None:
    """An error if nobody said anything about an operation's gradient."""
    if op not in NON_DIFFERENTIABLE:
        raise NotImplementedError(f"{op.name} has no gradient rule: give it one with gradient({op.name}, …), "
                                  f"declare non_differentiable({op.name}), or call it under no_grad()")  # fmt: skip


class Mode(threading.local):
    """Whether operations are recorded, in this thread."""

    enabled = True
    listeners: tuple = ()  # functions that are called with each recorded result

    def listen(self, listeners: tuple) -> None:
        self.listeners = listeners


mode = Mode()


class Recorder:
    """What m02's door tells of operations on watched tensors. See `Op` for when it calls."""

    def wants(self, *inputs: Any) -> bool:
        return mode.enabled and any(isinstance(x, Tensor) and x._trace is not None for x in inputs)

    def record(self, op: Op, inputs: Sequence, arrays: list, attributes: dict, result: Any) -> None:
        if not mode.enabled:
            return
        parents, mask = [], 0
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor) and x._trace is not None:
                parents.append(leaf_of(x) if x._trace is WATCHED else x._trace)
                mask |= 1 << i
        rules = RULES.get(op)
        if rules is None:
            return check_declared(op)
        plan = rules.plans.get(mask) or rules.plan(mask, len(inputs))
        first, extras = (result[0], result[1:]) if isinstance(result, tuple) else (result, ())
        out = first.data
        if plan is None or (op is cast and not backend_of(out).is_floating(out)):
            return
        first._trace = Node(plan, parents, plan.kept(arrays, attributes, out, extras), out)
        for listener in mode.listeners:
            listener(first)

    def replace(self, x: Tensor, result: Tensor) -> None:
        """An in-place change of a tensor that a graph knows: it takes the result's array and place in the graph.

        Its old array stays as it is, because rules may need it.
        """
        if x.watched and isinstance(leaf_of(x), Leaf):
            what = f"a leaf that requires grad (shape {x.shape}) was to be changed in place while recording"
            raise RuntimeError(f"{what}: its gradient would be another value's. Do it under no_grad(), or on a clone")
        if result.shape != x.shape:
            raise ValueError(f"in place: a result of shape {result.shape} does not fit a tensor of shape {x.shape}")
        result = result.to(x.dtype)
        x.data, x._trace = result.data, result._trace

    def describe(self, x: Tensor) -> list[str]:
        return [f"grad_fn=<{x._trace.name}>" if isinstance(x._trace, Node) else "requires_grad=True"]


attach_recorder(Recorder())

# %% [markdown]
# ### Backward
# Newest first: when a node's turn comes, every operation that used its output has been visited, because it is younger.
# So its gradient is complete, each node is visited once, and no chain is too long.


# %%
def sum_to(g: Any, shape: tuple) -> Any:
    """A gradient summed over the axes along which its tensor, of this shape, was broadcast."""
    lead = g.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(lead + d for d, n in enumerate(shape) if n == 1 and g.shape[lead + d] != 1)
    return reshape(sum(g, dim=axes, keepdim=True), shape=tuple(shape))


def propagate(roots: Sequence[tuple], retain_graph: bool | None, create_graph: bool, wanted: set | None = None) -> dict:
    """Send gradients from the roots, (node, gradient) pairs, to the leaves, and add them to the leaves' `grad`.

    With `wanted`, a set of nodes and leaves, their gradients are returned instead, and no `grad` is touched.
    """
    arrived, found, queue = dict[Any, Any](), dict[Any, Any](), list[tuple[int, Any]]()
    needed = None if wanted is None else leading_to(wanted, [node for node, _ in roots])

    def send(node: Any, g: Any) -> None:
        if node in arrived:
            arrived[node] = joined(arrived[node], g)
        else:
            arrived[node] = g
            heapq.heappush(queue, (-node.number, node))

    for node, g in roots:
        send(node, g)
    while queue:
        node = heapq.heappop(queue)[1]
        g = whole(arrived.pop(node))
        for hook in node.hooks or ():
            g = hook(g)
        if wanted is not None and node in wanted:
            found[node] = g
        if isinstance(node, Leaf):
            if wanted is None:
                accumulate(node, g)
            continue
        for parent, part in node.gradients(g, create_graph):
            if part is not None and (needed is None or parent in needed):
                if node.check is not None:
                    node.check(part, node)
                send(parent, fitted(part, parent, g))
        if not (create_graph if retain_graph is None else retain_graph):
            node.free()
    return found


def fitted(part: Any, parent: Any, g: Any) -> Any:
    """A gradient in its tensor's shape and dtype; for a leaf, in an array that is not `g`'s, which others get too."""
    target = parent
    if isinstance(parent, Leaf):
        owner = parent.tensor()
        if owner is None:
            return part  # nobody holds the tensor any more
        target = owner.data
    if target.shape is None:
        return part
    if part.shape != target.shape:
        part = sum_to(part, target.shape)
    array = raw(part)
    if array.dtype != target.dtype:
        part = cast(part, dtype=backend_of(array).names[target.dtype])
    return clone(part) if part is g and target is not parent and part is array else part


def whole(g: Any) -> Any:
    return g.array() if isinstance(g, Slices) else g


def joined(a: Any, b: Any) -> Any:
    """Two gradients of one tensor, added up."""
    if isinstance(a, list):  # one entry for each output of a Function
        return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]
    if isinstance(a, Slices) and isinstance(b, Slices):
        a.parts += b.parts
        return a
    return whole(a) + whole(b)


def accumulate(leaf: Leaf, g: Any) -> None:
    """Add to a leaf's gradient. The leaf owns its array: what others may hold too is copied."""
    owner = leaf.tensor()
    if owner is None:
        return
    if isinstance(g, Tensor):  # create_graph: the gradient is part of a graph
        leaf.grad = g if leaf.grad is None else leaf.grad + g
    elif leaf.grad is None:
        backend = backend_of(g)
        leaf.grad = Tensor(g if backend.owns_memory(g) else backend.asarray(g, copy=True))
    elif leaf.grad._trace is not None:
        leaf.grad = leaf.grad + Tensor(g)
    else:
        leaf.grad.data += g
        Writes.note(leaf.grad.data)


def leading_to(wanted: set, starts: Sequence[Any]) -> set:
    """The nodes of the graph below `starts` from which a wanted one is reached."""
    order, seen, stack = [], set(), list(starts)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            order.append(node)
            stack.extend(getattr(node, "parents", ()))
    needed = set(wanted)
    for node in sorted(order, key=lambda node: node.number):
        if any(parent in needed for parent in getattr(node, "parents", ())):
            needed.add(node)
    return needed


# %% [markdown]
# ### What the user sees
# PyTorch's names; `requires_grad` is m02's neutral `watched`.


# %%
def backward(
    self: Tensor, gradient: Tensor | None = None, retain_graph: bool | None = None, create_graph: bool = False
) -> None:
    """Add the gradient of this tensor with respect to every leaf of its graph to the leaf's `grad`.

    Args:
        gradient: the gradient that this tensor itself gets; 1 where it has a single element, needed elsewhere.
        retain_graph: keep what the graph holds for another backward; by default only if `create_graph`.
        create_graph: record the computation of the gradients too, so that they can be differentiated.

    RuntimeError where nothing was recorded, the graph was freed already, or a kept value was changed in place.
    """
    with set_grad_enabled(create_graph):
        propagate([root(self, gradient, create_graph)], retain_graph, create_graph)


def root(x: Tensor, gradient: Tensor | None, create_graph: bool) -> tuple[Any, Any]:
    """Where backward starts, and with which gradient."""
    if not x.watched:
        raise RuntimeError(f"backward: this tensor (shape {x.shape}) was computed from nothing that requires grad, or "
                           "under no_grad()")  # fmt: skip
    if gradient is None:
        if x.numel() != 1:
            raise RuntimeError(f"backward: of a tensor of shape {x.shape} a gradient of that shape must be given; "
                               "it is 1 only where there is one element")  # fmt: skip
        gradient = Tensor(backend_of(x.data).ones(x.data.shape, dtype=x.data.dtype))
    elif gradient.shape != x.shape:
        raise ValueError(f"backward: the gradient has shape {gradient.shape}, the tensor {x.shape}")
    else:
        gradient = gradient.to(x.dtype)
        gradient = gradient.detach().clone() if x.is_leaf and not create_graph else gradient  # the leaf will own it
    return leaf_of(x), gradient if create_graph else gradient.data


def grad(
    outputs: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor | None] | None = None, retain_graph: bool | None = None,
    create_graph: bool = False, allow_unused: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of the sum of outputs with respect to the inputs; no `grad` is touched.

    RuntimeError where an input requires no grad, or does not influence the outputs (None with `allow_unused`).
    """
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    given = (grad_outputs,) if isinstance(grad_outputs, Tensor) else grad_outputs or (None,) * len(outputs)
    for i, x in enumerate(inputs):
        if not x.watched:
            raise RuntimeError(f"grad: input {i} (shape {x.shape}) does not require grad")
    with set_grad_enabled(create_graph):
        roots = [root(x, g, create_graph) for x, g in zip(outputs, given, strict=True)]
        found = propagate(roots, retain_graph, create_graph, {leaf_of(x) for x in inputs})
    results = tuple(found.get(leaf_of(x)) for x in inputs)
    for i, g in enumerate(results):
        if g is None and not allow_unused:
            raise RuntimeError(f"grad: the outputs do not depend on input {i}; allow_unused=True gives None for it")
    return tuple(Tensor(g) if g is not None and not isinstance(g, Tensor) else g for g in results)


class set_grad_enabled(ContextDecorator):
    """Record operations, or do not, in a `with` block or a decorated function."""

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.before = enabled, list[bool]()

    def __enter__(self) -> None:
        self.before.append(mode.enabled)
        mode.enabled = self.enabled

    def __exit__(self, *_: Any) -> None:
        mode.enabled = self.before.pop()

    def _recreate_cm(self) -> set_grad_enabled:
        return set_grad_enabled(self.enabled)  # a decorated function may run in several threads at once

    def __call__(self, function: Callable) -> Callable:  # type: ignore[override]
        if not inspect.isgeneratorfunction(function):
            return super().__call__(function)

        @functools.wraps(function)
        def steps(*args: Any, **kwargs: Any) -> Any:
            running = function(*args, **kwargs)
            while True:  # the mode holds while the generator runs, not while its user does
                with self._recreate_cm():
                    try:
                        item = next(running)
                    except StopIteration as stop:
                        return stop.value
                yield item

        return steps


def _switch(enabled: bool, doc: str) -> Callable:
    def switch(function: Callable | None = None) -> Any:
        return set_grad_enabled(enabled) if function is None else set_grad_enabled(enabled)(function)

    switch.__doc__ = doc
    return switch


no_grad = _switch(False, "Do not record: `with no_grad():`, `@no_grad()` or `@no_grad`.")
enable_grad = _switch(True, "Record, also inside `no_grad()`.")
inference_mode = _switch(False, "Do not record. Here it is `no_grad` under another name: tensors hold nothing to save.")


def requires_grad_(self: Tensor, requires_grad: bool = True) -> Tensor:
    """Start (or stop) recording what is computed from this tensor. Stopping drops its gradient."""
    if isinstance(self._trace, Node):
        if not requires_grad:
            raise RuntimeError("requires_grad = False: this tensor is a result, not a leaf; detach() gives one without")
    elif requires_grad and not self.dtype.is_floating_point:
        raise RuntimeError(f"only tensors of floats can require grad, this one has dtype {self.dtype}")
    else:
        self.watched = requires_grad
    return self


def _set_grad(self: Tensor, value: Tensor | None) -> None:
    if value is not None and value.shape != self.shape:
        raise ValueError(f"grad: expected the tensor's shape {self.shape}, got {value.shape}")
    if value is not None or isinstance(self._trace, (Leaf, Node)):
        if not self.watched:
            raise RuntimeError("grad can only be set on a tensor that requires grad")
        leaf_of(self).grad = value


Tensor.extend(
    backward=backward, detach=lambda self: Tensor(self.data), requires_grad_=requires_grad_,
    requires_grad=property(lambda self: self.watched, requires_grad_),  # type: ignore[arg-type]
    grad=property(lambda self: getattr(self._trace, "grad", None), _set_grad),
    is_leaf=property(lambda self: not isinstance(self._trace, Node)),
    grad_fn=property(lambda self: self._trace if isinstance(self._trace, Node) else None),
)  # fmt: skip


def test_chain_rule_by_hand() -> None:
    x = tensor([0.25, 1.0], requires_grad=True)
    ((y := 2 * x).exp() * y).sum().backward()
    assert_close(x.grad, [2 * math.exp(0.5) * 1.5, 2 * math.exp(2.0) * 3.0])


def test_used_twice_adds_up_and_broadcast_sums() -> None:
    x, y = tensor([[1.0], [2.0]], requires_grad=True), tensor([3.0, 4.0, 5.0], requires_grad=True)
    for _ in range(2):  # what the second backward finds is added, too
        (x * y + x).sum().backward()
    assert (x.grad.tolist(), y.grad.tolist()) == ([[30.0], [30.0]], [6.0, 6.0, 6.0])


def test_a_matrix_product_by_hand() -> None:
    a, b, weights = (randn(*shape, requires_grad=True) for shape in ((2, 3, 4), (4, 5), (5,)))
    ((a @ b).sum(-2) * weights).sum().backward()
    assert_close(a.grad, (b * weights).sum(1).expand(2, 3, 4), rtol=1e-4, atol=1e-5)
    assert_close(b.grad, a.sum((0, 1)).unsqueeze(1) * weights, rtol=1e-4, atol=1e-5)


def test_errors_say_what_to_do() -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    (y := (x * x).sum()).backward()
    z = (x * (kept := tensor([3.0, 4.0]))).sum()
    kept += 1
    assert "retain_graph=True" in message_of(y.backward, error=RuntimeError)
    assert "changed in place" in message_of(z.backward, error=RuntimeError)
    assert "requires grad" in message_of(tensor(1.0).backward, error=RuntimeError)


# %% [markdown]
# ### Checking gradients
# A wrong rule trains almost as well as a right one. So each is checked against $(L(x + \epsilon e_i) - L(x - \epsilon
# e_i)) / 2 \epsilon$ in float64, for a random projection $L$ of the outputs.


# %%
def gradcheck(
    function: Callable, inputs: Tensor | Sequence[Tensor], eps: float = 1e-6, atol: float = 1e-5, rtol: float = 1e-3
) -> bool:
    """Compare gradients of `function(*inputs)`, float64, with finite differences; AssertionError where they differ."""
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    checked = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if not checked or any(x.dtype != float64 for x in checked):
        raise ValueError(f"gradcheck: expected float64 inputs that require grad, got {[x.dtype for x in checked]}")
    weights: list[Tensor] = []

    def projected() -> Tensor:
        outputs = function(*inputs)
        outputs = [y for y in ((outputs,) if isinstance(outputs, Tensor) else outputs) if y.dtype.is_floating_point]
        if not weights:
            weights.extend(randn(y.shape, dtype=y.dtype, device=y.device) for y in outputs)
        return functools.reduce(lambda a, b: a + b, [(y * w).sum() for y, w in zip(outputs, weights, strict=True)])

    total = projected()
    exact = grad(total, checked, allow_unused=True) if total.requires_grad else (None,) * len(checked)
    for x, g in zip(checked, exact, strict=True):
        numeric = differences(projected, x, eps)
        assert_close(zeros(x.shape, dtype=float64) if g is None else g.detach().cpu(), numeric, rtol, atol)
    return True


def differences(function: Callable[[], Tensor], x: Tensor, eps: float) -> Tensor:
    """The gradient of a scalar function with respect to x, by central differences. Changes x and puts it back."""
    values = x.detach().cpu().clone().reshape(-1).tolist()

    def at(i: int, value: float) -> float:
        moved = tensor([*values[:i], value, *values[i + 1 :]], dtype=float64, device="cpu").reshape(x.shape)
        with no_grad():
            x.copy_(moved.to(x.device))
        return function().item()

    slopes = [(at(i, value + eps) - at(i, value - eps)) / (2 * eps) for i, value in enumerate(values)]
    with no_grad():
        x.copy_(tensor(values, dtype=float64, device="cpu").reshape(x.shape).to(x.device))
    return tensor(slopes, dtype=float64, device="cpu").reshape(x.shape)


def test_gradcheck_finds_a_wrong_rule() -> None:
    x = tensor([0.5, -1.0, 2.0], dtype=float64, requires_grad=True)
    assert (gradcheck(lambda x: x.exp() * x.sum(), x), x.tolist()) == (True, [0.5, -1.0, 2.0])
    message_of(gradcheck, lambda x: x * x.detach(), x, error=AssertionError)  # half of the gradient is missing


# %% [markdown]
# ## Systems analysis
#
# Recording costs a fixed time an operation. A graph holds what its rules need (`exp` its output, `mul` both inputs,
# `add` nothing), and that memory is what limits the batch size.


# %%
def analyze() -> None:
    """Measure the cost of recording and of backward for an operation, and the bytes a graph keeps."""
    plain, tracked = ones(4), ones(4, requires_grad=True)

    def chain(x: Tensor) -> Tensor:
        return functools.reduce(lambda y, _: y * 1.0001, range(1000), x).sum()

    times = {"untracked": seconds(lambda: chain(plain)), "recorded": seconds(lambda: chain(tracked)),
             "recorded and backward": seconds(lambda: chain(tracked).backward())}  # fmt: skip
    print_table(["a chain of 1,000 x * c", "µs an operation"], [[k, f"{t * 1e3:.2f}"] for k, t in times.items()])
    rows = []
    for name, function in (("x + x", lambda x: x + x), ("x * x", lambda x: x * x), ("exp(x)", exp), ("relu(x)", relu)):
        for n in (1_000, 1_000_000):
            node = function(randn(n, requires_grad=True)).grad_fn
            kept = {id(v): v.nbytes for v in node.values if hasattr(v, "nbytes")}
            rows.append([name, f"{n:,}", f"{builtins.sum(kept.values()):,}"])
    print_table(["operation", "elements", "bytes kept for backward"], rows)


# %% [markdown]
# ## Production context
#
# PyTorch's autograd does the same in C++: `derivatives.yaml` holds the rules, code generation turns each into a `Node`
# with its `SavedVariable`s (which check a version counter, as `Writes` does here), `AccumulateGrad` nodes are our
# leaves, and the engine takes ready nodes from a queue ordered by sequence number, on one thread for each device.
# What is left out here: forward mode, threads, and gradients through views that are changed in place.

# %% [markdown]
# ## Integration testing


# %%
def test_network_gradients_equal_finite_differences() -> None:
    model = Sequential(Linear(4, 5), sigmoid, Linear(5, 3)).to(float64)
    x, labels = randn(6, 4, dtype=float64), tensor([0, 1, 2, 2, 1, 0])
    assert gradcheck(lambda *_: cross_entropy(model(x), labels), list(model.parameters()))
    cross_entropy(model(x), labels).backward()
    assert all(isinstance(p, Parameter) and p.grad.shape == p.shape for p in model.parameters())


# %% [markdown]
# ## Thinking questions
#
# 1. A network of 100 layers keeps each layer's input. Which of them could be computed again instead, and at what cost?
# 2. `relu` keeps its output and not its input. Why does that often cost no memory at all?
# 3. Forward mode multiplies the Jacobians from the right. For which shapes of function is it the cheaper order?

# %% [markdown]
# ## Summary
#
# A table of rules, a recorder behind the door of module 02 and a queue: that is automatic differentiation.


if __name__ == "__main__":
    run_module(globals())
