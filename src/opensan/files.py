"""Writing files so that nothing a user made is ever lost or half-written."""

import filecmp
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
    with atomic_paths(target) as (temporary,):
        yield temporary


@contextmanager
def atomic_paths(*targets: str | os.PathLike) -> Iterator[list[Path]]:
    """As `atomic_path`, for files of one folder that belong together; last the one that no reader can do without.

    All are on disk before the first is renamed. If the process dies between two renames, the last one is missing,
    unless it stays as it was: old and new are never taken for one.
    """
    paths = [Path(target) for target in targets]
    temporaries: list[Path] = []
    try:
        for path in paths:
            handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".part{path.suffix}", dir=path.parent)
            os.close(handle)
            temporaries.append(Path(name))
        yield temporaries
        for temporary in temporaries:
            # mkstemp makes files private; give the file what an ordinary open() would have given it.
            temporary.chmod(0o666 & ~umask())
            with temporary.open("r+b") as written:  # Windows flushes only what is open for writing
                os.fsync(written.fileno())
        if len(paths) > 1 and paths[-1].exists() and not filecmp.cmp(paths[-1], temporaries[-1], shallow=False):
            paths[-1].unlink()
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise


def umask() -> int:
    """The permissions that this process denies to what it creates."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
