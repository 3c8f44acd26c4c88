"""Planted wrong solutions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wrong:
    """A wrong solution of an exercise: its own text, `old` (which stands there once) replaced by `new`."""

    number: int
    exercise: str
    old: str
    new: str
    what: str
