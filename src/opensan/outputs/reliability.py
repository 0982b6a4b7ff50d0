"""Draw how far confidence can be trusted: a reliability diagram, and what thresholds keep."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from opensan.outputs.drawing import FAINT_COLOUR, TEXT_COLOUR
from opensan.outputs.fonts import font_for

Colour = tuple[int, int, int]

SIDE = 300
"""Width and height of each diagram, in pixels."""

FINE = 2
"""The picture is drawn larger by this factor and then reduced, which smooths the lines."""

LETTERS = 13
GRID_COLOUR = (225, 225, 225)
BAR_COLOUR = (86, 132, 196)
SHARE_COLOUR = (205, 205, 205)
GAP_COLOUR = (214, 96, 77)
LINE_COLOURS = ((120, 120, 120), (86, 132, 196), (214, 96, 77))

_MARGIN, _TOP, _BOTTOM = 56, 58, 50


class Bar(NamedTuple):
    """Pixels of similar confidence; all in [0, 1]."""

    low: float
    high: float
    share: float
    """Share of all pixels."""
    confidence: float
    """Mean confidence."""
    accuracy: float
    """Share of these pixels that are right."""


class Kept(NamedTuple):
    """Pixels that a threshold keeps; all in [0, 1]."""

    threshold: float
    labelled: float
    accuracy: float
    miou: float


def reliability_picture(title: str, bars: Sequence[Bar], kept: Sequence[Kept]) -> Image.Image:
    """Draw accuracy over confidence (left) and what each threshold keeps (right).

    Args:
        title: text over the left diagram.
        bars: bins with pixels.
        kept: thresholds at which pixels are left, ascending.
    """
    width, height = 2 * (SIDE + _MARGIN) + 24, SIDE + _TOP + _BOTTOM
    canvas = Image.new("RGB", (width * FINE, height * FINE), "white")
    draw = ImageDraw.Draw(canvas)
    left, right = _Frame(_MARGIN, _TOP), _Frame(2 * _MARGIN + SIDE, _TOP)
    left.grid(draw, title, "confidence")
    for bar in bars:
        left.box(draw, bar.low, 0, bar.high, bar.share, SHARE_COLOUR)
        left.box(draw, bar.low + 0.012, 0, bar.high - 0.012, bar.accuracy, BAR_COLOUR)
        left.line(draw, [(bar.low, bar.confidence), (bar.high, bar.confidence)], GAP_COLOUR, 3)
    left.line(draw, [(0, 0), (1, 1)], TEXT_COLOUR, 1)
    left.legend(
        draw,
        [("right", BAR_COLOUR), ("confidence", GAP_COLOUR), ("share of the pixels", SHARE_COLOUR)],
    )
    right.grid(draw, "what a threshold keeps", "threshold")
    names = ("labelled", "right of these", "mIoU of these")
    for column, colour in enumerate(LINE_COLOURS, 1):
        points = [(point.threshold, float(point[column])) for point in kept if point[column] == point[column]]
        right.line(draw, points, colour, 3)
    right.legend(draw, list(zip(names, LINE_COLOURS, strict=True)))
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


class _Frame:
    """A diagram of the unit square."""

    def __init__(self, left: int, top: int) -> None:
        self.left, self.top = left, top

    def place(self, x: float, y: float) -> tuple[float, float]:
        return (self.left + x * SIDE) * FINE, (self.top + (1 - y) * SIDE) * FINE

    def grid(self, draw: ImageDraw.ImageDraw, title: str, below: str) -> None:
        font = font_for("0", LETTERS * FINE)
        draw.text((self.left * FINE, 16 * FINE), title, TEXT_COLOUR, font_for(title, (LETTERS + 2) * FINE), anchor="lm")
        for step in range(6):
            value = step / 5
            draw.line((*self.place(0, value), *self.place(1, value)), GRID_COLOUR, FINE)
            x, y = self.place(0, value)
            draw.text((x - 8 * FINE, y), f"{100 * value:.0f} %", FAINT_COLOUR, font, anchor="rm")
            x, y = self.place(value, 0)
            draw.line((x, y, x, y + 4 * FINE), FAINT_COLOUR, FINE)
            draw.text((x, y + 14 * FINE), f"{value:.1f}", FAINT_COLOUR, font, anchor="mm")
        x, y = self.place(0.5, 0)
        draw.text((x, y + 34 * FINE), below, TEXT_COLOUR, font_for(below, LETTERS * FINE), anchor="mm")

    def box(
        self,
        draw: ImageDraw.ImageDraw,
        low: float,
        bottom: float,
        high: float,
        top: float,
        colour: tuple[int, int, int],
    ) -> None:
        if top > bottom:
            (x0, y0), (x1, y1) = self.place(low, top), self.place(high, bottom)
            draw.rectangle((x0, y0, x1, y1), fill=colour)

    def line(
        self, draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: Colour, width: int
    ) -> None:
        if len(points) > 1:
            draw.line([self.place(*point) for point in points], colour, width * FINE // 2, joint="curve")

    def legend(self, draw: ImageDraw.ImageDraw, entries: Sequence[tuple[str, Colour]]) -> None:
        x, y = self.left * FINE, 40 * FINE
        for name, colour in entries:
            font = font_for(name, LETTERS * FINE)
            draw.rectangle((x, y - 5 * FINE, x + 10 * FINE, y + 5 * FINE), fill=colour)
            draw.text((x + 15 * FINE, y), name, TEXT_COLOUR, font, anchor="lm")
            x += int(15 * FINE + font.getlength(name) + 14 * FINE)
