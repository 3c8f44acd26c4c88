"""Compiled twins of operations: arrays in, arrays out, never a Tensor.

A kernel has the signature of the operation that it stands in for, over raw arrays, and the operation's own NumPy code
is its reference. Module 16 attaches kernels to operations; nothing is imported, and Numba with it, before a kernel is
first used. `compiled` makes a kernel of a function of plain loops that stands elsewhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property, update_wrapper
from types import FunctionType
from typing import Any

__all__ = ["Compiled", "compiled", "load", "prange"]

prange = range  # in a function that is compiled with `parallel`, the loop whose turns are spread over the cores


def load(place: str) -> Callable:
    """The function at "package.module:name"; imports the module."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


class Compiled:
    """A function of loops over arrays that Numba compiles when it is first called.

    Attributes:
        function: the function itself, which Python can run as it stands.
    """

    def __init__(self, function: Callable | str, parallel: bool = False) -> None:
        self.function, self.parallel = function, parallel
        if callable(function):
            update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        return self.kernel(*arguments)

    @cached_property
    def kernel(self) -> Callable:
        """What Numba makes of it, with the compiled twin of each compiled function that it calls."""
        if isinstance(self.function, str):
            return load(self.function)
        kernel = load("tinytorch.kernels.cpu.jit:kernel")  # before Numba: it says how Numba's threads are to wait
        import numba

        code, known = self.function.__code__, dict(self.function.__globals__)
        for name in code.co_names:
            value = known.get(name)
            if value is prange:
                known[name] = numba.prange
            elif isinstance(value, Compiled):
                known[name] = value.kernel
        twin = FunctionType(code, known, self.function.__name__, self.function.__defaults__)
        return kernel(update_wrapper(twin, self.function), parallel=self.parallel)


def compiled(function: Callable | str | None = None, *, parallel: bool = False) -> Any:
    """Make a `Compiled` of a function, or of a kernel's place, which is imported when it is first called."""
    return (lambda f: Compiled(f, parallel)) if function is None else Compiled(function, parallel)
