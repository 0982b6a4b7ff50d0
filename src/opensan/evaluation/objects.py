"""Evaluate segments: panoptic quality (PQ, SQ, RQ), and average precision (AP) of objects.

Letters: K classes, T true segments, P predicted segments, H W image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from opensan.assemble.segments import USUAL_RULES, SegmentRules, Segments
from opensan.data.objects import ObjectDataset, class_of, is_object, with_objects
from opensan.errors import UserError
from opensan.outputs.coco import run_lengths
from opensan.segmenters.base import Segmenter
from opensan.segmenters.proposals import with_proposals


class PanopticCounts:
    """Sums of the panoptic quality over images (Kirillov et al., "Panoptic Segmentation", CVPR 2019)."""

    def __init__(self, classes: int) -> None:
        self.iou = np.zeros(classes)
        """[K]: IoU summed over the true positives."""
        self.matched, self.wrong, self.missed = (np.zeros(classes, dtype=np.int64) for _ in range(3))
        """[K] each: true positives, false positives, false negatives."""

    def update(self, truth: np.ndarray, truth_classes: Sequence[int], ids: np.ndarray, classes: Sequence[int]) -> None:
        """Count an image.

        Two segments of one class match if their IoU is above one half; unlabelled pixels are of neither, and predicted
        segments that lie on them by more than half are not counted.

        Args:
            truth: [H, W] integers: the number of each pixel's true segment, 1..T; 0 where unlabelled.
            truth_classes: the class of each true segment.
            ids: [H, W] integers: the number of each pixel's predicted segment, 1..P; 0 where there is none.
            classes: the class of each predicted segment.
        """
        true_count, count = len(truth_classes), len(classes)
        pairs = np.bincount(
            (truth.astype(np.int64) * (count + 1) + ids).ravel(), minlength=(true_count + 1) * (count + 1)
        )
        common = pairs.reshape(true_count + 1, count + 1)
        true_areas, areas, unlabelled = common.sum(axis=1)[1:], common.sum(axis=0)[1:], common[0, 1:]
        union = true_areas[:, None] + areas[None] - common[1:, 1:] - unlabelled[None]
        true_class, own_class = np.asarray(truth_classes, dtype=np.int64), np.asarray(classes, dtype=np.int64)
        iou = np.where(true_class[:, None] == own_class[None], common[1:, 1:] / np.maximum(union, 1), 0)
        true_index, index = np.nonzero(iou > 0.5)
        np.add.at(self.iou, true_class[true_index], iou[true_index, index])
        np.add.at(self.matched, true_class[true_index], 1)
        np.add.at(self.missed, np.delete(true_class, true_index), 1)
        left = np.setdiff1d(np.flatnonzero(2 * unlabelled <= areas), index)
        np.add.at(self.wrong, own_class[left], 1)

    def qualities(self) -> np.ndarray:
        """Return [K, 3]: PQ, SQ and RQ of each class in [0, 1]; nan for a class without true or predicted segments."""
        weight = self.matched + 0.5 * self.wrong + 0.5 * self.missed
        with np.errstate(invalid="ignore"):
            recognised = self.matched / weight
        shape = np.divide(self.iou, self.matched, out=np.zeros_like(self.iou), where=self.matched > 0)
        return np.stack([shape * recognised, np.where(np.isnan(recognised), np.nan, shape), recognised], axis=1)


class PrecisionCounts:
    """Objects of images for their average precision; COCO's evaluation counts them."""

    def __init__(self, names: Sequence[str]) -> None:
        categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
        self._truth: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        self._found: list[dict[str, Any]] = []

    def update(
        self,
        truth: np.ndarray,
        truth_classes: Sequence[int],
        ids: np.ndarray,
        classes: Sequence[int],
        scores: Sequence[float],
    ) -> None:
        """Add an image; the arguments are those of `PanopticCounts.update`, with objects alone, and their scores."""
        image = len(self._truth["images"]) + 1
        height, width = truth.shape
        self._truth["images"].append({"id": image, "height": height, "width": width})
        for number, rle in sorted(run_lengths(truth.astype(np.int64) - 1, len(truth_classes)).items()):
            area = int(np.count_nonzero(truth == number + 1))
            annotations = self._truth["annotations"]
            about: dict[str, Any] = {"id": len(annotations) + 1, "image_id": image}
            about |= {"category_id": int(truth_classes[number]) + 1}
            annotations.append(about | {"segmentation": rle, "area": area, "iscrowd": 0, "bbox": [0, 0, 1, 1]})
        for number, rle in sorted(run_lengths(ids.astype(np.int64) - 1, len(classes)).items()):
            category = int(classes[number]) + 1
            self._found.append(
                {"image_id": image, "category_id": category, "segmentation": rle, "score": float(scores[number])}
            )

    def precisions(self) -> dict[str, float]:
        """Return "ap" (mean over IoU 0.50 to 0.95), "ap50" and "ap75", in [0, 1]; nan without true objects."""
        if not self._truth["annotations"]:
            return dict.fromkeys(("ap", "ap50", "ap75"), math.nan)
        if not self._found:
            return dict.fromkeys(("ap", "ap50", "ap75"), 0.0)
        from faster_coco_eval import COCO, COCOeval_faster

        truth = COCO(self._truth)
        measure = COCOeval_faster(truth, truth.loadRes(self._found), "segm", print_function=lambda *_: None)
        measure.evaluate()
        measure.accumulate()
        measure.summarize()
        return {name: float(measure.stats[index]) for index, name in enumerate(("ap", "ap50", "ap75"))}


@dataclass(frozen=True)
class ClassQuality:
    """The panoptic quality of a class."""

    name: str
    kind: str
    """ "thing" or "stuff"."""
    pq: float
    sq: float
    rq: float
    objects: int
    """Number of true segments."""


@dataclass(frozen=True)
class ObjectEvaluation:
    """Result of `evaluate_objects`."""

    images: int
    broken: tuple[str, ...]
    classes: tuple[ClassQuality, ...]
    precisions: dict[str, float]
    """See `PrecisionCounts.precisions`."""
    rules: SegmentRules

    def summary(self, *, panoptic: bool = True, instances: bool = True) -> dict[str, float]:
        """Return the figures by name, each in [0, 1]: means over the classes that occur; nan where none does."""
        figures: dict[str, float] = {}
        if panoptic:
            for name in ("pq", "sq", "rq"):
                figures[name] = _mean([getattr(quality, name) for quality in self.classes])
            for kind in ("thing", "stuff"):
                figures[f"pq_{kind}"] = _mean([quality.pq for quality in self.classes if quality.kind == kind])
        return figures | (self.precisions if instances else {})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "images": self.images,
            "broken": list(self.broken),
            "metrics": self.summary(),
            "rules": self.rules.to_dict(),
            "classes": [asdict(quality) for quality in self.classes],
        }


def classes_with_objects(dataset: ObjectDataset) -> list[str]:
    """Return the names of the classes of which there are objects in the data set. Images that are broken are passed."""
    labels_of_objects: set[int] = set()
    for index in range(len(dataset)):
        try:
            labels, objects = dataset[index][1], dataset.objects(index)
        except (UserError, OSError):
            continue
        labels_of_objects |= set(np.unique(labels[objects > 0]).tolist())
    return [name for label, name in enumerate(dataset.vocabulary.names) if label in labels_of_objects]


def evaluate_objects(
    segmenter: Segmenter,
    dataset: ObjectDataset,
    rules: SegmentRules = USUAL_RULES,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ObjectEvaluation:
    """Compare segments with the data set's objects, one image after the other, at each image's own size.

    Classes of which the data set has objects are things, the others stuff, whatever `rules` says. Objects overlap in
    neither: AP is that of the segments as they are written, not of overlapping masks.

    Raises UserError if the model proposes no masks or the data set has no object.
    """
    with_proposals(segmenter, "an evaluation of objects")
    names = dataset.vocabulary.names
    things = classes_with_objects(dataset)
    if not things:
        raise UserError("the data set has no objects: every pixel's number in objects/ is 0")
    rules = replace(rules, things=tuple(things), stuff=tuple(name for name in names if name not in things))
    panoptic, precision = PanopticCounts(len(names)), PrecisionCounts(names)
    broken = []
    for index in range(len(dataset)):
        progress(index + 1, len(dataset))
        try:
            image, labels = dataset[index]
            objects = dataset.objects(index)
        except (UserError, OSError) as error:
            broken.append(f"{dataset.name(index)}: {error}")
            continue
        _count(
            panoptic, precision, labels, objects, segmenter.segment(image, dataset.vocabulary, segments=rules).segments
        )
    qualities = panoptic.qualities()
    true_counts = panoptic.matched + panoptic.missed
    return ObjectEvaluation(
        len(dataset) - len(broken),
        tuple(broken),
        tuple(
            ClassQuality(name, "thing" if name in things else "stuff", pq, sq, rq, int(count))
            for name, (pq, sq, rq), count in zip(names, qualities.tolist(), true_counts, strict=True)
        ),
        precision.precisions(),
        rules,
    )


def _count(
    panoptic: PanopticCounts,
    precision: PrecisionCounts,
    labels: np.ndarray,
    objects: np.ndarray,
    segments: Segments,
) -> None:
    """Count an image."""
    names = list(segments.kinds)
    values, truth = np.unique(with_objects(labels, objects), return_inverse=True)
    truth = truth.reshape(labels.shape) + int(values[0] >= 0)  # 0 stays for unlabelled pixels
    values = values[values >= 0]
    true_classes = class_of(values).tolist()
    classes = [names.index(segment.word) for segment in segments]
    panoptic.update(truth, true_classes, segments.ids, classes)
    things = np.array([segment.kind == "thing" for segment in segments], dtype=bool)
    scores = [segment.score for segment in segments if segment.kind == "thing"]
    precision.update(
        *_selected(truth, true_classes, is_object(values)), *_selected(segments.ids, classes, things), scores
    )


def _selected(ids: np.ndarray, classes: Sequence[int], chosen: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return only the chosen segments, numbered anew, and their classes."""
    number = np.zeros(len(chosen) + 1, dtype=np.int64)
    number[1:][chosen] = np.arange(1, np.count_nonzero(chosen) + 1)
    return number[ids], [label for label, keep in zip(classes, chosen, strict=True) if keep]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
