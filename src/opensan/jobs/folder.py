"""Whole folders: photographs stream through the model into label maps, pictures, records and data sets.

Memory does not grow with their number, and a run that was stopped, however it was, goes on where it was: a manifest in
the results says of each photograph what was made of it, by which model, with which words.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from opensan import outputs
from opensan.errors import UserError
from opensan.images import ImageError
from opensan.jobs.ledger import Manifest, Record, Settings, Stamp, remove_left_over
from opensan.outputs.datasets import DATASETS, Dataset, Labelled, Member
from opensan.vocabulary import Vocabulary

if TYPE_CHECKING:
    from opensan.segmenters.results import ReadImage, Segmentation
    from opensan.segmenters.san import SanSegmenter

MAX_THREADS = 4
"""That read, and that write."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Job:
    """An image, and where its results go."""

    image: Path
    place: str
    """The beginning of its results' paths, below the folder for all results: "deep/er/street"."""


@dataclass(frozen=True)
class Written:
    """A photograph is done: its files are complete, and the manifest says so."""

    job: Job
    areas: dict[str, float]
    """Each word's share of all pixels, in [0, 1]."""
    unlabelled: float


@dataclass(frozen=True)
class _Read:
    """A photograph in memory, and the file it is from."""

    job: Job
    image: "ReadImage"
    source: Stamp


@dataclass(frozen=True)
class Broken:
    """A photograph that can't be read."""

    job: Job
    reason: str
    """One line, naming it."""


def plan(images: Sequence[Path], arguments: Sequence[Path]) -> list[Job]:
    """Where each image's results go: folders as they are below what the user named, and no two names alike.

    Named are folders, and files' folders; with several, the folder common to all of them is the top.
    An image's stem names its results; images of one folder that differ only in suffix keep it ("x.jpg.labels.png").
    """
    tops = {absolute(path if path.is_dir() else path.parent) for path in arguments}
    top = os.path.commonpath(tops)
    places = [(absolute(image).parent.relative_to(top), image) for image in images]
    stems = Counter((folder, image.stem) for folder, image in places)
    names = [(folder, image.stem if stems[folder, image.stem] == 1 else image.name) for folder, image in places]
    if len(set(names)) < len(names):  # "x.jpg", "x.png" and "x.jpg.png"
        names = [(folder, image.name) for folder, image in places]
    return [Job(image, (folder / name).as_posix()) for image, (folder, name) in zip(images, names, strict=True)]


def without_results(images: Sequence[Path], arguments: Sequence[Path], out: Path) -> list[Path]:
    """Leaves out the pictures of earlier runs, which lie among the images when results lie in a folder to segment.

    They are known by their names, and by lying in `out`, unless this is itself a folder to segment.
    Raises ValueError, one line, if nothing else is left.
    """
    named = {absolute(path) for path in arguments}
    inside = absolute(out)
    names = tuple(outputs.FORMATS.values())

    def ours(image: Path) -> bool:
        return image.name.endswith(names) or (inside not in named and absolute(image).is_relative_to(inside))

    kept = [image for image in images if absolute(image) in named or not ours(image)]
    if not kept:
        raise UserError(f"no images but the results of earlier runs, in {', '.join(map(str, arguments))}")
    return kept


def absolute(path: Path) -> Path:
    """Without "." and "..", but links are kept: a linked photograph is named by its link."""
    return Path(os.path.normpath(path.absolute()))


class FolderRun:
    """Segments many photographs into one folder of results.

        run = FolderRun(segmenter, Vocabulary.parse("road, sky"), plan(images, [folder]), Path("out"), ["png", "coco"])
        with run:
            for done in run.results():
                print(done)

    What an earlier run has completed, with the same model, words and settings, is not made again. Opening it raises
    ValueError, one line, on a folder that can't be written, that another run is writing to, and on unknown formats.
    """

    def __init__(
        self,
        segmenter: "SanSegmenter",
        vocabulary: Vocabulary,
        jobs: Sequence[Job],
        out: Path,
        formats: Sequence[str],
        *,
        batch: int = 1,
    ) -> None:
        """`batch` photographs of one padded shape go through the network together; at most 4 times as many are in
        memory, being read, waiting for others of their shape, and being written.
        """
        outputs.check_formats_of_many(formats, len(vocabulary.names))
        self._segmenter = segmenter
        self._vocabulary = vocabulary
        self._jobs = jobs
        self._out = outputs.check_writable(out)
        self._formats = list(dict.fromkeys(formats))
        self._batch = batch
        self._settings = Settings(
            model=segmenter.fingerprint,
            vocabulary=vocabulary.to_dict(),
            speed=segmenter.speed,
            dtype=str(segmenter.dtype).removeprefix("torch."),
        )
        self.notes: list[str] = []
        """What a user should know of an earlier run's results, once the run is open; each one line."""
        self.pending: list[Job] = []
        """What is to be done, once the run is open."""

    def __enter__(self) -> "FolderRun":
        self._manifest = Manifest(self._out)
        try:
            remove_left_over(self._out, self._paths_of_all())
            self._look_at_earlier_results()
        except BaseException:
            self._manifest.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._manifest.close()

    def results(self) -> Iterator[Written | Broken]:
        """Do what is pending, in about the order of the jobs; then write what data sets say of all photographs.

        Raises ValueError, one line, where results can't be written. What was done by then is complete.
        """
        threads = min(self._batch, MAX_THREADS)
        writing: deque[Future[tuple[Written, Record]]] = deque()
        with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
            try:
                for group in self._groups(readers):
                    if isinstance(group, Broken):
                        yield group
                        continue
                    encodings = self._segmenter.encode_read([one.image for one in group], batch_size=self._batch)
                    sources = [(one.job, one.source) for one in group]
                    group.clear()  # the encodings hold the photographs
                    for job, source in sources:
                        if len(writing) >= self._batch:
                            yield self._noted(writing.popleft())
                        segmentation = self._segmenter.segment(encodings.pop(0), self._vocabulary)
                        writing.append(writers.submit(self._write, job, source, segmentation))
                        del segmentation
                while writing:
                    yield self._noted(writing.popleft())
            finally:
                for future in writing:
                    if future.exception() is None:
                        self._noted(future)
        self._complete_data_sets()

    def _groups(self, readers: Executor) -> Iterator[list[_Read] | Broken]:
        """Photographs of equal padded shape, up to a batch; not more than two batches wait for more of their shape."""

        def read(job: Job) -> _Read | Broken:
            try:
                return _Read(job, self._segmenter.read(job.image), Stamp.of(job.image))
            except ImageError as error:
                return Broken(job, str(error))
            except OSError as error:
                return Broken(job, f"{job.image}: can't be read ({error.strerror or error})")

        waiting: dict[tuple[int, int], list[_Read]] = {}
        for found in ahead(readers, read, self.pending, self._batch):
            if isinstance(found, Broken):
                yield found
                continue
            shape = found.image.prepared.sizes.padded
            waiting.setdefault(shape, []).append(found)
            del found
            if len(waiting[shape]) == self._batch:
                yield waiting.pop(shape)
            elif sum(map(len, waiting.values())) >= 2 * self._batch:
                yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
        while waiting:
            yield waiting.pop(next(iter(waiting)))

    def _write(self, job: Job, source: Stamp, segmentation: "Segmentation") -> tuple[Written, Record]:
        """All of a photograph's files, and what the manifest is to say of them."""
        place = self._out / job.place
        own = [name for name in self._formats if name in outputs.FORMATS]
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if own:
                segmentation.save(place.parent, place.name, own)
            labelled = Labelled(
                job.place,
                job.image,
                segmentation.labels,
                segmentation.names,
                lambda: outputs.mean_confidence(segmentation.labels, segmentation.confidence, len(segmentation.names)),
                self._settings.model,
            )
            for dataset in self._datasets():
                dataset.add(self._out, labelled)
            paths = {path: self._out / path for path in self._paths(job)}
            files = {path: source if file.is_symlink() else Stamp.of(file) for path, file in paths.items()}
        except OSError as error:
            raise UserError(f"{self._out}: cannot write there ({error.strerror or error})") from None
        unlabelled = float((segmentation.labels < 0).mean())
        return (
            Written(job, segmentation.areas, unlabelled),
            Record(job.place, str(job.image), source, self._settings.key, files),
        )

    def _noted(self, future: "Future[tuple[Written, Record]]") -> Written:
        written, record = future.result()
        self._manifest.append(record)
        return written

    def _paths(self, job: Job) -> list[str]:
        """A photograph's files, below the results."""
        paths = []
        for name in self._formats:
            if name in DATASETS:
                paths += DATASETS[name].paths(job.place, job.image.suffix)
            else:
                paths.append(f"{job.place}{outputs.FORMATS[name]}")
        return paths

    def _paths_of_all(self) -> Iterator[str]:
        for job in self._jobs:
            yield from self._paths(job)
        for dataset in self._datasets():
            yield from (f"{dataset.folder}/{path}" for path in dataset.finished)

    def _datasets(self) -> list[Dataset]:
        return [DATASETS[name] for name in self._formats if name in DATASETS]

    def _look_at_earlier_results(self) -> None:
        others: Counter[str] = Counter()
        kept_aside = 0
        for job in self._jobs:
            record = self._manifest.records.get(job.place)
            if record is None:
                self.pending.append(job)
                continue
            if record.settings != self._settings.key:
                before = self._manifest.settings.get(record.settings)
                others[self._settings.difference(before)] += 1
            elif self._is_complete(job, record):
                continue
            self.pending.append(job)
            kept_aside += record.keep_changed(self._out)
            del self._manifest.records[job.place]  # its files are about to be replaced
        for difference, count in others.items():
            self.notes.append(f"{count} of {len(self._jobs)} images were done with {difference}: they are done again")
        if kept_aside:
            self.notes.append(f"{kept_aside} results were changed since they were written: kept as *.changed")
        self._manifest.begin(self._settings)

    def _is_complete(self, job: Job, record: Record) -> bool:
        return (
            record.source.still_holds(job.image)
            and set(self._paths(job)) <= record.files.keys()
            and all(stamp.still_holds(self._out / path) for path, stamp in record.files.items())
        )

    def _complete_data_sets(self) -> None:
        members = [Member(job.place, job.image.suffix) for job in self._jobs if job.place in self._manifest.records]
        for dataset in self._datasets() if members else ():
            dataset.complete(self._out, members, self._vocabulary.names)


def ahead(pool: Executor, function: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[R]:
    """`function` of each item, in their order; while one is in use, the next `count` are made."""
    made: deque[Future[R]] = deque()
    for item in items:
        made.append(pool.submit(function, item))
        if len(made) > count:
            yield made.popleft().result()
    while made:
        yield made.popleft().result()
