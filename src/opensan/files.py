"""Write files so that users' files are never lost or half-written, and lock folders against a second run."""

import errno
import filecmp
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from opensan.buckets import BucketPath
from opensan.errors import UserError

ASSETS = Path(__file__).parent / "assets"
"""The folder of the models, class lists, tokens and scenes that come with the package."""
SHORT_NAME = 64
"""Bytes of a file name that every file system can hold; a temporary name may have so many."""

_TEMPORARY = re.compile(r"\.(?P<stem>.*)\.[a-z0-9_]{8}\.part(?P<suffix>\..*)?", re.DOTALL)
_ERROR_OF_RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors tells of a full disk, in an exception that is no OSError."""


@contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it is flushed to disk and renamed over it.

    On any exception (Ctrl-C included) the temporary file is removed and `target` stays as it was.
    The temporary name keeps the suffix of `target`, because image writers choose their format by it.
    """
    with atomic_paths(target) as (temporary,):
        yield temporary


@contextmanager
def atomic_paths(*targets: str | os.PathLike) -> Iterator[list[Path]]:
    """Yield a temporary path beside each of `targets`, the files of one result in one folder; on success rename all.

    Name last the file that every reader needs. All files are on disk before the first is renamed. If the process dies
    between two renames, the last file is missing (or kept, where its content does not change), so a reader never takes
    a mixture of old and new files for one result.

    An OSError that names no file, as that of a full disk, is given the first target's name.
    """
    paths = [Path(target) for target in targets]
    temporaries: list[Path] = []
    if not paths[0].parent.is_dir():  # so that the error names the folder, not the temporary file
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(paths[0].parent))
    try:
        for path in paths:
            temporary = temporary_path(path)
            temporary.touch(exist_ok=False)
            temporaries.append(temporary)
        mode = temporaries[0].stat().st_mode  # by the user's umask
        yield temporaries
        for temporary in temporaries:
            if temporary.stat().st_mode != mode:  # a library has replaced it by a private file
                temporary.chmod(mode)
            with temporary.open("r+b") as written:  # Windows flushes only files that are open for writing
                os.fsync(written.fileno())
        if len(paths) > 1 and paths[-1].exists() and not filecmp.cmp(paths[-1], temporaries[-1], shallow=False):
            paths[-1].unlink()
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
        flush_folder(paths[0].parent)
    except BaseException as error:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        names = {str(temporary): str(path) for temporary, path in zip(temporaries, paths, strict=False)}
        if isinstance(error, OSError) and error.errno and error.filename in (None, *names):
            error.filename, error.filename2 = names.get(error.filename, str(paths[0])), None
        elif not isinstance(error, OSError) and (number := _ERROR_OF_RUST.search(str(error))):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(paths[0])) from error
        raise


def temporary_path(target: Path) -> Path:
    """Return a new name beside `target` for a file to be renamed to it; `remove_temporaries` knows such names.

    It is not longer than the target's, or SHORT_NAME bytes, so that it exists wherever the target can. The standard
    library's temporary files are private: to give them the usual permissions, one must know the umask, which can only
    be read by changing it, for all threads.
    """
    stem, suffix = _shortened(target)
    return target.with_name(f".{stem}.{secrets.token_hex(4)}.part{suffix}")


def _shortened(target: Path) -> tuple[str, str]:
    """Return as much of the target's stem as its temporary name has room for, and its suffix if it is a short one."""
    suffix = target.suffix if len(os.fsencode(target.suffix)) <= 16 else ""
    stem = target.name.removesuffix(suffix)
    room = max(len(os.fsencode(target.name)), SHORT_NAME) - len(os.fsencode(f"..12345678.part{suffix}"))
    while len(os.fsencode(stem)) > room:
        stem = stem[:-1]
    return stem, suffix


def remove_temporaries(folder: Path, targets: Iterable[str] | None = None) -> None:
    """Remove the temporary files in `folder` that a killed process left: all, or those of the names `targets`.

    Only for folders that the caller holds (see `hold`), as it also removes files that a process still writes.
    """
    wanted = None if targets is None else {_shortened(folder / name) for name in targets}
    if folder.is_dir():
        for entry in os.scandir(folder):
            match = _TEMPORARY.fullmatch(entry.name)
            if match and (wanted is None or (match["stem"], match["suffix"] or "") in wanted):
                with suppress(OSError):  # a folder, or a file without permission to remove
                    Path(entry.path).unlink()


def absolute(path: Path) -> Path:
    """Make a path absolute, without "." and ".."; links are kept, so a linked image has its link's name."""
    if isinstance(path, BucketPath):
        return path
    return Path(os.path.normpath(path.absolute()))


def flush_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk, if the system can: only then does a rename survive a loss of power."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems have no such call
            raise
    finally:
        os.close(handle)


def link(source: Path, target: Path, *, symbolic: bool = True) -> None:
    """Link `target` to `source`, by a symbolic link, else by a hard link, else (on another disk) by a copy.

    Programs that look where a symbolic link leads refuse files outside their folder: `symbolic=False` makes none.
    What is in a bucket is copied.
    """
    if isinstance(source, BucketPath):
        with atomic_path(target) as copy:
            copy.write_bytes(source.read_bytes())
        return
    temporary = temporary_path(target)  # not atomic_path's, which makes a file first
    try:
        source = source.absolute() if symbolic else source.resolve()  # a link to a link would be symbolic again
        for make in (*((os.symlink,) if symbolic else ()), os.link, shutil.copyfile):
            try:
                make(source, temporary)
                break
            except OSError as error:
                failure = error
        else:
            raise failure
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)  # renaming does nothing if both are hard links to one file


def json_text(data: Any, *, indent: int | None = 1) -> str:
    """Return plain data as JSON. A number that is not finite is null, because JSON has no nan."""
    return json.dumps(_without_nan(data), indent=indent, ensure_ascii=False, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(target: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8 to `target`, all or nothing."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def keep_aside(file: Path, mark: str = "changed") -> Path:
    """Rename `file` to "NAME.changed" (or "NAME.changed2", ...), whichever is free, and return that path."""
    aside, number = file.with_name(f"{file.name}.{mark}"), 1
    while os.path.lexists(aside):
        number += 1
        aside = file.with_name(f"{file.name}.{mark}{number}")
    return file.rename(aside)


def check_regular(path: Path) -> None:
    """Raise UserError if `path` exists and is not a file: reading a pipe or a device might never end or begin."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError that names no file, as that of a full disk, the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def hold(lock: Path, busy: str, *, wait: float = 0) -> Iterator[None]:
    """Hold the file `lock`, whose folder exists, for this process alone; it is removed at the end.

    It is removed while it is held, and a process that locks it checks that it is still the file of that name, so that
    no process holds a lock that others can't see. A process that dies in any way releases it.

    Raises:
        UserError: `busy`, if another process holds it for `wait` seconds; or the file system has no locks.
    """
    deadline = time.monotonic() + wait
    while (handle := _locked(lock)) is None:
        if time.monotonic() >= deadline:
            raise UserError(busy)
        time.sleep(0.05)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows can't remove open files; its folder may be removed with the finished work
            lock.unlink()
        os.close(handle)


def _locked(lock: Path) -> int | None:
    """Open and lock a file; returns its descriptor, or None if another process has it."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock_now(handle)
            if os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        except FileNotFoundError:
            pass  # it was removed by the process that held it before
        except (BlockingIOError, PermissionError):
            os.close(handle)
            return None
        except OSError as error:
            os.close(handle)
            raise UserError(
                f"{lock.parent}: its file system has no file locks ({error.strerror}), which keep two runs apart; "
                "choose a folder on another one, and copy the results"
            ) from None
        os.close(handle)


def _lock_now(handle: int) -> None:
    """Lock an open file without waiting. Raises BlockingIOError or PermissionError if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # of Windows alone
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
