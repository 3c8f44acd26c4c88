"""A learner's folder: what is made there, what is never overwritten, what is noted, and what an update does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.learn.small_course import NEWER_TENSOR, TENSOR, install
from tinytorch import __version__
from tinytorch.learn import notebooks
from tinytorch.learn.workspace import Workspace, digest

BODY = '    raise NotImplementedError("exercise double: tinytorch learn hint 02 double")'
OWN_BODY = "    # mine: é\n    y = x\n    return y + x"


@pytest.fixture(autouse=True)
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYTORCH_WORKSPACE", raising=False)
    install(tmp_path / "course", monkeypatch.setattr)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    root = tmp_path / "my wörk ≤ space"
    root.mkdir()
    return Workspace.create(root)


def newer(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tensor: str = NEWER_TENSOR) -> None:
    """From now on the course is another version."""
    install(workspace.root.parent / "course", monkeypatch.setattr, tensor)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# -- where it is -------------------------------------------------------------------------------------------------------


def test_the_nearest_workspace_above_is_found(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = workspace.root / "a" / "b"
    below.mkdir(parents=True)
    assert Workspace.find(tmp_path) is None
    assert Workspace.find(below) == workspace
    inner = Workspace.create(workspace.root / "a")
    assert Workspace.find(below) == inner
    monkeypatch.chdir(below)
    assert Workspace.find() == inner
    monkeypatch.setenv("TINYTORCH_WORKSPACE", str(workspace.root))
    assert Workspace.find() == workspace


def test_a_variable_that_names_no_workspace_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYTORCH_WORKSPACE", str(tmp_path))
    with pytest.raises(ValueError, match=r"no workspace: there is no \.tinytorch/workspace\.json in it"):
        Workspace.find()


def test_a_folder_that_was_removed_is_no_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Path:
        raise FileNotFoundError("the current folder")

    monkeypatch.setattr(Path, "cwd", gone)
    assert Workspace.find() is None


def test_making_a_workspace_again_changes_nothing(workspace: Workspace) -> None:
    workspace.start(2)
    before = files(workspace.root)
    assert Workspace.create(workspace.root) == workspace
    assert files(workspace.root) == before
    assert workspace.version() == __version__
    (workspace.kept / "workspace.json").write_text('{"format": 1, "tinytorch": "0.0.1"}')
    workspace.start(3)
    assert workspace.version() == "0.0.1"  # an update is still due


def test_a_newer_layout_is_refused(workspace: Workspace) -> None:
    (workspace.kept / "workspace.json").write_text('{"format": 2, "tinytorch": "9.0"}')
    with pytest.raises(ValueError, match="is of format 2, and this TinyTorch reads 1: upgrade"):
        workspace.update()


# -- the learner's files -----------------------------------------------------------------------------------------------


def test_a_module_begins_without_its_solutions(workspace: Workspace) -> None:
    path = workspace.start(2)
    text = path.read_bytes().decode()
    assert path == workspace.root / "m02_tensor.py" == workspace.file(2)
    assert BODY in text
    assert "return x + x" not in text
    assert '"""Twice x."""' in text
    assert "assert double(2) == 4" in text
    assert workspace.text(2) == text == workspace.base(2).read_bytes().decode()
    assert workspace.numbers() == [2]
    assert sorted(os.listdir(workspace.root)) == [".tinytorch", "m02_tensor.py"]
    assert sorted(os.listdir(workspace.kept)) == ["base", "workspace.json"]


def test_a_module_begins_as_a_notebook(workspace: Workspace) -> None:
    path = workspace.start(2, notebook=True)
    assert path == workspace.root / "m02_tensor.ipynb" == workspace.file(2)
    nbformat.validate(nbformat.read(path, as_version=4))
    assert BODY in workspace.text(2)
    assert workspace.text(2).startswith('"""Module 02: a number in a box."""\n')
    compile(workspace.text(2), "m02_tensor", "exec")
    assert "never ≤ x" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_a_learners_file_is_never_overwritten(workspace: Workspace, first: bool, second: bool) -> None:
    path = workspace.start(2, first)
    path.write_bytes(b"mine")
    before = files(workspace.root)
    with pytest.raises(FileExistsError, match=r"you have .*m02_tensor\.(py|ipynb) already"):
        workspace.start(2, second)
    assert files(workspace.root) == before


def test_a_file_that_appears_meanwhile_is_not_overwritten(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = workspace.root / "m02_tensor.py"
    monkeypatch.setattr(Workspace, "file", lambda self, number: None)
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        workspace.start(2)
    assert path.read_bytes() == b"mine"
    assert sorted(os.listdir(workspace.root)) == [".tinytorch", "m02_tensor.py"]


def test_a_file_system_without_links_will_do(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise PermissionError("links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    assert workspace.start(2).read_bytes().decode() == workspace.text(2)
    monkeypatch.setattr(Workspace, "file", lambda self, number: None)
    with pytest.raises(FileExistsError, match="is there already"):
        workspace.start(2)


def test_what_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(ValueError, match="module 05 losses has no exercises"):
        Workspace(folder).start(5)
    (folder / "m02_tensor.py").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        Workspace(folder).start(2)
    assert os.listdir(folder) == ["m02_tensor.py"]


def test_two_files_of_one_module_are_an_error(workspace: Workspace) -> None:
    workspace.start(2)
    (workspace.root / "m02_tensor.ipynb").write_text(notebooks.to_notebook(TENSOR), encoding="utf-8")
    with pytest.raises(ValueError, match=r"m02_tensor\.py and m02_tensor\.ipynb are both in"):
        workspace.numbers()


def test_a_file_that_cannot_be_read_is_named(workspace: Workspace) -> None:
    with pytest.raises(FileNotFoundError, match=r"you have no m02_tensor in .*; begin with: tinytorch learn start 02"):
        workspace.text(2)
    path = workspace.start(2)
    path.write_bytes(b"x = '\xff'")
    with pytest.raises(ValueError, match=r"m02_tensor\.py: 'utf-8' codec"):
        workspace.text(2)
    path.rename(path.with_suffix(".ipynb"))
    (workspace.root / "m02_tensor.ipynb").write_text("{")
    with pytest.raises(ValueError, match=r"m02_tensor\.ipynb: no notebook of format 4"):
        workspace.text(2)


def test_an_editors_line_ends_and_mark_are_read(workspace: Workspace) -> None:
    path = workspace.start(2)
    path.write_bytes(b"\xef\xbb\xbfx = 1\r\ny = 2\r\n")
    assert workspace.text(2) == "x = 1\r\ny = 2\r\n"


# -- progress ----------------------------------------------------------------------------------------------------------


def test_progress_is_what_was_recorded_last(workspace: Workspace) -> None:
    path = workspace.start(2)
    assert workspace.progress() == {}
    workspace.record(2, {"double": "passed", "Box.get": "failed"}, checkpoint="failed")
    workspace.record_hint(2, "double", 2)
    workspace.record_hint(2, "double", 1)
    workspace.record_solution(2, "double")
    workspace.record_solution(2, "Box.get")
    workspace.record_solution(2, "double")
    workspace.record_hint(3, "relu", 1)
    path.write_text("changed", encoding="utf-8")
    workspace.record(2, {"double": "failed"}, text="what was checked")
    assert Workspace(workspace.root).progress() == {
        "2": {
            "digest": digest("what was checked"),
            "results": {"double": "failed"},
            "hints": {"double": 2},
            "solutions": ["Box.get", "double"],
        },
        "3": {"hints": {"relu": 1}},
    }
    workspace.record(2, {})
    assert workspace.progress()["2"]["digest"] == digest("changed")


def test_only_exercises_are_noted(workspace: Workspace) -> None:
    for note in (lambda: workspace.record_hint(2, "triple", 1), lambda: workspace.record_solution(2, "triple")):
        with pytest.raises(ValueError, match=r"module 02 has no exercise 'triple'; it has double, Box\.get"):
            note()
    assert workspace.progress() == {}


def test_damaged_progress_is_named_and_kept(workspace: Workspace) -> None:
    path = workspace.kept / "progress.json"
    path.write_text('{"modules": ')
    with pytest.raises(ValueError, match=r"progress\.json cannot be read .*; move it elsewhere to begin"):
        workspace.record_hint(2, "double", 1)
    assert path.read_text() == '{"modules": '


def test_processes_that_record_at_once_lose_nothing(workspace: Workspace, root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.learn.small_course import install;"
        "from tinytorch.learn.workspace import Workspace; install(Path(sys.argv[1]), setattr);"
        "w = Workspace(Path(sys.argv[2]));"
        "[w.record(number, {'x': 'passed'}, text='') for number in map(int, sys.argv[3:])]"
    )
    shares = [range(1, 21, 3), range(2, 21, 3), range(3, 21, 3)]
    arguments = [sys.executable, "-c", code, str(tmp_path / "course"), str(workspace.root)]
    running = [subprocess.Popen([*arguments, *map(str, share)], cwd=root) for share in shares]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert sorted(map(int, workspace.progress())) == list(range(1, 21))


# -- updates -----------------------------------------------------------------------------------------------------------


def test_nothing_new_changes_nothing(workspace: Workspace) -> None:
    path = workspace.start(2)
    path.write_text("anything", encoding="utf-8")
    workspace.start(3, notebook=True)
    before = files(workspace.root)
    assert [(done.number, done.outcome) for done in workspace.update()] == [(2, "current"), (3, "current")]
    assert files(workspace.root) == before | {os.path.join(".tinytorch", "lock"): b""}


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_what_is_new_comes_in_and_what_is_the_learners_stays(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, ends: str, mark: bytes
) -> None:
    path = workspace.start(2)
    own = (
        workspace.text(2).replace(BODY, OWN_BODY).replace("import annotations\n", "import annotations\n\nimport math\n")
    )
    path.write_bytes(before := mark + own.replace("\n", ends).encode())
    newer(workspace, monkeypatch)
    (done,) = workspace.update()
    assert (done.outcome, done.conflicts) == ("updated", ())
    fresh = workspace.base(2).read_text(encoding="utf-8")
    assert "better said" in fresh
    wanted = fresh.replace(BODY, OWN_BODY).replace("import annotations\n", "import annotations\n\nimport math\n")
    assert path.read_bytes() == mark + wanted.replace("\n", ends).encode()
    assert done.backup is not None
    assert done.backup.read_bytes() == before
    assert done.backup.parent == workspace.kept / "backup"
    assert [again.outcome for again in workspace.update()] == ["current"]


def test_a_file_that_nobody_wrote_in_becomes_the_new_one(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workspace.start(2)
    newer(workspace, monkeypatch)
    assert [done.outcome for done in workspace.update()] == ["updated"]
    assert path.read_bytes() == workspace.base(2).read_bytes()
    assert b"Twice x, a number." in path.read_bytes()


def test_where_both_changed_the_learners_stays_and_the_other_is_told(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = workspace.start(2)
    path.write_text(workspace.text(2).replace("That was all.", "My own summary."), encoding="utf-8")
    newer(workspace, monkeypatch)
    (done,) = workspace.update()
    text = path.read_text(encoding="utf-8")
    assert done.outcome == "merged"
    assert "Twice x, a number." in text
    assert "My own summary." in text
    (conflict,) = done.conflicts
    assert conflict.diff() == ["-# That was all.", "+# That was all, and it is better said."]
    assert text.splitlines()[conflict.line - 1] == "# My own summary."


def test_an_update_of_a_notebook_keeps_outputs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workspace.start(2, notebook=True)
    notebook = nbformat.read(path, as_version=4)
    for number, cell in enumerate(notebook.cells):
        cell.source = cell.source.replace(BODY, OWN_BODY)
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("stream", text=f"ran {number}")]
    nbformat.write(notebook, path)
    newer(workspace, monkeypatch)
    (done,) = workspace.update()
    assert (done.outcome, done.conflicts) == ("updated", ())
    after = nbformat.read(path, as_version=4)
    nbformat.validate(after)
    assert OWN_BODY in workspace.text(2)
    for new in ("Twice x, a number.", "better said", "Box(None).get(4)"):
        assert new in workspace.text(2)
    kept = [cell for cell in after.cells if cell.get("outputs")]
    assert [cell.outputs[0].text for cell in kept] == ["ran 0", f"ran {len(notebook.cells) - 1}"]
    assert [again.outcome for again in workspace.update()] == ["current"]


def test_a_cell_that_is_no_longer_there_leaves_a_notebook(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.start(2, notebook=True)
    start, end = TENSOR.index("# %% [markdown]\n# ### Boxes"), TENSOR.index("# %%\nclass Box")
    newer(workspace, monkeypatch, TENSOR[:start] + TENSOR[end:])
    (done,) = workspace.update()
    assert (done.outcome, done.conflicts) == ("updated", ())
    assert "### Boxes" not in workspace.text(2)


def test_what_a_killed_process_left_goes_later(workspace: Workspace) -> None:
    new, old = (workspace.root / f".m02_tensor.py.{number}.tmp" for number in (1, 2))
    for path in (new, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    workspace.start(2)
    assert sorted(os.listdir(workspace.root)) == [".m02_tensor.py.1.tmp", ".tinytorch", "m02_tensor.py"]


def test_a_new_exercise_does_not_take_away_a_learners_body(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = workspace.start(2)
    own = workspace.text(2).replace("        self.thing = thing", "        self.thing = thing  # mine")
    path.write_text(own, encoding="utf-8")
    monkeypatch.setattr("tests.learn.small_course.NAMES", {2: "double Box.__init__ Box.get"})
    newer(workspace, monkeypatch, TENSOR)
    (done,) = workspace.update()
    assert done.outcome == "merged"
    assert path.read_text(encoding="utf-8") == own
    assert "Box.__init__" in done.conflicts[0].diff()[1]


def test_what_would_no_longer_be_python_is_not_written(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workspace.start(2)
    own = workspace.text(2).replace("def test_double():\n", "def test_double(\n    y=1,\n):\n")
    path.write_text(own, encoding="utf-8")
    newer(workspace, monkeypatch, TENSOR.replace("    assert double(2) == 4\n", "    assert double(2) == (\n"))
    monkeypatch.setattr("tinytorch.learn.workspace.blanked", lambda source, number, names: source)
    (done,) = workspace.update()
    assert (done.outcome, done.reason) == ("kept", "what is new does not fit what you wrote")
    assert path.read_text(encoding="utf-8") == own


def test_a_file_that_is_saved_meanwhile_is_kept(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workspace.start(2)
    newer(workspace, monkeypatch)
    back_up = Workspace._back_up

    def save(self: Workspace, name: Path, content: bytes) -> Path:
        path.write_bytes(b"saved just now")
        return back_up(self, name, content)

    monkeypatch.setattr(Workspace, "_back_up", save)
    (done,) = workspace.update()
    assert done.outcome == "kept"
    assert path.read_bytes() == b"saved just now"
    monkeypatch.setattr(Workspace, "_back_up", back_up)
    assert [again.outcome for again in workspace.update()] == ["merged"]
    assert path.read_bytes() == b"saved just now"


def test_what_cannot_be_merged_is_kept(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.start(2)
    (workspace.root / "m05_losses.py").write_bytes(b"my own")
    workspace.start(3, notebook=True).write_bytes(b"half a note")
    workspace.base(2).unlink()
    newer(workspace, monkeypatch)
    before = files(workspace.root)
    reasons = {done.number: done.reason for done in workspace.update() if done.outcome == "kept"}
    assert list(reasons) == [2, 3, 5]
    assert "is gone, without which nothing can be merged" in reasons[2]
    assert "no notebook of format 4" in reasons[3]
    assert files(workspace.root).items() >= before.items()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_an_update_keeps_who_may_read_a_file(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workspace.start(2)
    path.chmod(0o600)
    newer(workspace, monkeypatch)
    workspace.update()
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_update_notes_the_version(workspace: Workspace) -> None:
    (workspace.kept / "workspace.json").write_text('{"format": 1, "tinytorch": "0.0.1"}')
    assert workspace.version() == "0.0.1"
    workspace.update()
    assert json.loads((workspace.kept / "workspace.json").read_text()) == {"format": 1, "tinytorch": __version__}


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the program forks")
def test_a_process_that_is_killed_leaves_every_file_whole(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.learn.killed", str(tmp_path), "10"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["job"] for row in rows] == [
        "start", "start --notebook", "update", "update of a notebook", "record", "hint"
    ]  # fmt: skip
    assert all(row["steps"] >= 6 for row in rows)
    assert sum(row["killed"] for row in rows) > 0
