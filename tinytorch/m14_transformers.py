"""Module 14: transformers, or a stack of attention and small networks that writes one token after the other.

Learning objectives. After this module you can
1. normalise each place of a sequence by itself, and say why not over the batch;
2. build a block of attention and a small network, around a stream that runs through all blocks;
3. build GPT-2 and a Llama from one configuration, and count what they hold and what they compute;
4. train a network to guess the next token at all places of a text at once;
5. let it write: greedily, or by chance at some temperature, from the most probable tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import tinytorch.m06_autograd_appendix  # noqa: F401 - the rules of 02's appendix
from tinytorch.backends import backend_of
from tinytorch.m01_setup import assert_close, manual_seed, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import Tensor, mean, mul, ones, randn, reshape, tensor, where, zeros
from tinytorch.m02_tensor_appendix import arange, cumsum, randint, rsqrt, sort, topk
from tinytorch.m03_activations import gelu, relu, silu, softmax
from tinytorch.m04_layers import Dropout, Linear, Module, Parameter, linear, normal_
from tinytorch.m04_layers_appendix import ModuleList, zeros_
from tinytorch.m05_losses import cross_entropy
from tinytorch.m06_autograd import no_grad
from tinytorch.m07_optimizers import AdamW
from tinytorch.m08_training import evaluating
from tinytorch.m09_spatial import count_parameters, normalize, time_by_operation
from tinytorch.m12_embeddings import Embedding, LearnedPositions, RotaryEmbedding
from tinytorch.m13_attention import SelfAttention

# %% [markdown]
# ## Mathematical foundations
#
# A **language model** gives each text a probability, one token after the other: $p(x_1, …, x_T) = \prod_t p(x_t \mid
# x_1, …, x_{t-1})$. It is trained by the *cross-entropy* of the next token, $-\frac1T \sum_t \log p(x_{t+1} \mid x_{\le
# t})$, in nats; $e$ to that power, the *perplexity*, is among how many equally probable tokens it feels to choose.
#
# A **transformer** computes $p$ from a stream $x$ of shape (T, C), which starts as the tokens' embeddings. Each of its
# blocks adds to the stream twice: what attention gathers from other places, and what a small network makes of each
# place,
#
# $$x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{mlp}(\mathrm{norm}(x)).$$
#
# The sums let gradients pass all blocks unchanged. **Layer norm** (Ba and others, 2016) gives each place mean 0 and
# variance 1 over its features, $y = \gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta$; **RMS norm** (Zhang and
# Sennrich, 2019) only divides by the root of the mean square. With the norm *before* each part (Xiong and others,
# 2020), training needs no care at its start; the first transformer had it *behind* the sum.
#
# **Scale.** Each of $L$ blocks adds two terms to the stream, whose variance grows with their number; so the layers that
# write into it start $\sqrt{2 L}$ times smaller (GPT-2).
#
# **Cost.** A block holds about $12 C^2$ weights, the network about $12 L C^2 + V C$. Each weight takes part in one
# multiplication and one addition a token forward, and in four more operations backward: $6 N$ operations a token for
# $N$ weights, and $12 L T C$ more for attention.

# %% [markdown]
# ## Implementation
#
# ### Norms
# A place is normalised over its own features. So its result depends neither on its neighbours nor on the batch, and
# training and use are the same: there are no running averages. Layer norm is module 09's `normalize` over the last
# axes.


# %%
def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """weight (x - mean) / sqrt(var + eps) + bias, mean and variance over the last axes, of `normalized_shape`."""
    dims = _last_axes("layer_norm", input, normalized_shape, weight, bias)
    return normalize(input, weight, bias, dims=dims, eps=eps)[0]


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """weight x / sqrt(mean(x²) + eps), the mean over the last axes; eps is the dtype's precision if None."""
    dims = _last_axes("rms_norm", input, normalized_shape, weight)
    wide = input.to("float32") if input.dtype.itemsize < 4 else input
    eps = (2.0**-52 if input.dtype == "float64" else 2.0**-23) if eps is None else eps
    out = (wide * rsqrt(mean(wide * wide, dim=dims, keepdim=True) + eps)).to(input.dtype)
    return out if weight is None else out * weight


def _last_axes(name: str, x: Tensor, shape: Sequence[int], *parameters: Tensor | None) -> tuple[int, ...]:
    """The last axes of x, -k … -1; ValueError unless they have the lengths `shape`, and the parameters have too."""
    shape = tuple(shape)
    if not shape or x.shape[-len(shape) :] != shape or not x.dtype.is_floating_point:
        raise ValueError(f"{name}: expected floats whose last axes are {shape}, got {x.dtype} {x.shape}")
    for parameter in parameters:
        if parameter is not None and parameter.shape != shape:
            raise ValueError(f"{name}: weight and bias must have shape {shape}, got {parameter.shape}")
    return tuple(range(-len(shape), 0))


class Norm(Module):
    """What both norms share.

    Args:
        normalized_shape: the lengths of the last axes, or the length of the last one.
        elementwise_affine: whether there is a weight, ones at first.
    """

    weight: Any
    eps: Any

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = None, elementwise_affine: bool = True,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape, self.eps, self.elementwise_affine = shape, eps, elementwise_affine
        self.register_parameter(
            "weight", Parameter(ones(shape, device=device, dtype=dtype)) if elementwise_affine else None
        )

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class LayerNorm(Norm):
    """Mean 0 and variance 1 over the last axes of each place, then weight and bias (zeros at first)."""

    bias: Any

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-5, elementwise_affine: bool = True,
        bias: bool = True, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        shifted = elementwise_affine and bias
        given = Parameter(zeros(self.normalized_shape, device=device, dtype=dtype)) if shifted else None
        self.register_parameter("bias", given)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"


class RMSNorm(Norm):
    """Mean square 1 over the last axes of each place, then a weight."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


def test_norms_see_one_place_only() -> None:
    x = randn(2, 3, 8) * 5 + 2
    out = LayerNorm(8)(x)
    assert_close([out.mean(-1).abs().max().item(), (out * out).mean().item()], [0.0, 1.0], atol=1e-4)
    assert_close((RMSNorm(8)(x) ** 2).mean(-1), ones(2, 3), atol=1e-4)
    assert_close(rms_norm(tensor([[5.0, 5.0], [0.0, 0.0]]), (2,), tensor([1.0, -2.0])), [[1.0, -2.0], [0.0, 0.0]])
    for norm in (LayerNorm(8), RMSNorm(8)):
        assert_close(norm(x)[1, 2], norm(x[1, 2]))
    assert "last axes are (7,)" in message_of(layer_norm, x, (7,), error=ValueError)


# %% [markdown]
# ### The small network
# Each place alone goes through a wider layer and back. The gated kind multiplies two such layers, one of which decides
# how much of the other passes (Shazeer, 2020); it has three matrices instead of two.

# %%
ACTIVATIONS = {"gelu": gelu, "gelu_tanh": partial(gelu, approximate="tanh"), "relu": relu, "silu": silu}


class MLP(Module):
    """down(activation(up(x))): (…, embed_dim) to (…, hidden_dim) and back."""

    def __init__(self, embed_dim: int, hidden_dim: int, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.activation = activation
        self.up, self.down = Linear(embed_dim, hidden_dim, bias), Linear(hidden_dim, embed_dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))

    def extra_repr(self) -> str:
        return self.activation


class SwiGLU(Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, embed_dim: int, hidden_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = Linear(embed_dim, hidden_dim, bias), Linear(embed_dim, hidden_dim, bias)
        self.down = Linear(hidden_dim, embed_dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(mul(silu(self.gate(x)), self.up(x)))


def test_a_closed_gate_lets_nothing_pass() -> None:
    network, x = SwiGLU(4, 6), randn(2, 4)
    assert_close(network(x), linear(silu(network.gate(x)) * network.up(x), network.down.weight))
    zeros_(network.gate.weight)
    assert_close(network(x), zeros(2, 4))


# %% [markdown]
# ### One configuration for a family
# GPT-2 and Llama differ in five choices. A configuration says which; it is checked once, where it is made.


# %%
@dataclass(frozen=True)
class GPTConfig:
    """What a GPT is built from. The defaults are those of the smallest GPT-2, except for the size of its vocabulary.

    Attributes:
        context_length: the most places that the network sees.
        num_kv_heads: heads of keys and values, num_heads if None; head_dim: embed_dim / num_heads if None.
        hidden_dim: the width inside the small networks, 4 embed_dim if None.
        bias: whether linear layers and layer norms have one.
        norm: "layer" or "rms"; norm_first: whether it stands before attention and the small network, or behind the sum.
        positions: "learned" or "rotary"; rope_base and rope_scaling are the latter's (module 12).
        mlp: "gelu", "gelu_tanh", "relu", "silu" or "swiglu".
        tie_weights: whether the tokens' embedding is also the last layer.
    """

    vocab_size: int
    context_length: int = 1024
    num_layers: int = 12
    num_heads: int = 12
    embed_dim: int = 768
    num_kv_heads: int | None = None
    head_dim: int | None = None
    hidden_dim: int | None = None
    dropout: float = 0.0
    bias: bool = True
    norm: str = "layer"
    norm_eps: float = 1e-5
    norm_first: bool = True
    positions: str = "learned"
    rope_base: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    mlp: str = "gelu_tanh"
    tie_weights: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "num_layers", "num_heads", "embed_dim"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: {name} must be a whole number >= 1, got {getattr(self, name)!r}")
        choices = {"norm": ("layer", "rms"), "positions": ("learned", "rotary"), "mlp": (*ACTIVATIONS, "swiglu")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"GPTConfig: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @property
    def hidden_size(self) -> int:
        return self.hidden_dim or 4 * self.embed_dim

    @property
    def head_size(self) -> int:
        return self.head_dim or self.embed_dim // self.num_heads

    def make_norm(self) -> Norm:
        if self.norm == "rms":
            return RMSNorm(self.embed_dim, self.norm_eps)
        return LayerNorm(self.embed_dim, self.norm_eps, bias=self.bias)

    def make_mlp(self) -> MLP | SwiGLU:
        if self.mlp == "swiglu":
            return SwiGLU(self.embed_dim, self.hidden_size, self.bias)
        return MLP(self.embed_dim, self.hidden_size, self.mlp, self.bias)


def llama_config(vocab_size: int, **others: Any) -> GPTConfig:
    """Llama's choices: RMS norm, rotary positions, a gated network, no biases, and an output layer of its own."""
    llama = {"bias": False, "norm": "rms", "positions": "rotary", "mlp": "swiglu", "tie_weights": False}
    return GPTConfig(vocab_size, **{**llama, **others})


def test_a_configuration_is_checked_where_it_is_made() -> None:
    message = message_of(partial(GPTConfig, 65, norm="batch"), error=ValueError)
    assert "norm must be one of layer, rms, got 'batch'" in message
    assert "num_heads must be a whole number >= 1" in message_of(partial(GPTConfig, 65, num_heads=0), error=ValueError)
    assert llama_config(65, num_kv_heads=2).mlp == "swiglu"


# %% [markdown]
# ### The block
# The stream runs through; attention and the small network each read it through a norm and add to it.


# %%
class TransformerBlock(Module):
    """Attention and a small network, each with its norm and its sum: (B, T, embed_dim) to the same shape.

    `attend` may stand in for the attention layer: module 19 has one that remembers what came before.
    """

    def __init__(self, config: GPTConfig, rotary: RotaryEmbedding | None = None) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.norm1 = config.make_norm()
        self.attention = SelfAttention(
            config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.bias, config.dropout,
            rotary=rotary,
        )  # fmt: skip
        self.norm2 = config.make_norm()
        self.mlp = config.make_mlp()
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        attend = attend or self.attention
        if self.norm_first:
            x = x + self.dropout(attend(self.norm1(x)))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.dropout(attend(x)))
        return self.norm2(x + self.dropout(self.mlp(x)))


def test_a_block_adds_to_the_stream() -> None:
    for first, second in ((0, 1), (1, 0)):
        block, x = TransformerBlock(GPTConfig(9, 8, 1, 2, 8)), randn(2, 5, 8) * 10
        silenced = [list(layer.parameters()) for layer in (block.attention.out, block.mlp.down)]
        for parameter in silenced[first]:
            zeros_(parameter)
        assert_close(block(4 * x) - 4 * x, block(x) - x, atol=1e-4)  # it reads through a norm
        for parameter in silenced[second]:
            zeros_(parameter)
        assert_close(block(x), x)  # with nothing to add, it is the identity


# %% [markdown]
# ### GPT
# Embeddings, blocks, a last norm, and for each place a score for every token of the vocabulary. The last layer may be
# the embedding itself, read the other way: a token's row is also what a place must point to in order to predict it.


# %%
class GPT(Module):
    """A language model: (B, T) token ids to (B, T, vocab_size) scores of what comes next at each place.

    GPT-2's architecture or Llama's, as the configuration says. Initial values are GPT-2's: normal with standard
    deviation 0.02, less for the layers that write into the stream.
    """

    positions: Any
    head: Any
    if TYPE_CHECKING:  # what stands below, and in the appendix
        generate: Any
        stream: Any
        from_pretrained: ClassVar[Any]
        save_pretrained: Any

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        width, rotary = config.embed_dim, None
        self.tokens = Embedding(config.vocab_size, width)
        self.positions = LearnedPositions(config.context_length, width) if config.positions == "learned" else None
        if self.positions is None:
            rotary = RotaryEmbedding(config.head_size, config.context_length, config.rope_base, config.rope_scaling)
        self.dropout = Dropout(config.dropout)
        self.blocks = ModuleList([TransformerBlock(config, rotary) for _ in range(config.num_layers)])
        self.norm = config.make_norm() if config.norm_first else None
        self.head = None if config.tie_weights else Linear(width, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                zeros_(parameter)
            elif parameter.ndim > 1:
                writes = name.endswith(("attention.out.weight", "mlp.down.weight"))
                normal_(parameter, std=0.02 / math.sqrt(2 * self.config.num_layers) if writes else 0.02)

    def features(self, ids: Tensor) -> Tensor:
        """(B, T) ids to what the blocks have made of each place, (B, T, embed_dim), ready for `scores`."""
        if ids.ndim != 2 or ids.dtype.is_floating_point or not 1 <= ids.shape[1] <= self.config.context_length:
            raise ValueError(f"GPT: expected token ids of shape (B, T) with T from 1 to {self.config.context_length}, "
                             f"got {ids.dtype} {ids.shape}")  # fmt: skip
        x = self.tokens(ids)
        if self.positions is not None:
            x = self.positions(x)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return x if self.norm is None else self.norm(x)

    def scores(self, x: Tensor) -> Tensor:
        """(…, embed_dim) to the scores of all tokens, (…, vocab_size)."""
        return self.tokens.scores(x) if self.head is None else self.head(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.scores(self.features(ids))


def next_token_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, of (B, T, V) scores and (B, T) ids; targets of -100 are left out."""
    return cross_entropy(reshape(scores, shape=(-1, scores.shape[-1])), reshape(targets, shape=(-1,)))


def test_all_places_are_trained_at_once_and_see_no_future() -> None:
    manual_seed(0)
    for config in (
        GPTConfig(11, 8, 2, 2, 8),
        llama_config(11, context_length=8, num_layers=2, num_heads=2, embed_dim=8),
    ):
        model, ids = GPT(config), randint(11, (2, 6))
        scores = model(ids)
        assert scores.shape == (2, 6, 11)
        assert_close(model(ids[:, :4]), scores[:, :4], atol=1e-5)
        assert_close(next_token_loss(scores, randint(11, (2, 6))), math.log(11), rtol=0.1)  # it has no idea yet


def test_what_it_holds_can_be_counted() -> None:
    model, C, L, V, T = GPT(GPTConfig(50, 16, 3, 2, 8)), 8, 3, 50, 16
    block = 4 * C * C + 4 * C + 8 * C * C + 5 * C + 4 * C  # attention, its biases, the network, its biases, the norms
    assert count_parameters(model) == V * C + T * C + L * block + 2 * C
    assert "positions.weight" not in GPT(llama_config(50, num_layers=1, num_heads=2, embed_dim=8)).state_dict()
    next_token_loss(model(randint(V, (2, 5))), randint(V, (2, 5))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # nothing of it is idle


# %% [markdown]
# ### What comes next
# Scores become probabilities at a *temperature*: below 1 the probable becomes more probable still, at 0 only the best
# is left. *Top-k* keeps the k best tokens; *top-p* (Holtzman and others, 2020) the fewest that hold a share p of the
# probability, which are many where the text is open and few where it is not. A *repetition penalty* (Keskar and others,
# 2019) lowers the scores of what has been said.


# %%
def next_probabilities(
    scores: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Scores (B, V) as the probabilities (B, V) from which the next token is drawn."""
    if temperature == 0:
        return where(arange(scores.shape[1], device=scores.device) == scores.argmax(1, keepdim=True), 1.0, 0.0)
    scores = scores.to("float64")
    scores = (scores - scores.amax(1, keepdim=True)) / temperature  # the best is 0, so that nothing overflows
    if top_k is not None and top_k < scores.shape[1]:
        scores = where(scores < topk(scores, top_k)[0][:, -1:], -math.inf, scores)
    probabilities = softmax(scores, dim=-1)
    if top_p is not None and top_p < 1:
        best = sort(probabilities, descending=True)[0]
        needed = cumsum(best, dim=-1) - best < top_p  # as long as those before it do not hold the share
        least = where(needed, best, 2.0).amin(-1, keepdim=True)
        probabilities = where(probabilities < least, 0.0, probabilities)
    return probabilities / probabilities.sum(-1, keepdim=True)


def penalized(scores: Tensor, rows: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Scores (B, V) with those of the tokens in each row divided by the penalty, or multiplied if they are below 0."""
    seen = zeros(scores.shape, dtype="bool", device=scores.device)
    for i, row in enumerate(rows):
        seen[i, list(set(row))] = True
    return where(seen, where(scores > 0, scores / penalty, scores * penalty), scores)


def draw(probabilities: Tensor, chance: Any) -> list[int]:
    """A token for each row of (B, V): where the sum of the probabilities so far first exceeds a random number."""
    with chance:
        numbers = backend_of(probabilities.data).random((probabilities.shape[0], 1), "float64")
    sums = cumsum(probabilities.to("float64"), dim=-1)
    if not all(math.isfinite(total) for total in sums[:, -1].tolist()):
        raise ValueError("generate: the model's scores are not finite; its weights hold nan, or are far too large")
    places = (sums <= Tensor(numbers) * sums[:, -1:]).sum(-1)
    return [min(place, probabilities.shape[1] - 1) for place in places.tolist()]


def choose(scores: Tensor, temperature: float, top_k: int | None, top_p: float | None, chance: Any) -> list[int]:
    """The next token of each row of scores (B, V)."""
    if temperature == 0:
        return scores.argmax(1).tolist()
    return draw(next_probabilities(scores, temperature, top_k, top_p), chance)


def test_the_next_token_is_chosen_among_the_best() -> None:
    scores = tensor([[4.0, 1.0, 0.1, 0.0]]).log()  # probabilities of about 0.78, 0.20, 0.02 and 0
    assert next_probabilities(scores, temperature=0).tolist() == [[1, 0, 0, 0]]
    assert_close(next_probabilities(scores, top_k=2), [[0.8, 0.2, 0, 0]])
    assert_close(next_probabilities(scores, top_p=0.9), [[0.8, 0.2, 0, 0]])
    assert_close(next_probabilities(scores, temperature=0.5, top_k=2), [[16 / 17, 1 / 17, 0, 0]])
    assert_close(penalized(tensor([[2.0, -1.0, 3.0]]), [[0, 1]], 2.0), [[1.0, -2.0, 3.0]])


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    manual_seed(0)
    drawn = draw(tensor([[0.5, 0.0, 0.2, 0.3]]).expand(2000, 4), nullcontext())
    shares = [drawn.count(token) / 2000 for token in range(4)]
    assert shares[1] == 0
    assert_close(shares, [0.5, 0.0, 0.2, 0.3], atol=0.04)


# %% [markdown]
# ### Writing
# The network is asked for the token after the last, which is put behind the text, and so on. Rows of different length
# go side by side: what stands behind a row's last token is padding, and a causal network does not look there. So no
# mask is needed; each row's scores are taken at its own last place. A text that outgrows the context loses its
# beginning.


# %%
def reads_whole(model: GPT) -> Callable[[list[list[int]]], Tensor]:
    """What reads each row anew, as far as the context reaches: rows to the scores (B, V) of what follows them."""

    def read(rows: list[list[int]]) -> Tensor:
        windows = [row[-model.config.context_length :] for row in rows]
        longest = max(map(len, windows))
        padded = tensor([row + [0] * (longest - len(row)) for row in windows], device=model.tokens.weight.device)
        with no_grad(), evaluating(model):
            last = model.features(padded)[list(range(len(windows))), [len(row) - 1 for row in windows]]
            return model.scores(last)

    return read


def test_a_row_is_read_from_its_last_place() -> None:
    model, row = GPT(GPTConfig(13, 6, 2, 2, 8, dropout=0.5)), [5, 6, 7, 8, 9, 10, 11]
    normal_(model.tokens.weight)  # of one opinion, instead of none
    read = reads_whole(model)
    assert_close(read([row]), read([row[1:]]), atol=1e-5)  # what does not fit in the context is its beginning
    both, alone = read([[1, 2], row])[0], model.eval()(tensor([[1, 2]]))[0, -1]
    assert_close(both, alone, atol=1e-5)


READERS: list[Callable[[GPT], Callable[[list[list[int]]], Tensor]]] = [reads_whole]


def attach_reader(reader: Callable[[GPT], Callable[[list[list[int]]], Tensor]]) -> None:
    """Have `reader(model)` read for `continuations`, with the scores that `reads_whole` gives; rows only grow."""
    READERS.append(reader)


def continuations(
    model: GPT, rows: list[list[int]], max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None,
    repetition_penalty: float, stop_tokens: Iterable[int], seed: int | None,
) -> Iterator[None]:  # fmt: skip
    """Put one token behind each row that has not ended, again and again; a step of the iterator for each."""
    chance = nullcontext() if seed is None else backend_of(model.tokens.weight.data).seeded(seed)
    stops, open_rows, read = set(stop_tokens), list(rows), READERS[-1](model)
    for _ in range(max_new_tokens):
        scores = read(open_rows)
        if repetition_penalty != 1:
            scores = penalized(scores, open_rows, repetition_penalty)
        for row, token in zip(open_rows, choose(scores, temperature, top_k, top_p, chance), strict=True):
            row.append(token)
        open_rows = [row for row in open_rows if row[-1] not in stops]
        yield
        if not open_rows:
            return


def check_choices(
    name: str, rows: list[list[int]], max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None,
    repetition_penalty: float,
) -> None:  # fmt: skip
    """ValueError, naming the value, unless a model can write like that."""
    if not rows or not all(rows):
        raise ValueError(f"{name}: a prompt must hold a token at least, such as that of a newline or of <|endoftext|>")
    for what, value, right, fits in (
        ("max_new_tokens", max_new_tokens, ">= 0", max_new_tokens >= 0),
        ("temperature", temperature, ">= 0", 0 <= temperature < math.inf),
        ("top_k", top_k, ">= 1", top_k is None or top_k >= 1),
        ("top_p", top_p, "above 0 and at most 1", top_p is None or 0 < top_p <= 1),
        ("repetition_penalty", repetition_penalty, "above 0", 0 < repetition_penalty < math.inf),
    ):
        if not fits:
            raise ValueError(f"{name}: {what} must be {right}, got {value}")


def stream(
    self: GPT, prompt: Sequence[int] | Tensor, max_new_tokens: int, *, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
    stop_tokens: Iterable[int] = (), seed: int | None = None,
) -> Iterator[int]:  # fmt: skip
    """The tokens behind one prompt, each as soon as it is made. See `generate`."""
    row = list(prompt.tolist() if isinstance(prompt, Tensor) else prompt)
    choices = (temperature, top_k, top_p, repetition_penalty)
    check_choices("stream", [row], max_new_tokens, *choices)
    steps = continuations(self, [row], max_new_tokens, *choices, stop_tokens, seed)
    return (row[-1] for _ in steps)


def generate(
    self: GPT, prompts: Sequence[Any] | Tensor, max_new_tokens: int, *, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
    stop_tokens: Iterable[int] = (), seed: int | None = None,
) -> list[Any]:  # fmt: skip
    """Prompts, and what the model writes behind them.

    Args:
        prompts: a row of token ids, or several of any lengths. Of rows longer than the context, the end is read.
        temperature: of the softmax; 0 always takes the most probable token.
        top_k, top_p: draw among the k most probable tokens only; among the fewest that hold this share of probability.
        repetition_penalty: above 1 makes tokens that stand in the row already less probable.
        stop_tokens: end a row, and stand at its end.
        seed: the same one gives the same tokens. None: from the generator that `manual_seed` seeds.

    Returns:
        A list of ids, or a list of lists, as the prompts were given.

    Raises:
        ValueError: an empty prompt, or a choice out of range.
    """
    given = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    alone = bool(given) and not isinstance(given[0], (list, tuple, Tensor))
    rows = [row.tolist() if isinstance(row, Tensor) else list(row) for row in ([given] if alone else given)]
    choices = (temperature, top_k, top_p, repetition_penalty)
    check_choices("generate", rows, max_new_tokens, *choices)
    for _ in continuations(self, rows, max_new_tokens, *choices, stop_tokens, seed):
        pass
    return rows[0] if alone else rows


GPT.extend_class(generate=generate, stream=stream)


def test_rows_side_by_side_are_written_as_alone() -> None:
    manual_seed(0)
    model = GPT(GPTConfig(13, 6, 2, 2, 8))
    normal_(model.tokens.weight)  # of one opinion, instead of none
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    together = model.generate(prompts, 8, temperature=0)
    assert together == [model.generate(prompt, 8, temperature=0) for prompt in prompts]
    assert (
        list(model.stream([4], 8, seed=3)) == model.generate([4], 8, seed=3)[1:] == model.generate([4], 8, seed=3)[1:]
    )
    stop = together[1][3]
    assert model.generate([4], 8, temperature=0, stop_tokens=[stop])[-1] == stop
    assert "must hold a token" in message_of(model.generate, [], 3, error=ValueError)


# %% [markdown]
# ## Systems analysis
#
# Where a training step's time goes, how far it is from the products alone, and what writing costs as long as each
# token asks the network to read everything again. (Module 19 keeps the keys and values, and ends that.)


# %%
def analyze() -> None:
    """Measure a training step by operation, its rate beside a product's, and the time a token takes to write."""
    config = GPTConfig(65, 64, 4, 4, 128, mlp="gelu")
    model, ids, targets = GPT(config), randint(65, (12, 64)), randint(65, (12, 64))
    optimizer = AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        next_token_loss(model(ids), targets).backward()
        optimizer.step()

    taken, count = seconds(step), count_parameters(model)
    operations = ids.numel() * (6 * count + 12 * 4 * 64 * 128)
    side = randn(1024, 1024)
    product = 2 * 1024**3 / seconds(lambda: side @ side)
    rate = operations / taken
    figures = [count, 4 * count / 1e6, operations / 1e9, taken * 1e3, rate / 1e9, rate / product]
    print("4 layers, 128 wide, 64 places, batch 12: a training step")
    print_table(["weights", "MB", "GFLOP", "ms", "GFLOP/s", "of a product's"], [figures])
    print()
    spent = sorted(time_by_operation(step).items(), key=lambda item: -item[1])
    total = sum(t for _, t in spent)
    print_table(["operation", "ms", "share"], [[name, t * 1e3, f"{t / total:.0%}"] for name, t in spent[:9]])
    print()
    rows = []
    for length in (1, 16, 64):
        one = seconds(lambda: model.generate([0] * length, 1, seed=0))  # noqa: B023
        rows.append([length, one * 1e3, 2 * count * length / one / 1e9])
    print_table(["tokens read", "ms for the next", "GFLOP/s"], rows)


# %% [markdown]
# ## Production context
#
# Hugging Face's `transformers` has one class for each architecture (`GPT2LMHeadModel`, `LlamaForCausalLM`); the
# appendix reads and writes their folders, so that published weights run in the code above.
# `torch.nn.TransformerEncoderLayer` is the first transformer's block, with the norm behind the sum unless `norm_first`
# is said. In training at scale, `torch.compile` fuses norms, activations and sums into few kernels, and the weights of
# a layer are split over devices (Megatron-LM, FSDP). Left out here: experts of which each token uses few, dropping of
# keys and values, and parallel devices.

# %% [markdown]
# ## Integration testing


# %%
def test_a_gpt_learns_to_count() -> None:
    manual_seed(0)
    model = GPT(GPTConfig(10, 16, 2, 2, 32))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        numbers = (randint(10, (16, 1)) + arange(13)) % 10
        loss = next_token_loss(model(numbers[:, :-1]), numbers[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.generate([[7, 8], [3, 4, 5]], 6, temperature=0) == [
        [7, 8, 9, 0, 1, 2, 3, 4],
        [3, 4, 5, 6, 7, 8, 9, 0, 1],
    ]


# %% [markdown]
# ## Thinking questions
#
# 1. The weights of a 768-wide GPT-2 with 50,257 tokens: which share is in the embedding? And if it were not tied?
# 2. Layer norm is not linear, yet at inference nothing could be folded into its neighbours but its weight. Why not the
#    rest?
# 3. Why does a larger temperature make longer texts go astray sooner, even if each token alone is hardly less probable?
# 4. A step of training computes all places at once, writing one place at a time. Which of them uses the machine better?

# %% [markdown]
# ## Summary
#
# Two norms, attention, a small network and two sums are a block; a stack of blocks between an embedding and its
# transpose is a GPT. It learns from text alone, writes, and reads the weights of larger ones. Modules 15 to 20 make it
# ten times faster.


if __name__ == "__main__":
    run_module(globals())
