"""A token in one call is what module 19's operation makes of it, for all kinds of networks and any number of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.guarded import guarded
from tests.kernels.pictures import XP, near
from tests.kernels.place import cpu_only
from tinytorch.kernels.cpu import decoding
from tinytorch.m12_embeddings import rotary_tables
from tinytorch.m14_transformers import GPT, GPTConfig
from tinytorch.m19_caching import decode, packed

pytestmark = cpu_only

KINDS = [(norm, mlp) for norm in ("layer", "rms") for mlp in decoding.ACTIVATIONS]


def inputs(config: GPTConfig, rows: int, capacity: int, longest: int, seed: int) -> list[Any]:
    """What `decode` takes, all of it random; each row holds another number of tokens."""
    rng = np.random.default_rng(seed)
    model = GPT(config)
    for parameter in model.parameters():
        parameter.data[...] = rng.normal(size=parameter.shape) * 0.4 + (parameter.ndim == 1)
    groups = config.num_kv_heads or config.num_heads
    kept = rng.normal(size=(2, config.num_layers, rows, groups, capacity, config.head_size)).astype(np.float32)
    lengths = rng.integers(0, longest, rows)
    turns = [x.data for x in rotary_tables(longest, config.head_size)] if config.positions == "rotary" else []
    weights = packed(model)
    assert weights is not None
    return [rng.integers(0, config.vocab_size, rows), *weights, kept[0].copy(), kept[1].copy(), lengths, *turns]


def double(x: Any) -> Any:
    return x.astype(np.float64) if x is not None and x.dtype == np.float32 else x


def compare(config: GPTConfig, arrays: list[Any]) -> None:
    """Scores, and what is written to keys and values, and to nothing else of them, are those of float64."""
    exact = [double(x) for x in arrays]
    expected = decode.function(XP, *exact, config=config)
    found = decoding.decode(XP, *arrays, config=config)
    near(found, expected)
    for place in (6, 7):
        near(arrays[place], exact[place])


@given(
    st.sampled_from(KINDS), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20),
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 11), st.integers(1, 40), st.booleans(), st.booleans(),
    st.integers(0, 1 << 30),
)  # fmt: skip
@example(("layer", "gelu_tanh"), 2, 1, 4, 16, 64, 256, 9, 33, True, True, 0)
@example(("rms", "swiglu"), 2, 2, 2, 32, 17, 65, 4, 70, False, False, 1)
@settings(deadline=None, max_examples=60)
def test_a_token_in_one_call(
    kind: tuple, layers: int, groups: int, each: int, half: int, width: int, hidden: int, rows: int, capacity: int,
    rotary: bool, bias: bool, seed: int,
) -> None:  # fmt: skip
    config = GPTConfig(
        11, 90, layers, groups * each, width, groups, 2 * half, hidden, bias=bias, norm=kind[0], mlp=kind[1],
        positions="rotary" if rotary else "learned", norm_eps=0.01, tie_weights=bias,
    )  # fmt: skip
    compare(config, inputs(config, rows, capacity, 90, seed))


def test_on_one_core_as_on_several(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPTConfig(300, 90, 2, 4, 128)
    several = inputs(config, 9, 90, 90, 3)
    alone = [x if x is None else x.copy() for x in several]
    assert 10 * several[3].size // 8 > 1 << 16  # enough for all cores
    found = decoding.decode(XP, *several, config=config)
    monkeypatch.setattr(decoding, "cores", lambda: 1)
    np.testing.assert_allclose(decoding.decode(XP, *alone, config=config), found, rtol=1e-4, atol=1e-4)
    for parts in (2, 3):  # also where there are fewer cores
        again = [x if x is None else x.copy() for x in alone]
        monkeypatch.setattr(decoding, "cores", lambda: parts)  # noqa: B023
        monkeypatch.setattr(decoding, "run", lambda serial, parallel, work, *arguments: parallel(*arguments))
        near(decoding.decode(XP, *again, config=config), decode.function(XP, *map(double, again), config=config))


def test_it_stays_in_its_arrays() -> None:
    for width, hidden, vocabulary in ((16, 64, 8), (17, 30, 5)):
        config = GPTConfig(vocabulary, 20, 2, 1, width, head_dim=6, hidden_dim=hidden)
        arrays = [x if x is None else guarded(x) for x in inputs(config, 3, 5, 20, 0)]
        assert np.isfinite(decoding.decode(XP, *arrays, config=config)).all()
