"""Module 13 beyond its own tests: blocks, precision, memory, masks, and PyTorch's layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import tinytorch as t
import tinytorch.m13_attention as m
from tinytorch import nn
from tinytorch.autograd import gradcheck, gradgradcheck
from tinytorch.m13_attention_appendix import MultiheadAttention, cached_attention


def inputs(*lead: int, queries: int = 7, keys: int = 9, features: int = 4, dtype: str = "float64") -> list[t.Tensor]:
    return [t.randn(*lead, n, features, dtype=dtype) for n in (queries, keys, keys)]


MASKS: dict[str, Any] = {
    "none": lambda: None,
    "bool": lambda: t.randn(7, 9) > 0,
    "bool of a batch": lambda: t.randn(2, 1, 7, 9) > 0,
    "padding": lambda: m.padding_mask([4, 9]),
    "floats": lambda: t.randn(3, 7, 9, dtype="float64"),
    "minus infinity": lambda: t.where(t.randn(7, 9, dtype="float64") > 1, -math.inf, 0.5),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("block", [1, 60, 1 << 19])
def test_any_number_of_blocks_gives_the_readable_result(
    kind: str, is_causal: bool, block: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(m, "BLOCK", block)
    t.manual_seed(block + is_causal)
    query, key, value = (x.requires_grad_() for x in inputs(2, 3))
    mask = MASKS[kind]()
    readable = m.attention_weights(query, key, mask, is_causal) @ value
    fused = m.attention(query, key, value, mask, is_causal=is_causal)[0]
    np.testing.assert_allclose(fused.detach().numpy(), readable.detach().numpy(), rtol=1e-12, atol=1e-12)
    g = t.randn(*fused.shape, dtype="float64")
    expected = t.autograd.grad(readable, [query, key, value], g)
    for ours, theirs in zip(t.autograd.grad(fused, [query, key, value], g), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("queries", [5, 9, 12])
def test_causal_with_fewer_or_more_queries_than_keys(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "BLOCK", 90)
    query, key, value = inputs(2, queries=queries)
    expected = m.attention_weights(query, key, m.causal_mask(queries, 9)) @ value
    fused = m.attention(query, key, value, is_causal=True)[0]
    np.testing.assert_allclose(fused.numpy(), expected.numpy(), rtol=1e-12, atol=1e-12)


def test_second_derivatives_through_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "BLOCK", 8)
    given = [x.requires_grad_() for x in inputs(queries=3, keys=4, features=2)]
    bias = t.randn(3, 4, dtype="float64", requires_grad=True)
    assert gradcheck(lambda *x: m.attention(*x, is_causal=True)[0], [*given, bias])
    assert gradgradcheck(lambda *x: m.attention(*x)[0], [*given, bias])


def test_a_query_that_sees_nothing_takes_nothing_and_gives_no_gradient() -> None:
    query, key, value = (x.requires_grad_() for x in inputs(queries=2, keys=3))
    for mask in (t.tensor([[False] * 3, [True] * 3]), t.tensor([[-math.inf] * 3, [0.0] * 3], dtype="float64")):
        for function in (t.nn.functional.scaled_dot_product_attention,
                         lambda q, k, v, mask: m.attention_weights(q, k, mask) @ v):  # fmt: skip
            out = function(query, key, value, mask)
            assert out[0].tolist() == [0.0] * 4
            assert (out[1] != 0).all()
            found = t.autograd.grad(out.sum(), [query, key, value])
            assert all(np.isfinite(g.numpy()).all() for g in found)
            assert found[0][0].tolist() == [0.0] * 4


def test_large_scores_do_not_overflow_and_nan_is_not_hidden() -> None:
    query, key, value = (x.to("float32") for x in inputs())
    big = m.attention(query * 1e4, key * 1e4, value)[0].numpy()
    assert np.isfinite(big).all()
    value.data[0, 0] = math.nan
    assert np.isnan(m.attention(query, key, value)[0].numpy()[:, 0]).all()


def test_half_precision_adds_up_in_single() -> None:
    exact = inputs(2, queries=64, keys=256, features=16)
    halves = [x.to("float16") for x in exact]
    out, largest, total = m.attention(*halves)
    assert (out.dtype, largest.dtype, total.dtype) == ("float16", "float32", "float32")
    expected = m.attention(*(x.to("float64") for x in halves))[0]
    np.testing.assert_allclose(out.numpy(), expected.numpy(), atol=1e-3)
    leaf = halves[0].requires_grad_()
    m.attention(leaf, *halves[1:])[0].sum().backward()
    assert leaf.grad.dtype == "float16"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_mask_of_the_lowest_floats_hides_nothing_where_nothing_else_is_seen(dtype: str) -> None:
    """As Hugging Face writes masks: then all are equally bad, and the mean is taken."""
    lowest = float(np.finfo(dtype).min)
    query, key, value = (x.to(dtype).requires_grad_() for x in inputs(queries=2, keys=4))
    mask = t.tensor([[lowest] * 4, [lowest, 0.0, 0.0, lowest]], dtype=dtype)
    for function in (m.scaled_dot_product_attention,
                     lambda *x: m.attention_weights(x[0], x[1], x[3]) @ x[2]):  # fmt: skip
        out = function(query, key, value, mask)
        np.testing.assert_allclose(out[0].detach().numpy(), value.detach().numpy().mean(0), rtol=2e-3, atol=2e-3)
        (g,) = t.autograd.grad(out[0].sum(), [value])
        np.testing.assert_allclose(g.numpy(), 0.25, rtol=1e-3)


def test_half_precision_rows_that_see_nothing() -> None:
    query, key, value = (x.to("float16").requires_grad_() for x in inputs(queries=2, keys=3))
    mask = t.tensor([[False] * 3, [True] * 3])
    out = m.attention_weights(query, key, mask) @ value
    assert out[0].tolist() == [0.0] * 4
    assert all(np.isfinite(g.numpy()).all() for g in t.autograd.grad(out.sum(), [query, key, value]))


def test_nobody_asks_or_there_is_nothing_to_see() -> None:
    none, some = t.randn(2, 0, 4, requires_grad=True), t.randn(2, 3, 4, requires_grad=True)
    assert m.scaled_dot_product_attention(none, some, some).shape == (2, 0, 4)
    out = m.scaled_dot_product_attention(some, none, none)
    assert out.tolist() == [[[0.0] * 4] * 3] * 2
    out.sum().backward()
    assert (some.grad.numpy() == 0).all()
    assert none.grad.shape == (2, 0, 4)


def test_a_mask_of_one_axis_hides_keys_and_grouped_queries_need_heads() -> None:
    query, key, value = inputs(2)
    mask = t.tensor([True] * 5 + [False] * 4)
    expected = m.scaled_dot_product_attention(query, key[:, :5], value[:, :5])
    np.testing.assert_allclose(m.scaled_dot_product_attention(query, key, value, mask).numpy(), expected.numpy())
    with pytest.raises(ValueError, match=r"enable_gqa is for \(…, H, T, D\)"):
        m.scaled_dot_product_attention(query[0], key[0], value[0], enable_gqa=True)


@pytest.mark.slow
def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    def peak(length: int) -> int:
        given = [t.randn(1, 4, length, 16, requires_grad=True) for _ in range(3)]
        return m.peak_bytes(lambda: m.scaled_dot_product_attention(*given, is_causal=True).sum().backward())

    peak(1024)  # the first call compiles kernels
    assert peak(4096) < 6 * peak(1024)  # four times as long; the weights alone would be 16 times as many


def test_dropout_falls_on_the_weights() -> None:
    t.manual_seed(0)
    query, key, value = inputs(2, dtype="float32")
    dropped = t.nn.functional.scaled_dot_product_attention(query, key, t.ones(*value.shape), dropout_p=0.5)
    assert dropped.std().item() > 0.1  # without dropout every weighted mean of ones is 1
    assert abs(np.mean([
        t.nn.functional.scaled_dot_product_attention(query, key, t.ones(*value.shape), dropout_p=0.5).mean().item()
        for _ in range(60)
    ]) - 1) < 0.05  # fmt: skip


def test_causal_and_padding_masks_on_a_device(device: str) -> None:
    mask = m.causal_mask(3) & m.padding_mask([2, 3])
    assert mask.shape == (2, 1, 3, 3)
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, False]]
    assert m.padding_mask([1], longest=3)[0, 0].tolist() == [[True, False, False]]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_queries_are_repeated_keys(kv_heads: int) -> None:
    query = t.randn(2, 4, 5, 3, dtype="float64")
    key, value = (t.randn(2, kv_heads, 5, 3, dtype="float64") for _ in range(2))
    repeated = [x.repeat_interleave(4 // kv_heads, 1) for x in (key, value)]
    for mask in (None, t.randn(4, 5, 5, dtype="float64"), t.randn(2, 1, 5, 5) > 0, t.randn(5, 5) > -1):
        ours = m.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        expected = m.scaled_dot_product_attention(query, *repeated, mask)
        np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=1e-12, atol=1e-12)


def test_self_attention_refuses_what_does_not_divide() -> None:
    for arguments in ((10, 4), (8, 0), (8, 4, 3)):
        with pytest.raises(ValueError, match=r"SelfAttention: .* do not divide evenly"):
            m.SelfAttention(*arguments)
    assert "num_heads=4, num_kv_heads=2, head_dim=2, is_causal=True" in repr(m.SelfAttention(8, 4, 2))
    wide = m.SelfAttention(8, 2, head_dim=6, bias=False)
    assert (wide.qkv.weight.shape, wide.out.weight.shape, wide.out.bias) == ((36, 8), (8, 12), None)


# -- PyTorch's layer ---------------------------------------------------------------------------------------------------


def test_multihead_attention_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads, got 10 features and 4 heads"):
        nn.MultiheadAttention(10, 4)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = t.randn(3, 5, 8)
    for call, words in (
        (lambda: layer(x, x, t.randn(3, 5, 7)), r"\(B, T, C\) or \(T, C\) with 8, 8 and 8 features, got shapes"),
        (lambda: layer(x, t.randn(2, 5, 8), t.randn(2, 5, 8)), "must have the same batch"),
        (lambda: layer(x, x, t.randn(3, 6, 8)), "key and value the same length"),
        (lambda: layer(x, x, x, attn_mask=t.randn(5, 4) > 0), r"attn_mask must have shape \(5, 5\) or \(6, 5, 5\)"),
        (lambda: layer(x, x, x, key_padding_mask=t.randn(5, 3) > 0), r"key_padding_mask must have shape \(3, 5\)"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_multihead_attention_is_causal_without_a_mask_too() -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), t.randn(3, 5, 8)
    hidden = ~m.causal_mask(5)
    for need_weights in (True, False):
        ours = layer(x, x, x, is_causal=True, need_weights=need_weights)[0]
        expected = layer(x, x, x, attn_mask=hidden, need_weights=need_weights)[0]
        np.testing.assert_allclose(ours.detach().numpy(), expected.detach().numpy(), atol=1e-6)


def test_one_product_serves_all_three_where_they_are_one_sequence() -> None:
    layer, x = MultiheadAttention(8, 2), t.randn(5, 3, 8)
    np.testing.assert_allclose(
        layer(x, x, x)[0].detach().numpy(), layer(x, x.clone(), x.clone())[0].detach().numpy(), atol=1e-6
    )


def test_self_attention_drops_while_training_only_and_turns_keys_too() -> None:
    rotary = nn.RotaryEmbedding(4, 8)
    layer, x = m.SelfAttention(8, 2, dropout=0.5, rotary=rotary), t.randn(1, 6, 8)
    assert np.abs((layer(x) - layer(x)).detach().numpy()).max() > 1e-3
    layer.eval()
    np.testing.assert_array_equal(layer(x).detach().numpy(), layer(x).detach().numpy())
    query, key, value = layer.heads(x)
    layer.rotary = None
    plain = layer.heads(x)
    for turned, other in ((query, rotary(plain[0])), (key, rotary(plain[1])), (value, plain[2])):
        np.testing.assert_array_equal(turned.detach().numpy(), other.detach().numpy())


def test_multihead_attention_with_both_masks_and_more_keys() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    x = t.randn(3, 5, 8)
    hidden, padding = ~m.causal_mask(5), ~m.padding_mask([2, 5, 4])[:, 0, 0]
    out, weights = layer(x, x, x, attn_mask=hidden, key_padding_mask=padding, average_attn_weights=False)
    assert (out.shape, weights.shape) == ((3, 5, 8), (3, 2, 5, 7))
    seen = weights.detach().numpy() > 0
    expected = ~(hidden.numpy()[None] | padding.numpy()[:, None])
    np.testing.assert_array_equal(seen[..., :5], np.broadcast_to(expected[:, None], (3, 2, 5, 5)))
    assert seen[..., 5:].all()  # what is put behind the keys is seen by all
    mean = layer(x, x, x, attn_mask=hidden, key_padding_mask=padding)[1]
    np.testing.assert_allclose(mean.detach().numpy(), weights.detach().numpy().mean(1), rtol=1e-6)
    turned = nn.MultiheadAttention(8, 2)
    turned.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("bias")})
    assert turned(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].shape == (5, 3, 8)


# -- one new token -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_text_that_grows_gives_what_causal_attention_gives(device: str, dtype: str) -> None:
    query, key, value = (t.randn(2, heads, 5, 3, dtype=dtype) for heads in (4, 2, 2))
    expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    kept = [x.clone() for x in (key, value)]
    for x in kept:
        x[:, :, 1:] = math.nan  # not filled yet
    for place in range(5):
        for x, whole in zip(kept, (key, value), strict=True):
            x[:, :, place] = whole[:, :, place]
        found = cached_attention(query[:, :, place], *kept, t.tensor([place + 1] * 2))
        np.testing.assert_allclose(found.numpy(), expected[:, :, place].numpy(), rtol=1e-5, atol=1e-6)


def test_gradients_of_a_cache_that_is_partly_filled() -> None:
    query, key, value = (t.randn(*shape, dtype="float64") for shape in ((2, 4, 3), (2, 2, 5, 3), (2, 2, 5, 2)))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    lengths = t.tensor([2, 5])
    assert gradcheck(lambda *x: cached_attention(*x, lengths, scale=0.3), inputs)
    cached_attention(*inputs, lengths).sum().backward()
    assert (key.grad[0, :, 2:] == 0).all()
    assert (value.grad[0, :, :2] != 0).all()
