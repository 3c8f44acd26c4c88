"""The rest of attention: for one new token, where earlier keys and values are kept; and PyTorch's layer, whose queries,
keys and values may come from different sequences."""

from __future__ import annotations

import math
from typing import Any

from tinytorch.backends import backend_of
from tinytorch.m02_tensor import Tensor, bool_, getitem, matmul, mean, op, reshape, transpose, unsqueeze, where, zeros
from tinytorch.m02_tensor import cat as joined
from tinytorch.m02_tensor_appendix import empty, pad
from tinytorch.m04_layers import Linear, Module, Parameter, dropout, linear, xavier_uniform_
from tinytorch.m04_layers_appendix import xavier_normal_, zeros_
from tinytorch.m06_autograd import gradient, raw
from tinytorch.m08_training import FULL
from tinytorch.m13_attention import attention, attention_rule, attention_weights, merge_heads, split_heads

FULL.update(
    ("attention", "cached_attention")
)  # kernels for them are of float32, and add up as no product of 16 bits does

# -- one new token -----------------------------------------------------------------------------------------------------


@op
def cached_attention(xp, query, key, value, lengths, *, scale=None):
    """`attention` of one new token of each sequence to what is kept of the sequence so far; zeros if that is nothing.

    query: (B, H, D). key, value: (B, G, capacity, D) and (B, G, capacity, E); H is a multiple of G, and H / G heads in
    a row share a head of keys and values. lengths: (B,) integers, how many of a sequence's places are filled; what lies
    behind them may be anything. Returns (B, H, E).
    """
    shapes = [tuple(x.shape) for x in (query, key, value, lengths)]
    if not caches(*shapes) or xp.is_floating(lengths):
        names = ("queries", "keys", "values", "lengths")
        raise ValueError("cached_attention: expected (B, H, D), (B, G, capacity, D), (B, G, capacity, E) and (B,) "
                         f"integers, H a multiple of G; got {dict(zip(names, shapes, strict=True))}")  # fmt: skip
    capacity = key.shape[2]
    if lengths.shape[0] and not 0 <= int(xp.min(lengths)) <= int(xp.max(lengths)) <= capacity:
        raise ValueError(f"cached_attention: lengths must be between 0 and {capacity}, got {lengths}")
    seen = filled(xp, lengths, capacity)
    key, value = (xp.where(seen, x, xp.zeros((), dtype=x.dtype)) for x in (key, value))
    grouped = xp.reshape(query, by_group(query.shape, key.shape))
    out = attention.function(xp, grouped, key, value, xp.permute_dims(seen, (0, 1, 3, 2)), scale=scale)[0]
    return xp.reshape(out, (*query.shape[:2], value.shape[-1]))


def caches(query: tuple, key: tuple, value: tuple, lengths: tuple) -> bool:
    """Whether shapes are those of `cached_attention`."""
    if (len(query), len(key), len(value), len(lengths)) != (3, 4, 4, 1):
        return False
    batch, groups, _, features = key
    agree = value[:3] == key[:3] and (query[0], query[2]) == (batch, features) and lengths == (batch,)
    return agree and groups > 0 and features > 0 and query[1] % groups == 0


def by_group(query: tuple, key: tuple) -> tuple[int, ...]:
    """(B, G, H / G, D): the shape of queries that stand by the keys that they share."""
    return *key[:2], query[1] // key[1], query[2]


def filled(xp: Any, lengths: Any, capacity: int) -> Any:
    """(B, 1, capacity, 1): whether a place of a cache is."""
    places = xp.reshape(xp.arange(capacity), (1, 1, capacity, 1))
    return places < xp.reshape(lengths, (-1, 1, 1, 1))


def cached_rule(g: Any, query: Any, key: Any, value: Any, lengths: Any, scale: float | None) -> tuple:
    """By the rule of `attention`, computed again: a cache is there to generate, where no gradients are wanted."""
    lengths, grouped = raw(lengths), by_group(query.shape, key.shape)
    seen = filled(backend_of(lengths), lengths, key.shape[2])
    if isinstance(g, Tensor):
        seen = Tensor(seen)
    asked, mask = reshape(query, shape=grouped), transpose(seen, -2, -1)
    key, value = where(seen, key, 0.0), where(seen, value, 0.0)
    out, *kept = attention(asked, key, value, mask, scale=scale)
    carried = reshape(g, shape=(*out.shape,))
    extras = None if isinstance(g, Tensor) else kept
    found = attention_rule(carried, asked, key, value, mask, out, extras, (0, 1, 2), False, scale)
    return reshape(found[0], shape=query.shape), found[1], found[2], None


gradient(cached_attention, together=cached_rule, lengths=None)

# -- PyTorch's layer ---------------------------------------------------------------------------------------------------


class MultiheadAttention(Module):
    """Several heads of attention between linear layers: each of `query` takes from `value` by what `key` offers.

    Args:
        embed_dim: features of the queries and of the result; num_heads: into how many heads they are split.
        dropout: the share of the weights that becomes 0 while training.
        bias: whether the linear layers have one.
        add_bias_kv: whether one more key and value stand behind the others, which are parameters.
        add_zero_attn: whether one more key and value of zeros stand behind them.
        kdim, vdim: features of keys and values; embed_dim if None.
        batch_first: whether sequences are (B, T, C), and not (T, B, C).

    Attributes:
        in_proj_weight: (3 embed_dim, embed_dim), what makes queries, keys and values; or, with kdim or vdim,
            q_proj_weight, k_proj_weight and v_proj_weight; in_proj_bias: (3 embed_dim,).
        out_proj: the linear layer behind the heads.
    """

    in_proj_weight: Any
    q_proj_weight: Any
    k_proj_weight: Any
    v_proj_weight: Any
    in_proj_bias: Any
    bias_k: Any
    bias_v: Any

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, add_bias_kv: bool = False,
        add_zero_attn: bool = False, kdim: int | None = None, vdim: int | None = None, batch_first: bool = False,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"MultiheadAttention: embed_dim must be a multiple of num_heads, got {embed_dim} features "
                             f"and {num_heads} heads")  # fmt: skip
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn

        def parameter(name: str, *shape: int, present: bool = True) -> None:
            made = Parameter(empty(shape, device=device, dtype=dtype)) if present else None
            self.register_parameter(name, made)

        together = self.kdim == self.vdim == embed_dim
        parameter("in_proj_weight", 3 * embed_dim, embed_dim, present=together)
        for name, features in (("q", embed_dim), ("k", self.kdim), ("v", self.vdim)):
            parameter(f"{name}_proj_weight", embed_dim, features, present=not together)
        parameter("in_proj_bias", 3 * embed_dim, present=bias)
        self.out_proj = Linear(embed_dim, embed_dim, bias, device=device, dtype=dtype)
        parameter("bias_k", 1, 1, embed_dim, present=add_bias_kv)
        parameter("bias_v", 1, 1, embed_dim, present=add_bias_kv)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                zeros_(bias)
        if self.bias_k is not None:
            xavier_normal_(self.bias_k)
            xavier_normal_(self.bias_v)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attend.

        Args:
            query: (T, B, embed_dim), with `batch_first` (B, T, embed_dim), or (T, embed_dim) without a batch; key and
                value likewise, with S places of kdim and vdim features.
            key_padding_mask: (B, S) or (S,). Booleans: True where a key is padding. Floats: are added to the scores.
            attn_mask: (T, S) or (B · num_heads, T, S). Booleans: True where a query must *not* look, which is the
                opposite of `scaled_dot_product_attention`. Floats: are added to the scores.
            need_weights: whether the weights are returned, which takes T · S numbers a head.
            is_causal: query t sees the keys up to t only; an `attn_mask` holds besides.

        Returns:
            The result, shaped as the query, and the weights (B, T, S), with `average_attn_weights=False` (B, num_heads,
            T, S), or None. A query that may look nowhere takes zeros.
        """
        query, key, value, alone = self._with_batch(query, key, value)
        if alone:
            key_padding_mask = None if key_padding_mask is None else unsqueeze(key_padding_mask, 0)
        query, key, value = self._projected(query, key, value)
        mask = self._merged(attn_mask, key_padding_mask, query, key)
        if self.bias_k is not None:
            key, value = (
                joined([x, b.expand(x.shape[0], 1, -1)], 1) for x, b in ((key, self.bias_k), (value, self.bias_v))
            )
        if self.add_zero_attn:
            key, value = pad(key, (0, 0, 0, 1)), pad(value, (0, 0, 0, 1))
        if mask is not None:  # what was put behind the keys is seen by all
            mask = pad(mask, (0, key.shape[1] - mask.shape[-1]), value=True if mask.dtype == bool_ else 0.0)
        query, key, value = (split_heads(x, self.num_heads) for x in (query, key, value))
        share = self.dropout if self.training else 0.0
        weights = attention_weights(query, key, mask, is_causal) if need_weights or share else None
        if weights is None:
            out = attention(query, key, value, mask, is_causal=is_causal)[0]
        else:
            weights = dropout(weights, share) if share else weights
            out = matmul(weights, value)
        out = self.out_proj(merge_heads(out))
        out = out if self.batch_first else transpose(out, 0, 1)
        if weights is not None:
            weights = None if not need_weights else mean(weights, dim=1) if average_attn_weights else weights
        if alone:
            out = reshape(out, shape=(-1, self.embed_dim))
            weights = None if weights is None else getitem(weights, index=0)
        return out, weights

    def _with_batch(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
        """The inputs as (B, T, C), and whether they came without a batch."""
        wanted = (self.embed_dim, self.kdim, self.vdim)
        shapes = [x.shape for x in (query, key, value)]
        if {len(shape) for shape in shapes} not in ({2}, {3}) or [shape[-1] for shape in shapes] != list(wanted):
            order = "(B, T, C)" if self.batch_first else "(T, B, C)"
            raise ValueError(f"MultiheadAttention: expected query, key and value {order} or (T, C) with {wanted[0]}, "
                             f"{wanted[1]} and {wanted[2]} features, got shapes {shapes}")  # fmt: skip
        alone = query.ndim == 2
        if not alone and not self.batch_first:
            shapes = [(shape[1], shape[0], shape[2]) for shape in shapes]
        if not alone and (len({shape[0] for shape in shapes}) > 1 or shapes[1][1] != shapes[2][1]):
            raise ValueError("MultiheadAttention: query, key and value must have the same batch, and key and value the "
                             f"same length, got (B, T, C) {shapes[0]}, {shapes[1]} and {shapes[2]}")  # fmt: skip
        turned = {}  # by identity: what is one tensor remains one
        for x in (query, key, value):
            turned[id(x)] = unsqueeze(x, 0) if alone else x if self.batch_first else transpose(x, 0, 1)
        return turned[id(query)], turned[id(key)], turned[id(value)], alone

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Through the linear layers: one product where all three are the same sequence."""
        size, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            out = linear(query, weight, bias)
            first, second, third = (getitem(out, index=(..., slice(i * size, (i + 1) * size))) for i in range(3))
            return first, second, third
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = tuple(getitem(weight, index=slice(i * size, (i + 1) * size)) for i in range(3))
        biases = [None if bias is None else getitem(bias, index=slice(i * size, (i + 1) * size)) for i in range(3)]
        return (linear(query, weights[0], biases[0]), linear(key, weights[1], biases[1]),
                linear(value, weights[2], biases[2]))  # fmt: skip

    def _merged(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, key: Tensor
    ) -> Tensor | None:
        """Both masks as one that `attention` takes: booleans, True where a key is seen, or floats to be added."""
        batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
        masks = []
        if attn_mask is not None:
            if attn_mask.shape not in ((queries, keys), (batch * self.num_heads, queries, keys)):
                raise ValueError(f"MultiheadAttention: attn_mask must have shape {(queries, keys)} or "
                                 f"{(batch * self.num_heads, queries, keys)}, got {attn_mask.shape}")  # fmt: skip
            if attn_mask.ndim == 3:
                attn_mask = reshape(attn_mask, shape=(batch, self.num_heads, queries, keys))
            masks.append(attn_mask)
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, keys):
                raise ValueError(f"MultiheadAttention: key_padding_mask must have shape {(batch, keys)}, got "
                                 f"{key_padding_mask.shape}")  # fmt: skip
            masks.append(reshape(key_padding_mask, shape=(batch, 1, 1, keys)))
        if all(mask.dtype == bool_ for mask in masks):
            masks = [~mask for mask in masks]
            return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]
        added = [
            where(m, -math.inf, zeros(1, dtype=query.dtype, device=query.device)) if m.dtype == bool_ else m
            for m in masks
        ]
        return added[0] if len(added) == 1 else added[0] + added[1]
