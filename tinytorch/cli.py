"""The command `tinytorch`: what a reader, a user and a teacher call from a shell.

Whatever takes time to import is imported inside the command that needs it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tinytorch import __version__
from tinytorch.curriculum import MODULES, find_module, load_modules
from tinytorch.learn.cli import app as learn
from tinytorch.learn.importing import WorkspaceError, uninstall
from tinytorch.terminal import JsonOption, fail, print_rows

app = typer.Typer(
    help="TinyTorch: a deep-learning framework in twenty modules.",
    epilog="Example: tinytorch milestone run cnn",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
milestone = typer.Typer(
    help="List and run the programs that prove each part of the course.",
    epilog="Example: tinytorch milestone list",
    rich_markup_mode=None,
)
show = typer.Typer(
    help="Look at what a network is given.",
    epilog="Example: tinytorch show data cifar10",
    rich_markup_mode=None,
)
app.add_typer(milestone, name="milestone")
app.add_typer(show, name="show")
app.add_typer(learn, name="learn")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tinytorch {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: tinytorch doctor --json")
def doctor(as_json: JsonOption = False) -> None:
    """Examine this machine: what is there, what is wrong, and how to put it right."""
    uninstall()  # it must work whatever a learner's m01_setup does
    try:
        from tinytorch import m01_setup, m01_setup_appendix  # noqa: F401  (the appendix enters its checks)
    except Exception as error:  # a broken NumPy raises errors of every kind
        fail(f"{type(error).__name__}: {error}; reinstall: pip install --force-reinstall numpy tinytorch-systems", 1)
    raise typer.Exit(m01_setup.doctor(as_json))


@app.command(epilog="Example: tinytorch modules --json")
def modules(as_json: JsonOption = False) -> None:
    """List the modules of the course and what each exports."""
    if as_json:
        rows = [
            {
                "number": module.number,
                "name": module.name,
                "title": module.title,
                "part": module.part,
                "file": f"{module.file}.py",
                "checkpoint": module.checkpoint,
                "exports": {face or "tinytorch": list(module.names(face)) for face in module.exports},
            }
            for module in MODULES
        ]
        print(json.dumps(rows, indent=2))
        return
    print_rows(("", "module", "part", "what you can do after it"),
               [(f"{m.number:02}", m.name, m.part, m.checkpoint) for m in MODULES])  # fmt: skip


@app.command(epilog="Example: tinytorch test 06")
def test(
    module: Annotated[str, typer.Argument(metavar="MODULE", help="Its number or name: 6, 06 or autograd.")],
) -> None:
    """Run a module's own tests and, in a checkout with pytest, its checkpoint."""
    try:
        found = find_module(module)
    except ValueError as error:
        fail(str(error))
    status = subprocess.run([sys.executable, "-m", f"tinytorch.{found.file}", "--tests-only"]).returncode
    checkpoint = (
        Path(__file__).resolve().parent.parent / "tests" / "checkpoints" / f"test_{found.number:02}_{found.name}.py"
    )
    if status == 0 and checkpoint.is_file():
        if importlib.util.find_spec("pytest") is None:
            print("The checkpoint needs pytest: pip install pytest")
        else:
            print(f"Checkpoint: {found.checkpoint}", flush=True)
            status = subprocess.run([sys.executable, "-m", "pytest", "-q", str(checkpoint)]).returncode
    raise typer.Exit(status)


@milestone.command("list", epilog="Example: tinytorch milestone list --json")
def milestone_list(as_json: JsonOption = False) -> None:
    """List the milestone programs."""
    from dataclasses import asdict

    from tinytorch.milestones import MILESTONES

    if as_json:
        print(json.dumps([asdict(found) for found in MILESTONES], indent=2))
        return
    print_rows(("name", "year", "what it shows", "data", "must reach"),
               [(m.name, str(m.year), m.title, m.data, m.threshold) for m in MILESTONES])  # fmt: skip


@milestone.command(
    "run",
    options_metavar="",
    epilog="Examples: tinytorch milestone run; tinytorch milestone run cnn --help",
    # Everything but a leading --help belongs to the program.
    context_settings={"ignore_unknown_options": True, "help_option_names": [], "allow_interspersed_args": False},
)
def milestone_run(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME [OPTION]", help="Which program (cnn if not given), and its own options."),
    ] = None,
) -> None:
    """Run a milestone program; options after its name are the program's own."""
    from tinytorch.milestones import MILESTONES

    rest = list(arguments or [])
    if rest[:1] == ["--help"]:
        print(context.get_help())
        return
    name = rest.pop(0) if rest and not rest[0].startswith("-") else "cnn"
    for found in MILESTONES:
        if found.name == name:
            raise typer.Exit(found.run(rest))
    fail(f"no milestone {name!r}; the milestones are {', '.join(found.name for found in MILESTONES)}")


@show.command("data", epilog="Examples: tinytorch show data cifar10; tinytorch show data mnist --root ~/data --augment")
def show_data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The data set: digits, mnist, cifar10, shakespeare …")],
    root: Annotated[Path | None, typer.Option(help="Folder with its files (else a download).")] = None,
    test_part: Annotated[bool, typer.Option("--test", help="The test part, not the training part.")] = False,
    augment: Annotated[bool, typer.Option(help="As the cnn is given them: shifted and mirrored at random.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Which examples, and which changes.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where the figure goes (runs/data/NAME.png).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is in a data set, and draw a sheet of its pictures or print some of its lines."""
    from tinytorch.milestones.show import describe_data

    found = _or_fail(describe_data, name, root, not test_part, augment, seed, out)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    lines = found.pop("lines", ())
    print_rows(("", name), [(key.replace("_", " "), _as_text(value)) for key, value in found.items()])
    for line in lines:
        print(line)


@app.command(epilog="Examples: tinytorch predict runs/cnn picture.png; tinytorch predict runs/cnn *.png --json")
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a trained network, such as runs/cnn.")],
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE…", help="PNG, JPEG and others.")],
    top: Annotated[int, typer.Option(min=1, help="How many answers to print.")] = 3,
    figure: Annotated[Path | None, typer.Option(help="Draw the picture as the network sees it (one picture).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a trained network what is in a picture."""
    from tinytorch.milestones.predict import predict_pictures

    found = _or_fail(predict_pictures, run, pictures, figure)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for row in found:
        print(f"{row['picture']}: {row['prepared']}")
        for answer, share in list(row["probabilities"].items())[:top]:
            print(f"  {answer:<12} {share:>7.1%}  {'#' * round(30 * share)}".rstrip())
    if figure:
        print(f"figure: {figure}")


@app.command(epilog='Example: tinytorch generate runs/tinygpt --prompt "The statement" --temperature 0.8')
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A trained model: runs/tinygpt, or GPT-2's or a Llama's.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with; - reads standard input.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 300,
    temperature: Annotated[float, typer.Option(min=0, help="Boldness; 0 always takes the likeliest.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among so many of the likeliest only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Among the fewest with this share of probability.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes what was said before less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="The same one writes the same text (random).")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Have a language model write, and print it as it is made."""
    from tinytorch.milestones.generate import generate

    choices = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    _or_fail(generate, run, prompt, tokens, seed, as_json, device, **choices)


@app.command(
    "profile",
    epilog="Example: tinytorch profile cnn --train",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},  # the program has its own
)
def profile_network(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="MODEL [OPTION]", help="See --help.")] = None,
) -> None:
    """Find out where the time, the memory and the arithmetic of a network go, and write a page."""
    from tinytorch.profiling.report import main as run

    raise typer.Exit(run(arguments or []))


@app.command(epilog="Examples: tinytorch quantize runs/cnn --int8; tinytorch quantize runs/tinygpt --int4 --json")
def quantize(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a trained network: runs/cnn …")],
    int8: Annotated[bool, typer.Option("--int8/--int4", help="All in 8 bits, or linear layers' weights in 4.")] = True,
    out: Annotated[Path | None, typer.Option(help="Where the small one goes (RUN-int8).")] = None,
    calibrate: Annotated[int | None, typer.Option(min=1, help="Training pictures that ranges are found by.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder with the files of the data it learned.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a trained network four times smaller, and measure what it has gained and lost."""
    from tinytorch.milestones.quantize import quantize_run

    found = _or_fail(quantize_run, run, out, 8 if int8 else 4, calibrate, root)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    columns = list(found["float32"])
    rows = [(kind, *(_as_text(found[kind][c]) for c in columns)) for kind in ("float32", f"int{found['bits']}")]
    print_rows(("", *columns), rows)
    print(f"{found['times_smaller']:.2f} times smaller; {found['times_faster']:.2f} times as fast at batch "
          f"{found['batch']}. It is in {found['out']}")  # fmt: skip


@app.command(epilog="Example: tinytorch kernels --json")
def kernels(as_json: JsonOption = False) -> None:
    """List which kernel runs in the place of which operation, when, and for which CPU it is compiled."""
    from tinytorch import m16_acceleration_appendix as acceleration

    load_modules()
    report = acceleration.describe_kernels()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    files = [row["kernel"].partition(":")[0] for row in report["kernels"]]
    listed = zip(report["kernels"], files, strict=True)
    rows: list[tuple[str, ...]] = [(row["operation"], file, row["why"]) for row, file in listed]
    print_rows(("operation", "kernel", "why"), rows)
    print(f"Kernels are {report['state']}. Compiled for {report['cpu']} with {report['lanes']} floats in a vector"
          f"{' and AMX' if report['amx'] else ''}, on {report['cores']} core(s).")  # fmt: skip
    print(f"{report['compiled']} compiled functions, {report['bytes'] / 1e6:.1f} MB, are kept in {report['cache']}")


@app.command(epilog="Example: tinytorch warmup")
def warmup(as_json: JsonOption = False) -> None:
    """Compile every kernel for this CPU, and for a GPU that is here, once, so that no program has to wait for it."""
    from rich.console import Console
    from rich.progress import track

    from tinytorch import m16_acceleration_appendix as acceleration
    from tinytorch.backends import count_cuda_devices

    load_modules()  # the kernels of later modules, too
    console = Console(stderr=True, quiet=as_json)
    usable = [kernel for kernel in acceleration.KERNELS if kernel.backend != "cupy" or count_cuda_devices()]
    rows = [acceleration.warm_up(kernel) for kernel in track(usable, "compiling", console=console)]
    rows.append(acceleration.warm_up_optimizers())
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    slowest = sorted(rows, key=lambda row: -row["seconds"])[:5]
    print_rows(("the slowest", "seconds"), [(row["kernel"], f"{row['seconds']:.2f}") for row in slowest])
    print(f"{len(rows)} kernels are ready, after {sum(row['seconds'] for row in rows):.1f} s.")


@app.command(epilog="Examples: tinytorch bench cnn; tinytorch bench runs/tinygpt --batch-size 1 --scenario server")
def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="mlp, cnn, gpt, or the folder of a trained network.")],
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Inputs in a batch; may be given several times (1, 8, 64).")
    ] = None,
    scenario: Annotated[str | None, typer.Option(help="Of MLPerf: single-stream, offline or server.")] = None,
    over: Annotated[str | None, typer.Option(help="Fit how time grows: over batch, width, length or threads.")] = None,
    bound: Annotated[
        float | None, typer.Option(min=0.001, help="Milliseconds that 99 % of a server's queries may take (10 × one).")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long each batch is timed.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Folder for the report and figures (runs/bench/MODEL).")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time a network: percentiles with intervals, throughput, memory; write a report with every time."""
    from tinytorch.profiling import measure

    folder = out or Path("runs", "bench", Path(model).name)
    bound = bound and bound / 1e3
    found = _or_fail(
        measure.bench_model, model, batch_size or measure.BATCHES, scenario, over, bound, seconds, folder, device
    )
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print_rows(*measure.bench_rows(found))
    for line in measure.bench_lines(found):
        print(line)
    print(f"report and figures: {folder}")


@app.command(epilog="Examples: tinytorch compare runs/a runs/b; tinytorch compare before/report.json report.json")
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A network as for bench, or a report.json that it wrote.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, or a later report.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs in a batch.")] = 64,
    margin: Annotated[
        float | None, typer.Option(min=0.001, help="Up to which difference they are equal (0.02; reports 0.1).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether B is faster or slower than A: networks, timed in turn, or reports (status 1: something is slower)."""
    from tinytorch.profiling import measure

    if Path(a).is_file() and Path(b).is_file():
        found = _or_fail(measure.compare_reports, Path(a), Path(b), margin or 0.1)
        headers, rows, lines = measure.regression_text(found)
    else:
        found = _or_fail(measure.compare_models, a, b, batch_size, margin or 0.02, device)
        headers, rows, lines = measure.comparison_text(found)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_rows(headers, rows)
        for line in lines:
            print(line)
    raise typer.Exit(int(found.get("regressed", False)))


def _or_fail(function: Any, *arguments: Any, **options: Any) -> Any:
    """What a function returns; the command ends with one line and status 2 where it cannot do what it was asked."""
    from tinytorch.milestones.program import UsageError

    try:
        return function(*arguments, **options)
    except (UsageError, OSError) as error:
        fail(str(error))


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_as_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_as_text, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Wrong arguments end it with status 2 and one line, Ctrl-C with 130, and a learner's file that is no Python with 1.
    """
    status = 0
    try:
        arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
        status = typer.main.get_command(app).main(arguments, prog_name="tinytorch", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except (SyntaxError, WorkspaceError) as error:  # in a learner's file
        where = f"{error.filename}, line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        print(f"tinytorch: {where}{error.msg}", file=sys.stderr)
        status = 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for wrong arguments has one
            raise
        print(f"tinytorch: {error.format_message().rstrip('.')}; see: {usage_of(error)} --help", file=sys.stderr)
        status = 2
    if status == 130:
        print("tinytorch: interrupted", file=sys.stderr)
    sys.exit(status)


def usage_of(error: Any) -> str:
    """The command that a usage error belongs to, as one types it: "tinytorch milestone run"."""
    context = getattr(error, "ctx", None)
    return context.command_path if context else "tinytorch"
