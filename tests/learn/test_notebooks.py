"""Chapters as notebooks, and back."""

from __future__ import annotations

import json
import random
from typing import Any

import jupytext
import nbformat
import pytest

from tinytorch.curriculum import MODULES
from tinytorch.learn.exercises import reference
from tinytorch.learn.notebooks import from_notebook, to_notebook, updated

TEXT = '''"""A chapter."""
import math

# %% [markdown]
# # Numbers
#
#     code with $x ≤ y$, two spaces  at the end: \\
# "quotes"

# %%
def half(x):
    """Half of it."""

    return x / 2


# %% [markdown]
# The end.
if __name__ == "__main__":
    half(2)
'''


def notebook(*cells: tuple[str, str | list[str]], **more: Any) -> str:
    rows: list[dict[str, Any]] = [{"cell_type": kind, "metadata": {}, "source": source} for kind, source in cells]
    for row in rows:
        if row["cell_type"] == "code":
            row |= {"execution_count": 1, "outputs": []}
    return json.dumps({"cells": rows, "metadata": {}, "nbformat": 4, "nbformat_minor": 4} | more)


def lines(text: str) -> list[str]:
    """The lines that hold something, but for the marks of code: chapters leave those out behind markdown."""
    return [line for line in text.split("\n") if line.strip() and line != "# %%"]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.file)
def test_a_chapter_comes_back_from_a_notebook(module: Any) -> None:
    text = reference(module.number)
    content = to_notebook(text)
    nbformat.validate(nbformat.reads(content, as_version=4))
    assert lines(from_notebook(content)) == lines(text)
    assert from_notebook(to_notebook(from_notebook(content))) == from_notebook(content)


def test_cells_are_those_that_jupytext_makes() -> None:
    text = TEXT.replace("# The end.\n", "# The end.\n\n# %%\n")  # where it wants a mark, and we do not need one
    wanted = [(cell.cell_type, cell.source) for cell in jupytext.reads(text, fmt="py:percent").cells]
    made = json.loads(to_notebook(TEXT))
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in made["cells"]] == wanted
    assert made["nbformat_minor"] == 4
    assert not any("id" in cell for cell in made["cells"])


def test_cells_that_hold_nothing_are_left_out() -> None:
    made = json.loads(to_notebook("# %%\nx = 1\n\n# %%\n\n\n# %% [markdown]\n#\n\n# %%\n"))
    assert [cell["source"] for cell in made["cells"]] == [["x = 1"]]


def test_the_text_of_a_learners_notebook() -> None:
    content = notebook(
        ("markdown", ["# Mine\n", "\n", "text"]), ("code", "x = 1\n\ny = 2\n"), ("raw", "raw"), ("code", "")
    )
    assert from_notebook(content) == (
        "# %% [markdown]\n# # Mine\n#\n# text\n\n# %%\nx = 1\n\ny = 2\n\n# %% [markdown]\n# raw\n\n# %%\n\n"
    )


def test_lines_for_ipython_leave_their_place_to_pass() -> None:
    text = from_notebook(notebook(("code", "%matplotlib inline\nif True:\n    !ls"), ("code", "x = (7\n% 4)")))
    assert text == "pass  # %matplotlib inline\nif True:\n    pass  # !ls\n\n# %%\nx = (7\n% 4)\n"


def test_a_syntax_error_stays_as_it_was_written() -> None:
    assert from_notebook(notebook(("code", "x = (7\n% 4"))) == "x = (7\n% 4\n"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"nbformat": 4, "cells": [{}]}', '{"nbformat": 3, "cells": []}'])
def test_what_is_no_notebook_is_refused(content: str) -> None:
    with pytest.raises(ValueError, match="no notebook of format 4"):
        from_notebook(content)


@pytest.mark.parametrize("minor", [4, 5])
def test_cells_that_did_not_change_keep_their_outputs(minor: int) -> None:
    ran = nbformat.v4.new_notebook(nbformat_minor=minor, metadata={"mine": 1})
    for number in range(4):
        output = nbformat.v4.new_output("stream", text=f"{number}\n")
        ran.cells.append(nbformat.v4.new_code_cell(f"%time\nprint({number})", outputs=[output], execution_count=number))
    for cell in ran.cells:
        if minor == 4:
            cell.pop("id")
    content = nbformat.writes(ran)
    changed = from_notebook(content).replace("print(2)", "print('two')")
    after = nbformat.reads(updated(content, changed), as_version=nbformat.NO_CONVERT)
    nbformat.validate(after)
    assert [cell for i, cell in enumerate(after.cells) if i != 2] == [
        cell for i, cell in enumerate(ran.cells) if i != 2
    ]
    assert after.cells[2].source.endswith("print('two')")
    assert after.cells[2].outputs == []
    assert after.metadata == {"mine": 1}
    assert from_notebook(nbformat.writes(after)) == changed


def test_any_cells_come_back() -> None:
    random.seed(3)
    pieces = ["x = 1", "# a comment", "", "  # indented", "    y = 2", "text: é ≤", "#", "##"]
    for _ in range(200):
        cells = [(random.choice(["code", "markdown"]), "\n".join(random.choices(pieces, k=4))) for _ in range(3)]
        text = from_notebook(notebook(*cells))
        again = from_notebook(to_notebook(text))
        assert [line for line in again.split("\n") if line.strip(" #%")] == [
            line for line in text.split("\n") if line.strip(" #%")
        ]
