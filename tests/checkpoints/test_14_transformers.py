"""After module 14: train a GPT, let it write, and load the weights of a published one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

import tinytorch.m14_transformers_appendix  # noqa: F401 - folders of weights
from tinytorch.m01_setup import manual_seed
from tinytorch.m02_tensor import tensor
from tinytorch.m07_optimizers import AdamW
from tinytorch.m14_transformers import GPT, GPTConfig, llama_config, next_token_loss

TEXT = "the cat sat on the mat. the dog sat on the log. the cat saw the dog. the dog saw the cat. " * 4
LETTERS = sorted(set(TEXT))


def encode(text: str) -> list[int]:
    return [LETTERS.index(c) for c in text]


def trained(config: GPTConfig) -> tuple[GPT, float]:
    manual_seed(0)
    model, ids, rng = GPT(config), np.array(encode(TEXT)), np.random.default_rng(0)
    optimizer = AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        starts = rng.integers(0, len(ids) - 17, 16)
        rows = ids[starts[:, None] + np.arange(17)]
        loss = next_token_loss(model(tensor(rows[:, :-1])), tensor(rows[:, 1:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, loss.item()


def test_a_gpt_and_a_llama_learn_to_write(tmp_path: Path) -> None:
    sizes = {"context_length": 16, "num_layers": 2, "num_heads": 4, "embed_dim": 32}
    for config in (GPTConfig(len(LETTERS), **sizes), llama_config(len(LETTERS), num_kv_heads=2, **sizes)):
        model, loss = trained(config)
        assert loss < 0.4 < math.log(len(LETTERS))
        written = "".join(LETTERS[i] for i in model.generate(encode("the "), 60, temperature=0.5, seed=1))
        words = written.replace(".", "").split()
        assert sum(word in TEXT.replace(".", "").split() for word in words[:-1]) >= 0.9 * len(words[:-1]), written
        model.save_pretrained(tmp_path / config.norm)
        again = GPT.from_pretrained(tmp_path / config.norm)
        ids = tensor([encode("the cat sat")])
        np.testing.assert_allclose(again(ids).detach().numpy(), model(ids).detach().numpy(), atol=1e-5)
