"""Label folders and training augmentation."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensan.data.augment import PADDING_GREY, AugmentConfig, augment, jitter_colours
from opensan.data.segmentation_folder import SegmentationFolder

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def folder(tmp_path):
    """Two photographs, 6x4 (width x height), of three classes; one name has dots."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "classes.txt").write_text("background\ncar|automobile\nsky\n")
    (tmp_path / "train.txt").write_text("street\nimg-10.21op9\n")
    for number, name in enumerate(("street", "img-10.21op9")):
        Image.new("RGB", (6, 4), (10 * number, 20, 30)).save(tmp_path / "images" / f"{name}.png")
        write_labels(tmp_path, name, np.array([[0, 1, 2, 255, number, 1]] * 4, np.uint8))
    return tmp_path


def write_labels(folder: Path, name: str, values: np.ndarray) -> None:
    Image.fromarray(values).save(folder / "labels" / f"{name}.png")


def test_labels_are_class_indices_and_unlabelled_is_minus_one(folder):
    data = SegmentationFolder(folder, "train")
    assert (len(data), data.name(1), data.vocabulary.names) == (2, "img-10.21op9", ["background", "car", "sky"])
    assert data.vocabulary.words[1].synonyms == ("car", "automobile")
    image, labels = data[1]
    assert (image.shape, image.dtype, image[0, 0].tolist()) == ((4, 6, 3), np.uint8, [10, 20, 30])
    assert (labels.dtype, labels[0].tolist()) == (np.int16, [0, 1, 2, -1, 1, 1])


def test_an_ignored_class_becomes_unlabelled_and_the_others_move_up(folder):
    data = SegmentationFolder(folder, "train", ignored=["background"])
    assert data.vocabulary.names == ["car", "sky"]
    assert data[0][1][0].tolist() == [-1, 0, 1, -1, -1, 0]
    with pytest.raises(ValueError, match="has no class tree to ignore"):
        SegmentationFolder(folder, "train", ignored=["tree"])


def test_sixteen_bits_and_palettes(folder):
    # In 16 bits 255 is a class like any other, and 65535 is unlabelled.
    (folder / "classes.txt").write_text("".join(f"class {number}\n" for number in range(847)))
    write_labels(folder, "street", np.array([[0, 255, 846, 65535, 1, 1]] * 4, np.uint16))
    palette = Image.fromarray(np.array([[3, 0, 255, 2, 1, 1]] * 4, np.uint8), mode="P")
    palette.putpalette([value for number in range(256) for value in (number, 255 - number, 7)])
    palette.save(folder / "labels" / "img-10.21op9.png")
    data = SegmentationFolder(folder, "train")
    assert data[0][1][0].tolist() == [0, 255, 846, -1, 1, 1]
    assert data[1][1][0].tolist() == [3, 0, -1, 2, 1, 1]


def test_lists_may_name_files_and_missing_photographs_are_left_out_by_name(folder):
    (folder / "train.txt").write_text("street.png\n\nimg-10.21op9.png\nlost\n", encoding="utf-8-sig")
    with pytest.warns(UserWarning, match=r"1 of 3 listed images .* left out: lost"):
        data = SegmentationFolder(folder, "train")
    assert [data.name(index) for index in range(len(data))] == ["street", "img-10.21op9"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 6), 3, np.uint8), r"street.png: holds the value 3; classes.txt has 3 classes"),
        (np.zeros((6, 4), np.uint8), r"street.png: is 4x6, its image 6x4"),
        (np.zeros((4, 6, 3), np.uint8), r"street.png: an image of mode RGB, not an index PNG"),
    ],
)
def test_wrong_labels_are_named(folder, values, message):
    write_labels(folder, "street", values)
    with pytest.raises(ValueError, match=message):
        SegmentationFolder(folder, "train")[0]


def test_missing_and_damaged_files_are_named(folder):
    with pytest.raises(ValueError, match=r"test.txt: does not exist"):
        SegmentationFolder(folder, "test")
    (folder / "labels" / "street.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"street.png: not a readable label PNG"):
        SegmentationFolder(folder, "train")[0]
    (folder / "labels" / "street.png").unlink()
    with pytest.raises(ValueError, match=r"street.png: not a readable label PNG"):
        SegmentationFolder(folder, "train")[0]


def test_labels_that_claim_to_be_enormous_are_named(folder):
    file = folder / "labels" / "street.png"
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(b"\0")]
    framed = (struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
    with pytest.raises(ValueError, match=r"street.png: not a readable label PNG"):
        SegmentationFolder(folder, "train")[0]


@pytest.mark.parametrize(
    ("name", "split", "ignored", "count", "classes"),
    [
        ("camvid", "train", [], 367, 11),
        ("camvid", "test", [], 120, 11),
        ("labelmefacade", "train", [], None, 8),
        ("coco_mini", "tiny_val", ["background"], 50, 80),
        ("clothing_coparsing", "test", ["background"], 100, 58),
    ],
)
@pytest.mark.filterwarnings("ignore:.*listed images")
def test_real_sets(name, split, ignored, count, classes):
    if not (SHARED / name).exists():
        pytest.skip(f"needs {SHARED / name}")
    data = SegmentationFolder(SHARED / name, split, ignored=ignored)
    assert len(data.vocabulary.names) == classes
    assert count is None or len(data) == count
    for index in (0, len(data) - 1):
        image, labels = data[index]
        assert labels.shape == image.shape[:2]
        assert labels.min() >= -1 and labels.max() < classes


def checkerboard(height: int, width: int, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """A photograph whose colour says the label: 0 dark, 1 bright; left half red, right half green."""
    rows, columns = np.mgrid[:height, :width]
    labels = ((rows // cell + columns // cell) % 2).astype(np.int16)
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.where(columns < width // 2, 60 + 150 * labels, 0)
    image[..., 1] = np.where(columns >= width // 2, 60 + 150 * labels, 0)
    return image, labels


def test_augmentation_is_a_function_of_its_generator():
    image, labels = checkerboard(120, 160, 20)
    config = AugmentConfig(short_sides=(60, 90, 150), crop=(64, 96))
    one = [augment(image, labels, config, np.random.default_rng([5, n])) for n in range(8)]
    two = [augment(image, labels, config, np.random.default_rng([5, n])) for n in range(8)]
    for (image_1, labels_1), (image_2, labels_2) in zip(one, two, strict=True):
        assert np.array_equal(image_1, image_2) and np.array_equal(labels_1, labels_2)
    assert len({image.tobytes() for image, _ in one}) > 4
    assert {(image.shape, image.dtype, labels.shape, labels.dtype) for image, labels in one} == {
        ((64, 96, 3), np.dtype(np.uint8), (64, 96), np.dtype(np.int16))
    }


def test_labels_stay_on_their_pixels():
    image, labels = checkerboard(200, 260, 40)
    config = AugmentConfig(short_sides=(100, 170, 300), crop=(96, 128), colour_jitter=False)
    wrong = []
    for seed in range(20):
        crop, crop_labels = augment(image, labels, config, np.random.default_rng(seed))
        assert (crop_labels >= 0).all()
        seen = (crop.max(axis=2) > 135).astype(np.int16)
        wrong.append((seen != crop_labels).mean())
    assert max(wrong) < 0.03  # interpolated edges only
    assert np.mean(wrong) < 0.01


def test_flipping_happens_half_of_the_time():
    image, labels = checkerboard(64, 64, 8)
    config = AugmentConfig(short_sides=(64,), crop=(64, 64), colour_jitter=False)
    red_left = [augment(image, labels, config, np.random.default_rng(s))[0][0, 0, 0] > 0 for s in range(200)]
    assert 70 < sum(red_left) < 130
    never = AugmentConfig(short_sides=(64,), crop=(64, 64), colour_jitter=False, flip=0)
    kept, kept_labels = augment(image, labels, never, np.random.default_rng(0))
    assert np.array_equal(kept, image) and np.array_equal(kept_labels, labels)


def test_a_crop_equals_the_crop_of_the_resized_photograph():
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC))
    labels = np.arange(120 * 160).reshape(120, 160).astype(np.int16)
    config = AugmentConfig(short_sides=(90,), crop=(64, 64), colour_jitter=False, flip=0)
    whole = AugmentConfig(short_sides=(90,), crop=(90, 120), colour_jitter=False, flip=0)
    full, full_labels = augment(image, labels, whole, np.random.default_rng(0))
    assert np.array_equal(full, np.asarray(Image.fromarray(image).resize((120, 90), Image.Resampling.BILINEAR)))
    crop, crop_labels = augment(image, labels, config, np.random.default_rng(3))
    top, left = (int(place[0]) for place in np.nonzero(full_labels == crop_labels[0, 0]))
    assert np.array_equal(crop_labels, full_labels[top : top + 64, left : left + 64])
    difference = np.abs(crop.astype(int) - full[top : top + 64, left : left + 64])
    assert difference.max() <= 2 and difference.mean() < 0.5  # rounding


def test_what_a_crop_lacks_is_grey_and_unlabelled():
    image, labels = checkerboard(40, 80, 10)
    config = AugmentConfig(short_sides=(40,), crop=(64, 64), colour_jitter=False)
    crop, crop_labels = augment(image, labels, config, np.random.default_rng(0))
    assert (crop[40:] == PADDING_GREY).all() and (crop_labels[40:] == -1).all()
    assert (crop_labels[:40] >= 0).all()


def test_the_long_side_has_a_limit():
    image, labels = checkerboard(20, 400, 10)
    config = AugmentConfig(short_sides=(40,), long_side=200, crop=(32, 224), colour_jitter=False)
    _, crop_labels = augment(image, labels, config, np.random.default_rng(0))
    assert (crop_labels >= 0).sum() == 10 * 200


def test_colour_jitter_changes_what_it_should():
    grey = np.full((8, 8, 3), 120, np.uint8)
    changed = np.stack([jitter_colours(grey, np.random.default_rng(seed)) for seed in range(400)])
    # Grey has no hue and no saturation to change; its level moves by 32 at most and by half at most.
    assert (changed == changed[:, :1, :1, :1]).all()
    levels = changed[:, 0, 0, 0].astype(int)
    assert levels.min() >= (120 - 32) // 2 and levels.max() <= (120 + 32) * 1.5
    assert 60 < (levels == 120).sum() < 140  # neither brightness nor contrast: a quarter
    red = np.full((1, 1, 3), (200, 40, 40), np.uint8)
    hues = np.stack([jitter_colours(red, np.random.default_rng(seed)) for seed in range(200)])
    hue = np.array([Image.fromarray(one).convert("HSV").getpixel((0, 0))[0] for one in hues])
    distance = np.minimum(hue, 256 - hue)
    assert distance.max() <= 28 and (distance > 5).sum() > 50  # +-36 degrees of 360, in 256 steps
