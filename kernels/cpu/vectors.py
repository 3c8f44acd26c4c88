"""Vectors for kernels: `LANES` float32 that stay in one register of the CPU.

Compilers turn simple loops into vector instructions, but not a tile of accumulators that has to stay in registers. In
a kernel, `a = load(address)` is a vector; `a * b + c`, `fma(a, b, c)`, `maximum(a, b)` work on all lanes at once.
Addresses are integers, in bytes. Nothing checks them.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from tinytorch.kernels.cpu.jit import LANES, kernel

__all__ = ["LANES", "address", "address_of", "apart", "blank", "broadcast", "floats", "fma", "keep", "largest", "load",
           "load_part", "maximum", "minimum", "store", "store_part", "total", "where_equal", "where_less"]  # fmt: skip

F32, I1, I32, I64 = ir.FloatType(), ir.IntType(1), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)


class VectorType(types.Type):
    """Numba's type of a vector."""

    def __init__(self) -> None:
        super().__init__(name=f"Vector(float32, {LANES})")


vector = VectorType()


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, VECTOR)


def splat(b: Any, scalar: Any, lanes: int = LANES) -> Any:
    """LLVM: a scalar in every lane."""
    kind = ir.VectorType(scalar.type, lanes)
    nothing = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(nothing, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def pointer_at(b: Any, place: Any, kind: Any, distance: int = 0) -> Any:
    """LLVM: the pointer to something of that kind, so many bytes behind an address."""
    return b.inttoptr(b.add(place, ir.Constant(I64, distance)), kind.as_pointer())


def call(b: Any, name: str, result: Any, arguments: list) -> Any:
    """LLVM: call one of its own functions."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def part_mask(b: Any, count: Any) -> Any:
    """LLVM: true in the first `count` lanes."""
    lanes = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
    return b.icmp_signed("<", lanes, splat(b, count))


@intrinsic
def address(typing, array):
    """Where an array's first element lies."""

    def generate(context, b, signature, arguments):
        return b.ptrtoint(context.make_array(signature.args[0])(context, b, arguments[0]).data, I64)

    return types.int64(array), generate


@kernel
def address_of(array):
    """The same for Python, in a quarter of the time that `array.ctypes.data` takes."""
    return address(array)


@intrinsic
def apart(typing):
    """Keep the function that this stands in as one, which others call and do not take in.

    Alone, LLVM finds registers for all that its loop needs; and each copy of it would take time to compile.
    """

    def generate(context, b, signature, arguments):
        b.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def blank(typing):
    """A vector of zeros."""
    return vector(), lambda context, b, signature, arguments: ir.Constant(VECTOR, [0.0] * LANES)


@intrinsic
def broadcast(typing, scalar):
    """A float32 in every lane."""

    def generate(context, b, signature, arguments):
        return splat(b, context.cast(b, arguments[0], signature.args[0], types.float32))

    return vector(scalar), generate


@intrinsic
def load(typing, address):
    """The LANES float32 from an address on."""

    def generate(context, b, signature, arguments):
        return b.load(b.inttoptr(arguments[0], VECTOR.as_pointer()), align=4)

    return vector(types.int64), generate


@intrinsic
def load_part(typing, address, count):
    """The first `count` float32 from an address on, and zeros; no memory behind them is touched."""

    def generate(context, b, signature, arguments):
        pointer = b.inttoptr(arguments[0], VECTOR.as_pointer())
        zeros = ir.Constant(VECTOR, [0.0] * LANES)
        name = f"llvm.masked.load.v{LANES}f32.p0"
        return call(b, name, VECTOR, [pointer, ir.Constant(I32, 4), part_mask(b, arguments[1]), zeros])

    return vector(types.int64, types.int64), generate


@intrinsic
def keep(typing, value, count):
    """The first `count` lanes, and zeros."""

    def generate(context, b, signature, arguments):
        return b.select(part_mask(b, arguments[1]), arguments[0], ir.Constant(VECTOR, [0.0] * LANES))

    return vector(vector, types.int64), generate


@intrinsic
def store(typing, address, value):
    """Write a vector to an address."""

    def generate(context, b, signature, arguments):
        b.store(arguments[1], b.inttoptr(arguments[0], VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vector), generate


@intrinsic
def store_part(typing, address, value, count):
    """Write the first `count` lanes to an address, and nothing behind them."""

    def generate(context, b, signature, arguments):
        pointer = b.inttoptr(arguments[0], VECTOR.as_pointer())
        name = f"llvm.masked.store.v{LANES}f32.p0"
        call(b, name, ir.VoidType(), [arguments[1], pointer, ir.Constant(I32, 4), part_mask(b, arguments[2])])
        return context.get_dummy_value()

    return types.void(types.int64, vector, types.int64), generate


@intrinsic
def fma(typing, a, b, c):
    """a b + c in every lane, rounded once where the CPU can."""

    def generate(context, builder, signature, arguments):
        return call(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, list(arguments))

    return vector(vector, vector, vector), generate


@intrinsic
def maximum(typing, a, b):
    """The larger in every lane; a's where one is nan."""

    def generate(context, builder, signature, arguments):
        larger = builder.fcmp_unordered(">=", *arguments)
        return builder.select(larger, *arguments)

    return vector(vector, vector), generate


@intrinsic
def minimum(typing, a, b):
    """The smaller in every lane; a's where one is nan."""

    def generate(context, builder, signature, arguments):
        smaller = builder.fcmp_unordered("<=", *arguments)
        return builder.select(smaller, *arguments)

    return vector(vector, vector), generate


def where(predicate: str) -> Any:
    """The instruction: `value` in the lanes where a and b compare so, `other` elsewhere. nan compares with nothing."""

    @intrinsic
    def chosen(typing, a, b, value, other):
        def generate(context, builder, signature, arguments):
            a, b, value, other = arguments
            return builder.select(builder.fcmp_ordered(predicate, a, b), value, other)

        return vector(vector, vector, vector, vector), generate

    return chosen


where_less, where_equal = where("<"), where("==")


@intrinsic
def largest(typing, a):
    """The largest of all lanes; any of them where one is nan."""

    def generate(context, b, signature, arguments):
        lanes, values = LANES, arguments[0]
        while lanes > 1:  # compare one half with the other
            lanes //= 2
            places = (range(lanes), range(lanes, 2 * lanes))
            masks = [ir.Constant(ir.VectorType(I32, lanes), list(half)) for half in places]
            halves = [b.shuffle_vector(values, values, mask) for mask in masks]
            values = b.select(b.fcmp_unordered(">=", *halves), *halves)
        return b.extract_element(values, ir.Constant(I32, 0))

    return types.float32(vector), generate


@intrinsic
def total(typing, a):
    """The sum of all lanes."""

    def generate(context, b, signature, arguments):
        function = ir.FunctionType(F32, [F32, VECTOR])
        add = cgutils.get_or_insert_function(b.module, function, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return b.call(add, [ir.Constant(F32, -0.0), arguments[0]], fastmath=("reassoc",))

    return types.float32(vector), generate


def _elementwise(sign: Any, instruction: str) -> None:
    @intrinsic
    def compute(typing, a, b):
        return vector(vector, vector), lambda context, builder, signature, arguments: getattr(builder, instruction)(
            *arguments
        )

    @overload(sign)
    def implement(a, b):
        if isinstance(a, VectorType) and isinstance(b, VectorType):
            return lambda a, b: compute(a, b)
        return None


for _sign, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"),
                            (operator.truediv, "fdiv")):  # fmt: skip
    _elementwise(_sign, _instruction)


@intrinsic
def floats(typing, address, count):
    """`count` float32 from an address on, as an array."""
    kind = types.Array(types.float32, 1, "C")

    def generate(context, b, signature, arguments):
        array = context.make_array(kind)(context, b)
        itemsize = ir.Constant(I64, 4)
        context.populate_array(
            array, data=b.inttoptr(arguments[0], F32.as_pointer()), shape=cgutils.pack_array(b, [arguments[1]]),
            strides=cgutils.pack_array(b, [itemsize]), itemsize=itemsize, meminfo=None,
        )  # fmt: skip
        return array._getvalue()

    return kind(types.int64, types.int64), generate
