"""Train `tiny` for objects on drawn scenes, and compare PQ and AP before and after, with connected parts.

    python bench/panoptic.py train --out runs/objects
    python bench/panoptic.py measure --model tiny --model runs/objects/model

Scenes are drawn so that several objects have one name, and touch. The test scenes are never trained on.
"""

import argparse
from pathlib import Path

import torch

import opensan
from opensan.assemble.segments import SegmentRules
from opensan.checkpoints import load_model, save_folder
from opensan.data.augment import AugmentConfig
from opensan.evaluation.objects import evaluate_objects
from opensan.lab.san_training import SceneDataset
from opensan.lab.scenes import BASE_NAMES
from opensan.train.config import LoopConfig, PointsConfig, SanTrainingConfig
from opensan.train.san import train_san

ALIKE = 0.6
"""The probability that an object looks like the one before it."""


def train(out: Path, steps: int, batch: int, learning_rate: float) -> None:
    """Continue the training of `tiny` for objects, and save `out`/model. Resumes."""
    model = load_model("tiny")
    dataset = SceneDataset(11, 2_000, (192, 256), "masks", BASE_NAMES, ALIKE)
    settings = {"warmup": 10, "save_every": 20, "log_every": 10}
    loop = LoopConfig(steps=steps, batch_size=batch, learning_rate=learning_rate, **settings)
    config = SanTrainingConfig(
        loop=loop,
        augment=AugmentConfig(short_sides=(160, 192), crop=(128, 128), colour_jitter=False),
        points=PointsConfig(count=512),
        objects=True,
    )
    if train_san(model, dataset, config, out / "run").finished:
        save_folder(model, out / "model", torch.float16)


def measure(names: list[str], scenes: int) -> None:
    """Print PQ and AP of models, by connected parts and by proposals, on test scenes."""
    dataset = SceneDataset(12, scenes, (192, 256), "masks", BASE_NAMES, ALIKE)
    print("| model | objects by | PQ | SQ | RQ | PQ of things | AP | AP, IoU 0.50 |\n|---|---|---|---|---|---|---|---|")
    for name in names:
        segmenter = opensan.load(name)
        for parts in (True, False):
            figures = evaluate_objects(segmenter, dataset, SegmentRules(parts=parts)).summary()
            shown = (figures[key] for key in ("pq", "sq", "rq", "pq_thing", "ap", "ap50"))
            way = "connected parts" if parts else "proposals"
            print(f"| {name} | {way} | " + " | ".join(f"{100 * value:.1f}" for value in shown) + " |", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("train", "measure"))
    parser.add_argument("--out", type=Path, default=Path("runs/objects"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--model", action="append", help="for `measure`; may be given several times")
    parser.add_argument("--scenes", type=int, default=100, help="test scenes of `measure`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "train":
        train(options.out, options.steps, options.batch, options.learning_rate)
    else:
        measure(options.model or ["tiny"], options.scenes)


if __name__ == "__main__":
    main()
