"""labelme's and YOLO's files: what they hold becomes labels, and one bad record costs itself alone."""

import base64
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensan.cli import main
from opensan.data.prepare.engine import prepare
from opensan.data.prepare.own_labelme import open_labelme
from opensan.data.prepare.own_yolo import open_yolo
from opensan.data.prepare.source import Labelled, Source


def write_photograph(path: Path, width: int = 8, height: int = 4, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), (90, 120, 150)).save(path, exif=exif)


def labels_of(source: Source) -> dict[str, np.ndarray]:
    read = {one.name: pickle.loads(pickle.dumps(one.labels))() for one in source.images}
    assert not any(isinstance(labels, Labelled) and labels.left_out for labels in read.values())
    return {name: labels.labels for name, labels in read.items()}


def shape(label: str, points: list, kind: str = "polygon", **more) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def write_labelme(path: Path, shapes: list, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"version": "5.0.1", "flags": {}, "shapes": shapes, "imagePath": f"{path.stem}.jpg", "imageData": None}
    path.write_text(json.dumps({**data, "imageHeight": 4, "imageWidth": 8, **more}))


SQUARE = [[1, 1], [3, 1], [3, 3], [1, 3]]


def test_labelme_shapes_with_their_outline_the_later_on_top(tmp_path):
    write_photograph(tmp_path / "a.jpg")
    write_labelme(
        tmp_path / "a.json",
        [
            shape("sky", [[0, 0], [7, 3]], "rectangle"),
            shape("car", SQUARE),
            shape("_background_", [[7, 0], [7, 0]], "rectangle"),
        ],
    )
    source = open_labelme(tmp_path)
    assert source.vocabulary.names == ["car", "sky"]
    assert labels_of(source)["a"].tolist() == [
        [1, 1, 1, 1, 1, 1, 1, -1],
        *[[1, 0, 0, 0, 1, 1, 1, 1]] * 3,
    ]
    assert [one.splits for one in source.images] == [("all",)]


def test_labelme_circles_and_masks(tmp_path):
    write_photograph(tmp_path / "a.jpg")
    content = io.BytesIO()
    Image.fromarray(np.array([[True, False], [True, True]])).save(content, "PNG")
    stored = base64.b64encode(content.getvalue()).decode()
    shapes = [shape("sun", [[5, 1], [5, 2]], "circle"), shape("car", [[0, 2], [1, 3]], "mask", mask=stored)]
    write_labelme(tmp_path / "a.json", shapes)
    labels = labels_of(open_labelme(tmp_path))["a"]
    assert np.argwhere(labels == 0).tolist() == [[2, 0], [3, 0], [3, 1]]
    assert labels[1, 5] == labels[0, 5] == labels[1, 6] == 1 and (labels == 1).sum() <= 9


def test_labelme_splits_lists_of_labels_and_images_within_the_file(tmp_path):
    for split in ("train", "val"):
        write_labelme(tmp_path / split / "a.json", [shape("car", SQUARE)])
    write_photograph(tmp_path / "train" / "a.jpg")
    content = (tmp_path / "train" / "a.jpg").read_bytes()
    more = {"imageData": base64.b64encode(content).decode(), "imagePath": "C:\\photos\\b.jpg"}
    write_labelme(tmp_path / "val" / "a.json", [shape("car", SQUARE)], **more)
    write_photograph(tmp_path / "val" / "no_json.jpg")
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ntree\ncar\n")
    (tmp_path / "other.json").write_text('{"a": 1}')
    source = open_labelme(tmp_path)
    assert source.vocabulary.names == ["tree", "car"]
    assert source.notes == ("1 images have no JSON file, and are not used",)
    manifest = prepare(source, "labelme", tmp_path / "out")
    assert (manifest.splits, manifest.left_out) == ({"train": 1, "val": 1}, {})
    assert (tmp_path / "out" / "images" / "val_a.jpg").read_bytes() == content
    assert [count.pixels for count in manifest.counts] == [0, 18]
    (tmp_path / "labels.txt").write_text("tree\n")
    with pytest.raises(ValueError, match=r"there are shapes of 'car', which is not in .*labels.txt"):
        open_labelme(tmp_path)


def test_labelme_one_bad_shape_or_file_costs_itself_alone(tmp_path):
    write_photograph(tmp_path / "a.jpg")
    bad = [
        shape("lane", [[0, 0], [5, 1], [7, 3]], "linestrip"),
        shape("car", [[0, 0], [1e9, 1], [7, 3]]),
        shape("car", "x"),
        shape("car", [[0, 0], [9, 9]], "mask", mask="x"),
        {"points": []},
        {"label": ["car"], "points": SQUARE},
        3,
    ]
    write_labelme(tmp_path / "a.json", [shape("car", SQUARE), *bad])
    write_labelme(tmp_path / "lost.json", [shape("car", SQUARE)], imagePath="../../etc/passwd.jpg")
    (tmp_path / "cut.json").write_text('{"shapes": [')
    source = open_labelme(tmp_path)
    assert source.vocabulary.names == ["car", "lane"]
    manifest = prepare(source, "labelme", tmp_path / "out")
    assert sorted(manifest.left_out) == ["a (in part)", "cut.json", "lost"]
    assert len(manifest.left_out["a (in part)"].split("; ")) == len(bad)
    assert "'linestrip' of 3 points has no area" in manifest.left_out["a (in part)"]
    assert [count.pixels for count in manifest.counts] == [9, 0]


def test_labelme_drawn_on_stored_pixels_is_turned_with_the_image(tmp_path):
    write_photograph(tmp_path / "a.jpg", orientation=6)
    write_labelme(tmp_path / "a.json", [shape("car", [[0, 0], [7, 0]], "rectangle")])
    labels = labels_of(open_labelme(tmp_path))["a"]
    assert labels.shape == (8, 4) and (labels[:, 3] == 0).all() and (labels[:, :3] == -1).all()


def write_yolo(root: Path, text: str = "0 0.125 0.25 0.5 0.25 0.5 0.75 0.125 0.75\n") -> None:
    write_photograph(root / "images" / "a.jpg")
    (root / "labels").mkdir(parents=True, exist_ok=True)
    (root / "labels" / "a.txt").write_text(text)


@pytest.mark.parametrize(
    "names", ["names: [car, tree]", "names:\n  0: car\n  1: tree", "nc: 2\nnames: ['car', 'tree']"]
)
def test_yolo_polygons_are_shares_of_the_image(tmp_path, names):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(names + "\n")
    source = open_yolo(tmp_path)
    assert source.vocabulary.names == ["car", "tree"]
    assert labels_of(source)["a"].tolist() == [[-1] * 8, *[[-1, 0, 0, 0, -1, -1, -1, -1]] * 2, [-1] * 8]


def test_yolo_folders_splits_and_lists(tmp_path):
    for split in ("train", "valid"):
        write_yolo(tmp_path / "roboflow" / split)
        write_photograph(tmp_path / "plain" / "images" / split / "a.jpg")
        (tmp_path / "plain" / "labels" / split).mkdir(parents=True)
        (tmp_path / "plain" / "labels" / split / "a.txt").write_text("1 0 0 1 0 1 1\n")
    write_yolo(tmp_path / "listed")
    (tmp_path / "listed" / "train.txt").write_text("./images/a.jpg\n")
    for form, expected in (
        ("roboflow", {"train_a": ("train",), "valid_a": ("valid",)}),
        ("plain", {"train_a": ("train",), "valid_a": ("valid",)}),
        ("listed", {"a": ("train",)}),
    ):
        (tmp_path / form / "classes.txt").write_text("car\ntree\n")
        source = open_yolo(tmp_path / form)
        assert {one.name: one.splits for one in source.images} == expected
        assert prepare(source, "yolo-seg", tmp_path / f"out-{form}").left_out == {}


def test_yolo_one_bad_line_or_file_costs_itself_alone(tmp_path):
    bad = [
        "0 0.5 0.5 0.2 0.2",
        "7 0 0 1 0 1 1",
        "0 10 20 30 20 30 40",
        "car 0 0 1 0 1 1",
        "0 0 0 1 0 1",
        "0 nan 0 1 0 1 1",
    ]
    write_yolo(tmp_path, "\n".join(["0 0 0 1 0 1 1", "", *bad]))
    (tmp_path / "labels" / "lost.txt").write_text("0 0 0 1 0 1 1")
    write_photograph(tmp_path / "images" / "empty.jpg")
    (tmp_path / "labels" / "empty.txt").write_text("")
    write_photograph(tmp_path / "images" / "boxes.jpg")
    (tmp_path / "labels" / "boxes.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    write_photograph(tmp_path / "images" / "none.jpg")
    (tmp_path / "data.yaml").write_text("names: [car]\n")
    manifest = prepare(open_yolo(tmp_path), "yolo-seg", tmp_path / "out")
    assert sorted(manifest.left_out) == ["a (in part)", "boxes", "labels/lost.txt", "none"]
    assert len(manifest.left_out["a (in part)"].split("; ")) == len(bad)
    assert "an image without objects has an empty file" in manifest.left_out["none"]
    assert "a box (x y width height), not a polygon" in manifest.left_out["boxes"]
    assert manifest.splits == {"all": 2}


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: 3", r"data.yaml: 'names' must be a list of names"),
        ("names: [1, 2]", r"data.yaml: 'names' must be a list of names"),
        ("names: {a: car}", r"data.yaml: 'names' must be a list of names"),
        ("names: [car", r"data.yaml: not readable YAML"),
        ("names: [car, Car]", r"data.yaml: names: word 2 'Car' repeats word 1 'car'"),
        ("nc: 3", r"no data.yaml with 'names' and no classes.txt"),
    ],
)
def test_yolo_names_that_are_none(tmp_path, yaml, message):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(yaml)
    with pytest.raises(ValueError, match=message) as caught:
        open_yolo(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_opensan_exports_for_yolo_is_read_again(tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    words = ["--words", "night sky, brick", "--format", "yolo,png"]
    with pytest.raises(SystemExit):
        main(["segment", str(scene(tmp_path)), "--model", "tiny", *words, "--out", str(out)])
    with pytest.raises(SystemExit) as caught:
        main(["data", "prepare", "yolo-seg", "--source", str(out / "yolo"), "--out", str(again)])
    assert not caught.value.code, capsys.readouterr().err
    exported, read = (
        np.asarray(Image.open(path)) for path in (out / "a.labels.png", next((again / "labels").iterdir()))
    )
    assert (exported == read).mean() > 0.95


def scene(folder: Path) -> Path:
    """Blue above, red below."""
    (folder / "photographs").mkdir()
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32, :, 2], pixels[32:, :, 0] = 120, 180
    Image.fromarray(pixels).save(folder / "photographs" / "a.png")
    return folder / "photographs"
