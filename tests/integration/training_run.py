"""A small training run for test_kill_and_resume.py: python training_run.py FOLDER. It goes on where it was killed.

Dropout, Adam, accumulated batches, a schedule by the step, batches in a new order each epoch, a checkpoint every three
steps: everything that a resumed run can get wrong. It prints "step N" after each step, and the last line is "done".
"""

import sys
from pathlib import Path

import tinytorch
from tinytorch import nn, optim
from tinytorch.m08_training import Callback, Trainer, accuracy
from tinytorch.m08_training_appendix import Checkpointing, EarlyStopping, History
from tinytorch.utils.data import DataLoader, TensorDataset

EPOCHS = 8


class Report(Callback):
    order = 200  # after the checkpoint

    def on_step_end(self, trainer: Trainer) -> None:
        print("step", trainer.step, flush=True)


def main(folder: Path) -> None:
    tinytorch.manual_seed(5)
    images, noise = tinytorch.randn(150, 12), tinytorch.randn(150)
    labels = (images[:, 0] * images[:, 1] + 0.1 * noise > 0).to(tinytorch.int64)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 2))
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    steps = EPOCHS * 7  # an epoch's 13 batches make 6 steps of two batches and one of the last
    scheduler = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)  # moves the betas, too
    callbacks = [Checkpointing(folder, every=3), EarlyStopping(EPOCHS), History(folder / "history.jsonl"), Report()]
    trainer = Trainer(
        model, optimizer, nn.CrossEntropyLoss(), {"accuracy": accuracy}, scheduler, accumulate=2, clip_norm=1.0,
        scheduler_interval="step", callbacks=callbacks,
    )  # fmt: skip
    batches = DataLoader(TensorDataset(images[:100], labels[:100]), batch_size=8, shuffle=True, seed=1)
    validation = DataLoader(TensorDataset(images[100:], labels[100:]), batch_size=16, shuffle=True, seed=2)
    trainer.fit(batches, epochs=EPOCHS, validation=validation, resume=folder)
    trainer.save(folder / "final.safetensors")
    print("done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
