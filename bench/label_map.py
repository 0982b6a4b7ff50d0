"""How much faster and smaller is the label map than the plain one? Interleaved pairs, medians, peak memory.

    python bench/label_map.py [--pairs 7] [--threads 2] [--json FILE] [--skip-memory]
    python bench/label_map.py --methods [--threads 1] [--words 7 20 50 100 171 300 847 3000 10000]

With `--methods`, the ways of computing the label map on a CPU are compared with each other, for each number of words:
all words at all pixels, a band of rows at a time; blocks of pixels that bounds decide as a whole; and `label_map`, that
begins with bounds and goes on by bands where they decide hardly anything.

Rows without it:

- `label map`: from 100 mask logits (40x40) and class probabilities to labels at 640x640; plain is the official
  sequence in full: masks resized to the padded image, cropped, resized to the photograph, sigmoid, scores of every
  word at every pixel as one tensor, argmax.
- `relabel`: `Segmentation.relabel` with 20 words whose text rows exist, against the plain whole `segment` of the same
  photograph by bench/plain.py (san-vit-b16, random weights: only its time matters).
- `words`: the whole `segment` with 10,000 words against 171, ours both (ratio: 10,000 / 171).
- `memory`: peak resident memory of encoding and labelling 4000x3000 with 847 words, over the loaded model's (Linux).
  Labelled are the random weights' own masks and then masks `noise` of that size with words `peaked`.

Random weights give masks and class probabilities that no trained model gives, so these are made:

- masks `objects`: 24 regions with wavy borders, 2 to 4 queries to a region; a query's logits are the signed distance
  to its region's border, 2 to 6 a grid cell, cut at -14 and 9, plus noise of 0.6; a third of the queries are weak
  (6 lower). Masks `noise`: independent normal logits of deviation 4 at every grid point: nothing is smooth.
- words `peaked`: text rows in 512 dimensions in clusters of 8 near-synonyms (cosine 0.8 within, 0.55 between), mask
  embeddings near the row of their region's word, weak ones near "no object"; class logits scaled so that a trained
  model's gaps result: a sure query gives its word about 0.8, the rest to its neighbours in meaning, a weak one gives
  0.99 to "no object". Words `flat`: softmax of uniform numbers in [0, 1], nearly 1 / K for all.
- `tiny`: masks and class probabilities of the packaged model on a packaged scene, asked the same number of words.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import opensan
from opensan.assemble import labels
from opensan.assemble.labels import label_map, label_map_by_bands, label_map_by_bounds
from opensan.assemble.scores import label_scores
from opensan.structures import ImageSizes, TextClassifier
from opensan.vocabulary import Vocabulary
from plain import PlainSAN

QUERIES, GRID, REGIONS = 100, 40, 24
SIZES = ImageSizes((640, 640), (640, 640), (640, 640))
SCENE = Path(opensan.__file__).parent / "assets/scenes/court.png"
CLEAR_MARGIN = 1e-4


def object_masks(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mask logits [Q, h, w], the region of each query [Q], and which queries are weak [Q] bool."""
    wave = F.interpolate(torch.randn(1, 2, 12, 12, generator=generator), size=(GRID, GRID), mode="bicubic")[0]
    place = torch.stack(torch.meshgrid(torch.arange(GRID) + 0.5, torch.arange(GRID) + 0.5, indexing="ij")) + 1.2 * wave
    centres = GRID * torch.rand(REGIONS, 2, 1, 1, generator=generator)
    distance = (place - centres).norm(dim=1) - 6 * torch.rand(REGIONS, 1, 1, generator=generator)
    nearest = distance.topk(2, dim=0, largest=False).values
    others = torch.where(distance == nearest[0], nearest[1], nearest[0])
    region = torch.arange(QUERIES) % REGIONS
    slope = 2 + 4 * torch.rand(QUERIES, 1, 1, generator=generator)
    logits = (slope * (others - distance)[region] / 2).clamp(-14, 9)
    logits += 0.6 * torch.randn(logits.shape, generator=generator)
    weak = (torch.rand(QUERIES, generator=generator) < 0.45) & (torch.arange(QUERIES) >= REGIONS)
    return logits - 6 * weak[:, None, None], region, weak


def peaked_classes(words: int, region: torch.Tensor, weak: torch.Tensor, generator: torch.Generator):
    """Mask embeddings [Q, D] and unit text rows [K + 1, D], "no object" last; see the head of this file."""
    dimension = 512
    draw = lambda *shape: torch.randn(*shape, dimension, generator=generator)  # noqa: E731
    common, cluster = draw(1), torch.randint(0, max(1, words // 8), (words,), generator=generator)
    rows = F.normalize(common + 0.65 * draw(words)[cluster] + 0.6 * draw(words), dim=1)
    rows = torch.cat([rows, F.normalize(common + draw(1), dim=1)])
    word = torch.randint(0, words, (REGIONS,), generator=generator)[region].masked_fill(weak, words)
    embeddings = F.normalize(rows[word] + 0.05 * draw(QUERIES), dim=1)
    return embeddings, rows


PEAKED_SCALE = 30.0
"""Times cosines; a trained model's 100 meets gaps a fifth as large between its image and text embeddings."""


def cases(words: int) -> dict[str, tuple[torch.Tensor, torch.Tensor, ImageSizes]]:
    """Name -> mask logits, class probabilities, sizes."""
    generator = torch.Generator().manual_seed(0)
    masks, region, weak = object_masks(generator)
    embeddings, rows = peaked_classes(words, region, weak, generator)
    peaked = (PEAKED_SCALE * embeddings @ rows.T).softmax(dim=1)[:, :-1]
    flat = torch.rand(QUERIES, words + 1, generator=generator).softmax(dim=1)[:, :-1]
    noise = 4 * torch.randn(masks.shape, generator=generator)
    tiny = load("tiny", None)
    encoding = tiny.encode(SCENE)
    sizes = replace(encoding.sizes, image=(640, 640 * encoding.sizes.image[1] // encoding.sizes.image[0]))
    asked = Vocabulary.ready("ade20k_847").names[:words]
    asked += [
        f"{first} {second}" for first, second in itertools.islice(itertools.product(asked, asked), words - len(asked))
    ]
    return {
        "objects, peaked": (masks, peaked, SIZES),
        "objects, flat": (masks, flat, SIZES),
        "noise, flat": (noise, flat, SIZES),
        "tiny": (encoding.mask_logits, tiny.class_probabilities(encoding, Vocabulary.parse(asked)), sizes),
    }


def load(name: str, seed: int | None) -> opensan.SanSegmenter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights, and words that tiny has never seen: only time matters here
        return opensan.load(name, random_weights=seed, text_cache=False)


def plain_scores(mask_logits: torch.Tensor, probabilities: torch.Tensor, sizes: ImageSizes) -> torch.Tensor:
    """[K, H0, W0], in the official order."""
    masks = F.interpolate(mask_logits[None], size=sizes.padded, mode="bilinear", align_corners=False)
    masks = masks[:, :, : sizes.network[0], : sizes.network[1]]
    masks = F.interpolate(masks, size=sizes.image, mode="bilinear", align_corners=False)
    return torch.einsum("qk,qhw->khw", probabilities, masks[0].sigmoid())


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def compare(name: str, slow: Callable[[], object], fast: Callable[[], object], pairs: int) -> dict[str, object]:
    """Median seconds of both, taken turn by turn after a warm-up, and the median of the pairs' ratios."""
    slow(), fast()
    taken = [(seconds(slow), seconds(fast)) for _ in range(pairs)]
    ratios = [a / b for a, b in taken]
    slow_s, fast_s = (statistics.median(side) for side in zip(*taken, strict=True))
    print(f"| {name} | {slow_s:.3f} | {fast_s:.4f} | {statistics.median(ratios):.1f} |", flush=True)
    return {"case": name, "plain_s": slow_s, "ours_s": fast_s, "ratio": statistics.median(ratios), "ratios": ratios}


@torch.inference_mode()
def compare_label_maps(words: int, pairs: int) -> list[dict[str, object]]:
    rows = []
    for name, (masks, probabilities, sizes) in cases(words).items():
        given = (masks, probabilities, sizes)
        scores = plain_scores(*given)
        lost = scores.amax(dim=0) - scores.gather(0, label_map(*given).long()[None])[0]
        assert lost.max() <= CLEAR_MARGIN, f"{name}: labels differ from the plain ones"
        del scores
        row = compare(
            f"label map, {words} words, {name}",
            lambda given=given: plain_scores(*given).argmax(dim=0),
            lambda given=given: label_map(*given),
            pairs,
        )
        rows.append(row)
    return rows


@torch.inference_mode()
def compare_methods(words: int, rounds: int) -> list[dict[str, object]]:
    """Processor seconds of each method, taken turn by turn; the labels must be the same but for nearly equal scores."""
    methods = {"bands": label_map_by_bands, "bounds": _bounds_alone, "label_map": label_map}
    rows = []
    for name, (masks, probabilities, sizes) in cases(words).items():
        given = (masks, probabilities, sizes)
        best, *others = (label_scores(*given, method(*given)) for method in methods.values())
        assert all((one - best).abs().max() <= CLEAR_MARGIN for one in others), f"{name}: the labels differ"
        taken = [{way: processor_seconds(method, given) for way, method in methods.items()} for _ in range(rounds)]
        medians = {way: statistics.median(one[way] for one in taken) for way in methods}
        print(f"| {words:,} | {name} | " + " | ".join(f"{medians[way]:.3f}" for way in methods) + " |", flush=True)
        rows.append({"words": words, "case": name, "seconds": medians})
    return rows


def _bounds_alone(*given: object) -> torch.Tensor:
    """Bounds to the end, however little they decide."""
    before, labels.MOST_WORDS_BY_BANDS = labels.MOST_WORDS_BY_BANDS, 0
    try:
        return label_map_by_bounds(*given)
    finally:
        labels.MOST_WORDS_BY_BANDS = before


def processor_seconds(method: Callable[..., object], given: tuple) -> float:
    """Of all threads: with one thread, other work on the machine hardly changes it."""
    start = time.process_time()
    method(*given)
    return time.process_time() - start


class GivenWords:
    """In place of `SanSegmenter.text`: rows that exist already, whatever the vocabulary says."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._classifier = TextClassifier(rows, torch.arange(len(rows)), len(rows))

    def classifier(self, _vocabulary: Vocabulary) -> TextClassifier:
        return self._classifier


@torch.inference_mode()
def compare_relabel(pairs: int, count: int = 20) -> list[dict[str, object]]:
    """The encoding's mask embeddings and the text rows are made such that `cases`' class probabilities result."""
    segmenter = load("san-vit-b16", 0)
    plain = PlainSAN(segmenter.model)
    image = np.random.default_rng(0).integers(0, 256, (*SIZES.image, 3), dtype=np.uint8)
    encoding = segmenter.encode(image)
    generator = torch.Generator().manual_seed(0)
    masks, region, weak = object_masks(generator)
    embeddings, text = peaked_classes(count, region, weak, generator)
    dull = F.normalize(text + 40 * F.normalize(torch.randn(1, 512, generator=generator), dim=1), dim=1)
    words = [f"word {number}" for number in range(count)]
    rows = []
    for name, classes, scale in (("peaked", text, PEAKED_SCALE), ("flat", dull, 100.0)):
        segmenter.model.clip.logit_scale.fill_(np.log(scale))
        segmenter.model.no_object_embedding.copy_(classes[-1:])
        segmenter.text = GivenWords(classes[:-1])
        made = replace(encoding, arrays={"mask_logits": masks, "mask_embeddings": embeddings})
        segmentation = segmenter.segment(made, words)
        rows.append(
            compare(
                f"relabel, {count} words, objects, {name}",
                lambda rows=classes[:-1]: plain.segment(image, rows),
                lambda first=segmentation: first.relabel(words),
                pairs,
            )
        )
    return rows


def compare_words(pairs: int) -> list[dict[str, object]]:
    """Names that nobody embeds here: rows of random numbers; masks and embeddings are what random weights give."""
    segmenter = load("san-vit-b16", 0)
    image = np.random.default_rng(0).integers(0, 256, (*SIZES.image, 3), dtype=np.uint8)
    generator = torch.Generator().manual_seed(0)

    def segment(count: int, rows: torch.Tensor):
        words = [f"word {number}" for number in range(count)]
        segmenter.text = GivenWords(rows)
        return segmenter.segment(image, Vocabulary.parse(words))

    many, few = (F.normalize(torch.randn(count, 512, generator=generator), dim=1) for count in (10_000, 171))
    return [compare("segment: 10,000 words / 171", lambda: segment(10_000, many), lambda: segment(171, few), pairs)]


def measure_memory() -> dict[str, object]:
    """In a process of its own, whose peak nothing else has raised."""
    code = "import label_map; label_map.print_memory()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    row = json.loads(done.stdout)
    print(
        f"| memory, 4000x3000, 847 words | loaded {row['loaded_mib']:.0f} MiB | +{row['added_mib']:.0f} MiB "
        f"(+{row['with_confidence_mib']:.0f} with confidence) | |"
    )
    return row


@torch.inference_mode()
def print_memory() -> None:
    """Peak resident memory with the model loaded, and what encoding and labelling a large photograph adds to it."""

    def peak() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    segmenter = load("san-vit-b16", 0)
    generator = torch.Generator().manual_seed(0)
    _, region, weak = object_masks(generator)
    embeddings, text = peaked_classes(847, region, weak, generator)
    segmenter.text = GivenWords(text[:-1])
    words = [f"word {number}" for number in range(847)]
    image = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    loaded = peak()
    encoding = segmenter.segment(image, words).encoding
    noise = 4 * torch.randn(encoding.mask_logits.shape, generator=generator)  # undecided nearly everywhere
    segmentation = segmenter.segment(
        replace(encoding, arrays={"mask_logits": noise, "mask_embeddings": embeddings}), words
    )
    labelled = peak()
    assert segmentation.confidence.shape == (3000, 4000)
    figures = {"loaded_mib": loaded, "added_mib": labelled - loaded, "with_confidence_mib": peak() - loaded}
    print(json.dumps({"case": "memory, 4000x3000, 847 words"} | figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--methods", action="store_true")
    parser.add_argument("--words", type=int, nargs="+", default=[7, 20, 50, 100, 171, 300, 847, 3000, 10_000])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    if options.methods:
        print("| words | case | bands, s | bounds, s | label map, s |\n|---|---|---|---|---|")
        for words in options.words:
            rows += compare_methods(words, options.pairs)
    else:
        print("| case | plain, s | ours, s | ratio |\n|---|---|---|---|")
        for words in (20, 847):
            rows += compare_label_maps(words, options.pairs)
        rows += compare_relabel(options.pairs)
        rows += compare_words(options.pairs)
        if not options.skip_memory:
            rows.append(measure_memory())
    if options.json:
        about = {"threads": options.threads, "pairs": options.pairs}
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
