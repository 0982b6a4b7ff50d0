"""Make SAN's table: a model's mIoU on the benchmarks, with the official figures beside it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opensan.checkpoints.presets import PRESETS
from opensan.evaluation.evaluation import Evaluation
from opensan.evaluation.report import percent
from opensan.files import write_text

BENCHMARKS = {
    "coco_stuff_171": "COCO-Stuff",
    "pascal_voc_20": "VOC-20",
    "pascal_context_59": "PC-59",
    "ade20k_150": "ADE-150",
    "pascal_context_459": "PC-459",
    "ade20k_847": "ADE-847",
}
"""Label set -> the benchmark's name in papers, in the order of SAN's table."""

# mIoU in percent over the classes in the ground truth, from the logs of the released checkpoints.
_OFFICIAL = {
    "SAN B/16": dict(zip(BENCHMARKS, (41.93, 93.95, 54.07, 27.56, 16.71, 10.21), strict=True)),
    "SAN L/14-336": dict(zip(BENCHMARKS, (45.57, 95.18, 57.53, 31.93, 20.83, 12.96), strict=True)),
}
# By the older rule (classes in the ground truth or in a prediction), as in SAN's paper.
_OFFICIAL_UNION = {"SAN B/16": {"pascal_context_459": 12.6}, "SAN L/14-336": {"pascal_context_459": 15.7}}


@dataclass(frozen=True)
class Measured:
    """The evaluation of one data set, with its column of the table."""

    name: str
    """Name of the folder."""
    label_set: str | None
    """One of BENCHMARKS; None or another for a column without an official figure."""
    evaluation: Evaluation


def table(measured: list[Measured], model: str) -> dict[str, Mapping[str, float | int | None]]:
    """Return row -> column -> figure in percent (row "images": their number), None where there is none.

    The columns are the benchmarks, measured or not, then the other data sets by the names of their folders, among them
    a second one of a benchmark's classes. `model`: its configuration's name; the official rows are those of the same
    architecture, or all if it is none of SAN's.
    """
    columns: dict[str, tuple[str | None, Measured | None]] = {title: (key, None) for key, title in BENCHMARKS.items()}
    for data in measured:
        title = BENCHMARKS.get(data.label_set or "")
        if title is not None and columns[title][1] is None:
            columns[title] = (data.label_set, data)
        else:
            columns[data.name if data.name not in columns else f"{data.name} (own)"] = (None, data)
    rows: dict[str, Mapping[str, float | int | None]] = {}

    def add(name: str, figure) -> None:
        figures = {title: figure(key, data) for title, (key, data) in columns.items()}
        rows[name] = {title: None if value != value else value for title, value in figures.items()}  # JSON has no nan

    def measured_row(name: str, attribute: str) -> None:
        add(name, lambda _, data: data and 100 * getattr(data.evaluation.metrics, attribute))

    preset = PRESETS.get(model)
    official = (preset.official.title,) if preset and preset.official else tuple(_OFFICIAL)
    add("images", lambda _, data: data and data.evaluation.images)
    measured_row("mIoU (ground truth)", "miou")
    for name in official:
        add(f"official {name}", lambda key, _, name=name: _OFFICIAL[name].get(key))
    measured_row("mIoU (ground truth or predicted)", "miou_union")
    for name in official:
        add(f"official {name}, this rule", lambda key, _, name=name: _OFFICIAL_UNION[name].get(key))
    measured_row("fwIoU", "fwiou")
    measured_row("mean accuracy", "mean_accuracy")
    measured_row("pixel accuracy", "pixel_accuracy")
    measured_row("boundary IoU", "boundary_iou")
    return rows


def missing(measured: list[Measured]) -> list[str]:
    """Return the names of the benchmarks that were not measured."""
    return [title for key, title in BENCHMARKS.items() if key not in {data.label_set for data in measured}]


def as_markdown(rows: Mapping[str, Mapping[str, float | int | None]]) -> str:
    """Return the table as Markdown; a dash where there is no figure."""
    columns = list(next(iter(rows.values())))
    heads = (column.replace("|", "\\|") for column in columns)
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in rows.items():
        lines.append(f"| {name} | " + " | ".join(map(_cell, figures.values())) + " |")
    return "\n".join(lines) + "\n"


def _cell(figure: float | int | None) -> str:
    if figure is None:
        return "–"
    return f"{figure:,}" if isinstance(figure, int) else percent(figure / 100)


def write_table(
    rows: Mapping[str, Mapping[str, float | int | None]], folder: Path, *, about: Mapping[str, str]
) -> None:
    """Write `table.md` and `table.json` to `folder`."""
    lines = [f"- {key}: {value}" for key, value in about.items()]
    write_text(folder / "table.md", "\n".join([*lines, "", as_markdown(rows)]))
    plain = {"about": dict(about), "rows": rows}
    write_text(folder / "table.json", json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
