"""Outlines of the regions of a label map, as polygons.

Traced here, on the edges between pixels, by numpy: exact, holes included, and with the pixels' own connectivity, which
contour finders at a level (contourpy, scikit-image) do not give; OpenCV, which traces too, goes through pixels' centres
and would be the heaviest dependency.

Coordinates are (x, y) in pixels from the picture's upper left corner: pixel (0, 0) is the square from 0 to 1.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

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
    """Pixels of one label that hang together by their sides."""

    label: int
    pixels: int
    outline: np.ndarray
    """[N, 2] int64: its corners (x, y), clockwise as seen; every side runs along a row or a column."""
    holes: tuple[np.ndarray, ...]
    """The same of what it encloses, counter-clockwise."""


def regions(labels: np.ndarray) -> Iterator[Region]:
    """The regions of a label map [H, W] int (-1: unlabelled, no region), by label."""
    from scipy import ndimage

    for label, box in enumerate(ndimage.find_objects(labels + 1)):
        if box is None:
            continue
        components, _ = ndimage.label(labels[box] == label)
        offset = (box[1].start, box[0].start)
        sizes = np.bincount(components.ravel())
        outlines: dict[int, np.ndarray] = {}
        holes: dict[int, list[np.ndarray]] = defaultdict(list)
        for component, ring in _rings(components):
            if signed_area(ring) > 0:
                outlines[component] = ring + offset
            else:
                holes[component].append(ring + offset)
        for component, outline in sorted(outlines.items()):
            yield Region(label, int(sizes[component]), outline, tuple(holes[component]))


def signed_area(ring: np.ndarray) -> float:
    """Of a polygon [N, 2]; positive if it runs clockwise as seen (y points down)."""
    x, y = ring.astype(np.float64).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _rings(components: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Closed outlines, corner by corner, with the component each belongs to, of components [H, W] (0: none)."""
    places, owners, arrives, leaves = _corners(components)
    follower = np.empty(len(places), dtype=np.int64)
    for direction in range(4):
        # A side ends at the next corner in its row or column that is arrived at in its direction; so, in the order of
        # rows or columns, the sides' beginnings and ends pair up one to one.
        along = (1, 0) if direction in (_RIGHT, _LEFT) else (0, 1)
        starts, ends = (np.flatnonzero(which == direction) for which in (leaves, arrives))
        starts, ends = (which[np.lexsort(places[which][:, [1 - along[0], 1 - along[1]]].T)] for which in (starts, ends))
        follower[starts] = ends
    following = follower.tolist()
    seen = bytearray(len(following))
    for first in range(len(following)):
        if seen[first]:
            continue
        ring, corner = [], first
        while not seen[corner]:
            seen[corner] = 1
            ring.append(corner)
            corner = following[corner]
        yield int(owners[first]), places[ring]


def _corners(components: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All corners of all outlines: (x, y) [C, 2], component [C], direction in [C], direction out [C].

    Where two of a component's pixels touch by a corner only, there are two: an outline keeps to its pixel.
    """
    height, width = components.shape
    padded = np.pad(components, 1)
    four = {(y, x): padded[y : height + 1 + y, x : width + 1 + x] for y in (0, 1) for x in (0, 1)}
    found = []
    for table, convex in ((_CONVEX, True), (_CONCAVE, False)):
        for (y, x), arrive, leave in table:
            odd, across = four[y, x], four[1 - y, 1 - x]
            beside, below = four[y, 1 - x], four[1 - y, x]
            if convex:
                is_corner, owner = (odd > 0) & (beside != odd) & (below != odd), odd
            else:
                is_corner, owner = (across > 0) & (odd != across) & (beside == across) & (below == across), across
            rows, columns = np.nonzero(is_corner)
            places = np.stack([columns, rows], axis=1)
            count = len(places)
            found.append((places, owner[rows, columns], np.full(count, arrive), np.full(count, leave)))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def simplified(ring: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
    """A ring of `Region` with far fewer vertices, [N, 2] float64: stairs become slopes. Fewer than 3: a speck.

    The outline goes through the middles of pixels' sides, so that a slope lies amid its stairs, and is then thinned by
    the rule of Ramer, Douglas and Peucker.
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
    """Of points [N, 2] from the segment between two."""
    along = end - start
    length = float(along @ along)
    share = ((points - start) @ along / length).clip(0, 1) if length else np.zeros(len(points))
    return np.linalg.norm(points - start - share[:, None] * along, axis=1)


def one_ring(region: Region) -> np.ndarray:
    """A region as a single polygon [N, 2] float64, simplified: for formats that know no holes.

    Each hole hangs on the outline by a cut without width, so the polygon encloses the region and not its holes.
    """
    from scipy.spatial import KDTree

    outline = simplified(region.outline)
    if len(outline) < 3:  # a speck
        return region.outline.astype(np.float64)
    holes = [hole for hole in map(simplified, region.holes) if len(hole) >= 3]
    if not holes:
        return outline
    tree = KDTree(outline)
    cuts: dict[int, list[np.ndarray]] = defaultdict(list)
    for hole in holes:
        distances, nearest = tree.query(hole)
        begin = int(distances.argmin())
        at = int(nearest[begin])
        turned = np.roll(hole, -begin, axis=0)
        cuts[at] += [turned, turned[:1], outline[at : at + 1]]
    parts, start = [], 0
    for at in sorted(cuts):
        parts += [outline[start : at + 1], *cuts[at]]
        start = at + 1
    return np.concatenate([*parts, outline[start:]])
