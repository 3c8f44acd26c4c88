"""The multilayer perceptron, 1986: backpropagation reads handwritten digits.

David Rumelhart, Geoffrey Hinton and Ronald Williams showed in "Learning representations by back-propagating errors"
that the chain rule trains layers nobody can label, the hidden ones, and that what these come to represent is useful.
They stepped down the gradient with momentum, as this program does. ReLU, dropout, and a learning rate that falls along
a cosine, came later.

The test pictures are looked at once, at the end. The curves show validation pictures, a part of the training set that
is not trained on. Nothing is chosen by them: the weights that are tested are those of the last epoch.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tinytorch
from tinytorch import Trainer, nn, optim
from tinytorch.m01_setup import atomic_write
from tinytorch.m08_training import LAST, PREVIOUS, Callback, accuracy, read_checkpoint
from tinytorch.m08_training_appendix import Checkpointing, History, ProgressBar, plot_history
from tinytorch.milestones.datasets import Arrays, Batches, digits, mnist
from tinytorch.milestones.program import Check, Options, UsageError, run
from tinytorch.milestones.report import confusion_matrix, plot_confusion, plot_mistakes, print_confusion


@dataclass(frozen=True)
class Recipe:
    """How a data set is learned, and what must be reached."""

    title: str
    hidden: tuple[int, ...]
    epochs: int
    batch_size: int
    threshold: float
    learning_rate: float = 0.1
    dropout: float = 0.2


RECIPES = {
    "digits": Recipe("Digits", hidden=(128,), epochs=30, batch_size=32, threshold=0.96),
    "mnist": Recipe("MNIST", hidden=(256, 128), epochs=20, batch_size=128, threshold=0.98),
}


# -- model, data and training ------------------------------------------------------------------------------------------


def make_model(pixels: int, recipe: Recipe) -> nn.Module:
    """Pictures (N, 1, H, W) to ten scores (N, 10)."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = pixels
    for hidden in recipe.hidden:
        layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(recipe.dropout)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, 10))


def load_data(name: str, root: Path | None) -> Arrays:
    try:
        return digits() if name == "digits" else mnist(root)
    except ValueError as error:
        raise UsageError(str(error)) from error


def make_batches(images: Any, labels: Any, recipe: Recipe, seed: int) -> tuple[Batches, Batches]:
    """Batches for training, and of every tenth picture for validation."""
    held_out = [i % 10 == 9 for i in range(len(labels))]
    kept = [not held for held in held_out]
    train = Batches(images[kept], labels[kept], recipe.batch_size, seed=seed)
    return train, Batches(images[held_out], labels[held_out], batch_size=500, shuffle=False)


def make_trainer(pixels: int, recipe: Recipe, steps: int, callbacks: Sequence[Callback]) -> Trainer:
    """A trainer for `steps` steps in all."""
    model = make_model(pixels, recipe)
    optimizer = optim.SGD(model.parameters(), lr=recipe.learning_rate, momentum=0.9, weight_decay=1e-4)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), {"accuracy": accuracy}, schedule,
                   scheduler_interval="step", callbacks=callbacks)  # fmt: skip


# -- the folder of a run -----------------------------------------------------------------------------------------------


class Settings(Callback):
    """Keeps what a run was begun with in its checkpoints, so that it is not continued with anything else."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def check(self, state: dict[str, Any], folder: Path) -> None:
        """UsageError unless the state of a run comes from one with these settings."""
        begun = dict(state["callbacks"]).get("Settings")
        if begun != self.values:
            what = " ".join(f"--{name} {value}" for name, value in (begun or {}).items()) or "another program"
            raise UsageError(f"--resume: the run in {folder} was begun with {what}; resume it with the same, "
                             "or begin a new run without --resume")  # fmt: skip


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
        if (self.folder / LAST).exists():
            shutil.rmtree(self.abandoned, ignore_errors=True)
            self.folder.rename(self.abandoned)
            print(f"the run that was interrupted before is now in {self.abandoned}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def publish(self) -> None:
        """Put the results where they belong. Without a report they are not complete: it is written last."""
        (self.out / "report.json").unlink(missing_ok=True)
        for file in sorted(self.folder.iterdir()):
            if file.name != PREVIOUS and not file.name.startswith("."):  # what a killed write left
                atomic_write(self.out / file.name, file.read_bytes())
        for folder in (self.folder, self.abandoned):
            shutil.rmtree(folder, ignore_errors=True)


# -- the program -------------------------------------------------------------------------------------------------------


def program(arguments: argparse.Namespace) -> tuple[list[Check], dict[str, Any]]:
    recipe = RECIPES[arguments.data]
    recipe = replace(recipe, epochs=arguments.epochs or recipe.epochs)
    train_images, train_labels, test_images, test_labels = load_data(arguments.data, arguments.root)
    tinytorch.manual_seed(arguments.seed)
    train, validation = make_batches(train_images, train_labels, recipe, arguments.seed)
    work = Run(arguments.out)
    settings = Settings(data=arguments.data, epochs=recipe.epochs, seed=arguments.seed)
    callbacks = [settings, ProgressBar(), History(work.folder / "history.jsonl"), Checkpointing(work.folder)]
    trainer = make_trainer(train_images[0].size, recipe, recipe.epochs * len(train), callbacks)
    continue_or_begin(trainer, settings, work, arguments.resume)

    parameters = sum(p.numel() for p in trainer.model.parameters())
    widths = "-".join(str(width) for width in (train_images[0].size, *recipe.hidden, 10))
    print(f"A network {widths} of {parameters:,} parameters learns {recipe.title}: {len(train.labels):,} pictures\n"
          f"for training, {len(validation.labels):,} for validation, {len(test_labels):,} for the test\n"
          "each line: training/validation")  # fmt: skip
    started = time.perf_counter()
    try:
        trainer.fit(train, recipe.epochs, validation)
        seconds = time.perf_counter() - started
        test_accuracy = examine(trainer, test_images, test_labels, recipe.title, work.folder)
    except KeyboardInterrupt:
        say_how_to_resume(work, arguments.argv)
        raise
    work.publish()
    return [Check(f"test accuracy on {recipe.title}", test_accuracy, least=recipe.threshold)], {
        "data": arguments.data,
        "network": widths,
        "parameters": parameters,
        "epochs": trainer.epoch,
        "steps": trainer.step,
        "training_seconds": round(seconds, 2),
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


def say_how_to_resume(work: Run, argv: Sequence[str]) -> None:
    state = work.state()
    if state is None:
        print("\nmlp: nothing was saved yet", file=sys.stderr)
        return
    command = shlex.join([*(word for word in argv if word != "--resume"), "--resume"])
    print(f"\nmlp: saved up to epoch {state['progress']['epoch']}; to go on: tinytorch milestone run mlp {command}",
          file=sys.stderr)  # fmt: skip


def examine(trainer: Trainer, images: Any, labels: Any, title: str, folder: Path) -> float:
    """Read the test pictures, print and draw what came of it, and return the share that was read rightly."""
    scores = trainer.predict(Batches(images, labels, batch_size=500, shuffle=False))
    confidence, predictions = tinytorch.max(tinytorch.softmax(scores, 1), 1)
    matrix = confusion_matrix(labels, predictions, classes=10)
    print()
    print_confusion(matrix)
    plot_history(trainer.history, folder / "curves.png", f"A network learns {title}")
    plot_confusion(matrix, folder / "confusion.png", title=f"Test pictures of {title}")
    plot_mistakes(images, labels, predictions, confidence, folder / "mistakes.png")
    return int(matrix.trace()) / len(labels)


def main(argv: Sequence[str]) -> int:
    """Run the program with these command-line arguments; returns its exit status."""
    epochs = ", ".join(f"{recipe.epochs} for {name}" for name, recipe in RECIPES.items())
    options = Options("mlp", "Backpropagation (1986) teaches a network to read handwritten digits.", epochs=epochs,
                      example="--data mnist --root ~/mnist")  # fmt: skip
    options.add_argument("--data", choices=list(RECIPES), default="digits", help="what to learn (digits)")
    options.add_argument("--root", type=Path, metavar="DIR", help="folder with MNIST's files (else a download)")
    options.add_argument("--resume", action="store_true", help="go on with an interrupted run, if there is one")
    options.set_defaults(argv=list(argv))
    return run(options, argv, program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
