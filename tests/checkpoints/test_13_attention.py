"""After module 13: let each place of a sequence choose what it takes from the others."""

from __future__ import annotations

import numpy as np

from tinytorch.m01_setup import manual_seed
from tinytorch.m02_tensor import Tensor, randn, tensor
from tinytorch.m02_tensor_appendix import randint
from tinytorch.m04_layers import Linear, Module
from tinytorch.m05_losses import cross_entropy
from tinytorch.m07_optimizers import Adam
from tinytorch.m12_embeddings import Embedding
from tinytorch.m13_attention import SelfAttention, attention_weights, padding_mask, scaled_dot_product_attention


class Recall(Module):
    """Reads pairs of a name and a number, then a name again, and says which number stood behind it."""

    def __init__(self, names: int, width: int = 32) -> None:
        super().__init__()
        self.tokens, self.places = Embedding(2 * names, width), Embedding(16, width)
        self.first, self.second = SelfAttention(width, 2), SelfAttention(width, 2)
        self.head = Linear(width, names)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        x = x + self.first(x)
        return self.head((x + self.second(x))[:, -1])


def pairs(count: int, names: int) -> tuple[Tensor, Tensor]:
    """Rows of name, number, name, number, …, name; and the number that belongs to the last name."""
    rng = np.random.default_rng(randint(1 << 30, (1,)).item())
    order = np.stack([rng.permutation(names) for _ in range(count)])[:, :3]
    numbers = rng.integers(0, names, (count, 3))
    asked = rng.integers(0, 3, count)
    rows = np.stack([order, numbers + names], axis=2).reshape(count, 6)
    last = order[np.arange(count), asked]
    return tensor(np.concatenate([rows, last[:, None]], axis=1)), tensor(numbers[np.arange(count), asked])


def test_two_layers_learn_to_look_something_up() -> None:
    manual_seed(0)
    model = Recall(4)
    optimizer = Adam(model.parameters(), lr=5e-3)
    for _ in range(500):
        ids, answers = pairs(64, 4)
        loss = cross_entropy(model(ids), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, answers = pairs(400, 4)
    assert (model(ids).argmax(1) == answers).sum().item() > 360  # guessing gives 100


def test_what_is_padding_changes_nothing() -> None:
    query, key, value = randn(2, 4, 5, 8), randn(2, 4, 7, 8), randn(2, 4, 7, 8)
    mask = padding_mask([3, 7])
    before = scaled_dot_product_attention(query, key, value, mask).numpy()
    key.data[0, :, 3:], value.data[0, :, 3:] = 100.0, -100.0
    np.testing.assert_array_equal(scaled_dot_product_attention(query, key, value, mask).numpy(), before)
    weights = attention_weights(query, key, mask).numpy()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert not weights[0, :, :, 3:].any()
