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
from operator import add
from typing import Any

from tinytorch.backends import backend_of
from tinytorch.m01_setup import assert_close, manual_seed, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import Tensor, expand, matmul, mean, mul, op, tensor, unsqueeze, zeros
from tinytorch.m02_tensor import cat as joined
from tinytorch.m02_tensor_appendix import Writes, arange, clamp, pad, randint, rsqrt
from tinytorch.m03_activations import silu
from tinytorch.m04_layers import Dropout, Linear, linear, normal_
from tinytorch.m04_layers_appendix import ModuleList
from tinytorch.m06_autograd import gradient, no_grad
from tinytorch.m07_optimizers import AdamW
from tinytorch.m08_training import evaluating
from tinytorch.m09_spatial import normalize
from tinytorch.m12_embeddings import Embedding, LearnedPositions, RotaryEmbedding, rotate
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
    next_token_loss,
    reads_whole,
)
from tinytorch.m15_profiling import flop_formula
from tinytorch.m16_acceleration import attach, kernels_enabled, reference_kernels
from tinytorch.m16_acceleration_appendix import ARRAY, CPU, FLOATS

# %% [markdown]
# ## Mathematical foundations
#
# Token $t$ of a text asks all tokens before it, $\mathrm{out}_t = \sum_{s \le t} w_{ts} v_s$ (module 13). Nothing that
# comes later changes $k_s$ and $v_s$: in a causal network, what a place has computed stays. So one keeps them. To write
# $T$ tokens by reading everything again takes $\sum_t 2 N t \approx N T^2$ operations for $N$ weights; with a
# **cache**, $2 N T$, and $2 L T^2 C$ for attention, which alone still looks back.
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
        heads = arange(len(held) * groups, device=device).reshape(len(held), groups, 1)
        source, target = heads * longest + steps, heads * capacity + unsqueeze(places % capacity, 1)
        if min(counts) < longest or longest > capacity:
            ends = tensor(list(counts), device=device).reshape(-1, 1, 1)
            kept = expand((steps < ends) & (steps >= ends - capacity), shape=source.shape)
            source, target = source[kept], target[kept]
        self.source, self.target = source.reshape(-1), target.reshape(-1)
        self.mask: Any = None
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
        if block < 1 or not 1 <= (context if window is None else window) <= context:
            raise ValueError(f"KVCache: block must be >= 1, and window from 1 to the context's {context}; got block "
                             f"{block}, window {window}")  # fmt: skip
        self.model, self.window, self.tokens = model, window, list[list[int]]()
        limit = context if window is None else window
        groups, features = attention.num_kv_heads, attention.head_dim
        self.store = Store(len(model.blocks), groups, features, limit, block, model.blocks[0].norm1.weight)

    @cached_property
    def packed(self) -> tuple[Any, ...] | None:
        """The weights for `decode`, if it knows the model."""
        return packed(self.model)

    @property
    def nbytes(self) -> int:
        """What keys and values take, room for further ones included."""
        return self.store.nbytes

    def read(self, rows: Sequence[Sequence[int]], last: int | None = None) -> Tensor:
        """The scores of what follows each row, (B, V), or each of its `last` tokens, (B, last, V).

        Of rows longer than the model's context, the end is read, and anew, because all its positions have changed.
        """
        context = self.model.config.context_length
        if last is None and len(rows) == len(self.tokens) and self._at_once():
            pairs = zip(rows, self.tokens, strict=True)
            if all(len(row) == len(held) + 1 <= context and row[:-1] == held for row, held in pairs):  # the usual case
                return self._read_at_once([row[-1] for row in rows])
        texts = [list(row[-context:]) for row in rows]
        asked = 1 if last is None else last
        if not texts or not 1 <= asked <= min(map(len, texts)):
            raise ValueError(f"KVCache.read: expected rows of at least {max(1, asked)} tokens, and last >= 1; got rows "
                             f"of {[len(row) for row in texts]} tokens")  # fmt: skip
        self._take_over(texts, asked)
        new = [row[len(known) :] for row, known in zip(texts, self.tokens, strict=True)]
        if max(map(len, new)) == 1 and self._at_once():
            scores = self._read_at_once([token for (token,) in new])
            return scores if last is None else unsqueeze(scores, 1)
        with no_grad():
            numbers = [[i] * asked for i in range(len(texts))]
            ends = [list(range(len(row) - asked, len(row))) for row in new]
            scores = self.model.scores(self._features(new)[numbers, ends])
        self.tokens = texts
        return scores if last is not None else scores[:, 0]

    def _take_over(self, rows: list[list[int]], asked: int) -> None:
        """Have each row hold what it has in common with some row that was held, but not its last `asked` tokens."""
        sources, shares = [], []
        for i, row in enumerate(rows):
            found = [shared_length(row[: len(row) - asked], held) for held in self.tokens]
            for j, held in enumerate(self.tokens):
                if found[j] < len(held) > self.store.limit:
                    found[j] = 0  # it went round in a circle
            source = max(range(len(found)), key=lambda j: (found[j], j == i), default=0)
            sources.append(source)
            shares.append(found[source] if found else 0)
        self.store.take_rows(sources)
        self.tokens = [row[:n] for row, n in zip(rows, shares, strict=True)]

    def _features(self, new: list[list[int]]) -> Tensor:
        """Read some tokens behind those that rows hold: (B, T, C), what the blocks make of them."""
        model, held, counts = self.model, [len(row) for row in self.tokens], [len(row) for row in new]
        self.store.make_room(max(map(add, held, counts)))
        plan = Plan(self.store, held, counts, self.window, model.config.context_length - 1)
        ids = tensor([row + [0] * (max(counts) - len(row)) for row in new], device=model.tokens.weight.device)
        x = model.tokens(ids)
        if model.positions is not None:
            x = x + model.positions.rows(plan.positions)
        with evaluating(model):
            for layer, block in enumerate(model.blocks):
                x = block(x, partial(attend, attention=block.attention, layer=layer, store=self.store, plan=plan))
            return x if model.norm is None else model.norm(x)

    def _at_once(self) -> bool:
        """Whether `decode` has a kernel here, and knows the model."""
        there = backend_of(self.store.keys.data).name in decode.implementations
        return there and kernels_enabled() and self.packed is not None

    def _read_at_once(self, new: list[int]) -> Tensor:
        """Read one token of each row, by `decode`: (B, V), the scores of what follows."""
        model, store, turns = self.model, self.store, list[Any]()
        if not 0 <= min(new) <= max(new) < model.config.vocab_size:
            raise IndexError(f"KVCache.read: tokens must be from 0 to {model.config.vocab_size - 1}, got {new}")
        held = [len(row) for row in self.tokens]
        store.make_room(1 + max(held))
        if model.positions is None:
            turns = [table.data for table in model.blocks[0].attention.rotary.tables(1 + max(held))]
        ids, lengths = backend_of(store.keys.data).asarray([new, held])
        arrays = (ids, *(self.packed or ()), store.keys.data, store.values.data, lengths, *turns)
        scores = decode(*arrays, config=model.config)  # of arrays, not of tensors, which would take as long as a layer
        for row, token in zip(self.tokens, new, strict=True):
            row.append(token)
        return Tensor(scores)


def opinionated(config: GPTConfig, seed: int = 0) -> GPT:
    """A model for tests, which has not learnt anything, but has clear preferences."""
    manual_seed(seed)
    model = GPT(config)
    for parameter in model.parameters():
        normal_(parameter, std=0.4, mean=1.0 if parameter.ndim == 1 else 0.0)
    model.eval()
    return model


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
    return model.scores(x if model.norm is None else model.norm(x))


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
# them from Python. They can be one operation: the whole model, for one token of each row. Its inputs are arrays; so the
# blocks' weights are brought together into one, each block's in a row, in the order in which they are needed. What
# follows is the readable version. The kernel that stands in for it (`kernels/cpu/decoding.py`) shares the heads, and
# then the features of the small network, out among the cores, which have to meet only twice a block (Shoeybi and
# others, 2019); each reads its part of the weights, which may stay in its own cache from token to token.

# %%
SPARE = 64  # zeros behind a block's weights, so that a kernel may read whole vectors


def block_parts(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The weights of a block, (in, out), in the order in which they are needed; behind each stands its bias."""
    width, inner, hidden = config.embed_dim, config.num_heads * config.head_size, config.hidden_size
    stacked = inner + 2 * (config.num_kv_heads or config.num_heads) * config.head_size
    shapes: dict[str, tuple[int, ...]] = {"norm1": (width,), "attention.qkv": (width, stacked)}
    shapes |= {"attention.out": (inner, width), "norm2": (width,)}
    shapes |= {"mlp.gate": (width, hidden)} if config.mlp == "swiglu" else {}
    return shapes | {"mlp.up": (width, hidden), "mlp.down": (hidden, width)}


@op
def decode(xp, ids, tokens, positions, blocks, norm, head, keys, values, lengths, cos=None, sin=None, *, config):
    """One token of each row through a model: ids (rows,) to the scores of what follows, (rows, vocabulary).

    Its keys and values are written to where they belong in `keys` and `values`, which are a `Store`'s.

    tokens, positions (or None), blocks, norm, head: the weights, as `packed` makes them. lengths: (rows,), how many
    tokens each row holds. cos, sin: (positions, features), if heads are turned.
    """
    layers, rows, groups, capacity, features = keys.shape
    places = (xp.arange(rows)[:, None] * groups + xp.arange(groups)) * capacity + (lengths % capacity)[:, None]
    filled = xp.minimum(lengths + 1, xp.asarray(capacity))
    x = xp.take(tokens, ids, axis=0)
    x = x if positions is None else x + xp.take(positions, lengths, axis=0)
    for layer in range(layers):
        part = unpacked(xp, blocks[layer, ...], config)
        qkv = xp.reshape(through(normed(x, *part["norm1"], config), *part["attention.qkv"]), (rows, -1, features))
        turned, value = qkv[:, : config.num_heads + groups, :], qkv[:, config.num_heads + groups :, :]
        if cos is not None:
            turned = rotate(turned, *(xp.take(table, lengths, axis=0)[:, None, :] for table in (cos, sin)))
        for cache, new in ((keys, turned[:, config.num_heads :, :]), (values, value)):
            flat = xp.reshape(cache[layer, ...], (-1, features))
            xp.assign(flat, xp.reshape(places, (-1,)), xp.reshape(new, (-1, features)))
        out = cached_attention(turned[:, : config.num_heads, :], keys[layer, ...], values[layer, ...], filled)
        x = x + through(xp.reshape(out, (rows, -1)), *part["attention.out"])
        inner = normed(x, *part["norm2"], config)
        up = through(inner, *part["mlp.up"])
        up = silu(through(inner, *part["mlp.gate"])) * up if "mlp.gate" in part else ACTIVATIONS[config.mlp](up)
        x = x + through(up, *part["mlp.down"])
    return linear(normed(x, norm[0, ...], norm[1, ...], config), head)


gradient(decode)


@flop_formula("decode")
def decode_flops(
    out: Any, ids: Any, tokens: Any, positions: Any, blocks: Any, norm: Any, head: Any, keys: Any, values: Any,
    lengths: Any, *turns: Any, config: GPTConfig,
) -> int:  # fmt: skip
    """All weights once for each row, and each token that a row sees with its key and its value."""
    seen = keys.shape[0] * int((lengths + 1).sum()) * 2 * config.num_heads * keys.shape[4]
    return 2 * (len(ids) * (math.prod(blocks.shape) + math.prod(head.shape)) + seen)


def unpacked(xp: Any, row: Any, config: GPTConfig) -> dict[str, list[Any]]:
    """The weight and the bias of each part of a block."""
    parts, start = dict[str, list[Any]](), 0
    for name, shape in block_parts(config).items():
        for size in (shape, shape[-1:]):
            parts.setdefault(name, []).append(xp.reshape(row[start : start + math.prod(size)], size))
            start += math.prod(size)
    return parts


def through(x: Any, weight: Any, bias: Any) -> Any:
    return matmul(x, weight) + bias


def normed(x: Any, weight: Any, bias: Any, config: GPTConfig) -> Any:
    if config.norm == "layer":
        return normalize(x, weight, bias, dims=(-1,), eps=config.norm_eps)[0]
    return mul(mul(x, rsqrt(mean(mul(x, x), dim=-1, keepdim=True) + config.norm_eps)), weight)


# %% [markdown]
# Which models it knows: those made of the layers of these modules and nothing else, on a backend that has a kernel for
# them. What was quantized, factorised or hooked up goes through its own layers, and so does what is large: there, a
# layer's product takes all cores, and the time between two products is nothing beside them.

# %%
MOST_WEIGHTS = 1 << 23
KNOWN = {TransformerBlock, SelfAttention, LayerNorm, RMSNorm, Linear, MLP, SwiGLU, Dropout, RotaryEmbedding, Embedding,
         LearnedPositions, ModuleList, GPT}  # fmt: skip


def write_part(target: Any, layer: Any, shape: tuple[int, ...]) -> None:
    """Write a layer's weight, (in, out), and its bias behind it, to an array of zeros."""
    weight, bias, size = layer.weight.data, getattr(layer, "bias", None), math.prod(shape)
    if len(shape) == 2:
        table = backend_of(target).reshape(target[:size], shape)
        for i in range(0, shape[1], 64):  # what is turned at once stays in the cache
            end = min(i + 64, shape[1])
            table[:, i:end] = weight[i:end, :].T
    else:
        target[:size] = weight
    if bias is not None:
        target[size : size + shape[-1]] = bias.data


def packed(model: GPT) -> tuple[Any, ...] | None:
    """The arrays that `decode` takes: tokens, positions, blocks, norm, head. None for a model that it does not know."""
    config, tokens, last, xp = model.config, model.tokens, model.norm, backend_of(model.tokens.weight.data)
    known = all(type(layer) in KNOWN and not layer._hooks for layer in model.modules())
    size = sum(parameter.numel() for parameter in model.parameters())
    fits = known and last is not None and tokens.weight.dtype == "float32" and size <= MOST_WEIGHTS
    if not fits or tokens.max_norm is not None:
        return None
    parts = block_parts(config)
    wide = SPARE + sum(math.prod(shape) + shape[-1] for shape in parts.values())
    kind = tokens.weight.data.dtype
    blocks, norm = xp.zeros((len(model.blocks), wide), dtype=kind), xp.zeros((2 * config.embed_dim,), dtype=kind)
    for row, block in enumerate(model.blocks):
        start, layers = 0, dict(block.named_modules())
        for name, shape in parts.items():
            if name not in layers or layers[name].weight.shape != shape[::-1]:
                return None  # of another size than the configuration says
            write_part(blocks[row, start:], layers[name], shape)
            start += math.prod(shape) + shape[-1]
    write_part(norm, last, (config.embed_dim,))
    places = None if model.positions is None else model.positions.weight.data
    head = tokens.weight if model.head is None else model.head.weight
    return tokens.weight.data, places, blocks, xp.reshape(norm, (2, -1)), head.data


def decodes(*arrays: Any, config: GPTConfig) -> bool:
    """Whether the kernel takes these: it goes by addresses, so all must lie row by row."""
    for x in arrays:
        if x is not None and (type(x) is not ARRAY or x.dtype.char not in "fl" or not x.flags.c_contiguous):
            return False
    return arrays[0].dtype.char == arrays[8].dtype.char == "l" and arrays[1].dtype.char == "f"


def decoding_example(count: int) -> tuple[tuple, dict[str, Any]]:
    """What `tinytorch warmup` calls the kernel with: `count` rows, of a network that is large enough for all cores."""
    model = GPT(config := GPTConfig(9, 8, 1, 2, 192))
    store = Store(1, 2, 96, limit=8, block=8, like=zeros(1))
    store.take_rows(range(count))
    store.make_room(8)
    ids = zeros(count, dtype="int64") + 3
    inputs = (ids.data, *(packed(model) or ()), store.keys.data, store.values.data, (ids + 1).data)
    return inputs, {"config": config}


attach(decode, "numpy", f"{CPU}.decoding:decode", decodes, FLOATS, decoding_example)


def test_in_one_call_as_layer_by_layer() -> None:
    for config in (GPT_2, LLAMA, replace(GPT_2, mlp="relu", bias=False), replace(LLAMA, mlp="gelu", norm="layer")):
        cache, rows = KVCache(opinionated(config), window=6), [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
        cache.read(rows)
        for token in range(3):
            expected = KVCache(cache.model, window=6).read([[*row, token] for row in rows])
            with reference_kernels():
                assert_close(cache._read_at_once([token, token]), expected, rtol=1e-5, atol=1e-5)
            rows = [[*row, token] for row in rows]


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
        wanted = next_probabilities(scores, *choices)
        for token in settle(text[len(row) :], joined(proposed or [wanted]), wanted, chance):
            row.append(token)
            if token in stops:
                return row
    return row


def test_a_draft_changes_nothing() -> None:
    model, draft = opinionated(LLAMA), opinionated(replace(LLAMA, num_layers=1), seed=1)
    plain = model.generate([1, 2], 14, temperature=0)
    for other, count in ((draft, 14), (model, 14), (model, 8)):
        assert speculative_generate(model, other, [1, 2], count, temperature=0) == plain[: 2 + count]
    wanted, proposed = tensor([[0.1, 0.6, 0.3], [0.0, 0.0, 1.0]]), tensor([[0.5, 0.3, 0.2]])
    manual_seed(0)
    first = [settle(draw(proposed, nullcontext()), proposed, wanted, nullcontext())[0] for _ in range(2000)]
    assert_close([first.count(token) / 2000 for token in range(3)], [0.1, 0.6, 0.3], atol=0.04)


# %% [markdown]
# ## Systems analysis
#
# What a token costs as the text grows: read anew, from the cache layer by layer, and in one call. The first grows with
# the text; the others are flat until reading the cache takes as long as reading the weights. The last two columns are
# those bytes. Drafts pay where a step takes long because there is much to read. In a model of this size it does not:
# to read five tokens layer by layer takes longer than to write five in one call each.


# %%
def analyze() -> None:
    """Measure a token's time over the length of the text, with and without a cache, and what drafts are worth."""
    config = GPTConfig(65, 1024, 4, 4, 128)
    manual_seed(0)
    model, rows = GPT(config), list[list[Any]]()
    model.eval()
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    for length in (16, 64, 256, 512, 1000):
        text, cache = randint(65, (length,)).tolist(), KVCache(model)
        cache.read([text])

        def grow(cache: KVCache = cache, text: list[int] = text) -> None:
            cache.tokens = [text[:-1]]  # the last token is read again and again
            cache.read([text])

        with reference_kernels():
            layers = seconds(grow)
        whole = seconds(reads_whole(model), [text])
        rows.append([length, whole * 1e3, layers * 1e3, seconds(grow) * 1e3, weights / 1e6,
                     length * bytes_per_token(config) / 1e6])  # fmt: skip
    print("4 layers, 128 wide: ms for one more token")
    print_table(["tokens before", "read anew", "cached, without kernels", "cached", "MB of weights", "of cache"], rows)
    print()
    draft = GPT(replace(config, num_layers=1))
    for small, large in zip(draft.parameters(), model.parameters(), strict=False):
        small.data[...] = large.data  # embeddings, positions and the first block
    prompt, figures = randint(65, (16,)).tolist(), []
    alone = seconds(lambda: model.generate(prompt, 64, temperature=0), repeat=3)
    for lookahead in (1, 2, 4, 8):
        taken = seconds(lambda n=lookahead: speculative_generate(model, draft, prompt, 64, lookahead=n, temperature=0),
                        repeat=3)  # fmt: skip
        figures.append([lookahead, taken / 64 * 1e3, alone / 64 * 1e3])
    print_table(["tokens drafted", "ms a token", "without drafts"], figures)


# %% [markdown]
# ## Production context
#
# `model.generate` of Hugging Face's `transformers` has `use_cache=True` and a `DynamicCache`, which appends by copying;
# a `StaticCache` is made at full length, so that `torch.compile` sees fixed shapes. Serving engines go on from there:
# vLLM keeps blocks of 16 tokens anywhere in memory, with a table for each text (paged attention), and shares the blocks
# of texts that begin alike; it also lets texts join and leave a batch at any step. On a GPU, a step's kernels are
# captured once in a CUDA graph and launched together, which is there what one call is here. `assistant_model=` is
# speculative decoding. Left out: caches in 8 bits, blocks that are anywhere, drafts as trees, and several devices.

# %% [markdown]
# ## Integration testing


# %%
def test_a_trained_gpt_counts_on_from_a_cache() -> None:
    manual_seed(0)
    model = GPT(GPTConfig(10, 16, 2, 2, 32))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        numbers = (randint(10, (16, 1)) + arange(13)) % 10
        loss = next_token_loss(model(numbers[:, :-1]), numbers[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cache = KVCache(model)
    with caching(cache):
        assert model.generate([[7, 8], [3, 4, 5]], 6, temperature=0) == [
            [7, 8, 9, 0, 1, 2, 3, 4],
            [3, 4, 5, 6, 7, 8, 9, 0, 1],
        ]
    assert cache.tokens == [[7, 8, 9, 0, 1, 2, 3], [3, 4, 5, 6, 7, 8, 9, 0]]  # what was written last was not yet read
    assert speculative_generate(model, model, [1, 2], 5, temperature=0) == [1, 2, 3, 4, 5, 6, 7]


# %% [markdown]
# ## Thinking questions
#
# 1. Why can a network whose tokens see what comes after them keep no keys and values?
# 2. A text outgrows the context, and all of it is read anew for each token. With rotary positions, only the keys'
#    angles to each other count. What would still be wrong if one only forgot the oldest key?
# 3. From how many rows on does a step take twice as long as for one? What does that depend on, at a short text and at a
#    long one?
# 4. A draft is right for four of five tokens and costs a tenth. How many tokens should it draft at a time?
# 5. Two users of a server ask about the same document. What may one learn from how soon the answer comes?

# %% [markdown]
# ## Summary
#
# What a causal network has computed of a token stays as it is; kept, it turns the cost of a text from the square of its
# length into its length. What is left is reading the weights once a token, if nothing stands between the products. In
# a large model, reading several tokens costs hardly more than one, which drafts make use of. Module 20 measures whether
# such a claim holds.


if __name__ == "__main__":
    run_module(globals())
