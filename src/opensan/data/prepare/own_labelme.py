"""Read labelme's files, a JSON beside each image: `opensan data prepare labelme`.

Format: https://github.com/wkentaro/labelme (labelme/_label_file.py, labelme/utils/shape.py). Shapes are drawn as
labelme itself exports them: with their outline, and the later ones on top.
"""

import base64
import binascii
import glob
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from opensan.data.class_list import read_class_names
from opensan.data.prepare.own_images import (
    NO_SPLIT,
    FolderImage,
    background_notes,
    evaluation_split,
    is_image,
    source_images,
    vocabulary_of,
    without,
)
from opensan.data.prepare.own_labels import upright_as
from opensan.data.prepare.source import Labelled, Reader, Source
from opensan.errors import UserError
from opensan.images import MAX_PIXELS, stored_size
from opensan.vocabulary import UNLABELLED, Vocabulary

_NO_LABELS = ("__ignore__", "_background_")
"""labelme's names for pixels without a class."""
_CLASSES = ("classes.txt", "labels.txt")


def open_labelme(folder: Path, *, ignored: str = "") -> Source:
    """Open NAME.json beside NAME.jpg, in the folder or in sub-folders, which are splits."""
    files, left_out = [], {}
    for path in sorted(folder.rglob("*.json")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            if (shapes := _shapes(path)) is not None:
                files.append((path, shapes))
        except UserError as error:
            left_out[path.relative_to(folder).as_posix()] = str(error)
    if not files:
        said = f"; {next(iter(left_out.values()))}" if left_out else ""
        raise UserError(f"{folder}: no JSON file of labelme's (with a list 'shapes'); they lie beside the images{said}")
    names = {label for _, shapes in files for label in shapes} - set(_NO_LABELS)
    full = _vocabulary(folder, names)
    vocabulary, labels = without(full, ignored, str(folder))
    label_of = {
        text: label for word, label in zip(full.words, labels, strict=True) for text in (word.name, *word.synonyms)
    } | dict.fromkeys(_NO_LABELS, UNLABELLED)
    usable = [
        FolderImage(path.relative_to(folder).with_suffix("").as_posix(), path, [_split(path, folder)])
        for path, _ in files
    ]
    images = {image.stem: _LabelmeImage(folder, image.file) for image in usable}
    used = {images[image.stem].beside() for image in usable}
    unlabelled = [file for file in sorted(folder.rglob("*")) if is_image(file) and file not in used]
    return Source(
        vocabulary=vocabulary,
        images=[
            replace(source_image, image=images[image.stem])
            for source_image, image in zip(
                source_images(usable, lambda image: _Shapes(images[image.stem], label_of)), usable, strict=True
            )
        ],
        evaluation_split=evaluation_split(split for image in usable for split in image.splits),
        left_out=left_out,
        notes=(
            *((f"{len(unlabelled)} images have no JSON file, and are not used",) if unlabelled else ()),
            *background_notes(vocabulary),
        ),
        unlabelled_because="no shape is a polygon, rectangle, circle or mask of a class",
    )


def _split(path: Path, folder: Path) -> str:
    parts = path.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else NO_SPLIT


def _vocabulary(folder: Path, names: set[str]) -> Vocabulary:
    """Return the words of a list in the folder, which must have all, else the shapes' labels in alphabetical order."""
    path = next((folder / name for name in _CLASSES if (folder / name).exists()), None)
    if path is None:
        if not names:
            raise UserError(f"{folder}: no shape has a label")
        in_order = sorted(names, key=lambda name: (name.casefold(), name))
        return vocabulary_of(in_order, str(folder))
    words = [word for word in read_class_names(path).words if word.name not in _NO_LABELS]
    known = {text for word in words for text in (word.name, *word.synonyms)}
    if unknown := sorted(names - known):
        raise UserError(f"{folder}: there are shapes of {unknown[0]!r}, which is not in {path}")
    return vocabulary_of(words, str(path))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({' '.join(str(error).split())[:100]})") from None
    return data if isinstance(data, Mapping) else {}


def _shapes(path: Path) -> list[str] | None:
    """Return the labels of a file's shapes; None if it is not labelme's."""
    shapes = _read(path).get("shapes")
    if not isinstance(shapes, list):
        return None
    labels = [shape.get("label") for shape in shapes if isinstance(shape, Mapping)]
    return [label for label in labels if isinstance(label, str) and label.strip()]


@dataclass(frozen=True)
class _LabelmeImage:
    """Reads the image of a JSON file: the file beside it, or the image in the JSON file."""

    folder: Path
    json: Path

    def __call__(self) -> Path | bytes:
        if file := self.beside():
            return file
        data = _read(self.json)
        content = data.get("imageData")
        if not isinstance(content, str):
            raise UserError(f"{self.json}: its image {data.get('imagePath')!r:.80} is not beside it")
        try:
            return base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError):
            raise UserError(f"{self.json}: its 'imageData' is no base64") from None

    def beside(self) -> Path | None:
        """Return the image file: the one that the JSON names if in the data set, else the one of the same name."""
        said = _read(self.json).get("imagePath")
        if isinstance(said, str) and said and "\0" not in said:
            for name in (said.replace("\\", "/"), PureWindowsPath(said).name):
                file = (self.json.parent / name).absolute()
                if Path(name).is_absolute() or len(PureWindowsPath(said).name.encode(errors="replace")) > 250:
                    continue
                if file.resolve().is_relative_to(self.folder.resolve()) and is_image(file) and file.is_file():
                    return self.json.parent / name
        same = sorted(self.json.parent.glob(f"{glob.escape(self.json.stem)}.*"))
        return next((file for file in same if is_image(file)), None)


@dataclass(frozen=True)
class _Shapes:
    """Draws the shapes of a JSON file."""

    image: _LabelmeImage
    label_of: Mapping[str, int]

    def __call__(self) -> Labelled:
        path = self.image.json
        data = _read(path)
        image = self.image()
        size = _size(data, image, str(path))
        turn = upright_as(image, size, str(path))
        labels = np.full(size, UNLABELLED, dtype=np.int32)
        left_out = []
        for number, shape in enumerate(data["shapes"], 1):
            name = f"shape {number}"
            try:
                label = shape.get("label") if isinstance(shape, Mapping) else None
                if not isinstance(label, str) or label not in self.label_of:
                    raise UserError("has no label")
                name = f"shape {number} ({label!r:.60})"
                labels[_mask(shape, size)] = self.label_of[label]
            except UserError as error:
                left_out.append(f"{name}: {error}")
        return Labelled(turn(labels), tuple(left_out))


def _size(data: Mapping[str, Any], image: Path | bytes, source: str) -> tuple[int, int]:
    height, width = data.get("imageHeight"), data.get("imageWidth")
    if height is width is None:
        return stored_size(image)[0]
    if type(height) is int and type(width) is int and min(height, width) > 0 and height * width <= MAX_PIXELS:
        return height, width
    raise UserError(f"{source}: 'imageHeight' and 'imageWidth' must be whole numbers, not {(height, width)!r:.60}")


def _mask(shape: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Draw a shape, [H, W] bool. Raises UserError on shapes without an area and on invalid ones."""
    kind = shape.get("shape_type") or "polygon"
    points = _points(shape.get("points"), size)
    if kind == "mask":
        return _stored_mask(shape, points, size)
    drawn = Image.new("L", (size[1], size[0]))
    draw = ImageDraw.Draw(drawn)
    if kind == "polygon" and len(points) > 2:
        draw.polygon(points, outline=1, fill=1)
    elif kind == "rectangle" and len(points) == 2:
        (left, right), (top, bottom) = (sorted(side) for side in zip(*points, strict=True))
        draw.rectangle((left, top, right, bottom), outline=1, fill=1)
    elif kind == "circle" and len(points) == 2:
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=1, fill=1)
    else:
        raise UserError(f"a {kind!r:.30} of {len(points)} points has no area of its own")
    return np.asarray(drawn) == 1


def _points(points: object, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Pairs x, y, none of them farther from the image than it is large."""
    if not isinstance(points, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(type(side) in (int, float) for side in pair)
        for pair in points
    ):
        raise UserError("its points are not pairs of numbers")
    height, width = size
    if not all(-width <= x <= 2 * width and -height <= y <= 2 * height for x, y in points):
        raise UserError(f"lies far outside the image of {width}x{height} (width x height)")
    return [(float(x), float(y)) for x, y in points]


def _stored_mask(shape: Mapping[str, Any], points: list[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    """Read a mask that is stored as a PNG within a box."""
    mask = np.zeros(size, dtype=bool)
    try:
        content = base64.b64decode(shape.get("mask") or "", validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as file:
            if file.width * file.height > MAX_PIXELS:
                raise UserError(f"its mask of {file.width} x {file.height} is more than {MAX_PIXELS:,} pixels")
            part = np.asarray(file.convert("L")) > 0
    except UserError:
        raise
    except Exception:  # Pillow's readers raise any kind of error on damaged files
        raise UserError("its mask is no PNG in base64") from None
    if len(points) != 2:
        raise UserError("its mask has no box of two points")
    left, top = (int(min(side)) for side in zip(*points, strict=True))
    if left < 0 or top < 0 or top + part.shape[0] > size[0] or left + part.shape[1] > size[1]:
        raise UserError("its mask reaches beyond the image")
    mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return mask


READER = Reader(
    name="labelme",
    description="labelme's JSON file beside each image",
    open=open_labelme,
    options={"ignored": "labels whose pixels become unlabelled: NAME,NAME"},
    needs="NAME.json beside NAME.jpg; sub-folders as splits; classes.txt or labels.txt for an order of classes",
)
