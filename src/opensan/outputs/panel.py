"""Draw images, ground truth, predictions and mistakes side by side, for validations in training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from opensan.outputs.colours import palette, rgb
from opensan.outputs.drawing import TEXT_COLOUR, Entry, blend, mistakes, with_legend
from opensan.outputs.fonts import font_for, readable, shortened

TITLES = ("image", "ground truth", "prediction", "mistakes")

TILE = 380
"""Largest width and height of an image in the panel, in pixels."""

GAP = 8
LETTERS = 15
LINE = 24


@dataclass(frozen=True)
class PanelRow:
    """One image with its ground truth and prediction."""

    name: str
    image: np.ndarray
    """[H, W, 3] uint8 RGB."""
    truth: np.ndarray
    """[H, W] int, index into the names; negative where unlabelled, and the image shows there."""
    predicted: np.ndarray
    """[H, W] int, as `truth`."""


def panel(rows: Sequence[PanelRow], names: Sequence[str]) -> Image.Image:
    """Draw one RGB picture: a row for each image, and a legend of the words that occur, most pixels first.

    Args:
        rows: at least one.
        names: K words, to which labels are indices.
    """
    colours = palette(len(names))
    tiles = [_tiles(row, colours) for row in rows]
    width = max(row[0].width for row in tiles)
    height = LINE + sum(row[0].height + LINE + GAP for row in tiles)
    canvas = Image.new("RGB", (len(TITLES) * (width + GAP) + GAP, height), "white")
    draw = ImageDraw.Draw(canvas)
    lefts = [GAP + column * (width + GAP) for column in range(len(TITLES))]
    for left, title in zip(lefts, TITLES, strict=True):
        draw.text((left, LINE // 2), title, TEXT_COLOUR, font_for(title, LETTERS), anchor="lm")
    top = LINE
    for row, pictures in zip(rows, tiles, strict=True):
        for left, picture in zip(lefts, pictures, strict=True):
            canvas.paste(picture, (left, top))
        top += pictures[0].height
        name = shortened(readable(row.name), width, LETTERS)
        draw.text((lefts[0], top + LINE // 2), name, TEXT_COLOUR, font_for(name, LETTERS), anchor="lm")
        top += LINE + GAP
    unlabelled = any((labels < 0).any() for row in rows for labels in (row.truth, row.predicted))
    rest = [Entry("unlabelled", "", None, 0.0)] if unlabelled else []
    return with_legend(canvas, _entries(rows, names, colours), rest)


def _tiles(row: PanelRow, colours: np.ndarray) -> list[Image.Image]:
    height, width = row.truth.shape
    factor = TILE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    image = Image.fromarray(row.image).resize(size, Image.Resampling.BICUBIC, reducing_gap=2)
    pixels = np.asarray(image)
    y = ((np.arange(size[1]) + 0.5) * height / size[1]).astype(int)[:, None]
    x = ((np.arange(size[0]) + 0.5) * width / size[0]).astype(int)
    truth, predicted = row.truth[y, x], row.predicted[y, x]
    drawn = (
        blend(pixels, truth, colours),
        blend(pixels, predicted, colours),
        mistakes(pixels, truth, predicted, colours),
    )
    return [image, *map(Image.fromarray, drawn)]


def _entries(rows: Sequence[PanelRow], names: Sequence[str], colours: np.ndarray) -> list[Entry]:
    areas = np.zeros(len(names))
    for row in rows:
        for labels in (row.truth, row.predicted):
            areas += np.bincount(labels[labels >= 0], minlength=len(names)) / labels.size
    order = [index for index in np.argsort(-areas, kind="stable") if areas[index] > 0]
    return [Entry(names[index], "", rgb(colours[index]), areas[index]) for index in order]
