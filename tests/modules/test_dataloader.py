"""Module 10: datasets, samplers, transforms of whole batches, and what a loader promises of its batches."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter, namedtuple
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinytorch as t
from tinytorch.datasets import Digits
from tinytorch.m08_training import Trainer, read_checkpoint
from tinytorch.m10_dataloader import Recipe, take_batch, work
from tinytorch.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToFloat
from tinytorch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
    random_split,
)

RNG = np.random.default_rng(1010)


def one_line(function: Any, *args: Any, error: type[Exception] = ValueError, **keywords: Any) -> str:
    with pytest.raises(error) as found:
        function(*args, **keywords)
    assert "\n" not in str(found.value)
    return str(found.value)


def pictures(n: int, size: int = 6) -> TensorDataset:
    """n pictures in 3 channels, each pixel of which tells where it is, and their numbers."""
    pixels = RNG.integers(0, 256, (n, 3, size, size)).astype(np.uint8)
    return TensorDataset(t.tensor(pixels), t.arange(n))


AUGMENT = Compose([RandomCrop(6, padding=2), RandomHorizontalFlip(), Normalize((0.4, 0.5, 0.6), 3 * (0.25,))])


def shown(batches: Any) -> list:
    return [
        [part.tolist() for part in batch] if isinstance(batch, (tuple, list)) else batch.tolist() for batch in batches
    ]


def labels(batches: Any) -> list[list[int]]:
    return [batch[-1].tolist() for batch in batches]


# -- datasets ----------------------------------------------------------------------------------------------------------


@pytest.mark.device
def test_a_tensor_dataset_gathers_at_once(device: str) -> None:
    x, y = RNG.standard_normal((9, 2, 3)).astype(np.float32), np.arange(9)
    data = TensorDataset(t.tensor(x), t.tensor(y))
    assert len(data) == 9
    for indices in ([3, 0, 3, 8], [-1], range(2, 5), np.array([4, 4])):
        images, numbers = data.get_batch(indices)
        assert images.device == numbers.device == t.zeros(1).device
        np.testing.assert_array_equal(images.numpy(), x[list(indices)])
        assert numbers.tolist() == y[list(indices)].tolist()
    assert data.get_batch([])[0].shape == (0, 2, 3)
    assert [int(number) for _, number in data] == list(range(9))  # Python's protocol ends with an IndexError
    with pytest.raises(IndexError):
        data.get_batch([9])


@pytest.mark.parametrize("tensors", [(), (t.zeros(3), t.zeros(4)), (t.zeros(3), t.tensor(1.0))])
def test_a_tensor_dataset_needs_one_length(tensors: tuple) -> None:
    assert one_line(TensorDataset, *tensors).startswith("TensorDataset: expected tensors of one length, got lengths [")


def test_a_batch_is_a_copy() -> None:
    data = pictures(6)
    before = data.tensors[0].tolist()
    images, _ = next(iter(DataLoader(data, 6, batch_transform=None)))
    images.zero_()
    assert data.tensors[0].tolist() == before


class Squares(Dataset):
    """Number and square, one by one."""

    def __init__(self, n: int = 10) -> None:
        self.n = n

    def __getitem__(self, index: int) -> tuple[int, float]:
        if not 0 <= index < self.n:
            raise IndexError(index)
        return index, float(index**2)

    def __len__(self) -> int:
        return self.n


def test_subsets_and_sums() -> None:
    both = Squares(3) + Squares(4)
    assert isinstance(both, ConcatDataset)
    assert [number for number, _ in both] == [0, 1, 2, 0, 1, 2, 3]
    assert both[-1] == (3, 9.0) == both[6]
    assert both[-7] == (0, 0.0)
    for index in (7, -8):
        assert one_line(both.__getitem__, index, error=IndexError) == f"ConcatDataset: no example {index} among 7"
    assert len(ConcatDataset([Squares(2), [], Squares(1)])) == 3
    assert ConcatDataset([[], "ab", [], "c"])[2] == "c"
    part = Subset(both, [6, 0, 3])
    assert [part[i] for i in range(len(part))] == [(3, 9.0), (0, 0.0), (0, 0.0)]
    assert part.get_batch([0, 2])[1].tolist() == [9.0, 0.0]


def test_a_subset_asks_its_dataset_for_the_whole_batch() -> None:
    asked = []

    class Counting(TensorDataset):
        def get_batch(self, indices):
            asked.append(list(indices))
            return super().get_batch(indices)

    data = Counting(t.arange(10) * 2)
    assert Subset(Subset(data, [1, 3, 5, 7]), [3, 2]).get_batch([0, 1, 1])[0].tolist() == [14, 10, 10]
    assert asked == [[7, 5, 5]]


class NumberedDigits(Digits):
    """Changes the single examples only."""

    def __getitem__(self, index: int) -> Any:
        return *super().__getitem__(index), index


class Doubled(Subset):
    """Changes the single examples of a part only."""

    def __getitem__(self, index: int) -> Any:
        picture, label, number = super().__getitem__(index)
        return picture, label, 2 * number


def test_a_subclass_that_changes_single_examples_changes_its_batches() -> None:
    plain, data = Digits(), NumberedDigits()
    expected = shown(DataLoader(plain, 2, sampler=[5, 0, 7]))
    for workers in (0, 1):
        for dataset in (data, Subset(data, range(10)), ConcatDataset([data, data])):
            batches = shown(DataLoader(dataset, 2, sampler=[5, 0, 7], num_workers=workers))
            assert [batch[:2] for batch in batches] == expected
            assert [batch[2] for batch in batches] == [[5, 0], [7]]
        assert labels(DataLoader(Doubled(data, [5, 0, 7]), 2, num_workers=workers)) == [[10, 0], [14]]


def test_a_subclass_that_gathers_is_asked_for_whole_batches() -> None:
    class AtOnce(NumberedDigits):
        def get_batch(self, indices):
            return "at once", list(indices)

    class Further(AtOnce):
        pass

    class Singly(Further):
        def __getitem__(self, index):
            return index

    class Duck:
        def get_batch(self, indices):
            return "at once", list(indices)

    for kind in (AtOnce, Further, Duck):
        assert take_batch(kind(), [3, 1]) == ("at once", [3, 1])
    assert next(iter(DataLoader(Further(), 2))) == ("at once", [0, 1])
    assert take_batch(Singly(), [3, 1]).tolist() == [3, 1]


def test_whatever_has_examples_by_number_is_a_dataset() -> None:
    assert take_batch([3, 1, 2], [2, 0]).tolist() == [2, 3]
    assert labels(DataLoader([(0.5, i) for i in range(5)], 2)) == [[0, 1], [2, 3], [4]]


def test_bases_say_what_is_missing() -> None:
    class Empty(Dataset):
        pass

    assert one_line(lambda: Empty()[0], error=NotImplementedError) == "Empty must define __getitem__"
    assert one_line(iter, Sampler(), error=NotImplementedError) == "Sampler must define __iter__"
    assert one_line(iter, IterableDataset(), error=NotImplementedError) == "IterableDataset must define __iter__"


@given(st.integers(0, 40), st.lists(st.integers(1, 10), min_size=1, max_size=5), st.integers(0, 2**40))
def test_random_split_shares_nothing_and_leaves_nothing(n: int, weights: list[int], seed: int) -> None:
    fractions = [w / sum(weights) for w in weights]
    parts = random_split(range(n), fractions, seed=seed)
    assert sorted(x for part in parts for x in part.indices) == list(range(n))
    lengths = [len(part) for part in parts]
    assert all(abs(length - n * share) <= 1 + 1e-9 for length, share in zip(lengths, fractions, strict=True))
    again = random_split(range(n), lengths, seed=seed) if n != 1 else parts
    assert [list(part.indices) for part in again] == [list(part.indices) for part in parts]


def test_random_split_by_lengths_and_its_seed() -> None:
    t.manual_seed(1)
    first = random_split(range(10), [7, 3])
    second = random_split(range(10), [7, 3])
    t.manual_seed(1)
    assert random_split(range(10), [7, 3])[0].indices == first[0].indices != second[0].indices
    state = t.get_rng_state()
    assert random_split(range(10), [7, 3], seed=5)[1].indices != random_split(range(10), [7, 3], seed=6)[1].indices
    assert t.get_rng_state() == state
    assert [len(part) for part in random_split(range(10), [0.33, 0.33, 0.34])] == [4, 3, 3]
    parts = random_split(range(10), np.array([7, 3]), seed=5)
    assert [part.indices for part in parts] == [part.indices for part in random_split(range(10), [7, 3], seed=5)]
    for wrong in ([7, 4], [0.5, 0.4], [11, -1], [1.5, -0.5], [7.0, 3.5]):
        assert "neither lengths with the sum 10 nor fractions of 1" in one_line(random_split, range(10), wrong)


# -- collating ---------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")


def test_collating_goes_into_structures() -> None:
    batch = default_collate([
        {"a": t.ones(2), "b": [1, (2.0, True)], "c": "x", "d": Pair(np.float32(1), np.arange(2))},
        {"a": t.zeros(2), "b": [3, (4.0, False)], "c": "y", "d": Pair(np.float32(2), np.arange(2, 4))},
    ])  # fmt: skip
    assert batch["a"].tolist() == [[1, 1], [0, 0]]
    assert isinstance(batch["b"], list)
    assert batch["b"][0].tolist() == [1, 3]
    assert isinstance(batch["b"][1], tuple)
    assert [x.tolist() for x in batch["b"][1]] == [[2.0, 4.0], [True, False]]
    assert [str(x.dtype) for x in (batch["b"][0], *batch["b"][1])] == ["int64", "float64", "bool"]
    assert batch["c"] == ["x", "y"]
    assert isinstance(batch["d"], Pair)
    assert (batch["d"].x.tolist(), str(batch["d"].x.dtype)) == ([1.0, 2.0], "float32")
    assert batch["d"].y.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([t.ones(2), t.ones(2), t.ones(3)], "example 2 of the batch has shape (3,), example 0 has (2,)"),
        ([np.ones((2, 2)), np.ones(2)], "example 1 of the batch has shape (2,), example 0 has (2, 2)"),
        ([(1, 2), (1, 2, 3)], "different numbers of parts: [2, 3]"),
    ],
)
def test_what_cannot_be_collated(examples: list, message: str) -> None:
    assert message in one_line(default_collate, examples)


# -- samplers ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 30), st.integers(1, 12), st.booleans())
def test_batches_of_numbers(n: int, size: int, drop: bool) -> None:
    sampler = BatchSampler(SequentialSampler(range(n)), size, drop)
    batches = list(sampler)
    expected = [list(range(i, min(i + size, n))) for i in range(0, n, size)]
    assert batches == [batch for batch in expected if len(batch) == size or not drop]
    assert len(sampler) == len(batches)


def test_a_random_sampler_draws_all_or_as_many_as_asked() -> None:
    t.manual_seed(0)
    assert sorted(RandomSampler(range(9))) == list(range(9))
    few = list(RandomSampler(range(9), num_samples=4))
    assert len(set(few)) == 4
    many = RandomSampler(range(9), num_samples=21)
    drawn = list(many)
    assert len(many) == len(drawn) == 21
    assert sorted(drawn[:9]) == sorted(drawn[9:18]) == list(range(9))
    again = list(RandomSampler(range(3), replacement=True, num_samples=3000))
    assert all(abs(count - 1000) < 120 for count in Counter(again).values())
    assert list(RandomSampler([])) == []
    assert sorted(SubsetRandomSampler([9, 4, 6])) == [4, 6, 9]
    assert len({tuple(SubsetRandomSampler([9, 4, 6])) for _ in range(60)}) == 6


def test_weights_are_probabilities() -> None:
    t.manual_seed(0)
    counts = Counter(WeightedRandomSampler([0, 1, 0, 3, 6, 0], 20_000))
    assert counts.keys() == {1, 3, 4}
    for index, share in ((1, 0.1), (3, 0.3), (4, 0.6)):
        assert abs(counts[index] / 20_000 - share) < 0.015
    assert len(WeightedRandomSampler([1, 1], 5)) == 5
    without = WeightedRandomSampler([0, 1, 2, 3], 3, replacement=False)
    assert {frozenset(without) for _ in range(5)} == {frozenset({1, 2, 3})}
    for wrong in ([0.0, 0.0], [1, -1], [float("nan"), 1.0], [[1.0]], [float("inf")]):
        assert "finite weights >= 0 that are not all 0" in one_line(WeightedRandomSampler, wrong, 2)


# -- transforms --------------------------------------------------------------------------------------------------------


@pytest.mark.device
def test_normalizing(device: str) -> None:
    x = RNG.integers(0, 256, (4, 3, 5, 2)).astype(np.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.5, 0.25, 2.0)
    expected = (x / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    for out in (Normalize(mean, std)(t.tensor(x)), Normalize(mean, std)(ToFloat()(t.tensor(x)))):
        assert out.dtype == t.float32
        assert out.device == t.zeros(1).device
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(Normalize(0.5, 0.25)(t.tensor(x)).numpy(), (x / 255 - 0.5) / 0.25, atol=1e-5)
    assert Normalize(0.5, 0.25)(t.ones(1, 2, 1, 1, dtype=t.float64)).dtype == t.float64
    for kind in (np.array, t.tensor, list):
        assert Normalize(kind(mean), kind(std))(t.tensor(x)).tolist() == Normalize(mean, std)(t.tensor(x)).tolist()
    floats = ToFloat()(t.tensor(x))
    assert ToFloat()(floats).tolist() == floats.tolist()
    np.testing.assert_allclose(floats.numpy(), x / 255, rtol=1e-6)


@pytest.mark.device
def test_a_crop_is_a_window_of_the_padded_picture_and_every_window_occurs(device: str) -> None:
    x = 1 + RNG.integers(0, 255, (60, 2, 3, 4)).astype(np.uint8)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    places = set()
    t.manual_seed(2)
    for _ in range(4):
        out = RandomCrop((4, 3), padding=1)(t.tensor(x))
        assert out.dtype == t.uint8
        for i, picture in enumerate(out.numpy()):
            found = [
                (r, c) for r in range(2) for c in range(4) if (padded[i, :, r : r + 4, c : c + 3] == picture).all()
            ]
            assert len(found) >= 1
            places |= set(found) if len(found) == 1 else set()
    assert places == set(itertools.product(range(2), range(4)))
    assert RandomCrop(3)(t.tensor(x)).shape == (60, 2, 3, 3)
    assert RandomCrop((3, 4))(t.tensor(x)).tolist() == x.tolist()
    assert RandomCrop((3, 4), padding=None)(t.tensor(x)).tolist() == x.tolist()


@pytest.mark.device
def test_flipping_mirrors_each_picture_or_leaves_it(device: str) -> None:
    x = RNG.standard_normal((400, 1, 2, 3)).astype(np.float32)
    t.manual_seed(3)
    out = RandomHorizontalFlip(0.25)(t.tensor(x)).numpy()
    mirrored = (out == x[..., ::-1]).all((1, 2, 3))
    np.testing.assert_array_equal(out[~mirrored], x[~mirrored])
    assert 70 < mirrored.sum() < 130
    assert RandomHorizontalFlip(0)(t.tensor(x)).tolist() == x.tolist()
    assert RandomHorizontalFlip(1)(t.tensor(x)).tolist() == x[..., ::-1].tolist()
    many = t.tensor(np.tile(np.float32([1, 0]), (2000, 1, 1, 1)))
    assert 0.45 <= 1 - RandomHorizontalFlip()(many)[..., 0].mean().item() <= 0.55


@pytest.mark.device
def test_transforms_draw_the_same_on_every_device_and_do_not_touch_their_input(device: str) -> None:
    x = RNG.integers(0, 256, (8, 3, 6, 6)).astype(np.uint8)
    results = []
    for place in ("cpu", device):
        t.manual_seed(4)
        images = t.tensor(x, device=place)
        out, labels = AUGMENT((images, "labels"))
        assert labels == "labels"
        assert images.tolist() == x.tolist()
        results.append(out.numpy())
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "argument", "error", "message"),
    [
        (ToFloat, t.zeros(3, 4, 4), ValueError, "expected pictures (N, C, H, W), got a tensor of shape (3, 4, 4)"),
        (ToFloat, "x", ValueError, "ToFloat: expected pictures (N, C, H, W), got str"),
        (ToFloat, t.zeros(1, 1, 2, 2, dtype=t.int64), TypeError, "uint8, 0 to 255, or floating, not int64"),
        (lambda: RandomCrop(5), t.zeros(1, 1, 4, 6), ValueError, "pictures of 4×6 with padding 0 have no part of 5×5"),
        (lambda: Normalize((1, 2), (1, 2)), t.zeros(1, 3, 4, 6), ValueError, "Normalize: 2 means for 3 channels"),
    ],
)  # fmt: skip
def test_what_transforms_refuse(make: Any, argument: Any, error: type[Exception], message: str) -> None:
    assert message in one_line(make(), argument, error=error)


def test_bad_transforms_are_refused() -> None:
    assert "RandomCrop: expected sizes >= 1" in one_line(RandomCrop, 0)
    assert "RandomCrop: expected sizes >= 1" in one_line(RandomCrop, (4, 4, 4))
    assert "RandomCrop: expected sizes >= 1" in one_line(RandomCrop, 8.5)
    for padding in (-1, (1, 1), 1.0):
        assert "padding >= 0" in one_line(RandomCrop, 8, padding=padding)
    assert "p must be between 0 and 1, not 1.5" in one_line(RandomHorizontalFlip, 1.5)
    for mean, std in ((0.5, 0), ((1, 2), (1,))):
        assert "Normalize: expected as many deviations > 0 as means" in one_line(Normalize, mean, std)


def test_transforms_show_what_they_are() -> None:
    expected = "Compose([RandomCrop(size=(6, 6), padding=2), RandomHorizontalFlip(p=0.5), ToFloat()])"
    assert repr(Compose([RandomCrop(6, padding=2), RandomHorizontalFlip(), ToFloat()])) == expected
    assert repr(Normalize(0.5, 0.25)) == "Normalize(mean=(0.5,), std=(0.25,))"


# -- what a batch depends on -------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(0, 30), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(1, 3))
def test_an_epoch_holds_everything_once(n: int, size: int, drop: bool, shuffle: bool, workers: int, ahead: int) -> None:
    loader = DataLoader(
        TensorDataset(t.arange(n)), size, shuffle, drop_last=drop, num_workers=workers, prefetch_factor=ahead, seed=n
    )
    for epoch in range(2):
        batches = labels(loader)
        assert len(batches) == len(loader) == (n // size if drop else -(-n // size))
        assert [len(batch) for batch in batches] == [size] * (n // size) + ([n % size] if n % size and not drop else [])
        seen = [x for batch in batches for x in batch]
        order = np.random.default_rng((n, epoch)).permutation(n) if shuffle else np.arange(n)
        assert seen == order[: len(seen)].tolist()


def test_batches_are_the_same_for_every_number_of_workers() -> None:
    data = pictures(37)
    results = []
    for workers, ahead in ((0, 2), (1, 2), (2, 1), (3, 4)):
        loader = DataLoader(data, 5, True, num_workers=workers, prefetch_factor=ahead, batch_transform=AUGMENT, seed=11)
        results.append([shown(loader) for _ in range(2)])
    assert all(result == results[0] for result in results)
    assert results[0][0] != results[0][1]
    first, second = (np.asarray(results[0][0][i][0]) for i in (0, 1))
    assert not np.array_equal(first, second)


class Drawing(Dataset):
    """Draws what it gives, by each of TinyTorch's functions that draw."""

    def __getitem__(self, index: int) -> Any:
        drawn = [t.rand(2), t.randn(1), t.randint(100, (2,)), t.randperm(3), t.bernoulli(t.ones(2) / 2)]
        return index, *drawn, t.multinomial(t.ones(5), 2), t.zeros(2).uniform_()

    def __len__(self) -> int:
        return 12


def noisy_collate(examples: list) -> Any:
    time.sleep(float(np.random.default_rng().random()) / 500)
    return *default_collate(examples), t.rand(1)


def test_everything_drawn_in_a_batch_depends_on_its_place_only() -> None:
    expected = None
    for workers in (0, 1, 2, 3):
        t.manual_seed(workers)
        loader = DataLoader(
            Drawing(), 3, True, num_workers=workers, collate_fn=noisy_collate, seed=3,
            batch_transform=lambda batch: (*batch, t.randn(2)),
        )  # fmt: skip
        found = []
        for batch in loader:
            found.append(shown([batch]))
            t.rand(workers + 1)  # what the program draws in between is no concern of the loader's
        expected = expected or found
        assert found == expected
    values = [str(example) for (batch,) in expected for example in zip(*batch[1:-2], strict=True)]
    assert len(set(values)) == 12  # no two examples are alike


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_programs_random_numbers_alone(workers: int) -> None:
    t.manual_seed(5)
    expected = t.rand(8).tolist()
    t.manual_seed(5)
    loader = DataLoader(Drawing(), 3, True, num_workers=workers, seed=3)
    found = []
    for _ in range(2):
        for _ in loader:
            found += t.rand(1).tolist()
    assert found == expected


def test_a_batch_records_no_gradients_wherever_it_is_made() -> None:
    weight = t.tensor([2.0], requires_grad=True)
    for workers in (0, 1):
        loader = DataLoader(
            TensorDataset(t.ones(4, 3)), 2, num_workers=workers, batch_transform=lambda batch: batch[0] * weight
        )
        batches = list(loader)
        assert [batch.requires_grad for batch in batches] == [False, False]
        assert batches[0].tolist() == 2 * [3 * [2]]
        assert (weight * 2).requires_grad  # the program records as before


def test_a_seed_that_is_not_given_depends_on_manual_seed() -> None:
    def orders() -> list:
        return [labels(DataLoader(pictures(20), 4, True)) for _ in range(2)]

    t.manual_seed(6)
    first = orders()
    t.manual_seed(6)
    assert orders() == first
    t.manual_seed(7)
    assert orders() != first
    assert first[0] != first[1]


def test_seeds_differ_in_order_and_in_what_is_drawn() -> None:
    loaders = [DataLoader(Drawing(), 12, seed=seed) for seed in (1, 2)]
    (one,), (two,) = (shown(loader) for loader in loaders)
    assert one[0] == two[0]
    assert one[1] != two[1]


def test_a_dataset_that_seeds_disturbs_only_its_own_batch() -> None:
    class Seeding(Dataset):
        def __getitem__(self, index: int) -> Any:
            t.manual_seed(index)
            return index, t.rand(1)

        def __len__(self) -> int:
            return 6

    t.manual_seed(8)
    state = t.get_rng_state()
    results = [shown(DataLoader(Seeding(), 2, num_workers=workers, seed=1)) for workers in (0, 2)]
    assert results[0] == results[1]
    assert t.get_rng_state() == state
    t.manual_seed(0)


def test_a_sampler_that_draws_as_it_goes_draws_from_the_epochs_generator() -> None:
    class Lazy(Sampler):
        def __iter__(self) -> Iterator[int]:
            for _ in range(12):
                yield int(t.randint(100, ()))

    found = []
    for workers in (0, 2):
        loader = DataLoader(range(100), 5, sampler=Lazy(), num_workers=workers, seed=1)
        epochs = []
        for _ in range(2):
            for batch in loader:
                epochs.append(batch.tolist())
                t.rand(3)
        found.append(epochs)
    assert found[0] == found[1]
    assert found[0][:3] != found[0][3:]
    assert [len(batch) for batch in found[0]] == [5, 5, 2, 5, 5, 2]
    with pytest.raises(TypeError):
        len(loader)


# -- resuming ----------------------------------------------------------------------------------------------------------


def stream(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


def make(**options: Any) -> DataLoader:
    return DataLoader(pictures_23, 5, True, **{"seed": 3, "batch_transform": AUGMENT, **options})


pictures_23 = pictures(23)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", range(13))
def test_resuming_gives_exactly_the_batches_that_were_left(stop: int, workers: int) -> None:
    all_of_them = shown(itertools.islice(stream(make()), 20))
    before = make(num_workers=workers)
    shown(itertools.islice(stream(before), stop))
    state = json.loads(json.dumps(before.state_dict()))
    assert (state["epoch"], state["batch"]) in ((stop // 5, stop % 5), (stop // 5 - 1, 5))
    after = make(num_workers=workers, seed=99)
    after.load_state_dict(state)
    assert after.state_dict() == state
    assert shown(itertools.islice(stream(after), 20 - stop)) == all_of_them[stop:]


def test_after_the_last_batch_only_the_end_of_the_epoch_is_left() -> None:
    for workers in (0, 2):
        loader, again = make(num_workers=workers), make(num_workers=workers)
        iterator = iter(loader)
        for _ in range(5):
            next(iterator)
        assert (loader.epoch, loader.batch) == (0, 5)
        again.load_state_dict(loader.state_dict())
        assert list(again) == []
        assert (again.epoch, again.batch) == (1, 0)
        assert next(iterator, None) is None
        assert loader.state_dict() == again.state_dict()


def test_an_epoch_that_was_left_is_not_begun_again() -> None:
    reference = make()
    epochs = [labels(reference) for _ in range(4)]
    loader = make(num_workers=1)
    assert [next(iter(loader))[1].tolist() for _ in range(3)] == [epoch[0] for epoch in epochs[:3]]
    assert labels(loader) == epochs[3]


def test_an_iterator_that_was_overtaken_disturbs_nobody() -> None:
    for workers in (0, 2):
        loader = make(num_workers=workers)
        epochs = [labels(make()) for _ in range(1)]
        old, new = iter(loader), iter(loader)
        next(new)
        assert labels(old) == epochs[0]
        assert (loader.epoch, loader.batch) == (1, 1)
        loader.load_state_dict({**loader.state_dict(), "epoch": 1, "batch": 2})
        next(new)
        assert (loader.epoch, loader.batch) == (1, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_a_state_while_workers_are_busy_is_like_a_fresh_loader(workers: int) -> None:
    loader = make(num_workers=workers, persistent_workers=workers > 0)
    iterator = iter(loader)
    next(iterator)
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "batch": 0, "seed": 9})
    assert len(list(iterator)) == 4  # it goes on, but leaves no worker that knows the old seed
    assert loader.state_dict() == make(seed=9).state_dict()
    reference = make(seed=9)
    assert [shown(loader) for _ in range(2)] == [shown(reference) for _ in range(2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": -1}, "epoch must be a whole number >= 0, not -1"),
        ({"batch": 1.5}, "batch must be a whole number >= 0, not 1.5"),
        ({"batch": 6}, "the state is at batch 6, an epoch has 5"),
        ({"seed": None}, "seed must be"),
        ({"examples": 24}, "the state is of examples 24, this loader has 23"),
        ({"batch_size": 4}, "the state is of batch_size 4, this loader has 5"),
        ({"more": 1}, "expected a state of epoch, batch, seed, examples, batch_size, got"),
    ],
)
def test_bad_states_are_refused_and_change_nothing(change: dict, message: str) -> None:
    loader = make()
    next(iter(loader))
    before = loader.state_dict()
    assert message in one_line(loader.load_state_dict, {**before, **change})
    for wrong in (None, {}, [1], {"epoch": 0, "batch": 0}):
        assert one_line(loader.load_state_dict, wrong).startswith("DataLoader: expected a state of")
    assert loader.state_dict() == before


def test_the_trainer_finds_its_place_again() -> None:
    def trained(stop: int | None) -> Any:
        t.manual_seed(1)
        model = t.nn.Sequential(t.nn.Flatten(), t.nn.Dropout(0.2), t.nn.Linear(108, 2))
        trainer = Trainer(
            model, t.optim.SGD(model.parameters(), lr=0.01), lambda out, y: (out.sum(1) - y).square().mean()
        )
        if stop is not None:

            class Stop(t.Callback):
                def on_step_end(self, trainer: Any) -> None:
                    if trainer.step == stop:
                        states.append(trainer.state_dict())
                        raise InterruptedError

            trainer.callbacks = [Stop()]
        return trainer

    straight = trained(None)
    straight.fit(make(num_workers=2), 2, validation=make(seed=7))
    for stop in (1, 5, 6, 10):
        states: list = []
        with pytest.raises(InterruptedError):
            trained(stop).fit(make(num_workers=2), 2, validation=make(seed=7))
        t.manual_seed(77)
        resumed = trained(None)
        resumed.load_state_dict(states[0])
        resumed.fit(make(num_workers=1, seed=8), 2, validation=make(seed=9))
        assert resumed.history == straight.history


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path: Path) -> None:
    loader = DataLoader(pictures_23, np.int64(5), True, batch_transform=AUGMENT, seed=np.int64(3))
    assert json.loads(json.dumps(loader.state_dict())) == make().state_dict()
    assert shown(loader) == shown(make())
    model = t.nn.Sequential(t.nn.Flatten(), t.nn.Linear(108, 1))
    trainer = Trainer(model, t.optim.SGD(model.parameters(), lr=0.01), lambda out, y: (out.sum(1) - y).square().mean())
    trainer.fit(loader, 1)
    trainer.save(tmp_path / "run.safetensors")
    assert read_checkpoint(tmp_path / "run.safetensors")["place"]["batches"] == loader.state_dict()


# -- streams -----------------------------------------------------------------------------------------------------------


class Numbers(IterableDataset):
    """0 to n - 1 in turn, each with a number drawn for it."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator:
        for i in range(self.n):
            yield i, t.rand(1)


@settings(max_examples=30)
@given(st.integers(0, 20), st.integers(1, 6), st.booleans(), st.integers(0, 3), st.integers(0, 4))
def test_a_stream_is_the_same_for_every_number_of_workers_and_resumes(
    n: int, size: int, drop: bool, workers: int, skip: int
) -> None:
    expected = shown(DataLoader(Numbers(n), size, drop_last=drop, seed=2))
    assert [len(numbers) for numbers, _ in expected] == [size] * (n // size) + (
        [n % size] if n % size and not drop else []
    )
    assert [i for numbers, _ in expected for i in numbers] == list(range(n if not drop else n // size * size))
    loader = DataLoader(Numbers(n), size, drop_last=drop, seed=2, num_workers=workers)
    assert shown(loader) == expected
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "batch": skip})
    assert shown(loader) == expected[skip:]
    assert loader.epoch == 1


def test_epochs_of_a_stream_draw_other_numbers() -> None:
    loader = DataLoader(Numbers(4), 4, num_workers=2, seed=1)
    assert shown(loader) != shown(loader)
    with pytest.raises(TypeError):
        len(loader)


def test_a_stream_has_one_reader_which_is_told_so() -> None:
    class Split(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            info = get_worker_info()
            start, step = (0, 1) if info is None else (info.id, info.num_workers)
            return iter(range(start, 10, step))

    for workers in (0, 1, 3):
        assert shown(DataLoader(Split(), 4, num_workers=workers)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


# -- workers that are threads ------------------------------------------------------------------------------------------


class Failing(Dataset):
    def __getitem__(self, index: int) -> int:
        if index == 6:
            raise KeyError("six")
        return index

    def __len__(self) -> int:
        return 10


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_exception_arrives_after_the_batches_before_it(workers: int) -> None:
    before = threading.active_count()
    iterator = iter(DataLoader(Failing(), 2, num_workers=workers))
    assert [next(iterator).tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(KeyError, match="six") as found:
        next(iterator)
    assert found.value.__notes__ == ["DataLoader: raised in making batch 3 of epoch 0, of examples [6, 7]"]
    assert "__getitem__" in [entry.name for entry in found.traceback]
    assert next(iterator, None) is None
    assert threading.active_count() == before


def test_an_exception_in_a_stream_or_transform_arrives() -> None:
    class Short(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            yield 1
            raise OSError("the file ends here")

    for workers in (0, 2):
        with pytest.raises(OSError, match="the file ends here") as found:
            list(DataLoader(Short(), 2, num_workers=workers))
        assert found.value.__notes__ == ["DataLoader: raised in making batch 0 of epoch 0"]
        with pytest.raises(ZeroDivisionError):
            list(DataLoader(Failing(), 2, num_workers=workers, batch_transform=lambda batch: 1 / 0))


@pytest.mark.parametrize("how", ["break", "del", "exception", "close", "overtaken"])
def test_an_iterator_that_is_abandoned_ends_its_threads(how: str) -> None:
    before = threading.active_count()
    loader = make(num_workers=3)
    if how == "break":
        for _ in loader:
            assert threading.active_count() == before + 3
            break
    elif how == "exception":
        with suppress(InterruptedError):
            for _ in loader:
                raise InterruptedError
    else:
        iterator = iter(loader)
        next(iterator)
        if how == "close":
            iterator.close()
        elif how == "overtaken":
            other = iter(loader)
            next(other)
            del iterator, other
        else:
            del iterator
    assert threading.active_count() == before


def test_making_an_iterator_starts_nothing() -> None:
    before = threading.active_count()
    iterator = iter(make(num_workers=2))
    assert threading.active_count() == before
    del iterator


def test_persistent_workers_stay_and_end_with_the_loader() -> None:
    started = []
    before = threading.active_count()
    loader = make(num_workers=2, persistent_workers=True, worker_init_fn=started.append)
    epochs = [shown(loader) for _ in range(3)]
    assert threading.active_count() == before + 2
    reference = make()
    assert epochs == [shown(reference) for _ in range(3)]
    assert len(started) <= 2
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "seed": 4})  # another seed, so other workers
    assert shown(loader) == shown(make(seed=4))
    first, second = iter(loader), iter(loader)  # both at once, each with a crew
    next(first)
    assert len(list(second)) == len(loader)
    del first, second, loader
    assert threading.active_count() == before


def test_workers_work_ahead_but_no_further_than_asked() -> None:
    made: list[int] = []

    class Watched(Dataset):
        def __getitem__(self, index: int) -> int:
            made.append(index)
            return index

        def __len__(self) -> int:
            return 40

    iterator = iter(DataLoader(Watched(), 1, num_workers=2, prefetch_factor=3))
    for ahead in (6, 7):
        next(iterator)
        deadline = time.monotonic() + 5
        while len(made) < ahead and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)  # for one too many
        assert sorted(made) == list(range(ahead))
    del iterator


def test_workers_work_side_by_side() -> None:
    class Slow(Dataset):
        def __getitem__(self, index: int) -> int:
            time.sleep(0.02)
            return index

        def __len__(self) -> int:
            return 12

    spent = []
    for workers in (0, 4):
        start = time.perf_counter()
        loader = DataLoader(Slow(), 1, num_workers=workers)
        assert [int(x) for x in loader] == list(range(12))
        spent.append(time.perf_counter() - start)
        assert 0.5 * spent[-1] < loader.waited < spent[-1]
    assert spent[1] < 0.6 * spent[0]


def test_waiting_is_measured_and_a_step_hides_it() -> None:
    class Slow(Failing):
        def __getitem__(self, index: int) -> int:
            time.sleep(0.01)
            return index

    waited = []
    for workers in (0, 1):
        loader = DataLoader(Slow(), 1, num_workers=workers)
        for _ in loader:
            time.sleep(0.015)
        waited.append(loader.waited)
    assert waited[0] > 0.1
    assert waited[1] < 0.6 * waited[0]


def test_a_timeout_is_an_error_and_leaves_nothing_waiting() -> None:
    release = threading.Event()

    class Stuck(Dataset):
        def __getitem__(self, index: int) -> int:
            release.wait(10 if index == 2 else 0)
            return index

        def __len__(self) -> int:
            return 4

    iterator = iter(DataLoader(Stuck(), 1, num_workers=2, timeout=0.1))
    assert [int(next(iterator)) for _ in range(2)] == [0, 1]
    threading.Timer(0.3, release.set).start()
    with pytest.raises(RuntimeError, match=r"no batch within the timeout of 0\.1 seconds"):
        next(iterator)


def test_workers_know_who_they_are() -> None:
    seen, both = [], threading.Barrier(2)

    def init(number: int) -> None:
        both.wait(10)  # or one of them might take all the work
        info = get_worker_info()
        seen.append((number, info.id, info.num_workers, info.seed, info.dataset))

    data = pictures(40)
    list(DataLoader(data, 1, num_workers=2, worker_init_fn=init, seed=7))
    assert sorted(entry[0] for entry in seen) == [0, 1]
    assert all(entry[1:] == (entry[0], 2, 7 + entry[0], data) for entry in seen)
    assert get_worker_info() is None


def test_what_an_initializer_draws_or_raises() -> None:
    drawing = shown(DataLoader(Drawing(), 4, num_workers=2, seed=1, worker_init_fn=lambda i: t.rand(5)))
    assert drawing == shown(DataLoader(Drawing(), 4, seed=1))

    found = []
    for _ in range(2):
        drawn: dict[int, list] = {}
        both = threading.Barrier(2)

        def draw(number: int, drawn: dict = drawn, both: threading.Barrier = both) -> None:
            drawn[number] = t.rand(3).tolist()
            both.wait(10)  # so that each of the two begins

        list(DataLoader(Drawing(), 4, num_workers=2, seed=1, worker_init_fn=draw))
        found.append(drawn)
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]

    def fail(number: int) -> None:
        raise LookupError("no such file")

    with pytest.raises(LookupError, match="no such file"):
        list(DataLoader(Failing(), 2, num_workers=2, worker_init_fn=fail))


def test_a_worker_does_not_keep_its_batch() -> None:
    import weakref
    from concurrent.futures import Future
    from queue import SimpleQueue

    class Batch:
        pass

    tasks: SimpleQueue = SimpleQueue()
    thread = threading.Thread(target=work, args=(tasks, Batch), daemon=True)
    thread.start()
    future: Future = Future()
    tasks.put((future, ()))
    kept = weakref.ref(future.result())
    del future
    deadline = time.monotonic() + 2
    while kept() is not None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert kept() is None
    tasks.put(None)
    thread.join(1)


# -- options -----------------------------------------------------------------------------------------------------------


def test_without_a_batch_size_examples_come_singly() -> None:
    for workers in (0, 2):
        assert list(DataLoader(Squares(3), None, num_workers=workers)) == [(0, 0.0), (1, 1.0), (2, 4.0)]
        assert list(DataLoader(Squares(3), None, collate_fn=sum, num_workers=workers)) == [0, 2.0, 6.0]
        numbers = DataLoader(Numbers(3), None, num_workers=workers)
        assert [i for i, _ in numbers] == [0, 1, 2]
    assert len(DataLoader(Squares(3), None)) == 3
    assert [x for x, _ in DataLoader(Squares(3), None, sampler=np.array([2, 0]))] == [2, 0]


def test_own_samplers_and_collating() -> None:
    assert labels(DataLoader(pictures(5), 2, sampler=[4, 0, 2])) == [[4, 0], [2]]
    batches = DataLoader(pictures(5), batch_sampler=[[4, 0], [1], [2, 3, 4]])
    assert labels(batches) == [[4, 0], [1], [2, 3, 4]]
    assert len(batches) == 3
    assert batches.state_dict()["batch_size"] == 1
    assert list(DataLoader(Squares(4), 2, collate_fn=list)) == [[(0, 0.0), (1, 1.0)], [(2, 4.0), (3, 9.0)]]
    assert (
        list(DataLoader([], 4)) == list(DataLoader([], 4, True)) == list(DataLoader(range(3), 4, drop_last=True)) == []
    )
    assert DataLoader(pictures(5), 2, sampler=[]).sampler == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, not 0"),
        ({"batch_size": True}, "batch_size must be"),
        ({"batch_size": 2.0}, "batch_size must be a whole number >= 1, not 2.0"),
        ({"num_workers": -1}, "num_workers must be a whole number >= 0, not -1"),
        ({"num_workers": 1, "prefetch_factor": 0}, "prefetch_factor must be a whole number >= 1, not 0"),
        ({"seed": -1}, "seed must be a whole number >= 0, not -1"),
        ({"seed": 1.0}, "seed must be"),
        ({"seed": 0.0}, "seed must be a whole number >= 0, not 0.0"),
        ({"seed": False}, "seed must be a whole number >= 0, not False"),
        ({"num_workers": 1, "timeout": -1}, "got timeout -1 and num_workers 1"),
        ({"timeout": 1}, "are for workers; got timeout 1 and num_workers 0"),
        ({"persistent_workers": True}, "are for workers"),
        ({"multiprocessing_context": "spawn"}, "are for workers"),
        ({"num_workers": 1, "multiprocessing_context": "no"}, "cannot find context for 'no'"),
        ({"batch_sampler": [[0]], "batch_size": 2}, "batch_sampler excludes"),
        ({"batch_sampler": [[0]], "shuffle": True}, "batch_sampler excludes"),
        ({"batch_sampler": [[0]], "sampler": [0]}, "batch_sampler excludes"),
        ({"batch_sampler": [[0]], "drop_last": True}, "batch_sampler excludes"),
        ({"sampler": [0], "shuffle": True}, "sampler excludes shuffle"),
        ({"batch_size": None, "drop_last": True}, "no last batch to drop"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    assert message in one_line(DataLoader, Squares(), **options)


def test_without_a_number_two_batches_are_made_ahead() -> None:
    for options in ({}, {"prefetch_factor": None}):
        assert DataLoader(Squares(), num_workers=1, **options).prefetch_factor == 2
    assert labels(DataLoader(pictures(5), 2, num_workers=1, prefetch_factor=None)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("options", [{"shuffle": True}, {"sampler": [0]}, {"batch_sampler": [[0]]}])
def test_a_stream_cannot_be_reordered(options: dict) -> None:
    assert "has its own order" in one_line(DataLoader, Numbers(3), **options)


@pytest.mark.device
def test_batches_lie_where_the_data_does(device: str) -> None:
    data = TensorDataset(t.tensor(RNG.integers(0, 256, (6, 1, 4, 4)).astype(np.uint8)), t.arange(6))
    for workers in (0, 2):
        loader = DataLoader(data, 4, True, num_workers=workers, batch_transform=Normalize(0.5, 0.5), pin_memory=True)
        for images, numbers in loader:
            assert images.device == numbers.device == t.zeros(1).device


def test_a_recipe_is_a_function_of_seed_epoch_and_number() -> None:
    recipe = Recipe(DataLoader(Drawing(), 2, seed=1))
    first = shown([recipe(0, 0, [0, 1])])
    recipe(3, 3, [5])
    assert shown([recipe(0, 0, [0, 1])]) == first
    assert len({str(shown([recipe(epoch, number, [0, 1])])) for epoch in range(3) for number in range(3)}) == 9
    order = np.random.default_rng((1, 0)).random(2, dtype=np.float32)
    assert recipe(0, 0, [0])[1].tolist()[0] != order.tolist()  # not what the order is drawn from
