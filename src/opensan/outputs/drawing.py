"""Draw label maps for people: colours over the image, and a legend beside it that never covers it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from opensan.outputs.colours import palette, rgb
from opensan.outputs.fonts import font_for, readable, shortened, text_width

OPACITY = 0.55
"""Opacity of the colours over the image."""

BORDER_BRIGHTNESS = 0.35
"""Brightness of the pixels on the border between two regions."""

NO_PHOTOGRAPH = 160
"""The grey in place of an image that was not kept."""

TEXT_COLOUR = (32, 32, 32)
FAINT_COLOUR = (120, 120, 120)

_STRIP_PIXELS = 1 << 20
"""The image is coloured in strips of about this many pixels, to keep temporary arrays of huge images small."""


def overlay(
    image: np.ndarray | None, labels: np.ndarray, names: Sequence[str], areas: Mapping[str, float]
) -> Image.Image:
    """Draw the image under its regions' colours, with a legend below it or, for narrow and upright ones, to the right.

    Args:
        image: [H, W, 3] uint8 RGB, or None for plain grey.
        labels: [H, W] int, index into `names`; negative where unlabelled, and the image shows untinted there.
        names: K words.
        areas: each word's share of the pixels, in [0, 1].

    Returns:
        An RGB image whose top left H x W pixels are the input's. The legend lists the words that occur, largest
        first, and unlabelled pixels last; words that do not fit are counted in a line of their own.
    """
    if image is None:
        image = np.broadcast_to(np.uint8(NO_PHOTOGRAPH), (*labels.shape, 3))
    assert image.shape == (*labels.shape, 3) and image.dtype == np.uint8, (image.shape, image.dtype, labels.shape)
    colours = palette(len(names))
    entries = [
        Entry(name, format_share(areas[name]), rgb(colours[i]), areas[name])
        for i, name in enumerate(names)
        if areas[name] > 0
    ]
    entries.sort(key=lambda entry: -entry.area)
    unlabelled = float((labels < 0).mean())
    rest = [Entry("unlabelled", format_share(unlabelled), None, unlabelled)] if unlabelled > 0 else []
    return with_legend(Image.fromarray(blend(image, labels, colours)), entries, rest)


def blend(image: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Blend colours [K, 3] over the image, with thin dark borders between regions; [H, W, 3] uint8."""
    # Unlabelled pixels index row -1, which leaves the image as it is.
    weight = round(OPACITY * 256)
    keep = np.full(len(colours) + 1, 256 - weight, dtype=np.uint16)
    keep[-1] = 256
    add = np.zeros((len(colours) + 1, 3), dtype=np.uint16)
    add[:-1] = colours.astype(np.uint16) * weight
    height, width = labels.shape
    thickness = max(1, round(math.sqrt(height * width) / 700))
    blended = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = labels[top:bottom]
        mixed = (image[top:bottom] * keep[strip][..., None] + add[strip]) >> 8
        first = max(0, top - thickness)  # a border in the rows above reaches into this strip
        border = _borders(labels[first:bottom], thickness)[top - first :]
        mixed[border] = (mixed[border] * BORDER_BRIGHTNESS).astype(np.uint16)
        blended[top:bottom] = mixed
    return blended


def _borders(labels: np.ndarray, thickness: int) -> np.ndarray:
    """Return bool [H, W]: the `thickness` pixels to the right of and below every change of label."""
    across = np.zeros(labels.shape, dtype=bool)
    down = np.zeros(labels.shape, dtype=bool)
    across[:, 1:] = labels[:, 1:] != labels[:, :-1]
    down[1:] = labels[1:] != labels[:-1]
    border = across | down
    for shift in range(1, thickness):
        border[:, shift:] |= across[:, :-shift]
        border[shift:] |= down[:-shift]
    return border


def format_share(share: float) -> str:
    """Format a share in [0, 1] for people: "12.3 %", "< 0.1 %"."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


@dataclass(frozen=True)
class Entry:
    """A line of the legend."""

    name: str
    share: str
    colour: tuple[int, int, int] | None
    """None for an entry without a colour: an outline is drawn."""
    area: float
    swatch: bool = True


@dataclass(frozen=True)
class _Layout:
    """The legend's measures, in pixels; all depend on the size of its letters."""

    letters: int
    name_width: int
    share_width: int

    @property
    def row(self) -> int:
        return round(1.65 * self.letters)

    @property
    def margin(self) -> int:
        """Space around the legend."""
        return round(1.2 * self.letters)

    @property
    def between(self) -> int:
        """Space between two columns: clearly more than between a name and its share."""
        return round(2.2 * self.letters)

    @property
    def gap(self) -> int:
        return round(0.6 * self.letters)

    @property
    def column(self) -> int:
        """Width of swatch, name and share."""
        return self.letters + self.name_width + self.share_width + 2 * self.gap

    def columns_in(self, width: int) -> int:
        """Return how many columns fit into `width`, margins counted; at least one."""
        return max(1, (width - 2 * self.margin + self.between) // (self.column + self.between))

    def width_of(self, columns: int) -> int:
        return columns * (self.column + self.between) - self.between + 2 * self.margin

    def rows_in(self, height: int) -> int:
        return (height - 2 * self.margin) // self.row

    def height_of(self, rows: int) -> int:
        return rows * self.row + 2 * self.margin


@dataclass(frozen=True)
class Legend:
    """A legend's position beside a picture: below it or, beside narrow and upright ones, to the right."""

    canvas: tuple[int, int]
    """(width, height) of picture and legend together."""
    corner: tuple[int, int]
    rows: int
    columns: int
    layout: _Layout

    @classmethod
    def beside(cls, size: tuple[int, int], names: Sequence[str], shares: Sequence[str], entries: int) -> "Legend":
        """Choose room for so many `entries`, or for as many as look good, beside a picture of `size` (width, height).

        `names` and `shares` are the texts that may stand in it.
        """
        width, height = size
        letters = min(max(13, round(0.016 * math.sqrt(width * height))), 120)
        widest = math.ceil(max(text_width(name, letters) for name in names))
        share_width = math.ceil(max(text_width(share, letters) for share in shares))
        layout = _Layout(letters, min(max(widest, 7 * letters), 16 * letters), share_width)
        if height > width or width < layout.width_of(2):
            most_rows = max(12, layout.rows_in(height))
            columns = min(math.ceil(entries / most_rows), layout.columns_in(round(0.8 * width)))
            rows = min(math.ceil(entries / columns), most_rows)
            canvas = (width + layout.width_of(columns), max(height, layout.height_of(rows)))
            return cls(canvas, (width, 0), rows, columns, layout)
        columns = min(layout.columns_in(width), entries)
        rows = min(math.ceil(entries / columns), max(5, layout.rows_in(height)))
        return cls((width, height + layout.height_of(rows)), (0, height), rows, columns, layout)

    def draw(self, picture: Image.Image, words: list[Entry], rest: list[Entry]) -> Image.Image:
        """Draw the picture with a legend of `rest` and as many of `words` as fit."""
        canvas = Image.new("RGB", self.canvas, "white")
        canvas.paste(picture, (0, 0))
        entries = _that_fit(words, self.rows * self.columns - len(rest)) + rest
        _draw_entries(ImageDraw.Draw(canvas), entries, self.corner, self.rows, self.layout)
        return canvas


def with_legend(picture: Image.Image, words: list[Entry], rest: list[Entry]) -> Image.Image:
    """Draw the picture with a legend of its own size and letters beside it."""
    words = [replace(entry, name=readable(entry.name)) for entry in words]
    entries = words + rest
    names, shares = [entry.name for entry in entries], [entry.share for entry in entries]
    return Legend.beside(picture.size, names, shares, len(entries)).draw(picture, words, rest)


def _that_fit(entries: list[Entry], places: int) -> list[Entry]:
    """Return the entries that fit in `places` lines; the last line counts those left out, if any."""
    if len(entries) <= places:
        return entries
    rest = entries[places - 1 :]
    area = sum(entry.area for entry in rest)
    return [*entries[: places - 1], Entry(f"and {len(rest)} more", format_share(area), None, area, swatch=False)]


def _draw_entries(
    draw: ImageDraw.ImageDraw, entries: list[Entry], corner: tuple[int, int], rows: int, layout: _Layout
) -> None:
    """Draw entries column by column, with aligned shares."""
    for index, entry in enumerate(entries):
        column, row = divmod(index, rows)
        left = corner[0] + layout.margin + column * (layout.column + layout.between)
        top = corner[1] + layout.margin + row * layout.row
        middle = top + layout.row // 2
        box = (left, middle - layout.letters // 2, left + layout.letters, middle + (layout.letters + 1) // 2)
        if entry.swatch:
            draw.rectangle(box, fill=entry.colour, outline=FAINT_COLOUR if entry.colour is None else TEXT_COLOUR)
        name = shortened(entry.name, layout.name_width, layout.letters)
        text_left = left + layout.letters + layout.gap
        draw.text((text_left, middle), name, TEXT_COLOUR, font_for(name, layout.letters), anchor="lm")
        share_font = font_for(entry.share, layout.letters)
        draw.text((left + layout.column, middle), entry.share, FAINT_COLOUR, share_font, anchor="rm")
