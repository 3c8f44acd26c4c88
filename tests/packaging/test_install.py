"""A wheel, an editable install and a bare clone all work, and none adds a name but `tinytorch` to the environment.

The environments are new and empty, but read this one's packages, so that nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NOT_OURS = ("backends", "kernels", "milestones", "profiling")  # names of other people's packages
SUBPACKAGES = ("backends", "kernels", "milestones", "profiling", "nn", "nn.functional", "optim", "autograd", "utils")

IMPORTS = f"""
import importlib, importlib.util, sys
import tinytorch
for name in {SUBPACKAGES}:
    importlib.import_module("tinytorch." + name)
print(tinytorch.__file__)
print(*[name for name in {NOT_OURS} if (spec := importlib.util.find_spec(name)) and "tinytorch" in str(spec.origin)])
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command away from this process's paths; returns what it prints, fails with what it says."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def clone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source files, as `git clone` would make one."""
    target = tmp_path_factory.mktemp("clone") / "source"
    target.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("tinytorch", "backends", "kernels", "milestones", "profiling"):
        shutil.copytree(root / folder, target / folder, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        if (root / file).exists():
            shutil.copy(root / file, target)
    return target


def empty_environment(folder: Path) -> Path:
    """A new virtual environment that reads this one's packages; returns its Python."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A path file adds the folder, but does not read that folder's path files: an editable install here stays unseen.
    (site / "packages.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return python


def install(python: Path, *arguments: str | Path, cwd: Path) -> None:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--quiet"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *arguments, cwd=cwd)


@pytest.fixture(scope="session")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    source = shutil.copytree(clone, folder / "source")
    return folder / run(sys.executable, "-c", build, folder, cwd=source).splitlines()[-1]


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("installed")
    python = empty_environment(folder / "venv")
    install(python, wheel, cwd=folder)
    return python


def test_the_wheel_holds_every_source_file_and_no_other_package(wheel: Path, clone: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"tinytorch"}
    for folder, prefix in (("tinytorch", ""), *((name, "tinytorch/") for name in NOT_OURS)):
        files = {prefix + path.relative_to(clone).as_posix() for path in (clone / folder).rglob("*") if path.is_file()}
        assert {name for name in files if "__pycache__" not in name} <= set(names)
    assert "tinytorch/py.typed" in names


def test_the_wheel_imports_in_an_empty_environment(installed: Path, tmp_path: Path) -> None:
    file, others = run(installed, "-c", IMPORTS, cwd=tmp_path).split("\n")[:2]
    assert Path(file).is_relative_to(installed.parents[1])
    assert others == ""
    command = installed.with_name("tinytorch.exe" if os.name == "nt" else "tinytorch")
    assert run(command, "--version", cwd=tmp_path).startswith("tinytorch 0.1")


def test_a_chapter_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert "GFLOP/s" in run(installed, "-m", "tinytorch.m01_setup", cwd=tmp_path)


def test_an_editable_install_imports(clone: Path, tmp_path: Path) -> None:
    source = shutil.copytree(clone, tmp_path / "source")
    python = empty_environment(tmp_path / "venv")
    install(python, "-e", source, cwd=tmp_path)
    file, others = run(python, "-c", IMPORTS, cwd=tmp_path).split("\n")[:2]
    assert Path(file) == source / "tinytorch" / "__init__.py"
    assert others == ""
    assert "ok" in run(python, "-m", "tinytorch.m01_setup", "--tests-only", cwd=tmp_path)


def test_a_clone_works_without_any_install(clone: Path, tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "venv")
    file = run(python, "-c", IMPORTS, cwd=clone).split("\n")[0]
    assert Path(file) == clone / "tinytorch" / "__init__.py"
    assert "GFLOP/s" in run(python, "-m", "tinytorch.m01_setup", cwd=clone)
    assert "multiply" not in run(python, "-m", "tinytorch", "doctor", cwd=clone)


def test_pyproject_lists_every_package(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = set()
    for folder, prefix in (("tinytorch", ""), *((name, "tinytorch.") for name in NOT_OURS)):
        for path in (root / folder).rglob("__init__.py"):
            found.add(prefix + ".".join(path.parent.relative_to(root).parts))
    assert set(settings["packages"]) == found
