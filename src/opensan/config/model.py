"""Configuration of a SAN: its backbone, its side adapter, and how images are read."""

from collections.abc import Collection
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from opensan.config.base import Config, Count, Deviation, LayerCount, LayerNumber, PixelValue, Ratio
from opensan.config.encoders import AnyClipConfig
from opensan.errors import UserError


class SideAdapterConfig(Config):
    """The side network (paper, section 3.2) and its two decoupled heads (section 3.3)."""

    width: Count = 240
    depth: LayerCount = 8
    heads: Count = 6
    mlp_ratio: Ratio = 4.0
    patch_size: Count = 16
    image_size: Count = 640
    """Side in pixels of the square image that the position table is made for."""
    queries: Count = 100
    fusion: dict[LayerNumber, LayerNumber]
    """Side block -> CLIP layer whose patch map is fused into that block's output (0: the input)."""
    fusion_kind: Literal["add", "gated", "cross-attention"] = "add"
    """How a layer is fused: its projection is added to the patch tokens, or added times a learned gate, or the patch
    tokens attend to it."""
    head: Literal["decoupled", "shared"] = "decoupled"
    """Whether the attention bias has a path of its own, or is the mask logits, scaled."""
    bias_per_head: bool = True
    """Whether each of CLIP's heads has a bias of its own."""
    bias_per_layer: bool = False
    """Whether each recognition layer has a bias of its own."""
    cut_gradient: bool = False
    """Whether the recognition's gradient stops before the proposals: it trains the head of the bias alone."""
    supervised_blocks: tuple[LayerNumber, ...] = (7, 8)
    """Side blocks whose output the heads read in training; the last one is used in inference."""
    mask_channels: Count = 256
    mlp_channels: Count = 256
    mlp_layers: LayerCount = 3
    unwritten: ClassVar[Collection[str]] = ("head", "bias_per_head", "bias_per_layer", "cut_gradient")


class ImageConfig(Config):
    """Conversion of an image to network input."""

    short_side: Count = 640
    long_side: Count = 2_560
    """Limit of the long side; it overrides the short side."""
    size_divisor: Count = 32
    """Both sides are zero-padded (bottom, right, after normalisation) to a multiple of this."""
    mean: tuple[PixelValue, PixelValue, PixelValue] = (122.7709383, 116.7460125, 104.09373615)
    std: tuple[Deviation, Deviation, Deviation] = (68.5005327, 66.6321579, 70.32316305)


REST_SHARE = 0.5
"""The default of `ModelConfig.rest_share`: see docs/results.md for others, and for contrast words in its place."""

MOST_REST = 10.0
"""The highest `ModelConfig.rest_share`."""


class ModelConfig(Config):
    """Everything needed to build a SAN; the content of a checkpoint folder's config.json."""

    name: str
    clip: AnyClipConfig
    """The backbone: the frozen image-text model."""
    side_adapter: SideAdapterConfig
    recognition_layer: LayerNumber
    """CLIP layers up to this one are shallow (features); the later ones recognise proposals."""
    clip_scale: Annotated[float, Field(ge=1 / 64, le=4)] = 0.5
    """The CLIP image is the padded image times this factor."""
    recognition: Literal["bias", "blocked", "pooling", "queries"] = "bias"
    """How proposals are recognised: CLIP's attention has a learned bias, or is blocked outside the mask; CLIP's last
    features are averaged over the mask; or not by CLIP, but by an embedding that the queries themselves give."""
    recognition_scale: Annotated[float, Field(ge=1 / 64, le=4)] | None = None
    """Recognition runs CLIP once more, on the padded image times this factor; None: one forward pass serves both."""
    trained_clip: Literal["none", "position", "whole"] = "position"
    """The part of CLIP's image tower that is trained too: nothing, its position table, or all of it."""
    image: ImageConfig = Field(default_factory=ImageConfig)
    rest_share: Annotated[float, Field(gt=0, le=MOST_REST)] = REST_SHARE
    """Factor by which "none of these" gets the probability of "no object". The identity does not depend on it."""
    format: Literal[1] = 1
    unwritten: ClassVar[Collection[str]] = ("recognition", "recognition_scale", "trained_clip", "rest_share")

    @model_validator(mode="after")
    def _fits_together(self) -> "ModelConfig":
        side = self.side_adapter
        if side.width % side.heads:
            raise UserError(f"side_adapter: width {side.width} is not a multiple of heads {side.heads}")
        self.clip.check_layers(self.recognition_layer)
        for block, layer in side.fusion.items():
            if block >= side.depth or layer > self.recognition_layer:
                raise UserError(
                    f"side_adapter.fusion {block}: {layer} needs a side block below {side.depth} "
                    f"and a CLIP layer up to {self.recognition_layer}"
                )
        if not side.supervised_blocks or side.supervised_blocks[-1] != side.depth:
            raise UserError(f"side_adapter.supervised_blocks must end with the last block, {side.depth}")
        self._check_recognition()
        return self

    def _check_recognition(self) -> None:
        """Raise UserError for a choice that the others leave nothing to do, or that the backbone does not have."""
        side, kind, own = self.side_adapter, self.clip.kind, self.recognition
        biased = own == "bias" and side.head == "decoupled"
        if not biased and (side.bias_per_layer or not side.bias_per_head or (own != "bias" and side.head == "shared")):
            raise UserError(
                f"side_adapter.head {side.head}, bias_per_head and bias_per_layer are about a bias that recognition "
                f"{own} with this head does not have: leave them at decoupled, true and false"
            )
        if side.cut_gradient and own in ("blocked", "queries"):
            raise UserError(f"side_adapter.cut_gradient: recognition {own} sends no gradient through masks or biases")
        if own == "queries" and self.recognition_scale is not None:
            raise UserError("recognition_scale: recognition by queries runs no CLIP")
        if kind != "clip_vit" and (side.bias_per_layer or own == "pooling"):
            raise UserError(f"bias_per_layer and recognition pooling need a plain ViT (clip_vit), not {kind}")
