"""The program that a learner's code runs in: it loads one module from the learner's text and runs tests on it.

`checking.py` starts it, hands it a job on standard input and reads what comes of each test from its standard output,
line by line. Each line begins with a secret of the job's, and the learner's code is handed other standard streams; so
nothing that it prints or exits with is taken for a result.

The tests are the package's: they are compiled from the text of the chapter and run in a copy of the learner's
namespace, in which whatever the chapter imports is what it was before the learner's code was loaded.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import linecache
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from tinytorch.learn.exercises import CHAPTERS, module_of, reference

LONG = 400  # characters of a value or of a message that are told
Report = Callable[..., None]


def main() -> None:
    """Take a job from standard input and report on standard output. `checking.Job` starts it."""
    job = json.loads(sys.stdin.buffer.read())
    channel = os.dup(1)
    os.dup2(2, 1)  # the learner's output and errors go the same way, and not among the results
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    report = partial(send, channel, job.pop("secret").encode())
    die_with_parent()
    if job["apart"] and not go_apart(job["folder"]):  # it worked a moment ago, and was promised
        report("import", error="ended", message="it was not run, because this system could not shut it in just now")
        return
    limit(job["limits"])
    run(job, report)


def run(job: dict[str, Any], report: Report) -> None:
    """Load the learner's module and run the tests on it, or the checkpoint."""
    # Names of this file are looked up before the learner's code could change what they mean.
    number, explain, compare, probe, limited, clock = (
        job["number"],
        describe,
        altered,
        unmasked,
        at_most,
        time.perf_counter,
    )
    tests, broken = compile_tests(number), compile_asserts(ast.parse("assert 1 == 2"), "<canary>")
    try:
        *others, (_, path) = job["files"]
        for each, other in others:  # the learner's too, if that was asked for
            with limited(job["seconds"]):
                load(each, Path(other))
        tools = tools_of(number)
        guarded = snapshot()
        report("loading")
        with limited(job["seconds"]):
            module = load(number, Path(path))
    except BaseException as error:
        report("import", **explain(error, job["files"], number))
        return
    report("ready")

    def intact() -> str:
        return compare(guarded) or probe(broken, tools)

    if changed := intact():
        report("altered", what=changed)
        return
    if job["checkpoint"]:
        run_checkpoint(job, report, intact)
        return
    namespace = vars(module) | {"_failed_": failed} | tools
    exec(tests, namespace)
    for name in job["tests"]:
        report("start", test=name)
        found, start = {}, clock()
        try:
            with limited(job["seconds"]):
                namespace[name]()
        except BaseException as error:
            found = explain(error, job["files"], number)
        seconds = clock() - start
        if changed := intact():
            report("altered", what=changed)
            return
        report("end", test=name, passed=not found, seconds=seconds, **found)
    report("done")


def send(channel: int, secret: bytes, event: str, **values: Any) -> None:
    """Write one line of the report. It begins a line of its own, whatever was written there before."""
    line = b"\n" + secret + b" " + json.dumps({"event": event} | values).encode() + b"\n"
    while line:
        line = line[os.write(channel, line) :]


# -- limits ------------------------------------------------------------------------------------------------------------


def limit(limits: dict[str, Any]) -> None:
    """Limit what this process may use, as far as the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    bounds = [(resource.RLIMIT_CORE, 0)]
    for kind, name in (("memory", "RLIMIT_AS"), ("file_size", "RLIMIT_FSIZE"), ("files", "RLIMIT_NOFILE"),
                       ("processes", "RLIMIT_NPROC")):  # fmt: skip
        if limits.get(kind) is not None:
            bounds.append((getattr(resource, name), limits[kind]))
    for which, value in bounds:
        _, most = resource.getrlimit(which)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        try:
            resource.setrlimit(which, (value, value))
        except (OSError, ValueError):  # macOS knows some and takes none
            continue


def die_with_parent() -> None:
    """Have Linux end this process when the one that started it has ended, however that happens."""
    if sys.platform.startswith("linux"):
        import ctypes
        import signal

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def go_apart(folder: str) -> bool:
    """Go on where no process outside can be seen or ended, nothing but a folder written, and no network reached.

    For this Linux has namespaces; returns whether they are allowed. All processes in them end when this one is
    killed, because the first process there is killed with it.
    """
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(sum(NAMESPACES)) != 0:
        return False
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", file).write_text(text)
    make_read_only(libc, folder)
    if first := os.fork():
        os._exit(exit_status(os.waitpid(first, 0)[1]))
    die_with_parent()
    if runner := os.fork():
        pid, status = os.wait()
        while pid != runner:  # the first process takes over all orphans
            pid, status = os.wait()
        os._exit(exit_status(status))
    return True


def exit_status(status: int) -> int:
    """What a shell makes of a wait's status: 128 and the signal for a process that one ended."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


class OutOfTime(BaseException):
    """A test took too long; not an Exception, which a learner's code may catch."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime where the code is after so long. Code that catches it, or Windows, is left to `checking.py`."""
    import signal

    if not hasattr(signal, "setitimer"):
        yield
        return

    def out(*_: Any) -> None:
        raise OutOfTime(f"still running after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, out)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


NAMESPACES = (0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)  # mounts, IPC, users, processes, network


def make_read_only(libc: Any, folder: str) -> None:
    """Let nothing be written but what lies in a folder, where the system knows how (Linux 5.12)."""
    import ctypes

    bind, everything_below, mount_setattr, read_only = 0x1000, 0x8000, 442, 1
    path, here = os.fsencode(folder), -100
    if libc.mount(path, path, None, bind, None) != 0:
        return
    for place, flags, values in ((b"/", everything_below, (read_only, 0)), (path, 0, (0, read_only))):
        attributes = (ctypes.c_uint64 * 4)(*values, 0, 0)
        libc.syscall(mount_setattr, here, place, flags, attributes, ctypes.sizeof(attributes))
    os.chdir(folder)  # the one that can be written, no longer the one below it


# -- the tests and the module ------------------------------------------------------------------------------------------


def load(number: int, path: Path) -> ModuleType:
    """Import a learner's file under the name of the chapter that it stands for."""
    file = module_of(number).file
    spec = importlib.util.spec_from_file_location(f"tinytorch.{file}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    setattr(sys.modules["tinytorch"], file, module)
    return module


def tools_of(number: int) -> dict[str, Any]:
    """What a chapter imports, by the names that its tests call it."""
    tree = ast.parse(reference(number))
    imports: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}  # type: ignore[attr-defined]
    namespace: dict[str, Any] = {"__name__": f"tinytorch.{module_of(number).file}", "__package__": "tinytorch"}
    exec(compile(ast.Module(imports, []), "<imports>", "exec"), namespace)
    return {name: namespace[name] for name in names}


def compile_tests(number: int) -> CodeType:
    """The tests of a chapter, and the functions of which they alone make use."""
    tree = ast.parse(reference(number))
    found = test_functions(tree, set(module_of(number).exercises.split()) | exported(number))
    future = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    path = CHAPTERS / f"{module_of(number).file}.py"
    return compile_asserts(ast.Module([*future, *found], []), str(path))


def exported(number: int) -> set[str]:
    """The names that users of the package have of a chapter."""
    module = module_of(number)
    return {own for face in module.exports for own in module.names(face).values()}


def test_functions(tree: ast.Module, others: set[str]) -> list[ast.stmt]:
    """The tests at the top of a chapter, with their helpers: plain functions that nothing but tests names."""
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    chosen = {name for name in functions if name.startswith("test_")}
    helpers = {name for name, n in functions.items() if not n.decorator_list and name not in others} - chosen
    while True:
        outside = {name for n in tree.body if getattr(n, "name", None) not in chosen | helpers for name in names_in(n)}
        if not helpers & outside:
            break
        helpers -= outside
    while more := {name for own in chosen for name in names_in(functions[own]) if name in helpers} - chosen:
        chosen |= more
    return [n for n in tree.body if getattr(n, "name", None) in chosen]


def names_in(node: ast.AST) -> Iterator[str]:
    return (each.id for each in ast.walk(node) if isinstance(each, ast.Name))


# -- assertions that say what they compared ----------------------------------------------------------------------------


class Explained(ast.NodeTransformer):
    """`assert a == b` becomes: take both values, compare them, and raise `_failed_` with the text and the values."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        test = node.test
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            parts = [ast.copy_location(ast.Assert(part, node.msg), part) for part in test.values]
            return [statement for part in parts for statement in self.visit_Assert(part)]
        before: list[ast.stmt] = []
        values: list[ast.Name] = []
        condition = test
        if isinstance(test, ast.Compare):
            names = [f"_value{i}_" for i in range(1 + len(test.ops))]
            for name, side in zip(names, [test.left, *test.comparators], strict=True):
                before.append(ast.Assign([ast.Name(name, ast.Store())], side))
            values = [ast.Name(name, ast.Load()) for name in names]
            condition = ast.Compare(values[0], test.ops, list(values[1:]))
        said = [ast.Constant(ast.unparse(test)), ast.List(list(values), ast.Load()), node.msg or ast.Constant(None)]
        failure = ast.Raise(ast.Call(ast.Name("_failed_", ast.Load()), said, []))
        statements = [*before, ast.If(ast.UnaryOp(ast.Not(), condition), [failure], [])]
        for value in values:  # a test may look at what is still alive
            statements.append(ast.Assign([ast.Name(value.id, ast.Store())], ast.Constant(None)))
        for statement in statements:
            ast.copy_location(statement, node)
            ast.fix_missing_locations(statement)
        return statements


def compile_asserts(tree: ast.Module, path: str) -> CodeType:
    return compile(ast.fix_missing_locations(Explained().visit(tree)), path, "exec")


def failed(text: str, values: list[Any], message: Any) -> AssertionError:
    """The error of an assertion that does not hold."""
    lines = [f"assert {text}"]
    if values:
        lines.append("with " + ", ".join(map(shown, values)))
    if message is not None:
        lines.append(shorten(message))
    return AssertionError("\n".join(lines))


def shown(value: Any) -> str:
    try:
        return shorten(repr(value))
    except Exception as error:
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"


def shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONG else f"{text[: LONG // 2]} … {text[-LONG // 2 :]}"


# -- what went wrong, and where ----------------------------------------------------------------------------------------


def describe(error: BaseException, files: list[tuple[int, str]], number: int) -> dict[str, Any]:
    """An error for the report: its message, the line of the test, and the line of the learner's file that raised it."""
    if isinstance(error, OutOfTime):
        kind, message = "ended", str(error)
    elif isinstance(error, SystemExit | KeyboardInterrupt):
        kind, message = "ended", f"the program was ended here by {type(error).__name__}: {shorten(error)}"
    else:
        kind = type(error).__name__
        try:
            message = shorten(error)
        except Exception:
            message = "its message cannot be shown"
    chapter = str(CHAPTERS / f"{module_of(number).file}.py")
    places = list(frames(error.__traceback__))
    test = [line for path, line in places if path == chapter]
    own = {path for _, path in files}
    path, line = next((place for place in reversed(places) if place[0] in own), ("", 0))
    if isinstance(error, SyntaxError) and error.filename in own:
        path, line = error.filename, error.lineno or 0
    return {
        "error": kind,
        "message": message,
        "assertion": linecache.getline(chapter, test[-1]).strip() if test else "",
        "file": Path(path).name,
        "line": line,
        "code": linecache.getline(path, line).strip()[:LONG] if line else "",
    }


def frames(traceback: TracebackType | None) -> Iterator[tuple[str, int]]:
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next


# -- what a submission must not change ---------------------------------------------------------------------------------

GUARDED = ("__main__", "builtins", "json", "json.encoder", "math", "numpy", "os", "posix", "signal", "time")
Parts = list[tuple[str, dict[str, Any], str, Any, Any]]


def snapshot() -> Parts:
    """What tests and this file are made of, as it is now: functions and classes, and the methods of TinyTorch's."""
    parts: Parts = []
    for name, module in list(sys.modules.items()):
        if name in GUARDED or name.partition(".")[0] == "tinytorch":
            parts += parts_of(name, vars(module))
    for name, _, key, value, _ in list(parts):
        if isinstance(value, type) and value.__module__ == name and name.startswith("tinytorch"):
            parts += parts_of(f"{name}.{key}", value.__dict__)  # type: ignore[arg-type]
    return parts


def parts_of(name: str, namespace: dict[str, Any]) -> Parts:
    return [(name, namespace, key, value, getattr(value, "__code__", None)) for key, value in list(namespace.items())
            if callable(value) or isinstance(value, property | staticmethod | classmethod)]  # fmt: skip


def altered(parts: Parts) -> str:
    """The name of one that is not any more what it was, or ""."""
    for name, namespace, key, value, code in parts:
        if namespace.get(key) is not value or getattr(value, "__code__", None) is not code:
            return f"{name}.{key}"
    return ""


def unmasked(broken: CodeType, tools: dict[str, Any]) -> str:
    """What lets pass that 1 is 2, or ""."""
    try:
        exec(broken, {"_failed_": failed})
    except AssertionError:
        pass
    else:
        return "assert"
    close = tools.get("assert_close")
    try:
        if close:
            close(1.0, 2.0)
    except AssertionError:
        return ""
    return "assert_close" if close else ""


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def run_checkpoint(job: dict[str, Any], report: Report, intact: Callable[[], str]) -> None:
    """Run a file of tests with pytest, on the learner's module."""
    import pytest

    class Reporter:
        def pytest_runtest_logstart(self, nodeid: str) -> None:
            report("start", test=nodeid.rpartition("::")[2])

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                tell(report)

        def pytest_collectreport(self, report: Any) -> None:
            if report.outcome == "failed":
                tell(report)

    def tell(found: Any) -> None:
        crash = getattr(found.longrepr, "reprcrash", None)
        text = str(crash.message if crash else found.longrepr or "")
        report("end", test=found.nodeid.rpartition("::")[2], passed=found.outcome != "failed",
               seconds=getattr(found, "duration", 0.0), skipped=found.outcome == "skipped", error="",
               message=shorten(text), assertion="", file="", line=0, code="")  # fmt: skip

    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "--import-mode=importlib", "-o", "filterwarnings="]
    pytest.main([job["checkpoint"], *options, "-o", "addopts="], plugins=[Reporter()])
    changed = intact()
    report("altered", what=changed) if changed else report("done")


if __name__ == "__main__":
    main()
