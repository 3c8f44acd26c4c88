"""`tinytorch learn grade`: hostile submissions neither pass nor disturb the others."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

from tinytorch.learn import checking, grading, notebooks
from tinytorch.learn.checking import FAILED, NOT_RUN, NOT_WRITTEN, PASSED, Limits, Report, Result, started_by
from tinytorch.learn.exercises import blanked, exercises, module_of, reference
from tinytorch.learn.grading import Grade, Submission, find_submissions, grade

NUMBER = 3
FILE = f"{module_of(NUMBER).file}.py"
EXERCISES = exercises(NUMBER)
NAMES = [exercise.name for exercise in EXERCISES]
TESTS = sorted({test for exercise in EXERCISES for test in exercise.tests})
EMPTY = blanked(reference(NUMBER), NUMBER, NAMES)
IMPORTS = EMPTY.index("import math")  # behind the line that must be first
SECONDS = 900_000_000 + os.getpid()  # by which the processes are known that a submission leaves behind


def written(code: str, *names: str) -> str:
    """The chapter in which some exercises are written, all if none is named, and do nothing that is asked for."""
    text = EMPTY
    for name in names or NAMES:
        stub = f'raise NotImplementedError("exercise {name}: tinytorch learn hint {NUMBER:02} {name}")'
        assert text.count(stub) == 1
        line = next(line for line in text.splitlines() if stub in line)
        indent = line[: line.index("raise")]
        text = text.replace(line, "\n".join(indent + each for each in code.splitlines()))
    return text


def at_import(code: str) -> str:
    """All exercises return their last argument, behind code that runs before all of it."""
    text = written("return x")
    return text[:IMPORTS] + code + "\n" + text[IMPORTS:]


REPORT = "\n".join(
    json.dumps({"event": event, "test": test, "passed": True, "seconds": 0.0})
    for event, test in [("ready", ""), *((e, t) for t in TESTS for e in ("start", "end")), ("done", "")]
)
WRITE_REPORT = f"""
import os
for number in range(256):
    for form in ({REPORT!r}, {REPORT!r}.replace("{{", "0" * 32 + " {{")):
        try:
            os.write(number, form.encode())
        except OSError:
            pass
print({REPORT!r})
"""
HOSTILE: dict[str, str] = {
    "exit at import": at_import("import sys\nsys.exit(0)"),
    "_exit at import": at_import("import os\nos._exit(0)"),
    "exit in an exercise": written("import sys\nsys.exit(0)"),
    "_exit in an exercise": written("import os\nos._exit(0)"),
    "crash": written("import os\nos.abort()"),
    "endless at import": at_import("while True: pass"),
    "endless and deaf": written(
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass", "sigmoid"
    ),
    "memory": written("hog = []\nwhile True:\n    hog.append(bytearray(64 << 20))", "sigmoid"),
    "tests rewritten": re.sub(r"(def test_.*\n)", r"\1    return\n", at_import("")),
    "own assert_close": at_import("").replace(
        "# %% [markdown]", "def assert_close(*_, **__): pass\n# %% [markdown]", 1
    ),
    "foreign assert_close": at_import(
        "from tinytorch import m01_setup\nm01_setup.assert_close = lambda *_, **__: None"
    ),
    "assert_close's code": at_import(
        "from tinytorch import m01_setup\nm01_setup.assert_close.__code__ = (lambda *_, **__: None).__code__"
    ),
    "what assert_close calls": at_import(
        "from tinytorch import m01_setup\nm01_setup.to_numpy = lambda _: __import__('numpy').zeros(1)"
    ),
    "builtins": at_import("import builtins\nbuiltins.abs = lambda _: 0"),
    "numpy": at_import("import numpy\nnumpy.abs = lambda x: x * 0"),
    "a tensor's method": at_import(
        "from tinytorch.m02_tensor import Tensor\nTensor.tolist = lambda self: __import__('unittest.mock').mock.ANY"
    ),
    "the runner": at_import(
        "import __main__\n__main__.describe = lambda *_: {}\n__main__.altered = __main__.unmasked = lambda *_: ''"
    ),
    "the runner's tools": at_import(
        "import json\nwas = json.dumps\n"
        "json.dumps = lambda x, **y: was(x, **y).replace('\"passed\": false', '\"passed\": true')"
    ),
    "a tracer": at_import("import sys\nsys.settrace(lambda frame, *_: setattr(frame, 'f_trace', None))"),
    "a report": at_import(WRITE_REPORT),
    "a report in an exercise": written(WRITE_REPORT + "\nreturn x"),
    "all closed": at_import("import os\nos.closerange(0, 256)"),
    "much output": written("for _ in range(30):\n    print('x' * 1_000_000)"),
    "a thread that stays": at_import(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
    ),
    "not python": "def relu(:\n",
    "empty": "",
    "exercises only": "from tinytorch.m03_activations import *\n",
}  # fmt: skip
POSIX: dict[str, str] = {
    "many processes": written(
        "import os, time\nfor _ in range(200):\n    if os.fork() == 0:\n        time.sleep(60)\n        os._exit(0)",
        "sigmoid",
    ),
    "processes behind": at_import(
        # One whose parent has ended, in a session of its own, and without its environment.
        f"import subprocess, sys\ncommand = [sys.executable, '-c', 'import time; time.sleep({SECONDS})']\n"
        "code = f'import subprocess; subprocess.Popen({command}, start_new_session=True)'\n"
        "subprocess.run([sys.executable, '-c', code], start_new_session=True, env={})"
    ),
    "signals": at_import(
        # Only where the numbers of processes begin anew: elsewhere nothing keeps this from ending the tests.
        "import os, signal\nif os.getpid() < 10:\n    os.kill(os.getppid(), signal.SIGKILL)\n"
        "    os.kill(-1, signal.SIGTERM)"
    ),
}
STOPPED = re.compile("stopped: more than|still running after 2 s")  # whichever is met first on a busy machine
LIMITS = Limits(seconds=2, total=30, memory=1 << 30, processes=64, files=256, file_size=1 << 20)


@pytest.fixture(scope="module")
def grades(tmp_path_factory) -> dict[str, Grade]:
    """All of them graded together, between two that are right."""
    folder = tmp_path_factory.mktemp("Klasse 9b ∇")
    texts = (
        {"anna": reference(NUMBER)} | HOSTILE | (POSIX if sys.platform == "linux" else {}) | {"zoe": reference(NUMBER)}
    )
    for name, text in texts.items():
        (folder / name).mkdir()
        (folder / name / FILE).write_text(text, encoding="utf-8")
    (folder / "nothing").mkdir()
    (folder / "binary").mkdir()
    (folder / "binary" / FILE).write_bytes(b"\xff\xfe\x00\x01" * 1000)
    (folder / "no notebook").mkdir()
    (folder / "no notebook" / f"{module_of(NUMBER).file}.ipynb").write_text("[1, 2]")
    (folder / "notebook").mkdir()
    (folder / "notebook" / f"{module_of(NUMBER).file}.ipynb").write_text(notebooks.to_notebook(reference(NUMBER)))
    done = grade(find_submissions([folder]), [NUMBER], jobs=2, limits=LIMITS)
    return {each.submission: each for each in done}


@pytest.mark.parametrize("name", ["anna", "zoe", "notebook"])
def test_the_others_are_not_disturbed(grades: dict[str, Grade], name: str) -> None:
    report = grades[name].report
    assert [e.status for e in report.exercises] == [PASSED] * len(NAMES), report
    assert report.complete


@pytest.mark.parametrize("name", [*HOSTILE, "nothing", "binary", "no notebook"])
def test_a_hostile_submission_passes_nothing(grades: dict[str, Grade], name: str) -> None:
    found = grades[name]
    assert found.report.passed == 0, found.report
    assert not found.report.complete
    assert not found.broken


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("name", list(POSIX))
def test_a_submission_cannot_spread(grades: dict[str, Grade], name: str) -> None:
    assert grades[name].report.passed == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_nothing_is_left_running(grades: dict[str, Grade]) -> None:
    assert not left_behind()


def left_behind() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text(errors="replace")
        except OSError:
            continue
        if f"sleep({SECONDS})" in line or ("tinytorch.learn.runner" in line and parent_of(path) == os.getpid()):
            found.append(line)
    return found


def parent_of(path: Path) -> int:
    try:
        return int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_the_reasons_are_told(grades: dict[str, Grade]) -> None:
    def message(name: str) -> str:
        return " ".join(e.message for e in grades[name].report.exercises)

    assert "ended here" in message("_exit in an exercise")
    assert "still running after 2 s" in message("endless at import")
    assert "still running after 2 s" in message("endless and deaf")
    stopped = "MemoryError", "GiB of memory", "still running after 2 s"  # whichever a busy machine comes to first
    assert any(reason in message("memory") for reason in stopped)
    assert "m01_setup.assert_close" in message("foreign assert_close")
    assert "m01_setup.to_numpy" in message("what assert_close calls")
    assert "builtins.abs" in message("builtins")
    assert "not Python: line 1" in message("not python")
    assert "no m03_activations.py or .ipynb" in grades["nothing"].problem
    assert "cannot be read" in grades["binary"].problem
    assert len(grades["much output"].report.output) <= 20_000
    if sys.platform == "linux":
        assert STOPPED.search(message("many processes"))
    assert {e.status for e in grades["empty"].report.exercises} == {NOT_WRITTEN}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_where_linux_has_no_namespaces_the_rest_holds(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(grading, "protection", lambda: "limits")
    names = ["many processes", "processes behind", "_exit at import"]
    submissions = []
    for name in names:
        (tmp_path / f"{name}.py").write_text((POSIX | HOSTILE)[name])
        submissions.append(Submission(name, {NUMBER: tmp_path / f"{name}.py"}))
    done = grade(submissions, [NUMBER], jobs=2, limits=LIMITS)
    assert [each.report.passed for each in done] == [0, 0, 0]
    assert any(STOPPED.search(e.message) for e in done[0].report.exercises)
    assert not left_behind()


@pytest.mark.skipif(grading.protection() != "apart", reason="needs namespaces of Linux")
def test_apart_nothing_outside_is_written_and_no_network_reached(tmp_path: Path) -> None:
    target, mine = tmp_path / "target", tmp_path / "mine.py"
    target.write_text("as it was")
    code = (
        f"import os, socket\nopen('inside', 'w').write('x')\nprint(sorted(os.environ))\n"
        f"for path in ({str(target)!r}, {str(mine)!r}, '/tmp/tinytorch-outside'):\n"
        "    try: open(path, 'w').write('changed'); print('WROTE')\n"
        "    except OSError as error: print(error)\n"
        "try: socket.create_connection(('127.0.0.1', 1), 1)\n"
        "except OSError as error: print(error)"
    )
    mine.write_text(at_import(code))
    os.environ["TINYTORCH_TEST_TOKEN"] = "secret"
    try:
        (done,) = grade([Submission("it", {NUMBER: mine})], [NUMBER], limits=LIMITS)
    finally:
        del os.environ["TINYTORCH_TEST_TOKEN"]
    assert "WROTE" not in done.report.output
    assert "Read-only" in done.report.output
    assert "unreachable" in done.report.output
    assert "TOKEN" not in done.report.output
    assert target.read_text() == "as it was"


def test_what_cannot_be_shut_in_is_not_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(grading, "protection", lambda: "apart")
    (tmp_path / FILE).write_text(at_import("print('it ran')"))
    code = "from tinytorch.learn import runner; runner.go_apart = lambda _: False; runner.main()"
    monkeypatch.setattr(checking, "COMMAND", [sys.executable, "-P", "-c", code])
    (done,) = grade([Submission("it", {NUMBER: tmp_path / FILE})], [NUMBER], limits=LIMITS)
    assert "could not shut it in" in done.report.exercises[0].message
    assert "it ran" not in done.report.output


def test_all_tests_together_have_a_limit(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text(HOSTILE["endless and deaf"])
    start = time.monotonic()
    (done,) = grade([Submission("slow", {NUMBER: path})], [NUMBER], limits=Limits(seconds=60, total=2))
    assert time.monotonic() - start < 20
    assert "2 s, is over" in " ".join(e.message for e in done.report.exercises)


def test_a_fault_of_ours_is_no_fault_of_the_submissions(tmp_path: Path, monkeypatch) -> None:
    def check_text(text: str, *_: object, **__: object) -> Report:
        if "broken" in text:
            raise RuntimeError("no such luck")
        return Report(NUMBER, [Result(name, PASSED) for name in NAMES], Result("", PASSED), Result("", PASSED))

    monkeypatch.setattr(grading, "check_text", check_text)
    for name in ("a", "broken"):
        (tmp_path / f"{name}.py").write_text(name)
    done = run_command(str(tmp_path), "--module", "3")
    assert done.exit_code == 1
    assert "RuntimeError" in done.output
    assert f"a           03      {len(NAMES)}/{len(NAMES)}" in done.output


def test_a_submission_is_never_imported_by_the_grader(tmp_path: Path) -> None:
    """Not even where it lies in a workspace, or has the name of a module of Python's."""
    (tmp_path / ".tinytorch").mkdir()
    (tmp_path / ".tinytorch" / "workspace.json").write_text(json.dumps({"format": 1, "tinytorch": "0.1.0"}))
    (tmp_path / FILE).write_text(reference(NUMBER) + "\nimport os\nprint('loaded by', os.getppid())\n")
    code = (
        "import sys, typer\nfrom tinytorch.learn.grading import grade_command\n"
        "app = typer.Typer()\napp.command()(grade_command)\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print([name for name in sys.modules if name.startswith('tinytorch.m')])"
    )
    command = [sys.executable, "-P", "-c", code, ".", "--out", "grades.txt"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["[]"], done
    assert f"{len(NAMES)}/{len(NAMES)}" in (tmp_path / "grades.txt").read_text()


def test_what_an_interrupted_grading_runs_is_ended(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(HOSTILE["endless and deaf"])
    (tmp_path / "good.py").write_text(reference(NUMBER))

    def interrupt(_: Grade) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        grade(find_submissions([tmp_path], NUMBER), [NUMBER], jobs=2, watch=interrupt)
    assert time.monotonic() - start < 30  # one test of the first may take a minute


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell")
def test_what_a_killed_grading_ran_is_ended(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(HOSTILE["endless and deaf"])
    code = (
        "import sys\nfrom pathlib import Path\nfrom tinytorch.learn.grading import *\n"
        f"grade(find_submissions([Path(sys.argv[1])], {NUMBER}), [{NUMBER}])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    grader = subprocess.Popen([sys.executable, "-P", "-c", code, str(tmp_path)], env=environment)
    try:
        wait_until(lambda: runners_of(grader.pid))
        time.sleep(2)  # until it is in the loop
        pids = runners_of(grader.pid)
    finally:
        grader.kill()
        grader.wait()
    assert pids
    wait_until(lambda: not any(Path("/proc", str(pid)).exists() for pid in pids))


def runners_of(pid: int) -> list[int]:
    """The processes below one that are runners."""
    return [row.pid for row in started_by(pid)
            if b"-m\0tinytorch.learn.runner" in Path("/proc", str(row.pid), "cmdline").read_bytes()]  # fmt: skip


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_classroom_gives_a_point_for_each_exercise(tmp_path: Path) -> None:
    text = (Path(grading.__file__).parent / "classroom.yml").read_text()
    script = textwrap.dedent(text[text.index("<<'PYTHON'") :].partition("\n")[2].partition("PYTHON\n")[0])
    grades = [a_grade("anna", PASSED, FAILED, NOT_WRITTEN)]
    (tmp_path / "grades.json").write_text(grading.as_json(grades))
    environment = os.environ | {"GITHUB_OUTPUT": str(tmp_path / "output")}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    name, _, encoded = (tmp_path / "output").read_text().partition("=")
    found = json.loads(base64.b64decode(encoded))
    assert (name, found["status"], found["max_score"]) == ("result", "fail", 3)
    assert [(t["name"], t["status"], t["score"]) for t in found["tests"]] == [
        (f"03 {NAMES[0]}", "pass", 1), (f"03 {NAMES[1]}", "fail", 0), (f"03 {NAMES[2]}", "fail", 0)]  # fmt: skip
    assert f"{name.upper()}S: ${{{{ steps.tinytorch.outputs.{name} }}}}" in text.replace("TINYTORCH_", "")


# -- what was handed in, and how it is told ----------------------------------------------------------------------------


def run_command(*arguments: str):
    app = typer.Typer()
    app.command()(grading.grade_command)
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def known(monkeypatch) -> Callable[..., None]:
    """Grades that are there without running anything."""

    def put(*found: Grade) -> None:
        monkeypatch.setattr(grading, "grade", lambda *_, **__: list(found))

    return put


def a_grade(name: str, *statuses: str, **more) -> Grade:
    results = [Result(each, status, test="test_x", message="assert 1 == 2\nwith 1, 2") if status == FAILED else
               Result(each, status) for each, status in zip(NAMES, statuses, strict=False)]  # fmt: skip
    return Grade(name, FILE, Report(NUMBER, results, Result("rest", PASSED), Result("checkpoint", NOT_RUN)), **more)


def test_submissions_are_found(tmp_path: Path) -> None:
    for name in ("a/m03_activations.py", "b/src/m02_tensor.ipynb", "b/m02_tensor.py", "b/src/m04_layers.py",
                 "c/notes.txt", ".git/m03_activations.py", "m.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    found = {each.name: each.files for each in find_submissions([tmp_path])}
    assert list(found) == ["a", "b", "c"]
    assert list(found["a"]) == [3]
    assert found["b"] == {2: tmp_path / "b/m02_tensor.py", 4: tmp_path / "b/src/m04_layers.py"}
    assert found["c"] == {}
    (one,) = find_submissions([tmp_path / "a"])
    assert (one.name, list(one.files)) == ("a", [3])
    (one,) = find_submissions([tmp_path / "a" / "m03_activations.py"])
    assert list(one.files) == [3]
    (tmp_path / "zoe.py").write_text("x = 1")
    assert find_submissions([tmp_path], 5)[-1] == Submission("zoe", {5: tmp_path / "zoe.py"})
    with pytest.raises(ValueError, match="--module"):
        find_submissions([tmp_path])
    with pytest.raises(FileNotFoundError):
        find_submissions([tmp_path / "none"])


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.py").write_text("password = 1")
    (tmp_path / "class" / "eve").mkdir(parents=True)
    (tmp_path / "class" / "eve" / FILE).symlink_to(tmp_path / "secret.py")
    (tmp_path / "class" / "mallory").symlink_to(tmp_path)
    (found,) = find_submissions([tmp_path / "class"])
    assert found == Submission("eve", {})


def test_the_table(known, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("x = 1")
    known(a_grade("anna", PASSED, PASSED), a_grade("eve\x1b[2J" + "e" * 90, FAILED, NOT_WRITTEN))
    done = run_command(str(tmp_path))
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines()[:8])) <= 80
    assert "anna                      03      2/2" in done.stdout
    assert f"{NAMES[0]}, {NAMES[1]} (not" in done.stdout
    assert "\x1b" not in done.stdout
    assert f"     1  {NAMES[0]}\n" in done.stdout


def test_csv_json_and_junit(known, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("x = 1")
    known(a_grade("anna", PASSED, PASSED), a_grade("=cmd\x00", FAILED, NOT_WRITTEN))
    rows = list(csv.DictReader(io.StringIO(run_command(str(tmp_path), "--csv").stdout)))
    assert [row["submission"] for row in rows] == ["anna", "'=cmd�"]
    assert [row["score"] for row in rows] == ["1.0000", "0.0000"]
    assert [row[f"03 {NAMES[1]}"] for row in rows] == [PASSED, NOT_WRITTEN]
    found = json.loads(run_command(str(tmp_path), "--json").stdout)
    assert [(g["submission"], g["passed"], g["total"]) for g in found["grades"]] == [("anna", 2, 2), ("=cmd\x00", 0, 2)]
    assert found["grades"][1]["exercises"][0]["message"] == "assert 1 == 2\nwith 1, 2"
    out = tmp_path / "results.xml"
    assert run_command(str(tmp_path), "--junit", "--out", str(out)).stdout == ""
    suites = ElementTree.parse(out).getroot()
    assert [(s.get("tests"), s.get("failures")) for s in suites] == [("3", "0"), ("3", "2")]
    failures = [case.find("failure") for case in suites[1]]
    assert [failure.get("message") for failure in failures[:2]] == ["assert 1 == 2", NOT_WRITTEN]
    assert suites[1][2].find("skipped") is not None
    assert "one of" in run_command(str(tmp_path), "--junit", "--csv").output


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    done = run_command(str(tmp_path))
    assert (done.exit_code, "--module" in done.output) == (2, True)
    assert run_command(str(tmp_path / "none")).exit_code == 2
    assert "no module 'x'" in run_command(str(tmp_path), "--module", "x").output
