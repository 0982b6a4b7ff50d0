"""Draw label maps for people: colours and names over the image, and a legend beside it that never covers it."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from opensan.outputs.colours import palette, rgb
from opensan.outputs.fonts import font_for, readable, shortened, text_width
from opensan.outputs.regions import CROWD_REACH, name_places, without_crowds

OPACITY = 0.6
"""Opacity of the colours over the image."""

OUTLINE_BRIGHTNESS = 0.35
"""Brightness of the pixels on the outline between two regions."""

NAME_LETTERS = 0.022
"""Height of the names' letters, of the root of the picture's area."""

MOST_NAMES = 30
"""Names on a picture."""

NO_IMAGE = 160
"""The grey in place of an image that was not kept."""

TEXT_COLOUR = (32, 32, 32)
FAINT_COLOUR = (120, 120, 120)

_STRIP_PIXELS = 1 << 20
"""The image is coloured in strips of about this many pixels, to keep temporary arrays of huge images small."""


def overlay(
    image: np.ndarray | None,
    labels: np.ndarray,
    names: Sequence[str],
    areas: Mapping[str, float],
    colours: np.ndarray | None = None,
) -> Image.Image:
    """Draw the image under its regions' colours and names, with a legend below it or, beside narrow ones, to the right.

    Args:
        image: [H, W, 3] uint8 RGB, or None for plain grey.
        labels: [H, W] int, index into `names`; negative where unlabelled, and the image shows untinted there.
        names: K words.
        areas: each word's share of the pixels, in [0, 1].
        colours: [K, 3] uint8 RGB; None for the colours of `palette`.

    Returns:
        An RGB image whose top left H x W pixels are the input's. The legend lists the words that occur, largest
        first, and unlabelled pixels last; words that do not fit are counted in a line of their own.
    """
    if image is None:
        image = np.broadcast_to(np.uint8(NO_IMAGE), (*labels.shape, 3))
    assert image.shape == (*labels.shape, 3) and image.dtype == np.uint8, (image.shape, image.dtype, labels.shape)
    colours = palette(len(names)) if colours is None else colours
    entries = [
        Entry(name, format_share(areas[name]), rgb(colours[i]), areas[name])
        for i, name in enumerate(names)
        if areas[name] > 0
    ]
    entries.sort(key=lambda entry: -entry.area)
    unlabelled = float((labels < 0).mean())
    rest = [Entry("unlabelled", format_share(unlabelled), None, unlabelled)] if unlabelled > 0 else []
    picture = Image.fromarray(blend(image, labels, colours))
    write_names(picture, labels, names, colours)
    return with_legend(picture, entries, rest)


def muted(image: np.ndarray) -> np.ndarray:
    """Return the image as [H, W] uint8: light grey of little contrast, over which colours stay what they are."""
    red, green, blue = (image[..., channel].astype(np.uint16) for channel in range(3))
    return _MUTED[(77 * red + 150 * green + 29 * blue) >> 8]


_MUTED = (0.61 * np.arange(256) + 95).astype(np.uint8)


def write_names(picture: Image.Image, labels: np.ndarray, names: Sequence[str], colours: np.ndarray) -> None:
    """Write the names of large regions onto them, largest first, none over another; changes the picture."""
    draw = ImageDraw.Draw(picture)
    letters = min(max(12, round(NAME_LETTERS * math.sqrt(picture.width * picture.height))), 120)
    taken: list[tuple[float, float, float, float]] = []
    for position in name_places(labels):
        name = readable(names[position.label])
        half, up = text_width(name, letters) / 2 + 0.5 * letters, 0.75 * letters
        if len(taken) == MOST_NAMES or position.radius < up or half > 2.5 * position.radius:
            continue
        x, y = _within(position.x, half, picture.width), _within(position.y, up, picture.height)
        box = (x - half, y - up, x + half, y + up)
        if any(box[0] < b[2] and box[2] > b[0] and box[1] < b[3] and box[3] > b[1] for b in taken):
            continue
        taken.append(box)
        colour = rgb(colours[position.label])
        draw.rounded_rectangle(box, 0.35 * letters, fill=colour, outline=TEXT_COLOUR)
        draw.text((x, y), name, _ink(colour), font_for(name, letters), anchor="mm")


def _within(middle: float, half: float, end: float) -> float:
    """Return the middle of something of twice the length `half` that stays between 0 and `end`, near `middle`."""
    return max(half, min(end - half, middle))


def _ink(colour: tuple[int, int, int]) -> str:
    """Return black or white, whichever is easier to read on `colour`: WCAG's contrast is at least 4.5."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return "black" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 else "white"


def blend(image: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Blend colours [K, 3] over the muted image, with thin outlines between regions; [H, W, 3] uint8.

    Unlabelled pixels, which are negative, show the image as it is.
    """
    weight = round(OPACITY * 256)
    add = np.zeros((len(colours) + 1, 3), dtype=np.uint16)  # unlabelled pixels index row -1
    add[:-1] = colours.astype(np.uint16) * weight
    height, width = labels.shape
    thickness = max(1, round(math.sqrt(height * width) / 700))
    blended = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = labels[top:bottom]
        mixed = (muted(image[top:bottom]) * np.uint16(256 - weight))[..., None] + add[strip] >> 8
        bare = strip < 0
        mixed[bare] = image[top:bottom][bare]
        # Outlines reach into this strip from the rows above, and are counted in the rows on both sides.
        first, last = max(0, top - thickness - CROWD_REACH), min(height, bottom + CROWD_REACH)
        outline = without_crowds(_outlines(labels[first:last], thickness))[top - first : bottom - first]
        mixed[outline] = (mixed[outline] * OUTLINE_BRIGHTNESS).astype(np.uint16)
        blended[top:bottom] = mixed
    return blended


def jpeg_url(pixels: np.ndarray) -> str:
    """Return a picture [H, W, 3] uint8 as a URL that holds it, as JPEG, for a page of one file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def mistakes(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Draw wrong pixels in the colours of their predictions over the pale image, [H, W, 3] uint8.

    Pixels without ground truth (negative) are not wrong; wrong pixels without a prediction are dark.
    """
    wrong = (truth >= 0) & (truth != predicted)
    labels = np.where(wrong, np.where(predicted < 0, len(colours), predicted), -1)
    pale = np.repeat(muted(image)[..., None], 3, axis=2)
    return blend(pale, labels, np.concatenate([colours, [TEXT_COLOUR]]).astype(np.uint8))


def _outlines(labels: np.ndarray, thickness: int) -> np.ndarray:
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
