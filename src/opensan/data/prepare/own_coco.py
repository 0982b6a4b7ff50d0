"""Read users' COCO annotations: `opensan data prepare coco-panoptic` and `coco-instances`.

Format: https://cocodataset.org/#format-data. Files are not trusted: paths stay below
the folder, and sizes are compared with the image's before anything is allocated.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opensan.data.prepare.drawn_masks import mask_of
from opensan.data.prepare.own_images import (
    NO_SPLIT,
    FolderImage,
    background_notes,
    below,
    evaluation_split,
    fail,
    is_image,
    source_images,
    vocabulary_of,
    without,
)
from opensan.data.prepare.own_labels import Layers, look_up, read_map, upright_as
from opensan.data.prepare.source import Labelled, Reader, Source
from opensan.errors import UserError, reason
from opensan.images import stored_size
from opensan.vocabulary import UNLABELLED

_ROBOFLOW = "_annotations.coco.json"


@dataclass(frozen=True)
class _File:
    """One annotation file: the images of a split."""

    path: Path
    split: str
    images: list[Mapping[str, Any]]
    annotations: dict[int, list[Mapping[str, Any]]]
    """Annotations by image id."""
    categories: dict[int, Mapping[str, Any]]
    """Categories by id."""
    left_out: dict[str, str]
    """Records that can't be used: name -> reason."""

    @property
    def objects(self) -> Iterator[Mapping[str, Any]]:
        """Every object, or segment of a panoptic file."""
        for annotation in (item for of_image in self.annotations.values() for item in of_image):
            segments = annotation.get("segments_info")
            yield from (
                (item for item in segments if isinstance(item, Mapping)) if isinstance(segments, list) else [annotation]
            )


def open_panoptic(folder: Path, *, annotations: str = "", ignored: str = "", crowds: str = "") -> Source:
    """Open JSON files with a PNG an image, whose pixels hold the segment: R + 256 G + 65536 B."""
    return _open(folder, "panoptic", annotations, ignored, crowds, _panoptic_labels)


def open_instances(folder: Path, *, annotations: str = "", ignored: str = "", crowds: str = "") -> Source:
    """Open JSON files with a polygon or run-length mask an object."""
    return _open(folder, "instances", annotations, ignored, crowds, _instance_labels)


def _open(folder: Path, kind: str, annotations: str, ignored: str, crowds: str, labels_of: Callable) -> Source:
    files = [_read(path, folder, kind) for path in _annotation_files(folder, kind, annotations)]
    names, notes = _class_names(files)
    first = files[0].path
    vocabulary, labels = without(vocabulary_of(list(names.values()), f"{first}: categories"), ignored, str(first))
    crowds_are_objects, said = _what_crowds_are(files, crowds)
    label_of_category = _Labels(dict(zip(names, labels, strict=True)), crowds_are_objects)
    images_found: dict[Path, FolderImage] = {}
    readers: dict[Path, Callable[[], np.ndarray | Labelled]] = {}
    left_out: dict[str, str] = {}
    for file in files:
        images = _image_folder(folder, file)
        left_out |= file.left_out
        for record in file.images:
            source = f"{file.path.name}: image {record['id']}"
            try:
                name = _get(record, "file_name", str, source)
                path = below(images, name, source)
                if path in readers:
                    raise UserError(f"{source}: {name!r} is listed twice, here or in another annotation file")
                readers[path] = labels_of(folder, file, record, path, label_of_category)
            except UserError as error:
                left_out[source] = str(error).removeprefix(f"{source}: ")
                continue
            below_images = path.relative_to(images).with_suffix("").as_posix()
            images_found[path] = FolderImage(f"{file.split}/{below_images}", path, [file.split])
    if not images_found:
        raise UserError(f"{first}: none of its images can be used: {'; '.join(list(left_out.values())[:3])}")
    return Source(
        vocabulary=vocabulary,
        images=source_images(images_found.values(), lambda image_file: readers[image_file.file]),
        evaluation_split=evaluation_split(file.split for file in files),
        left_out=left_out,
        notes=(*notes, *said, *_not_listed(images_found), *background_notes(vocabulary)),
        unlabelled_because=(
            "the objects have boxes only, or no pixel"
            if crowds_are_objects or not any(map(_is_crowd, files[0].objects))
            else "all objects may be crowds; say crowds=objects if they are masks of single objects"
        ),
    )


def _not_listed(listed: Collection[Path]) -> Iterator[str]:
    """Return a note about images that lie beside those of the files and are listed in none of them."""
    for folder in sorted({path.parent for path in listed}):
        others = [path for path in folder.iterdir() if is_image(path) and path not in listed] if folder.is_dir() else []
        if others:
            yield f"{folder}: {len(others)} images are in no annotation file, and not used (such as {min(others).name})"


def _class_names(files: Sequence[_File]) -> tuple[dict[int, str], list[str]]:
    """Return the names of the classes by category id, and notes about categories that are not classes.

    Some tools put a category of the project's name before the others, which no object has: one that is the others'
    supercategory, or repeats the name of another, is left out.
    """
    used = {_whole(entry.get("category_id")) for file in files for entry in file.objects}
    kept: list[dict[int, str]] = []
    notes: dict[str, None] = {}
    for file in files:
        names = {number: category["name"] for number, category in file.categories.items()}
        counts = Counter(names.values())
        parents = {
            category.get("supercategory")
            for category in file.categories.values()
            if _is_hashable(category.get("supercategory"))
        }
        for number, category in file.categories.items():
            is_root = names[number] in parents and category.get("supercategory") in (None, "", "none")
            if number not in used and (is_root or counts[category["name"]] > 1) and len(names) > 1:
                counts[names.pop(number)] -= 1
                notes[
                    f"category {number} ({category['name']!r}) has no object and is left out, as a root of the others"
                ] = None
        kept.append(names)
    for file, names in zip(files[1:], kept[1:], strict=True):
        if names != kept[0]:
            raise UserError(f"{file.path}: its categories are not those of {files[0].path}")
    return kept[0], list(notes)


def _is_hashable(value: object) -> bool:
    return isinstance(value, Hashable)


def _is_crowd(record: Mapping[str, Any]) -> bool:
    return record.get("iscrowd") not in (None, 0, "", "0", "false", "False")


def _what_crowds_are(files: Sequence[_File], crowds: str) -> tuple[bool, list[str]]:
    """Return whether records marked as crowds are objects like others, and notes about that.

    In COCO a crowd is a region of objects that were not annotated separately. CVAT marks every mask that was drawn with
    a brush as a crowd; sets with such masks have only these, or the attribute "occluded" that CVAT writes.
    """
    if crowds not in ("", "objects", "unlabelled"):
        raise UserError(f"crowds={crowds}: must be objects or unlabelled")
    marked = total = 0
    of_cvat = False
    for record in (record for file in files for record in file.objects):
        total += 1
        marked += _is_crowd(record)
        of_cvat |= isinstance(record.get("attributes"), Mapping) and "occluded" in record["attributes"]
    if crowds or not marked:
        return crowds == "objects", []
    if marked == total or of_cvat:
        why = "as all are" if marked == total else "as CVAT writes masks"
        return True, [
            f"{marked} of {total} objects are marked as crowds (iscrowd: 1), {why}; they are taken as objects; "
            "say crowds=unlabelled if they are crowds"
        ]
    return False, [
        f"{marked} of {total} objects are crowds (iscrowd: 1) and unlabelled; if they are masks of single objects, "
        "say crowds=objects"
    ]


@dataclass(frozen=True)
class _Labels:
    """Labels of categories, and the meaning of crowds."""

    by_category: Mapping[int, int]
    crowds_are_objects: bool

    def of(self, record: Mapping[str, Any], source: str) -> int:
        """Return an object or segment's label. Raises UserError, beginning with `source`, on an unknown category."""
        category = _get(record, "category_id", int, source)
        if category not in self.by_category:
            raise UserError(f"{source}: category_id {category} is none of the file's categories")
        return UNLABELLED if _is_crowd(record) and not self.crowds_are_objects else self.by_category[category]


def _annotation_files(folder: Path, kind: str, annotations: str) -> list[Path]:
    if annotations:
        return [below(folder, name.strip(), "annotations") for name in annotations.split(",")]
    names = [f"{kind}_*.json", *([_ROBOFLOW] if kind == "instances" else [])]
    places = [folder, folder / "annotations", *(path for path in sorted(folder.glob("*")) if path.is_dir())]
    files = dict.fromkeys(path for parent in places for name in names for path in sorted(parent.glob(name)))
    if not files:
        raise UserError(
            f"{folder}: no {' or '.join(names)}, in it, in annotations/ or in a folder of a split; "
            "say annotations=FILE.json (a path in the folder) if it is called otherwise"
        )
    return list(files)


def _read(path: Path, folder: Path, kind: str) -> _File:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable COCO JSON file ({reason(error)})") from None
    source, left_out = str(path), {}
    images, annotations, categories = (_list(data, key, source) for key in ("images", "annotations", "categories"))
    if not images:
        raise UserError(f"{source}: it lists no images")
    by_image: dict[int, list[Mapping[str, Any]]] = {}
    kept: list[Mapping[str, Any]] = []
    identities = Counter(_whole(record.get("id")) for record in images)
    for number, record in enumerate(images, 1):
        identity = _whole(record.get("id"))
        if identity is None or identities[identity] > 1:
            left_out[f"{path.name}: image {number} in the file"] = (
                f"its id is {record.get('id')!r:.40}: a whole number is needed that no other image has"
            )
            continue
        by_image[identity] = []
        kept.append({**record, "id": identity})
    named: dict[int, Mapping[str, Any]] = {}
    for category in categories:
        _get(category, "name", str, f"{source}: a category")
        if named.setdefault(_get(category, "id", int, f"{source}: a category"), category) is not category:
            raise UserError(f"{source}: two categories have the same id")
    strays = 0
    for number, record in enumerate(annotations, 1):
        owner = _whole(record.get("image_id"))
        if owner is None:
            left_out[f"{path.name}: annotation {record.get('id', number)!r:.40}"] = (
                f"its image_id is {record.get('image_id')!r:.40}"
            )
        elif owner in by_image:
            by_image[owner].append(record)
        else:
            strays += 1
    if strays:
        left_out[f"{path.name}: {strays} annotations"] = "they are of images that the file doesn't list"
    return _File(path, _split(path, folder, kind), kept, by_image, named, left_out)


def _split(path: Path, folder: Path, kind: str) -> str:
    """Return the split in the file's name, "panoptic_train2017.json", or the folder of a "_annotations.coco.json"."""
    if path.name == _ROBOFLOW:
        return NO_SPLIT if path.parent == folder else path.parent.name
    return path.stem.removeprefix(f"{kind}_") or NO_SPLIT


def _image_folder(folder: Path, file: _File) -> Path:
    """Return the folder of the images, which is the one that holds the first image."""
    places = [folder / file.split, folder / "images" / file.split, folder / "images", file.path.parent, folder]
    usable = False
    for record in file.images[:100]:
        for images in places:
            try:
                if below(images, _get(record, "file_name", str, "an image"), "an image").is_file():
                    return images
                usable = True
            except (UserError, OSError):  # said of the record later; a name may be too long to ask for
                break
    if not usable:
        return folder
    shown = ", ".join(dict.fromkeys(f"{images}/" for images in places))
    raise UserError(f"{file.path}: its images are in none of {shown}")


@dataclass(frozen=True)
class _Panoptic:
    """Reads an image's panoptic PNG."""

    png: Path
    image: Path
    label_of_segment: dict[int, int]
    things: tuple[int, ...]
    """The segments that are objects."""

    def __call__(self) -> Labelled:
        pixels = read_map(self.png, str(self.png), self.image)
        one_channel = pixels.stored is not None and pixels.how == "as grey" and pixels.stored.any()
        if pixels.shown.dtype != np.uint8 or one_channel:
            raise UserError(f"{self.png}: one channel; COCO panoptic PNGs are RGB, segment = R + 256 G + 65536 B")

        def complaint(segment: int, count: int) -> str:
            return f"{self.png}: {count} pixels are of segment {segment}, which the JSON file doesn't list"

        segments = pixels.colours.astype(np.int32) @ [1, 256, 65_536]
        labels = look_up(segments, {**self.label_of_segment, 0: UNLABELLED}, complaint)
        objects = np.zeros(labels.shape, dtype=np.int32)
        for number, segment in enumerate(self.things, 1):
            objects[segments == segment] = number
        return Labelled(labels, (), objects)


def _panoptic_labels(
    folder: Path, file: _File, record: Mapping[str, Any], image: Path, label_of_category: _Labels
) -> Callable[[], Labelled]:
    source = f"{file.path.name}: image {record['id']}"
    annotations = file.annotations[record["id"]]
    if len(annotations) != 1:
        return partial(fail, f"{source}: has {len(annotations)} annotations, not one (the segments of a panoptic PNG)")
    labels, things = {}, []
    for segment in _list(annotations[0], "segments_info", source):
        number = _get(segment, "id", int, f"{source}: a segment")
        if not 0 < number < 2**24:
            raise UserError(f"{source}: {number} is no segment id (1 to {2**24 - 1})")
        labels[number] = label_of_category.of(segment, f"{source}: segment {number}")
        category = file.categories.get(_whole(segment.get("category_id")) or 0, {})
        if labels[number] != UNLABELLED and category.get("isthing", 1) not in (0, False):
            things.append(number)
    name = _get(annotations[0], "file_name", str, source)
    beside = [file.path.with_suffix(""), folder / f"panoptic_{file.split}", folder / "panoptic" / file.split]
    pngs = [below(place_of_pngs, name, source) for place_of_pngs in (*beside, folder / "panoptic", file.path.parent)]
    return _Panoptic(next((png for png in pngs if png.exists()), pngs[0]), image, labels, tuple(things))


@dataclass(frozen=True)
class _Instances:
    """Draws an image's objects as labels."""

    name: str
    image: Path
    size: tuple[int, int] | None
    """(height, width) in the file."""
    objects: tuple[tuple[str, int, Any, bool], ...]
    """(Name for messages, label, segmentation as in the file, whether it has a box) of each object."""
    left_out: tuple[str, ...]

    def __call__(self) -> np.ndarray | Labelled:
        size = self._size()
        turn = upright_as(self.image, size, self.name)
        layers = Layers(size)
        left_out = list(self.left_out)
        for name, label, segmentation, has_box in self.objects:
            if segmentation == [] and not has_box:
                continue  # some tools leave objects without a pixel
            try:
                mask = mask_of(segmentation, *size)
                if isinstance(segmentation, list) and _are_shares(segmentation):
                    raise UserError("its corners are shares of width and height, 0 to 1, not pixels")
                layers.add(mask, label)
            except UserError as error:
                left_out.append(f"{name}: {error}")
        if left_out and len(left_out) == len(self.objects) + len(self.left_out):
            raise UserError(f"{self.name}: {'; '.join(left_out)}")
        return Labelled(turn(layers.labels), tuple(left_out), turn(layers.objects))

    def _size(self) -> tuple[int, int]:
        """Return the size in pixels that the objects are drawn on."""
        if self.size is not None:
            return self.size
        size, turn = stored_size(self.image)
        if turn is not None:
            raise UserError(
                f"{self.name}: has no width and height, and EXIF turns the image: which was drawn on is open"
            )
        return size


def _are_shares(polygons: Sequence[Sequence[float]]) -> bool:
    """Return whether all coordinates are fractions, as other tools write them."""
    values = [value for polygon in polygons for value in polygon]
    return all(0 <= value <= 1 for value in values) and any(value % 1 for value in values)


def _instance_labels(
    folder: Path, file: _File, record: Mapping[str, Any], image: Path, labels: _Labels
) -> Callable[[], np.ndarray | Labelled]:
    source = f"{file.path.name}: image {record['id']}"
    size = None
    if record.get("height") is not None or record.get("width") is not None:
        size = (_get(record, "height", int, source), _get(record, "width", int, source))
    objects, left_out = [], []
    for number, annotation in enumerate(file.annotations[record["id"]], 1):
        name = f"annotation {annotation.get('id', number)!r:.40}"
        box = annotation.get("bbox")
        has_box = (
            isinstance(box, list)
            and len(box) == 4
            and all(isinstance(side, int | float) and side > 0 for side in box[2:])
        )
        try:
            objects.append((name, labels.of(annotation, name), annotation.get("segmentation"), has_box))
        except UserError as error:
            left_out.append(str(error))
    return _Instances(source, image, size, tuple(objects), tuple(left_out))


def _get(record: Mapping[str, Any], key: str, kind: type, source: str) -> Any:
    value = record.get(key)
    if kind is int:
        value = _whole(value) if _whole(value) is not None else value
    if type(value) is not kind:
        raise UserError(f"{source}: {key!r} must be {'text' if kind is str else 'a whole number'}, not {value!r:.40}")
    return value


def _whole(value: object) -> int | None:
    """Return a whole number, which programs also write as 1.0 or "1"; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,18}", value, re.ASCII):
        return int(value)
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _list(data: object, key: str, source: str) -> list[Mapping[str, Any]]:
    value = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise UserError(f"{source}: not this kind of COCO file, it has no list {key!r} of objects")
    return value


_OPTIONS = {
    "annotations": "JSON files in the folder, if they are called otherwise: FILE,FILE",
    "ignored": "categories whose pixels become unlabelled: NAME,NAME",
    "crowds": "objects or unlabelled: what objects with iscrowd: 1 are (CVAT marks its masks so)",
}

PANOPTIC = Reader(
    name="coco-panoptic",
    description="COCO panoptic JSON with its PNGs",
    open=open_panoptic,
    options=_OPTIONS,
    needs="[annotations/]panoptic_SPLIT.json, its PNGs in panoptic_SPLIT/, images in SPLIT/ or images/",
)

INSTANCES = Reader(
    name="coco-instances",
    description="COCO JSON with a polygon or mask an object",
    open=open_instances,
    options=_OPTIONS,
    needs="[annotations/]instances_SPLIT.json or SPLIT/_annotations.coco.json, images in SPLIT/ or images/",
)
