"""Module 02: tensors, and the one door that every operation on them goes through.

Learning objectives. After this module you can
1. say what a tensor is beyond its numbers: shape, dtype, device, and the memory that it lies in;
2. write an operation once that runs on NumPy, on CuPy and on any other array library of the standard;
3. predict the shape and the dtype of a result: broadcasting, promotion, reduction;
4. tell a view from a copy;
5. measure what an operation costs, and tell overhead from arithmetic and from memory traffic.
"""

from __future__ import annotations

import builtins
import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import Parameter as Argument
from inspect import signature
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

from tinytorch.backends import BY_TYPE, DTYPE_KINDS, SURE, Backend, backend_of, get_backend
from tinytorch.m01_setup import assert_close, message_of, print_table, run_module, seconds

# %% [markdown]
# ## Mathematical foundations
#
# A tensor $x$ of shape $(n_1, …, n_k)$ is a table of numbers $x_{i_1 … i_k}$, $0 \le i_j < n_j$. In memory it is one
# row of numbers and a *stride* $s_j$ for each axis: element $i$ lies at $\sum_j i_j s_j$. Reshaping, transposing and
# slicing change shape and strides only, so they cost nothing: the result is a *view* of the same memory.
#
# **Elementwise**: $(x + y)_i = x_i + y_i$. Where shapes differ they are *broadcast*: aligned at their last axis, an
# axis of length 1 is repeated to the other's length.
#
# **Reduction**: $\mathrm{sum}(x, j)$ adds over axis $j$, which disappears (or stays with length 1: `keepdim`).
#
# **Contraction**: $(A B)_{ik} = \sum_j A_{ij} B_{jk}$, for each pair of matrices in the leading axes. An
# $n{\times}k$ by $k{\times}m$ product takes $2nkm$ operations on $nk + km + nm$ numbers: the only operation here whose
# arithmetic outgrows its memory traffic.

# %% [markdown]
# ## Implementation
#
# ### Dtypes and devices
# A dtype is a name, the same on every array library. Python numbers become `float32`, `int64` and `bool`: half of
# NumPy's width for floats, because a network gains nothing from the other half and pays for it in memory traffic.


# %%
class DType(str):
    """The name of a dtype: `tinytorch.float32`. It compares equal to the string, and NumPy takes it as a dtype."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"tinytorch.{self}"

    @property
    def is_floating_point(self) -> bool:
        return DTYPE_KINDS[str(self)] is float

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 1 if self == "bool" else int(self.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8


DTYPES = {name: DType(name) for name in DTYPE_KINDS}
uint8, int8, int16, int32, int64 = (DTYPES[name] for name in ("uint8", "int8", "int16", "int32", "int64"))
float16, bfloat16, float32, float64 = (DTYPES[name] for name in ("float16", "bfloat16", "float32", "float64"))
bool_ = DTYPES["bool"]


class Device(str):
    """Where a tensor lies: "cpu", "cuda:1", or the name of an array library. `type` and `index` are PyTorch's."""

    __slots__ = ()

    @property
    def type(self) -> str:
        return self.partition(":")[0]

    @property
    def index(self) -> int | None:  # type: ignore[override]
        number = self.partition(":")[2]
        return int(number) if number else None


_default: dict[str, Any] = {"device": Device(os.environ.get("TINYTORCH_DEVICE", "cpu")), "dtype": float32}


def test_dtype_is_a_name_with_facts() -> None:
    assert float32 == "float32"
    assert (float32.itemsize, bool_.itemsize) == (4, 1)
    assert (float32.is_floating_point, int64.is_floating_point) == (True, False)
    assert repr(float64) == "tinytorch.float64"


# %% [markdown]
# ### The door
# An `Op` is a pure function of arrays with a name. Every operation of the framework is one, and every tensor passes
# through `Op.__call__`: unwrap, find the backend, compute, wrap. That is the whole of it. Three things may be attached
# from outside, and cost one truth test each while nothing is: a *recorder*, which is told of operations on tensors
# that are watched; *observers*, which stand around each call; *implementations*, faster functions for some backend.


# %%
class Op:
    """A named, pure function of arrays; called with tensors, it returns tensors.

    The function's first argument is the backend of its inputs. Its positional arguments are arrays or Python numbers,
    its keyword-only arguments are static attributes; when it is called, excess positional arguments are taken as
    attributes in their order, so that `softmax(x, -1)` is `softmax(x, dim=-1)`. A function may return a tuple: the
    first is the result, the others are by-products such as indices.
    """

    registry: ClassVar[dict[str, Op]] = {}
    recorder: ClassVar[Any] = None

    def __init__(self, function: Callable, dtypes: str | None = None) -> None:
        parameters = list(signature(function).parameters.values())[1:]
        self.function, self.name, self.__name__ = function, function.__name__, function.__name__
        self.__doc__, self.__module__, self.__wrapped__ = function.__doc__, function.__module__, function
        self.variadic = any(p.kind is Argument.VAR_POSITIONAL for p in parameters)
        self.inputs = tuple(p.name for p in parameters if p.kind is not Argument.KEYWORD_ONLY)
        self.attributes = {p.name: p.default for p in parameters if p.kind is Argument.KEYWORD_ONLY}
        self.most_inputs = math.inf if self.variadic else len(self.inputs)
        self.promotes, self.floating = dtypes is not None, dtypes == "float"
        self.implementations: dict[str, list[tuple[Callable, Callable]]] = {}
        known = self.registry.setdefault(self.name, self)
        if known.__module__ != self.__module__:
            raise ValueError(f"there is an operation {self.name!r} already, in {known.__module__}")
        self.registry[self.name] = self  # a notebook's cell may be run again

    def __call__(self, *inputs: Any, **attributes: Any) -> Any:
        if len(inputs) > self.most_inputs:
            inputs, attributes = self._name_attributes(inputs, attributes)
        arrays, backend, kind, dtype, is_tensor, watched = [], None, None, None, False, False
        for x in inputs:
            if isinstance(x, Tensor):
                is_tensor = True
                if x._trace is not None:
                    watched = True
                x = x.data
            arrays.append(x)
            this = type(x)
            if this is not kind:
                found = SURE.get(this)
                if found is None and this in NUMBERS:
                    continue
                if found is None or found is not backend:
                    backend = found if backend is None and found is not None else self._backend(x, backend)
                kind, dtype = found and this, x.dtype if dtype is None else dtype
            if x.dtype is not dtype:
                dtype = SEVERAL
        if backend is None:
            backend = get_backend(_default["device"])
        try:
            if self.promotes and dtype is not backend.usual_float:
                arrays = backend.promote(arrays, self.floating)
            if OBSERVERS:
                out = self._observed(backend, arrays, attributes)
            elif self.implementations:
                out = self._implemented(backend, arrays, attributes)
            elif len(arrays) == 2 and not attributes:  # spelled out, the commonest call takes 0.1 µs less
                out = self.function(backend, arrays[0], arrays[1])
            else:
                out = self.function(backend, *arrays, **attributes)
        except (ValueError, TypeError, IndexError, RuntimeError, OverflowError) as error:
            raise self._error(error, arrays) from error
        if not is_tensor:
            return out
        if type(out) is backend.array_type:
            result = new(Tensor)
            result.data, result._trace = out, None
        else:
            result = _wrap_other(out, backend)
        if watched and Op.recorder is not None:
            Op.recorder.record(self, inputs, arrays, attributes, result)
        return result

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """An Op in a class is a method: `x.exp()` is `exp(x)`."""
        return self if instance is None else MethodType(self, instance)

    def __deepcopy__(self, memo: dict) -> Op:
        return self  # a copied network calls the same operation, the one that has rules

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def implement(self, backend: str, function: Callable, when: Callable[..., bool]) -> None:
        """Use another function on a backend where `when(*arrays, **attributes)` holds; the newest one goes first."""
        self.implementations.setdefault(backend, []).insert(0, (when, function))

    def _implemented(self, backend: Backend, arrays: list, attributes: dict) -> Any:
        for when, faster in () if REFERENCE_ONLY else self.implementations.get(backend.name, ()):
            if when(*arrays, **attributes):
                return faster(backend, *arrays, **attributes)
        return self.function(backend, *arrays, **attributes)

    def _observed(self, backend: Backend, arrays: list, attributes: dict) -> Any:
        proceed = partial(self._implemented, backend, arrays, attributes)
        for observer in OBSERVERS:
            proceed = partial(observer, self, arrays, attributes, proceed)
        return proceed()

    def _name_attributes(self, inputs: tuple, attributes: dict) -> tuple[tuple, dict]:
        count, names = len(self.inputs), list(self.attributes)
        named = dict(zip(names, inputs[count:], strict=False))
        if len(inputs) > count + len(names) or named.keys() & attributes.keys():
            given = ", ".join(["…"] * len(inputs) + [f"{name}=…" for name in attributes])
            raise TypeError(f"{self.name}: takes ({', '.join([*self.inputs, *names])}), was given ({given})")
        return inputs[:count], {**named, **attributes}

    def _backend(self, x: Any, others: Backend | None) -> Backend:
        """The backend of an input; an error if it is not that of the other inputs, or if the input is no array."""
        found = SURE.get(type(x))
        if found is None:
            try:
                found = backend_of(x)
            except TypeError:
                raise TypeError(
                    f"{self.name}: expected tensors or numbers, got {type(x).__name__} {str(x)[:60]}; "
                    "tensor(…) makes one"
                ) from None
        if others is not None and found is not others:
            raise TypeError(
                f"{self.name}: one input is on {others.device} ({others.name}), another on {found.device} "
                f"({found.name}); bring them together with .to({others.device!r})"
            )
        return found

    def _error(self, error: Exception, arrays: list) -> Exception:
        """The array library's complaint, with the operation's name and its inputs' dtypes and shapes."""
        if str(error).startswith((f"{self.name}:", "exercise ")):  # what is not written yet says so itself
            return error
        given = ", ".join(f"{x.dtype} {tuple(x.shape)}" if hasattr(x, "shape") else repr(x) for x in arrays)
        kind = next((k for k in (IndexError, TypeError) if isinstance(error, k)), ValueError)
        return kind(f"{self.name}: {error} (inputs: {given})")


def op(function: Callable | None = None, *, dtypes: str | None = None) -> Any:
    """Make a function of arrays an `Op`.

    Args:
        dtypes: "common" brings the inputs to one dtype first; "float" does, and makes integers the default float.
    """
    if function is None:
        return lambda f: Op(f, dtypes)
    return Op(function, dtypes)


# %% [markdown]
# What the door needs besides: which types are plain numbers, how a result that is no plain array is wrapped, and the
# functions by which a later module attaches itself.

# %%
OBSERVERS: list[Callable] = []
REFERENCE_ONLY: list[object] = []  # while anything is in it, operations run their own functions
SEVERAL = object()  # in the place of a dtype, where the inputs do not have one and the same
new = object.__new__  # skips __init__, which would look at what it is given
NUMBERS = frozenset((bool, int, float, type(None)))  # None: an input that is left out


def _wrap_other(out: Any, backend: Backend) -> Any:
    """Wrap what is not simply the backend's array: a tuple, NumPy's scalar, another backend's array."""
    if isinstance(out, tuple):
        return tuple(_wrap_other(part, backend) for part in out)
    known = BY_TYPE.get(type(out))
    return Tensor(out if known is not None and type(out) is known.array_type else backend.asarray(out))


@contextmanager
def observe(observer: Callable[[Op, list, dict, Callable], Any]) -> Iterator[None]:
    """Have `observer(op, arrays, attributes, proceed)` around calls: it may replace arrays, and returns `proceed()`."""
    OBSERVERS.append(observer)
    try:
        yield
    finally:
        OBSERVERS.remove(observer)


def attach_recorder(recorder: Any) -> None:
    """Have a recorder told of operations on watched tensors. There is one at the most."""
    if Op.recorder is not None:
        raise RuntimeError(f"a recorder is attached already: {Op.recorder!r}")
    Op.recorder = recorder


# %% [markdown]
# ### The tensor
# A tensor holds an array and one slot that belongs to the recorder. Its operators only call Ops, which are defined
# below it. Everything else is attached with `Tensor.extend`, here and in later modules: it adds, and never replaces.

# %%
WATCHED = object()  # what the recorder's slot holds before a recorder has seen the tensor


class Tensor:
    """An array with operations, on any array library that array-api-compat knows.

    Args:
        data: an array, which is wrapped without a copy; or a number or nested lists, which become an array on the
            default device.

    Attributes:
        data: the array.
        watched: whether operations on this tensor are reported to a recorder, if one is attached.
    """

    __slots__ = ("__weakref__", "_trace", "data")
    __array_priority__ = 1000  # array * tensor is ours, not NumPy's
    if TYPE_CHECKING:  # what `extend` adds, for type checkers
        data: Any
        _trace: Any

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...
        def _binary(self, other: Any) -> Tensor: ...
        def _unary(self) -> Tensor: ...
        def __setitem__(self, index: Any, value: Any) -> None: ...

        __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = __matmul__ = _binary
        __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rpow__ = __rmatmul__ = __lt__ = __le__ = __gt__ = _binary
        __ge__ = __and__ = __or__ = __xor__ = __iadd__ = __isub__ = __imul__ = __itruediv__ = _binary
        __neg__ = __abs__ = __invert__ = _unary

    def __init__(self, data: Any) -> None:
        known = BY_TYPE.get(type(data))
        is_array = known is not None and type(data) is known.array_type
        self.data = data if is_array else _to_array(data, None, _default["device"])
        self._trace = None

    @classmethod
    def extend(cls, **attributes: Any) -> None:
        """Give all tensors new attributes. Refuses to replace one that exists."""
        for name, value in attributes.items():
            if name in cls.__dict__:
                raise AttributeError(f"Tensor.{name} exists already, and extend never replaces")
            setattr(cls, name, value)

    @property
    def watched(self) -> bool:
        return self._trace is not None

    @watched.setter
    def watched(self, value: bool) -> None:
        if value != (self._trace is not None):
            self._trace = WATCHED if value else None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def dtype(self) -> DType:
        return DTYPES[backend_of(self.data).dtype_name(self.data)]

    @property
    def device(self) -> Device:
        return Device(backend_of(self.data).device)

    @property
    def mT(self) -> Tensor:
        """Each matrix in the last two axes, transposed."""
        return transpose(self, -2, -1)

    @property
    def T(self) -> Tensor:
        """All axes reversed."""
        return permute(self, dims=tuple(range(self.ndim))[::-1])

    def numel(self) -> int:
        return math.prod(self.data.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return getitem(self, index=_raw_index(index))

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return eq(self, other)

    def __ne__(self, other: object) -> Tensor:  # type: ignore[override]
        return ne(self, other)

    __hash__ = object.__hash__

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len() of a tensor without axes")
        return self.data.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def item(self) -> bool | int | float:
        """The only element, as a Python number."""
        if self.numel() != 1:
            raise ValueError(f"item: expected one element, the tensor has shape {self.shape}")
        return self.numpy().item()

    def __bool__(self) -> bool:
        if self.numel() != 1:
            raise ValueError(f"the truth of a tensor of shape {self.shape} is ambiguous; use .any() or .all()")
        return builtins.bool(self.item())

    def numpy(self) -> Any:
        """A NumPy array with these values; on the CPU it shares the tensor's memory."""
        return backend_of(self.data).to_numpy(self.data)

    def tolist(self) -> Any:
        """Nested lists of Python numbers, or one number."""
        return self.numpy().tolist()

    def __repr__(self) -> str:
        backend = backend_of(self.data)
        notes = [] if self.dtype in (_default["dtype"], int64, bool_) else [f"dtype={self.dtype!r}"]
        notes += [] if backend.device == "cpu" else [f"device={backend.device!r}"]
        notes += self.recorder_notes()
        return f"tensor({', '.join([backend.format(self.data, prefix='tensor('), *notes])})"

    def recorder_notes(self) -> list[str]:
        """What the recorder has to say of this tensor in its `repr`."""
        return Op.recorder.describe(self) if Op.recorder is not None and self._trace is not None else []


# %% [markdown]
# ### Creation
# `tensor` copies; `Tensor(array)` and `from_numpy` wrap. Keywords that this module does not know are attributes that a
# later one gave to tensors: they are set on the new tensor.


# %%
def _to_array(data: Any, dtype: str | None, device: str) -> Any:
    backend = get_backend(device)
    if isinstance(data, Tensor):
        data = data.numpy()
    if isinstance(data, (list, tuple)) and data and isinstance(data[0], Tensor):
        data = [x.tolist() for x in data]
    if type(data) in BY_TYPE and backend_of(data) is backend:
        array = backend.asarray(data)
    elif type(data) in BY_TYPE or hasattr(data, "__array__"):
        array = backend.from_numpy(BY_TYPE[type(data)].to_numpy(data) if type(data) in BY_TYPE else data.__array__())
    else:
        array = _from_python(data, dtype, backend)
    return array if dtype is None else backend.cast(array, dtype)


def _from_python(data: Any, dtype: str | None, backend: Backend) -> Any:
    host = get_backend("cpu")
    try:
        array = host.asarray(data)
        host.dtype_name(array)  # KeyError: text, objects
    except (ValueError, TypeError, KeyError) as error:
        reason = "numbers in lists of equal length" if isinstance(data, (list, tuple)) else "a number or nested lists"
        raise TypeError(f"tensor: expected {reason}, got {str(data)[:60]!r} ({error})") from None
    if host.is_floating(array):  # Python's floats have 64 bits; a wanted dtype gets them unrounded
        array = host.cast(array, dtype or _default["dtype"])
    return backend.from_numpy(array)


def _new(array: Any, attributes: dict) -> Tensor:
    result = Tensor(array)
    for name, value in attributes.items():
        if not isinstance(getattr(Tensor, name, None), property):
            raise TypeError(f"a tensor has no attribute {name!r} that can be set when it is created")
        setattr(result, name, value)
    return result


def tensor(data: Any, dtype: str | None = None, device: str | None = None, **attributes: Any) -> Tensor:
    """A new tensor with a copy of `data`: a number, nested lists, an array or a tensor.

    Floats become the default dtype (float32), integers int64, booleans bool; arrays and tensors keep their dtype.
    """
    if isinstance(data, Tensor) and device is None:
        device = data.device
    backend = get_backend(device or _default["device"])
    return _new(backend.asarray(_to_array(data, dtype, backend.device), copy=True), attributes)


def _size(size: tuple) -> tuple[int, ...]:
    """zeros(2, 3), zeros((2, 3)) and zeros([2, 3]) mean the same."""
    return tuple(size[0]) if len(size) == 1 and isinstance(size[0], (tuple, list)) else size


def full(
    size: Sequence[int], fill_value: float, dtype: str | None = None, device: str | None = None, **attributes: Any
) -> Tensor:
    """A tensor of one value. The dtype follows the value: float32 of a float, int64 of an int, bool of a bool."""
    backend = get_backend(device or _default["device"])
    if dtype is None:
        dtype = {builtins.bool: bool_, int: int64}.get(type(fill_value), _default["dtype"])
    return _new(backend.full(tuple(size), fill_value, dtype=backend.dtype(dtype)), attributes)


def zeros(*size: Any, dtype: str | None = None, device: str | None = None, **attributes: Any) -> Tensor:
    return full(_size(size), 0, dtype or _default["dtype"], device, **attributes)


def ones(*size: Any, dtype: str | None = None, device: str | None = None, **attributes: Any) -> Tensor:
    return full(_size(size), 1, dtype or _default["dtype"], device, **attributes)


def randn(*size: Any, dtype: str | None = None, device: str | None = None, **attributes: Any) -> Tensor:
    """Normal with mean 0 and standard deviation 1, from the generator that `manual_seed` seeds."""
    backend = get_backend(device or _default["device"])
    return _new(backend.normal(_size(size), dtype or _default["dtype"]), attributes)


def test_creation_follows_python_types() -> None:
    assert [tensor(value).dtype for value in ([1, 2], [1.0], True)] == [int64, float32, bool_]
    x = tensor([[1, 2], [3, 4]])
    copied, x.data[0, 0] = tensor(x), 7
    assert (copied.tolist(), x.tolist()) == ([[1, 2], [3, 4]], [[7, 2], [3, 4]])
    assert zeros(2, 3).shape == (2, 3) == ones((2, 3)).shape
    assert (full((2,), 7).tolist(), full((2,), 7).dtype) == ([7, 7], int64)


# %% [markdown]
# ### Elementwise operations
# Each is a line, because the array library does the work; the door brings both inputs to one dtype first. Operations
# that Python has a sign for are that sign on arrays, and the same sign on tensors.


# %%
@op(dtypes="common")
def add(xp, a, b):
    """a + b, broadcast."""
    return a + b


@op(dtypes="common")
def sub(xp, a, b):
    """a - b, broadcast."""
    return a - b


@op(dtypes="common")
def mul(xp, a, b):
    """a b, elementwise, broadcast."""
    return a * b


@op(dtypes="float")
def div(xp, a, b):
    """a / b, broadcast; of integers too it is a float."""
    return a / b


@op(dtypes="common")
def pow(xp, a, b):
    """a to the power b, broadcast."""
    return a * a if type(b) in NUMBERS and b == 2 else a**b  # a square is ten times as fast as a general power


def _from_sign(name: str, sign: str, function: Callable) -> Op:
    def apply(xp, a, b):
        return function(a, b)

    apply.__name__, apply.__doc__ = name, f"a {sign} b, elementwise, broadcast."
    return Op(apply, "common")


eq, ne = _from_sign("eq", "==", operator.eq), _from_sign("ne", "!=", operator.ne)
lt, le = _from_sign("lt", "<", operator.lt), _from_sign("le", "<=", operator.le)
gt, ge = _from_sign("gt", ">", operator.gt), _from_sign("ge", ">=", operator.ge)
bitwise_and, bitwise_or = _from_sign("bitwise_and", "&", operator.and_), _from_sign("bitwise_or", "|", operator.or_)
bitwise_xor = _from_sign("bitwise_xor", "^", operator.xor)


@op
def neg(xp, x):
    """-x."""
    return -x


@op
def bitwise_not(xp, x):
    """~x of booleans or integers."""
    return ~x


@op
def abs(xp, x):
    """|x|."""
    return xp.abs(x)


@op(dtypes="float")
def exp(xp, x):
    """e to the power x."""
    return xp.exp(x)


@op(dtypes="float")
def log(xp, x):
    """The natural logarithm; -inf at 0, nan below."""
    return xp.log(x)


@op(dtypes="float")
def sqrt(xp, x):
    """The square root; nan below 0."""
    return xp.sqrt(x)


@op(dtypes="common")
def maximum(xp, a, b):
    """The larger of a and b, elementwise; nan where one is."""
    return xp.maximum(a, b)


def _operators(name: str, operation: Op) -> dict[str, Callable]:
    """The methods by which Python finds `tensor + other` and `other + tensor`."""
    call = operation.__call__
    return {f"__{name}__": lambda self, other: call(self, other), f"__r{name}__": lambda self, other: call(other, self)}


SIGNS = {"add": add, "sub": sub, "mul": mul, "truediv": div, "pow": pow}
SIGNS |= {"and": bitwise_and, "or": bitwise_or, "xor": bitwise_xor}
for _name, _operation in SIGNS.items():
    Tensor.extend(**_operators(_name, _operation))
Tensor.extend(__neg__=neg, __abs__=abs, __invert__=bitwise_not, __lt__=lt, __le__=le, __gt__=gt, __ge__=ge)


def test_elementwise_broadcasts_and_promotes() -> None:
    column, row = tensor([[1], [2]]), tensor([0.5, 1.5])
    assert_close(column + row, [[1.5, 2.5], [2.5, 3.5]])
    assert (column + row).dtype == float32
    assert (column * 2).dtype == int64
    assert (column / 2).dtype == float32
    assert_close(2 - row, [1.5, 0.5])
    assert_close(row**2, [0.25, 2.25])


def test_shape_error_names_operation_and_shapes() -> None:
    message = message_of(add, zeros(2, 3), zeros(4), error=ValueError)
    assert builtins.all(words in message for words in ("add", "(2, 3)", "(4,)"))


@op
def where(xp, condition, a, b):
    """a where the condition holds, b elsewhere, broadcast."""
    a, b = xp.promote([a, b])
    if not hasattr(a, "dtype") and not hasattr(b, "dtype"):
        name = "int64" if isinstance(a, int) and isinstance(b, int) else xp.default_float
        a, b = xp.asarray(a, dtype=xp.dtype(name)), xp.asarray(b, dtype=xp.dtype(name))
    return xp.where(condition, a, b)


def test_where_chooses() -> None:
    x = tensor([-1.0, 0.0, 2.0])
    assert where(x > 0, 1, 0.5).tolist() == [0.5, 0.5, 1]
    assert_close(where((x > 0) | (x == 0), x, -x * 10), [10, 0, 2])


# %% [markdown]
# ### Reductions
# `dim` is one axis, several, or all of them (None). `max` and `min` of one axis also tell where the extreme stands.


# %%
@op
def sum(xp, x, *, dim=None, keepdim=False):
    """The sum over `dim`. Booleans and integers add up to int64."""
    return xp.sum(x if xp.is_floating(x) else xp.cast(x, "int64"), axis=dim, keepdims=keepdim)


@op(dtypes="float")
def mean(xp, x, *, dim=None, keepdim=False):
    """The mean over `dim`."""
    return xp.mean(x, axis=dim, keepdims=keepdim)


@op
def amax(xp, x, *, dim=None, keepdim=False):
    """The largest element over `dim`."""
    return xp.max(x, axis=dim, keepdims=keepdim)


@op
def argmax(xp, x, *, dim=None, keepdim=False):
    """Where the largest element stands along `dim`, the first of equals; of all axes: in the flattened tensor."""
    return xp.argmax(x, axis=dim, keepdims=keepdim)


def test_reductions() -> None:
    x = tensor([[1.0, 5.0, 3.0], [4.0, 2.0, 6.0]])
    assert_close(x.sum(), 21)
    assert_close(x.mean(0, keepdim=True), [[2.5, 3.5, 4.5]])
    assert_close(x.amax(dim=1, keepdim=True), [[5], [6]])
    assert x.argmax(1).tolist() == [1, 2]
    assert (x > 3).sum(1, keepdim=True).tolist() == [[1], [2]]  # booleans count


# %% [markdown]
# ### Shape
# None of these moves a number, as long as the new shape can be told by strides over the same memory.


# %%
@op
def reshape(xp, x, *, shape):
    """The same elements in the same order under another shape; one length may be -1."""
    return xp.reshape(x, tuple(shape))


@op
def permute(xp, x, *, dims):
    """The axes in another order."""
    return xp.permute_dims(x, tuple(d % x.ndim for d in dims))


@op
def expand(xp, x, *, shape):
    """Axes of length 1 repeated to `shape`, without copying; -1 keeps a length."""
    lead = len(shape) - x.ndim
    sizes = tuple(x.shape[i - lead] if n == -1 else n for i, n in enumerate(shape))
    return xp.broadcast_to(x, sizes)


@op
def getitem(xp, x, *, index):
    """x[index]: integers, slices, ellipsis, None (views), boolean masks and integer arrays (copies)."""
    return xp.take_index(x, index)


@op
def concatenate(xp, *tensors, dim=0):
    """The tensors one after the other along `dim`."""
    return xp.concat(xp.promote(list(tensors)), axis=dim)


def transpose(x: Tensor, dim0: int, dim1: int) -> Tensor:
    """Two axes exchanged."""
    dims = list(range(x.ndim))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return permute(x, dims=tuple(dims))


def unsqueeze(x: Tensor, dim: int) -> Tensor:
    """A new axis of length 1 at `dim`."""
    dim %= x.ndim + 1
    return reshape(x, shape=(*x.shape[:dim], 1, *x.shape[dim:]))


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The tensors one after the other along an axis that they have."""
    if not len(tensors):
        raise ValueError("cat: expected at least one tensor, got none")
    return concatenate(*tensors, dim=dim)


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The tensors one after the other along a new axis."""
    return cat([unsqueeze(x, dim) for x in tensors], dim)


def _raw_index(index: Any) -> Any:
    """An index as array libraries take it: tensors inside it unwrapped, lists made arrays."""
    if isinstance(index, tuple):
        return tuple(_raw_index(part) for part in index)
    return Tensor(index).data if isinstance(index, list) else index.data if isinstance(index, Tensor) else index


def test_shapes_are_views() -> None:
    x = tensor([0, 1, 2, 3, 4, 5])
    assert x.reshape(2, -1).T.tolist() == [[0, 3], [1, 4], [2, 5]]
    y, x.data[5] = x.reshape(1, 2, 3).transpose(0, -1), 50  # views see it, because they have no memory of their own
    assert (y[0, 1].item(), y[2, 1].item()) == (3, 50)
    assert x[1:][-1].item() == 50
    assert x[x > 2].tolist() == [3, 4, 50]
    assert x[[0, -1]].tolist() == [0, 50]
    assert stack([x, x], -1).shape == (6, 2)
    assert (cat([x, x]).shape, stack([x, x]).shape) == ((12,), (2, 6))


# %% [markdown]
# ### Matrix product
# The one operation that is worth a library of its own: BLAS, which NumPy calls.


# %%
@op(dtypes="common")
def matmul(xp, a, b):
    """The matrix product over the last two axes, broadcast over the others; vectors as in NumPy and PyTorch."""
    if not a.ndim or not b.ndim or a.shape[-1] != b.shape[-1 if b.ndim == 1 else -2]:
        raise ValueError(f"matmul: {tuple(a.shape)} @ {tuple(b.shape)}: the inner lengths must be equal")
    return xp.matmul(a, b)


Tensor.extend(matmul=matmul, **_operators("matmul", matmul))


def test_matmul_against_its_definition() -> None:
    a, b = randn(2, 3, 4), randn(1, 4, 5)
    by_hand = (a.reshape(2, 3, 4, 1) * b).sum(2)
    assert_close(a @ b, by_hand, rtol=1e-4, atol=1e-5)


# %% [markdown]
# ### Dtype, device, copies


# %%
@op
def cast(xp, x, *, dtype):
    """The values in another dtype; floats are truncated to integers."""
    return xp.cast(x, dtype)


@op
def to_device(xp, x, *, device, source, non_blocking=False):
    """The values on another device. `source` is where they come from."""
    return get_backend(device).from_numpy(xp.to_numpy(x), not non_blocking)


@op
def clone(xp, x):
    """A copy."""
    return xp.asarray(x, copy=True)


def to(
    x: Tensor, *targets: Any, dtype: str | None = None, device: str | None = None, non_blocking: bool = False
) -> Tensor:  # fmt: skip
    """In another dtype, on another device, or both; or as another tensor is. The tensor itself if nothing changes."""
    for target in targets:
        if isinstance(target, Tensor):
            dtype, device = target.dtype, target.device
        elif target in DTYPES:
            dtype = target
        elif target is not None:
            device = target
    if device is not None and get_backend(device) is not backend_of(x.data):
        x = to_device(x, device=str(device), source=str(x.device), non_blocking=non_blocking)
    return x if dtype is None or dtype == x.dtype else cast(x, dtype=dtype)


def test_to_changes_dtype_only_when_needed() -> None:
    x = tensor([1.9, -1.9])
    assert x.to(int64).tolist() == [1, -1]
    assert x.to(float32) is x
    assert x.to(tensor(1.0, dtype=float64)).dtype == float64
    assert x.clone().data is not x.data


# %% [markdown]
# Now every operation becomes a method.


# %%


def _with_size(function: Op) -> Callable:
    """A method that takes its sizes one by one or as a tuple: x.reshape(2, 3), x.reshape((2, 3))."""
    name = next(iter(function.attributes))

    def method(self: Tensor, *size: Any, **attributes: Any) -> Tensor:
        return function(self, **(attributes or {name: _size(size)}))

    method.__name__, method.__doc__ = function.name, function.__doc__
    return method


Tensor.extend(
    add=add, sub=sub, mul=mul, div=div, pow=pow, neg=neg, abs=abs, exp=exp, log=log, sqrt=sqrt, maximum=maximum,
    eq=eq, ne=ne, lt=lt, le=le, gt=gt, ge=ge, sum=sum, mean=mean, amax=amax, argmax=argmax, to=to, clone=clone,
    reshape=_with_size(reshape), view=_with_size(reshape), permute=_with_size(permute), expand=_with_size(expand),
    transpose=transpose, unsqueeze=unsqueeze,
)  # fmt: skip


def test_observer_sees_every_call() -> None:
    seen = []
    with observe(lambda op, *_: seen.append(op.name) or _[-1]()):  # type: ignore[func-returns-value]
        (ones(2) + 1).sum()
    ones(2).exp()
    assert seen == ["add", "sum"]


# %% [markdown]
# ## Systems analysis
#
# Three regimes. Small tensors cost the door, whatever is computed. Elementwise work on large tensors costs memory
# traffic. Only the matrix product keeps the arithmetic units busy, because it reuses each number it loads.


# %%
def analyze() -> None:
    """Measure what an operation costs as its tensors grow, and what views and copies take."""
    rows = []
    for n in (2, 32, 256, 1024):
        x, y = randn(n, n), randn(n, n)
        elementwise, product = seconds(add, x, y), seconds(matmul, x, y)
        bytes_moved, operations = 3 * 4 * n * n, 2 * n**3
        rows.append([f"{n} x {n}", f"{elementwise * 1e6:.1f}", f"{bytes_moved / elementwise / 1e9:.1f}",
                     f"{product * 1e6:.1f}", f"{operations / product / 1e9:.1f}"])  # fmt: skip
    print_table(["shape", "x + y, µs", "GB/s", "x @ y, µs", "GFLOP/s"], rows)
    x = randn(1024, 1024)
    print_table(["of 4 MB", "µs", "new memory"], [
        ["x.T", f"{seconds(lambda: x.T) * 1e6:.1f}", "none: a view"],
        ["x.clone()", f"{seconds(x.clone) * 1e6:.1f}", "4 MB"],
        ["x + 1", f"{seconds(lambda: x + 1) * 1e6:.1f}", "4 MB"],
    ])  # fmt: skip


# %% [markdown]
# ## Production context
#
# PyTorch's `torch.Tensor` is a handle on a C++ `TensorImpl` (sizes, strides, offset) over a `Storage`. Its door is the
# *dispatcher*: each call goes through a table of keys (Autocast, CUDA, CPU …), and `__torch_dispatch__` lets
# Python stand in it, as our observers do. A call costs about a microsecond there too. What is left out here: strides
# in the interface (they are the array library's), complex numbers, sparse and nested tensors, named axes,
# and the JIT that would fuse several elementwise operations into one pass over memory.

# %% [markdown]
# ## Integration testing


# %%
def test_same_seed_same_bits() -> None:
    from tinytorch.m01_setup import manual_seed

    manual_seed(7)
    first = (randn(3, 4) @ randn(4, 2)).tolist()
    manual_seed(7)
    assert (randn(3, 4) @ randn(4, 2)).tolist() == first


# %% [markdown]
# ## Thinking questions
#
# 1. `x.T.reshape(-1)` must copy, `x.reshape(-1)` must not. Which strides make the difference?
# 2. `x + y` reaches a small part of the arithmetic peak at every size. Which number of this machine sets its limit?
# 3. float16 halves the traffic. For which operations of this module is that worth its loss of precision?
# 4. `y = x[0]; x += 1` changes `y`, `y = x[[0]]; x += 1` does not. How would you make that a type error?
# 5. The door costs about a microsecond. At which tensor size does it stop to matter for `x + y`? For `x @ y`?

# %% [markdown]
# ## Summary
#
# A tensor is an array with one slot to spare; an operation is a pure function behind one door. Modules 03 to 05 build
# networks of such operations; module 06 attaches a recorder to the door and makes them learn.


if __name__ == "__main__":
    run_module(globals())
