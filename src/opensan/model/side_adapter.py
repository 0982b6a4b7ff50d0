"""The side adapter: a small ViT beside CLIP, and the two decoupled heads on its queries (paper, sections 3.2 and 3.3).

Letters: B batch, Q queries, N CLIP attention heads, L patches, C channels, h w stride-16 grid.
Patch maps travel as tokens [B, L, C]; what the official code writes as 1x1 convolutions are Linear layers here.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import SideAdapterConfig
from opensan.model.backbones.base import FeatureMap
from opensan.model.fusion import Fusion
from opensan.model.maps import embed_patches, resize_position_table
from opensan.model.transformer import SideBlock

SIDE_NORM_EPS = 1e-6
"""timm's ViT epsilon; CLIP's own is 1e-5."""


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, channels: int, hidden: int, out: int, layers: int) -> None:
        super().__init__()
        widths = [channels, *[hidden] * (layers - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def hidden(self, x: Tensor) -> Tensor:
        """Run all layers but the last: [..., channels] -> [..., hidden]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[-1](self.hidden(x))


class MaskHead(nn.Module):
    """Mask logits alone. Its second output, for recognition by masks, is the mask logits again."""

    def __init__(self, config: SideAdapterConfig) -> None:
        super().__init__()
        mlp = partial(MLP, config.width, config.mlp_channels, layers=config.mlp_layers)
        self.cut_gradient = config.cut_gradient
        self.query_mlp = mlp(out=config.mask_channels)
        self.pixel_mlp = mlp(out=config.mask_channels)

    def forward(self, queries: Tensor, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Compute mask logits [B, Q, h, w], and what recognition reads; queries [B, Q, C], patches [B, L, C]."""
        q = self.query_mlp(queries)
        mask_logits = q @ self.pixel_mlp(patches).transpose(1, 2)
        steering = self.steering(queries, q, patches, mask_logits)
        # Three dimensions are embeddings; four, numbers at every patch.
        return mask_logits.unflatten(-1, grid), steering.unflatten(-1, grid) if steering.ndim == 4 else steering

    def steering(self, queries: Tensor, q: Tensor, patches: Tensor, mask_logits: Tensor) -> Tensor:
        """Return what recognition reads: [B, N, Q, L], or embeddings [B, Q, D]."""
        return self._cut(mask_logits).unsqueeze(1)

    def _cut(self, x: Tensor) -> Tensor:
        return x.detach() if self.cut_gradient else x


class SharedHead(MaskHead):
    """Mask logits, and the same for an attention bias, with a scale and an offset: an ablation of the paper's."""

    def __init__(self, config: SideAdapterConfig) -> None:
        super().__init__(config)
        self.bias_scale = nn.Linear(1, 1)

    def steering(self, queries: Tensor, q: Tensor, patches: Tensor, mask_logits: Tensor) -> Tensor:
        bias = self._cut(mask_logits) * self.bias_scale.weight.squeeze() + self.bias_scale.bias.squeeze()
        return bias.unsqueeze(1)


class ClassHead(MaskHead):
    """Mask logits, and a class embedding of each query, as in the two-stage methods: CLIP recognises nothing."""

    def __init__(self, config: SideAdapterConfig, embed_dim: int) -> None:
        super().__init__(config)
        self.class_mlp = MLP(config.width, config.mlp_channels, embed_dim, config.mlp_layers)

    def steering(self, queries: Tensor, q: Tensor, patches: Tensor, mask_logits: Tensor) -> Tensor:
        return self.class_mlp(queries)


class DecoupledHead(MaskHead):
    """Mask logits and attention biases from the same queries, by separate paths (paper, section 3.3)."""

    def __init__(self, config: SideAdapterConfig, attention_heads: int) -> None:
        super().__init__(config)
        self.attention_heads = attention_heads
        out = attention_heads * config.mask_channels
        self.attention_mlp = MLP(config.width, config.mlp_channels, out, config.mlp_layers)
        self.bias_scale = nn.Linear(1, 1)

    def steering(self, queries: Tensor, q: Tensor, patches: Tensor, mask_logits: Tensor) -> Tensor:
        bias = self._attention_bias(self._cut(q), self._cut(patches))
        return bias * self.bias_scale.weight.squeeze() + self.bias_scale.bias.squeeze()

    def _attention_bias(self, q: Tensor, patches: Tensor) -> Tensor:
        """Compute the attention bias [B, N, Q, L] of q [B, Q, M].

        The last layer would give every pixel N * M channels only to contract M of them with a query. It is linear,
        so its weight is folded into the queries instead: (W x + b) . q = x . (W^T q) + b . q.
        """
        last = cast(nn.Linear, self.attention_mlp.layers[-1])
        weight = last.weight.unflatten(0, (self.attention_heads, -1))  # [N, M, hidden]
        offset = last.bias.unflatten(0, (self.attention_heads, -1))  # [N, M]
        folded = torch.einsum("bqm,nmc->bnqc", q, weight)
        constant = torch.einsum("bqm,nm->bnq", q, offset)
        hidden = self.attention_mlp.hidden(patches)
        return folded @ hidden.transpose(1, 2).unsqueeze(1) + constant.unsqueeze(-1)


class SideAdapter(nn.Module):
    """ViT whose first tokens are the queries; the fusion adds the backbone's shallow features to its patch tokens."""

    def __init__(self, config: SideAdapterConfig, *, fusion: Fusion, head: Callable[[], MaskHead]) -> None:
        """`head` makes the head: after all else, so that a seed gives the weights it always gave."""
        super().__init__()
        self.config = config
        side = config.image_size // config.patch_size
        self.query_embedding = nn.Parameter(torch.empty(config.queries, config.width))
        self.query_position = nn.Parameter(torch.empty(config.queries, config.width))
        self.patch_position = nn.Parameter(torch.empty(side * side, config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.blocks = nn.ModuleList(
            SideBlock(config.width, config.heads, config.mlp_ratio, SIDE_NORM_EPS) for _ in range(config.depth)
        )
        self.fusion = fusion
        self.head = head()
        self._initialise()

    def _initialise(self) -> None:
        """Initialize with a truncated normal of deviation 0.02 and zero biases, as timm does."""
        for parameter in (self.query_embedding, self.query_position, self.patch_position):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, pixels: Tensor, maps: Mapping[int, FeatureMap], blocks: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return mask logits [B, Q, h, w], attention bias [B, N, Q, h, w] after each of `blocks`; pixels [B, 3, H, W].

        The second is what the head gives recognition; other heads give mask logits again, or embeddings [B, Q, D].

        `maps`: the layers of the backbone that the fusion reads.

        The position embedding is added to the input and again after every block but the last;
        the heads read a block's output after fusion and before that addition.
        """
        config = self.config
        patches, grid = embed_patches(self.patch_embedding, pixels)
        position = torch.cat([self.query_position, resize_position_table(self.patch_position, grid)])
        x = torch.cat([self.query_embedding.expand(pixels.shape[0], -1, -1), patches], dim=1)
        x = self._fuse(0, x + position, maps, grid)
        answers = {}
        for number, block in enumerate(self.blocks, start=1):
            x = self._fuse(number, block(x), maps, grid)
            if number in blocks:
                answers[number] = self.head(x[:, : config.queries], x[:, config.queries :], grid)
            if number < config.depth:
                x = x + position
        return [answers[number] for number in blocks]

    def _fuse(self, number: int, x: Tensor, maps: Mapping[int, FeatureMap], grid: tuple[int, int]) -> Tensor:
        """Fuse the backbone's layer into the patch tokens of side block `number`'s output x [B, Q + L, C]."""
        queries = self.config.queries
        fused = self.fusion(number, x[:, queries:], maps, grid)
        return x if fused is None else torch.cat([x[:, :queries], fused], dim=1)
