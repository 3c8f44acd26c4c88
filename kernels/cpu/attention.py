"""Attention for the CPU: forward, backward, and for one new token, never with the matrix of all pairs.

For each pair of a batch and a head, a block of keys is packed so that it stays in the cache, and all queries pass by:
a few rows of scores are made, become weights and are used up. Each query keeps its largest score and its sum so far; a
later block with a larger score scales down what was gathered before. Everything that multiplies goes through one tile
of accumulators, `tile`, which stays in registers.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tinytorch.kernels.cpu.jit import CPU, cores, kernel, plain, run
from tinytorch.kernels.cpu.tiles import line_from, transpose
from tinytorch.kernels.cpu.vectors import (
    F32,
    I32,
    I64,
    LANES,
    VECTOR,
    address,
    address_of,
    apart,
    blank,
    broadcast,
    call,
    floats,
    fma,
    load,
    load_part,
    maximum,
    splat,
    store,
    store_part,
    total,
    vector,
)
from tinytorch.kernels.cpu.vectors import (
    largest as largest_lane,
)

__all__ = ["attention", "attention_gradients", "cached_attention"]

FLOAT = 4  # bytes
NEXT, FRESH = np.int64(FLOAT), np.int64(0)  # for `product`, which Numba would compile again for each Python int
WIDE = FLOAT * LANES  # bytes of a vector
ROWS = 8 if CPU == "avx512" else 4  # queries in a tile, which must divide LANES
KEYS = 64  # keys in a block: two blocks of 64 features are 32 KB, and leave room in the first cache
QUERIES = 64  # queries in a block, backward
HIDDEN = np.float32(-np.inf)
EXP_SERIES = (8.3125013e-3, 4.1890332e-2, 1.6667115e-1, 4.9999230e-1, 1.0, 1.0)  # 1.1e-7 from e^r, |r| < log(2) / 2

MOST_LEADS, ROW = 3, 4  # leading axes that `describe` has room for, and behind them the step from row to row

# -- instructions ------------------------------------------------------------------------------------------------------


def tile(rows: int, vectors: int) -> Any:
    """The instruction that the others serve: c = c · factors + a b, for `rows` x `vectors` accumulators.

    It adds up `depth` outer products, of a column of a with a row of b. All steps are in bytes. factors: the address of
    a number for each row of c, or 0 for a c that is only written.
    """

    @intrinsic
    def outer_products(typing, a, a_row, a_step, b, b_row, depth, c, c_row, factors):
        def generate(context, builder, signature, arguments):
            a, a_row, a_step, b, b_row, depth, c, c_row, factors = arguments

            def number(n):
                return ir.Constant(I64, n)

            def at(start, step, count):
                return builder.add(start, builder.mul(step, number(count)))

            def pointer(place, kind):
                return builder.inttoptr(place, kind.as_pointer())

            def target(row, j):
                return pointer(builder.add(at(c, c_row, row), number(j * WIDE)), VECTOR)

            sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(vectors)] for _ in range(rows)]
            with builder.if_else(builder.icmp_signed("==", factors, number(0))) as (fresh, more):
                with fresh:
                    for place in chain.from_iterable(sums):
                        builder.store(ir.Constant(VECTOR, [0.0] * LANES), place)
                with more:
                    for row in range(rows):
                        factor = builder.load(pointer(builder.add(factors, number(row * FLOAT)), F32), align=4)
                        for j, place in enumerate(sums[row]):
                            before = builder.load(target(row, j), align=4)
                            builder.store(builder.fmul(before, splat(builder, factor)), place)
            with cgutils.for_range(builder, depth) as loop:
                across = [builder.load(pointer(builder.add(builder.add(b, builder.mul(loop.index, b_row)),
                                                           number(j * WIDE)), VECTOR), align=4)
                          for j in range(vectors)]  # fmt: skip
                along = builder.mul(loop.index, a_step)
                for row in range(rows):
                    scalar = builder.load(pointer(builder.add(at(a, a_row, row), along), F32), align=4)
                    many = splat(builder, scalar)
                    for one, place in zip(across, sums[row], strict=True):
                        added = call(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, [many, one, builder.load(place)])
                        builder.store(added, place)
            for row in range(rows):
                for j, place in enumerate(sums[row]):
                    builder.store(builder.load(place), target(row, j), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return outer_products


tile_of_one, tile_of_two = tile(ROWS, 1), tile(ROWS, 2)
row_of_one, row_of_four = tile(1, 1), tile(1, 4)


@intrinsic
def hide(typing, a, count):
    """Minus infinity in all lanes but the first `count`."""

    def generate(context, builder, signature, arguments):
        a, count = arguments
        lanes = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
        seen = builder.icmp_signed("<", lanes, splat(builder, builder.trunc(count, I32)))
        return builder.select(seen, a, ir.Constant(VECTOR, [HIDDEN] * LANES))

    return vector(vector, types.int64), generate


@intrinsic
def exp_or_zero(typing, x):
    """e^x in every lane: within 3e-7 of it relatively, and 0 where it is below 1.2e-38, x below -87.3.

    As `vexp` in elementwise.py, but hidden scores are common here, and it takes the CPU 100 cycles to round a result
    below 1.2e-38. For weights, which add up to 1, that is as good as 0, and two coefficients fewer are enough.
    """

    def generate(context, builder, signature, arguments):
        (x,) = arguments

        def real(number):
            return ir.Constant(VECTOR, [float(np.float32(number))] * LANES)

        def integer(number):
            return splat(builder, ir.Constant(I32, number))

        def multiply_add(a, b, c):
            return call(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, [a, b, c])

        shifted = multiply_add(x, real(1.44269504), real(12582912.0))
        n = builder.sub(builder.bitcast(shifted, ir.VectorType(I32, LANES)), integer(0x4B400000))
        whole = builder.sitofp(n, VECTOR)
        r = multiply_add(whole, real(-0.693359375), x)
        r = multiply_add(whole, real(2.12194440e-4), r)
        result = real(EXP_SERIES[0])
        for coefficient in EXP_SERIES[1:]:
            result = multiply_add(result, r, real(coefficient))
        bits = builder.shl(builder.add(n, integer(127)), integer(23))
        result = builder.fmul(result, builder.bitcast(bits, VECTOR))
        return builder.select(builder.fcmp_ordered("<", x, real(-87.3)), real(0.0), result)

    return vector(vector), generate


# -- steps -------------------------------------------------------------------------------------------------------------


@kernel(inline="always")
def wide(count):
    """How many vectors hold `count` numbers."""
    return (count + LANES - 1) // LANES


@kernel
def product(a, a_row, a_step, b, b_row, depth, c, c_row, vectors, factors):
    """ROWS rows of c, `vectors` wide, become c · factors + a b: see `tile`."""
    apart()
    for j in range(0, (vectors - 1) * WIDE, 2 * WIDE):
        tile_of_two(a, a_row, a_step, b + j, b_row, depth, c + j, c_row, factors)
    if vectors % 2:
        last = (vectors - 1) * WIDE
        tile_of_one(a, a_row, a_step, b + last, b_row, depth, c + last, c_row, factors)


@kernel
def pack(source, source_row, rows, columns, target, factor):
    """Rows, multiplied, one below the other in scratch memory, each in whole vectors; the last one ends in zeros."""
    apart()
    times, rest, width = broadcast(factor), columns % LANES, wide(columns) * WIDE
    done = (columns - rest) * FLOAT
    for j in range(0, done, WIDE):
        for i in range(rows):
            store(target + i * width + j, load(source + i * source_row + j) * times)
    if rest:
        for i in range(rows):
            store(target + i * width + done, load_part(source + i * source_row + done, rest) * times)


@kernel
def unpack(source, rows, columns, target, target_row, factors):
    """Rows from scratch memory, each multiplied with its factor, to where nothing behind them may be touched."""
    apart()
    times, rest, width = floats(factors, rows), columns % LANES, wide(columns) * WIDE
    done = (columns - rest) * FLOAT
    for j in range(0, done, WIDE):
        for i in range(rows):
            store(target + i * target_row + j, load(source + i * width + j) * broadcast(times[i]))
    if rest:
        for i in range(rows):
            store_part(target + i * target_row + done, load(source + i * width + done) * broadcast(times[i]), rest)


@kernel(inline="always")
def fill(target, count, number):
    """A number in all lanes of `count` vectors."""
    for i in range(0, count * WIDE, WIDE):
        store(target + i, broadcast(number))


@kernel
def turn(source, row, count, columns, target, spare):
    """A block of keys transposed: each feature gets a row of KEYS numbers, with zeros up to a whole vector."""
    apart()
    for i in range(0, count, LANES):
        for j in range(0, columns, LANES):
            start, step = source + i * row + j * FLOAT, row
            if i + LANES > count or j + LANES > columns:
                fill(spare, LANES, 0.0)
                pack(start, row, min(LANES, count - i), min(LANES, columns - j), spare, np.float32(1))
                start, step = spare, WIDE
            transpose(target + (j * KEYS + i) * FLOAT, KEYS * FLOAT, start, step, LANES - 1)


@kernel
def masked(scores, vectors, keys, seen, step, mask, mask_row, rows):
    """Add a mask's rows to a tile of scores, and put minus infinity where a row does not see a key.

    Of `keys` keys, the first row sees `seen`, and each further row `step` more; what is hidden lies in the last vector.
    mask: an address, or 0 for none. rows: how many rows there are; those below them look at the last one's mask.
    """
    apart()
    last = (vectors - 1) * LANES
    for i in range(ROWS):
        at = scores + i * KEYS * FLOAT
        end = at + last * FLOAT
        if mask != 0:
            added = mask + min(i, rows - 1) * mask_row
            for j in range(0, last * FLOAT, WIDE):
                store(at + j, load(at + j) + load(added + j))
            store(end, load(end) + load_part(added + last * FLOAT, keys - last))
        store(end, hide(load(end), min(seen + i * step, keys) - last))


@kernel(inline="always")
def seen_by(row, start, keys, causal):
    """(how many of the `keys` keys from `start` on a query sees, how many more each next one, how many ROWS see)."""
    if causal and row + 1 < start + keys:
        return row + 1 - start, 1, min(keys, row + ROWS - start)
    return keys, 0, keys


@kernel(inline="always")
def pair_of(number, lead):
    """The places along three leading axes of a pair of a batch and a head."""
    return number // (lead[1] * lead[2]), number // lead[2] % lead[1], number % lead[2]


@kernel
def begin(x, pair):
    """The address of a pair's part of an array that `describe` has described."""
    return x[0] + pair[0] * x[1] + pair[1] * x[2] + pair[2] * x[3]


# -- forward -----------------------------------------------------------------------------------------------------------


@kernel
def soften(scores, vectors, peaks, totals, factors):
    """A tile of scores becomes e^(score - the row's largest so far).

    peaks, totals, factors: addresses of numbers for each row: its largest score and its sum so far, which are brought
    up to date, and what was gathered before has to be multiplied with, which is written.
    """
    apart()
    tops, sums, times = floats(peaks, ROWS), floats(totals, ROWS), floats(factors, ROWS)
    for i in range(ROWS):
        at, before = scores + i * KEYS * FLOAT, tops[i]
        highest = load(at)
        for j in range(WIDE, vectors * WIDE, WIDE):
            highest = maximum(highest, load(at + j))
        top = max(before, largest_lane(highest))
        if top == before:
            times[i] = 1
        else:
            times[i] = np.exp(before - top) if before > HIDDEN else np.float32(0)
        tops[i] = top
        base, added = broadcast(top if top > HIDDEN else np.float32(0)), blank()  # a row may have seen nothing
        for j in range(0, vectors * WIDE, WIDE):
            weights = exp_or_zero(load(at + j) - base)
            store(at + j, weights)
            added = added + weights
        sums[i] = sums[i] * times[i] + total(added)


@kernel
def forward_room(rows, features, width):
    """How many float32 `attend` works with."""
    padded, long, broad = wide(rows) * LANES, wide(features) * LANES, wide(width) * LANES
    return padded * (long + broad + 2) + KEYS * (long + broad + ROWS) + LANES * (LANES + 2)


@kernel
def attend(number, first, stop, lead, shape, places, largest, sums, scale, causal, scratch):
    """Attention of the queries from `first` to `stop` of a pair; first is a multiple of LANES.

    lead: three leading axes. shape: how many queries, keys, features and features of a value. places: what `describe`
    says of query, key, value, mask and out. largest, sums: (pairs, queries).
    """
    apart()
    query, key, value, mask, out = places[0], places[1], places[2], places[3], places[4]
    pair, rows, (_, keys, features, width) = pair_of(number, lead), stop - first, shape
    padded, across = wide(rows) * LANES, KEYS * FLOAT
    long, broad = wide(features) * WIDE, wide(width) * WIDE  # bytes of a row of queries, and of values
    queries = line_from(scratch)
    gathered = queries + padded * long
    key_block = gathered + padded * broad
    values = key_block + KEYS * long
    scores = values + KEYS * broad
    peaks = scores + ROWS * across
    totals = peaks + padded * FLOAT
    factors = totals + padded * FLOAT
    spare = factors + WIDE

    fill(queries + (padded - LANES) * long, long, 0.0)
    pack(begin(query, pair) + first * query[ROW], query[ROW], rows, features, queries, np.float32(scale))
    fill(gathered, padded * broad // WIDE, 0.0)
    fill(totals, padded // LANES, 0.0)
    fill(peaks, padded // LANES, HIDDEN)
    end = min(keys, stop) if causal else keys
    for start in range(0, end, KEYS):
        count = min(KEYS, end - start)
        turn(begin(key, pair) + start * key[ROW], key[ROW], count, features, key_block, spare)
        pack(begin(value, pair) + start * value[ROW], value[ROW], count, width, values, np.float32(1))
        for i in range(max(0, start - first) if causal else 0, rows, ROWS):
            seen, step, visible = seen_by(first + i, start, count, causal)
            vectors, sums_here = wide(visible), gathered + i * broad
            product(queries + i * long, long, NEXT, key_block, across, features, scores, across, vectors, FRESH)
            if mask[0] != 0 or seen < vectors * LANES:
                added = begin(mask, pair) + (first + i) * mask[ROW] + start * FLOAT if mask[0] != 0 else 0
                masked(scores, vectors, count, seen, step, added, mask[ROW], rows - i)
            soften(scores, vectors, peaks + i * FLOAT, totals + i * FLOAT, factors)
            product(scores, across, NEXT, values, broad, visible, sums_here, broad, wide(width), factors)

    tops, inverse = floats(peaks, rows), floats(totals, rows)
    for i in range(rows):
        size = inverse[i] if inverse[i] != 0 else np.float32(1)
        sums[number, first + i], inverse[i] = size, np.float32(1) / size
        largest[number, first + i] = tops[i] if tops[i] > HIDDEN else np.float32(0)
    unpack(gathered, rows, width, begin(out, pair) + first * out[ROW], out[ROW], totals)


@kernel(inline="always")
def forward_part(part, parts, piece, lead, shape, places, largest, sums, scale, causal):
    """One core's share: every `parts`-th task, which is `piece` queries of a pair."""
    splits = (shape[0] + piece - 1) // piece
    tasks = lead[0] * lead[1] * lead[2] * splits
    scratch = np.empty(forward_room(piece, shape[2], shape[3]), np.float32)
    for lap in range((tasks + parts - 1) // parts):
        # there and back: with a causal mask, a pair's later queries have more to do
        task = lap * parts + (parts - 1 - part if lap % 2 else part)
        if task < tasks:
            first = task % splits * piece
            stop = min(first + piece, shape[0])
            attend(task // splits, first, stop, lead, shape, places, largest, sums, scale, causal, scratch)


@kernel
def forward(parts, piece, lead, shape, places, largest, sums, scale, causal):
    forward_part(0, 1, piece, lead, shape, places, largest, sums, scale, causal)


@kernel(parallel=True)
def forward_spread(parts, piece, lead, shape, places, largest, sums, scale, causal):
    for part in numba.prange(parts):
        forward_part(np.int64(part), parts, piece, lead, shape, places, largest, sums, scale, causal)


# -- backward ----------------------------------------------------------------------------------------------------------


@kernel
def pack_changes(g, g_row, out, out_row, rows, width, sums, target, taken):
    """Rows of g, each divided by its weights' sum, as `pack` has them; and the sums of their products with out."""
    apart()
    means, rest, step = floats(taken, rows), width % LANES, wide(width) * WIDE
    done = (width - rest) * FLOAT
    for i in range(rows):
        times, added = broadcast(np.float32(1) / sums[i]), blank()
        for j in range(0, done, WIDE):
            change = load(g + i * g_row + j) * times
            store(target + i * step + j, change)
            added = fma(change, load(out + i * out_row + j), added)
        if rest:
            change = load_part(g + i * g_row + done, rest) * times
            store(target + i * step + done, change)
            added = fma(change, load_part(out + i * out_row + done, rest), added)
        means[i] = total(added)


@kernel
def slopes_of(scores, slopes, vectors, peaks, taken):
    """A tile of scores becomes the weights, times their sum; what the weights are to change, that of the scores.

    peaks, taken: addresses of numbers for each row: the largest score, and the sum of weights times their changes.
    """
    apart()
    tops, means = floats(peaks, ROWS), floats(taken, ROWS)
    for i in range(ROWS):
        at, top, mean = i * KEYS * FLOAT, broadcast(tops[i]), broadcast(means[i])
        for j in range(at, at + vectors * WIDE, WIDE):
            weights = exp_or_zero(load(scores + j) - top)
            store(scores + j, weights)
            store(slopes + j, weights * (load(slopes + j) - mean))


@kernel(inline="always")
def backward_room(queries, features, width):
    """How many float32 `attend_back` works with."""
    padded, long, broad = wide(queries) * LANES, wide(features) * LANES, wide(width) * LANES
    blocks = KEYS * (3 * long + 2 * broad + 2 * QUERIES + 1)
    return padded * (2 * long + broad + 2) + blocks + LANES * (LANES + 1)


@kernel
def attend_back(number, lead, shape, places, largest, sums, scale, causal, scratch):
    """The gradients of a pair. The arguments are those of `attend`; places: what `describe` says of g, … to_value."""
    apart()
    g, query, key, value, mask, out = places[0], places[1], places[2], places[3], places[4], places[5]
    to_query, to_key, to_value = places[6], places[7], places[8]
    pair, (queries, keys, features, width) = pair_of(number, lead), shape
    padded, across = wide(queries) * LANES, KEYS * FLOAT
    long, broad = wide(features) * WIDE, wide(width) * WIDE  # bytes of a row of queries, and of values
    asked = line_from(scratch)
    to_asked = asked + padded * long
    changes = to_asked + padded * long
    peaks = changes + padded * broad
    taken = peaks + padded * FLOAT
    key_rows = taken + padded * FLOAT
    key_block = key_rows + KEYS * long
    to_keys = key_block + KEYS * long
    value_block = to_keys + KEYS * long
    to_values = value_block + KEYS * broad
    scores = to_values + KEYS * broad
    slopes = scores + QUERIES * across
    ones = slopes + QUERIES * across
    spare = ones + KEYS * FLOAT

    fill(ones, KEYS // LANES, 1.0)
    fill(asked + (padded - LANES) * long, long, 0.0)
    fill(changes + (padded - LANES) * broad, broad, 0.0)
    fill(to_asked, padded * long // WIDE, 0.0)
    pack(begin(query, pair), query[ROW], queries, features, asked, np.float32(scale))
    # g is divided by the weights' sum here, and so the weights need not be
    pack_changes(begin(g, pair), g[ROW], begin(out, pair), out[ROW], queries, width, sums[number], changes, taken)
    tops, means = floats(peaks, padded), floats(taken, padded)
    for i in range(padded):
        tops[i] = largest[number, i] if i < queries else np.float32(0)
    for i in range(queries, padded):
        means[i] = 0

    for start in range(0, keys, KEYS):
        count = min(KEYS, keys - start)
        key_here, value_here = begin(key, pair) + start * key[ROW], begin(value, pair) + start * value[ROW]
        pack(key_here, key[ROW], count, features, key_rows, np.float32(1))
        turn(key_here, key[ROW], count, features, key_block, spare)
        turn(value_here, value[ROW], count, width, value_block, spare)
        fill(to_keys, KEYS * long // WIDE, 0.0)
        fill(to_values, KEYS * broad // WIDE, 0.0)
        for first in range(start if causal else 0, queries, QUERIES):
            stop = min(first + QUERIES, queries)
            for i in range(first, stop, ROWS):
                seen, step, visible = seen_by(i, start, count, causal)
                vectors, here, mean = wide(visible), (i - first) * across, taken + i * FLOAT
                product(asked + i * long, long, NEXT, key_block, across, features, scores + here, across,
                        vectors, FRESH)  # fmt: skip
                product(changes + i * broad, broad, NEXT, value_block, across, width, slopes + here, across,
                        vectors, FRESH)  # fmt: skip
                if mask[0] != 0 or seen < vectors * LANES:
                    added = begin(mask, pair) + i * mask[ROW] + start * FLOAT if mask[0] != 0 else 0
                    masked(scores + here, vectors, count, seen, step, added, mask[ROW], queries - i)
                slopes_of(scores + here, slopes + here, vectors, peaks + i * FLOAT, mean)
                product(slopes + here, across, NEXT, key_rows, long, visible, to_asked + i * long, long,
                        wide(features), ones)  # fmt: skip
            for j in range(0, count, ROWS):  # keys; of the queries, those that see one of them
                i = max(first, start + j) if causal else first
                here, depth = (i - first) * across + j * FLOAT, stop - i
                if depth > 0:
                    product(slopes + here, NEXT, across, asked + i * long, long, depth, to_keys + j * long, long,
                            wide(features), ones)  # fmt: skip
                    product(scores + here, NEXT, across, changes + i * broad, broad, depth, to_values + j * broad,
                            broad, wide(width), ones)  # fmt: skip
        unpack(to_keys, count, features, begin(to_key, pair) + start * to_key[ROW], to_key[ROW], ones)
        unpack(to_values, count, width, begin(to_value, pair) + start * to_value[ROW], to_value[ROW], ones)
    fill(taken, padded // LANES, np.float32(scale))
    unpack(to_asked, queries, features, begin(to_query, pair), to_query[ROW], taken)


@kernel(inline="always")
def backward_part(part, parts, lead, shape, places, largest, sums, scale, causal):
    """One core's share: every `parts`-th pair."""
    scratch = np.empty(backward_room(shape[0], shape[2], shape[3]), np.float32)
    for number in range(part, lead[0] * lead[1] * lead[2], parts):
        attend_back(number, lead, shape, places, largest, sums, scale, causal, scratch)


@kernel
def backward(parts, lead, shape, places, largest, sums, scale, causal):
    backward_part(0, 1, lead, shape, places, largest, sums, scale, causal)


@kernel(parallel=True)
def backward_spread(parts, lead, shape, places, largest, sums, scale, causal):
    for part in numba.prange(parts):
        backward_part(np.int64(part), parts, lead, shape, places, largest, sums, scale, causal)


# -- one new token -----------------------------------------------------------------------------------------------------


@kernel
def attend_cached(number, shape, query, key, value, lengths, out, scale, scratch):
    """Attention of the queries that share the keys of a sequence and a head, each over the first keys only.

    shape: (sequences, heads with keys of their own, queries for each, features, features of a value). query, out:
    (B, H, …). key, value: as `describe` has them. Each number of the cache is read from memory once, which takes longer
    than the arithmetic.
    """
    apart()
    (_, groups, each, features, width), rest, left = shape, shape[3] % LANES, shape[4] % LANES
    count, pair = lengths[number // groups], (0, number // groups, number % groups)
    keys, values, scores = begin(key, pair), begin(value, pair), address(scratch)
    weights, done, ready = floats(scores, wide(count) * LANES), (features - rest) * FLOAT, (width - left) * FLOAT
    for head in range(number * each, (number + 1) * each):  # of all sequences' queries
        asked, target = address(query) + head * features * FLOAT, address(out) + head * width * FLOAT
        for i in range(count):
            at, added = keys + i * key[ROW], blank()
            for j in range(0, done, WIDE):
                added = fma(load(asked + j), load(at + j), added)
            if rest:
                added = fma(load_part(asked + done, rest), load_part(at + done, rest), added)
            weights[i] = total(added) * np.float32(scale)
        for i in range(count, len(weights)):
            weights[i] = HIDDEN
        highest, sums = broadcast(HIDDEN), blank()
        for j in range(0, count * FLOAT, WIDE):
            highest = maximum(highest, load(scores + j))
        top = broadcast(largest_lane(highest))
        for j in range(0, count * FLOAT, WIDE):
            weight = exp_or_zero(load(scores + j) - top)
            store(scores + j, weight)
            sums = sums + weight
        four = ready // (4 * WIDE) * 4 * WIDE
        for j in range(0, four, 4 * WIDE):  # one pass over the values for four vectors of the result
            row_of_four(scores, 0, FLOAT, values + j, value[ROW], count, target + j, 0, 0)
        for j in range(four, ready, WIDE):
            row_of_one(scores, 0, FLOAT, values + j, value[ROW], count, target + j, 0, 0)
        if left:
            added = blank()
            for i in range(count):
                added = fma(broadcast(weights[i]), load_part(values + i * value[ROW] + ready, left), added)
            store_part(target + ready, added, left)
        results, times = floats(target, width), np.float32(1) / total(sums) if count else np.float32(0)
        for j in range(width):
            results[j] *= times


@kernel(inline="always")
def cached_part(part, parts, shape, query, key, value, lengths, out, scale):
    """One core's share: every `parts`-th pair of a sequence and a head with keys of its own."""
    scratch = np.empty((lengths.max() + LANES - 1) // LANES * LANES, np.float32)
    for number in range(part, shape[0] * shape[1], parts):
        attend_cached(number, shape, query, key, value, lengths, out, scale, scratch)


@kernel
def cached(parts, shape, query, key, value, lengths, out, scale):
    cached_part(0, 1, shape, query, key, value, lengths, out, scale)


@kernel(parallel=True)
def cached_spread(parts, shape, query, key, value, lengths, out, scale):
    for part in numba.prange(parts):
        cached_part(np.int64(part), parts, shape, query, key, value, lengths, out, scale)


# -- entry points ------------------------------------------------------------------------------------------------------


def describe(x: np.ndarray | None) -> tuple[int, ...]:
    """The address, the steps along three leading axes, the step from row to row, in bytes: five numbers, 0 for None."""
    if x is None:
        return (0, 0, 0, 0, 0)
    steps = x.strides
    if 1 in x.shape[:-2]:  # the one element along that axis stands for all
        steps = (*(0 if n == 1 else step for n, step in zip(x.shape[:-2], steps, strict=False)), *steps[-2:])
    return (address_of(x), *(0, 0, 0, *steps[:-2])[-MOST_LEADS:], steps[-2])


def readable(x: np.ndarray) -> np.ndarray:
    """The array, or a copy where a row's numbers are not neighbours."""
    return x if x.strides[-1] == FLOAT and x.flags.aligned else np.ascontiguousarray(x)


def flattened(x: np.ndarray | None, lead: tuple) -> np.ndarray | None:
    """One leading axis instead of many."""
    return None if x is None else np.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, *x.shape[-2:])


def by_places(lead: tuple, rows: int, columns: int) -> np.ndarray:
    """An empty (…, H, rows, columns) whose memory is (…, rows, H, columns), from which heads merge without a copy."""
    if len(lead) < 2:
        return np.empty((*lead, rows, columns), np.float32)
    memory = np.empty((lead[0], rows, *lead[1:], columns), np.float32)
    return memory.transpose(0, *range(2, len(lead) + 1), 1, len(lead) + 1)


def like_pieces(lead: tuple, *pieces: np.ndarray) -> list[np.ndarray] | None:
    """Empty arrays like these (*lead, T, D), if these are what each place's numbers in one memory (B, T, …) are split
    into, one behind the other: then the new ones are too, and make one gradient without a copy. Else None."""
    memory, places, rows = pieces[0].base, list[int](), pieces[0].shape[-2]
    if len(lead) != 2 or type(memory) is not np.ndarray or not memory.flags.carray or memory.dtype.char != "f":
        return None
    pitch, start = FLOAT * lead[1] * sum(x.shape[-1] for x in pieces), address_of(memory)
    end = start
    for x in pieces:
        step = FLOAT * x.shape[-1]
        lies = address_of(x), x.shape[:-1], x.strides
        if lies != (end, (*lead, rows), (rows * pitch, step, pitch, FLOAT)):
            return None
        places.append(end - start)
        end += lead[1] * step
    if memory.nbytes != lead[0] * rows * pitch:
        return None
    new = np.empty(memory.shape, np.float32)
    return [np.ndarray(x.shape, np.float32, new, place, x.strides) for x, place in zip(pieces, places, strict=True)]


def additive(mask: np.ndarray | None, rows: int, keys: int) -> np.ndarray | None:
    """A mask that is added: float32, (…, rows, keys), each row's numbers neighbours."""
    if mask is None:
        return None
    if mask.dtype == bool:
        mask = np.where(mask, np.float32(0), HIDDEN)
    mask = np.asarray(mask, np.float32)
    if mask.shape[-1] != keys or mask.strides[-1] != FLOAT:
        mask = np.ascontiguousarray(np.broadcast_to(mask, (*mask.shape[:-1], keys)))
    return np.broadcast_to(mask, (*mask.shape[:-2], rows, keys))


def check_shapes(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None) -> tuple:
    """(the leading shape, how many queries, keys, and features of a value); ValueError if they do not fit."""
    lead = query.shape[:-2]
    if not lead == key.shape[:-2] == value.shape[:-2]:
        lead = np.broadcast_shapes(lead, key.shape[:-2], value.shape[:-2])
    (rows, features), (keys, width) = query.shape[-2:], value.shape[-2:]
    if key.shape[-2:] != (keys, features) or features == 0:
        raise ValueError(f"attention: queries {query.shape}, keys {key.shape} and values {value.shape} do not fit")
    if mask is not None and np.broadcast_shapes((*lead, rows, keys), mask.shape) != (*lead, rows, keys):
        raise ValueError(f"attention: a mask {mask.shape} does not broadcast to {(*lead, rows, keys)}")
    return lead, rows, keys, width


def attention(
    xp: Any, query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None = None, *,
    is_causal: bool = False, scale: float | None = None,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """softmax(scale query keyᵀ + mask) value, and each query's largest score and sum: the twin of module 13's."""
    lead, rows, keys, width = check_shapes(query, key, value, mask)
    if len(lead) > MOST_LEADS:
        flat: Any = (flattened(x, lead) for x in (query, key, value, mask))
        found = attention(xp, *flat, is_causal=is_causal, scale=scale)
        return tuple(x.reshape(*lead, *x.shape[1:]) for x in found)
    out, largest, sums = by_places(lead, rows, width), *(np.empty((*lead, rows, 1), np.float32) for _ in range(2))
    if rows and keys and largest.size:
        attention_into(query, key, value, mask, out, largest, sums, is_causal, scale)
    else:
        out[...], largest[...], sums[...] = 0, 0, 1
    return out, largest, sums


def attention_into(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None, out: np.ndarray,
    largest: np.ndarray, sums: np.ndarray, is_causal: bool, scale: float | None,
) -> None:  # fmt: skip
    """`attention` of arrays that are not empty, into arrays that are there."""
    (*lead, rows, width), (keys, features) = out.shape, key.shape[-2:]
    pairs, piece, parts = math.prod(lead), rows, cores()
    if pairs % parts and pairs < 8 * parts:  # shared out evenly only in smaller pieces
        piece = rows * pairs // (4 * parts)
    piece = max(-(-piece // LANES), QUERIES // LANES) * LANES
    work = pairs * rows * keys * (features + width) // (16 if is_causal else 8)
    arrays = [readable(query), readable(key), readable(value), additive(mask, rows, keys), out]
    run(forward, forward_spread, work, parts, piece, (1, 1, 1, *lead)[-MOST_LEADS:], (rows, keys, features, width),
        np.array([describe(x) for x in arrays]), largest.reshape(pairs, rows), sums.reshape(pairs, rows),
        features**-0.5 if scale is None else float(scale), is_causal)  # fmt: skip


def attention_gradients(
    xp: Any, g: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None,
    out: np.ndarray, largest: np.ndarray, total: np.ndarray, *, is_causal: bool = False, scale: float | None = None,
    mask_gradient: bool = False,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """The gradients of `attention` carried to query, key and value: module 13's twin, but for a mask's gradient."""
    lead, rows, keys, _ = check_shapes(query, key, value, mask)
    if mask_gradient:
        raise ValueError("attention_gradients: this kernel has no gradient for a mask")
    if len(lead) > MOST_LEADS:
        flat: Any = (flattened(x, lead) for x in (g, query, key, value, mask, out, largest, total))
        found = attention_gradients(xp, *flat, is_causal=is_causal, scale=scale)
        return tuple(x.reshape(*lead, *x.shape[1:]) for x in found)
    if (pieces := like_pieces(lead, query, key, value)) is None:
        pieces = [by_places(lead, *x.shape[-2:]) for x in (query, key, value)]
    to_query, to_key, to_value = pieces
    if rows and keys and largest.size:
        given = (g, query, key, value, mask, out, largest, total)
        gradients_into(*given, to_query, to_key, to_value, is_causal, scale)
    else:
        to_query[...], to_key[...], to_value[...] = 0, 0, 0
    return to_query, to_key, to_value


def gradients_into(
    g: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None, out: np.ndarray,
    largest: np.ndarray, total: np.ndarray, to_query: np.ndarray, to_key: np.ndarray, to_value: np.ndarray,
    is_causal: bool, scale: float | None,
) -> None:  # fmt: skip
    """`attention_gradients` of arrays that are not empty, into arrays that are there."""
    (*lead, rows, width), (keys, features) = out.shape, key.shape[-2:]
    pairs, mask = math.prod(lead), additive(mask, rows, keys)
    work = pairs * rows * keys * (features + width) // (8 if is_causal else 4)
    arrays = [*(readable(x) for x in (g, query, key, value)), mask, readable(out), to_query, to_key, to_value]
    largest, total = (
        plain(x if x.size == pairs * rows else np.broadcast_to(x, (*lead, rows, 1))).reshape(pairs, rows)
        for x in (largest, total)  # scores may have fewer leading axes than values
    )
    run(backward, backward_spread, work, cores(), (1, 1, 1, *lead)[-MOST_LEADS:], (rows, keys, features, width),
        np.array([describe(x) for x in arrays]), largest, total,
        features**-0.5 if scale is None else float(scale), is_causal)  # fmt: skip


def cached_attention(
    xp: Any, query: np.ndarray, key: np.ndarray, value: np.ndarray, lengths: np.ndarray, *, scale: float | None = None
) -> np.ndarray:
    """Attention of one new token of each sequence: query (B, H, D), key (B, G, capacity, D), value (B, G, capacity, E).

    lengths: (B,) integers, how many of a sequence's keys there are. H is a multiple of G: H / G queries in a row share
    the keys of a head. (B, H, E).
    """
    (batch, heads, _), (*_, capacity, width) = query.shape, value.shape
    lengths = plain(lengths.astype(np.int64, copy=False))
    if batch and not 0 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"cached_attention: lengths must be between 0 and {capacity}, got {lengths}")
    out = np.empty((batch, heads, width), np.float32)
    if out.size:
        cached_into(plain(query), key, value, lengths, out, scale)
    return out


def cached_into(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, lengths: np.ndarray, out: np.ndarray, scale: float | None
) -> None:
    """`cached_attention` of arrays that are not empty, into one that is there."""
    (batch, heads, width), (groups, features) = out.shape, (key.shape[1], key.shape[3])
    shape, key, value = (batch, groups, heads // groups, features, width), readable(key), readable(value)
    work = int(lengths.sum()) * heads * (features + width) // 8
    scale = features**-0.5 if scale is None else float(scale)
    run(cached, cached_spread, work, cores(), shape, query, describe(key), describe(value), lengths, out, scale)
