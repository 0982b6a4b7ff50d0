"""The family "convnet": a ConvNet with a linear head (or an MLP) beside CLIP's text tower, as ConvNeXt-CLIP.

The image tower is timm's own module. A query's embedding is the head of a weighted mean of the last features: the
weights are the softmax of its bias over all positions. Letters: B batch, Q queries, L positions, C channels,
D embedding.
"""

import math
from collections import OrderedDict
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import ConvNetConfig
from opensan.errors import UserError
from opensan.model.backbones.base import Backbone, ShallowFeatures, as_tokens, mean_weights, weighted_means
from opensan.model.backbones.libraries import Tower, library, timm_model
from opensan.model.backbones.text_tower import TextTower
from opensan.model.transformer import QuickGELU


class ConvNetClip(TextTower, Backbone):
    """Layers 1, 2, ... are the stages. The bias has one group of channels."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config.text, config.embed_dim, QuickGELU if config.quick_gelu else nn.GELU)
        layers = library("timm.layers", "timm")
        trunk = timm_model(config.vision.model)
        trunk.reset_classifier(0)
        channels, dim = trunk.num_features, config.embed_dim
        head: OrderedDict[str, nn.Module] = OrderedDict()
        if config.vision.head == "mlp":
            head["mlp"] = layers.Mlp(channels, 2 * dim, dim, bias=(True, False))
        else:
            head["proj"] = nn.Linear(channels, dim, bias=False)
        self.visual = Tower(trunk=trunk, head=nn.Sequential(head))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        widths = [stage["num_chs"] for stage in trunk.feature_info]
        if len(widths) != config.vision.layers:
            raise UserError(f"clip.vision.layers: {config.vision.model} has {len(widths)}, not {config.vision.layers}")
        self.layer_widths = dict(enumerate(widths, start=1))
        self.attention_heads = 1

    def shallow_features(self, pixels: Tensor, last_layer: int, keep: Collection[int]) -> ShallowFeatures:
        """Run all stages."""
        final, stages = self.visual.trunk.forward_intermediates(pixels)
        maps = {layer: as_tokens(stage) for layer, stage in enumerate(stages, start=1) if layer in keep}
        tokens, grid = as_tokens(final)
        return ShallowFeatures(maps, tokens, grid, last_layer)

    def recognise(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
        """Embed the mean of the last features, weighted by the softmax of the bias."""
        means = weighted_means(features, attention_bias)
        # timm's head pools and normalises maps: each mean is a map of one position.
        pooled = self.visual.trunk.forward_head(means.flatten(0, 1)[:, :, None, None])
        return F.normalize(self.visual.head(pooled).unflatten(0, means.shape[:2]), dim=-1)

    def attended(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
        """Return the weight of each position, [B, 1, Q, h, w]."""
        return mean_weights(features, attention_bias).unflatten(-1, features.grid).unsqueeze(1)

    def blocks(self) -> list[nn.Module]:
        """Return the stages of the ConvNet."""
        trunk = self.visual.trunk
        return list(trunk.stages if hasattr(trunk, "stages") else trunk.blocks)

    def is_text(self, name: str) -> bool:
        """Return whether `name` is neither of the image tower nor the scale."""
        return not name.startswith("visual.") and name != "logit_scale"
