"""Nothing in the package assigns an attribute onto a class or module that it imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tinytorch", "backends", "kernels", "milestones", "profiling")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported_names(tree: ast.AST) -> set[str]:
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {(name.asname or name.name).split(".")[0] for node in imports for name in node.names}


def assigned(node: ast.AST) -> Iterator[ast.expr]:
    """The targets of an assignment or deletion of any kind, with tuples taken apart."""
    targets: list[ast.expr] = []
    if isinstance(node, (ast.Assign, ast.Delete)):
        targets = list(node.targets)
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.For, ast.AsyncFor, ast.comprehension)):
        targets = [node.target]
    elif isinstance(node, ast.withitem) and node.optional_vars:
        targets = [node.optional_vars]
    while targets:
        target = targets.pop()
        if isinstance(target, (ast.Tuple, ast.List)):
            targets += target.elts
        elif isinstance(target, ast.Starred):
            targets.append(target.value)
        else:
            yield target


def patched(node: ast.AST) -> ast.expr | None:
    """The object whose attributes a node changes by `setattr`, `delattr` or through `vars` and `__dict__`."""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("setattr", "delattr", "__setattr__", "__delattr__") and node.args:
            return node.args[0]
        if name == "update" and isinstance(node.func, ast.Attribute):
            return namespace_owner(node.func.value)
    return None


def namespace_owner(node: ast.expr) -> ast.expr | None:
    """X in `vars(X)` and `X.__dict__`."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "vars" and node.args:
        return node.args[0]
    return node.value if isinstance(node, ast.Attribute) and node.attr == "__dict__" else None


def violations(source: str) -> list[str]:
    """Each line that changes an attribute of something imported, as "line: code"."""
    tree = ast.parse(source)
    names = imported_names(tree)
    found = []
    for node in ast.walk(tree):
        owners = [patched(node)]
        for target in assigned(node):
            if isinstance(target, ast.Attribute):
                owners.append(target.value)
            elif isinstance(target, ast.Subscript):
                owners.append(namespace_owner(target.value))
        for owner in owners:
            root = owner
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in names:
                found.append(f"{owner.lineno}: {ast.unparse(owner)}")  # type: ignore[union-attr]
    return found


# Numba's settings are attributes of its module; this one is changed while a kernel is wrapped, and put back.
SETTINGS = {"kernels/cpu/jit.py": {"numba.config"}}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imported_is_patched(path: Path) -> None:
    settings = SETTINGS.get(path.relative_to(ROOT).as_posix(), set())
    found = violations(path.read_text(encoding="utf-8"))
    assert [line for line in found if line.partition(": ")[2] not in settings] == []


@pytest.mark.parametrize(
    "line",
    [
        "Tensor.relu = None",
        "m02.Tensor.relu = None",
        "Tensor.count += 1",
        "a, Tensor.b = 1, 2",
        "del Tensor.relu",
        "setattr(Tensor, 'relu', None)",
        "type.__setattr__(Tensor, 'relu', None)",
        "vars(m02)['relu'] = None",
        "m02.__dict__['relu'] = None",
        "m02.__dict__.update(relu=None)",
        "for Tensor.x in []: pass",
    ],
)
def test_the_check_sees_every_way_to_patch(line: str) -> None:
    imports = "import tinytorch.m02_tensor as m02\nfrom tinytorch.m02_tensor import Tensor\n"
    assert violations(imports + line)
    assert violations(f"{imports}def function():\n    {line}")


def test_the_check_leaves_own_objects_alone() -> None:
    assert (
        violations(
            "import os\nclass A: pass\nA.x = 1\nsetattr(A, 'y', 2)\nself = A()\nself.os = os\nos.environ['A'] = ''"
        )
        == []
    )
