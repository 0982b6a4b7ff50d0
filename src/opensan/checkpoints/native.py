"""Read and write this package's checkpoints: a folder with model.safetensors and config.json, exactly matched."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opensan.checkpoints.official import check_finite, check_keys
from opensan.config import CONFIG_NAME, EXPORT_NAME, TOKENIZER_NAME, ModelConfig, read_config
from opensan.errors import UserError
from opensan.files import atomic_path, atomic_paths, check_regular
from opensan.model import SAN, build_san
from opensan.model.mapped import forgetting

WEIGHTS_NAME = "model.safetensors"


class _LeftEmpty(TorchFunctionMode):
    """Skip random initialization of meta tensors: it changes nothing, yet torch would import its compiler (1 s)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def build_empty(config: ModelConfig) -> SAN:
    """Build a SAN whose parameters have shapes but no memory: for tables, counts, and for `fill`."""
    with torch.device("meta"), _LeftEmpty():
        return build_san(config)


def fill(config: ModelConfig, state: Mapping[str, Tensor], source: str) -> SAN:
    """Build a SAN from `state` (our names). Raises UserError naming missing, unknown or wrong tensors."""
    model = build_empty(config)
    expected = model.state_dict()
    check_keys(expected.keys(), state.keys(), source)
    for name, tensor in expected.items():
        tensor_in_file = state[name]
        if tensor_in_file.shape != tensor.shape:
            raise UserError(
                f"{source}: {name} has shape {tuple(tensor_in_file.shape)}, config.json asks for {tuple(tensor.shape)}"
            )
        if tensor_in_file.is_floating_point() != tensor.is_floating_point():
            kind = "floating-point" if tensor.is_floating_point() else "whole"
            raise UserError(f"{source}: {name} holds {tensor_in_file.dtype}, not {kind} numbers")
    # Weights may be stored in half precision to save space; computation is in float32.
    full, forget = {}, forgetting()
    for name, tensor in state.items():
        full[name] = tensor.to(expected[name].dtype)
        check_finite({name: full[name]}, source)
        forget(tensor)
    if any(buffer.is_meta for name, buffer in model.named_buffers() if name not in expected):
        with torch.random.fork_rng(devices=[]):
            model = build_san(config)  # constants, such as rotary angles, are in no file, and only made by building
    model.load_state_dict(full, strict=True, assign=True)
    return model


def load_folder(folder: Path, weights: Path | None = None) -> SAN:
    """Load `folder`/config.json with `weights` (default: `folder`/model.safetensors). Raises ValueError, one line."""
    if weights is None and (folder / EXPORT_NAME).exists():
        raise UserError(
            f"{folder}: an exported model, which `opensan segment`, `serve`, `ui` and opensan.load run; "
            "this needs the model that it was made from"
        )
    weights = weights or folder / WEIGHTS_NAME
    for path in (folder / CONFIG_NAME, weights):
        check_regular(path)
    config = read_config(folder / CONFIG_NAME)
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: not a readable safetensors file ({error})") from None
    model = fill(config, state, str(weights))
    if config.clip.text.own_tokenizer:
        model.tokenizer = read_tokenizer(folder / TOKENIZER_NAME)
    return model


def read_tokenizer(path: Path) -> bytes:
    """Read a tokenizer.json. Raises UserError, one line, if it can't be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: this model's text tower needs its own tokenizer beside the weights ({error.strerror or error})"
        ) from None


def save_folder(model: SAN, folder: str | os.PathLike, dtype: torch.dtype = torch.float32) -> Path:
    """Write `model` to `folder`, the weights stored as `dtype`. Returns the folder.

    An existing model is replaced when the new one is on disk. If the process is killed meanwhile, there may remain
    a folder without configuration, but never one model's weights with another's configuration.
    Raises OSError with the file's name when it cannot be written; the old ones are then still there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in model.state_dict().items()
    }
    if model.tokenizer is not None:
        with atomic_path(folder / TOKENIZER_NAME) as path:
            path.write_bytes(model.tokenizer)
    with atomic_paths(folder / WEIGHTS_NAME, folder / CONFIG_NAME) as (weights, config):
        save_file(state, weights)
        config.write_text(model.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return folder
