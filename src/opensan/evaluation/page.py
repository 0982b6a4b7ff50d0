"""Write an evaluation as one HTML file: bars of the classes and the confusions, then the worst and the best images.

The pictures are in the file itself; it has no scripts and loads nothing, so it can be sent to somebody as it is.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from opensan.data.dataset import SegmentationDataset
from opensan.evaluation.evaluation import ConfusedImage, Evaluation, ImageMetrics
from opensan.evaluation.metrics import ClassMetrics
from opensan.evaluation.predictors import BatchPredictor
from opensan.evaluation.report import FIGURES, calibrated_on, percent, picture
from opensan.files import write_text
from opensan.outputs.colours import palette
from opensan.outputs.drawing import blend, jpeg_url, mistakes

SHOWN = 8
"""Images of each kind, best and worst."""

CONFUSIONS = 5
"""Confusions whose images are named and shown."""

BEHIND = 3
"""Images of each of these."""

BARS = 30
"""Classes that are shown at once; the others are folded away."""

LONG_SIDE = 480
"""Longest side of the pictures, in pixels."""

_PICTURES = ("image", "ground truth", "prediction", "mistakes, as predicted")

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.45 system-ui, sans-serif; color: #202020; background: #fff; margin: 2rem auto; max-width: 1700px;
  padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem }
h3 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere }
.about { color: #595959; margin: 0; overflow-wrap: anywhere }
.totals { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 0; padding: 0; list-style: none }
.totals li { border: 1px solid #d8d8d8; border-radius: 8px; padding: .5rem 1rem }
.totals b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums }
.summary { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: 0 3rem }
table { border-collapse: collapse; width: 100% }
th { font-weight: 600; text-align: left } td, th { padding: .2rem .8rem .2rem 0; overflow-wrap: break-word }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.label { display: flex; align-items: baseline }
td.bar { width: 32%; min-width: 5rem } td.bar div { height: .9em; background: #efefef }
td.bar i { display: block; height: 100% }
.swatch { flex: none; width: .8em; height: .8em; margin-right: .5em; border: 1px solid #404040 }
summary { padding: .4rem 0; cursor: pointer }
section { border-top: 1px solid #d8d8d8; padding: 1rem 0 }
.pictures { display: grid; grid-template-columns: repeat(4, 1fr); gap: .6rem }
figure { margin: 0 } figure img { width: 100%; height: auto; display: block } figcaption { color: #595959 }
.legend { margin: .5rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none }
.figures { color: #595959; font-weight: normal }
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
    """Write `folder`/index.html, predicting the shown images once more. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    names = dataset.vocabulary.names
    colours = palette(len(names))
    parts = [_head(evaluation, title, about), '<div class="summary">', _bars(evaluation, colours)]
    parts += [_confusions(evaluation, dict(zip(names, colours, strict=True))), "</div>", _confidence(evaluation)]
    parts.append(_behind(evaluation, dict(zip(names, colours, strict=True))))
    best, worst = best_and_worst(evaluation.of_images)
    shown = {image.index for image in (*best, *worst)}
    linked = {image.index for images in evaluation.behind[:CONFUSIONS] for image in images[:BEHIND]} - shown
    others = [image for image in evaluation.of_images if image.index in linked]
    for heading, chosen in (
        ("Worst images", worst),
        ("Best images", best),
        ("Other images behind the worst confusions", others),
    ):
        if chosen:
            parts.append(f"<h2>{heading}</h2>")
            parts += [_image(dataset, predictor, image, colours) for image in chosen]
    body = "\n".join(parts)
    write_text(
        folder / "index.html",
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n<main>\n{body}\n</main>\n</html>\n",
    )
    return folder / "index.html"


def best_and_worst(images: Sequence[ImageMetrics]) -> tuple[list[ImageMetrics], list[ImageMetrics]]:
    """Return the images with the highest and with the lowest mIoU, extremes first; none is in both."""
    ranked = sorted((image for image in images if not math.isnan(image.miou)), key=lambda it: (it.miou, it.index))
    count = min(SHOWN, len(ranked) // 2)
    return ranked[::-1][: min(SHOWN, len(ranked) - count)], ranked[:count]


def _head(evaluation: Evaluation, title: str, about: Mapping[str, str]) -> str:
    """Return the title, facts about the evaluation, and the metrics over all classes."""
    facts = {**about, "images": f"{evaluation.images:,}"}
    if evaluation.broken:
        facts["not readable"] = f"{len(evaluation.broken):,} images (metrics.json names them)"
    lines = "<br>".join(f"{escape(key)}: {escape(str(value))}" for key, value in facts.items())
    totals = "".join(
        f"<li><b>{percent(value)} %</b>{escape(FIGURES[name])}</li>"
        for name, value in evaluation.metrics.summary().items()
    )
    return f'<h1>{escape(title)}</h1>\n<p class="about">{lines}</p>\n<ul class="totals">{totals}</ul>'


def _bars(evaluation: Evaluation, colours: np.ndarray) -> str:
    """Return the classes that occur, with a bar of the IoU's length, highest first; most of many are folded away."""
    classes = evaluation.metrics.classes
    pixels = max(sum(figures.pixels for figures in classes), 1)
    occurring = [(figures, colours[index]) for index, figures in enumerate(classes) if not math.isnan(figures.iou)]
    occurring.sort(key=lambda pair: -pair[0].iou)
    rows = [_class_row(figures, colour, figures.pixels / pixels) for figures, colour in occurring]
    parts = ["<div><h2>Classes by IoU</h2>", _class_table(rows[:BARS])]
    if rows[BARS:]:
        parts.append(f"<details><summary>{len(rows) - BARS} more</summary>{_class_table(rows[BARS:])}</details>")
    if absent := len(classes) - len(rows):
        parts.append(f'<p class="figures">{absent:,} classes neither occur nor are predicted.</p>')
    return "".join([*parts, "</div>"])


def _class_table(rows: Sequence[str]) -> str:
    columns = '<th>class<th>IoU<th class="number"><th class="number">accuracy<th class="number">share of pixels'
    return f"<table><tr>{columns}{''.join(rows)}</table>"


def _class_row(figures: ClassMetrics, colour: np.ndarray, share: float) -> str:
    return (
        f"<tr><td>{_label(figures.name, colour)}{_bar(figures.iou, colour)}"
        f'<td class="number">{percent(figures.iou)} %<td class="number">{percent(figures.accuracy)} %'
        f'<td class="number">{percent(share)} %'
    )


def _confusions(evaluation: Evaluation, colours: Mapping[str, np.ndarray]) -> str:
    """Return the most frequent confusions, with a bar of each one's share of the true class."""
    rows = [
        f"<tr><td>{_label(pair.truth, colours[pair.truth])}<td>{_label(pair.predicted, colours.get(pair.predicted))}"
        f"{_bar(pair.share, colours.get(pair.predicted))}"
        f'<td class="number">{percent(pair.share)} %<td class="number">{pair.pixels:,}'
        for pair in evaluation.confusions
    ]
    if not rows:
        return "<div><h2>Confusions</h2><p>None: every labelled pixel is right.</p></div>"
    columns = '<th>pixels of<th>taken for<th>share of the class<th class="number"><th class="number">pixels'
    return f"<div><h2>Confusions by pixels</h2><table><tr>{columns}{''.join(rows)}</table></div>"


def _behind(evaluation: Evaluation, colours: Mapping[str, np.ndarray]) -> str:
    """Return links to the images with the most pixels of the worst confusions."""
    rows = [
        f"<tr><td>{_label(pair.truth, colours[pair.truth])}<td>{_label(pair.predicted, colours.get(pair.predicted))}"
        f"<td>{', '.join(map(_link, images[:BEHIND]))}"
        for pair, images in list(zip(evaluation.confusions, evaluation.behind, strict=False))[:CONFUSIONS]
    ]
    if not rows:
        return ""
    columns = "<th>pixels of<th>taken for<th>most of them in"
    return f"<h2>Images behind the worst confusions</h2><table><tr>{columns}{''.join(rows)}</table>"


def _link(image: ConfusedImage) -> str:
    return f'<a href="#image-{image.index}">{escape(image.name)}</a> ({image.pixels:,} pixels)'


def _confidence(evaluation: Evaluation) -> str:
    """Return how far confidence can be trusted, with the picture; nothing if it was not measured."""
    confidence = evaluation.confidence
    if confidence is None:
        return ""
    drawn = picture(confidence)
    file = io.BytesIO()
    drawn.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
    told = (
        f"{calibrated_on(confidence)}: expected calibration error {percent(confidence.ece)} %, mean confidence "
        f"{percent(confidence.confidence)} % where {percent(confidence.accuracy)} % is right"
    )
    return (
        f'<h2>Confidence</h2><p class="about">{escape(told)}</p>'
        f'<img src="{url}" alt="reliability diagram" width="{drawn.width}" height="{drawn.height}">'
    )


def _bar(share: float, colour: np.ndarray | None) -> str:
    return f'<td class="bar"><div><i style="width:{100 * share:.2f}%;background:{_css(colour)}"></i></div>'


def _label(name: str, colour: np.ndarray | None, note: str = "") -> str:
    return f'<span class="label"><i class="swatch" style="background:{_css(colour)}"></i>{escape(name)}{note}</span>'


def _css(colour: np.ndarray | None) -> str:
    """Return a colour as CSS writes it; None is the dark one of pixels without a class."""
    return "#202020" if colour is None else f"#{bytes(colour).hex()}"


def _image(dataset: SegmentationDataset, predictor: BatchPredictor, result: ImageMetrics, colours: np.ndarray) -> str:
    """Return the section of an image, with its pictures."""
    image, truth = dataset[result.index]
    (labels,) = predictor.predict([predictor.prepare(result.name, image)])
    image, truth, labels = _smaller(image, truth, labels)
    drawn = (
        image,
        blend(image, truth, colours),
        blend(image, labels, colours),
        mistakes(image, truth, labels, colours),
    )
    figures = "".join(
        f'<figure><img src="{jpeg_url(pixels)}" alt="{kind}" width="{pixels.shape[1]}" height="{pixels.shape[0]}">'
        f"<figcaption>{kind}</figcaption></figure>"
        for kind, pixels in zip(_PICTURES, drawn, strict=True)
    )
    line = f"mIoU {percent(result.miou)} %, pixel accuracy {percent(result.pixel_accuracy)} %"
    return (
        f'<section id="image-{result.index}"><h3>{escape(result.name)} <span class="figures">{line}</span></h3>\n'
        f'<div class="pictures">{figures}</div>\n{_legend(dataset.vocabulary.names, colours, truth, labels)}</section>'
    )


def _legend(names: Sequence[str], colours: np.ndarray, truth: np.ndarray, labels: np.ndarray) -> str:
    """Return the classes of both maps as HTML, largest in the ground truth first; classes without truth are marked."""
    counts = np.bincount(truth[truth >= 0], minlength=len(names))
    predicted = np.bincount(labels[labels >= 0], minlength=len(names))
    entries = []
    for label in np.lexsort((-predicted, -counts)):
        if counts[label] or predicted[label]:
            only = "" if counts[label] else ' <span class="figures">&nbsp;(predicted only)</span>'
            entries.append(f"<li>{_label(names[label], colours[label], only)}</li>")
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
