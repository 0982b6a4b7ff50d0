"""Measure adaptation at test time (`--adapt`): before, from the model's own weights for each image, and kept on.

    python bench/adapt_at_test.py --out out/adapt.json
    python bench/adapt_at_test.py --data ../shared/data --sets camvid --out out/adapt-camvid.json

Drawn scenes with `tiny`, and CamVid with `photo`; as they are, with noise, blurred, dark, and scenes as chalk too. Mean
IoU over all words and the share of pixels right, at up to 500 pixels of each word in each image. The interval is the
middle 95 % of 1,000 draws of the images with replacement (bootstrap), of the gain. Seconds are of processors.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image, ImageFilter

import opensan
from opensan.choices import Adapt
from opensan.tune.examples import example_of
from opensan.tune.run import encode_examples
from opensan.tune.vectors import confusion
from opensan.vocabulary import Vocabulary
from tune import Pair, dark, gap_of, pale


def noisy(image: np.ndarray) -> np.ndarray:
    """Return an image with a strong grain, the same for the same image."""
    grain = np.random.default_rng(int(image.sum()) % 2**32).normal(0, 30, image.shape)
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def blurred(image: np.ndarray) -> np.ndarray:
    """Return an image out of focus."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)))


DRAWS = 1_000

CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda image: image,
    "noise": noisy,
    "blur": blurred,
    "dark": dark,
    "chalk": pale,
}


def confusions(segmenter, images: Sequence[Pair], words: Vocabulary, base) -> tuple[np.ndarray, float]:
    """Return [I, K, K + 1] pixels of each word that each image has as each, and the seconds of encoding an image."""
    text, found = base.text.classifier(words), []
    start = time.process_time()
    encodings = [segmenter.encode(image) for image, _ in images]
    seconds = (time.process_time() - start) / len(images)
    for encoding, (image, labels) in zip(encodings, images, strict=True):
        # What adapted is labelled by the same words as ever: the identity is of the image half alone.
        own = replace(encoding, model=base.identity.encodings)
        (sample,) = encode_examples(base, [replace(example_of("image", image, labels, words), image=own)])
        found.append(confusion(base.model, text, sample))
    return np.stack(found), seconds


def figures(pixels: np.ndarray) -> np.ndarray:
    """Return mean IoU over the words that occur, and the share of pixels right, in percent: [..., 2].

    `pixels` [..., K, K + 1] are those of each word that were labelled as each.
    """
    right = np.diagonal(pixels, axis1=-2, axis2=-1)
    there = pixels.sum(axis=-1)
    union = there + pixels[..., :-1].sum(axis=-2) - right
    iou = np.where(there > 0, right / np.maximum(union, 1), np.nan)
    return 100 * np.stack([np.nanmean(iou, axis=-1), right.sum(axis=-1) / there.sum(axis=-1)], axis=-1)


def gain(before: np.ndarray, after: np.ndarray) -> list[list[float]]:
    """Return for mean IoU and pixels right: the gain, and the ends of its 95 % interval over images."""
    random = np.random.default_rng(0)
    weights = random.multinomial(len(before), np.full(len(before), 1 / len(before)), size=DRAWS)

    def difference(weights: np.ndarray) -> np.ndarray:
        drawn = [np.tensordot(weights, pixels, axes=1) for pixels in (after, before)]
        return figures(drawn[0]) - figures(drawn[1])

    ends = np.quantile(difference(weights), (0.025, 0.975), axis=0)
    return np.stack([difference(np.ones(len(before))), *ends]).T.tolist()


def run(name: str, data: Path | None, change: str, images: int, ways: Sequence[Adapt]) -> list[dict]:
    """Measure a set of images after a change, and print a line a way."""
    gap = gap_of(name, data, 1, images) if data else None
    if gap is None:
        scenes = unseen_scenes(images)
        model, words, own = "tiny", scenes.vocabulary, [scenes[index] for index in range(images)]
    else:
        model, words, own = gap.model, gap.words, gap.test
    base = opensan.load(model)
    changed = [(CHANGES[change](image), labels) for image, labels in own]
    before, seconds = confusions(base, changed, words, base)
    lines = []
    for way in ways:
        after, took = confusions(base.adapting(words, way), changed, words, base)
        line = {"set": name, "images": "as they are" if change == "plain" else change, "count": images, "adapt": way}
        line |= {"before": figures(before.sum(axis=0)).tolist(), "gain": gain(before, after)}
        lines.append(line | {"seconds": took, "seconds before": seconds})
        print(json.dumps(lines[-1]), flush=True)
    return lines


def unseen_scenes(count: int):
    """Return drawn scenes that nothing was trained, tuned or chosen on."""
    from opensan.lab.san_training import SceneDataset
    from opensan.lab.scenes import SEGMENTATION_NAMES

    return SceneDataset(41, count, (240, 320), "test", SEGMENTATION_NAMES)


def table(lines: Sequence[dict]) -> str:
    """Return the figures as Markdown."""
    rows = [
        "| set | images | adapted | mean IoU before | gain | pixels right before | gain | seconds an image |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        cells = []
        for before, (middle, low, high) in zip(line["before"], line["gain"], strict=True):
            cells += [f"{before:.1f}", f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"]
        seconds = f"{line['seconds']:.2f}, {line['seconds before']:.2f} before"
        about = f"{line['set']}, {line['count']} | {line['images']} | {line['adapt']}"
        rows.append(f"| {about} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(rows)


def main() -> None:
    """Parse the command line, measure, print the table and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of photographs; without it, drawn scenes")
    parser.add_argument("--sets", nargs="+", default=["scenes"], help="with --data: names of its folders")
    parser.add_argument("--changes", nargs="+", default=list(CHANGES), choices=CHANGES)
    parser.add_argument("--ways", nargs="+", default=get_args(Adapt), choices=get_args(Adapt))
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("out/adapt.json"))
    parser.add_argument("--show", nargs="+", type=Path, help="print the table of figures that were written, and stop")
    options = parser.parse_args()
    if options.show:
        print(table([line for file in options.show for line in json.loads(file.read_text())]))
        return
    lines = []
    for name in options.sets:
        for change in options.changes:
            lines += run(name, options.data, change, options.images, options.ways)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(lines, indent=1))
    print(table(lines))


if __name__ == "__main__":
    main()
