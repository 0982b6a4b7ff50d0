"""Helpers of readers: find files in a download, and convert stored values to labels."""

import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from opensan.errors import UserError
from opensan.images.pixels import Pixels, one_reading, read_pixels
from opensan.vocabulary import UNLABELLED, Vocabulary, ready_source_ids

WRONG = -2
"""Entry of a label table for a value that the data set's format does not have."""


def find(root: Path, *candidates: str) -> Path | None:
    """Return the first of `candidates`, paths below `root`, that exists."""
    return next((root / candidate for candidate in candidates if (root / candidate).exists()), None)


def stems(folder: Path, suffix: str) -> set[str]:
    """Return the names, without suffix, of the files in `folder` with that suffix."""
    return {file.stem for file in folder.iterdir() if file.suffix.lower() == suffix and not file.name.startswith(".")}


def read_list(path: Path) -> list[str]:
    """Read the lines of a split list, each once, without white space around them."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows editors write a UTF-8 mark at the start
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable list ({error})") from None
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def read_png(path: Path) -> Pixels:
    """Read the pixels of a label PNG. Raises UserError, one line that names it, on any other file."""
    from opensan.images import MAX_PIXELS  # only now: it imports torch

    try:
        with Image.open(path, formats=["PNG"]) as file:
            if file.width * file.height > MAX_PIXELS:
                raise UserError(f"{path}: {file.width} x {file.height} is more than {MAX_PIXELS:,} pixels")
            return read_pixels(file)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such label file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable PNG ({error})") from None


def index_labels(path: Path, label_set: str) -> np.ndarray:
    """Read the labels of an index PNG of a benchmark."""
    pixels = read_png(path)
    table = table_of(label_set)
    read = {} if pixels.stored is None else {"stored": functools.partial(labels_of, pixels.stored, table, path)}
    if pixels.grey is not None and (pixels.differs or not read):
        read["shown"] = functools.partial(labels_of, pixels.grey, table, path)
    if not read:
        raise UserError(f"{path}: a PNG of colours, not of one channel with a class's number in each pixel")
    return one_reading(pixels, str(path), read, "take the file as its authors distribute it")


def labels_of(values: np.ndarray, table: np.ndarray, path: Path) -> np.ndarray:
    """Convert stored values [H, W] to labels, by a table value -> label. Raises UserError if one is `WRONG`."""
    if (largest := int(values.max())) >= len(table):
        raise UserError(f"{path}: holds the value {largest}, the format ends at {len(table) - 1}")
    labels = table[values]
    if (labels == WRONG).any():
        raise UserError(f"{path}: holds the value {values[labels == WRONG][0]}, which the format does not have")
    return labels


def _source_ids(label_set: str) -> list[int]:
    numbers = ready_source_ids(label_set)
    assert numbers is not None, label_set
    return numbers


@functools.cache
def table_of(label_set: str) -> np.ndarray:
    """Return the label of each value in a benchmark's files.

    Each process builds it once, instead of receiving it with every image.
    """
    classes = len(Vocabulary.ready(label_set).names)
    match label_set:
        case "coco_stuff_171":  # stored is the id - 1; unlisted values are unlabelled
            return _table(256, UNLABELLED, [identity - 1 for identity in _source_ids(label_set)])
        case "pascal_voc_20":  # 0 background, 255 void
            return _table(256, WRONG, range(1, classes + 1), unlabelled=(0, 255))
        case "ade20k_150":  # 0 other
            return _table(256, WRONG, range(1, classes + 1), unlabelled=(0,))
        case "pascal_context_459":
            return _table(classes + 1, WRONG, range(1, classes + 1), unlabelled=(0,))
        case "pascal_context_59":  # of the 459
            return _table(460, UNLABELLED, _source_ids(label_set))
        case "ade20k_847":  # of the 3,000 and more that two colours encode
            return _table(26 * 256, UNLABELLED, _source_ids(label_set))
    raise UserError(f"no files are known that store {label_set}")


def _table(size: int, otherwise: int, values: Iterable[int], unlabelled: Iterable[int] = ()) -> np.ndarray:
    """Return a table of `size` entries, in which the i-th of `values` has label i."""
    table = np.full(size, otherwise, dtype=np.int16)
    table[list(unlabelled)] = UNLABELLED
    for label, value in enumerate(values):
        table[value] = label
    return table
