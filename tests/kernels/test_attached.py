"""What is attached on CUDA devices: each kernel takes its example, and computes what its operation does; and NVIDIA's
compiler, where it is, makes of each what a GPU runs well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tinytorch as t
from tests.kernels.compiled import ARCHITECTURES, Compiled, needs_compiler
from tests.kernels.place import cuda_only
from tinytorch.backends import get_backend
from tinytorch.curriculum import load_modules
from tinytorch.kernels import load
from tinytorch.kernels.cuda.jit import instead_of_launches
from tinytorch.m16_acceleration import KERNELS, Kernel
from tinytorch.m16_acceleration_appendix import example

load_modules()  # those of later modules, too
XP = get_backend("cpu")
ATTACHED = [kernel for kernel in KERNELS if kernel.backend == "cupy"]
each = pytest.mark.parametrize("kernel", ATTACHED, ids=lambda kernel: kernel.place.rpartition(".")[2])


def inputs_of(kernel: Kernel, count: int) -> tuple[tuple, dict[str, Any]]:
    """An example, of a size that the kernel's condition accepts."""
    t.manual_seed(0)
    inputs, attributes = example(kernel, count)
    return inputs, attributes


@cuda_only
@each
@pytest.mark.parametrize("count", [2, 3])  # norms take pictures if it is even, and rows if it is odd
def test_a_kernel_takes_its_example_and_says_what_the_operation_says(kernel: Kernel, count: int) -> None:
    if kernel.op.name in ("sum", "embedding_weight_gradient"):
        count *= 16  # smaller ones go to the operation
    inputs, attributes = inputs_of(kernel, count)
    assert kernel.when(*inputs, **attributes)
    found, expected = load(kernel.place)(XP, *inputs, **attributes), kernel.op.function(XP, *inputs, **attributes)
    if not isinstance(found, tuple):
        found, expected = (found,), (expected,)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(theirs).max()))


@needs_compiler
@each
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_compiled_for_devices(kernel: Kernel, architecture: tuple[int, int]) -> None:
    compiled = Compiled(architecture)
    for count in (2, 3):
        inputs, attributes = inputs_of(kernel, count)
        with instead_of_launches(compiled):
            load(kernel.place)(XP, *inputs, **attributes)
    assert compiled.kernels
    for name, listing in compiled.kernels.items():
        machine = listing.assembled(architecture)
        assert listing.doubles == [], f"{name} computes in float64"
        assert machine.spilled == 0, name
        assert machine.registers <= 255, name
        assert machine.shared <= 48 << 10, name


def test_every_operation_has_its_kernel_under_the_cpu_ones_name() -> None:
    """Where both have one, the same function of the file of the same name."""
    places = {kernel.place.removeprefix("tinytorch.kernels.cpu.") for kernel in KERNELS if kernel.backend == "numpy"}
    assert ATTACHED
    assert {kernel.place.removeprefix("tinytorch.kernels.cuda.") for kernel in ATTACHED} <= places
