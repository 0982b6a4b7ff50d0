"""Connected regions of a label map: where a name fits, and which outlines would only be clutter."""

from dataclasses import dataclass

import numpy as np

GRID = 256
"""Names are placed on a label map reduced to at most this many pixels a side."""

LEAST_NAMED = 0.006
"""Share of the pixels below which a region gets no name."""

CROWD_REACH = 7
"""Pixels in each direction among which outlines are counted."""

MOST_OUTLINE = 0.3
"""Share of outlines among these pixels, above which none is drawn: a model that is unsure gives specks, not regions."""


@dataclass(frozen=True)
class NamePlace:
    """The point of a region that is farthest from its edge, in pixels of the whole map."""

    label: int
    x: float
    y: float
    radius: float
    """Distance to the edge."""


def name_places(labels: np.ndarray) -> list[NamePlace]:
    """Return where names fit into the regions of labels [H, W], largest region first; unlabelled ones have none."""
    from scipy import ndimage  # here, so that the package imports quickly

    height, width = labels.shape
    step = max(1, -(-max(height, width) // GRID))
    small = labels[step // 2 :: step, step // 2 :: step]
    if not small.size:
        return []
    # Pixels beside another label are left out on both sides, so that no connected part holds two labels.
    edge = np.pad(small, 1, constant_values=small.min() - 1)
    inner = np.ones(small.shape, dtype=bool)
    for rows, columns in ((slice(0, -2), slice(1, -1)), (slice(2, None), slice(1, -1))):
        inner &= edge[rows, columns] == small
        inner &= edge[columns, rows] == small
    inner &= small >= 0
    regions, count = ndimage.label(inner)
    sizes = np.bincount(regions.ravel(), minlength=count + 1)
    by_size = np.argsort(-sizes[1:], kind="stable") + 1
    large = [region for region in by_size if sizes[region] >= LEAST_NAMED * small.size]
    distances = ndimage.distance_transform_edt(inner)
    positions = ndimage.maximum_position(distances, regions, large) if large else []
    return [
        NamePlace(
            label=int(small[row, column]),
            x=min(width - 1, (column + 0.5) * step),
            y=min(height - 1, (row + 0.5) * step),
            radius=float(distances[row, column] + 0.5) * step,
        )
        for row, column in positions
    ]


def without_crowds(outlines: np.ndarray) -> np.ndarray:
    """Return outlines [H, W] bool without those that are many in a small area."""
    height, width = outlines.shape
    side = 2 * CROWD_REACH + 1
    sums = np.zeros((height + side, width + side), dtype=np.int32)
    inside = slice(CROWD_REACH + 1, CROWD_REACH + 1 + height), slice(CROWD_REACH + 1, CROWD_REACH + 1 + width)
    sums[inside] = outlines
    np.cumsum(sums, axis=0, out=sums)
    np.cumsum(sums, axis=1, out=sums)
    around = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    return outlines & (around <= MOST_OUTLINE * side**2)
