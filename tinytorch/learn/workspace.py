"""The folder that a learner writes in. A stand-in: what importing.py asks of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from tinytorch.curriculum import MODULES
from tinytorch.learn.exercises import module_of


@dataclass(frozen=True)
class Workspace:
    root: Path

    @classmethod
    def find(cls, start: Path | None = None) -> Workspace | None:
        if named := os.environ.get("TINYTORCH_WORKSPACE"):
            return cls(Path(named).expanduser().absolute())
        start = (start or Path.cwd()).absolute()
        return next((cls(root) for root in (start, *start.parents) if is_workspace(root)), None)

    @classmethod
    def create(cls, root: Path) -> Workspace:
        (root / ".tinytorch").mkdir(parents=True, exist_ok=True)
        (root / ".tinytorch" / "workspace.json").write_text("{}")
        return cls(root.absolute())

    def file(self, number: int) -> Path | None:
        name = module_of(number).file
        found = [path for path in (self.root / f"{name}.py", self.root / f"{name}.ipynb") if path.is_file()]
        if len(found) > 1:
            raise ValueError(f"{name}.py and {name}.ipynb are both in {self.root}: move one of them elsewhere")
        return found[0] if found else None

    def text(self, number: int) -> str:
        path = self.file(number)
        if path is None:
            raise FileNotFoundError(number)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if path.suffix != ".ipynb":
            return text
        try:
            cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no notebook of format 4: {error}") from error
        comment = "# %% [markdown]\n# " + "{}"
        return "\n\n".join(
            f"# %%\n{source}" if kind == "code" else comment.format(source.replace("\n", "\n# "))
            for kind, source in cells
        )

    def numbers(self) -> list[int]:
        return [module.number for module in MODULES if self.file(module.number)]


def is_workspace(folder: Path) -> bool:
    return os.path.isfile(folder / ".tinytorch" / "workspace.json")
