"""Fuse the backbone's shallow layers into the side network (paper, section 3.2).

Letters: B batch, L positions, C channels, h w the side network's grid.
"""

from collections.abc import Mapping

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


class AddFusion(nn.ModuleDict):
    """Adds the projected map of a layer to the patch tokens after a side block. Keys are the blocks' numbers."""

    def __init__(self, layers: Mapping[int, int], layer_widths: Mapping[int, int], width: int) -> None:
        """`layers`: side block -> layer of the backbone; `layer_widths`: layer -> channels of its map."""
        super().__init__({str(block): MapProjection(layer_widths[layer], width) for block, layer in layers.items()})
        self.layers = dict(layers)

    def forward(
        self, block: int, patches: Tensor, maps: Mapping[int, FeatureMap], grid: tuple[int, int]
    ) -> Tensor | None:
        """Return the patch tokens [B, h * w, width] after side block `block` (0: the input); None if none is fused."""
        if block not in self.layers:
            return None
        return patches + self[str(block)](maps[self.layers[block]], grid)


def build_fusion(config: SideAdapterConfig, layer_widths: Mapping[int, int]) -> AddFusion:
    """Build the fusion of the kind that `config` names, for maps of `layer_widths` channels."""
    return AddFusion(config.fusion, layer_widths, config.width)
