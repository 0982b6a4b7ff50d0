"""Train and test the variants, one run after the other; a run that is done is in the journal and not done again."""

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opensan.checkpoints import load_model
from opensan.config import ClipConfig, ImageConfig, ModelConfig, SideAdapterConfig
from opensan.data.augment import AugmentConfig
from opensan.data.dataset import SegmentationDataset
from opensan.errors import UserError
from opensan.evaluation.cost import LABEL_MAP, count_baseline, count_multiply_adds, count_parameters
from opensan.evaluation.evaluation import evaluate, segmenter_predictor
from opensan.files import write_text
from opensan.lab.ablation.data import Data, Templated, photographs, scenes
from opensan.lab.ablation.table import Row, write_results
from opensan.lab.ablation.variants import BASE, Variant
from opensan.lab.clip_training import load_clip
from opensan.lab.runs import each_run
from opensan.model import SAN
from opensan.model.backbones.clip_vit import ClipModel
from opensan.model.identity import model_identity
from opensan.model.san import san_around
from opensan.segmenters.base import Segmenter
from opensan.segmenters.baselines import Baseline, parse_baseline
from opensan.segmenters.baselines.build import build_baseline
from opensan.segmenters.san import SanSegmenter
from opensan.train.config import LoopConfig, PointsConfig, SanTrainingConfig
from opensan.train.log import NoProgress
from opensan.train.san import train_san

TIMED = 5
"""Images that are timed, one at a time."""


@dataclass(frozen=True)
class Budget:
    """Resources of every run, equal for all variants."""

    data: str = "scenes"
    steps: int = 1_200
    """Updates of the weights."""
    batch: int = 8
    crop: int = 128
    """Side of a training crop in pixels, and of the short side of a test image's network image."""
    train: int = 2_000
    """Scenes to train on."""
    tests: int = 200
    """Images of each test set."""
    learning_rate: float = 8e-4


@dataclass(frozen=True)
class Setup:
    """All that the runs of a table share."""

    budget: Budget
    clip: Path | None
    """A folder that a lab's CLIP training wrote; None: the CLIP of `tiny`, its position table included."""
    root: Path | None
    """The folder of the photographs."""

    def backbone(self) -> tuple[ClipModel, ClipConfig]:
        """Load the CLIP that every run starts from."""
        if self.clip is not None:
            return load_clip(self.clip)
        model = load_model("tiny")
        assert isinstance(model.clip, ClipModel) and isinstance(model.config.clip, ClipConfig)
        return model.clip, model.config.clip

    def work(self) -> dict[str, Any]:
        """Return all that results depend on, the CLIP's weights by their hash."""
        clip, config = self.backbone()
        digest = hashlib.sha256()
        for name, tensor in sorted(clip.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return {"budget": asdict(self.budget), "clip": config.model_dump(mode="json"), "weights": digest.hexdigest()}

    def new_model(self, config: ModelConfig, seed: int) -> SAN:
        """Build a SAN around the CLIP; its side adapter starts from `seed`."""
        clip, _ = self.backbone()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return san_around(config, clip)

    def datasets(self) -> Data:
        """Open the data."""
        if self.budget.data == "scenes":
            side = self.budget.crop
            return scenes(self.budget.train, self.budget.tests, (side, side * 4 // 3))
        if self.root is None or self.clip is None:
            raise UserError(
                "--data photographs needs --root, the folder of camvid and labelmefacade, and --clip, a folder that "
                "`python -m opensan.lab.photographs clip` wrote"
            )
        return photographs(self.root, self.budget.tests)

    def base_config(self, clip: ClipConfig) -> ModelConfig:
        """Return the configuration of the base variant: a small SAN for a crop of the budget's size."""
        crop, patch = self.budget.crop, clip.vision.patch_size
        layers = clip.vision.layers
        return ModelConfig(
            name=BASE,
            clip=clip,
            side_adapter=SideAdapterConfig(
                width=72,
                depth=6,
                heads=3,
                patch_size=patch,
                image_size=crop,
                queries=24,
                fusion={block: block * (layers // 2) // 3 for block in range(4)},
                supervised_blocks=(5, 6),
                mask_channels=64,
                mlp_channels=96,
            ),
            recognition_layer=layers // 2,
            clip_scale=0.5,
            image=ImageConfig(short_side=crop, long_side=4 * crop),
        )

    def training(self, seed: int) -> SanTrainingConfig:
        """Return the settings of one training."""
        budget = self.budget
        sides = tuple(range(budget.crop, budget.crop * 3 // 2, 16))
        return SanTrainingConfig(
            loop=LoopConfig(
                steps=budget.steps,
                batch_size=budget.batch,
                learning_rate=budget.learning_rate,
                warmup=min(100, budget.steps // 10),
                seed=seed,
                save_every=max(50, budget.steps // 4),
                keep=1,
                log_every=50,
            ),
            augment=AugmentConfig(short_sides=sides, crop=(budget.crop, budget.crop), colour_jitter=False),
            points=PointsConfig(count=768),
        )


def ablate(
    variants: Sequence[Variant],
    setup: Setup,
    seeds: int,
    out: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Run every variant with `seeds` seeds, and write the table and the picture to `out` after each run.

    A run that was stopped goes on where it was; other settings begin a new table, and say so.
    Returns the files. Raises UserError, one line, if a variant cannot be built: before anything is trained.
    """
    _, clip_config = setup.backbone()
    base = setup.base_config(clip_config)
    configs = {variant.name: variant.config(base) for variant in variants}
    data = setup.datasets()
    runs = {f"{variant.name}, seed {seed}": (variant, seed) for variant in variants for seed in range(seeds)}

    def do(key: str, running: Path) -> dict[str, Any]:
        variant, seed = runs[key]
        return asdict(_one(variant, configs[variant.name], data, setup, seed, running))

    def write(rows: list[dict[str, Any]]) -> list[Path]:
        return write_results([Row(**row) for row in rows], out, asdict(setup.budget))

    return each_run(list(runs), setup.work(), out, do, write, say=say)


def _one(variant: Variant, config: ModelConfig, data: Data, setup: Setup, seed: int, running: Path) -> Row:
    """Train and test one variant with one seed."""
    model = setup.new_model(config, seed)
    train = Templated(data.train, variant.templates)
    seconds = 0.0
    if variant.trained:
        started = time.perf_counter()
        result = train_san(model, train, setup.training(seed), running, progress=NoProgress())
        if not result.finished:
            raise KeyboardInterrupt
        seconds = time.perf_counter() - started
    model.eval()
    baseline = _baseline(variant, data, running)
    segmenter = _segmenter(model, baseline)
    figures: dict[str, float] = {}
    for dataset, wanted in data.tests:
        tested = Templated(dataset, variant.templates)
        metrics = evaluate(segmenter_predictor(segmenter, tested.vocabulary), tested).metrics
        for figure, words in wanted.items():
            ious = [one.iou for one in metrics.classes if one.name in words and one.pixels and not np.isnan(one.iou)]
            figures[figure] = float(np.mean(ious)) if ious else float("nan")
    size = (setup.budget.crop, setup.budget.crop)
    count = len(data.tests[0].dataset.vocabulary.names)
    counts = (
        count_multiply_adds(config, size, count) if baseline is None else count_baseline(baseline, config, size, count)
    )
    return Row(
        variant=variant.name,
        seed=seed,
        figures=figures,
        trained=count_parameters(model, baseline)["all"].trained if variant.trained else 0,
        multiply_adds=sum(count for part, count in counts.items() if part != LABEL_MAP),
        images_per_second=_speed(segmenter, data.tests[0].dataset),
        training_seconds=seconds,
        identity=str(model_identity(model) if baseline is None else segmenter.identity),
    )


def _baseline(variant: Variant, data: Data, running: Path) -> Baseline | None:
    if not variant.method:
        return None
    baseline = parse_baseline(f"{variant.method}:{variant.name}")
    assert baseline is not None
    if variant.method == "two-stage":
        words = running / "trained-words.txt"
        write_text(words, "\n".join(data.trained_words) + "\n")
        baseline = baseline._replace(options=baseline.options.model_copy(update={"trained": str(words)}))
    return baseline


def _segmenter(model: SAN, baseline: Baseline | None) -> Segmenter:
    if baseline is None:
        return SanSegmenter(model, text_cache=False)
    return build_baseline(baseline, model, text_cache=False)


def _speed(segmenter: Segmenter, dataset: SegmentationDataset) -> float:
    """Return images a second, one at a time, from the median of a few images, words embedded already."""
    seconds = []
    for index in range(min(TIMED, len(dataset))):
        image = dataset[index][0]
        started = time.perf_counter()
        segmenter.segment(image, dataset.vocabulary)
        seconds.append(time.perf_counter() - started)
    return 1 / statistics.median(seconds)
