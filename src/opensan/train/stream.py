"""The endless, seeded stream of training batches.

Which sample stands at a position of the stream depends on (seed, position) alone, and so do the random numbers of its
augmentation. A run's whole data state is therefore its step number, with any number of workers.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

MOST_REPLACEMENTS = 10
"""So many broken samples in a row mean that the data set is broken, not a file."""


class TrainingSource(Protocol):
    """What can be trained on: samples that are loaded, augmented, and collected to batches."""

    def __len__(self) -> int:
        """The number of samples."""

    def name(self, index: int) -> str:
        """What messages call the sample."""

    def load(self, index: int, generator: np.random.Generator) -> Any:
        """Read and augment a sample, drawing from `generator` only. Raises OSError or ValueError if it is broken."""

    def collate(self, samples: list[Any]) -> Any:
        """A batch, an object with a method `to(device)`."""


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch, and what to say about it."""

    batch: Any
    names: tuple[str, ...]
    broken: tuple[str, ...]
    """Reasons why samples could not be read; others were taken in their place."""


class SampleOrder:
    """Position in the stream -> sample: every epoch a permutation of its own."""

    def __init__(self, samples: int, seed: int) -> None:
        if samples == 0:
            raise ValueError("the training data set is empty")
        self.samples = samples
        self.seed = seed
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)

    def _make_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(self.samples)

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self.samples)
        return int(self._permutation(epoch)[place])


class _Positions(Dataset):
    """The stream as a data set: a position is an index."""

    def __init__(self, source: TrainingSource, seed: int) -> None:
        self.source = source
        self.seed = seed
        self.order = None  # made in the worker: the cache of permutations does not travel between processes

    def __getitem__(self, position: int) -> tuple[Any, str, tuple[str, ...]]:
        self.order = self.order or SampleOrder(len(self.source), self.seed)
        generator = np.random.default_rng([self.seed, 1, position])
        index = self.order(position)
        broken = []
        while True:
            name = self.source.name(index)
            try:
                return self.source.load(index, generator), name, tuple(broken)
            except (OSError, ValueError) as error:
                broken.append(f"{name}: {error}")
                if len(broken) == MOST_REPLACEMENTS:
                    raise ValueError(f"{len(broken)} broken samples in a row, the last: {broken[-1]}") from None
            index = int(generator.integers(len(self.source)))

    def collate(self, items: list[tuple[Any, str, tuple[str, ...]]]) -> LoadedBatch:
        samples, names, broken = zip(*items, strict=True)
        return LoadedBatch(
            self.source.collate(list(samples)), names, tuple(reason for some in broken for reason in some)
        )


class _BatchPositions:
    """The positions of each micro-batch of this rank, from `first_step` to `steps`.

    A step takes the next world * accumulate * batch_size positions; rank r takes the r-th contiguous part.
    """

    def __init__(self, first_step: int, steps: int, batch_size: int, accumulate: int, rank: int, world: int) -> None:
        self.batches = range(first_step * accumulate, steps * accumulate)
        self.batch_size, self.accumulate, self.rank, self.world = batch_size, accumulate, rank, world

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.batches:
            step, micro = divmod(number, self.accumulate)
            batch = (step * self.world + self.rank) * self.accumulate + micro
            yield list(range(batch * self.batch_size, (batch + 1) * self.batch_size))


def stream(
    source: TrainingSource,
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
    """The micro-batches of each step from `first_step` to `steps` - 1."""
    positions = _Positions(source, seed)
    loader = DataLoader(
        positions,
        batch_sampler=_BatchPositions(first_step, steps, batch_size, accumulate, rank, world),
        num_workers=workers,
        collate_fn=positions.collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    batches = iter(loader)
    for _ in range(first_step, steps):
        yield [next(batches) for _ in range(accumulate)]


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """Ctrl-C and a cluster's SIGTERM reach the workers too; they must go on until the trainer has saved and left."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
