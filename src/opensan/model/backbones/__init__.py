"""The families of image-text models that a SAN can be built around, one file a family.

`opensan.model.backbones.base.Backbone` says what each offers. A family, and the library that it comes from, is imported
only when a model of it is built.
"""

from importlib import import_module

from opensan.config import AnyClipConfig
from opensan.model.backbones.base import Backbone

FAMILIES = {
    "clip_vit": "ClipModel",
    "clip_resnet": "ClipResNet",
    "vit_pooled": "PooledVit",
    "eva_clip": "EvaClip",
    "convnet": "ConvNetClip",
    "align": "Align",
    "efficientnet_lite": "EfficientNetLiteModel",
}
"""Kind of a backbone, which is also the name of its module -> its class."""


def build_backbone(config: AnyClipConfig) -> Backbone:
    """Build the backbone that `config` describes, with random weights, all of it trainable.

    Raises UserError if the library that the family needs is not installed, or does not know the model.
    """
    module = import_module(f"{__name__}.{config.kind}")
    return getattr(module, FAMILIES[config.kind])(config)
