"""Train and test SANs whose words are distances, one run after the other."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opensan.data.augment import AugmentConfig
from opensan.errors import UserError, did_you_mean
from opensan.files import atomic_path
from opensan.lab.ablation.run import Setup
from opensan.lab.depth.measures import DepthMeasures, DepthScenes, LabelledDepthScenes, measure_baselines
from opensan.lab.depth.table import BASELINE, DepthRow, scenes_picture, write_results
from opensan.lab.depth.words import LEFT_OUT, NAMES, SHUFFLED, distance_words, read_depth
from opensan.lab.runs import each_run
from opensan.segmenters.san import SanSegmenter
from opensan.train.config import SanTrainingConfig
from opensan.train.log import NoProgress
from opensan.train.san import train_san
from opensan.vocabulary import Vocabulary

TEST_SEED = 1_000_003
"""Seed of the test scenes, which training never draws."""
DRAWN = 3
"""Test scenes in the picture."""


@dataclass(frozen=True)
class DepthVariant:
    """A training on words of distance."""

    name: str
    positions: Sequence[int] | None = None
    """See `distance_words`."""
    left_out: Sequence[str] = ()
    """Words that training lacks; their pixels are unlabelled there."""

    def words(self, *, all_words: bool) -> Vocabulary:
        """Return the vocabulary of the test, or that of training."""
        return distance_words([name for name in NAMES if all_words or name not in self.left_out], self.positions)


VARIANTS = (
    DepthVariant("in order"),
    DepthVariant("in order, a third left out", left_out=LEFT_OUT),
    DepthVariant("shuffled", SHUFFLED),
    DepthVariant("shuffled, a third left out", SHUFFLED, LEFT_OUT),
)
"""All trainings, in the order in which they are run."""


def chosen(only: Sequence[str]) -> list[DepthVariant]:
    """Return the variants of these names, in the order of `VARIANTS`; all, if none is named.

    Raises UserError, one line, for an unknown name.
    """
    names = [variant.name for variant in VARIANTS]
    for name in only:
        if name not in names:
            hint = did_you_mean(name, names) or ": " + ", ".join(f'"{known}"' for known in names)
            raise UserError(f"--only: no training {name!r}{hint}")
    return [variant for variant in VARIANTS if not only or variant.name in only]


def measure_depth(
    variants: Sequence[DepthVariant],
    setup: Setup,
    seeds: int,
    out: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Run every variant with `seeds` seeds, and write the table to `out` after each run.

    A picture of what the first variant's first seed read is written after its run. A run that was stopped goes on where
    it was; other settings begin a new table, and say so. Returns the files.
    """
    size = (setup.budget.crop, setup.budget.crop)
    train, test = DepthScenes(7, setup.budget.train, size), DepthScenes(TEST_SEED, setup.budget.tests, size)
    runs = {f"{variant.name}, seed {seed}": (variant, seed) for variant in variants for seed in range(seeds)}

    def do(key: str, running: Path) -> dict[str, Any]:
        if key == BASELINE:
            return asdict(DepthRow(BASELINE, 0, measure_baselines(train, test)))
        variant, seed = runs[key]
        segmenter = _train(variant, train, setup, seed, running)
        if key == next(iter(runs)):
            scenes = [test.scene(index) for index in range(min(DRAWN, setup.budget.tests))]
            words = variant.words(all_words=True)
            picture = scenes_picture(scenes, [read_depth(segmenter, scene.image, words)[0] for scene in scenes])
            with atomic_path(out / "scenes.png") as path:
                picture.save(path, "PNG")
        return asdict(DepthRow(variant.name, seed, _test(variant, segmenter, test)))

    def write(rows: list[dict[str, Any]]) -> list[Path]:
        files = write_results([DepthRow(**row) for row in rows], [one.name for one in VARIANTS], out, setup.budget)
        return [*files, *(path for path in [out / "scenes.png"] if path.exists())]

    return each_run([BASELINE, *runs], {"task": "depth", **setup.work()}, out, do, write, say=say)


def _training(setup: Setup, seed: int) -> SanTrainingConfig:
    """Return the settings of one training: the ablations', but nothing is scaled or cut: depth depends on size."""
    side = setup.budget.crop
    augment = AugmentConfig(short_sides=(side,), crop=(side, side), colour_jitter=False)
    return setup.training(seed).model_copy(update={"augment": augment, "spare_unlabelled": True})


def _train(variant: DepthVariant, scenes: DepthScenes, setup: Setup, seed: int, running: Path) -> SanSegmenter:
    _, clip_config = setup.backbone()
    model = setup.new_model(setup.base_config(clip_config), seed)
    dataset = LabelledDepthScenes(scenes, variant.words(all_words=False))
    if not train_san(model, dataset, _training(setup, seed), running, progress=NoProgress()).finished:
        raise KeyboardInterrupt
    return SanSegmenter(model, text_cache=False)


def _test(variant: DepthVariant, segmenter: SanSegmenter, scenes: DepthScenes) -> dict[str, dict[str, float]]:
    """Return the measures of each reading, asked for all words and, where words were left out, without them too."""
    vocabularies = {"": variant.words(all_words=True)}
    if variant.left_out:
        vocabularies[", trained words alone"] = variant.words(all_words=False)
    figures: dict[str, dict[str, float]] = {}
    for suffix, words in vocabularies.items():
        expected, best = DepthMeasures(), DepthMeasures()
        for index in range(scenes.count):
            scene = scenes.scene(index)
            for measure, depth in zip((expected, best), read_depth(segmenter, scene.image, words), strict=True):
                measure.add(scene, depth)
        figures[f"expected distance{suffix}"] = expected.figures()
        figures[f"best word{suffix}"] = best.figures()
    return figures
