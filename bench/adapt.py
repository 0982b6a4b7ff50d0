"""Measure adaptation without labels over gaps between what a model learned and what it is given.

    python bench/adapt.py --data ../shared/data --out out/adapt.json

For some gaps of bench/tune.py, and drawn scenes a little faded: mean IoU over the words asked for, on test images that
the training did not see, before and after `opensan adapt` on images without labels; and over other words, on plain
scenes or on the images of another set of photographs. "Best agreement" is the teacher that the command would take;
"installed" counts the draws in which agreement rose, so that it wrote a model. Gains are means over draws of images,
with their 95 % interval (Student's t). Minutes are of processors, of the adaptation alone, with loading and scoring.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

import opensan
from opensan.checkpoints import load_model
from opensan.lab.san_training import SceneDataset
from opensan.lab.scenes import BASE_NAMES, SEGMENTATION_NAMES
from opensan.segmenters.san import SanSegmenter
from opensan.train.checkpoint import CheckpointFolder
from opensan.train.log import NoProgress
from opensan.train.loop import load_parameters
from opensan.train.optimizer import san_parameter_groups
from opensan.tune.adapt import Adaptation, AdaptSettings, adapt
from opensan.vocabulary import Vocabulary
from tune import STYLES, Gap, Pair, dark, gains, mean, photographs, scores

PHOTOGRAPHS = ("camvid", "camvid, dark and blurred", "lums_road")


def scenes(name: str, pool: int, tests: int) -> Gap:
    """Return drawn scenes of base words in another style; other words are all of them, in plain scenes."""

    def drawn(seed: int, count: int, names: Sequence[str]) -> list[Pair]:
        one = SceneDataset(seed, count, (240, 320), "masks" if names == BASE_NAMES else "test", names)
        return [one[index] for index in range(count)]

    plain = Gap("scenes", "tiny", Vocabulary.parse(list(SEGMENTATION_NAMES)), (), drawn(13, tests, SEGMENTATION_NAMES))
    images = [
        [(STYLES[name](image), labels) for image, labels in drawn(s, n, BASE_NAMES)]
        for s, n in ((11, pool), (12, tests))
    ]
    return Gap(name, "tiny", Vocabulary.parse(list(BASE_NAMES)), *images, plain)


def gap_of(name: str, root: Path | None, pool: int, tests: int) -> Gap:
    """Return a gap, with `pool` images to adapt to and `tests` to measure on."""
    if name in STYLES:
        return scenes(name, pool, tests)
    folder, _, way = name.partition(", ")
    gap = photographs(root, folder, pool, tests, dark if way else None, name)
    return replace(gap, other=photographs(root, "dhcn_corridor", 1, tests))


def figures(segmenter, gap: Gap) -> tuple[float, float]:
    """Return mean IoU over the asked words, and over the others."""
    own, others = scores(segmenter, gap)
    return mean(own), mean(others)


def best_teacher(model: str, out: Path) -> SanSegmenter:
    """Return the teacher with the best agreement, whether it was installed or not."""
    san = load_model(model)
    state = CheckpointFolder(out / "run" / "checkpoints", 1).load_best()
    load_parameters(san_parameter_groups(san), state["follower"], str(out))
    return SanSegmenter(san)


def run(gap: Gap, seed: int, images: int, settings: AdaptSettings, before: tuple[float, float]) -> dict:
    """Adapt to a draw of images, and return a line of figures."""
    chosen = np.random.default_rng(seed).permutation(len(gap.pool))[:images]
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place, "images"), Path(place, "adapted")
        folder.mkdir()
        for index in chosen:
            Image.fromarray(gap.pool[index][0]).save(folder / f"{index}.png")
        start = time.process_time()
        found: Adaptation = adapt(
            folder, gap.words, gap.model, out=out, settings=replace(settings, seed=seed), progress=NoProgress()
        )
        minutes = (time.process_time() - start) / 60
        after = figures(best_teacher(gap.model, out), gap)
    return {
        "gap": gap.name,
        "seed": seed,
        "images": len(chosen),
        "keep": settings.keep,
        "before": before[0],
        "after": after[0],
        "others before": before[1],
        "others after": after[1],
        "agreement": [found.before, found.after],
        "installed": found.folder is not None,
        "steps": [found.step, found.steps],
        "confidence": found.confidence,
        "minutes": minutes,
    }


def table(lines: Sequence[dict]) -> str:
    """Return the figures as Markdown."""
    rows = [
        "| gap | kept by | images, draws | asked words, before | best agreement | others, before | best agreement "
        "| agreement | installed | steps | minutes |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, keep in dict.fromkeys((line["gap"], line["keep"]) for line in lines):
        of_gap = [line for line in lines if (line["gap"], line["keep"]) == (name, keep)]
        agreement = 100 * np.mean([line["agreement"] for line in of_gap], axis=0)
        steps = ", ".join(f"{taken} of {done}" for taken, done in (line["steps"] for line in of_gap))
        kept = "old scenes" if name in STYLES else "the loss" if keep else "nothing"
        rows.append(
            f"| {name} | {kept} | {of_gap[0]['images']}, {len(of_gap)} | {gains(of_gap)} "
            f"| {agreement[0]:.1f} to {agreement[1]:.1f} | {sum(line['installed'] for line in of_gap)} | {steps} "
            f"| {np.mean([line['minutes'] for line in of_gap]):.1f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Parse the command line, measure, print the table and write all figures after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of photographs; without it, drawn scenes alone")
    parser.add_argument("--out", type=Path, default=Path("out/adapt.json"))
    parser.add_argument("--seeds", type=int, default=3, help="draws of images")
    parser.add_argument("--images", type=int, default=20, help="images without labels")
    parser.add_argument("--tests", type=int, default=20, help="test images of each gap")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--score-every", type=int, default=20)
    parser.add_argument("--scored", type=int, default=8, help="images on which agreement is measured")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0], help="weights of the loss that keeps answers")
    parser.add_argument("--only", nargs="+", choices=(*STYLES, *PHOTOGRAPHS), help="these gaps alone")
    parser.add_argument("--show", nargs="+", type=Path, help="print the table of figures that were written, and stop")
    options = parser.parse_args()
    if options.show:
        print(table([line for file in options.show for line in json.loads(file.read_text())]))
        return
    names = options.only or (*STYLES, *(PHOTOGRAPHS if options.data else ()))
    gaps = [gap_of(name, options.data, 2 * options.images, options.tests) for name in names]
    settings = AdaptSettings(
        options.steps,
        options.batch,
        options.learning_rate,
        score_every=options.score_every,
        scored=options.scored,
    )
    before, lines = {}, []
    for seed in range(options.seeds):  # all gaps first, so that a part of the table is of all of them
        for gap in gaps:
            before[gap.name] = before.get(gap.name) or figures(opensan.load(gap.model), gap)
            for keep in options.keep if gap.model != "tiny" else options.keep[:1]:
                one = run(gap, seed, options.images, replace(settings, keep=keep), before[gap.name])
                lines.append(one)
                print(json.dumps(one), flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(lines, indent=1))
    print(table(lines))


if __name__ == "__main__":
    main()
