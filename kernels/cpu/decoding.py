"""One new token of each row through a whole transformer, in one call.

A token uses each weight once, and a small network's layers take a microsecond or ten each: called one by one, most of
the time would be between them. Two cores share a layer so that they have to meet twice only (Shoeybi and others, 2019):
each has some of the heads, and what they are worth in the output; then some of the features of the small network, and
what those are worth. So each core reads one half of the weights, which may stay in its own cache from token to token.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import prange

from tinytorch.kernels.cpu.attention import FLOAT, WIDE, attend_cached, tile
from tinytorch.kernels.cpu.elementwise import normal_cdf, vsigmoid
from tinytorch.kernels.cpu.jit import cores, kernel, run
from tinytorch.kernels.cpu.matmul import TOGETHER, dot_rows
from tinytorch.kernels.cpu.vectors import (
    LANES,
    address,
    apart,
    blank,
    broadcast,
    floats,
    fma,
    keep,
    load,
    load_part,
    maximum,
    store,
    store_part,
    total,
)

__all__ = ["decode"]

STRIP = 4 * LANES  # columns of a product that are added up in registers
SIDE_BY_SIDE = 4  # rows for which a strip of weights is read once
ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu", "swiglu")
GELU_TANH, GELU, RELU, SILU, SWIGLU = range(5)

one_row, rows_side_by_side = tile(1, 4), tile(SIDE_BY_SIDE, 4)


@kernel(inline="always")
def in_strips(columns):
    """How many columns whole strips have."""
    return (columns + STRIP - 1) // STRIP * STRIP


@kernel(inner=True)
def product(x, pitch, rows, depth, weight, line, columns, out, out_pitch):
    """out (rows, columns) = x (rows, depth) times the weight (depth, columns), whose rows are `line` bytes apart.

    Addresses, and steps from row to row in bytes. Whole strips are written: what stands behind `columns` in a row of
    out is anything.
    """
    apart()
    one, fresh, four = np.int64(FLOAT), np.int64(0), rows // SIDE_BY_SIDE * SIDE_BY_SIDE
    for j in range(0, columns * FLOAT, STRIP * FLOAT):
        for i in range(0, four, SIDE_BY_SIDE):
            a, c = x + i * pitch, out + i * out_pitch + j
            rows_side_by_side(a, pitch, one, weight + j, line, depth, c, out_pitch, fresh)
        for i in range(four, rows):
            a, c = x + i * pitch, out + i * out_pitch + j
            one_row(a, pitch, one, weight + j, line, depth, c, out_pitch, fresh)


@kernel(inner=True)
def add_to_rows(out, out_pitch, rows, columns, added, added_pitch):
    """Add a row of numbers to each row, or the next one to the next row."""
    apart()
    rest = columns % LANES
    done = (columns - rest) * FLOAT
    for i in range(rows):
        target, source = out + i * out_pitch, added + i * added_pitch
        for j in range(0, done, WIDE):
            store(target + j, load(target + j) + load(source + j))
        if rest:
            store(target + done, load(target + done) + load_part(source + done, rest))


@kernel(inner=True)
def norm_rows(x, pitch, rows, columns, centered, eps, weight, out):
    """The norm of each row, times a weight, plus the bias behind the weight; without `centered`, the mean stays."""
    apart()
    rest, bias = columns % LANES, weight + columns * FLOAT
    done = (columns - rest) * FLOAT
    for i in range(rows):
        row, target, mean = x + i * pitch, out + i * pitch, blank()
        if centered:
            added = keep(load(row + done), rest) if rest else blank()
            for j in range(0, done, WIDE):
                added = added + load(row + j)
            mean = broadcast(total(added) / np.float32(columns))
        away = keep(load(row + done) - mean, rest) if rest else blank()
        squares = away * away
        for j in range(0, done, WIDE):
            away = load(row + j) - mean
            squares = fma(away, away, squares)
        factor = broadcast(np.float32(1) / np.sqrt(total(squares) / np.float32(columns) + np.float32(eps)))
        for j in range(0, done, WIDE):
            scaled = (load(row + j) - mean) * factor
            store(target + j, fma(scaled, load(weight + j), load(bias + j)))
        if rest:
            scaled = (load(row + done) - mean) * factor
            store(target + done, fma(scaled, load_part(weight + done, rest), load_part(bias + done, rest)))


@kernel(forceinline=True)
def activated(choice, x):
    if choice == GELU_TANH:
        return x * normal_cdf(True, x)
    if choice == GELU:
        return x * normal_cdf(False, x)
    if choice == RELU:
        return maximum(x, blank())
    return x * vsigmoid(x)


@kernel(inner=True)
def activate_rows(choice, x, gate, pitch, rows, columns):
    """The activation of each row of x; for SWIGLU, x times that of the gate."""
    apart()
    for i in range(0, rows * pitch, pitch):
        for j in range(i, i + columns * FLOAT, WIDE):
            result = activated(choice, load((gate if choice == SWIGLU else x) + j))
            store(x + j, load(x + j) * result if choice == SWIGLU else result)


@kernel(inner=True)
def turn_heads(x, heads, half, cos, sin):
    """Turn the pairs of features of each head of a row, as module 12's `rotate`."""
    apart()
    cosines, sines = floats(cos, 2 * half), floats(sin, 2 * half)
    for head in range(heads):
        row = floats(x + head * 2 * half * FLOAT, 2 * half)
        for k in range(half):
            low, high = row[k], row[half + k]
            row[k] = low * cosines[k] - high * sines[k]
            row[half + k] = high * cosines[half + k] + low * sines[half + k]


@kernel(inner=True)
def copy_floats(target, source, count):
    """Copy `count` numbers, and nothing behind them."""
    apart()
    rest = count % LANES
    done = (count - rest) * FLOAT
    for j in range(0, done, WIDE):
        store(target + j, load(source + j))
    if rest:
        store_part(target + done, load_part(source + done, rest), rest)


# -- one core's share --------------------------------------------------------------------------------------------------


@kernel(inline="always")
def rooms(rows, width, widest):
    """What a core works with: (bytes of a row of the stream, of a row of what is wider, float32 in all)."""
    narrow, wide = in_strips(width) * FLOAT, in_strips(widest) * FLOAT
    return narrow, wide, rows * 2 * (narrow + wide) // FLOAT


@kernel(inner=True)
def gather(stream, pitch, rows, width, bias, sums):
    """Add a bias and what each core has found to the stream. sums: (cores, rows · pitch)."""
    apart()
    add_to_rows(stream, pitch, rows, width, bias, np.int64(0))
    for i in range(len(sums)):
        add_to_rows(stream, pitch, rows, width, address(sums[i]), pitch)


@kernel(inline="always")
def attend_part(
    part, layer, ids, tokens, positions, blocks, keys, values, lengths, cos, sin, sizes, places, eps, scratch, found,
    query, seen,
):  # fmt: skip
    """Some heads of all rows: their queries, keys and values, attention, and what it is worth in the output.

    Args:
        sizes: how many heads, how wide the small network is, its activation, whether norms are centered, and the
            longest row of what is wider than the stream.
        places: where the parts of a block begin, in bytes: norm1, qkv, out, norm2, gate, up, down, and the end. A bias
            stands at the end of its part.
        scratch: (cores, …), each core's room.
        found: (2, cores, rows · pitch), what each core found in attention and in the small network.
        query, seen: (rows, heads · features).
    """
    _, rows, groups, capacity, features = keys.shape
    width, heads, parts = tokens.shape[1], sizes[0], len(scratch)
    pitch, wide, _ = rooms(rows, width, sizes[4])
    stream, at, own = address(scratch[part]), address(blocks[layer]), features * FLOAT
    normed, qkv, each = stream + rows * pitch, stream + 2 * rows * pitch, heads // groups
    if layer == 0:
        for i in range(rows):
            copy_floats(stream + i * pitch, address(tokens) + ids[i] * width * FLOAT, width)
            if positions.size:
                place = address(positions) + lengths[i] * width * FLOAT
                add_to_rows(stream + i * pitch, pitch, np.int64(1), width, place, np.int64(0))
    else:
        gather(stream, pitch, rows, width, address(blocks[layer - 1]) + places[7] - width * FLOAT, found[1])
    norm_rows(stream, pitch, rows, width, sizes[3], eps, at + places[0], normed)
    first, last = groups * part // parts, groups * (part + 1) // parts
    line, queries, count = (heads + 2 * groups) * own, (last - first) * each, last - first
    to_key = in_strips(queries * features) * FLOAT  # from a row's queries to its keys, and to its values
    to_value = to_key + in_strips(count * features) * FLOAT
    for section in range(3):
        begin = first * each if section == 0 else first + heads + (section - 1) * groups
        columns = (queries if section == 0 else count) * features
        target = qkv + (0 if section == 0 else to_key if section == 1 else to_value)
        product(normed, pitch, rows, width, at + places[1] + begin * own, line, columns, target, wide)
        add_to_rows(target, wide, rows, columns, at + places[2] - line + begin * own, np.int64(0))
    shape, step = (rows, groups, each, features, features), capacity * own
    counts, longest = np.empty(rows, np.int64), 0
    for i in range(rows):
        counts[i] = min(lengths[i] + 1, capacity)
        longest = max(longest, counts[i])
    before = layer * rows * groups * step
    key = (address(keys) + before, np.int64(0), groups * step, step, own)
    value = (address(values) + before, np.int64(0), groups * step, step, own)
    scores, scale = np.empty((longest + LANES - 1) // LANES * LANES, np.float32), 1 / math.sqrt(features)
    for i in range(rows):
        row = qkv + i * wide
        if cos.size:
            angle = lengths[i] * own
            turn_heads(row, queries, features // 2, address(cos) + angle, address(sin) + angle)
            turn_heads(row + to_key, count, features // 2, address(cos) + angle, address(sin) + angle)
        copy_floats(address(query[i]) + first * each * own, row, queries * features)
        for group in range(first, last):
            place, head = (i * groups + group) * step + lengths[i] % capacity * own, (group - first) * own
            copy_floats(key[0] + place, row + to_key + head, features)
            copy_floats(value[0] + place, row + to_value + head, features)
            attend_cached(i * groups + group, shape, query, key, value, counts, seen, scale, scores)
    begin = first * each * own
    product(address(seen) + begin, heads * own, rows, queries * features, at + places[2] + begin * width, width * FLOAT,
            width, address(found[0, part]), pitch)  # fmt: skip


@kernel(inline="always")
def expand_part(part, layer, tokens, blocks, sizes, places, eps, rows, scratch, found):
    """Some features of the small network, of all rows, and what they are worth in the output."""
    parts, width, hidden, choice = len(scratch), tokens.shape[1], sizes[1], sizes[2]
    pitch, wide, _ = rooms(rows, width, sizes[4])
    stream, at = address(scratch[part]), address(blocks[layer])
    normed, up = stream + rows * pitch, stream + 2 * rows * pitch
    gate, first, count = up + rows * wide, hidden * part // parts, hidden * (part + 1) // parts - hidden * part // parts
    gather(stream, pitch, rows, width, at + places[3] - width * FLOAT, found[0])
    norm_rows(stream, pitch, rows, width, sizes[3], eps, at + places[3], normed)
    for name in range(4 if choice == SWIGLU else 5, 6):
        target, begin, line = (gate if name == 4 else up), at + first * FLOAT, hidden * FLOAT
        product(normed, pitch, rows, width, begin + places[name], line, count, target, wide)
        add_to_rows(target, wide, rows, count, begin + places[name + 1] - line, np.int64(0))
    activate_rows(choice, up, gate, wide, rows, count)
    weight = at + places[6] + first * width * FLOAT
    product(up, wide, rows, count, weight, width * FLOAT, width, address(found[1, part]), pitch)


@kernel(inline="always")
def score_part(part, tokens, blocks, norm, head, sizes, places, eps, scratch, found, out):
    """The scores of some tokens, for all rows."""
    parts, (rows, vocabulary), width = len(scratch), out.shape, tokens.shape[1]
    pitch, _, _ = rooms(rows, width, sizes[4])
    stream, last = address(scratch[part]), address(blocks[len(blocks) - 1])
    normed, final = stream + rows * pitch, np.empty((rows, width), np.float32)
    gather(stream, pitch, rows, width, last + places[7] - width * FLOAT, found[1])
    norm_rows(stream, pitch, rows, width, sizes[3], eps, address(norm), normed)
    for i in range(rows):
        copy_floats(address(final[i]), normed + i * pitch, width)
    groups = (vocabulary + TOGETHER - 1) // TOGETHER
    dot_rows(groups * part // parts, groups * (part + 1) // parts, final, head, norm[0, :0], out)


@kernel(inner=True)
def room_for(parts, arguments):
    """What the cores work with: scratch, found, query and seen."""
    ids, tokens, keys, sizes = arguments[0], arguments[1], arguments[6], arguments[11]
    rows, inner = len(ids), sizes[0] * keys.shape[4]
    pitch, _, size = rooms(rows, tokens.shape[1], sizes[4])
    scratch, found = np.empty((parts, size), np.float32), np.empty((2, parts, rows * pitch // FLOAT), np.float32)
    return scratch, found, np.empty((rows, inner), np.float32), np.empty((rows, inner), np.float32)


@kernel(inner=True)
def decode_part(part, step, arguments, room):
    """A core's share of a step: attention of the first layer, its small network, attention of the second …, scores."""
    apart()
    ids, tokens, positions, blocks, norm, head, keys, values, lengths, cos, sin, sizes, places, eps, out = arguments
    scratch, found, query, seen = room
    layer = step // 2
    if layer == len(blocks):
        score_part(part, tokens, blocks, norm, head, sizes, places, eps, scratch, found, out)
    elif step % 2:
        expand_part(part, layer, tokens, blocks, sizes, places, eps, len(ids), scratch, found)
    else:
        attend_part(part, layer, ids, tokens, positions, blocks, keys, values, lengths, cos, sin, sizes, places, eps,
                    scratch, found, query, seen)  # fmt: skip


@kernel
def decode_serially(parts, *arguments):
    room = room_for(1, arguments)
    for step in range(2 * len(arguments[3]) + 1):
        decode_part(np.int64(0), step, arguments, room)


@kernel(parallel=True)
def decode_on_cores(parts, *arguments):
    room = room_for(parts, arguments)
    for step in range(2 * len(arguments[3]) + 1):
        for part in prange(parts):
            decode_part(np.int64(part), step, arguments, room)


# -- entry point -------------------------------------------------------------------------------------------------------

NOTHING = np.empty((0, 0), np.float32)


@cache
def sizes_and_places(
    width: int, heads: int, groups: int, features: int, hidden: int, mlp: str, norm: str
) -> tuple[np.ndarray, np.ndarray]:
    """What `attend_part` says of them."""
    inner, stacked, gated = heads * features, (heads + 2 * groups) * features, mlp == "swiglu"
    longest = max(stacked + 3 * STRIP, hidden)
    parts = (0, 2 * width, (width + 1) * stacked, (inner + 1) * width, 2 * width, gated * (width + 1) * hidden,
             (width + 1) * hidden, (hidden + 1) * width)  # fmt: skip
    sizes = np.array([heads, hidden, ACTIVATIONS.index(mlp), norm == "layer", longest])
    return sizes, FLOAT * np.cumsum(parts)


def decode(
    xp: Any, ids: np.ndarray, tokens: np.ndarray, positions: np.ndarray | None, blocks: np.ndarray, norm: np.ndarray,
    head: np.ndarray, keys: np.ndarray, values: np.ndarray, lengths: np.ndarray, cos: np.ndarray | None = None,
    sin: np.ndarray | None = None, *, config: Any,
) -> np.ndarray:  # fmt: skip
    """One token of each row through a model; its keys and values are written to their places: module 19's twin."""
    groups, features, rows = keys.shape[2], keys.shape[4], len(ids)
    known = tokens.shape[1], config.num_heads, groups, features, config.hidden_size, config.mlp, config.norm
    out, parts, work = np.empty((rows, len(head)), np.float32), min(cores(), groups), (1 + rows) * blocks.size // 8
    positions, cos, sin = (NOTHING if x is None else x for x in (positions, cos, sin))
    run(decode_serially, decode_on_cores, work if parts > 1 else 0, parts, ids, tokens, positions, blocks, norm, head,
        keys, values, lengths, cos, sin, *sizes_and_places(*known), config.norm_eps, out)  # fmt: skip
    return out
