"""Module 05: losses, one number that says how wrong a network is.

Learning objectives. After this module you can
1. derive each loss from what it believes about the errors: normal, outliers, a class, a bit;
2. compute a cross-entropy from scores without ever forming a probability, and say why that is needed;
3. predict what weights, ignored positions and label smoothing do to an average;
4. check a batch of labels in time that does not matter, and say which one is wrong;
5. measure when a fused operation beats a chain of small ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from tinytorch.backends import backend_of
from tinytorch.m01_setup import assert_close, manual_seed, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import Tensor, abs, exp, int64, log, mean, mul, op, randn, reshape, sum, tensor, to, where
from tinytorch.m02_tensor_appendix import clamp, index_select, movedim, randint, take_along_dim
from tinytorch.m03_activations import log_softmax, relu, softmax, softplus

# %% [markdown]
# ## Mathematical foundations
#
# A loss compares outputs $x$ with targets $t$ and returns one number: the mean over all elements (`reduction="mean"`),
# their sum, or ("none") the elements themselves. Each loss is the negative logarithm of a probability: to minimise it
# is to make what was observed as likely as possible.
#
# **Numbers.** If errors $d = x - t$ are normal, $-\log p$ is $d^2$ up to constants: `mse_loss`. If outliers are common,
# $|d|$: `l1_loss`. Huber's loss is the one near 0 and the other far away; with $c = \mathrm{clamp}(d, -\delta, \delta)$
# it is $c\,(d - c/2)$, without a case distinction.
#
# **Classes.** Scores $x_1 … x_C$ become probabilities by softmax, and the loss of class $t$ is
#
# $$-\log p_t = \log \sum_j e^{x_j} - x_t.$$
#
# Weights $w_t$ make some classes count more; the mean is then the weighted one,
# $\sum_i w_{t_i} \ell_i / \sum_i w_{t_i}$. *Label smoothing* moves a share $\varepsilon$ of the target to all classes
# evenly, so that no score is pulled to infinity. If the target is a whole distribution $q$, the loss is
# $-\sum_j q_j \log p_j$.
#
# **Bits.** With $p = \sigma(x)$ the probability of a 1: $-t \log p - (1-t) \log(1-p)$, which is
# $t\,\mathrm{softplus}(-x) + (1-t)\,\mathrm{softplus}(x)$ in terms of the score.
#
# **Distributions.** The Kullback-Leibler divergence $\sum_j q_j (\log q_j - \log p_j)$ is 0 where both are equal.
#
# From a score, all of these stay finite; from a probability, $\log 0$ waits. Hence losses that take scores.

# %% [markdown]
# ## Implementation
#
# ### From many numbers to one


# %%
def reduce(name: str, losses: Tensor, reduction: str) -> Tensor:
    """The mean or sum of the losses, or ("none") the losses themselves. `name` is who asks, for the error."""
    if reduction == "mean":
        if not losses.numel():
            raise ValueError(f'{name}: the batch is empty and has no mean; reduction="sum" gives 0')
        return mean(losses)
    if reduction == "sum":
        return sum(losses)
    if reduction == "none":
        return losses
    raise ValueError(f'{name}: reduction must be "none", "mean" or "sum", got {reduction!r}')


def test_reductions() -> None:
    x = tensor([[1.0, 2.0], [3.0, 6.0]])
    assert reduce("test", x, "mean").item() == 3
    assert reduce("test", x, "sum").item() == 12
    assert reduce("test", x, "none") is x
    assert message_of(reduce, "test", x, "avg", error=ValueError).startswith("test: reduction must be")


# %% [markdown]
# ### Losses of numbers
# Outputs of shape (N, 1) with targets of shape (N,) broadcast to (N, N): every output is compared with every target,
# the loss falls, and the network learns the mean. It is one of the commonest errors there is, so, like PyTorch, we
# warn.


# %%
def _difference(name: str, input: Tensor, target: Tensor) -> Tensor:
    if input.shape != target.shape:
        warnings.warn(
            f"{name}: the input has shape {input.shape}, the target {target.shape}; they are broadcast, which is "
            f"seldom meant: reshape one of them",
            stacklevel=3,
        )
    return input - target


def mse_loss(input: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """(input - target)², elementwise, then reduced."""
    difference = _difference("mse_loss", input, target)
    return reduce("mse_loss", difference * difference, reduction)


def l1_loss(input: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """|input - target|, elementwise, then reduced."""
    return reduce("l1_loss", abs(_difference("l1_loss", input, target)), reduction)


def huber_loss(input: Tensor, target: Tensor, *, reduction: str = "mean", delta: float = 1.0) -> Tensor:
    """d²/2 where |d| <= delta, delta (|d| - delta/2) elsewhere, for d = input - target."""
    if delta <= 0:
        raise ValueError(f"huber_loss: delta must be positive, got {delta}")
    return reduce("huber_loss", _huber(_difference("huber_loss", input, target), delta), reduction)


def smooth_l1_loss(input: Tensor, target: Tensor, *, reduction: str = "mean", beta: float = 1.0) -> Tensor:
    """d²/(2 beta) where |d| < beta, |d| - beta/2 elsewhere, for d = input - target; l1_loss if beta is 0."""
    if beta < 0:
        raise ValueError(f"smooth_l1_loss: beta must not be negative, got {beta}")
    difference = _difference("smooth_l1_loss", input, target)
    return reduce("smooth_l1_loss", _huber(difference, beta) / beta if beta else abs(difference), reduction)


def _huber(difference: Tensor, delta: float) -> Tensor:
    clipped = clamp(difference, min=-delta, max=delta)
    return clipped * (difference - 0.5 * clipped)


def test_losses_of_numbers() -> None:
    x, t = tensor([1.0, 2.0, -3.0]), tensor([1.5, 2.0, 1.0])
    assert_close(mse_loss(x, t), (0.25 + 0 + 16) / 3)
    assert_close(l1_loss(x, t, reduction="none"), [0.5, 0, 4])
    assert_close(huber_loss(x, t, reduction="none", delta=2.0), [0.125, 0, 2 * (4 - 1)])
    assert_close(smooth_l1_loss(x, t, reduction="none", beta=2.0), [0.0625, 0, 4 - 1])
    assert_close(smooth_l1_loss(x, t, beta=0.0), l1_loss(x, t))


def test_broadcasting_is_warned_of() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mse_loss(randn(3, 1), randn(3))
    assert "the input has shape (3, 1), the target (3,)" in str(caught[0].message)


# %% [markdown]
# ### Cross-entropy, fused
# Nearly every network in this course ends here, once per step, so the usual case is one operation. It hands out the
# log-probabilities that it computed on the way.


# %%
@op
def softmax_cross_entropy(xp, logits, targets):
    """The cross-entropy of each row, and the probabilities: (N, C) and (N,) -> (N,), (N, C).

    Args:
        logits: scores, floats (N, C).
        targets: the class of each row, integers (N,) from 0 to C - 1. They are not checked here.
    """
    shifted = logits - xp.max(logits, axis=1, keepdims=True)
    probabilities = xp.exp(shifted)
    total = xp.sum(probabilities, axis=1, keepdims=True)
    probabilities /= total
    return xp.log(total)[:, 0] - xp.take_index(shifted, (xp.arange(logits.shape[0]), targets)), probabilities


def test_softmax_cross_entropy_against_its_parts() -> None:
    logits, classes = randn(5, 3), tensor([0, 2, 1, 1, 0])
    losses, probabilities = softmax_cross_entropy(logits, classes)
    assert_close(probabilities.log(), log_softmax(logits, dim=1))
    assert_close(losses, [-log_softmax(logits, dim=1)[i, c].item() for i, c in enumerate(classes.tolist())])
    assert_close(softmax_cross_entropy(tensor([[1e4, 0.0]]), tensor([1]))[0], [1e4])  # where -log(softmax) would be inf


# %% [markdown]
# ### Labels, checked
# A wrong label is an error in the data, and must be found here: NumPy would take label -1 for the last class and train
# on. The smallest and the largest label tell whether anything is wrong; only then do we look for the culprit. Labels
# equal to `ignore_index` are allowed: padding, unlabelled pixels. They get class 0, and their loss is removed later.


# %%
def _rows_and_classes(name: str, input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Any]:
    """Scores as rows (M, C), the class of each row (M,), and which rows to ignore: a mask (M,), or None for none."""
    if not input.ndim or not input.dtype.is_floating_point:
        kind = ValueError if not input.ndim else TypeError
        raise kind(f"{name}: the input must be floats, one for each class, got {input.dtype} of shape {input.shape}")
    axis = min(1, input.ndim - 1)
    expected = input.shape[:axis] + input.shape[axis + 1 :]
    if target.shape != expected or target.dtype.is_floating_point or target.dtype == "bool":
        raise _target_error(name, input, target, expected)
    if input.ndim != 2:
        input = reshape(movedim(input, axis, -1), shape=(target.numel(), input.shape[axis]))
    classes = to(target, int64) if target.ndim == 1 else reshape(to(target, int64), shape=(-1,))
    ignored = _find_ignored(name, classes.data, input.shape[1], ignore_index)
    return (input, classes, None) if ignored is None else (input, where(ignored, 0, classes), ignored)


def _find_ignored(name: str, classes: Any, count: int, ignore_index: int) -> Tensor | None:
    xp = backend_of(classes)
    if not classes.shape[0]:
        return None
    in_range = int(xp.min(classes)) >= 0 and int(xp.max(classes)) < count
    if in_range and not 0 <= ignore_index < count:
        return None
    ignored = classes == ignore_index
    wrong = ~ignored & ((classes < 0) | (classes >= count))
    if xp.any(wrong):
        position = int(xp.argmax(xp.astype(wrong, xp.int64)))
        raise ValueError(
            f"{name}: label {int(classes[position])} at position {position} is out of range: the logits have {count} "
            f"classes (0 … {count - 1})"
        )
    return Tensor(ignored)


def _target_error(name: str, input: Tensor, target: Tensor, expected: tuple[int, ...]) -> Exception:
    if target.shape == expected:
        return TypeError(f"{name}: class indices must be integers (int64), the target is {target.dtype}")
    probabilities = f", or probabilities of shape {input.shape}" if name == "cross_entropy" else ""
    return ValueError(
        f"{name}: an input of shape {input.shape} takes class indices (int64) of shape {expected}{probabilities}; "
        f"the target is {target.dtype} of shape {target.shape}"
    )


def test_wrong_labels_are_named() -> None:
    logits = randn(5, 10)
    message = message_of(cross_entropy, logits, tensor([0, 9, 5, 12, -1]), error=ValueError)
    assert message == "cross_entropy: label 12 at position 3 is out of range: the logits have 10 classes (0 … 9)"
    assert "label -1 at position 0" in message_of(cross_entropy, logits, tensor([-1, 0, 0, 0, 0]), error=ValueError)
    assert "shape (5,)" in message_of(cross_entropy, logits, tensor([[0]] * 5), error=ValueError)
    assert "float32" in message_of(cross_entropy, logits, tensor([0.0] * 5), error=TypeError)


# %% [markdown]
# ### Averages with weights
# With class weights, or with positions left out, "mean" is the weighted mean: the sum of the losses over the sum of the
# weights that they were multiplied with. If all positions are ignored it is 0 / 0, nan, as in PyTorch.


# %%
def _average(
    name: str, losses: Tensor, shares: Tensor | None, ignored: Tensor | None, reduction: str, shape: tuple
) -> Tensor:
    """Reduce losses (M,) that were multiplied by `shares` (M,), or by nothing, leaving out the ignored ones."""
    if ignored is not None:
        losses = where(ignored, 0.0, losses)  # not a product with 0, which leaves nan and inf in
        shares = where(ignored, 0.0, 1.0 if shares is None else shares)
    if reduction == "mean" and shares is not None and losses.shape[0]:
        return sum(losses) / sum(shares)
    return reduce(name, losses if losses.shape == shape else reshape(losses, shape=shape), reduction)


def nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """-input[target], for log-probabilities: what remains of the cross-entropy after log_softmax.

    Args:
        input: log-probabilities (N, C), (N, C, d1, …) or (C,).
        target: class indices, integers (N,), (N, d1, …) or ().
        weight: how much each class counts (C,); "mean" is then the weighted mean.
        ignore_index: the label of positions that are left out.
    """
    rows, classes, ignored = _rows_and_classes("nll_loss", input, target, ignore_index)
    losses, shares = _pick(rows, classes), _shares("nll_loss", rows, classes, weight)
    return _average("nll_loss", _times(losses, shares), shares, ignored, reduction, target.shape)


def _pick(rows: Tensor, classes: Tensor) -> Tensor:
    """-rows[i, classes[i]] for each row i."""
    return -reshape(take_along_dim(rows, reshape(classes, shape=(-1, 1)), dim=1), shape=(-1,))


def _shares(name: str, rows: Tensor, classes: Tensor, weight: Tensor | None) -> Tensor | None:
    """The weight of each row's class."""
    if weight is None:
        return None
    _check_weight(name, weight, rows.shape[1])
    return index_select(weight, 0, classes)


def _check_weight(name: str, weight: Tensor, count: int) -> None:
    if weight.shape != (count,):
        raise ValueError(f"{name}: weight must have one element for each of {count} classes, got shape {weight.shape}")


def _times(losses: Tensor, weight: Tensor | None) -> Tensor:
    return losses if weight is None else mul(losses, weight)


def test_nll_loss_weighs_and_ignores() -> None:
    x, t, w = tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]]), tensor([1, 0, -100]), tensor([1.0, 3.0])
    assert_close(nll_loss(x, t, reduction="none"), [2, 3, 0])
    assert_close(nll_loss(x, t), 2.5)
    assert_close(nll_loss(x, t, w), (3 * 2 + 1 * 3) / (3 + 1))
    assert_close(nll_loss(x, t, w, reduction="sum"), 9)


# %% [markdown]
# ### Cross-entropy, in full


# %%
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log(softmax(input))[target]: the cross-entropy of scores.

    Args:
        input: scores (N, C), (N, C, d1, …) or (C,). Not probabilities: the softmax is part of the loss.
        target: class indices, integers (N,), (N, d1, …) or (); or probabilities, floats with the shape of `input`.
        weight: how much each class counts (C,); with class indices "mean" is then the weighted mean.
        ignore_index: the label of positions that are left out; for class indices only.
        label_smoothing: the share of each target that is spread evenly over all classes, from 0 to 1.

    Raises:
        ValueError: for shapes that do not belong together, and for labels out of range, naming the first.
    """
    name = "cross_entropy"
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if input.ndim and target.shape == input.shape and target.dtype.is_floating_point:
        return _cross_entropy_of_probabilities(input, target, weight, reduction, label_smoothing)
    rows, classes, ignored = _rows_and_classes(name, input, target, ignore_index)
    shares = _shares(name, rows, classes, weight)
    if label_smoothing:
        log_probabilities = log_softmax(rows, dim=1)
        even = -mean(_times(log_probabilities, weight), dim=1)
        losses = (1 - label_smoothing) * _times(_pick(log_probabilities, classes), shares) + label_smoothing * even
    else:
        losses = _times(softmax_cross_entropy(rows, classes)[0], shares)
    return _average(name, losses, shares, ignored, reduction, target.shape)


def _cross_entropy_of_probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float
) -> Tensor:
    axis = min(1, input.ndim - 1)
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing / input.shape[axis]
    if weight is not None:
        _check_weight("cross_entropy", weight, input.shape[axis])
        weight = reshape(weight, shape=(-1, *(1,) * (input.ndim - axis - 1)))
    return reduce("cross_entropy", -sum(_times(log_softmax(input, dim=axis) * target, weight), dim=axis), reduction)


def test_cross_entropy_of_classes_and_probabilities() -> None:
    x, t = randn(4, 3), tensor([2, 0, 1, 2])
    certain = tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert_close(cross_entropy(x, t), -(log_softmax(x, dim=1) * certain).sum() / 4, atol=1e-5)
    for smoothing in (0.0, 0.1):  # a class is a distribution that is certain
        assert_close(cross_entropy(x, t, label_smoothing=smoothing),
                     cross_entropy(x, certain, label_smoothing=smoothing))  # fmt: skip
    assert_close(cross_entropy(tensor([0.0] * 8), tensor(5)), math.log(8))  # no idea among 8: three bits


def test_cross_entropy_ignores_positions_and_takes_images() -> None:
    x, t = randn(2, 3, 4, 5), randint(3, (2, 4, 5))
    losses = cross_entropy(x, t, reduction="none")
    assert losses.shape == (2, 4, 5)
    assert_close(losses[1, 2, 3], -log_softmax(x[1, :, 2, 3], dim=0)[t[1, 2, 3].item()])
    counted = [0.0 if c == 1 else loss for c, loss in zip(t.tolist()[0][0], losses.tolist()[0][0], strict=True)]
    assert_close(cross_entropy(x, t, ignore_index=1, reduction="none")[0, 0], counted)
    row, impossible = tensor([[-math.inf, 0.0, 0.0]]), tensor([-100])  # class 0 stands in for an ignored one
    assert cross_entropy(row, impossible, reduction="sum").item() == 0


# %% [markdown]
# ### Losses of bits
# From scores, the loss is two softplus, and stays finite and precise for every score. From probabilities it is two
# logarithms, of which PyTorch cuts off what lies below -100, so that one certain and wrong answer does not make the
# loss of the whole batch infinite. This one is an operation of its own: its result is cut off, not its rate of change.


# %%
@op(dtypes="float")
def bernoulli_cross_entropy(xp, probabilities, targets):
    """-t log(p) - (1 - t) log(1 - p), elementwise, with logarithms that are at least -100."""
    yes = xp.maximum(xp.log(probabilities), -100.0)
    no = xp.maximum(xp.log1p(-probabilities), -100.0)
    return (targets - 1) * no - targets * yes


def binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """The cross-entropy of probabilities and bits, elementwise, then reduced.

    Args:
        input: probabilities of a 1, between 0 and 1, any shape.
        target: what was observed, 0 to 1, of the same shape.
        weight: what each loss is multiplied with; it broadcasts. "mean" still divides by the number of elements.
    """
    _check_bits("binary_cross_entropy", input, target)
    xp = backend_of(input.data)
    if input.numel() and (xp.min(input.data) < 0 or xp.max(input.data) > 1):
        low, high = float(xp.min(input.data)), float(xp.max(input.data))
        raise ValueError(
            f"binary_cross_entropy: probabilities lie between 0 and 1, these between {low:.6g} and {high:.6g}; "
            f"binary_cross_entropy_with_logits takes scores"
        )
    return reduce("binary_cross_entropy", _times(bernoulli_cross_entropy(input, target), weight), reduction)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """The cross-entropy of sigmoid(input) and bits, elementwise, then reduced; precise for every score.

    Args:
        input: scores, any shape.
        target: what was observed, 0 to 1, of the same shape.
        weight: what each loss is multiplied with; it broadcasts.
        pos_weight: what the loss of a 1 is multiplied with besides, to make up for ones that are rare; it broadcasts.
    """
    _check_bits("binary_cross_entropy_with_logits", input, target)
    yes = _times(target * softplus(-input, threshold=math.inf), pos_weight)
    no = (1 - target) * softplus(input, threshold=math.inf)
    return reduce("binary_cross_entropy_with_logits", _times(yes + no, weight), reduction)


def _check_bits(name: str, input: Tensor, target: Tensor) -> None:
    if input.shape != target.shape:
        raise ValueError(f"{name}: input and target must have one shape, got {input.shape} and {target.shape}")


def test_losses_of_bits() -> None:
    p, t = tensor([0.9, 0.2, 0.5]), tensor([1.0, 1.0, 0.0])
    expected = [-math.log(0.9), -math.log(0.2), -math.log(0.5)]
    assert_close(binary_cross_entropy(p, t, reduction="none"), expected)
    assert_close(binary_cross_entropy_with_logits(log(p / (1 - p)), t, reduction="none"), expected)
    assert_close(binary_cross_entropy_with_logits(tensor([1e4, -1e4]), tensor([0.0, 0.0]), reduction="none"), [1e4, 0])
    weighted = binary_cross_entropy(p, t, tensor([1.0, 2.0, 3.0]), reduction="sum")
    assert_close(weighted, expected[0] + 2 * expected[1] + 3 * expected[2])
    assert "with_logits" in message_of(binary_cross_entropy, tensor([1.5]), tensor([1.0]), error=ValueError)


# %% [markdown]
# ### Divergence of distributions
# The argument is the logarithm of p, because that is what a network gives. Where q is 0 its term is 0, although
# $\log 0$ is not: the inner `where` keeps the logarithm from ever seeing it.


# %%
def kl_div(input: Tensor, target: Tensor, *, reduction: str = "mean", log_target: bool = False) -> Tensor:
    """q (log q - log p), elementwise, then reduced: how far p is from q.

    Args:
        input: log p.
        target: q; or log q if `log_target`.
        reduction: "batchmean" is the divergence per row: the sum divided by the first length. "mean" divides by the
            number of elements, as PyTorch does, which is no divergence.
    """
    if log_target:
        losses = exp(target) * (target - input)
    else:
        losses = target * log(where(target == 0, 1.0, target)) - target * input
    if reduction == "batchmean":
        return sum(losses) / losses.shape[0]
    return reduce("kl_div", losses, reduction)


def test_kl_div() -> None:
    p, q = tensor([[0.25, 0.25, 0.5]]), tensor([[0.5, 0.0, 0.5]])
    assert_close(kl_div(log(p), q, reduction="none"), [[0.5 * math.log(2), 0, 0]])
    assert_close(kl_div(log(p), 2 * log(p), log_target=True, reduction="none"), p * p * log(p))
    assert_close(kl_div(log(p), q, reduction="batchmean"), 0.5 * math.log(2))


# %% [markdown]
# ### Losses that remember their attributes
# Like the activations of module 03: a function and the arguments that stay the same from step to step.


# %%
@dataclass(eq=False)
class Loss:
    """A loss that remembers its attributes: called with input and target, it returns a tensor.

    A subclass names the `function`; its fields are passed to it under their names.
    """

    function: ClassVar[Callable]
    _: KW_ONLY
    reduction: str = "mean"

    def __call__(self, *compared: Tensor) -> Tensor:
        return type(self).function(*compared, **vars(self))


class MSELoss(Loss):
    """The mean of (input - target)²."""

    function = mse_loss


class L1Loss(Loss):
    """The mean of |input - target|."""

    function = l1_loss


@dataclass(eq=False)
class HuberLoss(Loss):
    """Quadratic up to an error of delta, linear beyond."""

    function = huber_loss
    _: KW_ONLY
    delta: float = 1.0


@dataclass(eq=False)
class SmoothL1Loss(Loss):
    """Huber's loss divided by beta."""

    function = smooth_l1_loss
    _: KW_ONLY
    beta: float = 1.0


@dataclass(eq=False)
class CrossEntropyLoss(Loss):
    """The cross-entropy of scores and classes or probabilities; see `cross_entropy`."""

    function = cross_entropy
    weight: Tensor | None = None
    _: KW_ONLY
    ignore_index: int = -100
    label_smoothing: float = 0.0


@dataclass(eq=False)
class NLLLoss(Loss):
    """The negative log-probability of the classes; see `nll_loss`."""

    function = nll_loss
    weight: Tensor | None = None
    _: KW_ONLY
    ignore_index: int = -100


@dataclass(eq=False)
class BCELoss(Loss):
    """The cross-entropy of probabilities and bits; see `binary_cross_entropy`."""

    function = binary_cross_entropy
    weight: Tensor | None = None


@dataclass(eq=False)
class BCEWithLogitsLoss(Loss):
    """The cross-entropy of scores and bits; see `binary_cross_entropy_with_logits`."""

    function = binary_cross_entropy_with_logits
    weight: Tensor | None = None
    _: KW_ONLY
    pos_weight: Tensor | None = None


@dataclass(eq=False)
class KLDivLoss(Loss):
    """The divergence of distributions; see `kl_div`."""

    function = kl_div
    _: KW_ONLY
    log_target: bool = False


def test_losses_remember_their_attributes() -> None:
    x, t, w = randn(4, 3), tensor([0, 1, 2, 0]), tensor([1.0, 2.0, 0.5])
    criterion = CrossEntropyLoss(w, ignore_index=2, reduction="sum")
    assert_close(criterion(x, t), cross_entropy(x, t, w, ignore_index=2, reduction="sum"))
    assert repr(HuberLoss(delta=2.0)) == "HuberLoss(reduction='mean', delta=2.0)"


# %% [markdown]
# ## Systems analysis
#
# A loss reads every score once or more and returns one number. For a small batch its price is the number of operations;
# for a language model, whose scores are (tokens, vocabulary), it is memory: log-probabilities as large as the scores
# themselves, often the largest arrays of the whole network. The table compares the fused operation with the chain of
# log_softmax and a choice, and with the naive chain through the probability, whose smallest one no longer has a
# logarithm.


# %%
def analyze() -> None:
    """Measure three ways to compute a cross-entropy, what checking labels costs, and where the naive way ends."""
    rows = []
    for n, c in ((64, 10), (1024, 100), (512, 16384)):
        x, t = randn(n, c), randint(c, (n,))
        ways = [
            lambda x=x, t=t: softmax_cross_entropy(x, t)[0].mean(),
            lambda x=x, t=t: cross_entropy(x, t),
            lambda x=x, t=t: mean(_pick(log_softmax(x, dim=1), t)),
            lambda x=x, t=t: mean(_pick(log(softmax(x, dim=1)), t)),
        ]
        rows.append([f"{n} x {c}", *(1e6 * seconds(way, repeat=3) for way in ways), x.numel() * x.dtype.itemsize / 1e6])
    print_table(["scores", "fused, µs", "with checks", "log_softmax", "log of softmax", "MB kept"], rows)
    print()
    rows = []
    for gap in (10.0, 50.0, 100.0, 120.0):
        scores, label = tensor([[gap, 0.0]]), tensor([1])
        naive = _pick(log(softmax(scores, dim=1)), label).item()
        rows.append([gap, naive, cross_entropy(scores, label).item()])
    print_table(["score of the wrong class", "naive loss", "loss"], rows)


# %% [markdown]
# ## Production context
#
# `torch.nn.functional.cross_entropy` is `aten::cross_entropy_loss`: a `_log_softmax` and an `nll_loss` kernel. On a GPU
# it does not wait to check labels: a wrong one trips an assertion in the kernel ("device-side assert triggered"), some
# time later and without its value. We wait for two numbers and can name the label. Large vocabularies get kernels
# that never hold all log-probabilities, but work through the scores in chunks (Liger, Apple's Cut Cross-Entropy).
# `size_average` and `reduce`, deprecated since 2018, are left out, and reductions are keywords.

# %% [markdown]
# ## Integration testing


# %%
def test_a_better_network_has_a_smaller_loss() -> None:
    """A hand-made classifier, by quadrant: the loss falls from log(4), ignorance, as its scores grow surer."""
    manual_seed(5)
    points = randn(200, 2)
    classes = (points[:, 0] > 0).to(int64) * 2 + (points[:, 1] > 0).to(int64)
    corners = tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    losses = [cross_entropy(s * (points @ corners.T), classes).item() for s in (0.0, 1.0, 10.0, 1000.0)]
    assert_close(losses[0], math.log(4))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.01
    assert_close(cross_entropy(relu(points @ corners.T), classes, reduction="none").mean(),
                 CrossEntropyLoss()(relu(points @ corners.T), classes))  # fmt: skip


# %% [markdown]
# ## Thinking questions
#
# 1. A GPT-2 has 50,257 classes. How many bytes do the scores of 8 x 1,024 tokens take, and their log-probabilities?
#    What could be computed in chunks?
# 2. Four devices each average the losses of their own batch, with padding ignored. Is the average of the four averages
#    the loss of the whole batch?
# 3. Labels are checked by reading two numbers from the device. What does that cost on a GPU, and how would you report
#    a wrong label without waiting?
# 4. The mean of squares of (N, 1) against (N,) is a valid number. Which other silent broadcasts can you think of, and
#    would you forbid them?
# 5. A float16 mean over a million losses of about 1: what goes wrong if the sum is formed first?

# %% [markdown]
# ## Summary
#
# Nine losses with PyTorch's semantics, from scores wherever it matters, with labels checked and the usual
# case in one operation. A network and its loss are now one function of the weights. Module 06 finds out in which
# direction each weight should move.

# %%
if __name__ == "__main__":
    run_module(globals())
