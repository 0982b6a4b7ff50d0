"""Turn a clip into label frames, a table and an overlay video; memory does not grow with its length.

Reading, the model, drawing and writing go on at the same time, a few frames apart. Until all is complete, everything is
kept in a hidden folder beside the results, and a run that was stopped, however it was, goes on from there.
"""

import csv
import itertools
import os
import shutil
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from opensan import outputs
from opensan.assemble.calibration import checked_threshold
from opensan.errors import UserError
from opensan.files import flush_folder, hold, remove_temporaries
from opensan.jobs.folder import ADAPTS_ANEW, ahead
from opensan.jobs.ledger import SingleResult, settings_of
from opensan.jobs.video.reader import Frame, VideoReader, pyav, reason
from opensan.jobs.video.steady import Past, Steadier
from opensan.jobs.video.writer import Film
from opensan.journal import Journal, difference
from opensan.outputs.colours import palette
from opensan.outputs.drawing import blend
from opensan.segmenters.results import to_array
from opensan.vocabulary import Vocabulary

if TYPE_CHECKING:
    from opensan.segmenters.base import Segmenter
    from opensan.segmenters.results import InputImage

AHEAD = 2
"""Frames (or batches) that are read ahead, and that may wait to be drawn and to be written."""

DRAWERS = 2
"""Threads that draw."""

FRAMES_BETWEEN_NOTES = 16
"""Frames between records of the progress; as many are processed again if a run is killed."""


TABLE = ".frames.csv"
JOURNAL = "journal.sqlite"
_LABELLED = "labelled"
"""The journal's row: the number of the next frame (labels of earlier ones are on disk), and the steadier's state."""


@dataclass(frozen=True)
class Done:
    """Result for a finished frame."""

    number: int
    """Number of the frame, from 0, counting all frames of the clip."""
    seconds: float
    """Time in seconds since the first frame."""
    pixels: np.ndarray
    """[K] int: number of pixels of each word."""
    total: int
    """Number of pixels of the frame."""


@dataclass(frozen=True)
class _Read:
    frame: Frame
    image: "InputImage | None"
    """The frame's input; None if its labels exist already."""


@dataclass(frozen=True)
class _Labelled:
    frame: Frame
    labels: np.ndarray | None
    """[H0, W0] int32; None if they are on disk."""
    past: Past | None = None
    """The steadier's state after this frame."""


@dataclass(frozen=True)
class _Drawn:
    labelled: _Labelled
    picture: np.ndarray
    """[H0, W0, 3] uint8 RGB: the frame under its words' colours."""
    pixels: np.ndarray
    """[K] int."""


class VideoRun:
    """Segments a clip into a folder of results.

        with VideoRun(segmenter, Vocabulary.parse("road, sky"), Path("street.mp4"), Path("out")) as run:
            for done in run.results():
                print(done.seconds)

    Leaves STEM.overlay.mp4, STEM.labels/000000.png (label maps, by the number of the frame) and STEM.frames.csv; where
    another clip's results have that stem, they are named by the clip's whole name. Opening it raises UserError on a
    clip that can't be read, and on a folder that can't be written or that another run is writing the same results to.
    """

    def __init__(
        self,
        segmenter: "Segmenter",
        vocabulary: Vocabulary,
        path: Path,
        out: Path,
        *,
        every: int = 1,
        steady: bool = True,
        batch: int = 1,
        threshold: float = 0.0,
    ) -> None:
        """Label each `every`-th frame only, and write only these to the overlay video; compute `batch` together.

        Pixels of less confidence than `threshold`, in [0, 1], stay unlabelled.
        With `steady`, labels flicker less; without, a frame's labels are those that it would get as an image.
        """
        self._segmenter = segmenter
        self._vocabulary = vocabulary
        self._names = vocabulary.names
        self.path = path
        """The clip."""
        self._out = out
        self._every = every
        self._steadier = Steadier.of(segmenter) if steady else None
        self._batch = batch
        self._threshold = checked_threshold(threshold)
        self._name = path.stem
        self._latest: tuple[int, Past | None] | None = None
        """Progress of this run: number of frames, and the steadier's state after them."""
        self._published = False
        self.finished = 0
        """Number of frames whose labels exist from an earlier run, once this one is open: all with a lower number."""
        self.notes: list[str] = []
        """Messages for the user, once the run is open and once the results are complete; each one line."""
        self.done = 0
        """Number of frames that `results` has yielded."""
        self._pixels = np.zeros(len(self._names) + 1, dtype=np.int64)
        """Pixels of these frames: of each word, and of all."""

    @property
    def areas(self) -> dict[str, float]:
        """Each word's share of all pixels of the frames that `results` has yielded, in [0, 1]."""
        *pixels, total = self._pixels.tolist()
        return {name: count / max(total, 1) for name, count in zip(self._names, pixels, strict=True)}

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """Paths of overlay video, folder of label frames, and table."""
        overlay, labels, table = (self._out / f"{self._name}{end}" for end in (".overlay.mp4", ".labels", TABLE))
        return overlay, labels, table

    @property
    def count(self) -> int | None:
        """Number of frames to label, if the file tells its length."""
        total = self._clip.frame_count
        return total and -(-total // self._every)

    def __enter__(self) -> "VideoRun":
        with ExitStack() as stack:
            self._clip = stack.enter_context(VideoReader(self.path, max_pixels=self._segmenter.max_pixels))
            outputs.check_writable(self._out)
            work = self._work()
            self._result = SingleResult(self._out, self.path, self._clip.stat, TABLE, work)
            self._name = self._result.name
            self._part = self._out / f".{self._name}.part"
            self._labels = self._part / "labels"
            outputs.check_writable(self._labels)
            busy = f"{self._part}: another run is writing it; wait for it, or choose another --out"
            stack.enter_context(hold(self._part / "lock", busy))
            stack.callback(self._remove_if_published)
            self._journal = stack.enter_context(Journal(self._part / JOURNAL))
            self._look_at_earlier_work(work)
            if self.finished and self._segmenter.adapt == "keep":
                self.notes.append(ADAPTS_ANEW)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _remove_if_published(self) -> None:
        """Remove the lock's folder while the lock is held, also if no frame was done."""
        if self._published or (self._latest is None and self.finished == 0):
            shutil.rmtree(self._part, ignore_errors=True)

    def results(self) -> Generator[Done]:
        """Process the frames in order and yield their results; when the iterator ends, the files are complete.

        Raises ValueError, one line, if the clip turns out to be unusable or results can't be written. What was done by
        then is gone on with by the next run.
        """
        try:
            with (
                Film(self._part / "overlay.mp4", self._clip, self._names, background=self._has_background) as film,
                (self._part / "frames.csv").open("w", encoding="utf-8", newline="") as file,
            ):
                for done in self._frames(film, csv.writer(file)):
                    self.done += 1
                    self._pixels += [*done.pixels, done.total]
                    yield done
            self._publish()
        except (OSError, pyav().FFmpegError) as error:
            raise UserError(f"{self._out}: cannot write there ({reason(error)})") from None
        self.notes += film.notes
        if self._clip.damaged:
            self.notes.append(f"{self.path}: damaged in {self._clip.damaged} places; what can't be decoded is left out")
        if self._clip.ends_early:
            self.notes.append(f"{self.path}: {self._clip.ends_early}")

    @property
    def _has_background(self) -> bool:
        return len(self._vocabulary.words) > len(self._names) or self._threshold > 0

    def _frames(self, film: Film, table: Any) -> Iterator[Done]:
        table.writerow(["frame", "seconds", *self._names, "unlabelled"])
        drawing: deque[Future[_Drawn]] = deque()
        encoding: deque[Future[None]] = deque()
        threads = [ThreadPoolExecutor(count) for count in (1, DRAWERS, 1)]
        reader, drawers, encoder = threads
        most_waiting = max(AHEAD, self._batch)  # so that a batch is drawn while the next one is computed

        def finish() -> Done:
            drawn = drawing.popleft().result()
            if len(encoding) > most_waiting:
                encoding.popleft().result()
            encoding.append(encoder.submit(film.add, drawn.labelled.frame, drawn.picture, drawn.pixels))
            return self._noted(drawn, table)

        try:
            for labelled in self._labelled(reader):
                if len(drawing) > most_waiting:
                    yield finish()
                drawing.append(drawers.submit(self._draw, labelled))
            while drawing:
                yield finish()
            for future in encoding:
                future.result()
        finally:
            for pool in threads:
                pool.shutdown(cancel_futures=True)
            self._note()

    def _labelled(self, reader: ThreadPoolExecutor) -> Iterator[_Labelled]:
        """Yield every frame with its labels."""
        frames = self._clip.frames(self._every)

        def read(_: int) -> _Read | None:
            try:
                frame = next(frames, None)
            except (OSError, pyav().FFmpegError) as error:  # named here, as others are of what is written
                raise UserError(f"{self.path}: can't be read ({reason(error)})") from None
            if frame is None:
                return None
            return _Read(frame, None if frame.number < self.finished else self._segmenter.read(frame.image))

        group: list[_Read] = []
        for item in ahead(reader, read, itertools.count(), self._batch):
            if item is None:
                break
            if item.image is None:
                yield _Labelled(item.frame, None)
                continue
            group.append(item)
            if len(group) == self._batch:
                yield from self._segmented(group)
                group = []
        yield from self._segmented(group)

    def _segmented(self, group: list[_Read]) -> Iterator[_Labelled]:
        images = [item.image for item in group if item.image is not None]
        encodings = self._segmenter.encode_read(images, batch_size=self._batch)
        for item, image, encoding in zip(group, images, encodings, strict=True):
            past = None
            if self._steadier is not None:
                encoding = self._steadier.steadied(encoding, to_array(image.prepared.pixels))
                past = self._steadier.past
            answer = self._segmenter.segment(encoding, self._vocabulary, threshold=self._threshold)
            yield _Labelled(item.frame, answer.labels, past)

    def _draw(self, labelled: _Labelled) -> _Drawn:
        frame, labels = labelled.frame, labelled.labels
        path = self._labels / label_name(frame.number)
        if labels is None:
            labels = outputs.read_label_map(path)
            if labels.shape != frame.image.shape[:2]:
                raise UserError(f"{path}: has another size than the video; remove the folder {self._part}")
        else:
            outputs.save_label_map(path, labels, len(self._names))
        pixels = np.bincount(labels.ravel() + 1, minlength=len(self._names) + 1)[1:]
        return _Drawn(labelled, blend(frame.image, labels, palette(len(self._names))), pixels)

    def _noted(self, drawn: _Drawn, table: Any) -> Done:
        """Add a frame, whose labels are on disk, to the table, and record the progress from time to time."""
        frame, pixels, total = drawn.labelled.frame, drawn.pixels, drawn.picture.shape[0] * drawn.picture.shape[1]
        shares = [f"{count / total:.6g}" for count in (*pixels, total - pixels.sum())]
        table.writerow([frame.number, f"{frame.seconds:.6f}", *shares])
        if frame.number >= self.finished:
            self._latest = frame.number + 1, drawn.labelled.past
            if frame.number // self._every % FRAMES_BETWEEN_NOTES == 0:
                self._note()
        return Done(frame.number, frame.seconds, pixels, total)

    def _note(self) -> None:
        """Record the progress for a later run."""
        if self._latest is not None:
            finished, past = self._latest
            self._journal.put(_LABELLED, finished, b"" if past is None else _bytes(past))

    # Files of an earlier run

    def _work(self) -> dict[str, Any]:
        """Return all that the labels depend on: unfinished work is continued only if none of it has changed."""
        stat = self._clip.stat
        return {
            **settings_of(self._segmenter, self._vocabulary, self._threshold),
            "video": [str(self.path.absolute()), stat.st_size, stat.st_mtime_ns],
            "every": self._every,
            "steady": self._steadier is not None,
        }

    def _look_at_earlier_work(self, work: dict[str, Any]) -> None:
        journal = self._journal
        if journal.damaged:
            journal.damaged.unlink()
        remove_temporaries(self._labels)
        if (other := journal.begin(work)) is not None:
            self.notes.append(f"{self._part}: unfinished work with {difference(other, work)}: it is begun anew")
        finished = journal.get(_LABELLED)
        numbers = range(0, finished, self._every) if isinstance(finished, int) else ()
        if numbers and all((self._labels / label_name(number)).exists() for number in numbers):
            past = _past(journal.data(_LABELLED)) if self._steadier is not None else None
            if self._steadier is None or past is not None:
                self.finished = finished
                self._steadier = self._steadier and Steadier(past)
        for file in self._labels.iterdir():
            number = label_number(file)
            if number is None or number >= self.finished:
                file.unlink()

    def _publish(self) -> None:
        """Rename the results to their final names; replace earlier ones, except files that somebody has changed."""
        overlay, labels, table = self.paths
        labels.mkdir(exist_ok=True)
        made = {labels / file.name for file in self._labels.iterdir()}
        results = [*sorted(made), table, overlay]
        self.notes += self._result.replace(results)
        for file in self._labels.iterdir():
            file.replace(labels / file.name)
        for file in labels.iterdir():
            if label_number(file) is not None and file not in made:
                file.unlink()  # of an earlier run, with more frames
        for name, target in (("frames.csv", table), ("overlay.mp4", overlay)):
            with (self._part / name).open("rb") as written:
                os.fsync(written.fileno())
            (self._part / name).replace(target)
        flush_folder(labels)
        flush_folder(self._out)
        self._result.add(results)
        self._published = True


def _bytes(past: Past) -> bytes:
    return save({name: np.ascontiguousarray(array) for name, array in vars(past).items()})


def _past(data: bytes) -> Past | None:
    """Read data that `_bytes` returned; None for other data."""
    try:
        return Past(**load(data))
    except (SafetensorError, TypeError):
        return None


def label_name(number: int) -> str:
    """Return a label frame's file name."""
    return f"{number:06}.png"


def label_number(path: Path) -> int | None:
    """Return the number of the frame with this `label_name`; None for another file."""
    return int(path.stem) if path.suffix == ".png" and path.stem.isdecimal() and len(path.stem) >= 6 else None
