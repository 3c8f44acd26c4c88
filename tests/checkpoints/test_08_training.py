"""After module 08: train a network on real digits, and go on after a kill as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tinytorch
from tinytorch import nn, optim
from tinytorch.m08_training import Trainer, TrainingError, accuracy
from tinytorch.m08_training_appendix import Checkpointing, EarlyStopping, History, model_state, read_history


def make(folder: Path | None = None, **options) -> Trainer:
    tinytorch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    optimizer = optim.Adam(model.parameters(), lr=3e-3)
    callbacks = list(options.pop("callbacks", []))
    if folder is not None:
        callbacks += [Checkpointing(folder, every=10), History(folder / "history.jsonl")]
    return Trainer(
        model, optimizer, nn.CrossEntropyLoss(label_smoothing=0.05), {"accuracy": accuracy},
        optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8), callbacks, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data() -> tuple:
    """Handwritten digits in random order: batches of them to train on, and one batch of 360 to test with."""
    table = np.loadtxt(Path(tinytorch.__file__).parent / "data" / "digits.csv.gz", np.float32, delimiter=",")
    table = np.random.default_rng(0).permutation(table)
    images, labels = table[:, :64] / 16, table[:, 64].astype(np.int64)
    train = [(images[i : i + 64], labels[i : i + 64]) for i in range(360, len(table), 64)]
    return train, (images[:360], labels[:360])


def test_digits_are_learned_and_the_best_epoch_is_kept(data: tuple, tmp_path: Path) -> None:
    train, test = data
    trainer = make(tmp_path, callbacks=[EarlyStopping(patience=5, monitor="val_accuracy")])
    history = trainer.fit(train, 8, validation=[test])
    assert history[-1]["val_accuracy"] > 0.92
    assert history[-1]["loss"] < history[0]["loss"]
    assert read_history(tmp_path / "history.jsonl") == history
    best = max(row["val_accuracy"] for row in history)
    assert trainer.evaluate([test])["accuracy"] == pytest.approx(best)
    fresh = make()
    fresh.model.load_state_dict(model_state(tmp_path))
    assert fresh.evaluate([test])["loss"] == pytest.approx(history[-1]["val_loss"])
    assert fresh.predict(test[0]).shape == (len(test[0]), 10)


def test_a_run_that_is_interrupted_goes_on_with_the_same_bits(data: tuple, tmp_path: Path) -> None:
    train, test = data

    class Interrupted(EarlyStopping):
        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.step == 33:
                raise KeyboardInterrupt

    left_alone = make()
    left_alone.fit(train, 3, validation=[test])
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, callbacks=[Interrupted()]).fit(train, 3, validation=[test])
    resumed = make(tmp_path)
    history = resumed.fit(train, 3, validation=[test], resume=tmp_path)
    assert history == left_alone.history
    for name, weight in left_alone.model.state_dict().items():
        assert resumed.model.state_dict()[name].tolist() == weight.tolist()


def test_a_wrong_learning_rate_is_stopped_with_advice(data: tuple) -> None:
    train, _ = data
    trainer = make()
    trainer.optimizer.param_groups[0]["lr"] = trainer.scheduler.base_lrs[0] = 1e30
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at epoch 1, batch \d+.*Try a lower learning rate"):
        trainer.fit(train, 1)
