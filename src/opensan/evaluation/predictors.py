"""Predictors of labels for an evaluation: a model, a model with augmented views, or saved predictions.

Letters: Q queries, K words, H0 W0 the image.
"""

import json
import operator
from collections.abc import Hashable, Mapping, Sequence
from functools import reduce
from typing import Any, Protocol

import numpy as np
import torch

from opensan.assemble.bands import best_words
from opensan.assemble.calibration import Calibration
from opensan.config import ImageConfig
from opensan.evaluation.predictions import SavedPredictions
from opensan.images import network_size, padded_size, prepare
from opensan.segmenters.base import Segmenter
from opensan.segmenters.results import Encoding, InputImage, Segmentation
from opensan.vocabulary import UNLABELLED, Vocabulary

TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Factors of the short side; each as it is and mirrored: the usual set of test-time augmentation."""


class BatchPredictor(Protocol):
    """Labels images in batches."""

    @property
    def key(self) -> Mapping[str, object]:
        """All that its labels depend on, as plain data."""

    def shape(self, size: tuple[int, int]) -> Hashable:
        """Return a key for images of (H0, W0): images with equal keys may be predicted together."""

    def prepare(self, name: str, image: np.ndarray) -> Any:
        """Prepare an image [H0, W0, 3] uint8 in another thread, ahead of `predict`. Raises UserError."""

    def predict(self, prepared: Sequence[Any]) -> list[np.ndarray]:
        """Return labels [H0, W0] int32 of each image, 0..K-1, or -1 where no word is given."""


class ModelPredictor:
    """Labels by a model and its own image configuration. Images of different padded shapes never share a batch."""

    def __init__(self, segmenter: Segmenter, vocabulary: Vocabulary) -> None:
        self._segmenter = segmenter
        self._vocabulary = vocabulary
        self._image = segmenter.image_config
        self.key = {
            "model": str(segmenter.identity),
            "image": self._image.model_dump(mode="json"),
            "speed": segmenter.speed,
            "dtype": str(segmenter.dtype).removeprefix("torch."),
            "vocabulary": vocabulary.to_dict(),
            "augmentation": None,
        }

    def shape(self, size: tuple[int, int]) -> Hashable:
        return padded_size(network_size(size, self._image), self._image)

    def prepare(self, name: str, image: np.ndarray) -> InputImage:
        return _input(image, self._image)

    @property
    def calibration(self) -> Calibration | None:
        """The calibration of its confidence."""
        return self._segmenter.calibration

    def predict(self, prepared: Sequence[InputImage]) -> list[np.ndarray]:
        return [answer.labels for answer in self._answers(prepared)]

    def predict_with_confidence(self, prepared: Sequence[InputImage]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return labels as `predict`, and confidence [H0, W0] float32 in [0, 1], of each image."""
        return [(answer.labels, answer.confidence) for answer in self._answers(prepared)]

    def _answers(self, prepared: Sequence[InputImage]) -> list[Segmentation]:
        encodings = self._segmenter.encode_read(prepared, batch_size=len(prepared))
        return self._segmenter.segment(encodings, self._vocabulary)


class AugmentedPredictor:
    """Test-time augmentation: every pixel gets the word with the highest mean score over all views.

    A view is the image at one of `TTA_SCALES` times the protocol's short and long side, as it is or mirrored; its
    scores are those by which it would be labelled alone (score[k, y, x] = sum_q probability[q, k] mask[q, y, x]).
    """

    def __init__(
        self, segmenter: Segmenter, vocabulary: Vocabulary, scales: Sequence[float] = TTA_SCALES, flip: bool = True
    ) -> None:
        self._segmenter = segmenter
        self._vocabulary = vocabulary
        image = segmenter.image_config
        self._images = [_scaled(image, scale) for scale in scales]
        self._flips = (False, True) if flip else (False,)
        self.key = ModelPredictor(segmenter, vocabulary).key | {"augmentation": [list(scales), flip]}

    def shape(self, size: tuple[int, int]) -> Hashable:
        return tuple(padded_size(network_size(size, image), image) for image in self._images)

    def prepare(self, name: str, image: np.ndarray) -> list[InputImage]:
        pictures = [np.ascontiguousarray(image[:, ::-1]) if flip else image for flip in self._flips]
        return [_input(picture, config) for config in self._images for picture in pictures]

    def predict(self, prepared: Sequence[list[InputImage]]) -> list[np.ndarray]:
        views = [self._segmenter.encode_read(view, batch_size=len(view)) for view in zip(*prepared, strict=True)]
        flips = self._flips * len(self._images)
        return [self._label(encodings, flips) for encodings in zip(*views, strict=True)]

    def _label(self, encodings: Sequence[Encoding], flips: Sequence[bool]) -> np.ndarray:
        views = [self._segmenter.scores(encoding, self._vocabulary) for encoding in encodings]

        def summed(rows: slice) -> "torch.Tensor | np.ndarray":
            views_of_rows = (
                _mirrored(scores(rows)) if flip else scores(rows) for scores, flip in zip(views, flips, strict=True)
            )
            return reduce(operator.add, views_of_rows)

        labels = best_words(summed, encodings[0].sizes.image, len(self._vocabulary.words))
        labels[labels >= len(self._vocabulary.names)] = UNLABELLED
        return labels


class SavedPredictor:
    """Labels that another run saved; no model."""

    def __init__(self, predictions: SavedPredictions) -> None:
        self._predictions = predictions
        ids = json.dumps(list((predictions.class_of_id or {}).items()))
        self.key = {"predictions": predictions.fingerprint(), "ids": ids}

    def shape(self, size: tuple[int, int]) -> Hashable:
        return None

    def prepare(self, name: str, image: np.ndarray) -> np.ndarray:
        return self._predictions.labels(name, image.shape[:2])

    def predict(self, prepared: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(prepared)


def _input(image: np.ndarray, config: ImageConfig) -> InputImage:
    """Network input alone: nobody looks at the image of an encoding here."""
    return InputImage(None, prepare(image, config))


def _mirrored(scores: "torch.Tensor | np.ndarray") -> "torch.Tensor | np.ndarray":
    return scores[..., ::-1] if isinstance(scores, np.ndarray) else scores.flip(-1)


def _scaled(image: ImageConfig, scale: float) -> ImageConfig:
    sides = {"short_side": round(image.short_side * scale), "long_side": round(image.long_side * scale)}
    return image.model_copy(update=sides)
