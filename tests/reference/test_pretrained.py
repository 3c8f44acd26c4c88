"""Folders of `transformers` in our GPT, and ours in `transformers`: the same logits, and the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytorch as t
from tinytorch.m14_transformers import GPT, GPTConfig
from tinytorch.m14_transformers_appendix import CONFIG, OWN

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY, CONTEXT = 61, 24
GPT2 = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 24, "n_layer": 2, "n_head": 3}
LLAMA = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "hidden_size": 24, "intermediate_size": 40,
         "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8}  # fmt: skip
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
TYPES = {"gpt2": ("GPT2", GPT2), "llama": ("Llama", LLAMA)}
THEIRS = {
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2 with a narrow mlp": ("gpt2", {"n_inner": 17, "layer_norm_epsilon": 0.01}),
    **{f"gpt2 with {name}": ("gpt2", {"activation_function": name})
       for name in ("gelu_pytorch_tanh", "gelu_fast", "gelu", "relu", "silu")},
    "gpt2 of one head": ("gpt2", {"n_head": 1, "n_layer": 1, "reorder_and_upcast_attn": True}),
    "llama": ("llama", {}),
    "llama with grouped queries": ("llama", {"num_key_value_heads": 2}),
    "llama with one key": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama with wide heads": ("llama", {"head_dim": 10, "num_key_value_heads": 2, "rms_norm_eps": 0.01}),
    "llama with another base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama 3": ("llama", {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}, "num_key_value_heads": 2}),
    "llama stretched": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
    "llama with biases in attention": ("llama", {"attention_bias": True}),
    "llama with biases in the mlp": ("llama", {"mlp_bias": True}),
}  # fmt: skip
OURS = {
    "gpt2": GPTConfig(VOCABULARY, CONTEXT, 2, 3, 24, mlp="gelu"),
    "gpt2 untied": GPTConfig(VOCABULARY, CONTEXT, 2, 3, 24, tie_weights=False, mlp="gelu_tanh", norm_eps=0.01),
    "gpt2 without biases": GPTConfig(VOCABULARY, CONTEXT, 2, 2, 24, bias=False, hidden_dim=30, mlp="relu"),
    "llama": GPTConfig(VOCABULARY, CONTEXT, 2, 4, 24, norm="rms", positions="rotary", mlp="swiglu", bias=False),
    "llama 3": GPTConfig(
        VOCABULARY, CONTEXT, 2, 4, 24, num_kv_heads=2, head_dim=8, hidden_dim=31, norm="rms", norm_eps=0.01,
        positions="rotary", mlp="swiglu", bias=False, tie_weights=False, rope_base=5e5, rope_scaling=LLAMA3,
    ),
    "llama with biases": GPTConfig(
        VOCABULARY, CONTEXT, 2, 4, 24, norm="rms", positions="rotary", mlp="swiglu", bias=True, dropout=0.1,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    ),
}  # fmt: skip


def their_model(kind: str, seed: int = 0, **options: Any) -> Any:
    """A model of `transformers`; every number in it is random, so that none can be left out or exchanged."""
    name, sizes = TYPES[kind]
    config = getattr(transformers, f"{name}Config")(**{**sizes, **NO_TOKENS, **options})
    model = getattr(transformers, {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[kind])(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.randn(x.shape, generator=generator) * 0.3 + (x.ndim == 1))
    return model.eval()


def our_model(config: GPTConfig) -> GPT:
    model = GPT(config).eval()
    generator = np.random.default_rng(5)
    values = {n: generator.normal(size=x.shape) * 0.3 + (x.ndim == 1) for n, x in model.state_dict().items()}
    model.load_state_dict({name: x.astype(np.float32) for name, x in values.items()})
    return model


def numbers(model: Any) -> dict:
    return {name: x.tolist() for name, x in model.state_dict().items()}


def tokens(rows: int = 2, length: int = CONTEXT) -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCABULARY, (rows, length))


def assert_same_logits(ours: GPT, theirs: Any) -> None:
    ids = tokens()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    found = ours(t.tensor(ids)).detach().numpy()
    assert np.abs(expected).max() > 0.5  # there is something to compare
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def assert_same_tokens(ours: GPT, theirs: Any) -> None:
    for prompt in tokens(3, 4).tolist():
        with torch.no_grad():
            expected = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 4, dtype=torch.int64),
                                       max_new_tokens=12, do_sample=False, pad_token_id=0)  # fmt: skip
        assert ours.generate(prompt, 12, temperature=0) == expected[0].tolist()


def loaded_by_them(folder: Path, **options: Any) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("name", THEIRS)
def test_their_folder_in_ours_and_back(tmp_path: Path, name: str) -> None:
    kind, options = THEIRS[name]
    theirs = their_model(kind, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs", dropout=0.0)
    assert not ours.training
    assert_same_logits(ours, theirs)
    assert_same_tokens(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    back = loaded_by_them(tmp_path / "ours")
    assert_same_logits(ours, back)
    if options.get("attention_bias", False) == options.get("mlp_bias", False):
        assert numbers(back) == numbers(theirs)


@pytest.mark.parametrize("name", OURS)
def test_our_folder_in_theirs_and_back(tmp_path: Path, name: str) -> None:
    ours = our_model(OURS[name])
    ours.save_pretrained(tmp_path / "ours", eos_token_id=7)
    theirs = loaded_by_them(tmp_path / "ours")
    assert (theirs.dtype, theirs.config.eos_token_id) == (torch.float32, 7)
    assert_same_logits(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs")  # what we noted for ourselves is still in it
    back = GPT.from_pretrained(tmp_path / "theirs")
    assert (back.config.bias, back.config.dropout) == (ours.config.bias, ours.config.dropout)
    assert numbers(back) == numbers(ours)


def test_biases_that_they_trained_are_not_dropped(tmp_path: Path) -> None:
    our_model(OURS["gpt2 without biases"]).save_pretrained(tmp_path / "ours")
    theirs = loaded_by_them(tmp_path / "ours")
    with torch.no_grad():
        theirs.transformer.h[1].mlp.c_fc.bias[3] = 0.5
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / CONFIG).read_text())[OWN] == {"bias": False}
    back = GPT.from_pretrained(tmp_path / "theirs")
    assert back.config.bias
    assert_same_logits(back, theirs)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(tmp_path: Path, kind: str, dtype: str) -> None:
    their_model(kind).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert {x.dtype for x in ours.parameters()} == {t.float32}
    assert_same_logits(ours, loaded_by_them(tmp_path, dtype=torch.float32))
    assert {x.dtype for x in GPT.from_pretrained(tmp_path, dtype="float16").parameters()} == {t.float16}


@pytest.mark.parametrize("kind", TYPES)
def test_several_files(tmp_path: Path, kind: str) -> None:
    theirs = their_model(kind, tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path, max_shard_size="9KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(GPT.from_pretrained(tmp_path, dropout=0.0), theirs)


@pytest.mark.parametrize("kind", TYPES)
def test_a_model_without_a_head(tmp_path: Path, kind: str) -> None:
    theirs = their_model(kind, tie_word_embeddings=True)
    theirs.base_model.save_pretrained(tmp_path)  # its names have no prefix
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


def test_a_checkpoint_of_old_with_masks_and_a_copy_of_the_embedding(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs = their_model("gpt2")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    for i in range(2):
        state[f"transformer.h.{i}.attn.bias"] = torch.tril(torch.ones(CONTEXT, CONTEXT)).bool()[None, None]
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    save_file(state, file)
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)
    del state["transformer.wte.weight"]  # as safetensors.torch.save_model leaves it out
    save_file(state, file)
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)
