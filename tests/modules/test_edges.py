"""Edges of the modules where a small mistake would hide from tests of the usual case."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tinytorch as t
import tinytorch.nn.functional as F
from tinytorch import nn
from tinytorch.m01_setup import assert_close, atomic_write
from tinytorch.m04_layers import overwrite
from tinytorch.m08_training_appendix import Checkpointing, EarlyStopping
from tinytorch.utils.checkpoint import checkpoint

RNG = np.random.default_rng(21)
CHANGED = "changed in place"

# -- numbers -----------------------------------------------------------------------------------------------------------


def test_numpys_scalars_are_as_weak_as_pythons() -> None:
    x = t.ones(2)
    for y in (x * np.float64(0.5), np.float64(0.5) * x, x + np.pi * np.float64(1), x.maximum(np.float64(3))):
        assert y.dtype == t.float32
    assert (t.tensor([1, 2]) * np.float64(0.5)).dtype == (t.tensor([1, 2]) / np.float64(2)).dtype == t.float32


# -- files -------------------------------------------------------------------------------------------------------------

by_renaming = pytest.mark.skipif(os.name == "nt", reason="Windows does not rename over a file that is open")


@by_renaming
def test_who_reads_a_file_while_it_is_replaced_reads_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    atomic_write(path, b"old")
    with open(path, "rb") as reader:
        atomic_write(path, b"something new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"something new"


@by_renaming
def test_saved_weights_replace_the_old_file_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    t.save({"w": t.zeros(3)}, path)
    old = path.read_bytes()
    with open(path, "rb") as reader:
        t.save({"w": t.ones(300)}, path)
        assert reader.read() == old


# -- activations -------------------------------------------------------------------------------------------------------


def test_relu_of_minus_infinity_is_zero() -> None:
    assert t.relu(t.tensor([-math.inf, math.inf])).tolist() == [0, math.inf]


def test_glu_halves_the_axis_that_it_is_told() -> None:
    x = RNG.normal(size=(4, 6, 2))
    for dim in (0, 1, -1):
        value, gate = np.split(x, 2, axis=dim)
        assert_close(F.glu(t.tensor(x), dim), value / (1 + np.exp(-gate)), rtol=1e-9)


def test_prelu_has_a_slope_for_each_channel_of_a_picture() -> None:
    x, slopes = RNG.normal(size=(2, 3, 4, 3)), np.array([0.1, 0.5, 2.0])
    expected = np.where(x > 0, x, x * slopes[None, :, None, None])
    assert_close(F.prelu(t.tensor(x), t.tensor(slopes)), expected, rtol=1e-9)


def test_shrinking_takes_the_bounds_themselves() -> None:
    x = t.tensor([-0.75, -0.5, 0.5, 0.75])
    assert F.hardshrink(x, 0.5).tolist() == [-0.75, 0, 0, 0.75]
    assert F.softshrink(x, 0.5).tolist() == [-0.25, 0, 0, 0.25]


# -- layers ------------------------------------------------------------------------------------------------------------


def test_weight_and_bias_start_at_the_scale_of_the_inputs() -> None:
    t.manual_seed(6)
    layer = nn.Linear(4, 500)
    for parameter in (layer.weight, layer.bias):
        assert 0.48 < parameter.abs().amax().item() <= 0.5


def test_xavier_takes_the_mean_of_both_fans() -> None:
    t.manual_seed(6)
    assert_close(nn.init.xavier_normal_(t.empty(300, 100)).std(), math.sqrt(2 / 400), rtol=0.02)


def test_a_hook_may_make_the_output_zero() -> None:
    layer = nn.Identity()
    layer.register_forward_hook(lambda module, inputs, output: output * 0)
    assert layer(t.tensor([3.0])).tolist() == [0]
    assert layer(t.tensor([3.0, 4.0])).tolist() == [0, 0]


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [F.cross_entropy, F.nll_loss])
def test_the_first_label_that_is_too_large(loss) -> None:
    with pytest.raises(ValueError, match="label 3 at position 1 is out of range: the logits have 3 classes"):
        loss(t.zeros(2, 3), t.tensor([2, 3]))


def test_class_weights_of_pictures_of_probabilities() -> None:
    x, weight = RNG.normal(size=(2, 3, 4)), np.array([0.2, 1.0, 3.0])
    target = RNG.dirichlet(np.ones(3), size=(2, 4)).transpose(0, 2, 1)
    log_p = x - np.logaddexp.reduce(x, axis=1, keepdims=True)
    expected = -(target * log_p * weight[:, None]).sum(1)
    found = F.cross_entropy(t.tensor(x), t.tensor(target), t.tensor(weight), reduction="none")
    assert_close(found, expected, rtol=1e-9)


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_adding_a_tracked_tensor_in_place_tracks_the_sum() -> None:
    w, total = t.tensor([1.0, 2.0], requires_grad=True), t.zeros(2)
    total += w
    total *= w
    total.sum().backward()
    assert w.grad.tolist() == [2, 4]


def test_overwriting_a_parameter_before_backward_is_noticed() -> None:
    w = nn.Parameter(t.tensor([1.0, 2.0]))
    y = (w * w).sum()
    overwrite(w, 0)
    with pytest.raises(RuntimeError, match=CHANGED):
        y.backward()


def test_a_gradient_that_is_a_kept_value_may_not_grow() -> None:
    x = t.tensor([1.0, 2.0], requires_grad=True)
    (3 * x).sum().backward()
    y = (x * x.grad).sum()
    (x * 5).sum().backward()
    with pytest.raises(RuntimeError, match=CHANGED):
        y.backward()


def test_a_gradient_that_is_a_kept_value_may_not_be_clipped() -> None:
    x = t.tensor([1.0, 2.0], requires_grad=True)
    (3 * x).sum().backward()
    y = (x * x.grad).sum()
    nn.utils.clip_grad_norm_([x], 0.1)
    with pytest.raises(RuntimeError, match=CHANGED):
        y.backward()


def test_computing_again_leaves_the_random_numbers_that_follow() -> None:
    x, drawn = t.ones(50, requires_grad=True), []
    for call in (checkpoint, lambda function, x: function(x)):
        t.manual_seed(4)
        y = call(F.dropout, x).sum()
        between = t.rand(5).tolist()
        y.backward()
        drawn.append([between, t.rand(5).tolist()])
    assert drawn[0] == drawn[1]


def test_a_modules_gradients_can_be_set_to_zero() -> None:
    layer = nn.Linear(2, 1)
    layer(t.ones(3, 2)).sum().backward()
    layer.zero_grad(set_to_none=False)
    assert layer.weight.grad.tolist() == [[0, 0]]
    layer.zero_grad()
    assert layer.weight.grad is None


# -- training ----------------------------------------------------------------------------------------------------------


def test_only_bad_epochs_in_a_row_end_training() -> None:
    stopping, stopped = EarlyStopping(patience=2), []
    trainer = SimpleNamespace(model=nn.Linear(1, 1), history=[], stop=False)
    for loss in (5.0, 6.0, 4.0, 6.0, 4.5):
        trainer.history.append({"loss": loss})
        stopping.on_epoch_end(trainer)
        stopped.append(trainer.stop)
    assert stopped == [False, False, False, False, True]


def test_a_resumed_run_knows_its_best_epoch(tmp_path: Path) -> None:
    first, resumed = Checkpointing(tmp_path), Checkpointing(tmp_path)
    assert first.best.improved({"loss": 1.0})
    resumed.load_state_dict(first.state_dict())
    assert not resumed.best.improved({"loss": 2.0})
    assert resumed.best.improved({"loss": 0.5})
