"""The SAN of `photo`: a side adapter beside the frozen image tower learns what a region is.

Its class loss reads the words' points of the shared space (`opensan.lab.photo.words`), so it needs no text tower.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensan.config import EfficientNetLiteConfig, ImageConfig, ModelConfig, SideAdapterConfig, TextConfig
from opensan.data.augment import AugmentConfig
from opensan.lab.photo.anchors import AnchoredTask, alike_is_together, anchored_start
from opensan.lab.photo.crops import Crops
from opensan.lab.photo.paste import CutOuts
from opensan.lab.photo.sets import NOVEL, SETS, PhotoSet
from opensan.lab.photo.words import DIMENSION, WordPoints
from opensan.model import SAN, build_san
from opensan.model.backbones.efficientnet_lite import EfficientNetLiteModel
from opensan.model.side_adapter import DecoupledHead
from opensan.structures import TextClassifier
from opensan.train.config import LoopConfig
from opensan.train.loop import RunResult, Trainer
from opensan.train.matcher import LossWeights
from opensan.train.optimizer import san_parameter_groups
from opensan.train.stream import DatasetMixture
from opensan.vocabulary import Vocabulary

TEXT = TextConfig(width=128, layers=2, heads=4)

GRID = 8
"""The queries' cells: so many a side."""

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
        queries=GRID * GRID,
        fusion={0: 3, 1: 2, 2: 1},
        supervised_blocks=(3, 4),
        mask_channels=128,
        mlp_channels=192,
    ),
    recognition_layer=3,
    clip_scale=1.0,
    image=ImageConfig(short_side=384, long_side=1_024, mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0)),
    rest_share=3.0,
)

LOOP = LoopConfig(
    steps=4_000,
    batch_size=8,
    learning_rate=1e-3,
    weight_decay=0.05,
    warmup=50,
    clip_norm=1.0,
    save_every=100,
    log_every=20,
    validate_every=1_000,
)
AUGMENT = AugmentConfig(short_sides=(224, 256, 288, 320, 352), crop=(224, 224))
WEIGHTS = LossWeights(classification=1.0, mask=5.0, dice=2.0)

SHARES = {
    "coco_small": (0.36, 24),
    "coco_mini": (0.12, 24),
    "coco_stuff": (0.14, 40),
    "pets": (0.10, 3),
    "people": (0.06, 1),
    "facades": (0.08, 2),
    "campus": (0.04, 2),
    "library": (0.04, 2),
    "corridor": (0.04, 2),
    "clothing": (0.02, 1),
}
"""Shares of the samples, and how many crops of each photograph: their features are kept in memory, 0.4 MB a crop."""


CUT_FROM = ("coco_small", "coco_mini", "pets", "people")
"""Sets whose masked things are pasted onto photographs of the sets that call them by a word, or certainly lack them."""
NOT_ONTO = ("coco_stuff", "clothing")

BIAS_SCALE = 0.5
"""Factor from mask logits to the bias, at the start."""
NO_OBJECT = 0.3
"""At the start, the share of the coordinate that words do not have in the no-object row."""


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
    head = model.side_adapter.head
    assert isinstance(clip, EfficientNetLiteModel) and isinstance(head, DecoupledHead)
    clip.visual.load_state_dict(dict(tower), strict=True)
    with torch.no_grad():
        clip.projection.weight.copy_(points.weight)
        clip.projection.bias.copy_(points.bias)
        clip.logit_scale.copy_(points.scale.log())
        model.no_object_embedding[:, -1] = NO_OBJECT * model.no_object_embedding.norm()
        head.bias_scale.weight.fill_(BIAS_SCALE)
        head.bias_scale.bias.zero_()
    anchored_start(model.side_adapter, GRID)
    # One path for masks and biases while training, two equal ones in the file: a few hundred photographs teach where a
    # region is, and where to look for its name is then the same place. On two paths, after 100 steps, biases were flat.
    head.attention_mlp = head.pixel_mlp
    return model


def others(name: str, vocabulary: Vocabulary) -> torch.Tensor:
    """Mark [K + 1] what unlabelled pixels of a set may be called: words that it does not label, and "no object"."""
    return torch.tensor([word in SETS[name].also for word in vocabulary.names] + [True])


def train(
    model: SAN,
    points: WordPoints,
    root: Path,
    out: Path,
    *,
    loop: LoopConfig = LOOP,
    shares: Mapping[str, tuple[float, int]] = SHARES,
    validate: Callable[[int], Mapping[str, float]] | None = None,
) -> RunResult:
    """Train on the masks of all sets but those of NOVEL words, in place. Resumes."""
    sets = {name: PhotoSet(root, name, "train", masks_of_novel=False) for name in shares}
    assert not {word for dataset in sets.values() for word in dataset.vocabulary.names} & set(NOVEL)
    cut_outs = CutOuts([PhotoSet(root, name, "train", masks_of_novel=False) for name in CUT_FROM])
    sources = tuple(
        Crops(dataset, model, AUGMENT, shares[name][1], number, None if name in NOT_ONTO else cut_outs)
        for number, (name, dataset) in enumerate(sets.items())
    )
    task = AnchoredTask(
        model,
        [classifier(points, dataset.vocabulary) for dataset in sets.values()],
        [others(name, dataset.vocabulary) for name, dataset in sets.items()],
        WEIGHTS,
    )
    generator = np.random.default_rng(0)
    first = sources[0]
    alike_is_together(model, first.collate([first.load(index, generator) for index in range(0, len(first), 4)]))
    groups = san_parameter_groups(model, learning_rate=loop.learning_rate, weight_decay=loop.weight_decay)
    mixture = DatasetMixture(sources, tuple(share for share, _ in shares.values()))
    result = Trainer(task, mixture, groups, loop, out, validate=validate, best_by="miou" if validate else "").run()
    model.eval()
    return result
