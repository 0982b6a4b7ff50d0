"""Configuration of backbones (CLIP's image and text towers), one class a family."""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Discriminator, Field, Tag

from opensan.config.base import Config, Count, LayerCount, Ratio
from opensan.errors import UserError


class VisionConfig(Config):
    """The CLIP image tower: a plain ViT with a class token."""

    width: Count
    layers: LayerCount
    heads: Count
    patch_size: Count
    image_size: Count
    """Side in pixels of the square image that the position table was trained for."""
    mlp_ratio: Ratio = 4.0


class TextConfig(Config):
    """The CLIP text tower: a transformer read at the end-of-text token."""

    width: Count
    layers: LayerCount
    heads: Count
    context_length: Count = 77
    vocab_size: Annotated[int, Field(gt=0, le=1_000_000)] = 49_408
    causal: bool = True
    """A token attends only to earlier ones, as in CLIP; in a bidirectional tower, to the whole prompt."""
    own_tokenizer: ClassVar[bool] = False
    """Whether the tower reads the tokens of a tokenizer.json rather than CLIP's."""
    padding: ClassVar[int | None] = None
    """The token that fills every prompt up to the context length; None: prompts are padded with zeros to the longest
    of a batch, which changes nothing."""


class ClipConfig(Config):
    """The family "clip_vit": a CLIP of two plain towers, as open_clip builds it."""

    kind: Literal["clip_vit"] = "clip_vit"
    embed_dim: Count
    quick_gelu: bool
    """OpenAI's weights need QuickGELU; a wrong value gives wrong results without an error."""
    vision: VisionConfig
    text: TextConfig

    def check_layers(self, recognition_layer: int) -> None:
        """Raise UserError if the tower can't be cut after `recognition_layer`, or its widths do not fit its heads."""
        for name, tower in (("vision", self.vision), ("text", self.text)):
            if tower.width % tower.heads:
                raise UserError(f"clip.{name}: width {tower.width} is not a multiple of heads {tower.heads}")
        if not 0 < recognition_layer < self.vision.layers:
            raise UserError(f"recognition_layer {recognition_layer} is not between 1 and {self.vision.layers - 1}")


class ResNetVisionConfig(Config):
    """The image tower of the family "clip_resnet": OpenAI's modified ResNet with attention pooling."""

    layers: tuple[LayerCount, LayerCount, LayerCount, LayerCount]
    """Bottlenecks of each stage."""
    width: Count = 64
    """Channels of the stem; the last stage gives 32 times as many."""
    image_size: Count = 224
    """Side in pixels of the square image that the pooling's position table was trained for."""


class ClipResNetConfig(Config):
    """The family "clip_resnet": a CLIP around a modified ResNet (RN50 and its like), as open_clip builds it."""

    kind: Literal["clip_resnet"]
    embed_dim: Count
    quick_gelu: bool
    """QuickGELU in the text tower. OpenAI's weights need it."""
    vision: ResNetVisionConfig
    text: TextConfig

    def check_layers(self, recognition_layer: int) -> None:
        """Raise UserError unless all five maps (stem and stages) are shallow and widths fit heads."""
        _check_all_shallow(recognition_layer, 4)
        if self.vision.width % 2 or self.text.width % self.text.heads:
            raise UserError("clip: vision.width must be even, and text.width a multiple of text.heads")


TimmName = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,80}$")]
"""Name of a model of timm: nothing that timm would take for an address."""


class SiglipTextConfig(Config):
    """The text tower of SigLIP: bidirectional, read at the last of all positions, with a tokenizer of its own."""

    kind: Literal["siglip_text"]
    width: Count
    layers: LayerCount
    heads: Count
    context_length: Count = 64
    vocab_size: Annotated[int, Field(gt=0, le=1_000_000)] = 32_000
    padding: Annotated[int, Field(ge=0)] = 1
    """The token that fills a prompt up to `context_length`: 1 in SigLIP, 0 in SigLIP 2."""
    tanh_gelu: bool = False
    """GELU by its tanh approximation, as in SigLIP 2."""
    own_tokenizer: ClassVar[bool] = True
    causal: ClassVar[bool] = False


class PooledVitVisionConfig(Config):
    """The image tower of the family "vit_pooled"."""

    model: TimmName
    """Name of a timm model, which defines the shape: vit_base_patch16_siglip_224, vit_pe_core_base_patch16_224, ..."""
    layers: LayerCount
    """Blocks of that model."""
    projection: bool
    """Whether a linear layer follows the pooling, as in Perception Encoder, but not in SigLIP."""


class PooledVitConfig(Config):
    """The family "vit_pooled": a ViT that is read by attention pooling, as open_clip builds it around timm's."""

    kind: Literal["vit_pooled"]
    embed_dim: Count
    vision: PooledVitVisionConfig
    text: Annotated[
        Annotated[TextConfig, Tag("clip_text")] | Annotated[SiglipTextConfig, Tag("siglip_text")],
        Discriminator(lambda value: _kind(value, "clip_text")),
    ]

    def check_layers(self, recognition_layer: int) -> None:
        """Raise UserError unless all blocks are shallow and the text tower's width fits its heads."""
        _check_all_shallow(recognition_layer, self.vision.layers)
        if self.text.width % self.text.heads:
            raise UserError(f"clip.text: width {self.text.width} is not a multiple of heads {self.text.heads}")


class EvaVisionConfig(Config):
    """The image tower of the family "eva_clip"."""

    model: TimmName
    """Name of a timm model, which defines the shape: eva02_base_patch16_clip_224, ..."""
    layers: LayerCount
    """Blocks of that model."""


class EvaClipConfig(Config):
    """The family "eva_clip": EVA-CLIP, a ViT of timm's that is read at its class token, as open_clip builds it."""

    kind: Literal["eva_clip"]
    embed_dim: Count
    vision: EvaVisionConfig
    text: TextConfig

    def check_layers(self, recognition_layer: int) -> None:
        """Raise UserError if the tower can't be cut after `recognition_layer`, or the text's width does not fit."""
        if not 0 < recognition_layer < self.vision.layers:
            raise UserError(f"recognition_layer {recognition_layer} is not between 1 and {self.vision.layers - 1}")
        if self.text.width % self.text.heads:
            raise UserError(f"clip.text: width {self.text.width} is not a multiple of heads {self.text.heads}")


class ConvNetVisionConfig(Config):
    """The image tower of the family "convnet"."""

    model: TimmName
    """Name of a timm model, which defines the shape: convnext_base, ..."""
    layers: LayerCount
    """Stages of that model."""
    head: Literal["linear", "mlp"]
    """The head after the pooling."""


class ConvNetConfig(Config):
    """The family "convnet": a ConvNet of timm with a linear head beside CLIP's text tower, as open_clip builds it."""

    kind: Literal["convnet"]
    embed_dim: Count
    quick_gelu: bool = False
    """QuickGELU in the text tower."""
    vision: ConvNetVisionConfig
    text: TextConfig

    def check_layers(self, recognition_layer: int) -> None:
        """Raise UserError unless all stages are shallow and the text tower's width fits its heads."""
        _check_all_shallow(recognition_layer, self.vision.layers)
        if self.text.width % self.text.heads:
            raise UserError(f"clip.text: width {self.text.width} is not a multiple of heads {self.text.heads}")


class AlignVisionConfig(Config):
    """ALIGN's image tower, an EfficientNet; the defaults are ALIGN-base's, EfficientNet-B7."""

    image_size: Count = 289
    width_coefficient: Ratio = 2.0
    depth_coefficient: Ratio = 3.1
    depthwise_padding: tuple[int, ...] = ()
    """Blocks with another padding of their convolution (transformers' field of that name)."""
    layers: LayerCount = 5
    """Maps before a halving of the resolution, and the last."""


class AlignTextConfig(Config):
    """ALIGN's text tower, a BERT; the defaults are ALIGN-base's."""

    width: Count = 768
    layers: LayerCount = 12
    heads: Count = 12
    mlp_channels: Count = 3_072
    positions: Count = 512
    context_length: Count = 64
    """Tokens that are read of a prompt."""
    vocab_size: Annotated[int, Field(gt=0, le=1_000_000)] = 30_522
    own_tokenizer: ClassVar[bool] = True
    causal: ClassVar[bool] = False
    padding: ClassVar[int | None] = 0


AnyTextConfig = TextConfig | SiglipTextConfig | AlignTextConfig
"""Configuration of any text tower."""


class AlignConfig(Config):
    """The family "align": ALIGN, as transformers builds it."""

    kind: Literal["align"]
    embed_dim: Count = 640
    vision: AlignVisionConfig = Field(default_factory=AlignVisionConfig)
    text: AlignTextConfig = Field(default_factory=AlignTextConfig)

    def check_layers(self, recognition_layer: int) -> None:
        """Raise UserError unless all layers are shallow and the text tower's width fits its heads."""
        _check_all_shallow(recognition_layer, self.vision.layers)
        if self.text.width % self.text.heads:
            raise UserError(f"clip.text: width {self.text.width} is not a multiple of heads {self.text.heads}")


class EfficientNetLiteConfig(Config):
    """The family "efficientnet_lite": a ConvNet with a linear head, beside CLIP's text tower."""

    kind: Literal["efficientnet_lite"]
    variant: Literal["lite0", "lite1", "lite2"]
    embed_dim: Count
    text: TextConfig

    def check_layers(self, recognition_layer: int) -> None:
        """Raise UserError unless all three maps (strides 8, 16, 32) are shallow and the text tower's width fits."""
        _check_all_shallow(recognition_layer, 3)
        if self.text.width % self.text.heads:
            raise UserError(f"clip.text: width {self.text.width} is not a multiple of heads {self.text.heads}")


def _check_all_shallow(recognition_layer: int, layers: int) -> None:
    if recognition_layer != layers:
        raise UserError(
            f"recognition_layer {recognition_layer} is not {layers}: this kind of backbone recognises by pooling what "
            "its last layer gives"
        )


def _kind(value: object, unnamed: str = "clip_vit") -> object:
    """Return the kind of a configuration, given as data or as an object."""
    return value.get("kind", unnamed) if isinstance(value, dict) else getattr(value, "kind", unnamed)


AnyClipConfig = Annotated[
    Annotated[ClipConfig, Tag("clip_vit")]
    | Annotated[ClipResNetConfig, Tag("clip_resnet")]
    | Annotated[PooledVitConfig, Tag("vit_pooled")]
    | Annotated[EvaClipConfig, Tag("eva_clip")]
    | Annotated[ConvNetConfig, Tag("convnet")]
    | Annotated[AlignConfig, Tag("align")]
    | Annotated[EfficientNetLiteConfig, Tag("efficientnet_lite")],
    Discriminator(_kind),
]
"""Configuration of a backbone: one class a family, distinguished by `kind`; without a kind, it is "clip_vit"."""

KINDS = {member.__metadata__[0].tag for member in get_args(get_args(AnyClipConfig)[0])}
"""The families of backbones."""
