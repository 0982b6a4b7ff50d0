"""Measure confidence: whether of pixels with 0.8 eight of ten are right, and what a threshold keeps.

Counted are pixels with ground truth and a word; those of background words have none. Memory is that of the counts.

Letters: H W the image, K classes, B bins.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from opensan.errors import UserError

BINS = 60
"""Bins of equal width that pixels are counted in: a multiple of those that are reported."""

REPORTED_BINS = 15
"""Bins of the calibration error and of the reliability diagram, as is usual."""

THRESHOLDS = 20
"""Steps of the thresholds' curve: 0, 0.05, ..., 0.95."""


@dataclass(frozen=True)
class ConfidenceCounts:
    """Counts of one image; small for any number of classes."""

    index: np.ndarray
    """[P] int64: bin * K + class, ascending, of the entries that are not zero."""
    pixels: np.ndarray
    """[P, 3] int64: pixels of the bin that are this class, that were called it, and both."""
    sums: np.ndarray
    """[B] float64: the summed confidence of each bin."""


def count_confidence(
    truth: np.ndarray, predicted: np.ndarray, confidence: np.ndarray, num_classes: int
) -> ConfidenceCounts:
    """Count the pixels of one image by their confidence.

    Args:
        truth: [H, W] integers, 0..K-1, or negative where unlabelled (those pixels are not counted).
        predicted: [H, W] integers, 0..K-1, or negative where no class is given (these are not counted either).
        confidence: [H, W] float in [0, 1].
        num_classes: K.

    Raises:
        ValueError: the shapes differ.
    """
    if not truth.shape == predicted.shape == confidence.shape:
        raise UserError(f"the confidence has shape {confidence.shape}, the ground truth {truth.shape}")
    counted = (truth >= 0) & (predicted >= 0)
    truth, predicted = truth[counted].astype(np.int64), predicted[counted].astype(np.int64)
    confidence = confidence[counted].astype(np.float64)
    bins = (confidence * BINS).astype(np.int64).clip(0, BINS - 1)
    length = BINS * num_classes
    right = truth == predicted
    whole = np.stack(
        [
            np.bincount(bins * num_classes + truth, minlength=length),
            np.bincount(bins * num_classes + predicted, minlength=length),
            np.bincount((bins * num_classes + truth)[right], minlength=length),
        ],
        axis=1,
    )
    index = np.flatnonzero(whole.any(axis=1))
    return ConfidenceCounts(index, whole[index], np.bincount(bins, confidence, BINS))


@dataclass(frozen=True)
class ReliabilityBin:
    """Pixels of similar confidence."""

    low: float
    high: float
    pixels: int
    confidence: float
    """Their mean confidence, in [0, 1]; nan without any."""
    accuracy: float
    """Share of them that are right, in [0, 1]; nan without any."""


@dataclass(frozen=True)
class ThresholdPoint:
    """Pixels that a threshold of confidence keeps."""

    threshold: float
    labelled: float
    """Share of the pixels with ground truth that stay labelled, in [0, 1]."""
    accuracy: float
    """Share of these that are right; nan without any."""
    miou: float
    """Mean IoU of these pixels alone, over the classes in their ground truth; nan without any."""


@dataclass(frozen=True)
class ConfidenceMetrics:
    """Figures of how far confidence can be trusted."""

    ece: float
    """Expected calibration error in [0, 1]: mean difference of confidence and accuracy over `bins`, by pixels."""
    confidence: float
    """Mean confidence."""
    accuracy: float
    """Share of the counted pixels that are right."""
    bins: tuple[ReliabilityBin, ...]
    curve: tuple[ThresholdPoint, ...]
    calibration: Mapping[str, Any] | None = None
    """The calibration of the confidence (`Calibration.to_dict`); None: it is a score."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


class Confidences:
    """Sums of counts over images; constant memory."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.pixels = np.zeros((BINS, num_classes, 3), dtype=np.int64)
        """[B, K, 3]: pixels that are the class, that were called it, and both."""
        self.sums = np.zeros(BINS)
        """[B]: summed confidence."""

    def add(self, image: ConfidenceCounts) -> None:
        """Add an image's counts."""
        self.pixels.reshape(-1, 3)[image.index] += image.pixels
        self.sums += image.sums

    def metrics(self, pixels: int, calibration: Mapping[str, Any] | None = None) -> ConfidenceMetrics:
        """Return all figures; `pixels` is the number of all pixels with ground truth, those without a word included."""
        counts, right = self.pixels[:, :, 0].sum(1), self.pixels[:, :, 2].sum(1)
        bins = [
            ReliabilityBin(
                number / REPORTED_BINS,
                (number + 1) / REPORTED_BINS,
                int(counts[some].sum()),
                _ratio(self.sums[some].sum(), counts[some].sum()),
                _ratio(right[some].sum(), counts[some].sum()),
            )
            for number, some in enumerate(_parts(REPORTED_BINS))
        ]
        total = counts.sum()
        gaps = [of_bin.pixels * abs(of_bin.confidence - of_bin.accuracy) for of_bin in bins if of_bin.pixels]
        return ConfidenceMetrics(
            _ratio(sum(gaps), total),
            _ratio(self.sums.sum(), total),
            _ratio(right.sum(), total),
            tuple(bins),
            tuple(
                self._point(number / THRESHOLDS, some.start, pixels) for number, some in enumerate(_parts(THRESHOLDS))
            ),
            calibration,
        )

    def _point(self, threshold: float, first_bin: int, pixels: int) -> ThresholdPoint:
        truth, predicted, right = self.pixels[first_bin:].sum(axis=0).T
        occurs = truth > 0
        iou = right[occurs] / (truth + predicted - right)[occurs]
        return ThresholdPoint(
            threshold,
            _ratio(truth.sum(), pixels),
            _ratio(right.sum(), truth.sum()),
            float(iou.mean()) if occurs.any() else float("nan"),
        )


def _parts(count: int) -> list[slice]:
    """Return the bins of `count` equal parts."""
    width = BINS // count
    return [slice(number * width, (number + 1) * width) for number in range(count)]


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
