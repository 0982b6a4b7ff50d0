"""Fit names to what the trained side adapter proposes: the last step of the recipe.

Words were fitted to whole regions, exactly cut. Proposals are not exact, and most of them lie on ground that the sets
of things do not label, so that words of things took it: with the true names of things, and of the ground, the same
masks labelled half as much again rightly. So the projection of what is seen, and "no object", move until the pixels are
right that the proposals vote for, where what a set does not label must be called by some word of the ground. Words stay
where the text tower puts them; the projection stays near where it was, as NOVEL words need. How far it may go was
chosen by cross-validation over the training photographs of COCO.

Letters: B photographs, Q queries, K words, D embedding, P points.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.lab.photo.proposals import Proposed, collect_proposals, present
from opensan.lab.photo.sets import BACKGROUND, NOVEL, SETS, PhotoSet
from opensan.model import SAN
from opensan.model.backbones.efficientnet_lite import EfficientNetLiteModel
from opensan.text.encoder import TextEncoder
from opensan.train.config import LoopConfig
from opensan.train.loop import Trainer
from opensan.train.optimizer import ParameterGroup
from opensan.vocabulary import UNLABELLED, Vocabulary

LOOP = LoopConfig(steps=150, batch_size=16, learning_rate=5e-4, warmup=20, clip_norm=None, save_every=100, log_every=20)
FASTER = 4.0
"""Factor of the learning rate of "no object"."""
NOISE = 0.1
"""Relative deviation of the features, each time they are seen."""
GROUND = 0.5
"""Weight of pixels that a set does not label, beside those that it does."""
MOVED = 10.0
"""Weight of the projection's relative squared change."""

SHARES = {
    "coco_small": (0.36, 999, True),
    "coco_mini": (0.12, 999, True),
    "coco_stuff": (0.16, 999, True),
    "pets": (0.10, 90, False),
    "people": (0.06, 60, False),
    "facades": (0.10, 80, False),
    "campus": (0.03, 25, False),
    "library": (0.03, 35, False),
    "corridor": (0.04, 35, False),
}
"""Set -> its share of what is drawn, how many photographs are read, and whether they are read mirrored too."""
OF_THINGS = ("coco_small", "coco_mini")
"""Sets that label all things of COCO and no ground."""


@dataclass(frozen=True)
class NamedSet:
    """A data set's proposals, and the words that its pixels are compared with."""

    words: tuple[str, ...]
    """The labels' numbers are their places; words that no pixel is labelled with follow."""
    rest: Tensor
    """[K] bool: what an unlabelled pixel may be called; none: it is left out."""
    share: float
    photographs: list[Proposed]

    def only(self, keep: Sequence[int]) -> "NamedSet":
        """Return the set with these photographs alone."""
        return replace(self, photographs=[self.photographs[index] for index in keep])


def named_sets(model: SAN, root: Path, out: Path) -> list[NamedSet]:
    """Compute what is fitted, or read it from `out` where it was computed before."""
    sets = []
    for name, (share, most, mirrored) in SHARES.items():
        dataset = PhotoSet(root, name, "train", masks_of_novel=False)
        photographs = collect_proposals(model, dataset, most, mirrored, out / f"{name}.safetensors")
        print(f"proposals of {name}", flush=True)
        own = dataset.vocabulary.names
        unseen = [word for word in BACKGROUND if word not in own] if name in OF_THINGS else []
        words = (*own, *unseen)
        rest = torch.tensor([word in unseen or word in SETS[name].also for word in words])
        sets.append(NamedSet(words, rest, share, photographs))
    return sets


@dataclass(frozen=True)
class NamedBatch:
    """Photographs, and the number of each one's set."""

    photographs: tuple[Proposed, ...]
    sets: tuple[int, ...]

    def to(self, device: torch.device) -> "NamedBatch":
        """Return the batch itself: it is trained on the processor that made it."""
        assert device.type == "cpu"
        return self


class NamedPhotographs:
    """Photographs of all sets, drawn by the sets' shares, those with rare words more often (a `TrainingSource`)."""

    def __init__(self, sets: Sequence[NamedSet]) -> None:
        self.of = [(number, photograph) for number, own in enumerate(sets) for photograph in own.photographs]
        chances = [own.share * _chances(own) for own in sets]
        self._limits = np.cumsum(np.concatenate(chances) / sum(own.share for own in sets))

    def __len__(self) -> int:
        return len(self.of)

    def name(self, index: int) -> str:
        return f"photograph {index}"

    def load(self, index: int, generator: np.random.Generator) -> tuple[int, Proposed]:
        index = min(int(np.searchsorted(self._limits, generator.random())), len(self.of) - 1)
        number, photograph = self.of[index]
        noise = torch.from_numpy(generator.standard_normal(photograph.means.shape, dtype=np.float32))
        return number, Proposed(
            photograph.means.float() * (1 + NOISE * noise), photograph.masks.float(), photograph.labels
        )

    def collate(self, samples: list[tuple[int, Proposed]]) -> NamedBatch:
        sets, photographs = zip(*samples, strict=True)
        return NamedBatch(photographs, sets)


def _chances(own: NamedSet) -> np.ndarray:
    """Weigh photographs by the root of how rare their rarest word is; the sum is 1."""
    shown = present([photograph.labels for photograph in own.photographs], len(own.words))
    rarest = torch.where(shown, shown.sum(0), len(shown)).amin(1).double()
    return (rarest**-0.5 / (rarest**-0.5).sum()).numpy()


class Names(nn.Module):
    """The projection and "no object": what this step changes. A task of the trainer."""

    def __init__(self, model: SAN, sets: Sequence[NamedSet]) -> None:
        """Start from what the model is; it stays as it is."""
        super().__init__()
        assert isinstance(model.clip, EfficientNetLiteModel)
        assert not {word for own in sets for word in own.words} & set(NOVEL)
        projection = model.clip.projection
        self.first = [projection.weight.detach().float().clone(), projection.bias.detach().float().clone()]
        self.weight, self.bias = (nn.Parameter(tensor.clone()) for tensor in self.first)
        self.no_object = nn.Parameter(model.no_object_row().detach().float().clone())
        self.scale = float(model.clip.logit_scale.exp())
        self.rows = [word_rows(model, own.words) for own in sets]
        self.rests = [own.rest for own in sets]

    def probabilities(self, means: Tensor, rows: Tensor) -> Tensor:
        """Return [..., Q, K] from mean features [..., Q, 1280] and words' rows [K, D], without "no object"."""
        seen = F.normalize(F.linear(means, self.weight, self.bias), dim=-1)
        return self._probabilities(seen, rows)

    def _probabilities(self, seen: Tensor, rows: Tensor) -> Tensor:
        logits = self.scale * seen @ torch.cat([rows, F.normalize(self.no_object, dim=-1)]).T
        return logits.softmax(-1)[..., :-1]

    def prepare(self, batches: Sequence[NamedBatch]) -> None:
        """Share nothing between the micro-batches of a step."""

    def forward(self, batch: NamedBatch, prepared: None) -> dict[str, Tensor]:
        means = torch.stack([photograph.means for photograph in batch.photographs])
        seen = F.normalize(F.linear(means, self.weight, self.bias), dim=-1)
        losses = [
            pixel_loss(self._probabilities(own, self.rows[number]), photograph, self.rests[number])
            for own, photograph, number in zip(seen, batch.photographs, batch.sets, strict=True)
        ]
        now = (self.weight, self.bias)
        moved = [(new - old).square().sum() / old.square().sum() for new, old in zip(now, self.first, strict=True)]
        return {"loss_pixels": torch.stack(losses).mean(), "loss_moved": MOVED * torch.stack(moved).sum()}


def word_rows(model: SAN, words: Sequence[str]) -> Tensor:
    """Return what the text tower makes of the words, [K, D]."""
    return TextEncoder(model, disk_cache=False).classifier(Vocabulary.parse(list(words))).rows.detach()


def pixel_loss(probabilities: Tensor, photograph: Proposed, rest: Tensor) -> Tensor:
    """Compare what the proposals vote for with the labels of a photograph: mean negative logarithm, a scalar.

    Args:
        probabilities: [Q, K] of the words.
        photograph: its proposals, masks and labels.
        rest: [K] bool: words for unlabelled pixels, of which any will do.

    Among labelled pixels, each word's count by the root of how many it has, so that small things count for more.
    """
    votes = probabilities.T @ photograph.masks
    share = votes / votes.sum(0).clamp(min=1e-12)
    labelled, other = photograph.labels > UNLABELLED, (photograph.labels == UNLABELLED) & rest.any()
    points = (labelled | other).sum().clamp(min=1)
    right = share.T[labelled].gather(1, photograph.labels[labelled, None])[:, 0]
    weight = photograph.labels[labelled].bincount(minlength=1)[photograph.labels[labelled]].float().rsqrt()
    weight = weight / weight.sum().clamp(min=1e-12) * len(right)
    unnamed = share[rest][:, other].sum(0)
    losses = (weight * (right + 1e-6).log()).sum() + GROUND * (unnamed + 1e-6).log().sum()
    return -losses / points


def fit_names(names: Names, sets: Sequence[NamedSet], out: Path, loop: LoopConfig = LOOP) -> bool:
    """Fit `names` in place; True when it has come to its end. Resumes."""
    groups = [
        ParameterGroup(("weight", "bias"), (names.weight, names.bias), loop.learning_rate, 0.0),
        ParameterGroup(("no_object",), (names.no_object,), FASTER * loop.learning_rate, 0.0),
    ]
    return Trainer(names, NamedPhotographs(sets), groups, loop, out).run().finished


def set_names(model: SAN, names: Names) -> None:
    """Write what was fitted into the model, in place."""
    assert isinstance(model.clip, EfficientNetLiteModel)
    with torch.no_grad():
        model.clip.projection.weight.copy_(names.weight)
        model.clip.projection.bias.copy_(names.bias)
        length = model.no_object_embedding.norm()
        model.no_object_embedding.copy_(length * F.normalize(names.no_object, dim=-1))
