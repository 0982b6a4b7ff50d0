"""Draw the explanation of a pixel: the proposals that decide, and where their attention was steered."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from opensan.outputs.drawing import FAINT_COLOUR, TEXT_COLOUR
from opensan.outputs.fonts import font_for, readable, shortened

CELL = 300
"""Width in pixels of each picture."""

LETTERS = 14

_CAPTION = 30
_CROSS = 6


@dataclass(frozen=True, eq=False)
class ExplainedRow:
    """The drawn parts of one proposal."""

    caption: str
    maps: Sequence[tuple[str, np.ndarray]]
    """(Title, [h, w] in [0, 1] over the whole image) of its mask, then of each head's steering."""


def explained_picture(
    image: np.ndarray | None, size: tuple[int, int], x: int, y: int, title: str, rows: Sequence[ExplainedRow]
) -> Image.Image:
    """Draw a row for each proposal: its maps in warm colours over the image in grey, the pixel marked by a cross.

    Args:
        image: [H, W, 3] uint8 RGB; None: plain grey.
        size: (H, W) of the image.
        x: column of the pixel.
        y: row of the pixel.
        title: text over all.
        rows: the proposals, most important first.
    """
    height, width = size
    cell = CELL, max(1, round(CELL * height / width))
    base = Image.new("RGB", cell, (128, 128, 128)) if image is None else Image.fromarray(image).resize(cell)
    columns = max((len(row.maps) for row in rows), default=1)
    row_height = cell[1] + 2 * _CAPTION + 6
    picture = Image.new("RGB", (columns * (CELL + 8) + 8, _CAPTION + max(1, len(rows)) * row_height), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    _write(draw, 8, title, TEXT_COLOUR, picture.width - 16, LETTERS + 2)
    place = (x + 0.5) * cell[0] / width, (y + 0.5) * cell[1] / height
    for number, row in enumerate(rows):
        top = _CAPTION + number * row_height
        _write(draw, top + 8, row.caption, TEXT_COLOUR, picture.width - 16)
        for column, (name, values) in enumerate(row.maps):
            left = 8 + column * (CELL + 8)
            _write(draw, top + 29, name, FAINT_COLOUR, CELL, left=left)
            picture.paste(_over(base, values), (left, top + 50))
            across, down = left + place[0], top + 50 + place[1]
            for colour, line in (((0, 0, 0), 3), ((255, 255, 255), 1)):
                draw.line((across - _CROSS, down, across + _CROSS, down), fill=colour, width=line)
                draw.line((across, down - _CROSS, across, down + _CROSS), fill=colour, width=line)
    return picture


def _write(
    draw: ImageDraw.ImageDraw,
    top: int,
    text: str,
    colour: tuple[int, int, int],
    width: int,
    letters: int = LETTERS,
    left: int = 8,
) -> None:
    """Write one line, shortened to `width` pixels."""
    text = shortened(readable(text), width, letters)
    draw.text((left, top), text, colour, font_for(text, letters))


def _over(base: Image.Image, values: np.ndarray) -> Image.Image:
    """Lay values [h, w] in [0, 1] over a picture in grey: untinted where they are 0, red at a half, yellow at 1."""
    grey = Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8)).resize(
        base.size, Image.Resampling.BILINEAR
    )
    share = np.asarray(grey, dtype=np.float32)[..., None] / 255
    pixels = 30 + 0.6 * np.asarray(base.convert("L").convert("RGB"), dtype=np.float32)
    colour = np.concatenate([np.full_like(share, 255), 40 + 200 * (2 * share - 1).clip(0, 1), 30 * share], axis=-1)
    opacity = 0.75 * (2 * share).clip(0, 1)
    return Image.fromarray((opacity * colour + (1 - opacity) * pixels).round().astype(np.uint8))
