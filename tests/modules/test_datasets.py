"""Data sets: what is read, what is refused, what a broken download leaves behind."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import socket
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from tinytorch import m10_dataloader_appendix as appendix
from tinytorch.m01_setup_appendix import download
from tinytorch.m02_tensor import Tensor, int64, tensor, uint8, zeros
from tinytorch.m10_dataloader import DataLoader, Normalize
from tinytorch.m10_dataloader_appendix import (
    CIFAR10,
    CIFAR100,
    MNIST,
    Digits,
    FashionMNIST,
    Pictures,
    PythonDocs,
    Shakespeare,
    Source,
    TextFile,
    read_idx,
)

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = MNIST.files
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


def all_of(data: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """All pictures and labels, as a batch gives them."""
    pictures, labels = data.get_batch(range(len(data)))
    return pictures.numpy(), labels.numpy()


def test_digits_are_the_uci_file_split_the_same_for_everybody() -> None:
    train_images, train_labels = all_of(Digits())
    test_images, test_labels = all_of(Digits(train=False))
    assert train_images.shape == (1437, 1, 8, 8)
    assert test_images.shape == (360, 1, 8, 8)
    assert (train_images.dtype, train_labels.dtype, test_labels.dtype) == (np.float32, np.int64, np.int64)
    lines = gzip.decompress(appendix.DIGITS.read_bytes()).decode().split()
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
    content = appendix.DIGITS.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(
        {"truncated": content[:-100], "flipped": bytes(flipped), "foreign": gzip.compress(b"1,2,3\n"), "empty": b""}[
            damage
        ]
    )
    monkeypatch.setattr(appendix, "DIGITS", path)
    assert str(path) in one_line(Digits)


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
        assert found.dtype == np.dtype(dtype).name
        assert found.numpy().dtype.isnative
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


def idx_files(seed: int, labels: int = 10) -> dict[str, bytes]:
    """Four small random files in MNIST's format, packed."""
    generator = np.random.default_rng(seed)
    shapes = {TRAIN_IMAGES: (50, 28, 28), TRAIN_LABELS: (50,), TEST_IMAGES: (20, 28, 28), TEST_LABELS: (20,)}
    arrays = {name: generator.integers(0, 256 if len(s) > 1 else labels, s).astype("u1") for name, s in shapes.items()}
    return {name: gzip.compress(idx(array)) for name, array in arrays.items()}


def sources(files: dict[str, bytes], sha256: bool = True) -> dict[str, Source]:
    table = {}
    for name, file in files.items():
        content = gzip.decompress(file)
        shape = struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]])
        digest = hashlib.sha256(content).hexdigest() if sha256 else ""
        table[name] = Source(len(file), f"md5:{hashlib.md5(file).hexdigest()}", shape, digest)
    return table


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """A small random MNIST, which `MNIST` takes for the official one, with an empty folder for data."""
    files = idx_files(6)
    monkeypatch.setattr(MNIST, "files", sources(files))
    monkeypatch.setattr(MNIST, "mirrors", ())
    monkeypatch.setenv("TINYTORCH_DATA", str(tmp_path / "cache"))
    return files


def mnist(root: Path | None = None, download: bool = True, kind: type[MNIST] = MNIST) -> tuple[np.ndarray, ...]:
    """Pictures and labels for training, and for testing."""
    return all_of(kind(root, True, None, download)) + all_of(kind(root, False, None, download))


def lay_out(folder: Path, files: dict[str, bytes], packed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(content if packed else gzip.decompress(content))


def check_arrays(arrays: tuple[np.ndarray, ...], files: dict[str, bytes]) -> None:
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


@pytest.mark.parametrize("name", MNIST.files)
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
    how much it sends, and does not end where it should; "longer": says that it sends twice as much, and does; "without
    end": sends 64 MiB to who takes them; "slow": in pieces, as soon as three have asked; "missing": 404.
    """

    def __init__(self, files: dict[str, bytes], behaviour: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.behaviour = files, behaviour
        self.asked: list[tuple[str, int]] = []  # name, first byte
        self.sent = 0  # bytes without end

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
        if behaviour in ("endless", "longer"):
            content *= 3 if behaviour == "endless" else 2
        if start and "no range" not in behaviour and behaviour != "portal":
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            content = content[start:]
        else:
            self.send_response(200)
        if behaviour not in ("endless", "without end"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if behaviour == "slow":
            self.send_slowly(content)
            return
        if behaviour == "without end":
            self.send_without_end()
            return
        self.wfile.write(content[: math.ceil(len(content) / 2)] if "cut" in behaviour else content)

    def send_slowly(self, content: bytes) -> None:
        """To the first that asks faster than to the others."""
        pause, deadline = 0.02 * len(self.server.asked), time.monotonic() + 20
        while len(self.server.asked) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        for start in range(0, len(content), 1 << 16):
            time.sleep(pause)
            self.wfile.write(content[start : start + (1 << 16)])

    def send_without_end(self) -> None:
        with suppress(OSError):  # nobody listens any more
            for _ in range(64):
                self.wfile.write(bytes(1 << 20))
                self.server.sent += 1 << 20

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
        monkeypatch.setattr(MNIST, "mirrors", tuple(mirror.url for mirror in mirrors))
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
     ("longer", "bytes, the file has"), ("cut, no range", "the connection ended after")],
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


def test_what_does_not_end_does_not_fill_the_disk(serve: Callable, official: dict, tmp_path: Path) -> None:
    (mirror,) = serve("without end")
    assert "the content is not the official one" in one_line(mnist)
    assert cached(tmp_path) == {}
    assert mirror.sent < 40 << 20  # what lies between the two counts as sent


FETCH = """
import sys
from tinytorch.m01_setup_appendix import download
mirror, size, checksum, folder = sys.argv[1:]
print(download("large", [mirror], int(size), checksum, folder))
"""


def test_processes_that_fetch_a_file_at_once_all_have_it(serve: Callable, tmp_path: Path, root: Path) -> None:
    (mirror,) = serve("slow")
    content = np.random.default_rng(12).bytes(7 * (1 << 16) + 99)
    mirror.files = {"large": content}
    checksum, folder = f"md5:{hashlib.md5(content).hexdigest()}", tmp_path / "cache"
    command = [sys.executable, "-c", FETCH, mirror.url, str(len(content)), checksum, str(folder)]
    processes = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, f"{folder / 'large'}\n"), errors
    assert len(mirror.asked) >= 3
    assert cached(tmp_path) == {"large": content}


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
        monkeypatch.setattr(MNIST, "mirrors", (f"http://127.0.0.1:{unused.getsockname()[1]}/",))
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


def test_a_file_is_downloaded_under_any_checksum_and_only_once(serve: Callable, official: dict, tmp_path: Path) -> None:
    (mirror,) = serve("good")
    content = official[TEST_LABELS]
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    for _ in range(2):
        path = download(f"{TEST_LABELS}.gz", [mirror.url], len(content), checksum, tmp_path / "a" / "b")
        assert path == tmp_path / "a" / "b" / f"{TEST_LABELS}.gz"
        assert path.read_bytes() == content
    assert len(mirror.asked) == 1
    path.write_bytes(b"damaged")
    download(path.name, [mirror.url], len(content), checksum, path.parent)
    assert path.read_bytes() == content
    with pytest.raises(FileNotFoundError, match="other is missing and was not downloaded"):
        download("other", [], 3, checksum, tmp_path, "put it there")


def test_only_the_half_that_is_wanted_is_downloaded(serve: Callable, official: dict) -> None:
    (mirror,) = serve("good")
    assert len(MNIST(train=False)) == 20
    assert [name for name, _ in mirror.asked] == [TEST_IMAGES, TEST_LABELS]


# -- pictures ----------------------------------------------------------------------------------------------------------


def some_pictures(count: int = 7, transform: Callable | None = None) -> Pictures:
    generator = np.random.default_rng(8)
    pictures = generator.integers(0, 256, (count, 3, 4, 5)).astype("u1")
    return Pictures(tensor(pictures), tensor(generator.integers(0, 9, count)), transform)


@pytest.mark.device
def test_a_batch_is_what_its_pictures_are_singly(device: str) -> None:
    data = some_pictures()
    pictures, labels = data.get_batch([3, 0, -1, 3])
    assert (pictures.dtype, labels.dtype) == ("float32", "int64")
    assert pictures.device == labels.device == zeros(1).device
    assert (data.data.device, data.targets.device) == ("cpu", "cpu")
    stored = data.data.numpy()
    assert np.array_equal(pictures.numpy(), stored[[3, 0, 6, 3]] / np.float32(255))
    for place, i in enumerate([3, 0, -1, 3]):
        picture, label = data[i]
        assert isinstance(label, int)
        assert (label, picture.tolist()) == (data.targets[i].item(), pictures[place].tolist())
    assert len(list(data)) == len(data) == 7


def test_a_batch_is_a_copy() -> None:
    data = some_pictures(transform=lambda pictures: pictures)
    before = data.data.tolist()
    pictures, labels = data.get_batch(range(7))
    pictures[...] = 0
    labels[...] = 0
    assert data.data.tolist() == before
    assert data.targets.tolist() != [0] * 7


def test_the_transform_is_called_once_for_the_whole_batch_of_bytes() -> None:
    calls = []

    def transform(pictures: Tensor) -> Tensor:
        calls.append((pictures.dtype, pictures.shape))
        return pictures[:, :1].to(int64) + 1

    data = some_pictures(transform=transform)
    pictures, _ = data.get_batch([1, 2])
    assert calls == [(uint8, (2, 3, 4, 5))]
    assert np.array_equal(pictures.numpy(), data.data.numpy()[1:3, :1].astype(int) + 1)
    assert data[4][0].shape == (1, 4, 5)


def test_a_transform_of_digits_is_given_what_other_transforms_expect() -> None:
    plain, normal = Digits(train=False), Digits(False, Normalize(0.5, 0.25))
    assert (plain.data.dtype, plain.data.amax().item()) == (uint8, 16)
    assert np.allclose(all_of(normal)[0], (all_of(plain)[0] - 0.5) / 0.25)


def test_pictures_say_what_they_are_and_what_they_must_be() -> None:
    assert repr(Digits(train=False)) == "Digits(360 pictures 1×8×8, 10 classes)"
    assert Digits.classes[3] == "3"
    good, labels = zeros(4, 1, 2, 2, dtype=uint8), [0, 1, 2, 3]
    assert Pictures(good, labels).targets.dtype == int64
    for data, targets in ((good.float(), labels), (good[0], labels), (good, labels[:3])):
        assert "Pictures: expected pictures uint8 (N, C, H, W) and a label for each" in one_line(
            Pictures, data, targets
        )
    with pytest.raises(IndexError):
        some_pictures()[7]
    with pytest.raises(TypeError):
        some_pictures()[1.0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_takes_them(workers: int) -> None:
    batches = list(DataLoader(Digits(train=False), 100, num_workers=workers))
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    assert np.array_equal(np.concatenate([x.numpy() for x, _ in batches]), all_of(Digits(train=False))[0])


# -- FashionMNIST ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fashion(official: dict, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small random Fashion-MNIST beside the small MNIST; of its files nothing is known but shapes and checksums."""
    files = idx_files(16)
    monkeypatch.setattr(FashionMNIST, "files", sources(files, sha256=False))
    monkeypatch.setattr(FashionMNIST, "mirrors", ())
    return files


@pytest.mark.parametrize("layout", [".", "fashion-mnist", "FashionMNIST/raw", "fashion"])
def test_fashion_mnist_is_read_where_it_lies(fashion: dict, official: dict, tmp_path: Path, layout: str) -> None:
    lay_out(tmp_path / "root" / layout, fashion)
    lay_out(tmp_path / "root" / "mnist", official)
    check_arrays(mnist(tmp_path / "root", False, FashionMNIST), fashion)
    check_arrays(mnist(tmp_path / "root", False), official)
    assert FashionMNIST(tmp_path / "root").root == tmp_path / "root" / layout


def test_one_mnist_is_not_taken_for_the_other(fashion: dict, official: dict, tmp_path: Path) -> None:
    lay_out(tmp_path, official)
    message = one_line(FashionMNIST, tmp_path, download=False)
    assert message.startswith(f"{tmp_path / TRAIN_IMAGES}.gz: this is MNIST's {TRAIN_IMAGES}, not FashionMNIST's")
    lay_out(tmp_path, fashion)
    assert "damaged, or not MNIST's" in one_line(MNIST, tmp_path, download=False)


def test_fashion_mnist_of_the_wrong_shape_or_labels_is_refused(fashion: dict, tmp_path: Path) -> None:
    lay_out(tmp_path, fashion)
    labels = tmp_path / f"{TRAIN_LABELS}.gz"
    labels.write_bytes(gzip.compress(idx(np.arange(49).astype("u1") % 10)))
    message = one_line(FashionMNIST, tmp_path, download=False)
    assert f"{labels}: not FashionMNIST's {TRAIN_LABELS}: it holds uint8 (49,), expected uint8 (50,)" in message
    labels.write_bytes(gzip.compress(idx(np.arange(50).astype("i1") % 10)))
    assert "it holds int8 (50,)" in one_line(FashionMNIST, tmp_path, download=False)
    labels.write_bytes(gzip.compress(idx(np.arange(50).astype("u1") % 11)))
    assert f"{labels}: damaged, or not FashionMNIST's: it holds label 10" in one_line(FashionMNIST, tmp_path)
    message = one_line(FashionMNIST, tmp_path / "nowhere", download=False)
    assert message.startswith(f"FashionMNIST: {TRAIN_IMAGES}.gz is missing and was not downloaded (downloading is off)")


# -- CIFAR -------------------------------------------------------------------------------------------------------------

RECORDS = 12


def cifar_files(kind: type[CIFAR10]) -> dict[str, np.ndarray]:
    """Random records in the binary format, (records, labels and pixels)."""
    generator = np.random.default_rng(9)
    made = {}
    for name in (*kind.train_files, *kind.test_files):
        labels = [generator.integers(0, count, (RECORDS, 1)) for count in kind.label_counts]
        pixels = generator.integers(0, 256, (RECORDS, 3072))
        made[name] = np.concatenate([*labels, pixels], axis=1).astype("u1")
    return made


def packed(files: dict[str, bytes], folder: str = "cifar-10-batches-bin") -> bytes:
    """An archive like the official one, with a text, a folder and a link that nobody asked for."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, kind, target in ((folder, tarfile.DIRTYPE, ""), ("../evil.bin", tarfile.SYMTYPE, "/etc/passwd")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
        for name, content in {"readme.html": b"<html>", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(params=[CIFAR10, CIFAR100])
def cifar(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[type[CIFAR10], dict[str, np.ndarray]]:
    """A class of CIFAR whose files have few records, and such files; the folder for data is empty."""
    kind = request.param
    for files in ("train_files", "test_files"):
        monkeypatch.setattr(kind, files, dict.fromkeys(getattr(kind, files), RECORDS))
    monkeypatch.setattr(kind, "mirrors", ())
    monkeypatch.setenv("TINYTORCH_DATA", str(tmp_path / "cache"))
    return kind, cifar_files(kind)


def put(folder: Path, files: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        (folder / name).write_bytes(records.tobytes())


def check_cifar(data: CIFAR10, records: list[np.ndarray]) -> None:
    """Against the format's description: labels, then 1,024 bytes each of red, green and blue, row by row."""
    table = np.concatenate(records)
    first = table.shape[1] - 3072
    assert (data.data.dtype, data.data.shape) == ("uint8", (len(table), 3, 32, 32))
    pixels = data.data.numpy()
    for record, channel, row, column in ((0, 0, 0, 0), (5, 1, 3, 30), (len(table) - 1, 2, 31, 31)):
        assert pixels[record, channel, row, column] == table[record, first + 1024 * channel + 32 * row + column]
    assert np.array_equal(pixels.reshape(len(table), 3072), table[:, first:])
    assert data.targets.tolist() == table[:, first - 1].tolist()
    assert data.labels.tolist() == table[:, :first].tolist()


@pytest.mark.parametrize("place", [".", "folder", "cache", "archive", "archive in folder"])
def test_cifar_is_read_where_it_lies(cifar: tuple, tmp_path: Path, place: str) -> None:
    kind, files = cifar
    folder = {".": tmp_path, "cache": tmp_path / "cache" / kind.folders[0]}.get(place, tmp_path / kind.folders[0])
    if "archive" in place:
        folder = tmp_path if place == "archive" else folder
        folder.mkdir(exist_ok=True)
        (folder / kind.archive).write_bytes(packed({name: records.tobytes() for name, records in files.items()}))
    else:
        put(folder, files)
    before = sorted(tmp_path.rglob("*"))
    root = None if place == "cache" else tmp_path
    data = kind(root, download=False)
    check_cifar(data, [files[name] for name in kind.train_files])
    check_cifar(kind(root, train=False, download=False), [files[name] for name in kind.test_files])
    assert sorted(tmp_path.rglob("*")) == before  # nothing is extracted
    assert data.root == (folder / kind.archive if "archive" in place else folder)
    assert len(data.classes) == kind.label_counts[-1]


def test_cifar100_has_coarse_labels_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(CIFAR100, "test_files", {"test.bin": RECORDS})
    files = cifar_files(CIFAR100)
    put(tmp_path, {"test.bin": files["test.bin"]})
    data = CIFAR100(tmp_path, train=False, coarse=True)
    assert data.targets.tolist() == files["test.bin"][:, 0].tolist()
    assert (len(data.classes), data.classes[0]) == (20, "aquatic_mammals")
    assert (len(CIFAR100.classes), CIFAR100.classes[:2], CIFAR100.classes[99]) == (
        100,
        ("apple", "aquarium_fish"),
        "worm",
    )
    assert list(CIFAR100.classes) == sorted(CIFAR100.classes)


def test_damaged_cifar_is_refused(cifar: tuple, tmp_path: Path) -> None:
    kind, files = cifar
    put(tmp_path, files)
    path = tmp_path / list(kind.train_files)[-1]
    good = path.read_bytes()
    size = len(good) // RECORDS
    other = 3072 + (2 if kind is CIFAR10 else 1)
    wrong = bytearray(good)
    wrong[7 * size + len(kind.label_counts) - 1] = kind.label_counts[-1]
    cases = {
        "truncated": [good[:-1], good[:-size], b"", good + good, bytes(other * RECORDS)],
        f"record 7 has label {kind.label_counts[-1]}, 0 to {kind.label_counts[-1] - 1} are labels": [bytes(wrong)],
    }
    for reason, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            message = one_line(kind, tmp_path, download=False)
            assert message.startswith(f"{path}: ")
            assert reason in message
            assert kind.__name__ in message
    path.write_bytes(good)
    kind(tmp_path, download=False)


def test_coarse_labels_are_checked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(CIFAR100, "test_files", {"test.bin": RECORDS})
    records = cifar_files(CIFAR100)["test.bin"]
    records[4, 0] = 20
    put(tmp_path, {"test.bin": records})
    assert "record 4 has label 20, 0 to 19 are labels" in one_line(CIFAR100, tmp_path, train=False)


def test_damaged_archives_are_refused(cifar: tuple, tmp_path: Path) -> None:
    kind, files = cifar
    contents = {name: records.tobytes() for name, records in files.items()}
    good = packed(contents)
    path = tmp_path / kind.archive
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 8
    checksum = bytearray(good)
    checksum[-6] ^= 1  # of the CRC-32 of all that was packed
    plain = gzip.decompress(good)
    last = list(kind.train_files)[-1]
    without = {name: content for name, content in contents.items() if name != last}
    cases = {
        "truncated or damaged archive": [
            good[:-9], good[: len(good) // 2], bytes(flipped), bytes(checksum), b"", b"PK\3\4", gzip.compress(b""),
            gzip.compress(b"no tar" * 99), gzip.compress(plain[: len(plain) // 2]),
        ],
        f"{last} in it: it is another archive": [packed(without), packed({})],
        f"{last} in it has {len(contents[last]) - 1:,} bytes, expected {len(contents[last]):,}":
            [packed({**contents, last: contents[last][:-1]})],
    }  # fmt: skip
    for reason, archives in cases.items():
        for archive in archives:
            path.write_bytes(archive)
            message = one_line(kind, tmp_path, download=False)
            assert message.startswith(f"{path}: ")
            assert reason in message


def test_missing_cifar_says_what_to_put_where(cifar: tuple, tmp_path: Path) -> None:
    kind, files = cifar
    message = one_line(kind, tmp_path / "root", download=False)
    assert message.startswith(f"{kind.__name__}: {kind.archive} is missing and was not downloaded")
    assert all(name in message for name in files)
    assert "binary version" in message
    assert message.endswith(f"or {kind.archive}, into {tmp_path / 'root'}")
    assert one_line(kind, download=False).endswith(f"into {tmp_path / 'cache' / kind.folders[-1]}")


def test_incomplete_cifar_is_not_downloaded_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINYTORCH_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(CIFAR10, "train_files", dict.fromkeys(CIFAR10.train_files, RECORDS))
    files = cifar_files(CIFAR10)
    put(tmp_path, {name: files[name] for name in files if name not in ("data_batch_2.bin", "data_batch_4.bin")})
    message = one_line(CIFAR10, tmp_path)
    assert message.startswith(f"CIFAR10: {tmp_path} has no data_batch_2.bin, data_batch_4.bin")
    (tmp_path / CIFAR10.archive).write_bytes(packed({name: records.tobytes() for name, records in files.items()}))
    check_cifar(CIFAR10(tmp_path), [files[name] for name in CIFAR10.train_files])


def test_cifar_is_downloaded_as_its_archive(
    serve: Callable, cifar: tuple, tmp_path: Path, official: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, files = cifar
    archive = packed({name: records.tobytes() for name, records in files.items()})
    official[kind.archive.removesuffix(".gz")] = archive  # a server leaves .gz off
    (mirror,) = serve("cut")
    monkeypatch.setattr(kind, "mirrors", (mirror.url,))
    monkeypatch.setattr(kind, "source", Source(len(archive), f"md5:{hashlib.md5(archive).hexdigest()}"))
    check_cifar(kind(), [files[name] for name in kind.train_files])
    asked = len(mirror.asked)
    check_cifar(kind(train=False), [files[name] for name in kind.test_files])
    assert len(mirror.asked) == asked > 1
    assert cached(tmp_path) == {kind.archive: archive}


# -- text --------------------------------------------------------------------------------------------------------------


def test_a_text_is_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("to be\r\nor not\u2028\n\nço que\rest".encode())
    data = TextFile(path)
    assert data.text == "to be\nor not\u2028\n\nço que\nest"
    assert [data[i] for i in range(len(data))] == ["to be", "or not\u2028", "", "ço que", "est"]
    assert data.get_batch([4, 0, -2]) == ["est", "to be", "ço que"]
    assert list(DataLoader(data, batch_size=3)) == [["to be", "or not\u2028", ""], ["ço que", "est"]]
    assert repr(data) == "TextFile(5 lines, 25 characters)"
    path.write_text("one\ntwo\n", encoding="utf-16")
    assert TextFile(path, encoding="utf-16").lines == ["one", "two"]
    path.write_bytes(b"")
    assert (len(TextFile(path)), TextFile(path).text) == (0, "")
    with pytest.raises(IndexError):
        data[5]


def test_text_in_another_encoding_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"a\nb\n" * 600 + "naïve".encode("latin-1"))
    message = one_line(TextFile, path)
    assert message.startswith(f"{path}: not utf-8: byte 2,402, in line 1,201, is 0xef (")
    assert TextFile(path, "latin-1").lines[-1] == "naïve"
    assert "there is no encoding 'utf-9'" in one_line(TextFile, path, "utf-9")
    assert one_line(TextFile, tmp_path / "other") == f"TextFile: there is no file {tmp_path / 'other'}"
    assert "there is no file" in one_line(TextFile, tmp_path)


def test_shakespeare_is_the_official_text(serve: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          official: dict) -> None:  # fmt: skip
    text = b"First Citizen:\nBefore we proceed\n"
    monkeypatch.setattr(Shakespeare, "source", Source(len(text), f"sha256:{hashlib.sha256(text).hexdigest()}"))
    monkeypatch.setattr(Shakespeare, "mirrors", ())
    message = one_line(Shakespeare, tmp_path / "root")
    assert message.startswith("Shakespeare: input.txt is missing and was not downloaded")
    assert message.endswith(f"put it into {tmp_path / 'root'}")
    official["input.txt"] = text
    (mirror,) = serve("good")
    monkeypatch.setattr(Shakespeare, "mirrors", (mirror.url,))
    assert Shakespeare().lines == ["First Citizen:", "Before we proceed"]
    assert Shakespeare(download=False).path == tmp_path / "cache" / "shakespeare" / "input.txt"
    for folder in (".", "shakespeare", "tinyshakespeare"):
        path = tmp_path / "root" / folder / "input.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
        assert Shakespeare(tmp_path / "root").path == path
        path.write_bytes(text + b"more")
        assert one_line(Shakespeare, tmp_path / "root").startswith(f"{path}: damaged, or another text (37 bytes, ")
        path.unlink()


def test_pythons_documentation_is_the_same_each_time() -> None:
    from pydoc_data.topics import topics

    data = PythonDocs()
    assert data.text == PythonDocs().text
    assert len(data.text) > 400_000
    place = 0
    for name in sorted(topics):  # in this order, and with nothing but an end of a line in between
        found = data.text.index(topics[name], place)
        assert found - place <= 1
        place = found + len(topics[name])
    assert place == len(data.text)
    assert "\r" not in data.text


def test_a_python_without_its_documentation_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "installed without its module pydoc_data" in one_line(PythonDocs)
