"""Configuration of models as plain data: read from JSON, checked, and never executed.

Block and layer numbers count from 1; 0 means "the input of the first block".
"""

from opensan.config.base import (
    Config,
    Count,
    Ratio,
    Weight,
    dotted_keys,
    field_descriptions,
)
from opensan.config.encoders import (
    AlignConfig,
    AlignTextConfig,
    AlignVisionConfig,
    AnyClipConfig,
    AnyTextConfig,
    ClipConfig,
    ClipResNetConfig,
    ConvNetConfig,
    ConvNetVisionConfig,
    EfficientNetLiteConfig,
    EvaClipConfig,
    EvaVisionConfig,
    PooledVitConfig,
    PooledVitVisionConfig,
    ResNetVisionConfig,
    SiglipTextConfig,
    TextConfig,
    VisionConfig,
)
from opensan.config.model import (
    REST_SHARE,
    ImageConfig,
    ModelConfig,
    SideAdapterConfig,
)
from opensan.config.reading import (
    CONFIG_NAME,
    EXPORT_NAME,
    TOKENIZER_NAME,
    parse_config,
    read_config,
)

__all__ = [
    "CONFIG_NAME",
    "EXPORT_NAME",
    "REST_SHARE",
    "TOKENIZER_NAME",
    "AlignConfig",
    "AlignTextConfig",
    "AlignVisionConfig",
    "AnyClipConfig",
    "AnyTextConfig",
    "ClipConfig",
    "ClipResNetConfig",
    "Config",
    "ConvNetConfig",
    "ConvNetVisionConfig",
    "Count",
    "EfficientNetLiteConfig",
    "EvaClipConfig",
    "EvaVisionConfig",
    "ImageConfig",
    "ModelConfig",
    "PooledVitConfig",
    "PooledVitVisionConfig",
    "Ratio",
    "ResNetVisionConfig",
    "SideAdapterConfig",
    "SiglipTextConfig",
    "TextConfig",
    "VisionConfig",
    "Weight",
    "dotted_keys",
    "field_descriptions",
    "parse_config",
    "read_config",
]
