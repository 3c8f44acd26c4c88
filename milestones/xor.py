"""XOR, 1969: what no line can separate, and how a second layer does.

In "Perceptrons" Marvin Minsky and Seymour Papert proved what a single layer cannot compute. The smallest example is
exclusive or: points in four corners of a square, of one kind where the signs of their coordinates differ, of the other
where they are the same. Interest in neural networks cooled for years, though everyone knew that a second layer would
do: nobody knew how to train one.

Why at most three of four points can be right: suppose a line had all of one point from each corner on the right side.
The two points of a kind, from opposite corners, lie on one side of it, and with them the segment between them. So the
two segments, one of each kind, lie on different sides. But they are the square's diagonals, and cross.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import tinytorch
from tinytorch import Tensor, Trainer, nn, optim
from tinytorch.m08_training_appendix import binary_accuracy
from tinytorch.milestones.program import Check, Options, run
from tinytorch.milestones.report import plot_decision

PER_CORNER, RADIUS, EPOCHS, HIDDEN = 25, 0.4, 300, 8


def xor_points() -> tuple[Tensor, Tensor]:
    """Points in discs around the corners (±1, ±1), and for each whether its signs differ: (N, 2) and (N, 1) of 0 and 1.

    The discs are small enough that the segments between any points of opposite corners cross.
    """
    corners = tinytorch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]).repeat(PER_CORNER, 1)
    angle, radius = 2 * math.pi * tinytorch.rand(len(corners)), RADIUS * tinytorch.sqrt(tinytorch.rand(len(corners)))
    points = corners + tinytorch.stack([radius * tinytorch.cos(angle), radius * tinytorch.sin(angle)], 1)
    return points, (corners[:, :1] != corners[:, 1:]).to(tinytorch.float32)


def best_line(points: Tensor, labels: Tensor) -> tuple[float, int]:
    """The largest share of points that a line gets right, of very many lines, and how many were tried."""
    angles, shifts = tinytorch.linspace(0, 2 * math.pi, 361)[:-1], tinytorch.linspace(-2.0, 2.0, 201)
    normals = tinytorch.stack([tinytorch.cos(angles), tinytorch.sin(angles)])  # (2, 360)
    one_side = (points @ normals)[:, :, None] > shifts  # (N, 360, 201)
    right = (one_side == (labels[:, :, None] > 0)).sum(0)  # (360, 201)
    return right.max().item() / len(points), len(angles) * len(shifts)


def train(model: nn.Module, points: Tensor, labels: Tensor, epochs: int) -> float:
    """Train on all points at once, and print a few lines about it; returns the share that is right afterwards."""
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    trainer = Trainer(model, optimizer, nn.BCEWithLogitsLoss(), {"accuracy": binary_accuracy})
    for goal in sorted({math.ceil(epochs * part / 5) for part in range(1, 6)}):
        row = trainer.fit([(points, labels)], goal)[-1]
        print(f"  epoch {goal:>3}: loss {row['loss']:.4f}, {100 * row['accuracy']:.1f} % right")
    return round(trainer.evaluate([(points, labels)])["accuracy"] * len(points)) / len(points)


def program(arguments: argparse.Namespace) -> tuple[list[Check], dict[str, Any]]:
    tinytorch.manual_seed(arguments.seed)
    points, labels = xor_points()
    models = {
        "one layer": nn.Linear(2, 1),
        "two layers": nn.Sequential(nn.Linear(2, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)),
    }
    accuracies = {}
    for name, model in models.items():
        print(f"{name.capitalize()}, {sum(p.numel() for p in model.parameters())} parameters")
        accuracies[name] = train(model, points, labels, arguments.epochs or EPOCHS)

        def predict(plane: Any, model: nn.Module = model) -> Tensor:
            with tinytorch.no_grad():
                return model(tinytorch.tensor(plane))[:, 0] > 0

        figure = arguments.out / f"{name.replace(' ', '_')}.png"
        plot_decision(predict, points, labels > 0, figure, f"XOR with {name}")
    line, tried = best_line(points, labels)
    print(f"The best of {tried:,} lines has {100 * line:.1f} % right")
    checks = [
        Check("one layer", accuracies["one layer"], most=0.75),
        Check("the best line of all", line, most=0.75),
        Check("two layers", accuracies["two layers"], least=1.0),
    ]
    return checks, {"points": len(points), "lines_tried": tried, "epochs": arguments.epochs or EPOCHS}


def main(argv: Sequence[str]) -> int:
    """Run the program with these command-line arguments; returns its exit status."""
    options = Options("xor", "XOR (1969): one layer cannot learn it, two can.", epochs=str(EPOCHS), example="--seed 3")
    return run(options, argv, program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
