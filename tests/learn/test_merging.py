"""Merging by lines: what either side changed is there, and nothing of the learner's goes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tinytorch.learn.merging import Conflict, merge

LINES = st.lists(st.sampled_from(["a", "b", "c", "d", ""]), max_size=12)


@st.composite
def disjoint(draw: st.DrawFn) -> tuple[list[str], list[str], list[str], list[str]]:
    """A base of lines that are all different, two texts with changes in different places, and one with all of them."""
    base = [f"line {i}" for i in range(draw(st.integers(1, 12)))]
    sides: tuple[list[str], list[str], list[str]] = ([], [], [])
    for i, line in enumerate(base):
        who = draw(st.sampled_from([0, 1, None, None]))
        new = draw(st.sampled_from([[], [f"new {i}"], [f"new {i}", f"more {i}"], [line, f"below {i}"]]))
        for side in (0, 1, 2):
            sides[side].extend(new if who is not None and side in (who, 2) else [line])
        for each in sides:  # a line that nobody changes keeps changes apart
            each.append(f"between {i}")
    return [line for i, own in enumerate(base) for line in (own, f"between {i}")], *sides


@given(disjoint())
def test_changes_in_different_places_are_all_made(texts: tuple[list[str], list[str], list[str], list[str]]) -> None:
    base, mine, theirs, wanted = texts
    assert merge(base, mine, theirs) == (wanted, [])


@given(LINES, LINES, LINES)
def test_nothing_of_mine_is_lost(base: list[str], mine: list[str], theirs: list[str]) -> None:
    merged, conflicts = merge(base, mine, theirs)
    assert Counter(merged) >= Counter(mine) - Counter(base)
    for conflict in conflicts:
        assert merged[conflict.line - 1 :][: len(conflict.mine)] == list(conflict.mine)
        assert conflict.mine != conflict.theirs


@given(LINES, LINES)
def test_a_change_of_one_side_is_taken_as_it_is(base: list[str], changed: list[str]) -> None:
    assert merge(base, changed, base) == (changed, [])
    assert merge(base, base, changed) == (changed, [])
    assert merge(base, changed, changed) == (changed, [])


def test_where_both_changed_a_line_mine_stays_and_theirs_is_told() -> None:
    merged, conflicts = merge(["a", "b", "c", "d"], ["a", "mine", "c", "d"], ["a", "theirs", "c", "new"])
    assert merged == ["a", "mine", "c", "new"]
    assert conflicts == [Conflict(2, ("b",), ("mine",), ("theirs",))]
    assert conflicts[0].diff() == ["-b", "+theirs"]


def test_two_insertions_at_one_place_meet() -> None:
    merged, conflicts = merge(["a", "b"], ["a", "mine", "b"], ["a", "theirs", "b"])
    assert merged == ["a", "mine", "b"]
    assert [conflict.theirs for conflict in conflicts] == [("theirs",)]


def test_changes_of_neighbouring_lines_do_not_meet() -> None:
    assert merge(["doc", "raise"], ["doc", "body", "end"], ["new doc", "raise"]) == (["new doc", "body", "end"], [])


def test_lines_that_are_there_often_are_compared_too() -> None:
    base = ["pass", "x"] * 200
    assert merge(base, ["first", *base], [*base, "last"]) == (["first", *base, "last"], [])
