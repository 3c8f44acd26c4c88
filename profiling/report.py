"""Where the time, the memory and the arithmetic of a network go, as one page: `tinytorch profile cnn --train`.

The page is one HTML file that needs no network and no other file; the timeline lies beside it, for ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import base64
import inspect
import io
import json
import linecache
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

import tinytorch
from tinytorch.backends import Backend, backend_of
from tinytorch.m01_setup import atomic_write
from tinytorch.m01_setup_appendix import BLUE, GREY, ORANGE, dress_axes, new_figure
from tinytorch.m15_profiling import OBSERVING, REST, Machine, Row, find_line, is_library, measure_machine, summarize
from tinytorch.m15_profiling_appendix import draw_memory, draw_operations, draw_times, measure_device, profile, summary
from tinytorch.m16_acceleration import kernels_enabled
from tinytorch.milestones.program import UsageError, claim, whole
from tinytorch.profiling.workloads import Workload, workload

STEPS, LEAST = 10, 0.5  # how often a call is measured at least, with and without a profile; seconds
INTERVAL = 0.002  # seconds between two looks at the memory


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What is known of one call of a network.

    Attributes:
        seconds: of each call without a profile, and of each with one; both kinds were measured in turn.
        best: the profile of the quickest call.
        memory: (seconds, bytes in use, bytes at the peak or in the pool) while calls were made.
    """

    work: Workload
    train: bool
    seconds: tuple[list[float], list[float]]
    best: profile
    memory: list[tuple[float, int, int]]

    @property
    def call(self) -> str:
        return "training step" if self.train else "inference call"

    @property
    def items(self) -> int:
        return self.work.inputs[0].shape[0]

    @property
    def overhead(self) -> float:
        """How much longer a call takes with a profile than without, by medians."""
        off, on = map(statistics.median, self.seconds)
        return on / off - 1

    @property
    def flops(self) -> int:
        return sum(event.flops or 0 for event in self.best.events)


def measure(work: Workload, train: bool) -> Measured:
    """Time and profile calls of a workload, in turn, and look at the memory meanwhile."""
    call, xp = work.train_step if train else work.forward, backend_of(work.inputs[0].data)

    def timed() -> float:
        start = time.perf_counter()
        call()
        xp.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        timed()
    off, on, profiles, began = list[float](), list[float](), list[profile](), time.perf_counter()
    while len(off) < STEPS or time.perf_counter() - began < LEAST:
        off.append(timed())
        with profile() as p:
            on.append(timed())
        profiles = [min(*profiles, p, key=lambda p: p.total_seconds)] if profiles else [p]
    return Measured(work, train, (off, on), profiles[0], watch_memory(xp, timed))


def watch_memory(xp: Backend, call: Callable[[], Any]) -> list[tuple[float, int, int]]:
    """The backend's memory while calls are made: (seconds, in use, peak or pool), every two milliseconds."""
    found, done, began = list[tuple[float, int, int]](), threading.Event(), time.perf_counter()

    def look() -> None:
        while not done.wait(INTERVAL):
            memory = xp.memory()
            found.append((time.perf_counter() - began, memory.used, memory.peak))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        while time.perf_counter() - began < LEAST or len(found) < 2:
            call()
    finally:
        done.set()
        watcher.join()
    return found


# -- what is shown -----------------------------------------------------------------------------------------------------


@dataclass
class Both:
    """A layer or a line: seconds forward and backward, and FLOPs."""

    name: str
    forward: float = 0.0
    backward: float = 0.0
    flops: int = 0
    source: str = ""

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


def both_ways(rows: Iterable[Row]) -> list[Both]:
    """Rows of one name, forward and backward, in one; the longest first, without those that stand for the rest."""
    found: dict[str, Both] = {}
    for row in rows:
        if row.name not in (REST, OBSERVING) and not row.name.startswith("("):
            both = found.setdefault(row.name, Both(row.name))
            both.forward, both.backward = (
                both.forward + row.self * (not row.backward),
                both.backward + row.self * row.backward,
            )
            both.flops += row.flops
    return sorted(found.values(), key=lambda both: -both.seconds)


def layers_of(measured: Measured) -> list[Both]:
    return both_ways(summarize(measured.best, "module"))


def lines_of(measured: Measured) -> list[Both]:
    """The lines that take longest: of programs, and of the file that defines the network's class."""
    home = inspect.getfile(type(measured.work.model))

    def skip(code: CodeType) -> bool:
        return is_library(code) and code.co_filename != home

    def key(event: Any) -> str:
        file, line, function = find_line(event.place, skip) or ("", 0, "")
        return f"{file}:{line} {function}" if file else f"({event.name})"

    found = both_ways(summarize(measured.best, key))
    for both in found:
        place, function = both.name.split(" ", 1)
        file, _, line = place.rpartition(":")
        both.source = linecache.getline(file, int(line)).strip()
        both.name = f"{Path(file).name}:{line} {function}"
    return found


def findings(measured: Measured, machine: Machine, names: dict[str, str]) -> dict[str, Any]:
    """All figures, as JSON can hold them."""
    p, seconds = measured.best, statistics.median(measured.seconds[0])
    own = backend_of(measured.work.inputs[0].data)
    return {
        "model": measured.work.name, "call": measured.call, "batch": measured.items, "device": own.device,
        "tinytorch": tinytorch.__version__, "python": platform.python_version(), "kernels": kernels_enabled(),
        "seconds": seconds, "items_per_second": measured.items / seconds, "flops": measured.flops,
        "flops_per_second": measured.flops / seconds, "peak_memory_bytes": p.peak_memory,
        "machine": {"cores": machine.cores, "flops_per_second": machine.peak, "bytes_per_second": machine.bandwidth},
        "profile": {"seconds": p.total_seconds, "overhead": measured.overhead},
        "operations": [
            {"operation": row.name, "backward": row.backward, "calls": row.calls, "self_seconds": row.self,
             "total_seconds": row.total, "device_seconds": row.device, "flops": row.flops, "bytes_moved": row.moved,
             "bytes_new": row.made}
            for row in sorted(summarize(p), key=lambda row: -row.self)
        ],
        "layers": [asdict(both) for both in layers_of(measured)],
        "lines": [asdict(both) for both in lines_of(measured)],
        "files": names,
    }  # fmt: skip


# -- figures -----------------------------------------------------------------------------------------------------------


def picture(draw: Callable[[Any], None], width: float, height: float, description: str) -> str:
    """A figure that `draw(axes)` makes, as an element of the page that holds it."""
    figure, buffer = new_figure(width, height), io.BytesIO()
    draw(figure.subplots())
    figure.savefig(buffer, format="svg")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(description)}">'


def draw_process(axes: Any, measured: Measured, device: str) -> None:
    """What the backend says of its memory while calls are made."""
    dress_axes(axes, "seconds", "MB")
    cuda = device.startswith("cuda")
    times, used, peak = zip(*measured.memory, strict=True)
    axes.plot(times, [x / 1e6 for x in used], color=BLUE, label="the device, by pynvml" if cuda else "the process")
    axes.plot(
        times, [x / 1e6 for x in peak], color=ORANGE, linestyle="--", label="CuPy's pool" if cuda else "its peak so far"
    )
    axes.set_ylim(0, 1.25 * max(*used, *peak) / 1e6)
    axes.legend(loc="lower right", frameon=False, fontsize=9)


# -- the page ----------------------------------------------------------------------------------------------------------

STYLE = f"""
:root {{ color-scheme: light; }}
body {{ margin: 2.5rem auto; max-width: 62rem; padding: 0 1.5rem; background: #fff; color: #1c1c1c;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }}
h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .4rem; border-top: 1px solid #d9d9d9; padding-top: 1.2rem; }}
p {{ margin: .4rem 0 .8rem; max-width: 46rem; }}
.facts {{ color: {GREY}; }}
.figures {{ display: flex; flex-wrap: wrap; gap: .8rem 2.4rem; margin: 1.4rem 0; padding: 0; list-style: none; }}
.figures strong {{ display: block; font-size: 1.45rem; line-height: 1.3; }}
.figures span {{ color: {GREY}; font-size: .875rem; }}
img {{ width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%; }}
th, td {{ padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ececec; }}
th {{ border-bottom: 1px solid #8a8a8a; font-weight: 600; vertical-align: bottom; }}
th.text, td.text {{ text-align: left; }}
td.rest {{ color: {GREY}; }}
code {{ font: .8125rem/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
td code {{ display: inline-block; max-width: 34rem; white-space: pre-wrap; }}
"""


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], texts: int = 1) -> str:
    """A table whose first columns, `texts` of them, are text, and whose others are numbers to the right."""
    lines = []
    for cells, tag in ((heads, "th"), *((row, "td") for row in rows)):
        grey = " rest" if tag == "td" and cells[0] in (REST, OBSERVING) else ""
        marked = [f'<{tag} class="{"text" * (i < texts)}{grey}">{cell}</{tag}>' for i, cell in enumerate(cells)]
        lines.append(f"<tr>{''.join(marked)}</tr>")
    return f'<div class="wide"><table><thead>{lines[0]}</thead><tbody>{"".join(lines[1:])}</tbody></table></div>'


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}" if seconds else ""


def rate(flops: int, seconds: float) -> str:
    return f"{flops / seconds / 1e9:,.1f}" if flops and seconds else ""


def page(measured: Measured, machine: Machine, names: dict[str, str]) -> str:
    """The report, an HTML page that refers to nothing outside of it but the timeline beside it."""
    p, work = measured.best, measured.work
    rows, total = summarize(p), p.total_seconds
    facts = findings(measured, machine, names)
    title = f"{work.name}: {'an' if not measured.train else 'a'} {measured.call}"
    cores = f"{machine.cores} {machine.unit}{'s' * (machine.cores > 1)}"
    intro = (f"{facts['batch']} examples on {facts['device']}, {cores}; kernels "
             f"{'on' if facts['kernels'] else 'off'}; TinyTorch {facts['tinytorch']}, Python {facts['python']}, "
             f"{time.strftime('%Y-%m-%d %H:%M')}")  # fmt: skip
    headline = (
        (f"{1e3 * facts['seconds']:.2f} ms", "a call, the median without a profile"),
        (f"{facts['items_per_second']:,.0f}", "examples a second"),
        (f"{measured.flops / 1e9:,.2f}", "GFLOP a call"),
        (f"{facts['flops_per_second'] / 1e9:,.0f}", f"GFLOP/s, of {machine.peak[1] / 1e9:,.0f} that were measured"),
        (f"{p.peak_memory / 1e6:,.1f} MB", "held by arrays at the peak"),
        (f"{measured.overhead:+.1%}", "time with the profile on"),
    )
    operations = [
        (escape(row.name), "backward" if row.backward else "", row.calls or "", milliseconds(row.self),
         f"{row.self / total:.1%}", f"{row.flops / 1e6:,.1f}" if row.flops else "", rate(row.flops, row.self),
         f"{row.moved / 1e6:,.2f}" if row.moved else "", f"{row.made / 1e6:,.2f}" if row.made else "")
        for row in sorted(rows, key=lambda row: -row.self)
    ]  # fmt: skip
    on_device = sum(row.device for row in rows)

    def shown(both: Both) -> tuple:
        share = f"{both.seconds / total:.1%}"
        return milliseconds(both.forward), milliseconds(both.backward), share, rate(both.flops, both.seconds)

    columns = ("operation", "", "calls", "self ms", "share", "MFLOP", "GFLOP/s", "MB moved", "MB new")
    ways = ("forward ms", "backward ms", "share", "GFLOP/s")
    sections = [
        ("Time by operation", f"Self times of the quickest of {len(measured.seconds[1])} profiled calls, "
         f"{1e3 * total:.2f} ms. The rows add up to all of it."
         + (f" The device was busy for {1e3 * on_device:.2f} ms." if on_device else ""),
         picture(lambda axes: draw_times(axes, rows), 10, 5, "Self time of each operation")
         + table(columns, operations, 2)),
        ("Time by layer", "Backward is charged to the layer whose forward made it necessary.",
         table(("layer", *ways), [(escape(both.name), *shown(both)) for both in layers_of(measured)[:24]])),
        ("Slowest source lines", "Of programs, and of the file that defines the network.",
         table(("line", *ways), [(f"<code>{escape(both.source)}</code><br>{escape(both.name)}", *shown(both))
                                 for both in lines_of(measured)[:16]])),
        ("Memory held by arrays", "From when an operation first sees an array until it is freed, by weak references; "
         "shaded where backward runs.",
         picture(lambda axes: draw_memory(axes, p), 10, 4, "Memory held by arrays over time")),
        ("Memory of the " + ("device" if facts["device"].startswith("cuda") else "process"),
         "What the system says, while the call is made again and again.",
         picture(lambda axes: draw_process(axes, measured, facts["device"]), 10, 3.5, "Memory in use over time")),
        ("Roofline", "What each operation reached, below what was measured to be possible here: left of the "
         "bend memory is the limit, right of it arithmetic.",
         picture(lambda axes: draw_operations(axes, rows, machine), 10, 5.5, "Operations under the roofline")),
        ("The network", "", f"<pre><code>{escape(str(summary(work.model, *work.inputs)))}</code></pre>"),
        ("Timeline", f'<a href="{escape(names["trace"])}">{escape(names["trace"])}</a> lies beside this page; open it '
         "in ui.perfetto.dev or chrome://tracing.", ""),
    ]  # fmt: skip
    figures = "".join(f"<li><strong>{value}</strong><span>{what}</span></li>" for value, what in headline)
    body = "".join(f"<section><h2>{head}</h2><p>{text}</p>{content}</section>" for head, text, content in sections)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
            f'<h1>{escape(title)}</h1><p class="facts">{escape(intro)}</p><ul class="figures">{figures}</ul>{body}'
            "</body></html>\n")  # fmt: skip


# -- the program -------------------------------------------------------------------------------------------------------


def profile_model(
    name: str, train: bool = False, device: str | None = None, batch_size: int | None = None, out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Profile a network, as `workload` knows it, and write report.html and trace.json; returns all figures.

    UsageError where there is no such network or device, or where nothing can be written.
    """
    work = workload(name, device, batch_size)
    out = Path("runs", "profile", Path(name).name) if out is None else out
    claim(out)
    measured, on = measure(work, train), str(work.inputs[0].device)
    machine = measure_machine() if on == "cpu" else measure_device(on)
    names = {"report": "report.html", "trace": "trace.json"}
    measured.best.save(out / names["trace"])
    atomic_write(out / names["report"], page(measured, machine, names).encode())
    return findings(measured, machine, {key: str(out / file) for key, file in names.items()})


class Options(argparse.ArgumentParser):
    """What the command takes. A wrong option ends it with one line and status 2."""

    def __init__(self) -> None:
        super().__init__(
            prog="tinytorch profile",
            description="Find out where the time, the memory and the arithmetic of a network go, and write a page.",
            epilog="Example: tinytorch profile cnn --train",
            allow_abbrev=False,
        )
        add = self.add_argument
        add("model", metavar="MODEL", help="mlp, cnn, gpt, or the folder of a trained one, such as runs/cnn")
        add("--train", action="store_true", help="a training step, not an inference call")
        add("--batch", type=whole(1), metavar="N", help="how many pictures or texts (64 pictures, 12 texts)")
        add("--device", metavar="NAME", help="where to compute: cpu, cuda, cuda:1 (TINYTORCH_DEVICE or cpu)")
        add("--out", type=Path, metavar="DIR", help="folder for what is written (runs/profile/MODEL)")
        add("--json", action="store_true", help="print all figures as JSON, and text to standard error")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tinytorch: {message}; see: {self.prog} --help\n")


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status: 2 where it could not do what it was asked."""
    given, output = Options().parse_args(argv), sys.stdout
    try:
        with redirect_stdout(sys.stderr if given.json else output):
            found = profile_model(given.model, given.train, given.device, given.batch, given.out)
            print_findings(found)
    except (OSError, UsageError) as error:
        print(f"tinytorch: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(found, indent=2))
    return 0


def print_findings(found: dict[str, Any]) -> None:
    """The figures that matter most, as text."""
    print(f"{found['model']}, {found['call']}, batch {found['batch']} on {found['device']}: "
          f"{1e3 * found['seconds']:.2f} ms, {found['items_per_second']:,.0f} examples/s, "
          f"{found['flops_per_second'] / 1e9:,.0f} GFLOP/s, {found['peak_memory_bytes'] / 1e6:,.1f} MB")  # fmt: skip
    for row in found["operations"][:8]:
        name = row["operation"] + (" (backward)" if row["backward"] else "")
        share = row["self_seconds"] / found["profile"]["seconds"]
        print(f"  {name:<40} {1e3 * row['self_seconds']:>9.3f} ms {share:>7.1%}")
    print(f"report: {found['files']['report']}")
    print(f"timeline for ui.perfetto.dev: {found['files']['trace']}")
