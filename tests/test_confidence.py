"""Confidence: calibrated or not, thresholds, the calibration error, and the fit."""

import json
import math
import pickle
from dataclasses import astuple

import numpy as np
import pytest
import torch

import opensan
from opensan.assemble.calibration import Calibration, distribution
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.errors import UserError
from opensan.evaluation.calibrate import PIXELS, Fit, fit_calibration
from opensan.evaluation.confidence import ConfidenceMetrics, Confidences, count_confidence
from opensan.evaluation.measure import measure
from opensan.evaluation.metrics import Counts
from opensan.evaluation.predictors import ModelPredictor
from opensan.files import ASSETS
from opensan.vocabulary import Vocabulary

from .test_any_segmenter import WORDS, ColourSegmenter, stripes
from .test_evaluate import NAMES, folder, same  # noqa: F401 (a fixture)

SCENE = ASSETS / "scenes" / "playground.png"
ASKED = "brick, sand, night sky"


def calibration(segmenter, **other) -> Calibration:
    values = {
        "model": str(segmenter.identity),
        "temperature": 0.7,
        "words": ("brick", "sand", "night sky"),
        "data": "scenes, val",
        "images": 3,
        "pixels": 6000,
        "ece_before": 0.2,
        "ece_after": 0.05,
    }
    return Calibration(**values | other)


@pytest.fixture
def tiny():
    return opensan.load("tiny", text_cache=False)


@pytest.fixture(scope="module")
def plain():
    """`tiny` without a calibration, and its answer for a scene. Not to be changed."""
    segmenter = opensan.load("tiny", text_cache=False)
    return segmenter, segmenter.segment(str(SCENE), ASKED)


# A calibrated pixel


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("doubtful", [None, 3.0])
def test_probabilities_sum_to_one_and_keep_the_order_of_the_scores(temperature, doubtful):
    scores = np.random.default_rng(0).uniform(0, 1.2, (7, 40, 30)).astype(np.float32)
    scores[3] = 0
    used = Calibration("m", temperature, ("a",), "d", 1, 1, 0.1, 0.1, doubtful, 0.0 if doubtful is None else 0.9)
    found = distribution(scores, used)
    assert np.abs(found.sum(axis=0) - 1).max() < 1e-5
    assert (found.argmax(axis=0) == scores.argmax(axis=0)).all()
    chosen = np.where(scores.max(axis=0) < used.doubtful_below, doubtful or temperature, temperature)
    expected = scores.astype(float) ** (1 / chosen)
    assert np.abs(found - expected / expected.sum(axis=0)).max() < 1e-5


def test_confidence_is_the_probability_of_the_pixels_word_and_labels_stay(tiny, plain):
    before = plain[1]
    tiny.calibrate(calibration(tiny))
    after = tiny.segment(str(SCENE), ASKED)
    assert (after.labels == before.labels).all()
    assert np.abs(after.confidence - before.confidence).max() > 0.05
    for x, y in ((3, 5), (100, 60), (40, 90)):
        of_words = after.distribution(x, y)
        assert list(of_words) == ["brick", "sand", "night sky"] and abs(sum(of_words.values()) - 1) < 1e-5
        assert abs(of_words[after.names[after.labels[y, x]]] - after.confidence[y, x]) < 1e-5
    assert (pickle.loads(pickle.dumps(after)).confidence == after.confidence).all()


def test_the_rest_and_background_words_are_part_of_the_distribution(tiny):
    tiny.calibrate(calibration(tiny))
    segmentation = tiny.segment(str(SCENE), "brick", background="sand", rest=True)
    of_words = segmentation.distribution(3, 5)
    assert list(of_words) == ["brick", "sand", "none of these"] and abs(sum(of_words.values()) - 1) < 1e-5
    assert segmentation.about_confidence()["calibration"]["words_not_fitted"] == []


def test_any_segmenter_can_be_calibrated():
    segmenter = ColourSegmenter()
    segmenter.calibrate(calibration(segmenter, words=tuple(WORDS), temperature=2.0))
    segmentation = segmenter.segment(stripes(), WORDS)
    scores = segmenter.scores(segmentation.encoding, segmentation.vocabulary)(slice(0, 96))
    expected = np.sqrt(scores) / np.sqrt(scores).sum(axis=0)
    assert np.abs(segmentation.confidence - expected.max(axis=0)).max() < 1e-5


# The record


def test_the_record_says_calibrated_or_not_and_on_what(tiny, plain):
    told = plain[1].to_dict()["confidence"]
    assert told == {"calibrated": False, "calibration": None, "threshold": 0.0, "below_threshold": 0.0}
    tiny.calibrate(calibration(tiny, words=("sand",)))
    with pytest.warns(UserWarning, match=r"was fitted \(on scenes, val\) without 'brick', 'night sky': how sure"):
        told = tiny.segment(str(SCENE), ASKED).to_dict()["confidence"]
    assert told["calibrated"] and told["calibration"]["data"] == "scenes, val"
    assert told["calibration"]["temperature"] == 0.7
    assert told["calibration"]["words_not_fitted"] == ["brick", "night sky"]


def test_a_synonym_that_was_fitted_is_enough():
    vocabulary = Vocabulary.parse("Car|automobile, sky", background="tree")
    used = Calibration("m", 1.0, ("automobile", "SKY"), "d", 1, 1, 0.1, 0.1)
    assert used.not_fitted(vocabulary) == ["tree"]


# Thresholds


def test_pixels_below_the_threshold_are_unlabelled(plain):
    segmenter, whole = plain
    threshold = float(np.median(whole.confidence))
    found = segmenter.segment(whole.encoding, ASKED, threshold=threshold)
    expected = np.where(whole.confidence < threshold, -1, whole.labels)
    assert (found.labels == expected).all() and 0.1 < found.below_threshold < 0.9
    assert (found.labels == whole.above(threshold).labels).all()
    assert (found.winners == whole.winners).all() and (found.confidence == whole.confidence).all()
    told = found.to_dict()
    assert told["confidence"]["threshold"] == threshold
    assert told["confidence"]["below_threshold"] == told["unlabelled"]["area"] == found.below_threshold
    assert (whole.above(0).labels == whole.labels).all()


@pytest.mark.parametrize("threshold", [-0.1, 1.5, math.nan, "0.5", True])
def test_a_threshold_is_from_0_to_1(plain, threshold):
    with pytest.raises(UserError, match=r"the threshold of confidence must be from 0 to 1, not "):
        plain[0].segment(plain[1].encoding, ASKED, threshold=threshold)


def test_without_a_calibration_there_is_no_distribution(plain):
    with pytest.raises(UserError, match="without a calibration, scores are no probabilities"):
        plain[1].distribution(3, 5)


# The file


def test_a_calibration_is_read_back(tmp_path, plain):
    for used in (calibration(plain[0]), calibration(plain[0], doubtful_temperature=2.5, doubtful_below=0.4)):
        assert Calibration.load(used.save(tmp_path / "c.json")) == used


def damage(text: str, **values) -> str:
    return json.dumps(json.loads(text) | values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "not a calibration, no JSON"),
        (lambda text: text[:40], "not a calibration, no JSON"),
        (lambda text: "[" * 100_000, "not a calibration, no JSON"),
        (lambda text: "[1]", 'it has no "opensan_calibration": 1'),
        (lambda text: '{"format": 1, "words": []}', 'it has no "opensan_calibration": 1'),
        (lambda text: damage(text, opensan_calibration=2), 'it has no "opensan_calibration": 1'),
        (lambda text: damage(text, more=1), "'more' is unknown"),
        (lambda text: text.replace('"pixels"', '"pixel"'), "'pixel' is unknown"),
        (lambda text: damage(text, temperature=0), "temperature must be from 0.001 to 1000, not 0"),
        (lambda text: damage(text, temperature="1"), "temperature must be from 0.001 to 1000, not '1'"),
        (lambda text: damage(text, doubtful_temperature=-1), "temperature must be from 0.001 to 1000, not -1"),
        (lambda text: damage(text, doubtful_below=-1), "doubtful_below must be 0 or more, not -1"),
        (lambda text: damage(text, ece_after=2), "ece_after must be from 0 to 1, not 2"),
        (lambda text: damage(text, pixels=0), "pixels must be a whole number from 1, not 0"),
        (lambda text: damage(text, words="any"), "\"words\" must be a list, not 'any'"),
        (lambda text: damage(text, words=[1]), "must be texts, not 1"),
    ],
)
def test_a_damaged_or_foreign_file_gets_one_line(tmp_path, plain, change, message):
    path = calibration(plain[0]).save(tmp_path / "c.json")
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError) as caught:
        opensan.load("tiny", calibration=path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_another_models_get_one_line(tmp_path, plain):
    with pytest.raises(UserError, match=r"c\.json: can't be read"):
        opensan.load("tiny", calibration=tmp_path / "c.json")
    path = calibration(plain[0], model="photo-123").save(tmp_path / "c.json")
    with pytest.raises(UserError, match=r"c\.json: this calibration was fitted for the model photo-123, not for tiny-"):
        opensan.load("tiny", calibration=path)


def test_the_calibration_in_a_models_folder_is_used(model_folder, tmp_path):
    import shutil

    own = shutil.copytree(model_folder, tmp_path / "model")
    segmenter = opensan.load(own, text_cache=False)
    assert segmenter.calibration is None
    used = calibration(segmenter)
    used.save(own / "calibration.json")
    assert opensan.load(own, text_cache=False).calibration == used
    (own / "calibration.json").write_text("{}")
    with pytest.raises(UserError, match=r"calibration\.json: not a calibration"):
        opensan.load(own)


# The commands


def test_the_command_applies_calibration_and_threshold_and_says_so(tiny, tmp_path, run):
    path = calibration(tiny, words=("brick", "night sky")).save(tmp_path / "c.json")
    arguments = ["segment", SCENE, "-w", ASKED, "-m", "tiny", "--calibration", path, "--threshold", "0.9"]
    code, out, err = run(*arguments, "-o", tmp_path / "out", "--json")
    assert code == 0, err
    assert err.count("\n") == 1 and "was fitted (on scenes, val) without 'sand'" in err
    told = json.loads(out)["confidence"]
    assert told["calibrated"] and told["threshold"] == 0.9 and 0 < told["below_threshold"] < 1
    record = json.loads((tmp_path / "out" / "playground.segments.json").read_text())
    assert record["confidence"] == told and record["unlabelled"]["area"] == told["below_threshold"]
    code, out, err = run(*arguments, "-o", tmp_path / "out")
    assert (
        code == 0 and f"below 0.9: {100 * told['below_threshold']:.1f} % of the pixels" in out and "probability" in out
    )


@pytest.mark.parametrize("threshold", ["-0.5", "1.01", "nan"])
def test_a_wrong_threshold_is_refused_before_the_work(tmp_path, run, threshold):
    code, _, err = run("segment", tmp_path / "no.jpg", "-w", "car, sky", "--threshold", threshold)
    assert code == 2 and err == f"error: --threshold {threshold}: must be from 0 to 1\n"


def test_a_stream_tells_what_its_confidence_is_and_refuses_a_wrong_threshold(tiny, tmp_path, run, monkeypatch):
    import io
    import sys

    path = calibration(tiny).save(tmp_path / "c.json")
    line = json.dumps({"image": str(SCENE), "words": ASKED}) + "\n"
    arguments = ["segment", "-", "--lines", "-m", "tiny", "--calibration", path, "--threshold"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line.encode())))
    code, out, err = run(*arguments, "0.9")
    answer = json.loads(out)
    assert code == 0 and answer["confidence"]["calibrated"], err
    assert (
        answer["confidence"]["threshold"] == 0.9 and answer["confidence"]["below_threshold"] == answer["unlabelled"] > 0
    )
    code, _, err = run(*arguments, "1.2")
    assert code == 2 and err == "error: --threshold 1.2: must be from 0 to 1\n"


def test_a_folder_is_labelled_anew_with_another_threshold_or_calibration(tiny, tmp_path, run):
    path = calibration(tiny).save(tmp_path / "c.json")
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(SCENE.read_bytes())
    common = ["segment", tmp_path / "in", "-w", ASKED, "-m", "tiny", "-o", tmp_path / "out", "--json"]
    for more in ([], ["--threshold", "0.99"], ["--threshold", "0.99", "--calibration", path]):
        code, out, err = run(*common, *more)
        lines = [json.loads(line) for line in out.splitlines()]
        assert code == 0 and len(lines) == 2, (more, err)
        assert (lines[0]["unlabelled"] > 0) == bool(more)
    assert run(*common, *more)[1] == ""  # nothing is left to do


# The fit


def scores_and_truth(count: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose T-th root, normalised, is the probability of each word."""
    generator = np.random.default_rng(4)
    shares = generator.dirichlet(np.full(5, 0.4), count).T
    truth = (shares.cumsum(axis=0) < generator.uniform(size=count)).sum(axis=0).clip(0, 4)
    return (shares**temperature).astype(np.float32) * 0.8, truth


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_fit_finds_the_temperature_of_made_up_scores(temperature):
    fit = Fit()
    scores, truth = scores_and_truth(40_000, temperature)
    for some in np.array_split(np.arange(40_000), 20):
        fit.add(scores[:, some], truth[some], 5)
    found = fit.calibration("m", ("a",), "made up")
    assert found.doubtful_temperature is None and abs(math.log(found.temperature / temperature)) < 0.08
    assert found.ece_after < 0.015 and (found.images, found.pixels) == (20, 40_000)
    if temperature != 1:
        assert found.ece_before > 0.05


def test_the_fit_scales_selectively_where_that_helps():
    fit = Fit()
    sure, doubtful = scores_and_truth(20_000, 0.5), scores_and_truth(20_000, 3.0)
    for some in np.array_split(np.arange(20_000), 20):
        scores = np.concatenate([sure[0][:, some] / sure[0][:, some].max(axis=0), doubtful[0][:, some] * 0.3], axis=1)
        fit.add(scores, np.concatenate([sure[1][some], doubtful[1][some]]), 5)
    found = fit.calibration("m", ("a",), "made up")
    assert abs(math.log(found.temperature / 0.5)) < 0.15 and abs(math.log(found.doubtful_temperature / 3)) < 0.15
    assert 0.2 < found.doubtful_below < 1.01 and found.ece_after < 0.02


def test_pixels_that_background_words_win_are_not_fitted_on():
    fit = Fit()
    scores, truth = scores_and_truth(4_000, 1.0)
    fit.add(scores, truth, 2)
    assert fit.pixels == (scores.argmax(axis=0) < 2).sum()


def test_a_set_without_labels_is_refused():
    with pytest.raises(UserError, match="shore: no pixel has both a label and a word: nothing to fit on"):
        Fit().calibration("m", ("a",), "shore")


def test_a_calibration_is_fitted_on_a_data_set(folder, tmp_path, model_folder, run):  # noqa: F811
    (folder / "images" / "a1.png").write_bytes(b"no image")
    code, _, err = run("calibrate", "--data", folder, "-m", model_folder, "-o", tmp_path / "c.json")
    assert code == 1 and err.startswith("error: a1: ") and err.count("\n") == 1
    found = Calibration.load(tmp_path / "c.json")
    assert (found.data, found.images) == ("shore, val", 6) and found.pixels <= 6 * PIXELS
    assert found.words == tuple(NAMES)
    segmenter = opensan.load(model_folder, calibration=tmp_path / "c.json")
    dataset = SegmentationFolder(folder, "val")
    assert fit_calibration(segmenter, dataset, "shore, val")[0] == found  # whatever calibration is in use


def test_a_stopped_fit_continues_and_a_damaged_progress_begins_anew(folder, tmp_path, small_model, monkeypatch):  # noqa: F811
    from opensan.evaluation import calibrate
    from opensan.segmenters.san import SanSegmenter

    monkeypatch.setattr(calibrate, "SAVE_EVERY", 0)
    dataset, segmenter = SegmentationFolder(folder, "val"), SanSegmenter(small_model)
    whole, _ = fit_calibration(segmenter, dataset, "shore, val")
    kept, seen = tmp_path / "kept.sqlite", []

    def stop_at(last):
        def progress(done, total):
            seen.append(done)
            if done == last:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        fit_calibration(segmenter, dataset, "shore, val", kept=kept, progress=stop_at(5))
    assert seen == [1, 2, 3, 4, 5]
    seen.clear()
    assert fit_calibration(segmenter, dataset, "shore, val", kept=kept, progress=stop_at(0))[0] == whole
    assert seen == [5, 6, 7] and not kept.exists()  # the fifth was not yet saved
    kept.write_bytes(b"no journal" * 100)
    assert fit_calibration(segmenter, dataset, "shore, val", kept=kept)[0] == whole
    with pytest.raises(KeyboardInterrupt):
        fit_calibration(segmenter, dataset, "shore, val", kept=kept, progress=stop_at(3))
    seen.clear()
    fit_calibration(segmenter, dataset, "shore, val", kept=kept, images=3, progress=stop_at(0))
    assert seen == [1, 2, 3]  # other images


# The figures


def random_maps(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, labels and confidence, some pixels without truth."""
    generator = np.random.default_rng(seed)
    truth, labels = generator.integers(-1, 4, (2, 30, 40))
    confidence = generator.beta(2, 1, (30, 40)).astype(np.float32)
    return truth, np.where(generator.uniform(size=truth.shape) < confidence, truth, labels), confidence


@pytest.mark.parametrize("seed", range(30))
def test_the_calibration_error_is_that_of_torchmetrics(seed):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    found, probabilities, truths = Confidences(4), [], []
    for image in range(3):
        truth, labels, confidence = random_maps(100 * seed + image)
        found.add(count_confidence(truth, labels, confidence, 4))
        counted = (truth >= 0) & (labels >= 0)
        rows = np.zeros((counted.sum(), 4), np.float32)
        rows[np.arange(len(rows)), labels[counted]] = confidence[counted]
        probabilities.append(rows)
        truths.append(truth[counted])
    rows, truth = torch.from_numpy(np.concatenate(probabilities)), torch.from_numpy(np.concatenate(truths))
    expected = functional.multiclass_calibration_error(rows, truth, 4, n_bins=15, norm="l1", validate_args=False)
    metrics = found.metrics(3 * 30 * 40)
    assert abs(metrics.ece - float(expected)) < 1e-5
    assert sum(of_bin.pixels for of_bin in metrics.bins) == len(truth)


def test_what_a_threshold_keeps_is_what_is_counted_after_it():
    found, maps = Confidences(4), [random_maps(seed) for seed in range(4)]
    for truth, labels, confidence in maps:
        found.add(count_confidence(truth, labels, confidence, 4))
    pixels = sum(int((truth >= 0).sum()) for truth, _, _ in maps)
    for point in found.metrics(pixels).curve:
        counts = Counts(4)
        for truth, labels, confidence in maps:
            kept = (confidence >= point.threshold) & (labels >= 0)
            counts.update(np.where(kept, truth, -1), labels)
        metrics = counts.metrics(["a", "b", "c", "d"])
        assert abs(point.accuracy - metrics.pixel_accuracy) < 1e-9 and abs(point.miou - metrics.miou) < 1e-9
        assert abs(point.labelled - counts.confusion.sum() / pixels) < 1e-9
    assert len(found.metrics(pixels).curve) == 20


def alike(one: ConfidenceMetrics, other: ConfidenceMetrics) -> bool:
    """Equal up to rounding: a batch's numbers are not to the last digit those of single images."""
    figures = [[value for point in found.curve for value in astuple(point)] + [found.ece] for found in (one, other)]
    return figures[0] == pytest.approx(figures[1], abs=1e-3, nan_ok=True)


def test_an_evaluation_measures_confidence_and_continues(folder, tmp_path, small_model):  # noqa: F811
    from opensan.segmenters.san import SanSegmenter

    dataset, segmenter = SegmentationFolder(folder, "val"), SanSegmenter(small_model)
    direct = Confidences(len(NAMES))
    for image, truth in (dataset[index] for index in range(len(dataset))):
        answer = segmenter.segment(image, dataset.vocabulary)
        direct.add(count_confidence(truth, answer.labels, answer.confidence, len(NAMES)))
    predictor = ModelPredictor(segmenter, dataset.vocabulary)
    whole = measure(dataset, predictor, tmp_path / "whole", batch=2, confidence=True)
    pixels = sum(int((dataset[index][1] >= 0).sum()) for index in range(len(dataset)))
    assert alike(whole.confidence, direct.metrics(pixels)) and whole.confidence.ece > 0

    stopped, calls = tmp_path / "stopped", []

    class Dying(ModelPredictor):
        def predict_with_confidence(self, prepared):
            calls.append(len(prepared))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return super().predict_with_confidence(prepared)

    with pytest.raises(KeyboardInterrupt):
        measure(dataset, Dying(segmenter, dataset.vocabulary), stopped, workers=1, confidence=True, save_every=0)
    notes: list[str] = []
    found = measure(dataset, predictor, stopped, confidence=True, note=notes.append)
    assert alike(found.confidence, whole.confidence) and same(found.metrics, whole.metrics)
    assert "images are measured already" in notes[0]
    assert measure(dataset, predictor, stopped).confidence is None  # another evaluation, which starts anew


def test_eval_writes_the_figures_the_picture_and_the_curve(folder, tmp_path, model_folder, run):  # noqa: F811
    assert run("calibrate", "--data", folder, "-m", model_folder, "-o", tmp_path / "c.json")[0] == 0
    arguments = ["eval", "--data", folder, "-m", model_folder, "-o", tmp_path / "out", "--confidence"]
    results = {}
    for more in ([], ["--calibration", tmp_path / "c.json"]):
        code, out, err = run(*arguments, *more)
        assert code == 0 and "calibration error (ECE)" in out, err
        results[bool(more)] = json.loads((tmp_path / "out" / "shore" / "metrics.json").read_text())
    assert results[False]["metrics"] == results[True]["metrics"]
    assert results[False]["confidence"]["calibration"] is None
    assert results[True]["confidence"]["calibration"]["data"] == "shore, val"
    assert results[True]["confidence"]["ece"] < results[False]["confidence"]["ece"]
    written = tmp_path / "out" / "shore"
    assert (written / "reliability.png").read_bytes()[:4] == b"\x89PNG"
    assert len((written / "thresholds.csv").read_text().splitlines()) == 21
    assert "calibrated on shore, val (7 images)" in (written / "metrics.md").read_text()
    assert "reliability diagram" in (written / "index.html").read_text()
    assert run("eval", "--data", folder, "-m", model_folder, "-o", tmp_path / "out")[0] == 0
    assert not (written / "reliability.png").exists() and not (written / "thresholds.csv").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--confidence", "--tta"], "--confidence is that of a model's single views"),
        (["--calibration", "c.json"], "--calibration changes no label, so only --confidence measures it"),
        (["--calibration", "c.json", "--confidence"], "c.json: can't be read"),
    ],
)
def test_eval_refuses_in_one_line(folder, tmp_path, run, more, message):  # noqa: F811
    code, _, err = run("eval", "--data", folder, "-m", "tiny", "-o", tmp_path / "out", *more)
    assert code in (1, 2) and message in err and err.count("\n") == 1
