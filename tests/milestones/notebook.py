"""Makes milestones/colab.ipynb of milestones/colab.py: `nox -s notebook`."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat

SOURCE = Path(__file__).resolve().parents[2] / "milestones" / "colab.py"
TARGET = SOURCE.with_suffix(".ipynb")


def notebook() -> str:
    """The notebook as JSON; the same for the same source, so without the random ids that newer formats ask for."""
    made = jupytext.reads(SOURCE.read_text(encoding="utf-8"), fmt="py:percent")
    made.nbformat_minor = 4
    for cell in made.cells:
        cell.pop("id", None)
    made.metadata = {
        "accelerator": "GPU",
        "colab": {"provenance": [], "gpuType": "T4"},
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


if __name__ == "__main__":
    TARGET.write_text(notebook(), encoding="utf-8")
