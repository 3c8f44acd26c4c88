"""The protected pages protect: an access one element behind or before an array is seen."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.guarded import PAGE, guarded, guarded_empty, outlives
from tests.kernels.place import cpu_only

pytestmark = cpu_only


def peek(array: np.ndarray, index: int) -> float:
    """The element at an index that nothing checks."""
    return ctypes.c_float.from_address(array.ctypes.data + 4 * index).value


def poke(array: np.ndarray, index: int) -> None:
    ctypes.c_float.from_address(array.ctypes.data + 4 * index).value = 1.0


@pytest.mark.parametrize("count", [1, 15, 16, PAGE // 4 - 1, PAGE // 4, PAGE // 4 + 1])
@pytest.mark.parametrize("end", [True, False])
def test_one_element_too_far_is_seen(count: int, end: bool) -> None:
    x = guarded(np.arange(count, dtype="float32"), end=end)
    np.testing.assert_array_equal(x, np.arange(count))
    inside, outside = (count - 1, count) if end else (0, -1)
    assert outlives(lambda: peek(x, inside))
    assert not outlives(lambda: peek(x, outside))
    assert outlives(lambda: poke(x, inside))
    assert not outlives(lambda: poke(x, outside))


def test_any_shape_and_dtype() -> None:
    for shape in ((), (0,), (3, 0, 2), (3, 5), 7):
        for dtype in ("float32", "int8", "int64", "float64"):
            for end in (True, False):
                x = guarded_empty(shape, dtype, end=end)
                assert (x.shape, x.dtype) == (np.empty(shape).shape, np.dtype(dtype))
                assert x.flags.carray
                assert (x.ctypes.data + (x.nbytes if end else 0)) % PAGE == 0
                assert (x > 100).all()
    column = guarded(np.arange(12, dtype="float32").reshape(3, 4).T)
    np.testing.assert_array_equal(column, np.arange(12).reshape(3, 4).T)


def test_memory_lives_as_long_as_the_array() -> None:
    def mapped() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    gc.collect()
    before = mapped()
    arrays = [guarded_empty(1000)[10:] for _ in range(50)]
    gc.collect()
    assert mapped() >= before + 50
    assert all(x.min() > 1e38 for x in arrays)
    del arrays
    gc.collect()
    assert mapped() < before + 10


def test_a_child_that_fails_otherwise_is_an_error(capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="exit code 1"):
        outlives(lambda: 1 / 0)
    capfd.readouterr()
