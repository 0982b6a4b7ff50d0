"""Read goldens: recorded inputs and outputs of the official code, and the model that made them.

A golden holds no weights: a rule fills each parameter from its OFFICIAL name and shape, so a golden's model is loaded
through the same table as a released checkpoint, which tests that table too. The rule and the file format are fixed
by the recorded files.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch

from opensan.checkpoints import build_empty, fill
from opensan.checkpoints.official import from_official, official_name, official_shape
from opensan.checkpoints.presets import PRESETS
from opensan.config import ModelConfig, parse_config
from opensan.errors import UserError
from opensan.model import SAN

_DEVIATIONS = (
    ("class_embedding", 0.5),
    ("clip_visual_extractor.positional_embedding", 1.0),
    ("ov_classifier.positional_embedding", 0.2),
    ("pos_embed", 0.2),
    ("query_embed", 1.0),
    ("query_pos_embed", 0.5),
    ("token_embedding.weight", 1.0),
    ("bg_embed", 0.2),
)
_GAINS = (
    ("clip_visual_extractor.", ".attn.out_proj.weight", 0.3),
    ("clip_visual_extractor.", ".mlp.c_proj.weight", 0.5),
    ("clip_rec_head.", ".attn.out_proj.weight", 2.0),
    ("ov_classifier.", ".attn.in_proj_weight", 2.0),
    ("ov_classifier.", ".attn.out_proj.weight", 4.0),
    ("side_adapter_network.mask_decoder.query_mlp.", ".layers.2.weight", 0.5),
    ("side_adapter_network.mask_decoder.pix_mlp.", ".layers.2.weight", 0.25),
    ("side_adapter_network.mask_decoder.attn_mlp.", ".layers.2.weight", 0.7),
)
_SEED_SUFFIX = {"ov_classifier.text_projection": "#45"}


def golden_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 value of official parameter `name`: normal numbers seeded by its name, scaled by its kind."""
    if name.endswith("logit_scale"):
        return np.full(shape, math.log(100.0), dtype=np.float32)
    generator = np.random.default_rng(zlib.crc32((name + _SEED_SUFFIX.get(name, "")).encode()))
    normal = generator.standard_normal(shape, dtype=np.float32)
    for ending, deviation in _DEVIATIONS:
        if name == ending or name.endswith(f".{ending}"):
            return normal * np.float32(deviation)
    if name.endswith("bias_scaling.weight") or (len(shape) == 1 and name.endswith(".weight")):
        return np.float32(1.0) + np.float32(0.1) * normal
    if len(shape) == 1:
        return np.float32(0.02) * normal
    applied_from_right = name.endswith((".proj", "text_projection"))
    fan_in = shape[0] if applied_from_right else math.prod(shape[1:])
    gain = next((gain for start, end, gain in _GAINS if name.startswith(start) and name.endswith(end)), 1.0)
    return normal * np.float32(gain / math.sqrt(fan_in))


def golden_config(meta: Mapping[str, Any], source: str) -> ModelConfig:
    """Return the model that a golden's `meta` names or describes in full. Raises UserError if it can't be built."""
    if meta.get("config") is None:
        if meta["model"] not in PRESETS:
            raise UserError(f"{source}: unknown model {meta['model']!r}")
        return PRESETS[meta["model"]].config
    config = meta["config"]
    clip, side = config["clip"], config["side_adapter"]
    vision = dict(clip["vision_cfg"])
    vision["heads"] = vision["width"] // vision.pop("head_width", 64)
    described = {
        "name": meta["model"],
        "clip": {
            "embed_dim": clip["embed_dim"],
            "quick_gelu": clip["quick_gelu"],
            "vision": vision,
            "text": clip["text_cfg"],
        },
        "side_adapter": {
            **side,
            "queries": config["queries"],
            "fusion": config["fusion_side_block_to_clip_layer"],
            "supervised_blocks": config["deep_supervision_blocks"],
            "mask_channels": config["mask_channels"],
            "mlp_channels": config["mlp_channels"],
            "mlp_layers": config["mlp_layers"],
        },
        "recognition_layer": config["recognition_starts_after_clip_layer"],
        "clip_scale": config["clip_scale"],
        "image": {"size_divisor": config["size_divisor"]},
    }
    return parse_config(ModelConfig, described, source)


def golden_model(config: ModelConfig) -> SAN:
    """Return a SAN filled by the rule; it is loaded by official names, as a released checkpoint is."""
    shapes = {name: tuple(tensor.shape) for name, tensor in build_empty(config).state_dict().items()}
    official = {}
    for name, shape in shapes.items():
        theirs, their_shape = official_name(name, config), official_shape(name, shape)
        official[theirs] = torch.from_numpy(np.asarray(golden_weight(theirs, their_shape)))
    return fill(config, from_official(official, config, shapes, config.name), config.name)


def read_golden(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a golden's meta and arrays. Raises UserError if the file is not a golden."""
    arrays = read_arrays(path)
    try:
        return json.loads(str(arrays.pop("meta"))), arrays
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: not a golden file ({error})") from None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an .npz, refusing pickles. Raises UserError if the file is not a golden."""
    try:
        if path.exists() and not is_zipfile(path):  # numpy would take it for a pickle and suggest to trust it
            raise UserError("not a .npz file")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, AttributeError, BadZipFile) as error:
        raise UserError(f"{path}: not a golden file ({error})") from None
