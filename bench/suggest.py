"""Measure what `opensan tune words --without-labels` suggests against labels that it does not see.

    python bench/suggest.py --data ../shared/data --out out/suggest.json

The gaps are those of bench/tune.py. Texts and templates are tried on some images without labels; every change that was
tried is then measured on labelled test images: mean IoU of all words, with this change alone. Shown are how many
suggested changes raise it, how many of all tried do, the rank correlation of both figures with the change of the mean
IoU, and the mean IoU with all suggestions together.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

import opensan
from opensan.tune.suggest import _with_texts, suggest_words
from tune import NAMES, gaps, mean, measured, sampled


def run(gap, images: int) -> dict:
    """Return the figures of a gap."""
    segmenter = opensan.load(gap.model)
    found = suggest_words(segmenter, [image for image, _ in gap.pool[:images]], gap.words)
    test = sampled(segmenter, gap.test, gap.words)

    def miou(words) -> float:
        return mean(measured(segmenter, test, words, len(words.words)))

    before = miou(gap.words)
    gains = []
    for change in found.changes:
        words = _with_texts(gap.words, change.word, change.texts) if change.word else None
        gains.append(miou(words or replace(gap.words, templates=change.texts)) - before)
    return {
        "gap": gap.name,
        "images": images,
        "before": before,
        "all suggestions": miou(found.suggested),
        "changes": [{**change.to_dict(), "gain": gain} for change, gain in zip(found.changes, gains, strict=True)],
    }


def table(lines: Sequence[dict]) -> str:
    """Return the figures as Markdown."""
    rows = [
        "| gap | mean IoU | with all suggestions | suggested: better, worse | tried: better, worse | rank correlation "
        "of agreement, margin |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        changes = line["changes"]
        gains = np.array([change["gain"] for change in changes])
        suggested = np.array([change["suggested"] for change in changes])
        counts = [f"{(of > 0).sum()}, {(of < 0).sum()}" for of in (gains[suggested], gains)]
        ranks = [spearmanr([change[key] for change in changes], gains).statistic for key in ("agreement", "margin")]
        figures = f"{100 * line['before']:.1f} | {100 * line['all suggestions']:.1f}"
        rows.append(f"| {line['gap']} | {figures} | {' | '.join(counts)} | {ranks[0]:+.2f}, {ranks[1]:+.2f} |")
    return "\n".join(rows)


def main() -> None:
    """Parse the command line, measure, print the table and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of photographs; without it, drawn scenes alone")
    parser.add_argument("--out", type=Path, default=Path("out/suggest.json"))
    parser.add_argument("--images", type=int, default=12, help="images without labels")
    parser.add_argument("--tests", type=int, default=50, help="test images of each gap")
    parser.add_argument("--only", choices=NAMES, help="the one gap of this name")
    options = parser.parse_args()
    lines = []
    for gap in gaps(options.data, options.images, options.tests, options.only):
        lines.append(run(gap, options.images))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(lines, indent=1))
    print(table(lines))


if __name__ == "__main__":
    main()
