"""Decode clients' images with limited memory and time, which even a small file can otherwise exhaust."""

import re

import numpy as np

from opensan.images import ImageError, open_image
from opensan.serve.limits import ServiceLimits

MOST_SCANS = 64
"""Scans of a JPEG file; 10 are usual. Each takes a few bytes, but costs a pass over the whole image."""

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9


def decode(data: bytes, limits: ServiceLimits) -> np.ndarray:
    """Decode an image file to uint8 RGB [H0, W0, 3].

    Raises ImageError, one line, for a file that is not an image or exceeds `limits`.
    """
    if more_scans(data, MOST_SCANS):
        raise ImageError(f"this JPEG has more than {MOST_SCANS} scans: save it anew")
    array = open_image(data, max_pixels=limits.pixels)
    height, width, _ = array.shape
    if max(height, width) > limits.side:
        raise ImageError(f"{width:,} x {height:,} pixels: a side may have at most {limits.side:,}")
    return array


def more_scans(data: bytes, most: int) -> bool:
    """Return whether `data` is a JPEG file (ITU-T T.81, annex B) of more than `most` scans; the rest is ignored.

    Segments are skipped by their length, and compressed data by looking for the next marker.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    scans, position = 0, 2
    while scans <= most and (marker := _MARKER.search(data, position)):
        kind, position = data[marker.end() - 1], marker.end()
        if kind == _END_OF_IMAGE:
            return False
        scans += kind == _START_OF_SCAN
        position += int.from_bytes(data[position : position + 2])
    return scans > most
