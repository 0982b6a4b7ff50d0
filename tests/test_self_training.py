"""Training on images without labels: the teacher, its labels, and what counts in the losses."""

import copy
import csv

import numpy as np
import pytest
import torch
from PIL import Image

from opensan.assemble.calibration import Calibration, calibrated_confidence
from opensan.data.augment import AugmentConfig, augment, two_views
from opensan.data.unlabelled import UnlabelledFolder
from opensan.text.encoder import TextEncoder
from opensan.train.checkpoint import CheckpointFolder
from opensan.train.config import LoopConfig, PointsConfig, SanTrainingConfig, SelfTrainingConfig
from opensan.train.criterion import SetCriterion
from opensan.train.log import NoProgress
from opensan.train.matcher import LayerOutput
from opensan.train.points import FixedPoints
from opensan.train.san import SanTask, SegmentationBatch, UnlabelledBatch, normalise, train_san
from opensan.train.targets import LabelMapTargets
from opensan.train.teacher import LEAST_PIXELS, STRIDE, MeanTeacher, confident_words
from opensan.vocabulary import UNLABELLED, Vocabulary

WORDS = Vocabulary.parse(["road", "car", "sky"])


@pytest.fixture
def photos(tmp_path):
    """Five images of coloured blocks."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        blocks = np.random.default_rng(number).integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(20, 0).repeat(20, 1)).save(folder / f"{number}.png")
    return folder


# Two views of an image


def test_both_views_show_the_same_crop():
    down, across = np.mgrid[:96, :96]
    image = np.repeat((40 + down + across // 2)[..., None], 3, axis=2).astype(np.uint8)
    config = AugmentConfig(short_sides=(80, 128), crop=(96, 96))
    changed = 0
    for seed in range(12):
        plain, strong, inside = two_views(image, config, np.random.default_rng(seed))
        still = config.model_copy(update={"colour_jitter": False})
        crop, labels = augment(image, np.zeros((96, 96), np.int16), still, np.random.default_rng(seed))
        assert (plain == crop).all() and (inside == (labels != UNLABELLED)).all()
        assert strong.shape == plain.shape and strong.dtype == np.uint8
        changed += (strong != plain).mean() > 0.5
        # The same pixels, whatever their colours: brightness of both goes the same way.
        pair = np.stack([view[inside].mean(axis=1) for view in (plain, strong)])
        assert np.corrcoef(pair)[0, 1] > 0.8
    assert changed >= 8


def test_without_colour_jitter_hues_stay():
    image = np.full((64, 64, 3), (200, 60, 60), np.uint8)
    config = AugmentConfig(short_sides=(64,), crop=(64, 64), colour_jitter=False)
    views = [two_views(image, config, np.random.default_rng(seed))[1] for seed in range(20)]
    assert all((np.abs(np.diff(view[..., 1:].astype(int), axis=2)) <= 1).all() for view in views)  # green is blue
    assert any((view != image).any() for view in views)
    jittered = [
        two_views(image, config.model_copy(update={"colour_jitter": True}), np.random.default_rng(seed))[1]
        for seed in range(20)
    ]
    assert any((np.abs(np.diff(view[..., 1:].astype(int), axis=2)) > 8).all() for view in jittered)


# The teacher


def test_the_teacher_is_an_average_of_the_trained_parts_alone(fresh_model):
    model = fresh_model().train()
    teacher = MeanTeacher(model, SelfTrainingConfig(decay=0.9))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    name = model.trained()[0].name
    before = model.get_parameter(name).detach().clone()
    with torch.no_grad():
        for parameter in trained:
            parameter += 1
    for step in (1, 1000):
        teacher.follow(step)
    # In the first step the average moves by 1 - 2 / 11, later by 1 - 0.9.
    expected = before + 1 - (2 / 11) * 0.9
    torch.testing.assert_close(teacher.model.get_parameter(name), expected)
    names = {parameter.name for parameter in model.trained()}
    assert teacher.state().keys() == names
    for name, parameter in model.named_parameters():
        shared = teacher.model.get_parameter(name).data_ptr() == parameter.data_ptr()
        assert shared == (name not in names), name


def test_the_weight_of_its_labels_ramps_up(fresh_model):
    teacher = MeanTeacher(fresh_model().train(), SelfTrainingConfig(weight=2.0, ramp_up=4))
    weights = []
    for step in range(6):
        teacher.step = step
        weights.append(teacher.weight())
    assert weights == [0, 0.5, 1, 1.5, 2, 2]


def test_its_confidence_is_the_calibrated_one():
    scores = np.random.default_rng(0).gamma(0.3, size=(4, 6, 7)).astype(np.float32)
    winners = scores.argmax(axis=0)
    calibration = Calibration("m", 0.7, ("a",), "d", 1, 1, 0.1, 0.1, doubtful_temperature=1.6, doubtful_below=0.4)
    config = SelfTrainingConfig(temperature=0.7, doubtful_temperature=1.6, doubtful_below=0.4)
    expected = calibrated_confidence(lambda rows: scores[:, rows], winners, 4, calibration)
    confidence, labels = confident_words(torch.from_numpy(scores).flatten(1), config)
    np.testing.assert_allclose(confidence.view(6, 7), expected, rtol=1e-5)
    assert (labels.view(6, 7).numpy() == winners).all()


def test_it_labels_where_it_is_sure_and_never_padding(small_model):
    text = TextEncoder(small_model).classifier(WORDS)
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    inside = torch.ones(2, 64, 96, dtype=torch.bool)
    inside[:, 40:] = False

    def labelled(confidence: float) -> np.ndarray:
        teacher = MeanTeacher(copy.deepcopy(small_model), SelfTrainingConfig(confidence=confidence))
        maps = teacher.label(pixels, inside, text).maps.numpy()
        assert teacher.figures()["pseudo_labelled"] == pytest.approx((maps >= 0).mean())
        return maps

    everywhere = labelled(0.0)
    assert everywhere.shape == (2, 64 // STRIDE, 96 // STRIDE)
    assert (everywhere[:, 40 // STRIDE :] == UNLABELLED).all() and (everywhere[:, : 40 // STRIDE] >= 0).mean() > 0.9
    shares = []
    for some in map(labelled, np.linspace(0.3, 1, 15)):
        shares.append(float((some >= 0).mean()))
        assert (some[some >= 0] == everywhere[some >= 0]).all()
        for labels in some:
            counts = np.bincount(labels[labels >= 0], minlength=3)
            assert all(count == 0 or count >= LEAST_PIXELS for count in counts)
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0
    assert any(0 < share < shares[0] for share in shares)
    # A threshold for each word: the word that needs more than there can be is labelled nowhere.
    common = np.bincount(everywhere[everywhere >= 0], minlength=3).argmax()
    needed = [2.0 if word == common else 0.0 for word in range(3)]
    teacher = MeanTeacher(copy.deepcopy(small_model), SelfTrainingConfig(confidence=0.0), needed)
    of_words = teacher.label(pixels, inside, text).maps.numpy()
    assert not (of_words == common).any()
    assert (of_words[of_words >= 0] == everywhere[of_words >= 0]).all()


def test_specks_are_left_out(fresh_model):
    teacher = MeanTeacher(fresh_model().train(), SelfTrainingConfig(confidence=0.5))
    for pixels in (LEAST_PIXELS - 1, LEAST_PIXELS):
        masks = torch.zeros(2, 6, 8)
        masks[1].flatten()[:pixels] = 1
        masks[0] = 1 - masks[1]
        labels = teacher._label_map(torch.eye(2), masks, torch.ones(6, 8, dtype=torch.bool))
        assert (labels == 1).sum() == (pixels if pixels >= LEAST_PIXELS else 0) and (labels == 0).sum() == 48 - pixels


# What counts in the losses


def outputs_and_targets(labelled: bool):
    generator = torch.Generator().manual_seed(0)
    output = LayerOutput(
        torch.randn(1, 5, 8, 8, generator=generator).requires_grad_(),
        torch.randn(1, 5, 4, generator=generator).requires_grad_(),
    )
    labels = np.full((8, 8), UNLABELLED, np.int16)
    if labelled:
        labels[:4, :4], labels[:4, 4:] = 0, 2
    return output, LabelMapTargets.from_maps([labels])


@pytest.mark.parametrize("ignore", [True, False])
def test_pixels_that_the_teacher_left_out_count_in_no_mask_loss(ignore):
    output, targets = outputs_and_targets(labelled=True)
    plain = SetCriterion(FixedPoints.grid(8))
    losses, matches = (plain.sparing() if ignore else plain)([output], targets, 1.0)
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    assert output.mask_logits.grad[:, :, :4].abs().sum() > 0
    assert bool(output.mask_logits.grad[:, :, 4:].abs().sum() == 0) is ignore
    # What a query proposes there does not decide which segment it gets either.
    changed = output.mask_logits.detach().clone()
    changed[:, :, 4:] = 9 * torch.randn(1, 5, 4, 8, generator=torch.Generator().manual_seed(1))
    again, same = plain.sparing()([LayerOutput(changed, output.class_logits)], targets, 1.0)
    if ignore:
        assert torch.equal(same[0].query, matches[0].query)
        torch.testing.assert_close(again["loss_mask"], losses["loss_mask"])


def test_a_crop_that_the_teacher_knows_nothing_of_teaches_nothing():
    output, targets = outputs_and_targets(labelled=False)
    losses, _ = SetCriterion(FixedPoints.grid(8)).sparing()([output], targets, 1.0)
    total = sum(losses.values())
    total.backward()
    assert total == 0 and not output.class_logits.grad.any() and not output.mask_logits.grad.any()


def test_the_model_sees_the_strong_view_and_the_teacher_the_plain_one(small_model):
    model = copy.deepcopy(small_model).train()
    text = TextEncoder(model).classifier(WORDS)
    teacher = MeanTeacher(model, SelfTrainingConfig(confidence=0.0, weight=0.5))
    task = SanTask(model, [text], SetCriterion(FixedPoints.grid(8)), teacher)
    strong, plain = torch.randint(0, 256, (2, 1, 3, 64, 64), dtype=torch.uint8)
    inside = torch.ones(1, 64, 64, dtype=torch.bool)
    batch = UnlabelledBatch(strong, plain, inside, 0)
    losses = task(batch, task.prepare([batch]))
    assert torch.equal(batch.targets.maps, teacher.label(normalise(plain, model.config.image), inside, text).maps)
    # Labels given to the strong view cost twice as much, as the weight is a half.
    labelled = SanTask(model, [text], SetCriterion(FixedPoints.grid(8)).sparing())
    whole = labelled(
        SegmentationBatch(strong, batch.targets), labelled.prepare([SegmentationBatch(strong, batch.targets)])
    )
    assert losses.keys() == whole.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(2 * loss, whole[name])
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


# Whole runs


class Killed(Exception):
    """The end of a process, for tests."""


def train(model, photos, out, killed_at: int | None = None, steps: int = 6):
    def validate(step: int) -> dict[str, float]:
        if step == killed_at:
            raise Killed
        return {"score": float(step)}

    config = SanTrainingConfig(
        loop=LoopConfig(steps=steps, batch_size=2, learning_rate=1e-3, save_every=2, log_every=1, validate_every=1),
        augment=AugmentConfig(short_sides=(64, 96), crop=(64, 64)),
        points=PointsConfig(count=64),
        self_training=SelfTrainingConfig(confidence=0.3, ramp_up=3, decay=0.8),
    )
    return train_san(
        model,
        [],
        config,
        out,
        validate=validate,
        best_by="score",
        unlabelled=[(UnlabelledFolder(photos, WORDS), 1.0)],
        progress=NoProgress(),
    )


def test_a_killed_run_goes_on_with_its_teacher_to_the_last_bit(tmp_path, small_model, photos):
    def lines(out):
        with (out / "log.csv").open() as file:
            return [
                [cell for name, cell in row.items() if "loss" in name or name == "pseudo_labelled"]
                for row in csv.DictReader(file)
            ]

    models = [copy.deepcopy(small_model).train() for _ in range(3)]
    assert train(models[0], photos, tmp_path / "whole").finished
    with pytest.raises(Killed):
        train(models[1], photos, tmp_path / "killed", killed_at=5)
    assert train(models[2], photos, tmp_path / "killed").finished
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    states = [CheckpointFolder(tmp_path / name / "checkpoints", 2).load_newest()[0] for name in ("whole", "killed")]
    for key in ("parameters", "follower"):
        assert states[0][key].keys() == states[1][key].keys() != set()
        assert all(torch.equal(states[0][key][name], states[1][key][name]) for name in states[0][key])
    assert any(not torch.equal(states[0]["follower"][name], value) for name, value in states[0]["parameters"].items())
