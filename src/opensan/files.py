"""Writing files so that nothing a user made is ever lost or half-written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it is flushed to disk and renamed over it.

    On any exception (Ctrl-C included) the temporary file is removed and `target` stays as it was.
    The temporary name keeps the suffix of `target`, because image writers choose their format by it.
    """
    target = Path(target)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=f".part{target.suffix}", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; give the file what an ordinary open() would have given it.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush_folder(folder: Path) -> None:
    """Have the names in `folder` on disk, where the system allows it: a rename survives a loss of power only then."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(source: Path, target: Path) -> None:
    """Link `target` to `source`; where links can't be made, hard links or copies are."""
    temporary = target.with_name(f".{target.name}.part")  # not atomic_path's, which would chmod what it links to
    for make in (os.symlink, os.link, shutil.copyfile):
        try:
            make(source.absolute(), temporary)
            break
        except OSError as error:
            failure = error
    else:
        raise failure
    temporary.replace(target)
    temporary.unlink(missing_ok=True)  # renaming does nothing if both are hard links to one file


def write_text(target: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8 to `target`, all or nothing."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
