"""Module 01: Setup. The tools that every later chapter works with.

Learning objectives. After this chapter you can
- say when two computed numbers count as equal, and write a test that tells you which element is wrong;
- time a piece of code so that the figure means something;
- write a file so that a crash never leaves half of one;
- make a random experiment repeatable;
- find out what a machine offers, and what stands in the way of using it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import numpy as np

from tinytorch import backends

# %% [markdown]
# # Module 01: Setup
#
# Before the first tensor come the things that keep us honest: a way to compare numbers, to time code, to repeat an
# experiment, to save a file safely, and to ask a machine what it can do. They are small, and everything leans on them.

# %% [markdown]
# ## Mathematical foundations
#
# **When are two floats equal?** A float32 keeps 24 bits, so each operation is off by up to `2**-24`, relatively. Sums
# of many terms add such errors up, in an order that differs from machine to machine. So tests ask for
#
#     abs(actual - expected) <= atol + rtol * abs(expected)
#
# `rtol` covers the rounding, which grows with the value; `atol` covers values near zero, where a relative error means
# nothing.
#
# **What is the time of a call?** Other programs only ever make it slower, so the samples have a long tail to the
# right. The mean follows the tail; the *median* stays where half of the calls are. Calls shorter than the clock can
# resolve are timed by the thousand: `time of one = time of n / n`.
#
# **How fast is fast?** A product of two n×n matrices takes `2 * n**3` operations on `3 * n**2` numbers. The more
# operations per byte, the closer a machine comes to its peak; a copy, with none, runs at the speed of memory.

# %% [markdown]
# ## Implementation
#
# ### Comparing
#
# An assertion that only says "not equal" sends you to a debugger. Ours names the worst element. It takes numbers,
# lists, arrays of any library, and tensors, whose array is called `data`.


# %%
def to_numpy(value: Any) -> np.ndarray:
    """A number, nested list, array of any known library or tensor as a NumPy array."""
    for array in (value, getattr(value, "data", None)):
        with suppress(TypeError):
            return backends.backend_of(array).to_numpy(array)
    return np.asarray(value)


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Raise AssertionError, naming the worst element, unless |actual - expected| <= atol + rtol * |expected|.

    Shapes must be equal, too. NaN is close to NaN, and an infinity to itself.
    """
    actual, expected = to_numpy(actual), to_numpy(expected)
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: actual {actual.shape}, expected {expected.shape}")
    same = (actual == expected) | ((actual != actual) & (expected != expected))  # only NaN differs from itself
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference, allowed = np.abs(a - e), atol + rtol * np.abs(e)
        excess = np.nan_to_num(difference - allowed, nan=np.inf)
    wrong = ~(same | ((difference <= allowed) & np.isfinite(e)))
    if wrong.any():
        worst = np.unravel_index(np.argmax(np.where(wrong, excess, -np.inf)), wrong.shape)
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} elements differ, worst at {tuple(map(int, worst))}: actual {a[worst]:.9g}, "
            f"expected {e[worst]:.9g} (difference {difference[worst]:.3g}, allowed {allowed[worst]:.3g}), "
            f"shape {a.shape}"
        )


def message_of(function: Callable, *args: Any, error: type[Exception] = AssertionError) -> str:
    """The message of the error that a call must raise; AssertionError if it raises none. For tests."""
    try:
        function(*args)
    except error as raised:
        return str(raised)
    raise AssertionError(f"{getattr(function, '__name__', function)} raised no {error.__name__}")


def test_assert_close_names_the_worst_element():
    assert_close([1.0, 1e-7, np.nan, np.inf], [1.000005, 0.0, np.nan, np.inf])
    message = message_of(assert_close, [[1.0, 2.0], [3.0, 4.5]], [[1.0, 2.1], [3.0, 4.0]])
    assert "2 of 4" in message
    assert "worst at (1, 1): actual 4.5, expected 4" in message
    assert "shapes differ" in message_of(assert_close, [1.0, 1.0], [1.0])
    assert "1 of 1" in message_of(assert_close, 1.0, np.inf)
    assert "1 of 1" in message_of(assert_close, np.nan, 1.0)


# %% [markdown]
# ### Timing
#
# The first call of anything is special: caches are cold, and code may still be loading. We make one call before the
# clock starts, and then take the median over samples of at least a millisecond each. A GPU returns from a call before
# it has done the work, so the clock stops only after waiting for the result.


# %%
def seconds(function: Callable, *args: Any, repeat: int = 5) -> float:
    """Median seconds of one call of function(*args), after warming up. The function should return what it computes."""
    _finish(function(*args))
    calls = 1
    while _elapsed(function, args, calls) < 1e-3:
        calls *= 4
    return statistics.median(_elapsed(function, args, calls) for _ in range(repeat)) / calls


def _elapsed(function: Callable, args: tuple, calls: int, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    for _ in range(calls):
        result = function(*args)
    _finish(result)
    return clock() - start


def _finish(result: Any) -> None:
    """Wait until the device that computes a result is done with it."""
    for array in (result, getattr(result, "data", None)):
        with suppress(TypeError):
            return backends.backend_of(array).synchronize()


def test_seconds_is_the_time_of_one_call():
    assert 0.002 <= seconds(time.sleep, 0.002, repeat=3) < 0.05
    assert seconds(abs, -1) < 1e-4  # far below what one reading of the clock could tell


# %% [markdown]
# ### A table
#
# Every chapter ends its measuring with a small table, so printing one should take one line.


# %%
def print_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under headers in aligned columns: numbers to the right, floats with four digits, text to the left."""
    rows = [list(row) for row in rows]
    texts = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *texts, strict=True)]
    numeric = [all(isinstance(cell, (int, float)) for cell in column) for column in zip(*rows, strict=True)]
    numeric = numeric or [False] * len(widths)
    for line in (list(headers), ["-" * width for width in widths], *texts):
        cells = zip(line, widths, numeric, strict=True)
        print("  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in cells).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def test_print_table_aligns():
    lines = printed(print_table, ["size", "rate, Hz"], [["small", 2.0], ["large", 1234.5678]]).splitlines()
    assert lines == ["size   rate, Hz", "-----  --------", "small         2", "large      1235"]


# %% [markdown]
# ### Saving
#
# A program can be killed between any two instructions. `open(path, "wb")` empties the old file at once, and a kill in
# the middle leaves neither old nor new. Writing under another name and renaming at the end has no such moment: the
# operating system swaps a name in one step. `fsync` makes the bytes reach the disk before the name does.


# %%
def atomic_write(path: str | os.PathLike, data: bytes | Callable[[BinaryIO], Any]) -> None:
    """Write bytes, or whatever `data(file)` writes, so that `path` holds the old content or the new one, never half.

    A writer that is killed leaves a hidden temporary file beside `path`; a write an hour or more later removes it.
    """
    path = Path(path)
    for stale in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - stale.stat().st_mtime > 3600:
                stale.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
    try:
        with open(temporary, "xb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def test_atomic_write_keeps_the_old_file_when_writing_fails():
    def fail_halfway(file: BinaryIO) -> None:
        file.write(b"new, but ha")
        raise OSError("disk full")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights")
        atomic_write(path, b"old")
        assert message_of(atomic_write, path, fail_halfway, error=OSError) == "disk full"
        assert path.read_bytes() == b"old"
        atomic_write(path, lambda file: file.write(b"new"))
        assert path.read_bytes() == b"new"
        assert os.listdir(folder) == ["weights"]


# %% [markdown]
# ### Chance, repeatably
#
# "Random" numbers come from a generator: a state, and a rule that turns it into a number and the next state. Setting
# the state repeats everything that follows; saving it lets a run that was interrupted continue as if it had not been.


# %%
def manual_seed(seed: int) -> None:
    """Start the random generators of all backends at `seed`, a whole number >= 0."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"manual_seed: the seed must be a whole number >= 0, not {seed!r}")
    backends.manual_seed(int(seed))


def get_rng_state() -> dict:
    """The state of the random generators, as JSON can hold it."""
    return backends.rng_state()


def set_rng_state(state: dict) -> None:
    """Continue the random generators from a state that `get_rng_state` returned."""
    backends.set_rng_state(state)


def test_the_same_seed_gives_the_same_numbers():
    draw = backends.get_backend("cpu").normal
    manual_seed(7)
    first, state = draw((3,)), json.loads(json.dumps(get_rng_state()))
    second = draw((3,))
    assert not np.array_equal(first, second)
    set_rng_state(state)
    assert_close(draw((3,)), second, rtol=0, atol=0)
    manual_seed(7)
    assert_close(draw((3,)), first, rtol=0, atol=0)
    assert "not -1" in message_of(manual_seed, -1, error=ValueError)


# %% [markdown]
# ### Running a chapter
#
# `python -m tinytorch.m01_setup` runs a file under the name `__main__`. If later code imported it by its real name,
# Python would load it a second time, with second classes that are not the first ones. So the runner first enters the
# running module under its real name. Then it runs the tests, in the order in which they stand.


# %%
def run_module(namespace: dict[str, Any]) -> None:
    """Run a chapter's tests, then its `analyze()`: the last line of every chapter calls it with `globals()`.

    Exits with status 1 if a test fails. `--tests-only` on the command line leaves the analysis out.
    """
    spec, file = namespace.get("__spec__"), namespace.get("__file__")  # a notebook's cells have neither
    name = spec.name if spec else f"tinytorch.{Path(file).stem}" if file else namespace["__name__"]
    sys.modules[name] = sys.modules[namespace["__name__"]]
    print((namespace.get("__doc__") or name).strip().splitlines()[0])
    tests = [value for key, value in list(namespace.items()) if key.startswith("test_") and callable(value)]
    failed = [test for test in tests if test.__module__ == namespace["__name__"] and not run_test(test)]
    if failed:
        raise SystemExit(1)
    if "analyze" in namespace and "--tests-only" not in sys.argv[1:]:
        print()
        namespace["analyze"]()


def run_test(test: Callable[[], None]) -> bool:
    """Run one test and print a line about it, and where it failed if it did; returns whether it passed."""
    start = time.perf_counter()
    try:
        test()
    except Exception:
        print(f"  FAIL  {test.__name__}\n{textwrap.indent(traceback.format_exc(), ' ' * 8)}", flush=True)
        return False
    print(f"  ok    {test.__name__}  {1e3 * (time.perf_counter() - start):.1f} ms", flush=True)
    return True


def printed(function: Callable, *args: Any) -> str:
    """What a call prints. For tests."""
    import io
    from contextlib import redirect_stdout

    with redirect_stdout(io.StringIO()) as output:
        function(*args)
    return output.getvalue()


def test_a_failing_test_is_reported():
    def test_that_fails():
        assert_close(1.0, 2.0)

    output = printed(run_test, test_that_fails)
    assert "FAIL  test_that_fails" in output
    assert "expected 2" in output


# %% [markdown]
# ### What does this machine offer?
#
# A doctor looks at one thing at a time and says what it found; for what is wrong, it says what to do. Each check is a
# function that is entered in a list by a decorator. A check that itself breaks is a finding like any other: on a
# broken machine the doctor must be the last thing to fail. The appendix adds checks of BLAS, Numba and the GPUs.


# %%
@dataclass(frozen=True)
class Finding:
    """What the doctor found about one thing. Whatever is not ok has a `fix`, unless there is nothing to do."""

    name: str
    status: str  # "ok", "warning", "error" or "absent"
    detail: str
    fix: str = ""


CHECKS: list[Callable[[], Finding | list[Finding]]] = []
DEFAULT_DEVICE = "default device"  # the one finding that decides the exit status


def check(function: Callable[[], Finding | list[Finding]]) -> Callable[[], Finding | list[Finding]]:
    """Enter a function among the doctor's checks."""
    CHECKS.append(function)
    return function


def findings(checks: Sequence[Callable[[], Finding | list[Finding]]] = CHECKS) -> list[Finding]:
    """Run the checks, in order. One that raises becomes a finding with status "error"."""
    found: list[Finding] = []
    for function in checks:
        try:
            result = function()
        except Exception as error:
            name = function.__name__.removeprefix("check_").replace("_", " ")
            detail = f"the check itself failed: {type(error).__name__}: {first_line(error)}"
            result = Finding(name, "error", detail, "reinstall what the message names, or report it to TinyTorch")
        found += result if isinstance(result, list) else [result]
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def test_a_check_that_breaks_is_a_finding():
    def check_the_weather():
        raise OSError("no window\nsecond line")

    (found,) = findings([check_the_weather])
    assert (found.name, found.status) == ("the weather", "error")
    assert found.detail.endswith("OSError: no window")
    assert found.fix


# %% [markdown]
# The first checks ask for what nothing works without: Python, the device that tensors live on by default, memory, and
# a folder for downloads. A check should *do* the thing that will be needed: compute a product, write a file.


# %%
@check
def check_python() -> Finding:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if sys.maxsize < 2**32:
        return Finding("Python", "warning", f"{detail}, 32-bit", "install a 64-bit Python: arrays end at 2 GiB here")
    return Finding("Python", "ok", detail)


@check
def check_default_device() -> Finding:
    device = os.environ.get("TINYTORCH_DEVICE", "cpu")
    try:
        backend = backends.get_backend(device)
        product = backend.to_numpy(backend.matmul(backend.ones((2, 3)), backend.ones((3, 2))))
        assert_close(product, [[3.0, 3.0], [3.0, 3.0]])
    except Exception as error:
        fix = (
            "unset TINYTORCH_DEVICE to compute on the CPU" if device != "cpu" else "pip install --force-reinstall numpy"
        )
        return Finding(DEFAULT_DEVICE, "error", f"{device} cannot run: {first_line(error)}", fix)
    return Finding(DEFAULT_DEVICE, "ok", f"{device}, through {backend.name}")


@check
def check_memory() -> Finding:
    total = backends.get_backend("cpu").memory().total
    free = total
    with suppress(OSError, KeyError, ValueError), open("/proc/meminfo") as lines:  # Linux only
        free = int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) * 1024
    if total == 0:
        return Finding("memory", "ok", "this system does not say how much it has")
    detail = f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
    if free < 2**30:
        return Finding("memory", "warning", detail, "close other programs; the larger milestones need 1 GiB")
    return Finding("memory", "ok", detail)


def data_folder() -> Path:
    """Where data sets are kept: the folder TINYTORCH_DATA names, or this platform's place for caches."""
    if folder := os.environ.get("TINYTORCH_DATA"):
        return Path(folder).expanduser()
    import pooch  # takes as long to import as all the rest

    return Path(pooch.os_cache("tinytorch"))


@check
def check_data_folder() -> Finding:
    folder = data_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"written")
    except OSError as error:
        detail = f"{folder} cannot be written: {error.strerror or error}"
        return Finding("data folder", "error", detail, "set TINYTORCH_DATA to a folder that you may write to")
    return Finding("data folder", "ok", str(folder))


def test_the_data_folder_must_be_writable():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "file").touch()
        with patch.dict(os.environ, TINYTORCH_DATA=f"{folder}/cache"):
            assert check_data_folder() == Finding("data folder", "ok", str(Path(folder, "cache")))
        with patch.dict(os.environ, TINYTORCH_DATA=f"{folder}/file/below"):  # nothing can be created below a file
            assert check_data_folder().status == "error"


# %% [markdown]
# A report is for reading, or, as JSON, for a script or an issue. Only one finding decides the exit status: a machine
# without a GPU is not ill, but one whose default device cannot multiply is.


# %%
def doctor(as_json: bool = False) -> int:
    """Print what is found on this machine; returns the exit status, 1 if the default device cannot run."""
    found = findings()
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        print(report(found))
    return int(any(finding.name == DEFAULT_DEVICE and finding.status == "error" for finding in found))


def report(found: Sequence[Finding], width: int = 80) -> str:
    """The findings as text, a few lines each, none wider than `width`."""
    label = max(len(finding.name) for finding in found)
    lines = []
    for finding in found:
        start = f"{finding.status:<8}{finding.name:<{label}}  "
        indent = " " * len(start)
        lines += textwrap.wrap(finding.detail, width, initial_indent=start, subsequent_indent=indent)
        if finding.fix:
            lines += textwrap.wrap(
                finding.fix, width, initial_indent=f"{indent}fix: ", subsequent_indent=f"{indent}     "
            )
    counts = [f"{sum(f.status == status for f in found)} {status}" for status in ("ok", "warning", "error", "absent")]
    return "\n".join([*lines, "", ", ".join(counts)])


def test_the_report_fits_eighty_columns():
    found = [Finding("data folder", "warning", "/a/long/path" * 12, "do this " * 20), Finding("Python", "ok", "3.11")]
    text = report(found)
    assert max(map(len, text.splitlines())) <= 80
    assert "ok      Python       3.11" in text
    assert "fix: do this" in text
    assert text.endswith("1 ok, 1 warning, 0 error, 0 absent")


# %% [markdown]
# ## Systems analysis
#
# What does one step cost on this machine? The first table compares a plain Python call, an operation on a tiny array
# and one on a large array: small arrays pay for the call, large ones for memory. The second shows a product of
# matrices approaching the peak as n grows, because each number that is fetched is used n times.


# %%
def analyze() -> None:
    """Measure the price of a call, the speed of memory and the speed of arithmetic."""
    rows = []
    for label, size in (("4 numbers", 4), ("1 thousand", 1_000), ("1 million", 1_000_000)):
        x = np.ones(size, np.float32)
        taken = seconds(np.add, x, x)
        rows.append([f"np.add, {label}", 1e6 * taken, 3 * x.nbytes, 3 * x.nbytes / taken / 1e9])
    print_table(["step", "microseconds", "bytes moved", "GB/s"], [["abs(-1)", 1e6 * seconds(abs, -1), 0, 0.0], *rows])
    print()
    rows = []
    for n in (16, 64, 256, 1024):
        x = np.ones((n, n), np.float32)
        taken = seconds(np.matmul, x, x, repeat=3)
        rows.append([n, 2 * n**3, 3 * x.nbytes, 1e6 * taken, 2 * n**3 / taken / 1e9])
    print_table(["n", "FLOPs", "bytes", "microseconds", "GFLOP/s"], rows)


# %% [markdown]
# ## Production context
#
# PyTorch keeps the same tools: `torch.testing.assert_close` (whose tolerances depend on the dtype),
# `torch.utils.benchmark.Timer` (which also blocks until the GPU is done), `torch.manual_seed`,
# `torch.random.get_rng_state`, and `python -m torch.utils.collect_env` for the doctor's report. What ours leave out:
# `assert_close` there also compares dtype, device and strides. `torch.save` writes in place: training systems put the
# rename around it themselves.

# %% [markdown]
# ## Integration testing
#
# The parts together: a chapter of our own, run as its reader would run it. The first version passes and is analysed;
# the second has a failing test, which must be seen in the exit status.


# %%
def test_a_chapter_runs_its_tests_and_then_its_analysis():
    chapter = textwrap.dedent('''
        """A chapter."""
        from tinytorch.m01_setup import assert_close, run_module, test_the_report_fits_eighty_columns
        def test_sum(): assert_close(1 + 1, {expected})
        def analyze(): print("analyzed")
        if __name__ == "__main__": run_module(globals())
    ''')
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])}
    with tempfile.TemporaryDirectory() as folder:
        for expected, status, word in ((2, 0, "analyzed"), (3, 1, "FAIL  test_sum")):
            Path(folder, "chapter.py").write_text(chapter.format(expected=expected))
            command = [sys.executable, "-m", "chapter"]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (status, "")
            assert word in done.stdout
            assert "eighty" not in done.stdout  # an imported test belongs to another chapter


# %% [markdown]
# ## Thinking questions
#
# 1. `assert_close(actual, expected)` and `assert_close(expected, actual)` can disagree. When, and does it matter?
# 2. Why the median and not the minimum? For which question is the minimum the better answer, and for which the 99th
#    percentile?
# 3. After `atomic_write` returns and the power fails, which content can the file have? What would `fsync` on the
#    folder add?
# 4. Two processes start with the same seed. Which of their numbers agree, and how would you give each its own?
# 5. From the tables: how large must an array be before the call itself costs less than a tenth of the time?

# %% [markdown]
# ## Summary
#
# You built a comparison that explains itself, a clock to trust, safe saving, repeatable chance, a runner for chapters
# and a doctor for machines. Next comes the thing itself: module 02 builds the tensor and the one door through which
# every operation passes.

# %%
if __name__ == "__main__":
    run_module(globals())
