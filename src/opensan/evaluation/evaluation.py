"""Evaluate a model on a labelled data set, one image after the other, as validation in training does.

`opensan.evaluation.measure` does the same for whole benchmarks.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from opensan.assemble.labels import label_map
from opensan.assemble.scores import class_probabilities
from opensan.data.dataset import SegmentationDataset
from opensan.errors import UserError
from opensan.evaluation.confidence import ConfidenceMetrics
from opensan.evaluation.metrics import Confusion, Counts, SegmentationMetrics
from opensan.images import prepare
from opensan.model import SAN
from opensan.segmenters.base import Segmenter
from opensan.structures import TextClassifier
from opensan.text.encoder import TextEncoder
from opensan.vocabulary import UNLABELLED, Vocabulary

Predictor = Callable[[np.ndarray], np.ndarray]
"""Image [H, W, 3] uint8 RGB -> labels [H, W] integers, -1 where no word is given."""


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics of one image."""

    index: int
    """Index in the data set."""
    name: str
    miou: float
    """Mean IoU over the classes in its ground truth, in [0, 1]; nan if it has none."""
    pixel_accuracy: float
    """Share of its labelled pixels with the right class, in [0, 1]; nan if it has none."""


@dataclass(frozen=True)
class ConfusedImage:
    """An image behind a confusion."""

    index: int
    """Index in the data set."""
    name: str
    pixels: int
    """Its pixels of the one class that were predicted as the other."""


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation."""

    metrics: SegmentationMetrics
    images: int
    """Number of images that were counted."""
    broken: tuple[str, ...]
    """Errors of images that could not be read."""
    confusions: tuple[Confusion, ...] = ()
    """The pairs of classes with the most wrong pixels, most first."""
    of_images: tuple[ImageMetrics, ...] = ()
    """Metrics of each image, in the data set's order; empty if they were not kept."""
    behind: tuple[tuple[ConfusedImage, ...], ...] = ()
    """For each of `confusions`, the images with the most of its pixels, most first; empty if they were not kept."""
    confidence: ConfidenceMetrics | None = None
    """How far confidence can be trusted; None if it was not measured."""


def segmenter_predictor(segmenter: Segmenter, vocabulary: Vocabulary) -> Predictor:
    """Return a predictor that labels as `segmenter.segment` does, by the model's own image configuration."""
    return lambda image: segmenter.segment(image, vocabulary).labels


def model_predictor(model: SAN, text: TextClassifier, words: int) -> Predictor:
    """Return a predictor for a bare model, as in a running training, which a `SanSegmenter` would freeze.

    `words`: how many of the classes are reported; the others are background words.
    """
    device = model.no_object_embedding.device

    @torch.no_grad()
    def predict(image: np.ndarray) -> np.ndarray:
        prepared = prepare(image, model.config.image)
        proposals = model.propose(torch.as_tensor(prepared.pixels).unsqueeze(0).to(device))
        probabilities = class_probabilities(model.classify(proposals, text))[0]
        labels = label_map(proposals.mask_logits[0], probabilities, prepared.sizes).cpu().numpy()
        return np.where(labels < words, labels, UNLABELLED)

    return predict


def dataset_predictor(model: SAN, dataset: SegmentationDataset) -> Predictor:
    """Return a `model_predictor` for the data set's classes, which are embedded once."""
    vocabulary = dataset.vocabulary
    return model_predictor(model, TextEncoder(model).classifier(vocabulary), len(vocabulary.names))


def evaluate(
    predict: Predictor,
    dataset: SegmentationDataset,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare predictions with ground truth, one image at a time, at each image's own size.

    `limit`: only so many images, spread evenly over the data set.
    """
    names = dataset.vocabulary.names
    counts = Counts(len(names))
    images = len(dataset) if limit is None else min(limit, len(dataset))
    broken = []
    indices = [index * len(dataset) // images for index in range(images)]
    for done, index in enumerate(indices, 1):
        if progress:
            progress(done, images)
        try:
            image, truth = dataset[index]
        except (UserError, OSError) as error:
            broken.append(f"{dataset.name(index)}: {error}")
            continue
        counts.update(truth, predict(image))
    confusions = tuple(counts.worst_confusions(names))
    return Evaluation(counts.metrics(names), images - len(broken), tuple(broken), confusions)


def validation(
    model: SAN, dataset: SegmentationDataset, *, limit: int | None = None
) -> Callable[[int], Mapping[str, float]]:
    """Return a function that evaluates the model when called, for `opensan.train`; it warns of broken images."""
    predict = dataset_predictor(model, dataset)

    def measure(_step: int) -> Mapping[str, float]:
        evaluation = evaluate(predict, dataset, limit=limit)
        if evaluation.broken:
            warnings.warn(
                f"validation leaves out images that can't be read ({len(evaluation.broken)} of "
                f"{evaluation.images + len(evaluation.broken)}), the first is {evaluation.broken[0]}",
                stacklevel=2,
            )
        return evaluation.metrics.summary()

    return measure
