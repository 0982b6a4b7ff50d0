"""Data of somebody's own: folders of index PNGs and of word masks, and what is said when they are imperfect."""

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensan.cli import main
from opensan.data.canonical import read_manifest
from opensan.data.prepare.engine import prepare
from opensan.data.prepare.own_folder import open_folder
from opensan.data.prepare.own_labels import Layers
from opensan.data.prepare.own_word_masks import open_word_masks
from opensan.data.prepare.source import Source
from opensan.data.segmentation_folder import SegmentationFolder

SHARED = Path(__file__).parents[2] / "shared" / "data"


def write_photograph(path: Path, width: int = 3, height: int = 2, orientation: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", (width, height), (90, 120, 150)).save(path, exif=exif)


def write_map(path: Path, values, kind=np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, kind)).save(path)


def labels_of(source: Source) -> dict[str, list]:
    """Every photograph's labels, through a pickle as in another process."""
    return {one.name: pickle.loads(pickle.dumps(one.labels))().tolist() for one in source.images}


def splits_of(source: Source) -> dict[str, tuple[str, ...]]:
    return {one.name: one.splits for one in source.images}


@pytest.fixture
def folder(tmp_path):
    """Two photographs, 3x2 (width x height), of three classes."""
    root = tmp_path / "raw"
    for name, value in (("a", 1), ("b.2", 2)):
        write_photograph(root / "images" / f"{name}.jpg")
        write_map(root / "labels" / f"{name}.png", [[0, 1, value], [255, 2, 0]])
    (root / "classes.txt").write_text("background\ncar|automobile\nsky\n")
    return root


def test_folder_without_lists_is_one_split(folder):
    source = open_folder(folder)
    assert [word.synonyms for word in source.vocabulary.words] == [("background",), ("car", "automobile"), ("sky",)]
    assert splits_of(source) == {"a": ("all",), "b.2": ("all",)}
    assert source.evaluation_split == "all"
    assert labels_of(source) == {"a": [[0, 1, 1], [-1, 2, 0]], "b.2": [[0, 1, 2], [-1, 2, 0]]}


def test_lists_are_splits_and_may_overlap(folder):
    (folder / "train.txt").write_text("b.2\n")
    (folder / "val.txt").write_text("\ufeffa.jpg\n\n", encoding="utf-8")
    (folder / "trainval.txt").write_text("images/a.jpg\n./images/b.2.jpg\nb.2\n")
    (folder / "README.txt").write_text("Photographs of a street.\n")
    with pytest.warns(UserWarning, match=r"README.txt: names no image in .*images, so it is taken for no list"):
        source = open_folder(folder)
    assert splits_of(source) == {"b.2": ("train", "trainval"), "a": ("trainval", "val")}
    assert source.evaluation_split == "trainval"


def test_sub_folders_are_splits(tmp_path):
    for place in ("train/a", "val/a", "val/city/b"):
        write_photograph(tmp_path / "images" / f"{place}.png")
        write_map(tmp_path / "labels" / f"{place}.png", [[0, 1, 1], [0, 0, 0]])
    write_photograph(tmp_path / "images" / "val" / "._a.png")  # what other systems leave
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    source = open_folder(tmp_path)
    assert splits_of(source) == {"train_a": ("train",), "val_a": ("val",), "b": ("val",)}
    assert source.evaluation_split == "val"
    assert set(map(str, labels_of(source).values())) == {"[[0, 1, 1], [0, 0, 0]]"}
    write_photograph(tmp_path / "images" / "c.png")
    with pytest.raises(ValueError, match=r"lie both in it \(c.png\) and in sub-folders \(train/a\)"):
        open_folder(tmp_path)


def test_listed_photographs_of_sub_folders(tmp_path):
    for place in ("one/a", "two/a", "two/b"):
        write_photograph(tmp_path / "images" / f"{place}.png")
        write_map(tmp_path / "labels" / f"{place}.png", [[0] * 3] * 2)
    (tmp_path / "classes.txt").write_text("road\n")
    (tmp_path / "train.txt").write_text("two/a\nb\n")
    assert splits_of(open_folder(tmp_path)) == {"a": ("train",), "b": ("train",)}


def test_ignored_classes_and_unlabelled_values(folder):
    write_map(folder / "labels" / "a.png", [[0, 1, 2], [254, 253, 255]])
    source = open_folder(folder, ignored="background", unlabelled="253,254")
    assert source.vocabulary.names == ["car", "sky"]
    assert labels_of(source) == {"a": [[-1, 0, 1], [-1, -1, -1]], "b.2": [[-1, 0, 1], [-1, 1, -1]]}


def test_a_class_with_a_comma_can_be_ignored(folder):
    (folder / "classes.txt").write_text("door, gate\ncar\nsky\n")
    assert open_folder(folder, ignored="door, gate").vocabulary.names == ["car", "sky"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignored": "tree"}, r"classes.txt: has no class 'tree' to ignore; it has background, car, sky"),
        ({"ignored": "sky,background,car"}, r"classes.txt: all classes are ignored"),
        ({"unlabelled": "0"}, r"unlabelled=0: 0 is a class; to leave a class out, say ignored=NAME"),
        ({"unlabelled": "x"}, r"unlabelled=x: must be pixel values between commas"),
        ({"unlabelled": "-1"}, r"unlabelled=-1: -1 is no pixel value"),
    ],
)
def test_wrong_options_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        open_folder(folder, **options)


def test_sixteen_bits_and_palettes(folder):
    (folder / "classes.txt").write_text("".join(f"class {number}\n" for number in range(300)))
    write_map(folder / "labels" / "a.png", [[0, 255, 299], [65_535, 2, 0]], np.uint16)
    palette = Image.fromarray(np.array([[3, 0, 255], [2, 1, 1]], np.uint8), mode="P")
    palette.putpalette([value for number in range(256) for value in (number, 255 - number, 7)])
    palette.save(folder / "labels" / "b.2.png")
    assert labels_of(open_folder(folder)) == {"a": [[0, 255, 299], [-1, 2, 0]], "b.2": [[3, 0, -1], [2, 1, 1]]}


def test_colours(folder):
    (folder / "colours.txt").write_text("# as painted\n0 0 0 background\n128 64 0\tcar\n1 2 3 sky\n3 2 1 sky\n")
    colours = [[(0, 0, 0), (128, 64, 0), (1, 2, 3)], [(3, 2, 1), (0, 0, 0), (0, 0, 0)]]
    write_map(folder / "labels" / "a.png", colours)
    assert labels_of(open_folder(folder)) == {"a": [[0, 1, 2], [2, 0, 0]], "b.2": [[0, 1, 2], [-1, 2, 0]]}
    assert labels_of(open_folder(folder, ignored="background"))["a"] == [[-1, 0, 1], [1, -1, -1]]
    colours[0][0] = (9, 9, 8)
    write_map(folder / "labels" / "a.png", colours)
    with pytest.raises(ValueError, match=r"a.png: 1 pixels have the colour 9 9 8, which is not in colours.txt"):
        labels_of(open_folder(folder))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0 sky", r"colours.txt: line 1: '0 0 sky' is not R G B CLASS"),
        ("0 0 256 sky", r"line 1: '0 0 256 sky' is not R G B CLASS"),
        ("0 0 0 tree", r"line 1: classes.txt has no class 'tree'"),
        ("0 0 0 sky\n0 0 0 car", r"line 2: 0 0 0 is another class's colour already"),
    ],
)
def test_a_wrong_table_of_colours_is_named(folder, line, message):
    (folder / "colours.txt").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        open_folder(folder)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([[0, 7, 7], [0, 0, 0]], np.uint8, r"a.png: 2 pixels hold the value 7; classes are 0-2, 255 is unlabelled"),
        ([[0, 255, 0], [0, 0, 0]], np.uint16, r"a.png: 1 pixels hold the value 255; .* 65535 is unlabelled"),
        ([[0, 1], [0, 1], [0, 1]], np.uint8, r"a.png: is 2x3, its image 3x2 .* exactly the image's size"),
        ([[0] * 300] * 200, np.uint8, r"a.png: is 300x200, its image 3x2"),
        ([[(1, 2, 1)] * 3] * 2, np.uint8, r"a.png: an RGB picture, .* or list its colours in colours.txt"),
        ([[(1, 2, 1, 9)] * 3] * 2, np.uint8, r"a.png: has transparent pixels, whose meaning is not known"),
        ([[True, False, True]] * 2, bool, r"a.png: stored with 1 bit a pixel: its numbers \(0-1\) .* \(0, 255\)"),
    ],
)
def test_a_wrong_label_file_is_named_with_the_remedy(folder, values, kind, message):
    write_map(folder / "labels" / "a.png", values, kind)
    with pytest.raises(ValueError, match=message) as caught:
        labels_of(open_folder(folder))
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_label_files_are_named(folder):
    path = folder / "labels" / "a.png"
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(ValueError, match=r"a.png: can't be read"):
        labels_of(open_folder(folder))
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a.png: not a PNG file, or damaged"):
        labels_of(open_folder(folder))
    write_photograph(path.with_suffix(".jpg"))
    path.unlink()
    with pytest.raises(ValueError, match=r"a.png: missing; every image needs .* \(there is a.jpg, but labels must"):
        labels_of(open_folder(folder))
    path.with_suffix(".jpg").unlink()
    with pytest.raises(ValueError, match=r"a.png: missing; every image needs .* \(give it one"):
        labels_of(open_folder(folder))


def test_a_decompression_bomb_is_refused_by_its_size(folder):
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100)))):
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    (folder / "labels" / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.png: "):
        labels_of(open_folder(folder))


def test_what_the_system_refuses_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        main(["data", "prepare", "folder", "--source", str(folder), "--out", str(tmp_path / "file" / "out")])
    error = capsys.readouterr().err
    assert caught.value.code == 1 and error.count("\n") == 1 and "Not a directory" in error


def test_two_photographs_of_one_stem_are_left_out_without_a_choice(folder, tmp_path):
    write_photograph(folder / "images" / "a.png")
    manifest = prepare(open_folder(folder), "folder", tmp_path / "out")
    assert list(manifest.left_out) == ["a.jpg", "a.png"] and manifest.photographs == 1
    assert "a.jpg and a.png have the same stem, so labels could be either's" in manifest.left_out["a.png"]
    (folder / "train.txt").write_text("a.png\nb.2\n")
    assert [image.image.name for image in open_folder(folder).images] == ["a.png", "b.2.jpg"]


def test_what_a_folder_lacks_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no images/, no labels/, no classes.txt; it must hold images/ and"):
        open_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("sky\n")
    with pytest.raises(ValueError, match=r"has no images/, no labels/; it must hold"):
        open_folder(tmp_path)
    (tmp_path / "images").mkdir()
    write_map(tmp_path / "labels" / "a.png", [[0]])
    with pytest.raises(ValueError, match=r"images: no images \(.jpg, .png and the like\)"):
        open_folder(tmp_path)


def test_listed_photographs_that_are_missing_are_left_out_by_name(folder, tmp_path):
    (folder / "train.txt").write_text("a\nlost\nsub/../../secret\n")
    (folder / "val.txt").write_text("b.2\nlost\n")
    manifest = prepare(open_folder(folder), "folder", tmp_path / "out")
    assert manifest.splits == {"train": 1, "val": 1}
    assert list(manifest.left_out) == ["lost", "secret"]
    assert "train.txt: line 2: there is no image 'lost' in" in manifest.left_out["lost"]


# What a viewer does to stored pixels [H, W] by EXIF orientation (EXIF 2.3, tag 0x0112), for the quarter turns.
QUARTER_TURNS = {
    5: lambda stored: stored.T,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].T,
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", QUARTER_TURNS)
def test_labels_drawn_on_stored_pixels_are_turned_with_the_photograph(folder, tmp_path, orientation):
    write_photograph(folder / "images" / "a.jpg", orientation=orientation)
    stored = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
    upright = QUARTER_TURNS[orientation](stored)
    assert upright.shape == (3, 2)
    prepared = []
    for values in (stored, upright):
        write_map(folder / "labels" / "a.png", values)
        out = tmp_path / f"out-{len(prepared)}"
        assert prepare(open_folder(folder), "folder", out).left_out == {}
        image, labels = SegmentationFolder(out, "all")[0]
        assert image.shape[:2] == labels.shape == (3, 2)
        prepared.append(labels)
    expected = np.where(upright == 255, -1, upright.astype(int))
    assert np.array_equal(prepared[0], expected) and np.array_equal(prepared[1], expected)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_where_sizes_can_not_tell_labels_are_of_the_upright_photograph(folder, orientation):
    before = labels_of(open_folder(folder))
    write_photograph(folder / "images" / "a.jpg", orientation=orientation)
    assert labels_of(open_folder(folder)) == before


@pytest.fixture(params=["by photograph", "by word"])
def masked(request, tmp_path):
    """Two photographs with masks of three words; the masks of "a" overlap."""
    masks = {
        ("a", "road"): np.uint8([[255, 255, 255, 0]] * 2),
        ("a", "traffic_light"): np.uint8([[0, 0, 255, 255], [0, 0, 0, 0]]),
        ("b", "sky"): np.uint8([[1, 0, 0, 0], [1, 1, 0, 0]]),
        ("b", "road"): np.zeros((2, 4), np.uint8),
    }
    for name in "ab":
        write_photograph(tmp_path / "raw" / "images" / f"{name}.jpg", width=4)
    for (name, word), mask in masks.items():
        place = f"{name}/{word}" if request.param == "by photograph" else f"{word}/{name}"
        write_map(tmp_path / "raw" / "masks" / f"{place}.png", mask)
    return tmp_path / "raw"


def test_word_masks(masked):
    source = open_word_masks(masked)
    assert source.vocabulary.names == ["road", "sky", "traffic light"]
    assert labels_of(source) == {"a": [[0, 0, 2, 2], [0, 0, 0, -1]], "b": [[1, -1, -1, -1], [1, 1, -1, -1]]}
    ignored = open_word_masks(masked, ignored="traffic light")
    assert ignored.vocabulary.names == ["road", "sky"]
    assert labels_of(ignored)["a"] == [[0, 0, -1, -1], [0, 0, 0, -1]]


def test_word_masks_beside_the_photographs(masked):
    for path in [*(masked / "masks").iterdir(), *(masked / "images").iterdir()]:
        path.rename(masked / path.name)
    (masked / "masks").rmdir()
    (masked / "images").rmdir()
    source = open_word_masks(masked)
    assert source.vocabulary.names == ["road", "sky", "traffic light"]
    assert labels_of(source)["a"] == [[0, 0, 2, 2], [0, 0, 0, -1]]


def test_word_masks_with_classes_and_lists(masked):
    (masked / "classes.txt").write_text("traffic light\ncar\nway|road\nsky\n")
    (masked / "train.txt").write_text("b\n")
    source = open_word_masks(masked)
    assert source.vocabulary.names == ["traffic light", "car", "way", "sky"]
    assert splits_of(source) == {"b": ("train",)}
    assert labels_of(source) == {"b": [[3, -1, -1, -1], [3, 3, -1, -1]]}
    (masked / "classes.txt").write_text("road\nsky\n")
    (masked / "train.txt").unlink()
    with pytest.raises(ValueError, match=r"masks: there are masks of 'traffic light', which is not in .*classes.txt"):
        open_word_masks(masked)


@pytest.mark.parametrize("by", ["photograph", "word"])
def test_word_masks_of_splits_in_sub_folders(tmp_path, by):
    for split in ("train", "val"):
        write_photograph(tmp_path / "images" / split / "1.jpg", width=2, height=1)
        place = f"{split}/1/cat" if by == "photograph" else f"cat/{split}/1"
        write_map(tmp_path / "masks" / f"{place}.png", [[0, 255 * (split == "val")]])
    source = open_word_masks(tmp_path)
    assert labels_of(source) == {"train_1": [[-1, -1]], "val_1": [[-1, 0]]}


def test_masks_in_other_forms(masked):
    """RGB, a palette whose first colour is white, 1 bit, 16 bits and JPEG: white is the word."""
    road = np.uint8([[255, 255, 255, 0]] * 2)
    palette = Image.fromarray((road == 0).astype(np.uint8), mode="P")
    palette.putpalette([255, 255, 255, 0, 0, 0])
    forms = {
        "png": [Image.fromarray(np.dstack([road] * 3)), palette, Image.fromarray(road > 0)],
        "jpg": [Image.fromarray(road)],
    }
    forms["png"].append(Image.fromarray((road / 255 * 65_535).astype(np.uint16)))
    old = next(path for path in masked.rglob("*.png") if {path.stem, path.parent.name} == {"a", "road"})
    expected = labels_of(open_word_masks(masked))["a"]
    for suffix, images in forms.items():
        for image in images:
            old.unlink(missing_ok=True)
            image.save(old.with_suffix(f".{suffix}"), **({"quality": 95} if suffix == "jpg" else {}))
            assert labels_of(open_word_masks(masked))["a"] == expected


def test_imperfect_word_masks_are_named(masked):
    file = next(path for path in masked.rglob("*.png") if {path.stem, path.parent.name} == {"a", "road"})
    write_map(file, [[0, 5, 5, 5]] * 2)
    with pytest.raises(ValueError, match=r"its brightest pixel is 5; a mask is black and white"):
        labels_of(open_word_masks(masked))
    write_map(file, [[0, 255]] * 4)
    with pytest.raises(ValueError, match=r"png: is 2x4, its image 4x2"):
        labels_of(open_word_masks(masked))
    write_photograph(masked / "images" / "c.jpg")
    manifest = prepare(open_word_masks(masked), "word-masks", masked.parent / "out")
    assert "no mask of c.jpg; leave it out" in manifest.left_out["c"]
    assert sorted(manifest.left_out) == ["a", "c"] and manifest.splits == {"all": 1}


def test_word_masks_without_masks(tmp_path):
    write_photograph(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"no mask of an image; they are masks/NAME/WORD.png or masks/WORD/"):
        open_word_masks(tmp_path)


def test_of_equal_masks_the_later_is_on_top():
    layers = Layers((1, 3))
    for label, mask in enumerate(([1, 1, 0], [0, 1, 1], [1, 1, 1])):
        layers.add(np.array([mask], bool), label)
    assert layers.labels.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(
    ("name", "options", "splits", "classes", "lost"),
    [
        pytest.param("camvid", [], {"train": 367, "val": 101, "test": 120}, 11, 0, marks=pytest.mark.slow),
        pytest.param("labelmefacade", [], {"train": 99, "test": 295}, 8, 6, marks=pytest.mark.slow),
        pytest.param(
            "clothing_coparsing", ["ignored=background"], {"train": 804, "test": 100}, 58, 0, marks=pytest.mark.slow
        ),
        ("coco_mini", ["ignored=background"], {"tiny_train": 50, "tiny_val": 50}, 80, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*listed images")
def test_real_sets(tmp_path, capsys, name, options, splits, classes, lost):
    """Through the command: the prepared labels are those that the raw folder gives, photograph by photograph."""
    raw = SHARED / name
    if not raw.exists():
        pytest.skip(f"needs {raw}")
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "data",
                "prepare",
                "folder",
                *options,
                "--source",
                str(raw),
                "--out",
                str(tmp_path / "out"),
                "--workers",
                "1",
            ]
        )
    assert (caught.value.code or 0) == (1 if lost else 0)
    assert capsys.readouterr().err.count("left out: ") == lost
    for split, count in splits.items():
        ignored = [option.removeprefix("ignored=") for option in options]
        before, after = SegmentationFolder(raw, split, ignored=ignored), SegmentationFolder(tmp_path / "out", split)
        assert len(after) == len(before) and len(after) == count
        assert len(after.vocabulary.names) == classes and after.vocabulary == before.vocabulary
        for index in range(0, len(after), 23):
            assert after.name(index) == before.name(index)
            assert all(np.array_equal(mine, theirs) for mine, theirs in zip(after[index], before[index], strict=True))


def prepared(capsys, name: str, source: Path, out: Path, *options: str) -> tuple[int, list[str]]:
    """The exit code of `opensan data prepare`, and the lines on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(["data", "prepare", name, *options, "--source", str(source), "--out", str(out)])
    return caught.value.code or 0, capsys.readouterr().err.splitlines()


def test_files_that_no_one_uses_are_named(folder, tmp_path, capsys):
    (folder / "images" / "c.HEIC").write_bytes(b"x")
    (folder / "images" / "d").write_bytes(b"an image without suffix")
    for name in ("c", "lost"):  # c's image is named already
        write_map(folder / "labels" / f"{name}.png", [[0, 1, 2]] * 2)
    (folder / "images" / "Thumbs.db").write_bytes(b"x")
    code, lines = prepared(capsys, "folder", folder, tmp_path / "out")
    left_out = [line.removeprefix("left out: ").partition(": ")[0] for line in lines if line.startswith("left out")]
    assert (code, left_out) == (1, ["images/c.HEIC", "images/d", "labels/lost.png"])
    with pytest.raises(SystemExit):
        main(["data", "check", str(tmp_path / "out")])
    assert "images/c.HEIC: was left out when it was prepared: HEIC files can't be read" in capsys.readouterr().err


def test_masks_and_images_of_masks_that_no_one_uses_are_named(masked, tmp_path, capsys):
    by_word = (masked / "masks" / "road").is_dir()
    (masked / "images" / "c.heic").write_bytes(b"x")
    for name in ("c", "lost"):
        write_map(masked / "masks" / (f"road/{name}.png" if by_word else f"{name}/road.png"), [[255] * 4] * 2)
    code, lines = prepared(capsys, "word-masks", masked, tmp_path / "out")
    lost = "masks/road/lost.png" if by_word else "masks/lost/road.png"
    left_out = [line.removeprefix("left out: ").partition(": ")[0] for line in lines if line.startswith("left out")]
    assert (code, left_out) == (1, ["images/c.heic", lost])


def test_word_masks_never_take_images_for_masks(tmp_path):
    """Masks a folder a word, and images in a folder, all beside one another."""
    rng = np.random.default_rng(3)
    for name in "ab":
        write_map(tmp_path / "images" / f"{name}.png", rng.integers(0, 256, (2, 4, 3)))
        write_map(tmp_path / "car" / f"{name}.png", [[255, 0, 0, 0]] * 2)
    source = open_word_masks(tmp_path)
    assert source.vocabulary.names == ["car"]
    assert labels_of(source) == {name: [[0, -1, -1, -1]] * 2 for name in "ab"}
    for picture, what in (
        (rng.integers(0, 256, (2, 4, 3)), "has colours"),
        (np.linspace(0, 255, 8).reshape(2, 4), "has many greys"),
    ):
        write_map(tmp_path / "car" / "a.png", picture)
        with pytest.raises(ValueError, match=f"a.png: {what}, as a picture and not a mask"):
            labels_of(open_word_masks(tmp_path))


@pytest.mark.parametrize(
    "line", ["images/{0}.jpg labels/{0}.png", "{0}.jpg,labels/{0}.png", "images\\{0}.jpg\tlabels\\{0}.png"]
)
def test_lists_of_pairs_are_splits(folder, line):
    (folder / "train.txt").write_text(line.format("a") + "\n")
    (folder / "val.txt").write_text(line.format("b.2") + "\n")
    source = open_folder(folder)
    assert splits_of(source) == {"a": ("train",), "b.2": ("val",)}
    assert labels_of(source)["b.2"] == [[0, 1, 2], [-1, 2, 0]]


def test_absolute_paths_in_lists_and_other_places_of_labels(folder):
    (folder / "train.txt").write_text(f"{folder}/images/a.jpg\n")
    (folder / "val.txt").write_text("/data/of/another/machine/images/b.2.jpg\n")
    assert splits_of(open_folder(folder)) == {"a": ("train",), "b.2": ("val",)}
    write_map(folder / "second" / "a.png", [[2, 2, 2]] * 2)
    (folder / "train.txt").write_text("images/a.jpg second/a.png\n")
    assert labels_of(open_folder(folder))["a"] == [[2, 2, 2]] * 2
    (folder / "train.txt").write_text("images/a.jpg ../../secret.png\n")
    with pytest.raises(ValueError, match=r"train.txt: line 1: '../../secret.png' is no path below the folder"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["train.txt", "val.txt", "test_1.txt", "valid.txt"])
def test_a_list_of_a_split_that_fits_nothing_is_no_accident(folder, name):
    (folder / name).write_text("0001\n0002\n")
    with pytest.raises(ValueError, match=r"names no image in .* \(its first line is '0001'\)"):
        open_folder(folder)


def test_images_in_no_list_are_told(folder, tmp_path, capsys):
    (folder / "train.txt").write_text("a\n")
    assert (
        "note: 1 images stand in no list, and are not used" in prepared(capsys, "folder", folder, tmp_path / "out")[1]
    )


def test_labels_that_count_from_one(folder, tmp_path, capsys):
    write_map(folder / "labels" / "a.png", [[0, 1, 2]] * 2)
    write_map(folder / "labels" / "b.2.png", [[1, 2, 3]] * 2)
    code, lines = prepared(capsys, "folder", folder, tmp_path / "out")
    assert code == 1 and len(lines) == 1
    assert "the value 3 is in 1 of the label files" in lines[0] and "say first=1" in lines[0]
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert labels_of(open_folder(folder, first="1")) == {"a": [[-1, 0, 1]] * 2, "b.2": [[0, 1, 2]] * 2}
    code, lines = prepared(capsys, "folder", folder, tmp_path / "zero", "first=0")
    assert code == 1 and "b.2.png: 2 pixels hold the value 3" in lines[-2]
    assert "unlabelled=3" in lines[-2] and "first=1" not in lines[-2]
    # One file that holds quite another value too is a fault of that file.
    write_map(folder / "labels" / "b.2.png", [[1, 3, 9]] * 2)
    code, lines = prepared(capsys, "folder", folder, tmp_path / "nine")
    assert code == 1 and "hold the value 9" in lines[-2]
    with pytest.raises(ValueError, match="first=2: must be 0 or 1"):
        open_folder(folder, first="2")


def test_a_first_class_without_pixels_is_told_with_what_it_may_mean(folder, tmp_path, capsys):
    for name in ("a", "b.2"):
        write_map(folder / "labels" / f"{name}.png", [[1, 2, 2]] * 2)
    code, lines = prepared(capsys, "folder", folder, tmp_path / "out")
    assert code == 0
    assert any("no label file holds the value 0" in line and "first=1" in line for line in lines)


def test_voc_s_own_folders(tmp_path):
    for name, values in (("a", [[0, 1, 2]] * 2), ("b", [[2, 2, 255]] * 2)):
        write_photograph(tmp_path / "JPEGImages" / f"{name}.jpg")
        image = Image.fromarray(np.array(values, np.uint8), mode="P")
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [224, 224, 192] * 253)
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        image.save(tmp_path / "SegmentationClass" / f"{name}.png")
        lists = tmp_path / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{'train' if name == 'a' else 'val'}.txt").write_text(f"{name}\n")
    (tmp_path / "class_names.txt").write_text("_background_\ncar\nperson\n")
    source = open_folder(tmp_path, ignored="_background_")
    assert splits_of(source) == {"a": ("train",), "b": ("val",)}
    assert labels_of(source) == {"a": [[-1, 0, 1]] * 2, "b": [[1, 1, -1]] * 2}
    assert "_background_" in open_folder(tmp_path).notes[0]


def test_a_label_map_with_colours_is_read_by_them(tmp_path):
    """As CVAT writes it: labelmap.txt, and labels in its colours."""
    write_photograph(tmp_path / "JPEGImages" / "a.jpg")
    write_map(tmp_path / "SegmentationClass" / "a.png", [[(0, 0, 0), (250, 50, 83), (1, 2, 3)]] * 2)
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:250,50,83::\nsky:1,2,3::\n"
    )
    assert labels_of(open_folder(tmp_path)) == {"a": [[0, 1, 2]] * 2}
    write_map(tmp_path / "SegmentationClass" / "a.png", [[(0, 0, 0), (250, 50, 83), (1, 2, 4)]] * 2)
    with pytest.raises(ValueError, match=r"colour 1 2 4, which is not in labelmap.txt"):
        labels_of(open_folder(tmp_path))
    (tmp_path / "labelmap.txt").write_text("background:0,0::\n")
    with pytest.raises(ValueError, match=r"labelmap.txt: line 1: '0,0' is not label:R,G,B::"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "hint"),
    [
        ("a.json", '{"version": "5", "shapes": []}', "data prepare labelme"),
        ("annotations/instances_val.json", '{"images": [], "annotations": []}', "data prepare coco-instances"),
        ("labels/train/a.txt", "0 0.1 0.1 0.9 0.1 0.9 0.9\n", "data prepare yolo-seg"),
        ("data/train-00000-of-00001.parquet", "PAR1", "data prepare huggingface"),
    ],
)
def test_another_form_is_known_and_named(tmp_path, file, content, hint):
    write_photograph(tmp_path / "a.jpg")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=rf"it must hold images/ and labels/NAME.png .*{hint}"):
        open_folder(tmp_path)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="file names of any bytes are POSIX's")
def test_a_file_name_that_is_no_utf_8_and_one_that_is_too_long_cost_themselves_alone(folder, tmp_path, capsys):
    import os

    long = "x" * 230
    for name in (os.fsdecode(b"caf\xe9"), long):
        write_photograph(folder / "images" / f"{name}.jpg")
        write_map(folder / "labels" / f"{name}.png", [[0, 1, 2]] * 2)
    for _ in range(2):
        code, lines = prepared(capsys, "folder", folder, tmp_path / "out")
        assert code == 1 and len([line for line in lines if line.startswith("left out: ")]) == 2
        assert read_manifest(tmp_path / "out").photographs == 2


def test_suffixes_and_lists_in_capitals_and_utf_16(folder):
    (folder / "labels" / "a.png").rename(folder / "labels" / "a.PNG")
    (folder / "TRAIN.TXT").write_bytes("a\r\n".encode("utf-16"))
    (folder / "val.txt").write_text("b.2\n")
    source = open_folder(folder)
    assert splits_of(source) == {"a": ("TRAIN",), "b.2": ("val",)}
    assert labels_of(source)["a"] == [[0, 1, 1], [-1, 2, 0]]
