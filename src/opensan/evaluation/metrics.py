"""Compute segmentation metrics from counts of pixels, in memory that does not grow with the number of images.

Two rules for the mean IoU are in use and papers mix them, so each has its own name here:
`miou` is the mean over classes that occur in the ground truth (common since July 2022; SAN's logs), `miou_union`
the mean over classes that occur in the ground truth or in a prediction (before; SAN's paper on large label sets).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opensan.errors import UserError
from opensan.evaluation.boundary import band_counts


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class."""

    name: str
    iou: float
    """Intersection over union in [0, 1]; nan for a class that neither occurs nor is predicted."""
    accuracy: float
    """Share of its pixels with the right label, in [0, 1]; nan for a class that does not occur."""
    boundary_iou: float
    """IoU of its boundary bands (see `opensan.evaluation.boundary`); nan as for `iou`."""
    pixels: int
    """Ground-truth pixels."""
    predicted_pixels: int
    """Predicted pixels; those without ground truth are not counted."""


@dataclass(frozen=True)
class Confusion:
    """Pixels of one class that were predicted as another."""

    truth: str
    predicted: str
    """"unlabelled" where no class was given."""
    pixels: int
    share: float
    """Share of the true class's pixels, in [0, 1]."""


@dataclass(frozen=True)
class SegmentationMetrics:
    """All metrics, in [0, 1]; nan when no class qualifies."""

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
    boundary_iou: float
    """Mean boundary IoU over the classes that occur in the ground truth."""
    classes: tuple[ClassMetrics, ...]

    def summary(self) -> dict[str, float]:
        """Return the metrics over all classes, by name."""
        names = ("miou", "miou_union", "fwiou", "mean_accuracy", "pixel_accuracy", "boundary_iou")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ImageCounts:
    """Counts of one image; small for any number of classes."""

    pairs: np.ndarray
    """[P] int64: flat indices of the confusion matrix's entries that are not zero, ascending."""
    pixels: np.ndarray
    """[P] int64: the values of these entries."""
    band_classes: np.ndarray
    """[C] int64: the classes that have a boundary in the truth or the prediction."""
    bands: np.ndarray
    """[C, 3] int64: pixels of their bands in the truth, in the prediction, in both."""

    def figures(self, num_classes: int) -> tuple[float, float]:
        """Return the image's own mIoU over the classes in its ground truth, and its pixel accuracy; nan without any."""
        rows, columns = np.divmod(self.pairs, num_classes + 1)
        hits = rows == columns
        truth = np.bincount(rows, self.pixels, num_classes)
        predicted = np.bincount(columns, self.pixels, num_classes + 1)[:-1]
        right = np.bincount(rows[hits], self.pixels[hits], num_classes)
        accuracy = float(right.sum() / truth.sum()) if len(rows) else float("nan")
        return _mean(_iou(truth, predicted, right)[truth > 0]), accuracy


def count_image(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> ImageCounts:
    """Count the pixels of one image.

    Args:
        truth: [H, W] integers, 0..K-1, or negative where unlabelled (those pixels are not counted).
        predicted: [H, W] integers, 0..K-1, or negative where no class is given (counts as a miss).

    Raises:
        ValueError: the shapes differ, or a label is K or more.
    """
    if truth.shape != predicted.shape:
        raise UserError(f"the prediction has shape {predicted.shape}, the ground truth {truth.shape}")
    truth, predicted = np.maximum(truth, -1).astype(np.int32), np.maximum(predicted, -1).astype(np.int32)
    for source, labels in (("ground truth", truth), ("prediction", predicted)):
        if labels.size and labels.max() >= num_classes:
            raise UserError(f"the {source} holds label {labels.max()}, there are {num_classes} classes")
    labelled = truth >= 0
    columns = predicted[labelled]
    columns[columns < 0] = num_classes
    pixels = np.bincount(truth[labelled] * (num_classes + 1) + columns)
    pairs = np.flatnonzero(pixels)
    bands = band_counts(truth, predicted, num_classes)
    classes = np.flatnonzero(bands.any(axis=1))
    return ImageCounts(pairs, pixels[pairs], classes, bands[classes])


class Counts:
    """Sums of counts over images; constant memory."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.confusion = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
        """[K, K+1]: rows are the ground truth, columns the prediction, "unlabelled" last."""
        self.bands = np.zeros((num_classes, 3), dtype=np.int64)
        """[K, 3]: pixels of each class's boundary band in the truth, in the prediction, in both."""

    def add(self, image: ImageCounts) -> None:
        """Add an image's counts."""
        self.confusion.ravel()[image.pairs] += image.pixels
        self.bands[image.band_classes] += image.bands

    def update(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Count an image and add it; arguments and errors as for `count_image`."""
        self.add(count_image(truth, predicted, self.num_classes))

    def metrics(self, names: Sequence[str]) -> SegmentationMetrics:
        """Return all metrics; `names` are the K classes'."""
        right = self.confusion.diagonal()
        truth = self.confusion.sum(1)
        predicted = self.confusion[:, :-1].sum(0)
        iou, accuracy = _iou(truth, predicted, right), _ratio(right, truth)
        boundary_iou = _iou(*self.bands.T)
        occurs = truth > 0
        columns = iou, accuracy, boundary_iou, truth, predicted
        classes = zip(names, *(column.tolist() for column in columns), strict=True)
        return SegmentationMetrics(
            miou=_mean(iou[occurs]),
            miou_union=_mean(iou[truth + predicted > 0]),
            fwiou=float((iou[occurs] * truth[occurs]).sum() / truth.sum()) if occurs.any() else float("nan"),
            mean_accuracy=_mean(accuracy[occurs]),
            pixel_accuracy=float(right.sum() / truth.sum()) if occurs.any() else float("nan"),
            boundary_iou=_mean(boundary_iou[occurs]),
            classes=tuple(ClassMetrics(*figures) for figures in classes),
        )

    def worst_confusions(self, names: Sequence[str], count: int = 20) -> list[Confusion]:
        """Return the pairs of classes with the most wrong pixels, most first."""
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:count]
        columns, of_class = [*names, "unlabelled"], self.confusion.sum(1)
        return [
            Confusion(names[row], columns[column], int(wrong[row, column]), float(wrong[row, column] / of_class[row]))
            for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
            if wrong[row, column]
        ]


def _iou(truth: np.ndarray, predicted: np.ndarray, shared: np.ndarray) -> np.ndarray:
    return _ratio(shared, truth + predicted - shared)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
