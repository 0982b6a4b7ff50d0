"""ADE20K of 2021 with 847 classes (Zhou et al., CVPR 2017): labels in colours, and images scaled beforehand."""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from opensan.data.prepare import raw
from opensan.data.prepare.pickle_data import read_pickle_data
from opensan.data.prepare.source import Source, SourceImage
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
    folders, names = (data.get(key, ()) if isinstance(data, dict) else () for key in ("folder", "filename"))
    for column in (folders, names):
        if not isinstance(column, list) or not all(isinstance(entry, str) for entry in column):
            raise UserError(f"{index}: holds no lists of text 'folder' and 'filename'")
    if len(folders) != len(names):
        raise UserError(f"{index}: lists {len(folders)} folders and {len(names)} file names")

    def source_images() -> Iterator[SourceImage]:
        for entry_folder, name in zip(folders, names, strict=True):
            file = _below(index.parent, entry_folder, name)
            split = "val" if "_val_" in name else "train"
            yield SourceImage(file.stem, (split,), partial(_at_most_512, file), partial(_coded_classes, file))

    return Source(Vocabulary.ready("ade20k_847"), list(source_images()), evaluation_split="val", label_set="ade20k_847")


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
    """Labels [H, W] at another size, each from the pixel at floor(place x scale), exactly as OpenCV takes them."""
    rows, columns = (
        # OpenCV's scale is one over the quotient: old / new rounds otherwise, and may take the next pixel.
        np.minimum((np.arange(new) * (1.0 / (new / old))).astype(np.intp), old - 1)
        for new, old in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image [H, W, 3] uint8: bilinear between the nearest pixels, without antialias.

    Exactly OpenCV's (4.x, 8 bits), with which the published figures' images were scaled: weights of 11 bits, of
    which the sums lose some, and the mean of four where both sides are halved.
    """
    height, width = image.shape[:2]
    pixels = image.astype(np.int32)
    if (height, width) == (2 * size[0], 2 * size[1]):
        four = pixels[::2, ::2] + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2]
        return ((four + 2) >> 2).astype(np.uint8)
    left, right, of_left, of_right = _neighbours(width, size[1], clamped=True)
    across = pixels[:, left] * of_left[:, None] + pixels[:, right] * of_right[:, None]
    upper, lower, of_upper, of_lower = _neighbours(height, size[0], clamped=False)
    across >>= 4
    above = (across[upper] * of_upper[:, None, None]) >> 16
    below = (across[lower] * of_lower[:, None, None]) >> 16
    return ((above + below + 2) >> 2).astype(np.uint8)


def _neighbours(old: int, new: int, *, clamped: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the two pixels around each of `new`, and their weights in 2048ths; each [new].

    `clamped`: beyond the first and last pixel only that pixel counts (so OpenCV does for columns).
    """
    position = ((np.arange(new) + 0.5) * (1.0 / (new / old)) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.intp)
    part = position - first.astype(np.float32)
    if clamped:
        part[(first < 0) | (first >= old - 1)] = 0
    weights = [np.rint(share * np.float32(2048)).astype(np.int32) for share in (np.float32(1) - part, part)]
    return np.clip(first, 0, old - 1), np.clip(first + 1, 0, old - 1), *weights
