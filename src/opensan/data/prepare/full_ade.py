"""ADE20K of 2021 with 847 classes (Zhou et al., CVPR 2017): labels in colours, and images scaled beforehand."""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from opensan.data.prepare import raw
from opensan.data.prepare.pickle_data import read_pickle_data
from opensan.data.prepare.source import Photograph, Source
from opensan.errors import UserError
from opensan.vocabulary import Vocabulary

SHORT_SIDE = 512
"""Larger images are scaled to this first, as for the published figures."""

NEEDS = "it must be ADE20K_2021_17_01 (or hold it), with index_ade20k.pkl and images/ADE/"


def open_full_ade(folder: Path) -> Source:
    """Open ADE20K_2021_17_01."""
    index = raw.find(folder, "ADE20K_2021_17_01/index_ade20k.pkl", "index_ade20k.pkl")
    if index is None:
        raise UserError(f"{folder}: there is no index_ade20k.pkl; {NEEDS}")
    data = read_pickle_data(index)
    folders, names = (data.get(key) if isinstance(data, dict) else None for key in ("folder", "filename"))
    for column in (folders, names):
        if not isinstance(column, list) or not all(isinstance(entry, str) for entry in column):
            raise UserError(f"{index}: holds no lists of text 'folder' and 'filename'")
    if len(folders) != len(names):
        raise UserError(f"{index}: lists {len(folders)} folders and {len(names)} file names")

    def photographs() -> Iterator[Photograph]:
        for place, name in zip(folders, names, strict=True):
            file = _below(index.parent, place, name)
            split = "val" if "_val_" in name else "train"
            yield Photograph(file.stem, (split,), partial(_at_most_512, file), partial(_coded_classes, file))

    return Source(Vocabulary.ready("ade20k_847"), list(photographs()), evaluation_split="val", label_set="ade20k_847")


def _below(root: Path, folder: str, name: str) -> Path:
    """Return the path of an entry of the index, whose folders begin with the download's own name."""
    parts = [part for part in folder.replace("\\", "/").split("/") if part]
    inside = parts[1:] if parts[:1] == ["ADE20K_2021_17_01"] else parts
    if any(part in (".", "..") or ":" in part for part in parts) or folder.startswith("/") or "/" in name:
        raise UserError(f"{root / 'index_ade20k.pkl'}: leads out of the folder: {folder[:80]!r}, {name[:80]!r}")
    return root.joinpath(*inside, name)


def _at_most_512(path: Path) -> Path | bytes:
    """Return the image, scaled if it is larger; as JPEG with Pillow's settings, as usual for this set."""
    from opensan.images import open_image  # only now: it imports torch

    image = open_image(path)
    size = scaled_size(image.shape[:2])
    if size == image.shape[:2]:
        return path
    content = io.BytesIO()
    Image.fromarray(resize_bilinear(image, size)).save(content, "JPEG")
    return content.getvalue()


def _coded_classes(path: Path) -> np.ndarray:
    """Read the label file beside an image: red and green code a class, blue an instance."""
    path = path.with_name(f"{path.stem}_seg.png")
    colours = raw.read_png(path).colours.astype(np.int32)
    labels = raw.labels_of(colours[..., 0] // 10 * 256 + colours[..., 1], raw.table_of("ade20k_847"), path)
    return resize_nearest(labels, scaled_size(labels.shape))


def scaled_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (H, W) of an image after ADE20K-847's scaling of short sides above 512 to 512."""
    height, width = size
    short = SHORT_SIDE
    if min(size) <= short:
        return height, width
    return (short, round(width / height * short)) if width >= height else (round(height / width * short), short)


def resize_nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize labels [H, W]: each pixel from floor(position x scale), as OpenCV does."""
    rows, columns = (
        np.minimum((np.arange(new) * (old / new)).astype(np.intp), old - 1)
        for new, old in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image [H, W, 3] uint8: bilinear between the nearest pixels, without antialias.

    OpenCV does the same (to one level of 255), and the images for the published figures were scaled with it; Pillow's
    bilinear filter would average over more pixels when it shrinks.
    """
    result = image.astype(np.float32)
    for axis, new in enumerate(size):
        old = image.shape[axis]
        place = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
        first = np.minimum(place.astype(np.intp), old - 2)
        weight = (place - first).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
        result = result.take(first, axis) * (1 - weight) + result.take(first + 1, axis) * weight
    return np.floor(result + 0.5).astype(np.uint8)
