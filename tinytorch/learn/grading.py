"""Many submissions, each checked on a copy of its own and shut in: `tinytorch learn grade FOLDER…`.

What shutting in means depends on the system, and `protection` says what there is. GRADING.md, beside this file, says
what none of it protects from.
"""

from __future__ import annotations

import csv
import io
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import typer

from tinytorch.curriculum import MODULES, find_module
from tinytorch.learn import workspace
from tinytorch.learn.checking import (
    FAILED,
    NOT_WRITTEN,
    PASSED,
    Limits,
    Report,
    Result,
    check_text,
    ignore,
    nothing_ran,
    shortened,
    table,
)
from tinytorch.learn.exercises import exercises, module_of
from tinytorch.terminal import fail

__all__ = ["Grade", "Submission", "find_submissions", "grade", "grade_command", "protection"]

SUFFIXES = (".py", ".ipynb")
FIRST_USER = 61184  # of those that systemd gives to services for as long as they run, and nobody else
HANDED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "WINDIR", "COMSPEC",
             "PATHEXT")  # fmt: skip


@dataclass(frozen=True)
class Submission:
    """What one learner handed in: where the files of the modules are."""

    name: str
    files: dict[int, Path]


@dataclass(frozen=True)
class Grade:
    """What came of one module of a submission.

    `problem` says why nothing could be run; `broken` that this was no fault of the submission's.
    """

    submission: str
    file: str
    report: Report
    problem: str = ""
    broken: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The grade as JSON can hold it."""
        return {"submission": self.submission, "file": self.file, "problem": self.problem} | self.report.as_dict()


# -- what was handed in ------------------------------------------------------------------------------------------------


def find_submissions(paths: Sequence[Path], number: int | None = None) -> list[Submission]:
    """The submissions at some paths.

    A path is a file, a folder with files of modules (m02_tensor.py, m02_tensor.ipynb), or a folder of submissions. A
    file of another name, alice.py, is one of the module `number`. Links are not followed. Raises FileNotFoundError for
    a path that is not there, and ValueError for a file of which nobody knows the module.
    """
    found: list[Submission] = []
    for path in paths:
        if path.is_file():
            found.append(submission(path, number))
        elif not path.is_dir():
            raise FileNotFoundError(f"there is no {path}")
        elif direct_files(path) or not (inside := sorted(each for each in path.iterdir() if is_submission(each))):
            found.append(Submission(path.resolve().name, direct_files(path)))
        else:
            found += [submission(each, number) for each in inside]
    return found


def is_submission(path: Path) -> bool:
    if path.is_symlink() or path.name.startswith((".", "__")):
        return False
    return path.is_dir() or (path.is_file() and path.suffix in SUFFIXES)


def submission(path: Path, number: int | None) -> Submission:
    """One submission: a file, or a folder, in which the files of modules may lie deeper."""
    if path.is_dir():
        files: dict[int, Path] = {}
        for folder, folders, _ in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files = direct_files(Path(folder)) | files  # those that lie higher count
        return Submission(path.name, files)
    for module in MODULES:
        if module.file == path.stem:
            return Submission(path.name, {module.number: path})
    if number is None:
        raise ValueError(f"{path} has the name of no module: say which it is, with --module")
    return Submission(path.stem, {number: path})


def direct_files(folder: Path) -> dict[int, Path]:
    """The files of modules that lie in a folder; where there are two of one, the newer."""
    files = {}
    for module in MODULES:
        paths = [path for suffix in SUFFIXES if is_plain(path := folder / f"{module.file}{suffix}")]
        if paths:
            files[module.number] = max(paths, key=lambda path: path.stat().st_mtime)
    return files


def is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


# -- shutting in -------------------------------------------------------------------------------------------------------


@cache
def protection() -> str:
    """How submissions are shut in here.

    "apart": in namespaces of Linux; "user": each as another user, which only root can do; "limits": only by limits of
    time, memory and processes; "time": by time alone, as on Windows.
    """
    if sys.platform == "win32":
        return "time"
    with tempfile.TemporaryDirectory() as folder:
        code = f"import sys; from tinytorch.learn.runner import go_apart; sys.exit(0 if go_apart({folder!r}) else 3)"
        if sys.platform.startswith("linux") and can_run(code):
            return "apart"
    if os.getuid() == 0 and can_run("import numpy, tinytorch.learn.runner", user=FIRST_USER, extra_groups=[]):
        return "user"
    return "limits"


PROTECTIONS = {
    "apart": "Each ran on a copy, without network, and could neither write nor end anything outside.",
    "user": "Each ran on a copy, as another user; it could reach the network.",
    "limits": "Each ran on a copy, with limits of time, memory and processes, but as you: it could read and write "
    "your files. Grade people whom you do not know in a container.",
    "time": "Each ran on a copy, with a limit of time alone, and as you: it could read and write your files. Grade "
    "people whom you do not know in a container.",
}


def can_run(code: str, **more: Any) -> bool:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run([sys.executable, "-P", "-c", code], env=environment, cwd=tempfile.gettempdir(),
                              capture_output=True, timeout=120, **more).returncode == 0  # fmt: skip
    return False


@contextmanager
def no_orphans() -> Iterator[None]:
    """Take over processes that submissions leave without a parent, on Linux, and end them."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import ctypes

    before = {row.pid for row in table()}
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)
    try:
        yield
    finally:
        while left := [row.pid for row in table() if row.parent == os.getpid() and row.pid not in before]:
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        ctypes.CDLL(None).prctl(set_child_subreaper, 0, 0, 0, 0)


# -- grading -----------------------------------------------------------------------------------------------------------


def grade(
    submissions: Sequence[Submission],
    numbers: Sequence[int],
    *,
    jobs: int = 1,
    limits: Limits | None = None,
    watch: Callable[[Grade], None] = ignore,
) -> list[Grade]:
    """Grade modules of each submission, several at once; the grades are in the order of the submissions.

    `limits` are those of one module of one submission. `watch` is told each grade as soon as it is there.
    """
    limits = replace(limits or Limits(seconds=60, total=600), apart=protection() == "apart",
                     environment={name: os.environ[name] for name in HANDED_ON if name in os.environ})  # fmt: skip
    users: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(jobs):
        users.put(FIRST_USER + i)

    interrupted = threading.Event()

    def grade_in_turn(submission: Submission, number: int) -> Grade:
        user = users.get()
        try:
            own = replace(limits, user=user) if protection() == "user" else limits
            return grade_one(submission, number, own, interrupted.is_set)
        finally:
            users.put(user)

    with no_orphans(), ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(grade_in_turn, each, number) for each in submissions for number in numbers]
        try:
            for done in as_completed(waiting):
                watch(done.result())
        except BaseException:
            interrupted.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [done.result() for done in waiting]


def grade_one(submission: Submission, number: int, limits: Limits, cancelled: Callable[[], bool] = bool) -> Grade:
    """Grade one module of a submission, whatever it is."""
    path = submission.files.get(number)
    if path is None:
        module = module_of(number)
        problem = f"there is no {module.file}.py or .ipynb"
        return Grade(submission.name, "", no_report(number, NOT_WRITTEN, problem), problem)
    try:
        if path.stat().st_size > 50_000_000:
            raise ValueError(f"{path.name} is larger than 50 MB")
        text = workspace.text_of(path, path.read_bytes())
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        problem = f"it cannot be read: {error}"
        return Grade(submission.name, str(path), no_report(number, FAILED, problem), problem)
    try:
        return Grade(submission.name, str(path), check_text(text, number, limits=limits, cancelled=cancelled))
    except Exception as error:  # nobody else's grade may depend on it
        problem = f"grading it failed: {type(error).__name__}: {error}"
        return Grade(submission.name, str(path), no_report(number, FAILED, problem), problem, broken=True)


def no_report(number: int, status: str, why: str) -> Report:
    return nothing_ran(number, [Result(exercise.name, status, message=why) for exercise in exercises(number)])


# -- how grades are told -----------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """A text without what a terminal obeys; submissions choose their names and messages themselves."""
    return "".join(each if each.isprintable() or each == "\n" else "�" for each in text)


def as_table(grades: Sequence[Grade], width: int = 80) -> list[str]:
    """A line for each grade, and one for each exercise: how many passed it."""
    names = min(24, max((len(grade.submission) for grade in grades), default=0))
    lines = [f"{'submission':<{max(names, 10)}}  module  passed  checkpoint   not passed"]
    for each in grades:
        report = each.report
        left = each.problem or ", ".join(
            f"{e.name}{'' if e.status == FAILED else ' (not written)'}" for e in report.exercises if e.status != PASSED
        )
        score, checkpoint = f"{report.passed}/{len(report.exercises)}", report.checkpoint.status
        name = shortened(printable(each.submission), max(names, 10))
        lines.append(shortened(f"{name:<{max(names, 10)}}  {report.number:02}      {score:<6}  {checkpoint:<11}  "
                               f"{printable(left)}", width))  # fmt: skip
    for number in sorted({grade.report.number for grade in grades}):
        reports = [grade.report for grade in grades if grade.report.number == number]
        lines += ["", f"exercises of module {number:02}, and how many of {len(reports)} submissions pass them"]
        for i, exercise in enumerate(reports[0].exercises):
            count = sum(report.exercises[i].status == PASSED for report in reports)
            lines.append(f"  {count:>4}  {exercise.name}")
    return lines


def as_csv(grades: Sequence[Grade]) -> str:
    """A row for each submission; the columns are its score, and the modules, with their exercises."""
    rows: dict[str, dict[str, str]] = {}
    passed: dict[str, list[int]] = {}
    for each in grades:
        report, number = each.report, f"{each.report.number:02}"
        row = rows.setdefault(each.submission, {"submission": each.submission, "passed": "", "total": "", "score": ""})
        counts = passed.setdefault(each.submission, [0, 0])
        counts[0] += report.passed
        counts[1] += len(report.exercises)
        row |= {"passed": str(counts[0]), "total": str(counts[1]), "score": f"{counts[0] / counts[1]:.4f}"}
        row |= {f"{number} passed": str(report.passed), f"{number} problem": each.problem}
        row |= {f"{number} {result.name}": result.status for result in (*report.exercises, report.checkpoint)}
    file = io.StringIO()
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    for row in rows.values():
        writer.writerow({column: harmless(printable(value)) for column, value in row.items()})
    return file.getvalue()


def harmless(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def as_junit(grades: Sequence[Grade]) -> str:
    """JUnit's XML: a suite for each module of each submission, a case for each exercise."""
    root = ElementTree.Element("testsuites", name="tinytorch learn grade")
    for each in grades:
        report, file = each.report, module_of(each.report.number).file
        results = [*report.exercises, report.checkpoint]
        bad = sum(result.status in (FAILED, NOT_WRITTEN) for result in results)
        name = printable(each.submission)
        suite = ElementTree.SubElement(root, "testsuite", name=f"{name} {file}", tests=str(len(results)),
                                       failures=str(bad), errors="0")  # fmt: skip
        for result in results:
            case = ElementTree.SubElement(suite, "testcase", classname=f"{name}.{file}", name=result.name,
                                          time=f"{result.seconds:.3f}")  # fmt: skip
            text = printable(result.message) or result.status
            if result.status in (FAILED, NOT_WRITTEN):
                failure = ElementTree.SubElement(case, "failure", message=text.splitlines()[0], type=result.status)
                failure.text = "\n".join(filter(None, (result.test, printable(result.assertion), text)))
            elif result.status != PASSED:
                ElementTree.SubElement(case, "skipped", message=text)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def as_json(grades: Sequence[Grade]) -> str:
    """All that is known, with what the submissions printed last."""
    return json.dumps({"protection": protection(), "grades": [each.as_dict() for each in grades]}, indent=2) + "\n"


# -- the command -------------------------------------------------------------------------------------------------------


def grade_command(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER…", help="A submission, a file of one, or a folder of submissions.")
    ],
    module: Annotated[
        list[str] | None, typer.Option(help="Which module; may be given several times (those that are found).")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    junit: Annotated[bool, typer.Option("--junit", help="Print JUnit's XML instead of a table.")] = False,
    csv_: Annotated[bool, typer.Option("--csv", help="Print a row for each submission, for a spreadsheet.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of printing.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="How many at once (half as many as there are cores).")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long one test may take.")] = 60,
    total: Annotated[float, typer.Option(min=1, help="Seconds for one module of one submission.")] = 600,
    memory: Annotated[float, typer.Option(min=0.1, help="GiB that one submission may use.")] = 4,
    processes: Annotated[int, typer.Option(min=8, help="Processes and threads of one submission.")] = 256,
) -> None:
    """Grade submissions, each shut in on a copy of its own: scores by exercise. GRADING.md says what that leaves."""
    from rich.progress import Progress

    if json_ + junit + csv_ > 1:
        fail("grade prints one of --json, --junit and --csv")
    limits = Limits(seconds, total, int(memory * 2**30), processes, files=256, file_size=64 << 20)
    try:
        numbers = [find_module(label).number for label in module or ()]
        submissions = find_submissions(folders, numbers[0] if len(numbers) == 1 else None)
        numbers = numbers or sorted({number for each in submissions for number in each.files})
        if not numbers:
            fail("no file of a module is in there (such as m02_tensor.py); say which are asked for, with --module")
        for number in numbers:
            if not exercises(number):
                fail(f"module {number:02} has no exercises")
        from rich.console import Console

        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("grading", total=len(submissions) * len(numbers))
            grades = grade(submissions, numbers, jobs=jobs or max(1, (os.cpu_count() or 1) // 2), limits=limits,
                           watch=lambda _: progress.advance(bar))  # fmt: skip
    except (OSError, ValueError) as error:
        fail(str(error))
    told = as_json if json_ else as_junit if junit else as_csv if csv_ else None
    text = (
        told(grades)
        if told
        else "\n".join([*as_table(grades, shutil.get_terminal_size().columns), "", PROTECTIONS[protection()]]) + "\n"
    )
    if out is None:
        sys.stdout.write(text)
    else:
        workspace.write(out.absolute(), text.encode())
    raise typer.Exit(1 if any(each.broken for each in grades) else 0)
