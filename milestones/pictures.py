"""What the programs that learn to read pictures have in common: a recipe, a run that can be resumed, an examination.

The test pictures are looked at once, at the end. The curves show validation pictures, a part of the training set that
is not trained on. Nothing is chosen by them: the weights that are tested are those of the last epoch.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tinytorch
from tinytorch import Trainer, nn
from tinytorch.m01_setup import atomic_write
from tinytorch.m08_training import LAST, PREVIOUS, Callback, accuracy, read_checkpoint
from tinytorch.m08_training_appendix import Checkpointing, History, ProgressBar, plot_history
from tinytorch.milestones import MILESTONES
from tinytorch.milestones.program import Check, Options, UsageError, whole
from tinytorch.milestones.report import confusion_matrix, plot_confusion, plot_mistakes, print_confusion
from tinytorch.transforms import Compose, Normalize
from tinytorch.utils.data import DataLoader, Subset


@dataclass(frozen=True)
class Recipe:
    """How a data set of pictures is learned, and what must be reached.

    Attributes:
        dataset: called with `train` and `transform`, and `root` unless the pictures are in the package.
        shape: (channels, height, width) of a picture.
        network: makes the untrained network.
        optimize: the optimizer and the schedule of a network's training, which takes so many steps.
        margin: around what is written in a picture, as a share of its size.
        augment: transforms of the training pictures.
        mean, std: of each channel of the training pictures, by which all are normalised.
        loss: of scores and labels.
    """

    title: str
    dataset: Callable[..., Any]
    shape: tuple[int, int, int]
    network: Callable[[], nn.Module]
    optimize: Callable[[nn.Module, int], tuple[Any, Any]]
    epochs: int
    batch_size: int
    threshold: float
    margin: float = 0.0
    augment: tuple = ()
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    loss: Callable = field(default_factory=nn.CrossEntropyLoss)

    def pictures(self, root: Path | None, train: bool) -> Any:
        """The data set, its batches normalised."""
        where = {"root": root} if root is not None else {}
        if where and "root" not in inspect.signature(self.dataset).parameters:
            raise UsageError(f"--root: {self.title} comes with TinyTorch and needs no files; choose another --data")
        try:
            return self.dataset(train=train, transform=Normalize(self.mean, self.std), **where)
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(str(error)) from error

    def augmented(self, data: Any) -> Any:
        """The same data set, changed at random before it is normalised."""
        changed = copy.copy(data)
        changed.transform = Compose([*self.augment, data.transform])
        return changed


def picture_options(name: str, title: str, example: str, recipes: dict[str, Recipe], needs_files: str) -> Options:
    """The options that all of these programs take."""
    epochs = ", ".join(f"{recipe.epochs} for {key}" for key, recipe in recipes.items())
    options = Options(name, title, epochs=epochs, example=example)
    data = [key for key in recipes if not key.endswith(FULL)]
    options.add_argument("--data", choices=data, default="digits", help="what to learn (digits)")
    files = f"folder with {needs_files}'s files (else a download)"
    options.add_argument("--root", type=Path, metavar="DIR", help=files)
    options.add_argument("--workers", type=whole(0), default=1, metavar="N", help="threads that prepare batches (1)")
    options.add_argument("--resume", action="store_true", help="go on with an interrupted run, if there is one")
    return options


FULL = " --full"  # what stands behind a data set's name where a recipe takes its time


# -- the folder of a run -----------------------------------------------------------------------------------------------


class Settings(Callback):
    """Keeps what a run was begun with in its checkpoints, so that it is not continued with anything else.

    Args:
        program: the name of the milestone.
        options: its options by name; a flag that was not given is left out.
    """

    def __init__(self, program: str, **options: Any) -> None:
        self.values = {"program": program, **options}

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def check(self, state: dict[str, Any], folder: Path) -> None:
        """UsageError unless the state of a run comes from one with these settings."""
        begun = settings_of(state)
        if begun != self.values:
            options = [f"--{name}" if value is True else f"--{name} {value}" for name, value in begun.items()]
            own = begun.get("program") == self.values["program"]
            what = " ".join(options[1:]) if own else "another program"
            raise UsageError(f"--resume: the run in {folder} was begun with {what}; resume it with the same, "
                             "or begin a new run without --resume")  # fmt: skip


def settings_of(state: dict[str, Any]) -> dict[str, Any]:
    """What the run of a checkpoint was begun with: "program" first, and options; empty for another kind of run."""
    return dict(state["callbacks"]).get("Settings", {})


class Run:
    """A run under way has a folder of its own inside of that for results, which get there when it is complete.

    So results are always those of one run. A run that was interrupted is kept until another one is complete.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder, self.abandoned = out, out / "unfinished", out / "abandoned"

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


def recipe_of(settings: dict[str, Any]) -> Recipe:
    """The recipe that a run with these settings follows; KeyError if there is none."""
    programs = {found.name for found in MILESTONES}
    if settings["program"] not in programs:  # what stands in a file must not choose what is imported
        raise KeyError(settings["program"])
    program = importlib.import_module(f"tinytorch.milestones.{settings['program']}")
    return program.RECIPES[settings["data"] + (FULL if settings.get("full") else "")]


# -- learning ----------------------------------------------------------------------------------------------------------


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


def make_batches(recipe: Recipe, root: Path | None, seed: int, workers: int) -> tuple[DataLoader, DataLoader]:
    """Batches for training, and of every tenth picture for validation."""
    data = recipe.pictures(root, train=True)
    kept = Subset(recipe.augmented(data), [i for i in range(len(data)) if i % 10 != 9])
    train = DataLoader(
        kept, recipe.batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0, seed=seed
    )
    return train, DataLoader(Subset(data, range(9, len(data), 10)), batch_size=500, seed=seed)


def learn(
    arguments: argparse.Namespace, recipe: Recipe, settings: Settings, describe: Callable[[nn.Module], str],
    draw: Callable[[nn.Module, Path], Any] = lambda model, folder: None,
) -> tuple[list[Check], dict[str, Any]]:  # fmt: skip
    """Train a network by a recipe and examine it: what is to be checked, and what there is to report.

    Args:
        arguments: what `picture_options` parsed, with `argv`, and `epochs` filled in.
        describe: says in a few words what the network is.
        draw: draws figures of the network into a folder.
    """
    tinytorch.manual_seed(arguments.seed)
    train, validation = make_batches(recipe, arguments.root, arguments.seed, arguments.workers)
    test = recipe.pictures(arguments.root, train=False)
    work, waiting = Run(arguments.out), Waiting()
    callbacks = [settings, waiting, ProgressBar(), History(work.folder / "history.jsonl"), Checkpointing(work.folder)]
    model = recipe.network()
    optimizer, schedule = recipe.optimize(model, arguments.epochs * len(train))
    trainer = Trainer(model, optimizer, recipe.loss, {"accuracy": accuracy}, schedule, scheduler_interval="step",
                      callbacks=callbacks, device=tinytorch.get_default_device())  # fmt: skip
    continue_or_begin(trainer, settings, work, arguments.resume)
    resumed = {"resumed_after_epoch": trainer.epoch} if trainer.epoch else {}  # what is timed begins there

    parameters = sum(p.numel() for p in model.parameters())
    print(f"{describe(model)} of {parameters:,} parameters learns {recipe.title}: {len(train.dataset):,} pictures\n"
          f"for training, {len(validation.dataset):,} for validation, {len(test):,} for the test\n"
          "each line: training/validation")  # fmt: skip
    started = time.perf_counter()
    try:
        trainer.fit(train, arguments.epochs, validation)
        seconds = time.perf_counter() - started
        test_accuracy = examine(trainer, test, recipe.title, work.folder)
        draw(model, work.folder)
    except KeyboardInterrupt:
        say_how_to_resume(work, arguments.argv, settings.values["program"])
        raise
    work.publish()
    arguments.finish = work.finish
    print(f"\ntraining waited {100 * waiting.share:.1f} % of its time for data")
    return [Check(f"test accuracy on {recipe.title}", test_accuracy, least=recipe.threshold)], {
        **{name: value for name, value in settings.values.items() if name not in ("program", "seed")},
        "network": describe(model),
        "parameters": parameters,
        "epochs": trainer.epoch,
        "steps": trainer.step,
        **resumed,
        "training_seconds": round(seconds, 2),
        "waiting_share": round(waiting.share, 4),
        "final": trainer.history[-1],
    }


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
    print(f"going on after epoch {trainer.epoch}")


def say_how_to_resume(work: Run, argv: Sequence[str], name: str) -> None:
    state = work.state()
    if state is None:
        print(f"\n{name}: nothing was saved yet", file=sys.stderr)
        return
    options = shlex.join([*(word for word in argv if word != "--resume"), "--resume"])
    command = f"tinytorch milestone run {name} {options}"
    print(f"\n{name}: saved up to epoch {state['progress']['epoch']}; to go on: {command}", file=sys.stderr)


# -- examining ---------------------------------------------------------------------------------------------------------


def examine(trainer: Trainer, test: Any, title: str, folder: Path) -> float:
    """Read the test pictures, print and draw what came of it, and return the share that was read rightly."""
    scores = trainer.predict(DataLoader(test, batch_size=500))
    confidence, predictions = tinytorch.max(tinytorch.softmax(scores, 1), 1)
    matrix = confusion_matrix(test.targets, predictions, classes=len(test.classes))
    print()
    print_confusion(matrix, test.classes)
    plot_history(trainer.history, folder / "curves.png", f"A network learns {title}")
    plot_confusion(matrix, folder / "confusion.png", test.classes, title=f"Test pictures of {title}")
    pictures = test.data.to(tinytorch.float32) / test.white
    plot_mistakes(pictures, test.targets, predictions, confidence, folder / "mistakes.png", class_names=test.classes)
    return int(matrix.trace()) / len(test)
