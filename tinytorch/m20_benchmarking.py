"""Module 20: benchmarking, or how to say which of two programs is faster, and by how much, and be right.

Learning objectives. After this module you can
1. time a call so that its median, its percentiles and their intervals mean something on a machine that others use, too;
2. tell candidates that differ by five percent from equal ones, and both from those that cannot be told apart;
3. test a way of measuring on a machine whose truth you know, and state its error rates;
4. say how time grows with a size, and how certain that is;
5. find the highest load that a server bears, and choose among models by what they cost and what they are worth.
"""

from __future__ import annotations

import math
import random
import statistics
import time
import tracemalloc
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from tinytorch.m01_setup import _elapsed, assert_close, manual_seed, message_of, print_table, run_module
from tinytorch.m02_tensor import Tensor, randn
from tinytorch.m02_tensor_appendix import randint
from tinytorch.m04_layers import Linear, Module, Sequential
from tinytorch.m06_autograd import no_grad
from tinytorch.m09_spatial import SimpleCNN, count_flops
from tinytorch.m14_transformers import GPT, GPTConfig

Clock = Callable[[], float]

# %% [markdown]
# ## Mathematical foundations
#
# Times of one call are a sample from a distribution with a long right tail: other programs, interrupts and page faults
# only ever add. Its mean may be decided by one call in a thousand; its *quantiles* are not. $\xi_q$ is the time that a
# share $q$ of all calls stays below. Of $n$ sorted times $x_{(1)} \le \dots \le x_{(n)}$, how many lie below $\xi_q$ is
# binomial, whatever the distribution is, so
#
# $$P(x_{(l)} \le \xi_q \le x_{(u)}) \ge \sum_{k=l}^{u-1} \binom{n}{k} q^k (1-q)^{n-k}.$$
#
# Choose $l$ and $u$ so that the sum is 95 %, and you have a **confidence interval** without assuming anything about the
# tail (a bootstrap of a median comes to much the same, costs a thousand times as much, and promises less).
#
# It does assume that calls are independent. Machines have phases, and a call in a slow one stands beside another. With
# $\rho_k$ the correlation of "is below $\xi_q$" $k$ calls apart, $n$ calls say as much as
# $n / (1 + 2 \sum_k \rho_k)$ independent ones.
#
# **Two candidates** A and B share the machine's phase if they run right after each other: of
# $d_i = \log b_i - \log a_i$ the phase cancels. The order A B B A, or B A A B at random, also cancels what grows
# steadily. The median of $d_i$ estimates the logarithm of the ratio, with the interval above. With a margin $m$, B is
#
# - *slower* if the whole interval of the ratio lies above $1 + m$, *faster* if it lies below $1 / (1 + m)$,
# - *equal* if the whole interval lies between these two, and *undecided* otherwise.
#
# Each of the first three is wrong only if the interval misses the truth. Who looks $L$ times, and stops when there is a
# verdict, has $L$ chances to be wrong: each interval gets a confidence of $1 - 0.05 / L$ (Bonferroni).
#
# **Growth**: $t = c\,n^k$ is a line in logarithms; its slope is $k$, and how far points lie from it gives $k$'s error.
#
# **Queues** (Lindley, 1952): query $i$ arrives at $A_i$ and ends at $E_i = \max(A_i, E_{i-1}) + S_i$. If arrivals are
# *Poisson* at rate $\lambda$ and each takes $S$, the load is $\rho = \lambda S$ and the mean wait
# $S \rho / 2(1 - \rho)$ (Pollaczek and Khinchine, 1930): at a load of 0.9, four and a half times the work itself.

# %% [markdown]
# ## Implementation
#
# ### A machine whose truth is known
# Whether a way of measuring is right cannot be seen on a real machine, because nobody knows the true time. So we build
# one, of which we do: its clock moves only when it works, by the true time multiplied with noise, outliers that have no
# variance (Pareto's distribution), and phases that come and go. Everything below takes its clock as a parameter.


# %%
class SimulatedMachine:
    """A clock, and tasks that move it on by their true seconds times what disturbs a shared machine.

    Args:
        noise: relative spread of each call.
        outliers: share of the calls that take much longer, by half on average and by any factor at times.
        drift: relative spread of the machine's phases; `phase`: how many calls they last.
    """

    def __init__(
        self, seed: int = 0, noise: float = 0.03, outliers: float = 0.05, drift: float = 0.03, phase: float = 100
    ) -> None:
        self.noise, self.outliers, self.drift, self.keep = noise, outliers, drift, math.exp(-1 / phase)
        self.random = random.Random(seed)
        self.now, self.level = 0.0, self.random.gauss(0, drift)

    def clock(self) -> float:
        return self.now

    def task(self, seconds: float, cold: float = 1.0, cold_calls: int = 0) -> Callable[..., None]:
        """A call that takes so many seconds, times `cold` for the first few calls; of a batch, as often."""
        left = iter([cold] * cold_calls)
        return lambda batch=1: self.work(batch * seconds * next(left, 1.0))

    def work(self, seconds: float) -> None:
        chance = self.random
        self.level = self.keep * self.level + math.sqrt(1 - self.keep**2) * chance.gauss(0, self.drift)
        slower = math.exp(self.level + self.noise * abs(chance.gauss(0, 1)))
        if chance.random() < self.outliers:
            slower *= 1 + 0.5 * chance.paretovariate(1.5)
        self.now += seconds * slower


def test_a_simulated_task_takes_its_time_at_least() -> None:
    machine = SimulatedMachine(drift=0)
    task = machine.task(2.0, cold=3, cold_calls=1)
    task()
    assert 6 <= machine.clock() < 7
    task()
    assert 8 <= machine.clock() < 9.5


# %% [markdown]
# ### Quantiles, and how certain they are
# The p99 of five calls is the slowest of them in disguise. An interval says so: where there are too few times for a
# bound, it is infinite.


# %%
def quantile(times: Sequence[float], q: float) -> float:
    """The value that a share q of the times lies below, between two of them if need be (NumPy's default)."""
    if not times or not 0 <= q <= 1:
        raise ValueError(f"quantile: expected 0 <= q <= 1 and a time at least, got q = {q} and {len(times)} times")
    ordered, place = sorted(times), q * (len(times) - 1)
    below = min(int(place), len(times) - 2) if len(times) > 1 else 0
    rest = place - below
    return (1 - rest) * ordered[below] + rest * ordered[below + 1] if rest else ordered[below]


@cache
def ranks(n: int, q: float, confidence: float) -> tuple[int, int]:
    """Which of n sorted values, counted from 1, enclose the q-quantile; 0 and n + 1 stand for none."""
    log_q, log_p, risk = math.log(q), math.log1p(-q), (1 - confidence) / 2

    def chance(k: int) -> float:
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return math.exp(ways + k * log_q + (n - k) * log_p)

    low = next(k for k, total in enumerate(accumulate(map(chance, range(n + 1)))) if total > risk)
    high = next(n - k for k, total in enumerate(accumulate(map(chance, range(n, -1, -1)))) if total > risk)
    return low, high + 1


def test_the_ranks_of_a_median() -> None:
    assert quantile([4.0, 1.0, 2.0], 0.125) == 1.25
    assert ranks(10, 0.5, 0.95) == (2, 9)  # as tables have it
    assert ranks(100, 0.5, 0.95) == (40, 61)
    assert ranks(5, 0.5, 0.95) == (0, 6)  # the interval of five values would hold in 94 % only
    assert ranks(100, 0.99, 0.95)[1] == 101


# %% [markdown]
# How many independent times are there? Written as bits, one for each call, neighbours k apart that differ are the ones
# in `bits ^ bits >> k`. Sums of two neighbouring correlations are positive for chains of this kind; the first one that
# is not says that only noise is left (Geyer, 1992).


# %%
def independent_count(times: Sequence[float], q: float) -> int:
    """How many independent times would say as much about the q-quantile as these, which are in order of measuring."""
    n, middle = len(times), quantile(times, q)
    bits = int("".join(str(int(x <= middle)) for x in times), 2)
    share = bits.bit_count() / n  # not q, where times are equal
    if share == 1:
        return n

    def correlation(k: int) -> float:
        differ = ((bits ^ bits >> k) & ((1 << n - k) - 1)).bit_count()
        return 1 - differ / (n - k) / (2 * share * (1 - share))

    total = 0.0
    for k in range(1, n // 2, 2):
        pair = correlation(k) + correlation(k + 1)
        if pair <= 0:
            break
        total += pair
    return max(1, int(n / (1 + 2 * total)))


def interval(times: Sequence[float], q: float = 0.5, confidence: float = 0.95) -> tuple[float, float]:
    """A confidence interval of the q-quantile, from order statistics; infinite where there are too few times.

    Args:
        times: in the order of measuring, which tells how much they depend on each other.
    """
    if not 0 < q < 1 or not 0 < confidence < 1:
        raise ValueError(f"interval: expected 0 < q < 1 and 0 < confidence < 1, got {q} and {confidence}")
    ordered, n, count = sorted(times), len(times), independent_count(times, q)
    low, high = ranks(count, q, confidence)
    lower, upper = math.floor(low * n / count), math.ceil(high * n / count)
    return ordered[lower - 1] if low else -math.inf, ordered[upper - 1] if high <= count else math.inf


def test_intervals_cover_the_truth_as_often_as_they_promise() -> None:
    chance, hits = random.Random(0), Counter[float]()
    for _ in range(400):
        times = [chance.paretovariate(1.5) for _ in range(60)]  # of infinite variance
        for q in (0.5, 0.9):
            low, high = interval(times, q)
            hits[q] += low <= (1 - q) ** (-1 / 1.5) <= high
    assert all(0.93 <= hits[q] / 400 <= 1 for q in (0.5, 0.9))
    assert independent_count([1, 1, 1, 1, 2, 2, 2, 2] * 5, 0.5) < 40 == independent_count([1, 2] * 20, 0.5)
    assert interval([1.0] * 10) == (1, 1)


# %% [markdown]
# ### When has it settled?
# The first calls compile, load and wake. How many are special, nobody knows beforehand, so look back: of all ways to
# leave out a beginning, take the one after which the mean's standard error is least (White's MSER rule, 1997). What is
# left out makes the rest quieter, until only noise is left out, which makes it smaller for nothing. In the place of
# times stand their ranks: an outlier weighs no more than the slowest ordinary call. If half of all would have to go, it
# has not settled.


# %%
def transient(times: Sequence[float]) -> int:
    """How many of the first times belong to the warm-up; half of them where they have not settled."""
    ordered, n = sorted(times), len(times)
    rank = [bisect_left(ordered, t) for t in times]  # equal times have equal ranks
    best, first, total, squares = math.inf, 0, 0, 0
    for start in range(n - 1, -1, -1):
        total, squares, kept = total + rank[start], squares + rank[start] ** 2, n - start
        error = (squares - total**2 / kept) / kept**2
        if start <= n // 2 and error <= best:
            best, first = error, start
    return first


def test_the_warm_up_is_found() -> None:
    machine = SimulatedMachine(drift=0)
    for cold_calls in (0, 1, 30):
        task = machine.task(1.0, cold=1.3, cold_calls=cold_calls)
        assert cold_calls <= transient([_elapsed(task, (), 1, machine.clock) for _ in range(200)]) <= cold_calls + 4
    assert transient([1 + i / 100 for i in range(100)]) == 50
    assert transient([1.0] * 100) == 0


# %% [markdown]
# ### One candidate
# A sample is one call where that takes a hundred times as long as what goes on around it, else several. (`_elapsed`,
# from module 01, waits for a GPU's result before it stops the clock.) The first call is kept apart: it is what a
# user waits for after a start. Throughput is what is done in *all* the time, slow calls included; so it takes the mean.


# %%
@dataclass(frozen=True)
class Measurement:
    """Times of a call.

    Attributes:
        number_per_run: calls in each sample. Percentiles are those of single calls only where it is 1.
        raw_times: seconds of each sample, in the order of measuring, without warm-up.
        name: what was measured; items: how many pictures, texts … one call deals with.
        first: seconds of the very first call; discarded: samples left out as warm-up; settled: whether it had an end.
    """

    number_per_run: int
    raw_times: tuple[float, ...]
    name: str = ""
    items: int = 1
    first: float = math.nan
    discarded: tuple[float, ...] = ()
    settled: bool = True

    @property
    def times(self) -> list[float]:
        """Seconds of a call, by sample."""
        return [t / self.number_per_run for t in self.raw_times]

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.times)

    @property
    def iqr(self) -> float:
        """How far the middle half of the times reaches."""
        return self.quantile(0.75) - self.quantile(0.25)

    @property
    def throughput(self) -> float:
        """Items a second."""
        return self.items / self.mean

    def quantile(self, q: float) -> float:
        return quantile(self.times, q)

    def interval(self, q: float = 0.5, confidence: float = 0.95) -> tuple[float, float]:
        """The confidence interval of a quantile."""
        return interval(self.times, q, confidence)


def test_a_measurement_describes_its_times() -> None:
    found = Measurement(10, (10.0, 20.0, 30.0, 80.0), items=7)
    assert (found.median, found.mean, found.quantile(1), found.throughput) == (2.5, 3.5, 8, 2)
    assert_close(found.iqr, 4.25 - 1.75)


def calls_for(function: Callable, args: tuple, least: float, clock: Clock) -> int:
    """How many calls take at least so many seconds, twice, as one may have been interrupted: a power of two."""
    calls = 1
    while any(_elapsed(function, args, calls, clock) < least for _ in range(2)):
        calls *= 2
    return calls


def sample_cost(clock: Clock) -> float:
    """Seconds that a sample takes without what is measured."""
    return min(_elapsed(lambda: None, (), 1, clock) for _ in range(5))


PATIENCE, MOST = 4, 10_000  # how often times that have not settled are given more time; samples in each of these


def benchmark(
    function: Callable, *args: Any, name: str = "", items: int = 1, seconds: float = 1.0, least: int = 20,
    clock: Clock = time.perf_counter,
) -> Measurement:  # fmt: skip
    """Time function(*args), again and again, until times have settled. It should return what it computes.

    Args:
        seconds: how long to measure, and longer where it takes that to make `least` samples, or to settle.
        clock: returns seconds.
    """
    first = _elapsed(function, args, 1, clock)
    calls = calls_for(function, args, 100 * sample_cost(clock), clock)
    times: list[float] = []
    for _ in range(PATIENCE):
        begun, before = clock(), len(times)
        while len(times) < before + least or (clock() - begun < seconds and len(times) < before + MOST):
            times.append(_elapsed(function, args, calls, clock))
        skipped = transient(times)
        if settled := skipped < len(times) // 2:
            break
    return Measurement(calls, tuple(times[skipped:]), name, items, first, tuple(times[:skipped]), settled)


def test_a_benchmark_begins_where_the_warm_up_ends() -> None:
    machine = SimulatedMachine(drift=0)
    found = benchmark(machine.task(2e-3, cold=4, cold_calls=80), items=8, clock=machine.clock, seconds=2.0)
    assert 80 <= 2 + len(found.discarded) <= 90
    assert found.settled
    assert found.first > 8e-3
    assert 2e-3 < found.median < 2.2e-3 < found.quantile(0.99)
    assert benchmark(abs, -1, seconds=0.01).number_per_run >= 8  # far below what one reading of the clock could tell


# %% [markdown]
# ### How much memory?
# Two figures: the peak, which must fit, and what is still held when the call is over and its result is kept. NumPy
# tells `tracemalloc` of every array. That slows calls down, so memory is never measured while time is.


# %%
class MemoryUse(NamedTuple):
    """Bytes on top of what there was before: at most during a call, and after it, with its result."""

    peak: int
    held: int


def memory_of(function: Callable, *args: Any) -> MemoryUse:
    """The memory that function(*args) takes, from its second call on. Counts Python's and NumPy's, not a GPU's.

    The peak is the highest of three calls: it depends on how many threads have their scratch at the same moment.
    """
    found = [MemoryUse(0, 0)]
    function(*args)
    for _ in range(3):
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        result = function(*args)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        del result
        found.append(MemoryUse(peak - before, held - before))
    return MemoryUse(max(use.peak for use in found), found[-1].held)


def test_memory_is_counted() -> None:
    x = randn(1000, 100)
    peak, held = memory_of(lambda: (x + x).sum(0))
    assert 400_000 <= peak < 420_000  # the sum of the matrices
    assert 400 <= held < 5_000  # one row


# %% [markdown]
# ### Two candidates
# Each pair of samples gives one ratio. At every look, the interval decides whether there is a verdict, or whether twice
# as many pairs are needed. Both are warmed up before, and a warm-up that is seen only later is left out as above.


# %%
def verdict(low: float, high: float, margin: float) -> str:
    """What an interval of a ratio of times says of the one above the line."""
    fastest, slowest = 1 / (1 + margin), 1 + margin
    if low > slowest or high < fastest:
        return "slower" if low > slowest else "faster"
    return "equal" if fastest < low and high < slowest else "undecided"


@dataclass(frozen=True)
class Comparison:
    """How long b takes, beside a.

    Attributes:
        ratio: seconds of b for one of a; low, high: its confidence interval, at all looks together.
        margin: up to which relative difference they count as equal.
        pairs: seconds of a call of a, and of b right before or after it.
    """

    ratio: float
    low: float
    high: float
    margin: float
    pairs: tuple[tuple[float, float], ...]

    @property
    def verdict(self) -> str:
        """What b is: "faster", "slower", "equal" or, if the interval does not tell, "undecided"."""
        return verdict(self.low, self.high, self.margin)


LOOKS = (32, 64, 128, 256, 512)  # pairs
WARM_UP = 0.25  # seconds, at least, that each candidate is watched for before the first pair


def compare(
    a: Callable[[], Any], b: Callable[[], Any], margin: float = 0.02, confidence: float = 0.95,
    looks: Sequence[int] = LOOKS, seconds: float = 60.0, seed: int | None = None, clock: Clock = time.perf_counter,
) -> Comparison:  # fmt: skip
    """Time two candidates in turn, in the order A B B A or B A A B by chance, until there is a verdict.

    Args:
        margin: up to which relative difference they are equal.
        confidence: with which the interval holds, and so with which a verdict is right.
        looks: after how many pairs it is judged; the last one ends it.
        seconds: after which the next look is taken, and is the last.
    """
    if not (margin > 0 and seconds > 0 and 0 < confidence < 1 and looks and min(looks) > 0):
        raise ValueError("compare: expected margin and seconds above 0, a confidence between 0 and 1, and looks at one "
                         f"pair at least, got {margin}, {seconds}, {confidence} and {looks}")  # fmt: skip
    for function in (a, b):
        benchmark(function, seconds=WARM_UP, clock=clock)
    chance, begun, each = random.Random(seed), clock(), 1 - (1 - confidence) / len(looks)
    calls = [calls_for(function, (), 1e-3, clock) for function in (a, b)]
    pairs: list[tuple[float, float]] = []
    for look in looks:
        while len(pairs) < look and (late := clock() - begun) < seconds:
            order = (0, 1, 1, 0) if chance.random() < 0.5 else (1, 0, 0, 1)
            times = [_elapsed((a, b)[i], (), calls[i], clock) / calls[i] for i in order]
            pairs += [(t, u) if i == 0 else (u, t) for i, t, u in zip(order[::2], times[::2], times[1::2], strict=True)]
        found = judge(pairs, margin, each)
        if found.verdict != "undecided" or late >= seconds:
            break
    return found


def judge(pairs: Sequence[tuple[float, float]], margin: float, confidence: float) -> Comparison:
    """What pairs of times, in the order of measuring, say of the ratio of the second to the first."""
    logs = [math.log(b / a) for a, b in pairs]
    logs = logs[transient(logs) :]
    ratio, low, high = (math.exp(value) for value in (quantile(logs, 0.5), *interval(logs, 0.5, confidence)))
    return Comparison(ratio, low, high, margin, tuple(pairs))


def verdicts(ratio: float, runs: int, **noise: float) -> Counter[str]:
    """How often each verdict comes out, over simulated runs of two tasks whose times have a ratio."""
    found = Counter[str]()
    for seed in range(runs):
        machine = SimulatedMachine(seed, **noise)
        tasks = machine.task(2e-3, cold=2, cold_calls=seed % 40), machine.task(2e-3 * ratio, cold=3, cold_calls=9)
        found[compare(*tasks, seed=seed, clock=machine.clock).verdict] += 1
    return found


def test_five_percent_are_found_and_equals_are_called_equal() -> None:
    assert verdicts(1.05, 40)["slower"] >= 39
    assert verdicts(1 / 1.05, 40)["faster"] >= 39
    assert verdicts(1.0, 40)["equal"] >= 39
    assert verdicts(1.02, 40)["undecided"] >= 36  # on the margin, nobody can tell


# %% [markdown]
# ### How time grows
# The sizes are measured in rounds, each round in another order: a machine that slows down must not look like growth.
# A slope from four points says little without its error, which comes from how far the points lie from the line; there
# also shows what is no power at all, such as a fixed cost that small sizes pay.


# %%
@dataclass(frozen=True)
class Scaling:
    """Median times over sizes, and the line through their logarithms: seconds = factor · size^exponent.

    Attributes:
        error: the exponent's standard error.
    """

    sizes: tuple[float, ...]
    measurements: tuple[Measurement, ...]
    exponent: float
    error: float
    factor: float


def fit_power(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """Exponent, its standard error and factor of values = factor · sizes^exponent, by least squares of logarithms."""
    if len(set(sizes)) < 3 or len(sizes) != len(values) or min(*sizes, *values) <= 0:
        raise ValueError(f"fit_power: expected three different sizes, and values, above 0; got {sizes} and {values}")
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    slope, intercept = statistics.linear_regression(x, y)
    mean = statistics.fmean(x)
    residue = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True)) / (len(x) - 2)
    return slope, math.sqrt(residue / sum((a - mean) ** 2 for a in x)), math.exp(intercept)


def scaling(
    build: Callable[[Any], Callable[[], Any]], sizes: Sequence[int], rounds: int = 15, items: bool = False,
    clock: Clock = time.perf_counter,
) -> Scaling:  # fmt: skip
    """Time build(size)() over sizes, in rounds, and fit the exponent.

    Args:
        build: makes what is timed: of a batch, a width, a length or a number of threads.
        items: whether a call deals with as many items as its size says, as that of a batch does.
    """
    functions, order, chance = [build(size) for size in sizes], list(range(len(sizes))), random.Random(0)
    firsts = [_elapsed(function, (), 1, clock) for function in functions]
    calls = [calls_for(function, (), 1e-3, clock) for function in functions]
    times: list[list[float]] = [[] for _ in sizes]
    for _ in range(rounds):
        chance.shuffle(order)
        for i in order:
            times[i].append(_elapsed(functions[i], (), calls[i], clock))
    found = tuple(
        Measurement(calls[i], tuple(times[i]), f"{size:,}", size if items else 1, firsts[i])
        for i, size in enumerate(sizes)
    )
    return Scaling(tuple(sizes), found, *fit_power(sizes, [one.median for one in found]))


def test_an_exponent_is_found_with_its_error() -> None:
    assert_close(fit_power([1, 2, 4, 8], [3, 12, 48, 192]), [2, 0, 3], atol=1e-12)
    assert_close(fit_power([1, 10, 100], [1, 10, 1])[:2], [0, 3**-0.5], atol=1e-12)
    machine = SimulatedMachine(drift=0.2)
    found = scaling(lambda n: machine.task(1e-5 * n**1.5), [10, 20, 40, 80, 160], clock=machine.clock)
    assert abs(found.exponent - 1.5) < 3 * found.error + 0.01
    assert found.error < 0.05
    assert "three different sizes" in message_of(fit_power, [1, 2, 2], [1, 2, 2], error=ValueError)


# %% [markdown]
# ### A load to bear
# MLPerf Inference (Reddi and others, 2020) asks three questions. *Single stream*: one query after the other; how long
# do nine of ten take? That is `benchmark`'s p90. *Offline*: everything is there already; how much is done in a second,
# with the best batch? *Server*: queries arrive when they like; at which rate do 99 of 100 still end within a bound?
#
# A server takes all that wait, up to a batch. Arrivals are drawn and work is really done and timed; the waiting follows
# from the two by Lindley's formula, so that nobody has to wait for it (and what a machine does when it is idle, such as
# slowing its clock down, is not seen).


# %%
def offline(build: Callable[[int], Callable[[], Any]], batches: Sequence[int], **options: Any) -> Measurement:
    """The measurement of build(batch)() with the highest throughput. `options` are those of `benchmark`."""
    found = (benchmark(build(size), name=f"batch {size}", items=size, **options) for size in batches)
    return max(found, key=lambda one: one.throughput)


@dataclass(frozen=True)
class Load:
    """How a server bore a rate of queries a second: seconds from each arrival to the query's end; its busy share."""

    rate: float
    latencies: tuple[float, ...]
    busy: float


def serve(
    function: Callable[[int], Any], rate: float, queries: int = 1000, most: int = 1, seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Load:  # fmt: skip
    """Have function(n) deal with queries that arrive by chance (Poisson), n of those that wait at a time.

    Args:
        rate: queries a second; most: how many are dealt with at once.
    """
    chance = random.Random(seed)
    arrivals = list(accumulate(chance.expovariate(rate) for _ in range(queries)))
    latencies: list[float] = []
    end = busy = 0.0
    while (served := len(latencies)) < queries:
        start = max(end, arrivals[served])
        batch = arrivals[served : min(served + most, bisect_right(arrivals, start))]
        taken = _elapsed(function, (len(batch),), 1, clock)
        end, busy = start + taken, busy + taken
        latencies += [end - arrival for arrival in batch]
    return Load(rate, tuple(latencies), busy / end)


def test_queues_are_as_long_as_theory_says() -> None:
    machine = SimulatedMachine(noise=0, outliers=0, drift=0)
    for load in (0.5, 0.8):
        found = serve(machine.task(0.01), load / 0.01, queries=40_000, clock=machine.clock)
        waits = [latency - 0.01 for latency in found.latencies]
        assert_close(statistics.fmean(waits), 0.01 * load / (2 * (1 - load)), rtol=0.05)
        assert_close(found.busy, load, rtol=0.02)


# %% [markdown]
# With the same arrivals, only closer together, latency can but rise; so the highest rate is found by halving. It was
# found *because* it held once. Therefore it must hold again, with other arrivals, or give way.


# %%
@dataclass(frozen=True)
class ServerResult:
    """The highest rate that held, queries a second, 0 if none did; under which bound; and every load that was tried."""

    rate: float
    bound: float
    share: float
    loads: tuple[Load, ...]


def server(
    function: Callable[[int], Any], bound: float, share: float = 0.99, queries: int = 1000, most: int = 1,
    steps: int = 7, seed: int = 0, clock: Clock = time.perf_counter,
) -> ServerResult:  # fmt: skip
    """The highest rate of queries at which a share of them ends within `bound` seconds. See `serve`."""
    loads: list[Load] = []

    def holds(rate: float, seed: int) -> bool:
        loads.append(serve(function, rate, queries, most, seed, clock))
        return quantile(loads[-1].latencies, share) <= bound

    low, high = 0.0, most / benchmark(function, most, seconds=0.2, clock=clock).median
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle, seed) else (low, middle)
    tries = 0
    while low and not holds(low, seed + 1 + tries):
        low, tries = 0.9 * low if tries < 9 else 0.0, tries + 1
    return ServerResult(low, bound, share, tuple(loads))


def test_the_highest_rate_that_holds() -> None:
    machine = SimulatedMachine(noise=0, outliers=0, drift=0)
    found = server(machine.task(0.01), bound=0.05, clock=machine.clock)
    assert 55 < found.rate < 80  # 100 would be all the time; M/D/1 keeps 99 % within five times the work at 0.7
    assert quantile(found.loads[-1].latencies, 0.99) <= 0.05
    assert server(machine.task(0.01), bound=0.009, clock=machine.clock).rate == 0
    together = server(lambda n: machine.work(0.008 + 0.002 * n), bound=0.05, most=16, clock=machine.clock)
    assert together.rate > 3 * found.rate  # 16 at once take four times as long as one


# %% [markdown]
# ### What to take
# Of two models, one may be better and the other smaller and faster. What no other beats or equals in everything is the
# *Pareto front*; the rest need not be looked at. Which of the front to take, no measurement can say.


# %%
@dataclass(frozen=True)
class Candidate:
    """A model to choose: accuracy (higher is better), bytes on disk, and seconds of a call."""

    name: str
    accuracy: float
    size: int
    latency: float

    def dominates(self, other: Candidate) -> bool:
        """Whether it is nowhere worse than another, and somewhere better."""
        mine = (-self.accuracy, self.size, self.latency)
        theirs = (-other.accuracy, other.size, other.latency)
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other dominates, the fastest first."""
    front = [one for one in candidates if not any(other.dominates(one) for other in candidates)]
    return sorted(front, key=lambda one: (one.latency, one.size, -one.accuracy))


def test_the_front_is_what_nothing_beats() -> None:
    table = [("large", 0.9, 100, 5.0), ("small", 0.8, 10, 1.0), ("slow", 0.8, 10, 2.0), ("twin", 0.9, 100, 5.0)]
    candidates = [Candidate(*row) for row in table]
    assert [one.name for one in pareto_front(candidates)] == ["small", "large", "twin"]
    assert not candidates[0].dominates(candidates[3])


# %% [markdown]
# ## Systems analysis
#
# First the measuring itself: how often each verdict comes out, over simulated runs on a quiet and on a busy machine.
# Then what it is for: the SimpleCNN by batch, how products and attention grow, and what a server bears.


# %%
def error_rates() -> list[list[Any]]:
    """Of 100 simulated runs on a machine with some noise and a true ratio, how many end with which verdict."""
    rows: list[list[Any]] = []
    for name, noise in (("quiet", {"noise": 0.01}), ("busy", {"noise": 0.05, "outliers": 0.1, "drift": 0.1})):
        for ratio in (1.0, 1.02, 1.05):
            found = verdicts(ratio, 100, **noise)
            rows.append([name, ratio, *(found[each] for each in ("equal", "undecided", "slower", "faster"))])
    return rows


def answering(network: Module, most: int) -> Callable[[int], Tensor]:
    """A function of how many pictures are asked about at once."""
    pictures = randn(most, 3, 32, 32)
    return no_grad()(lambda batch: network(pictures[:batch]))


def by_batch(network: Module) -> list[list[Any]]:
    """The SimpleCNN's latency, throughput, rate of operations and memory."""
    rows: list[list[Any]] = []
    for batch in (1, 8, 64):
        answer = answering(network, batch)
        one = benchmark(answer, batch, items=batch, seconds=0.5)
        low, high = (f"{bound * 1e3:.3g}" for bound in one.interval())
        flops = sum(count_flops(network, randn(batch, 3, 32, 32)).values())
        peak = memory_of(answer, batch).peak / 1e6
        rows.append([batch, one.median * 1e3, f"{low} to {high}", one.quantile(0.99) * 1e3, one.throughput,
                     flops / one.median / 1e9, peak])  # fmt: skip
    return rows


def multiplication(n: int) -> Callable[[], Tensor]:
    x = randn(n, n)
    return lambda: x @ x


def reading(length: int) -> Callable[[], Tensor]:
    """A GPT's answer to a text of so many tokens."""
    model, ids = GPT(GPTConfig(65, 1024, 2, 4, 64)), randint(65, (1, length))
    return no_grad()(lambda: model(ids))


def growth() -> list[list[Any]]:
    """Exponents, and by how much the last doublings multiply the time."""
    rows: list[list[Any]] = []
    for name, build, sizes in (
        ("a product n×n, over n", multiplication, (128, 256, 512, 1024)),
        ("a GPT, over tokens", reading, (64, 128, 256, 512, 1024)),
    ):
        found = scaling(build, sizes, rounds=9)
        doublings = [after.median / before.median for before, after in pairwise(found.measurements[-3:])]
        rows.append([name, found.exponent, found.error, *doublings])
    return rows


def loads(network: Module) -> list[list[Any]]:
    """The highest rate within a bound on p99, with and without batches."""
    answer, rows = answering(network, 8), list[list[Any]]()
    alone = benchmark(answer, 1, seconds=0.3).median
    for factor in (3, 10, 30):
        for most in (1, 8):
            found = server(answer, bound=factor * alone, queries=500, most=most)
            rows.append([factor, most, found.rate, found.rate * alone])
    return rows


def analyze() -> None:
    """Measure the error rates of comparisons, a network by batch, two exponents, and what a server bears."""
    manual_seed(0)
    network = SimpleCNN().eval()
    print_table(["machine", "true ratio", "equal", "undecided", "slower", "faster"], error_rates())
    print()
    headers = ["batch", "p50, ms", "95 %", "p99, ms", "pictures/s", "GFLOP/s", "peak, MB"]
    print_table(headers, by_batch(network))
    print()
    print_table(["time of", "exponent", "its error", "last but one doubling", "last"], growth())
    print()
    headers = ["bound, times one picture's", "batch up to", "queries/s that hold", "times one's time"]
    print_table(headers, loads(network))


# %% [markdown]
# ## Production context
#
# `torch.utils.benchmark.Timer` times a statement, finds how often to repeat it (`blocked_autorange`), waits for the GPU
# and returns a `Measurement` with median and interquartile range; the appendix has both names. `Compare` there only
# prints tables: candidates are not measured in turn, and there is no verdict. `pyperf` runs a benchmark in many new
# processes, which also averages over where memory came to lie; `asv` follows a project's speed over its history. MLPerf
# Inference's LoadGen sends queries in real time and asks for 270,000 of them in its server scenario, so that its p99 is
# certain. NVIDIA's Triton forms batches as `serve` does, with a delay that one can choose.
#
# Left out here: new processes for each measurement (`tinytorch.profiling.bench` has them), fixed clock rates and cores
# (`cpupower`, `taskset`), energy, and servers with several workers.

# %% [markdown]
# ## Integration testing


# %%
def test_a_shallow_network_is_faster_and_smaller() -> None:
    manual_seed(0)
    x, networks = randn(4, 64), [Sequential(*(Linear(64, 64) for _ in range(depth))) for depth in (8, 1)]
    deep, shallow = (no_grad()(lambda network=network: network(x)) for network in networks)
    assert compare(deep, shallow, margin=0.1).verdict == "faster"
    assert compare(shallow, deep, margin=0.1).verdict == "slower"
    sizes = [sum(p.nbytes for p in network.parameters()) for network in networks]
    times = [benchmark(call, seconds=0.1).median for call in (deep, shallow)]
    candidates = [Candidate(f"{size} bytes", 0.5, size, taken) for size, taken in zip(sizes, times, strict=True)]
    assert pareto_front(candidates) == candidates[1:]


# %% [markdown]
# ## Thinking questions
#
# 1. A call takes 1.0 ms nine times of ten and 11 ms else. Which of median, mean, p90 and minimum would you give to a
#    user, to whoever pays for the machine, and to whoever makes the call faster?
# 2. How many calls does the upper end of a 95 % interval of the p99 need at least? And of the p99.9?
# 3. Two programs are compared ten times a day. How often will equal ones be called different in a year, and what would
#    you change?
# 4. B is measured right after A, always. What of A could make B faster, or slower, and does A B B A help?
# 5. A server holds 70 % of its highest rate within the bound. You buy a second one. Do both hold 140 %, and what if
#    they share one queue?

# %% [markdown]
# ## Summary
#
# A quantile has an interval that needs no assumption but independence, and that can be checked. Warm-up is found by
# looking back. Two candidates are measured in turn, until the interval of their ratio gives a verdict; on a machine
# whose truth is known, the verdicts are right as often as they promise. Exponents come with errors, rates with a bound.
# That closes the course: what the twenty modules have built can be measured, and the next change be shown to be one.


if __name__ == "__main__":
    run_module(globals())
