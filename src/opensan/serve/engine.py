"""The model's work, off the event loop: photographs in batches on one thread, words on others.

A photograph waits in no queue of ours: `batched` collects those that wait while the model works and hands them over
together. Words are answered in this process, from encodings in its memory, so that a key pressed is answered in
milliseconds, whatever photographs wait.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from batched.aio import AsyncBatchProcessor

from opensan.images import ImageError, open_image
from opensan.segmentation import AnySegmenter, Encoding, ReadImage
from opensan.serve.limits import Limits, Problem, busy
from opensan.serve.metrics import Metrics

GATHER_MS = 2.0
"""How long an idle model waits for a second photograph."""

DECODERS = 2
LABELLERS = 2

Answer = TypeVar("Answer")


class Engine:
    """One model, its threads, and the bounds on what waits for them. Its coroutines belong to one event loop."""

    def __init__(self, segmenter: AnySegmenter, limits: Limits, metrics: Metrics, batch: int = 4) -> None:
        self.segmenter = segmenter
        self._limits = limits
        self._metrics = metrics
        self._network = ThreadPoolExecutor(1, "encode")
        self._decoders = ThreadPoolExecutor(DECODERS, "decode")
        self._labellers = ThreadPoolExecutor(LABELLERS, "label")
        self._batches: AsyncBatchProcessor[ReadImage, Encoding] = AsyncBatchProcessor(
            self._encode_batch, batch_size=batch, timeout_ms=GATHER_MS
        )
        # Those that wait beyond the next batch wait as files: decoded, a photograph is many times as large.
        self._decoded = asyncio.Semaphore(2 * batch)
        self._waiting = 0
        self._questions = 0
        self._seconds_an_image = 0.1
        metrics.waiting.set_function(lambda: self._waiting)
        metrics.questions.set_function(lambda: self._questions)

    def close(self) -> None:
        """Let the threads end; nothing may be asked any more."""
        for pool in (self._network, self._decoders, self._labellers):
            pool.shutdown(cancel_futures=True)

    def check_room(self) -> None:
        """Raise Problem (429) if no photograph would be accepted now."""
        if self._waiting >= self._limits.waiting:
            raise busy(
                f"{self._waiting} photographs are waiting already: try again later",
                self._waiting * self._seconds_an_image,
            )

    async def encode(self, data: bytes) -> Encoding:
        """The photograph in `data`, an image file, through the image half of the model.

        Raises Problem: 422 for what is not a photograph or too large a one, 429 at once if too many wait, 503 if it
        waited too long. If the caller is cancelled while the photograph waits, it is not encoded.
        """
        self.check_room()
        self._waiting += 1
        try:
            with self._time_limit():
                async with asyncio.timeout(self._limits.queue_seconds), self._decoded:
                    photograph = await _on(self._decoders, lambda: self._read(data))
                    return await self._batches(photograph)
        except ImageError as error:
            raise Problem(422, str(error)) from None
        finally:
            self._waiting -= 1

    async def ask(self, work: Callable[[], Answer], *, accepted: bool = False) -> Answer:
        """Run `work`, which asks an encoding words, on a thread.

        Raises Problem: 422 for words that cannot be used, 429 at once if too many wait (not for a request that was
        `accepted` before its photograph was encoded), 503 if it took too long.
        """
        if self._questions >= self._limits.questions and not accepted:
            raise busy(f"{self._questions} questions are waiting already: try again later", 1)
        self._questions += 1
        try:
            with self._time_limit():
                async with asyncio.timeout(self._limits.queue_seconds):
                    return await _on(self._labellers, work)
        except ValueError as error:
            raise Problem(422, str(error)) from None
        finally:
            self._questions -= 1

    def _read(self, data: bytes) -> ReadImage:
        return self.segmenter.prepare(open_image(data, max_pixels=self._limits.pixels))

    async def _encode_batch(self, photographs: list[ReadImage]) -> list[Encoding]:
        return await _on(self._network, lambda: self._encode(photographs))

    def _encode(self, photographs: list[ReadImage]) -> list[Encoding]:
        """Photographs of one padded shape go through the network together."""
        started = time.monotonic()
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, photograph in enumerate(photographs):
            groups[photograph.prepared.sizes.padded].append(index)
        encodings: dict[int, Encoding] = {}
        for indices in groups.values():
            group = [photographs[index] for index in indices]
            found = self.segmenter.encode_prepared(
                [photograph.prepared for photograph in group], [photograph.array for photograph in group]
            )
            encodings.update(zip(indices, found, strict=True))
            self._metrics.batch.observe(len(group))
        seconds = time.monotonic() - started
        self._metrics.encode.observe(seconds)
        self._seconds_an_image += 0.2 * (seconds / len(photographs) - self._seconds_an_image)
        return [encodings[index] for index in range(len(photographs))]

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            seconds = self._limits.queue_seconds
            raise Problem(503, f"no answer within {seconds:g} s: try again later", {"Retry-After": "5"}) from None


async def _on(pool: ThreadPoolExecutor, work: Callable[[], Answer]) -> Answer:
    """Cancelled before its turn, `work` is never run."""
    return await asyncio.get_running_loop().run_in_executor(pool, work)
