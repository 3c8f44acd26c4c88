"""Runnable programs, each of which proves a part of the course with a result from its history.

Each program is a module of this package with a function `main(argv) -> int`, the exit status: 0 if the threshold was
reached. `tinytorch milestone list` shows this table, `tinytorch milestone run NAME` runs one.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Milestone:
    """One program: what it shows, on which data, what it must reach, and the last module that it needs."""

    name: str
    year: int
    title: str
    data: str
    threshold: str
    after: int

    def run(self, argv: Sequence[str] = ()) -> int:
        """Run the program with these command-line arguments; returns its exit status."""
        return importlib.import_module(f"{__name__}.{self.name}").main(list(argv))


MILESTONES = (
    Milestone(
        name="perceptron",
        year=1957,
        title="One layer separates what a line can separate",
        data="generated",
        threshold="100 %",
        after=2,
    ),
    Milestone(
        name="xor",
        year=1969,
        title="One layer cannot learn XOR, two can",
        data="generated",
        threshold="one layer <= 75 %, two 100 %",
        after=8,
    ),
    Milestone(
        name="mlp",
        year=1986,
        title="Backpropagation reads handwritten digits",
        data="Digits 8x8 or MNIST",
        threshold="96 % or 98 %",
        after=10,
    ),
    Milestone(
        name="cnn",
        year=1998,
        title="A convolutional network learns to see",
        data="Digits 8x8, MNIST or CIFAR-10",
        threshold="98 %, 99.2 %, 55 % or 75 %",
        after=10,
    ),
    Milestone(
        name="tinygpt",
        year=2017,
        title="A transformer learns to write",
        data="Python's help, Shakespeare or any text",
        threshold="loss <= 1.40 or 1.88",
        after=14,
    ),
    Milestone(
        name="fast",
        year=2020,
        title="What was learned, ten times faster",
        data="the trained cnn and tinygpt",
        threshold="10 times, as good",
        after=20,
    ),
)
