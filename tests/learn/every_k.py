"""Modules 01 to k of a learner work with the package's k+1 to 20, for every k: `python tests/learn/every_k.py [K …]`.

The learner's are the reference's own text, in a workspace of their own. In it, all modules and appendices are imported,
the learner's from the workspace and the others from the package; then the tests of chapter k+1 run, which is the
package's, and those of chapter k, which is the learner's. The same with module k alone as the learner's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tinytorch.curriculum import MODULES
from tinytorch.learn.exercises import module_of, reference
from tinytorch.learn.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent.parent

IMPORTS = """
import sys
from pathlib import Path
from tinytorch.curriculum import MODULES, face_names, FACES, find_export, load_modules
from tinytorch.learn.importing import own_modules

load_modules()
here, own = Path.cwd(), [int(number) for number in sys.argv[1:]]
for module in MODULES:
    file = Path(sys.modules[f"tinytorch.{module.file}"].__file__)
    assert (file.parent == here) == (module.number in own), file
    appendix = sys.modules.get(f"tinytorch.{module.appendix}")
    assert appendix is None or Path(appendix.__file__).parent != here
for face in FACES:
    for name, module in face_names(face).items():
        find_export(module, face, name)
assert [module.number for module in own_modules()] == own
"""


def workspace(root: Path, *numbers: int) -> Path:
    """A workspace with the reference's text of these modules."""
    made = Workspace.create(root)
    for number in numbers:
        text = reference(number)
        (made.root / f"{module_of(number).file}.py").write_text(text, encoding="utf-8", newline="\n")
    return made.root


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"} | variables
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
    )


def check(root: Path, *numbers: int) -> list[str]:
    """What goes wrong where these modules are a learner's; nothing if all is well."""
    folder, wrong = workspace(root, *numbers), []
    done = run(folder, "-W", "error", "-c", IMPORTS, *map(str, numbers))
    if done.returncode:
        wrong.append(f"imports: {done.stderr[-2000:]}")
    for module in MODULES[numbers[-1] - 1 : numbers[-1] + 1]:
        for _ in range(2):  # a few tests measure the machine, which may be busy for a moment
            done = run(folder, "-m", f"tinytorch.{module.file}", "--tests-only")
            passed = done.returncode == 0 and "  ok    test_" in done.stdout and "FAIL" not in done.stdout
            if passed:
                break
        else:
            wrong.append(f"{module.file}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return wrong


def main(ks: list[int]) -> int:
    wrong = 0
    for k in ks:
        for name, numbers in ((f"1 to {k}", range(1, k + 1)), (f"{k} alone", (k,))):
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                found = check(Path(folder).resolve() / "a workspace", *numbers)
            wrong += bool(found)
            took = time.perf_counter() - start
            print(f"{name:>8}: {'FAILED' if found else 'passed'}, {took:.0f} s", *found, sep="\n", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]] or [module.number for module in MODULES]))
