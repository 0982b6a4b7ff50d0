"""The frozen CLIP, cut in three: shallow image layers, recognition layers, text tower.

What is SAN's own is where the towers are cut and what steers the recognition layers (paper, section 3.3).
Letters: B batch, Q queries, N attention heads, L patches, C channels, h w CLIP's patch grid.
"""

import functools
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.model.transformer import ClipModel, VisionTower, linear
from opensan.structures import PromptTree


@dataclass(frozen=True)
class ShallowFeatures:
    """What the shallow layers leave behind."""

    patch_tokens: dict[int, Tensor]
    """CLIP layer (0: after ln_pre) -> [B, L, C]."""
    tokens: Tensor
    """[B, 1 + L, C] after the last shallow layer, class token first."""
    grid: tuple[int, int]
    """(h, w), L = h * w."""


def resize_position_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a square [L0, C] position table to [h * w, C], bicubically; untouched if it already fits."""
    side = round(table.shape[0] ** 0.5)
    assert side * side == table.shape[0], table.shape
    # An exported graph is for any grid, so it can't ask; resizing to the same size changes nothing.
    if not torch.compiler.is_exporting() and grid == (side, side):
        return table
    down, across = (_bicubic_matrix(side, size, table) for size in grid)
    rows = torch.einsum("hy,yxc->hxc", down, table.unflatten(0, (side, side)))
    return torch.einsum("wx,hxc->hwc", across, rows).flatten(0, 1)


def _bicubic_matrix(side: int, size: int, like: Tensor) -> Tensor:
    """[size, side]: bicubic resizing of one axis. Resized itself, a table keeps a GPU waiting for its few pixels."""
    identity = torch.eye(side, dtype=like.dtype, device=like.device).view(1, side, side, 1)
    return F.interpolate(identity, size=(size, 1), mode="bicubic", align_corners=False).view(side, size).T


def embed_patches(convolution: nn.Conv2d, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Patch tokens [B, h * w, C] of pixels [B, 3, H, W], and the grid (h, w); what does not fill a patch is dropped.

    A convolution whose patches do not overlap is one matrix product.
    """
    side = convolution.kernel_size[0]
    h, w = pixels.shape[2] // side, pixels.shape[3] // side
    inside = pixels[:, :, : h * side, : w * side]
    patches = inside.unflatten(3, (w, side)).unflatten(2, (h, side)).permute(0, 2, 4, 1, 3, 5)
    return linear(patches.flatten(3).flatten(1, 2), convolution.weight.flatten(1), convolution.bias), (h, w)


def shallow_features(visual: VisionTower, pixels: Tensor, last_layer: int, keep: Collection[int]) -> ShallowFeatures:
    """Run patch embedding and blocks 1..last_layer on normalised `pixels` [B, 3, H, W]; keep the layers in `keep`."""
    x, grid = embed_patches(visual.conv1, pixels)
    class_position, patch_position = visual.positional_embedding[:1], visual.positional_embedding[1:]
    class_token = (visual.class_embedding + class_position).expand(x.shape[0], 1, -1)
    x = torch.cat([class_token, x + resize_position_table(patch_position, grid)], dim=1)
    x = visual.ln_pre(x)
    kept = {0: x[:, 1:]} if 0 in keep else {}
    for layer in range(1, last_layer + 1):
        x = visual.transformer.resblocks[layer - 1](x)
        if layer in keep:
            kept[layer] = x[:, 1:]
    return ShallowFeatures(patch_tokens=kept, tokens=x, grid=grid)


WIDEST_WINDOW = 3
"""Pixels a side that `adaptive_max_pool` looks at when exported: enough where it leaves half of each axis or more."""


def adaptive_max_pool(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """`F.adaptive_max_pool2d`; when exported, in operations that other runtimes have for any size of map and grid."""
    if not torch.compiler.is_exporting():
        if maps.shape[-2] % grid[0] == 0 == maps.shape[-1] % grid[1]:
            return F.max_pool2d(maps, (maps.shape[-2] // grid[0], maps.shape[-1] // grid[1]))
        if maps.device.type != "mps":  # Apple's GPUs have it only for the sizes above
            return F.adaptive_max_pool2d(maps, grid)
    for dim, size in zip((-2, -1), grid, strict=True):
        whole, place = maps.shape[dim], torch.arange(size, device=maps.device)
        first, last = place * whole // size, ((place + 1) * whole + size - 1) // size - 1
        windows = [maps.index_select(dim, torch.minimum(first + step, last)) for step in range(WIDEST_WINDOW)]
        maps = functools.reduce(torch.maximum, windows)
    return maps


def recognise(visual: VisionTower, features: ShallowFeatures, attention_bias: Tensor, first_layer: int) -> Tensor:
    """Mask embeddings [B, Q, D], unit length: blocks first_layer.. steered by `attention_bias` [B, N, Q, h', w'].

    What is steered are Q copies of the class token (SLS tokens), by the bias max-pooled to CLIP's grid.
    """
    batch, heads, queries = attention_bias.shape[:3]
    pooled = adaptive_max_pool(attention_bias.flatten(0, 1), features.grid)
    steering = pooled.view(batch, heads, queries, -1)
    x = torch.cat([features.tokens[:, :1].expand(-1, queries, -1), features.tokens], dim=1)
    *blocks, last = visual.transformer.resblocks[first_layer - 1 :]
    for block in blocks:
        x = block(x, steering=steering)
    x = last(x, steering=steering, only_queries=True)
    return F.normalize(visual.ln_post(x) @ visual.proj, dim=-1)


def encode_prompts(clip: ClipModel, tokens: Tensor) -> Tensor:
    """Embed `tokens` [P, L] int64, L up to the context length, as unit rows [P, D].

    The tower is causal and read at the end-of-text token (the largest id), so cutting `tokens` after
    the longest prompt of the batch changes nothing.
    """
    length = tokens.shape[1]
    x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    causal = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
    for block in clip.transformer.resblocks:
        x = block(x, attn_mask=causal)
    x = clip.ln_final(x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)])
    return F.normalize(x @ clip.text_projection, dim=-1)


def encode_prompt_tree(clip: ClipModel, tree: PromptTree) -> Tensor:
    """Embed the prompts of `tree` as unit rows [P, D]: what `encode_prompts` gives for each."""
    x = (clip.token_embedding(tree.tokens) + clip.positional_embedding[tree.depth]).unsqueeze(0)
    mask = torch.zeros(tree.sees.shape, dtype=x.dtype, device=x.device).masked_fill_(~tree.sees, -torch.inf)
    *blocks, last = clip.transformer.resblocks
    for block in blocks:
        x = block(x, attn_mask=mask)
    # Only the ends are read.
    x = clip.ln_final(last(x[:, tree.ends], attn_mask=mask[tree.ends], context=x).squeeze(0))
    return F.normalize(x @ clip.text_projection, dim=-1)
