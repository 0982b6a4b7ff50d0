"""What a segmentation leaves on disk: a label map, an overlay with its legend, and a JSON record.

Nothing here needs torch, and every file is written all or nothing.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opensan.files import atomic_path, write_text
from opensan.outputs.coco import mean_confidence, record
from opensan.outputs.colours import UNLABELLED_COLOUR, palette
from opensan.outputs.drawing import format_share, overlay

__all__ = [
    "FORMATS",
    "check_formats",
    "check_writable",
    "format_share",
    "mean_confidence",
    "output_paths",
    "overlay",
    "palette",
    "record",
    "save",
    "save_label_map",
]

# The suffixes keep clear of the photograph and of any annotation beside it, should the folder be theirs.
FORMATS = {"png": "_labels.png", "overlay": "_overlay.png", "json": "_segments.json"}
"""Format -> what follows the stem in its file's name."""

_OVERLAY_COMPRESSION = 3
"""zlib level: photographs hardly shrink further, and 6, the default, takes twice as long."""


def check_formats(formats: Sequence[str]) -> None:
    """Raise ValueError, one line, unless all `formats` are known and there is at least one."""
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"unknown output format {name!r}: choose from {', '.join(FORMATS)}")
    if not formats:
        raise ValueError(f"no output format: choose from {', '.join(FORMATS)}")


def check_writable(folder: str | os.PathLike) -> Path:
    """Create `folder` if need be and prove, by doing it, that a file can be written there.

    To be called before the work. Raises ValueError, one line.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "opensan") as temporary:
            temporary.write_bytes(b"opensan")
            raise _EnoughProof
    except _EnoughProof:
        return folder
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ValueError(f"{folder}: cannot write there ({getattr(error, 'strerror', None) or error})") from None


class _EnoughProof(Exception):
    """Leaves atomic_path after the write and before the rename, so that it cleans up."""


def output_paths(folder: str | os.PathLike, stem: str, formats: Sequence[str]) -> dict[str, Path]:
    """Where `save` writes: format -> path."""
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
    confidence: np.ndarray,
    vocabulary: Mapping[str, Any],
    model: str,
) -> dict[str, Path]:
    """Write one segmentation.

    Args:
        folder: created if need be.
        stem: beginning of the files' names; see FORMATS for their ends.
        formats: of "png" (label map), "overlay" (needs `image`), "json" (see `record`).
        image: [H, W, 3] uint8 RGB photograph, or None.
        labels: [H, W] int, index into `names`, or -1 for unlabelled.
        names: the K words.
        areas: each word's share of the pixels, in [0, 1].
        confidence: [H, W] float in [0, 1].
        vocabulary: plain data, recorded in the JSON.
        model: the model's name, recorded in the JSON.

    Returns:
        dict: format -> path written.

    Raises:
        ValueError: an unknown format, an overlay without an image, or a folder that cannot be written; one line.
    """
    check_formats(formats)
    if "overlay" in formats and image is None:
        raise ValueError("an overlay needs the photograph, which this encoding does not hold")
    if not stem or Path(stem).name != stem:
        raise ValueError(f"{stem!r} cannot begin a file's name")
    folder = check_writable(folder)
    paths = output_paths(folder, stem, formats)
    try:
        if "png" in paths:
            save_label_map(paths["png"], labels, len(names))
        if "overlay" in paths:
            assert image is not None
            with atomic_path(paths["overlay"]) as temporary:
                overlay(image, labels, names, areas).save(temporary, compress_level=_OVERLAY_COMPRESSION)
        if "json" in paths:
            data = record(labels, names, areas, confidence, vocabulary, model)
            write_text(paths["json"], json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:  # the disk is full, or the name too long
        raise ValueError(f"{folder}: cannot write there ({error.strerror or error})") from None
    return paths


def save_label_map(path: str | os.PathLike, labels: np.ndarray, count: int) -> None:
    """Write labels [H, W] (0..count-1, or -1) as a PNG: 8-bit with a palette up to 255 words, else 16-bit grey.

    Unlabelled pixels get the highest value, 255 or 65,535.
    """
    if count <= 255:
        picture = Image.fromarray(labels.astype(np.uint8))  # -1 becomes 255
        colours = np.concatenate([palette(255), [UNLABELLED_COLOUR]]).astype(np.uint8)
        picture.putpalette(colours.tobytes())
    else:
        picture = Image.fromarray(labels.astype(np.uint16))
    with atomic_path(path) as temporary:
        picture.save(temporary)
