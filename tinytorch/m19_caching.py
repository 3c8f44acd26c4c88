"""Module 19: caching, or how to write a text without reading it again for each token.

Learning objectives. After this module you can
1. say what a network need not compute twice as it writes, and what it costs to keep that instead;
2. build a cache of keys and values that grows, forgets, and is shared by texts that begin alike;
3. show that a cached network gives the scores of the one that reads everything, to the last digits;
4. find out where the time of a token goes, and take what lies between the products out of it;
5. let a small network draft what a large one writes, without changing what it writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from tinytorch.backends import backend_of
from tinytorch.m01_setup import assert_close, manual_seed, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import Tensor, matmul, mean, mul, op, reshape, tensor, transpose, unsqueeze, zeros
from tinytorch.m02_tensor import cat as joined
from tinytorch.m02_tensor_appendix import Writes, arange, clamp, pad, randint, rsqrt
from tinytorch.m03_activations import silu
from tinytorch.m04_layers import Dropout, Linear, normal_
from tinytorch.m06_autograd import gradient, no_grad
from tinytorch.m08_training import evaluating
from tinytorch.m09_spatial import normalize
from tinytorch.m12_embeddings import RotaryEmbedding, embedding_lookup, rotate
from tinytorch.m13_attention import SelfAttention, merge_heads, scaled_dot_product_attention
from tinytorch.m13_attention_appendix import cached_attention
from tinytorch.m14_transformers import (
    ACTIVATIONS,
    GPT,
    MLP,
    GPTConfig,
    LayerNorm,
    RMSNorm,
    SwiGLU,
    TransformerBlock,
    attach_reader,
    check_choices,
    draw,
    llama_config,
    next_probabilities,
    reads_whole,
)
from tinytorch.m16_acceleration import kernels_enabled, reference_kernels

# %% [markdown]
# ## Mathematical foundations
#
# Token $t$ of a text asks all tokens before it, $\mathrm{out}_t = \sum_{s \le t} w_{ts} v_s$ (module 13). Nothing that
# comes later changes $k_s$ and $v_s$: in a causal network, what a place has computed stays. So one keeps them. To write
# $T$ tokens by reading everything again takes $\sum_t 2 N t \approx N T^2$ operations for $N$ weights; with a **cache**,
# $2 N T$, and $2 L T^2 C$ for attention, which alone still looks back.
#
# **What it costs.** Each token leaves a key and a value in each of $L$ layers, of $G$ heads and $D$ features:
#
# $$2 L G D \cdot (\text{bytes of a number})$$
#
# bytes a token. For a Llama of 8 billion weights ($L = 32$, $G = 8$, $D = 128$, 2 bytes) that is 128 KB: a text of
# 8,000 tokens takes a gigabyte. Grouped queries make $G$ small; a **sliding window** (Beltagy and others, 2020) keeps
# the last $W$ tokens only, whose keys and values take the places of those $W$ tokens ago, $s \bmod W$.
#
# **Where time goes.** One token uses each weight once: two operations for four bytes. On the roofline (module 16) that
# is where memory decides, and the time of a token is that of reading all weights, and the cache, once; *if* nothing
# else takes time. Reading $k$ tokens at once takes hardly longer than reading one.
#
# **Speculative decoding** (Leviathan and others, 2023; Chen and others, 2023) uses that. A small network drafts $k$
# tokens, drawn from its own $q$; the large one reads all of them at once and has its $p$ for each. A drafted $x$ is
# kept with probability $\min(1, p(x) / q(x))$; instead of the first that is not, one draws from $\max(0, p - q)$,
# divided by its sum. A token then comes with the probability
#
# $$q(x) \min(1, \tfrac{p(x)}{q(x)}) + \Bigl(1 - \sum_y \min(p(y), q(y))\Bigr) \frac{\max(0, p(x) - q(x))}
# {\sum_y \max(0, p(y) - q(y))} = p(x),$$
#
# because both sums are the same number: what is written is the large network's, whatever the small one drafts.

# %% [markdown]
# ## Implementation
#
# ### What is kept
# The arithmetic first: it decides how many texts a machine can write at once.


# %%
def bytes_per_token(config: GPTConfig, itemsize: int = 4) -> int:
    """What a cache keeps of each token: a key and a value in each layer, of numbers of `itemsize` bytes."""
    return 2 * config.num_layers * (config.num_kv_heads or config.num_heads) * config.head_size * itemsize


def test_what_a_token_leaves_behind() -> None:
    llama = llama_config(128_256, num_layers=32, num_heads=32, embed_dim=4096, num_kv_heads=8)
    assert bytes_per_token(llama, itemsize=2) == 128 * 1024
    assert bytes_per_token(GPTConfig(50_257)) == 73_728  # the smallest GPT-2


# %% [markdown]
# ### Where it is kept
# One array for all keys and one for all values, with an axis for layers, rows, heads, places and features. Places are
# made before they are needed, a block at a time: to append would copy everything for each token. With a window, places
# are used in a circle as soon as there is one for each of its tokens.


# %%
class Store:
    """Keys and values of some rows in every layer.

    Attributes:
        keys, values: (layers, rows, groups, capacity, features); token n of a row stands at place n % capacity.
        limit: how many places there are at the most; block: how many are made at a time.
    """

    def __init__(self, layers: int, groups: int, features: int, limit: int, block: int, like: Tensor) -> None:
        shape, kind = (layers, 0, groups, 0, features), {"dtype": like.dtype, "device": like.device}
        self.limit, self.block = limit, block
        self.keys, self.values = zeros(shape, **kind), zeros(shape, **kind)

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.dtype.itemsize

    def make_room(self, length: int) -> None:
        """Have a place for each token of rows of that length, as far as the limit allows."""
        if min(length, self.limit) > self.capacity:
            more = min(-(-length // self.block) * self.block, self.limit) - self.capacity
            self.keys, self.values = (pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))

    def take_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; one may be taken several times. There are empty ones if there were none."""
        if not self.keys.shape[1]:
            self.keys, self.values = (pad(x, (0, 0, 0, 0, 0, 0, 0, len(rows))) for x in (self.keys, self.values))
        elif list(rows) != list(range(self.keys.shape[1])):
            self.keys, self.values = (joined([x[:, i : i + 1] for i in rows], 1) for x in (self.keys, self.values))


def test_room_is_made_in_blocks_and_rows_are_copied() -> None:
    store = Store(2, 1, 3, limit=20, block=8, like=zeros(1))
    store.take_rows([0])
    store.make_room(1)
    store.keys[1, 0, 0, 7] = 5.0
    store.make_room(9)
    assert (store.capacity, store.nbytes) == (16, 2 * 2 * 16 * 3 * 4)
    store.make_room(1000)
    store.take_rows([0, 0, 0])
    assert store.keys.shape == (2, 3, 1, 20, 3)
    assert store.keys[1, 2, 0, 6:9, 0].tolist() == [0, 5, 0]


# %% [markdown]
# ### Which token goes where
# Some rows read some tokens more: row b has `held[b]` and reads `counts[b]`, side by side with padding behind the
# shorter ones. All of it depends on neither the layer nor the numbers, so it is found out once for all layers:
# positions, which new keys go to which places, and who sees whom. Of what a row holds, token p stands at the place
# p % capacity, so place j has the last token p < held with that remainder, or nothing.


# %%
class Plan:
    """Where `counts` new tokens of each row go, of which `held` are there.

    Attributes:
        positions: (B, T), of the new tokens; padding may have any.
        source, target: which rows of the new keys (B · G · T, D) go to which of a layer's (B · G · capacity, D).
        mask: (B, 1, T, capacity + T), which of the held and the new tokens each new one sees; None: those before it.
        lengths: (B,), how many places are filled afterwards.
    """

    def __init__(self, store: Store, held: Sequence[int], counts: Sequence[int], window: int | None, last: int) -> None:
        longest, capacity, device = max(counts), store.capacity, store.keys.device
        groups, start = store.keys.shape[2], tensor(list(held), device=device).reshape(-1, 1)
        steps = arange(longest, device=device)
        places = start + steps
        self.positions = clamp(places, max=last)
        self.lengths = tensor([min(n + m, capacity) for n, m in zip(held, counts, strict=True)], device=device)
        kept = [(b, t) for b, m in enumerate(counts) for t in range(max(0, m - capacity), m)]
        pairs = [((b * groups + g), t, (held[b] + t) % capacity) for b, t in kept for g in range(groups)]
        self.source, self.target = (
            tensor([x[0] * length + x[i] for x in pairs], device=device) for i, length in ((1, longest), (2, capacity))
        )
        self.mask = None
        if longest > 1 and (max(held) or (window or longest) < longest):
            there = start - 1 - (start - 1 - arange(capacity, device=device)) % capacity
            asked, known = unsqueeze(places, 2), unsqueeze(joined([there, places], 1), 1)
            seen = (known >= 0) & (known <= asked)
            self.mask = unsqueeze(seen if window is None else seen & (known > asked - window), 1)


def test_tokens_in_a_circle() -> None:
    store = Store(1, 1, 1, limit=4, block=4, like=zeros(1))
    store.take_rows([0, 1])
    store.make_room(4)
    plan = Plan(store, held=[5, 1], counts=[2, 1], window=4, last=99)
    assert plan.positions.tolist() == [[5, 6], [1, 2]]
    assert (plan.source.tolist(), plan.target.tolist()) == ([0, 1, 2], [1, 2, 4 + 1])
    assert plan.mask[0, 0].int().tolist() == [[1, 0, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1]]  # places have 4, 1, 2 and 3


# %% [markdown]
# ### Attention that remembers
# Module 14's blocks take a stand-in for their attention layer. This one makes queries, keys and values of the new
# tokens only. A single token puts its key among those held and looks at all of them; that is `cached_attention`, which
# has a kernel. Several tokens look at what was held and at each other.


# %%
def remember(cache: Tensor, layer: int, plan: Plan, new: Tensor) -> None:
    """Write new keys or values (B, G, T, D) to their places in a layer."""
    xp, width = backend_of(cache.data), new.shape[-1]
    rows = xp.take(xp.reshape(new.data, (-1, width)), plan.source.data, axis=0)
    xp.assign(xp.reshape(cache.data[layer, ...], (-1, width)), plan.target.data, rows)
    Writes.note(cache.data)


def attend(x: Tensor, attention: SelfAttention, layer: int, store: Store, plan: Plan) -> Tensor:
    """What the attention layer makes of new tokens (B, T, C), which see those that the store holds."""
    query, key, value = attention.heads(x, plan.positions)
    kept = (store.keys, key), (store.values, value)
    if x.shape[1] == 1:
        for cache, new in kept:
            remember(cache, layer, plan, new)
        out = unsqueeze(cached_attention(query[:, :, 0], store.keys[layer], store.values[layer], plan.lengths), 2)
    else:
        if plan.mask is not None:
            key, value = (joined([cache[layer], new], 2) for cache, new in kept)
        shared = attention.num_kv_heads != attention.num_heads
        causal = plan.mask is None
        out = scaled_dot_product_attention(query, key, value, plan.mask, is_causal=causal, enable_gqa=shared)
        for cache, new in kept:
            remember(cache, layer, plan, new)
    return attention.out(merge_heads(out))


# %% [markdown]
# ### The cache
# One method: `read(rows)`, the scores of what follows each row. It reads what it has not read yet. A row that begins as
# some row in the cache takes over what that one holds, whichever it was: so a second question about the same long text
# costs its own tokens only, a text can be continued in several ways, and going back a few tokens needs nothing more
# than to ask. (In a circle, what was overwritten is gone; then a row is read anew.)


# %%
def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows have in common from their beginning on."""
    if a[: len(b)] == b:  # far quicker than one by one
        return len(b)
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class KVCache:
    """The keys and values of texts that a model has read.

    It belongs to the model's weights as they are: after training, begin with a new one.

    Args:
        model: reads.
        window: how many tokens each token sees, itself included, and the most that is kept; all if None.
        block: for how many tokens room is made at a time.

    Attributes:
        tokens: what each row holds.
        store: where its keys and values are.
    """

    def __init__(self, model: GPT, window: int | None = None, block: int = 256) -> None:
        context, attention = model.config.context_length, model.blocks[0].attention
        for name, value in (("window", context if window is None else window), ("block", block)):
            if not 1 <= value or (name == "window" and value > context):
                raise ValueError(f"KVCache: {name} must be >= 1, a window at most the context's {context}; got {value}")
        self.model, self.window, self.tokens = model, window, list[list[int]]()
        limit = context if window is None else window
        groups, features = attention.num_kv_heads, attention.head_dim
        self.store = Store(len(model.blocks), groups, features, limit, block, model.tokens.weight)

    @cached_property
    def packed(self) -> Tensor | None:
        """The weights for `decode_blocks`, if the model is one that it knows."""
        return packed_weights(self.model)

    @property
    def nbytes(self) -> int:
        """What keys and values take, room for further ones included."""
        return self.store.nbytes

    def read(self, rows: Sequence[Sequence[int]], last: int | None = None) -> Tensor:
        """The scores of what follows each row, (B, V), or each of its `last` tokens, (B, last, V).

        Of rows longer than the model's context, the end is read, and anew, because all its positions have changed.
        """
        rows = [list(row[-self.model.config.context_length :]) for row in rows]
        asked = 1 if last is None else last
        if not rows or not 1 <= asked <= min(map(len, rows)):
            raise ValueError(f"KVCache.read: expected rows of at least {max(1, asked)} tokens, and last >= 1; got rows "
                             f"of {[len(row) for row in rows]} tokens")  # fmt: skip
        held = self._take_over(rows, asked)
        with no_grad():
            features = self._features([row[n:] for row, n in zip(rows, held, strict=True)])
            self.tokens = rows
            ends = [len(row) - n for row, n in zip(rows, held, strict=True)]
            if features.shape[1] > 1 or last is not None:
                numbers = [[i] * asked for i in range(len(rows))]
                features = features[numbers, [list(range(end - asked, end)) for end in ends]]
            scores = self.model.scores(features)
        return scores if last is not None else scores[:, 0]

    def _take_over(self, rows: list[list[int]], asked: int) -> list[int]:
        """Have each row's place hold what some row began like; how many tokens that is, all but `asked` at the most."""
        sources, shares = [], []
        for i, row in enumerate(rows):
            begin, best, share = row[: len(row) - asked], 0, 0
            for j in (i, *range(len(self.tokens))) if i < len(self.tokens) else range(len(self.tokens)):
                found = shared_length(begin, self.tokens[j])
                if found < len(self.tokens[j]) > self.store.limit:
                    found = 0  # it went round in a circle
                best, share = (j, found) if found > share else (best, share)
                if share == len(self.tokens[j]):
                    break
            sources.append(best)
            shares.append(share)
        self.store.take_rows(sources)
        self.tokens = [row[:n] for row, n in zip(rows, shares, strict=True)]
        return shares

    def _features(self, new: list[list[int]]) -> Tensor:
        """Read tokens behind those that rows hold: (B, T, C), what the model makes of them."""
        model, held, counts = self.model, [len(row) for row in self.tokens], [len(row) for row in new]
        self.store.make_room(max(n + m for n, m in zip(held, counts, strict=True)))
        ids = tensor([row + [0] * (max(counts) - len(row)) for row in new], device=model.tokens.weight.device)
        x = model.tokens(ids)
        if max(counts) == 1 and kernels_enabled() and self.packed is not None:
            return self._at_once(x, tensor(held))
        plan = Plan(self.store, held, counts, self.window, model.config.context_length - 1)
        if model.positions is not None:
            x = x + embedding_lookup(plan.positions, model.positions.weight)
        with evaluating(model):
            for layer, block in enumerate(model.blocks):
                x = block(x, partial(attend, attention=block.attention, layer=layer, store=self.store, plan=plan))
            return x if model.norm is None else model.norm(x)

    def _at_once(self, x: Tensor, held: Tensor) -> Tensor:
        """The same for one token a row, by `decode_blocks`."""
        model, turns = self.model, (None, None)
        if model.positions is not None:
            x = x + unsqueeze(embedding_lookup(held, model.positions.weight), 1)
        else:
            turns = model.blocks[0].attention.rotary.tables(1 + int(held.amax().item()))
        x = decode_blocks(x[:, 0], self.packed, self.store.keys, self.store.values, held, *turns, config=model.config)
        return unsqueeze(model.norm(x), 1)


def opinionated(config: GPTConfig, seed: int = 0) -> GPT:
    """A model for tests, which has not learnt anything, but has clear preferences."""
    manual_seed(seed)
    model = GPT(config)
    for parameter in model.parameters():
        normal_(parameter, std=0.4, mean=1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


GPT_2 = GPTConfig(13, 12, 2, 2, 8)
LLAMA = llama_config(13, context_length=12, num_layers=2, num_heads=4, embed_dim=16, num_kv_heads=2)


def test_cached_scores_are_those_of_reading_everything() -> None:
    for config in (GPT_2, LLAMA):
        model = opinionated(config)
        cache = KVCache(model, block=4)
        rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
        for token in range(8):  # the last row outgrows the context
            assert_close(cache.read(rows), reads_whole(model)(rows), rtol=1e-5, atol=1e-5)
            rows = [[*row, (3 * token + len(row)) % 13] for row in rows]


def test_rows_take_over_what_they_have_in_common() -> None:
    model, question = opinionated(LLAMA), [1, 2, 3, 4, 5, 6]
    cache, read = KVCache(model), []
    cache.read([[9, 9], question])
    hook = model.tokens.register_forward_hook(lambda layer, inputs, out: read.append(inputs[0].tolist()))
    rows = [[*question, 7], [*question[:3], 8], question]
    found = cache.read(rows)
    hook.remove()
    assert_close(found, reads_whole(model)(rows), atol=1e-5)
    assert read[0] == [[7], [8], [6]]
    assert_close(cache.read(rows, last=4)[:, 2], reads_whole(model)([row[:-1] for row in rows]), atol=1e-5)


# %% [markdown]
# A window changes what the network computes, so it is compared with one that reads everything through a mask.


# %%
def read_through_window(model: GPT, row: list[int], window: int) -> Tensor:
    """The scores (1, T, V) of a model in which each token sees `window` tokens, itself included."""
    x, places = model.tokens(tensor([row])), arange(len(row))
    x = x if model.positions is None else model.positions(x)
    mask = places > places.reshape(-1, 1) - window  # the future is hidden anyway
    for block in model.blocks:
        x = block(x, partial(block.attention, mask=mask))
    return model.scores(model.norm(x))


def test_a_window_forgets() -> None:
    row = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    for config in (GPT_2, LLAMA):
        model = opinionated(config)
        cache, expected = KVCache(model, window=4, block=3), read_through_window(model, row, 4)
        found = [cache.read([row[:n]], last=m) for n, m in ((2, 2), (3, 1), (8, 5), (9, 1), (10, 1), (11, 1))]
        assert_close(joined(found, 1), expected, rtol=1e-5, atol=1e-5)
        assert cache.nbytes == 4 * bytes_per_token(config)


# %% [markdown]
# ### In one call
# A small network's token is a dozen operations a block, of a microsecond of arithmetic each, and three more to call
# them from Python. They can be one operation: all blocks, for one token of each row. Its inputs are arrays; so the
# weights are brought together into one, each block's in a row, in the order in which they are needed. What follows is
# the readable version; the appendix attaches a kernel (`kernels/cpu/decoding.py`), in which a core takes some rows from
# the first block to the last.

# %%
SPARE = 64  # zeros behind a block's weights, so that a kernel may read whole vectors


def block_parts(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The weights of a block, (in, out), and the biases behind each, in the order in which they are needed."""
    width, inner, hidden = config.embed_dim, config.num_heads * config.head_size, config.hidden_size
    stacked = inner + 2 * (config.num_kv_heads or config.num_heads) * config.head_size
    gate = {"mlp.gate": (width, hidden)} if config.mlp == "swiglu" else {}
    shapes: dict[str, tuple[int, ...]] = {"norm1": (width,), "attention.qkv": (width, stacked)}
    shapes |= {"attention.out": (inner, width), "norm2": (width,), **gate}
    shapes |= {"mlp.up": (width, hidden), "mlp.down": (hidden, width)}
    return {f"{name}.{part}": shape if part == "weight" else shape[-1:] for name, shape in shapes.items()
            for part in ("weight", "bias")}  # fmt: skip


@op
def decode_blocks(xp, x, weights, keys, values, lengths, cos=None, sin=None, *, config):
    """One token of each row through all blocks: (rows, width) to the same shape.

    Its keys and values are written to where they belong in `keys` and `values`, which are a `Store`'s.

    weights: (layers, n), as `packed_weights` makes them. lengths: (rows,), how many tokens each row holds.
    cos, sin: (positions, features), if heads are turned.
    """
    layers, rows, groups, capacity, features = keys.shape
    turned = config.num_heads + groups
    places = (xp.arange(rows)[:, None] * groups + xp.arange(groups)) * capacity + (lengths % capacity)[:, None]
    for layer in range(layers):
        part = unpacked(xp, weights[layer, ...], config)
        qkv = xp.reshape(through(normed(x, part, "norm1", config), part, "attention.qkv"), (rows, -1, features))
        query_key, value = qkv[:, :turned, :], qkv[:, turned:, :]
        if cos is not None:
            query_key = rotate(query_key, *(xp.take(table, lengths, axis=0)[:, None, :] for table in (cos, sin)))
        for cache, new in ((keys, query_key[:, config.num_heads :, :]), (values, value)):
            flat = xp.reshape(cache[layer, ...], (-1, features))
            xp.assign(flat, xp.reshape(places, (-1,)), xp.reshape(new, (-1, features)))
        filled = xp.minimum(lengths + 1, xp.asarray(capacity))
        out = cached_attention(query_key[:, : config.num_heads, :], keys[layer, ...], values[layer, ...], filled)
        x = x + through(xp.reshape(out, (rows, -1)), part, "attention.out")
        inner = normed(x, part, "norm2", config)
        up = through(inner, part, "mlp.up")
        up = silu(through(inner, part, "mlp.gate")) * up if config.mlp == "swiglu" else ACTIVATIONS[config.mlp](up)
        x = x + through(up, part, "mlp.down")
    return x


gradient(decode_blocks)


def unpacked(xp: Any, row: Any, config: GPTConfig) -> dict[str, Any]:
    """The weights of a block by their names."""
    parts, start = {}, 0
    for name, shape in block_parts(config).items():
        parts[name] = xp.reshape(row[start : start + math.prod(shape)], shape)
        start += math.prod(shape)
    return parts


def through(x: Any, part: dict[str, Any], name: str) -> Any:
    return matmul(x, part[f"{name}.weight"]) + part[f"{name}.bias"]


def normed(x: Any, part: dict[str, Any], name: str, config: GPTConfig) -> Any:
    weight, bias = part[f"{name}.weight"], part[f"{name}.bias"]
    if config.norm == "layer":
        return normalize(x, weight, bias, dims=(-1,), eps=config.norm_eps)[0]
    return mul(mul(x, rsqrt(mean(mul(x, x), dim=-1, keepdim=True) + config.norm_eps)), weight)


# %% [markdown]
# Which models it knows: those whose blocks are module 14's and nothing else, on a backend that has a kernel for them.
# What was quantized, factorised or hooked up goes through its own layers, and so does what is large: there, a layer's
# product takes both cores, and the time between two products is nothing beside them.

# %%
MOST_WEIGHTS = 1 << 23
KNOWN = {TransformerBlock, SelfAttention, LayerNorm, RMSNorm, Linear, MLP, SwiGLU, Dropout, RotaryEmbedding}


def packed_weights(model: GPT) -> Tensor | None:
    """All blocks' weights as `decode_blocks` takes them, a row for each; None for a model that it does not know."""
    config, weight = model.config, model.tokens.weight
    shapes = block_parts(config)
    size = sum(map(math.prod, shapes.values())) + SPARE
    layers = [layer for block in model.blocks for layer in block.modules()]
    known = all(type(layer) in KNOWN and not layer._hooks for layer in layers) and model.norm is not None
    if not known or backend_of(weight.data).name not in decode_blocks.implementations:
        return None
    if weight.dtype != "float32" or len(model.blocks) * size > MOST_WEIGHTS:
        return None
    rows = []
    for block in model.blocks:
        found = {name: p.detach() for name, p in block.named_parameters()}
        found = {name: transpose(p, 0, 1) if p.ndim == 2 else p for name, p in found.items()}
        missing = {name: zeros(shape) for name, shape in shapes.items() if name.endswith("bias")}
        if not found.keys() <= shapes.keys() or any(found.get(n, missing.get(n)).shape != s for n, s in shapes.items()):
            return None  # of other sizes than the configuration says
        rows.append(joined([reshape((missing | found)[name], shape=(-1,)) for name in shapes] + [zeros(SPARE)]))
    return joined([unsqueeze(row, 0) for row in rows])


def test_in_one_call_as_layer_by_layer() -> None:
    for config in (GPT_2, LLAMA, replace(GPT_2, mlp="relu", bias=False), replace(LLAMA, mlp="gelu", norm="layer")):
        cache, rows = KVCache(opinionated(config), window=6), [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
        for _ in range(4):
            expected = KVCache(cache.model, window=6).read(rows)
            assert_close(cache.read(rows), expected, rtol=1e-5, atol=1e-5)
            with reference_kernels():
                assert_close(cache.read(rows), expected, rtol=1e-5, atol=1e-5)
            rows = [[*row, 7] for row in rows]


# %% [markdown]
# ### Writing
# `generate` and `stream` of module 14 ask a *reader* for the scores of what follows some rows that grow. A cache is
# one, and from here on it is what they ask. So there is one way to write, with the same arguments and the same tokens.

# %%
CHOSEN: ContextVar[KVCache | bool] = ContextVar("CHOSEN", default=True)


@contextmanager
def caching(cache: KVCache | bool) -> Iterator[None]:
    """Within the block, have models write with this cache, whose window holds and which is kept; False: with none."""
    token = CHOSEN.set(cache)
    try:
        yield
    finally:
        CHOSEN.reset(token)


def reader(model: GPT) -> Callable[[list[list[int]]], Tensor]:
    """What reads for `model.generate`: a new cache, or what `caching` says."""
    chosen = CHOSEN.get()
    if chosen is False:
        return reads_whole(model)
    cache = KVCache(model) if chosen is True else chosen
    if cache.model is not model:
        raise ValueError("caching: the cache is another model's; KVCache(model) makes one for this model")
    return cache.read


attach_reader(reader)


def test_the_same_tokens_with_and_without_a_cache() -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    for model in (opinionated(GPT_2), opinionated(LLAMA)):
        for choices in ({"temperature": 0}, {"seed": 1, "top_k": 5, "repetition_penalty": 1.2, "stop_tokens": [2]}):
            written = model.generate(prompts, 12, **choices)
            with caching(False):
                assert model.generate(prompts, 12, **choices) == written
        cache = KVCache(model)
        with caching(cache):
            assert model.generate(prompts[0], 4, seed=2)[:-1] == cache.tokens[0]
    assert "another model's" in message_of(caching(cache)(opinionated(GPT_2).generate), [1], 1, error=ValueError)


# %% [markdown]
# ### Drafts
# A draft is right where the large network would have said the same, and in an ordinary text many tokens go without
# saying. Going back to the last right token is what `read` does anyway.


# %%
def settle(drafted: Sequence[int], proposed: Tensor, wanted: Tensor, chance: Any) -> list[int]:
    """Those of k drafted tokens that are kept, and one more.

    Args:
        proposed: (k, V), the probabilities from which they were drawn; wanted: (k + 1, V), those to draw from.
    """
    with chance:
        numbers = backend_of(wanted.data).random((len(drafted) + 1, 1), "float64")
    for i, (token, number) in enumerate(zip(drafted, Tensor(numbers)[:, 0].tolist(), strict=False)):
        if number * proposed[i, token].item() >= wanted[i, token].item():
            return [*drafted[:i], *draw(clamp(wanted[i : i + 1] - proposed[i : i + 1], min=0), chance)]
    return [*drafted, *draw(wanted[len(drafted) :], chance)]


def speculative_generate(
    model: GPT, draft: GPT, prompt: Sequence[int], max_new_tokens: int, *, lookahead: int = 4, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, stop_tokens: Iterable[int] = (), seed: int | None = None,
) -> list[int]:  # fmt: skip
    """A prompt, and what the model writes behind it, drafted by a smaller one (Leviathan, Chen, and others, 2023).

    Args:
        draft: has the same vocabulary. What is written is drawn from the model's probabilities, whatever the draft is;
            at temperature 0 it is what `generate` writes.
        lookahead: how many tokens are drafted at a time.
        others: as `generate` takes them.
    """
    row, stops, end = list(prompt), set(stop_tokens), len(prompt) + max_new_tokens
    choices = (temperature, top_k, top_p)
    check_choices("speculative_generate", [row], max_new_tokens, *choices, 1.0)
    if draft.config.vocab_size != model.config.vocab_size or lookahead < 1:
        raise ValueError(f"speculative_generate: the draft has {draft.config.vocab_size} tokens, the model "
                         f"{model.config.vocab_size}; lookahead is {lookahead}, and must be >= 1")  # fmt: skip
    chance = nullcontext() if seed is None else backend_of(model.tokens.weight.data).seeded(seed)
    large, small = KVCache(model), KVCache(draft)
    while len(row) < end:
        room = min(model.config.context_length, draft.config.context_length) - len(row)
        text, proposed = list(row), []
        for _ in range(min(lookahead, end - len(row) - 1, room)):
            proposed.append(next_probabilities(small.read([text]), *choices))
            text += draw(proposed[-1], chance)
        scores = large.read([text], last=len(proposed) + 1)[0]
        for token in settle(text[len(row) :], joined(proposed or [scores]), next_probabilities(scores, *choices), chance):
            row.append(token)
            if token in stops:
                return row
    return row


def test_a_draft_changes_nothing() -> None:
    model, draft = opinionated(LLAMA), opinionated(replace(LLAMA, num_layers=1), seed=1)
    plain = model.generate([1, 2], 14, temperature=0)
    for other in (draft, model):
        assert speculative_generate(model, other, [1, 2], 14, temperature=0) == plain
    wanted, proposed = tensor([[0.1, 0.6, 0.3], [0.0, 0.0, 1.0]]), tensor([[0.5, 0.3, 0.2]])
    manual_seed(0)
    first = [settle(draw(proposed, nullcontext()), proposed, wanted, nullcontext())[0] for _ in range(2000)]
    assert_close([first.count(token) / 2000 for token in range(3)], [0.1, 0.6, 0.3], atol=0.04)
