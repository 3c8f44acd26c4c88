"""Module 15: arithmetic by hand, memory by hand, who is charged with what, tables, timelines, figures, summaries."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from contextlib import nullcontext
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytorch as t
from tinytorch import m15_profiling as m15
from tinytorch import nn, optim
from tinytorch.autograd import Function
from tinytorch.m01_setup import assert_close
from tinytorch.m01_setup_appendix import new_figure
from tinytorch.m02_tensor import OBSERVERS, Op
from tinytorch.m07_optimizers import Optimizer
from tinytorch.m13_attention_appendix import cached_attention
from tinytorch.m15_profiling import FLOPS, OBSERVING, REST, Machine, Row, profiled, summarize, user_line
from tinytorch.m15_profiling_appendix import (
    draw_memory,
    draw_operations,
    draw_profile,
    draw_roofs,
    draw_times,
    kept_apart,
    measure_device,
    trace,
)
from tinytorch.m16_acceleration import reference_kernels
from tinytorch.nn import functional as F
from tinytorch.profiler import profile, record_function

HERE = Path(__file__).name
MACHINE = Machine(2, (1e11, 2e11), (1e10, 1e10))


# -- the machine -------------------------------------------------------------------------------------------------------


def test_the_peak_counts_what_is_computed() -> None:
    """Twelve vectors of sums s = s x + x, from 0."""
    value, expected = np.float32(0.5), 0.0
    for _ in range(5):
        expected = expected * 0.5 + 0.5
    assert_close(m15.multiply_add(5, value), expected * 6 * m15.tile_columns())
    sums = np.zeros(3, "float32")
    m15.multiply_adds(sums, 5, value)
    assert_close(sums, [expected * 6 * m15.tile_columns()] * 3)


@pytest.mark.parametrize("parts", [1, 2, 3, 16])
def test_triads(parts: int) -> None:
    draws = np.random.default_rng(0)
    a, b, c = np.full(13, np.nan, "float32"), *draws.normal(size=(2, 13)).astype("float32")
    m15.triads(a, b, c, parts)
    assert_close(a, b + b * c)


def test_the_best_of_some_calls() -> None:
    calls = []
    assert m15.best(calls.append, 1, least=0) >= 0
    assert len(calls) == 4  # one to warm up, and three
    assert len(set(calls)) == 1


def test_a_device_is_measured_by_its_own_library() -> None:
    machine = measure_device("cpu", 1 << 12, 64)
    assert (machine.cores, machine.unit) == (1, "device")
    assert machine.peak[0] == machine.peak[1] > 1e7 < machine.bandwidth[0]


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_every_operation_has_a_formula() -> None:
    ours = {name for name, op in Op.registry.items() if op.__module__.startswith("tinytorch.")}
    assert ours - FLOPS.keys() == set()
    assert FLOPS.keys() - Op.registry.keys() == set()


def test_products_have_the_flops_of_hand_counts() -> None:
    batched = profiled(lambda: t.randn(5, 2, 3) @ t.randn(5, 3, 4))
    assert batched["matmul"] == 5 * 2 * 4 * (3 + 3)  # multiplications and additions
    vector = profiled(lambda: t.randn(7) @ t.randn(7))
    assert vector["matmul"] == 7 + 7
    x, weight = t.randn(2, 4, 6, 6), t.randn(8, 2, 3, 3)
    strided = profiled(lambda: F.conv2d(x, weight, stride=2, padding=1, groups=2))
    assert strided["convolution"] == 2 * (8 * 3 * 3) * (2 * 9) * 2  # pictures, places and outputs; window; two each
    assert profiled(lambda: t.einsum("bij,bjk->bik", t.randn(2, 3, 4), t.randn(2, 4, 5)))["einsum_op"] == 240
    assert profiled(lambda: t.einsum("...ij,jk->...ik", t.randn(2, 6, 3, 4), t.randn(4, 5)))["einsum_op"] == 1440


@pytest.mark.parametrize("reference", [False, True])
def test_a_convolution_and_its_gradients_by_hand(reference: bool) -> None:
    layer, x = nn.Conv2d(3, 8, 3, padding=1), t.randn(2, 3, 10, 12, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()

    found = profiled(reference_kernels()(step) if reference else step)
    by_hand = 2 * 2 * 8 * 10 * 12 * 3 * 9
    for name in ("convolution", "convolution_input_gradient", "convolution_weight_gradient"):
        assert found[name] == by_hand


def test_attention_and_its_gradients_by_hand() -> None:
    query, key, value = (t.randn(2, 3, n, d, requires_grad=True) for n, d in ((5, 4), (7, 4), (7, 6)))
    for causal, pairs in ((False, 35), (True, 1 + 2 + 3 + 4 + 5)):
        attend = partial(F.scaled_dot_product_attention, query, key, value, is_causal=causal)
        found = profiled(lambda attend=attend: attend().sum().backward())
        heads = 2 * 3
        scores, mix = 2 * 4 * pairs * heads, 2 * 6 * pairs * heads
        assert found["attention"] == scores + mix
        assert found["attention_gradients"] == scores + 2 * mix + 2 * scores  # again; value, weights; query, key
    cache = t.randn(2, 3, 16, 4), t.randn(2, 3, 16, 6)
    found = profiled(lambda: cached_attention(t.randn(2, 3, 4), *cache, t.tensor([5, 9])))
    assert found["cached_attention"] == 2 * 3 * (5 + 9) * (4 + 6)


def test_elementwise_and_reductions_by_hand() -> None:
    x = t.randn(4, 5, requires_grad=True)
    found = profiled(lambda: ((x + 1) * x).relu().sum().backward())
    assert (found["add"], found["mul"], found["relu"], found["sum"], found["relu_gradient"]) == (20, 20, 20, 20, 20)
    found = profiled(lambda: F.max_pool2d(t.randn(1, 2, 4, 4).requires_grad_(), 2).sum().backward())
    assert found["max_pool"] == 2 * 4 * 4
    assert found["scatter_to_maxima"] == 2 * 2 * 4 * 4
    norm = nn.LayerNorm(5)
    found = profiled(lambda: norm(x).sum().backward())
    assert (found["normalize"], found["normalize_gradients"]) == (7 * 20, 13 * 20)


def test_what_has_no_formula_counts_for_nothing() -> None:
    class Twice(Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return g * 2

    with profile() as p:
        Twice.apply(t.ones(3, requires_grad=True)).sum().backward()
    assert all(event.flops is not None for event in p.events)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(FLOPS, "exp")
        with profile() as p:
            t.ones(3).exp()
    assert [event.flops for event in p.events if event.name == "exp"] == [None]
    assert next(row for row in summarize(p) if row.name == "exp").flops == 0


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_by_hand() -> None:
    size = 1 << 12
    x = t.ones(size, requires_grad=True)
    with profile() as p:
        y = x.exp()  # kept for backward, 16 KB
        z = y * 2
        del z
        y.sum().backward()
        del y
    held = {event.name: event.made for event in p.events if not event.backward}
    assert (held["exp"], held["mul"]) == (4 * size, 4 * size)
    sizes = [h for _, h in p.memory]
    assert sizes[0] == 4 * size  # x, when it was first seen
    assert 3 * 4 * size <= p.peak_memory <= 3 * 4 * size + 64
    assert sizes[-1] == 4 * size  # the gradient was made by no operation
    assert [moment for moment, _ in p.memory] == sorted(moment for moment, _ in p.memory)


@reference_kernels()
def test_a_profile_keeps_no_array_alive() -> None:
    """Not even until the next operation: the rules of products call none."""

    def peak(watched: Any) -> int:
        x, c = t.randn(1 << 16, requires_grad=True), t.randn(1 << 16)
        total = ((x * c * c).relu() * c).sum()
        tracemalloc.start()
        with watched:
            total.backward()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(profile())
    alone = peak(nullcontext())
    assert abs(peak(profile(memory=False, stack=False)) - alone) < 1 << 16  # an array has four times as much
    assert abs(peak(profile()) - alone) < 1 << 16


def test_after_the_block_nothing_is_followed() -> None:
    x = t.ones(1000)
    with profile() as p:
        y = x + 1
    before = p.memory
    del y
    assert p.memory == before
    assert profile(memory=False).__enter__().__exit__() is None
    with profile(memory=False) as p:
        x + 1
    assert (p.memory, p.peak_memory, p.ledger) == ([], 0, None)
    assert "at the peak" not in p.table()


# -- attachment --------------------------------------------------------------------------------------------------------


def test_off_nothing_is_attached() -> None:
    before = dict(Optimizer.together)
    assert set(before) == {optim.SGD, optim.Adam, optim.AdamW}  # those that have kernels
    with profile():
        assert len(OBSERVERS) == 1
    assert (OBSERVERS, Optimizer.together) == ([], before)
    with pytest.raises(ZeroDivisionError), profile() as p:
        1 / 0  # noqa: B018
    assert (OBSERVERS, Optimizer.together, m15.PROFILES) == ([], before, [])
    assert p.total_seconds > 0


def test_an_operation_that_fails_leaves_no_trace() -> None:
    with profile() as p:
        with pytest.raises(ValueError, match="matmul"):
            t.ones(2, 3) @ t.ones(2, 3)
        t.ones(2) + 1
    assert [event.name for event in p.events][-1] == "add"
    assert "matmul" not in [event.name for event in p.events]
    assert not p.running.open


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.RMSprop, optim.Lion])
def test_updates_are_the_same_with_a_profile(make: Any) -> None:
    def steps(watched: bool) -> Any:
        t.manual_seed(0)
        layer = nn.Linear(40, 30)
        optimizer, x = make(layer.parameters(), lr=0.01), t.randn(8, 40)
        for _ in range(3):
            optimizer.zero_grad()
            (layer(x) ** 2).sum().backward()
            if watched:
                with profile() as p:
                    optimizer.step()
                (event,) = (event for event in p.events if event.kind == "update")
                assert event.name == f"{make.__name__}.step"
            else:
                optimizer.step()
        return layer.weight.detach()

    assert steps(True).tolist() == steps(False).tolist()


def test_two_profiles_at_once() -> None:
    layer = nn.Linear(2, 2)
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    layer(t.ones(1, 2)).sum().backward()
    with profile() as outer:
        t.ones(2) + 1
        with profile() as inner:
            t.ones(2) * 2
            optimizer.step()
        t.ones(2) - 1
    wanted = {"add", "mul", "sub", "SGD.step"}
    assert [event.name for event in outer.events if event.name in wanted] == ["add", "mul", "SGD.step", "sub"]
    assert [event.name for event in inner.events if event.name in wanted] == ["mul", "SGD.step"]


# -- who is charged ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5))

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        x = x * x
        return self.second(x)


FORWARD = Net.forward.__code__.co_firstlineno


def test_layers_and_lines_forward_and_backward() -> None:
    net = Net()
    with profile() as p:
        net(t.randn(3, 6)).sum().backward()
    found = {(e.name, e.backward): (e.module, user_line(e.place)) for e in p.events}
    first, second = f"{HERE}:{FORWARD + 1} Net.forward", f"{HERE}:{FORWARD + 2} Net.forward"
    third = f"{HERE}:{FORWARD + 3} Net.forward"
    assert found["mul", False] == ("Net", second)
    assert found["drop", False] == ("Net.second.1 (Dropout)", third)
    linears = [(e.module, user_line(e.place), e.backward) for e in p.events if e.name.startswith("linear")]
    assert linears == [
        ("Net.first (Linear)", first, False), ("Net.second.0 (Linear)", third, False),
        ("Net.second.0 (Linear)", third, True), ("Net.first (Linear)", first, True),
    ]  # fmt: skip
    assert found["sum", False][0] == ""
    assert {row.name for row in summarize(p, "module")} >= {"Net.first (Linear)", "(sum)"}


def test_the_sum_over_a_broadcast_is_charged_to_its_operation() -> None:
    """It is not made by the rule but by the engine."""
    scale = t.ones(4, requires_grad=True)
    x = t.randn(3, 4, requires_grad=True)
    with profile() as p:
        y = x + scale
        z = y.exp()
        z.sum().backward()
    line = next(user_line(e.place) for e in p.events if e.name == "add")
    sums = [user_line(e.place) for e in p.events if e.name == "sum" and e.backward]
    assert sums == [line]


def test_a_fused_convolution_is_its_layers() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    with profile() as p:
        net(t.randn(1, 1, 5, 5)).sum().backward()
    fused = [e.module for e in p.events if e.name in ("convolution_relu", "convolution_weight_gradient")]
    assert fused == ["Sequential.0 (Conv2d)"] * 2


def test_without_the_stack_backward_is_still_told_apart() -> None:
    with profile(stack=False) as p:
        Net()(t.randn(3, 6)).sum().backward()
    assert {e.module for e in p.events} == {""}
    assert {e.backward for e in p.events} == {False, True}
    assert not any(e.place for e in p.events)


def test_a_backward_whose_forward_was_not_seen() -> None:
    loss = Net()(t.randn(3, 6)).sum()
    with profile() as p:
        loss.backward()
    assert {e.module for e in p.events} == {""}
    assert {e.backward for e in p.events} == {True}
    assert {user_line(e.place).split()[0].split(":")[0] for e in p.events} == {HERE}


def test_checkpointed_layers_are_charged_again() -> None:
    from tinytorch.utils.checkpoint import checkpoint

    net = Net()
    with profile() as p:
        checkpoint(net, t.randn(3, 6, requires_grad=True)).sum().backward()
    assert sum(e.name == "linear" for e in p.events) == 4


def test_other_threads_are_seen_and_not_added() -> None:
    def work() -> None:
        for _ in range(3):
            t.ones(100).exp()

    with profile() as p:
        t.ones(100).sqrt()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert sum(e.name == "exp" for e in p.events) == 3
    assert "exp" not in [row.name for row in summarize(p)]
    assert_close(sum(row.self for row in summarize(p)), p.total_seconds)
    assert {entry["tid"] for entry in trace(p)["traceEvents"] if entry.get("name") == "exp"} == {1}


# -- tables and timelines ----------------------------------------------------------------------------------------------


def test_ranges() -> None:
    @record_function("decorated")
    def inner() -> None:
        time.sleep(0.01)

    record_function("nobody listens").__enter__().__exit__()
    with profile() as p, record_function("outer"):
        inner()
        t.ones(3).exp()
    rows = {row.name: row for row in summarize(p)}
    assert rows["decorated"].self >= 0.01
    assert rows["outer"].total >= rows["outer"].self + rows["decorated"].total
    assert rows["outer"].self < 0.5 * rows["outer"].total
    assert_close(sum(row.self for row in rows.values()), p.total_seconds)


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    with profile() as p:
        for _ in range(3):
            t.ones(10, 10) @ t.ones(10, 10)
        t.ones(100).exp()
    lines = p.table(sort_by="flops").splitlines()
    assert lines[0].split()[:4] == ["operation", "calls", "self", "ms"]
    assert lines[2].split()[:2] == ["matmul", "3"]
    assert lines[-3].startswith(OBSERVING)
    assert lines[-2].startswith(REST)
    assert "ms in all" in lines[-1]
    assert len({len(line) for line in lines[2:-1]}) == 1  # numbers end in one column
    assert p.table(rows=None).count("\n") == len(lines)
    assert "1 more" in p.table(rows=len(lines) - 6)
    assert "matmul 10×10 10×10" in p.table(by="shape")
    with pytest.raises(ValueError, match="sort_by: expected self, total, calls"):
        p.table(sort_by="name")
    with pytest.raises(ValueError, match="by: expected operation, shape, module, line, got 'colour'"):
        p.table(by="colour")


def test_the_others_of_a_table_are_added_up() -> None:
    with profile() as p:
        x = t.ones(10)
        for _ in range(4):
            (x.exp() + 1).sqrt()
    last = [line for line in p.table(sort_by="calls", rows=1).splitlines() if " more" in line]
    assert last[0].split()[:3] == ["2", "more", "8"]


def test_a_timeline_for_perfetto(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    with profile() as p, record_function("step"):
        layer(t.ones(1, 3)).sum().backward()
    read = json.loads(p.save(tmp_path / "trace.json").read_text())
    events = [entry for entry in read["traceEvents"] if entry["ph"] == "X"]
    assert len(events) == len(p.events)
    for entry, event in zip(events, sorted(p.events, key=lambda e: e.start), strict=True):
        assert entry["ts"] == pytest.approx((event.start - p.started) / 1e3)
        assert entry["dur"] == pytest.approx(1e6 * event.total_seconds)
        assert 0 <= entry["ts"] + entry["dur"] <= 1e6 * p.total_seconds
    linear = next(entry for entry in events if entry["name"] == "linear")
    assert linear["args"]["module"] == "Linear"
    assert linear["args"]["line"].startswith(HERE)
    assert linear["args"]["flops"] == 12
    assert {entry["cat"] for entry in events} == {"range", "forward", "backward"}
    counters = [entry["args"]["bytes"] for entry in read["traceEvents"] if entry["ph"] == "C"]
    assert counters == [held for _, held in p.memory]


# -- figures -----------------------------------------------------------------------------------------------------------


def axes() -> Any:
    return new_figure(8, 5).subplots()


def test_bars_are_self_times() -> None:
    where, rows = axes(), [Row("a", self=3e-3), Row("b", backward=True, self=5e-3), Row(REST, self=2e-3)]
    draw_times(where, rows)
    widths = {bar.get_y() + bar.get_height() / 2: bar.get_width() for bar in where.patches if bar.get_width()}
    assert [widths[i] for i in range(3)] == pytest.approx([2, 3, 5])
    assert [label.get_text() for label in where.get_yticklabels()] == [REST, "a", "b"]
    assert [text.get_text().strip() for text in where.texts] == ["20.0%", "30.0%", "50.0%"]
    where = axes()
    draw_times(where, [Row(str(i), self=1e-3) for i in range(20)], most=4)
    assert where.get_yticklabels()[0].get_text() == "16 more"


def test_the_memorys_curve() -> None:
    with profile() as p:
        t.ones(1000, requires_grad=True).exp().sum().backward()
    where = axes()
    draw_memory(where, p)
    assert max(where.lines[0].get_ydata()) == pytest.approx(p.peak_memory / 1e6)
    assert len(where.patches) == 1  # backward
    with profile(memory=False) as p:
        t.ones(10).exp()
    draw_memory(axes(), p)  # an empty one


def test_roofs_of_one_and_of_all_cores() -> None:
    where = axes()
    draw_roofs(where, MACHINE, [1, 100])
    one, both = (line.get_ydata().tolist() for line in where.lines)
    assert (one, both) == ([10, 100], [10, 200])
    where = axes()
    draw_roofs(where, Machine(1, (1e12, 1e12), (1e11, 1e11), "device"), [1])
    (line,) = where.lines
    assert line.get_label() == "roof of 1 device: 1,000 GFLOP/s, 100 GB/s"


def test_no_name_under_the_roofs_covers_another() -> None:
    from matplotlib.text import Text

    where = axes()
    rows = [Row(f"op{i}", i % 2 == 0, self=1e-3, flops=10**6 + i, moved=10**5) for i in range(12)]
    draw_operations(where, rows, MACHINE)
    where.figure.savefig(BytesIO())  # lays it out
    boxes = [Text.get_window_extent(text) for text in where.texts]
    assert len(boxes) == 12
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
    draw_operations(axes(), [Row(REST, self=1.0)], MACHINE)  # nothing that counts


def test_names_are_kept_apart() -> None:
    assert kept_apart([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    assert_close(kept_apart([0.5, 0.5, 0.5], 0.1), [0.5, 0.6, 0.7])
    assert_close(kept_apart([0.95, 0.97, 1.0], 0.1), [0.8, 0.9, 1.0])
    assert kept_apart([], 0.1) == []


def test_the_figure_of_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinytorch.m15_profiling_appendix.measure_machine", lambda: MACHINE)
    with profile() as p:
        Net()(t.randn(3, 6)).sum().backward()
    assert len(draw_profile(p, MACHINE).axes) == 3
    assert p.plot(tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


# -- summaries ---------------------------------------------------------------------------------------------------------


def test_a_summary_of_a_network() -> None:
    net = Net().train()
    net.second.freeze()
    found = t.summary(net, t.randn(3, 6))
    rows = {layer.name: layer for layer in found.layers}
    assert list(rows) == ["", "first", "second", "second.0", "second.1"]
    assert rows["first"].flops == 2 * 3 * 6 * 5
    assert rows["second"].flops == 2 * 3 * 5 * 5
    own = 3 * 5  # x * x
    assert rows[""].flops == found.flops == rows["first"].flops + rows["second"].flops + own
    assert (rows["second.1"].shape, rows["first"].parameters, found.parameters) == ((3, 5), 35, 65)
    assert (found.trainable, found.bytes) == (35, 260)
    assert net.training
    assert not net.first._hooks
    text = str(found)
    assert "    0: Linear" in text
    assert "65 parameters, 30 of them frozen" in text
    assert repr(found) == text


def test_a_summary_counts_a_layer_each_time_it_is_called() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return self.layer(self.layer(x)), x

    rows = {layer.name: layer for layer in t.summary(Twice(), t.ones(1, 4)).layers}
    assert rows["layer"].flops == 2 * 32
    assert rows["spare"].shape is None
    assert rows[""].shape == ((1, 4), (1, 4))


def test_a_convolution_in_a_summary_is_not_fused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    rows = {layer.name: layer for layer in t.summary(net, t.ones(1, 1, 5, 5)).layers}
    assert rows["0"].shape == (1, 2, 3, 3)
    assert rows["0"].flops == 2 * 18 * 9
    assert rows[""].flops == rows["0"].flops + 18  # the ReLU is no module, so it is the network's own


# -- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_operations_account_for_a_convolutional_step() -> None:
    """The sum of the operations' self times is the wall time but for Python, which takes as long for a batch of any
    size: 1 to 4 milliseconds, as it finds the caches full of a layer's numbers each time."""
    net = t.SimpleCNN()
    step = m15.training_step(net, t.randn(1024, 3, 32, 32), t.randint(0, 10, (1024,)))
    step()
    shares, watching = [], []
    for _ in range(6):
        start = time.perf_counter()
        with profile() as p:
            step()
        wall = time.perf_counter() - start
        own = sum(row.self for row in summarize(p) if row.name not in (REST, OBSERVING))
        assert own < p.total_seconds < wall
        shares.append(own / (p.total_seconds - p.observing_seconds))
        watching.append(p.observing_seconds / p.total_seconds)
    assert max(shares) > 0.95, shares
    assert min(watching) < 0.1, watching
