"""Check that a prepared folder is complete: lists, images, labels, sizes, values, checksums."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensan.data import canonical
from opensan.data.canonical import ClassCount, DatasetManifest, FileRecord, ImageRecord
from opensan.data.class_list import read_class_list
from opensan.data.pool import run_all
from opensan.data.prepare import READERS, Reader
from opensan.data.segmentation_folder import find_listed, label_file, label_table, read_labelled
from opensan.errors import UserError
from opensan.vocabulary import Vocabulary


class FolderCheck:
    """A check of one folder in the canonical layout. Lists and manifest are checked when it is created."""

    def __init__(self, root: Path) -> None:
        """Raises ValueError if the folder has no such layout at all, or a manifest that can't be read."""
        self.manifest = canonical.read_manifest(root)
        """None if `opensan data prepare` did not write the folder; then no counts and checksums are compared."""
        self.problems: list[str] = []
        """One line for each problem, naming the file; empty if there is none."""
        self._classes = read_class_list(_part(root, "classes.txt"))
        self._vocabulary = self._classes.vocabulary
        self._splits: dict[str, list[Path]] = {}
        for split in self._lists(root):
            self._splits[split], missing = find_listed(root, split)
            self.problems += [f"{split}.txt: {name} is not in images/" for name in missing]
        self._files = list(dict.fromkeys(file for files in self._splits.values() for file in files))
        self._bad: set[Path] = set()
        self.counts: tuple[ClassCount, ...] = self.manifest.counts if self.manifest else ()
        """Counts of each class; without a manifest, known after the labels were checked."""
        self.pixels = self.manifest.pixels if self.manifest else 0
        """Pixels of all images, unlabelled ones included."""
        self._records: dict[str, ImageRecord] | None = None
        if self.manifest is not None:
            self.problems += _compared(root, self.manifest, self._vocabulary, self.splits)
            self._records = {record.image.file: record for record in _records(root)}
            self.problems += _strangers(root, self._files)

    def _lists(self, root: Path) -> list[str]:
        """Return the existing split lists: the manifest's, or all .txt files."""
        there = sorted(path.stem for path in root.glob("*.txt") if path.name != "classes.txt")
        if not there:
            raise UserError(f"{root}: has no split list such as val.txt")
        return there if self.manifest is None else [split for split in there if split in self.manifest.splits]

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes, in order."""
        return [word.name for word in self._vocabulary.words]

    def __len__(self) -> int:
        """Return the number of images to check."""
        return len(self._files)

    @property
    def splits(self) -> dict[str, int]:
        """Usable images in each list, as far as is known."""
        return {split: sum(file not in self._bad for file in files) for split, files in self._splits.items()}

    def look(self, *, quick: bool = False, workers: int = 1, progress: Callable[[int], None] = lambda _: None) -> None:
        """Check every image and its labels, and then the set as a whole; add problems to `problems`.

        Args:
            quick: check only that files exist and have the size in the manifest; decode none.
            workers: processes.
            progress: called with the number of finished images.
        """
        words = len(self._vocabulary.words)
        values = label_table(self._classes.values, range(words))
        recorded = self._records is not None
        records = self._records or {}
        tasks = [_Task(file, values, words, records.get(file.name), recorded, quick) for file in self._files]
        images, pixels = np.zeros(words, dtype=np.int64), np.zeros(words, dtype=np.int64)
        total = 0
        with closing(run_all(tasks, workers)) as results:
            for file, result in zip(self._files, results, strict=True):
                if isinstance(result, str):
                    self.problems.append(result)
                    self._bad.add(file)
                elif result is not None:
                    total += int(result.sum())
                    images += result[:-1] > 0
                    pixels += result[:-1]
                progress(1)
        if not quick:
            counted = zip(images.tolist(), pixels.tolist(), strict=True)
            self.counts = tuple(ClassCount(images=one, pixels=other) for one, other in counted)
            self.pixels = total
        self.problems += self._as_a_whole()

    def _as_a_whole(self) -> Iterator[str]:
        """Yield problems of the set as a whole."""
        if self.counts and len(self._files) > len(self._bad) and not any(count.pixels for count in self.counts):
            yield f"labels/: no pixel of {len(self._files):,} images is labelled"
        reader = READERS.get(self.manifest.request.source) if self.manifest else None
        if self.manifest is not None and reader is not None:
            yield from shortfalls(reader, self.manifest.splits, self.manifest.request.splits)


def shortfalls(reader: Reader, splits: Mapping[str, int], asked_for: Sequence[str] | None) -> Iterator[str]:
    """Yield the splits of a benchmark that have fewer images than published."""
    for split, expected in reader.expected.items():
        if asked_for is not None and split not in asked_for:
            continue
        count = splits.get(split, 0)
        if count < min(expected, reader.fewer.get(split, expected)):
            remedy = "" if count else "; if that is meant, prepare the other split alone with --split"
            yield f"{split}: {expected - count:,} of {expected:,} images are missing{remedy}"


def _part(root: Path, name: str) -> Path:
    if not (root / name).exists():
        raise UserError(
            f"{root}: not a prepared folder, it has no {name}; a download becomes one by opensan data prepare"
        )
    return root / name


def _compared(root: Path, manifest: DatasetManifest, vocabulary: Vocabulary, counts: dict[str, int]) -> Iterator[str]:
    """Yield the folder's differences from its manifest."""
    if vocabulary != Vocabulary.parse(list(manifest.request.classes)):
        yield "classes.txt: not the classes in the manifest"
    for split, count in manifest.splits.items():
        if counts.get(split) != count:
            yield f"{split}.txt: names {counts.get(split, 0):,} images in images/, the manifest {count:,}"
    files = root / canonical.FILES
    if not files.is_file() or canonical.file_record(files).sha256 != manifest.files_sha256:
        yield f"{files.name}: missing, or not the one that the manifest was written with"
    for name, reason in manifest.left_out.items():
        yield f"{name}: was left out when it was prepared: {reason}"


def _records(root: Path) -> Iterator[ImageRecord]:
    return canonical.read_records(root / canonical.FILES) if (root / canonical.FILES).is_file() else iter(())


_KEPT = re.compile(r"^\.|\.changed\d*$")
"""Hidden files, and those that somebody had changed before they were made again."""


def _strangers(root: Path, files: list[Path]) -> Iterator[str]:
    """Yield files that belong to no listed image."""
    expected = {file for image in files for file in (image, label_file(image))}
    for folder in ("images", "labels"):
        there = sorted(_part(root, folder).iterdir())
        strange = [file for file in there if file not in expected and not _KEPT.search(file.name)]
        if strange:
            yield f"{folder}/: {len(strange):,} files belong to no listed image, the first is {strange[0].name}"


@dataclass(frozen=True)
class _Task:
    """Check one image: return its problem, or the pixels of each word and unlabelled ones; None if `quick`."""

    image: Path
    values: np.ndarray
    words: int
    record: ImageRecord | None
    recorded: bool
    """Whether the folder has records, so that this image must have one."""
    quick: bool

    def __call__(self) -> str | np.ndarray | None:
        label = label_file(self.image)
        if self.image.is_symlink() and not self.image.exists():
            return f"{self.image}: the image it links to is missing ({self.image.readlink()})"
        if not label.exists():
            return f"{label}: missing"
        if self.recorded and self.record is None:
            return f"{self.image}: {canonical.FILES} does not have it"
        if self.record is not None:
            for file, expected in ((self.image, self.record.image), (label, self.record.label)):
                if changed := _difference(file, expected, self.quick):
                    return changed
        if self.quick:
            return None
        try:
            labels = read_labelled(self.image, label, self.values)[1]
        except UserError as error:
            return str(error)
        return np.bincount(np.where(labels < 0, self.words, labels).ravel(), minlength=self.words + 1)


def _difference(file: Path, expected: FileRecord, quick: bool) -> str | None:
    size = file.stat().st_size
    if size != expected.size:
        return f"{file}: has {size:,} bytes, had {expected.size:,} when it was prepared"
    if not quick and canonical.file_record(file).sha256 != expected.sha256:
        return f"{file}: its content has changed since it was prepared"
    return None
