"""Data sets of scenes with depth, plain baselines, and the usual measures of depth (Eigen et al., 2014).

Letters: K words, H W image.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from opensan.evaluation.metrics import Counts
from opensan.lab.depth.scenes import DepthScene, make_depth_scene
from opensan.lab.depth.words import FAR, LEFT_OUT, NAMES, NEAR, metres, word_map
from opensan.lab.grounds import GROUNDS
from opensan.vocabulary import Vocabulary

SHOWN_GROUNDS = tuple(ground for ground in GROUNDS if ground not in (NEAR, FAR))

BASELINES = ("mean depth", "mean of the row", "true word")

RATIO = 1.25
"""Largest ratio of the two depths at a pixel that counts as right."""


class DepthScenes:
    """Scenes with depth. Each is drawn once and kept."""

    def __init__(self, seed: int, count: int, size: tuple[int, int]) -> None:
        """`size` is (H, W) in pixels."""
        self.count = count
        self.size = size
        self.scene = cache(lambda index: self._draw(seed, index))

    def _draw(self, seed: int, index: int) -> DepthScene:
        return make_depth_scene(seed, index, self.size, SHOWN_GROUNDS)


class LabelledDepthScenes:
    """Scenes as a segmentation data set: labels are the nearest words; pixels of words not listed are unlabelled."""

    def __init__(self, scenes: DepthScenes, vocabulary: Vocabulary) -> None:
        self.scenes = scenes
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return self.scenes.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        scene = self.scenes.scene(index)
        return scene.image, word_map(scene.depth, self.vocabulary.names)

    def name(self, index: int) -> str:
        return f"depth scene {index}"


class DepthMeasures:
    """Sums over images, from which the measures follow; every pixel counts alike."""

    def __init__(self) -> None:
        self._sums = {name: np.zeros(4) for name in ("all", "objects", "left out")}
        self._counts = Counts(len(NAMES))

    def add(self, scene: DepthScene, depth: np.ndarray) -> None:
        """Compare a predicted depth, [H, W] metres, with the scene's."""
        truth = scene.depth
        words = word_map(truth)
        left_out = np.isin(words, [NAMES.index(name) for name in LEFT_OUT])
        error = np.abs(depth - truth)
        right = np.maximum(depth / truth, truth / depth) < RATIO
        for name, where in (("all", np.ones_like(left_out)), ("objects", scene.on_object), ("left out", left_out)):
            values = (error[where] / truth[where], error[where] ** 2, right[where])
            self._sums[name] += [where.sum(), *(value.sum(dtype=np.float64) for value in values)]
        self._counts.update(words, word_map(depth))

    def figures(self) -> dict[str, float]:
        """Return the measures by name; nan where there is no pixel.

        "error": mean of the absolute error over the true depth; of pixels that show objects alone, "objects"; of those
        whose true word is one of LEFT_OUT, "left out". "rmse": root of the mean squared error, in metres. "right":
        share of pixels whose ratio is below 1.25. "miou": mean IoU of the words nearest to the depth; "miou left out":
        of LEFT_OUT alone.
        """
        shares = {name: sums[1:] / sums[0] if sums[0] else np.full(3, np.nan) for name, sums in self._sums.items()}
        classes = self._counts.metrics(NAMES).classes
        ious = {one.name: one.iou for one in classes if one.pixels}
        absent = [ious[name] for name in LEFT_OUT if name in ious]
        return {
            "error": float(shares["all"][0]),
            "rmse": float(np.sqrt(shares["all"][1])),
            "right": float(shares["all"][2]),
            "miou": float(np.mean(list(ious.values()))),
            "objects": float(shares["objects"][0]),
            "left out": float(shares["left out"][0]),
            "miou left out": float(np.mean(absent)) if absent else float("nan"),
        }


def measure_baselines(train: DepthScenes, test: DepthScenes) -> dict[str, dict[str, float]]:
    """Return the measures of what needs no image: baseline -> measure -> value.

    The mean depth of the training pixels, that of each row of training pixels, and the distance of each test pixel's
    true word, which no choice of a single word can better.
    """
    rows = np.mean([train.scene(index).depth.mean(axis=1) for index in range(train.count)], axis=0)
    measures = {name: DepthMeasures() for name in BASELINES}
    for index in range(test.count):
        scene = test.scene(index)
        size = scene.depth.shape
        predictions: Sequence[np.ndarray] = (
            np.full(size, rows.mean()),
            np.broadcast_to(rows[:, None], size),
            metres(NAMES)[word_map(scene.depth)],
        )
        for measure, depth in zip(measures.values(), predictions, strict=True):
            measure.add(scene, depth)
    return {name: measure.figures() for name, measure in measures.items()}
