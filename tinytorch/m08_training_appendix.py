"""Appendix to module 08: callbacks for a `Trainer`, and what else training needs besides.

A progress bar, checkpoints, early stopping, averaged weights, a history as JSON lines with its plot, a log of learning
rates. Libraries for bars and plots are imported when the first one is shown.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinytorch.m01_setup import atomic_write
from tinytorch.m01_setup_appendix import BLUE, ORANGE, dress_axes, new_figure, save_figure
from tinytorch.m02_tensor import Tensor, eq, gt
from tinytorch.m07_optimizers_appendix import EMA
from tinytorch.m08_training import LAST, LOWER, PREVIOUS, Callback, Trainer, read_checkpoint

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LOWER.add("einsum_op")

# -- metrics and weights -----------------------------------------------------------------------------------------------


def binary_accuracy(outputs: Tensor, targets: Tensor, threshold: float = 0.0) -> Tensor:
    """The share of scores that lie above the threshold where the target is 1, and not where it is 0.

    Args:
        outputs, targets: tensors of the same shape.
        threshold: 0 for logits, 0.5 for probabilities.
    """
    if outputs.shape != targets.shape:
        raise ValueError(f"binary_accuracy: targets {targets.shape} do not fit scores {outputs.shape}")
    return eq(gt(outputs, threshold), gt(targets, 0.5)).mean()


def model_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """The model's part of a checkpoint, for `model.load_state_dict`.

    Raises:
        FileNotFoundError: it is a folder that holds no checkpoint.
        ValueError: in one line, with the file's name, if it is damaged or no checkpoint.
    """
    state = read_checkpoint(path)
    if state is None:
        raise FileNotFoundError(f"model_state: {os.fspath(path)} holds no checkpoint")
    return state["model"]


# -- the best epoch ----------------------------------------------------------------------------------------------------

BEST = "best.safetensors"


class Best:
    """The best value so far of one column of the history.

    Args:
        monitor: the column; by default "val_loss", and "loss" where there is no validation.
        mode: whether "min" or "max" is better; by default "min" for a name that ends in "loss", else "max".
        min_delta: by how much a value must be better to count.
    """

    def __init__(self, monitor: str | None = None, mode: str | None = None, min_delta: float = 0.0) -> None:
        if mode not in (None, "min", "max") or not min_delta >= 0:
            raise ValueError(f"expected mode 'min' or 'max' and min_delta >= 0, got {mode!r} and {min_delta}")
        self.monitor, self.mode, self.min_delta = monitor, mode, min_delta
        self.value: float | None = None

    def improved(self, row: Mapping[str, float]) -> bool:
        """Whether the row of an epoch is better than all before; nan never is."""
        name = self.monitor or ("val_loss" if "val_loss" in row else "loss")
        if name not in row:
            raise ValueError(f"there is no {name!r} to monitor; the history has {', '.join(row)}")
        sign = -1 if (self.mode or ("min" if name.endswith("loss") else "max")) == "min" else 1
        better = self.value is None or sign * (row[name] - self.value) > self.min_delta
        if not better or math.isnan(row[name]):
            return False
        self.value = row[name]
        return True


class Checkpointing(Callback):
    """Saves the run into a folder: `last.safetensors`, the one before it, and that of the best epoch.

    A kill at any moment leaves at least one good file of what was saved, and `fit(resume=folder)` finds it.

    Args:
        every: save after so many steps, too, and not only after each epoch.
        best: whether to keep the best epoch as `best.safetensors`.
        monitor, mode, min_delta: what best means; see `Best`.
    """

    order = 100  # after the other callbacks, so that their state is that of the same moment

    def __init__(
        self, folder: str | os.PathLike, every: int | None = None, best: bool = True, monitor: str | None = None,
        mode: str | None = None, min_delta: float = 0.0,
    ) -> None:  # fmt: skip
        if every is not None and every < 1:
            raise ValueError(f"Checkpointing: every must be at least 1 step, not {every}")
        self.folder, self.every = Path(folder), every
        self.best = Best(monitor, mode, min_delta) if best else None

    def on_fit_start(self, trainer: Trainer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def on_step_end(self, trainer: Trainer) -> None:
        if self.every and trainer.step % self.every == 0:
            self._save(trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        if self.best and self.best.improved(trainer.history[-1]):
            trainer.save(self.folder / BEST)
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        new, last = self.folder / "new.safetensors", self.folder / LAST
        trainer.save(new)
        if last.exists():
            os.replace(last, self.folder / PREVIOUS)
        os.replace(new, last)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best and self.best.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.best:
            self.best.value = state["best"]


class EarlyStopping(Callback):
    """Ends training when `patience` epochs in a row have not been better than the best one before.

    Args:
        restore: whether the model gets the best epoch's weights back when training ends, early or not.
        monitor, mode, min_delta: what better means; see `Best`.

    Attributes:
        bad_epochs: how many epochs there have been since the best one.
    """

    def __init__(
        self, patience: int = 5, min_delta: float = 0.0, monitor: str | None = None, mode: str | None = None,
        restore: bool = True,
    ) -> None:  # fmt: skip
        if patience < 1:
            raise ValueError(f"EarlyStopping: patience must be 1 epoch or more, not {patience}")
        self.best, self.patience, self.restore = Best(monitor, mode, min_delta), patience, restore
        self.bad_epochs = 0
        self.weights: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        trainer.stop = trainer.stop or self.bad_epochs >= self.patience  # a run that had ended, resumed

    def on_epoch_end(self, trainer: Trainer) -> None:
        if self.best.improved(trainer.history[-1]):
            self.bad_epochs = 0
            if self.restore:
                self.weights = {name: x.clone() for name, x in trainer.model.state_dict().items()}
        else:
            self.bad_epochs += 1
            trainer.stop = trainer.stop or self.bad_epochs >= self.patience

    def on_fit_end(self, trainer: Trainer) -> None:
        if self.weights is not None:
            trainer.model.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best.value, "bad_epochs": self.bad_epochs, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best.value, self.bad_epochs, self.weights = state["best"], state["bad_epochs"], state["weights"]


class AveragedWeights(Callback):
    """Updates an `EMA` of the weights after each step, and saves it with the run.

    averaged = AveragedWeights(EMA(model))
    trainer = Trainer(model, …, callbacks=[averaged])
    with averaged.ema.applied():
        trainer.evaluate(batches)
    """

    def __init__(self, ema: EMA) -> None:
        self.ema = ema

    def on_step_end(self, trainer: Trainer) -> None:
        self.ema.update()

    def state_dict(self) -> dict[str, Any]:
        return self.ema.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ema.load_state_dict(dict(state))


# -- records -----------------------------------------------------------------------------------------------------------


class History(Callback):
    """Writes the history to a file of JSON lines, one for each epoch, as soon as it is over.

    A resumed run goes on in its file, without a line twice. A run that begins anew leaves the file of the run before it
    under the next free name: history.jsonl becomes history.1.jsonl.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def on_fit_start(self, trainer: Trainer) -> None:
        known = "".join(map(_line, trainer.history))
        begun = trainer.epoch or trainer.batch
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not (begun and self.path.read_text(encoding="utf-8").startswith(known)):
            os.replace(self.path, self._free_name())
        atomic_write(self.path, known.encode())

    def _free_name(self) -> Path:
        number = 1
        while (path := self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")).exists():
            number += 1
        return path

    def on_epoch_end(self, trainer: Trainer) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(trainer.history[-1]))
            file.flush()
            os.fsync(file.fileno())


def _line(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON, which has no infinity and no nan: they become null."""
    finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_history(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows that `History` wrote; a last line that a kill cut off is left out.

    Raises:
        ValueError: with the file's name and the line's number, if another line is no row of a history.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.endswith("\n"):
            raise ValueError(f"{os.fspath(path)}, line {number}: not a row of a history: {line.strip()[:60]!r}")
    return rows


def plot_history(
    history: Sequence[Mapping[str, Any]] | str | os.PathLike, path: str | os.PathLike, title: str = "Training",
    unit: str = "epoch",
) -> Path:  # fmt: skip
    """Draw each column over the epochs, training and validation in one panel; returns the path of the picture.

    Accuracies are shown in per cent, the learning rate if it changed. What is missing or not finite leaves a gap.

    Args:
        history: rows, as `fit` returns them, or the file that `History` wrote.
        unit: what "epoch" in the rows counts.
    """
    from matplotlib.ticker import MaxNLocator

    rows = read_history(history) if isinstance(history, (str, os.PathLike)) else history
    if not rows:
        raise ValueError("plot_history: the history holds no epoch")
    epochs = [row["epoch"] for row in rows]
    names = dict.fromkeys(name.removeprefix("val_") for row in rows for name in row if name != "epoch")
    shown = [name for name in names if name != "lr" or len({row.get("lr") for row in rows}) > 1]
    figure = new_figure(4.6 * len(shown), 3.8, title)
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        scale, label = (100, f"{name} (%)") if "accuracy" in name else (1, {"lr": "learning rate"}.get(name, name))
        for column, kind, colour, style in ((name, "training", BLUE, "-"), (f"val_{name}", "validation", ORANGE, "--")):
            values = [scale * _number(row.get(column)) for row in rows]
            if not all(map(math.isnan, values)):
                marker = "o" if len(rows) <= 30 else None
                axes.plot(epochs, values, style, color=colour, label=kind, marker=marker, markersize=3.5, linewidth=1.8)
        dress_axes(axes, unit, label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
    return save_figure(figure, path)


def _number(value: Any) -> float:
    """A value to be drawn; nan, which leaves a gap, for none and for infinity."""
    return value if value is not None and math.isfinite(value) else math.nan


class LearningRateLog(Callback):
    """Remembers the learning rates of all groups wherever they change.

    Attributes:
        rows: [step, rates] where the rates became what they are: after `step` steps; the first is [0, …].
    """

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []

    def on_fit_start(self, trainer: Trainer) -> None:
        self._look(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        self._look(trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        if not self.rows or self.rows[-1][1] != rates:
            self.rows.append([trainer.step, rates])

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = [list(row) for row in state["rows"]]


# -- the bar -----------------------------------------------------------------------------------------------------------


class ProgressBar(Callback):
    """Shows where training is: a bar with loss, metrics, items a second and the time that is left of the epoch.

    A line for each epoch stays, with training and validation as "loss 0.31/0.35". Where there is no terminal, these
    lines are all there is.

    Args:
        console: where to print; by default standard output.
    """

    INTERVAL = 0.1  # seconds between two looks at the bar: a step should not wait for its picture

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.next_look = math.inf

    def on_fit_start(self, trainer: Trainer) -> None:
        if self.console is None:
            from rich.console import Console

            self.console = Console(highlight=False, soft_wrap=True)

    def label(self, trainer: Trainer, epoch: int) -> str:
        """What stands before an epoch's figures."""
        return f"epoch {epoch}/{trainer.epochs}"

    def on_epoch_start(self, trainer: Trainer) -> None:
        self.started, self.items_before, self.items = time.perf_counter(), trainer.totals.count, trainer.totals.count
        if self.console is not None and self.console.is_terminal:
            self._open(trainer)
            self.next_look = self.started

    def _open(self, trainer: Trainer) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=14), TaskProgressColumn(),
                   TextColumn("{task.fields[text]}"), TimeRemainingColumn(compact=True))  # fmt: skip
        self.bar = Progress(*columns, console=self.console, auto_refresh=False, transient=True)
        batches = len(trainer.batches) if hasattr(trainer.batches, "__len__") else None
        label = self.label(trainer, trainer.epoch + 1)
        self.bar.add_task(label, total=batches, completed=trainer.batch, text="")
        self.bar.start()

    def on_step_end(self, trainer: Trainer) -> None:
        self.items = trainer.totals.count
        if self.bar is not None and time.perf_counter() >= self.next_look:
            self.next_look = time.perf_counter() + self.INTERVAL
            text = _summary(trainer.totals.means(), limit=2) + f"  {self._rate():,.0f}/s"
            self.bar.update(self.bar.task_ids[0], completed=trainer.batch, text=text, refresh=True)

    def _rate(self) -> float:
        return (self.items - self.items_before) / max(time.perf_counter() - self.started, 1e-9)

    def on_epoch_end(self, trainer: Trainer) -> None:
        rate, taken, row = self._rate(), time.perf_counter() - self.started, dict(trainer.history[-1])
        self._close()
        text = f"{self.label(trainer, trainer.epoch)}  {_summary(row)}  {rate:,.0f}/s  {taken:.1f} s"
        if self.console is not None:
            self.console.print(text, markup=False)

    def on_fit_end(self, trainer: Trainer) -> None:
        self._close()

    def on_error(self, trainer: Trainer) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _summary(row: Mapping[str, float], limit: int | None = None) -> str:
    """Names and values, training and validation, in a few characters: "loss 0.412/0.45  accuracy 0.913/0.9"."""
    names = [name for name in row if name not in ("epoch", "lr") and not name.startswith("val_")]
    pairs = [(name, [row[key] for key in (name, f"val_{name}") if key in row]) for name in names[:limit]]
    return "  ".join(f"{name} {'/'.join(f'{value:.4g}' for value in values)}" for name, values in pairs)
