"""Read YOLO's polygons, a text file for each image: `opensan data prepare yolo-seg`.

Format: https://docs.ultralytics.com/datasets/segment/: a line an object, its class and then x y x y ... as shares of
the image's width and height.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from opensan.data.class_list import read_class_list
from opensan.data.prepare.drawn_masks import mask_of
from opensan.data.prepare.own_images import (
    FolderImage,
    FolderImages,
    background_notes,
    evaluation_split,
    find_images,
    source_images,
    unused_labels,
    vocabulary_of,
    without,
)
from opensan.data.prepare.own_labels import Layers
from opensan.data.prepare.source import Labelled, Reader, Source
from opensan.errors import UserError
from opensan.images import image_size
from opensan.vocabulary import Word

NEEDS = "images/ and labels/NAME.txt (or SPLIT/images/ and SPLIT/labels/), and data.yaml or classes.txt with the names"


def open_yolo(folder: Path, *, ignored: str = "") -> Source:
    """Open images/SPLIT/NAME.jpg with labels/SPLIT/NAME.txt, or Roboflow's SPLIT/images/ and SPLIT/labels/."""
    names, source = _names(folder)
    vocabulary, labels = without(vocabulary_of(list(names.values()), source), ignored, source)
    label_of_class = dict(zip(names, labels, strict=True))
    pairs = _pairs(folder)
    texts_of: dict[int, tuple[FolderImage, Path]] = {}
    left_out: dict[str, str] = {}
    notes: list[str] = []
    for split, images, texts in pairs:
        part = _part(folder, images, split)
        left_out |= part.left_out | unused_labels(folder, texts, (".txt",), part.stems | {"classes"})
        notes += part.notes
        for item in part.images:
            text = texts / f"{item.stem}.txt"
            if split:
                item.stem = f"{split}/{item.stem}"
            texts_of[id(item)] = (item, text)
    return Source(
        vocabulary=vocabulary,
        images=source_images(
            [item for item, _ in texts_of.values()],
            lambda item: _Polygons(item.file, texts_of[id(item)][1], label_of_class),
        ),
        evaluation_split=evaluation_split(split for item, _ in texts_of.values() for split in item.splits),
        left_out=left_out,
        notes=(*notes, *background_notes(vocabulary)),
        unlabelled_because="the label files hold no polygon",
    )


def _pairs(folder: Path) -> list[tuple[str, Path, Path]]:
    """Yield (split, folder of images, folder of labels); the split is empty if lists or sub-folders define splits."""
    if (folder / "images").is_dir() and (folder / "labels").is_dir():
        return [("", folder / "images", folder / "labels")]
    parts = [path for path in sorted(folder.iterdir()) if (path / "images").is_dir() and (path / "labels").is_dir()]
    if not parts:
        raise UserError(f"{folder}: it must hold {NEEDS}")
    return [(path.name, path / "images", path / "labels") for path in parts]


def _part(folder: Path, images: Path, split: str) -> FolderImages:
    image_set = find_images(folder if not split else images.parent, images)
    if split:
        for image in image_set.images:
            image.splits = [split]
    return image_set


def _names(folder: Path) -> tuple[dict[int, str | Word], str]:
    """Return the classes by number, and their source."""
    for path in sorted((*folder.glob("*.yaml"), *folder.glob("*.yml"))):
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{path}: not readable YAML ({' '.join(str(error).split())[:100]})") from None
        names: Any = data.get("names") if isinstance(data, Mapping) else None
        if names is None:
            continue
        if isinstance(names, list):
            names = dict(enumerate(names))
        usable = isinstance(names, Mapping) and all(
            type(number) is int and 0 <= number <= 65_535 and isinstance(name, str) for number, name in names.items()
        )
        if not names or not usable:
            raise UserError(f"{path}: 'names' must be a list of names, or numbers with names (0: person)")
        return dict(sorted(names.items())), f"{path}: names"
    for path in (folder / "classes.txt", folder / "labels" / "classes.txt"):
        if path.exists():
            listed = read_class_list(path)
            return dict(sorted(zip(listed.values, listed.vocabulary.words, strict=True))), str(path)
    raise UserError(
        f"{folder}: no data.yaml with 'names' and no classes.txt, so the classes have numbers only; it needs {NEEDS}"
    )


@dataclass(frozen=True)
class _Polygons:
    """Draws the objects of a label file."""

    image: Path
    text: Path
    label_of_class: Mapping[int, int]

    def __call__(self) -> Labelled:
        height, width = image_size(self.image)
        layers = Layers((height, width))
        left_out = []
        lines = self._lines()
        for number, line in enumerate(lines, 1):
            if not line.split():
                continue
            try:
                label, points = self._object(line.split())
                layers.add(mask_of([(points * (width, height)).ravel().tolist()], height, width), label)
            except UserError as error:
                left_out.append(f"line {number}: {error}")
        if left_out and len(left_out) == sum(bool(line.split()) for line in lines):
            raise UserError(f"{self.text}: {'; '.join(left_out[:3])}")
        return Labelled(layers.labels, tuple(left_out))

    def _lines(self) -> list[str]:
        if not self.text.exists():
            raise UserError(f"{self.text}: missing; an image without objects has an empty file")
        try:
            return self.text.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.text}: not text ({' '.join(str(error).split())[:100]})") from None

    def _object(self, parts: list[str]) -> tuple[int, np.ndarray]:
        """Return the label and the corners [N, 2] of a line, in shares of width and height."""
        try:
            number, points = float(parts[0]), np.array([float(part) for part in parts[1:]], dtype=np.float64)
        except ValueError:
            raise UserError("not numbers: CLASS X Y X Y ...") from None
        if not number.is_integer() or int(number) not in self.label_of_class:
            raise UserError(f"the class {parts[0][:20]} has no name")
        if len(points) == 4:
            raise UserError("a box (x y width height), not a polygon")
        if len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
            raise UserError("not a polygon: CLASS X Y X Y X Y ...")
        if points.min() < -0.5 or points.max() > 1.5:
            raise UserError("corners must be shares of width and height, 0 to 1, not pixels")
        return self.label_of_class[int(number)], points.reshape(-1, 2)


READER = Reader(
    name="yolo-seg",
    description="YOLO's text file with polygons for each image",
    open=open_yolo,
    options={"ignored": "classes whose pixels become unlabelled: NAME,NAME"},
    needs=f"{NEEDS}; sub-folders or SPLIT.txt lists as splits",
)
