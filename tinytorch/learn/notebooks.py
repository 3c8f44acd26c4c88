"""A chapter as a notebook, and a notebook as Python text: `# %%` cells on the one side, JSON on the other."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Any

from tinytorch.learn.exercises import parse

__all__ = ["from_notebook", "to_notebook", "updated"]

CODE, MARKDOWN = "code", "markdown"
MARK = re.compile(r"# %%(?!%)\s*(\[markdown\])?")
MAGIC = re.compile(r"^([ \t]*)([%!].*)$", re.MULTILINE)


def to_notebook(text: str) -> str:
    """Python text with `# %%` cells as a notebook, format 4.4; what stands before the first mark is a cell of code."""
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    cells = [new_cell(kind, source) for kind, source in cells_of(text)]
    return as_json({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4})


def from_notebook(content: str) -> str:
    """A notebook's Python text: code as it is, markdown as comments; ValueError for what is no notebook.

    Lines for IPython alone, such as `%matplotlib inline`, become `pass` and a comment, so that the text is Python.
    """
    cells = [source_of(cell) for cell in read(content)["cells"]]
    parts = [f"# %%\n{source}" if kind == CODE else f"# %% [markdown]\n{commented(source)}" for kind, source in cells]
    return ("\n\n".join(parts) + "\n").removeprefix("# %%\n")


def updated(content: str, text: str) -> str:
    """A notebook whose cells say `text`; those that said it before stay as they are, with their outputs."""
    notebook = read(content)
    old, new = [source_of(cell) for cell in notebook["cells"]], list(cells_of(text))
    with_ids = (notebook["nbformat"], notebook.get("nbformat_minor", 0)) >= (4, 5)
    cells: list[dict[str, Any]] = []
    for kind, i, j, k, n in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            cells += notebook["cells"][i:j]
        else:
            cells += [new_cell(*cell) | ({"id": os.urandom(4).hex()} if with_ids else {}) for cell in new[k:n]]
    return as_json(notebook | {"cells": cells})


def cells_of(text: str) -> Iterator[tuple[str, str]]:
    """The kind and the source of each cell of a text with marks; without those that hold nothing.

    Markdown ends at a mark, or at a line that is no comment.
    """
    kind, lines = CODE, list[str]()
    for line in [*text.split("\n"), "# %%"]:
        mark = MARK.match(line)
        if mark or (kind == MARKDOWN and line.strip() and not line.startswith("#")):
            source = "\n".join(lines).strip("\n")
            if source.strip():
                yield kind, source
            kind, lines = MARKDOWN if mark and mark[1] else CODE, []
        if not mark:
            lines.append(line if kind == CODE else line.removeprefix("#").removeprefix(" "))


def source_of(cell: dict[str, Any]) -> tuple[str, str]:
    """The kind of a notebook's cell, and its source; that of code as Python."""
    source = (cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])).strip("\n")
    if cell["cell_type"] != CODE:
        return MARKDOWN, source
    without_magic = MAGIC.sub(r"\1pass  # \2", source)
    return CODE, without_magic if not is_python(source) and is_python(without_magic) else source


def commented(source: str) -> str:
    return "\n".join(f"# {line}" if line else "#" for line in source.split("\n"))


def is_python(source: str) -> bool:
    try:
        parse(source)
    except SyntaxError:
        return False
    return True


def new_cell(kind: str, source: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": source.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == CODE else {})


def read(content: str) -> dict[str, Any]:
    try:
        notebook = json.loads(content)
        if notebook["nbformat"] != 4 or not all({"cell_type", "source"} <= set(cell) for cell in notebook["cells"]):
            raise ValueError("it is not of format 4")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"no notebook of format 4: {error}") from error
    return notebook


def as_json(notebook: dict[str, Any]) -> str:
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"
