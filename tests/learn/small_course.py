"""A course of two short chapters, in two versions, for tests of what is done to chapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tinytorch.curriculum import MODULES

TENSOR = '''"""Module 02: a number in a box."""

from __future__ import annotations

# %% [markdown]
# ## Implementation
#
# ### Doubling
# Twice x is x plus x, and never ≤ x for a positive one.


# %%
def double(x):
    """Twice x."""
    return x + x


def test_double():
    assert double(2) == 4


# %% [markdown]
# ### Boxes
# A box holds a thing.


# %%
class Box:
    def __init__(self, thing):
        self.thing = thing

    def get(self, default=None):
        """What is in it, or the default."""
        for thing in [self.thing]:
            if thing is not None:
                return thing
        return default


def test_box():
    assert Box(3).get() == 3


# %% [markdown]
# ## Summary
# That was all.

# %%
if __name__ == "__main__":
    test_double()
    test_box()
'''
NEWER_TENSOR = (
    TENSOR.replace("That was all.", "That was all, and it is better said.")
    .replace('"""Twice x."""', '"""Twice x, a number."""')
    .replace("    assert Box(3).get() == 3\n", "    assert Box(3).get() == 3\n    assert Box(None).get(4) == 4\n")
)
ACTIVATIONS = '''"""Module 03: bends."""


def relu(x): return max(x, 0)


def test_relu():
    assert relu(-1) == 0
'''
NAMES = {2: "double Box.get", 3: "relu"}


def install(folder: Path, put: Any, tensor: str = TENSOR) -> None:
    """Have `tinytorch.learn` teach this course: `put(object, name, value)` sets an attribute."""
    from tinytorch.learn import exercises

    folder.mkdir(exist_ok=True)
    (folder / "m02_tensor.py").write_text(tensor, encoding="utf-8")
    (folder / "m03_activations.py").write_text(ACTIVATIONS, encoding="utf-8")
    put(exercises, "CHAPTERS", folder)
    put(exercises, "MODULES", tuple(replace(each, exercises=NAMES.get(each.number, "")) for each in MODULES))
