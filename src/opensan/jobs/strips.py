"""Store a label map strip by strip on disk, so that killed work can be continued."""

import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from opensan.files import hold
from opensan.journal import Journal, difference


class StripFile:
    """Labels [H, W] in a journal, a row a strip.

    Use as a context manager; only one process at a time can. Strips of other work are forgotten.
    """

    def __init__(self, path: Path, work: Mapping[str, Any], strips: Sequence[tuple[int, int]], width: int) -> None:
        """`work` is all that the labels depend on; `strips` are first row and row after the last, without gaps.

        Labels are kept as uint8 up to 255 words and uint16 beyond, given by `work["words"]`; unlabelled is the highest.
        """
        self.path = path
        self.dtype = np.dtype(label_dtype(work["words"]))
        self._work = work
        self._strips = strips
        self._width = width
        self._read: tuple[int, np.ndarray] | None = None
        self.finished = 0
        """Number of strips that are written."""
        self.other_work: str | None = None
        """Difference of the earlier work whose strips were removed, such as "other words"; empty if none were."""

    def __enter__(self) -> "StripFile":
        busy = f"{self.path}: another run is writing it; wait for it, or choose another --out"
        with ExitStack() as stack:
            stack.enter_context(hold(self.path.with_name(f"{self.path.name}.lock"), busy))
            self._journal = stack.enter_context(Journal(self.path))
            if self._journal.damaged:
                self._journal.damaged.unlink()
            other = self._journal.begin(self._work)
            self.other_work = None if other is None else difference(other, self._work)
            while self.finished < len(self._strips) and self._journal.get(str(self.finished)) is not None:
                self.finished += 1
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def remove(self) -> None:
        """Remove the file, after its labels are stored elsewhere."""
        self._journal.close()
        self.path.unlink()

    def append(self, labels: np.ndarray) -> None:
        """Write the next strip, [rows, W] int, -1 for unlabelled (stored as the file's highest value)."""
        top, bottom = self._strips[self.finished]
        assert labels.shape == (bottom - top, self._width), labels.shape
        data = zlib.compress(labels.astype(self.dtype).tobytes(), 1)
        self._journal.put(str(self.finished), [top, bottom], data)
        self.finished += 1

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Read written rows, [bottom - top, W], as stored."""
        parts = [
            self._strip(number)[max(top - first, 0) : bottom - first]
            for number, (first, last) in enumerate(self._strips[: self.finished])
            if first < bottom and last > top
        ]
        return np.concatenate(parts)

    def _strip(self, number: int) -> np.ndarray:
        if self._read is None or self._read[0] != number:
            top, bottom = self._strips[number]
            size = (bottom - top) * self._width * self.dtype.itemsize
            rows = zlib.decompressobj().decompress(self._journal.data(str(number)), size)  # a bound
            self._read = number, np.frombuffer(rows, dtype=self.dtype).reshape(bottom - top, self._width)
        return self._read[1]


def label_dtype(words: int) -> str:
    """Return the name of the type that stores so many words and "unlabelled", its highest value."""
    return "uint8" if words <= 255 else "uint16"
