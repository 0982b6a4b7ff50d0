"""Keep the most recently used encodings, within limits: in memory, or wherever several processes find them."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from opensan.segmenters.results import Encoding


class Encodings(Protocol):
    """Encodings by id, of this process alone (`EncodingCache`) or of several."""

    seconds: float
    """Seconds that an encoding is kept after its last use."""

    def __len__(self) -> int: ...

    @property
    def size(self) -> int:
        """Bytes of those in this process's memory, whose number is the length."""

    async def add(self, encoding: Encoding) -> str:
        """Keep an encoding and return its id."""

    async def get(self, name: str) -> Encoding | None:
        """Return the encoding of that id; None if there is none (any more)."""

    async def remove(self, name: str) -> bool:
        """Remove an encoding; return whether there was one."""

    def sweep(self) -> None:
        """Remove expired encodings from this process's memory."""


@dataclass
class _Kept:
    encoding: Encoding
    size: int
    """Size in bytes."""
    expires: float


class EncodingCache:
    """At most `entries` encodings of `size` bytes together, each for `seconds` after its last use.

    Ids are random and too long to be guessed, so only clients that know an id can see the image.
    Used from one thread. Nothing is awaited: coroutines are what `Encodings` asks for.
    """

    def __init__(self, entries: int, size: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = 0
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self.bound(entries, size, seconds)

    def bound(self, entries: int, size: int, seconds: float) -> None:
        """Set the limits for what comes from now on."""
        self._entries, self._most, self.seconds = entries, size, seconds

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes of the encodings that are kept."""
        return self._size

    async def add(self, encoding: Encoding, name: str | None = None) -> str:
        """Keep `encoding` and return its id, a new one by default; the least recently used ones make room."""
        name = name or secrets.token_urlsafe(16)
        await self.remove(name)
        self._kept[name] = _Kept(encoding, encoding.nbytes, self._clock() + self.seconds)
        self._size += self._kept[name].size
        self.sweep()
        while len(self._kept) > 1 and (len(self._kept) > self._entries or self._size > self._most):
            self._drop(next(iter(self._kept)))
        return name

    async def get(self, name: str) -> Encoding | None:
        """Return the encoding of that id, and restart its time; None if there is none (any more)."""
        self.sweep()
        kept = self._kept.get(name)
        if kept is None:
            return None
        kept.expires = self._clock() + self.seconds
        self._kept.move_to_end(name)
        return kept.encoding

    async def remove(self, name: str) -> bool:
        """Remove an encoding; return whether there was one."""
        if name not in self._kept:
            return False
        self._drop(name)
        return True

    def sweep(self) -> None:
        """Remove expired encodings, which come first, because they are ordered by use."""
        now = self._clock()
        while self._kept and next(iter(self._kept.values())).expires <= now:
            self._drop(next(iter(self._kept)))

    def _drop(self, name: str) -> None:
        self._size -= self._kept.pop(name).size
