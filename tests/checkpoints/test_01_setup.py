"""After module 01: check a machine, compare numbers, repeat an experiment, save its result, and run a chapter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from tinytorch import m01_setup, m01_setup_appendix
from tinytorch.backends import get_backend
from tinytorch.m01_setup import (
    Finding,
    assert_close,
    atomic_write,
    get_rng_state,
    manual_seed,
    run_module,
    set_rng_state,
)


def experiment(steps: int) -> list[float]:
    return [float(get_backend("cpu").normal((100,)).mean()) for _ in range(steps)]


def test_an_experiment_that_is_interrupted_goes_on_where_it_stopped(tmp_path) -> None:
    manual_seed(11)
    whole = experiment(6)
    manual_seed(11)
    first = experiment(3)
    state = json.dumps(get_rng_state()).encode()
    atomic_write(tmp_path / "state.json", state)
    experiment(5)
    set_rng_state(json.loads((tmp_path / "state.json").read_bytes()))
    assert_close(first + experiment(3), whole, rtol=0, atol=0)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.slow
def test_a_file_is_never_half_written_however_the_writer_dies(tmp_path) -> None:
    path = tmp_path / "weights"
    atomic_write(path, b"0" * 2_000_000)
    code = (
        "import sys; from tinytorch.m01_setup import atomic_write\n"
        "write = lambda file: [file.write(bytes([digit]) * 1000) for _ in range(2000)]\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for digit in b'123': atomic_write(sys.argv[1], write)"
    )
    generator = np.random.default_rng(3)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        killer = threading.Timer(generator.uniform(0.0, 0.05), process.send_signal, [signal.SIGKILL])
        killer.start()
        process.wait()
        process.stdout.close()
        content = path.read_bytes()
        assert len(content) == 2_000_000
        assert len(set(content)) == 1


def test_a_stale_temporary_file_is_cleared_away(tmp_path) -> None:
    stale, fresh = tmp_path / ".weights[1].1-2.tmp", tmp_path / ".weights[1].3-4.tmp"
    stale.touch()
    fresh.touch()
    os.utime(stale, (0, 0))
    atomic_write(tmp_path / "weights[1]", b"new")
    assert sorted(os.listdir(tmp_path)) == [".weights[1].3-4.tmp", "weights[1]"]


@pytest.mark.parametrize("seed", range(5))
def test_assert_close_agrees_with_numpy(seed: int) -> None:
    generator = np.random.default_rng(seed)
    expected = generator.normal(size=(4, 5)) * 10.0 ** generator.integers(-8, 8, (4, 5))
    for scale in (1e-8, 1e-6, 1e-5, 1e-4):
        actual = expected * (1 + scale * generator.uniform(-2, 2, (4, 5)))
        wrong = np.abs(actual - expected) > 1e-6 + 1e-5 * np.abs(expected)
        if not wrong.any():
            assert_close(actual, expected)
            continue
        with pytest.raises(AssertionError, match=f"^{wrong.sum()} of 20 elements differ"):
            assert_close(actual, expected)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("other", [0.0, 1.0, np.inf, -np.inf, np.nan])
def test_assert_close_knows_what_is_not_finite(value: float, other: float) -> None:
    if value == other or (np.isnan(value) and np.isnan(other)):
        assert_close([1.0, value], [1.0, other])
    else:
        with pytest.raises(AssertionError, match=r"worst at \(1,\)"):
            assert_close([1.0, value], [1.0, other])


def test_assert_close_takes_arrays_of_any_library_and_tensors() -> None:
    array = get_backend("array_api_strict").from_numpy(np.array([1.5, 2.5]))
    for value in (array, types.SimpleNamespace(data=array)):  # a tensor holds its array as `data`
        assert_close(value, [1.5, 2.5])
        with pytest.raises(AssertionError, match=r"worst at \(1,\): actual 2.5, expected 2.6"):
            assert_close(value, [1.5, 2.6])


def test_assert_close_takes_large_integers() -> None:
    assert_close([2**62 + 1], [2**62 + 1], rtol=0, atol=0)


def test_the_runner_enters_the_module_under_its_real_name(monkeypatch, capsys) -> None:
    main, name = types.ModuleType("__main__", "A chapter."), "tinytorch.m99_chapter"
    exec("def test_fails(): raise ValueError('no')\ndef analyze(): print('analyzed')", vars(main))
    main.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(SystemExit) as ended:
        run_module(vars(main))
    assert sys.modules[name] is main
    assert ended.value.code == 1
    output = capsys.readouterr().out
    assert "FAIL  test_fails" in output
    assert "ValueError: no" in output
    assert "analyzed" not in output


def test_the_doctor_counts_only_the_default_device(monkeypatch, capsys) -> None:
    monkeypatch.setattr(m01_setup, "findings", lambda: [Finding("CuPy", "error", "broken", "reinstall")])
    assert m01_setup.doctor() == 0
    monkeypatch.setattr(m01_setup, "findings", lambda: [Finding("default device", "error", "no", "do")])
    assert m01_setup.doctor(as_json=True) == 1
    assert "broken" in capsys.readouterr().out


# -- the checks of the appendix, on machines that are made up ----------------------------------------------------------


class FakeRuntime:
    def __init__(self, version: int, devices: int | Exception = 1) -> None:
        self.version, self.devices = version, devices

    def runtimeGetVersion(self) -> int:
        return self.version

    def getDeviceCount(self) -> int:
        if isinstance(self.devices, Exception):
            raise self.devices
        return self.devices


def fake_cupy(runtime: FakeRuntime) -> types.SimpleNamespace:
    return types.SimpleNamespace(__version__="14.0", cuda=types.SimpleNamespace(runtime=runtime), arange=np.arange)


@pytest.mark.parametrize(
    ("runtime", "driver", "status", "detail"),
    [
        (FakeRuntime(12080), 12080, "ok", "14.0 for CUDA 12.8, 1 device"),
        (FakeRuntime(12080, 2), 13000, "ok", "2 devices"),
        (FakeRuntime(13000), 12080, "error", "for CUDA 13.0, but the driver runs CUDA up to 12.8"),
        (FakeRuntime(12080), 0, "warning", "no NVIDIA driver"),
        (FakeRuntime(12080, RuntimeError("no device")), 12080, "error", "a first sum on the GPU fails: no device"),
    ],
)
def test_cupy_and_driver_must_fit(runtime: FakeRuntime, driver: int, status: str, detail: str) -> None:
    found = m01_setup_appendix.cupy_finding(fake_cupy(runtime), driver)
    assert found.status == status
    assert detail in found.detail
    assert bool(found.fix) == (status != "ok")


def test_two_cupys_are_a_conflict(monkeypatch) -> None:
    monkeypatch.setattr(m01_setup_appendix, "cupy_distributions", lambda: ["cupy-cuda12x", "cupy-cuda13x"])
    found = m01_setup_appendix.check_cupy()
    assert found.status == "error"
    assert "pip uninstall cupy-cuda12x cupy-cuda13x" in found.fix


class FakeNvml(types.ModuleType):
    """A management library of a machine with two GPUs, one of them full."""

    NVMLError = RuntimeError

    def __init__(self, cuda: int = 12080, count: int = 2) -> None:
        super().__init__("pynvml")
        self.cuda, self.count = cuda, count
        self.nvmlInit = self.nvmlShutdown = lambda: None
        self.nvmlSystemGetDriverVersion = lambda: b"570.1"
        self.nvmlSystemGetCudaDriverVersion_v2 = lambda: self.cuda
        self.nvmlDeviceGetCount = lambda: self.count
        self.nvmlDeviceGetHandleByIndex = lambda index: index
        self.nvmlDeviceGetCudaComputeCapability = lambda handle: (9, 0)
        self.nvmlDeviceGetName = lambda handle: "H200"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(gpu=self.busy[handle])

    busy = (0, 3)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(total=100 * 2**30, free=(90, 1)[handle] * 2**30)


def gpu_findings(monkeypatch, library: types.ModuleType) -> dict[str, Finding]:
    monkeypatch.setitem(sys.modules, "pynvml", library)
    library.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    return {found.name: found for found in m01_setup_appendix.check_gpus()}


def test_each_gpu_is_reported_with_its_memory(monkeypatch) -> None:
    found = gpu_findings(monkeypatch, FakeNvml())
    assert found["NVIDIA driver"] == Finding("NVIDIA driver", "ok", "570.1, runs CUDA up to 12.8")
    assert found["GPU 0"].status == "ok"
    assert found["GPU 0"].detail == "H200, compute capability 9.0, 100.0 GiB, 90.0 GiB free"
    assert found["GPU 1"].status == "warning"
    assert found["GPU 1"].detail.endswith("1.0 GiB free, busy 3 % of the time")
    library = FakeNvml()
    library.busy = (97, 0)
    assert gpu_findings(monkeypatch, library)["GPU 0"].status == "warning"


def test_kernels_are_looked_at_where_there_is_a_device(monkeypatch) -> None:
    assert m01_setup_appendix.check_kernels() == []
    from tinytorch.kernels.cuda import jit

    monkeypatch.setattr(m01_setup_appendix, "driver_cuda", lambda: 12080)
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    sys.modules["cupy"].__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setattr(jit, "check", lambda: "numba-cuda 1.0")
    assert m01_setup_appendix.check_kernels() == [Finding("Numba for CUDA", "ok", "numba-cuda 1.0")]

    def fail() -> str:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(jit, "check", fail)
    (found,) = m01_setup_appendix.check_kernels()
    assert (found.status, found.detail) == ("error", "a first kernel fails: no compiler")
    assert "cuda12" in found.fix


@pytest.mark.parametrize(("cuda", "count", "status"), [(11080, 1, "error"), (12080, 0, "warning")])
def test_a_driver_that_will_not_do_has_a_fix(monkeypatch, cuda: int, count: int, status: str) -> None:
    found = gpu_findings(monkeypatch, FakeNvml(cuda, count))["NVIDIA driver"]
    assert found.status == status
    assert found.fix


def test_the_blas_in_use_is_named() -> None:
    library = m01_setup_appendix.openblas()
    if library is None:
        pytest.skip("NumPy uses another BLAS here")
    assert library["threads"] >= 1
    assert library["core type"].isalnum()
