"""Kills a process that works on a workspace at each of its steps, and at random moments, and looks at what is left.

`python -m tests.learn.killed FOLDER [ROUNDS]` prints what it has done, or fails: for each job the number of its steps,
and how many of ROUNDS processes were killed before they were done. It forks, so it does not run on Windows.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.learn.small_course import NEWER_TENSOR, TENSOR, install
from tinytorch.learn.notebooks import updated
from tinytorch.learn.workspace import Workspace

STEPS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.chmod"}

Contents = dict[str, bytes]


def learner_writes(text: str) -> str:
    return text.replace('raise NotImplementedError("exercise double: tinytorch learn hint 02 double")', "return 2 * x")


def nothing(workspace: Workspace) -> None:
    """An empty folder."""


def begun(workspace: Workspace, notebook: bool = False) -> None:
    """A workspace whose learner has written one exercise, and a course that has changed since."""
    path = workspace.start(2, notebook)
    workspace.start(3)
    before = path.read_text(encoding="utf-8")
    own = learner_writes(workspace.text(2))
    path.write_text(updated(before, own) if notebook else own, encoding="utf-8")
    workspace.record(2, {"double": "passed", "Box.get": "not written"})
    install(workspace.root.parent / "course", setattr, NEWER_TENSOR)


def begun_in_notebook(workspace: Workspace) -> None:
    begun(workspace, notebook=True)


JOBS: dict[str, tuple[Callable[[Workspace], None], Callable[[Workspace], object]]] = {
    "start": (nothing, lambda workspace: workspace.start(2)),
    "start --notebook": (nothing, lambda workspace: workspace.start(2, notebook=True)),
    "update": (begun, lambda workspace: workspace.update()),
    "update of a notebook": (begun_in_notebook, lambda workspace: workspace.update()),
    "record": (begun, lambda workspace: workspace.record(2, {"double": "failed", "Box.get": "passed"})),
    "hint": (begun, lambda workspace: workspace.record_hint(3, "relu", 2)),
}


def contents(root: Path) -> Contents:
    """What TinyTorch must never leave half written: every file but the temporary ones."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.endswith(".tmp")]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def die_at(step: int, root: Path) -> None:
    """End this process, as if killed, before its step-th change in a folder; half of a file is written by then."""
    seen = 0

    def count(then: Callable[[], object] = lambda: None) -> None:
        nonlocal seen
        seen += 1
        if seen == step:
            then()
            os._exit(9)

    def audit(event: str, arguments: tuple) -> None:
        if event in STEPS and str(arguments[0]).startswith(str(root)):
            count()

    def fsync(file: int, really: Callable[[int], None] = os.fsync) -> None:
        count(lambda: os.ftruncate(file, os.fstat(file).st_size // 2))
        really(file)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(audit)


def fork(work: Callable[[], object], step: int = 0, root: Path = Path()) -> int:
    """Do it in a child, which may die at a step; returns its process id. It ends with status 0 when it is done."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if step:
                die_at(step, root)
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def check(before: Contents, after: Contents, left: Contents, where: str) -> None:
    """Each file is as it was or as it was to be, and nothing that was there is gone; backups hold what was there."""
    for name, content in left.items():
        if "backup" in name:
            assert content in before.values(), f"{where}: {name} is no copy of a file"
        elif name != os.path.join(".tinytorch", "lock"):
            wanted = [side[name] for side in (before, after) if name in side]
            assert content in wanted, f"{where}: {name} holds {content!r}"
    missing = before.keys() - left.keys()
    assert not missing, f"{where}: {missing} is gone"
    for name, content in before.items():
        written = not name.startswith(".tinytorch")
        assert not written or content in left.values(), f"{where}: what the learner wrote in {name} is nowhere"


def main(folder: Path, rounds: int = 150) -> int:
    random.seed(0)
    for label, (prepare, job) in JOBS.items():
        template, root = folder / "template", folder / "a workspace é"
        for old in (template, root):
            shutil.rmtree(old, ignore_errors=True)
        template.mkdir()
        install(folder / "course", setattr, TENSOR)
        prepare(Workspace(template))
        workspace = Workspace(root)

        def fresh(template: Path = template, root: Path = root) -> None:
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(template, root)

        fresh()
        before, start = contents(root), time.perf_counter()
        os.waitpid(fork(lambda: job(workspace)), 0)  # noqa: B023
        seconds, after = time.perf_counter() - start, contents(root)
        assert before != after, f"{label} changed nothing"

        steps, status = 0, 9
        while status == 9:
            steps += 1
            fresh()
            child = fork(lambda: job(workspace), steps, root)  # noqa: B023
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, 9), f"{label}: step {steps} ended with {status}"
            check(before, after, contents(root), f"{label}, killed at step {steps}")
            finish(job, workspace)
            for name, content in contents(root).items():
                done = "backup" in name or after[name] == content
                assert done, f"{label}, killed at step {steps} and done again: {name} holds {content!r}"
        killed = 0
        for number in range(rounds):
            fresh()
            child = fork(lambda: job(workspace))  # noqa: B023
            time.sleep(random.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            check(before, after, contents(root), f"{label}, killed at random ({number})")
        print(json.dumps({"job": label, "steps": steps - 1, "killed": killed, "of": rounds}))
    return 0


def finish(job: Callable[[Workspace], object], workspace: Workspace) -> None:
    """What a learner does after a crash: the same again."""
    with suppress(FileExistsError):  # it was there already
        job(workspace)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
