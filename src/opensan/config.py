"""Configuration of models as plain data: read from JSON, checked, and never executed.

Block and layer numbers count from 1; 0 means "the input of the first block".
"""

import difflib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from opensan.errors import UserError, short

# Limits far above any real model, so that a number in someone's file can't cause unbounded memory use.
Count = Annotated[int, Field(gt=0, le=65_536)]
LayerCount = Annotated[int, Field(gt=0, le=1_024)]
LayerNumber = Annotated[int, Field(ge=0, le=1_024)]
Ratio = Annotated[float, Field(ge=1 / 64, le=64)]
PixelValue = Annotated[float, Field(ge=-1_000, le=1_000)]
"""A mean of pixel values, which are 0 to 255."""
Deviation = Annotated[float, Field(ge=0.001, le=10_000)]
"""A standard deviation of pixel values. The pixels are divided by it."""
Weight = Annotated[float, Field(ge=0, le=1_000_000)]
"""A factor, for example of a loss."""

CONFIG_NAME = "config.json"
"""Name of the configuration file in a model's folder."""
TOKENIZER_NAME = "tokenizer.json"
"""Name of a file beside the weights of a model whose text tower does not read CLIP's tokens."""
EXPORT_NAME = "export.json"
"""Name of a file that only an exported model's folder has."""


class Config(BaseModel):
    """Base of all configuration: immutable; an unknown key is an error, and so is a number that is NaN or infinite.

    The strings below fields describe them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    unwritten: ClassVar[Collection[str]] = ()
    """Later fields, written only where they differ from the default, so that a model keeps its identity."""

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        data = handler(self)
        defaults = {name for name in self.unwritten if getattr(self, name) == fields[name].default}
        return {name: value for name, value in data.items() if name not in defaults}


ConfigT = TypeVar("ConfigT", bound=Config)


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
    vision: AlignVisionConfig = AlignVisionConfig()
    text: AlignTextConfig = AlignTextConfig()

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
_TAGS = KINDS | {"clip_text", "siglip_text"}


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
    image: ImageConfig = ImageConfig()
    format: Literal[1] = 1
    unwritten: ClassVar[Collection[str]] = ("recognition", "recognition_scale", "trained_clip")

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


def parse_config(kind: type[ConfigT], data: object, source: str) -> ConfigT:
    """Validate `data` (parsed JSON or YAML) as `kind`. Raises ValueError, one line, naming `source` and the key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        errors = error.errors()
        # A misspelt key is also a missing one; the misspelling is the better message.
        first = next((error_entry for error_entry in errors if error_entry["type"] == "extra_forbidden"), errors[0])
        loc = tuple(part for part in first["loc"] if part not in _TAGS)  # pydantic adds which kind it took
        where = ".".join(short(str(part))[1:-1] for part in loc) or "top level"
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: {where}: no such key{_nearest_key(kind, loc)}") from None
        if first["type"] == "union_tag_invalid":
            known = ", ".join(sorted(KINDS))
            raise UserError(f"{source}: {where}.kind: {first['ctx']['tag']!r} is not one of {known}") from None
        problem = first["msg"].removeprefix("Value error, ")
        given = f", not {short(first['input'])}" if isinstance(first["input"], str | int | float) else ""
        raise UserError(f"{source}: {where}: {problem}{given}") from None


def _nearest_key(kind: type[Config], location: tuple[int | str, ...]) -> str:
    """Return a hint for an unknown key: the most similar known key, else all known keys at its level."""
    parts = [part for part in location if isinstance(part, str)]
    known = list(dotted_keys(kind))
    if near := difflib.get_close_matches(".".join(parts), known, n=1):
        return f" (the nearest is {near[0]})"
    beside = [key.split(".")[-1] for key in known if key.split(".")[:-1] == parts[:-1]]
    return f" (known: {', '.join(beside)})" if beside else ""


def dotted_keys(kind: type[Config]) -> Iterator[str]:
    """Yield all keys of a configuration: "loop", "loop.steps", ...; those of a list's members without a number."""
    for name, field in kind.model_fields.items():
        yield name
        for member in configs_in(field.annotation):
            yield from (f"{name}.{key}" for key in dotted_keys(member))


def configs_in(annotation: Any) -> list[type[Config]]:
    """Return the configuration classes in a field's type: X for `X | None`, `list[X]` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [member for part in get_args(annotation) for member in configs_in(part)]


def read_config(path: Path) -> ModelConfig:
    """Read a checkpoint's config.json. Raises UserError, one line, if it is not valid."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist; a model is weights with their {path.name} beside them") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, an endless number, endless nesting
        raise UserError(f"{path}: not a readable model configuration ({error})") from None
    return parse_config(ModelConfig, data, str(path))
