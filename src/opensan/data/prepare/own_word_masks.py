"""Read images with one mask file per word: `opensan data prepare word-masks`."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensan.data.class_list import read_class_names
from opensan.data.prepare.own_images import (
    FolderImage,
    evaluation_split,
    find_images,
    is_image,
    source_images,
    vocabulary_of,
    without,
)
from opensan.data.prepare.own_labels import Layers, read_map
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
    image_set = find_images(folder, images, nested=images != folder)
    by_stem = {image.stem: image for image in image_set.images if not image.problem}
    if any((masks / stem).is_dir() for stem in by_stem):
        mask_files = list(_by_image(masks, by_stem))
    else:
        mask_files = list(_by_word(masks, by_stem, images))
    image_files = {image.file for image in image_set.images}
    files: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for stem, word, file in mask_files:
        if file not in image_files:  # with everything in one folder, images lie among the masks
            files[stem].append((word, file))
    if not files:
        raise UserError(f"{masks}: no mask of an image; they are masks/NAME/WORD.png or masks/WORD/NAME.png")
    for stem, image in by_stem.items():
        if stem not in files:
            image.problem = (
                f"{masks}: no mask of {image.file.name}; leave it out of the folder or the lists, or give it one"
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
        left_out=image_set.left_out | _unused(folder, masks, images, used, image_set.stems),
        notes=image_set.notes,
        unlabelled_because="no mask has a white pixel",
        images=source_images(
            image_set.images,
            lambda image: _Masks(image.file, tuple((label_of_word[word], file) for word, file in files[image.stem])),
        ),
        evaluation_split=evaluation_split(split for image in image_set.images for split in image.splits),
    )


def _by_image(masks: Path, by_stem: dict[str, FolderImage]) -> Iterator[tuple[str, str, Path]]:
    """Yield (image, word, mask) of masks/NAME/WORD.png."""
    for stem in by_stem:
        for file in _files(masks / stem):
            yield stem, _word(file.stem), file


def _by_word(masks: Path, by_stem: dict[str, FolderImage], images: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield (image, word, mask) of masks/WORD/NAME.png; NAME may have a split's folder before it."""
    for folder in sorted(path for path in masks.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if folder == images:
            continue
        for file in sorted(folder.rglob("*")):
            stem = file.relative_to(folder).with_suffix("").as_posix()
            if stem in by_stem and is_image(file):
                yield stem, _word(folder.name), file


def _unused(folder: Path, masks: Path, images: Path, used: Collection[Path], stems: Collection[str]) -> dict[str, str]:
    """Return masks in a folder of their own that belong to no image: path -> reason."""
    if masks in (folder, images):
        return {}
    files = [file for file in sorted(masks.rglob("*")) if is_image(file) and not file.name.startswith(".")]
    unused = {}
    for file in files:
        below = file.relative_to(masks).with_suffix("")
        of_images = (below.parent.as_posix(), below.relative_to(below.parts[0]).as_posix())
        if file not in used and not any(stem in stems for stem in of_images):
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
