"""Backends: what differs between array libraries, and nothing else.

    backend_of(array)      the backend that an array belongs to
    get_backend(device)    the backend of a device: "cpu", "cuda", "cuda:1", or the name of an array library
    manual_seed(seed)      seeds every backend's random generator, those that are made later too
    seeded(seed)           a `with` block in which this thread draws from generators of its own

This package is the only place of the framework that names NumPy or CuPy.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np

from tinytorch.backends.base import DTYPE_KINDS, Backend, Memory, OutOfMemoryError, Pool, Seeded, set_default_float
from tinytorch.backends.generic import GenericBackend
from tinytorch.backends.numpy import NumpyBackend

__all__ = [
    "ARRAY_TYPES",
    "BY_TYPE",
    "DTYPE_KINDS",
    "SURE",
    "Backend",
    "Memory",
    "OutOfMemoryError",
    "Pool",
    "backend_of",
    "count_cuda_devices",
    "get_backend",
    "manual_seed",
    "matmul_precision",
    "rng_state",
    "seeded",
    "set_default_float",
    "set_matmul_precision",
    "set_rng_state",
]

NUMPY = NumpyBackend()

# From the type of an array to its backend: one dictionary look-up for each input of each operation.
# NumPy's scalars are here because its functions return them in the place of zero-dimensional arrays.
BY_TYPE: dict[type, Backend] = {np.ndarray: NUMPY}
BY_TYPE.update({type(np.zeros((), native)[()]): NUMPY for native in NUMPY.names})
BY_DEVICE: dict[str, Backend] = {"cpu": NUMPY, "numpy": NUMPY}
ARRAY_TYPES: set[type] = {np.ndarray}  # without the scalars

# BY_TYPE without CuPy's arrays where there are several devices: each of them has to be asked where it lies.
SURE: dict[type, Backend] = dict(BY_TYPE)

_seed = 0
_precision = "highest"


def backend_of(array: Any) -> Backend:
    """The backend of an array; TypeError for anything that array-api-compat does not know as one."""
    found = BY_TYPE.get(type(array))
    if found is not None and found.name != "cupy":
        return found
    if array_api_compat.is_cupy_array(array):
        backend = get_backend(f"cuda:{array.device.id}")  # one type, but a backend for each device
        backend.use()  # what is computed next is computed with this array
        return backend
    if not array_api_compat.is_array_api_obj(array):
        raise TypeError(f"expected an array of NumPy, CuPy or another array library, got {type(array).__name__}")
    if isinstance(array, np.ndarray):  # a subclass of NumPy's array
        return NUMPY
    namespace = array_api_compat.array_namespace(array)
    name = type(array).__module__.partition(".")[0]
    backend = _add(name, GenericBackend(name, namespace, array))
    BY_TYPE[type(array)] = SURE[type(array)] = backend
    ARRAY_TYPES.add(type(array))
    return backend


def get_backend(device: str) -> Backend:
    """The backend of a device.

    Args:
        device: "cpu" (NumPy), "cuda" or "cuda:1" (CuPy), or an array library's name: "array_api_strict", "torch".

    Raises:
        RuntimeError: the device cannot be used here; the message says what is missing and how to get it.
    """
    name = str(device)
    if name in BY_DEVICE:
        return BY_DEVICE[name]
    if name == "cuda" or name.startswith("cuda:"):
        return _cuda(name)
    try:
        library = importlib.import_module(name)
        example = getattr(library, "asarray")(0.0)  # noqa: B009 - whatever the library is, this is its constructor
        backend = backend_of(example)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"there is no device {name!r}: expected 'cpu', 'cuda', 'cuda:N' or the name of an installed array library "
            f"such as 'array_api_strict' or 'torch' ({type(error).__name__}: {error})"
        ) from None
    return backend


def _cuda(name: str) -> Backend:
    number = name.partition(":")[2] or "0"
    if not number.isdecimal():
        raise RuntimeError(f"there is no device {name!r}: a CUDA device is 'cuda' or 'cuda:N' with a number N")
    try:
        from tinytorch.backends import cupy as module
    except Exception as error:  # a broken installation can raise anything at all
        raise RuntimeError(
            f"device {name!r} needs CuPy, which cannot be imported ({type(error).__name__}: {error}). "
            "pip install 'tinytorch-systems[cuda12]' or [cuda13], after your driver's CUDA version (see nvidia-smi)"
        ) from None
    try:
        count = module.device_count()
    except Exception as error:
        raise RuntimeError(
            f"device {name!r}: CuPy is here, but the CUDA driver is not usable ({error}). "
            "Install or update the NVIDIA driver; 'tinytorch doctor' tells what it found"
        ) from None
    if int(number) >= count:
        raise RuntimeError(f"there is no device {name!r}: this machine has {count} CUDA device(s)")
    backend = _add(f"cuda:{int(number)}", module.CupyBackend(int(number)))
    if int(number) == 0:
        BY_DEVICE["cuda"] = backend
    BY_TYPE[backend.array_type] = backend
    ARRAY_TYPES.add(backend.array_type)
    if [device for device in BY_DEVICE if device.startswith("cuda:")] == ["cuda:0"]:
        SURE[backend.array_type] = backend
    else:
        SURE.pop(backend.array_type, None)
    return backend


def count_cuda_devices() -> int:
    """How many CUDA devices CuPy can use; 0 where CuPy, the driver or the devices are missing."""
    try:
        from tinytorch.backends import cupy as module

        return module.device_count()
    except Exception:  # a broken installation can raise anything at all
        return 0


def _add(device: str, backend: Backend) -> Backend:
    backend.seed(_seed)
    backend.set_matmul_precision(_precision)
    return BY_DEVICE.setdefault(device, backend)


def manual_seed(seed: int) -> None:
    """Seed the random generators of all backends. The same seed, machine and backend give the same bits."""
    global _seed
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"manual_seed: expected an integer >= 0, got {seed!r}")
    _seed = seed
    for backend in BY_DEVICE.values():
        backend.seed(seed)


def set_matmul_precision(precision: str) -> None:
    """How all devices multiply float32: "highest", as it is written; "high" or "medium": in TF32 where there is one."""
    global _precision
    if precision not in ("highest", "high", "medium"):
        raise ValueError(f"set_float32_matmul_precision: expected 'highest', 'high' or 'medium', got {precision!r}")
    _precision = precision
    for backend in set(BY_DEVICE.values()):
        backend.set_matmul_precision(precision)


def matmul_precision() -> str:
    return _precision


def seeded(seed: int | Sequence[int]) -> Seeded:
    """A `with` block in which this thread draws from generators of its own, on every backend; they start at `seed`.

    What other threads draw, and what this one draws after the block, is as if the block had not been.
    """
    return Seeded(list(dict.fromkeys(BY_DEVICE.values())), seed)


def rng_state() -> dict[str, Any]:
    """The state of every backend's random generator, by device, as JSON can hold it."""
    return {device: backend.rng_state() for device, backend in BY_DEVICE.items() if device == backend.device}


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back to where `rng_state` found them. A device that is not here raises RuntimeError."""
    for device, generator in state.items():
        get_backend(device).set_rng_state(generator)
