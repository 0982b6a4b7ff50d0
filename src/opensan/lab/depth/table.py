"""The table and the picture of depth read from words."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from opensan.files import write_text
from opensan.lab.ablation.run import Budget
from opensan.lab.ablation.table import CONFIDENCE, mean_interval
from opensan.lab.depth.scenes import DepthScene
from opensan.outputs.fonts import font_for

BASELINE = "baselines"
"""Name of the row of what needs no image."""

MEASURES = {
    "error": "relative error",
    "rmse": "RMSE, m",
    "right": "within 1.25",
    "miou": "mIoU of words",
    "objects": "error on objects",
    "left out": "error where left out",
    "miou left out": "mIoU of left out",
}
"""Measure -> its column; see `DepthMeasures.figures`."""


@dataclass(frozen=True)
class DepthRow:
    """Result of one run."""

    variant: str
    seed: int
    figures: Mapping[str, Mapping[str, float]]
    """Reading -> measure -> value."""


def write_results(rows: Sequence[DepthRow], variants: Sequence[str], out: Path, budget: Budget) -> list[Path]:
    """Write runs.csv and depth.md to `out`, variants in the order given; each file is replaced as a whole."""
    order = [BASELINE, *variants]
    rows = sorted(rows, key=lambda row: (order.index(row.variant), row.seed))
    files = [out / "runs.csv", out / "depth.md"]
    write_text(files[0], as_csv(rows))
    write_text(files[1], as_markdown(rows, budget))
    return files


def as_csv(rows: Sequence[DepthRow]) -> str:
    """Return a line for each run and reading."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", "reading", *MEASURES])
    for row in rows:
        for reading, values in row.figures.items():
            writer.writerow([row.variant, row.seed, reading, *(f"{values[name]:.6f}" for name in MEASURES)])
    return text.getvalue()


def as_markdown(rows: Sequence[DepthRow], budget: Budget) -> str:
    """Return the table: means over seeds with their intervals."""
    told = ", ".join(f"{name} {value}" for name, value in asdict(budget).items())
    lines = [
        f"Budget of every run: {told}. Means over seeds with {CONFIDENCE:.0%} intervals; baselines need no training.",
        "",
        "| words | reading | seeds | " + " | ".join(MEASURES.values()) + " |",
        "|---|---|---:|" + "---:|" * len(MEASURES),
    ]
    for variant in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == variant]
        for reading in own[0].figures:
            shown = [_shown([row.figures[reading][name] for row in own]) for name in MEASURES]
            seeds = "" if variant == BASELINE else str(len(own))
            lines.append("| " + " | ".join(["" if variant == BASELINE else variant, reading, seeds, *shown]) + " |")
    return "\n".join(lines) + "\n"


def _shown(values: Sequence[float]) -> str:
    mean, half = mean_interval(values)
    return f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


TILE, GAP, LETTERS = 216, 10, 15
"""Sizes of the picture in pixels: side of a tile, space between tiles, letters."""
NEAR_COLOUR, MIDDLE_COLOUR, FAR_COLOUR = (255, 214, 92), (206, 60, 96), (34, 18, 82)
NEAREST, FARTHEST = 2.0, 12.0
"""Metres at the ends of the scale; what is beyond has the colour of the end."""


def depth_colours(depth: np.ndarray) -> np.ndarray:
    """Return [H, W, 3] uint8 of a depth in metres: bright is near, dark is far, by the logarithm."""
    share = np.clip(np.log(depth / NEAREST) / np.log(FARTHEST / NEAREST), 0, 1)
    stops = np.array([NEAR_COLOUR, MIDDLE_COLOUR, FAR_COLOUR], dtype=np.float64)
    channels = [np.interp(share, (0, 0.5, 1), stops[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def scenes_picture(scenes: Sequence[DepthScene], predicted: Sequence[np.ndarray]) -> Image.Image:
    """Draw each scene's image, true depth and predicted depth [H, W], a scene a row, and the scale of colours below."""
    step, head, foot = TILE + GAP, 30, 52
    canvas = Image.new("RGB", (3 * step + GAP, head + len(scenes) * step + foot), "white")
    draw = ImageDraw.Draw(canvas)
    font = font_for("metres", LETTERS)
    for column, title in enumerate(("image", "true depth", "depth read from words")):
        draw.text((GAP + column * step, head / 2), title, (30, 30, 30), font, anchor="lm")
    for row, (scene, depth) in enumerate(zip(scenes, predicted, strict=True)):
        for column, pixels in enumerate((scene.image, depth_colours(scene.depth), depth_colours(depth))):
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
            canvas.paste(tile, (GAP + column * step, head + row * step))
    top, width = canvas.height - foot + 6, canvas.width - 2 * GAP
    scale = np.geomspace(NEAREST, FARTHEST, width)[None]
    canvas.paste(Image.fromarray(depth_colours(scale)).resize((width, 14)), (GAP, top))
    for metres in (2, 3, 4, 6, 8, 12):
        place = np.log(metres / NEAREST) / np.log(FARTHEST / NEAREST)
        anchor = "la" if place == 0 else "ra" if place == 1 else "ma"
        text = f"{metres} m"
        draw.text((GAP + place * width, top + 18), text, (30, 30, 30), font, anchor=anchor)
    return canvas
