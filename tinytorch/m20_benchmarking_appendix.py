"""Module 20, appendix: PyTorch's Timer, reports as files and what has changed between two, and figures.

A report keeps every time that was measured, so that whoever reads it can ask what its writer did not.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
import timeit
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tinytorch import __version__
from tinytorch.backends import get_backend
from tinytorch.m01_setup import atomic_write
from tinytorch.m01_setup_appendix import BLUE, GREY, ORANGE, dress_axes, new_figure, save_figure
from tinytorch.m02_tensor_appendix import get_default_device
from tinytorch.m20_benchmarking import (
    Candidate,
    Clock,
    Measurement,
    Scaling,
    ServerResult,
    pareto_front,
    quantile,
    verdict,
)

# -- PyTorch's Timer ---------------------------------------------------------------------------------------------------


def device_clock() -> float:
    """Seconds, once the default device has done all that it was given."""
    get_backend(str(get_default_device())).synchronize()
    return time.perf_counter()


class Timer:
    """Times a statement: `torch.utils.benchmark.Timer`.

    Args:
        stmt, setup: Python code; `setup` runs once before each sample.
        timer: returns seconds; by default it waits for the default device.
        globals: the names that the code may use.
        label: what the measurement is called; the statement if None.
    """

    def __init__(
        self, stmt: str = "pass", setup: str = "pass", timer: Clock = device_clock,
        globals: dict[str, Any] | None = None, label: str | None = None,
    ) -> None:  # fmt: skip
        self.label, self.timer = label or stmt, timer
        self._timer = timeit.Timer(stmt, setup, timer, {} if globals is None else globals)

    def timeit(self, number: int = 1_000_000) -> Measurement:
        """One sample of `number` runs, after a hundredth of them as a warm-up."""
        self._timer.timeit(max(number // 100, 2))
        return Measurement(number, (self._timer.timeit(number),), self.label)

    def blocked_autorange(self, min_run_time: float = 0.2) -> Measurement:
        """Samples for so many seconds, each of as many runs as make the cost of the clock negligible."""
        overhead = statistics.median(self._timer.timeit(0) for _ in range(5))
        least, number = max(1e4 * overhead, min_run_time / 1000), 1
        while self._timer.timeit(number) < least:
            number *= 10
        times: list[float] = []
        while sum(times) < min_run_time:
            times.append(self._timer.timeit(number))
        return Measurement(number, tuple(times), self.label)


# -- reports -----------------------------------------------------------------------------------------------------------

FORMAT = "tinytorch.benchmark/1"
PACKAGES = ("numpy", "numba", "array-api-compat", "cupy-cuda12x", "cupy-cuda13x")


@dataclass(frozen=True)
class Report:
    """What was measured, where, when and how.

    Attributes:
        settings: whatever decided about the figures: batch sizes, seeds …
        machine, versions, date: of the process that made the report.
        results: what was found besides times, as JSON can hold it.
    """

    measurements: tuple[Measurement, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=lambda: describe_machine())
    versions: dict[str, str] = field(default_factory=lambda: describe_versions())
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it: the raw times, and beside each measurement what follows from them."""
        rows = [{**asdict(one), "summary": summary(one)} for one in self.measurements]
        return finite({"format": FORMAT, **vars(self), "measurements": rows})


def summary(measurement: Measurement) -> dict[str, Any]:
    """What is usually asked of a measurement: seconds, with their 95 % intervals, and items a second."""
    found: dict[str, Any] = {}
    for q in (0.5, 0.9, 0.99):
        found[f"p{100 * q:.0f}"] = measurement.quantile(q)
        found[f"p{100 * q:.0f}_interval"] = list(measurement.interval(q))
    return {**found, "mean": measurement.mean, "iqr": measurement.iqr, "throughput": measurement.throughput}


def finite(value: Any) -> Any:
    """The same with None in the place of what JSON has no word for: nan and infinities."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_machine() -> dict[str, Any]:
    """What a figure depends on besides the program: processor, cores, memory, system, default device, settings."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:  # Linux only
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    settings = ("NUM_THREADS", "OPENBLAS_", "TINYTORCH_", "NUMBA_CPU")
    return {
        "processor": processor,
        "cores": usable,
        "memory": get_backend("cpu").memory().total,
        "system": platform.platform(),
        "device": str(get_default_device()),
        "environment": {name: value for name, value in sorted(os.environ.items()) if any(s in name for s in settings)},
    }


def describe_versions() -> dict[str, str]:
    """The versions of Python, TinyTorch and what it computes with."""
    found = {"python": platform.python_version(), "tinytorch": __version__}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def save_report(report: Report, path: str | os.PathLike) -> Path:
    """Write a report as JSON, whole or not at all; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(report.as_dict(), indent=1, allow_nan=False) + "\n").encode())
    return path


def load_report(path: str | os.PathLike) -> Report:
    """Read what `save_report` wrote. ValueError, which names the file, if it is something else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}")
        rows = [{key: value for key, value in row.items() if key != "summary"} for row in found["measurements"]]
        for row in rows:
            row["raw_times"], row["discarded"] = tuple(row["raw_times"]), tuple(row["discarded"])
            row["first"] = math.nan if row["first"] is None else row["first"]
        rest = {name: found[name] for name in ("settings", "results", "machine", "versions", "date")}
        return Report(tuple(Measurement(**row) for row in rows), **rest)
    except (KeyError, TypeError, ValueError) as error:
        detail = f"no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{os.fspath(path)} is no report of a benchmark ({FORMAT}): {detail}") from error


@dataclass(frozen=True)
class Regression:
    """How long a measurement of one name takes in a later report, beside an earlier one."""

    name: str
    ratio: float
    low: float
    high: float
    margin: float

    @property
    def verdict(self) -> str:
        """What the later one is: "faster", "slower", "equal" or "undecided"."""
        return verdict(self.low, self.high, self.margin)


def regressions(before: Report, after: Report, margin: float = 0.1, confidence: float = 0.95) -> list[Regression]:
    """What has changed between two reports, for each name that stands in both.

    The interval of the ratio of two medians is made of theirs (Zou and Donner's MOVER, 2008). It knows nothing of what
    differs between two processes or two hours on one machine, so the margin is wider than that of `compare`, which
    should judge whatever is found here.
    """
    earlier = {one.name: one for one in before.measurements}
    both = [(earlier[one.name], one) for one in after.measurements if one.name in earlier]
    if not both:
        names = [[one.name for one in report.measurements] for report in (before, after)]
        raise ValueError(f"regressions: the reports have no measurement in common: {names[0]} and {names[1]}")
    found = []
    for one, other in both:
        old, new = ((math.log(x.median), *map(logarithm, x.interval(0.5, confidence))) for x in (one, other))
        low, high = difference(new, old)
        found.append(Regression(one.name, other.median / one.median, math.exp(low), math.exp(high), margin))
    return found


def logarithm(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The interval of a - b, each given as (estimate, low, high) and independent of the other."""
    middle = a[0] - b[0]
    return middle - math.hypot(a[0] - a[1], b[2] - b[0]), middle + math.hypot(a[2] - a[0], b[0] - b[1])


def differing(before: Report, after: Report) -> list[str]:
    """In words, what two reports differ in that figures depend on: machine, versions, settings."""
    found = []
    for what in ("machine", "versions", "settings"):
        old, new = getattr(before, what), getattr(after, what)
        changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        found += [f"{key}: {old.get(key)} and {new.get(key)}" for key in changed]
    return found


# -- figures -----------------------------------------------------------------------------------------------------------

COLOURS, MARKERS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "osD^vP"


def time_unit(*seconds: float) -> tuple[float, str]:
    """How many of which unit a second has, for times of about this length; in the middle of several."""
    middle = quantile(seconds, 0.5)
    return (1, "s") if middle >= 1 else (1e3, "ms") if middle >= 1e-3 else (1e6, "µs")


def plot_latencies(measurements: Sequence[Measurement], path: str | os.PathLike, title: str = "Latency") -> Path:
    """Draw which share of calls takes longer than a time, on logarithmic axes, where tails can be seen."""
    figure = new_figure(7.5, 4.6, title)
    axes = figure.subplots()
    scale, unit = time_unit(*(one.quantile(0.9) for one in measurements))
    dress_axes(axes, f"time of a call ({unit})", "share of calls that take longer")
    for i, one in enumerate(measurements):
        times = sorted(scale * t for t in one.times)
        shares = [1 - k / len(times) for k in range(len(times))]
        colour = COLOURS[i % len(COLOURS)]
        axes.loglog(times, shares, drawstyle="steps-pre", color=colour, label=one.name or None)
        for q in (0.5, 0.9, 0.99):
            axes.plot(scale * one.quantile(q), 1 - q, MARKERS[i % len(MARKERS)], color=colour, markersize=5)
    for q in (0.5, 0.9, 0.99):
        axes.axhline(1 - q, color=GREY, linewidth=0.6, linestyle=":")
        axes.annotate(f"p{100 * q:.0f}", (1.0, 1 - q), xycoords=("axes fraction", "data"), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=9, color=GREY)  # fmt: skip
    axes.set_ylim(min(1 / len(one.times) for one in measurements) * 0.8, 1.1)
    plain_ticks(axes.xaxis)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g} %")
    if any(one.name for one in measurements):
        axes.legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


def plain_ticks(axis: Any) -> None:
    """Have a logarithmic axis show 0.2, 5 or 300, as few as fit, and no powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_locator(NullLocator())


def plain(value: float, _position: float = 0) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def plot_scaling(
    found: Mapping[str, Scaling], path: str | os.PathLike, size: str = "size", title: str = "How time grows"
) -> Path:
    """Draw median times with their 95 % intervals over sizes, with the fitted lines, on logarithmic axes."""
    figure = new_figure(7.0, 4.8, title)
    axes = figure.subplots()
    scale, unit = time_unit(*(one.median for scaling in found.values() for one in scaling.measurements))
    dress_axes(axes, size, f"time of a call ({unit})")
    for i, (name, one) in enumerate(found.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        medians = [scale * each.median for each in one.measurements]
        intervals = [each.interval() for each in one.measurements]
        reach = [[max(m - scale * low, 0) if low > 0 else 0 for m, (low, _) in zip(medians, intervals, strict=True)],
                 [max(scale * high - m, 0) if high < math.inf else 0
                  for m, (_, high) in zip(medians, intervals, strict=True)]]  # fmt: skip
        label = f"{name}: exponent {one.exponent:.2f} ± {one.error:.2f}".removeprefix(": ")
        axes.errorbar(one.sizes, medians, reach, fmt=marker, color=colour, capsize=3, label=label)
        ends = [min(one.sizes), max(one.sizes)]
        axes.plot(ends, [scale * one.factor * end**one.exponent for end in ends], "--", color=colour, linewidth=1)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sorted({one for scaling in found.values() for one in scaling.sizes}))
    axes.xaxis.set_major_formatter(plain)
    axes.minorticks_off()
    plain_ticks(axes.yaxis)
    axes.legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


def plot_server(found: Mapping[str, ServerResult], path: str | os.PathLike, title: str = "Load") -> Path:
    """Draw the latency of all loads that were tried over their rate, under the bound; and the highest that held."""
    figure = new_figure(7.0, 4.6, title)
    axes = figure.subplots()
    first = next(iter(found.values()))
    scale, unit = time_unit(first.bound)
    dress_axes(axes, "queries a second", f"p{100 * first.share:g} of the time from arrival to end ({unit})")
    for i, (name, one) in enumerate(found.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        loads = sorted((load.rate, scale * quantile(load.latencies, one.share)) for load in one.loads)
        axes.semilogy(*zip(*loads, strict=True), marker, color=colour, label=name or None)
        axes.axvline(one.rate, color=colour, linewidth=1, linestyle="--")
        axes.annotate(f"{one.rate:,.4g}/s", (one.rate, 1.0), xycoords=("data", "axes fraction"), color=colour,
                      xytext=(3, -4 - 12 * i), textcoords="offset points", va="top", fontsize=9,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
    for bound in sorted({one.bound for one in found.values()}):
        axes.axhline(scale * bound, color=GREY, linewidth=1)
        axes.annotate("bound", (0.0, scale * bound), xycoords=("axes fraction", "data"), xytext=(4, 3),
                      textcoords="offset points", fontsize=9, color=GREY)  # fmt: skip
    axes.set_xlim(left=0)
    plain_ticks(axes.yaxis)
    if any(found):
        axes.legend(frameon=False, fontsize=9, loc="center right")
    return save_figure(figure, path)


def plot_pareto(candidates: Sequence[Candidate], path: str | os.PathLike, title: str = "What to take") -> Path:
    """Draw accuracy over latency, with a circle as large as each model is, the Pareto front in colour."""
    figure = new_figure(7.5, 5.0, title)
    axes = figure.subplots()
    front, largest = pareto_front(candidates), max(one.size for one in candidates)
    scale, unit = time_unit(*(one.latency for one in candidates))
    dress_axes(axes, f"time of a call ({unit})", "accuracy (%)")
    placed: list[Candidate] = []
    spread = max(one.accuracy for one in candidates) - min(one.accuracy for one in candidates)
    for one in sorted(candidates, key=lambda one: one.latency):
        colour, area = BLUE if one in front else GREY, 40 + 900 * one.size / largest
        near = [other for other in placed if one.latency < 1.25 * other.latency
                and abs(one.accuracy - other.accuracy) <= 0.1 * spread]  # fmt: skip
        side = 1 if len(near) % 2 else -1  # above what it would cover
        place = scale * one.latency, 100 * one.accuracy
        axes.scatter(*place, area, color=colour, alpha=0.6 if one in front else 0.2, edgecolors=colour)
        axes.annotate(f"{one.name}\n{megabytes(one.size)}", place, xytext=(0, side * (6 + math.sqrt(area) / 2)),
                      textcoords="offset points", ha="center", va="bottom" if side > 0 else "top", fontsize=9,
                      color="black" if one in front else GREY)  # fmt: skip
        placed.append(one)
    best = [one for k, one in enumerate(front) if all(one.accuracy > before.accuracy for before in front[:k])]
    axes.plot([scale * one.latency for one in best], [100 * one.accuracy for one in best], ":", color=BLUE)
    axes.set_xscale("log")
    axes.margins(0.15, 0.25)
    plain_ticks(axes.xaxis)
    axes.set_title("blue: no other is as fast, small and accurate; area: bytes on disk", fontsize=9, color=GREY)
    return save_figure(figure, path)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.3g} MB" if size >= 1e5 else f"{size / 1e3:,.3g} kB"
