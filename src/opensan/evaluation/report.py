"""Write an evaluation's results as JSON, CSV and Markdown."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from PIL import Image

from opensan.evaluation.confidence import ConfidenceMetrics
from opensan.evaluation.evaluation import Evaluation
from opensan.files import atomic_path, json_text, write_text
from opensan.outputs.reliability import Bar, Kept, reliability_picture

FIGURES = {
    "miou": "mIoU (ground truth)",
    "miou_union": "mIoU (ground truth or predicted)",
    "fwiou": "fwIoU",
    "mean_accuracy": "mean accuracy",
    "pixel_accuracy": "pixel accuracy",
    "boundary_iou": "boundary IoU",
    "pq": "PQ",
    "sq": "SQ",
    "rq": "RQ",
    "pq_thing": "PQ of things",
    "pq_stuff": "PQ of stuff",
    "ap": "AP",
    "ap50": "AP, IoU 0.50",
    "ap75": "AP, IoU 0.75",
}
"""Names of the metrics in reports, by their names in `SegmentationMetrics.summary` and `ObjectEvaluation.summary`."""


def write_report(evaluation: Evaluation, folder: str | Path, *, title: str, about: Mapping[str, str]) -> None:
    """Write `metrics.json`, `metrics.md`, and tables `classes.csv`, `confusions.csv`, `images.csv` to `folder`.

    If confidence was measured, also `thresholds.csv` and `reliability.png`.

    `about`: facts about the evaluation for readers (model, data set, command).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = evaluation.metrics
    classes = [asdict(figures) for figures in metrics.classes]
    confusions = [asdict(pair) for pair in evaluation.confusions]
    for pair, images in zip(confusions, evaluation.behind, strict=False):
        pair["images"] = [image.name for image in images]
    confidence = evaluation.confidence
    plain: dict[str, Any] = {
        "title": title,
        "about": dict(about),
        "images": evaluation.images,
        "broken": list(evaluation.broken),
        "metrics": metrics.summary(),
        "classes": classes,
        "confusions": confusions,
    }
    if confidence is not None:
        plain["confidence"] = confidence.to_dict()
    write_text(folder / "metrics.json", json_text(plain, indent=2) + "\n")
    _write_table(folder / "classes.csv", classes)
    _write_table(folder / "confusions.csv", [_joined(pair) for pair in confusions])
    _write_table(folder / "images.csv", [asdict(image) for image in evaluation.of_images])
    _write_table(folder / "thresholds.csv", [] if confidence is None else [asdict(point) for point in confidence.curve])
    (folder / "reliability.png").unlink(missing_ok=True)
    if confidence is not None:
        with atomic_path(folder / "reliability.png") as temporary:
            picture(confidence).save(temporary)
    write_text(folder / "metrics.md", markdown(evaluation, title=title, about=about))


def _write_table(path: Path, rows: Sequence[Mapping]) -> None:
    """Write a CSV; without rows, remove it."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{key: None if value != value else value for key, value in row.items()} for row in rows])
    write_text(path, buffer.getvalue())


def _joined(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a table with lists as text."""
    return {key: "; ".join(value) if isinstance(value, list) else value for key, value in row.items()}


def markdown(evaluation: Evaluation, *, title: str, about: Mapping[str, str]) -> str:
    """Return the metrics as a Markdown section: over all classes, each class, the worst confusions (percent)."""
    metrics = evaluation.metrics
    summary = metrics.summary()
    lines = [f"## {title}", "", *(f"- {key}: {value}" for key, value in about.items())]
    lines += [f"- images: {evaluation.images}"]
    lines += [f"- not readable: {reason}" for reason in evaluation.broken]
    lines += ["", _row(FIGURES[name] for name in summary), _row(["---"] * len(summary))]
    lines += [_row(map(percent, summary.values()))]
    lines += ["", "| class | IoU | accuracy | boundary IoU | share of pixels |", "|---|---|---|---|---|"]
    pixels = max(sum(figures.pixels for figures in metrics.classes), 1)
    for of_class in metrics.classes:
        figures = of_class.iou, of_class.accuracy, of_class.boundary_iou, of_class.pixels / pixels
        lines.append(_row([_cell(of_class.name), *map(percent, figures)]))
    if evaluation.confusions:
        lines += ["", "| pixels of | taken for | pixels | share of the class |", "|---|---|---|---|"]
    for pair in evaluation.confusions:
        lines.append(_row([_cell(pair.truth), _cell(pair.predicted), f"{pair.pixels:,}", percent(pair.share)]))
    if evaluation.confidence is not None:
        lines += ["", *_of_confidence(evaluation.confidence)]
    return "\n".join(lines) + "\n"


def calibrated_on(confidence: ConfidenceMetrics) -> str:
    """Return whether confidence is calibrated, and on what, for readers."""
    calibration = confidence.calibration
    if calibration is None:
        return "not calibrated"
    return f"calibrated on {calibration['data']} ({calibration['images']:,} images)"


def picture(confidence: ConfidenceMetrics) -> Image.Image:
    """Draw the reliability diagram, and what thresholds keep."""
    total = max(sum(of_bin.pixels for of_bin in confidence.bins), 1)
    bars = [
        Bar(of_bin.low, of_bin.high, of_bin.pixels / total, of_bin.confidence, of_bin.accuracy)
        for of_bin in confidence.bins
        if of_bin.pixels
    ]
    title = f"{calibrated_on(confidence).split(' (')[0]}: ECE {percent(confidence.ece)} %"
    return reliability_picture(title, bars, [Kept(*astuple(point)) for point in confidence.curve])


def _of_confidence(confidence: ConfidenceMetrics) -> list[str]:
    """Return the lines of a Markdown section."""
    lines = [f"Confidence, {calibrated_on(confidence)}: expected calibration error {percent(confidence.ece)} %, mean "]
    lines[0] += f"{percent(confidence.confidence)} % where {percent(confidence.accuracy)} % is right."
    lines += ["", "| threshold | pixels labelled | right of these | mIoU of these |", "|---|---|---|---|"]
    for point in confidence.curve:
        lines.append(_row([f"{point.threshold:.2f}", *map(percent, (point.labelled, point.accuracy, point.miou))]))
    return lines


def percent(share: float) -> str:
    """Return a share as percent with two digits; a dash for nan."""
    return "–" if math.isnan(share) else f"{100 * share:.2f}"


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
