"""The commands `tinytorch learn …`: build the modules yourself, in a folder of your own."""

from __future__ import annotations

import ast
import importlib
import io
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import unified_diff
from pathlib import Path
from typing import Annotated, Any

import typer

import tinytorch
from tinytorch.curriculum import MODULES, Module, find_module
from tinytorch.learn import exercises
from tinytorch.learn.checking import check_command
from tinytorch.learn.exercises import Exercise, definition
from tinytorch.learn.grading import grade_command
from tinytorch.learn.workspace import Update, Workspace, digest, in_cells
from tinytorch.terminal import JsonOption, fail

app = typer.Typer(
    help="Build the modules yourself, and run everything else on your own code.",
    epilog="Example: tinytorch learn start 02",
    rich_markup_mode=None,
)

ModuleArgument = Annotated[str, typer.Argument(metavar="MODULE", help="Its number or name: 2, 02 or tensor.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The exercise: relu, or Linear.forward.")]
LEVELS = 3
STATES = ("passed", "failed", "not written", "unchecked")
# Fields of statements that a skeleton keeps.
KEPT = ("targets", "target", "annotation", "optional_vars", "args", "returns", "decorator_list", "pattern")
WIDTH = 80


@app.callback()
def _root() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # chapters hold signs that a Windows pipe's encoding may lack


app.command("check", epilog="Examples: tinytorch learn check 02; tinytorch learn check tensor --json")(check_command)
app.command("grade", epilog="Example: tinytorch learn grade submissions/ --csv --out grades.csv")(grade_command)


@app.command(epilog="Examples: tinytorch learn start 02; tinytorch learn start tensor --notebook")
def start(
    module: ModuleArgument,
    notebook: Annotated[bool, typer.Option("--notebook", help="Make a notebook, not a Python file.")] = False,
) -> None:
    """Begin a module: writes it without its solutions into your workspace."""
    with refused():
        found = find_module(module)
        existing = Workspace.find()
        workspace = existing or Workspace(Path.cwd())
        path = workspace.start(found.number, notebook)
        known = exercises.exercises(found.number)
    if existing is None:
        print_wrapped(f"This folder is your workspace now: {workspace.root}")
    print(f"Module {found.number:02} is {path.name}: {counted(len(known), 'exercise')}, the first is {known[0].name}.")
    print("Write it in the place of `raise NotImplementedError`, then see what tests say:")
    print(f"  tinytorch learn check {found.number:02}")
    print(f"  tinytorch learn hint {found.number:02} {known[0].name}")


@app.command(epilog="Examples: tinytorch learn hint 02 matmul; tinytorch learn hint 02 matmul --level 3")
def hint(
    module: ModuleArgument,
    name: NameArgument,
    level: Annotated[int | None, typer.Option(min=1, max=LEVELS, help="1, 2 or 3 (the next one).")] = None,
) -> None:
    """Help with an exercise: what it is about, then what a solution uses, then the frame of one."""
    with refused():
        workspace, found, exercise = exercise_of(module, name)
        taken = workspace.progress().get(str(found.number), {}).get("hints", {}).get(exercise.name, 0)
        level = level or min(taken + 1, LEVELS)
        workspace.record_hint(found.number, exercise.name, level)
    print(f"{exercise.name}, hint {level} of {LEVELS}\n")
    print((about, ingredients, skeleton)[level - 1](exercise))


@app.command(epilog="Example: tinytorch learn solution 02 matmul")
def solution(module: ModuleArgument, name: NameArgument) -> None:
    """Show how the reference solves an exercise; your progress says that you looked."""
    with refused():
        workspace, found, exercise = exercise_of(module, name)
        workspace.record_solution(found.number, exercise.name)
    print(exercise.source)


@app.command(epilog="Examples: tinytorch learn diff 02; tinytorch learn diff 02 --all")
def diff(
    module: ModuleArgument,
    everything: Annotated[bool, typer.Option("--all", help="The whole text, not the exercises alone.")] = False,
) -> None:
    """Show how your exercises differ from the reference's; those that it shows count as solutions looked at."""
    with refused():
        workspace, found = in_force(), find_module(module)
        path, text = workspace.existing(found.number), workspace.text(found.number)
        other = exercises.reference(found.number)
        if path.suffix == ".ipynb":
            other = in_cells(other)
        known = exercises.exercises(found.number)
        own = own_definitions(path, text, known)
        written = [each for each in known if everything or not is_unwritten(text, each.name)]
        different = [each for each in written if own.get(each.name) != each.source.splitlines()]
        for exercise in different:
            workspace.record_solution(found.number, exercise.name)
    if everything:
        print_diff(text.splitlines(), other.splitlines(), found.file)
        return
    for exercise in different:
        print_diff(own.get(exercise.name, []), exercise.source.splitlines(), exercise.name)
    if same := len(written) - len(different):
        print(f"as the reference has it: {counted(same, 'exercise')}")
    if missing := [each.name for each in known if each not in written]:
        print_wrapped(f"not written yet: {', '.join(missing)}")


@app.command(epilog="Example: tinytorch learn status --json")
def status(as_json: JsonOption = False) -> None:
    """Show the road: what of each module you have written and passed, and which milestones are ready."""
    with refused():
        workspace = in_force()
        modules, behind = road(workspace), workspace.version() != tinytorch.__version__
        ahead = milestones(modules)
    if as_json:
        print(json.dumps({"workspace": str(workspace.root), "modules": modules, "milestones": ahead}, indent=2))
        return
    print_wrapped(f"Your workspace: {workspace.root}")
    print(f"\n{'':<17}{'passed':>9}{'failed':>8}{'not written':>13}{'unchecked':>11}  checkpoint")
    for row in modules:
        typer.echo(road_line(row))
    print()
    for each in ahead:
        what = (
            typer.style("ready", fg="green")
            if each["ready"]
            else "needs " + ", ".join(f"{number:02}" for number in each["needs"])
        )
        typer.echo(f"{'milestone ' + each['name']:<22}{what}")
    if any(row["changed"] for row in modules):
        print("\n* changed since it was checked: tinytorch learn check MODULE")
    if behind:
        print("\nTinyTorch is another version than your files are of: tinytorch learn update")


@app.command(epilog="Example: tinytorch learn which --json")
def which(as_json: JsonOption = False) -> None:
    """Say for each module whose code runs here: yours or the reference."""
    with refused():
        workspace = in_force()
        files = [workspace.file(module.number) for module in MODULES]
    rows: list[dict[str, Any]] = [
        {
            "number": module.number,
            "name": module.name,
            "yours": path is not None,
            "file": str(path or exercises.CHAPTERS / f"{module.file}.py"),
        }
        for module, path in zip(MODULES, files, strict=True)
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print_wrapped(f"Your workspace: {workspace.root}")
    for row in rows:
        whose = typer.style(f"yours      {Path(row['file']).name}", fg="green") if row["yours"] else "reference"
        typer.echo(f"{row['number']:02} {row['name']:<13} {whose}")


@app.command(epilog="Example: tinytorch learn update")
def update(as_json: JsonOption = False) -> None:
    """Bring what is new in TinyTorch's chapters into your files; what you changed stays yours."""
    with refused():
        done = in_force().update()
    if as_json:
        print(json.dumps([update_row(each) for each in done], indent=2))
        return
    for each in done:
        print_wrapped(f"{each.path.name}: {in_words(each)}")
        if each.backup:
            print_wrapped(f"as it was before: {each.backup}", "  ")
        for conflict in each.conflicts:
            print(f"  line {conflict.line} is yours; this is new in the chapter there:")
            print("\n".join(f"    {line}" for line in conflict.diff()))
    if not done:
        print("You have no modules yet; begin with: tinytorch learn start 02")


# -- hints -------------------------------------------------------------------------------------------------------------


def about(exercise: Exercise) -> str:
    """The first hint: what the chapter says before the definition, and the definition's docstring."""
    docstring = ast.get_docstring(parsed(exercise))
    return "\n\n".join(paragraphs(text) for text in (exercise.prose, docstring) if text) or "The chapter says no more."


def ingredients(exercise: Exercise) -> str:
    """The second: what a solution calls and reads, in its order, and the tests that it has to pass."""
    node = parsed(exercise)
    own = {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
    own |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    own |= {str(each.name) for each in ast.walk(node) if isinstance(each, ast.ExceptHandler | ast.FunctionDef)}
    calls: dict[str, None] = {}
    reads: dict[str, None] = {}

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            calls[dotted(node.func)] = None
            below(node.func)
            for child in (*node.args, *node.keywords):
                visit(child)
        elif isinstance(node, ast.Attribute | ast.Name):
            if isinstance(node.ctx, ast.Load) and dotted(node) not in own:
                reads[dotted(node)] = None
            below(node)
        else:
            for field, value in ast.iter_fields(node):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST) and field not in ("annotation", "returns"):
                        visit(child)

    def below(node: ast.AST) -> None:
        """What has the attributes, where it is no mere name: the call in f(x).shape."""
        while isinstance(node, ast.Attribute):
            node = node.value
        if not isinstance(node, ast.Name):
            visit(node)

    for statement in solution_body(node):
        visit(statement)
    lines = [("It calls", calls), ("It reads", {name: None for name in reads if name not in calls})]
    lines.append(("Its tests", dict.fromkeys(exercise.tests)))
    return "\n".join(wrapped(f"{label}: {', '.join(names)}") for label, names in lines if names)


def skeleton(exercise: Exercise) -> str:
    """The third: the solution's statements with `…` for what they compute."""
    node = parsed(exercise)
    first = node.body[0]
    signature = textwrap.dedent(exercise.source).splitlines()
    body = solution_body(node)
    for statement in body:
        emptied(statement)
    if first not in body:
        head = signature[: first.end_lineno]  # with the docstring
    else:
        head = signature[: first.lineno - 1] or [signature[0][: first.col_offset].rstrip()]
    return "\n".join([*head, textwrap.indent("\n".join(map(ast.unparse, body)), " " * 4)])


def emptied(node: ast.AST) -> None:
    """Put `…` in the place of a statement's expressions; what is assigned to stays, and a function's signature."""
    kept = () if isinstance(node, ast.For | ast.AsyncFor) else KEPT
    for field, value in ast.iter_fields(node):
        if isinstance(value, ast.expr) and field not in kept:
            setattr(node, field, ast.Name("…"))
        elif isinstance(value, list) and field not in kept:
            for child in value:
                if not isinstance(child, ast.expr):
                    emptied(child)


def parsed(exercise: Exercise) -> exercises.Definition:
    (node,) = ast.parse(textwrap.dedent(exercise.source)).body
    assert isinstance(node, exercises.Definition)
    return node


def solution_body(node: exercises.Definition) -> list[ast.stmt]:
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def dotted(node: ast.AST) -> str:
    """A name with its attributes, "x.shape"; "….sum" for one of something that has no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "…"


# -- the learner's text ------------------------------------------------------------------------------------------------


def in_force() -> Workspace:
    workspace = Workspace.find()
    if workspace is None:
        raise ValueError("neither this folder nor one above is a workspace; begin with: tinytorch learn start 02")
    return workspace


def exercise_of(module: str, name: str) -> tuple[Workspace, Module, Exercise]:
    workspace, found = in_force(), find_module(module)
    return workspace, found, exercises.find_exercise(found.number, name)


def is_unwritten(text: str, name: str) -> bool:
    """Whether what stood in the place of a solution still does."""
    return f'NotImplementedError("exercise {name}:' in text


def own_definitions(path: Path, text: str, known: list[Exercise]) -> dict[str, list[str]]:
    """The lines of the learner's definitions, of those exercises that there are; ValueError for what is no Python."""
    try:
        tree, lines = ast.parse(text), text.splitlines()
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from error
    found = {}
    for exercise in known:
        with suppress(ValueError):
            node = definition(tree, exercise.name)
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            found[exercise.name] = lines[first - 1 : node.end_lineno]
    return found


# -- the road ----------------------------------------------------------------------------------------------------------


def road(workspace: Workspace) -> list[dict[str, Any]]:
    """What has been done of each module: how many exercises in which state, by the newest check."""
    progress = workspace.progress()
    return [road_row(workspace, module, progress.get(str(module.number), {})) for module in MODULES]


def road_row(workspace: Workspace, module: Module, known: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"number": module.number, "name": module.name, "title": module.title, "part": module.part}
    if workspace.file(module.number) is None:
        return row | {"yours": False, "changed": False, "done": False}
    text = workspace.text(module.number)
    changed = known.get("digest", digest(text)) != digest(text)
    states = Counter(state_of(each.name, text, known, changed) for each in exercises.exercises(module.number))
    return row | {
        "yours": True,
        "exercises": states.total(),
        **{state.replace(" ", "_"): states[state] for state in STATES},
        "checkpoint": known.get("checkpoint"),
        "hints": known.get("hints", {}),
        "solutions": known.get("solutions", []),
        "changed": changed,
        "done": states["passed"] == states.total() and not changed,
    }


def state_of(name: str, text: str, known: dict[str, Any], changed: bool) -> str:
    """One of STATES: what the newest check said, unless an exercise has been written since, or no check saw it."""
    state = known.get("results", {}).get(name)
    if state is None or (state == "not written" and changed):
        return "not written" if is_unwritten(text, name) else "unchecked"
    return state


def milestones(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each program whether it can run, and which of the learner's modules have to pass before."""
    table = importlib.import_module("tinytorch.milestones").MILESTONES  # stands above: only its table is read
    missing = [row["number"] for row in modules if row["yours"] and not row["done"]]
    rows = [(each.name, each.year, [number for number in missing if number <= each.after]) for each in table]
    return [{"name": name, "year": year, "ready": not needs, "needs": needs} for name, year, needs in rows]


def road_line(row: dict[str, Any]) -> str:
    start = f"{row['number']:02} {row['name']:<14}"
    if not row["yours"]:
        return f"{start}  reference"
    counts = [(row["passed"], 9, "green"), (row["failed"], 8, "red"), (row["not_written"], 13, ""),
              (row["unchecked"], 11, "")]  # fmt: skip
    cells = [typer.style(f"{n:>{width}}", fg=colour or None) if n else f"{n:>{width}}" for n, width, colour in counts]
    mark = " *" if row["changed"] else ""
    return f"{start}{''.join(cells)}  {row['checkpoint'] or '-'}{mark}"


# -- words -------------------------------------------------------------------------------------------------------------


@contextmanager
def refused() -> Iterator[None]:
    """What cannot be done ends the command with one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error))


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def print_wrapped(text: str, indent: str = "") -> None:
    print(wrapped(text, indent))


def wrapped(text: str, indent: str = "") -> str:
    """One paragraph in lines of the width of a terminal; what follows the first is indented more."""
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ",
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


def paragraphs(text: str) -> str:
    """A text whose paragraphs are wrapped; tables, lists and whatever is indented keep their lines."""
    blocks = re.split(r"\n\s*\n", re.sub(r"^(#+ .*)\n", r"\1\n\n", text, flags=re.MULTILINE))
    plain = [not re.search(r"^(\s|[-*#|$>`]|\d+\.)", block, re.MULTILINE) for block in blocks]
    return "\n\n".join(
        textwrap.fill(block, WIDTH, break_long_words=False) if is_plain else block
        for block, is_plain in zip(blocks, plain, strict=True)
    )


def print_diff(own: list[str], other: list[str], what: str) -> None:
    colours = {"+": "green", "-": "red", "@": "cyan"}
    for line in unified_diff(own, other, f"yours: {what}", f"reference: {what}", lineterm=""):
        typer.echo(typer.style(line, fg=colours.get(line[0])))


def in_words(done: Update) -> str:
    return {
        "current": "nothing is new",
        "updated": "what is new is in it now",
        "merged": f"what is new is in it now, but for {counted(len(done.conflicts), 'place')} that you changed",
        "kept": f"stays as it is: {done.reason}",
    }[done.outcome]


def update_row(done: Update) -> dict[str, Any]:
    conflicts = [{"line": each.line, "diff": each.diff()} for each in done.conflicts]
    return {
        "number": done.number,
        "file": str(done.path),
        "outcome": done.outcome,
        "reason": done.reason,
        "backup": done.backup and str(done.backup),
        "conflicts": conflicts,
    }
