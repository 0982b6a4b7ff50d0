"""Compare SAN's cost with that of the baselines on the same weights: parameters, multiply-adds, time of one image.

Seconds are the processor's, of all threads together, so that other work on the machine counts little. The methods are
timed by turns, on one image of noise, with random weights, which cost as much as trained ones, and
words that are embedded already. With random weights nearly every mask proposal has a crop; the table says how many had.

    OMP_NUM_THREADS=1 python bench/baselines.py --turns 3
"""

import argparse
import statistics
import time
import warnings

import numpy as np
import torch

from opensan.checkpoints import preset_config, random_model
from opensan.evaluation.cost import LABEL_MAP, count_baseline, count_multiply_adds, count_parameters
from opensan.segmenters.baselines import parse_baseline
from opensan.segmenters.baselines.build import build_baseline
from opensan.segmenters.san import SanSegmenter
from opensan.vocabulary import Vocabulary

METHODS = ("", "maskclip", "mask-tokens", "two-stage")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="san-vit-b16")
    parser.add_argument("--size", type=int, default=640, help="side of the square network image")
    parser.add_argument("--set", default="coco_stuff_171", help="the ready set of words")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    size = (options.size, options.size)
    vocabulary = Vocabulary.ready(options.set)
    config = preset_config(options.model)
    image = config.image.model_copy(update={"short_side": options.size, "long_side": options.size})
    segmenters = {}
    print(
        f"{options.model}, {options.size}x{options.size}, {len(vocabulary.words)} words, "
        f"{torch.get_num_threads()} thread(s)"
    )
    for method in METHODS:
        model = random_model(options.model, 0)
        model.config = config.model_copy(update={"image": image})
        baseline = parse_baseline(f"{method}:{options.model}")
        if baseline is None:
            counts = count_multiply_adds(config, size, len(vocabulary.words))
            counts.pop(LABEL_MAP)
            segmenters[method] = SanSegmenter(model, text_cache=False)
        else:
            counts = count_baseline(baseline, config, size, len(vocabulary.words))
            segmenters[method] = build_baseline(baseline, model, text_cache=False)
        trained = count_parameters(model, baseline)["all"].trained
        print(
            f"{method or 'san':<12} trained {trained / 1e6:6.2f} M, multiply-adds {sum(counts.values()) / 1e9:9.1f} G"
        )
        for part, count in counts.items():
            print(f"    {part:<36} {count / 1e9:9.2f} G")
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for segmenter in segmenters.values():
        segmenter.prepare_words(vocabulary)
    for _ in range(options.turns):
        for method, segmenter in segmenters.items():
            start = time.process_time()
            encoding = segmenter.segment(noise, vocabulary).encoding
            seconds[method].append(time.process_time() - start)
            print(f"{method or 'san':<12} {seconds[method][-1]:8.2f} s", flush=True)
            if method == "two-stage" and len(seconds[method]) == 1:
                print(f"proposals with a crop: {int(encoding['crop_embeddings'].any(dim=1).sum())}")
    ours = statistics.median(seconds[""])
    for method, own in seconds.items():
        middle = statistics.median(own)
        told = " ".join(f"{second:.2f}" for second in own)
        print(f"{method or 'san':<12} {middle:8.2f} s, {middle / ours:6.1f} times SAN's  ({told})")


if __name__ == "__main__":
    main()
