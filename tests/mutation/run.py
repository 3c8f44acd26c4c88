"""Plants the faults of `faults.py` in a copy of the repository, one at a time, and expects a red test for each.

nox -s mutation                      all of them
nox -s mutation -- --only adam       those whose file or description holds a text
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from faults import FAULTS, ROOT, Fault
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

LEFT_OUT = (".*", "__pycache__", "build", "dist", "runs", "*.egg-info")
CRASHES = {-getattr(signal, name): name for name in ("SIGABRT", "SIGBUS", "SIGSEGV") if hasattr(signal, name)}
LONGEST = 300  # seconds for the tests of one fault
WHERE_FROM = "import sys, tinytorch.kernels; tinytorch.Tensor; print(*[m.__file__ for n, m in sys.modules.items() " \
             "if n.partition('.')[0] == 'tinytorch'], sep='\\n')"  # fmt: skip


class Outcome(NamedTuple):
    """What pytest said: its exit status (None: it did not end), the first test that failed, and all of its text."""

    status: int | None
    failed: str
    text: str


@dataclass
class Verdict:
    """What became of a fault. `problem` is empty if it was found."""

    file: str
    what: str
    killed_by: str = ""
    seconds: float = 0.0
    problem: str = ""


class Copy:
    """A copy of the repository in which faults are planted and tests run."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(shutil.copytree(ROOT, folder.resolve(), ignore=shutil.ignore_patterns(*LEFT_OUT)))
        self.versions = 0
        self.compiled = self.folder / ".numba"  # the machine code of the copy's kernels; nobody else's
        self._check_what_is_imported()

    def _run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH")]))
        own = {"PYTHONPATH": path, "NUMBA_CACHE_DIR": str(self.compiled), "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200"}
        variables = {**os.environ, **own, **environment}
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=variables, timeout=LONGEST,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        )  # fmt: skip

    def _check_what_is_imported(self) -> None:
        """Without this, a fault in the copy could survive because the installed package is what gets tested."""
        result = self._run("-c", WHERE_FROM)
        elsewhere = [file for file in result.stdout.split("\n") if file and not Path(file).is_relative_to(self.folder)]
        if result.returncode or elsewhere:
            raise RuntimeError(f"the copy {self.folder} is not what gets imported, but {elsewhere[0]}")

    def pytest(self, tests: Iterable[str], devices: str, simulated: bool = False) -> Outcome:
        """Run tests up to the first failure; those of kernels on CUDA's in the simulator, if asked for."""
        options = ("-x", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "--hypothesis-seed=0")
        try:
            own = {"NUMBA_ENABLE_CUDASIM": "1", "TINYTORCH_TEST_KERNELS": "cuda"} if simulated else {}
            result = self._run("-m", "pytest", *options, *tests, TINYTORCH_TEST_DEVICES=devices, **own)
        except subprocess.TimeoutExpired:
            return Outcome(None, "", f"not done after {LONGEST} s")
        failed = re.search(r"^FAILED (.+?)(?: - .*)?$", result.stdout, re.MULTILINE)
        return Outcome(result.returncode, failed[1] if failed else "", result.stdout)

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """The copy with a fault in it."""
        file, compiled = self.folder / fault.file, self.compiled
        source = file.read_text(encoding="utf-8")
        self._write(file, fault.planted(source))
        if fault.file.startswith("kernels/"):  # Numba looks at the file of a function, not at what compiles or calls it
            self.compiled = self.folder / ".numba-planted"
        try:
            yield
        finally:
            self._write(file, source)
            if self.compiled is not compiled:
                shutil.rmtree(self.compiled, ignore_errors=True)
                self.compiled = compiled

    def _write(self, file: Path, text: str) -> None:
        file.write_text(text, encoding="utf-8", newline="\n")
        # Python knows what it compiled by the source's size and seconds: each version gets seconds of its own.
        self.versions += 1
        os.utime(file, (self.versions, self.versions))


def try_fault(copy: Copy, fault: Fault) -> Verdict:
    """Plant a fault and see whether its tests notice."""
    verdict, start = Verdict(fault.file, fault.what), time.perf_counter()
    own = (fault.file,) if fault.file.startswith("tinytorch/") else ()  # so that it is imported, before any test
    with copy.planted(fault):
        outcome = copy.pytest(dict.fromkeys((*own, *fault.tests())), fault.devices, fault.simulated)
    verdict.seconds = round(time.perf_counter() - start, 1)
    if outcome.status == 1 and outcome.failed:
        verdict.killed_by = outcome.failed
    elif outcome.status in CRASHES:  # a kernel that writes outside its arrays need not get as far as a test's end
        verdict.killed_by = f"a crash: {CRASHES[outcome.status]}"
    elif outcome.status == 0:
        verdict.problem = "survived"
    else:  # no test failed: the tests could not be collected, or did not end
        verdict.problem = f"pytest ended with {outcome.status}: {last_line(outcome.text)}"
    return verdict


def unfit(fault: Fault) -> str:
    """Why a fault cannot be planted; "" if it can."""
    try:
        fault.planted((ROOT / fault.file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"not planted: {error}"
    return "" if fault.tests() else f"not planted: no tests {', '.join(fault.patterns)}"


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def in_copies(jobs: int, progress: Progress) -> tuple[Callable, Callable]:
    """(each, close): `each(title, function, items)` is [function(copy, item), …], computed in `jobs` copies at once."""
    folder = tempfile.TemporaryDirectory(prefix="tinytorch-mutation-")
    copies: SimpleQueue[Copy] = SimpleQueue()
    for number in range(jobs):
        copies.put(Copy(Path(folder.name, str(number))))

    def each(title: str, function: Callable[[Copy, Any], Any], items: list) -> list:
        task = progress.add_task(title, total=len(items))

        def work(item: Any) -> Any:
            copy = copies.get()
            try:
                result = function(copy, item)
                if isinstance(result, Verdict) and result.problem:
                    progress.console.print(f"{result.file}: {result.what}: {result.problem}", markup=False)
                return result
            finally:
                copies.put(copy)
                progress.advance(task)

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(work, items))

    return each, folder.cleanup


def mutate(faults: list[Fault], jobs: int, progress: Progress) -> list[Verdict]:
    """What becomes of each fault. The tests must be green without it, or their redness would prove nothing."""
    reasons = {fault: unfit(fault) for fault in faults}
    fit = [fault for fault in faults if not reasons[fault]]
    each, close = in_copies(jobs, progress)
    try:
        sets = list(dict.fromkeys((fault.tests(), fault.devices, fault.simulated) for fault in fit))
        outcomes = dict(zip(sets, each("without faults", lambda copy, one: copy.pytest(*one), sets), strict=True))
        for fault in fit:
            if (outcome := outcomes[fault.tests(), fault.devices, fault.simulated]).status != 0:
                reasons[fault] = f"not planted: red without it: {outcome.failed or last_line(outcome.text)}"
        fit = [fault for fault in fit if not reasons[fault]]
        tried = dict(zip(fit, each("planting", try_fault, fit), strict=True))
    finally:
        close()
    return [tried.get(fault) or Verdict(fault.file, fault.what, problem=reasons[fault]) for fault in faults]


def table_of(verdicts: list[Verdict]) -> Table:
    table = Table("fault", "in", "killed by", "s")
    for v in verdicts:
        outcome = escape(v.killed_by) or f"[bold red]{escape(v.problem)}[/]"
        table.add_row(escape(v.what), Path(v.file).stem, outcome, f"{v.seconds:.1f}" if v.seconds else "")
    return table


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="faults whose file or description holds this text")
    parser.add_argument("--list", action="store_true", help="list the faults and plant none")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="how many to try at once")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    return parser.parse_args()


def main() -> int:
    options, errors = parsed(), Console(stderr=True)
    console = Console(width=None if sys.stdout.isatty() else 160)
    wanted = options.only.casefold()
    faults = [fault for fault in FAULTS if wanted in f"{fault.file} {fault.what}".casefold()]
    if options.list:
        for fault in faults:
            console.print(f"{fault.file}: {fault.what}", markup=False, highlight=False, soft_wrap=True)
        return 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors) as progress:
        verdicts = mutate(faults, options.jobs, progress)
    if options.json:
        print(json.dumps([asdict(v) for v in verdicts], indent=2, ensure_ascii=False))
    else:
        console.print(table_of(verdicts))
    planted = [v for v in verdicts if not v.problem.startswith("not planted")]
    found = [v for v in verdicts if not v.problem]
    (errors if options.json else console).print(f"{len(planted)} planted, {len(found)} found", highlight=False)
    return 0 if faults and len(found) == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
