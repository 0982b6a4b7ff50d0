"""The family "vit_pooled": a ViT with attention pooling (SigLIP, SigLIP 2, Perception Encoder).

The image tower is timm's own module, at any size of image; what is written here is how it is cut and steered. Queries
are copies of the pooling's own query, with the bias in its logits. The text tower is CLIP's, or SigLIP's, which is
bidirectional. Letters: B batch, Q queries, N heads of the pooling, L patches, C channels, D embedding, P prompts,
T tokens.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import PooledVitConfig, SiglipTextConfig
from opensan.model.backbones.base import ShallowFeatures, pool_bias
from opensan.model.backbones.libraries import library
from opensan.model.backbones.text_tower import TextTower
from opensan.model.backbones.timm_vit import TimmVit


class PooledVit(TimmVit):
    """Layer 0 is the input of the first block, and layers 1, 2, ... are the blocks, all shallow."""

    def __init__(self, config: PooledVitConfig) -> None:
        classes = config.embed_dim if config.vision.projection else 0
        super().__init__(config, _text_tower(config), pooling="map", classes=classes)
        if isinstance(config.text, SiglipTextConfig):
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # for SigLIP's loss; it has no effect in a softmax
        self.attention_heads = self.visual.trunk.attn_pool.num_heads

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
        query = pool.q_norm(heads(pool.q(pool.latent))).expand(x.shape[0], -1, bias.shape[2], -1)
        attended = F.scaled_dot_product_attention(query, pool.k_norm(heads(keys)), heads(values), bias)
        pooled = pool.proj(attended.transpose(1, 2).flatten(2))
        pooled = pooled + pool.mlp(pool.norm(pooled))
        return F.normalize(trunk.head(trunk.fc_norm(pooled)), dim=-1)


def _text_tower(config: PooledVitConfig) -> nn.Module:
    if isinstance(config.text, SiglipTextConfig):
        return siglip_text(config.text, config.embed_dim)
    return TextTower(config.text, config.embed_dim, nn.GELU)


def siglip_text(config: SiglipTextConfig, embed_dim: int) -> nn.Module:
    """SigLIP's text tower: open_clip's own module, with the methods that a backbone's text needs."""
    open_clip = library("open_clip.transformer", "open_clip_torch")

    class SiglipText(open_clip.TextTransformer):  # type: ignore[name-defined]  # imported only where it is used
        """Embed prompts padded to the context length: the tower is bidirectional, and its last position is read."""

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
