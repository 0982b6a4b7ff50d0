"""Fuse the backbone's shallow layers into the side network (paper, section 3.2).

Letters: B batch, L positions, C channels, h w the side network's grid.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import SideAdapterConfig
from opensan.model.backbones.base import FeatureMap

FUSION_NORM_EPS = 1e-6


class MapProjection(nn.Module):
    """Projects one map into the side network: norm over channels, projection, resize.

    The norm is called `channel_norm` because it is trained with weight decay, unlike the blocks' LayerNorms
    (official behaviour: it is not torch's LayerNorm there).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channel_norm = nn.LayerNorm(channels, eps=FUSION_NORM_EPS)
        self.projection = nn.Linear(channels, width)

    def forward(self, features: FeatureMap, grid: tuple[int, int]) -> Tensor:
        """Project [B, h' * w', C] on the map's grid to [B, h * w, width] on the side network's."""
        projected = self.projection(self.channel_norm(features.tokens))
        maps = projected.transpose(1, 2).unflatten(2, features.grid)
        resized = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
        return resized.flatten(2).transpose(1, 2)


class Fusion(nn.ModuleDict):
    """Fuses the map of a layer into the patch tokens after a side block. Keys are the blocks' numbers."""

    def __init__(self, layers: Mapping[int, int], parts: Mapping[int, nn.Module]) -> None:
        """`layers`: side block -> layer of the backbone; `parts`: side block -> what fuses that layer's map."""
        super().__init__({str(block): part for block, part in parts.items()})
        self.layers = dict(layers)

    def forward(
        self, block: int, patches: Tensor, maps: Mapping[int, FeatureMap], grid: tuple[int, int]
    ) -> Tensor | None:
        """Return the patch tokens [B, h * w, width] after side block `block` (0: the input); None if none is fused."""
        if block not in self.layers:
            return None
        return self._fuse(self[str(block)], patches, maps[self.layers[block]], grid)

    def _fuse(self, part: nn.Module, patches: Tensor, features: FeatureMap, grid: tuple[int, int]) -> Tensor:
        """Fuse one map by its part."""
        return part(patches, features, grid)


class AddFusion(Fusion):
    """Adds the projected map (paper, section 3.2); the parts are the projections themselves."""

    def _fuse(self, part: nn.Module, patches: Tensor, features: FeatureMap, grid: tuple[int, int]) -> Tensor:
        return patches + part(features, grid)


class Gate(nn.Module):
    """Adds the projected map times a gate in [0, 1] a channel, which both decide: sigmoid(W [patch, map])."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.map = MapProjection(channels, width)
        self.gate = nn.Linear(2 * width, width)

    def forward(self, patches: Tensor, features: FeatureMap, grid: tuple[int, int]) -> Tensor:
        projected = self.map(features, grid)
        return patches + torch.sigmoid(self.gate(torch.cat([patches, projected], dim=2))) * projected


class CrossAttention(nn.Module):
    """Lets the patch tokens attend to the map's positions, on the map's own grid, and adds what they read."""

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.channel_norm = nn.LayerNorm(channels, eps=FUSION_NORM_EPS)
        self.patch_norm = nn.LayerNorm(width, eps=FUSION_NORM_EPS)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(channels, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, patches: Tensor, features: FeatureMap, grid: tuple[int, int]) -> Tensor:
        def by_head(tokens: Tensor) -> Tensor:
            return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)

        keys, values = self.key_value(self.channel_norm(features.tokens)).chunk(2, dim=2)
        query = self.query(self.patch_norm(patches))
        read = F.scaled_dot_product_attention(by_head(query), by_head(keys), by_head(values))
        return patches + self.out(read.transpose(1, 2).flatten(2))


def build_fusion(config: SideAdapterConfig, layer_widths: Mapping[int, int]) -> Fusion:
    """Build the fusion of the kind that `config` names, for maps of `layer_widths` channels."""
    widths = {block: layer_widths[layer] for block, layer in config.fusion.items()}
    if config.fusion_kind == "add":
        return AddFusion(config.fusion, {block: MapProjection(width, config.width) for block, width in widths.items()})
    if config.fusion_kind == "gated":
        return Fusion(config.fusion, {block: Gate(width, config.width) for block, width in widths.items()})
    return Fusion(
        config.fusion, {block: CrossAttention(width, config.width, config.heads) for block, width in widths.items()}
    )
