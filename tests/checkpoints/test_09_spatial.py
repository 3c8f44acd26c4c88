"""After module 09: build a network that sees, and say what it costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tinytorch
from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Tensor, randn, tensor, zeros
from tinytorch.m03_activations import ReLU
from tinytorch.m04_layers import Flatten, Linear, Module, Sequential
from tinytorch.m05_losses import CrossEntropyLoss, cross_entropy
from tinytorch.m07_optimizers import Adam
from tinytorch.m08_training import Trainer, accuracy
from tinytorch.m09_spatial import BatchNorm2d, Conv2d, MaxPool2d, SimpleCNN, count_flops, count_parameters
from tinytorch.m09_spatial_appendix import ResNet


class Seeing(Module):
    """Two convolutions, and one number for each kernel and place that a linear layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Sequential(
            Conv2d(1, 8, 3, padding=1, bias=False), BatchNorm2d(8), ReLU(), MaxPool2d(2),
            Conv2d(8, 16, 3, padding=1, bias=False), BatchNorm2d(16), ReLU(), MaxPool2d(2),
        )  # fmt: skip
        self.head = Sequential(Flatten(), Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@pytest.fixture(scope="module")
def data() -> tuple:
    """Handwritten digits of 8x8 in random order: batches to train on, and one batch of 360 to test with."""
    table = np.loadtxt(Path(tinytorch.__file__).parent / "data" / "digits.csv.gz", np.float32, delimiter=",")
    table = np.random.default_rng(0).permutation(table)
    images, labels = table[:, :64].reshape(-1, 1, 8, 8) / 16, table[:, 64].astype(np.int64)
    train = [(images[i : i + 64], labels[i : i + 64]) for i in range(360, len(table), 64)]
    return train, (images[:360], labels[:360])


def test_a_network_learns_to_see(data: tuple) -> None:
    train, test = data
    manual_seed(0)
    model = Seeing()
    trainer = Trainer(model, Adam(model.parameters(), lr=3e-3), CrossEntropyLoss(), {"accuracy": accuracy})
    history = trainer.fit(train, 4, validation=[test])
    assert history[-1]["val_accuracy"] > 0.95
    images = tensor(test[0])
    model.eval()
    assert_close(model(images[:1]), model(images)[:1], rtol=1e-3, atol=1e-3)  # alone or among others


def test_what_it_costs_is_known_before_it_runs() -> None:
    model = Seeing()
    assert count_parameters(model) == 8 * 9 + 2 * 8 + 16 * 8 * 9 + 2 * 16 + 64 * 10 + 10
    flops = count_flops(model, zeros(1, 1, 8, 8))
    assert flops == {"convolution": 2 * (64 * 8 * 9 + 16 * 16 * 72), "linear": 2 * 640}
    assert count_flops(model, zeros(5, 1, 8, 8))["convolution"] == 5 * flops["convolution"]


@pytest.mark.parametrize("make", [
    lambda: SimpleCNN(1, 10, 8, widths=(8,), hidden=16, batch_norm=True),
    lambda: ResNet(8, 1, 10, width=4),
])  # fmt: skip
def test_known_networks_fit_a_batch(make, data: tuple) -> None:
    manual_seed(1)
    images, labels = (tensor(part) for part in data[0][0])
    model = make()
    optimizer = Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert model(randn(2, 1, 8, 8)).shape == (2, 10)
