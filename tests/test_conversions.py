"""Results as the types of other libraries, read by these libraries' own functions."""

import builtins
from dataclasses import replace

import numpy as np
import pytest
import torch

import opensan
from opensan.errors import UserError
from opensan.files import ASSETS
from opensan.segmenters.base import Segmenter
from opensan.segmenters.results import Segmentation

from .test_any_segmenter import ColourSegmenter

SCENE = ASSETS / "scenes" / "playground.png"
WORDS = "night sky, brick, red circle, green heart, blue star"


@pytest.fixture(scope="module")
def san() -> Segmenter:
    return opensan.load("tiny", text_cache=False)


@pytest.fixture(scope="module")
def segmentation(san) -> Segmentation:
    return san.segment(SCENE, WORDS)


def test_supervision_has_the_regions(segmentation):
    supervision = pytest.importorskip("supervision")
    detections = segmentation.to_supervision()
    present = [name for name, area in segmentation.areas.items() if area]
    assert 1 < len(present) == len(detections)
    assert detections.data["class_name"].tolist() == present
    rebuilt = np.full(segmentation.labels.shape, -1)
    for _, mask, confidence, label, _, data in detections:
        rebuilt[mask] = label
        assert data["class_name"] == segmentation.names[label]
        assert confidence == pytest.approx(segmentation.confidence[mask].mean(), abs=1e-5)
    np.testing.assert_array_equal(rebuilt, segmentation.labels)
    assert (detections.xyxy == supervision.mask_to_xyxy(detections.mask, "exclusive")).all()
    assert detections[detections.data["class_name"] == present[0]].class_id.tolist() == [
        segmentation.names.index(present[0])
    ]


def test_supervision_has_the_segments(segmentation):
    supervision = pytest.importorskip("supervision")
    detections = segmentation.to_supervision(segments=True)
    segments = segmentation.segments
    assert len(detections) == len(segments) > 1
    assert (detections.xyxy == supervision.mask_to_xyxy(detections.mask, "exclusive")).all()
    for detection, segment in zip(detections, segments, strict=True):
        _, mask, confidence, label, _, data = detection
        assert (mask == segment.mask).all() and confidence == pytest.approx(segment.score)
        assert segmentation.names[label] == data["class_name"] == segment.word
        assert (data["segment_id"], data["is_thing"]) == (segment.id, segment.kind == "thing")


@pytest.mark.parametrize("segments", [False, True])
def test_supervision_draws_and_exports_them(segmentation, segments, tmp_path):
    """Its annotators draw; a data set of them, written as COCO and as YOLO, is read again with equal boxes."""
    supervision = pytest.importorskip("supervision")
    detections = segmentation.to_supervision(segments=segments)
    for annotator in (supervision.MaskAnnotator(), supervision.BoxAnnotator(), supervision.LabelAnnotator()):
        assert (annotator.annotate(segmentation.image.copy(), detections) != segmentation.image).any()
    data = supervision.DetectionDataset(segmentation.names, [str(SCENE)], {str(SCENE): detections})
    data.as_coco(str(tmp_path / "images"), str(tmp_path / "coco.json"))
    back = supervision.DetectionDataset.from_coco(str(tmp_path / "images"), str(tmp_path / "coco.json"))
    assert back.classes == segmentation.names
    ((_, _, read),) = list(back)
    assert read.class_id.tolist() == detections.class_id.tolist()
    np.testing.assert_allclose(read.xyxy, detections.xyxy, atol=1)
    data.as_yolo(str(tmp_path / "images"), str(tmp_path / "labels"), str(tmp_path / "data.yaml"))
    assert (tmp_path / "labels" / "playground.txt").read_text().strip()


def test_supervision_and_torchvision_take_a_result_without_any_word(segmentation):
    pytest.importorskip("supervision")
    empty = replace(segmentation, labels=np.full_like(segmentation.labels, -1))
    detections = empty.to_supervision()
    assert len(detections) == 0 and detections.data["class_name"].shape == (0,)
    target = empty.to_tv_tensors()
    assert target["masks"].shape == (0, *empty.labels.shape) and target["boxes"].shape == (0, 4)


def test_torchvision_transforms_masks_and_boxes_together(segmentation):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    from torchvision import ops, tv_tensors

    for segments in (False, True):
        target = segmentation.to_tv_tensors(segments=segments)
        image = tv_tensors.Image(torch.from_numpy(segmentation.image).permute(2, 0, 1))
        boxes, edges = target["boxes"].as_subclass(torch.Tensor), ops.masks_to_boxes(target["masks"])
        assert (boxes == edges + torch.tensor([0, 0, 1, 1])).all()
        flipped, moved = v2.RandomHorizontalFlip(p=1)(image, target)
        assert (flipped == image.flip(-1)).all()
        assert (moved["masks"] == target["masks"].flip(-1)).all()
        assert (moved["semantic"] == target["semantic"].flip(-1)).all()
        assert (ops.masks_to_boxes(moved["masks"])[:, :2] == moved["boxes"].as_subclass(torch.Tensor)[:, :2]).all()
        assert target["labels"].dtype == torch.int64 and len(target["scores"]) == len(target["area"])
        assert target["area"].tolist() == target["masks"].sum((1, 2)).tolist()
    assert (target["semantic"].numpy() == segmentation.labels).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_image_of_torchvision_is_segmented(san, channels):
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, channels), dtype=np.uint8)
    image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
    expected = san.segment(pixels[..., 0] if channels == 1 else pixels, WORDS)
    assert (san.segment(image, WORDS).image == expected.image).all()


def test_a_batch_of_torchvision_says_what_to_do(san):
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    with pytest.raises(UserError, match="for a batch give a list of images"):
        san.segment(tv_tensors.Image(torch.zeros((2, 3, 8, 8), dtype=torch.uint8)), WORDS)


@pytest.mark.parametrize("name", ["supervision", "torchvision"])
def test_a_library_that_is_missing_is_named_with_its_extra(segmentation, name, monkeypatch):
    load = builtins.__import__

    def without(module, *rest):
        if module.partition(".")[0] == name:
            raise ImportError(module)
        return load(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    method = segmentation.to_supervision if name == "supervision" else segmentation.to_tv_tensors
    with pytest.raises(UserError, match=rf"needs {name}: pip install '\.\[{name}\]'"):
        method()


def test_segments_of_a_model_without_proposals_are_refused():
    pytest.importorskip("supervision")
    answer = ColourSegmenter().segment(np.zeros((8, 8, 3), dtype=np.uint8), "red, green")
    with pytest.raises(UserError, match="segments need a model with mask proposals"):
        answer.to_supervision(segments=True)
    assert len(answer.to_supervision()) >= 1
