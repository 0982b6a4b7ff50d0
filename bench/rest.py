"""Measure "none of these": pixels of no asked word, on drawn scenes and photographs with words left out.

    python bench/rest.py --model tiny
    python bench/rest.py --model photo --data ../shared/data
    python bench/rest.py --model photo --data ../shared/data --others --share 2 2.3 2.6 3 --without-contrast

Of each image, some words are asked for (one that it shows, the others drawn); pixels of all others are unknown. Ways to
tell them: contrast words, a share of "no object", or both. AUROC and FPR95 are of the share of the score that no asked
word has, which needs no threshold. Scores are compared at some 3,000 pixels an image.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import contrast_words as contrast
import opensan
from opensan.assemble.bands import to_array
from opensan.assemble.interpolation import interpolation_matrices
from opensan.lab.san_training import SceneDataset
from opensan.lab.scenes import SEGMENTATION_NAMES
from opensan.vocabulary import Vocabulary, Word

OWN = 'of "no object" what the model says (--rest)'
WAYS = {
    "nothing: as without --rest": (0, 0.0),
    OWN: (0, None),
    "64 contrast words": (64, 0.0),
    '64 words, 0.15 of "no object"': (64, 0.15),
    '64 words, 0.3 of "no object"': (64, 0.3),
}
"""Way -> number of contrast words, factor of "no object" (None: `rest_share` of the model's configuration)."""

SETS = {"animals6": None, "coco_small": None, "camvid": "test.txt"}


@dataclass(frozen=True)
class Sample:
    """An image's proposals and truth at some pixels."""

    masks: np.ndarray
    """[Q, N] float32."""
    embeddings: np.ndarray
    """[Q, D]."""
    truth: np.ndarray
    """[N] int: index into the set's words; -1 unlabelled; -2 of no word of the set."""


def sample(segmenter, image, labels) -> Sample:
    """Encode an image and keep some of its pixels."""
    encoding = segmenter.encode(image)
    height, width = encoding.sizes.image
    rows, columns = (
        np.arange(height // 12, height, max(1, height // 48)),
        np.arange(width // 16, width, max(1, width // 64)),
    )
    logits = to_array(encoding["mask_logits"])
    down, across = interpolation_matrices(logits.shape[1:], encoding.sizes)
    values = down[rows] @ logits @ across[columns].T
    masks = 1 / (1 + np.exp(-values.reshape(len(values), -1)))
    return Sample(masks, to_array(encoding["mask_embeddings"]), labels[np.ix_(rows, columns)].ravel().astype(int))


def sets(segmenter, data: Path | None, count: int, others: bool) -> Iterator[tuple[str, list[str], list[Sample]]]:
    """Yield each set's name, words and samples; `others`: of the photographs half-way between those of each set."""
    if data is None:
        scenes = SceneDataset(99, count, (192, 256), "test", SEGMENTATION_NAMES)
        yield "drawn scenes", list(SEGMENTATION_NAMES), [sample(segmenter, *scenes[i]) for i in range(count)]
        return
    for name, listed in SETS.items():
        folder = data / name
        classes = [line.strip() for line in (folder / "classes.txt").read_text().splitlines() if line.strip()]
        first = int(classes[0].startswith("background"))
        files = sorted((folder / "images").iterdir())
        if listed:
            stems = {Path(line).stem for line in (folder / listed).read_text().split()}
            files = [file for file in files if file.stem in stems]
        samples = []
        step = max(1, len(files) // count)
        for file in files[step // 2 if others else 0 :: step][:count]:
            values = np.asarray(Image.open(folder / "labels" / f"{file.stem}.png")).astype(int)
            labels = np.where(values == 255, -1, np.where(values < first, -2, values - first))
            samples.append(sample(segmenter, str(file), labels))
        yield name, classes[first:], samples


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the area under the ROC curve; ties count a half by a tiny noise."""
    scores = scores + np.random.default_rng(0).uniform(0, 1e-9, len(scores))
    ranks = np.empty(len(scores))
    ranks[scores.argsort()] = np.arange(1, len(scores) + 1)
    count = positive.sum()
    return (ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(scores) - count))


class Measured:
    """Sums over images of one way and number of words."""

    def __init__(self, words: int) -> None:
        self.overlap = np.zeros((3, words))
        self.right = np.zeros((2, 2))
        self.areas: list[float] = []
        self.misses: list[float] = []

    def add(self, truth, labels, asked, doubt) -> None:
        """Add an image: truth and labels [N] (-9: none), and the share of the score that no asked word has."""
        known = truth != -1
        wanted = np.isin(truth, asked)
        unknown = known & ~wanted
        self.right[0] += (labels[unknown] == -9).sum(), unknown.sum()
        self.right[1] += (labels[wanted] == truth[wanted]).sum(), wanted.sum()
        for word in asked:
            true, found = truth == word, (labels == word) & known
            self.overlap[:, word] += (true & found).sum(), (true | found).sum(), true.sum()
        if unknown.any() and wanted.any():
            self.areas.append(auroc(doubt[known], unknown[known]))
            self.misses.append(float((doubt[unknown] <= np.quantile(doubt[wanted], 0.95)).mean()))

    def row(self) -> list[float]:
        common, union, true = self.overlap
        iou = (common / np.maximum(union, 1))[true > 0].mean()
        right = self.right[:, 0] / np.maximum(self.right[:, 1], 1)
        return [100 * value for value in (np.mean(self.areas), np.mean(self.misses), *right, iou)]


def measure(
    segmenter, words: list[str], samples: list[Sample], asked_count: int, draws: int, ways
) -> dict[str, list[float]]:
    """Return the figures of each way: AUROC, FPR95, unknown pixels right, asked pixels right, mIoU."""

    def rows(vocabulary: Vocabulary) -> np.ndarray:
        return to_array(segmenter.text.classifier(vocabulary).rows)

    names = list(contrast.pool()) if any(WAYS[way][0] for way in ways) else words
    unseen = set(segmenter.text.unseen_texts(Vocabulary(tuple(map(Word, names)))))
    names = [name for name in names if name not in unseen]
    pool, own = rows(contrast.pool_vocabulary(names)), rows(Vocabulary(tuple(map(Word, words))))
    null, scale = to_array(segmenter.model.no_object_row()), float(segmenter.model.clip.logit_scale.exp())
    found = {way: Measured(len(words)) for way in (*ways, "all words of the set named")}
    generator = np.random.default_rng(0)
    for image in samples:
        shown = np.unique(image.truth[image.truth >= 0])
        for _ in range(draws if len(shown) else 0):
            first = generator.choice(shown)
            others = [word for word in range(len(words)) if word != first]
            asked = np.array([first, *generator.permutation(others)[: asked_count - 1]])
            vocabulary = Vocabulary(tuple(Word(words[word]) for word in asked))
            among = pool[:0]
            if any(WAYS[way][0] for way in ways):
                chosen = contrast.choose(names, pool, vocabulary, own[asked], 64)
                among = pool[[names.index(name) for name in chosen]]
            for way in ways:
                count, share = WAYS[way]
                share = segmenter.rest_share if share is None else share
                table = np.concatenate([own[asked], among[:count], null])
                probabilities = softmax(scale * image.embeddings @ table.T)
                scores = probabilities[:, :-1].T @ image.masks
                nothing = share * probabilities[:, -1] @ image.masks
                mine, rest = scores[: len(asked)], scores[len(asked) :]
                none = nothing
                if len(rest):
                    rest[0] += nothing
                    none = rest.max(axis=0)
                labels = np.where(mine.max(axis=0) >= none, asked[mine.argmax(axis=0)], -9)
                whole = mine.sum(axis=0) + (rest.sum(axis=0) if len(rest) else nothing) + 1e-9
                doubt = 1 - mine.max(axis=0) / whole if count or share else -mine.max(axis=0)
                found[way].add(image.truth, labels, asked, doubt)
            probabilities = softmax(scale * image.embeddings @ np.concatenate([own, null]).T)[:, :-1]
            labels = (probabilities.T @ image.masks).argmax(axis=0)
            labels = np.where(np.isin(labels, asked), labels, -9)
            found["all words of the set named"].add(image.truth, labels, asked, (labels == -9).astype(float))
    return {way: measured.row() for way, measured in found.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", type=Path, help="the folder of animals6, coco_small and camvid; without: scenes")
    parser.add_argument("--images", type=int, default=24, help="images of each set")
    parser.add_argument("--draws", type=int, default=2, help="times that words are drawn for an image")
    parser.add_argument(
        "--share", type=float, nargs="+", help='factors of "no object", measured in turn; default: the model\'s'
    )
    parser.add_argument("--others", action="store_true", help="other photographs: those that a factor is chosen on")
    parser.add_argument("--without-contrast", action="store_true", help="leave out the ways with contrast words")
    options = parser.parse_args()
    ways = [way for way, (count, _) in WAYS.items() if not (count and options.without_contrast)]
    segmenter = opensan.load(options.model)
    shares = options.share or [segmenter.rest_share]
    print(
        "| set | words | way | AUROC | FPR95 | others right | asked right | mIoU |\n|---|---|---|---|---|---|---|---|"
    )
    for name, words, samples in sets(segmenter, options.data, options.images, options.others):
        for count, share in itertools.product((1, 3, 10), shares):
            segmenter.rest_share = share
            if count < len(words):
                for way, row in measure(segmenter, words, samples, count, options.draws, ways).items():
                    way = f"{way}, {share}" if options.share and way == OWN else way
                    print(
                        f"| {name} | {count} | {way} | " + " | ".join(f"{value:.1f}" for value in row) + " |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
