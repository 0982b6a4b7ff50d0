"""Words that are ordered distances, and depth read from a segmenter that knows them.

The packaged model `tiny` never read a number, so "two metres away" by itself means nothing to its text tower. Each
distance is therefore a mixture of sentences that it did read: so many with one word that stands for near, so many with
another that stands for far. The mean of a word's sentences is its text row, so the rows lie in order on the way from
one to the other, as the learned ranks of OrdinalCLIP (Li et al., 2022) do. Depth is the expected distance, as in
DepthCLIP (Zhang et al., 2022).
Letters: K words, H W image.
"""

from collections.abc import Sequence

import numpy as np

from opensan.assemble.bands import to_array
from opensan.segmenters.base import Segmenter
from opensan.vocabulary import TEMPLATE_SETS, UNLABELLED, Vocabulary, Word

DISTANCES: dict[str, float] = {
    "two metres away": 2,
    "three metres away": 3,
    "four metres away": 4,
    "five metres away": 5,
    "six metres away": 6,
    "seven metres away": 7,
    "eight metres away": 8,
    "ten metres away": 10,
    "twelve metres away": 12,
}
"""Word -> metres, in order."""

NAMES = tuple(DISTANCES)
LEFT_OUT = NAMES[1::3]
"""Every third word: three, six and ten metres; trained words stand on both sides of each."""

NEAR, FAR = "wood", "night sky"
"""Words of `tiny` that stand for the ends. They are far apart in its text space, and no scene shows them."""

SHUFFLED = (5, 0, 7, 3, 8, 1, 6, 2, 4)
"""Position of each word's text on the way from near to far, where the words are not in order."""


def metres(names: Sequence[str]) -> np.ndarray:
    """Return the distances of words, [K] float32."""
    return np.array([DISTANCES[name] for name in names], dtype=np.float32)


def distance_words(names: Sequence[str] = NAMES, positions: Sequence[int] | None = None) -> Vocabulary:
    """Return the vocabulary of some of NAMES.

    `positions`: the position, 0 (NEAR) to 8 (FAR), of each of NAMES on the way from near to far; None for their order.
    """
    places = dict(zip(NAMES, range(len(NAMES)) if positions is None else positions, strict=True))
    near, far = (tuple(one.replace("{}", end) for one in TEMPLATE_SETS["vild"]) for end in (NEAR, FAR))
    last = len(NAMES) - 1
    return Vocabulary(tuple(Word(name, prompts=near * (last - places[name]) + far * places[name]) for name in names))


def word_map(depth: np.ndarray, names: Sequence[str] = NAMES) -> np.ndarray:
    """Return the index into `names` of the nearest of all NAMES, [H, W] int16; UNLABELLED (-1) where it is not listed.

    `depth`: [H, W] metres.
    """
    distances = metres(NAMES)
    index = np.array([names.index(name) if name in names else UNLABELLED for name in NAMES], dtype=np.int16)
    return index[np.digitize(depth, (distances[1:] + distances[:-1]) / 2)]


def expected_distance(scores: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Return each pixel's mean of `distances` [K], weighted by its `scores` [K, H, W], 0 or more: [H, W] float32.

    Where all scores are zero, the words count alike.
    """
    total = scores.sum(0)
    weighted = np.einsum("khw,k->hw", scores, distances)
    return np.where(total > 0, weighted / np.where(total > 0, total, 1), distances.mean()).astype(np.float32)


def read_depth(segmenter: Segmenter, image: np.ndarray, words: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Return the depth of an image [H, W, 3] uint8 in two readings, each [H, W] float32 in metres.

    The expected distance under the pixel's distribution over the words, and the distance of the best word.
    """
    encoding = segmenter.encode(image)
    scores = to_array(segmenter.scores(encoding, words)(slice(0, len(image))))
    distances = metres(words.names)
    return expected_distance(scores, distances), distances[scores.argmax(0)]
