"""Masks of proposals as they are stored: two bits a cell of the model's grid, and what these mean.

A cell has one of four levels, by its mask logit: up to -3, up to 0, up to 3, above. Each mask keeps the mean logit of
its cells of each level, so that faint masks stay as faint as they are. Layout: a byte that says so, four float16
(little endian), and the levels, four a byte, deflated. Indexes of format 1 have COCO run lengths: inside or outside.

Letters: h w stride-16 grid.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from opensan.outputs.coco import decode_mask

BOUNDARIES = (-3.0, 0.0, 3.0)
"""Mask logits between the levels. Labels agree best with those of whole masks for these (docs/results.md)."""

STEEP = 4.0
"""Logit of a mask of format 1 inside, and its negative outside."""

_LEVELS = b"\x02"  # run lengths are printable: they begin with a byte of 48 or more
_VALUES = np.dtype("<f2")
_HEAD = 1 + 4 * _VALUES.itemsize


def stored_mask(logits: np.ndarray) -> bytes:
    """Return a mask's logits [h, w] as they are stored."""
    levels = np.digitize(logits, BOUNDARIES, right=True).astype(np.uint8).ravel()
    counts = np.bincount(levels, minlength=4)
    sums = np.bincount(levels, np.clip(logits, -64, 64).ravel(), minlength=4)
    values = np.where(counts > 0, sums / np.maximum(counts, 1), 0).astype(_VALUES)
    padded = np.zeros(-(-len(levels) // 4) * 4, np.uint8)
    padded[: len(levels)] = levels
    packed = (padded.reshape(-1, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(axis=1, dtype=np.uint8)
    return _LEVELS + values.tobytes() + zlib.compress(packed.tobytes())


def mask_logits(stored: bytes, grid: tuple[int, int]) -> NDArray[np.float32]:
    """Return a mask's logits, [h, w], as far as they are stored. Raises ValueError if `stored` is damaged."""
    if not stored.startswith(_LEVELS):
        return np.where(_inside(stored, grid), np.float32(STEEP), np.float32(-STEEP))
    return np.frombuffer(stored, _VALUES, 4, 1).astype(np.float32)[_levels(stored, grid)]


def mask_cells(stored: bytes, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the cells in which a mask is more than one half, [h, w]. Raises ValueError if `stored` is damaged."""
    return _levels(stored, grid) >= 2 if stored.startswith(_LEVELS) else _inside(stored, grid)


def _inside(counts: bytes, grid: tuple[int, int]) -> NDArray[np.bool_]:
    return decode_mask({"size": list(grid), "counts": counts}, *grid)


def _levels(stored: bytes, grid: Sequence[int]) -> NDArray[np.uint8]:
    """Return the levels 0 to 3, [h, w]."""
    count = grid[0] * grid[1]
    size = -(-count // 4)
    unpacking = zlib.decompressobj()
    try:
        packed = unpacking.decompress(stored[_HEAD:], size + 1)  # never more, whatever the bytes say
    except zlib.error as error:
        raise ValueError(f"a mask can't be read: {error}") from None
    if len(packed) != size or not unpacking.eof:
        raise ValueError(f"a mask has not the {count} cells of its grid")
    levels = np.frombuffer(packed, np.uint8)[:, None] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)
    return levels.astype(np.uint8).ravel()[:count].reshape(tuple(grid))
