"""Encode masks as Label Studio's brush stores them: runs of bytes, packed into bits.

The stream starts with the number of values (32 bits), the bits of a value less one (5), and four widths of a count,
each less one (4 x 4). Then come blocks: a bit that says whether it repeats one value, the number of the width of its
count (2 bits), the count less one, and the value or values. The values are those of the mask as an RGBA picture, row by
row: each pixel has four values, all 0 or all 255.
"""

import numpy as np

_VALUE_BITS = 8
_COUNT_BITS = (3, 4, 8, 16)
_CHANNELS = 4


def brush_rle(mask: np.ndarray) -> list[int]:
    """Return the bytes of a mask [H, W] bool."""
    flat = mask.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    counts = np.diff(np.append(starts, flat.size)) * _CHANNELS
    head = f"{flat.size * _CHANNELS:032b}{_VALUE_BITS - 1:05b}" + "".join(f"{bits - 1:04b}" for bits in _COUNT_BITS)
    value = bool(flat[0])
    blocks = [head]
    for count in counts.tolist():
        blocks += _blocks(count, value)
        value = not value
    bits = "".join(blocks)
    bits += "0" * (-len(bits) % 8)
    return list(int(bits, 2).to_bytes(len(bits) // 8, "big"))


def _blocks(count: int, value: bool) -> list[str]:
    """Return a run of equal values as few blocks."""
    longest = 1 << _COUNT_BITS[-1]
    whole, rest = divmod(count, longest)
    lengths = [longest] * whole + ([rest] if rest else [])
    return [_block(length, value) for length in lengths]


def _block(count: int, value: bool) -> str:
    width = next(index for index, bits in enumerate(_COUNT_BITS) if count <= 1 << bits)
    return f"1{width:02b}{count - 1:0{_COUNT_BITS[width]}b}{'1' * 8 if value else '0' * 8}"
