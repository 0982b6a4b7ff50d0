"""What is exported opens in the programs that it is meant for. Those that are not installed are skipped.

Light ones come with the extra `dev`. For the others: pip install datumaro ultralytics label-studio-sdk
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import shapely
import yaml
from PIL import Image
from scipy import ndimage

from opensan.files import link
from opensan.outputs.dataset_files import Labelled, Member
from opensan.outputs.datasets import DATASETS
from opensan.outputs.object_datasets import OBJECT_DATASETS
from opensan.outputs.polygons import regions, without_holes

OF_REGIONS = [dataset for name, dataset in DATASETS.items() if name not in OBJECT_DATASETS]
NAMES = ["background", "Night Sky", "#1 road", "café: old", "<sea> & sand", "cafe  old", "Background 2"]
IMAGES = ["a.jpg.jpg", "a.png.png", "deep/a.jpg", "my photo.jpg"]
"""Equal stems of one folder keep their suffix in their names; there are equal stems of two folders, and spaces."""


def blobs(seed: int, shape: tuple[int, int], words: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(words + 1, *shape))
    return ndimage.gaussian_filter(noise, (0, 4, 4)).argmax(axis=0).astype(np.int32) - 1


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """All data sets in a folder that was moved and whose images were then removed; and the label maps."""
    folder = tmp_path_factory.mktemp("exports")
    maps, members = {}, []
    for seed, name in enumerate(IMAGES):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = blobs(seed, (90 + 10 * seed, 120), len(NAMES))
        Image.fromarray(np.uint8(30 * (labels + 1))).save(path)
        place = str(Path(name).with_suffix(""))
        maps[place] = labels
        members.append(Member(place, path.suffix))
        present = np.isin(np.arange(len(NAMES)), labels)
        confidence = [0.5 if there else None for there in present]
        for dataset in OF_REGIONS:
            dataset.add(folder / "out", Labelled(place, path, labels, NAMES, lambda: confidence, "tiny"))  # noqa: B023
    for dataset in OF_REGIONS:
        dataset.complete(folder / "out", members, NAMES)
    (folder / "out").rename(folder / "moved")
    shutil.rmtree(folder / "images")
    return folder / "moved", maps


def test_pycocotools(made):
    coco = pytest.importorskip("pycocotools.coco")
    out, maps = made
    data = coco.COCO(str(out / "coco/annotations/instances_all.json"))
    assert [category["name"] for category in data.loadCats(data.getCatIds())] == NAMES
    for number, labels in enumerate(maps.values(), 1):
        rebuilt = np.full(labels.shape, -1)
        for one in data.loadAnns(data.getAnnIds(imgIds=[number])):
            rebuilt[data.annToMask(one) > 0] = one["category_id"] - 1
        np.testing.assert_array_equal(rebuilt, labels)


def test_supervision(made):
    supervision = pytest.importorskip("supervision")
    out, maps = made
    data = supervision.DetectionDataset.from_coco(
        str(out / "coco/images"), str(out / "coco/annotations/instances_all.json")
    )
    assert data.classes == NAMES and len(data) == len(maps)
    for (_, image, detections), labels in zip(data, maps.values(), strict=True):
        assert image.shape[:2] == labels.shape
        rebuilt = np.full(labels.shape, -1)
        for mask, word in zip(detections.mask, detections.class_id, strict=True):
            rebuilt[np.asarray(mask)] = word
        np.testing.assert_array_equal(rebuilt, labels)


def test_datumaro(made):
    datumaro = pytest.importorskip("datumaro")
    out, maps = made
    voc = datumaro.Dataset.import_from(str(out / "voc"), "voc_segmentation")
    names = [label.name for label in voc.categories()[datumaro.AnnotationType.label]]
    assert len(set(names)) == len(NAMES) + 1 and names[:3] == ["background", "background 2", "Night Sky"]
    coco = datumaro.Dataset.import_from(str(out / "coco"), "coco_instances")
    assert {item.id for item in voc} == {item.id for item in coco} == set(maps)
    for data, first in ((voc, 1), (coco, 0)):
        for item in data:
            labels = maps[item.id]
            assert item.media.size == labels.shape
            rebuilt = np.full(labels.shape, -1)
            for one in item.annotations:
                if one.type == datumaro.AnnotationType.mask and one.label >= first:
                    rebuilt[one.image.astype(bool)] = one.label - first
            np.testing.assert_array_equal(rebuilt, labels)


def test_ultralytics(made, tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "1")
    pytest.importorskip("ultralytics")
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    out, maps = made
    folder = shutil.copytree(out / "yolo", tmp_path / "yolo")
    settings = yaml.safe_load((folder / "data.yaml").read_text(encoding="utf-8"))
    (folder / "data.yaml").write_text(yaml.safe_dump(settings | {"path": str(folder)}, allow_unicode=True))
    found = check_det_dataset(str(folder / "data.yaml"), autodownload=False)
    assert list(found["names"].values()) == NAMES
    data = YOLODataset(img_path=found["val"], data=found, task="segment", augment=False, imgsz=160)
    assert len(data) == len(maps) and all(len(one["segments"]) for one in data.labels)


def test_label_studio(made):
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    out, maps = made
    tasks = json.loads((out / "labelstudio/tasks.json").read_text(encoding="utf-8"))
    for task, labels in zip(tasks, maps.values(), strict=True):
        rebuilt = np.full(labels.shape, -1)
        for one in task["predictions"][0]["result"]:
            values = np.array(brush.decode_rle(one["value"]["rle"])).reshape(*labels.shape, 4)
            rebuilt[values[..., 3] > 0] = NAMES.index(one["value"]["brushlabels"][0])
        np.testing.assert_array_equal(rebuilt, labels)


def test_images_are_in_the_data_sets(made):
    """No link leads out of the folder, so that it can be moved, packed and mounted."""
    out, maps = made
    images = [
        path for path in out.rglob("*") if path.suffix in (".jpg", ".png") and "SegmentationClass" not in str(path)
    ]
    assert len(images) == 4 * len(maps) and not any(path.is_symlink() for path in images)


def test_an_image_takes_no_space_twice_on_one_disk(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"picture")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    for name in ("a.jpg", "link.jpg"):
        target = tmp_path / f"in-{name}"
        link(tmp_path / name, target, symbolic=False)
        assert target.samefile(tmp_path / "a.jpg") and not target.is_symlink()


@pytest.mark.parametrize("least", [1, 16])
def test_polygons_without_holes_are_valid_and_cover_the_region(least):
    """On 100 random label maps; `bench/valid_polygons.py` does it for 1,000."""
    for seed in range(100):
        rng = np.random.default_rng(seed)
        shape = tuple(rng.integers(1, 40, 2))
        labels = rng.integers(-1, 2, shape) if seed % 2 else blobs(seed, shape, 2)
        for region in regions(labels):
            assert shapely.Polygon(region.outline, region.holes).is_valid
            polygons = [shapely.Polygon(ring) for ring in without_holes(region, least)]
            assert all(polygon.is_valid for polygon in polygons)
            filled = sum(shapely.Polygon(hole).area for hole in region.holes if shapely.Polygon(hole).area < least)
            assert shapely.union_all(polygons).area == pytest.approx(sum(polygon.area for polygon in polygons))
            # A simplified slope is at most a third of a pixel beside its stairs.
            slack = 0.5 * sum(polygon.length for polygon in polygons) + 1
            assert sum(polygon.area for polygon in polygons) == pytest.approx(region.pixels + filled, abs=slack)
