"""Networks of int8 are faster than our own of float32, where the CPU has the instruction for it."""

from __future__ import annotations

import time

import pytest

import tinytorch as t
from tinytorch import nn
from tinytorch.kernels.cpu.quantized import VNNI
from tinytorch.quantization import convert, prepare, quantize_dynamic


@t.no_grad()
def fastest(models: list, x: t.Tensor, turns: int = 30) -> list[float]:
    """The shortest seconds of each model's calls, made in turns."""
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(turns):
        for model, times in zip(models, taken, strict=True):
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
    return [min(times) for times in taken]


@pytest.mark.slow
@pytest.mark.skipif(not VNNI, reason="the CPU has no instruction for products of bytes")
def test_linear_layers_of_int8_are_faster_than_those_of_float32() -> None:
    t.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)).eval()
    x = t.randn(64, 784)
    ready = prepare(net)
    ready(x)
    exact, static, dynamic = fastest([net, convert(ready), quantize_dynamic(net)], x)
    assert exact / static > 1.5
    assert exact / dynamic > 1.5
