"""Tables of an index on disk, in LanceDB: each change makes a new version, and readers keep the version they opened.

Another store would need these few methods alone.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensan.errors import UserError, install, reason
from opensan.files import flush_folder
from opensan.index.head import REMEDY

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES, PROPOSALS = "images", "proposals"

APPROXIMATE_FROM = 500_000
"""Proposals from which on `compact` builds an index of their vectors; fewer are all looked at."""

NEVER = timedelta(days=100_000)

_DISK = re.compile(r"No space left on device|os error 28|Disk quota exceeded|Read-only file system", re.IGNORECASE)


class Store:
    """The tables of one index. One process at a time writes; any number read.

    Every method raises UserError, one line, where the files are damaged or missing, or can't be written.
    """

    def __init__(self, folder: Path, versions: Mapping[str, int] | None = None) -> None:
        """Open the tables as they were at `versions`; None for their latest, to write to."""
        self.folder = folder
        try:
            import lancedb
        except ImportError:
            raise UserError(f"an index needs lancedb: {install('index')}") from None
        self._flushed: set[str] = set()
        with self._telling():
            self._database: Any = lancedb.connect(folder)
            self._tables: dict[str, Any] = {}
            for name, version in (versions or {}).items():
                self._tables[name] = self._database.open_table(name)
                self._tables[name].checkout(version)

    @classmethod
    def create(cls, folder: Path, schemas: Mapping[str, "pa.Schema"]) -> "Store":
        """Make empty tables; those that a killed process left are replaced."""
        store = cls(folder)
        with store._telling():
            for name, schema in schemas.items():
                store._database.drop_table(name, ignore_missing=True)
                store._tables[name] = store._database.create_table(name, schema=schema)
        return store

    @classmethod
    def to_write(cls, folder: Path, versions: Mapping[str, int]) -> "Store":
        """Open the tables to write to; changes since `versions`, which a stopped writer left, are undone."""
        store = cls(folder)
        with store._telling():
            for name, version in versions.items():
                table = store._tables[name] = store._database.open_table(name)
                if table.version != version:
                    table.checkout(version)
                    table.restore()
        return store

    @property
    def versions(self) -> dict[str, int]:
        """The present version of each table."""
        return {name: table.version for name, table in self._tables.items()}

    def count(self, name: str, condition: str | None = None) -> int:
        """Return the number of a table's rows, of those alone that fulfil a condition in SQL if there is one."""
        with self._telling():
            return self._tables[name].count_rows(condition)

    def check_files(self) -> None:
        """Read a small column of every file of the proposals: one that is missing or cut short is found before work.

        Counting rows alone reads what the tables say of their files, and not these.
        """
        with self._telling():
            found = sum(len(batch) for batch in self.batches(PROPOSALS, ["image"]))
            stated = self._tables[PROPOSALS].count_rows()
            if found != stated:
                raise ValueError(f"{found:,} of {stated:,} proposals can be read")

    def append(self, name: str, rows: "pa.Table") -> None:
        """Add rows to a table."""
        if rows.num_rows:
            with self._telling():
                self._tables[name].add(rows)

    def delete(self, name: str, column: str, numbers: Sequence[int]) -> None:
        """Delete the rows with one of `numbers` in `column`."""
        if numbers:
            with self._telling():
                self._tables[name].delete(_among(column, numbers))

    def update(self, name: str, number: int, values: Mapping[str, Any]) -> None:
        """Replace values of the row whose id is `number`."""
        with self._telling():
            self._tables[name].update(where=f"id = {number}", values=dict(values))

    def add_columns(self, name: str, schema: "pa.Schema") -> None:
        """Add the columns of `schema` that a table does not have, without values."""
        with self._telling():
            table = self._tables[name]
            missing = [field for field in schema if field.name not in table.schema.names]
            if missing:
                table.add_columns(missing)

    def rewrite(self, name: str, change: "Callable[[pa.RecordBatch], pa.RecordBatch]") -> None:
        """Replace a table's rows by what `change` makes of them, some thousands at a time; its indices are dropped."""
        import pyarrow as pa

        with self._telling():
            schema = self._tables[name].schema
            changed = map(change, self.batches(name, schema.names))
            reader = pa.RecordBatchReader.from_batches(schema, changed)
            self._tables[name] = self._database.create_table(name, data=reader, schema=schema, mode="overwrite")

    def batches(
        self, name: str, columns: Sequence[str], column: str | None = None, numbers: Sequence[int] = ()
    ) -> Iterator["pa.RecordBatch"]:
        """Yield a table's rows, some thousands at a time: all, or those with one of `numbers` in `column`."""
        with self._telling():
            query = self._tables[name].search()
            if column is not None:
                query = query.where(_among(column, numbers))
            yield from query.select(list(columns)).to_batches(_BATCH)

    def rows(
        self, name: str, columns: Sequence[str], column: str | None = None, numbers: Sequence[int] = ()
    ) -> list[dict[str, Any]]:
        """Return rows as plain data; arguments as for `batches`."""
        return [row for batch in self.batches(name, columns, column, numbers) for row in batch.to_pylist()]

    def nearest(self, vector: np.ndarray, count: int, probes: int) -> np.ndarray:
        """Return the images of the `count` proposals with about the largest products with `vector` [D]: int64."""
        with self._telling():
            query = self._tables[PROPOSALS].search(vector.astype(np.float32)).distance_type("dot").limit(count)
            found = query.nprobes(probes).refine_factor(REFINE).select(["image", "_distance"]).to_arrow()
        return found["image"].to_numpy()

    @property
    def is_approximate(self) -> bool:
        """Return whether the vectors have an index, so that `nearest` looks at a part of them alone."""
        with self._telling():
            return any("vector" in index.columns for index in self._tables[PROPOSALS].list_indices())

    def merge(self, *, approximate_from: int = APPROXIMATE_FROM) -> None:
        """Merge small files, drop deleted rows, and keep the indices of large tables up to date."""
        with self._telling(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            proposals = self._tables[PROPOSALS]
            known = {column for index in proposals.list_indices() for column in index.columns}
            if proposals.count_rows() >= approximate_from:
                if "image" not in known:
                    proposals.create_scalar_index("image")
                if "vector" not in known:
                    proposals.create_index(metric="dot", vector_column_name="vector", index_type="IVF_SQ")
            for table in self._tables.values():
                table.optimize(cleanup_older_than=NEVER)

    def forget_older(self) -> None:
        """Remove the files of all versions but the present one. Call it when the head names that."""
        with self._telling(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for table in self._tables.values():
                tags = table.tags  # a tagged version is kept, should merging again make another one
                (tags.update if _HEAD in tags.list() else tags.create)(_HEAD, table.version)
                table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)

    def flush(self) -> None:
        """Flush the files that are new to disk; LanceDB leaves that to the system."""
        for name in self._tables:
            folders = {self.folder / f"{name}.lance"}
            for path in (self.folder / f"{name}.lance").rglob("*"):
                if path.is_file() and str(path) not in self._flushed:
                    handle = os.open(path, os.O_RDONLY)
                    try:
                        os.fsync(handle)
                    finally:
                        os.close(handle)
                    folders.add(path.parent)
                    self._flushed.add(str(path))
            for folder in folders:
                flush_folder(folder)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Make errors of LanceDB and Arrow, which are of many types, a UserError."""
        try:
            yield
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            if full := _DISK.search(str(error)):
                raise UserError(f"{self.folder}: cannot write there ({full[0]})") from None
            raise UserError(f"{self.folder}: damaged or half copied ({reason(error)}); {REMEDY}") from None


_BATCH = 1 << 14
_HEAD = "head"
REFINE = 4
"""Candidates of an approximate search whose whole vectors are compared, a wanted one."""


def _among(column: str, numbers: Sequence[int]) -> str:
    """Return the condition that a column has one of some whole numbers."""
    return f"{column} IN ({', '.join(str(int(number)) for number in numbers)})" if len(numbers) else "false"
