"""After module 10: feed a network with batches that are ready before it asks, and the same ones every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tinytorch
from tinytorch import Checkpointing, Trainer, accuracy, nn, optim
from tinytorch.datasets import Digits
from tinytorch.transforms import Compose, Normalize, RandomCrop
from tinytorch.utils.data import DataLoader, IterableDataset, Subset, random_split


def loaders(workers: int, **options: Any) -> tuple[DataLoader, DataLoader]:
    augment = Compose([RandomCrop(8, padding=1), Normalize(0.3, 0.4)])
    train = DataLoader(Digits(transform=augment), 64, shuffle=True, num_workers=workers, **options)
    return train, DataLoader(Digits(train=False, transform=Normalize(0.3, 0.4)), 200)


def trainer(folder: Path | None = None) -> Trainer:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
    callbacks = [] if folder is None else [Checkpointing(folder, every=7)]
    optimizer = optim.Adam(model.parameters(), lr=3e-3)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), {"accuracy": accuracy}, callbacks=callbacks)


def test_digits_are_learned_from_shifted_pictures() -> None:
    tinytorch.manual_seed(0)
    train, test = loaders(workers=1)
    history = trainer().fit(train, 25, validation=test)
    assert history[-1]["val_accuracy"] > 0.9
    assert history[-1]["accuracy"] < history[-1]["val_accuracy"]  # what it learns from is harder than what it meets


def test_a_run_goes_on_in_the_middle_of_an_epoch_with_another_number_of_workers(tmp_path: Path) -> None:
    class Interrupted(tinytorch.Callback):
        order = 9  # after the checkpoint is written

        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.step == 35:
                raise KeyboardInterrupt

    tinytorch.manual_seed(1)
    expected = trainer().fit(loaders(2)[0], 3)
    tinytorch.manual_seed(1)
    cut_short = trainer(tmp_path)
    cut_short.callbacks.append(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        cut_short.fit(loaders(1)[0], 3)
    tinytorch.manual_seed(2)
    train, _ = loaders(0)
    assert trainer().fit(train, 3, resume=tmp_path) == expected
    assert train.epoch == 3


def test_a_file_too_big_for_memory_is_read_as_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "measurements.csv"
    path.write_text("".join(f"{i},{i * i}\n" for i in range(1000)))

    class Rows(IterableDataset):
        def __iter__(self):
            with open(path) as file:
                for line in file:
                    yield tuple(int(word) for word in line.split(","))

    for workers in (0, 2):
        batches = list(DataLoader(Rows(), batch_size=128, num_workers=workers))
        assert [len(squares) for _, squares in batches] == [128] * 7 + [104]
        assert all((numbers * numbers).tolist() == squares.tolist() for numbers, squares in batches)


def test_folds_share_no_example() -> None:
    digits = Digits()
    parts = random_split(digits, [0.8, 0.2], seed=0)
    assert [len(part) for part in parts] == [1150, 287]
    assert not set(parts[0].indices) & set(parts[1].indices)
    few = DataLoader(Subset(digits, parts[1].indices[:10]), 4)
    assert next(iter(few))[1].tolist() == digits.targets[parts[1].indices[:4]].tolist()
