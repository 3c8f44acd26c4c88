"""Which axes the kernels of normalization know; without Numba, because module 16 asks before it loads a kernel."""

from __future__ import annotations

import math
from functools import lru_cache

__all__ = ["arranged", "layout"]


@lru_cache(maxsize=256)  # asked at each call of a norm, of which a network has few kinds
def layout(shape: tuple[int, ...], dims: tuple[int, ...], weight_shape: tuple[int, ...] | None) -> str:
    """Which kernels fit: "rows" if the last axes go and each place in them has a weight, "planes" if all but axis 1 go
    and each channel has a weight; "" for all others. A weight may be missing."""
    axes = sorted(d % len(shape) for d in dims)
    kept = len(shape) - len(axes)
    if axes == list(range(kept, len(shape))) and weight_shape in (None, shape[kept:]):
        return "rows"
    channel = (shape[1], *(1,) * (len(axes) - 1)) if len(shape) > 2 else ()
    return "planes" if channel and axes == [0, *range(2, len(shape))] and weight_shape in (None, channel) else ""


@lru_cache(maxsize=256)
def arranged(shape: tuple, dims: tuple, weight_shape: tuple | None) -> tuple[bool, tuple, tuple]:
    """Whether x, of this shape, is rows; the shape that kernels know it by, of which the last axis but the planes' has
    the weights; and the shape of mean and variance."""
    kind = layout(shape, dims, weight_shape)
    if not kind:
        raise ValueError(f"normalize: no kernel for {shape} over {dims} with a weight of shape {weight_shape}")
    axes = {d % len(shape) for d in dims}
    statistics = tuple(1 if d in axes else n for d, n in enumerate(shape))
    if kind == "rows":
        kept = len(shape) - len(axes)
        return True, (math.prod(shape[:kept]), math.prod(shape[kept:])), statistics
    return False, (*shape[:2], math.prod(shape[2:])), statistics
