"""What an evaluation leaves for people and programs: JSON, CSV and Markdown."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from opensan.evaluate.evaluation import Evaluation
from opensan.files import write_text

FIGURES = {
    "miou": "mIoU (ground truth)",
    "miou_union": "mIoU (ground truth or predicted)",
    "fwiou": "fwIoU",
    "mean_accuracy": "mean accuracy",
    "pixel_accuracy": "pixel accuracy",
    "boundary_iou": "boundary IoU",
}
"""What people read for the names in `SegmentationMetrics.summary`."""


def write_report(evaluation: Evaluation, folder: str | Path, *, title: str, about: Mapping[str, str]) -> None:
    """Write `metrics.json`, `metrics.md`, and tables `classes.csv`, `confusions.csv`, `photographs.csv` to `folder`.

    `about`: what was measured (model, data set, command), for whoever reads the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = evaluation.metrics
    classes = [asdict(one) for one in metrics.classes]
    confusions = [asdict(one) for one in evaluation.confusions]
    plain = {
        "title": title,
        "about": dict(about),
        "images": evaluation.images,
        "broken": list(evaluation.broken),
        "metrics": metrics.summary(),
        "classes": classes,
        "confusions": confusions,
    }
    # nan is no JSON: what does not exist is null.
    write_text(folder / "metrics.json", json.dumps(_without_nan(plain), indent=2, ensure_ascii=False) + "\n")
    _write_table(folder / "classes.csv", classes)
    _write_table(folder / "confusions.csv", confusions)
    _write_table(folder / "photographs.csv", [asdict(one) for one in evaluation.photographs])
    write_text(folder / "metrics.md", markdown(evaluation, title=title, about=about))


def _write_table(path: Path, rows: Sequence[Mapping]) -> None:
    """A CSV; without rows, none."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_without_nan(list(rows)))
    write_text(path, buffer.getvalue())


def markdown(evaluation: Evaluation, *, title: str, about: Mapping[str, str]) -> str:
    """The figures as a Markdown section: all classes together, each class, the worst confusions (percent)."""
    metrics = evaluation.metrics
    summary = metrics.summary()
    lines = [f"## {title}", "", *(f"- {key}: {value}" for key, value in about.items())]
    lines += [f"- photographs: {evaluation.images}"]
    lines += [f"- not readable: {reason}" for reason in evaluation.broken]
    lines += ["", _row(FIGURES[name] for name in summary), _row(["---"] * len(summary))]
    lines += [_row(map(percent, summary.values()))]
    lines += ["", "| class | IoU | accuracy | boundary IoU | share of pixels |", "|---|---|---|---|---|"]
    pixels = max(sum(one.pixels for one in metrics.classes), 1)
    for one in metrics.classes:
        figures = one.iou, one.accuracy, one.boundary_iou, one.pixels / pixels
        lines.append(_row([_cell(one.name), *map(percent, figures)]))
    if evaluation.confusions:
        lines += ["", "| pixels of | taken for | pixels | share of the class |", "|---|---|---|---|"]
    for one in evaluation.confusions:
        lines.append(_row([_cell(one.truth), _cell(one.predicted), f"{one.pixels:,}", percent(one.share)]))
    return "\n".join(lines) + "\n"


def percent(share: float) -> str:
    """A share as percent with two digits; a dash for nan."""
    return "–" if math.isnan(share) else f"{100 * share:.2f}"


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
