"""Trace the outlines of the regions of a label map as polygons.

The outlines follow the edges between pixels: exact, with holes, and with the pixels' own connectivity. Contour finders
at a level (contourpy, scikit-image) do not give that; OpenCV's outlines go through pixels' centres, and it would be the
heaviest dependency.

Coordinates are (x, y) in pixels from the picture's upper left corner: pixel (0, 0) is the square from 0 to 1.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

TOLERANCE = 0.35
"""`simplified` leaves no vertex farther than this from its polygon, in pixels.

The outline through the middles of pixels' sides is at least 0.354 (the root of 1/8) from every pixel's centre, so that
within this tolerance no pixel changes sides.
"""

_RIGHT, _DOWN, _LEFT, _UP = range(4)
# A corner of an outline, which has its region on the right hand: (where, as seen from the lattice point, the pixel lies
# that differs from its two neighbours there; direction in; direction out) if that pixel is the region's, ...
_CONVEX = [((0, 0), _DOWN, _LEFT), ((0, 1), _LEFT, _UP), ((1, 0), _RIGHT, _DOWN), ((1, 1), _UP, _RIGHT)]
# ... and if it is the only one of the four that isn't.
_CONCAVE = [((0, 0), _RIGHT, _UP), ((0, 1), _DOWN, _RIGHT), ((1, 0), _UP, _LEFT), ((1, 1), _LEFT, _DOWN)]


@dataclass(frozen=True)
class Region:
    """Pixels of one label that are connected by their sides."""

    label: int
    pixels: int
    outline: np.ndarray
    """[N, 2] int64: its corners (x, y), clockwise on the screen; every side runs along a row or a column."""
    holes: tuple[np.ndarray, ...]
    """The outlines of its holes, counter-clockwise. No ring comes to a point twice; rings may touch."""


def regions(labels: np.ndarray) -> Iterator[Region]:
    """Yield the regions of a label map [H, W] int (-1: unlabelled, no region), by label, then from the top."""
    parts, part_labels = connected_parts(labels)
    rings, owners, ends = _rings(_corners(labels, parts))
    begins = np.concatenate([[0], ends[:-1]])
    # A stable sort keeps a region's outline, which begins at its uppermost corner, before its holes.
    in_order = np.lexsort([owners, part_labels[owners]])
    for owner, group in groupby(in_order.tolist(), key=lambda ring: int(owners[ring])):
        yield region(int(part_labels[owner]), [rings[begins[ring] : ends[ring]].astype(np.int64) for ring in group])


def region(label: int, rings: Iterable[np.ndarray]) -> Region:
    """Make a region of its outline and holes [N, 2], which run as those of `Region` but may come to a point again."""
    simple = [part for ring in rings for part in _simple(ring)]
    # What is cut off where pixels touch by a corner may come before the outline.
    simple.sort(key=lambda ring: signed_area(ring) < 0)
    return Region(label, round(sum(map(signed_area, simple))), simple[0], tuple(simple[1:]))


def _simple(ring: np.ndarray) -> list[np.ndarray]:
    """Cut a ring where it comes to a point again, which no valid polygon may (OGC Simple Features, 6.1.11)."""
    keys = ring[:, 0] << 32 | ring[:, 1]
    if len(np.unique(keys)) == len(keys):
        return [ring]
    rings: list[np.ndarray] = []
    path: list[int] = []
    index_of: dict[int, int] = {}
    for index, key in enumerate(keys.tolist()):
        if key in index_of:
            begin = index_of[key]
            for other in path[begin + 1 :]:
                del index_of[int(keys[other])]
            rings.append(ring[path[begin:]])
            del path[begin + 1 :]
        else:
            index_of[key] = len(path)
            path.append(index)
    return [*rings, ring[path]]


def signed_area(ring: np.ndarray) -> float:
    """Return the area of a polygon [N, 2]; positive if it runs clockwise on the screen (y points down)."""
    x, y = ring.astype(np.float64).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


@dataclass(frozen=True)
class _Corners:
    """Corners of outlines, C of them. A point where two of a region's pixels touch by a corner only has two."""

    points: np.ndarray
    """[C, 2] int32: x, y."""
    owners: np.ndarray
    """[C] int64: the region of each corner."""
    arrives: np.ndarray
    """[C] int8: the direction of the side that ends here."""
    leaves: np.ndarray
    """[C] int8: the direction of the side that begins here."""


def connected_parts(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the parts of a label map [H, W] that are connected by pixels' sides: each pixel's part, and their labels.

    Returns each pixel's part, [H, W] int64 from 0, in the order of their first pixels, unlabelled ones too, and each
    part's label [N]. It connects the runs of one label in each row, so that many labels cost no more than few.
    """
    begins = np.ones(labels.shape, dtype=bool)
    begins[:, 1:] = labels[:, 1:] != labels[:, :-1]
    runs = begins.cumsum(dtype=np.int32).reshape(labels.shape) - 1
    touches = (labels[1:] == labels[:-1]) & (begins[1:] | begins[:-1])  # once for each pair of runs
    part_of_run = _connected(np.stack([runs[:-1][touches], runs[1:][touches]]), int(runs[-1, -1]) + 1)
    part_labels = np.empty(part_of_run.max() + 1, dtype=labels.dtype)
    part_labels[part_of_run] = labels[begins]
    return part_of_run[runs], part_labels


def _connected(pairs: np.ndarray, count: int) -> np.ndarray:
    """Return the group, [count] int64 from 0, of each of `count` nodes that `pairs` [2, P] connect.

    Groups are in the order of their first nodes. Each round joins every group to one that begins earlier, if it is
    connected to any, so that at most half of those with pairs remain. scipy gives the same, no faster, and a first
    answer would wait for its import, which takes a third of it.
    """
    first = np.arange(count)  # the first node of each node's group
    while pairs.shape[1]:
        first[pairs.max(axis=0)] = pairs.min(axis=0)  # one pair of a group is enough: the others stay for later rounds
        while not np.array_equal(first, earlier := first[first]):
            first = earlier
        pairs = first[pairs]
        pairs = pairs[:, pairs[0] != pairs[1]]
    is_first = first == np.arange(count)
    return (is_first.cumsum() - 1)[first]


def _corners(labels: np.ndarray, parts: np.ndarray) -> _Corners:
    """Return the corners of all parts of a label map [H, W], whose numbers are `parts` [H, W].

    Pixels side by side belong to one part if their labels are equal; pixels across a corner are never compared.
    """
    height, width = labels.shape
    labels = np.pad(labels, 1, constant_values=-1)
    four = {(y, x): labels[y : height + 1 + y, x : width + 1 + x] for y in (0, 1) for x in (0, 1)}
    corners = []
    for table, convex in ((_CONVEX, True), (_CONCAVE, False)):
        for (y, x), arrive, leave in table:
            odd, across = four[y, x], four[1 - y, 1 - x]
            beside, below = four[y, 1 - x], four[1 - y, x]
            if convex:
                is_corner, at = (odd >= 0) & (beside != odd) & (below != odd), (y, x)
            else:
                is_corner = (across >= 0) & (odd != across) & (beside == across) & (below == across)
                at = (1 - y, 1 - x)
            rows, columns = np.nonzero(is_corner)
            points = np.stack([columns, rows], axis=1).astype(np.int32)
            directions = [np.full(len(points), direction, dtype=np.int8) for direction in (arrive, leave)]
            corners.append((points, parts[rows + at[0] - 1, columns + at[1] - 1], *directions))
    return _Corners(*map(np.concatenate, zip(*corners, strict=True)))


def _rings(corners: _Corners) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order corners [C, 2] into closed outlines, from the top; return each outline's owner and end too, [R] each."""
    points, count = corners.points, len(corners.points)
    follower = np.empty(count, dtype=np.int64)
    for direction in range(4):
        # A side ends at the next corner of its row or column that has its direction; so, sorted by rows or columns, the
        # sides' beginnings and ends pair up one to one.
        along, across = (0, 1) if direction in (_RIGHT, _LEFT) else (1, 0)
        sides = (np.flatnonzero(which == direction) for which in (corners.leaves, corners.arrives))
        begins, stops = (which[np.lexsort([points[which, along], points[which, across]])] for which in sides)
        follower[begins] = stops
    following = array("q", follower.tobytes())
    seen = bytearray(count)
    ordered, closed = array("q"), array("q")
    for first in np.lexsort(points.T).tolist():
        if seen[first]:
            continue
        corner = first
        while not seen[corner]:
            seen[corner] = 1
            ordered.append(corner)
            corner = following[corner]
        closed.append(len(ordered))
    order, ends = (np.frombuffer(numbers, dtype=np.int64) for numbers in (ordered, closed))
    return points[order], corners.owners[order[ends - 1]] if count else order, ends


def simplified(ring: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
    """Return a ring of `Region` with far fewer vertices, [N, 2] float64: stairs become slopes. Fewer than 3: a speck.

    The ring is moved to the middles of pixels' sides, so that a slope lies in the middle of its stairs, and then
    thinned by the algorithm of Ramer, Douglas and Peucker.
    """
    following = np.roll(ring, -1, axis=0)
    steps = np.sign(following - ring) * 0.5
    middles = np.stack([ring + steps, following - steps], axis=1).reshape(-1, 2)
    middles = middles[(middles != np.roll(middles, 1, axis=0)).any(axis=1)]
    far = int(((middles - middles[0]) ** 2).sum(axis=1).argmax())
    closed = np.concatenate([middles, middles[:1]])
    kept = np.zeros(len(closed), dtype=bool)
    kept[[0, far]] = True
    spans = [(0, far), (far, len(middles))]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        distance = _distance(closed[first + 1 : last], closed[first], closed[last])
        farthest = int(distance.argmax())
        if distance[farthest] > tolerance:
            middle = first + 1 + farthest
            kept[middle] = True
            spans += [(first, middle), (middle, last)]
    return closed[:-1][kept[:-1]]


def _distance(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return the distance of points [N, 2] from the segment between `start` and `end`."""
    along = end - start
    length = float(along @ along)
    share = ((points - start) @ along / length).clip(0, 1) if length else np.zeros(len(points))
    return np.linalg.norm(points - start - share[:, None] * along, axis=1)


def without_holes(region: Region, least: int) -> list[np.ndarray]:
    """Return valid polygons [N, 2] float64, simplified, that cover a region: for formats that know no holes.

    A region with holes is cut along rows that go through them. Holes of fewer than `least` pixels are filled.
    """
    holes = [hole for hole in region.holes if -signed_area(hole) >= least]
    if not holes:
        return [_drawable(region.outline)]
    left, top = region.outline.min(axis=0)
    mask = _filled([ring - np.array([left, top]) for ring in (region.outline, *holes)])
    edges = [0, *_rows_through([(hole[:, 1].min() - top, hole[:, 1].max() - top) for hole in holes]), len(mask)]
    parts = []
    for first, last in pairwise(edges):
        band = np.where(mask[first:last], 0, -1)
        parts += [_drawable(piece.outline + np.array([left, top + first])) for piece in regions(band)]
    return parts


def as_one_ring(pieces: Iterable[Region], least: int) -> np.ndarray:
    """Return regions with their holes as one ring [N, 2] float64, simplified: for formats of one polygon an object.

    Rings are joined by a line between near corners, there and back, so that filling by the even-odd rule gives the
    pixels. Regions and holes of fewer than `least` pixels are left out, but never the largest region.
    """
    from scipy.spatial import cKDTree

    ordered = sorted(pieces, key=lambda region: -region.pixels)
    rings = []
    for number, piece in enumerate(ordered):
        if number == 0 or piece.pixels >= least:
            rings.append(_drawable(piece.outline))
            rings += [_drawable(hole) for hole in piece.holes if -signed_area(hole) >= least]
    path = rings[0]
    for ring in rings[1:]:
        distances, nearest = cKDTree(path).query(ring)
        begin = int(distances.argmin())
        at = int(nearest[begin])
        path = np.concatenate([path[: at + 1], ring[begin:], ring[: begin + 1], path[at:]])
    return path


def _drawable(outline: np.ndarray) -> np.ndarray:
    ring = simplified(outline)
    return ring if len(ring) >= 3 else outline.astype(np.float64)  # a speck


def _rows_through(spans: list[tuple[int, int]]) -> list[int]:
    """Choose few rows so that one lies in each span (first, row after the last)."""
    rows: list[int] = []
    for first, last in sorted(spans, key=lambda span: span[1]):
        if not rows or rows[-1] < first:
            rows.append(int(last) - 1)
    return rows


def _filled(rings: list[np.ndarray]) -> np.ndarray:
    """Fill an outline, less its holes, as [H, W] bool from the corner (0, 0)."""
    width, height = rings[0].max(axis=0)
    steps = np.zeros((height, width + 1), dtype=np.int8)
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring.tolist(), np.roll(ring, -1, axis=0).tolist(), strict=True):
            if x0 == x1:
                steps[min(y0, y1) : max(y0, y1), x0] += 1 if y1 < y0 else -1
    return np.cumsum(steps, axis=1, dtype=np.int8)[:, :-1] > 0
