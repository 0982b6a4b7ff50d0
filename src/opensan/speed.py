"""How the image half of a model is computed: exactly, or as fast as the machine can with nearly the same answers.

"exact" is float32, whatever the device. "fast" is what the device does best, measured for what it costs in answers
(docs/speed.md): on a CPU, the matrices of both ViTs' blocks in bfloat16, where the CPU multiplies that.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from opensan.model import SAN
from opensan.structures import Proposals

SPEEDS = ("exact", "fast")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

ImageHalf = Callable[[Tensor], Proposals]
"""Pixels [B, 3, H, W] float32 on the device, as for `SAN.propose`, to what that answers."""


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The precision in which `device` multiplies matrices fastest. Warns if that is no faster than "exact"."""
    if device.type == "cuda":
        return torch.bfloat16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    warnings.warn('speed "fast" is the same as "exact" here: no bfloat16 arithmetic in this processor', stacklevel=4)
    return torch.float32


def prepare_image_half(model: SAN, device: torch.device, speed: str, dtype: torch.dtype) -> ImageHalf:
    """Make `model`, which lies on `device` for inference only, ready; its weights change in place.

    `speed` is one of SPEEDS; `dtype` is that of the blocks' matrices, for "fast" what `fastest_dtype` says.
    """
    narrow_matrices(model, dtype)
    return model.propose


def narrow_matrices(model: SAN, dtype: torch.dtype) -> None:
    """Hold the matrices of both ViTs' blocks in `dtype`: nearly all of the image half's arithmetic.

    Norms, biases, attention weights, residual sums, the fusion and the heads stay in float32.
    """
    for blocks in (model.clip.visual.transformer.resblocks, model.side_adapter.blocks):
        for parameter in blocks.parameters():
            if parameter.ndim == 2:
                parameter.data = parameter.data.to(dtype)
