"""What compression brings on CIFAR-10: students with and without a teacher, and a CNN made smaller in several ways.

    python -m tinytorch.profiling.compression --root DIR

It takes the cnn milestone's network (`--teacher`, the folder of a run with `--data cifar10 --full`; without it, one is
trained), and ends with status 1 unless every student does better with it than without, and FLOPs, bytes and latency
fall together where channels are removed. What is done stands in `--out`, and is not done again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import tinytorch
from tinytorch import Trainer, nn
from tinytorch.m01_setup import atomic_write, print_table
from tinytorch.m08_training import Callback, accuracy
from tinytorch.m08_training_appendix import model_state
from tinytorch.m09_spatial import SimpleCNN, count_parameters
from tinytorch.m18_compression import (
    DistillationLoss,
    GradualPruning,
    l1_unstructured,
    made_plain,
    prune_channels,
    save_compressed,
    share_weights,
    weights_of,
)
from tinytorch.m18_compression_appendix import compression_report, factorize, print_report, restore
from tinytorch.milestones import cnn
from tinytorch.milestones.cnn import RECIPES, one_cycle
from tinytorch.milestones.pictures import make_batches
from tinytorch.utils.data import DataLoader

RECIPE = RECIPES["cifar10 --full"]
STUDENT = partial(SimpleCNN, 3, 10, 32, widths=(8, 16, 32), hidden=32, batch_norm=True)
TEMPERATURE, ALPHA = 4.0, 0.9
EPOCHS, MOST = 10, 0.1  # of a student, and its largest learning rate
FINE_TUNING = 1, 0.05  # the same for a network that was made smaller
CHANNELS = (0.25, 0.5, 0.75)


def teacher_of(arguments: argparse.Namespace) -> nn.Module:
    """The milestone's network, from the folder of its run."""
    folder = arguments.teacher or arguments.out / "teacher"
    if arguments.teacher is None and not (folder / "report.json").exists():
        options = ["--data", "cifar10", "--full", "--out", str(folder), "--resume"]
        if cnn.main([*options, *(["--root", str(arguments.root)] if arguments.root else [])]):
            raise SystemExit("the teacher did not reach its threshold")
    network = RECIPE.network()
    network.load_state_dict(model_state(folder / "last.safetensors"))
    return network.eval()


def share_read(network: nn.Module, root: Path | None) -> float:
    """The share of the 10,000 test pictures that a network reads rightly."""
    trainer = Trainer(network, tinytorch.optim.SGD(network.parameters(), lr=0.1), RECIPE.loss, {"accuracy": accuracy})
    return trainer.evaluate(DataLoader(RECIPE.pictures(root, train=False), batch_size=500))["accuracy"]


def train(
    network: nn.Module, root: Path | None, seed: int, epochs: int, most: float, loss: Callable = RECIPE.loss,
    callbacks: Callable[[int], Sequence[Callback]] = lambda steps: (),
) -> dict[str, float]:  # fmt: skip
    """Train by the milestone's recipe; the last row of the history. `callbacks` are made for a number of steps."""
    batches, validation = make_batches(RECIPE, root, seed, workers=1)
    steps = epochs * len(batches)
    optimizer, schedule = one_cycle(network, steps, most)
    trainer = Trainer(network, optimizer, loss, {"accuracy": accuracy}, schedule, scheduler_interval="step",
                      callbacks=callbacks(steps))  # fmt: skip
    return trainer.fit(batches, epochs, validation)[-1]


def student(arguments: argparse.Namespace, teacher: nn.Module, seed: int, taught: bool) -> dict[str, Any]:
    """What becomes of a student with a seed, alone or taught; from its file, if there is one."""
    how = f"taught-{arguments.temperature:g}-{arguments.alpha:g}" if taught else "alone"
    path = arguments.out / f"student-{seed}-{how}.json"
    if not path.exists():
        tinytorch.manual_seed(seed)
        network = STUDENT()
        loss: Callable = RECIPE.loss
        if taught:
            loss = DistillationLoss(network, teacher, arguments.temperature, arguments.alpha, RECIPE.loss)
        row = train(network, arguments.root, seed, EPOCHS, MOST, loss)
        found = {
            "seed": seed,
            "taught": taught,
            "parameters": count_parameters(network),
            "validation": row["val_accuracy"],
            "test": share_read(network, arguments.root),
        }
        atomic_write(path, (json.dumps(found, indent=2) + "\n").encode())
    return json.loads(path.read_text(encoding="utf-8"))


def students(arguments: argparse.Namespace, teacher: nn.Module) -> bool:
    """Print how students do; whether each is better with a teacher."""
    pairs = [[student(arguments, teacher, seed, taught) for taught in (False, True)] for seed in arguments.seeds]
    shares = [[100 * found["test"] for found in pair] for pair in pairs]
    print(f"students of {pairs[0][0]['parameters']:,} parameters, temperature {arguments.temperature:g}, "
          f"alpha {arguments.alpha:g}; the teacher has {count_parameters(teacher):,} and reads "
          f"{share_read(teacher, arguments.root):.2%}")  # fmt: skip
    rows = [
        [seed, alone, taught, taught - alone] for seed, (alone, taught) in zip(arguments.seeds, shares, strict=True)
    ]
    print_table(["seed", "alone (%)", "taught (%)", "gain (points)"], rows)
    return all(taught > alone for alone, taught in shares)


def made_smaller(arguments: argparse.Namespace, name: str, teacher: nn.Module) -> nn.Module:
    """The network under one of the names of `NAMES`, trained on; from its file, if there is one."""
    path = arguments.out / f"{name}.safetensors"
    if path.exists():
        return restore(RECIPE.network(), path)
    tinytorch.manual_seed(0)
    example = tinytorch.zeros(1, *RECIPE.shape)
    callbacks: Callable[[int], Sequence[Callback]] = lambda steps: ()
    network = copy.deepcopy(teacher)
    if name.startswith("channels"):
        network = prune_channels(teacher, example, int(name[9:-1]) / 100)
    elif name == "thin":
        network = factorize(teacher, 0.8)
    elif name == "sparse":
        callbacks = lambda steps: [GradualPruning(weights_of(network), 0.9, 0, steps * 3 // 4, max(1, steps // 40))]
    else:
        network = made_plain(made_smaller(arguments, "sparse", teacher))
        for layer, weight in weights_of(network):
            zeros = int((getattr(layer, weight) == 0).sum())
            share_weights(l1_unstructured(layer, weight, zeros), weight, bits=5)  # what is zero stays zero
    if name != "shared":
        epochs, most = FINE_TUNING
        train(network, arguments.root, 0, epochs, most, callbacks=callbacks)
    save_compressed(network, path)
    return network


NAMES = (*(f"channels-{share:.0%}" for share in CHANNELS), "thin", "sparse", "shared")


def smaller_networks(arguments: argparse.Namespace, teacher: nn.Module) -> bool:
    """Print the report; whether FLOPs, bytes and latency fall with every channel that goes."""
    networks = {"whole": teacher, **{name: made_smaller(arguments, name, teacher) for name in NAMES}}
    tinytorch.manual_seed(0)
    rows = compression_report(networks, tinytorch.randn(64, *RECIPE.shape), arguments.out / "networks",
                              partial(share_read, root=arguments.root), rounds=21)  # fmt: skip
    print_report(rows)
    falling = rows[: 1 + len(CHANNELS)]
    return all(
        after[what] < before[what] for before, after in pairwise(falling) for what in ("flops", "bytes", "seconds")
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if both hold."""
    title = "What compression brings on CIFAR-10."
    options = argparse.ArgumentParser(prog="python -m tinytorch.profiling.compression", description=title)
    add = options.add_argument
    add("--root", type=Path, metavar="DIR", help="folder with CIFAR-10's files (else a download)")
    add("--teacher", type=Path, metavar="RUN", help="folder of a finished run of the cnn milestone on cifar10 --full")
    add("--out", type=Path, default=Path("runs", "compression"), metavar="DIR", help="folder for what is written")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of the students (0 1 2)")
    add("--temperature", type=float, default=TEMPERATURE, metavar="T", help=f"of the distillation ({TEMPERATURE:g})")
    add("--alpha", type=float, default=ALPHA, metavar="A", help=f"the teacher's share of the loss ({ALPHA:g})")
    add("--only", choices=("students", "networks"), help="do one of the two")
    arguments = options.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    teacher = teacher_of(arguments)
    good = [part(arguments, teacher) for name, part in (("students", students), ("networks", smaller_networks))
            if arguments.only in (None, name)]  # fmt: skip
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
