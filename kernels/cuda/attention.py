"""Attention on the GPU: forward, backward, and for one new token, never with the matrix of all pairs in memory.

A block of threads has a tile of 64 queries and lets the keys pass by, 64 at a time. Their scores live in the threads'
registers, become weights in shared memory and are used up; each query keeps its largest score and its sum so far, and
what was gathered before is scaled down when a larger score comes (FlashAttention, Dao and others, 2022). Everything
that multiplies goes through `multiply`: a tile of 64×64 sums, of which each of 128 threads has 8×4 in registers.

Backward, scores are made again. One kernel has a tile of queries and sums over keys, another a tile of keys and sums
over queries; so nobody adds to what another block adds to, and the same inputs give the same bits. One new token has
one query only: there blocks share out the keys, and a second kernel brings together what they found.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, float32, uint32

from tinytorch.kernels.cuda.jit import SIMULATED, THREADS, blocks_for, helper, kernel, readable, row_by_row, run

__all__ = ["attention", "attention_gradients", "cached_attention"]

# The simulator's tiles are smaller, or one of them would take it seconds: there a thread is one of Python's.
ACROSS, DOWN = (4, 2) if SIMULATED else (16, 8)  # threads of a block
TALL, WIDE = (4, 2) if SIMULATED else (8, 4)  # rows and columns of a tile that a thread has
SIDE = ACROSS * WIDE  # of a tile, and also DOWN * TALL
TEAM = ACROSS * DOWN
DEPTH = 4 if SIMULATED else 16  # products that are added up before the next piece of both factors is fetched
SHARE = SIDE * DEPTH // TEAM  # of a piece, for each thread
PADDED = SIDE + 2  # a row in shared memory; of 32 threads that write a piece turned, no two meet at a bank
HIDDEN = -math.inf
MOST_LEADS = 3  # leading axes that kernels know

# -- what all tiles share ----------------------------------------------------------------------------------------------
# Indices are made of uint32: from an index that may be negative, Numba would count backwards, and check each for that.


@helper
def clear(sums):
    for i in range(TALL):
        for j in range(WIDE):
            sums[i, j] = float32(0)


@helper
def place_of(number, shape):
    """The three leading indices of a pair, by its number; shape begins with how many there are of each."""
    return uint32(number // (shape[1] * shape[2])), uint32(number // shape[2] % shape[1]), uint32(number % shape[2])


@helper
def bring(matrix, first, start, piece):
    """piece[k, c] = matrix[first + k, start + c], for DEPTH rows and SIDE columns; 0 where the matrix has ended."""
    number = uint32(cuda.threadIdx.y) * ACROSS + uint32(cuda.threadIdx.x)
    column, (rows, columns) = number % SIDE, matrix.shape
    for i in range(SHARE):
        row = number // SIDE + i * (TEAM // SIDE)
        found = float32(0)
        if first + row < rows and start + column < columns:
            found = matrix[first + row, start + column]
        piece[row, column] = found


@helper
def bring_turned(matrix, first, start, piece):
    """piece[k, r] = matrix[first + r, start + k], for SIDE rows and DEPTH columns; 0 where the matrix has ended."""
    number = uint32(cuda.threadIdx.y) * ACROSS + uint32(cuda.threadIdx.x)
    column, (rows, columns) = number % DEPTH, matrix.shape
    for i in range(SHARE):
        row = number // DEPTH + i * (TEAM // DEPTH)
        found = float32(0)
        if first + row < rows and start + column < columns:
            found = matrix[first + row, start + column]
        piece[column, row] = found


@helper
def multiply(left, first, right, sums):
    """sums += leftᵀ right over DEPTH rows, those of left from `first` on.

    sums (TALL, WIDE): this thread's part of the tile, every DOWN-th row and every ACROSS-th column.
    """
    x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
    for k in range(DEPTH):
        for i in range(TALL):
            for j in range(WIDE):
                sums[i, j] += left[first + k, y + DOWN * i] * right[k, x + ACROSS * j]


@helper
def products_of_rows(one, first, other, start, left, right, sums):
    """sums = the products of rows of a matrix, from `first` on, with rows of another, from `start` on."""
    clear(sums)
    for k in range(0, one.shape[1], DEPTH):
        bring_turned(one, first, k, left)
        bring_turned(other, start, k, right)
        cuda.syncthreads()  # the pieces are there
        multiply(left, 0, right, sums)
        cuda.syncthreads()  # nobody needs them any more


@helper
def gather(weights, matrix, first, start, right, sums):
    """sums += weightsᵀ times SIDE rows of a matrix from `first` on, or up to its end; its columns from `start` on."""
    for k in range(0, min(SIDE, matrix.shape[0] - first), DEPTH):
        bring(matrix, first + k, start, right)
        cuda.syncthreads()  # also the weights are there
        multiply(weights, k, right, sums)
        cuda.syncthreads()


@helper
def finish(scores, scale, mask, place, first, start, queries, keys, causal, turned):
    """Products become scores: times scale, plus the mask, and -inf where there is no query or key, or it is hidden.

    Rows are queries from `first` on, columns keys from `start` on; or, turned, rows are keys, and columns queries.
    """
    a, b, c = place
    x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
    for i in range(TALL):
        for j in range(WIDE):
            query, key = first + y + DOWN * i, start + x + ACROSS * j
            if turned:
                query, key = key, query
            found = float32(HIDDEN)
            if query < queries and key < keys and not (causal and key > query):
                found = scores[i, j] * scale
                if mask is not None:
                    found += mask[a, b, c, query, key]
            scores[i, j] = found


@helper
def finite(top):
    """The largest score, or 0 for a row that sees nothing: exp(-inf - 0) is 0, where -inf - -inf would be nan."""
    return top if top != HIDDEN else float32(0)


# -- forward -----------------------------------------------------------------------------------------------------------


@kernel
def attend(query, key, value, mask, out, largest, total, scale, causal):
    """softmax(scale query keyᵀ + mask) value, for SIDE queries of a pair of a batch and a head, and SIDE columns.

    query (A, B, C, T, D), key (A, B, C, S, D), value (A, B, C, S, E), mask (A, B, C, T, S) or None. largest, total
    (A, B, C, T): of each query, by the blocks of the first columns. out (A, T, B, C, E): heads lie side by side.
    """
    left = cuda.shared.array((DEPTH, PADDED), float32)
    right = cuda.shared.array((DEPTH, PADDED), float32)
    weights = cuda.shared.array((SIDE, PADDED), float32)  # (keys, queries); before, largest scores of some keys
    tops = cuda.shared.array(SIDE, float32)
    factors = cuda.shared.array(SIDE, float32)
    scores = cuda.local.array((TALL, WIDE), float32)
    gathered = cuda.local.array((TALL, WIDE), float32)
    sums = cuda.local.array(TALL, float32)
    queries, keys, width = query.shape[3], key.shape[3], value.shape[4]
    tiles = (queries + SIDE - 1) // SIDE
    place = place_of(cuda.blockIdx.x // tiles, query.shape)
    a, b, c = place
    first = uint32(tiles - 1 - cuda.blockIdx.x % tiles) * SIDE  # last ones first: they have most to do
    panel = uint32(cuda.blockIdx.y) * SIDE
    x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
    number = y * ACROSS + x
    if number < SIDE:
        tops[number] = HIDDEN
    clear(gathered)
    for i in range(TALL):
        sums[i] = float32(0)
    for start in range(0, min(keys, first + SIDE) if causal else keys, SIDE):
        products_of_rows(query[a, b, c], first, key[a, b, c], start, left, right, scores)
        finish(scores, scale, mask, place, first, start, queries, keys, causal, False)
        for i in range(TALL):
            top = float32(HIDDEN)
            for j in range(WIDE):
                if scores[i, j] > top:
                    top = scores[i, j]
            weights[x, y + DOWN * i] = top
        cuda.syncthreads()
        if number < SIDE:
            before = tops[number]
            top = before
            for j in range(ACROSS):
                if weights[j, number] > top:
                    top = weights[j, number]
            tops[number] = top
            factors[number] = math.exp(before - finite(top))
        cuda.syncthreads()
        for i in range(TALL):
            top, factor = finite(tops[y + DOWN * i]), factors[y + DOWN * i]
            sums[i] *= factor
            for j in range(WIDE):
                gathered[i, j] *= factor
                weight = math.exp(scores[i, j] - top)
                weights[x + ACROSS * j, y + DOWN * i] = weight
                sums[i] += weight
        gather(weights, value[a, b, c], start, panel, right, gathered)
    for i in range(TALL):
        weights[x, y + DOWN * i] = sums[i]
    cuda.syncthreads()
    if number < SIDE:
        added = float32(0)
        for j in range(ACROSS):
            added += weights[j, number]
        if added == float32(0):
            added = float32(1)  # 0 / 1 is 0
        factors[number] = added
        if panel == 0 and first + number < queries:
            largest[a, b, c, first + number] = finite(tops[number])
            total[a, b, c, first + number] = added
    cuda.syncthreads()
    for i in range(TALL):
        row, added = first + y + DOWN * i, factors[y + DOWN * i]
        for j in range(WIDE):
            column = panel + x + ACROSS * j
            if row < queries and column < width:
                out[a, row, b, c, column] = gathered[i, j] / added


# -- backward ----------------------------------------------------------------------------------------------------------


@kernel
def take(g, out, taken):
    """taken (A, B, C, T) = the sums of g times out, both (A, B, C, T, E), over the last axis.

    That is what a query's weights are to change by on average. A block has DOWN queries, ACROSS threads for each.
    """
    parts = cuda.shared.array((DOWN, ACROSS), float32)
    x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
    count, queries, width = g.shape[0], g.shape[3], g.shape[4]
    number = uint32(cuda.blockIdx.x) * DOWN + y
    row = uint32(number % queries)
    a, b, c = place_of(number // queries, g.shape)
    added = float32(0)
    if a < count:
        for column in range(x, width, ACROSS):
            added += g[a, b, c, row, column] * out[a, b, c, row, column]
    parts[y, x] = added
    cuda.syncthreads()
    if x == 0 and a < count:
        added = float32(0)
        for j in range(ACROSS):
            added += parts[y, j]
        taken[a, b, c, row] = added


@kernel
def attend_back_to_queries(g, query, key, value, mask, largest, total, taken, to_query, scale, causal):
    """The gradient carried to SIDE queries, and SIDE of their columns. The arguments are those of `attend` and `take`.

    to_query (A, T, B, C, D).
    """
    left = cuda.shared.array((DEPTH, PADDED), float32)
    right = cuda.shared.array((DEPTH, PADDED), float32)
    weights = cuda.shared.array((SIDE, PADDED), float32)  # (keys, queries); then what scores are to change by
    products = cuda.local.array((TALL, WIDE), float32)  # scores; then what weights are to change by
    gathered = cuda.local.array((TALL, WIDE), float32)
    queries, keys, features = query.shape[3], key.shape[3], query.shape[4]
    tiles = (queries + SIDE - 1) // SIDE
    place = place_of(cuda.blockIdx.x // tiles, query.shape)
    a, b, c = place
    first = uint32(tiles - 1 - cuda.blockIdx.x % tiles) * SIDE
    panel = uint32(cuda.blockIdx.y) * SIDE
    x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
    clear(gathered)
    for start in range(0, min(keys, first + SIDE) if causal else keys, SIDE):
        products_of_rows(query[a, b, c], first, key[a, b, c], start, left, right, products)
        finish(products, scale, mask, place, first, start, queries, keys, causal, False)
        for i in range(TALL):
            row, top, share = first + y + DOWN * i, float32(0), float32(0)
            if row < queries:
                top, share = largest[a, b, c, row], float32(1) / total[a, b, c, row]
            for j in range(WIDE):
                weights[x + ACROSS * j, y + DOWN * i] = math.exp(products[i, j] - top) * share
        products_of_rows(g[a, b, c], first, value[a, b, c], start, left, right, products)
        for i in range(TALL):
            row = first + y + DOWN * i
            mean = taken[a, b, c, row] if row < queries else float32(0)
            for j in range(WIDE):
                weights[x + ACROSS * j, y + DOWN * i] *= products[i, j] - mean
        gather(weights, key[a, b, c], start, panel, right, gathered)
    for i in range(TALL):
        row = first + y + DOWN * i
        for j in range(WIDE):
            column = panel + x + ACROSS * j
            if row < queries and column < features:
                to_query[a, row, b, c, column] = gathered[i, j] * scale


@kernel
def attend_back_to_keys(g, query, key, value, mask, largest, total, taken, to_key, to_value, scale, causal):
    """The gradients carried to SIDE keys and their values, and SIDE columns of both.

    The arguments are those of `attend` and `take`. to_key (A, S, B, C, D), to_value (A, S, B, C, E).
    """
    left = cuda.shared.array((DEPTH, PADDED), float32)
    right = cuda.shared.array((DEPTH, PADDED), float32)
    weights = cuda.shared.array((SIDE, PADDED), float32)  # (queries, keys); then what scores are to change by
    products = cuda.local.array((TALL, WIDE), float32)
    to_keys = cuda.local.array((TALL, WIDE), float32)
    to_values = cuda.local.array((TALL, WIDE), float32)
    queries, keys, features, width = query.shape[3], key.shape[3], key.shape[4], value.shape[4]
    tiles = (keys + SIDE - 1) // SIDE
    place = place_of(cuda.blockIdx.x // tiles, query.shape)
    a, b, c = place
    first = uint32(cuda.blockIdx.x % tiles) * SIDE
    panel = uint32(cuda.blockIdx.y) * SIDE
    x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
    clear(to_keys)
    clear(to_values)
    for start in range(first if causal else 0, queries, SIDE):
        products_of_rows(key[a, b, c], first, query[a, b, c], start, left, right, products)
        finish(products, scale, mask, place, first, start, queries, keys, causal, True)
        for j in range(WIDE):
            column, top, share = start + x + ACROSS * j, float32(0), float32(0)
            if column < queries:
                top, share = largest[a, b, c, column], float32(1) / total[a, b, c, column]
            for i in range(TALL):
                weights[x + ACROSS * j, y + DOWN * i] = math.exp(products[i, j] - top) * share
        gather(weights, g[a, b, c], start, panel, right, to_values)
        products_of_rows(value[a, b, c], first, g[a, b, c], start, left, right, products)
        for j in range(WIDE):
            column = start + x + ACROSS * j
            mean = taken[a, b, c, column] if column < queries else float32(0)
            for i in range(TALL):
                weights[x + ACROSS * j, y + DOWN * i] *= products[i, j] - mean
        gather(weights, query[a, b, c], start, panel, right, to_keys)
    for i in range(TALL):
        row = first + y + DOWN * i
        for j in range(WIDE):
            column = panel + x + ACROSS * j
            if row < keys and column < features:
                to_key[a, row, b, c, column] = to_keys[i, j] * scale
            if row < keys and column < width:
                to_value[a, row, b, c, column] = to_values[i, j]


# -- one new token -----------------------------------------------------------------------------------------------------

LANES, TURNS = (4, 2) if SIMULATED else (32, 8)  # threads for neighbouring features, and for keys by turns
SPAN = 12 if SIMULATED else 256  # keys for a block
ROUND = 8 if SIMULATED else 64  # keys whose scores are made before the LANES parts of each are added up
APART = LANES + 1  # a row in shared memory: threads that read below each other meet at no bank
GROUPS = 3 if SIMULATED else 16  # of weights, of which one thread each finds the largest
GROUP = SPAN // GROUPS


@helper
def filled(lengths, sequence, capacity):
    """How many keys a sequence has; nobody reads outside of the cache, whatever `lengths` says."""
    return max(0, min(lengths[sequence], capacity))


@kernel
def attend_span(query, key, value, lengths, found, scale):
    """Attention of a head's one query to SPAN keys, which has yet to be compared with what other spans give.

    query (B, H, D), key (B, G, capacity, D), value (B, G, capacity, E), lengths (B,). found (B, H, spans, E + 2): the
    sum of weights times values, the largest score, and the sum of weights; nothing for a span behind the last key.
    Where there is one span only, the result: (B, H, 1, E).
    """
    parts = cuda.shared.array((ROUND, APART), float32)
    weights = cuda.shared.array(SPAN, float32)
    tops = cuda.shared.array(GROUPS, float32)
    (sequences, heads, features), (capacity, width), spans = query.shape, value.shape[2:], found.shape[2]
    span, pair = cuda.blockIdx.x // (sequences * heads), cuda.blockIdx.x % (sequences * heads)
    sequence, head = uint32(pair // heads), uint32(pair % heads)
    group = uint32(head // (heads // key.shape[1]))  # its blocks are neighbours, and find the keys in the second cache
    count = min(SPAN, filled(lengths, sequence, capacity) - span * SPAN)
    if count <= 0 and spans > 1:
        return
    span = uint32(span)
    first = span * SPAN
    x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
    number = y * LANES + x
    for begin in range(0, count, ROUND):
        here = min(ROUND, count - begin)
        for i in range(y, here, TURNS):
            added = float32(0)
            for d in range(x, features, LANES):
                added += query[sequence, head, d] * key[sequence, group, first + begin + i, d]
            parts[i, x] = added
        cuda.syncthreads()
        for i in range(number, here, LANES * TURNS):
            added = float32(0)
            for j in range(LANES):
                added += parts[i, j]
            weights[begin + i] = added * scale
        cuda.syncthreads()
    if number < GROUPS:
        top = float32(HIDDEN)
        for i in range(number * GROUP, min(number * GROUP + GROUP, count)):
            if weights[i] > top:
                top = weights[i]
        tops[number] = top
    cuda.syncthreads()
    top = float32(HIDDEN)
    for i in range(GROUPS):
        if tops[i] > top:
            top = tops[i]
    for i in range(number, count, LANES * TURNS):
        weights[i] = math.exp(weights[i] - finite(top))
    cuda.syncthreads()
    for panel in range(0, width, LANES):
        column, added, size = panel + x, float32(0), float32(0)
        for i in range(y, count, TURNS):
            size += weights[i]
            if column < width:
                added += weights[i] * value[sequence, group, first + i, column]
        parts[y, x] = added
        if x == 0:
            parts[y, LANES] = size
        cuda.syncthreads()
        if y == 0 and column < width:
            added, size = float32(0), float32(0)
            for i in range(TURNS):
                added += parts[i, x]
                size += parts[i, LANES]
            if spans == 1:
                added /= size if size != 0 else float32(1)  # without a key, 0
            elif column == 0:
                found[sequence, head, span, width], found[sequence, head, span, width + 1] = top, size
            found[sequence, head, span, column] = added
        cuda.syncthreads()


@kernel
def join_spans(found, lengths, out, capacity):
    """out (B, H, E): what the spans found, weighed by what their largest scores say; 0 without a key."""
    _, heads, width = out.shape
    sequence, head = uint32(cuda.blockIdx.x // heads), uint32(cuda.blockIdx.x % heads)
    spans = (filled(lengths, sequence, capacity) + SPAN - 1) // SPAN
    top = float32(HIDDEN)
    for span in range(spans):
        if found[sequence, head, span, width] > top:
            top = found[sequence, head, span, width]
    top = finite(top)
    for column in range(uint32(cuda.threadIdx.x), width, cuda.blockDim.x):
        added, size = float32(0), float32(0)
        for span in range(spans):
            factor = math.exp(found[sequence, head, span, width] - top)
            added += factor * found[sequence, head, span, column]
            size += factor * found[sequence, head, span, width + 1]
        out[sequence, head, column] = added / size if size != 0 else float32(0)


# -- entry points ------------------------------------------------------------------------------------------------------


def spread(xp: Any, x: Any, lead: tuple) -> Any:
    """A view (A, B, C, rows, columns) of x, broadcast over `lead`; a copy if those are more than three axes."""
    x = xp.broadcast_to(x, (*lead, *x.shape[-2:]))
    if len(lead) > MOST_LEADS:
        return xp.reshape(x, (-1, 1, 1, *x.shape[-2:]))
    return x[(..., *(None,) * (MOST_LEADS - len(lead)), slice(None), slice(None))]


def leads(lead: tuple) -> tuple[int, int, int]:
    """(A, B, C) of `spread`."""
    return (math.prod(lead), 1, 1) if len(lead) > MOST_LEADS else (*lead, 1, 1, 1)[:MOST_LEADS]


def gathered(xp: Any, x: Any, lead: tuple) -> Any:
    """(…, rows, columns), a view of an x (A, rows, B, C, columns), from which heads merge without a copy."""
    return xp.reshape(xp.permute_dims(x, (0, 2, 3, 1, 4)), (*lead, x.shape[1], x.shape[4]))


def additive(xp: Any, mask: Any, lead: tuple, rows: int, keys: int) -> Any:
    """A mask that is added, float32, as `spread` has it."""
    if mask is None:
        return None
    if xp.dtype_name(mask) == "bool":
        mask = xp.where(mask, *(xp.full((), value, dtype="float32") for value in (0, HIDDEN)))
    return readable(spread(xp, xp.broadcast_to(mask, (*mask.shape[:-2], rows, keys)), lead))


def check_shapes(query: Any, key: Any, value: Any, mask: Any) -> tuple:
    """(the leading shape, how many queries, keys, and features of a value); ValueError if they do not fit."""
    lead = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    (rows, features), (keys, width) = query.shape[-2:], value.shape[-2:]
    if key.shape[-2:] != (keys, features) or features == 0:
        raise ValueError(f"attention: queries {query.shape}, keys {key.shape} and values {value.shape} do not fit")
    if mask is not None and np.broadcast_shapes((*lead, rows, keys), mask.shape) != (*lead, rows, keys):
        raise ValueError(f"attention: a mask {mask.shape} does not broadcast to {(*lead, rows, keys)}")
    return lead, rows, keys, width


def attention(
    xp: Any, query: Any, key: Any, value: Any, mask: Any = None, *, is_causal: bool = False, scale: float | None = None
) -> tuple[Any, ...]:
    """softmax(scale query keyᵀ + mask) value, and each query's largest score and sum: the twin of module 13's."""
    lead, rows, keys, width = check_shapes(query, key, value, mask)
    if not (rows and keys and math.prod(lead)):
        largest, total = xp.zeros((*lead, rows, 1), dtype="float32"), xp.ones((*lead, rows, 1), dtype="float32")
        return xp.zeros((*lead, rows, width), dtype="float32"), largest, total
    a, b, c = leads(lead)
    out = xp.empty((a, rows, b, c, width), dtype="float32")
    largest, total = (xp.empty((a, b, c, rows), dtype="float32") for _ in range(2))
    blocks = a * b * c * blocks_for(rows, SIDE), max(1, blocks_for(width, SIDE))
    arrays = (readable(spread(xp, x, lead)) for x in (query, key, value))
    given = *arrays, additive(xp, mask, lead, rows, keys)
    options = np.float32(query.shape[-1] ** -0.5 if scale is None else scale), bool(is_causal)
    run(attend, blocks, (ACROSS, DOWN), *given, out, largest, total, *options)
    return gathered(xp, out, lead), *(xp.reshape(x, (*lead, rows, 1)) for x in (largest, total))


def attention_gradients(
    xp: Any, g: Any, query: Any, key: Any, value: Any, mask: Any, out: Any, largest: Any, total: Any, *,
    is_causal: bool = False, scale: float | None = None, mask_gradient: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients of `attention` carried to query, key and value: module 13's twin, but for a mask's gradient."""
    lead, rows, keys, width = check_shapes(query, key, value, mask)
    if mask_gradient:
        raise ValueError("attention_gradients: this kernel has no gradient for a mask")
    features = query.shape[-1]
    if not (rows and keys and math.prod(lead)):
        return tuple(xp.zeros((*lead, *shape), dtype="float32")
                     for shape in ((rows, features), (keys, features), (keys, width)))  # fmt: skip
    a, b, c = leads(lead)
    pairs = a * b * c
    g, query, key, value, out = (readable(spread(xp, x, lead)) for x in (g, query, key, value, out))
    mask = additive(xp, mask, lead, rows, keys)
    # scores may have fewer leading axes than values
    largest, total = (readable(spread(xp, x, lead)[..., 0]) for x in (largest, total))
    taken = xp.empty((a, b, c, rows), dtype="float32")
    run(take, blocks_for(pairs * rows, DOWN), (ACROSS, DOWN), g, out, taken)
    to_query, to_key, to_value = (
        xp.empty((a, n, b, c, m), dtype="float32") for n, m in ((rows, features), (keys, features), (keys, width))
    )
    given = g, query, key, value, mask, largest, total, taken
    options = np.float32(features**-0.5 if scale is None else scale), bool(is_causal)
    blocks = pairs * blocks_for(rows, SIDE), blocks_for(features, SIDE)
    run(attend_back_to_queries, blocks, (ACROSS, DOWN), *given, to_query, *options)
    blocks = pairs * blocks_for(keys, SIDE), blocks_for(max(features, width), SIDE)
    run(attend_back_to_keys, blocks, (ACROSS, DOWN), *given, to_key, to_value, *options)
    return tuple(gathered(xp, x, lead) for x in (to_query, to_key, to_value))


def cached_attention(xp: Any, query: Any, key: Any, value: Any, lengths: Any, *, scale: float | None = None) -> Any:
    """Attention of one new token of each sequence: query (B, H, D), key (B, G, capacity, D), value (B, G, capacity, E).

    lengths: (B,) integers, how many of a sequence's keys there are. They lie on the device, so that nobody complains of
    more than there can be. H is a multiple of G: H / G queries in a row share the keys of a head. (B, H, E).
    """
    (batch, heads, features), (*_, capacity, width) = query.shape, value.shape
    out = xp.empty((batch, heads, width), dtype="float32")
    if not batch * heads * width:
        return out
    spans = max(1, blocks_for(capacity, SPAN))
    found = xp.empty((batch, heads, spans, width + 2), dtype="float32") if spans > 1 else out[:, :, None]
    arrays, lengths = (readable(x) for x in (query, key, value)), row_by_row(lengths)
    factor = np.float32(features**-0.5 if scale is None else scale)
    run(attend_span, batch * heads * spans, (LANES, TURNS), *arrays, lengths, found, factor)
    if spans > 1:
        run(join_spans, batch * heads, min(THREADS, width), found, lengths, out, capacity)
    return out
