"""Three-way merging of texts by lines: what one side changed and what the other did, both at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher, unified_diff

__all__ = ["Conflict", "merge"]


@dataclass(frozen=True)
class Conflict:
    """Lines that both sides changed, each in its own way.

    Attributes:
        line: where the lines of `mine`, which were kept, begin in the merged text; counted from 1.
    """

    line: int
    base: tuple[str, ...]
    mine: tuple[str, ...]
    theirs: tuple[str, ...]

    def diff(self) -> list[str]:
        """What the other side changed here: the lines of a unified diff, without its two headers."""
        return list(unified_diff(self.base, self.theirs, lineterm=""))[3:]


@dataclass(frozen=True)
class Edit:
    """base[start:end] became `lines`."""

    start: int
    end: int
    lines: tuple[str, ...]


def merge(base: list[str], mine: list[str], theirs: list[str]) -> tuple[list[str], list[Conflict]]:
    """The lines of `mine` with the changes from `base` to `theirs`, and where they met `mine`'s own and were left out.

    Changes meet where they touch the same line of `base`, or insert at the same place.
    """
    merged: list[str] = []
    conflicts = []
    done = 0  # so many lines of base are dealt with
    for own, other in together(edits(base, mine), edits(base, theirs)):
        start = min(edit.start for edit in own + other)
        end = max(edit.end for edit in own + other)
        merged += base[done:start]
        kept, offered = (applied(base, start, end, side) for side in (own, other))
        if own and other and kept != offered:
            conflicts.append(Conflict(len(merged) + 1, tuple(base[start:end]), tuple(kept), tuple(offered)))
        merged += kept if own else offered
        done = end
    return merged + base[done:], conflicts


def edits(base: list[str], changed: list[str]) -> list[Edit]:
    found = SequenceMatcher(None, base, changed, autojunk=False).get_opcodes()
    return [Edit(i, j, tuple(changed[k:n])) for kind, i, j, k, n in found if kind != "equal"]


def together(own: list[Edit], other: list[Edit]) -> Iterator[tuple[list[Edit], list[Edit]]]:
    """The edits of both sides in groups, in order: an edit is in the group of those that it meets."""
    group: tuple[list[Edit], list[Edit]] = ([], [])
    start = end = -1
    pairs = [(edit, 0) for edit in own] + [(edit, 1) for edit in other]
    for edit, side in sorted(pairs, key=lambda pair: (pair[0].start, pair[0].end)):
        same_place = edit.start == edit.end == start == end
        if not (edit.start < end or same_place):
            if group[0] or group[1]:
                yield group
            group, start = ([], []), edit.start
        group[side].append(edit)
        end = max(end, edit.end)
    if group[0] or group[1]:
        yield group


def applied(base: list[str], start: int, end: int, own: list[Edit]) -> list[str]:
    """base[start:end] after some edits of it."""
    lines: list[str] = []
    for edit in own:
        lines += [*base[start : edit.start], *edit.lines]
        start = edit.end
    return lines + base[start:end]
