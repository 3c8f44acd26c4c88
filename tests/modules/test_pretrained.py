"""Folders of published weights: what is written comes back, and what is wrong with a folder is said, all of it."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tinytorch.m01_setup import manual_seed
from tinytorch.m02_tensor import DTYPES, randn, tensor
from tinytorch.m04_layers import Linear, Parameter
from tinytorch.m14_transformers import GPT, GPTConfig
from tinytorch.m14_transformers_appendix import CONFIG, INDEX, NEXT, OWN, WEIGHTS

SMALL = GPTConfig(vocab_size=11, context_length=6, num_layers=2, num_heads=2, embed_dim=8, mlp="gelu")
MODERN = replace(
    SMALL, norm="rms", positions="rotary", mlp="swiglu", bias=False, num_kv_heads=1, head_dim=6, hidden_dim=5,
    tie_weights=False,
)  # fmt: skip
FORMATS = {"gpt2": SMALL, "llama": MODERN}


def random_model(config: GPTConfig, seed: int = 1) -> GPT:
    """A model in which every number is random, the norms' and the biases' too."""
    model, generator = GPT(config), np.random.default_rng(seed)
    model.load_state_dict({n: generator.normal(size=x.shape).astype("f4") for n, x in model.state_dict().items()})
    return model.eval()


def saved(folder: Path, config: GPTConfig, **entries: Any) -> GPT:
    model = random_model(config)
    model.save_pretrained(folder, **entries)
    return model


def values(model: GPT) -> dict:
    return {name: x.numpy().tolist() for name, x in model.state_dict().items()}


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / WEIGHTS)


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of config.json; None takes one out."""
    entries = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps({name: x for name, x in entries.items() if x is not None}))


def rewrite(folder: Path, change: Callable[[dict], Any]) -> None:
    """Change the tensors of a folder, as another program would: its file has no checksum."""
    tensors = arrays(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)


def refusal(folder: Path | str, error: type[Exception] = ValueError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        GPT.from_pretrained(folder, **options)
    message = str(caught.value)
    assert message.startswith("GPT.from_pretrained: ")
    assert str(folder) in message
    return message


# -- there and back ----------------------------------------------------------------------------------------------------

VARIANTS = {
    "gpt2": SMALL,
    "gpt2 of other sizes": replace(SMALL, hidden_dim=5, tie_weights=False, norm_eps=1e-3, mlp="gelu_tanh", dropout=0.2),
    "gpt2 without biases": replace(SMALL, bias=False, mlp="relu"),
    "gpt2 with silu": replace(SMALL, mlp="silu", num_layers=1),
    "llama": MODERN,
    "llama with biases": replace(MODERN, bias=True, tie_weights=True, rope_base=500.0, dropout=0.3, norm_eps=0.01),
    "llama stretched": replace(MODERN, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "llama 3": replace(
        MODERN,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    config, ids = VARIANTS[name], tensor([[1, 5, 0, 10, 3, 3]])
    model = saved(tmp_path / "new" / "folder", config)
    back = GPT.from_pretrained(tmp_path / "new" / "folder")
    assert values(back) == values(model)
    assert (back.training, back(ids).tolist()) == (False, model(ids).tolist())
    shown = {field: getattr(back.config, field) for field in ("dropout", "bias", "norm_eps", "rope_scaling", "mlp")}
    assert shown == {field: getattr(config, field) for field in shown}
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [CONFIG, WEIGHTS]
    first = (tmp_path / "new" / "folder" / WEIGHTS).read_bytes()
    back.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == first


def test_gpt2_stores_its_weights_transposed(tmp_path: Path) -> None:
    state = saved(tmp_path, SMALL).state_dict()
    file = arrays(tmp_path)
    for ours, theirs in (("attention.qkv", "attn.c_attn"), ("attention.out", "attn.c_proj"),
                         ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):  # fmt: skip
        assert (file[f"transformer.h.1.{theirs}.weight"] == state[f"blocks.1.{ours}.weight"].numpy().T).all()
        assert (file[f"transformer.h.1.{theirs}.bias"] == state[f"blocks.1.{ours}.bias"].numpy()).all()
    assert (file["transformer.wpe.weight"] == state["positions.weight"].numpy()).all()
    assert "lm_head.weight" not in file


def test_llama_stores_queries_keys_and_values_apart(tmp_path: Path) -> None:
    qkv = saved(tmp_path, MODERN).state_dict()["blocks.1.attention.qkv.weight"].numpy()
    parts = [arrays(tmp_path)[f"model.layers.1.self_attn.{letter}_proj.weight"] for letter in "qkv"]
    assert [part.shape for part in parts] == [(12, 8), (6, 8), (6, 8)]
    assert (np.concatenate(parts) == qkv).all()


def test_absent_biases_are_zeros_in_the_file(tmp_path: Path) -> None:
    saved(tmp_path, replace(SMALL, bias=False))
    biases = [x for name, x in arrays(tmp_path).items() if name.endswith(".bias")]
    assert len(biases) == 2 * 6 + 1
    assert not any(x.any() for x in biases)
    assert json.loads((tmp_path / CONFIG).read_text())[OWN] == {"bias": False}
    rewrite(tmp_path, lambda x: x["transformer.ln_f.bias"].__setitem__(3, 1.0))  # another program has trained one
    assert GPT.from_pretrained(tmp_path).state_dict()["norm.bias"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_other_entries_are_written_as_well(tmp_path: Path) -> None:
    saved(tmp_path, SMALL, eos_token_id=3)
    entries = json.loads((tmp_path / CONFIG).read_text())
    assert (entries["eos_token_id"], entries["model_type"], entries["torch_dtype"]) == (3, "gpt2", "float32")


def test_dtypes(tmp_path: Path) -> None:
    model = saved(tmp_path, SMALL)
    rewrite(tmp_path, lambda x: x.update({n: a.astype(np.float16) for n, a in x.items()}))
    back = GPT.from_pretrained(tmp_path)
    rounded = {n: x.to("float16").to("float32").numpy().tolist() for n, x in model.state_dict().items()}
    assert values(back) == rounded
    assert {x.dtype for x in GPT.from_pretrained(tmp_path, dtype="float64").parameters()} == {DTYPES["float64"]}
    GPT.from_pretrained(tmp_path, dtype="float16").save_pretrained(tmp_path / "half")
    assert {x.dtype for x in arrays(tmp_path / "half").values()} == {np.dtype(np.float16)}
    assert json.loads((tmp_path / "half" / CONFIG).read_text())["torch_dtype"] == "float16"
    assert values(GPT.from_pretrained(tmp_path / "half")) == rounded


def test_devices(tmp_path: Path, device: str) -> None:
    ids = tensor([[1, 5, 0]])
    for name, config in FORMATS.items():
        model = saved(tmp_path / name, config)
        back = GPT.from_pretrained(tmp_path / name)
        assert {x.device for x in back.parameters()} == {ids.device}
        np.testing.assert_allclose(back(ids).detach().numpy(), model(ids).detach().numpy(), rtol=1e-5, atol=1e-5)
    assert {str(x.device) for x in GPT.from_pretrained(tmp_path / name, device="array_api_strict").parameters()} == {
        "array_api_strict"
    }


def test_loading_uses_up_nobodys_random_numbers(tmp_path: Path) -> None:
    saved(tmp_path, SMALL)
    manual_seed(4)
    expected = randn(3).tolist()
    manual_seed(4)
    GPT.from_pretrained(tmp_path)
    assert randn(3).tolist() == expected


def test_a_model_can_be_saved_over_the_files_that_it_came_from(tmp_path: Path) -> None:
    saved(tmp_path, SMALL)
    model = GPT.from_pretrained(tmp_path)
    model.positions.weight.data[:] = 7.0
    model.save_pretrained(tmp_path)
    assert values(GPT.from_pretrained(tmp_path)) == values(model)


# -- as others write it ------------------------------------------------------------------------------------------------


def split_into_shards(folder: Path, count: int = 3) -> dict[str, str]:
    """Make several files of one; returns the index's map."""
    tensors = list(arrays(folder).items())
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    parts = [dict(tensors[i::count]) for i in range(count)]
    for file, part in zip(files, parts, strict=True):
        safetensors.numpy.save_file(part, folder / file)
    places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / WEIGHTS).unlink()
    return places


@pytest.mark.parametrize("name", FORMATS)
def test_several_files(tmp_path: Path, name: str) -> None:
    model = saved(tmp_path, FORMATS[name])
    places = split_into_shards(tmp_path)
    assert values(GPT.from_pretrained(tmp_path)) == values(model)
    files = sorted(set(places.values()))
    (tmp_path / files[0]).unlink()
    (tmp_path / files[2]).unlink()
    message = refusal(tmp_path, FileNotFoundError)
    assert f"lacks {files[0]}, {files[2]};" in message
    assert files[1] not in message


def test_an_index_names_files_of_its_folder_only(tmp_path: Path) -> None:
    saved(tmp_path / "model", SMALL)
    split_into_shards(tmp_path / "model")
    for wrong in ({"a": "../weights.safetensors"}, {"a": str(tmp_path / "x")}, {"a": 3}, {}, []):
        (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": wrong}))
        assert "names no files of its folder" in refusal(tmp_path / "model")


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("llama", "model.")])
def test_names_without_the_prefix(tmp_path: Path, name: str, prefix: str) -> None:
    model = saved(tmp_path, FORMATS[name])

    def bare(tensors: dict) -> None:
        for key in list(tensors):
            tensors[key.removeprefix(prefix)] = tensors.pop(key)

    rewrite(tmp_path, bare)
    assert values(GPT.from_pretrained(tmp_path)) == values(model)
    rewrite(tmp_path, lambda x: x.pop(next(iter(x))))
    assert re.search(r"missing: (?!transformer|model)\S+ \(", refusal(tmp_path))  # named as this file would


def test_buffers_of_old_files_are_ignored(tmp_path: Path) -> None:
    for name, key in (("gpt2", "transformer.h.1.attn.bias"), ("gpt2", "transformer.h.0.attn.masked_bias"),
                      ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq")):  # fmt: skip
        model = saved(tmp_path, FORMATS[name])
        rewrite(tmp_path, lambda x, key=key: x.update({key: np.ones((1, 3), bool)}))
        assert values(GPT.from_pretrained(tmp_path)) == values(model)


def test_a_tied_embedding_may_stand_in_the_heads_place(tmp_path: Path) -> None:
    model = saved(tmp_path, SMALL)
    rewrite(tmp_path, lambda x: x.update({"lm_head.weight": x.pop("transformer.wte.weight")}))
    assert values(GPT.from_pretrained(tmp_path)) == values(model)


def test_both_spellings_of_the_rotary_positions(tmp_path: Path) -> None:
    saved(tmp_path, MODERN)
    given = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    for entries in ({"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **given}},
                    {"rope_theta": None, "rope_scaling": None,
                     "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **given}}):  # fmt: skip
        edit(tmp_path, **entries)
        config = GPT.from_pretrained(tmp_path).config
        assert (config.rope_base, config.rope_scaling) == (500.0, {"rope_type": "llama3", **given})
    edit(tmp_path, rope_parameters=None, rope_scaling={"type": "linear", "factor": 3.0})
    config = GPT.from_pretrained(tmp_path).config
    assert (config.rope_base, config.rope_scaling) == (10000.0, {"rope_type": "linear", "factor": 3.0})
    edit(tmp_path, rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    config = GPT.from_pretrained(tmp_path).config
    assert (config.rope_base, config.rope_scaling) == (7.0, None)


@pytest.mark.parametrize(("kept", "other"), [("attention", "mlp"), ("mlp", "attention")])
def test_biases_of_one_kind_only(tmp_path: Path, kept: str, other: str) -> None:
    model = saved(tmp_path, replace(MODERN, bias=True))
    edit(tmp_path, **{f"{other}_bias": False})
    part = {"attention": "self_attn", "mlp": "mlp"}[other]
    rewrite(tmp_path, lambda x: [x.pop(name) for name in list(x) if f".{part}." in name and name.endswith(".bias")])
    back = values(GPT.from_pretrained(tmp_path))
    for name, x in values(model).items():
        absent = f".{other}." in name and name.endswith(".bias")
        assert back[name] == ([0] * len(x) if absent else x), name


# -- folders that are not in order -------------------------------------------------------------------------------------


def test_everything_that_is_wrong_with_the_tensors_is_listed_at_once(tmp_path: Path) -> None:
    def spoil(tensors: dict) -> None:
        del tensors["transformer.h.0.ln_1.bias"], tensors["transformer.h.1.mlp.c_fc.weight"]
        tensors["transformer.h.2.ln_1.bias"] = np.zeros(8, np.float32)
        tensors["score.weight"] = np.zeros((2, 8), np.float32)
        tensors["transformer.wpe.weight"] = np.zeros((7, 8), np.float32)
        tensors["transformer.h.0.attn.c_attn.weight"] = tensors["transformer.h.0.attn.c_attn.weight"].T.copy()
        tensors["transformer.ln_f.bias"] = np.zeros(8, np.int8)

    saved(tmp_path, SMALL)
    rewrite(tmp_path, spoil)
    head, *lines = refusal(tmp_path).split("\n")
    assert head.endswith("holds no GPT-2 that fits its config.json:")
    kinds = dict(line.strip().split(": ") for line in lines)
    assert kinds["missing"] == "transformer.h.1.mlp.c_fc.weight (8, 32), transformer.h.0.ln_1.bias (8,)"
    assert kinds["unexpected"] == "score.weight (2, 8), transformer.h.2.ln_1.bias (8,)"
    wrong = {"transformer.wpe.weight (7, 8), expected (6, 8)",
             "transformer.h.0.attn.c_attn.weight (24, 8), expected (8, 24)",
             "transformer.ln_f.bias of dtype I8, expected one of F16, BF16, F32, F64"}  # fmt: skip
    assert set(re.split(r", (?=transformer)", kinds["wrong"])) == wrong


def test_a_tied_model_needs_no_head_and_an_untied_one_does(tmp_path: Path) -> None:
    saved(tmp_path, SMALL)
    edit(tmp_path, tie_word_embeddings=False)
    assert "missing: lm_head.weight (11, 8)" in refusal(tmp_path)


def test_files_that_are_missing(tmp_path: Path) -> None:
    message = refusal(tmp_path / "gpt2", FileNotFoundError)
    assert "there is no folder" in message
    assert "huggingface.co" in message
    message = refusal(tmp_path, FileNotFoundError)
    assert f"lacks {CONFIG}, {WEIGHTS} (or {INDEX}" in message
    (tmp_path / "file").write_text("")
    assert "there is no folder" in refusal(tmp_path / "file", FileNotFoundError)
    saved(tmp_path, SMALL)
    (tmp_path / CONFIG).unlink()
    assert f"lacks {CONFIG};" in refusal(tmp_path, FileNotFoundError)


class Bomb:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("a pickle was executed",)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    saved(tmp_path, SMALL)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    message = refusal(tmp_path, FileNotFoundError)
    assert "pytorch_model.bin would be pickles" in message
    assert ".save_pretrained(…) of transformers makes safetensors" in message
    (tmp_path / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    assert "not a safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null"])
@pytest.mark.parametrize("file", [CONFIG, INDEX])
def test_json_that_is_none(tmp_path: Path, file: str, content: bytes) -> None:
    saved(tmp_path, SMALL)
    if file == INDEX:
        split_into_shards(tmp_path)
    (tmp_path / file).write_bytes(content)
    assert re.search(r"is not JSON|holds \w+, not an object", refusal(tmp_path))


def test_damaged_weights(tmp_path: Path) -> None:
    saved(tmp_path, SMALL)
    content = (tmp_path / WEIGHTS).read_bytes()
    for cut in (content[:-1], content[: len(content) // 2], content[:5], b""):
        (tmp_path / WEIGHTS).write_bytes(cut)
        assert "is not a safetensors file, or damaged" in refusal(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    assert "its checksum is wrong" in refusal(tmp_path)


GPT2_MISTAKES = [
    ({"model_type": "mistral"}, "holds a model of type 'mistral'; known: gpt2, llama"),
    ({"model_type": None}, "holds a model of type None"),
    ({"model_type": ["gpt2"]}, "holds a model of type"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, and only False is known"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False, and only True is known"),
    ({"add_cross_attention": True}, "add_cross_attention is True"),
    ({"activation_function": "mish"}, "activation_function is 'mish', and only 'gelu_new', .* are known"),
    ({"n_layer": 0}, "n_layer is 0, expected a whole number >= 1"),
    ({"n_embd": 8.5}, "n_embd is 8.5, expected a whole number"),
    ({"vocab_size": "many"}, "vocab_size is 'many'"),
    ({"n_head": True}, "n_head is True"),
    ({"n_head": 3}, "embed_dim is 8, not a multiple of num_heads, 3"),
    ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon is 'small', expected a number"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"attn_pdrop": 0.1}, r"rates of dropout differ \(resid_pdrop 0, embd_pdrop 0, attn_pdrop 0.1\).* dropout=…"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: the weights are quantized"),
    ({OWN: 3}, "tinytorch is 3, expected an object"),
]
LLAMA_MISTAKES = [
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu', 'swish' are known"),
    ({"attention_dropout": 0.5}, "attention_dropout 0.5, elsewhere 0"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn', and only 'default', 'linear'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' lacks factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor is 'two'"),
    ({"rope_scaling": 3}, "rope_scaling is 3, expected an object"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and only 1 is known"),
    ({"attention_bias": "some"}, "attention_bias is 'some'"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_heads is 4, not a multiple of num_kv_heads, 3"),
]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [("gpt2", *row) for row in GPT2_MISTAKES] + [("llama", *row) for row in LLAMA_MISTAKES],
)
def test_configurations_that_gpt_cannot_be(tmp_path: Path, name: str, changes: dict, message: str) -> None:
    saved(tmp_path, FORMATS[name])
    edit(tmp_path, **changes)
    assert re.search(message, refusal(tmp_path))


def test_all_of_a_configurations_mistakes_are_listed(tmp_path: Path) -> None:
    saved(tmp_path, SMALL)
    edit(tmp_path, n_layer=-1, activation_function="mish", scale_attn_weights=False)
    message = refusal(tmp_path)
    assert message.count("\n  ") == 3
    assert all(name in message for name in ("n_layer", "activation_function", "scale_attn_weights"))


def test_dropout_can_be_chosen(tmp_path: Path) -> None:
    saved(tmp_path, SMALL)
    edit(tmp_path, attn_pdrop=0.1)
    assert GPT.from_pretrained(tmp_path, dropout=0.25).config.dropout == 0.25
    edit(tmp_path, attn_pdrop=0.0)
    assert GPT.from_pretrained(tmp_path).config.dropout == 0


# -- models that no file can hold --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"norm_first": False}, ["norm_first is False, not True"]),
        ({"norm": "rms"}, ["norm is 'rms', not 'layer'", "positions is 'learned', not 'rotary'"]),
        ({"positions": "rotary"}, ["positions is 'rotary', not 'learned'", "norm is 'layer', not 'rms'"]),
        ({"mlp": "swiglu"}, ["mlp is 'swiglu', not 'gelu_tanh' or 'gelu' or 'relu' or 'silu'"]),
        ({"num_kv_heads": 1}, ["num_kv_heads is 1, not None or 2"]),
        ({"head_dim": 3}, ["head_dim is 3, not None or 4"]),
        ({"norm": "rms", "positions": "rotary", "mlp": "gelu"}, ["mlp is 'gelu', not 'swiglu'"]),
        ({"num_heads": 3, "head_dim": 2}, ["embed_dim is 8, not a multiple of num_heads, 3"]),
    ],
)
def test_what_no_format_can_express_is_named(tmp_path: Path, changes: dict, fields: list[str]) -> None:
    model = GPT(replace(SMALL, **changes))
    with pytest.raises(ValueError, match=r"save_pretrained: no format .*\n  GPT-2's: .*\n  Llama's: ") as caught:
        model.save_pretrained(tmp_path / "model")
    assert all(field in str(caught.value) for field in fields)
    assert not (tmp_path / "model").exists()


def test_a_model_that_was_changed_is_not_written(tmp_path: Path) -> None:
    model = saved(tmp_path, SMALL)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model.blocks[0].mlp.adapter = Linear(2, 3, bias=False)
    model.blocks[1].mlp.up = Linear(8, 9)
    model.norm.weight = None
    model.tokens.weight = Parameter(randn(12, 8))
    with pytest.raises(ValueError, match="not those of its config") as caught:
        model.save_pretrained(tmp_path)
    for part in ("missing: norm.weight (8,)", "unexpected: blocks.0.mlp.adapter.weight (3, 2)",
                 "tokens.weight (12, 8), expected (11, 8)", "blocks.1.mlp.up.bias (9,), expected (32,)"):  # fmt: skip
        assert part in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# -- a program that dies while it writes -------------------------------------------------------------------------------

OTHER = replace(SMALL, num_heads=4)  # the same shapes: only the configuration tells them apart
CRASH = """
import os, signal, sys
from pathlib import Path
from tinytorch.m14_transformers import GPT
from tinytorch.m14_transformers_appendix import GPT

calls, real, folder = 0, os.replace, sys.argv[1]
model = GPT.from_pretrained(sys.argv[3])

def replace(*arguments):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

os.replace = replace
model.save_pretrained(folder)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
@pytest.mark.parametrize("rename", [1, 2, 3])
def test_killed_before_any_renaming(tmp_path: Path, root: Path, rename: int) -> None:
    ids = tensor([[1, 5, 0, 10, 3, 3]])
    old, new = saved(tmp_path / "model", SMALL), random_model(OTHER, seed=2)
    new.save_pretrained(tmp_path / "new")
    arguments = [str(tmp_path / "model"), str(rename), str(tmp_path / "new")]
    environment = os.environ | {"PYTHONPATH": str(root), "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", CRASH, *arguments], env=environment, check=False, timeout=60)
    assert process.returncode == -signal.SIGKILL
    expected = new if rename == 3 else old
    back = GPT.from_pretrained(tmp_path / "model")
    assert (back.config.num_heads, values(back)) == (expected.config.num_heads, values(expected))
    assert back(ids).tolist() == expected(ids).tolist()
    new.save_pretrained(tmp_path / "model")  # and the next one cleans up
    assert GPT.from_pretrained(tmp_path / "model").config.num_heads == 4
    assert not (tmp_path / "model" / NEXT).exists()


def test_a_configuration_that_was_edited_by_hand_counts(tmp_path: Path) -> None:
    saved(tmp_path, SMALL)
    edit(tmp_path, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    assert GPT.from_pretrained(tmp_path).config.dropout == 0.5
