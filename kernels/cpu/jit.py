"""How kernels are compiled, cached and spread over the cores.

A kernel is a function that Numba compiles for this CPU at its first call. The machine code is kept in a folder named
after the sources that it was made from, because Numba itself does not notice that a helper in another file has changed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

# libgomp reads these when Numba loads it. Between two kernels its threads wait in a loop, for 0.3 ms at most, and then
# sleep: a sleeping thread is 20 to 50 µs late for the next kernel, and one that waits on takes its core from NumPy's
# BLAS, whose products then take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "25000")

import numba
import numpy as np
import platformdirs
from llvmlite import binding
from numba import njit
from numba.np.ufunc import parallel as threads

__all__ = ["CPU", "LANES", "cache_folder", "cached_in", "cores", "features", "kernel", "plain", "run"]

SOURCES = Path(__file__).parent
SMALL = 1 << 16  # below so many elementary steps a kernel runs on one core: to wake a second takes 20 to 50 µs


@cache
def features() -> frozenset[str]:
    """What the CPU that Numba compiles for can do, by LLVM's names: "avx512f", "avx2", "avx512vnni" …"""
    name, chosen = numba.config.CPU_NAME, numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if chosen:
        return frozenset(flag[1:] for flag in chosen.split(",") if flag.startswith("+"))
    if not name:
        return frozenset(flag for flag, there in binding.get_host_cpu_features().items() if there)
    return frozenset(NAMED_CPUS.get(name, ()))


# NUMBA_CPU_NAME compiles for another CPU than this one, as the tests do. LLVM does not tell us what a name stands for.
NAMED_CPUS = {
    "haswell": ("sse2", "avx", "avx2", "fma"),
    "skylake-avx512": ("sse2", "avx", "avx2", "fma", "avx512f"),
    "generic": (),
}
CPU = "avx512" if "avx512f" in features() else "avx2" if {"avx2", "fma"} <= features() else "generic"
LANES = {"avx512": 16, "avx2": 8, "generic": 4}[CPU]  # float32 in a vector register


@cache
def cache_folder(sources: Path = SOURCES) -> Path:
    """Where compiled kernels are kept: NUMBA_CACHE_DIR, or the platform's cache folder; one folder for each state of
    the sources."""
    checked = numba.config.BOUNDSCHECK  # type: ignore[attr-defined]
    digest = hashlib.sha256(b"checked" if checked else b"")  # which Numba's own key leaves out
    for file in sorted(sources.glob("*.py")):
        digest.update(file.read_bytes())
    base = os.environ.get("NUMBA_CACHE_DIR") or platformdirs.user_cache_dir("tinytorch")
    return Path(base) / "kernels" / digest.hexdigest()[:16]


@cache
def _can_cache(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False  # kernels are compiled again by each process
    return os.access(folder, os.W_OK)


@contextmanager
def cached_in(sources: Path = SOURCES, config: Any = numba.config) -> Iterator[bool]:
    """A block in which Numba finds the cache folder of these sources, and whether it can be written to.

    Numba looks for it while it wraps a function; other programs' functions keep theirs. `config` is where it looks.
    """
    folder, before = cache_folder(sources), config.CACHE_DIR
    try:
        if can := _can_cache(folder):
            config.CACHE_DIR = str(folder)
        yield can
    finally:
        config.CACHE_DIR = before


def kernel(function: Callable | None = None, *, parallel: bool = False, inner: bool = False, **options: Any) -> Any:
    """Compile a function with Numba when it is first called, without the interpreter's lock, and keep the result.

    Arithmetic is done as it is written (`fastmath` is off), so that a kernel gives the same bits wherever a copy of it
    has been compiled: alone, as a part of its parallel twin, in this process or in another one. A compiler that may
    change the order of a sum does it otherwise in each copy. A sum that is to be fast is written with vectors. A
    division by zero gives nan or infinity, as in NumPy.

    What keeps the first call short: a helper of a few lines is `kernel(inline="always")`, because LLVM goes through all
    that a function calls once more for each level of calls above it; and a literal int is not handed to a helper,
    because Numba compiles it anew for each: `np.int64(0)` is none; what only kernels call is `inner`, and is compiled
    without an entry for Python; and a loop over an array is written out, for `x[:n] = y` and `np.minimum(x, n)` take
    Numba a second or two each.
    """
    if function is None:
        return lambda f: kernel(f, parallel=parallel, inner=inner, **options)
    options = {"error_model": "numpy", **options}
    if inner:
        options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    with cached_in() as can:
        return njit(function, cache=can, nogil=True, parallel=parallel, **options)


_forked = False
_pool = threading.Lock()


def _after_fork() -> None:
    global _forked, _pool
    _forked, _pool = True, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)  # a forked child that enters its parent's OpenMP pool dies


def cores() -> int:
    """How many cores kernels are spread over: NUMBA_NUM_THREADS, or all there are; 1 in a forked process."""
    return 1 if _forked else _thread_count()()


@cache
def _thread_count() -> Callable[[], int]:
    """Numba's own way to the number, once it has started its threads: the public one takes a lock first, which is
    longer than some kernels."""
    numba.get_num_threads()
    return getattr(threads, "_get_num_threads", numba.get_num_threads)


class Workers:
    """OpenMP's threads, kept away from the core that calls them.

    A sleeping thread is often woken on the core of the thread that wakes it, and then both take turns there while the
    other core has nothing to do. Linux can be told which cores a thread may use; elsewhere nothing happens.
    """

    def __init__(self) -> None:
        self.allowed: set[int] = set()
        self.threads: list[int] | None = None  # unknown before the first parallel kernel has started them
        self.avoided = -1
        self.current_cpu: Callable[[], int] | None = None
        try:
            self.current_cpu = ctypes.CDLL(None).sched_getcpu
            self.allowed = os.sched_getaffinity(0)
        except (AttributeError, OSError, TypeError):
            self.threads = []

    def first_launch(self, launch: Callable[[], Any]) -> Any:
        """Find out which threads a first parallel kernel starts."""
        before = set(os.listdir("/proc/self/task")) if self.threads is None else set()
        out = launch()
        if self.threads is None:
            new = set(os.listdir("/proc/self/task")) - before
            self.threads = sorted(map(int, new)) if 0 < len(new) < cores() else []
        return out

    def keep_away(self) -> None:
        """Forbid them the caller's core."""
        if self.threads and (here := self.current_cpu()) != self.avoided:  # type: ignore[misc]
            self.avoided = here
            try:
                for thread in self.threads:
                    os.sched_setaffinity(thread, self.allowed - {here})
            except OSError:
                self.threads = []  # a container may not allow it


workers = Workers()


def run(serial: Callable, parallel: Callable, work: int, *arguments: Any) -> Any:
    """Call `parallel(*arguments)` if the work is worth more than one core; else `serial`.

    A second thread waits until the cores are free, because a sum may be rounded otherwise on one core than on several,
    and what a program computes must not depend on what its other threads do.

    Args:
        work: about how many elementary steps there are, of a quarter of a nanosecond or so.
    """
    if work < SMALL or cores() == 1:
        return serial(*arguments)
    with _pool:
        if workers.threads is None:
            return workers.first_launch(lambda: parallel(*arguments))
        workers.keep_away()
        return parallel(*arguments)


def plain(x: np.ndarray) -> np.ndarray:
    """The array itself if it lies row by row, aligned and writeable, as kernels are compiled for; else a copy."""
    return x if x.flags.carray else np.array(x, order="C")
