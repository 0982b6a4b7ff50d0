"""Measure tuned words over gaps between what a model learned and what it is given, with 1, 5 and 20 labelled images.

    python bench/tune.py --data ../shared/data --out out/tune.json

For each gap: the words before, and tuned as vectors, as a context, and as both; mean IoU over the words asked for, on
test images that no fit saw, at up to 500 pixels of each word in each. "Others" are the mean IoU of words without
labels: in drawn scenes those of the same test images that the labelled images did not show; for photographs the words
of another set, on its images, asked together with the tuned ones. Each gain is the mean over draws of labelled images,
with its 95 % interval (Student's t). Seconds are of processors, of the fits alone.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from scipy.stats import t as student

import opensan
from opensan.choices import Tuned
from opensan.data.class_list import read_class_names
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.evaluation.metrics import Counts
from opensan.lab.san_training import SceneDataset
from opensan.lab.scenes import SEGMENTATION_NAMES
from opensan.tune.examples import _AllLabelled, example_of
from opensan.tune.run import encode_examples, fit_samples
from opensan.tune.vectors import Sample, confusion
from opensan.vocabulary import Vocabulary

Pair = tuple[np.ndarray, np.ndarray]
WAYS: tuple[Tuned, ...] = ("vectors", "context", "both")
SHOTS = (1, 5, 20)


@dataclass(frozen=True)
class Gap:
    """A model, and images that it did not learn."""

    name: str
    model: str
    words: Vocabulary
    pool: Sequence[Pair]
    """Images to label."""
    test: Sequence[Pair]
    other: "Gap | None" = None
    """Where other words are measured; None: the words of `test` that have no labels."""


def pale(image: np.ndarray) -> np.ndarray:
    """Return a drawn scene as chalk on warm paper: pale, soft at the edges, with the paper's grain."""
    soft = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)), dtype=np.float32)
    grain = np.random.default_rng(int(image.sum()) % 2**32).normal(0, 9, (*image.shape[:2], 1))
    return np.clip(0.5 * soft + 0.5 * np.array([236, 222, 198]) + grain, 0, 255).astype(np.uint8)


def faded(image: np.ndarray) -> np.ndarray:
    """Return a drawn scene halfway to chalk: somewhat pale, a little soft, with a little grain."""
    soft = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float32)
    grain = np.random.default_rng(int(image.sum()) % 2**32).normal(0, 6, (*image.shape[:2], 1))
    return np.clip(0.7 * soft + 0.3 * np.array([236, 222, 198]) + grain, 0, 255).astype(np.uint8)


def dark(image: np.ndarray) -> np.ndarray:
    """Return a photograph as a bad camera takes it at dusk: dark, blurred, bluish, noisy."""
    soft = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.5)), dtype=np.float32)
    noise = np.random.default_rng(int(image.sum()) % 2**32).normal(0, 6, image.shape)
    return np.clip(soft * np.array([0.24, 0.26, 0.34]) + noise, 0, 255).astype(np.uint8)


def spread(folder: SegmentationFolder, count: int, change: Callable[[np.ndarray], np.ndarray] | None) -> list[Pair]:
    """Return `count` images, evenly spread over the list."""
    chosen = np.linspace(0, len(folder) - 1, min(count, len(folder))).round().astype(int)
    pairs = [folder[int(index)] for index in chosen]
    return [(image if change is None else change(image), labels) for image, labels in pairs]


def photographs(root: Path, name: str, pool: int, tests: int, change=None, title: str | None = None) -> Gap:
    """Read a set with the lists train and test, or cut one without lists in two."""
    folder = root / name
    if (folder / "train.txt").exists():
        train, test = (spread(SegmentationFolder(folder, s), n, change) for s, n in (("train", pool), ("test", tests)))
        words = SegmentationFolder(folder, "train").vocabulary
    else:
        ignored = [name for name in read_class_names(folder / "classes.txt").names if name == "background"]
        every = _AllLabelled(folder, "", ignored=ignored)
        words, count = every.vocabulary, len(every)
        # Frames of one place: the last third is another part of it.
        cut = 2 * count // 3
        train = [every[int(i)] for i in np.linspace(0, cut - 1, pool).round()]
        test = [every[int(i)] for i in np.linspace(cut, count - 1, tests).round()]
    return Gap(title or name, "photo", words, train, test)


STYLES = {"scenes as chalk": pale, "scenes, faded": faded}
NAMES = (*STYLES, "camvid", "camvid, dark and blurred", "labelmefacade", "lums_road", "dhcn_corridor")


def gap_of(name: str, root: Path | None, pool: int, tests: int) -> Gap:
    """Return a gap, with `pool` images to label and `tests` to measure on."""
    if name in STYLES:
        change = STYLES[name]
        drawn = [SceneDataset(seed, n, (240, 320), "test", SEGMENTATION_NAMES) for n, seed in ((pool, 11), (tests, 12))]
        sets = [[(change(image), labels) for image, labels in map(one.__getitem__, range(len(one)))] for one in drawn]
        return Gap(name, "tiny", Vocabulary.parse(list(SEGMENTATION_NAMES)), *sets)
    folder, _, way = name.partition(", ")
    gap = photographs(root, folder, pool, tests, dark if way else None, name)
    other = "camvid" if folder == "dhcn_corridor" else "dhcn_corridor"
    return replace(gap, other=photographs(root, other, 1, tests))


def gaps(root: Path | None, pool: int, tests: int, only: str | None) -> Iterator[Gap]:
    """Yield the gap called `only`, or all that there are images for."""
    for name in STYLES if root is None else NAMES:
        if only in (None, name):
            yield gap_of(name, root, pool, tests)


def sampled(segmenter, pairs: Sequence[Pair], words: Vocabulary) -> list[Sample]:
    """Encode images, and keep what fits and figures need of each."""
    named = [example_of(str(number), image, labels, words) for number, (image, labels) in enumerate(pairs)]
    return encode_examples(segmenter, [example for example in named if len(example.labels)])


def measured(segmenter, samples: Sequence[Sample], words: Vocabulary, known: int) -> np.ndarray:
    """Return the IoU of the first `known` words on images whose labels name these: [known], nan where they are not."""
    text = segmenter.text.classifier(words)
    counts = Counts(len(words.words))
    for sample in samples:
        more = len(words.words) - len(sample.counts)
        counts.confusion += confusion(segmenter.model, text, replace(sample, counts=np.pad(sample.counts, (0, more))))
    found = counts.metrics([word.name for word in words.words]).classes
    return np.array([one.iou if one.pixels else np.nan for one in found])[:known]


def scores(segmenter, gap: Gap) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoU of each word on the test images, and of each word of the other set on its own: nan where none."""
    own = measured(segmenter, sampled(segmenter, gap.test, gap.words), gap.words, len(gap.words.names))
    if gap.other is None:
        return own, np.empty(0)
    words = joint(gap.other.words, gap.words)
    other = sampled(segmenter, gap.other.test, gap.other.words)
    return own, measured(segmenter, other, words, len(gap.other.words.names))


def joint(other: Vocabulary, words: Vocabulary) -> Vocabulary:
    """Return the words of another set, then those of `words` that it does not have."""
    return Vocabulary((*other.words, *(word for word in words.words if other.find(word.name) is None)))


def run(gap: Gap, seeds: int, ways: Sequence[Tuned], fits: int, cache: dict) -> list[dict]:
    """Return a line of figures for each way, number of labelled images and draw of them."""
    segmenter = opensan.load(gap.model)
    text = segmenter.text.classifier(gap.words)
    start = time.process_time()
    test = sampled(segmenter, gap.test, gap.words)
    seconds = (time.process_time() - start) / len(gap.test)
    samples = sampled(segmenter, gap.pool, gap.words)
    other = None
    if gap.other is not None:
        key = (gap.other.name, gap.model)
        cache[key] = cache.get(key) or sampled(segmenter, gap.other.test, gap.other.words)
        other = joint(gap.other.words, gap.words)

    def of_others(words: Vocabulary, own: np.ndarray, labelled: np.ndarray) -> float:
        if gap.other is None:
            return mean(own[~labelled])
        asked = replace(other, tuned=words.tuned)
        return mean(measured(segmenter, cache[key], asked, len(gap.other.words.words)))

    before = measured(segmenter, test, gap.words, len(gap.words.names))
    others_before = {}
    lines = []
    for shots in SHOTS:
        for seed in range(seeds):
            chosen = np.random.default_rng(seed).permutation(len(samples))[:shots]
            labelled = np.sum([samples[i].counts for i in chosen], axis=0) > 0
            of_draw = "all" if gap.other else (shots, seed)
            if of_draw not in others_before:
                others_before[of_draw] = of_others(gap.words, before, labelled)
            for way in ways:
                start = time.process_time()
                tuning = fit_samples(segmenter, [samples[i] for i in chosen], gap.words, text, way, fits)
                took = time.process_time() - start
                own = measured(segmenter, test, tuning.vocabulary, len(gap.words.names))
                asked = labelled if gap.other is None else np.ones(len(own), bool)
                lines.append(
                    {
                        "gap": gap.name,
                        "images": shots,
                        "seed": seed,
                        "what": way,
                        "before": mean(before[asked]),
                        "after": mean(own[asked]),
                        "others before": others_before[of_draw],
                        "others after": of_others(tuning.vocabulary, own, labelled),
                        "steps": tuning.steps,
                        "own estimate": [tuning.before.miou, *(one.miou for one in tuning.after)],
                        "seconds": took,
                        "seconds an image": seconds,
                    }
                )
                print(json.dumps(lines[-1]), flush=True)
    return lines


def mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def table(lines: Sequence[dict]) -> str:
    """Return the figures as Markdown."""
    rows = [
        "| gap | labelled images | fitted | asked words, before | gain | others, before | gain | steps | seconds |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(line["gap"] for line in lines):
        for shots in SHOTS:
            for way in WAYS:
                found = [one for one in lines if (one["gap"], one["images"], one["what"]) == (name, shots, way)]
                if not found:
                    continue
                steps = "/".join(str(line["steps"]) for line in found)
                seconds = np.mean([line["seconds"] for line in found])
                rows.append(f"| {name} | {shots} | {way} | {gains(found)} | {steps} | {seconds:.1f} |")
    return "\n".join(rows)


def gains(lines: Sequence[dict]) -> str:
    """Return four cells of Markdown: asked words before and their gain, and the same of the others."""
    cells = []
    for whose in ("", "others "):
        before, after = (np.array([line[f"{whose}{when}"] for line in lines], float) for when in ("before", "after"))
        cells += [f"{100 * np.mean(before):.1f}", interval(100 * (after - before))]
    return " | ".join(cells)


def interval(gains: np.ndarray) -> str:
    """Return the mean with the half width of its 95 % interval, unless all are equal."""
    if len(gains) < 2 or np.ptp(gains) < 1e-9:
        return f"{gains.mean():+.1f}"
    half = student.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / len(gains) ** 0.5
    return f"{gains.mean():+.1f} ± {half:.1f}"


def main() -> None:
    """Parse the command line, measure, print the table and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of photographs; without it, drawn scenes alone")
    parser.add_argument("--out", type=Path, default=Path("out/tune.json"))
    parser.add_argument("--seeds", type=int, default=3, help="draws of labelled images")
    parser.add_argument("--pool", type=int, default=40, help="images that can be labelled")
    parser.add_argument("--tests", type=int, default=50, help="test images of each gap")
    parser.add_argument("--only", choices=NAMES, help="the one gap of this name")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--fits", type=int, default=3, help="fits of each draw, whose mean is measured")
    parser.add_argument("--show", nargs="+", type=Path, help="print the table of figures that were written, and stop")
    options = parser.parse_args()
    if options.show:
        print(table([line for file in options.show for line in json.loads(file.read_text())]))
        return
    lines, cache = [], {}
    for gap in gaps(options.data, options.pool, options.tests, options.only):
        lines += run(gap, options.seeds, options.ways, options.fits, cache)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(lines, indent=1))
    print(table(lines))


if __name__ == "__main__":
    main()
