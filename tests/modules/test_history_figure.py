"""The figure of a training history: the numbers that it shows, and the gaps where there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from tinytorch import m08_training_appendix
from tinytorch.m08_training_appendix import plot_history


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look into."""
    figures: list[Figure] = []
    save = m08_training_appendix.save_figure

    def keep(figure: Figure, path: Path) -> Path:
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(m08_training_appendix, "save_figure", keep)
    return figures


def history(epochs: int, seed: int = 0, **constant: float) -> list[dict]:
    generator = np.random.default_rng(seed)
    names = ("loss", "accuracy", "val_loss", "val_accuracy", "lr")
    return [
        {"epoch": e, **dict(zip(names, generator.random(5), strict=True)), **constant} for e in range(1, epochs + 1)
    ]


def is_picture(path: Path) -> bool:
    """Whether a file is a PNG that is not of one colour."""
    return imread(path)[..., :3].std() > 0.01


def test_curves_show_the_numbers_of_the_history(drawn: list, tmp_path: Path) -> None:
    rows = history(12)
    path = plot_history(rows, tmp_path / "new" / "folder" / "curves.png", title="A run")
    assert is_picture(path)
    loss, accuracy, rate = drawn[0].axes
    assert drawn[0].get_suptitle() == "A run"
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "accuracy (%)")
    assert {axes.get_xlabel() for axes in drawn[0].axes} == {"epoch"}
    shown = {(i, line.get_label()): line for i, axes in enumerate(drawn[0].axes) for line in axes.lines}
    expected = {(0, "training"): "loss", (0, "validation"): "val_loss", (1, "training"): "accuracy",
                (1, "validation"): "val_accuracy", (2, "training"): "lr"}  # fmt: skip
    assert shown.keys() == expected.keys()
    for key, name in expected.items():
        scale = 100 if "accuracy" in name else 1
        assert shown[key].get_xdata().tolist() == [row["epoch"] for row in rows]
        assert np.allclose(shown[key].get_ydata(), [scale * row[name] for row in rows])
    assert shown[0, "training"].get_linestyle() != shown[0, "validation"].get_linestyle()
    assert rate.get_legend() is None


def test_curves_leave_out_what_there_is_not(drawn: list, tmp_path: Path) -> None:
    rows = [{"epoch": e, "loss": 1 / e, "val_loss": None, "lr": 0.1} for e in range(1, 6)]
    rows[2]["loss"] = float("nan")
    rows[3]["loss"] = float("inf")
    plot_history(rows, tmp_path / "curves.png")
    (axes,) = drawn[0].axes
    (line,) = axes.lines
    assert np.isfinite(line.get_ydata()).tolist() == [True, True, False, False, True]
    assert is_picture(plot_history(history(1), tmp_path / "one.png"))
    assert is_picture(plot_history(history(500, lr=0.1), tmp_path / "many.png"))
    with pytest.raises(ValueError, match="no epoch"):
        plot_history([], tmp_path / "none.png")
