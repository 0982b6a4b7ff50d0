"""Measure fine-tuning on 1, 5 and 20 labelled images, over the gaps of bench/tune.py.

    python bench/fine_tune.py --data ../shared/data --out out/fine_tune.json

Each training is what `opensan train` does from a model's weights with a recipe that names a folder of these images and
nothing more: the settings for few images (`opensan.recipe.few_images`). Of its last weights, each model measured keeps
one of the shares `--keep` of the starting weights: 0.7 is the default's, the folder that the command writes; 0 is
plain fine-tuning, where nothing is kept. Draws of images and test images are those of bench/tune.py with the same
`--pool` and `--tests`; so are the asked words and the others. In drawn scenes, the folder's classes are the words that
its images show. Gains are means over draws, with their 95 % interval (Student's t). Seconds are of processors, of the
training alone, with loading and saving. Figures are written after each training; the same call goes on from them.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import opensan
from opensan.checkpoints import load_model
from opensan.files import json_text, write_text
from opensan.recipe.blend import Blend
from opensan.recipe.config import RecipeConfig, StartConfig, TrainingDataConfig
from opensan.recipe.few_images import SETTINGS
from opensan.recipe.run import run_recipe
from opensan.segmenters.san import SanSegmenter
from opensan.train.checkpoint import CheckpointFolder
from opensan.train.config import LoopConfig
from opensan.train.log import NoProgress
from opensan.train.loop import load_parameters
from opensan.train.optimizer import san_parameter_groups
from opensan.vocabulary import Vocabulary
from tune import NAMES, SHOTS, STYLES, Gap, Pair, gains, gap_of, mean, scores

DEFAULT = SETTINGS["start.keep"]


def write_folder(folder: Path, pairs: Sequence[Pair], words: Vocabulary, known: np.ndarray) -> None:
    """Write labelled images as a prepared set whose classes are the `known` words."""
    table = np.full(len(known) + 1, 255, np.uint8)  # the last is of unlabelled pixels, -1
    table[:-1][known] = np.arange(known.sum())
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for number, (image, labels) in enumerate(pairs):
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        Image.fromarray(table[labels]).save(folder / "labels" / f"{number}.png")
    lines = [
        "|".join(dict.fromkeys((word.name, *word.synonyms)))
        for word, kept in zip(words.words, known, strict=True)
        if kept
    ]
    (folder / "classes.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "train.txt").write_text("".join(f"{number}\n" for number in range(len(pairs))), encoding="utf-8")


def blended(model: str, out: Path, keep: float) -> SanSegmenter:
    """Return the last weights of a run with a share of those that it started from."""
    san = load_model(model)
    blend = Blend(san, keep)
    state, _ = CheckpointFolder(out / "checkpoints", 1).load_newest()
    load_parameters(san_parameter_groups(san), state["parameters"], str(out))
    blend.apply()
    return SanSegmenter(san)


def run(
    gap: Gap, shots: int, seed: int, keeps: Sequence[float], before: tuple[np.ndarray, np.ndarray], steps: int | None
) -> list[dict]:
    """Fine-tune on a draw of images, and return a line of figures for each share that is kept of the start."""
    drawn = [gap.pool[i] for i in np.random.default_rng(seed).permutation(len(gap.pool))[:shots]]
    labelled = np.zeros(len(gap.words.words), bool)
    labelled[np.unique([word for _, labels in drawn for word in np.unique(labels) if word >= 0])] = True
    known = labelled if gap.other is None else np.ones_like(labelled)

    def figures(own: np.ndarray, others: np.ndarray) -> tuple[float, float]:
        return mean(own[known]), mean(own[~known] if gap.other is None else others)

    lines = []
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place, "images"), Path(place, "run")
        write_folder(folder, drawn, gap.words, known)
        loop = {"seed": seed} | ({} if steps is None else {"steps": steps})
        recipe = RecipeConfig(
            start=StartConfig(model=gap.model, weights="model"),
            data=(TrainingDataConfig(folder=folder),),
            loop=LoopConfig(**loop),
            out=out,
        )
        start = time.process_time()
        result, saved = run_recipe(recipe, NoProgress())
        seconds = time.process_time() - start
        for keep in keeps:
            segmenter = opensan.load(saved.folder) if keep == DEFAULT else blended(gap.model, out, keep)
            after = figures(*scores(segmenter, gap))
            lines.append(
                {
                    "gap": gap.name,
                    "images": shots,
                    "seed": seed,
                    "keep": keep,
                    "words": int(known.sum()),
                    "before": figures(*before)[0],
                    "after": after[0],
                    "others before": figures(*before)[1],
                    "others after": after[1],
                    "steps": result.step,
                    "seconds": seconds,
                }
            )
    return lines


def table(lines: Sequence[dict]) -> str:
    """Return the figures as Markdown."""
    rows = [
        "| gap | labelled images | kept of the start | draws | asked words, before | gain | others, before | gain "
        "| seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    kinds = {(one["gap"], one["images"], one["keep"]) for one in lines}
    for name, shots, keep in sorted(kinds, key=lambda kind: (NAMES.index(kind[0]), kind[1], kind[2])):
        of_kind = [one for one in lines if (one["gap"], one["images"], one["keep"]) == (name, shots, keep)]
        seconds = np.mean([line["seconds"] for line in of_kind])
        rows.append(f"| {name} | {shots} | {keep:g} | {len(of_kind)} | {gains(of_kind)} | {seconds:.0f} |")
    return "\n".join(rows)


def main() -> None:
    """Parse the command line, measure what is missing, print the table and write all figures after each training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of photographs; without it, drawn scenes alone")
    parser.add_argument("--out", type=Path, default=Path("out/fine_tune.json"))
    parser.add_argument("--seeds", type=int, default=3, help="draws of labelled images")
    parser.add_argument("--images", type=int, nargs="+", default=SHOTS, help="numbers of labelled images")
    parser.add_argument("--pool", type=int, default=40, help="images that can be labelled")
    parser.add_argument("--tests", type=int, default=20, help="test images of each gap")
    parser.add_argument("--keep", type=float, nargs="+", default=[DEFAULT, 0.0], help="shares kept of the start")
    parser.add_argument("--steps", type=int, help="steps of a training; without it, the default for few images")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="these gaps alone")
    parser.add_argument("--show", nargs="+", type=Path, help="print the table of figures that were written, and stop")
    options = parser.parse_args()
    if options.show:
        print(table([line for file in options.show for line in json.loads(file.read_text())]))
        return
    warnings.filterwarnings("ignore")  # of texts that a model has not read: the same ones for each training
    lines = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {(one["gap"], one["images"], one["seed"]) for one in lines}
    names = options.only or (NAMES if options.data else tuple(STYLES))
    gaps = [gap_of(name, options.data, options.pool, options.tests) for name in names]
    before = {}
    for seed in range(options.seeds):  # all gaps first, so that a part of the table is of all of them
        for shots in options.images:
            for gap in gaps:
                if (gap.name, shots, seed) in done:
                    continue
                if gap.name not in before:
                    before[gap.name] = scores(opensan.load(gap.model), gap)
                found = run(gap, shots, seed, options.keep, before[gap.name], options.steps)
                lines += found
                for line in found:
                    print(json.dumps(line), flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                write_text(options.out, json_text(lines))
    print(table(lines))


if __name__ == "__main__":
    main()
