"""LayerNorm, RMSNorm and the transformer layers against PyTorch's: values, all gradients, states, masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytorch as t
import tinytorch.nn.functional as F
from tests.reference.near import DEVICES, assert_near, drawn, dtypes, flags, seeds, some
from tinytorch import nn

torch = pytest.importorskip("torch")
TF = torch.nn.functional

TOLERANCE = {"float32": 2e-5, "float64": 1e-11}


def made(name: str, dtype: str, *sizes: Any, **options: Any) -> tuple[Any, Any]:
    """The layer of that name in both libraries."""
    ours = getattr(nn, name)(*sizes, dtype=dtype, **options)
    return ours, getattr(torch.nn, name)(*sizes, dtype=getattr(torch, dtype), **options)


def on(device: str, masks: dict) -> dict:
    return {name: t.tensor(x, device=device) if isinstance(x, np.ndarray) else x for name, x in masks.items()}


def compare_layers(
    ours: Any, theirs: Any, *arrays: np.ndarray, tolerance: float, devices: tuple[str, ...] = ("cpu",), **masks: Any
) -> None:
    """Two layers with the same state, on the same inputs: names, values, the gradients of inputs and parameters."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    state = {}
    for i, (name, x) in enumerate(theirs.state_dict().items()):
        state[name] = drawn(900 + i, *x.shape, dtype=str(x.dtype).removeprefix("torch.")) / max(1, x.ndim) ** 2
    theirs.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    theirs.zero_grad()
    inputs = [torch.tensor(x, requires_grad=True) for x in arrays]
    expected = theirs(*inputs, **{n: torch.tensor(m) if isinstance(m, np.ndarray) else m for n, m in masks.items()})
    weights = drawn(1, *expected.shape, dtype=arrays[0].dtype.name)
    expected.backward(torch.tensor(weights))
    gradients = dict(theirs.named_parameters())
    for device in devices:
        layer = ours.to(device)
        layer.load_state_dict(state)
        for parameter in layer.parameters():
            parameter.grad = None
        own = [t.tensor(x, device=device, requires_grad=True) for x in arrays]
        out = layer(*own, **on(device, masks))
        assert_near(out, expected, tolerance, f"values on {device}")
        out.backward(t.tensor(weights, device=device))
        for i, (x, y) in enumerate(zip(own, inputs, strict=True)):
            assert_near(x.grad, y.grad, tolerance, f"gradient of input {i} on {device}")
        for name, parameter in layer.named_parameters():
            assert_near(parameter.grad, gradients[name].grad, 5 * tolerance, f"gradient of {name} on {device}")


# -- norms -------------------------------------------------------------------------------------------------------------


@st.composite
def normalized(draw: Callable) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(the shape of an input, the part of it that is normalized)."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    return shape, shape[-draw(st.integers(1, len(shape))) :]


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norms(name: str) -> None:
    @some
    @given(normalized(), seeds, dtypes, flags, flags, st.sampled_from([1e-5, 0.1]))
    def check(shapes: tuple, seed: int, dtype: str, affine: bool, bias: bool, eps: float) -> None:
        shape, part = shapes
        options = {"elementwise_affine": affine, "eps": eps, **({"bias": bias} if name == "LayerNorm" else {})}
        ours, theirs = made(name, dtype, part, **options)
        x = drawn(seed, *shape, dtype=dtype) * 2 + 1
        # The difference of nearly equal numbers: float32 loses digits where all that is normalized is one number.
        tolerance = 1e-4 if dtype == "float32" else 1e-10
        compare_layers(ours, theirs, x, tolerance=tolerance, devices=DEVICES)

    check()


def test_norms_of_one_length_and_their_functions() -> None:
    x, weight, bias = drawn(0, 3, 4, 5), drawn(1, 5), drawn(2, 5)
    own = [t.tensor(a) for a in (x, weight, bias)]
    other = [torch.tensor(a) for a in (x, weight, bias)]
    assert_near(F.layer_norm(own[0], (5,), *own[1:]), TF.layer_norm(other[0], (5,), *other[1:]), 1e-12)
    assert_near(F.layer_norm(own[0], (4, 5)), TF.layer_norm(other[0], (4, 5)), 1e-12)
    assert_near(F.rms_norm(own[0], (5,), own[1], 1e-3), TF.rms_norm(other[0], (5,), other[1], 1e-3), 1e-12)
    assert_near(F.rms_norm(own[0], (4, 5)), TF.rms_norm(other[0], (4, 5)), 1e-12)  # the dtype's own eps
    assert repr(nn.LayerNorm(5)) == repr(torch.nn.LayerNorm(5))
    ours, theirs = made("RMSNorm", "float32", (4, 5), elementwise_affine=False)
    assert repr(ours) == repr(theirs)
    compare_layers(nn.LayerNorm(5), torch.nn.LayerNorm(5), x.astype("f4"), tolerance=1e-4, devices=DEVICES)


# -- transformer layers ------------------------------------------------------------------------------------------------

B, S, T, E = 2, 5, 4, 8


def sequence(seed: int, length: int, batch_first: bool, dtype: str, batched: bool = True) -> np.ndarray:
    shape = (B, length, E) if batch_first else (length, B, E)
    return drawn(seed, *(shape if batched else (length, E)), dtype=dtype)


def mask_of(seed: int, shape: tuple, dtype: str, floats: bool) -> np.ndarray:
    """Who is hidden from whom, as booleans, or as numbers to be added. Everyone sees the first."""
    rng = np.random.default_rng(seed)
    hidden = rng.random(shape) < 0.4
    hidden[..., 0] = False
    return np.where(hidden, -np.inf, rng.normal(size=hidden.shape)).astype(dtype) if floats else hidden


@st.composite
def cases(draw: Callable) -> dict:
    names = ("batch_first", "norm_first", "bias", "floats", "batched", "mask", "padding", "memory_mask",
             "memory_padding")  # fmt: skip
    return {**{name: draw(flags) for name in names}, "activation": draw(st.sampled_from(["relu", "gelu"])),
            "dtype": draw(dtypes), "seed": draw(seeds), "heads": draw(st.sampled_from([1, 2, 4]))}  # fmt: skip


def drawn_masks(case: dict, names: dict[str, tuple]) -> dict:
    """The masks of a case: {argument: (whether there is one, shape)}."""
    masks = {}
    for seed, (name, (there, shape)) in enumerate(names.items(), case["seed"]):
        if there:
            masks[name] = mask_of(seed, shape, case["dtype"], case["floats"])
    return masks


LAYER_OPTIONS = ("batch_first", "norm_first", "bias", "activation")


@some
@given(cases())
def test_encoder_layers(case: dict) -> None:
    options = {name: case[name] for name in LAYER_OPTIONS}
    ours, theirs = made("TransformerEncoderLayer", case["dtype"], E, case["heads"], 12, 0.0, **options)
    src = sequence(case["seed"], S, case["batch_first"], case["dtype"], case["batched"])
    lead = (B,) if case["batched"] else ()
    masks = drawn_masks(case, {"src_mask": (case["mask"], (S, S)),
                               "src_key_padding_mask": (case["padding"], (*lead, S))})  # fmt: skip
    compare_layers(ours, theirs, src, tolerance=10 * TOLERANCE[case["dtype"]], devices=DEVICES, **masks)


@some
@given(cases())
def test_decoder_layers(case: dict) -> None:
    options = {name: case[name] for name in LAYER_OPTIONS}
    ours, theirs = made("TransformerDecoderLayer", case["dtype"], E, case["heads"], 12, 0.0, **options)
    tgt = sequence(case["seed"], T, case["batch_first"], case["dtype"], case["batched"])
    memory = sequence(case["seed"] + 1, S, case["batch_first"], case["dtype"], case["batched"])
    lead = (B,) if case["batched"] else ()
    masks = drawn_masks(case, {"tgt_mask": (case["mask"], (T, T)), "memory_mask": (case["memory_mask"], (T, S)),
                               "tgt_key_padding_mask": (case["padding"], (*lead, T)),
                               "memory_key_padding_mask": (case["memory_padding"], (*lead, S))})  # fmt: skip
    compare_layers(ours, theirs, tgt, memory, tolerance=10 * TOLERANCE[case["dtype"]], devices=DEVICES, **masks)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")  # PyTorch's, of its own fast path
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_stacks(norm_first: bool, batch_first: bool) -> None:
    options = {"norm_first": norm_first, "batch_first": batch_first}
    src, tgt = sequence(0, S, batch_first, "float64"), sequence(1, T, batch_first, "float64")
    causal = np.triu(np.full((S, S), -np.inf), 1)
    padding = np.arange(S) >= np.array([[S], [3]])
    pairs = []
    for kind in ("Encoder", "Decoder"):
        ours, theirs = made(f"Transformer{kind}Layer", "float64", E, 2, 12, 0.0, **options)
        stacks = []
        for library, layer, dtype in ((nn, ours, "float64"), (torch.nn, theirs, torch.float64)):
            stacks.append(getattr(library, f"Transformer{kind}")(layer, 2, library.LayerNorm(E, dtype=dtype)))
        pairs.append(stacks)
    encoders, decoders = pairs
    compare_layers(*encoders, src, tolerance=1e-10, mask=causal, is_causal=True)
    compare_layers(*encoders, src, tolerance=1e-10, mask=causal)
    compare_layers(*encoders, src, tolerance=1e-10, mask=causal < 0, src_key_padding_mask=padding)
    compare_layers(*decoders, tgt, src, tolerance=1e-10, tgt_mask=causal[:T, :T], tgt_is_causal=True)
    compare_layers(*decoders, tgt, src, tolerance=1e-10, tgt_mask=causal[:T, :T] < 0, memory_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_the_whole_transformer() -> None:
    for batch_first in (False, True):
        ours, theirs = made("Transformer", "float64", E, 2, 1, 2, 12, 0.0, batch_first=batch_first, activation="gelu")
        src, tgt = sequence(0, S, batch_first, "float64"), sequence(1, T, batch_first, "float64")
        causal = torch.nn.Transformer.generate_square_subsequent_mask(T).numpy()
        assert (nn.Transformer.generate_square_subsequent_mask(T).numpy() == causal).all()
        assert causal.dtype == np.float32
        compare_layers(ours, theirs, src, tgt, tolerance=1e-10, tgt_mask=causal.astype("f8"), devices=DEVICES,
                       src_key_padding_mask=np.arange(S) >= np.array([[S], [3]]))  # fmt: skip


def test_defaults_are_theirs() -> None:
    """The same text: sizes, eps, rates of dropout, and the order of the layers."""
    for name in ("TransformerEncoderLayer", "TransformerDecoderLayer"):
        ours, theirs = getattr(nn, name)(E, 2), getattr(torch.nn, name)(E, 2)
        assert repr(ours) == repr(theirs).replace("NonDynamicallyQuantizable", "")
        assert (ours.norm_first, ours.self_attn.batch_first) == (theirs.norm_first, theirs.self_attn.batch_first)
        assert ours.activation is F.relu
        assert ours.self_attn.dropout == theirs.self_attn.dropout == 0.1


def test_stacked_layers_are_copies() -> None:
    layer = nn.TransformerEncoderLayer(E, 2, 12, activation=F.silu)
    stack = nn.TransformerEncoder(layer, 3)
    assert len({id(x) for x in [*stack.parameters(), *layer.parameters()]}) == 4 * len(list(layer.parameters()))
    first, last = (stack.layers[i].linear1.weight for i in (0, 2))
    assert first.tolist() == last.tolist()
    assert stack.layers[1].activation is F.silu


def test_dropout_falls_in_training_only() -> None:
    t.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(E, 2, 12, dropout=0.5), t.randn(S, B, E)
    assert layer(x).tolist() != layer(x).tolist()
    layer.eval()
    assert layer(x).tolist() == layer(x).tolist()


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="activation must be 'relu' or 'gelu' or a function, got 'silu'"):
        nn.TransformerEncoderLayer(E, 2, activation="silu")
    model = nn.Transformer(E, 2, 1, 1, 12)
    with pytest.raises(ValueError, match=r"Transformer: .* need the same batch \(axis 1\)"):
        model(t.randn(S, 2, E), t.randn(T, 3, E))
    with pytest.raises(ValueError, match="need a last axis of 8"):
        model(t.randn(S, 2, E), t.randn(T, 2, E + 1))
