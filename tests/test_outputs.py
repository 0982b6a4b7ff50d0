"""Label maps, overlays and JSON records."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask
from PIL import Image, ImageFont
from scipy import ndimage

from opensan import outputs
from opensan.outputs import fonts
from opensan.outputs.coco import decode_mask, run_lengths
from opensan.outputs.colours import PALETTES, UNLABELLED_COLOUR
from opensan.outputs.drawing import OPACITY, blend, muted
from opensan.outputs.polygons import connected_parts
from opensan.outputs.regions import distances_to_edge, name_places, without_crowds

NAMES = ["road", "café", "树 tree", "sky", "absent"]


@pytest.fixture
def labels() -> np.ndarray:
    """37 x 53: four words and unlabelled pixels, in blocks."""
    small = np.random.default_rng(0).integers(-1, 4, (8, 11))
    return np.kron(small, np.ones((5, 5)))[:37, :53].astype(np.int32)


def arguments(labels: np.ndarray, names: list[str] = NAMES) -> dict:
    rng = np.random.default_rng(1)
    confidence = rng.random(labels.shape, dtype=np.float32)
    counts = np.bincount(labels.ravel() + 1, minlength=len(names) + 1)[1:]
    return {
        "image": rng.integers(0, 256, (*labels.shape, 3), dtype=np.uint8),
        "labels": labels,
        "names": names,
        "areas": {name: int(count) / labels.size for name, count in zip(names, counts, strict=True)},
        "confidence": lambda: confidence,
        "vocabulary": {"words": names, "background": ["other"]},
        "model": "a-model",
    }


def test_palette_is_distinct_and_stable():
    colours = outputs.palette(60_000)
    assert colours.shape == (60_000, 3) and colours.dtype == np.uint8
    assert len(np.unique(colours, axis=0)) == 60_000
    for count in (0, 1, 7, 8, 300):
        np.testing.assert_array_equal(outputs.palette(count), colours[:count])
    assert not (colours == UNLABELLED_COLOUR).all(axis=1).any()
    first = colours[:20].astype(int)
    apart = np.abs(first[:, None] - first[None]).sum(-1) + 1000 * np.eye(20, dtype=int)
    assert apart.min() >= 60


def test_every_palette_is_distinct_and_another():
    safe, vivid = (outputs.palette(600, name) for name in PALETTES)
    assert len(np.unique(vivid, axis=0)) == 600
    np.testing.assert_array_equal(safe, outputs.palette(600))
    assert not (safe[:8] == vivid[:8]).all(axis=1).any()
    apart = np.abs(vivid[:20, None].astype(int) - vivid[None, :20]).sum(-1) + 1000 * np.eye(20, dtype=int)
    assert apart.min() >= 60


def test_label_map_keeps_every_label(tmp_path, labels):
    paths = outputs.save(tmp_path, "x", ["png"], **arguments(labels))
    picture = Image.open(paths["png"])
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture), np.where(labels < 0, 255, labels))
    shown = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(shown[labels == 2][0], outputs.palette(3)[2])
    assert (shown[labels < 0] == 0).all()


@pytest.mark.parametrize(
    ("count", "mode", "unlabelled"), [(255, "P", 255), (256, "I;16", 65_535), (65_534, "I;16", 65_535)]
)
def test_label_map_of_many_words(tmp_path, count, mode, unlabelled):
    labels = np.array([[0, count - 1, -1], [1, count // 2, -1]], dtype=np.int32)
    outputs.save_label_map(tmp_path / "x.png", labels, count)
    picture = Image.open(tmp_path / "x.png")
    assert picture.mode == mode
    np.testing.assert_array_equal(np.asarray(picture).astype(int), np.where(labels < 0, unlabelled, labels))
    read = outputs.read_label_map(tmp_path / "x.png")
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, labels)


def test_read_label_map_refuses_other_pictures(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "photograph.png")
    (tmp_path / "text.png").write_text("not a picture")
    for name, reason in (("photograph.png", "not RGB"), ("text.png", "cannot be read"), ("none.png", "cannot be read")):
        with pytest.raises(ValueError, match=reason) as caught:
            outputs.read_label_map(tmp_path / name)
        assert name in str(caught.value)


def test_json_record_says_it_all(tmp_path, labels):
    given = arguments(labels)
    path = outputs.save(tmp_path, "x", ["json"], **given)["json"]
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["image"] == {"width": 53, "height": 37}
    assert data["vocabulary"] == given["vocabulary"]
    assert data["model"] == "a-model"
    assert [word["name"] for word in data["words"]] == NAMES
    assert [word["index"] for word in data["words"]] == list(range(5))
    for index, word in enumerate(data["words"]):
        mask = labels == index
        assert word["pixels"] == mask.sum()
        assert word["area"] == given["areas"][word["name"]]
        np.testing.assert_array_equal(coco_mask.decode(word["rle"]).astype(bool), mask)
        if mask.any():
            assert word["confidence"] == pytest.approx(given["confidence"]()[mask].mean(), abs=1e-6)
        else:
            assert word["confidence"] is None
    assert data["unlabelled"]["pixels"] == (labels < 0).sum()
    assert sum(word["area"] for word in data["words"]) + data["unlabelled"]["area"] == pytest.approx(1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (7, 5), (30, 20)])
def test_run_lengths_equal_the_coco_library(shape):
    rng = np.random.default_rng(2)
    for _ in range(20):
        labels = rng.integers(-1, rng.integers(1, 5), shape).astype(np.int32)
        found = run_lengths(labels, 5)
        for index in range(5):
            mask = np.asfortranarray((labels == index).astype(np.uint8))
            if mask.any():
                expected = coco_mask.encode(mask)
                assert found[index] == {"size": list(shape), "counts": expected["counts"].decode()}
            else:
                assert index not in found


@pytest.mark.parametrize("shape", [(7, 5), (64, 200), (200, 64)])
def test_run_lengths_in_strips_equal_those_at_once(monkeypatch, shape):
    labels = np.zeros(shape, dtype=np.int32)
    labels[2:, :3] = 1
    labels[:, shape[1] // 2 :] = -1
    whole = run_lengths(labels, 2)
    monkeypatch.setattr("opensan.outputs.coco._STRIP_PIXELS", 3 * shape[0])
    assert run_lengths(labels, 2) == whole
    np.testing.assert_array_equal(coco_mask.decode(whole[1]), labels == 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (7, 5), (300, 200)])
def test_decoded_masks_equal_the_coco_library(shape):
    rng = np.random.default_rng(3)
    for share in (0, 0.001, 0.1, 0.5, 0.999, 1):
        mask = np.asfortranarray((rng.random(shape) < share).astype(np.uint8))
        packed = coco_mask.encode(mask)
        changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=0))
        counts = np.diff([0, *changes, mask.size]).tolist()
        for given in (packed["counts"], packed["counts"].decode(), counts):
            decoded = decode_mask({"size": list(shape), "counts": given}, *shape)
            assert decoded.dtype == bool
            np.testing.assert_array_equal(decoded, mask)


@pytest.mark.parametrize(
    ("size", "counts", "message"),
    [
        ([1_000_000, 1_000_000], [10**12], r"size is \[1000000, 1000000\], the picture's \[3, 4\]"),
        (None, "0", "size is None"),
        ([3, 4], [10**12], "not a list of run lengths from 0 to 12"),
        ([3, 4], [-1, 13], "not a list of run lengths"),
        ([3, 4], [4, 8.0], "not a list of run lengths"),
        ([3, 4], None, "not a list of run lengths"),
        ([3, 4], [4, 4], "not those of 3 x 4 = 12 pixels"),
        ([3, 4], [12, 12], "not those of 3 x 4 = 12 pixels"),
        ([3, 4], "", "not those of 3 x 4 = 12 pixels"),
        ([3, 4], "o" * 7, "not a COCO run-length string"),
        ([3, 4], "P" * 6 + "1", "not those of 3 x 4"),
        ([3, 4], "P" * 40 + "1", "number that is too large"),
        ([3, 4], "é", "not a COCO run-length string"),
        ([3, 4], "O<", "not those of 3 x 4 = 12 pixels"),
    ],
)
def test_hostile_masks_are_refused_without_being_unpacked(size, counts, message):
    with pytest.raises(ValueError, match=message):
        decode_mask({"size": size, "counts": counts}, 3, 4)


def test_overlay_without_photograph_lies_on_grey(tmp_path, labels):
    path = outputs.save(tmp_path, "x", ["overlay"], **{**arguments(labels), "image": None})["overlay"]
    shown = np.asarray(Image.open(path))[:37, :53]
    expected = blend(np.full((37, 53, 3), 160, np.uint8), labels, outputs.palette(5))
    np.testing.assert_array_equal(shown, expected)  # no region has room for a name


def test_legend_of_many_words_keeps_the_largest_and_the_unlabelled(monkeypatch):
    drawn = []
    monkeypatch.setattr("opensan.outputs.drawing._draw_entries", lambda draw, entries, *rest: drawn.extend(entries))
    names = [f"word {index}" for index in range(100)]
    areas = {name: (index + 1) / 10_000 for index, name in enumerate(names)}
    labels = np.array([[-1, 99]] * 60).repeat(60, axis=1).astype(np.int32)
    outputs.overlay(None, labels, names, areas)
    assert [entry.name for entry in drawn[:2]] == ["word 99", "word 98"]
    *shown, more, unlabelled = drawn
    assert more.name == f"and {100 - len(shown)} more" and not more.swatch
    assert more.area == pytest.approx(sum(areas.values()) - sum(entry.area for entry in shown))
    assert (unlabelled.name, unlabelled.share) == ("unlabelled", "50.0 %")


def test_legend_grows_with_the_photograph():
    heights = []
    for side in (400, 3000):
        picture = outputs.overlay(None, np.zeros((side, side), dtype=np.int32), ["sky"], {"sky": 1.0})
        heights.append(picture.height - side)
    assert heights[1] > 2.5 * heights[0]


def test_overlay_shows_the_photograph_beside_its_legend(labels):
    big = np.kron(labels, np.ones((12, 12), dtype=np.int32))
    given = arguments(big)
    image = given["image"]
    image[:] = 200
    picture = np.asarray(outputs.overlay(image, big, NAMES, given["areas"]))
    height, width = big.shape
    assert picture.shape[1] == width and picture.shape[0] > height
    as_blended = (picture[:height] == blend(image, big, outputs.palette(5))).all(axis=-1)
    assert 0.5 < as_blended.mean() < 1, "names stand on some regions"
    legend = picture[height:].reshape(-1, 3)
    for index, name in enumerate(NAMES):
        swatch = (legend == outputs.palette(5)[index]).all(axis=1).sum()
        assert (swatch > 50) == (name != "absent"), name


def test_blend_colours_regions_and_outlines_them():
    labels = np.zeros((40, 60), dtype=np.int32)
    labels[:, 30:] = 1
    labels[30:] = -1
    image = np.full((40, 60, 3), 100, dtype=np.uint8)
    colours = outputs.palette(2)
    picture = blend(image, labels, colours).astype(int)
    for column, index in ((10, 0), (50, 1)):
        expected = muted(image)[10, column] * (1 - OPACITY) + colours[index] * OPACITY
        assert np.abs(picture[10, column] - expected).max() <= 2
    assert (picture[35, 10] == 100).all()
    assert picture[10, 30].max() < 0.5 * picture[10, 32].max()
    assert (picture[30] < 60).all()


def test_specks_have_no_outlines():
    """Where a model is unsure, labels alternate from pixel to pixel, and outlines would hide the colours."""
    labels = np.random.default_rng(6).integers(0, 2, (60, 90)).astype(np.int32)
    labels[:, 45:] = 1
    image = np.full((60, 90, 3), 100, dtype=np.uint8)
    picture = blend(image, labels, outputs.palette(2))
    inside = picture[10:50, 8:36].reshape(-1, 3)
    assert len(np.unique(inside, axis=0)) == 2, "the two colours, and nothing darker"
    outlines = np.zeros((40, 40), dtype=bool)
    outlines[:, 20] = True
    np.testing.assert_array_equal(without_crowds(outlines), outlines)


def test_names_stand_where_regions_are_widest():
    labels = np.full((600, 900), -1, dtype=np.int32)
    rows, columns = np.mgrid[:600, :900]
    labels[(rows - 200) ** 2 + (columns - 300) ** 2 < 120**2] = 0
    labels[400:, 500:] = 1
    labels[10:14, 880:] = 0  # too small for a name
    disc, corner = sorted(name_places(labels), key=lambda place: place.label)
    assert (disc.label, corner.label) == (0, 1)
    assert abs(disc.x - 300) <= 8 and abs(disc.y - 200) <= 8 and abs(disc.radius - 120) <= 8
    assert 95 <= corner.radius <= 105 and 590 <= corner.x <= 810 and abs(corner.y - 500) <= 8
    picture = np.asarray(outputs.overlay(None, labels, ["sky", "sea"], {"sky": 0.1, "sea": 0.1}))
    colours = outputs.palette(2)
    for place in (disc, corner):  # a name lies on its region's colour, undiluted
        around = picture[round(place.y) - 14 : round(place.y) + 14, round(place.x) - 25 : round(place.x) + 25]
        assert (around == colours[place.label]).all(axis=-1).sum() > 100
    assert name_places(np.zeros((1, 1), dtype=np.int32)) == []


def label_maps() -> Iterator[np.ndarray]:
    """Yield maps of specks, of blocks, and of curves, of several shapes, and one of a snake."""
    rng = np.random.default_rng(3)
    for height, width in ((1, 1), (1, 9), (9, 1), (3, 3), (40, 7), (61, 83)):
        for words in (1, 2, 9):
            yield rng.integers(-1, words, (height, width))
            yield np.kron(rng.integers(-1, words, (height, width)), np.ones((6, 6), dtype=np.int64))[:height, :width]
            rows, columns = np.mgrid[:height, :width]
            yield (words * (np.sin(columns / 5) + np.cos(rows / 9) + 1.5) / 4).astype(np.int64) - 1
    snake = np.full((41, 41), -1)  # joins the runs of all rows to one part
    snake[::2] = snake[1::4, -1] = snake[3::4, 0] = 0
    yield snake


def test_connected_parts_are_those_of_scipy():
    for labels in label_maps():
        parts, part_labels = connected_parts(labels)
        expected = np.zeros(labels.shape, dtype=np.int64)
        for label in np.unique(labels):
            numbered, _ = ndimage.label(labels == label)
            expected[labels == label] = numbered[labels == label] + expected.max()
        pairs = np.unique(np.stack([parts.ravel(), expected.ravel()]), axis=1)
        assert pairs.shape[1] == len(part_labels) == len(np.unique(expected))  # one to one
        np.testing.assert_array_equal(part_labels[parts], labels)
        firsts = np.unique(parts, return_index=True)[1]
        assert (np.diff(firsts) > 0).all()


def test_distances_are_those_of_scipy():
    for labels in label_maps():
        inner = labels >= 0
        inner[[0, -1]] = inner[:, [0, -1]] = False
        np.testing.assert_array_equal(distances_to_edge(inner), ndimage.distance_transform_edt(inner))


def test_blend_in_strips_equals_blend_at_once(monkeypatch, labels):
    big = np.kron(labels, np.ones((40, 40), dtype=np.int32))
    image = arguments(big)["image"]
    whole = blend(image, big, outputs.palette(5))
    monkeypatch.setattr("opensan.outputs.drawing._STRIP_PIXELS", 7 * big.shape[1])
    np.testing.assert_array_equal(blend(image, big, outputs.palette(5)), whole)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (100, 100), (20, 3000), (600, 200), (300, 900)])
@pytest.mark.parametrize("count", [1, 100])
def test_overlay_of_any_shape(shape, count):
    labels = np.random.default_rng(3).integers(-1, count, shape).astype(np.int32)
    names = [f"a rather long name for number {index} " * 3 for index in range(count)]
    given = arguments(labels, names)
    picture = outputs.overlay(given["image"], labels, names, given["areas"])
    assert picture.width >= shape[1] and picture.height >= shape[0]
    assert picture.width <= max(2.0 * shape[1], shape[1] + 400)
    assert picture.height <= max(2.1 * shape[0], shape[0] + 400)


@pytest.mark.parametrize("name", ["树", "δέντρο", "שלום", "😀", "a\tb", "क्षि", "￿", "x" * 500])
def test_overlay_survives_any_name(name):
    labels = np.zeros((50, 80), dtype=np.int32)
    picture = outputs.overlay(np.zeros((50, 80, 3), dtype=np.uint8), labels, [name], {name: 1.0})
    assert picture.size > (80, 50)


def test_overlay_without_any_system_font(monkeypatch):
    monkeypatch.setattr("opensan.outputs.fonts._FONTS", ("no such font.ttf",))
    monkeypatch.setattr("opensan.outputs.fonts._installed", list)
    labels = np.zeros((50, 80), dtype=np.int32)
    picture = outputs.overlay(np.zeros((50, 80, 3), dtype=np.uint8), labels, ["café 树"], {"café 树": 1.0})
    assert (np.asarray(picture)[:, 80:] < 100).any()


def test_what_no_font_can_draw_is_described(monkeypatch):
    monkeypatch.setattr("opensan.outputs.fonts._FONTS", ())
    monkeypatch.setattr("opensan.outputs.fonts._installed", list)
    found = {name: fonts.readable(name) for name in ("a\tb", "café", "路面", "red 🚗", "❤️", "नि")}
    assert found == {
        "a\tb": "a b",
        "café": "cafe",
        "路面": "U+8DEF U+9762",
        "red 🚗": "red automobile",
        "❤️": "heavy black heart",
        "नि": "U+0928 U+093F",
    }
    labels = np.zeros((50, 80), dtype=np.int32)
    word, described = (outputs.overlay(None, labels, [name], {name: 1.0}) for name in ("路面", "U+8DEF U+9762"))
    assert word.tobytes() == described.tobytes()


def test_a_word_is_drawn_with_an_installed_font_that_has_it(tmp_path, monkeypatch):
    try:
        file = ImageFont.truetype("DejaVuSans.ttf").path
    except OSError:
        pytest.skip("DejaVu Sans is not installed")
    shutil.copy(file, tmp_path / "another.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr("opensan.outputs.fonts._FONTS", ())
    monkeypatch.setattr("opensan.outputs.fonts._folders", lambda: [tmp_path, tmp_path / "none"])
    monkeypatch.setattr("opensan.outputs.fonts._installed", fonts._installed.__wrapped__)
    assert fonts.readable("дорога 路") == "дорога U+8DEF"
    assert fonts.font_for("дорога", 15).path == str(tmp_path / "another.ttf")


def test_save_names_files_by_stem_and_replaces_old_ones(tmp_path, labels):
    (tmp_path / "x.png").write_text("the user's own")
    (tmp_path / "x.segments.json").write_text("an earlier run's")
    paths = outputs.save(tmp_path, "x", ["png", "overlay", "json"], **arguments(labels))
    assert {name: path.name for name, path in paths.items()} == {
        "png": "x.labels.png",
        "overlay": "x.overlay.png",
        "json": "x.segments.json",
    }
    assert (tmp_path / "x.png").read_text() == "the user's own"
    assert json.loads((tmp_path / "x.segments.json").read_text(encoding="utf-8"))["model"] == "a-model"
    assert len(list(tmp_path.iterdir())) == 4


def test_save_refuses_what_it_cannot_do(tmp_path, labels):
    given = arguments(labels)
    with pytest.raises(ValueError, match=r"unknown output format 'jpg': choose from png, overlay, json"):
        outputs.save(tmp_path, "x", ["jpg"], **given)
    with pytest.raises(ValueError, match="cannot begin a file's name"):
        outputs.save(tmp_path, "../x", ["png"], **given)
    with pytest.raises(ValueError, match="no output format"):
        outputs.save(tmp_path, "x", [], **given)
    with pytest.raises(ValueError, match="cannot write there"):
        outputs.save(tmp_path, "x" * 400, ["png"], **given)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path, labels):
    old = outputs.save(tmp_path, "x", ["overlay"], **arguments(labels))["overlay"].read_bytes()
    broken = arguments(labels)
    broken["areas"] = {}  # fails in the middle of the drawing
    with pytest.raises(KeyError):
        outputs.save(tmp_path, "x", ["overlay"], **broken)
    assert [path.name for path in tmp_path.iterdir()] == ["x.overlay.png"]
    assert (tmp_path / "x.overlay.png").read_bytes() == old


def test_check_writable_proves_it(tmp_path):
    folder = outputs.check_writable(tmp_path / "new" / "deep")
    assert folder.is_dir() and list(folder.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", "/proc/opensan", "a\0b"):
        with pytest.raises(ValueError, match="cannot write there") as caught:
            outputs.check_writable(bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"file: cannot write there \(a file is in the way\)"):
        outputs.check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="only Linux has files without a name")
def test_check_writable_leaves_nothing_if_killed(tmp_path):
    killed = """
import os, sys, tempfile
from opensan.outputs import check_writable
make = tempfile.TemporaryFile
tempfile.TemporaryFile = lambda **options: (make(**options).write(b"x"), os._exit(9))
check_writable(sys.argv[1])
"""
    assert subprocess.run([sys.executable, "-c", killed, str(tmp_path)]).returncode == 9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_check_writable_in_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(ValueError, match="Permission denied"):
        outputs.check_writable(tmp_path)


def test_shares_are_readable():
    shown = [outputs.format_share(share) for share in (0, 0.0001, 0.0005, 0.1234, 1)]
    assert shown == ["0.0 %", "< 0.1 %", "0.1 %", "12.3 %", "100.0 %"]


def test_mean_confidence_matches_a_plain_mean(labels):
    confidence = np.random.default_rng(5).random(labels.shape, dtype=np.float32)
    found = outputs.mean_confidence(labels, confidence, 5)
    assert found[:4] == pytest.approx([confidence[labels == index].mean() for index in range(4)], rel=1e-5)
    assert found[4] is None


def test_import_is_light():
    code = """
import sys, numpy, opensan.outputs
assert not {'torch', 'faster_coco_eval', 'scipy'} & set(sys.modules)
labels = numpy.kron([[0, 1], [1, -1]], numpy.ones((40, 40), dtype=int))
opensan.outputs.overlay(None, labels, ['road', 'sky'], {'road': 0.25, 'sky': 0.5})
assert not {'torch', 'scipy'} & set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
