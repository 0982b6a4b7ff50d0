"""Readers of the six benchmarks, on small files made in the raw formats, value for value against maps made by hand."""

import collections
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from opensan.data.canonical import DatasetManifest, read_manifest
from opensan.data.prepare import READERS, full_ade
from opensan.data.prepare.engine import prepare
from opensan.data.prepare.pickle_data import Placeholder, read_pickle_data
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.vocabulary import Vocabulary


def photograph(path: Path, size: tuple[int, int] = (2, 3), seed: int = 0) -> None:
    """A JPEG of `size` (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def label_png(path: Path, values: list | np.ndarray, *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8), mode="P" if palette else None)
    if palette:
        image.putpalette([value for number in range(256) for value in (number, 255 - number, 7)])
    image.save(path)


def label_mat(path: Path, values: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"LabelMap": np.array(values, np.uint16)})


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def prepared(name: str, source: Path, out: Path, splits: list[str] | None = None) -> DatasetManifest:
    return prepare(READERS[name].open(source), name, out, splits=splits)


def labels(out: Path, split: str, index: int = 0) -> list:
    return SegmentationFolder(out, split)[index][1].tolist()


def stored(out: Path, name: str) -> tuple[np.dtype, list]:
    with Image.open(out / "labels" / f"{name}.png") as file:
        values = np.asarray(file)
        return values.dtype if file.mode != "I;16" else np.dtype(np.uint16), values.tolist()


def test_coco_stuff_has_gaps_in_its_ids(tmp_path):
    raw = tmp_path / "coco"
    photograph(raw / "val2017" / "000000000139.jpg")
    # Ids less one: person 1, bicycle 2, street sign 12 (of no class), stop sign 13, banner 92, wood 182; then 255, 183.
    label_png(raw / "stuffthingmaps" / "val2017" / "000000000139.png", [[0, 1, 11], [12, 91, 181]])
    photograph(raw / "train2017" / "000000000009.jpg")
    label_png(raw / "stuffthingmaps" / "train2017" / "000000000009.png", [[255, 182, 0], [10, 9, 25]])
    manifest = prepared("coco_stuff_171", raw, tmp_path / "out")
    assert manifest.splits == {"train": 1, "val": 1}
    assert (manifest.evaluation_split, manifest.label_set) == ("val", "coco_stuff_171")
    names = Vocabulary.ready("coco_stuff_171").names
    # COCO's things have 80 of the ids 1..90: 12 and 26 are among those left out.
    assert labels(tmp_path / "out", "val") == [[0, 1, -1], [11, 80, 170]]
    assert [names[index] for index in (0, 1, 11, 170)] == ["person", "bicycle", "stop sign", "wood"]
    assert labels(tmp_path / "out", "train") == [[-1, -1, 0], [10, 9, -1]]
    assert [names[index] for index in (9, 10)] == ["traffic light", "fire hydrant"]
    assert stored(tmp_path / "out", "000000000139") == (np.uint8, [[0, 1, 255], [11, 80, 170]])
    assert (tmp_path / "out" / "images" / "000000000139.jpg").resolve() == raw / "val2017" / "000000000139.jpg"
    assert SegmentationFolder(tmp_path / "out", "val").vocabulary == Vocabulary.ready("coco_stuff_171")


def test_coco_stuff_finds_the_folders_that_people_make(tmp_path):
    photograph(tmp_path / "images" / "val2017" / "a.jpg")
    label_png(tmp_path / "annotations" / "val2017" / "a.png", [[0, 1, 2], [3, 4, 5]])
    source = READERS["coco_stuff_171"].open(tmp_path)
    assert [(photo.name, photo.splits) for photo in source.images] == [("a", ("val",))]
    photograph(tmp_path / "images" / "train2017" / "b.jpg")
    # Labels come for both splits in one file, so that one may be there without its images.
    source = READERS["coco_stuff_171"].open(tmp_path)
    with pytest.raises(ValueError, match=r"train: there is images/train2017/ without its labels; .* say --split val"):
        prepare(source, "coco_stuff_171", tmp_path / "out")
    with pytest.raises(ValueError, match=r"train: there is images/train2017/ without its labels$"):
        prepare(source, "coco_stuff_171", tmp_path / "out", splits=["train"])
    assert prepare(source, "coco_stuff_171", tmp_path / "out", splits=["val"]).splits == {"val": 1}


def test_a_photograph_or_label_that_was_not_downloaded_is_named(tmp_path):
    photograph(tmp_path / "val2017" / "whole.jpg")
    photograph(tmp_path / "val2017" / "unlabelled.jpg")
    for name in ("whole", "unseen"):
        label_png(tmp_path / "stuffthingmaps" / "val2017" / f"{name}.png", [[0, 1, 2], [3, 4, 5]])
    left_out = prepared("coco_stuff_171", tmp_path, tmp_path / "out").left_out
    assert list(left_out) == ["unlabelled", "unseen"]
    assert left_out["unlabelled"].endswith("stuffthingmaps/val2017/unlabelled.png: there is no such label file")
    assert "val2017/unseen.jpg: can't be read" in left_out["unseen"]


def test_voc_moves_down_by_one_and_leaves_background_and_borders_unlabelled(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name, values in {"2007_000033": [[0, 1, 2], [255, 20, 15]], "2007_000032": [[5, 5, 5], [0, 0, 0]]}.items():
        photograph(root / "JPEGImages" / f"{name}.jpg")
        label_png(root / "SegmentationClass" / f"{name}.png", values, palette=True)
    photograph(root / "JPEGImages" / "2008_without_mask.jpg")
    text(root / "ImageSets" / "Segmentation" / "val.txt", "2007_000033")
    text(root / "ImageSets" / "Segmentation" / "train.txt", "2007_000032", "")
    assert prepared("pascal_voc_20", tmp_path, tmp_path / "out").splits == {"train": 1, "val": 1}
    assert labels(tmp_path / "out", "val") == [[-1, 0, 1], [-1, 19, 14]]
    assert labels(tmp_path / "out", "train") == [[4, 4, 4], [-1, -1, -1]]
    assert (tmp_path / "out" / "val.txt").read_text() == "2007_000033.jpg\n"
    # The same from inside the download, and one split alone.
    assert prepared("pascal_voc_20", root, tmp_path / "val", ["val"]).splits == {"val": 1}


def test_a_value_that_the_format_does_not_have_is_an_error(tmp_path):
    photograph(tmp_path / "JPEGImages" / "a.jpg")
    label_png(tmp_path / "SegmentationClass" / "a.png", [[0, 1, 2], [21, 0, 0]], palette=True)
    text(tmp_path / "ImageSets" / "Segmentation" / "val.txt", "a")
    left_out = prepared("pascal_voc_20", tmp_path, tmp_path / "out").left_out
    assert left_out["a"].endswith("a.png: holds the value 21, which the format does not have")


@pytest.fixture
def context(tmp_path) -> Path:
    """VOC2010 with Pascal Context's labels: 2 aeroplane, 9 bag, 458 wood and others in the numbering of 459."""
    root = tmp_path / "VOCdevkit" / "VOC2010"
    for name, values in {
        "2008_000002": [[2, 9, 1], [459, 0, 256]],
        "2008_000003": [[18, 18, 23], [458, 115, 3]],
    }.items():
        photograph(root / "JPEGImages" / f"{name}.jpg")
        label_mat(root / "trainval" / f"{name}.mat", values)
    return root


def detail_json(path: Path) -> None:
    """trainval_merged.json, as far as it matters; a category too has a list called "images"."""
    images = [
        {"file_name": "2008_000002.jpg", "image_id": 2008000002, "phase": "val", "width": 3, "height": 2},
        {"file_name": "2008_000003.jpg", "image_id": 2008000003, "phase": "train", "width": 3, "height": 2},
        {"file_name": "2008_000001.jpg", "image_id": 2008000001, "phase": "test", "width": 3, "height": 2},
    ]
    path.write_text(
        json.dumps({"categories": [{"name": "aeroplane", "images": [2]}], "images": images, "annos_segmentation": []})
    )


def test_pascal_context_459(context, tmp_path):
    detail_json(context / "trainval_merged.json")
    manifest = prepared("pascal_context_459", tmp_path, tmp_path / "out")
    assert (manifest.splits, manifest.label_set) == ({"train": 1, "val": 1}, "pascal_context_459")
    assert labels(tmp_path / "out", "val") == [[1, 8, 0], [458, -1, 255]]
    assert stored(tmp_path / "out", "2008_000002") == (np.uint16, [[1, 8, 0], [458, 65535, 255]])
    assert labels(tmp_path / "out", "train") == [[17, 17, 22], [457, 114, 2]]


def test_pascal_context_59_has_a_part_of_the_459(context, tmp_path):
    detail_json(context / "trainval_merged.json")
    prepared("pascal_context_59", context, tmp_path / "out")
    # By name: aeroplane (2) and bag (9) are its first two; 1, 3, 256 and 459 are none of the 59.
    assert labels(tmp_path / "out", "val") == [[0, 1, -1], [-1, -1, -1]]
    names, of_459 = (Vocabulary.ready(f"pascal_context_{count}").names for count in (59, 459))
    expected = [[names.index(of_459[value - 1]) for value in row] for row in ([18, 18, 23], [458, 115])]
    found = labels(tmp_path / "out", "train")
    assert [found[0], found[1][:2], found[1][2]] == [*expected, -1]
    assert stored(tmp_path / "out", "2008_000002")[0] == np.uint8


def test_pascal_context_takes_split_lists_as_text(context, tmp_path):
    with pytest.raises(ValueError, match=r"there are no split lists; .*trainval_merged.json, or train.txt and val.txt"):
        READERS["pascal_context_59"].open(tmp_path)
    text(context / "pascalcontext_val.txt", "2008_000003")
    (only,) = READERS["pascal_context_59"].open(tmp_path).images
    assert (only.name, only.splits) == ("2008_000003", ("val",))


def test_a_broken_mat_is_named(context, tmp_path):
    text(context / "val.txt", "2008_000002", "2008_000003", "2008_000009")
    photograph(context / "JPEGImages" / "2008_000009.jpg")
    path = context / "trainval" / "2008_000002.mat"
    path.write_bytes(path.read_bytes()[:150])
    scipy.io.savemat(context / "trainval" / "2008_000003.mat", {"LabelMap": np.zeros((2, 3))})
    left_out = prepared("pascal_context_59", tmp_path, tmp_path / "out").left_out
    assert "2008_000002.mat: not a readable .mat file" in left_out["2008_000002"]
    assert left_out["2008_000003"].endswith("its LabelMap is not a matrix of whole numbers")
    assert left_out["2008_000009"].endswith("2008_000009.mat: there is no such label file")


def test_ade20k_150(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    photograph(root / "images" / "validation" / "ADE_val_00000001.jpg")
    label_png(root / "annotations" / "validation" / "ADE_val_00000001.png", [[0, 1, 2], [150, 17, 3]])
    assert prepared("ade20k_150", tmp_path, tmp_path / "out").splits == {"val": 1}
    assert labels(tmp_path / "out", "val") == [[-1, 0, 1], [149, 16, 2]]
    label_png(root / "annotations" / "validation" / "ADE_val_00000001.png", [[0, 1, 2], [151, 17, 3]])
    assert "holds the value 151" in prepared("ade20k_150", tmp_path, tmp_path / "2").left_out["ADE_val_00000001"]


def colours(ids: np.ndarray) -> np.ndarray:
    """ADE20K's code of class ids: id = (R // 10) * 256 + G; R's last digit and B mean other things."""
    return np.stack([ids // 256 * 10 + 3, ids % 256, np.full_like(ids, 77)], axis=-1).astype(np.uint8)


def full_ade_folder(root: Path, ids: dict[str, np.ndarray], protocol: int = 4, **more: object) -> Path:
    """ADE20K_2021_17_01 with photographs of these class ids, and an index like its authors' with an array beside."""
    folders = {
        name: f"ADE20K_2021_17_01/images/ADE/{'validation' if '_val_' in name else 'training'}/urban/street"
        for name in ids
    }
    for name, values in ids.items():
        file = root.parent / folders[name] / f"{name}.jpg"
        photograph(file, values.shape)
        Image.fromarray(colours(values)).save(file.with_name(f"{name}_seg.png"))
    index = {
        "filename": [f"{name}.jpg" for name in ids],
        "folder": list(folders.values()),
        "objectPresence": np.ones((3, len(ids)), np.float32),
        "description": {"folder": "where it is"},
        "objectnames": np.array(["wall", "sky"], dtype=object),
        "scenes": [np.float64(1.5), 2**40, -1, 0.25, None, True, b"bytes", ("a", 1)],
        **more,
    }
    (root / "index_ade20k.pkl").write_bytes(pickle.dumps(index, protocol))
    return root


@pytest.mark.parametrize("protocol", range(6))
def test_ade20k_847_reads_colours_and_the_index(tmp_path, protocol):
    # wall 2978 is class 0, building 312 class 1, sky 2420 class 2, adding machine 3148 class 846; 1 and 0 none.
    ids = np.array([[2978, 312, 2420], [3148, 1, 0]])
    root = tmp_path / "ADE20K_2021_17_01"
    full_ade_folder(root, {"ADE_val_00000001": ids, "ADE_train_00000007": ids[::-1]}, protocol)
    manifest = prepared("ade20k_847", tmp_path if protocol % 2 else root, tmp_path / "out")
    assert (manifest.splits, manifest.label_set) == ({"train": 1, "val": 1}, "ade20k_847")
    assert labels(tmp_path / "out", "val") == [[0, 1, 2], [846, -1, -1]]
    assert labels(tmp_path / "out", "train") == [[846, -1, -1], [0, 1, 2]]
    assert stored(tmp_path / "out", "ADE_val_00000001") == (np.uint16, [[0, 1, 2], [846, 65535, 65535]])
    assert (tmp_path / "out" / "images" / "ADE_val_00000001.jpg").is_symlink()


def test_ade20k_847_scales_short_sides_above_512(tmp_path):
    # Four quarters of a class each; 1030 is 512 x 2.01, so that places are not whole.
    ids = np.full((1030, 1545), 2978)
    ids[515:] = 312
    ids[:, 772:] += 2420 - 2978
    ids[515:, 772:] = 3148
    root = full_ade_folder(tmp_path / "ADE20K_2021_17_01", {"ADE_val_00000001": ids})
    prepared("ade20k_847", root, tmp_path / "out")
    image, found = SegmentationFolder(tmp_path / "out", "val")[0]
    assert image.shape == (512, 768, 3) and found.shape == (512, 768)  # 1545 / 1030 x 512 = 768
    # floor(i x 1030 / 512) reaches row 515 at i = 256, floor(i x 1545 / 768) column 772 at i = 384 (772.5).
    expected = np.zeros((512, 768), np.int16)
    expected[256:], expected[:, 384:], expected[256:, 384:] = 1, 2, 846
    assert np.array_equal(found, expected)
    file = tmp_path / "out" / "images" / "ADE_val_00000001.jpg"
    with Image.open(file) as written:
        assert written.format == "JPEG" and not file.is_symlink()


def test_the_scaled_size_is_that_of_the_published_preparation():
    assert full_ade.scaled_size((512, 4000)) == (512, 4000)
    assert full_ade.scaled_size((513, 513)) == (512, 512)
    assert full_ade.scaled_size((600, 800)) == (512, 683)
    assert full_ade.scaled_size((1024, 683)) == (768, 512)  # 767.67


def test_bilinear_scaling_takes_the_two_nearest_pixels():
    # 6 -> 4: places -0.5 + 1.5 (i + 0.5) = 0.25, 1.75, 3.25, 4.75.
    row = np.array([0, 40, 80, 120, 160, 200], np.uint8)
    image = np.broadcast_to(row[None, :, None], (2, 6, 3))
    assert full_ade.resize_bilinear(image, (2, 4))[1, :, 2].tolist() == [10, 70, 130, 190]
    # Without antialias a single bright pixel between the places is not seen.
    dot = np.zeros((9, 9, 3), np.uint8)
    dot[0, 0] = 255
    assert full_ade.resize_bilinear(dot, (3, 3)).max() == 0


OPENCV = [
    # Size, new size, and of what OpenCV 4.14 makes of noise: sha256's beginning of INTER_LINEAR and of INTER_NEAREST.
    ((700, 530), (676, 512), "9a688db7ebd60cad", "feee154c9857e60f"),
    ((1024, 1300), (512, 650), "64dba87939b0bd97", "e46ce58e6297a05e"),
    ((515, 777), (512, 772), "a00cda462509a61c", "497d884feae42112"),
    ((1200, 1600), (512, 683), "61e6960a161638d8", "1e9b6b3a965cc0d9"),
]


@pytest.mark.parametrize(("old", "new", "linear", "nearest"), OPENCV)
def test_both_resizings_are_opencv_s_in_every_value(old, new, linear, nearest):
    rng = np.random.default_rng(old[0])
    image = rng.integers(0, 256, (*old, 3), dtype=np.uint8)
    labels = rng.integers(0, 3000, old).astype(np.int16)
    assert hashlib.sha256(full_ade.resize_bilinear(image, new)).hexdigest()[:16] == linear
    assert hashlib.sha256(np.ascontiguousarray(full_ade.resize_nearest(labels, new))).hexdigest()[:16] == nearest


def test_both_resizings_against_opencv_itself():
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(7)
    for old in rng.integers(513, 1200, (10, 2)).tolist():
        new = full_ade.scaled_size(tuple(old))
        image = rng.integers(0, 256, (*old, 3), dtype=np.uint8)
        labels = rng.integers(0, 3000, old).astype(np.int16)
        assert np.array_equal(full_ade.resize_bilinear(image, new), cv2.resize(image, new[::-1]))
        nearest = cv2.resize(labels, new[::-1], interpolation=cv2.INTER_NEAREST)
        assert np.array_equal(full_ade.resize_nearest(labels, new), nearest)


def test_an_index_that_names_code_is_refused_and_not_run(tmp_path):
    root = full_ade_folder(tmp_path / "ADE20K_2021_17_01", {"ADE_val_1": np.zeros((2, 3), int)})
    touched = tmp_path / "touched"

    class Hostile:
        def __reduce__(self):
            return Path.touch, (touched,)

    for protocol in range(6):
        (root / "index_ade20k.pkl").write_bytes(pickle.dumps({"folder": [], "filename": Hostile()}, protocol))
        with pytest.raises(ValueError, match=r"index_ade20k.pkl: refused: it asks for .*; nothing of it was run"):
            READERS["ade20k_847"].open(root)
    (root / "index_ade20k.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"refused: it asks for os\.system"):
        READERS["ade20k_847"].open(root)
    assert not touched.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps({"folder": ["a"] * 100})[:-40],
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"short.",  # BINBYTES8 of an endless length
        b"\x80\x04]r\xff\xff\xff\xff.",  # LONG_BINPUT to place 2^32 - 1, a table of 32 GiB if it were one
        b"(" * 1000 + b".",
    ],
)
def test_a_damaged_index_is_one_line(tmp_path, content):
    root = full_ade_folder(tmp_path / "ADE20K_2021_17_01", {"ADE_val_1": np.zeros((2, 3), int)})
    (root / "index_ade20k.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"index_ade20k.pkl: [^\n]+$"):
        READERS["ade20k_847"].open(root)


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_data_comes_back_and_arrays_become_placeholders(tmp_path, protocol):
    shared = ["once"]
    data = {"a": [1, -2, 2**70, 1.5, None, True, False], "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "c": {}}
    data |= {"d": [shared, shared], "é": "ü\n", 7: list(range(2000))}
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(data | {"array": np.arange(5.0)}, protocol))
    found = read_pickle_data(path)
    assert isinstance(found.pop("array"), Placeholder)
    assert found == data
    path.write_bytes(pickle.dumps(collections.OrderedDict(a=1), protocol))
    with pytest.raises(ValueError, match=r"asks for collections\.OrderedDict"):
        read_pickle_data(path)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("ADE20K_2021_17_01/../../etc", "ADE_val_1.jpg"),
        ("/etc", "ADE_val_1.jpg"),
        ("ADE20K_2021_17_01/images", "../ADE_val_1.jpg"),
        ("C:\\photographs", "ADE_val_1.jpg"),
    ],
)
def test_an_index_can_not_lead_out_of_its_folder(tmp_path, folder, name):
    root = full_ade_folder(tmp_path / "ADE20K_2021_17_01", {"ADE_val_1": np.zeros((2, 3), int)})
    (root / "index_ade20k.pkl").write_bytes(pickle.dumps({"folder": [folder], "filename": [name]}))
    with pytest.raises(ValueError, match="leads out of the folder"):
        READERS["ade20k_847"].open(root)


def test_a_split_list_can_not_lead_out_of_its_folder(context, tmp_path):
    text(context / "val.txt", "2008_000002", "../../../secret")
    manifest = prepared("pascal_context_59", tmp_path, tmp_path / "out")
    assert list(manifest.left_out) == ["../../../secret"]
    assert "no plain file name" in manifest.left_out["../../../secret"]
    assert {path.name for path in (tmp_path / "out" / "labels").iterdir()} == {"2008_000002.png"}


@pytest.mark.parametrize("name", sorted(name for name, reader in READERS.items() if reader.expected))
def test_a_folder_of_something_else_is_told_what_is_needed(tmp_path, name):
    with pytest.raises(ValueError, match=r"; it must [^\n]+$"):
        READERS[name].open(tmp_path)
    assert READERS[name].classes == len(Vocabulary.ready(name).names)
    assert read_manifest(tmp_path) is None
