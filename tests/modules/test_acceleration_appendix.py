"""Module 16's appendix: every attached kernel beside its operation, what is fused, and the optimizers' kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import tinytorch as t
from tinytorch import m16_acceleration_appendix as m
from tinytorch import nn, optim
from tinytorch.backends import get_backend
from tinytorch.m02_tensor import observe
from tinytorch.m16_acceleration import Kernel

OWN = [kernel for kernel in m.KERNELS if kernel.example is None and kernel.backend == "numpy"]  # others have theirs
by_place = pytest.mark.parametrize("kernel", OWN, ids=lambda kernel: kernel.place.rpartition(".")[2])


def close(found: Any, expected: Any) -> None:
    assert found.shape == expected.shape
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected).max()))


SMALL = ("relu", "exp", "tanh", "erf", "sigmoid", "silu", "drop", "sum", "embedding_weight_gradient")


@by_place
@pytest.mark.parametrize("count", [1, 64])
def test_a_kernel_takes_its_example_and_says_what_the_operation_says(kernel: Kernel, count: int) -> None:
    t.manual_seed(0)
    inputs, attributes = m.example(kernel, count)
    if kernel.op.name in SMALL and count == 1:
        assert not kernel.when(*inputs, **attributes)  # too small to be worth it
        return
    assert kernel.when(*inputs, **attributes)
    xp = get_backend("cpu")
    found, expected = m.load(kernel.place)(xp, *inputs, **attributes), kernel.op.function(xp, *inputs, **attributes)
    if not isinstance(found, tuple):
        found, expected = (found,), (expected,)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)


@by_place
def test_other_dtypes_go_to_the_operation(kernel: Kernel) -> None:
    inputs, attributes = m.example(kernel, 64)
    wide = [x.astype(np.float64) if x is not None and x.dtype == np.float32 else x for x in inputs]
    assert not kernel.when(*wide, **attributes)


def names(call: Callable[[], Any]) -> list[str]:
    seen = []
    with observe(lambda op, arrays, attributes, proceed: seen.append(op.name) or proceed()):  # type: ignore[func-returns-value]
        call()
    return seen


LAYERS = {
    "convolution": (lambda: nn.Conv2d(3, 8, 3, padding=1), (2, 3, 16, 16)),
    "linear": (lambda: nn.Linear(64, 96), (3, 40, 64)),
}


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.functional.relu])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_relu_are_one_operation(name: str, activation: Any) -> None:
    t.manual_seed(0)
    layer, shape = LAYERS[name]
    net, x = nn.Sequential(layer(), activation), t.randn(*shape, requires_grad=True)
    assert names(lambda: net(x)) == [f"{name}_relu"]
    g = t.randn(*net(x).shape)
    net(x).backward(g)
    fused = [net(x).detach(), x.grad, *(p.grad for p in net.parameters())]
    x.grad = None
    net.zero_grad()
    with t.reference_kernels():
        assert names(lambda: net(x)) == [name, "relu"]
        net(x).backward(g)
        apart = [net(x).detach(), x.grad, *(p.grad for p in net.parameters())]
    for ours, theirs in zip(fused, apart, strict=True):
        close(ours.data, theirs.data)


@pytest.mark.parametrize("name", LAYERS)
def test_what_somebody_looks_at_is_not_fused(name: str) -> None:
    layer, shape = LAYERS[name]
    net, x = nn.Sequential(layer(), nn.ReLU()), t.randn(*shape)
    handle = net[0].register_forward_hook(lambda module, inputs, out: None)
    assert names(lambda: net(x)) == [name, "relu"]
    handle.remove()
    assert names(lambda: net(x)) == [f"{name}_relu"]


def test_only_a_layer_itself_is_fused() -> None:
    """What is derived from it may do something else."""
    for kind, arguments, shape in ((nn.Conv2d, (3, 8, 3), (1, 3, 8, 8)), (nn.Linear, (4, 5), (2, 4))):
        other = type("Other", (kind,), {"forward": lambda self, x: x})
        net = nn.Sequential(other(*arguments), nn.ReLU())
        assert names(partial(net, t.randn(*shape))) == ["relu"]
    reflecting = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU())
    assert "convolution_relu" not in names(lambda: reflecting(t.randn(1, 3, 8, 8)))


OPTIMIZERS = [
    lambda p: optim.SGD(p, lr=0.1),
    lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    lambda p: optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    lambda p: optim.AdamW(p, lr=0.01),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_optimizers_step_by_kernels_as_without(make: Callable[[Any], Any]) -> None:
    def trained() -> list[Any]:
        t.manual_seed(0)
        parameters = [t.randn(*shape, requires_grad=True) for shape in ((33,), (4, 5), ())]
        parameters.append(t.randn(3, dtype="float64", requires_grad=True))  # no kernel's
        optimizer = make(parameters)
        for _ in range(5):
            for p in parameters:
                p.grad = t.randn(*p.shape, dtype=p.dtype)
            optimizer.step()
        return [p.detach().numpy() for p in parameters]

    by_kernels = trained()
    with t.reference_kernels():
        for ours, theirs in zip(by_kernels, trained(), strict=True):
            close(ours, theirs)


def test_what_the_commands_tell() -> None:
    report = m.describe_kernels()
    assert len(report["kernels"]) == len(m.KERNELS)
    assert report["cpu"] in ("avx512", "avx2", "generic")
    assert m.warm_up(m.KERNELS[0])["seconds"] > 0
    assert m.warm_up_optimizers()["kernel"] == "cpu.optimizers"


def test_layers_around_an_identity_are_fused_unless_somebody_looks_at_it() -> None:
    net, x, seen = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Identity(), nn.ReLU()), t.randn(4, 2, 8, 8), []

    def names() -> list[str]:
        done: list[str] = []
        with observe(lambda op, arrays, attributes, proceed: (done.append(op.name), proceed())[1]):
            net(x)
        return done

    assert names() == ["convolution_relu"]
    net[1].register_forward_hook(lambda layer, inputs, out: seen.append(out.shape))
    assert names() == ["convolution", "relu"]
    assert seen == [(4, 3, 6, 6)]
