"""What the programs that learn to read pictures have in common: a recipe, a run that can be resumed, an examination.

The test pictures are looked at once, at the end. The curves show validation pictures, a part of the training set that
is not trained on. Nothing is chosen by them: the weights that are tested are those of the last epoch.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tinytorch
from tinytorch import Trainer, nn
from tinytorch.m08_training import accuracy
from tinytorch.m08_training_appendix import Checkpointing, History, ProgressBar, plot_history
from tinytorch.m09_spatial import count_parameters
from tinytorch.milestones import MILESTONES
from tinytorch.milestones.program import Check, Options, UsageError, whole
from tinytorch.milestones.report import confusion_matrix, plot_confusion, plot_mistakes, print_confusion
from tinytorch.milestones.runs import Run, Settings, Waiting, carry_out, continue_or_begin
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


def recipe_of(settings: dict[str, Any]) -> Recipe:
    """The recipe that a run with these settings follows; KeyError if there is none."""
    programs = {found.name for found in MILESTONES}
    if settings["program"] not in programs:  # what stands in a file must not choose what is imported
        raise KeyError(settings["program"])
    program = importlib.import_module(f"tinytorch.milestones.{settings['program']}")
    return program.RECIPES[settings["data"] + (FULL if settings.get("full") else "")]


# -- learning ----------------------------------------------------------------------------------------------------------


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

    network = f"{describe(model)} of {count_parameters(model):,} parameters"
    print(f"{network} learns {recipe.title}: {len(train.dataset):,} pictures\n"
          f"for training, {len(validation.dataset):,} for validation, {len(test):,} for the test\n"
          "each line: training/validation")  # fmt: skip

    def look() -> float:
        test_accuracy = examine(trainer, test, recipe.title, work.folder)
        draw(model, work.folder)
        return test_accuracy

    data = (train, arguments.epochs, validation)
    test_accuracy, training = carry_out(arguments, trainer, settings, waiting, work, data, look)
    print(f"\ntraining waited {100 * waiting.share:.1f} % of its time for data")
    return [Check(f"test accuracy on {recipe.title}", test_accuracy, least=recipe.threshold)], {
        **{name: value for name, value in settings.values.items() if name not in ("program", "seed")},
        "network": describe(model),
        **training,
    }


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
