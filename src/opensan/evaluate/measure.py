"""Evaluate at full scale: batches by shape, files read ahead, progress on disk, any number of processes.

    threads: read photograph and labels -> prepare -.            .-> count -> add, now and then save
    main thread:                                     `-> predict -'

The plan of batches depends on the data set and the batch size alone. Every process takes a share of it.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from opensan.data.dataset import SegmentationDataset
from opensan.distributed import barrier, gather_objects, is_main, on_main, rank, world_size
from opensan.errors import UserError
from opensan.evaluate import predictions
from opensan.evaluate.evaluation import Evaluation, Photograph
from opensan.evaluate.metrics import ImageCounts, count_image
from opensan.evaluate.predictors import BatchPredictor
from opensan.evaluate.progress import Progress, journal_path, open_progress, read_all, read_predictions
from opensan.files import hold, remove_temporaries

SAVE_EVERY = 15.0
"""Seconds of work that an interruption may cost."""

_MOST_UNSAVED = 8 * 2**20
"""Saved predictions kept in memory before they are written."""


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
    save_every: float = SAVE_EVERY,
    note: Callable[[str], None] = lambda message: None,
    progress: bool = False,
) -> Evaluation:
    """Compare predictions with ground truth at each image's own size, and keep the progress in `folder`.

    The same call after an interruption continues from the last save; with another model, data set or protocol it
    starts anew. In processes that torchrun started each does a share (`folder` must be one for all), and all return
    the whole.

    Args:
        batch: images that are predicted together, if their shapes are equal.
        workers: threads that read and count.
        save_predictions: also write `sem_seg_predictions.json` to `folder`.
        save_every: seconds between saves.
        note: called with messages for the user.
        progress: show a bar on stderr.

    Raises:
        ValueError: the data set is empty, or another evaluation is writing to `folder`.
    """
    if len(dataset) == 0:
        raise UserError("the data set has no images")
    with ExitStack() as held:
        on_main(lambda: _take(held, folder))
        return _measure(
            dataset, predictor, folder, batch, workers, save_predictions, save_every, note, progress and is_main()
        )


def _take(held: ExitStack, folder: Path) -> None:
    """Hold the folder, and remove what a killed evaluation left half-written there."""
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"{folder}: another evaluation is writing there; wait for it, or choose another --out"
    held.enter_context(hold(folder / ".lock", busy))
    for place in (folder, folder / "pictures"):
        remove_temporaries(place)


def _measure(
    dataset: MeasurableDataset,
    predictor: BatchPredictor,
    folder: Path,
    batch: int,
    workers: int,
    save_predictions: bool,
    save_every: float,
    note: Callable[[str], None],
    progress: bool,
) -> Evaluation:
    num_classes = len(dataset.vocabulary.names)
    state = folder / "progress"
    work = {"data": dataset.fingerprint(), "saves predictions": save_predictions, **predictor.key}
    other = on_main(lambda: open_progress(state, work))
    if other is not None:
        note(f"{folder}: holds an evaluation with {other}: starting anew")
    done = read_all(state, num_classes).figures.keys()
    if done:
        note(f"{folder}: {len(done)} of {len(dataset)} images are measured already")
    batches = _share(_plan(dataset, predictor, batch, workers), done)
    barrier()  # all have read before one writes
    with Progress(journal_path(state, rank())) as mine:
        mine.begin(work)
        with _bar(sum(map(len, batches)), shown=progress) as advance:
            _Run(dataset, predictor, mine, save_predictions, save_every, advance).all(batches, workers)
    broken = {index: text for part in gather_objects(mine.broken) for index, text in part.items()}
    return on_main(lambda: _whole(dataset, folder, broken, save_predictions))


def _whole(dataset: MeasurableDataset, folder: Path, broken: Mapping[int, str], save_predictions: bool) -> Evaluation:
    """Sum up all processes' progress."""
    names = dataset.vocabulary.names
    whole = read_all(folder / "progress", len(names))
    if save_predictions:
        predictions.write_list(read_predictions(folder / "progress"), folder / predictions.FILE_NAME)
    images = [Photograph(index, dataset.name(index), *whole.figures[index]) for index in sorted(whole.figures)]
    return Evaluation(
        whole.counts.metrics(names),
        len(images),
        tuple(broken[index] for index in sorted(broken)),
        tuple(whole.counts.worst_confusions(names)),
        tuple(images),
    )


def _plan(dataset: MeasurableDataset, predictor: BatchPredictor, batch: int, workers: int) -> list[list[int]]:
    """Return all images in batches of equal shape, in the order of each batch's first."""

    def shape(index: int) -> object:
        try:
            return predictor.shape(dataset.size(index))
        except (UserError, OSError):
            return "unreadable"  # the reason is reported when it is read

    groups: Mapping[object, list[int]] = defaultdict(list)
    with ThreadPoolExecutor(workers) as pool:
        for index, found in enumerate(pool.map(shape, range(len(dataset)))):
            groups[found].append(index)
    return sorted(group[start : start + batch] for group in groups.values() for start in range(0, len(group), batch))


def _share(batches: Sequence[list[int]], done: Collection[int]) -> list[list[int]]:
    """Return this process's batches, without the images that are done."""
    left = [[index for index in batch if index not in done] for batch in batches[rank() :: world_size()]]
    return [batch for batch in left if batch]


class _Run:
    """Evaluates one process's share of the images."""

    def __init__(
        self,
        dataset: MeasurableDataset,
        predictor: BatchPredictor,
        progress: Progress,
        save_predictions: bool,
        save_every: float,
        advance: Callable[[int], None],
    ) -> None:
        self._dataset = dataset
        self._predictor = predictor
        self._progress = progress
        self._save_predictions = save_predictions
        self._save_every = save_every
        self._advance = advance
        self._num_classes = len(dataset.vocabulary.names)
        self._saved = time.monotonic()

    def all(self, batches: Sequence[list[int]], workers: int) -> None:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="evaluate")
        try:
            counting: deque[tuple[int, Future[tuple[ImageCounts, list[str]]]]] = deque()
            for indices, truths, prepared in self._loaded(pool, batches, workers):
                answers = self._predictor.predict(prepared) if prepared else []
                for index, truth, labels in zip(indices, truths, answers, strict=True):
                    counting.append((index, pool.submit(self._count, index, truth, labels)))
                while len(counting) > workers + len(indices):
                    self._add(*counting.popleft())
                self._save_now_and_then()
            while counting:
                self._add(*counting.popleft())
            self._progress.save()
        finally:
            pool.shutdown(cancel_futures=True)

    def _loaded(
        self, pool: ThreadPoolExecutor, batches: Sequence[list[int]], workers: int
    ) -> Iterator[tuple[list[int], list[np.ndarray], list[object]]]:
        """Yield the readable images of each batch: indices, ground truths, and prepared images."""
        ahead: deque[list[tuple[int, Future]]] = deque()
        todo = iter(batches)
        wanted = 2 if not batches else max(2, math.ceil(2 * workers / max(map(len, batches))))
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
                    self._advance(1)
            indices, truths, prepared = map(list, zip(*readable, strict=True)) if readable else ([], [], [])
            yield indices, truths, prepared

    def _load(self, index: int) -> tuple[np.ndarray, object]:
        image, truth = self._dataset[index]
        return truth, self._predictor.prepare(self._dataset.name(index), image)

    def _count(self, index: int, truth: np.ndarray, labels: np.ndarray) -> tuple[ImageCounts, list[str]]:
        """Return an image's counts, and the JSON entries of its prediction if they are saved."""
        entries = []
        if self._save_predictions:
            entries = predictions.entries(str(self._dataset.file(index)), labels, self._num_classes)
        return count_image(truth, labels, self._num_classes), entries

    def _add(self, index: int, future: "Future[tuple[ImageCounts, list[str]]]") -> None:
        self._progress.add(index, *future.result())
        self._advance(1)

    def _save_now_and_then(self) -> None:
        due = time.monotonic() - self._saved >= self._save_every
        if due or self._progress.unsaved_bytes > _MOST_UNSAVED:
            self._progress.save()
            self._saved = time.monotonic()


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts finished images; a bar shows on stderr if that is a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with ProgressBar(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("evaluating", total=total)
        yield lambda count: bar.advance(task, count)
