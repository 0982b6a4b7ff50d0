"""COCO annotations of somebody's own: labels value for value, and files that lie."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask
from PIL import Image, ImageDraw

from opensan.data.prepare.drawn_masks import mask_of
from opensan.data.prepare.engine import prepare
from opensan.data.prepare.own_coco import open_instances, open_panoptic
from opensan.data.prepare.source import Labelled, Source
from opensan.data.segmentation_folder import SegmentationFolder

CATEGORIES = [{"id": 1, "name": "person", "isthing": 1}, {"id": 90, "name": "tree-merged"}, {"id": 7, "name": "car"}]


def write_photograph(path: Path, width: int, height: int, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), (90, 120, 150)).save(path, exif=exif)


def write_json(path: Path, **data) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def labels_of(source: Source) -> dict[str, list]:
    read = {one.name: pickle.loads(pickle.dumps(one.labels))() for one in source.images}
    assert not any(isinstance(labels, Labelled) and labels.left_out for labels in read.values())
    return {name: getattr(labels, "labels", labels).tolist() for name, labels in read.items()}


def write_panoptic(root: Path, split: str, segments: list, ids, name: str = "1") -> None:
    """A photograph of 3x2 (width x height), laid out as COCO is."""
    write_photograph(root / split / f"{name}.jpg", 3, 2)
    write_json(
        root / "annotations" / f"panoptic_{split}.json",
        images=[{"id": 5, "file_name": f"{name}.jpg", "width": 3, "height": 2}],
        annotations=[{"image_id": 5, "file_name": f"{name}.png", "segments_info": segments}],
        categories=CATEGORIES,
    )
    ids = np.array(ids)
    png = root / "annotations" / f"panoptic_{split}" / f"{name}.png"
    png.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.dstack([ids % 256, ids // 256 % 256, ids // 65_536]).astype(np.uint8)).save(png)


SEGMENTS = [
    {"id": 3_226_956, "category_id": 1, "iscrowd": 0},
    {"id": 256, "category_id": 90},
    {"id": 7, "category_id": 7, "iscrowd": 0},
    {"id": 8, "category_id": 7, "iscrowd": 1},
]
IDS = [[0, 3_226_956, 256], [7, 8, 7]]


def test_panoptic(tmp_path):
    write_panoptic(tmp_path, "train2017", SEGMENTS, IDS)
    write_panoptic(tmp_path, "val2017", SEGMENTS, np.transpose([[0, 7], [7, 7], [256, 0]]))
    source = open_panoptic(tmp_path)
    assert source.vocabulary.names == ["person", "tree-merged", "car"]
    assert source.evaluation_split == "val2017"
    assert labels_of(source) == {
        "train2017_1": [[-1, 0, 1], [2, -1, 2]],
        "val2017_1": [[-1, 2, 1], [2, 2, -1]],
    }
    assert labels_of(open_panoptic(tmp_path, ignored="person"))["train2017_1"] == [[-1, -1, 0], [1, -1, 1]]


def test_panoptic_files_that_are_named(tmp_path):
    write_panoptic(tmp_path, "val", SEGMENTS, IDS)
    (tmp_path / "annotations" / "panoptic_val.json").rename(tmp_path / "mine.json")
    (tmp_path / "annotations" / "panoptic_val").rename(tmp_path / "mine")
    (tmp_path / "val").rename(tmp_path / "images")
    with pytest.raises(ValueError, match=r"no panoptic_\*.json, .* say annotations=FILE.json"):
        open_panoptic(tmp_path)
    assert labels_of(open_panoptic(tmp_path, annotations="mine.json")) == {"1": [[-1, 0, 1], [2, -1, 2]]}
    with pytest.raises(ValueError, match=r"annotations: '../mine.json' is no path below the folder"):
        open_panoptic(tmp_path, annotations="../mine.json")


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (SEGMENTS[1:], r"1.png: 1 pixels are of segment 3226956, which the JSON file doesn't list"),
        ([*SEGMENTS[1:], {"id": 3_226_956, "category_id": 2}], r"segment 3226956: category_id 2 is none of"),
        ([*SEGMENTS, {"id": 2**40, "category_id": 7}], r"1099511627776 is no segment id"),
        ([*SEGMENTS, {"id": 9}], r"segment 9: 'category_id' must be a whole number, not None"),
    ],
)
def test_wrong_segments_are_named(tmp_path, segments, message):
    write_panoptic(tmp_path, "val", segments, IDS)
    with pytest.raises(ValueError, match=message):
        labels_of(open_panoptic(tmp_path))


def test_wrong_panoptic_pngs_are_named(tmp_path):
    write_panoptic(tmp_path, "val", SEGMENTS, IDS)
    png = tmp_path / "annotations" / "panoptic_val" / "1.png"
    Image.fromarray(np.ones((2, 3), np.uint8)).save(png)
    with pytest.raises(ValueError, match=r"1.png: one channel; COCO panoptic PNGs are RGB"):
        labels_of(open_panoptic(tmp_path))
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(png)
    with pytest.raises(ValueError, match=r"1.png: is 3x3, its image 3x2"):
        labels_of(open_panoptic(tmp_path))
    png.unlink()
    with pytest.raises(ValueError, match=r"1.png: can't be read .*No such file"):
        labels_of(open_panoptic(tmp_path))


def rectangle(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def write_instances(root: Path, annotations: list, *, width: int = 6, height: int = 4, orientation: int = 1) -> None:
    write_photograph(root / "images" / "1.jpg", width, height, orientation)
    write_json(
        root / "instances_val.json",
        images=[{"id": 5, "file_name": "1.jpg", "width": width, "height": height}],
        annotations=[{"id": number, "image_id": 5, **one} for number, one in enumerate(annotations)],
        categories=CATEGORIES,
    )


def test_instances_smaller_ones_on_top(tmp_path):
    crowd = np.zeros((4, 6), np.uint8)
    crowd[3] = 1
    runs = [0, 2, 22]  # the first column's upper half
    write_instances(
        tmp_path,
        [
            {"category_id": 7, "segmentation": rectangle(1, 1, 3, 3)},  # small, first
            {"category_id": 1, "segmentation": rectangle(0, 0, 5, 4)},  # large, later: below
            {"category_id": 90, "segmentation": {"size": [4, 6], "counts": runs}},
            {"category_id": 1, "iscrowd": 1, "segmentation": packed(crowd)},
        ],
    )
    source = open_instances(tmp_path)
    assert source.vocabulary.names == ["person", "tree-merged", "car"]
    assert labels_of(source) == {
        "1": [[1, 0, 0, 0, 0, -1], [1, 2, 2, 0, 0, -1], [0, 2, 2, 0, 0, -1], [-1, -1, -1, -1, -1, -1]]
    }
    assert labels_of(open_instances(tmp_path, ignored="person"))["1"][1] == [0, 1, 1, -1, -1, -1]


def packed(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


@pytest.mark.parametrize("form", ["polygons", "list", "string"])
def test_masks_are_those_of_coco_s_own_tools(form):
    rng = np.random.default_rng(5)
    for _ in range(20):
        height, width = (int(side) for side in rng.integers(5, 60, 2))
        count = int(rng.integers(1, 4))
        polygons = [(rng.random((int(rng.integers(3, 9)), 2)) * (width, height)).ravel().tolist() for _ in range(count)]
        expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
        changes = np.flatnonzero(np.diff(expected.T.ravel(), prepend=0))
        runs = np.diff([0, *changes, expected.size]).tolist()
        given = {
            "polygons": polygons,
            "list": {"size": [height, width], "counts": runs},
            "string": packed(expected),
        }[form]
        np.testing.assert_array_equal(mask_of(given, height, width), expected == 1)


def test_a_polygon_covers_what_it_should():
    """Against another library's drawing: a triangle's pixels, but for the outline."""
    corners = [(10.0, 5.0), (90.0, 40.0), (20.0, 70.0)]
    drawn = Image.new("1", (100, 80))
    ImageDraw.Draw(drawn).polygon(corners, fill=1)
    mask = mask_of([[value for corner in corners for value in corner]], 80, 100)
    assert mask.sum() > 2000 and (mask != np.asarray(drawn)).sum() < 150


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, r"has only a box, no segmentation"),
        ([], r"has only a box, no segmentation"),
        ([[0, 0, 5, 0, 5]], "not a list of numbers x, y, x, y"),
        ([[0, 0, 5, 0, 5, "4"]], "not a list of numbers x, y, x, y"),
        ([{"a": 1}], "not a list of numbers x, y, x, y"),
        ([3.5], "not a list of numbers x, y, x, y"),
        ([[0, 0, 5, 0, 5, float("nan")]], "not a list of numbers x, y, x, y"),
        ([[0, 0, 5, 0, 5, 10**400]], "not a list of numbers x, y, x, y"),
        ([[0, 0, 1e9, 0, 5, 5]], "lies far outside the image of 6x4"),
        ([[0, 0, 6, 4, 0, 4] * 400_000], "outline is .* pixels long, more than 4,000,000"),
        ({"size": [4, 6], "counts": [10**12]}, "not a list of run lengths"),
        ({"size": [40_000, 60_000], "counts": [2_400_000_000]}, r"size is \[40000, 60000\], the picture's \[4, 6\]"),
    ],
)
def test_masks_that_lie_are_refused(tmp_path, segmentation, message):
    with pytest.raises(ValueError, match=message) as caught:
        mask_of(segmentation, 4, 6)
    assert "\n" not in str(caught.value)


def test_a_wrong_mask_is_named_and_the_photograph_left_out(tmp_path):
    write_instances(tmp_path / "raw", [{"category_id": 7, "segmentation": [[0, 0, 1e9, 0, 5, 5]]}])
    manifest = prepare(open_instances(tmp_path / "raw"), "coco-instances", tmp_path / "out")
    assert manifest.left_out["1"].endswith(
        "instances_val.json: image 5: annotation 0: a polygon lies far outside the image of 6x4 (width x height)"
    )


def test_two_points_enclose_nothing(tmp_path):
    assert not mask_of([[0, 0, 5, 4]], 4, 6).any()


def test_a_photograph_without_objects_is_unlabelled(tmp_path):
    write_instances(tmp_path, [])
    assert labels_of(open_instances(tmp_path)) == {"1": [[-1] * 6] * 4}


def test_a_size_that_is_not_the_photograph_s(tmp_path):
    write_instances(tmp_path, [])
    write_photograph(tmp_path / "images" / "1.jpg", 7, 4)
    with pytest.raises(ValueError, match=r"instances_val.json: image 5: is 6x4, its image 7x4"):
        labels_of(open_instances(tmp_path))


def test_objects_drawn_on_stored_pixels_are_turned_with_the_photograph(tmp_path):
    write_instances(tmp_path, [{"category_id": 7, "segmentation": rectangle(0, 0, 6, 1)}], orientation=6)
    assert labels_of(open_instances(tmp_path)) == {"1": [[-1, -1, -1, 2]] * 6}


def test_exports_with_a_folder_per_split(tmp_path):
    """As Roboflow writes them: the photographs and _annotations.coco.json in a folder per split."""
    for split in ("train", "valid"):
        write_photograph(tmp_path / split / "1.jpg", 6, 4)
        write_json(
            tmp_path / split / "_annotations.coco.json",
            images=[{"id": 0, "file_name": "1.jpg", "width": 6, "height": 4}],
            annotations=[{"image_id": 0, "category_id": 7, "segmentation": rectangle(0, 0, 6, 4)}],
            categories=CATEGORIES,
        )
    source = open_instances(tmp_path)
    assert [(one.name, one.splits) for one in source.images] == [
        ("train_1", ("train",)),
        ("valid_1", ("valid",)),
    ]
    assert source.evaluation_split == "valid"
    manifest = prepare(source, "coco-instances", tmp_path / "out")
    assert (manifest.splits, manifest.left_out) == ({"train": 1, "valid": 1}, {})
    image, labels = SegmentationFolder(tmp_path / "out", "valid")[0]
    assert image.shape == (4, 6, 3) and (labels == 2).all()


def test_annotations_of_other_images_are_counted(tmp_path):
    write_instances(tmp_path, [{"category_id": 7, "image_id": 6, "segmentation": []}] * 2)
    source = open_instances(tmp_path)
    assert labels_of(source) == {"1": [[-1] * 6] * 4}
    assert source.left_out == {"instances_val.json: 2 annotations": "they are of images that the file doesn't list"}


IMAGE = {"id": 5, "file_name": "1.jpg", "width": 6, "height": 4}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"images": 3}, r"instances_val.json: not this kind of COCO file, it has no list 'images' of objects"),
        ({"images": [3]}, "it has no list 'images' of objects"),
        ({"images": [{"file_name": "1.jpg"}]}, r"none of its images can be used: its id is None: a whole number"),
        ({"images": [{**IMAGE, "id": True}]}, r"its id is True: a whole number is needed"),
        ({"images": [IMAGE, IMAGE]}, r"its id is 5: a whole number is needed that no other image has"),
        ({"images": [{**IMAGE, "file_name": "../1.jpg"}]}, r"'../1.jpg' is no path below the folder"),
        ({"images": [{**IMAGE, "file_name": "/etc/passwd"}]}, r"'/etc/passwd' is no path below the folder"),
        (
            {"images": [{**IMAGE, "file_name": "lost.jpg"}]},
            r"instances_val.json: its images are in none of .*/val/, ",
        ),
        ({"images": []}, r"instances_val.json: it lists no images"),
        ({"images": [{**IMAGE, "width": "six"}]}, r"'width' must be a whole number, not 'six'"),
        ({"categories": []}, r"instances_val.json: categories: the vocabulary is empty"),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "A"}]},
            r"categories: word 2 'A' repeats word 1 'a'",
        ),
        ({"categories": [{"id": 1, "name": "a"}] * 2}, r"two categories have the same id"),
    ],
)
def test_wrong_files_are_named(tmp_path, data, message):
    write_photograph(tmp_path / "images" / "1.jpg", 6, 4)
    whole = {"images": [IMAGE], "annotations": [], "categories": CATEGORIES}
    write_json(tmp_path / "instances_val.json", **{**whole, **data})
    with pytest.raises(ValueError, match=message) as caught:
        open_instances(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_json_is_named(tmp_path):
    for content in (b"{", b"[" * 100_000, b"\xff\xfe\xff"):
        (tmp_path / "instances_val.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"instances_val.json: not a readable COCO JSON file"):
            open_instances(tmp_path)


def test_categories_must_agree(tmp_path):
    write_instances(tmp_path, [])
    write_json(tmp_path / "instances_train.json", images=[IMAGE], annotations=[], categories=CATEGORIES[:2])
    with pytest.raises(ValueError, match=r"instances_val.json: its categories are not those of .*instances_train.json"):
        open_instances(tmp_path)


def boxed(identity: int, **annotation) -> dict:
    return {"id": identity, "category_id": 7, "bbox": [0, 0, 2, 2], "segmentation": rectangle(0, 0, 2, 2), **annotation}


def test_one_bad_object_costs_itself_alone_and_is_named(tmp_path):
    wrong = [
        boxed(2, segmentation=[]),
        boxed(3, category_id=12),
        boxed(4, segmentation=[[0, 0, 1e9, 0, 5, 5]]),
        boxed(5, segmentation={"size": [9, 9], "counts": [81]}),
        {"id": 6, "category_id": 7, "image_id": "five", "segmentation": []},
    ]
    write_instances(tmp_path / "raw", [boxed(1), *wrong, boxed(7, segmentation=[], bbox=[0, 0, 0, 0], area=0)])
    for _ in range(2):  # also when the folder is there already
        manifest = prepare(open_instances(tmp_path / "raw"), "coco-instances", tmp_path / "out")
        assert manifest.photographs == 1 and set(manifest.left_out) == {
            "1 (in part)",
            "instances_val.json: annotation 6",
        }
        said = manifest.left_out["1 (in part)"].split("; ")
        assert [line.partition(":")[0] for line in said] == [f"annotation {number}" for number in (3, 2, 4, 5)]
    assert SegmentationFolder(tmp_path / "out", "val")[0][1].tolist() == [[2, 2, *[-1] * 4]] * 2 + [[-1] * 6] * 2


def test_one_bad_image_costs_itself_alone_and_is_named(tmp_path):
    write_photograph(tmp_path / "images" / "1.jpg", 6, 4)
    images = [
        {"id": 5, "file_name": "1.jpg"},  # no size: the image's own is meant
        {"file_name": "2.jpg"},
        {"id": 7, "file_name": "../3.jpg"},
        {"id": 8, "file_name": "x" * 300 + ".jpg"},
        {"id": 9, "file_name": "1.jpg"},
        {"id": 10, "file_name": 7},
    ]
    annotations = [{"image_id": 5, "category_id": 1, "segmentation": rectangle(0, 0, 6, 4)}]
    write_json(tmp_path / "instances_val.json", images=images, annotations=annotations, categories=CATEGORIES)
    manifest = prepare(open_instances(tmp_path), "coco-instances", tmp_path / "out")
    assert manifest.photographs == 1 and len(manifest.left_out) == 5
    assert "'1.jpg' is listed twice" in manifest.left_out["instances_val.json: image 9"]
    assert SegmentationFolder(tmp_path / "out", "val")[0][1].tolist() == [[0] * 6] * 4


def test_without_a_size_what_a_turned_image_was_drawn_on_is_open(tmp_path):
    write_instances(tmp_path, [boxed(1)], orientation=6)
    path = tmp_path / "instances_val.json"
    data = json.loads(path.read_text())
    del data["images"][0]["width"], data["images"][0]["height"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="which was drawn on is open"):
        labels_of(open_instances(tmp_path))


CROWD = {"size": [4, 6], "counts": [0, 4, 20]}


@pytest.mark.parametrize(
    ("objects", "expected", "note"),
    [
        ([boxed(1, iscrowd=1, segmentation=CROWD)] * 2, 2, r"2 of 2 objects are marked as crowds .* as all are"),
        (
            [boxed(1, iscrowd=1, segmentation=CROWD, attributes={"occluded": False}), boxed(2)],
            2,
            r"1 of 2 objects are marked as crowds .* as CVAT writes masks",
        ),
        ([boxed(1, iscrowd=1, segmentation=CROWD), boxed(2)], -1, r"1 of 2 objects are crowds .* say crowds=objects"),
    ],
)
def test_crowds(tmp_path, objects, expected, note):
    """CVAT marks masks as crowds; in COCO a crowd has no label."""
    write_instances(tmp_path, objects)
    source = open_instances(tmp_path)
    assert labels_of(source)["1"][3][0] == expected
    assert len(source.notes) == 1
    assert re.match(note, source.notes[0])
    for crowds, label in (("objects", 2), ("unlabelled", -1)):
        source = open_instances(tmp_path, crowds=crowds)
        assert (labels_of(source)["1"][3][0], source.notes) == (label, ())
    with pytest.raises(ValueError, match=r"crowds=x: must be objects or unlabelled"):
        open_instances(tmp_path, crowds="x")


def test_crowds_alone_that_are_called_unlabelled_are_no_set(tmp_path):
    write_instances(tmp_path / "raw", [boxed(1, iscrowd=1, segmentation=CROWD)])
    with pytest.raises(ValueError, match=r"no pixel of 1 images is labelled: .* say crowds=objects"):
        prepare(open_instances(tmp_path / "raw", crowds="unlabelled"), "coco-instances", tmp_path / "out")


@pytest.mark.parametrize(
    ("categories", "names"),
    [
        (["car", "car", "tree"], ["car", "tree"]),  # the project is called as a class
        (["street", "car", "tree"], ["car", "tree"]),
    ],
)
def test_a_root_category_without_objects_is_no_class(tmp_path, categories, names):
    """As Roboflow writes it: a category of the project's name before the others."""
    records = [
        {"id": number, "name": name, "supercategory": categories[0] if number else "none"}
        for number, name in enumerate(categories)
    ]
    write_instances(tmp_path, [boxed(1, category_id=1)])
    path = tmp_path / "instances_val.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "categories": records}))
    source = open_instances(tmp_path)
    assert source.vocabulary.names == names
    assert "category 0" in source.notes[0] and "has no object" in source.notes[0]
    assert labels_of(source)["1"][0][0] == 0
    if categories[0] == "car":
        assert open_instances(tmp_path, ignored="car").vocabulary.names == ["tree"]


def test_a_category_without_objects_that_is_no_root_stays_a_class(tmp_path):
    write_instances(tmp_path, [boxed(1)])
    assert open_instances(tmp_path).vocabulary.names == ["person", "tree-merged", "car"]


@pytest.mark.parametrize(
    ("image", "annotation", "file_name", "crowd"),
    [("1", 1, "1.jpg", 0), (1, "1", "1.jpg", "0"), (1.0, 1.0, "images\\1.jpg", None)],
)
def test_numbers_as_text_and_paths_of_windows(tmp_path, image, annotation, file_name, crowd):
    write_photograph(tmp_path / "images" / "1.jpg", 3, 2)
    box = {"segmentation": [[0, 0, 2, 0, 2, 1, 0, 1]], "category_id": "7", "iscrowd": crowd}
    write_json(
        tmp_path / "instances_val.json",
        images=[{"id": image, "file_name": file_name, "width": 3, "height": 2}],
        annotations=[{"id": 1, "image_id": annotation, **box}],
        categories=[{"id": 7, "name": "car"}],
    )
    source = open_instances(tmp_path)
    assert labels_of(source) == {"1": [[0, 0, -1], [-1, -1, -1]]} and not source.notes


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[0, 0, 0.5, 0, 0.5, 1]], "its corners are shares of width and height, 0 to 1, not pixels"),
        ("[[0, 0, 2, 0, 2, 2]]", "its segmentation is neither polygons nor run lengths"),
    ],
)
def test_the_cause_is_named_if_no_object_can_be_used(tmp_path, segmentation, message):
    write_photograph(tmp_path / "images" / "1.jpg", 30, 20)
    write_json(
        tmp_path / "instances_val.json",
        images=[{"id": 1, "file_name": "1.jpg", "width": 30, "height": 20}],
        annotations=[{"id": 1, "image_id": 1, "category_id": 7, "segmentation": segmentation}],
        categories=[{"id": 7, "name": "car"}],
    )
    manifest = prepare(open_instances(tmp_path), "coco-instances", tmp_path / "out")
    assert message in manifest.left_out["1"]


def test_annotations_without_a_usable_image_are_the_cause_of_an_unlabelled_set(tmp_path):
    write_photograph(tmp_path / "images" / "1.jpg", 3, 2)
    write_json(
        tmp_path / "instances_val.json",
        images=[{"id": 1, "file_name": "1.jpg", "width": 3, "height": 2}],
        annotations=[{"id": 1, "image_id": "one", "category_id": 7, "segmentation": [[0, 0, 2, 0, 2, 1]]}],
        categories=[{"id": 7, "name": "car"}],
    )
    with pytest.raises(ValueError, match=r"no pixel of 1 images is labelled: .*annotation 1: its image_id is 'one'"):
        prepare(open_instances(tmp_path), "coco-instances", tmp_path / "out")
