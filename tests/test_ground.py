"""Where rasters lie on the earth: true areas, and polygons across the antimeridian and around poles."""

import json

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio", reason="rasterio (the extra geo) is not installed")
pyproj = pytest.importorskip("pyproj", reason="pyproj (the extra geo) is not installed")

from affine import Affine  # noqa: E402
from scipy import ndimage  # noqa: E402
from shapely.geometry import shape  # noqa: E402

from opensan.jobs import geotiff  # noqa: E402
from opensan.jobs.ground import Ground  # noqa: E402
from opensan.outputs.polygons import regions  # noqa: E402

SITE = 'LOCAL_CS["Site grid",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'
MARS = (
    'GEOGCS["Mars 2000",DATUM["D_Mars_2000",SPHEROID["Mars_2000",3396190,169.8944472]],'
    'PRIMEM["Reference_Meridian",0],UNIT["Degree",0.0174532925199433]]'
)


def system(text: str):
    return rasterio.CRS.from_user_input(text)


def blobs(shape, words=3):
    noise = np.random.default_rng(3).normal(size=(words, *shape))
    return ndimage.gaussian_filter(noise, (0, 3, 3)).argmax(axis=0)


def geodesic_area(geometry) -> float:
    """By another way than ours: Karney's, along geodesics between points that stand close together."""
    return abs(pyproj.Geod(ellps="WGS84").geometry_area_perimeter(shape(geometry).segmentize(0.05))[0])


PLACES = {
    "web mercator at 60 north": ("EPSG:3857", Affine(6, 0, 2_780_000, 0, -6, 8_440_000), (96, 128)),
    "degrees": ("EPSG:4326", Affine(0.01, 0, 9, 0, -0.01, 61), (96, 128)),
    "the world": ("EPSG:4326", Affine(3, 0, -180, 0, -3, 90), (60, 120)),
    "from 0 to 360": ("EPSG:4326", Affine(3, 0, 0, 0, -3, 90), (60, 120)),
    "a zone of UTM": ("EPSG:32632", Affine(10, 0, 500_000, 0, -10, 5_300_000), (96, 128)),
    "turned": ("EPSG:32632", Affine(8, 6, 500_000, 6, -8, 5_300_000), (96, 128)),
    "Fiji, across the antimeridian": ("EPSG:3460", Affine(4000, 0, 1_900_000, 0, -4000, 4_100_000), (96, 128)),
    "beyond 180 degrees": ("EPSG:4326", Affine(0.1, 0, 175, 0, -0.1, -10), (96, 128)),
    "the south pole": ("EPSG:3031", Affine(50_000, 0, -3_000_000, 0, -50_000, 3_000_000), (120, 120)),
    "the north pole, turned round": ("EPSG:3413", Affine(50_000, 0, -2_990_000, 0, 50_000, -2_970_000), (120, 119)),
}


@pytest.mark.parametrize("place", PLACES)
def test_polygons_are_valid_and_areas_true(place):
    crs, transform, size = PLACES[place]
    ground = Ground(system(crs), transform, size)
    labels = blobs(size)
    if "pole" in place:
        labels[40:80, 40:80] = 0  # one region encloses the pole ...
        labels[58:62, 58:62] = 1  # ... and has a hole there
    found = list(regions(labels))
    geometries = ground.geometries(found)
    for region, geometry in zip(found, geometries, strict=True):
        polygon = shape(geometry)
        assert polygon.is_valid and polygon.geom_type in ("Polygon", "MultiPolygon")
        west, south, east, north = polygon.bounds
        assert -180 <= west <= east <= 180 and -90 <= south <= north <= 90
        # Beside a pole, a pixel's side of 50 km is far from straight in degrees.
        off = 0.05 if "pole" in place else 0.006
        assert ground.square_metres(region) == pytest.approx(geodesic_area(geometry), rel=off)
        for part in getattr(polygon, "geoms", [polygon]):
            assert part.exterior.is_ccw and not any(ring.is_ccw for ring in part.interiors)
    edges, areas = ground.pixel_areas()
    total = (np.diff(edges)[:, None] * areas).sum()
    assert sum(map(ground.square_metres, found)) == pytest.approx(total, rel=1e-9)


def test_the_world_has_the_area_of_the_earth():
    ground = Ground(system("EPSG:4326"), Affine(0.5, 0, -180, 0, -0.5, 90), (360, 720))
    edges, areas = ground.pixel_areas()
    assert (np.diff(edges)[:, None] * areas).sum() == pytest.approx(5.100656e14, rel=2e-4)


def test_a_region_across_the_antimeridian_is_cut():
    ground = Ground(system("EPSG:4326"), Affine(0.1, 0, 175, 0, -0.1, -10), (96, 128))
    (geometry,) = ground.geometries(list(regions(np.zeros((96, 128), dtype=int))))
    assert geometry["type"] == "MultiPolygon"
    bounds = sorted(part.bounds for part in shape(geometry).geoms)
    assert np.allclose(bounds, [(-180, -19.6, -172.2, -10), (175, -19.6, 180, -10)])


def test_a_pole_lies_in_the_polygon_around_it():
    ground = Ground(system("EPSG:3031"), Affine(50_000, 0, -3_000_000, 0, -50_000, 3_000_000), (120, 120))
    labels = np.full((120, 120), -1)
    labels[40:80, 40:80] = 0
    (geometry,) = ground.geometries(list(regions(labels)))
    west, south, east, north = shape(geometry).bounds
    assert (west, south, east) == (-180, -90, 180) and -82 < north < -75
    assert geodesic_area(geometry) == pytest.approx(ground.square_metres(next(iter(regions(labels)))), rel=1e-3)


def test_straight_lines_of_the_image_stay_where_they_are():
    """A side of 1,000 km along a parallel of a conic projection is a curve in degrees."""
    crs, transform = system("EPSG:3035"), Affine(10_000, 0, 3_500_000, 0, -10_000, 4_500_000)
    ground = Ground(crs, transform, (100, 100))
    (geometry,) = ground.geometries(list(regions(np.zeros((100, 100), dtype=int))))
    ring = np.array(geometry["coordinates"][0])
    assert len(ring) > 9
    back = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:3035", always_xy=True)
    middles = (ring[1:] + ring[:-1]) / 2
    columns, rows = ~transform @ np.array(back.transform(*middles.T))
    assert np.minimum(np.abs(columns - columns.round(-2)), np.abs(rows - rows.round(-2))).max() < 0.11


@pytest.mark.parametrize("crs", [SITE, MARS], ids=["site", "Mars"])
def test_systems_without_a_way_to_the_earth_keep_their_own(crs):
    ground = Ground(system(crs), Affine(0.5, 0, 100, 0, -0.5, 50), (40, 60))
    assert not ground.on_earth and ground.coordinates.startswith(("ENGCRS", "GEOGCRS"))
    found = list(regions(np.zeros((40, 60), dtype=int)))
    assert shape(ground.geometries(found)[0]).bounds == (100, 30, 130, 50)
    assert ground.has_areas == (crs is SITE)  # a site's plane lies on the ground
    if crs is SITE:
        assert ground.square_metres(found[0]) == pytest.approx(40 * 60 * 0.25)


def test_without_a_system():
    plain = Ground(None, Affine.identity(), (4, 5))
    assert plain.coordinates == "columns and rows of the image" and not plain.has_areas
    world_file = Ground(None, Affine(2, 0, 100, 0, -2, 50), (4, 5))
    assert "world file" in world_file.coordinates
    found = list(regions(np.zeros((4, 5), dtype=int)))
    assert shape(world_file.geometries(found)[0]).bounds == (100, 42, 110, 50)


def test_what_lies_beyond_the_earths_edge_has_no_polygon(tmp_path):
    """A weather satellite's whole disk: the corners of the image show space."""
    crs = system("+proj=geos +h=35785831 +lon_0=0 +sweep=y")
    labels = np.zeros((60, 60), dtype=np.uint8)
    labels[20:40, 20:40] = 1
    profile = {"driver": "GTiff", "height": 60, "width": 60, "count": 1, "dtype": "uint8", "nodata": 255, "crs": crs}
    with rasterio.open(tmp_path / "x.tif", "w", **profile, transform=Affine(2e5, 0, -6e6, 0, -2e5, 6e6)) as file:
        file.write(labels, 1)
    assert geotiff.write_polygons(tmp_path / "x.geojson", tmp_path / "x.tif", ["space and edge", "disk"]) == (2, 1)
    features = json.loads((tmp_path / "x.geojson").read_text())["features"]
    geometries = {feature["properties"]["word"]: feature["geometry"] for feature in features}
    assert geometries["space and edge"] is None and shape(geometries["disk"]).is_valid
    metres = geotiff.word_square_metres(tmp_path / "x.tif", 2)
    assert metres[0] > 4.9e13 and 1.4e13 < metres[1] < 2.5e13 and np.isfinite(metres).all()
