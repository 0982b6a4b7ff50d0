"""The families of image-text models that a SAN can be built around, one file a family.

`opensan.model.backbones.base.Backbone` says what each offers. A family is imported only when a model of it is built.
"""

from opensan.config import AnyClipConfig
from opensan.model.backbones.base import Backbone


def build_backbone(config: AnyClipConfig) -> Backbone:
    """Build the backbone that `config` describes, with random weights, all of it trainable."""
    if config.kind == "clip_vit":
        from opensan.model.backbones.clip_vit import ClipModel

        return ClipModel(config)
    if config.kind == "clip_resnet":
        from opensan.model.backbones.clip_resnet import ClipResNet

        return ClipResNet(config)
    raise AssertionError(config.kind)
