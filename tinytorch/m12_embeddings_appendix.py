"""Module 12, appendix: tables that exist already, bags of tokens, and more ways to turn rotary positions.

A bag is a text whose order does not matter: the sum, the mean or the largest of its tokens' vectors. Adding up the rows
of a bag is what a look-up does backwards, so it is the same operation.
"""

from __future__ import annotations

import math
from typing import Any

from tinytorch.backends import DTYPE_KINDS, backend_of
from tinytorch.m02_tensor import Tensor, float64, reshape, unsqueeze, where
from tinytorch.m02_tensor_appendix import arange, clamp, cumsum, max, nonzero, ones_like
from tinytorch.m04_layers import Parameter, unusual
from tinytorch.m12_embeddings import (
    ROPE_SCALINGS,
    Embedding,
    check_ids,
    embedding,
    embedding_lookup,
    embedding_weight_gradient,
    row_number,
    shorten_rows,
)

# -- tables that exist already -----------------------------------------------------------------------------------------


def from_pretrained(
    cls: type[Embedding], embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None, **options: Any
) -> Embedding:
    """A layer whose weight is this table (V, C), in the same memory, and is not trained if `freeze`.

    Args:
        padding_idx, options: as the layer takes them. The row of padding stays as it is, too.
    """
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or not embeddings.dtype.is_floating_point:
        given = getattr(embeddings, "shape", type(embeddings).__name__)
        raise ValueError(f"{cls.__name__}.from_pretrained: expected a tensor of floats (rows, features), got {given}")
    layer = cls(1, 1, **options)  # its one number is all that is drawn, and is thrown away
    layer.num_embeddings, layer.embedding_dim = embeddings.shape
    layer.padding_idx = row_number(f"{cls.__name__}.from_pretrained", padding_idx, len(embeddings))
    layer.weight = Parameter(embeddings, watched=not freeze)
    return layer


Embedding.extend_class(from_pretrained=classmethod(from_pretrained))

# -- bags of tokens ----------------------------------------------------------------------------------------------------

MODES = ("sum", "mean", "max")


def embedding_bag(
    input: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
    per_sample_weights: Tensor | None = None, include_last_offset: bool = False, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """The sum, mean or largest of the rows of each bag of ids: (bags, C).

    Args:
        input: integers (bags, L), or (n,) with the bags one after the other.
        offsets: where in an input (n,) each bag begins, the first at 0; an empty bag gives 0.
        include_last_offset: whether offsets end with n, where a next bag would begin.
        per_sample_weights: what each row is multiplied by, shaped as the input; for mode "sum".
        padding_idx: ids that do not count.
        max_norm, norm_type, scale_grad_by_freq, sparse: as `embedding` takes them.

    Raises:
        ValueError: for shapes, offsets or a mode that do not fit.
        IndexError: an id is not from 0 to V - 1.
    """
    check_bags(input, weight, mode, scale_grad_by_freq, per_sample_weights)
    bag, bags = numbers_of_bags(input, offsets, include_last_offset)
    if max_norm is not None:
        shorten_rows(weight, input, max_norm, norm_type)
    ids, shares = reshape(input, shape=(-1,)), per_sample_weights
    shares = None if shares is None else reshape(shares, shape=(-1, 1))
    padding_idx = row_number("embedding_bag", padding_idx, len(weight))
    if padding_idx is not None:
        kept = nonzero(ids != padding_idx)[:, 0]
        ids, bag, shares = ids[kept], bag[kept], None if shares is None else shares[kept]
    rows = embedding(ids, weight, scale_grad_by_freq=scale_grad_by_freq)
    counts = embedding_weight_gradient(ones_like(ids, dtype=weight.dtype).reshape(-1, 1), bag, rows=bags)
    if mode == "max" and len(ids):
        return largest_of_bags(rows, counts.to("int64"))
    total = embedding_weight_gradient(rows if shares is None else rows * shares, bag, rows=bags)
    return total / clamp(counts, min=1) if mode == "mean" else total


def check_bags(input: Any, weight: Any, mode: str, scale_grad_by_freq: bool, shares: Any) -> None:
    """An error unless the arguments of `embedding_bag` fit each other."""
    if mode not in MODES:
        raise ValueError(f"embedding_bag: mode must be one of {MODES}, got {mode!r}")
    if weight.ndim != 2:
        raise ValueError(f"embedding_bag: expected a weight (rows, features), got {weight.shape}")
    check_ids("embedding_bag", input, len(weight))
    if input.ndim not in (1, 2):
        raise ValueError(f"embedding_bag: expected ids (bags, L), or (n,) with offsets, got {input.shape}")
    if mode == "max" and scale_grad_by_freq:
        raise ValueError("embedding_bag: scale_grad_by_freq is for the modes 'sum' and 'mean'")
    if shares is not None and (mode != "sum" or shares.shape != input.shape or shares.dtype != weight.dtype):
        wanted, given = f"{weight.dtype} {input.shape}", f"{shares.dtype} {shares.shape}"
        raise ValueError(f"embedding_bag: expected per_sample_weights {wanted} and mode 'sum', got {given}, {mode!r}")


def numbers_of_bags(input: Tensor, offsets: Tensor | None, include_last_offset: bool) -> tuple[Tensor, int]:
    """(the number of the bag that each id is in, how many bags there are)."""
    if input.ndim == 2:
        if offsets is not None:
            raise ValueError(f"embedding_bag: each row of ids {input.shape} is a bag, so there can be no offsets")
        numbers = arange(input.shape[0], device=input.device)
        return reshape(unsqueeze(numbers, 1).expand(input.shape), shape=(-1,)), input.shape[0]
    if not isinstance(offsets, Tensor) or offsets.ndim != 1 or DTYPE_KINDS[offsets.dtype] is not int:
        given = f"{offsets.dtype} {offsets.shape}" if isinstance(offsets, Tensor) else offsets
        raise ValueError(f"embedding_bag: ids {input.shape} need offsets (bags,) of integers, got {given}")
    starts, count = offsets.tolist(), len(input)
    if starts and (starts[0] != 0 or starts != sorted(starts) or starts[-1] > count):
        raise ValueError(f"embedding_bag: offsets must rise from 0 to at most {count}, got {starts}")
    if include_last_offset:
        if not starts or starts[-1] != count:
            raise ValueError(f"embedding_bag: with include_last_offset, offsets end with {count}, got {starts}")
        starts.pop()
    elif not starts and count:
        raise ValueError(f"embedding_bag: {count} ids are in no bag, for there are no offsets")
    places, xp = arange(count, device=input.device), backend_of(input.data)
    begins = xp.asarray(starts, dtype=xp.dtype("int64"))
    return Tensor(xp.searchsorted(begins, places.data, side="right")) - 1, len(starts)


def largest_of_bags(rows: Tensor, counts: Tensor) -> Tensor:
    """The largest of each column of a bag's rows, the first of equals; `counts` (bags, 1), bags one after the other."""
    numbers = arange(int(counts.amax().item()), device=rows.device)
    inside = numbers < counts
    places = where(inside, cumsum(counts, dim=0) - counts + numbers, 0)
    filled = where(unsqueeze(inside, 2), embedding_lookup(places, rows), -math.inf)
    return where(counts > 0, max(filled, 1).values, 0)


class EmbeddingBag(Embedding):
    """A table with a vector for each token, and the sum, mean or largest of those of a bag.

    Args:
        num_embeddings, embedding_dim: how many tokens there are, and how long a vector is.
        mode, include_last_offset and the others: as `embedding_bag` takes them.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, max_norm: float | None = None, norm_type: float = 2.0,
        scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False, include_last_offset: bool = False,
        padding_idx: int | None = None, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise ValueError(f"EmbeddingBag: mode must be one of {MODES}, got {mode!r}")
        super().__init__(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
                         device, dtype)  # fmt: skip
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return embedding_bag(
            ids, self.weight, offsets, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.mode, self.sparse,
            per_sample_weights, self.include_last_offset, self.padding_idx,
        )  # fmt: skip

    def extra_repr(self) -> str:
        more = unusual(
            max_norm=(self.max_norm, None), norm_type=(self.norm_type, 2.0),
            scale_grad_by_freq=(self.scale_grad_by_freq, False), mode=(repr(self.mode), None),
            padding_idx=(self.padding_idx, None),
        )  # fmt: skip
        return f"{self.num_embeddings}, {self.embedding_dim}{more}"


# -- rotary positions --------------------------------------------------------------------------------------------------


def yarn_scaling(
    usual: Tensor, base: float, factor: float, original_max_position_embeddings: int, beta_fast: float = 32.0,
    beta_slow: float = 1.0, attention_factor: float | None = None, mscale: float | None = None,
    mscale_all_dim: float | None = None, truncate: bool = True,
) -> tuple[Tensor, float]:  # fmt: skip
    """YaRN (Peng and others, 2023): slow pairs turn `factor` times slower, fast ones as before.

    Args:
        beta_fast, beta_slow: how often a pair turns within the original length to count as fast, or as slow.
        attention_factor: what cosines and sines are multiplied by, which makes attention sharper on longer texts;
            0.1 log(factor) + 1 if None, or the quotient of two such numbers for `mscale` and `mscale_all_dim`.
        truncate: whether the first and last pair between fast and slow are rounded to whole ones.
    """
    dim = 2 * len(usual)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(base))

    def sharpness(scale: float | None) -> float:
        return 0.1 * (scale or 1) * math.log(factor) + 1 if factor > 1 else 1.0

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = low if low > 0 else 0, high if high < dim - 1 else dim - 1
    ramp = (arange(len(usual), dtype=float64, device=usual.device) - low) / ((high - low) or 0.001)
    slow = clamp(ramp, 0, 1)
    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = sharpness(mscale) / sharpness(mscale_all_dim) if both else sharpness(None)
    return usual * (slow / factor + (1 - slow)), float(attention_factor)


ROPE_SCALINGS["yarn"] = yarn_scaling


def halves_from_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """The rows of a query's or key's projection (H · D, …), from neighbours that turn together to halves that do.

    Meta's own files of Llama hold them as pairs of neighbours; Hugging Face's, and `rotate`, as halves.
    """
    if weight.shape[0] % (2 * num_heads):
        raise ValueError(f"halves_from_pairs: {num_heads} heads of even length do not fit in {weight.shape[0]} rows")
    paired = reshape(weight, shape=(num_heads, -1, 2, *weight.shape[1:]))
    return reshape(paired.transpose(1, 2), shape=weight.shape)
