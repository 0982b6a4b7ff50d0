"""Keep an evaluation's progress on disk, so that after an interruption each image is counted exactly once.

Every process keeps a journal of its own, with a row for each image. The evaluation's counts are the sum of all
journals, whoever wrote them: processes may be killed, and others, more or fewer, may continue.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from opensan.evaluation.confidence import BINS, ConfidenceCounts, Confidences
from opensan.evaluation.metrics import Counts, ImageCounts
from opensan.journal import Journal, difference

_PREDICTIONS = "predictions "
_CONFIDENCE = "confidence "


class Progress:
    """The counts of one process. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """`path` is its journal; see `open_progress`, which comes first."""
        self._journal = Journal(path)
        self._rows: list[tuple[str, object, bytes]] = []
        self.unsaved_bytes = 0
        """Of predictions that are not yet on disk."""
        self.broken: dict[int, str] = {}
        """Index of an image -> why it could not be measured. Not kept: a later run tries again."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._journal.close()

    def begin(self, work: Mapping[str, object]) -> None:
        """Identify the evaluation, and keep only progress of the same one."""
        self._journal.begin(work)

    def add(
        self, index: int, counts: ImageCounts, predictions: list[str], confidence: ConfidenceCounts | None = None
    ) -> None:
        """Add an image's counts, and the JSON entries of its prediction and counts of its confidence if wanted."""
        if confidence is not None:
            arrays = confidence.index, confidence.pixels
            data = b"".join(np.ascontiguousarray(array, dtype="<i8").tobytes() for array in arrays)
            self._rows.append((f"{_CONFIDENCE}{index:08}", confidence.sums.tolist(), data))
        self._rows.append((f"{index:08}", [len(counts.pairs), len(counts.band_classes)], _bytes(counts)))
        if predictions:
            text = "\n".join(predictions).encode()
            self._rows.append((f"{_PREDICTIONS}{index:08}", None, text))
            self.unsaved_bytes += len(text)

    def save(self) -> None:
        """Have all that was added on disk, together."""
        if self._rows:
            self._journal.put_all(self._rows)
            self._rows, self.unsaved_bytes = [], 0


def open_progress(folder: Path, work: Mapping[str, object]) -> str | None:
    """Prepare `folder` for the evaluation that `work` describes; the progress of another evaluation is removed.

    Returns in what the other evaluation differed, if there was one.
    """
    other = None
    if (folder / "key.json").exists():  # of version 0.1.0
        shutil.rmtree(folder)
        other = "another version"
    folder.mkdir(parents=True, exist_ok=True)
    for path in [journal_path(folder, 0), *_journals(folder)]:
        with Journal(path) as journal:
            if journal.damaged:
                journal.damaged.unlink()
            before = journal.begin(work)
        other = other if before is None else difference(before, work)
    return other


def journal_path(folder: Path, rank: int) -> Path:
    """Return the path of one process's journal."""
    return folder / f"rank-{rank:04}.sqlite"


def _journals(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank-*.sqlite"))


@dataclass(frozen=True)
class Whole:
    """All processes' progress together."""

    counts: Counts
    figures: dict[int, tuple[float, float]]
    """Index of an image -> its own mIoU (classes in the ground truth) and pixel accuracy."""
    confidences: Confidences
    """Counts of confidence; zeros if it is not measured."""


def read_all(folder: Path, num_classes: int, confidence: bool = False) -> Whole:
    """Sum up the counts of every process that ever worked on this evaluation, those of `confidence` if it is measured.

    A damaged row is ignored, so that its image is measured again.
    """
    whole = Whole(Counts(num_classes), {}, Confidences(num_classes))
    for path in _journals(folder):
        with Journal(path) as journal:
            for key, value in journal.items():
                if key.isdecimal() and int(key) not in whole.figures:
                    counts = _counts(value, journal.data(key), num_classes)
                    sure = f"{_CONFIDENCE}{key}"
                    more = _confidence(journal.get(sure), journal.data(sure), num_classes) if confidence else None
                    if counts is not None and (more is not None or not confidence):
                        if more is not None:
                            whole.confidences.add(more)
                        whole.counts.add(counts)
                        whole.figures[int(key)] = counts.figures(num_classes)
    return whole


def images_behind(folder: Path, num_classes: int, pairs: Sequence[int], most: int = 5) -> list[list[tuple[int, int]]]:
    """Return for each pair of classes the images with the most of its pixels: (pixels, index), most pixels first.

    `pairs` are flat indices of the confusion matrix's entries.
    """
    found: list[dict[int, int]] = [{} for _ in pairs]
    for path in _journals(folder):
        with Journal(path) as journal:
            for key, value in journal.items():
                counts = _counts(value, journal.data(key), num_classes) if key.isdecimal() else None
                if counts is None:
                    continue
                of_image = dict(zip(counts.pairs.tolist(), counts.pixels.tolist(), strict=True))
                for images, pair in zip(found, pairs, strict=True):
                    if pair in of_image:
                        images[int(key)] = of_image[pair]
                        if len(images) > 2 * most:
                            _keep_most(images, most)
    for images in found:
        _keep_most(images, most)
    return [[(pixels, index) for index, pixels in images.items()] for images in found]


def _keep_most(images: dict[int, int], most: int) -> None:
    """Keep only the images with the most pixels, in that order; of equal ones the first."""
    order = sorted(images.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
    images.clear()
    images.update(order)


def read_predictions(folder: Path) -> Iterator[str]:
    """Read the JSON entries of all saved predictions, in the images' order."""
    with ExitStack() as stack:
        rows: dict[str, Journal] = {}
        for path in _journals(folder):
            journal = stack.enter_context(Journal(path))
            rows |= {key: journal for key, _ in journal.items() if key.startswith(_PREDICTIONS)}
        for key in sorted(rows):
            yield from rows[key].data(key).decode().splitlines()


def _bytes(counts: ImageCounts) -> bytes:
    arrays = (counts.pairs, counts.pixels, counts.band_classes, counts.bands)
    return b"".join(np.ascontiguousarray(array, dtype="<i8").tobytes() for array in arrays)


def _counts(lengths: object, data: bytes, num_classes: int) -> ImageCounts | None:
    """Read an image's counts that `_bytes` wrote; None from other bytes."""
    if not (isinstance(lengths, list) and [type(length) for length in lengths] == [int, int]):
        return None
    pairs, classes = lengths
    if min(lengths) < 0 or len(data) != 8 * (2 * pairs + 4 * classes):
        return None
    values = np.frombuffer(data, dtype="<i8").astype(np.int64)
    length, two, three, four = np.split(values, np.cumsum([pairs, pairs, classes]))
    fits = values.min(initial=0) >= 0 and length.max(initial=0) < num_classes * (num_classes + 1)
    if not fits or three.max(initial=0) >= num_classes:
        return None
    return ImageCounts(length, two, three, four.reshape(classes, 3))


def _confidence(sums: object, data: bytes, num_classes: int) -> ConfidenceCounts | None:
    """Read an image's counts of confidence that `Progress.add` wrote; None from other values."""
    numbers = sums if isinstance(sums, list) and all(type(value) in (int, float) for value in sums) else []
    if len(numbers) != BINS or len(data) % 32 or not 0 <= min(numbers) <= max(numbers) < math.inf:
        return None
    values = np.frombuffer(data, dtype="<i8").astype(np.int64)
    index, pixels = values[: len(values) // 4], values[len(values) // 4 :].reshape(-1, 3)
    if values.min(initial=0) < 0 or index.max(initial=0) >= BINS * num_classes:
        return None
    return ConfidenceCounts(index, pixels, np.array(numbers, dtype=np.float64))
