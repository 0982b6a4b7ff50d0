"""`opensan segment-raster`: label an image of any size, with or without coordinates, as label raster and polygons."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opensan.cli.asked_words import (
    Background,
    Rest,
    Templates,
    Words,
    WordsFile,
    WordsSet,
    asked_vocabulary,
    embed_words,
)
from opensan.cli.options import (
    AsJson,
    Calibrated,
    Device,
    ImageDtype,
    Model,
    Out,
    Show,
    SpeedChoice,
    Threshold,
    checked_threshold,
    say_what_tiny_knows,
)
from opensan.cli.terminal import UsageError, complain, note, open_file, output_console, print_json, progress_bar
from opensan.cli.word_table import word_table
from opensan.errors import UserError

if TYPE_CHECKING:
    from opensan.jobs.geotiff import GeoRaster
    from opensan.jobs.ledger import SingleResult
    from opensan.jobs.strips import StripFile
    from opensan.jobs.tiles import Tiling
    from opensan.segmenters.base import Segmenter
    from opensan.vocabulary import Vocabulary

LABELS, PREVIEW = ".labels.tif", ".preview.png"

PREVIEW_SIDE = 2048
"""Pixels of the preview's longer side."""


def segment_raster(
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="A GeoTIFF, PNG, JPEG or JPEG 2000 image.", show_default=False)
    ],
    words: Words = None,
    words_file: WordsFile = None,
    words_set: WordsSet = None,
    background: Background = None,
    templates: Templates = None,
    rest: Rest = False,
    model: Model = "san-vit-b16",
    calibration: Calibrated = None,
    out: Out = Path("out"),
    threshold: Threshold = 0.0,
    tile: Annotated[
        int | None,
        typer.Option(
            min=32,
            help="Side of a tile in the image's pixels. The default is the model's own size, so that it sees pixels as "
            "they are; twice as much shows it everything at half size.",
            show_default=False,
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(min=0, help="Pixels that neighbours share (default: a fifth of a tile).", show_default=False),
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(help="One or three bands to see as red, green, blue: 4,3,2 (counted from 1).", show_default=False),
    ] = None,
    stretch: Annotated[
        str | None,
        typer.Option(
            help="Percentiles of each band that become black and white: 2,98 (the default unless pixels are 8-bit).",
            show_default=False,
        ),
    ] = None,
    nodata: Annotated[
        str | None,
        typer.Option(
            metavar="VALUE",
            help="The value of pixels without data, which get no label; none: all have data (default: what the file "
            "says: its no-data value, mask, or alpha band).",
            show_default=False,
        ),
    ] = None,
    polygons: Annotated[bool, typer.Option(help="Also write the regions as GeoJSON.")] = True,
    min_pixels: Annotated[int, typer.Option(min=1, help="Regions smaller than this get no polygon.")] = 1,
    device: Device = "auto",
    speed: SpeedChoice = "exact",
    dtype: ImageDtype = None,
    batch: Annotated[int, typer.Option(min=1, help="Tiles that go through the model together.")] = 1,
    as_json: AsJson = False,
    show: Show = False,
) -> None:
    """Label an image of any size, by overlapping tiles, in little memory.

    Writes STEM.labels.tif (a GeoTIFF with the image's coordinates; words in the tag WORDS), STEM.labels.qml (its style
    in QGIS), STEM.polygons.geojson and STEM.preview.png. The same command continues a run that was stopped in any way.
    Needs the extra `geo`.
    """
    vocabulary = asked_vocabulary(words, words_file, words_set, background, templates, rest)
    checked_threshold(threshold)
    chosen = _numbers("--bands", bands, int)
    percentiles = _numbers("--stretch", stretch, float)
    if percentiles and not (len(percentiles) == 2 and 0 <= percentiles[0] < percentiles[1] <= 100):
        raise UsageError("--stretch takes two percentiles, the lower one first: 2,98")

    without_data = None if nodata is None else _nodata(nodata)

    from opensan import outputs
    from opensan.jobs import geotiff
    from opensan.jobs.ground import Ground

    outputs.check_writable(out)
    with geotiff.gdal():
        raster = geotiff.GeoRaster(image, bands=chosen, stretch=percentiles, nodata=without_data)
        try:
            for line in raster.notes:
                complain(f"warning: {line}")
            ground = Ground(raster.crs, raster.transform, raster.size)  # before the work: a system may be faulty
            if raster.crs is not None and not ground.on_earth:
                complain(
                    f"warning: {image}: its coordinate system has no way to longitude and latitude: polygons get the "
                    f"image's own coordinates ({raster.crs.to_wkt()[:60]}...)"
                )
            note(f"loading {model}")
            say_what_tiny_knows(model, [image])
            from opensan.jobs.ledger import SingleResult
            from opensan.jobs.strips import StripFile
            from opensan.jobs.tiles import Tiling
            from opensan.segmenters.load import load
            from opensan.segmenters.proposals import with_proposals

            segmenter = load(model, device=device, speed=speed, dtype=dtype, calibration=calibration)
            with_proposals(segmenter, "an image by tiles")
            if rest:
                vocabulary = segmenter.with_rest(vocabulary)
            embed_words(segmenter, vocabulary)
            tiling = Tiling.plan(raster.size, tile or segmenter.image_config.short_side, overlap)
            work = _work(raster, segmenter, vocabulary, tiling, threshold)
            try:  # the image's own errors are UserErrors
                result = SingleResult(out, image, raster.stat, LABELS, work)
                part = out / f".{result.name}.labels.part"
                with StripFile(part, work, tiling.strips, raster.size[1]) as strips:
                    _label(segmenter, raster, vocabulary, tiling, strips, threshold, batch)
                    _write(raster, strips, vocabulary.names, out, result, polygons, min_pixels, as_json)
                    strips.remove()
            except OSError as error:  # a full disk, or a name that is too long
                raise UserError(f"{error.filename or out}: cannot write there ({error.strerror or error})") from None
            if show:
                open_file(out / f"{result.name}{PREVIEW}")
        finally:
            raster.close()


def _numbers(option: str, text: str | None, kind: type) -> "tuple[Any, ...] | None":
    if text is None:
        return None
    try:
        return tuple(kind(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{option} takes numbers with commas between them, not {text!r}") from None


def _nodata(text: str) -> float | str:
    if text == "none":
        return text
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--nodata takes a number or none, not {text!r}") from None


def _work(
    raster: "GeoRaster", segmenter: "Segmenter", vocabulary: "Vocabulary", tiling: "Tiling", threshold: float
) -> dict[str, Any]:
    """Return all that the labels depend on: unfinished work is continued only if none of it has changed."""
    from opensan.jobs.ledger import settings_of

    return {
        **settings_of(segmenter, vocabulary, threshold),
        "image": [str(raster.path.absolute()), raster.stat.st_size, raster.stat.st_mtime_ns],
        "bands": raster.bands,
        "stretch": raster.stretch,
        "nodata": raster.nodata,
        "words": len(vocabulary.names),
        "tiles": [tiling.height, tiling.width, tiling.overlap, *tiling.size],
    }


def _label(
    segmenter: "Segmenter",
    raster: "GeoRaster",
    vocabulary: "Vocabulary",
    tiling: "Tiling",
    strips: "StripFile",
    threshold: float,
    batch: int,
) -> None:
    from torch import OutOfMemoryError

    from opensan.jobs.tiles import label_by_tiles

    if strips.other_work is not None:
        complain(f"{strips.path}: unfinished work with {strips.other_work}: starting from the beginning")
    if strips.finished:
        complain(f"going on after {strips.finished} of {len(tiling.strips)} strips")
    try:
        with progress_bar(output_console(), "segmenting", tiling.count) as advance:
            advance(strips.finished * len(tiling.lefts))
            for labels in label_by_tiles(
                segmenter,
                raster,
                vocabulary,
                tiling,
                first_strip=strips.finished,
                threshold=threshold,
                batch_size=batch,
                advance=advance,
            ):
                strips.append(labels)
    except (MemoryError, OutOfMemoryError):
        raise UserError("out of memory: try a smaller --batch or --tile") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{strips.finished} of {len(tiling.strips)} strips done; the same command goes on from there"
        ) from None


def _write(
    raster: "GeoRaster",
    strips: "StripFile",
    names: Sequence[str],
    out: Path,
    result: "SingleResult",
    polygons: bool,
    min_pixels: int,
    as_json: bool,
) -> None:
    from opensan import outputs
    from opensan.files import atomic_path
    from opensan.jobs import geotiff, raster_styles

    console = output_console()
    label_path, preview = out / f"{result.name}{LABELS}", out / f"{result.name}{PREVIEW}"
    outlines = [out / f"{result.name}.polygons.geojson"] if polygons else []
    style = raster_styles.style_path(label_path)
    for line in result.replace([label_path, style, preview, *outlines]):
        complain(line)
    note("writing the label raster")
    pixels = geotiff.write_labels(label_path, strips, raster, names)
    raster_styles.write_style(label_path, names)
    raster_styles.write_categories(label_path, names)
    total = raster.size[0] * raster.size[1]
    areas = {name: int(count) / total for name, count in zip(names, pixels, strict=True)}
    with atomic_path(preview) as temporary:
        small = geotiff.reduced_labels(label_path, PREVIEW_SIDE)
        picture = raster.reduced(PREVIEW_SIDE)
        outputs.overlay(picture, small, names, areas).save(temporary)
    if contrast := raster.contrast_note(picture):
        complain(f"warning: {contrast}")
    written = [f"wrote {path}" for path in (label_path, style, preview)]
    for path in outlines:
        note("writing polygons")
        count, nowhere = geotiff.write_polygons(path, label_path, names, min_pixels=min_pixels)
        written.append(f"wrote {path} ({count:,} polygons)")
        if nowhere:
            complain(f"warning: {nowhere:,} regions reach beyond the earth's edge: they have no polygon in {path}")
    result.add([label_path, style, preview, *outlines])
    metres = geotiff.word_square_metres(label_path, len(names))
    hectares = {} if metres is None else dict(zip(names, metres / 10_000, strict=True))
    if as_json:
        paths = [str(path) for path in (label_path, style, preview, *outlines)]
        print_json({"image": str(raster.path), "areas": areas, "hectares": hectares or None, "files": paths})
        return
    table = word_table(
        areas,
        (total - int(pixels.sum())) / total,
        "hectares" if hectares else None,
        lambda name, _: f"{hectares[name]:,.2f}" if name in hectares else "",
    )
    console.print(table)
    for line in written:
        console.print(line, soft_wrap=True)
