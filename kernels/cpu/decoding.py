"""One new token of each row through all blocks of a transformer, in one call.

A token uses each weight once, and a small network's blocks have a dozen steps that take a microsecond each: called one
by one, most of the time would be between them. Here a core takes some rows from the first block to the last. Rows are
alone with their own past, so no core waits for another.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from tinytorch.kernels.cpu.attention import FLOAT, ROW, WIDE, attend_cached, row_of_four, tile
from tinytorch.kernels.cpu.elementwise import normal_cdf, vsigmoid
from tinytorch.kernels.cpu.jit import cores, kernel, plain, run
from tinytorch.kernels.cpu.lines import load_some, store_some
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

__all__ = ["decode_blocks"]

STRIP = 4 * LANES  # columns of a product that are added up in registers
TOGETHER = 4  # rows for which a strip of weights is read once
ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu", "swiglu")
GELU_TANH, GELU, RELU, SILU, SWIGLU = range(5)

rows_of_four = tile(TOGETHER, 4)


@kernel(inline="always")
def in_strips(columns):
    """How many columns whole strips have."""
    return (columns + STRIP - 1) // STRIP * STRIP


@kernel
def product(x, pitch, rows, depth, weight, columns, out, out_pitch, ones):
    """Add x (rows, depth) times the weight (depth, columns) to out (rows, columns).

    Addresses, and steps from row to row in bytes. Whole strips are written: what stands behind `columns` in a row of
    out is anything. ones: the address of TOGETHER ones.
    """
    apart()
    one, four, line = np.int64(FLOAT), rows // TOGETHER * TOGETHER, columns * FLOAT
    for j in range(0, line, STRIP * FLOAT):
        for i in range(0, four, TOGETHER):
            rows_of_four(x + i * pitch, pitch, one, weight + j, line, depth, out + i * out_pitch + j, out_pitch, ones)
        for i in range(four, rows):
            row_of_four(x + i * pitch, pitch, one, weight + j, line, depth, out + i * out_pitch + j, out_pitch, ones)


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
def decode_rows(first, last, x, weights, keys, values, lengths, counts, cos, sin, query, seen, out, sizes, eps):
    """The rows from `first` to `last`, through all blocks.

    Args:
        keys, values: (layers, rows, groups, capacity, features).
        lengths, counts: how many tokens each row holds, and how many its new one sees.
        cos, sin: (positions, features); of no length if heads are not turned.
        query, seen: (rows, heads, features), for queries and what attention makes of them.
        sizes: (heads, features, hidden, activation, whether norms are centered).
    """
    heads, features, hidden, choice, centered = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    layers, _, groups, capacity, _ = keys.shape
    width, rows, own = x.shape[1], last - first, features * FLOAT
    inner, stacked = heads * features, (heads + 2 * groups) * features
    stream_pitch, qkv_pitch, wide_pitch = in_strips(width) * FLOAT, in_strips(stacked) * FLOAT, in_strips(hidden) * FLOAT
    scratch = np.empty(
        rows * (2 * stream_pitch + qkv_pitch + 2 * wide_pitch) // FLOAT + TOGETHER, np.float32
    )
    stream = address(scratch)
    normed = stream + rows * stream_pitch
    qkv = normed + rows * stream_pitch
    gate = qkv + rows * qkv_pitch
    up = gate + rows * wide_pitch
    ones = up + rows * wide_pitch
    scratch[-TOGETHER:] = 1
    scores = np.empty((counts[first:last].max() + LANES - 1) // LANES * LANES, np.float32)
    scale = 1 / math.sqrt(features)
    for i in range(rows):
        copy_floats(stream + i * stream_pitch, address(x) + (first + i) * width * FLOAT, width)
    for layer in range(layers):
        at = address(weights) + layer * weights.shape[1] * FLOAT
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
                head = (layer * len(x) + number) * groups + group
                place = (head * capacity + lengths[number] % capacity) * own
                copy_floats(address(keys) + place, row + (heads + group) * own, features)
                copy_floats(address(values) + place, row + (heads + groups + group) * own, features)
        begin, step = layer * len(x) * groups * capacity * own, capacity * own
        key = (address(keys) + begin, np.int64(0), groups * step, step, own)
        value = (address(values) + begin, np.int64(0), groups * step, step, own)
        shape = (len(x), groups, heads // groups, features, features)
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
    for i in range(rows):  # the scratch is named again, so that it has not been freed before
        copy_floats(address(out) + (first + i) * width * FLOAT, address(scratch) + i * stream_pitch, width)


@kernel
def decode_serially(parts, *arguments):
    x = arguments[0]
    decode_rows(0, len(x), *arguments)


@kernel(parallel=True)
def decode_on_cores(parts, x, *arguments):
    for part in prange(parts):
        number = np.int64(part)
        decode_rows(len(x) * number // parts, len(x) * (number + 1) // parts, x, *arguments)


# -- entry point -------------------------------------------------------------------------------------------------------

NOTHING = np.empty((0, 0), np.float32)


def decode_blocks(
    xp: Any, x: np.ndarray, weights: np.ndarray, keys: np.ndarray, values: np.ndarray, lengths: np.ndarray,
    cos: np.ndarray | None = None, sin: np.ndarray | None = None, *, config: Any,
) -> np.ndarray:  # fmt: skip
    """One token of each row through all blocks; its keys and values are written to their places: module 19's twin."""
    heads, features = config.num_heads, keys.shape[4]
    sizes = (heads, features, config.hidden_size, ACTIVATIONS.index(config.mlp), config.norm == "layer")
    (query, seen), out = np.empty((2, len(x), heads * features), np.float32), np.empty(x.shape, np.float32)
    turns = (NOTHING, NOTHING) if cos is None else (plain(cos), plain(sin))
    parts, work = min(cores(), len(x)), (1 + len(x)) * weights.size // 8
    run(decode_serially, decode_on_cores, work if parts > 1 else 0, parts, plain(x), weights, keys, values, lengths,
        np.minimum(lengths + 1, keys.shape[3]), *turns, query, seen, out, np.array(sizes), config.norm_eps)  # fmt: skip
    return out
