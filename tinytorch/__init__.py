"""TinyTorch: a deep-learning framework in twenty modules, with PyTorch's surface.

Importing the package loads nothing; the first name used loads the modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinytorch.curriculum import face_dir, face_getattr

__version__ = "0.1.0"

# In a checkout, backends/, kernels/, milestones/ and profiling/ stand beside this folder and not inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "backends").is_dir():
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    return face_getattr(globals(), name)


def __dir__() -> list[str]:
    return face_dir(__name__)
