"""EfficientNet-Lite (Tan and Le, 2019; the Lite variants of 2020): a small ConvNet with a linear head.

Batch norms are folded into the convolutions before them, so the network is convolutions, ReLU6 and sums.
Recognition of a proposal is what the classifier does with an image, with the attention bias in place of the plain mean:
the mean of the last features with the sigmoid of the bias for weights, and the linear head.
Letters: B batch, Q queries, C channels, D embedding, H W image, h w grid of a stride.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import EfficientNetLiteConfig
from opensan.errors import UserError
from opensan.model.backbones.base import Backbone, FeatureMap, ShallowFeatures
from opensan.model.backbones.text_tower import TextTower


@dataclass(frozen=True)
class _Stage:
    repeats: int
    kernel: int
    stride: int
    expansion: int
    width: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)
STEM_WIDTH = 32
HEAD_WIDTH = 1280
VARIANTS = {"lite0": (1.0, 1.0), "lite1": (1.0, 1.1), "lite2": (1.1, 1.2)}
"""Name -> factors of width and of depth."""
TAPS = {8: 3, 16: 5, 32: 7}
"""Stride -> the last stage (counted from 1) of that stride."""
BATCH_NORM_EPS = 1e-3


def stages(variant: str) -> list[_Stage]:
    """List the seven stages of a variant: widths are multiples of 8; the first and the last stage keep their depth."""
    width, depth = VARIANTS[variant]
    last = len(_STAGES) - 1
    return [
        _Stage(
            stage.repeats if index in (0, last) else math.ceil(stage.repeats * depth),
            stage.kernel,
            stage.stride,
            stage.expansion,
            _rounded(stage.width * width),
        )
        for index, stage in enumerate(_STAGES)
    ]


def _rounded(width: float) -> int:
    """Return the nearest multiple of 8 that is not more than a tenth below `width`."""
    near = max(8, int(width + 4) // 8 * 8)
    return near if near >= 0.9 * width else near + 8


class SameConv(nn.Conv2d):
    """A convolution whose output has ceil(side / stride) pixels a side, padded as TensorFlow's "SAME"."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(x, self.weight, self.bias, 1, kernel // 2, 1, self.groups)
        # Of stride 2: kernel - 2 pixels of padding for an even side, one more for an odd side; the larger half is last.
        down, across = (kernel - 2 + side % 2 for side in x.shape[-2:])
        x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return F.conv2d(x, self.weight, self.bias, stride, 0, 1, self.groups)


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel, project; added to the input where the shape stays."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.expand = SameConv(channels, hidden, 1) if expansion != 1 else None
        self.depthwise = SameConv(hidden, hidden, kernel, stride, groups=hidden)
        self.project = SameConv(hidden, out, 1)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else F.relu6(self.expand(x))
        answer = self.project(F.relu6(self.depthwise(hidden)))
        return x + answer if self.residual else answer


class EfficientNetLite(nn.Module):
    """Stem and seven stages; `head` and the mean over positions lead to the features that the classifier reads."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.stem = SameConv(3, STEM_WIDTH, 3, 2)
        self.stages = nn.ModuleList()
        channels = STEM_WIDTH
        for stage in stages(variant):
            blocks = nn.Sequential()
            for number in range(stage.repeats):
                stride = stage.stride if number == 0 else 1
                blocks.append(InvertedResidual(channels, stage.width, stage.kernel, stride, stage.expansion))
                channels = stage.width
            self.stages.append(blocks)
        self.head = SameConv(channels, HEAD_WIDTH, 1)

    def forward(self, pixels: Tensor) -> dict[int, Tensor]:
        """Feature maps by stride.

        Args:
            pixels: [B, 3, H, W] float RGB, (value - 127) / 128.

        Returns:
            {8: [B, C, h, w], 16: ..., 32: ...}; h = ceil(H / stride). Neither normalised nor rectified.
        """
        x = F.relu6(self.stem(pixels))
        maps: dict[int, Tensor] = {}
        for number, stage in enumerate(self.stages, start=1):
            x = stage(x)
            maps |= {stride: x for stride, last in TAPS.items() if last == number}
        return maps

    def features(self, last: Tensor) -> Tensor:
        """Compute the classifier's features at every position, [B, 1280, h, w] in [0, 6], from the map of stride 32."""
        return F.relu6(self.head(last))


class EfficientNetLiteModel(TextTower, Backbone):
    """The image tower, a linear head into the space of words, and CLIP's kind of text tower.

    Layers 1, 2 and 3 are the maps of strides 8, 16 and 32, all shallow; recognition is the pooling and the head.
    """

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config.text, config.embed_dim, nn.GELU)
        self.visual = EfficientNetLite(config.variant)
        self.projection = nn.Linear(HEAD_WIDTH, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        widths = [stage.width for stage in stages(config.variant)]
        self.layer_widths = {layer: widths[last - 1] for layer, last in enumerate(TAPS.values(), start=1)}
        self.attention_heads = 1

    def shallow_features(self, pixels: Tensor, last_layer: int, keep: Collection[int]) -> ShallowFeatures:
        """Run the whole tower; the tokens are the last features, which recognition takes the mean of."""
        features_of = self.visual(pixels.to(memory_format=torch.channels_last))
        maps = {
            layer: FeatureMap(features_of[stride].flatten(2).transpose(1, 2), tuple(features_of[stride].shape[2:]))
            for layer, stride in enumerate(TAPS, start=1)
            if layer in keep
        }
        features = self.visual.features(features_of[32])
        tokens, grid = features.flatten(2).transpose(1, 2), (features.shape[2], features.shape[3])
        return ShallowFeatures(maps=maps, tokens=tokens, grid=grid, last_layer=last_layer)

    def recognise(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
        """Embed the mean of the last features with weights softmax(bias): unit mask embeddings [B, Q, D].

        The weights are sigmoid(bias), divided by their sum: positions far inside a region count alike. softmax(bias)
        alone soon reads one position of each region only, and learns no more. The bias [B, 1, Q, h', w'] is resized
        bilinearly to the tower's grid: its maps are smooth, and their maximum, as for the patches of a ViT, would widen
        each proposal by a position.
        """
        return self.embed(self._weights(features, attention_bias) @ features.tokens)

    def attended(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
        """Return the weight of each position, [B, 1, Q, h, w]."""
        return self._weights(features, attention_bias).unflatten(-1, features.grid).unsqueeze(1)

    def _weights(self, features: ShallowFeatures, attention_bias: Tensor) -> Tensor:
        """Return the weights of the mean, [B, Q, L]; see `recognise`."""
        bias = F.interpolate(attention_bias[:, 0], size=features.grid, mode="bilinear", align_corners=False)
        return F.logsigmoid(bias).flatten(2).softmax(dim=-1)

    def embed(self, means: Tensor) -> Tensor:
        """Project mean features [..., 1280] into the space of words, as unit rows [..., D]."""
        return F.normalize(self.projection(means), dim=-1)

    def blocks(self) -> list[nn.Module]:
        """Return the stages of the image tower."""
        return list(self.visual.stages)

    def is_text(self, name: str) -> bool:
        """Everything but the image tower, its head and the scale."""
        return not name.startswith(("visual.", "projection.")) and name != "logit_scale"


def from_library(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Translate a state dict of `efficientnet_lite_pytorch`.

    Returns:
        The state of an `EfficientNetLite`, batch norms folded in (in float64, rounded to float32), and the
        classifier's weight [1000, 1280] and bias [1000].

    Raises:
        ValueError: a tensor is missing, or one is left over; the names.
    """
    left = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    ours: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        if name not in left:
            raise UserError(f"the weights have no tensor {name}: this reads efficientnet_lite_pytorch's files")
        return left.pop(name).double()

    def fold(name: str, convolution: str, norm: str) -> None:
        weight = take(f"{convolution}.weight")
        scale = take(f"{norm}.weight") / (take(f"{norm}.running_var") + BATCH_NORM_EPS).sqrt()
        ours[f"{name}.weight"] = (weight * scale.view(-1, 1, 1, 1)).float()
        ours[f"{name}.bias"] = (take(f"{norm}.bias") - take(f"{norm}.running_mean") * scale).float()

    variant = _variant_of(state)
    fold("stem", "_conv_stem", "_bn0")
    number = 0
    for index, stage in enumerate(stages(variant)):
        for repeat in range(stage.repeats):
            theirs, name = f"_blocks.{number}", f"stages.{index}.{repeat}"
            if stage.expansion != 1:
                fold(f"{name}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
            fold(f"{name}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
            fold(f"{name}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
            number += 1
    fold("head", "_conv_head", "_bn1")
    weight, bias = take("_fc.weight").float(), take("_fc.bias").float()
    if left:
        raise UserError(f"the weights have tensors that EfficientNet-{variant} does not: {', '.join(sorted(left)[:5])}")
    return ours, weight, bias


def _variant_of(state: Mapping[str, Tensor]) -> str:
    """Find the variant that has as many blocks and channels."""
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("_blocks.")}
    width = state["_conv_head.weight"].shape[1] if "_conv_head.weight" in state else 0
    for variant in VARIANTS:
        planned = stages(variant)
        if len(blocks) == sum(stage.repeats for stage in planned) and width == planned[-1].width:
            return variant
    raise UserError(
        f"weights of {len(blocks)} blocks and {width} channels are of no variant known here: {', '.join(VARIANTS)}"
    )
