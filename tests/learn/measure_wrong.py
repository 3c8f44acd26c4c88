"""Plants the wrong solutions of `wrong.py` in chapters, one at a time, and expects the exercise's own tests to fail.

nox -s learn                         all of them
nox -s learn -- --only 06            those whose module, exercise or description holds a text

Of each module it first looks whether the exercises are fit to be ones: without any solution the chapter and the package
are still imported, and none of the exercises passes; without one, its tests fail because it is not written; as the
chapter stands, all pass. Status 1 if one of these does not hold, or less than 95 % of the wrong solutions are noticed.

A process for each module imports what stands below it and forks for each text that it tries.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the chapters and tests of this checkout, and no installed ones

from tests.learn.wrong import WRONG, Wrong  # noqa: E402
from tinytorch.curriculum import MODULES, Module, load_modules  # noqa: E402
from tinytorch.learn.exercises import Exercise, blanked, exercises, module_of, reference  # noqa: E402

LONGEST = 60  # seconds for one text
LEAST = 0.95  # of the wrong solutions must be noticed
SETTINGS = {"TINYTORCH_KERNELS": "off", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@dataclass
class Verdict:
    """What became of a wrong solution. `noticed` is what the first test that failed said, or empty."""

    exercise: str
    what: str
    noticed: str = ""
    problem: str = ""


@dataclass
class Result:
    """What was seen of a module. `problems`: why some exercises are not fit to be ones."""

    number: int
    exercises: int = 0
    verdicts: list[Verdict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def noticed(self) -> int:
        return sum(bool(v.noticed) for v in self.verdicts)


# -- in the process of a module ----------------------------------------------------------------------------------------


class Chapter:
    """A module whose text is tried in different versions, with the modules below it as they stand in the package."""

    def __init__(self, module: Module) -> None:
        self.module, self.text = module, reference(module.number)
        self.exercises = exercises(module.number)
        wanted = {test for exercise in self.exercises for test in exercise.tests}
        tests = [n for n in ast.parse(self.text).body if isinstance(n, ast.FunctionDef) and n.name in wanted]
        self.tests = compile(ast.Module([*tests], []), f"{module.file}.py", "exec", annotations.compiler_flag)
        for lower in MODULES[: module.number - 1]:
            for name in lower.modules():
                importlib.import_module(name)

    def enter(self, text: str) -> dict[str, Any]:
        """Run a text in the chapter's place, with the tests as they stand in the reference; returns its names."""
        name = f"tinytorch.{self.module.file}"
        chapter = types.ModuleType(name)
        chapter.__file__ = str(ROOT / "tinytorch" / f"{self.module.file}.py")
        chapter.__package__ = "tinytorch"
        sys.modules[name] = chapter
        setattr(sys.modules["tinytorch"], self.module.file, chapter)
        exec(compile(text, chapter.__file__, "exec", dont_inherit=True), vars(chapter))
        exec(self.tests, vars(chapter))
        return vars(chapter)

    def attempt(self, text: str, tried: list[Exercise], package: bool = False) -> dict[str, dict[str, str]]:
        """What the tests of some exercises say to a text: for each exercise, of those that fail, the error.

        A test's error begins with "not written: " where it comes from an exercise without a solution. What goes wrong
        before any test stands under "": {"": error}. `package`: whether the rest of the package is imported first.
        """

        def work() -> dict[str, dict[str, str]]:
            try:
                names = self.enter(text)
                if package:
                    load_modules()
            except BaseException as error:
                return {"": {"": f"it cannot be imported: {said(error)}"}}
            said_by = {test: outcome(names[test]) for test in dict.fromkeys(t for e in tried for t in e.tests)}
            return {e.name: {test: said_by[test] for test in e.tests if said_by[test]} for e in tried}

        return forked(work)


def outcome(test: Callable[[], None]) -> str:
    """What a test says: nothing if it passes."""
    from tinytorch import backends

    backends.manual_seed(0)
    try:
        test()
    except BaseException as error:
        return said(error)
    return ""


def said(error: BaseException) -> str:
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, NotImplementedError) and str(link).startswith("exercise "):
            return f"not written: {str(link).removeprefix('exercise ').partition(':')[0]}"
        link = link.__cause__ if link.__cause__ is not link else None
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def forked(work: Callable[[], Any]) -> Any:
    """What a function returns, computed in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:  # whatever happens, the child does not go on with what its parent was doing
            os.close(reading)
            os.setpgid(0, 0)
            silent = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(silent, descriptor)
            with os.fdopen(writing, "w", encoding="utf-8") as pipe:
                json.dump(work(), pipe)
        finally:
            os._exit(0)
    os.close(writing)
    text, deadline = b"", time.monotonic() + LONGEST
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not (part := os.read(reading, 1 << 16)):
            break
        text += part
    os.close(reading)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also what it may have left behind
    os.waitpid(child, 0)
    try:
        return json.loads(text)
    except ValueError:
        late = time.monotonic() >= deadline
        return {"": {"": f"it did not end within {LONGEST} s" if late else "its process was ended"}}


def fitness(chapter: Chapter) -> list[str]:
    """Why the exercises of a chapter are not fit to be ones; nothing, if they are."""
    known, number, problems = chapter.exercises, chapter.module.number, []
    right = chapter.attempt(chapter.text, known)
    problems += [f"{name}: the solution fails: {error}" for name, failed in right.items() for error in failed.values()]
    empty = chapter.attempt(blanked(chapter.text, number, [e.name for e in known]), known, package=True)
    if "" in empty:
        problems.append(f"without solutions {empty['']['']}")
    else:
        problems += [f"{name} passes without solutions" for name, failed in empty.items() if not failed]
    for exercise in known:
        found = chapter.attempt(blanked(chapter.text, number, [exercise.name]), [exercise])
        errors = [*(found.get("") or found[exercise.name]).values()]
        if f"not written: {exercise.name}" not in errors:
            problems.append(f"{exercise.name}: without it its tests say {'; '.join(errors) or 'nothing'}")
    return problems


def tried(chapter: Chapter, wrong: Wrong) -> Verdict:
    """Plant a wrong solution, and see whether the exercise's tests notice."""
    verdict = Verdict(wrong.exercise, wrong.what)
    try:
        exercise = next(e for e in chapter.exercises if e.name == wrong.exercise)
        found = chapter.attempt(wrong.planted(), [exercise])
    except (StopIteration, ValueError) as error:
        verdict.problem = f"not planted: {error or 'no such exercise'}"
        return verdict
    if "imported" in found.get("", {"": ""})[""]:
        verdict.problem = found[""][""]
    else:
        verdict.noticed = next(iter((found.get("") or found[exercise.name]).values()), "")
        verdict.problem = "" if verdict.noticed else "survived"
    return verdict


def measured(number: int, only: str) -> Result:
    """Everything about one module, in this process."""
    start, chapter = time.perf_counter(), Chapter(module_of(number))
    result = Result(number, len(chapter.exercises))
    if not only:
        result.problems = fitness(chapter)
    result.verdicts = [tried(chapter, wrong) for wrong in chosen(only) if wrong.number == number]
    result.seconds = round(time.perf_counter() - start, 1)
    return result


# -- the whole ---------------------------------------------------------------------------------------------------------


def chosen(only: str) -> list[Wrong]:
    text = only.casefold()
    return [w for w in WRONG if text in f"{w.number:02} {w.exercise} {w.what}".casefold()]


def in_a_process(number: int, only: str) -> Result:
    command = [sys.executable, __file__, "--module", str(number), "--only", only]
    done = subprocess.run(command, env={**os.environ, **SETTINGS}, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        return Result(number, problems=[f"its process ended with status {done.returncode}"])
    values = json.loads(done.stdout)
    result = Result(**{**values, "verdicts": [Verdict(**v) for v in values["verdicts"]]})
    for line in complaints(result):
        print(line, file=sys.stderr, flush=True)
    return result


def complaints(result: Result) -> list[str]:
    lines = [f"{result.number:02} {problem}" for problem in result.problems]
    return lines + [f"{result.number:02} {v.exercise}: {v.what}: {v.problem}" for v in result.verdicts if v.problem]


def print_results(results: list[Result]) -> None:
    print("module            exercises  wrong  noticed     rate  seconds")
    for r in results:
        rate = f"{r.noticed / len(r.verdicts):.0%}" if r.verdicts else "-"
        line = f"{r.exercises:9}  {len(r.verdicts):5}  {r.noticed:7}  {rate:>7}  {r.seconds:7.1f}"
        print(f"{module_of(r.number).file:16}  {line}{'' if not r.problems else '  not fit'}")
    for line in (line for r in results for line in complaints(r)):
        print(line)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="TEXT", default="",
                        help="wrong solutions whose module, exercise or description holds this text")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="how many modules to try at once")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--module", type=int, help=argparse.SUPPRESS)  # the process of a module
    return parser.parse_args()


def main() -> int:
    options = parsed()
    if options.module:
        print(json.dumps(asdict(measured(options.module, options.only))))
        return 0
    with_some = {w.number for w in chosen(options.only)}
    numbers = [m.number for m in MODULES if m.number in with_some or (m.exercises and not options.only)]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda number: in_a_process(number, options.only), numbers))
    if options.json:
        print(json.dumps([asdict(r) for r in results], indent=2, ensure_ascii=False))
    else:
        print_results(results)
    planted, noticed = sum(len(r.verdicts) for r in results), sum(r.noticed for r in results)
    rate = noticed / planted if planted else 0.0
    print(f"{planted} planted, {noticed} noticed: {rate:.1%}", file=sys.stderr if options.json else sys.stdout)
    return 0 if rate >= LEAST and not any(r.problems for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
