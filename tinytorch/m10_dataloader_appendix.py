"""Module 10, appendix: data sets of pictures and of text, and more transforms of whole batches.

Every file is checked before anything is made of it, and the error names the file, what is wrong with it and what would
be right. Files are read where they lie, below `root` or in the folder for data (TINYTORCH_DATA, or the platform's place
for caches); what is in neither is downloaded. Nothing that is read is ever executed: CIFAR is read in its binary
version, and its version for Python, which is pickled, is left alone.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import math
import multiprocessing
import operator
import os
import pickle
import signal
import tarfile
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

from tinytorch.backends import Backend, get_backend, seeded
from tinytorch.m01_setup import data_folder
from tinytorch.m01_setup_appendix import download as download_file
from tinytorch.m02_tensor import Tensor, float32, float64, int64, uint8, where
from tinytorch.m02_tensor_appendix import (
    argsort,
    as_tensor,
    clamp,
    cumsum,
    get_default_device,
    get_default_dtype,
    multinomial,
    one_hot,
    pad,
    rand,
    randperm,
    set_default_device,
    set_default_dtype,
)
from tinytorch.m09_spatial_appendix import affine_grid, grid_sample, interpolate
from tinytorch.m10_dataloader import Compose, Dataset, Sampler, Subset, Transform, Worker, attach_processes, draw_seed

Root = str | os.PathLike | None

# -- files -------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """What is known of an official file: size and checksum ("md5:…") as it is offered; what is in it, once unpacked."""

    size: int
    checksum: str
    shape: tuple[int, ...] = ()
    sha256: str = ""


def places(root: Root, folders: Sequence[str]) -> Iterator[Path]:
    """The folders in which files may lie: below `root` and `root` itself, then below the folder for data."""
    if root is not None:
        yield from (Path(root).expanduser() / folder for folder in (*folders, "."))
    yield from (data_folder() / folder for folder in folders)


def fetch(owner: Any, file: str, mirrors: Sequence[str], source: Source, folder: Path, advice: str) -> Path:
    """Download a file into a folder; FileNotFoundError, with the data set's name, where it cannot be had."""
    try:
        return download_file(file, mirrors, source.size, source.checksum, folder, advice)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{type(owner).__name__}: {error}") from None


def unpacked(path: str | os.PathLike) -> bytes:
    """What is in a file, unpacked if it begins as gzip does, whatever its name."""
    content = Path(path).read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: a truncated or damaged gzip file ({error})") from None


def members(path: Path, sizes: dict[str, int]) -> dict[str, bytes]:
    """Files from a .tar.gz, found by their last names, each of the size that it must have; nothing is extracted."""
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as packed:
            with tarfile.open(fileobj=packed, mode="r|") as archive:
                for member in archive:
                    name = PurePosixPath(member.name).name
                    if name not in sizes or not member.isreg():
                        continue
                    if member.size != sizes[name]:
                        raise ValueError(f"{path}: {name} in it has {member.size:,} bytes, expected {sizes[name]:,}")
                    found[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
            while packed.read(1 << 20):  # to the end, where gzip's checksum stands
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: a truncated or damaged archive ({error}); remove or replace it") from None
    if missing := sizes.keys() - found.keys():
        raise ValueError(f"{path}: there is no {', '.join(sorted(missing))} in it: it is another archive, or damaged")
    return found


# -- IDX, the format of MNIST ------------------------------------------------------------------------------------------

IDX_DTYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}


def read_idx(path: str | os.PathLike) -> Tensor:
    """The tensor in an IDX file, packed with gzip or not. ValueError if the file is not exactly one such array."""
    return parse_idx(unpacked(path), path)


def parse_idx(content: bytes, path: str | os.PathLike) -> Tensor:
    """Bytes 0, 0, a code for the dtype, the number of axes; the length of each axis; the values. All big-endian."""
    start = content[:4]
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in IDX_DTYPES or not 1 <= start[3] <= 32:
        raise ValueError(f"{path}: not an IDX file: expected bytes 00 00, a type and a rank, found {start.hex(' ')!r}")
    host, header = get_backend("cpu"), 4 + 4 * start[3]
    dtype = host.dtype(IDX_DTYPES[start[2]])
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    expected = header + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(f"{path}: truncated or damaged: {len(content):,} bytes, its header {shape} means {expected:,}")
    if 0 in shape:
        raise ValueError(f"{path}: an IDX file without values, its shape is {shape}")
    values = host.frombuffer(content, dtype.newbyteorder(">"), offset=header)
    return Tensor(host.reshape(host.astype(values, dtype), shape))


# -- pictures ----------------------------------------------------------------------------------------------------------


class Pictures(Dataset):
    """Pictures and their labels, in memory as bytes; `dataset[i]` is a picture and its label, a Python int.

    Args:
        data: uint8 (N, C, H, W).
        targets: whole numbers (N,).
        transform: what is made of a batch of pictures, uint8 (N, C, H, W), as it is taken out; by default float32 from
            0 to 1. It is called once for the whole batch, on the default device. Where pixels do not go from 0 to 255,
            it is given float32 from 0 to 1.
        root: where the files were found.

    Attributes:
        data, targets: the tensors, on the CPU; targets are int64.
        classes: the name of each class.
    """

    classes: Sequence[str] = ()
    white = 255  # the largest value that a pixel can have

    def __init__(
        self, data: Tensor, targets: Tensor, transform: Callable[[Tensor], Any] | None = None, root: Root = None
    ) -> None:
        self.data, self.targets = as_tensor(data, device="cpu"), as_tensor(targets, int64, "cpu")
        if self.data.dtype != uint8 or self.data.ndim != 4 or self.targets.shape != self.data.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}: expected pictures uint8 (N, C, H, W) and a label for each, (N,); got "
                f"{self.data.dtype} {self.data.shape} and {self.targets.shape}"
            )
        self.transform, self.root = transform, None if root is None else Path(root)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pictures, labels = self.get_batch([operator.index(index)])
        return pictures[0], int(labels[0])

    def get_batch(self, indices: Sequence[int]) -> tuple[Any, Tensor]:
        """(pictures, labels) of these numbers, on the default device, after the transform."""
        chosen, device = as_tensor(indices, int64, "cpu"), get_default_device()
        pictures = as_tensor(self.data[chosen], device=device)
        if self.transform is None or self.white != 255:
            pictures = pictures.to(float32) / self.white
        if self.transform is not None:
            pictures = self.transform(pictures)
        return pictures, as_tensor(self.targets[chosen], device=device)

    def __repr__(self) -> str:
        size = "×".join(map(str, self.data.shape[1:]))
        return f"{type(self).__name__}({len(self):,} pictures {size}, {len(self.classes)} classes)"


DIGITS = Path(__file__).parent / "data" / "digits.csv.gz"
DIGITS_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"


class Digits(Pictures):
    """The 1,797 handwritten digits of 8×8 pixels that come with TinyTorch: 1,437 for training, 360 for testing.

    The split is the same for everybody. The pictures are sorted by label, keeping the file's order within each label,
    and every fifth is for testing; so each digit has the same share in both parts. Both keep the order of the file.
    The same people wrote both, so the test tells how well new pictures of known hands are read.

    The pixels of `data` go from 0 to 16; a `transform` is given float32 from 0 to 1.
    """

    classes = tuple("0123456789")
    white = 16

    def __init__(self, train: bool = True, transform: Callable[[Tensor], Any] | None = None) -> None:
        content = DIGITS.read_bytes()
        if (found := hashlib.sha256(content).hexdigest()) != DIGITS_SHA256:
            raise ValueError(
                f"{DIGITS}: truncated, damaged or another file (SHA-256 {found[:12]}…, expected {DIGITS_SHA256[:12]}…);"
                " install TinyTorch again"
            )
        rows = gzip.decompress(content).decode().split()
        table = as_tensor([[int(value) for value in row.split(",")] for row in rows], uint8, "cpu")  # (1797, 65)
        is_test = [False] * len(rows)
        for i in argsort(table[:, 64], stable=True).tolist()[::5]:
            is_test[i] = True
        table = table[[i for i, held_out in enumerate(is_test) if held_out != train]]
        super().__init__(table[:, :64].reshape(-1, 1, 8, 8), table[:, 64], transform, DIGITS.parent)


class MNIST(Pictures):
    """MNIST: handwritten digits of 28×28 pixels, 60,000 for training and 10,000 for testing.

    Args:
        root: a folder that holds the official files, packed (.gz) or not, itself or in `mnist` or `MNIST/raw` below it.
            They are read where they lie.
        train: which of both parts.
        transform: as `Pictures` has it.
        download: whether to download what is neither there nor in the folder for data. A download that was cut is
            continued, by this call or a later one.

    Raises:
        ValueError: a file is truncated, damaged or not MNIST's.
        FileNotFoundError: a file is missing and was not downloaded; the message says which to put where.
    """

    classes: Sequence[str] = tuple("0123456789")
    mirrors: ClassVar[Sequence[str]] = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    )
    folders: ClassVar[Sequence[str]] = ("mnist", "MNIST/raw", ".")  # the second is torchvision's
    files: ClassVar[dict[str, Source]] = {
        "train-images-idx3-ubyte": Source(
            size=9_912_422,
            checksum="md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
            shape=(60_000, 28, 28),
            sha256="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        "train-labels-idx1-ubyte": Source(
            size=28_881,
            checksum="md5:d53e105ee54ea40749a09fcbcd1e9432",
            shape=(60_000,),
            sha256="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        "t10k-images-idx3-ubyte": Source(
            size=1_648_877,
            checksum="md5:9fb629c4189551a2d022fa330f9573f3",
            shape=(10_000, 28, 28),
            sha256="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        "t10k-labels-idx1-ubyte": Source(
            size=4_542,
            checksum="md5:ec29112dd5afa0611ce80d1b7f02629c",
            shape=(10_000,),
            sha256="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    }

    def __init__(
        self, root: Root = None, train: bool = True, transform: Callable[[Tensor], Any] | None = None,
        download: bool = True,
    ) -> None:  # fmt: skip
        names = list(self.files)[:2] if train else list(self.files)[2:]
        parts = []
        for name in names:  # read before the next is looked for, so that damage shows before a download begins
            path = self._find(name, root) or self._download(name, root, download)
            parts.append(self._read(path, name))
        super().__init__(parts[0].reshape(-1, 1, *parts[0].shape[1:]), parts[1], transform, path.parent)

    def _find(self, name: str, root: Root) -> Path | None:
        candidates = (folder / file for folder in places(root, self.folders) for file in (name, f"{name}.gz"))
        return next((path for path in candidates if path.is_file()), None)

    def _download(self, name: str, root: Root, allowed: bool) -> Path:
        folder = data_folder() / self.folders[0]
        advice = f"put {', '.join(self.files)}, each with or without .gz, into {folder if root is None else root}"
        return fetch(self, f"{name}.gz", self.mirrors if allowed else (), self.files[name], folder, advice)

    def _read(self, path: Path, name: str) -> Tensor:
        """What is in a file, if that is what must be in it."""
        content, source, owner = unpacked(path), self.files[name], type(self).__name__
        digest = hashlib.sha256(content).hexdigest()
        values = parse_idx(content, path)
        if values.dtype != uint8 or values.shape != source.shape:
            raise ValueError(
                f"{path}: not {owner}'s {name}: it holds {values.dtype} {values.shape}, expected uint8 {source.shape}"
            )
        if source.sha256 and digest != source.sha256:
            raise ValueError(f"{path}: damaged, or not {owner}'s {name} (its SHA-256 differs); remove or replace it")
        if foreign := next(
            (file for file, known in MNIST.files.items() if digest == known.sha256 != source.sha256), ""
        ):
            raise ValueError(f"{path}: this is MNIST's {foreign}, not {owner}'s {name}; each needs a folder of its own")
        if values.ndim == 1 and (most := int(values.amax())) >= len(self.classes):
            raise ValueError(f"{path}: damaged, or not {owner}'s: it holds label {most}, 0 to 9 are labels")
        return values


class FashionMNIST(MNIST):
    """Fashion-MNIST: clothes of 28×28 pixels, with files, sizes and labels like MNIST's.

    The arguments are MNIST's. The files may lie in `root` itself, or below it in `fashion-mnist`, `fashion` or
    `FashionMNIST/raw`. Those that somebody packed anew are taken as well, if they have the right shape and labels.
    """

    classes = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    mirrors = (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    )
    folders = ("fashion-mnist", "FashionMNIST/raw", "fashion")
    files: ClassVar[dict[str, Source]] = {
        "train-images-idx3-ubyte": Source(26_421_880, "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d", (60_000, 28, 28)),
        "train-labels-idx1-ubyte": Source(29_515, "md5:25c81989df183df01b3e8a0aad5dffbe", (60_000,)),
        "t10k-images-idx3-ubyte": Source(4_422_102, "md5:bef4ecab320f06d8554ea6380940ec79", (10_000, 28, 28)),
        "t10k-labels-idx1-ubyte": Source(5_148, "md5:bb300cfdad3c16e7a12a480ee83cd310", (10_000,)),
    }


class CIFAR10(Pictures):
    """CIFAR-10: colour pictures of 32×32 pixels in 10 classes, 50,000 for training and 10,000 for testing.

    Args:
        root: a folder that holds the files of the binary version (data_batch_1.bin … test_batch.bin) or its archive,
            itself or in `cifar-10-batches-bin` below it. They are read where they lie; nothing is extracted.
        train: which of both parts.
        transform: as `Pictures` has it.
        download: whether to download the archive if there is neither here nor in the folder for data.

    Raises:
        ValueError: a file is truncated, damaged or another data set's.
        FileNotFoundError: a file is missing and was not downloaded; the message says which to put where.
    """

    classes: Sequence[str] = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    mirrors: ClassVar[Sequence[str]] = ("https://www.cs.toronto.edu/~kriz/",)
    folders: ClassVar[Sequence[str]] = ("cifar-10-batches-bin", "cifar10")
    archive = "cifar-10-binary.tar.gz"
    source = Source(170_052_171, "md5:c32a1d4ab5d03f1284b67883e8d87530")
    train_files: ClassVar[dict[str, int]] = {f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}  # records in each
    test_files: ClassVar[dict[str, int]] = {"test_batch.bin": 10_000}
    label_counts: ClassVar[Sequence[int]] = (10,)  # a record is a byte for each of these labels, and 3,072 for pixels

    def __init__(
        self, root: Root = None, train: bool = True, transform: Callable[[Tensor], Any] | None = None,
        download: bool = True,
    ) -> None:  # fmt: skip
        host, records = get_backend("cpu"), self.train_files if train else self.test_files
        contents = self._contents(records, root, download)
        tables = [self._parse(content, path, records[path.name]) for path, content in contents.items()]
        first = len(self.label_counts)
        pixels = host.concat([table[:, first:] for table in tables])
        self.labels = Tensor(host.astype(host.concat([table[:, :first] for table in tables]), host.int64))
        data = Tensor(pixels).reshape(-1, 3, 32, 32)
        super().__init__(data, self.labels[:, -1].clone(), transform, next(iter(contents)).parent)

    def _contents(self, records: dict[str, int], root: Root, allowed: bool) -> dict[Path, bytes]:
        """The bytes of each file, from the first place that has all of them."""
        incomplete = ""
        for folder in places(root, self.folders):
            missing = [name for name in records if not (folder / name).is_file()]
            if not missing:
                return {folder / name: (folder / name).read_bytes() for name in records}
            if (folder / self.archive).is_file():
                return self._unpack(folder / self.archive, records)
            if len(missing) < len(records):
                incomplete = incomplete or f"{folder} has no {', '.join(missing)}"
        if incomplete:
            raise FileNotFoundError(f"{type(self).__name__}: {incomplete}; put it there, or {self.archive}")
        folder = data_folder() / self.folders[-1]
        advice = f"put {', '.join([*self.train_files, *self.test_files])} (the binary version, not Python's), or "
        advice += f"{self.archive}, into {folder if root is None else root}"
        path = fetch(self, self.archive, self.mirrors if allowed else (), self.source, folder, advice)
        return self._unpack(path, records)

    def _unpack(self, path: Path, records: dict[str, int]) -> dict[Path, bytes]:
        size = len(self.label_counts) + 3072
        found = members(path, {name: count * size for name, count in records.items()})
        return {path / name: found[name] for name in records}

    def _parse(self, content: bytes, path: Path, count: int) -> Any:
        """A file's records as an array of bytes, (count, labels and pixels)."""
        host, size = get_backend("cpu"), len(self.label_counts) + 3072
        if len(content) != count * size:
            raise ValueError(
                f"{path}: {len(content):,} bytes, but {count:,} records of {size:,} bytes are {count * size:,}: it is "
                f"truncated, damaged or not {type(self).__name__}'s; remove or replace it"
            )
        table = host.reshape(host.frombuffer(content, host.uint8), (count, size))
        for column, labels in enumerate(self.label_counts):
            row = int(host.argmax(table[:, column]))
            if table[row, column] >= labels:
                raise ValueError(
                    f"{path}: record {row:,} has label {table[row, column]}, 0 to {labels - 1} are labels: it is "
                    f"damaged or not {type(self).__name__}'s; remove or replace it"
                )
        return table


class CIFAR100(CIFAR10):
    """CIFAR-100: colour pictures of 32×32 pixels in 100 classes, which make 20 coarse ones; 50,000 and 10,000.

    Args:
        root: a folder that holds the files of the binary version (train.bin, test.bin) or its archive, itself or in
            `cifar-100-binary` below it.
        train, transform, download: as CIFAR10 has them.
        coarse: whether `targets` and `classes` are the coarse ones.

    Attributes:
        labels: both labels of each picture, coarse and fine: int64 (N, 2).
    """

    coarse_classes: Sequence[str] = (
        "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables",
        "household_electrical_devices", "household_furniture", "insects", "large_carnivores",
        "large_man-made_outdoor_things", "large_natural_outdoor_scenes", "large_omnivores_and_herbivores",
        "medium_mammals", "non-insect_invertebrates", "people", "reptiles", "small_mammals", "trees", "vehicles_1",
        "vehicles_2",
    )  # fmt: skip
    classes: Sequence[str] = (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
        "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
        "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur",
        "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard",
        "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain",
        "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
        "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket",
        "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider",
        "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger",
        "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    )  # fmt: skip
    folders = ("cifar-100-binary", "cifar100")
    archive = "cifar-100-binary.tar.gz"
    source = Source(168_513_733, "md5:03b5dce01913d631647c71ecec9e9cb8")
    train_files: ClassVar[dict[str, int]] = {"train.bin": 50_000}
    test_files: ClassVar[dict[str, int]] = {"test.bin": 10_000}
    label_counts = (20, 100)

    def __init__(
        self, root: Root = None, train: bool = True, transform: Callable[[Tensor], Any] | None = None,
        download: bool = True, coarse: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(root, train, transform, download)
        if coarse:
            self.targets, self.classes = self.labels[:, 0].clone(), self.coarse_classes


# -- text --------------------------------------------------------------------------------------------------------------


class Lines(Dataset):
    """The lines of a text, without their ends; a batch is a list of them.

    Attributes:
        text: all of it, as one string whose lines end with one character, a newline.
        lines: a list of strings.
    """

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n").replace("\r", "\n")
        self.lines = self.text.split("\n")
        if not self.lines[-1]:  # what follows the last newline is no line
            self.lines.pop()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> str:
        return self.lines[operator.index(index)]

    def get_batch(self, indices: Sequence[int]) -> list[str]:
        return [self[i] for i in indices]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self):,} lines, {len(self.text):,} characters)"


class TextFile(Lines):
    """A text file, by lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not in this encoding; the message says at which byte.
    """

    def __init__(self, path: str | os.PathLike, encoding: str = "utf-8") -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f"{type(self).__name__}: there is no file {self.path}")
        content = self.path.read_bytes()
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ValueError(
                f"{self.path}: not {encoding}: byte {error.start:,}, in line {line:,}, is 0x{content[error.start]:02x} "
                f"({error.reason}); give its encoding, as in encoding='latin-1'"
            ) from None
        except LookupError:
            raise ValueError(f"{type(self).__name__}: there is no encoding {encoding!r}; most text is utf-8") from None
        super().__init__(text)


class Shakespeare(TextFile):
    """40,000 lines of Shakespeare's plays, 1,115,394 characters: "tiny Shakespeare".

    Args:
        root: a folder that holds `input.txt`, itself or in `shakespeare` or `tinyshakespeare` below it.
        download: whether to download it if it is neither there nor in the folder for data.

    Raises:
        ValueError: the file is damaged or another text.
        FileNotFoundError: the file is missing and was not downloaded; the message says where to put it.
    """

    mirrors: ClassVar[Sequence[str]] = (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
    )
    folders: ClassVar[Sequence[str]] = ("shakespeare", "tinyshakespeare")
    file = "input.txt"
    source = Source(1_115_394, "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")

    def __init__(self, root: Root = None, download: bool = True) -> None:
        found = (folder / self.file for folder in places(root, self.folders))
        path = next((path for path in found if path.is_file()), None)
        if path is None:
            folder = data_folder() / self.folders[0]
            advice = f"put it into {folder if root is None else root}"
            path = fetch(self, self.file, self.mirrors if download else (), self.source, folder, advice)
        content = path.read_bytes()
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != self.source.checksum:
            raise ValueError(
                f"{path}: damaged, or another text ({len(content):,} bytes, tiny Shakespeare has {self.source.size:,}; "
                "its SHA-256 differs); TextFile reads any text"
            )
        super().__init__(path)


class PythonDocs(Lines):
    """What Python's `help()` knows of the language: the topics of `pydoc_data`, in alphabetical order, by lines.

    It comes with Python and needs no download. Its 450,000 characters or more differ from one version to the next.
    """

    def __init__(self) -> None:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise FileNotFoundError(
                "PythonDocs: this Python was installed without its module pydoc_data; install all of Python, or read "
                "another text with TextFile"
            ) from None
        super().__init__("\n".join(topics[name] for name in sorted(topics)))


# -- transforms: where the pixels are ----------------------------------------------------------------------------------


def pair(owner: str, size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, from both or from one number for both."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"{owner}: expected sizes >= 1, got {size!r}")
    return height, width


def probability(owner: str, p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"{owner}: p must be between 0 and 1, not {p!r}")
    return p


def along(xp: Backend, values: Any, like: Any) -> Any:
    """A number for each picture, drawn on the CPU, as (N, 1, 1, 1) beside floating pictures."""
    return xp.cast(xp.from_numpy(values.reshape(-1, 1, 1, 1)), xp.dtype_name(like))


def drawn(limits: Sequence[float], *shape: int) -> Any:
    """Numbers that are uniform between two limits, on the CPU."""
    low, high = limits
    return get_backend("cpu").random(shape, "float64") * (high - low) + low


class RandomVerticalFlip(Transform):
    """Each picture mirrored top to bottom with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = probability("RandomVerticalFlip", p)

    def apply(self, xp: Backend, images: Any) -> Any:
        chosen = get_backend("cpu").random((images.shape[0],)) < self.p
        return xp.where(xp.from_numpy(chosen.reshape(-1, 1, 1, 1)), xp.flip(images, axis=2), images)


class CenterCrop(Transform):
    """The middle of each picture.

    Args:
        size: height and width, or one number for both.
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = pair("CenterCrop", size)

    def apply(self, xp: Backend, images: Any) -> Any:
        (height, width), (rows, columns) = images.shape[2:], self.size
        if rows > height or columns > width:
            raise ValueError(
                f"CenterCrop: pictures of {height}×{width} have no part of {rows}×{columns}; Pad them first"
            )
        top, left = round((height - rows) / 2), round((width - columns) / 2)
        return images[:, :, top : top + rows, left : left + columns]


class Pad(Transform):
    """A border around each picture.

    Args:
        padding: pixels on all sides; or (left and right, top and bottom); or (left, top, right, bottom).
        fill: the border's value, where padding_mode is "constant".
        padding_mode: "constant"; "edge" repeats the outermost pixels; "reflect" mirrors the picture about the middle of
            those, "symmetric" about their outer edge.
    """

    def __init__(self, padding: int | Sequence[int], fill: float = 0, padding_mode: str = "constant") -> None:
        four = (padding,) * 4 if isinstance(padding, int) else tuple(padding) * (2 if len(padding) == 2 else 1)
        if len(four) != 4 or min(four) < 0:
            raise ValueError(f"Pad: expected 1, 2 or 4 lengths >= 0 as padding, got {padding!r}")
        if padding_mode not in ("constant", "edge", "reflect", "symmetric"):
            raise ValueError(f"Pad: padding_mode is constant, edge, reflect or symmetric, not {padding_mode!r}")
        self.padding, self.fill, self.padding_mode = four, fill, padding_mode

    def apply(self, xp: Backend, images: Any) -> Any:
        left, top, right, bottom = self.padding
        if self.padding_mode == "constant":
            return pad(images, pad=(left, right, top, bottom), value=checked_fill("Pad", xp, self.fill, images))
        for axis, before, after in ((2, top, bottom), (3, left, right)):
            places = self._places(images.shape[axis], before, after)
            images = xp.take(images, xp.from_numpy(get_backend("cpu").asarray(places)), axis=axis)
        return images

    def _places(self, length: int, before: int, after: int) -> list[int]:
        """Which row or column stands at each place of the padded picture."""
        places = range(-before, length + after)
        if self.padding_mode == "edge":
            return [min(max(i, 0), length - 1) for i in places]
        once = self.padding_mode == "reflect"  # the outermost pixel is not repeated
        if max(before, after) > length - once:
            raise ValueError(
                f"Pad: {self.padding_mode} pads {length} pixels with {length - once} at most, not {max(before, after)}"
            )
        period = 2 * (length - once)
        return [min(i % period, (once - 1 - i) % period) if not once else min(i % period, -i % period) for i in places]


def checked_fill(owner: str, xp: Backend, value: float, images: Any) -> float:
    """A value as pixels have it; ValueError if uint8 cannot hold it."""
    if xp.is_floating(images):
        return float(value)
    if not 0 <= value <= 255 or value != int(value):
        raise ValueError(f"{owner}: uint8 pictures are filled with a whole number from 0 to 255, not {value!r}")
    return int(value)


# -- transforms: turned, shifted, of another size ----------------------------------------------------------------------


class Resize(Transform):
    """Pictures of another size.

    Args:
        size: height and width; or one number, the shorter side's length, where the other keeps its proportion.
        interpolation: "bilinear", "nearest", "nearest-exact" or "area", as `interpolate` has them. To make pictures
            much smaller use "area": there is no smoothing before the others.
    """

    def __init__(self, size: int | Sequence[int], interpolation: str = "bilinear") -> None:
        pair("Resize", size)
        if interpolation not in ("bilinear", "nearest", "nearest-exact", "area"):
            raise ValueError(
                f"Resize: interpolation is bilinear, nearest, nearest-exact or area, not {interpolation!r}"
            )
        self.size, self.interpolation = size if isinstance(size, int) else tuple(size), interpolation

    def apply(self, xp: Backend, images: Any) -> Any:
        size, sides = self.size, images.shape[2:]
        if isinstance(size, int):
            size = tuple(size if n == min(sides) else int(size * n / min(sides)) for n in sides)
        floats = images if xp.is_floating(images) else xp.cast(images, "float32")
        return in_dtype(xp, interpolate(Tensor(floats), size, mode=self.interpolation).data, images)


def in_dtype(xp: Backend, floats: Any, images: Any) -> Any:
    """Floats in the dtype of the pictures that they were made of; 0 to 255, and rounded, if those are uint8."""
    if xp.is_floating(images):
        return floats
    return xp.cast(clamp(xp.round(floats), min=0, max=255), "uint8")


def symmetric(owner: str, name: str, value: float | Sequence[float]) -> tuple[float, ...]:
    """A pair of numbers in order, from both or from one number for -number and number."""
    least, most = value if isinstance(value, Sequence) else (-value, value)
    if not least <= most:
        raise ValueError(f"{owner}: {name} is a number >= 0 or a pair in order, not {value!r}")
    return float(least), float(most)


class RandomAffine(Transform):
    """Each picture turned, shifted, scaled and sheared about its middle by amounts of its own.

    Args:
        degrees: clockwise; uniform from -degrees to degrees, or between the two numbers of a pair.
        translate: (a, b): by whole pixels, at most the part a of the width and b of the height.
        scale: the least and the largest factor of size.
        shear: degrees of shear along x, from -shear to shear or between the two numbers of a pair; of four numbers, the
            last two are for shear along y.
        interpolation: "nearest" or "bilinear".
        fill: the value of pixels that come from outside of the picture.
    """

    def __init__(
        self, degrees: float | Sequence[float], translate: Sequence[float] | None = None,
        scale: Sequence[float] | None = None, shear: float | Sequence[float] | None = None,
        interpolation: str = "nearest", fill: float = 0,
    ) -> None:  # fmt: skip
        owner = type(self).__name__
        self.degrees = symmetric(owner, "degrees", degrees)
        self.translate = tuple(translate or (0.0, 0.0))
        if len(self.translate) != 2 or not all(0 <= part <= 1 for part in self.translate):
            raise ValueError(f"{owner}: translate is a pair of parts from 0 to 1, not {translate!r}")
        self.scale = tuple(scale or (1.0, 1.0))
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"{owner}: scale is a pair of factors above 0, in order, not {scale!r}")
        four = tuple(shear) if isinstance(shear, Sequence) and len(shear) == 4 else (shear or 0.0, 0.0)
        pairs = (four[:2], four[2:]) if len(four) == 4 else four
        self.shear = sum((symmetric(owner, "shear", value) for value in pairs), ())
        if interpolation not in ("nearest", "bilinear"):
            raise ValueError(f"{owner}: interpolation is nearest or bilinear, not {interpolation!r}")
        self.interpolation, self.fill = interpolation, fill

    def apply(self, xp: Backend, images: Any) -> Any:
        host, (n, _, height, width) = get_backend("cpu"), images.shape
        angle, along_x, along_y = (
            drawn(limits, n) * (math.pi / 180) for limits in (self.degrees, self.shear[:2], self.shear[2:])
        )
        factor = drawn(self.scale, n)
        shift_x, shift_y = (
            host.round(drawn((-part * length, part * length), n))
            for part, length in zip(self.translate, (width, height), strict=True)
        )
        # (x, y) of the picture goes to rotation · shear along y · shear along x · factor · (x, y) + shift.
        a, c = host.cos(angle - along_y) / host.cos(along_y), host.sin(angle - along_y) / host.cos(along_y)
        b, d = -a * host.tan(along_x) - host.sin(angle), -c * host.tan(along_x) + host.cos(angle)
        rows = (d, -b, b * shift_y - d * shift_x), (-c, a, c * shift_x - a * shift_y)  # and so it comes back
        inverse = host.stack([host.stack(row, axis=-1) for row in rows], axis=1) / factor[:, None, None]
        return self._warped(xp, images, inverse)

    def _warped(self, xp: Backend, images: Any, inverse: Any) -> Any:
        """Pictures whose pixels come from the places inverse · (x, y, 1) in pixels from the middle; (N, 2, 3)."""
        (height, width), fill = images.shape[2:], checked_fill(type(self).__name__, xp, self.fill, images)
        floats = images if xp.is_floating(images) else xp.cast(images, "float32")
        in_halves = [[1, height / width, 2 / width], [width / height, 1, 2 / height]]  # from -1 to 1 over the picture
        theta = as_tensor(inverse * get_backend("cpu").asarray(in_halves), xp.dtype_name(floats), xp.device)
        x = Tensor(floats if fill == 0 else floats - fill)  # grid_sample has zeros outside
        out = grid_sample(x, affine_grid(theta, images.shape), self.interpolation).data
        return in_dtype(xp, out if fill == 0 else out + fill, images)


class RandomRotation(RandomAffine):
    """Each picture turned about its middle by an angle of its own.

    Args:
        degrees: counter-clockwise; uniform from -degrees to degrees, or between the two numbers of a pair.
        interpolation: "nearest" or "bilinear".
        fill: the value of pixels that come from outside of the picture.
    """

    def __init__(self, degrees: float | Sequence[float], interpolation: str = "nearest", fill: float = 0) -> None:
        least, most = symmetric("RandomRotation", "degrees", degrees)
        super().__init__((-most, -least), interpolation=interpolation, fill=fill)

    def __repr__(self) -> str:
        degrees = (-self.degrees[1], -self.degrees[0])
        return f"RandomRotation(degrees={degrees}, interpolation={self.interpolation!r}, fill={self.fill})"


# -- transforms: erasing parts -----------------------------------------------------------------------------------------


def boxes(xp: Backend, top: Any, left: Any, height: Any, width: Any, size: Sequence[int]) -> Any:
    """Where pixels lie in a box of their picture's own: numbers (N,) on the CPU -> bool (N, 1, H, W)."""
    host = get_backend("cpu")
    inside = []
    for start, length, pixels in ((top, height, size[0]), (left, width, size[1])):
        places = host.arange(pixels)
        inside.append((places >= start[:, None]) & (places < (start + length)[:, None]))
    rows, columns = (xp.from_numpy(part) for part in inside)
    return rows[:, None, :, None] & columns[:, None, None, :]


class RandomErasing(Transform):
    """A rectangle of each picture erased with probability `p`: at a random place, of random size and proportions.

    Args:
        scale: the least and the largest part of the picture's area.
        ratio: the least and the largest ratio of height to width; its logarithm is uniform.
        value: what erased pixels become: a number, one for each channel, or "random": normal noise, or bytes for uint8.
    """

    def __init__(
        self, p: float = 0.5, scale: Sequence[float] = (0.02, 0.33), ratio: Sequence[float] = (0.3, 3.3),
        value: float | Sequence[float] | str = 0,
    ) -> None:  # fmt: skip
        self.p = probability("RandomErasing", p)
        if not 0 <= scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"RandomErasing: expected a scale from 0 to 1 and a ratio above 0, pairs in order; "
                             f"got {scale!r} and {ratio!r}")  # fmt: skip
        if isinstance(value, str) and value != "random":
            raise ValueError(f"RandomErasing: value is a number, one for each channel, or 'random', not {value!r}")
        self.scale, self.ratio, self.value = tuple(scale), tuple(ratio), value

    def apply(self, xp: Backend, images: Any) -> Any:
        host, (n, _, rows, columns) = get_backend("cpu"), images.shape
        area = rows * columns * drawn(self.scale, n, 10)  # ten attempts to find a rectangle that fits
        ratio = host.exp(drawn([math.log(r) for r in self.ratio], n, 10))
        height, width = host.round(host.sqrt(area * ratio)), host.round(host.sqrt(area / ratio))
        fits = (height < rows) & (width < columns)
        height, width = (x[host.arange(n), host.argmax(fits, axis=1)] for x in (height, width))
        height = height * (host.any(fits, axis=1) & (host.random((n,)) < self.p))  # 0 erases nothing
        top = host.floor(host.random((n,), "float64") * (rows - height + 1))
        left = host.floor(host.random((n,), "float64") * (columns - width + 1))
        return where(boxes(xp, top, left, height, width, (rows, columns)), self._values(xp, images), images)

    def _values(self, xp: Backend, images: Any) -> Any:
        host = get_backend("cpu")
        if self.value == "random":
            floats = xp.is_floating(images)
            noise = host.normal(images.shape) if floats else host.integers(0, 256, images.shape)
            return xp.cast(xp.from_numpy(noise), xp.dtype_name(images))
        values: Any = self.value if isinstance(self.value, Sequence) else (self.value,)
        if len(values) not in (1, images.shape[1]):
            raise ValueError(f"RandomErasing: {len(values)} values for {images.shape[1]} channels")
        column = [[[checked_fill("RandomErasing", xp, value, images)]] for value in values]
        return as_tensor(column, xp.dtype_name(images), xp.device).data


class Cutout(Transform):
    """Squares of each picture erased. Their middles are anywhere in it, so that they may reach beyond its edges.

    Args:
        size: the squares' sides, in pixels.
        count: how many there are in each picture.
        fill: what erased pixels become.
    """

    def __init__(self, size: int, count: int = 1, fill: float = 0) -> None:
        if size < 1 or count < 1:
            raise ValueError(f"Cutout: expected a size and a count >= 1, got {size!r} and {count!r}")
        self.size, self.count, self.fill = size, count, fill

    def apply(self, xp: Backend, images: Any) -> Any:
        host, (n, _, rows, columns) = get_backend("cpu"), images.shape
        sides = host.full((n,), self.size)
        fill = checked_fill("Cutout", xp, self.fill, images)
        for _ in range(self.count):
            top = host.integers(0, rows, (n,)) - self.size // 2
            left = host.integers(0, columns, (n,)) - self.size // 2
            images = where(boxes(xp, top, left, sides, sides, (rows, columns)), fill, images)
        return images


# -- transforms: colours -----------------------------------------------------------------------------------------------


def in_unit(xp: Backend, images: Any) -> Any:
    """uint8 as float32 from 0 to 1; floats as they are."""
    return images if xp.is_floating(images) else xp.cast(images, "float32") / 255


def as_before(xp: Backend, floats: Any, images: Any) -> Any:
    """Floats from 0 to 1 in the dtype of the pictures that they were made of."""
    return floats if xp.is_floating(images) else in_dtype(xp, floats * 255, images)


def checked_colours(owner: str, images: Any) -> None:
    if images.shape[1] not in (1, 3):
        raise ValueError(f"{owner}: expected pictures of 1 or 3 channels, got {images.shape[1]}")


def channels(x: Any) -> list[Any]:
    """The channels of pictures, (N, 1, H, W) each."""
    return [x[:, i : i + 1, ...] for i in range(x.shape[1])]


def luma(x: Any) -> Any:
    """How bright colours look: (N, 3, H, W) -> (N, 1, H, W); of one channel, itself."""
    if x.shape[1] == 1:
        return x
    red, green, blue = channels(x)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


class Grayscale(Transform):
    """Colours as brightness, 0.2989 red + 0.587 green + 0.114 blue; of one channel, that channel.

    Args:
        num_output_channels: 1, or 3 that are equal.
    """

    def __init__(self, num_output_channels: int = 1) -> None:
        if num_output_channels not in (1, 3):
            raise ValueError(f"Grayscale: num_output_channels is 1 or 3, not {num_output_channels!r}")
        self.num_output_channels = num_output_channels

    def apply(self, xp: Backend, images: Any) -> Any:
        checked_colours("Grayscale", images)
        gray = as_before(xp, luma(in_unit(xp, images)), images)
        return xp.concat([gray] * self.num_output_channels, axis=1)


class ColorJitter(Transform):
    """Brightness, contrast, saturation and hue of each picture changed by amounts of its own.

    Pictures are uint8, or floats from 0 to 1; the result is in the same range. The order of the four changes is random,
    and one for the whole batch. Pictures of one channel have no saturation and no hue.

    Args:
        brightness, contrast, saturation: each factor is uniform from max(0, 1 - value) to 1 + value, or between the two
            numbers of a pair.
        hue: by which part of the circle of colours they are turned: uniform from -value to value, or between the two
            numbers of a pair; at most 0.5.
    """

    def __init__(
        self, brightness: float | Sequence[float] = 0, contrast: float | Sequence[float] = 0,
        saturation: float | Sequence[float] = 0, hue: float | Sequence[float] = 0,
    ) -> None:  # fmt: skip
        self.brightness = self._range("brightness", brightness, 1.0)
        self.contrast = self._range("contrast", contrast, 1.0)
        self.saturation = self._range("saturation", saturation, 1.0)
        self.hue = self._range("hue", hue, 0.0)

    @staticmethod
    def _range(name: str, value: Any, neutral: float) -> tuple[float, float]:
        """The least and the largest amount."""
        if not isinstance(value, Sequence):
            value = (neutral - value if not neutral else max(0.0, neutral - value), neutral + value)
        least, most = (0.0, math.inf) if neutral else (-0.5, 0.5)
        if len(value) != 2 or not least <= value[0] <= value[1] <= most:
            what = "a number >= 0, or a pair from 0 on" if neutral else "a number from 0 to 0.5, or a pair within ±0.5"
            raise ValueError(f"ColorJitter: {name} is {what}, in order, not {value!r}")
        return tuple(value)

    def apply(self, xp: Backend, images: Any) -> Any:
        checked_colours("ColorJitter", images)
        amounts = (self.brightness, self.contrast, self.saturation, self.hue)
        changes = (brightened, contrasted, saturated, turned)
        floats = in_unit(xp, images)
        for i in get_backend("cpu").permutation(4).tolist():
            amount = along(xp, drawn(amounts[i], images.shape[0]), floats)
            if amounts[i] != ((0.0, 0.0) if changes[i] is turned else (1.0, 1.0)):
                floats = changes[i](xp, floats, amount)
        return as_before(xp, floats, images)


def brightened(xp: Backend, x: Any, factor: Any) -> Any:
    return clamp(x * factor, min=0.0, max=1.0)


def contrasted(xp: Backend, x: Any, factor: Any) -> Any:
    """Further from, or nearer to, the picture's mean brightness."""
    middle = xp.mean(luma(x), axis=(1, 2, 3), keepdims=True)
    return clamp(middle + (x - middle) * factor, min=0.0, max=1.0)


def saturated(xp: Backend, x: Any, factor: Any) -> Any:
    """Further from, or nearer to, gray of the same brightness."""
    gray = luma(x)
    return clamp(gray + (x - gray) * factor, min=0.0, max=1.0)


def turned(xp: Backend, x: Any, turn: Any) -> Any:
    """The hue, which goes from 0 to 6 here, turned by a part of its circle, at the same saturation and value."""
    if x.shape[1] == 1:
        return x
    red, green, blue = channels(x)
    value, least = xp.max(x, axis=1, keepdims=True), xp.min(x, axis=1, keepdims=True)
    spread = value - least
    divisor = where(spread == 0, 1.0, spread)
    hue = where(
        value == red, (green - blue) / divisor,
        where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    ) + 6 * turn  # fmt: skip
    out = []
    for start in (5, 3, 1):  # how far below the value a channel is: a trapezium of the hue, from 0 to the spread
        place = (hue + start) % 6
        out.append(value - spread * clamp(xp.minimum(place, 4 - place), min=0.0, max=1.0))
    return xp.concat(out, axis=1)


# -- transforms: of functions and of chance ----------------------------------------------------------------------------


class Lambda:
    """A function as a transform. To be sent to worker processes it must stand at the top of a file."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        if not callable(function):
            raise TypeError(f"Lambda: expected a function, got {type(function).__name__}")
        self.function = function

    def __call__(self, batch: Any) -> Any:
        return self.function(batch)

    def __repr__(self) -> str:
        return f"Lambda({getattr(self.function, '__name__', repr(self.function))})"


class RandomApply(Compose):
    """Transforms one after the other, for a whole batch with probability `p`."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]], p: float = 0.5) -> None:
        super().__init__(transforms)
        self.p = probability("RandomApply", p)

    def __call__(self, batch: Any) -> Any:
        return super().__call__(batch) if float(get_backend("cpu").random(())) < self.p else batch

    def __repr__(self) -> str:
        return f"RandomApply({self.transforms!r}, p={self.p})"


class RandomChoice(Compose):
    """One of several transforms for each batch, each as likely as the others: RandomChoice([MixUp(10), CutMix(10)])."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        super().__init__(transforms)
        if not self.transforms:
            raise ValueError("RandomChoice: expected at least one transform, got none")

    def __call__(self, batch: Any) -> Any:
        return self.transforms[int(get_backend("cpu").integers(0, len(self.transforms), ()))](batch)

    def __repr__(self) -> str:
        return f"RandomChoice({self.transforms!r})"


# -- mixing pictures and labels ----------------------------------------------------------------------------------------


class Mixing:
    """What MixUp and CutMix share. Called with a batch, it pairs each picture with another one of the batch.

    Args:
        num_classes: how many classes there are.
        alpha: the shares are Beta(alpha, alpha): uniform for 1, nearly 0 or 1 for small ones.
    """

    def __init__(self, num_classes: int, alpha: float = 1.0) -> None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1 or not alpha > 0:
            raise ValueError(
                f"{type(self).__name__}: expected num_classes >= 1 and alpha > 0, got {num_classes!r} and {alpha!r}"
            )
        self.num_classes, self.alpha = num_classes, alpha

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(pictures (N, C, H, W), labels (N,) or probabilities (N, num_classes)) -> (pictures, probabilities)."""
        name = type(self).__name__
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(x, Tensor) for x in batch):
            raise ValueError(
                f"{name}: expected (pictures, labels), two tensors; it is for DataLoader(batch_transform=…)"
            )
        pictures, labels = batch
        if pictures.ndim != 4 or not pictures.dtype.is_floating_point:
            raise ValueError(f"{name}: expected floating pictures (N, C, H, W), got {pictures.dtype} {pictures.shape}; "
                             "ToFloat or Normalize makes floats")  # fmt: skip
        if labels.ndim == 1 and not labels.dtype.is_floating_point:
            labels = one_hot(labels, self.num_classes).to(float32)
        if labels.shape != (len(pictures), self.num_classes):
            raise ValueError(f"{name}: expected {len(pictures)} labels, or probabilities ({len(pictures)}, "
                             f"{self.num_classes}), got shape {labels.shape}")  # fmt: skip
        host = get_backend("cpu")
        share, partner = host.beta(self.alpha, self.alpha, (len(pictures),), "float64"), host.permutation(len(pictures))
        return self.mix(pictures, labels, pictures[partner], labels[partner], share)

    def mix(self, a: Tensor, a_labels: Tensor, b: Tensor, b_labels: Tensor, share: Any) -> tuple[Tensor, Tensor]:
        """Mix a and b; `share` (N,), an array on the CPU, is a's."""
        raise NotImplementedError(f"{type(self).__name__} must define mix")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_classes}, alpha={self.alpha})"


def weighted(share: Any, a: Tensor, b: Tensor) -> Tensor:
    """share a + (1 - share) b, with a share for each example."""
    weight = as_tensor(share, a.dtype, a.device).reshape(-1, *(1,) * (a.ndim - 1))
    return weight * a + (1 - weight) * b


class MixUp(Mixing):
    """Each picture and its label averaged with another of the batch: share times the one, 1 - share times the other.

    Args:
        num_classes: how many there are; labels become probabilities (N, num_classes), as cross-entropy takes them.
        alpha: the shares are Beta(alpha, alpha): uniform for 1, nearly 0 or 1 for small ones.
    """

    def mix(self, a: Tensor, a_labels: Tensor, b: Tensor, b_labels: Tensor, share: Any) -> tuple[Tensor, Tensor]:
        return weighted(share, a, b), weighted(share, a_labels, b_labels)


class CutMix(Mixing):
    """A rectangle of each picture replaced by what stands there in another of the batch; labels mixed by area.

    The rectangle has the picture's proportions and 1 - share of its area; its middle is anywhere, and what reaches
    beyond the picture is cut off.

    Args:
        num_classes: how many there are; labels become probabilities (N, num_classes), as cross-entropy takes them.
        alpha: the shares are Beta(alpha, alpha): uniform for 1, nearly 0 or 1 for small ones.
    """

    def mix(self, a: Tensor, a_labels: Tensor, b: Tensor, b_labels: Tensor, share: Any) -> tuple[Tensor, Tensor]:
        rows, columns = a.shape[2:]
        top, height = self._side(rows, share)
        left, width = self._side(columns, share)
        replaced = boxes(get_backend(a.device), top, left, height, width, (rows, columns))
        kept = 1 - height * width / (rows * columns)
        return where(Tensor(replaced), b, a), weighted(kept, a_labels, b_labels)

    @staticmethod
    def _side(pixels: int, share: Any) -> tuple[Any, Any]:
        """Where rectangles begin along an axis, and their lengths, for all pictures."""
        host = get_backend("cpu")
        length = host.floor(pixels * host.sqrt(1 - share))
        start = host.integers(0, pixels, share.shape) - host.floor(length / 2)
        inside = host.maximum(start, host.zeros_like(start))
        return inside, host.minimum(start + length, host.full_like(start, pixels)) - inside


# -- parts and samplers ------------------------------------------------------------------------------------------------


def random_split(dataset: Any, lengths: Sequence[float], seed: int | None = None) -> list[Subset]:
    """Random parts of a dataset that share no example, and together hold all.

    Args:
        lengths: how many examples each has; or fractions with a sum of 1, where what is left by rounding down goes
            to the first ones.
        seed: which parts; without one it depends on `manual_seed`.
    """
    total = len(dataset)
    if math.isclose(math.fsum(lengths), 1) and all(0 <= share <= 1 for share in lengths):
        counts = [math.floor(total * share) for share in lengths]
        for i in range(total - sum(counts)):
            counts[i % len(counts)] += 1
    elif sum(lengths) == total and all(int(n) == n >= 0 for n in lengths):
        counts = [int(n) for n in lengths]
    else:
        raise ValueError(f"random_split: {list(lengths)} are neither lengths with the sum {total} nor fractions of 1")
    with seeded(draw_seed() if seed is None else seed):
        order = randperm(total, device="cpu").tolist()
    ends = list(itertools.accumulate(counts))
    return [Subset(dataset, order[end - n : end]) for n, end in zip(counts, ends, strict=True)]


class SubsetRandomSampler(Sampler):
    """Certain examples, in random order."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return (self.indices[i] for i in randperm(len(self), device="cpu").tolist())

    def __len__(self) -> int:
        return len(self.indices)


class WeightedRandomSampler(Sampler):
    """`num_samples` examples, each drawn with probability proportional to its weight; to balance rare classes, say."""

    def __init__(self, weights: Sequence[float], num_samples: int, replacement: bool = True) -> None:
        self.weights = as_tensor(weights, dtype=float64, device="cpu")
        self.num_samples, self.replacement = num_samples, replacement
        bad = not bool(((self.weights >= 0) & (self.weights < math.inf)).all()) or not float(self.weights.sum()) > 0
        if self.weights.ndim != 1 or bad:
            raise ValueError("WeightedRandomSampler: expected a row of finite weights >= 0 that are not all 0")

    def __iter__(self) -> Iterator[int]:
        if not self.replacement:
            return iter(multinomial(self.weights, self.num_samples).tolist())
        bounds = cumsum(self.weights, dim=0)  # a draw from [0, 1) falls between two of them
        drawn = rand(self.num_samples, dtype=float64, device="cpu")
        return iter(get_backend("cpu").searchsorted((bounds / bounds[-1]).data, drawn.data, side="right").tolist())

    def __len__(self) -> int:
        return self.num_samples


# -- worker processes --------------------------------------------------------------------------------------------------
# A thread of the loader has a process work for it. What goes between the two is what `pickle` makes of the dataset, of
# numbers and of batches, through a pipe and never into a file; a tensor travels as the array that it holds. Each
# process has a pipe of its own, so that its end is noticed at once: reading fails then, and the exit status tells why.


class Packer(pickle.Pickler):
    """Pickles for the way to a worker and back; tensors refuse to be pickled for any other."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return unpack_tensor, (value.detach().numpy(), str(value.device))
        return NotImplemented


def unpack_tensor(array: Any, device: str) -> Tensor:
    return Tensor(get_backend(device).from_numpy(array))


def pack(value: Any) -> bytes:
    """A value as bytes for the other end of a pipe."""
    buffer = io.BytesIO()
    Packer(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def serve(channel: Connection, number: int, device: str, dtype: str, worker: Worker | None) -> None:
    """All that a worker process does: answer messages, the first of which is the worker unless it was inherited.

    It leaves Ctrl-C to the main program, and ends when its pipe or the main program does, however that came about.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    set_default_device(device)
    set_default_dtype(dtype)
    with suppress(EOFError, ConnectionError):
        while True:
            message = channel.recv_bytes()
            try:
                content, answer = pickle.loads(message), None
                if worker is None:
                    worker = content
                    worker.id, worker.seed = number, worker.recipe.seed + number
                else:
                    answer = worker(*content)
                reply = pack((None, answer))
            except Exception as error:
                reply = pack((kind_of(error), traceback.format_exc()))
            channel.send_bytes(reply)


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def kind_of(error: Exception) -> type[Exception]:
    """The class of an error, if the main program can make one of a text; RuntimeError otherwise."""
    with suppress(Exception):
        type(error)("")
        pack(type(error))
        return type(error)
    return RuntimeError


class Text(str):
    """A text that KeyError shows as it is."""

    __repr__ = str.__str__


class RemoteWorker:
    """A worker in a process of its own, which is called like one that is here."""

    def __init__(self, context: Any, number: int, message: bytes, worker: Worker | None) -> None:
        self.number, self.message = number, message
        self.owner, self.asking = os.getpid(), threading.Lock()
        self.channel, theirs = context.Pipe()
        options = (theirs, number, str(get_default_device()), str(get_default_dtype()), worker)
        self.process = context.Process(target=serve, args=options, name=f"DataLoader-{number}", daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, *task: Any) -> Any:
        if self.message:
            self._ask(self.message)
            self.message = b""
        return self._ask(pack(task))

    def _ask(self, message: bytes) -> Any:
        try:
            with self.asking:
                self.channel.send_bytes(message)
                reply = self.channel.recv_bytes()
        except (EOFError, OSError):
            raise RuntimeError(f"DataLoader: {self._name()} {self._fate()}") from None
        kind, content = pickle.loads(reply)
        if kind is not None:
            raise kind(Text(f"in DataLoader {self._name()}:\n{content}"))
        return content

    def _name(self) -> str:
        return f"worker {self.number}, process {self.process.pid},"

    def _fate(self) -> str:
        self.process.join(1)
        status = self.process.exitcode
        if status is None:
            return "does not answer any more"
        if status >= 0:
            main = "; a program with worker processes begins under `if __name__ == '__main__':`" if self.message else ""
            return f"ended with exit status {status}{main}"
        name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
        memory = "; perhaps memory ran out: use fewer workers, or threads" if name == "SIGKILL" else ""
        return f"was killed by {name}{memory}"

    def end(self) -> None:
        """End the process, whatever it is doing. A fork of the main program, which it does not belong to, may not."""
        if os.getpid() != self.owner:
            return
        self.process.terminate()
        self.process.join(1)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        # Left to the garbage collector, it would be closed where Python drops a Ctrl-C that comes at that moment.
        if self.asking.acquire(timeout=1):  # its thread, which may be reading from the channel, sees the end first
            self.channel.close()


def start_processes(context: Any, workers: list[Worker]) -> list[RemoteWorker]:
    """A process for each worker: forked ones have it already, others are sent it. TypeError if it cannot be sent."""
    forked = context.get_start_method() == "fork"
    try:
        message = b"" if forked else pack(workers[0])
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise TypeError(
            f"DataLoader: the dataset, or one of the loader's functions, cannot be sent to a worker process ({error}). "
            "Define classes and functions at the top of a file, open files only when they are first read, or use "
            "threads: leave multiprocessing_context out"
        ) from error
    started: list[RemoteWorker] = []
    try:
        with interrupts_held():
            for worker in workers:
                started.append(RemoteWorker(context, worker.id, message, worker if forked else None))
    except BaseException:
        for remote in started:
            remote.end()
        raise
    return started


@contextmanager
def interrupts_held() -> Iterator[None]:
    """What is started in it never hears of Ctrl-C, which goes to all processes of a terminal, not even at first."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which spawned processes need, and which lets interrupts through when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


attach_processes(start_processes)
