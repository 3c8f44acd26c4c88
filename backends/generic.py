"""Any other namespace that array-api-compat knows, by portable and slower code.

array-api-strict is here to prove that no operation leans on NumPy's habits, PyTorch's tensors to show that the
framework runs on an array library that it was not written for.
"""

from __future__ import annotations

from contextlib import suppress
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

from tinytorch.backends.base import DTYPE_KINDS, Array, Backend
from tinytorch.backends.numpy import erf


class GenericBackend(Backend):
    """An array library that is known by the standard's functions only."""

    def __init__(self, name: str, namespace: ModuleType, example: Array) -> None:
        self.name = name
        self.place = array_api_compat.device(example)
        super().__init__(namespace, name, type(example))

    def weak(self, number: bool | int | float, dtype_name: str) -> Any:
        # A zero-dimensional array of the right dtype means the same number in every library and every function.
        return self.asarray(number, dtype=self.dtype(dtype_name), device=self.place)

    def take_index(self, x: Array, index: Any) -> Array:
        if _is_standard(index):
            parts = index if isinstance(index, tuple) else (index,)
            with suppress(IndexError):  # strict libraries refuse a slice that ends beyond the axis
                return x[parts if ... in parts else (*parts, ...)]
        where = self._positions(x.shape, index)
        flat = self.take(self.reshape(x, (-1,)), self.from_numpy(where.reshape(-1)), axis=0)
        return self.reshape(flat, where.shape)

    def assign(self, x: Array, index: Any, value: Any) -> None:
        host = np.array(self.to_numpy(x))
        host[self._to_host(index)] = self.to_numpy(value) if isinstance(value, self.array_type) else value
        x[...] = self.from_numpy(host)

    def increase(self, x: Array, index: Any, value: Any) -> None:
        self.scatter_add(x, index, value)

    def scatter_add(self, x: Array, index: Any, values: Array) -> Array:
        host = np.array(self.to_numpy(x))
        np.add.at(host, self._to_host(index), self.to_numpy(values))
        x[...] = self.from_numpy(host)
        return x

    def _positions(self, shape: tuple, index: Any) -> np.ndarray:
        """Where in a flattened array of this shape the indexed elements lie."""
        return np.arange(int(np.prod(shape))).reshape(shape)[self._to_host(index)]

    def _to_host(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(self._to_host(part) for part in index)
        return self.to_numpy(index) if isinstance(index, self.array_type) else index

    def erf(self, x: Array) -> Array:
        return self.from_numpy(erf(self.to_numpy(x)))

    def einsum(self, equation: str, *arrays: Array) -> Array:
        return self.from_numpy(np.einsum(equation, *(self.to_numpy(a) for a in arrays), optimize=True))

    def sliding_windows(self, x: Array, size: tuple, stride: tuple, dilation: tuple) -> Array:
        rank, lead = len(size), x.ndim - len(size)
        out = [(n - d * (k - 1) - 1) // s + 1
               for n, k, s, d in zip(x.shape[lead:], size, stride, dilation, strict=True)]  # fmt: skip
        # One strided slice of x per place in the window, stacked: (K, …, out), then the window's axes go last.
        pieces = []
        for place in np.ndindex(*size):
            window = tuple(
                slice(p * d, p * d + (o - 1) * s + 1, s)
                for p, d, o, s in zip(place, dilation, out, stride, strict=True)
            )
            pieces.append(x[(slice(None),) * lead + window])
        stacked = self.stack(pieces, axis=-1)
        return self.reshape(stacked, (*x.shape[:lead], *out, *size[:rank]))

    def from_numpy(self, array: np.ndarray, wait: bool = True) -> Array:
        array = np.asarray(array)
        name = array.dtype.name
        if name not in DTYPE_KINDS:
            raise TypeError(f"{self.name}: no tensor can hold NumPy's dtype {name}")
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):  # what PyTorch cannot share
            array = array.copy(order="C")
        # Through DLPack or the buffer protocol where the library reads it, element by element never.
        return self.asarray(np.ascontiguousarray(array).reshape(array.shape), dtype=self.dtype(name), device=self.place)

    def to_numpy(self, array: Array) -> np.ndarray:
        if self.name == "torch":
            return array.detach().cpu().numpy()
        return np.from_dlpack(array) if not hasattr(array, "_array") else array._array

    def buffer_id(self, array: Array) -> int:
        if self.name == "torch":
            return array.untyped_storage().data_ptr()
        inner: Any = getattr(array, "_array", array)
        while isinstance(getattr(inner, "base", None), np.ndarray):
            inner = inner.base
        return id(inner)


def _is_standard(index: Any) -> bool:
    """Whether the standard defines x[index]: integers, slices with positive steps, ellipsis, None; or one bool mask."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        part is None
        or part is ...
        or (isinstance(part, int) and not isinstance(part, bool))
        or (isinstance(part, slice) and (part.step is None or part.step > 0))
        for part in parts
    )
