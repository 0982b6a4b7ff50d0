"""Are all polygons of exports and rasters valid?

    python bench/valid_polygons.py [--count 1000]

Traces random label maps, of noise and of blobs, and asks shapely (OGC Simple Features) about each polygon: those with
holes, as rasters have them, and those without, as YOLO has them.
"""

import argparse

import numpy as np
import shapely
from scipy import ndimage

from opensan.outputs.datasets import SPECK
from opensan.outputs.polygons import regions, without_holes


def label_map(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 40, 2))
    if seed % 2:
        return rng.integers(-1, rng.integers(1, 4), shape)
    return ndimage.gaussian_filter(rng.normal(size=(3, *shape)), (0, 1.5, 1.5)).argmax(axis=0) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="label maps")
    count = parser.parse_args().count
    found = {"with holes": [0, 0], "without holes": [0, 0]}
    for seed in range(count):
        for region in regions(label_map(seed)):
            polygons = {
                "with holes": [shapely.Polygon(region.outline, region.holes)],
                "without holes": [shapely.Polygon(ring) for ring in without_holes(region, SPECK)],
            }
            for kind, made in polygons.items():
                found[kind][0] += len(made)
                found[kind][1] += sum(not polygon.is_valid for polygon in made)
    for kind, (polygons, invalid) in found.items():
        print(f"{kind}: {polygons:,} polygons of {count:,} label maps, {invalid} invalid")
    raise SystemExit(any(invalid for _, invalid in found.values()))


if __name__ == "__main__":
    main()
