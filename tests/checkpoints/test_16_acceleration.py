"""After module 16: make an operation as fast as the machine allows, and say what the limit is."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from tinytorch.kernels import compiled, prange
from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Op, mul, op, randn
from tinytorch.m06_autograd import gradient
from tinytorch.m16_acceleration import (
    KERNELS,
    attach,
    best,
    by_arrays,
    measure_machine,
    multiply,
    on_one_core,
    reference_kernels,
)


def bend(xp: Any, x: Any) -> Any:
    """x - x³ / 3, in four passes."""
    return x - x * x * x / 3


@compiled
def bend_a_part(x, out):
    third = x.dtype.type(1 / 3)
    for i in range(len(x)):
        out[i] = x[i] - x[i] * x[i] * x[i] * third


@compiled(parallel=True)
def bend_parts(x, out, parts):
    for part in prange(parts):
        first, last = len(x) * part // parts, len(x) * (part + 1) // parts
        bend_a_part(x[first:last], out[first:last])


CALLS = []


def bend_kernel(xp: Any, x: Any) -> Any:
    """The same in one pass, on every core."""
    out = np.empty_like(x)
    bend_parts(x.reshape(-1), out.reshape(-1), 4)
    CALLS.append(x.shape)
    return out


def is_for_the_kernel(x: Any) -> bool:
    return x.dtype == np.float32 and x.size >= 100 and x.flags.carray


@pytest.fixture
def operation() -> Iterator[Op]:
    """An operation with a gradient, and a kernel for large arrays of float32 that lie row by row."""
    here = types.ModuleType("checkpoint_16")
    here.kernel = bend_kernel  # type: ignore[attr-defined]
    CALLS.clear()
    with patch.dict(Op.registry), patch.dict(sys.modules, checkpoint_16=here):
        made = op(bend)
        gradient(made, x=lambda g, x: mul(g, 1 - x * x))
        kernel = attach(
            made, "numpy", "checkpoint_16:kernel", is_for_the_kernel, "float32, row by row, from 100 numbers"
        )
        yield made
        KERNELS.remove(kernel)


def test_nobody_notices_a_kernel_but_the_clock(operation: Op) -> None:
    manual_seed(0)
    for shape, called in (((20, 30), [(20, 30)]), ((3, 4), [])):
        CALLS.clear()
        x = randn(*shape, requires_grad=True)
        out = operation(x)
        assert called == CALLS
        out.sum().backward()
        numbers = x.detach().numpy().astype("float64")
        assert_close(out.detach(), numbers - numbers**3 / 3)
        assert_close(x.grad, 1 - numbers**2)
    CALLS.clear()
    assert operation(randn(200).to("float64")).dtype == "float64"
    operation(randn(20, 40)[:, ::2])
    with reference_kernels():
        operation(randn(200))
    assert CALLS == []


def test_one_pass_is_faster_than_four(operation: Op) -> None:
    x = randn(1 << 22)
    fused = best(operation, x)
    with reference_kernels():
        assert fused < best(operation, x)


def test_a_ladder_leads_to_the_roof() -> None:
    a, b = randn(192, 192).data, randn(192, 192).data
    assert_close(multiply(on_one_core, a, b), a.astype("float64") @ b, rtol=1e-4, atol=1e-4)
    operations, machine = 2 * 192**3, measure_machine(1 << 22)
    rate = operations / best(multiply, on_one_core, a, b)
    assert operations / best(multiply, by_arrays, a, b) < rate / 4
    assert 0.1 * machine.peak[0] < rate < 1.5 * machine.peak[0]  # what else runs here has its share
