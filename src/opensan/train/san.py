"""Training a SAN on labelled photographs.

Letters: B batch, K words, Q queries, H W image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from opensan.config import ImageConfig
from opensan.data.augment import AugmentConfig, augment
from opensan.data.dataset import SegmentationDataset
from opensan.model import SAN
from opensan.structures import TextClassifier
from opensan.text import TextEncoder
from opensan.train.config import SanTrainingConfig
from opensan.train.criterion import SetCriterion, mask_normalizer
from opensan.train.log import RunLogger
from opensan.train.loop import RunResult, Trainer
from opensan.train.matcher import LayerOutput
from opensan.train.optimizer import san_parameter_groups
from opensan.train.points import RandomPoints
from opensan.train.targets import LabelMapTargets


@dataclass(frozen=True)
class SegmentationBatch:
    """Crops and what they should answer."""

    images: Tensor
    """[B, 3, H, W] uint8 RGB."""
    targets: LabelMapTargets

    def to(self, device: torch.device) -> "SegmentationBatch":
        """The same on `device`."""
        return SegmentationBatch(self.images.to(device, non_blocking=True), self.targets.to(device))


class SegmentationSource:
    """Augmented crops of a labelled data set (a `TrainingSource`)."""

    def __init__(self, dataset: SegmentationDataset, config: AugmentConfig) -> None:
        self.dataset = dataset
        self.config = config

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def load(self, index: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return augment(*self.dataset[index], self.config, generator)

    def collate(self, samples: list[tuple[np.ndarray, np.ndarray]]) -> SegmentationBatch:
        images, labels = zip(*samples, strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return SegmentationBatch(pixels, LabelMapTargets.from_maps(labels))


class SanTask(nn.Module):
    """The forward pass of training: crops to losses. The words are fixed, so their embeddings are computed once."""

    def __init__(self, model: SAN, text: TextClassifier, criterion: SetCriterion) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.text = text

    def prepare(self, batches: Sequence[SegmentationBatch]) -> float:
        """The number that mask losses of the step are divided by."""
        return mask_normalizer([batch.targets for batch in batches], batches[0].images.device)

    def forward(self, batch: SegmentationBatch, normalizer: float) -> dict[str, Tensor]:
        """Weighted losses by name."""
        proposals = self.model.propose(normalise(batch.images, self.model.config.image), supervise=True)
        outputs = [
            LayerOutput(layer.mask_logits, self.model.classify(layer, self.text))
            for layer in (proposals, *proposals.auxiliary)
        ]
        return self.criterion(outputs, batch.targets, normalizer)[0]


def normalise(images: Tensor, config: ImageConfig) -> Tensor:
    """[B, 3, H, W] uint8 -> float32, by the model's mean and standard deviation."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (config.mean, config.std))
    return (images.float() - mean) / std


def train_san(
    model: SAN,
    dataset: SegmentationDataset,
    config: SanTrainingConfig,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    validate: Callable[[int], Mapping[str, float]] | None = None,
    best_by: str = "miou",
    loggers: Sequence[RunLogger] = (),
    panel: Callable[[int], Mapping[str, Image]] | None = None,
) -> RunResult:
    """Train `model` (in place) on `dataset`; `out` is the run's folder (see `opensan.train.loop.Trainer`).

    CLIP's weights are not trained and not in the run's checkpoints: a run is continued with the same CLIP.
    Raises ValueError when the crop does not suit the model, and what `Trainer.run` raises.
    """
    divisor = model.config.image.size_divisor
    if any(side % divisor for side in config.augment.crop):
        raise ValueError(f"augment.crop {config.augment.crop}: both sides must be multiples of {divisor}")
    model.to(device)
    text = TextEncoder(model).classifier(dataset.vocabulary)
    points = RandomPoints(config.points.count, config.points.oversampling, config.points.importance)
    criterion = SetCriterion(points, config.loss_weights, config.no_object_weight)
    groups = san_parameter_groups(model, learning_rate=config.loop.learning_rate, weight_decay=config.loop.weight_decay)
    trainer = Trainer(
        SanTask(model, text, criterion),
        SegmentationSource(dataset, config.augment),
        groups,
        config.loop,
        out,
        device=device,
        description={"model": model.config.model_dump(mode="json"), **config.model_dump(mode="json")},
        validate=validate,
        best_by=best_by,
        loggers=loggers,
        panel=panel,
    )
    result = trainer.run()
    model.eval()
    return result
