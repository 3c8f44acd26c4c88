"""Files of weights: what is saved comes back, also through other programs, and what is wrong with a file is said."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from tinytorch.m02_tensor import DTYPES, Tensor, float32, randn, tensor
from tinytorch.m04_layers import Linear, Parameter, Sequential
from tinytorch.m04_layers_appendix import CHECKSUM, load, save


@pytest.fixture
def saved(tmp_path):
    """A small file, and what is in it."""
    generator = np.random.default_rng(23)
    arrays = {
        "layer.weight": generator.standard_normal((3, 5)).astype(np.float32),
        "layer.bias": generator.standard_normal(3).astype(np.float32),
        "steps": generator.integers(0, 99, (2, 2)),
    }
    path = tmp_path / "weights.safetensors"
    save({name: Tensor(array) for name, array in arrays.items()}, path, {"epoch": "3"})
    return path, arrays


def same(state, arrays) -> bool:
    return list(state) == list(arrays) and all(
        (state[n].numpy() == a).all() and state[n].dtype == a.dtype.name and state[n].shape == a.shape
        for n, a in arrays.items()
    )


# -- there and back ----------------------------------------------------------------------------------------------------


def test_values_order_and_metadata_come_back(saved) -> None:
    path, arrays = saved
    state = load(path)
    assert same(state, arrays)
    assert state.metadata == {"format": "pt", "epoch": "3"}
    state["steps"] += 1  # the memory is ours
    assert (load(path)["steps"].numpy() == arrays["steps"]).all()


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "bfloat16"])
def test_every_dtype(tmp_path, dtype) -> None:
    generator = np.random.default_rng(4)
    for shape in [(), (0,), (0, 3), (1,), (7,), (2, 3, 4)]:
        array = np.asarray(generator.integers(0, 2, shape) * 100).astype(dtype)
        save({"x": array}, tmp_path / "x")
        assert same(load(tmp_path / "x"), {"x": array})


def test_views_are_written_in_their_own_order(tmp_path) -> None:
    x = randn(4, 6)
    views = {"transposed": x.T, "slice": x[1:, ::2], "expanded": x[:1].expand(3, 6), "flipped": x[::-1]}
    save(views, tmp_path / "x")
    state = load(tmp_path / "x")
    for name, view in views.items():
        assert state[name].tolist() == view.tolist()


def test_devices(tmp_path, device) -> None:
    x = randn(3, 2)
    save({"x": Parameter(x)}, tmp_path / "x")
    state = load(tmp_path / "x")
    assert type(state["x"]) is Tensor
    assert (state["x"].tolist(), state["x"].device, state["x"].watched) == (x.tolist(), x.device, False)
    assert str(load(tmp_path / "x", device="array_api_strict")["x"].device) == "array_api_strict"
    assert str(load(tmp_path / "x", map_location="cpu")["x"].device) == "cpu"


def test_nothing_at_all_is_a_file_too(tmp_path) -> None:
    save({}, tmp_path / "x")
    assert load(tmp_path / "x") == {}


def test_other_programs_read_ours_and_we_read_theirs(saved) -> None:
    path, arrays = saved
    theirs = safetensors.numpy.load_file(path)
    assert all((theirs[name] == array).all() for name, array in arrays.items())
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata()["epoch"] == "3"
    safetensors.numpy.save_file(arrays, path)
    state = load(path)
    assert (sorted(state), state.metadata) == (sorted(arrays), {})
    assert all((state[name].numpy() == array).all() for name, array in arrays.items())


def file_of(header: dict, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def test_bfloat16_becomes_float32(tmp_path) -> None:
    values = np.array([1.0, -2.5, 0.15625, float("inf")], np.float32)  # each of 8 significant bits
    header = {"x": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    (tmp_path / "x").write_bytes(file_of(header, (values.view(np.uint32) >> 16).astype("<u2").tobytes()))
    x = load(tmp_path / "x")["x"]
    assert (x.dtype, x.tolist()) == (float32, values.reshape(2, 2).tolist())


def test_a_model_comes_back(tmp_path) -> None:
    first, second = (Sequential(Linear(4, 8), Linear(8, 2)) for _ in range(2))
    x = randn(3, 4)
    save(first.state_dict(), tmp_path / "model.pth")
    second.load_state_dict(load(tmp_path / "model.pth", map_location="cpu", weights_only=True))
    assert second(x).tolist() == first(x).tolist()


# -- what cannot be saved ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (Linear(1, 1), None, r"save: expected tensors by name, like model\.state_dict\(\), got Linear"),
        ([1.0], None, "save: expected tensors by name, .* got list"),
        ({"epoch": 3}, None, "save: 'epoch' is 3, not a tensor"),
        ({3: tensor(1)}, None, "save: a tensor's name must be text .* got 3"),
        ({"__metadata__": tensor(1)}, None, "save: a tensor's name must be text"),
        ({}, {"epoch": 3}, "save: metadata is text by name, not 'epoch': 3"),
        ({}, {CHECKSUM: "0"}, "save: metadata is text by name"),
    ],
)
def test_what_cannot_be_saved_leaves_the_old_file(saved, tensors, metadata, message) -> None:
    path, arrays = saved
    with pytest.raises(TypeError, match=message):
        save(tensors, path, metadata)
    assert same(load(path), arrays)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# -- files that are not in order ---------------------------------------------------------------------------------------


def refusal(path) -> str:
    """The error that loading a file must raise: a ValueError of one line that names the file."""
    with pytest.raises(ValueError, match=r"^load: ") as error:
        load(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_truncated_anywhere(saved) -> None:
    path, _ = saved
    content = path.read_bytes()
    for length in [0, 1, 7, 8, 9, *range(10, len(content), 13), len(content) - 1]:
        path.write_bytes(content[:length])
        assert "not a safetensors file, or damaged" in refusal(path)
    path.write_bytes(content + b"\0")
    refusal(path)


def test_every_flipped_bit_is_seen(saved) -> None:
    path, arrays = saved
    content = path.read_bytes()
    key = content.index(CHECKSUM.encode())
    for place in range(len(content)):
        bit = 1 << place % 8
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        if key <= place < key + len(CHECKSUM):
            continue  # without its name there is no checksum; nothing else is altered then
        try:
            state = load(path)
        except ValueError:
            refusal(path)
        else:  # the padding, which JSON does not count
            assert same(state, arrays)
            assert state.metadata == {"format": "pt", "epoch": "3"}


def test_altered_numbers_and_metadata_are_told_by_the_checksum(saved) -> None:
    path, _ = saved
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    assert "checksum" in refusal(path)
    path.write_bytes(content.replace(b'"epoch": "3"', b'"epoch": "7"'))
    assert "checksum" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b"hello, I am a text file\n" * 10,
        struct.pack("<Q", 2**63 - 1) + b"{}",
        struct.pack("<Q", 2**32) + b"{}" * 50,
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null",
        file_of({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 4),
        file_of({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8),
        file_of({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"\0" * 8),
        file_of({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, b"\0" * 8),
        file_of({"x": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        file_of({"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, b"\0" * 8),
        file_of({"x": {"shape": [2]}}, b"\0" * 8),
        file_of({"__metadata__": {"a": 1}}, b""),
        file_of({"__metadata__": [1]}, b""),
        struct.pack("<Q", 100_000) + b'{"a":' * 20_000,
        np.random.default_rng(0).bytes(5000),
    ],
)
def test_foreign_and_malicious_files(tmp_path, content) -> None:
    path = tmp_path / "foreign.bin"
    path.write_bytes(content)
    refusal(path)


def test_a_dtype_that_is_not_known_is_named(tmp_path) -> None:
    path = tmp_path / "eighths"
    path.write_bytes(file_of({"w": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, b"\0" * 8))
    assert "'w' has dtype F8_E4M3; known are" in refusal(path)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


def test_pickles_are_never_executed(tmp_path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    assert "pickle" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(Bomb()))
    assert "pickle" in refusal(path)
    with pytest.raises(ValueError, match="weights_only=False"):
        load(path, weights_only=False)


def test_no_file_and_a_folder(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(OSError, match=tmp_path.name):
        load(tmp_path)
