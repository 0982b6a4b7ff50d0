"""Read images with one mask file per word: `opensan data prepare word-masks`."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensan.data.class_list import read_class_names
from opensan.data.prepare.own_labels import Layers, read_map
from opensan.data.prepare.own_photographs import (
    Found,
    evaluation_split,
    find_photographs,
    is_image,
    photographs,
    vocabulary_of,
    without,
)
from opensan.data.prepare.source import Reader, Source
from opensan.errors import UserError
from opensan.vocabulary import Vocabulary

_COLOURED, _PICTURE = 64, 0.25
"""A pixel is coloured if its channels differ by more; a file with a larger share of such or grey pixels is no mask."""
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")


def open_word_masks(folder: Path, *, ignored: str = "") -> Source:
    """Open images/NAME.jpg with masks/NAME/WORD.png, or masks/WORD/NAME.png; without these folders, all in `folder`."""
    images = folder / "images" if (folder / "images").is_dir() else folder
    masks = folder / "masks" if (folder / "masks").is_dir() else folder
    found_set = find_photographs(folder, images, nested=images != folder)
    found = found_set.found
    by_place = {one.place: one for one in found if not one.problem}
    if any((masks / place).is_dir() for place in by_place):
        found_masks = list(_by_photograph(masks, by_place))
    else:
        found_masks = list(_by_word(masks, by_place, images))
    photographs_of = {one.file for one in found}
    files: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for place, word, file in found_masks:
        if file not in photographs_of:  # with everything in one folder, images lie among the masks
            files[place].append((word, file))
    if not files:
        raise UserError(f"{masks}: no mask of an image; they are masks/NAME/WORD.png or masks/WORD/NAME.png")
    for place, one in by_place.items():
        if place not in files:
            one.problem = (
                f"{masks}: no mask of {one.file.name}; leave it out of the folder or the lists, or give it one"
            )
    vocabulary = _vocabulary(folder / "classes.txt", masks, [word for masks in files.values() for word, _ in masks])
    kept, labels = without(vocabulary, ignored, str(masks))
    label_of_word = {
        text: label
        for word, label in zip(vocabulary.words, labels, strict=True)
        for text in (word.name, *word.synonyms)
    }
    used = {file for entries in files.values() for _, file in entries}
    return Source(
        vocabulary=kept,
        left_out=found_set.left_out | _unused(folder, masks, images, used, found_set.places),
        notes=found_set.notes,
        unlabelled_because="no mask has a white pixel",
        photographs=photographs(
            found,
            lambda one: _Masks(one.file, tuple((label_of_word[word], file) for word, file in files[one.place])),
        ),
        evaluation_split=evaluation_split(split for one in found for split in one.splits),
    )


def _by_photograph(masks: Path, by_place: dict[str, Found]) -> Iterator[tuple[str, str, Path]]:
    """Yield (image, word, mask) of masks/NAME/WORD.png."""
    for place in by_place:
        for file in _files(masks / place):
            yield place, _word(file.stem), file


def _by_word(masks: Path, by_place: dict[str, Found], images: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield (image, word, mask) of masks/WORD/NAME.png; NAME may have a split's folder before it."""
    for folder in sorted(path for path in masks.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if folder == images:
            continue
        for file in sorted(folder.rglob("*")):
            place = file.relative_to(folder).with_suffix("").as_posix()
            if place in by_place and is_image(file):
                yield place, _word(folder.name), file


def _unused(folder: Path, masks: Path, images: Path, used: Collection[Path], places: Collection[str]) -> dict[str, str]:
    """Return masks in a folder of their own that belong to no image: path -> reason."""
    if masks in (folder, images):
        return {}
    files = [file for file in sorted(masks.rglob("*")) if is_image(file) and not file.name.startswith(".")]
    unused = {}
    for file in files:
        below = file.relative_to(masks).with_suffix("")
        of_photographs = (below.parent.as_posix(), below.relative_to(below.parts[0]).as_posix())
        if file not in used and not any(place in places for place in of_photographs):
            unused[file.relative_to(folder).as_posix()] = "no image has the name of this mask"
    return unused


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_image(path) and not path.name.startswith("."))


def _word(name: str) -> str:
    return name.replace("_", " ").strip()


def _vocabulary(classes: Path, masks: Path, words: Sequence[str]) -> Vocabulary:
    """Return the words of classes.txt, which must have all, or without it the masks' names in alphabetical order."""
    if not classes.exists():
        names = sorted(set(words), key=lambda word: (word.casefold(), word))
        return vocabulary_of(names, str(masks))
    vocabulary = read_class_names(classes)
    known = {text for word in vocabulary.words for text in (word.name, *word.synonyms)}
    if unknown := sorted(set(words) - known):
        raise UserError(f"{masks}: there are masks of {unknown[0]!r}, which is not in {classes}")
    return vocabulary


@dataclass(frozen=True)
class _Masks:
    """Combines an image's masks to labels."""

    image: Path
    masks: tuple[tuple[int, Path], ...]

    def __call__(self) -> np.ndarray:
        layers: Layers | None = None
        for label, file in self.masks:
            mask = _inside(read_map(file, str(file), self.image, _FORMATS).shown, file)
            layers = layers or Layers(mask.shape)
            layers.add(mask, label)
        assert layers is not None  # an image has a mask
        return layers.labels


def _inside(pixels: np.ndarray, file: Path) -> np.ndarray:
    """Return where a mask is bright, [H, W] bool: 1 if it holds only 0 and 1, else at least half of white."""
    if pixels.ndim == 3:
        if _share(np.ptp(pixels, axis=2) > _COLOURED) > _PICTURE:
            raise UserError(f"{file}: has colours, as a picture and not a mask (black and white) has")
        pixels = pixels.max(axis=2)
    brightest = int(pixels.max())
    half = 1 if brightest <= 1 else (int(np.iinfo(pixels.dtype).max) + 1) // 2
    if 1 < brightest < half:
        raise UserError(
            f"{file}: its brightest pixel is {brightest}; a mask is black and white (0 and 255, or 0 and 1)"
        )
    white = int(np.iinfo(pixels.dtype).max)
    if brightest > 1 and _share((pixels > white // 8) & (pixels < white - white // 8)) > _PICTURE:
        raise UserError(f"{file}: has many greys, as a picture and not a mask (black and white) has")
    return pixels >= half


def _share(mask: np.ndarray) -> float:
    return np.count_nonzero(mask) / mask.size


READER = Reader(
    name="word-masks",
    description="images with a black and white mask per word",
    open=open_word_masks,
    options={"ignored": "words whose pixels become unlabelled: NAME,NAME"},
    needs="images/NAME.jpg with masks/NAME/WORD.png or masks/WORD/NAME.png; SPLIT.txt lists or sub-folders of images/",
)
