"""Module 12: embeddings, or how words become vectors, and how a network is told where they stand.

Learning objectives. After this module you can
1. say why looking up a row is a matrix product, and never compute that product;
2. derive the gradient of a look-up, and add up the rows of repeated words without a loop over them;
3. show that attention cannot tell the order of its inputs, and give it positions in four ways;
4. explain rotary positions as a rotation that leaves only distances, and derive its gradient;
5. count what embeddings and positions take in memory and time, and measure it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral
from typing import Any

import tinytorch.m06_autograd_appendix  # noqa: F401 - the rules of 02's appendix
from tinytorch.backends import DTYPE_KINDS, backend_of
from tinytorch.m01_setup import assert_close, manual_seed, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import (
    Tensor,
    amax,
    concatenate,
    eq,
    expand,
    float64,
    getitem,
    matmul,
    mul,
    neg,
    op,
    randn,
    reshape,
    stack,
    tensor,
    transpose,
    unsqueeze,
    where,
    zeros,
)
from tinytorch.m02_tensor import pow as power
from tinytorch.m02_tensor_appendix import (
    Writes,
    arange,
    clamp,
    cos,
    empty,
    flatten,
    get_default_device,
    get_default_dtype,
    norm,
    one_hot,
    randint,
    roll,
    sin,
)
from tinytorch.m03_activations import softmax
from tinytorch.m04_layers import Linear, Module, Parameter, linear, normal_, unusual
from tinytorch.m05_losses import cross_entropy
from tinytorch.m06_autograd import gradcheck, gradient, no_grad, raw
from tinytorch.m07_optimizers import SGD

# %% [markdown]
# ## Mathematical foundations
#
# A token is a number $i < V$ without any meaning: token 70 is not twice token 35. An **embedding** gives each token a
# vector of its own, row $i$ of a table $W$ of shape $(V, C)$, and learns the table. With $e_i$, the row that is 1 at
# $i$ and 0 elsewhere (*one-hot*), it is a linear layer:
#
# $$y = W_i = e_i W.$$
#
# The product takes $2 V C$ operations to copy $C$ numbers, so one looks up instead. **Backwards** it is the product's
# gradient all the same, $\partial L / \partial W = \sum_n e_{i_n}^\top g_n$: each row gets the sum of what arrives at
# the places where its token stands, and all others get 0. *Gather* forward is *scatter-add* backward.
#
# **Positions.** Attention (module 13) mixes the places of a sequence by how their vectors fit each other,
# $\sum_s \mathrm{softmax}_s(x_t \cdot x_s) x_s$. Exchange two places, and the results are exchanged with them: "dog
# bites man" is "man bites dog". So the vectors themselves must say where they stand:
#
# - **learned**: add row $t$ of a second table; nothing is known beyond its end;
# - **sinusoidal** (Vaswani and others, 2017): add $\sin(t \omega_k)$ and $\cos(t \omega_k)$, where $\omega_k =
#   10000^{-2k/C}$: the hands of clocks that go ever slower;
# - **rotary** (Su and others, 2021): turn each pair of numbers of a query or a key by the angle $t \omega_k$. Since
#   $R_t^\top R_s = R_{s-t}$, the score $(R_t q) \cdot (R_s k) = q \cdot R_{s-t} k$ depends on the distance alone;
# - **ALiBi** (Press and others, 2022): leave the vectors alone, and subtract $m_h |t - s|$ from the scores of head $h$.

# %% [markdown]
# ## Implementation
#
# ### Looking up is a product
# The definition, against which everything faster is tested.


# %%
def embed_by_one_hot(ids: Tensor, weight: Tensor) -> Tensor:
    """Row `ids` of the weight, as a matrix product."""
    return matmul(one_hot(ids, len(weight)).to(weight.dtype), weight)


def test_a_product_with_one_hot_picks_a_row() -> None:
    weight = tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert embed_by_one_hot(tensor([2, 0]), weight).tolist() == [[5, 6], [1, 2]]


# %% [markdown]
# ### Look-up and its gradient
# Forward, the array library takes rows. Backward is harder: a word may occur a hundred times, and its row gets the sum.
# Adding one row after the other is a loop in Python, or NumPy's `add.at`, which is no faster. Instead rows are sorted
# by their ids, so that equal ids are neighbours, and each run is folded: every second row is added to the one before
# it, then every fourth to the one two before it … A run of 100 takes seven rounds, in which all runs take part at once.
# Such a tree of sums is also more precise than a sum one by one.


# %%
@op
def embedding_lookup(xp, ids, weight, *, padding_idx=None, scale_grad_by_freq=False):
    """Rows `ids` (…) of a weight (V, C): (…, C). The attributes are for the gradient. See `embedding`."""
    flat = xp.reshape(xp.cast(ids, "int64"), (-1,))
    return xp.reshape(xp.take(weight, flat, axis=0), (*ids.shape, *weight.shape[1:]))


@op
def embedding_weight_gradient(xp, g, ids, *, rows, padding_idx=None, scale_grad_by_freq=False):
    """g (…, C), each of its rows added to row `ids` (…) of zeros (rows, C): what `embedding_lookup` does, backwards."""
    name, width = xp.dtype_name(g), g.shape[-1]
    out, count = xp.zeros((rows, width), dtype=g.dtype), math.prod(ids.shape)
    if count:
        flat, values = xp.reshape(xp.cast(ids, "int64"), (count,)), xp.reshape(g, (count, width))
        wide = "float32" if name in ("float16", "bfloat16") else name  # a sum of many halves would lose the last ones
        firsts, sums, times = sums_of_equals(xp, flat, xp.cast(values, wide))
        if scale_grad_by_freq:
            sums = sums / xp.expand_dims(xp.cast(times, wide), axis=1)
        xp.assign(out, firsts, xp.cast(sums, name))
        if padding_idx is not None:
            out[padding_idx, ...] = 0
    return out


def sums_of_equals(xp: Any, ids: Any, values: Any) -> tuple[Any, Any, Any]:
    """(each id that occurs, the sum of its values (n, C), how often it occurs), for ids (n,) and n > 0."""
    order = xp.argsort(ids, stable=True)
    ids, values = xp.take(ids, order), xp.take(values, order, axis=0)
    begins = xp.concat([xp.ones(1, dtype=xp.bool), ids[1:] != ids[:-1]])
    starts = xp.nonzero(begins)[0]
    run = xp.cumulative_sum(xp.cast(begins, "int64")) - 1
    rank = xp.arange(ids.shape[0]) - xp.take(starts, run)  # 0, 1, 2 … within each run
    longest, step = int(xp.max(rank)), 1
    while step <= longest:
        here = xp.nonzero((rank & (2 * step - 1)) == step)[0]
        xp.assign(values, here - step, xp.take(values, here - step, axis=0) + xp.take(values, here, axis=0))
        step *= 2
    times = xp.concat([starts[1:], xp.asarray([ids.shape[0]])]) - starts
    return xp.take(ids, starts), xp.take(values, starts, axis=0), times


# %% [markdown]
# The gradient is linear in `g`, and its own gradient looks up again.


# %%
def lookup_rule(g: Any, ids: Any, weight_shape: tuple, padding_idx: int | None, scale_grad_by_freq: bool) -> Any:
    return embedding_weight_gradient(
        g, ids, rows=weight_shape[0], padding_idx=padding_idx, scale_grad_by_freq=scale_grad_by_freq
    )


def scatter_rule(h: Any, ids: Any, rows: int, padding_idx: int | None, scale_grad_by_freq: bool) -> Any:
    """h's row for each id; 0 for padding, and divided by how often the id occurs where that was asked for."""
    out = embedding_lookup(ids, h)
    if padding_idx is not None:
        out = where(eq(unsqueeze(ids, -1), padding_idx), 0, out)
    if scale_grad_by_freq:
        one = backend_of(raw(ids)).ones((*ids.shape, 1), dtype=raw(out).dtype)
        out = out / embedding_lookup(ids, embedding_weight_gradient(one, ids, rows=rows))
    return out


gradient(embedding_lookup, ids=None, weight=lookup_rule)
gradient(embedding_weight_gradient, g=scatter_rule, ids=None)


def test_gradient_is_that_of_the_product() -> None:
    weight, ids = randn(7, 3, dtype=float64, requires_grad=True), tensor([[2, 2, 6], [0, 2, 6]])
    g = randn(2, 3, 3, dtype=float64)
    assert_close(embedding_lookup(ids, weight), embed_by_one_hot(ids, weight))
    (embed_by_one_hot(ids, weight) * g).sum().backward()
    assert_close(embedding_weight_gradient(g, ids, rows=7), weight.grad, rtol=1e-12)
    assert gradcheck(lambda weight: embedding_lookup(ids, weight, padding_idx=None), weight)


# %% [markdown]
# ### What is no row is an error
# NumPy takes row -1 for the last one, and a GPU reads whatever lies there. A wrong id is nearly always a tokenizer that
# does not belong to the model, and is to be found at once: one comparison of each id, next to the copy of a whole row.


# %%
def check_ids(name: str, ids: Any, rows: int) -> None:
    """An error unless all ids are rows of a table: integers from 0 to rows - 1."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: ids must be a tensor of integers, got {type(ids).__name__}; tensor(…) makes one")
    if DTYPE_KINDS[ids.dtype] is not int:
        raise TypeError(f"{name}: ids must be integers, got {ids.dtype} {ids.shape}; ids.to('int64') makes them so")
    xp = backend_of(ids.data)
    flat = xp.reshape(xp.cast(ids.data, "int64"), (-1,))
    wrong = (flat < 0) | (flat >= rows)
    if bool(xp.any(wrong)):
        first = int(flat[int(xp.argmax(xp.cast(wrong, "int64")))])
        raise IndexError(f"{name}: index {first} is out of range for {rows} rows")


def row_number(name: str, index: Any, rows: int) -> int | None:
    """padding_idx counted from the start; ValueError if there is no such row."""
    if index is None:
        return None
    if not isinstance(index, Integral) or not -rows <= int(index) < rows:
        raise ValueError(f"{name}: padding_idx must be one of the {rows} rows, got {index!r}")
    return int(index) % rows


def shorten_rows(weight: Tensor, ids: Tensor, max_norm: float, norm_type: float) -> None:
    """Scale the rows that ids name and that are longer than max_norm to that length, in the weight itself."""
    with no_grad():
        xp = backend_of(weight.data)
        rows = xp.unique_values(xp.reshape(xp.cast(ids.data, "int64"), (-1,)))
        found = Tensor(xp.take(weight.data, rows, axis=0))
        lengths = norm(found, norm_type, dim=1, keepdim=True)
        found = where(lengths > max_norm, found * (max_norm / (lengths + 1e-7)), found)
        xp.assign(weight.data, rows, found.data)
    Writes.note(weight.data)


def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """Rows of a weight (V, C) by integers of any shape (…): (…, C).

    Args:
        padding_idx: a row that gets no gradient; counted from the end if negative.
        max_norm: rows that are looked up and longer than this are first made this long, in the weight itself.
        norm_type: which norm says how long: 2 is the usual one.
        scale_grad_by_freq: divide each row's gradient by how often its id occurs in the input.
        sparse: no difference here: gradients are dense.

    Raises:
        IndexError: an id is not from 0 to V - 1.
        TypeError: ids are no integers.
        ValueError: padding_idx is no row, or the weight is no table.
    """
    if weight.ndim != 2:
        raise ValueError(f"embedding: expected a weight (rows, features), got {weight.shape}")
    rows = weight.shape[0]
    check_ids("embedding", input, rows)
    if max_norm is not None:
        shorten_rows(weight, input, max_norm, norm_type)
    padding_idx = row_number("embedding", padding_idx, rows)
    return embedding_lookup(input, weight, padding_idx=padding_idx, scale_grad_by_freq=bool(scale_grad_by_freq))


def test_ids_that_are_no_rows_are_refused() -> None:
    weight = randn(65, 4)
    assert_close(embedding(tensor([[64, 0]]), weight), [weight[[64, 0]].tolist()])
    assert embedding(tensor(3), weight).shape == (4,)
    message = message_of(embedding, tensor([3, 65, -1]), weight, error=IndexError)
    assert message == "embedding: index 65 is out of range for 65 rows"
    assert "index -1 is" in message_of(embedding, tensor([3, -1]), weight, error=IndexError)
    assert "must be integers, got float32" in message_of(embedding, zeros(2), weight, error=TypeError)


# %% [markdown]
# ### The layer
# Values start normal with standard deviation 1, each token with a direction of its own. The same table can serve as
# the last layer of a language model, which asks how well a vector fits each token: *tied weights*.


# %%
class Embedding(Module):
    """A table with a vector for each token.

    Args:
        num_embeddings, embedding_dim: how many tokens there are, and how long a vector is.
        padding_idx: a token whose vector starts as 0 and gets no gradient.
        max_norm, norm_type, scale_grad_by_freq, sparse: as `embedding` takes them.

    Attributes:
        weight: (num_embeddings, embedding_dim), starts normal with mean 0 and standard deviation 1.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, max_norm: float | None = None,
        norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(f"Embedding: expected at least 1 row and 1 feature, got {num_embeddings}, {embedding_dim}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = row_number("Embedding", padding_idx, num_embeddings)
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self.weight = Parameter(empty(num_embeddings, embedding_dim, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        normal_(self.weight)
        if self.padding_idx is not None:
            with no_grad():
                self.weight[self.padding_idx] = 0.0

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)

    def scores(self, x: Tensor) -> Tensor:
        """How well vectors (…, embedding_dim) fit each row: (…, num_embeddings). The last layer of tied weights."""
        return linear(x, self.weight)

    def extra_repr(self) -> str:
        more = unusual(
            padding_idx=(self.padding_idx, None), max_norm=(self.max_norm, None), norm_type=(self.norm_type, 2.0),
            scale_grad_by_freq=(self.scale_grad_by_freq, False), sparse=(self.sparse, False),
        )  # fmt: skip
        return f"{self.num_embeddings}, {self.embedding_dim}{more}"


def test_padding_is_zero_and_stays_zero() -> None:
    layer = Embedding(5, 3, padding_idx=-1)
    assert repr(layer) == "Embedding(5, 3, padding_idx=4)"
    assert layer.weight[4].tolist() == [0, 0, 0]
    layer(tensor([4, 1, 1])).sum().backward()
    assert layer.weight.grad.tolist() == [[0] * 3, [2] * 3, [0] * 3, [0] * 3, [0] * 3]


def test_tied_weights_get_both_gradients() -> None:
    table, ids = Embedding(5, 3), tensor([1, 1, 4])
    table.scores(table(ids)).sum().backward()
    assert_close(table.weight.grad[0], table.weight[[1, 1, 4]].sum(0))  # row 0 only has what the last layer gives it
    assert_close(table.weight.grad[4], table.weight[[1, 1, 4]].sum(0) + table.weight.sum(0))


# %% [markdown]
# ### Why positions
# Attention without them, in one line. Whatever order its inputs are in, each place gets the same result.


# %%
def bare_attention(x: Tensor) -> Tensor:
    """Each place of (T, C) takes from all others by how well their vectors fit."""
    return matmul(softmax(matmul(x, transpose(x, 0, 1)), dim=1), x)


def test_attention_does_not_see_order() -> None:
    x, order = randn(5, 8), [3, 0, 4, 1, 2]
    assert_close(bare_attention(x)[order], bare_attention(x[order]), rtol=1e-4, atol=1e-5)
    placed = LearnedPositions(5, 8, std=1.0)
    assert (bare_attention(placed(x))[order] - bare_attention(placed(x[order]))).abs().amax().item() > 0.1


# %% [markdown]
# ### Added positions: learned and sinusoidal
# Both add a row of a table. An `offset` says where a piece of a longer sequence begins: module 19 feeds a text token by
# token. The sinusoids of position $t + d$ are those of $t$, turned by an angle that depends on $d$ alone, so that a
# linear layer can look a fixed distance back.


# %%
def positions_of(name: str, x: Tensor, offset: int, length: int, dim: int) -> slice:
    """The positions of x (…, T, dim), the first being `offset`; ValueError if they are not all below `length`."""
    if x.ndim < 2 or x.shape[-1] != dim:
        raise ValueError(f"{name}: expected (…, T, {dim}), got {x.shape}")
    if offset < 0 or offset + x.shape[-2] > length:
        raise ValueError(f"{name}: {x.shape[-2]} positions from {offset} on do not fit in {length} positions")
    return slice(offset, offset + x.shape[-2])


class LearnedPositions(Module):
    """Adds a learned vector for each position to (…, T, dim). `weight` is (length, dim), and starts normal."""

    def __init__(self, length: int, dim: int, std: float = 0.02, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = Parameter(empty(length, dim, dtype=dtype, device=device))
        normal_(self.weight, std=std)

    def rows(self, index: Any) -> Tensor:
        """The vectors of some positions."""
        return self.weight[index]

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        return x + self.rows(positions_of("LearnedPositions", x, offset, *self.weight.shape))

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


def frequencies(dim: int, base: float) -> Tensor:
    """base^(-2k / dim) for k = 0 … in float64: the angle by which each pair of numbers turns from place to place."""
    return power(base, arange(0, dim, 2, dtype=float64, device="cpu") * (-1 / dim))


def sinusoidal_positions(length: int, dim: int, base: float = 10000.0, device: Any = None, dtype: Any = None) -> Tensor:
    """(length, dim): sin(t ω_k) in the even and cos(t ω_k) in the odd columns, with ω_k = base^(-2k / dim)."""
    angles = unsqueeze(arange(length, dtype=float64, device="cpu"), 1) * frequencies(dim, base)
    table = flatten(stack([sin(angles), cos(angles)], dim=2), 1)[:, :dim]
    return table.to(dtype=dtype or get_default_dtype(), device=device or get_default_device())


class SinusoidalPositions(Module):
    """Adds `sinusoidal_positions` to (…, T, dim): nothing to learn, and nothing in the saved state."""

    table: Tensor

    def __init__(self, length: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.register_buffer("table", sinusoidal_positions(length, dim, device=device, dtype=dtype), persistent=False)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        return x + self.table[positions_of("SinusoidalPositions", x, offset, *self.table.shape)].to(x.dtype)


def test_sinusoids_of_a_distance_are_a_rotation() -> None:
    table = sinusoidal_positions(50, 6, dtype=float64)
    assert_close(table[7], [f(7 * 10000 ** (-2 * k / 6)) for k in range(3) for f in (math.sin, math.cos)], rtol=1e-12)
    scores = matmul(table, transpose(table, 0, 1))
    assert_close(scores[10, 13], scores[40, 43], rtol=1e-12)  # only the distance counts
    message = message_of(SinusoidalPositions(8, 4), zeros(2, 6, 4), 3, error=ValueError)
    assert message == "SinusoidalPositions: 6 positions from 3 on do not fit in 8 positions"


# %% [markdown]
# ### Rotary positions
# The pairs that turn together are not neighbours but one from each half, number $k$ and number $k + D/2$, as
# published Llama weights want it. So the tables hold each angle twice, and with $x = (x_1, x_2)$ a rotation is
# $x \cos + (-x_2, x_1) \sin$. NumPy is fast where rows are long: the halves are exchanged first, and then all products
# are of whole rows. The gradient turns back; if the halves of `sin` differ, they change places in it.


# %%
@op(dtypes="common")
def rotate(xp, x, cos, sin):
    """Turn the pairs (x_k, x_(k + D/2)) of x (…, T, D) by angles with these cosines and sines, (T, D) or (…, T, D)."""
    if x.shape[-1] % 2 or x.shape[-1:] != cos.shape[-1:] or cos.shape != sin.shape:
        shapes = f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        raise ValueError(f"rotate: expected (…, T, D) and two (T, D), D even, got x {tuple(x.shape)}, {shapes}")
    half = x.shape[-1] // 2
    out = xp.concat([x[..., half:], x[..., :half]], axis=-1) * xp.concat([-sin[..., :half], sin[..., half:]], axis=-1)
    out += x * cos
    return out


def turned(x: Any) -> Any:
    """(-x_2, x_1): each pair turned by a right angle."""
    half = x.shape[-1] // 2
    return concatenate(neg(getitem(x, index=(..., slice(half, None)))), getitem(x, index=(..., slice(0, half))), dim=-1)


gradient(rotate, x=lambda g, cos, sin: rotate(g, cos, neg(roll(sin, shifts=sin.shape[-1] // 2, dims=-1))),
         cos=lambda g, x: mul(g, x), sin=lambda g, x: mul(g, turned(x)))  # fmt: skip


def test_rotating_keeps_lengths_and_its_gradient_turns_back() -> None:
    x, (cos, sin) = randn(2, 5, 6, dtype=float64, requires_grad=True), rotary_tables(5, 6, dtype=float64)
    out = rotate(x, cos, sin)
    assert_close((out * out).sum(-1), (x * x).sum(-1), rtol=1e-12)
    out.backward(out)
    assert_close(x.grad, x, rtol=1e-12)
    assert gradcheck(rotate, [x, cos.requires_grad_(), randn(5, 6, dtype=float64, requires_grad=True)])


# %% [markdown]
# Models that were trained on short texts are made to read longer ones by turning more slowly: all pairs (*linear*, Chen
# and others, 2023), or, as in Llama 3.1, only those pairs that never came around within the old length. Each way is a
# function in a table; the appendix has more.


# %%
def linear_scaling(usual: Tensor, base: float, factor: float) -> tuple[Tensor, float]:
    """All frequencies `factor` times lower."""
    return usual / factor, 1.0


def llama3_scaling(
    usual: Tensor, base: float, factor: float, low_freq_factor: float, high_freq_factor: float,
    original_max_position_embeddings: int,
) -> tuple[Tensor, float]:  # fmt: skip
    """Pairs that turn fewer than low_freq_factor times within the original length become `factor` times slower.

    Those that turn more than high_freq_factor times stay as they are, with a straight line between.
    """
    turns = usual * (original_max_position_embeddings / (2 * math.pi))
    kept = clamp((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return usual * (kept + (1 - kept) / factor), 1.0


# From the name of a way to a function of the frequencies, the base and options. It returns the frequencies to use, and
# what cosines and sines are multiplied by.
ROPE_SCALINGS: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "default": lambda usual, base: (usual, 1.0),
    "linear": linear_scaling,
    "llama3": llama3_scaling,
}


def rotary_tables(
    length: int, dim: int, base: float = 10000.0, scaling: Mapping[str, Any] | None = None, device: Any = None,
    dtype: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(cos, sin), each (length, dim): of the angles t ω_k, in both halves of the columns.

    Args:
        scaling: how the angles are changed, {"rope_type": "linear", "factor": 4.0} for example.

    Raises:
        ValueError: dim is odd, or nobody knows such a scaling.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"rotary_tables: dim must be even, for its numbers turn in pairs, got {dim}")
    turning, size = scaled_frequencies(frequencies(dim, base), base, scaling)
    angles = unsqueeze(arange(length, dtype=float64, device="cpu"), 1) * turning
    angles = concatenate(angles, angles, dim=1)
    like = {"dtype": dtype or get_default_dtype(), "device": device or get_default_device()}
    return (cos(angles) * size).to(**like), (sin(angles) * size).to(**like)


def scaled_frequencies(usual: Tensor, base: float, scaling: Mapping[str, Any] | None) -> tuple[Tensor, float]:
    """What the function that `scaling` names returns; ValueError if there is none, or for options it does not take."""
    options = dict(scaling or {"rope_type": "default"})
    name = options.pop("rope_type", None) or options.pop("type", None)  # the older key
    if name not in ROPE_SCALINGS:
        known = ", ".join(map(repr, ROPE_SCALINGS))
        raise ValueError(f"rotary_tables: no rope_type {name!r}; there are {known}")
    try:
        return ROPE_SCALINGS[name](usual, base, **options)
    except TypeError as error:  # an option too many, or one that is missing
        raise ValueError(f"rotary_tables: rope_type {name!r} with {options}: {error}") from None


def test_scaling_slows_the_slow_hands_down() -> None:
    options = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 100}
    usual = tensor([1.0, 2 * math.pi * 0.025, 2 * math.pi * 0.005], dtype=float64)  # 16, 2.5 and half a turn in 100
    slow, _ = scaled_frequencies(usual, 1e4, {"rope_type": "llama3", **options})
    assert_close(slow / usual, [1, 0.5 + 0.5 / 8, 1 / 8], rtol=1e-12)
    linear = rotary_tables(9, 4, scaling={"rope_type": "linear", "factor": 4.0})
    assert_close([t[8] for t in linear], [t[2] for t in rotary_tables(9, 4)])
    message = message_of(partial(rotary_tables, scaling={"type": "wide"}), 9, 4, error=ValueError)
    assert "rotary_tables: no rope_type 'wide'; there are 'default', 'linear', 'llama3'" in message


class RotaryEmbedding(Module):
    """Turns queries or keys (B, H, T, dim) by their positions.

    Args:
        dim: the length of a head's vectors, even.
        max_positions: how many positions there are; tables grow to what is used of them.
        base, scaling: as `rotary_tables` takes them.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, dim: int, max_positions: int = 2048, base: float = 10000.0, scaling: Mapping[str, Any] | None = None,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.max_positions, self.base, self.scaling = dim, max_positions, base, scaling
        tables = rotary_tables(min(max_positions, 1024), dim, base, scaling, device, dtype)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, x: Tensor, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """x (B, H, T, dim), or (…, T, dim), turned.

        Args:
            offset: the position of the first place.
            positions: the position of each place instead, integers (T,), or (B, T) for an x of four axes.
        """
        if positions is not None:
            check_ids("RotaryEmbedding", positions, self.max_positions)
            fitting = [x.shape[-2:-1], *((n, x.shape[-2]) for n in (1, len(x)) if x.ndim == 4)]
            if tuple(positions.shape) not in fitting:
                wanted = "(T,), or (B, T) for an x of four axes"
                raise ValueError(f"RotaryEmbedding: positions must be {wanted}, got {positions.shape} for {x.shape}")
            length = 1 + int(amax(positions).item()) if positions.numel() else 0
            cos, sin = (embedding_lookup(positions, table) for table in self.tables(length))
            if positions.ndim == 2:
                cos, sin = unsqueeze(cos, 1), unsqueeze(sin, 1)  # the same for all heads
        else:
            where_to = positions_of("RotaryEmbedding", x, offset, self.max_positions, self.dim)
            cos, sin = (table[where_to] for table in self.tables(where_to.stop))
        return rotate(x, cos.to(x.dtype), sin.to(x.dtype))

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of at least this many positions."""
        if length > len(self.cos):
            longer = min(self.max_positions, 2 * length)
            like = {"device": self.cos.device, "dtype": self.cos.dtype}
            self.cos, self.sin = rotary_tables(longer, self.dim, self.base, self.scaling, **like)
        return self.cos, self.sin

    def extra_repr(self) -> str:
        scaling = f", scaling={self.scaling}" if self.scaling else ""
        return f"{self.dim}, max_positions={self.max_positions}, base={self.base}{scaling}"


def test_scores_of_rotated_vectors_depend_on_the_distance() -> None:
    rotary, q, k = RotaryEmbedding(8, max_positions=3000), randn(8), randn(8)
    queries, keys = (rotary(expand(reshape(x, shape=(1, 1, 1, 8)), shape=(1, 1, 40, 8)))[0, 0] for x in (q, k))
    scores = matmul(queries, transpose(keys, 0, 1))
    assert_close(scores[5, 2], scores[37, 34], rtol=1e-4, atol=1e-5)
    x = randn(2, 1, 3, 8)
    assert_close(rotary(x, offset=2000)[1], rotary(x, positions=tensor([[0, 1, 2], [2000, 2001, 2002]]))[1])
    message = message_of(rotary, x, 2998, error=ValueError)
    assert message == "RotaryEmbedding: 3 positions from 2998 on do not fit in 3000 positions"


# %% [markdown]
# ### ALiBi
# Each head is short-sighted to its own degree: a slope that falls geometrically from head to head. Where their number
# is no power of two, the slopes between those of the next smaller one are taken too, as in the paper's program.


# %%
def alibi_slopes(num_heads: int, device: Any = None, dtype: Any = None) -> Tensor:
    """(H,): 2^(-8/H), 2^(-16/H), …, 2^(-8) for a power of two H."""
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: expected at least 1 head, got {num_heads}")
    whole = 1 << num_heads.bit_length() - 1  # the largest power of two that is not above
    slopes = [2 ** (-8 * (h + 1) / whole) for h in range(whole)]
    between = [2 ** (-4 * (h + 1) / whole) for h in range(0, 2 * whole, 2)]
    return tensor([*slopes, *between[: num_heads - whole]], dtype=dtype or get_default_dtype(), device=device)


def alibi_bias(
    num_heads: int, length: int, keys: int | None = None, device: Any = None, dtype: Any = None
) -> Tensor:  # fmt: skip
    """(H, length, keys), to be added to attention's scores: minus each head's slope times the distance.

    The queries are the last `length` of the `keys` places; these are as many if None.
    """
    keys = length if keys is None else keys
    rows = unsqueeze(arange(keys - length, keys, device=device), 1)
    distance = (rows - arange(keys, device=device)).abs()
    slopes = alibi_slopes(num_heads, device, dtype)
    return -reshape(slopes, shape=(-1, 1, 1)) * distance.to(slopes.dtype)


def test_alibi_falls_with_the_distance() -> None:
    assert alibi_slopes(4).tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    assert_close(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert alibi_bias(4, 3)[0].tolist() == [[0, -0.25, -0.5], [-0.25, 0, -0.25], [-0.5, -0.25, 0]]
    assert alibi_bias(4, 1, keys=3)[0].tolist() == [[-0.5, -0.25, 0]]


# %% [markdown]
# ## Systems analysis
#
# A look-up does no arithmetic: it moves the rows that it returns, however long the table. The product with one-hot rows
# reads the whole table and takes as long as a layer of that size. Backward, the gradient has the table's size, so that
# filling it with zeros can take longer than the sums; PyTorch's `sparse=True` avoids that.


# %%
def analyze() -> None:
    """Measure look-ups beside products with one-hot rows, and what positions take as sequences grow."""
    rows = []
    for count, vocabulary, width in ((768, 65, 128), (1024, 4096, 256), (256, 50257, 768)):
        ids, weight, g = randint(vocabulary, (count,)), randn(vocabulary, width), randn(count, width)
        with no_grad():
            taken = [seconds(embedding, ids, weight, repeat=3), seconds(embed_by_one_hot, ids, weight, repeat=1),
                     seconds(partial(embedding_weight_gradient, g, ids, rows=vocabulary), repeat=3)]  # fmt: skip
        rows.append([f"{count} of {vocabulary} x {width}", *(f"{t * 1e3:.3f}" for t in taken),
                     f"{4 * vocabulary * width / 1e6:.2f}", f"{4 * count * vocabulary / 1e6:.2f}"])  # fmt: skip
    print_table(["ids, table", "look-up, ms", "product, ms", "gradient, ms", "table, MB", "one-hot rows, MB"], rows)
    print()
    lines, rotary = list[list](), RotaryEmbedding(64, max_positions=4096)
    for length in (64, 256, 1024, 4096):
        x, heads = randn(1, length, 768), randn(1, 12, length, 64)
        learned = LearnedPositions(length, 768)
        with no_grad():
            taken = [seconds(learned, x, repeat=3), 2 * seconds(rotary, heads, repeat=3)]
        sizes = (length * 768, 2 * length * 64, 12 * length**2)
        lines.append([length, *(f"{t * 1e3:.3f}" for t in taken), *(f"{4 * n / 1e6:.2f}" for n in sizes)])
    print_table(["positions, 12 heads of 64", "added, ms", "rotary q and k, ms", "added, MB", "rotary tables, MB",
                 "ALiBi's bias, MB"], lines)  # fmt: skip


# %% [markdown]
# ## Production context
#
# `torch.nn.Embedding` calls `index_select` forward; backward, each thread takes a share of the table's rows on the CPU,
# and on CUDA ids are sorted and runs reduced, as here. There an id out of range is a device-side assertion that ends
# the process; here the check costs a wait for the device. Recommender systems have tables of terabytes, split by rows
# over machines, with sparse gradients and optimizers that touch only the rows in use. Fused attention kernels rotate
# queries and keys as they load them, and compute ALiBi's bias from a head's slope, without its $H T^2$ numbers.

# %% [markdown]
# ## Integration testing


# %%
def test_a_model_of_pairs_learns_an_alphabet() -> None:
    manual_seed(0)
    ids = tensor([[i, (i + 1) % 26] for i in range(26)])
    table, head = Embedding(26, 16), Linear(16, 26)
    optimizer = SGD([*table.parameters(), *head.parameters()], lr=1.0)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(head(table(ids[:, 0])), ids[:, 1]).backward()
        optimizer.step()
    assert head(table(ids[:, 0])).argmax(1).tolist() == ids[:, 1].tolist()


# %% [markdown]
# ## Thinking questions
#
# 1. With tied weights GPT-2 small has 124 million parameters. How many would it have without, and which share of its
#    parameters is its table of tokens?
# 2. Adam keeps averages for every row, and moves also those whose gradient is 0. What does that do to rare tokens, and
#    what would a sparse gradient change?
# 3. Rotary positions turn queries and keys, but not values. What would happen to attention's output if values turned?
# 4. ALiBi at distance 1000 subtracts 3.9 in the most far-sighted of eight heads. What does a softmax make of that, and
#    how far does that head see?

# %% [markdown]
# ## Summary
#
# Words are rows, learned by adding up what arrives at each place where they stand; positions are rows, rotations or a
# distance that is subtracted. Module 13 lets the places speak with each other.


if __name__ == "__main__":
    run_module(globals())
