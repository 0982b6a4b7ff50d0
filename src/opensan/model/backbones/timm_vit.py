"""The base class of the families around timm's ViTs: tokens, positions and blocks at any size of image.

The modules are timm's own. Letters: B batch, L patches, C channels, D embedding, P prompts, T tokens.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from opensan.config import EvaClipConfig, PooledVitConfig
from opensan.errors import UserError
from opensan.model.backbones.base import Backbone, FeatureMap, ShallowFeatures
from opensan.model.backbones.libraries import Tower, timm_model
from opensan.model.maps import resize_position_table
from opensan.structures import PromptTree


class TimmVit(Backbone):
    """Layer 0 is the input of the first block, and layers 1, 2, ... are the blocks. A subclass recognises."""

    text: Any

    def __init__(self, config: PooledVitConfig | EvaClipConfig, text: nn.Module, *, pooling: str, classes: int) -> None:
        """`pooling` and `classes` are timm's: how the tower is read, and the outputs of its head (0: no head)."""
        super().__init__()
        trunk = timm_model(config.vision.model, num_classes=classes, global_pool=pooling, dynamic_img_size=True)
        if len(trunk.blocks) != config.vision.layers:
            raise UserError(
                f"clip.vision.layers: {config.vision.model} has {len(trunk.blocks)}, not {config.vision.layers}"
            )
        self.visual = Tower(trunk=trunk)
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.layer_widths = dict.fromkeys(range(len(trunk.blocks) + 1), trunk.embed_dim)

    def shallow_features(self, pixels: Tensor, last_layer: int, keep: Collection[int]) -> ShallowFeatures:
        """Run blocks 1..last_layer. Pixels that do not fill a patch are dropped."""
        trunk = self.visual.trunk
        side = trunk.patch_embed.patch_size[0]
        grid = (pixels.shape[2] // side, pixels.shape[3] // side)
        x = trunk.patch_embed(pixels[:, :, : grid[0] * side, : grid[1] * side]).flatten(1, 2)
        prefix = [token for token in (trunk.cls_token, getattr(trunk, "reg_token", None)) if token is not None]
        count = sum(token.shape[1] for token in prefix)
        embedded = 0 if trunk.no_embed_class else count  # prefix tokens with an entry in the position table
        table = trunk.pos_embed[0]
        x = x + resize_position_table(table[embedded:], grid)
        if prefix:
            tokens = torch.cat(prefix, dim=1)
            tokens = tokens + table[:embedded] if embedded else tokens
            x = torch.cat([tokens.expand(x.shape[0], -1, -1), x], dim=1)
        x = trunk.norm_pre(x)
        rope = self.rope(grid)
        maps = {0: FeatureMap(x[:, count:], grid)} if 0 in keep else {}
        for layer, block in enumerate(trunk.blocks[:last_layer], start=1):
            x = block(x) if rope is None else block(x, rope=rope)
            if layer in keep:
                maps[layer] = FeatureMap(x[:, count:], grid)
        return ShallowFeatures(maps, x, grid, last_layer)

    def rope(self, grid: tuple[int, int]) -> Tensor | None:
        """Return the rotary positions of the patches, sines and then cosines, [L, ...]; None without such positions."""
        rope = getattr(self.visual.trunk, "rope", None)
        return None if rope is None else rope.get_embed(list(grid))

    def embed_prompts(self, tokens: Tensor) -> Tensor:
        """Embed `tokens` [P, T] as unit rows [P, D]."""
        return self.text.embed_prompts(tokens)

    def embed_prompt_tree(self, tree: PromptTree) -> Tensor:
        """Embed the prompts of `tree`, if the text tower is CLIP's."""
        return self.text.embed_prompt_tree(tree)

    def token_table(self) -> Tensor:
        """Return the embedding of every token, [V, C]."""
        return self.text.token_table()

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the ViT."""
        return list(self.visual.trunk.blocks)

    def is_text(self, name: str) -> bool:
        """Return whether `name` is a part of `text`."""
        return name.startswith("text.")
