"""Mixed precision: products of 16 bits, and a scale for the loss: `torch.amp`."""

from __future__ import annotations

from typing import Any

from tinytorch.curriculum import face_dir, face_getattr


def __getattr__(name: str) -> Any:
    return face_getattr(globals(), name)


def __dir__() -> list[str]:
    return face_dir(__name__)
