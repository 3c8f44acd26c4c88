"""One new token of each row through a whole transformer, in one call.

A token uses each weight once, and a small network's blocks have a dozen steps that take a microsecond each: called one
by one, most of the time would be between them. Here a core takes some rows from the first block to the last. Rows are
alone with their own past, so no core waits for another.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from tinytorch.kernels.cpu.attention import FLOAT, WIDE, attend_cached, tile
from tinytorch.kernels.cpu.elementwise import normal_cdf, vsigmoid
from tinytorch.kernels.cpu.jit import cores, kernel, run
from tinytorch.kernels.cpu.lines import load_some, store_some
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
    maximum,
    store,
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


@kernel
def product(x, pitch, rows, depth, weight, columns, out, out_pitch, ones):
    """Add x (rows, depth) times the weight (depth, columns) to out (rows, columns).

    Addresses, and steps from row to row in bytes. Whole strips are written: what stands behind `columns` in a row of
    out is anything. ones: the address of SIDE_BY_SIDE ones.
    """
    apart()
    one, four, line = np.int64(FLOAT), rows // SIDE_BY_SIDE * SIDE_BY_SIDE, columns * FLOAT
    for j in range(0, line, STRIP * FLOAT):
        for i in range(0, four, SIDE_BY_SIDE):
            a, c = x + i * pitch, out + i * out_pitch + j
            rows_side_by_side(a, pitch, one, weight + j, line, depth, c, out_pitch, ones)
        for i in range(four, rows):
            a, c = x + i * pitch, out + i * out_pitch + j
            one_row(a, pitch, one, weight + j, line, depth, c, out_pitch, ones)


@kernel
def add_to_rows(out, out_pitch, rows, start, start_pitch, bias, columns):
    """Each row of out becomes that of `start` plus a bias; start: 0 for the bias alone."""
    apart()
    for i in range(rows):
        for j in range(0, columns * FLOAT, WIDE):
            rest = columns - j // FLOAT
            value = load_some(bias + j, rest)
            if start:
                value = value + load(start + i * start_pitch + j)
            store(out + i * out_pitch + j, value)


@kernel
def norm_rows(x, pitch, rows, columns, centered, eps, weight, out):
    """The norm of each row, times a weight, plus the bias behind the weight; without `centered`, the mean stays."""
    apart()
    bias, line = weight + columns * FLOAT, columns * FLOAT
    for i in range(rows):
        row, mean = x + i * pitch, broadcast(np.float32(0))
        if centered:
            added = blank()
            for j in range(0, line, WIDE):
                added = added + keep(load(row + j), columns - j // FLOAT)
            mean = broadcast(total(added) / np.float32(columns))
        squares = blank()
        for j in range(0, line, WIDE):
            away = keep(load(row + j) - mean, columns - j // FLOAT)
            squares = fma(away, away, squares)
        factor = broadcast(np.float32(1) / np.sqrt(total(squares) / np.float32(columns) + np.float32(eps)))
        for j in range(0, line, WIDE):
            rest = columns - j // FLOAT
            scaled = (load(row + j) - mean) * factor
            store(out + i * pitch + j, fma(scaled, load_some(weight + j, rest), load_some(bias + j, rest)))


@kernel(forceinline=True)
def activated(choice, x):
    if choice == GELU_TANH:
        return x * normal_cdf(True, x)
    if choice == GELU:
        return x * normal_cdf(False, x)
    if choice == RELU:
        return maximum(x, blank())
    return x * vsigmoid(x)


@kernel
def activate_rows(choice, x, gate, pitch, rows, columns):
    """The activation of each row of x; for SWIGLU, x times that of the gate."""
    apart()
    for i in range(0, rows * pitch, pitch):
        for j in range(i, i + columns * FLOAT, WIDE):
            value = load(x + j)
            store(x + j, value * activated(choice, load(gate + j)) if choice == SWIGLU else activated(choice, value))


@kernel
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


@kernel
def copy_floats(target, source, count):
    """Copy `count` numbers, and nothing behind them."""
    for j in range(0, count * FLOAT, WIDE):
        store_some(target + j, load_some(source + j, count - j // FLOAT), count - j // FLOAT)


@kernel
def decode_rows(
    first, last, ids, tokens, positions, blocks, norm, head, keys, values, lengths, cos, sin, out, heads, hidden,
    choice, centered, eps,
):  # fmt: skip
    """The rows from `first` to `last`, from their tokens' ids to the scores of what follows.

    Args:
        keys, values: (layers, rows, groups, capacity, features).
        lengths: how many tokens each row holds.
        positions, cos, sin: of no length if there are none.
        hidden, choice: how wide the small networks are, and the number of their activation.
        centered: whether norms take the mean away.
    """
    layers, _, groups, capacity, features = keys.shape
    width, rows, own = tokens.shape[1], last - first, features * FLOAT
    inner, stacked = heads * features, (heads + 2 * groups) * features
    stream_pitch, qkv_pitch = in_strips(width) * FLOAT, in_strips(stacked) * FLOAT
    wide_pitch = in_strips(hidden) * FLOAT
    scratch = np.empty(rows * (2 * stream_pitch + qkv_pitch + 2 * wide_pitch) // FLOAT + SIDE_BY_SIDE, np.float32)
    stream = address(scratch)
    normed = stream + rows * stream_pitch
    qkv = normed + rows * stream_pitch
    gate = qkv + rows * qkv_pitch
    up = gate + rows * wide_pitch
    ones = up + rows * wide_pitch
    scratch[-SIDE_BY_SIDE:] = 1
    query, seen = np.empty((len(ids), inner), np.float32), np.empty((len(ids), inner), np.float32)
    counts = np.minimum(lengths + 1, capacity)
    scores = np.empty((counts.max() + LANES - 1) // LANES * LANES, np.float32)
    scale = 1 / math.sqrt(features)
    for i in range(rows):
        row, number = stream + i * stream_pitch, first + i
        copy_floats(row, address(tokens) + ids[number] * width * FLOAT, width)
        if positions.size:
            at = address(positions) + lengths[number] * width * FLOAT
            add_to_rows(row, stream_pitch, np.int64(1), row, stream_pitch, at, width)
    for layer in range(layers):
        at = address(blocks) + layer * blocks.shape[1] * FLOAT
        norm_rows(stream, stream_pitch, rows, width, centered, eps, at, normed)
        at += 2 * width * FLOAT
        add_to_rows(qkv, qkv_pitch, rows, np.int64(0), np.int64(0), at + width * stacked * FLOAT, stacked)
        product(normed, stream_pitch, rows, width, at, stacked, qkv, qkv_pitch, ones)
        at += (width + 1) * stacked * FLOAT
        for i in range(rows):
            row, number = qkv + i * qkv_pitch, first + i
            if cos.size:
                angle = lengths[number] * own
                turn_heads(row, heads + groups, features // 2, address(cos) + angle, address(sin) + angle)
            copy_floats(address(query) + number * inner * FLOAT, row, inner)
            for group in range(groups):
                before = ((layer * len(ids) + number) * groups + group) * capacity
                place = (before + lengths[number] % capacity) * own
                copy_floats(address(keys) + place, row + (heads + group) * own, features)
                copy_floats(address(values) + place, row + (heads + groups + group) * own, features)
        begin, step = layer * len(ids) * groups * capacity * own, capacity * own
        key = (address(keys) + begin, np.int64(0), groups * step, step, own)
        value = (address(values) + begin, np.int64(0), groups * step, step, own)
        shape = (len(ids), groups, heads // groups, features, features)
        for number in range(first * groups, last * groups):
            attend_cached(number, shape, query, key, value, counts, seen, scale, scores)
        add_to_rows(stream, stream_pitch, rows, stream, stream_pitch, at + inner * width * FLOAT, width)
        found = address(seen) + first * inner * FLOAT
        product(found, inner * FLOAT, rows, inner, at, width, stream, stream_pitch, ones)
        at += (inner + 1) * width * FLOAT
        norm_rows(stream, stream_pitch, rows, width, centered, eps, at, normed)
        at += 2 * width * FLOAT
        if choice == SWIGLU:
            add_to_rows(gate, wide_pitch, rows, np.int64(0), np.int64(0), at + width * hidden * FLOAT, hidden)
            product(normed, stream_pitch, rows, width, at, hidden, gate, wide_pitch, ones)
            at += (width + 1) * hidden * FLOAT
        add_to_rows(up, wide_pitch, rows, np.int64(0), np.int64(0), at + width * hidden * FLOAT, hidden)
        product(normed, stream_pitch, rows, width, at, hidden, up, wide_pitch, ones)
        at += (width + 1) * hidden * FLOAT
        activate_rows(choice, up, gate, wide_pitch, rows, hidden)
        add_to_rows(stream, stream_pitch, rows, stream, stream_pitch, at + hidden * width * FLOAT, width)
        product(up, wide_pitch, rows, hidden, at, width, stream, stream_pitch, ones)
    norm_rows(stream, stream_pitch, rows, width, centered, eps, address(norm), normed)
    final = np.empty((rows, width), np.float32)
    for i in range(rows):  # the scratch is named again, so that it has not been freed before
        copy_floats(address(final) + i * width * FLOAT, address(scratch) + (rows + i) * stream_pitch, width)
    dot_rows(0, (len(head) + TOGETHER - 1) // TOGETHER, final, head, norm[0, :0], out[first:last])


@kernel
def decode_serially(parts, *arguments):
    ids = arguments[0]
    decode_rows(0, len(ids), *arguments)


@kernel(parallel=True)
def decode_on_cores(parts, ids, *arguments):
    for part in prange(parts):
        number = np.int64(part)
        decode_rows(len(ids) * number // parts, len(ids) * (number + 1) // parts, ids, *arguments)


# -- entry point -------------------------------------------------------------------------------------------------------

NOTHING = np.empty((0, 0), np.float32)


def decode(
    xp: Any, ids: np.ndarray, tokens: np.ndarray, positions: np.ndarray | None, blocks: np.ndarray, norm: np.ndarray,
    head: np.ndarray, keys: np.ndarray, values: np.ndarray, lengths: np.ndarray, cos: np.ndarray | None = None,
    sin: np.ndarray | None = None, *, config: Any,
) -> np.ndarray:  # fmt: skip
    """One token of each row through a model; its keys and values are written to their places: module 19's twin."""
    out = np.empty((len(ids), len(head)), np.float32)
    positions, cos, sin = (NOTHING if x is None else x for x in (positions, cos, sin))
    parts, work = min(cores(), len(ids)), (1 + len(ids)) * (blocks.size + head.size) // 8
    run(decode_serially, decode_on_cores, work if parts > 1 else 0, parts, ids, tokens, positions, blocks, norm, head,
        keys, values, lengths, cos, sin, out, config.num_heads, config.hidden_size, ACTIVATIONS.index(config.mlp),
        config.norm == "layer", config.norm_eps)  # fmt: skip
    return out
