"""Module 16: acceleration, or how to come from a loop to what the machine can do, and how to know that one is there.

Learning objectives. After this module you can
1. say before it is written which of a machine's limits an operation will meet;
2. climb from a loop in Python to the CPU's limit, and name what each step of the way has won;
3. count what it saves to do three operations in one pass, and to keep memory that was freed;
4. predict what a second core brings, and when it brings nothing;
5. attach a faster function to an operation that knows nothing of it, and take it off again.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tinytorch.backends import count_cuda_devices, get_backend
from tinytorch.kernels import compiled, load, prange
from tinytorch.m01_setup import assert_close, first_line, print_table, run_module, seconds
from tinytorch.m01_setup_appendix import BLUE, GREY, ORANGE, new_figure, save_figure
from tinytorch.m02_tensor import REFERENCE_ONLY, Op, Tensor, add, float64, matmul, op, randn, tensor
from tinytorch.m03_activations import relu
from tinytorch.m09_spatial import conv2d, convolve_by_loops, lay_windows
from tinytorch.m15_profiling import Machine, best, core_count, measure_machine, tile_columns, traffic
from tinytorch.m15_profiling_appendix import draw_roofs

# %% [markdown]
# ## Mathematical foundations
#
# Work of $F$ operations on $M$ bytes is done at $\min(P, \; F B / M)$ operations a second at most (module 15). Adding
# two vectors has $I = F / M = 1/12$: memory decides, and the cleverest loop will not help. A product of two n×n
# matrices has $I = 2 n^3 / 12 n^2 = n / 6$: arithmetic decides, if each number that is fetched is used often before it
# is let go.
#
# **What P is made of**: cores × cycles a second × instructions a cycle × numbers in a vector × 2, for a multiplication
# with an addition. An instruction's result is there after some cycles, its *latency* $\ell$. So $\ell$ × (instructions
# a cycle) of them must be on their way, none waiting for another: a sum in *one* variable runs at a fraction of the
# peak.
#
# **What a tile saves.** To add to $r$ rows of a product from $s$ steps of the sum at once, take $r s$ multiplications a
# column for $s + r$ numbers loaded and $r$ stored: the larger the tile, the less it has to do with memory.
#
# **Amdahl's law.** If a share $q$ of the time cannot be divided among $c$ cores, they are faster by
# $1 / (q + (1 - q) / c)$, and by $1/q$ at most.

# %% [markdown]
# ## Implementation
#
# ### One product for both
# We climb with a product of two matrices and with a 3×3 convolution, and take the same steps for both, because a
# convolution *is* a product whose right matrix need not be made. Row $k$ of a right matrix is a stretch of memory that
# begins at an offset. For a product of matrices that is $k n$. In a picture with borders of zeros, laid out as one long
# row, what all windows have at $(c, u, v)$ is the stretch from $c H' W' + u W' + v$ on, $H'$ and $W'$ being the sides
# with borders: the stretches overlap. Their columns are the pixels, row by row, and between two rows what stands over
# the border; that is cut out at the end. So each step below is a function of the left matrix, the memory, and offsets.
# Those that are `compiled` run as Python, too: `function.function`.
#
# **The first step** is the definition. As Python it takes a fifth of a microsecond a multiplication.


# %%
@compiled
def by_loops(left, source, offsets, out):
    """Add Σ_k left[i, k] · source[offsets[k] + j] to each out[i, j]."""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            total = out[i, j]
            for k in range(left.shape[1]):
                total += left[i, k] * source[offsets[k] + j]
            out[i, j] = total


def multiply(step: Callable, a: Any, b: Any) -> Any:
    """The product of matrices (m, k) and (k, n), by one of the steps."""
    xp = get_backend("cpu")
    out = xp.zeros((len(a), b.shape[1]), dtype=a.dtype)
    step(a, xp.reshape(b, (-1,)), xp.arange(len(b)) * b.shape[1], out)
    return out


def convolve(step: Callable, x: Any, weight: Any) -> Any:
    """The convolution of pictures (N, C, H, W) with kernels (O, C, K, K), K odd, to pictures of the same size."""
    xp, (count, channels, height, width), size = get_backend("cpu"), x.shape, weight.shape[-1]
    out = xp.empty((count, len(weight), height, width), dtype=x.dtype)
    left, no_bias = xp.reshape(weight, (len(weight), -1)), xp.zeros((len(weight),), dtype=x.dtype)
    pitch = width + size - 1
    offsets = window_offsets(channels, size, height + size - 1, pitch)
    for n in range(count):
        source = xp.zeros((channels * (height + size - 1) * pitch + size,), dtype=x.dtype)
        wide = xp.zeros((len(weight), height * pitch), dtype=x.dtype)
        surround(x[n], size // 2, source)
        step(left, source, offsets, wide)
        cut_out(wide, no_bias, False, out[n])
    return out


def window_offsets(channels: int, size: int, height: int, pitch: int) -> Any:
    """Where the stretch of each window element (c, u, v) begins in a picture with borders."""
    c, u, v = (get_backend("cpu").arange(n) for n in (channels, size, size))
    return (c[:, None, None] * height * pitch + u[:, None] * pitch + v).reshape(-1)


# %% [markdown]
# What surrounds a picture with zeros, and what cuts the result out: at that moment it is in the cache, so the bias and
# a ReLU cost next to nothing.


# %%
@compiled
def surround(picture, border, source):
    """Write a picture (C, H, W) with `border` zeros on each side to a long row."""
    channels, height, width = picture.shape
    pitch = width + 2 * border
    source[:] = 0
    for c in range(channels):
        for i in range(height):
            row, target = picture[c, i], source[(c * (height + 2 * border) + border + i) * pitch + border :]
            for j in range(width):
                target[j] = row[j]


@compiled
def cut_out(wide, bias, rectify, out):
    """Write what is no border in `wide` (O, H · pitch), plus bias, to out (O, H, W); what is below 0 as 0 if asked."""
    outputs, height, width = out.shape
    pitch, zero = wide.shape[1] // height, out.dtype.type(0)
    for o in range(outputs):
        for i in range(height):
            row, target = wide[o, i * pitch : i * pitch + width], out[o, i]
            for j in range(width):
                value = row[j] + bias[o]
                target[j] = zero if rectify and value < zero else value


def test_loops_are_the_definition() -> None:
    a, b, x, weight = randn(3, 4), randn(4, 5), randn(2, 2, 4, 5), randn(3, 2, 3, 3)
    assert_close(multiply(by_loops.function, a.data, b.data), matmul(a, b), atol=1e-5)
    assert_close(convolve(by_loops.function, x.data, weight.data), convolve_by_loops(x, weight, padding=1), atol=1e-5)


# %% [markdown]
# ### Vectorised
# NumPy can do a whole row at a time, in compiled code. Then the interpreter's time is paid once a row, not once a
# number. The same order of loops, compiled: the innermost one goes along memory, and LLVM makes vector instructions of
# it. Compiling `by_loops` gives far less, because there the innermost loop jumps from row to row of the right matrix.
#
# (`row` and `right` are slices, and not `out[i, j]` and `source[offsets[k] + j]`, because an index may be negative in
# Python, and a loop that has to ask about each is no loop over vectors.)


# %%
def by_arrays(left: Any, source: Any, offsets: Any, out: Any) -> None:
    """The same, a row at a time, by the array library."""
    for i in range(out.shape[0]):
        for k in range(left.shape[1]):
            out[i] += left[i, k] * source[offsets[k] : offsets[k] + out.shape[1]]


@compiled
def by_rows(left, source, offsets, out):
    """The same, a row at a time, compiled."""
    for i in range(out.shape[0]):
        row = out[i]
        for k in range(left.shape[1]):
            factor, right = left[i, k], source[offsets[k] : offsets[k] + out.shape[1]]
            for j in range(len(row)):
                row[j] += factor * right[j]


# %% [markdown]
# ### Tiled
# For each multiplication, a row of the result was fetched and stored again: three times as many instructions move
# numbers as multiply. A *tile* of two rows and four steps uses each number that it loads twice, and each that it stores
# four times. (Tiles are also cut so that what they use stays in the cache. The machines that these kernels were written
# on fetch a megabyte from the next cache in time: it gained nothing. It does where matrices exceed the last cache.)


# %%
@compiled
def by_tiles(left, source, offsets, out):
    """The same, two rows and four steps at a time."""
    columns = out.shape[1]
    rows, depth = out.shape[0] // 2 * 2, left.shape[1] // 4 * 4
    for i in range(0, rows, 2):
        upper, lower = out[i], out[i + 1]
        for k in range(0, depth, 4):
            a, b, c, d = left[i, k], left[i, k + 1], left[i, k + 2], left[i, k + 3]
            e, f, g, h = left[i + 1, k], left[i + 1, k + 1], left[i + 1, k + 2], left[i + 1, k + 3]
            first, second = source[offsets[k] :][:columns], source[offsets[k + 1] :][:columns]
            third, fourth = source[offsets[k + 2] :][:columns], source[offsets[k + 3] :][:columns]
            for j in range(columns):
                w, x, y, z = first[j], second[j], third[j], fourth[j]
                upper[j] += a * w + b * x + c * y + d * z
                lower[j] += e * w + f * x + g * y + h * z
    by_rows(left[:rows, depth:], source, offsets[depth:], out[:rows])  # the steps that are left over
    by_rows(left[rows:, :], source, offsets, out[rows:])  # and the row


def test_each_step_gives_what_the_first_gives() -> None:
    a, b, x, weight = (randn(*shape).data for shape in ((7, 9), (9, 40), (2, 3, 5, 6), (5, 3, 3, 3)))
    product, convolution = multiply(by_loops.function, a, b), convolve(by_loops.function, x, weight)
    for step in (by_loops, by_arrays, by_rows, by_tiles, on_one_core, on_all_cores):
        assert_close(multiply(step, a, b), product, atol=1e-5)
        assert_close(convolve(step, x, weight), convolution, atol=1e-5)


# %% [markdown]
# ### Vectors, held in registers
# The compiler still stores each sum and fetches it again. The fastest place for a sum is a register, until it is
# finished: a tile of 6 rows and two vectors of columns is twelve registers, and for twelve instructions that multiply
# it loads two vectors and six factors. No loop in Python's syntax makes a compiler do that reliably, so the tile is
# written with vectors by name, in `kernels/cpu/ladder.py`; thirty lines, worth reading now.
#
# So that nothing keeps the tile waiting, both matrices are *packed*: what it needs next lies next. The left one becomes
# panels of six rows, [k][row]. Of the right one, a strip as wide as the tile is copied, used with all panels, and
# overwritten with the next. A strip of a convolution is a piece of the matrix of windows that was never made as a
# whole. This is what BLAS libraries do (Goto and van de Geijn, 2008), but for a third level of blocks.

# %%
multiply_tile = compiled("tinytorch.kernels.cpu.ladder:multiply_tile")
scratch = compiled("tinytorch.kernels.cpu.ladder:scratch")
ROWS = 6  # of its tile


@compiled
def pack(left, panels):
    """Write six rows of (m, k) after the other to panels (⌈m / 6⌉, k, 6); zeros where the last has less than six."""
    for p in range(panels.shape[0]):
        for r in range(ROWS):
            for k in range(left.shape[1]):
                panels[p, k, r] = left[p * ROWS + r, k] if p * ROWS + r < left.shape[0] else 0


@compiled
def copy_strip(source, offsets, start, width, strip):
    """Copy `width` columns from `start` on; those that the strip has beyond them become 0."""
    for k in range(len(offsets)):
        target, right = strip[k], source[offsets[k] + start :]
        for j in range(width):
            target[j] = right[j]
        for j in range(width, len(target)):
            target[j] = 0


@compiled
def by_registers(panels, source, offsets, out, first, last):
    """The columns of a product from `first` to `last`."""
    tile, strip = scratch(ROWS, tile_columns()), scratch(len(offsets), tile_columns())
    for start in range(first, last, tile_columns()):
        width = min(tile_columns(), last - start)
        copy_strip(source, offsets, start, width, strip)
        for p in range(panels.shape[0]):
            multiply_tile(panels[p], strip, tile)
            for r in range(min(ROWS, out.shape[0] - p * ROWS)):
                target, found = out[p * ROWS + r, start : start + width], tile[r]
                for j in range(width):
                    target[j] = found[j]


def packed(left: Any) -> Any:
    xp = get_backend("cpu")
    panels = xp.empty((-(-len(left) // ROWS), left.shape[1], ROWS), dtype=left.dtype)
    pack(left, panels)
    return panels


def on_one_core(left: Any, source: Any, offsets: Any, out: Any) -> None:
    by_registers(packed(left), source, offsets, out, 0, out.shape[1])


# %% [markdown]
# ### Every core
# The columns are dealt out, or the pictures. Each core has its own strip and tile, and none waits for another; they
# start and end together, which takes two microseconds, or twenty if a core has to be woken. A loop over `prange` does
# it. Its body only calls a function that one core could run as well: Numba's compiler does less for code that stands in
# a parallel loop itself.


# %%
@compiled(parallel=True)
def deal_columns(panels, source, offsets, out, parts):
    strips = -(-out.shape[1] // tile_columns())
    for part in prange(parts):
        first, last = strips * part // parts * tile_columns(), strips * (part + 1) // parts * tile_columns()
        by_registers(panels, source, offsets, out, first, min(last, out.shape[1]))


def on_all_cores(left: Any, source: Any, offsets: Any, out: Any) -> None:
    deal_columns(packed(left), source, offsets, out, core_count())


@compiled
def convolve_pictures(x, panels, bias, rectify, offsets, size, out, first, last):
    """The convolutions of the pictures from `first` to `last`, with bias and ReLU in the same pass."""
    outputs, height, width = out.shape[1:]
    pitch = width + size - 1
    source, wide = scratch(1, x.shape[1] * (height + size - 1) * pitch + size)[0], scratch(outputs, height * pitch)
    for n in range(first, last):
        surround(x[n], size // 2, source)
        by_registers(panels, source, offsets, wide, 0, wide.shape[1])
        cut_out(wide, bias, rectify, out[n])


@compiled(parallel=True)
def deal_pictures(x, panels, bias, rectify, offsets, size, out, parts):
    for part in prange(parts):
        first, last = len(x) * part // parts, len(x) * (part + 1) // parts
        convolve_pictures(x, panels, bias, rectify, offsets, size, out, first, last)


def convolve_in_one_pass(x: Any, weight: Any, bias: Any, rectify: bool = False, parts: int | None = None) -> Any:
    """As `convolve`, plus bias, and its ReLU if asked, on all cores or as many as `parts` says."""
    xp, size = get_backend("cpu"), weight.shape[-1]
    out = xp.empty((len(x), len(weight), *x.shape[2:]), dtype=x.dtype)
    offsets = window_offsets(x.shape[1], size, x.shape[2] + size - 1, x.shape[3] + size - 1)
    panels = packed(xp.reshape(weight, (len(weight), -1)))
    deal_pictures(x, panels, bias, rectify, offsets, size, out, parts or core_count())
    return out


# %% [markdown]
# ### A unit for matrices
# Newer CPUs multiply tiles, not vectors. Intel's AMX has one instruction for 16 × 32 numbers times 32 × 16: sixteen
# times the products a cycle of its vectors. But they are bfloat16, with 8 of a float32's 24 bits. So we split each
# number into three that add up to it, and of the nine products of two such sums we leave out the three that are below
# $2^{-24}$ of the whole: six products at a sixteenth of the price, and nothing lost (Henry, Tang and Heinecke, 2019).
# To round to 8 bits takes only arithmetic (Veltkamp, 1968): $c - (c - x)$ with $c = (2^{16} + 1) x$. With tiles it is
# `kernels/cpu/amx.py`. To split numbers has its price, too, so it is for large matrices; and their speed may lie above
# the peak that module 15 measures, which is that of vectors.


# %%
def three_parts(x: Any) -> list:
    """Float32 as high + middle + low, exactly, each a number that bfloat16 has; for |x| below 10³³."""
    parts = []
    for _ in range(2):
        scaled = x * 65537
        parts.append(scaled - (scaled - x))
        x = x - parts[-1]
    return [*parts, x]


def multiply_in_parts(a: Any, b: Any) -> Any:
    """The product of matrices of float32 by six of bfloat16, the smallest first."""
    left, right = three_parts(a), three_parts(b)
    products = [matmul(left[i], right[j]) for i, j in ((0, 2), (2, 0), (1, 1), (0, 1), (1, 0), (0, 0))]
    return sum(products[1:], products[0])


def test_six_products_of_parts_are_as_good_as_one() -> None:
    a, b = randn(40, 200), randn(200, 30)
    for x in (a, b * 1e-20):
        high, middle, low = three_parts(x)
        assert (high + (middle + low)).tolist() == x.tolist()
        assert all(float((part / high).abs().max()) <= bound for part, bound in ((middle, 2**-8), (low, 2**-16)))
        assert three_parts(high)[0].tolist() == high.tolist()
    exact = matmul(a.to(float64), b.to(float64))
    parts, plain = ((f(a, b) - exact).abs().mean().item() for f in (multiply_in_parts, matmul))
    assert parts < 1.2 * plain


def test_a_convolution_on_any_number_of_cores() -> None:
    x, weight, bias = randn(5, 3, 6, 7), randn(8, 3, 3, 3), randn(8)
    for parts in (1, 2, 3, 7):
        out = convolve_in_one_pass(x.data, weight.data, bias.data, True, parts)
        assert_close(out, relu(conv2d(x, weight, bias, padding=1)), atol=1e-5)
    x.data[0, 0, 0, 0] = float("nan")  # goes through the ReLU
    assert convolve_in_one_pass(x.data, weight.data, bias.data, True)[0, 0, 0, 0] != 0


# %% [markdown]
# What cores bring can be predicted. In the product above, packing the left matrix is done by one of them; that is its
# $q$. And starting them takes a fixed time, so that a small product is better off with one.


# %%
def speedup(alone: float, cores: int) -> float:
    """Amdahl's law: how many times as fast `cores` cores are, if a share `alone` of the time is one core's."""
    return 1 / (alone + (1 - alone) / cores)


def test_what_cannot_be_divided_sets_the_limit() -> None:
    assert speedup(0.0, 8) == 8
    assert_close(speedup(0.1, 2), 1 / 0.55)
    assert speedup(0.1, 10**6) < 10


# %% [markdown]
# ### Another processor
# A GPU takes the same steps on a larger scale: a hundred cores with a thousand threads each, whose tiles are shared by
# a block of threads in memory on the chip, and whose sums stay in each thread's registers. `kernels/cuda/matmul.py` and
# `convolution.py` are written in Python, too. Where there is no device, Numba's simulator runs them thread by thread
# (NUMBA_ENABLE_CUDASIM=1): it shows whether they are right, and nothing about their speed.


# %%
def gpu() -> str:
    """What runs CUDA kernels here: "device", "simulator" or, if nothing does, ""."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        return "simulator"
    return "device" if count_cuda_devices() else ""


def multiply_on_gpu(a: Tensor, b: Tensor, step: str = "matmul") -> Any:
    """The product of two matrices by the CUDA kernel, or by "matmul_by_elements", its first step."""
    return on_gpu(f"matmul:{step}", a, b)


def convolve_on_gpu(x: Tensor, weight: Tensor, step: str = "convolution") -> Any:
    """As `convolve`, by the CUDA kernel, or by "convolution_by_elements", its first step."""
    size = tuple(weight.shape[2:])
    border = (size[0] // 2, size[0] // 2)
    windows = lay_windows("convolution", tuple(x.shape), size, (1, 1), (border, border), (1, 1))
    return on_gpu(f"convolution:{step}", x, weight, windows=windows, groups=1)


def on_gpu(place: str, *inputs: Tensor, **attributes: Any) -> Any:
    """What a CUDA kernel makes of tensors, once it is there: a launch returns before the device has begun."""
    xp = get_backend("cuda" if gpu() == "device" else "cpu")
    out = load(f"tinytorch.kernels.cuda.{place}")(xp, *(x.to(xp.device).data for x in inputs), **attributes)
    xp.synchronize()
    return out


# %% [markdown]
# ### Fewer passes
# A result that is too large for the cache goes to memory, and comes back for the next operation. Bias and ReLU do two
# operations a number on eight bytes each: their roof is a hundredth of the peak. *Fused* into the pass that makes the
# result, they find it in a register or in the cache. `cut_out` has done that all along; here is the count.


# %%
def in_three_passes(x: Any, weight: Any, bias: Any, parts: int | None = None) -> tuple[Any, int]:
    """The convolution, then the bias, then the ReLU; and the bytes that all three read and write."""
    xp = get_backend("cpu")
    products = convolve_in_one_pass(x, weight, xp.zeros_like(bias), parts=parts)
    sums = products + bias[:, None, None]
    out = xp.maximum(sums, 0)
    return out, traffic(x, weight, products) + traffic(products, bias, sums) + traffic(sums, out)


def in_one_pass(x: Any, weight: Any, bias: Any, parts: int | None = None) -> tuple[Any, int]:
    out = convolve_in_one_pass(x, weight, bias, True, parts)
    return out, traffic(x, weight, bias, out)


def test_one_pass_moves_less() -> None:
    inputs = [randn(*shape).data for shape in ((2, 3, 8, 8), (16, 3, 3, 3), (16,))]
    (separate, more), (fused, less) = in_three_passes(*inputs), in_one_pass(*inputs)
    assert_close(fused, separate, atol=1e-5)
    assert more - less == 4 * separate.nbytes  # written twice and read twice


# %% [markdown]
# ### Memory that is kept
# An array that is new to the process is not there yet: at the first write to each of its pages, 4 KB each, the
# processor stops, and the system finds a page, fills it with zeros and enters it in a table. By default the C library
# gives much of the memory that is freed back to the system, so that the results of every training step pay again. The
# NumPy backend asks it to keep up to half a gigabyte (`keep_freed_memory` in `backends/numpy.py`). That is decided at
# the start of a process, so two new ones have to measure it.


# %%
def hold_and_drop(count: int = 8, size: int = 1 << 20) -> tuple[float, float]:
    """Make results that are held until the last is there, as for backward: milliseconds and page faults of each."""
    x = get_backend("cpu").ones((size,), dtype="float32")

    def step() -> None:
        held = [x + x for _ in range(count)]
        held.clear()

    taken = best(step)
    before = page_faults()
    step()
    return taken / count * 1e3, (page_faults() - before) / count


def page_faults() -> float:
    """How many pages this process has been given so far; nan on Windows."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def with_malloc(setting: str) -> list[float]:
    """`hold_and_drop` in a new process whose TINYTORCH_MALLOC is "system" or "keep"."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    program = "from tinytorch.m16_acceleration import hold_and_drop; print(*hold_and_drop())"
    done = subprocess.run([sys.executable, "-c", program], env={**others, "TINYTORCH_MALLOC": setting},
                          stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    return [float(word) for word in done.stdout.split()]


def test_new_memory_is_paid_for_page_by_page() -> None:
    with mmap.mmap(-1, 100 * mmap.PAGESIZE) as memory:
        for expected in (100, 0):  # the second time they are there
            before = page_faults()
            for page in range(100):
                memory[page * mmap.PAGESIZE] = 1
            found = page_faults() - before
            assert found != found or expected <= found < expected + 50  # nan where nobody knows


# %% [markdown]
# ### The registry
# An operation knows nothing of kernels. What stands here knows of both: for which operation, on which backend, under
# which condition a faster function runs, and where that function is found. It hands them to the door of module 02
# (`Op.implement`), which asks the condition at each call, a tenth of a microsecond each; where it does not hold, or
# while kernels are turned off, the operation's own function runs.
#
# A kernel may fail to load: no Numba, a damaged cache, a CPU that it cannot be compiled for. So its first call is on
# probation. If it raises, the reference decides: what raises there too was the caller's mistake, and anything else is
# the kernel's, of which a warning tells once.

# %%
KERNELS: list[Kernel] = []  # what is attached; of two for one operation, the later one is asked first
TRIED: dict[Kernel, Callable] = {}  # what runs in a kernel's place since its first call: it, or the reference
LOCK = threading.RLock()
if os.environ.get("TINYTORCH_KERNELS", "").lower() in ("off", "0", "no"):
    REFERENCE_ONLY.append("TINYTORCH_KERNELS")


@dataclass(frozen=True)
class Kernel:
    """A faster function for an operation on a backend.

    Attributes:
        op, backend: for what it is: "numpy", "cupy".
        place: where it stands, "package.module:name"; imported at its first call.
        when: (*arrays, **attributes), as the operation is called, to whether it can and should run.
        why: that condition in words.
        example: makes inputs and attributes that it takes, of some rows or pictures; None: the appendix knows some.
    """

    op: Op
    backend: str
    place: str
    when: Callable[..., bool]
    why: str
    example: Callable[[int], tuple[tuple, dict[str, Any]]] | None = None


def attach(
    op: Op, backend: str, place: str, when: Callable[..., bool], why: str,
    example: Callable[[int], tuple[tuple, dict[str, Any]]] | None = None,
) -> Kernel:  # fmt: skip
    """Have a kernel run in an operation's place where `when` holds, and list it in KERNELS."""
    kernel = Kernel(op, backend, place, when, why, example)
    op.implement(backend, partial(on_probation, kernel), when)
    KERNELS.append(kernel)
    return kernel


def on_probation(kernel: Kernel, *arguments: Any, **attributes: Any) -> Any:
    """A kernel's first call: load it, and have the operation call from then on what this call has shown to work."""
    with LOCK:  # a second thread waits here, and does not compile it too
        if kernel in TRIED:
            return TRIED[kernel](*arguments, **attributes)
        try:
            function = load(kernel.place)
            out = function(*arguments, **attributes)
        except Exception as error:
            function = kernel.op.function
            out = function(*arguments, **attributes)
            warnings.warn(f"{kernel.op.name}: the kernel {kernel.place} failed at its first call "
                          f"({type(error).__name__}: {first_line(error)}); the reference runs in its place, slower",
                          RuntimeWarning, stacklevel=2)  # fmt: skip
        TRIED[kernel] = function
        places = kernel.op.implementations[kernel.backend]
        places[[when for when, _ in places].index(kernel.when)] = kernel.when, function
        return out


def kernels_enabled() -> bool:
    """Whether kernels run. TINYTORCH_KERNELS=off in the environment turns them off for a process."""
    return not REFERENCE_ONLY


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Have every operation run its own code, on every thread: `with` it, or decorate a function."""
    REFERENCE_ONLY.append("reference_kernels")
    try:
        yield
    finally:
        REFERENCE_ONLY.remove("reference_kernels")


def double(xp: Any, x: Any) -> Any:
    return x + x


def double_in_a_kernel(xp: Any, x: Any) -> Any:
    return x * 2.0


@contextmanager
def attached(place: str, when: Callable[..., bool]) -> Iterator[Op]:
    """For tests: an operation of the function `double` that nobody else sees, with a kernel, and kernels are on."""
    with patch.dict(Op.registry):
        operation = op(double)
    kernel, off = attach(operation, "numpy", place, when, "for a test"), REFERENCE_ONLY[:]
    REFERENCE_ONLY.clear()
    try:
        yield operation
    finally:
        REFERENCE_ONLY[:] = off
        KERNELS.remove(kernel)


def test_a_kernel_runs_where_its_condition_holds() -> None:
    calls = []

    def small(x: Any) -> bool:
        calls.append(x.shape[0])
        return x.shape[0] < 3

    with attached(f"{__name__}:double_in_a_kernel", small) as operation:
        assert operation(tensor([1.5])).tolist() == [3]
        with reference_kernels():
            operation(tensor([1.5]))  # nobody asks
        assert operation(tensor([1.5] * 3)).tolist() == [3] * 3
    assert calls == [1, 3]


def test_a_kernel_that_fails_to_load_is_replaced_by_the_reference() -> None:
    place, warned = "tinytorch.kernels.cpu:missing", warnings.catch_warnings(record=True, action="always")
    with attached(place, lambda x: True) as operation, warned as messages:
        assert [operation(tensor([1.5])).tolist() for _ in range(3)] == [[3]] * 3
    (message,) = messages
    assert f"double: the kernel {place} failed at its first call (AttributeError" in str(message.message)


# %% [markdown]
# ## Systems analysis
#
# Both ladders, each step against this machine's measured peak. The slow steps do a part of the work, which shows their
# speed as well. `roofline("roofline.png")` draws the same.

# %%
STEPS = (("loops in Python", by_loops.function), ("loops, compiled", by_loops), ("rows in NumPy", by_arrays),
         ("rows, compiled", by_rows), ("tiles", by_tiles))  # fmt: skip


@dataclass(frozen=True)
class Climb:
    """A problem, its arithmetic intensity in operations a byte, and operations a second of each step."""

    name: str
    intensity: float
    rates: dict[str, float]


def climb_product(n: int = 1024) -> Climb:
    """Measure the steps of a product of two n×n matrices."""
    a, b = randn(n, n), randn(n, n)
    rates = {}
    for (name, step), rows, columns in zip(STEPS, (1, 32, 4, 256, 256), (64, n, n, n, n), strict=True):
        rates[name] = 2 * rows * columns * n / best(multiply, step, a.data[:rows], b.data[:, :columns])
    for name, step in (("registers", on_one_core), ("all cores", on_all_cores)):
        rates[name] = 2 * n**3 / best(multiply, step, a.data, b.data)
    if load("tinytorch.kernels.cpu.amx:permitted")():
        product = load("tinytorch.kernels.cpu.matmul:matmul")
        rates["AMX, all cores"] = 2 * n**3 / best(product, get_backend("cpu"), a.data, b.data)
    if gpu() == "device":
        rates["GPU, by elements"], rates["GPU, tiles"] = (
            2 * n**3 / seconds(multiply_on_gpu, a.to("cuda"), b.to("cuda"), step)
            for step in ("matmul_by_elements", "matmul")
        )
    with reference_kernels():
        rates["BLAS"] = 2 * n**3 / best(matmul, a, b)
    return Climb(f"product of {n}×{n}", n / 6, rates)


def climb_convolution(count: int = 16, channels: int = 32, outputs: int = 64, size: int = 32) -> Climb:
    """Measure the steps of a 3×3 convolution of `count` pictures."""
    x, weight = randn(count, channels, size, size), randn(outputs, channels, 3, 3)
    rates, each = {}, 2 * channels * 9 * size**2  # operations for one picture and one output
    for (name, step), some, filters in zip(STEPS, (1, 1, 1, 4, 8), (1, *[outputs] * 4), strict=True):
        rates[name] = each * some * filters / best(convolve, step, x.data[:some], weight.data[:filters])
    bias, operations = get_backend("cpu").zeros((outputs,), dtype="float32"), each * count * outputs
    for name, parts in (("registers", 1), ("all cores", None)):
        rates[name] = operations / best(convolve_in_one_pass, x.data, weight.data, bias, False, parts)
    if gpu() == "device":
        rates["GPU, by elements"], rates["GPU, tiles"] = (
            operations / seconds(convolve_on_gpu, x.to("cuda"), weight.to("cuda"), step)
            for step in ("convolution_by_elements", "convolution")
        )
    with reference_kernels():
        rates["windows and BLAS"] = operations / best(lambda: conv2d(x, weight, padding=1))
    intensity = operations / (traffic(x.data, weight.data) + 4 * count * outputs * size**2)
    return Climb(f"3×3 convolution, {channels} to {outputs} channels", intensity, rates)


def memory_bound(size: int = 1 << 24) -> Climb:
    """What adding arrays reaches: one operation on twelve bytes."""
    x, y = randn(size), randn(size)
    return Climb("sum of two arrays", 1 / 12, {"x + y": size / best(add, x, y)})


# %% [markdown]
# The figure has logarithms on both axes, so that a roof is a line with a bend: left of it memory decides, right of it
# arithmetic. A point's height below the roof is what is left to win.


# %%
def roofline(path: str | os.PathLike) -> Path:
    """Measure everything and draw it: arithmetic intensity against speed, under this machine's roofs."""
    machine = measure_machine()
    figure = new_figure(8.5, 7, "What each step reaches, and the roofs of vectors and memory")
    axes = figure.subplots()
    draw_roofs(axes, machine, [2 ** (e / 4) for e in range(-32, 45)])
    draw_climb(axes, memory_bound(), GREY, -1)
    draw_climb(axes, climb_convolution(), ORANGE, -1)
    draw_climb(axes, climb_product(), BLUE, 1)
    axes.legend(loc="lower left", frameon=False, fontsize=9)
    return save_figure(figure, path)


def draw_climb(axes: Any, climb: Climb, colour: str, side: int) -> None:
    """A column of points, each with its name to the left (-1) or the right (1), so far apart that one can read them."""
    steps = sorted((rate / 1e9, name) for name, rate in climb.rates.items())
    axes.plot([climb.intensity] * len(steps), [rate for rate, _ in steps], "o-", color=colour, label=climb.name)
    places = [steps[0][0]]
    for rate, _ in steps[1:]:
        places.append(max(rate, places[-1] * 1.36))
    for (rate, name), place in zip(steps, places, strict=True):
        axes.annotate(f"{name}  {rate:.3g}", (climb.intensity, rate), (climb.intensity * 1.5**side, place),
                      color=colour, fontsize=9, va="center", ha="left" if side > 0 else "right",
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6},
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip


def print_climb(climb: Climb, machine: Machine) -> None:
    """A table of a ladder's steps against the peak of the cores that they run on."""
    roof = climb.intensity * machine.bandwidth[0] / 1e9
    print(f"\n{climb.name}: {climb.intensity:.0f} operations a byte, for which memory would allow {roof:,.0f} GFLOP/s")
    rows: list[list] = []
    for name, rate in climb.rates.items():
        peak = machine.peak[name not in ("registers", *dict(STEPS))]
        gain = f"{rate / 1e9 / rows[-1][1]:.3g}" if rows else ""
        rows.append([name, rate / 1e9, gain, "" if name.startswith("GPU") else f"{100 * rate / peak:.3g} %"])
    print_table(["step", "GFLOP/s", "times the one before", "of its cores' peak"], rows)


def divided(cores: int) -> Iterator[list]:
    """For products of growing size: µs on one core and of packing, and how much faster all cores should be and are."""
    for n in (64, 128, 256, 512, 1024):
        a, b = randn(n, n).data, randn(n, n).data
        alone, packing = best(multiply, on_one_core, a, b), best(packed, a)
        yield [
            n,
            alone * 1e6,
            packing * 1e6,
            speedup(packing / alone, cores),
            alone / best(multiply, on_all_cores, a, b),
        ]


def analyze() -> None:
    """Measure this machine, both ladders, what cores bring, what fusion saves, and what new memory costs."""
    machine = measure_machine()
    for cores, peak, rate in zip((1, machine.cores), machine.peak, machine.bandwidth, strict=True):
        print(f"{cores} core{'s' * (cores > 1)}: {peak / 1e9:,.0f} GFLOP/s, {rate / 1e9:.0f} GB/s")
    for climb in (climb_product(), climb_convolution()):
        print_climb(climb, machine)
    if gpu() != "device":
        print(
            "There is no CUDA device here: the last step, kernels/cuda, can be tested in Numba's simulator, not timed."
        )
    print(f"\nAn n×n product on {machine.cores} cores; one of them packs:")
    print_table(["n", "one core, µs", "packing, µs", "Amdahl's speedup", "measured"], divided(machine.cores))
    inputs = [randn(*shape).data for shape in ((64, 32, 32, 32), (64, 32, 3, 3), (64,))]
    rows = [[name, call(*inputs)[1] / 1e6, best(call, *inputs) * 1e3]
            for name, call in (("three passes", in_three_passes), ("one pass", in_one_pass))]  # fmt: skip
    print()
    print_table(["convolution, bias and ReLU", "MB read and written", "ms"], rows)
    print()
    rows = [[name, *with_malloc(setting)] for name, setting in (("given back", "system"), ("kept", "keep"))]
    print_table(["a result of 4 MB, if what was freed is", "ms", "page faults"], rows)


# %% [markdown]
# ## Production context
#
# PyTorch hands a product to MKL or OpenBLAS and a convolution to oneDNN, which writes machine code for the very shape
# at hand, as ours is compiled for the very CPU; on GPUs to cuBLAS and cuDNN, which try several kernels and keep the
# fastest (`torch.backends.cudnn.benchmark`). Its registry is the *dispatcher*: operations have a schema, kernels are
# entered with `TORCH_LIBRARY_IMPL` under a *dispatch key* (CPU, CUDA, Autograd, Autocast …), and a call looks for the
# first key of its inputs that has one; ours asks conditions, because here dtype and size matter as much as the device.
# Fusion is the work of `torch.compile`: TorchInductor turns chains of operations into loops in C++ with OpenMP, or into
# kernels in *Triton*, whose programs describe one tile, as `multiply_tile` is one, and leave registers and threads to
# the compiler. Memory is kept by the CUDA caching allocator; on the CPU PyTorch leaves it to malloc, and servers
# preload jemalloc or tcmalloc.
#
# Where a kernel is at the machine's limit, only fewer operations help. cuDNN, and `kernels/cpu/winograd.py` with it, do
# a 3×3 convolution with two thirds of the multiplications or fewer (Winograd, 1980).
#
# The table of kernels that TinyTorch ships is in the appendix, and `tinytorch kernels` prints it. Left out here: a
# third level of blocks, memory on several sockets, and trying variants to find the fastest.

# %% [markdown]
# ## Integration testing


# %%
def test_a_network_learns_the_same_with_and_without_kernels() -> None:
    from tinytorch.m01_setup import manual_seed
    from tinytorch.m05_losses import cross_entropy
    from tinytorch.m07_optimizers import Adam
    from tinytorch.m09_spatial import SimpleCNN

    def losses() -> list[float]:
        manual_seed(0)
        model, pictures, labels = SimpleCNN(), randn(8, 3, 32, 32), tensor([0, 1, 2, 3, 4, 5, 6, 7])
        optimizer, found = Adam(model.parameters(), lr=1e-3), []
        for _ in range(4):
            loss = cross_entropy(model(pictures), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert_close(losses(), reference_kernels()(losses)(), rtol=1e-3)


# %% [markdown]
# ## Thinking questions
#
# 1. A softmax over rows of 1,000 numbers: how many operations a byte, and which roof? What can a better kernel win?
# 2. Your CPU has vectors of 8 numbers and starts two multiplications with additions a cycle, with a latency of 4. How
#    many sums must be on their way? Which tiles fit in its 16 registers?
# 3. Why does the convolution's ladder begin to gain from the compiler a step earlier than the product's?
# 4. Two programs train on one machine, each with kernels on all cores. What happens to the roof, and what to Amdahl's
#    law?
# 5. When is a condition on an operation's size wrong on another machine, and how would you find out cheaply?

# %% [markdown]
# ## Summary
#
# A loop in Python ends a hundred thousand times below what the machine can do; order, tiles, registers and cores bring
# it there, and the roofline says when to stop. What memory decides is won by fewer passes, not by better loops. Kernels
# are attached to operations from outside, under conditions, and can be taken off: the readable version stays the
# reference. Module 17 makes the numbers smaller, which raises both roofs.


if __name__ == "__main__":
    run_module(globals())
