"""Paths in buckets and other stores that fsspec reads: s3://, gs://, memory://, and file:// for this machine.

A `BucketPath` is a path as any other where files are read; nothing is written there. fsspec comes with torch; the
packages of most stores are extras.
"""

import errno
import io
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from opensan.errors import UserError, install, reason

EXTRAS = {"s3": "s3", "gs": "gs"}
"""The extra that a store needs, by the scheme of its addresses."""

_ADDRESS = re.compile(r"(?P<scheme>s3|gs|memory|file):/+(?P<rest>.*)", re.DOTALL)


@dataclass(frozen=True)
class Status:
    """State of a file in a store; the names are those of `os.stat_result`."""

    st_size: int
    st_mtime_ns: int
    st_ino: int = -1
    st_dev: int = -1
    version: int = 0
    """Checksum of what the store says of the file: another one after the file has changed."""


class BucketPath(type(Path())):  # type: ignore[misc]  # PosixPath or WindowsPath
    """The path of a file or folder in a store: "s3://bucket/deep/street.jpg"."""

    def __str__(self) -> str:
        scheme, _, rest = self.as_posix().partition(":/")
        return f"{scheme}://{rest.lstrip('/')}"

    def as_posix(self) -> str:
        """Return the parts with slashes between."""
        return "/".join(self.parts)

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), tuple(self.parts)

    def absolute(self) -> "BucketPath":
        """Return it as it is."""
        return self

    resolve = absolute

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Return its `Status`. Raises OSError, as every method that asks the store."""
        store, key = self._store()
        with _as_os_errors(self):
            about = store.info(key)
            version = zlib.crc32(repr(_version(about)).encode())
        return Status(int(about.get("size") or 0), 0, version=version)

    def exists(self) -> bool:
        """Return whether there is such a file or folder."""
        store, key = self._store()
        with _as_os_errors(self):
            return bool(store.exists(key))

    def is_dir(self) -> bool:
        """Return whether there are files below it."""
        store, key = self._store()
        with _as_os_errors(self):
            return bool(store.isdir(key))

    def is_file(self) -> bool:
        """Return whether it is a file."""
        store, key = self._store()
        with _as_os_errors(self):
            return bool(store.isfile(key))

    def open(
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """Return the file's content, fetched whole. Raises OSError for a mode that writes."""
        if mode not in ("r", "rb"):
            raise OSError(errno.EROFS, f"nothing is written to {self}")
        content = io.BytesIO(self.part(0, None))
        return content if mode == "rb" else io.TextIOWrapper(content, encoding or "utf-8", errors, newline)

    def part(self, start: int, size: int | None) -> bytes:
        """Return some bytes of the file, from `start`; all that follow if `size` is None."""
        store, key = self._store()
        with _as_os_errors(self):
            return bytes(store.cat_file(key, start=start, end=None if size is None else start + size))

    def below(self) -> list["BucketPath"]:
        """Return all files in the folder and below it, sorted."""
        store, key = self._store()
        with _as_os_errors(self):
            found = store.find(key)
        scheme = self.parts[0]
        return sorted(BucketPath(f"{scheme}//{name.lstrip('/')}") for name in found)

    def _store(self) -> tuple[Any, str]:
        """Return fsspec's file system, and the path there. Raises UserError if a package is missing."""
        scheme = self.parts[0].removesuffix(":")
        try:
            from fsspec import filesystem

            return filesystem(scheme), "/".join(self.parts[1:])
        except ImportError as error:
            raise UserError(
                f"{scheme}:// can't be read ({reason(error)}): {install(EXTRAS.get(scheme, 'buckets'))}"
            ) from None
        except Exception as error:  # each store has its own kinds, as for missing credentials
            raise UserError(f"{self}: can't be reached ({reason(error)})") from None


def _version(about: dict[str, Any]) -> Any:
    """Return what changes with a file's content, of what a store says of it."""
    for name in ("ETag", "etag", "md5Hash", "crc32c", "LastModified", "updated", "mtime", "created"):
        if about.get(name):
            return name, str(about[name])
    return None


@contextmanager
def _as_os_errors(path: BucketPath) -> Iterator[None]:
    """Make any error of a store an OSError with a reason of one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except OSError as error:
        raise _with_reason(error) from error
    except Exception as error:  # each store has its own kinds, as for a server that can't be reached
        raise OSError(errno.EIO, reason(error)) from error


def _with_reason(error: OSError) -> OSError:
    """Return an OSError whose message says what is wrong: fsspec's often have the path alone."""
    kinds = {FileNotFoundError: "there is no such file or bucket", PermissionError: "permission denied"}
    said = next((text for kind, text in kinds.items() if isinstance(error, kind)), reason(error))
    return type(error)(error.errno or errno.EIO, said) if isinstance(error, tuple(kinds)) else OSError(errno.EIO, said)


def bucket_path(path: str | os.PathLike[str]) -> Path | None:
    """Return the path of an address "s3://bucket/key"; None for paths of this machine. "file:///a" is "/a".

    `Path("s3://bucket/key")`, which has one slash less, is taken for the address too, unless there is such a file here.
    """
    if isinstance(path, BucketPath):
        return path
    match = _ADDRESS.fullmatch(os.fspath(path))
    if match is None or (isinstance(path, Path) and path.exists()):
        return None
    if match["scheme"] == "file":
        return Path(f"/{match['rest']}")
    return BucketPath(f"{match['scheme']}://{match['rest']}")
