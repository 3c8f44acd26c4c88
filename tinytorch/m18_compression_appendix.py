"""Module 18, appendix: the rest of PyTorch's pruning, zeros in an order that hardware likes, files of changed shapes.

A report says what compression has brought: each network is written to disk, its file is looked at, and its answers are
timed in turn with the others'.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tinytorch.m01_setup import atomic_write, print_table, seconds
from tinytorch.m02_tensor import Tensor, abs, cat, reshape, transpose
from tinytorch.m02_tensor_appendix import any as any_of
from tinytorch.m02_tensor_appendix import argsort, empty, norm, ones_like, rand_like, split
from tinytorch.m04_layers import Linear, Module, Parameter
from tinytorch.m06_autograd import no_grad
from tinytorch.m09_spatial import BatchNorm, Conv2d, count_flops, count_parameters
from tinytorch.m18_compression import (
    SIZES,
    Net,
    custom_from_mask,
    factorized,
    formulas_of,
    load_compressed,
    made_plain,
    mask_of,
    save_compressed,
    sizes_of,
    thin_layers,
    without_lowest,
)

# -- what else torch.nn.utils.prune has --------------------------------------------------------------------------------


def identity(module: Module, name: str) -> Module:
    """Give a layer's parameter a mask that takes nothing out; returns the layer."""
    return custom_from_mask(module, name, ones_like(getattr(module, name).detach()))


def random_unstructured(module: Module, name: str, amount: float) -> Module:
    """Mask weights drawn at random; returns the layer. `amount` as in `l1_unstructured`."""
    mask = mask_of(module, name)
    return custom_from_mask(module, name, without_lowest(mask, rand_like(mask), amount))


@no_grad
def ln_structured(
    module: Module, name: str, amount: float, n: float, dim: int, importance_scores: Tensor | None = None
) -> Module:
    """Mask whole slices along an axis, those of the smallest n-norm; returns the layer, whose shapes stay.

    Args:
        amount: a share of the slices that are not masked yet, or how many.
        n: of the norm: 1, 2, infinity.
        importance_scores: of the parameter's shape, to take norms of in its place.
    """
    scores = getattr(module, name) if importance_scores is None else importance_scores
    return _slices_masked(module, name, amount, dim, lambda axes: norm(scores, p=n, dim=axes))


def random_structured(module: Module, name: str, amount: float, dim: int) -> Module:
    """Mask whole slices along an axis, drawn at random; returns the layer, whose shapes stay."""
    mask = mask_of(module, name)
    return _slices_masked(module, name, amount, dim, lambda axes: rand_like(mask.sum(axes)))


def _slices_masked(
    module: Module, name: str, amount: float, dim: int, score: Callable[[tuple[int, ...]], Tensor]
) -> Module:
    mask = mask_of(module, name)
    if mask.ndim < 2 or not -mask.ndim <= dim < mask.ndim:
        raise ValueError(f"prune: {name!r} has shape {mask.shape}, and no slices along axis {dim}")
    axes = tuple(d for d in range(mask.ndim) if d != dim % mask.ndim)
    left = any_of(mask > 0, dim=axes).to(mask.dtype)
    kept = without_lowest(left, score(axes), amount)
    column = [-1 if d == dim % mask.ndim else 1 for d in range(mask.ndim)]
    return custom_from_mask(module, name, reshape(kept, shape=column) * ones_like(mask))


def magnitudes(x: Tensor) -> Tensor:
    """Scores for `global_unstructured`: small weights go first. PyTorch calls it `L1Unstructured`."""
    return abs(x)


def chances(x: Tensor) -> Tensor:
    """Scores for `global_unstructured`: any weight may go first. PyTorch calls it `RandomUnstructured`."""
    return rand_like(x)


@no_grad
def global_unstructured(
    parameters: Iterable[tuple[Module, str]], pruning_method: Callable[[Tensor], Tensor],
    importance_scores: Mapping[tuple[Module, str], Tensor] | None = None, *, amount: float,
) -> None:  # fmt: skip
    """Mask weights of several layers together: those of the lowest scores among all.

    Args:
        parameters: (layer, name) of each.
        pruning_method: `L1Unstructured` or `RandomUnstructured`, or another function from weights (n,) to scores (n,).
        importance_scores: what the method gets in the place of some parameters' weights.
        amount: a share of all that is not masked yet, or how many.
    """
    pairs, given = list(parameters), importance_scores or {}
    masks = [mask_of(layer, name) for layer, name in pairs]
    values = [given.get((layer, name), getattr(layer, name)) for layer, name in pairs]
    flat = without_lowest(cat([x.flatten() for x in masks]), pruning_method(cat([x.flatten() for x in values])), amount)
    for (layer, name), mask, part in zip(pairs, masks, split(flat, [x.numel() for x in masks]), strict=True):
        custom_from_mask(layer, name, part.reshape(mask.shape))


def is_pruned(module: Module) -> bool:
    """Whether a weight in a network is masked, or shares its values."""
    return any(formulas_of(m) for m in module.modules())


# -- n of m ------------------------------------------------------------------------------------------------------------


def nm_mask(weight: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Ones for the n largest magnitudes among each m neighbours along a weight's inputs (axis 1), else zeros.

    With 2 of 4, NVIDIA's tensor cores leave the zeros out (Mishra and others, 2021); a convolution's neighbours are
    input channels at one place of the window.

    Raises:
        ValueError: the weight has no multiple of m inputs, or n is not between 1 and m.
    """
    if not 1 <= n <= m:
        raise ValueError(f"nm_mask: n must be between 1 and m, got {n} of {m}")
    if weight.ndim < 2 or weight.shape[1] % m:
        raise ValueError(f"nm_mask: expected a weight (out, in, …) of a multiple of {m} inputs, got {weight.shape}")
    inputs_last = transpose(abs(weight.detach()), 1, -1)
    groups = inputs_last.reshape(-1, m)
    ranks = argsort(argsort(groups, dim=1, descending=True), dim=1)
    return transpose((ranks < n).to(weight.dtype).reshape(inputs_last.shape), 1, -1)


def prune_nm(module: Module, name: str = "weight", n: int = 2, m: int = 4) -> Module:
    """Mask all but the n largest of each m neighbours along a layer's inputs; returns the layer. See `nm_mask`."""
    return custom_from_mask(module, name, nm_mask(getattr(module, name), n, m))


# -- networks ----------------------------------------------------------------------------------------------------------


def factorize(network: Net, energy: float | Mapping[str, float]) -> Net:
    """A copy of a network with two thin layers for each Linear and Conv2d that has fewer weights so.

    Args:
        energy: what each layer keeps of its weight, as `factorized` has it; or that by the names of layers, and others
            are left alone.
    """
    smaller = copy.deepcopy(network)
    for path, layer in list(smaller.named_modules()):
        kept = energy.get(path) if isinstance(energy, Mapping) else energy
        if path and kept is not None and type(layer) in (Linear, Conv2d) and sizes_of(layer):
            both = factorized(layer, energy=kept)
            if count_parameters(both) < count_parameters(layer):
                _replace(smaller, path, both)
    return smaller


def _replace(network: Any, path: str, layer: Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, layer)


def restore(network: Net, path: str | os.PathLike) -> Net:
    """A copy of a network with what `save_compressed` wrote of it, or of what it had become.

    Args:
        network: as it was before it was compressed; layers whose channels are gone get their shapes, and layers that
            were factorized their two parts, from the file.

    Raises:
        ValueError: with the file's name, if it is damaged, or made from another network.
    """
    state, restored = load_compressed(path), copy.deepcopy(network)
    for name, layer in list(restored.named_modules()):
        if type(layer) in (Linear, Conv2d) and f"{name}.0.weight" in state and f"{name}.1.weight" in state:
            _replace(restored, name, thin_layers(layer, state[f"{name}.0.weight"].shape[0]))
    for name, layer in restored.named_modules():
        _reshape(layer, {part: state.get(f"{name}.{part}" if name else part) for part in vars(layer)})
    try:
        restored.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"restore: {os.fspath(path)}: made from another network: {error}") from None
    return restored


def _reshape(layer: Any, state: Mapping[str, Tensor | None]) -> None:
    """Give a layer that can lose channels the shapes of its state."""
    if not sizes_of(layer) and not isinstance(layer, BatchNorm):
        return
    for name, found in state.items():
        old = getattr(layer, name)
        if isinstance(old, Tensor) and found is not None and found.ndim == old.ndim and found.shape != old.shape:
            new = empty(*found.shape, dtype=old.dtype, device=old.device)
            setattr(layer, name, Parameter(new, old.watched) if isinstance(old, Parameter) else new)
    if isinstance(layer, BatchNorm):
        some = layer.weight if layer.weight is not None else layer.running_mean
        layer.num_features = layer.num_features if some is None else len(some)
    else:
        inputs, outputs = SIZES[type(layer)]
        setattr(layer, outputs, layer.weight.shape[0])
        setattr(layer, inputs, layer.weight.shape[1])


# -- the report --------------------------------------------------------------------------------------------------------


def compression_report(
    networks: Mapping[str, Module], example: Tensor, folder: str | os.PathLike,
    evaluate: Callable[[Module], float] | None = None, rounds: int = 7,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write networks into a folder, measure them, and write what was measured as report.json.

    Args:
        networks: by name; `{name}.safetensors` is what `save_compressed` makes of each.
        example: a batch, for FLOPs and latency.
        evaluate: a network's accuracy, or what else is to be known.
        rounds: how often each is timed, in turn with the others; the median counts.

    Returns:
        A row for each: "name", "parameters", "nonzero" (of the parameters), "flops" and "seconds" (of the batch),
        "bytes" (of the file), "accuracy". Masks are no parameters, and cost no time: what is timed is the plain
        network. FLOPs are those of dense operations, zeros or not.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: made_plain(network).eval() for name, network in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in plain}
    with no_grad():
        for _ in range(rounds):
            for name, network in plain.items():
                times[name].append(seconds(network, example, repeat=1))
    rows = []
    for name, network in plain.items():
        rows.append({
            "name": name,
            "parameters": count_parameters(network),
            "nonzero": sum(int((p != 0).sum()) for p in network.parameters()),
            "flops": sum(count_flops(network, example).values()),
            "bytes": save_compressed(network, folder / f"{name}.safetensors"),
            "seconds": median(times[name]),
            "accuracy": None if evaluate is None else evaluate(network),
        })  # fmt: skip
    atomic_write(folder / "report.json", (json.dumps(rows, indent=2) + "\n").encode())
    return rows


def print_report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what `compression_report` returned as a table."""
    headers = ["network", "parameters", "not 0", "MFLOP", "bytes on disk", "ms", "accuracy"]
    print_table(headers, [
        [row["name"], row["parameters"], row["nonzero"], row["flops"] / 1e6, row["bytes"], row["seconds"] * 1e3,
         "–" if row["accuracy"] is None else f"{row['accuracy']:.2%}"]
        for row in rows
    ])  # fmt: skip
