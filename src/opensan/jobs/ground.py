"""Place a raster on the earth: longitudes and latitudes of its outlines, and true areas of its pixels.

Letters: H W the raster in pixels, N points, columns and rows counted from the raster's upper left corner.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from opensan.outputs.polygons import Region, signed_area

if TYPE_CHECKING:
    import pyproj
    from affine import Affine
    from rasterio.crs import CRS

LONGITUDE_LATITUDE = "EPSG:4326"
"""Coordinate system of GeoJSON (RFC 7946), in rasterio's order: longitude first."""

CELLS = 256
"""Areas are computed for at most so many cells a side; in a cell, all pixels count as equally large."""

STRAIGHT = 0.1
"""Error of a polygon's side in pixels: a straight line in the image is a curve in degrees."""

# WGS 84.
_EQUATOR_METRES = 6_378_137.0
_ECCENTRICITY_SQUARED = 0.00669437999014


class Ground:
    """Transform of a raster to longitude and latitude (WGS 84), if it has one, and its pixels' areas."""

    def __init__(self, crs: "CRS | None", transform: "Affine", size: tuple[int, int]) -> None:
        """Take `transform`, which leads from (column, row) to coordinates of `crs`, and the size (H, W)."""
        self._crs, self._to_degrees = _way(crs)
        self._affine = np.array(tuple(transform)[:6], dtype=np.float64).reshape(2, 3)
        height, width = size
        step = math.ceil(max(size) / CELLS)
        self._rows = np.append(np.arange(0, height, step), height).astype(np.float64)
        self._columns = np.append(np.arange(0, width, step), width).astype(np.float64)
        lattice = np.stack(np.meshgrid(self._columns, self._rows), axis=-1)  # [rows, columns, 2]
        degrees = self._degrees(lattice.reshape(-1, 2)).reshape(lattice.shape)
        self.on_earth = bool(np.isfinite(degrees).all(axis=-1).any())
        """Whether there is a transform to longitude and latitude."""
        self._longest_side = math.inf
        self._decimals = 8  # a millimetre
        self._mirrored = False
        self._cells = self._plane_cells()
        if self.on_earth:
            self._cells, self._mirrored = _cell_areas(degrees)
            self._look_at_sides(degrees, step)
        if self._cells is not None:
            self._sums = np.zeros((len(self._rows), len(self._columns)))
            self._sums[1:, 1:] = self._cells.cumsum(axis=0).cumsum(axis=1)

    @property
    def has_areas(self) -> bool:
        """Tell whether areas are known in square metres."""
        return self._cells is not None

    @property
    def coordinates(self) -> str | None:
        """The system of the polygons' coordinates, in one line; None for longitude and latitude."""
        if self.on_earth:
            return None
        if self._crs is not None:
            return self._crs.to_wkt()
        plain = np.array_equal(self._affine, [[1, 0, 0], [0, 1, 0]])
        return "columns and rows of the image" if plain else "those of the image's world file, which names no system"

    def pixel_areas(self) -> tuple[np.ndarray, np.ndarray]:
        """Return a pixel's square metres by bands of rows: the bands' edges [B + 1], and [B, W] float64."""
        heights, widths = np.diff(self._rows), np.diff(self._columns)
        assert self._cells is not None  # see `has_areas`
        density = self._cells / (heights[:, None] * widths)
        return self._rows.astype(int), np.repeat(density, widths.astype(int), axis=1)

    def square_metres(self, region: Region) -> float:
        """Return the area of a region on the ground."""
        outline, *holes = (abs(self._enclosed(ring)) for ring in (region.outline, *region.holes))
        return outline - sum(holes)

    def _enclosed(self, ring: np.ndarray) -> float:
        """Return the area in a ring along rows and columns, with a sign: a sum over its sides along columns."""
        x, y = ring.T
        sums = self._sum_before(y, x)
        following = np.roll(sums, -1)
        return float((following - sums)[x == np.roll(x, -1)].sum())

    def _sum_before(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return the area above and to the left of points [N]."""
        i, down = _place(self._rows, rows)
        j, right = _place(self._columns, columns)
        sums = self._sums
        upper = sums[i, j] * (1 - right) + sums[i, j + 1] * right
        lower = sums[i + 1, j] * (1 - right) + sums[i + 1, j + 1] * right
        return upper * (1 - down) + lower * down

    def geometries(self, regions: Sequence[Region]) -> list[dict[str, Any] | None]:
        """Return a GeoJSON geometry of each region; None where a part of it lies nowhere on the earth.

        Polygons are cut at the antimeridian and enclose poles as RFC 7946 (section 3.1.9) asks. All points are
        transformed by one call.
        """
        polygons = [[self._sides_cut(ring) for ring in (region.outline, *region.holes)] for region in regions]
        points = np.concatenate([ring for rings in polygons for ring in rings]).astype(np.float64)
        placed = np.round(self._degrees(points), self._decimals) if self.on_earth else self._coordinates(points)
        start, geometries = 0, []
        for rings in polygons:
            moved = []
            for ring in rings:
                moved.append(placed[start : start + len(ring)])
                start += len(ring)
            geometries.append(self._geometry(moved))
        return geometries

    def _geometry(self, rings: list[np.ndarray]) -> dict[str, Any] | None:
        if not all(np.isfinite(ring).all() for ring in rings):
            return None
        if any(_crosses(ring) for ring in rings) and self.on_earth:
            return _cut(rings if self._mirrored else [ring[::-1] for ring in rings], self._decimals)
        closed = []
        for number, ring in enumerate(rings):
            # RFC 7946: the outer ring counter-clockwise, holes clockwise.
            ring = ring if (signed_area(ring) > 0) == (number == 0) else ring[::-1]
            closed.append([*ring.tolist(), ring[0].tolist()])
        return {"type": "Polygon", "coordinates": closed}

    def _sides_cut(self, ring: np.ndarray) -> np.ndarray:
        """Add points to a ring [N, 2] on sides that are too long to be straight in degrees."""
        if math.isinf(self._longest_side):
            return ring
        following = np.roll(ring, -1, axis=0)
        parts = np.ceil(np.abs(following - ring).sum(axis=1) / self._longest_side).astype(int)
        if (parts <= 1).all():
            return ring
        begin = np.repeat(np.arange(len(ring)), parts)
        share = (np.arange(len(begin)) - np.repeat(parts.cumsum() - parts, parts)) / parts[begin]
        return ring[begin] + share[:, None] * (following - ring)[begin]

    def _coordinates(self, points: np.ndarray) -> np.ndarray:
        """Transform points [N, 2] (column, row) to the raster's own system."""
        return points @ self._affine[:, :2].T + self._affine[:, 2]

    def _degrees(self, points: np.ndarray) -> np.ndarray:
        """Transform points [N, 2] (column, row) to longitude and latitude, infinite where there are none."""
        if self._to_degrees is None:
            return np.full(points.shape, np.inf)
        return np.stack(self._to_degrees.transform(*self._coordinates(points).T), axis=1)

    def _plane_cells(self) -> np.ndarray | None:
        """Return the cells' square metres in a system that is a plane on the ground, as a site's; None for others."""
        if self._crs is None or not self._crs.is_engineering:
            return None
        metres = self._crs.axis_info[0].unit_conversion_factor
        pixel = abs(np.linalg.det(self._affine[:, :2])) * metres**2
        return pixel * np.diff(self._rows)[:, None] * np.diff(self._columns) if metres else None

    def _look_at_sides(self, degrees: np.ndarray, step: int) -> None:
        """Find how long a side may be, and how many decimals tell a thousandth of a pixel."""
        with np.errstate(invalid="ignore"):
            pixels, bends = [], []
            for axis in (0, 1):
                if degrees.shape[axis] < 2:
                    continue
                first = _wrapped(np.diff(degrees, axis=axis))
                pixels.append(np.abs(first).max(axis=-1) / step)
                bends.append(np.abs(np.diff(first, axis=axis)).max(axis=-1))
            pixel = np.nanmedian(np.concatenate([part[np.isfinite(part)] for part in pixels]))
            finite = np.concatenate([part[np.isfinite(part)] for part in bends])
        if not pixel > 0:
            return
        self._decimals = max(8, math.ceil(3 - math.log10(pixel)))
        bend = finite.max(initial=0) / 2 / pixel  # pixels off the middle of a side of two steps
        if bend > 1e-3:
            self._longest_side = max(1.0, 2 * step * math.sqrt(STRAIGHT / bend))


def _place(edges: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the cell that each value lies in, and where in it, from 0 to 1."""
    index = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return index, (values - edges[index]) / (edges[index + 1] - edges[index])


def _way(crs: "CRS | None") -> "tuple[pyproj.CRS | None, pyproj.Transformer | None]":
    """Return a system as pyproj's, and the transform to longitude and latitude; None for what does not exist."""
    import pyproj

    if crs is None:
        return None, None
    try:
        system = pyproj.CRS.from_wkt(crs.to_wkt())
    except pyproj.exceptions.CRSError:
        return None, None
    try:
        return system, pyproj.Transformer.from_crs(system, LONGITUDE_LATITUDE, always_xy=True)
    except pyproj.exceptions.ProjError:  # a site's own grid, another planet
        return system, None


def _cell_areas(degrees: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the areas on the ellipsoid of cells between points [R, C, 2], 0 off the earth, and if it is mirrored."""
    with np.errstate(invalid="ignore"):
        longitude, latitude = np.radians(np.moveaxis(degrees, -1, 0))
        radius = _EQUATOR_METRES / np.sqrt(1 - _ECCENTRICITY_SQUARED * np.sin(latitude) ** 2)
        points = np.stack(
            [
                radius * np.cos(latitude) * np.cos(longitude),
                radius * np.cos(latitude) * np.sin(longitude),
                radius * (1 - _ECCENTRICITY_SQUARED) * np.sin(latitude),
            ],
            axis=-1,
        )
        down_right, down_left = points[1:, 1:] - points[:-1, :-1], points[1:, :-1] - points[:-1, 1:]
        # It points to the middle of the earth where columns go right and rows go down as seen from above.
        normals = np.cross(down_right, down_left) / 2
        inward = -(normals * points[:-1, :-1]).sum(axis=-1)
        areas = np.linalg.norm(normals, axis=-1)
    known = np.isfinite(areas)
    return np.where(known, areas, 0.0), bool(np.where(known, inward, 0).sum() < 0)


def _wrapped(differences: np.ndarray) -> np.ndarray:
    """Turn differences [..., 2] of longitude and latitude the shorter way round."""
    differences[..., 0] = (differences[..., 0] + 180) % 360 - 180
    return differences


def _crosses(ring: np.ndarray) -> bool:
    """Tell whether a ring of degrees goes across the antimeridian, or round a pole."""
    longitudes = ring[:, 0]
    return bool((np.abs(np.diff(longitudes, append=longitudes[0])) > 180).any() or np.abs(longitudes).max() > 180)


def _cut(rings: list[np.ndarray], decimals: int) -> dict[str, Any]:
    """Cut rings, which have the region on their left, at the antimeridian into a Polygon or MultiPolygon."""
    import shapely
    from shapely.affinity import translate
    from shapely.geometry import MultiPolygon, mapping
    from shapely.geometry.polygon import orient

    whole = _unrolled(rings[0])
    for hole in rings[1:]:
        hole = _unrolled(hole[::-1])
        for turn in (-360, 0, 360):
            whole = whole.difference(translate(hole, turn))
    parts = []
    for turn in range(-720, 721, 360):
        part = whole.intersection(shapely.box(turn - 180, -90, turn + 180, 90))
        parts.append(translate(part, -turn))
    joined = shapely.union_all(parts, grid_size=10.0**-decimals)
    polygons = [
        orient(part) for part in getattr(joined, "geoms", [joined]) if part.geom_type == "Polygon" and part.area
    ]
    geometry = mapping(MultiPolygon(polygons) if len(polygons) != 1 else polygons[0])
    return {"type": geometry["type"], "coordinates": geometry["coordinates"]}


def _unrolled(ring: np.ndarray) -> Any:
    """Return the polygon on a ring's left, with longitudes that go on beyond 180; round a pole, it reaches that."""
    import shapely

    longitudes = np.append(ring[:, 0], ring[0, 0])
    steps = _wrapped(np.diff(longitudes)[:, None])[:, 0]
    longitudes = longitudes[0] + np.append(0, steps.cumsum())
    points = np.stack([longitudes, np.append(ring[:, 1], ring[0, 1])], axis=1)
    turns = round(float(steps.sum()) / 360)
    if turns:  # eastwards, the north is on the left
        pole = math.copysign(90, turns)
        points = np.concatenate([points, [[points[-1, 0], pole], [points[0, 0], pole]]])
    return shapely.make_valid(shapely.Polygon(points))
