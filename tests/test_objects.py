"""Objects from users' annotations to training targets."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from opensan.data.augment import AugmentConfig
from opensan.data.objects import class_of, is_object, with_objects
from opensan.data.prepare import READERS
from opensan.data.prepare.engine import prepare
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.errors import UserError
from opensan.outputs.segments import segments_picture
from opensan.train.san import SegmentationSource
from opensan.train.targets import LabelMapTargets, MaskTargets

SIZE = (20, 30)


def square(left, top, side):
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


def coco_folder(folder):
    """Write an image with two cats that touch, and a dog over one of them."""
    (folder / "images").mkdir(parents=True)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(folder / "images" / "a.png")
    shapes = [(1, square(0, 0, 8)), (1, square(8, 0, 9)), (2, square(10, 2, 3))]
    annotations = [
        {"id": number, "image_id": 1, "category_id": category, "segmentation": polygon, "iscrowd": 0}
        for number, (category, polygon) in enumerate(shapes, 1)
    ]
    data = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (folder / "instances_val.json").write_text(json.dumps(data))


def test_a_coco_reader_keeps_objects(tmp_path):
    coco_folder(tmp_path / "coco")
    prepare(READERS["coco-instances"].open(tmp_path / "coco"), "coco-instances", tmp_path / "out")
    folder = SegmentationFolder(tmp_path / "out", "val")
    assert folder.knows_objects
    labels, objects = folder[0][1], folder.objects(0)
    assert np.unique(objects).tolist() == [0, 1, 2, 3]
    assert ((objects == 0) == (labels < 0)).all()
    assert [np.unique(labels[objects == number]).tolist() for number in (1, 2, 3)] == [[0], [0], [1]]
    assert (objects[2:5, 10:13] == 3).all()


def test_a_panoptic_reader_keeps_things_apart_from_stuff(tmp_path):
    ids = np.full(SIZE, 7)
    ids[:5, :5], ids[:5, 10:15] = 300, 70_000
    folder = tmp_path / "coco"
    (folder / "images").mkdir(parents=True)
    (folder / "panoptic_val").mkdir()
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(folder / "images" / "a.png")
    segments_picture(ids).save(folder / "panoptic_val" / "a.png")
    segments = [{"id": 7, "category_id": 2}, {"id": 300, "category_id": 1}, {"id": 70_000, "category_id": 1}]
    data = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}],
    }
    (folder / "panoptic_val.json").write_text(json.dumps(data))
    prepare(READERS["coco-panoptic"].open(folder), "coco-panoptic", tmp_path / "out")
    objects = SegmentationFolder(tmp_path / "out", "val").objects(0)
    expected = np.zeros(SIZE)
    expected[:5, :5], expected[:5, 10:15] = 1, 2
    assert (objects == expected).all()


def test_a_changed_map_of_objects_is_prepared_again(tmp_path):
    coco_folder(tmp_path / "coco")
    source = READERS["coco-instances"].open(tmp_path / "coco")
    prepare(source, "coco-instances", tmp_path / "out")
    path = tmp_path / "out" / "objects" / "val_a.png"
    (path,) = (tmp_path / "out" / "objects").iterdir()
    right = path.read_bytes()
    path.write_bytes(b"broken")
    prepare(source, "coco-instances", tmp_path / "out")
    assert path.read_bytes() == right


def random_joined(seed, size=(16, 24)):
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(-1, 3, (4, 6)), np.ones((4, 4), int)).astype(np.int16)
    objects = np.kron(rng.integers(0, 3, (4, 6)), np.ones((4, 4), int)) * (labels == 1)
    return labels, objects, with_objects(labels, objects)


def test_joined_maps_give_a_segment_for_each_object():
    joined = [random_joined(seed) for seed in range(3)]
    maps = [one[2] for one in joined]
    found = LabelMapTargets.from_maps(maps)
    masks = [torch.from_numpy(np.stack([one == value for value in np.unique(one[one >= 0])])).float() for one in maps]
    classes = [torch.from_numpy(class_of(np.unique(one[one >= 0])).astype(np.int64)) for one in maps]
    expected = MaskTargets.from_masks(masks, classes)
    assert found.counts == expected.counts and found.classes.equal(expected.classes)
    assert max(found.counts) > 3  # more segments than classes
    points = torch.rand(3, 50, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found.at_shared_points(points), expected.at_shared_points(points))
    image, segment = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2])
    assert torch.allclose(found.at_own_points(image, segment, points), expected.at_own_points(image, segment, points))


def test_labels_alone_are_their_own_classes():
    labels, objects, joined = random_joined(4)
    assert (class_of(joined[joined >= 0]) == labels[labels >= 0]).all() and ((joined < 0) == (labels < 0)).all()
    assert (is_object(joined) == (objects > 0)).all()
    targets = LabelMapTargets.from_maps([labels])
    assert targets.values.equal(targets.classes)


def test_training_for_objects_crops_them_with_their_image(tmp_path):
    coco_folder(tmp_path / "coco")
    prepare(READERS["coco-instances"].open(tmp_path / "coco"), "coco-instances", tmp_path / "out")
    folder = SegmentationFolder(tmp_path / "out", "val")
    config = AugmentConfig(short_sides=(20,), crop=(20, 30), colour_jitter=False, flip=1)
    labels, joined = (
        SegmentationSource(folder, config, objects=objects).load(0, np.random.default_rng(0))[1]
        for objects in (False, True)
    )
    assert (np.where(joined < 0, -1, class_of(joined)) == labels).all()
    assert len(np.unique(joined[joined >= 0])) == 3 and len(np.unique(labels[labels >= 0])) == 2


def test_training_for_objects_needs_them():
    class Without:
        knows_objects = False

    with pytest.raises(UserError, match="training data set 1 has no folder objects/"):
        SegmentationSource(Without(), AugmentConfig(), objects=True)
