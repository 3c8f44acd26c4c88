"""Module 04: layers, or how numbers that can be adjusted become a network with a structure and a state.

Learning objectives. After this module you can
1. write a layer as PyTorch users do, and compose networks of layers;
2. explain how a module finds its parameters, whatever their depth, and give each a name;
3. choose the scale of initial weights so that signals neither fade nor explode with depth;
4. carry the state of a network from one program to another, and say what went wrong where it does not fit;
5. count the parameters, bytes and operations of a network, and measure what they cost.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from textwrap import indent
from typing import Any, NamedTuple

from tinytorch.backends import backend_of
from tinytorch.m01_setup import assert_close, manual_seed, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import Tensor, _to_array, float64, int64, observe, ones, op, randn, tensor, to, zeros
from tinytorch.m02_tensor_appendix import Writes, _write, empty, flatten, rand

# %% [markdown]
# ## Mathematical foundations
#
# **Linear**: each row $x$ of a batch becomes $y = x W^\top + b$, with `weight` $W$ of shape (out, in) and `bias` $b$ of
# shape (out). A batch of $N$ rows takes $2 N \cdot \mathrm{in} \cdot \mathrm{out}$ operations.
#
# **Scale of initial weights**: let the inputs be independent with mean 0, and the weights too. Then
# $\mathrm{var}(y_i) = \mathrm{fan\_in} \cdot \mathrm{var}(w) \cdot \mathrm{mean}(x^2)$. Signals keep their size through
# any number of layers if $\mathrm{var}(w) = \mathrm{gain}^2 / \mathrm{fan\_in}$, where the gain makes up for what the
# activation takes away: $\sqrt 2$ for ReLU, which sets half of its inputs to zero (*Kaiming*). *Xavier* puts
# $(\mathrm{fan\_in} + \mathrm{fan\_out}) / 2$ in the place of fan_in, a compromise between both directions.
#
# A uniform distribution on $[-a, a]$ has variance $a^2 / 3$; hence the bound $a = \mathrm{gain} \sqrt{3 /
# \mathrm{fan\_in}}$.
#
# **Dropout**: each element becomes 0 with probability $p$, the others are multiplied by $1 / (1 - p)$, so that the
# expected value stays what it was, and nothing remains to be done when the network is used.

# %% [markdown]
# ## Implementation
#
# ### Parameter
# What a network adjusts is a tensor with a mark. The mark is its class, by which a module finds it, and that it is
# *watched* from the start: whoever will want to adjust it must see what is computed with it.


# %%
class Parameter(Tensor):
    """A tensor that belongs to a module's state and is to be adjusted.

    Args:
        data: a tensor, an array (its memory is shared), a number or nested lists.
        watched: whether operations on it are reported to a recorder; only floats can be.
        attributes: attributes that later modules gave to tensors, by name.
    """

    __slots__ = ()

    def __init__(self, data: Any, watched: bool = True, **attributes: Any) -> None:
        super().__init__(data.data if isinstance(data, Tensor) else data)
        self.watched = watched
        for name, value in attributes.items():
            setattr(self, name, value)
        if self.watched and not self.dtype.is_floating_point:
            raise TypeError(f"Parameter: expected floats, which can be adjusted, got {self.dtype}")

    def __repr__(self) -> str:
        return f"Parameter containing:\n{super().__repr__()}"


def test_parameter_is_a_watched_tensor() -> None:
    values = ones(3)
    weight = Parameter(values)
    values.data[0] = 5.0
    assert weight.tolist() == [5, 1, 1]  # one memory
    assert [x.watched for x in (weight, values, Parameter(values, watched=False))] == [True, False, False]
    copied = copy.deepcopy(weight)
    assert (type(copied), copied.watched, copied.data is weight.data) == (Parameter, True, False)
    assert "expected floats" in message_of(Parameter, [1, 2], error=TypeError)


# %% [markdown]
# ### Module
# A module is an object with parameters, other modules and a `forward`. There is no register of its parts beside the
# object: what it *has* is what stands in its `__dict__`, in the order of assignment, and the class of each value says
# what it is. So `self.weight` is the plainest attribute access that Python has, also on the hot path. Only buffers
# (state that is not adjusted, such as running averages) look like any tensor, and are listed by name.


# %%
class Module:
    """The base of all layers and networks: assign Parameters and Modules to attributes, and define `forward`.

        class Net(Module):
            def __init__(self):
                super().__init__()
                self.hidden, self.out = Linear(784, 128), Linear(128, 10)

            def forward(self, x):
                return self.out(relu(self.hidden(x)))

    Attributes:
        training: whether layers that behave differently while training do so; `train` and `eval` set it.
    """

    training: bool

    def __init__(self) -> None:
        self._buffers: dict[str, bool] = {}  # the name of each, and whether it belongs to the saved state
        self._hooks: dict[Handle, Callable] = {}
        self.training = True

    @classmethod
    def extend_class(cls, **attributes: Any) -> None:
        """Give all modules new methods, as `Tensor.extend` does to tensors. Refuses to replace one that exists."""
        for name, value in attributes.items():
            if hasattr(cls, name):
                raise AttributeError(f"{cls.__name__}.{name} exists already, and extend_class never replaces")
            setattr(cls, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or isinstance(value, (Parameter, Module)):
            self._check_assignment(name, value)
        object.__setattr__(self, name, value)

    def _check_assignment(self, name: str, value: Any) -> None:
        held, own, buffers = self.__dict__.get(name), type(self).__name__, self.__dict__.get("_buffers")
        if buffers is None and isinstance(value, (Parameter, Module)):
            raise AttributeError(f"{own}: call super().__init__() before assigning {name!r}")
        if value is None:
            return
        if isinstance(held, Parameter) and not isinstance(value, Parameter):
            raise TypeError(
                f"{own}.{name} is a Parameter, and cannot become a {type(value).__name__}; "
                f"wrap the values in Parameter(…), or write into it with .copy_(…)"
            )
        if isinstance(held, Module) and not callable(value):
            raise TypeError(f"{own}.{name} is a Module, and cannot become a {type(value).__name__}")
        if name in (buffers or ()) and not isinstance(value, Tensor):
            raise TypeError(f"{own}.{name} is a buffer, a Tensor, and cannot become a {type(value).__name__}")

    def __getattr__(self, name: str) -> Any:  # only called for what is not there
        own = type(self).__name__
        if "_buffers" not in self.__dict__:
            raise AttributeError(f"{own} has no {name!r}: its __init__ did not call super().__init__()")
        raise AttributeError(f"{own} has no attribute {name!r}")

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        output = self.forward(*inputs, **options)
        for hook in list(self._hooks.values()) if self._hooks else ():
            changed = hook(self, inputs, output)
            output = output if changed is None else changed
        return output

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the module computes. Called through the module itself: `module(x)`."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward(self, …), so it cannot be called")

    def register_forward_hook(self, hook: Callable[[Module, tuple, Any], Any]) -> Handle:
        """Call `hook(module, inputs, output)` after each `forward`; what it returns, unless None, is the new output."""
        handle = Handle(self._hooks)
        self._hooks[handle] = hook
        return handle

    def register_buffer(self, name: str, value: Tensor | None, persistent: bool = True) -> None:
        """Give the module a tensor that moves with it and is not adjusted; saved in its state if persistent."""
        self._check_name(name)
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"register_buffer: expected a tensor for {name!r}, got {type(value).__name__}")
        self._buffers[name] = persistent
        setattr(self, name, value)

    def register_parameter(self, name: str, value: Parameter | None) -> None:
        """The same as assigning the Parameter to the attribute; None keeps a place in the order."""
        self._check_name(name)
        if value is not None and not isinstance(value, Parameter):
            raise TypeError(f"register_parameter: expected a Parameter for {name!r}, got {type(value).__name__}")
        setattr(self, name, value)

    def add_module(self, name: str, module: Any) -> None:
        """The same as assigning the module to the attribute."""
        self._check_name(name)
        if isinstance(module, type) or not (callable(module) or module is None):
            found = f"a class: write {module.__name__}(…)" if isinstance(module, type) else repr(module)
            raise TypeError(f"{type(self).__name__}: {name!r} must be a Module or another callable, not {found:.60}")
        setattr(self, name, module)

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise KeyError(f"{type(self).__name__}: a name must be text without dots, not {name!r}")
        if name not in self.__dict__ and hasattr(self, name):
            raise KeyError(f"{type(self).__name__} has an attribute {name!r} of its own; choose another name")

    def _own(self, kind: type) -> Iterator[tuple[str, Any]]:
        """The module's own attributes of one kind; Tensor stands for its buffers."""
        buffers = self._buffers
        for name, value in list(self.__dict__.items()):
            if isinstance(value, kind) and (kind is not Tensor or name in buffers):
                yield name, value

    def named_modules(self, prefix: str = "", seen: set | None = None) -> Iterator[tuple[str, Module]]:
        """(name, module) of this module and all below it, each once, parents first."""
        seen = set() if seen is None else seen
        if self not in seen:
            seen.add(self)
            yield prefix, self
            for name, child in self._own(Module):
                yield from child.named_modules(f"{prefix}.{name}" if prefix else name, seen)

    def _named(self, kind: type, prefix: str, recurse: bool) -> Iterator[tuple[str, Any]]:
        seen = set()
        for path, module in self.named_modules(prefix) if recurse else [(prefix, self)]:
            for name, value in module._own(kind):
                if id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{path}.{name}" if path else name), value

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Parameter]]:
        """(name, parameter) of all parameters; one that several modules share comes once, under its first name."""
        return self._named(Parameter, prefix, recurse)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
        """(name, buffer) of all buffers, each once."""
        return self._named(Tensor, prefix, recurse)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        return (buffer for _, buffer in self.named_buffers(recurse=recurse))

    def modules(self) -> Iterator[Module]:
        return (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of the modules right below this one, each once."""
        return self._named(Module, "", False)

    def children(self) -> Iterator[Module]:
        return (child for _, child in self.named_children())

    def apply(self, function: Callable[[Module], Any]) -> Module:
        """Call `function` with every module below this one, and with this one last."""
        for child in self.children():
            child.apply(function)
        function(self)
        return self

    def train(self, mode: bool = True) -> Module:
        """Set `training` here and everywhere below."""
        for module in self.modules():
            module.training = bool(mode)
        return self

    def eval(self) -> Module:
        return self.train(False)

    def freeze(self) -> Module:
        """Take all parameters out of what a recorder sees, so that they stay as they are."""
        return self._watch(False)

    def unfreeze(self) -> Module:
        return self._watch(True)

    def _watch(self, watched: bool) -> Module:
        for parameter in self.parameters():
            parameter.watched = watched
        return self

    def to(self, *targets: Any, dtype: str | None = None, device: str | None = None) -> Module:
        """Bring parameters and buffers to a dtype (those that are floats), a device, or both, in place.

        Parameters stay the same objects, so whoever holds them (an optimizer) holds the new values.
        """
        goal = to(zeros(0), *targets, dtype=dtype, device=device)
        if not goal.dtype.is_floating_point:
            raise TypeError(f"{type(self).__name__}.to: expected a floating dtype, got {goal.dtype}")

        def convert(x: Tensor) -> Tensor:
            moved = to(Tensor(x.data), *targets, dtype=dtype, device=device)
            return moved if x.dtype.is_floating_point else to(Tensor(x.data), device=moved.device)

        for module in self.modules():
            for _, parameter in module._own(Parameter):
                parameter.data = convert(parameter).data
            for name, buffer in module._own(Tensor):
                setattr(module, name, convert(buffer))
        return self

    def _state(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all that is saved, in PyTorch's order; what is shared comes under each of its names."""
        for name, parameter in self._own(Parameter):
            yield prefix + name, parameter
        for name, buffer in self._own(Tensor):
            if self._buffers[name] and not isinstance(buffer, Parameter):
                yield prefix + name, buffer
        for name, child in self._own(Module):
            yield from child._state(f"{prefix}{name}.")

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """All parameters and persistent buffers by name. The tensors share the module's memory."""
        return {name: Tensor(value.data) for name, value in self._state(prefix)}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadedKeys:
        """Copy values by name into parameters and buffers, in place: all of them, or none if something is wrong.

        Args:
            state: tensors or arrays of any library by name; they are brought to this module's dtypes and devices.
            strict: whether missing and unexpected names are an error. Wrong shapes always are.

        Raises:
            RuntimeError: with all missing and unexpected names and all wrong shapes.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"load_state_dict: expected tensors by name, got {type(state).__name__}")
        own = dict(self._state())
        missing, unexpected = [n for n in own if n not in state], [n for n in state if n not in own]
        wrong = []
        for name in own.keys() & state.keys():
            found = tuple(state[name].shape) if hasattr(state[name], "shape") else type(state[name]).__name__
            if found != own[name].shape:
                wrong.append(f"{name} {found}, expected {own[name].shape}")
        names = {"missing": missing, "unexpected": unexpected} if strict else {}
        names["wrong shape"] = sorted(wrong)
        problems = [f"{kind}: {', '.join(found)}" for kind, found in names.items() if found]
        if problems:
            raise RuntimeError(f"{type(self).__name__}.load_state_dict: nothing loaded; {'; '.join(problems)}")
        arrays = {n: _to_array(state[n], x.dtype, x.device) for n, x in own.items() if n in state}
        for name, array in arrays.items():
            overwrite(own[name], array)
        return LoadedKeys(missing, unexpected)

    def extra_repr(self) -> str:
        """What `repr` says between the brackets, before the modules below."""
        return ""

    def _shown(self) -> list[tuple[str, str]]:
        """(name, text) of the layers that `repr` shows."""
        return [(name, repr(child)) for name, child in self._own(Module)]

    def __repr__(self) -> str:
        extra, own = self.extra_repr(), type(self).__name__
        lines = [f"({name}): {text}" for name, text in self._shown()]
        if not lines and "\n" not in extra:
            return f"{own}({extra})"
        return "\n".join([f"{own}(", indent("\n".join([extra, *lines] if extra else lines), "  "), ")"])


# %% [markdown]
# Three small things that Module mentions: what stops a hook, what `load_state_dict` returns, and how values are
# written into a tensor's own memory. The last one goes past the door on purpose: setting a state is no computation.


# %%
class Handle:
    """What registering a hook returns: `remove()` takes the hook away."""

    def __init__(self, hooks: dict) -> None:
        self.hooks = hooks

    def remove(self) -> None:
        self.hooks.pop(self, None)


class LoadedKeys(NamedTuple):
    """Names that the state lacked, and names that the module lacks; both empty after a strict load."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def overwrite(x: Tensor, values: Any) -> Tensor:
    """Write an array or a number into a tensor's memory, unseen by any recorder; returns the tensor."""
    _write(x.data, ..., values)
    Writes.note(x.data)
    return x


class Scale(Module):
    """A first layer, for the tests: x times `factor`, counting its calls."""

    calls: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = Parameter(tensor([factor]))
        self.register_buffer("calls", tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x * self.factor


class Twice(Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scale(2.0), Scale(3.0)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.first(x)))


def test_module_finds_and_names_what_it_has() -> None:
    net = Twice()
    assert net(tensor([1.0])).tolist() == [12]  # 2 · 3 · 2
    assert [name for name, _ in net.named_parameters()] == ["first.factor", "second.factor"]  # the shared one once
    assert [name for name, _ in net.named_modules()] == ["", "first", "second"]
    assert {name: calls.item() for name, calls in net.named_buffers()} == {"first.calls": 2, "second.calls": 1}
    assert repr(net) == "Twice(\n  (first): Scale()\n  (second): Scale()\n  (again): Scale()\n)"
    assert [[m.training for m in mode().modules()] for mode in (net.eval, net.train)] == [[False] * 3, [True] * 3]
    assert (net.freeze().second.factor.watched, net.unfreeze().first.factor.watched) == (False, True)


def test_to_converts_in_place() -> None:
    net = Twice()
    factor = net.first.factor
    assert net.to(float64).first.factor is factor
    assert (factor.dtype, net.first.calls.dtype) == (float64, int64)  # only floats change
    assert "floating dtype" in message_of(net.to, "int64", error=TypeError)


def test_state_goes_from_one_network_to_another() -> None:
    source, target = Twice(), Twice()
    overwrite(source.first.factor, 7.0)
    assert target.load_state_dict(source.state_dict()) == ([], [])
    overwrite(source.first.factor, 8.0)
    assert target.first.factor.tolist() == [7]  # a copy


def test_load_state_dict_lists_everything_and_loads_nothing() -> None:
    net = Twice()
    state = net.state_dict() | {"second.factor": zeros(4), "first.factor": zeros(1), "third": zeros(1)}
    del state["first.calls"]
    message = message_of(net.load_state_dict, state, error=RuntimeError)
    for part in ("missing: first.calls;", "unexpected: third;", "wrong shape: second.factor (4,), expected (1,)"):
        assert part in message
    assert net.first.factor.tolist() == [2]


def test_mistakes_are_named() -> None:
    class Unfinished(Module):
        def __init__(self) -> None:
            self.layer = Scale(1.0)

    assert "super().__init__()" in message_of(Unfinished, error=AttributeError)
    assert "Module defines no forward" in message_of(Module(), zeros(1), error=NotImplementedError)
    assert "is a Parameter" in message_of(setattr, Scale(1.0), "factor", zeros(1), error=TypeError)
    assert "has no attribute 'fator'" in message_of(getattr, Scale(1.0), "fator", error=AttributeError)


def test_hook_sees_and_may_change_the_output() -> None:
    net, seen = Scale(2.0), []
    handle = net.register_forward_hook(lambda module, inputs, output: seen.append((type(inputs), output.item())))
    other = net.register_forward_hook(lambda module, inputs, output: output + inputs[0])
    assert (net(tensor([5.0])).tolist(), seen) == ([15], [(tuple, 10)])
    handle.remove()
    other.remove()
    assert (net(tensor([5.0])).tolist(), seen) == ([10], [(tuple, 10)])


# %% [markdown]
# ### Initial values
# Each function overwrites a tensor and returns it. `fans` counts how many inputs an output sums over, and how many
# outputs an input goes to; behind the first two axes of a weight stands the window of a convolution.


# %%
def uniform_(x: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    """Overwrite with values uniform on [a, b)."""
    return overwrite(x, backend_of(x.data).random(x.shape, x.dtype) * (b - a) + a)


def normal_(x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Overwrite with normal values of this mean and standard deviation."""
    return overwrite(x, backend_of(x.data).normal(x.shape, x.dtype) * std + mean)


def fans(x: Tensor) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight of shape (out, in, *window)."""
    if x.ndim < 2:
        raise ValueError(f"init: fan_in and fan_out need a weight of shape (out, in, …), got {x.shape}")
    window = math.prod(x.shape[2:])
    return x.shape[1] * window, x.shape[0] * window


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """By how much initial weights must be larger to make up for an activation; `param` is leaky_relu's slope."""
    if nonlinearity == "leaky_relu":
        return math.sqrt(2 / (1 + (0.01 if param is None else param) ** 2))
    gains = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 0.75}
    gains |= {f"conv{transposed}{n}d": 1.0 for transposed in ("", "_transpose") for n in (1, 2, 3)}
    if nonlinearity not in gains:
        raise ValueError(f"calculate_gain: expected leaky_relu or one of {', '.join(gains)}, got {nonlinearity!r}")
    return gains[nonlinearity]


def _kaiming_std(x: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"init: expected mode 'fan_in' or 'fan_out', got {mode!r}")
    return calculate_gain(nonlinearity, a) / math.sqrt(fans(x)[mode == "fan_out"])


def kaiming_uniform_(x: Tensor, a: float = 0, mode: str = "fan_in", nonlinearity: str = "leaky_relu") -> Tensor:
    """Uniform with standard deviation gain / sqrt(fan); `a` is the slope of leaky_relu (0: that of relu)."""
    bound = math.sqrt(3) * _kaiming_std(x, a, mode, nonlinearity)
    return uniform_(x, -bound, bound)


def kaiming_normal_(x: Tensor, a: float = 0, mode: str = "fan_in", nonlinearity: str = "leaky_relu") -> Tensor:
    """Normal with standard deviation gain / sqrt(fan)."""
    return normal_(x, 0.0, _kaiming_std(x, a, mode, nonlinearity))


def xavier_uniform_(x: Tensor, gain: float = 1.0) -> Tensor:
    """Uniform with standard deviation gain · sqrt(2 / (fan_in + fan_out))."""
    bound = gain * math.sqrt(6 / sum(fans(x)))
    return uniform_(x, -bound, bound)


def test_kaiming_keeps_the_size_of_signals() -> None:
    manual_seed(0)
    x = randn(64, 256)
    for _ in range(20):  # 20 layers of relu; at half the scale they would shrink the signal a million times
        x = (x @ kaiming_normal_(empty(256, 256)).T).maximum(0)
    assert 0.2 < (x * x).mean().item() < 5


def test_bounds_and_fans() -> None:
    weight = kaiming_uniform_(empty(64, 8, 5, 5), a=math.sqrt(5))
    assert fans(weight) == (200, 1600)
    assert 0.95 * 200**-0.5 < weight.abs().amax().item() <= 200**-0.5
    assert_close(xavier_uniform_(empty(300, 300)).std(), 300**-0.5, rtol=0.02)
    assert "(out, in, …)" in message_of(xavier_uniform_, zeros(3), error=ValueError)


# %% [markdown]
# ### Linear
# One operation for product and bias: the sum is written into the fresh product, which saves a pass over memory. Leading
# axes are folded into one, because one large product is faster than many small ones.


# %%
@op
def linear(xp, x, weight, bias=None):
    """x weightᵀ + bias: (…, in), (out, in) and (out,) give (…, out). All of one dtype."""
    if x.shape[-1:] != weight.shape[1:] or x.dtype != weight.dtype:
        raise _linear_error(xp, x, weight)
    flat = x if x.ndim == 2 else xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
    out = flat @ weight.T
    if bias is not None:
        if bias.shape != weight.shape[:1] or bias.dtype != out.dtype:
            given = f"{xp.dtype_name(bias)} {tuple(bias.shape)}"
            raise ValueError(f"linear: expected a {xp.dtype_name(out)} bias {tuple(weight.shape[:1])}, got {given}")
        out += bias
    return out if x.ndim == 2 else xp.reshape(out, (*x.shape[:-1], weight.shape[0]))


def _linear_error(xp: Any, x: Any, weight: Any) -> Exception:
    shapes = f"(input {tuple(x.shape)}, weight {tuple(weight.shape)})"
    if weight.ndim != 2 or not x.ndim:
        return ValueError(f"linear: expected an input (…, in) and a weight (out, in) {shapes}")
    if x.shape[-1] != weight.shape[1]:
        return ValueError(f"linear: input has {x.shape[-1]} features, but the weight takes {weight.shape[1]} {shapes}")
    kind, wanted = xp.dtype_name(x), xp.dtype_name(weight)
    return TypeError(f"linear: input is {kind}, but the weight is {wanted}; input.to({wanted!r}) fits it {shapes}")


class Linear(Module):
    """y = x weightᵀ + bias.

    Args:
        in_features, out_features: the length of the last axis of the input and of the output.
        bias: whether there is one.

    Attributes:
        weight: (out_features, in_features); bias: (out_features,) or None. Both start uniform on ±1/sqrt(in_features).
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"Linear: expected at least 1 feature in and out, got {in_features} and {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(empty(out_features, in_features, dtype=dtype, device=device))
        self.bias = Parameter(empty(out_features, dtype=dtype, device=device)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight and the bias anew."""
        kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def test_linear_against_its_definition() -> None:
    layer = Linear(4, 3)
    for x in (randn(4), randn(6, 4), randn(2, 5, 4)):
        assert_close(layer(x), (x.unsqueeze(-2) * layer.weight).sum(-1) + layer.bias, rtol=1e-4)
    assert layer(zeros(0, 4)).shape == (0, 3)
    assert repr(layer) == "Linear(in_features=4, out_features=3, bias=True)"


def test_linear_names_what_does_not_fit() -> None:
    layer = Linear(784, 10)
    assert message_of(layer, zeros(64, 512), error=ValueError) == (
        "linear: input has 512 features, but the weight takes 784 (input (64, 512), weight (10, 784))"
    )
    assert "input is int64, but the weight is float32" in message_of(layer, zeros(1, 784, dtype=int64), error=TypeError)


# %% [markdown]
# ### Sequential
# Layers in a row. Anything that can be called is a layer, a plain function too; only modules have parameters. The
# layers are ordinary attributes named "0", "1", …, so everything that Module does with attributes works on them.


# %%
class Container(Module):
    """What Sequential, ModuleList and ModuleDict share: layers under names, in order."""

    def __init__(self) -> None:
        super().__init__()
        self._names: list[str] = []

    def add_module(self, name: str, module: Any) -> None:
        """Put a layer at the end, or in the place of the one that has the name."""
        super().add_module(name, module)
        if name not in self._names:
            self._names.append(name)

    def _layers(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self._names}

    def _replace(self, layers: Mapping[str, Any]) -> None:
        """Have these layers and no others."""
        for name in self._names:
            object.__delattr__(self, name)
        self._names = []
        for name, layer in layers.items():
            self.add_module(name, layer)

    def _shown(self) -> list[tuple[str, str]]:
        own = [(name, repr(child)) for name, child in self._own(Module) if name not in self._names]
        return [(name, _name_of(layer)) for name, layer in self._layers().items()] + own

    def __len__(self) -> int:
        return len(self._names)


def _name_of(layer: Any) -> str:
    """A layer's `repr`; a function's is its name, not its address."""
    return repr(layer) if isinstance(layer, Module) else getattr(layer, "__name__", None) or repr(layer)


class Row(Container):
    """Layers that are numbered: indexed, sliced and changed like a list."""

    def __init__(self, layers: Iterable[Any] = ()) -> None:
        super().__init__()
        self.extend(layers)

    def append(self, layer: Any) -> Row:
        self.add_module(str(len(self)), layer)
        return self

    def extend(self, layers: Iterable[Any]) -> Row:
        for layer in layers:
            self.append(layer)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(self._layers().values())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            part = type(self).__new__(type(self))
            Container.__init__(part)
            part._replace(self._sliced(index))
            return part
        return self.__dict__[self._names[index]]

    def _sliced(self, index: slice) -> dict[str, Any]:
        return _numbered(list(self)[index])

    def __setitem__(self, index: int, layer: Any) -> None:
        self.add_module(self._names[index], layer)

    def __delitem__(self, index: int | slice) -> None:
        layers = list(self)
        del layers[index]
        self._replace(_numbered(layers))


def _numbered(layers: Iterable[Any]) -> dict[str, Any]:
    return {str(i): layer for i, layer in enumerate(layers)}


class Sequential(Row):
    """Layers one after the other: Sequential(Linear(4, 8), relu, Linear(8, 2)), or of a dictionary of named layers."""

    def __init__(self, *layers: Any) -> None:
        Container.__init__(self)
        self._replace(layers[0] if len(layers) == 1 and isinstance(layers[0], Mapping) else _numbered(layers))

    def _sliced(self, index: slice) -> dict[str, Any]:
        return dict(list(self._layers().items())[index])  # a part of a network keeps its names

    def forward(self, x: Any) -> Any:
        layers = [y for name in self._names if not getattr(y := self.__dict__[name], "transparent", False) or y._hooks]
        done = False
        for layer, following in itertools.zip_longest(layers, layers[1:]):
            if done:  # together with the layer before it
                done = False
                continue
            fusion = FUSIONS.get(type(layer))
            both = fusion(layer, following) if fusion else None
            x, done = (both or layer)(x), both is not None
        return x


FUSIONS: dict[type, Callable[[Any, Any], Callable | None]] = {}


def attach_fusion(kind: type, fusion: Callable[[Any, Any], Callable | None]) -> None:
    """Have `fusion(layer, following)`, of a layer of just this kind, asked for what does both at once, or None."""
    FUSIONS[kind] = fusion


def test_sequential_runs_in_order_and_names_like_pytorch() -> None:
    net = Sequential(Linear(4, 8), abs, Linear(8, 2))
    x = randn(3, 4)
    assert_close(net(x), net[2](abs(net[0](x))))
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert_close(net[1:](net[:1](x)), net(x))
    net.append(Linear(2, 1))
    del net[0]
    assert [layer.weight.shape for layer in net[1:]] == [(2, 8), (1, 2)]
    assert repr(Sequential({"absolute": abs})) == "Sequential(\n  (absolute): abs\n)"
    assert "write Linear(…)" in message_of(Sequential, Linear, error=TypeError)


# %% [markdown]
# ### Dropout, Flatten
# Dropout exists only while training. It is linear in x, so that the gradient goes through the same operation.


# %%
@op
def drop(xp, x, noise, *, p):
    """0 where the noise, uniform on [0, 1), is below p; x / (1 - p) elsewhere."""
    return x * (xp.astype(noise >= p, x.dtype) * (0.0 if p == 1 else 1 / (1 - p)))


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Each element 0 with probability p, else multiplied by 1 / (1 - p); x itself unless training."""
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p is a probability, between 0 and 1, got {p}")
    if not training or p == 0:
        return x
    if not x.dtype.is_floating_point:
        raise TypeError(f"dropout: expected floats, got {x.dtype}")
    out = drop(x, rand(x.shape, device=x.device, dtype="float32"), p=p)
    return x.copy_(out) if inplace else out


class Dropout(Module):
    """While training, each element 0 with probability p, else multiplied by 1 / (1 - p); in eval mode, x itself."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"Dropout: p is a probability, between 0 and 1, got {p}")
        self.p, self.inplace = p, inplace

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training, self.inplace)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


def unusual(**options: tuple[Any, Any]) -> str:
    """For `extra_repr`, of options that are (value, usual value): a comma and "name=value" for each unusual one."""
    return "".join(f", {name}={value}" for name, (value, usual) in options.items() if value != usual)


class Flatten(Module):
    """The axes from `start_dim` to `end_dim` made one: by default all but the batch."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: Tensor) -> Tensor:
        return flatten(x, self.start_dim, self.end_dim)

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


def test_dropout_keeps_the_mean_and_leaves_eval_alone() -> None:
    manual_seed(3)
    layer, x = Dropout(0.25), ones(200, 200)
    out = layer(x)
    assert sorted(set(out.flatten().tolist())) == [0.0, tensor(4 / 3).item()]
    assert_close(out.mean(), 1.0, atol=0.02)
    assert layer.eval()(x) is x
    assert dropout(x, 1.0).sum().item() == 0
    assert "between 0 and 1, got 1.5" in message_of(Dropout, 1.5, error=ValueError)


def test_flatten_keeps_the_batch() -> None:
    x = randn(2, 3, 4)
    assert Flatten()(x).tolist() == x.reshape(2, 12).tolist()


# %% [markdown]
# ## Systems analysis
#
# A linear layer of width n has n² weights of 4 bytes each. At batch 1 each weight is loaded from memory to be used for
# a single multiplication and addition: the layer runs at the speed of memory. A batch of 64 uses it 64 times, and
# takes far less than 64 times as long. Observers count the operations as they happen.


# %%
def count_flops(network: Module, x: Tensor) -> int:
    """The multiplications and additions in all `linear` operations of one call."""
    total = 0

    def observer(operation, arrays, attributes, proceed):
        nonlocal total
        if operation.name.removesuffix("_relu") == "linear":  # it may come in one with its ReLU
            total += 2 * math.prod(arrays[0].shape) * arrays[1].shape[0]
        return proceed()

    with observe(observer):
        network(x)
    return total


def analyze() -> None:
    """Measure parameters, bytes, operations and seconds of two-layer networks as their width grows."""
    rows = []
    for width in (16, 128, 1024):
        network = Sequential(Linear(784, width), Linear(width, 10)).eval()
        parameters = sum(p.numel() for p in network.parameters())
        size = sum(p.numel() * p.dtype.itemsize for p in network.parameters())
        for batch in (1, 64):
            x = randn(batch, 784)
            taken, flops = seconds(network, x), count_flops(network, x)
            rows.append([width, parameters, size, batch, flops, taken * 1e6, flops / taken / 1e9])
    print_table(["width", "parameters", "bytes", "batch", "FLOPs", "microseconds", "GFLOP/s"], rows)
    print()
    x, layer = randn(1, 4), Linear(4, 4)
    calls = {"x @ weight.T + bias": lambda: x @ layer.weight.T + layer.bias, "layer(x)": lambda: layer(x)}
    calls |= {"linear(x, weight, bias)": lambda: linear(x, layer.weight, layer.bias)}
    print_table(["of 4 features", "microseconds"], [[name, seconds(call) * 1e6] for name, call in calls.items()])


# %% [markdown]
# ## Production context
#
# `torch.nn.Module` keeps its parts in three dictionaries (`_parameters`, `_buffers`, `_modules`) and finds them through
# `__getattr__`; ours stay in the object's own `__dict__`. Its `state_dict` has the same names and shapes as ours, so
# weights go from one to the other. It has further hooks (`register_forward_pre_hook`, `register_state_dict_pre_hook`),
# lazy layers that learn their input's size from the first batch, and `torch.nn.utils.parametrize`. `F.linear` is there
# `addmm`: product and bias in one kernel. At scale the state does not fit one file or one machine: `torch.distributed`
# shards it, and `device="meta"` builds a network without allocating it.

# %% [markdown]
# ## Integration testing


# %%
def test_a_network_is_built_copied_and_carried_over() -> None:
    class Net(Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Sequential(Flatten(), Linear(12, 16), lambda x: x.maximum(0), Dropout(0.5))
            self.head = Linear(16, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    manual_seed(1)
    first, second, x = Net().eval(), Net().eval(), randn(6, 3, 4)
    assert sum(p.numel() for p in first.parameters()) == 12 * 16 + 16 + 16 * 5
    second.load_state_dict(first.state_dict())
    assert second(x).tolist() == first(x).tolist()
    twin = copy.deepcopy(first)
    overwrite(twin.head.weight, 0)
    assert (twin(x).abs().sum().item(), first(x).tolist()) == (0, second(x).tolist())
    assert count_flops(first, x) == 2 * 6 * (12 * 16 + 16 * 5)


# %% [markdown]
# ## Thinking questions
#
# 1. Why is `weight` kept as (out, in), when the product needs its transpose? What does the transpose cost?
# 2. From the table: at which batch size does a layer of width 1024 stop being limited by memory on this machine?
# 3. Two layers share one weight. What must `parameters()`, `state_dict()` and `to()` each do about it, and why do the
#    answers differ?
# 4. `load_state_dict` copies into the existing memory, instead of replacing the arrays. Who would notice?
# 5. A network of 50 layers has weights that are 10 % too large. By how much is its output too large? And in float16?

# %% [markdown]
# ## Summary
#
# A module is a tree of named parameters with a `forward`; the names are its interface to files and other frameworks.
# Module 05 says in one number how wrong its answers are.


if __name__ == "__main__":
    run_module(globals())
