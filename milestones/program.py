"""What the milestone programs have in common: options, the verdict, the report, and how they end."""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import tinytorch
from tinytorch.m01_setup import atomic_write
from tinytorch.m08_training import TrainingError


class UsageError(Exception):
    """The program cannot begin: its message tells the user, in one line, why and what to do."""


class Options(argparse.ArgumentParser):
    """The options that every program takes; a wrong one ends it with status 2 and one line."""

    def __init__(self, name: str, title: str, seed: int, epochs: str, example: str) -> None:
        """`epochs` says how many there are without the option; `example` is what follows the program's name."""
        super().__init__(
            f"tinytorch milestone run {name}",
            description=title,
            epilog=f"example: tinytorch milestone run {name} {example}",
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=columns()),
            allow_abbrev=False,
        )
        self.name = name
        self.add_argument("--epochs", type=at_least(1), metavar="N", help=f"how often to go through the data ({epochs})")
        self.add_argument("--seed", type=at_least(0), default=seed, metavar="N", help=f"of all chance ({seed})")
        self.add_argument("--device", help="where to compute: cpu, cuda, cuda:1 … (TINYTORCH_DEVICE, or else cpu)")
        self.add_argument("--out", type=Path, default=Path("runs", name), metavar="DIR", help=f"folder for the results (runs/{name})")  # fmt: skip
        self.add_argument("--json", action="store_true", help="print the report as JSON, and all else to standard error")  # fmt: skip

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.name}: {message}; see: {self.prog} --help\n")


def columns() -> int:
    """How many columns to write: the terminal's, and no more than 80."""
    return min(shutil.get_terminal_size((80, 24)).columns, 80)


def at_least(least: int) -> Callable[[str], int]:
    """What argparse takes for the type of a whole number that is not smaller than `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, not {text!r}")
        return value

    return parse


def run(options: Options, argv: Sequence[str], program: Callable[[argparse.Namespace], dict[str, Any]]) -> int:
    """Run a program that returns its report, save that as report.json, and say whether the threshold was reached.

    Returns the exit status: 0 if it was, 1 if not, 2 if the program could not do its work, 130 if it was interrupted.
    """
    arguments = options.parse_args(argv)
    output = sys.stdout
    try:
        with redirect_stdout(sys.stderr if arguments.json else output):
            if arguments.device:
                use_device(arguments.device)
            report = {"milestone": options.name, **program(arguments), **circumstances(arguments)}
            atomic_write(arguments.out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
            print(verdict(report, arguments.out))
        if arguments.json:
            print(json.dumps(report, indent=2))
        return 0 if report["passed"] else 1
    except (OSError, UsageError, TrainingError) as error:
        print(f"{options.name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt:
        return 130


def use_device(name: str) -> None:
    try:
        tinytorch.set_default_device(name)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--device {name}: {error}") from error


def circumstances(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one needs to know to run it again."""
    return {
        "seed": arguments.seed,
        "device": str(tinytorch.get_default_device()),
        "tinytorch": tinytorch.__version__,
        "python": platform.python_version(),
    }
