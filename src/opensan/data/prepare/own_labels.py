"""Read users' label maps: check their size, turn them upright, look labels up, and combine masks."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError

from opensan.data.class_list import means_unlabelled
from opensan.errors import UserError, reason
from opensan.images.pixels import Pixels, one_reading, ranges, read_pixels
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
    """Return the function that turns a label map of `size` (height, width), called `name`, upright with its image.

    Labels of the upright image's size stay as they are. If EXIF turns the image by a quarter and the labels
    have the size of its stored pixels, they were drawn on these, and are turned with it. (Where the size can't tell,
    labels are assumed to belong to the image as viewers show it.) Raises UserError, one line, on any other size.
    """
    from opensan.images import stored_size  # only now: it imports torch

    (height, width), turn = stored_size(image)
    if size == ((width, height) if turn in _TURNS else (height, width)):
        return lambda labels: labels
    if turn is not None and size == (height, width):
        return _TURNS[turn]
    raise UserError(
        f"{name}: is {size[1]}x{size[0]}, its image {width}x{height} (width x height); "
        "labels need exactly the image's size"
    )


def read_map(
    file: Path | bytes,
    name: str,
    image: Path | bytes,
    formats: Sequence[str] = ("PNG",),
) -> Pixels:
    """Read a label or mask file (or its content), turned upright with `image`.

    Sizes are compared before anything is decoded. Raises ValueError, one line that begins with `name`, on a size that
    isn't the image's, and on anything but a file of `formats` whose pixels have a known meaning.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=tuple(formats)) as opened:
            turn = upright_as(image, (opened.height, opened.width), name)
            try:
                pixels = read_pixels(opened)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            stored = None if pixels.stored is None else turn(pixels.stored)
            return Pixels(stored, turn(pixels.shown), pixels.how)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a {' or '.join(formats)} file, or damaged at the start") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: can't be read ({reason(error)})") from None


def look_up(codes: np.ndarray, label_of_code: Mapping[int, int], complaint: Callable[[int, int], str]) -> np.ndarray:
    """Return the label of each pixel, [H, W] int32, from codes [H, W] of at most 24 bits.

    Raises ValueError with `complaint(code, its number of pixels)` if there is a code that has no label.
    """
    table = np.full(max(int(codes.max()), *label_of_code) + 1, _UNKNOWN, dtype=np.int32)
    table[list(label_of_code.keys())] = list(label_of_code.values())
    labels = table[codes]
    unknown = codes[labels == _UNKNOWN]
    if len(unknown):
        worst = int(unknown.max())
        raise UnknownValue(complaint(worst, int((unknown == worst).sum())), worst)
    return labels


class UnknownValue(UserError):
    """Raised if a label file holds a value that is not a class."""

    def __init__(self, message: str, value: int) -> None:
        super().__init__(message)
        self.unknown_value = value

    def __reduce__(self) -> tuple:  # it is sent between processes
        return UnknownValue, (str(self), self.unknown_value)


PIXELS_REMEDY = (
    "say pixels=shown if a program that makes files smaller wrote it so, pixels=stored if its numbers are the classes"
)


@dataclass(frozen=True)
class Values:
    """The label of each value in label files."""

    label_of_value: Mapping[int, int]
    one_past: int | None = None
    """The value after the last class, where classes are numbered without gaps."""
    pixels: str = ""
    """Use values as files store them ("stored") or as viewers show them ("shown"); empty: the one that fits."""

    def labels(self, pixels: Pixels, name: str, rgb_remedy: str = "") -> np.ndarray:
        """Return the labels [H, W] int32 of an index map; 255 (of 16 bits: 65535) is unlabelled.

        Raises ValueError, one line that begins with `name`, on a value that is no class, on a map that holds no values,
        and on one that can be read in two ways.
        """
        return one_reading(pixels, name, self.readings(pixels, name, rgb_remedy), PIXELS_REMEDY)

    def readings(self, pixels: Pixels, name: str, rgb_remedy: str = "") -> dict[str, Callable[[], np.ndarray]]:
        """Return the ways to read an index map, for `one_reading`."""
        grey = pixels.grey
        if pixels.stored is None and grey is None:
            problem = f"{name}: an RGB picture, not an index map with a class's number in each pixel{rgb_remedy}"
            return {"shown": partial(_refuse, problem)}
        ways: dict[str, Callable[[], np.ndarray]] = {}
        if pixels.stored is not None and self.pixels != "shown":
            ways["stored"] = partial(self._look_up, pixels.stored, name)
        if grey is not None and self.pixels != "stored" and (pixels.stored is None or pixels.differs or not ways):
            ways["shown"] = partial(self._look_up, grey, name)
        return ways or {"shown": partial(_refuse, f"{name}: shows colours, so pixels=shown can't be its classes")}

    def _look_up(self, values: np.ndarray, name: str) -> np.ndarray:
        ignore = int(np.iinfo(values.dtype).max)
        unlabelled = {ignore: UNLABELLED} if means_unlabelled(ignore, self.label_of_value) else {}

        def complaint(value: int, count: int) -> str:
            known = ranges([value for value in self.label_of_value if value != ignore])
            remedy = f"if it is no class, say unlabelled={value}; if it is one, the list of classes lacks it"
            if value == self.one_past:
                remedy = "if labels count from 1, say first=1"
            return (
                f"{name}: {count} pixels hold the value {value}; classes are {known}, {ignore} is unlabelled ({remedy})"
            )

        return look_up(values, {**self.label_of_value, **unlabelled}, complaint)

    @property
    def first_alone(self) -> str:
        """Message if all labelled pixels are of the first of one or two classes, and others are unlabelled."""
        if self.one_past not in (1, 2) or self.label_of_value.get(0) != 0:
            return ""
        return (
            "its label files hold the values 0, the first class, and 255, which is unlabelled; masks of two values "
            'often mean a class by 255: if so, number the classes in their list ("255: NAME"); if not, say first=0'
        )

    @property
    def first_is_free(self) -> str:
        """Message if no pixel is of the first class."""
        if self.one_past is None or self.label_of_value.get(0) != 0:
            return ""
        return "no label file holds the value 0, the first class: if labels count from 1, say first=1"

    def judge(self, images_by_value: Mapping[int, int]) -> str | None:
        """Return the problem of a set whose label files hold values that are not classes (value -> number of files)."""
        last = max(images_by_value)
        if self.one_past is None or last != self.one_past:
            return None
        return (
            f"the value {last} is in {images_by_value[last]} of the label files, one more than the last of {last} "
            f"classes counted from 0, so values seem to count from 1: say first=1 if 1 is the first class (0 is then "
            f"unlabelled), or first=0 if 0 is it (those files are then left out)"
        )


def _refuse(problem: str) -> NoReturn:
    raise UserError(problem)


def numbers(text: str, option: str) -> list[int]:
    """Return the pixel values in an option such as "unlabelled=0,254"."""
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{option}={text}: must be pixel values between commas, such as 254") from None
    if wrong := [value for value in values if not 0 <= value <= 65_535]:
        raise UserError(f"{option}={text}: {wrong[0]} is no pixel value (0 to 65535)")
    return values


def class_values(labels: Mapping[int, int], *, first: str = "", unlabelled: str = "", pixels: str = "") -> Values:
    """Return the label of each pixel value: `labels` by value, changed by the options.

    Args:
        labels: the label of each value, as the list of classes numbers them.
        first: "1" moves values up, so that the first class is 1; smaller ones are unlabelled.
        unlabelled: values that are no class.
        pixels: "stored", "shown", or empty.

    Raises:
        ValueError: one line, on options that contradict the classes or are none.
    """
    if first not in ("", "0", "1"):
        raise UserError(f"first={first}: must be 0 or 1, the pixel value of the first class")
    if pixels not in ("", "stored", "shown"):
        raise UserError(f"pixels={pixels}: must be stored (as the files have them) or shown (as viewers show them)")
    from_zero = sorted(labels) == list(range(len(labels)))
    if first == "1" and not from_zero:
        raise UserError("first=1: the list of classes numbers them itself")
    values = {value + (first == "1"): label for value, label in labels.items()}
    extra = numbers(unlabelled, "unlabelled")
    if taken := [value for value in extra if value in values]:
        raise UserError(f"unlabelled={unlabelled}: {taken[0]} is a class; to leave a class out, say ignored=NAME")
    if first == "1":
        extra.append(0)
    one_past = len(labels) if from_zero and not first and len(labels) not in extra else None
    return Values({**values, **dict.fromkeys(extra, UNLABELLED)}, one_past, pixels)


VALUE_OPTIONS = {
    "ignored": "classes whose pixels become unlabelled: NAME,NAME",
    "unlabelled": "pixel values that are no class, besides 255 (16-bit: 65535): VALUE,VALUE",
    "first": "1 if labels count from 1: 1 is the first class, and 0 unlabelled",
    "pixels": "stored or shown: for files whose numbers are not what viewers show (palettes of greys, 1 to 4 bits)",
}
"""Options of readers with index maps."""


class Layers:
    """Combines masks to labels: where they overlap, the smaller mask is on top (of two equal ones the later)."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.labels = np.full(size, UNLABELLED, dtype=np.int32)
        """[H, W], -1 where no mask is."""
        self.objects = np.zeros(size, dtype=np.int32)
        """[H, W]: the number of each pixel's mask with a label, in the order they were added, from 1; 0 for none."""
        self._count = 0
        self._area = np.full(size, np.iinfo(np.int64).max)

    def add(self, mask: np.ndarray, label: int) -> None:
        """Add `mask` [H, W] bool."""
        area = np.count_nonzero(mask)
        seen = mask & (area <= self._area)
        self.labels[seen] = label
        self._count += label >= 0
        self.objects[seen] = self._count if label >= 0 else 0
        self._area[seen] = area
