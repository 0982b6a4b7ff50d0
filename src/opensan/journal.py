"""Record the finished parts of long work, so that a stopped or killed run can be continued.

Folders, rasters, videos, evaluations and data preparation all keep such a journal: an SQLite file with a row
for each finished part. One run at a time writes to it (`files.hold` excludes others); others may read it.
"""

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opensan.errors import UserError
from opensan.files import keep_aside

_TABLE = "CREATE TABLE done (key TEXT PRIMARY KEY, value TEXT NOT NULL, data BLOB NOT NULL)"
_PUT = "INSERT OR REPLACE INTO done VALUES (?, ?, ?)"
_WORK = "work"


class Journal:
    """Rows of a key, a value (plain data, as JSON) and bytes. A row is on disk when `put` returns.

    Threads may share it. The file's form is checked, its values are not: a file that
    is damaged, or has other tables, is kept aside as NAME.damaged, and an empty journal begins.
    """

    def __init__(self, path: Path) -> None:
        """Open the journal at `path`, or begin one. Raises UserError if it can't be read or written."""
        self.path = path
        self._turn = threading.Lock()
        self.damaged: Path | None = None
        """New path of a damaged file that was replaced; None if there was none."""
        with self._telling():
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):  # locked, not readable, a full disk
                    raise
                self.damaged = keep_aside(path, "damaged")
                path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
                self._open()

    def _open(self) -> None:
        self._rows = rows = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        rows.text_factory = lambda text: text.decode(errors="replace")
        try:
            rows.execute("PRAGMA trusted_schema = OFF")
            rows.execute("PRAGMA auto_vacuum = FULL")  # for new files: deleted rows free their space
            rows.execute("PRAGMA journal_mode = DELETE")  # WAL needs shared memory, which network drives lack
            rows.execute("PRAGMA synchronous = EXTRA")  # on disk, folder entry included, when a statement returns
            tables = [row[0] for row in rows.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")]
            if not tables:
                rows.execute(_TABLE)
            elif tables != [_TABLE] or rows.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("not a journal, or damaged")
        except BaseException:
            rows.close()
            raise

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Admit one thread at a time, and turn SQLite's errors into UserError, one line."""
        with self._turn:
            try:
                yield
            except sqlite3.Error as error:
                raise UserError(f"{self.path}: can't be read or written ({error})") from None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._rows.close()

    @property
    def work(self) -> dict[str, Any] | None:
        """The work that the rows belong to; None in a new journal."""
        work = self.get(_WORK)
        return work if isinstance(work, dict) else None

    def begin(self, work: Mapping[str, Any], rows: Iterable[tuple[str, Any, bytes]] = ()) -> dict[str, Any] | None:
        """Keep the rows if they belong to the same `work` (all that the results depend on), else replace all by `rows`.

        Returns the other work whose rows were removed, if there was any.
        """
        before, work = self.work, as_json(work)
        if before == work:
            return None
        with self._telling(), self._rows:
            self._rows.execute("BEGIN")
            self._rows.execute("DELETE FROM done")
            self._rows.executemany(_PUT, _as_stored([(_WORK, work, b""), *rows]))
        return before

    def get(self, key: str) -> Any:
        """Return the value at `key`; None if there is none."""
        with self._telling():
            row = self._rows.execute("SELECT value FROM done WHERE key = ?", (_key(key),)).fetchone()
        return None if row is None else _value(row[0])

    def data(self, key: str) -> bytes:
        """Return the bytes at `key`; empty if there is no such row."""
        with self._telling():
            row = self._rows.execute("SELECT data FROM done WHERE key = ?", (_key(key),)).fetchone()
        return bytes(row[0]) if row and isinstance(row[0], bytes) else b""

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield all keys and values, except the work, in the order of their keys."""
        with self._telling():
            rows = self._rows.execute("SELECT key, value FROM done WHERE key != ? ORDER BY key", (_WORK,)).fetchall()
        return ((key, _value(text)) for key, text in rows)

    def put(self, key: str, value: Any, data: bytes = b"") -> None:
        """Write a row, replacing the one at `key`; it is on disk when this returns."""
        self.put_all([(key, value, data)])

    def put_all(self, rows: Iterable[tuple[str, Any, bytes]]) -> None:
        """Write several rows, all or none."""
        self._change(_PUT, _as_stored(rows))

    def forget(self, keys: Iterable[str]) -> None:
        """Remove these rows, all or none."""
        self._change("DELETE FROM done WHERE key = ?", [(_key(key),) for key in keys])

    def _change(self, statement: str, rows: list[tuple]) -> None:
        with self._telling(), self._rows:
            self._rows.execute("BEGIN")
            self._rows.executemany(statement, rows)


def as_json(plain: Any) -> Any:
    """Return plain data as JSON would return it: tuples as lists."""
    return json.loads(json.dumps(plain, default=str))


def difference(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Describe in which settings `before` differed: "another model, other words"."""
    if before is None:
        return "other settings"
    said = {"model": "another model", "vocabulary": "other words"}
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return ", ".join(said.get(name, f"other {name}") for name in names)


def _as_stored(rows: Iterable[tuple[str, Any, bytes]]) -> list[tuple[str, str, bytes]]:
    return [(_key(key), json.dumps(value), data) for key, value, data in rows]


def _key(key: str) -> str:
    """Return a key that SQLite can store, as file names may not be valid text."""
    return key.encode("utf-8", "backslashreplace").decode()


def _value(text: Any) -> Any:
    """Return a row's value; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
