"""Translate between our parameter names and those of official checkpoints, by a reversible table.

The released files are detectron2 pickles whose `model` holds CLIP in parts: shallow image blocks under
`clip_visual_extractor`, deep ones (counted from 0 again) under `clip_rec_head`, the text tower under `ov_classifier`.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from opensan.config import ModelConfig
from opensan.errors import UserError

BUFFERS = frozenset({"criterion.empty_weight", "ov_classifier.attn_mask"})
"""Official entries that are constants rather than weights: allowed in a file, never read."""

_SIDE = (
    ("side_adapter.query_embedding", "side_adapter_network.query_embed"),
    ("side_adapter.query_position", "side_adapter_network.query_pos_embed"),
    ("side_adapter.patch_position", "side_adapter_network.vit_model.pos_embed"),
    ("side_adapter.patch_embedding.", "side_adapter_network.vit_model.patch_embed.proj."),
    ("side_adapter.blocks.", "side_adapter_network.vit_model.blocks."),
    ("side_adapter.head.query_mlp.", "side_adapter_network.mask_decoder.query_mlp."),
    ("side_adapter.head.pixel_mlp.", "side_adapter_network.mask_decoder.pix_mlp."),
    ("side_adapter.head.attention_mlp.", "side_adapter_network.mask_decoder.attn_mlp."),
    ("side_adapter.head.bias_scale.", "side_adapter_network.mask_decoder.bias_scaling."),
    ("no_object_embedding", "ov_classifier.bg_embed"),
    ("clip.visual.ln_post.", "clip_rec_head.ln_post."),
    ("clip.visual.proj", "clip_rec_head.proj"),
    ("clip.visual.", "clip_visual_extractor."),
    ("clip.", "ov_classifier."),
)
"""Our prefix -> the official one; the first match counts. Blocks and fusion layers have their own rules."""

_BLOCK = re.compile(r"clip\.visual\.transformer\.resblocks\.(\d+)\.(.+)")
_FUSION = re.compile(r"side_adapter\.fusion\.(\d+)\.(channel_norm|projection)\.(.+)")


def official_name(name: str, config: ModelConfig) -> str:
    """Return the official state-dict key of our parameter `name`."""
    if block := _BLOCK.fullmatch(name):
        number, rest = int(block[1]), block[2]
        if number < config.recognition_layer:
            return f"clip_visual_extractor.resblocks.{number}.{rest}"
        return f"clip_rec_head.resblocks.{number - config.recognition_layer}.{rest}"
    if fusion := _FUSION.fullmatch(name):
        part = {"channel_norm": 0, "projection": 1}[fusion[2]]
        return f"side_adapter_network.fusion_layers.layer_{fusion[1]}.input_proj.{part}.{fusion[3]}"
    for ours, theirs in _SIDE:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"no official name for {name}")


def official_shape(name: str, shape: Iterable[int]) -> tuple[int, ...]:
    """Return the official shape of our parameter `name`: 1x1 convolutions for our Linear, a leading 1 on tables."""
    shape = tuple(shape)
    if name in ("side_adapter.query_embedding", "side_adapter.query_position", "side_adapter.patch_position"):
        return (1, *shape)
    convolution = ("side_adapter.head.pixel_mlp.", "side_adapter.head.attention_mlp.", "side_adapter.fusion.")
    if name.startswith(convolution) and len(shape) == 2:
        return (*shape, 1, 1)
    return shape


def to_official(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert our state dict to official names and shapes."""
    return {official_name(n, config): t.reshape(official_shape(n, t.shape)) for n, t in state.items()}


def from_official(
    state: Mapping[str, Tensor], config: ModelConfig, shapes: Mapping[str, Iterable[int]], source: str
) -> dict[str, Tensor]:
    """Convert an official state dict to our names.

    Args:
        state: official key -> tensor.
        shapes: our parameter name -> shape, of the model that `config` describes.
        source: the file, for messages.

    Raises:
        ValueError: naming the missing and surplus keys, or the first tensor of a wrong shape.
    """
    table = {official_name(name, config): name for name in shapes}
    check_keys(table.keys(), state.keys() - BUFFERS, source)
    ours = {}
    for theirs, name in table.items():
        expected = official_shape(name, shapes[name])
        if tuple(state[theirs].shape) != expected:
            raise UserError(f"{source}: {theirs} has shape {tuple(state[theirs].shape)}, the model needs {expected}")
        ours[name] = state[theirs].reshape(tuple(shapes[name]))
    return ours


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError, one line, naming the first tensor that holds NaN or infinity."""
    for name, tensor in state.items():
        # Minimum and maximum, which propagate NaN, are 20 times as fast as a test of each number.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(f"{source}: {name} holds NaN or infinity: the file is damaged, or its training diverged")


def check_keys(expected: Iterable[str], present: Iterable[str], source: str) -> None:
    """Raise UserError, one line, if the keys differ: up to five names of each kind, and their number."""
    expected, present = set(expected), set(present)
    complaints = []
    for kind, names in (("missing", sorted(expected - present)), ("unexpected", sorted(present - expected))):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            complaints.append(f"{kind} {', '.join(names[:5])}{more}")
    if complaints:
        raise UserError(f"{source}: does not hold this model's weights: {'; '.join(complaints)}")
