"""The table of the course tells the truth, and every chapter has its eight parts."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
import types

import pytest

import tinytorch
from tinytorch import curriculum
from tinytorch.curriculum import FACES, MODULES, Module

PARTS = [
    "Mathematical foundations",
    "Implementation",
    "Systems analysis",
    "Production context",
    "Integration testing",
    "Thinking questions",
    "Summary",
]
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u2b50\u2b55\ufe0f]")

each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.file)


def package_of(face: str) -> types.ModuleType:
    return importlib.import_module(f"tinytorch.{face}".rstrip("."))


def prose_share(lines: list[str]) -> float:
    """Which part of the lines that are not empty stands in markdown cells."""
    prose, total, in_prose = 0, 0, False
    for line in lines:
        if line.startswith("# %%"):
            in_prose = "[markdown]" in line
        if line.strip():
            total += 1
            prose += in_prose and line.startswith("#")
    return prose / total


@each_module
@pytest.mark.parametrize("face", FACES)
def test_every_listed_name_exists(module: Module, face: str) -> None:
    missing = []
    for name in module.names(face):
        try:
            getattr(package_of(face), name)
        except ImportError as error:
            missing.append(str(error))
    assert not missing, "\n".join(missing)


@each_module
def test_the_faces_of_a_module_exist(module: Module) -> None:
    assert set(module.exports) <= set(FACES)


def test_no_name_is_listed_twice_in_a_face() -> None:
    for face in FACES:
        names = [name for module in MODULES for name in module.names(face)]
        assert len(names) == len(set(names)), (
            f"{face or 'tinytorch'}: {sorted({n for n in names if names.count(n) > 1})}"
        )


@each_module
def test_a_chapter_has_its_eight_parts(module: Module, root) -> None:
    source = (root / "tinytorch" / f"{module.file}.py").read_text(encoding="utf-8")
    assert "Learning objectives" in (ast.get_docstring(ast.parse(source)) or "")
    cells = re.split(r"^# %%", source, flags=re.MULTILINE)
    headings = [
        h for cell in cells if cell.startswith(" [markdown]") for h in re.findall(r"^# ## (.+)$", cell, re.MULTILINE)
    ]
    assert headings == PARTS
    lines = source.splitlines()
    first_cell = next(i for i, line in enumerate(lines) if line.startswith("# %%"))
    # What there is to read: the formatter decides on blank lines and on how many lines an import takes.
    assert 150 <= sum(bool(line.strip()) for line in lines[first_cell:]) <= 700
    assert prose_share(lines) <= 0.4
    tree = ast.parse(source)
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert "analyze" in defined
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    run_module(globals())"


@each_module
def test_a_module_has_a_checkpoint(module: Module, root) -> None:
    assert (root / "tests" / "checkpoints" / f"test_{module.number:02}_{module.name}.py").is_file()


def test_no_source_holds_emoji(root) -> None:
    folders = ("tinytorch", "backends", "kernels", "milestones", "profiling", "tests")
    for path in (path for folder in folders for path in (root / folder).rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not EMOJI.search(line), f"{path.relative_to(root)}:{number}: {line}"


def test_every_chapter_on_disk_is_in_the_table(root) -> None:
    on_disk = {path.stem for path in (root / "tinytorch").glob("m[0-9][0-9]_*.py")}
    files = {module.file for module in MODULES}
    assert files <= on_disk <= files | {module.appendix for module in MODULES}
    assert [module.number for module in MODULES] == sorted({module.number for module in MODULES})


def test_import_linter_knows_every_module(root) -> None:
    with open(root / "pyproject.toml", "rb") as file:
        layers, forbidden = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    wanted = [
        name for module in reversed(MODULES) for name in (f"(tinytorch.{module.appendix})", f"tinytorch.{module.file}")
    ]
    assert [name for name in layers["layers"] if re.match(r"\(?tinytorch\.m\d\d_", name)] == wanted
    modules = [name for module in MODULES if module.number > 1 for name in module.modules()]
    assert sorted(forbidden["source_modules"]) == sorted(modules)


def test_the_faces_on_disk_are_those_of_the_table(root) -> None:
    package = root / "tinytorch"
    folders = (
        "amp",
        "autograd",
        "compression",
        "cuda",
        "datasets",
        "nn",
        "optim",
        "profiler",
        "quantization",
        "transforms",
        "utils",
    )
    files = [path for folder in folders for path in (package / folder).rglob("*.py")]
    found = {
        str(path.relative_to(package).with_suffix("")).replace("/", ".").removesuffix(".__init__") for path in files
    }
    assert found == set(FACES) - {""}


def test_an_unknown_name_is_an_attribute_error_with_close_names() -> None:
    with pytest.raises(
        AttributeError, match=r"module 'tinytorch' has no attribute 'manual_sed'; did you mean manual_seed"
    ):
        tinytorch.manual_sed  # noqa: B018
    with pytest.raises(
        AttributeError, match=r"'tinytorch.optim' has no attribute 'Linear'; it is tinytorch\.nn\.Linear"
    ):
        importlib.import_module("tinytorch.optim").Linear  # noqa: B018
    with pytest.raises(ImportError):
        exec("from tinytorch.nn import Liner")


def test_a_name_that_the_module_lacks_is_an_error_that_names_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module(1, "setup", "Setup", "Foundations", "", {"": "not_there"})
    with pytest.raises(ImportError, match=r"m01_setup exports 'not_there', but tinytorch\.m01_setup"):
        curriculum.find_export(module, "", "not_there")


def test_faces_show_their_names() -> None:
    assert {"nn", "optim", "doctor", "manual_seed"} <= set(dir(tinytorch))
    assert {"functional", "init", "utils"} <= set(dir(tinytorch.nn))
    assert tinytorch.nn.functional is sys.modules["tinytorch.nn.functional"]


@each_module
def test_a_module_is_found_by_number_and_name(module: Module) -> None:
    for label in (str(module.number), f"{module.number:02}", module.name, module.file):
        assert curriculum.find_module(label) is module
    with pytest.raises(ValueError, match="no module '99'; the modules are 01 setup"):
        curriculum.find_module("99")


def test_tests_and_programs_see_one_copy_of_a_chapter(request: pytest.FixtureRequest) -> None:
    import tinytorch.m01_setup

    copies = {item.module for item in request.session.items if item.module.__name__.endswith("m01_setup")}
    assert copies <= {tinytorch.m01_setup}


def test_the_readme_shows_the_table(root) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    for module in MODULES:
        goal = module.checkpoint[0].lower() + module.checkpoint[1:]
        assert f"| {module.number:02} | [{module.name}](tinytorch/{module.file}.py) | {goal} |" in text


def test_ci_runs_the_readmes_test_command(root) -> None:
    command = "pip install nox && nox -s tests-cpu tests-gpu"
    assert command in (root / ".ci" / "run").read_text(encoding="utf-8")
    assert command in (root / "README.md").read_text(encoding="utf-8").replace(".venv/bin/", "")
