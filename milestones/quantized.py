"""The file of a quantized network: its state, and in the metadata what the float network was."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tinytorch import Tensor, load, nn, save
from tinytorch.milestones.program import UsageError

FILE = "quantized.safetensors"
ABOUT = "tinytorch.network"  # of the metadata


def write_quantized(folder: Path, model: nn.Module, about: dict[str, Any]) -> Path:
    """Save a quantized network with what is needed to build the float network that it was made of."""
    folder.mkdir(parents=True, exist_ok=True)
    save(model.state_dict(), folder / FILE, {ABOUT: json.dumps(about)})
    return folder / FILE


def bytes_on_disk(model: nn.Module) -> int:
    """How large the file of a network's state is."""
    with tempfile.TemporaryDirectory() as folder:
        save(model.state_dict(), file := Path(folder, "model.safetensors"))
        return file.stat().st_size


def read_quantized(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state and what was said about the network; UsageError if the file is damaged or of another kind."""
    try:
        state = load(folder / FILE)
        return state, json.loads(state.metadata[ABOUT])
    except ValueError as error:
        raise UsageError(str(error)) from error
    except KeyError:
        raise UsageError(f"{folder / FILE} was not written by tinytorch quantize") from None
