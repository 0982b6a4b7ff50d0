"""Evaluation at full scale: the same figures whatever the batches, threads, processes and interruptions."""

import base64
import copy
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sqlite3
from contextlib import closing
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as coco_mask
from PIL import Image

from opensan.assemble.scores import score_maps
from opensan.data.canonical import DatasetManifest, Request, write_manifest
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.distributed import process_group
from opensan.evaluation import measure as measure_module
from opensan.evaluation import predictions
from opensan.evaluation.evaluation import Evaluation, ImageMetrics, evaluate, segmenter_predictor
from opensan.evaluation.measure import measure
from opensan.evaluation.page import best_and_worst, write_page
from opensan.evaluation.predictions import SavedPredictions
from opensan.evaluation.predictors import AugmentedPredictor, ModelPredictor, SavedPredictor
from opensan.evaluation.report import write_report
from opensan.evaluation.table import Measured, as_markdown, missing, table
from opensan.files import hold
from opensan.images import prepare
from opensan.journal import Journal
from opensan.outputs import palette, save_label_map
from opensan.segmenters.results import InputImage
from opensan.segmenters.san import SanSegmenter
from opensan.vocabulary import Vocabulary

from .ranks import run_ranks

NAMES = ["sea", "sand", "sky", "<b>tree</b>"]
SIZES = [(60, 80), (80, 60), (60, 80), (64, 64), (60, 81), (80, 60), (60, 80)]


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "shore")


def make_folder(root: Path) -> Path:
    """A prepared folder of noisy photographs with blocky labels, some of them unlabelled; one name is not ASCII."""
    generator = np.random.default_rng(3)
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    names = [f"a{number}" if number != 2 else "küste" for number in range(len(SIZES))]
    for name, (height, width) in zip(names, SIZES, strict=True):
        cells = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((width, height)).save(root / "images" / f"{name}.png")
        labels = np.kron(generator.integers(-1, 3, (9, 9)), np.ones((10, 10), int))[:height, :width]
        Image.fromarray(labels.astype(np.uint8)).save(root / "labels" / f"{name}.png")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    (root / "val.txt").write_text("\n".join(names) + "\n")
    return root


def same(one: object, other: object) -> bool:
    """Equal to the last digit; unlike ==, what does not exist (nan) equals itself."""
    return repr(one) == repr(other)


class ByColour:
    """Labels by brightness: a predictor without a model."""

    def __init__(self, kind: str = "brightness") -> None:
        self.key = {"kind": kind}
        self.batches: list[set[tuple[int, int]]] = []

    def shape(self, size):
        return size

    def prepare(self, name, image):
        return image

    def predict(self, prepared):
        self.batches.append({image.shape for image in prepared})
        return [(image.mean(axis=2) / 64).astype(np.int32) for image in prepared]


def test_batches_and_threads_change_nothing(folder, tmp_path):
    dataset = SegmentationFolder(folder, "val")
    plain = evaluate(lambda image: ByColour().predict([image])[0], dataset, progress=False)
    for batch, workers in ((1, 1), (3, 4), (100, 2)):
        predictor = ByColour()
        found = measure(dataset, predictor, tmp_path / f"{batch}", batch=batch, workers=workers)
        assert same(found.metrics, plain.metrics)
        assert (found.images, found.confusions) == (plain.images, plain.confusions)
        assert [one.name for one in found.of_images] == [dataset.name(index) for index in range(len(dataset))]
        assert all(len(shapes) == 1 for shapes in predictor.batches)
    assert len(predictor.batches) == len(set(SIZES))


def test_a_model_answers_as_its_segmenter_does(folder, tmp_path, small_model):
    dataset = SegmentationFolder(folder, "val")
    segmenter = SanSegmenter(copy.deepcopy(small_model))
    plain = evaluate(segmenter_predictor(segmenter, dataset.vocabulary), dataset, progress=False)
    for batch in (1, 4):
        found = measure(dataset, ModelPredictor(segmenter, dataset.vocabulary), tmp_path / f"{batch}", batch=batch)
        assert same(found.metrics, plain.metrics)


def test_broken_photographs_are_named_and_tried_again(folder, tmp_path):
    dataset = SegmentationFolder(folder, "val")
    (folder / "images" / "a1.png").write_bytes(b"no image")
    (folder / "labels" / "a4.png").unlink()
    found = measure(dataset, ByColour(), tmp_path / "out", batch=2)
    assert found.images == 5
    assert [reason.split(":")[0] for reason in found.broken] == ["a1", "a4"]


def run_and_kill(folder: Path, out: Path, moment: int) -> bool:
    """Evaluate in a process of its own, with a save after every photograph, that dies around its n-th change on disk
    (of a journal, or a renaming): before it if `moment` = 2 n is even, after it if 2 n + 1.
    Returns whether it lived that long."""

    def work() -> None:
        done = []

        def dying(original):
            def change(self, *arguments):
                done.append(self)
                if moment == 2 * len(done):
                    os.kill(os.getpid(), signal.SIGKILL)
                result = original(self, *arguments)
                if moment == 2 * len(done) + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return change

        Path.replace, Journal._change = dying(Path.replace), dying(Journal._change)
        measure(SegmentationFolder(folder, "val"), ByColour(), out, workers=2, save_predictions=True, save_every=0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def finishes_like(whole: Evaluation, expected: Path, folder: Path, out: Path) -> int:
    """Go on to the end, compare with an uninterrupted run, and return how many photographs were left."""
    predictor = ByColour()
    assert same(measure(SegmentationFolder(folder, "val"), predictor, out, save_predictions=True), whole)
    assert (out / predictions.FILE_NAME).read_bytes() == expected.read_bytes()
    return len(predictor.batches)


def test_killed_at_any_moment_it_goes_on_to_the_same_result(folder, tmp_path):
    whole = measure(SegmentationFolder(folder, "val"), ByColour(), tmp_path / "whole", save_predictions=True)
    expected = tmp_path / "whole" / predictions.FILE_NAME
    left, moment = [], 2
    while not run_and_kill(folder, tmp_path / f"killed-{moment}", moment):
        left.append(finishes_like(whole, expected, folder, tmp_path / f"killed-{moment}"))
        moment += 1
    # Changed are the journal's work, then the journal for each photograph, at last the joined predictions.
    assert len(left) >= 12 and left[0] == 7 and left[-1] == 0 and left == sorted(left, reverse=True)


def test_killed_again_and_again_it_gets_there(folder, tmp_path):
    whole = measure(SegmentationFolder(folder, "val"), ByColour(), tmp_path / "whole", save_predictions=True)
    deaths, moments = 0, itertools.cycle([3, 4, 7, 5])
    while not run_and_kill(folder, tmp_path / "killed", next(moments)):
        deaths += 1
    assert deaths >= 3
    assert finishes_like(whole, tmp_path / "whole" / predictions.FILE_NAME, folder, tmp_path / "killed") == 0


def test_another_model_or_changed_data_starts_anew_and_says_so(folder, tmp_path):
    dataset = SegmentationFolder(folder, "val")
    measure(dataset, ByColour(), tmp_path / "out")
    again, notes = ByColour(), []
    measure(dataset, again, tmp_path / "out", note=notes.append)
    assert again.batches == [] and "7 of 7 images are measured already" in notes[0]

    other, notes = ByColour(kind="other"), []
    measure(dataset, other, tmp_path / "out", note=notes.append)
    assert len(other.batches) == 7 and notes == [
        f"{tmp_path / 'out'}: holds an evaluation with other kind: starting anew"
    ]
    os.utime(folder / "labels" / "a0.png", ns=(1, 1))
    changed = ByColour(kind="other")
    measure(SegmentationFolder(folder, "val"), changed, tmp_path / "out")
    assert len(changed.batches) == 7


def test_progress_of_the_version_before_is_told(folder, tmp_path):
    (tmp_path / "out" / "progress").mkdir(parents=True)
    (tmp_path / "out" / "progress" / "key.json").write_text("{}")
    (tmp_path / "out" / "progress" / "rank-0000.npz").write_text("")
    notes = []
    measure(SegmentationFolder(folder, "val"), ByColour(), tmp_path / "out", note=notes.append)
    assert notes == [f"{tmp_path / 'out'}: holds an evaluation with another version: starting anew"]
    assert [path.name for path in (tmp_path / "out" / "progress").iterdir()] == ["rank-0000.sqlite"]


@pytest.mark.parametrize("column", ["value = '[-1, 2]'", "value = '{}'", "data = x'00'"])
def test_what_is_no_count_is_measured_again(folder, tmp_path, column):
    dataset = SegmentationFolder(folder, "val")
    whole = measure(dataset, ByColour(), tmp_path / "out")
    path = tmp_path / "out" / "progress" / "rank-0000.sqlite"
    with closing(sqlite3.connect(path)) as rows, rows:
        rows.execute(f"UPDATE done SET {column} WHERE key = '00000003'")
    again = ByColour()
    found = measure(dataset, again, tmp_path / "out")
    assert same(found, whole) and len(again.batches) == 1


def test_what_a_killed_evaluation_left_half_written_is_removed(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".metrics.abcd0123.part.json").write_text("half")
    measure(SegmentationFolder(folder, "val"), ByColour(), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.part*"))


def test_two_evaluations_do_not_write_to_one_folder(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        hold(tmp_path / "out" / ".lock", "busy"),
        pytest.raises(ValueError, match="another evaluation is writing there"),
    ):
        measure(SegmentationFolder(folder, "val"), ByColour(), tmp_path / "out")


def test_two_processes_answer_as_one_and_one_goes_on_from_two(folder, tmp_path):
    dataset = SegmentationFolder(folder, "val")
    whole = measure(dataset, ByColour(), tmp_path / "one", batch=2, save_predictions=True)

    def work() -> None:
        with process_group("cpu"):
            found = measure(SegmentationFolder(folder, "val"), ByColour(), tmp_path / "two", batch=2)
        assert same(found, whole)

    run_ranks(work)
    progress = tmp_path / "two" / "progress"
    assert {path.name for path in progress.iterdir()} == {"rank-0000.sqlite", "rank-0001.sqlite"}
    (progress / "rank-0001.sqlite").unlink()
    left = ByColour()
    assert same(measure(dataset, left, tmp_path / "two", batch=2), whole)
    assert 0 < sum(map(len, left.batches)) < 7


def test_saved_predictions_are_usual_ones_and_give_the_same_figures(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measure_module, "_MOST_UNSAVED", 500)  # several saves
    monkeypatch.setattr(predictions, "_READ", 64)  # entries longer than what is read at once
    dataset = SegmentationFolder(folder, "val")
    whole = measure(dataset, ByColour(), tmp_path / "out", save_predictions=True)
    path = tmp_path / "out" / predictions.FILE_NAME
    entries = json.loads(path.read_text())
    expected = ByColour().predict([dataset[2][0]])[0]
    found = np.full(expected.shape, -1)
    for entry in entries:
        assert entry.keys() == {"file_name", "category_id", "segmentation"}
        if entry["file_name"] == str(folder / "images" / "küste.png"):
            found[coco_mask.decode(entry["segmentation"]).astype(bool)] = entry["category_id"]
    assert (found == expected).all()
    assert {file.name for file in (tmp_path / "out" / "progress").iterdir()} == {"rank-0000.sqlite"}

    again = SavedPredictor(SavedPredictions(path, len(NAMES)))
    assert same(measure(dataset, again, tmp_path / "again"), whole)
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")  # UTF-8 instead of escapes
    assert same(measure(dataset, SavedPredictor(SavedPredictions(path, len(NAMES))), tmp_path / "utf8"), whole)


def test_predictions_as_pictures(folder, tmp_path):
    dataset = SegmentationFolder(folder, "val")
    whole = measure(dataset, ByColour(), tmp_path / "out")
    (tmp_path / "pictures").mkdir()
    for index in range(len(dataset)):
        labels = ByColour().predict([dataset[index][0]])[0]
        suffix = ".labels.png" if index % 2 else ".png"
        save_label_map(tmp_path / "pictures" / f"{dataset.name(index)}{suffix}", labels, len(NAMES))
    saved = SavedPredictor(SavedPredictions(tmp_path / "pictures", len(NAMES)))
    assert same(measure(dataset, saved, tmp_path / "again"), whole)


def test_dataset_numbers_are_translated(tmp_path):
    entry = {"file_name": "x/a.jpg", "category_id": 9, "segmentation": {"size": [2, 2], "counts": [0, 4]}}
    path = tmp_path / "p.json"
    path.write_text(json.dumps([entry]))
    saved = SavedPredictions(path, 3, class_of_id={4: 0, 9: 1, 12: 2})
    assert saved.labels("a", (2, 2)).tolist() == [[1, 1], [1, 1]]
    with pytest.raises(ValueError, match="category_id 9 is none of the 3 classes'"):
        SavedPredictions(path, 3).labels("a", (2, 2))


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"size": [1_000_000, 1_000_000], "counts": [0, 10**12]}, "size is"),
        ({"size": [2, 2], "counts": [0, 10**12]}, "counts"),
        ({"size": [2, 2], "counts": "oooooooooooooooooooooo"}, "counts"),
        ({"size": [2, 2], "counts": {"x": 1}}, "counts"),
        ({"size": "2x2"}, "size is"),
        (None, "segmentation"),
    ],
)
def test_hostile_masks_are_refused(tmp_path, segmentation, reason):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"file_name": "a.jpg", "category_id": 0, "segmentation": segmentation}]))
    with pytest.raises(ValueError, match=rf"p\.json: prediction for a: .*{reason}"):
        SavedPredictions(path, 3).labels("a", (2, 2))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a JSON list"),
        ('{"a": 1}', "not a JSON list"),
        ("[", "not valid JSON after byte 1"),
        ('[{"file_name": "a", "category_id"', "not valid JSON after byte 1"),
        ("[3]", 'no "file_name"'),
        ('[{"category_id": 3}]', 'no "file_name"'),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_no_list_of_predictions_is_refused(tmp_path, text, reason):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        SavedPredictions(path, 3)
    assert "\n" not in str(caught.value)


def test_predictions_that_are_missing_or_do_not_fit(tmp_path):
    (tmp_path / "p.json").write_text("[]")
    with pytest.raises(ValueError, match="no prediction for a"):
        SavedPredictions(tmp_path / "p.json", 3).labels("a", (2, 2))
    save_label_map(tmp_path / "a.png", np.array([[0, 7]]), 8)
    with pytest.raises(ValueError, match=r"a\.png: is 2x1, the image 3x3"):
        SavedPredictions(tmp_path, 8).labels("a", (3, 3))
    with pytest.raises(ValueError, match="holds 7, there are 3 classes"):
        SavedPredictions(tmp_path, 3).labels("a", (1, 2))
    with pytest.raises(ValueError, match="no such file or folder"):
        SavedPredictions(tmp_path / "none.json", 3)


@torch.inference_mode()
def test_augmentation_is_the_mean_of_the_views_scores(folder, small_model):
    segmenter = SanSegmenter(copy.deepcopy(small_model))
    vocabulary = Vocabulary.parse(["sea", "sand", "sky"], background="rock")
    predictor = AugmentedPredictor(segmenter, vocabulary, scales=(0.75, 1.5))
    images = [SegmentationFolder(folder, "val")[index][0] for index in (0, 4)]
    answers = predictor.predict([predictor.prepare("a", image) for image in images])
    for image, answer in zip(images, answers, strict=True):
        scores = []
        for scale in (0.75, 1.5):
            sides = {"short_side": int(96 * scale), "long_side": int(384 * scale)}
            config = small_model.config.image.model_copy(update=sides)
            for flip in (False, True):
                seen = np.ascontiguousarray(image[:, ::-1]) if flip else image
                (encoding,) = segmenter.encode_prepared([InputImage(None, prepare(seen, config))])
                assert encoding.sizes.network[0] == int(96 * scale)
                found = score_maps(
                    encoding.mask_logits, segmenter.class_probabilities(encoding, vocabulary), encoding.sizes
                )
                scores.append(found.flip(2) if flip else found)
        mean = torch.stack(scores).mean(dim=0)
        best = mean.topk(2, dim=0).values
        clear = (best[0] - best[1] > 1e-4).numpy()
        expected = mean.argmax(dim=0).numpy()
        expected[expected == 3] = -1
        assert clear.mean() > 0.9 and (answer == expected)[clear].all()
    assert predictor.key != ModelPredictor(segmenter, vocabulary).key


def test_the_page_stands_alone(folder, tmp_path):
    dataset, predictor = SegmentationFolder(folder, "val"), ByColour()
    evaluation = measure(dataset, predictor, tmp_path / "out")
    page = write_page(tmp_path / "out", dataset, predictor, evaluation, title="Shore & sea", about={"model": "<none>"})
    write_report(evaluation, tmp_path / "out", title="Shore & sea", about={})
    text = page.read_text()
    assert "<script" not in text and "http" not in text
    assert "Shore &amp; sea" in text and "&lt;none&gt;" in text and "<b>tree" not in text
    assert "<link" not in text and "url(" not in text
    sources = re.findall(r"(?:src|href)=[\"']([^\"'#]+)", text)
    assert len(sources) == 4 * 7 and {source.partition(",")[0] for source in sources} == {"data:image/jpeg;base64"}
    with Image.open(io.BytesIO(base64.b64decode(sources[2].partition(",")[2]))) as picture:
        assert picture.size == (80, 60)
    order = [text.index(f"<h2>{heading}") for heading in ("Classes by IoU", "Confusions", "Worst", "Best")]
    assert order == sorted(order)


def test_the_images_behind_the_worst_confusions_are_named_and_linked(folder, tmp_path):
    dataset, predictor = SegmentationFolder(folder, "val"), ByColour()
    evaluation = measure(dataset, predictor, tmp_path / "out")
    names = [*dataset.vocabulary.names, "unlabelled"]
    assert len(evaluation.behind) == len(evaluation.confusions) > 5
    for pair, images in zip(evaluation.confusions, evaluation.behind, strict=True):
        counts = []
        for index in range(len(dataset)):
            image, truth = dataset[index]
            (labels,) = predictor.predict([image])
            wrong = (truth == names.index(pair.truth)) & (labels == names.index(pair.predicted))
            counts.append((int(wrong.sum()), index))
        expected = sorted(((count, index) for count, index in counts if count), key=lambda one: (-one[0], one[1]))[:5]
        assert [(image.pixels, image.index) for image in images] == expected
        assert [image.name for image in images] == [dataset.name(index) for _, index in expected]
    page = write_page(tmp_path / "out", dataset, predictor, evaluation, title="Shore", about={}).read_text()
    write_report(evaluation, tmp_path / "out", title="Shore", about={})
    linked = re.findall(r'href="#(image-\d+)"', page)
    assert len(linked) >= 10 and all(page.count(f'id="{target}"') == 1 for target in linked)
    rows = (tmp_path / "out" / "confusions.csv").read_text().splitlines()
    assert rows[0].endswith(",images") and rows[1].endswith("; ".join(one.name for one in evaluation.behind[0]))


def test_the_page_has_a_bar_of_each_class_and_confusion(folder, tmp_path):
    dataset, predictor = SegmentationFolder(folder, "val"), ByColour()
    evaluation = measure(dataset, predictor, tmp_path / "out")
    page = write_page(tmp_path / "out", dataset, predictor, evaluation, title="Shore", about={})
    text = page.read_text()
    classes = [figures for figures in evaluation.metrics.classes if not math.isnan(figures.iou)]
    classes.sort(key=lambda figures: -figures.iou)
    bars = re.findall(r'class="bar"><div><i style="width:([\d.]+)%', text)
    expected = [figures.iou for figures in classes] + [pair.share for pair in evaluation.confusions]
    assert bars == [f"{100 * share:.2f}" for share in expected] and len(classes) > 1 and evaluation.confusions
    # One colour for a class everywhere: in its row, in confusions and in legends.
    for index, name in enumerate(dataset.vocabulary.names):
        colours = set(re.findall(rf'background:(#\w+)"></i>{re.escape(escape(name))}[ <]', text))
        assert colours == {f"#{bytes(palette(index + 1)[index]).hex()}"}, name


def test_best_and_worst_share_no_image():
    images = [ImageMetrics(index, str(index), miou, 0.5) for index, miou in enumerate([0.5, 0.1, np.nan, 0.9])]
    best, worst = best_and_worst(images)
    assert ([one.index for one in best], [one.index for one in worst]) == ([3, 0], [1])
    best, worst = best_and_worst([ImageMetrics(index, "", index / 100, 0.5) for index in range(40)])
    assert [one.index for one in best] == list(range(39, 31, -1)) and [one.index for one in worst] == list(range(8))


def an_evaluation(folder: Path, out: Path) -> Evaluation:
    return measure(SegmentationFolder(folder, "val"), ByColour(), out)


def test_the_table_has_measured_and_official_figures(folder, tmp_path):
    evaluation = an_evaluation(folder, tmp_path / "out")
    measured = [Measured("ade", "ade20k_150", evaluation), Measured("camvid", None, evaluation)]
    rows = table(measured, "san-vit-b16")
    assert list(rows["images"]) == ["COCO-Stuff", "VOC-20", "PC-59", "ADE-150", "PC-459", "ADE-847", "camvid"]
    miou = 100 * evaluation.metrics.miou
    assert list(rows["mIoU (ground truth)"].values()) == [None, None, None, miou, None, None, miou]
    assert list(rows["official SAN B/16"].values()) == [41.93, 93.95, 54.07, 27.56, 16.71, 10.21, None]
    assert rows["official SAN B/16, this rule"]["PC-459"] == 12.6
    assert not any("L/14" in row for row in rows)
    assert sum("official" in row for row in table(measured, "tiny")) == 4
    assert missing(measured) == ["COCO-Stuff", "VOC-20", "PC-59", "PC-459", "ADE-847"]
    assert f"| mIoU (ground truth) | – | – | – | {miou:.2f} | – | – | {miou:.2f} |" in as_markdown(rows)


def test_every_measured_set_has_a_column_of_its_own(folder, tmp_path):
    """Also a second one of a benchmark's classes, and one whose folder is called as a benchmark is."""
    whole, half = an_evaluation(folder, tmp_path / "out"), replace(an_evaluation(folder, tmp_path / "out"), images=2)
    measured = [Measured("ade", "ade20k_150", whole), Measured("part", "ade20k_150", half)]
    measured += [Measured("pascal_voc_20", None, half), Measured("PC-59", None, half)]
    rows = table(measured, "san-vit-b16")
    found = {title: count for title, count in rows["images"].items() if count is not None}
    assert found == {"ADE-150": whole.images, "part": 2, "pascal_voc_20": 2, "PC-59 (own)": 2}
    assert rows["official SAN B/16"]["pascal_voc_20"] is rows["official SAN B/16"]["part"] is None


# The command


@pytest.fixture
def command(run, monkeypatch, tmp_path):
    """Run `opensan eval` in this process, in `tmp_path`: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    return lambda *arguments: run("eval", *arguments)


def test_eval_writes_everything_and_resumes(command, folder, model_folder):
    code, out, err = command("--data", folder, "--model", model_folder, "--save-predictions", "--batch", 3)
    assert (code, err) == (0, "")
    assert "shore, val: 7 images" in out and "boundary IoU" in out
    results = Path("evaluation/shore")
    written = {path.name for path in results.iterdir()}
    assert written == {
        *("metrics.json", "metrics.md", "classes.csv", "confusions.csv", "images.csv", "index.html"),
        *("progress", "sem_seg_predictions.json"),
    }
    metrics = json.loads((results / "metrics.json").read_text())
    code, again, err = command("--data", folder, "--model", model_folder, "--save-predictions")
    assert (code, again) == (0, out) and "7 of 7 images are measured already" in err

    saved = results / "sem_seg_predictions.json"
    code, _, err = command("--data", folder, "--from-predictions", saved, "--out", "recomputed")
    recomputed = json.loads(Path("recomputed/shore/metrics.json").read_text())
    assert (code, recomputed["metrics"]) == (0, metrics["metrics"])
    code, _, err = command("--data", folder, "--from-predictions", saved, "--category-ids", "dataset", "--out", "x")
    assert code == 1 and "has no category ids of its own" in err


def put_manifest(folder: Path, evaluation_split: str, label_set: str | None) -> None:
    manifest = DatasetManifest(
        request=Request(source="folder", options={}, splits=None, classes=tuple(NAMES)),
        label_set=label_set,
        evaluation_split=evaluation_split,
        splits={evaluation_split: len(SIZES)},
        photographs=len(SIZES),
        files_sha256="0" * 64,
        left_out={},
    )
    write_manifest(folder, manifest)


def test_eval_table_of_a_root(command, folder, model_folder, tmp_path):
    put_manifest(folder, "test", "pascal_voc_20")
    (folder / "val.txt").rename(folder / "test.txt")
    (folder / "images" / "a3.png").write_bytes(b"")
    code, out, err = command("--table", "--root", tmp_path, "--model", model_folder, "--out", "results", "--tta")
    rows = json.loads(Path("results/table.json").read_text())["rows"]
    assert rows["images"]["VOC-20"] == 6 and rows["official SAN L/14-336"]["VOC-20"] == 95.18
    assert out.endswith(as_markdown(rows))
    assert "not found, so not measured: COCO-Stuff, PC-59, ADE-150, PC-459, ADE-847" in err
    assert code == 1 and "error: shore: a3:" in err


def test_eval_errors_are_one_line(command, folder, tmp_path):
    (folder / "val.txt").rename(folder / "test.txt")
    cases = {
        (): (2, "name the data sets: --data DIR..."),
        ("--root", tmp_path): (2, "--root belongs to --table"),
        ("--data", folder, "--model", "tiny"): (1, f"{folder}: has no list val.txt; there are test: choose one with"),
        ("--data", folder, folder, "--split", "test", "--model", "tiny"): (2, "two data sets are called 'shore'"),
        ("--data", tmp_path / "none"): (1, "no such folder"),
        ("--data", tmp_path): (1, f"{tmp_path}: not a data set, it has no lists"),
        ("--data", folder, "--from-predictions", "x.json", "--tta"): (2, "--from-predictions has no model"),
        ("--table", "--root", tmp_path / "none"): (1, "holds no prepared data sets"),
        ("--data", folder, folder, "--from-predictions", "x.json"): (2, "--from-predictions is about one data set"),
        ("--data", folder, "--split", "test", "--from-predictions", "x.json"): (1, "x.json: no such file or folder"),
    }
    for arguments, (code, message) in cases.items():
        found, out, err = command(*arguments)
        assert (found, out) == (code, "") and message in err and err.count("\n") == 1, err
