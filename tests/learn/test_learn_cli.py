"""The commands `tinytorch learn …`: what they print, what they note, and how they end when something is wrong."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.learn.small_course import NEWER_TENSOR, install
from tinytorch import cli
from tinytorch.curriculum import FACES, MODULES, Module, face_names
from tinytorch.learn import cli as learn
from tinytorch.learn import exercises
from tinytorch.learn.workspace import Workspace
from tinytorch.milestones import MILESTONES, Milestone

COMMANDS = ["start", "status", "which", "hint", "diff", "solution", "update"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one, in a course of two short chapters."""
    monkeypatch.delenv("TINYTORCH_WORKSPACE", raising=False)
    install(tmp_path / "course", monkeypatch.setattr)
    path = tmp_path / "my wörk"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def call(*arguments: str) -> int:
    """The exit status of `tinytorch learn` with these arguments, run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["learn", *arguments])
    return int(ended.value.code or 0)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert call(*arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def write(folder: Path, name: str, body: str) -> None:
    """Put a body in the place of what stands for an exercise's solution."""
    path = folder / "m02_tensor.py"
    text = path.read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if f"exercise {name}:" in line]
    path.write_text(text.replace(line, body), encoding="utf-8")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, *command.split(), "--help")
    assert f"tinytorch learn {command}".strip() in text.split("Example")[1]
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["begin", "02"], "begin"),
        (["start", "99"], "no module '99'; the modules are 01 setup"),
        (["start", "05"], "module 05 losses has no exercises"),
        (["start"], "MODULE"),
        (["status"], "neither this folder nor one above is a workspace; begin with: tinytorch learn start 02"),
        (["which"], "begin with: tinytorch learn start 02"),
        (["update"], "begin with: tinytorch learn start 02"),
        (["diff", "02"], "begin with: tinytorch learn start 02"),
        (["hint", "02", "double"], "begin with: tinytorch learn start 02"),
        (["hint", "02", "double", "--level", "4"], "--level"),
        (["solution", "02", "double"], "begin with: tinytorch learn start 02"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_ends_with_one_line(
    arguments: list[str], wanted: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tinytorch: ")
    assert wanted in captured.err
    assert captured.err.count("\n") == 1
    assert os.listdir(folder) == []


# -- beginning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["2", "02", "tensor", "m02_tensor"])
def test_start_says_what_to_do_next(label: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "start", label)
    assert " ".join(text.split()).startswith(f"This folder is your workspace now: {folder}")
    assert "Module 02 is m02_tensor.py: 2 exercises, the first is double." in text
    assert max(map(len, text.replace(str(folder), "").splitlines())) <= 80
    assert "\n  tinytorch learn check 02\n  tinytorch learn hint 02 double\n" in text
    assert (folder / "m02_tensor.py").is_file()


def test_a_second_module_goes_into_the_same_workspace(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed(capsys, "start", "02")
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    assert "workspace" not in printed(capsys, "start", "03", "--notebook")
    assert (folder / "m03_activations.ipynb").is_file()
    assert os.listdir(folder / "below") == []


def test_start_refuses_a_module_that_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "start", "02")
    (folder / "m02_tensor.py").write_bytes(b"mine")
    assert call("start", "02", "--notebook") == 2
    assert str(folder / "m02_tensor.py") in capsys.readouterr().err
    assert (folder / "m02_tensor.py").read_bytes() == b"mine"


# -- hints and solutions -----------------------------------------------------------------------------------------------


def test_hints_go_one_step_further_each_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "start", "02")
    first, second, third, again = (printed(capsys, "hint", "02", "Box.get") for _ in range(4))
    assert first == ("Box.get, hint 1 of 3\n\n### Boxes\n\nA box holds a thing.\n\nWhat is in it, or the default.\n")
    assert second == "Box.get, hint 2 of 3\n\nIt reads: self.thing\nIts tests: test_box\n"
    assert third == (
        "Box.get, hint 3 of 3\n\n"
        "def get(self, default=None):\n"
        '    """What is in it, or the default."""\n'
        "    for … in …:\n"
        "        if …:\n"
        "            return …\n"
        "    return …\n"
    )
    assert again == third
    assert printed(capsys, "hint", "02", "Box.get", "--level", "1") == first
    printed(capsys, "hint", "03", "relu", "--level", "2")
    assert {key: known["hints"] for key, known in Workspace(folder).progress().items()} == {
        "2": {"Box.get": 3},
        "3": {"relu": 2},
    }


SOLUTION = '''
@op(dtypes="float")
def solve(xp, x: Array, *rest, rate=0.5) -> Array:
    """Solve it."""
    def inner(g, *, scale=2):
        return scale * g
    y, total = xp.sum(x, axis=-1), x.shape[0]
    y[..., 0] /= Tensor.count(y)
    size: int = xp.sqrt(x).mean().item()
    with seeded(EPSILON) as state, open(path):
        while not done(state):
            try:
                total = [inner(v) for v in rest if v] or rate
            except (ValueError, KeyError) as error:
                raise TypeError(f"no {error}") from error
            finally:
                del y[0]
    if total:
        pass
    elif size > LIMITS[0].most:
        assert total, "no total"
    else:
        solve(y)
    match size:
        case 1:
            return lambda z: z * size
    class Held(Base[int]):
        pass
    count = Tensor.count
    return
'''


def exercise(source: str) -> exercises.Exercise:
    return exercises.Exercise(2, "solve", source.strip("\n"), "", ("test_solve",))


def test_the_second_hint_names_what_a_solution_uses() -> None:
    assert learn.ingredients(exercise(SOLUTION)) == (
        "It calls: xp.sum, Tensor.count, ….item, ….mean, xp.sqrt, seeded, open, done,\n"
        "  inner, TypeError, solve\n"
        "It reads: x.shape, EPSILON, path, ValueError, KeyError, ….most, LIMITS, Base,\n"
        "  int\n"
        "Its tests: test_solve"
    )


def test_the_third_hint_is_the_solutions_frame() -> None:
    assert (
        learn.skeleton(exercise(SOLUTION))
        == '''\
@op(dtypes="float")
def solve(xp, x: Array, *rest, rate=0.5) -> Array:
    """Solve it."""
    def inner(g, *, scale=2):
        return …
    y, total = …
    y[..., 0] /= …
    size: int = …
    with … as state, …:
        while …:
            try:
                total = …
            except … as error:
                raise … from …
            finally:
                del y[0]
    if …:
        pass
    elif …:
        assert …, …
    else:
        …
    match …:
        case 1:
            return …
    class Held(Base[int]):
        pass
    count = …
    return'''
    )


def test_a_solution_on_its_signatures_line_has_a_frame() -> None:
    assert learn.skeleton(exercise("def relu(x): return max(x, 0)")) == "def relu(x):\n    return …"


@pytest.mark.parametrize("module", [each for each in MODULES if each.exercises], ids=lambda module: module.file)
def test_there_are_three_hints_for_every_exercise_of_the_course(module: Module) -> None:
    for each in exercises.exercises(module.number):
        assert learn.about(each).strip()
        assert each.tests, f"{each.name} has no tests"
        assert learn.ingredients(each)
        frame = learn.skeleton(each)
        assert "…" in frame
        ast.parse(frame.replace("…", "dots"))


def test_a_solution_that_was_looked_at_is_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "start", "02")
    assert printed(capsys, "solution", "02", "double") == 'def double(x):\n    """Twice x."""\n    return x + x\n'
    assert Workspace(folder).progress() == {"2": {"solutions": ["double"]}}
    assert call("solution", "02", "triple") == 2
    assert "module 02 has no exercise 'triple'; it has double, Box.get" in capsys.readouterr().err


def test_diff_shows_the_exercises_that_differ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "start", "02")
    assert printed(capsys, "diff", "02") == "not written yet: double, Box.get\n"
    assert Workspace(folder).progress() == {}
    write(folder, "double", "    return 2 * x")
    text = printed(capsys, "diff", "02")
    assert text == (
        "--- yours: double\n+++ reference: double\n@@ -1,3 +1,3 @@\n def double(x):\n"
        '     """Twice x."""\n-    return 2 * x\n+    return x + x\nnot written yet: Box.get\n'
    )
    assert Workspace(folder).progress()["2"]["solutions"] == ["double"]
    path = folder / "m02_tensor.py"
    path.write_text(path.read_text(encoding="utf-8").replace("2 * x", "x + x"), encoding="utf-8")
    assert printed(capsys, "diff", "02") == "as the reference has it: 1 exercise\nnot written yet: Box.get\n"


def test_diff_knows_decorators_and_what_is_gone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "start", "02")
    write(folder, "double", "    return x + x")
    write(folder, "Box.get", "        return self.thing")
    path = folder / "m02_tensor.py"
    text = (
        path.read_text(encoding="utf-8")
        .replace("def double(", "def twice(")
        .replace("    def get", "    @mine\n    def get")
    )
    path.write_text(text, encoding="utf-8")
    text = printed(capsys, "diff", "02")
    assert "+def double(x):\n" in text
    assert "-    @mine\n" in text


@pytest.mark.parametrize("notebook", [[], ["--notebook"]])
def test_diff_of_everything(notebook: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "start", "02", *notebook)
    lines = printed(capsys, "diff", "02", "--all").splitlines()
    changed = [line for line in lines[2:] if line[0] in "+-"]
    body = ["for thing in [self.thing]:", "    if thing is not None:", "        return thing", "return default"]
    wanted = ["+    return x + x", *(f"+        {line}" for line in body)]
    assert [line for line in changed if line[0] == "+"] == wanted
    assert sum(line[0] == "-" for line in changed) == 2
    assert Workspace(folder).progress()["2"]["solutions"] == ["Box.get", "double"]


def test_diff_says_where_the_text_is_no_python(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "start", "02")
    write(folder, "double", "    return 2 *")
    assert call("diff", "02") == 2
    assert "m02_tensor.py, line 15: invalid syntax" in " ".join(capsys.readouterr().err.split())


# -- the road ----------------------------------------------------------------------------------------------------------


def test_status_shows_the_road(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "start", "02")
    printed(capsys, "start", "03")
    text = printed(capsys, "status")
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    rows = {line.split()[1]: line.split() for line in text.splitlines() if line[:2].isdecimal()}
    assert len(rows) == len(MODULES)
    assert rows["tensor"] == ["02", "tensor", "0", "0", "2", "0", "-"]
    assert rows["losses"] == ["05", "losses", "reference"]
    assert "milestone perceptron  needs 02\nmilestone xor         needs 02, 03\n" in text

    write(folder, "double", "    return 2 * x")
    workspace = Workspace(folder)
    assert [line.split()[2:] for line in printed(capsys, "status").splitlines() if line.startswith("02")] == [
        ["0", "0", "1", "1", "-"]
    ]
    workspace.record(2, {"double": "passed", "Box.get": "not written"}, checkpoint="failed")
    assert [line.split()[2:] for line in printed(capsys, "status").splitlines() if line.startswith("02")] == [
        ["1", "0", "1", "0", "failed"]
    ]
    write(folder, "Box.get", "        return self.thing")
    text = printed(capsys, "status")
    assert [line.split()[2:] for line in text.splitlines() if line.startswith("02")] == [
        ["1", "0", "0", "1", "failed", "*"]
    ]
    assert "* changed since it was checked: tinytorch learn check MODULE" in text
    workspace.record(2, {"double": "passed", "Box.get": "passed"}, checkpoint="passed")
    text = printed(capsys, "status")
    assert "milestone perceptron  ready\nmilestone xor         needs 03\n" in text
    assert "*" not in text


def test_status_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "start", "02")
    Workspace(folder).record(2, {"double": "failed", "Box.get": "passed"})
    printed(capsys, "hint", "02", "double")
    found = json.loads(printed(capsys, "status", "--json"))
    assert found["workspace"] == str(folder)
    assert found["modules"][0] == {"number": 1, "name": "setup", "title": "Setup", "part": "Foundations",
                                   "yours": False, "changed": False, "done": False}  # fmt: skip
    row = found["modules"][1]
    assert (row["exercises"], row["passed"], row["failed"], row["not_written"], row["unchecked"]) == (2, 1, 1, 0, 0)
    assert (row["hints"], row["solutions"], row["checkpoint"], row["done"]) == ({"double": 1}, [], None, False)
    assert found["milestones"][0] == {"name": "perceptron", "year": 1957, "ready": False, "needs": [2]}


def test_a_change_undoes_what_was_passed_until_it_is_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "start", "03")
    Workspace(folder).record(3, {"relu": "passed"})
    assert json.loads(printed(capsys, "status", "--json"))["milestones"][1]["ready"]
    (folder / "m03_activations.py").write_text("relu = max", encoding="utf-8")
    assert json.loads(printed(capsys, "status", "--json"))["milestones"][1]["needs"] == [3]


def test_status_says_when_an_update_is_due(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "start", "02")
    assert "update" not in printed(capsys, "status")
    (folder / ".tinytorch" / "workspace.json").write_text('{"format": 1, "tinytorch": "0.0.1"}')
    assert "tinytorch learn update" in printed(capsys, "status")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals in Python")
def test_status_is_coloured_on_a_terminal(folder: Path, root: Path) -> None:
    import pty

    Workspace.create(folder)
    master, slave = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(root), "TINYTORCH_WORKSPACE": str(folder), "TERM": "xterm"}
    command = [sys.executable, "-m", "tinytorch", "learn", "status"]
    subprocess.run(command, cwd=root, env=environment, stdout=slave, check=True)
    os.close(slave)
    assert b"\x1b[32mready\x1b[0m" in os.read(master, 100_000)
    os.close(master)


def test_signs_that_an_encoding_lacks_are_replaced(folder: Path, root: Path) -> None:
    Workspace.create(folder)
    environment = os.environ | {"TINYTORCH_WORKSPACE": str(folder), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "tinytorch", "learn", "which"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, check=True)
    assert b"my w?rk" in done.stdout.replace(b"\n  ", b" ")


def test_which_says_whose_code_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "start", "03", "--notebook")
    lines = printed(capsys, "which").splitlines()
    assert [line.split() for line in lines[-20:]][1:3] == [
        ["02", "tensor", "reference"],
        ["03", "activations", "yours", "m03_activations.ipynb"],
    ]
    rows = json.loads(printed(capsys, "which", "--json"))
    assert len(rows) == len(MODULES)
    assert [row["number"] for row in rows if row["yours"]] == [3]
    assert rows[2]["file"] == str(folder / "m03_activations.ipynb")
    assert rows[1]["file"] == str(folder.parent / "course" / "m02_tensor.py")


# -- updates -----------------------------------------------------------------------------------------------------------


def test_update_says_what_it_did(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed(capsys, "start", "02")
    printed(capsys, "start", "03")
    path = folder / "m02_tensor.py"
    path.write_text(path.read_text(encoding="utf-8").replace("That was all.", "The end."), encoding="utf-8")
    before = path.read_bytes()
    install(folder.parent / "course", monkeypatch.setattr, NEWER_TENSOR)
    text = printed(capsys, "update")
    assert "m02_tensor.py: what is new is in it now, but for 1 place that you changed" in text
    assert "    -# That was all.\n    +# That was all, and it is better said.\n" in text
    assert "m03_activations.py: nothing is new" in text
    (backup,) = (folder / ".tinytorch" / "backup").iterdir()
    assert backup.read_bytes() == before
    assert backup.name in text
    rows = json.loads(printed(capsys, "update", "--json"))
    assert [(row["number"], row["outcome"], row["conflicts"]) for row in rows] == [
        (2, "current", []),
        (3, "current", []),
    ]


def test_update_of_an_empty_workspace(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Workspace.create(folder)
    assert "begin with: tinytorch learn start 02" in printed(capsys, "update")
    assert json.loads(printed(capsys, "update", "--json")) == []


# -- milestones --------------------------------------------------------------------------------------------------------


def module_of(path: str, name: str) -> int:
    """The number of the module that a name in a chapter or a face comes from; 0 for one that comes from elsewhere."""
    last = path.rpartition(".")[2]
    if last[:1] == "m" and last[1:3].isdecimal():
        return int(last[1:3])
    face = path.removeprefix("tinytorch").removeprefix(".")
    known = face_names(face) if path.startswith("tinytorch") and face in FACES else {}
    return known[name].number if name in known else 0


@pytest.mark.parametrize("milestone", MILESTONES, ids=lambda milestone: milestone.name)
def test_a_milestone_needs_the_modules_that_its_program_uses(milestone: Milestone, root: Path) -> None:
    tree = ast.parse((root / "milestones" / f"{milestone.name}.py").read_text(encoding="utf-8"))
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            used |= {module_of(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            faces = {"tinytorch": "tinytorch", "nn": "tinytorch.nn", "optim": "tinytorch.optim"}
            used.add(module_of(faces.get(node.value.id, ""), node.attr))
    assert max(used) == milestone.after


def test_a_course_without_exercises_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "MODULES", tuple(replace(each, exercises="") for each in MODULES))
    assert call("start", "02") == 2
    assert os.listdir(folder) == []
