"""Reading the official .pth files, which are pickles, without letting them execute anything."""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from opensan.checkpoints.folder import build_empty, fill
from opensan.checkpoints.official import from_official, official_name, official_shape
from opensan.config import PRESETS, ModelConfig
from opensan.model import SAN


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of an official checkpoint, by official name.

    Raises:
        ValueError: the file is no torch file, asks to run code, or holds no tensors under `model`.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: refused, it holds more than weights and nothing of it was run ({reason})") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: not a readable PyTorch checkpoint ({str(error).splitlines()[0]})") from None
    state = data.get("model", data) if isinstance(data, dict) else None
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no model weights (expected tensors by name, under 'model' or at the top)")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _is_zip(path: Path) -> bool:
    """Only torch's newer, zip-based format can be memory-mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def load_official(path: Path, config: ModelConfig | None = None) -> SAN:
    """Load an official .pth. Without `config`, the preset whose tensors have exactly these shapes is meant.

    Raises:
        ValueError: unreadable, or naming missing and surplus keys and wrong shapes.
    """
    state = read_pickle(path)
    config = config or _matching_preset(state)
    shapes = {name: tensor.shape for name, tensor in build_empty(config).state_dict().items()}
    return fill(config, from_official(state, config, shapes, str(path)), str(path))


def _matching_preset(state: dict[str, Tensor]) -> ModelConfig:
    """The preset most of whose tensors are found with their shapes; the load that follows is strict."""

    def agreement(config: ModelConfig) -> int:
        names = {name: tensor.shape for name, tensor in build_empty(config).state_dict().items()}
        wanted = {official_name(name, config): official_shape(name, shape) for name, shape in names.items()}
        return sum(name in state and tuple(state[name].shape) == shape for name, shape in wanted.items())

    return max(PRESETS.values(), key=agreement)
