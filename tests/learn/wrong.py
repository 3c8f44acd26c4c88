"""Wrong solutions of the exercises, of the kinds that learners write. `measure_wrong.py` sees whether tests notice.

Each is a text that occurs once in a solution, what it becomes, and the mistake in words. When a solution has changed,
the mistake changes with it; one that no test sees asks for a test, and is not made easier to see.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import dedent

from tinytorch.learn.exercises import find_exercise, reference

__all__ = ["WRONG", "Wrong"]


@dataclass(frozen=True)
class Wrong:
    """A wrong solution: in the text of an exercise, `old`, which stands there once, becomes `new`."""

    number: int
    exercise: str
    old: str
    new: str
    what: str

    def in_place_of(self, solution: str) -> str:
        """The solution with the mistake; ValueError if `old` is not there once, or what comes of it is no Python."""
        where = f"{self.exercise} of module {self.number:02}"
        if solution.count(self.old) != 1:
            raise ValueError(f"{where}: {self.old!r} occurs {solution.count(self.old)} times, not once")
        text = solution.replace(self.old, self.new)
        try:
            compile(dedent(text), self.exercise, "exec", dont_inherit=True)
        except SyntaxError as error:
            raise ValueError(f"{where}: {self.what}: it is no Python: {error}") from None
        return text

    def planted(self) -> str:
        """The chapter with the mistake."""
        solution, chapter = find_exercise(self.number, self.exercise).source, reference(self.number)
        if chapter.count(solution) != 1:
            raise ValueError(f"the solution of {self.exercise} occurs {chapter.count(solution)} times, not once")
        return chapter.replace(solution, self.in_place_of(solution))


from tests.learn.wrong_01_10 import WRONG_01_10  # noqa: E402 - they are made of what stands above
from tests.learn.wrong_11_20 import WRONG_11_20  # noqa: E402

WRONG = WRONG_01_10 + WRONG_11_20
