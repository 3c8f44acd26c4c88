"""In a workspace, `import tinytorch` is the learner's: each test starts Python in one, as a learner does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import tinytorch
from tests.learn.every_k import check, run, workspace
from tinytorch.curriculum import MODULES
from tinytorch.learn.exercises import reference
from tinytorch.learn.workspace import Workspace

ODD = "a würkspace"  # a path with a space, and with a letter that is not ASCII


def text(folder: Path, *arguments: str, **variables: str) -> str:
    """What Python prints in a folder."""
    done = run(folder, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def edit(file: Path, old: str, new: str) -> None:
    before = file.read_text(encoding="utf-8")
    assert before.count(old) == 1, old
    file.write_text(before.replace(old, new), encoding="utf-8")


def write_notebook(folder: Path, number: int, *more: str) -> Path:
    """The reference's text of a module as a notebook of one cell, and further cells."""
    name = MODULES[number - 1].file
    cells = [
        {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
        for source in (reference(number), *more)
    ]
    file = folder / f"{name}.ipynb"
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    file.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")
    return file


# -- whose file --------------------------------------------------------------------------------------------------------


def test_the_learners_file_is_the_module_and_the_rest_is_the_packages(tmp_path: Path, root: Path) -> None:
    folder = workspace(tmp_path / ODD, 2, 3)
    edit(folder / "m03_activations.py", "    return xp.maximum(x, 0)\n", "    return xp.maximum(x, 7)\n")
    (folder / "below").mkdir()
    program = """
import tinytorch
from tinytorch.learn.importing import in_force, which
print(tinytorch.relu(tinytorch.tensor([1.0, 9.0])).tolist(), tinytorch.nn.ReLU()(tinytorch.zeros(1)).tolist())
print(in_force().root)
for used in which()[:4]:
    print(used.module.number, used.own, used.file)
"""
    lines = text(folder / "below", "-c", program).splitlines()
    package = root / "tinytorch"
    assert lines == [
        "[7.0, 9.0] [7.0]",
        f"{folder}",
        f"1 False {package / 'm01_setup.py'}",
        f"2 True {folder / 'm02_tensor.py'}",
        f"3 True {folder / 'm03_activations.py'}",
        f"4 False {package / 'm04_layers.py'}",
    ]
    assert sorted(path.name for path in folder.iterdir()) == [".tinytorch", "below", "m02_tensor.py", "m03_activations.py"]


def test_a_notebook_is_a_module_too(tmp_path: Path) -> None:
    Workspace.create(tmp_path / ODD)
    write_notebook(tmp_path / ODD, 3, "def mine():\n    # the learner's\n    raise ValueError('übel')\n")
    program = """
import traceback
from tinytorch.m03_activations import mine, relu
try:
    mine()
except ValueError:
    print(traceback.format_exc())
import inspect
print(inspect.getsource(mine))
"""
    lines = text(tmp_path / ODD, "-c", program).splitlines()
    (place,) = [i for i, line in enumerate(lines) if 'm03_activations.ipynb", line ' in line and line.endswith("in mine")]
    assert lines[place + 1].strip() == "raise ValueError('übel')"
    assert "    # the learner's" in lines


def test_a_traceback_shows_the_learners_line(tmp_path: Path) -> None:
    folder = workspace(tmp_path / ODD, 3)
    edit(folder / "m03_activations.py", "    return xp.maximum(x, 0)\n", "    return xp.maximum(x, 1 / 0)\n")
    done = run(folder, "-c", "import tinytorch; tinytorch.relu(tinytorch.ones(2))")
    number = (folder / "m03_activations.py").read_text(encoding="utf-8").splitlines().index(
        "    return xp.maximum(x, 1 / 0)"
    ) + 1
    assert f'File "{folder / "m03_activations.py"}", line {number}, in relu\n    return xp.maximum(x, 1 / 0)' in done.stderr


def test_what_the_file_holds_is_what_runs_and_nothing_is_written_beside_it(tmp_path: Path) -> None:
    folder = workspace(tmp_path, 1)
    file = folder / "m01_setup.py"
    for answer in "12":  # of the same size, and written in the same second
        file.write_text(f"{reference(1)}\nANSWER = {answer}\n", encoding="utf-8")
        os.utime(file, (10**9, 10**9))
        assert text(folder, "-c", "from tinytorch.m01_setup import ANSWER; print(ANSWER)") == answer
    assert sorted(os.listdir(folder)) == [".tinytorch", "m01_setup.py"]
    assert os.listdir(folder / ".tinytorch") == ["workspace.json"]


COPIES = {
    "by the short name": "import m02_tensor as a, tinytorch.m02_tensor as b",
    "by the short name, after the long one": "import tinytorch.m02_tensor as b, m02_tensor as a",
}


@pytest.mark.parametrize("imports", COPIES.values(), ids=COPIES)
def test_there_is_one_copy_of_a_module(imports: str, tmp_path: Path) -> None:
    folder = workspace(tmp_path, 2)
    program = f"{imports}; import tinytorch; print(a is b, tinytorch.Tensor is a.Tensor, a.__spec__.name)"
    short = imports.startswith("import m02")
    assert text(folder, "-c", program) == f"True True {'' if short else 'tinytorch.'}m02_tensor"


@pytest.mark.parametrize("arguments", [["m03_activations.py"], ["-m", "tinytorch.m03_activations"]])
def test_a_file_that_is_run_is_the_only_copy_of_itself(arguments: list[str], tmp_path: Path) -> None:
    folder = workspace(tmp_path, 3)
    edit(folder / "m03_activations.py", 'if __name__ == "__main__":\n', """
import sys
if __name__ == "__main__":
    import tinytorch
    print(tinytorch.nn.ReLU is ReLU, sys.modules["tinytorch.m03_activations"] is sys.modules["__main__"])
""")  # fmt: skip
    lines = text(folder, *arguments, "--tests-only").splitlines()
    assert lines[0] == "True True"
    assert any(line.startswith("  ok    test_") for line in lines)


# -- which workspace ---------------------------------------------------------------------------------------------------

WHERE = "import tinytorch; found = tinytorch._workspace(); print(found)"


def test_the_variable_then_the_programs_folder_then_the_nearest_one_upwards(tmp_path: Path) -> None:
    here, other, third = (workspace(tmp_path / name) for name in ("here", "other", "third"))
    (inner := here / "in" / "ner").mkdir(parents=True)
    (other / "program.py").write_text(WHERE)
    assert text(inner, "-c", WHERE) == str(here)
    assert text(inner, str(other / "program.py")) == str(other)
    assert text(inner, str(other / "program.py"), TINYTORCH_WORKSPACE=str(third)) == str(third)
    assert text(tmp_path, "-c", WHERE) == "None"
    for folder, variables in ((inner, {}), (inner, {"TINYTORCH_WORKSPACE": str(third)}), (tmp_path, {})):
        program = "from tinytorch.learn.workspace import Workspace; w = Workspace.find(); print(w and w.root)"
        assert text(folder, "-c", program, **variables) == text(folder, "-c", WHERE, **variables)


def test_outside_of_a_workspace_nothing_of_it_is_loaded(tmp_path: Path) -> None:
    program = "import sys; before = {*sys.modules}; import tinytorch; print(*{*sys.modules} - before, sys.meta_path)"
    outside, inside = (text(folder, "-c", program) for folder in (tmp_path, workspace(tmp_path / "inside", 2)))
    assert "tinytorch.learn" not in outside
    assert "tinytorch.learn.importing.Finder" in inside


def test_processes_in_different_folders_do_not_meet(tmp_path: Path) -> None:
    program = "import tinytorch; print(tinytorch.relu(tinytorch.tensor([1.0])).item())"
    for bound in (5, 6):
        folder = workspace(tmp_path / str(bound), 3)
        edit(folder / "m03_activations.py", "    return xp.maximum(x, 0)\n", f"    return xp.maximum(x, {bound})\n")
    for folder, expected in (("5", "5.0"), ("6", "6.0"), ("5", "5.0"), (".", "1.0")):
        assert text(tmp_path / folder, "-c", program) == expected


# -- what is wrong -----------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_python_is_named_with_its_line_and_the_doctor_works(tmp_path: Path) -> None:
    folder = workspace(tmp_path / ODD, 1)
    file = folder / "m01_setup.py"
    file.write_text("import os\nx = (\n")
    done = run(folder, "-c", "import tinytorch; tinytorch.relu")
    assert done.stderr.splitlines()[-4].strip() == f'File "{file}", line 2'
    assert done.stderr.splitlines()[-1] == "SyntaxError: '(' was never closed"
    done = run(folder, "-m", "tinytorch", "milestone", "run", "xor")
    assert (done.returncode, done.stderr) == (1, f"tinytorch: {file}, line 2: '(' was never closed\n")
    assert {"name": "Python"}.items() <= json.loads(text(folder, "-m", "tinytorch", "doctor", "--json"))[0].items()


def test_a_workspace_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    folder = workspace(tmp_path / ODD, 2)
    file = write_notebook(folder, 2)
    for message, variables in (
        (f"m02_tensor.py and m02_tensor.ipynb are both in {folder}", {}),
        (f"TINYTORCH_WORKSPACE: {tmp_path} is no workspace", {"TINYTORCH_WORKSPACE": str(tmp_path)}),
    ):
        done = run(folder, "-m", "tinytorch", "milestone", "run", "xor", **variables)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert message in done.stderr
    (folder / "m02_tensor.py").unlink()
    file.write_text("{")
    done = run(folder, "-m", "tinytorch", "milestone", "run", "xor")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{file}: no notebook of format 4" in done.stderr


# -- kernels -----------------------------------------------------------------------------------------------------------

COUNTED = {  # module: what stands behind the line at which a call is counted
    2: ("def matmul(xp, a, b):\n", "matmul"),
    3: ("def relu(xp, x):\n", "relu"),
    9: ("def convolution(xp, x, weight, bias=None, *, windows, groups):\n", "convolution"),
    13: ("def attention(xp, query, key, value, mask=None, *, is_causal=False, scale=None):\n", "attention"),
}


def counting(folder: Path, number: int, line: str, name: str) -> None:
    """Have a learner's function count its calls, in `sys.counts`."""
    count = f"    import sys; sys.counts = getattr(sys, 'counts', []) + [{name!r}]\n"
    edit(folder / f"{MODULES[number - 1].file}.py", line, line + count)


STEP = """
import sys
import tinytorch
from tinytorch import nn, optim
from tinytorch.m09_spatial import SimpleCNN
tinytorch.manual_seed(0)
sys.counts = []
model = SimpleCNN()
optimizer = optim.Adam(model.parameters())
nn.functional.cross_entropy(model(tinytorch.randn(16, 3, 32, 32)), tinytorch.arange(10).repeat(2)[:16]).backward()
optimizer.step()
tinytorch.randn(256, 256) @ tinytorch.randn(256, 256)
print({name: sys.counts.count(name) for name in ("matmul", "relu", "convolution", "Adam")}, len(list(model.parameters())))
"""


def test_the_learners_operations_and_optimizer_run_in_a_network(tmp_path: Path) -> None:
    folder = workspace(tmp_path, 2, 3, 7, 9)
    for number in (2, 3, 9):
        counting(folder, number, *COUNTED[number])
    start = (folder / "m07_optimizers.py").read_text(encoding="utf-8")
    place = start.index("def update(", start.index("class Adam(")) 
    line = start[place : start.index("\n", place) + 1]
    counted = start[:place] + line + "        import sys; sys.counts.append('Adam')\n" + start[place + len(line) :]
    (folder / "m07_optimizers.py").write_text(counted, encoding="utf-8")
    found = text(folder, "-c", STEP)
    print(found)
    assert text(folder, "-c", STEP, TINYTORCH_LEARN_KERNELS="1").startswith(
        "{'matmul': 0, 'relu': 0, 'convolution': 0, 'Adam': 0}"
    )
