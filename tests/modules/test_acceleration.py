"""Module 16: every step of the ladder, what compiles it, the registry, and the figure."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.guarded import guarded, guarded_empty, outlives
from tinytorch import m16_acceleration as m16
from tinytorch.kernels import Compiled, compiled, load, prange
from tinytorch.m01_setup import assert_close, to_numpy
from tinytorch.m02_tensor import Op, op, tensor
from tinytorch.m16_acceleration import KERNELS, Climb, Machine, attach, kernels_enabled, reference_kernels

STEPS = [m16.by_loops.function, m16.by_arrays, m16.by_loops, m16.by_rows, m16.by_tiles, m16.on_one_core,
         m16.on_all_cores]  # fmt: skip
names = [f"{getattr(step, '__name__', step)}{'' if i else ' in Python'}" for i, step in enumerate(STEPS)]
each_step = pytest.mark.parametrize("step", STEPS, ids=names)


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def near(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal to 1e-5 of the largest."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * max(1e-30, np.abs(expected).max()))


def convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """In float64, from NumPy's own windows."""
    size = weight.shape[-1]
    padded = np.pad(x.astype("float64"), ((0, 0), (0, 0), *[(size // 2, size // 2)] * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight)


# -- the ladder --------------------------------------------------------------------------------------------------------


@each_step
@given(m=st.integers(1, 14), k=st.integers(1, 11), n=st.integers(1, 70), seed=st.integers(0, 1 << 30))
@settings(deadline=None, max_examples=12)
def test_products(step: Any, m: int, k: int, n: int, seed: int) -> None:
    a, b = drawn(seed, m, k), drawn(seed + 1, k, n)
    near(m16.multiply(step, a, b), a.astype("float64") @ b)


@each_step
@given(
    size=st.sampled_from([1, 3, 5]), shape=st.tuples(*[st.integers(1, high) for high in (2, 3, 7, 9)]),
    outputs=st.integers(1, 8), seed=st.integers(0, 1 << 30),
)  # fmt: skip
@settings(deadline=None, max_examples=8)
def test_convolutions(step: Any, size: int, shape: tuple, outputs: int, seed: int) -> None:
    x, weight = drawn(seed, *shape), drawn(seed + 1, outputs, shape[1], size, size)
    near(m16.convolve(step, x, weight), convolved(x, weight))


@given(
    size=st.sampled_from([1, 3, 5]), shape=st.tuples(*[st.integers(1, high) for high in (5, 3, 7, 40)]),
    outputs=st.integers(1, 14), parts=st.integers(1, 4), rectify=st.booleans(), seed=st.integers(0, 1 << 30),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_a_convolution_in_one_pass(
    size: int, shape: tuple, outputs: int, parts: int, rectify: bool, seed: int
) -> None:  # fmt: skip
    x, weight, bias = drawn(seed, *shape), drawn(seed + 1, outputs, shape[1], size, size), drawn(seed + 2, outputs)
    expected = convolved(x, weight) + bias[:, None, None]
    out = m16.convolve_in_one_pass(x, weight, bias, rectify, parts)
    near(out, np.maximum(expected, 0) if rectify else expected)
    np.testing.assert_array_equal(out, m16.convolve_in_one_pass(x, weight, bias, rectify, 1))  # however it is divided


def test_columns_may_be_dealt_to_any_number_of_cores() -> None:
    a, b = drawn(0, 9, 5), drawn(1, 5, 300)
    expected = a.astype("float64") @ b
    panels, offsets = m16.packed(a), np.arange(5) * 300
    for parts in (1, 2, 3, 7, 30):
        out = np.full((9, 300), np.nan, "float32")
        m16.deal_columns(panels, b.reshape(-1), offsets, out, parts)
        near(out, expected)


def test_what_is_not_finite_goes_where_it_belongs() -> None:
    wide = np.array([[np.nan, -np.inf, np.inf, -1, 2, 7, 8, 9]], "float32")  # 7, 8 and 9 stand over the border
    wide = np.concatenate([wide[:, :5], wide[:, 5:6], wide[:, 5:]], axis=1)[:, :8].reshape(1, 8)
    bias = np.array([1], "float32")
    for rectify, expected in (
        (False, [[np.nan, -np.inf, np.inf], [3, 8, 8]]),
        (True, [[np.nan, 0, np.inf], [3, 8, 8]]),
    ):
        for cut_out in (m16.cut_out, m16.cut_out.function):
            out = np.empty((1, 2, 3), "float32")
            cut_out(wide, bias, rectify, out)
            np.testing.assert_array_equal(out[0], expected)


@pytest.mark.parametrize("end", [True, False])
def test_the_tile_stays_inside_of_its_arrays(end: bool) -> None:
    columns = m16.tile_columns()
    for depth in (1, 2, 7, 300):
        panel, strip = drawn(depth, depth, m16.ROWS), drawn(depth + 1, depth, columns)
        out = guarded_empty((m16.ROWS, columns), end=end)
        assert outlives(lambda: m16.multiply_tile(guarded(panel, end), guarded(strip, end), out))  # noqa: B023
        m16.multiply_tile(guarded(panel, end), guarded(strip, end), out)
        near(out, panel.T.astype("float64") @ strip)


def test_the_gpus_steps_in_the_simulator(root: Path) -> None:
    code = """
from tinytorch import m16_acceleration as m16, m02_tensor as m02, m09_spatial as m09
from tinytorch.m01_setup import assert_close, to_numpy
assert m16.gpu() == "simulator"
a, b, x, w = (m02.randn(*shape) for shape in ((18, 5), (5, 20), (2, 2, 5, 4), (3, 2, 3, 3)))
for step in ("matmul", "matmul_by_elements"):
    assert_close(m16.multiply_on_gpu(a, b, step), m02.matmul(a, b), atol=1e-5)
for step in ("convolution", "convolution_by_elements"):
    assert_close(m16.convolve_on_gpu(x, w, step), m09.conv2d(x, w, padding=1), atol=1e-5)
"""
    in_a_new_process(code, root, NUMBA_ENABLE_CUDASIM="1")


@pytest.mark.gpu
@pytest.mark.skipif(m16.gpu() != "device", reason="there is no CUDA device")
def test_the_gpus_steps_on_a_device() -> None:
    from tinytorch.m02_tensor import randn

    assert m16.gpu() == "device"
    a, b, x, weight = (randn(*shape) for shape in ((70, 50), (50, 60), (2, 3, 9, 8), (4, 3, 3, 3)))
    expected = a.numpy().astype("float64") @ b.numpy()
    for step in ("matmul", "matmul_by_elements"):
        near(to_numpy(m16.multiply_on_gpu(a, b, step)), expected)
    near(to_numpy(m16.convolve_on_gpu(x, weight)), convolved(x.numpy(), weight.numpy()))


def in_a_new_process(code: str, root: Path, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ, **environment},
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- what compiles it --------------------------------------------------------------------------------------------------


@compiled
def squared(x):
    """x times x."""
    return x * x


@compiled(parallel=True)
def squares(out, parts):
    for i in prange(parts):
        out[i] = squared(i)


def test_a_compiled_function_calls_compiled_functions() -> None:
    out = np.zeros(7)
    squares(out, 7)
    assert_close(out, np.arange(7.0) ** 2)
    assert squared.__doc__ == "x times x."
    assert squared.__name__ == "squared"
    assert squared.function(3) == 9
    assert squares.kernel.targetoptions["parallel"]
    assert "squared" in squares.kernel.py_func.__code__.co_names
    assert squares.kernel.py_func.__globals__["squared"] is squared.kernel
    assert squares.function.__globals__["squared"] is squared  # the function itself is as it was
    assert squares.function.__globals__["prange"] is range


def test_a_function_runs_uncompiled() -> None:
    inside = {**squares.function.__globals__, "squared": squared.function}
    plain = type(squares.function)(squares.function.__code__, inside)
    out = np.zeros(4)
    plain(out, 4)
    assert_close(out, [0, 1, 4, 9])


def test_a_place_is_loaded_when_it_is_called() -> None:
    missing = compiled("tinytorch.kernels.cpu.ladder:nothing")
    assert isinstance(missing, Compiled)
    with pytest.raises(AttributeError, match="nothing"):
        missing()
    assert load("tinytorch.kernels:load") is load
    assert compiled("tinytorch.kernels.cpu.ladder:multiply_tile").kernel is m16.multiply_tile.kernel


def test_importing_the_module_loads_no_numba(root: Path) -> None:
    printed = in_a_new_process("import sys, tinytorch.m16_acceleration; print('numba' in sys.modules)", root)
    assert printed.strip() == "False"


# -- the registry ------------------------------------------------------------------------------------------------------


def shifted(xp: Any, x: Any, *, by: int = 1) -> Any:
    return x + by


CALLS: list[str] = []


def shift_kernel(xp: Any, x: Any, *, by: int = 1) -> Any:
    CALLS.append("shift_kernel")
    if x.ndim == 0:
        raise IndexError("what the kernel cannot do")
    return x + by


def other_kernel(xp: Any, x: Any, *, by: int = 1) -> Any:
    CALLS.append("other_kernel")
    return x + by


HERE = f"{__name__}:shift_kernel"


@pytest.fixture
def shift() -> Iterator[Op]:
    """A new operation; what is attached during the test is taken off the list."""
    before = list(KERNELS)
    CALLS.clear()
    with patch.dict(Op.registry), patch.dict(sys.modules, {__name__: sys.modules.get(__name__) or this_module()}):
        yield op(shifted)
    KERNELS[:] = before


def this_module() -> Any:
    module = type(sys)(__name__)
    vars(module).update(globals())
    return module


def always(x: Any, by: int = 1) -> bool:
    return True


def test_attach_lists_the_kernel(shift: Op) -> None:
    kernel = attach(shift, "numpy", HERE, always, "always")
    other = attach(shift, "cupy", HERE, always, "never here")
    assert KERNELS[-2:] == [kernel, other]
    assert (kernel.op, kernel.backend, kernel.place, kernel.when, kernel.why) == (
        shift,
        "numpy",
        HERE,
        always,
        "always",
    )
    with pytest.raises(AttributeError):
        kernel.place = "elsewhere"  # type: ignore[misc]


def test_the_condition_sees_arrays_and_attributes(shift: Op) -> None:
    seen = []

    def when(*arrays: Any, **attributes: Any) -> bool:
        seen.append((*map(type, arrays), attributes))
        return attributes["by"] == 2

    attach(shift, "numpy", HERE, when, "by 2")
    assert shift(tensor([1.0]), by=2).tolist() == [3]
    assert CALLS == ["shift_kernel"]
    assert shift(tensor([1.0]), by=3).tolist() == [4]
    assert CALLS == ["shift_kernel"]
    assert seen == [(np.ndarray, {"by": 2}), (np.ndarray, {"by": 3})]


def test_the_newest_kernel_is_asked_first_and_other_backends_are_left_alone(shift: Op) -> None:
    attach(shift, "numpy", HERE, always, "always")
    attach(shift, "numpy", f"{__name__}:other_kernel", lambda x, by=1: by > 5, "by more than 5")
    attach(shift, "cupy", "not.there:at_all", always, "always")
    shift(tensor([1.0]), by=6)
    shift(tensor([1.0]), by=1)
    assert CALLS == ["other_kernel", "shift_kernel"]


def test_reference_kernels_nest_and_hold_on_every_thread(shift: Op) -> None:
    asked: list[bool] = []
    attach(shift, "numpy", HERE, lambda x, by=1: asked.append(True) or True, "always")
    with reference_kernels():
        assert not kernels_enabled()
        with reference_kernels():
            shift(tensor([1.0]))
        assert not kernels_enabled()
        thread = threading.Thread(target=shift, args=(tensor([1.0]),))
        thread.start()
        thread.join()
    assert kernels_enabled()
    assert (CALLS, asked) == ([], [])
    shift(tensor([1.0]))
    assert CALLS == ["shift_kernel"]


def test_reference_kernels_decorates_and_survives_errors(shift: Op) -> None:
    attach(shift, "numpy", HERE, always, "always")

    @reference_kernels()
    def call(fails: bool) -> Any:
        if fails:
            raise RuntimeError("on the way")
        return shift(tensor([1.0])).tolist()

    with pytest.raises(RuntimeError, match="on the way"):
        call(True)
    assert kernels_enabled()
    assert [call(False), call(False)] == [[2], [2]]
    assert CALLS == []
    assert kernels_enabled()


@pytest.mark.parametrize(("setting", "expected"), [("off", "False"), ("OFF", "False"), ("on", "True"), ("", "True")])
def test_the_environment_turns_kernels_off(setting: str, expected: str, root: Path) -> None:
    code = "from tinytorch.m16_acceleration import kernels_enabled; print(kernels_enabled())"
    assert in_a_new_process(code, root, TINYTORCH_KERNELS=setting).strip() == expected


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("tinytorch.kernels.cpu.no_such_file:kernel", "ModuleNotFoundError: No module named"),
        ("tinytorch.kernels.cpu.ladder:no_such_kernel", "AttributeError: module"),
        ("tinytorch.kernels.cpu.ladder:multiply_tile", "TypeError: "),  # loads, but does not compile for this
    ],
)
def test_a_kernel_that_cannot_run_is_replaced_with_one_warning(shift: Op, place: str, reason: str) -> None:
    attach(shift, "numpy", place, always, "always")
    with pytest.warns(RuntimeWarning) as caught:
        assert shift(tensor([1.0])).tolist() == [2]
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(f"shifted: the kernel {place} failed at its first call ({reason}")
    assert message.endswith("the reference runs in its place, slower")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shift(tensor([1.0]), by=4).tolist() == [5]


def test_without_numba_the_reference_runs(shift: Op) -> None:
    attach(shift, "numpy", "tinytorch.kernels.cpu.ladder:scratch", always, "always")
    mine = {name: None for name in sys.modules if name.partition(".")[0] in ("numba", "llvmlite")}
    gone = [name for name in sys.modules if name.startswith("tinytorch.kernels.cpu.")]
    with patch.dict(sys.modules, {**mine, "numba": None}):
        for name in gone:
            del sys.modules[name]
        with pytest.warns(RuntimeWarning, match=r"ModuleNotFoundError: import of numba halted"):
            assert shift(tensor([1.0])).tolist() == [2]


def test_what_the_caller_did_wrong_is_the_callers_error(shift: Op) -> None:
    attach(shift, "numpy", HERE, always, "always")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="shifted: "):
            shift(tensor([1.0, 2.0]), by=np.zeros(3))
    assert shift(tensor([1.0])).tolist() == [2]
    assert CALLS == ["shift_kernel", "shift_kernel"]  # the kernel is still there


def test_after_its_first_call_a_kernels_errors_are_its_own(shift: Op) -> None:
    attach(shift, "numpy", HERE, always, "always")
    assert shift(tensor([1.0])).tolist() == [2]
    with pytest.raises(IndexError, match="shifted: what the kernel cannot do"):
        shift(tensor(1.0))


def test_four_threads_load_a_kernel_once(shift: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    attach(shift, "numpy", HERE, always, "always")
    loads: list[str] = []

    def slowly(place: str) -> Any:
        loads.append(place)
        time.sleep(0.05)
        return shift_kernel

    monkeypatch.setattr(m16, "load", slowly)
    results: list[list] = []
    threads = [threading.Thread(target=lambda: results.append(shift(tensor([1.0])).tolist())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[2]] * 4
    assert (loads, len(CALLS)) == ([HERE], 4)


# -- what is measured --------------------------------------------------------------------------------------------------


def test_amdahl() -> None:
    assert m16.speedup(0.0, 2) == 2
    assert m16.speedup(1.0, 64) == 1
    assert_close(m16.speedup(0.25, 4), 1 / (0.25 + 0.75 / 4))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults and malloc's settings as in glibc")
def test_kept_memory_is_not_paid_for_again() -> None:
    (_, given_back), (_, kept) = m16.with_malloc("system"), m16.with_malloc("keep")
    assert kept < 10
    assert given_back > 100


def test_climbs_count_each_step() -> None:
    product = m16.climb_product(48)
    assert product.intensity == 8
    convolution = m16.climb_convolution(2, 3, 6, 8)
    operations, numbers = 2 * 2 * 6 * 3 * 9 * 64, 2 * 3 * 64 + 6 * 3 * 9 + 2 * 6 * 64
    assert_close(convolution.intensity, operations / (4 * numbers))
    names = ["loops in Python", "loops, compiled", "rows in NumPy", "rows, compiled", "tiles", "registers", "all cores"]
    for climb in (product, convolution):
        assert [name for name in climb.rates if "GPU" not in name][:7] == names
        assert min(climb.rates.values()) > 0
    assert product.rates["rows, compiled"] > 3 * product.rates["loops in Python"]


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The figure of a machine and climbs that are made up, and the file."""
    drawn: list = []
    product = {"slow": 1e7, "quick": 2e11, "as quick": 2e11, "quicker": 2.1e11}
    monkeypatch.setattr(m16, "measure_machine", lambda: Machine(2, (1e11, 2e11), (1e10, 1e10)))
    monkeypatch.setattr(m16, "memory_bound", lambda: Climb("sum", 1 / 12, {"x + y": 8e8}))
    monkeypatch.setattr(m16, "climb_product", lambda: Climb("product", 171, product))
    monkeypatch.setattr(m16, "climb_convolution", lambda: Climb("convolution", 95, {"some": 1e9}))
    monkeypatch.setattr(m16, "save_figure", lambda figure, path: drawn.append(figure) or save(figure, path))
    save = __import__("tinytorch.m01_setup_appendix", fromlist=["save_figure"]).save_figure
    path = m16.roofline(tmp_path / "roof.png")
    return drawn[0], path


def test_the_roofline(figure: Any) -> None:
    figure, path = figure
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    one, both = (line.get_xydata() for line in axes.lines[:2])
    assert_close(one[:, 1], np.minimum(100, one[:, 0] * 10))
    assert_close(both[:, 1], np.minimum(200, both[:, 0] * 10))
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["roof of 1 core: 100 GFLOP/s, 10 GB/s", "roof of 2 cores: 200 GFLOP/s, 10 GB/s", "sum",
                      "convolution", "product"]  # fmt: skip
    assert sorted(float(y) for line in axes.lines[2:] for y in line.get_ydata()) == [0.01, 0.8, 1, 200, 200, 210]


def test_no_name_in_the_roofline_covers_another(figure: Any) -> None:
    from matplotlib.text import Text

    (axes,) = figure[0].axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to their points
    assert len(boxes) == 6
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_analyze_prints_its_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    rates = {"loops in Python": 1e7, "tiles": 5e10, "all cores": 1e11}
    monkeypatch.setattr(m16, "measure_machine", lambda: Machine(2, (1e11, 2e11), (1e10, 1e10)))
    monkeypatch.setattr(m16, "climb_product", lambda: Climb("product", 100, rates))
    monkeypatch.setattr(m16, "climb_convolution", lambda: Climb("convolution", 95, rates))
    monkeypatch.setattr(m16, "with_malloc", lambda setting: [1.5, 8.0])
    monkeypatch.setattr(m16, "best", lambda function, *args, least=0: 1e-3)
    m16.analyze()
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["1", "core:", "100", "GFLOP/s,", "10", "GB/s"] in rows
    assert ["tiles", "50", "5e+03", "50", "%"] in rows
    assert ["all", "cores", "100", "2", "50", "%"] in rows  # of both cores' peak
    assert "would allow 1,000 GFLOP/s" in printed
    assert ["three", "passes", "92.35", "1"] in rows
    assert ["kept", "1.5", "8"] in rows
