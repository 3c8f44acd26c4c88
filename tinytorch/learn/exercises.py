"""What of a chapter a learner writes: its exercises, and the chapter without their solutions.

Which definitions are exercises stands in the table of the course (`Module.exercises`), and nowhere in the chapters.
Their bodies are found and taken out by syntax tree.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tinytorch.curriculum import MODULES, Module

__all__ = ["Exercise", "blanked", "definition", "exercises", "find_exercise", "module_of", "parse", "reference"]

CHAPTERS = Path(__file__).resolve().parent.parent  # where those of the package stand, whoever's are imported
Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Exercise:
    """A definition that a learner writes.

    Attributes:
        name: "matmul", or "Tensor.backward" for a method.
        source: the solution: the whole definition as the chapter has it, with its decorators.
        prose: what the chapter says before it, as plain text.
        tests: the names of the test functions that follow it: the nearest ones below.
    """

    number: int
    name: str
    source: str
    prose: str
    tests: tuple[str, ...]


def module_of(number: int) -> Module:
    """A module of the course; ValueError for a number that none has."""
    for module in MODULES:
        if module.number == number:
            return module
    raise ValueError(f"there is no module {number}; they are 1 to {len(MODULES)}")


_parsing = threading.Lock()


def parse(source: str) -> ast.Module:
    """`ast.parse`, for one thread at a time: Python 3.11 counts how deep trees are nested in one place for all threads,
    and two that parse at once may both get a SystemError (https://github.com/python/cpython/issues/106905)."""
    with _parsing:
        return ast.parse(source)


def reference(number: int) -> str:
    """The text of a chapter as it stands in the package."""
    return (CHAPTERS / f"{module_of(number).file}.py").read_text(encoding="utf-8")


def exercises(number: int) -> list[Exercise]:
    """The exercises of a module, in the order of its chapter."""
    source = reference(number)
    tree, lines = parse(source), source.splitlines()
    found = []
    for name in module_of(number).exercises.split():
        node = definition(tree, name)
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        top = next(n for n in tree.body if n.lineno <= node.lineno <= (n.end_lineno or 0))
        found.append((start, Exercise(number, name, "\n".join(lines[start - 1 : node.end_lineno]),
                                      prose_above(lines, start), tests_below(tree, top))))  # fmt: skip
    return [exercise for _, exercise in sorted(found, key=lambda pair: pair[0])]


def find_exercise(number: int, name: str) -> Exercise:
    """One of them; ValueError, with those that there are, for a name that is none."""
    known = exercises(number)
    for exercise in known:
        if exercise.name == name:
            return exercise
    raise ValueError(
        f"module {number:02} has no exercise {name!r}; it has {', '.join(e.name for e in known) or 'none'}"
    )


def definition(tree: ast.Module, name: str) -> Definition:
    """The function "name", or the method "Class.name", of a module; ValueError if there is not exactly one."""
    owner, _, own = name.rpartition(".")
    bodies = (
        [tree.body] if not owner else [n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner]
    )
    found = [n for body in bodies for n in body if isinstance(n, Definition) and n.name == own]
    if len(found) != 1:
        raise ValueError(f"expected one definition of {name}, found {len(found)}")
    return found[0]


def prose_above(lines: list[str], line: int) -> str:
    """The text of the nearest markdown cell above a line."""
    start = max((i for i in range(line) if lines[i].startswith("# %% [markdown]")), default=None)
    if start is None:
        return ""
    text = []
    for each in lines[start + 1 : line]:
        if not each.startswith("#") or each.startswith("# %%"):
            break
        text.append(each.removeprefix("#").removeprefix(" "))
    return "\n".join(text).strip()


def tests_below(tree: ast.Module, top: ast.stmt) -> tuple[str, ...]:
    """The first test functions that stand one after the other below a definition."""
    found: list[str] = []
    for node in tree.body[tree.body.index(top) + 1 :]:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found.append(node.name)
        elif found:
            break
    return tuple(found)


def blanked(source: str, number: int, names: Iterable[str]) -> str:
    """A chapter in which the named exercises are to be written: of each, decorators, signature and docstring stay."""
    tree, lines = parse(source), source.splitlines()
    for node, name in sorted(((definition(tree, name), name) for name in names), key=lambda pair: -pair[0].lineno):
        first, end = node.body[0], node.end_lineno or node.lineno
        left = f'raise NotImplementedError("exercise {name}: tinytorch learn hint {number:02} {name}")'
        before = lines[first.lineno - 1][: first.col_offset]
        if ast.get_docstring(node, clean=False) is not None:
            lines[first.end_lineno or first.lineno : end] = [before + left]
        elif before.strip():  # the body stands on the signature's line
            lines[first.lineno - 1 : end] = [before + left]
        else:
            start = first.lineno
            while lines[start - 2].strip().startswith("#"):  # a comment on the solution
                start -= 1
            lines[start - 1 : end] = [before + left]
    return "\n".join(lines) + "\n"
