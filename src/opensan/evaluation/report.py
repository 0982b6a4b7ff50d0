"""Write an evaluation's results as JSON, CSV and Markdown."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from opensan.evaluation.evaluation import Evaluation
from opensan.files import json_text, write_text

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

    `about`: facts about the evaluation for readers (model, data set, command).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = evaluation.metrics
    classes = [asdict(figures) for figures in metrics.classes]
    confusions = [asdict(pair) for pair in evaluation.confusions]
    plain = {
        "title": title,
        "about": dict(about),
        "images": evaluation.images,
        "broken": list(evaluation.broken),
        "metrics": metrics.summary(),
        "classes": classes,
        "confusions": confusions,
    }
    write_text(folder / "metrics.json", json_text(plain, indent=2) + "\n")
    _write_table(folder / "classes.csv", classes)
    _write_table(folder / "confusions.csv", confusions)
    _write_table(folder / "images.csv", [asdict(image) for image in evaluation.of_images])
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
    return "\n".join(lines) + "\n"


def percent(share: float) -> str:
    """Return a share as percent with two digits; a dash for nan."""
    return "–" if math.isnan(share) else f"{100 * share:.2f}"


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
