"""Adapt a model to a folder of images without labels, by training on its own surest answers: `opensan adapt`.

The trained parts alone learn, from a mean teacher (`opensan.train.teacher`). What the model knew beside the asked words
is kept by old labelled images among the new ones, or else by a loss that holds its answers for other words.

Whether it gets better cannot be seen without labels. What can be seen is agreement: the share of pixels that keep
their word when an image is mirrored or made smaller (`opensan.tune.suggest`). The teacher with the best agreement is
taken, and training ends when that rises no more. A teacher with which a word loses half of its pixels is never taken,
because one word for everything agrees best.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opensan import __version__
from opensan.assemble.bands import to_array
from opensan.assemble.calibration import Calibration
from opensan.checkpoints import load_model, save_folder
from opensan.config import CONFIG_NAME
from opensan.data.augment import AugmentConfig
from opensan.data.dataset import SegmentationDataset
from opensan.data.unlabelled import UnlabelledFolder
from opensan.devices import checked_device
from opensan.errors import UserError
from opensan.evaluation.evaluation import Evaluation
from opensan.evaluation.predictors import ModelPredictor
from opensan.evaluation.run import evaluate_set, facts
from opensan.evaluation.sets import PreparedSet, open_set
from opensan.files import hold, json_text, remove_temporaries, write_text
from opensan.lab.san_training import SceneDataset
from opensan.lab.scenes import BASE_NAMES
from opensan.model import SAN
from opensan.outputs import check_writable
from opensan.recipe.config import TrainingDataConfig
from opensan.recipe.run import open_data, with_a_list
from opensan.segmenters.explanation import bundled_words
from opensan.segmenters.load import find_calibration
from opensan.segmenters.san import SanSegmenter
from opensan.train.checkpoint import CheckpointFolder
from opensan.train.config import LoopConfig, PointsConfig, SanTrainingConfig, SelfTrainingConfig
from opensan.train.log import TrainingProgress
from opensan.train.san import train_san
from opensan.train.teacher import MeanTeacher, confident_words
from opensan.tune.suggest import LEAST, answers_of, see
from opensan.vocabulary import Vocabulary, Word

CALIBRATED_CONFIDENCE = 0.8
"""Confidence that the teacher needs where a calibration makes it a probability."""

KEPT_PIXELS = 0.5
"""A word that has less than this share of its former pixels has given them up to others."""

SCALES = (0.75, 0.875, 1.0, 1.125, 1.25)
"""Factors of the model's short side in training."""

DRAWN_SCENES = 200
"""Scenes that are drawn for `tiny`, as old data."""

RECORD = "adaptation.json"

RESULTS = ("model", "rejected")
"""Folders for the adapted model: installed, or kept apart."""


@dataclass(frozen=True)
class AdaptSettings:
    """Settings of an adaptation. The defaults take minutes on a processor with `photo` or `tiny`."""

    steps: int = 120
    """Most steps; agreement may end the training earlier."""
    batch: int = 4
    """Crops in a step."""
    learning_rate: float = 2e-5
    confidence: float | None = None
    """The teacher's labels count where its confidence is so high, in [0, 1]; None: 0.8 with a calibration, else what
    half of the pixels of each word reach, as the model labels the folder before."""
    keep: float = 1.0
    """Weight of the loss that keeps the answers for other words, where there are no old images; 0: none."""
    score_every: int = 20
    """Steps between measurements of agreement."""
    patience: int = 2
    """Measurements in a row without better agreement after which training ends."""
    scored: int = 8
    """Images of the folder, spread evenly, on which agreement is measured."""
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """Agreement of a model's answers for a folder, without labels."""

    agreement: float
    """Share of pixels that keep their word when the image is mirrored or smaller, in [0, 1]."""
    areas: np.ndarray
    """[K] pixels of each word, of those compared."""

    def losers(self, before: "Score") -> list[int]:
        """Return the words, by index, that had pixels before and have given up half of them."""
        had = before.areas >= LEAST * before.areas.sum()
        return np.flatnonzero(had & (self.areas < KEPT_PIXELS * before.areas)).tolist()


@dataclass(frozen=True)
class Checked:
    """Figures on a labelled check set, each in [0, 1]; nan where no such word has labels."""

    miou: float
    """Mean IoU over all words of the set."""
    asked: float
    """The same over those that were asked for."""
    others: float
    """The same over the others."""


@dataclass(frozen=True)
class Adaptation:
    """Result of an adaptation."""

    finished: bool
    """False if it was interrupted: the same call goes on."""
    steps: int
    """Steps that were done."""
    step: int
    """Step whose teacher was taken."""
    before: float
    """Agreement before, in [0, 1]."""
    after: float
    """The best agreement of the training."""
    confidence: float
    """Confidence from which pseudo-labels counted; where each word has its own, the mean over words."""
    check_before: Checked | None = None
    check_after: Checked | None = None
    folder: Path | None = None
    """The adapted model; None if agreement rose at no step, so that there is none."""
    rejected: bool = False
    """Whether the check set got worse with it: `folder` is OUT/rejected then."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        checks = {name: vars(check) if check else None for name, check in self._checks().items()}
        return {**vars(self), **checks, "folder": None if self.folder is None else str(self.folder)}

    def _checks(self) -> dict[str, Checked | None]:
        return {"check_before": self.check_before, "check_after": self.check_after}


def adapt(
    folder: str | os.PathLike[str],
    words: Vocabulary,
    model: str | os.PathLike[str] = "san-vit-b16",
    *,
    out: str | os.PathLike[str] = "adapted",
    check: str | os.PathLike[str] | None = None,
    replay: str | os.PathLike[str] | None = None,
    settings: AdaptSettings | None = None,
    device: str = "auto",
    say: Callable[[str], None] = lambda message: None,
    progress: TrainingProgress | None = None,
) -> Adaptation:
    """Adapt a model to the images in `folder` by training on its own surest answers; see the module.

    `out`/model is the adapted model, with an identity of its own; `out`/run holds the training, from which the same
    call continues. If the check set gets worse, the model is in `out`/rejected, and there is no `out`/model.

    Args:
        folder: images without labels, in it and below it.
        words: the words that these images show, two or more.
        model: a model with trainable parts, as `opensan.load` takes it.
        out: the folder for results.
        check: a prepared set with labels, which is measured before and after, with its own words.
        replay: a prepared set of old images, among which the new ones are mixed; None: drawn scenes for `tiny`, and for
            others the loss that keeps answers.
        settings: how much, and how, is trained.
        device: as for `opensan.load`.
        say: called with what is done, a line each time.
        progress: what reports the training; None: lines on stderr.

    Raises:
        UserError: one line, before the work: no image, one word, no such set or model, a folder that can't be written,
            or one that holds an adaptation with other settings.
    """
    settings, out = settings or AdaptSettings(), Path(out)
    if len(words.words) < 2:
        raise UserError("one word gets every pixel, whatever is learnt: give the words of all that is there")
    if words.tuned:
        raise UserError("tuned words are those of the model as it is: give the words' texts, and tune them again later")
    images = UnlabelledFolder(Path(folder), words)
    some = _some(images, settings.scored)
    held_out = None if check is None else open_set(Path(check))
    old = _old_images(model, replay)
    check_writable(out)
    say(f"loading {model}")
    calibration = find_calibration(model)
    start = load_model(os.fspath(model)).train()
    chosen = checked_device(device)
    segmenter = SanSegmenter(start, device=chosen)
    identity = str(segmenter.identity)
    if calibration is not None:
        segmenter.calibrate(calibration[1])
    say("measuring the model as it is")
    before = score(segmenter, some, words)
    self_training, thresholds = _self_training(segmenter, some, words, settings)
    first = None if held_out is None else _measure(held_out, segmenter, str(model), out / "check" / "before", words)
    teacher = MeanTeacher(start.to(chosen), self_training, thresholds)

    def validate(_step: int) -> Mapping[str, float]:
        now = score(SanSegmenter(teacher.model, device=chosen), some, words)
        losers = now.losers(before)
        return {"score": -1.0 if losers else now.agreement, "agreement": now.agreement, "losers": float(len(losers))}

    keep = None if old or not settings.keep else (_other_words(segmenter, words), settings.keep)
    result = train_san(
        start,
        [(data, 1.0) for data in old],
        training_config(start, settings, self_training),
        out / "run",
        device=chosen,
        validate=validate,
        best_by="score",
        unlabelled=[(images, 1.0)],
        keep=keep,
        teacher=teacher,
        progress=progress,
    )
    done = Adaptation(False, result.step, result.step, before.agreement, result.best or 0.0, self_training.confidence)
    if not result.finished:
        return done
    best = CheckpointFolder(out / "run" / "checkpoints", 1).load_best()
    assert best is not None  # the last step is always measured
    done = Adaptation(True, result.step, best["step"], before.agreement, best["best"], self_training.confidence, first)
    if done.after <= done.before:
        return _kept(done, out)
    teacher.load(best["follower"], best["step"])
    adapted = teacher.model
    name = adapted.config.name.removesuffix("-adapted")
    adapted.config = adapted.config.model_copy(update={"name": f"{name}-adapted"})
    new = SanSegmenter(adapted, device=chosen)
    last = None if held_out is None else _measure(held_out, new, str(out), out / "check" / "after", words)
    return _saved(done, last, adapted, out, images, settings, {"from": identity, "model": str(new.identity)})


def _old_images(model: str | os.PathLike[str], replay: str | os.PathLike[str] | None) -> list[SegmentationDataset]:
    """Return the labelled images to mix in: those of a set, drawn scenes for `tiny`, or none."""
    if replay is not None:
        return [open_data(with_a_list(TrainingDataConfig(folder=Path(replay))))]
    if os.fspath(model) == "tiny":
        return [SceneDataset(7, DRAWN_SCENES, (240, 320), "masks", BASE_NAMES)]
    return []


def _other_words(segmenter: SanSegmenter, words: Vocabulary) -> Vocabulary:
    """Return the words whose answers are kept: the bundled ones that the model has read, and that nobody asked for."""
    plain = Vocabulary(tuple(Word(word.name) for word in bundled_words().words))
    asked = {text.lower() for word in words.words for text in (word.name, *word.synonyms)}
    return bundled_words([*segmenter.unseen_texts(plain), *asked])


def training_config(model: SAN, settings: AdaptSettings, self_training: SelfTrainingConfig) -> SanTrainingConfig:
    """Return the training's configuration, with crops of a size that suits the model."""
    image = model.config.image
    crop = max(int(0.85 * image.short_side) // image.size_divisor, 1) * image.size_divisor
    return SanTrainingConfig(
        loop=LoopConfig(
            steps=settings.steps,
            batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            poly_power=0.0,  # the end is not known beforehand
            warmup=10,
            seed=settings.seed,
            save_every=max(settings.score_every // 2, 1),
            validate_every=settings.score_every,
            patience=settings.patience,
        ),
        # No change of hues: words may name colours.
        augment=AugmentConfig(
            short_sides=tuple(round(scale * image.short_side) for scale in SCALES),
            long_side=round(SCALES[-1] * image.long_side),
            crop=(crop, crop),
            colour_jitter=False,
        ),
        points=PointsConfig(count=2_048),
        self_training=self_training,
    )


def score(segmenter: SanSegmenter, images: Sequence[np.ndarray], words: Vocabulary) -> Score:
    """Measure the agreement of a model's answers on images [H, W, 3] uint8 RGB."""
    answers = answers_of(segmenter, [see(segmenter, image) for image in images], words)
    winners = answers.winners[answers.winners >= 0]
    return Score(float(answers.agreement.mean()), np.bincount(winners, minlength=len(words.words)))


def _some(images: UnlabelledFolder, count: int) -> list[np.ndarray]:
    """Read `count` images, evenly spread, or fewer where some can't be read, of which it warns.

    Raises UserError, one line, if none can.
    """
    read, broken = [], []
    for index in np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int).tolist():
        try:
            read.append(images.image(index))
        except UserError as error:
            broken.append(str(error))
    if not read:
        raise UserError(f"none of the images that were tried can be read, the first: {broken[0]}")
    if broken:
        warnings.warn(f"{len(broken)} of the images that agreement is measured on: {broken[0]}", stacklevel=3)
    return read


def _self_training(
    segmenter: SanSegmenter, images: Sequence[np.ndarray], words: Vocabulary, settings: AdaptSettings
) -> tuple[SelfTrainingConfig, list[float]]:
    """Return the teacher's settings, and a threshold for each word where shares of scores are no probabilities.

    A single threshold would leave labels to the words with the highest scores alone, and these would take all pixels in
    the end (Zou et al., "Class-balanced self-training", ECCV 2018). A word that has no pixels needs the mean of the
    others.
    """
    config = _with_temperatures(SelfTrainingConfig(decay=0.95), segmenter.calibration)
    confidence = settings.confidence
    if confidence is None and segmenter.calibration is not None:
        confidence = CALIBRATED_CONFIDENCE
    if confidence is not None:
        return config.model_copy(update={"confidence": confidence}), []
    found = []
    for image in images:
        encoding, masks = see(segmenter, image).views[0]
        scores = masks @ to_array(segmenter.class_probabilities(encoding, words))
        found.append(confident_words(torch.from_numpy(scores.T.copy()), config))
    shares, labels = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    medians = {int(word): float(np.median(shares[labels == word])) for word in np.unique(labels)}
    mean = float(np.mean(list(medians.values())))
    thresholds = [round(medians.get(word, mean), 3) for word in range(len(words.words))]
    return config.model_copy(update={"confidence": round(mean, 3)}), thresholds


def _with_temperatures(config: SelfTrainingConfig, calibration: Calibration | None) -> SelfTrainingConfig:
    if calibration is None:
        return config
    names = ("temperature", "doubtful_temperature", "doubtful_below")
    return config.model_copy(update={name: getattr(calibration, name) for name in names})


def _measure(held_out: PreparedSet, segmenter: SanSegmenter, model: str, folder: Path, words: Vocabulary) -> Checked:
    """Measure a model on the check set, with a report in `folder`."""
    vocabulary = held_out.dataset.vocabulary
    evaluation = evaluate_set(
        held_out, ModelPredictor(segmenter, vocabulary), folder, about=facts(model, segmenter, tta=False)
    )
    asked = [words.find(word.name) is not None for word in vocabulary.words]
    return checked(evaluation, asked)


def checked(evaluation: Evaluation, asked: Sequence[bool]) -> Checked:
    """Return mean IoU over the classes of an evaluation, over those `asked` for, and over the others."""

    def mean(wanted: Sequence[bool]) -> float:
        chosen = zip(evaluation.metrics.classes, wanted, strict=False)  # background words, the last ones, have no class
        values = [one.iou for one, counted in chosen if counted and one.pixels]
        return float(np.mean(values)) if values else float("nan")

    return Checked(evaluation.metrics.miou, mean(asked), mean([not one for one in asked]))


def _saved(
    done: Adaptation,
    last: Checked | None,
    adapted: SAN,
    out: Path,
    images: UnlabelledFolder,
    settings: AdaptSettings,
    identities: Mapping[str, str],
) -> Adaptation:
    """Write the adapted model to OUT/model, or to OUT/rejected if the check set got worse."""
    worse = last is not None and done.check_before is not None and last.miou < done.check_before.miou
    target, other = (out / name for name in (reversed(RESULTS) if worse else RESULTS))
    result = Adaptation(**{**vars(done), "check_after": last, "folder": target, "rejected": worse})
    record = {
        "opensan": __version__,
        **identities,
        "images": {"name": images.root.absolute().name, "images": len(images)},
        "words": images.vocabulary.names,
        "settings": vars(settings),
        **{name: value for name, value in result.to_dict().items() if name != "folder"},
    }
    with _writing(out):
        save_folder(adapted, target)
        write_text(target / RECORD, json_text(record) + "\n")
        _remove(other)
    return result


def _kept(done: Adaptation, out: Path) -> Adaptation:
    """Leave no model of this training where a shorter one had been installed."""
    with _writing(out):
        for name in RESULTS:
            _remove(out / name)
    return done


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Hold the folder of results, and remove the temporary files that a killed process left in them."""
    with hold(out / ".lock", f"{out}: another process writes its adapted model; wait for it"):
        for name in RESULTS:
            remove_temporaries(out / name)
        yield


def _remove(folder: Path) -> None:
    """Remove a model that this command wrote, with its record; leave anything else as it is.

    The configuration goes first, so that what a killed process leaves is no model, and the record last, by which the
    next call knows the rest.
    """
    try:
        json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        with suppress(OSError):  # it is not there, or not empty, as where a process was killed after the record
            folder.rmdir()
        return
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != RECORD:
            path.unlink()
    (folder / RECORD).unlink()
    folder.rmdir()
