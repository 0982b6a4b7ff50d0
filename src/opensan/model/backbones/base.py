"""The base class of backbones: frozen image-text models that give a SAN features and classify its proposals.

Letters: B batch, Q queries, N channel groups of the attention bias, L positions, C channels, D embedding,
P prompts, T tokens, h w a grid.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from opensan.model.maps import adaptive_max_pool
from opensan.structures import PromptTree


class FeatureMap(NamedTuple):
    """The output of one layer of the image tower, on the layer's own grid."""

    tokens: Tensor
    """[B, L, C]; C may differ from layer to layer."""
    grid: tuple[int, int]
    """(h, w), L = h * w."""


@dataclass(frozen=True)
class ShallowFeatures:
    """Results of the shallow layers of an image tower."""

    maps: dict[int, FeatureMap]
    """Layer number -> its map, for the fusion."""
    tokens: Tensor
    """[B, T, C]: the input of recognition, in the family's form (a ViT's class token first)."""
    grid: tuple[int, int]
    """(h, w) of the last shallow layer."""
    last_layer: int
    """The number of the last shallow layer."""


class Backbone(nn.Module):
    """Base class of all backbones. A family subclasses it in a file of its own; `SAN` knows only this class.

    Layers of the image tower count from 1; layer 0, if the family has it, is the input of the first one. All of a
    backbone is frozen and in evaluation mode, except the parameters that `trained_names` lists.
    """

    layer_widths: dict[int, int]
    """Layer number -> channels C of its map: all layers that a fusion may read."""
    attention_heads: int
    """N, the channel groups of the attention bias: each head of a ViT has its own; a pooling without heads has 1."""
    logit_scale: Tensor
    """A scalar parameter: the logarithm of the factor between cosines and class logits."""
    file_prefix: str = ""
    """The beginning that names of parameters have here, and not in the files of the family's own library."""

    def shallow_features(self, pixels: Tensor, last_layer: int, keep: Collection[int]) -> ShallowFeatures:
        """Run layers up to `last_layer` on `pixels` [B, 3, H, W], float RGB normalised; keep the maps in `keep`.

        The pixels are the SAN's padded image resized by `ModelConfig.clip_scale`: H and W are any numbers large enough
        for a grid of one position, and a batch answers as its images would one by one.
        """
        raise NotImplementedError

    def recognise(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
        """Embed the region that each query attends to: unit mask embeddings [B, Q, D].

        `attention_bias` [B, N, Q, h', w'] is on the side network's grid and real-valued; it is brought to the tower's
        (`pool_bias`) and steers where each of the Q queries looks. With a bias of zeros,
        all are the tower's own image embedding.
        """
        raise NotImplementedError

    def attended(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor | None:
        """Return how much each query of `recognise` takes from each position of the grid, [B, N, Q, h, w].

        The mean over the recognition layers; 0 or more, at most 1 in sum. None if the family does not tell.
        """
        return None

    def last_features(self, features: ShallowFeatures) -> Tensor:
        """Run the remaining layers unsteered: every patch's features in the joint space, [B, L, D]. Plain ViTs only."""
        raise NotImplementedError

    def embed_prompts(self, tokens: Tensor) -> Tensor:
        """Embed prompts: `tokens` [P, T] int64 -> unit rows [P, D] in the space of `recognise`."""
        raise NotImplementedError

    def embed_prompt_tree(self, tree: PromptTree) -> Tensor:
        """Embed the prompts of `tree` as `embed_prompts` does, shared beginnings once: [P, D].

        For causal towers only (`config.clip.text.causal`), in which a token of a prompt attends only to earlier ones.
        """
        raise NotImplementedError

    def token_table(self) -> Tensor:
        """Return the embedding of every token, [V, C]; a row of zeros is a token that was never trained."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Return the modules of the image tower, in order, to checkpoint, shard and compile separately."""
        raise NotImplementedError

    def trained_names(self) -> Collection[str]:
        """Return the names of the backbone's own parameters that are trained with the SAN, without weight decay."""
        return ()

    def is_text(self, name: str) -> bool:
        """Return whether the parameter or buffer `name` of the backbone belongs to the text tower."""
        raise NotImplementedError


def as_tokens(maps: Tensor) -> FeatureMap:
    """Return a map of channels, [B, C, h, w], as tokens [B, h * w, C] with their grid."""
    return FeatureMap(maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3]))


def pool_bias(attention_bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bring `attention_bias` [B, N, Q, h', w'] to `grid` by the maximum of each window: [B, N, Q, h * w]."""
    pooled = adaptive_max_pool(attention_bias.flatten(0, 1), grid)
    return pooled.view(*attention_bias.shape[:3], -1)


def weighted_means(features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
    """Return means [B, Q, C] of the last features, weighted by the softmax of `attention_bias` [B, 1, Q, ...].

    A bias that is equal everywhere gives the plain mean.
    """
    return mean_weights(features, attention_bias) @ features.tokens


def mean_weights(features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
    """Return the weights [B, Q, L] of `weighted_means`; they sum to 1."""
    return pool_bias(attention_bias, features.grid).softmax(dim=-1).mean(dim=1)
