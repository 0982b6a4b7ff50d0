"""Read pixel values of image files, both as stored and as viewers show them.

A file stores numbers; viewers show them by the file's own rules: through a palette, stretched from 1, 2 or 4 bits to 8,
or turned round (TIFF's "min is white"). Programs that make files smaller change the numbers and keep what is shown.
Letters: H W the image.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from opensan.errors import UserError

_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
_BITS, _PHOTOMETRIC = 258, 262
"""TIFF's tags: bits a sample, and the meaning of 0 (tag value 0: white)."""


@dataclass(frozen=True)
class Pixels:
    """The pixels of a file, as it stores them and as viewers show them."""

    stored: np.ndarray | None
    """[H, W] uint8 or uint16: the numbers in the file, of a palette its indices; None of a file with more channels."""
    shown: np.ndarray
    """[H, W] uint8 or uint16 grey (white is the largest number), or [H, W, 3] uint8 RGB."""
    how: str
    """How the file stores its pixels, for messages: "with 2 bits a pixel"."""

    @property
    def grey(self) -> np.ndarray | None:
        """Shown pixels as one channel [H, W]; None if there are colours."""
        if self.shown.ndim == 2:
            return self.shown
        channel = self.shown[..., 0]
        return channel if (self.shown == channel[..., None]).all() else None

    @property
    def colours(self) -> np.ndarray:
        """Shown pixels as RGB, [H, W, 3]."""
        return self.shown if self.shown.ndim == 3 else np.repeat(self.shown[..., None], 3, axis=2)

    @property
    def differs(self) -> bool:
        """Whether the file stores one grey value and shows another, so that it can be read in two ways."""
        grey = self.grey
        if self.stored is None or grey is None or grey is self.stored:
            return False
        return not np.array_equal(self.stored, grey)


def read_pixels(image: Image.Image) -> Pixels:
    """Read the pixels of an image that Pillow has opened and not loaded yet.

    Raises UserError, to be preceded by the file's name, on transparent pixels, on colours of 16 bits (of which Pillow
    reads only half), and on modes with no known meaning (CMYK, floating point). Pillow's own errors pass through.
    """
    rawmode = _rawmode(image)
    bits, inverted = _bits(rawmode), _is_inverted(image, rawmode)
    if image.mode in ("P", "PA"):
        stored = np.asarray(image if image.mode == "P" else image.getchannel("P"))
        return Pixels(stored, _through_palette(image, stored), "with a palette of greys")
    if image.mode in _DEEP_GREY:
        stored, shown = np.asarray(image).astype(np.uint16), deep_grey(image)
        return Pixels(stored, shown, _how(_tag(image, _BITS, 16), inverted))
    if image.mode in ("1", "L"):
        return _grey(np.asarray(image), bits, inverted)
    if image.mode not in ("RGB", "RGBA", "LA", "RGBX"):
        raise UserError(f"an image of mode {image.mode}; save it with one channel of 8 or 16 bits, or as RGB of 8 bits")
    if bits == 16:
        raise UserError("colours of 16 bits a channel; save it with one channel, or as RGB of 8 bits")
    if image.mode in ("RGBA", "LA") and np.asarray(image.getchannel("A")).min() < 255:
        raise UserError("has transparent pixels, whose meaning is not known; save it without transparency (alpha)")
    if image.mode == "LA":
        grey = np.asarray(image.getchannel("L"))
        return Pixels(grey, grey, "as grey")
    return Pixels(None, np.asarray(image.convert("RGB")), "as RGB")


def _grey(values: np.ndarray, bits: int, inverted: bool) -> Pixels:
    """Return the pixels of a one-channel file of up to 8 bits; Pillow has stretched and perhaps inverted its values."""
    shown = values.astype(np.uint8) * 255 if values.dtype == bool else values
    stored = 255 - shown if inverted else shown
    return Pixels(stored // (255 // (2**bits - 1)) if bits < 8 else stored, shown, _how(bits, inverted))


def _how(bits: int, inverted: bool) -> str:
    said = [f"with {bits} bit{'s' if bits > 1 else ''} a pixel"] if bits not in (8, 16) else []
    return " and ".join(said + (["with 0 as white (min-is-white)"] if inverted else [])) or "as grey"


def deep_grey(image: Image.Image) -> np.ndarray:
    """Return the shown pixels of 12 or 16-bit grey, [H, W] uint16, white is 65,535. Pillow returns stored values."""
    shown = stretched(np.asarray(image), _tag(image, _BITS, 16))
    return np.iinfo(shown.dtype).max - shown if _tag(image, _PHOTOMETRIC, 1) == 0 else shown


def tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """Return the tags of an opened TIFF; of any other image, none."""
    return getattr(image, "tag_v2", {})


def _tag(image: Image.Image, tag: int, otherwise: int) -> int:
    """Return a TIFF tag that holds one number, or one for each channel."""
    value = tiff_tags(image).get(tag, otherwise)
    return value[0] if isinstance(value, tuple) else value


def stretched(values: np.ndarray, bits: int) -> np.ndarray:
    """Stretch grey of 1 to 16 bits to uint8 (up to 8 bits) or uint16, so that the largest value is white."""
    kind = np.uint8 if bits <= 8 else np.uint16
    white, largest = int(np.iinfo(kind).max), 2**bits - 1
    return ((values.astype(np.uint32) * white + largest // 2) // largest).astype(kind)


def _through_palette(image: Image.Image, indices: np.ndarray) -> np.ndarray:
    """Return the colours of indices [H, W], [H, W, 3] uint8; the indices themselves if the palette repeats a grey."""
    if image.mode == "PA":
        image = image.convert("P")
    colours = np.zeros((256, 3), dtype=np.uint8)
    entries = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)[:256]
    colours[: len(entries)] = entries
    used = colours[: int(indices.max(initial=0)) + 1]
    if (used == used[:, :1]).all() and len(np.unique(used[:, 0])) < len(used):
        return indices  # with one grey for several indices, the shown picture can't hold the labels
    return colours[indices]


def _rawmode(image: Image.Image) -> str:
    """Return how the file stores its pixels, as Pillow names it ("L;4"); empty if unknown."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3]
        first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        if isinstance(first, str):
            return first
    return ""


def _bits(rawmode: str) -> int:
    """Return the bits a channel."""
    if rawmode.partition(";")[0] == "1":
        return 1
    match = re.search(r";(\d+)", rawmode)
    return int(match[1]) if match else 8


def _is_inverted(image: Image.Image, rawmode: str) -> bool:
    """Return whether 0 is white. Pillow inverts such files of up to 8 bits, but not those of 12 and 16 bits."""
    if image.format == "TIFF":
        return _tag(image, _PHOTOMETRIC, 1) == 0
    return ";" in rawmode and "I" in rawmode.partition(";")[2] and image.mode in ("1", "L")


def one_reading(pixels: Pixels, name: str, read: Mapping[str, Callable[[], np.ndarray]], remedy: str) -> np.ndarray:
    """Return the labels of a file that can be read in one way or in several.

    `read` has for each way ("stored", "shown") a function that returns labels, or raises UserError if it does not fit
    the file. Raises UserError, one line that begins with `name` and ends with `remedy`, if no way fits, or if several
    do and give different labels.
    """
    fitting: list[np.ndarray] = []
    failed: list[UserError] = []
    for labels_of in read.values():
        try:
            fitting.append(labels_of())
        except UserError as error:
            failed.append(error)
    if not fitting:
        raise failed[0]
    if not all(np.array_equal(fitting[0], other) for other in fitting[1:]):
        grey = pixels.grey
        shown = "colours" if grey is None else ranges(np.unique(grey).tolist())
        assert pixels.stored is not None  # two readings disagree, so there are two
        raise UserError(
            f"{name}: stored {pixels.how}: its numbers ({ranges(np.unique(pixels.stored).tolist())}) and what viewers "
            f"show ({shown}) are different classes; {remedy}"
        )
    return fitting[0]


def ranges(values: Iterable[int]) -> str:
    """Format numbers as ranges: "0-10, 12"."""
    ranges: list[list[int]] = []
    for value in sorted(values):
        if ranges and ranges[-1][1] == value - 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    shown = [f"{first}-{last}" if first < last else f"{first}" for first, last in ranges]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")
