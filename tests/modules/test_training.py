"""Module 08: the trainer, its callbacks and its checkpoints, at length."""

from __future__ import annotations

import io
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytorch
from tinytorch import Tensor, nn, optim
from tinytorch.backends import get_backend
from tinytorch.m01_setup import assert_close
from tinytorch.m02_tensor import observe
from tinytorch.m04_layers_appendix import load, save
from tinytorch.m08_training import (
    Callback,
    GradScaler,
    Trainer,
    TrainingError,
    accuracy,
    autocast,
    read_checkpoint,
)
from tinytorch.m08_training_appendix import (
    AveragedWeights,
    Best,
    Checkpointing,
    EarlyStopping,
    History,
    LearningRateLog,
    ProgressBar,
    binary_accuracy,
    model_state,
    plot_history,
    read_history,
)

SIZES = (8, 8, 8, 8, 5)


def make(
    optimizer: Callable[..., Any] | None = None, scheduler: Callable[..., Any] | None = None, **options: Any
) -> Trainer:
    tinytorch.manual_seed(11)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Dropout(0.25), nn.Linear(10, 3))
    made = (optimizer or (lambda params: optim.Adam(params, lr=0.02)))(model.parameters())
    options.setdefault("metrics", {"accuracy": accuracy})
    return Trainer(model, made, nn.CrossEntropyLoss(), scheduler=scheduler and scheduler(made), **options)


def make_batches(sizes: tuple = SIZES, seed: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(seed)
    return [(draw.standard_normal((n, 6), np.float32), draw.integers(0, 3, n)) for n in sizes]


def bits(trainer: Trainer, path: Path) -> tuple:
    """A trainer's whole state: tensors as bytes, all else as text."""
    trainer.save(path)
    state = load(path)
    return {name: x.numpy().tobytes() for name, x in state.items()}, dict(state.metadata), trainer.history


class Shuffled:
    """Batches without a state of their own, in an order drawn from the global generator; noise is added to each."""

    def __init__(self, sizes: tuple = SIZES) -> None:
        self.batches = make_batches(sizes)

    def __iter__(self) -> Iterator[tuple]:
        for i in tinytorch.randperm(len(self.batches)).tolist():
            inputs, targets = self.batches[i]
            yield tinytorch.tensor(inputs) + 0.1 * tinytorch.randn(*inputs.shape), targets


class WithState(Shuffled):
    """Batches that know their place."""

    epoch = batch = 0

    def __iter__(self) -> Iterator[tuple]:
        order = np.random.default_rng(self.epoch).permutation(len(self.batches))
        while self.batch < len(order):
            self.batch += 1
            yield self.batches[order[self.batch - 1]]
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


class StopAt(Callback):
    """Saves after a step and leaves `fit` by an exception."""

    order = 1000

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            trainer.save(self.path)
            raise InterruptedError


def resumes_at(step: int, make_trainer: Callable[..., Trainer], loader: Callable[[], Any], tmp_path: Path) -> None:
    """Assert that a run of three epochs ends with the same bits if it is cut after a step."""
    validation, path = make_batches((7, 4), seed=6), tmp_path / "cut.safetensors"
    whole = make_trainer()
    whole.fit(loader(), 3, validation)
    assert whole.step >= step
    cut = make_trainer(callbacks=[*make_trainer().callbacks, StopAt(step, path)])
    with pytest.raises(InterruptedError):
        cut.fit(loader(), 3, validation)
    resumed = make_trainer()
    tinytorch.manual_seed(12345)
    resumed.fit(loader(), 3, validation, resume=path)
    expected, found = bits(whole, tmp_path / "a.safetensors"), bits(resumed, tmp_path / "b.safetensors")
    assert found == expected


# -- training ----------------------------------------------------------------------------------------------------------


def test_history_is_weighted_and_counts_validation() -> None:
    trainer, validation = make(lambda p: optim.SGD(p, lr=0.0)), make_batches((9, 1), seed=3)
    trainer.model[2].p = 0.0
    (row,) = trainer.fit(make_batches(), 1, validation)
    for prefix, batches in (("", make_batches()), ("val_", validation)):
        inputs, targets = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        scores = trainer.predict(inputs).numpy().astype(np.float64)
        shifted = scores - scores.max(1, keepdims=True)
        nats = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(targets)), targets]
        assert_close(row[f"{prefix}loss"], nats.mean(), rtol=1e-5)
        assert_close(row[f"{prefix}accuracy"], (scores.argmax(1) == targets).mean())
    assert list(row) == ["epoch", "loss", "accuracy", "lr", "val_loss", "val_accuracy"]


@pytest.mark.parametrize("accumulate", [2, 3, 5, 99])
def test_accumulated_parts_make_the_gradient_of_the_whole(accumulate: int) -> None:
    parts = make_batches((3, 8, 1, 5, 6))
    groups = [parts[i : i + accumulate] for i in range(0, len(parts), accumulate)]
    big = [tuple(np.concatenate(column) for column in zip(*group, strict=True)) for group in groups]
    trainers = []
    for options, batches in (({"accumulate": accumulate}, parts), ({}, big)):
        trainer = make(lambda p: optim.SGD(p, lr=0.5, momentum=0.9), clip_norm=0.3, **options)
        trainer.model[2].p = 0.0
        trainer.fit(batches, 2)
        trainers.append(trainer)
    assert trainers[0].step == trainers[1].step == 2 * len(groups)
    for one, other in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_clipping_bounds_the_step() -> None:
    trainer = make(lambda p: optim.SGD(p, lr=1.0), clip_norm=1e-3)
    before = np.concatenate([p.numpy().ravel().copy() for p in trainer.model.parameters()])
    trainer.fit(make_batches((8,)), 1)
    after = np.concatenate([p.numpy().ravel() for p in trainer.model.parameters()])
    assert_close(np.linalg.norm(after - before), 1e-3, rtol=1e-3)


def test_schedulers_are_stepped_when_they_should_be() -> None:
    seen: dict[str, list[float]] = {}
    for interval in ("epoch", "step"):
        log = LearningRateLog()
        trainer = make(lambda p: optim.SGD(p, lr=1.0), lambda o: optim.lr_scheduler.ExponentialLR(o, 0.5),
                       scheduler_interval=interval, callbacks=[log])  # fmt: skip
        rows = trainer.fit(make_batches((4, 4)), 2)
        seen[interval] = [row["lr"] for row in rows]
        assert log.rows == ([[0, [1.0]], [2, [0.5]], [4, [0.25]]] if interval == "epoch"
                            else [[0, [1.0]], [1, [0.5]], [2, [0.25]], [3, [0.125]], [4, [0.0625]]])  # fmt: skip
    assert seen == {"epoch": [1.0, 0.5], "step": [0.25, 0.0625]}


def test_plateau_is_told_the_validation_loss() -> None:
    trainer = make(lambda p: optim.SGD(p, lr=1.0), lambda o: optim.lr_scheduler.ReduceLROnPlateau(o, patience=0))
    told = []
    trainer.scheduler.step = told.append  # type: ignore[method-assign]
    rows = trainer.fit(make_batches(), 2, make_batches((3,)))
    rows = trainer.fit(make_batches(), 3)
    assert told == [rows[0]["val_loss"], rows[1]["val_loss"], rows[2]["loss"]]


def test_evaluate_and_predict_leave_the_model_as_it_was() -> None:
    trainer = make()
    trainer.model[2].eval()
    state = {name: x.tolist() for name, x in trainer.model.state_dict().items()}
    inputs, targets = make_batches((6,))[0]
    first = trainer.evaluate([(inputs, targets)])
    assert first == trainer.evaluate([(inputs, targets)])
    forms = [inputs, tinytorch.tensor(inputs), [(inputs, targets)], [inputs[:4], inputs[4:]], iter([[inputs, targets]])]
    for form in forms:
        outputs = trainer.predict(form)
        assert not outputs.requires_grad
        assert_close(outputs, trainer.model.eval()(tinytorch.tensor(inputs)))
        trainer.model.train()
    assert {name: x.tolist() for name, x in trainer.model.state_dict().items()} == state
    assert all(p.grad is None for p in trainer.model.parameters())


def test_fit_counts_epochs_from_the_beginning() -> None:
    twice = make()
    twice.fit(make_batches(), 1)
    assert [row["epoch"] for row in twice.fit(make_batches(), 3)] == [1, 2, 3]
    assert len(twice.fit(make_batches(), 2)) == 3  # done already
    assert make().fit(make_batches(), 3) == twice.history


def test_accuracies() -> None:
    draw = np.random.default_rng(1)
    scores, classes = draw.standard_normal((20, 4), np.float32), draw.integers(0, 4, 20)
    expected = (scores.argmax(1) == classes).mean()
    assert_close(accuracy(tinytorch.tensor(scores), tinytorch.tensor(classes)), expected)
    assert_close(accuracy(tinytorch.tensor(scores), tinytorch.tensor(np.eye(4, dtype=np.float32)[classes])), expected)
    bit = (draw.random((20, 1)) > 0.5).astype(np.float32)
    one = scores[:, :1]
    assert_close(binary_accuracy(tinytorch.tensor(one), tinytorch.tensor(bit)), ((one > 0) == bit).mean())
    assert_close(binary_accuracy(tinytorch.tensor(one), tinytorch.tensor(bit), 0.5), ((one > 0.5) == bit).mean())
    with pytest.raises(ValueError, match=r"targets \(20,\) do not fit scores \(20, 1\)"):
        binary_accuracy(tinytorch.tensor(one), tinytorch.tensor(bit[:, 0]))
    with pytest.raises(ValueError, match=r"targets \(7,\) do not fit scores \(20, 4\)"):
        accuracy(tinytorch.tensor(scores), tinytorch.tensor(classes[:7]))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_leaves_the_weights(bad: float, accumulate: int, tmp_path: Path) -> None:
    batches = make_batches()
    batches[2][0][1, 1] = bad
    good = make(accumulate=accumulate)
    good.fit(batches[:2], 1)
    trainer = make(accumulate=accumulate, callbacks=[Checkpointing(tmp_path)])
    trainer.model[1] = lambda x: x.tanh() + 0 * x  # tanh alone makes of infinity a 1
    with pytest.raises(TrainingError) as raised:
        trainer.fit(batches, 1)
    message = str(raised.value)
    assert "\n" not in message
    for part in ("the loss is nan", "epoch 1, batch 3", f"step {2 // accumulate + 1}", "learning rate 0.02", "Try"):
        assert part in message
    for one, other in zip(trainer.model.parameters(), good.model.parameters(), strict=True):
        assert_close(one, other, rtol=0, atol=0)
        assert np.isfinite(one.numpy()).all()
        assert one.grad is None


def test_a_norm_that_is_not_finite_leaves_the_weights() -> None:
    trainer = make(lambda p: optim.SGD(p, lr=0.1), clip_norm=1.0)
    trainer.loss = lambda outputs, targets: (outputs * 0).sum().sqrt()  # the loss is 0, its slope infinite
    before = trainer.model[0].weight.tolist()
    with pytest.raises(TrainingError, match=r"the norm of the gradients is (nan|inf) at epoch 1, batch 1, step 1"):
        trainer.fit(make_batches(), 1)
    assert trainer.model[0].weight.tolist() == before


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        ([], TrainingError, "epoch 1 has no batches"),
        ([(np.zeros((0, 6), np.float32), np.zeros(0, np.int64))], ValueError, r"batch 1 is empty.*\(0, 6\)"),
        ([*make_batches((2,)), 7], ValueError, r"batch 2 is not a pair \(inputs, targets\), but int"),
        ([(1, 2, 3)], ValueError, "batch 1 is not a pair .* but 3 things"),
        ([(np.zeros((2, 5), np.float32), np.zeros(2, np.int64))], ValueError, "5 features"),
        ([(np.zeros((2, 6), np.float32), np.array([0, 3]))], (ValueError, IndexError), "3"),
    ],
)
def test_bad_batches_are_named(batches: list, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        make().fit(batches, 1)


def test_bad_evaluations_are_named() -> None:
    with pytest.raises(ValueError, match="evaluate: there are no batches"):
        make().evaluate([])
    with pytest.raises(ValueError, match="evaluate: batch 2 is empty"):
        make().evaluate([*make_batches((2,)), (np.zeros((0, 6)), np.zeros(0))])
    with pytest.raises(ValueError, match="at least one"):
        make().predict([])
    with pytest.raises(TrainingError, match="epoch 2 has no batches; a generator is used up"):
        make().fit((batch for batch in make_batches()), 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "half"}, "not half"),
        ({"scaler": GradScaler()}, "float16 with a scaler, not float32"),
        ({"accumulate": 0}, "accumulate 0"),
        ({"clip_norm": 0.0}, "clip_norm 0.0"),
        ({"clip_norm": math.nan}, "clip_norm nan"),
        ({"scheduler_interval": "batch"}, "not 'batch'"),
        ({"metrics": {"loss": accuracy}}, "columns of the history"),
        (
            {"scheduler": optim.lr_scheduler.ReduceLROnPlateau, "scheduler_interval": "step"},
            "must be one of .'epoch',., not 'step'",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**options)


@pytest.mark.parametrize("epochs", [0, -1, 1.5, "3"])
def test_epochs_are_a_whole_number(epochs: Any) -> None:
    with pytest.raises(ValueError, match="epochs must be a whole number >= 1"):
        make().fit(make_batches(), epochs)


# -- mixed precision ---------------------------------------------------------------------------------------------------


def test_small_gradients_survive_by_scaling() -> None:
    results = {}
    for name, scaler in (("none", GradScaler(init_scale=1.0)), ("scaled", GradScaler(init_scale=2.0**14))):
        trainer = make(lambda p: optim.SGD(p, lr=1.0), precision="float16", scaler=scaler)
        trainer.loss = lambda outputs, targets: outputs.sum() * 1e-8  # float16 ends at 6e-8
        before = trainer.model[3].bias.numpy().copy()
        trainer.fit(make_batches((4,)), 1)
        results[name] = trainer.model[3].bias.numpy() - before
    assert_close(results["none"], np.zeros(3), atol=0)
    assert_close(results["scaled"], np.full(3, -4e-8), rtol=0.4, atol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    scaler = GradScaler(init_scale=2.0**40)
    trainer = make(precision="float16", scaler=scaler)
    before = trainer.model[0].weight.tolist()
    trainer.fit(make_batches((8,)), 1)
    assert trainer.model[0].weight.tolist() == before
    assert scaler.get_scale() == 2.0**39
    assert trainer.optimizer.state_dict()["state"] == {}
    trainer.fit(make_batches((8,)), 40)
    assert trainer.model[0].weight.tolist() != before
    assert scaler.get_scale() < 2.0**26


def test_mixed_with_accumulation_and_clipping_follows_float32() -> None:
    weights = []
    for options in ({}, {"precision": "float16", "scaler": GradScaler(init_scale=1024.0)}):
        trainer = make(lambda p: optim.SGD(p, lr=0.1), accumulate=2, clip_norm=0.5, **options)
        trainer.model[2].p = 0.0
        trainer.fit(make_batches(), 4)
        weights.append(trainer.model[0].weight)
        assert weights[-1].dtype == tinytorch.float32
    assert_close(weights[1], weights[0], rtol=0.02, atol=2e-3)


def test_the_scaler_by_hand_as_in_pytorch() -> None:
    weight = tinytorch.tensor([2.0], requires_grad=True)
    optimizer, scaler = optim.SGD([weight], lr=0.25), GradScaler(init_scale=8.0)
    scaler.scale((weight * 3).sum()).backward()
    assert weight.grad.tolist() == [24.0]
    scaler.unscale_(optimizer)
    assert weight.grad.tolist() == [3.0]
    with pytest.raises(RuntimeError, match="unscaled already"):
        scaler.unscale_(optimizer)
    assert scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [1.25]


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [Shuffled, WithState, make_batches])
@pytest.mark.parametrize("step", range(1, 10))
def test_a_run_cut_anywhere_ends_with_the_same_bits(loader: Callable, step: int, tmp_path: Path) -> None:
    # Five batches make two steps of two and one of the last: every third step lies behind the end of the data.
    resumes_at(step, lambda **options: make(accumulate=2, **options), loader, tmp_path)


OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: optim.AdamW([{"params": list(p), "lr": 0.01}], weight_decay=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.05),
    "Lion": lambda p: optim.Lion(p, lr=0.001),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_resumes(name: str, tmp_path: Path) -> None:
    resumes_at(8, lambda **options: make(OPTIMIZERS[name], **options), Shuffled, tmp_path)


S = optim.lr_scheduler
SCHEDULERS = {
    "StepLR": lambda o: S.StepLR(o, 2),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [3, 8, 11]),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 15),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 4, 2),
    "LinearLR": lambda o: S.LinearLR(o, total_iters=10),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.05, total_steps=16),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda step: 0.9**step),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.LinearLR(o, total_iters=9), S.CosineAnnealingLR(o, 6)], [9]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_resumes(name: str, tmp_path: Path) -> None:
    resumes_at(
        7, lambda **options: make(None, SCHEDULERS[name], scheduler_interval="step", **options), Shuffled, tmp_path
    )


def test_plateau_resumes(tmp_path: Path) -> None:
    def make_trainer(**options: Any) -> Trainer:
        return make(None, lambda o: S.ReduceLROnPlateau(o, patience=0, threshold=0.5), **options)

    resumes_at(12, make_trainer, Shuffled, tmp_path)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_mixed_precision_resumes(tmp_path: Path) -> None:
    def make_trainer(**options: Any) -> Trainer:
        return make(precision="float16", scaler=GradScaler(init_scale=2.0**8, growth_interval=4), **options)

    resumes_at(7, make_trainer, WithState, tmp_path)


def test_callbacks_resume(tmp_path: Path) -> None:
    def make_trainer(callbacks: Any = (), **options: Any) -> Trainer:
        extra = [callback for callback in callbacks if isinstance(callback, StopAt)]
        trainer = make(callbacks=[LearningRateLog(), EarlyStopping(3), *extra], **options)
        averaged = AveragedWeights(optim.EMA(trainer.model, 0.9))
        trainer.callbacks.insert(0, averaged)
        return trainer

    resumes_at(8, make_trainer, WithState, tmp_path)
    assert "callbacks.0.1.averages.0.weight" in load(tmp_path / "a.safetensors")


def test_names_in_a_checkpoint_are_pytorchs(tmp_path: Path) -> None:
    trainer = make()
    trainer.fit(make_batches(), 1)
    trainer.save(tmp_path / "x.safetensors")
    names = set(load(tmp_path / "x.safetensors"))
    assert {"model.0.weight", "model.3.bias", "optimizer.state.0.exp_avg", "optimizer.state.3.exp_avg_sq"} <= names
    other = make()
    other.model.load_state_dict(model_state(tmp_path / "x.safetensors"))
    assert other.predict(make_batches()).tolist() == trainer.predict(make_batches()).tolist()


# -- damaged files -----------------------------------------------------------------------------------------------------


def one_line(function: Callable, *args: Any) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the caller looks at the message
        function(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_truncated_and_altered_checkpoints_are_refused(tmp_path: Path) -> None:
    trainer, path, damaged = make(), tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    trainer.fit(make_batches(), 1)
    trainer.save(path)
    content, draw = path.read_bytes(), np.random.default_rng(7)
    before = bits(trainer, tmp_path / "before.safetensors")
    for length in [0, 1, 7, 8, 100, len(content) - 1, *draw.integers(0, len(content), 20).tolist()]:
        damaged.write_bytes(content[:length])
        assert str(damaged) in one_line(trainer.resume, damaged)
    for place in draw.integers(0, len(content), 100).tolist():
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(draw.integers(8))
        damaged.write_bytes(flipped)
        assert str(damaged) in one_line(trainer.resume, damaged)
    assert bits(trainer, tmp_path / "after.safetensors") == before


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    trainer, path = make(), tmp_path / "foreign.safetensors"
    save(trainer.model.state_dict(), path)
    assert "not a checkpoint of a Trainer: it holds no training state" in one_line(trainer.resume, path)
    save({}, path, {"tinytorch.checkpoint": "2", "state": "{}"})
    assert "has format 2, this program reads 1" in one_line(trainer.resume, path)
    path.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00" + b"cos\nsystem\n." * 9)
    assert "pickle" in one_line(trainer.resume, path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        trainer.resume(tmp_path / "nowhere.safetensors")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer, path = make(), tmp_path / "adam.safetensors"
    trainer.fit(make_batches(), 1)
    trainer.save(path)
    assert "made with optimizer Adam, not SGD" in one_line(make(lambda p: optim.SGD(p, lr=0.1)).resume, path)
    assert "made with scheduler NoneType, not StepLR" in one_line(make(None, lambda o: S.StepLR(o, 1)).resume, path)
    smaller = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.25), nn.Linear(9, 3))
    message = one_line(Trainer(smaller, optim.Adam(smaller.parameters()), nn.CrossEntropyLoss()).resume, path)
    assert str(path) in message
    assert "0.weight (10, 6), expected (9, 6)" in message


def test_a_folder_falls_back_to_the_one_before(tmp_path: Path) -> None:
    assert not make().resume(tmp_path)
    assert not make().resume(tmp_path / "not there yet")
    trainer = make(callbacks=[Checkpointing(tmp_path / "run")])
    trainer.fit(make_batches(), 3)
    last, previous = tmp_path / "run" / "last.safetensors", tmp_path / "run" / "previous.safetensors"
    last.write_bytes(last.read_bytes()[:-5])
    resumed = make()
    with pytest.warns(UserWarning, match=f"{re.escape(str(last))}.*going on from {re.escape(str(previous))}"):
        assert resumed.resume(tmp_path / "run")
    assert resumed.epoch == 2
    one_line(make().resume, last)  # a file that was asked for by name has no substitute
    previous.write_bytes(b"")
    with pytest.warns(UserWarning, match=re.escape(str(last))):
        assert str(previous) in one_line(make().resume, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        model_state(tmp_path)


@pytest.mark.parametrize("broken", range(1, 13))
def test_a_crash_while_saving_leaves_a_good_checkpoint(
    broken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, replace = 0, os.replace

    def failing(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == broken:
            raise OSError("the disk is gone")
        replace(*args)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        make(callbacks=[Checkpointing(tmp_path, every=2, best=False)]).fit(make_batches(), 3)
    found = [read_checkpoint(file) for file in tmp_path.glob("*.safetensors")]
    assert all(found)
    folder = read_checkpoint(tmp_path)
    done = broken // 3  # the first save renames two files, each later one three
    assert (folder["progress"]["step"] if folder else 0) == [0, 2, 4, 5, 6][done]


def test_what_cannot_be_gone_on_from_is_not_saved(tmp_path: Path) -> None:
    trainer, path = make(), tmp_path / "run.safetensors"
    trainer.fit(make_batches(), 1)
    trainer.save(path)
    content = path.read_bytes()
    trainer.model[3].bias.data[1] = math.nan
    with pytest.raises(TrainingError, match=r"infinity or nan in 3\.bias; .*run.safetensors was not written"):
        trainer.save(path)
    assert path.read_bytes() == content

    class Meddling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if other.waiting:
                other.save(path)
            return x

    other = make(accumulate=2)
    other.model[1] = Meddling()
    with pytest.raises(TrainingError, match="a step is half done"):
        other.fit(make_batches(), 1)
    assert path.read_bytes() == content


def test_batches_that_are_fewer_than_the_checkpoints_are_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    with pytest.raises(InterruptedError):
        make(callbacks=[StopAt(4, path)]).fit(make_batches(), 1)
    with pytest.raises(TrainingError, match="made after batch 4, but these batches end before it"):
        make().fit(make_batches((8, 8)), 1, resume=path)


def test_a_generator_of_a_missing_device_is_a_warning(tmp_path: Path) -> None:
    trainer, path = make(), tmp_path / "run.safetensors"
    trainer.fit(make_batches(), 1)
    state = trainer.state_dict()
    state["place"]["rng"] = state["place"]["rng"] | {"cuda:7": {}}
    with pytest.warns(UserWarning, match="random numbers of cuda:7 start anew"):
        make().load_state_dict(state)
    assert not path.exists()


# -- callbacks ---------------------------------------------------------------------------------------------------------


def test_hooks_come_in_order() -> None:
    calls: list[str] = []

    class Noting(Callback):
        def __init__(self, name: str, order: int) -> None:
            self.name, self.order = name, order

        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                calls.append(f"{self.name}.{name}")
            return super().__getattribute__(name)

    trainer = make(callbacks=[Noting("b", 1), Noting("a", 0)])
    trainer.fit(make_batches((4, 4)), 1)
    expected = ["on_fit_start", "on_epoch_start", "on_step_end", "on_step_end", "on_epoch_end", "on_fit_end"]
    assert calls == [f"{name}.{hook}" for hook in expected for name in "ab"]
    calls.clear()
    with pytest.raises(ValueError, match="not a pair"):
        trainer.fit([1], 2)
    assert calls[-2:] == ["a.on_error", "b.on_error"]


class Scripted(Callback):
    """Writes given values over the column "score" of the history, and marks the weights by the epoch."""

    order = -1

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def on_epoch_end(self, trainer: Trainer) -> None:
        row = trainer.history[-1]
        row["score"] = self.values[row["epoch"] - 1]
        trainer.model[3].bias.data[:] = float(row["epoch"])


@pytest.mark.parametrize("restore", [True, False])
def test_early_stopping_ends_and_restores(restore: bool) -> None:
    stopping = EarlyStopping(patience=2, monitor="score", restore=restore)
    trainer = make(callbacks=[stopping, Scripted([0.1, 0.5, 0.5, 0.4, 0.9])])
    assert len(trainer.fit(make_batches(), 5)) == 4
    assert trainer.model[3].bias.tolist() == [2.0 if restore else 4.0] * 3
    assert stopping.bad_epochs == 2


def test_a_stopped_run_stays_stopped(tmp_path: Path) -> None:
    def run() -> Trainer:
        callbacks = [EarlyStopping(2, monitor="score"), Scripted([0.3, 0.2, 0.1, 0.9]), Checkpointing(tmp_path)]
        trainer = make(callbacks=callbacks)
        trainer.fit(make_batches(), 4, resume=tmp_path)
        return trainer

    first, second = run(), run()
    assert (len(first.history), len(second.history)) == (3, 3)
    assert second.model[3].bias.tolist() == [1.0] * 3


def test_best_is_kept_beside_last(tmp_path: Path) -> None:
    trainer = make(callbacks=[Scripted([0.1, 0.5, 0.4]), Checkpointing(tmp_path, monitor="score")])
    trainer.fit(make_batches(), 3)
    assert model_state(tmp_path / "best.safetensors")["3.bias"].tolist() == [2.0] * 3
    assert model_state(tmp_path)["3.bias"].tolist() == [3.0] * 3
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "best.safetensors", "last.safetensors", "previous.safetensors"
    ]  # fmt: skip


def test_best_knows_which_way_is_up() -> None:
    loss, score = Best(min_delta=0.1), Best("accuracy")
    assert [loss.improved({"loss": value}) for value in (math.nan, 1.0, 0.95, 0.8)] == [False, True, False, True]
    assert [score.improved({"accuracy": value}) for value in (0.5, 0.4, 0.6)] == [True, False, True]
    assert [Best("accuracy", "min").improved({"accuracy": value}) for value in (0.5,)] == [True]
    assert Best().improved({"loss": 3.0, "val_loss": 1.0})
    with pytest.raises(ValueError, match="no 'accuracy' to monitor; the history has loss"):
        score.improved({"loss": 1.0})
    with pytest.raises(ValueError, match="'upwards'"):
        Best(mode="upwards")


@pytest.mark.parametrize(("make_wrong", "words"), [
    (lambda path: Checkpointing(path, every=0), "every must be at least 1"),
    (lambda path: EarlyStopping(patience=0), "patience must be 1 epoch or more"),
])  # fmt: skip
def test_callbacks_refuse_bad_options(make_wrong: Callable, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        make_wrong(tmp_path)


def test_history_has_each_epoch_once(tmp_path: Path) -> None:
    path, cut = tmp_path / "runs" / "history.jsonl", tmp_path / "cut.safetensors"
    with pytest.raises(InterruptedError):
        make(callbacks=[History(path), StopAt(7, cut)]).fit(make_batches(), 3)
    with open(path, "a") as file:
        file.write('{"epoch": 2, "loss": 0.5}\n{"epoch": 3, "lo')  # what a later kill may have left
    assert [row["epoch"] for row in read_history(path)] == [1, 2]
    resumed = make(callbacks=[History(path)])
    resumed.fit(make_batches(), 3, resume=cut)
    assert read_history(path) == resumed.history
    assert [row["epoch"] for row in resumed.history] == [1, 2, 3]


def test_a_new_run_leaves_the_history_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    histories = [make(callbacks=[History(path)]).fit(make_batches(), epochs) for epochs in (1, 2, 3)]
    names = ["history.1.jsonl", "history.2.jsonl", "history.jsonl"]
    assert [read_history(tmp_path / name) for name in names] == histories


def test_history_is_json_even_where_a_value_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    trainer = make(callbacks=[History(path)], metrics={"odd": lambda outputs, targets: math.nan})
    trainer.fit(make_batches(), 1)
    assert read_history(path)[0]["odd"] is None
    path.write_text('{"epoch": 1}\nnonsense\n{"epoch": 2}\n')
    with pytest.raises(ValueError, match=r"history.jsonl, line 2: not a row of a history: 'nonsense'"):
        read_history(path)


def test_plot_draws_every_column(tmp_path: Path) -> None:
    path, history = tmp_path / "figures" / "curves.png", tmp_path / "history.jsonl"
    trainer = make(callbacks=[History(history)])
    rows = trainer.fit(make_batches(), 3, make_batches((4,)))
    assert plot_history(rows, path) == path
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    plot_history(history, path)
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match="no epoch"):
        plot_history([], path)


def screen(terminal: bool) -> Any:
    from rich.console import Console

    return Console(file=io.StringIO(), force_terminal=terminal, width=80, highlight=False, soft_wrap=not terminal)


def test_without_a_terminal_each_epoch_is_a_line() -> None:
    console = screen(terminal=False)
    trainer = make(callbacks=[ProgressBar(console)])
    rows = trainer.fit(make_batches(), 2, make_batches((4,)))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2
    for number, (line, row) in enumerate(zip(lines, rows, strict=True), 1):
        values = "  ".join(f"{name} {row[name]:.4g}/{row[f'val_{name}']:.4g}" for name in ("loss", "accuracy"))
        assert len(line) <= 80
        assert re.fullmatch(rf"epoch {number}/2  {re.escape(values)}  [\d,]+/s  \d+\.\d s", line)


def test_on_a_terminal_the_bar_fits_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProgressBar, "INTERVAL", 0.0)
    console = screen(terminal=True)
    trainer = make(callbacks=[ProgressBar(console)])
    trainer.fit(make_batches(), 2)
    output = console.file.getvalue()
    shown = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part) for part in re.split(r"[\r\n]", output)]
    bars = [part for part in shown if "━" in part]
    assert any("epoch 2/2" in bar and "loss" in bar and "accuracy" in bar and "/s" in bar for bar in bars)
    assert max(map(len, shown)) <= 80
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") > 0  # the cursor is hidden, and shown again
    with pytest.raises(TrainingError):
        trainer.fit([], 3)
    output = console.file.getvalue()
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h")


# -- every array library -----------------------------------------------------------------------------------------------


def test_a_run_on_every_device(device: str, tmp_path: Path) -> None:
    resumes_at(7, lambda **options: make(accumulate=2, clip_norm=1.0, **options), make_batches, tmp_path)
    trainer = make(callbacks=[EarlyStopping(5)])
    rows = trainer.fit(make_batches(), 3, make_batches((4,)))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert trainer.predict(make_batches()).device == tinytorch.get_default_device()


# -- mixed precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_autocast_casts_and_what_not(device: str, dtype: str) -> None:
    kind = str(tinytorch.tensor(0.0).device).partition(":")[0]
    if dtype not in get_backend(device).dtypes:
        pytest.skip(f"{device} has no {dtype}")
    x, layer = tinytorch.randn(3, 4), nn.Linear(4, 4)
    double = tinytorch.ones(4, 4, dtype="float64")
    with autocast(kind, dtype):
        assert layer(x).dtype == (x @ x.T).dtype == dtype
        assert (double @ double).dtype == "float64"
        assert (x + x).dtype == "float32"
        half = layer(x)
        assert (half + half).dtype == dtype
        assert [y.dtype for y in (half.exp(), half.sum(), half.softmax(-1), half**2)] == ["float32"] * 4
        assert nn.functional.cross_entropy(half, tinytorch.tensor([0, 1, 2])).dtype == "float32"
        with autocast(kind, enabled=False):
            assert layer(x).dtype == "float32"
            with autocast(kind, dtype):
                assert layer(x).dtype == dtype
        assert layer(x).dtype == dtype
        with autocast("tpu"):
            assert layer(x).dtype == "float32"
    assert layer(x).dtype == "float32"


def test_networks_compute_in_16_bits_forward_and_backward() -> None:
    x, heads = tinytorch.randn(2, 3, 6, 6), tinytorch.randn(2, 2, 5, 4, requires_grad=True)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    seen: dict[str, set] = {}

    def look(op: Any, arrays: list, attributes: dict, proceed: Any) -> Any:
        seen.setdefault(op.name, set()).update(str(a.dtype) for a in arrays if hasattr(a, "dtype"))
        return proceed()

    with autocast("cpu"):
        out = conv(x)
        attended = nn.functional.scaled_dot_product_attention(heads, heads.half(), heads)
    with observe(look):
        (out.float() ** 2).sum().backward()
        attended.sum().backward()
    assert out.dtype == "float16"
    assert attended.dtype == "float32"
    assert seen["convolution_weight_gradient"] == {"float16"}
    assert seen["attention_gradients"] == {"float32"}
    assert conv[0].weight.grad.dtype == heads.grad.dtype == "float32"
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    plain.load_state_dict(conv.state_dict())
    (plain(x) ** 2).sum().backward()
    assert_close(conv[0].weight.grad, plain[0].weight.grad, rtol=1e-2, atol=5e-2)


def test_autocast_is_of_one_thread_and_a_decorator() -> None:
    layer, x, found = nn.Linear(2, 2), tinytorch.ones(1, 2), list[str]()
    with autocast("cpu"):
        thread = threading.Thread(target=lambda: found.append(layer(x).dtype))
        thread.start()
        thread.join()
    assert found == ["float32"]

    @autocast("cpu")
    def apply(x: Tensor) -> Tensor:
        return layer(x)

    assert apply(x).dtype == apply(x).dtype == "float16"
    with pytest.raises(TypeError, match="numpy has no dtype 'bfloat16'"), autocast("cpu", "bfloat16"):
        layer(x)
    with pytest.raises(TypeError, match="numpy has no dtype 'bfloat16'"):
        make(precision="bfloat16")
