"""What the backends add to the array standard: the same on every array library."""

from __future__ import annotations

import json
import math
import mmap
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

from tinytorch import backends
from tinytorch.backends import Backend, backend_of, get_backend, manual_seed, rng_state, set_rng_state
from tinytorch.backends.base import process_memory
from tinytorch.backends.numpy import erf

RNG = np.random.default_rng(404)


@pytest.fixture
def xp(device: str) -> Backend:
    return get_backend(device)


def back(xp: Backend, array: object) -> np.ndarray:
    return xp.to_numpy(array)


# -- finding one -------------------------------------------------------------------------------------------------------


def test_the_backend_of_an_array(xp: Backend) -> None:
    x = xp.from_numpy(np.ones(2))
    assert backend_of(x) is xp
    assert type(x) is xp.array_type
    assert get_backend(xp.device) is xp


def test_numpy_scalars_and_subclasses() -> None:
    assert backend_of(np.float32(1)).name == "numpy"
    assert backend_of(np.ma.ones(2)).name == "numpy"


@pytest.mark.parametrize("thing", [1.0, [1, 2], "text", None])
def test_what_is_no_array(thing: object) -> None:
    with pytest.raises(TypeError, match=f"expected an array .*, got {type(thing).__name__}"):
        backend_of(thing)


@pytest.mark.parametrize("name", ["nowhere", "json", "math", "", "gpu"])
def test_no_such_device(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"there is no device {name!r}: expected 'cpu', 'cuda'"):
        get_backend(name)


def test_a_function_that_is_missing_is_an_attribute_error(xp: Backend) -> None:
    with pytest.raises(AttributeError, match="no_such_function"):
        xp.no_such_function(1)


# -- dtypes ------------------------------------------------------------------------------------------------------------


def test_dtypes_have_names(xp: Backend) -> None:
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float32", "float64"):
        x = xp.from_numpy(np.ones(2, dtype=name))
        assert xp.dtype_name(x) == name
        assert x.dtype == xp.dtype(name)
        assert xp.is_floating(x) == name.startswith("float")
        assert xp.cast(x, name) is x
        assert xp.dtype_name(xp.cast(x, "float64")) == "float64"
    with pytest.raises(TypeError, match=f"{xp.name} has no dtype 'complex7'; it has bool"):
        xp.dtype("complex7")


@pytest.mark.parametrize(
    ("given", "floating", "expected"),
    [
        (["int32", "float32"], False, "float32"),
        (["int64", "float16"], False, "float16"),
        (["bool", "int8"], False, "int8"),
        (["uint8", "int8"], False, "int16"),
        (["float32", "float64"], False, "float64"),
        (["int32", 1.5], False, "float32"),
        (["float64", 1.5], False, "float64"),
        (["bool", 2], False, "int64"),
        (["int8", 100], False, "int8"),
        (["int32", "int64"], True, "float32"),
        (["float64", 2], True, "float64"),
    ],
)
def test_promotion(xp: Backend, given: list, floating: bool, expected: str) -> None:
    if "float16" in given and "float16" not in xp.dtypes:
        pytest.skip("the standard has no float16")
    inputs = [xp.cast(xp.from_numpy(np.ones(2)), x) if isinstance(x, str) else x for x in given]
    arrays = [x for x in xp.promote(inputs, floating) if hasattr(x, "shape") and x.shape == (2,)]
    assert {xp.dtype_name(x) for x in arrays} == {expected}


def test_numbers_alone_stay_numbers(xp: Backend) -> None:
    assert xp.promote([1, 2.5]) == [1, 2.5]


# -- indexing ----------------------------------------------------------------------------------------------------------

INDICES = [
    1,
    (slice(None), -1),
    slice(None, None, -1),
    (..., None, 0),
    [0, 2, 2],
    (np.array([[0], [3]]), np.array([1, 2])),
    (slice(1, 3), np.array([2, 0])),
    np.array([True, False, True, True]),
    np.ones((4, 3), dtype=bool),
    slice(2, 99),
    (),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing(xp: Backend, index: object) -> None:
    values = RNG.normal(size=(4, 3))
    x = xp.from_numpy(values.copy())
    np.testing.assert_array_equal(back(xp, xp.take_index(x, index)), values[index])
    new = RNG.normal(size=values[index].shape)
    xp.assign(x, index, xp.from_numpy(new))
    expected = values.copy()
    expected[index] = new
    np.testing.assert_array_equal(back(xp, x), expected)
    added = RNG.normal(size=values[index].shape)
    assert xp.scatter_add(x, index, xp.from_numpy(added)) is x
    np.add.at(expected, index, added)
    np.testing.assert_allclose(back(xp, x), expected)


def test_indices_of_the_library_itself(xp: Backend) -> None:
    values = RNG.normal(size=(4, 3))
    rows, mask = np.array([0, 0, 3]), values > 0
    x = xp.from_numpy(values.copy())
    np.testing.assert_array_equal(back(xp, xp.take_index(x, xp.from_numpy(rows))), values[rows])
    np.testing.assert_array_equal(back(xp, xp.take_index(x, xp.from_numpy(mask))), values[mask])
    xp.assign(x, xp.from_numpy(mask), 0.0)
    np.testing.assert_array_equal(back(xp, x), np.where(mask, 0, values))


# -- mathematics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 4e-7), ("float64", 3e-16)])
def test_erf(xp: Backend, dtype: str, tolerance: float) -> None:
    x = np.concatenate([np.linspace(-7, 7, 2001), [0.46875, 4.0, -4.0, 1e-300, 50, 1e10, np.inf, -np.inf]]).astype(
        dtype
    )
    found = back(xp, xp.erf(xp.from_numpy(x)))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, [math.erf(v) for v in x], rtol=2 * tolerance, atol=tolerance)
    assert np.isnan(back(xp, xp.erf(xp.from_numpy(np.array([np.nan], dtype)))))[0]


def test_erf_is_odd_and_bounded() -> None:
    for dtype in ("float16", "float32", "float64"):
        x = RNG.normal(size=1000, scale=3).astype(dtype)
        np.testing.assert_array_equal(erf(-x), -erf(x))
        assert np.abs(erf(x)).max() <= 1 + 3e-7
        assert erf(x).dtype == dtype


def test_einsum(xp: Backend) -> None:
    a, b, c = (RNG.normal(size=s) for s in ((2, 3), (3, 4), (4,)))
    arrays = [xp.from_numpy(x) for x in (a, b, c)]
    np.testing.assert_allclose(back(xp, xp.einsum("ij,jk,k->i", *arrays)), a @ b @ c)
    np.testing.assert_allclose(back(xp, xp.einsum("ij->ji", arrays[0])), a.T)


@pytest.mark.parametrize(
    ("shape", "size", "stride", "dilation"),
    [
        ((2, 7, 6), (3, 2), (2, 1), (1, 1)),
        ((1, 9), (3,), (2,), (3,)),
        ((2, 3, 5, 5), (2, 2), (1, 2), (2, 1)),
        ((4,), (4,), (1,), (1,)),
    ],
)
def test_sliding_windows(xp: Backend, shape: tuple, size: tuple, stride: tuple, dilation: tuple) -> None:
    x = RNG.normal(size=shape)
    found = back(xp, xp.sliding_windows(xp.from_numpy(x), size, stride, dilation))
    rank = len(size)
    lead, spatial = shape[: len(shape) - rank], shape[len(shape) - rank :]
    out = tuple((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(spatial, size, stride, dilation, strict=True))
    assert found.shape == (*lead, *out, *size)
    for place in np.ndindex(*out):
        for offset in np.ndindex(*size):
            source = tuple(p * s + o * d for p, s, o, d in zip(place, stride, offset, dilation, strict=True))
            np.testing.assert_array_equal(found[(..., *place, *offset)], x[(..., *source)])


# -- random numbers ----------------------------------------------------------------------------------------------------


def drawn(xp: Backend) -> list:
    return [
        back(xp, y).tolist()
        for y in (
            xp.random((3,)),
            xp.random((2,), "float64"),
            xp.normal((2, 2)),
            xp.normal((2,), "float64"),
            xp.integers(-5, 5, (4,)),
            xp.permutation(6),
            xp.beta(0.4, 2.0, (3,)),
        )
    ]


def test_the_state_goes_through_json(xp: Backend) -> None:
    manual_seed(21)
    first = drawn(xp)
    state = json.loads(json.dumps(rng_state()))
    second = drawn(xp)
    assert first != second
    set_rng_state(state)
    assert drawn(xp) == second
    manual_seed(21)
    assert drawn(xp) == first
    manual_seed(22)
    assert drawn(xp) != first


def test_a_seeded_block_has_a_generator_of_its_own(xp: Backend) -> None:
    manual_seed(21)
    expected = [drawn(xp), drawn(xp)]
    manual_seed(21)
    first = drawn(xp)
    with xp.seeded((4, 5)):
        inside = drawn(xp)
        with backends.seeded(6):  # nested
            inner = drawn(xp)
            manual_seed(6)  # starts the generator in force anew, which is the block's
            assert drawn(xp) == inner
        rest = drawn(xp)
    assert [first, drawn(xp)] == expected
    manual_seed(0)
    with xp.seeded((4, 5)):
        assert [drawn(xp), drawn(xp)] == [inside, rest]
    with xp.seeded((5, 4)):
        assert drawn(xp) != inside
    assert len({str(numbers) for numbers in (*expected, inside, rest, inner)}) == 5


def test_arrays_of_every_layout_are_taken(xp: Backend) -> None:
    values = np.arange(6.0).reshape(2, 3)
    frozen = values.copy()
    frozen.flags.writeable = False
    for array in (values[:, ::-1], values.T, values[:1, :1][::-1], frozen, np.broadcast_to(values[:1], (4, 3))):
        np.testing.assert_array_equal(xp.to_numpy(xp.from_numpy(array)), array)


def test_a_seeded_block_goes_on_where_it_left_off_and_ends_with_an_exception(xp: Backend) -> None:
    with xp.seeded(3):
        whole = [drawn(xp), drawn(xp)]
    block, before = xp.seeded(3), rng_state()
    parts = []
    for _ in range(2):
        with suppress(KeyError), block:
            parts.append(drawn(xp))
            raise KeyError
    assert parts == whole
    assert rng_state() == before


def test_a_state_taken_in_a_seeded_block_is_the_blocks(xp: Backend) -> None:
    with backends.seeded(3):
        state = rng_state()
        inside = drawn(xp)
        set_rng_state(state)
        assert drawn(xp) == inside
    assert rng_state()[xp.device] != state[xp.device]


def test_a_seeded_block_concerns_its_own_thread_only(xp: Backend) -> None:
    manual_seed(8)
    expected = [drawn(xp), drawn(xp)]
    manual_seed(8)
    with xp.seeded(9), ThreadPoolExecutor(1) as other:
        assert other.submit(drawn, xp).result() == expected[0]
        inside = drawn(xp)
    assert drawn(xp) == expected[1]
    with ThreadPoolExecutor(1) as other:
        results = [other.submit(in_block, xp, 9) for _ in range(2)]
        assert [result.result() for result in results] == [inside, inside]
    manual_seed(0)


def in_block(xp: Backend, seed: int) -> list:
    with xp.seeded(seed):
        return drawn(xp)


def test_kinds_of_draws(xp: Backend) -> None:
    assert xp.dtype_name(xp.random((2,))) == "float32"
    assert xp.dtype_name(xp.normal((2,), "float64")) == "float64"
    assert xp.dtype_name(xp.integers(0, 9, (2,))) == "int64" == xp.dtype_name(xp.permutation(3))
    uniform, whole = back(xp, xp.random((5000,))), back(xp, xp.integers(-2, 3, (5000,)))
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert set(whole.tolist()) == {-2, -1, 0, 1, 2}


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.2, 0.2), (2.0, 5.0)])
def test_beta_has_the_distributions_moments(xp: Backend, a: float, b: float) -> None:
    manual_seed(23)
    drawn = back(xp, xp.beta(a, b, (40, 500)))
    assert (drawn.shape, drawn.dtype) == ((40, 500), np.float32)
    assert 0 <= drawn.min() < drawn.max() <= 1
    mean, variance = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
    assert abs(drawn.mean() - mean) < 5 * math.sqrt(variance / drawn.size)
    assert drawn.var() == pytest.approx(variance, rel=0.05)
    assert xp.dtype_name(xp.beta(a, b, (), "float64")) == "float64"


@pytest.mark.parametrize("seed", [-1, 1.5, "7", None])
def test_bad_seeds(seed: object) -> None:
    with pytest.raises(ValueError, match="manual_seed: expected an integer >= 0"):
        manual_seed(seed)


@pytest.mark.parametrize("state", [{}, {"bit_generator": "MT19937"}, 7, {"bit_generator": "PCG64", "state": {}}])
def test_bad_states(state: object) -> None:
    before = rng_state()
    with pytest.raises(ValueError, match="not a random state of backend numpy"):
        set_rng_state({"cpu": state})
    assert rng_state() == before


def test_a_state_of_a_device_that_is_not_here() -> None:
    with pytest.raises(RuntimeError, match="nowhere"):
        set_rng_state({"nowhere": {}})


# -- memory and the machine --------------------------------------------------------------------------------------------


def test_to_and_from_numpy(xp: Backend) -> None:
    for values in (
        np.ones((2, 3)),
        np.array(2.5, dtype=np.float32),
        np.zeros((0, 2), dtype=np.int64),
        np.arange(6).reshape(2, 3).T,
    ):
        x = xp.from_numpy(values)
        assert tuple(x.shape) == values.shape
        assert xp.dtype_name(x) == values.dtype.name
        np.testing.assert_array_equal(back(xp, x), values)


def test_buffers_are_told_apart(xp: Backend) -> None:
    x, other = xp.from_numpy(np.arange(6.0).reshape(2, 3)), xp.from_numpy(np.arange(6.0))
    assert xp.buffer_id(x) == xp.buffer_id(x) != xp.buffer_id(other)
    assert xp.buffer_id(x[0, ...]) == xp.buffer_id(x)
    assert not xp.owns_memory(x[0, ...])


def test_numpy_owns_what_is_no_view() -> None:
    xp, x = get_backend("cpu"), np.ones((2, 3))
    assert xp.owns_memory(x)
    assert not xp.owns_memory(x.T)
    assert not xp.owns_memory(np.float64(1))
    assert xp.buffer_id(x.T[0]) == xp.buffer_id(x)


def test_memory_is_measured(xp: Backend) -> None:
    xp.synchronize()
    before = xp.memory()
    assert 0 < before.used <= before.total
    with mmap.mmap(-1, 64_000_000) as block:  # from the system: NumPy may be given memory that was freed before
        block.write(b"1" * len(block))
        after = xp.memory()
    assert after.used - before.used > 40_000_000
    assert after.peak >= after.used * 0.9


def test_memory_without_proc(monkeypatch) -> None:
    def no_proc(*_: object) -> None:
        raise OSError

    monkeypatch.setattr("builtins.open", no_proc)
    found = process_memory()
    assert found.peak > 1_000_000
    monkeypatch.setitem(sys.modules, "resource", None)
    assert process_memory()[:2] == (0, 0)


def test_text(xp: Backend) -> None:
    assert xp.format(xp.from_numpy(np.array([[1, 2], [3, 4]])), prefix="tensor(") == "[[1, 2],\n        [3, 4]]"
    assert repr(xp) == f"<backend {xp.name} on {xp.device}>"


def test_only_what_is_asked_for_is_imported() -> None:
    code = (
        "import sys, tinytorch.backends as b; b.get_backend('cpu'); "
        "print({'cupy', 'torch', 'array_api_strict'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert backends.BY_DEVICE["cpu"].name == "numpy"
