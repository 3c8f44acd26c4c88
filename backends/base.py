"""What a backend is: an array namespace of the standard, plus the few functions that the standard lacks.

A `Backend` is what every operation receives as `xp`. The standard's functions (https://data-apis.org/array-api) are
reached as `xp.exp`, `xp.matmul` … just as the array library offers them through array-api-compat. The additions are the
methods below, and there are no others:

    promote, cast, is_floating, dtype, dtype_name    which dtype a result has; `native` and `weak` are parts of it
    take_index, assign, scatter_add                  indexing with whatever NumPy takes as an index
    erf, einsum, sliding_windows                     mathematics
    random, normal, integers, permutation, …         a seeded random generator; `seeded` gives a thread one of its own
    from_numpy, to_numpy, pinned, synchronize        the way to the device and back
    description, memory, pool, release               the machine, its memory, and what the library keeps of it
    use, stream, mark, seconds_between               a device that works on its own, and the time there
    set_matmul_precision                             whether products of float32 may round their factors
    buffer_id, owns_memory, whole_of, format         which memory an array lies in; its values as text
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

Array = Any  # an array of whichever library the backend covers

# The name of every dtype that a tensor can have, and the type of Python number that it holds.
DTYPE_KINDS = {
    "bool": bool,
    **dict.fromkeys(("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"), int),
    **dict.fromkeys(("float16", "bfloat16", "float32", "float64"), float),
}
RANK = {bool: 0, int: 1, float: 2}


class Memory(NamedTuple):
    """Bytes of memory: in use now, at most so far, and in all."""

    used: int
    peak: int
    total: int


class Pool(NamedTuple):
    """Bytes of a device's memory: of arrays that live, and what the library holds for them and for those to come."""

    used: int
    reserved: int


class OutOfMemoryError(MemoryError, RuntimeError):
    """A device has no memory left for an array."""


class Own(threading.local):
    """What a thread draws from in the place of everyone's generator; nothing, unless it is in a `Seeded` block."""

    generator: Any = None


class Seeded:
    """`with` blocks in which backends draw from generators that start at `seed`, in this thread only.

    The generators that all threads share are left alone, and are back in force after the block. Entered again, it goes
    on drawing where it left off.
    """

    def __init__(self, backends: Sequence[Backend], seed: int | Sequence[int]) -> None:
        self.generators = [(backend, backend.new_generator(seed)) for backend in backends]
        self.outer: list[list] = []

    def __enter__(self) -> None:
        self.outer.append([backend._own.generator for backend, _ in self.generators])
        for backend, generator in self.generators:
            backend._own.generator = generator

    def __exit__(self, *error: object) -> None:
        # Not what was put there: `seed` inside the block has put a new one in its place.
        self.generators = [(backend, backend._own.generator) for backend, _ in self.generators]
        for (backend, _), outer in zip(self.generators, self.outer.pop(), strict=True):
            backend._own.generator = outer


class Backend:
    """One array library on one device. `xp.name` reaches the library's own functions at no extra cost."""

    name: str  # "numpy", "cupy", "array_api_strict", "torch"
    device: str  # what `Tensor.device` shows: "cpu", "cuda:0", …
    default_float = "float32"
    usual_float: Any  # the library's own float32: inputs that all have it need no promotion
    array_type: type  # the type of every array of this backend

    def __init__(self, namespace: ModuleType, device: str, array_type: type) -> None:
        self.namespace, self.array_type = namespace, array_type
        self.device = device
        self.dtypes = {n: self.native(getattr(namespace, n)) for n in DTYPE_KINDS if hasattr(namespace, n)}
        self.names = {native: name for name, native in self.dtypes.items()}
        self.usual_float = self.dtypes["float32"]
        for name in dir(namespace):  # copied, so that `xp.exp` is one look-up; our own methods go first
            if not name.startswith("_") and not hasattr(type(self), name) and name not in vars(self):
                setattr(self, name, getattr(namespace, name))
        self._own = Own()
        self.seed(0)

    if TYPE_CHECKING:  # a real __getattr__ would slow every look-up down, also those that succeed

        def __getattr__(self, name: str) -> Any: ...

    def __repr__(self) -> str:
        return f"<backend {self.name} on {self.device}>"

    # -- dtypes ------------------------------------------------------------------------------------------------------

    def native(self, dtype: Any) -> Any:
        """What `array.dtype` is, for a dtype as the namespace names it."""
        return dtype

    def dtype(self, name: str) -> Any:
        """The library's own dtype for a name such as "float32"; TypeError where it has none."""
        try:
            return self.dtypes[name]
        except KeyError:
            known = ", ".join(self.dtypes)
            raise TypeError(f"{self.name} has no dtype {str(name)!r}; it has {known}") from None

    def dtype_name(self, array: Array) -> str:
        """The name of an array's dtype: "float32"."""
        return self.names[array.dtype]

    def is_floating(self, array: Array) -> bool:
        return DTYPE_KINDS[self.names[array.dtype]] is float

    def cast(self, array: Array, name: str) -> Array:
        """The array in the dtype called `name`; the same array if it has it already."""
        native = self.dtype(name)
        return array if array.dtype == native else self.astype(array, native)

    def promote(self, inputs: list, floating: bool = False) -> list:
        """Bring arrays to one dtype by the standard's rules, and int with float to the float, as PyTorch does.

        Python numbers are weak: they decide the kind of the result (bool < int < float), never its width. With
        `floating`, integers become the default float: what `exp` and `/` need.
        """
        wanted: str | None = None
        strongest: type = bool
        for x in inputs:
            if isinstance(x, (bool, int, float)):
                kind = type(x) if type(x) in RANK else float  # NumPy's float64 is a float, too
                strongest = kind if RANK[kind] > RANK[strongest] else strongest
            else:
                name = self.names[x.dtype]
                wanted = name if wanted is None else self.promoted_name(wanted, name)
        if wanted is None:
            return inputs
        if floating:
            strongest = float
        if RANK[strongest] > RANK[DTYPE_KINDS[wanted]]:
            wanted = self.default_float if strongest is float else "int64"
        return [self.weak(x, wanted) if isinstance(x, (bool, int, float)) else self.cast(x, wanted) for x in inputs]

    def promoted_name(self, a: str, b: str) -> str:
        """The dtype of `a` with `b`, by name. Float wins over int; otherwise the standard's table decides."""
        if a == b:
            return a
        rank_a, rank_b = RANK[DTYPE_KINDS[a]], RANK[DTYPE_KINDS[b]]
        if rank_a != rank_b:
            return a if rank_a > rank_b else b
        return self.names[self.result_type(self.dtype(a), self.dtype(b))]

    def weak(self, number: bool | int | float, dtype_name: str) -> Any:
        """A Python number next to arrays of a dtype: itself, where the library treats it as weak of its own accord."""
        return number

    # -- indexing ----------------------------------------------------------------------------------------------------

    def take_index(self, x: Array, index: Any) -> Array:
        """x[index], for every index that NumPy takes."""
        return x[index]

    def assign(self, x: Array, index: Any, value: Any) -> None:
        """x[index] = value, in place."""
        x[index] = value

    def increase(self, x: Array, index: Any, value: Any) -> None:
        """x[index] += value, in place, for an index in which no position occurs twice."""
        x[index] += value

    def scatter_add(self, x: Array, index: Any, values: Array) -> Array:
        """x[index] += values in place, where a position that occurs twice gets both; returns x."""
        raise NotImplementedError

    # -- mathematics -------------------------------------------------------------------------------------------------

    def erf(self, x: Array) -> Array:
        """The error function, to the precision of the dtype."""
        raise NotImplementedError

    def einsum(self, equation: str, *arrays: Array) -> Array:
        raise NotImplementedError

    def sliding_windows(self, x: Array, size: tuple, stride: tuple, dilation: tuple) -> Array:
        """Windows over the last len(size) axes: (…, H, W) -> (…, H_out, W_out, KH, KW), a view where possible."""
        raise NotImplementedError

    # -- random numbers: drawn by NumPy's PCG64 and copied, so that every backend draws the same numbers --------------

    def new_generator(self, seed: int | Sequence[int]) -> Any:
        """What numbers are drawn from: a generator that starts at a seed, one or several whole numbers >= 0."""
        return np.random.Generator(np.random.PCG64(seed))

    @property
    def generator(self) -> Any:
        """The generator in force: the one of all threads, or the thread's own in a `seeded` block."""
        return self._own.generator or self._everyones

    def seed(self, seed: int) -> None:
        """Start the generator in force anew. The same seed gives the same numbers."""
        if self._own.generator is None:
            self._everyones = self.new_generator(seed)
        else:
            self._own.generator = self.new_generator(seed)

    def seeded(self, seed: int | Sequence[int]) -> Seeded:
        """A `with` block in which this thread draws from a generator of its own, which starts at `seed`."""
        return Seeded([self], seed)

    def rng_state(self) -> Any:
        """The generator's state, as JSON can hold it."""
        return self.generator.bit_generator.state

    def set_rng_state(self, state: dict) -> None:
        try:
            self.generator.bit_generator.state = state
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"not a random state of backend {self.name}: {error}") from None

    def random(self, shape: tuple, dtype: str = "float32") -> Array:
        """Uniform on [0, 1)."""
        drawn = self.generator.random(shape, dtype="float64" if dtype == "float64" else "float32")
        return self.cast(self.from_numpy(drawn), dtype)

    def normal(self, shape: tuple, dtype: str = "float32") -> Array:
        """Mean 0, standard deviation 1."""
        drawn = self.generator.standard_normal(shape, dtype="float64" if dtype == "float64" else "float32")
        return self.cast(self.from_numpy(drawn), dtype)

    def integers(self, low: int, high: int, shape: tuple) -> Array:
        """Uniform over low … high - 1, int64."""
        return self.from_numpy(self.generator.integers(low, high, shape))

    def permutation(self, count: int) -> Array:
        """0 … count - 1 in random order, int64."""
        return self.from_numpy(self.generator.permutation(count))

    def beta(self, a: float, b: float, shape: tuple, dtype: str = "float32") -> Array:
        """Between 0 and 1, with a density proportional to x^(a - 1) (1 - x)^(b - 1), for a and b above 0."""
        return self.cast(self.from_numpy(self.generator.beta(a, b, shape)), dtype)

    # -- the machine -------------------------------------------------------------------------------------------------

    def from_numpy(self, array: np.ndarray, wait: bool = True) -> Array:
        """This backend's array with the values of a NumPy array.

        Without `wait`, a copy out of page-locked memory (see `pinned`) is under way when this returns.
        """
        raise NotImplementedError

    def pinned(self, array: np.ndarray) -> np.ndarray:
        """A copy in memory that the machine never moves, from which a device copies on its own."""
        raise NotImplementedError(f"{self.name} on {self.device} needs no page-locked memory")

    def to_numpy(self, array: Array) -> np.ndarray:
        """A NumPy array with the values of one of this backend's; without a copy where the memory is shared."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given. Nothing to do where calls return when they are done."""

    def use(self) -> None:
        """Have this thread's work go to this device, where there are several of a kind."""

    def stream(self) -> Any:
        """A queue of its own for the device's work: a context manager in which work goes there."""
        raise NotImplementedError(f"{self.name} on {self.device} has no streams")

    def mark(self) -> Any:
        """A point in the device's work: behind all that it was given. None where calls return when they are done."""
        return None

    def seconds_between(self, start: Any, end: Any) -> float:
        """How long the device took from one of its marks to another; waits until it has come to the second."""
        raise NotImplementedError(f"{self.name} on {self.device} has no marks")

    def memory(self) -> Memory:
        """This process's memory on the device (here: of the machine)."""
        return process_memory()

    def description(self) -> str:
        """What the device calls itself."""
        raise NotImplementedError(f"{self.name} on {self.device} has no name for it")

    def pool(self) -> Pool:
        """What the library holds of the device's memory; zeros where it keeps none for itself."""
        return Pool(0, 0)

    def release(self) -> None:
        """Give what the library holds, and no array needs, back to the device."""

    def set_matmul_precision(self, precision: str) -> None:
        """ "highest": products of float32 are of float32. "high", "medium": their factors may be rounded first."""

    def buffer_id(self, array: Array) -> int:
        """A number for the memory that an array lies in; equal for an array and its views."""
        raise NotImplementedError

    def owns_memory(self, array: Array) -> bool:
        """Whether the array is certainly the only one over its memory's allocation, and no view."""
        return False

    def whole_of(self, arrays: Sequence[Array], axis: int) -> Array | None:
        """A view of the one memory in which these arrays lie, side by side along an axis, and which they fill."""
        return None

    def format(self, array: Array, prefix: str = "") -> str:
        """The values as nested brackets, abbreviated where they are many; later lines are indented below `prefix`."""
        return np.array2string(self.to_numpy(array), separator=", ", prefix=prefix)


def set_default_float(name: str) -> None:
    """The floating dtype that Python floats make, and that integers become where a function needs floats."""
    Backend.default_float = name


def process_memory() -> Memory:
    """Resident memory of this process, from /proc where there is one and from `resource` elsewhere."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    try:
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return Memory(int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024, total)
    except (OSError, KeyError):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return Memory(0, 0, total)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return Memory(peak, peak, total)
