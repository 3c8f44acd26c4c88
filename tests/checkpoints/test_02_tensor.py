"""After module 02: compute with tensors as with NumPy's arrays, on any array library."""

from __future__ import annotations

import numpy as np
import pytest

from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Tensor, cat, matmul, ones, randn, stack, tensor, zeros
from tinytorch.m02_tensor_appendix import (
    arange,
    einsum,
    from_numpy,
    get_default_device,
    linspace,
    meshgrid,
    randperm,
    set_default_device,
    topk,
    where,
)

LIBRARIES = ["cpu", "array_api_strict"]


@pytest.fixture(autouse=True, params=LIBRARIES)
def library(request):
    """Everything here runs on each library."""
    if request.param != "cpu":
        pytest.importorskip(request.param)
    before = get_default_device()
    set_default_device(request.param)
    yield request.param
    set_default_device(before)


def test_a_straight_line_is_fitted_by_the_normal_equations() -> None:
    rng = np.random.default_rng(1)
    inputs = rng.uniform(-1, 1, 50)
    targets = tensor(3 * inputs - 2 + rng.normal(0, 0.1, 50))
    design = stack([tensor(inputs), ones(50, dtype="float64")], 1)
    gram, moments = design.T @ design, design.T @ targets
    determinant = gram[0, 0] * gram[1, 1] - gram[0, 1] ** 2
    slope = (gram[1, 1] * moments[0] - gram[0, 1] * moments[1]) / determinant
    offset = (gram[0, 0] * moments[1] - gram[1, 0] * moments[0]) / determinant
    assert_close([slope.item(), offset.item()], np.polyfit(inputs, targets.numpy(), 1), rtol=1e-8)


def test_k_nearest_neighbours_without_a_loop() -> None:
    manual_seed(3)
    centres = tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    labels = arange(90) % 3
    points = centres[labels] + randn(90, 2)
    queries = centres + 0.3
    distances = ((queries.unsqueeze(1) - points) ** 2).sum(-1)
    votes = labels[topk(distances, 9, largest=False).indices]
    winners = (votes.unsqueeze(-1) == arange(3)).sum(1).argmax(1)
    assert winners.tolist() == [0, 1, 2]


def test_game_of_life() -> None:
    glider = zeros(8, 8, dtype="int64")
    glider[[0, 1, 2, 2, 2], [1, 2, 0, 1, 2]] = 1
    board = glider
    for _ in range(4):
        shifts = [board.roll((i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
        neighbours = stack(shifts).sum(0)
        board = where((neighbours == 3) | ((neighbours == 2) & (board == 1)), 1, 0)
    assert board.equal(glider.roll((1, 1), (0, 1)))  # a glider moves one cell each four steps


def test_the_mandelbrot_set_by_masks() -> None:
    imaginary, real = meshgrid(linspace(-1.2, 1.2, 24), linspace(-2, 0.6, 24))
    x, y, steps = zeros(24, 24), zeros(24, 24), zeros(24, 24, dtype="int64")
    for _ in range(30):
        inside = x * x + y * y <= 4
        x, y = where(inside, x * x - y * y + real, x), where(inside, 2 * x * y + imaginary, y)
        steps += inside.to("int64")
    expected = []
    for c in (real.numpy().astype(np.float32) + 1j * imaginary.numpy()).ravel():
        z, count = 0j, 0
        while count < 30 and abs(z) <= 2:
            z, count = z * z + c, count + 1
        expected.append(count)
    assert np.mean(steps.numpy().ravel() == expected) > 0.99  # rounding may move a point of the edge


def test_attention_by_einsum_and_by_matmul() -> None:
    manual_seed(0)
    queries, keys, values = (randn(2, 3, 4, 5) for _ in range(3))
    scores = einsum("bhqd,bhkd->bhqk", queries, keys) / 5**0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    assert_close(weights.sum(-1), np.ones((2, 3, 4)))
    assert_close(einsum("bhqk,bhkd->bhqd", weights, values), matmul(weights, values), rtol=1e-4, atol=1e-6)


def test_a_shuffled_epoch_sees_every_row_once() -> None:
    data = from_numpy(np.arange(20).reshape(10, 2)).to(get_default_device())
    batches = data[randperm(10)].split(4)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(cat(batches).reshape(-1).tolist()) == list(range(20))


def test_in_place_work_reuses_memory() -> None:
    weights: Tensor = randn(3, 3)
    row = weights[0]
    weights *= 0
    weights[0] = 2.0
    assert row.tolist() == [2, 2, 2]
    assert weights.sum().item() == 6
