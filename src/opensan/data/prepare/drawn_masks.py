"""Draw the masks of COCO's segmentations: polygons, or run lengths."""

from collections.abc import Mapping

import numpy as np

from opensan.errors import UserError
from opensan.outputs.coco import decode_mask

MAX_OUTLINE = 4_000_000
"""Limit of pixels along a polygon, which decide its memory. Outlines of real objects have thousands."""


def mask_of(segmentation: object, height: int, width: int) -> np.ndarray:
    """Return the mask [height, width] bool of a COCO segmentation: polygons, or run lengths (compressed or not).

    Polygons are drawn as COCO's own tools draw them. Raises ValueError, one line, on anything else, and on what would
    take memory out of all proportion.
    """
    if isinstance(segmentation, Mapping):
        return decode_mask(segmentation, height, width)
    if not segmentation:
        raise UserError("has only a box, no segmentation (polygons or run lengths)")
    if not isinstance(segmentation, list):
        raise UserError(f"its segmentation is neither polygons nor run lengths: {segmentation!r:.40}")
    polygons = [_polygon(points, height, width) for points in segmentation]
    polygons = [points.tolist() for points in polygons if len(points) >= 6]  # two points enclose nothing
    if not polygons:
        return np.zeros((height, width), dtype=bool)
    from faster_coco_eval import mask as coco_mask  # slow to import

    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


def _polygon(points: object, height: int, width: int) -> np.ndarray:
    """Check a polygon and return its coordinates x, y, x, y, ... [2 N] float64."""
    # Checked against a double's range, because JSON numbers may have any number of digits.
    if (
        not isinstance(points, list)
        or not all(type(value) in (int, float) and abs(value) < 1e300 for value in points)
        or len(points) % 2
    ):
        raise UserError("a polygon is not a list of numbers x, y, x, y, ...")
    flat = np.array(points, dtype=np.float64)
    corners = flat.reshape(-1, 2)
    size = np.array([width, height])
    if (corners < -size).any() or (corners > 2 * size).any():
        raise UserError(f"a polygon lies far outside the image of {width}x{height} (width x height)")
    steps = np.abs(np.diff(corners, axis=0, append=corners[:1])).max(axis=1)
    if steps.sum() > MAX_OUTLINE:
        raise UserError(f"a polygon's outline is {steps.sum():,.0f} pixels long, more than {MAX_OUTLINE:,}")
    return flat
