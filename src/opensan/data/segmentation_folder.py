"""Read the canonical layout of a labelled data set on disk.

images/NAME.jpg     images, any format that Pillow reads
objects/NAME.png    the number of each pixel's object, 0 for none; only where objects are known
labels/NAME.png     index PNG: pixel value = line of classes.txt, counted from 0, or the number before the class.
                    8-bit with 255 unlabelled, or 16-bit with 65535 unlabelled
classes.txt         a class a line ("7: car" where classes have numbers), `|` between synonyms
SPLIT.txt           the images of a split, one a line: with or without suffix
"""

import hashlib
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from opensan.data.class_list import means_unlabelled, read_class_list
from opensan.data.objects import FOLDER, read_objects
from opensan.errors import UserError
from opensan.images import image_size, open_image
from opensan.images.pixels import Pixels, one_reading, read_pixels
from opensan.vocabulary import UNLABELLED, Vocabulary

_NO_CLASS = -2
"""Entry of a label table for a value that no class has."""


class SegmentationFolder:
    """One split of a data set in the canonical layout (a `SegmentationDataset`)."""

    def __init__(self, root: str | Path, split: str, *, ignored: Sequence[str] = ()) -> None:
        """Read the lists; images are read on access.

        Args:
            root: the folder.
            split: the name of a list, without ".txt".
            ignored: classes to ignore (a "background" that means "anything else"): their pixels become
                unlabelled, and the classes after them move up.

        Raises:
            ValueError: a missing list, class or folder. A listed image that does not exist is left out with a
                warning that names it.
        """
        self.root = Path(root)
        self.split = split
        self.vocabulary, self._label_of_value = read_classes(_existing(self.root / "classes.txt"), ignored)
        self._files = self._listed_files()

    def _listed_files(self) -> list[tuple[Path, Path]]:
        """Return the split's images with their label files."""
        files, missing = find_listed(self.root, self.split)
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            warnings.warn(
                f"{self.root / f'{self.split}.txt'}: {len(missing)} of {len(files) + len(missing)} listed images "
                f"are not in {self.root / 'images'} and are left out: {shown}",
                stacklevel=3,
            )
        return [(file, label_file(file)) for file in files]

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index][0].stem

    def file(self, index: int) -> Path:
        """Return the image's file."""
        return self._files[index][0]

    def size(self, index: int) -> tuple[int, int]:
        """Return (H, W) of an image without decoding it; errors as for reading it."""
        return image_size(self._files[index][0])

    def fingerprint(self) -> str:
        """Return a text that changes with the lists, the classes or any file of the split; reads no image."""
        digest = hashlib.sha256(repr((self.vocabulary, self._label_of_value.tolist())).encode())
        for file in (file for pair in self._files for file in pair):
            state = file.stat() if file.exists() else None
            digest.update(repr((file.name, state and (state.st_size, state.st_mtime_ns))).encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return read_labelled(*self._files[index], self._label_of_value)

    @property
    def knows_objects(self) -> bool:
        """Whether the folder has maps of objects."""
        return (self.root / FOLDER).is_dir()

    def objects(self, index: int) -> np.ndarray:
        """Return the number of each pixel's object, [H, W] int32, 0 for none; see `opensan.data.objects`."""
        label = self._files[index][1]
        return read_objects(self.root / FOLDER / label.name, self.size(index))


def read_classes(path: Path, ignored: Sequence[str] = ()) -> tuple[Vocabulary, np.ndarray]:
    """Return the classes that classes.txt lists but for the `ignored` ones, and the label of each pixel value, [K].

    Raises UserError, one line, if the file can't be read, or has no such class to ignore.
    """
    classes = read_class_list(path)
    full = classes.vocabulary
    if unknown := set(ignored) - set(full.names):
        raise UserError(f"{path}: has no class {', '.join(sorted(unknown))} to ignore")
    vocabulary = Vocabulary(tuple(word for word in full.words if word.name not in ignored), full.templates)
    index_of = {word.name: index for index, word in enumerate(vocabulary.words)}
    return vocabulary, label_table(classes.values, [index_of.get(word.name, UNLABELLED) for word in full.words])


def label_table(values: Sequence[int], labels: Sequence[int]) -> np.ndarray:
    """Return [K] int16: each pixel value's label up to the largest of `values`; `_NO_CLASS` for values in between."""
    table = np.full(max(values) + 1, _NO_CLASS, dtype=np.int16)
    table[list(values)] = labels
    return table


def find_listed(root: Path, split: str) -> tuple[list[Path], list[str]]:
    """Return the images that a list names, in its order, and the names that no file in images/ has."""
    path = _existing(root / f"{split}.txt")
    text = path.read_text(encoding="utf-8-sig")  # Windows editors write a UTF-8 mark at the start
    listed = [line.strip() for line in text.splitlines() if line.strip()]
    # Stems may contain dots, so a listed name is looked up as a whole before it is taken for a stem.
    by_name = {file.name: file for file in _existing(root / "images").iterdir()}
    by_stem = {file.stem: file for file in by_name.values()}
    files = [by_name.get(name) or by_stem.get(name) for name in listed]
    missing = [name for name, file in zip(listed, files, strict=True) if file is None]
    return [file for file in files if file is not None], missing


def label_file(image: Path) -> Path:
    """Return the path of the labels of an image in images/."""
    return image.parents[1] / "labels" / f"{image.stem}.png"


def read_labelled(image_path: Path, label_path: Path, label_of_value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read an image [H, W, 3] uint8 RGB and its labels [H, W] int16.

    `label_of_value` [K] int16 has the label of each value below K, as `label_table` makes it. Raises ValueError, one
    line, naming the file.
    """
    return image_and_labels(open_image(image_path), label_path, str(label_path), label_of_value)


def image_and_labels(
    image: np.ndarray, labels_file: Path | IO[bytes], labels_name: str, label_of_value: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return an image [H, W, 3] with the labels of a file, [H, W] int16; the name is for messages.

    Raises UserError, one line, if the labels can't be read or have another size.
    """
    labels = _read_labels(labels_file, labels_name, label_of_value)
    if labels.shape != image.shape[:2]:
        raise UserError(
            f"{labels_name}: is {labels.shape[1]}x{labels.shape[0]}, "
            f"its image {image.shape[1]}x{image.shape[0]} (width x height)"
        )
    return image, labels


def _read_labels(file: Path | IO[bytes], name: str, label_of_value: np.ndarray) -> np.ndarray:
    """Read a label map, [H, W] int16."""
    pixels = _read_index_png(file, name)
    ways = {"stored": pixels.stored, "shown": pixels.grey if pixels.differs else None}
    read = {
        way: partial(_labels_of, values, name, label_of_value) for way, values in ways.items() if values is not None
    }
    return one_reading(pixels, name, read, "save it as 8 or 16-bit grey with the classes' numbers")


def _labels_of(values: np.ndarray, name: str, label_of_value: np.ndarray) -> np.ndarray:
    ignore = int(np.iinfo(values.dtype).max)
    table = np.full(ignore + 1, _NO_CLASS, dtype=np.int16)
    known = label_of_value[: ignore + 1]
    table[: len(known)] = known
    if means_unlabelled(ignore, np.flatnonzero(label_of_value != _NO_CLASS).tolist()):
        table[ignore] = UNLABELLED
    wrong = table[values] == _NO_CLASS
    if wrong.any():
        classes = np.count_nonzero(label_of_value != _NO_CLASS)
        raise UserError(
            f"{name}: holds the value {values[wrong][0]}; classes.txt has {classes} classes, {ignore} is unlabelled"
        )
    return table[values]


def _read_index_png(source: Path | IO[bytes], name: str) -> Pixels:
    """Read the pixels of an index PNG. Raises UserError on any other kind of image."""
    try:
        with Image.open(source) as file:
            if file.mode not in ("1", "L", "P", "I;16", "I;16B", "I"):
                raise UserError(f"{name}: an image of mode {file.mode}, not an index PNG of 8 or 16 bits")
            return read_pixels(file)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable label PNG ({error})") from None


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: does not exist; a data set folder needs images/, labels/, classes.txt and SPLIT.txt")
    return path
