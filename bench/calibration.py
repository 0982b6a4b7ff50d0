"""Measure confidence before and after calibration, on images that nothing was fitted on.

    python bench/calibration.py --model tiny --images 120
    python bench/calibration.py --model photo --data ../shared/data --images 60 --pictures out

`tiny` is fitted on drawn scenes of one seed and measured on those of another. `photo` is fitted on the images of
coco_small that its recipe keeps for choosing settings, and measured on those that it keeps for testing, and on other
sets. Then the same with fewer words asked: those that an image shows and others, up to the number. Printed are the
expected calibration error (15 bins), the accuracy, and what thresholds keep.
"""

import argparse
from pathlib import Path

import numpy as np

import opensan
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.evaluation.calibrate import fit_calibration
from opensan.evaluation.confidence import ConfidenceMetrics, Confidences, count_confidence
from opensan.evaluation.report import percent, picture
from opensan.lab.photo.sets import PhotoSet
from opensan.lab.san_training import SceneDataset
from opensan.lab.scenes import SEGMENTATION_NAMES

THRESHOLDS = (0.5, 0.7, 0.9)

FEW = 5
"""Words asked when few are."""


def sets(data: Path | None, count: int) -> tuple[tuple[str, object], list[tuple[str, object]]]:
    """Return what is fitted on, and what is measured, with names."""
    if data is None:
        size = (192, 256)
        fitted, tested = (SceneDataset(seed, count, size, "test", SEGMENTATION_NAMES) for seed in (5, 6))
        return ("scenes of seed 5", fitted), [("scenes of seed 6", tested)]
    tested = [
        ("coco_small, test", PhotoSet(data, "coco_small", "test")),
        ("coco_mini, test", PhotoSet(data, "coco_mini", "test")),
        ("pets, test", PhotoSet(data, "pets", "test")),
        ("camvid, test", SegmentationFolder(data / "camvid", "test")),
    ]
    return ("coco_small, val", PhotoSet(data, "coco_small", "val")), tested


def measure(segmenter, dataset, count: int, calibrations) -> dict[tuple[int | None, int], ConfidenceMetrics]:
    """Return the figures by the number of words asked (None: all) and the index of the calibration."""
    names = dataset.vocabulary.names
    sums = {(words, way): Confidences(len(names)) for words in (None, FEW) for way in range(len(calibrations))}
    generator, pixels = np.random.default_rng(0), 0
    count = min(count, len(dataset))
    for index in (number * len(dataset) // count for number in range(count)):
        image, truth = dataset[index]
        pixels += int((truth >= 0).sum())
        shown = np.unique(truth[truth >= 0])
        others = generator.permutation(np.setdiff1d(np.arange(len(names)), shown))
        few = np.sort(np.concatenate([shown, others])[: max(FEW, len(shown))])
        encoding = segmenter.encode(image)
        for words, way in sums:
            asked = np.arange(len(names)) if words is None else few
            segmenter.calibrate(calibrations[way])
            answer = segmenter.segment(encoding, [dataset.vocabulary.words[word] for word in asked])
            labels = np.where(answer.labels >= 0, asked[answer.labels], -1)
            sums[words, way].add(count_confidence(truth, labels, answer.confidence, len(names)))
    plain = [calibration and calibration.to_dict() for calibration in calibrations]
    return {(words, way): found.metrics(pixels, plain[way]) for (words, way), found in sums.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", type=Path, help="the folder of coco_small, coco_mini, pets, camvid; without: scenes")
    parser.add_argument("--images", type=int, default=60, help="images of each set")
    parser.add_argument("--pictures", type=Path, help="a folder for the reliability diagrams")
    options = parser.parse_args()
    segmenter = opensan.load(options.model)
    (name, fitted), tested = sets(options.data, options.images)
    calibration, _ = fit_calibration(segmenter, fitted, name, images=options.images)
    doubt = (
        f", {calibration.doubtful_temperature:.2f} below a score of {calibration.doubtful_below:.2f}"
        if calibration.doubtful_temperature
        else ""
    )
    print(f"fitted on {name}: {calibration.images} images, T {calibration.temperature:.2f}{doubt}\n")
    kept = " | ".join(f"at {threshold}" for threshold in THRESHOLDS)
    print(f"| set | words | confidence | ECE, % | right, % | labelled, right, mIoU (%) {kept} |")
    print("|---|---|---|---|---|" + "---|" * len(THRESHOLDS))
    for set_name, dataset in tested:
        for (words, way), found in measure(segmenter, dataset, options.images, (None, calibration)).items():
            points = [next(p for p in found.curve if p.threshold >= value - 1e-9) for value in THRESHOLDS]
            cells = [", ".join(map(percent, (p.labelled, p.accuracy, p.miou))) for p in points]
            shown, name = words or "all", ("score", "calibrated")[way]
            figures = f"{percent(found.ece)} | {percent(found.accuracy)}"
            print(f"| {set_name} | {shown} | {name} | {figures} | {' | '.join(cells)} |", flush=True)
            if options.pictures and words is None:
                options.pictures.mkdir(parents=True, exist_ok=True)
                file = f"{set_name.split(',')[0].replace(' ', '-')}-{name}.png"
                picture(found).save(options.pictures / file)


if __name__ == "__main__":
    main()
