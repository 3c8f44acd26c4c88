"""After module 20: say which of two programs is faster, and by how much, and be right."""

from __future__ import annotations

from collections import Counter

import pytest

from tinytorch.m01_setup import manual_seed
from tinytorch.m02_tensor import randn
from tinytorch.m03_activations import gelu
from tinytorch.m20_benchmarking import SimulatedMachine, benchmark, compare, scaling

RUNS = 300
NOISES = {
    "quiet": {"noise": 0.01, "outliers": 0.02, "drift": 0.01},
    "shared": {},
    "busy": {"noise": 0.05, "outliers": 0.1, "drift": 0.1},
}


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize(("ratio", "right"), [(1.0, "equal"), (1.05, "slower"), (1 / 1.05, "faster")])
def test_verdicts_are_right_in_95_of_100_runs(ratio: float, right: str, noise: dict[str, float]) -> None:
    """False alarms and misses, "undecided" among them, with the default number of pairs."""
    found, covered = Counter[str](), 0
    for seed in range(RUNS):
        machine = SimulatedMachine(1000 + seed, **noise)
        a, b = machine.task(2e-3), machine.task(2e-3 * ratio, cold=3, cold_calls=seed % 30)
        result = compare(a, b, seed=seed, clock=machine.clock)
        found[result.verdict] += 1
        covered += result.low <= ratio <= result.high
    assert found[right] >= 0.95 * RUNS, found
    assert covered >= 0.95 * RUNS


def test_what_is_four_times_the_work_takes_longer_here_too() -> None:
    manual_seed(0)
    x = randn(16, 16)
    found = compare(lambda: gelu(x), lambda: gelu(gelu(gelu(gelu(x)))), margin=0.1)
    assert found.verdict == "slower"
    assert found.low > 1.1
    one = benchmark(gelu, x, seconds=0.1)
    assert 0 < one.quantile(0.1) <= one.median <= one.quantile(0.99) < 1


def test_growth_is_found_on_a_machine_that_drifts() -> None:
    machine = SimulatedMachine(3, drift=0.3, phase=1000)
    for exponent in (1, 2, 3):
        found = scaling(lambda n, k=exponent: machine.task(1e-6 * n**k), [16, 32, 64, 128], clock=machine.clock)
        assert found.exponent == pytest.approx(exponent, abs=0.1)
