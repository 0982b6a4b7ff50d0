"""Paste people, pets and things, cut out by their masks, onto other photographs: their labels are complete there.

Letters: H W image, h w cut-out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from opensan.lab.photo.sets import PhotoSet

LEAST, MOST = 0.03, 0.6
"""Shares of a photograph that a thing to be cut out may cover."""
SIZES = (0.35, 0.95)
"""Long sides of what is pasted, as shares of the crop's."""


@dataclass(frozen=True)
class Thing:
    """Something to be cut out."""

    dataset: PhotoSet
    index: int
    label: int

    @property
    def word(self) -> str:
        """Return its name."""
        return self.dataset.vocabulary.names[self.label]


class CutOuts:
    """Things of several data sets by their words."""

    def __init__(self, datasets: Sequence[PhotoSet]) -> None:
        """Read all labels once."""
        self.things: dict[str, list[Thing]] = {}
        for dataset in datasets:
            for index in range(len(dataset)):
                labels = dataset[index][1]
                numbers, counts = np.unique(labels[labels >= 0], return_counts=True)
                for label, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                    if LEAST <= count / labels.size <= MOST:
                        thing = Thing(dataset, index, label)
                        self.things.setdefault(thing.word, []).append(thing)
        self._cut = lru_cache(maxsize=400)(_cut)

    def paste(
        self, image: np.ndarray, labels: np.ndarray, words: Sequence[str], generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return copies of an image [H, W, 3] and its labels [H, W] with a thing that one of `words` names on them."""
        known = [word for word in words if word in self.things]
        if not known:
            return image, labels
        things = self.things[known[int(generator.integers(len(known)))]]
        thing = things[int(generator.integers(len(things)))]
        picture, mask = self._cut(thing)
        scale = generator.uniform(*SIZES) * max(labels.shape) / max(mask.shape)
        sides = zip(mask.shape, labels.shape, strict=True)
        height, width = (max(1, min(round(side * scale), limit)) for side, limit in sides)
        picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        if generator.random() < 0.5:
            picture, mask = picture[:, ::-1], mask[:, ::-1]
        top = int(generator.integers(labels.shape[0] - height + 1))
        left = int(generator.integers(labels.shape[1] - width + 1))
        image, labels = image.copy(), labels.copy()
        where = np.s_[top : top + height, left : left + width]
        image[where][mask] = picture[mask]
        labels[where][mask] = words.index(thing.word)
        return image, labels


def _cut(thing: Thing) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest part of the photograph around a thing [h, w, 3], and its mask [h, w] bool."""
    image, labels = thing.dataset[thing.index]
    mask = labels == thing.label
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    where = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.ascontiguousarray(image[where]), np.ascontiguousarray(mask[where])
