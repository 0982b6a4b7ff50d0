"""A whole clip into label frames, a table and an overlay video; memory does not grow with its length.

Reading, the model, drawing and writing go on at the same time, a few frames apart. Until all is complete, everything is
kept in a hidden folder beside the results, and a run that was stopped, however it was, goes on from there.
"""

import csv
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opensan import outputs
from opensan.errors import UserError
from opensan.files import atomic_path
from opensan.jobs.folder import ahead
from opensan.jobs.video.reader import Frame, VideoReader, pyav, reason
from opensan.jobs.video.steady import Past, Steadier
from opensan.jobs.video.writer import Film
from opensan.outputs.colours import palette
from opensan.outputs.drawing import blend
from opensan.vocabulary import Vocabulary

if TYPE_CHECKING:
    from opensan.segmenters.base import Segmenter
    from opensan.segmenters.results import ReadImage

AHEAD = 2
"""Frames (or batches of them) that are read before they are needed, and that wait to be drawn and to be written."""

DRAWERS = 2
"""Threads that draw."""

FRAMES_BETWEEN_NOTES = 16
"""After so many frames it is noted how far the work has come; as many are done again if a run is killed."""


@dataclass(frozen=True)
class Done:
    """A frame is done."""

    number: int
    """Counted from 0, all frames of the clip counted."""
    seconds: float
    """Since the first frame."""
    pixels: np.ndarray
    """[K] int: how many pixels each word has."""
    total: int
    """Pixels of the frame."""


@dataclass(frozen=True)
class _Read:
    frame: Frame
    image: "ReadImage | None"
    """None if its labels are there already."""


@dataclass(frozen=True)
class _Labelled:
    frame: Frame
    labels: np.ndarray | None
    """[H0, W0] int32; None if they are on disk."""
    past: Past | None = None
    """What the steadier remembers after this frame."""


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

    Leaves STEM.overlay.mp4, STEM.labels/000000.png (label maps, by the number of the frame) and STEM.frames.csv.
    Opening it raises ValueError, one line, on a clip that can't be read, and on a folder that can't be written or that
    another run is writing the same results to.
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
    ) -> None:
        """Only each `every`-th frame is labelled, and in the overlay video; `batch` of them are computed together.

        With `steady`, regions are kept from flickering; without, a frame's labels are those that it would get as a
        photograph.
        """
        self._segmenter = segmenter
        self._vocabulary = vocabulary
        self._names = vocabulary.names
        self._path = path
        self._out = out
        self._every = every
        self._steadier = Steadier() if steady else None
        self._batch = batch
        self._part = out / f".{path.stem}.part"
        self._labels = self._part / "labels"
        self._note = self._part / "note.safetensors"
        self._latest: Note | None = None
        """How far this run has come."""
        self.finished = 0
        """Frames whose labels are known from an earlier run, once this one is open: all with a lower number."""
        self.notes: list[str] = []
        """What a user should know of the results, once they are complete; each one line."""

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """Overlay video, folder of label frames, and table."""
        return tuple(self._out / f"{self._path.stem}{end}" for end in (".overlay.mp4", ".labels", ".frames.csv"))

    @property
    def count(self) -> int | None:
        """How many frames there are to do, if the file says so."""
        total = self._clip.frame_count
        return total and -(-total // self._every)

    def __enter__(self) -> "VideoRun":
        self._clip = VideoReader(self._path, max_pixels=self._segmenter.max_pixels)
        try:
            outputs.check_writable(self._labels)
            self._lock = FileLock(self._part / "lock", timeout=0)
            self._lock.acquire()
            self._look_at_earlier_work()
        except Timeout:
            self._clip.close()
            raise UserError(f"{self._part}: another run is writing it; wait for it, or choose another --out") from None
        except BaseException:
            self._clip.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._clip.close()
        self._lock.release()
        if not self._note.exists():  # all is published, or nothing was done
            shutil.rmtree(self._part, ignore_errors=True)

    def results(self) -> Iterator[Done]:
        """Do the work, frame by frame in their order; when the iterator ends, the results are complete.

        Raises ValueError, one line, if the clip turns out to be unusable or results can't be written. What was done by
        then is gone on with by the next run.
        """
        try:
            with (
                Film(self._part / "overlay.mp4", self._clip, self._names, background=self._has_background) as film,
                (self._part / "frames.csv").open("w", encoding="utf-8", newline="") as file,
            ):
                yield from self._frames(film, csv.writer(file))
            self._publish()
        except (OSError, pyav().FFmpegError) as error:
            raise UserError(f"{self._out}: cannot write there ({reason(error)})") from None
        self.notes += film.notes
        if self._clip.damaged:
            self.notes.append(
                f"{self._path}: damaged in {self._clip.damaged} places; what can't be decoded is left out"
            )
        if self._clip.ends_early:
            self.notes.append(f"{self._path}: {self._clip.ends_early}")

    @property
    def _has_background(self) -> bool:
        return len(self._vocabulary.words) > len(self._names)

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
            if self._latest is not None:
                self._latest.save(self._note, self._work())

    def _labelled(self, reader: ThreadPoolExecutor) -> Iterator[_Labelled]:
        """Every frame and its labels."""
        frames = self._clip.frames(self._every)

        def read(_: int) -> _Read | None:
            frame = next(frames, None)
            if frame is None:
                return None
            return _Read(frame, None if frame.number < self.finished else self._segmenter.read(frame.image))

        group: list[_Read] = []
        found = itertools.takewhile(lambda one: one is not None, ahead(reader, read, itertools.count(), self._batch))
        for one in found:
            if one.image is None:
                yield _Labelled(one.frame, None)
                continue
            group.append(one)
            if len(group) == self._batch:
                yield from self._segmented(group)
                group = []
        yield from self._segmented(group)

    def _segmented(self, group: list[_Read]) -> Iterator[_Labelled]:
        encodings = self._segmenter.encode_read([one.image for one in group], batch_size=self._batch)
        for one, encoding in zip(group, encodings, strict=True):
            past = None
            if self._steadier is not None:
                encoding = self._steadier.steadied(encoding, one.image.prepared.pixels)
                past = self._steadier.past
            yield _Labelled(one.frame, self._segmenter.segment(encoding, self._vocabulary).labels, past)

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
        """A frame's labels are on disk: say so in the table and, now and then, for a later run."""
        frame, pixels, total = drawn.labelled.frame, drawn.pixels, drawn.picture.shape[0] * drawn.picture.shape[1]
        shares = [f"{count / total:.6g}" for count in (*pixels, total - pixels.sum())]
        table.writerow([frame.number, f"{frame.seconds:.6f}", *shares])
        if frame.number >= self.finished:
            self._latest = Note(frame.number + 1, drawn.labelled.past)
            if frame.number // self._every % FRAMES_BETWEEN_NOTES == 0:
                self._latest.save(self._note, self._work())
        return Done(frame.number, frame.seconds, pixels, total)

    # What an earlier run leaves

    def _work(self) -> dict[str, Any]:
        """All that the labels depend on: unfinished work is gone on with only if none of it has changed."""
        state = self._path.stat()
        return {
            "opensan": 1,
            "video": [str(self._path.absolute()), state.st_size, state.st_mtime_ns],
            "every": self._every,
            "steady": self._steadier is not None,
            "model": [
                str(self._segmenter.identity),
                *(str(getattr(self._segmenter, name, "")) for name in ("speed", "dtype")),
            ],
            "vocabulary": self._vocabulary.to_dict(),
        }

    def _look_at_earlier_work(self) -> None:
        note = Note.load(self._note, self._work())
        numbers = range(0, note.finished, self._every) if note is not None else ()
        if note is not None and all((self._labels / label_name(number)).exists() for number in numbers):
            self.finished = note.finished
            if self._steadier is not None:
                self._steadier = Steadier(note.past)
        for file in self._labels.iterdir():
            number = label_number(file)
            if number is None or number >= self.finished:
                file.unlink()

    def _publish(self) -> None:
        """Give the results their names; earlier ones are replaced."""
        overlay, labels, table = self.paths
        labels.mkdir(exist_ok=True)
        made = set()
        for file in self._labels.iterdir():
            file.replace(labels / file.name)
            made.add(file.name)
        for file in labels.iterdir():
            if label_number(file) is not None and file.name not in made:
                file.unlink()  # of an earlier run, with more frames
        for file, target in (("frames.csv", table), ("overlay.mp4", overlay)):
            with (self._part / file).open("rb") as written:
                os.fsync(written.fileno())
            (self._part / file).replace(target)
        self._note.unlink(missing_ok=True)


@dataclass(frozen=True)
class Note:
    """How far a run has come."""

    finished: int
    """The labels of all frames with a lower number are on disk."""
    past: Past | None
    """What the steadier remembers after them; None without one."""

    def save(self, path: Path, work: Mapping[str, Any]) -> None:
        """All or nothing; `work` is what must be the same for it to be of use."""
        arrays = {} if self.past is None else {name: np.ascontiguousarray(one) for name, one in vars(self.past).items()}
        with atomic_path(path) as temporary:
            save_file(arrays, temporary, metadata={"finished": str(self.finished), "work": json.dumps(work)})

    @classmethod
    def load(cls, path: Path, work: Mapping[str, Any]) -> "Note | None":
        """What was saved there of the same work, if anything."""
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata()
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError):
            return None
        if metadata["work"] != json.dumps(work):
            return None
        return cls(int(metadata["finished"]), Past(**arrays) if arrays else None)


def label_name(number: int) -> str:
    """A label frame's file name."""
    return f"{number:06}.png"


def label_number(path: Path) -> int | None:
    """The number of the frame that `label_name` named so; None of another file."""
    return int(path.stem) if path.suffix == ".png" and path.stem.isdecimal() and len(path.stem) >= 6 else None
