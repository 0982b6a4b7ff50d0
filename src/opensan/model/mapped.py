"""Keep weights that were read from a file out of memory between their uses: the kernel reads their pages again then.

safetensors and torch map a file of weights into memory. Each page that is used stays there, although the next step
may need it in another precision or layout alone, or, as the text tower of cached words, not at all.
"""

import ctypes
import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

Forget = Callable[[Tensor], None]
"""Function that takes the pages of a tensor out of this process's memory, if the tensor is an unchanged part of a file;
it may still be used, and any other tensor is left as it is."""

_DONT_NEED = 4
"""MADV_DONTNEED of Linux: private pages of a file are dropped, and read again when they are next used."""

_RANGE = re.compile(r"(?P<first>[0-9a-f]+)-(?P<end>[0-9a-f]+) r[w-]-p [0-9a-f]+ \S+ (?P<inode>\d+)")


def keep(tensor: Tensor) -> None:
    """Leave a tensor in memory: the `Forget` of weights that somebody else may be changing."""


def forgetting() -> Forget:
    """Return the `Forget` of the files that are mapped now and none of whose numbers were changed in memory.

    Only for weights that nobody else can change meanwhile, and to be asked for anew at each use: a page that is changed
    later would be lost. Elsewhere than on Linux, and where the system does not tell, it does nothing.
    """
    unchanged = _unchanged_ranges() if sys.platform == "linux" else []
    if not unchanged:
        return keep
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def forget(tensor: Tensor) -> None:
        if tensor.is_mkldnn or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return
        first, size = tensor.data_ptr(), tensor.nbytes
        if any(start <= first and first + size <= end for start, end in unchanged):
            page, last = -(-first // mmap.PAGESIZE), (first + size) // mmap.PAGESIZE
            if page < last:  # whole pages, which hold nothing else
                advise(page * mmap.PAGESIZE, (last - page) * mmap.PAGESIZE, _DONT_NEED)

    return forget


def _unchanged_ranges() -> list[tuple[int, int]]:
    """Return the addresses [start, end) of this process's private mappings of files, without those with changed pages.

    Mappings that programs are run from are left out: they may not be written to, or belong to libraries.
    """
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    ranges: list[tuple[int, int]] = []
    mapped: tuple[int, int] | None = None
    for line in lines:
        if line.startswith("Anonymous:"):  # changed pages, which are in no file any more
            if mapped and line.split()[1] == "0":
                ranges.append(mapped)
            mapped = None
        elif match := _RANGE.match(line):
            mapped = (int(match["first"], 16), int(match["end"], 16)) if match["inode"] != "0" else None
    return ranges
