"""TinyTorch: a deep-learning framework in twenty modules, with PyTorch's surface.

Importing the package loads nothing; the first name used loads the modules.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from tinytorch.curriculum import face_dir, face_getattr

__version__ = "0.1.0"

# In a checkout, backends/, kernels/, milestones/ and profiling/ stand beside this folder and not inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "backends").is_dir():
    __path__.append(str(_root))


def _workspace() -> str | None:
    """The learner's workspace that is in force: TINYTORCH_WORKSPACE, or that of the program that is run, or the
    nearest one from the current folder up. Every import asks, so this loads nothing.
    """
    if named := os.environ.get("TINYTORCH_WORKSPACE"):
        return named
    try:
        here, program = os.getcwd(), os.path.dirname(os.path.abspath(sys.argv[0]))
    except (OSError, AttributeError, IndexError):  # the folder was removed; there is no program
        return None
    for folder in (program, here, *map(str, Path(here).parents)):
        if os.path.isfile(os.path.join(folder, ".tinytorch", "workspace.json")):
            return folder
    return None


if (_found := _workspace()) is not None:  # there, chapters are the learner's
    importlib.import_module("tinytorch.learn.importing").install(_found)  # by name: chapters import this file, too


def __getattr__(name: str) -> Any:
    return face_getattr(globals(), name)


def __dir__() -> list[str]:
    return face_dir(__name__)
