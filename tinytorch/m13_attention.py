"""Module 13: attention, or how each place of a sequence chooses what it takes from the others.

Learning objectives. After this module you can
1. compute attention by hand, and say what queries, keys and values are for;
2. keep a place from seeing what comes after it, or what is only padding;
3. derive attention's gradient, and do without the matrix of all pairs that it seems to need;
4. split a layer into heads, and let several heads share their keys and values;
5. say what attention costs in time and memory as sequences grow, and measure it.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import tinytorch.m06_autograd_appendix  # noqa: F401 - the rules of 02's appendix
from tinytorch.m01_setup import assert_close, manual_seed, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import (
    Tensor,
    bool_,
    concatenate,
    float64,
    getitem,
    matmul,
    mul,
    op,
    permute,
    randn,
    reshape,
    tensor,
    transpose,
    unsqueeze,
    where,
    zeros,
)
from tinytorch.m02_tensor import sum as total_of
from tinytorch.m02_tensor_appendix import arange, broadcast_shapes
from tinytorch.m03_activations import softmax
from tinytorch.m04_layers import Linear, Module, dropout
from tinytorch.m06_autograd import gradcheck, gradient, no_grad
from tinytorch.m09_spatial import widened
from tinytorch.m12_embeddings import RotaryEmbedding

# %% [markdown]
# ## Mathematical foundations
#
# A sequence is a tensor (T, C): T places, each a vector. **Attention** (Vaswani and others, 2017) lets each place ask a
# question, its *query* $q_t$; every place offers a *key* $k_s$ and a *value* $v_s$. The better a key answers a query,
# the more of its value is taken:
#
# $$\mathrm{out}_t = \sum_s w_{ts} v_s, \qquad w_{ts} = \frac{e^{z_{ts}}}{\sum_r e^{z_{tr}}}, \qquad
# z_{ts} = \frac{q_t \cdot k_s}{\sqrt D} + m_{ts}.$$
#
# The product of two random vectors of length $D$ has the standard deviation $\sqrt D$; divided by it, scores stay where
# a softmax is neither flat nor certain. The *mask* $m$ is $-\infty$ where a place must not look. A *causal* mask hides
# the future, $m_{ts} = -\infty$ for $s > t$, so that all places of a text can learn to guess their next token at once.
#
# **Backwards**, with $g$ the gradient of out, and $M_t = \max_s z_{ts}$ and $S_t = \sum_s e^{z_{ts} - M_t}$ kept from
# the way forward:
#
# $$w_{ts} = e^{z_{ts} - M_t} / S_t, \quad \frac{\partial L}{\partial v_s} = \sum_t w_{ts} g_t, \quad
# \frac{\partial L}{\partial z_{ts}} = w_{ts} (g_t \cdot v_s - g_t \cdot \mathrm{out}_t),$$
#
# and the gradients of $q$ and $k$ are those of a matrix product. The weights need not be kept: two numbers a query
# give them back. That is what makes attention's memory grow with $T$ and not with $T^2$ (Dao and others, 2022).
#
# **Heads**: $H$ attentions side by side, each on its own $D = C / H$ numbers of every place. All weights are $H T^2$
# numbers, and the two products take $4 T^2 C$ operations, beside $8 T C^2$ for making queries, keys, values and the
# output.

# %% [markdown]
# ## Implementation
#
# ### Masks
# A mask says who may look where: `True` at (t, s) if query t sees key s. It broadcasts over batch and heads. A mask of
# floats is added to the scores instead.


# %%
def causal_mask(queries: int, keys: int | None = None, device: str | None = None) -> Tensor:
    """(T, S), True where s <= t: each place sees itself and what came before it. S is T unless given."""
    keys = queries if keys is None else keys
    return reshape(arange(queries, device=device), shape=(-1, 1)) >= arange(keys, device=device)


def padding_mask(lengths: Sequence[int], longest: int | None = None, device: str | None = None) -> Tensor:
    """(B, 1, 1, S), True at the first lengths[b] places of row b: what is behind them is padding, which nobody sees."""
    places = arange(max(lengths) if longest is None else longest, device=device)
    return reshape(places < tensor(list(lengths), device=device).reshape(-1, 1), shape=(len(lengths), 1, 1, -1))


def test_masks_say_who_sees_whom() -> None:
    assert causal_mask(2, 3).tolist() == [[True, False, False], [True, True, False]]
    assert padding_mask([1, 3])[:, 0, 0].tolist() == [[True, False, False], [True, True, True]]


# %% [markdown]
# ### The readable attention
# The formula in the operations of earlier modules. It makes the matrix of all weights, which one can look at, and which
# has rules of every order. A row that sees nothing has only zeros: there is nothing that it could take.


# %%
def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """How much of each value each query takes: (…, T, D) and (…, S, D) give (…, T, S), whose rows add up to 1."""
    dtype = query.dtype
    if dtype.itemsize < 4:  # in half precision, scores may overflow
        query, key = query.to("float32"), key.to("float32")
    scores = matmul(query * (query.shape[-1] ** -0.5 if scale is None else scale), transpose(key, -2, -1))
    allowed = causal_mask(scores.shape[-2], scores.shape[-1], scores.device) if is_causal else None
    if mask is not None:
        seen = mask if mask.dtype == bool_ else mask > -math.inf
        scores = scores if mask.dtype == bool_ else scores + where(seen, mask, 0.0)
        allowed = seen if allowed is None else allowed & seen
    if 0 in scores.shape:
        return scores.to(dtype)
    if allowed is None:
        return softmax(scores, dim=-1).to(dtype)
    nothing = where(allowed.sum(-1, keepdim=True) > 0, -math.inf, 0.0)  # a row of minus infinities would give nan
    return mul(softmax(where(allowed, scores, nothing), dim=-1), allowed.to(scores.dtype)).to(dtype)


def test_a_query_takes_what_its_key_offers() -> None:
    key, value = tensor([[1.0, 0.0], [0.0, 1.0]]) * 50, tensor([[1.0, 2.0], [3.0, 4.0]])
    assert_close(matmul(attention_weights(key, key), value), value)  # each finds its own
    assert_close(attention_weights(key * 0, key), [[0.5, 0.5]] * 2)  # a query of zeros asks nothing
    assert_close(attention_weights(key * 0, key, is_causal=True), [[1, 0], [0.5, 0.5]])
    assert_close(attention_weights(key, key, tensor([[False, False], [True, True]])), [[0, 0], [0, 1]])
    assert_close(attention_weights(tensor([[2.0] * 4]), tensor([[0.25] * 4, [0.0] * 4]))[0, 0], 1 / (1 + math.exp(-1)))


# %% [markdown]
# ### Without the matrix of all pairs
# The same by one operation that goes through the queries in blocks. A block makes the scores of a few queries, and
# drops them. Two more things are won: a block of early queries does not multiply with the keys that a causal mask hides
# from it, and where all scores fit in the cache anyway there is a single block.

# %%
BLOCK = 1 << 19  # scores in a block


def score_blocks(xp: Any, query: Any, key: Any, mask: Any, is_causal: bool, scale: float) -> Iterator[tuple]:
    """(rows, seen, scores) for some queries at a time: their slice, how many keys they see, and their scores."""
    lead, (queries, keys) = broadcast_shapes(query.shape[:-2], key.shape[:-2]), (query.shape[-2], key.shape[-2])
    step = max(1, BLOCK // max(1, math.prod(lead) * keys))
    if mask is not None:
        if xp.dtype_name(mask) == "bool":
            mask = xp.where(mask, *(xp.asarray(value, dtype=query.dtype) for value in (0.0, -math.inf)))
        mask = xp.broadcast_to(xp.cast(mask, xp.dtype_name(query)), (*mask.shape[:-2], queries, keys))
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        seen = min(rows.stop, keys) if is_causal else keys
        scores = xp.matmul(query[..., rows, :] * scale, transposed(xp, key[..., :seen, :]))
        if is_causal and start < seen:  # among the keys before the block's own, nothing is hidden
            hidden = xp.full((rows.stop - start, seen - start), -math.inf, dtype=scores.dtype)
            scores[..., start:] += xp.triu(hidden, k=1)
        yield rows, seen, scores if mask is None else scores + mask[..., rows, :seen]


def transposed(xp: Any, x: Any) -> Any:
    """The last two axes exchanged."""
    return xp.permute_dims(x, (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


@op
def attention(xp, query, key, value, mask=None, *, is_causal=False, scale=None):
    """softmax(scale query keyᵀ + mask) value, and for each query its largest score and the sum that it divides by.

    (…, T, D), (…, S, D) and (…, S, E) give (…, T, E) and twice (…, T, 1), leading axes broadcast. See
    `scaled_dot_product_attention`.
    """
    check_shapes(xp, query, key, value, mask)
    dtype, scale = xp.dtype_name(value), query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (widened(xp, x) for x in (query, key, value))
    if 0 in (query.shape[-2], key.shape[-2]):  # nobody asks, or there is nothing to see
        lead = (*broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2]), query.shape[-2])
        out, largest = (xp.zeros((*lead, n), dtype=query.dtype) for n in (value.shape[-1], 1))
        return xp.cast(out, dtype), largest, xp.ones((*lead, 1), dtype=query.dtype)
    parts: tuple[list, list, list] = ([], [], [])
    for _, seen, scores in score_blocks(xp, query, key, mask, is_causal, scale):
        largest = xp.max(scores, axis=-1, keepdims=True)
        largest = xp.where(largest > -math.inf, largest, 0.0)  # finite also in a row that sees nothing
        weights = xp.exp(scores - largest)
        total = xp.sum(weights, axis=-1, keepdims=True)
        total = xp.where(total == 0, 1.0, total)  # 0 / 1 is 0
        for part, found in zip(parts, (xp.matmul(weights, value[..., :seen, :]) / total, largest, total), strict=True):
            part.append(found)
    out, largest, total = (part[0] if len(part) == 1 else xp.concat(part, axis=-2) for part in parts)
    return xp.cast(out, dtype), largest, total


def check_shapes(xp: Any, query: Any, key: Any, value: Any, mask: Any) -> None:
    """ValueError or TypeError unless the inputs of `attention` belong together."""
    shapes = f"(query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)})"
    if min(query.ndim, key.ndim, value.ndim) < 2 or query.shape[-1] == 0:
        raise ValueError(f"attention: expected (…, T, D), (…, S, D) and (…, S, E), D above 0 {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"attention: queries have {query.shape[-1]} features, but keys {key.shape[-1]} {shapes}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"attention: there are {key.shape[-2]} keys, but {value.shape[-2]} values {shapes}")
    kinds = {xp.dtype_name(x) for x in (query, key, value)}
    if len(kinds) > 1 or not xp.is_floating(query):
        raise TypeError(f"attention: query, key and value must be floats of one dtype, got {', '.join(sorted(kinds))}")
    if mask is not None:
        pairs, kind = (query.shape[-2], key.shape[-2]), xp.dtype_name(mask)
        if mask.ndim < 2 or any(n not in (1, m) for n, m in zip(mask.shape[-2:], pairs, strict=True)):
            raise ValueError(f"attention: the mask must broadcast to (…, {pairs[0]}, {pairs[1]}), got {mask.shape}")
        if kind != "bool" and not xp.is_floating(mask):
            raise TypeError(f"attention: a mask is of booleans (True: is seen) or of floats (are added), got {kind}")


# %% [markdown]
# Backwards in the same blocks. One operation makes all gradients, because they share the weights and the slopes of the
# scores; so its rule is one rule for all inputs together, and returns a gradient for each.


# %%
@op
def attention_gradients(
    xp, g, query, key, value, mask, out, largest, total, *, is_causal=False, scale=None, mask_gradient=False
):  # fmt: skip
    """The gradients of `attention` carried to query, key and value, and to the mask if it is asked for."""
    dtype, scale = xp.dtype_name(g), query.shape[-1] ** -0.5 if scale is None else scale
    g, query, key, value, out = (widened(xp, x) for x in (g, query, key, value, out))
    lead = out.shape[:-2]
    to_query, to_key, to_value = (xp.zeros((*lead, *x.shape[-2:]), dtype=g.dtype) for x in (query, key, value))
    to_mask = xp.zeros((*lead, query.shape[-2], key.shape[-2]), dtype=g.dtype) if mask_gradient else None
    g = g / total  # here, and not where the weights are divided: g is smaller than they are
    taken = xp.sum(g * out, axis=-1, keepdims=True)
    for rows, seen, scores in score_blocks(xp, query, key, mask, is_causal, scale):
        weights, here = xp.exp(scores - largest[..., rows, :]), g[..., rows, :]  # the weights times total
        slopes = xp.matmul(here, transposed(xp, value[..., :seen, :]))
        slopes -= taken[..., rows, :]
        slopes *= weights
        to_query[..., rows, :] = xp.matmul(slopes, key[..., :seen, :])
        to_key[..., :seen, :] += xp.matmul(transposed(xp, slopes), query[..., rows, :])
        to_value[..., :seen, :] += xp.matmul(transposed(xp, weights), here)
        if to_mask is not None:
            to_mask[..., rows, :seen] = slopes
    to_query *= scale
    to_key *= scale
    return tuple(xp.cast(x, dtype) for x in (to_query, to_key, to_value, to_mask) if x is not None)


def attention_rule(
    g: Any, query: Any, key: Any, value: Any, mask: Any, out: Any, extras: Any, position: tuple, is_causal: bool,
    scale: float | None,
) -> tuple:  # fmt: skip
    """By the fused operation; under create_graph the formula, in operations that have rules."""
    if extras is not None:
        to_mask = 3 in position
        given = (g, query, key, value, mask, out, *extras)
        gradients = attention_gradients(*given, is_causal=is_causal, scale=scale, mask_gradient=to_mask)
        return gradients if to_mask else (*gradients, None)
    weights = attention_weights(query, key, mask, is_causal, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    slopes = weights * (matmul(g, transpose(value, -2, -1)) - total_of(g * out, dim=-1, keepdim=True))
    to_key = matmul(transpose(slopes, -2, -1), query) * scale
    return matmul(slopes, key) * scale, to_key, matmul(transpose(weights, -2, -1), g), slopes


gradient(attention, together=attention_rule)
gradient(attention_gradients)


def test_the_fused_attention_is_the_readable_one() -> None:
    query, key, value = (randn(2, 3, n, 4, dtype=float64) for n in (5, 6, 6))
    for mask in (None, randn(5, 6, dtype=float64), randn(2, 1, 5, 6) > 0, padding_mask([0, 6])):
        for is_causal in (False, True):
            expected = matmul(attention_weights(query, key, mask, is_causal), value)
            assert_close(attention(query, key, value, mask, is_causal=is_causal)[0], expected)
    assert_close(attention(key * 1e4, key, value)[0], matmul(attention_weights(key * 1e4, key), value))


def test_gradients_of_attention() -> None:
    inputs = [randn(2, n, 3, dtype=float64).requires_grad_() for n in (4, 5, 5)]
    bias = randn(4, 5, dtype=float64).requires_grad_()
    assert gradcheck(lambda *x: attention(*x, is_causal=True)[0], [*inputs, bias])
    assert gradcheck(lambda *x: attention(*x, tensor([[True, False, True, True, False]]))[0], inputs)


def test_shapes_that_do_not_belong_together_are_named() -> None:
    query, key = zeros(2, 3, 4), zeros(2, 5, 4)
    assert "queries have 4 features, but keys 3" in message_of(attention, query, zeros(2, 5, 3), key, error=ValueError)
    assert "5 keys, but 6 values" in message_of(attention, query, key, zeros(2, 6, 4), error=ValueError)
    mask = tensor([[True] * 4] * 3)
    assert "broadcast to (…, 3, 5)" in message_of(attention, query, key, key, mask, error=ValueError)


# %% [markdown]
# ### What the user sees
# PyTorch's function. Dropout falls on the weights, so it needs them; everything else goes through the fused operation.
# With *grouped queries*, several query heads share one head of keys and values: an axis for the group, and broadcasting
# does the rest without a copy.


# %%
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(scale query keyᵀ + mask) value.

    Args:
        query, key, value: (…, T, D), (…, S, D) and (…, S, E), usually (B, H, T, D).
        attn_mask: broadcasts to (…, T, S). Booleans: True where a key is seen. Floats: are added to the scores.
        dropout_p: the share of the weights that becomes 0; whether one is training is for the caller to know.
        is_causal: query t sees the keys up to t only. May be given beside a mask; then both hold.
        scale: of the scores; 1 / sqrt(D) if None.
        enable_gqa: query may have a multiple of the heads (axis -3) that key and value have.

    Returns:
        (…, T, E); zeros for a query that sees nothing.
    """
    if attn_mask is not None and attn_mask.ndim == 1:
        attn_mask = unsqueeze(attn_mask, 0)
    if enable_gqa and min(query.ndim, key.ndim, value.ndim) < 3:
        raise ValueError("scaled_dot_product_attention: enable_gqa is for (…, H, T, D), with an axis of heads, got "
                         f"query {query.shape}, key {key.shape} and value {value.shape}")  # fmt: skip
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        heads, groups = query.shape[-3], key.shape[-3]
        if key.shape[-3] != value.shape[-3] or heads % groups:
            raise ValueError(f"scaled_dot_product_attention: {heads} query heads cannot share {groups} heads of keys "
                             f"and {value.shape[-3]} of values evenly")  # fmt: skip
        grouped = reshape(query, shape=(*query.shape[:-3], groups, heads // groups, *query.shape[-2:]))
        if attn_mask is not None and attn_mask.ndim > 2:
            per_head = attn_mask.shape[-3] > 1
            attn_mask = (reshape(attn_mask, shape=(*attn_mask.shape[:-3], groups, -1, *attn_mask.shape[-2:]))
                         if per_head else unsqueeze(attn_mask, -3))  # fmt: skip
        key, value = unsqueeze(key, -3), unsqueeze(value, -3)
        out = scaled_dot_product_attention(grouped, key, value, attn_mask, dropout_p, is_causal, scale)
        return reshape(out, shape=(*out.shape[:-4], heads, *out.shape[-2:]))
    if dropout_p:
        return matmul(dropout(attention_weights(query, key, attn_mask, is_causal, scale), dropout_p), value)
    return attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)[0]


def test_groups_share_keys_and_values() -> None:
    query, key, value = randn(2, 6, 5, 4), randn(2, 3, 5, 4), randn(2, 3, 5, 4)
    shared = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    for head in (0, 1, 5):
        alone = scaled_dot_product_attention(query[:, head], key[:, head // 2], value[:, head // 2], is_causal=True)
        assert_close(shared[:, head], alone, atol=1e-5)


# %% [markdown]
# ### Heads
# One head can look for one thing. A layer has several, each on a part of the features: split the last axis, and bring
# the heads before the places, (B, H, T, D). Neither moves a number, because both are views.


# %%
def split_heads(x: Tensor, heads: int) -> Tensor:
    """(…, T, H · D) as (…, H, T, D)."""
    lead = range(x.ndim - 2)
    x = reshape(x, shape=(*x.shape[:-1], heads, x.shape[-1] // heads))
    return permute(x, dims=(*lead, x.ndim - 2, x.ndim - 3, x.ndim - 1))


def merge_heads(x: Tensor) -> Tensor:
    """(…, H, T, D) as (…, T, H · D)."""
    x = permute(x, dims=(*range(x.ndim - 3), x.ndim - 2, x.ndim - 3, x.ndim - 1))
    return reshape(x, shape=(*x.shape[:-2], -1))


class SelfAttention(Module):
    """Attention of a sequence to itself: (B, T, embed_dim) to the same shape.

    Args:
        num_heads: heads of queries; num_kv_heads: heads of keys and values, which divide them; as many if None.
        head_dim: features of a head, embed_dim / num_heads if None.
        dropout: the share of the weights that is dropped while training.
        is_causal: whether a place sees only itself and what came before it.
        rotary: turns queries and keys by their places.

    Attributes:
        qkv: the linear layer that makes all queries, then all keys, then all values; out: the one behind the heads.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None,
        bias: bool = True, dropout: float = 0.0, is_causal: bool = True, rotary: RotaryEmbedding | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads or (head_dim is None and embed_dim % num_heads):
            raise ValueError(f"SelfAttention: {embed_dim} features, {num_heads} heads and {num_kv_heads} heads of keys "
                             "and values do not divide evenly")  # fmt: skip
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.dropout, self.is_causal, self.rotary = dropout, is_causal, rotary
        self.qkv = Linear(embed_dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias)
        self.out = Linear(num_heads * self.head_dim, embed_dim, bias)

    def heads(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of (B, T, embed_dim): each (B, its heads, T, head_dim).

        positions: (B, T), where the places stand that `rotary` turns; 0 … T - 1 if None.
        """
        qkv, heads, start = self.qkv(x), list[Tensor](), 0
        for count in (self.num_heads, self.num_kv_heads, self.num_kv_heads):
            stop = start + count * self.head_dim
            heads.append(split_heads(getitem(qkv, index=(..., slice(start, stop))), count))
            start = stop
        query, key, value = heads
        if self.rotary is not None:
            query, key = (self.rotary(x, positions=positions) for x in (query, key))
        return query, key, value

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` broadcasts to (B, H, T, T)."""
        query, key, value = self.heads(x)
        out = scaled_dot_product_attention(
            query, key, value, mask, self.dropout if self.training else 0.0, self.is_causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )  # fmt: skip
        return self.out(merge_heads(out))

    def extra_repr(self) -> str:
        shared = f", num_kv_heads={self.num_kv_heads}" if self.num_kv_heads != self.num_heads else ""
        return f"num_heads={self.num_heads}{shared}, head_dim={self.head_dim}, is_causal={self.is_causal}"


def test_heads_are_split_and_merged() -> None:
    x = randn(2, 5, 12)
    assert_close(split_heads(x, 3)[1, 2, 4], x[1, 4, 8:])
    assert_close(merge_heads(split_heads(x, 3)), x)


def test_the_future_has_no_influence() -> None:
    layer, x = SelfAttention(12, 4, num_kv_heads=2, rotary=RotaryEmbedding(3 + 1, 6), head_dim=4), randn(1, 6, 12)
    changed = x.clone()
    changed.data[:, 4:] += 1.0
    assert_close(layer(changed)[:, :4], layer(x)[:, :4])
    assert (layer(changed)[:, 4] - layer(x)[:, 4]).abs().max().item() > 1e-3


def test_each_head_is_an_attention_of_its_own() -> None:
    x, rotary = randn(1, 5, 6), RotaryEmbedding(2, 5)
    layer = SelfAttention(6, 3, rotary=rotary, is_causal=False)
    query, key, value = (layer.qkv(x)[0, :, start : start + 6] for start in (0, 6, 12))
    query, key = (rotary(each.reshape(5, 3, 2).transpose(0, 1)) for each in (query, key))
    seen = padding_mask([3], 5)[0, 0]
    heads = [matmul(attention_weights(query[h], key[h], seen), value[:, 2 * h : 2 * h + 2]) for h in range(3)]
    assert_close(layer(x, seen)[0], layer.out(concatenate(*heads, dim=1)), atol=1e-5)


# %% [markdown]
# ## Systems analysis
#
# The weights are T² numbers a head: at 64 places they are small beside everything else, at 4,096 they are a gigabyte
# for 16 heads of one sequence. The readable version makes several such matrices and keeps one for backward; the fused
# one has a block at a time and keeps two numbers a query. Both make T² products: memory is saved, arithmetic is not.


# %%
def peak_bytes(function: Callable[[], Any]) -> int:
    """How far the memory of arrays rises while a function runs. Counts NumPy's arrays."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - before


def readable(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return matmul(attention_weights(query, key, is_causal=True), value)


def analyze() -> None:
    """Measure time and memory of both versions, forward and backward, as sequences grow from 64 to 4,096 places."""
    heads, dim, rows = 4, 32, []
    fused = partial(scaled_dot_product_attention, is_causal=True)
    for length in (64, 256, 1024, 4096):
        inputs = [randn(1, heads, length, dim, requires_grad=True) for _ in range(3)]
        figures: list[Any] = []
        for function in (readable, fused):
            step = partial(lambda f, x: f(*x).sum().backward(), function, inputs)
            figures += [seconds(step, repeat=2) * 1e3, peak_bytes(step) / 1e6]
        rows.append([length, heads * length**2 * 4 / 1e6, *figures])
    print("4 heads of 32 features, forward and backward, in ms and MB:")
    print_table(["T", "the weights", "readable, ms", "MB", "in blocks, ms", "MB"], rows)
    print()
    rows = []
    for length in (64, 256, 1024):
        layer, x = SelfAttention(128, 4), randn(1, length, 128)
        with no_grad():
            query, key, value = layer.heads(x)
            inside, whole = seconds(lambda: fused(query, key, value)), seconds(layer, x)  # noqa: B023
        rows.append([length, 4 * length**2 * 128, 8 * length * 128**2, inside * 1e3, whole * 1e3])
    print_table(["T", "operations, attention", "operations, linear", "attention, ms", "the layer, ms"], rows)


# %% [markdown]
# ## Production context
#
# `torch.nn.functional.scaled_dot_product_attention` chooses among kernels: FlashAttention (one kernel that holds a
# block of scores in on-chip memory and keeps a running softmax over the keys too, so that no block has the full width),
# memory-efficient attention, and plain products. `torch.nn.MultiheadAttention` (in the appendix) is older and takes its
# masks the other way round: True hides. Serving engines (vLLM, TensorRT-LLM) keep keys and values of earlier tokens
# (module 19) and share them among heads, which is what grouped queries are for. Left out here: blocks over the keys,
# sparse and windowed patterns, and variable lengths packed without padding.

# %% [markdown]
# ## Integration testing


# %%
def test_attention_learns_to_look_back() -> None:
    from tinytorch.m05_losses import cross_entropy
    from tinytorch.m07_optimizers import Adam
    from tinytorch.m12_embeddings import Embedding

    manual_seed(0)
    tokens, places, layer, head = Embedding(5, 16), Embedding(8, 16), SelfAttention(16, 2), Linear(16, 5)
    parameters = [p for part in (tokens, places, layer, head) for p in part.parameters()]
    optimizer = Adam(parameters, lr=0.02)
    for _ in range(120):  # the answer at each place is the token before it
        ids = (randn(32, 8) * 100).floor().to("int64") % 5
        loss = cross_entropy(head(layer(tokens(ids) + places.weight))[:, 1:].reshape(-1, 5), ids[:, :-1].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2  # without looking back it stays at log 5 = 1.6


# %% [markdown]
# ## Thinking questions
#
# 1. Without positions, what happens to the output of unmasked attention if the places are shuffled? And of causal
#    attention?
# 2. The blocks here go over the queries. What must be kept to go over the keys as well, and what would be gained?
# 3. For which T does a layer spend more operations on attention than on its linear maps? On what does it depend?
# 4. Eight query heads share one head of keys and values. What becomes smaller: operations, parameters, or memory? When?

# %% [markdown]
# ## Summary
#
# Attention is a softmax of products between two products. Its gradient needs its output and two numbers a query; its
# cost is the square of the length in time, and need not be in memory. Module 14 puts it between two norms, beside a
# small network, and stacks that into a transformer.


if __name__ == "__main__":
    run_module(globals())
