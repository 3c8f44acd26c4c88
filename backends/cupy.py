"""The CuPy backend: the same arrays on a CUDA device. Imported only when someone asks for CUDA."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat.cupy as namespace
import cupy
import cupyx.scipy.special
import numpy as np

from tinytorch.backends.base import Array, Backend, Memory, OutOfMemoryError, Pool

try:  # with it, CuPy 14 and newer have bfloat16
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

# CuPy's names for how products of float32 are computed, which it exports as numbers only: as written, or in TF32.
COMPUTE_TYPES = {"highest": 1, "high": 7, "medium": 7}
ON_HOST = 1  # the CUDA runtime's number for page-locked memory


class CupyBackend(Backend):
    """CuPy on one CUDA device."""

    name = "cupy"

    def __init__(self, index: int) -> None:
        self.index = index
        self._under_way: list[tuple[Any, np.ndarray]] = []  # copies to the device, and what they are made from
        super().__init__(namespace, f"cuda:{index}", cupy.ndarray)
        for creation in ("zeros", "ones", "full", "empty", "eye", "arange", "linspace", "asarray"):
            setattr(self, creation, self._here(getattr(namespace, creation)))
        if bfloat16 is not None and int(cupy.__version__.partition(".")[0]) >= 14:
            self.dtypes["bfloat16"] = np.dtype(bfloat16)
            self.names[np.dtype(bfloat16)] = "bfloat16"

    def _here(self, create: Callable) -> Callable:
        """The function, so that what it creates lies on this backend's device."""

        @functools.wraps(create)
        def on_this_device(*args: Any, **kwargs: Any) -> Array:
            with cupy.cuda.Device(self.index):
                return create(*args, **kwargs)

        return on_this_device

    def native(self, dtype: Any) -> Any:
        return np.dtype(dtype)  # the namespace has NumPy's scalar types in the dtypes' place

    def take_index(self, x: Array, index: Any) -> Array:
        return x[self._on_device(index)]

    def assign(self, x: Array, index: Any, value: Any) -> None:
        x[self._on_device(index)] = value

    def scatter_add(self, x: Array, index: Any, values: Array) -> Array:
        cupy.add.at(x, self._on_device(index), values)
        return x

    def _on_device(self, index: Any) -> Any:
        """CuPy indexes with its own arrays; NumPy arrays and lists inside an index are copied to the device."""
        if isinstance(index, tuple):
            return tuple(self._on_device(part) for part in index)
        return self.from_numpy(np.asarray(index)) if isinstance(index, (np.ndarray, list)) else index

    def erf(self, x: Array) -> Array:
        if x.dtype.itemsize < 4:  # its kernel knows no bfloat16, and float16 only after promotion
            return cupyx.scipy.special.erf(x.astype(np.float32)).astype(x.dtype)
        return cupyx.scipy.special.erf(x)

    def einsum(self, equation: str, *arrays: Array) -> Array:
        return cupy.einsum(equation, *arrays, optimize=True)

    def sliding_windows(self, x: Array, size: tuple, stride: tuple, dilation: tuple) -> Array:
        rank = len(size)
        spans = tuple(d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True))
        windows = cupy.lib.stride_tricks.sliding_window_view(x, spans, axis=tuple(range(-rank, 0)))
        steps = tuple(slice(None, None, s) for s in (*stride, *dilation))
        return windows[(..., *steps)]

    # Numbers are drawn on the device. The state is the seed and how many draws there were: a Philox generator is
    # counter-based, so that a new one for each draw costs nothing and the state fits into JSON.

    def new_generator(self, seed: int | Sequence[int]) -> dict[str, Any]:
        if isinstance(seed, Sequence):  # several numbers become one
            seed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
        return {"generator": "philox", "seed": int(seed), "draws": 0}

    def rng_state(self) -> Any:
        return dict(self.generator)

    def set_rng_state(self, state: dict) -> None:
        if not isinstance(state, dict) or state.get("generator") != "philox":
            raise ValueError(f"not a random state of backend {self.name}: {state!r}")
        self.generator.update(seed=int(state["seed"]), draws=int(state["draws"]))

    def _next(self) -> Any:
        state = self.generator
        state["draws"] += 1
        entropy = np.random.SeedSequence([state["seed"], state["draws"]])
        return cupy.random.Generator(cupy.random.Philox4x3210(int(entropy.generate_state(1, np.uint64)[0])))

    def random(self, shape: tuple, dtype: str = "float32") -> Array:
        with cupy.cuda.Device(self.index):
            return self.cast(self._next().random(shape, dtype="float64" if dtype == "float64" else "float32"), dtype)

    def normal(self, shape: tuple, dtype: str = "float32") -> Array:
        with cupy.cuda.Device(self.index):
            drawn = self._next().standard_normal(shape, dtype="float64" if dtype == "float64" else "float32")
            return self.cast(drawn, dtype)

    def integers(self, low: int, high: int, shape: tuple) -> Array:
        with cupy.cuda.Device(self.index):
            return self._next().integers(low, high, shape, dtype=np.int64)

    def permutation(self, count: int) -> Array:
        with cupy.cuda.Device(self.index):
            return cupy.argsort(self._next().random((count,), dtype="float64"))

    def beta(self, a: float, b: float, shape: tuple, dtype: str = "float32") -> Array:
        with cupy.cuda.Device(self.index):
            return self.cast(self._next().beta(a, b, shape), dtype)

    def from_numpy(self, array: np.ndarray, wait: bool = True) -> Array:
        with cupy.cuda.Device(self.index):
            # What is not page-locked CuPy copies to where it is, and from there on its own.
            copy = cupy.asarray(array, blocking=wait and is_pinned(array))
            if not wait:
                event = cupy.cuda.Event()
                event.record()
                self._under_way = [(e, source) for e, source in self._under_way if not e.done] + [(event, array)]
            return copy

    def pinned(self, array: np.ndarray) -> np.ndarray:
        out = cupyx.empty_pinned(array.shape, array.dtype)
        out[...] = array
        return out

    def to_numpy(self, array: Array) -> np.ndarray:
        return cupy.asnumpy(array)

    def synchronize(self) -> None:
        cupy.cuda.Device(self.index).synchronize()

    def use(self) -> None:
        cupy.cuda.Device(self.index).use()

    def stream(self) -> Any:
        with cupy.cuda.Device(self.index):
            return cupy.cuda.Stream(non_blocking=True)

    def mark(self) -> Any:
        with cupy.cuda.Device(self.index):
            event = cupy.cuda.Event()
            event.record()
            return event

    def seconds_between(self, start: Any, end: Any) -> float:
        end.synchronize()
        return cupy.cuda.get_elapsed_time(start, end) / 1e3  # it counts milliseconds

    def memory(self) -> Memory:
        """The device's memory: used and in all by pynvml (all processes), peak of this process by CuPy's pool."""
        import pynvml

        pynvml.nvmlInit()
        info = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(self.index))
        return Memory(info.used, self.pool().reserved, info.total)

    def description(self) -> str:
        return cupy.cuda.runtime.getDeviceProperties(self.index)["name"].decode()

    def pool(self) -> Pool:
        with cupy.cuda.Device(self.index):  # there is a pool for each
            pool = cupy.get_default_memory_pool()
            return Pool(pool.used_bytes(), pool.total_bytes())

    def release(self) -> None:
        with cupy.cuda.Device(self.index):
            cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()

    def set_matmul_precision(self, precision: str) -> None:
        with cupy.cuda.Device(self.index):
            cupy._core.set_compute_type(np.float32, COMPUTE_TYPES[precision])

    def owns_memory(self, array: Array) -> bool:
        return array.base is None

    def buffer_id(self, array: Array) -> int:
        return array.data.mem.ptr


def is_pinned(array: np.ndarray) -> bool:
    """Whether an array lies in page-locked memory."""
    try:
        return cupy.cuda.runtime.pointerGetAttributes(array.ctypes.data).type == ON_HOST
    except cupy.cuda.runtime.CUDARuntimeError:  # what older drivers say of memory that they have not heard of
        return False


def device_count() -> int:
    return cupy.cuda.runtime.getDeviceCount()


# Every array of CuPy is allocated by a function that can be set, which is where a full device shows, whatever was being
# computed. CuPy has then given back what it kept, and tried again.
_allocate = cupy.cuda.get_allocator()


def allocate(size: int) -> Any:
    """Memory of the current device; OutOfMemoryError, with figures, if there is none."""
    try:
        return _allocate(size)
    except cupy.cuda.memory.OutOfMemoryError:
        pool, device = cupy.get_default_memory_pool(), cupy.cuda.Device().id
        used, (free, total) = pool.used_bytes(), cupy.cuda.runtime.memGetInfo()
        others = max(total - free - pool.total_bytes(), 0)
        raise OutOfMemoryError(
            f"cuda:{device} has no {size / 1e6:,.1f} MB for an array: of its {total / 1e6:,.0f} MB this program's "
            f"arrays take {used / 1e6:,.0f}, and other programs and the driver {others / 1e6:,.0f}. Make batches "
            "smaller, evaluate under no_grad(), train with precision='float16', or drop tensors that hold graphs"
        ) from None


cupy.cuda.set_allocator(allocate)
