"""The CuPy backend on a stand-in for CuPy, and what is said where CuPy or its device is missing."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest

from tests.backends import fake_cupy
from tinytorch import backends
from tinytorch.backends import backend_of, get_backend


@pytest.fixture
def cuda() -> Iterator[None]:
    with fake_cupy.installed():
        yield


pytestmark = pytest.mark.usefixtures("cuda")


def test_one_backend_for_each_device() -> None:
    first, second = get_backend("cuda"), get_backend("cuda:1")
    assert first is get_backend("cuda:0") is get_backend("cuda")
    assert first is not second
    assert (first.name, first.device, second.device) == ("cupy", "cuda:0", "cuda:1")
    a, b = first.zeros((2,)), second.zeros((2,))
    assert a.device.id == 0
    assert b.device.id == 1
    assert backend_of(a) is first
    assert backend_of(b) is second


@pytest.mark.parametrize(
    "creation",
    [
        lambda xp: xp.zeros((2,)),
        lambda xp: xp.ones((2,)),
        lambda xp: xp.full((2,), 3.0),
        lambda xp: xp.empty((2,)),
        lambda xp: xp.eye(2),
        lambda xp: xp.arange(3),
        lambda xp: xp.linspace(0, 1, 3),
        lambda xp: xp.asarray([1.0]),
        lambda xp: xp.from_numpy(np.ones(2)),
        lambda xp: xp.random((3,)),
        lambda xp: xp.normal((3,)),
        lambda xp: xp.integers(0, 5, (3,)),
        lambda xp: xp.permutation(3),
        lambda xp: xp.beta(2.0, 0.5, (3,)),
    ],
)
def test_what_is_created_lies_on_its_device(creation) -> None:
    assert creation(get_backend("cuda:1")).device.id == 1
    assert fake_cupy.current == [0]


def test_dtypes() -> None:
    xp = get_backend("cuda")
    x = xp.zeros((2,), dtype=xp.dtype("float32"))
    assert xp.dtype_name(x) == "float32"
    assert xp.is_floating(x)
    assert not xp.is_floating(xp.arange(3))
    assert xp.cast(x, "float32") is x
    assert xp.dtype_name(xp.cast(x, "int64")) == "int64"
    both = xp.promote([x, xp.arange(2)])
    assert [xp.dtype_name(y) for y in both] == ["float32", "float32"]
    with pytest.raises(TypeError, match="cupy has no dtype 'bfloat16'"):
        xp.dtype("bfloat16")


def test_indexing_takes_host_arrays_and_lists() -> None:
    xp, values = get_backend("cuda"), np.arange(12.0).reshape(4, 3)
    for index in (1, [0, 2], np.array([3, 1]), (np.array([0, 1]), [2, 2]), (slice(None), np.array([0])), values > 5):
        x = xp.from_numpy(values)
        np.testing.assert_array_equal(xp.to_numpy(xp.take_index(x, index)), values[index])
        xp.assign(x, index, -1.0)
        expected = values.copy()
        expected[index] = -1
        np.testing.assert_array_equal(xp.to_numpy(x), expected)
    x = xp.zeros((3,))
    assert xp.scatter_add(x, np.array([0, 2, 0]), xp.from_numpy(np.array([1.0, 2.0, 3.0]))) is x
    assert xp.to_numpy(x).tolist() == [4, 0, 2]


def test_mathematics() -> None:
    xp, rng = get_backend("cuda"), np.random.default_rng(1)
    a, b = rng.normal(size=(2, 3)), rng.normal(size=(3, 4))
    np.testing.assert_allclose(xp.to_numpy(xp.einsum("ij,jk->ik", xp.from_numpy(a), xp.from_numpy(b))), a @ b)
    np.testing.assert_allclose(xp.to_numpy(xp.erf(xp.from_numpy(a))), np.vectorize(math.erf)(a))
    x = rng.normal(size=(2, 7, 6))
    windows = xp.to_numpy(xp.sliding_windows(xp.from_numpy(x), (3, 2), (2, 1), (2, 3)))
    assert windows.shape == (2, 2, 3, 3, 2)
    for i, j, k, m in np.ndindex(2, 3, 3, 2):
        np.testing.assert_array_equal(windows[:, i, j, k, m], x[:, 2 * i + 2 * k, j + 3 * m])


def test_random_numbers_and_their_state() -> None:
    xp = get_backend("cuda")
    xp.seed(3)
    first = [xp.to_numpy(xp.random((4,))).tolist(), xp.to_numpy(xp.normal((2,), "float64")).tolist()]
    state = json.loads(json.dumps(xp.rng_state()))
    after = [xp.to_numpy(xp.integers(0, 100, (5,))).tolist(), xp.to_numpy(xp.permutation(6)).tolist()]
    assert sorted(after[1]) == list(range(6))
    xp.set_rng_state(state)
    assert [xp.to_numpy(xp.integers(0, 100, (5,))).tolist(), xp.to_numpy(xp.permutation(6)).tolist()] == after
    xp.seed(3)
    assert [xp.to_numpy(xp.random((4,))).tolist(), xp.to_numpy(xp.normal((2,), "float64")).tolist()] == first
    assert xp.to_numpy(xp.random((4,))).tolist() != first[0]
    assert xp.dtype_name(xp.random((2,))) == "float32"
    assert xp.dtype_name(xp.normal((2,), "float16")) == "float16"
    assert xp.dtype_name(xp.beta(1.0, 2.0, (2,))) == "float32"
    for wrong in ({"generator": "PCG64"}, [], None):
        with pytest.raises(ValueError, match="not a random state of backend cupy"):
            xp.set_rng_state(wrong)


def test_a_seeded_block_has_a_state_of_its_own() -> None:
    xp = get_backend("cuda")
    before = xp.rng_state()
    draws = []
    for seed in ((7, 1), (7, 1), (7, 2), 7):
        with xp.seeded(seed):
            draws.append(xp.to_numpy(xp.random((4,))).tolist())
            assert xp.rng_state()["draws"] == 1
    assert draws[0] == draws[1]
    assert len({str(numbers) for numbers in draws}) == 3
    assert xp.rng_state() == before


def test_manual_seed_reaches_devices_that_are_asked_for_later() -> None:
    backends.manual_seed(17)
    assert get_backend("cuda:1").rng_state()["seed"] == 17
    assert "cuda:1" in backends.rng_state()
    assert "cuda" not in backends.rng_state()
    backends.manual_seed(0)


def test_memory_and_the_machine(monkeypatch) -> None:
    asked = []
    library = types.ModuleType("pynvml")
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetHandleByIndex = lambda index: asked.append(index) or index
    library.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=10, total=100)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    xp = get_backend("cuda:1")
    assert xp.memory() == (10, 4096, 100)
    assert asked == [1]
    xp.synchronize()
    assert fake_cupy.synchronized[-1] == 1
    x = xp.zeros((4,))
    assert xp.buffer_id(x[1:]) == xp.buffer_id(x) != xp.buffer_id(xp.zeros((4,)))
    assert xp.owns_memory(x)
    assert not xp.owns_memory(x[1:])


def test_time_on_the_device() -> None:
    xp = get_backend("cuda:1")
    start, end = xp.mark(), xp.mark()
    assert end.device == 1
    fake_cupy.synchronized.clear()
    assert xp.seconds_between(start, end) == pytest.approx(3e-3)
    assert fake_cupy.synchronized == [1]
    assert get_backend("cpu").mark() is None
    with pytest.raises(NotImplementedError, match="numpy on cpu has no marks"):
        get_backend("cpu").seconds_between(None, None)


def test_a_profile_has_the_devices_time() -> None:
    import tinytorch as t

    x = t.ones(4, device="cuda")
    with t.profile() as p:
        x + x
        t.ones(2, device="cpu") + 1
    on_device, on_cpu = (event.device_seconds for event in p.events if event.name == "add")
    assert (on_device, on_cpu) == (pytest.approx(3e-3), None)
    assert "device ms" in p.table()


def test_tensors_on_it() -> None:
    import tinytorch as t

    x = t.tensor([[1.0, 2.0], [3.0, 4.0]], device="cuda")
    assert x.device == "cuda:0"
    assert repr(x) == "tensor([[1., 2.],\n        [3., 4.]], device='cuda:0')"
    assert (x * 2 + x).cpu().tolist() == [[3, 6], [9, 12]]
    with pytest.raises(TypeError, match=r"add: one input is on cuda:0 \(cupy\), another on cpu \(numpy\)"):
        x + t.ones(2)
    assert x.to("cuda:1").device == "cuda:1"
    assert x.cuda(1).cpu().tolist() == x.tolist()


def test_training_on_it() -> None:
    import tinytorch as t

    x = t.tensor([1.0, 2.0], device="cuda", requires_grad=True)
    (x * x + x.exp()).sum().backward()
    assert x.grad.device == "cuda:0"
    np.testing.assert_allclose(x.grad.numpy(), 2 * np.array([1, 2]) + np.exp([1, 2]), rtol=1e-6)


# -- several devices ---------------------------------------------------------------------------------------------------


def test_each_operation_runs_on_the_device_of_its_inputs() -> None:
    import tinytorch as t
    from tinytorch.m02_tensor import observe

    x, y = t.ones(3, device="cuda:1"), t.ones(3, device="cuda:0")
    seen = []
    with observe(lambda op, arrays, attributes, proceed: seen.append(fake_cupy.current[0]) or proceed()):
        for z in (x, y, x):
            assert (z + z.exp()).sum().device == z.device
    assert seen == [1] * 3 + [0] * 3 + [1] * 3
    with pytest.raises(TypeError, match=r"add: one input is on cuda:1 \(cupy\), another on cuda:0 \(cupy\)"):
        x + y
    assert t.tensor(x.data, device="cuda:1").device == t.as_tensor(x.data).device == "cuda:1"
    assert t.tensor(x.data, device="cuda:0").device == "cuda:0"


def test_one_device_is_found_at_once() -> None:
    first = get_backend("cuda")
    assert backends.SURE[first.array_type] is first
    get_backend("cuda:1")
    assert first.array_type not in backends.SURE


def test_the_only_device_in_use_may_be_the_second() -> None:
    import tinytorch as t

    x = t.ones(2, device="cuda:1")
    fake_cupy.current[0] = 0
    assert (x + x).device == "cuda:1"
    assert fake_cupy.current == [1]


# -- what users of torch.cuda know -------------------------------------------------------------------------------------


def test_the_pool_and_the_device(monkeypatch) -> None:
    import tinytorch as t

    library = types.ModuleType("pynvml")
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetHandleByIndex = lambda index: index
    library.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=10 + handle, total=100)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert (t.cuda.memory_allocated(), t.cuda.memory_reserved()) == (1024, 4096)
    t.cuda.empty_cache()
    assert t.cuda.memory_reserved() == 1024
    assert t.cuda.memory_reserved("cuda:1") == 4096
    assert t.cuda.mem_get_info("cuda:1") == (89, 100)
    assert t.cuda.get_device_name(1 and "cuda:1") == "Stand-in 1"
    assert get_backend("cpu").pool() == (0, 0)


def test_events_and_streams() -> None:
    import tinytorch as t

    start, end = t.cuda.Event(enable_timing=True), t.cuda.Event(enable_timing=True)
    with pytest.raises(ValueError, match="both events must have been recorded"):
        start.elapsed_time(end)
    start.record()
    end.record()
    assert start.elapsed_time(end) == pytest.approx(3)
    assert end.query()
    first, second = t.cuda.Stream(), t.cuda.Stream("cuda:1")
    assert first.native.non_blocking
    assert second.native.device == 1
    with t.cuda.stream(first):
        assert fake_cupy.streams == [first.native]
        (t.ones(2, device="cuda") + 1).cpu()
    assert fake_cupy.streams == []
    second.wait_stream(first)
    second.wait_event(end)
    assert [type(event).__name__ for event in second.native.waited_for] == ["Event", "Event"]
    assert second.native.waited_for[1] is end.mark
    fake_cupy.synchronized.clear()
    second.synchronize()
    end.synchronize()
    assert fake_cupy.synchronized == [1, 0]
    end.record(first)
    assert first.query()


def test_page_locked_memory() -> None:
    import tinytorch as t
    from tinytorch.utils.data import DataLoader, TensorDataset

    x = t.arange(6.0).reshape(2, 3)
    locked = x.pin_memory()
    assert locked.tolist() == x.tolist()
    assert locked.device == "cpu"
    fake_cupy.waited.clear()
    assert x.to("cuda").cpu().tolist() == locked.to("cuda").cpu().tolist() == x.tolist()
    locked.cuda(non_blocking=True)
    assert fake_cupy.waited == [False, True, False]  # the first is copied to page-locked memory before
    under_way = get_backend("cuda")._under_way
    assert [source is locked.data for _, source in under_way] == [True]  # nothing else may get its memory before
    locked.to("cuda", non_blocking=True)
    assert len(get_backend("cuda")._under_way) == 1
    batches = list(DataLoader(TensorDataset(x, t.arange(2)), batch_size=1, pin_memory=True))
    for inputs, labels in batches:
        assert {inputs.data.ctypes.data, labels.data.ctypes.data} <= fake_cupy.page_locked
    kept = t.m02_tensor_appendix.pin_memory({"a": [x], "b": "text"})
    assert kept["a"][0].data.ctypes.data in fake_cupy.page_locked
    assert kept["b"] == "text"


def test_precision_of_products() -> None:
    import tinytorch as t

    get_backend("cuda")
    assert fake_cupy.compute_types == {0: (np.float32, 1)}  # as it is written
    try:
        t.set_float32_matmul_precision("high")
        assert t.get_float32_matmul_precision() == "high"
        get_backend("cuda:1")
        assert fake_cupy.compute_types == {0: (np.float32, 7), 1: (np.float32, 7)}
    finally:
        t.set_float32_matmul_precision("highest")
    assert fake_cupy.compute_types == {0: (np.float32, 1), 1: (np.float32, 1)}
    with pytest.raises(ValueError, match="'highest', 'high' or 'medium', got 'fast'"):
        t.set_float32_matmul_precision("fast")


def test_a_full_device_is_one_clear_error(monkeypatch) -> None:
    import cupy

    import tinytorch as t

    get_backend("cuda")
    allocate = cupy.cuda.get_allocator()
    assert allocate(1000) == 1000
    monkeypatch.setattr(fake_cupy.Pool, "room", 10**6)
    with pytest.raises(t.cuda.OutOfMemoryError, match=r"cuda:0 has no 5.0 MB .* of its 8,000 MB .* drivers? 5,000"):
        allocate(5 * 10**6)
    assert issubclass(t.cuda.OutOfMemoryError, RuntimeError)  # as PyTorch's is


def test_bfloat16_where_there_is_a_type_for_it(monkeypatch) -> None:
    library = types.ModuleType("ml_dtypes")
    library.bfloat16 = np.float16  # what stands in for it
    monkeypatch.setitem(sys.modules, "ml_dtypes", library)
    with fake_cupy.installed():
        assert get_backend("cuda").dtype("bfloat16") == np.float16


# -- what is said where something is missing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "words"),
    [
        ("cuda:2", 2, r"there is no device 'cuda:2': this machine has 2 CUDA device\(s\)"),
        ("cuda", 0, r"this machine has 0 CUDA device\(s\)"),
        ("cuda", RuntimeError("cudaErrorNoDevice"), "CUDA driver is not usable.*cudaErrorNoDevice.*NVIDIA driver"),
        ("cuda:x", 1, "'cuda:x': a CUDA device is 'cuda' or 'cuda:N'"),
        ("cuda:-1", 1, "a CUDA device is 'cuda' or 'cuda:N'"),
    ],
)
def test_a_device_that_is_not_there(name: str, count: int, words: str) -> None:
    with fake_cupy.installed(count), pytest.raises(RuntimeError, match=words):
        get_backend(name)


@pytest.mark.parametrize("error", [ImportError("No module named 'cupy'"), OSError("libcudart.so.12: cannot open")])
def test_no_cupy_or_a_broken_one(monkeypatch, error: Exception) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name.partition(".")[0] == "cupy":
                raise error

    for name in ("cupy", "cupy.cuda", "array_api_compat.cupy", "tinytorch.backends.cupy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(backends, "cupy", raising=False)
    import array_api_compat

    monkeypatch.delattr(array_api_compat, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(
        RuntimeError, match=rf"device 'cuda' needs CuPy.*{type(error).__name__}.*tinytorch-systems\[cuda12\]"
    ):
        get_backend("cuda")
