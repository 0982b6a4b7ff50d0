"""How much faster is asking other words than segmenting again? Interleaved pairs in one process, medians.

    python bench/relabel.py [--pairs 7] [--threads 2] [--json FILE]

Both sides ask 20 words whose text embeddings exist (made beforehand, timed apart: a vocabulary is embedded once,
whatever the number of images). The words of every pair are new to the image.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import opensan
from opensan.vocabulary import Vocabulary

CASES = (("san-vit-b16", 0, (640, 640)), ("tiny", None, (480, 640)))
WORDS_ASKED = 20


def seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(name: str, seed: int | None, size: tuple[int, int], pairs: int) -> dict[str, object]:
    """Median seconds of `segment` and `relabel`, and the median of the pairs' ratios."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights, and words that tiny has never seen: only time matters here
        segmenter = opensan.load(name, random_weights=seed, text_cache=False)
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        names = Vocabulary.ready("ade20k_847").names
        sets = [names[i * WORDS_ASKED : (i + 1) * WORDS_ASKED] for i in range(pairs + 1)]
        embedding = [seconds(lambda words=words: segmenter.text.classifier(Vocabulary.parse(words))) for words in sets]
    first = segmenter.segment(image, sets[0])  # warm-up, and the image that is asked again
    whole, again = [], []
    for words in sets[1:]:
        whole.append(seconds(lambda words=words: segmenter.segment(image, words)))
        again.append(seconds(lambda words=words: first.relabel(words)))
    return {
        "model": name if seed is None else f"{name}, random weights",
        "size": f"{size[1]}x{size[0]}",
        "segment_s": statistics.median(whole),
        "relabel_s": statistics.median(again),
        "ratio": statistics.median(a / b for a, b in zip(whole, again, strict=True)),
        "embed_20_words_s": statistics.median(embedding),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(name, seed, size, options.pairs) for name, seed, size in CASES]
    print("| model | image | segment, s | relabel, s | ratio | embedding 20 new words (once), s |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['model']} | {row['size']} | {row['segment_s']:.3f} | {row['relabel_s']:.3f} "
            f"| {row['ratio']:.1f} | {row['embed_20_words_s']:.2f} |"
        )
    if options.json:
        options.json.write_text(
            json.dumps({"threads": options.threads, "pairs": options.pairs, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
