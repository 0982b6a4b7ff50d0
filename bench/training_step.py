"""How long does a training step take, and how much memory? Interleaved processes: the official order, and ours twice.

    python bench/training_step.py [--model san-vit-b16] [--batch 2] [--pairs 3] [--steps 3] [--threads 2] [--json FILE]

Every process takes some steps on crops of 640 pixels (forward, losses, backward, clipping, AdamW) after one to warm up,
and says its median second (`--clock processor`: of processor time) and its peak memory. Ours runs in float32, and in
bfloat16 as with `loop.precision=bfloat16`. Random weights; label maps of a few dozen blobs with 171 classes, about ten
of them in a crop. With `--only WAY` this process takes the steps itself.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from opensan.checkpoints import random_model
from opensan.model import SAN
from opensan.structures import TextClassifier
from opensan.train.criterion import SetCriterion
from opensan.train.optimizer import build_adamw, clip_gradients, san_parameter_groups
from opensan.train.points import RandomPoints
from opensan.train.san import SanTask, SegmentationBatch, normalise
from opensan.train.targets import LabelMapTargets
from plain import PlainSAN
from plain_training import losses as plain_losses
from plain_training import targets_of
from segment import CLOCKS

CROP, CLASSES = 640, 171
WAYS = ("plain", "ours", "bfloat16")


def label_map(seed: int) -> np.ndarray:
    """[640, 640] int64: blobs around random centres, some of them unlabelled."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, CROP, (24, 2))
    classes = rng.integers(0, CLASSES, 12)[rng.integers(0, 12, 24)]
    classes[:2] = -1
    y, x = np.mgrid[:CROP, :CROP]
    distance = np.stack([(y - cy) ** 2 + (x - cx) ** 2 for cy, cx in centres])
    return classes[distance.argmin(axis=0)]


def step_function(which: str, model: SAN, batch: int, device: torch.device) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that answers the losses of the same batch each time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, CROP, CROP), generator=generator, dtype=torch.uint8)
    maps = [label_map(seed) for seed in range(batch)]
    rows = F.normalize(torch.randn(CLASSES, model.config.clip.embed_dim, generator=generator), dim=-1).to(device)
    if which == "plain":
        plain = PlainSAN(model)
        pixels = normalise(images.to(device), model.config.image)
        targets = [tuple(part.to(device) for part in targets_of(torch.from_numpy(one))) for one in maps]
        return lambda: plain_losses(plain, pixels, targets, rows)
    text = TextClassifier(rows, torch.arange(CLASSES, device=device), CLASSES)
    task = SanTask(model, [text], SetCriterion(RandomPoints()))
    prepared = SegmentationBatch(images, LabelMapTargets.from_maps(maps)).to(device)
    return lambda: task(prepared, task.prepare([prepared]))


def take_steps(which: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, and the process's (or the device's) peak memory in MiB."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    model = random_model(options.model, 0).to(device)
    model.side_adapter.requires_grad_(True)
    model.no_object_embedding.requires_grad_(True)
    model.clip.visual.positional_embedding.requires_grad_(True)
    model.train()
    groups = san_parameter_groups(model)
    optimizer = build_adamw(groups)
    trained = [parameter for group in groups for parameter in group.parameters]
    step = step_function(which, model, options.batch, device)
    taken = []
    for number in range(options.steps + 1):
        torch.manual_seed(number)
        start = CLOCKS[options.clock]()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.bfloat16 or which == "bfloat16"):
            total = sum(step().values())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        clip_gradients(trained, 0.01)
        optimizer.step()
        total.item()
        taken.append(CLOCKS[options.clock]() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"seconds": statistics.median(taken[1:]), "peak_mib": peak, "loss": total.item()}


def in_a_process(which: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, *sys.argv, "--only", which], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="san-vit-b16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="autocast every forward pass")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--only", choices=WAYS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(take_steps(options.only, options)))
        return
    rounds = [{which: in_a_process(which) for which in WAYS} for _ in range(options.pairs)]
    rows = []
    print("| training step | batch | way | s | plain / this | MiB | this / plain | loss |")
    print("|---|---|---|---|---|---|---|---|")
    for way in WAYS:
        row = {what: statistics.median(one[way][what] for one in rounds) for what in ("seconds", "peak_mib", "loss")}
        row["time_ratio"] = statistics.median(one["plain"]["seconds"] / one[way]["seconds"] for one in rounds)
        row["memory_ratio"] = statistics.median(one[way]["peak_mib"] / one["plain"]["peak_mib"] for one in rounds)
        rows.append({"way": way, **row})
        print(
            f"| {options.model}, {CROP} crop, {options.device} | {options.batch} | {way} | {row['seconds']:.2f} "
            f"| {row['time_ratio']:.2f} | {row['peak_mib']:.0f} | {row['memory_ratio']:.2f} | {row['loss']:.5f} |"
        )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "rounds": rounds, **vars(options)}, indent=2, default=str))


if __name__ == "__main__":
    main()
