"""Label whole folders: images stream through the model into label maps, pictures, records and data sets.

    plan -> jobs -> label_one, or FolderRun's threads and batches -> records -> the ledger

Memory does not grow with the number of images, and a stopped or killed run can be continued: the ledger in the results
records for each image its files, the model and the words.
"""

import errno
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from opensan import outputs
from opensan.assemble.segments import USUAL_RULES, SegmentRules
from opensan.errors import UserError
from opensan.files import absolute
from opensan.images import ImageError
from opensan.jobs.ledger import LONGEST_WAIT, Ledger, Record, Stamp, settings_key, settings_of
from opensan.outputs.dataset_files import Dataset, Labelled, Member
from opensan.outputs.datasets import DATASETS
from opensan.vocabulary import Vocabulary

if TYPE_CHECKING:
    from opensan.segmenters.base import Segmenter
    from opensan.segmenters.results import InputImage, Segmentation

MAX_THREADS = 4
"""Threads that read, and that write."""

OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
"""Write errors that stop the run, because the next image would have them too; other errors concern one image."""

ADAPTS_ANEW = "what the model had adapted to in the earlier run is not kept: it adapts anew from here"
"""Message about a run that goes on with `adapt="keep"`."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Job:
    """An image, and the path of its results."""

    image: Path
    stem: str
    """The beginning of its results' paths, below the folder for all results: "deep/er/street"."""


@dataclass(frozen=True)
class Question:
    """Settings of a run: the vocabulary, and the formats to write."""

    vocabulary: Vocabulary
    out: Path
    """The folder for all results."""
    formats: tuple[str, ...]
    """Names from `outputs.FORMATS` and `outputs.DATASETS`."""
    rules: SegmentRules = USUAL_RULES
    """The rules of segments, for the formats that are made of them."""
    threshold: float = 0.0
    """Pixels of less confidence stay unlabelled."""

    def label(self, segmenter: "Segmenter", image: Any) -> "Segmentation":
        """Label an image, or an encoding."""
        return segmenter.segment(image, self.vocabulary, segments=self.rules, threshold=self.threshold)

    def settings(self, segmenter: "Segmenter") -> dict[str, Any]:
        """Return all that the results depend on, besides the images, as plain data."""
        settings = settings_of(segmenter, self.vocabulary, self.threshold)
        return settings if self.rules == USUAL_RULES else settings | {"segments": self.rules.to_dict()}

    @property
    def datasets(self) -> list[Dataset]:
        """The formats that are data sets of all images."""
        return [DATASETS[name] for name in self.formats if name in DATASETS]

    def paths(self, job: Job) -> list[str]:
        """Return an image's files, relative to the results."""
        paths: list[str] = []
        for name in self.formats:
            if name in DATASETS:
                paths += DATASETS[name].paths(job.stem, job.image.suffix)
            else:
                paths.append(f"{job.stem}{outputs.FORMATS[name]}")
        return paths


@dataclass(frozen=True)
class Written:
    """Result for an image whose files are complete."""

    job: Job
    areas: dict[str, float]
    """Each word's share of all pixels, in [0, 1]."""
    unlabelled: float
    record: Record
    """Its record for the ledger."""


@dataclass(frozen=True)
class Broken:
    """Result for an image that can't be read, or whose results can't be written."""

    job: Job
    reason: str
    """Reason in one line that names the image."""


@dataclass(frozen=True)
class _Read:
    """An image in memory, and the file it is from."""

    job: Job
    image: "InputImage"
    source: Stamp


def plan(images: Sequence[Path], arguments: Sequence[Path]) -> list[Job]:
    """Plan the paths of each image's results: the same sub-folders as below `arguments`, and no name twice.

    `arguments` are folders or files; if there are several, paths are relative to the folder common to all of them.
    An image's stem names its results; images of one folder that differ only in suffix keep it ("x.jpg.labels.png").
    """
    files = set(images)  # of which no bucket is asked again
    tops = {absolute(path if path not in files and path.is_dir() else path.parent) for path in arguments}
    try:
        top = os.path.commonpath(tops)
    except ValueError:
        raise UserError("images of a bucket and of this machine have no folder in common: give two commands") from None
    folders = [(absolute(image).parent.relative_to(top), image) for image in images]
    stems = Counter((folder, image.stem) for folder, image in folders)
    names = [(folder, image.stem if stems[folder, image.stem] == 1 else image.name) for folder, image in folders]
    if len(set(names)) < len(names):  # "x.jpg", "x.png" and "x.jpg.png"
        names = [(folder, image.name) for folder, image in folders]
    return [Job(image, (folder / name).as_posix()) for image, (folder, name) in zip(images, names, strict=True)]


def without_results(images: Sequence[Path], arguments: Sequence[Path], out: Path) -> list[Path]:
    """Remove the pictures of earlier runs from `images`, if results lie in a folder to segment.

    They are recognised by their names, and by being in `out`, unless that is itself a folder to segment. Warns of those
    that are recognised by their names alone, without an image beside them that they may be the result of.
    Raises UserError, one line, if no image is left.
    """
    named = {absolute(path) for path in arguments}
    inside = absolute(out)
    names = tuple(outputs.FORMATS.values())

    def ours(image: Path) -> bool:
        return image.name.endswith(names) or (inside not in named and absolute(image).is_relative_to(inside))

    kept = [image for image in images if absolute(image) in named or not ours(image)]
    _warn_of_names_alone([image for image in set(images).difference(kept) if image.name.endswith(names)], kept)
    if not kept:
        raise UserError(f"no images but the results of earlier runs, in {', '.join(map(str, arguments))}")
    return kept


def _warn_of_names_alone(passed_over: Sequence[Path], kept: Sequence[Path]) -> None:
    segmented = {(image.parent, name) for image in kept for name in (image.stem, image.name)}
    alone = [
        image
        for image in sorted(passed_over)
        if (image.parent, image.name.rpartition(".")[0].rpartition(".")[0]) not in segmented
    ]
    if alone:
        shown = ", ".join(map(str, alone[:3])) + (f" and {len(alone) - 3} more" if len(alone) > 3 else "")
        warnings.warn(
            f"left out, as they are called like results of earlier runs: {shown}; rename them, or name the files "
            "themselves, to have them segmented",
            stacklevel=3,
        )


def label_one(segmenter: "Segmenter", question: Question, job: Job) -> Written | Broken:
    """Label one image and write its files: a run's work without its ledger, for other schedulers.

    Any process may do it, in any order. Whoever drives it adds the records to a `Ledger`, as `FolderRun` does, and at
    the end calls `complete_data_sets`. Raises UserError if the disk is full or can't be written to.
    """
    return label_some(segmenter, question, [job])[0]


def label_some(segmenter: "Segmenter", question: Question, jobs: Sequence[Job]) -> list[Written | Broken]:
    """Label several images, as `label_one` does; those of one padded shape go through the network together."""
    items = [_read(segmenter, question, job) for job in jobs]
    images = [item.image for item in items if isinstance(item, _Read)]
    encodings = segmenter.encode_read(images, batch_size=len(jobs))
    return [
        _write(question, item.job, item.source, question.label(segmenter, encodings.pop(0)))
        if isinstance(item, _Read)
        else item
        for item in items
    ]


def label_single(
    segmenter: "Segmenter", question: Question, job: Job, note: Callable[[str], None]
) -> tuple["Segmentation", Written]:
    """Label one image anew, and write its files and their entry in the ledger, which is locked only briefly.

    `note` gets messages about earlier results. Raises UserError, one line, if the image can't be read, or its results
    can't be written.
    """
    read = _read(segmenter, question, job)
    if isinstance(read, Broken):
        raise UserError(read.reason)
    with Ledger(question.out, wait=LONGEST_WAIT) as ledger:  # what it refuses is refused before the work
        (job,) = _own_stems([job], ledger)
        opening = list(ledger.notes)
    (encoding,) = segmenter.encode_read([read.image])
    segmentation = question.label(segmenter, encoding)
    with Ledger(question.out, wait=LONGEST_WAIT) as ledger:
        ledger.begin(question.settings(segmenter), {job.stem: (job.image, question.paths(job))}, again=True)
        for line in (*opening, *ledger.notes):
            note(line)
        written = _write(question, job, read.source, segmentation)
        if isinstance(written, Broken):
            raise UserError(written.reason)
        ledger.add(written.record)
    return segmentation, written


def _own_stems(jobs: Sequence[Job], ledger: Ledger) -> list[Job]:
    """Return the jobs, those by their image's whole name whose stem has results of another image; `notes` tell so.

    Raises UserError if results of another image have the whole name too, or the same name.
    """
    taken = {job.stem for job in jobs}
    own = []
    for job in jobs:
        other = ledger.of_another(job.stem, job.image)
        stem = f"{job.stem.removesuffix(job.image.stem)}{job.image.name}"
        if other is not None and Path(other).name != job.image.name and stem not in taken:
            own.append(Job(job.image, stem))
            other = ledger.of_another(stem, job.image)
        else:
            own.append(job)
        if other is not None:
            raise UserError(
                f"{ledger.out}: holds the results of {other}, which have the names of {job.image}'s; "
                "choose another folder"
            )
    if renamed := [job for before, job in zip(jobs, own, strict=True) if job.stem != before.stem]:
        ledger.notes.append(
            f"{ledger.out}: holds results of other images with the names of {len(renamed)} of {len(jobs)}: theirs are "
            f"named by the whole name, {renamed[0].stem}.*"
        )
    return own


def complete_data_sets(question: Question, jobs: Sequence[Job], done: Container[str]) -> None:
    """Write the data sets' files about all images: of those `jobs` whose stems are `done`, in order."""
    members = [Member(job.stem, job.image.suffix) for job in jobs if job.stem in done]
    for dataset in question.datasets if members else ():
        try:
            dataset.complete(question.out, members, question.vocabulary.names)
        except OSError as error:
            raise UserError(f"{error.filename or question.out}: cannot write there ({error.strerror})") from error


def _read(segmenter: "Segmenter", question: Question, job: Job) -> _Read | Broken:
    if question.datasets and not _is_text(f"{job.stem}{job.image.suffix}"):
        return Broken(job, f"{job.image}: its name is not UTF-8, so that data sets can't list it; rename it")
    try:
        source = Stamp.of(job.image)  # taken before reading, so that the next run notices a replacement
        return _Read(job, segmenter.read(job.image), source)
    except ImageError as error:
        return Broken(job, str(error))
    except OSError as error:
        return Broken(job, f"{job.image}: can't be read ({error.strerror or error})")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _write(question: Question, job: Job, source: Stamp, segmentation: "Segmentation") -> Written | Broken:
    """Write all of an image's files."""
    base = question.out / job.stem
    own = [name for name in question.formats if name in outputs.FORMATS]
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        if own:
            segmentation.save(base.parent, base.name, own)
        labelled = Labelled(
            job.stem,
            job.image,
            segmentation.labels,
            segmentation.names,
            lambda: outputs.mean_confidence(segmentation.labels, segmentation.confidence, len(segmentation.names)),
            segmentation.encoding.model,
            lambda: segmentation.segments,
        )
        for dataset in question.datasets:
            dataset.add(question.out, labelled)
        paths = {path: question.out / path for path in question.paths(job)}
        files = {path: source if file.samefile(job.image) else Stamp.of(file) for path, file in paths.items()}
    except (OSError, UserError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause)
        if cause.errno in OF_THE_DISK:
            raise UserError(f"{question.out}: cannot write there ({reason})") from None
        return Broken(job, f"{job.image}: its results can't be written to {base.parent} ({reason})")
    unlabelled = float((segmentation.labels < 0).mean())
    key = settings_key(question.settings(cast("Segmenter", segmentation.segmenter)))
    return Written(job, segmentation.areas, unlabelled, Record(job.stem, str(absolute(job.image)), source, key, files))


class FolderRun:
    """Segments many images into one folder of results.

        run = FolderRun(segmenter, Vocabulary.parse("road, sky"), plan(images, [folder]), Path("out"), ["png", "coco"])
        with run:
            for done in run.results():
                print(done)

    Images that an earlier run completed, with the same model, words and settings, are not processed again. Opening it
    raises UserError on a folder that can't be written, that another run is writing to, and on unknown formats.
    """

    def __init__(
        self,
        segmenter: "Segmenter",
        vocabulary: Vocabulary,
        jobs: Sequence[Job],
        out: Path,
        formats: Sequence[str],
        *,
        batch: int = 1,
        rules: SegmentRules = USUAL_RULES,
        threshold: float = 0.0,
    ) -> None:
        """`batch` images of one padded shape go through the network together; at most 4 times as many are in memory:
        being read, waiting for others of their shape, and being written.
        """
        outputs.check_formats_of_many(formats, len(vocabulary.names))
        self._segmenter = segmenter
        kinds = tuple(dict.fromkeys(formats))
        self._question = Question(vocabulary, outputs.check_writable(out), kinds, rules, threshold)
        self._jobs = jobs
        self._batch = batch
        self._ledger = Ledger(out)
        self.notes = self._ledger.notes
        """Messages for the user about an earlier run's results, once the run is open; each one line."""
        self.pending: list[Job] = []
        """Jobs that remain to be done, once the run is open."""

    def __enter__(self) -> "FolderRun":
        question = self._question
        with ExitStack() as stack:
            stack.enter_context(self._ledger)
            for dataset in question.datasets:
                self._ledger.remove_left_over(f"{dataset.folder}/{path}" for path in dataset.finished)
            self._jobs = _own_stems(self._jobs, self._ledger)
            wanted = {job.stem: (job.image, question.paths(job)) for job in self._jobs}
            pending = set(self._ledger.begin(question.settings(self._segmenter), wanted))
            self.pending = [job for job in self._jobs if job.stem in pending]
            if getattr(self._segmenter, "adapt", None) == "keep" and 0 < len(self.pending) < len(self._jobs):
                self.notes.append(ADAPTS_ANEW)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def results(self) -> Generator[Written | Broken]:
        """Do the pending jobs, in about their order; then write the data sets' files about all images.

        Raises UserError where no results can be written. What was done by then is complete.
        """
        with closing(self.labelled()) as labelled:
            yield from labelled
        complete_data_sets(self._question, self._jobs, self._ledger.records)

    def labelled(self) -> Generator[Written | Broken]:
        """Do the pending jobs, in about their order, and note what is complete."""
        threads = min(self._batch, MAX_THREADS)
        writing: deque[Future[Written | Broken]] = deque()
        with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
            for group in self._groups(readers):
                if isinstance(group, Broken):
                    yield group
                    continue
                encodings = self._segmenter.encode_read([item.image for item in group], batch_size=self._batch)
                sources = [(item.job, item.source) for item in group]
                group.clear()  # frees memory: the encodings hold the images
                for job, source in sources:
                    if len(writing) >= self._batch:
                        yield writing.popleft().result()
                    segmentation = self._question.label(self._segmenter, encodings.pop(0))
                    writing.append(writers.submit(self._complete, job, source, segmentation))
                    del segmentation
            while writing:
                yield writing.popleft().result()

    def _complete(self, job: Job, source: Stamp, segmentation: "Segmentation") -> Written | Broken:
        written = _write(self._question, job, source, segmentation)
        if isinstance(written, Written):
            self._ledger.add(written.record)
        return written

    def _groups(self, readers: Executor) -> Iterator[list[_Read] | Broken]:
        """Yield batches of images of equal padded shape; fewer than two batches wait for others of their shape."""
        waiting: dict[tuple[int, int], list[_Read]] = {}
        read = partial(_read, self._segmenter, self._question)
        for item in ahead(readers, read, self.pending, self._batch):
            if isinstance(item, Broken):
                yield item
                continue
            shape = item.image.prepared.sizes.padded
            waiting.setdefault(shape, []).append(item)
            del item
            if len(waiting[shape]) == self._batch:
                yield waiting.pop(shape)
            elif sum(map(len, waiting.values())) >= 2 * self._batch:
                yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
        while waiting:
            yield waiting.pop(next(iter(waiting)))


def ahead(pool: Executor, function: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[R]:
    """Yield `function` of each item, in order; while one is in use, threads compute the next `count`."""
    made: deque[Future[R]] = deque()
    for item in items:
        made.append(pool.submit(function, item))
        if len(made) > count:
            yield made.popleft().result()
    while made:
        yield made.popleft().result()
