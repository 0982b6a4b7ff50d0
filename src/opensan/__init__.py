"""opensan: label every pixel of a photograph with words chosen at run time.

    san = opensan.load("san-vit-b16")
    segmentation = san.segment("street.jpg", ["road", "car", "tree", "sky"])

Importing the package is cheap: torch is imported when the first of these names is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "load": "opensan.loading",
    "AnySegmenter": "opensan.segmentation",
    "Segmenter": "opensan.segmenter",
    "Encoding": "opensan.segmentation",
    "Segmentation": "opensan.segmentation",
    "Vocabulary": "opensan.vocabulary",
    "ModelConfig": "opensan.config",
}

__all__ = ["AnySegmenter", "Encoding", "ModelConfig", "Segmentation", "Segmenter", "Vocabulary", "__version__", "load"]

if TYPE_CHECKING:
    from opensan.config import ModelConfig
    from opensan.loading import load
    from opensan.segmentation import AnySegmenter, Encoding, Segmentation
    from opensan.segmenter import Segmenter
    from opensan.vocabulary import Vocabulary


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'opensan' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
