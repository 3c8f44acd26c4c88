"""Module 15: profiling, or where a program's time, memory and arithmetic go.

Learning objectives. After this module you can
1. measure what a machine can do at most, and say which of its limits an operation will meet;
2. count the arithmetic of an operation and the bytes that it moves, from shapes alone;
3. tell self time from total time, and account for every microsecond of a program's run;
4. say which arrays are alive at the peak of a training step, and which line and layer made them;
5. read a table, a timeline and a roofline, and decide from them what is worth changing.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ContextDecorator, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tinytorch.backends import BY_TYPE, backend_of, get_backend
from tinytorch.kernels import compiled, load, prange
from tinytorch.m01_setup import assert_close, print_table, printed, run_module
from tinytorch.m02_tensor import Op, observe, ones, randn, tensor
from tinytorch.m04_layers import Linear, Module, Sequential
from tinytorch.m05_losses import cross_entropy
from tinytorch.m06_autograd import propagate
from tinytorch.m06_autograd_appendix import listening
from tinytorch.m07_optimizers import SGD, Optimizer
from tinytorch.m09_spatial import SimpleCNN, layer_flops
from tinytorch.m13_attention import attention

# %% [markdown]
# ## Mathematical foundations
#
# **Time.** A call that lasts $t$ and makes calls that last $t_1, …, t_k$ has *self time* $t - \sum t_i$. Self times,
# and only they, add up: over all calls, and with what passes outside of any, to the wall time.
#
# **Arithmetic**, in floating-point operations (FLOPs), follows from shapes. A product of (n, k) and (k, m) has
# $2 n k m$: a multiplication and an addition for each pair of factors. A convolution has $2 N O H W C K^2$, attention
# $2 (D + E)$ for each pair of a query and a key that it sees. A layer's gradients take twice what the layer took: one
# product for the input's, and one for the weight's. Elementwise operations have one for each element and step.
#
# **Traffic** is the bytes of all inputs and results. *Arithmetic intensity* $I = F / M$ is FLOPs for each byte. A
# machine that does at most $P$ FLOPs and moves at most $B$ bytes a second needs at least $\max(F / P, M / B)$ seconds,
#
# $$F / t \le \min(P, \; I B),$$
#
# the **roofline** (Williams and others, 2009). Left of the bend at $I = P / B$ memory decides, right of it arithmetic.
#
# **Memory.** Let $a_i$ be when array $i$ of $m_i$ bytes came to be, and $f_i$ when it was freed. What is held at time
# $t$ is $\sum m_i [a_i \le t < f_i]$, and its maximum is the peak: what limits the batch.

# %% [markdown]
# ## Implementation
#
# ### What can this machine do?
# Data sheets give the peak of a chip that nobody runs. We measure ours: the peak by a loop that does nothing but
# multiply and add in registers, twelve sums side by side, and the bandwidth by one that adds up arrays too large for
# any cache. `compiled`: Numba makes machine code of the function when it is first called, and keeps it on disk.

# %%
multiply_add = compiled("tinytorch.kernels.cpu.ladder:multiply_add")
tile_columns = compiled("tinytorch.kernels.cpu.ladder:tile_columns")


@compiled
def triad(a, b, c):
    """a = b + b c: two numbers fetched, one stored."""
    for i in range(len(a)):
        a[i] = b[i] + b[i] * c[i]


@compiled(parallel=True)
def triads(a, b, c, parts):
    """The same in parts, each on a core of its own."""
    for part in prange(parts):
        first, last = len(a) * part // parts, len(a) * (part + 1) // parts
        triad(a[first:last], b[first:last], c[first:last])


@compiled(parallel=True)
def multiply_adds(sums, turns, x):
    """`multiply_add` on as many cores as there are sums."""
    for core in prange(len(sums)):
        sums[core] = multiply_add(turns, x)


@dataclass(frozen=True)
class Machine:
    """How many cores there are, and what one and all of them do: operations and bytes of memory a second."""

    cores: int
    peak: tuple[float, float]
    bandwidth: tuple[float, float]
    unit: str = "core"


@cache
def measure_machine(size: int = 1 << 24, turns: int = 1 << 18) -> Machine:
    """Measure this machine's limits, in a second. Arrays of `size` numbers must be too large for its caches."""
    cores, xp = core_count(), get_backend("cpu")
    peaks, rates = [], []
    a, b, c = (xp.ones((size,), dtype="float32") for _ in range(3))
    for count in (1, cores):
        sums = xp.zeros((count,), dtype="float32")
        operations = count * turns * 12 * tile_columns()
        peaks.append(operations / best(multiply_adds, sums, turns, sums[0], least=0.1))
        rates.append(12 * size / best(triads, a, b, c, count, least=0.1))
    return Machine(cores, (peaks[0], peaks[1]), (rates[0], rates[1]))


def best(function: Callable, *args: Any, least: float = 0.05) -> float:
    """The shortest seconds of a call, of three at least: what the machine can do while other programs let it."""
    times: list[float] = []
    function(*args)
    while len(times) < 3 or sum(times) < least:
        start = time.perf_counter()
        function(*args)
        times.append(time.perf_counter() - start)
    return min(times)


def core_count() -> int:
    """How many cores compiled functions are spread over."""
    return load("tinytorch.kernels.cpu.jit:cores")()


def test_the_limits_are_measured() -> None:
    machine = measure_machine(1 << 20, 1 << 16)
    assert machine.peak[0] > 1e9
    assert machine.peak[1] > 0.5 * machine.peak[0]
    xp = get_backend("cpu")
    a, b = xp.zeros((10,), dtype="float32"), xp.arange(10, dtype="float32")
    triads(a, b, b, 3)
    assert_close(a, b + b * b)


# %% [markdown]
# ### How much arithmetic?
# A formula for each operation, by its name, from the shapes of its result and its inputs. Where an operation multiplies
# matrices, its products alone count, as in PyTorch's `FlopCounterMode`: a bias is 1/k of them. What an implementation
# saves or wastes does not change the count, so that rates of different ones can be compared: Winograd's convolution
# counts as much as the loops, and a causal mask's half is no work, whether or not it is skipped.

# %%
FLOPS: dict[str, Callable[..., int]] = {}  # by name of operation: of its result, its inputs and all its attributes


def flop_formula(*names: str) -> Callable[[Callable], Callable]:
    """Enter `formula(out, *arrays, **attributes)` for operations, by name; of a tuple, `out` is the first entry."""

    def enter(formula: Callable[..., int]) -> Callable[..., int]:
        FLOPS.update(dict.fromkeys(names, formula))
        return formula

    return enter


def count(x: Any) -> int:
    """How many elements an array has; a number has one."""
    return math.prod(getattr(x, "shape", ()))


@flop_formula("matmul")
def matmul_flops(out: Any, a: Any, b: Any) -> int:
    return 2 * count(out) * a.shape[-1]


flop_formula("linear", "convolution")(lambda out, x, weight, *bias, **geometry: layer_flops(out, weight))
flop_formula("convolution_input_gradient")(lambda out, g, weight, **geometry: layer_flops(g, weight))
flop_formula("convolution_weight_gradient")(lambda out, g, x, **geometry: layer_flops(g, out))
flop_formula("linear_gradients")(lambda out, g, x, weight, tracked: layer_flops(g, weight) * len({0, 1} & {*tracked}))


def attention_products(query: Any, key: Any, is_causal: bool) -> int:
    """How many pairs of a query and a key there are that sees, over all heads."""
    queries, keys = query.shape[-2], key.shape[-2]
    pairs = sum(min(i + 1, keys) for i in range(queries)) if is_causal else queries * keys
    return pairs * max(math.prod(query.shape[:-2]), math.prod(key.shape[:-2]))


@flop_formula("attention")
def attention_flops(out: Any, query: Any, key: Any, value: Any, *mask: Any, is_causal: bool, **others: Any) -> int:
    return 2 * attention_products(query, key, is_causal) * (key.shape[-1] + value.shape[-1])


@flop_formula("attention_gradients")
def attention_gradient_flops(
    out: Any, g: Any, query: Any, key: Any, value: Any, *kept: Any, is_causal: bool, **others: Any
) -> int:
    """The scores again, the gradients of weights, query, key and value: five products for attention's two."""
    return 2 * attention_products(query, key, is_causal) * (3 * key.shape[-1] + 2 * value.shape[-1])


for _names, _each in (  # of each element of the result
    ("add sub mul div pow neg abs exp log sqrt maximum eq ne lt le gt ge relu relu_gradient floor_divide remainder", 1),
    ("reshape permute expand getitem concatenate cast to_device clone where scatter", 0),  # they only move numbers
):
    flop_formula(*_names.split())(lambda out, *arrays, _each=_each, **attributes: _each * count(out))
flop_formula("sum", "mean", "amax", "argmax")(lambda out, x, **attributes: count(x))


def flops_of(operation: Op, out: Any, arrays: Sequence, attributes: dict) -> int | None:
    """The FLOPs of one call; None for an operation that has no formula."""
    formula = FLOPS.get(operation.name)
    if formula is None:
        return None
    if operation.attributes:
        attributes = {**operation.attributes, **attributes}
    return formula(out[0] if type(out) is tuple else out, *arrays, **attributes)


def test_flops_are_those_of_hand_counts() -> None:
    assert profiled(lambda: randn(2, 3, 4) @ randn(4, 5))["matmul"] == 2 * (3 * 4 * 5) * 2
    layer, x = Linear(784, 10), randn(64, 784)
    assert profiled(lambda: layer(x).sum().backward()) == {
        "linear": 2 * 64 * 784 * 10, "sum": 640, "linear_gradients": 2 * 64 * 784 * 10, "expand": 0
    }  # fmt: skip
    heads = randn(2, 4, 6, 8)
    assert profiled(lambda: attention(heads, heads, heads))["attention"] == 2 * 4 * (6 * 6) * (2 * 8 + 2 * 8)
    assert profiled(lambda: attention(heads, heads, heads, is_causal=True))["attention"] == 8 * 21 * 32


# %% [markdown]
# ### How many bytes?
# An operation reads its inputs and writes its results once, if caches keep nothing from before. A view moves nothing:
# its memory is that of the array that it was taken of, which NumPy and CuPy tell by `base`.

# %%
VIEWS = frozenset(("reshape", "permute", "expand", "getitem", "cast", "to_device"))  # they copy only where they must


def traffic(*arrays: Any) -> int:
    """The bytes of some arrays; what is no array has none."""
    return sum([getattr(x, "nbytes", 0) for x in arrays])


def owner_of(array: Any) -> Any:
    """The array whose memory this one lies in: itself, unless it is a view."""
    kind, owner = type(array), array
    while (array := getattr(array, "base", None)) is not None:
        owner = array if type(array) is kind else owner
    return owner


def bytes_moved(operation: Op, out: Any, arrays: Sequence) -> int:
    if operation.name in VIEWS and owner_of(out) is owner_of(arrays[0]):
        return 0
    return traffic(*arrays, *out) if type(out) is tuple else traffic(*arrays, out)


def test_views_move_nothing() -> None:
    with Profile() as p:
        x = ones(10, 10)
        y = x.reshape(100)[10:].exp()
        x.T.reshape(-1)  # this one must copy
    assert [(e.name, e.moved) for e in p.events] == [
        ("reshape", 0), ("getitem", 0), ("exp", 2 * y.nbytes), ("permute", 0), ("reshape", 2 * x.nbytes)
    ]  # fmt: skip


# %% [markdown]
# ### Which arrays are alive?
# Python frees an array when its last reference goes. A *weak reference* keeps nothing alive and is told of that moment.
# So a ledger needs two entries an array, and what the program holds by mistake shows as what never goes.


# %%
clock = time.perf_counter_ns


class Entry(weakref.ref):
    """A weak reference to an array that owns memory, with what must be known when it is gone."""

    __slots__ = ("key", "size")
    key: int
    size: int


class Ledger:
    """Every array that was shown to it, from then until it is freed.

    Attributes:
        changes: (nanoseconds, bytes) of each array that came, and of each that went, negative.
    """

    def __init__(self) -> None:
        self.changes: list[tuple[int, int]] = []
        self.live: dict[int, Entry] = {}

    def show(self, array: Any) -> int:
        """Enter the memory that an array lies in, unless it is known; the bytes that are new."""
        owner = owner_of(array)
        key, size = id(owner), getattr(owner, "nbytes", 0)
        if key in self.live or not size:
            return 0
        try:
            entry = Entry(owner, self._forget)
        except TypeError:  # this library's arrays cannot be referred to weakly
            return 0
        entry.key, entry.size = key, size
        self.live[key] = entry
        self.changes.append((clock(), size))
        return size

    def _forget(self, entry: Any) -> None:
        if self.live.pop(entry.key, None) is not None:
            self.changes.append((clock(), -entry.size))

    def history(self) -> list[tuple[int, int]]:
        """(nanoseconds, bytes held from then on)."""
        changes = sorted(self.changes)  # other threads free arrays, too
        return list(zip((t for t, _ in changes), itertools.accumulate(size for _, size in changes), strict=True))


def test_a_ledger_knows_what_is_alive() -> None:
    ledger, xp = Ledger(), get_backend("cpu")
    a, b = (xp.zeros((size,), dtype="float32") for size in (100, 50))
    assert [ledger.show(x) for x in (a, a[10:], b, 3.0)] == [400, 0, 200, 0]
    view = a[:1]
    del a, b
    assert [held for _, held in ledger.history()] == [400, 600, 400]
    del view
    assert ledger.history()[-1][1] == 0


# %% [markdown]
# ### Where was it called?
# The call stack knows. From the operation outwards we meet the layer's code, `Module.__call__` with the layer as
# `self`, perhaps more layers, and the first line that is not the library's: the user's. In backward we meet
# `propagate`, which has the graph's node at hand; and a node's number leads to the operation that it records, so that
# backward is charged to the layer and the line that made it necessary, and not to `loss.backward()`.
#
# Only addresses in the code are kept, (code, instruction); lines are looked up when somebody wants to see them.

# %%
CALLS: dict[CodeType, str] = {Module.__call__.__code__: "self"}  # functions that run a layer, and its name in them
PROPAGATE = propagate.__code__
KNOWN: dict[int, tuple[CodeType, bool, str | None]] = {}  # by id, because a code's hash goes through all of it
Place = tuple[Any, ...]  # of each frame its code and its instruction, the innermost first


def is_library(code: CodeType) -> bool:
    """Whether a function is one of the framework's. Milestones and profiles are programs, as a user's are."""
    file = Path(code.co_filename)
    return file.parent == Path(str(sys.modules["tinytorch"].__file__)).parent or file.name == "contextlib.py"


def know(code: CodeType) -> tuple[CodeType, bool, str | None]:
    """A function, whether it is the library's, and what the layer is called in it, if it runs one."""
    found = KNOWN.get(id(code))
    if found is None:
        found = KNOWN[id(code)] = code, is_library(code), CALLS.get(code)
    return found


def local(frame: FrameType, name: str) -> Any:
    """A variable of a function that is running."""
    values = frame.f_locals
    found = values.get(name)
    if sys.version_info < (3, 13):
        values.clear()  # a copy, which would stay with the frame and keep arrays alive
    return found


def look_around(frame: FrameType | None) -> tuple[Any, FrameType | None, Any, Place]:
    """From a frame outwards: the innermost layer and its frame, the node that backward is at, and the place.

    The place ends with the first line that is not the library's.
    """
    module, module_frame, node, place, inside = None, None, None, list[Any](), True
    while frame is not None and (inside or (module is None and node is None)):
        code = frame.f_code
        _, library, layer = KNOWN.get(id(code)) or know(code)
        if inside:
            place += code, frame.f_lasti
            inside = library
        if layer is not None and module is None:
            module, module_frame = local(frame, layer), frame
        elif code is PROPAGATE:
            node = local(frame, "node")
        frame = frame.f_back
    return module, module_frame, node, tuple(place)


def line_of(code: CodeType, instruction: int) -> tuple[str, int, str]:
    """(file, line, function)."""
    positions = itertools.islice(code.co_positions(), instruction // 2, None)
    return code.co_filename, next(positions)[0] or code.co_firstlineno, code.co_qualname


def find_line(place: Place, skip: Callable[[CodeType], bool] = is_library) -> tuple[str, int, str] | None:
    """(file, line, function) of the innermost line of a place whose code is not to be skipped, or the outermost."""
    for code, instruction in zip(place[::2], place[1::2], strict=True):
        if not skip(code):
            return line_of(code, instruction)
    return line_of(*place[-2:]) if place else None


def user_line(place: Place) -> str:
    """The user's line that led to a place: "train.py:12 step"."""
    file, line, function = find_line(place) or ("", 0, "")
    return f"{Path(file).name}:{line} {function}" if file else ""


def test_a_place_is_a_line_and_a_layer() -> None:
    net = Sequential(Linear(3, 4), Sequential(Linear(4, 2)))
    with Profile() as p:
        net(ones(1, 3)).sum().backward()
    layers = [(e.module, e.backward) for e in p.events if e.name in ("linear", "linear_gradients")]
    assert layers == [("Sequential.0 (Linear)", False), ("Sequential.1.0 (Linear)", False),
                      ("Sequential.1.0 (Linear)", True), ("Sequential.0 (Linear)", True)]  # fmt: skip
    assert {e.module for e in p.events if e.name in ("sum", "expand")} == {""}


# %% [markdown]
# ### An event for each call
# Of a call we keep numbers, names and shapes, never arrays. What the observer itself costs is charged to no one else.


# %%
@dataclass(slots=True, eq=False)
class Event:
    """One call of an operation, one update by an optimizer, or a part of the program that was given a name.

    Attributes:
        kind: "operation", "update" or "range".
        start, end: nanoseconds; inner: how many of them went to events inside of this one.
        shapes: of its inputs; flops: None where nobody gave a formula.
        moved, made: bytes read and written; bytes of memory that it was the first to use.
        module, place: the layer, as "GPT.blocks.0.mlp (MLP)", and the lines that led here, the innermost first.
    """

    name: str
    kind: str
    thread: int
    start: int = 0
    end: int = 0
    inner: int = 0
    backward: bool = False
    shapes: tuple = ()
    flops: int | None = None
    moved: int = 0
    made: int = 0
    module: str = ""
    place: Place = ()
    on_device: Callable[[], float] | None = None

    @property
    def total_seconds(self) -> float:
        return (self.end - self.start) / 1e9

    @property
    def self_seconds(self) -> float:
        return (self.end - self.start - self.inner) / 1e9

    @property
    def device_seconds(self) -> float | None:
        """How long a device that works on its own was busy with it; None where calls return when they are done."""
        return self.on_device() if self.on_device else None


class Running(threading.local):
    """What a thread is in the middle of: events that have not ended; and the last operation that has."""

    def __init__(self) -> None:
        self.open: list[Event] = []
        self.last: Event | None = None
        self.thread = threading.get_ident()


PROFILES: list[Profile] = []  # those that are on


class Profile:
    """Record every operation of a `with` block, forward and backward: `with Profile() as p: …; print(p.table())`.

    The appendix's `profile` is the same, and saves timelines and draws figures.

    Args:
        memory: follow the arrays that operations take and make, from when they are first seen until they are freed.
        stack: find out in which layer, and from which line, each operation was called.

    Attributes:
        events: in the order in which they ended, of all threads.
        total_seconds: the length of the block.
        observing_seconds: how much of it, in the thread of the block, was the profiler's own.
    """

    def __init__(self, memory: bool = True, stack: bool = True) -> None:
        self.events: list[Event] = []
        self.ledger = Ledger() if memory else None
        self.stack, self.recorded = stack, dict[int, Event]()
        self.layers: dict[int, tuple[Module, Module]] = {}  # by id, each layer and the network that it was called in
        self.running, self.thread = Running(), threading.get_ident()
        self.total_seconds = self.observing_seconds = 0.0

    def __enter__(self) -> Profile:
        self.attached = ExitStack()
        for step in (observe(self._observe), listening(self._remember), updates_timed(self)):
            self.attached.enter_context(step)
        PROFILES.append(self)
        self.started = clock()
        return self

    def __exit__(self, *error: object) -> None:
        self.total_seconds = (clock() - self.started) / 1e9
        PROFILES.remove(self)
        self.attached.close()
        self.recorded.clear()
        self._name_layers()
        if self.ledger:
            self.ledger.live.clear()  # what is freed from now on is not of the block

    def begin(self, name: str, kind: str) -> Event:
        """An event that lasts until `finish`; it encloses what happens in between in this thread."""
        event = Event(name, kind, self.running.thread)
        self.running.open.append(event)
        event.start = clock()
        return event

    def finish(self, event: Event) -> None:
        event.end = clock()
        self.running.open.remove(event)
        self.events.append(event)
        if self.running.open:
            self.running.open[-1].inner += event.end - event.start

    def _observe(self, operation: Op, arrays: list, attributes: dict, proceed: Callable) -> Any:
        entered, running = clock(), self.running
        event = Event(operation.name, "operation", running.thread)
        self._locate(event, sys._getframe(1))
        running.open.append(event)
        timer = device_timer(arrays)
        event.start = clock()
        try:
            out = proceed()
        finally:
            event.end = clock()
            running.open.remove(event)
        event.on_device = timer() if timer else None
        self._describe(event, operation, arrays, attributes, out)
        self.events.append(event)
        running.last = event
        taken = clock() - entered
        if running.open:
            running.open[-1].inner += taken
        if running.thread == self.thread:
            self.observing_seconds += (taken - event.end + event.start) / 1e9
        return out

    def _describe(self, event: Event, operation: Op, arrays: list, attributes: dict, out: Any) -> None:
        event.shapes = tuple([getattr(x, "shape", ()) for x in arrays])
        event.flops = flops_of(operation, out, arrays, attributes)
        event.moved = bytes_moved(operation, out, arrays)
        if self.ledger:
            for x in arrays:
                if id(x) not in self.ledger.live:  # most are known, and no views
                    self.ledger.show(x)
            event.made = sum([self.ledger.show(x) for x in (out if type(out) is tuple else (out,))])

    def _locate(self, event: Event, frame: FrameType) -> None:
        module, module_frame, node, place = look_around(frame)
        event.backward = node is not None
        if not self.stack:
            return
        forward = self.recorded.get(getattr(node, "number", -1))
        if forward is not None:
            event.module, event.place = forward.module, forward.place
        else:
            event.module, event.place = self._enter(module, module_frame), place

    def _remember(self, result: Any) -> None:
        """Which operation a node of the graph records."""
        last = self.running.last
        if last is not None and last.name == result._trace.name:
            self.recorded[result._trace.number] = last

    def _enter(self, module: Module | None, frame: FrameType | None) -> Any:
        """A layer's number, which becomes its name when there is time for it."""
        if module is None:
            return ""
        if id(module) not in self.layers:
            network = module
            while frame is not None:
                _, _, layer = know(frame.f_code)
                network = local(frame, layer) if layer is not None else network
                frame = frame.f_back
            self.layers[id(module)] = module, network
        return id(module)

    def _name_layers(self) -> None:
        names: dict[Any, str] = {}
        for module, network in self.layers.values():
            for name, part in [*network.named_modules(), ("?", module)]:
                names.setdefault(id(part), layer_path(network, name, part))
        for event in self.events:
            event.module = names.get(event.module, "")
        self.layers.clear()

    @property
    def memory(self) -> list[tuple[float, int]]:
        """(seconds since the beginning, bytes held from then on)."""
        return [((t - self.started) / 1e9, held) for t, held in self.ledger.history()] if self.ledger else []

    @property
    def peak_memory(self) -> int:
        """The most bytes that were held at once."""
        return max((held for _, held in self.memory), default=0)

    def table(self, sort_by: str = "self", rows: int | None = 20, by: str = "operation") -> str:
        """What took how long, as text: the rows that `summarize` gives, the largest first, and what is left.

        Args:
            sort_by: "self", "total", "calls", "flops", "moved", "made" or "device".
            rows: how many of the largest are shown; all others are added up. None shows all.
            by: what is added up to one row: "operation", "shape", "module" or "line".
        """
        return format_table(self, sort_by, rows, by)


def layer_path(network: Module, name: str, part: Module) -> str:
    """What a layer is called: "SimpleCNN.0 (Conv2d)"; the network itself has no more than its class."""
    return f"{type(network).__name__}.{name} ({type(part).__name__})" if name else type(network).__name__


def device_timer(arrays: list) -> Callable | None:
    """For arrays of a device that works on its own: what, called after an operation, gives a way to its seconds."""
    array = next((x for x in arrays if type(x) in BY_TYPE), None)
    before = None if array is None else (xp := backend_of(array)).mark()
    return None if before is None else lambda: partial(xp.seconds_between, before, xp.mark())


def test_every_operation_is_an_event() -> None:
    x = tensor([[0.5, -1.0]], requires_grad=True)
    with Profile() as p:
        (x.exp() @ ones(2, 3)).sum().backward()
    found = [(e.name, e.backward, e.shapes) for e in p.events]
    assert found[:3] == [("exp", False, ((1, 2),)), ("matmul", False, ((1, 2), (2, 3))), ("sum", False, ((1, 3),))]
    assert ("matmul", True, ((1, 3), (3, 2))) in found
    assert p.events[1].made == 12  # three numbers
    assert all(0 < e.self_seconds <= e.total_seconds <= p.total_seconds for e in p.events)


# %% [markdown]
# ### What operations do not show
# An optimizer updates arrays in place, all of a group at once, and calls no operation. `Optimizer.together` is where
# such functions are attached; while a profile is on, each has a clock. `record_function` names a part of a program.


# %%
@contextmanager
def updates_timed(p: Profile) -> Iterator[None]:
    """Have each optimizer's update of a group of parameters be an event."""

    def update(found: Any, optimizer: Any, group: dict, parameters: list) -> list:
        event = p.begin(f"{type(optimizer).__name__}.step", "update")
        for q in found(optimizer, group, parameters) if found else parameters:
            optimizer._step_one(q, q.grad.data, group)
        p.finish(event)
        return []

    before, kinds = dict(Optimizer.together), list(Optimizer.__subclasses__())
    for kind in kinds:
        kinds += kind.__subclasses__()
        Optimizer.together[kind] = partial(update, before.get(kind))
    try:
        yield
    finally:
        Optimizer.together.clear()
        Optimizer.together.update(before)


class record_function(ContextDecorator):
    """Give a part of a program a name in every profile that is on: `with record_function("loss"):`, or a decorator."""

    def __init__(self, name: str) -> None:
        self.name, self.open = name, list[list[tuple[Profile, Event]]]()

    def __enter__(self) -> record_function:
        self.open.append([(p, p.begin(self.name, "range")) for p in PROFILES])
        return self

    def __exit__(self, *error: object) -> None:
        for p, event in self.open.pop():
            p.finish(event)

    def _recreate_cm(self) -> record_function:
        return record_function(self.name)  # a decorated function may run in several threads at once


def test_ranges_and_updates_enclose_what_they_do() -> None:
    layer, x = Linear(2, 2), ones(1, 2)
    optimizer = SGD(layer.parameters(), lr=0.5)
    with Profile() as p, record_function("step"):
        layer(x).sum().backward()
        optimizer.step()
    assert_close(layer.weight.grad, [[1, 1], [1, 1]])
    step, update = p.events[-1], p.events[-2]
    assert (step.name, update.name) == ("step", "SGD.step")
    assert step.inner >= sum(e.end - e.start for e in p.events[:-1])


# %% [markdown]
# ### The table
# Rows are sums over events. Two more make the self times add up to the wall time: what the profiler took for itself,
# and what passed outside of all events: the interpreter, and arithmetic on arrays that is no operation, such as adding
# two gradients up. If that row is the largest, faster kernels will not help.

# %%
KEYS: dict[str, Callable[[Event], str]] = {
    "operation": lambda e: e.name,
    "shape": lambda e: f"{e.name} {' '.join('×'.join(map(str, shape)) or '·' for shape in e.shapes)}",
    "module": lambda e: e.module or f"({e.name})",
    "line": lambda e: user_line(e.place) or f"({e.name})",
}


@dataclass
class Row:
    """The events with one name, forward or backward, added up: seconds, FLOPs and bytes."""

    name: str
    backward: bool = False
    calls: int = 0
    self: float = 0.0
    total: float = 0.0
    device: float = 0.0
    flops: int = 0
    moved: int = 0
    made: int = 0

    def add(self, event: Event) -> None:
        self.calls += 1
        self.self += event.self_seconds
        self.total += event.total_seconds
        self.device += event.device_seconds or 0.0
        self.flops += event.flops or 0
        self.moved += event.moved
        self.made += event.made


REST, OBSERVING = "Python between operations", "the profiler itself"


def summarize(p: Profile, by: str | Callable[[Event], str] = "operation") -> list[Row]:
    """A row for each group of events of the block's thread, and two for the rest: self times add up to `total_seconds`.

    Args:
        by: "operation", "shape", "module" or "line", or a function of an event that names its group.
    """
    if isinstance(by, str) and by not in KEYS:
        raise ValueError(f"by: expected {', '.join(KEYS)}, got {by!r}")
    key, rows = KEYS[by] if isinstance(by, str) else by, dict[tuple[str, bool], Row]()
    for event in p.events:
        if event.thread == p.thread:
            name = key(event)
            rows.setdefault((name, event.backward), Row(name, event.backward)).add(event)
    rest = p.total_seconds - p.observing_seconds - sum(row.self for row in rows.values())
    return [*rows.values(), Row(OBSERVING, self=p.observing_seconds), Row(REST, self=rest)]


def format_table(p: Profile, sort_by: str, rows: int | None, by: str) -> str:
    found = summarize(p, by)
    columns = ("self", "total", "calls", "flops", "moved", "made", "device")
    if sort_by not in columns:
        raise ValueError(f"sort_by: expected {', '.join(columns)}, got {sort_by!r}")
    own = sorted(found[:-2], key=lambda row: -getattr(row, sort_by))
    most = len(own) if rows is None else rows
    if len(own) > most:
        others = Row(f"{len(own) - most} more")
        for row in own[most:]:
            for name in columns:
                setattr(others, name, getattr(others, name) + getattr(row, name))
        own = [*own[:most], others]
    lines: list[list[Any]] = []
    for row in (*own, *found[-2:]):
        counted = (row.flops / 1e6, row.flops / row.self / 1e9) if row.flops and row.self else ()
        flops = [f"{value:,.1f}" for value in counted] or ["", ""]
        lines.append([row.name, "backward" if row.backward else "", row.calls, f"{1e3 * row.self:.3f}",
                      f"{row.self / p.total_seconds:.1%}", f"{1e3 * row.total:.3f}", *flops,
                      f"{row.moved / 1e6:,.2f}", f"{row.made / 1e6:,.2f}"])  # fmt: skip
        if any(row.device for row in found):
            lines[-1].append(f"{1e3 * row.device:.3f}")
    heads: list[Any] = [by, "", "calls", "self ms", "share", "total ms", "MFLOP", "GFLOP/s", "MB moved", "MB new"]
    heads += ["device ms"] if len(lines[0]) > len(heads) else []
    for column in range(3, len(heads)):  # text that is numbers goes to the right, as numbers do
        width = max(len(line[column]) for line in [heads, *lines])
        for line in [heads, *lines]:
            line[column] = line[column].rjust(width)
    peak = f", {p.peak_memory / 1e6:,.1f} MB at the peak" if p.ledger else ""
    return printed(print_table, heads, lines) + f"{1e3 * p.total_seconds:.3f} ms in all{peak}\n"


def test_self_times_add_up_to_the_wall_time() -> None:
    net, pictures, labels = SimpleCNN(1, 10, 8, widths=(8,)), randn(16, 1, 8, 8), tensor([1, 2] * 8)
    with Profile() as p, record_function("step"):
        cross_entropy(net(pictures), labels).backward()
    for by in KEYS:
        assert_close(sum(row.self for row in summarize(p, by)), p.total_seconds, rtol=1e-9)
        assert sum(row.calls for row in summarize(p, by)) == len(p.events)
    assert 0 < p.total_seconds <= (clock() - p.started) / 1e9
    assert p.table(rows=2).count("\n") == 2 + 2 + 1 + 2 + 1  # heads, two rows, "… more", the rest, and the sum


# %% [markdown]
# ## Systems analysis
#
# The training step of a CNN and of a small network: where the time goes, and what watching costs. The same overhead an
# operation weighs little beside a convolution, and much beside a product of small matrices.


# %%
def training_step(net: Module, x: Any, labels: Any) -> Callable[[], None]:
    optimizer = SGD(net.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(net(x), labels).backward()
        optimizer.step()

    return step


def profiled(call: Callable[[], Any]) -> dict[str, int | None]:
    """FLOPs of a call by operation."""
    with Profile() as p:
        call()
    found: dict[str, Any] = {}
    for event in p.events:
        found[event.name] = None if event.flops is None else found.get(event.name, 0) + event.flops
    return found


def analyze() -> None:
    """Measure this machine, a profile of a training step, and the cost of watching it."""
    machine = measure_machine()
    for cores, peak, rate in zip((1, machine.cores), machine.peak, machine.bandwidth, strict=True):
        bend = peak / rate
        print(f"{cores} core{'s' * (cores > 1)}: {peak / 1e9:,.0f} GFLOP/s, {rate / 1e9:.0f} GB/s; bend at {bend:.0f}")
    labels, rows = tensor([i % 10 for i in range(16)]), []
    small = Sequential(Linear(784, 128), Linear(128, 10))
    for name, net, x in (("CNN", SimpleCNN(), randn(16, 3, 32, 32)), ("784-128-10", small, randn(16, 784))):
        step = training_step(net, x, labels)
        off, on = [best(step)], []
        for _ in range(3):  # in turn, so that both see the same machine
            with Profile() as p:
                on.append(best(step))
            off.append(best(step))
        with Profile() as p:
            step()
        rows.append([name, len(p.events), min(off) * 1e3, min(on) * 1e3, f"{min(on) / min(off) - 1:.1%}",
                     (min(on) - min(off)) / len(p.events) * 1e6, p.peak_memory / 1e6])  # fmt: skip
        print(f"\n{name}, a step at batch 16:\n{p.table(rows=8)}", end="")
    print()
    print_table(["a step of", "events", "off, ms", "on, ms", "overhead", "µs an event", "MB at the peak"], rows)


# %% [markdown]
# ## Production context
#
# `torch.profiler.profile` records the same events in C++ (Kineto), with CUPTI's view of each GPU kernel beside them,
# and hands them to Perfetto or TensorBoard; `record_function`, `with_stack`, `profile_memory` and `with_flops` are its
# options, `key_averages().table(sort_by=…)` its table. Its memory view asks the caching allocator, and
# `torch.cuda.memory._record_memory_history` keeps a stack for every block. `torch.utils.flop_counter.FlopCounterMode`
# counts as `FLOPS` does. On a GPU calls return before the work is done; pairs of CUDA events, which the device passes
# in its own time, tell how long it took, and `nsys` and `ncu` see what happens inside a kernel.
#
# Samplers (`py-spy`, `perf`) look at the stack a thousand times a second instead: they cost the same whatever the
# program does, and see Python's own time, which is one row here. Left out: hardware counters, which know true traffic.

# %% [markdown]
# ## Integration testing


# %%
def test_a_profile_of_training_sees_layers_lines_and_memory() -> None:
    net = SimpleCNN(1, 10, 8, widths=(4,))
    step = training_step(net, randn(8, 1, 8, 8), tensor([0, 1, 2, 3] * 2))
    step()
    with Profile() as p:
        step()
    flops = Counter[str]()
    for row in summarize(p):
        flops[row.name.removesuffix("_relu")] += row.flops or 0  # a layer may come in one with its ReLU
    assert flops["convolution"] == flops["convolution_weight_gradient"] == 2 * 8 * 4 * 64 * 9
    assert flops["linear"] * 2 == flops["linear_gradients"] == 4 * 8 * (64 * 128 + 1280)
    assert {row.name for row in summarize(p, "line")} >= {user_line(p.events[0].place), "(SGD.step)"}
    held = [size for _, size in p.memory]
    assert held[-1] < p.peak_memory == max(held)  # what backward needed is gone


# %% [markdown]
# ## Thinking questions
#
# 1. `exp` and `relu` both move 8 bytes an element. Why may one lie at its roof and the other far below?
# 2. A convolution runs at 90 % of the peak and takes 60 % of the time. How much can the program gain from anything
#    else, and what could make the convolution itself faster?
# 3. The row "Python between operations" is 40 % of a step. What would you try, in which order?
# 4. At the peak, half of the memory belongs to activations that backward will need. Which can be had in another way?
# 5. A profiler that slows a program by a tenth: which of its figures are still right, and which are not?

# %% [markdown]
# ## Summary
#
# One observer at the door sees every operation; shapes tell its arithmetic and its traffic, weak references its memory,
# and the call stack its layer and line. Self times add up to the wall time, and the roofline says what each operation
# could reach. Module 16 climbs to that roof; modules 17 to 20 lower what has to be done.


if __name__ == "__main__":
    run_module(globals())
