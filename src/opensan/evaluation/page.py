"""Write an HTML page with the metrics, and the best and worst images beside ground truth and prediction.

The folder can be moved or zipped: `index.html` and its pictures, no scripts, nothing loaded from elsewhere.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from opensan.data.dataset import SegmentationDataset
from opensan.evaluation.evaluation import Evaluation, Photograph
from opensan.evaluation.predictors import BatchPredictor
from opensan.evaluation.report import FIGURES, percent
from opensan.files import atomic_path, write_text
from opensan.outputs.colours import palette
from opensan.outputs.drawing import blend

SHOWN = 8
"""Images of each kind, best and worst."""

LONG_SIDE = 480
"""Longest side of the pictures, in pixels."""

_MISTAKE = (213, 35, 35)
_PICTURES = ("photograph", "ground truth", "prediction", "mistakes")

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #202020; margin: 2rem auto; max-width: 2000px; padding: 0 1.5rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
h3 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere }
table { border-collapse: collapse } td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
section { border-top: 1px solid #d8d8d8; padding: 1rem 0 }
.pictures { display: grid; grid-template-columns: repeat(4, 1fr); gap: .6rem }
figure { margin: 0 } figure img { width: 100%; height: auto; display: block } figcaption { color: #707070 }
.legend { margin: .5rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none }
.legend i { display: inline-block; width: .9em; height: .9em; margin-right: .4em; border: 1px solid #404040;
  vertical-align: -.1em }
.figures { color: #606060; font-weight: normal }
@media (max-width: 900px) { .pictures { grid-template-columns: repeat(2, 1fr) } }
"""


def write_page(
    folder: Path,
    dataset: SegmentationDataset,
    predictor: BatchPredictor,
    evaluation: Evaluation,
    *,
    title: str,
    about: Mapping[str, str],
) -> Path:
    """Write `folder`/index.html and `folder`/pictures/, predicting the shown images once more. Returns the page."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    best, worst = best_and_worst(evaluation.photographs)
    parts = []
    for heading, chosen in (("Worst images", worst), ("Best images", best)):
        if chosen:
            parts.append(f"<h2>{heading}</h2>")
            parts += [_photograph(folder, dataset, predictor, photograph) for photograph in chosen]
    body = "\n".join([f"<h1>{escape(title)}</h1>", _figures(evaluation, about), *parts])
    write_text(
        folder / "index.html",
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n{body}\n</html>\n",
    )
    return folder / "index.html"


def best_and_worst(photographs: Sequence[Photograph]) -> tuple[list[Photograph], list[Photograph]]:
    """Return the images with the highest and with the lowest mIoU, extremes first; none is in both."""
    ranked = sorted((image for image in photographs if not math.isnan(image.miou)), key=lambda it: (it.miou, it.index))
    count = min(SHOWN, len(ranked) // 2)
    return ranked[::-1][: min(SHOWN, len(ranked) - count)], ranked[:count]


def _figures(evaluation: Evaluation, about: Mapping[str, str]) -> str:
    """Return the metrics over all classes and the worst confusions as HTML."""
    facts = {**about, "photographs": f"{evaluation.images:,}"}
    if evaluation.broken:
        facts["not readable"] = f"{len(evaluation.broken):,} images (metrics.json names them)"
    rows = [f"<tr><th>{escape(key)}<td>{escape(str(value))}" for key, value in facts.items()]
    for name, value in evaluation.metrics.summary().items():
        rows.append(f"<tr><th>{FIGURES[name]}<td>{percent(value)} %")
    confusions = [
        f"<tr><td>{escape(pair.truth)}<td>{escape(pair.predicted)}"
        f'<td class="number">{pair.pixels:,}<td class="number">{percent(pair.share)} %'
        for pair in evaluation.confusions
    ]
    heading = "<tr><th>pixels of<th>taken for<th>pixels<th>share of the class"
    return (
        f"<table>{''.join(rows)}</table>\n<p>Tables: <a href='metrics.md'>metrics.md</a>, "
        "<a href='classes.csv'>classes.csv</a>, <a href='photographs.csv'>photographs.csv</a></p>\n"
        f"<details><summary>Most frequent mistakes</summary><table>{heading}{''.join(confusions)}</table></details>"
    )


def _photograph(folder: Path, dataset: SegmentationDataset, predictor: BatchPredictor, result: Photograph) -> str:
    """Write one image's pictures and return its section."""
    image, truth = dataset[result.index]
    (labels,) = predictor.predict([predictor.prepare(result.name, image)])
    names = dataset.vocabulary.names
    image, truth, labels = _smaller(image, truth, labels)
    colours = palette(len(names))
    grey = np.repeat(image.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    wrong = np.where((truth >= 0) & (truth != labels), 0, -1)
    pictures = (
        image,
        blend(image, truth, colours),
        blend(image, labels, colours),
        blend(grey, wrong, np.array([_MISTAKE], dtype=np.uint8)),
    )
    figures = []
    for number, (kind, pixels) in enumerate(zip(_PICTURES, pictures, strict=True)):
        # The image's name may hold any character, so files are named by its number.
        path = f"pictures/{result.index:06d}-{number}.jpg"
        with atomic_path(folder / path) as temporary:
            Image.fromarray(pixels).save(temporary, quality=88)
        figures.append(
            f'<figure><img src="{path}" alt="{kind}" width="{pixels.shape[1]}" height="{pixels.shape[0]}" '
            f'loading="lazy"><figcaption>{kind}</figcaption></figure>'
        )
    figures_line = f"mIoU {percent(result.miou)} %, pixel accuracy {percent(result.pixel_accuracy)} %"
    return (
        f'<section><h3>{escape(result.name)} <span class="figures">{figures_line}</span></h3>\n'
        f'<div class="pictures">{"".join(figures)}</div>\n{_legend(names, colours, truth, labels)}</section>'
    )


def _legend(names: Sequence[str], colours: np.ndarray, truth: np.ndarray, labels: np.ndarray) -> str:
    """Return the classes of both maps as HTML, largest in the ground truth first; classes without truth are marked."""
    counts = np.bincount(truth[truth >= 0], minlength=len(names))
    predicted = np.bincount(labels[labels >= 0], minlength=len(names))
    entries = []
    for label in np.lexsort((-predicted, -counts)):
        if counts[label] or predicted[label]:
            colour = "#{:02x}{:02x}{:02x}".format(*colours[label])
            only = "" if counts[label] else ' <span class="figures">(not there)</span>'
            entries.append(f'<li><i style="background:{colour}"></i>{escape(names[label])}{only}</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _smaller(image: np.ndarray, *maps: np.ndarray) -> tuple[np.ndarray, ...]:
    """Resize to at most LONG_SIDE pixels a side: the image resampled, the label maps by nearest pixels."""
    height, width = image.shape[:2]
    scale = min(1.0, LONG_SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.intp) for new, old in zip(size, (height, width), strict=True)
    )
    picture = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR, reducing_gap=3.0))
    return picture, *(labels[rows[:, None], columns] for labels in maps)
