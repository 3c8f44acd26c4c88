"""Every check of the project, each in an environment of its own: `nox -l` lists them, `nox -s tests-cpu` runs one."""

from __future__ import annotations

import ctypes
import shutil
import sys
from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests-cpu", "tests-gpu", "lint"]

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")


def install(session: nox.Session, *groups: str, extra: str = "", editable: bool = True) -> None:
    """Install the project and the named dependency groups with pip."""
    requirements = nox.project.dependency_groups(PROJECT, *groups) if groups else ()
    if not editable:
        shutil.rmtree(ROOT / "build", ignore_errors=True)  # a file deleted since the last build would live on in it
    target = f".[{extra}]" if extra else "."
    session.install(*(["-e"] if editable else []), target, *requirements)
    # OpenBLAS reads these two once, when it is loaded, and either can halve its speed.
    session.env.update({"OPENBLAS_CORETYPE": None, "OPENBLAS_L2_SIZE": None})


def pytest(session: nox.Session, *arguments: str, devices: str) -> None:
    session.run("python", "-m", "pytest", *arguments, *session.posargs, env={"TINYTORCH_TEST_DEVICES": devices})


def cuda_version() -> tuple[int, str]:
    """The newest CUDA version that the driver can run: (12, "") for example; (0, why) where there is no device."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return 0, f"no NVIDIA driver is installed ({library} was not found)"
    if not hasattr(driver, "cuInit"):
        return 0, f"{library} is not NVIDIA's: it has no cuInit; reinstall the driver"
    if (status := driver.cuInit(0)) != 0:
        return 0, f"the NVIDIA driver finds no device it can use (cuInit returned {status})"
    count, version = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    driver.cuDriverGetVersion(ctypes.byref(version))
    if count.value == 0:
        return 0, "the NVIDIA driver finds no device"
    return version.value // 1000, ""


@nox.session(name="tests-cpu")
def tests_cpu(session: nox.Session) -> None:
    """All tests on NumPy, and those of operations on array-api-strict too. Needs no PyTorch."""
    install(session, "test")
    pytest(session, "--ignore=tests/reference", "-m", "not gpu", devices="cpu,array_api_strict")


@nox.session(name="tests-gpu")
def tests_gpu(session: nox.Session) -> None:
    """The tests of operations and of CUDA itself on CuPy, where there is a CUDA device."""
    version, reason = cuda_version()
    if version == 0:
        session.skip(f"{reason}; the GPU tests run on a machine with one")
    if version < 12:
        session.skip(f"the driver runs CUDA up to {version}, and CuPy needs 12; update the NVIDIA driver")
    install(session, "test", extra="cuda12" if version == 12 else "cuda13")
    pytest(session, "--ignore=tests/reference", "-m", "device or gpu", devices="cuda")


@nox.session(name="tests-sim")
def tests_sim(session: nox.Session) -> None:
    """The CUDA kernels in Numba's simulator, where a thread of Python runs for each of the device's."""
    install(session, "test")
    session.run("python", "-m", "pytest", "tests/kernels", *session.posargs,
                env={"NUMBA_ENABLE_CUDASIM": "1", "TINYTORCH_TEST_KERNELS": "cuda"})  # fmt: skip


@nox.session(name="tests-ptx")
def tests_ptx(session: nox.Session) -> None:
    """The CUDA kernels through NVIDIA's compiler, which takes no GPU: registers, spills, float64 by mistake."""
    install(session, "test", "ptx")
    session.run("python", "-m", "pytest", "tests/kernels", "-k", "compiled_for_devices", *session.posargs)


@nox.session(name="tests-torch")
def tests_torch(session: nox.Session) -> None:
    """The tests of operations with PyTorch's tensors as the array library."""
    install(session, "test", "reference")
    pytest(session, "--ignore=tests/reference", "-m", "device and not gpu", devices="torch")


@nox.session(name="tests-kernels")
def tests_kernels(session: nox.Session) -> None:
    """The kernels' tests as other CPUs compile them, on one thread, and with bounds checked. Takes minutes."""
    install(session, "test")
    for variant in ({"NUMBA_CPU_NAME": "haswell"}, {"NUMBA_CPU_NAME": "generic"}, {"NUMBA_NUM_THREADS": "1"},
                    {"NUMBA_BOUNDSCHECK": "1"}):  # fmt: skip
        session.log(f"kernels with {variant}")
        session.run("python", "-m", "pytest", "-q", "tests/kernels", *session.posargs, env=variant)


@nox.session(name="tests-reference")
def tests_reference(session: nox.Session) -> None:
    """Our values and files against PyTorch's, and those of tokenizers, tiktoken and transformers."""
    install(session, "test", "reference")
    pytest(session, "tests/reference", devices="cpu")


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format, and which module may import which."""
    requirements = nox.project.dependency_groups(PROJECT, "lint")
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    # The wheel, not the checkout: only there do backends/ and kernels/ stand where they are imported from.
    session.install("--no-deps", "--force-reinstall", ".")
    session.install(*requirements)
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    with session.chdir(session.create_tmp()):
        session.run("lint-imports", "--no-cache", "--config", str(ROOT / "pyproject.toml"))


@nox.session
def types(session: nox.Session) -> None:
    """mypy over the package as a user gets it: installed, away from the checkout."""
    install(session, "types", editable=False)
    with session.chdir(session.create_tmp()):
        session.run("mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "tinytorch", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Speed against PyTorch, in separate processes. Figures for one machine, not a test."""
    install(session, "bench")
    session.run("python", "-m", "tinytorch.profiling.bench", *session.posargs)


@nox.session
def compression(session: nox.Session) -> None:
    """What module 18 brings on CIFAR-10: students with and without a teacher, smaller networks. Takes ten minutes."""
    install(session)
    session.run("python", "-m", "tinytorch.profiling.compression", *session.posargs)


@nox.session
def milestones(session: nox.Session) -> None:
    """Every milestone program, on the data that needs no download."""
    install(session)
    names = session.run("python", "-c", "from tinytorch.milestones import MILESTONES as m; print(*[x.name for x in m])",
                        silent=True, log=False)  # fmt: skip
    for name in str(names).split():
        session.run("tinytorch", "milestone", "run", name, *session.posargs)


@nox.session
def learn(session: nox.Session) -> None:
    """Wrong solutions of every exercise, which its tests must see; and learners' modules 1 to k with the others."""
    install(session, "test")
    session.run("python", "tests/learn/measure_wrong.py", *session.posargs)
    if not session.posargs:
        session.run("python", "tests/learn/every_k.py")


@nox.session
def notebook(session: nox.Session) -> None:
    """Make milestones/colab.ipynb of milestones/colab.py."""
    install(session, "test")
    session.run("python", "-m", "tests.milestones.notebook")


@nox.session
def mutation(session: nox.Session) -> None:
    """Plants faults in the modules one at a time and expects a red test for each."""
    install(session, "test")
    session.run("python", "tests/mutation/run.py", *session.posargs)
