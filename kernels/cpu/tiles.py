"""Tiles of registers: ROWS numbers times two vectors, added up, as all products of matrices and convolutions need.

A CPU multiplies and adds two vectors at a time, and loads two. A tile of ROWS × 2 vectors of sums that stay in
registers needs ROWS + 2 loads for 2 ROWS products, so that its limit is arithmetic, and not memory. The tile is a tuple
of rows × columns vectors; its rows and columns are given as tuples of addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tinytorch.kernels.cpu.jit import CPU, kernel
from tinytorch.kernels.cpu.vectors import F32, I32, I64, LANES, VECTOR, address, call, floats, pointer_at, splat, vector

__all__ = ["FEW_ROWS", "PAIR", "ROWS", "VECTOR_BYTES", "line_from", "load_tile", "products", "products_in_steps",
           "rectified", "rows_from", "spread", "store_tile", "transpose", "turn"]  # fmt: skip

ROWS = 8 if CPU == "avx512" else 4  # of a tile; with two vectors each they fill half of the registers
FEW_ROWS = ROWS // 2  # of a tile where no more are left
PAIR = 16  # bytes of two shifts
VECTOR_BYTES = 4 * LANES
LINE = 64  # bytes that a CPU's cache moves at once


@kernel(inline="always")
def line_from(scratch):
    """Where a scratch's first line of the CPU's cache begins: a vector that lies in two lines takes twice as long.

    To be asked where it is used, and not before: Numba frees an array behind the last place that names it.
    """
    return (address(scratch) + LINE - 1) // LINE * LINE


def at(b: Any, place: Any, kind: Any) -> Any:
    """LLVM: the value at an address."""
    return b.load(pointer_at(b, place, kind), align=4)


def parts_of(b: Any, pack: Any, kind: Any) -> list:
    """LLVM: what a tuple holds."""
    return [b.extract_value(pack, i) for i in range(kind.count)]


def packed(context: Any, b: Any, kind: Any, parts: list) -> Any:
    """LLVM: a tuple."""
    pack = ir.Constant(context.get_value_type(kind), ir.Undefined)
    for i, part in enumerate(parts):
        pack = b.insert_value(pack, part, i)
    return pack


def tile_type(rows: Any, columns: Any) -> Any:
    return types.UniTuple(vector, rows.count * columns.count)


def row_or_last(b: Any, i: int, last: Any) -> Any:
    """LLVM: the smaller of two rows' numbers."""
    row = ir.Constant(I64, i)
    return b.select(b.icmp_signed("<", row, last), row, last)


@intrinsic(prefer_literal=True)
def rows_from(typing, first, step, last, count):
    """The addresses of `count` rows, of which the `last` is repeated: a tile at an edge computes some results twice."""
    kind = types.UniTuple(types.int64, count.literal_value)

    def generate(context, b, signature, arguments):
        first, step, last, _ = arguments
        return packed(context, b, kind, [b.add(first, b.mul(row_or_last(b, i, last), step)) for i in range(kind.count)])

    return kind(types.int64, types.int64, types.int64, count), generate


@intrinsic
def spread(typing, rows, columns):
    """A tile with the number at each row's address in the whole row."""
    kind = tile_type(rows, columns)

    def generate(context, b, signature, arguments):
        numbers = [splat(b, at(b, row, F32)) for row in parts_of(b, arguments[0], rows)]
        return packed(context, b, kind, [number for number in numbers for _ in range(columns.count)])

    return kind(rows, columns), generate


@intrinsic
def load_tile(typing, rows, columns):
    """A tile from memory: the vectors at each row's address + each column's."""
    kind = tile_type(rows, columns)

    def generate(context, b, signature, arguments):
        starts, shifts = parts_of(b, arguments[0], rows), parts_of(b, arguments[1], columns)
        return packed(context, b, kind, [at(b, b.add(start, shift), VECTOR) for start in starts for shift in shifts])

    return kind(rows, columns), generate


@intrinsic
def store_tile(typing, tile, rows, columns):
    """The same into memory."""

    def generate(context, b, signature, arguments):
        parts = iter(parts_of(b, arguments[0], tile))
        for start in parts_of(b, arguments[1], rows):
            for shift in parts_of(b, arguments[2], columns):
                b.store(next(parts), b.inttoptr(b.add(start, shift), VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(tile, rows, columns), generate


@intrinsic
def rectified(typing, tile):
    """max(a tile, 0); nan stays."""

    def generate(context, b, signature, arguments):
        zeros = ir.Constant(VECTOR, [0.0] * LANES)
        parts = parts_of(b, arguments[0], tile)
        return packed(context, b, tile, [b.select(b.fcmp_unordered(">=", v, zeros), v, zeros) for v in parts])

    return tile(tile), generate


@intrinsic
def add_product(typing, tile, rows, columns, row_shift, column_shift):
    """tile[i, j] += number at rows[i] + row_shift · vector at columns[j] + column_shift."""

    def generate(context, b, signature, arguments):
        # What claims to change all memory, and does nothing: no load of the next product is moved ahead of this one,
        # where it would take registers from the tile.
        b.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)
        tile_now, row_starts, column_starts, row_shift, column_shift = arguments
        sums = iter(parts_of(b, tile_now, tile))
        vectors = [at(b, b.add(column, column_shift), VECTOR) for column in parts_of(b, column_starts, columns)]
        parts = []
        for row in parts_of(b, row_starts, rows):
            number = splat(b, at(b, b.add(row, row_shift), F32))
            parts += [call(b, f"llvm.fmuladd.v{LANES}f32", VECTOR, [number, v, next(sums)]) for v in vectors]
        return packed(context, b, tile, parts)

    return tile(tile, rows, columns, types.int64, types.int64), generate


@intrinsic
def shift_at(typing, address):
    """The int64 at an address."""
    return types.int64(types.int64), lambda context, b, signature, arguments: at(b, arguments[0], I64)


@kernel(forceinline=True)
def products(tile, rows, columns, shifts, count):
    """Add up `count` products of a column of numbers and a row of vectors; where they lie stands in pairs of shifts."""
    for place in range(shifts, shifts + PAIR * count, PAIR):
        tile = add_product(tile, rows, columns, shift_at(place), shift_at(place + 8))
    return tile


@kernel(forceinline=True)
def products_in_steps(tile, rows, columns, row_step, column_step, count):
    """The same where both lie in equal steps, in bytes."""
    row_shift = column_shift = 0
    for _ in range(count):
        tile = add_product(tile, rows, columns, row_shift, column_shift)
        row_shift += row_step
        column_shift += column_step
    return tile


# -- turning rows into columns -----------------------------------------------------------------------------------------


def choice(lanes: Sequence[int]) -> Any:
    """LLVM: which lanes of two vectors, counted through, a shuffle takes."""
    return ir.Constant(ir.VectorType(I32, LANES), list(lanes))


@intrinsic
def transpose(typing, target, target_step, source, step, last):
    """LANES rows of a vector each, `step` bytes apart and the `last` repeated, into columns, `target_step` apart."""

    def generate(context, b, signature, arguments):
        target, target_step, source, step, last = arguments
        rows = [at(b, b.add(source, b.mul(row_or_last(b, i, last), step)), VECTOR) for i in range(LANES)]
        swap = 1
        while swap < LANES:  # the two off-diagonal quarters of each block of 2 · swap change places
            upper = [LANES + lane - swap if lane & swap else lane for lane in range(LANES)]
            lower = [LANES + lane if lane & swap else lane + swap for lane in range(LANES)]
            for i in (i for i in range(LANES) if not i & swap):
                both = rows[i], rows[i + swap]
                rows[i], rows[i + swap] = (b.shuffle_vector(*both, choice(lanes)) for lanes in (upper, lower))
            swap *= 2
        for i, row in enumerate(rows):
            place = b.add(target, b.mul(target_step, ir.Constant(I64, i)))
            b.store(row, b.inttoptr(place, VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@kernel
def turn(target, source, pixels, plane, channels):
    """(channels, pixels) into (pixels, LANES); what is in lanes beyond the channels does not matter."""
    if pixels >= LANES:
        for first in range(0, pixels, LANES):
            start = min(first, pixels - LANES)  # the last block overlaps the one before
            transpose(target + start * VECTOR_BYTES, VECTOR_BYTES, source + 4 * start, 4 * plane, channels - 1)
    else:
        to, out_of = floats(target, pixels * LANES), floats(source, (channels - 1) * plane + pixels)
        for pixel in range(pixels):
            for channel in range(channels):
                to[pixel * LANES + channel] = out_of[channel * plane + pixel]
