"""Build a SAN around an encoder's own weights, as open_clip or transformers distribute them, for training."""

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
from opensan.checkpoints.native import read_tokenizer
from opensan.checkpoints.official import check_finite, check_keys
from opensan.checkpoints.pickles import read_pickle
from opensan.checkpoints.presets import PRESETS
from opensan.config import TOKENIZER_NAME, AnyClipConfig, ModelConfig
from opensan.errors import UserError
from opensan.model import SAN, build_san
from opensan.model.backbones import build_backbone

_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
_CONFIG = "open_clip_config.json"

_NO_WEIGHTS = {
    "input_resolution",
    "context_length",
    "vocab_size",
    "attn_mask",
    "text_model.embeddings.position_ids",
    "text_model.embeddings.token_type_ids",
}
"""Constants that files of open_clip and transformers may hold besides the weights."""


def san_around_clip(config: ModelConfig, source: str | os.PathLike, *, seed: int = 0) -> SAN:
    """Build a SAN whose backbone has the weights in `source`; all else is random, from `seed`.

    Args:
        config: the model; its backbone's shapes and activation must be those of the weights.
        source: "openai", a hub id "owner/name", or a file (.safetensors, .bin, .pt) or folder of the library that the
            kind of backbone comes from: open_clip, for ALIGN transformers. Its tokenizer.json, if the text tower needs
            one, lies beside it.
        seed: seed of the side adapter and the no-object embedding.

    Raises:
        ValueError: no such weights, or not this CLIP's; one line, naming what differs.
        HubError: the hub did not provide the file.
    """
    path = _weights_path(source, config)
    state = _checked(_read(path), config.clip, str(path))
    if source != "openai":  # OpenAI's activation is known
        _check_activation(path.with_name(_CONFIG), config.clip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_san(config)
    model.clip.load_state_dict(state, strict=True)
    if config.clip.text.own_tokenizer:
        model.tokenizer = read_tokenizer(path.with_name(TOKENIZER_NAME))
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
        same = [preset.encoder_weights for preset in PRESETS.values() if preset.config.clip == config.clip]
        for repository in same:
            if repository.endswith(".openai"):
                return _from_hub(repository, config)
        instead = f"give start.clip={same[0]}, or a file" if same else "give a file or folder of open_clip"
        raise UserError(f"OpenAI has no CLIP of the shape of {config.name}: {instead}")
    if HUB_ID.fullmatch(name) and not re.search(r"\.(pt|bin|pth|safetensors)$", name):
        return _from_hub(name, config)
    raise UserError(f"no CLIP weights {name!r}: openai, a hub id owner/name, or a file or folder of open_clip")


def _from_hub(repository: str, config: ModelConfig) -> Path:
    weights = _WEIGHTS[2] if config.clip.kind == "align" else _WEIGHTS[0]
    advice = f"download {weights} of {repository} elsewhere and give its path as start.clip"
    if config.clip.kind != "align":
        download(repository, repository, _CONFIG, advice)
    if config.clip.text.own_tokenizer:
        download(repository, repository, TOKENIZER_NAME, advice)
    return download(repository, repository, weights, advice)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return read_pickle(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _checked(state: Mapping[str, Tensor], config: AnyClipConfig, source: str) -> dict[str, Tensor]:
    """Return `state` in float32, under our names. Raises UserError unless it holds exactly this backbone's tensors."""
    with torch.device("meta"):
        backbone = build_backbone(config)
    # Files name what a library's model holds; ours may hold the library's model under a name of its own.
    expected = {name.removeprefix(backbone.file_prefix): tensor for name, tensor in backbone.state_dict().items()}
    tensors = {name: tensor for name, tensor in state.items() if name not in _NO_WEIGHTS}
    for name, tensor in expected.items():  # a counter of training steps, which older files lack
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, torch.zeros((), dtype=tensor.dtype))
    check_keys(expected, tensors, source)
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise UserError(f"{source}: {name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
    full = {backbone.file_prefix + name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    check_finite(full, source)
    return full


def _check_activation(path: Path, config: AnyClipConfig) -> None:
    """Compare the GELU with the configuration beside the file, if there is one: a wrong GELU shows no error."""
    if not path.is_file():
        return
    ours = getattr(config, "quick_gelu", False)
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))["model_cfg"].get("quick_gelu", False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a configuration of open_clip ({error})") from None
    if bool(stated) != ours:
        raise UserError(f"{path}: quick_gelu is {stated} there, the model's configuration says {ours}")
