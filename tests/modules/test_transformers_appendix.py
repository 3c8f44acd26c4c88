"""PyTorch's transformer layers by their definition; tests/reference compares them with PyTorch's own."""

from __future__ import annotations

import pytest

from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import randn, tensor, transpose
from tinytorch.m03_activations import gelu, relu, silu
from tinytorch.m04_layers import Module, normal_
from tinytorch.m13_attention import causal_mask
from tinytorch.m14_transformers import LayerNorm
from tinytorch.m14_transformers_appendix import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

E = 8


def scattered(module: Module) -> Module:
    """The same module with random norms and biases, too: ones and zeros would hide that they are left out."""
    manual_seed(11)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            normal_(parameter, mean=0.5)
    return module.eval()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", silu])
def test_an_encoder_layer_is_its_definition(norm_first: bool, activation: object) -> None:
    layer = scattered(TransformerEncoderLayer(E, 2, 12, activation=activation, norm_first=norm_first))  # type: ignore[arg-type]
    bend = {"relu": relu, "gelu": gelu}.get(activation, silu)  # type: ignore[call-overload]
    x = src = randn(5, 3, E)

    def attended(x: object) -> object:
        return layer.self_attn(x, x, x)[0]

    def fed(x: object) -> object:
        return layer.linear2(bend(layer.linear1(x)))

    if norm_first:
        x = x + attended(layer.norm1(x))
        x = x + fed(layer.norm2(x))
    else:
        x = layer.norm1(x + attended(x))
        x = layer.norm2(x + fed(x))
    assert_close(layer(src), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_decoder_layer_is_its_definition(norm_first: bool) -> None:
    layer = scattered(TransformerDecoderLayer(E, 2, 12, norm_first=norm_first, batch_first=True))
    x, memory = randn(3, 4, E), randn(3, 5, E)
    parts = (lambda x: layer.self_attn(x, x, x)[0], lambda x: layer.multihead_attn(x, memory, memory)[0],
             lambda x: layer.linear2(relu(layer.linear1(x))))  # fmt: skip
    expected = x
    for part, norm in zip(parts, (layer.norm1, layer.norm2, layer.norm3), strict=True):
        expected = expected + part(norm(expected)) if norm_first else norm(expected + part(expected))
    assert_close(layer(x, memory), expected, rtol=1e-4, atol=1e-5)


def test_masks_hide_what_they_say() -> None:
    layer = scattered(TransformerDecoderLayer(E, 2, 12))
    x, memory = randn(4, 2, E), randn(5, 2, E)
    hidden = ~causal_mask(4)
    for options in ({"tgt_mask": hidden}, {"tgt_mask": hidden, "tgt_is_causal": True}):
        assert_close(layer(x, memory, **options)[:2], layer(x[:2], memory, tgt_mask=hidden[:2, :2]), atol=1e-5)
    last = tensor([[False] * 4 + [True]] * 2)
    assert_close(layer(x, memory, memory_key_padding_mask=last), layer(x, memory[:4]), atol=1e-5)
    assert_close(layer(x, memory, memory_mask=tensor([[False] * 4 + [True]] * 4)), layer(x, memory[:4]), atol=1e-5)
    fewer = layer(x, memory, tgt_key_padding_mask=tensor([[False, False, True, True]] * 2))[:2]
    assert_close(fewer, layer(x[:2], memory), atol=1e-5)
    encoder = scattered(TransformerEncoderLayer(E, 2, 12))
    assert_close(encoder(memory, src_key_padding_mask=last)[:4], encoder(memory[:4]), atol=1e-5)
    assert_close(encoder(x, src_mask=hidden)[:2], encoder(x[:2], hidden[:2, :2]), atol=1e-5)


def test_stacks_are_copies_in_a_row_and_a_norm() -> None:
    x, memory, last = randn(4, 2, E), randn(5, 2, E), tensor([[False] * 4 + [True]] * 2)
    encoder = scattered(TransformerEncoder(TransformerEncoderLayer(E, 2, 12), 3, LayerNorm(E)))
    assert len({id(p) for p in encoder.parameters()}) == 3 * 12 + 2
    hidden, out = ~causal_mask(5), memory
    for layer in encoder.layers:
        out = layer(out, hidden, last)
    assert_close(encoder(memory, hidden, last), encoder.norm(out))
    decoder = scattered(TransformerDecoder(TransformerDecoderLayer(E, 2, 12), 2))
    out = x
    for layer in decoder.layers:
        out = layer(out, memory, hidden[:4, :4], None, None, last)
    assert_close(decoder(x, memory, hidden[:4, :4], memory_key_padding_mask=last), out)
    layer = TransformerEncoderLayer(E, 2, 12)
    assert TransformerEncoder(layer, 1).layers[0].linear1.weight is not layer.linear1.weight


def test_the_transformer_feeds_its_decoder_from_its_encoder() -> None:
    model = scattered(Transformer(E, 2, 1, 2, 12, batch_first=True))
    src, tgt = randn(2, 5, E), randn(2, 4, E)
    mask = Transformer.generate_square_subsequent_mask(4)
    assert mask.tolist()[1] == [0, 0, -float("inf"), -float("inf")]
    padding = tensor([[False] * 4 + [True]] * 2)
    memory = model.encoder(src, src_key_padding_mask=padding)
    expected = model.decoder(tgt, memory, mask, memory_key_padding_mask=padding)
    given = {"tgt_mask": mask, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    assert_close(model(src, tgt, **given), expected)
    bound = (6 / (12 + E)) ** 0.5  # Xavier's
    assert 0.9 * bound < model.encoder.layers[0].linear1.weight.abs().amax().item() <= bound
    assert len(model.decoder.layers) == 2
    own = Transformer(E, 2, custom_encoder=model.encoder, custom_decoder=model.decoder, batch_first=True)
    assert own.encoder is model.encoder
    assert own.decoder is model.decoder


def test_defaults() -> None:
    layer = TransformerDecoderLayer(E, 2)
    assert (layer.norm_first, layer.self_attn.batch_first, layer.linear1.out_features) == (False, False, 2048)
    assert {layer.dropout.p, layer.dropout3.p, layer.self_attn.dropout, layer.multihead_attn.dropout} == {0.1}
    assert {norm.eps for norm in (layer.norm1, layer.norm2, layer.norm3)} == {1e-5}
    bare = TransformerEncoderLayer(E, 2, 12, bias=False, layer_norm_eps=0.5, dtype="float64")
    assert [name for name in bare.state_dict() if "bias" in name] == []
    assert (bare.norm2.eps, {x.dtype for x in bare.parameters()}) == (0.5, {"float64"})
    x = randn(4, 2, E)
    swapped = TransformerEncoderLayer(E, 2, 12, batch_first=True).eval()
    plain = TransformerEncoderLayer(E, 2, 12).eval()
    plain.load_state_dict(swapped.state_dict())
    assert_close(transpose(swapped(transpose(x, 0, 1)), 0, 1), plain(x), atol=1e-5)


def test_dropout_falls_on_every_part() -> None:
    manual_seed(0)
    layer, x = TransformerEncoderLayer(E, 2, 12, dropout=1.0), randn(4, 2, E)
    assert_close(layer(x), layer.norm2(layer.norm1(x)), atol=1e-5)  # nothing is added any more
    layer = TransformerEncoderLayer(E, 2, 12, dropout=0.0)
    layer.dropout.p = 1.0  # the one between the linear layers
    first = layer.norm1(x + layer.self_attn(x, x, x)[0])
    assert_close(layer(x), layer.norm2(first + layer.linear2.bias), atol=1e-5)


def test_devices(device: str) -> None:
    model = scattered(Transformer(E, 2, 1, 1, 12))
    out = model(randn(5, 2, E), randn(4, 2, E), tgt_mask=Transformer.generate_square_subsequent_mask(4))
    assert (out.shape, out.device) == ((4, 2, E), randn(1).device)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"Layer: activation must be 'relu' or 'gelu' or a function, got 'silu'"):
        TransformerEncoderLayer(E, 2, activation="silu")
    model = Transformer(E, 2, 1, 1, 12)
    with pytest.raises(ValueError, match=r"need the same batch \(axis 1\)"):
        model(randn(5, 2, E), randn(4, 3, E))
    with pytest.raises(ValueError, match="need the same batch"):
        model(randn(5, 2, E), randn(4, E))
    with pytest.raises(ValueError, match="need a last axis of 8"):
        model(randn(5, 2, E), randn(4, 2, E + 1))
