"""Make the regions that Label Studio shows and edits: brushes, polygons and key points of a label map.

A region is plain data in the form of https://labelstud.io/guide/predictions: an item of a prediction's `result`. Its
`from_name` and `to_name` are the names of the labels' and the image's tags in the labelling configuration.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from opensan.files import atomic_path, write_text
from opensan.outputs.brush import brush_rle
from opensan.outputs.colours import palette
from opensan.outputs.dataset_files import Labelled, Member, as_json, parts, write_separated
from opensan.outputs.polygons import regions, without_holes
from opensan.outputs.regions import name_places

SPECK = 16
"""Polygons are made of regions of at least so many pixels; smaller ones are noise that users would have to delete."""

_POINT_WIDTH = 0.5
"""Width of a key point's mark, in percent of the image's."""


def label_studio_regions(
    kind: str,
    labels: np.ndarray,
    names: Sequence[str],
    confidence: Sequence[float | None],
    *,
    from_name: str,
    to_name: str,
) -> list[dict[str, Any]]:
    """Return the regions of labels [H, W] int (index into `names`, or -1).

    Args:
        kind: "brushlabels" (a mask for each word), "polygonlabels" (polygons for each connected region), or
            "keypointlabels" (a point well inside each large region).
        labels: the label map.
        names: the words as Label Studio's result names them.
        confidence: each word's mean over its pixels, None for a word without any.
        from_name: name of the tag with the labels.
        to_name: name of the image's tag.
    """
    height, width = labels.shape
    return [
        {
            "id": identifier,
            "type": kind,
            "from_name": from_name,
            "to_name": to_name,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "score": round(confidence[label] or 0.0, 6),
            "value": {**value, kind: [names[label]]},
        }
        for identifier, label, value in _KINDS[kind](labels, confidence)
    ]


def mean_score(result: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean of the regions' scores, which is a prediction's; None without regions."""
    return round(sum(region["score"] for region in result) / len(result), 6) if result else None


_Values = Iterator[tuple[str, int, dict[str, Any]]]


def _brushes(labels: np.ndarray, confidence: Sequence[float | None]) -> _Values:
    for label, mean in enumerate(confidence):
        if mean is not None:
            yield f"word-{label}", label, {"format": "rle", "rle": brush_rle(labels == label)}


def _polygons(labels: np.ndarray, _: Sequence[float | None]) -> _Values:
    height, width = labels.shape
    count = 0
    for region in regions(labels):
        if region.pixels >= SPECK:
            for polygon in without_holes(region, SPECK):
                points = np.round(polygon / (width, height) * 100, 4).tolist()
                yield f"polygon-{count}", region.label, {"points": points, "closed": True}
                count += 1


def _points(labels: np.ndarray, _: Sequence[float | None]) -> _Values:
    height, width = labels.shape
    for number, place in enumerate(name_places(labels)):
        x, y = 100 * place.x / width, 100 * place.y / height
        yield f"point-{number}", place.label, {"x": round(x, 4), "y": round(y, 4), "width": _POINT_WIDTH}


_KINDS = {"brushlabels": _brushes, "polygonlabels": _polygons, "keypointlabels": _points}


def write_task(path: Path, labelled: Labelled, result: Sequence[Mapping[str, Any]]) -> None:
    """Write an image's task, with `result` as its prediction, in a list as Label Studio imports it."""
    prediction: dict[str, Any] = {"model_version": labelled.model, "result": result}
    if result:
        prediction["score"] = mean_score(result)
    photograph = quote(f"images/{labelled.stem}{labelled.photograph.suffix}")
    task = {"data": {"image": f"/data/local-files/?d={photograph}"}, "predictions": [prediction]}
    write_text(path, as_json([task]) + "\n")


def finish_tasks(folder: Path, members: Sequence[Member], names: Sequence[str]) -> None:
    """Write the tasks of all images, and the labelling configuration with a brush for each of `names`."""
    from xml.sax.saxutils import quoteattr  # half of the network code of Python comes with it

    with atomic_path(folder / "tasks.json") as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        write_separated(file.write, (as_json(task) for tasks in parts(folder, members) for task in tasks))
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
