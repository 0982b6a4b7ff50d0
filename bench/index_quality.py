"""Measure what a search finds, and how near labels from an index are to those of `segment`.

    python bench/index_quality.py --data DIR --model photo --index INDEX

DIR holds images/, labels/ (index PNGs, 255 unknown) and classes.txt, whose first line is the background. For every
class that at least --least images show, the index is searched with the other classes, the bundled words or nothing as
contrast, by region and by area; precision at 10 is the share of the first ten images (or of as many as show the
class, if fewer) in which the class is labelled. `segment` on every image, with all classes, orders images by the area
of the word's pixels. --scenes N draws lab scenes for `tiny` instead.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

import opensan
from opensan.assemble.bands import to_array
from opensan.index.masks import STEEP, mask_logits, stored_mask
from opensan.lab.scenes import SEGMENTATION_NAMES, label_map, make_scene
from opensan.segmenters.results import Encoding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="images, labels and classes.txt; made by --scenes")
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--model", default="photo")
    parser.add_argument("--scenes", type=int, default=0, help="draw so many lab scenes into --data")
    parser.add_argument("--least", type=int, default=3, help="images that show a class")
    parser.add_argument("--words", type=int, default=1000, help="most classes, the most frequent ones")
    parser.add_argument("--labelled", type=int, default=20, help="images whose labels are compared")
    parser.add_argument("--as-it-is", action="store_true", help="measure the images that the index has, and add none")
    options = parser.parse_args()
    if options.scenes and not options.data.exists():
        draw(options.data, options.scenes)
    index = opensan.Index(options.index, options.model)
    if not options.as_it_is:
        index.add(options.data / "images", exact=True)
    names = (options.data / "classes.txt").read_text().splitlines()
    present = {Path(path).stem for path in index.paths()}
    shown = {
        path.stem: {names[v] for v in np.unique(np.asarray(Image.open(path))) if 0 < v < len(names)}
        for path in sorted((options.data / "labels").glob("*.png"))
        if path.stem in present
    }
    words = [name for name in names[1:] if sum(name in on for on in shown.values()) >= options.least]
    words = sorted(words, key=lambda word: -sum(word in on for on in shown.values()))[: options.words]
    unseen = index.segmenter.unseen_texts(opensan.Vocabulary.parse(words))
    words = [word for word in words if word not in unseen]
    print(json.dumps({"images": len(shown), "words": len(words)}))
    areas = {path: segmentation.areas for path, segmentation in index.relabel(words)}
    reference = [precision(sorted(areas, key=lambda p: -areas[p][word]), word, shown) for word in words]
    print(json.dumps({"segment every image": round(float(np.mean(reference)), 4)}))
    for contrast in ("others", "bundled", "none"):
        for by in ("region", "area"):
            began, found = time.perf_counter(), []
            for word in words:
                against = {"others": [w for w in words if w != word], "bundled": None, "none": ()}[contrast]
                answer = index.search(word, against=against, by=by, top=10)  # type: ignore[arg-type]
                found.append(precision([match.path for match in answer], word, shown))
            seconds = (time.perf_counter() - began) / len(words)
            line = {"against": contrast, "by": by, "precision at 10": round(float(np.mean(found)), 4)}
            print(json.dumps({**line, "seconds a search": round(seconds, 3)}), flush=True)
    print(json.dumps({"labels like segment's": likeness(index, words, options.labelled)}))


def precision(ranked: list[str], word: str, shown: dict[str, set[str]]) -> float:
    wanted = min(10, sum(word in on for on in shown.values()))
    return sum(word in shown[Path(path).stem] for path in ranked[:wanted]) / wanted


def likeness(index: opensan.Index, words: list[str], count: int) -> dict[str, float]:
    """Return the share of pixels whose label stays, if less than the whole encoding is kept."""
    names = ("pruned", "pruned, half vectors", "and masks of one bit", "and masks of two bits")
    same: dict[str, list[float]] = {name: [] for name in names}
    for _, encoding in itertools.islice(index.encodings(), count):
        masks, vectors = to_array(encoding["mask_logits"]), to_array(encoding["mask_embeddings"])
        kept = (masks > 0).any(axis=(1, 2))
        half = vectors[kept].astype(np.float16).astype(np.float32)
        forms = {
            "pruned": (masks[kept], vectors[kept]),
            "pruned, half vectors": (masks[kept], half),
            "and masks of one bit": (np.where(masks[kept] > 0, STEEP, -STEEP).astype(np.float32), half),
            "and masks of two bits": (stored(masks[kept]), half),
        }
        expected = index.segmenter.segment(encoding, words).labels
        for name, (logits, rows) in forms.items():
            arrays = {"mask_logits": logits, "mask_embeddings": rows}
            labels = index.segmenter.segment(Encoding(arrays, encoding.sizes, encoding.model), words).labels
            same[name].append(float((labels == expected).mean()))
    return {name: round(float(np.mean(shares)), 5) for name, shares in same.items()}


def stored(masks: np.ndarray) -> np.ndarray:
    """Return masks' logits as they are after being stored."""
    return np.array([mask_logits(stored_mask(mask), mask.shape) for mask in masks], np.float32).reshape(masks.shape)


def draw(folder: Path, count: int) -> None:
    """Draw lab scenes with their masks, of all words, as a data set."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(["background", *SEGMENTATION_NAMES]) + "\n")
    for number in range(count):
        scene = make_scene(77, number, (192, 256))
        Image.fromarray(scene.image).save(folder / "images" / f"{number:04}.png")
        Image.fromarray((label_map(scene) + 1).astype(np.uint8)).save(folder / "labels" / f"{number:04}.png")


if __name__ == "__main__":
    main()
