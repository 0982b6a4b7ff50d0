"""Predictors of labels for an evaluation: a model, a model with augmented views, or saved predictions.

Letters: Q queries, K words, H0 W0 the image.
"""

import json
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from opensan.assemble.resize import mask_bands
from opensan.config import ImageConfig
from opensan.evaluate.predictions import SavedPredictions
from opensan.images import PreparedImage, network_size, padded_size, prepare
from opensan.segmenters.results import Encoding
from opensan.segmenters.san import SanSegmenter
from opensan.vocabulary import UNLABELLED, Vocabulary

TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Factors of the short side; each as it is and mirrored: the usual set of test-time augmentation."""

_BAND_ELEMENTS = 8_000_000
"""Number of floats that a band of rows may need for its scores and masks, about (32 MB)."""


class BatchPredictor(Protocol):
    """Labels images in batches."""

    key: Mapping[str, object]
    """All that its labels depend on, as plain data."""

    def shape(self, size: tuple[int, int]) -> Hashable:
        """Return a key for images of (H0, W0): images with equal keys may be predicted together."""

    def prepare(self, name: str, image: np.ndarray) -> object:
        """Prepare an image [H0, W0, 3] uint8 in another thread, ahead of `predict`. Raises UserError."""

    def predict(self, prepared: Sequence[object]) -> list[np.ndarray]:
        """Return labels [H0, W0] int32 of each image, 0..K-1, or -1 where no word is given."""


class ModelPredictor:
    """Labels by a model and its own image configuration. Images of different padded shapes never share a batch."""

    def __init__(self, segmenter: SanSegmenter, vocabulary: Vocabulary) -> None:
        self._segmenter = segmenter
        self._vocabulary = vocabulary
        self._image = segmenter.model.config.image
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

    def prepare(self, name: str, image: np.ndarray) -> PreparedImage:
        return prepare(image, self._image)

    def predict(self, prepared: Sequence[PreparedImage]) -> list[np.ndarray]:
        encodings = encode_by_shape(self._segmenter, prepared)
        return [answer.labels for answer in self._segmenter.segment(encodings, self._vocabulary)]


class AugmentedPredictor:
    """Test-time augmentation: every pixel gets the word with the highest mean score over all views.

    A view is the image at one of `TTA_SCALES` times the protocol's short and long side, as it is or mirrored; its
    scores are those by which it would be labelled alone (score[k, y, x] = sum_q probability[q, k] mask[q, y, x]).
    """

    def __init__(
        self, segmenter: SanSegmenter, vocabulary: Vocabulary, scales: Sequence[float] = TTA_SCALES, flip: bool = True
    ) -> None:
        self._segmenter = segmenter
        self._vocabulary = vocabulary
        image = segmenter.model.config.image
        self._images = [_scaled(image, scale) for scale in scales]
        self._flips = (False, True) if flip else (False,)
        self.key = ModelPredictor(segmenter, vocabulary).key | {"augmentation": [list(scales), flip]}

    def shape(self, size: tuple[int, int]) -> Hashable:
        return tuple(padded_size(network_size(size, image), image) for image in self._images)

    def prepare(self, name: str, image: np.ndarray) -> list[PreparedImage]:
        pictures = [np.ascontiguousarray(image[:, ::-1]) if flip else image for flip in self._flips]
        return [prepare(picture, config) for config in self._images for picture in pictures]

    def predict(self, prepared: Sequence[list[PreparedImage]]) -> list[np.ndarray]:
        views = [encode_by_shape(self._segmenter, view) for view in zip(*prepared, strict=True)]
        flips = self._flips * len(self._images)
        return [self._label(encodings, flips) for encodings in zip(*views, strict=True)]

    @torch.inference_mode()
    def _label(self, encodings: Sequence[Encoding], flips: Sequence[bool]) -> np.ndarray:
        probabilities = [self._segmenter.class_probabilities(one, self._vocabulary) for one in encodings]
        height, width = encodings[0].sizes.image
        queries, words = probabilities[0].shape
        rows = max(1, _BAND_ELEMENTS // ((queries + words) * width))
        bands = [mask_bands(one.mask_logits, one.sizes, rows) for one in encodings]
        labels = np.empty((height, width), dtype=np.int32)
        for views in zip(*bands, strict=True):
            scores = sum(
                torch.einsum("qk,qyx->kyx", weights, masks.flip(-1) if flip else masks)
                for weights, (_, masks), flip in zip(probabilities, views, flips, strict=True)
            )
            top = views[0][0]
            labels[top : top + rows] = scores.argmax(dim=0).cpu().numpy()
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


def encode_by_shape(segmenter: SanSegmenter, prepared: Sequence[PreparedImage]) -> list[Encoding]:
    """Return encodings in the order given; those of one padded shape go through the network together."""
    groups = defaultdict(list)
    for index, image in enumerate(prepared):
        groups[image.sizes.padded].append(index)
    encodings: dict[int, Encoding] = {}
    for indices in groups.values():
        found = segmenter.encode_prepared([prepared[index] for index in indices])
        encodings.update(zip(indices, found, strict=True))
    return [encodings[index] for index in range(len(prepared))]


def _scaled(image: ImageConfig, scale: float) -> ImageConfig:
    sides = {"short_side": round(image.short_side * scale), "long_side": round(image.long_side * scale)}
    return image.model_copy(update=sides)
