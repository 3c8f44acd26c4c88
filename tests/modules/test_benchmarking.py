"""Module 20: statistics beside NumPy and exact sums, coverage over simulated runs, the Timer, reports and figures."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import tinytorch as t
from tinytorch import m20_benchmarking_appendix as appendix
from tinytorch.m20_benchmarking import (
    Candidate,
    Measurement,
    SimulatedMachine,
    benchmark,
    compare,
    fit_power,
    independent_count,
    interval,
    judge,
    memory_of,
    offline,
    pareto_front,
    quantile,
    ranks,
    scaling,
    serve,
    server,
    transient,
    verdict,
)
from tinytorch.utils.benchmark import Report, Timer, load_report, regressions, save_report

# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 10, 101])
def test_quantiles_are_numpys(n: int) -> None:
    times = np.random.default_rng(n).pareto(1.5, n)
    for q in (0, 0.01, 0.25, 0.5, 0.9, 0.99, 1):
        assert quantile(times.tolist(), q) == pytest.approx(np.quantile(times, q), rel=1e-14)
    one = Measurement(4, tuple(4 * times))
    assert one.median == pytest.approx(np.median(times), rel=1e-14)
    assert one.mean == pytest.approx(times.mean(), rel=1e-14)
    assert one.iqr == pytest.approx(np.subtract(*np.quantile(times, (0.75, 0.25))), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("q", [Fraction(1, 2), Fraction(9, 10), Fraction(99, 100)])
@pytest.mark.parametrize("n", [5, 6, 20, 100, 500])
def test_ranks_are_the_narrowest_that_hold(n: int, q: Fraction) -> None:
    chances = [math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(n + 1)]  # exact
    low, high = ranks(n, float(q), 0.95)
    risk = Fraction(25, 1000)
    assert sum(chances[:low]) <= risk < sum(chances[: low + 1])
    assert sum(chances[high:]) <= risk < sum(chances[high - 1 :])


def test_an_interval_without_times_enough_has_no_end() -> None:
    assert interval([1.0, 2.0, 3.0]) == (-math.inf, math.inf)
    low, high = interval([float(x) for x in np.random.default_rng(0).normal(size=200)], 0.99)
    assert high == math.inf > low > 0


@pytest.mark.parametrize("n", [30, 200, 1000])
@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_intervals_of_independent_times_cover(n: int, q: float) -> None:
    chance, hits, truth = random.Random(n), 0, (1 - q) ** (-1 / 1.5)
    for _ in range(500):
        low, high = interval([chance.paretovariate(1.5) for _ in range(n)], q)
        hits += low <= truth <= high
    assert hits >= 0.935 * 500  # 95 % less one and a half standard errors


def phases(seed: int, n: int, keep: float) -> list[float]:
    """A first-order chain: each value remembers the share `keep` of the one before; of median 0."""
    chance, level, found = random.Random(seed), random.Random(-seed - 1).gauss(0, 1), []
    for _ in range(n):
        level = keep * level + math.sqrt(1 - keep**2) * chance.gauss(0, 1)
        found.append(level)
    return found


def test_times_in_phases_count_as_fewer() -> None:
    for keep, least, most in ((0.0, 700, 1000), (0.5, 250, 550), (0.9, 40, 160), (0.98, 8, 60)):
        counts = [independent_count(phases(seed, 1000, keep), 0.5) for seed in range(30)]
        assert least <= np.median(counts) <= most
    covered = {keep: sum(low <= 0 <= high for low, high in (interval(phases(s, 500, keep)) for s in range(300))) / 300
               for keep in (0.0, 0.5, 0.9)}  # fmt: skip
    assert covered[0.0] >= 0.935
    assert covered[0.5] >= 0.92
    assert covered[0.9] >= 0.86  # what is independent can itself only be estimated; without it, 40 %


def test_the_warm_up_is_found_and_nothing_else() -> None:
    def observed(factor: Callable[[int], float], seed: int, n: int = 300) -> list[float]:
        machine, times = SimulatedMachine(seed, drift=0), []
        for i in range(n):
            before = machine.now
            machine.work(factor(i))
            times.append(machine.now - before)
        return times

    flat = [transient(observed(lambda i: 1, seed)) for seed in range(100)]
    assert np.quantile(flat, 0.95) <= 5
    step = [transient(observed(lambda i: 1.3 if i < 40 else 1, seed)) for seed in range(100)]
    assert np.quantile(step, 0.05) >= 39
    assert np.quantile(step, 0.95) <= 45
    falling = [observed(lambda i: 1 + 0.5 * math.exp(-i / 30), seed) for seed in range(50)]
    assert np.mean([quantile(times[transient(times) :], 0.5) for times in falling]) < 1.035  # 1.022 in the end
    assert transient(observed(lambda i: 1 + i / 100, 0)) == 150


def test_what_never_settles_says_so() -> None:
    machine, calls = SimulatedMachine(drift=0), iter(range(10**6))
    found = benchmark(lambda: machine.work(0.01 * (1 + next(calls) / 50)), clock=machine.clock)
    assert not found.settled
    assert benchmark(machine.task(0.01), clock=machine.clock).settled


def test_a_benchmark_runs_as_long_as_it_is_told() -> None:
    machine = SimulatedMachine(noise=0, outliers=0, drift=0)
    found = benchmark(machine.task(0.01), seconds=2.0, clock=machine.clock)
    assert 199 <= len(found.raw_times) + len(found.discarded) <= 201
    slow = benchmark(machine.task(1.0), seconds=2.0, least=7, clock=machine.clock)
    assert len(slow.raw_times) + len(slow.discarded) == 7
    assert slow.first == pytest.approx(1.0)
    assert slow.number_per_run == 1


def test_where_it_is_too_noisy_the_verdict_is_missing_and_not_wrong() -> None:
    noise = {"noise": 0.1, "outliers": 0.2, "drift": 0.1, "phase": 30}
    for ratio, wrong in ((1.0, {"slower", "faster"}), (1.05, {"equal", "faster"}), (1.02, {"faster"})):
        found = []
        for seed in range(60):
            machine = SimulatedMachine(seed, **noise)
            tasks = machine.task(2e-3), machine.task(2e-3 * ratio)
            found.append(compare(*tasks, seed=seed, clock=machine.clock).verdict)
        assert sum(each in wrong for each in found) <= 3
        assert "undecided" in found


def test_candidates_take_turns() -> None:
    machine, order = SimulatedMachine(noise=0, outliers=0, drift=0), list[str]()

    def task(name: str) -> Callable[[], None]:
        return lambda: order.append(name) or machine.work(0.01)  # type: ignore[func-returns-value]

    found = compare(task("a"), task("b"), looks=(40,), seed=1, clock=machine.clock)
    blocks = {"".join(order[i : i + 4]) for i in range(len(order) - 80, len(order), 4)}
    assert blocks == {"abba", "baab"}
    assert len(found.pairs) == 40
    assert found.verdict == "equal"


def test_short_candidates_are_timed_by_the_call() -> None:
    machine = SimulatedMachine(1)
    found = compare(machine.task(1e-4), machine.task(3.1e-4), seed=1, clock=machine.clock)  # 16 calls a sample, and 4
    assert found.low < 3.1 < found.high
    assert 1e-4 < quantile([a for a, _ in found.pairs], 0.5) < 1.5e-4


def test_what_goes_on_around_a_sample_weighs_little() -> None:
    found = benchmark(abs, -1, seconds=0.01)
    assert found.number_per_run >= 256
    assert found.median < 1e-5  # a microsecond or two pass between two readings of the clock


def test_a_comparison_ends_in_time() -> None:
    machine = SimulatedMachine(noise=0.5)
    start = machine.now
    found = compare(machine.task(1.0), machine.task(1.03), seconds=100, seed=1, clock=machine.clock)
    assert machine.now - start < 2000
    assert len(found.pairs) < 100
    assert found.verdict == "undecided"
    with pytest.raises(ValueError, match="margin and seconds above 0"):
        compare(lambda: 0, lambda: 0, margin=0)


def test_steady_growth_cancels() -> None:
    """Each call takes 1 % longer than the one before: b, if it were always second, would seem slower by 1 %."""
    times = [1.01**i for i in range(400)]
    pairs = []
    for i in range(0, 400, 4):
        a, b, b_again, a_again = times[i : i + 4]
        pairs += [(a, b), (a_again, b_again)]
    found = judge(pairs, 0.02, 0.95)
    assert found.low < 1 < found.high
    assert found.ratio == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0.99, 1.01, "equal"), (1.03, 1.05, "slower"), (0.9, 0.97, "faster"), (1.01, 1.03, "undecided"),
     (0.97, 1.0, "undecided"), (0.0, math.inf, "undecided")],
)  # fmt: skip
def test_verdicts(low: float, high: float, wanted: str) -> None:
    assert verdict(low, high, 0.02) == wanted


def test_a_fit_is_least_squares() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.uniform(1, 100, 6)
        values = 3 * sizes**1.7 * np.exp(rng.normal(0, 0.1, 6))
        exponent, error, factor = fit_power(sizes.tolist(), values.tolist())
        design = np.stack([np.log(sizes), np.ones(6)], 1)
        solution, residue, *_ = np.linalg.lstsq(design, np.log(values), rcond=None)
        covariance = residue[0] / 4 * np.linalg.inv(design.T @ design)
        assert [exponent, math.log(factor)] == pytest.approx(solution.tolist(), rel=1e-9)
        assert error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-9)


def test_errors_of_exponents_are_what_they_say() -> None:
    """Over many fits, the exponent lies within 2.78 errors (Student's t, 4 degrees of freedom) in 95 of 100."""
    rng, hits, sizes = np.random.default_rng(1), 0, 2.0 ** np.arange(6)
    for _ in range(400):
        exponent, error, _ = fit_power(sizes.tolist(), (sizes**2 * np.exp(rng.normal(0, 0.05, 6))).tolist())
        hits += abs(exponent - 2) <= 2.776 * error
    assert 0.92 <= hits / 400 <= 0.98


# -- what is measured --------------------------------------------------------------------------------------------------


def test_memory_of_a_training_step_is_given_back() -> None:
    model, x = t.nn.Linear(256, 256), t.randn(1024, 256)
    loss = lambda: model(x).square().mean()
    with t.no_grad():
        without = memory_of(loss)
    recorded = memory_of(loss)
    assert 1024 * 256 * 4 <= without.peak < 3 * 1024 * 256 * 4
    assert without.held < 5_000
    assert recorded.held >= 1024 * 256 * 4  # what backward needs


def test_scaling_measures_each_size_in_every_round() -> None:
    machine, seen = SimulatedMachine(noise=0, outliers=0, drift=0), list[int]()

    def build(n: int) -> Callable[[], None]:
        return lambda: seen.append(n) or machine.work(n / 100)  # type: ignore[func-returns-value]

    found = scaling(build, [1, 2, 4], rounds=5, items=True, clock=machine.clock)
    rounds = [seen[i : i + 3] for i in range(len(seen) - 15, len(seen), 3)]
    assert all(sorted(each) == [1, 2, 4] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert found.exponent == pytest.approx(1)
    assert [one.throughput for one in found.measurements] == pytest.approx([100, 100, 100])


def test_offline_takes_the_batch_that_does_most() -> None:
    machine = SimulatedMachine(noise=0, outliers=0, drift=0)
    seconds = {1: 0.010, 8: 0.020, 64: 0.200}
    found = offline(lambda n: machine.task(seconds[n]), list(seconds), seconds=0.5, clock=machine.clock)
    assert (found.name, found.items) == ("batch 8", 8)
    assert found.throughput == pytest.approx(400)


def test_a_server_takes_those_that_wait_together() -> None:
    machine, sizes = SimulatedMachine(noise=0, outliers=0, drift=0), list[int]()

    def work(n: int) -> None:
        sizes.append(n)
        machine.work(0.1)

    load = serve(work, rate=50, queries=200, most=4, clock=machine.clock)
    assert sum(sizes) == len(load.latencies) == 200
    assert max(sizes) == 4
    assert all(latency >= 0.1 - 1e-9 for latency in load.latencies)
    assert load.busy > 0.95  # 50 a second at 4 in 0.1 s: more than it can do
    alone = serve(work, rate=0.001, queries=50, most=4, clock=machine.clock)
    assert max(alone.latencies) == pytest.approx(0.1)  # nobody waits


def test_arrivals_are_those_of_the_rate() -> None:
    machine = SimulatedMachine(noise=0, outliers=0, drift=0)
    load = serve(machine.task(0.01), rate=20, queries=5000, clock=machine.clock)
    assert load.busy == pytest.approx(0.2, rel=0.05)


def test_the_highest_rate_grows_with_the_bound() -> None:
    machine = SimulatedMachine(2)
    found = [server(machine.task(0.01), bound, queries=500, clock=machine.clock) for bound in (0.03, 0.06, 0.2)]
    assert 0 < found[0].rate < found[1].rate < found[2].rate < 100
    for one in found:  # tried once more, after seven times of halving
        assert len(one.loads) >= 8
        assert one.loads[-1].rate == one.rate


def test_pareto_fronts_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(0, 5, (40, 3))
    candidates = [Candidate(str(i), float(a), int(b), float(c)) for i, (a, b, c) in enumerate(table)]
    front = {one.name for one in pareto_front(candidates)}
    costs = table * [-1, 1, 1]
    expected = {str(i) for i in range(40) if not ((costs <= costs[i]).all(1) & (costs < costs[i]).any(1)).any()}
    assert front == expected


# -- Timer -------------------------------------------------------------------------------------------------------------


def test_timer_runs_statements_with_names() -> None:
    seen: list[int] = []
    timer = Timer("seen.append(x)", setup="x = 3", globals={"seen": seen})
    found = timer.timeit(100)
    assert seen == [3] * 102
    assert (found.number_per_run, len(found.times), found.name) == (100, 1, "seen.append(x)")
    assert 0 < found.median < 1e-3


def test_blocked_autorange_finds_its_number() -> None:
    found = Timer("pass", timer=time.perf_counter).blocked_autorange(min_run_time=0.02)
    assert found.number_per_run >= 1000
    assert sum(found.raw_times) >= 0.02
    machine = SimulatedMachine(noise=0, outliers=0, drift=0)
    found = Timer("work()", globals={"work": machine.task(0.25)}, timer=machine.clock).blocked_autorange(1.0)
    assert found.number_per_run == 1
    assert found.times == [0.25] * 4


# -- reports -----------------------------------------------------------------------------------------------------------


def measured(name: str, seconds: float, seed: int = 0, n: int = 300) -> Measurement:
    machine, times = SimulatedMachine(seed, drift=0), []
    for _ in range(n):
        before = machine.now
        machine.work(seconds)
        times.append(machine.now - before)
    return Measurement(1, tuple(times), name)


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    one = Measurement(4, (1.0, 2.0), "x", 8, 3.0, (5.0,), False)
    report = Report((one, Measurement(1, (0.5,))), {"batch": 8}, {"rate": math.inf})
    path = save_report(report, tmp_path / "below" / "report.json")
    again = load_report(path)
    assert again.measurements[0] == one
    assert again.measurements[1].raw_times == (0.5,)
    assert math.isnan(again.measurements[1].first)
    assert (again.settings, again.machine, again.date) == (report.settings, report.machine, report.date)
    assert again.versions["python"]
    assert again.versions["numpy"] == np.__version__
    assert again.machine["cores"] >= 1
    found = json.loads(path.read_text())
    assert found["measurements"][0]["summary"]["p50"] == 0.375
    assert found["measurements"][0]["summary"]["p99_interval"] == [0.5, None]
    assert found["results"] == {"rate": None}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', '{"format": "tinytorch.benchmark/1"}'])
def test_what_is_no_report_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"file\.json is no report"):
        load_report(path)


def test_regressions_are_found_and_noise_is_not() -> None:
    wrong = 0
    for seed in range(200):
        before = Report((measured("same", 1.0, seed), measured("slower", 1.0, seed + 1000), measured("gone", 1.0)))
        after = Report((measured("same", 1.0, seed + 2000), measured("slower", 1.05, seed + 3000)))
        found = {one.name: one for one in regressions(before, after, margin=0.02)}
        assert set(found) == {"same", "slower"}
        wrong += (found["same"].verdict, found["slower"].verdict) != ("equal", "slower")
    assert wrong <= 10


def test_intervals_of_ratios_cover() -> None:
    hits = 0
    for seed in range(300):
        before, after = Report((measured("x", 1.0, seed, 60),)), Report((measured("x", 1.1, seed + 500, 60),))
        (one,) = regressions(before, after)
        hits += one.low <= 1.1 <= one.high
    assert 0.935 <= hits / 300 <= 0.995


def test_reports_of_other_things_are_not_compared() -> None:
    with pytest.raises(ValueError, match="no measurement in common"):
        regressions(Report((measured("x", 1.0),)), Report((measured("y", 1.0),)))
    few = Report((Measurement(1, (1.0, 2.0), "x"),))
    assert regressions(few, few)[0].verdict == "undecided"


def test_what_reports_differ_in_is_said() -> None:
    before = Report((measured("x", 1.0),), {"batch": 8})
    after = Report((measured("x", 1.0),), {"batch": 16}, machine={**before.machine, "processor": "another"})
    found = appendix.differing(before, after)
    assert "batch: 8 and 16" in found
    assert f"processor: {before.machine['processor']} and another" in found
    assert len(found) == 2


# -- figures -----------------------------------------------------------------------------------------------------------


def test_figures_are_drawn(tmp_path: Path) -> None:
    machine = SimulatedMachine()
    one = measured("one", 1e-3)
    paths = [
        appendix.plot_latencies([one, measured("two", 2e-3)], tmp_path / "a.png"),
        appendix.plot_scaling(
            {"": scaling(lambda n: machine.task(1e-3 * n), [1, 2, 4], clock=machine.clock, rounds=3)},
            tmp_path / "b.png",
        ),
        appendix.plot_server({"": server(machine.task(0.01), 0.05, queries=50, clock=machine.clock)}, tmp_path / "c"),
        appendix.plot_pareto([Candidate("x", 0.9, 10**6, 1e-3), Candidate("y", 0.8, 10**3, 1e-4)], tmp_path / "d.png"),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
