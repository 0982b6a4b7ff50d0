"""The family "eva_clip": EVA-CLIP, a ViT with a class token, rotary positions and norms inside its blocks.

The image tower is timm's own module, at any size of image. As in the family "clip_vit", its last blocks recognise:
copies of the class token (SLS tokens) run through them, steered by the bias. The text tower is CLIP's.
Letters: B batch, Q queries, N attention heads, L patches, C channels, D embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import EvaClipConfig
from opensan.model.backbones.base import ShallowFeatures, pool_bias
from opensan.model.backbones.text_tower import TextTower
from opensan.model.backbones.timm_vit import TimmVit


class EvaClip(TimmVit):
    """Layer 0 is the input of the first block, and layers 1, 2, ... are the blocks."""

    def __init__(self, config: EvaClipConfig) -> None:
        text = TextTower(config.text, config.embed_dim, nn.GELU)
        super().__init__(config, text, pooling="token", classes=config.embed_dim)
        self.attention_heads = self.visual.trunk.blocks[0].attn.num_heads

    def recognise(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
        """Run the blocks after the shallow ones on the class token, the patches, and then Q SLS tokens."""
        trunk = self.visual.trunk
        mask = _steering_mask(pool_bias(attention_bias, features.grid))
        queries = attention_bias.shape[2]
        x = torch.cat([features.tokens, features.tokens[:, :1].expand(-1, queries, -1)], dim=1)
        rope = self.rope(features.grid)
        if rope is not None:  # The SLS tokens, as the class token, are not rotated: sines of 0, cosines of 1.
            sines, cosines = rope.chunk(2, dim=-1)
            unrotated = torch.cat([torch.zeros_like(sines[:1]), torch.ones_like(cosines[:1])], dim=-1)
            rope = torch.cat([rope, unrotated.expand(queries, -1)])
        for block in trunk.blocks[features.last_layer :]:
            x = block(x, rope=rope, attn_mask=mask)
        return F.normalize(trunk.head(trunk.fc_norm(trunk.norm(x[:, -queries:]))), dim=-1)


def _steering_mask(steering: Tensor) -> Tensor:
    """Return what is added to the attention logits, [B, N, 1 + L + Q, 1 + L + Q], from the bias [B, N, Q, L].

    SLS tokens attend to the patches with their bias, and to themselves; class token and patches to one another.
    """
    queries = steering.shape[2]
    itself = torch.full((queries, queries), -torch.inf, dtype=steering.dtype, device=steering.device)
    itself = itself.masked_fill(torch.eye(queries, dtype=torch.bool, device=steering.device), 0.0)
    sls = torch.cat([steering, itself.expand(*steering.shape[:2], -1, -1)], dim=3)
    sls = F.pad(sls, (1, 0), value=-torch.inf)
    plain = F.pad(torch.zeros_like(steering[:, :, :1]), (1, 0))  # one row for the class token and every patch
    plain = F.pad(plain, (0, queries), value=-torch.inf)
    return torch.cat([plain.expand(-1, -1, 1 + steering.shape[3], -1), sls], dim=2)
