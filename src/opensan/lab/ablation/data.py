"""Data sets that the variants are trained and tested on: drawn scenes, or photographs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opensan.data.dataset import SegmentationDataset
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.errors import UserError
from opensan.lab.san_training import SceneDataset
from opensan.lab.scenes import BASE_NAMES, NOVEL_NAMES, SEGMENTATION_NAMES, Scene, Split, make_scene
from opensan.vocabulary import Templates, Vocabulary

OUTLINE = 0.25
"""Brightness of the lines around regions, in the style that is never trained."""
FLATTENED = 0.75
"""Share of a region's mean colour in each of its pixels, in that style."""


def in_another_style(scene: Scene) -> np.ndarray:
    """Redraw a scene as a cartoon, [H, W, 3] uint8: flat colours, dark outlines, paper grain; regions stay the same."""
    regions = scene.index_map.ravel()
    count = np.maximum(np.bincount(regions, minlength=len(scene.regions)), 1)
    pixels = scene.image.reshape(-1, 3).astype(np.float32)
    means = np.stack([np.bincount(regions, pixels[:, c], len(scene.regions)) / count for c in range(3)], axis=1)
    flat = (FLATTENED * means[regions] + (1 - FLATTENED) * pixels).reshape(scene.image.shape)
    line = np.zeros(scene.index_map.shape, dtype=bool)
    down, across = (np.diff(scene.index_map.astype(int), axis=axis) != 0 for axis in (0, 1))
    line[1:] |= down
    line[:-1] |= down
    line[:, 1:] |= across
    line[:, :-1] |= across
    flat[line] *= OUTLINE
    grain = np.random.default_rng(int(count.sum() + count[0])).normal(0, 6, (*line.shape, 1))
    return np.clip(flat + grain, 0, 255).astype(np.uint8)


class CartoonScenes(SceneDataset):
    """Lab scenes in the style that is never trained."""

    def _make(
        self, seed: int, index: int, size: tuple[int, int], split: Split
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        _, labels, numbers = super()._make(seed, index, size, split)
        return in_another_style(make_scene(seed, index, size, split=split)), labels, numbers


class Tested(NamedTuple):
    """A test set, and the words whose mean IoU is a figure."""

    dataset: SegmentationDataset
    figures: dict[str, Collection[str]]
    """Name of a figure -> its words."""


@dataclass(frozen=True)
class Data:
    """The training set, the test sets, and the words that had masks in training."""

    train: SegmentationDataset
    tests: Sequence[Tested]
    trained_words: Sequence[str]


class Templated:
    """A data set with other prompt templates."""

    def __init__(self, dataset: SegmentationDataset, templates: Templates) -> None:
        self._dataset = dataset
        self.vocabulary = Vocabulary.parse(list(dataset.vocabulary.names), templates=templates)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._dataset[index]

    def name(self, index: int) -> str:
        """Return the name of an image, for messages."""
        return self._dataset.name(index)


def scenes(count: int, tests: int, size: tuple[int, int]) -> Data:
    """Draw scenes of `size` (H, W): `count` with base words to train on, and `tests` to test in each style."""
    figures = {"base": frozenset(BASE_NAMES), "novel": frozenset(NOVEL_NAMES)}
    everything = frozenset(SEGMENTATION_NAMES)
    return Data(
        SceneDataset(7, count, size, "masks", BASE_NAMES),
        [
            Tested(SceneDataset(1_000_003, tests, size, "test", SEGMENTATION_NAMES), dict(figures)),
            Tested(CartoonScenes(1_000_003, tests, size, "test", SEGMENTATION_NAMES), {"cross-style": everything}),
        ],
        BASE_NAMES,
    )


def photographs(root: Path, tests: int) -> Data:
    """Open CamVid, to train and test on, and LabelMeFacade, to test on; words of the second alone are novel.

    Both are folders in `root`.
    Raises UserError, one line, if one of them is not there.
    """
    folders = [root / name for name in ("camvid", "labelmefacade")]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; --data photographs needs it in --root (docs/claims.md)")
    train, own, other = (
        SegmentationFolder(folder, split)
        for folder, split in ((folders[0], "train"), (folders[0], "test"), (folders[1], "test"))
    )
    known = set(train.vocabulary.names)
    novel = [name for name in other.vocabulary.names if name not in known]
    return Data(
        train,
        [
            Tested(First(own, tests), {"base": known}),
            Tested(First(other, tests), {"novel": novel, "cross-style": set(other.vocabulary.names)}),
        ],
        train.vocabulary.names,
    )


class First(Templated):
    """A part of a data set: so many images, spread evenly."""

    def __init__(self, dataset: SegmentationDataset, count: int) -> None:
        super().__init__(dataset, "vild")
        self._count = min(count, len(dataset))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._dataset[index * len(self._dataset) // self._count]
