"""The family "clip_resnet": OpenAI's modified ResNet, whose attention pooling the bias steers, and CLIP's text tower.

The ResNet is open_clip's own module. Letters: B batch, Q queries, N attention heads, L positions, C channels,
D embedding.
"""

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import ClipResNetConfig
from opensan.model.backbones.base import Backbone, ShallowFeatures, as_tokens, pool_bias
from opensan.model.backbones.libraries import library
from opensan.model.backbones.text_tower import TextTower
from opensan.model.maps import resize_position_table
from opensan.model.transformer import QuickGELU

HEAD_WIDTH = 64
"""Channels of a head of the attention pooling."""


class ClipResNet(TextTower, Backbone):
    """Layer 0 is the stem, layers 1 to 4 are the stages, at strides 4, 4, 8, 16 and 32."""

    def __init__(self, config: ClipResNetConfig) -> None:
        super().__init__(config.text, config.embed_dim, QuickGELU if config.quick_gelu else nn.GELU)
        vision = config.vision
        resnet = library("open_clip.modified_resnet", "open_clip_torch")
        heads = vision.width * 32 // HEAD_WIDTH
        self.visual = resnet.ModifiedResNet(
            list(vision.layers), config.embed_dim, heads, vision.image_size, vision.width
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.layer_widths = {0: vision.width} | {stage: vision.width * 2 ** (stage + 1) for stage in range(1, 5)}
        self.attention_heads = heads

    def shallow_features(self, pixels: Tensor, last_layer: int, keep: Collection[int]) -> ShallowFeatures:
        """Run the stem and all stages."""
        x, maps = pixels, {}
        for layer, stage in enumerate((self.visual.stem, *self.blocks())):
            x = stage(x)
            if layer in keep:
                maps[layer] = as_tokens(x)
        tokens, grid = as_tokens(x)
        return ShallowFeatures(maps, tokens, grid, last_layer)

    def recognise(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
        """Pool once a query: the mean of all positions attends to itself, and to every position with its bias."""
        pool = self.visual.attnpool
        table = pool.positional_embedding
        mean = features.tokens.mean(dim=1, keepdim=True) + table[0]
        keys = torch.cat([mean, features.tokens + resize_position_table(table[1:], features.grid)], dim=1)
        bias = F.pad(pool_bias(attention_bias, features.grid), (1, 0))  # none for the mean: [B, N, Q, 1 + L]

        def heads(tokens: Tensor) -> Tensor:
            return tokens.unflatten(2, (pool.num_heads, -1)).transpose(1, 2)

        query = heads(pool.q_proj(mean)).expand(-1, -1, bias.shape[2], -1)
        attended = F.scaled_dot_product_attention(query, heads(pool.k_proj(keys)), heads(pool.v_proj(keys)), bias)
        return F.normalize(pool.c_proj(attended.transpose(1, 2).flatten(2)), dim=-1)

    def blocks(self) -> list[nn.Module]:
        """Return the four stages."""
        return [getattr(self.visual, f"layer{stage}") for stage in range(1, 5)]

    def is_text(self, name: str) -> bool:
        """Return whether `name` is neither of the image tower nor the scale."""
        return not name.startswith("visual.") and name != "logit_scale"
