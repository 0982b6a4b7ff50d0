"""The family "vit_pooled": a ViT with attention pooling (SigLIP, SigLIP 2, Perception Encoder).

The image tower is timm's own module, at any size of image; what is written here is how it is cut and steered. Queries
are copies of the pooling's own query, with the bias in its logits. The text tower is CLIP's, or SigLIP's, which is
bidirectional. Letters: B batch, Q queries, N heads of the pooling, L patches, C channels, D embedding, P prompts,
T tokens.
"""

import math
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import PooledVitConfig, SiglipTextConfig
from opensan.errors import UserError
from opensan.model.backbones.base import Backbone, FeatureMap, ShallowFeatures, pool_bias
from opensan.model.backbones.libraries import Tower, library, timm_model
from opensan.model.backbones.text_tower import TextTower
from opensan.model.maps import resize_position_table
from opensan.structures import PromptTree


class PooledVit(Backbone):
    """Layer 0 is the input of the first block, and layers 1, 2, ... are the blocks."""

    text: Any

    def __init__(self, config: PooledVitConfig) -> None:
        super().__init__()
        classes = config.embed_dim if config.vision.projection else 0
        trunk = timm_model(config.vision.model, num_classes=classes, global_pool="map", dynamic_img_size=True)
        if len(trunk.blocks) != config.vision.layers:
            raise UserError(
                f"clip.vision.layers: {config.vision.model} has {len(trunk.blocks)}, not {config.vision.layers}"
            )
        self.visual = Tower(trunk=trunk)
        self.text = _text_tower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if isinstance(config.text, SiglipTextConfig):
            self.padding = config.text.padding
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # for SigLIP's loss; it has no effect in a softmax
        self.layer_widths = dict.fromkeys(range(len(trunk.blocks) + 1), trunk.embed_dim)
        self.attention_heads = trunk.attn_pool.num_heads
        self.causal_text = self.text.causal_text

    def shallow_features(self, pixels: Tensor, last_layer: int, keep: Collection[int]) -> ShallowFeatures:
        """Run all blocks. Pixels that do not fill a patch are dropped."""
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
            x = torch.cat([tokens.expand(len(x), -1, -1), x], dim=1)
        x = trunk.norm_pre(x)
        rope = getattr(trunk, "rope", None)
        block_inputs = {} if rope is None else {"rope": rope.get_embed(list(grid))}
        maps = {0: FeatureMap(x[:, count:], grid)} if 0 in keep else {}
        for layer, block in enumerate(trunk.blocks, start=1):
            x = block(x, **block_inputs)
            if layer in keep:
                maps[layer] = FeatureMap(x[:, count:], grid)
        return ShallowFeatures(maps, x, grid, last_layer)

    def recognise(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
        """Pool once a query: its copy of the pooling's query attends to every patch with its bias."""
        trunk = self.visual.trunk
        bias = pool_bias(attention_bias, features.grid)
        x = trunk.norm(features.tokens)
        count = x.shape[1] - bias.shape[3]
        if getattr(trunk, "pool_include_prefix", True):
            bias = F.pad(bias, (count, 0))  # none for the class token and the like
        else:
            x = x[:, count:]
        pool = trunk.attn_pool

        def heads(tokens: Tensor) -> Tensor:
            return tokens.unflatten(2, (pool.num_heads, -1)).transpose(1, 2)

        keys, values = pool.kv(x).chunk(2, dim=2)
        query = pool.q_norm(heads(pool.q(pool.latent))).expand(len(x), -1, bias.shape[2], -1)
        attended = F.scaled_dot_product_attention(query, pool.k_norm(heads(keys)), heads(values), bias)
        pooled = pool.proj(attended.transpose(1, 2).flatten(2))
        pooled = pooled + pool.mlp(pool.norm(pooled))
        return F.normalize(trunk.head(trunk.fc_norm(pooled)), dim=-1)

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


def _text_tower(config: PooledVitConfig) -> nn.Module:
    if isinstance(config.text, SiglipTextConfig):
        return siglip_text(config.text, config.embed_dim)
    return TextTower(config.text, config.embed_dim, nn.GELU)


def siglip_text(config: SiglipTextConfig, embed_dim: int) -> nn.Module:
    """SigLIP's text tower: open_clip's own module, with the methods that a backbone's text needs."""
    open_clip = library("open_clip.transformer", "open_clip_torch")

    class SiglipText(open_clip.TextTransformer):  # type: ignore[name-defined]  # imported only where it is used
        """Embed prompts padded to the context length: the tower is bidirectional, and its last position is read."""

        causal_text = False

        def embed_prompts(self, tokens: Tensor) -> Tensor:
            return F.normalize(self(tokens), dim=-1)

        def token_table(self) -> Tensor:
            return self.token_embedding.weight

    return SiglipText(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        output_dim=embed_dim,
        no_causal_mask=True,
        pool_type="last",
        proj_bias=True,
        act_layer=partial(nn.GELU, approximate="tanh" if config.tanh_gelu else "none"),
        norm_layer=partial(open_clip.LayerNorm, eps=1e-6),
    )
