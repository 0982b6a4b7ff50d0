"""What a prepared folder says of itself: manifest.json and files.jsonl, beside the layout of `segmentation_folder`.

manifest.json       what was prepared from what, counts, what was left out; written last
files.jsonl         a line a photograph: its files with sizes and checksums, sorted by name
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

from opensan.config import Config, parse_config
from opensan.errors import UserError
from opensan.files import atomic_path, write_text

MANIFEST = "manifest.json"
FILES = "files.jsonl"


def check_name(name: str) -> str:
    """`name`, if it can be a file's in a folder of ours. Raises ValueError if it could lead elsewhere or be hidden."""
    odd = any(character in '/\\:*?"<>|' or not character.isprintable() for character in name)
    if not name or odd or name.startswith(".") or name != name.strip() or len(name.encode()) > 200:
        raise UserError(f"{name[:80]!r} is no plain file name (no separators, no leading dot, at most 200 bytes)")
    return name


PlainName = Annotated[str, AfterValidator(check_name)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Request(Config):
    """What was asked for. The same request continues a folder; another one needs another folder."""

    source: str
    """The reader's name."""
    options: dict[str, str]
    splits: tuple[PlainName, ...] | None
    """The splits that were asked for; None is all."""
    classes: tuple[str, ...]
    """The lines of classes.txt."""


class ClassCount(Config):
    """How much of a class a set has."""

    images: Annotated[int, Field(ge=0)]
    pixels: Annotated[int, Field(ge=0)]


class DatasetManifest(Config):
    """A prepared folder's manifest.json."""

    format: Literal[1] = 1
    request: Request
    label_set: str | None
    """The ready label set that the classes are, if they are one."""
    evaluation_split: str | None
    """The list to measure on."""
    splits: dict[PlainName, int]
    """Photographs in each list."""
    photographs: int
    """Different ones."""
    files_sha256: Sha256
    """Of files.jsonl."""
    left_out: dict[str, str]
    """What could not be used: name of an image, file or record -> why."""
    notes: tuple[str, ...] = ()
    """What was decided for the whole set."""
    counts: tuple[ClassCount, ...] = ()
    """Of each class, in order; empty in folders that an earlier version wrote."""
    pixels: Annotated[int, Field(ge=0)] = 0
    """Of all images, unlabelled ones included."""


class FileRecord(Config):
    """One file of a prepared folder."""

    file: PlainName
    """Its name in images/ or labels/."""
    size: Annotated[int, Field(ge=0)]
    """In bytes."""
    sha256: Sha256


class PhotographRecord(Config):
    """A line of files.jsonl."""

    name: PlainName
    width: int
    height: int
    image: FileRecord
    label: FileRecord
    classes: tuple[tuple[int, int], ...] | None = None
    """(label, number of pixels) of the classes in it; None in folders that an earlier version wrote."""
    left_out: tuple[str, ...] = ()
    """The records of this image that could not be used: which, and why."""


def file_record(path: Path) -> FileRecord:
    """Size and checksum of a file (links are followed)."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file=path.name, size=file.tell(), sha256=digest)


def class_pixels(values: np.ndarray, classes: int) -> tuple[tuple[int, int], ...]:
    """(label, number of pixels) of the classes in an index map [H, W] of ours, where larger values are unlabelled."""
    counts = np.bincount(values.ravel(), minlength=classes)[:classes]
    return tuple((int(label), int(counts[label])) for label in np.flatnonzero(counts))


def class_counts(records: Iterable[PhotographRecord], classes: int) -> tuple[ClassCount, ...]:
    """What the images of `records` have of each class."""
    images, pixels = [0] * classes, [0] * classes
    for record in records:
        for label, count in record.classes or ():
            images[label] += 1
            pixels[label] += count
    return tuple(ClassCount(images=one, pixels=other) for one, other in zip(images, pixels, strict=True))


def read_manifest(root: str | Path) -> DatasetManifest | None:
    """The manifest of a folder; None if it has none. Raises ValueError, one line, on one that can't be used."""
    path = Path(root) / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable manifest ({error})") from None
    return parse_config(DatasetManifest, data, str(path))


def write_manifest(root: Path, manifest: DatasetManifest) -> None:
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    write_text(root / MANIFEST, text + "\n")


def parse_record(line: str, place: str) -> PhotographRecord:
    """A line of files.jsonl. Raises ValueError, beginning with `place`, on anything else."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})") from None
    return parse_config(PhotographRecord, data, place)


def read_records(path: Path) -> Iterator[PhotographRecord]:
    """The records of a files.jsonl."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            yield parse_record(line, f"{path}: line {number}")


def write_records(path: Path, records: Iterable[PhotographRecord]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(record.model_dump_json() + "\n" for record in records)
