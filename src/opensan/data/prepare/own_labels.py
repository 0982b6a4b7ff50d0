"""Label maps as people have them: read, held against their photograph, put upright, laid over one another."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from opensan.errors import UserError
from opensan.vocabulary import UNLABELLED

_UNKNOWN = -2
_TURNS = {
    Image.Transpose.TRANSPOSE: lambda labels: labels.swapaxes(0, 1),
    Image.Transpose.ROTATE_90: lambda labels: np.rot90(labels),
    Image.Transpose.TRANSVERSE: lambda labels: np.rot90(labels, 2).swapaxes(0, 1),
    Image.Transpose.ROTATE_270: lambda labels: np.rot90(labels, -1),
}
"""The transpositions that swap height and width, for arrays [H, W, ...]."""


def upright_as(image: Path | bytes, size: tuple[int, int], name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What puts a label map of `size` (height, width), called `name`, upright as its photograph is shown.

    Labels of the upright photograph's size stay as they are. If EXIF turns the photograph by a quarter and the labels
    have the size of its stored pixels, they were drawn on these, and are turned with it. (Where the size can't tell,
    labels are taken to be of the photograph as viewers show it.) Raises ValueError, one line, on any other size.
    """
    from opensan.images import stored_size  # only now: it imports torch

    (height, width), turn = stored_size(image)
    if size == ((width, height) if turn in _TURNS else (height, width)):
        return lambda labels: labels
    if size == (height, width):
        return _TURNS[turn]
    raise UserError(
        f"{name}: is {size[1]}x{size[0]}, its photograph {width}x{height} (width x height); "
        "labels need exactly the photograph's size"
    )


def read_map(
    file: Path | bytes,
    name: str,
    image: Path | bytes,
    formats: Sequence[str] = ("PNG",),
    *,
    colours: bool = False,
) -> np.ndarray:
    """Pixels of a label or mask file (or its content), upright as its photograph `image`.

    [H, W] bool, uint8 or uint16, or [H, W, 3] uint8 RGB. Of a file with a palette the pixels are its indices, or, if
    `colours`, what they look like. Sizes are compared before anything is decoded. Raises ValueError, one line that
    begins with `name`, on a size that isn't the photograph's, and on anything but a file of `formats` with one or three
    channels.
    """
    from opensan.images import ImageError

    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats) as opened:
            if opened.mode not in ("1", "L", "P", "I;16", "RGB"):
                raise UserError(f"{name}: an image of mode {opened.mode}; save it with one channel of 8 or 16 bits")
            turn = upright_as(image, (opened.height, opened.width), name)
            return turn(np.asarray(opened.convert("RGB") if colours and opened.mode == "P" else opened))
    except ImageError:
        raise  # about the photograph
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a {' or '.join(formats)} file, or damaged at the start") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: can't be read ({' '.join(str(error).split())})") from None


def look_up(codes: np.ndarray, label_of_code: Mapping[int, int], complaint: Callable[[int, int], str]) -> np.ndarray:
    """The label of each pixel, [H, W] int32, from codes [H, W] of at most 24 bits.

    Raises ValueError with `complaint(code, its number of pixels)` if there is a code that has no label.
    """
    table = np.full(max(int(codes.max()), *label_of_code) + 1, _UNKNOWN, dtype=np.int32)
    table[list(label_of_code.keys())] = list(label_of_code.values())
    labels = table[codes]
    unknown = codes[labels == _UNKNOWN]
    if len(unknown):
        raise UserError(complaint(int(unknown[0]), int((unknown == unknown[0]).sum())))
    return labels


def from_values(values: np.ndarray, label_of_value: Mapping[int, int], name: str, rgb_remedy: str = "") -> np.ndarray:
    """The labels [H, W] int32 of an index map [H, W] as `read_map` gives it; 255 (16 bits: 65535) is unlabelled.

    Raises ValueError, one line that begins with `name`, on a value that is no class, and on a map that holds no values.
    """
    if values.ndim == 3:
        raise UserError(f"{name}: an RGB picture, not an index map with a class's number in each pixel{rgb_remedy}")
    if values.dtype == bool:
        raise UserError(f"{name}: has 1 bit a pixel, and white may be class 1 or 255 (unlabelled); save 8 bits")
    ignore = np.iinfo(values.dtype).max

    def complaint(value: int, pixels: int) -> str:
        known = _ranges([value for value in label_of_value if value != ignore])
        return (
            f"{name}: {pixels} pixels hold the value {value}; classes are {known}, {ignore} is unlabelled "
            f"(say unlabelled={value} if that is meant)"
        )

    return look_up(values, {**label_of_value, int(ignore): UNLABELLED}, complaint)


def _ranges(values: Iterable[int]) -> str:
    """ "0-10, 12" of these numbers."""
    ranges: list[list[int]] = []
    for value in sorted(values):
        if ranges and ranges[-1][1] == value - 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    shown = [f"{first}-{last}" if first < last else f"{first}" for first, last in ranges]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


def numbers(text: str, option: str) -> list[int]:
    """The pixel values in an option such as "unlabelled=0,254"."""
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{option}={text}: must be pixel values between commas, such as 254") from None
    if wrong := [value for value in values if not 0 <= value <= 65_535]:
        raise UserError(f"{option}={text}: {wrong[0]} is no pixel value (0 to 65535)")
    return values


def class_values(labels: Mapping[int, int], unlabelled: str) -> dict[int, int]:
    """The label of each pixel value: `labels`, and the values of the option `unlabelled`.

    Raises ValueError on a value that is a class.
    """
    extra = numbers(unlabelled, "unlabelled")
    if taken := [value for value in extra if value in labels]:
        raise UserError(f"unlabelled={unlabelled}: {taken[0]} is a class; to leave a class out, say ignored=NAME")
    return {**labels, **dict.fromkeys(extra, UNLABELLED)}


class Layers:
    """Masks laid over one another: where they overlap, the smaller one is on top (of two equal ones the later)."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.labels = np.full(size, UNLABELLED, dtype=np.int32)
        """[H, W], -1 where no mask is."""
        self._area = np.full(size, np.iinfo(np.int64).max)

    def add(self, mask: np.ndarray, label: int) -> None:
        """Lay down `mask` [H, W] bool."""
        area = np.count_nonzero(mask)
        seen = mask & (area <= self._area)
        self.labels[seen] = label
        self._area[seen] = area
