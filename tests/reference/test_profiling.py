"""Module 15's counts of arithmetic against PyTorch's `FlopCounterMode`, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import tinytorch
from tinytorch.m15_profiling import profiled

torch = pytest.importorskip("torch")
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

PRODUCTS = {"matmul", "linear", "linear_gradients", "convolution", "convolution_input_gradient",
            "convolution_weight_gradient", "convolution_relu"}  # fmt: skip


def matmul(t: Any) -> Callable[[], Any]:
    a, b = (t.randn(*shape, requires_grad=True) for shape in ((4, 5, 6), (4, 6, 7)))
    return lambda: (a @ b).sum().backward()


def linear(t: Any) -> Callable[[], Any]:
    x, layer = t.randn(8, 20, requires_grad=True), t.nn.Linear(20, 30)
    return lambda: layer(x).sum().backward()


def convolution(t: Any) -> Callable[[], Any]:
    x, layer = t.randn(2, 3, 9, 9, requires_grad=True), t.nn.Conv2d(3, 6, 3, stride=2, padding=1)
    return lambda: layer(x).sum().backward()


def cnn_step(t: Any) -> Callable[[], Any]:
    nn = t.nn
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 64, 10)
    )  # fmt: skip
    x, labels = t.randn(4, 3, 16, 16), t.randint(0, 10, (4,))
    return lambda: nn.functional.cross_entropy(net(x), labels).backward()


@pytest.mark.parametrize("case", [matmul, linear, convolution, cnn_step], ids=lambda case: case.__name__)
def test_products_count_as_in_pytorch(case: Callable[[Any], Callable[[], Any]]) -> None:
    ours = sum(flops or 0 for name, flops in profiled(case(tinytorch)).items() if name in PRODUCTS)
    with FlopCounterMode(display=False) as counter:
        case(torch)()
    assert ours == counter.get_total_flops() > 0


def test_attention_counts_as_in_pytorch() -> None:
    """PyTorch's formula for it keeps the weights; ours makes the scores again in backward."""

    def attend(t: Any) -> Any:
        query, key, value = (t.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
        return t.nn.functional.scaled_dot_product_attention(query, key, value)

    ours = profiled(lambda: attend(tinytorch).sum().backward())
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            out = attend(torch)
        assert ours["attention"] == counter.get_total_flops() == 2 * 2 * 3 * 5 * 7 * (8 + 8)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert ours["attention_gradients"] == counter.get_total_flops() + 2 * 2 * 3 * 5 * 7 * 8
