"""After module 19: write a token in the time of reading one, whatever the text before it."""

from __future__ import annotations

import tinytorch as t
from tinytorch.m02_tensor import observe


def products_of(model: t.GPT, prompt: list[int], count: int) -> list[int]:
    """How many rows each product has that is computed for one token after the other."""
    rows: list[int] = []

    def look(op, arrays, attributes, proceed):
        if op.name == "linear":
            rows.append(arrays[0].size // arrays[0].shape[-1])
        return proceed()

    steps = model.stream(prompt, count, temperature=0)
    next(steps)
    with t.reference_kernels(), observe(look):
        for _ in steps:
            pass
    return rows


def test_a_token_costs_one_token() -> None:
    t.manual_seed(0)
    model = t.GPT(t.GPTConfig(17, 64, 2, 2, 16)).eval()
    assert set(products_of(model, list(range(16)), 8)) == {1}
    with t.caching(False):
        assert max(products_of(model, list(range(16)), 8)) == 23


def test_a_question_is_asked_of_a_text_that_was_read() -> None:
    t.manual_seed(1)
    model, text = t.GPT(t.GPTConfig(17, 64, 2, 2, 16)).eval(), [i % 17 for i in range(40)]
    cache = t.KVCache(model)
    cache.read([text])
    with t.caching(cache):
        answers = model.generate([[*text, 3], [*text, 5, 6]], 10, temperature=0)
    assert answers == model.generate([[*text, 3], [*text, 5, 6]], 10, temperature=0)
    assert cache.nbytes == 2 * 64 * t.bytes_per_token(model.config)
    small = t.GPT(t.GPTConfig(17, 64, 1, 2, 8)).eval()
    assert t.speculative_generate(model, small, answers[0][:41], 10, temperature=0) == answers[0]
