"""The exercises are ones: they are found, have tests and wrong solutions, and can be taken out of their chapters.

Whether tests notice the wrong solutions takes minutes to see: `nox -s learn`.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.learn.wrong import WRONG
from tinytorch.curriculum import MODULES
from tinytorch.learn.exercises import blanked, definition, exercises, find_exercise, reference

WITH_EXERCISES = [module.number for module in MODULES if module.exercises]

MEASURE = """
import json, sys
from dataclasses import asdict
from tests.learn import measure_wrong as m

found = {}
for number, name, old, new in json.loads(sys.argv[1]):
    chapter = m.Chapter(m.module_of(number))
    found[name] = [m.fitness(chapter), asdict(m.tried(chapter, m.Wrong(number, name, old, new, "harmless")))]
print(json.dumps(found))
"""


@pytest.mark.parametrize("number", WITH_EXERCISES)
def test_exercises_have_tests_prose_and_wrong_solutions(number: int) -> None:
    known = exercises(number)
    wrong = [w for w in WRONG if w.number == number]
    assert 4 <= len(known) <= 10
    assert len({e.name for e in known}) == len(known)
    for exercise in known:
        assert exercise.tests, f"{exercise.name} has no tests"
        assert exercise.prose, f"nothing is said about {exercise.name}"
        mine = {w.in_place_of(exercise.source) for w in wrong if w.exercise == exercise.name}  # ValueError: no place
        assert len(mine - {exercise.source}) >= 2, f"{exercise.name} needs two wrong solutions"
    assert {w.exercise for w in wrong} == {e.name for e in known}


def test_no_wrong_solution_is_there_twice() -> None:
    twice = [key for key, times in Counter((w.number, w.exercise, w.old, w.new) for w in WRONG).items() if times > 1]
    assert twice == []


@pytest.mark.parametrize("number", WITH_EXERCISES)
def test_a_blanked_chapter_keeps_everything_but_the_solutions(number: int) -> None:
    names = [e.name for e in exercises(number)]
    before, after = ast.parse(reference(number)), ast.parse(blanked(reference(number), number, names))
    for name in names:
        full, empty = definition(before, name), definition(after, name)
        assert ast.dump(full.args) == ast.dump(empty.args)
        assert ast.get_docstring(full) == ast.get_docstring(empty)
        assert [ast.dump(d) for d in full.decorator_list] == [ast.dump(d) for d in empty.decorator_list]
        assert ast.unparse(empty.body[-1]).startswith(f"raise NotImplementedError('exercise {name}: ")
        full.body = empty.body
    assert ast.dump(before) == ast.dump(after)  # nothing else has changed


def test_solutions_are_found_with_their_decorators() -> None:
    assert find_exercise(3, "relu").source.startswith("@op\ndef relu(xp, x):\n")
    assert find_exercise(3, "relu").tests == ("test_straight_pieces", "test_nan_is_passed_on")
    assert find_exercise(3, "relu").prose.startswith("### Straight pieces")
    with pytest.raises(ValueError, match=r"module 03 has no exercise 'rely'; it has relu, "):
        find_exercise(3, "rely")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="texts are tried in forked processes")
def test_two_modules_work_without_solutions_and_a_harmless_change_is_no_mistake(root: Path) -> None:
    """What `measure_wrong.py` says of modules 03 and 05: fit, with nothing noticed where nothing is wrong."""
    same = [(3, "relu", "xp.maximum(x, 0)", "xp.maximum(0 * x, x)"),
            (5, "mse_loss", "difference * difference", "difference**2")]  # fmt: skip
    settings = {"TINYTORCH_KERNELS": "off", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(same)], cwd=root, env={**os.environ, **settings},
                          capture_output=True, text=True, check=True)  # fmt: skip
    for problems, verdict in json.loads(done.stdout).values():
        assert problems == []
        assert (verdict["noticed"], verdict["problem"]) == ("", "survived")
