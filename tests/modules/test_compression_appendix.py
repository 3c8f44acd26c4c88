"""Module 18's appendix: the rest of pruning, n of m, networks of thin layers, files of changed shapes, the report."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest

from tinytorch import compression, nn
from tinytorch.m01_setup import assert_close, manual_seed, printed
from tinytorch.m02_tensor import randn, tensor
from tinytorch.m03_activations import relu
from tinytorch.m04_layers import Flatten, Linear, Sequential, overwrite
from tinytorch.m09_spatial import Conv2d, SimpleCNN, count_flops, count_parameters
from tinytorch.m09_spatial_appendix import Conv1d, ResNet
from tinytorch.m18_compression import (
    factorized,
    l1_unstructured,
    prune_channels,
    save_compressed,
    share_weights,
    weights_of,
)
from tinytorch.m18_compression_appendix import (
    chances,
    compression_report,
    factorize,
    global_unstructured,
    identity,
    is_pruned,
    ln_structured,
    magnitudes,
    nm_mask,
    print_report,
    prune_nm,
    random_structured,
    random_unstructured,
    restore,
)

# -- the rest of torch.nn.utils.prune ----------------------------------------------------------------------------------


def test_the_faces_show_what_they_promise() -> None:
    assert nn.utils.prune.l1_unstructured is l1_unstructured
    assert (nn.utils.prune.L1Unstructured, nn.utils.prune.RandomUnstructured) == (magnitudes, chances)
    assert compression.save is save_compressed
    assert "prune" in dir(nn.utils)


def test_identity_takes_nothing_out_and_is_seen() -> None:
    net = Sequential(Linear(4, 4), relu, Linear(4, 2))
    assert not is_pruned(net)
    identity(net[2], "weight")
    assert is_pruned(net)
    assert not is_pruned(net[0])
    assert net[2].weight.tolist() == net[2].weight_orig.tolist()


def test_random_masks_take_another_amount_of_the_rest() -> None:
    manual_seed(0)
    layer = random_unstructured(Linear(20, 20), "weight", 0.5)
    first = layer.weight_mask.tolist()
    assert np.sum(first) == 200
    assert 70 < np.sum(np.array(first)[:, :10]) < 130  # from everywhere
    random_unstructured(layer, "weight", 50)
    assert layer.weight_mask.sum().item() == 150
    assert np.all(layer.weight_mask.numpy() <= np.array(first))


def test_slices_of_the_smallest_norm_go() -> None:
    layer = Linear(3, 3)
    overwrite(layer.weight, tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 4.0], [-2.0, 2.0, 2.0]]).data)
    ln_structured(layer, "weight", 1, n=1, dim=0)  # 6, 4, 6
    assert layer.weight_mask.tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 1]]
    ln_structured(layer, "weight", 1, n=math.inf, dim=-1)  # 2, 2, 3 of what is left; of equal ones, the first
    assert layer.weight_mask.tolist() == [[0, 1, 1], [0, 0, 0], [0, 1, 1]]
    assert random_structured(layer, "weight", 1, dim=0).weight_mask.sum().item() == 2
    assert ln_structured(Linear(4, 4), "weight", 0.5, 2, 0, importance_scores=tensor([[1.0] * 4, [3.0] * 4, [2.0] * 4,
                         [0.0] * 4])).weight_mask[:, 0].tolist() == [0, 1, 1, 0]  # fmt: skip
    twice = Linear(3, 3)
    overwrite(twice.weight, tensor([[1.0] * 3, [2.0] * 3, [3.0] * 3]).data)
    for kept in (2, 1):
        ln_structured(twice, "weight", 1, n=2, dim=0)
        assert (twice.weight_mask[:, 0] > 0).sum().item() == kept
    for dim in (2, -3):
        with pytest.raises(ValueError, match=rf"'weight' has shape \(3, 3\), and no slices along axis {dim}"):
            ln_structured(layer, "weight", 1, n=1, dim=dim)
    with pytest.raises(ValueError, match=r"'bias' has shape \(3,\)"):
        random_structured(layer, "bias", 1, dim=0)


def test_global_masks_take_where_there_is_least() -> None:
    net = Sequential(Linear(4, 4, bias=False), Linear(4, 2, bias=False))
    overwrite(net[0].weight, 10 + np.arange(16.0).reshape(4, 4))
    overwrite(net[1].weight, -np.arange(1.0, 9.0).reshape(2, 4))
    global_unstructured(weights_of(net), magnitudes, amount=10)
    assert [int((layer.weight == 0).sum()) for layer in net] == [2, 8]
    global_unstructured(weights_of(net), magnitudes, amount=0.5)
    assert [int((layer.weight == 0).sum()) for layer in net] == [9, 8]
    scores = {(net[0], "weight"): -net[0].weight.detach()}
    global_unstructured(weights_of(net), lambda x: x, scores, amount=1)
    assert (net[0].weight[3, 3].item(), net[0].weight[3, 2].item()) == (0, 24)
    global_unstructured(weights_of(net), chances, amount=1.0)
    assert [int((layer.weight != 0).sum()) for layer in net] == [0, 0]


# -- n of m ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 8), (5, 8, 3, 3), (4, 12, 5)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 4), (1, 2)])
def test_the_n_largest_of_m_neighbours_stay(shape: tuple, n: int, m: int) -> None:
    manual_seed(1)
    weight = randn(*shape)
    mask = nm_mask(weight, n, m).numpy()
    values = np.abs(weight.numpy())
    groups = np.moveaxis(values, 1, -1).reshape(-1, m)
    kept = np.moveaxis(mask, 1, -1).reshape(-1, m)
    assert (kept.sum(1) == n).all()
    if n < m:
        assert (np.where(kept > 0, groups, np.inf).min(1) >= np.where(kept == 0, groups, -np.inf).max(1)).all()


def test_n_of_m_by_hand_and_what_does_not_fit() -> None:
    assert nm_mask(tensor([[1.0, -5.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0]])).tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    layer = prune_nm(Conv2d(8, 4, 3))
    assert layer.weight_mask.mean().item() == 0.5
    assert prune_nm(Conv1d(8, 4, 3), n=1).weight_mask.mean().item() == 0.25
    with pytest.raises(ValueError, match=r"a multiple of 4 inputs, got \(8, 6\)"):
        nm_mask(randn(8, 6))
    with pytest.raises(ValueError, match="n must be between 1 and m, got 5 of 4"):
        nm_mask(randn(8, 8), n=5)


# -- networks and files ------------------------------------------------------------------------------------------------


def low_rank(layer: Linear, rank: int) -> None:
    overwrite(layer.weight, (randn(layer.out_features, rank) @ randn(rank, layer.in_features)).data * 0.1)


def test_only_layers_that_get_smaller_are_factorized() -> None:
    manual_seed(2)
    net, x = Sequential(Linear(32, 32), relu, Linear(32, 4)), randn(5, 32)
    low_rank(net[0], 3)
    thin = factorize(net, 0.999)
    assert [type(layer) for layer in thin if layer is not relu] == [Sequential, Linear]
    assert thin[0][0].out_features == 3
    assert_close(thin(x), net(x), rtol=1e-4, atol=1e-5)
    assert count_parameters(net[0]) == 32 * 33  # the network itself stays
    assert isinstance(factorize(net, {"2": 0.5})[0], Linear)
    assert isinstance(factorize(net, {"0": 0.5})[0], Sequential)


def test_a_factorized_residual_network(tmp_path: Path) -> None:
    manual_seed(3)
    net, x = ResNet(8, width=8).eval(), randn(2, 3, 8, 8)
    thin = factorize(net, {"layer1.0.conv1": 0.6, "layer3.0.conv2": 0.6})
    assert len(thin.layer1[0].conv1) == len(thin.layer3[0].conv2) == 2
    assert sum(count_flops(thin, x).values()) < sum(count_flops(net, x).values())
    save_compressed(thin, tmp_path / "thin.safetensors")
    again = restore(ResNet(8, width=8), tmp_path / "thin.safetensors").eval()
    assert_close(again(x), thin(x))
    again.layer1[0].conv1.train()


@pytest.mark.parametrize("kind", ["SimpleCNN", "ResNet"])
def test_a_network_of_other_shapes_is_restored(kind: str, tmp_path: Path) -> None:
    manual_seed(4)
    make = {"SimpleCNN": lambda: SimpleCNN(3, 10, 8, widths=(8, 8), hidden=16, batch_norm=True),
            "ResNet": lambda: ResNet(8, width=8)}[kind]  # fmt: skip
    net, x = make(), randn(4, 3, 8, 8)
    net(x)  # statistics of its norms
    smaller = prune_channels(net.eval(), x, 0.4)
    for layer, name in weights_of(smaller):
        share_weights(l1_unstructured(layer, name, 0.2), name, bits=6)
    save_compressed(smaller, tmp_path / "net.safetensors")
    fresh = make()
    again = restore(fresh, tmp_path / "net.safetensors").eval()
    assert again(x).tolist() == smaller(x).tolist()
    assert count_parameters(fresh) == count_parameters(net)
    assert count_flops(again, x) == count_flops(smaller, x)
    assert sorted(repr(again).split()) == sorted(repr(smaller).split())
    (again.train()(x) ** 2).sum().backward()
    assert all(p.grad.shape == p.shape for p in again.parameters())


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    save_compressed(Sequential(Linear(4, 4), relu, Linear(4, 2)), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"net\.safetensors: made from another network: .*missing: 1\.weight"):
        restore(Sequential(Flatten(), Linear(4, 4)), tmp_path / "net.safetensors")


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_is_there(tmp_path: Path) -> None:
    manual_seed(5)
    net = Sequential(Flatten(), Linear(64, 64), relu, Linear(64, 8))
    sparse = Sequential(*net)
    masked = l1_unstructured(Linear(64, 64), "weight", 0.75)
    networks = {"plain": net, "masked": Sequential(Flatten(), masked, relu, Linear(64, 8)), "thin": Sequential(
        Flatten(), factorized(net[1], rank=4), relu, net[3])}  # fmt: skip
    rows = compression_report(networks, randn(16, 64), tmp_path / "out", lambda network: 0.5, rounds=2)
    plain, cut, thin = rows
    assert [row["name"] for row in rows] == list(networks)
    assert plain["parameters"] == cut["parameters"] == 64 * 65 + 65 * 8
    assert (plain["nonzero"], cut["nonzero"]) == (plain["parameters"], plain["parameters"] - 3072)
    assert plain["flops"] == cut["flops"] == 2 * 16 * (4096 + 512)
    assert thin["flops"] == 2 * 16 * (512 + 512)
    assert [row["bytes"] for row in rows] == [
        (tmp_path / "out" / f"{name}.safetensors").stat().st_size for name in networks
    ]
    assert cut["bytes"] < plain["bytes"] - 4 * 3072 + 4096 / 8 + 400
    assert all(row["seconds"] > 0 and row["accuracy"] == 0.5 for row in rows)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == rows
    assert is_pruned(networks["masked"])
    lines = printed(print_report, [*rows, {**plain, "name": "unknown", "accuracy": None}]).splitlines()
    assert len(lines) == 6
    assert lines[2].split()[:3] == ["plain", f"{plain['parameters']:,}", f"{plain['nonzero']:,}"]
    assert (lines[2].split()[-1], lines[5].split()[-1]) == ("50.00%", "–")
    assert len(sparse) == 4


def test_flops_bytes_and_latency_fall_where_channels_go_and_not_where_they_are_masked(tmp_path: Path) -> None:
    """The masked network is planted: as many channels are zeros in it, but none is removed."""
    manual_seed(6)
    net, x = SimpleCNN(3, 10, 32, widths=(32, 64), hidden=64, batch_norm=True), randn(32, 3, 32, 32)
    masked = copy.deepcopy(net)
    for layer in (masked[0], masked[4], masked[9]):
        ln_structured(layer, "weight", 0.75, n=1, dim=0)
    networks = {"whole": net, "narrow": prune_channels(net, x, 0.75), "masked": masked}
    whole, narrow, zeros = compression_report(networks, x, tmp_path, rounds=15)
    for what, share in (("parameters", 0.1), ("bytes", 0.1), ("flops", 0.2), ("seconds", 0.75)):
        assert narrow[what] < share * whole[what], what
    assert zeros["nonzero"] < 0.3 * whole["nonzero"]
    assert (zeros["parameters"], zeros["flops"]) == (whole["parameters"], whole["flops"])
    assert zeros["seconds"] > 0.75 * whole["seconds"]
