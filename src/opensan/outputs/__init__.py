"""Write a segmentation to disk: a label map, an overlay with its legend, and a JSON record.

Nothing here needs torch, and every file is written all or nothing.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from opensan.errors import UserError
from opensan.files import atomic_path, write_text
from opensan.outputs.coco import mean_confidence, record
from opensan.outputs.colours import UNLABELLED_COLOUR, palette
from opensan.outputs.datasets import DATASETS, check_words
from opensan.outputs.drawing import format_share, overlay
from opensan.outputs.explained import explained_picture
from opensan.outputs.object_datasets import OBJECT_DATASETS
from opensan.outputs.segments import segments_picture, segments_record

if TYPE_CHECKING:
    from opensan.assemble.segments import Segments

__all__ = [
    "DATASETS",
    "FORMATS",
    "SEGMENT_FORMATS",
    "UNLABELLED_COLOUR",
    "check_formats",
    "check_formats_of_many",
    "check_writable",
    "explained_picture",
    "format_share",
    "label_map_picture",
    "mean_confidence",
    "output_paths",
    "overlay",
    "palette",
    "read_label_map",
    "record",
    "save",
    "save_label_map",
]

FORMATS = {
    "png": ".labels.png",
    "overlay": ".overlay.png",
    "json": ".segments.json",
    "panoptic": ".panoptic.png",
    "boxes": ".boxes.json",
}
"""Format -> the end of its file's name, after the stem."""

SEGMENT_FORMATS = ("panoptic", "boxes", *OBJECT_DATASETS)
"""The formats that are made of segments: objects, and regions of stuff."""

_OVERLAY_COMPRESSION = 3
"""zlib level: with images, 6 (the default) takes twice as long and saves hardly anything."""


def check_formats(formats: Sequence[str]) -> None:
    """Raise ValueError, one line, unless all `formats` are known and there is at least one."""
    if isinstance(formats, str):
        raise UserError(f"formats must be a list, such as ['png', 'json'], not {formats!r}")
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"unknown output format {name!r}: choose from {', '.join(FORMATS)}")
    if not formats:
        raise UserError(f"no output format: choose from {', '.join(FORMATS)}")


def check_formats_of_many(formats: Sequence[str], words: int) -> None:
    """Raise UserError unless `formats` suit many images; data sets are allowed too, if they can hold so many words."""
    known = (*FORMATS, *DATASETS)
    for name in formats:
        if name not in known:
            raise UserError(f"unknown output format {name!r}: choose from {', '.join(known)}")
        if name in DATASETS:
            check_words(name, words)
    if not formats:
        raise UserError(f"no output format: choose from {', '.join(known)}")


def check_writable(folder: str | os.PathLike) -> Path:
    """Create `folder` if it does not exist, and check that a file can be written there by writing one.

    Call it before the work. Raises UserError, one line.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:  # without a name, so that nothing is left if killed here
            trial.write(b"opensan")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is in the way" if in_the_way else getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot write there ({reason})") from error
    return folder


def output_paths(folder: str | os.PathLike, stem: str, formats: Sequence[str]) -> dict[str, Path]:
    """Return the paths that `save` writes: format -> path."""
    return {name: Path(folder) / f"{stem}{FORMATS[name]}" for name in formats}


def save(
    folder: str | os.PathLike,
    stem: str,
    formats: Sequence[str],
    *,
    image: np.ndarray | None,
    labels: np.ndarray,
    names: Sequence[str],
    areas: Mapping[str, float],
    confidence: Callable[[], np.ndarray],
    vocabulary: Mapping[str, Any],
    model: str,
    segments: "Callable[[], Segments] | None" = None,
    about_confidence: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write one segmentation; files of the same names are replaced.

    Args:
        folder: created if it does not exist.
        stem: beginning of the files' names; see FORMATS for their ends.
        formats: of "png" (label map), "overlay", "json" (see `record`), "panoptic" (numbers of segments, as COCO has
            them), "boxes" (see `segments_record`).
        image: [H, W, 3] uint8 RGB, or None: then the overlay's colours lie on plain grey.
        labels: [H, W] int, index into `names`, or -1 for unlabelled.
        names: the K words.
        areas: each word's share of the pixels, in [0, 1].
        confidence: returns [H, W] float in [0, 1]; called only for a format that needs it.
        vocabulary: plain data, recorded in the JSON.
        model: the model's name, recorded in the JSON.
        segments: returns the image's segments; called only for "panoptic" and "boxes", which need it.
        about_confidence: what the confidence is, recorded in the JSON.

    Returns:
        dict: format -> path written.

    Raises:
        ValueError: an unknown format, or a folder that cannot be written; one line.
    """
    check_formats(formats)
    if not stem or Path(stem).name != stem:
        raise UserError(f"{stem!r} cannot begin a file's name")
    folder = check_writable(folder)
    paths = output_paths(folder, stem, formats)
    found = segments() if segments and any(name in paths for name in SEGMENT_FORMATS) else None
    try:
        if "png" in paths:
            save_label_map(paths["png"], labels, len(names))
        if "overlay" in paths:
            with atomic_path(paths["overlay"]) as temporary:
                overlay(image, labels, names, areas).save(temporary, compress_level=_OVERLAY_COMPRESSION)
        if "json" in paths:
            data = record(labels, names, areas, confidence(), vocabulary, model, about_confidence or {})
            write_text(paths["json"], json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
        if found is not None and "panoptic" in paths:
            with atomic_path(paths["panoptic"]) as temporary:
                segments_picture(found.ids).save(temporary)
        if found is not None and "boxes" in paths:
            data = segments_record(found, model)
            write_text(paths["boxes"], json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    except OSError as error:  # a full disk, or a name that is too long
        raise UserError(f"{error.filename or folder}: cannot write there ({error.strerror or error})") from error
    return paths


def save_label_map(path: str | os.PathLike, labels: np.ndarray, count: int) -> None:
    """Write `labels` as a PNG (see `label_map_picture`)."""
    picture = label_map_picture(labels, count)
    with atomic_path(path) as temporary:
        picture.save(temporary)


def label_map_picture(labels: np.ndarray, count: int, colours: np.ndarray | None = None) -> Image.Image:
    """Return labels [H, W] (0..count-1, or -1) as a picture: 8-bit with a palette up to 255 words, else 16-bit grey.

    Unlabelled pixels get the highest value, 255 or 65,535. `colours`: [count, 3] uint8, instead of those of `palette`.
    """
    assert count <= 65_535, count
    if count <= 255:
        picture = Image.fromarray(labels.astype(np.uint8))  # -1 becomes 255
        own = palette(255) if colours is None else np.concatenate([colours, palette(255)[count:]])
        picture.putpalette(np.concatenate([own, [UNLABELLED_COLOUR]]).astype(np.uint8).tobytes())
    else:
        picture = Image.fromarray(labels.astype(np.uint16))
    return picture


def read_label_map(path: str | os.PathLike) -> np.ndarray:
    """Read a label map that `save_label_map` wrote: [H, W] int32, -1 where unlabelled.

    Raises ValueError, one line, on a picture that is neither 8-bit (palette or grey) nor 16-bit grey.
    """
    unlabelled = {"P": 255, "L": 255, "I;16": 65_535}
    try:
        with Image.open(path) as picture:
            if picture.mode not in unlabelled:
                raise UserError(f"{path}: a label map is 8-bit or 16-bit with one channel, not {picture.mode}")
            labels = np.asarray(picture).astype(np.int32)
            labels[labels == unlabelled[picture.mode]] = -1
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a label map ({error.strerror or error})") from None
    return labels
