"""Read lists of classes (classes.txt), which give the pixel value of each class in label files.

One rule holds for all such lists. Either every class has its number ("7: car"), and lines may then be blank,
comments or missing; or the classes are the lines from the first one on, counted from 0, without a blank line or a
comment line before the last class, because nothing would say whether that line counts.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from opensan.errors import UserError
from opensan.vocabulary import Vocabulary
from opensan.word_lists import read_text, without_quotes

_NUMBERED = re.compile(r"(\d{1,5})\s*(?:[:=\t,]|\s)\s*(\S.*)")
_SURELY_NUMBERED = re.compile(r"\d{1,5}\s*[:=\t,]\s*\S")
_COMMENT = re.compile(r"(?:^|\s)#")


@dataclass(frozen=True)
class ClassList:
    """Classes and the pixel value of each."""

    vocabulary: Vocabulary
    values: tuple[int, ...]
    """Pixel values in the order of the words."""


def read_class_list(path: Path) -> ClassList:
    """Read a list of classes whose line or number is their pixel value.

    Raises ValueError, one line that names the file and the line, on a list that can't be read, and on one that leaves
    open which value a class has.
    """
    vocabulary, values, unclear = _read(path)
    if unclear:
        number, kind = unclear
        raise UserError(
            f"{path}: line {number} is {kind}, and a pixel's value is a class's line counted from 0, so it is open "
            f'whether that line counts; remove it, or put its number before every class ("0: {vocabulary.names[0]}")'
        )
    return ClassList(vocabulary, values)


def means_unlabelled(value: int, classes: Collection[int]) -> bool:
    """Return whether `value`, the largest that label files can hold, means unlabelled.

    It does unless a list numbers it as a class. `classes` has the values of the classes.
    """
    return value not in classes or len(classes) > value  # so many classes need 16 bits, so that none is numbered so


def read_class_names(path: Path) -> Vocabulary:
    """Read the names of classes and their order; numbers before them are dropped."""
    return _read(path)[0]


def _read(path: Path) -> tuple[Vocabulary, tuple[int, ...], tuple[int, str] | None]:
    """Return the words, their values, and the first line that may or may not count: (line number, its kind)."""
    try:
        text = read_text(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if text.lstrip()[:1] in ("[", "{"):  # JSON, whose lines are not the classes
        listed = Vocabulary.from_file(path)
        return listed, tuple(range(len(listed.names))), None
    lines = text.splitlines()
    contents = [_COMMENT.split(line, maxsplit=1)[0].strip() for line in lines]
    classes = [(number, content) for number, content in enumerate(contents, 1) if content]
    numbered = [match for _, content in classes if (match := _NUMBERED.fullmatch(content))]
    if classes and len(numbered) == len(classes) and (len(classes) > 1 or _SURELY_NUMBERED.match(classes[0][1])):
        values = tuple(int(match[1]) for match in numbered)
        if len(set(values)) == len(values):
            try:
                return Vocabulary.parse([without_quotes(match[2].strip()) for match in numbered]), values, None
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        again = next(value for index, value in enumerate(values) if value in values[:index])
        raise UserError(f"{path}: two classes have the number {again}")
    if mixed := [number for number, content in classes if _SURELY_NUMBERED.match(content)]:
        plain = next(number for number, content in classes if not _NUMBERED.fullmatch(content))
        raise UserError(
            f"{path}: line {mixed[0]} has a number before the class, line {plain} has none; number all or none"
        )
    vocabulary = Vocabulary.from_file(path)
    unclear = next(
        (
            (number, "a comment" if lines[number - 1].strip() else "blank")
            for number in range(1, classes[-1][0])
            if not contents[number - 1]
        ),
        None,
    )
    return vocabulary, tuple(range(len(classes))), unclear
