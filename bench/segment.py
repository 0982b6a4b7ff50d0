"""How fast is a whole `segment`, by number of words, by size of photograph, by part; and what memory does it take?

    python bench/segment.py words [--model san-vit-b16] [--pairs 7] [--threads 2] [--out FOLDER]
    python bench/segment.py sizes ...
    python bench/segment.py parts ...
    python bench/segment.py memory ...

Four ways take turns in one process, so that a busy machine slows all of them: *plain* (bench/plain.py, the
official order), and the three speeds of `opensan.load`. Times are medians, ratios medians of the pairs'.
Weights are filled by the rule of the recorded goldens, words are seeded random rows (text is embedded beforehand,
once a vocabulary, whatever the number of photographs), the photograph is a bundled scene, resized.
Plain is left out where its scores alone would need more than --plain-gib.
"""

import argparse
import ctypes
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import opensan
from opensan.assemble.labels import label_map
from opensan.checkpoints.presets import PRESETS
from opensan.images import prepare
from opensan.model import SAN
from opensan.parity.golden import golden_model
from opensan.segmenters.san import SanSegmenter
from opensan.structures import ImageSizes, Proposals, TextClassifier
from opensan.vocabulary import Vocabulary
from plain import PlainSAN

SCENE = Path(opensan.__file__).parent / "assets" / "scenes" / "playground.png"
WORDS = (20, 171, 847, 10_000)
SIZES = ((480, 640), (960, 1280), (1920, 2560), (3000, 4000), (6000, 8000))
SPEEDS = ("exact", "fast", "fastest")
WAYS = ("plain", *SPEEDS)


class RandomWords:
    """Stands where a SanSegmenter keeps its text encoder: any vocabulary's rows are random, and ready.

    They lie in the directions in which a photograph's proposals [Q, D] differ. Those of random weights differ so little
    in others that a single word would win every pixel, which makes the label map too easy.
    """

    def __init__(self, embeddings: torch.Tensor) -> None:
        self._directions = embeddings - embeddings.mean(dim=0)
        self._made: dict[int, TextClassifier] = {}

    def classifier(self, vocabulary: Vocabulary) -> TextClassifier:
        count = len(vocabulary.words)
        if count not in self._made:
            mixed = torch.randn(count, len(self._directions), generator=torch.Generator().manual_seed(0))
            rows = F.normalize(mixed @ self._directions, dim=-1)
            self._made[count] = TextClassifier(rows, torch.arange(count), count)
        return self._made[count]


class Ways:
    """A model in the ways it is computed, and its words."""

    def __init__(self, model: str, ways: Sequence[str] = WAYS, *, warm: bool = True) -> None:
        """`warm`: encode a photograph, for words that suit it. Without, nothing has run yet."""
        config = PRESETS[model].config
        san = golden_model(config)
        self.segmenters: dict[str, SanSegmenter] = {}
        for speed in SPEEDS:
            if speed in ways or (speed == "exact" and "plain" in ways):
                self.segmenters[speed] = SanSegmenter(san, speed=speed, text_cache=False)
        some = next(iter(self.segmenters.values()))
        cold = torch.randn(config.side_adapter.queries, config.clip.embed_dim)
        self.text = RandomWords(some.encode(photograph(640, 640)).mask_embeddings if warm else cold)
        for segmenter in self.segmenters.values():
            segmenter.text = self.text
        self.plain = PlainSAN(self.segmenters["exact"].model) if "plain" in ways else None

    def segment(self, way: str, image: np.ndarray, words: Vocabulary) -> np.ndarray:
        """[H0, W0] labels."""
        if way != "plain":
            return self.segmenters[way].segment(image, words).labels
        with torch.inference_mode():
            return self.plain.segment(image, self.text.classifier(words).rows).numpy()


def vocabulary(count: int) -> Vocabulary:
    return Vocabulary.parse([f"word {number}" for number in range(count)])


def photograph(height: int, width: int) -> np.ndarray:
    return np.asarray(Image.open(SCENE).convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""On a machine that does other work, only processor seconds of one thread can be compared."""


def seconds(action: Callable[[], object], clock: str = "wall") -> float:
    start = CLOCKS[clock]()
    action()
    return CLOCKS[clock]() - start


def turns(actions: dict[str, Callable[[], object]], pairs: int, clock: str = "wall") -> dict[str, object]:
    """Median seconds of each action, and median ratios to the first; one of each in turn, after a round unmeasured."""
    for action in actions.values():
        action()
    rounds = [{name: seconds(action, clock) for name, action in actions.items()} for _ in range(pairs)]
    first = next(iter(actions))
    return {
        "seconds": {name: statistics.median(one[name] for one in rounds) for name in actions},
        "ratio": {name: statistics.median(one[first] / one[name] for one in rounds) for name in actions},
        "rounds": rounds,
    }


def compare(ways: Ways, size: tuple[int, int], count: int, options: argparse.Namespace) -> dict[str, object]:
    """One case: times in turn, and how far the labels are the plain ones."""
    image, words = photograph(*size), vocabulary(count)
    plain_gib = 4 * count * size[0] * size[1] / 2**30
    names = [way for way in WAYS if way != "plain" or plain_gib <= options.plain_gib]
    labels = {way: ways.segment(way, image, words) for way in names}
    reference = labels[names[0]]
    return {
        "size": size,
        "words": count,
        "words_that_win": len(np.unique(reference)),
        "labels_alike": {way: float((labels[way] == reference).mean()) for way in names},
        "plain_scores_gib": plain_gib,
        **turns({way: lambda way=way: ways.segment(way, image, words) for way in names}, options.pairs),
    }


def by_words(options: argparse.Namespace) -> list[dict[str, object]]:
    ways = Ways(options.model)
    return [compare(ways, (640, 640), count, options) for count in options.words]


def by_size(options: argparse.Namespace) -> list[dict[str, object]]:
    ways = Ways(options.model)
    return [compare(ways, size, 171, options) for size in SIZES]


def by_part(options: argparse.Namespace) -> list[dict[str, object]]:
    """640x640, 171 words: what each part takes, in each way."""
    ways, image, words = Ways(options.model), photograph(640, 640), vocabulary(171)
    text = ways.text.classifier(words)
    parts = {"plain": plain_parts(ways.plain, image, text)}
    for speed, segmenter in ways.segmenters.items():
        parts[speed] = our_parts(segmenter.model, image, text)
    rows = []
    with torch.inference_mode():
        for part in parts["plain"]:
            found = turns({way: parts[way][part] for way in WAYS}, options.pairs)
            rows.append({"part": part, **found})
    return rows


@torch.inference_mode()
def plain_parts(plain: PlainSAN, image: np.ndarray, text: TextClassifier) -> dict[str, Callable[[], object]]:
    prepared = prepare(image, plain.config.image)
    pixels, sizes = prepared.pixels.unsqueeze(0), prepared.sizes
    kept, tokens, grid = plain.shallow_clip(pixels)
    ((masks, bias),) = plain.side_adapter(pixels, kept)
    proposals = Proposals(masks, plain.recognise(tokens, bias, grid), bias)
    return {
        "resize": lambda: prepare(image, plain.config.image),
        "CLIP": lambda: plain.shallow_clip(pixels),
        "side adapter": lambda: plain.side_adapter(pixels, kept),
        "recognition": lambda: plain.recognise(tokens, bias, grid),
        "words and label map": lambda: plain.label_map(proposals, text.rows, sizes),
    }


@torch.inference_mode()
def our_parts(model: SAN, image: np.ndarray, text: TextClassifier) -> dict[str, Callable[[], object]]:
    config = model.config
    prepared = prepare(image, config.image)
    pixels = prepared.pixels.unsqueeze(0)
    features, blocks = model.shallow_features(pixels), config.side_adapter.supervised_blocks[-1:]
    ((masks, bias),) = model.side_adapter(pixels, features.maps, blocks)
    proposals = Proposals(masks, model.clip.recognise(features, bias), bias)

    def answer(sizes: ImageSizes = prepared.sizes) -> torch.Tensor:
        probabilities = model.classify(proposals, text)[0].softmax(dim=-1)[:, :-1]
        return label_map(proposals.mask_logits[0], probabilities, sizes)

    return {
        "resize": lambda: prepare(image, config.image),
        "CLIP": lambda: model.shallow_features(pixels),
        "side adapter": lambda: model.side_adapter(pixels, features.maps, blocks),
        "recognition": lambda: model.clip.recognise(features, bias),
        "words and label map": answer,
    }


def by_memory(options: argparse.Namespace) -> list[dict[str, object]]:
    """Peak memory of one `segment` over that of the loaded model, each in a process of its own."""
    rows = []
    for way in WAYS:
        for size, count in (((640, 640), 171), ((640, 640), 847), ((3000, 4000), 847)):
            if way == "plain" and 4 * count * size[0] * size[1] / 2**30 > options.plain_gib:
                continue
            command = [sys.executable, __file__, "one", "--model", options.model, "--threads", str(options.threads)]
            command += ["--way", way, "--size", *map(str, size), "--words", str(count)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append({"way": way, "size": size, "words": count, **json.loads(found)})
    return rows


def one(options: argparse.Namespace) -> None:
    """A single `segment` in this process: prints the peak memory, in GiB."""
    ways = Ways(options.model, (options.way,), warm=False)
    image, words = photograph(*options.size), vocabulary(options.words[0])
    ways.text.classifier(words)
    # Filling the weights took more memory than they do: it goes back to the system, and the peak starts anew.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    loaded = resident_gib("VmRSS")
    ways.segment(options.way, image, words)
    print(json.dumps({"loaded_gib": loaded, "more_gib": resident_gib("VmHWM") - loaded}))


def resident_gib(what: str) -> float:
    """This process's resident memory now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(what)) / 2**20


def multiplication_rate(dtype: torch.dtype, size: int = 2048, times: int = 15, clock: str = "wall") -> float:
    """GFLOP/s of a large matrix product here, the best of `times`."""
    a, b = (torch.randn(size, size).mul(30).to(dtype) for _ in range(2))
    product = torch._int_mm if dtype is torch.int8 else torch.mm
    product(a, b)
    return 2 * size**3 / min(seconds(lambda: product(a, b), clock) for _ in range(times)) / 1e9


def image_half_gflop(model: str) -> float:
    """Floating-point operations of `propose` on 640x640, two a multiply-add, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        san = opensan.model.build_san(PRESETS[model].config)
        pixels = torch.empty(1, 3, 640, 640)
    with FlopCounterMode(display=False) as counter:
        san.propose(pixels)
    return counter.get_total_flops() / 1e9


def table(what: str, rows: Sequence[dict]) -> list[str]:
    """A Markdown table of what `by_...` measured."""
    if what == "memory":
        lines = ["| way | photograph | words | loaded, GiB | and at its peak, GiB more |", "|---|---|---|---|---|"]
        return lines + [
            f"| {row['way']} | {row['size'][1]}x{row['size'][0]} | {row['words']} "
            f"| {row['loaded_gib']:.2f} | {row['more_gib']:.2f} |"
            for row in rows
        ]
    head = "part" if what == "parts" else "photograph | words | words that win"
    lines = [
        f"| {head} | {' | '.join(f'{way}, s' for way in WAYS)} | {' | '.join(f'plain / {way}' for way in SPEEDS)} "
        f"| labels alike: {' | '.join(SPEEDS)} |",
        "|---" * (head.count("|") + 1 + len(WAYS) + 2 * len(SPEEDS)) + "|",
    ]
    for row in rows:
        about = row.get("part") or f"{row['size'][1]}x{row['size'][0]} | {row['words']} | {row['words_that_win']}"
        plain = "plain" in row["seconds"]
        cells = [f"{row['seconds'][way]:.3f}" if way in row["seconds"] else "-" for way in WAYS]
        cells += [f"{row['ratio'][way]:.2f}" if plain else "-" for way in SPEEDS]
        alike = row.get("labels_alike") if plain else None
        cells += [f"{100 * alike[way]:.3f} %" if alike else "-" for way in SPEEDS]
        lines.append(f"| {about} | {' | '.join(cells)} |")
    return lines


def draw(what: str, rows: Sequence[dict], path: Path) -> None:
    """The curves of `words` or `sizes`: seconds over words or megapixels, a line a way."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install 'opensan[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for way in WAYS:
        found = [row for row in rows if way in row["seconds"]]
        across = [row["words"] if what == "words" else math.prod(row["size"]) / 1e6 for row in found]
        axes.plot(across, [row["seconds"][way] for row in found], marker="o", label=way)
    axes.set(xscale="log", ylim=(0, None), ylabel="seconds for one photograph")
    axes.set_xlabel("words" if what == "words" else "photograph, megapixels")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("words", "sizes", "parts", "memory", "one"))
    parser.add_argument("--model", default="san-vit-b16", choices=("san-vit-b16", "san-vit-l14"))
    parser.add_argument("--words", type=int, nargs="+", default=list(WORDS))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plain-gib", type=float, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder for the JSON, the table and the picture")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "one":
        one(options)
        return
    measure = {"words": by_words, "sizes": by_size, "parts": by_part, "memory": by_memory}[options.what]
    rows = measure(options)
    lines = table(options.what, rows)
    rates = {str(dtype)[6:]: multiplication_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    gflop = image_half_gflop(options.model)
    lines += ["", f"{options.model}, {options.threads} threads; a large matrix product reaches "
              f"{rates['float32']:.0f} GFLOP/s in float32, {rates['bfloat16']:.0f} in bfloat16; "
              f"our image half of 640x640 is {gflop:.0f} GFLOP."]  # fmt: skip
    print("\n".join(lines))
    if options.out:
        save(options, rows, lines, {"gflops": rates, "image_half_gflop": gflop})


def save(options: argparse.Namespace, rows: Sequence[dict], lines: Sequence[str], machine: dict) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"segment-{options.what}-{options.model}"
    about = {"model": options.model, "threads": options.threads, "pairs": options.pairs, **machine}
    (options.out / f"{stem}.json").write_text(json.dumps({**about, "rows": rows}, indent=2))
    (options.out / f"{stem}.md").write_text("\n".join(lines) + "\n")
    if options.what in ("words", "sizes"):
        draw(options.what, rows, options.out / f"{stem}.png")


if __name__ == "__main__":
    main()
