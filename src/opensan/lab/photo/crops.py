"""Training crops of the labelled photographs, with the frozen tower's features, which are computed once for each crop.

Letters: B batch, H W crop, G side of the label grid, L positions, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opensan.config import ImageConfig
from opensan.data.augment import AugmentConfig, augment
from opensan.lab.photo.paste import CutOuts
from opensan.lab.photo.sets import PhotoSet
from opensan.model import SAN
from opensan.model.backbones.base import FeatureMap, ShallowFeatures
from opensan.train.san import normalise

LABEL_STRIDE = 8


@dataclass(frozen=True)
class Crop:
    """A crop, as it is kept."""

    image: Tensor
    """[3, H, W] uint8 RGB."""
    labels: Tensor
    """[G, G] int64: every eighth pixel's label."""
    features: ShallowFeatures
    """The features of a batch of one, in half precision."""


@dataclass(frozen=True)
class CropBatch:
    """Crops of one data set."""

    images: Tensor
    """[B, 3, H, W] uint8 RGB."""
    labels: Tensor
    """[B, G, G] int64, negative: not labelled."""
    features: ShallowFeatures
    dataset: int

    def to(self, device: torch.device) -> "CropBatch":
        """Return the batch itself: it is trained on the processor that made it."""
        assert device.type == "cpu"
        return self


class Crops:
    """So many random crops of each photograph of a data set, drawn at random (a `TrainingSource`)."""

    def __init__(
        self,
        dataset: PhotoSet,
        model: SAN,
        config: AugmentConfig,
        variants: int,
        number: int,
        cut_outs: CutOuts | None = None,
    ) -> None:
        """`number`: index of this data set among the training data sets; every other crop gets a cut-out."""
        self.dataset = dataset
        self.model = model
        self.config = config
        self.variants = variants
        self.number = number
        self.cut_outs = cut_outs
        self._kept: dict[tuple[int, int], Crop] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def load(self, index: int, generator: np.random.Generator) -> Crop:
        key = index, int(generator.integers(self.variants))
        if key not in self._kept:
            self._kept[key] = self._make(*key)
        return self._kept[key]

    def _make(self, index: int, variant: int) -> Crop:
        generator = np.random.default_rng([11, self.number, index, variant])
        image, labels = augment(*self.dataset[index], self.config, generator)
        if self.cut_outs and variant % 2:
            words = self.dataset.vocabulary.names
            image, labels = self.cut_outs.paste(image, labels, words, generator)
        middle = LABEL_STRIDE // 2
        coarse = torch.from_numpy(labels[middle::LABEL_STRIDE, middle::LABEL_STRIDE].astype(np.int64))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return Crop(pixels, coarse, _narrow(shallow_features(self.model, pixels[None], self.model.config.image)))

    def collate(self, samples: list[Crop]) -> CropBatch:
        images, labels = (torch.stack([getattr(sample, part) for sample in samples]) for part in ("image", "labels"))
        return CropBatch(images, labels, _joined([sample.features for sample in samples]), self.number)


@torch.no_grad()
def shallow_features(model: SAN, images: Tensor, config: ImageConfig) -> ShallowFeatures:
    """Return the tower's features of `images` [B, 3, H, W] uint8."""
    return model.shallow_features(normalise(images, config))


def _narrow(features: ShallowFeatures) -> ShallowFeatures:
    maps = {
        layer: FeatureMap(feature_map.tokens.half(), feature_map.grid) for layer, feature_map in features.maps.items()
    }
    return ShallowFeatures(maps, features.tokens.half(), features.grid, features.last_layer)


def _joined(parts: Sequence[ShallowFeatures]) -> ShallowFeatures:
    """Return a batch in single precision."""
    first = parts[0]
    maps = {
        layer: FeatureMap(torch.cat([part.maps[layer].tokens for part in parts]).float(), first.maps[layer].grid)
        for layer in first.maps
    }
    return ShallowFeatures(maps, torch.cat([part.tokens for part in parts]).float(), first.grid, first.last_layer)
