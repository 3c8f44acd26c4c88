"""The multilayer perceptron, 1986: backpropagation reads handwritten digits.

David Rumelhart, Geoffrey Hinton and Ronald Williams showed in "Learning representations by back-propagating errors"
that the chain rule trains layers nobody can label, the hidden ones, and that what these come to represent is useful.
They stepped down the gradient with momentum, as this program does. ReLU, dropout, and a learning rate that falls along
a cosine, came later.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from tinytorch import nn, optim
from tinytorch.datasets import MNIST, Digits
from tinytorch.milestones.pictures import Recipe, learn, picture_options
from tinytorch.milestones.program import Check, run
from tinytorch.milestones.runs import Settings


def make_model(*widths: int, dropout: float = 0.2) -> nn.Module:
    """Pictures of widths[0] pixels to widths[-1] scores."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, width in pairwise(widths[:-1]):
        layers += [nn.Linear(before, width), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def momentum(model: nn.Module, steps: int) -> tuple[Any, Any]:
    """SGD with momentum; the learning rate falls from 0.1 to 0 along a cosine."""
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    return optimizer, optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


RECIPES = {
    "digits": Recipe(
        "Digits", Digits, (1, 8, 8), partial(make_model, 64, 128, 10), momentum,
        epochs=30, batch_size=32, threshold=0.96, margin=0.1,
    ),
    "mnist": Recipe(
        "MNIST", MNIST, (1, 28, 28), partial(make_model, 784, 256, 128, 10), momentum,
        epochs=20, batch_size=128, threshold=0.98, margin=0.2,
    ),
}  # fmt: skip


def describe(model: nn.Module) -> str:
    """ "A network 64-128-10"."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return "A network " + "-".join(map(str, (layers[0].in_features, *(layer.out_features for layer in layers))))


def program(arguments: argparse.Namespace) -> tuple[list[Check], dict[str, Any]]:
    recipe = RECIPES[arguments.data]
    arguments.epochs = arguments.epochs or recipe.epochs
    settings = Settings("mlp", data=arguments.data, epochs=arguments.epochs, seed=arguments.seed)
    return learn(arguments, recipe, settings, describe)


def main(argv: Sequence[str]) -> int:
    """Run the program with these command-line arguments; returns its exit status."""
    title = "Backpropagation (1986) teaches a network to read handwritten digits."
    options = picture_options("mlp", title, "--data mnist --root ~/mnist", RECIPES, "MNIST")
    options.set_defaults(argv=list(argv))
    return run(options, argv, program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
