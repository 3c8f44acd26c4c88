"""Convolution and both of its gradients, straight from the pictures: nothing is laid out as columns.

A picture is copied once, with its border of zeros, into a scratch that stays in the cache, and laid out so that what
LANES neighbouring results need from it are always LANES neighbours, whatever the stride: the pixels of every second
column, say, lie together. So each element of a window, a *tap*, is nothing but a distance in that scratch, and a
convolution of any geometry is, for each tap, `results += weight[tap] * pixels[place + distance[tap]]`. A plan holds
these distances, in tables that are made once for a geometry.

All arithmetic is in `products`. It keeps a tile of ROWS channels × 2 vectors of results in registers, adds one tap
after another, and so needs 10 loads for 16 multiply-adds of vectors: the CPU's limit is its arithmetic, not its memory.
The gradient of the input is a convolution of the gradient with the transposed weight, or one for each place modulo the
stride. The gradient of the weight is the same tile with other things in it: ROWS taps × 2 vectors of output channels,
added up over pixels instead of taps.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from tinytorch.kernels.cpu.jit import cores, kernel, plain, run
from tinytorch.kernels.cpu.lines import every_second
from tinytorch.kernels.cpu.lines import high as weave_high
from tinytorch.kernels.cpu.lines import low as weave_low
from tinytorch.kernels.cpu.tiles import (
    FEW_ROWS,
    PAIR,
    ROWS,
    VECTOR_BYTES,
    at,
    load_tile,
    packed,
    products,
    rectified,
    row_or_last,
    rows_from,
    spread,
    store_tile,
    transpose,
    turn,
)
from tinytorch.kernels.cpu.vectors import (
    I64,
    LANES,
    address,
    apart,
    blank,
    floats,
    load,
    load_part,
    store,
    store_part,
)

__all__ = ["convolution", "convolution_input_gradient", "convolution_weight_gradient"]

SCRATCH = 1 << 19  # bytes of a laid out picture or band of one: half of a second-level cache
BLOCK = 256  # small pictures are computed a few at a time, with so many pixels together


# -- plans ----------------------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """What results need along an axis: results[m] = Σ_t weight[taps[t]] · source[stride · m + starts[t]], m < count.

    A convolution has one such axis down and one across, the gradient of its input one for each place modulo the
    stride, a *phase*.
    """

    taps: tuple[int, ...]
    starts: tuple[int, ...]  # may lie outside of the source, where there are zeros
    stride: int
    count: int  # type: ignore[assignment]  # a tuple has a method of that name


class Plan(NamedTuple):
    """How jobs are done. A job is a band of rows of one picture's results, or a few small pictures."""

    taps: np.ndarray  # for each tap a pair, in bytes: where its weight is in a row of weights, its pixel in a window
    phases: np.ndarray  # where each phase's taps begin, and where the last one's end
    vectors: (
        np.ndarray
    )  # for each vector of results, in bytes: its first window in the scratch, its first result's place
    pixels: np.ndarray  # for each result a pair, in bytes: its window in the scratch, its place if each took a vector
    row_starts: np.ndarray  # for each row plane of the scratch, see `lay_out`
    columns: np.ndarray  # for each column plane: start, low, high
    row_stride: int
    column_stride: int
    height: int  # of a picture of the source, of which results are sums
    width: int
    channels: int  # of a group of it
    rows: int  # of a plane of the scratch
    pitch: int  # pixels of such a row
    picture_bytes: int  # of the scratch
    direct: bool  # whether the source itself serves as scratch
    pictures: int  # of a job
    bands: int  # jobs of a picture
    band: int  # rows of results in a job, of each phase
    last_band: int  # the row that the last band begins with; it may overlap the band before
    across: int  # results in a row, of each phase
    row_phases: int
    column_phases: int
    buffered: bool  # whether results go by way of a buffer to where they belong
    weight_step: int  # bytes between rows of weights


def planes(axes: list[Axis], apart: bool) -> tuple[list[int], list[np.ndarray], int]:
    """What a scratch holds along an axis: planes, each of every stride-th pixel from its start on.

    Args:
        apart: whether every tap has a plane of its own, of just the pixels it meets; else those share one that can.

    Returns:
        The planes' starts; for each phase the taps' (plane, distance in it); how many pixels a plane has besides the
        results'.
    """
    stride = axes[0].stride
    kind = lambda start: start if apart else start % stride
    firsts: dict[int, int] = {}
    for start in sorted(start for axis in axes for start in axis.starts):
        firsts.setdefault(kind(start), start)
    names = list(firsts)
    places = [[(names.index(kind(at)), (at - firsts[kind(at)]) // stride) for at in axis.starts] for axis in axes]
    more = max((distance for phase in places for _, distance in phase), default=0)
    return list(firsts.values()), [np.array(phase, np.int64).reshape(-1, 2) for phase in places], more


def make_plan(
    down: list[Axis], across: list[Axis], source: tuple, target: tuple, groups: int, channel_step: int,
    weight_step: int, kernel_width: int, bands: int, pictures: int,
) -> Plan:  # fmt: skip
    """The plan for the phases of two axes, over pictures `source` (C, H, W), that give pictures `target` (O, OH, OW).

    Args:
        channel_step, weight_step: from a weight to that of the next channel of the source, and of the target.
        bands, pictures: into how many bands a picture is cut at least; how many pictures a job has at most.
    """
    (_, height, width), channels = source, source[0] // groups
    count, row_stride, column_count, column_stride = down[0].count, down[0].stride, across[0].count, across[0].stride
    row_starts, row_places, more_rows = planes(down, apart=False)
    column_starts, column_places, more_columns = planes(across, apart=column_count % LANES > 0)  # vectors run over rows
    pitch, channel_planes = column_count + more_columns, len(row_starts) * len(column_starts)

    size = 4 * channels * channel_planes * (count + more_rows) * pitch  # of the scratch of a whole picture
    bands = min(max(bands, -(-size // SCRATCH)), max(1, count * column_count // LANES), count)
    band = -(-count // bands)
    bands = -(-count // band)
    pictures = max(1, min(pictures, SCRATCH // max(1, size))) if bands == 1 else 1
    results = band * column_count
    itself = [[Axis((0,), (0,), 1, height)], [Axis((0,), (0,), 1, width)]]
    direct = [down, across] == itself and results >= LANES
    rows = height if direct else band + more_rows
    plane = rows * pitch
    picture = plane * (source[0] if direct else channels * channel_planes)

    c, tables = np.arange(channels)[:, None, None], []
    for axis, (a, i) in ((axis, places.T[..., None]) for axis, places in zip(down, row_places, strict=True)):
        for other, (b, j) in ((other, places.T) for other, places in zip(across, column_places, strict=True)):
            taps = np.array(axis.taps, np.int64)[:, None] * kernel_width + np.array(other.taps, np.int64)
            distances = ((c * len(row_starts) + a) * len(column_starts) + b) * plane + i * pitch + j
            tables.append(pairs(c * channel_step + taps, distances))

    n, i, j = np.arange(pictures)[:, None, None], np.arange(band)[:, None], np.arange(column_count)
    windows = (n * picture + i * pitch + j).ravel()
    buffered = results < LANES or len(tables) > 1
    places = (n * (results if buffered else math.prod(target)) + i * column_count + j).ravel()
    first = np.minimum(np.arange(0, results, LANES), max(0, results - LANES))  # the last vector overlaps that before
    first = (n[:, 0] * results + first).ravel()
    inside = [[min(max(0, -((s - end) // column_stride)), pitch) for end in (0, width)] for s in column_starts]
    return Plan(
        taps=4 * np.concatenate(tables).ravel(),
        phases=np.cumsum([0] + [len(table) for table in tables]),
        vectors=4 * pairs(windows[first], places[first]),
        pixels=4 * pairs(windows, LANES * np.arange(len(windows))).ravel(),
        row_starts=np.array(row_starts, np.int64),
        columns=np.array([(start, *ends) for start, ends in zip(column_starts, inside, strict=True)]).reshape(-1, 3),
        row_stride=row_stride, column_stride=column_stride, height=height, width=width, channels=channels, rows=rows,
        pitch=pitch, picture_bytes=4 * picture, direct=direct, pictures=pictures, bands=bands, band=band,
        last_band=count - band, across=column_count, row_phases=len(down), column_phases=len(across), buffered=buffered,
        weight_step=4 * weight_step,
    )  # fmt: skip


def pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The elements of two arrays side by side: (…, 2)."""
    return np.stack(np.broadcast_arrays(a, b), -1).reshape(-1, 2)


def split(pictures: int, pixels: int) -> tuple[int, int]:
    """(bands of a picture, pictures of a job) that give every core the same work."""
    several = cores()
    bands = several if pictures % several and pictures < 8 * several else 1
    return bands, max(1, min(BLOCK // pixels, pictures // several))


@lru_cache(1024)
def forward_plan(windows: Any, channels: int, outputs: int, groups: int, bands: int, pictures: int) -> Plan:
    """The plan of a convolution, and of its weight's gradient."""
    down, across = [
        [Axis(tuple(range(k)), tuple(u * d - before for u in range(k)), s, count)]
        for k, s, (before, _), d, count in zip(
            windows.size, windows.stride, windows.padding, windows.dilation, windows.count, strict=True
        )
    ]
    taps, source, target = math.prod(windows.size), (channels, *windows.shape), (outputs, *windows.count)
    steps = (taps, channels // groups * taps, windows.size[1])
    return make_plan(down, across, source, target, groups, *steps, bands, pictures)


@lru_cache(1024)
def backward_plan(windows: Any, channels: int, outputs: int, groups: int, bands: int, pictures: int) -> Plan:
    """The plan of the input's gradient. Tap u of window i is at i · stride + u · dilation - before. So place
    stride · m + phase is tap u of window m + (phase + before - u · dilation) / stride, if that is whole."""
    axes = []
    for pixels, k, s, (before, _), d in zip(
        windows.shape, windows.size, windows.stride, windows.padding, windows.dilation, strict=True
    ):
        phases = []
        for phase in range(s):
            met = [divmod(phase + before - u * d, s) for u in range(k)]
            taps = tuple(u for u, (_, rest) in enumerate(met) if rest == 0)
            phases.append(Axis(taps, tuple(met[u][0] for u in taps), 1, -(-pixels // s)))
        axes.append(phases)
    down, across = axes
    taps, source, target = math.prod(windows.size), (outputs, *windows.count), (channels, *windows.shape)
    steps = (channels // groups * taps, taps, windows.size[1])
    return make_plan(down, across, source, target, groups, *steps, bands, pictures)


# -- tiles of results -------------------------------------------------------------------------------------------------


@intrinsic
def rows_of_taps(typing, first, taps, last):
    """The same for ROWS taps, whose distances from the first are the seconds of the pairs at an address."""
    kind = types.UniTuple(types.int64, ROWS)

    def generate(context, b, signature, arguments):
        first, taps, last = arguments
        pairs = [b.add(taps, b.mul(row_or_last(b, i, last), ir.Constant(I64, PAIR))) for i in range(ROWS)]
        return packed(context, b, kind, [b.add(first, at(b, b.add(p, ir.Constant(I64, 8)), I64)) for p in pairs])

    return kind(types.int64, types.int64, types.int64), generate


@kernel
def convolve_tile(bias_rows, weight_rows, columns, taps, count, rectify, target_rows, places):
    """A tile of results: the sum over `count` taps, whose shifts begin at the address `taps`."""
    apart()
    tile = spread(bias_rows, columns)
    tile = products(tile, weight_rows, columns, taps, count)
    if rectify:
        tile = rectified(tile)
    store_tile(tile, target_rows, places)


# -- the scratch ----------------------------------------------------------------------------------------------------


@kernel
def copy_rows(target, target_step, source, source_step, rows, count, stride):
    """Copy rows of `count` numbers, taken from every stride-th place; steps from row to row in bytes."""
    apart()
    whole = count - count % LANES
    rest = count - whole
    if stride == 1:
        for start in range(0, 4 * whole, VECTOR_BYTES):
            for row in range(rows):
                store(target + row * target_step + start, load(source + row * source_step + start))
        if rest:
            for row in range(rows):
                part = load_part(source + row * source_step + 4 * whole, rest)
                store_part(target + row * target_step + 4 * whole, part, rest)
    elif stride == 2:
        for start in range(0, 4 * whole, VECTOR_BYTES):
            for row in range(rows):
                place = source + row * source_step + 2 * start
                pixels = every_second(load(place), load(place + VECTOR_BYTES - 4))
                store(target + row * target_step + start, pixels)
        if rest:
            first, second = min(2 * rest - 1, LANES), max(0, 2 * rest - LANES)
            for row in range(rows):
                place = source + row * source_step + 8 * whole
                pixels = every_second(load_part(place, first), load_part(place + VECTOR_BYTES - 4, second))
                store_part(target + row * target_step + 4 * whole, pixels, rest)
    elif count > 0:
        for row in range(rows):
            to = floats(target + row * target_step, count)
            out_of = floats(source + row * source_step, (count - 1) * stride + 1)
            for i in range(count):
                to[i] = out_of[i * stride]


@kernel
def clear_rows(target, step, rows, count):
    for row in range(rows):
        for start in range(0, count, LANES):
            store_part(target + row * step + 4 * start, blank(), count - start)


@kernel
def lay_out(target, source, plan, top):
    """Copy what results from row `top` on need: for each channel, row plane and column plane, `plan.rows` rows.

    A row plane holds every row_stride-th row of the picture, from its start on. A column plane (start, low, high) holds
    every column_stride-th pixel of these rows; only those from low to high lie in the picture, and the others stay 0.
    """
    apart()
    row_bytes, pitch_bytes = 4 * plan.width * plan.row_stride, 4 * plan.pitch
    for _ in range(plan.channels):
        for start_row in plan.row_starts:
            first_row = start_row + top * plan.row_stride
            above = min(plan.rows, max(0, -(first_row // plan.row_stride)))  # rows of the plane above the picture
            below = min(plan.rows, max(above, -((first_row - plan.height) // plan.row_stride)))
            for plane in range(len(plan.columns)):
                start, low, high = plan.columns[plane, 0], plan.columns[plane, 1], plan.columns[plane, 2]
                pixel = first_row * plan.width + start + low * plan.column_stride
                first, out_of = target + 4 * low, source + 4 * pixel + above * row_bytes
                to, count = first + above * pitch_bytes, high - low
                copy_rows(to, pitch_bytes, out_of, row_bytes, below - above, count, plan.column_stride)
                if plan.bands > 1:  # else these rows are the same in each picture, and are 0
                    clear_rows(first, pitch_bytes, above, count)
                    clear_rows(first + below * pitch_bytes, pitch_bytes, plan.rows - below, count)
                target += plan.rows * pitch_bytes
        source += 4 * plan.height * plan.width


@kernel(inline="always")
def place_of_job(job, plan):
    """(first picture, first row of results)."""
    return job // plan.bands * plan.pictures, min(job % plan.bands * plan.band, plan.last_band)


@kernel(inline="always")
def laid_out(scratch, source, plan, pictures, groups, top):
    """The address of a group's pixels, laid out as the plan's tables say: the scratch, filled, or the source itself."""
    channel_bytes = 4 * plan.height * plan.width
    if plan.direct:
        return source + 4 * top * plan.width
    for n in range(pictures):
        lay_out(scratch + n * plan.picture_bytes, source + n * groups * plan.channels * channel_bytes, plan, top)
    return scratch


@kernel(inline="always")
def scratch_for(plan):
    """Room for a job, and for what a vector reads beyond the last pixels."""
    return np.zeros(0 if plan.direct else plan.pictures * plan.picture_bytes // 4 + LANES, np.float32)


# -- convolution ----------------------------------------------------------------------------------------------------


@kernel
def weave(target, source, phase_bytes, phases, count):
    """Write `count` numbers, taken from each of the phases in turn."""
    if phases == 1:
        for start in range(0, count, LANES):
            store_part(target + 4 * start, load(source + 4 * start), count - start)
    elif phases == 2:
        for start in range(0, count, 2 * LANES):
            place = source + 2 * start
            even, odd = load(place), load(place + phase_bytes)
            store_part(target + 4 * start, weave_low(even, odd), count - start)
            store_part(target + 4 * start + VECTOR_BYTES, weave_high(even, odd), count - start - LANES)
    else:
        to = floats(target, count)
        for phase in range(phases):
            some = (count - phase + phases - 1) // phases
            out_of = floats(source + phase * phase_bytes, some)
            for i in range(some):
                to[phase + i * phases] = out_of[i]


@kernel
def write_buffer(target, picture_bytes, height, width, buffer, phase_bytes, row_bytes, plan, channels, pictures, top):
    """Write what a buffer (phases, rows of channels, pixels) holds to `channels` channels of some pictures."""
    apart()  # and the other parts of `convolve`, which would take LLVM long as one function
    for n in range(pictures):
        for channel in range(channels):
            for i in range(plan.band):
                source = buffer + channel * row_bytes + 4 * (n * plan.band + i) * plan.across
                for phase in range(plan.row_phases):
                    row = (top + i) * plan.row_phases + phase
                    if row < height:
                        place = target + n * picture_bytes + 4 * (channel * height + row) * width
                        first = source + phase * plan.column_phases * phase_bytes
                        weave(place, first, phase_bytes, plan.column_phases, width)


@kernel(inline="always")
def convolve_phase(phase, start_rows, weight_rows, target_rows, phase_bytes, source, plan, vectors, rectify):
    """One phase's results of some channels, all vectors; what is added up begins with the numbers at `start_rows`."""
    table, taps = plan.vectors, address(plan.taps) + PAIR * plan.phases[phase]
    count = plan.phases[phase + 1] - plan.phases[phase]
    for v in range(0, vectors, 2):
        w = min(v + 1, vectors - 1)
        columns = (source + table[v, 0], source + table[w, 0])
        places = (phase * phase_bytes + table[v, 1], phase * phase_bytes + table[w, 1])
        convolve_tile(start_rows, weight_rows, columns, taps, count, rectify, target_rows, places)


@kernel
def convolve_panel(weight_rows, bias_rows, target_rows, phase_bytes, source, plan, vectors, rectify):
    """The results of some channels, all phases and vectors; the rows' addresses are those of the first phase."""
    apart()
    for phase in range(len(plan.phases) - 1):
        convolve_phase(phase, bias_rows, weight_rows, target_rows, phase_bytes, source, plan, vectors, rectify)


@kernel
def convolve(first, last, x, weight, bias, out, plan, groups, rectify):
    """The results of the jobs from `first` to `last`."""
    count, all_outputs, height, width = out.shape
    outputs, plane_bytes = all_outputs // groups, 4 * height * width
    group_bytes = 4 * plan.channels * plan.height * plan.width
    scratch = scratch_for(plan)
    buffer = np.zeros((len(plan.phases) - 1, ROWS, len(plan.pixels) // 2 + LANES if plan.buffered else 0), np.float32)
    row_bytes, phase_bytes = 4 * buffer.shape[2], 4 * ROWS * buffer.shape[2]
    for job in range(first, last):
        picture, top = place_of_job(job, plan)
        pictures = min(plan.pictures, count - picture)
        vectors = len(plan.vectors) // plan.pictures * pictures
        for group in range(groups):
            source = address(x) + (picture * groups + group) * group_bytes
            source = laid_out(address(scratch), source, plan, pictures, groups, top)
            for output in range(0, outputs, ROWS):
                channel, rows = group * outputs + output, min(ROWS, outputs - output)
                weights = address(weight) + 4 * group * (weight.size // groups) + output * plan.weight_step
                biases, end = address(bias) + 4 * channel, rows - 1
                target = address(out) + (picture * all_outputs + channel) * plane_bytes
                if plan.buffered:
                    place, step = address(buffer), row_bytes
                else:
                    place, step = target + 4 * top * width, plane_bytes
                if rows > FEW_ROWS:
                    convolve_panel(
                        rows_from(weights, plan.weight_step, end, ROWS), rows_from(biases, 4, end, ROWS),
                        rows_from(place, step, end, ROWS), phase_bytes, source, plan, vectors, rectify,
                    )  # fmt: skip
                else:
                    convolve_panel(
                        rows_from(weights, plan.weight_step, end, FEW_ROWS), rows_from(biases, 4, end, FEW_ROWS),
                        rows_from(place, step, end, FEW_ROWS), phase_bytes, source, plan, vectors, rectify,
                    )  # fmt: skip
                if plan.buffered:
                    write_buffer(
                        target, all_outputs * plane_bytes, height, width, address(buffer), phase_bytes, row_bytes,
                        plan, rows, pictures, top,
                    )  # fmt: skip


@kernel(parallel=True)
def convolve_on_cores(first, last, x, weight, bias, out, plan, groups, rectify, parts):
    for part in prange(parts):
        convolve(last * part // parts, last * (part + 1) // parts, x, weight, bias, out, plan, groups, rectify)


def convolve_serially(first, last, x, weight, bias, out, plan, groups, rectify, parts):
    convolve(first, last, x, weight, bias, out, plan, groups, rectify)


def convolve_by_plan(x: Any, weight: Any, bias: Any, out: Any, plan: Plan, groups: int, rectify: bool) -> None:
    jobs = -(-len(x) // plan.pictures) * plan.bands
    work = len(x) * len(plan.taps) * out.shape[1] // groups * plan.band * plan.bands * plan.across >> 6
    run(convolve_serially, convolve_on_cores, work, 0, jobs, x, weight, bias, out, plan, groups, rectify, cores())


def convolution(
    xp: Any, x: Any, weight: Any, bias: Any = None, *, windows: Any, groups: int, activation: str | None = None
) -> np.ndarray:
    """See `tinytorch.m09_spatial.convolution`."""
    pictures, outputs = x.shape[0], weight.shape[0]
    out = np.empty((pictures, outputs, *windows.count), np.float32)
    if out.size:
        plan = forward_plan(windows, x.shape[1], outputs, groups, *split(pictures, math.prod(windows.count)))
        bias = np.zeros(outputs, np.float32) if bias is None else plain(bias)
        convolve_by_plan(plain(x), plain(weight), bias, out, plan, groups, activation == "relu")
    return out


def convolution_input_gradient(xp: Any, g: Any, weight: Any, *, windows: Any, groups: int) -> np.ndarray:
    """See `tinytorch.m09_spatial.convolution_input_gradient`."""
    pictures, outputs, channels = g.shape[0], g.shape[1], weight.shape[1] * groups
    out = np.empty((pictures, channels, *windows.shape), np.float32)
    if out.size:
        parts = split(pictures, max(1, math.prod(windows.shape) // math.prod(windows.stride)))
        plan = backward_plan(windows, channels, outputs, groups, *parts)
        convolve_by_plan(plain(g), plain(weight), np.zeros(channels, np.float32), out, plan, groups, False)
    return out


# -- the weight's gradient ------------------------------------------------------------------------------------------


@kernel
def gradient_tile(sum_rows, places, tap_rows, columns, pixels, count):
    """Add to the sums of ROWS taps × some vectors of output channels what `count` pixels give."""
    apart()
    tile = load_tile(sum_rows, places)
    tile = products(tile, tap_rows, columns, pixels, count)
    store_tile(tile, sum_rows, places)


@kernel
def correlate(first, last, g, x, sums, plan, groups):
    """Add to sums (groups, taps, output channels) what the jobs from `first` to `last` give."""
    count, all_outputs, height, width = g.shape
    outputs, plane = all_outputs // groups, height * width
    group_bytes = 4 * plan.channels * plan.height * plan.width
    _, taps, padded = sums.shape
    vectors, results = padded // LANES, plan.band * plan.across
    scratch, turned = scratch_for(plan), np.zeros((vectors, plan.pictures, results, LANES), np.float32)
    picture_bytes = results * VECTOR_BYTES
    vector_bytes = plan.pictures * picture_bytes
    for job in range(first, last):
        picture, top = place_of_job(job, plan)
        pictures = min(plan.pictures, count - picture)
        known = (job % plan.bands * plan.band - top) * width  # pixels that the band before has been through
        pixels, steps = address(plan.pixels) + PAIR * known, results * pictures - known
        for group in range(groups):
            source = address(x) + (picture * groups + group) * group_bytes
            source = laid_out(address(scratch), source, plan, pictures, groups, top)
            for v in range(vectors):
                channels = min(LANES, outputs - v * LANES)
                for n in range(pictures):
                    channel = (picture + n) * all_outputs + group * outputs + v * LANES
                    to = address(turned) + v * vector_bytes + n * picture_bytes
                    turn(to, address(g) + 4 * (channel * plane + top * width), results, plane, channels)
            for v in range(0, vectors, 2):
                start, place = address(turned) + v * vector_bytes, v * VECTOR_BYTES
                for tap in range(0, taps, ROWS):
                    end = min(ROWS, taps - tap) - 1
                    tap_rows = rows_of_taps(source, address(plan.taps) + PAIR * tap, end)
                    sum_rows = rows_from(address(sums) + 4 * (group * taps + tap) * padded, 4 * padded, end, ROWS)
                    if v + 1 < vectors:
                        places, columns = (place, place + VECTOR_BYTES), (start, start + vector_bytes)
                        gradient_tile(sum_rows, places, tap_rows, columns, pixels, steps)
                    else:
                        gradient_tile(sum_rows, (place,), tap_rows, (start,), pixels, steps)


@kernel
def collect(first, last, sums, out, groups):
    """Add up sums (parts, groups, taps, output channels) and turn them: out (output channels, taps)."""
    parts, _, taps, padded = sums.shape
    outputs, vectors = len(out) // groups, padded // LANES
    added, turned = np.zeros((2, LANES, LANES), np.float32)
    for item in range(first, last):
        group, v = item // vectors, item % vectors
        for tap in range(0, taps, LANES):
            together = min(LANES, taps - tap)
            for i in range(together):
                place = address(sums) + 4 * ((group * taps + tap + i) * padded + v * LANES)
                total = load(place)
                for part in range(1, parts):
                    total = total + load(place + 4 * part * groups * taps * padded)
                store(address(added) + i * VECTOR_BYTES, total)
            transpose(address(turned), VECTOR_BYTES, address(added), VECTOR_BYTES, LANES - 1)
            place = address(out) + 4 * ((group * outputs + v * LANES) * taps + tap)
            for i in range(min(LANES, outputs - v * LANES)):
                store_part(place + 4 * taps * i, load(address(turned) + i * VECTOR_BYTES), together)


@kernel
def weight_gradient(first, g, x, sums, out, plan, groups, jobs):
    parts = len(sums)
    for part in range(parts):  # as on several cores, so that sums are rounded in the same way
        correlate(jobs * part // parts, jobs * (part + 1) // parts, g, x, sums[part], plan, groups)
    collect(first, groups * (sums.shape[3] // LANES), sums, out, groups)


@kernel(parallel=True)
def weight_gradient_on_cores(first, g, x, sums, out, plan, groups, jobs):
    parts, items = len(sums), groups * (sums.shape[3] // LANES)
    for part in prange(parts):
        correlate(jobs * part // parts, jobs * (part + 1) // parts, g, x, sums[part], plan, groups)
    for part in prange(parts):
        collect(items * part // parts, items * (part + 1) // parts, sums, out, groups)


def convolution_weight_gradient(xp: Any, g: Any, x: Any, *, windows: Any, groups: int) -> np.ndarray:
    """See `tinytorch.m09_spatial.convolution_weight_gradient`."""
    pictures, outputs, channels = g.shape[0], g.shape[1], x.shape[1]
    taps = channels // groups * math.prod(windows.size)
    out = np.zeros((outputs, taps), np.float32)
    if out.size and pictures:
        plan = forward_plan(windows, channels, outputs, groups, *split(pictures, math.prod(windows.count)))
        jobs = -(-pictures // plan.pictures) * plan.bands
        sums = np.zeros((cores(), groups, taps, -(-outputs // groups // LANES) * LANES), np.float32)
        work = g.size * taps >> 4
        run(weight_gradient, weight_gradient_on_cores, work, 0, plain(g), plain(x), sums, out, plan, groups, jobs)
    return out.reshape(outputs, channels // groups, *windows.size)


convolution_relu = partial(convolution, activation="relu")
