"""Keep the most recently used encodings in memory, within limits."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from opensan.segmenters.results import Encoding


@dataclass
class _Kept:
    encoding: Encoding
    size: int
    """Size in bytes."""
    expires: float


class EncodingCache:
    """At most `entries` encodings of `size` bytes together, each for `seconds` after its last use.

    Ids are random and too long to be guessed, so only clients that know an id can see the image.
    Used from one thread.
    """

    def __init__(self, entries: int, size: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.size = 0
        self._entries = entries
        self._most = size
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, encoding: Encoding) -> str:
        """Keep `encoding` and return its id; the least recently used ones are removed to make room."""
        name = secrets.token_urlsafe(16)
        self._kept[name] = _Kept(encoding, encoding.nbytes, self._clock() + self.seconds)
        self.size += self._kept[name].size
        self.sweep()
        while len(self._kept) > 1 and (len(self._kept) > self._entries or self.size > self._most):
            self._drop(next(iter(self._kept)))
        return name

    def get(self, name: str) -> Encoding | None:
        """Return the encoding of that id, and restart its time; None if there is none (any more)."""
        self.sweep()
        kept = self._kept.get(name)
        if kept is None:
            return None
        kept.expires = self._clock() + self.seconds
        self._kept.move_to_end(name)
        return kept.encoding

    def remove(self, name: str) -> bool:
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
        self.size -= self._kept.pop(name).size
