"""Changes of an index that appear at once or not at all, made by one process at a time."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensan import errors
from opensan.errors import UserError
from opensan.files import hold
from opensan.index.contrast import Contrast
from opensan.index.head import FORMAT, NAME, Head
from opensan.index.rows import ABOUT, NOT_THE_SAME, ImageRow, image_rows, place, proposal_rows, schemas, vectors_of
from opensan.index.store import APPROXIMATE_FROM, IMAGES, PROPOSALS, Store
from opensan.outputs import check_writable
from opensan.segmenters.results import Encoding

if TYPE_CHECKING:
    import pyarrow as pa

LOCK = ".opensan.lock"

LONGEST_WAIT = 24 * 3600.0
"""Seconds that a writer waits for another."""

MERGE_AFTER = 128
"""Commits after which small files are merged."""

MERGE_AT_END = 16
"""Commits of one run after which small files are merged at its end."""


@dataclass
class Change:
    """Changes that appear together."""

    encoded: list[tuple[ImageRow, Encoding, np.ndarray | None]] = field(default_factory=list)
    """New images, with the contrasts [Q] of their proposals if they are known."""
    same: list[ImageRow] = field(default_factory=list)
    """New images whose content another image has."""
    moved: list[ImageRow] = field(default_factory=list)
    """Images with another file."""
    removed: list[int] = field(default_factory=list)
    """Ids of images that are no longer in the index."""

    def __len__(self) -> int:
        return len(self.encoded) + len(self.same) + len(self.moved) + len(self.removed)


class Writer:
    """An index that is held for writing."""

    def __init__(self, folder: Path, head: Head, store: Store) -> None:
        """Use `writing` to make one."""
        self.folder, self.head, self._store = folder, head, store
        self._commits = 0
        self.images = {
            row.path: row for batch in store.batches(IMAGES, ABOUT) for row in map(ImageRow.of, batch.to_pylist())
        }
        """All images by path, also those whose changes are not committed yet."""
        self._next = head.next_id
        self._heirs: defaultdict[int, list[str]] = defaultdict(list)
        for row in self.images.values():
            self.note_same(row)

    def note_same(self, row: ImageRow) -> None:
        """Remember the file of a row that shares its content with another."""
        if row.same_as != NOT_THE_SAME:
            self._heirs[row.same_as].append(row.path)

    def new_id(self) -> int:
        """Return the number of a new image."""
        self._next += 1
        return self._next - 1

    def commit(self, change: Change) -> None:
        """Make the change: all of it is on disk when this returns."""
        if not len(change):
            return
        store, head = self._store, self.head
        store.delete(IMAGES, "id", change.removed)
        store.delete(PROPOSALS, "image", change.removed)
        for row in change.moved:
            store.update(IMAGES, row.id, place(row.path, row.stamp))
        encoded = [(row.id, encoding, contrasts) for row, encoding, contrasts in change.encoded]
        store.append(PROPOSALS, proposal_rows(encoded, head.width))
        rows: list[tuple[ImageRow, Encoding | None]] = [(row, encoding) for row, encoding, _ in change.encoded]
        rows += [(row, None) for row in change.same]
        store.append(IMAGES, image_rows(rows, head.width, head.exact))
        self._write_head()
        self._commits += 1
        if self._commits % MERGE_AFTER == 0:
            self.merge()

    def retire(self, row: ImageRow, change: Change) -> str | None:
        """Note in `change` that an image's file is gone or has another content.

        If another file has its content, the proposals are that file's from now on; its path is returned.
        """
        self.images.pop(row.path, None)
        others = (self.images.get(path) for path in self._heirs[row.id])
        heir = next((other for other in others if other is not None and other.same_as == row.id), None)
        if row.same_as != NOT_THE_SAME or heir is None:
            change.removed.append(row.id)
            return None
        change.removed.append(heir.id)
        self._move(row, heir.path, heir, change)
        return heir.path

    def move(self, row: ImageRow, new: ImageRow, change: Change) -> None:
        """Note in `change` that an image's file has the path and stamp of `new` now."""
        self.images.pop(row.path, None)
        self._move(row, new.path, new, change)

    def _move(self, row: ImageRow, path: str, new: ImageRow, change: Change) -> None:
        self.images[path] = replace(row, path=path, stamp=new.stamp)
        change.moved.append(self.images[path])

    def lacks_contrasts(self, contrast: Contrast) -> bool:
        """Return whether some proposals have no contrasts, or those of other words, and these can be computed."""
        if not contrast.identity:
            return False
        return self.head.contrast != contrast.identity or self._store.count(PROPOSALS, "contrast IS NULL") > 0

    def fill_contrasts(self, contrast: Contrast, progress: Callable[[int, int], None] | None = None) -> None:
        """Compute the contrasts of all proposals; `progress` is called with the number of those done, and of all."""
        import pyarrow as pa

        done = 0

        def change(batch: "pa.RecordBatch") -> "pa.RecordBatch":
            nonlocal done
            columns = {name: batch.column(name) for name in batch.schema.names}
            columns["contrast"] = pa.array(contrast.of(vectors_of(batch)))
            done += batch.num_rows
            if progress is not None:
                progress(done, self.head.proposals)
            return pa.RecordBatch.from_arrays(list(columns.values()), schema=batch.schema)

        self._store.rewrite(PROPOSALS, change)
        self.head = replace(self.head, contrast=contrast.identity)
        self._write_head()

    def merge(self, *, approximate_from: int = APPROXIMATE_FROM) -> None:
        """Merge small files and remove what no version needs; readers at work open the index anew by themselves."""
        self._store.merge(approximate_from=approximate_from)
        self._write_head()
        self._store.forget_older()
        self._commits = 0

    def finish(self) -> None:
        """Merge small files if this run left many."""
        if self._commits >= MERGE_AT_END:
            self.merge()

    def _write_head(self) -> None:
        store = self._store
        self.head = replace(
            self.head,
            versions=store.versions,
            next_id=self._next,
            images=store.count(IMAGES),
            proposals=store.count(PROPOSALS),
        )
        with errors.writing(self.folder):
            store.flush()
            self.head.write(self.folder)


@contextmanager
def writing(folder: Path, new: Head | None, *, wait: float = LONGEST_WAIT) -> Iterator[Writer]:
    """Hold an index for writing, and undo what a killed writer left; another writer waits meanwhile.

    `new` is the head of an index to make where there is none; None if there must be one. Raises UserError if another
    process writes to it for longer than `wait` seconds, it can't be written, or is damaged.
    """
    if new is None:
        Head.read(folder)
    else:
        _check_place(folder)
    check_writable(folder)
    with hold(folder / LOCK, f"{folder}: another process is writing to it; wait for it", wait=wait):
        if new is not None and not (folder / NAME).exists():
            store = Store.create(folder, schemas(new.width))
            head = replace(new, versions=store.versions)
            with errors.writing(folder):
                store.flush()
                head.write(folder)
        else:
            head = Head.read(folder)
            store = Store.to_write(folder, head.versions)
            store.check_files()
            store.add_columns(PROPOSALS, schemas(head.width)[PROPOSALS])  # an index of format 1 has fewer
            head = replace(head, format=FORMAT)
        yield Writer(folder, head, store)


def _check_place(folder: Path) -> None:
    """Raise UserError if there is something else than an index, so that nobody's files are mixed with it."""
    if folder.is_dir() and not (folder / NAME).exists():
        own = {f"{name}.lance" for name in (IMAGES, PROPOSALS)} | {LOCK}
        others: Sequence[str] = sorted(path.name for path in folder.iterdir() if path.name not in own)
        others = [name for name in others if not (name.startswith(f".{Path(NAME).stem}.") and ".part" in name)]
        if others:
            raise UserError(f"{folder}: not an index, and not empty (it holds {others[0]}); choose another folder")
