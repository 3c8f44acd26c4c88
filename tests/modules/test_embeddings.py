"""Module 12 and its appendix: edges, dtypes, states and errors that the chapter's own tests leave out."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

import tinytorch as t
from tinytorch.m02_tensor import observe
from tinytorch.m06_autograd import no_grad
from tinytorch.m12_embeddings import (
    ROPE_SCALINGS,
    Embedding,
    LearnedPositions,
    RotaryEmbedding,
    SinusoidalPositions,
    alibi_bias,
    embedding,
    embedding_weight_gradient,
    rotary_tables,
    rotate,
    sinusoidal_positions,
)
from tinytorch.m12_embeddings_appendix import EmbeddingBag, embedding_bag, halves_from_pairs

INTEGERS = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")

# -- look-up -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS)
def test_ids_of_every_integer_dtype(dtype: str, device: str) -> None:
    weight = t.randn(100, 3, requires_grad=True)
    ids = np.array([[3, 99], [0, 3]], dtype)
    try:
        own = t.tensor(ids)
    except TypeError:
        pytest.skip(f"{device} has no {dtype}")
    out = embedding(own, weight)
    np.testing.assert_array_equal(out.detach().numpy(), weight.detach().numpy()[ids.astype(int)])
    out.sum().backward()
    assert weight.grad[:, 0].tolist() == [1, 0, 0, 2] + [0] * 95 + [1]
    with pytest.raises(IndexError, match="embedding: index 100 is out of range for 100 rows"):
        embedding(t.tensor(np.array([3, 100], dtype)), weight)


def test_the_first_wrong_id_is_named(device: str) -> None:
    weight = t.randn(5, 2)
    for ids, first in (([[0, 1], [7, -3]], 7), ([-3, 7], -3), ([4, 5], 5), ([1 << 40], 1 << 40), (5, 5)):
        with pytest.raises(IndexError, match=f"^embedding: index {first} is out of range for 5 rows$"):
            embedding(t.tensor(ids), weight)
    assert embedding(t.tensor([4, 0]), weight).shape == (2, 2)


def test_ids_are_integers(device: str) -> None:
    for ids, given in ((t.ones(2), "float32"), (t.ones(2) > 0, "bool")):
        with pytest.raises(TypeError, match=f"embedding: ids must be integers, got {given}"):
            embedding(ids, t.zeros(3, 2))


def test_no_id_at_all(device: str) -> None:
    weight = t.randn(4, 3, requires_grad=True)
    for shape in ((0,), (2, 0), (0, 3)):
        out = embedding(t.zeros(*shape, dtype="int64"), weight)
        assert out.shape == (*shape, 3)
        (out.sum() + 0 * weight.sum()).backward()
    assert weight.grad.tolist() == [[0] * 3] * 4
    assert embedding(t.zeros(0, dtype="int64"), t.zeros(0, 3)).shape == (0, 3)


def test_a_looked_up_row_is_no_view(device: str) -> None:
    weight = t.randn(4, 2)
    before = weight.tolist()
    out = embedding(t.tensor([1]), weight)
    out += 1
    assert weight.tolist() == before


def test_ids_that_change_before_backward_are_noticed(device: str) -> None:
    weight, ids = t.randn(4, 2, requires_grad=True), t.tensor([1, 2])
    out = embedding(ids, weight).sum()
    ids[0] = 3
    with pytest.raises(RuntimeError, match="changed in place after it was recorded"):
        out.backward()


def test_gradient_has_the_same_bits_every_time(device: str) -> None:
    ids, g = t.tensor(np.random.default_rng(0).integers(0, 9, 500)), t.randn(500, 7)
    first = embedding_weight_gradient(g, ids, rows=9)
    for _ in range(3):
        assert t.equal(embedding_weight_gradient(g, ids, rows=9), first)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 31, 32, 33, 100])
def test_runs_of_every_length(count: int, device: str) -> None:
    rng = np.random.default_rng(count)
    ids, g = rng.permutation(np.repeat([0, 2, 3], [count, 1, 2 * count])), rng.normal(size=(3 * count + 1, 2))
    expected = np.zeros((4, 2))
    np.add.at(expected, ids, g)
    np.testing.assert_allclose(
        embedding_weight_gradient(t.tensor(g), t.tensor(ids), rows=4).numpy(), expected, 1e-10, 1e-12
    )
    scaled = embedding_weight_gradient(t.tensor(g), t.tensor(ids), rows=4, scale_grad_by_freq=True).numpy()
    np.testing.assert_allclose(scaled, expected / [[count], [1], [1], [2 * count]], 1e-10, 1e-12)


def test_a_long_sum_in_half_precision(device: str) -> None:
    """Rounded once, at its end."""
    try:
        g = t.rand(999, 20).to("float16")
    except TypeError:
        pytest.skip(f"{device} has no float16")
    out = embedding_weight_gradient(g, t.zeros(999, dtype="int64"), rows=2)
    exact = g.numpy().astype("float64").sum(0).astype("float16")
    assert (out.dtype, out.tolist()) == ("float16", [exact.tolist(), [0] * 20])


# -- the layer ---------------------------------------------------------------------------------------------------------


def test_initial_values_are_standard_normal(device: str) -> None:
    t.manual_seed(3)
    layer = Embedding(300, 100, padding_idx=7)
    weight = layer.weight.detach().numpy()
    assert not weight[7].any()
    rest = np.delete(weight, 7, axis=0)
    assert abs(rest.mean()) < 0.02
    assert abs(rest.std() - 1) < 0.02
    assert layer.weight.requires_grad
    layer.weight.detach()[:] = 5.0
    layer.reset_parameters()
    assert not layer.weight.detach()[7].numpy().any()


def test_the_layer_hands_all_it_was_given_on(device: str) -> None:
    layer = Embedding(4, 2, padding_idx=3, max_norm=1.0, norm_type=1.0, scale_grad_by_freq=True)
    with no_grad():
        layer.weight.copy_(t.tensor([[3.0, 1.0], [0.25, 0.25], [8.0, 8.0], [6.0, 2.0]]))
    out = layer(t.tensor([0, 0, 1, 3]))
    np.testing.assert_allclose(out.detach().numpy(), [[0.75, 0.25]] * 2 + [[0.25, 0.25], [0.75, 0.25]], rtol=1e-6)
    assert layer.weight[2].tolist() == [8, 8]  # nobody asked for it
    out.sum().backward()
    assert layer.weight.grad.tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]
    assert layer(t.tensor(2)).shape == (2,)


def test_shortened_rows_are_noticed_by_a_graph(device: str) -> None:
    weight = t.tensor([[3.0, 4.0]], requires_grad=True)
    product = (weight * weight).sum()
    embedding(t.tensor([0]), weight, max_norm=1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        product.backward()


def test_a_copy_has_a_table_of_its_own(device: str) -> None:
    layer = Embedding(3, 2)
    other = copy.deepcopy(layer)
    with no_grad():
        other.weight.zero_()
    assert layer.weight.abs().sum().item() > 0
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize(("sizes", "words"), [
    ((0, 3), "at least 1 row and 1 feature, got 0, 3"),
    ((3, 0), "at least 1 row and 1 feature, got 3, 0"),
    ((3, 2, 3), "padding_idx must be one of the 3 rows, got 3"),
    ((3, 2, -4), "padding_idx must be one of the 3 rows, got -4"),
    ((3, 2, 1.0), "padding_idx must be one of the 3 rows, got 1.0"),
])  # fmt: skip
def test_layers_that_cannot_be(sizes: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=f"^Embedding: .*{words}"):
        Embedding(*sizes)


def test_dtype_and_device_of_a_layer(device: str) -> None:
    layer = Embedding(3, 2, dtype="float64", device="cpu")
    assert (layer.weight.dtype, layer.weight.device) == ("float64", "cpu")
    for one in (LearnedPositions(3, 2, device="cpu").weight, SinusoidalPositions(3, 2, device="cpu").table,
                RotaryEmbedding(2, 3, device="cpu").cos, EmbeddingBag(3, 2, device="cpu").weight,
                alibi_bias(2, 3, device="cpu")):  # fmt: skip
        assert (one.dtype, one.device) == ("float32", "cpu")


def test_half_precision(device: str) -> None:
    half = {"dtype": "float16"}
    try:
        layer = Embedding(5, 3, padding_idx=1, max_norm=1.0, **half)
    except TypeError:
        pytest.skip(f"{device} has no float16")
    out = layer(t.tensor([0, 0, 1]))
    out.sum().backward()
    assert (out.dtype, layer.weight.grad.dtype) == ("float16", "float16")
    assert layer.weight.grad[:, 0].tolist() == [2, 0, 0, 0, 0]
    for x in (RotaryEmbedding(4, 8)(t.ones(1, 1, 2, 4, **half)), SinusoidalPositions(8, 4)(t.ones(2, 4, **half))):
        assert x.dtype == "float16"
    for mode in ("sum", "mean", "max"):
        assert embedding_bag(t.tensor([[0, 1]]), t.ones(2, 2, **half), mode=mode).dtype == "float16"


# -- added positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LearnedPositions, SinusoidalPositions])
def test_added_positions(kind: type, device: str) -> None:
    layer, x = kind(6, 4), t.randn(2, 3, 4)
    table = layer.weight if kind is LearnedPositions else layer.table
    np.testing.assert_allclose((layer(x) - x).detach().numpy(), [table[:3].tolist()] * 2, atol=1e-6)
    np.testing.assert_allclose((layer(x, 3) - x).detach().numpy(), [table[3:].tolist()] * 2, atol=1e-6)
    for offset in (4, -1):
        with pytest.raises(ValueError, match=f"{kind.__name__}: 3 positions from {offset} on do not fit in 6"):
            layer(x, offset)
    for shape in ((2, 3, 1), (2, 3, 8), (4,)):
        with pytest.raises(ValueError, match=rf"{kind.__name__}: expected \(…, T, 4\), got \({shape[0]},"):
            layer(t.zeros(*shape))
    assert list(layer.state_dict()) == (["weight"] if kind is LearnedPositions else [])


def test_learned_positions_start_small_and_learn(device: str) -> None:
    t.manual_seed(0)
    layer = LearnedPositions(500, 40)
    assert repr(layer) == "LearnedPositions(500, 40)"
    assert abs(layer.weight.detach().numpy().std() - 0.02) < 0.001
    layer(t.zeros(2, 3, 40), 1).sum().backward()
    assert layer.weight.grad[:, 0].tolist() == [0, 2, 2, 2] + [0] * 496


def test_sinusoids_take_the_dtype_of_what_they_are_added_to(device: str) -> None:
    layer = SinusoidalPositions(6, 4)
    assert layer(t.zeros(1, 6, 4, dtype="float64")).dtype == "float64"
    assert sinusoidal_positions(3, 4, base=4.0)[2].tolist() == pytest.approx(
        [math.sin(2), math.cos(2), math.sin(1), math.cos(1)]
    )


# -- rotary positions --------------------------------------------------------------------------------------------------


def test_tables_hold_each_angle_twice(device: str) -> None:
    cos, sin = rotary_tables(3, 4, base=16.0)
    np.testing.assert_allclose(cos.numpy(), np.cos(np.outer(range(3), [1, 0.25, 1, 0.25])), rtol=1e-6)
    np.testing.assert_allclose(sin.numpy(), np.sin(np.outer(range(3), [1, 0.25, 1, 0.25])), rtol=1e-6)
    assert cos.dtype == "float32"
    assert rotary_tables(3, 4, dtype="float64")[1].dtype == "float64"


def test_rotating_broadcasts_both_ways(device: str) -> None:
    x, (cos, sin) = t.randn(1, 1, 3, 4), rotary_tables(3, 4)
    out = rotate(x, cos.expand(2, 1, 3, 4), sin.expand(2, 1, 3, 4))
    assert out.shape == (2, 1, 3, 4)
    np.testing.assert_array_equal(out[1].numpy(), rotate(x, cos, sin)[0].numpy())


def test_tables_grow_to_what_is_used(device: str) -> None:
    rotary, x = RotaryEmbedding(4, max_positions=3000, dtype="float64"), t.randn(1, 1, 2, 4, dtype="float64")
    assert len(rotary.cos) == 1024
    cos, sin = rotary_tables(3000, 4, dtype="float64")
    for offset, length in ((1022, 1024), (1100, 2204), (2000, 2204), (2998, 3000)):
        out = rotary(x, offset)
        assert len(rotary.cos) == len(rotary.sin) == length
        np.testing.assert_array_equal(
            out.numpy(), rotate(x, cos[offset : offset + 2], sin[offset : offset + 2]).numpy()
        )
    assert rotary.cos.dtype == "float64"
    assert len(RotaryEmbedding(4, max_positions=7).cos) == 7


def test_positions_of_each_sequence(device: str) -> None:
    rotary, x = RotaryEmbedding(6, 64), t.randn(2, 3, 4, 6)
    out = rotary(x, positions=t.tensor([[0, 1, 2, 3], [5, 6, 7, 60]]))
    np.testing.assert_allclose(out[0].numpy(), rotary(x)[0].numpy(), rtol=1e-6)
    np.testing.assert_allclose(out[1, :, :3].numpy(), rotary(x, 5)[1, :, :3].numpy(), rtol=1e-6)
    np.testing.assert_allclose(out[1, :, 3].numpy(), rotary(x, 57)[1, :, 3].numpy(), rtol=1e-6)
    same = rotary(x, positions=t.tensor([5, 6, 7, 8]))
    np.testing.assert_array_equal(same.numpy(), rotary(x, 5).numpy())
    assert rotary(x[:, :, :0], positions=t.zeros(0, dtype="int64")).shape == (2, 3, 0, 6)
    with pytest.raises(IndexError, match="RotaryEmbedding: index 64 is out of range for 64"):
        rotary(x, positions=t.tensor([1, 2, 3, 64]))


def test_positions_fit_their_input_and_are_not_spread_over_it(device: str) -> None:
    rotary, x = RotaryEmbedding(6, 64), t.randn(2, 3, 4, 6)
    for places in ([5, 6, 7, 8], [[5, 6, 7, 8]], [[5, 6, 7, 8]] * 2):
        np.testing.assert_array_equal(rotary(x, positions=t.tensor(places)).numpy(), rotary(x, 5).numpy())
    for places in (5, [5], [5, 6], [[5], [6]], [[5, 6, 7, 8]] * 3, [[[5, 6, 7, 8]]]):
        with pytest.raises(ValueError, match=r"RotaryEmbedding: positions must be \(T,\), or \(B, T\) .* got \("):
            rotary(x, positions=t.tensor(places))
    np.testing.assert_array_equal(rotary(x[0], positions=t.tensor([5, 6, 7, 8])).numpy(), rotary(x[0], 5).numpy())
    with pytest.raises(ValueError, match=r"RotaryEmbedding: positions must be .* got \(3, 4\) for \(3, 4, 6\)"):
        rotary(x[0], positions=t.tensor([[5, 6, 7, 8]] * 3))
    for shape in ((2, 3, 4, 4), (6,)):
        with pytest.raises(ValueError, match=r"RotaryEmbedding: expected \(…, T, 6\), got "):
            rotary(t.zeros(*shape))


def test_rotary_has_no_state_and_follows_its_input(device: str) -> None:
    rotary = RotaryEmbedding(4, 8)
    assert not rotary.state_dict()
    assert not list(rotary.parameters())
    assert [name for name, _ in rotary.named_buffers()] == ["cos", "sin"]
    assert rotary(t.zeros(1, 1, 8, 4, dtype="float64")).dtype == "float64"
    assert rotary.to("float64").cos.dtype == "float64"
    assert repr(rotary) == "RotaryEmbedding(4, max_positions=8, base=10000.0)"
    for offset in (7, -1):
        with pytest.raises(
            ValueError, match=f"RotaryEmbedding: 2 positions from {offset} on do not fit in 8 positions"
        ):
            rotary(t.zeros(1, 1, 2, 4), offset)


def test_rotary_passes_base_and_scaling_on(device: str) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    rotary = RotaryEmbedding(4, 2000, 100.0, scaling)
    for _ in range(2):
        for own, want in zip((rotary.cos, rotary.sin), rotary_tables(2000, 4, 100.0, scaling), strict=True):
            np.testing.assert_array_equal(own.numpy(), want[: len(own)].numpy())
        rotary.tables(1500)  # the second time, of grown tables
    assert "scaling={'rope_type': 'linear', 'factor': 2.0}" in repr(rotary)


@pytest.mark.parametrize(("scaling", "words"), [
    ({"rope_type": "linear"}, "rope_type 'linear' with {}: .*'factor'"),
    ({"rope_type": "linear", "factor": 2.0, "speed": 1}, "'speed'"),
    ({"rope_type": "llama3", "factor": 2.0}, "'low_freq_factor'"),
    ({"rope_type": "longrope"}, "no rope_type 'longrope'; there are 'default', 'linear', 'llama3', 'yarn'"),
    ({"factor": 2.0}, "no rope_type None; there are"),
])  # fmt: skip
def test_scalings_that_cannot_be(scaling: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"^rotary_tables: .*{words}"):
        rotary_tables(4, 4, scaling=scaling)
    for dim in (5, 0):
        with pytest.raises(ValueError, match=r"rotary_tables: dim must be even, .* got"):
            rotary_tables(4, dim)


def test_the_older_key_of_a_scaling() -> None:
    given = {"type": "linear", "factor": 2.0}
    old, new = rotary_tables(9, 4, scaling=given), rotary_tables(9, 4, scaling={"rope_type": "linear", "factor": 2.0})
    assert t.equal(old[0], new[0])
    assert given == {"type": "linear", "factor": 2.0}  # it is left as it was


def test_llama3_between_its_two_frequencies() -> None:
    usual = t.tensor([2 * math.pi * turns / 64 for turns in (8, 4, 2.5, 1, 0.25)], dtype="float64")
    slow, size = ROPE_SCALINGS["llama3"](
        usual, 1e4, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    np.testing.assert_allclose((slow / usual).numpy(), [1, 1, 0.625, 0.25, 0.25], rtol=1e-12)
    assert size == 1


def test_yarn_slows_and_sharpens() -> None:
    usual = 10000.0 ** (-t.arange(32, dtype="float64") / 32)
    slow, size = ROPE_SCALINGS["yarn"](usual, 1e4, factor=4.0, original_max_position_embeddings=2048)
    ratio = (slow / usual).numpy()
    assert ratio[0] == 1
    assert ratio[-1] == 0.25
    assert (np.diff(ratio) <= 0).all()
    assert size == pytest.approx(0.1 * math.log(4) + 1)
    assert ROPE_SCALINGS["yarn"](usual, 1e4, 0.5, 2048)[1] == 1
    tables = rotary_tables(
        2, 64, scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    )
    assert [table[0, 0].item() for table in tables] == pytest.approx([size, 0])
    np.testing.assert_allclose((tables[0] ** 2 + tables[1] ** 2).numpy(), size**2, rtol=1e-6)


def test_halves_from_pairs_moves_rows() -> None:
    assert halves_from_pairs(t.arange(12), 2).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    with pytest.raises(ValueError, match="halves_from_pairs: 4 heads of even length do not fit in 12 rows"):
        halves_from_pairs(t.zeros(12, 2), 4)


# -- ALiBi -------------------------------------------------------------------------------------------------------------


def test_alibi_of_the_last_queries(device: str) -> None:
    whole = alibi_bias(3, 6)
    assert whole.shape == (3, 6, 6)
    assert t.equal(alibi_bias(3, 2, keys=6), whole[:, 4:])
    assert t.equal(whole, whole.mT)
    assert alibi_bias(2, 3, dtype="float64").dtype == "float64"
    for heads in (0, -1):
        with pytest.raises(ValueError, match=f"alibi_slopes: expected at least 1 head, got {heads}"):
            alibi_bias(heads, 3)


# -- appendix ----------------------------------------------------------------------------------------------------------


def test_from_pretrained_keeps_the_table(device: str) -> None:
    table = t.randn(4, 3, dtype="float64")
    layer = Embedding.from_pretrained(table, padding_idx=1, max_norm=100.0)
    assert layer.weight.data is table.data
    assert (layer.weight.requires_grad, layer.padding_idx, layer.max_norm) == (False, 1, 100.0)
    assert layer.weight[1].abs().sum().item() > 0
    assert not layer(t.tensor([1])).requires_grad
    for wrong in (t.zeros(3), t.zeros(3, 2, dtype="int64"), [[1.0]]):
        with pytest.raises(ValueError, match=r"Embedding.from_pretrained: expected a tensor of floats \(rows"):
            Embedding.from_pretrained(wrong)
    with pytest.raises(ValueError, match=r"EmbeddingBag.from_pretrained: "):
        EmbeddingBag.from_pretrained(t.zeros(3))
    with pytest.raises(ValueError, match=r"Embedding.from_pretrained: padding_idx must be one of the 4 rows, got 4"):
        Embedding.from_pretrained(table, padding_idx=4)
    assert repr(Embedding.from_pretrained(table, padding_idx=-1)) == "Embedding(4, 3, padding_idx=3)"
    assert Embedding.from_pretrained(t.zeros(0, 3)).weight.shape == (0, 3)


def test_bags_need_offsets_that_are_integers(device: str) -> None:
    for offsets in (t.tensor([0.0, 1.5]), [0, 1], None):
        with pytest.raises(ValueError, match=r"embedding_bag: ids \(2,\) need offsets \(bags,\) of integers"):
            embedding_bag(t.tensor([0, 1]), t.ones(2, 2), offsets)


def test_bags_of_nothing(device: str) -> None:
    weight, nothing = t.randn(3, 2, requires_grad=True), t.zeros(0, dtype="int64")
    for mode in ("sum", "mean", "max"):
        out = embedding_bag(nothing, weight, t.tensor([0, 0]), mode=mode)
        assert out.tolist() == [[0, 0], [0, 0]]
        out.sum().backward()  # zeros, and no error
        padded = embedding_bag(t.tensor([[2, 2], [2, 0]]), weight, mode=mode, padding_idx=2)
        assert padded[0].tolist() == [0, 0]
        assert padded[1].tolist() == weight[0].tolist()
        assert embedding_bag(t.zeros(2, 0, dtype="int64"), weight, mode=mode).tolist() == [[0, 0], [0, 0]]


def test_the_largest_of_a_short_bag_may_be_negative(device: str) -> None:
    weight = t.tensor([[-1.0], [-2.0], [-3.0]], requires_grad=True)
    out = embedding_bag(t.tensor([2, 1, 0, 1]), weight, t.tensor([0, 1]), mode="max")
    assert out.tolist() == [[-3], [-1]]
    out.sum().backward()
    assert weight.grad.tolist() == [[1], [0], [1]]


def test_bags_scale_their_gradients(device: str) -> None:
    weight = t.zeros(3, 1, requires_grad=True)
    embedding_bag(t.tensor([[0, 0], [0, 1]]), weight, mode="sum", scale_grad_by_freq=True).sum().backward()
    assert weight.grad.tolist() == [[1], [1], [0]]


def test_bag_layers_hand_on_what_they_were_given(device: str) -> None:
    layer = EmbeddingBag(3, 2, max_norm=1.0, norm_type=1.0, mode="sum", include_last_offset=True, padding_idx=-1)
    assert layer.weight[2].tolist() == [0, 0]
    with no_grad():
        layer.weight.copy_(t.tensor([[2.0, 2.0], [0.25, 0.0], [9.0, 9.0]]))
    out = layer(t.tensor([0, 1, 2]), t.tensor([0, 2, 3]), t.tensor([2.0, 4.0, 1.0]))
    np.testing.assert_allclose(out.detach().numpy(), [[2, 1], [0, 0]], rtol=1e-6)
    with pytest.raises(ValueError, match="EmbeddingBag: mode must be one of"):
        EmbeddingBag(3, 2, mode="min")


def test_a_look_up_is_one_operation(device: str) -> None:
    seen, layer = [], Embedding(4, 2)
    with observe(lambda op, *_: seen.append(op.name) or _[-1]()):  # type: ignore[func-returns-value]
        layer(t.tensor([1, 2, 1])).backward(t.ones(3, 2))
    assert seen == ["embedding_lookup", "embedding_weight_gradient"]
