"""The data of the milestones: what is read, what is refused, what a broken download leaves behind."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import math
import socket
import struct
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from tinytorch.m01_setup import manual_seed
from tinytorch.m02_tensor import Tensor, tensor, zeros
from tinytorch.milestones import datasets
from tinytorch.milestones.datasets import Batches, Source, digits, mnist, read_idx

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = datasets.MNIST
CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array: np.ndarray) -> bytes:
    """An IDX file, written independently of the reader."""
    header = struct.pack(">HBB", 0, CODES[array.dtype.str[1:]], array.ndim) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def one_line(function: Callable, *arguments: object, **keywords: object) -> str:
    """The one-line message with which a call refuses bad data."""
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        function(*arguments, **keywords)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# -- Digits ------------------------------------------------------------------------------------------------------------


def test_digits_are_the_uci_file_split_the_same_for_everybody() -> None:
    train_images, train_labels, test_images, test_labels = digits()
    assert train_images.shape == (1437, 1, 8, 8)
    assert test_images.shape == (360, 1, 8, 8)
    assert (train_images.dtype, train_labels.dtype, test_labels.dtype) == (np.float32, np.int64, np.int64)
    lines = gzip.decompress(datasets.DIGITS.read_bytes()).decode().split()
    assert len(lines) == 1797
    seen = [0] * 10
    order = sorted(range(1797), key=lambda i: (int(lines[i].rsplit(",", 1)[1]), i))
    tests = set(order[::5])
    rows = {False: zip(train_images, train_labels, strict=True), True: zip(test_images, test_labels, strict=True)}
    for i, line in enumerate(lines):
        *pixels, label = map(int, line.split(","))
        image, found = next(rows[i in tests])
        assert found == label
        assert (image.ravel() * 16).tolist() == pixels
        seen[label] += i in tests
    assert set(seen) <= {35, 36, 37}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_damaged_digits_are_refused(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = datasets.DIGITS.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(
        {"truncated": content[:-100], "flipped": bytes(flipped), "foreign": gzip.compress(b"1,2,3\n"), "empty": b""}[
            damage
        ]
    )
    monkeypatch.setattr(datasets, "DIGITS", path)
    assert str(path) in one_line(digits)


# -- IDX ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_of_every_type_are_read(dtype: str, packed: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    for shape in ((7,), (3, 5), (2, 3, 4)):
        array = (200 * generator.random(shape) - (0 if dtype == "u1" else 100)).astype(dtype)
        path = tmp_path / "file"
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
        found = read_idx(path)
        assert found.dtype == np.dtype(dtype)
        assert found.dtype.isnative
        assert np.array_equal(found, array)
        found[...] = 0  # it can be written to


def test_what_is_no_idx_file_is_refused(tmp_path: Path) -> None:
    good = idx(np.random.default_rng(4).integers(0, 255, (6, 4, 4)).astype("u1"))
    packed = gzip.compress(good)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 16
    cases = {
        "not an IDX file": [b"", b"\0", b"PK\3\4" + good, b"\0\0\7\3" + good[4:], b"\0\0\x08\0", b"\0\0\x08\xff"],
        "truncated or damaged": [good[:-1], good + b"\0", good[:9], good[:4], good[:4] + b"\xff" * 12],
        "gzip": [packed[:-5], packed[:20], bytes(flipped), packed + b"more"],
        "without values": [b"\0\0\x08\3" + struct.pack(">III", 0, 2**32 - 1, 2**32 - 1)],
    }
    path = tmp_path / "some file"
    for reason, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            message = one_line(read_idx, path)
            assert message.startswith(f"{path}: ")
            assert reason in message


def test_every_single_flipped_bit_of_a_header_is_noticed(tmp_path: Path) -> None:
    good = idx(np.random.default_rng(5).integers(0, 255, (6, 4, 4)).astype("u1"))
    for bit in range(8 * 16):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / "file").write_bytes(content)
        if bit == 16:  # uint8 becomes int8, as good a file: only a checksum can tell
            continue
        assert "file: " in one_line(read_idx, tmp_path / "file")


# -- MNIST -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """A small random MNIST, which `mnist` takes for the official one, with an empty folder for data."""
    generator = np.random.default_rng(6)
    shapes = {TRAIN_IMAGES: (50, 28, 28), TRAIN_LABELS: (50,), TEST_IMAGES: (20, 28, 28), TEST_LABELS: (20,)}
    arrays = {name: generator.integers(0, 256 if len(s) > 1 else 10, s).astype("u1") for name, s in shapes.items()}
    files = {name: gzip.compress(idx(array)) for name, array in arrays.items()}
    table = {
        name: Source(len(file), hashlib.md5(file).hexdigest(), hashlib.sha256(idx(arrays[name])).hexdigest())
        for name, file in files.items()
    }
    monkeypatch.setattr(datasets, "MNIST", table)
    monkeypatch.setattr(datasets, "MIRRORS", ())
    monkeypatch.setenv("TINYTORCH_DATA", str(tmp_path / "cache"))
    return files


def lay_out(folder: Path, files: dict[str, bytes], packed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(content if packed else gzip.decompress(content))


def check_arrays(arrays: datasets.Arrays, files: dict[str, bytes]) -> None:
    for array, content in zip(arrays, files.values(), strict=True):
        raw = np.frombuffer(gzip.decompress(content), "u1")
        if array.ndim == 1:
            assert array.dtype == np.int64
            assert array.tolist() == raw[8:].tolist()
        else:
            assert array.dtype == np.float32
            assert array.shape == (len(array), 1, 28, 28)
            assert np.allclose(array.ravel(), raw[16:] / 255, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", [".", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_where_it_lies(official: dict, tmp_path: Path, layout: str, packed: bool) -> None:
    lay_out(tmp_path / "root" / layout, official, packed)
    check_arrays(mnist(tmp_path / "root"), official)
    assert not (tmp_path / "cache").exists()
    lay_out(tmp_path / "cache" / layout, official, packed)
    check_arrays(mnist(download=False), official)


def test_mnist_packed_by_another_gzip_is_mnist(official: dict, tmp_path: Path) -> None:
    again = {name: gzip.compress(gzip.decompress(content), 1, mtime=7) for name, content in official.items()}
    lay_out(tmp_path, again)
    check_arrays(mnist(tmp_path), official)


@pytest.mark.parametrize("name", datasets.MNIST)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_mnist_is_refused(official: dict, tmp_path: Path, name: str, damage: str, packed: bool) -> None:
    lay_out(tmp_path, official, packed)
    path = tmp_path / (f"{name}.gz" if packed else name)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-3]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    else:  # the same format and shape, but other data
        other = gzip.decompress(official[name])
        content = bytearray(other[:16] + bytes(reversed(other[16:])))
    path.write_bytes(content)
    assert str(path) in one_line(mnist, tmp_path, download=False)
    assert path.read_bytes() == content


def test_missing_mnist_says_what_to_put_where(official: dict, tmp_path: Path) -> None:
    message = one_line(mnist, tmp_path / "root", download=False)
    assert all(name in message for name in official)
    assert message.endswith(f"into {tmp_path / 'root'}")
    assert one_line(mnist, download=False).endswith(f"into {tmp_path / 'cache' / 'mnist'}")


# -- downloading -------------------------------------------------------------------------------------------------------


class Mirror(ThreadingHTTPServer):
    """A web server on this machine that serves files, and fails as `behaviour` says.

    "good"; "cut": ends each answer after half of what it should send; "no range": ignores Range; "cut, no range":
    both; "wrong": sends as many wrong bytes; "portal": answers everything with a short page; "endless": does not say
    how much it sends, and does not end where it should; "missing": 404.
    """

    def __init__(self, files: dict[str, bytes], behaviour: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.behaviour = files, behaviour
        self.asked: list[tuple[str, int]] = []  # name, first byte

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        behaviour, name = self.server.behaviour, self.path.strip("/").removesuffix(".gz")
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.server.asked.append((name, start))
        if behaviour == "missing":
            self.send_error(404)
            return
        content = {"portal": b"<html>please log in</html>"}.get(behaviour, self.server.files[name])
        if behaviour == "wrong":
            content = bytes(255 - byte for byte in content)
        if behaviour == "endless":
            content *= 3
        if start and "no range" not in behaviour and behaviour != "portal":
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            content = content[start:]
        else:
            self.send_response(200)
        if behaviour != "endless":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: math.ceil(len(content) / 2)] if "cut" in behaviour else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(official: dict, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Mirror]]]:
    """serve("cut", "good") starts two mirrors of the official files, in this order, and returns them."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    started: list[tuple[Mirror, Thread]] = []

    def start(*behaviours: str) -> list[Mirror]:
        mirrors = [Mirror(official, behaviour) for behaviour in behaviours]
        for mirror in mirrors:
            started.append((mirror, Thread(target=mirror.serve_forever, args=(0.01,))))
            started[-1][1].start()
        monkeypatch.setattr(datasets, "MIRRORS", tuple(mirror.url for mirror in mirrors))
        return mirrors

    yield start
    for mirror, thread in started:
        mirror.shutdown()
        thread.join()
        mirror.server_close()


def cached(tmp_path: Path) -> dict[str, bytes]:
    """The files in the cache, hidden ones too."""
    return {path.name: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}


def final(official: dict) -> dict[str, bytes]:
    return {f"{name}.gz": content for name, content in official.items()}


@pytest.mark.parametrize(
    "behaviours",
    [("good",), ("cut",), ("no range",), ("cut", "no range"), ("missing", "good"), ("wrong", "good"),
     ("portal", "good"), ("endless", "good"), ("missing", "cut")],
)  # fmt: skip
def test_whatever_breaks_the_whole_files_arrive(
    serve: Callable, official: dict, tmp_path: Path, behaviours: tuple
) -> None:
    mirrors = serve(*behaviours)
    check_arrays(mnist(), official)
    assert cached(tmp_path) == final(official)
    asked = [len(mirror.asked) for mirror in mirrors]
    check_arrays(mnist(), official)  # this time from the disk
    assert [len(mirror.asked) for mirror in mirrors] == asked


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [("missing", "404"), ("wrong", "not the official"), ("endless", "not the official"), ("portal", "offers 26 bytes"),
     ("cut, no range", "the connection ended after")],
)  # fmt: skip
def test_a_mirror_that_never_works_leaves_no_file(
    serve: Callable, official: dict, tmp_path: Path, behaviour: str, reason: str
) -> None:
    (mirror,) = serve(behaviour)
    message = one_line(mnist)
    assert reason in message
    assert len(mirror.asked) <= 2  # it gives up once nothing more arrives
    assert mirror.url in message
    assert f"{TRAIN_IMAGES}.gz is missing" in message
    assert not [name for name in cached(tmp_path) if not name.endswith(".part")]
    serve("good")
    check_arrays(mnist(), official)


def test_a_download_goes_on_where_it_was_cut(serve: Callable, official: dict, tmp_path: Path) -> None:
    (mirror,) = serve("good")
    part = tmp_path / "cache" / "mnist" / f"{TRAIN_IMAGES}.gz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(official[TRAIN_IMAGES][:1234])
    check_arrays(mnist(), official)
    assert mirror.asked == [(TRAIN_IMAGES, 1234), (TRAIN_LABELS, 0), (TEST_IMAGES, 0), (TEST_LABELS, 0)]


@pytest.mark.parametrize("length", [1000, None, 10**6])
def test_a_damaged_part_is_thrown_away(serve: Callable, official: dict, tmp_path: Path, length: int | None) -> None:
    serve("good")
    part = tmp_path / "cache" / "mnist" / f"{TRAIN_IMAGES}.gz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * (length or len(official[TRAIN_IMAGES])))
    check_arrays(mnist(), official)
    assert cached(tmp_path) == final(official)


def test_offline_the_error_is_one_line(official: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(datasets, "MIRRORS", (f"http://127.0.0.1:{unused.getsockname()[1]}/",))
        message = one_line(mnist)
    assert "refused" in message
    assert message.endswith(f"into {tmp_path / 'cache' / 'mnist'}")


def test_a_cached_file_that_was_damaged_is_named(serve: Callable, official: dict, tmp_path: Path) -> None:
    serve("good")
    mnist()
    path = tmp_path / "cache" / "mnist" / f"{TEST_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:-9])
    assert str(path) in one_line(mnist)
    path.unlink()
    check_arrays(mnist(), official)


# -- mini-batches ------------------------------------------------------------------------------------------------------


def numbered(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures that carry their number, and labels that are their number."""
    return np.arange(count, dtype=np.float32)[:, None, None, None] * np.ones((1, 1, 2, 2), np.float32), np.arange(count)


def numbers(batches: Iterator) -> list[list[int]]:
    """The numbers in each batch, after checking that pictures and labels belong together."""
    found = []
    for images, labels in batches:
        assert isinstance(images, Tensor)
        assert images.shape[1:] == (1, 2, 2)
        assert (str(images.dtype), str(labels.dtype)) == ("float32", "int64")
        assert images.numpy()[:, 0, 1, 1].tolist() == labels.tolist()
        found.append(labels.tolist())
    return found


def test_each_epoch_holds_everything_once_in_an_order_of_its_own() -> None:
    batches = Batches(*numbered(23), batch_size=5, seed=8)
    assert len(batches) == 5
    epochs = [numbers(batches) for _ in range(3)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [5, 5, 5, 5, 3]
        assert sorted(itertools.chain(*epoch)) == list(range(23))
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    assert epochs == [numbers(again) for again in [Batches(*numbered(23), batch_size=5, seed=8)] * 3]
    assert numbers(Batches(*numbered(23), batch_size=5, seed=9)) != epochs[0]


def test_the_order_does_not_depend_on_other_random_numbers() -> None:
    manual_seed(1)
    first = numbers(Batches(*numbered(23), batch_size=5))
    manual_seed(2)
    np.random.default_rng().random(5)
    assert numbers(Batches(*numbered(23), batch_size=5)) == first


def test_without_shuffling_and_without_the_rest() -> None:
    batches = Batches(*numbered(8), batch_size=3, shuffle=False, drop_last=True)
    assert len(batches) == 2
    assert numbers(batches) == numbers(batches) == [[0, 1, 2], [3, 4, 5]]
    assert len(Batches(*numbered(8), batch_size=4, drop_last=True)) == len(Batches(*numbered(8), batch_size=4)) == 2
    assert numbers(Batches(*numbered(3), batch_size=9, shuffle=False)) == [[0, 1, 2]]


@pytest.mark.parametrize("stop", range(13))
def test_resuming_gives_exactly_the_batches_that_were_left(stop: int) -> None:
    def stream(batches: Batches) -> Iterator:
        while True:
            yield from batches

    whole = numbers(itertools.islice(stream(Batches(*numbered(23), batch_size=5, seed=3)), 20))
    before = Batches(*numbered(23), batch_size=5, seed=3)
    numbers(itertools.islice(stream(before), stop))
    state = before.state_dict()
    assert state in ({"epoch": stop // 5, "batch": stop % 5}, {"epoch": stop // 5 - 1, "batch": 5})
    after = Batches(*numbered(23), batch_size=5, seed=3)
    after.load_state_dict(state)
    assert after.state_dict() == state
    assert numbers(itertools.islice(stream(after), 20 - stop)) == whole[stop:]


def test_after_the_last_batch_only_the_end_of_the_epoch_is_left() -> None:
    batches = Batches(*numbered(6), batch_size=2, seed=1)
    iterator = iter(batches)
    for _ in range(3):
        next(iterator)
    assert batches.state_dict() == {"epoch": 0, "batch": 3}
    again = Batches(*numbered(6), batch_size=2, seed=1)
    again.load_state_dict(batches.state_dict())
    assert list(again) == []
    assert again.state_dict() == {"epoch": 1, "batch": 0}
    assert next(iterator, None) is None
    assert batches.state_dict() == {"epoch": 1, "batch": 0}


def test_an_epoch_that_was_left_is_not_begun_again() -> None:
    reference = Batches(*numbered(23), batch_size=5, seed=3)
    epochs = [numbers(reference) for _ in range(4)]
    batches = Batches(*numbered(23), batch_size=5, seed=3)
    drawn = [next(iter(batches))[1].tolist() for _ in range(3)]
    assert drawn == [epoch[0] for epoch in epochs[:3]]
    assert numbers(batches) == epochs[3]


def test_an_iterator_that_was_overtaken_disturbs_nobody() -> None:
    batches = Batches(*numbered(6), batch_size=2, seed=1)
    old, new = iter(batches), iter(batches)
    next(new)
    assert len(list(old)) == 3
    assert batches.state_dict() == {"epoch": 1, "batch": 1}


def test_a_batch_is_a_copy() -> None:
    images, labels = numbered(6)
    batch, _ = next(iter(Batches(images, labels, 6, shuffle=False)))
    batch.numpy()[...] = -1
    assert images.min() == 0


def test_batches_take_tensors() -> None:
    images, labels = numbered(6)
    tensors = tensor(images), tensor(labels)
    assert numbers(Batches(*tensors, batch_size=4, seed=2)) == numbers(Batches(images, labels, batch_size=4, seed=2))


@pytest.mark.device
def test_batches_lie_on_the_default_device(device: str) -> None:
    batch, labels = next(iter(Batches(*numbered(6), batch_size=4, shuffle=False)))
    assert batch.device == labels.device == zeros(1).device
    assert labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("count", "labels", "keywords", "message"),
    [
        (0, 0, {"batch_size": 4}, "0 examples"),
        (5, 4, {"batch_size": 4}, "5 images, but 4 labels"),
        (5, 5, {"batch_size": 0}, "batch_size must be a whole number >= 1, not 0"),
        (5, 5, {"batch_size": 2.0}, "batch_size must be a whole number >= 1, not 2.0"),
        (5, 5, {"batch_size": True}, "batch_size must be"),
        (5, 5, {"batch_size": 4, "seed": -1}, "seed must be a whole number >= 0, not -1"),
        (5, 5, {"batch_size": 6, "drop_last": True}, "5 examples make no batch of 6"),
    ],
)
def test_bad_batches_are_refused(count: int, labels: int, keywords: dict, message: str) -> None:
    assert message in one_line(Batches, numbered(count)[0], numbered(labels)[1], **keywords)


@pytest.mark.parametrize(
    "state", [None, {}, {"epoch": 0}, {"epoch": 0, "batch": 4}, {"epoch": -1, "batch": 0}, {"epoch": 0, "batch": 1.5}]
)
def test_bad_states_are_refused_and_change_nothing(state: dict | None) -> None:
    batches = Batches(*numbered(6), batch_size=2)
    next(iter(batches))
    assert one_line(batches.load_state_dict, state).startswith("Batches: ")
    assert batches.state_dict() == {"epoch": 0, "batch": 1}
