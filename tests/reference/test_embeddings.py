"""Embeddings, bags and rotary positions against PyTorch's and Hugging Face's: values, all gradients, states, text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytorch as t
from tests.reference.near import DEVICES, assert_near, drawn, dtypes, flags, many, seeds, some
from tinytorch.m12_embeddings import (
    Embedding,
    RotaryEmbedding,
    alibi_slopes,
    embedding,
    rotary_tables,
    rotate,
    sinusoidal_positions,
)
from tinytorch.m12_embeddings_appendix import EmbeddingBag, embedding_bag, halves_from_pairs

torch = pytest.importorskip("torch")
TF = torch.nn.functional

TOLERANCE = {"float16": 2e-3, "float32": 1e-5, "float64": 1e-12}
integers = st.sampled_from(["int64", "int32"])


def on(device: str, x: Any) -> Any:
    return t.tensor(x, device=device) if isinstance(x, np.ndarray) else x


def compare(ours: Callable, theirs: Callable, *arrays: np.ndarray | None, **options: Any) -> None:
    """Both libraries on the same arrays, on every device of ours: values, and the gradient of every floating input."""
    dtype = next(a.dtype.name for a in arrays if a is not None and a.dtype.kind == "f")
    tolerance = TOLERANCE[dtype]

    def prepared(make: Callable) -> list:
        inputs = [None if a is None else make(a.copy()) for a in arrays]
        for x, a in zip(inputs, arrays, strict=True):
            if a is not None and a.dtype.kind == "f":
                x.requires_grad_()
        return inputs

    other = prepared(torch.tensor)
    expected = theirs(*other, **{n: torch.tensor(v) if isinstance(v, np.ndarray) else v for n, v in options.items()})
    weights = drawn(1, *expected.shape, dtype=dtype)
    floats = [i for i, a in enumerate(arrays) if a is not None and a.dtype.kind == "f"]
    found = torch.autograd.grad(expected, [other[i] for i in floats], torch.tensor(weights))
    for device in DEVICES:
        own = prepared(lambda a, device=device: t.tensor(a, device=device))
        out = ours(*own, **{name: on(device, value) for name, value in options.items()})
        assert_near(out, expected, tolerance, f"values on {device}")
        watched = [own[i] for i in floats]
        for i, x, y in zip(floats, t.autograd.grad(out, watched, on(device, weights)), found, strict=True):
            assert_near(x, y, tolerance, f"gradient of input {i} on {device}")


# -- embedding ---------------------------------------------------------------------------------------------------------

shapes_of_ids = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@many
@given(seeds, shapes_of_ids, st.integers(1, 20), st.integers(1, 5), dtypes, integers, st.data())
def test_embedding(seed: int, shape: tuple, rows: int, width: int, dtype: str, kind: str, data: Any) -> None:
    ids = np.asarray(np.random.default_rng(seed).integers(0, rows, shape), kind)
    padding_idx = data.draw(st.one_of(st.none(), st.integers(-rows, rows - 1)))
    options = {"padding_idx": padding_idx, "scale_grad_by_freq": data.draw(flags)}
    compare(embedding, TF.embedding, ids, drawn(seed, rows, width, dtype=dtype), **options)


@some
@given(seeds, shapes_of_ids, st.sampled_from([1.0, 2.0, 3.0, math.inf]), st.floats(0.1, 3))
def test_max_norm(seed: int, shape: tuple, norm_type: float, max_norm: float) -> None:
    ids = np.asarray(np.random.default_rng(seed).integers(0, 9, shape), "int64")
    weight = drawn(seed, 9, 4)
    other = torch.tensor(weight.copy())
    expected = TF.embedding(torch.tensor(ids), other, None, max_norm, norm_type)
    for device in DEVICES:
        own = t.tensor(weight, device=device, requires_grad=True)
        out = embedding(t.tensor(ids, device=device), own, None, max_norm, norm_type)
        assert_near(out, expected, 1e-12)
        assert_near(own, other, 1e-12)  # only the rows in use are shortened
        out.sum().backward()


def test_gradients_of_gradients() -> None:
    ids, weight, h = np.array([[3, 0, 3], [1, 3, 0]]), drawn(0, 5, 2), drawn(1, 5, 2)
    for padding_idx in (None, 3):
        results = []
        for library, function in ((t, embedding), (torch, TF.embedding)):
            x = library.tensor(weight, requires_grad=True)
            out = function(library.tensor(ids), x, padding_idx)
            (g,) = library.autograd.grad((out**3).sum(), x, create_graph=True)
            (gg,) = library.autograd.grad((g * library.tensor(h)).sum(), x)
            results.append(gg)
        assert_near(*results, 1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_many_of_one_token_add_up(dtype: str) -> None:
    """5000 small gradients: in float16 a sum one by one stops at 2048 of them."""
    ids, weight = np.zeros(5000, "int64"), drawn(0, 3, 2, dtype=dtype)
    for device in DEVICES if dtype == "float32" else ("cpu", "torch"):
        own = t.tensor(weight, device=device, requires_grad=True)
        embedding(t.tensor(ids, device=device), own).sum().backward()
        other = torch.tensor(weight.astype("f4"), requires_grad=True)
        TF.embedding(torch.tensor(ids), other).sum().backward()
        assert own.grad.dtype == dtype
        np.testing.assert_allclose(own.grad.numpy().astype("f4"), other.grad.numpy(), rtol=1e-3)


def test_infinite_gradients_stay_in_their_rows() -> None:
    ids, g = np.array([1, 1, 2]), np.array([[math.inf, 1.0], [1, math.nan], [2, 2]])
    results = []
    for library, function in ((t, embedding), (torch, TF.embedding)):
        weight = library.tensor(np.zeros((4, 2)), requires_grad=True)
        function(library.tensor(ids), weight).backward(library.tensor(g))
        results.append(weight.grad.numpy())
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("options", [
    {}, {"padding_idx": 0}, {"padding_idx": -1, "max_norm": 1.0}, {"norm_type": 1.0, "scale_grad_by_freq": True},
    {"sparse": True},
])  # fmt: skip
def test_layers_have_the_same_text_and_state(options: dict) -> None:
    ours, theirs = Embedding(5, 3, **options), torch.nn.Embedding(5, 3, **options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.padding_idx == theirs.padding_idx
    ours.load_state_dict(theirs.state_dict())
    ids = np.array([[0, 4], [4, 2]])
    assert_near(ours(t.tensor(ids)), theirs(torch.tensor(ids)), 1e-6)
    theirs.load_state_dict({name: torch.tensor(x.numpy()) for name, x in ours.state_dict().items()})


# -- bags --------------------------------------------------------------------------------------------------------------


@st.composite
def bags(draw: Callable, mode: str) -> dict:
    """Arrays and options of a call that PyTorch can do."""
    rng = np.random.default_rng(draw(seeds))
    rows, width, dtype = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(dtypes)
    options: dict[str, Any] = {"mode": mode, "padding_idx": draw(st.one_of(st.none(), st.integers(-rows, rows - 1)))}
    if draw(flags):
        ids = rng.integers(0, rows, (draw(st.integers(1, 4)), draw(st.integers(1, 5))))
    else:
        lengths = [0, *draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))]
        ids, options["offsets"] = rng.integers(0, rows, sum(lengths)), np.cumsum(lengths)
        options["include_last_offset"] = draw(flags)
        if not options["include_last_offset"]:
            options["offsets"] = options["offsets"][:-1]
    shares = rng.normal(size=ids.shape).astype(dtype) if mode == "sum" and draw(flags) else None
    return {"arrays": (ids, rng.normal(size=(rows, width)).astype(dtype), shares), "options": options}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode: str) -> None:
    def call(function: Callable) -> Callable:
        return lambda ids, weight, shares, **options: function(ids, weight, per_sample_weights=shares, **options)

    @some
    @given(bags(mode))
    def check(case: dict) -> None:
        compare(call(embedding_bag), call(TF.embedding_bag), *case["arrays"], **case["options"])

    check()


@pytest.mark.parametrize("options", [
    {}, {"mode": "sum", "padding_idx": -2}, {"mode": "max", "max_norm": 0.5}, {"scale_grad_by_freq": True},
    {"include_last_offset": True},
])  # fmt: skip
def test_bag_layers(options: dict) -> None:
    ours, theirs = EmbeddingBag(5, 3, **options), torch.nn.EmbeddingBag(5, 3, **options)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    ids = np.array([0, 4, 4, 2, 3])
    offsets = np.array([0, 2, 2, 5] if options.get("include_last_offset") else [0, 2, 2])
    results = [layer(library.tensor(ids), library.tensor(offsets)) for layer, library in ((ours, t), (theirs, torch))]
    assert_near(*results, 1e-6)
    for out in results:
        (out * out).sum().backward()
    assert_near(ours.weight.grad, theirs.weight.grad, 1e-5)


def test_from_pretrained() -> None:
    table = drawn(0, 4, 3, dtype="float32")
    for ours, theirs in ((Embedding, torch.nn.Embedding), (EmbeddingBag, torch.nn.EmbeddingBag)):
        for options in ({}, {"freeze": False, "padding_idx": 1}):
            own, other = t.tensor(table), torch.tensor(table)
            layers = ours.from_pretrained(own, **options), theirs.from_pretrained(other, **options)
            assert [layer.weight.requires_grad for layer in layers] == [not options.get("freeze", True)] * 2
            assert repr(layers[0]) == repr(layers[1])
            own[0, 0], other[0, 0] = 7.0, 7.0  # one memory
            ids = [library.tensor([[0, 1, 3]]) for library in (t, torch)]
            assert_near(layers[0](ids[0]), layers[1](ids[1]), 1e-6)


# -- rotary ------------------------------------------------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
SCALINGS: list[dict | None] = [
    None,
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    LLAMA3,
    {**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0, "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256, "beta_fast": 16.0, "beta_slow": 2.0,
     "truncate": False},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707,
     "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64, "attention_factor": 1.5},
]  # fmt: skip


def of_transformers(dim: int, base: float, scaling: dict | None) -> tuple[Any, Callable]:
    """Hugging Face's rotary layer and the function that applies its result."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": base}
    config = LlamaConfig(hidden_size=2 * dim, num_attention_heads=2, head_dim=dim, max_position_embeddings=512,
                         rope_parameters=parameters)  # fmt: skip
    return llama.LlamaRotaryEmbedding(config), llama.apply_rotary_pos_emb


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: (s or {}).get("rope_type"))
@pytest.mark.parametrize(("dim", "base"), [(8, 10000.0), (64, 500000.0)])
def test_rotary_equals_transformers(scaling: dict | None, dim: int, base: float) -> None:
    theirs, apply = of_transformers(dim, base, scaling)
    q, k = drawn(0, 2, 4, 40, dim, dtype="float32"), drawn(1, 2, 2, 40, dim, dtype="float32")
    places = np.stack([np.arange(40), np.arange(3, 43)])
    other = [torch.tensor(x, requires_grad=True) for x in (q, k)]
    tables = theirs(other[0], torch.tensor(places))
    expected = apply(*other, *tables)
    weights = [drawn(2 + i, *x.shape, dtype="float32") for i, x in enumerate((q, k))]
    torch.autograd.backward(expected, [torch.tensor(w) for w in weights])
    for device in DEVICES:
        ours = RotaryEmbedding(dim, 512, base, scaling).to(device)
        for table, want in zip(ours.tables(43), tables, strict=True):
            assert_near(table[3:43], want[1], 1e-5)
        own = [t.tensor(x, device=device, requires_grad=True) for x in (q, k)]
        for x, y, want, weight in zip(own, other, expected, weights, strict=True):
            out = ours(x, positions=t.tensor(places, device=device))
            assert_near(out, want, 1e-5)
            assert_near(ours(x)[:1], want[:1], 1e-5)
            assert_near(ours(x, 3)[1:], want[1:], 1e-5)
            out.backward(t.tensor(weight, device=device))
            assert_near(x.grad, y.grad, 1e-5)


@some
@given(seeds, st.lists(st.integers(1, 4), max_size=2), st.integers(0, 6), st.integers(1, 4), dtypes)
def test_rotate(seed: int, lead: list, length: int, half: int, dtype: str) -> None:
    """Also for cosines and sines that are no angles'."""
    arrays = [drawn(seed + i, *shape, length, 2 * half, dtype=dtype) for i, shape in enumerate((lead, (), ()))]

    def theirs(x: Any, cos: Any, sin: Any) -> Any:
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    compare(rotate, theirs, *arrays)


def test_scores_are_those_of_complex_numbers() -> None:
    """Rotary positions by their definition: pairs as complex numbers, times e^(i t ω)."""
    q, (cos, sin) = drawn(0, 6, 8), rotary_tables(6, 8, base=100.0, dtype="float64")
    turned = (q[:, :4] + 1j * q[:, 4:]) * np.exp(1j * np.outer(np.arange(6), 100.0 ** -(np.arange(4) / 4)))
    out = rotate(t.tensor(q), cos, sin).numpy()
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], axis=1), rtol=1e-12, atol=1e-12)


def test_pairs_become_halves() -> None:
    """A projection for neighbours that turn together, as in Meta's files, gives the same scores once its rows moved."""
    heads, dim, x = 3, 4, drawn(0, 5, 7)
    weights = drawn(1, heads * dim, 7), drawn(2, heads * dim, 7)
    angles = np.outer(np.arange(5), 10000.0 ** -(np.arange(2) / 2))[:, None]

    def in_pairs(weight: np.ndarray) -> np.ndarray:
        y = (x @ weight.T).reshape(5, heads, dim)
        return (y[..., ::2] + 1j * y[..., 1::2]) * np.exp(1j * angles)

    expected = np.einsum("thk,shk->hts", in_pairs(weights[0]).conj(), in_pairs(weights[1])).real
    rotary = RotaryEmbedding(dim, 8, dtype="float64")
    q, k = (
        rotary((t.tensor(x) @ halves_from_pairs(t.tensor(w), heads).T).reshape(1, 5, heads, dim).transpose(1, 2))
        for w in weights
    )
    np.testing.assert_allclose((q @ k.mT)[0].numpy(), expected, rtol=1e-9, atol=1e-9)


# -- other positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "dim"), [(7, 6), (5, 1), (3, 5), (0, 4)])
def test_sinusoids(length: int, dim: int) -> None:
    place, column = np.arange(length)[:, None], np.arange(dim)[None]
    angles = place / 10000.0 ** (2 * (column // 2) / dim)
    expected = np.where(column % 2 == 0, np.sin(angles), np.cos(angles))
    table = sinusoidal_positions(length, dim, dtype="float64")
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert sinusoidal_positions(length, dim).dtype == "float32"


@pytest.mark.parametrize("heads", [1, 2, 3, 7, 8, 12, 16, 40])
def test_alibi_slopes_are_those_of_the_paper(heads: int) -> None:
    def slopes(n: int) -> list:  # the program of Press and others
        if math.log2(n).is_integer():
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start * start**i for i in range(n)]
        closest = 2 ** math.floor(math.log2(n))
        return slopes(closest) + slopes(2 * closest)[0::2][: n - closest]

    np.testing.assert_allclose(alibi_slopes(heads, dtype="float64").numpy(), slopes(heads), rtol=1e-12)
