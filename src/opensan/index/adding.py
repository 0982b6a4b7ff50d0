"""Encode images into an index: each once, again if it has changed, and on from where a stopped run was."""

import filecmp
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from opensan.buckets import bucket_path
from opensan.files import absolute
from opensan.images import ImageError
from opensan.index.contrast import Contrast
from opensan.index.rows import ImageRow, stored_vectors
from opensan.index.writer import Change, Writer
from opensan.jobs.folder import MAX_THREADS, ahead
from opensan.jobs.ledger import Stamp
from opensan.segmenters.proposals import ProposalSegmenter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from opensan.segmenters.results import Encoding, InputImage

COMMIT_AFTER = 10.0
"""Seconds of work after which it is committed."""

COMMIT_IMAGES = 64
"""Images after which they are committed, in any case."""


@dataclass
class Added:
    """Result of `Index.add`."""

    new: int = 0
    """Images that were encoded for the first time."""
    changed: int = 0
    """Images that were encoded again, as their files have changed."""
    unchanged: int = 0
    """Images that were in the index already."""
    same: list[tuple[Path, str]] = field(default_factory=list)
    """Files with the content of another one, and that one: they share its proposals."""
    moved: list[tuple[Path, str]] = field(default_factory=list)
    """Files with the content of another one that is gone, and that one's path: they replace it."""
    broken: list[str] = field(default_factory=list)
    """Reasons, one line each, why images can't be read."""


@dataclass(frozen=True)
class Read:
    """An image in memory, and its file."""

    path: Path
    stamp: Stamp
    """State of the file before it was read, so that the next run notices a replacement."""
    image: "InputImage"


@dataclass(frozen=True)
class Encoded:
    """An image's encoding, and its file."""

    path: Path
    stamp: Stamp
    encoding: "Encoding"
    contrast: str = ""
    """Identity of the words of its contrasts; "" if it has none."""
    contrasts: "NDArray[np.float32] | None" = None
    """Contrasts of all proposals, [Q]."""


class Encoders(Protocol):
    """Whoever encodes images elsewhere than in this process."""

    def encoded(self, paths: Sequence[Path]) -> Iterator[list[Encoded | str]]:
        """Yield the images at `paths` as they are encoded, in any order; the reason where one can't be read."""


def read_stamped(segmenter: ProposalSegmenter, path: Path) -> Read | str:
    """Read an image; return the reason, one line, if that can't be done."""
    try:
        stamp = Stamp.of(path)
        return Read(path, stamp, segmenter.read(path))
    except ImageError as error:
        return str(error)
    except OSError as error:
        return f"{path}: can't be read ({error.strerror or error})"


def encode_read(segmenter: ProposalSegmenter, items: Sequence[Read], batch: int) -> list[Encoded]:
    """Encode images that were read; those of one shape go through the network together, at most `batch`."""
    encodings = segmenter.encode_read([item.image for item in items], batch_size=batch)
    for encoding in encodings:
        segmenter.check_encoding(encoding)
    contrast = Contrast(segmenter)
    return [
        Encoded(item.path, item.stamp, each, contrast.identity, contrast.of(stored_vectors(each)))
        for item, each in zip(items, encodings, strict=True)
    ]


class Adding:
    """One run of adding images."""

    def __init__(
        self,
        writer: Writer,
        segmenter: ProposalSegmenter | Encoders,
        batch: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """`progress` is called with the number of images that are done, and of those to be done."""
        self._writer, self._segmenter, self._batch, self._progress = writer, segmenter, batch, progress
        self._first = {_key(row.stamp): row for row in writer.images.values() if row.same_as < 0}
        self._change = Change()
        self._since = time.monotonic()
        self.added = Added()

    def run(self, paths: Sequence[Path]) -> Added:
        """Add the images at `paths`, each listed once. Committed images stay if this raises anything."""
        pending = [path for path in paths if not self._is_known(path)]
        self.added.unchanged = len(paths) - len(pending)
        done = 0
        with closing(self._groups(pending)) as groups:
            for group in groups:
                self._encode([item for item in group if not isinstance(item, str)])
                self.added.broken += [item for item in group if isinstance(item, str)]
                done += len(group)
                self._commit(at_once=len(self._change) >= COMMIT_IMAGES)
                if self._progress is not None:
                    self._progress(done, len(pending))
        self._commit(at_once=True)
        self._writer.finish()
        return self.added

    def _is_known(self, path: Path) -> bool:
        row = self._writer.images.get(str(absolute(path)))
        return row is not None and row.stamp.still_holds(path)

    def _groups(self, paths: Sequence[Path]) -> Generator[Sequence[Read | Encoded | str]]:
        """Yield images that were read here or encoded elsewhere."""
        segmenter = self._segmenter
        if not isinstance(segmenter, ProposalSegmenter):
            yield from segmenter.encoded(paths)
            return
        with ThreadPoolExecutor(min(self._batch, MAX_THREADS)) as readers:
            group = []
            for item in ahead(readers, lambda path: read_stamped(segmenter, path), paths, self._batch):
                group.append(item)
                if len(group) >= self._batch:
                    yield group
                    group = []
            if group:
                yield group

    def _encode(self, items: Sequence[Read | Encoded]) -> None:
        """Encode those images whose content is not in the index, if that was not done elsewhere."""
        first: dict[tuple[int, int], Read | Encoded] = {}
        copies = [item for item in items if first.setdefault(_key(item.stamp), item) is not item]
        if copies:  # of images that are not in the index yet
            self._encode(list(first.values()))
            self._encode(copies)
            return
        new = [item for item in items if not self._is_same(item)]
        encoded = [item for item in new if isinstance(item, Encoded)]
        if read := [item for item in new if isinstance(item, Read)]:
            assert isinstance(self._segmenter, ProposalSegmenter)
            encoded += encode_read(self._segmenter, read, self._batch)
        for item in encoded:
            row = self._replacing(item)
            same_words = item.contrast == self._writer.head.contrast
            self._change.encoded.append((row, item.encoding, item.contrasts if same_words else None))
            self._first[_key(item.stamp)] = row

    def _replacing(self, item: Read | Encoded, same_as: ImageRow | None = None) -> ImageRow:
        """Return the row of a file that is not in the index as it is now; an earlier row of it is retired."""
        path = str(absolute(item.path))
        if (before := self._writer.images.get(path)) is not None:
            self._commit(at_once=True)  # rows must be on disk to be replaced
            self._writer.retire(before, self._change)
            self.added.changed += 1
        elif same_as is None:
            self.added.new += 1
        row = ImageRow(self._writer.new_id(), path, item.stamp, *([] if same_as is None else [same_as.id]))
        self._writer.images[path] = row
        self._writer.note_same(row)
        return row

    def _is_same(self, item: Read | Encoded) -> bool:
        """Return whether another file in the index has this content, after noting that."""
        other = self._first.get(_key(item.stamp))
        other = other and self._writer.images.get(other.path)
        if other is None or other.path == str(absolute(item.path)) or other.stamp.crc32 != item.stamp.crc32:
            return False
        if not (bucket_path(other.path) or Path(other.path)).exists():
            if str(absolute(item.path)) in self._writer.images:
                return False
            self._commit(at_once=True)  # the row must be on disk to be changed
            new = ImageRow(other.id, str(absolute(item.path)), item.stamp)
            self._writer.move(other, new, self._change)
            self._first[_key(item.stamp)] = new
            self.added.moved.append((item.path, other.path))
            return True
        try:
            equal = filecmp.cmp(item.path, other.path, shallow=False)
        except OSError:
            return False
        if equal:
            row = self._replacing(item, other)  # may commit, which begins another change
            self._change.same.append(row)
            self.added.same.append((item.path, other.path))
        return equal

    def _commit(self, *, at_once: bool) -> None:
        """Commit what is done, if it is much or `at_once`."""
        if len(self._change) and (at_once or time.monotonic() - self._since >= COMMIT_AFTER):
            change, self._change = self._change, Change()
            self._writer.commit(change)
            self._since = time.monotonic()


def _key(stamp: Stamp) -> tuple[int, int]:
    """Return what files of equal content have in common."""
    return stamp.size, stamp.crc32
