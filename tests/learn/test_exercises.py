"""The exercises are ones: they are found, have tests and wrong solutions, and can be taken out of their chapters.

Whether tests notice the wrong solutions takes minutes to see: `nox -s learn`.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.learn.wrong import WRONG
from tinytorch.curriculum import MODULES
from tinytorch.learn import exercises as exercise_module
from tinytorch.learn.exercises import blanked, definition, exercises, find_exercise, parse, reference

WITH_EXERCISES = [module.number for module in MODULES if module.exercises]

MEASURE = """
import json, sys
from tests.learn import measure_wrong as m

chapter = m.Chapter(m.module_of(int(sys.argv[1])))
"""


def test_threads_parse_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 gets its count of nested nodes wrong if two do so at once, and then raises SystemError."""
    now, most = [0], [0]

    def slow(source: str) -> str:
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.01)
        now[0] -= 1
        return source

    monkeypatch.setattr(ast, "parse", slow)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(parse, "abcd")) == list("abcd")
    assert most == [1]
    for used_by_graders in ("checking", "exercises", "notebooks"):
        text = (Path(exercise_module.__file__).parent / f"{used_by_graders}.py").read_text(encoding="utf-8")
        assert text.count("ast.parse(") == (used_by_graders == "exercises")


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
    assert "ReLU is a comparison." in find_exercise(3, "relu").prose
    with pytest.raises(ValueError, match=r"module 03 has no exercise 'rely'; it has relu, "):
        find_exercise(3, "rely")


def measured(root: Path, number: int, expression: str) -> Any:
    """What `measure_wrong.py`, as m, says of a chapter."""
    if not hasattr(os, "fork"):
        pytest.skip("texts are tried in forked processes")
    settings = {"TINYTORCH_KERNELS": "off", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", f"{MEASURE}\nprint(json.dumps({expression}))", str(number)]
    done = subprocess.run(command, cwd=root, env={**os.environ, **settings}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("number", "name", "old", "new"),
    [(3, "relu", "xp.maximum(x, 0)", "xp.maximum(0 * x, x)"),
     (5, "mse_loss", "difference * difference", "difference**2")],
)  # fmt: skip
def test_a_module_works_without_solutions_and_a_harmless_change_is_no_mistake(
    root: Path, number: int, name: str, old: str, new: str
) -> None:
    tried = f"vars(m.tried(chapter, m.Wrong({number}, {name!r}, {old!r}, {new!r}, 'harmless')))"
    problems, verdict = measured(root, number, f"[m.fitness(chapter), {tried}]")
    assert problems == []
    assert (verdict["noticed"], verdict["problem"]) == ("", "survived")


def test_what_is_no_exercise_and_what_does_not_run_is_told(root: Path) -> None:
    other = "m.Exercise(3, 'relu', '', '', ('test_layers_remember_their_attributes',))"  # which never calls it
    texts = ["raise NotImplementedError('exercise relu: hint')", "while True: pass", "import os; os._exit(0)"]
    unfit, *others = measured(root, 3, f"[setattr(m, 'LONGEST', 2), chapter.exercises.append({other}), "
                              f"m.fitness(chapter), *[chapter.attempt(text, []) for text in {texts}]]")[2:]  # fmt: skip
    assert unfit == ["relu: without it its tests say nothing"]
    assert [said[""][""] for said in others] == [
        "it cannot be imported: not written: relu", "it did not end within 2 s", "its process was ended",
    ]  # fmt: skip
