"""The default contrast words, whose part in a softmax is computed once for each proposal and stored.

A proposal's probability of a word is exp(its logit) over the sum of exp(logit) of the asked words, the contrast words
and "no object". By default, the contrast words are those of all bundled label sets but for the asked ones. So the sum
over all of them is stored as its logarithm, the proposal's contrast; a search takes the asked words' own part from it.

Letters: n proposals, D embedding, K words.
"""

import functools
import hashlib
import weakref
from typing import TYPE_CHECKING

import numpy as np

from opensan.segmenters.explanation import bundled_words
from opensan.vocabulary import Vocabulary

if TYPE_CHECKING:
    from opensan.segmenters.proposals import ProposalSegmenter

_known: "weakref.WeakKeyDictionary[ProposalSegmenter, Vocabulary]" = weakref.WeakKeyDictionary()

TOGETHER = 4096
"""Proposals that are compared with all contrast words at a time: 19 MB of logits."""


class Contrast:
    """The default contrast words of a model."""

    def __init__(self, segmenter: "ProposalSegmenter") -> None:
        """Take the words of all bundled label sets but for those that the model has never read."""
        self._segmenter = segmenter
        self.vocabulary: Vocabulary = _known.get(segmenter) or _bundled(tuple(segmenter.unseen_texts(_bundled())))
        _known[segmenter] = self.vocabulary

    @property
    def identity(self) -> str:
        """Identity of the words, 64 hexadecimal digits; "" if the model's probabilities are not made of logits alone.

        Contrasts of another identity belong to other words, as those of another version of the package may be.
        """
        nothing = np.zeros((0, self._segmenter.text.dimension), np.float32)
        if self._segmenter.class_logits(nothing, Vocabulary(self.vocabulary.words[:1])) is None:
            return ""
        return _identity(self.vocabulary)

    def of(self, vectors: np.ndarray) -> np.ndarray | None:
        """Return the contrasts of proposals' vectors [n, D], as they are stored: [n] float32.

        None if the model's probabilities are not made of logits alone: the `identity` is empty.
        """
        if not self.identity:
            return None
        contrasts = np.zeros(len(vectors), np.float32)
        for start in range(0, len(vectors), TOGETHER):
            some = vectors[start : start + TOGETHER].astype(np.float32)
            logits = self._segmenter.class_logits(some, self.vocabulary)
            assert logits is not None
            contrasts[start : start + TOGETHER] = log_sum(logits)
        return contrasts


def log_sum(logits: np.ndarray) -> np.ndarray:
    """Return the logarithm of the sum of exp(logits [n, K]): [n] float32, minus infinity for K = 0."""
    if logits.shape[1] == 0:
        return np.full(len(logits), -np.inf, np.float32)
    largest = logits.max(axis=1)
    return np.asarray(largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1)), np.float32)


@functools.lru_cache(4)
def _bundled(unseen: tuple[str, ...] = ()) -> Vocabulary:
    """Return the words of all bundled label sets, which are read from files, without those that a model never read."""
    return bundled_words(unseen)


@functools.lru_cache(4)
def _identity(vocabulary: Vocabulary) -> str:
    return hashlib.sha256("\n".join(map("\t".join, vocabulary.prompts())).encode()).hexdigest()
