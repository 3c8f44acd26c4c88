"""The fused optimizers against the formulas of module 07, in float64: values, layouts, and where they may touch."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.compiled import ARCHITECTURES, Compiled, needs_compiler
from tests.kernels.guarded import guarded
from tests.kernels.place import ON_DEVICE, SIMULATED, WHERE, cpu_only, cuda_only, drawn, kernels
from tinytorch.backends import get_backend
from tinytorch.kernels import load
from tinytorch.kernels.cuda.jit import instead_of_launches
from tinytorch.m02_tensor import Tensor, tensor
from tinytorch.m07_optimizers import SGD, Adam, AdamW, Optimizer

optimizers = kernels("optimizers")
XP = get_backend("cuda" if ON_DEVICE else "cpu")  # where addresses of NumPy's arrays mean something

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
        self.kernel = optimizers.sgd if make is SGD else optimizers.adam
        self.places = optimizers.Places()

    def place(self, x: np.ndarray) -> Any:
        return XP.from_numpy(np.array(x)) if self.end is None else guarded(np.asarray(x), self.end)

    def gradients(self) -> list[Any]:
        return [self.place(self.random.normal(size=p.shape).astype("float32")) for p in self.ours]

    def step(self, gradients: list[Any]) -> None:
        """None is for a parameter that has no gradient in this step."""
        for p, g in zip(self.exact, gradients, strict=True):
            p.grad = None if g is None else tensor(XP.to_numpy(g).astype("float64"), dtype="float64")
        reference, optimizer = self.optimizers
        reference.step()
        group, arrays, recalled = optimizer.param_groups[0], [], []
        xp = SimpleNamespace(zeros_like=lambda x: self.place(np.zeros(x.shape, "float32")))
        for p, g in zip(self.ours, gradients, strict=True):
            if g is not None:
                arrays.append(p.data)
                recalled.append(optimizer.recall(xp, p.data, optimizer.state[p], group))
                state = [x.data for x in optimizer.state[p].values() if isinstance(x, Tensor)]
                assert optimizers.fits(p.data, g, *state)
        gradients = [g for g in gradients if g is not None]
        self.kernel(self.places, arrays, gradients, *zip(*recalled, strict=True), group)

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


def near(ours: Any, exact: np.ndarray, least: float) -> None:
    ours = XP.to_numpy(ours)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5 * np.abs(exact).max(initial=least))


@pytest.fixture(params=[1, 2, 3] if WHERE == "cpu" else [None])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Into how many parts the row of parameters is cut, on however many cores."""
    if request.param:
        monkeypatch.setattr(optimizers, "cores", lambda: request.param)
    return request.param


@pytest.mark.parametrize(("make", "options"), CASES, ids=NAMES)
def test_a_hundred_steps(make: type[Optimizer], options: dict, parts: int | None) -> None:
    pair = Pair(make, options, SHAPES, seed=0)
    for _ in range(4 if SIMULATED else 100):
        pair.step(pair.gradients())
    assert parts is None or pair.places.parts == parts
    pair.check()


@drawn(60)
@given(
    case=st.sampled_from(CASES),
    shapes=st.lists(st.lists(st.integers(0, 8 if SIMULATED else 40), max_size=3).map(tuple), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shapes(case: tuple, shapes: list[tuple], seed: int) -> None:
    pair = Pair(*case, shapes, seed)
    for _ in range(3):
        pair.step(pair.gradients())
    pair.check(least=0.1)  # one number alone may be what is left of a sum


@pytest.mark.skipif(ON_DEVICE, reason="protected pages are the host's")
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize(("make", "options"), CASES, ids=NAMES)
def test_nothing_is_touched_outside(make: type[Optimizer], options: dict, end: bool, parts: int | None) -> None:
    sizes = [0, 1, 31, 33, 256, 257] if SIMULATED else [*range(35), 63, 64, 65, 127, 1023, 1025]
    pair = Pair(make, options, [(size,) for size in sizes], seed=1, end=end)
    for _ in range(2):
        pair.step(pair.gradients())
    pair.check()


@cpu_only
@pytest.mark.parametrize(("make", "options"), CASES, ids=NAMES)
def test_threads_change_nothing(make: type[Optimizer], options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for parts, chosen in ((1, "serial"), (4, "serial"), (4, "parallel"), (4, "parallel")):
        monkeypatch.setattr(optimizers, "cores", lambda parts=parts: parts)
        monkeypatch.setattr(
            optimizers,
            "run",
            lambda serial, parallel, work, *x, c=chosen: {"serial": serial, "parallel": parallel}[c](*x),
        )
        pair = Pair(make, options, [(300, 77), (5,), (4096,), (3, 3)], seed=2)
        for _ in range(3):
            pair.step(pair.gradients())
        pair.check()
        results.append([p.data for p in pair.ours])
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("make", "options"), CASES, ids=NAMES)
def test_parameters_without_a_gradient_at_times(make: type[Optimizer], options: dict) -> None:
    pair = Pair(make, options, [(40,), (3, 5), (300,), (2,)], seed=6)
    for missing in ({1}, {3}, {0, 1}, set()):
        pair.step([None if k in missing else g for k, g in enumerate(pair.gradients())])
    pair.check()


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
            assert (old != q.data).any()
    pair.check()


def test_gradients_of_any_layout() -> None:
    pair = Pair(SGD, {"lr": 0.1, "momentum": 0.5}, [(4, 3), (3, 4), (5,), (6,)], seed=4)
    for _ in range(3):
        a, b, c, d = pair.gradients()
        if isinstance(c, np.ndarray):
            c.flags.writeable = False
        pair.step([b.T, a.T, c, XP.broadcast_to(d[:1], (6,))])
    pair.check()


PLAIN = {"lr": 1.0, "momentum": 0, "nesterov": False, "weight_decay": 0, "maximize": False}


def test_parameters_that_share_memory_are_updated_in_their_order(parts: int | None) -> None:
    memory = XP.arange(40, dtype="float32")
    parameters, gradients = [memory[:30], memory[10:]], [XP.full((30,), n, dtype="float32") for n in (1, 2)]
    places = optimizers.Places()
    optimizers.sgd(places, parameters, gradients, [None, None], [0, 0], PLAIN)
    assert places.parts == 1 if WHERE == "cpu" else not places.apart
    np.testing.assert_array_equal(XP.to_numpy(memory), np.arange(40) - np.repeat([1, 3, 2], [10, 20, 10]))


@pytest.mark.parametrize(("make", "options"), CASES, ids=NAMES)
def test_what_is_not_finite_stays_so(make: type[Optimizer], options: dict) -> None:
    odd = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0]
    pair = Pair(make, options, [(36,)], seed=5)
    pair.ours[0].data[...], pair.exact[0].data[...] = pair.place(np.tile(odd, 6).astype("float32")), np.tile(odd, 6)
    for k in range(3):
        with np.errstate(all="ignore"):
            pair.step([pair.place(np.repeat(np.roll(odd, k), 6).astype("float32"))])
    np.testing.assert_allclose(XP.to_numpy(pair.ours[0].data), pair.exact[0].data, rtol=1e-5)


def test_what_fits() -> None:
    x = XP.zeros((4, 3), dtype="float32")
    turned = XP.zeros((3, 4), dtype="float32").T
    assert optimizers.fits(x, x, x, x)
    assert optimizers.fits(x, turned)
    for other in (XP.astype(x, "float64"), XP.astype(x, "float16"), x[:3]):
        assert not optimizers.fits(x, other)
        assert not optimizers.fits(x, x, other)
        assert not optimizers.fits(other, x)
    for other in (turned, XP.zeros((4, 6), dtype="float32")[:, ::2]):
        assert not optimizers.fits(other, x)
        assert not optimizers.fits(x, x, other)
    assert not optimizers.fits(x, x.reshape(3, 4))
    assert not optimizers.fits(x, x, x.reshape(-1)[1:])


@pytest.mark.skipif(ON_DEVICE, reason="arrays that only NumPy has")
def test_what_fits_of_numpy() -> None:
    x = np.zeros((4, 3), "float32")
    frozen = x.copy()
    frozen.flags.writeable = False
    assert optimizers.fits(x, frozen)
    assert not optimizers.fits(frozen, x)
    assert not optimizers.fits(x, x, frozen)
    for other in (x.astype(">f4"), x.view(np.matrix), np.float32(1)):
        assert not optimizers.fits(x, other)
        assert not optimizers.fits(x, x, other)
        assert not optimizers.fits(other, x)


@pytest.mark.skipif(SIMULATED, reason="the simulator's device is the host")
def test_on_a_device_nothing_of_numpy_fits() -> None:
    x = np.zeros((4, 3), "float32")
    assert not load("tinytorch.kernels.cuda.optimizers:fits")(x, x)


# -- launches ----------------------------------------------------------------------------------------------------------


@cuda_only
def test_one_launch_for_all_and_nothing_copied_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, copied, run = list[int](), list[tuple](), optimizers.run

    def counting_run(kernel: Any, blocks: int, *others: Any) -> None:
        launched.append(blocks)
        run(kernel, blocks, *others)

    def from_numpy(array: np.ndarray) -> Any:
        copied.append(array.shape)
        return XP.from_numpy(array)

    monkeypatch.setattr(optimizers, "run", counting_run)
    monkeypatch.setattr(optimizers, "backend_of", lambda array: SimpleNamespace(from_numpy=from_numpy))
    pair = Pair(Adam, {"lr": 0.1}, [(3,), (2 * optimizers.PIECE,), (0,), (7, 2)], seed=7)
    gradients = pair.gradients()
    for elsewhere, expected in ((False, [(4, 2), (4, 6)]), (False, []), (True, [(4, 6)])):
        pair.step([g + 0 for g in gradients] if elsewhere else gradients)
        assert copied == expected
        assert launched == [4]
        copied.clear()
        launched.clear()
    pair.optimizers[0].state[pair.exact[3]]["step"] = pair.optimizers[1].state[pair.ours[3]]["step"] = 1
    pair.step(gradients)
    assert launched == [3, 1]
    pair.check()


@cuda_only
def test_parameters_that_share_memory_have_launches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, memory = list[int](), XP.zeros((40,), dtype="float32")
    monkeypatch.setattr(optimizers, "run", lambda kernel, blocks, *others: launched.append(blocks))
    optimizers.sgd(optimizers.Places(), [memory[:20], memory[20:]], [memory[:20]] * 2, [None] * 2, [0, 0], PLAIN)
    assert launched == [2]
    optimizers.sgd(
        optimizers.Places(), [memory[:21], memory[20:]], [memory[:21], memory[20:]], [None] * 2, [0, 0], PLAIN
    )
    assert launched == [2, 1, 1]


@needs_compiler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_for_devices(architecture: tuple[int, int]) -> None:
    made, x = load("tinytorch.kernels.cuda.optimizers:Places"), [np.zeros((9, 9), "float32"), np.zeros(3, "float32")]
    sgd, adam = (load(f"tinytorch.kernels.cuda.optimizers:{name}") for name in ("sgd", "adam"))
    with instead_of_launches(compiled := Compiled(architecture)):
        sgd(made(), x, x, x, [0, 0], PLAIN)
        options = PLAIN | {"betas": (0.9, 0.999), "amsgrad": True, "decoupled_weight_decay": True}
        adam(made(), x, x, x, x, x, [0.1] * 2, [1e-8] * 2, options)
    assert [name for name, *_ in compiled.launches[:1]] == ["update_by_sgd"]
    for listing in compiled.kernels.values():
        assert listing.doubles == []
        assert "ld.global.f32" in listing.ptx
        machine = listing.assembled(architecture)
        assert machine.spilled == machine.shared == 0
        assert machine.registers <= 40
