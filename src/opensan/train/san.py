"""Train a SAN on labelled images, and on images without labels that a mean teacher labels.

Letters: B batch, K words, Q queries, H W image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from opensan.config import ImageConfig
from opensan.data.augment import AugmentConfig, augment, two_views
from opensan.data.dataset import SegmentationDataset
from opensan.data.objects import has_objects, with_objects
from opensan.data.unlabelled import UnlabelledFolder
from opensan.distributed import process_group, world_size
from opensan.errors import UserError
from opensan.model import SAN
from opensan.model.identity import frozen_identity
from opensan.structures import TextClassifier
from opensan.text.encoder import TextEncoder
from opensan.train.config import SanTrainingConfig
from opensan.train.criterion import SetCriterion, mask_normalizer
from opensan.train.log import RunLogger, TrainingProgress
from opensan.train.loop import RunResult, Trainer
from opensan.train.matcher import LayerOutput
from opensan.train.optimizer import san_parameter_groups
from opensan.train.points import RandomPoints
from opensan.train.stream import DatasetMixture, TrainingSource
from opensan.train.targets import LabelMapTargets
from opensan.train.teacher import KeptAnswers, MeanTeacher
from opensan.vocabulary import Vocabulary


@dataclass(frozen=True)
class SegmentationBatch:
    """Crops and their segments."""

    images: Tensor
    """[B, 3, H, W] uint8 RGB."""
    targets: LabelMapTargets
    dataset: int = 0
    """Index of the training data set, and so of its vocabulary."""

    def to(self, device: torch.device) -> "SegmentationBatch":
        """Return the batch on `device`."""
        return replace(self, images=self.images.to(device, non_blocking=True), targets=self.targets.to(device))

    def pin_memory(self) -> "SegmentationBatch":
        """Return the batch in pinned memory, from which a GPU copies asynchronously."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


@dataclass
class UnlabelledBatch:
    """Crops without labels, in two views; the teacher adds the targets before the forward pass."""

    images: Tensor
    """[B, 3, H, W] uint8 RGB: the view for the model, changed strongly."""
    plain: Tensor
    """[B, 3, H, W] uint8 RGB: the same crops as they are, for the teacher."""
    inside: Tensor
    """[B, H, W] bool: false on padding."""
    dataset: int
    """Index of the training data set, and so of its vocabulary; those with labels come first."""
    targets: LabelMapTargets | None = None
    kept: Tensor | None = None
    """[B, Q, K + 1]: the answers of `KeptAnswers`, if there are any."""

    def to(self, device: torch.device) -> "UnlabelledBatch":
        """Return the batch on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "UnlabelledBatch":
        """Return the batch in pinned memory, from which a GPU copies asynchronously."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "UnlabelledBatch":
        return UnlabelledBatch(change(self.images), change(self.plain), change(self.inside), self.dataset)


Views = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The results of `opensan.data.augment.two_views`."""


class UnlabelledSource:
    """Crops of a folder without labels, in two views (a `TrainingSource`)."""

    def __init__(self, folder: UnlabelledFolder, config: AugmentConfig, number: int) -> None:
        """`number`: index of this folder among all training data sets."""
        self.folder = folder
        self.config = config
        self.number = number

    def __len__(self) -> int:
        return len(self.folder)

    def name(self, index: int) -> str:
        return self.folder.name(index)

    def load(self, index: int, generator: np.random.Generator) -> Views:
        return two_views(self.folder.image(index), self.config, generator)

    def collate(self, samples: list[Views]) -> UnlabelledBatch:
        plain, strong, inside = (torch.from_numpy(np.stack(views)) for views in zip(*samples, strict=True))
        return UnlabelledBatch(strong.permute(0, 3, 1, 2), plain.permute(0, 3, 1, 2), inside, self.number)


class SegmentationSource:
    """Augmented crops of a labelled data set (a `TrainingSource`)."""

    def __init__(
        self, dataset: SegmentationDataset, config: AugmentConfig, number: int = 0, objects: bool = False
    ) -> None:
        """`number`: index of this data set among the training data sets. `objects`: each object is a segment.

        Raises UserError if the data set does not know its objects.
        """
        if objects and not has_objects(dataset):
            raise UserError(
                f"training data set {number + 1} has no folder objects/, which training for objects needs: "
                "prepare it with a reader that keeps objects (coco-instances, coco-panoptic)"
            )
        self.objects = objects
        self.dataset = dataset
        self.config = config
        self.number = number

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def load(self, index: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        image, labels = self.dataset[index]
        if self.objects and has_objects(self.dataset):
            labels = with_objects(labels, self.dataset.objects(index))
        return augment(image, labels, self.config, generator)

    def collate(self, samples: list[tuple[np.ndarray, np.ndarray]]) -> SegmentationBatch:
        images, labels = zip(*samples, strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return SegmentationBatch(pixels, LabelMapTargets.from_maps(labels), self.number)


class SanTask(nn.Module):
    """The forward pass of training: crops to losses. The words are fixed, so their embeddings are computed once."""

    def __init__(
        self,
        model: SAN,
        texts: Sequence[TextClassifier],
        criterion: SetCriterion,
        teacher: MeanTeacher | None = None,
        kept: KeptAnswers | None = None,
    ) -> None:
        """Set the task up.

        `texts`: the vocabulary of each training data set, in their order. `teacher`: what labels the batches that have
        no labels; their pixels that it leaves out count in no loss. `kept`: answers that are to stay on such batches.
        """
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.texts = tuple(texts)
        self.teacher = teacher
        self.of_teacher = criterion.sparing()
        self.kept = kept

    def blocks(self) -> list[nn.Module]:
        """Return the modules that activation checkpointing and FSDP treat separately."""
        return self.model.blocks()

    def prepare(self, batches: Sequence[SegmentationBatch | UnlabelledBatch]) -> float:
        """Have the teacher label what has no labels, and return the divisor of the step's mask losses."""
        targets = []
        for batch in batches:
            if isinstance(batch, UnlabelledBatch):
                assert self.teacher is not None  # `train_san` makes it wherever there are such batches
                plain = normalise(batch.plain, self.model.config.image)
                batch.targets = self.teacher.label(plain, batch.inside, self.texts[batch.dataset])
                batch.kept = None if self.kept is None else self.kept.answers(plain)
            assert batch.targets is not None
            targets.append(batch.targets)
        return mask_normalizer(targets, batches[0].images.device)

    def forward(self, batch: SegmentationBatch | UnlabelledBatch, normalizer: float) -> dict[str, Tensor]:
        """Return weighted losses by name."""
        proposals = self.model.propose(normalise(batch.images, self.model.config.image), supervise=True)
        text = self.texts[batch.dataset]
        outputs = [
            LayerOutput(layer.mask_logits, self.model.classify(layer, text))
            for layer in (proposals, *proposals.auxiliary)
        ]
        assert batch.targets is not None  # `prepare` comes first
        if not isinstance(batch, UnlabelledBatch):
            losses = self.criterion(outputs, batch.targets, normalizer)[0]
            # The same names in every step; labels say themselves what is to stay.
            return losses if self.kept is None else losses | {"loss_keep": losses["loss_ce"].detach() * 0}
        assert self.teacher is not None
        weight = self.teacher.weight()
        losses = self.of_teacher(outputs, batch.targets, normalizer)[0]
        losses = {name: weight * loss for name, loss in losses.items()}
        if self.kept is not None:
            assert batch.kept is not None
            losses["loss_keep"] = self.kept.loss(self.model.classify(proposals, self.kept.text), batch.kept)
        return losses


def normalise(images: Tensor, config: ImageConfig) -> Tensor:
    """Normalise [B, 3, H, W] uint8 to float32 by the model's mean and standard deviation."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (config.mean, config.std))
    return (images.float() - mean) / std


def train_san(
    model: SAN,
    dataset: SegmentationDataset | Sequence[tuple[SegmentationDataset, float]],
    config: SanTrainingConfig,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    validate: Callable[[int], Mapping[str, float]] | None = None,
    best_by: str = "miou",
    loggers: Sequence[RunLogger] = (),
    panel: Callable[[int], Mapping[str, Image]] | None = None,
    texts: Sequence[TextClassifier] | None = None,
    progress: TrainingProgress | None = None,
    unlabelled: Sequence[tuple[UnlabelledFolder, float]] = (),
    keep: tuple[Vocabulary, float] | None = None,
    teacher: MeanTeacher | None = None,
) -> RunResult:
    """Train `model` (in place) on `dataset`; `out` is the run's folder (see `opensan.train.loop.Trainer`).

    `dataset` may be several data sets, each with its weight: every micro-batch is from one of them, with its words,
    and their shares of the samples follow the weights. Processes that torchrun started train together, each on its own
    device. CLIP's weights are not trained and not in the run's checkpoints: a run is continued with the same CLIP.
    `texts` are the data sets' words, in place of what the model's own text tower makes of them.
    `unlabelled` are folders without labels, each with its weight among the data sets; a mean teacher labels them, as
    `config.self_training` says. `dataset` may then be an empty list. `keep` are other words, and the weight of the loss
    that keeps the answers for them on these images. `teacher` is the teacher, if the caller needs it too.
    Raises UserError if the crop does not suit the model or the run had another CLIP, and the errors of `Trainer.run`.
    """
    divisor = model.config.image.size_divisor
    if any(side % divisor for side in config.augment.crop):
        raise UserError(f"augment.crop {config.augment.crop}: both sides must be multiples of {divisor}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "every parameter of the model is frozen, as in a SanSegmenter; train opensan.checkpoints.load_model"
        )
    datasets: list[tuple[SegmentationDataset, float]] = (
        list(dataset) if isinstance(dataset, list | tuple) else [(cast(SegmentationDataset, dataset), 1.0)]
    )
    sources: list[TrainingSource] = [
        SegmentationSource(data, config.augment, number, config.objects) for number, (data, _) in enumerate(datasets)
    ]
    sources += [
        UnlabelledSource(folder, config.augment, number) for number, (folder, _) in enumerate(unlabelled, len(datasets))
    ]
    mixture = DatasetMixture(tuple(sources), tuple(weight for _, weight in (*datasets, *unlabelled)))
    points = RandomPoints(config.points.count, config.points.oversampling, config.points.importance)
    criterion = SetCriterion(points, config.loss_weights, config.no_object_weight, config.spare_unlabelled)
    groups = san_parameter_groups(model, learning_rate=config.loop.learning_rate, weight_decay=config.loop.weight_decay)
    with process_group(device) as group:
        model.to(group.device)
        if texts is None:
            encoder = TextEncoder(model)
            vocabularies = [data.vocabulary for data, _ in datasets] + [data.vocabulary for data, _ in unlabelled]
            texts = [encoder.classifier(vocabulary) for vocabulary in vocabularies]
        if unlabelled and world_size() > 1 and config.loop.parallel == "fsdp":
            raise UserError("loop.parallel: images without labels need ddp: each process has the whole teacher")
        if unlabelled and teacher is None:
            teacher = MeanTeacher(model, config.self_training)
        kept = None if keep is None else KeptAnswers(model, TextEncoder(model).classifier(keep[0]), keep[1])
        task = SanTask(model, texts, criterion, teacher, kept)
        trainer = Trainer(
            task,
            mixture,
            groups,
            config.loop,
            out,
            device=group.device,
            description=_description(model, datasets, unlabelled, config)
            | ({} if keep is None else {"keep": {"words": keep[0].names, "weight": keep[1]}})
            | ({} if teacher is None or not teacher.thresholds else {"thresholds": teacher.thresholds}),
            validate=validate,
            best_by=best_by,
            loggers=loggers,
            panel=panel,
            blocks=task.blocks(),
            progress=progress,
            follower=teacher,
        )
        result = trainer.run()
    model.eval()
    return result


def _description(
    model: SAN,
    datasets: Sequence[tuple[SegmentationDataset, float]],
    unlabelled: Sequence[tuple[UnlabelledFolder, float]],
    config: SanTrainingConfig,
) -> dict[str, object]:
    """Return the run's config.json: all settings that its numbers depend on."""
    mixture = [{"samples": len(data), "words": data.vocabulary.names, "weight": weight} for data, weight in datasets]
    mixture += [
        {"samples": len(folder), "words": folder.vocabulary.names, "weight": weight, "labelled": False}
        for folder, weight in unlabelled
    ]
    settings = config.model_dump(mode="json")
    if not config.objects:
        del settings["objects"]  # runs of earlier versions go on
    if not unlabelled:
        del settings["self_training"]
    return {
        "model": model.config.model_dump(mode="json"),
        "clip": frozen_identity(model),
        "data": mixture,
        **settings,
    }
