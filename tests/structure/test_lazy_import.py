"""`import tinytorch` is quick and loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("numpy", "numba", "matplotlib", "cupy", "array_api_compat", "pooch", "rich", "typer")

MEASURE = """
import sys, time
start = time.perf_counter()
import tinytorch
seconds = time.perf_counter() - start
print(seconds, *sys.modules)
"""


def fresh(code: str, root) -> list[str]:
    """What a new interpreter prints, as words."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split()


def test_import_takes_a_tenth_of_a_second_at_most(root) -> None:
    assert min(float(fresh(MEASURE, root)[0]) for _ in range(5)) <= 0.1


def test_import_loads_no_module_of_the_course(root) -> None:
    loaded = set(fresh(MEASURE, root)[1:])
    assert "tinytorch.curriculum" in loaded
    assert not loaded & set(HEAVY)
    assert not [name for name in loaded if name.startswith("tinytorch.m")]


def test_computing_loads_neither_numba_nor_matplotlib_nor_cupy(root) -> None:
    loaded = fresh("import sys, tinytorch; tinytorch.manual_seed(0); print(*sys.modules)", root)
    assert "tinytorch.m01_setup" in loaded
    assert not set(loaded) & {"numba", "matplotlib", "cupy", "torch", "array_api_strict"}


def test_the_command_line_starts_without_the_course(root) -> None:
    loaded = fresh("import sys, tinytorch.cli; print(*sys.modules)", root)
    assert not set(loaded) & {"numpy", "numba", "matplotlib", "cupy"}
