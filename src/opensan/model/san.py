"""SAN in two halves: the image half makes proposals of an image; the text half classifies them with words.

Words enter only at the last matrix product, so proposals can be kept and classified with any other words.
Letters: B batch, Q queries, K words, R text rows, D embedding, N attention heads, h w stride-16 grid.
"""

import copy
from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import ImageConfig, ModelConfig
from opensan.model.backbones import build_backbone
from opensan.model.backbones.base import Backbone, ShallowFeatures
from opensan.model.fusion import build_fusion
from opensan.model.side_adapter import ClassHead, DecoupledHead, MaskHead, SharedHead, SideAdapter
from opensan.structures import PromptTree, Proposals, TextClassifier

BLOCKED = -100.0
"""Bias on the attention logits of patches outside a mask: exp(-100) vanishes in float32."""


class TrainedParameter(NamedTuple):
    """A parameter that training changes."""

    name: str
    parameter: nn.Parameter
    decayed: bool
    """Whether weight decay applies to it."""


class SAN(nn.Module):
    """The Side Adapter Network (Xu et al., CVPR 2023) around a backbone of any family.

    Trained are `side_adapter`, `no_object_embedding` and the backbone's `trained_names` (CLIP's position table);
    all else is frozen. The backbone's attribute is called `clip`, as its parameters are in checkpoints.
    """

    def __init__(self, config: ModelConfig, *, backbone: Backbone, side_adapter: SideAdapter) -> None:
        super().__init__()
        self.config = config
        self.clip = backbone
        self.tokenizer: bytes | None = None
        """The content of tokenizer.json, of a text tower that does not read CLIP's tokens."""
        self.side_adapter = side_adapter
        self.no_object_embedding = nn.Parameter(torch.empty(1, config.clip.embed_dim))
        nn.init.normal_(self.no_object_embedding, std=config.clip.embed_dim**-0.5)
        self.clip.requires_grad_(False)
        for name in self._trained_clip():
            self.clip.get_parameter(name).requires_grad_(True)

    def _trained_clip(self) -> Collection[str]:
        """Return the names of the backbone's parameters that are trained, by the configuration."""
        if self.config.trained_clip == "none":
            return ()
        if self.config.trained_clip == "position":
            return self.clip.trained_names()
        return [
            name for name, _ in self.clip.named_parameters() if not self.clip.is_text(name) and name != "logit_scale"
        ]

    def train(self, mode: bool = True) -> "SAN":
        """Set the mode of the trained parts; the frozen backbone stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

    @property
    def image_config(self) -> ImageConfig:
        """Settings that turn an image into the input of `propose`."""
        return self.config.image

    def blocks(self) -> list[nn.Module]:
        """Return the modules to checkpoint, shard, narrow and compile separately: the side network's first."""
        return [*self.side_adapter.blocks, *self.clip.blocks()]

    def trained(self) -> list[TrainedParameter]:
        """Return the parameters that require a gradient.

        Weight decay excludes torch's LayerNorms, the query embeddings and the position tables, the backbone's included;
        the fusion's channel norms, biases, the no-object embedding and the bias scale are decayed (official behaviour).
        """
        spared = {f"side_adapter.{table}" for table in ("query_embedding", "query_position", "patch_position")}
        spared |= {f"clip.{name}" for name in self.clip.trained_names()}
        spared |= {
            f"{name}.{leaf}"
            for name, module in self.named_modules()
            if isinstance(module, nn.LayerNorm) and not name.endswith(".channel_norm")
            for leaf in ("weight", "bias")
        }
        return [
            TrainedParameter(name, parameter, name not in spared)
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        ]

    def snapshot(self) -> "SAN":
        """Return a copy for inference: frozen, in evaluation mode; this model is unchanged.

        What training may change (parameters that require a gradient) is copied, as are matrices laid out for oneDNN;
        all else, which is most of it, shares its memory with this model.
        """
        memo: dict[int, object] = {id(self.config): self.config}
        for parameter in self.parameters():
            values = parameter.detach()
            values = values.to_dense() if values.is_mkldnn else values
            values = values.clone() if parameter.requires_grad else values
            memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
        memo |= {id(buffer): buffer.detach() for buffer in self.buffers()}
        return copy.deepcopy(self, memo).eval()

    def propose(self, pixels: Tensor, *, supervise: bool = False, features: ShallowFeatures | None = None) -> Proposals:
        """Encode images.

        Args:
            pixels: [B, 3, H, W] float RGB, normalised with the config's mean and std and zero-padded,
                H and W multiples of `image.size_divisor` (see `opensan.images.prepare`).
            supervise: also return those of earlier supervised side blocks (`Proposals.auxiliary`), for training.
            features: what `shallow_features` answers for `pixels`, if that is known already.

        Returns:
            Proposals: mask logits [B, Q, h, w], unit mask embeddings [B, Q, D], attention bias [B, N, Q, h, w].
        """
        config = self.config
        features = features or self.shallow_features(pixels)
        blocks = config.side_adapter.supervised_blocks if supervise else config.side_adapter.supervised_blocks[-1:]
        masks, steering = zip(*self.side_adapter(pixels, features.maps, blocks), strict=True)
        # Queries do not attend to each other in recognition, so those of all supervised blocks share one pass.
        embeddings = self._recognise(pixels, features, torch.cat(steering, dim=-3 if steering[0].ndim == 5 else 1))
        biases = steering if config.recognition == "bias" else [None] * len(blocks)
        answers = [
            Proposals(mask_logits=mask, mask_embeddings=embedding, attention_bias=bias)
            for mask, embedding, bias in zip(masks, embeddings.chunk(len(blocks), dim=1), biases, strict=True)
        ]
        last = answers[-1]
        return Proposals(last.mask_logits, last.mask_embeddings, last.attention_bias, auxiliary=tuple(answers[:-1]))

    def attended(self, pixels: Tensor) -> Tensor | None:
        """Return how much each proposal's embedding takes from each position of CLIP's grid: [B, N, Q, h, w].

        The attention weights of the SLS tokens, a mean over the recognition layers. None if recognition has no such
        tokens, or the backbone's family does not tell. `pixels` as for `propose`.
        """
        if self.config.recognition not in ("bias", "blocked"):
            return None
        features = self.shallow_features(pixels)
        ((_, steering),) = self.side_adapter(pixels, features.maps, self.config.side_adapter.supervised_blocks[-1:])
        return self.clip.attended(*self._steered(pixels, features, steering))

    def shallow_features(self, pixels: Tensor) -> ShallowFeatures:
        """Run the shallow layers on pixels [B, 3, H, W] (as for `propose`), resized by `clip_scale`.

        The scale factor itself sets the sampling grid, not the ratio of rounded sizes (official behaviour). Where
        neither fusion nor recognition reads them, nothing is run.
        """
        config = self.config
        if not config.side_adapter.fusion and (config.recognition == "queries" or config.recognition_scale is not None):
            return ShallowFeatures({}, pixels.new_empty(len(pixels), 0, 0), (0, 0), config.recognition_layer)
        return self._shallow(pixels, config.clip_scale, set(config.side_adapter.fusion.values()))

    def _shallow(self, pixels: Tensor, scale: float, keep: Collection[int]) -> ShallowFeatures:
        small = _resized(pixels, scale, self.config.image.size_divisor)
        return self.clip.shallow_features(small, self.config.recognition_layer, keep)

    def _recognise(self, pixels: Tensor, features: ShallowFeatures, steering: Tensor) -> Tensor:
        """Embed the proposals, [B, Q, D], in the way that the configuration names; `steering` is the head's."""
        config = self.config
        if config.recognition == "queries":
            return F.normalize(steering, dim=-1)
        if config.recognition == "pooling":
            if config.recognition_scale is not None:
                features = self._shallow(pixels, config.recognition_scale, ())
            return pooled_embeddings(self.clip, features, steering.squeeze(1))
        return self.clip.recognise(*self._steered(pixels, features, steering))

    def _steered(self, pixels: Tensor, features: ShallowFeatures, steering: Tensor) -> tuple[ShallowFeatures, Tensor]:
        """Return the arguments of the backbone's `recognise`."""
        config = self.config
        if config.recognition_scale is not None:
            features = self._shallow(pixels, config.recognition_scale, ())
        if config.recognition == "blocked":
            steering = torch.where(steering >= 0, 0.0, BLOCKED)
        side = config.side_adapter
        if config.recognition == "blocked" or side.head == "shared" or not side.bias_per_head:
            steering = steering.repeat_interleave(self.clip.attention_heads, dim=1)
        return features, steering

    def classify(self, proposals: Proposals, text: TextClassifier) -> Tensor:
        """Return class logits [B, Q, K + 1] of the proposals, "no object" last.

        A class's logit is that of its best row, so that a synonym can only raise it. Rows that are equal give exactly
        equal logits: a matrix product alone may differ in the last bit from one column to the next.
        """
        scale = self.clip.logit_scale.exp()
        embeddings = proposals.mask_embeddings.to(text.rows.dtype)
        words = embeddings @ (scale * text.rows).T  # [B, Q, R]
        if text.first_equal is not None:
            words = words[..., text.first_equal]
        if text.rows.shape[0] != text.num_classes:
            index = text.row_class.to(words.device).expand_as(words)
            empty = words.new_full((*words.shape[:2], text.num_classes), -torch.inf)
            words = empty.scatter_reduce(2, index, words, "amax")
        no_object = embeddings @ (scale * self.no_object_row()).T
        return torch.cat([words, no_object], dim=-1)

    def no_object_row(self) -> Tensor:
        """Return the learned "no object" text row, [1, D], unit length."""
        return F.normalize(self.no_object_embedding, dim=-1)

    def embed_prompts(self, tokens: Tensor) -> Tensor:
        """Return unit text embeddings [P, D] of `tokens` [P, T] int64, T up to the context length."""
        return self.clip.embed_prompts(tokens)

    def embed_prompt_tree(self, tree: PromptTree) -> Tensor:
        """Return unit text embeddings [P, D] of the prompts of `tree`; for causal text towers only."""
        return self.clip.embed_prompt_tree(tree)


def _resized(pixels: Tensor, scale: float, divisor: int) -> Tensor:
    """Resize pixels, whose sides are multiples of `divisor`, by a factor."""
    if scale == 1:
        return pixels
    if torch.compiler.is_exporting() and (scale * divisor).is_integer():
        # The same, by whole numbers: the symbols of sizes stay simple, so that an export takes seconds, not minutes.
        size = [side // divisor * int(scale * divisor) for side in pixels.shape[2:]]
        return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return F.interpolate(pixels, scale_factor=scale, mode="bilinear", align_corners=False)


def build_san(config: ModelConfig) -> SAN:
    """Build a SAN with random weights (torch's global generator), in evaluation mode."""
    return san_around(config, build_backbone(config.clip)).eval()


def san_around(config: ModelConfig, backbone: Backbone) -> SAN:
    """Build a SAN around a backbone; its side adapter has random weights (torch's global generator)."""
    side = config.side_adapter
    fusion = build_fusion(side, backbone.layer_widths)
    adapter = SideAdapter(side, fusion=fusion, head=lambda: _build_head(config, backbone))
    return SAN(config, backbone=backbone, side_adapter=adapter)


def _build_head(config: ModelConfig, backbone: Backbone) -> MaskHead:
    side = config.side_adapter
    if config.recognition == "queries":
        return ClassHead(side, config.clip.embed_dim)
    if config.recognition != "bias":
        return MaskHead(side)
    if side.head == "shared":
        return SharedHead(side)
    groups = backbone.attention_heads if side.bias_per_head else 1
    layers = len(backbone.blocks()) - config.recognition_layer if side.bias_per_layer else 1
    return DecoupledHead(side, groups * layers)


def pooled_embeddings(clip: Backbone, features: ShallowFeatures, mask_logits: Tensor) -> Tensor:
    """Embed proposals by the mean of CLIP's last patch features, weighted by their masks: [B, Q, D].

    The recognition layers run as in plain CLIP; the masks, [B, Q, h', w'], are resized bilinearly to its grid.
    """
    x = clip.last_features(features)
    resized = F.interpolate(mask_logits, size=features.grid, mode="bilinear", align_corners=False)
    weights = resized.sigmoid().flatten(2)
    means = weights @ x / weights.sum(dim=2, keepdim=True).clamp(min=1e-6)
    return F.normalize(means, dim=-1)
