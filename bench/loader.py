"""Does training wait for data? Images a second of the loader, and the share of a training step that waits for it.

    python bench/loader.py [--data ../shared/data/camvid] [--split train] [--crop 640] [--rounds 3] [--json FILE]

The folder is a labelled data set in the canonical layout. The loader is timed alone, with 0, 1 and 2 worker processes,
in rounds that interleave them; then in trainings of a few steps, on the CPU or another device, where the log says what
it waited.
"""

import argparse
import csv
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import torch

from opensan.checkpoints import load_model
from opensan.checkpoints.presets import PRESETS
from opensan.data.augment import AugmentConfig, augment
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.model import build_san
from opensan.train.config import LoopConfig, SanTrainingConfig
from opensan.train.san import SegmentationSource, train_san
from opensan.train.stream import stream

WORKERS = (0, 1, 2)
BATCH = 8
BATCHES_TIMED = 10
TRAININGS = (("tiny", False, 4, 8), ("san-vit-b16", True, 2, 3))
"""Model, whether with random weights, batch size, steps; the first step does not count. Crops have the size that the
model's side network is made for: 640 for san-vit-b16, 192 for tiny."""


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def parts(source: SegmentationSource, images: int) -> dict[str, float]:
    """Milliseconds an image: read, augment, collect to batches (a batch's share)."""
    numbers = [index % len(source) for index in range(images)]
    read, crops = [], []
    reading = seconds(lambda: read.extend(source.dataset[index] for index in numbers))
    augmenting = seconds(
        lambda: crops.extend(
            augment(*pair, source.config, np.random.default_rng(number)) for number, pair in enumerate(read)
        )
    )
    collecting = seconds(lambda: [source.collate(crops[start : start + BATCH]) for start in range(0, images, BATCH)])
    spent = {"read_ms": reading, "augment_ms": augmenting, "collect_ms": collecting}
    return {name: 1e3 * value / images for name, value in spent.items()}


def images_a_second(source: SegmentationSource, workers: int, seed: int) -> float:
    """Of the loader alone; starting its workers, and their first batch, are not counted."""
    batches = stream(source, seed=seed, first_step=0, steps=BATCHES_TIMED + 1, batch_size=BATCH, workers=workers)
    next(batches)
    return BATCH * BATCHES_TIMED / seconds(lambda: list(batches))


def training(
    model: str, random: bool, batch: int, steps: int, data: SegmentationFolder, device: str
) -> Iterator[dict[str, object]]:
    """Seconds of a step, and the share of it that waits for data, for every number of workers."""
    for workers in WORKERS:
        torch.manual_seed(0)
        network = build_san(PRESETS[model].config) if random else load_model(model)
        side = network.config.side_adapter.image_size
        loop = LoopConfig(steps=steps, batch_size=batch, log_every=1, workers=workers)
        with tempfile.TemporaryDirectory() as folder:
            with redirect_stderr(StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                train_san(
                    network,
                    data,
                    SanTrainingConfig(loop=loop, augment=AugmentConfig(crop=(side, side))),
                    folder,
                    device=device,
                )
            with (Path(folder) / "log.csv").open(newline="") as file:
                log = list(csv.DictReader(file))[1:]
        step = [batch / float(row["samples_per_second"]) for row in log]
        waits = [float(row["waiting_for_data"]) for row in log]
        yield {
            "model": f"{model}, random weights" if random else model,
            "crop": side,
            "batch": batch,
            "workers": workers,
            "step_s": statistics.median(step),
            "waiting": statistics.median(waits),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/camvid"))
    parser.add_argument("--split", default="train")
    parser.add_argument("--crop", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="of the trainings")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = SegmentationFolder(options.data, options.split)
    source = SegmentationSource(data, AugmentConfig(crop=(options.crop, options.crop)))
    say = partial(print, flush=True)  # row by row: the large model takes minutes
    rates = {workers: [] for workers in WORKERS}
    for number in range(options.rounds):
        for workers in WORKERS:
            rates[workers].append(images_a_second(source, workers, seed=number))
    report = {
        "data": options.data.name,
        "images": len(data),
        "crop": options.crop,
        "threads": options.threads,
        "device": options.device,
        "loader": {workers: statistics.median(values) for workers, values in rates.items()},
        "parts": parts(source, 6 * BATCH),
        "training": [],
    }
    say("| workers | images a second |\n|---|---|")
    for workers, rate in report["loader"].items():
        say(f"| {workers} | {rate:.1f} |")
    say("\n| part of the loader, one process | ms an image |\n|---|---|")
    for name, value in report["parts"].items():
        say(f"| {name.removesuffix('_ms')} | {value:.1f} |")
    say("\n| training step | crop | batch | workers | step, s | of it waiting for data |\n|---|---|---|---|---|---|")
    for case in TRAININGS:
        for row in training(*case, data, options.device):
            cells = (row["model"], row["crop"], row["batch"], row["workers"], f"{row['step_s']:.3f}")
            say("|", *(f"{cell} |" for cell in cells), f"{100 * row['waiting']:.1f} % |")
            report["training"].append(row)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
