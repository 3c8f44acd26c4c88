"""Module 14, appendix: published weights, and PyTorch's own transformer layers.

A folder of Hugging Face's `transformers` holds config.json and the weights in safetensors, in one file or in several
with an index. `GPT.from_pretrained` reads GPT-2's and Llama's, and `save_pretrained` writes them, so that there is one
format for what others have trained and for what we train. A table says where each of our tensors lies in the files; the
table is what is checked, read and written, and reading and writing know nothing else of either architecture.
"""

from __future__ import annotations

import copy
import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tinytorch.backends import backend_of, get_backend
from tinytorch.m01_setup import atomic_write
from tinytorch.m02_tensor import Tensor, full
from tinytorch.m02_tensor_appendix import Writes, _write, get_default_device, get_default_dtype, triu
from tinytorch.m03_activations import gelu, relu
from tinytorch.m04_layers import Dropout, Linear, Module, overwrite, xavier_uniform_
from tinytorch.m04_layers_appendix import CHECKSUM, ModuleList, _checksum, _decode, _split, save
from tinytorch.m13_attention_appendix import MultiheadAttention
from tinytorch.m14_transformers import GPT, GPTConfig, LayerNorm

# -- config.json -------------------------------------------------------------------------------------------------------

GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu"}
GPT2_ACTIVATIONS = {**GELUS, "relu": "relu", "silu": "silu", "swish": "silu"}
LLAMA_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}
ROPE_TYPES = {  # the numbers that each kind of scaling has
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
OWN = "tinytorch"  # the entry of config.json for what only our models have; other programs leave it alone


class Entries:
    """The entries of a config.json, read with the defaults that `transformers` has.

    Attributes:
        problems: what is wrong with those that were read, in words.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self.entries, self.problems = entries, list[str]()

    def get(self, name: str, default: Any = None) -> Any:
        value = self.entries.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None) -> Any:
        """A whole number of at least 1, or the default."""
        value = self.get(name, default)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            self.problems.append(f"{name} is {value!r}, expected a whole number >= 1")
            return default
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
            self.problems.append(f"{name} is {value!r}, expected a number >= 0")
            return default
        return float(value)

    def choice(self, name: str, default: Any, known: Iterable[Any]) -> Any:
        """One of the values that we have a counterpart for."""
        value, known = self.get(name, default), list(known)
        if not isinstance(value, (str, bool)) or value not in known:
            listed = ", ".join(map(repr, known))
            self.problems.append(f"{name} is {value!r}, and only {listed} {'is' if len(known) == 1 else 'are'} known")
            return default
        return value

    def dropout(self, names: Iterable[str], default: float, others: float | None = None, wanted: Any = None) -> float:
        """The one rate that GPT has: theirs where all agree, or what the caller wants."""
        rates = {name: self.number(name, default) for name in names}
        if wanted is not None:
            return float(wanted)
        if len({*rates.values(), *([] if others is None else [others])}) == 1:
            return next(iter(rates.values()))
        listed = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        listed += "" if others is None else f", elsewhere {others:g}"
        self.problems.append(f"the rates of dropout differ ({listed}), and GPT has one: choose it by dropout=…")
        return 0.0


def from_gpt2(entries: Entries, dropout: float | None = None) -> GPTConfig:
    """What GPT-2's config.json says, as a GPTConfig. `entries.problems` lists what cannot be said so."""
    entries.choice("scale_attn_weights", True, [True])
    entries.choice("scale_attn_by_inverse_layer_idx", False, [False])
    entries.choice("add_cross_attention", False, [False])
    activation = entries.choice("activation_function", "gelu_new", GPT2_ACTIVATIONS)
    return GPTConfig(
        vocab_size=entries.size("vocab_size", 50257),
        context_length=entries.size("n_positions", 1024),
        num_layers=entries.size("n_layer", 12),
        num_heads=entries.size("n_head", 12),
        embed_dim=entries.size("n_embd", 768),
        hidden_dim=entries.size("n_inner", None),
        dropout=entries.dropout(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1, wanted=dropout),
        norm_eps=entries.number("layer_norm_epsilon", 1e-5),
        mlp=GPT2_ACTIVATIONS[activation],
        tie_weights=entries.choice("tie_word_embeddings", True, [True, False]),
    )


def from_llama(entries: Entries, dropout: float | None = None) -> GPTConfig:
    """What Llama's config.json says, as a GPTConfig. `entries.problems` lists what cannot be said so."""
    own = entries.get(OWN, {}).get("dropout")
    own = own if own == entries.get("attention_dropout", 0.0) else 0.0
    base, scaling = rope(entries)
    biases = [entries.choice(name, False, [True, False]) for name in ("attention_bias", "mlp_bias")]
    return GPTConfig(
        vocab_size=entries.size("vocab_size", 32000),
        context_length=entries.size("max_position_embeddings", 2048),
        num_layers=entries.size("num_hidden_layers", 32),
        num_heads=entries.size("num_attention_heads", 32),
        embed_dim=entries.size("hidden_size", 4096),
        num_kv_heads=entries.size("num_key_value_heads", None),
        head_dim=entries.size("head_dim", None),
        hidden_dim=entries.size("intermediate_size", 11008),
        dropout=entries.dropout(("attention_dropout",), 0.0, others=own, wanted=dropout),
        bias=any(biases),
        norm="rms",
        norm_eps=entries.number("rms_norm_eps", 1e-6),
        positions="rotary",
        rope_base=base,
        rope_scaling=scaling,
        mlp=LLAMA_ACTIVATIONS[entries.choice("hidden_act", "silu", LLAMA_ACTIVATIONS)],
        tie_weights=entries.choice("tie_word_embeddings", False, [True, False]),
    )


def rope(entries: Entries) -> tuple[float, dict | None]:
    """(base, scaling) of the rotary positions, as `transformers` 4 and 5 write them."""
    given = entries.get("rope_scaling") or entries.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        entries.problems.append(f"rope_scaling is {given!r}, expected an object")
        return 10000.0, None
    inner = Entries({"rope_type": given.get("type"), "rope_theta": entries.get("rope_theta"),
                     "original_max_position_embeddings": entries.get("max_position_embeddings", 2048),
                     "partial_rotary_factor": entries.get("partial_rotary_factor"), **given})  # fmt: skip
    kind = inner.choice("rope_type", "default", ROPE_TYPES)
    base = inner.number("rope_theta", 10000.0)
    if inner.number("partial_rotary_factor", 1.0) != 1:
        inner.problems.append(f"partial_rotary_factor is {inner.get('partial_rotary_factor')}, and only 1 is known")
    for name in ROPE_TYPES[kind]:
        if inner.get(name) is None:
            inner.problems.append(f"rope_type {kind!r} lacks {name}")
        inner.number(name, 1.0)
    scaling = {"rope_type": kind, **{name: inner.get(name) for name in ROPE_TYPES[kind]}}
    entries.problems += inner.problems
    return base, (None if kind == "default" else scaling)


def gpt2_entries(config: GPTConfig) -> dict[str, Any]:
    """The entries of GPT-2's config.json for a configuration."""
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.embed_dim,
        "n_inner": config.hidden_dim,
        **rates,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": next(name for name, mlp in GPT2_ACTIVATIONS.items() if mlp == config.mlp),
        "tie_word_embeddings": config.tie_weights,
        **({} if config.bias else {OWN: {"bias": False}}),
    }


def llama_entries(config: GPTConfig) -> dict[str, Any]:
    """The entries of Llama's config.json for a configuration."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "hidden_size": config.embed_dim,
        "head_dim": config.head_size,
        "intermediate_size": config.hidden_size,
        "attention_dropout": config.dropout,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,  # transformers 4 reads these two, and 5 as well
        "rope_scaling": config.rope_scaling,
        "tie_word_embeddings": config.tie_weights,
        **({OWN: {"dropout": config.dropout}} if config.dropout else {}),
    }


# -- where each tensor lies --------------------------------------------------------------------------------------------

HEAD = "lm_head.weight"


class Place(NamedTuple):
    """Where a tensor of ours lies in the files.

    Attributes:
        pieces: the shapes of the tensors there, by name; ours has their rows, one piece below the other. None: zeros.
        transposed: whether they are stored as (in, out), as in GPT-2's layers.
    """

    pieces: Mapping[str, tuple[int, ...]]
    transposed: bool = False

    def rows(self) -> Iterator[tuple[str, slice]]:
        """Each piece's name, and which of our rows it is."""
        start = 0
        for name, shape in self.pieces.items():
            stop = start + shape[-1 if self.transposed else 0]
            yield name, slice(start, stop)
            start = stop

    def shape(self) -> tuple[int, ...]:
        """The shape of our tensor."""
        shapes = [shape[::-1] if self.transposed else shape for shape in self.pieces.values()]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def gpt2_places(config: GPTConfig, entries: Entries | None = None) -> dict[str, Place]:
    """Where GPT-2's files have each tensor. They have all biases, whether the model has them or not."""
    E, hidden = config.embed_dim, config.hidden_size
    places = {"tokens.weight": Place({"transformer.wte.weight": (config.vocab_size, E)}),
              "positions.weight": Place({"transformer.wpe.weight": (config.context_length, E)})}  # fmt: skip
    layers = {"attention.qkv": ("attn.c_attn", E, 3 * E), "attention.out": ("attn.c_proj", E, E),
              "mlp.up": ("mlp.c_fc", E, hidden), "mlp.down": ("mlp.c_proj", hidden, E)}  # fmt: skip
    norms = {f"blocks.{i}.norm{n}": f"transformer.h.{i}.ln_{n}" for i in range(config.num_layers) for n in (1, 2)}
    for i in range(config.num_layers):
        for own, (name, inputs, outputs) in layers.items():
            weight, bias = f"transformer.h.{i}.{name}.weight", f"transformer.h.{i}.{name}.bias"
            places[f"blocks.{i}.{own}.weight"] = Place({weight: (inputs, outputs)}, transposed=True)
            places[f"blocks.{i}.{own}.bias"] = Place({bias: (outputs,)})
    for own, name in {**norms, "norm": "transformer.ln_f"}.items():
        places |= {f"{own}.{part}": Place({f"{name}.{part}": (E,)}) for part in ("weight", "bias")}
    if not config.tie_weights:
        places["head.weight"] = Place({HEAD: (config.vocab_size, E)})
    return places


def llama_places(config: GPTConfig, entries: Entries | None = None) -> dict[str, Place]:
    """Where Llama's files have each tensor. Biases that only `entries` says are not there are zeros."""
    E, hidden, D = config.embed_dim, config.hidden_size, config.head_size
    q, kv = config.num_heads * D, (config.num_kv_heads or config.num_heads) * D
    places = {"tokens.weight": Place({"model.embed_tokens.weight": (config.vocab_size, E)})}
    layers = {"attention.qkv": ({"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}, E),
              "attention.out": ({"self_attn.o_proj": E}, q), "mlp.gate": ({"mlp.gate_proj": hidden}, E),
              "mlp.up": ({"mlp.up_proj": hidden}, E), "mlp.down": ({"mlp.down_proj": E}, hidden)}  # fmt: skip
    for i in range(config.num_layers):
        lead = f"model.layers.{i}."
        for own, (outputs, inputs) in layers.items():
            weights = {f"{lead}{name}.weight": (count, inputs) for name, count in outputs.items()}
            places[f"blocks.{i}.{own}.weight"] = Place(weights)
            if config.bias:
                held = entries is None or entries.get(f"{own.partition('.')[0]}_bias", False)
                biases = {f"{lead}{name}.bias": (count,) for name, count in outputs.items()}
                places[f"blocks.{i}.{own}.bias"] = Place(biases if held else {})
        for own, name in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
            places[f"blocks.{i}.{own}.weight"] = Place({f"{lead}{name}.weight": (E,)})
    places["norm.weight"] = Place({"model.norm.weight": (E,)})
    if not config.tie_weights:
        places["head.weight"] = Place({HEAD: (config.vocab_size, E)})
    return places


class Family(NamedTuple):
    """One of Hugging Face's architectures.

    Attributes:
        title: its name.
        prefix: what its tensors' names begin with in a model with a head, and do not in one without.
        config, entries, places: see `from_gpt2`, `gpt2_entries` and `gpt2_places`.
        ignored: the names of buffers that older files have, and that hold nothing that was learnt.
        refusal: which fields of a configuration it cannot express, and what they would have to be.
    """

    title: str
    prefix: str
    config: Callable[[Entries, float | None], GPTConfig]
    entries: Callable[[GPTConfig], dict[str, Any]]
    places: Callable[..., dict[str, Place]]
    ignored: re.Pattern
    refusal: Callable[[GPTConfig], list[str]]


def unlike(config: GPTConfig, **needed: Any) -> list[str]:
    """Which fields differ from what is needed (a tuple: one of several values), in words."""
    words = []
    for name, values in needed.items():
        values, found = values if isinstance(values, tuple) else (values,), getattr(config, name)
        if found not in values:
            words.append(f"{name} is {found!r}, not {' or '.join(map(repr, values))}")
    for name, divisor in (("embed_dim", "num_heads"), ("num_heads", "num_kv_heads")):
        whole, part = getattr(config, name), getattr(config, divisor) or 1
        if whole % part:
            words.append(f"{name} is {whole}, not a multiple of {divisor}, {part}")
    return words


def gpt2_refusal(config: GPTConfig) -> list[str]:
    return unlike(config, positions="learned", norm="layer", mlp=tuple(dict.fromkeys(GPT2_ACTIVATIONS.values())),
                  num_kv_heads=(None, config.num_heads), head_dim=(None, config.embed_dim // config.num_heads),
                  norm_first=True)  # fmt: skip


def llama_refusal(config: GPTConfig) -> list[str]:
    return unlike(config, positions="rotary", norm="rms", mlp="swiglu", norm_first=True)


FAMILIES = {
    "gpt2": Family("GPT-2", "transformer.", from_gpt2, gpt2_entries, gpt2_places,
                   re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias"), gpt2_refusal),
    "llama": Family("Llama", "model.", from_llama, llama_entries, llama_places,
                    re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"), llama_refusal),
}  # fmt: skip

# -- reading -----------------------------------------------------------------------------------------------------------

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
NEXT = ".config.json.next"  # where a new configuration waits for the weights that it belongs to
CONFIG_SUM = "tinytorch.config.sha256"  # in the weights' metadata: which configuration that is
FLOATS = ("F16", "BF16", "F32", "F64")


def from_pretrained(
    cls: type[GPT], folder: str | os.PathLike, device: str | None = None, dtype: str | None = None, *,
    dropout: float | None = None,
) -> GPT:  # fmt: skip
    """The model that a folder of Hugging Face's `transformers`, or `save_pretrained`, holds; in eval mode.

    The folder has config.json (`model_type` gpt2 or llama) and model.safetensors, or several such files and
    model.safetensors.index.json. Numbers are read from the files straight into the model's memory. Where Llama's
    attention has biases and its MLP none, or the other way round, ours has both, and the others start as zeros.

    Args:
        device, dtype: of the model; the defaults if not given, whatever dtype the files have.
        dropout: the rate for further training. Needed where the file's rates differ from each other.

    Raises:
        FileNotFoundError: the folder or files in it are missing; all of them are listed.
        ValueError: a file is damaged; or, listed all at once, what the configuration has that GPT has not, and which
            tensors are missing, unexpected, or of a wrong shape.
    """
    folder = Path(folder)
    files = weight_files(folder)
    entries = read_config(folder, files[0])
    family, config = understood(folder, entries, dropout)
    places = family.places(config, entries)
    found = checked_tensors(folder, files, family, places)
    if entries.get(OWN, {}).get("bias") is False:  # unless another program has trained them since
        biases = [piece for name, place in places.items() if name.endswith(".bias") for piece in place.pieces]
        config = replace(config, bias=any(values_of(found[name]).any() for name in biases))
    model = unset_model(cls, config)
    model.to(device=device or get_default_device(), dtype=dtype or get_default_dtype())
    for own, x in model._state():
        fill(x, places[own], found)
    model.eval()
    return model


def unset_model(cls: type[GPT], config: GPTConfig) -> GPT:
    """A model that is going to be filled: initial values, which take longer to draw than to read, are left out."""
    unset = type(cls.__name__, (cls,), {"reset_parameters": lambda self: None})
    with get_backend(get_default_device()).seeded(0):  # what layers draw is overwritten: take nobody's random numbers
        model = unset(config)
    model.__class__ = cls
    return model


def weight_files(folder: Path) -> list[Path]:
    """The files that the weights lie in.

    Raises:
        FileNotFoundError: with all that is missing in the folder, and what is there instead.
    """
    hint = "nothing is downloaded here: fetch the files (huggingface.co has them) and name the folder they are in"
    if not folder.is_dir():
        raise FileNotFoundError(f"GPT.from_pretrained: there is no folder {str(folder)!r}; {hint}")
    missing, files = [], [folder / WEIGHTS]
    if not (folder / CONFIG).is_file() and not (folder / NEXT).is_file():
        missing.append(CONFIG)
    if not files[0].is_file() and (folder / INDEX).is_file():
        files = [folder / name for name in shards(folder / INDEX)]
        missing += [file.name for file in files if not file.is_file()]
    elif not files[0].is_file():
        missing.append(f"{WEIGHTS} (or {INDEX} and the files that it names)")
    if missing:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles and files == [folder / WEIGHTS]:
            hint = (f"{', '.join(pickles)} would be pickles, which can run any code and are never read here; where you "
                    "trust them, AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) of transformers makes "
                    "safetensors of them")  # fmt: skip
        raise FileNotFoundError(f"GPT.from_pretrained: {folder} lacks {', '.join(missing)}; {hint}")
    return files


def shards(index: Path) -> list[str]:
    """The names of the files that an index refers to."""
    places = read_json(index).get("weight_map")
    files = list(places.values()) if isinstance(places, dict) else []
    if not files or any(not isinstance(name, str) or Path(name).name != name for name in files):
        raise ValueError(f"GPT.from_pretrained: {index} names no files of its folder in weight_map")
    return sorted(set(files))


def read_json(path: Path, content: bytes | None = None) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_bytes() if content is None else content)
    except ValueError as error:
        raise ValueError(f"GPT.from_pretrained: {path} is not JSON ({error})") from None
    if not isinstance(entries, dict):
        raise ValueError(f"GPT.from_pretrained: {path} holds {type(entries).__name__}, not an object")
    return entries


def read_config(folder: Path, weights: Path) -> Entries:
    """The configuration that belongs to the weights.

    Where `save_pretrained` was cut off between its two files, that is the one which waits for its name.
    """
    stated = opened(weights)[0].get("__metadata__", {}).get(CONFIG_SUM)
    content = {p: p.read_bytes() for p in (folder / CONFIG, folder / NEXT) if p.is_file()}
    belongs = [p for p in content if hashlib.sha256(content[p]).hexdigest() == stated]
    path = belongs[0] if belongs else folder / CONFIG
    if path not in content:
        raise FileNotFoundError(f"GPT.from_pretrained: {folder} lacks {CONFIG}")
    return Entries(read_json(path, content[path]))


def understood(folder: Path, entries: Entries, dropout: float | None) -> tuple[Family, GPTConfig]:
    """Whose configuration it is, and what it is in our words; ValueError with everything in it that we do not have."""
    kind, quantized = entries.get("model_type"), entries.get("quantization_config")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"GPT.from_pretrained: {folder} holds a model of type {kind!r}; known: {', '.join(FAMILIES)}")
    if not isinstance(entries.get(OWN, {}), dict):
        raise ValueError(f"GPT.from_pretrained: {folder / CONFIG}: {OWN} is {entries.get(OWN)!r}, expected an object")
    if quantized is not None:
        entries.problems.append("quantization_config: the weights are quantized")
    config = FAMILIES[kind].config(entries, dropout)
    if problems := entries.problems + FAMILIES[kind].refusal(config):
        listed = "\n  ".join(problems)
        raise ValueError(f"GPT.from_pretrained: {folder / CONFIG} describes a model that GPT cannot be:\n  {listed}")
    return FAMILIES[kind], config


def opened(path: Path) -> tuple[dict, memoryview]:
    """(header, numbers) of a safetensors file; the numbers are mapped into memory, and read when they are used."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # examines the header, and whether the file is as long as it says
            pass
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"GPT.from_pretrained: {path} is not a safetensors file, or damaged ({reason})") from None
    with open(path, "rb") as file:
        header, payload = _split(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # type: ignore[arg-type]
    return header, payload


def stored_tensors(path: Path) -> dict[str, dict[str, Any]]:
    """A file's tensors by name: the dtype's code, the shape, and the numbers, mapped into memory.

    Raises:
        ValueError: the file is damaged, or was altered after we wrote it.
    """
    header, payload = opened(path)
    stated = header.get("__metadata__", {}).pop(CHECKSUM, None)
    if stated is not None and stated != _checksum(header, payload):
        raise ValueError(f"GPT.from_pretrained: {path}: its checksum is wrong: it was altered after it was saved")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for entry in tensors.values():
        begin, end = entry["data_offsets"]
        entry.update(shape=tuple(entry["shape"]), data=payload[begin:end])
    return tensors


def checked_tensors(folder: Path, files: list[Path], family: Family, places: Mapping[str, Place]) -> dict[str, dict]:
    """The files' tensors by name, exactly those that the places name; otherwise ValueError, with all that is wrong."""
    found, shown = with_prefix({n: x for file in files for n, x in stored_tensors(file).items()}, family)
    if "head.weight" not in places and HEAD in found:  # the embedding again; one of the two may be left out
        head = found.pop(HEAD)
        found.setdefault(next(iter(places["tokens.weight"].pieces)), head)
    expected = {name: shape for place in places.values() for name, shape in place.pieces.items()}
    found = {name: x for name, x in found.items() if name in expected or not family.ignored.fullmatch(name)}
    what = f"GPT.from_pretrained: {folder} holds no {family.title} that fits its {CONFIG}"
    check_tensors(what, expected, found, shown)
    return found


def with_prefix(found: dict, family: Family) -> tuple[dict, Callable[[str], str]]:
    """The tensors under the names that they have in a model with a head, and how the file writes such a name."""
    prefix = family.prefix
    if not found or any(name.startswith(prefix) for name in found):
        return found, str
    named = {name if name == HEAD else prefix + name: x for name, x in found.items()}
    return named, lambda name: name.removeprefix(prefix)


def check_tensors(what: str, expected: Mapping, found: Mapping, shown: Callable[[str], str] = str) -> None:
    """ValueError that begins with `what` and lists all that is missing, unexpected, or not what is expected."""
    wrong = []
    for name in (name for name in found if name in expected):
        shape, code = found[name]["shape"], found[name]["dtype"]
        if shape != expected[name]:
            wrong.append(f"{shown(name)} {shape}, expected {expected[name]}")
        elif code not in FLOATS:
            wrong.append(f"{shown(name)} of dtype {code}, expected one of {', '.join(FLOATS)}")
    kinds = {
        "missing": [f"{shown(name)} {shape}" for name, shape in expected.items() if name not in found],
        "unexpected": [f"{shown(name)} {x['shape']}" for name, x in found.items() if name not in expected],
        "wrong": wrong,
    }
    lines = [f"\n  {kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    if lines:
        raise ValueError(f"{what}:{''.join(lines)}")


def values_of(entry: dict[str, Any]) -> Any:
    """A stored tensor as a NumPy array, which shares the mapped memory where its dtype allows."""
    return _decode("", entry)


def fill(x: Tensor, place: Place, found: Mapping[str, dict]) -> None:
    """Write what the files have in a tensor's place into its memory."""
    xp = backend_of(x.data)
    if not place.pieces:
        overwrite(x, 0)
    for name, rows in place.rows():
        values = values_of(found[name])
        _write(x.data, rows, xp.from_numpy(values.T if place.transposed else values))
    Writes.note(x.data)


# -- writing -----------------------------------------------------------------------------------------------------------


def save_pretrained(self: GPT, folder: str | os.PathLike, **entries: Any) -> None:
    """Write config.json and model.safetensors, which `from_pretrained` and Hugging Face's `transformers` read.

    A model with learned positions is written as GPT-2's, one with rotary positions as Llama's. Where GPT-2's files have
    biases and the model none, they are zeros, and config.json remembers it. Whenever the program dies, the folder holds
    the old model or the new one.

    Args:
        entries: further entries of config.json, such as `eos_token_id`.

    Raises:
        ValueError: neither format can express the model; with the fields or tensors that it has no place for.
    """
    folder, family = Path(folder), family_of(self.config)
    places, state = family.places(self.config), self.state_dict()
    stored = dict(file_tensors(state, places))
    written = {**family.entries(self.config), "torch_dtype": str(state["tokens.weight"].dtype),
               "bos_token_id": None, "eos_token_id": None, **entries}  # fmt: skip
    content = (json.dumps(written, indent=2) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    # The weights say which configuration is theirs, and it is there before they are. So between the two files' new
    # names, too, the right one is found.
    atomic_write(folder / NEXT, content)
    save(stored, folder / WEIGHTS, {CONFIG_SUM: hashlib.sha256(content).hexdigest()})
    os.replace(folder / NEXT, folder / CONFIG)


def family_of(config: GPTConfig) -> Family:
    """Whose format can hold a model; ValueError that says why none can."""
    refusals = {family: family.refusal(config) for family in FAMILIES.values()}
    for family, words in refusals.items():
        if not words:
            return family
    listed = "\n  ".join(f"{family.title}'s: {', '.join(words)}" for family, words in refusals.items())
    raise ValueError(f"save_pretrained: no format of Hugging Face's can hold this model:\n  {listed}")


def file_tensors(state: Mapping[str, Tensor], places: Mapping[str, Place]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that the files hold; ValueError if that is not what the model has."""
    found = {name: {"shape": x.shape, "dtype": "F32"} for name, x in state.items()}
    expected = {n: place.shape() for n, place in places.items() if n in state or not n.endswith(".bias")}
    check_tensors("save_pretrained: the model's tensors are not those of its config", expected, found)
    like = state["tokens.weight"]
    for own, place in places.items():
        for name, rows in place.rows():
            if own in state:
                part = state[own][rows]
                yield name, part.T if place.transposed else part
            else:
                yield name, full(place.pieces[name], 0.0, dtype=like.dtype, device=like.device)


GPT.extend_class(from_pretrained=classmethod(from_pretrained), save_pretrained=save_pretrained)


# -- PyTorch's transformer layers --------------------------------------------------------------------------------------

ACTIVATIONS = {"relu": relu, "gelu": gelu}


class TransformerLayer(Module):
    """What the encoder's and the decoder's layers share: attentions, then two linear layers, each added to its input.

    Every part is a *residual*: with `norm_first`, x + part(norm(x)), otherwise norm(x + part(x)).
    """

    ATTENTIONS: tuple[str, ...] = ("self_attn",)

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = relu, layer_norm_eps: float = 1e-5, batch_first: bool = False,
        norm_first: bool = False, bias: bool = True, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            known = " or ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"{type(self).__name__}: activation must be {known} or a function, got {activation!r}")
        where, own = {"device": device, "dtype": dtype}, self.ATTENTIONS
        for name in own:
            attention = MultiheadAttention(d_model, nhead, dropout=dropout, bias=bias, batch_first=batch_first, **where)
            self.add_module(name, attention)
        self.linear1 = Linear(d_model, dim_feedforward, bias=bias, **where)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias=bias, **where)
        self.norm_first = norm_first
        for number in range(1, len(own) + 2):
            self.add_module(f"norm{number}", LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where))
        for number in range(1, len(own) + 2):
            self.add_module(f"dropout{number}", Dropout(dropout))
        self.activation = ACTIVATIONS[activation] if isinstance(activation, str) else activation

    def residual(self, x: Tensor, number: int, part: Callable[[Tensor], Tensor]) -> Tensor:
        """x and what a part adds to it, by the norm and the dropout of this number."""
        norm, dropout = getattr(self, f"norm{number}"), getattr(self, f"dropout{number}")
        return x + dropout(part(norm(x))) if self.norm_first else norm(x + dropout(part(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


def attend(
    attention: Module, x: Tensor, memory: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
) -> Tensor:
    """Attention of x to `memory`, without the weights."""
    return attention(
        x, memory, memory, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal
    )[0]


class TransformerEncoderLayer(TransformerLayer):
    """Self-attention, then two linear layers: (L, N, d_model), with `batch_first` (N, L, d_model), or (L, d_model).

    Args:
        d_model, nhead: the width, and how many heads share it.
        dim_feedforward: the width between the two linear layers.
        activation: there: "relu", "gelu" or a function.
        norm_first: whether a norm stands before each part, or behind the sum.
    """

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """Masks are those of MultiheadAttention; `is_causal` says that `src_mask` is the causal one."""
        x = self.residual(src, 1, lambda x: attend(self.self_attn, x, x, src_mask, src_key_padding_mask, is_causal))
        return self.residual(x, 2, self.feed_forward)


class TransformerDecoderLayer(TransformerLayer):
    """Self-attention, attention to the encoder's output, then two linear layers. See TransformerEncoderLayer."""

    ATTENTIONS = ("self_attn", "multihead_attn")

    def forward(
        self, tgt: Tensor, memory: Tensor, tgt_mask: Tensor | None = None, memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None, memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False, memory_is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        def to_itself(x: Tensor) -> Tensor:
            return attend(self.self_attn, x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def to_memory(x: Tensor) -> Tensor:
            return attend(self.multihead_attn, x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

        x = self.residual(self.residual(tgt, 1, to_itself), 2, to_memory)
        return self.residual(x, 3, self.feed_forward)


class TransformerEncoder(Module):
    """`num_layers` copies of a layer, one after the other, and a norm, if one is given.

    The copies start with the same weights; `enable_nested_tensor` and `mask_check` are PyTorch's, and change nothing.
    """

    def __init__(
        self, encoder_layer: Module, num_layers: int, norm: Module | None = None, enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layers = ModuleList(copy.deepcopy(encoder_layer) for _ in range(num_layers))
        self.num_layers, self.norm = num_layers, norm

    def forward(
        self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:  # fmt: skip
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(Module):
    """`num_layers` copies of a layer, one after the other, and a norm, if one is given. See TransformerEncoder."""

    def __init__(self, decoder_layer: Module, num_layers: int, norm: Module | None = None) -> None:
        super().__init__()
        self.layers = ModuleList(copy.deepcopy(decoder_layer) for _ in range(num_layers))
        self.num_layers, self.norm = num_layers, norm

    def forward(
        self, tgt: Tensor, memory: Tensor, tgt_mask: Tensor | None = None, memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None, memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None, memory_is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        x = tgt
        for layer in self.layers:
            x = layer(
                x, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                bool(tgt_is_causal), memory_is_causal,
            )  # fmt: skip
        return x if self.norm is None else self.norm(x)


class Transformer(Module):
    """An encoder and a decoder that attends to its output, of the paper's sizes. Weights start as Xavier's uniform.

    Args:
        custom_encoder, custom_decoder: modules to stand in the places of ours.
    """

    def __init__(
        self, d_model: int = 512, nhead: int = 8, num_encoder_layers: int = 6, num_decoder_layers: int = 6,
        dim_feedforward: int = 2048, dropout: float = 0.1, activation: str | Callable[[Tensor], Tensor] = relu,
        custom_encoder: Module | None = None, custom_decoder: Module | None = None, layer_norm_eps: float = 1e-5,
        batch_first: bool = False, norm_first: bool = False, bias: bool = True, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        where = {"device": device, "dtype": dtype}
        options = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)

        def norm() -> LayerNorm:
            return LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where)

        self.encoder = custom_encoder or TransformerEncoder(
            TransformerEncoderLayer(*options, **where), num_encoder_layers, norm()
        )
        self.decoder = custom_decoder or TransformerDecoder(
            TransformerDecoderLayer(*options, **where), num_decoder_layers, norm()
        )
        for parameter in self.parameters():
            if parameter.ndim > 1:
                xavier_uniform_(parameter)
        self.d_model, self.nhead, self.batch_first = d_model, nhead, batch_first

    def forward(
        self, src: Tensor, tgt: Tensor, src_mask: Tensor | None = None, tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None, memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None, tgt_is_causal: bool | None = None, memory_is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """(S, N, d_model) and (T, N, d_model) give (T, N, d_model); with `batch_first`, N comes first."""
        self._check(src, tgt)
        memory = self.encoder(src, src_mask, src_key_padding_mask, src_is_causal)
        return self.decoder(
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
            memory_is_causal,
        )  # fmt: skip

    def _check(self, src: Tensor, tgt: Tensor) -> None:
        batch = 0 if self.batch_first else 1
        if src.ndim != tgt.ndim or src.ndim not in (2, 3) or (src.ndim == 3 and src.shape[batch] != tgt.shape[batch]):
            raise ValueError(f"Transformer: src {src.shape} and tgt {tgt.shape} need the same batch (axis {batch})")
        if src.shape[-1] != self.d_model or tgt.shape[-1] != self.d_model:
            raise ValueError(f"Transformer: src {src.shape} and tgt {tgt.shape} need a last axis of {self.d_model}")

    @staticmethod
    def generate_square_subsequent_mask(sz: int, device: Any = None, dtype: Any = None) -> Tensor:
        """The causal mask to be added to scores: 0 at and below the diagonal, -inf above it."""
        return triu(full((sz, sz), float("-inf"), dtype=dtype, device=device), 1)
