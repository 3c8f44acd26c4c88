"""A chapter stands on the chapters below it alone: its tests pass with every file above it removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tinytorch.curriculum import MODULES, Module

FACES = ("autograd", "nn", "optim", "utils", "cli.py", "__main__.py")


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.file)
def test_a_module_needs_nothing_above_it(module: Module, root, tmp_path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", *FACES)
    for folder in ("tinytorch", "backends", "kernels"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(root / "pyproject.toml", tmp_path)
    for higher in MODULES:
        if higher.number > module.number:
            (tmp_path / "tinytorch" / f"{higher.file}.py").unlink()
            (tmp_path / "tinytorch" / f"{higher.appendix}.py").unlink(missing_ok=True)
    files = [
        path for name in (module.file, module.appendix) if (path := tmp_path / "tinytorch" / f"{name}.py").exists()
    ]
    imports = "".join(f"import tinytorch.{path.stem}; " for path in files)
    # The copy must be what is imported, also where the checkout is installed in editable mode.
    run = f"{imports}import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", run, *map(str, files)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
