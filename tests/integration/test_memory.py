"""Training holds no memory that it does not need: no cycles, no graph that outlives its step."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator

import pytest

import tinytorch
from tinytorch import nn, optim
from tinytorch.backends import get_backend
from tinytorch.m08_training import Callback, Trainer, accuracy


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed in the test is freed by reference counts alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Watch(Callback):
    """Notes after certain steps: objects in cycles, objects in all, traced and resident bytes.

    The collection is how cycles are counted; it also empties the interpreter's own store of freed tuples, which is no
    leak, but would count as one.
    """

    def __init__(self, *steps: int) -> None:
        self.steps, self.seen = steps, {}

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step in self.steps:
            cyclic, resident = gc.collect(), get_backend("cpu").memory().used
            self.seen[trainer.step] = (cyclic, len(gc.get_objects()), tracemalloc.get_traced_memory()[0], resident)


SETTLED = 400  # steps after which the libraries' stores of freed blocks, which count as held, are full


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_thousand_steps_hold_no_more_than_ten(no_collector: None, accumulate: int) -> None:
    tinytorch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
    optimizer, watch = optim.Adam(model.parameters()), Watch(10, SETTLED, SETTLED + 990)
    trainer = Trainer(
        model, optimizer, nn.CrossEntropyLoss(), {"accuracy": accuracy}, callbacks=[watch], clip_norm=1.0,
        accumulate=accumulate, scheduler=optim.lr_scheduler.StepLR(optimizer, 100), scheduler_interval="step",
    )  # fmt: skip
    batch = tinytorch.randn(32, 64), tinytorch.randint(10, (32,))
    tracemalloc.start()
    try:
        trainer.fit([batch] * (SETTLED + 990) * accumulate, epochs=1)
    finally:
        tracemalloc.stop()
    _, objects, _, resident = watch.seen[10]
    traced = watch.seen[SETTLED][2]
    cyclic, objects_later, traced_later, resident_later = watch.seen[SETTLED + 990]
    assert cyclic == 0
    assert objects_later - objects < 10
    assert traced_later - traced < 990 * 40  # not even the smallest gradient, 10 floats, stays from each step
    assert resident_later - resident < 4 * 2**20


def test_a_graph_is_freed_without_backward(no_collector: None) -> None:
    x = tinytorch.randn(256, 256, requires_grad=True)
    (x * x).exp().sum()
    before = len(gc.get_objects())
    for _ in range(50):
        (x * x).exp().sum()
    assert len(gc.get_objects()) - before < 10


@pytest.mark.slow
def test_backward_of_a_chain_of_100_000_operations(no_collector: None) -> None:
    x = tinytorch.tensor([2.0, -3.0], requires_grad=True)
    before = len(gc.get_objects())
    y = x
    for _ in range(50_000):
        y = (y + 1) - 1
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]
    x.grad = None
    del y  # frees the chain: not by recursion either
    assert len(gc.get_objects()) - before < 50
