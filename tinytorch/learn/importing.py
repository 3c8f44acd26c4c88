"""`import tinytorch` in a learner's workspace: the learner's files in the place of the package's chapters.

`tinytorch.m02_tensor` is then the learner's m02_tensor.py, or m02_tensor.ipynb; what the learner has no file of, all
appendices and all else is the package's. What later modules attach to do a chapter's work faster gives way to code of
the learner's, or nobody would see it run.
"""

from __future__ import annotations

import dis
import linecache
import os
import sys
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from tinytorch.curriculum import MODULES, PACKAGE, Module
from tinytorch.learn.exercises import CHAPTERS
from tinytorch.learn.workspace import Workspace, is_workspace

__all__ = ["Used", "WorkspaceError", "in_force", "install", "own_modules", "uninstall", "use_kernels", "which"]

KERNELS = "TINYTORCH_LEARN_KERNELS"  # set to 1, has kernels run in the place of the learner's operations, too
NUMBERS = {module.file: module.number for module in MODULES}
COURSE = {f"{PACKAGE}.{name}" for module in MODULES for name in (module.file, module.appendix)}


# -- which file a module comes from ------------------------------------------------------------------------------------


def install(root: str | os.PathLike) -> None:
    """From now on, have this process find chapters in a workspace first."""
    uninstall()
    sys.meta_path.insert(0, Finder(Workspace(Path(root).expanduser().absolute())))


def uninstall() -> None:
    """From now on, import the package's own chapters: for commands that must work whatever a learner has written."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]


def in_force() -> Workspace | None:
    """The workspace that this process imports chapters from."""
    return next((finder.workspace for finder in sys.meta_path if isinstance(finder, Finder)), None)


@dataclass(frozen=True)
class Used:
    """Which file `import tinytorch` takes for a module, and whether it is the learner's."""

    module: Module
    file: Path
    own: bool


def which() -> list[Used]:
    """For each module of the course, whose file is used in this process; ValueError if a learner has two of one."""
    workspace = in_force()
    files = [workspace.file(module.number) if workspace else None for module in MODULES]
    return [
        Used(module, file or CHAPTERS / f"{module.file}.py", file is not None)
        for module, file in zip(MODULES, files, strict=True)
    ]


def own_modules() -> list[Module]:
    """The modules that are the learner's in this process."""
    return [used.module for used in which() if used.own]


class WorkspaceError(ImportError):
    """No chapter can be taken from a workspace as it is; the message says why."""


class Finder(MetaPathFinder):
    """Finds chapters in a workspace; those of the package are looked after by it, too."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        number = NUMBERS.get(name)
        if fullname not in COURSE and (package or not number):
            return None
        file = self._file(number) if number else None
        if file is not None:
            other = None if target else running(file, fullname)
            loader: Loader = LearnersFile(fullname, str(file)) if other is None else Again(other)
            return spec_from_file_location(fullname, file, loader=loader)
        found = PathFinder.find_spec(fullname, path, target) if package else None
        if found is not None and isinstance(found.loader, SourceFileLoader):
            found.loader = PackagesFile(found.loader.name, found.loader.path)
        return found

    def _file(self, number: int) -> Path | None:
        root = self.workspace.root
        if not is_workspace(root):  # a wrong TINYTORCH_WORKSPACE must not have the reference run unseen
            raise WorkspaceError(f"TINYTORCH_WORKSPACE: {root} is no workspace; set it to one, or to nothing")
        try:
            return self.workspace.file(number)
        except ValueError as error:
            raise WorkspaceError(str(error)) from None


def running(file: Path, fullname: str) -> ModuleType | None:
    """The module that has been made of a file already, under another name: `python m02_tensor.py` does, and pytest."""
    for name in ("__main__", file.stem, f"{PACKAGE}.{file.stem}"):
        module = sys.modules.get(name)
        if module is not None and name != fullname and _file_of(module) == file.resolve():
            return module
    return None


def _file_of(module: Any) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


class Again(Loader):
    """Gives a module that is there already under another name, so that there are no two copies of its tensors."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class PackagesFile(SourceFileLoader):
    """Loads a module of the course from the package; what it attached gives way to the learner's code."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if os.environ.get(KERNELS) != "1":
            give_way()


class LearnersFile(PackagesFile):
    """Loads a module from a learner's file. It is compiled each time, from what the file holds then.

    Bytecode would be kept beside the file, and be taken for current if that is written twice within a second.
    """

    def path_stats(self, path: str) -> dict[str, Any]:
        raise OSError("nothing is kept of a learner's file")

    def get_data(self, path: str) -> bytes:
        try:
            text = Workspace(Path(path).parent).text(NUMBERS[Path(path).stem])
        except ValueError as error:
            raise WorkspaceError(str(error)) from None
        if path.endswith(".ipynb"):  # for tracebacks: what stands at a line of the notebook as Python text
            linecache.cache[path] = len(text), None, text.splitlines(keepends=True), path
        return text.encode()


# -- what gives way to a learner's code --------------------------------------------------------------------------------
#
# Later modules attach what does the work of an operation, an optimizer, a layer in its place: faster, and with the same
# result. Whoever wrote that operation wants to see it run, right or wrong. So when a module has been loaded, whatever
# the package has attached to the learner's code by then is taken off. What learners attach themselves stays.

TAKEN: list[Callable[[], Any]] = []  # each puts back what was taken off


def use_kernels() -> None:
    """Put back what gave way, and have nothing give way from now on, nor in programs that this one starts."""
    os.environ[KERNELS] = "1"
    while TAKEN:
        TAKEN.pop()()


def give_way() -> None:
    """Take off what stands in for the learner's code, and is not the learner's itself."""
    operations, kernels = getattr(loaded(2, "Op"), "registry", {}), loaded(16, "KERNELS", [])
    for operation in operations.values():
        if operation.implementations and any(map(is_own, reached(operation))):
            take_implementations(operation.implementations)
            for kernel in [k for k in kernels if k.op is operation and not is_own(k)]:
                take(kernels, kernel)
    updates, fusions = getattr(loaded(7, "Optimizer"), "together", {}), loaded(4, "FUSIONS", {})
    for kind in [kind for kind, update in updates.items() if is_own(kind) and not is_own(update)]:
        TAKEN.append(partial(updates.__setitem__, kind, updates.pop(kind)))
    for kind in [kind for kind, f in fusions.items() if any(map(is_own, [kind, *named(f)])) and not is_own(f)]:
        TAKEN.append(partial(fusions.__setitem__, kind, fusions.pop(kind)))  # it does what follows, too, which it names
    readers = loaded(14, "READERS", [])
    if any(is_own(loaded(number)) for number in (12, 13, 14)):
        for reader in [r for r in readers[1:] if not is_own(r)]:  # the first one, module 14's, calls the model as it is
            take(readers, reader)


def take_implementations(implementations: dict[str, list[tuple[Callable, Callable]]]) -> None:
    for backend, pairs in list(implementations.items()):
        kept = [(when, function) for when, function in pairs if is_own(function)]
        if len(kept) < len(pairs):
            TAKEN.append(partial(put_back, implementations, backend, [pair for pair in pairs if pair not in kept]))
            implementations[backend] = kept
            if not kept:
                del implementations[backend]


def put_back(implementations: dict[str, list], backend: str, pairs: list) -> None:
    implementations.setdefault(backend, []).extend(pairs)  # what was attached last is put back first, and goes first


def take(things: MutableSequence[Any], thing: Any) -> None:
    TAKEN.append(partial(things.insert, things.index(thing), thing))
    things.remove(thing)


def loaded(number: int, name: str = "", default: Any = None) -> Any:
    """A module of the course, or what it has by a name; the default if it has not been loaded, or has no such name."""
    module = sys.modules.get(f"{PACKAGE}.{MODULES[number - 1].file}")
    return getattr(module, name, default) if name else module


def is_own(thing: Any) -> bool:
    """Whether a module, a class, a function, an operation or a kernel is the learner's, by its file."""
    if isinstance(thing, partial):  # a kernel before its first call is an argument of what tries it
        thing = next((kernel for kernel in thing.args if hasattr(kernel, "place")), thing.func)
    if hasattr(thing, "place"):
        return not thing.place.startswith(f"{PACKAGE}.kernels.")
    module = thing if isinstance(thing, ModuleType) else sys.modules.get(getattr(thing, "__module__", None) or "")
    file, workspace = _file_of(module), in_force()
    return file is not None and workspace is not None and file.parent == workspace.root.resolve()


def reached(operation: Any) -> set[Any]:
    """The functions that an operation's own code comes to, other operations' included."""
    found, ahead = set[FunctionType](), [operation]
    while ahead:
        function = ahead.pop()
        function = getattr(function, "function", function)
        if isinstance(function, FunctionType) and function not in found:
            found.add(function)
            ahead += named(function)
    return found


def named(function: Any) -> list[Any]:
    """What the code of a function means by the names that are not its own."""
    known = function.__globals__
    return [known[name] for name in names(function.__code__) if name in known]


@cache
def names(code: CodeType) -> frozenset[str]:
    """The global names in a code, and in the functions within it."""
    here = (i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return frozenset(here).union(*(names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
