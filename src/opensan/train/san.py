"""Train a SAN on labelled images.

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
from opensan.data.augment import AugmentConfig, augment
from opensan.data.dataset import SegmentationDataset
from opensan.data.objects import has_objects, with_objects
from opensan.distributed import process_group
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
from opensan.train.stream import DatasetMixture
from opensan.train.targets import LabelMapTargets


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

    def __init__(self, model: SAN, texts: Sequence[TextClassifier], criterion: SetCriterion) -> None:
        """`texts`: the vocabulary of each training data set, in their order."""
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.texts = tuple(texts)

    def blocks(self) -> list[nn.Module]:
        """Return the modules that activation checkpointing and FSDP treat separately."""
        return self.model.blocks()

    def prepare(self, batches: Sequence[SegmentationBatch]) -> float:
        """Return the divisor of the step's mask losses."""
        return mask_normalizer([batch.targets for batch in batches], batches[0].images.device)

    def forward(self, batch: SegmentationBatch, normalizer: float) -> dict[str, Tensor]:
        """Return weighted losses by name."""
        proposals = self.model.propose(normalise(batch.images, self.model.config.image), supervise=True)
        text = self.texts[batch.dataset]
        outputs = [
            LayerOutput(layer.mask_logits, self.model.classify(layer, text))
            for layer in (proposals, *proposals.auxiliary)
        ]
        return self.criterion(outputs, batch.targets, normalizer)[0]


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
) -> RunResult:
    """Train `model` (in place) on `dataset`; `out` is the run's folder (see `opensan.train.loop.Trainer`).

    `dataset` may be several data sets, each with its weight: every micro-batch is from one of them, with its words,
    and their shares of the samples follow the weights. Processes that torchrun started train together, each on its own
    device. CLIP's weights are not trained and not in the run's checkpoints: a run is continued with the same CLIP.
    `texts` are the data sets' words, in place of what the model's own text tower makes of them.
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
    sources = tuple(
        SegmentationSource(data, config.augment, number, config.objects) for number, (data, _) in enumerate(datasets)
    )
    mixture = DatasetMixture(sources, tuple(weight for _, weight in datasets))
    points = RandomPoints(config.points.count, config.points.oversampling, config.points.importance)
    criterion = SetCriterion(points, config.loss_weights, config.no_object_weight, config.spare_unlabelled)
    groups = san_parameter_groups(model, learning_rate=config.loop.learning_rate, weight_decay=config.loop.weight_decay)
    with process_group(device) as group:
        model.to(group.device)
        if texts is None:
            encoder = TextEncoder(model)
            texts = [encoder.classifier(data.vocabulary) for data, _ in datasets]
        task = SanTask(model, texts, criterion)
        trainer = Trainer(
            task,
            mixture,
            groups,
            config.loop,
            out,
            device=group.device,
            description=_description(model, datasets, config),
            validate=validate,
            best_by=best_by,
            loggers=loggers,
            panel=panel,
            blocks=task.blocks(),
            progress=progress,
        )
        result = trainer.run()
    model.eval()
    return result


def _description(
    model: SAN, datasets: Sequence[tuple[SegmentationDataset, float]], config: SanTrainingConfig
) -> dict[str, object]:
    """Return the run's config.json: all settings that its numbers depend on."""
    mixture = [{"samples": len(data), "words": data.vocabulary.names, "weight": weight} for data, weight in datasets]
    settings = config.model_dump(mode="json")
    if not config.objects:
        del settings["objects"]  # runs of earlier versions go on
    return {
        "model": model.config.model_dump(mode="json"),
        "clip": frozen_identity(model),
        "data": mixture,
        **settings,
    }
