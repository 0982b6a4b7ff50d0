"""opensan: label every pixel of an image with words chosen at run time.

    san = opensan.load("san-vit-b16")
    segmentation = san.segment("street.jpg", ["road", "car", "tree", "sky"])

Importing the package is cheap: torch is imported when the first of these names is used.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "load": "opensan.segmenters.load",
    "Labeller": "opensan.jobs.labeller",
    "label_folder": "opensan.jobs.runs",
    "label_video": "opensan.jobs.runs",
    "evaluate": "opensan.evaluation.run",
    "tune_words": "opensan.tune.run",
    "AnySegmenter": "opensan.segmenters.base",
    "Segmenter": "opensan.segmenters.base",
    "SanSegmenter": "opensan.segmenters.san",
    "Encoding": "opensan.segmenters.results",
    "Index": "opensan.index.collection",
    "Segmentation": "opensan.segmenters.results",
    "Vocabulary": "opensan.vocabulary",
    "ModelConfig": "opensan.config",
}

__all__ = [
    "AnySegmenter",
    "Encoding",
    "Index",
    "Labeller",
    "ModelConfig",
    "SanSegmenter",
    "Segmentation",
    "Segmenter",
    "Vocabulary",
    "__version__",
    "evaluate",
    "label_folder",
    "label_video",
    "load",
    "tune_words",
]

if TYPE_CHECKING:
    from opensan.config import ModelConfig
    from opensan.evaluation.run import evaluate
    from opensan.index.collection import Index
    from opensan.jobs.labeller import Labeller
    from opensan.jobs.runs import label_folder, label_video
    from opensan.segmenters.base import AnySegmenter, Segmenter
    from opensan.segmenters.load import load
    from opensan.segmenters.results import Encoding, Segmentation
    from opensan.segmenters.san import SanSegmenter
    from opensan.tune.run import tune_words
    from opensan.vocabulary import Vocabulary


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'opensan' has no attribute {name!r}")
    with without_garbage_collection():
        return getattr(import_module(_HOME[name]), name)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Switch the garbage collector off: an import leaves no garbage, yet the search takes an eighth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
