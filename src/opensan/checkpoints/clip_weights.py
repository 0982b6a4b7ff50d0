"""Build a SAN around CLIP's own weights, as open_clip distributes them, for training."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from opensan.checkpoints.hub import HUB_ID, download
from opensan.checkpoints.official import check_finite, check_keys
from opensan.checkpoints.pickles import read_pickle
from opensan.config import PRESETS, ClipConfig, ModelConfig
from opensan.errors import UserError
from opensan.model import SAN, build_san
from opensan.model.backbones.clip_vit import ClipModel

OPENAI_REPOSITORIES = {
    "san-vit-b16": "timm/vit_base_patch16_clip_224.openai",
    "san-vit-l14": "timm/vit_large_patch14_clip_336.openai",
}
"""Hub repositories in which open_clip keeps OpenAI's weights of the presets' CLIPs."""

_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
_CONFIG = "open_clip_config.json"

_NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask"}
"""Constants that files of open_clip may hold besides the weights."""


def san_around_clip(config: ModelConfig, source: str | os.PathLike, *, seed: int = 0) -> SAN:
    """Build a SAN whose CLIP has the weights in `source`; all else is random, from `seed`.

    Args:
        config: the model; its CLIP's shapes and activation must be those of the weights.
        source: "openai", a hub id "owner/name", or open_clip's file (.safetensors, .bin, .pt) or folder.
        seed: seed of the side adapter and the no-object embedding.

    Raises:
        ValueError: no such weights, or not this CLIP's; one line, naming what differs.
        HubError: the hub did not provide the file.
    """
    if not isinstance(config.clip, ClipConfig):
        raise UserError(f"{config.name}: weights of open_clip are read for a CLIP of two plain towers only")
    path = _weights_path(source, config)
    state = _checked(_read(path), config.clip, str(path))
    if source != "openai":  # OpenAI's activation is known
        _check_activation(path.with_name(_CONFIG), config.clip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_san(config)
    model.clip.load_state_dict(state, strict=True)
    return model


def _weights_path(source: str | os.PathLike, config: ModelConfig) -> Path:
    path = Path(source).expanduser()
    name = os.fspath(source)
    if path.is_file():
        return path
    if path.is_dir():
        for candidate in _WEIGHTS:
            if (path / candidate).is_file():
                return path / candidate
        raise UserError(f"{path}: holds no CLIP weights of open_clip (looked for {', '.join(_WEIGHTS)})")
    if name == "openai":
        for preset, repository in OPENAI_REPOSITORIES.items():
            if PRESETS[preset].clip == config.clip:
                return _from_hub(repository)
        raise UserError(f"OpenAI has no CLIP of the shape of {config.name}: give a file or folder of open_clip")
    if HUB_ID.fullmatch(name) and not re.search(r"\.(pt|bin|pth|safetensors)$", name):
        return _from_hub(name)
    raise UserError(f"no CLIP weights {name!r}: openai, a hub id owner/name, or a file or folder of open_clip")


def _from_hub(repository: str) -> Path:
    advice = f"download {_WEIGHTS[0]} of {repository} elsewhere and give its path as start.clip"
    download(repository, repository, _CONFIG, advice)
    return download(repository, repository, _WEIGHTS[0], advice)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return read_pickle(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _checked(state: Mapping[str, Tensor], config: ClipConfig, source: str) -> dict[str, Tensor]:
    """Return `state` in float32. Raises UserError unless it holds exactly this CLIP's tensors."""
    with torch.device("meta"):
        expected = ClipModel(config).state_dict()
    found = {name: tensor for name, tensor in state.items() if name not in _NO_WEIGHTS}
    check_keys(expected, found, source)
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise UserError(f"{source}: {name} has shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}")
    full = {name: tensor.float() for name, tensor in found.items()}
    check_finite(full, source)
    return full


def _check_activation(path: Path, config: ClipConfig) -> None:
    """Compare the GELU with the configuration beside the file, if there is one: a wrong GELU shows no error."""
    if not path.is_file():
        return
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))["model_cfg"].get("quick_gelu", False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a configuration of open_clip ({error})") from None
    if bool(stated) != config.quick_gelu:
        raise UserError(f"{path}: quick_gelu is {stated} there, the model's configuration says {config.quick_gelu}")
