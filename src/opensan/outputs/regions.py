"""Connected regions of a label map: where a name fits, and which outlines would only be clutter."""

from dataclasses import dataclass

import numpy as np

from opensan.outputs.polygons import connected_parts

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
    parts, is_inner = connected_parts(inner)
    sizes = np.bincount(parts.ravel()) * is_inner
    by_size = np.argsort(-sizes, kind="stable")
    large = by_size[sizes[by_size] >= LEAST_NAMED * small.size]
    distances = distances_to_edge(inner)
    farthest = np.zeros(len(sizes), dtype=np.int64)
    order = distances.ravel().argsort()
    farthest[parts.ravel()[order]] = order  # the last of a part's pixels, the farthest, remains
    positions = zip(*np.unravel_index(farthest[large], small.shape), strict=True)
    return [
        NamePlace(
            label=int(small[row, column]),
            x=min(width - 1, (column + 0.5) * step),
            y=min(height - 1, (row + 0.5) * step),
            radius=float(distances[row, column] + 0.5) * step,
        )
        for row, column in positions
    ]


def distances_to_edge(inner: np.ndarray) -> np.ndarray:
    """Return each pixel's distance, [H, W] float64, to the nearest pixel that is False in `inner` [H, W].

    The rows and columns at the edges are False. Squared distances are exact, along columns first and then from column
    to column. scipy gives the same numbers, but a first answer would wait for its import.
    """
    height, width = inner.shape
    rows = np.arange(height, dtype=np.int32)[:, None]
    above = np.maximum.accumulate(np.where(inner, 0, rows), axis=0)
    below = np.minimum.accumulate(np.where(inner, height - 1, rows)[::-1], axis=0)[::-1]
    along = np.minimum(rows - above, below - rows) ** 2
    nearest = along.copy()
    for step in range(1, width):
        if step**2 >= nearest.max():
            break  # no column so far away has a nearer pixel
        np.minimum(nearest[:, step:], along[:, :-step] + step**2, out=nearest[:, step:])
        np.minimum(nearest[:, :-step], along[:, step:] + step**2, out=nearest[:, :-step])
    return np.sqrt(nearest)


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
