"""Scripts in the manner of PyTorch's own tutorials run after `import tinytorch as torch`, with the same numbers.

Each script is run twice, on either library, in a namespace of its own. What is random in the originals is given as
data here, since the generators differ.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest

import tinytorch

POLYNOMIAL_BY_HAND = """
import math
import torch

x = torch.linspace(-math.pi, math.pi, 2000, dtype=torch.float64)
y = torch.sin(x)
a, b, c, d = (torch.tensor(v, dtype=torch.float64) for v in (0.1, 0.2, -0.3, 0.4))
for t in range(50):
    y_pred = a + b * x + c * x ** 2 + d * x ** 3
    loss = (y_pred - y).pow(2).sum().item()
    grad_y_pred = 2.0 * (y_pred - y)
    a -= 1e-6 * grad_y_pred.sum()
    b -= 1e-6 * (grad_y_pred * x).sum()
    c -= 1e-6 * (grad_y_pred * x ** 2).sum()
    d -= 1e-6 * (grad_y_pred * x ** 3).sum()
results = [loss, a.item(), b.item(), c.item(), d.item()]
"""

POLYNOMIAL_AUTOGRAD = """
import math
import torch

x = torch.linspace(-math.pi, math.pi, 2000)
y = torch.sin(x)
weights = [torch.full((), v, dtype=torch.float, requires_grad=True) for v in (0.1, 0.2, -0.3, 0.4)]
a, b, c, d = weights
for t in range(50):
    loss = (a + b * x + c * x ** 2 + d * x ** 3 - y).pow(2).sum()
    loss.backward()
    with torch.no_grad():
        for w in weights:
            w -= 1e-6 * w.grad
            w.grad = None
results = [loss.item()] + [w.item() for w in weights]
"""

OWN_FUNCTION = """
import math
import torch

class LegendrePolynomial3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return 0.5 * (5 * input ** 3 - 3 * input)

    @staticmethod
    def backward(ctx, grad_output):
        input, = ctx.saved_tensors
        return grad_output * 1.5 * (5 * input ** 2 - 1)

x = torch.linspace(-math.pi, math.pi, 2000)
y = torch.sin(x)
a = torch.full((), 0.0, requires_grad=True)
b = torch.full((), -1.0, requires_grad=True)
c = torch.full((), 0.0, requires_grad=True)
d = torch.full((), 0.3, requires_grad=True)
P3 = LegendrePolynomial3.apply
for t in range(100):
    y_pred = a + b * P3(c + d * x)
    loss = (y_pred - y).pow(2).sum()
    loss.backward()
    with torch.no_grad():
        for w in (a, b, c, d):
            w -= 5e-6 * w.grad
            w.grad = None
results = [loss.item(), a.item(), b.item(), c.item(), d.item()]
"""

CLASSIFIER = """
import torch
from torch import nn
import torch.nn.functional as F

class NeuralNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(
            nn.Linear(6 * 6, 24),
            nn.ReLU(),
            nn.Linear(24, 16),
            nn.ReLU(),
            nn.Linear(16, 5),
        )

    def forward(self, x):
        x = self.flatten(x)
        logits = self.linear_relu_stack(x)
        return logits

model = NeuralNetwork()
model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
X, y = torch.from_numpy(images), torch.from_numpy(labels)
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
results = []
for epoch in range(12):
    model.train()
    pred = model(X)
    loss = loss_fn(pred, y)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    scheduler.step()
    model.eval()
    with torch.no_grad():
        pred = model(X)
        correct = (pred.argmax(1) == y).type(torch.float).sum().item()
        probabilities = F.softmax(pred, dim=1)
    results += [loss.item(), scheduler.get_last_lr()[0], correct, probabilities.max().item()]
"""

GRADIENT_PENALTY = """
import torch

x = torch.from_numpy(points).requires_grad_()
w = torch.from_numpy(matrix).requires_grad_()
y = torch.tanh(x @ w).sum(dim=1)
(g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
penalty = ((g.norm(2, dim=1) - 1) ** 2).mean()
penalty.backward()
results = [penalty.item()] + w.grad.flatten().tolist()
"""

SCRIPTS = {
    "polynomial by hand": POLYNOMIAL_BY_HAND,
    "polynomial with autograd": POLYNOMIAL_AUTOGRAD,
    "own function": OWN_FUNCTION,
    "classifier": CLASSIFIER,
    "gradient penalty": GRADIENT_PENALTY,
}


def data() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    shapes = {0: (24, 36), 2: (16, 24), 4: (5, 16)}
    weights = {}
    for i, (outputs, inputs) in shapes.items():
        bound = inputs**-0.5
        weights[f"linear_relu_stack.{i}.weight"] = rng.uniform(-bound, bound, (outputs, inputs)).astype("float32")
        weights[f"linear_relu_stack.{i}.bias"] = rng.uniform(-bound, bound, outputs).astype("float32")
    return {
        "weights": weights,
        "images": rng.standard_normal((40, 6, 6)).astype("float32"),
        "labels": rng.integers(0, 5, 40),
        "points": rng.standard_normal((7, 4)),
        "matrix": rng.standard_normal((4, 3)),
    }


def run(script: str, library: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The script's `results`, with `torch` and its submodules standing for the library while it runs."""
    with monkeypatch.context() as patch:
        for name in ("", ".nn", ".nn.functional", ".optim", ".optim.lr_scheduler", ".autograd"):
            patch.setitem(sys.modules, f"torch{name}", importlib.import_module(f"{library.__name__}{name}"))
        namespace = data()
        exec(compile(script, f"<{library.__name__}>", "exec"), namespace)
    return namespace["results"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tutorial_gives_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = importlib.import_module("torch")
    expected = run(SCRIPTS[name], torch, monkeypatch)
    actual = run(SCRIPTS[name], tinytorch, monkeypatch)
    assert len(actual) > 4
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-6)
