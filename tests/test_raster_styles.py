"""Styles of label rasters, read as QGIS reads them, and by GDAL itself."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from opensan.jobs.raster_styles import style_path, write_categories, write_style
from opensan.outputs import palette

rasterio = pytest.importorskip("rasterio", reason="rasters need the extra `geo`")
shutil = pytest.importorskip("rasterio.shutil")

NAMES = ["roof", 'café "old" & <new>', "tree\x07", "水"]
SHOWN = ["roof", 'café "old" & <new>', "tree ", "水"]


def label_raster(path: Path, dtype: str = "uint8") -> Path:
    labels = np.arange(24, dtype=dtype).reshape(4, 6) % len(NAMES)
    size = {"width": 6, "height": 4, "count": 1, "dtype": dtype, "nodata": np.iinfo(dtype).max}
    size["transform"] = rasterio.transform.from_origin(500_000, 5_400_000, 0.5, 0.5)
    with rasterio.open(path, "w", driver="GTiff", **size) as file:
        file.write(labels, 1)
    return path


def read_style(path: Path) -> dict[float, tuple[str, int, str]]:
    """Value -> colour, alpha and label, as QGIS finds them.

    QgsMapLayer::importNamedStyle takes the first element "qgis", QgsRasterLayer::readSymbology its "pipe" with the
    "rasterrenderer", whose "type" chooses the class; QgsPalettedRasterRenderer::create reads the attribute "band", and
    of every "paletteEntry" in the first "colorPalette" the attributes value, color, alpha and label.
    """
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n")
    root = ElementTree.fromstring(text)
    renderer = root.find("pipe").find("rasterrenderer")
    assert root.tag == "qgis" and (renderer.get("type"), renderer.get("band")) == ("paletted", "1")
    assert float(renderer.get("opacity")) == 1 and renderer.get("alphaBand") == "-1"
    return {
        float(entry.get("value")): (entry.get("color"), int(entry.get("alpha")), entry.get("label"))
        for entry in renderer.find("colorPalette").iter("paletteEntry")
    }


def test_qgis_finds_the_words_with_the_colours_of_overlays(tmp_path):
    raster = label_raster(tmp_path / "a.tif.labels.tif")
    write_style(raster, NAMES)
    # As QgsMapLayer::styleURI: the complete base name, all but what follows the last dot.
    assert style_path(raster) == tmp_path / "a.tif.labels.qml"
    colours = [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in palette(len(NAMES)).tolist()]
    expected = {value: (colours[value], 255, SHOWN[value]) for value in range(len(NAMES))}
    assert read_style(style_path(raster)) == expected


def test_more_words_than_a_byte_holds_have_a_style_too(tmp_path):
    names = [f"word {number}" for number in range(300)]
    write_style(tmp_path / "many.tif", names)
    style = read_style(tmp_path / "many.qml")
    assert len({colour for colour, _, _ in style.values()}) == 300 and style[299][2] == "word 299"


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_gdal_reads_the_categories_and_the_attribute_table(tmp_path, dtype):
    """A virtual raster that GDAL makes of the label raster has what it read."""
    raster = label_raster(tmp_path / "labels.tif", dtype)
    write_categories(raster, NAMES)
    shutil.copy(raster, tmp_path / "copy.vrt", driver="VRT")
    band = ElementTree.parse(tmp_path / "copy.vrt").getroot().find("VRTRasterBand")
    assert [category.text for category in band.find("CategoryNames")] == SHOWN
    shutil.copy(raster, tmp_path / "copy.tif", driver="GTiff")
    band = ElementTree.parse(tmp_path / "copy.tif.aux.xml").getroot().find("PAMRasterBand")
    table = band.find("GDALRasterAttributeTable")
    fields = [(field.findtext("Name"), field.findtext("Usage")) for field in table.findall("FieldDefn")]
    assert fields == [("Value", "5"), ("Word", "2"), ("Red", "6"), ("Green", "7"), ("Blue", "8")]
    rows = [[cell.text for cell in row.findall("F")] for row in table.findall("Row")]
    assert rows == [
        [str(value), SHOWN[value], *map(str, colour)] for value, colour in enumerate(palette(len(NAMES)).tolist())
    ]
