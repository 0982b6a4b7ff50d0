"""Writing files so that nothing a user made is ever lost or half-written."""

import errno
import filecmp
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
"""The folder of the models, class lists, tokens and scenes that come with the package."""
TRIAL = "opensan"
"""The file that is begun, and never finished, to see whether a folder can be written to."""


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
    """
    paths = [Path(target) for target in targets]
    temporaries: list[Path] = []
    if not paths[0].parent.is_dir():  # said of the folder, not of the temporary file
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(paths[0].parent))
    try:
        for path in paths:
            temporary = temporary_path(path)
            temporary.touch(exist_ok=False)
            temporaries.append(temporary)
        yield temporaries
        for temporary in temporaries:
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


def temporary_path(target: Path) -> Path:
    """A name beside `target` for what will be renamed to it.

    Not the standard library's, which makes private files: to give them the usual permissions, one must know the umask,
    which can only be read by changing it, for all threads.
    """
    return target.with_name(f".{target.stem}.{secrets.token_hex(4)}.part{target.suffix}")


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
    temporary = target.with_name(f".{target.name}.part")  # not atomic_path's, which makes a file first
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
