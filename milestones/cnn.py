"""The convolutional network, 1998: a network that looks at pictures with a few weights that it uses everywhere.

Yann LeCun, Léon Bottou, Yoshua Bengio and Patrick Haffner showed in "Gradient-based learning applied to document
recognition" that a network of convolutions and pooling reads handwriting better than one that gets hand-made features;
theirs read millions of cheques a day. ReLU, batch normalisation (2015), random crops and mirrored pictures, and a
learning rate that rises and falls once (Smith, 2018) came later, and make in minutes what took days.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tinytorch import nn, optim
from tinytorch.datasets import CIFAR10, MNIST, Digits
from tinytorch.m09_spatial import Conv2d, SimpleCNN
from tinytorch.milestones.pictures import FULL, Recipe, learn, picture_options
from tinytorch.milestones.program import Check, UsageError, run
from tinytorch.milestones.report import plot_filters
from tinytorch.milestones.runs import Settings
from tinytorch.transforms import RandomCrop, RandomHorizontalFlip


def one_cycle(model: nn.Module, steps: int, most: float = 0.1) -> tuple[Any, Any]:
    """SGD with Nesterov's momentum; the learning rate rises to `most` and falls to nearly 0."""
    optimizer = optim.SGD(model.parameters(), lr=most, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return optimizer, optim.lr_scheduler.OneCycleLR(optimizer, max_lr=most, total_steps=steps)


CIFAR = {
    "dataset": CIFAR10,
    "shape": (3, 32, 32),
    "augment": (RandomCrop(32, padding=4), RandomHorizontalFlip()),
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "batch_size": 128,
    "loss": nn.CrossEntropyLoss(label_smoothing=0.1),
}
RECIPES = {
    "digits": Recipe(
        "Digits", Digits, (1, 8, 8), partial(SimpleCNN, 1, 10, 8, widths=(64,), batch_norm=True),
        partial(one_cycle, most=0.05), epochs=20, batch_size=64, threshold=0.98, margin=0.1,
        augment=(RandomCrop(8, padding=1),), mean=(0.305,), std=(0.376,),
    ),
    "mnist": Recipe(
        "MNIST", MNIST, (1, 28, 28), partial(SimpleCNN, 1, 10, 28, widths=(32, 64), batch_norm=True), one_cycle,
        epochs=6, batch_size=128, threshold=0.992, margin=0.2,
        augment=(RandomCrop(28, padding=2),), mean=(0.1307,), std=(0.3081,),
    ),
    "cifar10": Recipe(
        "CIFAR-10", network=partial(SimpleCNN, 3, 10, 32, widths=(32, 64), batch_norm=True), optimize=one_cycle,
        epochs=3, threshold=0.55, **CIFAR,
    ),
    f"cifar10{FULL}": Recipe(
        "CIFAR-10", network=partial(SimpleCNN, 3, 10, 32, widths=(32, 64, 128), batch_norm=True),
        optimize=partial(one_cycle, most=0.2), epochs=10, threshold=0.75, **CIFAR,
    ),
}  # fmt: skip


def describe(model: nn.Module) -> str:
    """ "A CNN 1-32-64": the channels of its pictures and of its convolutions."""
    convolutions = [layer for layer in model.modules() if isinstance(layer, Conv2d)]
    return "A CNN " + "-".join(map(str, (convolutions[0].in_channels, *(c.out_channels for c in convolutions))))


def draw_filters(model: nn.Module, folder: Path) -> None:
    """What the first layer looks for."""
    first = next(layer for layer in model.modules() if isinstance(layer, Conv2d))
    plot_filters(first.weight, folder / "filters.png", "The filters of the first layer")


def program(arguments: argparse.Namespace) -> tuple[list[Check], dict[str, Any]]:
    key = arguments.data + (FULL if arguments.full else "")
    if key not in RECIPES:
        raise UsageError(f"--full is for --data cifar10, not {arguments.data}")
    recipe = RECIPES[key]
    arguments.epochs = arguments.epochs or recipe.epochs
    full: dict[str, Any] = {"full": True} if arguments.full else {}
    settings = Settings("cnn", data=arguments.data, **full, epochs=arguments.epochs, seed=arguments.seed)
    return learn(arguments, recipe, settings, describe, draw_filters)


def main(argv: Sequence[str]) -> int:
    """Run the program with these command-line arguments; returns its exit status."""
    title = "A convolutional network (1998) learns to see."
    options = picture_options("cnn", title, "--data cifar10 --root ~/data", RECIPES, "MNIST or CIFAR-10")
    options.add_argument("--full", action="store_true", help="CIFAR-10 with a larger network, to 75 %% and more")
    options.set_defaults(argv=list(argv))
    return run(options, argv, program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
