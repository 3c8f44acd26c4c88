"""Module 20 beside `torch.utils.benchmark`: what its Measurement and its Timer say of the same times."""

from __future__ import annotations

import numpy as np
import pytest
import torch.utils.benchmark as theirs

from tinytorch.m20_benchmarking import SimulatedMachine
from tinytorch.utils import benchmark as ours


@pytest.mark.parametrize("n", [1, 2, 7, 400])
def test_measurements_say_the_same(n: int) -> None:
    times = np.random.default_rng(n).pareto(1.5, n).tolist()
    mine = ours.Measurement(number_per_run=8, raw_times=tuple(times))
    other = theirs.Measurement(8, times, theirs.utils.common.TaskSpec("pass", "pass"))
    for name in ("median", "mean", "iqr", "times"):
        assert getattr(mine, name) == pytest.approx(getattr(other, name), rel=1e-12, abs=1e-15)


def test_timers_measure_the_same() -> None:
    """Each on a simulated clock, which moves by what the statement does."""
    found = []
    for library in (ours, theirs):
        machine = SimulatedMachine(noise=0, outliers=0, drift=0)
        timer = library.Timer("work()", timer=machine.clock, globals={"work": machine.task(0.01)})
        one = timer.blocked_autorange(min_run_time=1.0)
        found.append((one.number_per_run, len(one.raw_times), pytest.approx(one.median)))
        assert timer.timeit(50).median == pytest.approx(0.01)
    assert found[0] == found[1]
