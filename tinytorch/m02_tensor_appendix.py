"""Module 02, appendix: the rest of PyTorch's tensor, by the same doors.

Changing in place, more ways to create, combine, reduce, reshape, select, sort and draw tensors, and the protocols by
which Python, NumPy and DLPack see them. Functions whose body is made of other operations are not Ops themselves:
whatever stands behind the door, a recorder included, sees the operations that they are made of.
"""

from __future__ import annotations

import builtins
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from tinytorch.backends import (  # noqa: F401 - OutOfMemoryError is for users
    BY_TYPE,
    DTYPE_KINDS,
    OutOfMemoryError,
    backend_of,
    count_cuda_devices,
    get_backend,
    matmul_precision,
    set_default_float,
    set_matmul_precision,
)
from tinytorch.m02_tensor import (
    DTYPES,
    Device,
    DType,
    Op,
    Tensor,
    _default,
    _from_sign,
    _new,
    _operators,
    _raw_index,
    _size,
    _to_array,
    abs,
    amax,
    argmax,
    cast,
    cat,
    clone,
    concatenate,
    div,
    exp,
    expand,
    float32,
    full,
    getitem,
    int64,
    matmul,
    mul,
    neg,
    op,
    permute,
    pow,
    reshape,
    sqrt,
    sub,
    sum,
    to,
    unsqueeze,
    where,
)
from tinytorch.m02_tensor import add as add_op
from tinytorch.m02_tensor import maximum as maximum_op

Dim = int | tuple[int, ...] | None

# -- in place ----------------------------------------------------------------------------------------------------------


class Writes:
    """When each piece of memory was last written to, for whoever keeps an array and relies on its values."""

    clock = itertools.count(1)  # also numbers what a recorder records, so that the two can be compared
    latest = 0
    times: ClassVar[dict[int, int]] = {}

    @classmethod
    def note(cls, array: Any) -> None:
        """Say that an array's memory has just been written to."""
        cls.latest = cls.times[backend_of(array).buffer_id(array)] = next(cls.clock)

    @classmethod
    def since(cls, array: Any, time: int) -> bool:
        """Whether the array's memory was written to after `time`."""
        return cls.latest > time and cls.times.get(backend_of(array).buffer_id(array), 0) > time


@op
def index_put(xp, x, value, *, index):
    """A copy of x in which x[index] is `value`."""
    copied = xp.asarray(x, copy=True)
    xp.assign(copied, index, xp.cast(value, xp.dtype_name(x)) if hasattr(value, "dtype") else value)
    return copied


@op
def overwrite(xp, x, value):
    """`value`, with x's shape and dtype."""
    value = xp.cast(value if hasattr(value, "dtype") else xp.asarray(value), xp.dtype_name(x))
    return xp.broadcast_to(value, x.shape)


def in_place(pure: Op, write: Callable | None = None) -> Callable:
    """The in-place form of an operation: it writes into the tensor's array and returns the tensor.

    A recorder that wants one of these tensors is handed the pure result instead and decides. Each write is noted.
    `write(array, …)` is a faster way to change an array of floats than computing the pure result and assigning it.
    """

    def method(self: Tensor, *others: Any, **attributes: Any) -> Tensor:
        recorder = Op.recorder
        if recorder is not None and recorder.wants(self, *others):
            recorder.replace(self, pure(self, *others, **attributes))
            return self
        raw = [x.data if isinstance(x, Tensor) else x for x in others]
        try:
            if write is not None and _writes_itself(self.data, raw):
                write(self.data, *raw, **attributes)
            else:
                _write(self.data, ..., pure(self.data, *raw, **attributes))
        except (ValueError, TypeError, RuntimeError) as error:
            raise pure._error(error, [self.data, *raw]) from None
        Writes.note(self.data)
        return self

    method.__name__ = method.__qualname__ = f"{pure.name}_"
    method.__doc__ = f"In place: {pure.__doc__}"
    return method


def _writes_itself(array: Any, others: list) -> builtins.bool:
    """Whether `array += other` means for the array library what it means here."""
    if not backend_of(array).is_floating(array):
        return False
    return builtins.all(
        isinstance(x, (int, float)) or (type(x) is type(array) and x.dtype == array.dtype) for x in others
    )


def _write(array: Any, index: Any, value: Any) -> None:
    """array[index] = value, where the value's kind of number must fit the array's: no float into integers."""
    backend = backend_of(array)
    if hasattr(value, "dtype") and backend_of(value) is backend:
        if backend.is_floating(value) and not backend.is_floating(array):
            raise TypeError(f"a {value.dtype} result cannot be written into a {array.dtype} tensor")
        value = backend.cast(value, backend.dtype_name(array))
    backend.assign(array, index, value)


def set_item(x: Tensor, index: Any, value: Any) -> None:
    """x[index] = value."""
    index = _raw_index(index)
    if Op.recorder is not None and Op.recorder.wants(x, value):
        Op.recorder.replace(x, index_put(x, value, index=index))
        return
    raw = value.data if isinstance(value, Tensor) else value
    try:
        _write(x.data, index, raw)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise index_put._error(error, [x.data, raw]) from None
    Writes.note(x.data)


add_, sub_ = in_place(add_op, operator.iadd), in_place(sub, operator.isub)
mul_, div_ = in_place(mul, operator.imul), in_place(div, operator.itruediv)
copy_ = in_place(overwrite)

# -- defaults, devices, protocols --------------------------------------------------------------------------------------


def set_default_device(device: str) -> None:
    """The device on which tensors are created when none is named; RuntimeError where it cannot be used."""
    get_backend(device)
    _default["device"] = Device(device)


def get_default_device() -> Device:
    return _default["device"]


def set_default_dtype(dtype: str) -> None:
    """The dtype that Python floats make: float32 (the default), float64 or float16."""
    if dtype not in DTYPES or DTYPE_KINDS[dtype] is not float:
        raise TypeError(f"set_default_dtype: expected a floating dtype such as float32, got {dtype!r}")
    _default["dtype"] = DTYPES[dtype]
    set_default_float(str(dtype))


def get_default_dtype() -> DType:
    return _default["dtype"]


def is_tensor(x: Any) -> builtins.bool:
    return isinstance(x, Tensor)


def _contains(self: Tensor, value: Any) -> builtins.bool:
    return builtins.bool(any(self == value))


def _index(self: Tensor) -> int:
    if self.dtype.is_floating_point:
        raise TypeError(f"a {self.dtype} tensor is not an index; integers are")
    return int(self.item())


def _as_array(self: Tensor, dtype: Any = None, copy: builtins.bool | None = None) -> Any:
    array = self.numpy()
    return array.astype(dtype or array.dtype, copy=builtins.bool(copy))


def _deepcopy(self: Tensor, memo: dict) -> Tensor:
    copied = type(self).__new__(type(self))
    copied.data, copied._trace = backend_of(self.data).asarray(self.data, copy=True), None
    copied.watched = self.watched
    return memo.setdefault(id(self), copied)


def _refuse_pickle(self: Tensor, protocol: Any) -> Any:
    raise TypeError("tensors are not pickled, because unpickling runs code; tinytorch.save writes them safely")


Tensor.extend(
    __contains__=_contains,
    __index__=_index,
    __int__=lambda self: int(self.item()),
    __float__=lambda self: float(self.item()),
    __array__=_as_array,
    __dlpack__=lambda self, **options: self.data.__dlpack__(**options),
    __dlpack_device__=lambda self: self.data.__dlpack_device__(),
    __deepcopy__=_deepcopy,
    __reduce_ex__=_refuse_pickle,
)

# -- devices that work on their own ------------------------------------------------------------------------------------


def cuda_device_count() -> int:
    """How many CUDA devices can be used; 0 where CuPy, the driver or the devices are missing."""
    return count_cuda_devices()


def cuda_is_available() -> builtins.bool:
    """Whether `device="cuda"` can be used."""
    return count_cuda_devices() > 0


def cuda_synchronize(device: str = "cuda") -> None:
    """Wait until a device has done all that it was given."""
    get_backend(device).synchronize()


def memory_allocated(device: str = "cuda") -> int:
    """The bytes of a device's memory that arrays take."""
    return get_backend(device).pool().used


def memory_reserved(device: str = "cuda") -> int:
    """The bytes that CuPy holds: those of arrays, and what it keeps for arrays to come."""
    return get_backend(device).pool().reserved


def empty_cache(device: str = "cuda") -> None:
    """Give back what CuPy keeps for arrays to come, so that other programs can have it."""
    get_backend(device).release()


def mem_get_info(device: str = "cuda") -> tuple[int, int]:
    """(free, total): bytes of a device's memory, all programs on it counted."""
    memory = get_backend(device).memory()
    return memory.total - memory.used, memory.total


def get_device_name(device: str = "cuda") -> str:
    """What the device calls itself, such as "NVIDIA A100-SXM4-40GB"."""
    return get_backend(device).description()


class Event:
    """A point in what a device has to do: `record` puts it behind all that was asked for so far.

    Args:
        enable_timing: as in PyTorch; times can always be told.
    """

    def __init__(self, enable_timing: builtins.bool = False, device: str = "cuda") -> None:
        self.backend = get_backend(device)
        self.mark: Any = None

    def record(self, stream: Stream | None = None) -> None:
        if stream is None:
            self.mark = self.backend.mark()
        else:
            with stream:
                self.mark = self.backend.mark()

    def synchronize(self) -> None:
        """Wait until the device has come there."""
        if self.mark is not None:
            self.mark.synchronize()

    def query(self) -> builtins.bool:
        """Whether it has."""
        return self.mark is None or builtins.bool(self.mark.done)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from here to another event; waits for that."""
        if self.mark is None or end.mark is None:
            raise ValueError("elapsed_time: both events must have been recorded")
        return 1e3 * self.backend.seconds_between(self.mark, end.mark)


class Stream:
    """A queue of work for a device, done in its order, and beside that of other streams: `with stream: …`.

    What was made in one stream and is read in another has to be waited for: `wait_stream`, or `synchronize`.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.native = get_backend(device).stream()

    def __enter__(self) -> Stream:
        self.native.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.native.__exit__(*error)

    def synchronize(self) -> None:
        self.native.synchronize()

    def query(self) -> builtins.bool:
        """Whether all that it was given is done."""
        return builtins.bool(self.native.done)

    def wait_stream(self, other: Stream) -> None:
        """Have what is asked for from now on wait for what another stream has been given."""
        self.native.wait_event(other.native.record())

    def wait_event(self, event: Event) -> None:
        self.native.wait_event(event.mark)


def stream(stream: Stream) -> Stream:
    """`with cuda.stream(s):` is `with s:`."""
    return stream


def pin_memory(x: Any) -> Any:
    """A tensor in page-locked memory, out of which `x.to("cuda", non_blocking=True)` copies beside other work.

    Of a tuple, a list or a dict, its tensors; what is none stays as it is. RuntimeError where there is no CUDA.
    """
    if isinstance(x, Tensor):
        return Tensor(get_backend("cuda").pinned(x.numpy()))
    if isinstance(x, dict):
        return {key: pin_memory(part) for key, part in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(pin_memory, x))
    return type(x)(map(pin_memory, x)) if type(x) in (tuple, list) else x


def set_float32_matmul_precision(precision: str) -> None:
    """How CUDA devices multiply float32: "highest" (the default) as it is written; "high" or "medium" with factors of
    11 bits (TF32, from Ampere on), several times as fast. Convolutions are computed in float32 either way."""
    set_matmul_precision(precision)


def get_float32_matmul_precision() -> str:
    return matmul_precision()


# -- creation ----------------------------------------------------------------------------------------------------------


def from_numpy(array: Any) -> Tensor:
    """A tensor over a NumPy array's own memory: changing one changes the other."""
    if type(array) not in BY_TYPE:
        raise TypeError(f"from_numpy: expected a NumPy array, got {type(array).__name__}")
    return Tensor(array)


def as_tensor(data: Any, dtype: str | None = None, device: str | None = None) -> Tensor:
    """A tensor of `data` that copies only if it must."""
    if isinstance(data, Tensor):
        return to(data, dtype=dtype, device=device)
    place = device or (backend_of(data).device if type(data) in BY_TYPE else _default["device"])
    return Tensor(_to_array(data, dtype, place))


def from_dlpack(data: Any, device: str | None = None) -> Tensor:
    """A tensor over the memory of anything that speaks DLPack, such as PyTorch's tensors."""
    return Tensor(get_backend(device or _default["device"]).from_dlpack(data))


def empty(*size: Any, dtype: str | None = None, device: str | None = None, **attributes: Any) -> Tensor:
    """A tensor of whatever was in the memory before."""
    backend = get_backend(device or _default["device"])
    return _new(backend.empty(_size(size), dtype=backend.dtype(dtype or _default["dtype"])), attributes)


def arange(
    start: float, end: float | None = None, step: float = 1, dtype: str | None = None, device: str | None = None
) -> Tensor:
    """start, start + step, … below `end`; with one argument, 0, 1, … below it."""
    start, end = (0, start) if end is None else (start, end)
    if step == 0 or (end - start) * step < 0:
        raise ValueError(f"arange: cannot go from {start} to {end} by {step}")
    if dtype is None:
        dtype = int64 if builtins.all(isinstance(x, int) for x in (start, end, step)) else _default["dtype"]
    backend = get_backend(device or _default["device"])
    return Tensor(backend.arange(start, end, step, dtype=backend.dtype(dtype)))


def linspace(start: float, end: float, steps: int, dtype: str | None = None, device: str | None = None) -> Tensor:
    """`steps` values from start to end, both included, evenly spaced."""
    backend = get_backend(device or _default["device"])
    return Tensor(backend.linspace(start, end, steps, dtype=backend.dtype(dtype or _default["dtype"])))


def eye(n: int, m: int | None = None, dtype: str | None = None, device: str | None = None) -> Tensor:
    """An n x m matrix with ones on its diagonal."""
    backend = get_backend(device or _default["device"])
    return Tensor(backend.eye(n, m, dtype=backend.dtype(dtype or _default["dtype"])))


def full_like(x: Tensor, fill_value: float, dtype: str | None = None, device: str | None = None) -> Tensor:
    return full(x.shape, fill_value, dtype or x.dtype, device or x.device)


def zeros_like(x: Tensor, dtype: str | None = None, device: str | None = None) -> Tensor:
    return full_like(x, 0, dtype, device)


def ones_like(x: Tensor, dtype: str | None = None, device: str | None = None) -> Tensor:
    return full_like(x, 1, dtype, device)


def empty_like(x: Tensor, dtype: str | None = None, device: str | None = None) -> Tensor:
    return empty(x.shape, dtype=dtype or x.dtype, device=device or x.device)


def rand(*size: Any, dtype: str | None = None, device: str | None = None, **attributes: Any) -> Tensor:
    """Uniform on [0, 1), from the generator that `manual_seed` seeds."""
    backend = get_backend(device or _default["device"])
    return _new(backend.random(_size(size), dtype or _default["dtype"]), attributes)


def rand_like(x: Tensor) -> Tensor:
    return rand(x.shape, dtype=x.dtype, device=x.device)


def randn_like(x: Tensor) -> Tensor:
    return Tensor(backend_of(x.data).normal(x.shape, x.dtype))


def randint(low: int, high: int | Sequence[int], size: Any = None, device: str | None = None) -> Tensor:
    """Integers from low (0 if only `high` is given) to high - 1, int64: randint(10, (2, 3)), randint(5, 10, (2, 3))."""
    if size is None:
        low, high, size = 0, low, high
    if not isinstance(high, int) or low >= high:
        raise ValueError(f"randint: expected low < high, got low {low} and high {high}")
    return Tensor(get_backend(device or _default["device"]).integers(low, high, tuple(size)))


def randperm(n: int, device: str | None = None) -> Tensor:
    """0 … n - 1 in random order, int64."""
    return Tensor(get_backend(device or _default["device"]).permutation(n))


# -- elementwise -------------------------------------------------------------------------------------------------------

floor_divide, remainder = (
    _from_sign("floor_divide", "//", operator.floordiv),
    _from_sign("remainder", "%", operator.mod),
)
Tensor.extend(**_operators("floordiv", floor_divide), **_operators("mod", remainder))


@op(dtypes="common")
def minimum(xp, a, b):
    """The smaller of a and b, elementwise; nan where one is."""
    return xp.minimum(a, b)


@op(dtypes="float")
def log1p(xp, x):
    """log(1 + x), exact for small x."""
    return xp.log1p(x)


@op(dtypes="float")
def expm1(xp, x):
    """e to the power x, minus 1, exact for small x."""
    return xp.expm1(x)


@op(dtypes="float")
def rsqrt(xp, x):
    """1 / sqrt(x)."""
    return 1 / xp.sqrt(x)


@op(dtypes="float")
def sin(xp, x):
    """The sine of x in radians."""
    return xp.sin(x)


@op(dtypes="float")
def cos(xp, x):
    """The cosine of x in radians."""
    return xp.cos(x)


@op(dtypes="float")
def tanh(xp, x):
    """The hyperbolic tangent."""
    return xp.tanh(x)


@op(dtypes="float")
def erf(xp, x):
    """The error function, 2/sqrt(pi) times the integral of exp(-t²) from 0 to x."""
    return xp.erf(x)


@op
def sign(xp, x):
    """-1, 0 or 1, as x is below, at or above 0."""
    return xp.sign(x)


@op
def floor(xp, x):
    """The largest whole number that is not above x."""
    return xp.floor(x)


@op
def ceil(xp, x):
    """The smallest whole number that is not below x."""
    return xp.ceil(x)


@op
def round(xp, x):
    """The nearest whole number; of two equally near, the even one."""
    return xp.round(x)


@op
def isnan(xp, x):
    """Whether each element is not a number."""
    return xp.isnan(x)


@op
def isinf(xp, x):
    """Whether each element is infinite."""
    return xp.isinf(x)


@op
def isfinite(xp, x):
    """Whether each element is neither infinite nor nan."""
    return xp.isfinite(x)


@op
def clamp(xp, x, *, min=None, max=None):
    """x with values below `min` raised to it and values above `max` lowered to it."""
    if min is None and max is None:
        raise ValueError("clamp: expected min, max or both, got neither")
    if min is not None:
        x = xp.maximum(*xp.promote([x, min]))
    return x if max is None else xp.minimum(*xp.promote([x, max]))


def square(x: Tensor) -> Tensor:
    return mul(x, x)


def reciprocal(x: Tensor) -> Tensor:
    return div(1, x)


def logical_not(x: Tensor) -> Tensor:
    return x == 0


def logical_and(a: Tensor, b: Tensor) -> Tensor:
    return (a != 0) & (b != 0)


def logical_or(a: Tensor, b: Tensor) -> Tensor:
    return (a != 0) | (b != 0)


def masked_fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    """x with `value` wherever the boolean mask holds."""
    return where(mask, value, x)


# -- reductions --------------------------------------------------------------------------------------------------------


@op
def amin(xp, x, *, dim=None, keepdim=False):
    """The smallest element over `dim`."""
    return xp.min(x, axis=dim, keepdims=keepdim)


@op
def argmin(xp, x, *, dim=None, keepdim=False):
    """Where the smallest element stands along `dim`, the first of equals; of all axes: in the flattened tensor."""
    return xp.argmin(x, axis=dim, keepdims=keepdim)


@op
def any(xp, x, *, dim=None, keepdim=False):
    """Whether an element over `dim` is not zero."""
    return xp.any(x, axis=dim, keepdims=keepdim)


@op
def all(xp, x, *, dim=None, keepdim=False):
    """Whether no element over `dim` is zero."""
    return xp.all(x, axis=dim, keepdims=keepdim)


@op(dtypes="float")
def var(xp, x, *, dim=None, correction=1, keepdim=False):
    """The variance over `dim`: squared distances from the mean, summed and divided by (count - correction)."""
    return xp.var(x, axis=dim, correction=correction, keepdims=keepdim)


@op
def prod(xp, x, *, dim=None, keepdim=False):
    """The product over `dim`. Booleans and integers multiply to int64."""
    return xp.prod(x if xp.is_floating(x) else xp.cast(x, "int64"), axis=dim, keepdims=keepdim)


@op
def cumsum(xp, x, *, dim):
    """Sums of the elements so far along `dim`."""
    return xp.cumulative_sum(x if xp.is_floating(x) else xp.cast(x, "int64"), axis=dim)


@op(dtypes="float")
def logsumexp(xp, x, *, dim, keepdim=False):
    """log(sum(exp(x))) over `dim`, without overflow; -inf where all elements are."""
    top = xp.max(x, axis=dim, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    out = xp.log(xp.sum(xp.exp(x - top), axis=dim, keepdims=True)) + top
    axes = tuple(d % x.ndim for d in (dim if isinstance(dim, tuple) else (dim,)))
    return out if keepdim else xp.reshape(out, tuple(n for d, n in enumerate(out.shape) if d not in axes))


def std(x: Tensor, dim: Dim = None, correction: float = 1, keepdim: builtins.bool = False) -> Tensor:
    """The standard deviation over `dim`."""
    return var(x, dim=dim, correction=correction, keepdim=keepdim).sqrt()


def norm(x: Tensor, p: float = 2, dim: Dim = None, keepdim: builtins.bool = False) -> Tensor:
    """The p-norm over `dim`: (sum |x|^p)^(1/p); the largest |x| for p = inf, the number of non-zeros for p = 0."""
    if p == math.inf:
        return amax(abs(x), dim=dim, keepdim=keepdim)
    if p == -math.inf:
        return amin(abs(x), dim=dim, keepdim=keepdim)
    if p == 0:
        return sum((x != 0).to(x.dtype), dim=dim, keepdim=keepdim)
    if p == 2:
        return vector_norm(x, dim=dim, keepdim=keepdim)
    return sum(abs(x) ** p, dim=dim, keepdim=keepdim) ** (1 / p)


@op(dtypes="float")
def vector_norm(xp, x, *, dim=None, keepdim=False):
    """The Euclidean norm over `dim`."""
    return xp.sqrt(xp.sum(x * x, axis=dim, keepdims=keepdim))


class Extreme(NamedTuple):
    """What `max`, `min`, `sort` and `topk` along one axis return."""

    values: Tensor
    indices: Tensor


def max(x: Tensor, dim: Any = None, keepdim: builtins.bool = False) -> Any:
    """The largest element; with an axis, (values, indices) along it; with a tensor, the larger of both."""
    return _extreme(x, dim, keepdim, amax, argmax, maximum_op)


def min(x: Tensor, dim: Any = None, keepdim: builtins.bool = False) -> Any:
    """The smallest element; with an axis, (values, indices) along it; with a tensor, the smaller of both."""
    return _extreme(x, dim, keepdim, amin, argmin, minimum)


def _extreme(x: Tensor, dim: Any, keepdim: builtins.bool, value: Op, place: Op, binary: Op) -> Any:
    if isinstance(dim, Tensor):
        return binary(x, dim)
    if dim is None:
        return value(x)
    indices = place(x, dim=dim, keepdim=True)
    values = take_along_dim(x, indices, dim)
    return Extreme(values, indices) if keepdim else Extreme(squeeze(values, dim), squeeze(indices, dim))


# -- shape -------------------------------------------------------------------------------------------------------------


def squeeze(x: Tensor, dim: Dim = None) -> Tensor:
    """Without its axes of length 1: all of them, or those at `dim`."""
    chosen = range(x.ndim) if dim is None else [d % x.ndim for d in (dim if isinstance(dim, tuple) else (dim,))]
    return reshape(x, shape=tuple(n for d, n in enumerate(x.shape) if n != 1 or d not in chosen))


def flatten(x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """The axes from `start_dim` to `end_dim` made one."""
    if not x.ndim:
        return reshape(x, shape=(1,))
    if not (-x.ndim <= start_dim < x.ndim and -x.ndim <= end_dim < x.ndim):
        raise IndexError(f"flatten: axes {start_dim} to {end_dim} of a tensor of shape {x.shape}")
    start, end = start_dim % x.ndim, end_dim % x.ndim
    return reshape(x, shape=(*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]))


def unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """One axis made several."""
    dim %= x.ndim
    return reshape(x, shape=(*x.shape[:dim], *sizes, *x.shape[dim + 1 :]))


def movedim(x: Tensor, source: int, destination: int) -> Tensor:
    """One axis moved to another place, the others in their order."""
    dims = [d for d in range(x.ndim) if d != source % x.ndim]
    dims.insert(destination % x.ndim, source % x.ndim)
    return permute(x, dims=tuple(dims))


@op
def flip(xp, x, *, dims):
    """The elements in reverse order along each of `dims`."""
    flipped = xp.flip(x, axis=tuple(dims) if isinstance(dims, (tuple, list)) else dims)
    return xp.asarray(flipped, copy=True)  # NumPy's is a view, others' are not


@op
def roll(xp, x, *, shifts, dims=None):
    """The elements shifted along `dims`, the last ones re-entering at the front."""
    return xp.roll(x, shifts, axis=dims)


@op
def constant_pad(xp, x, *, pad, value=0.0):
    """Borders of `value`. `pad` is (left, right) of the last axis, then of the one before it, as PyTorch counts."""
    borders = [(0, 0)] * (x.ndim - len(pad) // 2) + [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    shape = tuple(n + before + after for n, (before, after) in zip(x.shape, borders, strict=True))
    out = xp.full(shape, DTYPE_KINDS[xp.dtype_name(x)](value), dtype=x.dtype)
    out[tuple(slice(before, before + n) for n, (before, _) in zip(x.shape, borders, strict=True))] = x
    return out


def pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = 0) -> Tensor:
    """Borders around a tensor.

    Args:
        pad: (left, right) of the last axis, then of the one before it, and so on. Negative lengths cut off.
        mode: what stands in the borders: "constant" (`value`), "reflect" (the axis mirrored at its outermost element),
            "replicate" (that element) or "circular" (what stands at the other end).
    """
    if mode not in ("constant", "reflect", "replicate", "circular"):
        raise ValueError(f"pad: mode must be constant, reflect, replicate or circular, got {mode!r}")
    if len(pad) % 2 or len(pad) > 2 * x.ndim:
        raise ValueError(f"pad: expected a pair for each of at most {x.ndim} axes, last first, got {tuple(pad)}")
    given, lengths = x, tuple(pad)
    for i in range(0, len(lengths), 2):
        dim = x.ndim - 1 - i // 2
        x = _bordered(x, dim, lengths[i], lengths[i + 1], mode)
    if mode == "constant":
        return constant_pad(x, pad=tuple(builtins.max(n, 0) for n in lengths), value=value or 0)
    return clone(x) if x is given else x  # never a view


def _bordered(x: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    """One axis with what `pad` puts before and after it; in mode "constant" only with what it cuts off."""
    n, first, last = x.shape[dim], builtins.max(before, 0), builtins.max(after, 0)
    rest = n + builtins.min(before, 0) + builtins.min(after, 0)
    most = {"reflect": builtins.max(n - 1, 0), "circular": rest, "replicate": first + last if n else 0}
    if rest < 0 or builtins.max(first, last) > most.get(mode, first + last):
        limit = "can only cut off what is there" if rest < 0 else f"has at most {most[mode]} elements for a border"
        raise ValueError(f"pad: mode {mode!r} {limit}; axis {dim} of {x.shape} is to get {(before, after)}")
    if not before and not after:
        return x
    middle = narrow(x, dim, builtins.max(-before, 0), rest)
    if mode == "constant":
        return middle
    if mode == "circular":
        head, tail = narrow(middle, dim, rest - first, first), narrow(middle, dim, 0, last)
    elif mode == "reflect":
        head, tail = flip(narrow(x, dim, 1, first), dims=dim), flip(narrow(x, dim, n - 1 - last, last), dims=dim)
    else:
        lead, behind = x.shape[:dim], x.shape[dim + 1 :]
        head = expand(narrow(x, dim, 0, 1), shape=(*lead, first, *behind))
        tail = expand(narrow(x, dim, n - 1, 1), shape=(*lead, last, *behind))
    return cat([head, middle, tail], dim)


def split(x: Tensor, split_size: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """Pieces along `dim`: each of `split_size` (the last may be shorter), or of the lengths given, as views."""
    length = x.shape[dim]
    if isinstance(split_size, int):
        if split_size < 1:
            raise ValueError(f"split: expected a split_size of at least 1, got {split_size}")
        sizes = [builtins.min(split_size, length - start) for start in range(0, length, split_size)] or [0]
    else:
        sizes = list(split_size)
    if builtins.sum(sizes) != length:
        raise ValueError(f"split: the lengths {sizes} add up to {builtins.sum(sizes)}, axis {dim} has {length}")
    stops = list(itertools.accumulate(sizes))
    return tuple(narrow(x, dim, stop - size, size) for stop, size in zip(stops, sizes, strict=True))


def narrow(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """`length` elements along `dim` from `start` on, as a view."""
    return getitem(x, index=(slice(None),) * (dim % x.ndim) + (slice(start, start + length),))


def is_basic(index: Any) -> bool:
    """Whether an index takes a rectangle, in which no place occurs twice."""
    parts = index if isinstance(index, tuple) else (index,)
    return builtins.all(isinstance(part, (int, slice, type(None), type(...))) for part in parts)


def side_by_side(parts: Sequence[tuple[Any, Any]], shape: tuple) -> tuple[list, int] | None:
    """Of (index, array) pairs: the arrays in their order, and the axis, if they are all slices along one axis that
    follow one another and take the whole of a shape, as `split`'s are; else None."""
    found, axes, end = dict[int, tuple[int, Any]](), set[int](), 0
    for index, array in parts:
        *others, last = (index if type(index) is tuple else (index,)) or (None,)
        if others == [...]:
            others = [slice(None)] * (len(shape) - 1)
        if type(last) is not slice or builtins.any(other != slice(None) for other in others):
            return None
        axes.add(axis := len(others))
        start, stop, step = last.indices(shape[axis])
        if step != 1 or start in found:
            return None
        found[start] = stop, array
    for start in sorted(found):
        if start != end:
            return None
        end = found[start][0]
    return ([found[start][1] for start in sorted(found)], axis) if len(axes) == 1 and end == shape[axis] else None


def together(arrays: Sequence[Any], axis: int) -> Any:
    """The arrays as one, along an axis; without a copy where they lie in memory like that already."""
    found = backend_of(arrays[0]).whole_of(arrays, axis)
    return concatenate(*arrays, dim=axis) if found is None else found


def chunk(x: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """At most `chunks` pieces of equal length along `dim` (the last may be shorter)."""
    if chunks < 1:
        raise ValueError(f"chunk: expected at least 1 chunk, got {chunks}")
    return split(x, builtins.max(1, -(-x.shape[dim] // chunks)), dim)


def unbind(x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """The slices along `dim`, which disappears."""
    return tuple(getitem(x, index=(slice(None),) * (dim % x.ndim) + (i,)) for i in range(x.shape[dim]))


def repeat(x: Tensor, *sizes: Any) -> Tensor:
    """The tensor laid side by side, sizes[i] times along axis i."""
    times = _size(sizes)
    if len(times) < x.ndim:
        raise ValueError(f"repeat: expected a count for each of {x.ndim} axes, got {times}")
    shape = (1,) * (len(times) - x.ndim) + x.shape
    if builtins.all(t == 1 for t in times):
        return clone(reshape(x, shape=shape))  # what follows would be a view
    spread = reshape(x, shape=tuple(n for length in shape for n in (1, length)))
    spread = expand(spread, shape=tuple(n for t, length in zip(times, shape, strict=True) for n in (t, length)))
    return reshape(spread, shape=tuple(t * length for t, length in zip(times, shape, strict=True)))


def repeat_interleave(x: Tensor, repeats: int, dim: int) -> Tensor:
    """Each element along `dim`, `repeats` times in a row."""
    dim %= x.ndim
    spread = unsqueeze(x, dim + 1)
    spread = expand(spread, shape=(*x.shape[: dim + 1], repeats, *x.shape[dim + 1 :]))
    return flatten(spread, dim, dim + 1)


def tril(x: Tensor, diagonal: int = 0) -> Tensor:
    """The lower triangle of each matrix, up to the given diagonal; zero above it."""
    return where(_rows_minus_columns(x) >= -diagonal, x, 0)


def triu(x: Tensor, diagonal: int = 0) -> Tensor:
    """The upper triangle of each matrix, from the given diagonal on; zero below it."""
    return where(_rows_minus_columns(x) <= -diagonal, x, 0)


def _rows_minus_columns(x: Tensor) -> Tensor:
    rows, columns = x.shape[-2:]
    return unsqueeze(arange(rows, device=x.device), 1) - arange(columns, device=x.device)


def meshgrid(*tensors: Tensor, indexing: str = "ij") -> tuple[Tensor, ...]:
    """Coordinates of a grid over vectors: element (i, j, …) of the k-th result is the k-th vector's."""
    if indexing not in ("ij", "xy"):
        raise ValueError(f"meshgrid: expected indexing 'ij' or 'xy', got {indexing!r}")
    if indexing == "xy" and len(tensors) > 1:
        second, first, *others = meshgrid(tensors[1], tensors[0], *tensors[2:])
        return first, second, *others
    shape, rank = tuple(x.numel() for x in tensors), len(tensors)
    lined_up = (reshape(x, shape=tuple(-1 if d == k else 1 for d in range(rank))) for k, x in enumerate(tensors))
    return tuple(expand(x, shape=shape) for x in lined_up)


def broadcast_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors expanded to their common shape."""
    shape = broadcast_shapes(*(x.shape for x in tensors))
    return tuple(expand(x, shape=shape) for x in tensors)


def broadcast_shapes(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that tensors of these shapes broadcast to."""
    rank = builtins.max((len(shape) for shape in shapes), default=0)
    result = []
    for lengths in zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True):
        wanted = {n for n in lengths if n != 1}
        if len(wanted) > 1:
            raise ValueError(f"shapes {', '.join(map(str, shapes))} do not broadcast")
        result.append(wanted.pop() if wanted else 1)
    return tuple(result)


def one_hot(x: Tensor, num_classes: int = -1) -> Tensor:
    """A row of zeros with a one at x, for each element of x (int64): (…) -> (…, num_classes)."""
    if x.dtype.is_floating_point:
        raise TypeError(f"one_hot: expected integers, got {x.dtype}")
    most = int(amax(x).item()) if x.numel() else -1
    count = most + 1 if num_classes == -1 else num_classes
    if most >= count or (x.numel() and amin(x).item() < 0):
        raise ValueError(f"one_hot: expected classes 0 … {count - 1}, got {amin(x).item()} … {most}")
    return (unsqueeze(x, -1) == arange(count, device=x.device)).to(int64)


# -- selection and sorting ---------------------------------------------------------------------------------------------


@op
def take_along_dim(xp, x, indices, *, dim):
    """out[i][j] = x[indices[i][j]][j] for dim 0, and so on: one element for each index, along one axis."""
    return xp.take_along_axis(x, indices, axis=dim)


@op
def scatter_add(xp, x, indices, values, *, dim):
    """A copy of x to which values[i][j] is added at [indices[i][j]][j] for dim 0, and so on: repeated places add up."""
    where_to = list(xp.meshgrid(*(xp.arange(n) for n in indices.shape), indexing="ij"))
    where_to[dim] = indices
    return xp.scatter_add(xp.asarray(x, copy=True), tuple(where_to), values)


@op
def index_add(xp, x, values, *, index):
    """A copy of x with x[index] += values, where a place that the index names twice gets both."""
    return xp.scatter_add(xp.asarray(x, copy=True), index, values)


def gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """One element along `dim` for each index; `index` may be shorter than x along the other axes."""
    if index.ndim != x.ndim:
        raise ValueError(f"gather: the index has shape {index.shape}, the tensor {x.shape}: axes must match")
    for d, (have, want) in enumerate(zip(x.shape, index.shape, strict=True)):
        if d != dim % x.ndim and want < have:
            x = narrow(x, d, 0, want)
    return take_along_dim(x, index, dim)


def index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """The slices of x at the given places along `dim`."""
    return getitem(x, index=(slice(None),) * (dim % x.ndim) + (index.data,))


def masked_select(x: Tensor, mask: Tensor) -> Tensor:
    """The elements at which the mask holds, in one row."""
    x, mask = broadcast_tensors(x, mask)
    return getitem(x, index=mask.data)


@op
def nonzero(xp, x):
    """Where the elements that are not zero stand: (count, axes), int64."""
    return xp.stack(xp.nonzero(x), axis=1)


@op
def argsort(xp, x, *, dim=-1, descending=False, stable=True):
    """The order that sorts x along `dim`; equal elements keep theirs."""
    return xp.argsort(x, axis=dim, descending=descending, stable=stable)


def sort(x: Tensor, dim: int = -1, descending: builtins.bool = False, stable: builtins.bool = True) -> Extreme:
    """(values, indices): x sorted along `dim`, and where each value stood."""
    indices = argsort(x, dim=dim, descending=descending, stable=stable)
    return Extreme(take_along_dim(x, indices, dim), indices)


def topk(x: Tensor, k: int, dim: int = -1, largest: builtins.bool = True) -> Extreme:
    """(values, indices) of the k largest, or smallest, elements along `dim`, best first."""
    if not 0 <= k <= x.shape[dim]:
        raise ValueError(f"topk: expected k between 0 and {x.shape[dim]}, the length of axis {dim}, got {k}")
    indices = narrow(argsort(x, dim=dim, descending=largest), dim, 0, k)
    return Extreme(take_along_dim(x, indices, dim), indices)


def multinomial(weights: Tensor, num_samples: int, replacement: builtins.bool = False) -> Tensor:
    """Places drawn with probability proportional to the weights in each row: (…, n) -> (…, num_samples), int64.

    Without replacement it uses the exponential race: the `num_samples` smallest of Exp(weight) variables.
    """
    positive = (weights > 0).sum(-1)
    if not all((weights >= 0) & isfinite(weights)) or not all(positive > 0):
        raise ValueError("multinomial: expected weights that are finite, not negative and not all zero")
    if replacement:
        bounds = cumsum(weights, dim=-1)
        drawn = rand(*weights.shape[:-1], num_samples, dtype=weights.dtype, device=weights.device)
        drawn = drawn * bounds[..., -1:]
        return sum(unsqueeze(drawn, -1) >= unsqueeze(bounds, -2), dim=-1)
    if num_samples > positive.amin().item():
        raise ValueError(f"multinomial: cannot draw {num_samples} of {positive.amin().item()} without replacement")
    race = -log1p(-rand_like(weights)) / weights
    return topk(race, num_samples, largest=False).indices


def bernoulli(probabilities: Tensor) -> Tensor:
    """1 with the given probability and 0 otherwise, elementwise, in the dtype of the probabilities."""
    if not all((probabilities >= 0) & (probabilities <= 1)):
        raise ValueError("bernoulli: expected probabilities between 0 and 1")
    return cast(rand_like(probabilities) < probabilities, dtype=probabilities.dtype)


# -- linear algebra ----------------------------------------------------------------------------------------------------


@op(dtypes="common")
def einsum_op(xp, *operands, equation):
    """Einstein's summation with an explicit result: "ij,jk->ik"."""
    return xp.einsum(equation, *operands)


def einsum(equation: str, *operands: Any) -> Tensor:
    """Einstein's summation: products over all letters, summed over those that the result lacks.

    Args:
        equation: "bij,bjk->bik"; without "->", the result has the letters that occur once, in alphabetical order.
            "..." stands for any axes, which broadcast.
    """
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    return einsum_op(*operands, equation=explicit_equation(equation, [len(x.shape) for x in operands]))


def explicit_equation(equation: str, ranks: Sequence[int]) -> str:
    """The equation with its result written out and letters for "..."; ValueError where it makes no sense."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    parts = terms.split(",")
    if len(parts) != len(ranks):
        raise ValueError(f"einsum: {equation!r} takes {len(parts)} operands, got {len(ranks)}")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    hidden = [rank - len(part.replace("...", "")) for part, rank in zip(parts, ranks, strict=True)]
    for part, rank, n in zip(parts, ranks, hidden, strict=True):
        if n < 0 or (n and "..." not in part):
            raise ValueError(f"einsum: {part!r} in {equation!r} names {rank - n} axes, the operand has {rank}")
    batch = "".join(free[: builtins.max(hidden)])
    parts = [part.replace("...", batch[len(batch) - n :]) for part, n in zip(parts, hidden, strict=True)]
    letters = "".join(parts)
    if not arrow:
        result = ("..." if "..." in terms else "") + "".join(
            c for c in sorted(set(letters) - set(batch)) if letters.count(c) == 1
        )
    result = result.replace("...", batch)
    unknown = set(result) - set(letters)
    if unknown or not letters.isalpha() or len(set(result)) != len(result):
        raise ValueError(f"einsum: the result {result!r} of {equation!r} must use each letter once, of its operands'")
    return f"{','.join(parts)}->{result}"


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a[i] b[j] of two vectors."""
    return mul(unsqueeze(a, 1), b)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a[i] b[i] of two vectors."""
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"dot: expected two vectors of one length, got {a.shape} and {b.shape}")
    return a @ b


def allclose(
    a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: builtins.bool = False
) -> builtins.bool:
    """Whether |a - b| <= atol + rtol |b| everywhere."""
    near = (abs(a - b) <= atol + rtol * abs(b)) | (a == b)
    return builtins.bool(all(near | (isnan(a) & isnan(b)) if equal_nan else near))


def equal(a: Tensor, b: Tensor) -> builtins.bool:
    """Whether shapes and all values are equal."""
    return a.shape == b.shape and builtins.bool(all(a == b))


# -- methods -----------------------------------------------------------------------------------------------------------

clamp_ = in_place(clamp)
exp_, sqrt_, neg_, pow_ = in_place(exp), in_place(sqrt), in_place(neg), in_place(pow)


def masked_fill_(self: Tensor, mask: Tensor, value: float) -> Tensor:
    """In place: `value` wherever the boolean mask holds."""
    set_item(self, mask, value)
    return self


def uniform_(self: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """In place: uniform on [low, high)."""
    return self.copy_(rand_like(self) * (high - low) + low)


def normal_(self: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """In place: normal with this mean and standard deviation."""
    return self.copy_(randn_like(self) * std + mean)


def expand_as(self: Tensor, other: Tensor) -> Tensor:
    return expand(self, shape=other.shape)


def _as_dtype(dtype: DType) -> Callable:
    return lambda self: to(self, dtype)


def contiguous(self: Tensor) -> Tensor:
    """The tensor with its elements in order in memory: itself if they are, else a copy."""
    flags = getattr(self.data, "flags", None)
    return self if flags is None or flags["C_CONTIGUOUS"] else clone(self)


Tensor.extend(
    # in place
    __setitem__=set_item, __iadd__=add_, __isub__=sub_, __imul__=mul_, __itruediv__=div_,
    add_=add_, sub_=sub_, mul_=mul_, div_=div_, copy_=copy_, fill_=copy_, clamp_=clamp_, exp_=exp_, sqrt_=sqrt_,
    neg_=neg_, pow_=pow_, masked_fill_=masked_fill_, uniform_=uniform_, normal_=normal_,
    zero_=lambda self: self.copy_(0),
    # elementwise
    minimum=minimum, log1p=log1p, expm1=expm1, rsqrt=rsqrt, sin=sin, cos=cos, tanh=tanh, erf=erf, sign=sign,
    floor=floor, ceil=ceil, round=round, isnan=isnan, isinf=isinf, isfinite=isfinite, clamp=clamp, square=square,
    reciprocal=reciprocal, logical_not=logical_not, logical_and=logical_and, logical_or=logical_or,
    masked_fill=masked_fill,
    # reductions
    amin=amin, argmin=argmin, any=any, all=all, var=var, std=std, prod=prod, cumsum=cumsum, logsumexp=logsumexp,
    norm=norm, max=max, min=min,
    # shape
    squeeze=squeeze, flatten=flatten, unflatten=unflatten, movedim=movedim, flip=flip, roll=roll, split=split,
    narrow=narrow, chunk=chunk, unbind=unbind, repeat=repeat, repeat_interleave=repeat_interleave, tril=tril,
    triu=triu, expand_as=expand_as, contiguous=contiguous,
    broadcast_to=lambda self, shape: expand(self, shape=shape),
    size=lambda self, dim=None: self.shape if dim is None else self.shape[dim], dim=lambda self: self.ndim,
    # selection, sorting, drawing
    gather=gather, take_along_dim=take_along_dim, scatter_add=lambda self, dim, index, source: scatter_add(
        self, index, source, dim=dim), index_select=index_select, masked_select=masked_select, nonzero=nonzero,
    argsort=argsort, sort=sort, topk=topk, multinomial=multinomial, bernoulli=bernoulli,
    # linear algebra
    mm=matmul, bmm=matmul, mv=matmul, outer=outer, dot=dot, allclose=allclose, equal=equal,
    t=lambda self: permute(self, dims=tuple(range(self.ndim))[::-1]),
    # dtypes and devices
    float=_as_dtype(float32), double=_as_dtype(DTYPES["float64"]), half=_as_dtype(DTYPES["float16"]),
    long=_as_dtype(int64), int=_as_dtype(DTYPES["int32"]), bool=_as_dtype(DTYPES["bool"]),
    cpu=lambda self: to(self, device="cpu"), pin_memory=pin_memory,
    cuda=lambda self, index=0, non_blocking=False: to(self, device=f"cuda:{index}", non_blocking=non_blocking),
    type=lambda self, dtype: to(self, dtype), type_as=lambda self, other: to(self, other.dtype),
    is_floating_point=lambda self: self.dtype.is_floating_point, element_size=lambda self: self.dtype.itemsize,
    nbytes=property(lambda self: self.numel() * self.dtype.itemsize),
)  # fmt: skip
