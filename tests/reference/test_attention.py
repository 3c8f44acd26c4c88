"""Attention and its layer against PyTorch's: values, all gradients, weights, states, masks of both kinds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinytorch as t
import tinytorch.m13_attention as m13
from tests.reference.near import DEVICES, assert_near, drawn, dtypes, flags, many, seeds, some
from tinytorch.m13_attention_appendix import MultiheadAttention

torch = pytest.importorskip("torch")
TF = torch.nn.functional

TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
lengths = st.integers(1, 6)


def is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def compare(ours: Callable, theirs: Callable, *arrays: np.ndarray | None) -> None:
    """Both libraries on the same arrays, on every device of ours: values, and the gradient of every floating input."""
    tolerance = TOLERANCE[next(a.dtype.name for a in arrays if is_float(a))]
    other = [None if a is None else torch.tensor(a, requires_grad=is_float(a)) for a in arrays]
    expected = theirs(*other)
    weights = drawn(1, *expected.shape, dtype=expected.detach().numpy().dtype.name)
    expected.backward(torch.tensor(weights))
    for device in DEVICES:
        own = [None if a is None else t.tensor(a, device=device, requires_grad=is_float(a)) for a in arrays]
        out = ours(*own)
        assert_near(out, expected, tolerance, f"values on {device}")
        out.backward(t.tensor(weights, device=device))
        for i, (x, y, a) in enumerate(zip(own, other, arrays, strict=True)):
            if is_float(a):
                assert_near(x.grad, y.grad, 5 * tolerance, f"gradient of input {i} on {device}")


# -- scaled_dot_product_attention --------------------------------------------------------------------------------------


def plainly(query: Any, key: Any, value: Any, mask: Any = None, **options: Any) -> Any:
    """PyTorch's function by its products, which take whatever broadcasts; its faster kernels do not.

    Only a mask must not have more rows than the scores that it is added to, so the query is given them all.
    """
    if mask is not None:
        lead = torch.broadcast_shapes(query.shape[:-2], mask.shape[:-2])
        query = query.expand(*lead, *query.shape[-2:])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return TF.scaled_dot_product_attention(query, key, value, mask, **options)


@st.composite
def attended(draw: Callable) -> dict:
    """Arrays and options of a call."""
    rng, dtype = np.random.default_rng(draw(seeds)), draw(dtypes)
    queries, keys, features, width = (draw(lengths) for _ in range(4))
    lead = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    shapes = []
    for rows, columns in ((queries, features), (keys, features), (keys, width)):
        part = tuple(1 if draw(st.integers(0, 4)) == 0 else n for n in lead)  # which broadcasts
        shapes.append((*part, rows, columns))
    whole = np.broadcast_shapes(*(shape[:-2] for shape in shapes))
    kind = draw(st.sampled_from(["none", "causal", "bool", "float", "float and infinity"]))
    pairs = (draw(st.sampled_from([1, queries])), draw(st.sampled_from([1, keys])))
    mask = rng.normal(size=(*whole[draw(st.integers(0, len(whole))) :], *pairs)).astype(dtype)
    if kind in ("none", "causal"):
        mask = None
    elif kind == "bool":
        mask = mask > -0.5  # some rows of few keys see nothing
    elif kind == "float and infinity":
        mask = np.where(mask > 0.8, -math.inf, mask).astype(dtype)
    options = {"is_causal": kind == "causal", "scale": draw(st.sampled_from([None, 0.3, 1.0]))}
    return {"arrays": [*(rng.normal(size=shape).astype(dtype) for shape in shapes), mask], "options": options}


@many
@given(attended(), st.sampled_from([2, 1 << 19]))
def test_scaled_dot_product_attention(case: dict, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m13, "BLOCK", block)  # so that small inputs take several blocks too
        compare(
            lambda q, k, v, mask: m13.scaled_dot_product_attention(q, k, v, mask, **case["options"]),
            lambda q, k, v, mask: plainly(q, k, v, mask, **case["options"]),
            *case["arrays"],
        )


@some
@given(seeds, dtypes, st.integers(1, 3), st.integers(1, 3), lengths, lengths, st.sampled_from(["none", "causal", "2-D",
       "4-D", "of a head"]))  # fmt: skip
def test_grouped_queries(seed: int, dtype: str, groups: int, shared: int, queries: int, keys: int, kind: str) -> None:
    heads = groups * shared
    arrays = [drawn(seed + i, 2, n, rows, 4, dtype=dtype) for i, (n, rows) in enumerate(
        ((heads, queries), (groups, keys), (groups, keys)))]  # fmt: skip
    shapes = {"2-D": (queries, keys), "4-D": (2, heads, queries, keys), "of a head": (2, 1, 1, keys)}
    mask = drawn(seed + 3, *shapes[kind], dtype=dtype) if kind in shapes else None
    options = {"is_causal": kind == "causal", "enable_gqa": True}
    compare(
        lambda q, k, v, mask: m13.scaled_dot_product_attention(q, k, v, mask, **options),
        lambda q, k, v, mask: plainly(q, k, v, mask, **options),
        *arrays, mask,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", [(3, 1), (3, 5), (6, 3, 5), (1, 6, 3, 5), (2, 1, 1, 5)])
def test_masks_of_grouped_queries(shape: tuple, kind: str) -> None:
    """Of both kinds, and with queries that see nothing."""
    arrays = [drawn(i, 2, heads, rows, 4) for i, (heads, rows) in enumerate(((6, 3), (3, 5), (3, 5)))]
    mask = drawn(7, *shape) > 0.3
    mask[..., 0, :] = False
    mask = mask if kind == "bool" else np.where(mask, drawn(8, *shape), -math.inf)
    compare(
        lambda q, k, v, m: m13.scaled_dot_product_attention(q, k, v, m, enable_gqa=True),
        lambda q, k, v, m: plainly(q, k, v, m, enable_gqa=True),
        *arrays, mask,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("queries", "keys"), [(4, 7), (7, 4)])
def test_the_kernels_that_pytorch_chooses(queries: int, keys: int, dtype: str) -> None:
    arrays = [drawn(i, 2, 3, n, 8, dtype=dtype) for i, n in enumerate((queries, keys, keys))]
    compare(
        lambda q, k, v: m13.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: TF.scaled_dot_product_attention(q, k, v, is_causal=True),
        *arrays,
    )
    seen = drawn(9, 2, 1, queries, keys) > 0
    seen[0, 0, 1] = False
    for mask in (seen, np.where(seen, 0.5, -math.inf).astype(dtype)):
        compare(m13.scaled_dot_product_attention, TF.scaled_dot_product_attention, *arrays, mask)


def test_no_sequence_at_all() -> None:
    compare(m13.scaled_dot_product_attention, plainly, *(drawn(i, 2, 0, n, 3) for i, n in enumerate((4, 5, 5))), None)


def test_queries_that_see_nothing() -> None:
    """Zeros, and no gradient, in both libraries, for both kinds of masks and beside queries that see something."""
    arrays = [drawn(i, 2, 3, 4) for i in range(3)]
    hidden = np.array([[True, False, True], [False, False, False], [True, True, True]])
    for mask in (hidden, np.where(hidden, 0.5, -math.inf)):
        compare(m13.scaled_dot_product_attention, plainly, *arrays, mask)
        out = m13.scaled_dot_product_attention(*(t.tensor(a) for a in arrays), t.tensor(mask))
        assert not out[:, 1].numpy().any()


def test_gradients_of_gradients() -> None:
    arrays = [drawn(i, 2, n, 3) for i, n in enumerate((4, 5, 5))]
    seed = drawn(9, 2, 4, 3)
    for is_causal in (False, True):
        found = []
        for library, function in ((t, m13.scaled_dot_product_attention), (torch, plainly)):
            inputs = [library.tensor(a, requires_grad=True) for a in arrays]
            out = function(*inputs, is_causal=is_causal)
            first = library.autograd.grad((out * library.tensor(seed)).sum(), inputs, create_graph=True)
            total = sum(((g * g * g).sum() for g in first[1:]), (first[0] ** 3).sum())
            found.append(library.autograd.grad(total, inputs))
        for ours, theirs in zip(*found, strict=True):
            assert_near(ours, theirs, 1e-11)


def test_large_scores_in_float32() -> None:
    arrays = [drawn(i, 2, 3, 8, dtype="float32") * 100 for i in range(3)]
    own, other = [t.tensor(a) for a in arrays], [torch.tensor(a) for a in arrays]
    assert_near(m13.scaled_dot_product_attention(*own), plainly(*other), 1e-4)


def test_half_precision() -> None:
    arrays = [drawn(i, 2, 2, 40, 8, dtype="float16") for i in range(3)]
    own, other = [t.tensor(a) for a in arrays], [torch.tensor(a.astype("f4")) for a in arrays]
    out = m13.scaled_dot_product_attention(*own)
    assert out.dtype == "float16"
    np.testing.assert_allclose(out.numpy(), plainly(*other).numpy(), rtol=2e-3, atol=1e-3)


# -- MultiheadAttention ------------------------------------------------------------------------------------------------


@st.composite
def layers(draw: Callable) -> dict:
    """A layer, and inputs and masks for a call that PyTorch can do."""
    heads, dtype, seed = draw(st.integers(1, 3)), draw(dtypes), draw(seeds)
    width = heads * draw(st.integers(1, 3))
    options: dict[str, Any] = {"bias": draw(flags), "batch_first": draw(flags), "add_bias_kv": draw(flags),
                               "add_zero_attn": draw(flags)}  # fmt: skip
    if draw(flags):
        options |= {"kdim": draw(st.integers(1, 5)), "vdim": draw(st.one_of(st.none(), st.integers(1, 5)))}
    rng, batch = np.random.default_rng(seed), draw(st.sampled_from([None, 1, 3]))
    queries, keys = draw(lengths), draw(lengths)
    own = not options.get("kdim") and draw(flags)  # one sequence in all three places
    keys = queries if own else keys

    def sequence(length: int, features: int) -> np.ndarray:
        shape = (length,) if batch is None else (batch, length) if options["batch_first"] else (length, batch)
        return rng.normal(size=(*shape, features)).astype(dtype)

    query = sequence(queries, width)
    key, value = (sequence(keys, options.get(name) or width) for name in ("kdim", "vdim"))
    masks: dict[str, Any] = {}
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if (shape := draw(st.sampled_from(["none", "2-D", "3-D"]))) != "none" and kind != "none":
        hidden = rng.random(((batch or 1) * heads, queries, keys) if shape == "3-D" else (queries, keys)) < 0.3
        hidden[..., 0] = False  # PyTorch's layer makes nan of a query that sees nothing
        masks["attn_mask"] = hidden if kind == "bool" else np.where(hidden, -math.inf, hidden * 0.3).astype(dtype)
    if draw(flags):
        padding = rng.random((batch or 1, keys)) < 0.3
        padding[:, 0] = False
        padding = padding if kind != "float" else np.where(padding, -math.inf, 0.25).astype(dtype)
        masks["key_padding_mask"] = padding[0] if batch is None else padding
    call = {"need_weights": draw(flags), "average_attn_weights": draw(flags)}
    return {"sizes": (width, heads), "options": options, "dtype": dtype, "own": own, "arrays": (query, key, value),
            "masks": masks, "call": call, "seed": seed}  # fmt: skip


def state_of(layer: Any, seed: int) -> dict[str, np.ndarray]:
    return {name: drawn(seed + i, *x.shape, dtype=str(x.dtype).removeprefix("torch."))
            for i, (name, x) in enumerate(layer.state_dict().items())}  # fmt: skip


def called(layer: Any, inputs: list, case: dict, masks: dict) -> tuple:
    query, key, value = inputs
    return layer(query, query if case["own"] else key, query if case["own"] else value, **masks, **case["call"])


@settings(parent=many, max_examples=100)
@given(layers())
def test_multihead_attention(case: dict) -> None:
    dtype, tolerance = case["dtype"], 5 * TOLERANCE[case["dtype"]]
    theirs = torch.nn.MultiheadAttention(*case["sizes"], **case["options"], dtype=getattr(torch, dtype))
    state = state_of(theirs, case["seed"])
    theirs.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    other = [torch.tensor(a, requires_grad=True) for a in case["arrays"]]
    expected, looks = called(theirs, other, case, {name: torch.tensor(x) for name, x in case["masks"].items()})
    weights = drawn(1, *expected.shape, dtype=dtype)
    total = (expected * torch.tensor(weights)).sum() + (0 if looks is None else (looks**2).sum())
    total.backward()
    for device in DEVICES:
        ours = MultiheadAttention(*case["sizes"], **case["options"], dtype=dtype, device=device)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(state)
        own = [t.tensor(a, device=device, requires_grad=True) for a in case["arrays"]]
        masks = {name: t.tensor(x, device=device) for name, x in case["masks"].items()}
        out, seen = called(ours, own, case, masks)
        assert_near(out, expected, tolerance, f"values on {device}")
        assert (seen is None) == (looks is None)
        if seen is not None:
            assert_near(seen, looks, tolerance, f"weights on {device}")
        loss = (out * t.tensor(weights, device=device)).sum() + (0 if seen is None else (seen**2).sum())
        loss.backward()
        for i, (x, y) in enumerate(zip(own, other, strict=True)):
            assert (x.grad is None) == (y.grad is None)
            if y.grad is not None:
                assert_near(x.grad, y.grad, 5 * tolerance, f"gradient of input {i} on {device}")
        for (name, x), (_, y) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert_near(x.grad, y.grad, 5 * tolerance, f"gradient of {name} on {device}")


def check_masks(need_weights: bool, **masks: np.ndarray) -> None:
    """A layer of both libraries on two sequences: values, weights, and the gradients of inputs and parameters."""
    ours, theirs = MultiheadAttention(6, 2, dtype="float64"), torch.nn.MultiheadAttention(6, 2, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    found = []
    for library, layer in ((t, ours), (torch, theirs)):
        inputs = [library.tensor(drawn(i, n, 2, 6), requires_grad=True) for i, n in enumerate((3, 5, 5))]
        given = {name: library.tensor(mask) for name, mask in masks.items()}
        out, weights = layer(*inputs, need_weights=need_weights, **given)
        (out**2).sum().backward()
        found.append([out, *([weights] if need_weights else []), *(x.grad for x in (*inputs, *layer.parameters()))])
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        assert_near(a, b, 1e-11, f"{i}")


def test_queries_of_a_layer_that_see_nothing() -> None:
    """Without weights; with them PyTorch's layer makes nan."""
    hidden, padding = np.arange(15).reshape(3, 5) // 5 == 1, np.array([[False] * 5, [True] * 5])
    check_masks(False, attn_mask=hidden, key_padding_mask=padding)
    check_masks(False, attn_mask=np.where(hidden, -math.inf, 0.2))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", [False, True])
def test_masks_of_two_kinds(need_weights: bool) -> None:
    hidden, padding = np.triu(np.ones((3, 5), bool), 2), np.arange(10).reshape(2, 5) > 7
    check_masks(need_weights, attn_mask=hidden, key_padding_mask=np.where(padding, -math.inf, 0.25))
    added = drawn(5, 4, 3, 5)  # one for each head of each sequence
    check_masks(need_weights, attn_mask=np.where(hidden, -math.inf, added), key_padding_mask=padding)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 3}, {"vdim": 5, "add_bias_kv": True}])
def test_states_are_exchanged_both_ways(options: dict) -> None:
    ours, theirs = MultiheadAttention(6, 2, **options), torch.nn.MultiheadAttention(6, 2, **options)
    assert {n: x.shape for n, x in ours.state_dict().items()} == {
        n: tuple(x.shape) for n, x in theirs.state_dict().items()
    }
    inputs = [
        drawn(i, 4, 2, n, dtype="float32") for i, n in enumerate((6, options.get("kdim", 6), options.get("vdim", 6)))
    ]

    def assert_same() -> None:
        out, looks = ours(*(t.tensor(x) for x in inputs))
        expected, weights = theirs(*(torch.tensor(x) for x in inputs))
        assert_near(out, expected, 1e-5)
        assert_near(looks, weights, 1e-5)

    ours.load_state_dict(theirs.state_dict())
    assert_same()
    ours.reset_parameters()
    theirs.load_state_dict({name: torch.tensor(x.numpy()) for name, x in ours.state_dict().items()})
    assert_same()


def test_initial_values_have_pytorchs_distributions() -> None:
    t.manual_seed(0)
    torch.manual_seed(0)
    for options in ({}, {"kdim": 30, "vdim": 50, "add_bias_kv": True}):
        ours, theirs = MultiheadAttention(60, 2, **options), torch.nn.MultiheadAttention(60, 2, **options)
        for (name, x), (_, y) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            a, b = x.detach().numpy(), y.detach().numpy()
            if not b.any():
                assert not a.any(), name
            elif b.size > 1000:  # uniform, on the same bounds
                assert np.abs(a).max() == pytest.approx(np.abs(b).max(), rel=0.02), name
                assert a.std() == pytest.approx(b.std(), rel=0.05), name
            else:
                assert a.std() == pytest.approx(b.std(), rel=0.4), name


def test_a_causal_hint_beside_its_mask() -> None:
    """PyTorch takes `is_causal` as a hint about the mask that is given too; here both hold, which is the same."""
    ours, theirs = MultiheadAttention(6, 2), torch.nn.MultiheadAttention(6, 2)
    ours.load_state_dict(theirs.state_dict())
    x, hidden = drawn(0, 5, 2, 6, dtype="float32"), np.triu(np.ones((5, 5), bool), 1)
    for need_weights in (False, True):
        own, other = t.tensor(x), torch.tensor(x)
        out = ours(own, own, own, attn_mask=t.tensor(hidden), is_causal=True, need_weights=need_weights)[0]
        want = theirs(other, other, other, attn_mask=torch.tensor(hidden), is_causal=True, need_weights=need_weights)[0]
        assert_near(out, want, 1e-5)
