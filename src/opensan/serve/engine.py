"""Run the model outside the event loop: images in batches on one thread, words on others.

Images wait in the queue of `batched`, which collects them while the model works and hands them over
together. Words are answered in this process, from encodings in its memory, so that a key pressed is answered in
milliseconds, however many images wait.
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
"""Milliseconds that an idle model waits for a second image."""

DECODERS = 2
LABELLERS = 2

Answer = TypeVar("Answer")


@dataclass
class _Place:
    """A request in the queue of batches. If its client leaves, it stays until its turn, but drops its image at once."""

    segmenter: Segmenter
    photograph: InputImage | None = None
    left: bool = False


class Pulse:
    """Detects a hanging model: a request timed out, and no other was finished meanwhile."""

    def __init__(self) -> None:
        self.hangs = False
        self._finished = 0

    def beat(self) -> None:
        """Record that a request was finished; from any thread."""
        self._finished += 1
        self.hangs = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch work that may end in a TimeoutError."""
        finished = self._finished
        try:
            yield
        except TimeoutError:
            self.hangs = self.hangs or finished == self._finished
            raise


class Engine:
    """The threads that models work on, and the limits on waiting requests. Its coroutines belong to one event loop."""

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
        # Images beyond the next batch wait as files, because a decoded image is many times as large.
        self._decoded = asyncio.Semaphore(2 * batch)
        self._waiting = 0
        self._questions = 0
        self._seconds_an_image = 0.1
        self._encoded, self._answered = Pulse(), Pulse()
        metrics.waiting.set_function(lambda: self._waiting)
        metrics.questions.set_function(lambda: self._questions)

    def close(self) -> None:
        """End the threads; no method may be called afterwards."""
        for pool in (self._network, self._decoders, self._labellers):
            pool.shutdown(cancel_futures=True)

    @property
    def hangs(self) -> bool:
        """Whether the last request that timed out saw no other finished, of images or of questions."""
        return self._encoded.hangs or self._answered.hangs

    def check_room(self) -> None:
        """Raise Problem (429) if no image would be accepted now."""
        if self._waiting >= self._limits.waiting:
            raise busy(
                f"{self._waiting} images are waiting already: try again later",
                self._waiting * self._seconds_an_image,
            )

    async def encode(self, data: bytes, segmenter: Segmenter | None = None) -> Encoding:
        """Encode the image file `data` by a model, None for the engine's own.

        Raises Problem: 422 for a file that is not an image or too large, 429 at once if too many wait, 503 if it
        waited too long. If the caller is cancelled while the image waits, it is not encoded.
        """
        self.check_room()
        self._waiting += 1
        waiting = _Place(segmenter or self.segmenter)
        try:
            with self._time_limit(), self._encoded.watching():
                async with asyncio.timeout(self._limits.queue_seconds), self._decoded:
                    waiting.photograph = await _on(self._decoders, lambda: self._read(data, waiting))
                    result = await self._batches(waiting)
        except ImageError as error:
            raise Problem(422, str(error)) from None
        finally:
            waiting.photograph, waiting.left = None, True
            self._waiting -= 1
        if isinstance(result, Exception):
            raise result
        return result

    async def ask(
        self, work: Callable[[], Answer], *, before: Sequence[Callable[[], Any]] = (), accepted: bool = False
    ) -> Answer:
        """Run `work`, which labels an encoding, on a thread, after the parts in `before`, one at a time.

        Other requests run between the parts; if the client leaves, the remaining parts are not run.
        Raises Problem: 422 for words that cannot be used, 429 at once if too many wait (not for a request that was
        `accepted` before its image was encoded), 503 if it took too long.
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

    def _read(self, data: bytes, waiting: _Place) -> InputImage:
        try:
            return waiting.segmenter.prepare(decode(data, self._limits))
        finally:
            if waiting.left:  # decoding took longer than the time limit, which looked like hanging
                self._encoded.beat()

    async def _encode_batch(self, places: list[_Place]) -> list[Encoding | Exception]:
        photographs = [(waiting.segmenter, waiting.photograph) for waiting in places if waiting.photograph is not None]
        assert len(photographs) == len(places)  # `batched` has just removed those whose clients left
        try:
            return await _on(self._network, lambda: self._encode(photographs))
        finally:
            self._encoded.beat()

    def _encode(self, photographs: list[tuple[Segmenter, InputImage]]) -> list[Encoding | Exception]:
        """Encode images; those for one model and of one padded shape go through the network together."""
        started = time.monotonic()
        encodings: dict[int, Encoding | Exception] = {}
        for segmenter in {id(model): model for model, _ in photographs}.values():
            own = [index for index, (model, _) in enumerate(photographs) if model is segmenter]
            for group in same_shape([photographs[index][1] for index in own]):
                indices = [own[index] for index in group]
                results = self._encode_group(segmenter, [photographs[index][1] for index in indices])
                encodings.update(zip(indices, results, strict=True))
                self._metrics.batch.observe(len(indices))
        seconds = time.monotonic() - started
        self._metrics.encode.observe(seconds)
        self._seconds_an_image += 0.2 * (seconds / len(photographs) - self._seconds_an_image)
        return [encodings[index] for index in range(len(photographs))]

    def _encode_group(self, segmenter: Segmenter, group: list[InputImage]) -> list[Encoding | Exception]:
        """Encode images of one padded shape; if the batch fails, one by one."""
        try:
            return list(segmenter.encode_prepared(group))
        except Exception as error:
            if len(group) == 1:
                return [error]
            return [result for photograph in group for result in self._encode_group(segmenter, [photograph])]

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            seconds = self._limits.queue_seconds
            raise Problem(503, f"no answer within {seconds:g} s: try again later", {"Retry-After": "5"}) from None


async def _on(pool: ThreadPoolExecutor, work: Callable[[], Answer]) -> Answer:
    """Run `work` on a thread of `pool`; if cancelled before its turn, it is not run."""
    return await asyncio.get_running_loop().run_in_executor(pool, work)
