"""A label map that grows strip by strip on disk, so that work which is killed goes on where it stopped."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from opensan.errors import UserError


class StripFile:
    """Labels [H, W] in a plain file: one line of JSON that says what work this is, then the rows as they come.

    Use as a context manager; only one process at a time can. A file of other work is begun anew, and a strip that was
    written in part is written again.
    """

    def __init__(self, path: Path, work: Mapping[str, Any], strips: Sequence[tuple[int, int]], width: int) -> None:
        """`work` is all that the labels depend on; `strips` are first row and row after the last, without gaps.

        Labels are kept as uint8 up to 255 words and uint16 beyond, given by `work["words"]`; unlabelled is the highest.
        """
        self.path = path
        self.dtype = np.dtype(label_dtype(work["words"]))
        self._header = json.dumps({"opensan": 1, **work}, sort_keys=True).encode() + b"\n"
        self._strips = strips
        self._width = width
        self._lock = FileLock(path.with_name(path.name + ".lock"), timeout=0)
        self.finished = 0
        """Strips that are written."""

    def __enter__(self) -> "StripFile":
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(f"{self.path}: another run is writing it; wait for it, or choose another --out") from None
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        if self._file.read(len(self._header)) != self._header:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(self._header)
        size = self._file.seek(0, 2)
        ends = [self._offset(bottom) for _, bottom in self._strips]
        self.finished = sum(end <= size for end in ends)
        end = ends[self.finished - 1] if self.finished else len(self._header)
        self._file.truncate(end)
        self._file.seek(end)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def append(self, labels: np.ndarray) -> None:
        """Write the next strip, [rows, W] int, -1 for unlabelled (the highest value: -1, cut to the file's bits)."""
        top, bottom = self._strips[self.finished]
        assert labels.shape == (bottom - top, self._width), labels.shape
        self._file.write(labels.astype(self.dtype).tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())  # rows count as finished by the file's size, also after a loss of power
        self.finished += 1

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows [bottom - top, W] of what is written, as stored."""
        self._file.seek(self._offset(top))
        rows = np.frombuffer(self._file.read(self._offset(bottom) - self._offset(top)), dtype=self.dtype)
        return rows.reshape(bottom - top, self._width)

    def _offset(self, row: int) -> int:
        return len(self._header) + row * self._width * self.dtype.itemsize


def label_dtype(words: int) -> str:
    """What stores so many words and "unlabelled", which is its highest value."""
    return "uint8" if words <= 255 else "uint16"
