"""What do "fast" and "fastest" cost in answers? Each photograph labelled exactly and so; agreement, and mIoU of both.

    python bench/fast_answers.py MODEL DATA [--speed fast] [--split test] [--images 60] [--dtype bfloat16] [--json FILE]

MODEL is what `opensan.load` takes, or "rule:san-vit-b16" for weights filled by the rule of the recorded goldens: an
untrained model, whose mIoU means nothing but whose agreement does. DATA is a folder of labelled photographs (as
`opensan evaluate` reads) or "scenes", drawn ones of the seed that the packaged model is reported on.
"""

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import torch

import opensan
from opensan.checkpoints.presets import PRESETS
from opensan.data.dataset import SegmentationDataset
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.evaluation.metrics import Counts
from opensan.lab.san_training import SceneDataset
from opensan.lab.scenes import SEGMENTATION_NAMES
from opensan.parity.golden import golden_model
from opensan.segmenters.san import SanSegmenter

RULE = "rule:"
SCENES_SEED = 5_000_011


def open_data(data: str, split: str, images: int) -> SegmentationDataset:
    if data == "scenes":
        return SceneDataset(SCENES_SEED, images, (480, 640), "test", SEGMENTATION_NAMES)
    return SegmentationFolder(data, split)


def open_model(model: str, speed: str, dtype: str | None = None) -> SanSegmenter:
    if not model.startswith(RULE):
        return opensan.load(model, speed=speed, dtype=dtype)
    return SanSegmenter(golden_model(PRESETS[model.removeprefix(RULE)].config), speed=speed, dtype=dtype)


def compare(exact: SanSegmenter, fast: SanSegmenter, dataset: SegmentationDataset, images: int) -> dict[str, float]:
    """Shares of pixels, mIoU in [0, 1], over the first `images` photographs."""
    words = dataset.vocabulary
    counts = Counts(len(words.words)), Counts(len(words.words))
    alike = []
    for index in range(min(images, len(dataset))):
        image, truth = dataset[index]
        labels = [segmenter.segment(image, words).labels for segmenter in (exact, fast)]
        alike.append((labels[0] == labels[1]).mean())
        for count, found in zip(counts, labels, strict=True):
            count.update(truth, found)
    exact_miou, fast_miou = (count.metrics(words.names).miou for count in counts)
    return {
        "photographs": len(alike),
        "alike": float(np.mean(alike)),
        "alike_least": float(np.min(alike)),
        "miou_exact": exact_miou,
        "miou_fast": fast_miou,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--speed", choices=("fast", "fastest"), default="fast")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--dtype", choices=("bfloat16",), help="instead of what this machine's fast speed would choose")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # words that a small model has never seen
    exact, fast = open_model(options.model, "exact"), open_model(options.model, options.speed, options.dtype)
    found = compare(exact, fast, open_data(options.data, options.split, options.images), options.images)
    print(f"| model | data | photographs | labels alike | least | mIoU exact | mIoU {options.speed} |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {options.model} | {Path(options.data).name} | {found['photographs']} | {found['alike']:.3%} "
        f"| {found['alike_least']:.2%} | {found['miou_exact']:.2%} | {found['miou_fast']:.2%} |"
    )
    if options.json:
        about = {"model": options.model, "data": options.data, "speed": options.speed}
        options.json.write_text(json.dumps({**about, **found}, indent=2))


if __name__ == "__main__":
    main()
