"""Segmentation metrics from one confusion matrix, whatever the number of photographs.

Two rules for the mean IoU are in use and papers mix them, so each has its own name here:
`miou` is the mean over classes that occur in the ground truth (common since July 2022; SAN's logs), `miou_union`
the mean over classes that occur in the ground truth or in a prediction (before; SAN's paper on large label sets).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClassMetrics:
    """One class."""

    name: str
    iou: float
    """Intersection over union in [0, 1]; nan for a class that neither occurs nor is predicted."""
    accuracy: float
    """Share of its pixels that are found, in [0, 1]; nan for a class that does not occur."""
    pixels: int
    """Ground-truth pixels."""
    predicted_pixels: int
    """Predicted pixels; those without ground truth are not counted."""


@dataclass(frozen=True)
class SegmentationMetrics:
    """All figures, in [0, 1]; nan when no class qualifies."""

    miou: float
    """Mean IoU over the classes that occur in the ground truth."""
    miou_union: float
    """Mean IoU over the classes that occur in the ground truth or in a prediction."""
    fwiou: float
    """IoU weighted by ground-truth frequency."""
    mean_accuracy: float
    """Mean of the accuracies of the classes that occur in the ground truth."""
    pixel_accuracy: float
    """Share of the labelled pixels with the right class."""
    classes: tuple[ClassMetrics, ...]

    def summary(self) -> dict[str, float]:
        """The figures of all classes together, by name."""
        names = ("miou", "miou_union", "fwiou", "mean_accuracy", "pixel_accuracy")
        return {name: getattr(self, name) for name in names}


class ConfusionMatrix:
    """Counts of (ground truth, prediction) pairs of pixels; constant memory."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
        """[K, K+1]: rows are the ground truth, columns the prediction, "unlabelled" last."""

    def update(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Count an image.

        Args:
            truth: [H, W] integers, 0..K-1, or negative where unlabelled (those pixels are not counted).
            predicted: [H, W] integers, 0..K-1, or negative where no class is given (counts as a miss).

        Raises:
            ValueError: the shapes differ, or a label is K or more.
        """
        if truth.shape != predicted.shape:
            raise ValueError(f"the prediction has shape {predicted.shape}, the ground truth {truth.shape}")
        labelled = truth >= 0
        rows, columns = truth[labelled].astype(np.int64), predicted[labelled].astype(np.int64)
        for what, labels in (("ground truth", rows), ("prediction", columns)):
            if labels.size and labels.max() >= self.num_classes:
                raise ValueError(f"the {what} holds label {labels.max()}, there are {self.num_classes} classes")
        columns[columns < 0] = self.num_classes
        pairs = np.bincount(rows * (self.num_classes + 1) + columns, minlength=self.counts.size)
        self.counts += pairs.reshape(self.counts.shape)

    def metrics(self, names: Sequence[str]) -> SegmentationMetrics:
        """The figures; `names` are the K classes'."""
        right = self.counts.diagonal().astype(np.float64)
        truth = self.counts.sum(1).astype(np.float64)
        predicted = self.counts[:, :-1].sum(0).astype(np.float64)
        union = truth + predicted - right
        iou, accuracy = _ratio(right, union), _ratio(right, truth)
        occurs = truth > 0
        classes = zip(names, iou, accuracy, truth, predicted, strict=True)
        return SegmentationMetrics(
            miou=_mean(iou[occurs]),
            miou_union=_mean(iou[union > 0]),
            fwiou=float((iou[occurs] * truth[occurs]).sum() / truth.sum()) if occurs.any() else float("nan"),
            mean_accuracy=_mean(accuracy[occurs]),
            pixel_accuracy=float(right.sum() / truth.sum()) if occurs.any() else float("nan"),
            classes=tuple(ClassMetrics(n, float(i), float(a), int(t), int(p)) for n, i, a, t, p in classes),
        )


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
