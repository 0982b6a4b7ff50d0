"""Cache text embeddings on disk. Entries are checked when read, many processes may share it, and it is optional.

One SQLite file for each text tower; a row is one mean embedding. SQLite provides locking and transactions.
Every row has a checksum over key and content, so the worst effect of a damaged file is a row
that is computed again. When all files together exceed MAX_BYTES, the least recently used rows are removed.
"""

import hashlib
import os
import sqlite3
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import platformdirs

MAX_BYTES = 512 * 2**20
"""About 200,000 embeddings of ViT-B/16."""

_SUFFIX = ".text-rows.sqlite"
_KEYS_PER_QUERY = 500
_SECONDS_TO_WAIT = 30.0
_TABLE = (
    "CREATE TABLE IF NOT EXISTS embeddings "
    "(key BLOB PRIMARY KEY, row BLOB NOT NULL, checksum BLOB NOT NULL, day INTEGER NOT NULL)"
)
_KEEP_NEWEST = (
    "DELETE FROM embeddings WHERE rowid NOT IN (SELECT rowid FROM embeddings ORDER BY day DESC, rowid DESC LIMIT ?)"
)
_PAGES = ("page_size", "page_count", "freelist_count")
# Not a database, a damaged or truncated one, or another table of the same name. Other errors (locked, full,
# no permission) are the machine's state, not the file's.
_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_NOTADB}
_DAMAGE_EXTENDED = {sqlite3.SQLITE_IOERR_SHORT_READ}
_ERRORS = (OSError, sqlite3.Error, UnicodeDecodeError)  # the last from error messages that quote damaged names


def default_folder() -> Path:
    """Return the folder of the embeddings: $OPENSAN_CACHE if that is set, else the user's cache folder."""
    base = os.environ.get("OPENSAN_CACHE") or platformdirs.user_cache_dir("opensan")
    return Path(base) / "text"


def cache_files(folder: Path) -> dict[Path, int]:
    """Return the files of a cache and their bytes, the least recently used first."""
    files = []
    for path in folder.glob(f"*{_SUFFIX}"):
        with suppress(OSError):  # another process removed it
            state = path.stat()
            files.append((state.st_mtime, path, state.st_size))
    return {path: size for _, path, size in sorted(files)}


def remove(path: Path) -> None:
    """Remove a file of a cache. Rows that other processes add to it meanwhile are lost, and computed again later."""
    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


class _CutShort(sqlite3.DatabaseError):
    pass


class TextCache:
    """The embeddings of one text tower."""

    def __init__(self, folder: Path, tower: str, dimension: int) -> None:
        """`tower` is the hexadecimal identity of the text tower, `dimension` the length D of its embeddings."""
        self.path = folder / f"{tower[:32]}{_SUFFIX}"
        self._dimension = dimension
        self._warned = False

    def read(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Return the rows of `keys` that exist, as float32 [D]. A damaged row counts as missing, with a warning."""
        try:
            if self.path.stat().st_size == 0:  # another process is about to write its first rows
                return {}
        except OSError:
            return {}
        rows: dict[bytes, np.ndarray] = {}
        damaged, today = 0, _today()
        used: list[bytes] = []
        try:
            for key, row, checksum, day in self._select(keys):
                values = self._checked(key, row, checksum)
                if values is None:
                    damaged += 1
                    continue
                rows[key] = values
                if day != today:
                    used.append(key)
        except _ERRORS as error:
            self._complain(error)
        if used:
            self._mark_used(used, today)
        if damaged:
            _warn(f"text cache {self.path}: {damaged:,} damaged rows are computed again")
        return rows

    def write(self, rows: Mapping[bytes, np.ndarray]) -> None:
        """Add float32 rows [D]. If they can't be written, it warns once."""
        today = _today()
        entries = [
            (key, data := row.astype("<f4").tobytes(), _checksum(key, data), today)
            for key, row in rows.items()
            if np.isfinite(row).all()
        ]
        for _ in range(2):  # again if the first attempt removed a damaged file
            try:
                self._insert(entries)
                self._make_room()
                return
            except _ERRORS as error:
                if not self._complain(error):
                    return

    def _select(self, keys: Sequence[bytes]) -> Iterable[tuple[bytes, bytes, bytes, int]]:
        with closing(self._connect("rw")) as database:
            database.execute("BEGIN")  # so that no writer changes the file meanwhile
            database.execute("SELECT 1 FROM embeddings LIMIT 1")
            if self.path.stat().st_size % database.execute("PRAGMA page_size").fetchone()[0]:
                raise _CutShort("cut short")  # SQLite notices missing pages, but reads half a page as zeros
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                part = keys[start : start + _KEYS_PER_QUERY]
                marks = ",".join("?" * len(part))
                columns = "key, row, checksum, day"
                yield from database.execute(f"SELECT {columns} FROM embeddings WHERE key IN ({marks})", part)

    def _insert(self, entries: list[tuple[bytes, bytes, bytes, int]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._connect("rwc")) as database:
            # A power loss may damage the file, but readers detect that, so there is no need to wait for the disk.
            database.execute("PRAGMA synchronous = OFF")
            database.execute("BEGIN IMMEDIATE")
            database.execute(_TABLE)
            database.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?, ?)", entries)
            page, pages, free = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in _PAGES)
            if (pages - free) * page > MAX_BYTES:  # the file keeps its size, and new rows replace old ones
                count = database.execute("SELECT count(*) FROM embeddings").fetchone()[0]
                database.execute(_KEEP_NEWEST, (count * 3 // 4,))
            database.execute("COMMIT")

    def _mark_used(self, keys: list[bytes], day: int) -> None:
        """Mark rows as used, once a day each. If that can't be written, the row only looks older than it is."""
        with suppress(*_ERRORS), closing(self._connect("rw", seconds_to_wait=1.0)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.executemany("UPDATE embeddings SET day = ? WHERE key = ?", [(day, key) for key in keys])
            database.execute("COMMIT")

    def _make_room(self) -> None:
        """Remove other towers' files, the least recently used first."""
        files = cache_files(self.path.parent)
        excess = sum(files.values()) - MAX_BYTES
        for path, size in files.items():
            if excess > 0 and path != self.path:
                with suppress(OSError):  # Windows can't remove open files
                    remove(path)
                    excess -= size

    def _connect(self, mode: str, seconds_to_wait: float = _SECONDS_TO_WAIT) -> sqlite3.Connection:
        # No write-ahead log: it needs shared memory, which home folders on network file systems don't have.
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        database = sqlite3.connect(uri, uri=True, timeout=seconds_to_wait, isolation_level=None)
        database.text_factory = bytes
        return database

    def _checked(self, key: object, row: object, checksum: object) -> np.ndarray | None:
        """Return the row, or None if it is damaged."""
        if not (isinstance(key, bytes) and isinstance(row, bytes) and len(row) == 4 * self._dimension):
            return None
        values = np.frombuffer(row, "<f4").astype(np.float32, copy=False)
        return values if checksum == _checksum(key, row) and np.isfinite(values).all() else None

    def _complain(self, error: Exception) -> bool:
        """Warn; remove the file and return True if it is damaged."""
        code = getattr(error, "sqlite_errorcode", None) or 0
        if code & 0xFF in _DAMAGE or code in _DAMAGE_EXTENDED or isinstance(error, _CutShort | UnicodeDecodeError):
            _warn(f"text cache {self.path} is damaged ({error}) and is built anew")
            try:
                remove(self.path)
                return True
            except OSError as why:
                error = why
        if not self._warned:
            self._warned = True
            _warn(f"text cache {self.path} can't be used ({error}): text embeddings are computed again each time")
        return False


def _today() -> int:
    return int(time.time() // 86_400)


def _checksum(key: bytes, row: bytes) -> bytes:
    return hashlib.blake2b(key + row, digest_size=16).digest()


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
