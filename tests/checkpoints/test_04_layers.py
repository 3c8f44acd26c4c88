"""After module 04: build a network from layers, save its state, and load it into another program's network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Tensor, randn
from tinytorch.m03_activations import ReLU
from tinytorch.m04_layers import Dropout, Flatten, Linear, Module, Sequential
from tinytorch.m04_layers_appendix import ModuleList, load, save


class Classifier(Module):
    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.body = ModuleList(Sequential(Linear(64 if i == 0 else width, width), ReLU()) for i in range(depth))
        self.head = Sequential(Dropout(0.2), Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        x = Flatten()(images)
        for layer in self.body:
            x = layer(x)
        return self.head(x)


def answer(folder: Path) -> None:
    """What the second process does: load model and batch, and compare its answers with the first one's."""
    state, batch = load(folder / "model.safetensors"), load(folder / "batch.safetensors")
    assert state.metadata["classes"] == "ten digits"
    model = Classifier().eval()
    model.load_state_dict(state)
    assert model(batch["images"]).tolist() == batch["answers"].tolist()
    print("the same")


def test_a_saved_network_gives_the_same_answers_in_another_process(tmp_path) -> None:
    manual_seed(17)
    model = Classifier().eval()
    images = randn(5, 8, 8)
    save(model.state_dict(), tmp_path / "model.safetensors", {"classes": "ten digits"})
    save({"images": images, "answers": model(images)}, tmp_path / "batch.safetensors")
    program = "import pathlib, runpy, sys; runpy.run_path(sys.argv[1])['answer'](pathlib.Path(sys.argv[2]))"
    command = [sys.executable, "-c", program, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("the same\n", "")


def test_a_state_of_another_shape_is_refused_as_a_whole(tmp_path) -> None:
    save(Classifier(width=16, depth=4).state_dict(), tmp_path / "small.safetensors")
    model = Classifier()
    before = {name: value.tolist() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(load(tmp_path / "small.safetensors"))
    for part in ("unexpected: body.3.0.weight, body.3.0.bias", "head.1.weight (10, 16), expected (10, 32)"):
        assert part in str(error.value)
    assert {name: value.tolist() for name, value in model.state_dict().items()} == before


def test_only_training_is_random() -> None:
    model, images = Classifier(), randn(4, 8, 8)
    assert model(images).tolist() != model(images).tolist()
    model.eval()
    assert_close(model(images), model(images), rtol=0, atol=0)
    assert isinstance(model.head[0], Dropout)
    assert isinstance(model(images), Tensor)
    assert isinstance(model, Module)
