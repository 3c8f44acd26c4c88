"""A stand-in for CuPy, built on NumPy: enough of it for every line of `backends/cupy.py` to run without a GPU.

Its arrays are NumPy arrays of a class of their own that know their device, as CuPy's do, and refuse to be mixed with
NumPy's arrays or turned into them in silence.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

current = [0]
compute_types: dict[int, tuple] = {}
page_locked: set[int] = set()  # addresses
waited: list[bool] = []  # for each copy to a device, whether it was waited for
devices_entered: list[int] = []
synchronized: list[int] = []


class ndarray:
    """CuPy's array: NumPy's values on a device."""

    __module__ = "cupy"
    __array_priority__ = 100

    def __init__(self, values: np.ndarray, base: Any = None) -> None:
        self._values, self._device, self.base = values, current[0], base

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    shape = property(lambda self: self._values.shape)
    ndim = property(lambda self: self._values.ndim)
    size = property(lambda self: self._values.size)
    dtype = property(lambda self: self._values.dtype)
    nbytes = property(lambda self: self._values.nbytes)
    device = property(lambda self: Device(self._device))
    flags = property(lambda self: self._values.flags)
    T = property(lambda self: ndarray(self._values.T, self))

    @property
    def data(self) -> Any:
        values = self._values
        while isinstance(values.base, np.ndarray):
            values = values.base
        return types.SimpleNamespace(mem=types.SimpleNamespace(ptr=values.ctypes.data))

    def get(self) -> np.ndarray:
        return self._values.copy()

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        return ndarray(self._values.astype(dtype, copy=copy))

    def __getitem__(self, index: Any) -> ndarray:
        return ndarray(np.asarray(self._values[unwrapped(index)]), self)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._values[unwrapped(index)] = unwrapped(value)

    def __len__(self) -> int:
        return len(self._values)

    def __bool__(self) -> bool:
        return bool(self._values)

    def __float__(self) -> float:
        return float(self._values)

    def __repr__(self) -> str:
        return f"cupy{self._values!r}"


def unwrapped(x: Any) -> Any:
    """The NumPy array inside; NumPy arrays themselves are refused, as CuPy refuses them."""
    if isinstance(x, ndarray):
        return x._values
    if isinstance(x, np.ndarray) and x.ndim:
        raise TypeError(f"Unsupported type {type(x)}")
    if isinstance(x, tuple):
        return tuple(unwrapped(part) for part in x)
    if isinstance(x, list):
        return [unwrapped(part) for part in x]
    return x


def wrapped(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(wrapped(part) for part in x)
    if isinstance(x, (np.ndarray, np.generic)):
        return ndarray(np.asarray(x))
    if isinstance(x, list):
        return [wrapped(part) for part in x]
    return x


def lifted(function: Any) -> Any:
    """A NumPy function over these arrays."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapped(function(*map(unwrapped, args), **{k: unwrapped(v) for k, v in kwargs.items()}))

    call.__name__ = getattr(function, "__name__", "call")
    return call


def _operators() -> None:
    names = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"]
    for name in [f"__{r}{n}__" for n in names for r in ("", "r", "i")]:
        if hasattr(np.ndarray, name) and not name.startswith("__i"):
            setattr(ndarray, name, lifted(getattr(np.ndarray, name)))
    for name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__neg__", "__abs__", "__invert__"):
        setattr(ndarray, name, lifted(getattr(np.ndarray, name)))
    for name in ("__iadd__", "__isub__", "__imul__", "__itruediv__"):

        def in_place(self: ndarray, other: Any, name: str = name) -> ndarray:
            getattr(self._values, name)(unwrapped(other))
            return self

        setattr(ndarray, name, in_place)


class Device:
    """A CUDA device, and the context in which it is the current one."""

    def __init__(self, index: int | None = None) -> None:
        self.id = current[0] if index is None else index

    def __enter__(self) -> Device:
        devices_entered.append(self.id)
        self.before, current[0] = current[0], self.id
        return self

    def __exit__(self, *_: Any) -> None:
        current[0] = self.before

    def use(self) -> None:
        current[0] = self.id

    def synchronize(self) -> None:
        synchronized.append(self.id)


class Stream:
    """A queue, which here does everything at once."""

    def __init__(self, non_blocking: bool = False) -> None:
        self.device, self.non_blocking, self.waited_for = current[0], non_blocking, list[Any]()

    def __enter__(self) -> Stream:
        streams.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        streams.remove(self)

    def synchronize(self) -> None:
        synchronized.append(self.device)

    def wait_event(self, event: Event) -> None:
        self.waited_for.append(event)

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    done = True


streams: list[Stream] = []


class Pool:
    """What CuPy keeps of a device's memory, or of page-locked memory. `room`: what the device has left."""

    room = 1 << 40
    used, held = 1024, 4096

    def malloc(self, size: int) -> int:
        if size > Pool.room:
            raise OutOfMemoryError(size)
        return size

    def used_bytes(self) -> int:
        return self.used

    def total_bytes(self) -> int:
        return self.held

    def free_all_blocks(self) -> None:
        self.held = self.used


class OutOfMemoryError(MemoryError):
    pass


class Event:
    """A mark in a device's work, which takes three milliseconds for whatever comes between two of them."""

    recorded = 0

    done = True

    def record(self, stream: Stream | None = None) -> None:
        Event.recorded += 1
        self.milliseconds, self.device = 3 * Event.recorded, current[0]

    def synchronize(self) -> None:
        synchronized.append(self.device)


class Philox4x3210:
    def __init__(self, seed: int) -> None:
        self.seed = seed


class Generator:
    def __init__(self, bits: Philox4x3210) -> None:
        self.inner = np.random.Generator(np.random.Philox(bits.seed))
        for name in ("random", "standard_normal", "integers", "beta"):
            setattr(self, name, lifted(getattr(self.inner, name)))


def empty_pinned(shape: tuple, dtype: Any) -> np.ndarray:
    array = np.empty(shape, dtype)
    page_locked.add(array.ctypes.data)
    return array


def modules(count: int | Exception = 2) -> dict[str, types.ModuleType]:
    """What `import cupy` and `import cupyx` bring, on a machine with so many devices."""
    cupy = types.ModuleType("cupy")
    for name in dir(np):
        value = getattr(np, name)
        if not name.startswith("_") and callable(value) and not isinstance(value, type):
            setattr(cupy, name, lifted(value))
    kinds = [
        f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64) if f"{kind}{bits}" != "float8"
    ]
    for name in (*kinds, "newaxis", "pi", "e", "inf", "nan", "bool_", "bool"):
        setattr(cupy, name, getattr(np, name))
    cupy.dtype, cupy.generic, cupy.iinfo, cupy.finfo = np.dtype, np.generic, np.iinfo, np.finfo

    def asarray(x: Any, dtype: Any = None, order: Any = None, blocking: bool = False) -> ndarray:
        waited.append(blocking)
        if isinstance(x, ndarray) and dtype in (None, x.dtype):
            return x
        return ndarray(np.array(x._values if isinstance(x, ndarray) else x, dtype=dtype))  # a copy to the device

    def array(x: Any, dtype: Any = None, copy: bool = True, **_: Any) -> ndarray:
        return ndarray(np.array(x._values if isinstance(x, ndarray) else x, dtype=dtype))

    def add_at(x: ndarray, index: Any, values: ndarray) -> None:
        np.add.at(x._values, unwrapped(index), unwrapped(values))

    cupy.add.at = add_at
    cupy.ndarray, cupy.asarray, cupy.array, cupy.asnumpy = ndarray, asarray, array, lambda x: x.get()
    cupy.lib = types.SimpleNamespace(
        stride_tricks=types.SimpleNamespace(sliding_window_view=lifted(np.lib.stride_tricks.sliding_window_view))
    )
    cupy.random = types.SimpleNamespace(Generator=Generator, Philox4x3210=Philox4x3210)
    pools, pinned_pool = [Pool(), Pool()], Pool()
    cupy.get_default_memory_pool = lambda: pools[current[0]]
    cupy.get_default_pinned_memory_pool = lambda: pinned_pool
    cupy._core = types.SimpleNamespace(set_compute_type=lambda *kind: compute_types.update({current[0]: kind}))
    cupy.cuda = types.ModuleType("cupy.cuda")
    cupy.cuda.Device, cupy.cuda.Event, cupy.cuda.Stream = Device, Event, Stream
    cupy.cuda.memory = types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    allocators = [pools[0].malloc]
    cupy.cuda.get_allocator, cupy.cuda.set_allocator = lambda: allocators[-1], allocators.append
    cupy.cuda.get_elapsed_time = lambda start, end: end.milliseconds - start.milliseconds
    cupy.cuda.runtime = types.SimpleNamespace(
        getDeviceCount=lambda: _count(count), CUDARuntimeError=RuntimeError, memGetInfo=lambda: (3 * 10**9, 8 * 10**9),
        pointerGetAttributes=lambda address: types.SimpleNamespace(type=int(address in page_locked)),
        getDeviceProperties=lambda index: {"name": b"Stand-in %d" % index, "major": 9, "minor": 0},
    )  # fmt: skip
    cupy.__version__ = "14.0"
    special = types.ModuleType("cupyx.scipy.special")
    special.erf = lifted(np.vectorize(math.erf, otypes=[np.float64]))
    cupyx, scipy = types.ModuleType("cupyx"), types.ModuleType("cupyx.scipy")
    cupyx.scipy, scipy.special, cupyx.empty_pinned = scipy, special, empty_pinned
    return {"cupy": cupy, "cupy.cuda": cupy.cuda, "cupyx": cupyx, "cupyx.scipy": scipy, "cupyx.scipy.special": special}


def _count(count: int | Exception) -> int:
    if isinstance(count, Exception):
        raise count
    return count


_operators()


@contextmanager
def installed(count: int | Exception = 2) -> Iterator[None]:
    """CuPy can be imported inside, and nothing of it is left behind."""
    from tinytorch import backends

    here = modules(count)
    tables: tuple[Any, ...] = (backends.BY_TYPE, backends.SURE, backends.BY_DEVICE, backends.ARRAY_TYPES)
    saved_tables = [table.copy() for table in tables]
    names = [*here, "tinytorch.backends.cupy"]
    compat = types.ModuleType("array_api_compat.cupy")
    saved = {name: sys.modules.pop(name, None) for name in (*names, "array_api_compat.cupy")}
    sys.modules.update(here)
    for name in dir(here["cupy"]):
        setattr(compat, name, getattr(here["cupy"], name))
    compat.permute_dims, compat.concat, compat.pow = compat.transpose, compat.concatenate, compat.power
    compat.astype = lambda x, dtype, copy=True: x.astype(dtype, copy=copy)
    compat.asarray = lambda x, dtype=None, copy=None: (
        here["cupy"].array(x, dtype) if copy else here["cupy"].asarray(x, dtype)
    )
    sys.modules["array_api_compat.cupy"] = compat
    import array_api_compat

    compat_before = array_api_compat.__dict__.get("cupy")
    array_api_compat.cupy = compat
    current[0] = 0
    compute_types.clear()
    try:
        yield
    finally:
        current[0] = 0
        for name, module in saved.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        array_api_compat.__dict__.pop("cupy", None)
        if compat_before is not None:
            array_api_compat.cupy = compat_before
        backends.__dict__.pop("cupy", None)
        for table, before in zip(tables, saved_tables, strict=True):
            table.clear()
            table.update(before)
