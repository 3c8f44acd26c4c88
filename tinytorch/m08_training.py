"""Module 08: training, or how to repeat a step a million times without losing one.

Learning objectives. After this module you can
1. write the loop that trains every network, and say where the time of its steps goes;
2. measure a model without changing it, and average correctly over batches of different sizes;
3. get a big batch's gradient out of small ones, and train in half precision without losing small gradients;
4. stop a run that has gone wrong before it does damage;
5. save a run so completely that it can be killed at any moment and goes on with the same bits.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from tinytorch.backends import BY_TYPE, get_backend
from tinytorch.m01_setup import (
    assert_close,
    get_rng_state,
    manual_seed,
    message_of,
    print_table,
    run_module,
    set_rng_state,
)
from tinytorch.m02_tensor import Device, Op, Tensor, argmax, cat, eq, float16, float32, observe, randn, stack, tensor
from tinytorch.m02_tensor_appendix import all, as_tensor, isfinite, randint
from tinytorch.m03_activations import relu
from tinytorch.m04_layers import Dropout, Linear, Module, Sequential
from tinytorch.m04_layers_appendix import load, save
from tinytorch.m05_losses import cross_entropy
from tinytorch.m06_autograd import no_grad
from tinytorch.m07_optimizers import SGD, Adam, LRScheduler, Optimizer, StepLR, clip_grad_norm_
from tinytorch.m07_optimizers_appendix import ReduceLROnPlateau

# %% [markdown]
# # Module 08: Training
#
# Model, loss, gradients, optimizer: six lines make them learn. This chapter is about what stands around those lines
# when a run takes a night: what is measured, what can go wrong, and what is left when it does.

# %% [markdown]
# ## Mathematical foundations
#
# Training minimizes the mean loss over all examples, $L(w) = \frac{1}{N} \sum_i \ell_i(w)$, by steps along its
# gradient on a *batch* $B$ of them. With random batches, $\frac{1}{|B|} \sum_{i \in B} \nabla \ell_i$ is right on
# average, and its error falls as $1 / \sqrt{|B|}$: four times the work for half the noise.
#
# **Means of means.** Batches of different sizes must be weighted: $L = \sum_B |B|\, L_B / \sum_B |B|$. The same
# holds for gradients, so a batch too big for memory can be *accumulated* from parts: add up $|B_k| \nabla L_{B_k}$ by
# backward passes without a step between them, and divide by $\sum_k |B_k|$ before the step.
#
# **Half precision.** A float16 has 11 bits of precision, its largest value is 65504, its smallest $2^{-24}$. A weight
# of 1 does not change when less than $2^{-11}$ is added, so the weights that the optimizer adds to stay float32, and
# products are of float16 copies. Many gradients are below $2^{-24}$ and would be 0: the loss is multiplied by a
# scale $s$ before backward, and the gradients, which $s$ has multiplied too, are divided by $s$ in float32. If $s$ is
# too large they overflow; then the step is skipped and $s$ halved. After many good steps $s$ is doubled.
#
# **State.** A step is a function: weights, the optimizer's memory, schedule, random generators and the place in the
# data go in, the same come out. Who saves all of it, to the last bit, can go on as if nothing had happened.

# %% [markdown]
# ## Implementation
#
# ### Measuring
# A metric is a function of a batch's outputs and targets that returns a mean over the batch. `Totals` makes of such
# means the mean over an epoch.


# %%
def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of examples whose largest score stands at the target's class.

    Args:
        outputs: scores (N, C, …), C > 1.
        targets: classes (N, …), or as many probabilities as there are scores, (N, C, …).
    """
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        raise ValueError(f"accuracy: expected scores (N, C) of C > 1 classes, got {outputs.shape}; "
                         "for a single score an example there is binary_accuracy")  # fmt: skip
    classes = argmax(targets, dim=1) if targets.shape == outputs.shape else targets
    if classes.shape != outputs.shape[:1] + outputs.shape[2:]:
        raise ValueError(f"accuracy: targets {targets.shape} do not fit scores {outputs.shape}")
    return eq(argmax(outputs, dim=1), classes).mean()


class Totals:
    """Means over examples, from means over batches."""

    def __init__(self, count: int = 0, sums: Mapping[str, float] | None = None) -> None:
        self.count, self.sums = count, dict(sums or {})

    def add(self, count: int, values: Mapping[str, float]) -> None:
        """Take in the means over a batch of `count` examples."""
        self.count += count
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * count

    def means(self) -> dict[str, float]:
        return {name: total / self.count for name, total in self.sums.items()}


def test_means_are_weighted_by_batch_size() -> None:
    scores, classes = tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.6, 0.4, 0.0]]), tensor([0, 1, 1])
    totals = Totals()
    for part in (slice(0, 1), slice(1, 3)):
        totals.add(len(classes[part]), {"accuracy": accuracy(scores[part], classes[part]).item()})
    assert_close(totals.means()["accuracy"], 2 / 3)  # 1/1 and 1/2; their plain mean would be 3/4
    assert "binary_accuracy" in message_of(accuracy, randn(3, 1), tensor([0, 1, 1]), error=ValueError)


# %% [markdown]
# A model under measurement must be in evaluation mode, or dropout would disturb the result, and be left as found.


# %%
@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Evaluation mode in a `with` block; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def test_evaluating_restores_each_modules_mode() -> None:
    model = Sequential(Dropout(0.5), Dropout(0.5).eval())
    with evaluating(model):
        assert not model[0].training
    assert [module.training for module in model.modules()] == [True, True, False]


# %% [markdown]
# ### Mixed precision
# Products gain from 16 bits: half the traffic, and a GPU's fast units. Sums and exponentials lose. So an observer casts
# down what some operations are given, and up what others are; later modules add theirs. Backward computes with what was
# kept, in 16 bits too, and casts what arrives at a float32 tensor, as it always does.


# %%
LOWER, FULL = {"matmul", "linear"}, {"exp", "log", "pow", "sum", "softmax", "log_softmax", "softmax_cross_entropy"}


class Casting(threading.local):
    wanted: Any = None  # the device and the dtype of the block that a thread is in


casting = Casting()


@contextmanager
def autocast(device_type: str, dtype: str = float16, enabled: bool = True) -> Iterator[None]:
    """Compute products of float32 in float16 or bfloat16 on "cpu" or on "cuda" while the block runs, in this thread."""
    before, casting.wanted = casting.wanted, (device_type, dtype) if enabled else None
    try:
        with observe(cast_inputs):
            yield
    finally:
        casting.wanted = before


def cast_inputs(op: Op, arrays: list, attributes: dict, proceed: Callable) -> Any:
    device, dtype = casting.wanted or ("", "")
    source, target = ("float32", dtype) if op.name in LOWER else (dtype, "float32" if op.name in FULL else "")
    for i, x in enumerate(arrays if dtype and target else ()):
        if (xp := BY_TYPE.get(type(x))) and xp.device.split(":")[0] == device and xp.dtype_name(x) == source:
            arrays[i] = xp.cast(x, target)
    return proceed()


def test_products_are_of_16_bits_and_gradients_of_32() -> None:
    layer, x = Linear(3, 2), randn(4, 3)
    with autocast("cpu", float16):
        total = (out := layer(x)).sum()
    total.backward()
    assert (out.dtype, total.dtype, layer.weight.grad.dtype) == (float16, float32, float32)
    assert_close(layer.weight.grad, stack([x.sum(0)] * 2), rtol=1e-2, atol=1e-2)


# %% [markdown]
# The scaler finds the largest scale at which gradients do not overflow, and follows it as training changes it.


# %%
def graded(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer that have a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element of any of the tensors is infinite or nan."""
    flags = [all(isfinite(x)) for x in tensors]
    return not flags or bool(all(stack(flags)))


class GradScaler:
    """Scales a loss so that float16 gradients neither vanish nor overflow.

    Args:
        device: as in PyTorch, without effect. init_scale: the first one; it finds its size within a few skipped steps.
        growth_factor, growth_interval: what the scale is multiplied by after so many steps in a row without overflow.
        backoff_factor: what it is multiplied by after an overflow.
    """

    def __init__(
        self, device: str = "cuda", init_scale: float = 2.0**16, growth_factor: float = 2.0,
        backoff_factor: float = 0.5, growth_interval: int = 2000,
    ) -> None:  # fmt: skip
        self.value, self.good_steps = float(init_scale), 0
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self._finite: bool | None = None  # whether the gradients were, once they are unscaled

    def get_scale(self) -> float:
        return self.value

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""
        return loss * self.value

    def unscale_(self, optimizer: Optimizer) -> bool:
        """Divide the gradients by the scale, before anyone else looks at them; returns whether all are finite."""
        if self._finite is not None:
            raise RuntimeError("unscale_: the gradients are unscaled already; call step and update first")
        grads = [p.grad for p in graded(optimizer)]
        self._finite = all_finite(grads)
        for grad in grads:
            grad.mul_(1 / self.value)
        return self._finite

    def step(self, optimizer: Optimizer) -> bool:
        """The optimizer's step, unless a gradient overflowed. Returns whether it was made."""
        if self._finite is None:
            self.unscale_(optimizer)
        if self._finite:
            optimizer.step()
        return bool(self._finite)

    def update(self) -> None:
        """Adjust the scale; after each `step`."""
        self.good_steps = self.good_steps + 1 if self._finite else 0
        if not self._finite:
            self.value *= self.backoff_factor
        elif self.good_steps == self.growth_interval:
            self.value, self.good_steps = self.value * self.growth_factor, 0
        self._finite = None

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.good_steps, self._finite = float(state["scale"]), int(state["good_steps"]), None


def test_scaler_skips_overflow_and_grows() -> None:
    w = tensor([1.0], requires_grad=True)
    optimizer, scaler = SGD([w], lr=0.5), GradScaler(init_scale=8.0, growth_interval=2)
    seen = []
    for grad in (math.inf, 8.0, 4.0, 4.0, 4.0):
        w.grad = tensor([grad])
        made = scaler.step(optimizer)
        scaler.update()
        seen.append((made, w.item(), scaler.get_scale()))
    assert seen == [(False, 1.0, 4.0), (True, 0.0, 4.0), (True, -0.5, 8.0), (True, -0.75, 8.0), (True, -1.0, 16.0)]


# %% [markdown]
# ### Callbacks
# What different users want between steps differs: a bar, a log, an early end, a file. The trainer calls each of its
# callbacks at six moments; what one must remember stands in its `state_dict`, which is saved with the run. The appendix
# has ProgressBar, Checkpointing, EarlyStopping, History and others.


# %%
class Callback:
    """The base of what a `Trainer` calls between steps. No hook does anything; a subclass defines those it needs."""

    order = 0  # callbacks of a lower order are called first; those of one order, as they were given

    def on_fit_start(self, trainer: Trainer) -> None: ...

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Also where a resumed run goes on in the middle of an epoch."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After each step of the optimizer, also one that the scaler skipped."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After validation; `trainer.history[-1]` is the epoch's row."""

    def on_fit_end(self, trainer: Trainer) -> None: ...

    def on_error(self, trainer: Trainer) -> None:
        """When `fit` is left by an exception, an interruption from the keyboard included."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


# %% [markdown]
# ### Packing a state
# States are nested dictionaries of tensors, numbers and text. A file of tensors wants them flat, by name; what is left
# when they are taken out is JSON, which keeps a float64 to the last bit but makes keys text and tuples lists. Where a
# tensor was stands its name, under `$tensor`; infinity and nan, which JSON lacks, stand under `$float`.


# %%
def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A nested state as JSON can hold it; its tensors go into `tensors`, named by the path that leads to them."""
    if isinstance(value, Tensor):
        if tensors.setdefault(name, value) is not value:
            raise ValueError(f"save: two tensors of the state have the name {name!r}")
        return {"$tensor": name}
    if isinstance(value, Mapping):
        return {str(key): pack(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"save: {name} is a {type(value).__name__}; a state holds tensors, numbers, text, lists and dicts")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given, as far as JSON can tell."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    return float(value["$float"]) if "$float" in value else {key: unpack(x, tensors) for key, x in value.items()}


def test_unpack_returns_what_was_packed() -> None:
    state = {"lr": 0.1 + 0.2, "best": -math.inf, "betas": [0.9, [None, math.inf]], "state": {"0": {"m": tensor([1.0])}}}
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack(state, "optimizer", tensors), allow_nan=False)
    assert list(tensors) == ["optimizer.state.0.m"]
    assert unpack(json.loads(text), tensors) == state
    assert "x is a set" in message_of(pack, {1}, "x", {}, error=TypeError)


# %% [markdown]
# ### Checkpoint files
# A checkpoint is *one* safetensors file: tensors, JSON in its metadata, a checksum over both. Renaming one file is
# atomic; two files can disagree. `load` refuses what is truncated or altered, and nothing in a file is ever executed.
# A folder holds `last` and, as a second line of defence, the one before it.

# %%
FORMAT = "1"
LAST, PREVIOUS = "last.safetensors", "previous.safetensors"


def write_checkpoint(state: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write the state of a run to a file: the old file stays, or all is new."""
    tensors: dict[str, Tensor] = {}
    packed = {key: pack(value, key, tensors) for key, value in state.items()}
    save(tensors, path, {"tinytorch.checkpoint": FORMAT, "state": json.dumps(packed, allow_nan=False)})


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any] | None:
    """The state of a run from a file, or the newest good one from a folder; None if the folder has none.

    What is damaged or no checkpoint is a ValueError with the file's name; in a folder that has an older one, a warning.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_checkpoint(path)
    found = [path / name for name in (LAST, PREVIOUS) if (path / name).exists()]
    for i, file in enumerate(found):
        try:
            return _read_checkpoint(file)
        except ValueError as error:
            if i + 1 == len(found):
                raise
            warnings.warn(f"{error}; going on from {found[i + 1]}", stacklevel=4)
    return None


def _read_checkpoint(path: Path) -> dict[str, Any]:
    tensors = load(path, device="cpu")
    version = tensors.metadata.get("tinytorch.checkpoint")
    if version != FORMAT:
        what = "holds no training state" if version is None else f"has format {version}, this program reads {FORMAT}"
        raise ValueError(f"resume: {path}: not a checkpoint of a Trainer: it {what}")
    return unpack(json.loads(tensors.metadata["state"]), tensors)


# %% [markdown]
# ### The trainer
# Read `_learn` and `_step` first: they are training, the rest is care. The loss is looked at while the weights are
# still good. `_remaining` finds the place in the data again: a loader that knows its place is told; of any other, as
# many batches are skipped as were used, with the random generators as at the epoch's start, so that it shuffles alike.


# %%
class TrainingError(RuntimeError):
    """Training cannot go on in a sensible way; the message says why, where, and what to try."""


class Trainer:
    """Trains, evaluates and applies a model, and can be killed and resumed at any step.

    Args:
        loss: a function of outputs and targets that returns the mean over the batch.
        metrics: functions of outputs and targets that return a mean over the batch, by name.
        scheduler: stepped after each `scheduler_interval`, "epoch" or "step"; a ReduceLROnPlateau gets the newest loss.
        clip_norm: the largest norm that all gradients together may have.
        accumulate: how many batches make one step; the step is that of one big batch.
        precision: of products: "float32"; "float16", with a `scaler`; or "bfloat16". Both are faster on CUDA only.
        device: where the model is brought; by default it stays where it is. Batches follow it.

    Attributes:
        history: a row for each epoch: "epoch", "loss", the metrics, the same with "val_" before it, and "lr".
        epoch, batch, step: epochs done, batches of the present epoch done, steps of the optimizer in all.
        batches, validation, epochs: what `fit` was given. totals: what this epoch has measured so far.
        stop: set it to True, and training ends with this epoch.
    """

    def __init__(
        self, model: Module, optimizer: Optimizer, loss: Callable[[Tensor, Tensor], Tensor],
        metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] | None = None,
        scheduler: LRScheduler | ReduceLROnPlateau | None = None, callbacks: Sequence[Callback] = (),
        clip_norm: float | None = None, accumulate: int = 1, precision: str = "float32", device: str | None = None,
        scaler: GradScaler | None = None, scheduler_interval: str = "epoch",
    ) -> None:  # fmt: skip
        self.model = model if device is None else model.to(device=device)
        self.optimizer, self.loss, self.metrics, self.scheduler = optimizer, loss, dict(metrics or {}), scheduler
        self.callbacks = sorted(callbacks, key=lambda callback: callback.order)
        self.clip_norm, self.accumulate, self.scheduler_interval = clip_norm, accumulate, scheduler_interval
        self._check_options(precision, scaler)
        self.precision, self.scaler = precision, (scaler or GradScaler()) if precision == "float16" else None
        self.history: list[dict[str, float]] = []
        self.epoch = self.step = self.epochs = 0
        self.batches: Any = None
        self.validation: Any = None
        self.stop = False
        self._resumed: dict[str, Any] | None = None  # where in the data a checkpoint was made, until fit goes on there
        self._begin_epoch()

    def _check_options(self, precision: str, scaler: GradScaler | None) -> None:
        intervals = ("epoch",) if isinstance(self.scheduler, ReduceLROnPlateau) else ("epoch", "step")
        if self.scheduler_interval not in intervals:
            raise ValueError(f"Trainer: scheduler_interval must be one of {intervals}, not {self.scheduler_interval!r}")
        if self.accumulate < 1 or (self.clip_norm is not None and not self.clip_norm > 0):
            raise ValueError(f"Trainer: accumulate {self.accumulate} or clip_norm {self.clip_norm} is not above 0")
        if self.metrics.keys() & {"loss", "epoch", "lr"}:
            raise ValueError("Trainer: 'loss', 'epoch' and 'lr' are columns of the history; call the metric otherwise")
        if precision not in ("float32", "float16", "bfloat16") or (scaler is not None and precision != "float16"):
            raise ValueError(f"Trainer: precision is float32, bfloat16, or float16 with a scaler, not {precision}")
        get_backend(str(self.device)).dtype(precision)  # an error, if it has none

    # -- training ----------------------------------------------------------------------------------------------------

    def fit(
        self, train_batches: Iterable, epochs: int, validation: Iterable | None = None,
        resume: str | os.PathLike | None = None,
    ) -> list[dict[str, float]]:  # fmt: skip
        """Train until `epochs` epochs are done, those of earlier calls and before a resume included.

        Returns the history. An epoch that an error cut short is begun anew by the next `fit`, unless that resumes.

        Args:
            train_batches: what gives (inputs, targets), tensors or arrays, anew each time it is iterated over.
            validation: batches to evaluate on after each epoch.
            resume: a checkpoint to go on from: a file, or a folder, which may still be empty.

        Raises:
            TrainingError: the loss or the norm of the gradients is not finite; the weights are not touched then.
        """
        if not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"fit: epochs must be a whole number >= 1, not {epochs!r}")
        if resume is not None:
            self.resume(resume)
        if self._resumed is None:
            self._begin_epoch()
        self.batches, self.validation, self.epochs, self.stop = train_batches, validation, epochs, False
        try:
            self.model.train()
            self._call("on_fit_start")
            while self.epoch < epochs and not self.stop:
                self._run_epoch()
            self._call("on_fit_end")
        except BaseException:
            self._call("on_error")
            raise
        return self.history

    def _run_epoch(self) -> None:
        self._call("on_epoch_start")
        for batch in self._remaining():
            self._learn(batch)
            if self.waiting == self.accumulate:
                self._step()
        self._exhausted = True
        if self.waiting:
            self._step()
        if not self.totals.count:
            raise TrainingError(f"fit: epoch {self.epoch + 1} has no batches; a generator is used up after one epoch, "
                                "so give a list, or an object whose iter() starts anew")  # fmt: skip
        row = {"epoch": self.epoch + 1, **self.totals.means(), "lr": self.lr}
        if self.validation is not None:
            row |= {f"val_{name}": value for name, value in self.evaluate(self.validation).items()}
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(row.get("val_loss", row["loss"]))
        elif self.scheduler is not None and self.scheduler_interval == "epoch":
            self.scheduler.step()
        self.history.append(row)
        self.epoch += 1
        self._begin_epoch()
        self._call("on_epoch_end")

    def _begin_epoch(self) -> None:
        self.batch = self.waiting = self.examples = 0  # batches done, those since the last step, and their examples
        self.totals, self._exhausted = Totals(), False
        self.optimizer.zero_grad()

    def _learn(self, batch: Any) -> None:
        """Forward and backward on one batch."""
        inputs, targets = self._checked(batch, "fit", self.batch + 1)
        outputs = self._forward(inputs)
        loss = self.loss(outputs, targets)
        value, count = float(loss), inputs.shape[0]
        if not math.isfinite(value):
            self._refuse(f"the loss is {value}", self.batch + 1)
        self.totals.add(count, {"loss": value, **self._measure(outputs, targets)})
        self.waiting, self.examples = self.waiting + 1, self.examples + count
        if self.accumulate > 1:
            loss = loss * count
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward()
        self.batch += 1

    def _step(self) -> None:
        """One step of the optimizer with the gradients of the batches since the last one."""
        finite = self.scaler is None or self.scaler.unscale_(self.optimizer)
        if self.accumulate > 1:
            for p in graded(self.optimizer):
                p.grad.div_(self.examples)
        if self.clip_norm is not None and finite:
            norm = float(clip_grad_norm_(graded(self.optimizer), self.clip_norm))
            if not math.isfinite(norm):
                self._refuse(f"the norm of the gradients is {norm}", self.batch)
        if finite:
            self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        if self.scheduler_interval == "step" and self.scheduler is not None:
            self.scheduler.step()
        self.waiting = self.examples = 0
        self._call("on_step_end")

    def _refuse(self, what: str, batch: int) -> None:
        self.optimizer.zero_grad()
        raise TrainingError(
            f"fit: {what} at epoch {self.epoch + 1}, batch {batch}, step {self.step + 1}, learning rate {self.lr:g}. "
            "The weights are as the step before left them. Try a lower learning rate, a warm-up or clip_norm=1.0; look "
            "for nan in the inputs; autograd.detect_anomaly() names the operation"
        )

    @property
    def lr(self) -> float:
        """The learning rate of the optimizer's first group."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def device(self) -> Device:
        return self.optimizer.param_groups[0]["params"][0].device

    def _call(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self)

    # -- applying ----------------------------------------------------------------------------------------------------

    def _checked(self, batch: Any, operation: str, number: int) -> tuple[Tensor, Tensor]:
        """A batch as two tensors on the device; ValueError if it is none."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            what = f"{len(batch)} things" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise ValueError(f"{operation}: batch {number} is not a pair (inputs, targets), but {what}")
        inputs, targets = (as_tensor(part, device=self.device) for part in batch)
        if not inputs.shape or not inputs.shape[0]:
            raise ValueError(f"{operation}: batch {number} is empty: its inputs have shape {inputs.shape}")
        return inputs, targets

    def _forward(self, inputs: Tensor) -> Tensor:
        if self.precision == "float32":
            return self.model(inputs)
        with autocast(self.device.type, self.precision):
            return self.model(inputs).to(float32)

    def _measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {name: float(metric(outputs.detach(), targets)) for name, metric in self.metrics.items()}

    @no_grad
    def evaluate(self, batches: Iterable) -> dict[str, float]:
        """Loss and metrics over all examples of some batches, in evaluation mode."""
        totals = Totals()
        with evaluating(self.model):
            for number, batch in enumerate(batches, 1):
                inputs, targets = self._checked(batch, "evaluate", number)
                outputs = self._forward(inputs)
                loss = float(self.loss(outputs, targets))
                totals.add(inputs.shape[0], {"loss": loss, **self._measure(outputs, targets)})
        if not totals.count:
            raise ValueError("evaluate: there are no batches")
        return totals.means()

    @no_grad
    def predict(self, inputs: Any) -> Tensor:
        """The outputs (N, …) for a batch (a tensor or an array), or for batches of inputs or (inputs, targets)."""
        with evaluating(self.model):
            batches = [inputs] if hasattr(inputs, "shape") else inputs
            alone = (batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches)
            return cat([self._forward(as_tensor(batch, device=self.device)) for batch in alone])

    # -- saving and resuming -----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write a checkpoint. TrainingError if a weight is not finite or a step half done; the old file stays then."""
        if self.waiting:
            raise TrainingError("save: a step is half done; callbacks are called between steps")
        bad = [name for name, p in self.model.named_parameters() if not all_finite([Tensor(p.data)])]
        if bad:
            raise TrainingError(f"save: infinity or nan in {', '.join(bad)}; {os.fspath(path)} was not written")
        write_checkpoint(self.state_dict(), path)

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            **{name: part and part.state_dict() for name, part in self._parts().items()},
            "made_with": {name: type(part).__name__ for name, part in self._parts().items()},
            "callbacks": [[type(callback).__name__, callback.state_dict()] for callback in self.callbacks],
            "history": self.history,
            "progress": {"epoch": self.epoch, "batch": self.batch, "step": self.step},
            "totals": vars(self.totals),
            "place": self._resumed or self._place(),
        }

    def _place(self) -> dict[str, Any]:
        """Where in the data, and where in the sequence of random numbers, the run is."""
        now, loaders = get_rng_state(), {"batches": self.batches, "validation": self.validation}
        return {
            **{name: x.state_dict() if hasattr(x, "state_dict") else None for name, x in loaders.items()},
            "exhausted": self._exhausted,
            "rng": now,
            "epoch_rng": self._epoch_rng if self.batch else now,
        }

    def resume(self, path: str | os.PathLike) -> bool:
        """Take over a checkpoint: a file, or the newest good one of a folder; returns whether the folder had one.

        What is damaged or of another kind of run is a ValueError with the file's name.
        """
        state = read_checkpoint(path)
        if state is None:
            return False
        try:
            self.load_state_dict(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"resume: {os.fspath(path)}: {error}") from error
        return True

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name, part in self._parts().items():
            made = state["made_with"][name]
            if name != "model" and made != type(part).__name__:
                raise ValueError(f"the state was made with {name} {made}, not {type(part).__name__}")
        for name, part in self._parts().items():
            if part is not None:
                part.load_state_dict(state[name])
        self._begin_epoch()
        saved = list(state["callbacks"])
        for callback in self.callbacks:  # one that was not there then starts as it is
            mine = next((entry for entry in saved if entry[0] == type(callback).__name__), None)
            if mine is not None:
                saved.remove(mine)
                callback.load_state_dict(mine[1])
        self.history = [dict(row) for row in state["history"]]
        self.epoch, self.batch, self.step = (state["progress"][name] for name in ("epoch", "batch", "step"))
        self.totals, self._resumed = Totals(**state["totals"]), dict(state["place"])
        _restore_rng(self._resumed["rng"])

    def _remaining(self) -> Iterator[Any]:
        """The batches of this epoch that were not trained on yet."""
        place, self._resumed = self._resumed, None
        if place is None:
            self._epoch_rng = get_rng_state()
            return iter(self.batches)
        loaders = {"batches": self.batches, "validation": self.validation}
        told = [name for name, loader in loaders.items() if place[name] and hasattr(loader, "load_state_dict")]
        for name in told:
            loaders[name].load_state_dict(place[name])
        skip = 0 if "batches" in told else self.batch
        self._epoch_rng, self._exhausted = place["epoch_rng"], place["exhausted"]
        if self._exhausted:
            return iter(())
        _restore_rng(self._epoch_rng)
        iterator = iter(self.batches)
        if sum(1 for _ in islice(iterator, skip)) < skip:
            raise TrainingError(f"fit: the checkpoint was made after batch {skip}, but these batches end before it")
        if self.batch:
            _restore_rng(place["rng"])
        return iterator


def _restore_rng(state: Mapping[str, Any]) -> None:
    for device, generator in state.items():
        try:
            set_rng_state({device: generator})
        except RuntimeError as error:  # the run was on a device that this machine lacks
            warnings.warn(f"resume: random numbers of {device} start anew, so bits will differ ({error})", stacklevel=3)


def example_trainer(**options: Any) -> tuple[Any, list]:
    """A small network with dropout, the same each time, and six batches of different sizes. For the tests."""
    manual_seed(3)
    model = Sequential(Linear(5, 16), relu, Dropout(0.2), Linear(16, 3))
    batches = [(randn(n, 5), randint(3, (n,))) for n in (8, 8, 8, 8, 8, 5)]
    optimizer = Adam(model.parameters(), lr=0.02)
    return Trainer(model, optimizer, cross_entropy, {"accuracy": accuracy}, **options), batches


def test_fit_is_the_six_lines() -> None:
    trainer, batches = example_trainer()
    rows = trainer.fit(batches, epochs=2, validation=batches)
    by_hand, _ = example_trainer()
    for inputs, targets in batches * 2:
        by_hand.optimizer.zero_grad()
        cross_entropy(by_hand.model(inputs), targets).backward()
        by_hand.optimizer.step()
    assert trainer.predict(batches).tolist() == by_hand.predict(batches).tolist()
    outputs, classes = by_hand.predict(batches), cat([targets for _, targets in batches])
    assert_close(rows[1]["val_loss"], cross_entropy(outputs, classes), rtol=1e-5)
    assert_close(rows[1]["val_accuracy"], accuracy(outputs, classes))


def test_accumulated_batches_are_one_big_batch() -> None:
    weights = []
    for accumulate in (1, 6):
        trainer, batches = example_trainer(accumulate=accumulate, clip_norm=0.5)
        trainer.model[2].p, trainer.optimizer = 0.0, SGD(trainer.model.parameters(), lr=0.5)
        big = [(cat([x for x, _ in batches]), cat([y for _, y in batches]))]
        trainer.fit(big if accumulate == 1 else batches, epochs=3)
        weights.append(trainer.model[0].weight)
    assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def test_a_bad_loss_stops_before_it_does_damage() -> None:
    trainer, batches = example_trainer()
    before = trainer.model[0].weight.tolist()
    message = message_of(trainer.fit, [(batches[0][0] * math.nan, batches[0][1])], 1, error=TrainingError)
    assert "the loss is nan at epoch 1, batch 1, step 1, learning rate 0.02" in message
    assert trainer.model[0].weight.tolist() == before
    assert "no batches" in message_of(trainer.fit, iter(batches), 2, error=TrainingError)  # used up by epoch 2
    assert "batch 1 is empty" in message_of(trainer.fit, [(randn(0, 5), randn(0))], 3, error=ValueError)


def test_mixed_precision_learns_as_float32_does() -> None:
    losses = []
    for options in ({}, {"precision": "float16", "scaler": GradScaler(init_scale=1024.0)}):
        trainer, batches = example_trainer(**options)
        losses.append(trainer.fit(batches, epochs=5)[-1]["loss"])
    assert 0 < abs(losses[0] - losses[1]) < 0.02


# %% [markdown]
# ## Systems analysis
#
# Where does a step's time go? For a small model much of it is the door of module 02, passed a few dozen times; larger
# batches pay for it once for more examples, until the arithmetic takes over. The trainer itself should not show.


# %%
def analyze() -> None:
    """Measure the parts of a training step, examples a second, and the memory that backward needs, by batch size."""
    model = Sequential(Linear(784, 128), relu, Linear(128, 10))
    optimizer, rows = Adam(model.parameters()), []
    for size in (1, 8, 64, 512):
        images, labels, chosen = randn(4 * size, 784), randint(10, (4 * size,)), randint(4 * size, (size,))

        def step() -> list[float]:
            """Seconds of data, forward, backward and optimizer."""
            start = time.perf_counter()
            inputs, targets = images[chosen], labels[chosen]  # noqa: B023 - called within this turn of the loop
            batch = time.perf_counter()
            loss = cross_entropy(model(inputs), targets)
            forward = time.perf_counter()
            loss.backward()
            backward = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            return [batch - start, forward - batch, backward - forward, time.perf_counter() - backward]

        parts = [median(times) for times in zip(*(step() for _ in range(60)), strict=True)]
        tracemalloc.start()
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        del loss
        rows.append([size, *(f"{1e6 * t:,.0f}" for t in (*parts, sum(parts))), size / sum(parts), held])
    headers = ["batch", "data, µs", "forward", "backward", "optimizer", "in all", "examples/s", "bytes for backward"]
    print_table(headers, rows)
    weights = sum(p.nbytes for p in model.parameters())
    memory = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
    print_table(["always held", "bytes"], [["weights", weights], ["gradients", weights], ["Adam's means", memory]])


# %% [markdown]
# ## Production context
#
# PyTorch leaves the loop to its users and gives the parts: `torch.amp.autocast` and `torch.amp.GradScaler` are ours,
# `torch.save` pickles (here nothing is). Lightning's and Hugging Face's `Trainer` and Keras's `fit` are the models of
# ours. Few of them resume with the same bits: a `DataLoader` does not know its place (`torchdata`'s
# `StatefulDataLoader` does). At scale, checkpoints are sharded and written in the background, and a run survives the
# loss of a machine. Left out here: training on several devices at once.

# %% [markdown]
# ## Integration testing
#
# A run abandoned in the middle of an epoch and resumed by a trainer that began differently, against one left alone.


# %%
class SaveAt(Callback):
    """Save once, after a certain step, and give up."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            trainer.save(self.path)
            raise InterruptedError


def test_a_resumed_run_ends_with_the_same_bits() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, final = Path(folder, "checkpoint.safetensors"), []
        for stop_at in (None, 8):
            trainer, batches = example_trainer(callbacks=[SaveAt(path, stop_at)] if stop_at else [])
            trainer.scheduler = StepLR(trainer.optimizer, 1, 0.5)
            if stop_at:
                message_of(trainer.fit, batches, 3, error=InterruptedError)
                trainer, batches = example_trainer()
                trainer.scheduler = StepLR(trainer.optimizer, 1, 0.5)
                manual_seed(99)
            trainer.fit(batches, 3, resume=path if stop_at else None)
            trainer.save(path)
            final.append({name: x.tolist() for name, x in load(path).items()} | load(path).metadata)
        assert final[0] == final[1]
        path.write_bytes(path.read_bytes()[:-1])
        assert str(path) in message_of(trainer.resume, path, error=ValueError)


# %% [markdown]
# ## Thinking questions
#
# 1. A checkpoint of an Adam run is three times the size of its weights. What could be left out, and at what cost?
# 2. From the table: at which batch size does doubling it no longer nearly double the examples a second? Why there?
# 3. A checkpoint takes 2 seconds to write, and a machine fails once in 10 hours. How often should it be written?
# 4. Accumulation gives the gradient of a big batch. With which layers of later modules would it not?

# %% [markdown]
# ## Summary
#
# A run is a function of its state, and the state fits in one file. The foundations are complete: tensors, layers,
# losses, gradients, optimizers and a loop that learns real digits and survives the night. Part II gives it pictures.


if __name__ == "__main__":
    run_module(globals())
