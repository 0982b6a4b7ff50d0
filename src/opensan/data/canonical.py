"""Read and write a prepared folder's records: manifest.json and files.jsonl, beside `segmentation_folder`'s layout.

manifest.json       source, options, counts, and records that were left out; written last
files.jsonl         a line an image: its files with sizes and checksums, sorted by name
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
    """Return `name` if it is a plain file name. Raises UserError if it could lead to another folder or be hidden."""
    odd = any(character in '/\\:*?"<>|' or not character.isprintable() for character in name)
    if not name or odd or name.startswith(".") or name != name.strip() or len(name.encode()) > 200:
        raise UserError(f"{name[:80]!r} is no plain file name (no separators, no leading dot, at most 200 bytes)")
    return name


PlainName = Annotated[str, AfterValidator(check_name)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Request(Config):
    """The arguments of a preparation. The same request continues a folder; another one needs another folder."""

    source: str
    """The reader's name."""
    options: dict[str, str]
    splits: tuple[PlainName, ...] | None
    """The requested splits; None for all."""
    classes: tuple[str, ...]
    """The lines of classes.txt."""


class ClassCount(Config):
    """Images and pixels of a class in a set."""

    images: Annotated[int, Field(ge=0)]
    pixels: Annotated[int, Field(ge=0)]


class DatasetManifest(Config):
    """A prepared folder's manifest.json."""

    format: Literal[1] = 1
    request: Request
    label_set: str | None
    """The ready label set with the same classes, if there is one."""
    evaluation_split: str | None
    """The list for evaluation."""
    splits: dict[PlainName, int]
    """Images in each list."""
    photographs: int
    """Images in the set, each counted once."""
    files_sha256: Sha256
    """Checksum of files.jsonl."""
    left_out: dict[str, str]
    """Images, files and records that could not be used: name -> reason."""
    notes: tuple[str, ...] = ()
    """Decisions about the whole set."""
    counts: tuple[ClassCount, ...] = ()
    """Counts of each class, in order; empty in folders that an earlier version wrote."""
    pixels: Annotated[int, Field(ge=0)] = 0
    """Pixels of all images, unlabelled ones included."""


class FileRecord(Config):
    """One file of a prepared folder."""

    file: PlainName
    """Its name in images/ or labels/."""
    size: Annotated[int, Field(ge=0)]
    """Size in bytes."""
    sha256: Sha256


class ImageRecord(Config):
    """A line of files.jsonl."""

    name: PlainName
    width: int
    height: int
    image: FileRecord
    label: FileRecord
    classes: tuple[tuple[int, int], ...] | None = None
    """(label, number of pixels) of the classes in it; None in folders that an earlier version wrote."""
    objects: FileRecord | None = None
    """The map of its objects, in objects/; None where the reader knows none."""
    left_out: tuple[str, ...] = ()
    """The records of this image that could not be used, each with the reason."""


def file_record(path: Path) -> FileRecord:
    """Return size and checksum of a file (links are followed)."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file=path.name, size=file.tell(), sha256=digest)


def class_pixels(values: np.ndarray, classes: int) -> tuple[tuple[int, int], ...]:
    """Return (label, number of pixels) of the classes in an index map [H, W], where larger values are unlabelled."""
    counts = np.bincount(values.ravel(), minlength=classes)[:classes]
    return tuple((int(label), int(counts[label])) for label in np.flatnonzero(counts))


def class_counts(records: Iterable[ImageRecord], classes: int) -> tuple[ClassCount, ...]:
    """Count images and pixels of each class over `records`."""
    images, pixels = [0] * classes, [0] * classes
    for record in records:
        for label, count in record.classes or ():
            images[label] += 1
            pixels[label] += count
    return tuple(ClassCount(images=one, pixels=other) for one, other in zip(images, pixels, strict=True))


def read_manifest(root: str | Path) -> DatasetManifest | None:
    """Read the manifest of a folder; None if it has none. Raises UserError on one that can't be used."""
    path = Path(root) / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable manifest ({error})") from None
    return parse_config(DatasetManifest, data, str(path))


def write_manifest(root: Path, manifest: DatasetManifest) -> None:
    """Write `manifest` to the folder, all or nothing."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    write_text(root / MANIFEST, text + "\n")


def parse_record(line: str, source: str) -> ImageRecord:
    """Parse a line of files.jsonl. Raises UserError, beginning with `source`, if it is not one."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON ({error})") from None
    return parse_config(ImageRecord, data, source)


def read_records(path: Path) -> Iterator[ImageRecord]:
    """Read the records of a files.jsonl."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            yield parse_record(line, f"{path}: line {number}")


def write_records(path: Path, records: Iterable[ImageRecord]) -> None:
    """Write a files.jsonl, all or nothing."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(record.model_dump_json() + "\n" for record in records)
