"""After module 12: give tokens vectors, and tell a network where they stand."""

from __future__ import annotations

import pytest

from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Tensor, matmul, randn, reshape, stack, tensor, transpose
from tinytorch.m02_tensor_appendix import flatten, randint, tril
from tinytorch.m03_activations import relu, softmax
from tinytorch.m04_layers import Linear, Module, linear
from tinytorch.m05_losses import cross_entropy
from tinytorch.m07_optimizers import Adam
from tinytorch.m12_embeddings import (
    Embedding,
    LearnedPositions,
    RotaryEmbedding,
    SinusoidalPositions,
    alibi_bias,
    embedding,
)

TEXT = "the cat sat on the mat and the rat sat on the cat and the dog sat on the rat "


class NextCharacter(Module):
    """Guesses a character from the three before it (Bengio and others, 2003), with one table for both ends."""

    def __init__(self, vocabulary: int, width: int = 16) -> None:
        super().__init__()
        self.tokens = Embedding(vocabulary, width)
        self.hidden, self.back = Linear(3 * width, 64), Linear(64, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.back(relu(self.hidden(flatten(self.tokens(ids), 1))))
        return linear(x, self.tokens.weight)


def fit(model: Module, ids: Tensor, targets: Tensor, steps: int) -> float:
    optimizer = Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        scores = model(ids)
        cross_entropy(reshape(scores, shape=(-1, scores.shape[-1])), reshape(targets, shape=(-1,))).backward()
        optimizer.step()
    return (model(ids).argmax(-1) == targets).mean().item()


def test_vectors_of_characters_learn_a_text() -> None:
    manual_seed(0)
    characters = sorted(set(TEXT))
    ids = [characters.index(c) for c in TEXT]
    places = range(len(ids) - 3)
    windows, targets = tensor([ids[i : i + 3] for i in places]), tensor([ids[i + 3] for i in places])
    model = NextCharacter(len(characters))
    assert fit(model, windows, targets, 150) > 0.75
    with pytest.raises(IndexError, match=f"index {len(characters)} is out of range for {len(characters)} rows"):
        model(tensor([[0, 1, len(characters)]]))


class Shift(Module):
    """One layer of attention that is to repeat the token before, which it cannot find without positions."""

    def __init__(self, kind: str, length: int, width: int = 32) -> None:
        super().__init__()
        self.tokens, self.query, self.key = Embedding(8, width), Linear(width, width), Linear(width, width)
        self.head = Linear(width, 8)
        self.added = {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions}.get(kind, lambda *_: None)(
            length, width
        )
        self.rotary = RotaryEmbedding(width, length) if kind == "rotary" else None
        self.bias = alibi_bias(1, length)[0] * 100 if kind == "alibi" else None

    def forward(self, ids: Tensor) -> Tensor:
        values = self.tokens(ids)
        x = values if self.added is None else self.added(values)
        q, k = self.query(x), self.key(x)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        scores = matmul(q, transpose(k, 1, 2)) * 0.2
        scores = scores if self.bias is None else scores + self.bias
        before = tril(scores * 0 + 1, -1)  # only earlier places are looked at
        return self.head(matmul(softmax(scores + (before - 1) * 1e9, dim=2), values))[:, 1:]


@pytest.mark.parametrize(("kind", "works"), [
    ("none", False), ("learned", True), ("sinusoidal", True), ("rotary", True), ("alibi", True),
])  # fmt: skip
def test_only_with_positions_is_the_token_before_found(kind: str, works: bool) -> None:
    manual_seed(1)
    ids = randint(8, (32, 10))
    model = Shift(kind, 10)
    accuracy = fit(model, ids, ids[:, :-1], 120)
    assert (accuracy > 0.9) == works, accuracy


def test_a_piece_of_a_text_gets_the_positions_that_it_has_in_the_whole() -> None:
    x = randn(1, 2, 12, 8)
    for layer in (RotaryEmbedding(8, 12), SinusoidalPositions(12, 8), LearnedPositions(12, 8)):
        whole = layer(x)
        assert_close(stack([layer(x[:, :, i : i + 1], i)[:, :, 0] for i in range(12)], 2), whole, rtol=1e-4, atol=1e-5)


def test_padding_learns_nothing() -> None:
    table, ids = Embedding(6, 4, padding_idx=0), tensor([[3, 2, 0, 0], [5, 0, 0, 0]])
    before = table.weight.tolist()
    optimizer = Adam(table.parameters(), lr=0.1)
    (embedding(ids, table.weight, padding_idx=0) ** 2 + table(ids)).sum().backward()
    optimizer.step()
    moved = [a != b for a, b in zip(before, table.weight.tolist(), strict=True)]
    assert moved == [False, False, True, True, False, True]
    assert table.weight[0].tolist() == [0] * 4
