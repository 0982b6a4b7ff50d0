"""Metrics against a plain, slow reference that loops over classes and pixels as the definitions read."""

import copy
import json
import math
from typing import ClassVar

import numpy as np
import pytest
from scipy import ndimage

from opensan.errors import UserError
from opensan.evaluation.boundary import band_width
from opensan.evaluation.evaluation import evaluate, model_predictor, segmenter_predictor, validation
from opensan.evaluation.metrics import Counts, count_image
from opensan.evaluation.report import write_report
from opensan.vocabulary import Vocabulary


def slow_metrics(pairs: list[tuple[np.ndarray, np.ndarray]], num_classes: int) -> dict:
    """The definitions, one class at a time, on boolean masks."""
    boundary_ious = slow_boundary_ious(pairs, num_classes)
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
        "boundary_iou": np.mean(boundary_ious) if boundary_ious else math.nan,
    }


def slow_boundary_ious(pairs: list[tuple[np.ndarray, np.ndarray]], num_classes: int) -> list[float]:
    """Of the classes in the ground truth. A mask's band is what as many 3 x 3 erosions as 2 % of the diagonal take
    away, the outside of the image being no part of the mask; unlabelled ground truth belongs to no mask of either."""
    ious = []
    for label in range(num_classes):
        both = either = 0
        for truth, predicted in pairs:
            bands = []
            for mask in (truth == label, (predicted == label) & (truth != -1)):
                width = max(1, round(0.02 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2)))
                inside = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=width, border_value=0)
                bands.append(mask & ~inside)
            both, either = both + (bands[0] & bands[1]).sum(), either + (bands[0] | bands[1]).sum()
        if any((truth == label).any() for truth, _ in pairs):
            ious.append(both / either)
    return ious


def random_pair(generator: np.random.Generator, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps with unlabelled pixels, absent classes, and classes that are predicted but absent."""
    size = tuple(generator.integers(1, 12, size=2)) if generator.random() < 0.8 else (150, 121)  # bands of 1 and 4
    cell = int(generator.choice([1, 3, 30]))
    in_truth = generator.choice(num_classes, size=generator.integers(1, num_classes + 1), replace=False)
    in_prediction = generator.choice(num_classes, size=generator.integers(1, num_classes + 1), replace=False)
    truth = generator.choice([*in_truth, -1], size=size).astype(np.int16)
    noise = generator.choice([*in_prediction, -1], size=size)
    pair = truth, np.where(generator.random(size) < 0.5, truth, noise).astype(np.int32)
    # Regions rather than speckles, or no pixel would be inside of anything.
    return tuple(np.kron(labels, np.ones((cell, cell), labels.dtype))[: size[0], : size[1]] for labels in pair)


def test_metrics_equal_the_definitions_on_random_maps():
    generator = np.random.default_rng(0)
    maps = 0
    while maps < 1_000:
        num_classes = int(generator.integers(1, 9))
        pairs = [random_pair(generator, num_classes) for _ in range(generator.integers(1, 4))]
        maps += len(pairs)
        confusion = Counts(num_classes)
        for truth, predicted in pairs:
            confusion.update(truth, predicted)
        ours = confusion.metrics([str(label) for label in range(num_classes)]).summary()
        assert ours == pytest.approx(slow_metrics(pairs, num_classes), abs=1e-9, nan_ok=True)


def test_boundary_bands_of_two_squares():
    """By hand: on 100 x 100 the band is 3 wide; a 20-pixel square's band is 20^2 - 14^2 pixels."""
    assert band_width((100, 100)) == 3
    truth, predicted = np.zeros((100, 100), int), np.zeros((100, 100), int)
    truth[40:60, 40:60] = 1
    predicted[40:60, 45:65] = 1
    counts = Counts(2)
    counts.update(truth, predicted)
    band = 20**2 - 14**2
    # Rows 40-42 and 57-59: 15 shared columns each; rows between: columns 57-59 and 45-47 are not in both bands.
    assert counts.bands[1].tolist() == [band, band, 6 * 15]
    assert counts.metrics(["ground", "square"]).classes[1].boundary_iou == 90 / (2 * band - 90)


def test_a_photograph_counts_the_same_alone_and_in_the_sum():
    generator = np.random.default_rng(1)
    for _ in range(50):
        truth, predicted = random_pair(generator, 5)
        counts = Counts(5)
        counts.update(truth, predicted)
        metrics = counts.metrics(list("abcde"))
        figures = count_image(truth, predicted, 5).figures(5)
        assert figures == pytest.approx((metrics.miou, metrics.pixel_accuracy), abs=1e-12, nan_ok=True)


def test_worst_confusions_are_the_largest_off_the_diagonal():
    counts = Counts(3)
    counts.update(np.array([[0, 0, 0, 0, 1, 1, 2, 2]]), np.array([[0, 1, 1, -1, 1, 1, 2, 0]]))
    found = [(one.truth, one.predicted, one.pixels, one.share) for one in counts.worst_confusions(list("abc"), 2)]
    assert found == [("a", "b", 2, 0.5), ("a", "unlabelled", 1, 0.25)]
    assert len(counts.worst_confusions(list("abc"))) == 3


def test_the_two_rules_differ_by_a_class_that_is_only_predicted():
    confusion = Counts(3)
    confusion.update(np.array([[0, 0, 1, 1]]), np.array([[0, 2, 1, 1]]))
    metrics = confusion.metrics(["a", "b", "c"])
    assert metrics.miou == pytest.approx((1 / 2 + 1) / 2)
    assert metrics.miou_union == pytest.approx((1 / 2 + 1 + 0) / 3)
    only_predicted = metrics.classes[2]
    assert (only_predicted.iou, only_predicted.pixels, only_predicted.predicted_pixels) == (0, 0, 1)
    assert math.isnan(only_predicted.accuracy)


def test_unlabelled_ground_truth_counts_nowhere_and_unlabelled_predictions_are_misses():
    confusion = Counts(2)
    confusion.update(np.array([[0, 0, -1, -1]]), np.array([[0, -1, 1, 0]]))
    metrics = confusion.metrics(["a", "b"])
    assert metrics.pixel_accuracy == 0.5
    assert [one.predicted_pixels for one in metrics.classes] == [1, 0]
    assert math.isnan(metrics.classes[1].iou)


def test_without_any_labelled_pixel_there_is_no_figure():
    confusion = Counts(2)
    confusion.update(np.full((2, 2), -1), np.zeros((2, 2), int))
    assert all(math.isnan(value) for value in confusion.metrics(["a", "b"]).summary().values())


def test_impossible_labels_are_refused():
    confusion = Counts(2)
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
            raise UserError("shore_1.jpg: damaged")
        generator = np.random.default_rng(index)
        image = generator.integers(0, 256, (40 + 20 * index, 70, 3), dtype=np.uint8)
        return image, generator.integers(-1, 2, image.shape[:2]).astype(np.int16)


def test_evaluating_a_model_and_a_segmenter_is_the_same(small_model):
    from opensan.segmenters.san import SanSegmenter
    from opensan.text.encoder import TextEncoder

    data = Photographs()
    segmenter = SanSegmenter(copy.deepcopy(small_model))
    bare = model_predictor(small_model, TextEncoder(small_model).classifier(data.vocabulary), 2)
    one = evaluate(segmenter_predictor(segmenter, data.vocabulary), data, progress=False)
    two = evaluate(bare, data, progress=False)
    assert one == two
    assert (one.images, one.broken) == (2, ("shore 1: shore_1.jpg: damaged",))
    assert sum(c.pixels for c in one.metrics.classes) == sum((data[i][1] >= 0).sum() for i in (0, 2))
    with pytest.warns(UserWarning, match=r"leaves out .* \(1 of 3\), the first is shore 1: shore_1.jpg: damaged"):
        assert validation(small_model, data)(7) == one.metrics.summary()


def test_a_report_has_every_figure_and_no_nan(tmp_path):
    class Never(Photographs):
        vocabulary = Vocabulary.parse(["sea", "sand", "moon|luna"])

    found = evaluate(lambda image: np.zeros(image.shape[:2], np.int32), Never(), progress=False)
    write_report(found, tmp_path / "report", title="Shore", about={"model": "all sea"})
    plain = json.loads((tmp_path / "report" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert plain["metrics"]["miou"] == found.metrics.miou
    assert plain["classes"][2] == {
        **{"name": "moon", "iou": None, "accuracy": None, "boundary_iou": None},
        **{"pixels": 0, "predicted_pixels": 0},
    }
    assert plain["broken"] == ["shore 1: shore_1.jpg: damaged"]
    table = (tmp_path / "report" / "classes.csv").read_text().splitlines()
    assert table[0] == "name,iou,accuracy,boundary_iou,pixels,predicted_pixels" and table[3] == "moon,,,,0,0"
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
