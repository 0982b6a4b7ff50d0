"""Read the labelled pixels that words are tuned with: a data set, a folder of label maps, or points and scribbles.

A file of points is a JSON list. Images are named from the file's own folder, x is the column and y the row:

    [{"image": "one.jpg", "word": "bark", "x": 120, "y": 80},
     {"image": "one.jpg", "word": "path", "points": [[10, 200], [60, 210]]},
     {"image": "two.jpg", "word": "bark", "scribble": [[5, 5], [40, 90], [60, 95]]}]

An image may also be an encoding that was saved (`Encoding.save`), which is not encoded again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image, ImageDraw

from opensan.data.prepare.own_images import NO_SPLIT
from opensan.data.segmentation_folder import SegmentationFolder, label_file
from opensan.errors import UserError, did_you_mean, short
from opensan.images import image_size
from opensan.segmenters.results import Encoding
from opensan.vocabulary import Vocabulary
from opensan.word_lists import read_text

PIXELS_OF_A_WORD = 500
"""Most labelled pixels of a word that are kept of an image; others are counted."""

_SHAPES = ("points", "scribble")


@dataclass(frozen=True, eq=False)
class Example:
    """An image with some of its labelled pixels."""

    name: str
    image: Any
    """An image as `Segmenter.encode` takes it, or an Encoding."""
    size: tuple[int, int] | None
    """(H, W) that the labels are for; None for points."""
    pixels: np.ndarray
    """[n, 2] int64: row and column."""
    labels: np.ndarray
    """[n] int64: index into the vocabulary's words, background words included."""
    counts: np.ndarray
    """[K] int64: all labelled pixels of each word."""


def read_examples(
    source: Path,
    vocabulary: Vocabulary | None,
    *,
    split: str | None = None,
    ignored: Sequence[str] = (),
    limit: int | None = None,
) -> tuple[list[Example], Vocabulary]:
    """Read a folder or a file of points, and the words: those asked for, or else those that have labels there.

    Args:
        source: a folder with images/, labels/ and classes.txt (with lists, or without), or a .json of points.
        vocabulary: the words asked for.
        split: the list of images; None: train, or all.
        ignored: classes whose pixels count as unlabelled.
        limit: most images, spread evenly over the list; None for all.

    Raises:
        UserError: one line: nothing usable there, or labels of a word that is not asked for.
    """
    if source.is_dir():
        folder = _open_folder(source, split, ignored)
        chosen = _spread(len(folder), limit)
        own, vocabulary = folder.vocabulary, vocabulary or folder.vocabulary
        table = np.array([_place(vocabulary, (word.name, *word.synonyms)) for word in own.words])
        return [_of_map(folder, index, table, vocabulary) for index in chosen], vocabulary
    if not source.is_file():
        raise UserError(
            f"{source}: no such folder or file; labels are a folder of images, labels and classes, or points"
        )
    if split is not None:
        raise UserError(f"{source}: is a file of points, which has no lists: leave out the split {short(split)}")
    entries = _read_points(source)
    if ignored:
        entries = [entry for entry in entries if entry["word"] not in ignored]
    vocabulary = vocabulary or Vocabulary.parse(list(dict.fromkeys(entry["word"] for entry in entries)))
    images = list(dict.fromkeys(entry["image"] for entry in entries))
    names = [images[index] for index in _spread(len(images), limit)]
    return [
        _of_points(source, name, [entry for entry in entries if entry["image"] == name], vocabulary) for name in names
    ], vocabulary


def example_of(name: str, image: Any, labels: np.ndarray, vocabulary: Vocabulary) -> Example:
    """Make an example of labels [H, W], indices into the vocabulary's words, or negative where unlabelled.

    Raises UserError, one line, if a label is of no word.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise UserError(f"labels of {name} must be [H, W] whole numbers, not {labels.dtype} of shape {labels.shape}")
    if labels.size and labels.max() >= len(vocabulary.words):
        raise UserError(f"labels of {name} hold {labels.max()}, and there are {len(vocabulary.words)} words")
    rows, columns = np.nonzero(labels >= 0)
    return _sampled(name, image, labels.shape, np.stack([rows, columns], 1), labels[rows, columns], vocabulary)


def _spread(count: int, limit: int | None) -> list[int]:
    """Return `limit` of the numbers 0..count-1, evenly spread; all of them if there are no more."""
    if limit is None or count <= limit:
        return list(range(count))
    return np.linspace(0, count - 1, limit).round().astype(int).tolist()


class _AllLabelled(SegmentationFolder):
    """Every image of a folder without lists that has labels."""

    def _listed_files(self) -> list[tuple[Path, Path]]:
        images = sorted(self.root.glob("images/*"))
        return [(image, label) for image in images if (label := label_file(image)).is_file()]


def _open_folder(root: Path, split: str | None, ignored: Sequence[str]) -> SegmentationFolder:
    lists = sorted(path.stem for path in root.glob("*.txt") if path.name != "classes.txt")
    if not (root / "classes.txt").is_file() or not (root / "images").is_dir():
        raise UserError(
            f"{root}: has no images/ or no classes.txt; labels are a folder with images/, labels/ and classes.txt "
            "(`opensan data prepare` makes one of most forms), or a file of points"
        )
    if split is None:
        split = next((name for name in ("train", NO_SPLIT) if name in lists), lists[0] if len(lists) == 1 else None)
    if split is None and lists:
        raise UserError(f"{root}: has the lists {', '.join(lists)}, and no train.txt: choose one with --split")
    if split is not None and split not in lists:
        raise UserError(f"{root}: has no list {split}.txt; there are {', '.join(lists) or 'none'}")
    folder = (
        _AllLabelled(root, "", ignored=ignored) if split is None else SegmentationFolder(root, split, ignored=ignored)
    )
    if not len(folder):
        what = f"{split}.txt names none" if split else "images/ holds none with a label map of its name in labels/"
        raise UserError(f"{root}: no labelled images: {what}")
    return folder


def _place(vocabulary: Vocabulary, texts: Iterable[str]) -> int:
    """Return the index of the word with one of these texts; -2 if none is asked for."""
    return next((place for text in texts if (place := vocabulary.find(text)) is not None), -2)


def _of_map(folder: SegmentationFolder, index: int, table: np.ndarray, vocabulary: Vocabulary) -> Example:
    _, labels = folder[index]
    rows, columns = np.nonzero(labels >= 0)
    own = labels[rows, columns]
    places = table[own]
    if (places < 0).any():
        name = folder.vocabulary.names[int(own[places < 0][0])]
        _refuse(f"{folder.root}: {folder.file(index).name}", name, vocabulary)
    pixels = np.stack([rows, columns], axis=1)
    return _sampled(folder.name(index), folder.file(index), labels.shape, pixels, places, vocabulary)


def _refuse(where: str, name: str, vocabulary: Vocabulary) -> NoReturn:
    raise UserError(
        f"{where} has labels of {short(name)}, which is not among the words{did_you_mean(name, vocabulary.names)}: "
        "ask for it too, or leave its labels out with --ignore"
    )


def _sampled(
    name: str, image: Any, size: tuple[int, ...] | None, pixels: np.ndarray, labels: np.ndarray, vocabulary: Vocabulary
) -> Example:
    counts = np.bincount(labels, minlength=len(vocabulary.words))
    chance = np.random.default_rng(len(labels))
    kept = [
        chance.choice(np.flatnonzero(labels == word), min(PIXELS_OF_A_WORD, int(counts[word])), replace=False)
        for word in np.flatnonzero(counts)
    ]
    chosen = np.concatenate(kept) if kept else np.zeros(0, int)
    shape = None if size is None else (size[0], size[1])
    return Example(name, image, shape, pixels[chosen].astype(np.int64), labels[chosen].astype(np.int64), counts)


def _read_points(path: Path) -> list[dict[str, Any]]:
    """Read the entries of a file of points, checked but for the images' sizes."""
    try:
        data = json.loads(read_text(path))
        if isinstance(data, Mapping):
            data = data.get("points")
        if not isinstance(data, list) or not data:
            raise UserError('must be a list of points, such as [{"image": "a.jpg", "x": 12, "y": 30, "word": "bark"}]')
        return [_point(entry, f"point {number}") for number, entry in enumerate(data, 1)]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def _point(entry: object, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or not all(isinstance(entry.get(key), str) for key in ("image", "word")):
        raise UserError(f'{where} needs "image" and "word", both text: {short(entry)}')
    if "|" in entry["word"]:
        raise UserError(f"{where} is of {short(entry['word'])}: name one word; the words asked for may have synonyms")
    shapes = [key for key in _SHAPES if key in entry]
    if "x" in entry or "y" in entry:
        shapes, places = [*shapes, "x"], [[entry.get("x"), entry.get("y")]]
    elif shapes:
        places = entry[shapes[0]]
    if len(shapes) != 1:
        raise UserError(f'{where} needs either "x" and "y", or "points", or "scribble": {short(entry)}')
    if not isinstance(places, list) or not places or not all(_is_place(place) for place in places):
        raise UserError(f"{where}: a place must be a column and a row, whole numbers from 0: {short(places)}")
    return {"image": entry["image"], "word": entry["word"], "places": places, "joined": shapes == ["scribble"]}


def _is_place(place: object) -> bool:
    return (
        isinstance(place, list)
        and len(place) == 2
        and all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**31 for number in place)
    )


def _of_points(source: Path, name: str, entries: Sequence[Mapping[str, Any]], vocabulary: Vocabulary) -> Example:
    path = source.parent / name
    if not path.is_file():
        raise UserError(f"{source}: the image {short(name)} is not in {source.parent}")
    image: Any = Encoding.load(path) if path.suffix == ".safetensors" else path
    size = image.sizes.image if isinstance(image, Encoding) else image_size(path)
    marks = []
    for entry in entries:
        if (word := vocabulary.find(entry["word"])) is None:
            _refuse(f"{source}: {name}", entry["word"], vocabulary)
        marks.append(Mark(word, entry["places"], entry["joined"]))
    try:
        return example_of_marks(name, image, size, marks, vocabulary)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


@dataclass(frozen=True)
class Mark:
    """Points of a word in an image, or a line through them."""

    word: int
    """Index into the vocabulary's words."""
    places: Sequence[Sequence[int]]
    """Column and row of each, from 0."""
    joined: bool = False
    """Whether the pixels of the line through the points are meant."""


def example_of_marks(
    name: str, image: Any, size: tuple[int, int], marks: Iterable[Mark], vocabulary: Vocabulary
) -> Example:
    """Make an example of points and lines in an image of `size` (H, W).

    Raises UserError, one line, for a point outside the image, or one of two words.
    """
    height, width = size
    found: dict[tuple[int, int], int] = {}
    for mark in marks:
        for x, y in mark.places:
            if not (0 <= x < width and 0 <= y < height):
                raise UserError(f"the point ({x}, {y}) is outside {name}, which is {width}x{height}")
        for x, y in _along(mark.places) if mark.joined else mark.places:
            if found.setdefault((y, x), mark.word) != mark.word:
                names = vocabulary.words[found[y, x]].name, vocabulary.words[mark.word].name
                raise UserError(f"the point ({x}, {y}) of {name} is both {short(names[0])} and {short(names[1])}")
    pixels = np.array(list(found)).reshape(-1, 2)
    return _sampled(name, image, None, pixels, np.array(list(found.values()), dtype=np.int64), vocabulary)


def _along(places: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return the pixels (x, y) of the line through these points."""
    corners = np.array(places)
    first = corners.min(axis=0)
    width, height = (corners.max(axis=0) - first + 1).tolist()
    if width * height > 2**28:
        raise UserError(f"a scribble spans {width}x{height} pixels, more than any image that is read here")
    drawn = Image.new("1", (width, height))
    ImageDraw.Draw(drawn).line([(int(x), int(y)) for x, y in corners - first] * (2 if len(corners) == 1 else 1), fill=1)
    rows, columns = np.nonzero(np.asarray(drawn))
    return [(int(x), int(y)) for x, y in zip(columns + first[0], rows + first[1], strict=True)]
