"""Losses against NumPy float64, at extreme values, on each array library, and with input that cannot be right."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytorch import m05_losses as m
from tinytorch import m05_losses_appendix as more
from tinytorch.m01_setup import assert_close
from tinytorch.m02_tensor import Op, Tensor, observe, tensor
from tinytorch.m02_tensor_appendix import set_default_device

NAN, INF = math.nan, math.inf


@pytest.fixture(params=["cpu", "array_api_strict", "torch"])
def library(request):
    if request.param != "cpu":
        pytest.importorskip(request.param)
    set_default_device(request.param)
    yield request.param
    set_default_device("cpu")


def on_default(array: np.ndarray) -> Tensor:
    return tensor(array.tolist(), dtype=array.dtype.name)


def log_softmax(x: np.ndarray, axis: int = 1) -> np.ndarray:
    return x - np.logaddexp.reduce(x, axis=axis, keepdims=True)


def reference(
    x: np.ndarray, target: np.ndarray, weight: np.ndarray, ignore_index: int, smoothing: float, reduction: str
) -> np.ndarray:
    """The cross-entropy, position by position."""
    places, classes = list(np.ndindex(target.shape)), x.shape[1]
    losses, shares = np.zeros(target.shape), np.zeros(target.shape)
    for place in places:
        if target[place] == ignore_index:
            continue
        log_p = log_softmax(x)[(place[0], slice(None), *place[1:])]
        wanted = smoothing / classes + (1 - smoothing) * np.eye(classes)[target[place]]
        losses[place], shares[place] = -(wanted * weight * log_p).sum(), weight[target[place]]
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / shares.sum()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5), (2, 4, 3, 2)])
def test_cross_entropy_on_every_library(shape: tuple, smoothing: float, reduction: str, library: str) -> None:
    generator = np.random.default_rng(len(shape))
    x, target = 3 * generator.standard_normal(shape), generator.integers(0, 4, shape[:1] + shape[2:])
    weight = generator.uniform(0.2, 2, 4)
    for ignore_index, weights in ((-100, None), (2, None), (2, weight)):
        expected = reference(x, target, np.ones(4) if weights is None else weights, ignore_index, smoothing, reduction)
        options = {"ignore_index": ignore_index, "reduction": reduction}
        given_weight = None if weights is None else on_default(weights)
        actual = m.cross_entropy(on_default(x), on_default(target), given_weight, label_smoothing=smoothing, **options)
        assert_close(actual, expected, rtol=1e-10)
        if not smoothing:
            from_logs = m.nll_loss(on_default(log_softmax(x)), on_default(target), given_weight, **options)
            assert_close(from_logs, expected, rtol=1e-10)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_other_loss_on_every_library(reduction: str, library: str) -> None:
    generator = np.random.default_rng(9)
    x, t = generator.standard_normal((2, 5, 3))
    bits, p, w = (t > 0).astype(float), generator.uniform(0.05, 0.95, (5, 3)), generator.uniform(0.5, 2, 3)
    d, sigma = np.abs(x - t), 1 / (1 + np.exp(-x))
    cases = [
        (m.MSELoss, {}, x, t, d**2),
        (m.L1Loss, {}, x, t, d),
        (m.HuberLoss, {"delta": 0.7}, x, t, np.where(d < 0.7, d**2 / 2, 0.7 * (d - 0.35))),
        (m.SmoothL1Loss, {"beta": 0.7}, x, t, np.where(d < 0.7, d**2 / 1.4, d - 0.35)),
        (m.BCELoss, {"weight": w}, p, bits, -w * np.log(np.where(bits == 1, p, 1 - p))),
        (m.BCEWithLogitsLoss, {"pos_weight": w}, x, bits,
         -np.where(bits == 1, w * np.log(sigma), np.log(1 - sigma))),
        (m.KLDivLoss, {}, np.log(p), p[::-1].copy(), p[::-1] * np.log(p[::-1] / p)),
        (m.KLDivLoss, {"log_target": True}, np.log(p), np.log(p[::-1]), p[::-1] * np.log(p[::-1] / p)),
        (m.CrossEntropyLoss, {"weight": w}, x, p, -(log_softmax(x) * p * w).sum(1)),
    ]  # fmt: skip
    for loss, options, a, b, expected in cases:
        options = {k: on_default(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
        reduced = {"none": expected, "mean": expected.mean(), "sum": expected.sum()}[reduction]
        actual = loss(**options, reduction=reduction)(on_default(a), on_default(b))
        assert_close(actual, reduced, rtol=1e-10, atol=1e-12)
        assert actual.device == library


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=6), st.integers(0, 5))
def test_cross_entropy_of_any_scores_is_finite_and_never_negative(scores: list[float], label: int) -> None:
    label %= len(scores)
    x = np.array([scores], np.float32)
    loss = m.cross_entropy(Tensor(x), tensor([label])).item()
    assert loss >= 0
    assert_close(loss, -log_softmax(x.astype(np.float64))[0, label], rtol=1e-5, atol=1e-6)


def test_extreme_scores() -> None:
    """Warnings are errors here: nothing overflows on the way."""
    x, t = tensor([-1e4, -100.0, 0.0, 100.0, 1e4]), tensor([1.0, 0.0, 0.5, 0.0, 1.0])
    with np.errstate(all="raise", under="ignore"):
        losses = m.binary_cross_entropy_with_logits(x, t, reduction="none")
        assert_close(losses, [1e4, math.exp(-100), math.log(2), 100, 0])
        assert losses[1].item() > 0  # not rounded to 0
        assert_close(m.cross_entropy(tensor([[1e4, -1e4]]), tensor([1]), reduction="none"), [2e4])
        assert_close(m.huber_loss(tensor([1e30]), tensor([-1e30])), 2e30)
        assert_close(m.smooth_l1_loss(tensor([1e30]), tensor([-1e30]), beta=0.5), 2e30)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_logarithms_of_probabilities_are_cut_off() -> None:
    p, t = tensor([0.0, 1.0, 0.0, 1.0, 0.25]), tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    assert_close(m.binary_cross_entropy(p, t, reduction="none"), [0, 0, 100, 100, math.log(4)])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_all_ignored_is_nan_and_masked_scores_are_infinite(library: str) -> None:
    x, t = tensor([[0.0, -INF, 1.0], [-INF, 2.0, 3.0]]), tensor([7, 7])
    assert_close(m.cross_entropy(x, t, ignore_index=7), NAN)
    assert_close(m.cross_entropy(x, t, ignore_index=7, reduction="sum"), 0)
    assert_close(m.cross_entropy(x, tensor([1, 2]), reduction="none"), [INF, math.log1p(math.exp(-1))])
    assert_close(m.cross_entropy(x, tensor([2, -100])), math.log1p(math.exp(-1)))
    assert_close(m.cross_entropy(tensor([[NAN, 1.0]]), tensor([1])), NAN)
    assert_close(m.mse_loss(tensor([NAN, 1.0]), tensor([0.0, 1.0]), reduction="none"), [NAN, 0])
    assert_close(m.huber_loss(tensor([NAN, INF]), tensor([0.0, 0.0]), reduction="none"), [NAN, INF])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "int64"])
def test_labels_of_every_integer_type(dtype: str) -> None:
    x = tensor(np.random.default_rng(2).standard_normal((3, 4)))
    expected = m.cross_entropy(x, tensor([0, 3, 1]))
    assert_close(m.cross_entropy(x, tensor([0, 3, 1], dtype=dtype)), expected)


def test_no_small_integer_is_taken_for_ignore_index() -> None:
    """156 is -100 in eight bits."""
    with pytest.raises(ValueError, match="label 156 at position 1"):
        m.cross_entropy(tensor([[0.0] * 4] * 2), tensor([0, 156], dtype="uint8"))


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_labels_that_cannot_be_right(name: str, library: str) -> None:
    function, x = getattr(m, name), tensor(np.zeros((4, 10)).tolist())
    with pytest.raises(ValueError, match=rf"^{name}: label 10 at position 2 is out of range: the logits have 10 class"):
        function(x, tensor([0, 9, 10, -5]))
    with pytest.raises(ValueError, match=r"label -5 at position 1 .*\(0 … 9\)"):
        function(x, tensor([-100, -5, 0, 0]))
    with pytest.raises(ValueError, match="label -100 at position 0"):
        function(x, tensor([-100, 0, 0, 0]), ignore_index=3)
    with pytest.raises(TypeError, match=r"class indices must be integers .*float32"):
        function(x, tensor([0.0, 1.0, 2.0, 3.0]))
    with pytest.raises(TypeError, match=r"class indices must be integers .*bool"):
        function(x, tensor([True, False, True, False]))
    with pytest.raises(ValueError, match=r"shape \(4, 10\) takes class indices \(int64\) of shape \(4,\).*\(4, 1\)"):
        function(x, tensor([[0], [1], [2], [3]]))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        function(x, tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"weight must have one element for each of 10 classes, got shape \(3,\)"):
        function(x, tensor([0, 1, 2, 3]), tensor([1.0, 2.0, 3.0]))
    with pytest.raises(TypeError, match="the input must be floats"):
        function(tensor([[1, 2]]), tensor([0]))
    with pytest.raises(ValueError, match=r"one for each class, got float32 of shape \(\)"):
        function(tensor(1.0), tensor(0))


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "mse_loss", "l1_loss"])
def test_an_empty_batch_has_no_mean(name: str) -> None:
    x = tensor(np.zeros((0, 10)))
    target = tensor(np.zeros(0, np.int64)) if name in ("cross_entropy", "nll_loss") else x
    with pytest.raises(ValueError, match=f"{name}: the batch is empty"):
        getattr(m, name)(x, target)
    assert getattr(m, name)(x, target, reduction="sum").item() == 0
    assert getattr(m, name)(x, target, reduction="none").shape == target.shape
    if name == "cross_entropy":
        with pytest.raises(ValueError, match="the batch is empty"):
            m.cross_entropy(x, target, tensor([1.0] * 10))


def test_other_input_that_cannot_be_right() -> None:
    x = tensor([0.5, 0.5])
    with pytest.raises(ValueError, match='l1_loss: reduction must be "none", "mean" or "sum", got \'avg\''):
        m.l1_loss(x, x, reduction="avg")
    with pytest.raises(ValueError, match=r"label_smoothing must be between 0 and 1, got 1.5"):
        m.cross_entropy(x, tensor(0), label_smoothing=1.5)
    with pytest.raises(ValueError, match="delta must be positive"):
        m.huber_loss(x, x, delta=0.0)
    with pytest.raises(ValueError, match="beta must not be negative"):
        m.smooth_l1_loss(x, x, beta=-1.0)
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(2, 1\)"):
        m.binary_cross_entropy(x, tensor([[0.5], [0.5]]))
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(\)"):
        m.binary_cross_entropy_with_logits(x, tensor(1.0))
    with pytest.raises(ValueError, match=r"between 0 and 1, these between -2 and 0.5"):
        m.binary_cross_entropy(tensor([0.5, -2.0]), x)
    with pytest.raises(ValueError, match="a variance is negative"):
        more.gaussian_nll_loss(x, x, tensor([1.0, -1.0]))


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss"])
def test_broadcasting_is_warned_of_at_the_callers_line(name: str) -> None:
    with pytest.warns(UserWarning, match=rf"{name}: .*\(3, 1\).*\(3,\)") as caught:
        getattr(m, name)(tensor([[1.0], [2.0], [3.0]]), tensor([1.0, 2.0, 3.0]))
    assert caught[0].filename == __file__


def test_the_usual_case_is_one_operation_and_a_mean() -> None:
    seen: list[str] = []
    with observe(lambda op, arrays, attributes, proceed: (seen.append(op.name), proceed())[1]):
        m.cross_entropy(tensor([[1.0, 2.0], [3.0, 4.0]]), tensor([0, 1]))
    assert seen == ["softmax_cross_entropy", "mean"]
    mine = {name for name, op in Op.registry.items() if op.__module__.startswith("tinytorch.m05")}
    assert mine == {"softmax_cross_entropy", "bernoulli_cross_entropy"}
