"""Write what shows a label raster's words and colours in other programs: a style of QGIS, and a table of GDAL.

QGIS applies a style `NAME.qml` beside a raster `NAME.tif` when it opens it (`QgsMapLayer::styleURI`). It reads
of it what `QgsRasterLayer::readSymbology` and `QgsPalettedRasterRenderer::create` do. GDAL reads `NAME.tif.aux.xml`
(`GDALPamDataset`), for gdalinfo, rasters made of it, and programs that show its attribute table.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from opensan.files import write_text
from opensan.outputs import palette

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML file can hold."""

_INTEGER, _TEXT = "0", "2"
"""GDAL's types of an attribute table's columns (GDALRATFieldType)."""

_COLUMNS = (
    *(("Value", _INTEGER, "5"), ("Word", _TEXT, "2")),
    *(("Red", _INTEGER, "6"), ("Green", _INTEGER, "7"), ("Blue", _INTEGER, "8")),
)
"""Name, type and usage (GDALRATFieldUsage) of each column."""


def style_path(raster: str | os.PathLike[str]) -> Path:
    """Return the path of the style that QGIS looks for beside a raster."""
    return Path(raster).with_suffix(".qml")


def write_style(raster: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Write the style of QGIS for a label raster: unique values, each with its word and the overlays' colour.

    Pixels without data, the unlabelled ones, are transparent.
    """
    root = ElementTree.Element("qgis", version="3.22.0", styleCategories="AllStyleCategories")
    pipe = ElementTree.SubElement(root, "pipe")
    renderer = ElementTree.SubElement(
        pipe, "rasterrenderer", type="paletted", band="1", alphaBand="-1", opacity="1", nodataColor=""
    )
    ElementTree.SubElement(renderer, "rasterTransparency")
    entries = ElementTree.SubElement(renderer, "colorPalette")
    for value, (name, colour) in enumerate(zip(names, palette(len(names)), strict=True)):
        ElementTree.SubElement(
            entries, "paletteEntry", value=str(value), color=f"#{bytes(colour).hex()}", alpha="255", label=_plain(name)
        )
    ElementTree.SubElement(pipe, "brightnesscontrast", brightness="0", contrast="0", gamma="1")
    ElementTree.SubElement(pipe, "rasterresampler", maxOversampling="2")
    ElementTree.SubElement(root, "blendMode").text = "0"
    _write(style_path(raster), root, "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n")


def write_categories(raster: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Write the names of a label raster's values for GDAL: as its categories, and as its attribute table.

    GDAL keeps its statistics in the same file; earlier ones are of another raster, and are replaced.
    """
    root = ElementTree.Element("PAMDataset")
    band = ElementTree.SubElement(root, "PAMRasterBand", band="1")
    categories = ElementTree.SubElement(band, "CategoryNames")
    table = ElementTree.SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    for index, column in enumerate(_COLUMNS):
        field = ElementTree.SubElement(table, "FieldDefn", index=str(index))
        for tag, text in zip(("Name", "Type", "Usage"), column, strict=True):
            ElementTree.SubElement(field, tag).text = text
    for value, (name, colour) in enumerate(zip(names, palette(len(names)).tolist(), strict=True)):
        ElementTree.SubElement(categories, "Category").text = _plain(name)
        row = ElementTree.SubElement(table, "Row", index=str(value))
        for cell in (value, _plain(name), *colour):
            ElementTree.SubElement(row, "F").text = str(cell)
    _write(Path(f"{os.fspath(raster)}.aux.xml"), root)


def _plain(name: str) -> str:
    return _NOT_XML.sub(" ", name)


def _write(path: Path, root: ElementTree.Element, beginning: str = "") -> None:
    ElementTree.indent(root)
    write_text(path, beginning + ElementTree.tostring(root, encoding="unicode") + "\n")
