"""Module 14 beyond its own tests: the choice of tokens against NumPy, all ways of writing, configurations, norms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import tinytorch as t
import tinytorch.m14_transformers as m
from tinytorch import nn
from tinytorch.autograd import gradcheck

SMALL = m.GPTConfig(17, 8, 2, 2, 8)


def opinionated(config: m.GPTConfig = SMALL, seed: int = 0) -> m.GPT:
    """A model whose scores differ from token to token."""
    t.manual_seed(seed)
    model = m.GPT(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    return model


# -- which token comes next --------------------------------------------------------------------------------------------


def numpy_probabilities(scores: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Row by row, by sorting."""
    out = np.zeros_like(scores)
    for row, target in zip(scores, out, strict=True):
        order = sorted(range(len(row)), key=lambda i: -row[i])[: top_k or len(row)]
        weights = np.exp((row[order] - row.max()) / temperature)
        weights /= weights.sum()
        kept, total = [], 0.0
        for i, weight in zip(order, weights, strict=True):
            kept.append((i, weight))
            total += weight
            if total >= (top_p or 1):
                break
        for i, weight in kept:
            target[i] = weight / sum(w for _, w in kept)
    return out


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5, 100])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.5, 0.95, 1.0])
def test_probabilities(temperature: float, top_k: int | None, top_p: float | None, device: str) -> None:
    scores = np.random.default_rng(3).normal(size=(4, 11)) * 2
    ours = m.next_probabilities(t.tensor(scores), temperature, top_k, top_p).numpy()
    np.testing.assert_allclose(ours, numpy_probabilities(scores, temperature, top_k, top_p), atol=1e-12)


def test_extreme_temperatures() -> None:
    scores = t.tensor([[1.0, 3.0, 2.0]])
    assert m.next_probabilities(scores, 5e-324).tolist() == [[0, 1, 0]]
    np.testing.assert_allclose(m.next_probabilities(scores, 1e9).numpy(), 1 / 3, atol=1e-6)
    assert m.next_probabilities(t.tensor([[2.0, 5.0, 5.0]]), 0).tolist() == [[0, 1, 0]]  # the first of equals


def test_draws_follow_the_probabilities(device: str) -> None:
    t.manual_seed(5)
    p = t.tensor([[0.0, 0.25, 0.0, 0.6, 0.15, 0.0]])
    drawn = np.bincount(m.draw(p.expand(4000, 6), m.nullcontext()), minlength=6) / 4000
    assert drawn[[0, 2, 5]].tolist() == [0, 0, 0]
    np.testing.assert_allclose(drawn, p[0].numpy(), atol=0.03)
    with pytest.raises(ValueError, match="scores are not finite"):
        m.draw(t.tensor([[0.5, math.nan]]), m.nullcontext())


def test_repetition_penalty_is_that_of_ctrl() -> None:
    scores = t.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    assert m.penalized(scores, [[0, 1, 0], [2]], 2.0).tolist() == [[1.0, -4.0, 1.0], [2.0, -2.0, 0.5]]
    model = opinionated()
    plain = model.generate([1], 20, temperature=0)
    assert len(set(model.generate([1], 16, temperature=0, repetition_penalty=1e6))) > len(set(plain))


# -- writing -----------------------------------------------------------------------------------------------------------


def test_writing_is_asking_again_for_the_best_next_token(device: str) -> None:
    model = opinionated()
    row = [3, 1]
    for _ in range(12):  # goes beyond the context of 8
        scores = model(t.tensor([row[-8:]]))[0, -1].detach().numpy()
        row.append(int(scores.argmax()))
    assert model.generate([3, 1], 12, temperature=0) == row
    assert [3, 1, *model.stream(t.tensor([3, 1]), 12, temperature=0)] == row


def test_of_a_long_prompt_the_end_is_read() -> None:
    t.manual_seed(2)
    for _ in range(5):
        model, long = opinionated(seed=3), t.randint(0, 17, (20,)).tolist()
        probabilities = [model.generate(ids, 1, seed=1)[-1] for ids in (long, long[-8:])]
        assert probabilities[0] == probabilities[1]
    scores = opinionated(seed=3).generate([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 6, temperature=0)[-6:]
    assert scores == opinionated(seed=3).generate([4, 5, 6, 7, 8, 9, 10, 11], 6, temperature=0)[-6:]


def test_the_same_seed_writes_the_same_and_leaves_the_generator_alone() -> None:
    model = opinionated()
    t.manual_seed(1)
    first = t.randn(3).tolist()
    t.manual_seed(1)
    texts = {tuple(model.generate([2], 20, seed=seed)) for seed in (0, 0, 1)}
    assert len(texts) == 2
    assert t.randn(3).tolist() == first
    stream = model.stream([2], 20, seed=0)
    begun = [next(stream) for _ in range(5)]
    t.randn(7)  # between two tokens, others may draw
    assert (2, *begun, *stream) in texts
    t.manual_seed(4)
    free = model.generate([2], 20)
    t.manual_seed(4)
    assert model.generate([2], 20) == free


def test_prompts_come_back_in_the_form_they_were_given() -> None:
    model = opinionated()
    alone = model.generate([1, 2], 3, seed=0)
    assert model.generate(t.tensor([1, 2]), 3, seed=0) == alone
    assert model.generate([[1, 2]], 3, seed=0) == [alone] == model.generate(t.tensor([[1, 2]]), 3, seed=0)
    assert model.generate((1, 2), 0) == [1, 2]
    prompt = [1, 2]
    model.generate(prompt, 3)
    list(model.stream(prompt, 3))
    assert prompt == [1, 2]


def test_rows_end_at_their_own_stop_token() -> None:
    model = opinionated()
    free = model.generate([[1], [2, 3], [4]], 10, temperature=0)
    stop = free[1][4]
    rows = model.generate([[1], [2, 3], [4]], 10, temperature=0, stop_tokens=[stop])
    for row, full, given in zip(rows, free, (1, 2, 1), strict=True):
        end = next((i + 1 for i, token in enumerate(full) if i >= given and token == stop), len(full))
        assert row == full[:end]


def test_writing_leaves_training_mode_and_gradients_alone() -> None:
    model = opinionated(replace(SMALL, dropout=0.5))
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    assert model.generate([1], 5, temperature=0) == model.generate([1], 5, temperature=0)  # without dropout
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("given", "words"), [
    ({"prompts": []}, "must hold a token at least"),
    ({"prompts": [[1], []]}, "must hold a token at least"),
    ({"temperature": -0.1}, "temperature must be >= 0, got -0.1"),
    ({"temperature": math.nan}, "temperature must be >= 0, got nan"),
    ({"top_k": 0}, "top_k must be >= 1, got 0"),
    ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
    ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ({"max_new_tokens": -1}, "max_new_tokens must be >= 0, got -1"),
])  # fmt: skip
def test_choices_out_of_range_are_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        opinionated().generate(**{"prompts": [1], "max_new_tokens": 2, **given})
    if "prompts" not in given:
        with pytest.raises(ValueError, match="stream: "):  # at once, not with the first token
            opinionated().stream(**{"prompt": [1], "max_new_tokens": 2, **given})


def test_a_token_outside_of_the_vocabulary_is_named() -> None:
    with pytest.raises((ValueError, IndexError), match="17"):
        opinionated().generate([17], 2)


def test_a_model_of_nan_says_so() -> None:
    model = opinionated()
    model.tokens.weight.data[...] = math.nan
    with pytest.raises(ValueError, match="scores are not finite"):
        model.generate([1], 2)


# -- the family --------------------------------------------------------------------------------------------------------

CONFIGS = {
    "gpt2": SMALL,
    "post-norm": replace(SMALL, norm_first=False),
    "no bias": replace(SMALL, bias=False, mlp="relu"),
    "untied": replace(SMALL, tie_weights=False, mlp="silu"),
    "llama": m.llama_config(17, context_length=8, num_layers=2, num_heads=4, embed_dim=16, num_kv_heads=2),
    "wide heads": m.llama_config(
        17, context_length=8, num_layers=1, num_heads=2, embed_dim=8, head_dim=6, hidden_dim=5
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_has_gradients_and_sees_no_future(name: str, device: str) -> None:
    model = opinionated(CONFIGS[name]).to("float64")
    ids = t.tensor(np.random.default_rng(0).integers(0, 17, (2, 6)))
    scores = model(ids)
    assert scores.shape == (2, 6, 17)
    np.testing.assert_allclose(model(ids[:, :3]).detach().numpy(), scores[:, :3].detach().numpy(), atol=1e-12)
    m.next_token_loss(scores, ids).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert np.isfinite(parameter.grad.numpy()).all(), parameter_name
    again = m.GPT(CONFIGS[name]).to("float64")
    again.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(again(ids).detach().numpy(), scores.detach().numpy())


def test_the_order_of_tokens_matters_with_every_kind_of_positions() -> None:
    for config in (SMALL, CONFIGS["llama"]):
        model = opinionated(replace(config, num_layers=1))  # a single causal layer sees a set, without positions
        a, b = (model(t.tensor([ids]))[0, -1].detach().numpy() for ids in ([1, 2, 3], [2, 1, 3]))
        assert np.abs(a - b).max() > 1e-3


def test_gradients_of_a_small_gpt_are_finite_differences() -> None:
    config = m.GPTConfig(5, 4, 1, 2, 4)
    model, ids = opinionated(config).to("float64"), t.tensor([[0, 3, 1, 4], [2, 2, 0, 1]])
    assert gradcheck(lambda *_: m.next_token_loss(model(ids), ids), list(model.parameters()))


def test_initial_values_are_those_of_gpt2() -> None:
    t.manual_seed(0)
    model = m.GPT(m.GPTConfig(200, 32, 8, 2, 64))
    for name, parameter in model.named_parameters():
        values = parameter.numpy()
        if name.endswith("bias"):
            assert not values.any()
        elif values.ndim == 1:
            assert (values == 1).all()
        else:
            expected = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert values.std() == pytest.approx(expected, rel=0.1), name


def test_targets_of_minus_100_are_left_out() -> None:
    scores, ids = t.randn(2, 3, 5), t.tensor([[1, 2, -100], [-100, 0, 4]])
    rows = scores.numpy()
    logs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    expected = -np.mean([logs[0, 0, 1], logs[0, 1, 2], logs[1, 1, 0], logs[1, 2, 4]])
    assert m.next_token_loss(scores, ids).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("ids", "words"), [
    (t.zeros(1, 9, dtype="int64"), r"T from 1 to 8, got int64 \(1, 9\)"),
    (t.zeros(1, 0, dtype="int64"), r"got int64 \(1, 0\)"),
    (t.zeros(3, dtype="int64"), r"got int64 \(3,\)"),
    (t.zeros(1, 3), "got float32"),
])  # fmt: skip
def test_ids_that_do_not_fit_are_named(ids: t.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        m.GPT(SMALL)(ids)


def test_a_configuration_that_cannot_be_built_is_named() -> None:
    for wrong, words in (
        ({"vocab_size": 0}, "vocab_size must be a whole number >= 1, got 0"),
        ({"embed_dim": 8.0}, "embed_dim must be a whole number"),
        ({"mlp": "tanh"}, "mlp must be one of gelu, gelu_tanh, relu, silu, swiglu, got 'tanh'"),
        ({"positions": "alibi"}, "positions must be one of learned, rotary"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(SMALL, **wrong)
    with pytest.raises(ValueError, match="do not divide evenly"):
        m.GPT(replace(SMALL, num_heads=3))


# -- norms -------------------------------------------------------------------------------------------------------------


def test_half_precision_norms_add_up_in_single() -> None:
    x = (t.randn(4, 512) * 100).to("float16")
    for function in (m.layer_norm, m.rms_norm):
        ours, exact = function(x, (512,)), function(x.to("float64"), (512,))
        assert ours.dtype == "float16"
        np.testing.assert_allclose(ours.numpy(), exact.numpy(), atol=4e-3)


def test_norms_over_several_axes_and_of_small_numbers() -> None:
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    expected = (x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(m.layer_norm(t.tensor(x), (4, 5)).numpy(), expected, rtol=1e-12)
    for dtype, scale, eps in (("float32", 1e-3, 2.0**-23), ("float64", 1e-8, 2.0**-52)):
        small = (x * scale).astype(dtype)
        expected = small / np.sqrt((small.astype("float64") ** 2).mean(-1, keepdims=True) + eps)
        np.testing.assert_allclose(m.rms_norm(t.tensor(small), (5,)).numpy(), expected, rtol=1e-5)


def test_the_first_transformers_block_normalises_its_sums() -> None:
    block, x = m.TransformerBlock(replace(SMALL, norm_first=False)), t.randn(2, 5, 8)
    middle = block.norm1(x + block.attention(x))
    expected = block.norm2(middle + block.mlp(middle))
    np.testing.assert_allclose(block(x).detach().numpy(), expected.detach().numpy(), rtol=1e-6)


def test_norms_show_what_they_are_and_have_pytorchs_states() -> None:
    assert repr(nn.LayerNorm(5)) == "LayerNorm((5,), eps=1e-05, elementwise_affine=True, bias=True)"
    assert repr(nn.RMSNorm((2, 3))) == "RMSNorm((2, 3), eps=None, elementwise_affine=True)"
    assert list(nn.LayerNorm(5).state_dict()) == ["weight", "bias"]
    assert list(nn.LayerNorm(5, bias=False).state_dict()) == ["weight"]
    assert list(nn.LayerNorm(5, elementwise_affine=False).state_dict()) == []
    assert list(nn.RMSNorm(5).state_dict()) == ["weight"]
