"""The fused optimizers against the formulas of module 07, in float64: values, layouts, and where they may touch."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.guarded import guarded
from tinytorch.kernels.cpu import optimizers as kernels
from tinytorch.kernels.cpu.optimizers import Places
from tinytorch.m02_tensor import Tensor, tensor
from tinytorch.m07_optimizers import SGD, Adam, AdamW, Optimizer

CASES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    (Adam, {"lr": 0.01}),
    (Adam, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "amsgrad": True, "eps": 1e-3}),
    (AdamW, {"lr": 0.01, "weight_decay": 0.5, "maximize": True}),
    (AdamW, {"lr": 0.01, "amsgrad": True}),
]
NAMES = [f"{make.__name__}-{'-'.join(options)}" for make, options in CASES]
SHAPES = [(33, 65), (), (1,), (0, 3), (17,), (5, 1, 3), (1000,), (16,)]


class Pair:
    """Equal parameters twice: in float64 for the formulas, in float32 for the kernels."""

    def __init__(self, make: type[Optimizer], options: dict, shapes: list[tuple], seed: int, end: bool | None = None):
        self.random, self.end = np.random.default_rng(seed), end
        values = [self.random.normal(size=shape).astype("float32") for shape in shapes]
        self.exact = [tensor(x.astype("float64"), dtype="float64", requires_grad=True) for x in values]
        self.ours = [tensor(x, requires_grad=True) for x in values]
        for p in self.ours:
            p.data = self.place(p.data)
        self.optimizers = make(self.exact, **options), make(self.ours, **options)
        self.kernel = kernels.sgd if make is SGD else kernels.adam
        self.places = Places()

    def place(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(x).copy() if self.end is None else guarded(np.asarray(x), self.end)

    def gradients(self) -> list[np.ndarray]:
        return [self.place(self.random.normal(size=p.shape).astype("float32")) for p in self.ours]

    def step(self, gradients: list[np.ndarray]) -> None:
        for p, g in zip(self.exact, gradients, strict=True):
            p.grad = tensor(g.astype("float64"), dtype="float64")
        reference, optimizer = self.optimizers
        reference.step()
        group, recalled = optimizer.param_groups[0], []
        xp = SimpleNamespace(zeros_like=lambda x: self.place(np.zeros_like(x)))
        for p, g in zip(self.ours, gradients, strict=True):
            recalled.append(optimizer.recall(xp, p.data, optimizer.state[p], group))
            assert kernels.fits(p.data, g, *[x.data for x in optimizer.state[p].values() if isinstance(x, Tensor)])
        self.kernel(self.places, [p.data for p in self.ours], gradients, *zip(*recalled, strict=True), group)

    def check(self, least: float = 1e-30) -> None:
        for p, q in zip(self.exact, self.ours, strict=True):
            near(q.data, p.data, least)
            theirs, ours = (o.state[x] for o, x in zip(self.optimizers, (p, q), strict=True))
            assert list(theirs) == list(ours)
            for name, value in theirs.items():
                if isinstance(value, Tensor):
                    near(ours[name].data, value.data, least)
                else:
                    assert ours[name] == value


def near(ours: np.ndarray, exact: np.ndarray, least: float) -> None:
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5 * np.abs(exact).max(initial=least))


@pytest.fixture(params=[1, 2, 3])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Into how many parts the row of parameters is cut, on however many cores."""
    monkeypatch.setattr(kernels, "cores", lambda: request.param)
    return request.param


@pytest.mark.parametrize(("make", "options"), CASES, ids=NAMES)
def test_a_hundred_steps(make: type[Optimizer], options: dict, parts: int) -> None:
    pair = Pair(make, options, SHAPES, seed=0)
    for _ in range(100):
        pair.step(pair.gradients())
    assert pair.places.parts == parts
    pair.check()


@settings(max_examples=60)
@given(
    case=st.sampled_from(CASES),
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shapes(case: tuple, shapes: list[tuple], seed: int) -> None:
    pair = Pair(*case, shapes, seed)
    for _ in range(3):
        pair.step(pair.gradients())
    pair.check(least=0.1)  # one number alone may be what is left of a sum


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize(("make", "options"), CASES, ids=NAMES)
def test_nothing_is_touched_outside(make: type[Optimizer], options: dict, end: bool, parts: int) -> None:
    sizes = [*range(35), 63, 64, 65, 127, 1023, 1025]
    pair = Pair(make, options, [(size,) for size in sizes], seed=1, end=end)
    for _ in range(2):
        pair.step(pair.gradients())
    pair.check()


@pytest.mark.parametrize(("make", "options"), CASES, ids=NAMES)
def test_threads_change_nothing(make: type[Optimizer], options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for parts, chosen in ((1, "serial"), (4, "serial"), (4, "parallel"), (4, "parallel")):
        monkeypatch.setattr(kernels, "cores", lambda parts=parts: parts)
        monkeypatch.setattr(
            kernels, "run", lambda serial, parallel, work, *x, c=chosen: {"serial": serial, "parallel": parallel}[c](*x)
        )
        pair = Pair(make, options, [(300, 77), (5,), (4096,), (3, 3)], seed=2)
        for _ in range(3):
            pair.step(pair.gradients())
        pair.check()
        results.append([p.data for p in pair.ours])
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


def test_arrays_that_were_replaced_are_found() -> None:
    pair = Pair(Adam, {"lr": 0.1, "amsgrad": True}, [(4, 3), (7,)], seed=3)
    for step in range(6):
        optimizer, q = pair.optimizers[1], pair.ours[1]
        if step == 2:
            old, q.data = q.data, q.data.copy()
        if step == 3:
            optimizer.load_state_dict(optimizer.state_dict())
        if step == 4:
            before, pair.places = pair.places, copy.deepcopy(pair.places)
            assert pair.places.arrays == []
            assert len(before.arrays) == 8
        pair.step(pair.gradients())
        if step == 2:
            assert not np.array_equal(old, q.data)
    pair.check()


def test_gradients_of_any_layout() -> None:
    pair = Pair(SGD, {"lr": 0.1, "momentum": 0.5}, [(4, 3), (3, 4), (5,), (6,)], seed=4)
    for _ in range(3):
        a, b, c, d = pair.gradients()
        c.flags.writeable = False
        pair.step([b.T, a.T, c, np.broadcast_to(d[:1], 6)])
    pair.check()


def test_parameters_that_share_memory_are_updated_in_their_order(parts: int) -> None:
    memory = np.arange(40, dtype="float32")
    parameters, gradients = [memory[:30], memory[10:]], [np.ones(30, "float32"), np.full(30, 2, "float32")]
    places = Places()
    options = {"lr": 1.0, "momentum": 0, "nesterov": False, "weight_decay": 0, "maximize": False}
    kernels.sgd(places, parameters, gradients, [None, None], [0, 0], options)
    assert places.parts == 1
    np.testing.assert_array_equal(memory, np.arange(40) - np.repeat([1, 3, 2], [10, 20, 10]))


@pytest.mark.parametrize(("make", "options"), CASES, ids=NAMES)
def test_what_is_not_finite_stays_so(make: type[Optimizer], options: dict) -> None:
    odd = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0]
    ours, theirs = (
        [tensor(np.tile(odd, 6).astype("float32"), dtype=dtype, requires_grad=True)] for dtype in ("float32", "float64")
    )
    pair = Pair(make, options, [(36,)], seed=5)
    pair.ours[0].data[...], pair.exact[0].data[...] = ours[0].data, theirs[0].data
    for k in range(3):
        with np.errstate(all="ignore"):
            pair.step([np.repeat(np.roll(odd, k), 6).astype("float32")])
    np.testing.assert_allclose(pair.ours[0].data, pair.exact[0].data, rtol=1e-5)


def test_what_fits() -> None:
    x = np.zeros((4, 3), "float32")
    assert kernels.fits(x, x, x, x)
    assert kernels.fits(x, np.zeros((3, 4), "float32").T)
    frozen = x.copy()
    frozen.flags.writeable = False
    assert kernels.fits(x, frozen)
    for other in (x.astype("float64"), x.astype("float16"), x[:3], x.astype(">f4"), x.view(np.matrix), np.float32(1)):
        assert not kernels.fits(x, other)
        assert not kernels.fits(x, x, other)
        assert not kernels.fits(other, x)
    for other in (np.zeros((3, 4), "float32").T, frozen, np.zeros((4, 6), "float32")[:, ::2]):
        assert not kernels.fits(other, x)
        assert not kernels.fits(x, x, other)
    assert not kernels.fits(x, x.reshape(3, 4))
    assert not kernels.fits(x, x, x.reshape(-1)[1:])
