"""Module 03: activations, the functions that bend what would otherwise stay a straight line.

Learning objectives. After this module you can
1. show why layers without an activation between them are one layer;
2. write a function so that no intermediate value overflows, whatever its input;
3. turn scores into probabilities with a softmax that survives ±10,000 and masks of -inf;
4. say what nan and the infinities become, and why that matters when something goes wrong;
5. count the passes that a function makes over memory, and predict its time from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from tinytorch.m01_setup import assert_close, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import Tensor, exp, float16, float32, float64, observe, op, randn, tensor
from tinytorch.m02_tensor_appendix import isinf, tanh

# %% [markdown]
# ## Mathematical foundations
#
# Two linear maps in a row are one: $W_2 (W_1 x) = (W_2 W_1) x$. A network gains from depth only if something that is
# not linear stands between its layers. Almost any function will do; these are the ones in use.
#
# $$\mathrm{relu}(x) = \max(x, 0) \qquad \mathrm{leaky\_relu}(x) = \max(x, 0) + s \min(x, 0)$$
# $$\sigma(x) = \frac{1}{1 + e^{-x}} \qquad \tanh(x) = 2\sigma(2x) - 1 \qquad \mathrm{silu}(x) = x\,\sigma(x)$$
# $$\mathrm{gelu}(x) = x\,\Phi(x), \quad \Phi(x) = \tfrac12\bigl(1 + \mathrm{erf}(x/\sqrt2)\bigr)$$
# $$\mathrm{softplus}(x) = \tfrac1\beta \log(1 + e^{\beta x}) \qquad
#   \mathrm{elu}(x) = \max(x, 0) + \alpha\,(e^{\min(x, 0)} - 1)$$
#
# **Softmax** turns scores into probabilities: $p_i = e^{x_i} / \sum_j e^{x_j}$. It does not change when the same number
# is added to all scores, which is what saves it from overflow: with $m = \max_j x_j$,
#
# $$p_i = \frac{e^{x_i - m}}{\sum_j e^{x_j - m}} \qquad \log p_i = (x_i - m) - \log \sum_j e^{x_j - m}.$$
#
# Every exponent is now at most 0 and one of them is 0, so the sum lies between 1 and the number of scores.
#
# **Overflow.** $e^x$ leaves float32 at $x = 88.7$ and float16 at $11.1$. The rule for what follows: no exponent is
# ever positive. An exponential that becomes 0 is harmless, one that becomes infinite is not.

# %% [markdown]
# ## Implementation
#
# ### Straight pieces
# ReLU is a comparison. The others of this family are sums of $\max(x, 0)$ and $\min(x, 0)$, which cost one pass over
# memory each; choosing between two branches elementwise would cost ten times as much, because the processor cannot
# guess the choices. Inside an operation we may change arrays in place, as long as the operation itself made them.


# %%
@op
def relu(xp, x):
    """max(x, 0), elementwise; nan stays nan."""
    return xp.maximum(x, 0)


@op(dtypes="float")
def leaky_relu(xp, x, *, negative_slope=0.01):
    """x where it is positive, negative_slope * x elsewhere."""
    y = xp.minimum(x, 0.0)
    y *= negative_slope
    y += xp.maximum(x, 0.0)
    return y


@op(dtypes="float")
def hardtanh(xp, x, *, min_val=-1.0, max_val=1.0):
    """x, but at least min_val and at most max_val."""
    return xp.minimum(xp.maximum(x, min_val), max_val)


def test_straight_pieces() -> None:
    x = tensor([-2.0, -0.5, 0.0, 3.0])
    assert_close(relu(x), [0, 0, 0, 3])
    assert_close(leaky_relu(x, negative_slope=0.1), [-0.2, -0.05, 0, 3])
    assert_close(hardtanh(x), [-1, -0.5, 0, 1])
    assert relu(tensor([-2, 5])).tolist() == [0, 5]  # integers stay integers


def test_nan_is_passed_on() -> None:
    x = tensor([math.nan, -1.0])
    for function in (relu, leaky_relu, hardtanh):
        assert_close(function(x) != function(x), [True, False])  # only nan differs from itself


# %% [markdown]
# ### Sigmoid
# $1 / (1 + e^{-x})$ overflows for large negative x, and $e^x / (1 + e^x)$ for large positive x. Both are the same
# number, and one formula takes the good half of each: $e^{\min(x, 0)} / (1 + e^{-|x|})$. It is also *exact* in the left
# tail, where $\sigma(x) \approx e^x$ is tiny: formulas that subtract from 1 there lose all their digits.


# %%
@op(dtypes="float")
def sigmoid(xp, x):
    """1 / (1 + exp(-x)), elementwise: between 0 and 1."""
    y = xp.exp(xp.minimum(x, 0.0))
    y /= 1 + xp.exp(-xp.abs(x))
    return y


@op(dtypes="float")
def silu(xp, x):
    """x sigmoid(x), elementwise; also known as swish."""
    y = sigmoid.function(xp, x)
    y *= x
    return y


def test_sigmoid_is_precise_in_both_tails() -> None:
    x = [-50.0, -1.0, 0.0, 1.0, 50.0]
    assert_close(sigmoid(tensor(x)), [1 / (1 + math.exp(-v)) for v in x], atol=0)
    assert sigmoid(tensor([-1e4, 1e4])).tolist() == [0, 1]
    assert_close(silu(tensor(x)), [v / (1 + math.exp(-v)) for v in x], atol=0)


# %% [markdown]
# ### Smooth bends
# GELU weighs x with the probability that a normal variable is below it. GPT-2 was trained with an approximation by
# tanh, so both are needed: weights work only with the function that they were trained with.


# %%
@op(dtypes="float")
def gelu_and_cdf(xp, x, *, approximate="none"):
    """x Φ(x), and the Φ(x) that it is made with, which takes most of the time."""
    if approximate == "none":
        cdf = xp.erf(x * math.sqrt(0.5))
    else:
        inner = x * x
        inner *= 0.044715
        inner += 1
        inner *= x
        inner *= math.sqrt(2 / math.pi)
        cdf = xp.tanh(inner)
    cdf += 1
    cdf *= 0.5
    return x * cdf, cdf


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x times the probability that a standard normal variable is below x, elementwise.

    Args:
        approximate: "none" computes it with erf; "tanh" uses GPT-2's approximation, off by 5e-4 at the most.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f'gelu: approximate must be "none" or "tanh", got {approximate!r}')
    return gelu_and_cdf(x, approximate=approximate)[0]


def test_gelu_against_its_definition() -> None:
    x = [-4.0, -1.0, -0.1, 0.0, 0.5, 2.0, 6.0]
    expected = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    assert_close(gelu(tensor(x)), expected)
    assert_close(gelu(tensor(x), approximate="tanh"), expected, atol=5e-4)
    assert "approximate" in message_of(lambda: gelu(tensor(x), approximate="tan"), error=ValueError)


# %% [markdown]
# Softplus is a ReLU with a rounded corner. With $z = \beta x$ it is
# $\log(1 + e^z) = \max(z, 0) + \log(1 + e^{-|z|})$: again no exponent is positive. PyTorch drops the second term above
# `threshold`, and so do we. ELU rounds the left side only, to a floor at $-\alpha$.


# %%
@op(dtypes="float")
def softplus(xp, x, *, beta=1.0, threshold=20.0):
    """log(1 + exp(beta * x)) / beta, elementwise; x itself where beta * x > threshold."""
    z = x * beta
    y = xp.log1p(xp.exp(-xp.abs(z)))
    y *= xp.astype(z <= threshold, x.dtype)  # a product is faster than where
    y += xp.maximum(z, 0.0)
    y /= beta
    return y


@op(dtypes="float")
def elu(xp, x, *, alpha=1.0):
    """x where it is positive, alpha * (exp(x) - 1) elsewhere."""
    y = xp.expm1(xp.minimum(x, 0.0))
    y *= alpha
    y += xp.maximum(x, 0.0)
    return y


def test_smooth_bends() -> None:
    x = [-30.0, -1.0, 0.0, 2.0, 15.0, 80.0]
    assert_close(softplus(tensor(x)), [math.log1p(math.exp(v)) for v in x], atol=0)
    assert_close(softplus(tensor(x), beta=2.0), [math.log1p(math.exp(2 * v)) / 2 for v in x], atol=0)
    assert_close(elu(tensor(x), alpha=0.5), [v if v > 0 else 0.5 * math.expm1(v) for v in x])
    assert_close(softplus(tensor([-1e4, 1e4])), [0, 1e4])


# %% [markdown]
# ### Softmax
# The two formulas from above. `log_softmax` is not the logarithm of `softmax`: where a probability is too small for
# float32 its logarithm is still an ordinary number, such as -200, and losses need it.
#
# A score of -inf means "impossible": attention masks use it. Its probability is 0. If all scores of a row are -inf
# there is no distribution to speak of, and the result is nan, as in PyTorch: better than a number that looks right.


# %%
@op(dtypes="float")
def softmax(xp, x, *, dim):
    """exp(x) / sum(exp(x)) over `dim`: not negative, and adding up to 1. nan where all of x is -inf."""
    y = x - xp.max(x, axis=dim, keepdims=True)
    y = xp.exp(y)
    y /= xp.sum(y, axis=dim, keepdims=True)
    return y


@op(dtypes="float")
def log_softmax(xp, x, *, dim):
    """log(softmax(x)) over `dim`, precise also where the probability itself is too small for its dtype."""
    y = x - xp.max(x, axis=dim, keepdims=True)
    y -= xp.log(xp.sum(xp.exp(y), axis=dim, keepdims=True))
    return y


def test_softmax_is_a_distribution() -> None:
    x = tensor([[1.0, 2.0, 3.0], [0.0, 0.0, math.log(2)]])
    assert_close(softmax(x, 1)[1], [0.25, 0.25, 0.5])
    assert_close(softmax(x, 1).sum(1), [1, 1])
    assert_close(softmax(x, dim=0).sum(0), [1, 1, 1])
    assert_close(softmax(x + 100, 1), softmax(x, 1))
    assert x[0].tolist() == [1, 2, 3]  # what is given stays as it is
    assert_close(log_softmax(x, 1), softmax(x, 1).log())


def test_softmax_survives_extremes_and_masks() -> None:
    x = tensor([[1e4, 0.0, -1e4], [-math.inf, 1.0, 1.0]])
    assert_close(softmax(x, 1), [[1, 0, 0], [0, 0.5, 0.5]])
    assert_close(log_softmax(x, 1), [[0, -1e4, -2e4], [-math.inf, -math.log(2), -math.log(2)]])


# %% [markdown]
# Activations as methods, as PyTorch has them.

# %%
Tensor.extend(relu=relu, sigmoid=sigmoid, softmax=softmax, log_softmax=log_softmax)


def test_activations_are_methods() -> None:
    x = tensor([[-1.0, 2.0]])
    assert_close(x.relu(), relu(x))
    assert_close(x.softmax(-1).log(), x.log_softmax(dim=-1))


# %% [markdown]
# ### Things to put in a network
# A network will be a list of things to call one after the other. A layer such as `LeakyReLU(0.2)` is an operation that
# remembers its attributes; since they are the fields of a dataclass, the `repr` shows them.


# %%
@dataclass(eq=False)
class Activation:
    """An operation that remembers its attributes: called with a tensor, it returns one of the same shape.

    A subclass names the `operation`; its fields are passed to it under their names.
    """

    operation: ClassVar[Callable]

    def __call__(self, x: Tensor) -> Tensor:
        return type(self).operation(x, **vars(self))


class ReLU(Activation):
    """max(x, 0)."""

    operation = relu


class Sigmoid(Activation):
    """1 / (1 + exp(-x))."""

    operation = sigmoid


class Tanh(Activation):
    """The hyperbolic tangent: between -1 and 1."""

    operation = tanh


class SiLU(Activation):
    """x sigmoid(x)."""

    operation = silu


@dataclass(eq=False)
class LeakyReLU(Activation):
    """x where it is positive, negative_slope * x elsewhere."""

    operation = leaky_relu
    negative_slope: float = 0.01


@dataclass(eq=False)
class Hardtanh(Activation):
    """x, but at least min_val and at most max_val."""

    operation = hardtanh
    min_val: float = -1.0
    max_val: float = 1.0


@dataclass(eq=False)
class GELU(Activation):
    """x times the probability that a standard normal variable is below x; approximate: "none" or "tanh"."""

    operation = gelu
    approximate: str = "none"


@dataclass(eq=False)
class Softplus(Activation):
    """log(1 + exp(beta * x)) / beta; x itself where beta * x > threshold."""

    operation = softplus
    beta: float = 1.0
    threshold: float = 20.0


@dataclass(eq=False)
class ELU(Activation):
    """x where it is positive, alpha * (exp(x) - 1) elsewhere."""

    operation = elu
    alpha: float = 1.0


@dataclass(eq=False)
class Softmax(Activation):
    """exp(x) / sum(exp(x)) over `dim`."""

    operation = softmax
    dim: int


@dataclass(eq=False)
class LogSoftmax(Activation):
    """log(softmax(x)) over `dim`."""

    operation = log_softmax
    dim: int


def test_layers_remember_their_attributes() -> None:
    x = tensor([[-1.0, 0.5]])
    assert_close(LeakyReLU(0.2)(x), [[-0.2, 0.5]])
    assert_close(Softmax(dim=1)(x), softmax(x, 1))
    assert_close(Tanh()(x), [[math.tanh(-1), math.tanh(0.5)]])
    assert repr(LeakyReLU()) == "LeakyReLU(negative_slope=0.01)"
    assert repr(ReLU()) == "ReLU()"


# %% [markdown]
# ## Systems analysis
#
# An activation does little arithmetic on each number, so what it costs is memory traffic: the passes that its array
# operations make, each reading and writing whole arrays. The least possible is to read x once and write y once, and
# ReLU does just that; the last column is the time relative to it. Each further step of a formula is another pass, and
# a function that did all steps while a number is in a register would gain nearly all of that back (module 16).
#
# The second table shows what the stable formula buys: the largest score whose exponential a dtype can hold, which is
# where the textbook's softmax ends, and what ours makes of ten times that score.


# %%
def analyze() -> None:
    """Measure the time of each activation, and the range of scores for which exp(x) / sum(exp(x)) would do."""
    functions: dict[str, Callable[[Tensor], Any]] = {
        "relu": relu, "leaky_relu": leaky_relu, "tanh": tanh, "sigmoid": sigmoid, "elu": elu, "softplus": softplus,
        "gelu, tanh": lambda x: gelu(x, approximate="tanh"), "gelu, erf": gelu, "softmax": lambda x: softmax(x, dim=1),
    }  # fmt: skip
    small, large = randn(8, 128), randn(1024, 1024)
    moved, rows, fastest = 2 * large.numel() * large.dtype.itemsize, [], 0.0
    for name, function in functions.items():
        taken = seconds(function, large)
        fastest = fastest or taken
        rows.append([name, 1e6 * seconds(function, small), 1e3 * taken, moved / taken / 1e9, taken / fastest])
    print_table(["operation", "µs for 1,024", "ms for 1,048,576", "GB/s, x and y", "times relu"], rows)
    print()
    rows = []
    for dtype in (float16, float32, float64):
        top = next(n for n in range(1, 2000) if isinf(exp(tensor(n + 1.0, dtype=dtype))))
        rows.append([dtype, top, softmax(tensor([10.0 * top, 0.0], dtype=dtype), dim=0).tolist()])
    print_table(["dtype", "exp(x) is finite up to", "softmax([10 x, 0])"], rows)


# %% [markdown]
# ## Production context
#
# In PyTorch each of these is one kernel, `aten::gelu`, `aten::_softmax`, compiled for vector instructions, which makes
# one pass over memory; `torch.nn.functional` has the functions and `torch.nn` the layers. On a GPU `torch.compile` goes
# further and fuses an activation into the matrix product before it. A softmax over long rows is computed *online*: one
# pass keeps a running maximum and a running sum, rescaled whenever the maximum grows; FlashAttention is built on that.
# Left out here: the `inplace` arguments, which save memory at the price of values that later code may still need, and
# half-precision arithmetic that computes in float32 inside.

# %% [markdown]
# ## Integration testing


# %%
def test_two_layers_need_a_bend_between_them() -> None:
    """Without one, two matrices are one; with one, they compute the XOR of two bits, which no line separates."""
    x, first, second = randn(5, 3), randn(3, 4), randn(4, 2)
    assert_close((x @ first) @ second, x @ (first @ second), rtol=1e-4, atol=1e-4)
    bits = tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    seen: list[str] = []
    with observe(lambda op, arrays, attributes, proceed: (seen.append(op.name), proceed())[1]):  # type: ignore[func-returns-value]
        hidden = ReLU()(bits @ tensor([[1.0, 1.0], [1.0, 1.0]]) + tensor([0.0, -1.0]))
        xor = hidden @ tensor([[1.0], [-2.0]])
    assert_close(xor, [[0], [1], [1], [0]])
    assert seen == ["matmul", "add", "relu", "matmul"]
    assert xor.dtype == float32


# %% [markdown]
# ## Thinking questions
#
# 1. `sigmoid` makes two exponentials where one would do. When is which of the two needed, and what would a choice
#    between them cost?
# 2. Softmax reads its row three times. How would you compute maximum and sum in one pass, and when is that worth it?
# 3. A GPT with 12 layers applies GELU to 4 x 768 numbers per token and layer. How many bytes is that per token, and how
#    does it compare with the weights of the matrices around it?
# 4. ReLU needs one bit per element to say which branch was taken, GELU needs x itself. Which is cheaper to keep around?
# 5. A row of scores is all -inf. Which result would hide the error, and where would you notice it?

# %% [markdown]
# ## Summary
#
# Eleven activations, each an operation behind the door of module 02, none of which overflows; and layers that remember
# their attributes. Module 04 puts them between matrices and calls the result a network; module 05 feeds the scores to
# losses, which lean on `log_softmax` and `softplus`.

# %%
if __name__ == "__main__":
    run_module(globals())
