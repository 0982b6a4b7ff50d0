"""Choose contrast words: background words for the pixels that no asked word deserves, chosen per query from a pool.

`bench/rest.py` compares them with a share of "no object", which `--rest` takes.

Letters: N pool words, R text rows of the asked words, D embedding.
"""

import functools
from collections.abc import Sequence

import numpy as np

from opensan.lab.scenes import SEGMENTATION_NAMES
from opensan.vocabulary import Vocabulary, Word, ready_sets

COUNT = 64
"""Contrast words of a query."""

TOO_NEAR = 0.9
"""Cosine with an asked word, after the pool's mean is taken away, from which a pool word is taken for a synonym."""

_PROMPT = "a photo of a {}."
"""The only prompt of a contrast word: the 14 of an asked word would take 14 times as long, once for each model."""

_ENDINGS = ("-other", "-stuff")


@functools.cache
def pool() -> tuple[str, ...]:
    """Return the names that contrast words are chosen from: those of all bundled label sets, and of drawn scenes."""
    names: dict[str, None] = {}
    for label_set in ready_sets():
        for entry in Vocabulary.ready(label_set).names:
            for text in entry.lower().split(","):
                for ending in _ENDINGS:
                    text = text.removesuffix(ending)
                names[" ".join(text.split())] = None
    return tuple(dict.fromkeys([*names, *SEGMENTATION_NAMES]))


def pool_vocabulary(names: Sequence[str]) -> Vocabulary:
    """Return pool words with the one prompt."""
    return Vocabulary(tuple(Word(name, prompts=(_PROMPT.replace("{}", name),)) for name in names))


def choose(
    names: Sequence[str], rows: np.ndarray, vocabulary: Vocabulary, asked: np.ndarray, count: int = COUNT
) -> list[str]:
    """Choose contrast words for a vocabulary: spread over the text space, none a synonym or kind of an asked word.

    The first is the asked words' nearest neighbour among those allowed; each further one is the farthest from all that
    are chosen. Not allowed are words that contain an asked one ("race car" for "car") or lie in one, and those nearer
    than `TOO_NEAR`.

    Args:
        names: the N pool words.
        rows: [N, D] float32, unit length.
        vocabulary: the asked words, background words among them.
        asked: [R, D] float32, unit length: their text rows.
        count: most words to choose.
    """
    texts = {" ".join(text.lower().split()) for word in vocabulary.words for text in (word.name, *word.synonyms)}
    mean = rows.mean(axis=0)
    centred, near = _unit(rows - mean), _unit(asked - mean)
    likeness = (centred @ near.T).max(axis=1)
    allowed = np.flatnonzero((likeness < TOO_NEAR) & np.array([not _related(name, texts) for name in names]))
    if not len(allowed):
        return []
    kept = centred[allowed]
    chosen = [int(likeness[allowed].argmax())]
    nearest = kept @ kept[chosen[0]]
    while len(chosen) < min(count, len(allowed)):
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, kept @ kept[chosen[-1]])
        nearest[chosen] = np.inf
    return [names[allowed[index]] for index in chosen]


def _related(name: str, texts: set[str]) -> bool:
    """Return whether a pool word is an asked one, a kind of one, or one of which an asked one is a kind."""
    within = f" {name.replace('-', ' ')} "
    return any((other := f" {text.replace('-', ' ')} ") in within or within in other for text in texts)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
