"""Write many images' label maps as one data set, for annotation tools and training: COCO, YOLO, VOC, Label Studio.

Each data set is a folder of its own, with the images (as links) in it. Each image's own files are written with it;
files about all images are assembled at the end from these, one at a time.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from opensan.errors import UserError
from opensan.files import atomic_path, link, write_text
from opensan.outputs.coco import run_lengths
from opensan.outputs.colours import palette
from opensan.outputs.label_studio import SPECK, label_studio_regions, mean_score
from opensan.outputs.polygons import regions, without_holes

VOC_WORDS = 254
"""VOC's 8-bit maps keep 0 for the background and 255 for "don't care"."""


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

    def paths(self, stem: str, suffix: str) -> tuple[str, str]:
        """Return the image's link and its own file, relative to the results."""
        stem = self.rename(stem)
        return (
            f"{self.folder}/{self.photographs}/{stem}{suffix}",
            f"{self.folder}/{self.pattern.format(stem=stem)}",
        )

    def add(self, out: Path, labelled: Labelled) -> None:
        """Write one image's own files into the results folder `out`."""
        photograph, own = (out / path for path in self.paths(labelled.stem, labelled.photograph.suffix))
        for path in (photograph, own):
            path.parent.mkdir(parents=True, exist_ok=True)
        link(labelled.photograph, photograph, symbolic=False)
        self.write(own, labelled)

    def complete(self, out: Path, members: Sequence["Member"], names: Sequence[str]) -> None:
        """Write the files about all images; the words are `names`."""
        self.finish(out / self.folder, members, names)


@dataclass(frozen=True)
class Member:
    """An image of a data set."""

    stem: str
    suffix: str
    """Suffix of its file, with the dot."""


def _write_coco(path: Path, labelled: Labelled) -> None:
    from faster_coco_eval import mask as coco_mask  # slow to import

    height, width = labelled.labels.shape
    confidence = labelled.confidence()
    annotations = [
        {
            "category_id": label + 1,
            "segmentation": rle,
            "area": int(coco_mask.area(rle)),
            "bbox": [int(side) for side in coco_mask.toBbox(rle)],
            "iscrowd": 0,
            "score": round(confidence[label] or 0.0, 6),
        }
        for label, rle in run_lengths(labelled.labels, len(labelled.names)).items()
    ]
    write_text(path, _json({"width": width, "height": height, "annotations": annotations}) + "\n")


def _finish_coco(folder: Path, members: Sequence[Member], names: Sequence[str]) -> None:
    def images() -> Iterator[str]:
        for number, (member, part) in enumerate(zip(members, _parts(folder, members), strict=True), 1):
            size = {"width": part["width"], "height": part["height"]}
            yield _json({"id": number, "file_name": f"{member.stem}{member.suffix}", **size})

    def annotations() -> Iterator[str]:
        count = 0
        for number, part in enumerate(_parts(folder, members), 1):
            for annotation in part["annotations"]:
                count += 1
                yield _json({"id": count, "image_id": number, **annotation})

    categories = [{"id": label + 1, "name": name, "supercategory": ""} for label, name in enumerate(names)]
    (folder / "annotations").mkdir(exist_ok=True)
    with (
        atomic_path(folder / "annotations" / "instances_all.json") as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        file.write(f'{{"info": {{"description": "made by opensan"}}, "categories": {_json(categories)},\n"images": [')
        _write_separated(file.write, images())
        file.write('],\n"annotations": [')
        _write_separated(file.write, annotations())
        file.write("]}\n")


def _write_yolo(path: Path, labelled: Labelled) -> None:
    height, width = labelled.labels.shape
    lines = []
    for region in regions(labelled.labels):
        if region.pixels >= SPECK:
            for polygon in without_holes(region, SPECK):
                corners = (polygon / (width, height)).ravel()
                lines.append(f"{region.label} " + " ".join(f"{value:.6f}" for value in corners))
    write_text(path, "".join(f"{line}\n" for line in lines))


def _yolo_stem(stem: str) -> str:
    """Rename folders called "images": training tools replace the last "images" in an image's path by "labels"."""
    return "/".join(f"{part}_" if part == "images" else part for part in stem.split("/"))


def _finish_yolo(folder: Path, members: Sequence[Member], names: Sequence[str]) -> None:
    import yaml

    photographs = (f"./images/{_yolo_stem(member.stem)}{member.suffix}\n" for member in members)
    write_text(folder / "all.txt", "".join(photographs))
    data = {"path": str(folder.absolute()), "train": "all.txt", "val": "all.txt", "names": dict(enumerate(names))}
    write_text(folder / "data.yaml", yaml.safe_dump(data, allow_unicode=True, sort_keys=False))


def _write_voc(path: Path, labelled: Labelled) -> None:
    picture = Image.fromarray((labelled.labels + 1).astype(np.uint8))  # unlabelled, -1, is VOC's background
    picture.putpalette(voc_palette().tobytes())
    with atomic_path(path) as temporary:
        picture.save(temporary)


def _finish_voc(folder: Path, members: Sequence[Member], names: Sequence[str]) -> None:
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    write_text(lists / "all.txt", "".join(f"{member.stem}\n" for member in members))
    lines = ["# label:color_rgb:parts:actions"]
    for name, colour in zip(["background", *_voc_names(names)], voc_palette()[: len(names) + 1].tolist(), strict=True):
        lines.append(f"{name}:{','.join(map(str, colour))}::")
    write_text(folder / "labelmap.txt", "\n".join(lines) + "\n")


def _voc_names(names: Sequence[str]) -> list[str]:
    """Return names that a label map can hold: a colon would end them, "#" begin a comment, equal ones be one class."""
    used = {"background"}  # the unlabelled pixels
    rows = []
    for name in names:
        plain = " ".join(name.replace(":", " ").lstrip("# ").split()) or "word"
        free, number = plain, 1
        while free.lower() in used:
            number += 1
            free = f"{plain} {number}"
        used.add(free.lower())
        rows.append(free)
    return rows


def voc_palette() -> np.ndarray:
    """Return VOC's colours [256, 3] uint8: bit k of a channel, from the highest, is bit 3k + channel of the index."""
    index = np.arange(256)
    channels = [sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
    return np.stack(channels, axis=1).astype(np.uint8)


def _write_label_studio(path: Path, labelled: Labelled) -> None:
    result = label_studio_regions(
        "brushlabels", labelled.labels, labelled.names, labelled.confidence(), from_name="words", to_name="image"
    )
    prediction: dict[str, Any] = {"model_version": labelled.model, "result": result}
    if result:
        prediction["score"] = mean_score(result)
    photograph = quote(f"images/{labelled.stem}{labelled.photograph.suffix}")
    task = {"data": {"image": f"/data/local-files/?d={photograph}"}, "predictions": [prediction]}
    write_text(path, _json([task]) + "\n")


def _finish_label_studio(folder: Path, members: Sequence[Member], names: Sequence[str]) -> None:
    from xml.sax.saxutils import quoteattr  # half of the network code of Python comes with it

    with atomic_path(folder / "tasks.json") as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        _write_separated(file.write, (_json(task) for tasks in _parts(folder, members) for task in tasks))
        file.write("]\n")
    labels = [
        f'    <Label value={quoteattr(name)} background="#{bytes(colour).hex()}"/>\n'
        for name, colour in zip(names, palette(len(names)), strict=True)
    ]
    config = (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <BrushLabels name="words" toName="image">\n{"".join(labels)}  </BrushLabels>\n</View>\n'
    )
    write_text(folder / "config.xml", config)


def _parts(folder: Path, members: Iterable[Member]) -> Iterator[Any]:
    """Yield the images' own JSON files, one after the other."""
    for member in members:
        yield json.loads((folder / "parts" / f"{member.stem}.json").read_bytes())


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _write_separated(write: Callable[[str], object], records: Iterable[str]) -> None:
    for number, record in enumerate(records):
        write(("," if number else "") + "\n" + record)


DATASETS: Mapping[str, Dataset] = {
    "coco": Dataset(
        "coco", "images", "parts/{stem}.json", _write_coco, _finish_coco, ("annotations/instances_all.json",)
    ),
    "yolo": Dataset(
        *("yolo", "images", "labels/{stem}.txt", _write_yolo, _finish_yolo),
        ("all.txt", "data.yaml"),
        rename=_yolo_stem,
    ),
    "voc": Dataset(
        *("voc", "JPEGImages", "SegmentationClass/{stem}.png", _write_voc, _finish_voc),
        ("ImageSets/Segmentation/all.txt", "labelmap.txt"),
    ),
    "labelstudio": Dataset(
        *("labelstudio", "images", "parts/{stem}.json", _write_label_studio, _finish_label_studio),
        ("tasks.json", "config.xml"),
    ),
}


def check_words(name: str, words: int) -> None:
    """Raise UserError if a data set of this kind can't hold so many words."""
    if name == "voc" and words > VOC_WORDS:
        raise UserError(f"voc holds at most {VOC_WORDS} words, not {words}: choose coco or yolo")
