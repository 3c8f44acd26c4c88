"""What the milestone programs have in common: options, the verdict, the report, and how they end."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import tinytorch
from tinytorch.learn.importing import own_modules, use_kernels
from tinytorch.m01_setup import atomic_write
from tinytorch.m08_training import TrainingError
from tinytorch.milestones import MILESTONES


class UsageError(Exception):
    """The program cannot do what it was asked; the message says why, and what to do."""


# -- options -----------------------------------------------------------------------------------------------------------


class Options(argparse.ArgumentParser):
    """The options that every program takes. A wrong one ends the program with one line and status 2.

    Args:
        epochs: how many there are without `--epochs`, in words.
        steps: the same for a program that counts steps, and has `--steps`.
        example: options that make an instructive call.
    """

    def __init__(self, name: str, title: str, example: str, epochs: str = "", steps: str = "") -> None:
        self.name = name
        super().__init__(
            prog=f"tinytorch milestone run {name}",
            description=title,
            epilog=f"Example: tinytorch milestone run {name} {example}",
            allow_abbrev=False,
        )
        add, out = self.add_argument, Path("runs", name)
        if steps:
            add("--steps", type=whole(1), metavar="N", help=f"how many batches to learn from ({steps})")
        else:
            add("--epochs", type=whole(1), metavar="N", help=f"how often to go through the data ({epochs})")
        add("--seed", type=whole(0), default=0, metavar="N", help="where all chance begins (0)")
        add("--device", metavar="NAME", help="where to compute: cpu, cuda, cuda:1 (TINYTORCH_DEVICE or cpu)")
        add("--out", type=Path, default=out, metavar="DIR", help=f"folder for what is written ({out.as_posix()})")
        add("--json", action="store_true", help="print the report as JSON, and text to standard error")
        add("--kernels", action="store_true", help="kernels even in the place of your own operations (in a workspace)")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.name}: {message}; see: {self.prog} --help\n")


def whole(least: int) -> Callable[[str], int]:
    """The argparse type of a whole number >= `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, not {text!r}")
        return int(text)

    return parse


# -- thresholds --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A measured share, between 0 and 1, and where it must lie; or with another unit than "%" what must be small."""

    what: str
    value: float
    least: float = 0.0
    most: float = 1.0
    unit: str = "%"

    @property
    def passed(self) -> bool:
        return self.least <= self.value <= self.most

    def __str__(self) -> str:
        share = self.unit == "%"
        scale, digits, difference, unit = (100, 2, "points ", " %") if share else (1, 3, "", "")
        bound, word = (self.most, "at most ") if not share or self.most < 1 else (self.least, "at least ")
        word = "" if share and bound == 1 else word
        line = f"{self.what}: {scale * self.value:.{digits}f} {self.unit}, must be {word}{scale * bound:g}{unit}"
        if self.passed:
            return f"passed: {line}"
        side = "above" if self.value > self.most else "below"
        return f"FAILED: {line}: {scale * abs(self.value - bound):.{digits}f} {difference}{side}"


# -- a run -------------------------------------------------------------------------------------------------------------

Program = Callable[[argparse.Namespace], tuple[list[Check], dict[str, Any]]]


def run(options: Options, argv: Sequence[str], program: Program) -> int:
    """Run a program, which returns what is to be checked and what it has to report, and write its report.json.

    Returns the exit status: 0 if every check passed, 1 if not, 2 if the program could not do what it was asked.
    """
    arguments = options.parse_args(argv)
    arguments.finish = lambda: None  # what a program has to do when its report is written
    if arguments.kernels:
        use_kernels()
    output = sys.stdout
    try:
        with redirect_stdout(sys.stderr if arguments.json else output), default_device(arguments.device):
            claim(arguments.out)
            checks, findings = program(arguments)
            report = {**header(options.name, arguments, checks), **findings}
            text = json.dumps(report, indent=2) + "\n"
            atomic_write(arguments.out / "report.json", text.encode())
            arguments.finish()
            print(f"\nreport and figures: {arguments.out}")
            for check in checks:
                print(check, file=None if check.passed else sys.stderr, flush=True)
            if line := whose(options.name):
                print(line)
    except (OSError, TrainingError, UsageError) as error:
        print(f"{options.name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    if arguments.json:
        print(text, end="")
    return 0 if report["passed"] else 1


def whose(name: str) -> str:
    """Which of the modules that a milestone needs were the learner's: a line to print, empty where none was."""
    needed = next((milestone.after for milestone in MILESTONES if milestone.name == name), 0)
    yours = [f"your {module.title.lower()}" for module in own_modules() if module.number <= needed]
    return textwrap.fill(f"this ran on {', '.join(yours)}", 80) if yours else ""


def claim(out: Path) -> None:
    """Make the folder for what is written; UsageError, before any work is done, where that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UsageError(f"--out {out}: cannot write there: {error.strerror}; choose another folder") from error


@contextmanager
def default_device(name: str | None) -> Iterator[None]:
    """Have tensors created on a device in a `with` block; on the present default device if the name is None."""
    before = tinytorch.get_default_device()
    try:
        tinytorch.set_default_device(name or before)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{f'--device {name}' if name else 'TINYTORCH_DEVICE'}: {error}") from error
    try:
        yield
    finally:
        tinytorch.set_default_device(before)


def header(name: str, arguments: argparse.Namespace, checks: Sequence[Check]) -> dict[str, Any]:
    """What every report begins with."""
    return {
        "milestone": name,
        "passed": all(check.passed for check in checks),
        "checks": [{**asdict(check), "passed": check.passed} for check in checks],
        "seed": arguments.seed,
        "device": str(tinytorch.get_default_device()),
        "tinytorch": tinytorch.__version__,
        "python": platform.python_version(),
    }
