"""A chapter's own tests on a learner's file, exercise by exercise: `tinytorch learn check 02`.

The learner's text is copied to a folder that is a workspace of its own, where only the module to check is the
learner's, and loaded there by another process, the runner. What is passed is decided here: by what the runner reports
of each test, and by the text, in which an exercise must be written.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from tinytorch.curriculum import find_module
from tinytorch.learn.exercises import CHAPTERS, Definition, exercises, module_of, parse, reference
from tinytorch.learn.workspace import Workspace
from tinytorch.terminal import fail

__all__ = ["Limits", "Report", "Result", "check", "check_command", "check_text"]

PASSED, FAILED, NOT_WRITTEN, NOT_RUN, ABSENT = "passed", "failed", "not written", "not run", "absent"
REST, LATER = "the rest of the chapter", "it is run when all exercises are passed"
LONGEST = 1_000_000  # characters of a file; the longest chapter has 50,000
OUTPUT = 20_000  # bytes of what a program prints that are kept, from the end
COMMAND = [sys.executable, "-P", "-m", "tinytorch.learn.runner"]
MARK = "TINYTORCH_JOB"  # the variable that the processes of a run are known by
ROUND = 0.1  # seconds between two looks at the processes of a job
WITH_KERNELS = 16  # the module whose subject kernels are
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What a learner's code may use. `None` does not limit it.

    Attributes:
        seconds: for one test, and for loading the module.
        total: seconds for all of a module's tests together.
        memory: bytes that a process may reserve, and that all of them together may fill.
        processes: that it may have started at one time.
        files, file_size: that it may have open, and bytes that it may write to one.
        apart: with other processes and other folders out of reach, and no network, where the system can do that.
        user: the number of another user that it runs as (only root can ask for that).
        environment: variables that it is handed instead of those of this process.
    """

    seconds: float = 60
    total: float | None = None
    memory: int | None = 4 << 30
    processes: int | None = None
    files: int | None = None
    file_size: int | None = None
    apart: bool = False
    user: int | None = None
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Result:
    """What came of an exercise, of the rest of a chapter, or of its checkpoint.

    Attributes:
        status: "passed", "failed", or, of an exercise, "not written"; the rest and the checkpoint may be "not run" yet,
            and the checkpoint "absent" where there is none.
        test: the first test that failed.
        message: why it failed; of an assertion, its text and the values that it compared.
        assertion: the line of the test.
        file, line, code: the line of the learner's that an error was raised in, or called from; 0 where there is none.
        waits_for: the exercise that is not written and without which the test could not go on.
    """

    name: str
    status: str
    test: str = ""
    message: str = ""
    assertion: str = ""
    file: str = ""
    line: int = 0
    code: str = ""
    waits_for: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """What a check found: of each exercise, of the tests that belong to no exercise, and of the checkpoint."""

    number: int
    exercises: list[Result]
    rest: Result
    checkpoint: Result
    output: str = field(default="", repr=False)  # the end of what the learner's code printed

    @property
    def passed(self) -> int:
        """How many exercises are passed."""
        return sum(each.status == PASSED for each in self.exercises)

    @property
    def complete(self) -> bool:
        """Whether all that there is was passed."""
        return (
            self.passed == len(self.exercises)
            and self.rest.status == PASSED
            and self.checkpoint.status in (PASSED, ABSENT)
        )

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        module = module_of(self.number)
        return {"module": self.number, "name": module.name, "passed": self.passed, "total": len(self.exercises),
                "complete": self.complete} | asdict(self)  # fmt: skip


def ignore(_: Any) -> None:
    """Watch nothing."""


# -- checking a text ---------------------------------------------------------------------------------------------------


def check(
    root: Path, number: int, *, own: bool = False, limits: Limits | None = None, watch: Callable[[str], None] = ignore
) -> Report:
    """Check a learner's module and note in the workspace what came of it.

    With `own`, the learner's other modules take the place of the package's, too. `watch` is told each test that begins.
    Raises FileNotFoundError where the learner has no file of the module, ValueError for one that cannot be read.
    """
    workspace = Workspace(root)
    text = workspace.text(number)
    others = {each: workspace.text(each) for each in workspace.numbers() if own and each != number}
    report = check_text(text, number, others=others, limits=limits, watch=watch)
    checkpoint = report.checkpoint.status if report.checkpoint.status in (PASSED, FAILED) else None
    workspace.record(number, {e.name: e.status for e in report.exercises}, text=text, checkpoint=checkpoint)
    return report


def check_text(
    text: str,
    number: int,
    *,
    others: Mapping[int, str] | None = None,
    limits: Limits | None = None,
    watch: Callable[[str], None] = ignore,
    cancelled: Callable[[], bool] = bool,
) -> Report:
    """Check the text of a module; nothing is written but in a temporary folder.

    `cancelled` is asked every now and then; once it says so, all ends with InterruptedError. Raises ValueError for a
    module that has no exercises.
    """
    limits = limits or Limits()
    known = exercises(number)
    if not known:
        raise ValueError(f"module {number:02} {module_of(number).name} has no exercises")
    try:
        written = written_in(text, [exercise.name for exercise in known])
    except ValueError as error:
        return nothing_ran(number, [Result(e.name, FAILED, message=str(error)) for e in known])
    if not written:
        return nothing_ran(number, [Result(exercise.name, NOT_WRITTEN) for exercise in known])
    missing = {exercise.name for exercise in known} - written
    every = [name for name in top_functions(reference(number)) if name.startswith("test_")]
    theirs = {test for exercise in known for test in exercise.tests}
    wanted = {test for e in known if e.name in written for test in e.tests} | (set(every) - theirs)
    with tempfile.TemporaryDirectory(prefix="tinytorch-check-", ignore_cleanup_errors=True) as name:
        job = Job(number, prepare(Path(name), number, text, others or {}, limits), limits, watch, cancelled)
        found = job.run_tests([test for test in every if test in wanted])
        results = []
        for exercise in known:
            if exercise.name not in written:
                results.append(Result(exercise.name, NOT_WRITTEN))
            elif not exercise.tests:
                results.append(Result(exercise.name, FAILED, message="the chapter has no test of it"))
            else:
                results.append(summary(exercise.name, exercise.tests, found, missing))
        rest = summary(REST, [test for test in every if test not in theirs], found, missing)
        checkpoint = Result("checkpoint", NOT_RUN, message=LATER)
        if all(result.status == PASSED for result in (*results, rest)):
            checkpoint = job.run_checkpoint()
    return Report(number, results, rest, checkpoint, job.output)


def nothing_ran(number: int, results: list[Result]) -> Report:
    rest = Result(REST, NOT_RUN, message="it is run when an exercise is written")
    return Report(number, results, rest, Result("checkpoint", NOT_RUN, message=LATER))


def summary(name: str, tests: Iterable[str], found: Mapping[str, Outcome], missing: set[str]) -> Result:
    """One result of several tests: the first failure, or that all passed."""
    taken = 0.0
    for test in tests:
        outcome = found.get(test, {"passed": False, "message": "it was not run"})
        taken += outcome.get("seconds", 0.0)
        if not outcome["passed"]:
            message = outcome.get("message", "")
            waits_for = next((e for e in missing if message.startswith(f"exercise {e}:")), "")
            if outcome.get("error") not in ("", "AssertionError", "ended", None):
                message = f"{outcome['error']}: {message}"
            return Result(name, FAILED, test, message, outcome.get("assertion", ""), outcome.get("file", ""),
                          outcome.get("line", 0), outcome.get("code", ""), waits_for, taken)  # fmt: skip
    return Result(name, PASSED, seconds=taken)


def written_in(text: str, names: Iterable[str]) -> set[str]:
    """Which exercises are written: defined, with a body that does more than raise NotImplementedError.

    Raises ValueError for a text that is not Python, with the line.
    """
    if len(text) > LONGEST:
        raise ValueError(f"the file has {len(text):,} characters, and no chapter has more than {LONGEST:,}")
    try:
        tree = parse(text)
    except SyntaxError as error:
        raise ValueError(f"this is not Python: line {error.lineno or 1}: {error.msg}") from None
    except ValueError as error:
        raise ValueError(f"this is not Python: {error}") from None
    except (RecursionError, MemoryError):
        raise ValueError("this is not Python: it is nested too deeply") from None
    return {name for name in names if (node := last_definition(tree, name)) is not None and not is_empty(node)}


def last_definition(tree: ast.Module, name: str) -> Definition | None:
    """The definition that is in force at the end, as Python reads a file; None if there is none at its place."""
    owner, _, own = name.rpartition(".")
    body: list[ast.stmt] = tree.body
    if owner:
        classes = [node for node in body if isinstance(node, ast.ClassDef) and node.name == owner]
        body = classes[-1].body if classes else []
    found = [node for node in body if isinstance(node, Definition) and node.name == own]
    return found[-1] if found else None


def is_empty(node: Definition) -> bool:
    """Whether a body is a docstring, `pass`, `...`, and `raise NotImplementedError`, and nothing else."""
    for statement in node.body:
        if isinstance(statement, ast.Raise):
            raised = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
            return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
        constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not constant and not isinstance(statement, ast.Pass):
            return False
    return True


def top_functions(source: str) -> list[str]:
    return [node.name for node in parse(source).body if isinstance(node, ast.FunctionDef)]


def prepare(folder: Path, number: int, text: str, others: Mapping[int, str], limits: Limits) -> Path:
    """Make a folder a workspace that holds a module, and others of the same learner."""
    Workspace.create(folder)
    for each, content in {**others, number: text}.items():
        (folder / f"{module_of(each).file}.py").write_bytes(content.encode("utf-8", "surrogatepass"))
    if limits.user is not None:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, limits.user, limits.user)
    return folder


# -- jobs --------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """The runs of one module's tests: as many processes as it takes, because a test may end the one that it is in."""

    number: int
    folder: Path
    limits: Limits
    watch: Callable[[str], None]
    cancelled: Callable[[], bool]
    output: str = ""
    began: float = field(default_factory=time.monotonic)

    def run_tests(self, tests: list[str]) -> dict[str, Outcome]:
        """What came of each test. One that ends its process fails, and those behind it go on in another."""
        found: dict[str, Outcome] = {}
        left = tests
        while left:
            run = self.start({"tests": left, "checkpoint": ""})
            if run.spoiled:
                return dict.fromkeys(tests, run.failure())
            found |= run.found
            if run.running:
                found[run.running] = run.failure()
            left = [test for test in left if test not in found]
            if run.finished or not (run.found or run.running):  # done, or ended before its first test
                return dict.fromkeys(left, run.failure()) | found
        return found

    def run_checkpoint(self) -> Result:
        """What came of the checkpoint, which only a checkout has, and pytest runs."""
        module = module_of(self.number)
        path = CHAPTERS.parent / "tests" / "checkpoints" / f"test_{module.number:02}_{module.name}.py"
        if not path.is_file():
            return Result("checkpoint", ABSENT, message="only a checkout has checkpoints")
        if importlib.util.find_spec("pytest") is None:
            return Result("checkpoint", ABSENT, message="it needs pytest: pip install pytest")
        run = self.start({"tests": [], "checkpoint": str(path)})
        if not run.finished:
            return summary(
                "checkpoint", [run.running or "its tests"], {run.running or "its tests": run.failure()}, set()
            )
        bad = [name for name, outcome in run.found.items() if not outcome["passed"]]
        ran = {name.partition("[")[0] for name in run.found}
        expected = [name for name in top_functions(path.read_text(encoding="utf-8")) if name.startswith("test_")]
        lost = [name for name in expected if name not in ran]
        all_skipped = all(outcome.get("skipped") for outcome in run.found.values())
        first = bad[:1] or lost[:1] or (["its tests"] if all_skipped else list(run.found))
        return summary("checkpoint", first, {} if first == ["its tests"] else run.found, set())

    def start(self, work: dict[str, Any]) -> Run:
        """Run one process to its end, or until a limit is reached."""
        secret, mark = secrets.token_hex(16), secrets.token_hex(8)
        files = [(number, str(self.folder / f"{module_of(number).file}.py")) for number in self.loaded()]
        limits = self.limits
        counted = limits.apart or limits.user is not None  # else the system counts all processes of this user
        job = work | {"secret": secret, "number": self.number, "files": files, "folder": str(self.folder),
                      "seconds": limits.seconds, "apart": limits.apart,
                      "limits": {"memory": limits.memory, "file_size": limits.file_size, "files": limits.files,
                                 "processes": limits.processes if counted else None}}  # fmt: skip
        more: dict[str, Any] = {}
        if sys.platform == "win32":
            more["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
        else:
            more["start_new_session"] = True
            if limits.user is not None:
                more |= {"user": limits.user, "group": limits.user, "extra_groups": []}
        process = subprocess.Popen(
            COMMAND, cwd=self.folder, env=self.environment() | {MARK: mark},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)  # fmt: skip
        run = Run(process, secret, mark, limits)
        try:
            run.follow(json.dumps(job).encode(), self.deadline(), self.watch, self.cancelled)
        finally:
            run.stop()
        self.output = (self.output + run.output.decode("utf-8", "replace"))[-OUTPUT:]
        return run

    def deadline(self) -> float:
        return float("inf") if self.limits.total is None else self.began + self.limits.total

    def loaded(self) -> list[int]:
        """The modules that are the learner's, up to the one to check: the ones above it are loaded if asked for."""
        return [
            number for number in range(1, self.number + 1) if (self.folder / f"{module_of(number).file}.py").exists()
        ]

    def environment(self) -> dict[str, str]:
        """What the process finds in its environment: this workspace, no kernels, no GPU."""
        given = dict(os.environ if self.limits.environment is None else self.limits.environment)
        for name in ("TINYTORCH_LEARN_KERNELS", "TINYTORCH_KERNELS", "PYTHONSTARTUP", "PYTHONSAFEPATH"):
            given.pop(name, None)
        folder = str(self.folder)
        given |= {
            "TINYTORCH_WORKSPACE": folder, "TINYTORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "TMPDIR": folder, "TEMP": folder, "TMP": folder}  # fmt: skip
        if self.limits.environment is not None:
            given |= {"HOME": folder, "USERPROFILE": folder, "NUMBA_CACHE_DIR": folder}
        if self.number != WITH_KERNELS:
            given["TINYTORCH_KERNELS"] = "off"
        return given


class Run:
    """One process and what it reports."""

    def __init__(self, process: subprocess.Popen[bytes], secret: str, mark: str, limits: Limits) -> None:
        self.process, self.secret, self.mark, self.limits = process, secret.encode(), mark, limits
        self.found: dict[str, Outcome] = {}
        self.running = self.reason = ""
        self.error: Outcome = {}
        self.finished = self.spoiled = False
        self.output = b""
        self.lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        readers = ((self.read_report, process.stdout), (self.read_output, process.stderr))
        self.threads = [threading.Thread(target=target, args=(pipe,), daemon=True) for target, pipe in readers]

    def read_report(self, pipe: IO[bytes]) -> None:
        """Take from a pipe the lines that begin with the secret, however much else is written there."""
        rest = b""
        with pipe:
            while chunk := os.read(pipe.fileno(), 1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if secrets.compare_digest(line[: len(self.secret)], self.secret):
                        self.lines.put(line[len(self.secret) :])
                rest = rest[: 1 << 20]
        self.lines.put(None)

    def read_output(self, pipe: IO[bytes]) -> None:
        with pipe:
            while chunk := os.read(pipe.fileno(), 1 << 16):
                self.output = (self.output + chunk)[-OUTPUT:]

    def follow(self, job: bytes, end: float, watch: Callable[[str], None], cancelled: Callable[[], bool]) -> None:
        """Hand the process its job and take its report, until it is done or may go on no longer."""
        for thread in self.threads:
            thread.start()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError, OSError), self.process.stdin as pipe:
            pipe.write(job)
        until = time.monotonic() + 60 + self.limits.seconds  # NumPy's first import may take long; it is not theirs
        while not self.finished and not self.spoiled:
            now = time.monotonic()
            if now > min(until, end):
                self.reason = (f"stopped: still running after {self.limits.seconds:g} s" if now > until else
                               f"stopped: the time for all tests, {self.limits.total:g} s, is over")  # fmt: skip
                return
            try:
                line = self.lines.get(timeout=max(0.0, min(ROUND, until - now, end - now)))
            except queue.Empty:
                if cancelled():
                    raise InterruptedError("cancelled") from None
                self.reason = too_much(self.process.pid, self.limits)
                if self.reason:
                    return
                if self.process.poll() is not None and self.lines.empty():
                    self.threads[0].join(ROUND)  # unless another process holds the pipe, it is read to its end
                    if self.lines.empty():
                        return
                continue
            if line is None:
                return
            self.take(json.loads(line), watch)
            until = time.monotonic() + self.limits.seconds + 2  # the runner itself looks at the time, and says where

    def take(self, event: dict[str, Any], watch: Callable[[str], None]) -> None:
        kind, test = event.pop("event"), event.get("test", "")
        if kind == "start":
            self.running = test
            watch(test)
        elif kind == "end":
            self.running = ""
            before = self.found.get(test)
            self.found[test] = before if before and not before["passed"] else event
        elif kind in ("import", "altered"):
            self.spoiled = True
            self.error = event
            if kind == "altered":
                self.reason = f"the file changes {event['what']}, which its tests rely on; so they prove nothing"
        else:
            self.finished = kind == "done"

    def failure(self) -> Outcome:
        """The outcome of a test that the process did not get through."""
        if self.error and not self.reason:
            return self.error | {"passed": False}
        status = self.process.returncode
        how = f"by signal {-status}" if status is not None and status < 0 else f"with status {status}"
        return {"passed": False, "error": "ended", "message": self.reason or f"the program ended here, {how}"}

    def stop(self) -> None:
        """End the process and all that it has started."""
        if not self.reason and not self.finished and not self.spoiled:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)  # it has ended, and how is told
        end_all(self.process, self.mark, self.limits.user)
        for thread in self.threads:
            thread.join(1.0)


# -- processes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A line of Linux's table of processes."""

    pid: int
    parent: int
    session: int
    threads: int
    bytes: int


def table() -> Iterable[Process]:
    """The processes of this machine; none where it is not Linux."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            rest = (folder / "stat").read_text().rpartition(")")[2].split()  # a name may hold anything
            if rest[0] not in "ZX":
                memory = int(rest[21]) * os.sysconf("SC_PAGE_SIZE")
                yield Process(int(folder.name), int(rest[1]), int(rest[3]), int(rest[17]), memory)


def started_by(pid: int) -> list[Process]:
    """A process, those of its session, and all that they have started."""
    rows = list(table())
    chosen = {pid} | {row.pid for row in rows if row.session == pid}
    while more := {row.pid for row in rows if row.parent in chosen} - chosen:
        chosen |= more
    return [row for row in rows if row.pid in chosen]


def marked(mark: str, user: int | None) -> list[int]:
    """The processes of a user, and those with a mark in their environment, which is handed on to what they start."""
    line, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if folder.stat().st_uid == user or line in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def too_much(pid: int, limits: Limits) -> str:
    """Which limit the processes of a run are beyond together, or ""."""
    rows = started_by(pid)
    if limits.processes is not None and sum(row.threads for row in rows) > limits.processes:
        return f"stopped: more than {limits.processes} processes and threads"
    if limits.memory is not None and sum(row.bytes for row in rows) > limits.memory:
        return f"stopped: more than {limits.memory / 2**30:g} GiB of memory"
    return ""


def end_all(process: subprocess.Popen[bytes], mark: str, user: int | None) -> None:
    """End a process and all that it has started, also what has left its session or lost its parent."""
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
        process.wait()
        return
    for _ in range(100):  # what starts others faster than they are ended is stopped first
        pids = (
            {row.pid for row in started_by(process.pid)} | set(marked(mark, user)) if Path("/proc").is_dir() else set()
        )
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with suppress(OSError):
                    os.kill(pid, number)
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.poll() is not None and not pids:
            return
        time.sleep(0.01)


# -- the command -------------------------------------------------------------------------------------------------------


def check_command(
    module: Annotated[str, typer.Argument(metavar="MODULE", help="Its number or name: 2, 02 or tensor.")],
    own: Annotated[bool, typer.Option("--own", help="With your other modules, too, not the package's.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long one test may take.")] = 60,
    memory: Annotated[float, typer.Option(min=0.1, help="GiB that your code may use.")] = 4,
    output: Annotated[bool, typer.Option("--output", help="Show what your code printed, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Run a module's tests on your file: which exercises are passed, and why others are not."""
    from rich.console import Console

    workspace = found_workspace()
    try:
        number = find_module(module).number
        limits = Limits(seconds=seconds, memory=int(memory * 2**30))
        with Console(stderr=True, quiet=as_json).status(f"checking module {number:02}") as status:
            report = check(workspace.root, number, own=own, limits=limits, watch=status.update)
    except (OSError, ValueError) as error:
        fail(str(error))
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        print("\n".join(lines_of(report, str(workspace.file(number)))))
        if output and report.output:
            print(f"\nWhat your code printed:\n{report.output.rstrip()}")
    raise typer.Exit(0 if report.complete else 1)


def found_workspace() -> Workspace:
    """The workspace in force; ends the command where there is none."""
    try:
        workspace = Workspace.find()
    except ValueError as error:
        fail(str(error))
    if workspace is None:
        fail("this folder is no workspace; make one with: tinytorch learn start 02")
    return workspace


def lines_of(report: Report, file: str, width: int = 80) -> list[str]:
    """A report as text: a line for each exercise, and below them why those that failed did."""
    rows = [*report.exercises, report.rest, report.checkpoint]
    names = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        status, note = row.status, row.test or row.message
        if row.waits_for:
            status, note = "waiting", f"for {row.waits_for}, which is not written"
        elif status == NOT_WRITTEN:
            note = f"tinytorch learn hint {report.number:02} {row.name}"
        lines.append(shortened(f"{status:<11}  {row.name:<{names}}  {note}", width))
    reasons: dict[tuple[str, str], list[Result]] = {}  # a test that several exercises share is told once
    for row in rows:
        if row.status == FAILED and not row.waits_for:
            reasons.setdefault((row.test, row.message), []).append(row)
    for same in reasons.values():
        lines += ["", *reason(same[0], ", ".join(row.name for row in same), file, width)]
        hints = [row.name for row in same if row in report.exercises]
        lines += [f"  hint: tinytorch learn hint {report.number:02} {name}" for name in hints[:3]]
    return [*lines, "", f"{report.passed} of {len(report.exercises)} exercises are passed"]


def reason(row: Result, names: str, file: str, width: int) -> list[str]:
    """Why a test failed, and where."""
    lines = textwrap.wrap(f"{names}: {row.test}" if row.test else names, width)
    told = row.message.splitlines() or ["it failed without a message"]
    if row.assertion and not row.assertion.startswith("assert "):
        told = [row.assertion, *told]
    for line in told[:12]:
        lines += textwrap.wrap(line, width, initial_indent="  ", subsequent_indent="    ") or [""]
    if row.line:
        notebook = file.endswith(".ipynb") and Path(file).stem == Path(row.file).stem  # whose lines have no numbers
        place = Path(file).name if notebook else f"{row.file}, line {row.line}"
        lines.append(shortened(f"  {place}: {row.code}", width))
    return lines


def shortened(line: str, width: int) -> str:
    line = line.rstrip()
    return line if len(line) <= width else f"{line[: width - 1]}…"
