"""Write many images' objects as one data set: COCO's instances and panoptic, Label Studio, and YOLO.

Objects are the segments of things. Segments of stuff are regions, which only the panoptic data sets hold.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from opensan.assemble.segments import Segment, Segments
from opensan.files import atomic_path, write_text
from opensan.outputs.coco import run_lengths
from opensan.outputs.colours import palette
from opensan.outputs.dataset_files import (
    Dataset,
    Labelled,
    Member,
    as_json,
    finish_instances,
    finish_yolo,
    parts,
    write_coco,
    yolo_stem,
)
from opensan.outputs.label_studio import SPECK, finish_tasks, label_studio_regions, write_task
from opensan.outputs.polygons import as_one_ring, regions
from opensan.outputs.segments import segments_picture


def _segments(labelled: Labelled) -> Segments:
    assert labelled.segments is not None
    return labelled.segments()


def _objects(labelled: Labelled) -> list[tuple[int, Segment]]:
    """Return the index of its word, and the segment, of each object."""
    names = list(labelled.names)
    return [(names.index(segment.word), segment) for segment in _segments(labelled) if segment.kind == "thing"]


def _record(label: int, segment: Segment) -> dict[str, Any]:
    """Return what COCO tells of an object or a segment, besides its pixels."""
    score = round(segment.score, 6)
    return {
        "category_id": label + 1,
        "area": segment.area,
        "bbox": list(segment.box),
        "iscrowd": 0,
        "score": score,
    }


def _part(labelled: Labelled, content: dict[str, Any]) -> dict[str, Any]:
    """Return an image's share of the file about all: its size, which words are things, and `content`."""
    height, width = labelled.labels.shape
    kinds = _segments(labelled).kinds
    things = [kinds[name].kind == "thing" for name in labelled.names]
    return {"width": width, "height": height, "things": things, **content}


def _write_instances(path: Path, labelled: Labelled) -> None:
    segments = _segments(labelled)
    masks = run_lengths(segments.ids - 1, len(segments))
    annotations = [
        {**_record(label, segment), "segmentation": masks[segment.id - 1]} for label, segment in _objects(labelled)
    ]
    write_text(path, as_json(_part(labelled, {"annotations": annotations})) + "\n")


def _write_panoptic(path: Path, labelled: Labelled) -> None:
    names = list(labelled.names)
    info = [{"id": segment.id, **_record(names.index(segment.word), segment)} for segment in _segments(labelled)]
    write_text(path, as_json(_part(labelled, {"segments_info": info})) + "\n")


def _draw_panoptic(path: Path, labelled: Labelled) -> None:
    with atomic_path(path) as temporary:
        segments_picture(_segments(labelled).ids).save(temporary)


def _finish_instances(folder: Path, members: Sequence[Member], names: Sequence[str]) -> None:
    things = next(parts(folder, members))["things"]
    finish_instances(folder, members, [label for label in range(len(names)) if things[label]], names)


def _finish_panoptic(folder: Path, members: Sequence[Member], names: Sequence[str]) -> None:
    things = next(parts(folder, members))["things"]
    categories = [
        {"id": label + 1, "name": name, "supercategory": "", "isthing": int(things[label]), "color": colour}
        for label, (name, colour) in enumerate(zip(names, palette(len(names)).tolist(), strict=True))
    ]
    annotations = (
        as_json({"image_id": number, "file_name": f"{member.stem}.png", "segments_info": part["segments_info"]})
        for number, (member, part) in enumerate(zip(members, parts(folder, members), strict=True), 1)
    )
    write_coco(folder / "annotations" / "panoptic_all.json", folder, members, categories, annotations)


def _write_yolo_instances(path: Path, labelled: Labelled) -> None:
    height, width = labelled.labels.shape
    label_of = {segment.id - 1: label for label, segment in _objects(labelled)}
    lines = []
    for number, pieces in groupby(regions(_segments(labelled).ids - 1), key=lambda region: region.label):
        if number in label_of:
            corners = (as_one_ring(pieces, SPECK) / (width, height)).ravel()
            lines.append(f"{label_of[number]} " + " ".join(f"{value:.6f}" for value in corners))
    write_text(path, "".join(f"{line}\n" for line in lines))


def _write_yolo_boxes(path: Path, labelled: Labelled) -> None:
    height, width = labelled.labels.shape
    lines = []
    for label, segment in _objects(labelled):
        left, top, across, down = segment.box
        middle = ((left + across / 2) / width, (top + down / 2) / height)
        lines.append(f"{label} " + " ".join(f"{value:.6f}" for value in (*middle, across / width, down / height)))
    write_text(path, "".join(f"{line}\n" for line in lines))


def _write_label_studio(path: Path, labelled: Labelled) -> None:
    segments = _segments(labelled)
    words, scores = [segment.word for segment in segments], [segment.score for segment in segments]
    # A region for each segment, not for each word.
    result = label_studio_regions("brushlabels", segments.ids - 1, words, scores, from_name="words", to_name="image")
    write_task(path, labelled, result)


def _yolo(folder: str, write: Callable[[Path, Labelled], None]) -> Dataset:
    files = ("all.txt", "data.yaml")
    return Dataset(folder, "images", "labels/{stem}.txt", write, finish_yolo, files, rename=yolo_stem)


OBJECT_DATASETS: Mapping[str, Dataset] = {
    "coco-instances": Dataset(
        *("coco-instances", "images", "parts/{stem}.json", _write_instances, _finish_instances),
        ("annotations/instances_all.json",),
    ),
    "coco-panoptic": Dataset(
        *("coco-panoptic", "images", "parts/{stem}.json", _write_panoptic, _finish_panoptic),
        ("annotations/panoptic_all.json",),
        drawing="annotations/panoptic_all/{stem}.png",
        draw=_draw_panoptic,
    ),
    "labelstudio-panoptic": Dataset(
        *("labelstudio-panoptic", "images", "parts/{stem}.json", _write_label_studio, finish_tasks),
        ("tasks.json", "config.xml"),
    ),
    "yolo-instances": _yolo("yolo-instances", _write_yolo_instances),
    "yolo-boxes": _yolo("yolo-boxes", _write_yolo_boxes),
}
