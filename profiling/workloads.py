"""What is measured: a network with inputs for it, known by name or read from the folder of a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tinytorch
from tinytorch import Tensor, nn, optim
from tinytorch.backends import seeded
from tinytorch.m09_spatial import SimpleCNN
from tinytorch.m14_transformers import GPT
from tinytorch.milestones.generate import load_writer
from tinytorch.milestones.predict import load_reader
from tinytorch.milestones.program import UsageError, default_device
from tinytorch.milestones.tinygpt import RECIPE
from tinytorch.nn import functional as F

CHARACTERS = 65  # of Shakespeare
PLACES = 64  # tokens of a text, where the model sees as many


@dataclass
class Workload:
    """A network, and what is to be timed of it.

    Attributes:
        inputs: what the model is called with; drawn at random, the same in every process.
        targets: what its output is compared with in training.
        loss: of the model's output and the targets.
        optimizer: of the model's parameters.
    """

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: optim.Optimizer

    def forward(self) -> Tensor:
        """One inference call, in eval mode and without gradients."""
        self._set_mode(False)
        with tinytorch.no_grad():
            return self.model(*self.inputs)

    def train_step(self) -> Tensor:
        """Forward, loss, backward and update, in training mode; returns the loss."""
        self._set_mode(True)
        self.optimizer.zero_grad()
        loss = self.loss(self.model(*self.inputs), self.targets)
        loss.backward()
        self.optimizer.step()
        return loss

    def _set_mode(self, training: bool) -> None:
        if self.model.training != training:  # `train` goes through all modules, which would be timed with the call
            self.model.train(training)


def workload(name: str, device: str | None = None, batch_size: int | None = None) -> Workload:
    """A network to measure, with a batch for it.

    Args:
        name: "mlp" (784-128-10, 64 pictures), "cnn" (the SimpleCNN, 64 pictures of 3×32×32), "gpt" (4 layers, 128 wide,
            12 texts of 64 characters), or the folder of a trained network: of a run, or GPT-2's or a Llama's.
        device: where it is; the default device if None.
        batch_size: pictures or texts in a batch.

    Raises:
        UsageError: there is no such network, or no such device.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"a batch has at least 1 example, not {batch_size}")
    with default_device(device), seeded(0):
        if name in MAKERS:
            return MAKERS[name](name, batch_size)
        folder = Path(name)
        if not folder.is_dir():
            raise UsageError(f"there is no network {name!r}: name {', '.join(MAKERS)} or the folder of a run")
        return load_run(folder, batch_size)


def load_run(folder: str | os.PathLike, batch_size: int | None) -> Workload:
    """The network of a folder with random inputs of the shape that it was trained on."""
    if (Path(folder) / "config.json").is_file():
        return of_language(str(folder), batch_size, load_writer(folder).model)
    reader = load_reader(folder)
    recipe = reader.recipe
    size = recipe.batch_size if batch_size is None else batch_size
    return of_pictures(
        str(folder), size, reader.model, recipe.shape, len(reader.classes),
        recipe.loss, recipe.optimize(reader.model, 1)[0],
    )  # fmt: skip


def of_pictures(
    name: str, batch_size: int | None, model: nn.Module, shape: tuple[int, ...], classes: int = 10,
    loss: Callable = F.cross_entropy, optimizer: optim.Optimizer | None = None,
) -> Workload:  # fmt: skip
    """A network that tells classes, with a batch of random pictures of a shape and random labels."""
    size = 64 if batch_size is None else batch_size
    pictures, labels = tinytorch.randn(size, *shape), tinytorch.randint(0, classes, (size,))
    return Workload(name, model, (pictures,), labels, loss, optimizer or optim.Adam(model.parameters(), lr=1e-3))


def of_language(name: str, batch_size: int | None, model: GPT) -> Workload:
    """A language model, with a batch of random tokens and of what comes next."""
    size = RECIPE.batch if batch_size is None else batch_size
    length, vocabulary = min(PLACES, model.config.context_length), model.config.vocab_size
    ids = tinytorch.randint(0, vocabulary, (size, length + 1))
    return Workload(
        name, model, (ids[:, :-1].contiguous(),), ids[:, 1:].reshape(-1),
        lambda scores, targets: F.cross_entropy(scores.reshape(-1, vocabulary), targets), RECIPE.optimize(model, 1)[0],
    )  # fmt: skip


def make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


MAKERS: dict[str, Callable[[str, int | None], Workload]] = {
    "mlp": lambda name, size: of_pictures(name, size, make_mlp(), (784,)),
    "cnn": lambda name, size: of_pictures(name, size, SimpleCNN(), (3, 32, 32)),
    "gpt": lambda name, size: of_language(name, size, RECIPE.network(CHARACTERS)),
}
