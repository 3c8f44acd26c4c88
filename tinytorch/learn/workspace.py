"""The folder that a learner writes in: the learner's files, and in `.tinytorch` what TinyTorch keeps for itself.

    m02_tensor.py, m06_autograd.ipynb      the learner's: made once, changed by nobody else but `update`
    .tinytorch/workspace.json              the mark of a workspace: the version of this layout, and of TinyTorch
    .tinytorch/base/m02_tensor.py          the text as it was handed out, which merging needs
    .tinytorch/progress.json               what was checked, and which hints and solutions were looked at
    .tinytorch/backup/                     the learner's files as they were before each update

A process may be killed at any moment: each file is written beside its place and put there by one system call.
Only Python's own library is imported here, because this is imported while `tinytorch` itself is.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from tinytorch.curriculum import MODULES
from tinytorch.learn import merging, notebooks
from tinytorch.learn.exercises import blanked, find_exercise, module_of, reference

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["Update", "Workspace", "digest"]

VARIABLE = "TINYTORCH_WORKSPACE"
KEPT = ".tinytorch"
MARKER = "workspace.json"
FORMAT = 1


@dataclass(frozen=True)
class Update:
    """What became of one module's file in an update.

    Attributes:
        outcome: "current" (nothing new), "updated" (all that is new is in it), "merged" (but for the conflicts), or
            "kept" (as it was, for the `reason`).
        backup: the file as it was before, where it was written to.
        conflicts: where what is new met the learner's own changes, which stayed.
    """

    number: int
    path: Path
    outcome: str
    reason: str = ""
    backup: Path | None = None
    conflicts: tuple[merging.Conflict, ...] = ()


@dataclass(frozen=True)
class Workspace:
    """A learner's folder. `find` looks for one, `create` makes one."""

    root: Path

    @classmethod
    def find(cls, start: Path | None = None) -> Workspace | None:
        """The workspace that TINYTORCH_WORKSPACE names, or else the nearest one at or above a folder, or None.

        Raises ValueError if the variable names a folder that is no workspace, rather than use another one's code.
        """
        if named := os.environ.get(VARIABLE):
            root = Path(named).expanduser().absolute()
            if not is_workspace(root):
                raise ValueError(f"{VARIABLE} is {named!r}, which is no workspace: there is no {KEPT}/{MARKER} in it")
            return cls(root)
        try:
            start = (start or Path.cwd()).absolute()
        except FileNotFoundError:  # the current folder was removed
            return None
        return next((cls(root) for root in (start, *start.parents) if is_workspace(root)), None)

    @classmethod
    def create(cls, root: Path) -> Workspace:
        """Make a folder a workspace; one that is stays as it is."""
        workspace = cls(root.absolute())
        if not is_workspace(workspace.root):
            workspace._write_marker()
        return workspace

    @property
    def kept(self) -> Path:
        """The folder of what TinyTorch keeps for itself."""
        return self.root / KEPT

    # -- the learner's files -------------------------------------------------------------------------------------------

    def file(self, number: int) -> Path | None:
        """The learner's file of a module, or None; ValueError if there are two, a notebook and one without."""
        name = module_of(number).file
        found = [path for path in (self.root / f"{name}.py", self.root / f"{name}.ipynb") if path.is_file()]
        if len(found) > 1:
            raise ValueError(f"{name}.py and {name}.ipynb are both in {self.root}: move one of them elsewhere")
        return found[0] if found else None

    def existing(self, number: int) -> Path:
        """The learner's file of a module; FileNotFoundError where there is none."""
        path = self.file(number)
        if path is None:
            file = module_of(number).file
            raise FileNotFoundError(f"you have no {file} in {self.root}; begin with: tinytorch learn start {number:02}")
        return path

    def text(self, number: int) -> str:
        """The Python text of a learner's file; of a notebook, its cells behind `# %%` lines.

        Raises FileNotFoundError where there is none, and ValueError for one that is not UTF-8, or no notebook.
        """
        path = self.existing(number)
        return text_of(path, path.read_bytes())

    def numbers(self) -> list[int]:
        """The modules that the learner has a file of."""
        return [module.number for module in MODULES if self.file(module.number)]

    def start(self, number: int, notebook: bool = False) -> Path:
        """Write a module without its solutions, for the learner to complete; returns its path.

        Makes the folder a workspace if it is none. Raises FileExistsError if the learner has it already.
        """
        module = module_of(number)
        if existing := self.file(number):
            raise FileExistsError(f"you have {existing} already; to begin it anew, move that file elsewhere first")
        text = handed_out(number)
        self.create(self.root)
        write(self.base(number), text.encode())
        path = self.root / f"{module.file}.{'ipynb' if notebook else 'py'}"
        write_new(path, (notebooks.to_notebook(text) if notebook else text).encode())
        return path

    def base(self, number: int) -> Path:
        """Where the text of a module is kept as it was handed out."""
        return self.kept / "base" / f"{module_of(number).file}.py"

    # -- progress ------------------------------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """What is known of each module, by its number as text: "2".

        For each: `digest` of the text that was checked last, `results` by exercise ("passed", "failed" or "not
        written"), `checkpoint` ("passed" or "failed"), `hints` (the highest level taken, by exercise) and `solutions`
        (the exercises whose solution was looked at). What has not happened is not there.
        """
        path = self.kept / "progress.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))["modules"]
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); move it elsewhere to begin your progress anew"
            ) from None

    def record(
        self, number: int, results: Mapping[str, str], *, text: str | None = None, checkpoint: str | None = None
    ) -> None:
        """Note a check: what came of each exercise and of the checkpoint, on `text` (else on the file as it is)."""
        note: dict[str, Any] = {"digest": digest(self.text(number) if text is None else text), "results": dict(results)}
        with self._noting(number) as known:
            known.pop("checkpoint", None)
            known |= note if checkpoint is None else note | {"checkpoint": checkpoint}

    def record_hint(self, number: int, name: str, level: int) -> None:
        """Note that a hint was taken."""
        find_exercise(number, name)
        with self._noting(number) as known:
            hints = known.setdefault("hints", {})
            hints[name] = max(level, hints.get(name, 0))

    def record_solution(self, number: int, name: str) -> None:
        """Note that a solution was looked at."""
        find_exercise(number, name)
        with self._noting(number) as known:
            known["solutions"] = sorted({*known.get("solutions", ()), name})

    @contextmanager
    def _noting(self, number: int) -> Iterator[dict[str, Any]]:
        """What is known of a module, to be changed; written at the end. Other processes wait."""
        with locked(self.kept / "lock"):
            modules = self.progress()
            yield modules.setdefault(str(number), {})
            text = json.dumps({"format": FORMAT, "modules": modules}, indent=1, ensure_ascii=False)
            write(self.kept / "progress.json", text.encode())

    # -- updates -------------------------------------------------------------------------------------------------------

    def version(self) -> str:
        """The version of TinyTorch that the workspace was made with, or updated to.

        Raises ValueError if it is of a layout that this version does not know.
        """
        path = self.kept / MARKER
        try:
            marker = json.loads(path.read_text(encoding="utf-8"))
            found, version = marker["format"], str(marker["tinytorch"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} cannot be read ({error})") from None
        if found != FORMAT:
            raise ValueError(
                f"{path} is of format {found}, and this TinyTorch reads {FORMAT}: upgrade tinytorch-systems"
            )
        return version

    def update(self) -> list[Update]:
        """Bring what is new in the chapters into the learner's files, and never over what the learner changed."""
        self.version()
        with locked(self.kept / "lock"):
            done = [self._update(number) for number in self.numbers()]
            self._write_marker()
        return done

    def _update(self, number: int) -> Update:
        path, base = self.existing(number), self.base(number)
        raw = path.read_bytes()
        try:
            was, mine, new = base.read_bytes().decode(), text_of(path, raw), handed_out(number)
        except FileNotFoundError:
            return Update(number, path, "kept", f"{base} is gone, without which nothing can be merged")
        except ValueError as error:
            return Update(number, path, "kept", str(error))
        if new == was:
            return Update(number, path, "current")
        in_notebook = path.suffix == ".ipynb"
        sides = [in_cells(text) if in_notebook else text for text in (was, new)]
        own = mine.replace("\r\n", "\n")
        lines, conflicts = merging.merge(*(text.split("\n") for text in (sides[0], own, sides[1])))
        merged = "\n".join(lines)
        if notebooks.is_python(own) and not notebooks.is_python(merged):
            return Update(number, path, "kept", "what is new does not fit what you wrote")
        backup = None
        if merged != own:
            content = notebooks.updated(raw.decode("utf-8-sig"), merged) if in_notebook else merged
            if not in_notebook and mine.count("\r\n") > mine.count("\n") / 2:
                content = content.replace("\n", "\r\n")
            backup = self._back_up(path, raw)
            if path.read_bytes() != raw:
                return Update(number, path, "kept", "it was saved by another program just now; try again", backup)
            write(path.resolve(), (codecs.BOM_UTF8 if raw.startswith(codecs.BOM_UTF8) else b"") + content.encode())
        write(base, new.encode())  # last: until it is written, an update that was interrupted is done again
        return Update(number, path, "merged" if conflicts else "updated", "", backup, tuple(conflicts))

    def _back_up(self, path: Path, content: bytes) -> Path:
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09}"
        backup = self.kept / "backup" / f"{path.stem}-{stamp}{path.suffix}"
        write_new(backup, content)
        return backup

    def _write_marker(self) -> None:
        from tinytorch import __version__  # not there yet while tinytorch is being imported

        write(self.kept / MARKER, json.dumps({"format": FORMAT, "tinytorch": __version__}, indent=1).encode())


def is_workspace(folder: Path) -> bool:
    return os.path.isfile(folder / KEPT / MARKER)  # Path.is_file raises where a folder above may not be read


def digest(text: str) -> str:
    """What stands for a text in progress.json: the same for the same text."""
    return hashlib.sha256(text.encode()).hexdigest()


def handed_out(number: int) -> str:
    """The text that a learner begins with; ValueError for a module that has no exercises."""
    module = module_of(number)
    if not module.exercises.split():
        raise ValueError(f"module {number:02} {module.name} has no exercises")
    return blanked(reference(number), number, module.exercises.split())


def text_of(path: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
        return notebooks.from_notebook(text) if path.suffix == ".ipynb" else text
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def in_cells(text: str) -> str:
    """A text as it comes back from a notebook: only the blank lines around its cells differ."""
    return notebooks.from_notebook(notebooks.to_notebook(text))


# -- files -------------------------------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> None:
    """Write a file so that it holds the old content or the new one, never half.

    m01_setup's `atomic_write` is not asked for it: it may be the learner's own.
    """
    with beside(path, content) as temporary:
        with suppress(FileNotFoundError):
            temporary.chmod(path.stat().st_mode & 0o777)
        os.replace(temporary, path)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, whole or not at all; FileExistsError, and nothing written, if it is."""
    with beside(path, content) as temporary:
        if sys.platform == "win32":
            os.rename(temporary, path)  # refuses there to replace a file
            return
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if path.exists():
                raise FileExistsError(f"{path} is there already") from None
            os.replace(temporary, path)


@contextmanager
def beside(path: Path, content: bytes) -> Iterator[Path]:
    """A temporary file next to a path, with its content on the disk; those that killed processes left go in an hour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - stale.stat().st_mtime > 3600:
                stale.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process at a time is in here; the system opens the lock of one that is killed."""
    with open(path, "ab") as file:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            try:
                yield
            finally:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
