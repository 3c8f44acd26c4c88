"""After module 18: make a network smaller, and measure what that costs and what it brings."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import tinytorch
from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import tensor
from tinytorch.m04_layers import Module
from tinytorch.m05_losses import cross_entropy
from tinytorch.m07_optimizers import Adam
from tinytorch.m08_training import Trainer, accuracy
from tinytorch.m09_spatial import SimpleCNN
from tinytorch.m18_compression import (
    DistillationLoss,
    GradualPruning,
    made_plain,
    prune_channels,
    share_weights,
    weights_of,
)
from tinytorch.m18_compression_appendix import compression_report, factorize, restore


@pytest.fixture(scope="module")
def data() -> tuple:
    """Handwritten digits of 8x8 in random order: batches to train on, and one batch of 360 to test with."""
    table = np.loadtxt(Path(tinytorch.__file__).parent / "data" / "digits.csv.gz", np.float32, delimiter=",")
    table = np.random.default_rng(0).permutation(table)
    images, labels = table[:, :64].reshape(-1, 1, 8, 8) / 16, table[:, 64].astype(np.int64)
    train = [(images[i : i + 64], labels[i : i + 64]) for i in range(360, len(table), 64)]
    return train, (tensor(images[:360]), tensor(labels[:360]))


@pytest.fixture(scope="module")
def network(data: tuple) -> SimpleCNN:
    """A CNN that reads them."""
    manual_seed(0)
    model = make()
    train(model, data[0], epochs=4)
    return model


make = partial(SimpleCNN, 1, 10, 8, widths=(32, 32), hidden=64, batch_norm=True)


def train(model: Module, batches: list, epochs: int, lr: float = 3e-3, **options: object) -> Trainer:
    options = {"loss": cross_entropy, **options}
    trainer = Trainer(model, Adam(model.parameters(), lr=lr), **options)  # type: ignore[arg-type]
    trainer.fit(batches, epochs)
    return trainer


def right(model: Module, data: tuple) -> float:
    with tinytorch.no_grad():
        return accuracy(model.eval()(data[1][0]), data[1][1]).item()


def test_five_ways_to_be_smaller(network: SimpleCNN, data: tuple, tmp_path: Path) -> None:
    manual_seed(1)
    batches, images = data[0], data[1][0]
    steps = len(batches)
    sparse = made_plain(network)
    pruning = GradualPruning(weights_of(sparse), 0.8, begin=0, end=2 * steps, every=4)
    train(sparse, batches, 3, callbacks=[pruning])
    clustered = copy.deepcopy(sparse)
    for layer, name in weights_of(clustered):
        share_weights(layer, name, bits=5)
    narrow = prune_channels(network, images, 0.5)
    train(narrow, batches, 2)
    thin = factorize(network, 0.7)
    train(thin, batches, 1, lr=1e-3)
    networks = {"whole": network, "sparse": sparse, "clustered": clustered, "narrow": narrow, "thin": thin}
    rows = compression_report(networks, images[:64], tmp_path, partial(right, data=data), rounds=3)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == rows
    by_name = {row["name"]: row for row in rows}
    whole = by_name["whole"]
    assert min(row["accuracy"] for row in rows) > 0.93, [(row["name"], row["accuracy"], row["bytes"]) for row in rows]
    assert by_name["sparse"]["nonzero"] < 0.22 * whole["parameters"] == 0.22 * by_name["sparse"]["parameters"]
    assert by_name["sparse"]["bytes"] < whole["bytes"] / 3
    assert by_name["clustered"]["bytes"] < whole["bytes"] / 6
    assert by_name["sparse"]["flops"] == whole["flops"]  # zeros are multiplied with, too
    for name, share in (("narrow", 0.35), ("thin", 0.8)):
        assert by_name[name]["flops"] < share * whole["flops"]
        assert by_name[name]["bytes"] < share * whole["bytes"]
    for name, model in networks.items():
        again = restore(make(), tmp_path / f"{name}.safetensors")
        assert_close(again.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-5)


def test_a_student_learns_what_its_teacher_says(network: SimpleCNN, data: tuple) -> None:
    manual_seed(2)
    student = SimpleCNN(1, 10, 8, widths=(4,), hidden=8)
    nobody_knows = [(images, np.zeros_like(labels)) for images, labels in data[0]]
    loss = DistillationLoss(student, network, temperature=3.0, alpha=1.0)
    trainer = train(student, nobody_knows, 12, lr=5e-3, loss=loss)
    assert right(student, data) > 0.85  # the labels say that all are 0
    assert trainer.evaluate([data[1]])["loss"] < 1.0  # of the true labels, without a teacher
