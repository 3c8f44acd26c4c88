"""Products of float32 matrices by AMX, the matrix unit of Intel's newer CPUs, as exact as float32's own.

AMX has eight registers of 1 KB, tiles. One instruction multiplies a tile of 16 × 32 bfloat16 with one of 32 × 16 and
adds that to a tile of 16 × 16 float32: 8,192 products in 16 cycles, sixteen times what vectors of float32 do. A
bfloat16 has 8 of the 24 bits of a float32. So each number is split into three that add up to it exactly, high + middle
+ low, and of the nine products of two such sums six are added up, the smallest first; each of the other three is below
2⁻²⁴ of the whole. That takes six times as long, and is still more than twice as fast as vectors. The small products
are rounded where they are added to the large ones, so errors are those of a sum of float32: of usual numbers half of
NumPy's, of numbers from 10⁻⁹ to 10⁹ in one row up to twice them. (G. Henry, P. Tang, A. Heinecke: Leveraging the
bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations, ARITH 2019.)

What the parts cannot have: a part below 2⁻¹²⁶ counts as 0, so that the result may differ by 2⁻¹²⁶ times the sum of the
other matrix's numbers; and infinity and nan have no parts. They are noticed while numbers are split; then the result is
of no use, and vectors have to make it.

Both matrices are split into panels of 16 rows, or columns, in the order in which tiles are loaded. A panel has for each
DEPTHS numbers a block of three tiles: high, middle, low. Steps and addresses are in bytes.
"""

from __future__ import annotations

import ctypes
import math
import platform
import sys
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from tinytorch.kernels.cpu.jit import features, kernel
from tinytorch.kernels.cpu.lines import copy_block, load_some
from tinytorch.kernels.cpu.normalization import WIDE, add_rows
from tinytorch.kernels.cpu.tiles import line_from, transpose
from tinytorch.kernels.cpu.vectors import I32, I64, LANES, VECTOR, address, apart, blank, call, pointer_at, vector

__all__ = ["dealt", "gradients_on_cores", "gradients_serially", "multiply_on_cores", "multiply_serially", "permitted"]

SIDE = 16  # rows of a tile
LINE = 64  # bytes of a tile's row
DEPTHS = 32  # products that one instruction adds up
TILE = SIDE * LINE
PARTS = 3
BLOCK = PARTS * TILE
PAIR = 2 * SIDE  # rows and columns that are computed at once: four tiles of sums, and twice two of factors
DEPTH = 512  # products that are added up in registers
RIGHT_BYTES, LEFT_BYTES = 1024 << 10, 384 << 10  # of panels at once, for a second-level cache of 2 MB
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18  # from Linux's headers


@cache
def permitted() -> bool:
    """Whether there is an AMX, and the system lets this process use it. Linux does if it is asked."""
    if not {"amx-tile", "amx-bf16", "avx512bw"} <= features() or sys.platform != "linux":
        return False
    if platform.machine() != "x86_64" or LANES != SIDE:
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0


# -- instructions ------------------------------------------------------------------------------------------------------

I8, I16 = ir.IntType(8), ir.IntType(16)
SHAPES = np.zeros(64, np.uint8)  # what all tiles are like: the first of AMX's palettes, LINE bytes in SIDE rows
SHAPES[0], SHAPES[16:32:2], SHAPES[48:56] = 1, LINE, SIDE


def instruct(b: Any, name: str, *operands: Any) -> None:
    """LLVM: an instruction; an int is a tile's number."""
    call(b, f"llvm.x86.{name}", ir.VoidType(), [ir.Constant(I8, x) if isinstance(x, int) else x for x in operands])


@intrinsic
def open_tiles(typing, shapes):
    """Begin to use tiles."""

    def generate(context, b, signature, arguments):
        instruct(b, "ldtilecfg", pointer_at(b, arguments[0], I8))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def close_tiles(typing):
    """End it: a thread whose tiles are in use takes longer to be put aside."""

    def generate(context, b, signature, arguments):
        instruct(b, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def moving(instruction: str) -> Any:
    @intrinsic
    def move(typing, place, step):
        """PAIR × PAIR float32, rows a step apart: tiles 0 and 1, and below them 2 and 3."""

        def generate(context, b, signature, arguments):
            first, step = arguments
            second = b.add(first, b.mul(step, ir.Constant(I64, SIDE)))
            for tile in range(4):
                row = second if tile > 1 else first
                instruct(b, instruction, tile, pointer_at(b, row, I8, LINE * (tile % 2)), step)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return move


load_sums, store_sums = moving("tileloadd64"), moving("tilestored64")

# Parts of the left and of the right block. From one to the next, one of the two stays in its tiles.
PRODUCTS = ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0))


@intrinsic
def add_products(typing, upper, lower, left, right):
    """Tiles 0 to 3 += the product of two blocks of rows and two of columns, by way of tiles 4 to 7."""

    def generate(context, b, signature, arguments):
        step, loaded = ir.Constant(I64, LINE), [None] * 4
        for row_part, column_part in PRODUCTS:
            for i, part in enumerate((row_part, row_part, column_part, column_part)):
                if loaded[i] != part:
                    instruct(b, "tileloadd64", 4 + i, pointer_at(b, arguments[i], I8, TILE * part), step)
                    loaded[i] = part
            for tile in range(4):
                instruct(b, "tdpbf16ps", tile, 4 + tile // 2, 6 + tile % 2)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


# -- splitting ---------------------------------------------------------------------------------------------------------

INTS, HALVES = ir.VectorType(I32, SIDE), ir.VectorType(I16, DEPTHS)
LEAST_TOO_LARGE = 0x7F7F8000  # the bits of a float32 whose high part would be infinity


def each(value: int) -> Any:
    """LLVM: an int in every lane."""
    return ir.Constant(INTS, [value] * SIDE)


def parts_of(b: Any, x: Any) -> list:
    """LLVM: high, middle and low part of every lane, each in the upper half of its 32 bits."""
    parts = []
    for _ in range(PARTS - 1):
        rounded = b.and_(b.add(b.bitcast(x, INTS), each(0x8000)), each(0xFFFF0000))
        x = b.fsub(x, b.bitcast(rounded, VECTOR))  # exact
        parts.append(b.bitcast(rounded, HALVES))
    return [*parts, b.bitcast(x, HALVES)]  # the rest has 8 bits, and needs no rounding


def splitting(order: list[int]) -> Any:
    @intrinsic
    def split(typing, target, a, b, largest):
        """Write a line of each of three tiles: the parts of two vectors, in this order. Returns: the bits of the
        largest number so far, as `too_large` takes them."""

        def generate(context, builder, signature, arguments):
            target, *pair, largest = arguments
            largest = builder.bitcast(largest, INTS)
            for x in pair:
                positive = builder.and_(builder.bitcast(x, INTS), each(0x7FFFFFFF))
                largest = call(builder, f"llvm.umax.v{SIDE}i32", INTS, [largest, positive])
            both = zip(*(parts_of(builder, x) for x in pair), strict=True)
            for part, (first, second) in enumerate(both):
                line = builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, DEPTHS), order))
                place = builder.add(target, ir.Constant(I64, TILE * part))
                builder.store(line, builder.inttoptr(place, HALVES.as_pointer()), align=LINE)
            return builder.bitcast(largest, VECTOR)

        return vector(types.int64, vector, vector, vector), generate

    return split


UPPER = [2 * lane + 1 for lane in range(DEPTHS)]  # the upper halves of all lanes
split_in_turn = splitting(UPPER)  # a row of the left factor
split_in_pairs = splitting([UPPER[lane + half] for lane in range(SIDE) for half in (0, SIDE)])  # two rows of the right


@intrinsic
def too_large(typing, largest):
    """Whether a number was not finite, or so large that it has no parts."""

    def generate(context, b, signature, arguments):
        most = call(b, f"llvm.vector.reduce.umax.v{SIDE}i32", I32, [b.bitcast(arguments[0], INTS)])
        return b.icmp_unsigned(">=", most, ir.Constant(I32, LEAST_TOO_LARGE))

    return types.boolean(vector), generate


def fetching(write: bool) -> Any:
    @intrinsic
    def fetch(typing, place):
        """Have a line of the cache brought nearer, which may lie anywhere."""

        def generate(context, b, signature, arguments):
            how = [ir.Constant(I32, n) for n in (int(write), 3, 1)]
            call(b, "llvm.prefetch.p0", ir.VoidType(), [pointer_at(b, arguments[0], I8), *how])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return fetch


fetch, fetch_to_write = fetching(False), fetching(True)


@kernel
def split_block(target, source, ahead, line_step, depth_step, lines, depth, turned, scratch, largest):
    """At most SIDE lines of at most DEPTHS numbers into a block; zeros where there are no more. What lies `ahead` is
    split next."""
    to = scratch if turned else target
    if depth_step == 4:
        for line in range(SIDE):
            place, rest = source + line * line_step, depth if line < lines else 0
            fetch(place + ahead)
            fetch(place + ahead + LINE)
            first, second = load_some(place, rest), load_some(place + LINE, rest - LANES)
            largest = split_in_turn(to + LINE * line, first, second, largest)
    else:
        for pair in range(SIDE):
            place, rest = source + 2 * pair * depth_step, depth - 2 * pair
            first = load_some(place, lines if rest > 0 else 0)
            second = load_some(place + depth_step, lines if rest > 1 else 0)
            fetch(place + ahead)
            fetch(place + ahead + depth_step)
            largest = split_in_pairs(to + LINE * pair, first, second, largest)
    if turned:  # a pair of bfloat16 moves like a float32
        for tile in range(0, BLOCK, TILE):
            transpose(target + tile, np.int64(LINE), scratch + tile, np.int64(LINE), np.int64(SIDE - 1))
    return largest


@kernel
def split(target, source, line_step, depth_step, lines, depth, left, scratch, largest):
    """Split lines into panels, the left or the right factor's. One of the steps is 4."""
    apart()
    by_lines = depth_step == 4  # which way it lies in memory, in which it is read
    panels, blocks, turned = -(-lines // SIDE), -(-depth // DEPTHS), by_lines != left
    next_panel = next_block = 0
    for _ in range(panels * blocks):
        panel, block = next_panel, next_block
        if by_lines:
            next_block += 1
            if next_block == blocks:
                next_panel, next_block = panel + 1, 0
        else:
            next_panel += 1
            if next_panel == panels:
                next_panel, next_block = 0, block + 1
        place = source + panel * SIDE * line_step + block * DEPTHS * depth_step
        ahead = (next_panel - panel) * SIDE * line_step + (next_block - block) * DEPTHS * depth_step
        largest = split_block(
            target + (panel * blocks + block) * BLOCK, place, ahead, line_step, depth_step, lines - panel * SIDE,
            depth - block * DEPTHS, turned, scratch, largest,
        )  # fmt: skip
    return largest


# -- products ----------------------------------------------------------------------------------------------------------


@kernel
def product_pair(start, start_step, left, right, blocks, target, step):
    """PAIR × PAIR results: what lies at `start`, and the sum over the depths of two panels of rows, two of columns."""
    apart()
    lower, next_right = left + blocks * BLOCK, right + blocks * BLOCK
    load_sums(start, start_step)
    for row in range(target, target + PAIR * step, step):  # where the next pair is to be stored
        fetch_to_write(row + 2 * LINE)
        fetch_to_write(row + 3 * LINE)
    for block in range(0, blocks * BLOCK, BLOCK):
        add_products(left + block, lower + block, right + block, next_right + block)
    store_sums(target, step)


@kernel
def product_block(start, begun, left, right, blocks, target, line, rows, columns, narrow):
    """All results of some panels of rows and of columns; from `start` on, the same for all rows, unless `begun`."""
    for i in range(0, rows, PAIR):
        for j in range(0, columns, PAIR):
            tall, broad = min(PAIR, rows - i), min(PAIR, columns - j)
            place, upper = target + i * line + 4 * j, left + i // SIDE * blocks * BLOCK
            here, step, whole = place, line, tall == PAIR == broad
            if not whole:
                here, step = narrow, 4 * PAIR
                if begun:
                    copy_block(here, step, place, line, tall, broad)
            before, before_step = (here, step) if begun else (start + 4 * j, 0)
            product_pair(before, before_step, upper, right + j // SIDE * blocks * BLOCK, blocks, here, step)
            if not whole:
                copy_block(place, line, here, step, tall, broad)


@kernel(inline="always")
def share(length, part, parts):
    """One core's share of rows or columns: whole PAIRs."""
    pairs = -(-length // PAIR)
    return pairs * part // parts * PAIR, min(length, pairs * (part + 1) // parts * PAIR)


@kernel(inline="always")
def even(length, most):
    """A length in equal pieces: how long they are, at most so much, whole PAIRs."""
    pairs, most_pairs = -(-length // PAIR), max(most // PAIR, 1)
    pieces = -(-pairs // most_pairs)
    return -(-pairs // pieces) * PAIR


@kernel
def multiply(part, parts, a, row_step, left_step, b, depth_step, column_step, bias, out, depth, across):
    """One core's share of a product: some rows and columns of the results.

    Args:
        a, b: addresses; of the steps from element to element, one is 4 in each.
        bias: (columns,), or of no length.
        across: how many of the parts lie side by side.

    Returns: whether a factor has numbers that the result is not right for.
    """
    (rows, columns), across = out.shape, min(across, parts)
    top, bottom = share(rows, part // across, parts // across)
    begin_column, end_column = share(columns, part % across, across)
    if bottom <= top or end_column <= begin_column:
        return False
    pieces = -(-depth // DEPTH)
    most = -(-depth // (pieces * DEPTHS)) * DEPTHS
    bytes_of_panel, width = most // DEPTHS * BLOCK, end_column - begin_column
    wide = even(width, RIGHT_BYTES // bytes_of_panel * SIDE)
    high = even(bottom - top, LEFT_BYTES // bytes_of_panel * SIDE)
    left_panels = np.empty((high // SIDE * bytes_of_panel + LINE) // 4, np.float32)
    right_panels = np.empty((wide // SIDE * bytes_of_panel + LINE) // 4, np.float32)
    scratch, narrow = np.empty((BLOCK + LINE) // 4, np.float32), np.empty(PAIR * PAIR + LINE // 4, np.float32)
    start, line, largest = np.zeros(-(-columns // PAIR) * PAIR, np.float32), 4 * columns, blank()
    for i in range(len(bias)):
        start[i] = bias[i]
    open_tiles(address(SHAPES))
    for begin in range(0, depth, most):
        deep = min(most, depth - begin)
        blocks = -(-deep // DEPTHS)
        for column in range(begin_column, end_column, wide):
            some = min(wide, end_column - column)
            largest = split(line_from(right_panels), b + column * column_step + begin * depth_step, column_step,
                            depth_step, some, deep, False, line_from(scratch), largest)  # fmt: skip
            for row in range(top, bottom, high):
                few = min(high, bottom - row)
                largest = split(line_from(left_panels), a + row * row_step + begin * left_step, row_step, left_step,
                                few, deep, True, line_from(scratch), largest)  # fmt: skip
                product_block(
                    address(start) + 4 * column, begin > 0, line_from(left_panels), line_from(right_panels), blocks,
                    address(out) + row * line + 4 * column, line, few, some, line_from(narrow),
                )  # fmt: skip
    close_tiles()
    return too_large(largest)


@kernel
def multiply_serially(parts, *product):
    return multiply(0, 1, *product)


@kernel(parallel=True)
def multiply_on_cores(parts, *product):
    bad = 0
    for part in prange(parts):
        bad += multiply(np.int64(part), parts, *product)
    return bad > 0


@kernel
def gradients_part(part, parts, to_x, to_weight, g, sums):
    """A share of two products and of the sums of g's columns, as in `matmul.py`."""
    bad = multiply(part, parts, *to_x) | multiply(part, parts, *to_weight)
    blocks = -(-len(sums) // WIDE)
    add_rows(g, sums, blocks * part // parts, blocks * (part + 1) // parts)
    return bad


@kernel
def gradients_serially(parts, *arguments):
    return gradients_part(0, 1, *arguments)


@kernel(parallel=True)
def gradients_on_cores(parts, to_x, to_weight, g, sums):
    bad = 0
    for part in prange(parts):
        bad += gradients_part(np.int64(part), parts, to_x, to_weight, g, sums)
    return bad > 0


@cache
def dealt(parts: int, rows: int, columns: int) -> int:
    """Over how many parts the columns of a result are dealt, so that a part computes little, and splits little."""

    def cost(across: int) -> tuple[int, int]:
        shares = -(-rows // PAIR) / (parts // across), -(-columns // PAIR) / across
        high, wide = (math.ceil(share) for share in shares)
        return high * wide, high + wide

    return min((across for across in range(1, parts + 1) if parts % across == 0), key=cost)
