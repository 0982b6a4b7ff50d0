"""Evaluate at full scale: batches by shape, files read ahead, progress on disk, any number of processes.

    threads: read image and labels -> prepare -.                 .-> count -> add, now and then save
    main thread:                                     `-> predict -'

The plan of batches depends on the data set and the batch size alone. Every process takes a share of it.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from opensan.data.dataset import SegmentationDataset
from opensan.distributed import barrier, gather_objects, on_main, rank, world_size
from opensan.errors import UserError
from opensan.evaluation import predictions
from opensan.evaluation.confidence import ConfidenceCounts, count_confidence
from opensan.evaluation.evaluation import ConfusedImage, Evaluation, ImageMetrics
from opensan.evaluation.metrics import ImageCounts, count_image
from opensan.evaluation.predictors import BatchPredictor, ModelPredictor
from opensan.evaluation.progress import (
    Progress,
    images_behind,
    journal_path,
    open_progress,
    read_all,
    read_predictions,
)
from opensan.files import hold, remove_temporaries

SAVE_EVERY = 15.0
"""Seconds of work that an interruption may cost."""

_MOST_UNSAVED = 8 * 2**20
"""Saved predictions kept in memory before they are written."""


_Counted = tuple[ImageCounts, list[str], ConfidenceCounts | None]
"""Counts of an image, the JSON entries of its prediction, and counts of its confidence."""


class MeasurableDataset(SegmentationDataset, Protocol):
    """A data set whose evaluation can be planned and resumed."""

    def size(self, index: int) -> tuple[int, int]:
        """Return (H, W) of an image without decoding it. Raises UserError or OSError."""

    def file(self, index: int) -> Path:
        """Return the image's path."""

    def fingerprint(self) -> str:
        """Return a text that changes when any image, label or list does."""


def measure(
    dataset: MeasurableDataset,
    predictor: BatchPredictor,
    folder: Path,
    *,
    batch: int = 1,
    workers: int = 4,
    save_predictions: bool = False,
    confidence: bool = False,
    save_every: float = SAVE_EVERY,
    note: Callable[[str], None] = lambda message: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Compare predictions with ground truth at each image's own size, and keep the progress in `folder`.

    The same call after an interruption continues from the last save; with another model, data set or protocol it
    starts anew. In processes that torchrun started each does a share (`folder` must be one for all), and all return
    the whole.

    Args:
        batch: images that are predicted together, if their shapes are equal.
        workers: threads that read and count.
        save_predictions: also write `sem_seg_predictions.json` to `folder`.
        confidence: also measure confidence; the predictor must have `predict_with_confidence`.
        save_every: seconds between saves.
        note: called with messages for the user.
        progress: called with the number of images that this process has finished, and of all that it is to do.

    Raises:
        ValueError: the data set is empty, or another evaluation is writing to `folder`.
    """
    if len(dataset) == 0:
        raise UserError("the data set has no images")
    request = _Request(
        dataset, predictor, folder, batch, workers, save_predictions, confidence, save_every, note, progress
    )
    with ExitStack() as held:
        on_main(lambda: _take(held, folder))
        return _measure(request)


@dataclass(frozen=True)
class _Request:
    """The arguments of `measure`."""

    dataset: MeasurableDataset
    predictor: BatchPredictor
    folder: Path
    batch: int
    workers: int
    save_predictions: bool
    confidence: bool
    save_every: float
    note: Callable[[str], None]
    progress: Callable[[int, int], None]

    @property
    def state(self) -> Path:
        """The folder of the progress."""
        return self.folder / "progress"

    @property
    def names(self) -> list[str]:
        """The classes."""
        return self.dataset.vocabulary.names


def _take(held: ExitStack, folder: Path) -> None:
    """Hold the folder, and remove temporary files of a killed evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"{folder}: another evaluation is writing there; wait for it, or choose another --out"
    held.enter_context(hold(folder / ".lock", busy))
    remove_temporaries(folder)


def _measure(request: _Request) -> Evaluation:
    dataset, folder, state = request.dataset, request.folder, request.state
    work = {"data": dataset.fingerprint(), "saves predictions": request.save_predictions, **request.predictor.key}
    if request.confidence:
        work |= {"confidence": _calibration(request)}
    other = on_main(lambda: open_progress(state, work))
    if other is not None:
        request.note(f"{folder}: holds an evaluation with {other}: starting anew")
    done = read_all(state, len(request.names), request.confidence).figures.keys()
    if done:
        request.note(f"{folder}: {len(done)} of {len(dataset)} images are measured already")
    batches = _share(_plan(request), done)
    barrier()  # all have read before one writes
    with Progress(journal_path(state, rank())) as mine:
        mine.begin(work)
        _Run(request, mine, sum(map(len, batches))).all(batches)
    broken = {index: text for part in gather_objects(mine.broken) for index, text in part.items()}
    return on_main(lambda: _whole(request, broken))


def _whole(request: _Request, broken: Mapping[int, str]) -> Evaluation:
    """Sum up all processes' progress."""
    whole = read_all(request.state, len(request.names), request.confidence)
    if request.save_predictions:
        predictions.write_list(read_predictions(request.state), request.folder / predictions.FILE_NAME)
    name = request.dataset.name
    images = [ImageMetrics(index, name(index), *whole.figures[index]) for index in sorted(whole.figures)]
    confusions = whole.counts.worst_confusions(request.names)
    place = {class_name: number for number, class_name in enumerate([*request.names, "unlabelled"])}
    pairs = [place[pair.truth] * len(place) + place[pair.predicted] for pair in confusions]
    behind = images_behind(request.state, len(request.names), pairs)
    return Evaluation(
        whole.counts.metrics(request.names),
        len(images),
        tuple(broken[index] for index in sorted(broken)),
        tuple(confusions),
        tuple(images),
        tuple(tuple(ConfusedImage(index, name(index), pixels) for pixels, index in each) for each in behind),
        whole.confidences.metrics(int(whole.counts.confusion.sum()), _calibration(request))
        if request.confidence
        else None,
    )


def _calibration(request: _Request) -> dict[str, Any] | None:
    """Return what the confidence is calibrated on; None if it is not."""
    calibration = getattr(request.predictor, "calibration", None)
    return None if calibration is None else calibration.to_dict()


def _plan(request: _Request) -> list[list[int]]:
    """Return all images in batches of equal shape, in the order of each batch's first."""

    def shape(index: int) -> object:
        try:
            return request.predictor.shape(request.dataset.size(index))
        except (UserError, OSError):
            return "unreadable"  # the reason is reported when it is read

    groups: Mapping[object, list[int]] = defaultdict(list)
    with ThreadPoolExecutor(request.workers) as pool:
        for index, key in enumerate(pool.map(shape, range(len(request.dataset)))):
            groups[key].append(index)
    batch = request.batch
    return sorted(group[start : start + batch] for group in groups.values() for start in range(0, len(group), batch))


def _share(batches: Sequence[list[int]], done: Collection[int]) -> list[list[int]]:
    """Return this process's batches, without the images that are done."""
    left = [[index for index in batch if index not in done] for batch in batches[rank() :: world_size()]]
    return [batch for batch in left if batch]


class _Run:
    """Evaluates one process's share of the images."""

    def __init__(self, request: _Request, progress: Progress, images: int) -> None:
        """`images`: how many there are to do."""
        self._request = request
        self._dataset = request.dataset
        self._progress = progress
        self._images = images
        self._done = 0
        self._num_classes = len(request.names)
        self._saved = time.monotonic()

    def _advance(self) -> None:
        self._done += 1
        self._request.progress(self._done, self._images)

    def all(self, batches: Sequence[list[int]]) -> None:
        workers = self._request.workers
        pool = ThreadPoolExecutor(workers, thread_name_prefix="evaluate")
        try:
            counting: deque[tuple[int, Future[_Counted]]] = deque()
            for indices, truths, prepared in self._loaded(pool, batches):
                answers = self._predict(prepared) if prepared else []
                for index, truth, (labels, confidence) in zip(indices, truths, answers, strict=True):
                    counting.append((index, pool.submit(self._count, index, truth, labels, confidence)))
                while len(counting) > workers + len(indices):
                    self._add(*counting.popleft())
                self._save_now_and_then()
            while counting:
                self._add(*counting.popleft())
            self._progress.save()
        finally:
            pool.shutdown(cancel_futures=True)

    def _loaded(
        self, pool: ThreadPoolExecutor, batches: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], list[np.ndarray], list[object]]]:
        """Yield the readable images of each batch: indices, ground truths, and prepared images."""
        ahead: deque[list[tuple[int, Future]]] = deque()
        todo = iter(batches)
        wanted = 2 if not batches else max(2, math.ceil(2 * self._request.workers / max(map(len, batches))))
        while True:
            for batch in todo:
                ahead.append([(index, pool.submit(self._load, index)) for index in batch])
                if len(ahead) >= wanted:
                    break
            if not ahead:
                return
            readable = []
            for index, future in ahead.popleft():
                try:
                    readable.append((index, *future.result()))
                except (UserError, OSError) as error:
                    self._progress.broken[index] = f"{self._dataset.name(index)}: {error}"
                    self._advance()
            indices, truths, prepared = map(list, zip(*readable, strict=True)) if readable else ([], [], [])
            yield indices, truths, prepared

    def _load(self, index: int) -> tuple[np.ndarray, object]:
        image, truth = self._dataset[index]
        return truth, self._request.predictor.prepare(self._dataset.name(index), image)

    def _predict(self, prepared: list[object]) -> Sequence[tuple[np.ndarray, np.ndarray | None]]:
        """Return labels, and confidence if it is measured."""
        predictor = self._request.predictor
        if self._request.confidence:
            return cast(ModelPredictor, predictor).predict_with_confidence(cast(Any, prepared))
        return [(labels, None) for labels in predictor.predict(prepared)]

    def _count(self, index: int, truth: np.ndarray, labels: np.ndarray, confidence: np.ndarray | None) -> _Counted:
        """Return an image's counts, the JSON entries of its prediction if they are saved, and those of confidence."""
        entries = []
        if self._request.save_predictions:
            entries = predictions.entries(str(self._dataset.file(index)), labels, self._num_classes)
        of_confidence = None if confidence is None else count_confidence(truth, labels, confidence, self._num_classes)
        return count_image(truth, labels, self._num_classes), entries, of_confidence

    def _add(self, index: int, future: Future[_Counted]) -> None:
        self._progress.add(index, *future.result())
        self._advance()

    def _save_now_and_then(self) -> None:
        due = time.monotonic() - self._saved >= self._request.save_every
        if due or self._progress.unsaved_bytes > _MOST_UNSAVED:
            self._progress.save()
            self._saved = time.monotonic()
