"""Module 04, appendix: more containers and initial values, and files of weights.

Files are safetensors with PyTorch's names and layouts: a length, a header in JSON, the numbers. Reading one runs no
code. Ours carry a checksum over header and numbers; those of other programs, which have none, load as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from itertools import groupby
from pathlib import Path
from statistics import NormalDist
from typing import Any

from tinytorch.backends import backend_of, get_backend
from tinytorch.m01_setup import atomic_write
from tinytorch.m02_tensor import Tensor, _default
from tinytorch.m02_tensor_appendix import unflatten
from tinytorch.m04_layers import Container, Module, Row, _name_of, _numbered, fans, normal_, overwrite

# -- containers and layers ---------------------------------------------------------------------------------------------


class ModuleList(Row):
    """A list of layers that belong to a module. It has no `forward`: the module that holds it loops over it."""

    def __add__(self, other: Iterable[Any]) -> ModuleList:
        return ModuleList([*self, *other])

    def __iadd__(self, other: Iterable[Any]) -> ModuleList:
        self.extend(other)
        return self

    def insert(self, index: int, layer: Any) -> None:
        """Put a layer before the one at `index`."""
        layers = list(self)
        layers.insert(index, layer)
        self._replace(_numbered(layers))

    def pop(self, index: int = -1) -> Any:
        """Take a layer out and return it."""
        layer = self[index]
        del self[index]
        return layer

    def _shown(self) -> list[tuple[str, str]]:
        """Layers that read the same, in a row, are shown once: "(0-11): 12 x Block(…)"."""
        shown, start = [], 0
        for text, same in groupby(map(_name_of, self)):
            count = len(list(same))
            one = count == 1
            shown.append((f"{start}", text) if one else (f"{start}-{start + count - 1}", f"{count} x {text}"))
            start += count
        return shown


class ModuleDict(Container):
    """Layers by name that belong to a module: a dictionary that keeps their order."""

    def __init__(self, layers: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__()
        self.update(layers)

    def __getitem__(self, name: str) -> Any:
        return self._layers()[name]

    def __setitem__(self, name: str, layer: Any) -> None:
        self.add_module(name, layer)

    def __delitem__(self, name: str) -> None:
        self.pop(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def keys(self) -> Iterable[str]:
        return self._layers().keys()

    def values(self) -> Iterable[Any]:
        return self._layers().values()

    def items(self) -> Iterable[tuple[str, Any]]:
        return self._layers().items()

    def update(self, layers: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
        for name, layer in dict(layers).items():
            self.add_module(name, layer)

    def pop(self, name: str) -> Any:
        """Take a layer out and return it; KeyError if there is none of that name."""
        layers = self._layers()
        layer = layers.pop(name)
        self._replace(layers)
        return layer


class Identity(Module):
    """x itself. It takes any arguments when it is made, so that it can stand in any layer's place."""

    transparent = True  # a Sequential leaves it out, so that the layers around it may be fused

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, x: Any) -> Any:
        return x


class Unflatten(Module):
    """One axis made several: the reverse of Flatten."""

    def __init__(self, dim: int, unflattened_size: Iterable[int]) -> None:
        super().__init__()
        self.dim, self.unflattened_size = dim, tuple(unflattened_size)

    def forward(self, x: Tensor) -> Tensor:
        return unflatten(x, self.dim, self.unflattened_size)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, unflattened_size={self.unflattened_size}"


# -- methods of all modules --------------------------------------------------------------------------------------------


def _as_dtype(dtype: str) -> Callable[[Module], Module]:
    return lambda self: self.to(dtype)


def get_submodule(self: Module, path: str) -> Any:
    """The layer at a path such as "encoder.0.attention"; "" is the module itself."""
    return reduce(getattr, path.split(".") if path else [], self)


Module.extend_class(
    float=_as_dtype("float32"),
    double=_as_dtype("float64"),
    half=_as_dtype("float16"),
    bfloat16=_as_dtype("bfloat16"),
    cpu=lambda self: self.to("cpu"),
    cuda=lambda self, index=0: self.to(f"cuda:{index}"),
    get_submodule=get_submodule,
)

# -- initial values ----------------------------------------------------------------------------------------------------


def constant_(x: Tensor, val: float) -> Tensor:
    """Overwrite with one value."""
    return overwrite(x, val)


def zeros_(x: Tensor) -> Tensor:
    return overwrite(x, 0)


def ones_(x: Tensor) -> Tensor:
    return overwrite(x, 1)


def xavier_normal_(x: Tensor, gain: float = 1.0) -> Tensor:
    """Overwrite with normal values of standard deviation gain · sqrt(2 / (fan_in + fan_out))."""
    return normal_(x, 0.0, gain * math.sqrt(2 / sum(fans(x))))


def trunc_normal_(x: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Tensor:
    """Overwrite with normal values that lie in [a, b]: those outside are drawn again."""
    normal = NormalDist(mean, std)
    if not a < b or normal.cdf(b) - normal.cdf(a) < 1e-3:
        raise ValueError(f"trunc_normal_: [{a}, {b}] holds next to nothing of a normal with mean {mean} and std {std}")
    xp = backend_of(x.data)
    values = xp.normal(x.shape, x.dtype) * std + mean
    while xp.any(outside := (values < a) | (values > b)):
        values = xp.where(outside, xp.normal(x.shape, x.dtype) * std + mean, values)
    return overwrite(x, values)


def orthogonal_(x: Tensor, gain: float = 1.0) -> Tensor:
    """Overwrite with a matrix (the axes behind the first made one) whose shorter side is orthonormal, times `gain`."""
    if x.ndim < 2:
        raise ValueError(f"orthogonal_: expected at least 2 axes, got {x.shape}")
    host, xp = get_backend("cpu"), backend_of(x.data)  # the standard's QR is optional, NumPy's is there
    drawn = xp.to_numpy(xp.normal((x.shape[0], x.numel() // x.shape[0]), "float64"))
    wide = drawn.shape[0] < drawn.shape[1]
    q, r = host.linalg.qr(drawn.T if wide else drawn)
    q = q * host.sign(host.linalg.diagonal(r))  # makes the distribution uniform over all such matrices
    return overwrite(x, xp.from_numpy(host.reshape((q.T if wide else q) * gain, x.shape)))


def eye_(x: Tensor) -> Tensor:
    """Overwrite a matrix with ones on its diagonal and zeros elsewhere."""
    xp = backend_of(x.data)
    return overwrite(x, xp.eye(*x.shape, dtype=xp.dtype(x.dtype)))


# -- files -------------------------------------------------------------------------------------------------------------

CHECKSUM = "tinytorch.sha256"
DTYPE_CODES = {"BOOL": "bool", "BF16": "uint16", "F16": "float16", "F32": "float32", "F64": "float64"}
DTYPE_CODES |= {f"{sign[0].upper()}{bits}": f"{sign}{bits}" for sign in ("int", "uint") for bits in (8, 16, 32, 64)}


class StateDict(dict[str, Tensor]):
    """Tensors by name, as `load` returns them, and the file's `metadata`, text by name."""

    metadata: dict[str, str]


def save(tensors: Mapping[str, Any], path: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name, such as `model.state_dict()`, to a safetensors file: the old file stays, or all is new.

    Args:
        metadata: further text by name; numbers and structures go through `json.dumps`.
    """
    from safetensors.numpy import save as serialize

    if not isinstance(tensors, Mapping):
        raise TypeError(f"save: expected tensors by name, like model.state_dict(), got {type(tensors).__name__}")
    texts = {"format": "pt", **(metadata or {})}  # "pt": names and layouts are PyTorch's; other programs ask for it
    for name, value in texts.items():
        if not isinstance(name, str) or not isinstance(value, str) or name == CHECKSUM:
            raise TypeError(f"save: metadata is text by name, not {name!r}: {value!r:.60}")
    header, payload = _split(serialize({name: _host_array(name, x) for name, x in tensors.items()}, texts))
    header = {name: header[name] for name in ("__metadata__", *tensors)}  # the library sorts them; we keep the order
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # the same content, the same bytes
    header["__metadata__"][CHECKSUM] = _checksum(header, payload)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8
    atomic_write(path, lambda file: file.writelines([len(text).to_bytes(8, "little"), text, payload]))


def _host_array(name: Any, value: Any) -> Any:
    """A tensor's values as NumPy has them, in order in memory."""
    if not isinstance(name, str) or name == "__metadata__":
        raise TypeError(f"save: a tensor's name must be text (and not '__metadata__'), got {name!r}")
    if not hasattr(value, "shape"):
        raise TypeError(f"save: {name!r} is {value!r:.60}, not a tensor; what is not goes into metadata, as text")
    x = value if isinstance(value, Tensor) else Tensor(value)
    if x.dtype == "bfloat16":
        raise TypeError(f"save: {name!r} is bfloat16, which NumPy does not have; save it.to('float32')")
    array = x.numpy()
    return array if array.flags["C_CONTIGUOUS"] else array.copy()


def load(
    path: str | os.PathLike, map_location: str | None = None, device: str | None = None, weights_only: bool = True
) -> StateDict:
    """Read a safetensors file: tensors by name on a device, with the file's `metadata`. bfloat16 becomes float32.

    Args:
        map_location, device: the device to put the tensors on, under PyTorch's name and ours; the default device if
            neither is given.
        weights_only: never anything else is loaded, so False is refused.

    Raises:
        ValueError: in one line, with the file's name, if it is truncated, altered or no safetensors file at all.
    """
    if not weights_only:
        raise ValueError("load: weights_only=False would run code from the file, which is never done")
    content = Path(path).read_bytes()
    try:
        entries, header, payload = _parse(content)
        stated = header.get("__metadata__", {}).pop(CHECKSUM, None)
        if stated is not None and stated != _checksum(header, payload):
            raise ValueError("its checksum is wrong: the file was altered after it was saved")
        xp = get_backend(device or map_location or _default["device"])
        names = [name for name in header if name != "__metadata__"]
        state = StateDict({name: Tensor(xp.from_numpy(_decode(name, entries.pop(name)))) for name in names})
    except ValueError as error:
        raise ValueError(f"load: {os.fspath(path)}: {error}") from None
    state.metadata = header.get("__metadata__", {})
    return state


def _parse(content: bytes) -> tuple[dict[str, dict], dict, memoryview]:
    """(entries, header, payload) of a file that the safetensors library found to be in order."""
    from safetensors import SafetensorError, deserialize

    try:
        return dict(deserialize(content)), *_split(content)
    except SafetensorError as error:
        if content.startswith((b"PK\x03\x04", b"\x80")):
            raise ValueError("this is a pickle, as torch.save writes it, and pickles are never read") from None
        reason = " ".join(str(error).split())
        raise ValueError(f"not a safetensors file, or damaged ({reason}; {len(content)} bytes)") from None


def _split(content: bytes) -> tuple[dict, memoryview]:
    """The header and the numbers of a file that is known to be in order."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), memoryview(content)[end:]


def _checksum(header: dict, payload: memoryview) -> str:
    """SHA-256 over the header, written in one way only, and the numbers."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(payload)
    return digest.hexdigest()


def _decode(name: str, entry: dict) -> Any:
    """One tensor of a file as a NumPy array."""
    code, host = entry["dtype"], get_backend("cpu")
    if code not in DTYPE_CODES:
        raise ValueError(f"{name!r} has dtype {code}; known are {', '.join(DTYPE_CODES)}")
    array = host.frombuffer(entry["data"], dtype=host.dtype(DTYPE_CODES[code]))
    if code == "BF16":  # the upper half of a float32
        array = (array.astype(host.dtype("uint32")) << 16).view(host.dtype("float32"))
    return array.reshape(tuple(entry["shape"]))
