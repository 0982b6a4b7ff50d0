"""Stream training batches endlessly from seeds.

The sample at a position of the stream depends on (seed, position) alone, and so do the random numbers of its
augmentation. A run's whole data state is therefore its step number, with any number of workers.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from opensan.errors import UserError

MOST_REPLACEMENTS = 10
"""After so many broken samples in a row the data set is at fault, not a file."""

MIXTURE_ROUND = 1_000
"""The sources' shares are exact over so many micro-batches."""


class TrainingSource(Protocol):
    """A training set: samples that are loaded, augmented, and collected to batches."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def name(self, index: int) -> str:
        """Return the sample's name for messages."""

    def load(self, index: int, generator: np.random.Generator) -> Any:
        """Read and augment a sample, drawing from `generator` only. Raises UserError or OSError if it is broken."""

    def collate(self, samples: list[Any]) -> Any:
        """Return a batch: an object with `to(device)`, and with `pin_memory()` for asynchronous copies to a GPU."""


@dataclass(frozen=True)
class DatasetMixture:
    """Several sources. Each micro-batch comes from one of them, so every source may have its own vocabulary.

    Sources get micro-batches, and thereby samples, in proportion to their weights, whatever their sizes.
    """

    sources: tuple[TrainingSource, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.weights) or not self.sources:
            raise UserError(f"{len(self.sources)} training data sets have {len(self.weights)} weights")
        if not all(np.isfinite(weight) and weight > 0 for weight in self.weights):
            raise UserError(f"weights of training data sets must be above 0: {self.weights}")
        for source, count in enumerate(self.batches_a_round()):
            if len(self.sources[source]) == 0:
                raise UserError("the training data set is empty")
            if count == 0:
                raise UserError(f"training data set {source + 1} has less than 1/{MIXTURE_ROUND} of the weight")

    def batches_a_round(self) -> list[int]:
        """Return how many of MIXTURE_ROUND micro-batches each source gets (largest remainders)."""
        exact = np.array(self.weights) / sum(self.weights) * MIXTURE_ROUND
        counts = np.floor(exact).astype(int)
        missing = MIXTURE_ROUND - counts.sum()
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
        return counts.tolist()


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch, and the samples that could not be read."""

    batch: Any
    names: tuple[str, ...]
    broken: tuple[str, ...]
    """Errors of samples that could not be read and were replaced by others."""

    def pin_memory(self) -> "LoadedBatch":
        """Return it in pinned memory, from which a GPU copies asynchronously, if the batch supports it."""
        return replace(self, batch=self.batch.pin_memory()) if hasattr(self.batch, "pin_memory") else self


class MixtureOrder:
    """Order of the stream: number of a micro-batch -> (its source, its number among that source's micro-batches)."""

    def __init__(self, mixture: DatasetMixture, seed: int) -> None:
        self.counts = mixture.batches_a_round()
        self.seed = seed
        self._round = lru_cache(maxsize=2)(self._make_round)

    def _make_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return for each micro-batch of a round: its source, and how many of that source precede it in the round."""
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        sources = np.random.default_rng([self.seed, 3, number]).permutation(sources)
        before = np.zeros_like(sources)
        for source, count in enumerate(self.counts):
            before[sources == source] = np.arange(count)
        return sources, before

    def __call__(self, number: int) -> tuple[int, int]:
        round_number, offset = divmod(number, MIXTURE_ROUND)
        sources, before = self._round(round_number)
        source = int(sources[offset])
        return source, round_number * self.counts[source] + int(before[offset])


class SampleOrder:
    """Order of a source's samples in the stream: position -> sample, with a new permutation in every epoch."""

    def __init__(self, samples: int, seed: int, source: int = 0) -> None:
        self.samples = samples
        self.seed = seed
        self.source = source
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)

    def _make_permutation(self, epoch: int) -> np.ndarray:
        # numpy ignores a last 0, so the first source of a mixture draws the same numbers as a source alone.
        return np.random.default_rng([self.seed, 0, epoch, self.source]).permutation(self.samples)

    def __call__(self, position: int) -> int:
        epoch, offset = divmod(position, self.samples)
        return int(self._permutation(epoch)[offset])


@dataclass(frozen=True)
class _Item:
    """A sample, or the errors of those that it replaces, on its way into a batch."""

    source: int
    sample: Any
    name: str
    broken: tuple[str, ...]


class _Positions(Dataset):
    """Data set view of the stream, indexed by (source, position among the source's samples)."""

    def __init__(self, sources: Sequence[TrainingSource], seed: int) -> None:
        self.sources = sources
        self.seed = seed
        self.orders: list[SampleOrder] | None = (
            None  # made in the worker, because cached permutations are not sent between processes
        )

    def __getitem__(self, index: tuple[int, int]) -> _Item | UserError:
        """Load a sample. Errors that end the run are returned, because a worker's exception adds pages of traceback."""
        number, position = index
        self.orders = self.orders or [SampleOrder(len(source), self.seed, i) for i, source in enumerate(self.sources)]
        source = self.sources[number]
        generator = np.random.default_rng([self.seed, 1, position, number])
        sample = self.orders[number](position)
        broken: list[str] = []
        while True:
            name = source.name(sample)
            try:
                return _Item(number, source.load(sample, generator), name, tuple(broken))
            except (UserError, OSError) as error:
                broken.append(f"{name}: {error}")
                if len(broken) == MOST_REPLACEMENTS:
                    return UserError(f"{len(broken)} broken samples in a row, the last: {broken[-1]}")
            sample = int(generator.integers(len(source)))

    def collate(self, items: list[_Item | UserError]) -> LoadedBatch | UserError:
        samples = []
        for item in items:
            if isinstance(item, UserError):
                return item
            samples.append(item)
        return LoadedBatch(
            self.sources[samples[0].source].collate([item.sample for item in samples]),
            tuple(item.name for item in samples),
            tuple(reason for item in samples for reason in item.broken),
        )


class _BatchPositions:
    """The indices of each micro-batch of this rank, from `first_step` to `steps`.

    A step takes the next world * accumulate micro-batches of the stream; rank r takes the r-th contiguous part.
    """

    def __init__(
        self, order: MixtureOrder, first_step: int, steps: int, batch_size: int, accumulate: int, rank: int, world: int
    ) -> None:
        self.order = order
        self.batches = range(first_step * accumulate, steps * accumulate)
        self.batch_size, self.accumulate, self.rank, self.world = batch_size, accumulate, rank, world

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in self.batches:
            step, micro = divmod(number, self.accumulate)
            source, batch = self.order((step * self.world + self.rank) * self.accumulate + micro)
            yield [(source, position) for position in range(batch * self.batch_size, (batch + 1) * self.batch_size)]


def stream(
    source: TrainingSource | DatasetMixture,
    *,
    seed: int,
    first_step: int,
    steps: int,
    batch_size: int,
    accumulate: int = 1,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> Iterator[Sequence[LoadedBatch]]:
    """Yield the micro-batches of each step from `first_step` to `steps` - 1. To stop early, close the iterator."""
    mixture = source if isinstance(source, DatasetMixture) else DatasetMixture((source,), (1.0,))
    positions = _Positions(mixture.sources, seed)
    order = MixtureOrder(mixture, seed)
    loader = DataLoader(
        positions,
        batch_sampler=_BatchPositions(order, first_step, steps, batch_size, accumulate, rank, world),
        num_workers=workers,
        collate_fn=positions.collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    batches = iter(loader)
    try:
        for _ in range(first_step, steps):
            yield [_checked(next(batches)) for _ in range(accumulate)]
    finally:
        if workers:
            # Do not wait for garbage collection: a traceback may hold the iterator until the interpreter ends, which
            # then waits for the workers, and these ignore its signals.
            batches._shutdown_workers()  # type: ignore[attr-defined]  # torch has no public way


def _checked(loaded: LoadedBatch | UserError) -> LoadedBatch:
    if isinstance(loaded, UserError):
        raise loaded
    return loaded


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker: it must go on until the trainer has saved and stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
