"""The ledger of a results folder: manifest.sqlite, beside the results.

It has a row for each image whose files are complete, with the settings (model, words) that they were made with. When a
run begins, rows that no longer hold are removed; files that somebody has changed since are renamed to NAME.changed.
"""

import hashlib
import json
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensan.buckets import Status, bucket_path
from opensan.errors import UserError
from opensan.files import absolute, hold, keep_aside, remove_temporaries
from opensan.journal import Journal, as_json, difference
from opensan.vocabulary import Vocabulary

if TYPE_CHECKING:
    from opensan.segmenters.base import Segmenter

NAME = "manifest.sqlite"
LOCK = ".opensan.lock"
BEFORE = "manifest.jsonl"
"""Name of the ledger of version 0.1.0, which is read once and converted."""

LONGEST_WAIT = 60.0
"""Seconds that a raster or a video waits while others make their entries."""

VERSION = 1
"""Version of the outputs, to be increased when the same words and model give other files."""

_SETTINGS, _IMAGE = "settings ", "image "
"""Prefixes of the journal's keys."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """State of a file: its size, time of change, and checksum of its content; in a bucket, of its version there."""

    size: int
    mtime_ns: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """Read the file. Raises OSError if it can't be read."""
        stat = path.stat()
        if isinstance(stat, Status):  # what the store says is enough: no file is fetched twice
            return cls(stat.st_size, stat.st_mtime_ns, stat.version)
        return cls(stat.st_size, stat.st_mtime_ns, _checksum(path))

    def still_holds(self, path: Path) -> bool:
        """Return whether the file is unchanged; with another time, as of a copy, its content is compared."""
        try:
            stat = path.stat()
            if stat.st_size != self.size:
                return False
            if isinstance(stat, Status):
                return stat.version == self.crc32
            return stat.st_mtime_ns == self.mtime_ns or _checksum(path) == self.crc32
        except OSError:
            return False

    @property
    def plain(self) -> list[int]:
        """Plain data for JSON."""
        return [self.size, self.mtime_ns, self.crc32]


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


@dataclass(frozen=True, slots=True)
class Record:
    """The results of an image."""

    stem: str
    """The beginning of its results' paths, relative to the folder for all results."""
    image: str
    source: Stamp
    settings: str
    """The key of the settings it was made with."""
    files: Mapping[str, Stamp]
    """State of each file, by path relative to the results."""

    @property
    def plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        files = {path: stamp.plain for path, stamp in self.files.items()}
        return {
            "place": self.stem,
            "image": self.image,
            "source": self.source.plain,
            "settings": self.settings,
            "files": files,
        }

    @classmethod
    def parse(cls, data: Any) -> "Record | None":
        """Read data that `plain` returned; None for other data, such as a path that leads out of the results."""
        try:
            stamps = {path: Stamp(*map(int, stamp)) for path, stamp in data["files"].items()}
            if any(Path(path).anchor or ".." in Path(path).parts for path in (data["place"], *stamps)):
                return None
            return cls(data["place"], data["image"], Stamp(*map(int, data["source"])), data["settings"], stamps)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def is_complete(self, image: Path, out: Path, paths: Iterable[str]) -> bool:
        """Return whether the image and all files are unchanged, and these `paths` are among them."""
        return (
            self.source.still_holds(image)
            and set(paths) <= self.files.keys()
            and all(stamp.still_holds(out / path) for path, stamp in self.files.items())
        )

    def keep_changed(self, out: Path) -> int:
        """Rename the files that somebody has changed, before they are made again; return their number."""
        changed = [
            file
            for file, stamp in ((out / path, stamp) for path, stamp in self.files.items())
            if file.is_file() and not _is_link(file, Path(self.image)) and not stamp.still_holds(file)
        ]
        for file in changed:
            keep_aside(file)
        return len(changed)


def _is_link(file: Path, image: Path) -> bool:
    """Tell whether a file is a link, of either kind, to the image: it changes with that, and nobody changed it."""
    return file.is_symlink() or (image.exists() and file.samefile(image))


def settings_of(segmenter: "Segmenter", vocabulary: Vocabulary, threshold: float = 0.0) -> dict[str, Any]:
    """Return all that labels depend on, besides the image, as plain data; `threshold` is that of confidence."""
    calibration = getattr(segmenter, "calibration", None)
    more = {"threshold": threshold} if threshold else {}
    return {
        "model": str(segmenter.identity),
        "vocabulary": vocabulary.to_dict(),
        "speed": str(getattr(segmenter, "speed", "")),
        "dtype": str(getattr(segmenter, "dtype", "")).removeprefix("torch."),
        "version": VERSION,
        **more,
        **({} if calibration is None else {"calibration": calibration.to_dict()}),
    }


def settings_key(settings: Mapping[str, Any]) -> str:
    """Return the key of settings; equal settings have equal keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Ledger:
    """The ledger of a folder of results. Use as a context manager; one run at a time can."""

    def __init__(self, out: Path, *, wait: float = 0) -> None:
        """`out` is an existing folder; `wait` is the time in seconds to wait for another run there."""
        self.out = out
        self._wait = wait
        self.records: dict[str, Record] = {}
        """Records by stem."""
        self._settings: dict[str, Any] = {}
        self.notes: list[str] = []
        """Messages for the user about it; each one line."""

    def __enter__(self) -> "Ledger":
        """Raise UserError if another run holds it."""
        busy = f"{self.out}: another run is writing there; wait for it, or choose another --out"
        with ExitStack() as stack:
            stack.enter_context(hold(self.out / LOCK, busy, wait=self._wait))
            self._journal = stack.enter_context(Journal(self.out / NAME))
            if self._journal.damaged:
                self.notes.append(f"{self.out / NAME}: was damaged, kept as {self._journal.damaged.name}")
            self._take_over()
            for key, value in self._journal.items():
                if key.startswith(_SETTINGS):
                    self._settings[key.removeprefix(_SETTINGS)] = value
                elif record := Record.parse(value):
                    self.records[record.stem] = record
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _take_over(self) -> None:
        """Read the ledger of an earlier version, if there is one."""
        old = self.out / BEFORE
        if not old.is_file():
            return
        rows = []
        for line in old.read_bytes().splitlines():
            try:
                data = json.loads(line)
            except ValueError:
                continue  # the half line of a killed run
            if record := Record.parse(data):
                rows.append((_IMAGE + record.stem, record.plain, b""))
            elif isinstance(data, dict) and "settings_key" in data:
                rows.append((_SETTINGS + str(data.pop("settings_key")), data, b""))
        self._journal.put_all(rows)
        old.unlink()
        self.notes.append(f"{old}: of an earlier version; what it says of {len(rows)} results is now in {NAME}")

    def of_another(self, stem: str, image: Path) -> str | None:
        """Return the image whose results have this stem, if it is another one: of another path and content."""
        record = self.records.get(stem)
        if record is None or record.source.still_holds(image):
            return None
        if absolute(bucket_path(record.image) or Path(record.image)) == absolute(image):
            return None
        return record.image

    def begin(
        self, settings: Mapping[str, Any], wanted: Mapping[str, tuple[Path, list[str]]], *, again: bool = False
    ) -> list[str]:
        """Return the stems, in order, whose files are not complete, and so remain to be done; with `again`, all.

        `wanted` has the image and its files' paths of each stem. Of the stems that are to be done, what the ledger
        says is forgotten, and what somebody has changed is kept aside; `notes` tell how many.
        """
        settings = as_json(settings)
        key, paths = settings_key(settings), [path for _, files in wanted.values() for path in files]
        self.remove_left_over(paths)
        pending: list[str] = []
        stale: list[str] = []
        others: Counter[str] = Counter()
        kept = 0
        for stem, (image, files) in wanted.items():
            record = self.records.get(stem)
            if record is None:
                pending.append(stem)
                continue
            if again:
                pass
            elif record.settings != key:
                others[difference(self._settings.get(record.settings), settings)] += 1
            elif record.is_complete(image, self.out, files):
                continue
            pending.append(stem)
            stale.append(stem)
            kept += record.keep_changed(self.out)
            del self.records[stem]  # its files are about to be replaced
        self._journal.forget(_IMAGE + stem for stem in stale)
        used = {record.settings for record in self.records.values()}
        self._journal.forget(_SETTINGS + old for old in self._settings.keys() - used)
        self._journal.put(_SETTINGS + key, settings)
        self._settings[key] = settings
        for reason, count in others.items():
            self.notes.append(f"{count} of {len(wanted)} images were done with {reason}: they are done again")
        if kept:
            self.notes.append(f"{kept} results were changed since they were written: kept as *.changed")
        return pending

    def remove_left_over(self, paths: Iterable[str]) -> None:
        """Remove temporary files that a killed run left beside `paths` (below the results)."""
        targets: dict[Path, set[str]] = defaultdict(set)
        for path in paths:
            targets[(self.out / path).parent].add(Path(path).name)
        for folder, names in targets.items():
            remove_temporaries(folder, names)

    def add(self, record: Record) -> None:
        """Record that an image's files are complete. Threads may call it."""
        self.add_all([record])

    def add_all(self, records: Iterable[Record]) -> None:
        """Record that the files of several images are complete: one transaction, as each waits for the disk."""
        added = {record.stem: record for record in records}
        self._journal.put_all((_IMAGE + stem, record.plain, b"") for stem, record in added.items())
        self.records.update(added)


class SingleResult:
    """The entry of one raster or video in the ledger of its results' folder, which is locked only briefly.

    So several may be worked on at a time. Their unfinished work has journals of its own.
    """

    def __init__(self, out: Path, image: Path, stat: os.stat_result, end: str, settings: Mapping[str, Any]) -> None:
        """Choose the name of its results: the image's stem; its whole name, if the stem is that of another image's.

        `stat` is of the image before it was opened; `end` is that of its main file, ".labels.tif". Raises UserError if
        results of another image have both names.
        """
        self._out, self._image, self._settings = out, image, settings
        self.source = Stamp(stat.st_size, stat.st_mtime_ns, 0)  # a checksum of all of it would take long
        records = {}
        if (out / NAME).exists() or (out / BEFORE).exists():
            with Ledger(out, wait=LONGEST_WAIT) as ledger:
                records = ledger.records
        free = [
            name
            for name in (image.stem, image.name)
            if (record := records.get(f"{name}{end}")) is None or self._is_of(record)
        ]
        if not free:
            other = records[f"{image.name}{end}"].image
            raise UserError(f"{out}: holds the results of {other}, which have the same names; choose another --out")
        self.name = free[0]
        """The beginning of its files' names."""
        self._place = f"{self.name}{end}"

    def _is_of(self, record: Record) -> bool:
        return record.image == str(self._image.absolute()) or record.source == self.source

    def replace(self, paths: Iterable[Path]) -> list[str]:
        """Prepare for new results at `paths`: earlier files that somebody has changed are renamed.

        Returns lines for the user.
        """
        with Ledger(self._out, wait=LONGEST_WAIT) as ledger:
            files = [path.relative_to(self._out).as_posix() for path in paths]
            ledger.begin(self._settings, {self._place: (self._image, files)})
            return ledger.notes

    def add(self, paths: Iterable[Path]) -> None:
        """Record that the results at `paths` are complete."""
        files = {path.relative_to(self._out).as_posix(): Stamp.of(path) for path in paths}
        image, key = str(self._image.absolute()), settings_key(self._settings)
        with Ledger(self._out, wait=LONGEST_WAIT) as ledger:
            ledger.add(Record(self._place, image, self.source, key, files))
