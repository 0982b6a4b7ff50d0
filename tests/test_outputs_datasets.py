"""Data sets for annotation tools, read back by others' rules to the masks they were made of."""

import json
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import yaml
from faster_coco_eval import COCO
from faster_coco_eval import mask as coco_mask
from PIL import Image
from scipy import ndimage

from opensan.data.prepare import READERS
from opensan.data.prepare.engine import prepare
from opensan.outputs.brush import brush_rle
from opensan.outputs.dataset_files import Labelled, Member
from opensan.outputs.datasets import DATASETS, SPECK, check_words
from opensan.outputs.object_datasets import OBJECT_DATASETS
from opensan.outputs.polygons import regions, signed_area, simplified, without_holes

OF_REGIONS = [dataset for name, dataset in DATASETS.items() if name not in OBJECT_DATASETS]
NAMES = ["road", "café: old", "<sky> & sea", "never"]
PLACES = ["a", "deep/images/b.c"]


def blobs(seed: int, shape: tuple[int, int] = (120, 160), sigma: float = 4) -> np.ndarray:
    """Regions as a model draws them, some with holes, three words and unlabelled pixels."""
    noise = np.random.default_rng(seed).normal(size=(4, *shape))
    return ndimage.gaussian_filter(noise, (0, sigma, sigma)).argmax(axis=0).astype(np.int32) - 1


def filled(rings: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """How many rings, counted by their sense, are around each pixel; for rings along rows and columns."""
    steps = np.zeros((shape[0], shape[1] + 1), dtype=int)
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if x0 == x1:
                steps[min(y0, y1) : max(y0, y1), x0] += 1 if y1 < y0 else -1
            else:
                assert y0 == y1
    return np.cumsum(steps, axis=1)[:, :-1]


def drawn(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A polygon as COCO's own library fills it."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon.ravel().tolist()], *shape))).astype(bool)


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


@pytest.mark.parametrize("seed", range(40))
def test_outlines_are_exact(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 30, 2))
    labels = rng.integers(-1, 3, shape)
    rebuilt = np.full(shape, -1)
    for region in regions(labels):
        inside = filled([region.outline, *region.holes], shape)
        assert set(np.unique(inside)) <= {0, 1} and inside.sum() == region.pixels
        assert (rebuilt[inside == 1] == -1).all()
        assert ndimage.label(inside)[1] == 1  # by sides
        assert signed_area(region.outline) > 0 and all(signed_area(hole) < 0 for hole in region.holes)
        rebuilt[inside == 1] = region.label
    np.testing.assert_array_equal(rebuilt, labels)


def test_touching_corners_are_two_regions_and_one_background():
    labels = np.array([[0, -1, 0], [-1, 0, -1], [0, -1, 0]])
    found = list(regions(labels))
    assert [(region.pixels, len(region.outline), region.holes) for region in found] == [(1, 4, ())] * 5
    ring = list(regions(-labels - 1))  # a plus of four single pixels around the middle
    assert [region.pixels for region in ring] == [1, 1, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_polygons_without_holes_cover_their_region(seed):
    labels = blobs(seed)
    corners = vertices = holes = 0
    for region in regions(labels):
        mask = filled([region.outline, *region.holes], labels.shape) == 1
        polygons = without_holes(region, 1)
        assert all(len(polygon) >= 3 for polygon in polygons)
        if region.pixels >= 100:
            together = np.any([drawn(polygon, labels.shape) for polygon in polygons], axis=0)
            assert iou(together, mask) >= 0.98
            corners += len(region.outline) + sum(map(len, region.holes))
            vertices += sum(map(len, polygons))
            holes += len(region.holes)
    assert vertices < corners
    assert seed != 0 or holes


def test_a_rectangle_needs_few_vertices():
    labels = np.full((50, 60), -1)
    labels[10:40, 5:55] = 0
    (region,) = regions(labels)
    assert sorted(region.outline.tolist()) == [[5, 10], [5, 40], [55, 10], [55, 40]]
    assert len(simplified(region.outline)) == 8  # each corner is cut by half a pixel


def decoded_brush(data: list[int]) -> np.ndarray:
    """The values of a Label Studio RLE, bit by bit, as its documentation reads them."""
    bits = "".join(f"{byte:08b}" for byte in data)
    position = 0

    def read(count: int) -> int:
        nonlocal position
        position += count
        return int(bits[position - count : position], 2)

    total, size = read(32), read(5) + 1
    widths = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < total:
        repeats, count = read(1), read(widths[read(2)]) + 1
        values += [read(size)] * count if repeats else [read(size) for _ in range(count)]
    assert len(values) == total and len(bits) - position < 8
    return np.array(values, dtype=np.uint8)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (200, 170)])
def test_brush_is_the_mask_as_rgba(shape, share):
    mask = np.random.default_rng(0).random(shape) < share
    values = decoded_brush(brush_rle(mask)).reshape(*shape, 4)
    np.testing.assert_array_equal(values, np.repeat(mask[..., None] * np.uint8(255), 4, axis=2))


def test_brush_head_is_label_studios():
    """The first bytes of an annotation that Label Studio itself wrote, for a picture of 3332 x 2527."""
    assert brush_rle(np.zeros((2527, 3332), dtype=bool))[:7] == [2, 1, 233, 240, 57, 27, 255]
    assert struct.unpack(">I", bytes([2, 1, 233, 240]))[0] == 3332 * 2527 * 4


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """All four data sets of two photographs, and the label maps they were made of."""
    folder = tmp_path_factory.mktemp("datasets")
    maps = {}
    for seed, place in enumerate(PLACES):
        maps[place] = blobs(seed, (90 + 30 * seed, 160))
        photograph = folder / "photographs" / f"{place}.jpg"
        photograph.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(60 * (maps[place] + 1))).save(photograph)
        present = np.bincount(maps[place].ravel() + 1, minlength=5)[1:] > 0
        confidence = [0.5 if there else None for there in present]
        for dataset in OF_REGIONS:
            dataset.add(
                folder / "out",
                Labelled(place, photograph, maps[place], NAMES, lambda: confidence, "tiny-1"),  # noqa: B023
            )
    for dataset in OF_REGIONS:
        dataset.complete(folder / "out", [Member(place, ".jpg") for place in PLACES], NAMES)
    return folder / "out", maps


def test_coco(made):
    out, maps = made
    data = COCO(str(out / "coco/annotations/instances_all.json"))
    assert [category["name"] for category in data.loadCats(data.getCatIds())] == NAMES
    assert [image["file_name"] for image in data.loadImgs(data.getImgIds())] == ["a.jpg", "deep/images/b.c.jpg"]
    for number, labels in enumerate(maps.values(), 1):
        annotations = data.loadAnns(data.getAnnIds(imgIds=[number]))
        assert sorted(one["category_id"] for one in annotations) == (np.unique(labels[labels >= 0]) + 1).tolist()
        for one in annotations:
            mask = labels == one["category_id"] - 1
            np.testing.assert_array_equal(data.annToMask(one).astype(bool), mask)
            rows, columns = np.nonzero(mask)
            assert one["area"] == mask.sum() and one["score"] == 0.5
            assert one["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert len({one["id"] for one in data.loadAnns(data.getAnnIds())}) == len(data.getAnnIds())


def test_coco_comes_back_for_training(made, tmp_path):
    """Through `opensan data prepare coco-instances`, links to photographs and all."""
    out, maps = made
    source = READERS["coco-instances"].open(out / "coco")
    manifest = prepare(source, "coco-instances", tmp_path / "prepared", workers=1)
    assert manifest.photographs == 2 and not manifest.left_out and list(manifest.request.classes) == NAMES
    for place, labels in maps.items():
        found = np.asarray(Image.open(tmp_path / "prepared" / "labels" / f"{Path(place).name}.png"))
        np.testing.assert_array_equal(found, np.where(labels < 0, 255, labels))


def test_yolo(made):
    out, maps = made
    settings = yaml.safe_load((out / "yolo/data.yaml").read_text(encoding="utf-8"))
    assert list(settings["names"].values()) == NAMES
    root = Path(settings["path"])
    listed = (root / settings["train"]).read_text().split()
    for name, labels in zip(listed, maps.values(), strict=True):
        height, width = labels.shape
        assert Image.open(root / name).size == (width, height)
        labels_file = "/labels/".join(str(root / name).rsplit("/images/", 1))  # where Ultralytics looks
        lines = Path(labels_file).with_suffix(".txt").read_text().splitlines()
        drawings = np.full(labels.shape, -1)
        for line in lines:
            word, *values = line.split()
            corners = np.array(values, dtype=float).reshape(-1, 2)
            assert corners.min() >= 0 and corners.max() <= 1
            drawings[drawn(corners * (width, height), labels.shape)] = int(word)
        wanted = np.full(labels.shape, -1)
        for region in regions(labels):
            if region.pixels >= SPECK:
                wanted[filled([region.outline, *region.holes], labels.shape) == 1] = region.label
        assert len(lines) > 3 and (drawings == wanted).mean() > 0.97


def test_voc(made):
    out, maps = made
    listed = (out / "voc/ImageSets/Segmentation/all.txt").read_text().splitlines()
    assert listed == PLACES
    for place, labels in maps.items():
        picture = Image.open(out / "voc/SegmentationClass" / f"{place}.png")
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), labels + 1)
        # The colours that the VOC development kit gives to its first classes.
        assert np.array(picture.getpalette()).reshape(-1, 3)[[0, 1, 2, 3, 8, 255]].tolist() == [
            *([0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [64, 0, 0], [224, 224, 192]),
        ]
        assert Image.open(out / "voc/JPEGImages" / f"{place}.jpg").size == picture.size
    rows = (out / "voc/labelmap.txt").read_text(encoding="utf-8").splitlines()
    assert rows[1:4] == ["background:0,0,0::", "road:128,0,0::", "café old:0,128,0::"]
    with pytest.raises(ValueError, match="voc holds at most 254 words, not 255"):
        check_words("voc", 255)


def test_label_studio(made):
    out, maps = made
    config = ElementTree.parse(out / "labelstudio/config.xml").getroot()
    assert [label.get("value") for label in config.iter("Label")] == NAMES
    brush = config.find("BrushLabels")
    tasks = json.loads((out / "labelstudio/tasks.json").read_text(encoding="utf-8"))
    assert len(tasks) == 2
    for task, (place, labels) in zip(tasks, maps.items(), strict=True):
        assert task["data"] == {"image": f"/data/local-files/?d=images/{place}.jpg"}
        assert (out / "labelstudio" / task["data"]["image"].split("=")[1]).exists()
        (prediction,) = task["predictions"]
        assert prediction["model_version"] == "tiny-1" and 0 <= prediction["score"] <= 1
        rebuilt = np.full(labels.shape, -1)
        for one in prediction["result"]:
            assert one["type"] == "brushlabels" and one["value"]["format"] == "rle"
            assert (one["from_name"], one["to_name"]) == (brush.get("name"), brush.get("toName"))
            assert (one["original_height"], one["original_width"]) == labels.shape
            values = decoded_brush(one["value"]["rle"]).reshape(*labels.shape, 4)[..., 3]
            assert set(np.unique(values)) <= {0, 255}
            rebuilt[values == 255] = NAMES.index(one["value"]["brushlabels"][0])
        np.testing.assert_array_equal(rebuilt, labels)
