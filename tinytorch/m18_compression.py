"""Module 18: compression, or how a network gets by with less: fewer weights, channels and bits, and a teacher.

Learning objectives. After this module you can
1. take weights out of a network while it learns, and say why that alone makes it no faster;
2. find out which channels a network can lose, and make it really smaller without them;
3. replace a layer by two thin ones, and choose their width by the energy that is kept;
4. let weights share a few values, and store what is left in the bits that it needs;
5. train a small network with what a large one knows.
"""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import tinytorch.m16_acceleration_appendix  # noqa: F401 - the kernels, whose speed is measured
from tinytorch.backends import backend_of, get_backend
from tinytorch.m01_setup import assert_close, manual_seed, message_of, print_table, run_module, seconds
from tinytorch.m02_tensor import Tensor, abs, int64, observe, ones, randn, tensor, where
from tinytorch.m02_tensor import sum as total_of
from tinytorch.m02_tensor_appendix import (
    any as any_of,
)
from tinytorch.m02_tensor_appendix import (
    argsort,
    eye,
    index_select,
    isnan,
    ones_like,
    randint,
    vector_norm,
    zeros_like,
)
from tinytorch.m03_activations import log_softmax, relu, softmax
from tinytorch.m04_layers import Flatten, Linear, Module, Parameter, Sequential, linear, overwrite
from tinytorch.m04_layers_appendix import load as load_tensors
from tinytorch.m04_layers_appendix import save as save_tensors
from tinytorch.m05_losses import cross_entropy, kl_div
from tinytorch.m06_autograd import no_grad
from tinytorch.m07_optimizers import SGD
from tinytorch.m08_training import Callback, Trainer, accuracy, evaluating
from tinytorch.m09_spatial import BatchNorm, BatchNorm2d, Conv2d, SimpleCNN, convolution, count_flops, count_parameters
from tinytorch.m09_spatial_appendix import Conv1d
from tinytorch.m16_acceleration import reference_kernels

# %% [markdown]
# ## Mathematical foundations
#
# A trained network has more weights than it needs. What can be taken away depends on what is counted.
#
# **Sparsity.** A mask $m$ of zeros and ones makes $w = v \odot m$ of the weights $v$ that are learned; its *sparsity*
# is the share of zeros. The gradient is $\partial L / \partial v = m \odot \partial L / \partial w$: what is masked
# rests. Which weights go? Those of the smallest magnitude, which change the sum the least (Han and others, 2015). A
# network that may recover in between can lose more: from step $t_0$ to $t_1$ the sparsity rises from $s_0$ to $s_1$ as
#
# $$s_t = s_1 + (s_0 - s_1) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3,$$
#
# quickly at first, when there is much to spare (Zhu and Gupta, 2017).
#
# **Channels.** Without an output channel, a layer lacks a row of its weight, the norm behind it an entry, and whoever
# reads it a column: a row of $k^2 c$ weights and as many multiplications a pixel, and again with the reader.
#
# **Low rank.** With the singular values $\sigma_1 \ge \sigma_2 \ge \dots$ of $W = U \Sigma V^\top$ (m × n), the nearest
# matrix of rank $r$ is $W_r = U_r \Sigma_r V_r^\top$, and $\lVert W - W_r \rVert^2 = \sum_{i > r} \sigma_i^2$ (Eckart
# and Young, 1936). Two layers of $r (m + n)$ weights do its work; the *energy* kept is $\sum_{i \le r} \sigma_i^2 /
# \sum_i \sigma_i^2$.
#
# **Shared values.** $K$ values, the *codebook* $c$, and an index of $\log_2 K$ bits for each weight: $w_i = c_{k(i)}$.
# Its gradient is $\partial L / \partial c_k = \sum_{i: k(i) = k} \partial L / \partial w_i$. The best values for given
# weights are found by *k-means*: each weight takes the nearest value, each value becomes its weights' mean.
#
# **Distillation** (Hinton, Vinyals and Dean, 2015). A teacher's scores $z^T$ say more than a label: which wrong answers
# are nearly right. At a temperature $\tau$ that softens them, $p = \mathrm{softmax}(z^T / \tau)$ and $q =
# \mathrm{softmax}(z / \tau)$, the student minimizes
#
# $$L = \alpha\, \tau^2\, \mathrm{KL}(p \,\Vert\, q) + (1 - \alpha)\, \mathrm{CE}(z, y).$$
#
# The gradient of the first part shrinks as $1 / \tau^2$; hence the factor.

# %% [markdown]
# ## Implementation
#
# ### Weights that are computed
# A masked weight is a product, a shared one a choice from a codebook: neither is a parameter, both are computed from
# some. A layer that reads `self.weight` need not know. It is given a class of its own, a subclass of what it was, in
# which `weight` is a property. So it is always up to date, gradients flow to what it is computed from, and these
# tensors stand in the layer's state under their own names.

# %%
Net = TypeVar("Net", bound=Module)
Formula = Callable[..., Tensor]  # of a layer, and the name of what is computed


@cache
def computing(kind: type[Module], formulas: tuple[tuple[str, Formula], ...]) -> type[Module]:
    """A subclass of a layer's class in which some attributes are computed from others: name = formula(layer, name)."""
    values = {name: property(partial(formula, name=name)) for name, formula in formulas}
    return type(kind.__name__, (kind,), {"plain": kind, "formulas": dict(formulas), **values})


def formulas_of(layer: Module) -> dict[str, Formula]:
    """Which attributes of a layer are computed, and how."""
    return dict(getattr(type(layer), "formulas", {}))


def set_formulas(layer: Module, formulas: Mapping[str, Formula]) -> None:
    """Have a layer compute these attributes, and no others."""
    kind: Any = getattr(type(layer), "plain", type(layer))
    layer.__class__ = computing(kind, tuple(formulas.items())) if formulas else kind


def masked(layer: Module, name: str) -> Tensor:
    """The formula of a masked weight."""
    weight, mask = getattr(layer, f"{name}_orig"), getattr(layer, f"{name}_mask")
    return weight * mask.to(weight.dtype)


def custom_from_mask(module: Module, name: str, mask: Tensor) -> Module:
    """Mask a layer's parameter, on top of the mask that it may have; returns the layer.

    The Parameter itself becomes `{name}_orig`, so that an optimizer that holds it goes on; the mask, zeros and ones of
    its dtype, is the buffer `{name}_mask`; `name` is their product. These are PyTorch's names.
    """
    formulas, weight = formulas_of(module), getattr(module, name)
    if formulas.get(name, masked) is not masked or (name not in formulas and not isinstance(weight, Parameter)):
        raise ValueError(f"prune: {name!r} of {module!r:.60} is no Parameter, but a {type(weight).__name__}")
    if mask.shape != weight.shape:
        raise ValueError(f"prune: the mask has shape {mask.shape}, but {name!r} has {weight.shape}")
    if name in formulas:
        mask = getattr(module, f"{name}_mask") * mask
        overwrite(getattr(module, f"{name}_mask"), mask.to(weight.dtype).data)
        return module
    object.__delattr__(module, name)
    module.register_parameter(f"{name}_orig", weight)
    module.register_buffer(f"{name}_mask", mask.to(weight.dtype).clone())
    set_formulas(module, {**formulas, name: masked})
    return module


def remove(module: Module, name: str) -> Module:
    """Make a computed weight a Parameter again, with the values that it has; returns the layer."""
    formulas = formulas_of(module)
    if name not in formulas:
        raise ValueError(f"prune.remove: {name!r} of {module!r:.60} is neither masked nor shared")
    value, held = getattr(module, name), vars(module)
    kept = held.get(f"{name}_orig")
    weight = Parameter(value.detach(), value.watched) if kept is None else overwrite(kept, value.data)
    for part in {f"{name}_{part}" for part in ("orig", "mask", "codebook", "indices")} & vars(module).keys():
        object.__delattr__(module, part)
        module._buffers.pop(part, None)
    del formulas[name]
    set_formulas(module, formulas)
    setattr(module, name, weight)
    return module


def test_gradient_flows_through_the_mask() -> None:
    layer, x = Linear(3, 2, bias=False), tensor([[1.0, 2.0, 4.0]])
    weight = layer.weight
    custom_from_mask(layer, "weight", tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
    layer(x).sum().backward()
    assert weight.grad.tolist() == [[1, 0, 4], [0, 0, 4]]
    assert (list(layer.state_dict()), type(layer).__name__) == (["weight_orig", "weight_mask"], "Linear")
    expected = layer(x).tolist()
    assert (remove(layer, "weight").weight is weight, layer(x).tolist(), type(layer)) == (True, expected, Linear)


# %% [markdown]
# ### The smallest go
# Of what a mask still keeps, an amount with the lowest scores is taken out; a score is a magnitude, if nothing else is
# said. Masked weights have the lowest score of all, so that they are not counted twice.


# %%
def count_of(amount: float, size: int) -> int:
    """How many of `size` things an amount means: a whole number of them, or a share between 0 and 1."""
    whole = isinstance(amount, int) and not isinstance(amount, bool)
    if not 0 <= amount <= (size if whole else 1):
        raise ValueError(f"prune: the amount must be between 0 and 1, or a whole number up to {size}, got {amount}")
    return int(amount) if whole else round(amount * size)


def without_lowest(mask: Tensor, scores: Tensor, amount: float) -> Tensor:
    """A mask like the given one, without an amount of what it keeps: that of the lowest scores."""
    left = int(mask.sum())
    lowest = argsort(where(mask > 0, scores, -math.inf).flatten())
    flat = mask.flatten().clone()
    flat[lowest[: mask.numel() - left + count_of(amount, left)]] = 0
    return flat.reshape(mask.shape)


def mask_of(module: Module, name: str) -> Tensor:
    """The mask of a layer's parameter; ones where it has none."""
    mask = vars(module).get(f"{name}_mask")
    return ones_like(getattr(module, name).detach()) if mask is None else mask


@no_grad
def l1_unstructured(module: Module, name: str, amount: float, importance_scores: Tensor | None = None) -> Module:
    """Mask the weights of the smallest magnitude, or of the lowest scores; returns the layer.

    Args:
        amount: a share of those that are not masked yet, or how many.
    """
    scores = abs(getattr(module, name)) if importance_scores is None else importance_scores
    return custom_from_mask(module, name, without_lowest(mask_of(module, name), scores, amount))


def test_the_smallest_go_and_a_second_time_the_smallest_of_the_rest() -> None:
    layer = Linear(5, 1)
    overwrite(layer.weight, tensor([[0.1, -0.5, 0.3, -0.2, 0.4]]).data)
    assert l1_unstructured(layer, "weight", 0.4).weight_mask.tolist() == [[0, 1, 1, 0, 1]]
    assert l1_unstructured(layer, "weight", 1).weight_mask.tolist() == [[0, 1, 0, 0, 1]]
    assert without_lowest(tensor([1.0, 0.0, 1.0]), tensor([3.0, 9.0, 2.0]), 1).tolist() == [1, 0, 0]
    assert "a whole number up to 2, got 3" in message_of(l1_unstructured, layer, "weight", 3, error=ValueError)


# %% [markdown]
# ### Gradual pruning
# A callback of module 08. What it has masked stands in the network's state, so a resumed run goes on by itself: the
# sparsity is a function of the step.


# %%
def cubic_sparsity(step: int, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """The share of zeros after a step: `initial` up to `begin`, `final` from `end` on (Zhu and Gupta, 2017)."""
    left = 1 - min(max((step - begin) / (end - begin), 0.0), 1.0)
    return final + (initial - final) * left**3


def weights_of(network: Module) -> list[tuple[Module, str]]:
    """(layer, "weight") of each linear layer and convolution: what is usually pruned."""
    return [(m, "weight") for m in network.modules() if isinstance(m, (Linear, Conv1d, Conv2d))]


class GradualPruning(Callback):
    """Masks more and more of a network's weights while it is trained, each tensor's smallest first.

    Args:
        parameters: (layer, name) of what is masked; `weights_of(network)` for all. They get masks at once, of ones, so
            that a checkpoint can be loaded.
        final, initial: the share of zeros at step `end`, and at step `begin`.
        every: steps between two changes.
    """

    def __init__(
        self, parameters: Sequence[tuple[Module, str]], final: float, begin: int, end: int, every: int = 100,
        initial: float = 0.0,
    ) -> None:  # fmt: skip
        if not (0 <= initial <= final <= 1 and 0 <= begin < end and every >= 1):
            raise ValueError(f"GradualPruning: expected 0 <= initial <= final <= 1, 0 <= begin < end and every >= 1, "
                             f"got {initial}, {final}, {begin}, {end}, {every}")  # fmt: skip
        self.parameters, self.begin, self.end, self.every = list(parameters), begin, end, every
        self.final, self.initial = final, initial
        for layer, name in self.parameters:
            custom_from_mask(layer, name, mask_of(layer, name))

    def on_step_end(self, trainer: Trainer) -> None:
        since = trainer.step - self.begin
        if since >= 0 and trainer.step <= self.end and (since % self.every == 0 or trainer.step == self.end):
            sparsity = cubic_sparsity(trainer.step, self.begin, self.end, self.final, self.initial)
            for layer, name in self.parameters:
                mask = mask_of(layer, name)
                more = round(sparsity * mask.numel()) - (mask.numel() - int(mask.sum()))
                l1_unstructured(layer, name, max(0, more))


def test_sparsity_rises_quickly_and_then_slowly() -> None:
    assert_close([cubic_sparsity(t, 10, 20, 0.8) for t in (0, 10, 15, 20, 99)], [0, 0, 0.7, 0.8, 0.8])
    layer, seen = Linear(16, 8), []
    pruning = GradualPruning([(layer, "weight")], 0.75, begin=2, end=6, every=2, initial=0.25)
    for step in range(1, 8):
        pruning.on_step_end(SimpleNamespace(step=step))  # type: ignore[arg-type]
        seen.append(int(layer.weight_mask.sum()) / 128)
    assert seen == [1, 0.75, 0.75, 0.3125, 0.3125, 0.25, 0.25]  # 0.6875 of zeros half way


# %% [markdown]
# ### Which channels are free?
# Zeros in a weight are still multiplied with. To be rid of the work, a channel must go, and with it whatever reads it.
# Who does? In a list of layers one can see it; in a network whose `forward` is any program, we ask the program. Let
# each layer's output be zeros, except for one layer, where example c of a batch has nan in channel c. Nan goes through
# activations, norms, pooling and flattening: where it is found in a layer's input, that feature is made of channel c.
# One call finds all readers of a layer. An observer leaves out most products, which nobody needs.

# %%
SIZES: dict[type[Module], tuple[str, str]] = {  # the attributes that hold the number of inputs, and of outputs
    Linear: ("in_features", "out_features"),
    Conv1d: ("in_channels", "out_channels"),
    Conv2d: ("in_channels", "out_channels"),
}


def sizes_of(layer: Module) -> tuple[str, str] | None:
    """What `SIZES` says of a layer; None for one that cannot lose a channel: of another kind, or in groups."""
    return SIZES.get(type(layer)) if getattr(layer, "groups", 1) == 1 else None


def features_with_nan(layer: Module, x: Tensor, count: int) -> Tensor:
    """(count, features) of a layer's input, True where there is nan. All, where its rows are not `count` examples."""
    axis = x.ndim - 1 if isinstance(layer, Linear) else 1
    if x.shape[0] != count:
        return ones(count, x.shape[axis], device=x.device) > 0
    return any_of(isnan(x), dim=tuple(d for d in range(1, x.ndim) if d != axis)) if x.ndim > 2 else isnan(x)


def with_marks(layer: Module, output: Tensor, count: int) -> Tensor:
    """Zeros of an output's shape, with nan in channel c of example c. Only nan, where its rows are not the examples."""
    if output.shape[0] != count:
        return output * math.nan
    axis = output.ndim - 1 if isinstance(layer, Linear) else 1
    marks = where(eye(count, device=output.device) > 0, math.nan, 0.0).to(output.dtype)
    return zeros_like(output) + marks.reshape([count if d in (0, axis) else 1 for d in range(output.ndim)])


@no_grad
@reference_kernels()
def follow(network: Module, source: Module | None, example: Tensor) -> dict[Module | None, Tensor]:
    """Where the output channels of a layer are read: (channels, features) of booleans for each layer with parameters.

    Args:
        source: None stands for all that no layer of `SIZES` makes: the network's input, an embedding.
        example: an input of the network, of which the first row is used.

    Returns:
        Under None, whether the network's output, one tensor, is reached.
    """
    count = 1 if source is None else getattr(source, SIZES[type(source)][1])
    x = example[:1].expand(count, *example.shape[1:])
    if source is None and x.dtype.is_floating_point:
        x = x * math.nan
    seen: dict[Module | None, Tensor] = {}
    weights = {id(m.weight.data) for m in network.modules() if sizes_of(m)}

    def look(layer: Module, inputs: tuple, output: Tensor) -> Tensor | None:
        marks = features_with_nan(layer, inputs[0], count)
        seen[layer] = marks | seen[layer] if layer in seen else marks
        if layer is source:
            return with_marks(layer, output, count)
        if sizes_of(layer):
            return zeros_like(output)
        return output * math.nan if source is None and not isinstance(layer, BatchNorm) else None

    def zeros_for_products(operation: Any, arrays: list, attributes: dict, proceed: Callable) -> Any:
        if operation not in (linear, convolution) or id(arrays[1]) not in weights:
            return proceed()
        x, rows = arrays[0], arrays[1].shape[0]
        shape = (*x.shape[:-1], rows) if operation is linear else (x.shape[0], rows, *attributes["windows"].count)
        return backend_of(x).zeros(shape, dtype=x.dtype)

    parts = [m for m in network.modules() if isinstance(m, BatchNorm) or [*m.parameters(recurse=False)]]
    handles = [layer.register_forward_hook(look) for layer in parts]
    try:
        with evaluating(network), observe(zeros_for_products):
            output = network(x)
    finally:
        for handle in handles:
            handle.remove()
    return {**seen, None: any_of(isnan(output))}


def test_marks_are_found_where_a_channel_is_read() -> None:
    net = Sequential(Conv2d(1, 2, 3), BatchNorm2d(2), relu, Flatten(), Linear(8, 3), Linear(3, 1))
    found = follow(net, net[0], randn(1, 1, 4, 4))
    assert found[net[1]].tolist() == [[True, False], [False, True]]
    assert found[net[4]].tolist() == [[True] * 4 + [False] * 4, [False] * 4 + [True] * 4]
    assert not found[net[5]].any()  # the linear layer between them reads it


# %% [markdown]
# A channel may go if every feature that it reaches is its own: reached by one channel of one layer, and read by layers
# that can do without. So a residual block's inner channels are free; those of the sum, which several layers write to,
# are not, nor are a network's outputs.


# %%
def free_channels(network: Module, example: Tensor) -> dict[Module, dict[Module, Tensor]]:
    """The layers whose output channels can be removed, and for each of them its readers, as `follow` finds them."""
    layers = [m for m in network.modules() if sizes_of(m)]
    found = {source: follow(network, source, example) for source in [None, *layers]}
    uses = Counter(id(p) for m in network.modules() for p in m.parameters(recurse=False))
    free: dict[Module, dict[Module, Tensor]] = {}
    for layer in layers:
        readers = {m: marks for m, marks in found[layer].items() if marks.any()}
        others = [found[source] for source in found if source is not layer]
        alone = all(own_features(marks, [other[m] for other in others if m in other]) for m, marks in readers.items())
        known = [m for m in [layer, *readers] if m is not None and (sizes_of(m) or isinstance(m, BatchNorm))]
        single = all(uses[id(p)] == 1 for m in known for p in m.parameters(recurse=False))
        if readers and len(known) == 1 + len(readers) and alone and single:
            free[layer] = {m: marks for m, marks in readers.items() if m is not None}
    return free


def own_features(marks: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether no feature is reached by two channels of a layer, or by one and from elsewhere."""
    counts = total_of(marks.to(int64), dim=0)
    return int(counts.max()) <= 1 and not any((any_of(other, dim=0) & (counts > 0)).any() for other in others)


# %% [markdown]
# ### Removing them
# First it is decided which channels stay, from the whole network; then each layer keeps its rows and columns. The
# network is a copy, since whoever trained it, an optimizer for instance, holds parameters of the old shapes.


# %%
def channel_scores(by: str, layer: Any, readers: Mapping[Module, Tensor]) -> Tensor | None:
    """How much each output channel matters; None where that cannot be said.

    Args:
        by: the norm of its weights, "l1" or "l2" (Li and others, 2017), or the "scale" that the batch norm behind it
            has learned (Liu and others, 2017); layers that have none are left alone then.
    """
    if by == "scale":
        norms = [m for m in readers if isinstance(m, BatchNorm) and m.weight is not None]
        return abs(norms[0].weight) if norms else None
    if by not in ("l1", "l2"):
        raise ValueError(f"prune_channels: by must be 'l1', 'l2' or 'scale', got {by!r}")
    rows = layer.weight.reshape(layer.weight.shape[0], -1)
    return abs(rows).sum(1) if by == "l1" else vector_norm(rows, dim=1)


def keep(layer: Any, names: Sequence[str], flags: Tensor, axis: int) -> int:
    """Of a layer's tensors, keep the places along an axis that have a True; returns how many these are."""
    places = tensor([place for place, flag in enumerate(flags.tolist()) if flag], dtype=int64, device=flags.device)
    for name in names:
        x = getattr(layer, name, None)
        if x is not None:
            kept = index_select(x.detach(), axis, places)
            setattr(layer, name, Parameter(kept, x.watched) if isinstance(x, Parameter) else kept)
    return len(places)


def resize(layer: Any, outputs: Tensor | None, inputs: Tensor | None) -> None:
    """Have a layer keep the output channels and the input features that have a True; None keeps all."""
    in_name, out_name = SIZES.get(type(layer), ("", ""))
    if outputs is not None:
        setattr(layer, out_name, keep(layer, ("weight", "bias"), outputs, 0))
    if inputs is not None and isinstance(layer, BatchNorm):
        layer.num_features = keep(layer, ("weight", "bias", "running_mean", "running_var"), inputs, 0)
    elif inputs is not None:
        setattr(layer, in_name, keep(layer, ("weight",), inputs, 1))


@no_grad
def prune_channels(network: Net, example: Tensor, amount: float | Mapping[str, float], by: str = "l1") -> Net:
    """A smaller copy of a network, without its layers' least important channels. One channel a layer stays always.

    Args:
        example: an input of the network, by which it is found out who reads what.
        amount: how many of each layer's channels go, a share or a number; or that by the names of layers, and others
            are left alone.
        by: as `channel_scores` has it.

    Raises:
        ValueError: a layer that was named has no channel that is free to go, or weights are masked or shared.
    """
    if any(formulas_of(m) for m in network.modules()):
        raise ValueError("prune_channels: some weights are masked or shared; make them plain by prune.remove first")
    smaller = copy.deepcopy(network)
    names, free = {m: name for name, m in smaller.named_modules()}, free_channels(smaller, example)
    amounts = amount if isinstance(amount, Mapping) else {names[layer]: amount for layer in free}
    known = {names[layer] for layer in free}
    if wrong := amounts.keys() - known:
        raise ValueError(f"prune_channels: no channel is free to go in {', '.join(sorted(wrong))}; there are in "
                         f"{', '.join(sorted(known)) or 'no layer'}")  # fmt: skip
    outputs, inputs = dict[Module, Tensor](), dict[Module, Tensor]()  # True for what stays
    for layer, readers in free.items():
        scores = channel_scores(by, layer, readers) if names[layer] in amounts else None
        if scores is None:
            continue
        count = min(count_of(amounts[names[layer]], len(scores)), len(scores) - 1)
        outputs[layer] = without_lowest(ones_like(scores), scores, count) > 0
        for reader, marks in readers.items():
            lost = any_of(marks & ~outputs[layer].unsqueeze(1), dim=0)
            inputs[reader] = ~lost & inputs[reader] if reader in inputs else ~lost
    for layer in {**outputs, **inputs}:
        resize(layer, outputs.get(layer), inputs.get(layer))
    with evaluating(smaller):
        smaller(example)  # a network whose code counts on a size says so here
    return smaller


def test_a_network_without_its_silent_channels_says_the_same() -> None:
    net, x = SimpleCNN(3, 10, 8, widths=(8, 8), hidden=12), randn(4, 3, 8, 8)
    for p in (*net[0].parameters(), *net[3].parameters(), *net[7].parameters()):
        p.data[::2] = 0.0
    smaller = prune_channels(net, x, 0.5)
    assert_close(smaller(x), net(x), rtol=1e-4, atol=1e-5)
    assert [smaller[i].weight.shape for i in (0, 3, 7, 9)] == [(4, 3, 3, 3), (4, 4, 3, 3), (6, 16), (10, 6)]
    assert count_flops(smaller, x)["convolution"] == 4 * 2 * 9 * (64 * 4 * 3 + 16 * 4 * 4)


# %% [markdown]
# ### Two thin layers for a thick one
# A convolution's weight is a matrix too: a row for each output channel, a column for each place of its window. The
# right factor is then a convolution to r channels, the left one a mixture of these at each pixel, a convolution of 1×1.


# %%
def rank_of_energy(singular_values: Sequence[float], energy: float) -> int:
    """The lowest rank at which the squares of the singular values, largest first, add up to this share of all."""
    if not 0 < energy <= 1:
        raise ValueError(f"factorized: energy is a share above 0 and at most 1, got {energy}")
    totals = list(accumulate(value * value for value in singular_values))
    return 1 + sum(total < energy * totals[-1] for total in totals)


def thin_layers(layer: Any, rank: int) -> Sequential:
    """Two new layers in a row that have a Linear's or Conv2d's inputs and outputs, and `rank` features in between."""
    options: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    first: Module
    if isinstance(layer, Linear):
        first = Linear(layer.in_features, rank, bias=False, **options)
        return Sequential(first, Linear(rank, layer.out_features, layer.bias is not None, **options))
    options |= {"padding_mode": layer.padding_mode}
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    first = Conv2d(layer.in_channels, rank, *geometry, bias=False, **options)
    return Sequential(first, Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None, **options))


def factorized(layer: Any, rank: int | None = None, energy: float | None = None) -> Sequential:
    """Two layers in a row that do a Linear's or a Conv2d's work by its weight's nearest matrix of low rank.

    Args:
        rank: how many features there are between the two.
        energy: instead, the share of the squared singular values that must be kept; the lowest such rank is taken.
    """
    if sizes_of(layer) is None or isinstance(layer, Conv1d) or (rank is None) == (energy is None):
        raise ValueError(f"factorized: expected a Linear or a Conv2d without groups, and rank or energy; got "
                         f"{layer!r:.60}, rank={rank}, energy={energy}")  # fmt: skip
    weight, host = layer.weight, get_backend("cpu")  # the standard's SVD is optional, NumPy's is there
    rows = host.astype(backend_of(weight.data).to_numpy(weight.data), host.float64).reshape(weight.shape[0], -1)
    left, values, right = host.linalg.svd(rows, full_matrices=False)
    rank = rank_of_energy(values.tolist(), energy) if energy is not None else rank
    if rank is None or not 1 <= rank <= len(values):
        raise ValueError(f"factorized: rank must be between 1 and {len(values)}, got {rank}")
    both, root = thin_layers(layer, rank), host.sqrt(values[:rank])  # to both, so that they are of one scale
    for part, factor in ((both[0], root[:, None] * right[:rank]), (both[1], left[:, :rank] * root)):
        part.load_state_dict({"weight": factor.reshape(part.weight.shape)}, strict=False)
    if layer.bias is not None:
        overwrite(both[1].bias, layer.bias.data)
    return both


def test_full_rank_is_the_layer_and_the_error_is_what_was_left_out() -> None:
    manual_seed(1)
    conv, x = Conv2d(3, 8, 3, stride=2, padding=1), randn(2, 3, 7, 7)
    assert_close(factorized(conv, rank=8)(x), conv(x), rtol=1e-4, atol=1e-5)
    layer = Linear(6, 4)
    both = factorized(layer, rank=2)
    values = get_backend("cpu").linalg.svd(layer.weight.detach().numpy()).S
    assert_close(((both[1].weight @ both[0].weight - layer.weight) ** 2).sum(), float((values[2:] ** 2).sum()))
    assert (rank_of_energy([2.0, 1.0, 1.0], 2 / 3), rank_of_energy([2.0, 1.0, 1.0], 0.7)) == (1, 2)


# %% [markdown]
# ### Shared values
# In one dimension k-means is quick: the weights that take a value are neighbours, once they are sorted, and sums over
# neighbours are differences of a running sum. It starts from values spread evenly, so that large weights, which matter
# most, get values of their own.


# %%
def k_means(values: Tensor, count: int, rounds: int = 50) -> Tensor:
    """`count` values at most, ascending, such that each is the mean of the elements of `values` that are nearest it."""
    host = get_backend("cpu")
    if not values.numel():
        raise ValueError("k_means: there is no value to begin with")
    ascending = host.sort(host.astype(backend_of(values.data).to_numpy(values.data), host.float64).reshape(-1))
    sums = host.concat([host.zeros(1), host.cumulative_sum(ascending)])
    centres, before = host.linspace(ascending[0], ascending[-1], count), None
    for _ in range(rounds):
        borders = host.searchsorted(ascending, (centres[1:] + centres[:-1]) / 2)
        borders = host.concat([host.asarray([0]), borders, host.asarray([len(ascending)])])
        if before is not None and len(before) == len(borders) and host.all(before == borders):
            break
        sizes, before = borders[1:] - borders[:-1], borders
        centres = ((sums[borders[1:]] - sums[borders[:-1]])[sizes > 0]) / sizes[sizes > 0]
    return tensor(centres, dtype=values.dtype, device=values.device)


def nearest(values: Tensor, codebook: Tensor) -> Tensor:
    """For each element, the number of the nearest of at most 256 values that ascend; bytes."""
    indices = zeros_like(values, dtype="uint8")
    for middle in ((codebook[1:] + codebook[:-1]) / 2).tolist():
        indices += (values > middle).to("uint8")
    return indices


def shared(layer: Module, name: str) -> Tensor:
    """The formula of a weight with shared values."""
    codebook, indices = getattr(layer, f"{name}_codebook"), getattr(layer, f"{name}_indices")
    weight = index_select(codebook, 0, indices.to(int64).flatten()).reshape(indices.shape)
    mask = vars(layer).get(f"{name}_mask")
    return weight if mask is None else weight * mask


def share_weights(module: Module, name: str = "weight", bits: int = 4) -> Module:
    """Have a layer's weights share 2^bits values, at most 256, which can be trained on; returns the layer.

    The values are the Parameter `{name}_codebook`, so an optimizer must be made anew; which of them each weight has is
    the buffer `{name}_indices`. What is masked stays masked. (Han, Mao and Dally, 2015: "trained quantization".)
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"share_weights: bits must be between 1 and 8, got {bits}")
    formulas = formulas_of(module)
    weight, mask = getattr(module, name), vars(module).get(f"{name}_mask")
    if weight is None or formulas.get(name, masked) is not masked:
        raise ValueError(f"share_weights: {name!r} of {module!r:.60} is None, or shared already")
    watched, weight = weight.watched, weight.detach()
    codebook = k_means(weight if mask is None else weight[mask > 0], 2**bits)
    object.__delattr__(module, name if mask is None else f"{name}_orig")
    module.register_parameter(f"{name}_codebook", Parameter(codebook, watched))
    module.register_buffer(f"{name}_indices", nearest(weight, codebook))
    set_formulas(module, {**formulas, name: shared})
    return module


def test_each_value_is_the_mean_of_those_that_take_it() -> None:
    values = tensor([0.0, 5.0, 0.2, 5.4, -3.0])
    assert_close(codebook := k_means(values, 3), [-3, 0.1, 5.2])
    assert nearest(values, codebook).tolist() == [1, 2, 1, 2, 0]
    assert_close(k_means(tensor([0.0, 4.4, 5.0, 5.0, 9.0]), 2), [0, 5.85])  # 4.4 is at first in the lower half
    layer = custom_from_mask(Linear(5, 1, bias=False), "weight", tensor([[1.0, 1.0, 0.0, 1.0, 1.0]]))
    overwrite(layer.weight_orig, tensor([[0.0, 5.0, 9.0, 5.4, 0.2]]).data)
    assert_close(share_weights(layer, bits=1).weight, [[0.1, 5.2, 0, 5.2, 0.1]])
    layer(tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert layer.weight_codebook.grad.tolist() == [1 + 5, 2 + 4]


# %% [markdown]
# ### A teacher
# The trainer gives a loss the student's scores and the labels; the teacher needs the inputs. So the loss puts a hook on
# the student, and keeps what it was last called with. When the student is evaluated there is no teacher, so that the
# validation loss of a student with and of one without can be compared.


# %%
def distillation_loss(
    scores: Tensor, teacher_scores: Tensor, targets: Tensor, temperature: float = 4.0, alpha: float = 0.9,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:  # fmt: skip
    """alpha τ² KL(teacher || student) of scores (N, C) softened by τ, plus (1 - alpha) the loss of targets (N,).

    (Hinton, Vinyals and Dean, 2015.) It is the mean over the batch; no gradient goes to the teacher.
    """
    soft = softmax(teacher_scores.detach() / temperature, dim=1)
    divergence = kl_div(log_softmax(scores / temperature, dim=1), soft, reduction="batchmean")
    return divergence * (alpha * temperature**2) + loss(scores, targets) * (1 - alpha)


class DistillationLoss:
    """`distillation_loss` as a function of a student's outputs and the targets, as a Trainer and other loops call it.

    Args:
        loss: of outputs and targets; alone it is the loss of a student that is being evaluated.
    """

    def __init__(
        self, student: Module, teacher: Module, temperature: float = 4.0, alpha: float = 0.9,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    ) -> None:  # fmt: skip
        if not temperature > 0 or not 0 <= alpha <= 1:
            raise ValueError(f"DistillationLoss: expected temperature > 0 and 0 <= alpha <= 1, got {temperature} and "
                             f"{alpha}")  # fmt: skip
        self.student, self.teacher, self.temperature, self.alpha, self.loss = student, teacher, temperature, alpha, loss
        self._inputs: Tensor | None = None

        def remember(module: Module, inputs: tuple, output: Tensor) -> None:
            if module is student:  # and not a copy, which has the hook too
                self._inputs = inputs[0] if student.training else None

        student.register_forward_hook(remember)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        inputs, self._inputs = self._inputs, None
        if not self.student.training:
            return self.loss(outputs, targets)
        if inputs is None or len(inputs) != len(outputs):
            raise RuntimeError("DistillationLoss: call the student right before its loss: the teacher gets its inputs")
        with no_grad(), evaluating(self.teacher):
            known = self.teacher(inputs)
        return distillation_loss(outputs, known.to(outputs.dtype), targets, self.temperature, self.alpha, self.loss)


def test_a_student_that_agrees_has_nothing_to_learn_from_the_teacher() -> None:
    scores, labels = tensor([[1.0, 3.0], [2.0, -1.0]]), tensor([1, 0])
    assert_close(distillation_loss(scores, scores, labels, 2.0, 0.75), 0.25 * cross_entropy(scores, labels))
    student, teacher, x = Linear(2, 2), Linear(2, 2), randn(3, 2)
    loss = DistillationLoss(student, teacher, temperature=2.0, alpha=1.0)
    p, q = softmax(teacher(x) / 2, 1), softmax(student(x) / 2, 1)
    assert_close(loss(student(x), tensor([0, 1, 1])), 4 * (p * (p / q).log()).sum() / 3, rtol=1e-4)
    loss(student(x), tensor([0, 1, 1])).backward()
    assert (student.weight.grad is not None, teacher.weight.grad) == (True, None)
    assert_close(loss(student.eval()(x), tensor([0, 1, 1])), cross_entropy(student(x), tensor([0, 1, 1])))


# %% [markdown]
# ### Small on disk
# Zeros and shared values cost as much as others until a file leaves them out. How to store a tensor can be seen from
# its values: where many are zero, a bit for each says which are not, and only these are kept; where few values are
# different, a codebook and an index of as many bits as it takes. Both are exact. All is bytes in a safetensors file.

# %%
FORMAT = "1"


def pack_bits(numbers: Any, bits: int) -> Any:
    """A NumPy array of whole numbers below 2^bits as bytes, the lowest bit of the first number first."""
    host = get_backend("cpu")
    flat = (numbers.reshape(-1, 1) >> host.arange(bits)) & 1
    flat = host.concat([flat.reshape(-1), host.zeros(-flat.size % 8, dtype=flat.dtype)])
    return host.astype((flat.reshape(-1, 8) << host.arange(8)).sum(1), host.uint8)


def unpack_bits(packed: Any, bits: int, count: int) -> Any:
    """The `count` numbers that `pack_bits` was given, int64."""
    host = get_backend("cpu")
    flat = (host.astype(packed, host.int64).reshape(-1, 1) >> host.arange(8)) & 1
    return (flat.reshape(-1)[: count * bits].reshape(count, bits) << host.arange(bits)).sum(1)


def encode(x: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parts, how) of a tensor: NumPy arrays by what they are, and what is needed to make it of them."""
    host, values = get_backend("cpu"), x.numpy()
    parts, how = {}, dict[str, Any](shape=list(x.shape), dtype=str(x.dtype))
    if not x.dtype.is_floating_point or x.numel() < 64:
        return {"values": values}, how
    values, kept = values.reshape(-1), values.reshape(-1) != 0
    if kept.mean() < 1 - 1 / (8 * x.dtype.itemsize):  # what is saved is more than the bit for each element
        parts["kept"], values = pack_bits(host.astype(kept, host.int64), 1), values[kept]
    codebook, numbers = host.unique_inverse(values)
    bits = max(1, (len(codebook) - 1).bit_length())
    if bits <= 8 and codebook.nbytes + len(values) * bits / 8 < values.nbytes:
        how |= {"bits": bits, "count": len(values)}
        return parts | {"codebook": codebook, "indices": pack_bits(numbers.reshape(-1), bits)}, how
    return parts | {"values": values if "kept" in parts else values.reshape(x.shape)}, how


def decode(parts: Mapping[str, Any], how: Mapping[str, Any]) -> Any:
    """The NumPy array that `encode` was given."""
    host, shape = get_backend("cpu"), tuple(how["shape"])
    coded = "codebook" in parts
    values = parts["codebook"][unpack_bits(parts["indices"], how["bits"], how["count"])] if coded else parts["values"]
    if "kept" in parts:
        out = host.zeros(math.prod(shape), dtype=values.dtype)
        out[unpack_bits(parts["kept"], 1, out.size) > 0] = values
        values = out
    return values.reshape(shape)


def made_plain(network: Net) -> Net:
    """A copy of a network in which no weight is masked or shared: each is a Parameter with the values that it had."""
    plain = copy.deepcopy(network)
    for module in list(plain.modules()):
        for name in formulas_of(module):
            remove(module, name)
    return plain


def save_compressed(network: Module, path: str | os.PathLike) -> int:
    """Write a network's state, each tensor in the smallest form that is exact; returns the bytes on disk.

    The old file stays, or all is new. A weight of -0.0 in a tensor with many zeros becomes 0.0.
    """
    tensors, hows = {}, {}
    for name, x in made_plain(network).state_dict().items():
        parts, hows[name] = encode(x)
        tensors.update({f"{name}:{part}": value for part, value in parts.items()})
    save_tensors(tensors, path, {"tinytorch.compressed": FORMAT, "tensors": json.dumps(hows)})
    return Path(path).stat().st_size


def load_compressed(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors by name that `save_compressed` wrote, for `load_state_dict`.

    Raises:
        ValueError: with the file's name, if it is damaged or no such file.
    """
    found = load_tensors(path, device="cpu")
    if found.metadata.get("tinytorch.compressed") != FORMAT:
        raise ValueError(f"load_compressed: {os.fspath(path)}: not a file that save_compressed wrote")
    parts: dict[str, dict[str, Any]] = {}
    for key, x in found.items():
        name, _, part = key.rpartition(":")
        parts.setdefault(name, {})[part] = x.numpy()
    hows = json.loads(found.metadata["tensors"])
    return {name: tensor(decode(parts[name], how), dtype=how["dtype"]) for name, how in hows.items()}


def test_what_is_read_is_what_was_written_and_small() -> None:
    manual_seed(2)
    net = Sequential(Linear(64, 64, bias=False), Linear(64, 64, bias=False), Linear(64, 64, bias=False))
    l1_unstructured(net[0], "weight", 0.75)
    share_weights(l1_unstructured(net[1], "weight", 0.75), bits=3)
    with tempfile.TemporaryDirectory() as folder:
        size, read = save_compressed(net, Path(folder, "net")), load_compressed(Path(folder, "net"))
    assert {name: x.tolist() for name, x in read.items()} == {f"{i}.weight": net[i].weight.tolist() for i in range(3)}
    numbers = 4096 / 8 + 1024 * 4 + 4096 / 8 + 1024 * 3 / 8 + 8 * 4 + 4096 * 4
    assert numbers < size < numbers + 1200  # the header


# %% [markdown]
# ## Systems analysis
#
# Five ways to have a smaller CNN. Masks and shared values make the file small and nothing else: the arithmetic is the
# same, and the weight is computed on top. Fewer channels and thin layers make everything smaller, in different places.


# %%
def analyze() -> None:
    """Measure parameters, non-zeros, FLOPs, bytes on disk and milliseconds of a CNN made smaller in five ways."""
    manual_seed(0)
    net, x = SimpleCNN(batch_norm=True), randn(64, 3, 32, 32)
    net.eval()
    pruned, both = copy.deepcopy(net), copy.deepcopy(net)
    for (layer, name), (other, _) in zip(weights_of(pruned), weights_of(both), strict=True):
        share_weights(l1_unstructured(other, name, 0.9), name, bits=5)
        l1_unstructured(layer, name, 0.9)
    thin = lambda layer: factorized(layer, energy=0.5) if type(layer) in (Linear, Conv2d) else layer
    networks = {
        "as it is": net,
        "9 of 10 weights masked": pruned,
        "and the rest share 32 values": both,
        "half of the channels": prune_channels(net, x, 0.5),
        "thin layers of half the energy": Sequential(*(thin(layer) for layer in net)),
    }
    rows = []
    for name, network in networks.items():
        with tempfile.TemporaryDirectory() as folder, no_grad():
            size = save_compressed(network, Path(folder, "net.safetensors"))
            taken = seconds(network, x)
        plain, flops = made_plain(network), sum(count_flops(network, x).values())
        filled = sum(int((p != 0).sum()) for p in plain.parameters())
        rows.append([name, count_parameters(plain), filled, flops / 1e6, size, taken * 1e3])
    print_table(["SimpleCNN, batch 64", "parameters", "not 0", "MFLOP", "bytes on disk", "ms"], rows)


# %% [markdown]
# ## Production context
#
# `torch.nn.utils.prune` has masks under the names that are used here, and makes the product in a hook before each
# forward. Its masks, too, make nothing faster. Hardware takes part where zeros have an order: NVIDIA's tensor cores
# multiply at twice the rate where of four neighbours two are zero (`torch.sparse.to_sparse_semi_structured`; the
# appendix makes such masks). `torch-pruning` removes channels of residual sums, too, which stay here. Left out: second
# derivatives as scores (Optimal Brain Damage, SparseGPT), Huffman's code behind the codebook, more than two factors.

# %% [markdown]
# ## Integration testing
#
# A network learns where a bar points; half of its channels go, the rest is masked and shared, and it still knows.


# %%
def bars(count: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures (N, 1, 8, 8) with a bar, and which way it points."""
    pictures, labels = randn(count, 1, 8, 8) * 0.3, randint(2, (count,))
    for n, label in enumerate(labels.tolist()):
        pictures[n, 0, n % 8 if label else slice(None), slice(None) if label else n % 8] += 1.0
    return pictures, labels


def test_a_compressed_network_still_knows() -> None:
    manual_seed(1)
    batches, test = [bars(64) for _ in range(4)], bars(256)
    net = SimpleCNN(1, 2, 8, widths=(8, 16), hidden=16, batch_norm=True)
    fit = lambda net: Trainer(net, SGD(net.parameters(), lr=0.05, momentum=0.9), cross_entropy).fit(batches, 6)
    fit(net)
    smaller = prune_channels(net, test[0], 0.5, by="scale")
    for layer, name in weights_of(smaller):
        share_weights(l1_unstructured(layer, name, 0.5), name, bits=3)
    fit(smaller)
    assert accuracy(smaller.eval()(test[0]), test[1]).item() > 0.95
    with tempfile.TemporaryDirectory() as folder:
        sizes = [save_compressed(model, Path(folder, "net")) for model in (net, smaller)]
    assert sizes[1] < sizes[0] / 3


# %% [markdown]
# ## Thinking questions
#
# 1. From the table: what would a product have to do with a mask of nine zeros in ten to be faster than without? From
#    which sparsity on could it be worth it on this machine?
# 2. A convolution loses half of its input and half of its output channels. What does that do to its weights, its FLOPs,
#    and the bytes that it reads and writes? Which of the three decides on its time?
# 3. Does a network that was pruned and trained on do better than one of its shape that is trained from scratch? How
#    would you find out?
# 4. With temperature to infinity, which loss does distillation become? (Write the softmax as its first-order term.)

# %% [markdown]
# ## Summary
#
# Masks, channels, ranks and codebooks each take away something else, and a teacher gives some of it back. What has been
# won must be measured: parameters, bytes, FLOPs and seconds do not fall together. Module 19 makes a GPT write without
# reading everything again.


if __name__ == "__main__":
    run_module(globals())
