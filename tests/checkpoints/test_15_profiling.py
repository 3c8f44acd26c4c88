"""After module 15: say where a program's time, memory and arithmetic go, and what each part could reach."""

from __future__ import annotations

import time
from typing import Any

from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import mul, ones, op, randn, tensor
from tinytorch.m04_layers import Linear, Module, Sequential
from tinytorch.m05_losses import cross_entropy
from tinytorch.m06_autograd import gradient
from tinytorch.m07_optimizers import Adam
from tinytorch.m09_spatial import SimpleCNN
from tinytorch.m15_profiling import flop_formula, measure_machine, profiled, record_function, summarize
from tinytorch.m15_profiling_appendix import profile, summary


class Wasteful(Module):
    """A network with a layer that takes most of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.quick, self.slow = Linear(64, 64), Sequential(Linear(64, 4096), Linear(4096, 64))

    def forward(self, x: Any) -> Any:
        x = self.quick(x)
        return self.slow(x)


def test_the_profile_finds_what_is_slow() -> None:
    manual_seed(0)
    net, x = Wasteful(), randn(256, 64)
    shortest: dict[str, float] = {}
    for _ in range(7):  # other programs only ever make a call longer
        with profile() as p:
            net(x).sum().backward()
        for row in summarize(p, "module"):
            if not row.backward and row.flops:
                shortest[row.name] = min(row.self, shortest.get(row.name, row.self))
    quick, slow = "Wasteful.quick (Linear)", ["Wasteful.slow.0 (Linear)", "Wasteful.slow.1 (Linear)"]
    assert min(shortest[name] for name in slow) > 2 * shortest[quick]
    flops = {(row.name, row.backward): row.flops for row in summarize(p, "module")}
    assert flops[slow[0], False] == 2 * 256 * 64 * 4096
    assert flops[slow[0], True] == 2 * flops[slow[0], False]


def test_arithmetic_of_a_step_is_three_times_that_of_forward() -> None:
    """But for the first layer, whose input needs no gradient."""
    net, x = Sequential(Linear(10, 20), Linear(20, 30)), randn(8, 10)
    found = profiled(lambda: net(x).sum().backward())
    first, second = 2 * 8 * 10 * 20, 2 * 8 * 20 * 30
    assert found["linear"] == first + second
    assert found["linear_gradients"] == first + 2 * second
    assert summary(net, x).flops == first + second


def test_my_own_operation_counts_when_it_has_a_formula() -> None:
    @op
    def cube_for_checkpoint_15(xp, x):
        """x³."""
        return x * x * x

    gradient(cube_for_checkpoint_15, x=lambda g, x: mul(g, 3 * x * x))
    assert profiled(lambda: cube_for_checkpoint_15(ones(7)))["cube_for_checkpoint_15"] is None
    flop_formula("cube_for_checkpoint_15")(lambda out, x: 2 * out.size)
    assert profiled(lambda: cube_for_checkpoint_15(ones(7)))["cube_for_checkpoint_15"] == 14


def test_memory_of_a_step_grows_with_the_batch_and_goes_back() -> None:
    net, peaks = SimpleCNN(1, 10, 8, widths=(8,)), {}
    for batch in (8, 16, 32):
        x, labels = randn(batch, 1, 8, 8), tensor([1] * batch)
        with profile() as p:
            cross_entropy(net(x), labels).backward()
        peaks[batch] = p.peak_memory
        assert p.memory[-1][1] < p.peak_memory
    assert_close(peaks[32] - peaks[16], 2 * (peaks[16] - peaks[8]), rtol=0.05)  # the rest is the network itself


def test_everything_is_accounted_for() -> None:
    net, x, labels = SimpleCNN(), randn(32, 3, 32, 32), tensor([1] * 32)
    optimizer = Adam(net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with record_function("forward and loss"):
            loss = cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()

    step()
    missing = []
    for _ in range(5):
        start = time.perf_counter()
        with profile() as p:
            step()
        wall = time.perf_counter() - start
        missing.append(1 - sum(row.self for row in summarize(p)) / wall)
    assert -1e-6 < min(missing) < 0.05
    names = {row.name for row in summarize(p)}
    assert {"forward and loss", "Adam.step", "Python between operations"} <= names


def test_no_operation_passes_the_roof() -> None:
    machine, x = measure_machine(), randn(512, 512)
    with profile() as p:
        for _ in range(5):
            x @ x
            x + x
    product, total = (next(row for row in summarize(p) if row.name == name) for name in ("matmul", "add"))
    assert product.flops / product.moved > 100 * total.flops / total.moved  # n / 6 and 1 / 12
    assert product.flops / product.self < 3 * max(machine.peak)  # what else runs here was there at both times, or not
