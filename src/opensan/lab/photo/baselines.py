"""Two simpler ways to label photographs with the same frozen features, which `photo` must beat.

Letters: B batch, K words, C channels, h w a grid.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from opensan.evaluation.evaluation import Predictor
from opensan.lab.photo.crops import CropBatch, Crops
from opensan.lab.photo.features import feature_map
from opensan.lab.photo.masks import AUGMENT
from opensan.lab.photo.sets import PhotoSet
from opensan.lab.photo.words import Lexicon
from opensan.model import SAN
from opensan.model.backbones.base import ShallowFeatures
from opensan.model.backbones.efficientnet_lite import EfficientNetLite
from opensan.train.config import LoopConfig
from opensan.train.loop import Trainer
from opensan.train.optimizer import ParameterGroup
from opensan.train.san import normalise
from opensan.train.stream import DatasetMixture
from opensan.vocabulary import UNLABELLED, Vocabulary

SHORT_SIDE = 480
THRESHOLD = 0.3
"""The least probability of a word's classes at a position; with less, no word has it."""
HEAD_LOOP = LoopConfig(
    steps=1_000, batch_size=8, learning_rate=2e-3, warmup=20, clip_norm=1.0, save_every=200, log_every=100
)
VARIANTS = 2
"""Crops of each photograph."""


def activation_map(
    tower: EfficientNetLite, weight: Tensor, bias: Tensor, lexicon: Lexicon
) -> Callable[[Vocabulary, int], Predictor]:
    """Return a function for `measure` that asks the ImageNet classifier at every position, without any training.

    A word's score is the summed probability of the classes below it.
    """
    numbers = lexicon.numbers()

    def predictor(vocabulary: Vocabulary, words: int) -> Predictor:
        members = torch.zeros(len(vocabulary.names), len(weight))
        for row, name in enumerate(vocabulary.names):
            members[row, list(lexicon.classes[numbers[name]])] = 1

        def predict(image: np.ndarray) -> np.ndarray:
            features = feature_map(tower, image, SHORT_SIDE)
            logits = torch.einsum("kc,chw->khw", weight, features) + bias[:, None, None]
            scores = torch.tensordot(members, logits.softmax(0), dims=1)
            return _label(scores, image.shape[:2], words, THRESHOLD)

        return predict

    return predictor


def _label(scores: Tensor, size: tuple[int, int], words: int, threshold: float) -> np.ndarray:
    """Return the best word's number at each pixel, -1 for those from `words` on or below `threshold`."""
    best, labels = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0].max(0)
    return torch.where((best >= threshold) & (labels < words), labels, UNLABELLED).numpy()


class PixelHead(nn.Module):
    """Convolutions on the frozen features of strides 8, 16 and 32 that name each pixel: a task of the trainer."""

    def __init__(self, channels: int, words: Sequence[str], sets: Sequence[Sequence[str]]) -> None:
        """`words`: all that it can say; `sets`: the words of each data set, among which its losses choose."""
        super().__init__()
        self.words = tuple(words)
        index_of = {word: index for index, word in enumerate(words)}
        self.columns = [torch.tensor([index_of[word] for word in names]) for names in sets]
        self.layers = nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, 128, 1),
            nn.ReLU(),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, len(words), 1),
        )

    def prepare(self, batches: Sequence[CropBatch]) -> None:
        """Share nothing between the micro-batches of a step."""

    def logits(self, features: ShallowFeatures) -> Tensor:
        """Return [B, K, h, w] at stride 8."""
        grid = features.maps[1].grid
        maps = [
            feature_map.tokens.transpose(1, 2).unflatten(2, feature_map.grid) for feature_map in features.maps.values()
        ]
        resized = [F.interpolate(feature_map, size=grid, mode="bilinear", align_corners=False) for feature_map in maps]
        return self.layers(torch.cat(resized, dim=1))

    def forward(self, batch: CropBatch, prepared: None) -> dict[str, Tensor]:
        named = self.logits(batch.features)[:, self.columns[batch.dataset]]
        return {"loss_pixels": F.cross_entropy(named, batch.labels.clamp(min=UNLABELLED), ignore_index=UNLABELLED)}


def pixel_head(model: SAN, root: Path, shares: Mapping[str, tuple[float, int]], out: Path) -> PixelHead:
    """Train a pixel head on the masks that `photo` is trained on, without cut-outs."""
    sets = {name: PhotoSet(root, name, "train", masks_of_novel=False) for name in shares}
    names = [dataset.vocabulary.names for dataset in sets.values()]
    words = list(dict.fromkeys(word for own in names for word in own))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = PixelHead(sum(model.clip.layer_widths.values()), words, names)
    sources = tuple(Crops(dataset, model, AUGMENT, VARIANTS, number) for number, dataset in enumerate(sets.values()))
    parameters, own = zip(*head.named_parameters(), strict=True)
    groups = [ParameterGroup(parameters, own, HEAD_LOOP.learning_rate, 0.01)]
    mixture = DatasetMixture(sources, tuple(share for share, _ in shares.values()))
    Trainer(head, mixture, groups, HEAD_LOOP, out).run()
    return head.eval()


def pixel_predictor(head: PixelHead, model: SAN) -> Callable[[Vocabulary, int], Predictor]:
    """Return a function for `measure`; words that no mask had are never said."""

    def predictor(vocabulary: Vocabulary, words: int) -> Predictor:
        known = [name in head.words for name in vocabulary.names]
        columns = torch.tensor([head.words.index(name) if name in head.words else 0 for name in vocabulary.names])

        @torch.no_grad()
        def predict(image: np.ndarray) -> np.ndarray:
            scale = model.config.image.short_side / min(image.shape[:2])
            size = tuple(max(32, round(side * scale / 32) * 32) for side in image.shape[1::-1])
            resized = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
            pixels = normalise(torch.from_numpy(resized).permute(2, 0, 1)[None], model.config.image)
            scores = head.logits(model.shallow_features(pixels))[0, columns]
            scores[~torch.tensor(known)] = -torch.inf
            return _label(scores, image.shape[:2], words, -torch.inf)

        return predict

    return predictor
