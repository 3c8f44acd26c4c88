"""Handwritten digits, and the mini-batches they are learned in.

`digits()` reads the data set that comes with TinyTorch; `mnist()` reads MNIST from disk or downloads it. Both return
`(train_images, train_labels, test_images, test_labels)` as NumPy arrays: images float32 in [0, 1] of shape
(N, 1, height, width), labels int64 of shape (N,). Every file is checked before anything is made of it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import numpy as np

import tinytorch
from tinytorch.m01_setup import data_folder, to_numpy
from tinytorch.m02_tensor import Tensor
from tinytorch.m02_tensor_appendix import as_tensor, get_default_device

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

DIGITS = Path(tinytorch.__file__).parent / "data" / "digits.csv.gz"
DIGITS_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"


class Source(NamedTuple):
    """What is known of an official file: size and MD5 as it is offered, packed; SHA-256 of what is in it."""

    size: int
    md5: str
    sha256: str


MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
MNIST = {
    "train-images-idx3-ubyte": Source(
        size=9_912_422,
        md5="f68b3c2dcbeaaa9fbdd348bbdeb94873",
        sha256="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": Source(
        size=28_881,
        md5="d53e105ee54ea40749a09fcbcd1e9432",
        sha256="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte": Source(
        size=1_648_877,
        md5="9fb629c4189551a2d022fa330f9573f3",
        sha256="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte": Source(
        size=4_542,
        md5="ec29112dd5afa0611ce80d1b7f02629c",
        sha256="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
LAYOUTS = (".", "mnist", "MNIST/raw")  # where below a folder the files may lie; the last is torchvision's
TIMEOUT = 20  # seconds without a byte until a mirror is given up
ROUNDS = 20  # how often the mirrors are asked for the rest of a file, as long as some of it arrives


# -- Digits ------------------------------------------------------------------------------------------------------------


def digits() -> Arrays:
    """The 1,797 handwritten digits of 8×8 pixels that come with TinyTorch: 1,437 for training, 360 for testing.

    The split is the same for everybody. The pictures are sorted by label, keeping the file's order within each label,
    and every fifth is for testing; so each digit has the same share in both parts. Both keep the order of the file.
    The same people wrote both, so the test tells how well new pictures of known hands are read.
    """
    content = DIGITS.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != DIGITS_SHA256:
        raise ValueError(
            f"{DIGITS}: truncated, damaged or another file (SHA-256 {found[:12]}…, expected {DIGITS_SHA256[:12]}…); "
            "install TinyTorch again"
        )
    table = np.loadtxt(io.BytesIO(gzip.decompress(content)), np.uint8, delimiter=",")  # (1797, 65)
    images, labels = _pictures(table[:, :64].reshape(-1, 8, 8), 16), table[:, 64].astype(np.int64)
    tests = np.zeros(len(labels), bool)
    tests[np.argsort(labels, kind="stable")[::5]] = True
    return images[~tests], labels[~tests], images[tests], labels[tests]


def _pictures(pixels: np.ndarray, most: int) -> np.ndarray:
    """(N, H, W) whole numbers from 0 to `most` as (N, 1, H, W) float32 from 0 to 1."""
    return pixels[:, None] / np.float32(most)


# -- MNIST -------------------------------------------------------------------------------------------------------------


def mnist(root: str | os.PathLike | None = None, download: bool = True) -> Arrays:
    """MNIST: 60,000 pictures of 28×28 pixels for training, 10,000 for testing.

    Args:
        root: a folder that holds the four official files, packed (.gz) or not, itself or in `mnist` or `MNIST/raw`
            below it. They are read where they lie.
        download: whether to download what is neither there nor in the folder for data, which is TINYTORCH_DATA or the
            platform's place for caches. A download that was cut is continued, by this call or a later one.

    Raises:
        ValueError: a file is truncated, damaged or not MNIST's.
        FileNotFoundError: a file is missing and was not downloaded; the message says which to put where.
    """
    arrays = []
    for name, source in MNIST.items():
        path = _find(name, root) or _download(name, Path(root) if root else data_folder() / "mnist", download)
        content = _unpacked(path)
        if hashlib.sha256(content).hexdigest() != source.sha256:
            _parse_idx(content, path)  # can say more precisely what is wrong, if it is the format
            raise ValueError(f"{path}: damaged, or not MNIST's {name} (its SHA-256 differs); remove or replace it")
        arrays.append(_parse_idx(content, path))
    train_images, train_labels, test_images, test_labels = arrays
    return (
        _pictures(train_images, 255),
        train_labels.astype(np.int64),
        _pictures(test_images, 255),
        test_labels.astype(np.int64),
    )


def _find(name: str, root: str | os.PathLike | None) -> Path | None:
    """Where a file of MNIST lies: below `root` first, then in the folder for data; None if in neither."""
    for folder in ([Path(root)] if root else []) + [data_folder()]:
        for path in (folder / layout / file for layout in LAYOUTS for file in (name, f"{name}.gz")):
            if path.is_file():
                return path
    return None


def _download(name: str, wanted_in: Path, allowed: bool) -> Path:
    """Download a file of MNIST into the folder for data, from whichever mirror has it; returns where it lies."""
    import pooch

    file, source, folder, problems = f"{name}.gz", MNIST[name], data_folder() / "mnist", {}
    part = folder / f"{file}.part"
    pooch.get_logger().setLevel("WARNING")  # the progress bar has said it already
    for _ in range(ROUNDS if allowed else 0):
        before = _size(part)
        for mirror in MIRRORS:
            try:
                _continue(mirror + file, part, source.size)
                path = pooch.retrieve(mirror + file, f"md5:{source.md5}", file, folder, downloader=partial(_copy, part))
            except ValueError:  # pooch says so of a wrong checksum: what we have is not the start of the file
                part.unlink(missing_ok=True)
                problems[mirror] = "the content is not the official one"
            except (OSError, HTTPException) as error:
                problems[mirror] = str(error) or type(error).__name__
            else:
                with suppress(OSError):  # gone, or another process has it open
                    part.unlink()
                return Path(path)
        if _size(part) == before:
            break
    tried = "; ".join(f"{mirror}: {problem}" for mirror, problem in problems.items()) or "downloading is off"
    raise FileNotFoundError(
        f"mnist: {file} is missing and was not downloaded ({tried}); put {', '.join(MNIST)}, each with or without .gz, "
        f"into {wanted_in}"
    )


def _continue(url: str, part: Path, size: int) -> None:
    """Fetch what `part` lacks of `size` bytes. Whatever breaks, it keeps what has arrived."""
    have = _size(part)
    if have < size:
        part.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(Request(url, headers={"Range": f"bytes={have}-"}), timeout=TIMEOUT) as response:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                have = 0  # this server sends everything again
            offered = have + int(response.headers.get("Content-Length", size - have))
            if offered != size:
                raise OSError(f"offers {offered:,} bytes, the file has {size:,}")
            _receive(response, part, have, size)
    if (have := _size(part)) < size:
        raise ConnectionError(f"the connection ended after {have:,} of {size:,} bytes")


def _copy(part: Path, _url: str, output_file: str, _pooch: Any) -> None:
    """What pooch takes for a downloader; it checks the copy, which no other process writes to, and then renames it."""
    shutil.copyfile(part, output_file)


def _receive(response: Any, part: Path, have: int, size: int) -> None:
    """Write a response to `part` behind the `have` bytes that stay in it, and show how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(part.stem), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with open(part, "ab" if have else "wb") as file, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=size, completed=have)
        while have <= size and (chunk := response.read(1 << 16)):
            file.write(chunk)
            have += len(chunk)
            progress.update(task, completed=have)


def _size(path: Path) -> int:
    """Bytes in a file; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


# -- IDX, the format of MNIST ------------------------------------------------------------------------------------------

IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """The array in an IDX file, packed with gzip or not. ValueError if the file is not exactly one such array."""
    return _parse_idx(_unpacked(path), path)


def _unpacked(path: str | os.PathLike) -> bytes:
    """What is in a file, unpacked if it begins as gzip does, whatever its name."""
    content = Path(path).read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: a truncated or damaged gzip file ({error})") from None


def _parse_idx(content: bytes, path: str | os.PathLike) -> np.ndarray:
    """Bytes 0, 0, a code for the dtype, the number of axes; the length of each axis; the values. All big-endian."""
    start = content[:4]
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in IDX_DTYPES or not 1 <= start[3] <= 32:
        raise ValueError(f"{path}: not an IDX file: expected bytes 00 00, a type and a rank, found {start.hex(' ')!r}")
    dtype, header = np.dtype(IDX_DTYPES[start[2]]), 4 + 4 * start[3]
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    expected = header + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(f"{path}: truncated or damaged: {len(content):,} bytes, its header {shape} means {expected:,}")
    if 0 in shape:
        raise ValueError(f"{path}: an IDX file without values, its shape is {shape}")
    return np.frombuffer(content, dtype, offset=header).reshape(shape).astype(dtype.newbyteorder("="))


# -- mini-batches ------------------------------------------------------------------------------------------------------


class Batches:
    """Mini-batches `(images, labels)` of tensors on the default device. Each `iter()` is one epoch.

    The order of an epoch depends on the seed and the epoch's number only. `state_dict()` says which epoch it is and
    which batch comes next; after `load_state_dict()` the next `iter()` goes on there. An `iter()` after one that was
    left in the middle begins the next epoch.

    Args:
        images, labels: arrays or tensors of the same length.
        shuffle: whether each epoch has an order of its own; otherwise it is the order given.
        drop_last: whether to leave out a last batch that has fewer than `batch_size` examples.
    """

    def __init__(
        self, images: Any, labels: Any, batch_size: int, shuffle: bool = True, seed: int = 0, drop_last: bool = False
    ) -> None:
        self.images, self.labels = to_numpy(images), to_numpy(labels)
        _whole("batch_size", batch_size, least=1)
        _whole("seed", seed, least=0)
        counts = [array.shape[0] if array.ndim else 0 for array in (self.images, self.labels)]
        if counts[0] != counts[1]:
            raise ValueError(f"Batches: {counts[0]} images, but {counts[1]} labels; there must be one for each")
        if counts[0] < (batch_size if drop_last else 1):
            raise ValueError(f"Batches: {counts[0]} examples make no batch of {batch_size} (drop_last={drop_last})")
        self.batch_size, self.shuffle, self.seed, self.drop_last = batch_size, shuffle, seed, drop_last
        self.epoch = self.batch = 0
        self._left = False  # whether an iterator is under way, or was left in the middle

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self.images), self.batch_size)
        return full if self.drop_last else full + (rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._left:
            self.epoch, self.batch = self.epoch + 1, 0
        self._left = True
        return self._run(self.epoch, self.batch)

    def _run(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order(epoch)
        for batch in range(first, len(self)):
            if self.epoch == epoch:  # false for an iterator that a newer one has overtaken
                self.batch = batch + 1
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            device = get_default_device()
            yield as_tensor(self.images[chosen], device=device), as_tensor(self.labels[chosen], device=device)
        if self.epoch == epoch:
            self.epoch, self.batch, self._left = epoch + 1, 0, False

    def _order(self, epoch: int) -> np.ndarray:
        count = len(self.images)
        return np.random.default_rng((self.seed, epoch)).permutation(count) if self.shuffle else np.arange(count)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the batch of it that comes next; as many as there are where only the epoch's end is left."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Have the next `iter()` go on where `state_dict()` was called."""
        if not isinstance(state, dict) or state.keys() != {"epoch", "batch"}:
            raise ValueError(f"Batches: expected a state of epoch and batch, got {state!r}")
        _whole("epoch", state["epoch"], least=0)
        _whole("batch", state["batch"], least=0)
        if state["batch"] > len(self):
            raise ValueError(f"Batches: the state is at batch {state['batch']}, but an epoch has {len(self)} batches")
        self.epoch, self.batch, self._left = state["epoch"], state["batch"], False


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"Batches: {name} must be a whole number >= {least}, not {value!r}")
