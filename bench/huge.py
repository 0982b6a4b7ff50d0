"""Images too large to segment at once: time and memory of a huge GeoTIFF, and how far tiles leave seams.

    python bench/huge.py huge [--side 20000] [--tile 960] [--folder /tmp/huge]
    python bench/huge.py seams [--scenes 4]

Both use the packaged model and drawn scenes, of which every pixel's word is known. `huge` draws the GeoTIFF if it is
not there, runs the command in a process of its own, and reports that process's time and peak memory.
"""

import argparse
import multiprocessing
import resource
import subprocess
import sys
import time
from pathlib import Path

SCENE = 1000
"""Side of the scenes that the huge image is laid out with, in pixels; drawn at half of that, as the model saw them."""
DRAWN = 16
"""So many different scenes, each in eight orientations."""


def huge_scenes():
    """Image [SCENE, SCENE, 3] uint8 and labels [SCENE, SCENE] uint8 (in SEGMENTATION_NAMES) of each."""
    import numpy as np

    from opensan.lab.scenes import label_map, make_scene

    for which in range(DRAWN):
        scene = make_scene(77, which, (SCENE // 2, SCENE // 2), split="test", objects=(4, 7))
        both = [array.repeat(2, axis=0).repeat(2, axis=1) for array in (scene.image, label_map(scene).astype(np.uint8))]
        for turns in range(4):
            turned = [np.rot90(array, turns) for array in both]
            yield turned
            yield [array[:, ::-1] for array in turned]


def draw(path: Path, truth: Path, side: int) -> None:
    """A GeoTIFF of `side` x `side` pixels of 0.5 m, and one of its words, laid out with scenes row by row."""
    import numpy as np
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    scenes = list(huge_scenes())
    common = {
        "driver": "GTiff", "height": side, "width": side, "dtype": "uint8", "crs": "EPSG:32632", "tiled": True,
        "transform": from_origin(500_000, 5_300_000, 0.5, 0.5), "blockxsize": 512, "blockysize": 512,
    }  # fmt: skip
    colours = {"count": 3, "compress": "jpeg", "photometric": "ycbcr", "jpeg_quality": 90}
    rng = np.random.default_rng(0)
    with (
        rasterio.open(path, "w", **common, **colours) as image,
        rasterio.open(truth, "w", **common, count=1, compress="deflate") as words,
    ):
        for top in range(0, side, SCENE):
            chosen = [scenes[number] for number in rng.integers(len(scenes), size=-(-side // SCENE))]
            rows = min(SCENE, side - top)
            window = Window(0, top, side, rows)
            pixels, labels = (np.concatenate(part, axis=1)[:rows, :side] for part in zip(*chosen, strict=True))
            image.write(pixels.transpose(2, 0, 1), window=window)
            words.write(labels, 1, window=window)


def asked() -> list[str]:
    """The words that the huge image is asked for: shapes and grounds, without colours."""
    from opensan.lab.scenes import SEGMENTATION_NAMES

    return list(dict.fromkeys(name.split()[-1] for name in SEGMENTATION_NAMES))


def accuracy(found: Path, truth: Path) -> float:
    """Share of pixels with the right one of the words asked."""
    import numpy as np
    import rasterio

    from opensan.lab.scenes import SEGMENTATION_NAMES

    word = np.array([asked().index(name.split()[-1]) for name in SEGMENTATION_NAMES])
    right = total = 0
    with rasterio.open(found) as labels, rasterio.open(truth) as words:
        for _, window in words.block_windows(1):
            right += int((labels.read(1, window=window) == word[words.read(1, window=window)]).sum())
            total += window.width * window.height
    return right / total


def huge(side: int, tile: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image, truth = folder / f"scenes{side}.tif", folder / f"truth{side}.tif"
    if not truth.exists():  # in a process of its own: a child's peak memory counts from its parent's size
        process = multiprocessing.get_context("spawn").Process(target=draw, args=(image, truth, side))
        process.start()
        process.join()
    print(f"image: {side} x {side} pixels, {image.stat().st_size / 1e6:.0f} MB", flush=True)
    words = folder / "words.txt"
    words.write_text("\n".join(asked()) + "\n")
    command = [
        sys.executable, "-m", "opensan", "segment-raster", image, "--words-file", words, "--model", "tiny",
        "--tile", tile, "--out", folder / "out",
    ]  # fmt: skip
    start = time.perf_counter()
    subprocess.run([str(part) for part in command], check=True)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"time: {seconds:.0f} s, of which processor {usage.ru_utime + usage.ru_stime:.0f} s (drawing included)")
    print(f"peak memory: {usage.ru_maxrss / 2**20:.2f} GiB")
    for path in sorted((folder / "out").glob(f"{image.stem}.*")):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    print(f"right pixels: {accuracy(folder / 'out' / f'{image.stem}.labels.tif', truth):.1%}")


# ------------------------------------------------------------------------------------------------------------- seams

SIDE, TILE, NEAR = 1920, 480, 32
"""Pixels of the image and of its tiles, and how near a tile's border counts as near."""


def untiled(segmenter, image, vocabulary):
    """Labels of the image in one piece, at the scale that tiles are seen at."""
    from dataclasses import replace

    import numpy as np
    from PIL import Image

    from opensan.images import PreparedImage, prepare
    from opensan.segmenters.results import InputImage

    config = segmenter.image_config
    side = SIDE * config.short_side // TILE
    small = np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    prepared = prepare(small, config, resize=False)
    prepared = PreparedImage(prepared.pixels, replace(prepared.sizes, image=(SIDE, SIDE)))
    return segmenter.segment(segmenter.encode_prepared([InputImage(None, prepared)])[0], vocabulary).labels


def near_borders(tiling):
    """[SIDE, SIDE] bool: within NEAR pixels of where a tile begins or ends, the image's own border aside."""
    import numpy as np

    near = np.zeros(SIDE, dtype=bool)
    for start in tiling.lefts:
        for border in (start, start + TILE):
            if 0 < border < SIDE:
                near[max(0, border - NEAR) : border + NEAR] = True
    return near[:, None] | near


def breaks(labels, tiling) -> float:
    """How many times as often labels change across a tile's border as across any line (the median)."""
    import numpy as np

    borders = sorted({edge - 1 for left in tiling.lefts for edge in (left, left + TILE) if 0 < edge < SIDE})
    changes = [(labels[:, 1:] != labels[:, :-1]).mean(axis=0), (labels[1:] != labels[:-1]).mean(axis=1)]
    return float(np.mean([line[borders].mean() / np.median(line) for line in changes]))


def seams(count: int) -> None:
    import numpy as np

    import opensan
    from opensan.jobs import tiles
    from opensan.lab.scenes import label_map, make_scene
    from opensan.vocabulary import Vocabulary

    border_weights = tiles.border_weights

    def all_to_the_inner(length, overlap):
        """All weight to the tile whose border is farther away."""
        return border_weights(length, overlap) ** 40 + 1e-30

    segmenter = opensan.load("tiny")
    vocabulary = Vocabulary.parse(asked())
    cases = {"no overlap": 0, "overlap 1/5": TILE // 5, "overlap 1/4": TILE // 4, "overlap 1/2": TILE // 2}
    rows = {name: [] for name in cases}
    rows["overlap 1/4, cut in the middle"] = []
    for index in range(count):
        scene = make_scene(88, index, (SIDE, SIDE), split="test", objects=(40, 60), radius=(0.028, 0.06))
        truth, reference = label_map(scene, vocabulary.names), untiled(segmenter, scene.image, vocabulary)
        for name in rows:
            tiling = tiles.Tiling.plan((SIDE, SIDE), TILE, cases.get(name, TILE // 4))
            if "cut" in name:
                tiles.border_weights = all_to_the_inner
            labels = np.concatenate(
                list(tiles.label_by_tiles(segmenter, tiles.ArrayRaster(scene.image), vocabulary, tiling))
            )
            tiles.border_weights = border_weights
            near = near_borders(tiling)
            shares = [
                (one != other)[place].mean()
                for one, other in ((labels, reference), (labels, truth), (reference, truth))
                for place in (near, ~near)
            ]
            rows[name].append([tiling.count, *shares, breaks(labels, tiling), breaks(reference, tiling)])
    print(
        "| tiles | number | differs from untiled: near borders | elsewhere | wrong: near borders | elsewhere "
        "| untiled wrong: near | elsewhere | breaks at borders | untiled |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, values in rows.items():
        number, *shares, own, other = np.mean(values, axis=0)
        print(f"| {name} | {number:.0f} | {' | '.join(f'{share:.2%}' for share in shares)} | {own:.2f} | {other:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["huge", "seams"])
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--tile", type=int, default=960)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/huge"))
    parser.add_argument("--scenes", type=int, default=4)
    options = parser.parse_args()
    if options.what == "huge":
        huge(options.side, options.tile, options.folder)
    else:
        seams(options.scenes)


if __name__ == "__main__":
    main()
