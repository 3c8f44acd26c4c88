"""Activations and losses equal PyTorch's: their values, and the gradients of a random projection of them."""

from __future__ import annotations

import numpy as np
import pytest

import tinytorch.m06_autograd
import tinytorch.m06_autograd_appendix  # noqa: F401  (both give rules to what is tested here)
from tinytorch import m03_activations as activations
from tinytorch import m03_activations_appendix as more_activations
from tinytorch import m05_losses as losses
from tinytorch import m05_losses_appendix as more_losses
from tinytorch.m01_setup import assert_close
from tinytorch.m02_tensor import Tensor, sum, tensor
from tinytorch.m02_tensor_appendix import tanh

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # as the package does for its users
    pytest.mark.filterwarnings("ignore:reduction. 'mean':UserWarning"),  # PyTorch's, of kl_div
]
F = torch.nn.functional

ACTIVATIONS = {
    "relu": [{}],
    "leaky_relu": [{}, {"negative_slope": 0.3}, {"negative_slope": 0.0}, {"negative_slope": 2.0}],
    "sigmoid": [{}],
    "tanh": [{}],
    "gelu": [{}, {"approximate": "tanh"}],
    "silu": [{}],
    "softplus": [{}, {"beta": 3.0}, {"beta": 0.5, "threshold": 1.0}],
    "elu": [{}, {"alpha": 0.4}],
    "hardtanh": [{}, {"min_val": -0.3, "max_val": 0.8}],
    "softmax": [{"dim": -1}, {"dim": 0}],
    "log_softmax": [{"dim": -1}, {"dim": 0}],
    "relu6": [{}],
    "hardsigmoid": [{}],
    "hardswish": [{}],
    "mish": [{}],
    "softsign": [{}],
    "logsigmoid": [{}],
    "softmin": [{"dim": -1}],
    "threshold": [{"threshold": 0.2, "value": -3.0}],
    "tanhshrink": [{}],
    "softshrink": [{}, {"lambd": 1.0}],
    "hardshrink": [{}, {"lambd": 1.0}],
    "selu": [{}],
    "celu": [{}, {"alpha": 0.7}],
    "glu": [{}, {"dim": 0}],
}
CASES = [pytest.param(name, options, id=f"{name}-{options}") for name, each in ACTIVATIONS.items() for options in each]
SINGLE = ("hardsigmoid", "celu", "binary_cross_entropy")  # PyTorch rounds a constant in them to float32


def ours(name: str):
    if name == "tanh":
        return tanh
    homes = (activations, more_activations, losses, more_losses)
    return next(getattr(home, name) for home in homes if hasattr(home, name))


def compare(name: str, inputs: list, constants: list, options: dict, seed: int = 0) -> None:
    """Equal values, and the gradients of sum(result * random) with regard to each of `inputs`."""
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if name in SINGLE else {"rtol": 1e-10, "atol": 1e-12}
    generator = np.random.default_rng(seed)
    mine = [tensor(x, requires_grad=True) for x in inputs]
    theirs = [torch.tensor(x, requires_grad=True) for x in inputs]
    raw = [option if not isinstance(option, np.ndarray) else torch.tensor(option) for option in options.values()]
    wrapped = [option if not isinstance(option, np.ndarray) else Tensor(option) for option in options.values()]
    actual = ours(name)(*mine, *map(Tensor, constants), **dict(zip(options, wrapped, strict=True)))
    expected = getattr(F, name)(*theirs, *map(torch.tensor, constants), **dict(zip(options, raw, strict=True)))
    assert_close(actual, expected.detach().numpy(), **tolerance)
    projection = generator.standard_normal(tuple(expected.shape))
    sum(actual * Tensor(np.asarray(projection))).backward()
    (expected * torch.tensor(projection)).sum().backward()
    for mine_x, their_x in zip(mine, theirs, strict=True):
        assert_close(mine_x.grad, their_x.grad.numpy(), **tolerance)


def shapes(seed: int, least: int = 1) -> tuple[int, ...]:
    generator = np.random.default_rng(seed)
    return tuple(int(n) for n in 2 * generator.integers(1, 5, generator.integers(least, 5)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "options"), CASES)
def test_activation(name: str, options: dict, seed: int) -> None:
    x = 4 * np.random.default_rng(seed).standard_normal(shapes(seed))
    compare(name, [x], [], options, seed)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_activation_where_it_is_extreme(name: str, options: dict) -> None:
    """Values only: at the infinities slopes are nan in the one and 0 in the other, and no one is wrong."""
    x = np.array([[-1e4, -90, -20.5, -1e-6, 1e-6, 20.5, 90, 1e4], [0, 3, -np.inf, 2, 5, -1, -np.inf, 0.0]])
    if name in ("gelu", "silu", "mish", "hardswish", "softsign", "tanhshrink") or options.get("dim") == 0:
        x[x == -np.inf] = -1e4
    for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-9)):
        expected = getattr(F, name)(torch.tensor(x.astype(dtype)), **options).numpy()
        assert_close(ours(name)(Tensor(x.astype(dtype)), **options), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("count", [1, 4])
def test_prelu(count: int) -> None:
    generator = np.random.default_rng(count)
    compare("prelu", [generator.standard_normal((3, 4, 2)), generator.standard_normal(count)], [], {})


# -- losses ------------------------------------------------------------------------------------------------------------

REDUCTIONS = ["none", "mean", "sum"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mse_loss", {}),
        ("l1_loss", {}),
        ("huber_loss", {}),
        ("huber_loss", {"delta": 0.6}),
        ("smooth_l1_loss", {}),
        ("smooth_l1_loss", {"beta": 0.6}),
        ("smooth_l1_loss", {"beta": 0.0}),
        ("kl_div", {"log_target": True}),
        ("binary_cross_entropy_with_logits", {}),
        ("poisson_nll_loss", {}),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_loss_of_numbers(name: str, options: dict, reduction: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    shape = shapes(seed)
    compare(name, [generator.standard_normal(shape) for _ in range(2)], [], {**options, "reduction": reduction}, seed)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4), (2, 5, 3, 4), (5,)])
def test_cross_entropy_of_classes(
    shape: tuple, label_smoothing: float, ignore_index: int, weighted: bool, reduction: str
) -> None:
    generator = np.random.default_rng(len(shape))
    places = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = np.asarray(generator.integers(0, 5, places))
    if len(shape) > 1:
        target[0, ...] = ignore_index
    options = {"weight": generator.uniform(0.1, 2, 5)} if weighted else {}
    options |= {"reduction": reduction, "ignore_index": ignore_index}
    x = 3 * generator.standard_normal(shape)
    compare("cross_entropy", [x], [target], {**options, "label_smoothing": label_smoothing})
    compare("nll_loss", [x], [target], options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4), (5,)])
def test_cross_entropy_of_probabilities(shape: tuple, label_smoothing: float, weighted: bool, reduction: str) -> None:
    generator = np.random.default_rng(len(shape))
    options = {"weight": generator.uniform(0.1, 2, 5)} if weighted else {}
    inputs = [3 * generator.standard_normal(shape), generator.uniform(0, 1, shape)]
    compare("cross_entropy", inputs, [], {**options, "reduction": reduction, "label_smoothing": label_smoothing})


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_binary_cross_entropy(weighted: bool, reduction: str) -> None:
    generator = np.random.default_rng(4)
    bits = generator.integers(0, 2, (6, 3)).astype(float)
    options = {"weight": generator.uniform(0.1, 2, 3), "reduction": reduction} if weighted else {"reduction": reduction}
    compare("binary_cross_entropy", [generator.uniform(0.01, 0.99, (6, 3))], [bits], options)
    if weighted:
        options["pos_weight"] = generator.uniform(0.5, 4, 3)
    compare("binary_cross_entropy_with_logits", [5 * generator.standard_normal((6, 3))], [bits], options)


def test_binary_cross_entropy_of_the_certain() -> None:
    """Logarithms are cut off at -100, and slopes at a denominator of 1e-12, not at 0."""
    compare("binary_cross_entropy", [np.array([0.0, 1.0, 0.0, 1.0])], [np.array([0.0, 1.0, 1.0, 0.0])], {})


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "batchmean"])
def test_kl_div(reduction: str) -> None:
    generator = np.random.default_rng(6)
    q = generator.dirichlet(np.ones(4), 5)
    q[1, 2] = 0
    compare("kl_div", [np.log(generator.dirichlet(np.ones(4), 5))], [q], {"reduction": reduction})


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_losses_of_pairs_and_triplets(reduction: str) -> None:
    generator = np.random.default_rng(8)
    a, b, c = (generator.standard_normal((6, 4)) for _ in range(3))
    signs = np.array([1.0, -1, 1, -1, -1, 1])
    compare("cosine_embedding_loss", [a, b], [signs], {"margin": 0.1, "reduction": reduction})
    compare("margin_ranking_loss", [a[:, 0], b[:, 0]], [signs], {"margin": 0.3, "reduction": reduction})
    compare("hinge_embedding_loss", [a[:, 0]], [signs], {"margin": 0.5, "reduction": reduction})
    compare("soft_margin_loss", [a[:, 0]], [signs], {"reduction": reduction})
    for swap in (False, True):
        compare("triplet_margin_loss", [a, b, c], [], {"swap": swap, "reduction": reduction})
    compare("gaussian_nll_loss", [a, b], [np.exp(c)], {"full": True, "reduction": reduction})
    counts = generator.integers(0, 9, (6, 4)).astype(float)
    compare("poisson_nll_loss", [a], [counts], {"full": True, "reduction": reduction})
    compare("poisson_nll_loss", [np.exp(a)], [counts], {"log_input": False, "reduction": reduction})
