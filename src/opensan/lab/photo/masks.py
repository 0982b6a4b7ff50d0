"""The SAN of `photo`: a side adapter beside the frozen image tower learns what a region is.

Its class loss reads the words' points of the shared space (`opensan.lab.photo.words`), so it needs no text tower.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensan.config import EfficientNetLiteConfig, ImageConfig, ModelConfig, SideAdapterConfig, TextConfig
from opensan.data.augment import AugmentConfig
from opensan.lab.photo.sets import NOVEL, PhotoSet
from opensan.lab.photo.words import DIMENSION, WordPoints
from opensan.model import SAN, build_san
from opensan.model.backbones.efficientnet_lite import EfficientNetLiteModel
from opensan.structures import TextClassifier
from opensan.train.config import LoopConfig, PointsConfig, SanTrainingConfig
from opensan.train.loop import RunResult
from opensan.train.san import train_san
from opensan.vocabulary import Vocabulary

TEXT = TextConfig(width=128, layers=2, heads=4)

MODEL = ModelConfig(
    name="photo",
    clip=EfficientNetLiteConfig(
        kind="efficientnet_lite",
        variant="lite2",
        embed_dim=DIMENSION,
        text=TEXT,
    ),
    side_adapter=SideAdapterConfig(
        width=160,
        depth=4,
        heads=4,
        patch_size=16,
        image_size=224,
        queries=32,
        fusion={0: 1, 1: 2, 2: 3},
        supervised_blocks=(3, 4),
        mask_channels=128,
        mlp_channels=192,
    ),
    recognition_layer=3,
    clip_scale=1.0,
    image=ImageConfig(short_side=384, long_side=1_024, mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0)),
)

TRAINING = SanTrainingConfig(
    loop=LoopConfig(
        steps=1_100,
        batch_size=8,
        learning_rate=5e-4,
        warmup=60,
        clip_norm=0.1,
        precision="bfloat16",
        save_every=50,
        log_every=20,
        validate_every=550,
    ),
    augment=AugmentConfig(short_sides=(224, 256, 288, 320, 352), crop=(224, 224)),
    points=PointsConfig(count=768),
    spare_unlabelled=True,
)

SHARES = {
    "coco_small": 0.30,
    "coco_mini": 0.10,
    "coco_stuff": 0.16,
    "pets": 0.10,
    "people": 0.08,
    "facades": 0.12,
    "campus": 0.05,
    "library": 0.04,
    "corridor": 0.03,
    "clothing": 0.02,
}
"""Shares of the samples."""


BIAS_SCALE = 0.5
"""Factor from mask logits to the bias, at the start."""
NO_OBJECT = 0.3
"""At the start, the share of the coordinate that words do not have in the no-object row."""


class Kept:
    """A data set whose photographs stay in memory once read (a `SegmentationDataset`)."""

    def __init__(self, dataset: PhotoSet) -> None:
        self.dataset = dataset
        self.vocabulary = dataset.vocabulary
        self._read = lru_cache(maxsize=None)(dataset.__getitem__)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._read(index)

    def name(self, index: int) -> str:
        return self.dataset.name(index)


def classifier(points: WordPoints, vocabulary: Vocabulary) -> TextClassifier:
    """Return the words of `vocabulary` as their points, without a text tower."""
    rows = points.rows(vocabulary.names)
    return TextClassifier(rows, torch.arange(len(rows)), len(rows))


def build(tower: Mapping[str, Tensor], points: WordPoints, config: ModelConfig = MODEL) -> SAN:
    """Build a SAN around the pretrained tower (its state) and the head; the side adapter starts from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_san(config)
    clip = model.clip
    assert isinstance(clip, EfficientNetLiteModel)
    clip.visual.load_state_dict(dict(tower), strict=True)
    with torch.no_grad():
        clip.projection.weight.copy_(points.weight)
        clip.projection.bias.copy_(points.bias)
        clip.logit_scale.copy_(points.scale.log())
        model.no_object_embedding[:, -1] = NO_OBJECT * model.no_object_embedding.norm()
        model.side_adapter.head.bias_scale.weight.fill_(BIAS_SCALE)
        model.side_adapter.head.bias_scale.bias.zero_()
    # One path for masks and biases while training, two equal ones in the file: a few hundred photographs teach where a
    # region is, and where to look for its name is then the same place. On two paths, after 100 steps, biases were flat.
    model.side_adapter.head.attention_mlp = model.side_adapter.head.pixel_mlp
    return model


def train(
    model: SAN,
    points: WordPoints,
    root: Path,
    out: Path,
    *,
    config: SanTrainingConfig = TRAINING,
    shares: Mapping[str, float] = SHARES,
    validate: Callable[[int], Mapping[str, float]] | None = None,
) -> RunResult:
    """Train on the masks of all sets but those of NOVEL words, in place. Resumes."""
    sets = [(Kept(PhotoSet(root, name, "train", masks_of_novel=False)), share) for name, share in shares.items()]
    assert not {name for one, _ in sets for name in one.vocabulary.names} & set(NOVEL)
    texts = [classifier(points, one.vocabulary) for one, _ in sets]
    return train_san(model, sets, config, out, validate=validate, texts=texts)
