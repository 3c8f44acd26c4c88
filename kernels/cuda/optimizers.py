"""SGD, Adam and AdamW over all parameters of a group in one launch.

A model has many small parameters and a few large ones, and to launch a kernel takes longer than to update a small one.
So all of them are cut into pieces, and each block of threads has one: it finds in a first table which, and in a second
one where the parameter, its gradient and what is remembered of it lie. Both tables stay on the device from step to
step, as long as the arrays stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, groupby, pairwise
from operator import is_
from typing import Any

import numpy as np
from numba import cuda

from tinytorch.backends import backend_of
from tinytorch.kernels.cuda.instructions import address, floats
from tinytorch.kernels.cuda.jit import SIMULATED, THREADS, kernel, row_by_row, run

__all__ = ["Places", "adam", "fits", "sgd"]

PIECE = 8 * THREADS  # numbers that a block updates: enough that to look up where they lie takes a small part of it

# -- one piece of one parameter: the formulas --------------------------------------------------------------------------


@kernel
def update_by_sgd(table, pieces, intake, lr, momentum, nesterov, sign, penalty):
    """velocity = momentum velocity + intake g; parameter -= lr velocity, with g = sign gradient + penalty parameter.

    Args:
        table: (parameters, 6): where each lies, its gradient, and up to three arrays that are remembered; and its size.
        pieces: (blocks, 2): the number of a block's parameter, and which of its pieces the block has.
    """
    k, first = pieces[cuda.blockIdx.x, 0], pieces[cuda.blockIdx.x, 1] * PIECE
    size = table[k, 5]
    parameter, gradient, velocity = floats(table[k, 0], size), floats(table[k, 1], size), floats(table[k, 2], size)
    for i in range(first + cuda.threadIdx.x, min(first + PIECE, size), THREADS):
        w, g = parameter[i], sign * gradient[i]
        if penalty != 0:  # 0 times infinity would be nan
            g += penalty * w
        if momentum != 0:
            v = momentum * velocity[i] + intake * g
            velocity[i] = v
            g = g + momentum * v if nesterov else v
        parameter[i] = w - lr * g


@kernel
def update_by_adam(table, pieces, rate, epsilon, beta2, keep1, keep2, amsgrad, sign, shrink, penalty):
    """mean += keep1 (g - mean); square = beta2 square + keep2 g²; parameter -= rate mean / (sqrt(square) + epsilon),
    with g = sign gradient + penalty parameter. With amsgrad, the largest squares so far take the squares' place.
    """
    k, first = pieces[cuda.blockIdx.x, 0], pieces[cuda.blockIdx.x, 1] * PIECE
    size = table[k, 5]
    parameter, gradient = floats(table[k, 0], size), floats(table[k, 1], size)
    mean, square, largest = floats(table[k, 2], size), floats(table[k, 3], size), floats(table[k, 4], size)
    for i in range(first + cuda.threadIdx.x, min(first + PIECE, size), THREADS):
        w, g = shrink * parameter[i], sign * gradient[i]
        if penalty != 0:
            g += penalty * w
        m = mean[i] + keep1 * (g - mean[i])
        s = beta2 * square[i] + keep2 * (g * g)
        mean[i] = m
        square[i] = s
        if amsgrad:
            before = largest[i]
            s = before if before > s else s
            largest[i] = s
        parameter[i] = w - rate * m / (math.sqrt(s) + epsilon)


# -- entry points ------------------------------------------------------------------------------------------------------

FLOAT32 = np.dtype(np.float32)


def fits(parameter: Any, gradient: Any, *remembered: Any) -> bool:
    """Whether the kernels can update a parameter: all arrays are on the device, of float32, as many, lying row by row.

    NumPy's lie where the simulator can read them, and no device can.
    """
    kind, size = type(parameter), gradient.size
    if kind is np.ndarray and not SIMULATED:
        return False
    if type(gradient) is not kind or gradient.dtype is not FLOAT32 or gradient.shape != parameter.shape:
        return False
    for x in (parameter, *remembered):
        if type(x) is not kind or x.dtype is not FLOAT32 or x.size != size or not x.flags.c_contiguous:
            return False
        if not getattr(x.flags, "writeable", True):  # CuPy's arrays always are
            return False
    return True


class Places:
    """Where the arrays of a group lie in memory; one of these is kept for each group from step to step.

    Parameters and what is remembered of them lie where they did as long as they are the same objects. Gradients are
    other arrays at each step, often in the same places.

    Attributes:
        table, pieces: on the device, what `update_by_sgd` calls so. Pieces are in the order of the parameters.
        firsts: the number of each parameter's first piece, and of all pieces.
        apart: whether no two arrays share memory. If some do, one parameter is updated after the other.
    """

    def __init__(self) -> None:
        self.arrays: list[Any] = []
        self.gradients: list[int] = []  # their addresses
        self.found = np.zeros((0, 6), np.int64)  # the table, as it was copied to the device
        self.table: Any = None
        self.pieces: Any = None
        self.firsts = [0]
        self.apart = True

    def __deepcopy__(self, memo: dict) -> Places:
        return Places()  # copies of the arrays lie elsewhere

    def look_up(self, parameters: Sequence, gradients: Sequence, *remembered: Sequence) -> None:
        columns, xp = (parameters, *remembered), backend_of(parameters[0])
        arrays, places = list(chain.from_iterable(columns)), [address(x) for x in gradients]
        known = len(arrays) == len(self.arrays) and all(map(is_, arrays, self.arrays))
        if not known:
            self.lay_out(xp, [[address(x) for x in column] for column in columns], [x.size for x in parameters])
            self.arrays = arrays
        if not known or places != self.gradients:
            self.found[:, 1] = self.gradients = places
            self.table = xp.from_numpy(self.found)

    def lay_out(self, xp: Any, starts: list[list[int]], sizes: list[int]) -> None:
        """Fill all of the table but the gradients, and cut the parameters into pieces."""
        counts, numbers = [-(-size // PIECE) for size in sizes], range(len(sizes))
        pieces = [(k, piece) for k in numbers for piece in range(counts[k])]
        self.pieces = xp.from_numpy(np.array(pieces, np.int32).reshape(-1, 2))
        self.firsts = list(accumulate(counts, initial=0))
        unused = [starts[0]] * (4 - len(starts))  # where nothing is remembered, nothing is read
        self.found = np.array([starts[0], *starts, *unused, sizes], np.int64).T.copy()
        taken = sorted((x, x + 4 * size) for column in starts for x, size in zip(column, sizes, strict=True))
        self.apart = all(end <= start for (_, end), (start, _) in pairwise(taken))

    def update(self, kernel: Any, numbers: Iterable[tuple[float, ...]], *options: Any) -> None:
        """Launch a kernel once for all neighbouring parameters with the same numbers of their own: usually once.

        Numbers go with the launch, so that nothing is copied to the device for them.
        """
        last = 0
        for (own, _), alike in groupby((own, 0 if self.apart else k) for k, own in enumerate(numbers)):
            first, last = last, last + len(list(alike))
            pieces = self.pieces[self.firsts[first] : self.firsts[last]]
            run(kernel, len(pieces), THREADS, self.table, pieces, *map(np.float32, own), *options)


def sgd(
    places: Places, parameters: Sequence, gradients: Sequence, velocities: Sequence, dampenings: Sequence, options: dict
) -> None:
    """Take a step of SGD: `m07_optimizers._sgd` for each of the parameters, all of which fit.

    Args:
        velocities: for each parameter; of any content without momentum.
        dampenings: for each parameter, because the first velocity is the gradient itself.
        options: lr, momentum, nesterov, weight_decay, maximize.
    """
    gradients = [row_by_row(x) for x in gradients]
    momentum = options["momentum"]
    places.look_up(parameters, gradients, *([velocities] if momentum else []))
    places.update(
        update_by_sgd, [(1 - d,) for d in dampenings], np.float32(options["lr"]), np.float32(momentum),
        bool(options["nesterov"]), np.float32(-1 if options["maximize"] else 1), np.float32(options["weight_decay"]),
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
    gradients = [row_by_row(x) for x in gradients]
    amsgrad, decay, (beta1, beta2) = bool(options["amsgrad"]), options["weight_decay"], options["betas"]
    places.look_up(parameters, gradients, means, squares, *([largest] if amsgrad else []))
    decoupled = options["decoupled_weight_decay"]
    shrink, penalty = (1 - options["lr"] * decay, 0) if decoupled else (1, decay)
    places.update(
        update_by_adam, zip(rates, epsilons, strict=True), np.float32(beta2), np.float32(1 - beta1),
        np.float32(1 - beta2), amsgrad, np.float32(-1 if options["maximize"] else 1), np.float32(shrink),
        np.float32(penalty),
    )  # fmt: skip
