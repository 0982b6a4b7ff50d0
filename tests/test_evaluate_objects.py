"""PQ and AP against torchmetrics and pycocotools, on random maps."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import opensan
from opensan.cli import main
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.errors import UserError
from opensan.evaluation.objects import PanopticCounts, PrecisionCounts, evaluate_objects
from opensan.lab.grounds import GROUNDS
from opensan.lab.san_training import SceneDataset
from opensan.lab.scenes import BASE_NAMES
from opensan.outputs.coco import run_lengths

CLASSES = 5
THINGS = {0, 1, 2}
NO_SEGMENT, UNKNOWN = CLASSES, CLASSES + 1
"""torchmetrics leaves pixels of unknown classes out, in predictions too: so a class stands for pixels of no segment."""


def random_segments(rng, size=(24, 32), unlabelled=True):
    """Return a map of segments and their classes: rectangles over one another, stuff of one class merged."""
    ids = np.zeros(size, np.int64)
    classes = []
    for _ in range(int(rng.integers(1, 9))):
        label = int(rng.integers(CLASSES))
        top, left = rng.integers(size[0] - 4), rng.integers(size[1] - 4)
        number = classes.index(label) + 1 if label not in THINGS and label in classes else len(classes) + 1
        if number > len(classes):
            classes.append(label)
        ids[top : top + rng.integers(4, 20), left : left + rng.integers(4, 24)] = number
    kept = np.unique(ids[ids > 0])
    number = np.zeros(len(classes) + 1, np.int64)
    number[kept] = np.arange(1, len(kept) + 1)
    return number[ids], [classes[index - 1] for index in kept]


def shifted(rng, ids, classes):
    """Return segments much like others: moved by some pixels, and some with another class."""
    moved = np.roll(ids, rng.integers(-3, 4, 2), (0, 1))
    return moved, [
        label if rng.random() < 0.8 else int(rng.integers(3)) if label in THINGS else label for label in classes
    ]


def as_torchmetrics(ids, classes, nothing):
    """Return [1, H, W, 2]: class and number; pixels of no segment are of the class `nothing`."""
    table = np.array([nothing, *classes])
    numbers = np.array([0, *(i if label in THINGS else 0 for i, label in enumerate(classes, 1))])
    return torch.from_numpy(np.stack([table[ids], numbers[ids]], -1))[None]


def test_panoptic_quality_is_that_of_torchmetrics():
    detection = pytest.importorskip("torchmetrics.detection")
    rng = np.random.default_rng(0)
    ours = PanopticCounts(CLASSES)
    for run in range(200):
        theirs = detection.PanopticQuality(
            things=THINGS,
            stuffs={*range(CLASSES), NO_SEGMENT} - THINGS,
            allow_unknown_preds_category=True,
            return_per_class=True,
            return_sq_and_rq=True,
        )
        single = PanopticCounts(CLASSES)
        for _ in range(3):
            truth, true_classes = random_segments(rng)
            ids, classes = shifted(rng, truth, true_classes) if run % 2 else random_segments(rng)
            theirs.update(as_torchmetrics(ids, classes, NO_SEGMENT), as_torchmetrics(truth, true_classes, UNKNOWN))
            single.update(truth, true_classes, ids, classes)
            ours.update(truth, true_classes, ids, classes)
        expected = theirs.compute().numpy().reshape(-1, 3)[:CLASSES]
        assert np.allclose(np.nan_to_num(single.qualities()), np.nan_to_num(expected), atol=1e-6)
    assert (ours.matched > 50).all() and (ours.wrong > 50).all() and (ours.missed > 50).all()


def test_a_segment_mostly_on_unlabelled_pixels_is_not_counted():
    counts = PanopticCounts(1)
    truth, ids = np.zeros((4, 4), int), np.zeros((4, 4), int)
    truth[0, 0] = 1
    ids[0, 1:] = 1
    counts.update(truth, [0], ids, [0])
    assert counts.wrong.tolist() == [0] and counts.missed.tolist() == [1]


def test_average_precision_is_that_of_pycocotools(capsys):
    rng = np.random.default_rng(1)
    seen = set()
    for run in range(60):
        counts = PrecisionCounts([f"class {k}" for k in range(CLASSES)])
        truth_json = {
            "images": [],
            "annotations": [],
            "categories": [{"id": k, "name": str(k)} for k in range(CLASSES)],
        }
        found_json = []
        for image in range(1, 5):
            truth, true_classes = random_segments(rng)
            ids, classes = shifted(rng, truth, true_classes) if run % 2 else random_segments(rng)
            scores = rng.random(len(classes)).tolist()
            counts.update(truth, true_classes, ids, classes, scores)
            truth_json["images"].append({"id": image, "height": 24, "width": 32})
            for number, rle in run_lengths(truth - 1, len(true_classes)).items():
                area = int((truth == number + 1).sum())
                entry = {"id": len(truth_json["annotations"]) + 1, "image_id": image, "iscrowd": 0, "area": area}
                entry |= {"category_id": true_classes[number], "segmentation": rle, "bbox": [0, 0, 1, 1]}
                truth_json["annotations"].append(entry)
            for number, rle in run_lengths(ids - 1, len(classes)).items():
                found_json.append(
                    {"image_id": image, "category_id": classes[number], "segmentation": rle, "score": scores[number]}
                )
        coco = COCO()
        coco.dataset = truth_json
        coco.createIndex()
        plain = COCOeval(coco, coco.loadRes(found_json), "segm")
        plain.evaluate()
        plain.accumulate()
        plain.summarize()
        ours = counts.precisions()
        assert np.allclose(list(ours.values()), plain.stats[:3], atol=1e-6)
        seen.add(round(ours["ap"], 2))
    capsys.readouterr()
    assert len(seen) > 12


@pytest.fixture(scope="module")
def tiny():
    return opensan.load("tiny", text_cache=False)


def scenes(count=4):
    return SceneDataset(5, count, (96, 128), "masks", BASE_NAMES, 0.6)


def test_scenes_know_their_objects(tiny):
    dataset = scenes(6)
    for index in range(6):
        labels, objects = dataset[index][1], dataset.objects(index)
        ground = np.array([name in GROUNDS for name in BASE_NAMES])[labels]
        assert labels.shape == objects.shape and ((objects == 0) == ground).all()
        for number in np.unique(objects[objects > 0]):
            assert len(np.unique(labels[objects == number])) == 1


def write_set(folder, dataset, with_objects=True):
    """Write a data set in the canonical layout."""
    for name in ("images", "labels", "objects"):
        (folder / name).mkdir(parents=True)
    for index in range(len(dataset)):
        image, labels = dataset[index]
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        Image.fromarray(labels.astype(np.uint8)).save(folder / "labels" / f"{index}.png")
        Image.fromarray(dataset.objects(index).astype(np.uint16)).save(folder / "objects" / f"{index}.png")
    (folder / "classes.txt").write_text("\n".join(dataset.vocabulary.names) + "\n")
    (folder / "val.txt").write_text("".join(f"{index}\n" for index in range(len(dataset))))
    if not with_objects:
        for path in (folder / "objects").iterdir():
            path.unlink()
        (folder / "objects").rmdir()


def run(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    output = capsys.readouterr()
    return caught.value.code or 0, output.out, output.err


def test_the_command_measures_objects(tiny, tmp_path, capsys):
    write_set(tmp_path / "scenes", scenes())
    command = ["eval", "--data", str(tmp_path / "scenes"), "-m", "tiny", "-o", str(tmp_path / "out")]
    code, out, error = run([*command, "--panoptic", "--instances", "--json"], capsys)
    assert code == 0, error
    (line,) = json.loads(out)
    assert set(line["objects"]) == {"pq", "sq", "rq", "pq_thing", "pq_stuff", "ap", "ap50", "ap75"}
    record = json.loads((tmp_path / "out" / "scenes" / "objects.json").read_text())
    assert record["images"] == 4 and not set(record["rules"]["things"]) & set(GROUNDS)
    folder = SegmentationFolder(tmp_path / "scenes", "val")
    again = evaluate_objects(tiny, folder)
    assert json.loads(json.dumps(again.summary())) == pytest.approx(record["metrics"], nan_ok=True)
    code, out, _ = run([*command, "--panoptic", "--objects", "proposals"], capsys)
    assert code == 0 and "PQ" in out and "AP" not in out


def test_a_set_without_objects_is_refused_before_the_work(tmp_path, capsys):
    write_set(tmp_path / "scenes", scenes(1), with_objects=False)
    code, _, error = run(["eval", "--data", str(tmp_path / "scenes"), "-m", "no such model", "--panoptic"], capsys)
    assert code == 1 and "has no folder objects/" in error and "no such model" not in error


def test_maps_of_objects_must_fit(tmp_path):
    write_set(tmp_path / "scenes", scenes(1))
    Image.fromarray(np.zeros((3, 3), np.uint16)).save(tmp_path / "scenes" / "objects" / "0.png")
    with pytest.raises(UserError, match="is 3x3, its image 128x96"):
        SegmentationFolder(tmp_path / "scenes", "val").objects(0)
