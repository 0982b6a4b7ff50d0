"""`opensan adapt`: what is installed, what is kept apart, and what is refused."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import opensan
from opensan.checkpoints import load_model
from opensan.errors import UserError
from opensan.evaluation.evaluation import Evaluation
from opensan.evaluation.metrics import Counts
from opensan.segmenters.san import SanSegmenter
from opensan.text.encoder import TextEncoder
from opensan.train.checkpoint import CheckpointFolder
from opensan.train.log import NoProgress
from opensan.train.teacher import KeptAnswers, confident_words
from opensan.tune import adapt as module
from opensan.tune.adapt import AdaptSettings, Checked, Score, adapt, checked
from opensan.tune.suggest import see
from opensan.vocabulary import Vocabulary
from opensan.word_lists import TunedWords

WORDS = Vocabulary.parse(["road", "car", "sky"])
QUICK = AdaptSettings(steps=4, batch=1, learning_rate=1e-3, score_every=2, scored=2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four images of coloured blocks."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(4):
        blocks = np.random.default_rng(number).integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(20, 0).repeat(20, 1)).save(folder / f"{number}.png")
    return folder


def scoring(monkeypatch, *agreements: float, lost_at: int | None = None) -> list[int]:
    """Have the measurements, before the training and in it, give these figures; returns the list of their calls."""
    calls: list[int] = []

    def score(*_) -> Score:
        calls.append(len(calls))
        areas = np.array([50, 50, 0]) if lost_at != len(calls) - 1 else np.array([100, 0, 0])
        return Score(agreements[len(calls) - 1], areas)

    monkeypatch.setattr(module, "score", score)
    return calls


def quick(photos, model, out, **settings):
    how = settings.pop("settings", QUICK)
    return adapt(photos, WORDS, model, out=out, settings=how, progress=NoProgress(), **settings)


def test_the_teacher_with_the_best_agreement_is_installed_and_loads_everywhere(
    tmp_path, photos, model_folder, monkeypatch
):
    scoring(monkeypatch, 0.5, 0.7, 0.6)
    found = quick(photos, model_folder, tmp_path)
    assert (found.finished, found.steps, found.step, found.before, found.after) == (True, 4, 2, 0.5, 0.7)
    assert found.folder == tmp_path / "model" and not found.rejected
    before, after = opensan.load(model_folder), opensan.load(tmp_path / "model")
    assert after.identity.name == "small-adapted" and after.identity.text == before.identity.text
    assert after.identity.image != before.identity.image
    best = CheckpointFolder(tmp_path / "run" / "checkpoints", 1).load_best()
    start = load_model(model_folder)
    for name, value in load_model(tmp_path / "model").named_parameters():
        assert torch.equal(value, best["follower"].get(name, start.get_parameter(name))), name
    record = json.loads((tmp_path / "model" / "adaptation.json").read_text())
    assert (record["from"], record["model"]) == (str(before.identity), str(after.identity))
    assert record["words"] == WORDS.names and str(photos.parent) not in json.dumps(record)
    after.segment(photos / "0.png", WORDS)
    # The same call again: the training is done, and stays so; with other settings it is refused.
    scoring(monkeypatch, 0.5)
    assert quick(photos, model_folder, tmp_path) == found
    scoring(monkeypatch, 0.5)
    with pytest.raises(UserError, match=r"holds a run with loop\.learning_rate = 0\.001, not 0\.01"):
        quick(photos, model_folder, tmp_path, settings=replace(QUICK, learning_rate=0.01))


def test_an_interrupted_adaptation_goes_on_to_the_same_model(tmp_path, photos, model_folder, monkeypatch):
    scoring(monkeypatch, 0.5, 0.6, 0.7)
    quick(photos, model_folder, tmp_path / "whole")
    scoring(monkeypatch, 0.5, 0.6)  # and then an error, as there are no more figures
    with pytest.raises(IndexError):
        quick(photos, model_folder, tmp_path / "killed")
    assert not (tmp_path / "killed" / "model").exists()
    scoring(monkeypatch, 0.5, 0.7)
    again = quick(photos, model_folder, tmp_path / "killed")
    assert again.step == 4 and again.before == 0.5
    identities = [opensan.load(tmp_path / name / "model").identity for name in ("whole", "killed")]
    assert identities[0] == identities[1]


def test_without_better_agreement_nothing_is_installed(tmp_path, photos, model_folder, monkeypatch, run):
    scoring(monkeypatch, 0.8, 0.7, 0.8)
    command = ["adapt", photos, "--words", "road, car, sky", "--model", model_folder, "--out", tmp_path]
    code, _, error = run(*command, "--steps", 40, "--batch", 1)
    assert code == 1 and error.splitlines()[-1].startswith("error: no model written: the answers got no steadier")
    assert not (tmp_path / "model").exists() and not (tmp_path / "rejected").exists()


def test_agreement_that_rises_because_a_word_loses_its_pixels_does_not_count(
    tmp_path, photos, model_folder, monkeypatch
):
    scoring(monkeypatch, 0.5, 0.99, 0.6, lost_at=1)
    found = quick(photos, model_folder, tmp_path)
    assert (found.step, found.after) == (4, 0.6)
    before = Score(0.5, np.array([900, 90, 4, 6, 0]))
    assert Score(0.5, np.array([990, 44, 0, 3, 0])).losers(before) == [1]  # the third had hardly any before
    assert Score(0.5, np.array([500, 45, 0, 2, 491])).losers(before) == [3]


def test_a_model_with_which_the_check_set_gets_worse_is_kept_apart(tmp_path, photos, model_folder, monkeypatch, run):
    figures = {"before": Checked(0.5, 0.6, 0.4), "after": Checked(0.49, 0.62, 0.3)}
    monkeypatch.setattr(module, "open_set", lambda path: path)
    monkeypatch.setattr(module, "_measure", lambda *given: figures[given[3].name])
    scoring(monkeypatch, 0.5, 0.7, 0.6)
    assert quick(photos, model_folder, tmp_path).folder == tmp_path / "model"  # without a check set
    identity = opensan.load(tmp_path / "model").identity
    scoring(monkeypatch, 0.5)
    found = quick(photos, model_folder, tmp_path, check=photos)
    assert found.rejected and found.folder == tmp_path / "rejected" and not (tmp_path / "model").exists()
    assert opensan.load(tmp_path / "rejected").identity == identity
    figures["after"] = Checked(0.51, 0.62, 0.3)
    scoring(monkeypatch, 0.5)
    found = quick(photos, model_folder, tmp_path, check=photos)
    assert not found.rejected and (tmp_path / "model").exists() and not (tmp_path / "rejected").exists()
    assert (found.check_before.miou, found.check_after.miou) == (0.5, 0.51)


def test_what_is_printed(tmp_path, photos, model_folder, monkeypatch, run):
    monkeypatch.setattr(module, "open_set", lambda path: path)
    monkeypatch.setattr(
        module, "_measure", lambda *given: Checked(0.5 - 0.1 * (given[3].name == "after"), 0.6, float("nan"))
    )
    scoring(monkeypatch, 0.5, 0.7)
    command = ["adapt", photos, "--words", "road, car, sky", "--model", model_folder, "--out", tmp_path]
    code, out, error = run(*command, "--steps", 2, "--batch", 1, "--check", photos)
    assert code == 1 and "the check set got worse: the adapted model is kept apart" in error
    assert "50.0 % kept their word" in out and "70.0 % do after step 2" in out
    assert out.splitlines()[2].split() == ["all", "words", "50.0", "%", "40.0", "%"]
    assert out.splitlines()[4].split() == ["other", "words", "-", "-"]
    scoring(monkeypatch, 0.5)
    code, out, _ = run(*command, "--steps", 2, "--batch", 1, "--json")
    assert code == 0 and json.loads(out)["folder"] == str(tmp_path / "model")


def test_what_is_missing_is_told_in_one_line_before_the_work(tmp_path, photos, model_folder, run):
    def refused(*arguments, folder=photos, words="road, car, sky") -> str:
        code, _, error = run("adapt", folder, "--words", words, "--model", model_folder, "-o", tmp_path, *arguments)
        assert code in (1, 2) and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    (tmp_path / "empty").mkdir()
    assert "no images in this folder" in refused(folder=tmp_path / "empty")
    assert "does not exist" in refused(folder=tmp_path / "nowhere")
    assert "one word gets every pixel" in refused(words="road")
    assert "no such folder" in refused("--check", tmp_path / "nowhere")
    assert "classes.txt: does not exist" in refused("--replay", tmp_path / "nowhere")
    assert "no list" in refused("--check", photos) or "not a data set" in refused("--check", photos)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    assert "can be read" in refused(folder=tmp_path / "broken")
    code, _, error = run("adapt", photos, "--model", model_folder)
    assert code == 2 and "give the words by exactly one of" in error
    tuned = replace(WORDS, tuned=TunedWords("", "a" * 64, "b" * 64, (("car", b"\0\1" * 24),)))
    with pytest.raises(UserError, match="tuned words are those of the model as it is"):
        adapt(photos, tuned, model_folder, out=tmp_path)
    assert not (tmp_path / "run").exists()


def test_without_a_calibration_the_surer_half_of_each_word_counts(photos, small_model, monkeypatch):
    segmenter = SanSegmenter(small_model)
    certain = (5 * torch.randn(10, 6, generator=torch.Generator().manual_seed(0))).softmax(1)
    monkeypatch.setattr(segmenter, "class_probabilities", lambda *_: certain)  # its own answers are all one word
    images = [np.asarray(Image.open(photos / f"{number}.png")) for number in range(4)]
    words = Vocabulary.parse(["road", "car", "sky", "tree", "lamp", "wall"])
    config, thresholds = module._self_training(segmenter, images, words, QUICK)
    assert len(thresholds) == 6 and config.confidence == pytest.approx(np.mean(thresholds), abs=0.05)
    found = []
    for image in images:
        encoding, masks = see(segmenter, image).views[0]
        scores = torch.from_numpy(masks) @ segmenter.class_probabilities(encoding, words)
        found.append(confident_words(scores.T, config))
    shares, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert len(labels.unique()) > 1
    for word in labels.unique():
        sure = (shares[labels == word] >= thresholds[word]).float().mean()
        assert 0.3 < sure < 0.7 or (labels == word).sum() < 10
    assert module._self_training(segmenter, images, words, replace(QUICK, confidence=0.9))[1] == []


def test_kept_answers_cost_nothing_until_they_change(small_model):
    model = copy.deepcopy(small_model).train()
    kept = KeptAnswers(model, TextEncoder(model).classifier(WORDS), weight=2.0)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = kept.answers(pixels)
    unchanged = kept.loss(model.classify(model.propose(pixels), kept.text), expected)
    assert unchanged.item() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        model.trained()[-1].parameter.add_(0.5)
    answers = model.classify(model.propose(pixels), kept.text)
    loss = kept.loss(answers, expected)
    wanted, given = (logits.softmax(-1).flatten(0, 1).double() for logits in (expected, answers))
    assert loss.item() == pytest.approx(2 * float((wanted * (wanted / given).log()).sum(1).mean()), rel=1e-3)
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_other_words_are_known_ones_that_nobody_asked_for(small_model, monkeypatch):
    segmenter = SanSegmenter(small_model)
    monkeypatch.setattr(segmenter.text, "unseen_texts", lambda vocabulary: ["fog"])
    names = set(module._other_words(segmenter, Vocabulary.parse(["Sky|heaven", "road", "lamp post"])).names)
    assert not names & {"sky", "road", "fog"} and {"clouds", "car"} < names and len(names) > 150


def test_words_of_the_check_set_are_told_apart():
    counts = Counts(3)
    counts.update(np.array([[0, 0, 1, 1, 2, 2]]), np.array([[0, 0, 1, 0, 0, 0]]))
    names = ["road", "car", "sky"]
    found = checked(Evaluation(counts.metrics(names), 1, ()), [True, False, True])
    ious = [one.iou for one in counts.metrics(names).classes]
    assert found.asked == pytest.approx((ious[0] + ious[2]) / 2) and found.others == pytest.approx(ious[1])
