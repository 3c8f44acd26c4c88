"""Arrays that end, or begin, at a page that nobody may touch: a kernel that goes one element too far dies at once.

A check of indices cannot see what explicit vector accesses do. The memory management unit can:

    x, out = guarded(x), guarded_empty(shape)
    kernel(x, out)
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

PAGE = mmap.PAGESIZE
PROT_NONE = 0


def guarded_empty(shape: int | tuple[int, ...], dtype: Any = "float32", end: bool = True) -> np.ndarray:
    """An array whose last byte is directly followed by a protected page; with end=False, its first byte follows one.

    There is a protected page at its other side too, but up to a page away. The array keeps its memory alive. What
    stands in it at first is 0x7F in every byte, a large number in every dtype, so that what was not written shows.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("protected pages are asked for in Linux's way")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    room = max(-(-size // PAGE), 1) * PAGE
    pages = mmap.mmap(-1, PAGE + room + PAGE)
    _protect(pages, 0)
    _protect(pages, PAGE + room)
    array: np.ndarray = np.ndarray(shape, dtype, buffer=pages, offset=PAGE + (room - size if end else 0))
    array.reshape(-1).view(np.uint8).fill(0x7F)
    return array


def guarded(array: np.ndarray, end: bool = True) -> np.ndarray:
    """A copy of an array, row by row, at a protected page: see `guarded_empty`."""
    copy = guarded_empty(array.shape, array.dtype, end)
    copy[...] = array
    return copy


def _protect(pages: mmap.mmap, offset: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    byte = ctypes.c_char.from_buffer(pages, offset)
    failed = libc.mprotect(ctypes.c_void_p(ctypes.addressof(byte)), ctypes.c_size_t(PAGE), PROT_NONE)
    if failed:
        raise OSError(ctypes.get_errno(), "mprotect failed")


def outlives(call: Callable[[], Any]) -> bool:
    """Does a forked child survive the call? False if it dies of touching memory that it may not touch."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            import resource  # there is none on Windows, where nothing forks

            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(120)
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGSEGV, -signal.SIGBUS):
        raise RuntimeError(f"the child neither returned nor died at a protected page: exit code {code}")
    return code == 0
