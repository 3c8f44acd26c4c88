"""Module 15, appendix: formulas for the other operations, timelines, figures, and a network layer by layer.

`profile` is the chapter's `Profile`, and can save its timeline for Perfetto and draw itself. `summary` lists the layers
of a network with their results, parameters and arithmetic.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinytorch.backends import get_backend
from tinytorch.m01_setup import atomic_write, print_table, printed
from tinytorch.m01_setup_appendix import BLUE, GREY, ORANGE, dress_axes, new_figure, save_figure
from tinytorch.m02_tensor import Tensor
from tinytorch.m04_layers import Module
from tinytorch.m06_autograd import no_grad
from tinytorch.m09_spatial import evaluating, layer_flops
from tinytorch.m15_profiling import (
    OBSERVING,
    REST,
    Machine,
    Profile,
    Row,
    best,
    count,
    flop_formula,
    layer_path,
    measure_machine,
    summarize,
    user_line,
)

# -- arithmetic --------------------------------------------------------------------------------------------------------

# Of each element of the result: as many as an operation's readable code has; a function such as exp counts as one.
for _each, _names in (
    (
        0,
        "index_put overwrite flip roll constant_pad take_along_dim nonzero argsort windows_to_columns embedding_lookup",
    ),
    (1, "minimum log1p expm1 sin cos tanh erf sign floor ceil round isnan isinf isfinite softmax_minus_one_hot"),
    (1, "bitwise_and bitwise_or bitwise_xor bitwise_not cumsum"),
    (2, "rsqrt clamp hardtanh leaky_relu drop"),
    (3, "sigmoid rotate"),
    (4, "silu elu"),
    (5, "softmax log_softmax"),
    (8, "softplus"),
    (9, "bernoulli_cross_entropy"),
):
    flop_formula(*_names.split())(lambda out, *arrays, _each=_each, **attributes: _each * count(out))
for _each, _names in (  # of each element of the first input
    (1, "prod amin argmin any all scatter_along_dim embedding_weight_gradient columns_to_windows"),
    (2, "vector_norm"),
    (4, "var logsumexp"),
    (5, "softmax_cross_entropy"),
):
    flop_formula(*_names.split())(lambda out, x, *others, _each=_each, **attributes: _each * count(x))
flop_formula("scatter_add")(lambda out, x, indices, values, **attributes: count(values))
flop_formula("index_add")(lambda out, x, values, **attributes: count(values))
flop_formula("gelu_and_cdf")(lambda out, x, approximate: (5 if approximate == "none" else 9) * count(x))
flop_formula("gelu_gradient")(lambda out, g, x, cdf, approximate: (7 if approximate == "none" else 10) * count(x))
flop_formula("max_pool", "avg_pool")(lambda out, x, windows, **attributes: count(out) * math.prod(windows.size))
flop_formula("avg_pool_gradient")(lambda out, g, windows, **attributes: count(g) * math.prod(windows.size))
flop_formula("scatter_to_maxima", "gather_from_maxima")(  # for each element of a window a comparison and an addition
    lambda out, values, x, largest, windows: 2 * count(largest) * math.prod(windows.size)
)
flop_formula("convolution_relu", "linear_relu")(lambda out, x, weight, *bias, **geometry: layer_flops(out, weight))


@flop_formula("normalize")
def normalize_flops(out: Any, x: Any, *scales: Any, **attributes: Any) -> int:
    """Mean, difference, square, mean, scaling; and the weight and the bias, if there are."""
    return (5 + sum(scale is not None for scale in scales)) * count(x)


@flop_formula("normalize_gradients")
def normalize_gradient_flops(out: Any, g: Any, x: Any, weight: Any, *statistics: Any, shape: Any, **others: Any) -> int:
    return (9 + (weight is not None) + 3 * (shape is not None)) * count(x)


@flop_formula("cached_attention")
def cached_attention_flops(out: Any, query: Any, key: Any, value: Any, lengths: Any, **attributes: Any) -> int:
    return 2 * query.shape[1] * int(lengths.sum()) * (key.shape[-1] + value.shape[-1])


@flop_formula("einsum_op")
def einsum_flops(out: Any, *operands: Any, equation: str) -> int:
    """For each combination of all indices, a multiplication with each further operand, and an addition."""
    sizes: dict[str, int] = {}
    for letters, x in zip(equation.replace(" ", "").partition("->")[0].split(","), operands, strict=True):
        before, dots, after = letters.partition("...")
        shape = tuple(x.shape)
        sizes |= dict(zip(before, shape, strict=False)) | dict(zip(after[::-1], shape[::-1], strict=False))
        if dots:
            rest = math.prod(shape[len(before) : len(shape) - len(after)])
            sizes["..."] = max(rest, sizes.get("...", 1))
    return len(operands) * math.prod(sizes.values())


def measure_device(device: str, size: int = 1 << 26, side: int = 1 << 12) -> Machine:
    """The limits of a device as its library reaches them: by a product of matrices of float32, and by a sum."""
    xp = get_backend(device)
    a, x = xp.normal((side, side)), xp.normal((size,))

    def waiting(function: Callable, *arrays: Any) -> None:
        function(*arrays)
        xp.synchronize()

    peak = 2 * side**3 / best(waiting, xp.matmul, a, a)
    bandwidth = 2 * x.nbytes / best(waiting, xp.add, x, x)
    return Machine(1, (peak, peak), (bandwidth, bandwidth), "device")


# -- the profile that users see ----------------------------------------------------------------------------------------


class profile(Profile):
    __doc__ = Profile.__doc__

    def __enter__(self) -> profile:
        super().__enter__()
        return self

    def save(self, path: str | os.PathLike) -> Path:
        """Write the timeline as JSON that ui.perfetto.dev and chrome://tracing open."""
        atomic_write(path, json.dumps(trace(self)).encode())
        return Path(path)

    def plot(self, path: str | os.PathLike) -> Path:
        """Draw time by operation, memory over time, and the operations under this machine's roofs."""
        return save_figure(draw_profile(self, measure_machine()), path)


# -- timelines ---------------------------------------------------------------------------------------------------------


def trace(p: Profile) -> dict[str, Any]:
    """The timeline in Chrome's trace format: events with a beginning and a length in microseconds, and a counter."""
    process, threads = os.getpid(), {p.thread: 0}
    entries: list[dict[str, Any]] = []
    for e in p.events:
        thread = threads.setdefault(e.thread, len(threads))
        kind = {"range": "range", "update": "optimizer"}.get(e.kind, "backward" if e.backward else "forward")
        details = {"module": e.module, "line": user_line(e.place), "shapes": [list(shape) for shape in e.shapes],
                   "flops": e.flops, "bytes moved": e.moved, "bytes new": e.made,
                   "device microseconds": e.on_device and 1e6 * e.on_device()}  # fmt: skip
        entries.append({"ph": "X", "name": e.name, "cat": kind, "pid": process, "tid": thread,
                        "ts": (e.start - p.started) / 1e3, "dur": (e.end - e.start) / 1e3,
                        "args": {name: value for name, value in details.items() if value}})  # fmt: skip
    for seconds, held in p.memory:
        entries.append({"ph": "C", "name": "memory held", "pid": process, "tid": 0, "ts": 1e6 * seconds,
                        "args": {"bytes": held}})  # fmt: skip
    for thread in threads.values():
        name = f"thread {thread}" if thread else "the profiled thread"
        entries.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": name}})
    return {"traceEvents": sorted(entries, key=lambda entry: entry.get("ts", -1)), "displayTimeUnit": "ms"}


# -- figures -----------------------------------------------------------------------------------------------------------


def draw_profile(p: Profile, machine: Machine) -> Any:
    figure = new_figure(11, 13, f"{1e3 * p.total_seconds:.1f} ms")
    times, memory, roofs = figure.subplots(3, 1)
    draw_times(times, summarize(p))
    draw_memory(memory, p)
    draw_operations(roofs, summarize(p), machine)
    return figure


def draw_times(axes: Any, rows: list[Row], most: int = 14) -> None:
    """A bar for the self time of each row, the longest first; the rest, which is no operation's, in grey."""
    dress_axes(axes, "milliseconds", "")
    rows = sorted(rows, key=lambda row: -row.self)
    shown, others = rows[:most], rows[most:]
    if others:
        shown = [*shown, Row(f"{len(others)} more", self=sum(row.self for row in others))]
    total = sum(row.self for row in rows)
    for place, row in enumerate(reversed(shown)):
        rest = row.name in (REST, OBSERVING) or row.name == f"{len(others)} more"
        axes.barh(place, 1e3 * row.self, color=GREY if rest else ORANGE if row.backward else BLUE)
        axes.annotate(f" {row.self / total:.1%}", (1e3 * row.self, place), va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), [row.name for row in reversed(shown)], fontsize=9)
    axes.margins(x=0.08, y=0.02)
    for colour, label in ((BLUE, "forward, updates"), (ORANGE, "backward"), (GREY, "the rest")):
        axes.barh(0, 0, color=colour, label=label)
    axes.legend(loc="lower right", frameon=False, fontsize=9)


def draw_memory(axes: Any, p: Profile) -> None:
    """What arrays held, over time; shaded where backward runs."""
    dress_axes(axes, "milliseconds", "MB held by arrays")
    memory = [(0.0, 0), *p.memory, (p.total_seconds, p.memory[-1][1] if p.memory else 0)]
    axes.step([1e3 * t for t, _ in memory], [held / 1e6 for _, held in memory], where="post", color=BLUE)
    for backward, group in itertools.groupby(sorted(p.events, key=lambda e: e.start), key=lambda e: e.backward):
        if backward and (spans := list(group)):
            first, last = ((t - p.started) / 1e6 for t in (spans[0].start, spans[-1].end))
            axes.axvspan(first, last, color=ORANGE, alpha=0.12, linewidth=0)
    moment = max(memory, key=lambda entry: entry[1])
    side, distance = ("right", -4) if moment[0] > p.total_seconds / 2 else ("left", 4)
    axes.annotate(f"peak {moment[1] / 1e6:,.1f} MB", (1e3 * moment[0], moment[1] / 1e6), fontsize=9, ha=side,
                  xytext=(distance, 4), textcoords="offset points")  # fmt: skip
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)


def draw_roofs(axes: Any, machine: Machine, intensities: Sequence[float]) -> None:
    """What one core and all can reach at most, on axes with logarithms, so that a roof is a line with a bend."""
    dress_axes(axes, "arithmetic intensity (operations for each byte of memory)", "GFLOP/s")
    for cores, peak, rate, style in zip((1, machine.cores), machine.peak, machine.bandwidth, ("--", "-"), strict=True):
        label = f"roof of {cores} {machine.unit}{'s' * (cores > 1)}: {peak / 1e9:,.0f} GFLOP/s, {rate / 1e9:,.0f} GB/s"
        if style == "--" and machine.cores == 1:
            continue  # it is all of them
        axes.loglog(intensities, [min(peak, i * rate) / 1e9 for i in intensities], style, color="black", label=label)


def draw_operations(axes: Any, rows: list[Row], machine: Machine, most: int = 12) -> None:
    """The rows that take longest, each a point under the roofs, with names in a column at the right."""
    timed = [row for row in rows if row.flops and row.moved and row.self > 0]
    timed = sorted(timed, key=lambda row: -row.self)[:most]
    points = [(row.flops / row.moved, row.flops / row.self / 1e9, row) for row in timed]
    reach = [math.log2(x) for x, _, _ in points] or [0.0]
    low, high = math.floor(min(-4, *reach)) - 1, math.ceil(max(8, *reach)) + 1
    draw_roofs(axes, machine, [2 ** (e / 4) for e in range(4 * low, 4 * high + 1)])
    points.sort(key=lambda point: point[1])
    for x, y, row in points:
        axes.loglog(x, y, "o", color=ORANGE if row.backward else BLUE, markersize=5)
    least = min([y for _, y, _ in points], default=1.0) / 2
    axes.set_ylim(least, most_shown := 8 * max(machine.peak) / 1e9)  # room for the legend
    heights = [math.log(y / least) / math.log(most_shown / least) for _, y, _ in points]
    for (x, y, row), height in zip(points, kept_apart(heights, 0.055), strict=True):
        axes.annotate(f"{row.name}{' (backward)' if row.backward else ''}  {y:,.3g}", (x, y), (1.03, height),
                      textcoords="axes fraction", fontsize=9, va="center", color=ORANGE if row.backward else BLUE,
                      arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "relpos": (0, 0.5)})  # fmt: skip
    axes.legend(loc="upper left", frameon=False, fontsize=9)


def kept_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Rising numbers from 0 to 1 with a gap between them, as near as can be to those that are given."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + gap) if found else height)
    top = 1.0
    for i in reversed(range(len(found))):
        found[i] = min(found[i], top)
        top = found[i] - gap
    return found


# -- a network, layer by layer -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer of a network, and what a call of the network had it do, layers inside of it included.

    Attributes:
        name: as in `named_modules`, "" for the network itself; kind: its class.
        shape: of what it returned last; None if it was not called.
        parameters: how many numbers it learns; those that it shares with a layer above are listed there and here.
        flops: in all calls.
    """

    name: str
    kind: str
    shape: tuple | None
    parameters: int
    flops: int

    @property
    def depth(self) -> int:
        return self.name.count(".") + 1 if self.name else 0


@dataclass(frozen=True)
class Summary:
    """The layers of a network, the network itself first. Printed, it is a table.

    Attributes:
        trainable: how many of the parameters get gradients; bytes: what all parameters and buffers take.
    """

    layers: list[Layer]
    trainable: int
    bytes: int
    parameters: int = field(init=False)
    flops: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", self.layers[0].parameters)
        object.__setattr__(self, "flops", self.layers[0].flops)

    def __str__(self) -> str:
        rows = []
        for layer in self.layers:
            name = layer.name.rpartition(".")[2]
            label = f"{name}: {layer.kind}" if name else layer.kind
            shape = "not called" if layer.shape is None else str(layer.shape)
            rows.append(["  " * layer.depth + label, shape, layer.parameters, layer.flops])
        text = printed(print_table, ["layer", "output", "parameters", "FLOPs"], rows)
        frozen = f", {self.parameters - self.trainable:,} of them frozen" if self.trainable < self.parameters else ""
        return f"{text}{self.parameters:,} parameters{frozen}, {self.bytes / 1e6:,.2f} MB; {self.flops:,} FLOPs a call"

    __repr__ = __str__


def summary(model: Module, *inputs: Any) -> Summary:
    """Call a network once, in eval mode and without gradients, and list its layers: what torchinfo's `summary` does.

    Args:
        inputs: what the network is called with.
    """
    shapes, named = dict[Module, tuple](), list(model.named_modules())
    handles = [part.register_forward_hook(lambda m, _, out: shapes.update({m: shape_of(out)})) for _, part in named]
    try:
        with evaluating(model), no_grad(), Profile(memory=False) as p:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    own: dict[str, int] = {}
    for event in p.events:
        own[event.module] = own.get(event.module, 0) + (event.flops or 0)
    layers = []
    for name, part in named:
        below = {layer_path(model, f"{name}.{inner}".strip("."), kind) for inner, kind in part.named_modules()}
        parameters = sum(q.numel() for q in part.parameters())
        flops = sum(own.get(path, 0) for path in below)
        layers.append(Layer(name, type(part).__name__, shapes.get(part), parameters, flops))
    tensors = [*model.parameters(), *model.buffers()]
    held = sum(x.numel() * x.dtype.itemsize for x in {id(x): x for x in tensors}.values())
    return Summary(layers, sum(q.numel() for q in model.parameters() if q.requires_grad), held)


def shape_of(out: Any) -> tuple:
    """The shape of a tensor; of a tuple of tensors, their shapes."""
    return tuple(out.shape) if isinstance(out, Tensor) else tuple(shape_of(x) for x in out if isinstance(x, Tensor))
