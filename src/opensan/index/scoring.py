"""Score images for words by the model's own rule, from stored proposals.

A proposal's probability of a word is the softmax over the asked words, the contrast words and "no object", as in
`segment`. An image's score for a word is that of its best region, or the word's mean score over all pixels. Where the
contrasts of proposals are stored, a search by the default contrast words compares with the asked words alone; the
probabilities are the same but for rounding.

Letters: n proposals, A asked words, D embedding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np

from opensan.assemble.bands import to_array
from opensan.choices import SearchBy
from opensan.errors import UserError, short
from opensan.index.contrast import Contrast
from opensan.index.rows import vectors_of
from opensan.segmenters.results import Encoding
from opensan.structures import ImageSizes
from opensan.vocabulary import Vocabulary, Word

if TYPE_CHECKING:
    import pyarrow as pa

    from opensan.segmenters.proposals import ProposalSegmenter

LEAST = 0.02
"""Least part of the stored sum over all contrast words that must remain once the left-out words' part is taken away."""

MOST = 60.0
"""Most by which a logit may be above the stored contrast: exp of more is no float32."""

_ONE = ImageSizes((1, 1), (1, 1), (1, 1))


@dataclass(frozen=True)
class Query:
    """Words that images are searched for."""

    vocabulary: Vocabulary
    """The asked words, then the contrast words, which absorb."""
    also: int
    """Number of words that must be there too; they follow the first."""
    by: SearchBy = "region"
    left_out: tuple[Word, ...] | None = None
    """The default contrast words that are not among the vocabulary's, as they are asked; None: others were given."""

    @property
    def asked(self) -> list[str]:
        """Names of the asked words: the searched one, those that must be there, those that must not."""
        return self.vocabulary.names


def parse_query(
    segmenter: "ProposalSegmenter",
    words: str,
    also: Iterable[str],
    without: Iterable[str],
    against: object,
    by: SearchBy,
) -> Query:
    """Make a query.

    Args:
        segmenter: decides which words were never read.
        words: the word to search for; `|` joins synonyms.
        also: words that must be in the image too.
        without: words that must not be in it.
        against: contrast words, as `Vocabulary.parse` takes them; None for all words of the bundled label sets.
        by: "region" or "area".

    Raises:
        UserError: an empty query, several words in one, or words the model has never read; one line.
    """
    if by not in get_args(SearchBy):
        raise UserError(f"images are scored by region or by area, not by {short(by)}")
    also, without = ([text] if isinstance(text, str) else list(text) for text in (also, without))
    asked = [_one_word(text) for text in (words, *also, *without)]
    vocabulary = Vocabulary(tuple(asked))
    if unseen := segmenter.unseen_texts(vocabulary):
        raise UserError(f"the model has never read {short(unseen[0])}: nothing can be found by it; choose another word")
    if against is None:
        contrast: Vocabulary | None = Contrast(segmenter).vocabulary
    else:
        contrast = Vocabulary.parse(against) if against else None
    taken = {text.strip().lower() for word in asked for text in (word.name, *word.synonyms)}
    others, left_out = [], []
    for word in contrast.words if contrast else ():
        if taken & {text.strip().lower() for text in (word.name, *word.synonyms)}:
            left_out.append(word)
        else:
            others.append(Word(word.name, word.synonyms, word.prompts, absorbs=True))
    vocabulary = Vocabulary((*asked, *others))
    return Query(vocabulary, len(also), by, tuple(left_out) if against is None else None)


def _one_word(text: str) -> Word:
    if not isinstance(text, str) or not text.strip():
        raise UserError('an empty query: give a word to search for, such as "zebra crossing"')
    words = Vocabulary.parse(text).words
    if len(words) > 1:
        raise UserError(
            f"{short(text)} are {len(words)} words: search for one, with others that must be in the image too (--and)"
        )
    return words[0]


class Scorer:
    """Computes the probabilities of a query's asked words for stored proposals."""

    def __init__(self, segmenter: "ProposalSegmenter", query: Query, contrast: str = "") -> None:
        """`contrast` is the identity of the words of the stored contrasts; "" if there are none."""
        self.query, self._segmenter = query, segmenter
        self.is_quick = False
        """Whether stored contrasts stand for the contrast words."""
        if contrast and query.left_out is not None:
            self.is_quick = contrast == Contrast(segmenter).identity
        self._asked = Vocabulary(query.vocabulary.words[: len(query.asked)])

    @property
    def columns(self) -> list[str]:
        """The columns of proposals that `probabilities` reads."""
        return ["vector", "contrast"] if self.is_quick else ["vector"]

    def probabilities(self, batch: "pa.RecordBatch") -> np.ndarray:
        """Return the probability of the asked words for rows of proposals: [n, A] float32."""
        vectors = vectors_of(batch).astype(np.float32)
        if not self.is_quick:
            return self._slowly(vectors)
        contrasts = batch.column("contrast").to_numpy(zero_copy_only=False)
        asked = self._shares(vectors, contrasts, self._asked)
        total = 1 + asked.sum(axis=1)
        if self.query.left_out:
            total -= self._shares(vectors, contrasts, Vocabulary(self.query.left_out)).sum(axis=1)
        chances = asked / total[:, None]
        # Nearly all was the words' that are left out, or the contrast is missing: too few digits are left.
        unsure = ~(total > LEAST)
        if unsure.any():
            chances[unsure] = self._slowly(vectors[unsure])
        return chances

    def _shares(self, vectors: np.ndarray, contrasts: np.ndarray, words: Vocabulary) -> np.ndarray:
        """Return exp(logit) of words, as shares of the stored sums: [n, K] float32."""
        logits = self._segmenter.class_logits(vectors, words)
        assert logits is not None
        shares: np.ndarray = np.exp(np.minimum(logits[:, :-1] - contrasts[:, None], MOST))
        return shares

    def _slowly(self, vectors: np.ndarray) -> np.ndarray:
        """Return the probabilities [n, A] by a softmax over all words."""
        encoding = Encoding(
            {"mask_embeddings": vectors, "mask_logits": np.zeros((len(vectors), 1, 1), np.float32)},
            _ONE,
            self._segmenter.identity.encodings,
        )
        chances = to_array(self._segmenter.class_probabilities(encoding, self.query.vocabulary))
        return chances[:, : len(self.query.asked)]


def score_images(scorer: Scorer, batches: "Iterable[pa.RecordBatch]") -> tuple[np.ndarray, np.ndarray]:
    """Score images, of which all proposals are in `batches`, with the columns "image", "area" and the scorer's.

    Returns ids [images] int64 and scores [images] float32 in [0, 1], best first. The score is that for the first word,
    times the probability that the words which must be there too are, and that those which must not are not.
    """
    query = scorer.query
    images, best, areas = [], [], []
    for batch in batches:
        if batch.num_rows == 0:
            continue
        regions = scorer.probabilities(batch)
        images.append(batch.column("image").to_numpy())
        areas.append(regions[:, 0] * batch.column("area").to_numpy())
        best.append(regions)
    if not images:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    ids, places = np.unique(np.concatenate(images), return_inverse=True)
    presence = np.zeros((len(ids), len(query.asked)), np.float32)
    np.maximum.at(presence, places, np.concatenate(best))
    scores = presence[:, 0]
    if query.by == "area":
        scores = np.bincount(places, np.concatenate(areas), len(ids)).clip(0, 1).astype(np.float32)
    wanted = presence[:, 1 : 1 + query.also].prod(axis=1)
    scores = scores * wanted * (1 - presence[:, 1 + query.also :]).prod(axis=1)
    order = np.lexsort((ids, -scores))
    return ids[order], scores[order]


def distinct(masks: Sequence[np.ndarray], most: int, overlap: float = 0.5) -> list[int]:
    """Return which of some masks [h, w] bool, the best first, are no repetitions of better ones: at most `most`."""
    kept: list[int] = []
    for index, mask in enumerate(masks):
        if len(kept) == most:
            break
        if all((mask & masks[k]).sum() <= overlap * (mask | masks[k]).sum() for k in kept):
            kept.append(index)
    return kept
