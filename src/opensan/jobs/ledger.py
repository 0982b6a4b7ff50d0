"""What was made of which photograph: manifest.jsonl, beside the results.

A line of JSON a photograph, and one for each settings (model, words) that lines refer to. Lines are only ever appended
while a run goes on; when one begins, the file is written anew, all or nothing, without what no longer holds.
"""

import hashlib
import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from opensan.errors import UserError
from opensan.files import TRIAL, atomic_path

NAME = "manifest.jsonl"

_VERSION = 1
"""Of what is written: to be raised when the same words and model give other files."""


@dataclass(frozen=True)
class Settings:
    """All that decides what the files hold, besides the photograph."""

    model: str
    """Fingerprint of the weights."""
    vocabulary: Mapping[str, Any]
    speed: str
    dtype: str
    version: int = _VERSION

    @property
    def key(self) -> str:
        """Equal settings have equal keys."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, before: "Settings | None") -> str:
        """ "another model, other words": how `before` differed."""
        if before is None:
            return "other settings"
        changes = {"model": "another model", "vocabulary": "other words"}
        fields = [name for name, value in asdict(self).items() if asdict(before)[name] != value]
        return ", ".join(changes.get(name, f"another {name}") for name in fields)


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file as it was: its size, time of change, and checksum of its content."""

    size: int
    mtime_ns: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """Raises OSError if it can't be read."""
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns, _checksum(path))

    def still_holds(self, path: Path) -> bool:
        """Whether the file is as it was; a copy, with a time of its own, is compared by its content."""
        try:
            stat = path.stat()
            if stat.st_size != self.size:
                return False
            return stat.st_mtime_ns == self.mtime_ns or _checksum(path) == self.crc32
        except OSError:
            return False


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


@dataclass(frozen=True, slots=True)
class Record:
    """What was made of a photograph."""

    place: str
    image: str
    source: Stamp
    settings: str
    """The key of the settings it was made with."""
    files: Mapping[str, Stamp]
    """By path below the results."""

    def keep_changed(self, out: Path) -> int:
        """Rename those of the files that somebody has changed, before they are made anew; how many there were."""
        count = 0
        for path, stamp in self.files.items():
            file = out / path
            if file.is_file() and not file.is_symlink() and not stamp.still_holds(file):
                file.rename(_unused(file))
                count += 1
        return count


def _unused(file: Path) -> Path:
    """ "x.png.changed", or with a number."""
    name, number = file.with_name(f"{file.name}.changed"), 1
    while name.exists():
        number += 1
        name = file.with_name(f"{file.name}.changed{number}")
    return name


class Manifest:
    """The manifest of a folder of results, held by one run at a time."""

    def __init__(self, out: Path) -> None:
        """Raises ValueError, one line, if another run holds it."""
        self._path = out / NAME
        self._lock = FileLock(out / ".opensan.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{out}: another run is writing there; wait for it, or choose another --out") from None
        self.settings: dict[str, Settings] = {}
        self.records: dict[str, Record] = {}
        """By place."""
        self._file: FileIO | None = None
        if self._path.exists():
            self._read()

    def _read(self) -> None:
        with self._path.open("rb") as file:
            for line in file:
                try:
                    self._take(json.loads(line))
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue  # half a line of a killed run: that photograph is done again

    def _take(self, data: Mapping[str, Any]) -> None:
        if "settings_key" in data:
            key = data.pop("settings_key")
            self.settings[key] = Settings(**data)
            return
        stamps = {path: Stamp(*map(int, stamp)) for path, stamp in data["files"].items()}
        if any(Path(path).anchor or ".." in Path(path).parts for path in stamps):
            raise UserError("a path that leads out of the results")
        source = Stamp(*map(int, data["source"]))
        self.records[data["place"]] = Record(data["place"], data["image"], source, data["settings"], stamps)

    def begin(self, settings: Settings) -> None:
        """Write the manifest anew with `records` as they are now, and open it for more."""
        self.settings[settings.key] = settings
        used = {settings.key, *(record.settings for record in self.records.values())}
        with atomic_path(self._path) as temporary, temporary.open("wb") as file:
            for key, one in self.settings.items():
                if key in used:
                    file.write(_line({"settings_key": key, **asdict(one)}))
            for record in self.records.values():
                file.write(_record_line(record))
        self._file = self._path.open("ab", buffering=0)

    def append(self, record: Record) -> None:
        """Say that a photograph's files are complete."""
        self.records[record.place] = record
        line = _record_line(record)
        if self._file.write(line) < len(line):
            raise UserError(f"{self._path}: cannot write there (the disk is full)")

    def close(self) -> None:
        """Leave it to the next run."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._lock.release()


def _record_line(record: Record) -> bytes:
    stamps = {path: _plain(stamp) for path, stamp in record.files.items()}
    return _line(
        {
            "place": record.place,
            "image": record.image,
            "source": _plain(record.source),
            "settings": record.settings,
            "files": stamps,
        }
    )


def _plain(stamp: Stamp) -> list[int]:
    return [stamp.size, stamp.mtime_ns, stamp.crc32]


def _line(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"


# As `files.atomic_path` names them, and `files.link`.
_TEMPORARY = re.compile(r"\.(?P<stem>.+)\.[a-z0-9_]{8}\.part(?P<suffix>\.[^.]*)?")
_TEMPORARY_LINK = re.compile(r"\.(?P<name>.+)\.part")


def remove_left_over(out: Path, paths: Iterable[str]) -> None:
    """Remove temporary files that a killed run left beside `paths` (below `out`): theirs, the manifest's, trials."""
    targets: dict[Path, set[str]] = defaultdict(set)
    targets[out].add(NAME)
    for path in paths:
        targets[(out / path).parent].add(Path(path).name)
    for folder, names in targets.items():
        if folder.is_dir():
            for entry in os.scandir(folder):
                if _target_of(entry.name) & (names | {TRIAL}):
                    Path(entry.path).unlink(missing_ok=True)


def _target_of(name: str) -> set[str]:
    """The names of the files that a temporary file of this name may become."""
    names = set()
    if match := _TEMPORARY.fullmatch(name):
        names.add(match["stem"] + (match["suffix"] or ""))
    if match := _TEMPORARY_LINK.fullmatch(name):
        names.add(match["name"])
    return names
