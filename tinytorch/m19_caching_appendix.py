"""Module 19, appendix: what `tinytorch warmup` calls the kernel of `decode` with."""

from __future__ import annotations

from typing import Any

from tinytorch.m02_tensor import zeros
from tinytorch.m14_transformers import GPT, GPTConfig
from tinytorch.m16_acceleration import attach
from tinytorch.m16_acceleration_appendix import ARRAY, CPU, FLOATS
from tinytorch.m19_caching import Store, decode, packed


def decodes(*arrays: Any, config: Any) -> bool:
    """The kernel goes by addresses, so all must lie row by row."""
    for x in arrays:
        if x is not None and (type(x) is not ARRAY or x.dtype.char not in "fl" or not x.flags.c_contiguous):
            return False
    return arrays[0].dtype.char == arrays[8].dtype.char == "l" and arrays[1].dtype.char == "f"


from tinytorch.m16_acceleration_appendix import EXAMPLES
from tinytorch.m19_caching import Store, packed


def decoding_example(count: int) -> tuple[tuple, dict[str, Any]]:
    """Inputs and attributes that the kernel takes: `count` rows, of a network that is large enough for all cores."""
    config = GPTConfig(9, 8, 1, 2, 192)
    model = GPT(config)
    store = Store(1, 2, 96, limit=8, block=8, like=model.tokens.weight)
    store.take_rows(range(count))
    store.make_room(8)
    ids = zeros(count, dtype="int64") + 3
    inputs = (ids.data, *(packed(model) or ()), store.keys.data, store.values.data, (ids + 1).data)
    return inputs, {"config": config}


attach(decode, "numpy", f"{CPU}.decoding:decode", decodes, FLOATS, decoding_example)
