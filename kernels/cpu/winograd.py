"""3×3 convolutions with two thirds of the multiplications, by Winograd's F(2, 3) along the rows.

Two results that lie side by side, y0 = g0 d0 + g1 d1 + g2 d2 and y1 = g0 d1 + g1 d2 + g2 d3, take six multiplications.
Four do as well (Winograd, 1980; for networks Lavin and Gray, 2016):

    m0 = g0 (d0 - d2)                       y0 = m0 + m1 + m2
    m1 = (g0 + g1 + g2) / 2 · (d1 + d2)     y1 = m1 - m2 - m3
    m2 = (g0 - g1 + g2) / 2 · (d2 - d1)
    m3 = g2 (d1 - d3)

All that is linear: the sums over channels and rows are taken of m0 … m3, each of which is a convolution of a picture of
half the width with a kernel of one column, and done by the tiles of `convolution.py`. Before it, the pixels become
right factors, and the weights left ones, once for all pictures; after it, four numbers become two. That takes a few
operations for each pixel and channel, and the products some for each pixel and pair of channels: so it pays from some
channels on.
The halves are exact, and the sums lose less than a digit; where a pixel is infinite, results that see it may be nan.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
from numba import prange

from tinytorch.kernels.cpu.convolution import (
    Axis,
    Plan,
    clear_rows,
    convolve_phase,
    copy_rows,
    make_plan,
    place_of_job,
    scratch_for,
    split,
)
from tinytorch.kernels.cpu.jit import cores, kernel, plain, run
from tinytorch.kernels.cpu.lines import even, high, low, odd, store_some
from tinytorch.kernels.cpu.tiles import ROWS, VECTOR_BYTES, rows_from
from tinytorch.kernels.cpu.vectors import LANES, address, apart, blank, load, maximum, where_less

__all__ = ["convolution", "convolution_input_gradient", "convolution_relu"]

FACTORS = 4  # m0 … m3


# -- pixels ------------------------------------------------------------------------------------------------------------


@kernel
def to_differences(target, plane, line, edges, count):
    """The right factors of `count` pairs of results, which follow one another through the rows, in four planes.

    line: the address of the first pair's d1. Behind a row's last pixel the next row's first stands, and not the zero of
    the border. edges: for each pair -1 where it is its row's first, 1 where it is the last, else 0.
    """
    apart()
    for k in range(0, count, LANES):
        here, edge, rest = line + 8 * k, load(edges + 4 * k), count - k
        a, b = load(here), load(here + VECTOR_BYTES)
        d1, d2 = even(a, b), odd(a, b)
        d0 = where_less(edge, blank(), blank(), odd(load(here - 8), load(here - 8 + VECTOR_BYTES)))
        d3 = where_less(blank(), edge, blank(), even(load(here + 8), load(here + 8 + VECTOR_BYTES)))
        to = target + 4 * k
        store_some(to, d0 - d2, rest)
        store_some(to + plane, d1 + d2, rest)
        store_some(to + 2 * plane, d2 - d1, rest)
        store_some(to + 3 * plane, d1 - d3, rest)


@kernel
def lay_out_differences(target, source, plan, first, edges, line):
    """For each channel the right factors of `plan.rows` rows, from row `first` of the picture on.

    line: the address of a scratch in which vectors may read beyond a channel's pixels, to both sides.
    """
    apart()
    plane, pitch = 4 * plan.rows * plan.pitch, 4 * plan.pitch
    above = min(plan.rows, max(0, -first))
    shown = min(plan.rows, max(above, plan.height - first)) - above
    for _ in range(plan.channels):
        copy_rows(line, 0, source + 4 * (first + above) * plan.width, 0, 1, shown * plan.width, 1)
        to_differences(target + above * pitch, plane, line, edges, shown * plan.pitch)
        if plan.bands > 1:  # else these rows are the same in each picture, and are 0
            clear_rows(target, plane, FACTORS, above * plan.pitch)
            clear_rows(target + (above + shown) * pitch, plane, FACTORS, (plan.rows - above - shown) * plan.pitch)
        target += FACTORS * plane
        source += 4 * plan.height * plan.width


# -- weights -----------------------------------------------------------------------------------------------------------


@kernel
def to_left_factors(weight, turned, out):
    """The left factors of (T, S, 3, 3), out (T, S, 3, 4); if turned, of (S, T, 3, 3) with its pixels backwards."""
    targets, sources = out.shape[:2]
    for t in range(targets):
        for s in range(sources):
            for u in range(3):
                if turned:
                    g0, g1, g2 = weight[s, t, 2 - u, 2], weight[s, t, 2 - u, 1], weight[s, t, 2 - u, 0]
                else:
                    g0, g1, g2 = weight[t, s, u, 0], weight[t, s, u, 1], weight[t, s, u, 2]
                outer, inner = (g0 + g2) * np.float32(0.5), g1 * np.float32(0.5)
                out[t, s, u, 0], out[t, s, u, 1] = g0, outer + inner
                out[t, s, u, 2], out[t, s, u, 3] = outer - inner, g2


# -- results -----------------------------------------------------------------------------------------------------------


@kernel
def multiply_panel(weight_rows, bias_rows, zero_rows, target_rows, phase_bytes, source, plan, vectors):
    """m0 … m3 of some channels; m1, which both results add, begins with the bias."""
    apart()
    for phase in range(FACTORS):
        starts = bias_rows if phase == 1 else zero_rows
        convolve_phase(phase, starts, weight_rows, target_rows, phase_bytes, source, plan, vectors, False)


@kernel
def write_pairs(target, picture_bytes, plane_bytes, buffer, phase, row_bytes, plan, channels, pictures, rectify):
    """What a buffer (m0 … m3, rows of channels, pairs) gives, to `channels` channels of some pictures."""
    apart()
    pairs = plan.band * plan.across
    for n in range(pictures):
        for channel in range(channels):
            source = buffer + channel * row_bytes + 4 * n * pairs
            place = target + n * picture_bytes + channel * plane_bytes
            for k in range(0, pairs, LANES):
                here, rest = source + 4 * k, 2 * (pairs - k)
                m1, m2 = load(here + phase), load(here + 2 * phase)
                first, second = load(here) + m1 + m2, m1 - m2 - load(here + 3 * phase)
                if rectify:
                    first, second = maximum(first, blank()), maximum(second, blank())
                store_some(place + 8 * k, low(first, second), rest)
                if rest > LANES:
                    store_some(place + 8 * k + VECTOR_BYTES, high(first, second), rest - LANES)


@kernel
def convolve_pairs(first, last, x, factors, bias, out, plan, above, edges, rectify):
    """The results of the jobs from `first` to `last`. above: how many rows of zeros the picture has above it."""
    count, outputs, height, width = out.shape
    plane_bytes, picture_bytes = 4 * height * width, 4 * plan.channels * plan.height * plan.width
    scratch, zero = scratch_for(plan), np.zeros(1, np.float32)
    line = np.zeros(plan.rows * plan.width + 4 * LANES, np.float32)
    buffer = np.zeros((FACTORS, ROWS, len(plan.pixels) // 2 + LANES), np.float32)
    row_bytes, phase_bytes = 4 * buffer.shape[2], 4 * ROWS * buffer.shape[2]
    for job in range(first, last):
        picture, top = place_of_job(job, plan)
        pictures = min(plan.pictures, count - picture)
        vectors = len(plan.vectors) // plan.pictures * pictures
        for n in range(pictures):
            lay_out_differences(
                address(scratch) + n * plan.picture_bytes, address(x) + (picture + n) * picture_bytes, plan,
                top - above, address(edges), address(line) + VECTOR_BYTES,
            )  # fmt: skip
        for output in range(0, outputs, ROWS):
            rows = min(ROWS, outputs - output)
            multiply_panel(
                rows_from(address(factors) + output * plan.weight_step, plan.weight_step, rows - 1, ROWS),
                rows_from(address(bias) + 4 * output, 4, rows - 1, ROWS), rows_from(address(zero), 0, rows - 1, ROWS),
                rows_from(address(buffer), row_bytes, rows - 1, ROWS), phase_bytes, address(scratch), plan, vectors,
            )  # fmt: skip
            target = address(out) + (picture * outputs + output) * plane_bytes + 4 * top * width
            write_pairs(
                target, outputs * plane_bytes, plane_bytes, address(buffer), phase_bytes, row_bytes, plan, rows,
                pictures, rectify,
            )  # fmt: skip


@kernel(parallel=True)
def convolve_pairs_on_cores(parts, jobs, x, factors, bias, out, plan, above, edges, rectify):
    for part in prange(parts):
        first, last = jobs * part // parts, jobs * (part + 1) // parts
        convolve_pairs(first, last, x, factors, bias, out, plan, above, edges, rectify)


def convolve_pairs_serially(parts, jobs, *arguments):
    convolve_pairs(0, jobs, *arguments)


# -- entry points ------------------------------------------------------------------------------------------------------


@lru_cache(1024)
def pair_plan(source: tuple, outputs: int, rows: int, above: int, bands: int, pictures: int) -> Plan:
    """The plan for results of `rows` rows, of pictures `source` (C, H, W): m0 … m3 are its four phases."""
    channels, _, width = source
    down = [Axis((0, 1, 2), tuple(u - above for u in range(3)), 1, rows)]
    across = [Axis((i,), (i,), FACTORS, width // 2) for i in range(FACTORS)]  # a plane of its own for each
    steps = (3 * FACTORS, 3 * FACTORS * channels, FACTORS)
    return make_plan(down, across, source, (outputs, rows, width // 2), 1, *steps, bands, pictures)


@lru_cache(1024)
def edges_of(pairs: int, rows: int) -> np.ndarray:
    """For each pair of some rows, which have `pairs` of them: -1, 0 or 1, see `to_differences`."""
    edges = np.zeros(rows * pairs + LANES, np.float32)
    edges[: rows * pairs : pairs], edges[pairs - 1 : rows * pairs : pairs] = -1, 1
    return edges


def convolve(x: Any, weight: Any, bias: Any, turned: bool, above: int, rows: int, rectify: bool) -> np.ndarray:
    """The 3×3 convolution of (N, S, H, W), which has a column of zeros on each side: (N, T, rows, W)."""
    pictures, channels, height, width = x.shape
    outputs = weight.shape[1] if turned else len(weight)
    out = np.empty((pictures, outputs, rows, width), np.float32)
    if out.size:
        plan = pair_plan((channels, height, width), outputs, rows, above, *split(pictures, rows * width // 2))
        factors = np.empty((outputs, channels, 3, FACTORS), np.float32)
        to_left_factors(plain(weight), turned, factors)
        bias = np.zeros(outputs, np.float32) if bias is None else plain(bias)
        jobs = -(-pictures // plan.pictures) * plan.bands
        run(
            convolve_pairs_serially, convolve_pairs_on_cores, out.size * channels * 6 >> 6, cores(), jobs, plain(x),
            factors, bias, out, plan, above, edges_of(plan.pitch, plan.rows), rectify,
        )  # fmt: skip
    return out


def convolution(
    xp: Any, x: Any, weight: Any, bias: Any = None, *, windows: Any, groups: int, activation: str | None = None
) -> np.ndarray:
    """See `tinytorch.m09_spatial.convolution`; for windows that module 16's condition takes."""
    return convolve(x, weight, bias, False, windows.padding[0][0], windows.count[0], activation == "relu")


def convolution_input_gradient(xp: Any, g: Any, weight: Any, *, windows: Any, groups: int) -> np.ndarray:
    """See `tinytorch.m09_spatial.convolution_input_gradient`: a convolution with the turned weight."""
    return convolve(g, weight, None, True, 2 - windows.padding[0][0], windows.shape[0], False)


convolution_relu = partial(convolution, activation="relu")
