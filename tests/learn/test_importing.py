"""In a workspace, `import tinytorch` is the learner's: each test starts Python in one, as a learner does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.learn.every_k import check, run, workspace
from tinytorch.curriculum import MODULES
from tinytorch.learn.exercises import reference
from tinytorch.learn.workspace import Workspace
from tinytorch.milestones import perceptron

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
    assert sorted(path.name for path in folder.iterdir()) == [
        ".tinytorch",
        "below",
        "m02_tensor.py",
        "m03_activations.py",
    ]


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
    (place,) = [
        i for i, line in enumerate(lines) if 'm03_activations.ipynb", line ' in line and line.endswith("in mine")
    ]
    assert lines[place + 1].strip() == "raise ValueError('übel')"
    assert "    # the learner's" in lines


def test_a_traceback_shows_the_learners_line(tmp_path: Path) -> None:
    folder = workspace(tmp_path / ODD, 3)
    edit(folder / "m03_activations.py", "    return xp.maximum(x, 0)\n", "    return xp.maximum(x, 1 / 0)\n")
    done = run(folder, "-c", "import tinytorch; tinytorch.relu(tinytorch.ones(2))")
    lines = (folder / "m03_activations.py").read_text(encoding="utf-8").splitlines()
    wrong = "    return xp.maximum(x, 1 / 0)"
    shown = f'File "{folder / "m03_activations.py"}", line {lines.index(wrong) + 1}, in relu\n{wrong}\n'
    assert shown in done.stderr


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
    "by the short name, after tinytorch": "import tinytorch, m02_tensor as a, tinytorch.m02_tensor as b",
    "by the short name, after the long one": "import tinytorch.m02_tensor as b, m02_tensor as a",
}


@pytest.mark.parametrize("imports", COPIES.values(), ids=COPIES)
def test_there_is_one_copy_of_a_module(imports: str, tmp_path: Path) -> None:
    folder = workspace(tmp_path, 2)
    program = f"{imports}; import tinytorch; print(a is b, tinytorch.Tensor is a.Tensor, a.__spec__.name)"
    name = "tinytorch.m02_tensor" if imports.endswith("m02_tensor as a") else "m02_tensor"  # that of the first import
    assert text(folder, "-c", program) == f"True True {name}"


@pytest.mark.parametrize("arguments", [["m03_activations.py"], ["-m", "tinytorch.m03_activations"]])
def test_a_file_that_is_run_is_the_only_copy_of_itself(arguments: list[str], tmp_path: Path) -> None:
    folder = workspace(tmp_path, 3)
    edit(folder / "m03_activations.py", 'if __name__ == "__main__":\n', """
def is_the_only_one():
    import tinytorch
    return tinytorch.nn.ReLU is ReLU


if __name__ == "__main__":
    from multiprocessing import get_context
    with get_context("spawn").Pool(1) as pool:
        print(is_the_only_one(), pool.apply(is_the_only_one))
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
    (folder / "m02_tensor.py").write_bytes("ö".encode("utf-16"))  # as some editors and shells write on Windows
    file.unlink()
    done = run(folder, "-m", "tinytorch", "milestone", "run", "xor")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "m02_tensor.py" in done.stderr
    (folder / "m02_tensor.py").unlink()
    file.write_text("{")
    done = run(folder, "-m", "tinytorch", "milestone", "run", "xor")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{file}: no notebook of format 4" in done.stderr


# -- kernels -----------------------------------------------------------------------------------------------------------

COUNTED = {
    2: "def matmul(xp, a, b):\n",
    3: "def relu(xp, x):\n",
    9: "def convolution(xp, x, weight, bias=None, *, windows, groups):\n",
    13: "def attention(xp, query, key, value, mask=None, *, is_causal=False, scale=None):\n",
}


def counting(root: Path, *numbers: int) -> Path:
    """A workspace whose operations note their calls in `sys.calls`; of module 07, Adam's update does."""
    folder = workspace(root, *numbers)
    for number in numbers:
        file = folder / f"{MODULES[number - 1].file}.py"
        text = file.read_text(encoding="utf-8")
        if number == 7:
            start = text.index("def update(", text.index("class Adam("))
            line = text[start : text.index("\n", start) + 1]
            text = text[:start] + text[start:].replace(line, f"{line}        sys.calls.append('Adam')\n", 1)
        else:
            line = COUNTED[number]
            name = line.partition("(")[0].removeprefix("def ")
            assert text.count(line) == 1
            text = text.replace(line, f"{line}    sys.calls.append('{name}')\n")
        text = text.replace("\nimport math\n", "\nimport math\nimport sys\n", 1)
        assert "import sys" in text
        file.write_text(text, encoding="utf-8")
    return folder


STEP = """
import sys
sys.calls = []
import tinytorch
from tinytorch import nn, optim
from tinytorch.m09_spatial import SimpleCNN
model = SimpleCNN()
optimizer = optim.Adam(model.parameters())
def step():
    sys.calls.clear()
    pictures, labels = tinytorch.randn(16, 3, 32, 32), tinytorch.arange(10).repeat(2)[:16]
    nn.functional.cross_entropy(model(pictures), labels).backward()
    optimizer.step()
    tinytorch.randn(256, 256) @ tinytorch.randn(256, 256)
    print(*(sys.calls.count(name) for name in ("matmul", "relu", "convolution", "Adam")), len(optimizer.state))
step()
from tinytorch.learn.importing import use_kernels
use_kernels()
step()
"""


def test_the_learners_operations_and_optimizer_run_in_a_network_unless_kernels_are_asked_for(tmp_path: Path) -> None:
    lines = text(counting(tmp_path, 2, 3, 7, 9), "-c", STEP).splitlines()
    assert lines == ["1 3 2 8 8", "0 0 0 0 8"]


WRITE = """
import sys
sys.calls = []
from tinytorch import GPT, GPTConfig
from tinytorch.m19_caching import KVCache
model = GPT(GPTConfig(vocab_size=13, context_length=12, num_layers=2, num_heads=2, embed_dim=8))
model.generate([1, 2, 3], 4)
print(*(sys.calls.count(name) for name in ("attention", "relu")), KVCache(model)._at_once())
"""


def test_a_gpt_that_writes_runs_the_learners_attention(tmp_path: Path) -> None:
    folder = counting(tmp_path, 13)
    assert text(folder, "-c", WRITE) == "8 0 False"  # two layers, for each of four tokens
    assert text(folder, "-c", WRITE, TINYTORCH_LEARN_KERNELS="1") == "0 0 True"


ATTACHED = """
import json
import tinytorch
from tinytorch.m02_tensor import Op
tinytorch.relu
from tinytorch.m04_layers import FUSIONS
from tinytorch.m07_optimizers import Optimizer
from tinytorch.m14_transformers import READERS
from tinytorch.m16_acceleration import KERNELS
def attached():
    places = {name: {b: [when.__qualname__ for when, _ in pairs] for b, pairs in op.implementations.items()}
              for name, op in Op.registry.items() if op.implementations}
    kinds = sorted(kind.__name__ for kind in Optimizer.together)
    return [places, kinds, len(FUSIONS), len(READERS), sorted(f"{k.op.name} {k.backend} {k.place}" for k in KERNELS)]
found = [attached()]
from tinytorch.learn.importing import use_kernels
use_kernels()
print(json.dumps([*found, attached()]))
"""


def test_only_what_would_hide_the_learners_code_gives_way(tmp_path: Path) -> None:
    whole, again = json.loads(text(tmp_path, "-c", ATTACHED))
    assert whole == again
    outside = set(whole[0])
    gone = {}
    chosen = {"1": [1], "2": [2], "3": [3], "4": [4], "7": [7], "9": [9], "12": [12], "1 to 20": range(1, 21)}
    for name, numbers in chosen.items():
        now, back = json.loads(text(workspace(tmp_path / name, *numbers), "-c", ATTACHED))
        assert back == whole
        assert {line.split()[0] for line in now[4]} == set(now[0])
        gone[name] = outside - set(now[0]), now[1], now[2], now[3]
    kinds = ["Adam", "AdamW", "SGD"]
    assert gone["1"] == (set(), kinds, 2, 2)
    assert {"matmul", "exp", "sum", "decode"} <= gone["2"][0]
    assert not {"relu", "convolution", "linear", "attention"} & gone["2"][0]  # their own code multiplies by itself
    assert gone["2"][1:] == (kinds, 2, 2)
    assert gone["3"][2] == 0  # what is done in one with a ReLU
    assert {"linear", "linear_relu"} <= gone["4"][0]
    assert gone["4"][1:3] == (kinds, 1)
    assert gone["7"] == (set(), [], 2, 2)
    assert {"convolution", "convolution_relu", "max_pool", "normalize", "decode"} <= gone["9"][0]
    assert gone["9"][1:] == (kinds, 1, 2)
    assert {"rotate", "decode", "embedding_weight_gradient"} == gone["12"][0]
    assert gone["12"][1:] == (kinds, 2, 1)
    # What stands in appendices is the package's, and has its kernels; module 19's reader is the learner's own here.
    assert outside - gone["1 to 20"][0] <= {"erf", "tanh", "gelu_gradient", "avg_pool_gradient", "int4_linear"}
    assert gone["1 to 20"][1:] == ([], 0, 2)


def test_a_kernel_of_the_learners_own_stays(tmp_path: Path) -> None:
    folder = workspace(tmp_path, 3, 16)
    edit(folder / "m16_acceleration.py", "# %% [markdown]\n# ## Systems analysis\n", """
def seven(xp, x):
    return x * 0 + 7

attach(relu, "numpy", f"{__name__}:seven", lambda x: True, "always")

# %% [markdown]
# ## Systems analysis
""")  # fmt: skip
    program = "import tinytorch; print(tinytorch.relu(tinytorch.ones(3)).tolist())"
    assert text(folder, "-c", program) == "[7.0, 7.0, 7.0]"


# -- all together ------------------------------------------------------------------------------------------------------


def test_a_milestone_says_on_whose_modules_it_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = counting(tmp_path, 2, 7)
    (folder / "m19_caching.py").write_text(reference(19), encoding="utf-8")  # XOR needs no cache
    program = """
import sys
sys.calls = []
from tinytorch.milestones.xor import main
for more in ([], ["--kernels"]):
    main(["--epochs", "1", "--out", "runs", *more])
    print(sys.calls.count("Adam"))
    sys.calls.clear()
"""
    lines = text(folder, "-c", program).splitlines()
    said = "this ran on your tensors, your optimizers"
    assert [line for line in lines if line in (said, "6", "0")] == [said, "6", said, "0"]
    perceptron.main(["--epochs", "1", "--out", str(tmp_path / "out")])
    assert "this ran on" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("k", [6, 13])  # every k: python tests/learn/every_k.py
def test_the_package_works_above_a_learners_modules(k: int, tmp_path: Path) -> None:
    assert check(tmp_path / ODD, *range(1, k + 1)) == []
