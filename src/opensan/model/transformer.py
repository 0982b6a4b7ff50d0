"""The two kinds of transformer block, and CLIP's two towers as they hold them: modules with weights, little more.

Parameter names are open_clip's and timm's, whose weights these modules read and whose numbers they reproduce (tested);
the packages themselves are not imported, because that takes longer than labelling a photograph.
Letters: B batch, L tokens, C channels.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import ClipConfig, TextConfig, VisionConfig


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ClipBlock(nn.Module):
    """CLIP's pre-norm block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", activation())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """x [B, L, C] attends to `context` [B, M, C], or to itself; the answer is for x, [B, L, C].

        `attn_mask` [L, M] or [B * heads, L, M] is added to the attention logits.
        """
        queries = self.ln_1(x)
        keys = queries if context is None else self.ln_1(context)
        x = x + self.attn(queries, keys, keys, need_weights=False, attn_mask=attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class ClipBlocks(nn.Module):
    """A stack of CLIP's blocks."""

    def __init__(
        self, width: int, layers: int, heads: int, mlp_ratio: float, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ClipBlock(width, heads, mlp_ratio, activation) for _ in range(layers))


class VisionTower(nn.Module):
    """CLIP's image tower: what `opensan.model.clip` runs in parts."""

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


class Clip(nn.Module):
    """Both towers; the text tower's parts stand at the top, as in the released files."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        text = config.text
        activation = QuickGELU if config.quick_gelu else nn.GELU
        self.visual = VisionTower(config.vision, config.embed_dim, activation)
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.transformer = ClipBlocks(text.width, text.layers, text.heads, 4.0, activation)
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._initialise_text(text)

    def _initialise_text(self, text: TextConfig) -> None:
        """CLIP's own start (Radford et al., 2021): deviations by width, and by depth where a residual is written."""
        within = text.width**-0.5
        residual = within * (2 * text.layers) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=within)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * text.width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual)
        nn.init.normal_(self.text_projection, std=within)


class SideAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SideBlock(nn.Module):
    """The side network's pre-norm block: timm's ViT block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = SideAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
