"""Find the images of a user's folder, and their splits."""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NoReturn

from opensan.data.prepare.source import SourceImage
from opensan.errors import UserError
from opensan.images import FOREIGN_SUFFIXES, known_suffixes
from opensan.vocabulary import Vocabulary, Word
from opensan.word_lists import read_text

NO_SPLIT = "all"
"""The split of all images, if neither lists nor folders define splits."""

NO_LISTS = ("classes.txt", "colours.txt", "class_names.txt", "labels.txt", "labelmap.txt")
_SPLIT_NAMES = re.compile(r"(train|val|valid|validation|test|trainval|minival)(\W|_|\d|$)", re.IGNORECASE)
"""Names of lists of splits: a list of such a name that names no image is a mistake."""
_LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
_NO_WORDS = frozenset({"background", "void", "ignore", "unlabeled", "unlabelled", "other", "unknown", "none"})
"""Names of classes that mean "anything else"."""
_NO_IMAGES = frozenset(
    {".txt", ".json", ".xml", ".csv", ".md", ".html", ".yaml", ".yml", ".cache", ".npy", ".db", ".ini", ".zip"}
)
"""Suffixes of other files that are common beside images."""


@dataclass
class FolderImage:
    """An image in a folder."""

    stem: str
    """Path below the folder of images, without suffix: "0001", or "train/0001"."""
    file: Path
    splits: list[str] = field(default_factory=list)
    label: Path | None = None
    """Its label file, if a list names one."""
    problem: str | None = None
    """The reason why it can't be used, if it is known already."""


@dataclass(frozen=True)
class FolderImages:
    """The images of a folder, and other files in it."""

    images: list[FolderImage]
    """Images that lists name, or all."""
    stems: frozenset[str]
    """Stems of all files in the folder of images, also of those that can't be read or that no list names."""
    left_out: dict[str, str]
    """Files that look like images and can't be read: path below the data set's folder -> reason."""
    notes: tuple[str, ...] = ()


def find_images(root: Path, images: Path, *, nested: bool = True, lists: Path | None = None) -> FolderImages:
    """Find the images in `images`, with their splits by lists in `root` or by sub-folders of `images`.

    If a `.txt` in `root` (or in `lists`) names images, such files are the splits. Else, if `nested`, sub-folders
    of `images` are. Else there is one split, "all". A listed image that does not exist comes with that problem, and
    so do several of one stem.

    Raises UserError, one line: no images, images beside sub-folders of images, or a list called like a split
    that names no image.
    """
    files, foreign = _images_in(images, nested)
    left_out = {_below_root(file, root): _why_foreign(file) for file in foreign}
    if not files:
        first = f"; {next(iter(left_out.items()))}" if left_out else ""
        raise UserError(f"{images}: no images (.jpg, .png and the like){first}")
    all_images = [FolderImage(_stem(file, images), file) for file in files]
    stems = frozenset(_stem(file, images) for file in (*files, *foreign))
    listed = _listed(root, images, all_images, lists or root)
    notes: tuple[str, ...] = ()
    if not listed:
        _split_by_folder(images, all_images)
        listed = all_images
    elif unused := len(all_images) - len({image.file for image in listed if not image.problem}):
        notes = (f"{unused} images stand in no list, and are not used",)
    _refuse_equal_stems(images, listed)
    return FolderImages(listed, stems, left_out, notes)


def _refuse_equal_stems(images: Path, listed: Sequence[FolderImage]) -> None:
    by_stem = defaultdict(list)
    for image in listed:
        if not image.problem:
            by_stem[image.stem].append(image)
    for same in by_stem.values():
        names = " and ".join(image.file.name for image in same)
        for image in same if len(same) > 1 else ():
            image.problem = f"{images}: {names} have the same stem, so labels could be either's; rename one"
            image.stem += image.file.suffix


def unused_labels(root: Path, labels: Path, suffixes: Collection[str], stems: Collection[str]) -> dict[str, str]:
    """Return label files in `labels` that belong to no image: path below `root` -> reason."""
    if not labels.is_dir():
        return {}
    files = [file for file in sorted(labels.rglob("*")) if file.suffix.lower() in suffixes and file.is_file()]
    return {
        _below_root(file, root): "no image has this name"
        for file in files
        if not file.name.startswith(".") and _stem(file, labels) not in stems
    }


def _below_root(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def _stem(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()


def _images_in(folder: Path, nested: bool) -> tuple[list[Path], list[Path]]:
    """Return the images in a folder, and other files that may be meant as images."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; the images go there")
    images, others = [], []
    for path in sorted(folder.iterdir()):
        # The sub-folders themselves may be links, as those to another disk are.
        for file in sorted(path.rglob("*")) if nested and path.is_dir() else [path]:
            if path.name.startswith(".") or file.name.startswith(".") or not file.is_file():
                continue
            if is_image(file):
                images.append(file)
            elif file.suffix.lower() in FOREIGN_SUFFIXES or (nested and file.suffix.lower() not in _NO_IMAGES):
                others.append(file)
    return images, others


def _why_foreign(file: Path) -> str:
    if file.suffix.lower() in FOREIGN_SUFFIXES:
        return f"{file.suffix.lower().removeprefix('.').upper()} files can't be read; convert it to JPEG or PNG"
    return "its suffix is not an image's; if it is one, convert it to JPEG or PNG"


def is_image(path: Path) -> bool:
    """Return whether the suffix is an image's."""
    return path.suffix.lower() in known_suffixes()


def _split_by_folder(images: Path, all_images: Sequence[FolderImage]) -> None:
    flat = [image for image in all_images if "/" not in image.stem]
    if flat and len(flat) < len(all_images):
        other = next(image for image in all_images if "/" in image.stem)
        raise UserError(
            f"{images}: images lie both in it ({flat[0].file.name}) and in sub-folders ({other.stem}): "
            "sub-folders are splits, so put all into them, or none"
        )
    for image in all_images:
        image.splits = [PurePosixPath(image.stem).parts[0] if not flat else NO_SPLIT]


def _listed(root: Path, images: Path, all_images: Sequence[FolderImage], lists: Path) -> list[FolderImage]:
    """Return the images of the lists; empty if there are no lists."""
    by_name: dict[str, list[FolderImage]] = defaultdict(list)
    for image in all_images:
        path_below = image.file.relative_to(images).as_posix()
        for name in {path_below, image.stem, image.file.name, image.file.stem}:
            by_name[name].append(image)
    listed: dict[Path | str, FolderImage] = {}
    for path in sorted(path for path in lists.iterdir() if path.suffix.lower() == ".txt"):
        if path.name.lower() in NO_LISTS or path.name.startswith("."):
            continue
        entries = [(number, _entry(line, images, by_name)) for number, line in enumerate(_lines(path), 1) if line]
        if not any(name in by_name for _, (name, _) in entries):
            _refuse_list(path, images, entries)
            continue
        for number, (line, label) in entries:
            matches = by_name.get(line)
            if matches is None:
                problem = f"{path}: line {number}: there is no image {line!r} in {images}"
                matches = [listed.get(line) or FolderImage(line, images / line, problem=problem)]
            for image in matches:
                if label:
                    image.label = below(root, label, f"{path}: line {number}")
                listed.setdefault(image.stem if image.problem else image.file, image)
                if path.stem not in image.splits:
                    image.splits.append(path.stem)
    return list(listed.values())


def _refuse_list(path: Path, images: Path, entries: Sequence[tuple[int, tuple[str, str]]]) -> None:
    """Raise UserError for a list that names no image but is called like a split; warn of other lists."""
    if not _SPLIT_NAMES.match(path.stem):
        warnings.warn(f"{path}: names no image in {images}, so it is taken for no list", stacklevel=5)
        return
    shown = f"its first line is {entries[0][1][0]!r:.80}" if entries else "it is empty"
    raise UserError(
        f"{path}: names no image in {images} ({shown}); a list of a split has an image a line, "
        "a.jpg or images/a.jpg labels/a.png; rename it if it is no list"
    )


def _entry(line: str, images: Path, by_name: Mapping[str, Sequence[FolderImage]]) -> tuple[str, str]:
    """Return the image that a line names, as in `by_name`, and the label file of a pair ("" if it is no pair)."""
    for separator in (None, "\t", ",", " "):
        image, label = (line, "") if separator is None else map(str.strip, line.partition(separator)[::2])
        name = _below_images(image, images)
        if name in by_name and (separator is None or label.lower().endswith(_LABEL_SUFFIXES)):
            return name, _below_root_of(label, images)
    return _below_images(line, images), ""


def _below_images(name: str, images: Path) -> str:
    """Remove the folder of images from a listed name: "images/", "/data/set/images/", "./"."""
    name = name.replace("\\", "/") if "/" not in name else name
    _, middle, rest = f"/{name}".rpartition(f"/{images.name}/")
    return (rest if middle else name).removeprefix("./")


def _below_root_of(label: str, images: Path) -> str:
    """Return the label file of a pair, relative to the data set's folder; an absolute path must lead there."""
    label = label.replace("\\", "/") if "/" not in label else label
    return label.removeprefix(f"{images.parent.as_posix()}/").removeprefix("./")


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in read_text(path).splitlines()]
    except UserError as error:
        raise UserError(f"{path}: not a list of images ({error})") from None


def source_images(images: Iterable[FolderImage], labels: Callable[[FolderImage], Callable]) -> list[SourceImage]:
    """Return `images` in the engine's form; `labels` returns the function that reads an image's labels.

    An image's name is its stem, or, where stems repeat in sub-folders, its path below the folder ("train_0001").
    """
    images = list(images)
    stems = Counter(PurePosixPath(image.stem).name for image in images)
    return [
        SourceImage(
            name=stem if stems[stem] == 1 else image.stem.replace("/", "_"),
            splits=tuple(image.splits),
            image=partial(fail, image.problem) if image.problem else image.file,
            labels=labels(image),
        )
        for image in images
        for stem in [PurePosixPath(image.stem).name]
    ]


def fail(problem: str) -> NoReturn:
    """Raise UserError; as a callable, it reports a problem that is known before labels are read."""
    raise UserError(problem)


def below(folder: Path, name: str, source: str) -> Path:
    """Return `folder / name`. Raises UserError, beginning with `source`, if that would lead out of the folder."""
    name = name.replace("\\", "/") if "/" not in name else name  # of Windows
    path = PurePosixPath(name)
    if not path.parts or Path(name).anchor or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"{source}: {name[:80]!r} is no path below the folder")
    return folder / path


def evaluation_split(splits: Iterable[str]) -> str | None:
    """Return the split for evaluation: the first with "test" in its name, else with "val", else the only one."""
    splits = sorted(set(splits))
    named = [split for word in ("test", "val") for split in splits if word in split.lower()]
    if not named and len(splits) != 1:
        return None
    return (named or splits)[0]


def without(vocabulary: Vocabulary, ignored: str, source: str) -> tuple[Vocabulary, list[int]]:
    """Return the vocabulary without the classes `ignored` (names between commas), and each class's label (-1: ignored).

    Raises ValueError, beginning with `source`, on a name that is no class.
    """
    # A name may contain commas.
    names = [ignored] if ignored in vocabulary.names else [name.strip() for name in ignored.split(",") if name.strip()]
    if unknown := [name for name in names if name not in vocabulary.names]:
        raise UserError(f"{source}: has no class {unknown[0]!r} to ignore; it has {', '.join(vocabulary.names[:20])}")
    kept = tuple(word for word in vocabulary.words if word.name not in names)
    if not kept:
        raise UserError(f"{source}: all classes are ignored")
    place_of = {word.name: label for label, word in enumerate(kept)}
    return Vocabulary(kept, vocabulary.templates), [place_of.get(name, -1) for name in vocabulary.names]


def background_notes(vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return notes about classes whose names mean "anything else"."""
    return tuple(
        f"the class {name!r} is prepared as a word; if it means anything else, say ignored={name}"
        for name in vocabulary.names
        if name.strip("_ ").lower() in _NO_WORDS
    )


def vocabulary_of(names: Sequence[str | Word], source: str) -> Vocabulary:
    """Make a vocabulary of class names or words. Raises UserError, beginning with `source`, on a wrong list."""
    try:
        return Vocabulary(tuple(name if isinstance(name, Word) else Word(name) for name in names))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
