"""Speed beside PyTorch: `python -m tinytorch.profiling.bench`, or `nox -s bench`, which installs PyTorch too.

Each case is one small program that runs on either library, because the names are the same. Every measurement is made in
a process of its own, ours and PyTorch's in turn, so that a machine that slows down slows both. A round's figure is a
median; the figure shown is the fastest round's, because other programs only ever make a round slower. The ratio is the
median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# OpenBLAS reads these when it is loaded, and either can halve its speed; few users have them set.
SLOWING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


@dataclass(frozen=True)
class Case:
    """Something to time on both libraries. `build(library)` returns the call that is timed.

    calls: how many of what it names the call makes.
    seconds, ratio: what our figure must not exceed: seconds, or a multiple of PyTorch's time.
    """

    name: str
    build: Callable[[Any], Callable[[], Any]]
    calls: int = 1
    seconds: float | None = None
    ratio: float | None = None


def small_op(requires_grad: bool) -> Callable[[Any], Callable[[], Any]]:
    """A hundred sums of four numbers, so that the call that is timed weighs little beside them."""

    def build(library: Any) -> Callable[[], Any]:
        x = library.ones(4, requires_grad=requires_grad)

        def hundred() -> None:
            for _ in range(100):
                x + x

        return hundred

    return build


def mlp_step(optimizer: str) -> Callable[[Any], Callable[[], Any]]:
    """A training step of a 784-128-10 network at batch 64: forward, loss, backward, update."""

    def build(library: Any) -> Callable[[], Any]:
        nn = importlib.import_module(f"{library.__name__}.nn")
        optim = importlib.import_module(f"{library.__name__}.optim")
        library.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        inputs, labels = library.randn(64, 784), library.randint(0, 10, (64,))
        update = getattr(optim, optimizer)(model.parameters(), lr=1e-3)
        loss = nn.CrossEntropyLoss()

        def step() -> None:
            update.zero_grad()
            loss(model(inputs), labels).backward()
            update.step()

        return step

    return build


CASES = (
    Case("x + x, 4 elements", small_op(requires_grad=False), calls=100, seconds=1.5e-6),
    Case("x + x, recorded", small_op(requires_grad=True), calls=100),
    Case("MLP step, SGD", mlp_step("SGD"), ratio=1.0),
    Case("MLP step, Adam", mlp_step("Adam"), ratio=1.0),
    Case("import", lambda library: lambda: None, seconds=0.1),  # measured by IMPORT_PROGRAM
)
IMPORT_PROGRAM = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def time_of(call: Callable[[], Any], budget: float = 1.0) -> float:
    """Median seconds of a call: samples of about 2 ms each, for `budget` seconds and at least seven."""
    one = statistics.median(samples(call, 1, budget / 3))  # a warm-up: the first calls load code and start threads
    return statistics.median(samples(call, max(1, int(0.002 / one)), budget))


def samples(call: Callable[[], Any], calls: int, budget: float) -> list[float]:
    """Seconds of a call, each a mean over `calls` of them."""
    start, found = time.perf_counter(), list[float]()
    while time.perf_counter() - start < budget or len(found) < 7:
        before = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - before) / calls)
    return found


def measure(library: str, case: str) -> float:
    """Seconds of a case on a library, measured in a new process."""
    environment = {name: value for name, value in os.environ.items() if name not in SLOWING}
    command = [sys.executable, "-m", "tinytorch.profiling.bench", "--measure", library, case]
    if case == "import":
        command = [sys.executable, "-c", IMPORT_PROGRAM.format(library)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{case} on {library} failed:\n{run.stderr}")
    return float(run.stdout)


def measure_here(library: str, name: str) -> float:
    """The same, in this process."""
    case = next(case for case in CASES if case.name == name)
    return time_of(case.build(importlib.import_module(library))) / case.calls


def compare(case: Case, rounds: int, reference: str | None) -> dict[str, Any]:
    """Our time, the reference's and their ratio, in turn over the rounds; and whether the limit holds."""
    pairs = [(measure("tinytorch", case.name), reference and measure(reference, case.name)) for _ in range(rounds)]
    ours = min(mine for mine, _ in pairs)
    theirs = min(other for _, other in pairs if other) if reference else None
    ratio = statistics.median(mine / other for mine, other in pairs if other) if reference else None
    within = None
    if case.seconds is not None:
        within = ours <= case.seconds
    elif case.ratio is not None and ratio is not None:
        within = ratio <= case.ratio
    return {"case": case.name, "seconds": ours, "reference_seconds": theirs, "ratio": ratio,
            "limit_seconds": case.seconds, "limit_ratio": case.ratio, "within": within}  # fmt: skip


def show(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-4 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def show_limit(row: dict[str, Any]) -> str:
    if row["limit_seconds"] is not None:
        return f"{show(row['limit_seconds'])}"
    return f"{row['limit_ratio']:g} x" if row["limit_ratio"] is not None else "–"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tinytorch.profiling.bench",
        description="Time TinyTorch beside PyTorch, each measurement in a process of its own.",
        epilog="example: python -m tinytorch.profiling.bench --rounds 3 --only MLP",
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each case on each library (5)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this text in their name")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--measure", nargs=2, metavar=("LIBRARY", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.measure:
        print(measure_here(*options.measure))
        return 0
    chosen = [case for case in CASES if options.only.lower() in case.name.lower()]
    if not chosen:
        parser.error(f"--only: no case has {options.only!r} in its name; they are {[case.name for case in CASES]}")
    reference = "torch" if importlib.util.find_spec("torch") else None
    rows = with_progress(chosen, options.rounds, reference, quiet=options.json)
    report(rows, reference, as_json=options.json)
    return 0 if all(row["within"] in (True, None) for row in rows) else 1


def with_progress(cases: list[Case], rounds: int, reference: str | None, quiet: bool) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True, quiet=quiet)
    return [compare(case, rounds, reference) for case in track(cases, "measuring", console=console)]


def report(rows: list[dict[str, Any]], reference: str | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"cases": rows, "cpus": os.cpu_count(), "reference": reference}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "TinyTorch", "PyTorch", "ratio", "limit", "")
    for row in rows:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        verdict = {True: "ok", False: "too slow", None: ""}[row["within"]]
        table.add_row(
            row["case"], show(row["seconds"]), show(row["reference_seconds"]), ratio, show_limit(row), verdict
        )
    Console().print(table)
    if reference is None:
        print("PyTorch is not installed here, so there is nothing to compare with: nox -s bench installs it.")


if __name__ == "__main__":
    sys.exit(main())
