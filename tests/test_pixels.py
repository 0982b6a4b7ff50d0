"""What stored pixels mean, whatever their bits, palette and direction, in images, label files and benchmarks."""

import io
import struct
import zlib

import pytest
from PIL import Image

from opensan.data.prepare import READERS
from opensan.data.prepare.own_folder import open_folder
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.images import open_image
from opensan.images.pixels import read_pixels


def png(bits: int, kind: int, row: bytes, width: int = 4, chunks: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A PNG of one row; `kind` is PNG's colour type, `row` its packed samples."""
    header = struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    body = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(bits: int, photometric: int, row: bytes, width: int = 4) -> bytes:
    """A TIFF of one row of grey, not compressed."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, 1)]
    tags.append((279, len(row)))
    place = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, place if tag == 273 else value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + row


FORMS = {
    "1 bit": (png(1, 0, b"\x50"), [0, 1, 0, 1], [0, 255, 0, 255]),
    "2 bits": (png(2, 0, b"\x1b"), [0, 1, 2, 3], [0, 85, 170, 255]),
    "4 bits": (png(4, 0, b"\x05\xbc"), [0, 5, 11, 12], [0, 85, 187, 204]),
    "8 bits": (png(8, 0, b"\0\1\2\3"), [0, 1, 2, 3], [0, 1, 2, 3]),
    "16 bits": (png(16, 0, b"\0\0\0\1\1\0\xff\xff"), [0, 1, 256, 65_535], [0, 1, 256, 65_535]),
    "TIFF, 1 bit, min is white": (tiff(1, 0, b"\x50"), [0, 1, 0, 1], [255, 0, 255, 0]),
    "TIFF, 4 bits": (tiff(4, 1, b"\x05\xbc"), [0, 5, 11, 12], [0, 85, 187, 204]),
    "TIFF, 4 bits, min is white": (tiff(4, 0, b"\x05\xbc"), [0, 5, 11, 12], [255, 170, 68, 51]),
    "TIFF, 8 bits, min is white": (tiff(8, 0, b"\0\1\2\3"), [0, 1, 2, 3], [255, 254, 253, 252]),
    "TIFF, 12 bits": (tiff(12, 1, b"\0\0\1\x0f\xff\0"), [0, 1, 255, 3840], [0, 16, 4081, 61_454]),
    "TIFF, 16 bits, min is white": (
        tiff(16, 0, b"\0\0\1\0\0\1\xff\xff"),
        [0, 1, 256, 65_535],
        [65_535, 65_534, 65_279, 0],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_stored_and_shown(form):
    content, stored, shown = FORMS[form]
    with Image.open(io.BytesIO(content)) as image:
        pixels = read_pixels(image)
    assert (pixels.stored.tolist(), pixels.shown.tolist()) == ([stored], [shown])
    assert pixels.differs == (stored != shown)
    # An image is what is shown, as 8 bits.
    white = 65_535 if max(shown) > 255 else 255
    assert open_image(content)[0, :, 0].tolist() == [round(value * 255 / white) for value in shown]


def palette(*colours: tuple[int, int, int]) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"PLTE", bytes(value for colour in colours for value in colour)),)


def label_folder(root, content: bytes, classes: int = 3, colours: str = ""):
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 1)).save(root / "images" / "a.png")
    (root / "labels" / "a.png").write_bytes(content)
    (root / "classes.txt").write_text("".join(f"class {number}\n" for number in range(classes)))
    if colours:
        (root / "colours.txt").write_text(colours)
    return root


def labels(root, **options: str) -> list[int]:
    return open_folder(root, **options).images[0].labels()[0].tolist()


def test_a_palette_of_greys_is_read_in_the_only_way_that_fits(tmp_path):
    greys = palette((11, 11, 11), (12, 12, 12), (5, 5, 5), (0, 0, 0))
    row = b"\x1b"  # indices 0 to 3
    # Four classes: shown are 11, 12, 5, 0, of which there is no 11; the indices fit.
    assert labels(label_folder(tmp_path / "indices", png(2, 3, row, chunks=greys), classes=4)) == [0, 1, 2, 3]
    # A palette whose greys are only shown fits nothing else.
    greys = palette((0, 0, 0), (1, 1, 1), (2, 2, 2), (255, 255, 255))
    assert labels(label_folder(tmp_path / "shown", png(2, 3, row, chunks=greys), classes=3)) == [0, 1, 2, -1]


def test_a_palette_of_greys_that_can_be_read_in_two_ways_is_refused_until_told(tmp_path):
    greys = palette((11, 11, 11), (12, 12, 12), (5, 5, 5), (0, 0, 0))
    root = label_folder(tmp_path, png(2, 3, b"\x1b", chunks=greys), classes=20)
    with pytest.raises(ValueError, match=r"with a palette of greys: its numbers \(0-3\) .* \(0, 5, 11-12\)"):
        labels(root)
    assert labels(root, pixels="shown") == [11, 12, 5, 0]
    assert labels(root, pixels="stored") == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"pixels=grey: must be stored .* or shown"):
        labels(root, pixels="grey")


def test_palettes_of_colours_and_greys_that_are_their_index_stay_indices(tmp_path):
    colours = palette((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert labels(label_folder(tmp_path / "a", png(2, 3, b"\x1b", chunks=colours), classes=200)) == [0, 1, 2, 3]
    greys = palette(*((grey,) * 3 for grey in range(4)))
    assert labels(label_folder(tmp_path / "b", png(2, 3, b"\x1b", chunks=greys), classes=200)) == [0, 1, 2, 3]


def test_few_bits_of_grey(tmp_path):
    assert labels(label_folder(tmp_path / "two", png(2, 0, b"\x1b"), classes=4)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"with 2 bits a pixel: its numbers \(0-3\) .* \(0, 85, 170, 255\)"):
        labels(label_folder(tmp_path / "both", png(2, 0, b"\x1b"), classes=171))
    # Black alone, as a program that makes files smaller stores it, is 0 either way.
    assert labels(label_folder(tmp_path / "black", png(1, 0, b"\0"), classes=2)) == [0, 0, 0, 0]
    # One class and unlabelled, made smaller to one bit.
    assert labels(label_folder(tmp_path / "one", png(1, 0, b"\x50"), classes=1)) == [0, -1, 0, -1]


def test_rgb_and_rgba_of_grey_are_their_values_and_transparency_is_refused(tmp_path):
    values = bytes(value for grey in (0, 1, 2, 255) for value in (grey, grey, grey, 255))
    assert labels(label_folder(tmp_path / "rgba", png(8, 6, values))) == [0, 1, 2, -1]
    opaque = bytes(value for grey in (0, 1, 2, 255) for value in (grey, 255))
    assert labels(label_folder(tmp_path / "la", png(8, 4, opaque))) == [0, 1, 2, -1]
    with pytest.raises(ValueError, match=r"a.png: has transparent pixels"):
        labels(label_folder(tmp_path / "clear", png(8, 6, values[:-1] + b"\0")))
    deep = bytes(value for grey in (0, 1, 2, 2) for value in (0, grey) * 3)
    with pytest.raises(ValueError, match=r"a.png: colours of 16 bits a channel"):
        labels(label_folder(tmp_path / "deep", png(16, 2, deep)))


def test_a_palette_beside_a_table_of_colours_is_read_by_its_colours(tmp_path):
    colours = palette((9, 9, 9), (0, 128, 0), (128, 0, 0), (0, 0, 0))
    table = "128 0 0 class 0\n0 128 0 class 1\n9 9 9 class 2\n0 0 0 class 2\n"
    root = label_folder(tmp_path / "raw", png(2, 3, b"\x1b", chunks=colours), colours=table)
    assert labels(root) == [2, 1, 0, 2]
    assert labels(label_folder(tmp_path / "raw", png(2, 3, b"\x18", chunks=colours)), pixels="stored") == [0, 1, 2, 0]
    # A colour that is not listed is no reason to take the indices.
    with pytest.raises(ValueError, match=r"colour 128 0 0, which is not in colours.txt; if its palette's indices are"):
        labels(label_folder(tmp_path / "other", png(2, 3, b"\x1b", chunks=colours), 4, table.partition("\n")[2]))


def test_benchmarks_and_prepared_folders_read_pixels_by_the_same_rule(tmp_path):
    greys = palette((11, 11, 11), (12, 12, 12), (5, 5, 5), (0, 0, 0))
    root = tmp_path / "ADEChallengeData2016"
    for part in ("images", "annotations"):
        (root / part / "validation").mkdir(parents=True)
    Image.new("RGB", (4, 1)).save(root / "images" / "validation" / "a.jpg")
    (root / "annotations" / "validation" / "a.png").write_bytes(png(2, 3, b"\x1b", chunks=greys))
    with pytest.raises(ValueError, match=r"a.png: stored with a palette of greys: .* as its authors distribute it"):
        READERS["ade20k_150"].open(root).images[0].labels()
    folder = label_folder(tmp_path / "ready", png(2, 3, b"\x1b", chunks=greys), classes=20)
    (folder / "val.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"a.png: stored with a palette of greys: .* save it as 8 or 16-bit grey"):
        SegmentationFolder(folder, "val")[0]
    greys = palette((0, 0, 0), (2, 2, 2), (1, 1, 1), (255, 255, 255))
    (folder / "labels" / "a.png").write_bytes(png(2, 3, b"\x1b", chunks=greys))
    (folder / "classes.txt").write_text("road\ncar\nsky\n")
    assert SegmentationFolder(folder, "val")[0][1].tolist() == [[0, 2, 1, -1]]


def test_a_palette_that_shows_one_grey_for_several_indices_says_nothing(tmp_path):
    black = palette(*[(0, 0, 0)] * 4)
    assert labels(label_folder(tmp_path, png(2, 3, b"\x1b", chunks=black), classes=4)) == [0, 1, 2, 3]
