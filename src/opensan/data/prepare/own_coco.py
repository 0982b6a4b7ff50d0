"""COCO annotations of somebody's own: `opensan data prepare coco-panoptic` and `coco-instances`.

Format: https://cocodataset.org/#format-data. Files come from anywhere, so nothing in them is believed: paths stay below
the folder, and sizes are compared with the photograph's before anything is allocated.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from opensan.data.prepare.own_labels import Layers, look_up, read_map, upright_as
from opensan.data.prepare.own_photographs import (
    NO_SPLIT,
    Found,
    below,
    evaluation_split,
    fail,
    photographs,
    vocabulary_of,
    without,
)
from opensan.data.prepare.source import Reader, Source
from opensan.errors import UserError, reason
from opensan.outputs.coco import decode_mask
from opensan.vocabulary import UNLABELLED

MAX_OUTLINE = 4_000_000
"""Pixels along a polygon; memory goes with it. Outlines of real objects have thousands."""

_ROBOFLOW = "_annotations.coco.json"


@dataclass(frozen=True)
class _File:
    """One annotation file: the photographs of a split."""

    path: Path
    split: str
    images: list[Mapping[str, Any]]
    annotations: dict[int, list[Mapping[str, Any]]]
    """By image id."""
    categories: dict[int, str]


def open_panoptic(folder: Path, *, annotations: str = "", ignored: str = "") -> Source:
    """JSON files with a PNG a photograph, whose pixels say the segment: R + 256 G + 65536 B."""
    return _open(folder, "panoptic", annotations, ignored, _panoptic_labels)


def open_instances(folder: Path, *, annotations: str = "", ignored: str = "") -> Source:
    """JSON files with a polygon or run-length mask an object."""
    return _open(folder, "instances", annotations, ignored, _instance_labels)


def _open(folder: Path, kind: str, annotations: str, ignored: str, labels_of: Callable) -> Source:
    files = [_read(path, folder, kind) for path in _annotation_files(folder, kind, annotations)]
    first = files[0]
    for file in files[1:]:
        if file.categories != first.categories:
            raise UserError(f"{file.path}: its categories are not those of {first.path}")
    vocabulary = vocabulary_of(list(first.categories.values()), f"{first.path}: categories")
    vocabulary, labels = without(vocabulary, ignored, str(first.path))
    label_of_category = dict(zip(first.categories, labels, strict=True))
    found: dict[Path, Found] = {}
    readers: dict[Path, Callable[[], np.ndarray]] = {}
    for file in files:
        images = _image_folder(folder, file)
        for record in file.images:
            name = _get(record, "file_name", str, f"{file.path}: image {record['id']}")
            path = below(images, name, f"{file.path}: image {record['id']}")
            if path in readers:
                raise UserError(f"{file.path}: {name!r} is listed twice, here or in another annotation file")
            found[path] = Found(f"{file.split}/{PurePosixPath(name).with_suffix('')}", path, [file.split])
            readers[path] = labels_of(folder, file, record, path, label_of_category)
    return Source(
        vocabulary=vocabulary,
        photographs=photographs(found.values(), lambda one: readers[one.file]),
        evaluation_split=evaluation_split(file.split for file in files),
    )


def _annotation_files(folder: Path, kind: str, annotations: str) -> list[Path]:
    if annotations:
        return [below(folder, name.strip(), "annotations") for name in annotations.split(",")]
    names = [f"{kind}_*.json", *([_ROBOFLOW] if kind == "instances" else [])]
    places = [folder, folder / "annotations", *(path for path in sorted(folder.glob("*")) if path.is_dir())]
    found = dict.fromkeys(path for place in places for name in names for path in sorted(place.glob(name)))
    if not found:
        raise UserError(
            f"{folder}: no {' or '.join(names)}, in it, in annotations/ or in a folder of a split; "
            "say annotations=FILE.json (a path in the folder) if it is called otherwise"
        )
    return list(found)


def _read(path: Path, folder: Path, kind: str) -> _File:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable COCO JSON file ({reason(error)})") from None
    place = str(path)
    images, annotations, categories = (_list(data, key, place) for key in ("images", "annotations", "categories"))
    if not images:
        raise UserError(f"{place}: it lists no images")
    by_image: dict[int, list[Mapping[str, Any]]] = {}
    for record in images:
        by_image[_get(record, "id", int, f"{place}: an image")] = []
    if len(by_image) < len(images):
        raise UserError(f"{place}: two images have the same id")
    names = {
        _get(record, "id", int, f"{place}: a category"): _get(record, "name", str, f"{place}: a category")
        for record in categories
    }
    if len(names) < len(categories):
        raise UserError(f"{place}: two categories have the same id")
    strays = 0
    for record in annotations:
        owner = by_image.get(_get(record, "image_id", int, f"{place}: an annotation"))
        strays += owner is None
        if owner is not None:
            owner.append(record)
    if strays:
        warnings.warn(f"{path}: {strays} annotations are of images that the file doesn't list", stacklevel=4)
    return _File(path, _split(path, folder, kind), images, by_image, names)


def _split(path: Path, folder: Path, kind: str) -> str:
    """What the file's name says: "panoptic_train2017.json", or the folder that a "_annotations.coco.json" is in."""
    if path.name == _ROBOFLOW:
        return NO_SPLIT if path.parent == folder else path.parent.name
    return path.stem.removeprefix(f"{kind}_") or NO_SPLIT


def _image_folder(folder: Path, file: _File) -> Path:
    """Where the photographs are, known by where the first of them is."""
    places = [folder / file.split, folder / "images" / file.split, folder / "images", file.path.parent, folder]
    for record in file.images[:100]:
        place = f"{file.path}: image {record['id']}"
        name = _get(record, "file_name", str, place)
        for images in places:
            if below(images, name, place).is_file():
                return images
    shown = ", ".join(dict.fromkeys(f"{images}/" for images in places))
    raise UserError(f"{file.path}: its photographs are in none of {shown}")


@dataclass(frozen=True)
class _Panoptic:
    """Reads a photograph's panoptic PNG."""

    png: Path
    image: Path
    label_of_segment: dict[int, int]

    def __call__(self) -> np.ndarray:
        pixels = read_map(self.png, str(self.png), self.image)
        one_channel = pixels.stored is not None and pixels.how == "as grey" and pixels.stored.any()
        if pixels.shown.dtype != np.uint8 or one_channel:
            raise UserError(f"{self.png}: one channel; COCO panoptic PNGs are RGB, segment = R + 256 G + 65536 B")

        def complaint(segment: int, count: int) -> str:
            return f"{self.png}: {count} pixels are of segment {segment}, which the JSON file doesn't list"

        segments = pixels.colours.astype(np.int32) @ [1, 256, 65_536]
        return look_up(segments, {**self.label_of_segment, 0: UNLABELLED}, complaint)


def _panoptic_labels(
    folder: Path, file: _File, record: Mapping[str, Any], image: Path, label_of_category: Mapping[int, int]
) -> Callable[[], np.ndarray]:
    place = f"{file.path}: image {record['id']}"
    annotations = file.annotations[record["id"]]
    if len(annotations) != 1:
        return partial(fail, f"{place}: has {len(annotations)} annotations, not one (the segments of a panoptic PNG)")
    labels = {}
    for segment in _list(annotations[0], "segments_info", place):
        number = _get(segment, "id", int, f"{place}: a segment")
        if not 0 < number < 2**24:
            raise UserError(f"{place}: {number} is no segment id (1 to {2**24 - 1})")
        labels[number] = _label(segment, label_of_category, f"{place}: segment {number}")
    name = _get(annotations[0], "file_name", str, place)
    beside = [file.path.with_suffix(""), folder / f"panoptic_{file.split}", folder / "panoptic" / file.split]
    pngs = [below(place_of_pngs, name, place) for place_of_pngs in (*beside, folder / "panoptic", file.path.parent)]
    return _Panoptic(next((png for png in pngs if png.exists()), pngs[0]), image, labels)


@dataclass(frozen=True)
class _Instances:
    """Draws a photograph's objects."""

    name: str
    image: Path
    size: tuple[int, int]
    objects: tuple[tuple[str, int, Any], ...]
    """What messages call it, label, and segmentation as it is in the file."""

    def __call__(self) -> np.ndarray:
        turn = upright_as(self.image, self.size, self.name)
        layers = Layers(self.size)
        for name, label, segmentation in self.objects:
            try:
                layers.add(mask_of(segmentation, *self.size), label)
            except UserError as error:
                raise UserError(f"{self.name}: {name}: {error}") from None
        return turn(layers.labels)


def _instance_labels(
    folder: Path, file: _File, record: Mapping[str, Any], image: Path, label_of_category: Mapping[int, int]
) -> Callable[[], np.ndarray]:
    place = f"{file.path}: image {record['id']}"
    size = (_get(record, "height", int, place), _get(record, "width", int, place))
    objects = []
    for number, annotation in enumerate(file.annotations[record["id"]], 1):
        name = f"annotation {annotation.get('id', number)}"
        label = _label(annotation, label_of_category, f"{place}: {name}")
        objects.append((name, label, annotation.get("segmentation")))
    return _Instances(place, image, size, tuple(objects))


def mask_of(segmentation: object, height: int, width: int) -> np.ndarray:
    """The mask [height, width] bool of a COCO segmentation: polygons, or run lengths (compressed or not).

    Polygons are drawn as COCO's own tools draw them. Raises ValueError, one line, on anything else, and on what would
    take memory out of all proportion.
    """
    if isinstance(segmentation, Mapping):
        return decode_mask(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise UserError("has no segmentation (polygons or run lengths), only a box perhaps")
    polygons = [_polygon(points, height, width) for points in segmentation]
    polygons = [points.tolist() for points in polygons if len(points) >= 6]  # two points enclose nothing
    if not polygons:
        return np.zeros((height, width), dtype=bool)
    from faster_coco_eval import mask as coco_mask  # slow to import

    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


def _polygon(points: object, height: int, width: int) -> np.ndarray:
    """The coordinates x, y, x, y, ... [2 N] float64 of a polygon, checked."""
    numbers = isinstance(points, list) and all(type(value) in (int, float) for value in points)
    # Not larger than a double holds: a JSON file may write any number of digits.
    if not numbers or len(points) % 2 or not all(abs(value) < 1e300 for value in points):
        raise UserError("a polygon is not a list of numbers x, y, x, y, ...")
    flat = np.array(points, dtype=np.float64)
    corners = flat.reshape(-1, 2)
    size = np.array([width, height])
    if (corners < -size).any() or (corners > 2 * size).any():
        raise UserError(f"a polygon lies far outside the photograph of {width}x{height} (width x height)")
    steps = np.abs(np.diff(corners, axis=0, append=corners[:1])).max(axis=1)
    if steps.sum() > MAX_OUTLINE:
        raise UserError(f"a polygon's outline is {steps.sum():,.0f} pixels long, more than {MAX_OUTLINE:,}")
    return flat


def _label(record: Mapping[str, Any], label_of_category: Mapping[int, int], place: str) -> int:
    """The label of an object or segment; a crowd's is "unlabelled"."""
    category = _get(record, "category_id", int, place)
    if category not in label_of_category:
        raise UserError(f"{place}: category_id {category} is none of the file's categories")
    return UNLABELLED if record.get("iscrowd") else label_of_category[category]


def _get(record: Mapping[str, Any], key: str, kind: type, place: str) -> Any:
    value = record.get(key)
    if type(value) is not kind:
        raise UserError(f"{place}: {key!r} must be {'text' if kind is str else 'a whole number'}, not {value!r:.40}")
    return value


def _list(data: object, key: str, place: str) -> list[Mapping[str, Any]]:
    value = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise UserError(f"{place}: not this kind of COCO file, it has no list {key!r} of objects")
    return value


_OPTIONS = {
    "annotations": "JSON files in the folder, if they are called otherwise: FILE,FILE",
    "ignored": "categories whose pixels become unlabelled: NAME,NAME",
}

PANOPTIC = Reader(
    name="coco-panoptic",
    description="COCO panoptic JSON with its PNGs",
    open=open_panoptic,
    options=_OPTIONS,
    needs="[annotations/]panoptic_SPLIT.json, its PNGs in panoptic_SPLIT/, photographs in SPLIT/ or images/",
)

INSTANCES = Reader(
    name="coco-instances",
    description="COCO JSON with a polygon or mask an object",
    open=open_instances,
    options=_OPTIONS,
    needs="[annotations/]instances_SPLIT.json or SPLIT/_annotations.coco.json, photographs in SPLIT/ or images/",
)
