"""Metrics against a plain, slow reference that loops over classes and pixels as the definitions read."""

import copy
import json
import math
from typing import ClassVar

import numpy as np
import pytest

from opensan.evaluate.metrics import ConfusionMatrix
from opensan.evaluate.run import evaluate, model_predictor, segmenter_predictor, validation, write_report
from opensan.vocabulary import Vocabulary


def slow_metrics(pairs: list[tuple[np.ndarray, np.ndarray]], num_classes: int) -> dict:
    """The definitions, one class at a time, on boolean masks."""
    truth = np.concatenate([t.ravel() for t, _ in pairs])
    predicted = np.concatenate([p.ravel() for _, p in pairs])
    truth, predicted = truth[truth != -1], predicted[truth != -1]
    ious, accuracies, weights, union_ious = [], [], [], []
    for label in range(num_classes):
        is_truth, is_predicted = truth == label, predicted == label
        both, either = (is_truth & is_predicted).sum(), (is_truth | is_predicted).sum()
        if either:
            union_ious.append(both / either)
        if is_truth.any():
            ious.append(both / either)
            accuracies.append(both / is_truth.sum())
            weights.append(is_truth.mean())
    return {
        "miou": np.mean(ious) if ious else math.nan,
        "miou_union": np.mean(union_ious) if union_ious else math.nan,
        "fwiou": np.dot(ious, weights) if ious else math.nan,
        "mean_accuracy": np.mean(accuracies) if ious else math.nan,
        "pixel_accuracy": np.mean(truth == predicted) if ious else math.nan,
    }


def random_pair(generator: np.random.Generator, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps with unlabelled pixels, absent classes, and classes that are predicted but absent."""
    size = tuple(generator.integers(1, 12, size=2))
    in_truth = generator.choice(num_classes, size=generator.integers(1, num_classes + 1), replace=False)
    in_prediction = generator.choice(num_classes, size=generator.integers(1, num_classes + 1), replace=False)
    truth = generator.choice([*in_truth, -1], size=size).astype(np.int16)
    noise = generator.choice([*in_prediction, -1], size=size)
    return truth, np.where(generator.random(size) < 0.5, truth, noise).astype(np.int32)


def test_metrics_equal_the_definitions_on_random_maps():
    generator = np.random.default_rng(0)
    for _ in range(300):
        num_classes = int(generator.integers(1, 9))
        pairs = [random_pair(generator, num_classes) for _ in range(generator.integers(1, 4))]
        confusion = ConfusionMatrix(num_classes)
        for truth, predicted in pairs:
            confusion.update(truth, predicted)
        ours = confusion.metrics([str(label) for label in range(num_classes)]).summary()
        assert ours == pytest.approx(slow_metrics(pairs, num_classes), abs=1e-9, nan_ok=True)


def test_the_two_rules_differ_by_a_class_that_is_only_predicted():
    confusion = ConfusionMatrix(3)
    confusion.update(np.array([[0, 0, 1, 1]]), np.array([[0, 2, 1, 1]]))
    metrics = confusion.metrics(["a", "b", "c"])
    assert metrics.miou == pytest.approx((1 / 2 + 1) / 2)
    assert metrics.miou_union == pytest.approx((1 / 2 + 1 + 0) / 3)
    only_predicted = metrics.classes[2]
    assert (only_predicted.iou, only_predicted.pixels, only_predicted.predicted_pixels) == (0, 0, 1)
    assert math.isnan(only_predicted.accuracy)


def test_unlabelled_ground_truth_counts_nowhere_and_unlabelled_predictions_are_misses():
    confusion = ConfusionMatrix(2)
    confusion.update(np.array([[0, 0, -1, -1]]), np.array([[0, -1, 1, 0]]))
    metrics = confusion.metrics(["a", "b"])
    assert metrics.pixel_accuracy == 0.5
    assert [one.predicted_pixels for one in metrics.classes] == [1, 0]
    assert math.isnan(metrics.classes[1].iou)


def test_without_any_labelled_pixel_there_is_no_figure():
    confusion = ConfusionMatrix(2)
    confusion.update(np.full((2, 2), -1), np.zeros((2, 2), int))
    assert all(math.isnan(value) for value in confusion.metrics(["a", "b"]).summary().values())


def test_impossible_labels_are_refused():
    confusion = ConfusionMatrix(2)
    with pytest.raises(ValueError, match="prediction holds label 2, there are 2 classes"):
        confusion.update(np.array([[0]]), np.array([[2]]))
    with pytest.raises(ValueError, match="ground truth holds label 5"):
        confusion.update(np.array([[5]]), np.array([[0]]))
    with pytest.raises(ValueError, match=r"shape \(1, 2\), the ground truth \(2, 1\)"):
        confusion.update(np.array([[0], [0]]), np.array([[0, 0]]))


class Photographs:
    """Three small photographs of two words; the second cannot be read."""

    vocabulary = Vocabulary.parse(["sea", "sand|beach"])

    def __len__(self) -> int:
        return 3

    def name(self, index: int) -> str:
        return f"shore {index}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == 1:
            raise ValueError("shore_1.jpg: damaged")
        generator = np.random.default_rng(index)
        image = generator.integers(0, 256, (40 + 20 * index, 70, 3), dtype=np.uint8)
        return image, generator.integers(-1, 2, image.shape[:2]).astype(np.int16)


def test_evaluating_a_model_and_a_segmenter_is_the_same(small_model):
    from opensan.segmenter import Segmenter
    from opensan.text import TextEncoder

    data = Photographs()
    segmenter = Segmenter(copy.deepcopy(small_model))
    bare = model_predictor(small_model, TextEncoder(small_model).classifier(data.vocabulary), 2)
    one = evaluate(segmenter_predictor(segmenter, data.vocabulary), data, progress=False)
    two = evaluate(bare, data, progress=False)
    assert one == two
    assert (one.images, one.broken) == (2, ("shore 1: shore_1.jpg: damaged",))
    assert sum(c.pixels for c in one.metrics.classes) == sum((data[i][1] >= 0).sum() for i in (0, 2))
    assert validation(small_model, data)(7) == one.metrics.summary()


def test_a_report_has_every_figure_and_no_nan(tmp_path):
    class Never(Photographs):
        vocabulary = Vocabulary.parse(["sea", "sand", "moon|luna"])

    found = evaluate(lambda image: np.zeros(image.shape[:2], np.int32), Never(), progress=False)
    write_report(found, tmp_path / "report", title="Shore", about={"model": "all sea"})
    plain = json.loads((tmp_path / "report" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert plain["metrics"]["miou"] == found.metrics.miou
    assert plain["classes"][2] == {"name": "moon", "iou": None, "accuracy": None, "pixels": 0, "predicted_pixels": 0}
    assert plain["broken"] == ["shore 1: shore_1.jpg: damaged"]
    table = (tmp_path / "report" / "classes.csv").read_text().splitlines()
    assert table[0] == "name,iou,accuracy,pixels,predicted_pixels" and table[3] == "moon,,,0,0"
    text = (tmp_path / "report" / "metrics.md").read_text()
    assert "- model: all sea" in text and f"| sea | {100 * found.metrics.classes[0].iou:.2f} | 100.00 |" in text


def test_a_limit_spreads_over_the_data_set():
    class Many(Photographs):
        asked: ClassVar[list[int]] = []

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            self.asked.append(index)
            return np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.int16)

    assert evaluate(lambda image: np.zeros(image.shape[:2], int), Many(), limit=4, progress=False).images == 4
    assert Many.asked == [0, 2, 5, 7]
