"""What is done of a long piece of work, so that a run that was stopped, in whatever way, goes on where it was.

Folders, rasters, videos, evaluations and data sets in preparation all keep such a journal: an SQLite file with a row
for each piece that is finished. One run at a time writes to it (`files.hold` keeps others out); others may read it.
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
    """Rows of a key, a value (plain data, as JSON) and bytes. What `put` has written is on disk when it returns.

    Threads may share it. Nothing in the file is trusted to be what this class wrote, but for its form: a file that
    is damaged, or has other tables, is kept aside as NAME.damaged, and an empty journal begins.
    """

    def __init__(self, path: Path) -> None:
        """Open the journal at `path`, or begin one. Raises UserError if it can't be read or written."""
        self.path = path
        self._turn = threading.Lock()
        self.damaged: Path | None = None
        """What the damaged file that was found here is called now."""
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
            rows.execute("PRAGMA auto_vacuum = FULL")  # for new files: what is deleted takes no room
            rows.execute("PRAGMA journal_mode = DELETE")  # WAL needs memory that processes share: not on a network
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
        """One thread at a time; what SQLite complains of is a UserError of one line."""
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
        """What the rows are of; None of a new journal."""
        work = self.get(_WORK)
        return work if isinstance(work, dict) else None

    def begin(self, work: Mapping[str, Any], rows: Iterable[tuple[str, Any, bytes]] = ()) -> dict[str, Any] | None:
        """Keep what is done if it was done of the same `work` (all that the results depend on), else forget it.

        Returns the other work that was forgotten, if there was any; `rows` then take its place.
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
        """The value at `key`; None if there is none."""
        with self._telling():
            row = self._rows.execute("SELECT value FROM done WHERE key = ?", (_key(key),)).fetchone()
        return None if row is None else _value(row[0])

    def data(self, key: str) -> bytes:
        """The bytes at `key`; none if there is no such row."""
        with self._telling():
            row = self._rows.execute("SELECT data FROM done WHERE key = ?", (_key(key),)).fetchone()
        return bytes(row[0]) if row and isinstance(row[0], bytes) else b""

    def items(self) -> Iterator[tuple[str, Any]]:
        """All keys and values but the work, in the order of their keys."""
        with self._telling():
            rows = self._rows.execute("SELECT key, value FROM done WHERE key != ? ORDER BY key", (_WORK,)).fetchall()
        return ((key, _value(text)) for key, text in rows)

    def put(self, key: str, value: Any, data: bytes = b"") -> None:
        """Write a row in place of the one at `key`; it is on disk when this returns."""
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
    """Plain data as it comes back from JSON: tuples as lists."""
    return json.loads(json.dumps(plain, default=str))


def difference(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Say in which settings `before` differed: "another model, other words"."""
    if before is None:
        return "other settings"
    said = {"model": "another model", "vocabulary": "other words"}
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return ", ".join(said.get(name, f"other {name}") for name in names)


def _as_stored(rows: Iterable[tuple[str, Any, bytes]]) -> list[tuple[str, str, bytes]]:
    return [(_key(key), json.dumps(value), data) for key, value, data in rows]


def _key(key: str) -> str:
    """A key that SQLite can store: file names need not be text."""
    return key.encode("utf-8", "backslashreplace").decode()


def _value(text: Any) -> Any:
    """What a row holds; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
