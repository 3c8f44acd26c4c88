"""Module 18 where its own tests do not reach: masks in training, every kind of network, exact files, and errors."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Tensor, cat, float16, float64, ones, randn, tensor, zeros
from tinytorch.m02_tensor_appendix import flatten, randint
from tinytorch.m03_activations import ReLU, relu, softmax
from tinytorch.m04_layers import Dropout, Flatten, Linear, Module, Parameter, Sequential, linear, overwrite
from tinytorch.m04_layers_appendix import save
from tinytorch.m05_losses import CrossEntropyLoss, cross_entropy
from tinytorch.m06_autograd import no_grad
from tinytorch.m07_optimizers import SGD, Adam
from tinytorch.m08_training import Callback, GradScaler, Trainer
from tinytorch.m09_spatial import BatchNorm2d, Conv2d, MaxPool2d, SimpleCNN, count_flops, count_parameters
from tinytorch.m09_spatial_appendix import BatchNorm1d, Conv1d, GroupNorm, LeNet5, PReLU, ResNet
from tinytorch.m12_embeddings import Embedding
from tinytorch.m14_transformers import GPT, GPTConfig
from tinytorch.m18_compression import (
    DistillationLoss,
    GradualPruning,
    cubic_sparsity,
    custom_from_mask,
    decode,
    distillation_loss,
    encode,
    factorized,
    free_channels,
    k_means,
    l1_unstructured,
    load_compressed,
    made_plain,
    nearest,
    pack_bits,
    prune_channels,
    rank_of_energy,
    remove,
    save_compressed,
    share_weights,
    unpack_bits,
    weights_of,
)
from tinytorch.m18_compression_appendix import nm_mask


def names_of_free(network: Module, example: Tensor) -> list[str]:
    names = {m: name for name, m in network.named_modules()}
    return [names[m] for m in free_channels(network, example)]


# -- masks -------------------------------------------------------------------------------------------------------------


def test_an_optimizer_made_before_goes_on_and_what_is_masked_rests() -> None:
    manual_seed(0)
    net = Sequential(Linear(6, 8), relu, Linear(8, 3))
    optimizer = SGD(net.parameters(), lr=0.5)
    l1_unstructured(net[0], "weight", 0.5)
    before, mask = net[0].weight_orig.tolist(), net[0].weight_mask
    assert int(mask.sum()) == 24
    cross_entropy(net(randn(16, 6)), randint(3, (16,))).backward()
    optimizer.step()
    after = net[0].weight_orig
    assert (after * (1 - mask)).tolist() == (tensor(before) * (1 - mask)).tolist()
    assert ((after != tensor(before)) & (mask > 0)).sum().item() > 12
    assert ((net[0].weight != 0) & (mask == 0)).sum().item() == 0


def test_a_second_mask_comes_on_top_of_the_first() -> None:
    layer = custom_from_mask(Linear(4, 1), "weight", tensor([[0.0, 1.0, 1.0, 1.0]]))
    custom_from_mask(layer, "weight", tensor([[1.0, 0.0, 1.0, 1.0]]))
    assert layer.weight_mask.tolist() == [[0, 0, 1, 1]]
    l1_unstructured(layer, "weight", 0.5, importance_scores=tensor([[-9.0, 9.0, 2.0, 1.0]]))
    assert layer.weight_mask.tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize(("amount", "masked"), [(0.5, 2), (0.3, 1), (0.1, 0), (0.9, 3), (1.0, 3), (1, 1)])
def test_shares_are_rounded_to_the_nearest_number(amount: float, masked: int) -> None:
    assert (l1_unstructured(Linear(3, 1), "weight", amount).weight == 0).sum().item() == masked


def test_weight_and_bias_are_masked_apart() -> None:
    layer = Linear(4, 4)
    l1_unstructured(l1_unstructured(layer, "weight", 4), "bias", 1)
    assert sorted(layer.state_dict()) == ["bias_mask", "bias_orig", "weight_mask", "weight_orig"]
    remove(layer, "weight")
    assert sorted(layer.state_dict()) == ["bias_mask", "bias_orig", "weight"]
    assert ((layer.bias == 0).sum().item(), (layer.weight == 0).sum().item()) == (1, 4)
    assert type(remove(layer, "bias")) is Linear


def test_a_masked_layer_is_copied_moved_and_computes_in_half_precision() -> None:
    manual_seed(3)
    net = Sequential(l1_unstructured(Linear(8, 8), "weight", 0.5), relu, Linear(8, 2))
    twin, x = copy.deepcopy(net), randn(4, 8)
    overwrite(net[0].weight_mask, 0)
    assert twin[0].weight.abs().sum().item() > 0
    assert twin.to(float64)(x.to(float64)).dtype == float64
    trainer = Trainer(twin.to("float32"), SGD(twin.parameters(), lr=0.1), cross_entropy, precision="float16",
                      scaler=GradScaler(init_scale=8.0))  # fmt: skip
    row = trainer.fit([(x, randint(2, (4,)))], 1)[0]
    assert math.isfinite(row["loss"])
    assert twin[0].weight_orig.dtype != float16


def test_a_frozen_weight_stays_frozen() -> None:
    layer = Linear(4, 4).freeze()
    share_weights(layer, bits=2)
    assert not layer.weight_codebook.requires_grad
    assert not remove(layer, "weight").weight.requires_grad
    assert remove(share_weights(Linear(4, 4)), "weight").weight.requires_grad


@pytest.mark.parametrize(
    ("amount", "message"),
    [(-0.1, "between 0 and 1"), (1.5, "got 1.5"), (17, "a whole number up to 16, got 17"), (math.nan, "got nan")],
)
def test_amounts_that_make_no_sense_are_named(amount: float, message: str) -> None:
    layer = Linear(4, 4)
    with pytest.raises(ValueError, match=message):
        l1_unstructured(layer, "weight", amount)
    assert isinstance(layer.weight, Parameter)


def test_what_cannot_be_masked_is_named() -> None:
    layer = share_weights(Linear(4, 4))
    with pytest.raises(ValueError, match="'weight' of Linear"):
        l1_unstructured(layer, "weight", 1)
    with pytest.raises(ValueError, match="shared already"):
        share_weights(layer)
    with pytest.raises(ValueError, match="is no Parameter, but a NoneType"):
        custom_from_mask(Linear(4, 4, bias=False), "bias", ones(4))
    with pytest.raises(ValueError, match=r"shape \(4,\), but 'weight' has \(4, 4\)"):
        custom_from_mask(Linear(4, 4), "weight", ones(4))
    with pytest.raises(ValueError, match="neither masked nor shared"):
        remove(Linear(4, 4), "weight")
    with pytest.raises(ValueError, match=r"'bias' of Linear.* is None"):
        share_weights(Linear(4, 4, bias=False), "bias")
    with pytest.raises(ValueError, match="there is no value"):
        share_weights(l1_unstructured(Linear(4, 4), "weight", 1.0))
    with pytest.raises(ValueError, match="bits must be between 1 and 8, got 9"):
        share_weights(Linear(4, 4), bits=9)


# -- gradual pruning ---------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_formula() -> None:
    steps = range(0, 130, 7)
    expected = [0.9 + (0.2 - 0.9) * (1 - min(max((t - 20) / 80, 0), 1)) ** 3 for t in steps]
    assert_close([cubic_sparsity(t, 20, 100, 0.9, 0.2) for t in steps], expected)


def test_masks_change_where_they_should_and_end_at_the_last_step() -> None:
    net = Sequential(Conv2d(4, 8, 3), relu, Flatten(), Linear(32, 20))
    pruning = GradualPruning(weights_of(net), 0.9, begin=13, end=30, every=10)
    changed, before = [], None
    for step in range(1, 40):
        pruning.on_step_end(SimpleNamespace(step=step))  # type: ignore[arg-type]
        now = [int((layer.weight == 0).sum()) for layer in (net[0], net[3])]
        if now != before:
            changed.append(step)
        before = now
    assert changed == [1, 23, 30]  # the first look, a change after ten steps, and the end
    assert before == [round(0.9 * 288), round(0.9 * 640)]


class Abandon(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == 7:
            trainer.save(self.path)
            raise InterruptedError


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    def new(*callbacks: Callback) -> tuple[Trainer, list]:
        manual_seed(5)
        net = Sequential(Linear(5, 16), relu, Dropout(0.1), Linear(16, 3))
        batches = [(randn(8, 5), randint(3, (8,))) for _ in range(5)]
        pruning = GradualPruning(weights_of(net), 0.8, begin=2, end=12, every=3)
        return Trainer(net, Adam(net.parameters(), lr=0.02), cross_entropy, callbacks=[pruning, *callbacks]), batches

    whole, batches = new()
    whole.fit(batches, 3)
    broken, batches = new(Abandon(tmp_path / "c.safetensors"))
    with pytest.raises(InterruptedError):
        broken.fit(batches, 3)
    again, batches = new()
    manual_seed(99)
    again.fit(batches, 3, resume=tmp_path / "c.safetensors")
    states = [{name: x.tolist() for name, x in trainer.model.state_dict().items()} for trainer in (whole, again)]
    assert states[0] == states[1]
    assert int((whole.model[0].weight == 0).sum()) == 64


def test_a_schedule_that_makes_no_sense_is_named() -> None:
    for options in (
        {"begin": 5, "end": 5},
        {"begin": 0, "end": 5, "every": 0},
        {"begin": 0, "end": 5, "initial": 0.95},
    ):
        with pytest.raises(ValueError, match="GradualPruning: expected 0 <= initial <= final"):
            GradualPruning([], 0.9, **options)  # type: ignore[arg-type]


# -- channels ----------------------------------------------------------------------------------------------------------


def silenced(network: Module, example: Tensor, share: float = 0.5) -> tuple[Module, dict[str, int]]:
    """A copy in which some channels of each layer that can lose them are always 0, and how many these are."""
    quiet, gone = copy.deepcopy(network).eval(), {}
    names = {m: name for name, m in quiet.named_modules()}
    rng = np.random.default_rng(0)
    for layer, readers in free_channels(quiet, example).items():
        count = layer.weight.shape[0]
        rows = rng.permutation(count)[: int(share * count)]
        gone[names[layer]] = len(rows)
        for p in layer.parameters():
            p.data[rows] = 0.0
        for norm in readers:
            if norm.__class__ in (BatchNorm1d, BatchNorm2d):
                norm.running_mean.data[rows] = 0.0
                if norm.bias is not None:
                    norm.bias.data[rows] = 0.0
    return quiet, gone


def disturb(network: Module) -> Module:
    """Give norms statistics and biases of their own: zeros and ones would hide that the wrong ones are kept."""
    for m in network.modules():
        if isinstance(m, (BatchNorm1d, BatchNorm2d)):
            for x in (m.weight, m.bias, m.running_mean, m.running_var):
                if x is not None:
                    overwrite(x, (randn(*x.shape) * 0.3).abs().data + 0.1)
    return network


class Branches(Module):
    """One convolution with two readers, and a linear layer that reads two convolutions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = Conv2d(3, 8, 3, padding=1, bias=False), BatchNorm2d(8)
        self.left, self.right = Conv2d(8, 6, 1), Conv2d(8, 10, 3, padding=1)
        self.head = Linear(16 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm(self.stem(x)))
        both = cat([relu(self.left(x)), relu(self.right(x))], dim=1)
        return self.head(flatten(MaxPool2d(4)(both), 1))


NETWORKS = {
    "SimpleCNN": (lambda: SimpleCNN(3, 10, 8, widths=(8, 12), hidden=16), (3, 8, 8), ["0", "3", "7"]),
    "with norms": (lambda: SimpleCNN(3, 10, 8, (8, 12), 16, batch_norm=True), (3, 8, 8), ["0", "4", "9"]),
    "LeNet5": (LeNet5, (1, 28, 28), ["0", "3", "7", "9"]),
    "ResNet": (
        lambda: ResNet(8, width=8), (3, 8, 8), ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"],
    ),
    "MLP": (lambda: Sequential(Flatten(), Linear(48, 20), ReLU(), BatchNorm1d(20), Dropout(), Linear(20, 7)),
            (3, 4, 4), ["1"]),
    "branches": (Branches, (3, 8, 8), ["stem", "left", "right"]),
    "signals": (lambda: Sequential(Conv1d(2, 6, 3), BatchNorm1d(6), relu, Conv1d(6, 4, 3, stride=2), Flatten(),
                                   Linear(12, 2)), (2, 9), ["0", "3"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_without_its_silent_channels_a_network_says_the_same(kind: str) -> None:
    manual_seed(4)
    make, shape, free = NETWORKS[kind]
    network, x = disturb(make()).eval(), randn(3, *shape)
    assert names_of_free(network, x) == free
    quiet, gone = silenced(network, x)
    smaller = prune_channels(quiet, x, gone)
    assert (quiet(x) - network(x)).abs().amax().item() > 1e-3
    assert_close(smaller(x), quiet(x), rtol=1e-4, atol=1e-5)
    assert [layer.weight.shape[0] for name, layer in smaller.named_modules() if name in gone] == [
        layer.weight.shape[0] - gone[name] for name, layer in quiet.named_modules() if name in gone
    ]
    assert count_parameters(smaller) < count_parameters(network)
    for name, layer in smaller.named_modules():  # what a layer says of itself is what it has
        if type(layer) in (Linear, Conv1d, Conv2d):
            sizes = (layer.out_features, layer.in_features) if type(layer) is Linear else (
                layer.out_channels, layer.in_channels)  # fmt: skip
            assert layer.weight.shape[:2] == sizes, name
    optimizer = SGD(smaller.parameters(), lr=0.1)
    cross_entropy(smaller.train()(x), zeros(3, dtype="int64")).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in smaller.parameters())
    optimizer.step()


def test_the_channels_that_matter_least_go() -> None:
    net, x = Sequential(Conv2d(1, 4, 1), BatchNorm2d(4), relu, Conv2d(4, 1, 1)), randn(1, 1, 3, 3)
    overwrite(net[0].weight, tensor([4.0, -2.0, 3.0, 1.0]).reshape(4, 1, 1, 1).data)
    overwrite(net[1].weight, tensor([0.1, -3.0, 0.2, 2.0]).data)
    assert prune_channels(net, x, 2)[0].weight.flatten().tolist() == [4, 3]
    assert prune_channels(net, x, 1, by="l2")[0].weight.flatten().tolist() == [4, -2, 3]
    scaled = prune_channels(net, x, 0.5, by="scale")
    assert scaled[0].weight.flatten().tolist() == [-2, 1]
    assert_close(scaled[1].weight, [-3, 2])
    assert net[0].weight.shape[0] == 4  # the network itself stays
    assert prune_channels(net, x, 1.0)[0].weight.flatten().tolist() == [4]  # one stays always
    with pytest.raises(ValueError, match="by must be 'l1', 'l2' or 'scale', got 'l3'"):
        prune_channels(net, x, 1, by="l3")


def test_two_norms_choose_differently() -> None:
    net = Sequential(Linear(2, 2, bias=False), relu, Linear(2, 1))
    overwrite(net[0].weight, tensor([[3.0, 0.0], [2.0, 2.0]]).data)
    x = randn(1, 2)
    assert prune_channels(net, x, 1, by="l1")[0].weight.tolist() == [[2, 2]]
    assert prune_channels(net, x, 1, by="l2")[0].weight.tolist() == [[3, 0]]


def test_scale_leaves_layers_without_a_norm_alone() -> None:
    net, x = SimpleCNN(3, 10, 8, widths=(8,), hidden=16, batch_norm=True), randn(1, 3, 8, 8)
    smaller = prune_channels(net, x, 0.5, by="scale")
    assert (smaller[0].out_channels, smaller[5].out_features) == (4, 16)


class Shifted(Module):
    """The sum of its input and a layer: that layer's features are not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = Linear(6, 6), Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x + self.inner(x))


class Folded(Module):
    """Rows of pictures become examples of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Linear(4, 4), Linear(4, 4), Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = relu(self.first(x)).reshape(-1, 4)
        return self.third(relu(self.second(rows)))


class Tied(Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Linear(4, 4), Linear(4, 4), Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(relu(self.second(relu(self.first(x)))))


class Mixed(Module):
    """A layer whose features are mixed by a softmax before they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Linear(4, 4), Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(softmax(self.first(x), dim=1))


class Borrowed(Module):
    """A layer with a reader that is seen, and one that is not: its product with an embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.table = Linear(4, 4), Linear(4, 2), Embedding(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.first(x))
        return self.second(x) + linear(x, self.table.weight)


class Looked(Module):
    """The sum of an embedding and a layer of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.outer = Embedding(5, 4), Linear(4, 4), Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.outer(x + self.inner(x))


class Shown(Module):
    """A layer whose features have a reader, and are a part of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Linear(4, 4), Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.first(x))
        return cat([x, self.second(x)], dim=1)


class Twofold(Module):
    """A layer with two readers, of which one gets rows as examples of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Linear(4, 4), Linear(4, 2), Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.first(x))
        return self.second(x) + self.third(x.reshape(-1, 4)).reshape(-1, 3, 2)


@pytest.mark.parametrize(
    ("network", "example"),
    [
        (Shifted(), randn(1, 6)),
        (Folded(), randn(2, 3, 4)),
        (Tied(), randn(1, 4)),
        (Mixed(), randn(1, 4)),
        (Shown(), randn(1, 4)),
        (Twofold(), randn(2, 3, 4)),
        (Borrowed(), randn(1, 4)),
        (Looked(), randint(5, (1, 3))),
        (Linear(3, 2), randn(1, 3)),
        (Sequential(Linear(4, 4), PReLU(4), Linear(4, 2)), randn(1, 4)),
        (Sequential(Conv2d(2, 4, 1), GroupNorm(2, 4), Conv2d(4, 1, 1)), randn(1, 2, 3, 3)),
        (Sequential(Conv2d(2, 4, 1), Conv2d(4, 4, 3, groups=4), Conv2d(4, 1, 1)), randn(1, 2, 5, 5)),
    ],
    ids=["sum with the input", "rows become examples", "one weight", "softmax", "shown", "twofold",
         "a borrowed weight", "sum with an embedding", "an output", "PReLU", "group norm", "groups"],
)  # fmt: skip
def test_channels_that_are_not_free_stay(network: Module, example: Tensor) -> None:
    assert names_of_free(network, example) == []
    assert count_parameters(prune_channels(network, example, 0.5)) == count_parameters(network)
    with pytest.raises(ValueError, match="no channel is free to go in first; there are in no layer"):
        prune_channels(network, example, {"first": 0.5})


def test_a_gpt_can_lose_hidden_features_of_its_blocks() -> None:
    manual_seed(0)
    model, ids = GPT(GPTConfig(13, 6, 2, 2, 8)), randint(13, (3, 6))
    assert names_of_free(model, ids) == ["blocks.0.mlp.up", "blocks.1.mlp.up"]
    smaller = prune_channels(model, ids, 0.25)
    assert (smaller.blocks[0].mlp.up.weight.shape, smaller.blocks[0].mlp.down.weight.shape) == ((24, 8), (8, 24))
    assert smaller(ids).shape == (3, 6, 13)


def test_following_leaves_the_network_as_it_was() -> None:
    net, x = disturb(SimpleCNN(3, 10, 8, widths=(8,), hidden=16, batch_norm=True)), randn(2, 3, 8, 8)
    before = {name: value.tolist() for name, value in net.state_dict().items()}
    free_channels(net, x)
    assert {name: value.tolist() for name, value in net.state_dict().items()} == before
    assert net.training
    assert not any(m._hooks for m in net.modules())


def test_masked_networks_are_made_plain_first() -> None:
    net, x = SimpleCNN(3, 10, 8, widths=(8,), hidden=16), randn(2, 3, 8, 8)
    l1_unstructured(net[0], "weight", 0.5)
    with pytest.raises(ValueError, match="masked or shared"):
        prune_channels(net, x, 0.5)
    assert prune_channels(made_plain(net), x, 0.5)[0].out_channels == 4


def test_flops_file_and_parameters_fall_together(tmp_path: Path) -> None:
    manual_seed(0)
    net, x = SimpleCNN(3, 10, 16, widths=(16, 32), hidden=32, batch_norm=True), randn(2, 3, 16, 16)
    figures = []
    for amount in (0, 0.25, 0.5, 0.75):
        smaller = prune_channels(net, x, amount)
        size = save_compressed(smaller, tmp_path / "net.safetensors")
        figures.append((sum(count_flops(smaller, x).values()), size, count_parameters(smaller)))
    for column in zip(*figures, strict=True):
        assert list(column) == sorted(column, reverse=True)
        assert column[2] < 0.4 * column[0]
    assert figures[0][2] == count_parameters(net)


# -- low rank ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bias", [True, False])
def test_thin_layers_of_full_rank_are_the_layer(dtype: str, bias: bool) -> None:
    manual_seed(6)
    conv = Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=bias, padding_mode="reflect",
                  dtype=dtype)  # fmt: skip
    for layer, x in (
        (conv, randn(2, 4, 7, 8, dtype=dtype)),
        (Linear(7, 5, bias, dtype=dtype), randn(3, 7, dtype=dtype)),
    ):
        both = factorized(layer, energy=1.0)
        assert_close(both(x), layer(x), rtol=1e-4, atol=1e-5)
        assert (both(x).dtype, both[1].bias is not None, both[0].bias) == (dtype, bias, None)


def test_the_nearest_matrix_of_a_rank_is_found() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(12, 9))
    layer = Linear(9, 12, dtype="float64")
    overwrite(layer.weight, weight)
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    both = factorized(layer, rank=4)
    assert_close(both[1].weight @ both[0].weight, (left[:, :4] * values[:4]) @ right[:4], rtol=1e-9)
    share = (values[:4] ** 2).sum() / (values**2).sum()
    assert factorized(layer, energy=share - 1e-9)[0].out_features == 4
    assert factorized(layer, energy=share + 1e-9)[0].out_features == 5


def test_what_cannot_be_factorized_is_named() -> None:
    with pytest.raises(ValueError, match="rank must be between 1 and 3, got 4"):
        factorized(Linear(3, 5), rank=4)
    with pytest.raises(ValueError, match=r"energy is a share above 0 and at most 1, got 1\.5"):
        factorized(Linear(3, 5), energy=1.5)
    for layer, options in ((Linear(3, 5), {}), (Linear(3, 5), {"rank": 1, "energy": 0.5}),
                           (Conv2d(4, 4, 1, groups=2), {"rank": 1}), (Conv1d(4, 4, 1), {"rank": 1})):  # fmt: skip
        with pytest.raises(ValueError, match="expected a Linear or a Conv2d without groups, and rank or energy"):
            factorized(layer, **options)  # type: ignore[arg-type]
    assert rank_of_energy([0.0, 0.0], 0.5) == 1


# -- shared values -----------------------------------------------------------------------------------------------------


def lloyd(values: np.ndarray, count: int, rounds: int = 50) -> np.ndarray:
    """k-means as it is written in books."""
    centres = np.linspace(values.min(), values.max(), count)
    for _ in range(rounds):
        nearest_one = np.abs(values[:, None] - centres).argmin(1)
        centres = np.array([values[nearest_one == k].mean() for k in range(len(centres)) if (nearest_one == k).any()])
    return centres


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_k_means_is_that_of_the_books(count: int) -> None:
    values = np.random.default_rng(count).normal(size=400)
    codebook = k_means(tensor(values), count)
    assert_close(codebook, lloyd(values, count), rtol=1e-9)
    expected = np.abs(values[:, None] - codebook.numpy()).argmin(1)
    assert nearest(tensor(values), codebook).tolist() == expected.tolist()


def test_fewer_different_weights_than_values() -> None:
    assert k_means(tensor([2.0, 2.0, 2.0]), 4).tolist() == [2]
    layer = Linear(8, 8, bias=False)
    overwrite(layer.weight, np.sign(layer.weight.data))
    assert share_weights(layer, bits=4).weight.tolist() == np.sign(layer.weight.numpy()).tolist()


def test_shared_weights_learn_together() -> None:
    manual_seed(0)
    layer, x, goal = Linear(16, 16, bias=False), randn(64, 16), Linear(16, 16, bias=False)
    share_weights(layer, bits=3)
    optimizer = Adam(layer.parameters(), lr=0.01)
    with no_grad():
        wanted = goal(x)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = ((layer(x) - wanted) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert len(np.unique(layer.weight.numpy())) == 8


# -- distillation ------------------------------------------------------------------------------------------------------


def test_the_loss_is_hintons() -> None:
    rng = np.random.default_rng(1)
    scores, known, labels = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), rng.integers(0, 4, 6)

    def soft(z: np.ndarray, temperature: float) -> np.ndarray:
        e = np.exp(z / temperature)
        return e / e.sum(1, keepdims=True)

    p, q = soft(known, 5.0), soft(scores, 5.0)
    hard = -np.log(soft(scores, 1.0)[np.arange(6), labels]).mean()
    expected = 0.3 * 25 * (p * np.log(p / q)).sum(1).mean() + 0.7 * hard
    assert_close(distillation_loss(tensor(scores), tensor(known), tensor(labels), 5.0, 0.3), expected, rtol=1e-9)


def test_the_student_gets_the_gradient_of_the_formula() -> None:
    scores = tensor([[1.0, -2.0, 0.5]], dtype=float64, requires_grad=True)
    known = tensor([[0.2, 0.3, -1.0]], dtype=float64)
    distillation_loss(scores, known, tensor([0]), 3.0, 1.0).backward()
    expected = 3.0 * (softmax(scores / 3, 1) - softmax(known / 3, 1))
    assert_close(scores.grad, expected, rtol=1e-9)


class Seen(Module):
    """Remembers whether it was being trained, and whether gradients were recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.modes = Linear(3, 2), []

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self.modes.append((self.training, out.requires_grad, x.tolist()))
        return out


def test_copies_of_a_student_are_left_alone() -> None:
    student, teacher, x = Sequential(Linear(3, 2)), Seen(), randn(4, 3)
    loss = DistillationLoss(student, teacher)
    out, twin = student(x), copy.deepcopy(student)
    twin(x + 1)
    twin.eval()(x + 2)
    loss(out, randint(2, (4,)))
    assert teacher.modes[0][2] == x.tolist()


def test_the_teacher_gets_the_students_inputs_and_only_answers() -> None:
    student, teacher, x = Sequential(Linear(3, 2)), Seen(), randn(4, 3)
    loss = DistillationLoss(student, teacher, loss=CrossEntropyLoss(label_smoothing=0.1))
    trainer = Trainer(student, SGD(student.parameters(), lr=0.1), loss, accumulate=2)
    trainer.fit([(x, randint(2, (4,))), (x + 1, randint(2, (4,)))], 1, validation=[(x, randint(2, (4,)))])
    assert teacher.modes == [(False, False, x.tolist()), (False, False, (x + 1).tolist())]  # not for validation
    assert teacher.training
    student.eval()(x)
    student.train()
    with pytest.raises(RuntimeError, match="call the student right before its loss"):
        loss(randn(4, 2), randint(2, (4,)))
    for options in ({"temperature": 0}, {"alpha": 1.5}):
        with pytest.raises(ValueError, match="temperature > 0 and 0 <= alpha <= 1"):
            DistillationLoss(student, teacher, **options)  # type: ignore[arg-type]


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_are_packed_without_gaps(bits: int) -> None:
    numbers = np.random.default_rng(bits).integers(0, 2**bits, 101)
    packed = pack_bits(numbers, bits)
    assert (packed.dtype, len(packed)) == (np.uint8, math.ceil(101 * bits / 8))
    assert unpack_bits(packed, bits, 101).tolist() == numbers.tolist()


def test_bits_lie_as_numpy_packs_them() -> None:
    flags = np.random.default_rng(0).integers(0, 2, 50)
    assert pack_bits(flags, 1).tolist() == np.packbits(flags, bitorder="little").tolist()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "bool"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("different", [1, 3, 256, 257, 10**6])
def test_every_tensor_comes_back(dtype: str, share: float, different: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=different)[rng.integers(0, different, (31, 37))]
    x = tensor(np.where(rng.random((31, 37)) < share, 0, values * 10).astype(dtype))
    parts, how = encode(x)
    again = decode(parts, json.loads(json.dumps(how)))
    assert (again.dtype, again.tolist()) == (x.numpy().dtype, x.tolist())
    size = sum(part.nbytes for part in parts.values())
    assert size <= x.nbytes
    if dtype == "float32" and share == 0.99:
        assert size < 0.05 * x.nbytes
    if dtype == "float32" and different == 256:
        assert size < 0.5 * x.nbytes
    if dtype == "float32" and different == 3:
        assert size < 0.1 * x.nbytes + 1000 * (1 - share) / 4


def test_a_network_is_stored_and_read(tmp_path: Path) -> None:
    manual_seed(7)
    net, x = disturb(SimpleCNN(3, 10, 8, widths=(8,), hidden=16, batch_norm=True)).eval(), randn(2, 3, 8, 8)
    for layer, name in weights_of(net):
        share_weights(l1_unstructured(layer, name, 0.7), name, bits=4)
    expected = net(x).tolist()
    size = save_compressed(net, tmp_path / "small.safetensors")
    save(made_plain(net).state_dict(), tmp_path / "plain.safetensors")
    assert size == (tmp_path / "small.safetensors").stat().st_size
    assert size < (tmp_path / "plain.safetensors").stat().st_size / 3
    fresh = SimpleCNN(3, 10, 8, widths=(8,), hidden=16, batch_norm=True).eval()
    fresh.load_state_dict(load_compressed(tmp_path / "small.safetensors"))
    assert fresh(x).tolist() == expected
    with pytest.raises(ValueError, match=r"plain\.safetensors: not a file that save_compressed wrote"):
        load_compressed(tmp_path / "plain.safetensors")
    content = (tmp_path / "small.safetensors").read_bytes()
    (tmp_path / "small.safetensors").write_bytes(content[:-100] + b"x" * 100)
    with pytest.raises(ValueError, match=r"small\.safetensors: its checksum is wrong"):
        load_compressed(tmp_path / "small.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, path = Linear(8, 8), tmp_path / "net.safetensors"
    save_compressed(net, path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        save_compressed(Linear(8, 8), path)
    assert path.read_bytes() == before


# -- other array libraries ---------------------------------------------------------------------------------------------


def test_compression_on_every_device(device: str, tmp_path: Path) -> None:
    manual_seed(8)
    make = lambda: SimpleCNN(1, 3, 4, widths=(4,), hidden=8, batch_norm=True)
    teacher, x, labels = make(), randn(4, 1, 4, 4), randint(3, (4,))
    smaller = prune_channels(teacher, x, 0.5)
    loss = DistillationLoss(smaller, teacher)
    trainer = Trainer(smaller, SGD(smaller.parameters(), lr=0.1), loss,
                      callbacks=[GradualPruning(weights_of(smaller), 0.5, 0, 1)])  # fmt: skip
    trainer.fit([(x, labels)] * 2, 1)
    share_weights(smaller[5], bits=2)
    smaller[7] = factorized(made_plain(smaller[7]), rank=2)
    expected = smaller.eval()(x)
    assert expected.device == device
    save_compressed(smaller, tmp_path / "net.safetensors")
    again = made_plain(smaller)
    for p in again.parameters():
        overwrite(p, 0)
    again.load_state_dict(load_compressed(tmp_path / "net.safetensors"))
    assert_close(again(x), expected)
    assert nm_mask(randn(2, 8)).sum().item() == 8
