"""Rasters in and out: what is read, what is refused, and that results lie where the image lies."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

rasterio = pytest.importorskip("rasterio", reason="rasterio (the extra geo) is not installed")

from rasterio.control import GroundControlPoint  # noqa: E402
from rasterio.enums import ColorInterp  # noqa: E402
from rasterio.transform import from_origin  # noqa: E402

from opensan.cli import main  # noqa: E402
from opensan.images import open_image  # noqa: E402
from opensan.jobs import geotiff  # noqa: E402
from opensan.jobs.ground import Ground  # noqa: E402
from opensan.jobs.strips import StripFile  # noqa: E402
from opensan.lab.scenes import make_scene  # noqa: E402
from opensan.outputs.polygons import regions, signed_area  # noqa: E402

PLACE = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_300_000, 2, 2)}
"""On the central meridian of UTM zone 32: 9 degrees east."""


@pytest.fixture(autouse=True)
def _gdal():
    with geotiff.gdal():
        yield


def write(path, bands, **profile):
    """bands [C, H, W] as a GeoTIFF."""
    count, height, width = bands.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": bands.dtype, **profile}
    with rasterio.open(path, "w", **profile) as file:
        file.write(bands)
    return path


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------ reading


def test_8_bit_colours_are_read_as_they_are(tmp_path):
    bands = noise(3, 40, 50)
    raster = geotiff.GeoRaster(write(tmp_path / "x.tif", bands, **PLACE))
    assert raster.size == (40, 50)
    pixels, valid = raster.read(10, 5, 20, 30)
    np.testing.assert_array_equal(pixels, bands[:, 10:30, 5:35].transpose(1, 2, 0))
    assert valid is None


def test_bands_that_are_described_as_colours(tmp_path):
    bands = noise(4, 20, 20)
    path = write(tmp_path / "x.tif", bands, photometric="minisblack")
    with rasterio.open(path, "r+") as file:
        file.descriptions = ("Blue", "green", "RED", "nir")
    raster = geotiff.GeoRaster(path)
    assert raster.bands == (3, 2, 1) and "bands 3,2,1 are seen as red, green and blue" in raster.notes[0]
    assert geotiff.GeoRaster(path, bands=(1, 2, 3)).notes == []


@pytest.mark.parametrize(
    "form", ["1.png", "2.png", "4.png", "palette.png", "1.tif", "2.tif", "4.tif", "8.tif", "white.tif"]
)
def test_pixels_mean_what_they_mean_in_other_images(tmp_path, form):
    """Rasters are read by GDAL, other images by Pillow: both by the same rule."""
    path, kind = tmp_path / form, form.partition(".")[0]
    bits = int(kind) if kind.isdigit() else {"palette": 4, "white": 2}[kind]
    values = noise(20, 24) >> (8 - bits)
    if form.endswith("png"):
        image = Image.fromarray(values, "P")
        grey = [255 * level // (2**bits - 1) for level in range(2**bits)]
        image.putpalette([255 - one if kind == "palette" and band == 1 else one for one in grey for band in range(3)])
        image.save(path, bits=bits)
    else:
        white = {"photometric": "miniswhite"} if kind == "white" else {"photometric": "minisblack"}
        write(path, values[None], nbits=bits, **white)
    raster = geotiff.GeoRaster(path)
    np.testing.assert_array_equal(raster.read(0, 0, 20, 24)[0], open_image(path))


@pytest.mark.parametrize(
    ("profile", "note"),
    [
        ({"crs": "EPSG:32632"}, "names a coordinate system, but no place in it"),
        ({"crs": "EPSG:4326", "transform": from_origin(500_000, 5_600_000, 10, 10)}, "longitude 500125, latitude 5.5"),
        ({"crs": "EPSG:4326", "transform": from_origin(50, 190, 0.1, 0.1)}, "the axes are swapped"),
        ({"points": (0, 0)}, "is placed by ground control points alone"),
    ],
)
def test_an_image_that_is_nowhere_gets_no_areas_and_a_note(tmp_path, profile, note):
    points = profile.pop("points", None)
    path = write(tmp_path / "x.tif", noise(3, 20, 24), **profile)
    if points:
        with rasterio.open(path, "r+") as file:
            corners = [GroundControlPoint(row, column, column, row) for row in (0, 20) for column in (0, 24)]
            file.gcps = corners, rasterio.crs.CRS.from_epsg(32632)
    raster = geotiff.GeoRaster(path)
    assert note in raster.notes[0] and raster.crs is None and not Ground(None, raster.transform, raster.size).has_areas


@pytest.mark.parametrize(
    ("value", "nodata", "told"), [(0, None, True), (255, None, True), (0, 0, False), (7, None, False)]
)
def test_a_margin_of_black_or_white_is_told(tmp_path, value, nodata, told):
    bands = noise(3, 40, 40)
    bands[:, :10] = value
    raster = geotiff.GeoRaster(write(tmp_path / "x.tif", bands, **PLACE), nodata=nodata)
    note = raster.contrast_note(raster.reduced(100))
    assert (f"--nodata {value}" in note) if told else note is None


def test_pages_and_turns_that_are_not_read_are_told(tmp_path):
    pictures = [Image.fromarray(noise(20, 24, 3)) for _ in range(3)]
    pictures[0].save(tmp_path / "x.tif", save_all=True, append_images=pictures[1:])
    assert "holds 3 images; the first is labelled" in geotiff.GeoRaster(tmp_path / "x.tif").notes[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures[0].save(tmp_path / "x.jpg", exif=exif)
    raster = geotiff.GeoRaster(tmp_path / "x.jpg")
    assert raster.size == (20, 24) and "viewers turn it (EXIF orientation 6)" in raster.notes[0]


def test_bands_are_chosen_by_number_or_by_their_colours(tmp_path):
    bands = noise(4, 20, 20)
    path = write(tmp_path / "x.tif", bands)
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    for given, expected in ((None, [2, 1, 0]), ((4, 3, 2), [3, 2, 1]), ((2,), [1, 1, 1])):
        pixels, _ = geotiff.GeoRaster(path, bands=given).read(0, 0, 20, 20)
        np.testing.assert_array_equal(pixels, bands[expected].transpose(1, 2, 0))


def test_16_bits_are_stretched_between_percentiles(tmp_path):
    ramp = np.linspace(1000, 5000, 10_000).astype(np.uint16).reshape(1, 100, 100)
    path = write(tmp_path / "x.tif", ramp)
    pixels, _ = geotiff.GeoRaster(path).read(0, 0, 100, 100)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.mean(pixels == 0) == pytest.approx(0.02, abs=0.003)
    middle = geotiff.GeoRaster(path, stretch=(0, 100)).read(50, 0, 1, 1)[0]
    assert abs(int(middle[0, 0, 0]) - 127) <= 1


def test_nodata_alpha_and_nan_have_no_data(tmp_path):
    bands = noise(3, 20, 20).clip(1)
    bands[:, :, :7] = 0
    transparent = np.concatenate([bands, (bands[:1] > 0) * np.uint8(255)])
    floats = np.where(bands == 0, np.nan, bands).astype(np.float32)
    paths = [
        write(tmp_path / "nodata.tif", bands, nodata=0),
        write(tmp_path / "alpha.tif", transparent, photometric="RGB", alpha="YES"),
        write(tmp_path / "nan.tif", floats),
    ]
    for path in paths:
        _, valid = geotiff.GeoRaster(path).read(0, 0, 20, 20)
        np.testing.assert_array_equal(valid, bands[0] > 0)


def near_infrared(tmp_path):
    """Red, green, blue and near infrared with GDAL's defaults, which call the fourth band alpha; 0 on water."""
    bands = noise(4, 40, 50).clip(1)
    bands[3, :20] = 0
    return write(tmp_path / "rgbn.tif", bands, **PLACE), bands


def test_a_band_that_was_chosen_as_a_colour_is_no_mask(tmp_path):
    path, bands = near_infrared(tmp_path)
    pixels, valid = geotiff.GeoRaster(path, bands=(4, 3, 2)).read(0, 0, 40, 50)
    assert valid is None
    np.testing.assert_array_equal(pixels, bands[[3, 2, 1]].transpose(1, 2, 0))


def test_a_band_that_may_be_no_alpha_is_told_and_can_be_refused(tmp_path):
    path, bands = near_infrared(tmp_path)
    raster = geotiff.GeoRaster(path)
    np.testing.assert_array_equal(raster.read(0, 0, 40, 50)[1], bands[3] > 0)
    assert "band 4 is taken for transparency" in raster.notes[0] and "--nodata none" in raster.notes[0]
    assert geotiff.GeoRaster(path, nodata="none").read(0, 0, 40, 50)[1] is None
    true_alpha = np.concatenate([bands[:3], (bands[3:] > 0) * np.uint8(255)])
    assert not geotiff.GeoRaster(write(tmp_path / "alpha.tif", true_alpha)).notes


def test_no_data_that_no_tag_declares(tmp_path):
    bands = np.random.default_rng(0).random((3, 60, 80), dtype=np.float32)
    bands[:, :, :18] = -9999
    path = write(tmp_path / "x.tif", bands, **PLACE)
    (told,) = geotiff.GeoRaster(path).notes
    assert "hardly any contrast" in told and told.endswith("--nodata -9999")
    declared = geotiff.GeoRaster(write(tmp_path / "y.tif", bands, nodata=-9999, **PLACE)).read(0, 0, 60, 80)
    given = geotiff.GeoRaster(path, nodata=-9999.0)
    for found, expected in zip(given.read(0, 0, 60, 80), declared, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not given.notes and given.read(0, 0, 60, 80)[1][:, 18:].all()
    with pytest.raises(ValueError, match="no band can hold the value -9999"):
        geotiff.GeoRaster(write(tmp_path / "z.tif", noise(3, 8, 8)), nodata=-9999.0)


def test_a_dark_image_is_told(tmp_path):
    raster = geotiff.GeoRaster(write(tmp_path / "x.tif", noise(3, 40, 50) // 32))
    assert "hardly any contrast: nearly all values are from 0 to 7" in raster.contrast_note(raster.reduced(100))
    bright = geotiff.GeoRaster(write(tmp_path / "y.tif", noise(3, 40, 50)))
    assert bright.contrast_note(bright.reduced(100)) is None


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_reach_from_black_to_white(tmp_path, bits):
    highest = 2**bits - 1
    path = write(tmp_path / "x.tif", (noise(1, 30, 40) % (highest + 1)), nbits=bits)
    with rasterio.open(path) as file:
        stored = file.read(1).astype(int)
    np.testing.assert_array_equal(geotiff.GeoRaster(path).read(0, 0, 30, 40)[0][..., 0], stored * 255 // highest)


def test_where_0_is_white(tmp_path):
    grey = noise(1, 30, 40)
    path = write(tmp_path / "x.tif", grey, photometric="MINISWHITE")
    np.testing.assert_array_equal(geotiff.GeoRaster(path).read(0, 0, 30, 40)[0][..., 0], 255 - grey[0])


def test_palettes_become_colours(tmp_path):
    picture = Image.fromarray(noise(30, 30) % 4).convert("P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    picture.save(tmp_path / "x.png")
    pixels, _ = geotiff.GeoRaster(tmp_path / "x.png").read(0, 0, 30, 30)
    np.testing.assert_array_equal(pixels, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("bands", [(1, 2), (0,), (4,), (1, 2, 4), ()])
def test_bands_that_are_not_there_are_refused(tmp_path, bands):
    path = write(tmp_path / "x.tif", noise(3, 8, 8))
    with pytest.raises(ValueError, match="choose one or three, of 1 to 3"):
        geotiff.GeoRaster(path, bands=bands)


def test_what_is_no_raster_is_refused_in_a_line(tmp_path):
    write(tmp_path / "whole.tif", noise(3, 300, 300))
    (tmp_path / "cut.tif").write_bytes((tmp_path / "whole.tif").read_bytes()[:50])
    (tmp_path / "empty.tif").touch()
    (tmp_path / "text.tif").write_text("not a picture")
    # A virtual raster names the files (or addresses) that its pixels come from.
    virtual = """<VRTDataset rasterXSize="300" rasterYSize="300"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
        <SourceFilename relativeToVRT="1">whole.tif</SourceFilename><SourceBand>1</SourceBand>
        </SimpleSource></VRTRasterBand></VRTDataset>"""
    for name in ("virtual.vrt", "virtual.tif"):
        (tmp_path / name).write_text(virtual)
    names = ["cut.tif", "empty.tif", "text.tif", "virtual.vrt", "virtual.tif", "none.tif", ""]
    for path in [tmp_path / name for name in names] + ["/vsicurl/localhost/x.tif"]:
        with pytest.raises(ValueError) as caught:
            geotiff.GeoRaster(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_damage_found_while_reading_is_told_in_a_line(tmp_path):
    path = write(tmp_path / "x.tif", noise(3, 600, 600), tiled=True, compress="deflate")
    path.write_bytes(path.read_bytes()[:-200_000])
    with pytest.raises(ValueError, match=r"x\.tif: damaged") as caught:
        raster = geotiff.GeoRaster(path)
        raster.read(0, 0, 600, 600)
    assert "\n" not in str(caught.value)


def test_without_rasterio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ValueError, match=r"\.\[geo\]"), geotiff.gdal():
        pass


@pytest.mark.parametrize(("format", "suffix"), [("PNG", "png"), ("JPEG", "jpg")])
def test_photographs_are_read_by_window_too(tmp_path, format, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(noise(60, 70)).save(path, format)
    raster = geotiff.GeoRaster(path)
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    for top in (30, 0):  # downwards and back
        assert np.abs(raster.read(top, 8, 30, 40)[0] - expected[top : top + 30, 8:48]).max() <= 2


# ------------------------------------------------------------------------------------------------------------ writing


def results(tmp_path, labels, names, **place):
    """A label raster written from strips, for a raster of the labels' size."""
    raster = geotiff.GeoRaster(write(tmp_path / "image.tif", noise(3, *labels.shape), **place))
    with StripFile(tmp_path / "part", {"words": len(names)}, [(0, len(labels))], labels.shape[1]) as strips:
        strips.append(labels)
        pixels = geotiff.write_labels(tmp_path / "labels.tif", strips, raster, names)
    return tmp_path / "labels.tif", pixels


@pytest.mark.parametrize("count", [3, 300])
def test_a_label_raster_has_labels_words_and_place(tmp_path, count):
    labels = np.random.default_rng(1).integers(-1, count, (700, 530), dtype=np.int32)
    names = [f"wörd {index}" for index in range(count)]
    path, pixels = results(tmp_path, labels, names, **PLACE)
    with rasterio.open(path) as file:
        found = file.read(1).astype(np.int32)
        np.testing.assert_array_equal(np.where(found == file.nodata, -1, found), labels)
        assert (file.crs, file.transform) == (rasterio.CRS.from_epsg(32632), PLACE["transform"])
        assert json.loads(file.tags()["WORDS"]) == names
        assert file.overviews(1)
    np.testing.assert_array_equal(pixels, np.bincount(labels[labels >= 0], minlength=count))


def test_polygons_are_the_regions_and_lie_where_the_image_lies(tmp_path):
    labels = np.full((60, 80), -1, dtype=np.int32)
    labels[10:40, 20:60] = 0
    labels[20:30, 30:50] = 1  # a hole in the first
    labels[50, 70] = 1
    path, _ = results(tmp_path, labels, ["roof", "pond"], **PLACE)
    assert geotiff.write_polygons(tmp_path / "all.geojson", path, ["roof", "pond"]) == (3, 0)
    assert geotiff.write_polygons(tmp_path / "large.geojson", path, ["roof", "pond"], min_pixels=2) == (2, 0)
    features = json.loads((tmp_path / "large.geojson").read_text())["features"]
    by_word = {feature["properties"]["word"]: feature for feature in features}
    metres = by_word["roof"]["properties"].pop("square_metres")
    assert metres == pytest.approx(4000 / 0.9996**2, rel=1e-4)  # the scale of UTM on its central meridian
    assert by_word["roof"]["properties"] == {"word": "roof", "index": 0, "pixels": 1000}
    assert by_word["pond"]["properties"]["pixels"] == 200
    outer, hole = (np.array(ring) for ring in by_word["roof"]["geometry"]["coordinates"])
    assert signed_area(outer[:-1]) > 0 > signed_area(hole[:-1])
    # The columns 20 and 60 lie 40 and 120 m east of 9 degrees; there a degree is some 74.8 km.
    assert (outer[:, 0].min() - 9) * 74_800 == pytest.approx(40, rel=0.01)
    assert (outer[:, 0].max() - 9) * 74_800 == pytest.approx(120, rel=0.01)
    assert 47 < outer[:, 1].min() < outer[:, 1].max() < 48


@pytest.mark.parametrize("seed", range(3))
def test_polygons_are_those_of_label_maps(tmp_path, seed):
    """GDAL outlines rasters, `opensan.outputs.polygons` what is held in memory: they agree, and are valid."""
    from shapely.geometry import Polygon, shape

    labels = np.random.default_rng(seed).integers(-1, 3, (50, 40)).repeat(2, axis=0).repeat(3, axis=1).astype(np.int32)
    path, _ = results(tmp_path, labels, ["a", "b", "c"])
    geotiff.write_polygons(tmp_path / "x.geojson", path, ["a", "b", "c"])
    features = json.loads((tmp_path / "x.geojson").read_text())["features"]
    of_raster = [(one["properties"]["index"], one["properties"]["pixels"], shape(one["geometry"])) for one in features]
    assert all(polygon.is_valid for *_, polygon in of_raster)
    of_map = [(one.label, one.pixels, Polygon(one.outline, one.holes)) for one in regions(labels)]

    def plain(found):
        return sorted((label, pixels, polygon.normalize().wkt) for label, pixels, polygon in found)

    assert plain(of_raster) == plain(of_map)


@pytest.mark.parametrize("seed", range(10))
def test_polygons_are_valid(tmp_path, seed):
    from shapely.geometry import shape

    labels = np.random.default_rng(seed).integers(-1, 2, (23, 31)).astype(np.int32)
    path, _ = results(tmp_path, labels, ["a", "b"], **PLACE)
    geotiff.write_polygons(tmp_path / "x.geojson", path, ["a", "b"])
    features = json.loads((tmp_path / "x.geojson").read_text())["features"]
    assert all(shape(one["geometry"]).is_valid for one in features)
    assert sum(one["properties"]["pixels"] for one in features) == (labels >= 0).sum()


def test_without_coordinates_polygons_count_pixels(tmp_path):
    labels = np.zeros((6, 5), dtype=np.int32)
    path, _ = results(tmp_path, labels, ["all"])
    geotiff.write_polygons(tmp_path / "x.geojson", path, ["all"])
    (feature,) = json.loads((tmp_path / "x.geojson").read_text())["features"]
    assert feature["properties"] == {"word": "all", "index": 0, "pixels": 30}
    assert sorted(map(tuple, feature["geometry"]["coordinates"][0][:-1])) == [(0, 0), (0, 6), (5, 0), (5, 6)]


@pytest.mark.parametrize("tiled", [True, False])
def test_a_reduced_image_is_every_so_many_th_pixel(tmp_path, tiled):
    bands = noise(3, 700, 300)
    bands[:, 350:] = 0
    layout = {"tiled": True, "blockxsize": 128, "blockysize": 128} if tiled else {}
    raster = geotiff.GeoRaster(write(tmp_path / "x.tif", bands, nodata=0, **layout))
    expected = bands[:, 3::7, 3::7].transpose(1, 2, 0)
    np.testing.assert_array_equal(raster.reduced(100)[:, : expected.shape[1]][:, 10:20], expected[:, 10:20])


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def scene(tmp_path):
    picture = make_scene(3, 1, (400, 500), split="test").image
    return write(tmp_path / "scene.tif", picture.transpose(2, 0, 1), **PLACE)


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["segment-raster", *map(str, arguments)])
    return ended.value.code


def arguments(scene, out):
    return [scene, "--words", "sand,snow,grass,water", "--model", "tiny", "--tile", 200, "--out", out]


def test_the_command_writes_all_its_results_and_nothing_else(tmp_path, scene, capsys):
    out = tmp_path / "out"
    assert not run(*arguments(scene, out))
    styles = {"scene.labels.qml", "scene.labels.tif.aux.xml"}
    files = {"scene.labels.tif", "scene.polygons.geojson", "scene.preview.png", *styles}
    assert {path.name for path in out.iterdir()} == {"manifest.sqlite"} | files
    with rasterio.open(out / "scene.labels.tif") as file:
        assert (file.height, file.width, file.crs.to_epsg()) == (400, 500, 32632)
    assert json.loads((out / "scene.polygons.geojson").read_text())["features"]
    printed = capsys.readouterr().out
    assert "hectares" in printed
    assert "scene.labels.tif" in printed


def labels_in(path):
    with rasterio.open(path) as file:
        return file.read(1)


def test_pixels_that_no_word_deserves_or_of_little_confidence_are_unlabelled(tmp_path, scene, capsys):
    """As `segment` leaves them, whose image is one tile; and work of another threshold is done again."""
    from opensan import load

    out = tmp_path / "out"
    asked = [*arguments(scene, out), "--tile", 500]
    model = load("tiny")
    with rasterio.open(scene) as file:
        pixels = np.ascontiguousarray(file.read().transpose(1, 2, 0))
    middle = float(np.median(model.segment(pixels, "sand,snow,grass,water").confidence))
    for options, settings in ((["--rest"], {"rest": True}), (["--threshold", middle], {"threshold": middle})):
        assert not run(*asked, *options)
        expected = model.segment(pixels, "sand,snow,grass,water", **settings).labels
        labels = labels_in(out / "scene.labels.tif").astype(int)
        assert 0 < (labels == 255).mean() < 1
        assert (np.where(labels == 255, -1, labels) != expected).mean() < 0.01  # tiles have no padding


def test_a_killed_command_goes_on_where_it_was(tmp_path, scene, capsys):
    """Killed by itself in the middle of a strip's writing; the second run computes only what is missing."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert not run(*arguments(scene, whole))
    kill = """if True:
        import os, signal, sys
        from opensan.jobs import strips
        from opensan.cli import main
        append = strips.StripFile.append
        def killed(self, labels):
            if self.finished == 1:
                self._journal._rows.execute("BEGIN")
                self._journal._rows.execute("INSERT INTO done VALUES ('1', '[]', ?)", (bytes(10**7),))
                os.kill(os.getpid(), signal.SIGKILL)
            append(self, labels)
        strips.StripFile.append = killed
        main(["segment-raster", *sys.argv[1:]])"""
    command = [sys.executable, "-c", kill, *map(str, arguments(scene, killed))]
    assert subprocess.run(command, env=os.environ).returncode == -9
    assert not list(killed.glob("scene.*"))
    capsys.readouterr()
    assert not run(*arguments(scene, killed))
    assert "going on after 1 of 3 strips" in capsys.readouterr().err
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
    for name in ("scene.labels.tif", "scene.polygons.geojson"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_images_of_one_stem_keep_their_results(tmp_path, capsys):
    """Map tools write a.tif beside a.png. What has the same whole name too is refused."""
    folders, out = [tmp_path / "one", tmp_path / "two"], tmp_path / "out"
    for number, folder in enumerate(folders):
        folder.mkdir()
        picture = make_scene(3, number, (120, 200), split="test").image
        Image.fromarray(picture).save(folder / "a.png")
        Image.fromarray(picture[::-1]).save(folder / "a.tif")
    whole = {}
    for folder, name in itertools.product(folders[:1], ("a.png", "a.tif")):
        assert not run(*arguments(folder / name, tmp_path / name))
        assert not run(*arguments(folder / name, out))
        whole[name] = (tmp_path / name / "a.labels.tif").read_bytes()
    assert not run(*arguments(folders[0] / "a.png", out))  # again: its name stays
    assert {path.name for path in out.glob("*.labels.tif")} == {"a.labels.tif", "a.tif.labels.tif"}
    assert (out / "a.labels.tif").read_bytes() == whole["a.png"]
    assert (out / "a.tif.labels.tif").read_bytes() == whole["a.tif"]
    capsys.readouterr()
    assert run(*arguments(folders[1] / "a.tif", out)) == 1
    assert f"holds the results of {folders[0] / 'a.tif'}, which have the same names" in capsys.readouterr().err
    assert (out / "a.tif.labels.tif").read_bytes() == whole["a.tif"]


def test_what_somebody_changed_is_kept_and_other_work_is_told(tmp_path, scene, capsys):
    out = tmp_path / "out"
    assert not run(*arguments(scene, out))
    (out / "scene.polygons.geojson").write_text("corrected")
    assert not run(*arguments(scene, out), "--background", "sky")
    assert (out / "scene.polygons.geojson.changed").read_text() == "corrected"
    said = capsys.readouterr().err
    assert "1 of 1 images were done with other words: they are done again" in said
    assert "1 results were changed since they were written: kept as *.changed" in said
    assert json.loads((out / "scene.polygons.geojson").read_text())["type"] == "FeatureCollection"


def test_a_sites_own_grid_is_told_before_the_work(tmp_path, capsys):
    grid = 'LOCAL_CS["Site grid",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'
    picture = make_scene(3, 1, (120, 150), split="test").image.transpose(2, 0, 1)
    path = write(tmp_path / "local.tif", picture, crs=grid, transform=from_origin(500_000, 5_500_000, 0.5, 0.5))
    assert not run(*arguments(path, tmp_path / "out"))
    printed = capsys.readouterr()
    assert "no way to longitude and latitude" in printed.err and "hectares" in printed.out
    collection = json.loads((tmp_path / "out" / "local.polygons.geojson").read_text())
    assert "Site grid" in collection["coordinate_system"]
    corners = np.concatenate([one["geometry"]["coordinates"][0] for one in collection["features"]])
    assert corners.max(axis=0).tolist() == [500_075, 5_500_000]
    assert sum(one["properties"]["square_metres"] for one in collection["features"]) == 120 * 150 / 4


def test_hectares_of_web_mercator_are_those_of_the_ground(tmp_path, capsys):
    picture = make_scene(3, 1, (96, 128), split="test").image.transpose(2, 0, 1)
    place = {"crs": "EPSG:3857", "transform": from_origin(2_780_000, 8_440_000, 6, 6)}
    assert not run(*arguments(write(tmp_path / "x.tif", picture, **place), tmp_path / "out"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert sum(float(row[-1]) for row in rows) == pytest.approx(10.97, abs=0.05)  # and not 44.2


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        (("--nodata", "nothing"), 2, "--nodata takes a number or none"),
        (("--bands", "4,3,2"), 1, "choose one or three, of 1 to 3"),
        (("--bands", "red"), 2, "--bands takes numbers"),
        (("--stretch", "98,2"), 2, "the lower one first"),
        (("--overlap", "150"), 1, "choose 0 to 100"),
        (("--threshold", "1.5"), 2, "must be from 0 to 1"),
        (("--calibration", "none.json"), 1, "none.json: can't be read"),
        (("--model", "maskclip:tiny"), 1, "needs a model with mask proposals"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, scene, capsys, option, code, message):
    assert run(*arguments(scene, tmp_path / "out"), *option) == code
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_full_disk_is_told_in_a_line_and_loses_nothing(tmp_path, scene, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(geotiff, "write_labels", full)
        assert run(*arguments(scene, out)) == 1
    assert capsys.readouterr().err.strip().endswith("cannot write there (No space left on device)")
    assert {path.name for path in out.iterdir()} == {".scene.labels.part", "manifest.sqlite"}
    assert not run(*arguments(scene, out))
    assert "going on after 3 of 3 strips" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_no_fault_of_the_folder(tmp_path, scene, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run(scene, "--words", "brick", "--model", "san-vit-b16", "--out", tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert told.startswith("error: san-vit-b16: ") and "cannot write there" not in told


def test_damage_in_the_middle_is_told_in_a_line(tmp_path):
    path = write(tmp_path / "x.tif", noise(3, 1200, 600), tiled=True, compress="deflate")
    path.write_bytes(path.read_bytes()[:-400_000])
    command = [sys.executable, "-m", "opensan", "segment-raster", *map(str, arguments(path, tmp_path / "out"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {path}: damaged")
    assert done.stderr.count("\n") == 1
