"""Module 10: data loading, or how to have the next batch ready before it is asked for.

Learning objectives. After this module you can
1. describe a set of examples so that a whole batch of them is gathered at once;
2. separate which examples come next from where they are, and say why an epoch's order must be a function of a seed;
3. change a whole batch of pictures at random without a loop over them;
4. prepare batches beside the training step, in threads or processes, and get the same bits with any number of them;
5. measure how long training waits for its data, and stop, kill and resume a loader without losing or leaking anything.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from itertools import accumulate, count, islice, product
from multiprocessing import get_context
from numbers import Integral
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

from tinytorch.backends import BY_TYPE, Backend, backend_of, get_backend, seeded
from tinytorch.m01_setup import assert_close, manual_seed, message_of, print_table, run_module, seconds, to_numpy
from tinytorch.m02_tensor import Tensor, float64, randn, stack, tensor, uint8, zeros
from tinytorch.m02_tensor_appendix import (
    arange,
    as_tensor,
    cuda_is_available,
    pin_memory,
    rand,
    randint,
    randperm,
)
from tinytorch.m04_layers import Dropout, Flatten, Linear, Sequential
from tinytorch.m05_losses import cross_entropy
from tinytorch.m06_autograd import no_grad
from tinytorch.m07_optimizers import SGD
from tinytorch.m08_training import Callback, Trainer

# %% [markdown]
# # Module 10: Data loading
#
# A training step takes a few milliseconds and then wants the next batch. Finding 128 pictures in a file, shifting,
# mirroring and scaling them takes milliseconds too, and a step that waits for that is a processor standing still. This
# chapter makes batches quickly, and makes them while the step before is still computing.

# %% [markdown]
# ## Mathematical foundations
#
# **An epoch** is a permutation $\pi$ of the $N$ examples, cut into $\lceil N / B \rceil$ batches of $B$. Drawing
# without replacement shows each example once an epoch; the mean of a batch's gradients is right on average, as module
# 08 needs it, and over a whole epoch exactly.
#
# **Randomness as a function.** Let $g(s)$ be a generator started at seed $s$. The order of epoch $e$ is drawn from
# $g(s, e)$, and everything random about its batch $b$ from $g(s, e, b + 1)$. So a batch is a function of
# $(s, e, b)$: it does not matter who makes it, when, or what was made before. This one decision gives the same batches
# with any number of workers, and lets a run resume at batch $b$ without making the $b$ batches before it.
#
# **Overlap.** Let a step take $t$ and making a batch $m$. One after the other they take $t + m$; side by side with $k$
# workers $\max(t, m / k)$, as long as cores are free. The training waits $\max(0, m / k - t)$ for each batch.
#
# **Augmentation.** If a shifted or mirrored picture shows the same thing, each stands for all its shifts:
# $H$ pixels with a border of $p$ make $(2p + 1)^2$ crops, times 2 if mirrored. Each epoch shows a new one.

# %% [markdown]
# ## Implementation
#
# ### Datasets
# A dataset has a length, and gives example i. One that holds arrays can do better than giving example after example:
# `get_batch` gathers a whole batch with one indexing.


# %%
class Dataset:
    """Examples by number: `dataset[i]` is one, `len(dataset)` says how many. Subclasses define both."""

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define __getitem__")

    def get_batch(self, indices: Sequence[int]) -> Any:
        """The examples of these numbers as one batch. Datasets that can gather them all at once override it."""
        return collate([self[i] for i in indices])

    def __add__(self, other: Dataset) -> ConcatDataset:
        return ConcatDataset([self, other])


class TensorDataset(Dataset):
    """Tensors of one length; example i is the tuple of their i-th entries."""

    def __init__(self, *tensors: Tensor) -> None:
        lengths = [x.shape[0] if x.ndim else 0 for x in tensors]
        if not tensors or len(set(lengths)) > 1:
            raise ValueError(f"TensorDataset: expected tensors of one length, got lengths {lengths}")
        self.tensors = tensors

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        return tuple(x[index] for x in self.tensors)

    def get_batch(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        host = get_backend("cpu")
        return self[host.asarray(indices, dtype=host.dtype("int64"))]

    def __len__(self) -> int:
        return len(self.tensors[0])


class IterableDataset(Dataset):
    """Examples that come one after the other, from `__iter__`: a log, a stream, a file too big to find places in."""

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError(f"{type(self).__name__} must define __iter__")


# %% [markdown]
# Examples that come singly are *collated*: tensors of one shape are stacked, tuples and dictionaries part by part.


# %%
def collate(examples: Sequence[Any]) -> Any:
    """One batch of a list of examples: tensors, arrays and numbers stacked; tuples, lists and dicts part by part.

    As in PyTorch, Python's floats become float64. What is none of these, such as text, stays a list.
    """
    first = examples[0]
    if isinstance(first, Tensor) or type(first) in BY_TYPE:
        tensors = [as_tensor(x) for x in examples]
        for i, x in enumerate(tensors):
            if x.shape != tensors[0].shape:
                raise ValueError(f"collate: example {i} of the batch has shape {x.shape}, example 0 has "
                                 f"{tensors[0].shape}; crop or pad them alike, or pass a collate_fn")  # fmt: skip
        return stack(tensors)
    if isinstance(first, (bool, int, float)):
        return tensor(list(examples), dtype=float64 if isinstance(first, float) else None)
    if isinstance(first, Mapping):
        return {key: collate([example[key] for example in examples]) for key in first}
    if isinstance(first, (tuple, list)):
        lengths = [len(example) for example in examples]
        if len(set(lengths)) > 1:
            raise ValueError(f"collate: the examples of the batch have different numbers of parts: {lengths}")
        parts = [collate(part) for part in zip(*examples, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return list(examples)


def take_batch(dataset: Any, indices: Sequence[int]) -> Any:
    """A batch of anything with examples by number; at once, unless a subclass changed only its single examples."""
    names = ({"get_batch", "__getitem__"} & vars(kind).keys() for kind in type(dataset).__mro__)
    at_once = "get_batch" in next(filter(None, names), ())
    return dataset.get_batch(indices) if at_once else collate([dataset[i] for i in indices])


def test_gathering_at_once_is_collating_one_by_one() -> None:
    data = TensorDataset(rand(7, 2, 3), arange(7))
    for fast, slow in zip(data.get_batch([5, 0, 5]), Dataset.get_batch(data, [5, 0, 5]), strict=True):
        assert_close(fast, slow, rtol=0, atol=0)
    batch = collate([{"x": (tensor([1, 2]), 0.5), "name": "a"}, {"x": (tensor([3, 4]), 1.5), "name": "b"}])
    assert (batch["x"][0].tolist(), batch["x"][1].tolist(), batch["name"]) == ([[1, 2], [3, 4]], [0.5, 1.5], ["a", "b"])
    message = message_of(collate, [tensor([1, 2]), tensor([1, 2, 3])], error=ValueError)
    assert "example 1 of the batch has shape (3,), example 0 has (2,)" in message


class Subset(Dataset):
    """The examples of a dataset that have certain numbers. A part only translates numbers, as does a sum."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    def get_batch(self, indices: Sequence[int]) -> Any:
        return take_batch(self.dataset, [self.indices[i] for i in indices])

    def __len__(self) -> int:
        return len(self.indices)


class ConcatDataset(Dataset):
    """Datasets one after the other; `a + b` makes one."""

    def __init__(self, datasets: Iterable[Any]) -> None:
        self.datasets = list(datasets)
        self.starts = [0, *accumulate(len(dataset) for dataset in self.datasets)]

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"ConcatDataset: no example {index} among {len(self)}")
        index %= len(self)
        part = next(i for i, end in enumerate(self.starts[1:]) if index < end)
        return self.datasets[part][index - self.starts[part]]

    def __len__(self) -> int:
        return self.starts[-1]


def test_parts_and_sums_translate_numbers() -> None:
    data = TensorDataset(arange(5)) + TensorDataset(arange(3) * 10)
    assert [int(data[i][0]) for i in (*range(8), -1)] == [0, 1, 2, 3, 4, 0, 10, 20, 20]
    part = Subset(Subset(data, [7, 6, 1]), [2, 0])
    assert part.get_batch([1, 0])[0].tolist() == [20, 1] == [int(part[1][0]), int(part[0][0])]


# %% [markdown]
# ### Samplers
# A sampler gives the numbers of an epoch, in order. It draws from whatever generator is in force, so that the loader,
# which puts one in force that starts at (seed, epoch), decides what the order depends on.


# %%
class Sampler:
    """Numbers of examples, in the order in which they are to come; each `iter()` is one epoch."""

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError(f"{type(self).__name__} must define __iter__")


class SequentialSampler(Sampler):
    """All of them in order."""

    def __init__(self, data_source: Any) -> None:
        self.data_source = data_source

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self.data_source)


class RandomSampler(SequentialSampler):
    """All of them in random order, or `num_samples` of them; with replacement, each drawn from all."""

    def __init__(self, data_source: Any, replacement: bool = False, num_samples: int | None = None) -> None:
        super().__init__(data_source)
        self.replacement, self.num_samples = replacement, num_samples

    def __iter__(self) -> Iterator[int]:
        n, left = len(self.data_source), len(self)
        while left > 0 and n:
            drawn = randint(n, (left,), device="cpu") if self.replacement else randperm(n, device="cpu")
            yield from drawn[:left].tolist()
            left -= len(drawn)

    def __len__(self) -> int:
        return len(self.data_source) if self.num_samples is None else self.num_samples


class BatchSampler(Sampler):
    """Lists of `batch_size` numbers from a sampler; the last may be shorter, unless it is dropped."""

    def __init__(self, sampler: Iterable[int], batch_size: int, drop_last: bool) -> None:
        whole("batch_size", batch_size, least=1)
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        numbers = iter(self.sampler)
        while len(batch := list(islice(numbers, self.batch_size))) > (self.batch_size - 1 if self.drop_last else 0):
            yield batch

    def __len__(self) -> int:
        return (len(self.sampler) + (0 if self.drop_last else self.batch_size - 1)) // self.batch_size  # type: ignore


def test_samplers() -> None:
    manual_seed(4)
    assert list(BatchSampler(SequentialSampler("abcde"), 2, drop_last=False)) == [[0, 1], [2, 3], [4]]
    assert list(BatchSampler(range(5), 2, drop_last=True)) == [[0, 1], [2, 3]]
    assert sorted(RandomSampler("abcde")) == [0, 1, 2, 3, 4] != list(RandomSampler("abcde"))
    assert sorted(map(list(RandomSampler("abc", num_samples=7)).count, range(3))) == [2, 2, 3]
    assert len(set(RandomSampler("abc", replacement=True, num_samples=40))) == 3


# %% [markdown]
# ### Changing pictures
# A transform works on the whole batch: one call of the array library instead of 128. What it draws is a few numbers a
# picture, always on the CPU, so that the same seed gives the same pictures on every device.


# %%
class Transform:
    """A change of pictures (N, C, H, W), uint8 or floating; of a batch (pictures, labels, …) it changes the pictures.

    Subclasses define `apply(xp, images)`, for arrays.
    """

    def __call__(self, batch: Any) -> Any:
        if isinstance(batch, (tuple, list)):
            return (self(batch[0]), *batch[1:])
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            got = f"a tensor of shape {batch.shape}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"{type(self).__name__}: expected pictures (N, C, H, W), got {got}")
        if batch.dtype != uint8 and not batch.dtype.is_floating_point:
            raise TypeError(f"{type(self).__name__}: pictures are uint8, 0 to 255, or floating, not {batch.dtype}")
        return Tensor(self.apply(backend_of(batch.data), batch.data))

    def apply(self, xp: Backend, images: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define apply")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items() if k[0] != '_')})"


class Compose:
    """Transforms one after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, batch: Any) -> Any:
        for transform in self.transforms:
            batch = transform(batch)
        return batch

    def __repr__(self) -> str:
        return f"Compose({self.transforms!r})"


class ToFloat(Transform):
    """uint8 from 0 to 255 as float32 from 0 to 1; floating pictures stay as they are."""

    def apply(self, xp: Backend, images: Any) -> Any:
        return images if xp.is_floating(images) else xp.cast(images, "float32") * (1 / 255)


class Normalize(Transform):
    """(x - mean) / std, with a number for each channel or one for all; uint8 counts as 0 to 1 and becomes float32."""

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        self.mean, self.std = (tuple(to_numpy(x).reshape(-1).tolist()) for x in (mean, std))
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(f"Normalize: expected as many deviations > 0 as means, got {self.mean} and {self.std}")

    def apply(self, xp: Backend, images: Any) -> Any:
        if len(self.mean) not in (1, images.shape[1]):
            raise ValueError(f"Normalize: {len(self.mean)} means for {images.shape[1]} channels")
        unit, floats = (1, images) if xp.is_floating(images) else (255, xp.cast(images, "float32"))
        columns = [[1 / (unit * s)] for s in self.std], [[-m / s] for m, s in zip(self.mean, self.std, strict=True)]
        scale, shift = (tensor([c], xp.dtype_name(floats), xp.device).data[..., None] for c in columns)
        return floats * scale + shift


# %% [markdown]
# Each picture is cropped at a place of its own. All places at once are the *sliding windows* of the padded batch, a
# view of shape (N, C, rows, columns, H, W) that takes no memory; one indexing picks a window for each picture.


# %%
class RandomCrop(Transform):
    """A part of each picture, at a random place of its own, after `padding` zeros are put around it.

    `size` is height and width, or one number for both.
    """

    def __init__(self, size: int | tuple[int, int], padding: int = 0) -> None:
        self.size = tuple(size) if isinstance(size, Sequence) else (size, size)
        self.padding = padding or 0
        if [type(n) for n in (*self.size, self.padding)] != [int] * 3 or min(self.size) < 1 or self.padding < 0:
            raise ValueError(f"RandomCrop: expected sizes >= 1 and padding >= 0, got {size} and {padding}")

    def apply(self, xp: Backend, images: Any) -> Any:
        n, channels, height, width = images.shape
        p = self.padding
        rows, columns = height + 2 * p - self.size[0] + 1, width + 2 * p - self.size[1] + 1
        if rows < 1 or columns < 1:
            raise ValueError(f"RandomCrop: pictures of {height}×{width} with padding {p} have no part of "
                             f"{self.size[0]}×{self.size[1]}")  # fmt: skip
        padded = images
        if p:
            padded = xp.zeros((n, channels, height + 2 * p, width + 2 * p), dtype=images.dtype)
            padded[:, :, p : p + height, p : p + width] = images
        host = get_backend("cpu")
        top, left = host.integers(0, rows, (n,)), host.integers(0, columns, (n,))
        windows = xp.sliding_windows(padded, self.size, (1, 1), (1, 1))
        return xp.take_index(windows, (host.arange(n), slice(None), top, left))


class RandomHorizontalFlip(Transform):
    """Each picture mirrored left to right with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"RandomHorizontalFlip: p must be between 0 and 1, not {p}")
        self.p = p

    def apply(self, xp: Backend, images: Any) -> Any:
        host = get_backend("cpu")
        (chosen,) = host.nonzero(host.random((images.shape[0],)) < self.p)
        flipped = xp.asarray(images, copy=True)
        xp.assign(flipped, chosen, xp.flip(xp.take_index(images, chosen), axis=-1))
        return flipped


def test_transforms_of_whole_batches() -> None:
    images = arange(2 * 3 * 4 * 5).to(uint8).reshape(2, 3, 4, 5)
    normalize = Normalize((0.1, 0.2, 0.3), (0.5, 1, 2))
    assert_close(normalize(images), normalize(ToFloat()(images)))
    assert Normalize(0.5, 0.25)(tensor([[[[1.0]]]])).item() == 2.0
    assert RandomHorizontalFlip(1.0)(images)[..., 0].tolist() == images[..., -1].tolist()
    crops = {str(RandomCrop((2, 4))((images, "labels"))[0][1].tolist()) for _ in range(100)}
    assert crops == {str(images[1, :, y : y + 2, x : x + 4].tolist()) for y in (0, 1, 2) for x in (0, 1)}
    assert "pictures of 4×5 with padding 0 have no part of 5×5" in message_of(RandomCrop(5), images, error=ValueError)


# %% [markdown]
# ### Making a batch
# The one place where batches are made, whoever makes them. The `with` block is what makes a batch a function of seed,
# epoch and number: inside it, and in this thread only, everything is drawn from a generator of the batch's own.


# %%
class Recipe:
    """How batch `number` of an epoch is made from the numbers of its examples, or from one number alone."""

    def __init__(self, loader: DataLoader) -> None:
        self.dataset, self.seed, self.single = loader.dataset, loader.seed, loader.batch_sampler is None
        self.collate_fn, self.batch_transform = loader.collate_fn, loader.batch_transform
        self.batch_size, self.drop_last = loader.batch_size or 1, loader.drop_last

    @no_grad
    def __call__(self, epoch: int, number: int, indices: Any) -> Any:
        try:
            with seeded((self.seed, epoch, number + 1)):  # + 1, because (seed, epoch, 0) draws what (seed, epoch) does
                batch = self.gather(epoch, number, indices)
                return batch if self.batch_transform is None or batch is End else self.batch_transform(batch)
        except Exception as error:
            of = "" if indices is None else f", of examples {indices}"
            error.add_note(f"DataLoader: raised in making batch {number} of epoch {epoch}{of}")
            raise

    def gather(self, epoch: int, number: int, indices: Any) -> Any:
        if self.collate_fn is None and not self.single:
            return take_batch(self.dataset, indices)
        return self.batch_of([self.dataset[i] for i in ([indices] if self.single else indices)])

    def batch_of(self, examples: list) -> Any:
        make = self.collate_fn or ((lambda example: example) if self.single else collate)
        return make(examples[0] if self.single else examples)


class End:
    """What stands in the place of a batch after the last one of a stream."""


# %% [markdown]
# A stream has no numbers, so one reader takes its examples in order. Whatever its iterator draws comes from a generator
# of the epoch's, into which the block is entered again for each batch. To resume, it reads what comes before.


# %%
class StreamRecipe(Recipe):
    """The same for examples that come from an iterator."""

    epoch, read = -1, 0

    def gather(self, epoch: int, number: int, indices: None) -> Any:
        if epoch != self.epoch or number < self.read:
            self.epoch, self.read, self.draws = epoch, 0, seeded((self.seed, epoch))
            with self.draws:
                self.examples = iter(self.dataset)
        with self.draws:
            while self.read <= number:
                chunk = list(islice(self.examples, self.batch_size))
                self.read += 1
        if not chunk or (self.drop_last and len(chunk) < self.batch_size):
            return End
        return self.batch_of(chunk)


# %% [markdown]
# ### Workers
# A worker is a *thread*. NumPy lets other threads run while it copies, so gathering, cropping and scaling go on beside
# the training step; nothing is copied between processes, and a thread cannot outlive its program. Where examples are
# made by Python itself, which runs one thread at a time, `multiprocessing_context="spawn"` gives each thread a
# *process* that works for it: the thread sends numbers, waits, and hands on the batch. So order and prefetching are the
# same for both. How a process is started, and what happens when one of the two dies, stands in the appendix.


# %%
class Worker:
    """Makes batches by a recipe, in the thread or process that calls it. In there, `get_worker_info()` returns it."""

    place = threading.local()

    def __init__(self, recipe: Recipe, number: int, workers: int, init: Callable[[int], Any] | None) -> None:
        self.recipe, self.id, self.num_workers, self.init = recipe, number, workers, init
        self.seed, self.dataset = recipe.seed + number, recipe.dataset

    def __call__(self, *task: Any) -> Any:
        if get_worker_info() is not self:
            self.place.info = self
            if self.init is not None:
                with seeded((self.recipe.seed, 0, 0, self.id + 1)):
                    self.init(self.id)
        return self.recipe(*task)

    def end(self) -> None:
        """Called when no more is to be made; for workers that are elsewhere."""


def get_worker_info() -> Worker | None:
    """The worker that is running this, with its `id`, `num_workers`, `seed` and `dataset`; None in the main program."""
    return getattr(Worker.place, "info", None)


def work(tasks: SimpleQueue, worker: Callable) -> None:
    """What a worker's thread does: one task after the other, until there is None."""
    while (item := tasks.get()) is not None:
        future, task = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(worker(*task))
            except BaseException as error:
                future.set_exception(error)
        del item, future  # a batch must not live until the next one is there


class Crew:
    """Worker threads, each with a process where there is a context. They end with `close()`, or with the crew."""

    start_processes: ClassVar[Callable[[Any, list[Worker]], list] | None] = None

    def __init__(self, loader: DataLoader, recipe: Recipe) -> None:
        self.tasks: SimpleQueue = SimpleQueue()
        workers = 1 if isinstance(loader.dataset, IterableDataset) else loader.num_workers
        hands: list[Any] = [Worker(recipe, i, workers, loader.worker_init_fn) for i in range(workers)]
        if loader.multiprocessing_context is not None:
            if Crew.start_processes is None:
                raise RuntimeError("DataLoader: worker processes stand in m10_dataloader_appendix, which is not loaded")
            hands = Crew.start_processes(loader.multiprocessing_context, hands)
        threads = [threading.Thread(target=work, args=(self.tasks, hand), daemon=True) for hand in hands]
        self.close = weakref.finalize(self, dismiss, self.tasks, threads, hands)
        for thread in threads:
            thread.start()

    def submit(self, task: tuple) -> Future:
        future: Future = Future()
        self.tasks.put((future, task))
        return future


def attach_processes(start: Callable[[Any, list[Worker]], list]) -> None:
    """Have `start(context, workers)` give workers in processes, which are called like those that it is given."""
    Crew.start_processes = start


def dismiss(tasks: SimpleQueue, threads: list[threading.Thread], hands: list[Any]) -> None:
    """End a crew. It runs when the crew is closed, is collected as garbage, or the interpreter exits."""
    with suppress(Empty):
        while True:
            tasks.get_nowait()[0].cancel()
    for _ in threads:
        tasks.put(None)
    for hand in hands:
        hand.end()
    deadline = time.monotonic() + 1  # for the batch under way; who takes longer ends by itself after it
    for thread in threads:
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


# %% [markdown]
# ### The loader
# What is left is bookkeeping: whose turn it is, and where we are. `_run` is the loader; it keeps `prefetch_factor`
# batches a worker under way, and hands them out in order. The place that `state_dict` tells counts the batches handed
# out, not those made ahead.


# %%
class DataLoader:
    """Batches of a dataset, one epoch for each `iter()`, made ahead by workers.

    A batch depends on the seed, its epoch and its number only, as far as it draws by TinyTorch's functions: not on the
    number or kind of workers, nor on what else is drawn; and loading leaves the program's own random numbers alone. An
    `iter()` after one that was left in the middle begins the next epoch.

    Args:
        dataset: anything with `__getitem__` and `__len__`; with `get_batch(indices)` it is asked for whole batches. An
            IterableDataset is read by one worker, in order.
        batch_size: None gives single examples, as they are.
        shuffle: a new random order each epoch.
        sampler, batch_sampler: give the numbers of the examples, or lists of them, in the place of shuffle and size.
        num_workers: how many threads make batches ahead; with 0 they are made when they are asked for.
        collate_fn: makes a batch of a list of examples; without it, `get_batch` or `collate` does.
        pin_memory: hand batches out in page-locked memory, where there is CUDA: see `Tensor.pin_memory`.
        drop_last: leave out a last batch that is not full.
        timeout: seconds to wait for a batch before giving up; 0 waits for ever.
        worker_init_fn: called with each worker's number, in it, before its first batch.
        prefetch_factor: batches that each worker makes ahead; 2 if None.
        persistent_workers: keep the workers from one epoch to the next; processes take a second to start.
        multiprocessing_context: "spawn", "forkserver" or "fork" gives each worker a process.
        batch_transform: changes each whole batch: augmentation, mixup, the way to a device.
        seed: what the batches depend on; without one, it is drawn when the loader is made, after `manual_seed`.

    Attributes:
        epoch, batch: the epoch, and how many of its batches were handed out.
        waited: seconds that the present or last epoch has waited for its batches.
    """

    def __init__(
        self, dataset: Any, batch_size: int | None = 1, shuffle: bool | None = None,
        sampler: Iterable[int] | None = None, batch_sampler: Iterable[Sequence[int]] | None = None,
        num_workers: int = 0, collate_fn: Callable[[Any], Any] | None = None, pin_memory: bool = False,
        drop_last: bool = False, timeout: float = 0, worker_init_fn: Callable[[int], Any] | None = None, *,
        prefetch_factor: int | None = None, persistent_workers: bool = False, multiprocessing_context: Any = None,
        batch_transform: Callable[[Any], Any] | None = None, seed: int | None = None,
    ) -> None:  # fmt: skip
        prefetch_factor = 2 if prefetch_factor is None else prefetch_factor
        whole("num_workers", num_workers, least=0)
        whole("prefetch_factor", prefetch_factor, least=1)
        whole("seed", 0 if seed is None else seed, least=0)
        if timeout < 0 or ((timeout or persistent_workers or multiprocessing_context) and not num_workers):
            raise ValueError("DataLoader: timeout, persistent_workers and multiprocessing_context are for workers; "
                             f"got timeout {timeout} and num_workers {num_workers}")  # fmt: skip
        if batch_sampler is not None and (batch_size != 1 or shuffle or sampler is not None or drop_last):
            raise ValueError("DataLoader: batch_sampler excludes batch_size, shuffle, sampler and drop_last")
        if sampler is not None and shuffle:
            raise ValueError("DataLoader: sampler excludes shuffle")
        if batch_size is None and drop_last:
            raise ValueError("DataLoader: batch_size=None gives single examples, so there is no last batch to drop")
        if isinstance(dataset, IterableDataset) and (shuffle or sampler is not None or batch_sampler is not None):
            raise ValueError("DataLoader: an IterableDataset has its own order; shuffle and samplers are not for it")
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size and int(batch_size), drop_last
        default = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
        self.sampler = default if sampler is None else sampler
        batches = None if batch_size is None else BatchSampler(self.sampler, batch_size, drop_last)
        self.batch_sampler = batches if batch_sampler is None else batch_sampler
        self.num_workers, self.prefetch_factor, self.timeout = num_workers, prefetch_factor, timeout
        self.collate_fn, self.worker_init_fn, self.batch_transform = collate_fn, worker_init_fn, batch_transform
        self.pin_memory, self.persistent_workers = pin_memory, persistent_workers
        named = isinstance(multiprocessing_context, str)
        self.multiprocessing_context = get_context(multiprocessing_context) if named else multiprocessing_context
        self.seed = draw_seed() if seed is None else int(seed)
        self.epoch = self.batch = 0
        self.waited = 0.0
        self._idle: Crew | None = None  # workers that wait for the next epoch
        self._newest: object = None  # the iterator under way, or left in the middle

    def __len__(self) -> int:
        """Batches in an epoch; TypeError if dataset or sampler cannot tell."""
        numbers: Any = self.sampler if self.batch_sampler is None else self.batch_sampler
        return len(numbers)

    def __iter__(self) -> Iterator[Any]:
        if self._newest is not None:
            self.epoch, self.batch = self.epoch + 1, 0
        self._newest, self.waited = object(), 0.0
        return self._run(self._newest, self.epoch, self.batch)

    def _tasks(self, epoch: int) -> Iterator[tuple[int, int, Any]]:
        """What has to be made in an epoch, from its first batch on."""
        if isinstance(self.dataset, IterableDataset):
            yield from ((epoch, number, None) for number in count())
        draws = seeded((self.seed, epoch))
        with draws:
            numbers = iter(self.sampler if self.batch_sampler is None else self.batch_sampler)
        for number in count():
            with draws:  # entered for each, so that what the user draws in between is no concern of the sampler's
                indices = next(numbers, End)
            if indices is End:
                return
            yield epoch, number, indices

    def _run(self, run: object, epoch: int, first: int) -> Iterator[Any]:
        recipe = (StreamRecipe if isinstance(self.dataset, IterableDataset) else Recipe)(self)
        crew = self._idle or (Crew(self, recipe) if self.num_workers else None)
        self._idle = None
        tasks, pending = islice(self._tasks(epoch), first, None), deque[Future]()
        done, pins = False, self.pin_memory and cuda_is_available()
        try:
            while True:
                start = time.perf_counter()
                if crew is None:
                    task = next(tasks, None)
                    batch = End if task is None else recipe(*task)
                else:
                    ahead = self.num_workers * self.prefetch_factor - len(pending)
                    pending.extend(crew.submit(task) for task in islice(tasks, ahead))
                    batch = self._next_of(pending) if pending else End
                if self._newest is run:
                    self.waited += time.perf_counter() - start
                    self.batch += batch is not End
                if batch is End:
                    break
                yield pin_memory(batch) if pins else batch
                del batch
            done = True
        finally:
            for future in pending:
                future.cancel()
            if crew is not None and not (done and self.persistent_workers):
                crew.close()
        if self._newest is run:
            self._idle = crew if self.persistent_workers else None
            self.epoch, self.batch, self._newest = epoch + 1, 0, None

    def _next_of(self, pending: deque[Future]) -> Any:
        if not wait([pending[0]], self.timeout or None).done:
            raise RuntimeError(f"DataLoader: no batch within the timeout of {self.timeout} seconds")
        return pending.popleft().result()  # no name for it: it holds its error, whose traceback holds this frame

    # -- resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Which epoch it is, and how many of its batches were handed out; and of which data, as far as can be told."""
        examples = len(self.dataset) if hasattr(self.dataset, "__len__") else None
        place = {"epoch": self.epoch, "batch": self.batch, "seed": self.seed}
        return {**place, "examples": examples, "batch_size": self.batch_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next `iter()` go on where `state_dict()` was called; ValueError for a state of other data."""
        mine = self.state_dict()
        if not isinstance(state, Mapping) or state.keys() != mine.keys():
            raise ValueError(f"DataLoader: expected a state of {', '.join(mine)}, got {state!r}")
        for name in ("epoch", "batch", "seed"):
            whole(name, state[name], least=0)
        for name in ("examples", "batch_size"):
            if state[name] != mine[name]:
                raise ValueError(f"DataLoader: the state is of {name} {state[name]}, this loader has {mine[name]}")
        with suppress(TypeError):  # no length
            if state["batch"] > len(self):
                raise ValueError(f"DataLoader: the state is at batch {state['batch']}, an epoch has {len(self)}")
        self.epoch, self.batch, self.seed = state["epoch"], state["batch"], state["seed"]
        self._newest = self._idle = None  # workers that were kept know the old seed


def draw_seed() -> int:
    """A seed from the generator that `manual_seed` seeds."""
    return int(randint(1 << 32, (), device="cpu"))


def whole(name: str, value: Any, least: int) -> None:
    """ValueError unless `value` is a whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"DataLoader: {name} must be a whole number >= {least}, not {value!r}")


def numbered(n: int) -> TensorDataset:
    """n pictures of 4×4 that show their number, and the numbers. For the tests."""
    return TensorDataset((arange(n).reshape(n, 1, 1, 1) + zeros(1, 1, 4, 4)).to(uint8), arange(n))


def shown(batches: Iterable[Any]) -> list:
    return [[part.tolist() for part in batch] for batch in batches]


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    loader = DataLoader(numbered(23), batch_size=5, shuffle=True, seed=8)
    epochs = [shown(loader) for _ in range(3)]
    for epoch in epochs:
        assert [len(labels) for _, labels in epoch] == [5, 5, 5, 5, 3]
        assert sorted(label for _, labels in epoch for label in labels) == list(range(23))
        assert all([image[0][0][0] for image in images] == labels for images, labels in epoch)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batches_do_not_depend_on_workers_nor_on_other_draws() -> None:
    found, augment = [], Compose([RandomCrop(4, padding=2), RandomHorizontalFlip()])
    for workers in (0, 1, 3):
        manual_seed(workers)
        expected = rand(2).tolist()
        manual_seed(workers)
        loader = DataLoader(numbered(23), 4, True, num_workers=workers, batch_transform=augment, seed=1)
        found.append([shown(loader), [(rand(1), x)[1].tolist() for x, _ in loader]])
        manual_seed(workers)
        shown(loader)
        assert rand(2).tolist() == expected
    assert found[0] == found[1] == found[2]
    assert shown(still := DataLoader(numbered(23), 4, batch_transform=augment, seed=1)) != shown(still)


def test_a_loader_goes_on_in_the_middle_of_an_epoch() -> None:
    options: dict[str, Any] = {"batch_size": 4, "shuffle": True, "batch_transform": RandomHorizontalFlip()}
    for workers in (0, 2):
        loader, resumed = (DataLoader(numbered(23), **options, num_workers=workers, seed=s) for s in (5, 6))
        whole_epoch = shown(DataLoader(numbered(23), **options, seed=5))
        batches = iter(loader)
        assert shown(islice(batches, 3)) == whole_epoch[:3]
        resumed.load_state_dict(loader.state_dict())
        assert shown(resumed) == whole_epoch[3:] == shown(batches)
        assert resumed.state_dict() == loader.state_dict()
    load = DataLoader(numbered(22), **options).load_state_dict
    assert "of examples 23, this loader has 22" in message_of(load, loader.state_dict(), error=ValueError)


class Stream(IterableDataset):
    """Random numbers, ten of them. For the tests."""

    def __iter__(self) -> Iterator[Tensor]:
        return (rand(2) for _ in range(10))


def test_a_stream_is_read_in_order_by_one_worker() -> None:
    first, second = (DataLoader(Stream(), 4, num_workers=workers, seed=2) for workers in (0, 2))
    whole_epoch = [batch.tolist() for batch in first]
    assert [len(batch) for batch in whole_epoch] == [4, 4, 2]
    assert [batch.tolist() for batch in second] == whole_epoch
    second.load_state_dict({**second.state_dict(), "epoch": 0, "batch": 2})
    assert [batch.tolist() for batch in second] == whole_epoch[2:]


class Broken(Dataset):
    """Has no example 3. For the tests."""

    def __getitem__(self, index: int) -> float:
        return 1 / (index - 3)

    def __len__(self) -> int:
        return 6


def test_workers_end_and_their_errors_arrive() -> None:
    before, notes = threading.active_count(), []
    for workers in (0, 2):
        try:
            list(DataLoader(Broken(), 2, num_workers=workers))
        except ZeroDivisionError as error:
            notes += error.__notes__
    assert notes == ["DataLoader: raised in making batch 1 of epoch 0, of examples [2, 3]"] * 2
    next(iter(DataLoader(numbered(99), 2, num_workers=3)))  # and forget it
    assert threading.active_count() == before


# %% [markdown]
# ## Systems analysis
#
# What does a batch cost, by its size and by the way in which it is gathered, and how much of that does training see?
# The second table has two kinds of steps: one that leaves the processor alone, as a GPU's does, and one that computes
# on it. Workers take time off the first; off the second only what a free core can give.


# %%
def analyze() -> None:
    """Measure pictures a second by batch size and way of gathering, and the share of time that training waits."""
    pictures = TensorDataset(randint(256, (4096, 3, 32, 32)).to(uint8), randint(10, (4096,)))
    augment = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), Normalize(0.5, 0.25)])
    rows: list[list] = []
    for size in (1, 8, 32, 128, 512):
        chosen = randint(4096, (size,)).tolist()
        single, gather = seconds(Dataset.get_batch, pictures, chosen), seconds(pictures.get_batch, chosen)
        change = seconds(augment, pictures.get_batch(chosen))
        rows.append([size, *(f"{1e6 * t / size:.2f}" for t in (single, gather, change)), size / (gather + change)])
    print_table(["batch", "µs a picture: one by one", "get_batch", "augment", "pictures/s"], rows)
    rows, weight = [], randn(3072, 1024)
    steps = {"elsewhere": lambda x: time.sleep(2e-3), "here": lambda x: x.reshape(128, -1) @ weight}
    for (name, step), workers in product(steps.items(), (0, 1, 2)):
        loader, runs = DataLoader(pictures, 128, True, num_workers=workers, batch_transform=augment, seed=0), []
        for _ in range(5):
            start = time.perf_counter()
            for images, _ in loader:
                step(images)
            runs.append((time.perf_counter() - start, loader.waited))
        total, waited = min(runs)
        rows.append([name, workers, f"{1e3 * total / len(loader):.2f}", f"{waited / total:.0%}", 4096 / total])
    print_table(["step", "workers", "ms a step", "waiting", "pictures/s"], rows)


# %% [markdown]
# ## Production context
#
# `torch.utils.data` is the model of this chapter. Its workers are processes, forked on Linux, and batches come back
# through shared memory; threads would be no use, because a dataset gives single examples and its transforms are Python
# around small tensors. Whole batches are its `__getitems__` and torchvision's `transforms.v2`. Its workers have a seed
# each, so the augmentation changes with their number; and a `DataLoader` does not know its place (`torchdata`'s
# `StatefulDataLoader` does). NVIDIA's DALI and FFCV decode and augment on the GPU or in compiled threads. Left out:
# shared memory, a stream read by several workers, and a share for each of several machines (`DistributedSampler`).

# %% [markdown]
# ## Integration testing
#
# Training with random crops, workers and dropout is cut short in the middle of an epoch, and resumed by a loader that
# began with another seed: it ends with the same bits.


# %%
class StopAt(Callback):
    """Keep the state after a certain step, and give up."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            self.state = trainer.state_dict()
            raise InterruptedError


def test_training_resumes_in_the_middle_of_an_epoch() -> None:
    def make(seed: int, *callbacks: Callback) -> tuple[Trainer, DataLoader]:
        manual_seed(seed)
        model = Sequential(Flatten(), Dropout(0.1), Linear(16, 3))
        augment = Compose([RandomCrop(4, padding=1), Normalize(0.1, 0.2)])
        data = TensorDataset(numbered(30).tensors[0], arange(30) % 3)
        loader = DataLoader(data, 4, shuffle=True, num_workers=2, batch_transform=augment)
        return Trainer(model, SGD(model.parameters(), lr=0.05), cross_entropy, callbacks=callbacks), loader

    whole_run, loader = make(1)
    whole_run.fit(loader, epochs=3)
    stop = StopAt(13)
    broken_off, loader = make(1, stop)
    message_of(broken_off.fit, loader, 3, error=InterruptedError)
    resumed, loader = make(2)
    resumed.load_state_dict(stop.state)
    resumed.fit(loader, epochs=3)
    assert resumed.history == whole_run.history
    for mine, other in zip(resumed.model.parameters(), whole_run.model.parameters(), strict=True):
        assert mine.tolist() == other.tolist()


# %% [markdown]
# ## Thinking questions
#
# 1. From the first table: from which batch size on is gathering bound by memory rather than by calls? How can you tell?
# 2. A run loads its checkpoint in the middle of epoch 7. Which batches does this loader make again, and which would one
#    have to make whose workers keep a generator each?
# 3. With a step of 5 ms on a GPU and 12 ms to make a batch: how many workers, and what does `prefetch_factor` change?
#    And if every tenth batch takes 60 ms?
# 4. A dataset of 180 MB is sent to eight spawned processes. What does that cost, and how would a fork avoid it?

# %% [markdown]
# ## Summary
#
# A dataset that gathers whole batches, an order that is a function of a seed, transforms without loops, and workers
# that nobody has to wait for or clean up after. With the convolutions of module 09 this is what a network needs to see;
# text will come through the same loader in Part III.


if __name__ == "__main__":
    run_module(globals())
