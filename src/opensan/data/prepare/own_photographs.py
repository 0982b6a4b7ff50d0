"""Which photographs a folder of somebody's own holds, and which splits they belong to."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NoReturn

from opensan.data.prepare.source import Photograph
from opensan.errors import UserError
from opensan.vocabulary import Vocabulary, Word

NO_SPLIT = "all"
"""The split of everything, where nothing says which photographs are for what."""

NO_LISTS = ("classes.txt", "colours.txt")


@dataclass
class Found:
    """A photograph in a folder."""

    place: str
    """Below the folder of photographs, without suffix: "0001", or "train/0001"."""
    file: Path
    splits: list[str] = field(default_factory=list)
    problem: str | None = None
    """Why it can't be used, if that is known already."""


def find_photographs(root: Path, images: Path, *, nested: bool = True) -> list[Found]:
    """The photographs in `images`, with the splits that lists in `root` or sub-folders of `images` give them.

    If a `.txt` in `root` names photographs, such files are the splits. Else, if `nested`, sub-folders of `images` are.
    Else there is one split, "all". A listed photograph that isn't there comes with that problem.

    Raises ValueError, one line: no photographs, photographs beside sub-folders of them, or two with one stem.
    """
    files = sorted(_images_in(images, nested))
    if not files:
        raise UserError(f"{images}: no photographs (.jpg, .png and the like)")
    found = [Found(file.relative_to(images).with_suffix("").as_posix(), file) for file in files]
    listed = _listed(root, images, found)
    if not listed:
        _split_by_folder(images, found)
        listed = found
    counts = Counter(one.place for one in listed)
    if repeated := [place for place, count in counts.items() if count > 1]:
        names = " and ".join(one.file.name for one in listed if one.place == repeated[0])
        raise UserError(f"{images}: {names} have the same stem, so labels could be either's; rename one")
    return listed


def _images_in(folder: Path, nested: bool) -> Iterator[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; the photographs go there")
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        # The sub-folders themselves may be links, as those to another disk are.
        inside = path.rglob("*") if nested and path.is_dir() else [path]
        yield from (file for file in inside if is_image(file) and not file.name.startswith(".") and file.is_file())


def is_image(path: Path) -> bool:
    """By its suffix."""
    from opensan.images import known_suffixes  # only now: it imports torch

    return path.suffix.lower() in known_suffixes()


def _split_by_folder(images: Path, found: Sequence[Found]) -> None:
    flat = [one for one in found if "/" not in one.place]
    if flat and len(flat) < len(found):
        other = next(one for one in found if "/" in one.place)
        raise UserError(
            f"{images}: photographs lie both in it ({flat[0].file.name}) and in sub-folders ({other.place}): "
            "sub-folders are splits, so put all into them, or none"
        )
    for one in found:
        one.splits = [PurePosixPath(one.place).parts[0] if not flat else NO_SPLIT]


def _listed(root: Path, images: Path, found: Sequence[Found]) -> list[Found]:
    """The photographs of the lists in `root`; empty if there are none."""
    by_name: dict[str, list[Found]] = defaultdict(list)
    for one in found:
        below = one.file.relative_to(images).as_posix()
        for name in {below, one.place, one.file.name, one.file.stem}:
            by_name[name].append(one)
    listed: dict[Path | str, Found] = {}
    for path in sorted(root.glob("*.txt")):
        if path.name in NO_LISTS or path.name.startswith("."):
            continue
        lines = [(number, line) for number, line in enumerate(_lines(path, images), 1) if line]
        if not any(line in by_name for _, line in lines):
            warnings.warn(f"{path}: names no photograph in {images}, so it is taken for no list", stacklevel=4)
            continue
        for number, line in lines:
            matches = by_name.get(line)
            if matches is None:
                problem = f"{path}: line {number}: there is no photograph {line!r} in {images}"
                matches = [listed.get(line) or Found(line, images / line, problem=problem)]
            for one in matches:
                listed.setdefault(one.place if one.problem else one.file, one)
                if path.stem not in one.splits:
                    one.splits.append(path.stem)
    return list(listed.values())


def _lines(path: Path, images: Path) -> list[str]:
    """The lines of a list, without the folder that some put before each name."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a list of photographs in UTF-8 text ({error})") from None
    return [line.strip().removeprefix("./").removeprefix(f"{images.name}/") for line in lines]


def photographs(found: Iterable[Found], labels: Callable[[Found], Callable]) -> list[Photograph]:
    """`found` for the engine; `labels` gives what reads the labels of one.

    A photograph's name is its stem, or, where stems repeat in sub-folders, its path below the folder ("train_0001").
    """
    found = list(found)
    stems = Counter(PurePosixPath(one.place).name for one in found)
    return [
        Photograph(
            name=stem if stems[stem] == 1 else one.place.replace("/", "_"),
            splits=tuple(one.splits),
            image=partial(fail, one.problem) if one.problem else one.file,
            labels=labels(one),
        )
        for one in found
        for stem in [PurePosixPath(one.place).name]
    ]


def fail(problem: str) -> NoReturn:
    raise UserError(problem)


def below(folder: Path, name: str, place: str) -> Path:
    """`folder / name`. Raises ValueError, beginning with `place`, if that would lead out of the folder."""
    path = PurePosixPath(name)
    if not path.parts or Path(name).anchor or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"{place}: {name[:80]!r} is no path below the folder")
    return folder / path


def evaluation_split(splits: Iterable[str]) -> str | None:
    """The split to measure on: the first with "test" in its name, else with "val", else the only one."""
    splits = sorted(set(splits))
    named = [split for word in ("test", "val") for split in splits if word in split.lower()]
    return (named or (splits if len(splits) == 1 else [None]))[0]


def without(vocabulary: Vocabulary, ignored: str, place: str) -> tuple[Vocabulary, list[int]]:
    """The vocabulary without the classes `ignored` (names between commas), and the label of each class: -1 if ignored.

    Raises ValueError, beginning with `place`, on a name that is no class.
    """
    # A name may hold commas itself.
    names = [ignored] if ignored in vocabulary.names else [name.strip() for name in ignored.split(",") if name.strip()]
    if unknown := [name for name in names if name not in vocabulary.names]:
        raise UserError(f"{place}: has no class {unknown[0]!r} to ignore; it has {', '.join(vocabulary.names[:20])}")
    kept = tuple(word for word in vocabulary.words if word.name not in names)
    if not kept:
        raise UserError(f"{place}: all classes are ignored")
    place_of = {word.name: label for label, word in enumerate(kept)}
    return Vocabulary(kept, vocabulary.templates), [place_of.get(name, -1) for name in vocabulary.names]


def vocabulary_of(names: Sequence[str], place: str) -> Vocabulary:
    """Class names as they are. Raises ValueError, beginning with `place`, on none, blank or repeated ones."""
    try:
        return Vocabulary(tuple(Word(name) for name in names))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
