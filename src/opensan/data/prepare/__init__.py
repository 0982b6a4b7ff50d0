"""Convert data sets from their authors' formats to the canonical layout."""

from opensan.data.prepare import (
    benchmarks,
    own_coco,
    own_folder,
    own_huggingface,
    own_labelme,
    own_word_masks,
    own_yolo,
)
from opensan.data.prepare.source import Reader, Source, SourceImage

__all__ = ["READERS", "Reader", "Source", "SourceImage"]

READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        *benchmarks.READERS,
        own_folder.READER,
        own_word_masks.READER,
        own_coco.PANOPTIC,
        own_coco.INSTANCES,
        own_yolo.READER,
        own_labelme.READER,
        own_huggingface.READER,
    )
}
"""Readers of `opensan data prepare`, by name. To add a format, write a `Reader` in a module here and name it above."""
