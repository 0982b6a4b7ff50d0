"""How many images a second does a folder's run label, from files to all formats of results, against the official order?

    python bench/images_a_second.py [--images 500] [--rounds 1] [--model san-vit-b16] [--words 171]
                                    [--speeds exact fast fastest] [--threads 1 2] [--clock wall] [--json FILE]

*plain* reads each image, labels it in the official order (bench/plain.py) and writes its label map alone. Ours is
`FolderRun` with every format that there is (label map, overlay, records, objects, and all data sets). Images are JPEGs
of 640x480, the packaged scenes and photographs by turns; weights are by the rule of the recorded goldens, and words
are random rows (bench/segment.py).
Ways take turns image by image (plain) and folder by folder, so a busy machine slows all of them; with `--threads 1
--clock processor`, other work disturbs least, and what threads of a run do at the same time adds up. *Sum of the parts*
is what reading, the image half, labelling and writing take one after the other, without the data sets' common files.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import opensan
from opensan.images import open_image
from opensan.jobs.folder import FolderRun, plan
from opensan.outputs import DATASETS, FORMATS, save_label_map
from segment import CLOCKS, SPEEDS, Ways, seconds, vocabulary

ASSETS = Path(opensan.__file__).parent / "assets"


def make(folder: Path, count: int) -> list[Path]:
    """Write `count` JPEGs of 640x480, each with pixels of its own."""
    sources = [*sorted((ASSETS / "scenes").glob("*.png")), *sorted((ASSETS / "photographs").glob("*.jpg"))]
    pictures = [Image.open(path).convert("RGB").resize((640, 480)) for path in sources]
    paths = []
    folder.mkdir()
    for number in range(count):
        shifted = np.roll(np.asarray(pictures[number % len(pictures)]), number, axis=1)
        paths.append(folder / f"{number:04}.jpg")
        Image.fromarray(shifted).save(paths[-1], quality=90)
    return paths


def official(ways: Ways, paths: list[Path], words: int, out: Path) -> None:
    """Read, label and write one image after the other."""
    out.mkdir(exist_ok=True)
    asked = vocabulary(words)
    for path in paths:
        labels = ways.segment("plain", open_image(path), asked)
        save_label_map(out / f"{path.stem}.png", labels.astype(np.int32), len(asked.names))


def ours(ways: Ways, speed: str, paths: list[Path], words: int, out: Path) -> None:
    """The run of a folder, with every format."""
    jobs = plan(paths, [paths[0].parent])
    with FolderRun(ways.segmenters[speed], vocabulary(words), jobs, out, [*FORMATS, *DATASETS]) as run:
        for _ in run.results():
            pass


def parts(ways: Ways, speed: str, paths: list[Path], words: int, out: Path, clock: str) -> dict[str, float]:
    """Seconds an image of each part, one after the other."""
    segmenter, asked = ways.segmenters[speed], vocabulary(words)
    taken = dict.fromkeys(("read", "image half", "labels", "files"), 0.0)

    def timed(part: str, action: Callable[[], object]) -> object:
        result: list[object] = []
        taken[part] += seconds(lambda: result.append(action()), clock)
        return result[0]

    for path in paths:
        image = timed("read", lambda path=path: segmenter.read(path))
        (encoding,) = timed("image half", lambda image=image: segmenter.encode_read([image]))
        found = timed("labels", lambda encoding=encoding: segmenter.segment(encoding, asked))
        timed("files", lambda path=path, found=found: found.save(out, path.stem, list(FORMATS)))
    return {part: total / len(paths) for part, total in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--model", default="san-vit-b16", choices=("san-vit-b16", "san-vit-l14"))
    parser.add_argument("--words", type=int, default=171)
    parser.add_argument("--speeds", nargs="+", default=list(SPEEDS), choices=SPEEDS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways = Ways(options.model, ("plain", *options.speeds))
    rows = []
    print("| threads | way | seconds an image | plain / this | sum of the parts: read, image half, labels, files |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        paths = make(top / "images", options.images)
        official(ways, paths[:1], options.words, top / "warm-up")
        for threads in options.threads:
            torch.set_num_threads(threads)
            taken: dict[str, list[float]] = {way: [] for way in ("plain", *options.speeds)}
            for number in range(options.rounds):
                for way in taken:
                    out = top / f"{threads}-{number}-{way}"
                    if way == "plain":
                        total = seconds(lambda out=out: official(ways, paths, options.words, out), options.clock)
                    else:
                        run = lambda out=out, way=way: ours(ways, way, paths, options.words, out)  # noqa: E731
                        total = seconds(run, options.clock)
                    taken[way].append(total / len(paths))
            medians = {way: float(np.median(found)) for way, found in taken.items()}
            for way, median in medians.items():
                row = {"threads": threads, "way": way, "seconds": median, "ratio": medians["plain"] / median}
                cells = "-"
                if way != "plain":
                    some = paths[: min(len(paths), 20)]
                    row["parts"] = parts(ways, way, some, options.words, top / f"parts-{threads}", options.clock)
                    each = ", ".join(f"{part:.3f}" for part in row["parts"].values())
                    cells = f"{sum(row['parts'].values()):.3f}: {each}"
                rows.append(row)
                print(f"| {threads} | {way} | {median:.3f} | {row['ratio']:.2f} | {cells} |", flush=True)
    print(f"\n{options.images} images, {options.rounds} rounds, {options.clock} seconds, {options.words} words")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
