"""The family "align": ALIGN's EfficientNet and BERT, both the modules of transformers.

The image embedding is the mean of the last features, so a query's is their mean weighted by the softmax of its bias.
Letters: B batch, Q queries, L positions, C channels, D embedding, P prompts, T tokens.
"""

from collections.abc import Collection
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import AlignConfig
from opensan.errors import UserError
from opensan.model.backbones.base import Backbone, ShallowFeatures, as_tokens, mean_weights, weighted_means
from opensan.model.backbones.libraries import library


class Align(Backbone):
    """Layers 1, 2, ... are the maps before each halving of the resolution, and the last one."""

    file_prefix = "model."

    def __init__(self, config: AlignConfig) -> None:
        super().__init__()
        transformers = library("transformers", "transformers")
        vision, text = config.vision, config.text
        own = transformers.AlignConfig(
            projection_dim=config.embed_dim,
            vision_config={
                "image_size": vision.image_size,
                "width_coefficient": vision.width_coefficient,
                "depth_coefficient": vision.depth_coefficient,
                "depthwise_padding": list(vision.depthwise_padding),
                "hidden_dim": config.embed_dim,
            },
            text_config={
                "vocab_size": text.vocab_size,
                "hidden_size": text.width,
                "num_hidden_layers": text.layers,
                "num_attention_heads": text.heads,
                "intermediate_size": text.mlp_channels,
                "max_position_embeddings": text.positions,
                "pad_token_id": 0,
            },
        )
        self.model: Any = transformers.AlignModel(own)
        blocks: list[Any] = list(self.blocks())
        halves = [number for number, block in enumerate(blocks) if number and _stride(block) == 2]
        self._last_of_layer = [number - 1 for number in halves] + [len(blocks) - 1]
        if len(self._last_of_layer) != vision.layers:
            raise UserError(
                f"clip.vision.layers: ALIGN's image tower has {len(self._last_of_layer)}, not {vision.layers}"
            )
        self.layer_widths = {
            layer: blocks[number].projection.project_bn.num_features
            for layer, number in enumerate(self._last_of_layer, start=1)
        }
        if self.layer_widths[vision.layers] != config.embed_dim:
            raise UserError(
                f"clip.embed_dim: ALIGN's image tower gives {self.layer_widths[vision.layers]}, not {config.embed_dim}"
            )
        self.attention_heads = 1

    @property
    def logit_scale(self) -> Tensor:  # type: ignore[override]  # the base's is a parameter; both are only read
        """Logarithm of the inverse of ALIGN's temperature."""
        return -self.model.temperature.log()

    def shallow_features(self, pixels: Tensor, last_layer: int, keep: Collection[int]) -> ShallowFeatures:
        """Run all blocks."""
        x, maps = self.model.vision_model.embeddings(pixels), {}
        for number, block in enumerate(self.blocks()):
            x = block(x)
            if number in self._last_of_layer and (layer := self._last_of_layer.index(number) + 1) in keep:
                maps[layer] = as_tokens(x)
        tokens, grid = as_tokens(x)
        return ShallowFeatures(maps, tokens, grid, last_layer)

    def recognise(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
        """Embed the mean of the last features, weighted by the softmax of the bias."""
        return F.normalize(weighted_means(features, attention_bias), dim=-1)

    def attended(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
        """Return the weight of each position, [B, 1, Q, h, w]."""
        return mean_weights(features, attention_bias).unflatten(-1, features.grid).unsqueeze(1)

    def embed_prompts(self, tokens: Tensor) -> Tensor:
        """Embed `tokens` [P, T], padded with 0, as unit rows [P, D]."""
        output = self.model.text_model(input_ids=tokens, attention_mask=(tokens != 0).long())
        return F.normalize(self.model.text_projection(output.last_hidden_state[:, 0]), dim=-1)

    def token_table(self) -> Tensor:
        """Return the embedding of every token, [V, C]. That of the padding (0) is zero."""
        return self.model.text_model.embeddings.word_embeddings.weight

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the EfficientNet."""
        return list(self.model.vision_model.encoder.blocks)

    def is_text(self, name: str) -> bool:
        """Return whether `name` belongs to BERT or its projection."""
        return name.startswith("model.text_")


def _stride(block: Any) -> int:
    return block.depthwise_conv.depthwise_conv.stride[0]
