"""The files of a data set: those of each image, and those about all images.

Each data set is a folder of its own, with the images (as links) in it. Each image's own files are written with it;
files about all images are assembled at the end from these, one at a time.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opensan.assemble.segments import Segments
from opensan.files import atomic_path, link, write_text


@dataclass(frozen=True)
class Labelled:
    """An image with its labels."""

    stem: str
    """Its name in the data set, without suffix: "0001", or "deep/er/0001"."""
    photograph: Path
    labels: np.ndarray
    """[H, W] int, index into `names`, or -1 for unlabelled."""
    names: Sequence[str]
    confidence: Callable[[], Sequence[float | None]]
    """Returns each word's mean over its pixels, in [0, 1], None without any; called only by formats that store it."""
    model: str
    segments: Callable[[], Segments] | None = None
    """Returns the image's segments; called only by formats of objects, which need it."""


@dataclass(frozen=True)
class Dataset:
    """A kind of data set: its folder in the results, and how its files are written."""

    folder: str
    photographs: str
    """The sub-folder with links to the images."""
    pattern: str
    """The path of an image's own file, given its {stem}."""
    write: Callable[[Path, Labelled], None]
    """Writes an image's own file."""
    finish: Callable[[Path, Sequence["Member"], Sequence[str]], None]
    """Writes the files about all images (in their order) and the words, to the folder."""
    finished: tuple[str, ...]
    """The files that `finish` writes."""
    rename: Callable[[str], str] = str
    """Converts an image's stem to the name that this kind of data set needs."""
    drawing: str = ""
    """The path of an image's picture of labels, given its {stem}, if there is one beside its own file."""
    draw: Callable[[Path, Labelled], None] | None = None
    """Writes that picture."""

    def paths(self, stem: str, suffix: str) -> tuple[str, ...]:
        """Return the image's link and its own files, relative to the results."""
        stem = self.rename(stem)
        own = [pattern.format(stem=stem) for pattern in (self.pattern, self.drawing) if pattern]
        return (f"{self.folder}/{self.photographs}/{stem}{suffix}", *(f"{self.folder}/{path}" for path in own))

    def add(self, out: Path, labelled: Labelled) -> None:
        """Write one image's own files into the results folder `out`."""
        paths = [out / path for path in self.paths(labelled.stem, labelled.photograph.suffix)]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        link(labelled.photograph, paths[0], symbolic=False)
        self.write(paths[1], labelled)
        if self.draw is not None:
            self.draw(paths[2], labelled)

    def complete(self, out: Path, members: Sequence["Member"], names: Sequence[str]) -> None:
        """Write the files about all images; the words are `names`."""
        self.finish(out / self.folder, members, names)


@dataclass(frozen=True)
class Member:
    """An image of a data set."""

    stem: str
    suffix: str
    """Suffix of its file, with the dot."""


def parts(folder: Path, members: Iterable[Member]) -> Iterator[Any]:
    """Yield the images' own JSON files, one after the other."""
    for member in members:
        yield json.loads((folder / "parts" / f"{member.stem}.json").read_bytes())


def as_json(value: object) -> str:
    """Return plain data as JSON, on one line, with names as they are."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write_separated(write: Callable[[str], object], records: Iterable[str]) -> None:
    """Write the items of a JSON list, a line each."""
    for number, record in enumerate(records):
        write(("," if number else "") + "\n" + record)


def finish_instances(folder: Path, members: Sequence[Member], labels: Iterable[int], names: Sequence[str]) -> None:
    """Write COCO's file of instances; its categories are those of `labels`, and category ids count all words from 1."""
    categories = [{"id": label + 1, "name": names[label], "supercategory": ""} for label in labels]

    def annotations() -> Iterator[str]:
        count = 0
        for number, part in enumerate(parts(folder, members), 1):
            for annotation in part["annotations"]:
                count += 1
                yield as_json({"id": count, "image_id": number, **annotation})

    write_coco(folder / "annotations" / "instances_all.json", folder, members, categories, annotations())


def write_coco(
    path: Path,
    folder: Path,
    members: Sequence[Member],
    categories: Sequence[Mapping[str, Any]],
    annotations: Iterable[str],
) -> None:
    """Write COCO's file about all images, with image ids from 1 in the members' order."""
    images = (
        as_json(_image(number, f"{member.stem}{member.suffix}", part))
        for number, (member, part) in enumerate(zip(members, parts(folder, members), strict=True), 1)
    )
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(f'{{"info": {{"description": "made by opensan"}}, "categories": {as_json(categories)},\n"images": [')
        write_separated(file.write, images)
        file.write('],\n"annotations": [')
        write_separated(file.write, annotations)
        file.write("]}\n")


def _image(number: int, name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": part["width"], "height": part["height"]}


def yolo_stem(stem: str) -> str:
    """Rename folders called "images": training tools replace the last "images" in an image's path by "labels"."""
    return "/".join(f"{part}_" if part == "images" else part for part in stem.split("/"))


def finish_yolo(folder: Path, members: Sequence[Member], names: Sequence[str]) -> None:
    """Write YOLO's list of images, and the words."""
    import yaml

    photographs = (f"./images/{yolo_stem(member.stem)}{member.suffix}\n" for member in members)
    write_text(folder / "all.txt", "".join(photographs))
    data = {"path": str(folder.absolute()), "train": "all.txt", "val": "all.txt", "names": dict(enumerate(names))}
    write_text(folder / "data.yaml", yaml.safe_dump(data, allow_unicode=True, sort_keys=False))
