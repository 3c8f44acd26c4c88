"""The folder of a run that takes a while: what it was begun with, how it is resumed, and when its results are there."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tinytorch import Trainer
from tinytorch.m01_setup import atomic_write
from tinytorch.m08_training import LAST, PREVIOUS, Callback, read_checkpoint
from tinytorch.m09_spatial import count_parameters
from tinytorch.milestones.program import UsageError

Found = TypeVar("Found")


class Settings(Callback):
    """Keeps what a run was begun with in its checkpoints, so that it is not continued with anything else.

    Args:
        program: the name of the milestone.
        content: a checksum of what it learns, where that may change under the same options.
        options: its options by name; a flag that was not given is left out.
    """

    def __init__(self, program: str, content: str | None = None, **options: Any) -> None:
        self.content = {} if content is None else {"content": content}
        self.values = {"program": program, **options}

    def state_dict(self) -> dict[str, Any]:
        return self.values | self.content

    def check(self, state: dict[str, Any], folder: Path) -> None:
        """UsageError unless the state of a run comes from one with these settings."""
        begun = dict(settings_of(state))
        content = begun.pop("content", None)
        if begun != self.values:
            options = [f"--{name}" if value is True else f"--{name} {value}" for name, value in begun.items()]
            own = begun.get("program") == self.values["program"]
            what = " ".join(options[1:]) if own else "another program"
            raise UsageError(f"--resume: the run in {folder} was begun with {what}; resume it with the same, "
                             "or begin a new run without --resume")  # fmt: skip
        if content != self.content.get("content"):
            raise UsageError(f"--resume: what the run in {folder} was learning has changed since it was begun; "
                             "begin a new run without --resume")  # fmt: skip


def settings_of(state: dict[str, Any]) -> dict[str, Any]:
    """What the run of a checkpoint was begun with: "program" first, and options; empty for another kind of run."""
    return dict(state["callbacks"]).get("Settings", {})


class Run:
    """A run under way has a folder of its own inside of that for results, which get there when it is complete.

    So results are always those of one run. A run that was interrupted is kept until another one is complete.

    Args:
        unit: "epoch" or "step": what its progress is told in.
    """

    def __init__(self, out: Path, unit: str = "epoch") -> None:
        self.out, self.folder, self.abandoned = out, out / "unfinished", out / "abandoned"
        self.unit = unit

    def state(self) -> dict[str, Any] | None:
        """What was saved last; None if nothing was."""
        try:
            return read_checkpoint(self.folder)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def begin(self) -> None:
        """Have an empty folder."""
        if any((self.folder / name).exists() for name in (LAST, PREVIOUS)):
            shutil.rmtree(self.abandoned, ignore_errors=True)
            self.folder.rename(self.abandoned)
            print(f"the run that was interrupted before is now in {self.abandoned}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def publish(self) -> None:
        """Put the results where they belong. Without a report, which is written last, they are not complete."""
        (self.out / "report.json").unlink(missing_ok=True)
        for file in sorted(self.folder.iterdir()):
            if file.name != PREVIOUS and not file.name.startswith("."):  # what a killed write left
                atomic_write(self.out / file.name, file.read_bytes())

    def finish(self) -> None:
        """Remove what could be resumed, once the report is written."""
        for folder in (self.folder, self.abandoned):
            shutil.rmtree(folder, ignore_errors=True)


class Waiting(Callback):
    """Measures how long training waits for its batches.

    Attributes:
        waited, trained: seconds that the loop stood still, and seconds in all, validation left out.
    """

    def __init__(self) -> None:
        self.waited = self.trained = 0.0

    def on_epoch_start(self, trainer: Trainer) -> None:
        self.begun = self.last = time.perf_counter()

    def on_step_end(self, trainer: Trainer) -> None:
        self.last = time.perf_counter()

    def on_epoch_end(self, trainer: Trainer) -> None:
        self.trained += self.last - self.begun
        self.waited += trainer.batches.waited

    @property
    def share(self) -> float:
        return self.waited / self.trained if self.trained else 0.0


def continue_or_begin(trainer: Trainer, settings: Settings, work: Run, resume: bool) -> None:
    """Bring the trainer to where an interrupted run was, if that is wanted and there is one; else begin."""
    state = work.state() if resume else None
    if state is None:
        work.begin()
        if resume:
            print(f"there is no interrupted run in {work.out}: this one begins anew")
        return
    settings.check(state, work.folder)
    try:
        trainer.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--resume: the run in {work.folder} does not fit this program: {error}") from error
    print(f"going on after {work.unit} {getattr(trainer, work.unit)}")


def carry_out(
    arguments: argparse.Namespace, trainer: Trainer, settings: Settings, waiting: Waiting, work: Run,
    data: tuple[Iterable, int, Iterable], examine: Callable[[], Found],
) -> tuple[Found, dict[str, Any]]:  # fmt: skip
    """Train to the end, examine and publish: what `examine` returns, and what there is to report of the training.

    Args:
        arguments: as parsed, and `argv`, by which an interrupted run says how to resume it.
        waiting: one of the trainer's callbacks, as `settings` is.
        data: what `Trainer.fit` takes: batches, the number of epochs, batches for validation.
        examine: looks at what was learned, and writes into the folder of the run.
    """
    resumed = {f"resumed_after_{work.unit}": getattr(trainer, work.unit)} if trainer.epoch else {}
    started = time.perf_counter()  # what is timed begins here, also in a run that is resumed
    try:
        trainer.fit(*data)
        seconds = time.perf_counter() - started
        found = examine()
    except KeyboardInterrupt:
        say_how_to_resume(work, arguments.argv, settings.values["program"])
        raise
    work.publish()
    arguments.finish = work.finish
    return found, {
        "parameters": count_parameters(trainer.model),
        "epochs": trainer.epoch,
        "steps": trainer.step,
        **resumed,
        "training_seconds": round(seconds, 2),
        "waiting_share": round(waiting.share, 4),
        "final": trainer.history[-1],
    }


def say_how_to_resume(work: Run, argv: Sequence[str], name: str) -> None:
    state = work.state()
    if state is None:
        print(f"\n{name}: nothing was saved yet", file=sys.stderr)
        return
    options = shlex.join([*(word for word in argv if word != "--resume"), "--resume"])
    command = f"tinytorch milestone run {name} {options}"
    saved = f"saved up to {work.unit} {state['progress'][work.unit]}"
    print(f"\n{name}: {saved}; to go on: {command}", file=sys.stderr)
