"""Score images for words by the model's own rule, from stored proposals.

A proposal's probability of a word is the softmax over the asked words, the contrast words and "no object", as in
`segment`. An image's score for a word is that of its best region, or the word's mean score over all pixels.

Letters: n proposals, A asked words, D embedding.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np

from opensan.assemble.bands import to_array
from opensan.choices import SearchBy
from opensan.errors import UserError, short
from opensan.segmenters.explanation import bundled_words
from opensan.segmenters.results import Encoding
from opensan.structures import ImageSizes
from opensan.vocabulary import Vocabulary, Word

if TYPE_CHECKING:
    import pyarrow as pa

    from opensan.segmenters.proposals import ProposalSegmenter

_ONE = ImageSizes((1, 1), (1, 1), (1, 1))


@dataclass(frozen=True)
class Query:
    """Words that images are searched for."""

    vocabulary: Vocabulary
    """The asked words, then the contrast words, which absorb."""
    also: int
    """Number of words that must be there too; they follow the first."""
    by: SearchBy = "region"

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
        contrast = _bundled(tuple(segmenter.unseen_texts(_bundled())))
    else:
        contrast = Vocabulary.parse(against) if against else None  # type: ignore[assignment]
    taken = {text.strip().lower() for word in asked for text in (word.name, *word.synonyms)}
    others = tuple(
        Word(word.name, word.synonyms, word.prompts, absorbs=True)
        for word in (contrast.words if contrast else ())
        if not taken & {text.strip().lower() for text in (word.name, *word.synonyms)}
    )
    return Query(Vocabulary((*asked, *others)), len(also), by)


@functools.lru_cache(4)
def _bundled(unseen: tuple[str, ...] = ()) -> Vocabulary:
    """Return the words of all bundled label sets, which are read from files, without those that a model never read."""
    return bundled_words(unseen)


def _one_word(text: str) -> Word:
    if not isinstance(text, str) or not text.strip():
        raise UserError('an empty query: give a word to search for, such as "zebra crossing"')
    words = Vocabulary.parse(text).words
    if len(words) > 1:
        raise UserError(
            f"{short(text)} are {len(words)} words: search for one, with others that must be in the image too (--and)"
        )
    return words[0]


def probabilities(segmenter: "ProposalSegmenter", vectors: np.ndarray, query: Query) -> np.ndarray:
    """Return the probability of the asked words for proposals' vectors [n, D]: [n, A] float32."""
    arrays = {"mask_embeddings": vectors.astype(np.float32), "mask_logits": np.zeros((len(vectors), 1, 1), np.float32)}
    encoding = Encoding(arrays, _ONE, segmenter.identity.encodings)
    return to_array(segmenter.class_probabilities(encoding, query.vocabulary))[:, : len(query.asked)]


def vectors_of(batch: "pa.RecordBatch") -> np.ndarray:
    """Return the vectors of a batch of rows, [n, D] float16."""
    vectors = batch.column("vector")
    return vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), -1)


def score_images(
    segmenter: "ProposalSegmenter", batches: "Iterable[pa.RecordBatch]", query: Query
) -> tuple[np.ndarray, np.ndarray]:
    """Score images, of which all proposals are in `batches` with the columns "image", "vector" and "area".

    Returns ids [images] int64 and scores [images] float32 in [0, 1], best first. The score is that for the first word,
    times the probability that the words which must be there too are, and that those which must not are not.
    """
    images, best, areas = [], [], []
    for batch in batches:
        if batch.num_rows == 0:
            continue
        regions = probabilities(segmenter, vectors_of(batch), query)
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
