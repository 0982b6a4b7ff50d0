"""What the choice of words does to the answer: `tiny` on drawn scenes, whose every pixel has a known word.

    python bench/words.py [--scenes 60] [--json FILE]

Each scene is encoded once and asked several lists. Pixels are right when they get their own word, or, in lists that
have their word only among the background words, when they stay unlabelled.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import opensan
from opensan.lab.grounds import GROUNDS
from opensan.lab.san_training import SceneDataset
from opensan.lab.scenes import SEGMENTATION_NAMES

SEED = 9_000_011
"""Of scenes that nothing was trained or chosen on."""

ALL = list(SEGMENTATION_NAMES)


def questions(present: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """What is asked about a scene that shows the words `present`: a title, words, background words."""
    objects = [word for word in present if word not in GROUNDS]
    grounds = [word for word in present if word in GROUNDS]
    yield "all 82 words", ALL, []
    yield "the words of the picture", present, []
    yield "its objects alone, nothing for the ground", objects, []
    yield "its objects, its grounds as background", objects, grounds
    yield "its objects, all 10 grounds as background", objects, list(GROUNDS)


def shares(labels: np.ndarray, names: list[str], truth: np.ndarray) -> tuple[float, float]:
    """The share of the objects' pixels that are right, and of the grounds' pixels."""
    place = {name: index for index, name in enumerate(names)}
    own = np.array([place.get(name, -1) for name in ALL])[truth]
    ground = np.isin(truth, [ALL.index(name) for name in GROUNDS])
    known = truth >= 0
    right = labels == own
    return float(right[known & ~ground].mean()), float(right[known & ground].mean())


def measure(scenes: int) -> dict[str, dict[str, float]]:
    """Title -> means over the scenes, in [0, 1]."""
    san = opensan.load("tiny")
    found: dict[str, list[tuple[float, float]]] = {}
    dataset = SceneDataset(SEED, scenes, (480, 640), "test", ALL)
    for index in range(scenes):
        image, truth = dataset[index]
        encoding = san.encode(image)
        present = [ALL[label] for label in np.unique(truth) if label >= 0]
        if all(word in GROUNDS for word in present):
            continue
        for title, words, background in questions(present):
            answer = san.segment(encoding, words, background=background)
            found.setdefault(title, []).append(shares(answer.labels, answer.names, truth))
    return {
        title: dict(zip(("objects", "grounds"), map(float, np.mean(rows, axis=0)), strict=True))
        for title, rows in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.scenes)
    print("| asked | objects' pixels right | grounds' pixels right |")
    print("|---|---|---|")
    for title, row in found.items():
        print(f"| {title} | {row['objects']:.1%} | {row['grounds']:.1%} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
