"""What does a SAN around each kind of encoder cost? Parameters, multiply-adds, milliseconds, peak memory.

    python bench/encoders.py [NAME...] [--size 480x640] [--words 171] [--rounds 15] [--threads 2]

NAME is a name of `opensan models`: those of other encoders have random weights, which cost as much as trained ones.
Each is measured in a process of its own: first its peak memory after two images, then its times. The image is noise,
which is not resized for models of random weights; `photo` and `tiny` resize it as they do any image. Times are medians
of a whole `segment` with words that are embedded already; multiply-adds leave out the label map. On a busy machine, the
time of the processor says more than that of the wall, and most with one thread.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from opensan.checkpoints import build_empty, load_model, random_model
from opensan.checkpoints.presets import PRESETS
from opensan.evaluation.cost import LABEL_MAP, count_multiply_adds, count_parameters
from opensan.images import network_size, padded_size
from opensan.segmenters.san import SanSegmenter
from opensan.structures import TextClassifier
from opensan.train.log import peak_memory_mib
from opensan.vocabulary import Vocabulary

NAMES = (
    "san-vit-b16", "siglip-vit-b16", "pe-core-b16", "eva02-clip-b16", "openai-rn50", "laion-convnext-b", "align-base",
    "photo", "tiny",
)  # fmt: skip


class RandomRows:
    """Stands where a segmenter keeps its text encoder: the words' rows are random, and ready."""

    def __init__(self, count: int, dimension: int) -> None:
        rows = F.normalize(torch.randn(count, dimension, generator=torch.Generator().manual_seed(0)), dim=1)
        self._made = TextClassifier(rows, torch.arange(count), count)

    def classifier(self, vocabulary: Vocabulary, *, progress: object = None) -> TextClassifier:
        return self._made


def segmenter_of(name: str, size: tuple[int, int], words: int) -> SanSegmenter:
    """Build the model `name`, with words that are ready."""
    model = random_model(name, 0) if name in PRESETS else load_model(name)
    if name in PRESETS:
        image = model.config.image.model_copy(update={"short_side": min(size), "long_side": max(size)})
        model.config = model.config.model_copy(update={"image": image})
    segmenter = SanSegmenter(model, text_cache=False)
    segmenter.text = RandomRows(words, model.config.clip.embed_dim)
    return segmenter


def measure(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Measure one model in this process."""
    torch.set_num_threads(options.threads)
    image = np.random.default_rng(0).integers(0, 256, (*options.size, 3), dtype=np.uint8)
    vocabulary = Vocabulary.parse([f"word {number}" for number in range(options.words)])
    own = segmenter_of(name, options.size, options.words)
    for _ in range(2):
        own.segment(image, vocabulary)
    peak = peak_memory_mib(own.device)
    config = own.image_config
    size = padded_size(network_size(options.size, config), config)
    parts = count_multiply_adds(own.model.config, size, options.words)
    parameters = count_parameters(build_empty(own.model.config))["all"]  # a segmenter's own are all frozen
    wall, processor = [], []
    for _ in range(options.rounds):
        started = time.perf_counter(), time.process_time()
        own.segment(image, vocabulary)
        wall.append(time.perf_counter() - started[0])
        processor.append(time.process_time() - started[1])
    return {
        "name": name,
        "kind": own.model.config.clip.kind,
        "network image": size,
        "parameters, M": parameters.total / 1e6,
        "trained, M": parameters.trained / 1e6,
        "multiply-adds, G": sum(count for part, count in parts.items() if part != LABEL_MAP) / 1e9,
        "ms": 1000 * statistics.median(wall),
        "ms of the processor": 1000 * statistics.median(processor),
        "peak memory, MiB": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--size", type=lambda text: tuple(map(int, text.split("x"))), default=(480, 640))
    parser.add_argument("--words", type=int, default=171)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    head = None
    for name in options.names:
        height, width = options.size
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            "--size",
            f"{height}x{width}",
            "--words",
            str(options.words),
        ]
        command += ["--rounds", str(options.rounds), "--threads", str(options.threads)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        if head is None:
            head = list(row)
            print("|".join(["", *head, ""]) + "\n" + "|---" * len(head) + "|", flush=True)
        print("|".join(["", *map(plain, row.values()), ""]), flush=True)


def plain(value: object) -> str:
    """Return a figure for the table."""
    if isinstance(value, list):
        return "x".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
