"""`tinytorch learn check`: what a learner's file passes, and what it is told where it fails."""

from __future__ import annotations

import ast
import gc
import json
import sys
import weakref
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tinytorch.learn import checking, runner
from tinytorch.learn.checking import FAILED, NOT_RUN, NOT_WRITTEN, PASSED, Limits, Report, Result, check, check_text
from tinytorch.learn.exercises import blanked, definition, exercises, reference
from tinytorch.learn.workspace import Workspace, digest

NUMBER = 3  # a short chapter
NAMES = [exercise.name for exercise in exercises(NUMBER)]
RELU_TEST = "test_straight_pieces"


def solved(*names: str) -> str:
    """The chapter as it is handed out, with the solutions of some exercises."""
    return blanked(reference(NUMBER), NUMBER, set(NAMES) - set(names))


def with_body(body: str, name: str = "relu", source: str | None = None) -> str:
    """The chapter with its solutions, but for one body."""
    text = blanked(source or reference(NUMBER), NUMBER, [name])
    node = definition(ast.parse(text), name)
    lines = text.splitlines()
    indent = " " * node.body[-1].col_offset
    lines[node.body[-1].lineno - 1 : node.end_lineno] = [indent + line for line in body.splitlines()]
    return "\n".join(lines) + "\n"


def by_name(report: Report) -> dict[str, Result]:
    return {result.name: result for result in report.exercises}


def without_checkpoint(text: str, **options) -> Report:
    """What comes of a text in which something is wrong, so that the checkpoint is not run."""
    report = check_text(text, NUMBER, limits=Limits(**options))
    assert report.checkpoint.status == NOT_RUN
    assert not report.complete
    return report


# -- what is passed ----------------------------------------------------------------------------------------------------


def test_the_reference_passes_everything_and_its_checkpoint() -> None:
    report = check_text(reference(NUMBER), NUMBER)
    assert {result.status for result in report.exercises} == {PASSED}
    assert (report.rest.status, report.checkpoint.status) == (PASSED, PASSED)
    assert report.complete
    assert report.passed == len(NAMES)


def test_an_empty_file_passes_nothing(monkeypatch) -> None:
    monkeypatch.setattr(checking.Job, "start", lambda *_: pytest.fail("nothing has to run"))
    for text in (solved(), "", "relu = softmax = None\n"):
        report = without_checkpoint(text)
        assert {result.status for result in report.exercises} == {NOT_WRITTEN}


def test_a_wrong_solution_fails_with_the_values_that_were_compared() -> None:
    report = without_checkpoint(with_body("return xp.maximum(x, 0) + (x == 5)"))
    found = by_name(report)
    assert (found["relu"].status, found["relu"].test) == (FAILED, RELU_TEST)
    assert found["relu"].message == "assert relu(tensor([-2, 5])).tolist() == [0, 5]\nwith [0, 6], [0, 5]"
    found |= by_name(without_checkpoint(with_body("return xp.maximum(x, 1)")))
    assert found["relu"].assertion in reference(NUMBER)
    assert "actual 1, expected 0" in found["relu"].message
    assert found["softmax"].status == found["sigmoid"].status == PASSED
    assert report.passed < len(NAMES)


def test_an_error_is_told_with_the_learners_line() -> None:
    text = with_body("y = x + 1\nreturn y.nonsense")
    found = by_name(without_checkpoint(text))["relu"]
    assert found.message.startswith("AttributeError: ")
    assert found.code == "return y.nonsense"
    assert text.splitlines()[found.line - 1].strip() == found.code


def test_a_test_that_needs_another_exercise_says_which() -> None:
    report = without_checkpoint(solved("relu"))
    found = by_name(report)
    assert (found["relu"].status, found["relu"].waits_for) == (FAILED, "leaky_relu")
    assert found["leaky_relu"].status == NOT_WRITTEN
    assert f"{'waiting':<11}  relu" in "\n".join(checking.lines_of(report, "m03_activations.py"))


def test_an_exercise_without_tests_is_not_passed(monkeypatch) -> None:
    without = [checking.exercises(NUMBER)[0].__class__(NUMBER, name, "", "", ()) for name in NAMES]
    monkeypatch.setattr(checking, "exercises", lambda number: without)
    assert without_checkpoint(reference(NUMBER)).passed == 0


def test_the_learners_copy_of_the_tests_is_not_run() -> None:
    tree = ast.parse(reference(NUMBER))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            node.body = ast.parse("print('the copy was run')").body
    harmless = ast.unparse(tree)
    report = without_checkpoint(with_body("return x", source=harmless))
    assert by_name(report)["relu"].status == FAILED
    assert "the copy" not in report.output
    failing = harmless.replace("print('the copy was run')", "assert False")
    assert check_text(failing, NUMBER).complete


def test_other_modules_are_the_packages_unless_the_learners_are_asked_for() -> None:
    marked = reference(2) + "\nprint('the tensor is mine')\n"
    assert "mine" not in without_checkpoint(with_body("return x")).output
    report = check_text(with_body("return x"), NUMBER, others={2: marked})
    assert "the tensor is mine" in report.output
    assert by_name(report)["softmax"].status == PASSED


# -- programs that do not come back ------------------------------------------------------------------------------------


def test_an_endless_loop_is_stopped_and_the_others_are_tested() -> None:
    report = without_checkpoint(with_body("while True:\n    y = x", "elu"), seconds=2)
    found = by_name(report)
    assert "still running after 2 s" in found["elu"].message
    if sys.platform != "win32":
        assert found["elu"].code in ("while True:", "y = x")
    assert found["softmax"].status == PASSED


@pytest.mark.parametrize("end", ["import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise KeyboardInterrupt"])
def test_a_program_that_ends_has_not_passed(end: str, monkeypatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    report = without_checkpoint(with_body(f"print('the last word')\n{end}", "elu"))
    found = by_name(report)
    assert found["elu"].status == FAILED
    assert "ended here" in found["elu"].message
    assert found["softmax"].status == PASSED
    assert "the last word" in report.output


def test_a_file_that_cannot_be_loaded_passes_nothing() -> None:
    text = reference(NUMBER).replace("\n@op\ndef relu", "\n1 / 0\n\n@op\ndef relu", 1)
    report = without_checkpoint(text)
    assert report.passed == 0
    assert report.rest.status == FAILED
    assert {(e.message, e.code) for e in report.exercises} == {("ZeroDivisionError: division by zero", "1 / 0")}


def test_a_file_that_is_not_python_is_told_the_line() -> None:
    report = without_checkpoint("x = 1\ndef relu(:\n")
    assert {e.status for e in report.exercises} == {FAILED}
    assert "line 2" in report.exercises[0].message
    for text in ("(" * 100_000, "-" * 500_000 + "1", "x\0", "x = 1\n" * 200_000):
        assert without_checkpoint(text).passed == 0


def test_memory_is_limited() -> None:
    body = "hog = bytearray(3 << 30)\nreturn xp.maximum(x, 0)"
    found = by_name(without_checkpoint(with_body(body), memory=2 << 30))
    if sys.platform == "linux":
        assert (found["relu"].status, found["relu"].message[:11]) == (FAILED, "MemoryError")
    assert found["softmax"].status == PASSED


# -- the checkpoint ----------------------------------------------------------------------------------------------------

GOOD = "def test_a() -> None:\n    from tinytorch.m03_activations import MINE\n    assert MINE\n\n\n"


@pytest.mark.parametrize(
    ("checkpoint", "status", "said"),
    [
        (GOOD, PASSED, ""),
        (GOOD + "def test_b() -> None:\n    value = 3\n    assert value == 4\n", FAILED, "assert 3 == 4"),
        (GOOD + "def test_b() -> None:\n    import os\n    os._exit(0)\n", FAILED, "the program ended here"),
        (GOOD + "if False:\n    pass\ndef test_b(missing) -> None: ...\n", FAILED, "missing"),
        (GOOD + "def test_b() -> None: ...\ndel test_b\n", FAILED, "it was not run"),
        ("import pytest\n\n\n@pytest.mark.skip\n" + GOOD, FAILED, "it was not run"),
        ("import nowhere\n" + GOOD, FAILED, "nowhere"),
        (None, "absent", "only a checkout"),
    ],
)
def test_a_checkpoint_passes_only_as_a_whole(
    tmp_path: Path, monkeypatch, checkpoint: str | None, status: str, said: str
) -> None:
    folder = tmp_path / "tests" / "checkpoints"
    folder.mkdir(parents=True)
    if checkpoint is not None:
        (folder / "test_03_activations.py").write_text(checkpoint)
    monkeypatch.setattr(checking, "CHAPTERS", tmp_path / "tinytorch")
    (tmp_path / "copy").mkdir()
    prepared = checking.prepare(tmp_path / "copy", NUMBER, reference(NUMBER) + "\nMINE = True\n", {}, Limits())
    result = checking.Job(NUMBER, prepared, Limits(), checking.ignore, bool).run_checkpoint()
    assert (result.status, said in result.message) == (status, True), result


# -- the text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("def f():\n    return 1", True),
        ("def f():\n    '''Text.'''\n    raise NotImplementedError('exercise f')", False),
        ("def f():\n    raise NotImplementedError", False),
        ("def f():\n    '''Text.'''", False),
        ("def f():\n    pass", False),
        ("def f():\n    ...", False),
        ("def f():\n    x = 1\n    raise NotImplementedError", True),
        ("def f():\n    return 1\ndef f():\n    raise NotImplementedError", False),
        ("def f():\n    raise NotImplementedError\ndef f():\n    return 1", True),
        ("class A:\n    def f(self):\n        return 1", False),
        ("from elsewhere import f", False),
        ("async def f():\n    return 1", True),
    ],
)
def test_what_is_written_is_seen_in_the_text(text: str, written: bool) -> None:
    assert checking.written_in(text, ["f"]) == ({"f"} if written else set())


def test_a_method_is_looked_for_in_its_class() -> None:
    text = (
        "class A:\n    def f(self):\n        return 1\nclass B:\n    def f(self):\n        raise NotImplementedError\n"
    )
    assert checking.written_in(text, ["A.f", "B.f", "C.f", "f"]) == {"A.f"}


# -- assertions that explain themselves --------------------------------------------------------------------------------


def run(text: str, **names) -> None:
    exec(runner.compile_asserts(ast.parse(text), "<test>"), {"_failed_": runner.failed} | names)


def message(text: str, **names) -> str:
    with pytest.raises(AssertionError) as caught:
        run(text, **names)
    return str(caught.value)


def test_assertions_show_what_they_compared() -> None:
    assert message("assert a + 1 == b", a=1, b=3) == "assert a + 1 == b\nwith 2, 3"
    assert message("assert 0 < a < 5, 'too large'", a=7) == "assert 0 < a < 5\nwith 0, 7, 5\ntoo large"
    assert message("assert a and b == 2", a=True, b=3) == "assert b == 2\nwith 3, 2"
    assert message("assert not a", a=[1]) == "assert not a"
    assert len(message("assert a == 1", a="x" * 10_000)) < 1000

    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError

    assert "an Odd that cannot be shown (RuntimeError)".replace("an Odd", "a Odd") in message("assert a is 1", a=Odd())
    run("assert 1 == 1\nassert 1 < 2 < 3, missing\nassert (True and 2 != 3) or missing")


def test_an_assertion_evaluates_each_side_once_and_keeps_nothing_alive() -> None:
    calls: list[int] = []
    run("assert calls.append(1) is None", calls=calls)
    assert calls == [1]

    class Thing:
        pass

    def make() -> Thing:
        nonlocal reference
        thing = Thing()
        reference = weakref.ref(thing)
        return thing

    reference: weakref.ref = lambda: None
    names = {"make": make, "alive": lambda: reference() is not None}
    run("def test():\n    assert make() is not None\n    assert alive() is False\ntest()", **names)
    gc.collect()


def test_what_only_tests_use_comes_with_them() -> None:
    text = "def a(): b()\ndef b(): pass\ndef c(): d()\ndef d(): pass\ndef e(): pass\ndef test_x(): c(), a(), e()\n"
    found = runner.test_functions(ast.parse(text), {"e"})
    assert [node.name for node in found] == ["a", "b", "c", "d", "test_x"]
    text = text.replace("def e(): pass", "e = a\n")
    assert [node.name for node in runner.test_functions(ast.parse(text), set())] == ["c", "d", "test_x"]


# -- a workspace, and the command --------------------------------------------------------------------------------------


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch) -> Workspace:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    made = Workspace.create(tmp_path / "Übung eins ∇")
    monkeypatch.setenv("TINYTORCH_WORKSPACE", str(made.root))
    return made


def run_command(*arguments: str):
    app = typer.Typer()
    app.command()(checking.check_command)
    return CliRunner().invoke(app, list(arguments))


def test_a_check_is_recorded_and_touches_nothing_else(workspace: Workspace) -> None:
    path = workspace.start(NUMBER)
    path.write_bytes(with_body("open('left', 'w').close()\nreturn x").encode())
    before = path.read_bytes()
    report = check(workspace.root, NUMBER)
    assert path.read_bytes() == before
    assert sorted(each.name for each in workspace.root.iterdir()) == [".tinytorch", path.name]
    noted = workspace.progress()[str(NUMBER)]
    assert noted["results"] == {e.name: e.status for e in report.exercises}
    assert noted["results"]["relu"] == FAILED
    assert noted["digest"] == digest(before.decode())
    assert "checkpoint" not in noted


def test_the_command_prints_a_line_for_each_exercise(workspace: Workspace) -> None:
    path = workspace.start(NUMBER, notebook=True)
    done = run_command("03")
    assert done.exit_code == 1, done.output
    assert done.output.count("tinytorch learn hint 03 ") == len(NAMES)
    assert f"0 of {len(NAMES)} exercises are passed" in done.output
    path.unlink()
    workspace.start(NUMBER).write_bytes(with_body("print('seen')\nreturn x * 1.0").encode())
    done = run_command("activations", "--output")
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[1] for line in lines[: len(NAMES)]] == NAMES
    assert "  hint: tinytorch learn hint 03 relu" in lines
    assert "relu, leaky_relu: test_straight_pieces" in lines  # they share the test
    assert "seen" in lines
    found = json.loads(run_command("3", "--json").stdout)
    assert (found["passed"], found["total"], found["complete"]) == (found["passed"], len(NAMES), False)
    assert found["exercises"][NAMES.index("relu")]["test"] == RELU_TEST


def test_the_command_says_what_is_missing(workspace: Workspace, monkeypatch, tmp_path: Path) -> None:
    assert "begin with: tinytorch learn start 03" in run_command("03").output
    assert "no module 'nonsense'" in run_command("nonsense").output
    monkeypatch.delenv("TINYTORCH_WORKSPACE")
    monkeypatch.chdir(tmp_path)
    done = run_command("03")
    assert (done.exit_code, "is no workspace" in done.output) == (2, True)


def test_only_a_whole_module_is_a_success(workspace: Workspace, monkeypatch) -> None:
    good = [Result(name, PASSED) for name in NAMES]
    for rest, checkpoint, status in (
        (PASSED, PASSED, 0),
        (PASSED, "absent", 0),
        (FAILED, PASSED, 1),
        (PASSED, FAILED, 1),
    ):
        report = Report(NUMBER, good, Result("rest", rest), Result("checkpoint", checkpoint))
        monkeypatch.setattr(checking, "check", lambda *_, report=report, **__: report)
        assert run_command("03").exit_code == status
