"""SGD, Adam and AdamW over all parameters of a group in one launch.

An update is a few operations for each number and a lot of traffic: written as NumPy passes, Adam moves five times the
28 bytes that it must, and pays for a dozen calls for each parameter. Here one loop reads a parameter, its gradient and
what is remembered of it once and writes them once. A model has many small parameters and a few large ones; so all of
them are laid in one row, in thought, and the row is cut into equal parts, one for each core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
from numba import prange

from tinytorch.kernels.cpu.jit import cores, kernel, plain, run
from tinytorch.kernels.cpu.vectors import address_of, floats

__all__ = ["Places", "adam", "fits", "sgd"]

# -- one piece of one parameter: the formulas --------------------------------------------------------------------------


@kernel
def sgd_piece(parameter, gradient, velocity, lr, momentum, intake, nesterov, sign, penalty):
    """velocity = momentum velocity + intake g; parameter -= lr velocity, with g = sign gradient + penalty parameter."""
    for i in range(len(parameter)):
        w = parameter[i]
        g = sign * gradient[i] + (penalty * w if penalty != 0 else np.float32(0))  # 0 times infinity would be nan
        if momentum != 0:
            v = momentum * velocity[i] + intake * g
            velocity[i] = v
            g = g + momentum * v if nesterov else v
        parameter[i] = w - lr * g


@kernel
def adam_piece(parameter, gradient, mean, square, largest, rate, epsilon, beta2, keep1, keep2, sign, shrink, penalty):
    """mean += keep1 (g - mean); square = beta2 square + keep2 g²; parameter -= rate mean / (sqrt(square) + epsilon),
    with g = sign gradient + penalty parameter. If there are numbers in `largest`, they replace the squares.
    """
    amsgrad = len(largest) > 0
    for i in range(len(parameter)):
        w = shrink * parameter[i]
        g = sign * gradient[i] + (penalty * w if penalty != 0 else np.float32(0))
        m = mean[i] + keep1 * (g - mean[i])
        s = beta2 * square[i] + keep2 * (g * g)
        mean[i] = m
        square[i] = s
        if amsgrad:
            before = largest[i]
            s = before if before > s else s
            largest[i] = s
        parameter[i] = w - rate * m / (math.sqrt(s) + epsilon)


# -- a part of the row of all parameters -------------------------------------------------------------------------------


@kernel
def sgd_part(part, parts, addresses, starts, intakes, lr, momentum, nesterov, sign, penalty):
    first, last = bounds(part, parts, starts[-1])
    for k in range(len(starts) - 1):
        skip = max(first - starts[k], 0)
        count = min(last, starts[k + 1]) - starts[k] - skip
        if count > 0:
            sgd_piece(
                floats(addresses[k, 0] + 4 * skip, count), floats(addresses[k, 1] + 4 * skip, count),
                floats(addresses[k, 2] + 4 * skip, count if momentum != 0 else 0), np.float32(lr), np.float32(momentum),
                np.float32(intakes[k]), nesterov, np.float32(sign), np.float32(penalty),
            )  # fmt: skip


@kernel
def adam_part(part, parts, addresses, starts, rates, beta1, beta2, amsgrad, sign, shrink, penalty):
    first, last = bounds(part, parts, starts[-1])
    for k in range(len(starts) - 1):
        skip = max(first - starts[k], 0)
        count = min(last, starts[k + 1]) - starts[k] - skip
        if count > 0:
            adam_piece(
                floats(addresses[k, 0] + 4 * skip, count), floats(addresses[k, 1] + 4 * skip, count),
                floats(addresses[k, 2] + 4 * skip, count), floats(addresses[k, 3] + 4 * skip, count),
                floats(addresses[k, 4] + 4 * skip, count if amsgrad else 0),
                np.float32(rates[0, k]), np.float32(rates[1, k]), np.float32(beta2), np.float32(1 - beta1),
                np.float32(1 - beta2), np.float32(sign), np.float32(shrink), np.float32(penalty),
            )  # fmt: skip


@kernel
def bounds(part, parts, count):
    """From where to where a part of `count` elements goes; parts meet where cache lines of 16 float32 do."""
    lines = (count + 15) // 16
    return min(lines * part // parts * 16, count), min(lines * (part + 1) // parts * 16, count)


@kernel
def sgd_serial(parts, *arguments):
    for part in range(parts):
        sgd_part(part, parts, *arguments)


@kernel(parallel=True)
def sgd_parallel(parts, addresses, starts, intakes, lr, momentum, nesterov, sign, penalty):
    for part in prange(parts):
        sgd_part(part, parts, addresses, starts, intakes, lr, momentum, nesterov, sign, penalty)


@kernel
def adam_serial(parts, *arguments):
    for part in range(parts):
        adam_part(part, parts, *arguments)


@kernel(parallel=True)
def adam_parallel(parts, addresses, starts, rates, beta1, beta2, amsgrad, sign, shrink, penalty):
    for part in prange(parts):
        adam_part(part, parts, addresses, starts, rates, beta1, beta2, amsgrad, sign, shrink, penalty)


# -- entry points ------------------------------------------------------------------------------------------------------

FLOAT32 = np.dtype(np.float32)


def fits(parameter: Any, gradient: Any, *remembered: Any) -> bool:
    """Whether the kernels can update a parameter: all arrays are NumPy's, of float32, as many, lying row by row."""
    if type(gradient) is not np.ndarray or gradient.dtype is not FLOAT32 or gradient.shape != parameter.shape:
        return False
    size = gradient.size
    for x in (parameter, *remembered):
        if type(x) is not np.ndarray or x.dtype is not FLOAT32 or x.size != size or not x.flags.carray:
            return False
    return True


class Places:
    """Where the arrays of a group lie in memory; one of these is kept for each group from step to step.

    To ask arrays for their addresses takes longer than to update a small parameter. Gradients are other arrays at each
    step; for parameters and what is remembered it is enough to see that they are the same objects as the last time.
    """

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.addresses = np.zeros((0, 5), np.int64)  # a row for each parameter: it, its gradient, what is remembered
        self.starts = np.zeros(1, np.int64)  # where each parameter begins if all are laid in a row
        self.parts = 1

    def __deepcopy__(self, memo: dict) -> Places:
        return Places()  # copies of the arrays lie elsewhere

    def look_up(self, parameters: Sequence, gradients: Sequence, *remembered: Sequence) -> None:
        columns = (parameters, *remembered)
        arrays = list(chain.from_iterable(columns))
        if len(arrays) != len(self.arrays) or not all(map(is_, arrays, self.arrays)):
            found = np.array([[address_of(x) for x in column] for column in columns], np.int64)
            sizes = np.array([x.size for x in parameters])
            self.addresses = np.zeros((len(parameters), 5), np.int64)
            self.addresses[:, [0, 2, 3, 4][: len(columns)]] = found.T
            self.starts = np.concatenate([[0], np.cumsum(sizes)])
            order = np.argsort(found, axis=None)
            ends = (found + 4 * sizes).reshape(-1)[order]
            apart = (ends[:-1] <= found.reshape(-1)[order][1:]).all()
            self.parts = cores() if apart else 1  # arrays that share memory are updated in their order
            self.arrays = arrays
        self.addresses[:, 1] = [address_of(x) for x in gradients]


def sgd(
    places: Places, parameters: Sequence, gradients: Sequence, velocities: Sequence, dampenings: Sequence, options: dict
) -> None:
    """Take a step of SGD: `m07_optimizers._sgd` for each of the parameters, all of which fit.

    Args:
        velocities: for each parameter; of any content without momentum.
        dampenings: for each parameter, because the first velocity is the gradient itself.
        options: lr, momentum, nesterov, weight_decay, maximize.
    """
    gradients = [plain(x) for x in gradients]
    momentum = options["momentum"]
    places.look_up(parameters, gradients, *([velocities] if momentum else []))
    run(
        sgd_serial, sgd_parallel, work(places), places.parts, places.addresses, places.starts,
        np.array([1.0 - d for d in dampenings]), float(options["lr"]), float(momentum), bool(options["nesterov"]),
        -1.0 if options["maximize"] else 1.0, float(options["weight_decay"]),
    )  # fmt: skip


def adam(
    places: Places, parameters: Sequence, gradients: Sequence, means: Sequence, squares: Sequence, largest: Sequence,
    rates: Sequence, epsilons: Sequence, options: dict,
) -> None:  # fmt: skip
    """Take a step of Adam or AdamW: `m07_optimizers._adam` for each of the parameters, all of which fit.

    Args:
        largest: for each parameter, with amsgrad; of any content without it.
        rates, epsilons: for each parameter, because one may have taken fewer steps than another.
        options: lr, betas, amsgrad, weight_decay, decoupled_weight_decay, maximize.
    """
    gradients = [plain(x) for x in gradients]
    amsgrad, decay, (beta1, beta2) = bool(options["amsgrad"]), float(options["weight_decay"]), options["betas"]
    places.look_up(parameters, gradients, means, squares, *([largest] if amsgrad else []))
    shrink = 1 - options["lr"] * decay if options["decoupled_weight_decay"] else 1.0
    run(
        adam_serial, adam_parallel, work(places), places.parts, places.addresses, places.starts,
        np.array([rates, epsilons], np.float64), float(beta1), float(beta2), amsgrad,
        -1.0 if options["maximize"] else 1.0, float(shrink), 0.0 if options["decoupled_weight_decay"] else decay,
    )  # fmt: skip


def work(places: Places) -> int:
    """Elementary steps, for `run`: gradients, at the least, come from the other core, which takes longer than a sum."""
    return int(places.starts[-1])
