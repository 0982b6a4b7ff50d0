"""Draw line charts, for example of a training's losses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from opensan.outputs.colours import palette
from opensan.outputs.drawing import FAINT_COLOUR, TEXT_COLOUR
from opensan.outputs.fonts import font_for

WIDTH, HEIGHT = 560, 340
"""Size of one chart, in pixels."""

FINE = 2
"""Charts are drawn larger by this factor and then reduced, which smooths the lines."""

GRID_COLOUR = (225, 225, 225)
LETTERS = 13
SMOOTHED = 50
"""A longer series is drawn faintly, under its running mean over 1/50 of its length."""


@dataclass(frozen=True)
class Series:
    """A line: y over x, both of the same length; points that are not finite are left out."""

    x: Sequence[float]
    y: Sequence[float]

    def finite(self) -> "Series":
        """Return the series without points that are not finite."""
        pairs = [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
        return Series([x for x, _ in pairs], [y for _, y in pairs])

    def smoothed(self) -> "Series":
        """Return the mean of each point and its neighbours, 1/50 of the series."""
        reach = len(self.y) // (2 * SMOOTHED)
        parts = [self.y[max(0, i - reach) : i + reach + 1] for i in range(len(self.y))]
        return Series(self.x, [sum(part) / len(part) for part in parts])


def charts(pictures: Mapping[str, Mapping[str, Series]], columns: int = 2) -> Image.Image:
    """Draw charts by title in a grid, row by row; each holds series by name. A chart without points is left out."""
    drawn = []
    for title, series in pictures.items():
        finite = {name: line.finite() for name, line in series.items()}
        if with_points := {name: line for name, line in finite.items() if line.x}:
            drawn.append(_chart(title, with_points))
    columns = max(1, min(columns, len(drawn)))
    rows = max(1, math.ceil(len(drawn) / columns))
    canvas = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), "white")
    for index, picture in enumerate(drawn):
        canvas.paste(picture, (index % columns * WIDTH, index // columns * HEIGHT))
    return canvas


def _chart(title: str, series: Mapping[str, Series]) -> Image.Image:
    canvas = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), "white")
    draw = ImageDraw.Draw(canvas)
    letters = LETTERS * FINE
    left, top, right, bottom = (FINE * side for side in (64, 52, WIDTH - 24, HEIGHT - 36))
    draw.text((left, 14 * FINE), title, TEXT_COLOUR, font_for(title, letters + 2), anchor="lm")
    xs = [x for line in series.values() for x in line.x]
    ys = [y for line in series.values() for y in line.y]
    x_axis, y_axis = _Axis(min(xs), max(xs), left, right), _Axis(min(ys), max(ys), bottom, top)
    for value in y_axis.ticks():
        y = y_axis.place(value)
        draw.line((left, y, right, y), GRID_COLOUR, FINE)
        draw.text((left - 8 * FINE, y), _shown(value), FAINT_COLOUR, font_for("0", letters), anchor="rm")
    for value in x_axis.ticks():
        x = x_axis.place(value)
        draw.line((x, bottom, x, bottom + 4 * FINE), FAINT_COLOUR, FINE)
        draw.text((x, bottom + 14 * FINE), _shown(value), FAINT_COLOUR, font_for("0", letters), anchor="mm")
    draw.line((left, bottom, right, bottom), FAINT_COLOUR, FINE)
    next_left: float = left
    for (name, line), colour in zip(series.items(), palette(len(series)).tolist(), strict=True):
        _line(draw, line, x_axis, y_axis, tuple(colour))
        next_left = _name(draw, name, next_left, 36 * FINE, tuple(colour)) if len(series) > 1 else next_left
    return canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _line(draw: ImageDraw.ImageDraw, series: Series, x_axis: "_Axis", y_axis: "_Axis", colour: tuple) -> None:
    def points(line: Series) -> list[tuple[float, float]]:
        return [(x_axis.place(x), y_axis.place(y)) for x, y in zip(line.x, line.y, strict=True)]

    if len(series.x) == 1:
        [(x, y)] = points(series)
        draw.ellipse((x - 3 * FINE, y - 3 * FINE, x + 3 * FINE, y + 3 * FINE), colour)
        return
    if len(series.x) > SMOOTHED:
        faint = tuple((part + 3 * 255) // 4 for part in colour)
        draw.line(points(series), faint, FINE, joint="curve")
        series = series.smoothed()
    draw.line(points(series), colour, 2 * FINE, joint="curve")


def _name(draw: ImageDraw.ImageDraw, name: str, left: float, y: float, colour: tuple) -> float:
    """Draw a line's name with its colour; return where the next one may begin."""
    font = font_for(name, LETTERS * FINE)
    draw.line((left, y, left + 14 * FINE, y), colour, 3 * FINE)
    draw.text((left + 19 * FINE, y), name, TEXT_COLOUR, font, anchor="lm")
    return left + 19 * FINE + font.getlength(name) + 14 * FINE


@dataclass(frozen=True)
class _Axis:
    """A linear scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span > 0 else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return about five round values within the scale."""
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        magnitude = 10.0 ** math.floor(math.log10(span / 5))
        step = next(factor * magnitude for factor in (1, 2, 5, 10) if span / (factor * magnitude) <= 6)
        first = math.ceil(self.low / step - 1e-9)
        return [step * number for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _shown(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}" if abs(value) >= 1_000 else f"{value:.4g}"
