"""A folder of photographs with an index PNG each: `opensan data prepare folder`."""

import glob
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensan.data.prepare.own_labels import class_values, from_values, look_up, read_map
from opensan.data.prepare.own_photographs import (
    Found,
    evaluation_split,
    find_photographs,
    photographs,
    without,
)
from opensan.data.prepare.source import Reader, Source
from opensan.errors import UserError
from opensan.vocabulary import Vocabulary


def open_folder(folder: Path, *, ignored: str = "", unlabelled: str = "") -> Source:
    """images/, labels/ and classes.txt, with colours.txt if labels are RGB, and lists or sub-folders as splits."""
    classes = folder / "classes.txt"
    full = Vocabulary.from_file(classes)
    vocabulary, label_of_class = without(full, ignored, str(classes))
    values = class_values(dict(enumerate(label_of_class)), unlabelled)
    colours = _colours(folder / "colours.txt", dict(zip(full.names, label_of_class, strict=True)))
    found = find_photographs(folder, folder / "images")
    return Source(
        vocabulary=vocabulary,
        photographs=photographs(found, lambda one: _Labels(one, folder / "labels", values, colours)),
        evaluation_split=evaluation_split(split for one in found for split in one.splits),
    )


@dataclass(frozen=True)
class _Labels:
    """Reads the labels of one photograph."""

    photograph: Found
    folder: Path
    label_of_value: dict[int, int]
    label_of_colour: dict[int, int]

    def __call__(self) -> np.ndarray:
        path = self.folder / f"{self.photograph.place}.png"
        if not path.exists():
            others = sorted(other.name for other in path.parent.glob(f"{glob.escape(path.stem)}.*"))
            hint = (
                f"there is {others[0]}, but labels must be PNG"
                if others
                else "give it one, or leave it out of the lists"
            )
            raise UserError(f"{path}: missing; every photograph needs a label PNG of its name ({hint})")
        values = read_map(path, str(path), self.photograph.file)
        if not self.label_of_colour or values.ndim == 2:
            grey = values.ndim == 3 and bool((values == values[..., :1]).all())
            remedy = "; save one channel only" if grey else "; save those numbers, or list its colours in colours.txt"
            return from_values(values, self.label_of_value, str(path), remedy)

        def complaint(colour: int, pixels: int) -> str:
            rgb = f"{colour >> 16} {colour >> 8 & 255} {colour & 255}"
            return f"{path}: {pixels} pixels have the colour {rgb}, which is not in colours.txt"

        return look_up(values.astype(np.int32) @ [65_536, 256, 1], self.label_of_colour, complaint)


def _colours(path: Path, label_of_class: dict[str, int]) -> dict[int, int]:
    """The label of each colour (as 24 bits, red first) in lines of "R G B class"; empty without the file."""
    labels: dict[int, int] = {}
    if not path.exists():
        return labels
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a table of colours in UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        *rgb, name = line.split(maxsplit=3)
        if len(rgb) != 3 or not all(part.isdecimal() and int(part) < 256 for part in rgb):
            raise UserError(f"{path}: line {number}: {line.strip()[:60]!r} is not R G B CLASS, such as 128 64 128 road")
        name = name.strip()
        if name not in label_of_class:
            raise UserError(f"{path}: line {number}: classes.txt has no class {name!r}")
        red, green, blue = (int(part) for part in rgb)
        if labels.setdefault(red << 16 | green << 8 | blue, label_of_class[name]) != label_of_class[name]:
            raise UserError(f"{path}: line {number}: {' '.join(rgb)} is another class's colour already")
    return labels


READER = Reader(
    name="folder",
    description="photographs with an index PNG each",
    open=open_folder,
    options={
        "ignored": "classes whose pixels become unlabelled: NAME,NAME",
        "unlabelled": "pixel values that are no class, besides 255 (16-bit: 65535): VALUE,VALUE",
    },
    needs="images/, labels/NAME.png, classes.txt; SPLIT.txt lists, or sub-folders of images/ and labels/ as splits",
)
