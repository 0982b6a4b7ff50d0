"""Running a model over a labelled data set, and writing what was measured."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from opensan.assemble import label_map
from opensan.data.dataset import SegmentationDataset
from opensan.evaluate.metrics import ConfusionMatrix, SegmentationMetrics
from opensan.files import write_text
from opensan.images import prepare
from opensan.model import SAN
from opensan.segmenter import Segmenter
from opensan.structures import TextClassifier
from opensan.text import TextEncoder
from opensan.vocabulary import UNLABELLED, Vocabulary

Predictor = Callable[[np.ndarray], np.ndarray]
"""Photograph [H, W, 3] uint8 RGB -> labels [H, W] integers, -1 where no word is given."""


@dataclass(frozen=True)
class Evaluation:
    """What a model was measured at."""

    metrics: SegmentationMetrics
    images: int
    """Photographs that were counted."""
    broken: tuple[str, ...]
    """Reasons why the others could not be read."""


def segmenter_predictor(segmenter: Segmenter, vocabulary: Vocabulary) -> Predictor:
    """Labels as `segmenter.segment` gives them: the protocol is the model's own image configuration."""
    return lambda image: segmenter.segment(image, vocabulary).labels


def model_predictor(model: SAN, text: TextClassifier, words: int) -> Predictor:
    """The same from a bare model, as in a running training, which a `Segmenter` would freeze.

    `words`: how many of the classes are reported; the rest absorb pixels.
    """
    device = model.no_object_embedding.device

    @torch.no_grad()
    def predict(image: np.ndarray) -> np.ndarray:
        prepared = prepare(image, model.config.image)
        proposals = model.propose(prepared.pixels.unsqueeze(0).to(device))
        probabilities = model.classify(proposals, text)[0].softmax(dim=-1)[:, :-1]
        labels = label_map(proposals.mask_logits[0], probabilities, prepared.sizes).cpu().numpy()
        return np.where(labels < words, labels, UNLABELLED)

    return predict


def dataset_predictor(model: SAN, dataset: SegmentationDataset) -> Predictor:
    """`model_predictor` for the data set's own words, which are embedded once."""
    vocabulary = dataset.vocabulary
    return model_predictor(model, TextEncoder(model).classifier(vocabulary), len(vocabulary.names))


def evaluate(
    predict: Predictor, dataset: SegmentationDataset, *, limit: int | None = None, progress: bool = True
) -> Evaluation:
    """Compare predictions with ground truth, one photograph at a time, at each photograph's own size.

    `limit`: only so many photographs, spread evenly over the data set.
    """
    names = dataset.vocabulary.names
    confusion = ConfusionMatrix(len(names))
    count = len(dataset) if limit is None else min(limit, len(dataset))
    broken = []
    indices = [index * len(dataset) // count for index in range(count)]
    for index in track(indices, "evaluating", console=Console(stderr=True), disable=not progress, transient=True):
        try:
            image, truth = dataset[index]
        except (OSError, ValueError) as error:
            broken.append(f"{dataset.name(index)}: {error}")
            continue
        confusion.update(truth, predict(image))
    return Evaluation(confusion.metrics(names), count - len(broken), tuple(broken))


def validation(
    model: SAN, dataset: SegmentationDataset, *, limit: int | None = None
) -> Callable[[int], Mapping[str, float]]:
    """For `opensan.train`: measures the model, as it is then, after so many steps."""
    predict = dataset_predictor(model, dataset)
    return lambda _step: evaluate(predict, dataset, limit=limit, progress=False).metrics.summary()


def write_report(evaluation: Evaluation, folder: str | Path, *, title: str, about: Mapping[str, str]) -> None:
    """Write `metrics.json`, `classes.csv` and `metrics.md` to `folder`.

    `about`: what was measured (model, data set, command), for whoever reads the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = evaluation.metrics
    plain = {
        "title": title,
        "about": dict(about),
        "images": evaluation.images,
        "broken": list(evaluation.broken),
        "metrics": metrics.summary(),
        "classes": [asdict(one) for one in metrics.classes],
    }
    # nan is no JSON: what does not exist is null.
    write_text(folder / "metrics.json", json.dumps(_without_nan(plain), indent=2, ensure_ascii=False) + "\n")
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(asdict(metrics.classes[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_without_nan([asdict(one) for one in metrics.classes]))
    write_text(folder / "classes.csv", buffer.getvalue())
    write_text(folder / "metrics.md", markdown(evaluation, title=title, about=about))


def markdown(evaluation: Evaluation, *, title: str, about: Mapping[str, str]) -> str:
    """The figures as a Markdown section: all classes together, then a table of each (percent)."""
    metrics = evaluation.metrics
    lines = [f"## {title}", "", *(f"- {key}: {value}" for key, value in about.items())]
    lines += [f"- photographs: {evaluation.images}"]
    lines += [f"- not readable: {reason}" for reason in evaluation.broken]
    lines += ["", "| mIoU (ground truth) | mIoU (ground truth or predicted) | fwIoU | mean accuracy | pixel accuracy |"]
    lines += ["|---|---|---|---|---|", "| " + " | ".join(map(_percent, metrics.summary().values())) + " |"]
    lines += ["", "| class | IoU | accuracy | share of pixels |", "|---|---|---|---|"]
    pixels = max(sum(one.pixels for one in metrics.classes), 1)
    lines += [
        f"| {one.name.replace('|', chr(92) + '|')} | {_percent(one.iou)} | {_percent(one.accuracy)} "
        f"| {_percent(one.pixels / pixels)} |"
        for one in metrics.classes
    ]
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.2f}"


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
