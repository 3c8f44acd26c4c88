"""Writing from a cache beside `transformers`, which has one, too: the same tokens, and the same scores on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tinytorch as t
from tests.reference.test_pretrained import THEIRS, their_model, tokens
from tinytorch.m14_transformers import GPT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["gpt2", "gpt2 untied", "llama", "llama with grouped queries", "llama 3"])
def test_greedy_tokens_and_scores_of_their_cache(tmp_path: Path, name: str) -> None:
    kind, options = THEIRS[name]
    theirs = their_model(kind, **options)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path, dropout=0.0)
    prompt = tokens(1, 6).tolist()
    with torch.no_grad():
        written = theirs.generate(
            torch.tensor(prompt), attention_mask=torch.ones(1, 6, dtype=torch.int64), max_new_tokens=14,
            do_sample=False, pad_token_id=0, use_cache=True, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    expected = written.sequences[0].tolist()
    assert ours.generate(prompt[0], 14, temperature=0) == expected
    cache = t.KVCache(ours, block=4)
    for i, scores in enumerate(written.scores):
        found = cache.read([expected[: 6 + i]])
        np.testing.assert_allclose(found.numpy(), scores.numpy(), rtol=1e-4, atol=1e-4)


def test_a_window_is_that_of_mistral() -> None:
    """Mistral is a Llama in which each token sees `sliding_window` tokens."""
    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip
    config = transformers.MistralConfig(**sizes, sliding_window=5, attn_implementation="eager")
    theirs = transformers.MistralForCausalLM(config).eval()
    with torch.no_grad():
        for x in theirs.parameters():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel())) * 0.3 + (x.ndim == 1))
    own = t.GPTConfig(31, 32, 2, 4, 24, 2, hidden_dim=40, bias=False, norm="rms", norm_eps=config.rms_norm_eps,
                      positions="rotary", mlp="swiglu", tie_weights=False)  # fmt: skip
    ours, state = GPT(own).eval(), {n.removeprefix("model."): x.numpy() for n, x in theirs.state_dict().items()}
    new = {"tokens.weight": state["embed_tokens.weight"], "norm.weight": state["norm.weight"],
           "head.weight": state["lm_head.weight"]}  # fmt: skip
    for i in range(2):
        layer = f"layers.{i}."
        stacked = [state[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"]
        new[f"blocks.{i}.attention.qkv.weight"] = np.concatenate(stacked)
        new[f"blocks.{i}.attention.out.weight"] = state[f"{layer}self_attn.o_proj.weight"]
        new |= {f"blocks.{i}.mlp.{n}.weight": state[f"{layer}mlp.{n}_proj.weight"] for n in ("gate", "up", "down")}
        new[f"blocks.{i}.norm1.weight"] = state[f"{layer}input_layernorm.weight"]
        new[f"blocks.{i}.norm2.weight"] = state[f"{layer}post_attention_layernorm.weight"]
    ours.load_state_dict(new)
    ids = np.random.default_rng(0).integers(0, 31, (2, 20))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    cache = t.KVCache(ours, window=5)
    found = [cache.read(ids[:, : n + 1].tolist()).numpy() for n in range(3, 20)]
    np.testing.assert_allclose(np.stack(found, 1), expected[:, 3:], rtol=1e-4, atol=1e-4)
