"""The perceptron, 1957: a machine finds a line from examples.

Frank Rosenblatt, a psychologist, simulated the perceptron in 1957, described it in 1958 and then built it: 400
photocells as inputs, motors that turned potentiometers as weights. Nobody told it the rule that separates left from
right; it was shown examples, and corrected when it was wrong:

    if label * (w · x + b) <= 0:    the point lies on the wrong side of the line
        w += label * x              turn the line towards it
        b += label                  and move it

There is no loss, no gradient and no learning rate. Yet Novikoff proved in 1962 that, if some line separates the points
with a margin, this rule finds one, after at most (R / margin)² corrections, R being the length of the longest input.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import tinytorch
from tinytorch import Tensor
from tinytorch.milestones.program import Check, Options, run
from tinytorch.milestones.report import plot_decision

POINTS, MARGIN, EPOCHS = 200, 0.05, 100


def separable_points(count: int) -> tuple[Tensor, Tensor, float]:
    """Points in a square, and on which side of a line chosen by chance each lies, none closer to it than the margin.

    Returns points (count, 2), labels (count,) of −1 and 1, and Novikoff's bound on the number of corrections.
    """
    angle, shift = (2 * math.pi * tinytorch.rand(1)).item(), (0.6 * tinytorch.rand(1) - 0.3).item()
    normal = tinytorch.tensor([math.cos(angle), math.sin(angle)])
    points = 2 * tinytorch.rand(2 * count, 2) - 1
    distance = points @ normal - shift  # signed: positive on one side, negative on the other
    chosen = tinytorch.nonzero(tinytorch.abs(distance) >= MARGIN)[:count, 0]
    points, distance = points[chosen], distance[chosen]
    # With b as the weight of an input that is always 1, an input's length is √(|x|² + 1), and the separating
    # weights (normal, −shift) have length √(1 + shift²).
    longest, margin = tinytorch.max((points**2).sum(1)).item() + 1, tinytorch.min(tinytorch.abs(distance)).item()
    return points, tinytorch.sign(distance), longest * (1 + shift**2) / margin**2


class Perceptron:
    """Two weights and a bias."""

    def __init__(self) -> None:
        self.w, self.b = tinytorch.zeros(2), tinytorch.zeros(1)

    def decide(self, points: Tensor) -> Tensor:
        """The side of the line on which each point lies, −1 or 1: points (N, 2) to (N,)."""
        return tinytorch.where(points @ self.w + self.b > 0, 1.0, -1.0)

    def learn(self, points: Tensor, labels: Tensor) -> int:
        """Show each point once, and correct what is wrong; returns how many corrections there were."""
        corrections = 0
        for x, label in zip(points, labels, strict=True):
            if label * (self.w @ x + self.b) <= 0:
                self.w += label * x
                self.b += label
                corrections += 1
        return corrections


def program(arguments: argparse.Namespace) -> tuple[list[Check], dict[str, Any]]:
    tinytorch.manual_seed(arguments.seed)
    points, labels, bound = separable_points(POINTS)
    perceptron, history = Perceptron(), []
    print(f"The perceptron (1957): {len(points)} points, two weights and a bias")
    for epoch in range(1, (arguments.epochs or EPOCHS) + 1):
        corrections = perceptron.learn(points, labels)
        accuracy = (perceptron.decide(points) == labels).sum().item() / len(points)
        history.append({"epoch": epoch, "corrections": corrections, "accuracy": accuracy})
        print(f"epoch {epoch:>3}: {corrections:>3} corrections, then {100 * accuracy:.1f} % right")
        if corrections == 0:
            break
    total = sum(row["corrections"] for row in history)
    print(f"{total} corrections in all; Novikoff's theorem allows {bound:,.0f} for these points")

    def predict(plane: Any) -> Tensor:
        return perceptron.decide(tinytorch.tensor(plane)) > 0

    plot_decision(predict, points, labels > 0, arguments.out / "decision.png", "The perceptron's line")
    return [Check("points on the right side", accuracy, least=1.0)], {
        "points": len(points),
        "corrections": total,
        "corrections_bound": bound,
        "weights": [*perceptron.w.tolist(), *perceptron.b.tolist()],
        "history": history,
    }


def main(argv: Sequence[str]) -> int:
    """Run the program with these command-line arguments; returns its exit status."""
    options = Options("perceptron", "The perceptron (1957) finds a line between two kinds of points.",
                      epochs=f"until all is right, at most {EPOCHS}", example="--seed 3")  # fmt: skip
    return run(options, argv, program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
