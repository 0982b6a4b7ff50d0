"""Compare two label sets in the space of a model's text embeddings, by distances and mean cosines.

A word's distance from a set is that from the nearest of its words, one minus the cosine; of several synonyms, the
nearest counts. The Hausdorff distance is the largest such distance, either way; the mean best cosine tells the usual.
Letters: A B words of the two sets, R text rows, D embedding.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from opensan.errors import UserError, did_you_mean
from opensan.outputs.fonts import font_for
from opensan.text.rows import TextRows
from opensan.vocabulary import Vocabulary, ready_sets

LEAST_WORDS = 2


class Far(NamedTuple):
    """A word, the nearest word of the other set, and their cosine."""

    word: str
    nearest: str
    cosine: float


@dataclass(frozen=True)
class Similarity:
    """Comparison of two vocabularies."""

    names: tuple[list[str], list[str]]
    cosines: np.ndarray
    """[A, B] float32 in [-1, 1]: cosine of the two words, of their nearest synonyms."""

    @cached_property
    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Each word's cosine with the nearest word of the other set: [A] and [B]."""
        return self.cosines.max(axis=1), self.cosines.max(axis=0)

    @property
    def directed(self) -> tuple[float, float]:
        """The largest distance of a word of A from B, and of a word of B from A; each in [0, 2]."""
        return float(1 - self.best[0].min()), float(1 - self.best[1].min())

    @property
    def hausdorff(self) -> float:
        """The Hausdorff distance, in [0, 2]: the larger of `directed`."""
        return max(self.directed)

    @property
    def mean_best(self) -> tuple[float, float]:
        """The mean of `best`, of A's words in B and of B's words in A."""
        return float(self.best[0].mean()), float(self.best[1].mean())

    def farthest(self, count: int) -> tuple[list[Far], list[Far]]:
        """Return the words of A that are farthest from B, and those of B farthest from A, the farthest first."""
        return _farthest(self.cosines, *self.names, count), _farthest(self.cosines.T, *self.names[::-1], count)

    def to_dict(self, count: int) -> dict[str, Any]:
        """Return plain data for JSON, with `count` of the farthest words of each set."""
        return {
            "words": [len(names) for names in self.names],
            "hausdorff": self.hausdorff,
            "directed": list(self.directed),
            "mean_best_cosine": list(self.mean_best),
            "farthest": [[far._asdict() for far in side] for side in self.farthest(count)],
        }


def _farthest(cosines: np.ndarray, words: list[str], others: list[str], count: int) -> list[Far]:
    order = cosines.max(axis=1).argsort(kind="stable")[:count]
    nearest = cosines.argmax(axis=1)
    return [Far(words[index], others[nearest[index]], float(cosines[index, nearest[index]])) for index in order]


def named_vocabulary(source: str) -> Vocabulary:
    """Read a ready set, by name, or a file of words. Raises UserError, one line, if it is neither or has one word."""
    if source in ready_sets():
        return Vocabulary.ready(source)
    if not Path(source).is_file():
        known = ", ".join(ready_sets())
        raise UserError(f"{source}: no such file, nor a ready set ({known}){did_you_mean(source, ready_sets())}")
    vocabulary = Vocabulary.from_file(Path(source))
    if len(vocabulary.names) < LEAST_WORDS:
        raise UserError(f"{source}: has one word, and a set to compare has at least {LEAST_WORDS}")
    return vocabulary


def compare(text: TextRows, first: Vocabulary, second: Vocabulary) -> Similarity:
    """Compare two vocabularies by the rows of a text half; each has the prompts that it is used with."""
    rows = [text.rows(vocabulary) for vocabulary in (first, second)]
    cosines = rows[0] @ rows[1].T  # [R, R']
    for axis, vocabulary in enumerate((first, second)):
        starts = np.flatnonzero(np.diff(vocabulary.row_class, prepend=-1))
        cosines = np.maximum.reduceat(cosines, starts, axis=axis)
    names = ([word.name for word in vocabulary.words] for vocabulary in (first, second))
    return Similarity((next(names), next(names)), cosines)


LARGEST_CELL, LONGEST_SIDE, LETTERS, LEAST_CELL_WITH_NAMES = 22, 1_400, 13, 13
"""Pixels of a cell, at most; of the map, at most; of letters; and of a cell that words stand beside, at least."""
COLD, WARM = (247, 247, 250), (20, 60, 130)


def heat_map(similarity: Similarity) -> Image.Image:
    """Draw the cosines, A downwards and B across; words stand beside cells that are large enough."""
    cosines = similarity.cosines
    cell = max(1, min(LARGEST_CELL, LONGEST_SIDE // max(cosines.shape)))
    low, high = float(cosines.min()), float(cosines.max())
    share = ((cosines - low) / max(high - low, 1e-6))[..., None]
    pixels = np.array(COLD) + share * (np.array(WARM) - np.array(COLD))
    cells = Image.fromarray(pixels.round().astype(np.uint8)).resize(
        (cosines.shape[1] * cell, cosines.shape[0] * cell), Image.Resampling.NEAREST
    )
    font = font_for("".join(similarity.names[0] + similarity.names[1])[:500], LETTERS)
    named = cell >= LEAST_CELL_WITH_NAMES
    left, top = (max(int(font.getlength(name)) for name in names) + 12 if named else 12 for names in similarity.names)
    legend = f"cosine: light {low:.2f}, dark {high:.2f}"
    width = left + max(cells.width, int(font.getlength(legend))) + 12
    canvas = Image.new("RGB", (width, top + cells.height + 34), "white")
    canvas.paste(cells, (left, top))
    draw = ImageDraw.Draw(canvas)
    if named:
        for row, name in enumerate(similarity.names[0]):
            draw.text((left - 6, top + (row + 0.5) * cell), name, (30, 30, 30), font, anchor="rm")
        for column, name in enumerate(similarity.names[1]):
            upright = Image.new("RGB", (top - 6, cell), "white")
            ImageDraw.Draw(upright).text((0, cell / 2), name, (30, 30, 30), font, anchor="lm")
            canvas.paste(upright.rotate(90, expand=True), (left + column * cell, 0))
    draw.text((left, canvas.height - 24), legend, (60, 60, 60), font)
    return canvas
