"""Train a small SAN around the frozen lab CLIP on masks of BASE words only; evaluate it on BASE and NOVEL words.

It tests the paper's claim at a small scale: words without masks in training are segmented if CLIP knows them.

    python -m opensan.lab.clip_training --out runs/lab-clip
    python -m opensan.lab.san_training train --clip runs/lab-clip --out runs/lab-san
    python -m opensan.lab.san_training measure --model tiny --out runs/tiny
"""

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from opensan.checkpoints import save_folder
from opensan.config import Config, ImageConfig, ModelConfig, SideAdapterConfig
from opensan.data.augment import AugmentConfig
from opensan.evaluation.evaluation import Evaluation, dataset_predictor, evaluate, segmenter_predictor, validation
from opensan.evaluation.metrics import SegmentationMetrics
from opensan.evaluation.report import write_report
from opensan.files import write_text
from opensan.lab.clip_training import RECOGNITION_LAYER, load_clip
from opensan.lab.scenes import BASE_NAMES, NOVEL_KINDS, SEGMENTATION_NAMES, Split, label_map, make_scene, novel_kind
from opensan.model import SAN
from opensan.model.san import san_around
from opensan.segmenters.base import Segmenter
from opensan.segmenters.load import load_with_torch
from opensan.train.config import LoopConfig, PointsConfig, SanTrainingConfig
from opensan.train.san import train_san
from opensan.vocabulary import Vocabulary


class SceneDataset:
    """Lab scenes as a segmentation data set. Each scene is drawn once and kept."""

    def __init__(
        self, seed: int, count: int, size: tuple[int, int], split: Split, names: Sequence[str], alike: float = 0.0
    ) -> None:
        """`size` is (H, W) in pixels; pixels of words that `names` does not list are unlabelled.

        `alike`: see `make_scene`.
        """
        self.alike = alike
        self.vocabulary = Vocabulary.parse(list(names))
        self.count = count
        self._draw = functools.cache(lambda index: self._make(seed, index, size, split))

    def _make(
        self, seed: int, index: int, size: tuple[int, int], split: Split
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scene = make_scene(seed, index, size, split=split, alike=self.alike)
        number = np.array([0 if region.ground else place for place, region in enumerate(scene.regions, 1)], np.int32)
        return scene.image, label_map(scene, self.vocabulary.names).astype(np.int16), number[scene.index_map]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._draw(index)[:2]

    def objects(self, index: int) -> np.ndarray:
        return self._draw(index)[2]

    def name(self, index: int) -> str:
        return f"scene {index}"


class LabSanConfig(Config):
    """Configuration of a small SAN and of its training."""

    name: str = "tiny"
    scenes: int = 4_000
    scene_size: tuple[int, int] = (240, 320)
    training: SanTrainingConfig = SanTrainingConfig(
        loop=LoopConfig(
            steps=1_700,
            batch_size=8,
            learning_rate=8e-4,
            warmup=100,
            save_every=100,
            log_every=20,
            validate_every=340,
        ),
        augment=AugmentConfig(short_sides=(160, 176, 192, 208, 224), crop=(160, 160), colour_jitter=False),
        points=PointsConfig(count=1_024),
    )
    again: LoopConfig | None = None
    """A second training run with a new learning-rate cycle and other crops; None for none."""
    side_adapter: SideAdapterConfig = SideAdapterConfig(
        width=96,
        depth=6,
        heads=3,
        patch_size=8,
        image_size=192,
        queries=32,
        fusion={0: 0, 1: 1, 2: 2, 3: 3},
        supervised_blocks=(5, 6),
        mask_channels=96,
        mlp_channels=128,
    )
    recognition_layer: int = RECOGNITION_LAYER
    clip_scale: float = 0.5
    image: ImageConfig = ImageConfig(short_side=192, long_side=768)


TINY = LabSanConfig(
    again=LoopConfig(
        steps=900,
        batch_size=8,
        learning_rate=5e-4,
        warmup=30,
        seed=1,
        save_every=100,
        log_every=20,
        validate_every=450,
    )
)
"""The recipe of the packaged model `tiny`."""


def build_lab_san(clip_folder: Path, config: LabSanConfig) -> SAN:
    """Build a SAN around the trained CLIP in `clip_folder`; its side adapter starts from a fixed seed."""
    clip, clip_config = load_clip(clip_folder)
    model_config = ModelConfig(
        name=config.name,
        clip=clip_config,
        side_adapter=config.side_adapter,
        recognition_layer=config.recognition_layer,
        clip_scale=config.clip_scale,
        image=config.image,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return san_around(model_config, clip)


def base_and_novel(metrics: SegmentationMetrics) -> dict[str, float]:
    """Return mIoU over base words, over novel words, and over each kind of novel word (see `opensan.lab.scenes`)."""
    kinds: dict[str, list[float]] = {kind: [] for kind in ("base", "novel", *NOVEL_KINDS)}
    for result in metrics.classes:
        if np.isnan(result.iou) or result.pixels == 0:
            continue
        kind = novel_kind(result.name)
        for list_name in ("base",) if kind is None else ("novel", kind):
            kinds[list_name].append(result.iou)
    return {f"miou_{kind}": float(np.mean(values)) for kind, values in kinds.items() if values}


def measure(
    model: SAN | Segmenter, count: int = 400, size: tuple[int, int] = (480, 640), seed: int = 1_000_003
) -> Evaluation:
    """Evaluate on test scenes, which training never draws, with all base and novel words as classes."""
    dataset = SceneDataset(seed, count, size, "test", SEGMENTATION_NAMES)
    if isinstance(model, Segmenter):
        return evaluate(segmenter_predictor(model, dataset.vocabulary), dataset)
    return evaluate(dataset_predictor(model, dataset), dataset)


def train_lab_san(clip_folder: Path, config: LabSanConfig, out: Path) -> None:
    """Train, and save `out`/model as it is packaged, in float16. Resumes."""
    model = build_lab_san(clip_folder, config)
    dataset = SceneDataset(7, config.scenes, config.scene_size, "masks", BASE_NAMES)
    held_out = SceneDataset(8, 60, config.scene_size, "test", SEGMENTATION_NAMES)
    cycles = {"run": config.training.loop} | ({"again": config.again} if config.again else {})
    for name, loop in cycles.items():
        training = config.training.model_copy(update={"loop": loop})
        if not train_san(model, dataset, training, out / name, validate=validation(model, held_out)).finished:
            return
    save_folder(model, out / "model", torch.float16)
    report(str(out / "model"), out / "report")


def report(model: str, out: Path, count: int = 400) -> None:
    """Evaluate `model` (as `opensan.load` takes it) on `count` scenes; write reports, print base and novel mIoU."""
    evaluation = measure(load_with_torch(model), count)
    figures = base_and_novel(evaluation.metrics)
    write_report(evaluation, out, title="Lab scenes, base and novel words", about={"model": model})
    write_text(out / "base_and_novel.json", json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        print(f"{name:18} {100 * value:6.2f} %")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("train", "measure"))
    parser.add_argument("--clip", type=Path, help="the folder that opensan.lab.clip_training wrote (for `train`)")
    parser.add_argument("--model", default="tiny", help="the model to evaluate (for `measure`)")
    parser.add_argument("--scenes", type=int, default=400, help="the number of test scenes (for `measure`)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.command == "measure":
        report(options.model, options.out, options.scenes)
    elif options.clip is None:
        parser.error("train needs --clip")
    else:
        train_lab_san(options.clip, TINY, options.out)


if __name__ == "__main__":
    main()
