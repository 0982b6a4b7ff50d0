"""The table and the picture of ablations: means, spread over seeds, and paired differences from the base."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from opensan.files import atomic_path, write_text
from opensan.lab.ablation.variants import BASE, VARIANTS, Variant
from opensan.outputs.colours import palette
from opensan.outputs.fonts import font_for

FIGURES = ("base", "novel", "cross-style")
"""Mean IoU over words that had masks in training; over words that had none; over all, in a style never trained."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """Result of one run."""

    variant: str
    seed: int
    figures: Mapping[str, float]
    """Name of a figure -> mIoU in [0, 1]."""
    trained: int
    """Trained parameters."""
    multiply_adds: int
    """Multiply-adds of one test image, without the label map."""
    images_per_second: float
    training_seconds: float
    identity: str
    """Identity of the trained model."""


class Interval(NamedTuple):
    """A mean and the half width of its interval; the latter is nan with fewer than two values."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f}" + ("" if math.isnan(self.half) else f" ± {100 * self.half:.1f}")


def paired_difference(rows: Sequence[Row], base: Sequence[Row], figure: str) -> Interval | None:
    """Return the mean difference from the base over seeds that both have, with Student's interval; None without any."""
    ours, theirs = ({row.seed: row.figures[figure] for row in some if figure in row.figures} for some in (rows, base))
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return mean_interval(differences) if differences else None


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of one value or more, with Student's interval."""
    count = len(values)
    if count < 2:
        return Interval(values[0], math.nan)
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Interval(statistics.mean(values), half)


def verdict(difference: Interval | None) -> str:
    """Say whether an interval shows better or worse than the base; undecided if it holds zero, or is none."""
    if difference is None or math.isnan(difference.half) or abs(difference.mean) <= difference.half:
        return "undecided"
    return "better" if difference.mean > 0 else "worse"


def write_results(rows: Sequence[Row], out: Path, budget: Mapping[str, Any]) -> list[Path]:
    """Write runs.csv, ablations.md and ablations.png to `out`; each is replaced as a whole."""
    files = [out / "runs.csv", out / "ablations.md", out / "ablations.png"]
    write_text(files[0], as_csv(rows))
    write_text(files[1], as_markdown(rows, budget))
    with atomic_path(files[2]) as path:
        picture(rows).save(path, "PNG")
    return files


def by_variant(rows: Sequence[Row]) -> list[tuple[Variant, list[Row]]]:
    """Group the rows by variant, in the order of `VARIANTS`."""
    groups = [(variant, [row for row in rows if row.variant == variant.name]) for variant in VARIANTS]
    return [(variant, sorted(own, key=lambda row: row.seed)) for variant, own in groups if own]


def as_csv(rows: Sequence[Row]) -> str:
    """Return a line a run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = [f"miou_{figure}" for figure in FIGURES]
    costs = ("trained_parameters", "multiply_adds", "images_per_second", "training_seconds", "identity")
    writer.writerow(["variant", "seed", *figures, *costs])
    for _, own in by_variant(rows):
        for row in own:
            mious = [f"{row.figures.get(figure, math.nan):.6f}" for figure in FIGURES]
            speeds = (f"{row.images_per_second:.2f}", f"{row.training_seconds:.1f}", row.identity)
            writer.writerow([row.variant, row.seed, *mious, row.trained, row.multiply_adds, *speeds])
    return text.getvalue()


def as_markdown(rows: Sequence[Row], budget: Mapping[str, Any]) -> str:
    """Return the table: means with the spread over seeds, and differences from the base with their intervals."""
    groups = by_variant(rows)
    base = [row for row in rows if row.variant == BASE]
    told = ", ".join(f"{name} {value}" for name, value in budget.items())
    lines = [
        f"Budget of every run: {told}. mIoU in %, mean ± standard deviation over seeds; differences from the base in "
        f"points, paired by seed, with {CONFIDENCE:.0%} intervals.",
        "",
        "| variant | seeds | base words | novel words | another style | trained, M | multiply-adds, G | images/s "
        "| base, difference | novel, difference | style, difference | novel words are |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for variant, own in groups:
        means = [_spread([row.figures[figure] for row in own if figure in row.figures]) for figure in FIGURES]
        differences = [None if variant.name == BASE else paired_difference(own, base, figure) for figure in FIGURES]
        costs = [
            f"{own[0].trained / 1e6:.3f}",
            f"{own[0].multiply_adds / 1e9:.3f}",
            f"{statistics.median(row.images_per_second for row in own):.1f}",
        ]
        shown = ["" if one is None else str(one) for one in differences]
        last = "" if variant.name == BASE else verdict(differences[1])
        lines.append("| " + " | ".join([variant.name, str(len(own)), *means, *costs, *shown, last]) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


LINE, LABELS, PLOT, LETTERS, MARGIN = 34, 230, 560, 15, 46
"""Sizes of the picture in pixels: height of a line, widths of names and of the plot, letters, room above and below."""


def picture(rows: Sequence[Row]) -> Image.Image:
    """Draw the differences from the base: a dot and its interval for each variant and figure."""
    base = [row for row in rows if row.variant == BASE]
    lines = [
        (variant.name, [paired_difference(own, base, figure) for figure in FIGURES])
        for variant, own in by_variant(rows)
        if variant.name != BASE
    ]
    canvas = Image.new("RGB", (LABELS + PLOT + 30, 2 * MARGIN + LINE * max(1, len(lines))), "white")
    draw = ImageDraw.Draw(canvas)
    colours = [tuple(int(part) for part in colour) for colour in palette(len(FIGURES))]
    font = font_for("mIoU", LETTERS)
    reach = max([0.01, *(_reach(one) for _, own in lines for one in own if one is not None)])

    def at(value: float) -> float:
        return LABELS + PLOT * (0.5 + value / (2.2 * reach))

    bottom = canvas.height - MARGIN + 6
    draw.line([(at(0), MARGIN - 6), (at(0), bottom)], fill=(120, 120, 120))
    for share in (-1, -0.5, 0.5, 1):
        draw.line([(at(share * reach), MARGIN - 6), (at(share * reach), bottom)], fill=(225, 225, 225))
    for share in (-1, 0, 1):
        written = f"{100 * share * reach:+.1f}" if share else "0"
        draw.text((at(share * reach), bottom + 4), written, (60, 60, 60), font, anchor="ma")
    for number, figure in enumerate(FIGURES):
        left = 12 + number * 210
        draw.rectangle([left, 14, left + 12, 26], fill=colours[number])
        draw.text((left + 18, 20), f"{figure}, mIoU points", (30, 30, 30), font, anchor="lm")
    for index, (name, own) in enumerate(lines):
        middle = MARGIN + LINE * index + LINE / 2
        draw.text((12, middle), name, (30, 30, 30), font, anchor="lm")
        for number, one in enumerate(own):
            if one is not None:
                y = middle + 8 * (number - 1)
                half = 0.0 if math.isnan(one.half) else one.half
                draw.line([(at(one.mean - half), y), (at(one.mean + half), y)], fill=colours[number], width=2)
                draw.ellipse([at(one.mean) - 4, y - 4, at(one.mean) + 4, y + 4], fill=colours[number])
    return canvas


def _reach(one: Interval) -> float:
    """Return how far an interval reaches from zero; a very wide one does not hide the others."""
    half = 0.0 if math.isnan(one.half) else one.half
    return min(abs(one.mean) + half, 3 * abs(one.mean) + 0.05)
