"""Data sets of objects, opened by the programs that they are for, and by readers of their published definitions."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO
from scipy import ndimage

import opensan
from opensan.assemble.segments import SegmentRules
from opensan.cli import main
from opensan.data.prepare import READERS
from opensan.data.prepare.engine import prepare
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.files import ASSETS
from opensan.outputs.brush import brush_rle
from opensan.outputs.datasets import DATASETS
from opensan.outputs.object_datasets import OBJECT_DATASETS
from opensan.outputs.polygons import as_one_ring, regions

WORDS = "grass, night sky, green square, brick, green heart, orange square"
RULES = SegmentRules(stuff=("brick",))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All data sets of two scenes, one in a folder called images; and each image's segments."""
    folder = tmp_path_factory.mktemp("objects")
    places = {"playground": folder / "photos" / "playground.png", "images/court": folder / "photos/images/court.png"}
    for place, path in places.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(ASSETS / "scenes" / f"{Path(place).name}.png") as scene:
            scene.resize((320, 240)).save(path)
    san = opensan.load("tiny", text_cache=False)
    results = opensan.label_folder(
        folder / "photos", WORDS, model=san, out=folder / "out", formats=[*OBJECT_DATASETS], segments=RULES
    )
    assert len(results.written) == 2 and not results.broken
    order = [written.job.stem for written in results.written]
    return folder / "out", {place: san.segment(places[place], WORDS, segments=RULES).segments for place in order}


def things(segments):
    return [segment for segment in segments if segment.kind == "thing"]


def panoptic_ids(path: Path) -> np.ndarray:
    """As panopticapi's rgb2id: id = R + 256 G + 256 256 B."""
    colours = np.asarray(Image.open(path)).astype(np.uint32)
    assert colours.shape[2] == 3
    return colours[..., 0] + 256 * colours[..., 1] + 256 * 256 * colours[..., 2]


def test_a_panoptic_set_is_as_coco_defines_it(made):
    """What panopticapi's evaluation demands of each image (pq_compute_single_core), and the format's description."""
    out, expected = made
    data = json.loads((out / "coco-panoptic/annotations/panoptic_all.json").read_text())
    categories = {category["id"]: category for category in data["categories"]}
    assert [category["name"] for category in data["categories"]] == WORDS.split(", ")
    assert {category["isthing"] for category in categories.values()} == {0, 1}
    images = {image["id"]: image for image in data["images"]}
    assert len(images) == len(data["annotations"]) == 2
    for annotation in data["annotations"]:
        image = images[annotation["image_id"]]
        with Image.open(out / "coco-panoptic/images" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        place = image["file_name"].removesuffix(".png")
        segments = expected[place]
        ids = panoptic_ids(out / "coco-panoptic/annotations/panoptic_all" / annotation["file_name"])
        np.testing.assert_array_equal(ids, segments.ids)
        told = {entry["id"]: entry for entry in annotation["segments_info"]}
        assert told.keys() == set(np.unique(ids).tolist()) - {0} and len(told) == len(annotation["segments_info"]) > 1
        for segment in segments:
            entry = told[segment.id]
            category = categories[entry["category_id"]]
            assert (category["name"], category["isthing"]) == (segment.word, segment.kind == "thing")
            assert entry["area"] == (ids == segment.id).sum() and entry["iscrowd"] == 0
            rows, columns = np.nonzero(ids == segment.id)
            left, top = columns.min(), rows.min()
            assert entry["bbox"] == [left, top, columns.max() - left + 1, rows.max() - top + 1]


def test_the_panoptic_quality_of_a_set_against_itself_is_1(made):
    """By torchmetrics."""
    detection = pytest.importorskip("torchmetrics.detection")
    torch = pytest.importorskip("torch")
    out, _ = made
    data = json.loads((out / "coco-panoptic/annotations/panoptic_all.json").read_text())
    kinds = {kind: {c["id"] for c in data["categories"] if c["isthing"] == kind} for kind in (0, 1)}
    metric = detection.PanopticQuality(
        things=kinds[1], stuffs=kinds[0], allow_unknown_preds_category=True, return_per_class=True
    )
    seen = set()
    for annotation in data["annotations"]:
        ids = panoptic_ids(out / "coco-panoptic/annotations/panoptic_all" / annotation["file_name"]).astype(int)
        category_of = np.zeros(ids.max() + 1, dtype=int)
        for entry in annotation["segments_info"]:
            category_of[entry["id"]] = entry["category_id"]
        seen |= set(category_of[1:].tolist())
        both = torch.from_numpy(np.stack([category_of[ids], ids], axis=-1))[None]
        metric.update(both, both)
    order = [*sorted(kinds[1]), *sorted(kinds[0])]
    qualities = dict(zip(order, metric.compute().flatten().tolist(), strict=True))
    assert len(seen) > 1 and all(qualities[category] == pytest.approx(1) for category in seen)


def test_pycocotools_reads_the_instances(made):
    out, expected = made
    data = COCO(str(out / "coco-instances/annotations/instances_all.json"))
    names = {category["id"]: category["name"] for category in data.loadCats(data.getCatIds())}
    kinds = next(iter(expected.values())).kinds
    assert [*names.values()] == [word for word, kind in kinds.items() if kind.kind == "thing"]
    for number, (place, segments) in enumerate(expected.items(), 1):
        assert data.loadImgs(number)[0]["file_name"] == f"{place}.png"
        annotations = data.loadAnns(data.getAnnIds(imgIds=[number]))
        assert len(annotations) == len(things(segments)) > 0
        for annotation, segment in zip(annotations, things(segments), strict=True):
            assert (data.annToMask(annotation) == segment.mask).all() and names[
                annotation["category_id"]
            ] == segment.word
            assert annotation["bbox"] == list(segment.box) and annotation["area"] == segment.area
            assert annotation["score"] == pytest.approx(segment.score, abs=1e-6)


@pytest.mark.parametrize("kind", ["coco-instances", "coco-panoptic"])
def test_objects_come_back_by_data_prepare(made, kind, tmp_path):
    out, expected = made
    prepare(READERS[kind].open(out / kind), kind, tmp_path / "prepared")
    folder = SegmentationFolder(tmp_path / "prepared", "all")
    assert len(folder) == 2 and folder.knows_objects
    for index, segments in enumerate(expected.values()):
        objects, labels = folder.objects(index), folder[index][1]
        assert len(np.unique(objects[objects > 0])) == len(things(segments))
        for segment in things(segments):
            assert len(np.unique(objects[segment.mask])) == 1
            assert {folder.vocabulary.names[label] for label in np.unique(labels[segment.mask])} == {segment.word}


@pytest.mark.parametrize("kind", ["yolo-boxes", "yolo-instances"])
def test_supervision_reads_yolo(made, kind):
    supervision = pytest.importorskip("supervision")
    out, expected = made
    settings = yaml.safe_load((out / kind / "data.yaml").read_text())
    assert settings["names"] == dict(enumerate(WORDS.split(", ")))
    listed = [Path(line).relative_to("images") for line in (out / kind / "all.txt").read_text().split()]
    assert [path.with_suffix("").as_posix() for path in listed] == ["images_/court", "playground"]
    for place, segments in expected.items():
        below = Path(place.replace("images/", "images_/")).parent
        data = supervision.DetectionDataset.from_yolo(
            str(out / kind / "images" / below),
            str(out / kind / "labels" / below),
            str(out / kind / "data.yaml"),
            force_masks=kind == "yolo-instances",
        )
        ((_, _, read),) = list(data)
        assert [data.classes[label] for label in read.class_id] == [segment.word for segment in things(segments)]
        for index, segment in enumerate(things(segments)):
            left, top, width, height = segment.box
            np.testing.assert_allclose(read.xyxy[index], (left, top, left + width, top + height), atol=1.5)
            if kind == "yolo-instances":
                mask = np.asarray(read.mask[index])
                # Programs that fill polygons count the pixels of the line itself.
                inner, outer = ndimage.binary_erosion(segment.mask), ndimage.binary_dilation(segment.mask, iterations=2)
                assert mask[inner].mean() > 0.97 and outer[mask].mean() > 0.97


def test_label_studio_gets_a_brush_for_each_segment(made):
    out, expected = made
    tasks = json.loads((out / "labelstudio-panoptic/tasks.json").read_text())
    for task, (place, segments) in zip(tasks, expected.items(), strict=True):
        assert task["data"]["image"].endswith(f"images/{place}.png")
        result = task["predictions"][0]["result"]
        assert len({region["id"] for region in result}) == len(result) == len(segments)
        for region, segment in zip(result, segments, strict=True):
            assert region["value"]["brushlabels"] == [segment.word]
            assert region["score"] == pytest.approx(segment.score, abs=1e-6)
            assert region["value"]["rle"] == brush_rle(segment.mask)


def test_label_studios_own_converter_reads_the_brushes(made):
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    out, expected = made
    tasks = json.loads((out / "labelstudio-panoptic/tasks.json").read_text())
    for task, segments in zip(tasks, expected.values(), strict=True):
        for region, segment in zip(task["predictions"][0]["result"], segments, strict=True):
            values = np.array(brush.decode_rle(region["value"]["rle"])).reshape(*segment.mask.shape, 4)
            np.testing.assert_array_equal(values[..., 3] > 0, segment.mask)


@pytest.mark.parametrize("kind", ["yolo-boxes", "yolo-instances"])
def test_ultralytics_reads_yolo(made, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "1")
    pytest.importorskip("ultralytics")
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    out, expected = made
    found = check_det_dataset(str(out / kind / "data.yaml"), autodownload=False)
    task = "segment" if kind == "yolo-instances" else "detect"
    data = YOLODataset(img_path=found["val"], data=found, task=task, augment=False, imgsz=320)
    read = {Path(label["im_file"]).stem: label for label in data.labels}
    for place, segments in expected.items():
        label = read[Path(place).name]
        height, width = segments.ids.shape
        assert [found["names"][int(number)] for number in label["cls"].ravel()] == [s.word for s in things(segments)]
        for (x, y, across, down), segment in zip(
            label["bboxes"] * (width, height, width, height), things(segments), strict=True
        ):
            left, top, *size = segment.box
            expected_box = (left + size[0] / 2, top + size[1] / 2, *size)
            np.testing.assert_allclose((x, y, across, down), expected_box, atol=1.5)


def inside(ring: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Which pixels' centres are in a polygon, by the even-odd rule."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    odd = np.zeros(shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if y0 != y1:
            odd ^= ((y0 > rows) != (y1 > rows)) & (columns < x0 + (rows - y0) * (x1 - x0) / (y1 - y0))
    return odd


@pytest.mark.parametrize("seed", range(20))
def test_one_ring_has_all_parts_and_holes_of_an_object(seed):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(50, 60)), 2.5)
    mask = noise > np.quantile(noise, 0.4)
    pieces = list(regions(np.where(mask, 0, -1)))
    assert len(pieces) > 1 or pieces[0].holes
    np.testing.assert_array_equal(inside(as_one_ring(pieces, 1), mask.shape), mask)


def test_small_parts_and_holes_are_left_out_of_the_ring_but_not_the_largest():
    mask = np.zeros((20, 30), dtype=bool)
    mask[2:12, 2:12], mask[5, 5], mask[15, 20] = True, False, True
    ring = as_one_ring(regions(np.where(mask, 0, -1)), 16)
    expected = np.zeros_like(mask)
    expected[2:12, 2:12] = True
    np.testing.assert_array_equal(inside(ring, mask.shape), expected)
    assert inside(as_one_ring(regions(np.where(mask[14:], 0, -1)), 16), (6, 30)).sum() == 1


def test_the_help_names_every_data_set(capsys):
    with pytest.raises(SystemExit):
        main(["segment", "--help"])
    said = "".join(capsys.readouterr().out.split())  # lines are broken at hyphens
    assert all(f"{name}," in said or f"{name}(" in said for name in DATASETS)


def test_the_command_takes_options_of_objects_with_a_set_of_objects(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    with Image.open(ASSETS / "scenes" / "court.png") as scene:
        scene.resize((160, 120)).save(tmp_path / "photos" / "court.png")
    arguments = ["segment", str(tmp_path / "photos"), "--model", "tiny", "--words", WORDS, "--stuff", "brick,night sky"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--format", "coco-panoptic", "--out", str(tmp_path / "out")])
    assert not ended.value.code, capsys.readouterr().err
    data = json.loads((tmp_path / "out/coco-panoptic/annotations/panoptic_all.json").read_text())
    assert {category["name"]: category["isthing"] for category in data["categories"]}["brick"] == 0
