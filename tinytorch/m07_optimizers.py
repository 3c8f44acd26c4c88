"""Module 07: optimizers, or how far to go once the direction is known.

Learning objectives. After this module you can
1. write SGD with momentum, Adam and AdamW from their formulas, and say what each remembers of the past;
2. update millions of numbers without allocating a single array;
3. give groups of parameters options of their own, and save and restore an optimizer in the middle of training;
4. warm a learning rate up and let it decay, by schedules that can be chained;
5. clip gradients, and measure what a step costs in memory, time and traffic.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from tinytorch.backends import Backend, backend_of
from tinytorch.m01_setup import assert_close, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import Tensor, randn, stack, tensor, to
from tinytorch.m02_tensor_appendix import Writes, clamp, norm
from tinytorch.m04_layers import Linear, Parameter
from tinytorch.m06_autograd import enable_grad, no_grad

Array = Any

# %% [markdown]
# ## Mathematical foundations
#
# With $g_t$ the gradient of the loss at the parameters $w_t$ and $\eta$ the learning rate:
#
# **Gradient descent** goes straight downhill, $w_{t+1} = w_t - \eta\, g_t$. In a long valley it swings
# between the walls.
#
# **Momentum** sums the gradients of the past, so that swings cancel and what they agree on adds up:
# $b_t = \mu\, b_{t-1} + g_t$ and $w_{t+1} = w_t - \eta\, b_t$. *Nesterov's* form looks one step ahead: it subtracts
# $\eta (g_t + \mu\, b_t)$. A constant gradient is amplified $1 / (1 - \mu)$ times.
#
# **Adam** keeps two running means for each parameter, of gradients and of their squares, and divides one by the root of
# the other, so that each parameter gets a step of about $\eta$ whatever the scale of its gradients:
#
# $$m_t = m_{t-1} + (1 - \beta_1)(g_t - m_{t-1}), \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2,$$
# $$w_{t+1} = w_t - \eta\, \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}.$$
#
# Both means start at zero and are too small at first; dividing by $1 - \beta^t$ corrects exactly that.
#
# **Weight decay** pulls parameters towards zero. As a penalty $\frac{\lambda}{2} w^2$ it adds $\lambda w$ to the
# gradient, and Adam then divides it by $\sqrt{v}$ like everything else. **AdamW** keeps it out of the means:
# $w \leftarrow (1 - \eta \lambda)\, w$ before the step.
#
# **Clipping** bounds the length of all gradients together: $g \leftarrow g \cdot \min(1, c / \|g\|)$.

# %% [markdown]
# ## Implementation
#
# ### Updating in place
# An update reads and writes whole arrays, and its arithmetic is trivial: what it costs is traffic between memory and
# processor. A new array for each intermediate result would add to that, and the operating system would have to supply
# its pages. So rules write over what they no longer need: `+=`, `*=` and the like, and `into`, which puts a function's
# result in a scratch array that is kept from step to step.


# %%
def into(out: Array, function: Callable, *inputs: Any) -> Array:
    """function(*inputs), written over `out`: directly where the array library has `out=`, else by a copy."""
    try:
        function(*inputs, out=out)
    except TypeError:
        out[...] = function(*inputs)
    return out


class Scratch:
    """Arrays to be overwritten at will. All parameters of one shape and dtype share them."""

    def __init__(self) -> None:
        self.arrays: dict[tuple, Array] = {}

    def like(self, xp: Backend, array: Array, number: int = 0) -> Array:
        """The first (second …) scratch array that is like `array`."""
        key = (xp, array.shape, array.dtype, number)
        if key not in self.arrays:
            self.arrays[key] = xp.empty_like(array)
        return self.arrays[key]


def test_into_writes_over_the_given_array() -> None:
    x = tensor([1.0, 4.0, 9.0]).data
    xp, scratch = backend_of(x), Scratch()
    root = into(scratch.like(xp, x), xp.sqrt, x)
    assert root is scratch.like(xp, x)
    assert root is not scratch.like(xp, x, 1)
    assert_close(root, [1, 2, 3])


# %% [markdown]
# ### Parameters and their options
# Not everything should learn alike: a pretrained body wants smaller steps than a new head, and biases no weight decay.
# So an optimizer holds *groups*, dictionaries of parameters and options. Options that a group does not name come from
# the optimizer's defaults. They are looked up at each step: whoever changes `group["lr"]` changes the next step.


# %%
NOT_NEGATIVE = ("lr", "momentum", "weight_decay", "eps", "alpha", "lr_decay", "initial_accumulator_value")


def check_options(owner: str, options: dict[str, Any]) -> None:
    """Raise ValueError for options of an optimizer that lie outside their range; nan lies outside of any."""
    for name in NOT_NEGATIVE:
        if name in options and not options[name] >= 0:
            raise ValueError(f"{owner}: {name} must be 0 or more, not {options[name]!r}")
    for beta in options.get("betas", ()):
        if not 0 <= beta < 1:
            raise ValueError(f"{owner}: both betas must lie in [0, 1), got {options['betas']!r}")
    if options.get("nesterov") and (options["momentum"] == 0 or options["dampening"] != 0):
        raise ValueError(
            f"{owner}: nesterov needs momentum > 0 and dampening 0, "
            f"got momentum {options['momentum']} and dampening {options['dampening']}"
        )


def check_parameter(owner: str, p: Any) -> None:
    """Raise for what cannot be optimized. A frozen Parameter can: it has no gradient, and is passed over."""
    if not isinstance(p, Tensor):
        raise TypeError(f"{owner}: expected tensors to optimize, got {type(p).__name__} {str(p)[:60]}")
    if not p.dtype.is_floating_point:
        raise TypeError(f"{owner}: only tensors of floats can be optimized, not {p.dtype} of shape {p.shape}")
    if not p.is_leaf:
        raise ValueError(
            f"{owner}: a tensor of shape {p.shape} is the result of an operation; give the tensors that it was "
            "computed from, or its .detach().requires_grad_()"
        )
    if not p.watched and not isinstance(p, Parameter):
        raise ValueError(
            f"{owner}: a tensor of shape {p.shape} does not require grad and would never change; create it with "
            "requires_grad=True"
        )


def named(owner: str, params: Any) -> tuple[list[Any], list[str]]:
    """Parameters and their names; no names if they come without."""
    if isinstance(params, set):
        raise TypeError(f"{owner}: a set has no order that a saved state could rely on; give a list of parameters")
    params = [params] if isinstance(params, Tensor) else list(params)
    names = [p[0] for p in params if isinstance(p, tuple)]
    if names and len(names) != len(params):
        raise ValueError(f"{owner}: {len(names)} of {len(params)} parameters have names; name all of them or none")
    return [p[1] if isinstance(p, tuple) else p for p in params], names


def test_options_out_of_range_are_refused() -> None:
    message = message_of(check_options, "Adam", {"betas": (0.9, 1.0)}, error=ValueError)
    assert message == "Adam: both betas must lie in [0, 1), got (0.9, 1.0)"
    assert "lr must be 0 or more, not -0.1" in message_of(check_options, "SGD", {"lr": -0.1}, error=ValueError)
    squared = tensor([3.0], requires_grad=True) * 2
    assert "result of an operation" in message_of(check_parameter, "SGD", squared, error=ValueError)


# %% [markdown]
# ### The base
# All optimizers share the walk over groups and parameters, weight decay, and saving. What they remember of a parameter
# stands in `state[p]` and is made at the parameter's first step; a parameter without a gradient is passed over. A
# subclass only says what happens to one parameter: `update`.


# %%
class Optimizer:
    """The base of all optimizers. A subclass implements `update`, or the whole of `step`.

    Args:
        params: tensors, (name, tensor) pairs, or dicts: {"params": …, "lr": …}, each a group with its own options.
        defaults: the options of groups that do not name them.

    Attributes:
        param_groups: the groups; changing an option in one changes the next step.
        state: what is remembered of each parameter.
        keeps: names of what a subclass always remembers; a saved state without them is refused.
        together: functions that take an optimizer of this very class, a group and those of its parameters that have
            gradients, update as many as they can at once, and return the others.
    """

    keeps: tuple[str, ...] = ()
    together: ClassVar[dict[type[Optimizer], Callable]] = {}

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        owner = type(self).__name__
        if isinstance(params, (Tensor, set)):  # a set has no order that a saved state could rely on
            raise TypeError(f"{owner}: expected a list of tensors or of groups, got a {type(params).__name__}")
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self.scratch = Scratch()
        params = list(params)
        if not params:
            raise ValueError(f"{owner}: the parameter list is empty; was an iterator used up, or a model without any?")
        for group in params if isinstance(params[0], dict) else [{"params": params}]:
            self.add_param_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Optimize more parameters, with options of their own: {"params": …, "lr": …}."""
        owner = type(self).__name__
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"{owner}: a group is a dict with 'params' in it, not {str(param_group)[:60]}")
        params, names = named(owner, param_group["params"])
        seen = {id(p) for group in self.param_groups for p in group["params"]}
        for p in params:
            check_parameter(owner, p)
            if id(p) in seen:
                raise ValueError(f"{owner}: a parameter of shape {p.shape} is given twice; it would be updated twice")
            seen.add(id(p))
        group = {**self.defaults, **param_group, "params": params, **({"param_names": names} if names else {})}
        check_options(owner, group)
        for p in params:
            p.data = backend_of(p.data).asarray(p.data)  # NumPy's scalars, made arrays that can be written into
        self.param_groups.append(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or write zeros into them."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = None if set_to_none else p.grad.zero_()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update each parameter that has a gradient. A `closure` computes them first, and its result is returned."""
        loss = None
        if closure is not None:
            with enable_grad():
                loss = closure()
        at_once = self.together.get(type(self))
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in at_once(self, group, parameters) if at_once else parameters:
                self._step_one(p, p.grad.data, group)
        return loss

    def _step_one(self, p: Tensor, grad: Array, group: dict[str, Any]) -> None:
        parameter, xp = p.data, backend_of(p.data)
        if grad.shape != parameter.shape:
            raise ValueError(f"{type(self).__name__}: a parameter of shape {p.shape} has a grad of {tuple(grad.shape)}")
        decay, maximize = group.get("weight_decay", 0), group.get("maximize", False)
        if decay and group.get("decoupled_weight_decay"):
            parameter *= 1 - group["lr"] * decay
            decay = 0
        if decay or maximize:
            grad = _penalized(xp, parameter, grad, self.scratch.like(xp, parameter, 1), decay, maximize)
        self.update(xp, parameter, grad, self.state[p], self.scratch.like(xp, parameter), group)
        Writes.note(parameter)

    def update(self, xp: Backend, parameter: Array, grad: Array, state: dict, scratch: Array, group: dict) -> None:
        """Change one parameter and its state in place; `scratch` is an array like it to be overwritten at will."""
        raise NotImplementedError(f"{type(self).__name__} must implement update, or step")

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on, in PyTorch's layout: state by the parameter's number, groups with those numbers.

        The tensors in it are the optimizer's own, not copies.
        """
        number = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        groups = [{**group, "params": [number[id(p)] for p in group["params"]]} for group in self.param_groups]
        return {"state": {number[id(p)]: dict(s) for p, s in self.state.items() if s}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over (a copy of) what `state_dict` returned, from an optimizer of parameters of the same shapes.

        Its numbers and lists may have been through JSON. Nothing is changed if something does not fit.
        """
        owner, saved_groups = type(self).__name__, state_dict["param_groups"]
        have, saved = ([len(group["params"]) for group in groups] for groups in (self.param_groups, saved_groups))
        if have != saved:
            raise ValueError(f"{owner}: the saved state is of groups of {saved} parameters; this one has {have}")
        numbers = [int(i) for group in saved_groups for i in group["params"]]
        numbered = dict(zip(numbers, (p for group in self.param_groups for p in group["params"]), strict=True))
        state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for i, values in state_dict["state"].items():
            if int(i) not in numbered:
                raise ValueError(f"{owner}: the saved state of parameter {i} belongs to no group of it")
            missing = [name for name in self.keeps if name not in values]
            if missing:
                raise ValueError(f"{owner}: the saved state of parameter {i} lacks {', '.join(missing)}; whose is it?")
            p, what = numbered[int(i)], f"{owner}: the saved state of parameter {i}"
            state[p] = {name: _fitted(what, p, name, value) for name, value in values.items()}
        for saved_group in saved_groups:
            check_options(owner, {**self.defaults, **saved_group})
        self.state = state
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            options = {name: saved_group[name] for name in saved_group if name not in ("params", "param_names")}
            group.update({name: tuple(v) if isinstance(v, list) else v for name, v in options.items()})

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            lines += [f"    {name}: {group[name]}" for name in sorted(group) if name not in ("params", "param_names")]
        return "\n".join([*lines, ")"])


def _penalized(xp: Backend, parameter: Array, grad: Array, out: Array, decay: float, maximize: bool) -> Array:
    """The gradient (its negative, to maximize) plus that of decay / 2 times the sum of squares, in `out`."""
    if decay:
        into(out, xp.multiply, parameter, decay)
    else:
        out[...] = 0
    return into(out, xp.subtract if maximize else xp.add, out, grad)


def _fitted(what: str, p: Tensor, name: str, value: Any) -> Any:
    """A saved value as the state of p: a copy in its dtype and on its device; ValueError for another shape."""
    if name == "step":
        return int(value)
    if not isinstance(value, Tensor):
        return value
    if value.shape != p.shape:
        raise ValueError(f"{what}, {name}, has shape {value.shape}, the parameter {p.shape}")
    return to(value.detach(), dtype=p.dtype, device=p.device).clone()


# %% [markdown]
# ### SGD
# One gradient, one step; with momentum, one array to remember. The first velocity is the gradient itself, undampened.


# %%
class SGD(Optimizer):
    """Stochastic gradient descent, with momentum (Nesterov's too) and weight decay as a penalty.

    Raises:
        ValueError: an option is out of range, or Nesterov's form without momentum or with dampening.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0, dampening: float = 0,
        weight_decay: float = 0, nesterov: bool = False, *, maximize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize,
        })  # fmt: skip

    def recall(self, xp: Backend, parameter: Array, state: dict, group: dict) -> tuple[Array | None, float]:
        """The velocity, which is made at the first step, and how much it is dampened in this one."""
        if not group["momentum"]:
            return None, 0
        if state.get("momentum_buffer") is not None:
            return state["momentum_buffer"].data, group["dampening"]
        state["momentum_buffer"] = Tensor(xp.zeros_like(parameter))
        return state["momentum_buffer"].data, 0

    def update(self, xp: Backend, parameter: Array, grad: Array, state: dict, scratch: Array, group: dict) -> None:
        velocity, dampening = self.recall(xp, parameter, state, group)
        _sgd(xp, parameter, grad, velocity, scratch, group["lr"], group["momentum"], dampening, group["nesterov"])


def _sgd(
    xp: Backend, parameter: Array, grad: Array, velocity: Array | None, scratch: Array,
    lr: float, momentum: float, dampening: float, nesterov: bool,
) -> None:  # fmt: skip
    """velocity = momentum velocity + (1 - dampening) grad; parameter -= lr velocity."""
    if velocity is not None:
        velocity *= momentum
        velocity += into(scratch, xp.multiply, grad, 1 - dampening) if dampening else grad
        if nesterov:
            into(scratch, xp.multiply, velocity, momentum)
            scratch += grad
            grad = scratch
        else:
            grad = velocity
    parameter -= into(scratch, xp.multiply, grad, lr)


def test_momentum_amplifies_a_constant_gradient() -> None:
    w = tensor([1.0], requires_grad=True)
    optimizer = SGD([w], lr=0.1, momentum=0.25)
    w.grad = tensor([2.0])
    for expected in (1 - 0.1 * 2, 1 - 0.1 * (2 + 2.5), 1 - 0.1 * (2 + 2.5 + 2.625)):  # velocities 2, 2 + 2/4, 2 + 2.5/4
        optimizer.step()
        assert_close(w, [expected])


def test_parameters_keep_their_memory_and_those_without_gradient_their_values() -> None:
    used, unused = tensor([1.0], requires_grad=True), tensor([1.0], requires_grad=True)
    array, optimizer = used.data, SGD([{"params": [unused]}, {"params": [used]}], lr=0.5)
    (used * 3).sum().backward()
    optimizer.step()
    assert used.data is array
    assert (used.item(), unused.item()) == (-0.5, 1.0)
    optimizer.zero_grad()
    assert used.grad is None


# %% [markdown]
# ### Adam and AdamW
# Two arrays to remember, so three numbers are kept for each number that is trained. The corrections of both means are
# the same for all elements: they go into the two numbers `rate` and `epsilon` and cost no pass over the arrays.


# %%
class Adam(Optimizer):
    """Adaptive moments (Kingma and Ba, 2015): a step of about `lr`, whatever the scale of the gradients.

    Args:
        betas: how much of the running means of gradients and of their squares stays at each step.
        amsgrad: divide by the largest mean of squares so far, not the current one.
        decoupled_weight_decay: AdamW's weight decay instead of a penalty.
    """

    keeps = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0, amsgrad: bool = False, *, maximize: bool = False, decoupled_weight_decay: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {
            "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "decoupled_weight_decay": decoupled_weight_decay,
        })  # fmt: skip

    def recall(self, xp: Backend, parameter: Array, state: dict, group: dict) -> tuple[Any, ...]:
        """Both means and the largest square, which are made at the first step, and the rate and epsilon of this one."""
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = (Tensor(xp.zeros_like(parameter)) for _ in range(2))
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = Tensor(xp.zeros_like(parameter))
        state["step"] += 1
        (beta1, beta2), t = group["betas"], state["step"]
        correction = math.sqrt(1 - beta2**t)
        largest = state["max_exp_avg_sq"].data if group["amsgrad"] else None
        rate, epsilon = group["lr"] * correction / (1 - beta1**t), group["eps"] * correction
        return state["exp_avg"].data, state["exp_avg_sq"].data, largest, rate, epsilon

    def update(self, xp: Backend, parameter: Array, grad: Array, state: dict, scratch: Array, group: dict) -> None:
        mean, square, largest, rate, epsilon = self.recall(xp, parameter, state, group)
        beta1, beta2 = group["betas"]
        _adam(xp, parameter, grad, mean, square, largest, scratch, rate, beta1, beta2, epsilon)


def _adam(
    xp: Backend, parameter: Array, grad: Array, mean: Array, square: Array, largest: Array | None, scratch: Array,
    rate: float, beta1: float, beta2: float, epsilon: float,
) -> None:  # fmt: skip
    """mean += (1 - beta1) (grad - mean); square = beta2 square + (1 - beta2) grad²;
    parameter -= rate mean / (sqrt(square) + epsilon), or of the largest square so far.
    """
    into(scratch, xp.subtract, grad, mean)
    scratch *= 1 - beta1
    mean += scratch

    into(scratch, xp.multiply, grad, grad)
    scratch *= 1 - beta2
    square *= beta2
    square += scratch

    into(scratch, xp.sqrt, square if largest is None else into(largest, xp.maximum, largest, square))
    scratch += epsilon
    into(scratch, xp.divide, mean, scratch)
    scratch *= rate
    parameter -= scratch


class AdamW(Adam):
    """Adam whose weight decay shrinks the parameters directly (Loshchilov and Hutter, 2019)."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, decoupled_weight_decay=True
        )  # fmt: skip


def test_the_first_step_of_adam_has_the_length_lr() -> None:
    w = tensor([1.0, 1.0, 1.0], requires_grad=True)
    optimizer = Adam([w], lr=0.01)
    w.grad = tensor([1e-3, -1.0, 1e3])
    optimizer.step()
    assert_close(w, [0.99, 1.01, 0.99], rtol=1e-5)


def test_adam_follows_its_formula() -> None:
    w, m, v, rates = tensor([0.5], requires_grad=True), 0.0, 0.0, 0.1
    optimizer, expected = Adam([w], lr=rates, betas=(0.8, 0.9)), 0.5
    for t, g in enumerate((1.0, -3.0, 0.25, 2.0), start=1):
        w.grad = tensor([g])
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        expected -= rates * (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.9**t)) + 1e-8)
        assert_close(w, [expected])


def test_adamw_decays_what_has_no_slope() -> None:
    w = tensor([2.0], requires_grad=True)
    w.grad = tensor([0.0])
    AdamW([w], lr=0.1, weight_decay=0.5).step()
    assert_close(w, [2.0 * (1 - 0.1 * 0.5)])


def test_a_restored_optimizer_goes_on_as_the_saved_one() -> None:
    first, second = (tensor([1.0, -2.0], requires_grad=True) for _ in range(2))
    saved, restored = Adam([first], lr=0.1), Adam([second])
    for w, optimizer in ((first, saved), (first, saved), (second, restored)):
        if w is second:
            w.data[...] = first.data
            restored.load_state_dict(saved.state_dict())
        w.grad = tensor([0.3, 4.0])
        optimizer.step()
    saved.step()
    assert_close(second, first, rtol=0, atol=0)


# %% [markdown]
# ### Learning-rate schedules
# A good rate is large at first and small at the end. A schedule is stepped after the optimizer, once per epoch or per
# batch, and writes the next rate into the groups. Most rules say how the rate changes *from one epoch to the next*; so
# two schedules of one optimizer multiply, and a rate that someone changes by hand stays changed.


# %%
class LRScheduler:
    """The base of schedules. A subclass implements `get_lr`: the rates of all groups at `last_epoch`.

    Args:
        optimizer: whose groups it writes into. The first rates are written at once.
        last_epoch: the epoch that was last seen; -1 starts anew.
    """

    needs_metric = False  # whether `step` wants to be told how well the training goes

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(self).__name__}: expected an optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        for i, group in enumerate(optimizer.param_groups):
            if last_epoch == -1:
                group.setdefault("initial_lr", group["lr"])
            elif "initial_lr" not in group:
                raise KeyError(
                    f"{type(self).__name__}: group {i} has no 'initial_lr', which last_epoch={last_epoch} relies on; "
                    "load the optimizer's state first"
                )
        self.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        self.last_epoch = last_epoch
        self._start()

    def get_lr(self) -> list[float]:
        raise NotImplementedError(f"{type(self).__name__} must implement get_lr")

    def get_last_lr(self) -> list[float]:
        """The rates that were last set, one for each group."""
        return self._last_lr

    def step(self) -> None:
        """Go on to the next epoch; call it after the optimizer's step."""
        self.last_epoch += 1
        self._write(self.get_lr())

    def _start(self) -> None:
        """Write the rates of the first epoch: nothing has changed yet, where `get_lr` speaks of changes."""
        self._starting = True
        self.step()
        self._starting = False

    def _write(self, rates: Sequence[float]) -> None:
        groups = self.optimizer.param_groups
        if len(rates) != len(groups):
            raise ValueError(f"{type(self).__name__} was made for {len(rates)} groups, the optimizer has {len(groups)}")
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr
        self._last_lr = list(rates)

    def _rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, as JSON can hold it."""
        return {name: value for name, value in vars(self).items() if name != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. The rates are in the groups, which the optimizer's state holds."""
        vars(self).update(state_dict)


# %% [markdown]
# Stairs, a cosine, a line. The cosine in one piece is $\eta_t = \eta_{min} + \frac{1}{2}(\eta_0 - \eta_{min})
# (1 + \cos \pi t / T)$; written as a factor on the rate before it, it can be chained.


# %%
class StepLR(LRScheduler):
    """The rate times `gamma` every `step_size` epochs."""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1) -> None:
        if step_size < 1:
            raise ValueError(f"StepLR: step_size must be at least 1, not {step_size}")
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        factor = self.gamma if self.last_epoch > 0 and self.last_epoch % self.step_size == 0 else 1
        return [lr * factor for lr in self._rates()]


class CosineAnnealingLR(LRScheduler):
    """Half a cosine from the initial rate down to `eta_min` in `T_max` epochs, and up again."""

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1) -> None:
        if T_max < 1:
            raise ValueError(f"CosineAnnealingLR: T_max must be at least 1, not {T_max}")
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        before, now = (1 + math.cos(math.pi * t / self.T_max) for t in (self.last_epoch - 1, self.last_epoch))
        if self._starting:
            return self._rates()
        if (self.last_epoch - 1 - self.T_max) % (2 * self.T_max) == 0:  # at the bottom, where no factor leads away from
            return [
                lr + (base - self.eta_min) * (1 - math.cos(math.pi / self.T_max)) / 2
                for base, lr in zip(self.base_lrs, self._rates(), strict=True)
            ]
        return [now / before * (lr - self.eta_min) + self.eta_min for lr in self._rates()]


class LinearLR(LRScheduler):
    """The rate times a factor that goes from `start_factor` to `end_factor` in `total_iters` steps: a warm-up."""

    def __init__(
        self, optimizer: Optimizer, start_factor: float = 1 / 3, end_factor: float = 1.0, total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:  # fmt: skip
        if not 0 < start_factor <= 1 or not 0 <= end_factor <= 1:
            raise ValueError(
                f"LinearLR: start_factor must lie in (0, 1] and end_factor in [0, 1], got {start_factor}, {end_factor}"
            )
        self.start_factor, self.end_factor, self.total_iters = start_factor, end_factor, total_iters
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        if self.last_epoch == 0:
            return [lr * self.start_factor for lr in self._rates()]
        if self._starting or self.last_epoch > self.total_iters:
            return self._rates()
        rise = self.end_factor - self.start_factor
        factor = 1 + rise / (self.total_iters * self.start_factor + (self.last_epoch - 1) * rise)
        return [lr * factor for lr in self._rates()]


class SequentialLR(LRScheduler):
    """One schedule after the other: the next one begins, at its own epoch 0, at each of the milestones."""

    def __init__(
        self, optimizer: Optimizer, schedulers: Sequence[LRScheduler], milestones: Sequence[int], last_epoch: int = -1
    ) -> None:
        if not schedulers or len(milestones) != len(schedulers) - 1:
            raise ValueError(
                f"SequentialLR: {len(schedulers)} schedulers need {max(len(schedulers) - 1, 0)} milestones between "
                f"them, got {len(milestones)}"
            )
        for i, scheduler in enumerate(schedulers):
            if scheduler.optimizer is not optimizer:
                raise ValueError(f"SequentialLR: scheduler {i} belongs to another optimizer")
            if scheduler.needs_metric:
                raise ValueError(f"SequentialLR: scheduler {i} is a {type(scheduler).__name__}, which needs a metric")
        self.optimizer, self.schedulers, self.milestones = optimizer, list(schedulers), list(milestones)
        self.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        self.last_epoch = last_epoch
        self._start()

    def _start(self) -> None:
        self.last_epoch += 1
        self._begin(self._current(), self.base_lrs)

    def step(self) -> None:
        self.last_epoch += 1
        scheduler = self._current()
        if self.last_epoch in self.milestones:
            self._begin(scheduler, scheduler.base_lrs)
        else:
            scheduler.step()
            self._last_lr = scheduler.get_last_lr()

    def _current(self) -> LRScheduler:
        return self.schedulers[bisect_right(self.milestones, self.last_epoch)]

    def _begin(self, scheduler: LRScheduler, rates: Sequence[float]) -> None:
        self._write(rates)
        scheduler.last_epoch = -1
        scheduler._start()
        self._last_lr = scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "schedulers": [scheduler.state_dict() for scheduler in self.schedulers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for scheduler, saved in zip(self.schedulers, state_dict["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        vars(self).update({name: value for name, value in state_dict.items() if name != "schedulers"})


def rates_of(scheduler: LRScheduler, steps: int) -> list[float]:
    """The rates of the first group in the epochs 0 … steps. For tests and pictures."""
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(steps):
        scheduler.step()
        rates += scheduler.get_last_lr()[:1]
    return rates


def test_schedules_follow_their_formulas() -> None:
    def optimizer() -> SGD:
        return SGD([tensor([1.0], requires_grad=True)], lr=0.5)

    assert_close(rates_of(StepLR(optimizer(), step_size=2), 4), [0.5, 0.5, 0.05, 0.05, 0.005])
    cosine = [0.1 + 0.4 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(7)]
    assert_close(rates_of(CosineAnnealingLR(optimizer(), T_max=4, eta_min=0.1), 6), cosine)
    assert_close(rates_of(LinearLR(optimizer(), 0.2, total_iters=4), 5), [0.1, 0.2, 0.3, 0.4, 0.5, 0.5])


def test_a_warm_up_before_a_cosine() -> None:
    optimizer = SGD([tensor([1.0], requires_grad=True)], lr=1.0)
    schedules = [LinearLR(optimizer, 0.25, total_iters=3), CosineAnnealingLR(optimizer, T_max=4)]
    rates = rates_of(SequentialLR(optimizer, schedules, milestones=[3]), 7)
    assert_close(rates, [0.25, 0.5, 0.75] + [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(5)])
    assert optimizer.param_groups[0]["lr"] == rates[-1]


# %% [markdown]
# ### Clipping
# One bad batch can have a gradient a hundred times the usual length, and one step along it can undo an hour of
# training. Clipping by the norm of *all* gradients together keeps the direction.


# %%
def length(x: Tensor, p: float = 2.0) -> Tensor:
    """The p-norm of all elements; for p = 2 as a product of the tensor with itself, one pass in BLAS."""
    flat = x.reshape(-1)
    return (flat @ flat).sqrt() if p == 2 else norm(flat, p)


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale all gradients, in place, so that their joint norm is at most `max_norm`; returns the norm before.

    Args:
        norm_type: the p of the norm; `inf` is the largest absolute value.

    Raises:
        RuntimeError: with `error_if_nonfinite`, the norm is infinite or nan.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return tensor(0.0)
    with no_grad():
        norms = [to(length(grad, float(norm_type)), grads[0]) for grad in grads]
        total = length(stack(norms), float(norm_type))
        if error_if_nonfinite and not math.isfinite(total.item()):
            raise RuntimeError(f"clip_grad_norm_: the gradients have norm {total.item()}, which no scale can bound")
        scale = clamp(float(max_norm) / (total + 1e-6), max=1.0)
    for grad in grads:
        array = grad.data
        array *= to(scale, grad).data
        Writes.note(array)
    return total


def test_clipping_keeps_the_direction() -> None:
    a, b = tensor([0.0, 0.0], requires_grad=True), tensor(0.0, requires_grad=True)
    a.grad, b.grad = tensor([3.0, 0.0]), tensor(4.0)
    assert_close(clip_grad_norm_([a, b], max_norm=10.0), 5.0)
    assert_close(a.grad, [3, 0])  # short enough: left alone
    assert_close(clip_grad_norm_([a, b], max_norm=1.0), 5.0)
    assert_close(a.grad, [0.6, 0])
    assert_close(b.grad, 0.8)


# %% [markdown]
# ## Systems analysis
#
# The arithmetic of a step is nothing; what must be moved is known. SGD reads parameter and gradient and writes the
# parameter: 12 bytes for a float32. Adam moves 28. The bandwidth in the last column counts these bytes only: as long
# as all arrays lie in a cache it is high; written as a dozen passes, Adam moves several times what it must. One loop
# that does all the work on an element at once, a *fused kernel*, would not: module 16 writes it.


# %%
def analyze() -> None:
    """Measure what optimizers remember, how long a step takes, and how much of the traffic was needed."""
    rows = []
    for size in (10_000, 100_000, 1_000_000):
        for name, make in (
            ("SGD", lambda p: SGD(p)),
            ("SGD, momentum", lambda p: SGD(p, momentum=0.9)),
            ("AdamW", lambda p: AdamW(p)),
        ):
            w = randn(size, requires_grad=True)
            w.grad = randn(size)
            optimizer = make([w])
            taken = seconds(optimizer.step)
            kept = sum(x.nbytes for x in optimizer.state[w].values() if isinstance(x, Tensor))
            moved = 3 * w.nbytes + 2 * kept  # parameter and state are read and written, the gradient is read
            rows.append([name, size, kept / size, 1e6 * taken, 1e9 * taken / size, moved / size, moved / taken / 1e9])
    headers = ["optimizer", "parameters", "state, bytes each", "µs a step", "ns each", "bytes moved each", "GB/s"]
    print_table(headers, rows)


# %% [markdown]
# ## Production context
#
# `torch.optim` has the same classes, options, `param_groups` and `state_dict`. Its update of all parameters is one of
# three: a loop like ours (`foreach=False`), lists of tensors handed to one kernel each (`foreach=True`, the default on
# CUDA), or one kernel for everything (`fused=True`), which is to ours what module 16's will be. Large models shard the
# state over machines (`ZeroRedundancyOptimizer`, FSDP), because Adam's two means outweigh the model, or keep it in 8
# bits (bitsandbytes). Here are left out: `LBFGS`, `Adafactor`, `Muon` and other rarer ones, sparse and complex
# gradients, `capturable` for CUDA graphs, `differentiable`, hooks, and a learning rate that is itself a tensor.

# %% [markdown]
# ## Integration testing
#
# Layers, loss, backward, optimizer and schedule together: a line with noise has a known best fit, the least squares'.


# %%
def test_a_layer_finds_the_least_squares_line() -> None:
    from tinytorch.m01_setup import manual_seed
    from tinytorch.m05_losses import mse_loss

    manual_seed(0)
    x = randn(64, 1)
    y = 3 * x - 1 + 0.1 * randn(64, 1)
    layer = Linear(1, 1)
    optimizer = AdamW(layer.parameters(), lr=0.3, weight_decay=0)
    scheduler = CosineAnnealingLR(optimizer, T_max=150)
    for _ in range(150):
        optimizer.zero_grad()
        mse_loss(layer(x), y).backward()
        optimizer.step()
        scheduler.step()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert_close(layer.weight, slope.reshape(1, 1), rtol=1e-3)
    assert_close(layer.bias, (y.mean() - slope * x.mean()).reshape(1), rtol=1e-3)


# %% [markdown]
# ## Thinking questions
#
# 1. A model has 7 billion parameters in float16. How much memory do Adam's means take in float32, and what else must
#    lie beside them? What does SGD with momentum need?
# 2. From the table: at which size does the time for each parameter jump, and which cache is that?
# 3. With `weight_decay` as a penalty, which parameters does Adam shrink most: those with large or small gradients?
# 4. The scratch array is shared by all parameters of one shape. What would have to change if two threads updated two
#    parameters at once?
# 5. Why is clipping by the norm of all gradients together different from clipping each gradient by its own?

# %% [markdown]
# ## Summary
#
# You built the optimizers that nearly all networks are trained with, updating in place and without allocating, groups
# with options, schedules that chain, clipping, and a state that can be saved and restored. Module 08 puts tensors,
# layers, losses, gradients and optimizers into a training loop that survives being killed.

# %%
if __name__ == "__main__":
    run_module(globals())
