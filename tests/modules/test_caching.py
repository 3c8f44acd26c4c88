"""The cache beyond its chapter: layers of other kinds, rows that end, errors, and whose distribution drafts have."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

import tinytorch as t
from tinytorch import GPT, GPTConfig, KVCache, caching, nn, speculative_generate
from tinytorch.m14_transformers import llama_config, next_probabilities, reads_whole
from tinytorch.m19_caching import decode, opinionated, packed, read_through_window, shared_length

SIZES: dict[str, Any] = {"context_length": 24, "num_layers": 2, "num_heads": 4, "embed_dim": 16}
CONFIGS = {
    "gpt2": GPTConfig(19, **SIZES),
    "gpt2 untied, with erf, without biases": GPTConfig(19, **SIZES, tie_weights=False, mlp="gelu", bias=False),
    "llama": llama_config(19, **SIZES),
    "llama with grouped queries and wide heads": llama_config(19, **SIZES, num_kv_heads=2, head_dim=10, hidden_dim=23),
    "llama with biases": llama_config(19, **SIZES, num_kv_heads=1, bias=True, tie_weights=True),
    "the first transformer's": GPTConfig(19, **SIZES, norm_first=False, mlp="relu"),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


def drawn(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 19, n).tolist() for n in lengths]


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found.numpy(), expected.detach().numpy(), rtol=tolerance, atol=tolerance)


@configs
@pytest.mark.parametrize("kernels", [True, False])
def test_every_token_as_uncached(config: GPTConfig, kernels: bool) -> None:
    model, rows = opinionated(config), drawn(24, 24, 24)
    starts, cache = (5, 1, 12), KVCache(model, block=5)
    with t.no_grad():
        expected = model(t.tensor(rows))
    for step in range(12):
        text = [row[: start + step] for row, start in zip(rows, starts, strict=True)]
        if kernels:
            found = cache.read(text)
        else:
            with t.reference_kernels():
                found = cache.read(text)
        close(found, t.cat([expected[i : i + 1, len(row) - 1] for i, row in enumerate(text)]))


@pytest.mark.parametrize("config", [config for config in CONFIGS.values() if config.norm_first])
@pytest.mark.parametrize("window", [1, 3, 7])
def test_windows_of_batches(config: GPTConfig, window: int) -> None:
    model, rows = opinionated(config), drawn(20, 20)
    cache, starts = KVCache(model, window=window, block=2), (9, 2)
    expected = [read_through_window(model, row, window)[0] for row in rows]
    for step in range(11):
        text = [row[: start + step] for row, start in zip(rows, starts, strict=True)]
        close(cache.read(text), t.stack([e[len(row) - 1] for e, row in zip(expected, text, strict=True)]))
    close(cache.read([rows[0]], last=4)[0], expected[0][-4:])
    assert cache.store.capacity == window
    close(cache.read([rows[1][:3]]), expected[1][2:3])  # what was overwritten is read again


@configs
def test_rows_that_end_and_rows_that_outgrow_the_context(config: GPTConfig) -> None:
    model, prompts = opinionated(config), drawn(3, 20, 1, 30)
    stop = model.generate(prompts, 9, temperature=0)[0][4]
    for choices in ({"temperature": 0}, {"seed": 4, "top_p": 0.9}, {"temperature": 0, "stop_tokens": [stop]}):
        written = model.generate(prompts, 9, **choices)
        with caching(False):
            assert written == model.generate(prompts, 9, **choices)
    assert len(written[0]) <= 5  # this one has ended


def test_a_network_in_training_mode_writes_without_dropout() -> None:
    model = opinionated(GPTConfig(19, **SIZES, dropout=0.5)).train()
    written = model.generate([1, 2, 3], 8, temperature=0)
    with caching(False):
        assert written == model.generate([1, 2, 3], 8, temperature=0)
    with t.reference_kernels():
        assert written == model.generate([1, 2, 3], 8, temperature=0)
    assert all(layer.training for layer in model.modules())


class Halves(nn.Module):
    """A linear layer as two: of a lower rank, or like one that was quantized."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(layer.in_features, 3), nn.Linear(3, layer.out_features)

    def forward(self, x: t.Tensor) -> t.Tensor:
        return self.second(self.first(x))


def test_other_layers_and_hooks_are_called() -> None:
    model, calls = opinionated(CONFIGS["gpt2"]), []
    assert packed(model) is not None
    model.blocks[1].mlp.up = Halves(model.blocks[1].mlp.up)
    assert packed(model) is None
    rows = drawn(4, 7)
    with t.no_grad():
        cache, whole = KVCache(model), reads_whole(model)
        for _ in range(3):
            close(cache.read(rows), whole(rows))
            rows = [[*row, 5] for row in rows]
    hooked = opinionated(CONFIGS["llama"])
    hooked.blocks[0].mlp.down.register_forward_hook(lambda *_: calls.append(1))
    hooked.generate([1, 2], 4, temperature=0)
    assert len(calls) == 4
    narrow = opinionated(CONFIGS["gpt2"])  # pruned: the configuration no longer says how wide it is
    narrow.blocks[0].mlp.up, narrow.blocks[0].mlp.down = nn.Linear(16, 7), nn.Linear(7, 16)
    assert packed(narrow) is None
    assert narrow.generate([1, 2], 4, temperature=0)[:2] == [1, 2]
    assert packed(opinionated(CONFIGS["gpt2"]).to(dtype="float64")) is None


def test_double_precision() -> None:
    model, rows = opinionated(CONFIGS["llama with grouped queries and wide heads"]).to(dtype="float64"), drawn(5, 2)
    cache = KVCache(model)
    assert cache.store.keys.dtype == "float64"
    for _ in range(3):
        close(cache.read(rows), reads_whole(model)(rows), 1e-12)
        rows = [[*row, 7] for row in rows]


def test_what_is_read_again() -> None:
    model, read = opinionated(CONFIGS["gpt2"]), []
    cache = KVCache(model)
    hook = model.tokens.register_forward_hook(lambda layer, inputs, out: read.append(inputs[0].tolist()))
    text = drawn(10)[0]
    for rows, expected in (
        ([text], [text]),
        ([text], [text[-1:]]),  # its scores are asked for again
        ([text[:6]], [text[5:6]]),
        ([[*text[:5], 18], text[:3]], [[18], [text[2]]]),
        ([text[:4], [*text[:5], 18, 2]], [[text[3]], [2]]),  # each from the row that begins like it
    ):
        found = cache.read(rows)
        assert [row[: len(new)] for row, new in zip(read[-1], expected, strict=True)] == expected
        close(found, reads_whole(model)(rows))
        read.clear()
        assert cache.tokens == rows
    hook.remove()
    assert shared_length([1, 2, 3], [1, 2]) == shared_length([1, 2], [1, 2, 3]) == 2
    assert shared_length([1, 2, 3], [1, 5, 3]) == 1


def test_a_cache_that_is_kept_is_read_on_from() -> None:
    model, text = opinionated(CONFIGS["llama"]), drawn(6)[0]
    cache = KVCache(model)
    with caching(cache):
        first = model.generate(text, 3, temperature=0)
        second = model.generate([*first, 4], 3, temperature=0)
    assert second == model.generate([*first, 4], 3, temperature=0)
    assert cache.tokens == [second[:-1]]
    windowed = KVCache(model, window=3)
    with caching(windowed):
        assert model.generate(text, 5, temperature=0) != model.generate(text, 5, temperature=0)[:-1]
    assert windowed.store.capacity == 3


def test_errors_say_what_would_be_right() -> None:
    model = opinionated(CONFIGS["gpt2"])
    with pytest.raises(ValueError, match="window from 1 to the context's 24; got block 256, window 25"):
        KVCache(model, window=25)
    with pytest.raises(ValueError, match="block must be >= 1"):
        KVCache(model, block=0)
    cache = KVCache(model)
    with pytest.raises(ValueError, match=r"rows of at least 1 tokens, and last >= 1; got rows of \[2, 0\]"):
        cache.read([[1, 2], []])
    with pytest.raises(ValueError, match="at least 3 tokens"):
        cache.read([[1, 2]], last=3)
    cache.read([[1, 2]])
    with pytest.raises(IndexError, match=r"tokens must be from 0 to 18, got \[19\]"):
        cache.read([[1, 2, 19]])
    close(cache.read([[1, 2, 3]]), reads_whole(model)([[1, 2, 3]]))  # and nothing has changed
    with pytest.raises(ValueError, match="the draft has 7 tokens, the model 19"):
        speculative_generate(model, GPT(GPTConfig(7, **SIZES)), [1], 3)
    with pytest.raises(ValueError, match="lookahead is 0"):
        speculative_generate(model, model, [1], 3, lookahead=0)
    with pytest.raises(ValueError, match="top_k must be >= 1"):
        speculative_generate(model, model, [1], 3, top_k=0)


@pytest.mark.parametrize("lookahead", [1, 3, 50])
def test_greedy_drafts_give_the_same_tokens(lookahead: int) -> None:
    for config, seed in product((CONFIGS["gpt2"], CONFIGS["llama"]), (0, 1)):
        model = opinionated(config, seed)
        drafts = model, opinionated(replace(config, num_layers=1), 5), opinionated(replace(config, context_length=9), 6)
        expected = model.generate([3, 1], 30, temperature=0)  # beyond the context
        for draft in drafts:
            found = speculative_generate(model, draft, [3, 1], 30, lookahead=lookahead, temperature=0)
            assert found == expected
            stop = expected[7]
            ended = speculative_generate(model, draft, [3, 1], 30, temperature=0, stop_tokens=[stop])
            assert ended == expected[: expected.index(stop, 2) + 1]


def test_drafts_save_steps_of_the_model() -> None:
    model, calls = opinionated(CONFIGS["gpt2"]), []
    draft = opinionated(CONFIGS["gpt2"])
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    speculative_generate(model, draft, [3, 1], 15, lookahead=4, temperature=0)
    assert len(calls) == 3  # five tokens at a time


@pytest.mark.slow
def test_drafts_leave_the_distribution_as_it_is() -> None:
    """Two tokens, drawn a thousand times: pairs come as often as the model alone says, by a chi-squared test."""
    config, choices = GPTConfig(5, 8, 1, 1, 4), {"temperature": 0.7, "top_k": 4}
    model, draft, prompt = opinionated(config, 2), opinionated(config, 3), [1, 2]
    whole, count = reads_whole(model), 1000
    first = next_probabilities(whole([prompt]), **choices)[0].tolist()
    expected = np.array([
        [p * q for q in next_probabilities(whole([[*prompt, token]]), **choices)[0].tolist()]
        for token, p in enumerate(first)
    ])  # fmt: skip
    other = next_probabilities(reads_whole(draft)([prompt]), **choices)[0].tolist()
    assert np.abs(np.array(first) - other).sum() > 0.5  # the draft is of another opinion
    t.manual_seed(0)
    found = np.zeros((5, 5))
    for _ in range(count):
        tokens = speculative_generate(model, draft, prompt, 2, lookahead=2, **choices)
        found[tokens[2], tokens[3]] += 1
    possible = expected > 0
    assert found[~possible].sum() == 0
    large = expected * count >= 5
    statistic = ((found - expected * count)[large] ** 2 / (expected * count)[large]).sum()
    degrees = large.sum()
    assert statistic < degrees + 4 * np.sqrt(2 * degrees), (statistic, degrees)


def test_the_same_seed_gives_the_same_draft() -> None:
    model, draft = opinionated(CONFIGS["gpt2"]), opinionated(replace(CONFIGS["gpt2"], num_layers=1), 1)
    first, second, other = (speculative_generate(model, draft, [1], 12, seed=seed) for seed in (3, 3, 4))
    assert first == second != other


def test_the_kernel_runs_for_what_it_knows() -> None:
    from tinytorch.m02_tensor import observe

    model, seen = opinionated(CONFIGS["llama"]), []

    def look(op: Any, arrays: list, attributes: dict, proceed: Any) -> Any:
        seen.append(op)
        return proceed()

    with observe(look):
        model.generate([[1, 2], [3]], 5, temperature=0)
    assert seen.count(decode) == 4
