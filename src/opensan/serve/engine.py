"""The model's work, off the event loop: photographs in batches on one thread, words on others.

A photograph waits in no queue of ours: `batched` collects those that wait while the model works and hands them over
together. Words are answered in this process, from encodings in its memory, so that a key pressed is answered in
milliseconds, whatever photographs wait.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from batched.aio import AsyncBatchProcessor

from opensan.errors import UserError
from opensan.images import ImageError
from opensan.segmenters.base import Segmenter, same_shape
from opensan.segmenters.results import Encoding, InputImage
from opensan.serve.limits import Problem, ServiceLimits, busy
from opensan.serve.metrics import Metrics
from opensan.serve.photographs import decode

GATHER_MS = 2.0
"""How long an idle model waits for a second photograph."""

DECODERS = 2
LABELLERS = 2

Answer = TypeVar("Answer")


@dataclass
class _Place:
    """A request in the queue of batches. If its client leaves, it stays until its turn, but drops its image at once."""

    photograph: InputImage | None = None
    left: bool = False


class Pulse:
    """Tells whether work gets done: it hangs if somebody waited in vain, and nothing was finished meanwhile."""

    def __init__(self) -> None:
        self.hangs = False
        self._finished = 0

    def beat(self) -> None:
        """Something was finished; from any thread."""
        self._finished += 1
        self.hangs = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around work that may end in a TimeoutError."""
        finished = self._finished
        try:
            yield
        except TimeoutError:
            self.hangs = self.hangs or finished == self._finished
            raise


class Engine:
    """One model, its threads, and the bounds on what waits for them. Its coroutines belong to one event loop."""

    def __init__(self, segmenter: Segmenter, limits: ServiceLimits, metrics: Metrics, batch: int = 4) -> None:
        self.segmenter = segmenter
        self._limits = limits
        self._metrics = metrics
        self._network = ThreadPoolExecutor(1, "encode")
        self._decoders = ThreadPoolExecutor(DECODERS, "decode")
        self._labellers = ThreadPoolExecutor(LABELLERS, "label")
        self._batches: AsyncBatchProcessor[_Place, Encoding | Exception] = AsyncBatchProcessor(
            self._encode_batch, batch_size=batch, timeout_ms=GATHER_MS
        )
        # Those that wait beyond the next batch wait as files: decoded, a photograph is many times as large.
        self._decoded = asyncio.Semaphore(2 * batch)
        self._waiting = 0
        self._questions = 0
        self._seconds_an_image = 0.1
        self._encoded, self._answered = Pulse(), Pulse()
        metrics.waiting.set_function(lambda: self._waiting)
        metrics.questions.set_function(lambda: self._questions)

    def close(self) -> None:
        """Let the threads end; nothing may be asked any more."""
        for pool in (self._network, self._decoders, self._labellers):
            pool.shutdown(cancel_futures=True)

    @property
    def hangs(self) -> bool:
        """Whether the last to give up waiting saw nothing finished, of photographs or of questions."""
        return self._encoded.hangs or self._answered.hangs

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
        place = _Place()
        try:
            with self._time_limit(), self._encoded.watching():
                async with asyncio.timeout(self._limits.queue_seconds), self._decoded:
                    place.photograph = await _on(self._decoders, lambda: self._read(data, place))
                    found = await self._batches(place)
        except ImageError as error:
            raise Problem(422, str(error)) from None
        finally:
            place.photograph, place.left = None, True
            self._waiting -= 1
        if isinstance(found, Exception):
            raise found
        return found

    async def ask(
        self, work: Callable[[], Answer], *, before: Sequence[Callable[[], Any]] = (), accepted: bool = False
    ) -> Answer:
        """Run `work`, which asks an encoding words, on a thread; before it what it needs, a part at a time.

        Others take turns between the parts, and the parts of somebody who left are not run.
        Raises Problem: 422 for words that cannot be used, 429 at once if too many wait (not for a request that was
        `accepted` before its photograph was encoded), 503 if it took too long.
        """
        if self._questions >= self._limits.questions and not accepted:
            raise busy(f"{self._questions} questions are waiting already: try again later", 1)
        self._questions += 1
        try:
            with self._time_limit(), self._answered.watching():
                async with asyncio.timeout(self._limits.queue_seconds):
                    for part in before:
                        await _on(self._labellers, self._counted(part))
                    return await _on(self._labellers, self._counted(work))
        except UserError as error:
            raise Problem(422, str(error)) from None
        finally:
            self._questions -= 1

    def _counted(self, work: Callable[[], Answer]) -> Callable[[], Answer]:
        def counted() -> Answer:
            try:
                return work()
            finally:
                self._answered.beat()

        return counted

    def _read(self, data: bytes, place: _Place) -> InputImage:
        try:
            return self.segmenter.prepare(decode(data, self._limits))
        finally:
            if place.left:  # it took so long that it looked like hanging
                self._encoded.beat()

    async def _encode_batch(self, places: list[_Place]) -> list[Encoding | Exception]:
        photographs = [place.photograph for place in places if place.photograph is not None]
        assert len(photographs) == len(places)  # `batched` has just left out those whose clients left
        try:
            return await _on(self._network, lambda: self._encode(photographs))
        finally:
            self._encoded.beat()

    def _encode(self, photographs: list[InputImage]) -> list[Encoding | Exception]:
        """Photographs of one padded shape go through the network together."""
        started = time.monotonic()
        encodings: dict[int, Encoding | Exception] = {}
        for indices in same_shape(photographs):
            found = self._encode_group([photographs[index] for index in indices])
            encodings.update(zip(indices, found, strict=True))
            self._metrics.batch.observe(len(indices))
        seconds = time.monotonic() - started
        self._metrics.encode.observe(seconds)
        self._seconds_an_image += 0.2 * (seconds / len(photographs) - self._seconds_an_image)
        return [encodings[index] for index in range(len(photographs))]

    def _encode_group(self, group: list[InputImage]) -> list[Encoding | Exception]:
        """Photographs of one padded shape; those of a batch that fails are tried one by one."""
        try:
            return list(self.segmenter.encode_prepared(group))
        except Exception as error:
            if len(group) == 1:
                return [error]
            return [one for photograph in group for one in self._encode_group([photograph])]

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
