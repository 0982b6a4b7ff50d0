"""Objects of labelled images: which pixels of a class are one object, for training and evaluation.

Letters: H W image.
"""

from pathlib import Path
from typing import IO, Protocol, TypeGuard

import numpy as np
from PIL import Image

from opensan.data.dataset import SegmentationDataset
from opensan.errors import UserError

FOLDER = "objects"
"""Folder of a prepared set with the objects' maps: NAME.png, 16-bit, the number of each pixel's object, 0 for none."""

MOST_OBJECTS = 32_767
"""Most objects of an image: more would not fit into 32 bits with the class."""

_CLASSES = 1 << 16


class ObjectDataset(SegmentationDataset, Protocol):
    """A data set that knows the objects of its images."""

    def objects(self, index: int) -> np.ndarray:
        """Return [H, W] integers: the number of each pixel's object, 0 where there is none (stuff, or unlabelled).

        Pixels of one object have one label. Raises UserError or OSError as `__getitem__` does.
        """


def has_objects(dataset: SegmentationDataset) -> TypeGuard[ObjectDataset]:
    """Return whether a data set knows objects: it has the method, and (if it can tell) the files."""
    return hasattr(dataset, "objects") and bool(getattr(dataset, "knows_objects", True))


def with_objects(labels: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Join labels [H, W] and objects [H, W] to one map, [H, W] int32, in which every object has a value of its own.

    `class_of` returns the classes of its values. Unlabelled pixels stay -1.
    """
    return np.where(labels < 0, np.int32(-1), labels + objects.astype(np.int32) * _CLASSES)


def class_of(values: np.ndarray) -> np.ndarray:
    """Return the classes of values, 0 or more, that `with_objects` joined; of plain labels, these."""
    return values.astype(np.int64) % _CLASSES


def is_object(values: np.ndarray) -> np.ndarray:
    """Return which values that `with_objects` joined are of objects."""
    return values >= _CLASSES


def read_objects(path: Path, size: tuple[int, int], file: IO[bytes] | None = None) -> np.ndarray:
    """Read a map of objects, [H, W] int32; from `file`, where `path` is but its name.

    Raises UserError, one line, on another kind of file or another size.
    """
    try:
        with Image.open(path if file is None else file) as picture:
            if picture.mode not in ("I;16", "I", "L"):
                raise UserError(f"{path}: objects are numbered in a PNG of 8 or 16 bits, not of mode {picture.mode}")
            objects = np.asarray(picture).astype(np.int32)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable map of objects ({error})") from None
    if objects.shape != size:
        raise UserError(
            f"{path}: is {objects.shape[1]}x{objects.shape[0]}, its image {size[1]}x{size[0]} (width x height)"
        )
    if objects.max(initial=0) > MOST_OBJECTS:
        raise UserError(f"{path}: has an object {objects.max()}; numbers go up to {MOST_OBJECTS}")
    return objects
