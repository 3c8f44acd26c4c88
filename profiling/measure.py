"""What `tinytorch bench` and `tinytorch compare` do: time networks by batch, under load, by size, and in turn."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tinytorch
from tinytorch import GPT, GPTConfig, SimpleCNN, Tensor, nn
from tinytorch.m09_spatial import count_parameters
from tinytorch.m20_benchmarking import Comparison, Measurement, Scaling, fit_power
from tinytorch.m20_benchmarking_appendix import differing, summary, time_unit
from tinytorch.milestones.program import UsageError, claim
from tinytorch.milestones.quantized import bytes_on_disk
from tinytorch.profiling.bench import SLOWING
from tinytorch.profiling.workloads import CHARACTERS, PLACES, Workload, workload
from tinytorch.utils.benchmark import (
    Report,
    benchmark,
    compare,
    load_report,
    memory_of,
    plot_latencies,
    plot_scaling,
    plot_server,
    regressions,
    save_report,
    scaling,
    server,
)

BATCHES = (1, 8, 64)
SCENARIOS = ("single-stream", "offline", "server")
OVER = ("batch", "width", "length", "threads")
SIZES = {"width": (64, 128, 256, 512), "length": (8, 16, 32, 64)}
THREADS = ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
Row = tuple[str, ...]

# -- one network -------------------------------------------------------------------------------------------------------


def bench_model(
    name: str, batches: Sequence[int], scenario: str | None, over: str | None, bound: float | None, seconds: float,
    out: Path, device: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Time a network's answers by batch, and if wanted in a scenario or over a size; write report.json and figures.

    Args:
        scenario: one of SCENARIOS; over: one of OVER, to fit how time grows with it.
        bound: seconds within which 99 of 100 queries of the server must end; ten times one query's median if None.
        seconds: how long each batch is timed.

    Returns:
        What was found; "report" is where everything is, raw times too.
    """
    check_choices(scenario, over)
    claim(out)
    grown = scaling_of(name, over, batches, device) if over else None
    measurements, peaks = [], []
    for batch in sorted(set(batches)):
        work = workload(name, device, batch)
        measurements.append(benchmark(work.forward, name=f"batch {batch}", items=batch, seconds=seconds))
        peaks.append(memory_of(work.forward).peak if is_on_cpu(work) else None)
    results: dict[str, Any] = {"model": name, **describe(work)}
    results["batches"] = [
        {"batch": one.items, **summary(one), "first": one.first, "samples": len(one.times),
         "calls_per_sample": one.number_per_run, "settled": one.settled,
         "peak_bytes": peak}
        for one, peak in zip(measurements, peaks, strict=True)
    ]  # fmt: skip
    plot_latencies(measurements, out / "latency.png", f"{name}: latency by batch")
    if scenario:
        results[scenario] = play(scenario, name, work, measurements, bound, out, device)
    if grown:
        results[f"over {over}"] = describe_scaling(grown)
        plot_scaling({"": grown}, out / f"{over}.png", str(over), f"{name}: time over {over}")
        measurements += [replace(one, name=f"over {over} {one.name}") for one in grown.measurements]
    settings = {"model": name, "batches": list(batches), "scenario": scenario, "over": over, "seconds": seconds}
    results["report"] = str(out / "report.json")
    save_report(Report(tuple(measurements), settings, results), out / "report.json")
    return results


def check_choices(scenario: str | None, over: str | None) -> None:
    """UsageError, naming the choices, unless there are such."""
    for option, value, choices in (("scenario", scenario, SCENARIOS), ("over", over, OVER)):
        if value is not None and value not in choices:
            raise UsageError(f"--{option}: there is no {value!r}; choose {', '.join(choices)}")


def is_on_cpu(work: Workload) -> bool:
    return str(work.inputs[0].device) == "cpu"


def describe(work: Workload) -> dict[str, int]:
    """How many parameters a network has, and the bytes of its weights as a file."""
    return {"parameters": count_parameters(work.model), "bytes": bytes_on_disk(work.model)}


def describe_scaling(found: Scaling) -> dict[str, Any]:
    return {"sizes": list(found.sizes), "seconds": [one.median for one in found.measurements],
            "exponent": found.exponent, "error": found.error}  # fmt: skip


def play(
    scenario: str, name: str, work: Workload, measurements: Sequence[Measurement], bound: float | None, out: Path,
    device: str | None,
) -> dict[str, Any]:  # fmt: skip
    """The figure of an MLPerf scenario, in which the largest batch is that of `work`."""
    if scenario == "offline":
        best = max(measurements, key=lambda one: one.throughput)
        return {"batch": best.items, "throughput": best.throughput}
    single = next((one for one in measurements if one.items == 1), None)
    if single is None:
        single = benchmark(workload(name, device, 1).forward)
    if scenario == "single-stream":
        return {"p90": single.quantile(0.9), "p90_interval": list(single.interval(0.9))}
    most, bound = work.inputs[0].shape[0], bound or 10 * single.median
    found = server(answering(work), bound, most=most)
    plot_server({"": found}, out / "server.png", f"{name}: what a server bears, up to {most} at once")
    last = found.loads[-1]
    return {"rate": found.rate, "bound": bound, "share": found.share, "batch": most, "busy": last.busy,
            "loads": [{"rate": load.rate, "busy": load.busy, "latencies": list(load.latencies)}
                      for load in found.loads]}  # fmt: skip


def answering(work: Workload) -> Callable[[int], Tensor]:
    """The network's answer to the first so many inputs."""
    work.forward()  # puts it into eval mode
    return tinytorch.no_grad()(lambda count: work.model(*(x[:count] for x in work.inputs)))


# -- over sizes --------------------------------------------------------------------------------------------------------


def scaling_of(name: str, over: str, batches: Sequence[int], device: str | None) -> Scaling:
    """How a network's time grows with its batch, its width, the length of its texts, or the number of threads."""
    if over == "threads":
        return over_threads(name, device)
    if over == "batch":
        if len(sizes := sorted(set(batches))) < 3:
            raise UsageError(f"--over batch: needs three sizes, got --batch-size {sizes}")
        return scaling(lambda batch: workload(name, device, batch).forward, sizes, items=True)
    if over == "width":
        if name not in ("mlp", "cnn", "gpt"):
            raise UsageError(f"--over width: {name} has the width that it was trained with; choose mlp, cnn or gpt")
        return scaling(lambda width: of_width(name, width, device), SIZES["width"])
    work = workload(name, device)
    if not isinstance(work.model, GPT):
        raise UsageError(f"--over length: {name} is no language model")
    ids, model = work.inputs[0], work.model.eval()
    lengths = [length for length in SIZES["length"] if length <= ids.shape[1]]
    return scaling(lambda length: tinytorch.no_grad()(lambda: model(ids[:, :length])), lengths)


def of_width(name: str, width: int, device: str | None) -> Callable[[], Tensor]:
    """The answers of a network like a known one, but of another width, to 8 inputs."""
    work = workload(name, device, 8)
    networks: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)),
        "cnn": lambda: SimpleCNN(widths=(width // 2, width)),
        "gpt": lambda: GPT(GPTConfig(CHARACTERS, PLACES, 4, 4, width)),
    }
    model = networks[name]().to(str(work.inputs[0].device)).eval()
    return tinytorch.no_grad()(lambda: model(*work.inputs))


def over_threads(name: str, device: str | None, rounds: int = 5) -> Scaling:
    """Over 1, 2, 4 … threads, each in processes of its own, which take turns: libraries read the number at their start.

    UsageError where there are less than four cores: three numbers are needed for an error.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= cores]
    if len(counts) < 3:
        raise UsageError(f"--over threads: needs four cores, and there are {cores}")
    times: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            times[count].append(median_with(count, name, device))
    found = tuple(Measurement(1, tuple(times[count]), f"{count}") for count in counts)
    return Scaling(tuple(counts), found, *fit_power(counts, [one.median for one in found]))


def median_with(threads: int, name: str, device: str | None) -> float:
    """The median seconds of a network's answer in a new process with so many threads."""
    environment = {key: value for key, value in os.environ.items() if key not in SLOWING}
    environment |= dict.fromkeys(THREADS, str(threads))
    program = f"from tinytorch.profiling.measure import median_of; print(median_of({name!r}, {device!r}))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{name} failed with {threads} threads: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout)


def median_of(name: str, device: str | None) -> float:
    return benchmark(workload(name, device).forward, seconds=0.5).median


# -- two of them -------------------------------------------------------------------------------------------------------


def compare_models(a: str, b: str, batch: int, margin: float, device: str | None = None) -> dict[str, Any]:
    """Time the answers of two networks in turn, and say what each weighs."""
    works = [workload(name, device, batch) for name in (a, b)]
    found: Comparison = compare(works[0].forward, works[1].forward, margin=margin)
    rows = []
    for i, (name, work) in enumerate(zip((a, b), works, strict=True)):
        median = Measurement(1, tuple(pair[i] for pair in found.pairs)).median
        peak = memory_of(work.forward).peak if is_on_cpu(work) else None
        found_here = {"median": median, "throughput": batch / median, "peak_bytes": peak}
        rows.append({"model": name, **found_here, **describe(work)})
    return {"batch": batch, "models": rows, "ratio": found.ratio, "interval": [found.low, found.high],
            "margin": margin, "pairs": len(found.pairs), "verdict": found.verdict}  # fmt: skip


def compare_reports(a: Path, b: Path, margin: float) -> dict[str, Any]:
    """What has become slower or faster from one report to the next."""
    try:
        before, after = load_report(a), load_report(b)
        found = regressions(before, after, margin)
    except ValueError as error:
        raise UsageError(str(error)) from error
    medians = [{one.name: one.median for one in report.measurements} for report in (before, after)]
    rows = [
        {**asdict(one), "before": medians[0][one.name], "after": medians[1][one.name], "verdict": one.verdict}
        for one in found
    ]
    return {"margin": margin, "measurements": rows, "differing": differing(before, after),
            "regressed": any(one.verdict == "slower" for one in found)}  # fmt: skip


# -- as text -----------------------------------------------------------------------------------------------------------


def bench_rows(found: dict[str, Any]) -> tuple[Row, list[Row]]:
    """The table of `bench_model`: a row for each batch."""
    headers = ("batch", "p50", "95 %", "p90", "p99", "items/s", "peak")
    rows: list[Row] = [
        (f"{row['batch']}", show(row["p50"]), show_interval(row["p50_interval"]), show(row["p90"]), show(row["p99"]),
         f"{row['throughput']:,.4g}", show_bytes(row["peak_bytes"]))
        for row in found["batches"]
    ]  # fmt: skip
    return headers, rows


def bench_lines(found: dict[str, Any]) -> list[str]:
    """What else `bench_model` has found, a line each."""
    lines = [f"{found['model']}: {found['parameters']:,} parameters, {show_bytes(found['bytes'])} on disk"]
    for row in found["batches"]:
        if (calls := row["calls_per_sample"]) > 1:
            lines.append(f"batch {row['batch']}: too short for single calls; percentiles are of means of {calls}")
        if not row["settled"]:
            lines.append(f"batch {row['batch']}: times had not settled, so they are those of this moment only")
    for what in OVER:
        if grown := found.get(f"over {what}"):
            lines.append(f"time grows with {what} to the power of {grown['exponent']:.2f} ± {grown['error']:.2f}")
    if single := found.get("single-stream"):
        lines.append(f"single stream: 90 of 100 queries within {show(single['p90'])} "
                     f"({show_interval(single['p90_interval'])})")  # fmt: skip
    if offline := found.get("offline"):
        lines.append(f"offline: {offline['throughput']:,.4g} a second, in batches of {offline['batch']}")
    if load := found.get("server"):
        lines.append(f"server: {load['rate']:,.4g} queries a second with {100 * load['share']:g} of 100 within "
                     f"{show(load['bound'])}")  # fmt: skip
        if not load["rate"]:
            lines.append("no rate holds this bound: one query alone exceeds it too often")
    return lines


def comparison_text(found: dict[str, Any]) -> tuple[Row, list[Row], list[str]]:
    """The table of `compare_models`, and the verdict."""
    rows: list[Row] = [
        (row["model"], show(row["median"]), f"{row['throughput']:,.4g}", f"{row['parameters']:,}",
         show_bytes(row["bytes"]), show_bytes(row["peak_bytes"]))
        for row in found["models"]
    ]  # fmt: skip
    low, high = (f"{bound:.3f}" if 0 < bound < float("inf") else "?" for bound in found["interval"])
    lines = [f"B takes {found['ratio']:.3f} times as long as A ({low} to {high}, {found['pairs']} pairs)",
             verdict_line(found["verdict"], found["margin"])]  # fmt: skip
    return ("", f"p50, batch {found['batch']}", "items/s", "parameters", "on disk", "peak"), rows, lines


def verdict_line(verdict: str, margin: float) -> str:
    share = f"{100 * margin:g} %"
    return {
        "faster": f"B is faster, by more than {share}",
        "slower": f"B is slower, by more than {share}",
        "equal": f"they are equal within {share}",
        "undecided": f"undecided: the interval does not tell whether they differ by {share}",
    }[verdict]


def regression_text(found: dict[str, Any]) -> tuple[Row, list[Row], list[str]]:
    """The table of `compare_reports`, and what else differs."""
    rows: list[Row] = [
        (row["name"], show(row["before"]), show(row["after"]), f"{row['ratio']:.3f}",
         f"{row['low']:.3f} to {row['high']:.3f}", row["verdict"])
        for row in found["measurements"]
    ]  # fmt: skip
    lines = [f"the reports differ in {line}" for line in found["differing"]]
    lines.append(f"verdicts are for differences of more than {100 * found['margin']:g} %"
                 + ("; something became slower" if found["regressed"] else ""))  # fmt: skip
    return ("", "p50 of A", "of B", "ratio", "95 %", "B is"), rows, lines


def show(seconds: float) -> str:
    scale, unit = time_unit(seconds)
    return f"{scale * seconds:.3g} {unit}"


def show_interval(bounds: Sequence[float | None]) -> str:
    """ "1.2 to 1.3 ms"; a bound that is not known is a question mark."""
    known = [bound for bound in bounds if bound is not None and 0 < bound < float("inf")]
    if not known:
        return "?"
    scale, unit = time_unit(known[0])
    low, high = (f"{scale * bound:.3g}" if bound in known else "?" for bound in bounds)
    return f"{low} to {high} {unit}"


def show_bytes(size: int | None) -> str:
    if size is None:
        return "?"
    return f"{size / 1e6:,.3g} MB" if size >= 1e5 else f"{size / 1e3:,.3g} kB"
