"""Appendix to module 01: the doctor's checks of BLAS, the processor, Numba, CuPy, the GPUs and matplotlib; figures;
downloads.

Each check imports what it examines only when it runs, and expects that to fail in any way. Figures are drawn with
matplotlib, which is imported with the first one, and so are pooch and rich with the first download.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import numpy as np

from tinytorch.m01_setup import Finding, atomic_write, check, first_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# -- BLAS and the processor ------------------------------------------------------------------------------------------

SLOW_OVERRIDES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
THREAD_LIMITS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@check
def check_numpy() -> Finding:
    build = np.show_config(mode="dicts")
    blas = build.get("Build Dependencies", {}).get("blas", {})
    detail = f"{np.__version__} with {blas.get('name', 'unknown BLAS')} {blas.get('version', '')}".rstrip()
    if library := openblas():
        detail += f", core type {library['core type']}, {library['threads']} threads"
    limits = [f"{name}={os.environ[name]}" for name in THREAD_LIMITS if name in os.environ]
    if limits:
        detail += f" ({', '.join(limits)})"
    overrides = [name for name in SLOW_OVERRIDES if name in os.environ]
    if overrides:
        detail += "; " + ", ".join(f"{name}={os.environ[name]}" for name in overrides) + " can halve its speed"
        return Finding("NumPy", "warning", detail, f"unset {' '.join(overrides)} before starting Python")
    return Finding("NumPy", "ok", detail)


def openblas() -> dict[str, Any] | None:
    """Core type and number of threads of the OpenBLAS that NumPy loaded; None where NumPy uses another BLAS."""
    for path in openblas_files():
        with suppress(OSError):
            library = ctypes.CDLL(str(path))  # loaded already: this only finds it again
            for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
                with suppress(AttributeError):
                    core = library[f"{prefix}openblas_get_corename{suffix}"]
                    threads = library[f"{prefix}openblas_get_num_threads{suffix}"]
                    core.restype = ctypes.c_char_p
                    return {"core type": core().decode(), "threads": threads()}
    return None


def openblas_files() -> list[Path]:
    """The OpenBLAS libraries in this process (Linux), or in NumPy's wheel (elsewhere)."""
    with suppress(OSError), open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "openblas" in line.lower()}
        return sorted(map(Path, paths), key=lambda path: "numpy" not in str(path))  # SciPy brings one of its own
    package = Path(np.__file__).parent
    return [
        path for folder in (package.parent / "numpy.libs", package / ".dylibs") for path in folder.glob("*openblas*")
    ]


@check
def check_processor() -> Finding:
    count = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    detail = f"{usable} of {count} cores usable"
    with suppress(Exception):  # llvmlite comes with Numba, and Numba has a check of its own
        from llvmlite import binding

        features = binding.get_host_cpu_features()
        known = ("sse4.2", "avx2", "fma", "avx512f", "avx512vnni", "avxvnni", "amx-int8", "neon", "dotprod", "sve")
        detail += f", {binding.get_host_cpu_name()}: {' '.join(name for name in known if features.get(name))}"
    return Finding("processor", "ok", detail)


# -- packages --------------------------------------------------------------------------------------------------------


def load(name: str, title: str, fix: str) -> ModuleType | Finding:
    """An optional package, or the finding that it is absent or broken. Broken packages raise errors of every kind."""
    if importlib.util.find_spec(name) is None:
        return Finding(title, "absent", "not installed", fix)
    try:
        return importlib.import_module(name)
    except Exception as error:
        return Finding(title, "error", f"installed but broken: {type(error).__name__}: {first_line(error)}", fix)


@check
def check_numba() -> Finding:
    numba = load("numba", "Numba", "pip install --upgrade numba")
    if isinstance(numba, Finding):
        return numba
    pools = {"tbb": "tbbpool", "omp": "omppool", "workqueue": "workqueue"}
    for layer in numba.config.THREADING_LAYER_PRIORITY:
        with suppress(ImportError):
            importlib.import_module(f"numba.np.ufunc.{pools[layer]}")
            detail = f"{numba.__version__}, threading layer {layer}, {numba.config.NUMBA_NUM_THREADS} threads"
            return Finding("Numba", "ok", detail)
    return Finding(
        "Numba", "warning", f"{numba.__version__} has no threading layer", "pip install --force-reinstall numba"
    )


@check
def check_matplotlib() -> Finding:
    matplotlib = load("matplotlib", "matplotlib", "pip install --upgrade matplotlib")
    return matplotlib if isinstance(matplotlib, Finding) else Finding("matplotlib", "ok", matplotlib.__version__)


# -- CUDA ------------------------------------------------------------------------------------------------------------


@contextmanager
def nvml() -> Iterator[Any]:
    """NVIDIA's management library, initialised."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


@cache
def driver_cuda() -> int:
    """The newest CUDA version that the NVIDIA driver can run, as CUDA writes it (12040 is 12.4); 0 without a driver."""
    with suppress(Exception), nvml() as library:
        return int(library.nvmlSystemGetCudaDriverVersion_v2())
    return 0


def cuda_name(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def cupy_command() -> str:
    """What installs the CuPy that fits the driver."""
    return f'pip install "tinytorch-systems[cuda{12 if 0 < driver_cuda() < 13000 else 13}]"'


@check
def check_gpus() -> list[Finding]:
    pynvml = load("pynvml", "GPU", "pip install nvidia-ml-py")
    if isinstance(pynvml, Finding):
        return [pynvml]
    try:
        with nvml() as library:
            return [driver_finding(library), *(gpu_finding(library, i) for i in range(library.nvmlDeviceGetCount()))]
    except Exception as error:
        if type(error).__name__ == "NVMLError_LibraryNotFound":
            fix = "only needed for CUDA: install the NVIDIA driver from nvidia.com/drivers"
            return [Finding("NVIDIA driver", "absent", "not installed", fix)]
        fix = "run nvidia-smi; after an update of the driver, restart the machine"
        return [Finding("NVIDIA driver", "error", f"does not answer: {first_line(error)}", fix)]


def driver_finding(library: Any) -> Finding:
    version, cuda = library.nvmlSystemGetDriverVersion(), library.nvmlSystemGetCudaDriverVersion_v2()
    detail = f"{_text(version)}, runs CUDA up to {cuda_name(cuda)}"
    if library.nvmlDeviceGetCount() == 0:
        return Finding(
            "NVIDIA driver", "warning", f"{detail}, but sees no GPU", "check CUDA_VISIBLE_DEVICES and nvidia-smi"
        )
    if cuda < 12000:
        return Finding(
            "NVIDIA driver", "error", f"{detail}; CuPy needs 12", "update the driver from nvidia.com/drivers"
        )
    return Finding("NVIDIA driver", "ok", detail)


def gpu_finding(library: Any, index: int) -> Finding:
    """One GPU: its name, compute capability and memory."""
    handle = library.nvmlDeviceGetHandleByIndex(index)
    major, minor = library.nvmlDeviceGetCudaComputeCapability(handle)
    detail = f"{_text(library.nvmlDeviceGetName(handle))}, compute capability {major}.{minor}"
    try:
        memory = library.nvmlDeviceGetMemoryInfo(handle)
    except library.NVMLError:  # GPUs that share the machine's memory do not tell
        return Finding(f"GPU {index}", "ok", detail)
    detail += f", {memory.total / 2**30:.1f} GiB, {memory.free / 2**30:.1f} GiB free"
    busy = 0
    with suppress(library.NVMLError):  # some virtual GPUs do not tell
        busy = library.nvmlDeviceGetUtilizationRates(handle).gpu
        detail += f", busy {busy} % of the time" if busy else ""
    if memory.free < memory.total / 10 or busy > 50:
        fix = f"end the programs that nvidia-smi lists, or take another GPU (device='cuda:{index + 1}')"
        return Finding(f"GPU {index}", "warning", detail, fix)
    return Finding(f"GPU {index}", "ok", detail)


@check
def check_cupy() -> Finding:
    installed = cupy_distributions()
    if len(installed) > 1:
        fix = f"pip uninstall {' '.join(installed)}, then {cupy_command()}"
        return Finding("CuPy", "error", f"{' and '.join(installed)} overwrite each other", fix)
    cupy = load("cupy", "CuPy", cupy_command())
    if isinstance(cupy, Finding):
        if cupy.status == "absent" and driver_cuda():
            return Finding("CuPy", "warning", "not installed, so the GPU is not used", cupy.fix)
        return (
            cupy
            if cupy.status == "error"
            else Finding("CuPy", "absent", f"{cupy.detail}; only needed for CUDA", cupy.fix)
        )
    return cupy_finding(cupy, driver_cuda())


def cupy_finding(cupy: Any, driver: int) -> Finding:
    """Whether an installed CuPy and the driver fit: a CuPy for a newer CUDA than the driver's does not run."""
    try:
        runtime = cupy.cuda.runtime.runtimeGetVersion()
    except Exception as error:
        detail = f"{cupy.__version__}, but its CUDA runtime cannot be loaded: {first_line(error)}"
        return Finding("CuPy", "error", detail, cupy_command())
    detail = f"{cupy.__version__} for CUDA {cuda_name(runtime)}"
    if not driver:
        fix = "only needed for CUDA: install the NVIDIA driver from nvidia.com/drivers"
        return Finding("CuPy", "warning", f"{detail}, but there is no NVIDIA driver", fix)
    if runtime // 1000 > driver // 1000:
        detail += f", but the driver runs CUDA up to {cuda_name(driver)}"
        return Finding("CuPy", "error", detail, f"update the NVIDIA driver, or pip uninstall CuPy and {cupy_command()}")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        cupy.arange(4).sum().item()
    except Exception as error:
        detail += f", but a first sum on the GPU fails: {first_line(error)}"
        return Finding(
            "CuPy", "error", detail, f"check CUDA_VISIBLE_DEVICES and nvidia-smi; reinstall: {cupy_command()}"
        )
    return Finding("CuPy", "ok", f"{detail}, {count} device{'s' if count > 1 else ''}")


@check
def check_kernels() -> list[Finding]:
    """Whether Numba can compile a kernel for the device and run it there, where there is one."""
    if not driver_cuda() or not isinstance(load("cupy", "CuPy", ""), ModuleType):
        return []
    try:
        from tinytorch.kernels.cuda.jit import check

        return [Finding("Numba for CUDA", "ok", check())]
    except Exception as error:
        return [Finding("Numba for CUDA", "error", f"a first kernel fails: {first_line(error)}", cupy_command())]


def cupy_distributions() -> list[str]:
    """The installed distributions that contain CuPy: cupy, cupy-cuda12x, cupy-cuda13x … More than one is a conflict."""
    names = {str(found.metadata["Name"]).lower() for found in importlib.metadata.distributions()}
    return sorted(name for name in names if re.fullmatch(r"cupy(-cuda\w+|-rocm\S+)?", name))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # bytes in older versions of pynvml


# -- figures -----------------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#5F5F5F"  # of Okabe and Ito's colours, which colour-blind people tell apart


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """A figure of this size in inches. It belongs to nobody else: no global state of matplotlib is touched."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure((width, height), dpi=120, layout=layout, facecolor="white")
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def dress_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels, a light grid, and no frame where nothing is measured."""
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: str | os.PathLike) -> Path:
    """Write a figure, whole or not at all, in the format that the name asks for, by default PNG."""
    path, buffer = Path(path), io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:] or "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())
    return path


# -- downloads ---------------------------------------------------------------------------------------------------------

TIMEOUT = 20  # seconds without a byte until a mirror is given up
ROUNDS = 20  # how often the mirrors are asked for the rest of a file, as long as some of it arrives


def download(
    file: str, mirrors: Sequence[str], size: int, checksum: str, folder: str | os.PathLike, advice: str = ""
) -> Path:
    """Download a file from whichever mirror has it; returns where it lies. One that lies there already is kept.

    A download that was cut is continued, by this call or a later one: what has arrived waits in `file`.part. Only a
    file whose checksum is right gets its name.

    Args:
        file: its name, on the mirrors and in the folder.
        mirrors: what stands before the name in its URLs; they are tried in this order. Without any, nothing is
            downloaded.
        size: bytes that it has.
        checksum: of all of it: "md5:…" or "sha256:…", in hexadecimal digits.
        folder: where it is put; made if need be.
        advice: what to do instead, for the error.

    Raises:
        FileNotFoundError: no mirror gave the whole file; the message names each with its reason.
    """
    import pooch

    folder, problems, (algorithm, _, digest) = Path(folder), {}, checksum.partition(":")
    path, part = folder / file, folder / f"{file}.part"

    def done() -> bool:
        """Whether the file is there, whoever has fetched it."""
        return path.is_file() and pooch.file_hash(path, algorithm) == digest

    if done():
        return path
    pooch.get_logger().setLevel("WARNING")  # the progress bar has said it already
    for _ in range(ROUNDS):
        before = _size(part)
        for mirror in mirrors:
            try:
                _continue(mirror + file, part, size)
                pooch.retrieve(mirror + file, checksum, file, folder, downloader=partial(_copy, part))
            except ValueError:  # pooch says so of a wrong checksum: what we have is not the start of the file
                part.unlink(missing_ok=True)
                problems[mirror] = "the content is not the official one"
            except (OSError, HTTPException) as error:
                problems[mirror] = str(error) or type(error).__name__
            else:
                with suppress(OSError):  # gone, or another process has it open
                    part.unlink()
                return path
            if done():  # by another process, which has removed the part
                return path
        if _size(part) == before:
            break
    tried = "; ".join(f"{mirror}: {problem}" for mirror, problem in problems.items()) or "downloading is off"
    advice = advice or f"put it into {folder}"
    raise FileNotFoundError(f"{file} is missing and was not downloaded ({tried}); {advice}")


def _continue(url: str, part: Path, size: int) -> None:
    """Fetch what `part` lacks of `size` bytes. Whatever breaks, it keeps what has arrived."""
    have = _size(part)
    if have < size:
        part.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(Request(url, headers={"Range": f"bytes={have}-"}), timeout=TIMEOUT) as response:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                have = 0  # this server sends everything again
            offered = have + int(response.headers.get("Content-Length", size - have))
            if offered != size:
                raise OSError(f"offers {offered:,} bytes, the file has {size:,}")
            _receive(response, part, have, size)
    if (have := _size(part)) < size:
        raise ConnectionError(f"the connection ended after {have:,} of {size:,} bytes")


def _copy(part: Path, _url: str, output_file: str, _pooch: Any) -> None:
    """What pooch takes for a downloader; it checks the copy, which no other process writes to, and then renames it."""
    shutil.copyfile(part, output_file)


def _receive(response: Any, part: Path, have: int, size: int) -> None:
    """Write a response to `part` behind the `have` bytes that stay in it, and show how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(part.stem), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    part.touch()
    with open(part, "r+b") as file, Progress(*columns, console=Console(stderr=True)) as progress:
        file.seek(have)  # and not to the end: of two processes that fetch the file, both write the same bytes there
        task = progress.add_task("", total=size, completed=have)
        while have <= size and (chunk := response.read(1 << 16)):
            file.write(chunk)
            have += len(chunk)
            progress.update(task, completed=have)


def _size(path: Path) -> int:
    """Bytes in a file; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0
