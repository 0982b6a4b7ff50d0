"""Write many images' label maps as one data set, for annotation tools and training: COCO, YOLO, VOC, Label Studio.

Here are those of regions, one a word; `object_datasets` has those of objects.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from opensan.errors import UserError
from opensan.files import atomic_path, write_text
from opensan.outputs.coco import run_lengths
from opensan.outputs.dataset_files import (
    Dataset,
    Labelled,
    Member,
    as_json,
    finish_instances,
    finish_yolo,
    yolo_stem,
)
from opensan.outputs.label_studio import SPECK, finish_tasks, label_studio_regions, write_task
from opensan.outputs.object_datasets import OBJECT_DATASETS
from opensan.outputs.polygons import regions, without_holes

VOC_WORDS = 254
"""VOC's 8-bit maps keep 0 for the background and 255 for "don't care"."""


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
    write_text(path, as_json({"width": width, "height": height, "annotations": annotations}) + "\n")


def _finish_coco(folder: Path, members: Sequence[Member], names: Sequence[str]) -> None:
    finish_instances(folder, members, range(len(names)), names)


def _write_yolo(path: Path, labelled: Labelled) -> None:
    height, width = labelled.labels.shape
    lines = []
    for region in regions(labelled.labels):
        if region.pixels >= SPECK:
            for polygon in without_holes(region, SPECK):
                corners = (polygon / (width, height)).ravel()
                lines.append(f"{region.label} " + " ".join(f"{value:.6f}" for value in corners))
    write_text(path, "".join(f"{line}\n" for line in lines))


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
    write_task(path, labelled, result)


DATASETS: Mapping[str, Dataset] = {
    "coco": Dataset(
        "coco", "images", "parts/{stem}.json", _write_coco, _finish_coco, ("annotations/instances_all.json",)
    ),
    "yolo": Dataset(
        *("yolo", "images", "labels/{stem}.txt", _write_yolo, finish_yolo),
        ("all.txt", "data.yaml"),
        rename=yolo_stem,
    ),
    "voc": Dataset(
        *("voc", "JPEGImages", "SegmentationClass/{stem}.png", _write_voc, _finish_voc),
        ("ImageSets/Segmentation/all.txt", "labelmap.txt"),
    ),
    "labelstudio": Dataset(
        *("labelstudio", "images", "parts/{stem}.json", _write_label_studio, finish_tasks),
        ("tasks.json", "config.xml"),
    ),
    **OBJECT_DATASETS,
}


def check_words(name: str, words: int) -> None:
    """Raise UserError if a data set of this kind can't hold so many words."""
    if name == "voc" and words > VOC_WORDS:
        raise UserError(f"voc holds at most {VOC_WORDS} words, not {words}: choose coco or yolo")
