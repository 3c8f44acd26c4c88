"""Module 07, appendix: more optimizers and schedules, clipping by value, and averages of weights.

Each optimizer is a class that holds options and state, and a function of raw arrays that is its formula. Each schedule
says in `get_lr` what the rates are at `last_epoch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from tinytorch.backends import Backend, backend_of
from tinytorch.m02_tensor import Tensor, clone, to
from tinytorch.m02_tensor_appendix import Writes
from tinytorch.m04_layers import Module
from tinytorch.m06_autograd import no_grad
from tinytorch.m07_optimizers import Array, LRScheduler, Optimizer, Scratch, into

# -- optimizers --------------------------------------------------------------------------------------------------------


class RMSprop(Optimizer):
    """Gradients over the root of a running mean of their squares (Hinton, 2012).

    Args:
        alpha: how much of the running means stays at each step.
        momentum: sum up the steps of the past, as SGD does.
        centered: subtract the square of the mean gradient, which leaves an estimate of the variance.
    """

    keeps = ("square_avg",)

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0,
        momentum: float = 0, centered: bool = False, *, maximize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {
            "lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum,
            "centered": centered, "maximize": maximize,
        })  # fmt: skip

    def update(self, xp: Backend, parameter: Array, grad: Array, state: dict, scratch: Array, group: dict) -> None:
        used = {"square_avg": True, "grad_avg": group["centered"], "momentum_buffer": group["momentum"] > 0}
        for name, needed in used.items():
            if needed and name not in state:
                state[name] = Tensor(xp.zeros_like(parameter))
        square, mean, velocity = (state[name].data if needed else None for name, needed in used.items())
        options = group["lr"], group["alpha"], group["eps"], group["momentum"]
        _rmsprop(xp, parameter, grad, square, mean, velocity, scratch, *options)


def _rmsprop(
    xp: Backend, parameter: Array, grad: Array, square: Array, mean: Array | None, velocity: Array | None,
    scratch: Array, lr: float, alpha: float, eps: float, momentum: float,
) -> None:  # fmt: skip
    """square = alpha square + (1 - alpha) grad²; parameter -= lr grad / (sqrt(square - mean²) + eps)."""
    into(scratch, xp.multiply, grad, grad)
    scratch *= 1 - alpha
    square *= alpha
    square += scratch
    if mean is None:
        into(scratch, xp.sqrt, square)
    else:
        into(scratch, xp.subtract, grad, mean)
        scratch *= 1 - alpha
        mean += scratch
        into(scratch, xp.multiply, mean, mean)
        into(scratch, xp.subtract, square, scratch)
        into(scratch, xp.sqrt, scratch)
    scratch += eps
    into(scratch, xp.divide, grad, scratch)
    if velocity is not None:
        velocity *= momentum
        velocity += scratch
        scratch[...] = velocity
    scratch *= lr
    parameter -= scratch


class Adagrad(Optimizer):
    """Gradients over the root of the sum of all their squares (Duchi et al., 2011); the rate falls as 1/(1 + t decay).

    Args:
        lr_decay: that decay, for each step.
        initial_accumulator_value: what the sum of squares starts with.
    """

    keeps = ("step", "sum")

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, lr_decay: float = 0, weight_decay: float = 0,
        initial_accumulator_value: float = 0, eps: float = 1e-10, *, maximize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {
            "lr": lr, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value, "maximize": maximize,
        })  # fmt: skip

    def update(self, xp: Backend, parameter: Array, grad: Array, state: dict, scratch: Array, group: dict) -> None:
        if not state:
            state["step"] = 0
            state["sum"] = Tensor(xp.full_like(parameter, group["initial_accumulator_value"]))
        rate = group["lr"] / (1 + state["step"] * group["lr_decay"])
        state["step"] += 1
        _adagrad(xp, parameter, grad, state["sum"].data, scratch, rate, group["eps"])


def _adagrad(xp: Backend, parameter: Array, grad: Array, total: Array, scratch: Array, rate: float, eps: float) -> None:
    """total += grad²; parameter -= rate grad / (sqrt(total) + eps)."""
    total += into(scratch, xp.multiply, grad, grad)
    into(scratch, xp.sqrt, total)
    scratch += eps
    into(scratch, xp.divide, grad, scratch)
    scratch *= rate
    parameter -= scratch


class Lion(Optimizer):
    """The sign of a momentum (Chen et al., 2023): every step has the length `lr`, and one array is remembered.

    Its rate is a third to a tenth of Adam's, its weight decay (decoupled, as AdamW's) so much larger.

    Args:
        betas: how much momentum goes into the sign; how much of it stays.
    """

    keeps = ("exp_avg",)

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0, *, maximize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {
            "lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, "maximize": maximize,
            "decoupled_weight_decay": True,
        })  # fmt: skip

    def update(self, xp: Backend, parameter: Array, grad: Array, state: dict, scratch: Array, group: dict) -> None:
        if not state:
            state["exp_avg"] = Tensor(xp.zeros_like(parameter))
        _lion(xp, parameter, grad, state["exp_avg"].data, scratch, group["lr"], *group["betas"])


def _lion(
    xp: Backend, parameter: Array, grad: Array, mean: Array, scratch: Array, lr: float, beta1: float, beta2: float
) -> None:
    """parameter -= lr sign(mean + (1 - beta1) (grad - mean)); mean += (1 - beta2) (grad - mean)."""
    into(scratch, xp.subtract, grad, mean)
    scratch *= 1 - beta1
    scratch += mean
    into(scratch, xp.sign, scratch)
    scratch *= lr
    parameter -= scratch
    into(scratch, xp.subtract, grad, mean)
    scratch *= 1 - beta2
    mean += scratch


# -- schedules ---------------------------------------------------------------------------------------------------------


class MultiStepLR(LRScheduler):
    """The rate times `gamma` at each of the milestones; twice at one that is listed twice."""

    def __init__(
        self, optimizer: Optimizer, milestones: Iterable[int], gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        self.milestones, self.gamma = sorted(milestones), gamma
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        return [lr * self.gamma ** self.milestones.count(self.last_epoch) for lr in self._rates()]


class ExponentialLR(LRScheduler):
    """The rate times `gamma` in each epoch."""

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        return [lr * (1 if self._starting else self.gamma) for lr in self._rates()]


class ConstantLR(LRScheduler):
    """The rate times `factor` in the first `total_iters` epochs."""

    def __init__(self, optimizer: Optimizer, factor: float = 1 / 3, total_iters: int = 5, last_epoch: int = -1) -> None:
        if not 0 < factor <= 1:
            raise ValueError(f"ConstantLR: factor must lie in (0, 1], not {factor}")
        self.factor, self.total_iters = factor, total_iters
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        change = {0: self.factor, self.total_iters: 1 / self.factor} if self.total_iters else {0: self.factor}
        return [lr * change.get(self.last_epoch, 1) for lr in self._rates()]


class CosineAnnealingWarmRestarts(LRScheduler):
    """Half a cosine down to `eta_min` in `T_0` epochs, then anew, each `T_mult` times as long as the one before."""

    def __init__(
        self, optimizer: Optimizer, T_0: int, T_mult: int = 1, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        if not (isinstance(T_0, int) and T_0 > 0 and isinstance(T_mult, int) and T_mult >= 1):
            raise ValueError(
                f"CosineAnnealingWarmRestarts: T_0 and T_mult must be whole numbers of at least 1, got {T_0}, {T_mult}"
            )
        self.T_0, self.T_i, self.T_mult, self.eta_min = T_0, T_0, T_mult, eta_min
        self.T_cur: float = last_epoch  # how far into the current cosine, which is T_i long
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        share = (1 + math.cos(math.pi * self.T_cur / self.T_i)) / 2
        return [self.eta_min + (base - self.eta_min) * share for base in self.base_lrs]

    def step(self, epoch: float | None = None) -> None:
        """Go on to the next epoch, or to any `epoch`, a fraction of one too: 0.5 is in the middle of the first."""
        if epoch is None and self.last_epoch >= 0:
            epoch, self.T_cur = self.last_epoch + 1, self.T_cur + 1
            if self.T_cur >= self.T_i:
                self.T_cur, self.T_i = self.T_cur % self.T_i, self.T_i * self.T_mult
        else:
            epoch = epoch or 0
            if epoch < 0:
                raise ValueError(f"CosineAnnealingWarmRestarts: the epoch must be 0 or more, not {epoch}")
            self.T_cur, self.T_i = self._place(epoch)
        self.last_epoch = math.floor(epoch)
        self._write(self.get_lr())

    def _place(self, epoch: float) -> tuple[float, int]:
        """How far into its cosine an epoch is, and how long that one is."""
        if self.T_mult == 1:
            return epoch % self.T_0, self.T_0
        length = self.T_0
        while epoch >= length:
            epoch, length = epoch - length, length * self.T_mult
        return epoch, length


class LambdaLR(LRScheduler):
    """The initial rate times a function of the epoch: one for all groups, or one for each.

    The state holds no functions; of callable objects it holds the attributes.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
    ) -> None:
        count = len(optimizer.param_groups)
        self.lr_lambdas: list[Any] = list(lr_lambda) if isinstance(lr_lambda, (list, tuple)) else [lr_lambda] * count
        if len(self.lr_lambdas) != count:
            raise ValueError(f"LambdaLR: expected {count} functions, one for each group, got {len(self.lr_lambdas)}")
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        return [base * f(self.last_epoch) for f, base in zip(self.lr_lambdas, self.base_lrs, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        kept = [None if isinstance(f, FunctionType) else dict(vars(f)) for f in self.lr_lambdas]
        return {**super().state_dict(), "lr_lambdas": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for f, kept in zip(self.lr_lambdas, state_dict["lr_lambdas"], strict=True):
            vars(f).update(kept or {})
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "lr_lambdas"})


class OneCycleLR(LRScheduler):
    """Up from `max_lr / div_factor` to `max_lr`, then far down, once, while momentum goes the other way (Smith, 2018).

    It is stepped after each batch, `total_steps` (or `epochs * steps_per_epoch`) times in all.

    Args:
        max_lr: the peak, one number or one for each group.
        pct_start: the share of the steps that go up.
        anneal_strategy: "cos" or "linear".
        cycle_momentum: move `momentum`, or the first of `betas`, between max_momentum and base_momentum.
        final_div_factor: the last rate is the first one over this.
        three_phase: down to the first rate as fast as up, then to the last.
    """

    def __init__(
        self, optimizer: Optimizer, max_lr: float | Sequence[float], total_steps: int | None = None,
        epochs: int | None = None, steps_per_epoch: int | None = None, pct_start: float = 0.3,
        anneal_strategy: str = "cos", cycle_momentum: bool = True, base_momentum: float | Sequence[float] = 0.85,
        max_momentum: float | Sequence[float] = 0.95, div_factor: float = 25.0, final_div_factor: float = 1e4,
        three_phase: bool = False, last_epoch: int = -1,
    ) -> None:  # fmt: skip
        if total_steps is None and epochs is not None and steps_per_epoch is not None:
            total_steps = epochs * steps_per_epoch
        if not isinstance(total_steps, int) or total_steps <= 0:
            raise ValueError(
                "OneCycleLR: give total_steps, or epochs and steps_per_epoch, as whole numbers above 0; "
                f"got {total_steps}, {epochs} and {steps_per_epoch}"
            )
        if not 0 <= pct_start <= 1:
            raise ValueError(f"OneCycleLR: pct_start must lie in [0, 1], not {pct_start}")
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(f"OneCycleLR: anneal_strategy must be 'cos' or 'linear', not {anneal_strategy!r}")
        if cycle_momentum and not {"momentum", "betas"} & optimizer.defaults.keys():
            raise ValueError(
                f"OneCycleLR: {type(optimizer).__name__} has neither momentum nor betas; give cycle_momentum=False"
            )
        self.total_steps, self.pct_start, self.three_phase = total_steps, pct_start, three_phase
        self.anneal_strategy, self.cycle_momentum = anneal_strategy, cycle_momentum
        if last_epoch == -1:
            _set_option(optimizer, "max_lr", max_lr)
            for group in optimizer.param_groups:
                group["initial_lr"] = group["max_lr"] / div_factor
                group["min_lr"] = group["initial_lr"] / final_div_factor
            if cycle_momentum:
                _set_option(optimizer, "max_momentum", max_momentum)
                _set_option(optimizer, "base_momentum", base_momentum)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        if self.last_epoch > self.total_steps:
            raise ValueError(f"OneCycleLR: step {self.last_epoch} of {self.total_steps}; the cycle is over")
        i, share = self._phase()
        lr = ("initial_lr", "max_lr", *(("initial_lr",) if self.three_phase else ()), "min_lr")
        momentum = ("max_momentum", "base_momentum", "max_momentum", "max_momentum")
        if self.cycle_momentum:
            for group in self.optimizer.param_groups:
                value = self._between(group[momentum[i]], group[momentum[i + 1]], share)
                group.update({"betas": (value, *group["betas"][1:])} if "betas" in group else {"momentum": value})
        return [self._between(group[lr[i]], group[lr[i + 1]], share) for group in self.optimizer.param_groups]

    def _phase(self) -> tuple[int, float]:
        """The number of the phase that the current step is in, and which share of it is over."""
        up, last = self.pct_start * self.total_steps, self.total_steps - 1
        ends = [up - 1, 2 * up - 2, last] if self.three_phase else [up - 1, last]
        i = next((i for i, end in enumerate(ends) if self.last_epoch <= end), len(ends) - 1)
        start = ends[i - 1] if i else 0.0
        return i, (self.last_epoch - start) / (ends[i] - start) if ends[i] != start else 1.0

    def _between(self, start: float, end: float, share: float) -> float:
        if self.anneal_strategy == "linear":
            return (end - start) * share + start
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def _set_option(optimizer: Optimizer, name: str, value: float | Sequence[float]) -> None:
    """Write one value, or one for each group, into the groups."""
    groups = optimizer.param_groups
    values = list(value) if isinstance(value, (list, tuple)) else [value] * len(groups)
    if len(values) != len(groups):
        raise ValueError(f"{name}: expected {len(groups)} values, one for each group, got {len(values)}")
    for group, each in zip(groups, values, strict=True):
        group[name] = each


class ReduceLROnPlateau(LRScheduler):
    """The rate times `factor` when a metric has not become better for more than `patience` epochs.

    Args:
        mode: whether less ("min") or more ("max") of the metric is better.
        threshold: how much better counts: a share of the best ("rel") or an amount ("abs", `threshold_mode`).
        cooldown: how many epochs after a reduction are not counted.
        min_lr: where the rate stops, one number or one for each group.
        eps: a smaller change of the rate is not made.
    """

    needs_metric = True

    def __init__(
        self, optimizer: Optimizer, mode: str = "min", factor: float = 0.1, patience: int = 10, threshold: float = 1e-4,
        threshold_mode: str = "rel", cooldown: int = 0, min_lr: float | Sequence[float] = 0, eps: float = 1e-8,
    ) -> None:  # fmt: skip
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"ReduceLROnPlateau: expected an optimizer, got {type(optimizer).__name__}")
        if not factor < 1:
            raise ValueError(f"ReduceLROnPlateau: factor must be below 1, not {factor}")
        if mode not in ("min", "max") or threshold_mode not in ("rel", "abs"):
            raise ValueError(
                "ReduceLROnPlateau: mode must be 'min' or 'max' and threshold_mode 'rel' or 'abs', "
                f"got {mode!r} and {threshold_mode!r}"
            )
        count = len(optimizer.param_groups)
        self.min_lrs: list[Any] = list(min_lr) if isinstance(min_lr, (list, tuple)) else [min_lr] * count
        if len(self.min_lrs) != count:
            raise ValueError(f"ReduceLROnPlateau: expected {count} values of min_lr, got {len(self.min_lrs)}")
        self.optimizer, self.mode, self.factor, self.patience = optimizer, mode, factor, patience
        self.threshold, self.threshold_mode, self.cooldown, self.eps = threshold, threshold_mode, cooldown, eps
        self.best: float | None = None  # no metric has been seen
        self.cooldown_counter = self.num_bad_epochs = self.last_epoch = 0
        self._last_lr = self._rates()

    def step(self, metrics: float) -> None:  # type: ignore[override]
        """Tell the metric of the epoch that is over: a number, or a tensor of one."""
        value = float(metrics)
        self.last_epoch += 1
        if self._is_better(value):
            self.best, self.num_bad_epochs = value, 0
        else:
            self.num_bad_epochs += 1
        if self.cooldown_counter > 0:
            self.cooldown_counter, self.num_bad_epochs = self.cooldown_counter - 1, 0
        if self.num_bad_epochs > self.patience:
            self.cooldown_counter, self.num_bad_epochs = self.cooldown, 0
            lower = [max(lr * self.factor, least) for lr, least in zip(self._rates(), self.min_lrs, strict=True)]
            self._write([b if a - b > self.eps else a for a, b in zip(self._rates(), lower, strict=True)])
        self._last_lr = self._rates()

    def _is_better(self, value: float) -> bool:
        sign = 1 if self.mode == "min" else -1
        best = sign * math.inf if self.best is None else self.best
        if self.threshold_mode == "rel":
            return sign * value < sign * best * (1 - sign * self.threshold)
        return sign * value < sign * best - self.threshold


# -- gradients ---------------------------------------------------------------------------------------------------------


def clip_grad_value_(parameters: Iterable[Tensor] | Tensor, clip_value: float) -> None:
    """Bring each element of all gradients, in place, into [-clip_value, clip_value]."""
    if not clip_value >= 0:
        raise ValueError(f"clip_grad_value_: clip_value must be 0 or more, not {clip_value}")
    with no_grad():
        for p in [parameters] if isinstance(parameters, Tensor) else parameters:
            if p.grad is not None:
                p.grad.clamp_(min=-float(clip_value), max=float(clip_value))


# -- averages of weights -----------------------------------------------------------------------------------------------


class EMA:
    """An exponential moving average of weights, which often does better than the last weights themselves.

        ema = EMA(model, decay=0.999)
        for …:
            optimizer.step()
            ema.update()
        with ema.applied():
            evaluate(model)

    Args:
        model_or_parameters: a Module, or an iterable of its parameters.
        decay: how much of the average stays at each update.

    Attributes:
        averages: the average of each parameter, by name (by number, where there are no names).
        n_averaged: how many updates there were. The first one copies the weights.
    """

    def __init__(self, model_or_parameters: Module | Iterable[Tensor], decay: float = 0.999) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"EMA: decay must lie in [0, 1], not {decay}")
        self.parameters: dict[str, Tensor]
        if isinstance(model_or_parameters, Module):
            self.parameters = dict(model_or_parameters.named_parameters())
        else:
            self.parameters = {str(i): p for i, p in enumerate(model_or_parameters)}
        if not self.parameters:
            raise ValueError("EMA: there are no parameters to average")
        self.decay, self.n_averaged = decay, 0
        self.averages = {name: clone(p.detach()) for name, p in self.parameters.items()}
        self._weights: dict[str, Tensor] | None = None  # the model's own, while it holds the averages
        self._scratch = Scratch()

    def update(self) -> None:
        """Move the averages towards the weights, as they are now."""
        self._expect(applied=False, what="update")
        for name, p in self.parameters.items():
            weight, average, xp = p.data, self.averages[name].data, backend_of(p.data)
            difference = into(self._scratch.like(xp, weight), xp.subtract, weight, average)
            difference *= 1 - self.decay if self.n_averaged else 1
            average += difference
        self.n_averaged += 1

    def apply(self) -> None:
        """Put the averages into the model; `restore` brings its own weights back."""
        self._expect(applied=False, what="apply")
        self._weights = {name: clone(p.detach()) for name, p in self.parameters.items()}
        self._copy(self.averages, self.parameters)

    def restore(self) -> None:
        """Put the model's own weights back."""
        self._expect(applied=True, what="restore")
        self._copy(self._weights or {}, self.parameters)
        self._weights = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averages inside the `with` block and its own weights after it."""
        self.apply()
        try:
            yield
        finally:
            self.restore()

    def state_dict(self) -> dict[str, Any]:
        """{"decay", "n_averaged", "averages"}; the tensors are this object's own, not copies."""
        return {"decay": self.decay, "n_averaged": self.n_averaged, "averages": dict(self.averages)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; ValueError, and no change, where names or shapes differ."""
        saved = state_dict["averages"]
        have = {name: average.shape for name, average in self.averages.items()}
        given = {name: average.shape for name, average in saved.items()}
        if have != given:
            differing = sorted(name for name in have.keys() | given.keys() if have.get(name) != given.get(name))
            raise ValueError(f"EMA: saved averages and parameters differ in name or shape: {', '.join(differing)}")
        self.decay, self.n_averaged = float(state_dict["decay"]), int(state_dict["n_averaged"])
        self._copy(saved, self.averages)

    def _expect(self, applied: bool, what: str) -> None:
        if applied != (self._weights is not None):
            state = "already holds the averages; call restore() first" if not applied else "holds its own weights"
            raise RuntimeError(f"EMA.{what}: the model {state}")

    def _copy(self, source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        for name, x in target.items():
            x.data[...] = to(source[name].detach(), x).data
            Writes.note(x.data)
