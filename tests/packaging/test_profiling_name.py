"""Python 3.15 has a package `profiling`; ours, at the top of the checkout, must not hide it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(code: str, *path) -> subprocess.CompletedProcess[str]:
    """Run code with folders in front of the rest of sys.path, in an interpreter that sees no installed package."""
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n{code}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=path[0], env=environment, capture_output=True, text=True)


def test_the_standard_library_comes_first(root, tmp_path) -> None:
    package = tmp_path / "profiling"
    package.mkdir()
    (package / "__init__.py").write_text("origin = 'standard library'\n")
    (package / "sampling.py").write_text("from profiling import origin\n")
    code = (
        "import profiling, profiling.sampling; print(profiling.origin, profiling.sampling.origin, profiling.__file__)"
    )
    done = run(code, root, tmp_path)
    assert done.stdout.strip() == f"standard library standard library {package / '__init__.py'}", done.stderr


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="from Python 3.15 on there is one")
def test_without_one_there_is_no_module_of_that_name(root) -> None:
    done = run("import profiling", root)
    assert done.returncode == 1
    assert "No module named 'profiling' (TinyTorch's is tinytorch.profiling)" in done.stderr


def test_ours_is_found_under_its_own_name(root) -> None:
    done = run("import tinytorch.profiling as p; print(p.__name__)", root)
    assert done.stdout.strip() == "tinytorch.profiling", done.stderr
