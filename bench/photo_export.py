"""How large, fast and exact is the exported model `photo`, where torch is not installed?

    python bench/photo_export.py write FOLDER
    python -m venv fresh
    fresh/bin/pip install --no-deps . && fresh/bin/pip install -r FOLDER/float32/requirements.txt
    fresh/bin/python bench/photo_export.py measure FOLDER [--rounds 15] [--threads 2]

`write` exports the model in float32 and int8, and keeps torch's labels of the four photographs that come with the
package, with the words of `opensan demo`. `measure` labels them with each export, and times a whole `segment` of
480x640 pixels (the photographs, resized) with words that are embedded already; the exports take turns.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

import opensan
from opensan.cli.demo import PHOTOGRAPHS, WORDS

DTYPES = ("float32", "int8")
SIZE = (480, 640)


def write(folder: Path) -> None:
    """Export, with torch; keep torch's labels."""
    from export import converted  # bench/export.py
    from opensan.checkpoints import load_model
    from opensan.export import export

    folder.mkdir(parents=True, exist_ok=True)
    wall, processor = time.perf_counter(), time.process_time()
    whole, found = export(load_model("photo"), folder / "float32")
    seconds = f"{time.perf_counter() - wall:.0f} s ({time.process_time() - processor:.0f} s of a processor)"
    print(f"exported in {seconds}, passed: {found.passed}, labels alike: {found.agreement:.4f}")
    converted(whole, folder / "int8", "onnx", "int8")
    segmenter = opensan.load("photo", text_cache=False)
    np.savez(folder / "torch.npz", **{name: labels(segmenter, name) for name in WORDS})


def labels(segmenter, name: str) -> np.ndarray:
    """Label a photograph of the package with its words."""
    return segmenter.segment(PHOTOGRAPHS / f"{name}.jpg", WORDS[name]).labels


def measure(folder: Path, rounds: int, threads: int) -> None:
    """Compare and time the exports, without torch."""
    if not (folder / "torch.npz").exists():
        sys.exit(f"error: {folder}: run `write` first")
    segmenters = {dtype: opensan.load(folder / dtype, threads=threads, text_cache=False) for dtype in DTYPES}
    assert "torch" not in sys.modules
    shape = SIZE[::-1]
    images = {name: np.array(Image.open(PHOTOGRAPHS / f"{name}.jpg").convert("RGB").resize(shape)) for name in WORDS}
    seconds: dict[str, list[tuple[float, float]]] = {dtype: [] for dtype in DTYPES}
    for number in range(-len(WORDS), rounds):  # the first of each photograph embeds its words
        name = list(WORDS)[number % len(WORDS)]
        for dtype, segmenter in segmenters.items():
            start = time.perf_counter(), time.process_time()
            segmenter.segment(images[name], WORDS[name])
            if number >= 0:
                seconds[dtype].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    print("| dtype | on disk, MB | image half, MB | ms | least | ms of the processor | labels as torch's, % |")
    print("|---|---|---|---|---|---|---|")
    with np.load(folder / "torch.npz") as expected:
        for dtype, segmenter in segmenters.items():
            sizes = {path.name: path.stat().st_size / 1e6 for path in (folder / dtype).iterdir()}
            alike = [f"{name} {100 * (labels(segmenter, name) == expected[name]).mean():.2f}" for name in WORDS]
            wall, processor = ([1000 * second for second in column] for column in zip(*seconds[dtype], strict=True))
            print(
                f"| {dtype} | {sum(sizes.values()):.1f} | {sizes['image.onnx']:.1f} | {statistics.median(wall):.0f} | "
                f"{min(wall):.0f} | {statistics.median(processor):.0f} | {', '.join(alike)} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("write", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.what == "write":
        write(options.folder)
    else:
        measure(options.folder, options.rounds, options.threads)


if __name__ == "__main__":
    main()
