"""Read a folder of images with an index PNG each: `opensan data prepare folder`."""

import glob
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from opensan.data.class_list import ClassList, read_class_list
from opensan.data.prepare.own_images import (
    FolderImage,
    background_notes,
    evaluation_split,
    find_images,
    source_images,
    unused_labels,
    without,
)
from opensan.data.prepare.own_labels import PIXELS_REMEDY, VALUE_OPTIONS, Values, class_values, look_up, read_map
from opensan.data.prepare.source import Reader, Source
from opensan.errors import UserError
from opensan.images.pixels import Pixels, one_reading
from opensan.vocabulary import Vocabulary

_IMAGES = ("images", "JPEGImages")
_LABELS = ("labels", "SegmentationClass", "SegmentationClassPNG")
_CLASSES = ("classes.txt", "class_names.txt", "labelmap.txt")
NEEDS = "images/ and labels/NAME.png (or VOC's JPEGImages/ and SegmentationClass/), and classes.txt"


def open_folder(folder: Path, *, ignored: str = "", unlabelled: str = "", first: str = "", pixels: str = "") -> Source:
    """Open images/, labels/ and classes.txt, with colours.txt if labels are RGB; lists or sub-folders are splits."""
    images, labels, classes = _parts(folder)
    listed, colours_of = _class_list(classes)
    vocabulary, label_of_class = without(listed.vocabulary, ignored, str(classes))
    label_of_value = dict(zip(listed.values, label_of_class, strict=True))
    values = class_values(label_of_value, first=first, unlabelled=unlabelled, pixels=pixels)
    label_of_name = dict(zip(listed.vocabulary.names, label_of_class, strict=True))
    colours = _colours(folder / "colours.txt", label_of_name) or {
        colour: label_of_name[name] for colour, name in colours_of.items()
    }
    colour_list = "labelmap.txt" if colours_of and not (folder / "colours.txt").exists() else "colours.txt"
    lists = folder / "ImageSets" / "Segmentation"
    image_set = find_images(folder, images, lists=lists if lists.is_dir() else None)
    return Source(
        vocabulary=vocabulary,
        images=source_images(image_set.images, lambda image: _Labels(image, labels, values, colours, colour_list)),
        evaluation_split=evaluation_split(split for image in image_set.images for split in image.splits),
        left_out=image_set.left_out | unused_labels(folder, labels, (".png",), image_set.stems),
        notes=(*image_set.notes, *background_notes(vocabulary)),
        unlabelled_because="all values are 255 (unlabelled) or of ignored classes",
        judge=values.judge,
        first_is_free=values.first_is_free,
        first_alone=values.first_alone,
    )


def _parts(folder: Path) -> tuple[Path, Path, Path]:
    """Return the folders of images and labels, and the list of classes. Raises UserError naming all missing parts."""
    folders = [
        next((folder / name for name in names if (folder / name).exists()), None)
        for names in (_IMAGES, _LABELS, _CLASSES)
    ]
    images, labels, classes = folders
    if images is None or labels is None or classes is None:
        missing = [
            name for name, path in zip(("images/", "labels/", "classes.txt"), folders, strict=True) if path is None
        ]
        form = next((f"; {hint}" for hint in _other_forms(folder)), "")
        raise UserError(f"{folder}: has no {', no '.join(missing)}; it must hold {NEEDS}{form}")
    if not any(path.suffix.lower() == ".png" for path in labels.rglob("*")):
        hint = next(iter(_other_forms(folder)), "they must be PNG files of the images' names")
        raise UserError(f"{labels}: no label PNG; {hint}")
    return images, labels, classes


def _other_forms(folder: Path) -> Iterator[str]:
    """Yield hints about another form that the folder seems to have, with the command for it."""
    for path in sorted(folder.rglob("*.json"))[:20]:
        with path.open("rb") as file:
            beginning = file.read(4096)
        if b'"shapes"' in beginning:
            yield "these look like labelme's files: opensan data prepare labelme"
        if b'"annotations"' in beginning or b'"images"' in beginning:
            yield "these look like COCO files: opensan data prepare coco-instances (or coco-panoptic)"
    for path in sorted(folder.rglob("*.txt"))[:20]:
        with path.open("rb") as file:
            if re.match(rb"\s*\d+(\s+-?[\d.]+){4,}\s*[\r\n]", file.read(4096) + b"\n"):
                yield "these look like YOLO's polygons: opensan data prepare yolo-seg"
    if any(folder.rglob("*.parquet")) or any(folder.rglob("*.arrow")):
        yield "these look like Hugging Face's tables: opensan data prepare huggingface"
    if (folder / "masks").is_dir():
        yield "masks/ may hold a mask per word: opensan data prepare word-masks"


def _class_list(path: Path) -> tuple[ClassList, dict[int, str]]:
    """Read the classes with their values, and, if the list has colours, the class of each colour."""
    if path.name != "labelmap.txt":
        return read_class_list(path), {}
    names, colours = [], {}
    for number, line in enumerate(_text(path).splitlines(), 1):  # CVAT's: label:color_rgb:parts:actions
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        rgb = rest.partition(":")[0].split(",")
        if rest.partition(":")[0].strip():
            colours[_code(rgb, f"{path}: line {number}", "label:R,G,B::")] = name.strip()
        names.append(name.strip())
    try:
        vocabulary = Vocabulary.parse(names)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return ClassList(vocabulary, tuple(range(len(names)))), colours


@dataclass(frozen=True)
class _Labels:
    """Reads the labels of one image."""

    source_image: FolderImage
    folder: Path
    values: Values
    label_of_colour: Mapping[int, int]
    colour_list: str
    """Name of the table of colours for messages."""

    def __call__(self) -> np.ndarray:
        path = self.source_image.label or self.folder / f"{self.source_image.stem}.png"
        if not path.exists() and path.with_suffix(".PNG").exists():
            path = path.with_suffix(".PNG")
        if not path.exists():
            others = sorted(other.name for other in path.parent.glob(f"{glob.escape(path.stem)}.*"))
            hint = f"there is {others[0]}, but labels must be PNG" if others else "give it one, or leave it out"
            raise UserError(f"{path}: missing; every image needs a label PNG of its name ({hint})")
        pixels = read_map(path, str(path), self.source_image.file)
        if not self.label_of_colour:
            return self.values.labels(pixels, str(path), "; save those numbers, or list its colours in colours.txt")
        return one_reading(pixels, str(path), self._readings(pixels, str(path)), PIXELS_REMEDY)

    def _readings(self, pixels: Pixels, name: str) -> dict[str, Callable[[], np.ndarray]]:
        """Return the possible readings; a table of colours reads colours, and grey may also be values."""
        ways: dict[str, Callable[[], np.ndarray]] = {}
        if self.values.pixels != "stored":
            ways["shown"] = partial(self._by_colour, pixels, name)
        if pixels.stored is not None and (
            self.values.pixels == "stored" or (not self.values.pixels and pixels.grey is not None)
        ):
            ways = {**self.values.readings(pixels, name), **ways}
        return ways or {"shown": partial(self._by_colour, pixels, name)}

    def _by_colour(self, pixels: Pixels, name: str) -> np.ndarray:
        def complaint(colour: int, count: int) -> str:
            rgb = f"{colour >> 16} {colour >> 8 & 255} {colour & 255}"
            remedy = "" if pixels.stored is None else "; if its palette's indices are the classes, say pixels=stored"
            return f"{name}: {count} pixels have the colour {rgb}, which is not in {self.colour_list}{remedy}"

        colours = pixels.colours
        if colours.dtype != np.uint8:
            raise UserError(f"{name}: 16 bits of grey are no colours of colours.txt")
        return look_up(colours.astype(np.int32) @ [65_536, 256, 1], self.label_of_colour, complaint)


def _colours(path: Path, label_of_class: Mapping[str, int]) -> dict[int, int]:
    """Read the label of each colour (24 bits, red first) from lines of "R G B class"; empty without the file."""
    labels: dict[int, int] = {}
    if not path.exists():
        return labels
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        *rgb, name = line.split(maxsplit=3)
        colour = _code(rgb, f"{path}: line {number}", "R G B CLASS, such as 128 64 128 road", line)
        name = name.strip()
        if name not in label_of_class:
            raise UserError(f"{path}: line {number}: classes.txt has no class {name!r}")
        if labels.setdefault(colour, label_of_class[name]) != label_of_class[name]:
            raise UserError(f"{path}: line {number}: {' '.join(rgb)} is another class's colour already")
    return labels


def _code(rgb: list[str], source: str, form: str, line: str | None = None) -> int:
    """Return three numbers as 24 bits, red first. Raises UserError, beginning with `source`, on anything else."""
    parts = [part.strip() for part in rgb]
    if len(parts) != 3 or not all(part.isascii() and part.isdecimal() and int(part) < 256 for part in parts):
        raise UserError(f"{source}: {(line or ','.join(rgb)).strip()[:60]!r} is not {form}")
    red, green, blue = map(int, parts)
    return red << 16 | green << 8 | blue


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None


READER = Reader(
    name="folder",
    description="images with an index PNG each",
    open=open_folder,
    options=VALUE_OPTIONS,
    needs=f"{NEEDS}; SPLIT.txt lists, or sub-folders of images/ and labels/ as splits",
)
