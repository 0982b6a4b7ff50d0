"""The family "clip_vit": a plain ViT with a class token, split in shallow and recognition layers; CLIP's text tower.

What is SAN's own is where the ViT is cut and what steers the recognition layers (paper, section 3.3).
Parameter names are open_clip's. Letters: B batch, Q queries, N attention heads, L patches, C channels, D embedding,
h w CLIP's patch grid.
"""

import math
from collections.abc import Callable, Collection
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import ClipConfig, VisionConfig
from opensan.model.backbones.base import Backbone, FeatureMap, ShallowFeatures, pool_bias
from opensan.model.backbones.text_tower import TextTower
from opensan.model.maps import embed_patches, resize_position_table
from opensan.model.transformer import ClipBlock, ClipBlocks, QuickGELU


class VisionTower(nn.Module):
    """The weights of CLIP's image tower; `ClipModel` runs them in parts."""

    def __init__(self, config: VisionConfig, embed_dim: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        width = config.width
        side = config.image_size // config.patch_size
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = _normal_parameter(width, std=width**-0.5)
        self.positional_embedding = _normal_parameter(side * side + 1, width, std=width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = ClipBlocks(width, config.layers, config.heads, config.mlp_ratio, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = _normal_parameter(width, embed_dim, std=width**-0.5)


def _normal_parameter(*shape: int, std: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape))
    nn.init.normal_(parameter, std=std)
    return parameter


class ClipModel(TextTower, Backbone):
    """Both of CLIP's towers; the text tower's parts are at the top level, as in the released files."""

    def __init__(self, config: ClipConfig) -> None:
        activation = QuickGELU if config.quick_gelu else nn.GELU
        super().__init__(config.text, config.embed_dim, activation)
        self.visual = VisionTower(config.vision, config.embed_dim, activation)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.layer_widths = dict.fromkeys(range(config.vision.layers + 1), config.vision.width)
        self.attention_heads = config.vision.heads

    def shallow_features(self, pixels: Tensor, last_layer: int, keep: Collection[int]) -> ShallowFeatures:
        """Run the patch embedding and blocks 1..last_layer. Layer 0 is the output of `ln_pre`."""
        visual = self.visual
        x, grid = embed_patches(visual.conv1, pixels)
        class_position, patch_position = visual.positional_embedding[:1], visual.positional_embedding[1:]
        class_token = (visual.class_embedding + class_position).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x + resize_position_table(patch_position, grid)], dim=1)
        x = visual.ln_pre(x)
        maps = {0: FeatureMap(x[:, 1:], grid)} if 0 in keep else {}
        for layer in range(1, last_layer + 1):
            x = visual.transformer.resblocks[layer - 1](x)
            if layer in keep:
                maps[layer] = FeatureMap(x[:, 1:], grid)
        return ShallowFeatures(maps=maps, tokens=x, grid=grid, last_layer=last_layer)

    def recognise(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
        """Run the blocks after the shallow ones, steered by `attention_bias`: unit mask embeddings [B, Q, D].

        The bias, max-pooled to CLIP's grid, steers Q copies of the class token (SLS tokens).
        """
        x, own = self._with_queries(features, attention_bias)
        *blocks, last = self.visual.transformer.resblocks[features.last_layer :]
        for number, block in enumerate(blocks):
            x = block(x, steering=own[number % len(own)])
        x = last(x, steering=own[-1], only_queries=True)
        return F.normalize(self.visual.ln_post(x) @ self.visual.proj, dim=-1)

    def attended(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
        """Return how much each SLS token attends to each patch, [B, N, Q, h, w]: the mean over the blocks."""
        x, own = self._with_queries(features, attention_bias)
        blocks = self.visual.transformer.resblocks[features.last_layer :]
        weights = []
        for number, block in enumerate(blocks):
            steering = own[-1 if number == len(blocks) - 1 else number % len(own)]
            weights.append(cast(ClipBlock, block).attended(x, steering))
            x = block(x, steering=steering)
        return torch.stack(weights).mean(dim=0).unflatten(-1, features.grid)

    def _with_queries(self, features: ShallowFeatures, attention_bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return Q SLS tokens before the others, [B, Q + 1 + L, C], and each block's bias, [B, N, Q, L].

        A bias with more channels than heads is one for each block.
        """
        steering = pool_bias(attention_bias, features.grid)
        x = torch.cat([features.tokens[:, :1].expand(-1, steering.shape[2], -1), features.tokens], dim=1)
        return x, steering.chunk(max(1, steering.shape[1] // self.attention_heads), dim=1)

    def last_features(self, features: ShallowFeatures) -> Tensor:
        """Run the blocks after the shallow ones as in plain CLIP: patches in the joint space, [B, L, D]."""
        x = features.tokens
        for block in self.visual.transformer.resblocks[features.last_layer :]:
            x = block(x)
        return self.visual.ln_post(x[:, 1:]) @ self.visual.proj

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the image tower, shallow and deep."""
        return list(self.visual.transformer.resblocks)

    def trained_names(self) -> Collection[str]:
        """Return the position table of the image tower (official behaviour)."""
        return ("visual.positional_embedding",)

    def is_text(self, name: str) -> bool:
        """Return whether `name` is neither of the image tower nor the scale."""
        return not name.startswith("visual.") and name != "logit_scale"
