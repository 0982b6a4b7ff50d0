"""Read and write rasters of any size by window: GeoTIFF in; GeoTIFF label raster and GeoJSON polygons out.

Needs rasterio (the extra `geo`). What it opens is restricted to single files of formats that carry their own pixels:
a format that names other files or addresses would make a picture from outside a way to read them.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensan.errors import UserError, install
from opensan.files import atomic_path
from opensan.images.pixels import stretched
from opensan.jobs.ground import Ground
from opensan.jobs.strips import StripFile, label_dtype
from opensan.outputs import UNLABELLED_COLOUR, palette
from opensan.outputs.polygons import Region, region, signed_area

if TYPE_CHECKING:
    from affine import Affine
    from rasterio.crs import CRS
    from rasterio.io import DatasetReader
    from rasterio.windows import Window

BEGINNINGS = {
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"\0\0\0\x0cjP": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
}
"""First bytes of supported files, and GDAL's name of their format."""

CACHE_MEGABYTES = 256
"""GDAL's cache for an image's blocks, in MB: enough for two rows of tiles of an image that is stored by rows."""

BLOCK = 512
"""Side of the label raster's blocks, in pixels."""

SAMPLE_SIDE = 1024
"""Percentiles are computed on the image reduced to so many pixels a side."""

WIDE_GAP = 0.9
"""Share of the range from black to white: two groups of values so far apart leave each a tenth of the contrast."""

LEAST_LEVELS = 16
"""Brightness levels of 256: an image with fewer has hardly any contrast."""

LEAST_MARGIN = 0.05
"""Share of pixels of exactly black or white, from which they may be a margin without data."""

POLYGONS_AT_ONCE = 2000
"""Number of polygons that are transformed and written together."""


@contextmanager
def gdal() -> Iterator[None]:
    """Limit GDAL's cache and silence its warnings about images without coordinates; all raster work runs inside.

    Raises UserError if rasterio is not installed.
    """
    try:
        import pyproj  # noqa: F401
        import rasterio
        import shapely  # noqa: F401
        from rasterio.errors import NotGeoreferencedWarning
    except ImportError as error:
        raise UserError(f"rasters need {error.name}: {install('geo')}") from None
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MEGABYTES), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


class GeoRaster:
    """An image file as a `tiles.Raster`: three of its bands as 8-bit RGB, read by window. Use within `gdal()`.

    Bands are the red, green and blue ones if the file describes or names them, else the first three, or the first for
    all three colours. Other than 8-bit values are stretched between percentiles of each band.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        bands: Sequence[int] | None = None,
        stretch: tuple[float, float] | None = None,
        nodata: float | str | None = None,
    ) -> None:
        """Open `path`.

        Args:
            path: a GeoTIFF, PNG, JPEG or JPEG 2000 file.
            bands: one or three bands to see as red, green and blue, counted from 1.
            stretch: percentiles that become black and white; None leaves 8-bit values alone and is 2, 98 for others.
            nodata: the value of pixels without data, in all the bands; "none" if all have data, whatever the file
                says; None for what the file says.

        Raises:
            ValueError: one line; the file cannot be read so.
        """
        import rasterio

        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: {'not a file' if self.path.exists() else 'does not exist'}")
        self.stat = self.path.stat()
        """State of the file before it was opened, so that the next run notices a replacement."""
        try:
            self._file = rasterio.open(self.path.absolute(), driver=_format(self.path))
        except (rasterio.errors.RasterioIOError, OSError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise UserError(f"{self.path}: can't be read ({reason})") from None
        self.size = (self._file.height, self._file.width)
        self.notes: list[str] = []
        """Messages for the user about how the image is read; each one line."""
        self.bands = self._chosen(bands)
        self.nodata = nodata
        self._has_place = self._look_at_place()
        self._empty = self._empty_values(nodata)
        self._alpha, self._has_mask = self._mask()
        self._colours = self._palette()
        self._white = self._grey_levels()
        self._ranges = self._stretched(stretch)
        self.stretch = None if self._ranges is None else [limit.tolist() for limit in self._ranges]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def crs(self) -> "CRS | None":
        """The coordinate reference system; None without one, or without a place in it."""
        return self._file.crs if self._has_place else None

    @property
    def transform(self) -> "Affine":
        """Transform from (column, row) to coordinates of `crs`."""
        return self._file.transform

    def read(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Read a window: pixels, uint8 RGB [height, width, 3], and which have data, bool [height, width]; None if all.

        Raises ValueError, one line, where the file is damaged.
        """
        from rasterio.windows import Window

        values, valid = self._read(Window(left, top, width, height))
        return self._to_rgb(values), valid

    def reduced(self, longest_side: int) -> np.ndarray:
        """Read the whole image, uint8 RGB, reduced by skipping pixels: no side is longer than `longest_side`."""
        return self._to_rgb(self._sampled(longest_side)[0])

    def _look_at_place(self) -> bool:
        """Return whether the image has a place in its coordinate system; add notes about what is not used."""
        unplaced = "polygons and labels get columns and rows"
        is_placed = not self._file.transform.is_identity
        if not is_placed and (self._file.gcps[0] or self._file.rpcs):
            points = "ground control points" if self._file.gcps[0] else "rational polynomials"
            self.notes.append(f"{self.path}: is placed by {points} alone, so {unplaced}; gdalwarp makes a placed image")
        elif not is_placed and self._file.crs is not None:
            self.notes.append(f"{self.path}: names a coordinate system, but no place in it, so {unplaced}")
        elif self._file.crs is not None and self._file.crs.is_geographic:
            rows, columns = self.size
            longitude, latitude = self._file.xy(rows / 2, columns / 2)
            if abs(latitude) > 90 or abs(longitude) > 540:
                is_placed = False
                self.notes.append(
                    f"{self.path}: lies at longitude {longitude:g}, latitude {latitude:g}, which is nowhere (another "
                    "coordinate system is meant, or the axes are swapped), so areas are not known"
                )
        if (turned := self._file.tags().get("EXIF_Orientation", "1")) not in ("0", "1"):
            self.notes.append(
                f"{self.path}: viewers turn it (EXIF orientation {turned}); it is labelled as it is stored. "
                "`opensan segment` labels it turned"
            )
        if pages := len(self._file.subdatasets):
            self.notes.append(f"{self.path}: holds {pages} images; the first is labelled")
        return is_placed

    def _read(self, window: "Window | None" = None, shape: tuple[int, int] | None = None) -> tuple[np.ndarray, Any]:
        """Read a window's values as stored, [C, H, W], and which pixels have data, bool [H, W]; None if all do.

        With `shape` (H, W) it is every so-many-th pixel.
        """
        import rasterio

        try:
            values = self._file.read(list(self.bands), window=window, out_shape=shape and (len(self.bands), *shape))
            valid = self._valid(values, window, shape)
        except rasterio.errors.RasterioIOError as error:
            raise UserError(f"{self.path}: damaged ({' '.join(str(error.__cause__ or error).split())})") from None
        if values.dtype.kind == "f":
            finite = np.isfinite(values).all(axis=0)
            valid = finite if valid is None else valid & finite
        return values, valid

    def _valid(self, values: np.ndarray, window: "Window | None", shape: tuple[int, int] | None) -> np.ndarray | None:
        """Return which of a window's pixels have data, by the file or the user; None if all have."""
        if self._alpha is not None:
            return self._file.read(self._alpha, window=window, out_shape=shape) > 0
        if self._has_mask:
            masks = self._file.read_masks(list(self.bands), window=window, out_shape=values.shape)
            return (masks > 0).any(axis=0)
        if any(value is not None for value in self._empty):
            if None in self._empty:  # a pixel has data if any of its bands has
                return None
            return np.any([band != value for band, value in zip(values, self._empty, strict=True)], axis=0)
        return None

    def _empty_values(self, nodata: float | str | None) -> list[Any]:
        """Return the value of each band that means "no data", as the band stores it; None for a band without."""
        if nodata == "none":
            return [None] * len(self.bands)
        given = self._file.nodatavals if nodata is None else [nodata] * self._file.count
        values = []
        for band in self.bands:
            dtype, value = np.dtype(self._file.dtypes[band - 1]), given[band - 1]
            if value is not None and dtype.kind in "iu":
                limits, number = np.iinfo(dtype), float(value)
                value = int(number) if limits.min <= number <= limits.max and number.is_integer() else None
            values.append(None if value is None else np.array(value).astype(dtype)[()])
        if nodata is not None and all(value is None for value in values):
            raise UserError(f"{self.path}: no band can hold the value {nodata:g}, which --nodata gives")
        return values

    def _mask(self) -> tuple[int | None, bool]:
        """Find the band of transparency, and whether the file has a mask beside its bands.

        Transparency is what the file calls so, unless that band was chosen as a colour.
        """
        from rasterio.enums import ColorInterp, MaskFlags
        from rasterio.windows import Window

        if self.nodata is not None:
            return None, False
        alpha = [number for number, kind in enumerate(self._file.colorinterp, 1) if kind == ColorInterp.alpha]
        if not alpha:
            masks = [self._file.mask_flag_enums[band - 1] for band in self.bands]
            return None, any(MaskFlags.per_dataset in flags for flags in masks)
        if alpha[0] in self.bands:
            return None, False
        (height, width), side = self.size, BLOCK
        middle = Window(max(0, (width - side) // 2), max(0, (height - side) // 2), min(side, width), min(side, height))
        values = np.unique(self._file.read(alpha[0], window=middle))
        if not set(values.tolist()) <= {0, np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1}:
            self.notes.append(
                f"{self.path}: band {alpha[0]} is taken for transparency, as the file calls it (alpha): pixels with 0 "
                "in it get no label. If it is a colour, as near infrared, --nodata none takes all pixels"
            )
        return alpha[0], False

    def _sampled(self, longest_side: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Read the whole image, reduced to `longest_side`, as `_read` does.

        From the file's overviews if it has some. Otherwise GDAL would decode each block again for every row that is
        taken from it, and keep what it decoded: 150 s and 2.3 GiB for 20,000 x 20,000 pixels stored as JPEG.
        """
        from rasterio.windows import Window

        shape = reduced_size(self.size, longest_side)
        if self._file.overviews(self.bands[0]):
            return self._read(shape=shape)
        (height, width), block = self.size, self._file.block_shapes[self.bands[0] - 1][0]
        at_once = block * max(1, BLOCK // block)
        rows, columns = (
            ((np.arange(some) + 0.5) * all / some).astype(int) for some, all in zip(shape, self.size, strict=True)
        )
        values: list[np.ndarray] = []
        valid: list[np.ndarray] = []  # empty where nothing tells
        for top in range(0, height, at_once):
            wanted = rows[(rows >= top) & (rows < top + at_once)] - top
            if len(wanted):
                band, has_data = self._read(Window(0, top, width, min(at_once, height - top)))
                values.append(band[:, wanted][:, :, columns])
                if has_data is not None:
                    valid.append(has_data[wanted][:, columns])
        return np.concatenate(values, axis=1), np.concatenate(valid) if valid else None

    def _to_rgb(self, values: np.ndarray) -> np.ndarray:
        """Convert bands [C, H, W] to uint8 RGB [H, W, 3]."""
        if self._colours is not None:
            return self._colours[values[0]]
        if self._white is not None:
            values = self._white[values]
        if self._ranges is not None:
            low, high = (limit[:, None, None] for limit in self._ranges)
            values = np.nan_to_num((values.astype(np.float32) - low) * (255 / (high - low)))
            values = values.clip(0, 255).round().astype(np.uint8)
        values = values if len(values) == 3 else np.repeat(values[:1], 3, axis=0)
        return np.ascontiguousarray(values.transpose(1, 2, 0))

    def _chosen(self, bands: Sequence[int] | None) -> tuple[int, ...]:
        from rasterio.enums import ColorInterp

        count = self._file.count
        if bands is not None:
            if len(bands) not in (1, 3) or not all(1 <= band <= count for band in bands):
                listed = ",".join(map(str, bands))
                raise UserError(f"{self.path}: bands {listed}: choose one or three, of 1 to {count}")
            return tuple(bands)
        described = [(text or "").strip().lower() for text in self._file.descriptions]
        if all(described.count(colour) == 1 for colour in ("red", "green", "blue")):
            colour_bands = tuple(described.index(colour) + 1 for colour in ("red", "green", "blue"))
            if colour_bands != (1, 2, 3):
                self.notes.append(
                    f"{self.path}: bands {','.join(map(str, colour_bands))} are seen as red, green and blue, as they "
                    "are described; --bands chooses others"
                )
            return colour_bands
        named = self._file.colorinterp
        colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
        if all(colour in named for colour in colours):
            return tuple(named.index(colour) + 1 for colour in colours)
        return (1, 2, 3) if count >= 3 else (1,)

    def _palette(self) -> np.ndarray | None:
        """Return the palette, [256, 3] uint8; None for images without one."""
        from rasterio.enums import ColorInterp

        band = self.bands[0]
        if len(self.bands) > 1 or self._file.colorinterp[band - 1] != ColorInterp.palette:
            return None
        if self._file.dtypes[band - 1] != "uint8":
            raise UserError(f"{self.path}: a palette of more than 256 colours is not supported")
        colours = self._file.colormap(band)
        return np.array([colours.get(value, (0, 0, 0))[:3] for value in range(256)], dtype=np.uint8)

    def _grey_levels(self) -> np.ndarray | None:
        """Return brightness by value, [256] uint8, of images with fewer than 8 bits or 0 as white; None for others.

        By the rule of `images.pixels`, which reads whole files by Pillow; GDAL reads windows of files of any size, and
        gives values as they are stored.
        """
        band = self.bands[0]
        if self._colours is not None or {self._file.dtypes[each - 1] for each in self.bands} != {"uint8"}:
            return None
        bits = int(self._file.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", 8))
        inverted = self._file.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
        if bits >= 8 and not inverted:
            return None
        highest = 2 ** min(bits, 8) - 1
        levels = stretched(np.arange(256).clip(0, highest), min(bits, 8))
        return 255 - levels if inverted else levels

    def contrast_note(self, sample: np.ndarray) -> str | None:
        """Return a warning about 8-bit RGB of nearly one brightness, or with a margin of exactly black or white.

        None if there is no reason for one, also if values are stretched.
        """
        if self._ranges is not None or self._colours is not None:
            return None
        has_mask = self._alpha is not None or self._has_mask or any(value is not None for value in self._empty)
        for value in (0, 255) if not has_mask else ():
            same = (sample == value).all(axis=-1)
            if same[[0, 0, -1, -1], [0, -1, 0, -1]].any() and same.mean() > LEAST_MARGIN:
                return (
                    f"{self.path}: {same.mean():.0%} of the pixels, also in a corner, are {value} in all bands; "
                    f"if they have no data, say so: --nodata {value}"
                )
        low, high = np.percentile(sample, (1, 99))
        if high - low >= LEAST_LEVELS:
            return None
        return (
            f"{self.path}: hardly any contrast: nearly all values are from {low:.0f} to {high:.0f} of 255; "
            "--stretch 2,98 spreads them"
        )

    def _stretched(self, percentiles: tuple[float, float] | None) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the values [C] that become 0, and 255; None if values are not stretched."""
        dtypes = {self._file.dtypes[band - 1] for band in self.bands}
        if any(dtype.startswith("complex") for dtype in dtypes):
            raise UserError(f"{self.path}: complex numbers are not an image")
        if self._colours is not None or (percentiles is None and dtypes == {"uint8"}):
            return None
        sample, valid = self._sampled(SAMPLE_SIDE)
        values = [band if valid is None else band[valid] for band in sample]
        values = [  # band by band, as pixels may lack data in one band only
            band[np.isfinite(band) & (True if none is None else band != none)]
            for band, none in zip(values, self._empty, strict=True)
        ]
        if not all(map(len, values)):
            raise UserError(f"{self.path}: a band has no data")
        limits = np.array([np.percentile(band, percentiles or (2, 98)) for band in values], dtype=np.float32)
        low, high = limits.T
        self._look_for_clumps(values, limits)
        return low, np.maximum(high, low + 1e-6 * np.maximum(1, np.abs(low)))  # a band of one value: no division by 0

    def _look_for_clumps(self, values: list[np.ndarray], limits: np.ndarray) -> None:
        """Add a note if all bands' values form two distant groups: one may mean "no data", and reduces the contrast."""
        alone = []
        for band_values, (low, high) in zip(values, limits.astype(np.float64), strict=True):
            inside = np.unique(band_values.astype(np.float64).clip(low, high))
            gaps = np.diff(inside)
            if len(inside) < 3 or gaps.max() < WIDE_GAP * (high - low):
                return
            widest = int(gaps.argmax())
            lower = inside[widest] - low < high - inside[widest + 1]  # the narrower group
            alone.append(band_values.min() if lower else band_values.max())
        self.notes.append(
            f"{self.path}: hardly any contrast: there are values near {alone[0]:g}, and all others far from it, which "
            f"the stretch turns into one brightness. If it means no data, say so: --nodata {alone[0]:g}"
        )


def _format(path: Path) -> str:
    """Return GDAL's name of a file's format. Raises UserError for other formats, OSError if it can't be read."""
    with path.open("rb") as file:
        beginning = file.read(12)
    for known, name in BEGINNINGS.items():
        if beginning.startswith(known):
            return name
    raise UserError(f"{path}: not a GeoTIFF, PNG, JPEG or JPEG 2000 image")


def reduced_size(size: tuple[int, int], longest_side: int) -> tuple[int, int]:
    """Reduce `size` (H, W) so that no side is longer than `longest_side`, and none less than 1."""
    scale = min(1, longest_side / max(size))
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def write_labels(
    path: str | os.PathLike,
    strips: StripFile,
    raster: GeoRaster,
    names: Sequence[str],
    advance: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """Write finished strips as a GeoTIFF with the raster's coordinates, all or nothing; count pixels on the way.

    One band, compressed, in blocks, with overviews; each word's colour is in the palette (up to 255 words), and the
    words are in the tag WORDS, a JSON list. Unlabelled is "no data", the highest value.

    Returns:
        [K] int64: pixels of each word.
    """
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.windows import Window

    (height, width), dtype = raster.size, label_dtype(len(names))
    pixels = np.zeros(np.iinfo(dtype).max + 1, dtype=np.int64)
    profile = {
        "driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": dtype,
        "nodata": np.iinfo(dtype).max, "crs": raster.crs, "transform": raster.transform,
        "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "bigtiff": "if_safer",
    }  # fmt: skip
    with atomic_path(path) as temporary:
        with rasterio.open(temporary, "w", **profile) as file:
            if dtype == "uint8":
                file.write_colormap(1, dict(enumerate([*map(tuple, palette(255).tolist()), UNLABELLED_COLOUR])))
            file.update_tags(WORDS=json.dumps(list(names), ensure_ascii=False))
            for top in range(0, height, BLOCK):
                rows = strips.rows(top, min(height, top + BLOCK))
                pixels += np.bincount(rows.ravel(), minlength=len(pixels))
                file.write(rows, 1, window=Window(0, top, width, len(rows)))
                advance(len(rows))
        levels = [2**level for level in range(1, max(1, math.ceil(math.log2(max(height, width) / BLOCK))) + 1)]
        if max(height, width) > BLOCK:
            with rasterio.open(temporary, "r+") as file:
                file.build_overviews(levels, Resampling.nearest)
    return pixels[: len(names)]


def reduced_labels(path: str | os.PathLike, longest_side: int) -> np.ndarray:
    """Read a label raster, [H, W] int32 with -1 for unlabelled, reduced by skipping pixels."""
    import rasterio

    with rasterio.open(path) as file:
        shape = reduced_size((file.height, file.width), longest_side)
        labels = file.read(1, out_shape=shape).astype(np.int32)
        return np.where(labels == file.nodata, np.int32(-1), labels)


def word_square_metres(labels: str | os.PathLike, count: int) -> np.ndarray | None:
    """Measure each word of a label raster on the ground, [count] float64; None where areas are not known."""
    import rasterio

    totals = np.zeros(count + 1)
    with rasterio.open(labels) as file:
        ground = Ground(file.crs, file.transform, (file.height, file.width))
        if not ground.has_areas:
            return None
        edges, areas = ground.pixel_areas()
        for top, bottom, pixel in zip(edges[:-1], edges[1:], areas, strict=True):
            rows = _label_rows(file, int(top), int(bottom))
            weights = np.broadcast_to(pixel, rows.shape)
            totals += np.bincount(rows.ravel() + 1, weights=weights.ravel(), minlength=count + 1)
    return totals[1:]


def write_polygons(
    path: str | os.PathLike, labels: str | os.PathLike, names: Sequence[str], *, min_pixels: int = 1
) -> tuple[int, int]:
    """Write a label raster's regions as GeoJSON (RFC 7946), all or nothing.

    A feature is a region of one word whose pixels touch along edges: its polygon follows the pixels' edges, with holes;
    properties are word, index, pixels and, where areas are known, square_metres on the ground. Regions of fewer than
    `min_pixels` pixels are left out. Coordinates are longitude and latitude, cut at the antimeridian. Where the image
    has no way to these, they are its own, and the file says so in a member `coordinate_system`. A region of which a
    part lies nowhere on the earth has no geometry.

    GDAL outlines the regions from one row to the next; memory grows with their corners, not with the raster.

    Returns:
        How many features there are, and how many of them have no geometry.
    """
    import rasterio

    written = nowhere = 0
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8") as out,
        rasterio.open(labels) as file,
    ):
        ground = Ground(file.crs, file.transform, (file.height, file.width))
        large = (region for region in _regions(file) if region.pixels >= min_pixels)
        system = "" if ground.on_earth else f' "coordinate_system": {_json(ground.coordinates)},'
        out.write(f'{{"type": "FeatureCollection",{system} "features": [')
        while some := list(islice(large, POLYGONS_AT_ONCE)):
            for region, geometry in zip(some, ground.geometries(some), strict=True):
                properties = {"word": names[region.label], "index": region.label, "pixels": region.pixels}
                if ground.has_areas:
                    properties["square_metres"] = round(ground.square_metres(region), 3)
                feature = {"type": "Feature", "properties": properties, "geometry": geometry}
                out.write((",\n" if written else "\n") + _json(feature))
                written += 1
                nowhere += geometry is None
        out.write("\n]}\n")
    return written, nowhere


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _regions(file: "DatasetReader") -> Iterator[Region]:
    """Yield the regions of a label raster in the order in which they end, from the top."""
    import rasterio
    from rasterio.features import shapes

    to_pixels = np.array(~file.transform).reshape(3, 3)[:2]  # GDAL answers in the raster's own coordinates
    for outlined, label in shapes(rasterio.band(file, 1), connectivity=4):
        if label != file.nodata:
            rings = [
                np.rint(np.array(ring[:-1]) @ to_pixels[:, :2].T + to_pixels[:, 2]).astype(np.int64)
                for ring in outlined["coordinates"]
            ]
            outer = [(signed_area(ring) > 0) == (number == 0) for number, ring in enumerate(rings)]
            yield region(int(label), [ring if right else ring[::-1] for ring, right in zip(rings, outer, strict=True)])


def _label_rows(file: "DatasetReader", top: int, bottom: int) -> np.ndarray:
    from rasterio.windows import Window

    labels = file.read(1, window=Window(0, top, file.width, bottom - top)).astype(np.int32)
    return np.where(labels == file.nodata, np.int32(-1), labels)
