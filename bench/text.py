"""How fast are names embedded that no cache holds? Interleaved pairs: every prompt at 77 positions, and ours.

    python bench/text.py [--model san-vit-b16] [--pairs 7] [--threads 2] [--json FILE]

ADE20K's 847 names with 14 templates, cut into as many parts as there are pairs. Ours embeds a part's names; the plain
side some of them, one template a batch, and is compared by seconds per prompt: all of them would take it an hour.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch

import opensan
from opensan.vocabulary import Vocabulary
from plain import PlainSAN

PLAIN_NAMES = 6


def seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(model: str, pairs: int) -> dict[str, object]:
    """Median seconds for all names of both sides, and the median of the pairs' ratios."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights: only time matters here
        segmenter = opensan.load(model, random_weights=0, text_cache=False)
    plain = PlainSAN(segmenter.model)
    whole = Vocabulary.ready("ade20k_847")
    parts = [whole.names[start::pairs] for start in range(pairs)]
    plain.embed_names(parts[0][:1], whole.templates)  # warm-up
    segmenter.text.classifier(Vocabulary.parse(["warm-up"]))
    ratios, plain_all, ours_all = [], [], []
    for names in parts:
        slow = seconds(lambda names=names: plain.embed_names(names[:PLAIN_NAMES], whole.templates)) / PLAIN_NAMES
        fast = seconds(lambda names=names: segmenter.text.classifier(Vocabulary.parse(names))) / len(names)
        ratios.append(slow / fast)
        plain_all.append(slow * len(whole.names))
        ours_all.append(fast * len(whole.names))
    return {
        "model": model,
        "prompts": sum(map(len, whole.prompts())),
        "plain_s": statistics.median(plain_all),
        "ours_s": statistics.median(ours_all),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="san-vit-b16")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    row = measure(options.model, options.pairs)
    print("| text tower, 847 names, cold | prompts | plain, s | ours, s | ratio |")
    print("|---|---|---|---|---|")
    print(f"| {row['model']} | {row['prompts']} | {row['plain_s']:.0f} | {row['ours_s']:.1f} | {row['ratio']:.1f} |")
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "pairs": options.pairs, **row}, indent=2))


if __name__ == "__main__":
    main()
