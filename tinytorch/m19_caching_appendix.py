"""Module 19, appendix: the kernel that takes one token of each row through all blocks."""

from __future__ import annotations

from typing import Any

from tinytorch.m02_tensor import randn, zeros
from tinytorch.m14_transformers import GPT, GPTConfig
from tinytorch.m16_acceleration import attach
from tinytorch.m16_acceleration_appendix import CPU, EXAMPLES, FLOATS, single
from tinytorch.m19_caching import Store, decode_blocks, packed_weights


def decodes(x: Any, weights: Any, keys: Any, values: Any, lengths: Any, *turns: Any, **attributes: Any) -> bool:
    """The kernel goes by addresses, so all must lie row by row."""
    known = single(x, weights, keys, values, *turns) and lengths.dtype.char == "l"
    return known and weights.flags.c_contiguous and keys.flags.c_contiguous and values.flags.c_contiguous


attach(decode_blocks, "numpy", f"{CPU}.decoding:decode_blocks", decodes, FLOATS)


def decoding_example(count: int) -> tuple[tuple, dict[str, Any]]:
    """Inputs and attributes that the kernel takes, `count` rows."""
    config = GPTConfig(9, 8, 2, 2, 16)
    model = GPT(config)
    store = Store(2, 2, 8, limit=8, block=8, like=model.tokens.weight)
    store.take_rows(range(count))
    store.make_room(8)
    lengths = zeros(count, dtype="int64") + 3
    inputs = (randn(count, 16), packed_weights(model), store.keys, store.values, lengths)
    return tuple(x.data for x in inputs if x is not None), {"config": config}


EXAMPLES["decode_blocks"] = decoding_example
