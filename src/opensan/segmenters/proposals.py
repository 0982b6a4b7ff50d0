"""The base class of segmenters that propose masks and classify them with words; needs no torch.

Letters: Q queries, K words, D embedding, h w stride-16 grid, H0 W0 the image.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from opensan.assemble.bands import Scores, first_equal, to_array
from opensan.assemble.interpolation import mask_bands
from opensan.assemble.kinds import word_kinds
from opensan.assemble.segments import Segments, find_segments
from opensan.config import REST_SHARE
from opensan.errors import UserError, did_you_mean, short
from opensan.segmenters.base import Segmenter
from opensan.segmenters.explanation import (
    Explanation,
    bundled_words,
    check_pixel,
    explain_pixel,
    named_otherwise,
    separating,
)
from opensan.segmenters.results import Encoding, Segmentation
from opensan.text.rows import TextRows
from opensan.vocabulary import Vocabulary, Word

if TYPE_CHECKING:
    import torch


class ProposalSegmenter(Segmenter):
    """Base class of segmenters with mask proposals: the score of a word is the sum of class times mask probability.

    Their encodings hold "mask_logits" [Q, h, w] and "mask_embeddings" [Q, D], both float32. Explanations of a pixel,
    steadied videos and blended tiles are made of these.
    """

    text: TextRows
    """The text half: it embeds words."""
    rest_share: float = REST_SHARE
    """Factor by which "none of these" gets the probability of "no object": `ModelConfig.rest_share`."""
    vectors_suffice = True
    """Whether class probabilities need the "mask_embeddings" alone."""
    has_no_object = True
    """Whether `class_probabilities` leaves out a probability of "no object" that the model learned."""

    def class_probabilities(self, encoding: Encoding, vocabulary: Vocabulary) -> "torch.Tensor | np.ndarray":
        """Return [Q, K] float32: each proposal's softmax over the words and "no object", without the latter.

        K counts the background words too; they come last. Words with equal text rows have equal columns.
        """
        raise NotImplementedError

    def class_logits(self, embeddings: np.ndarray, vocabulary: Vocabulary) -> np.ndarray | None:
        """Return what class probabilities are the softmax of: [Q, K + 1] float32, "no object" last.

        A word's logit does not depend on the other words. `embeddings` [Q, D] are "mask_embeddings"; the column of a
        model without "no object" is minus infinity. None if class probabilities are made of more than this.
        """
        return None

    def scores(self, encoding: Encoding, vocabulary: Vocabulary) -> Scores:
        """Return the function that scores all words in a band of rows; see `Segmenter.scores`."""
        probabilities = to_array(self.class_probabilities(encoding, vocabulary))
        masks = mask_bands(to_array(encoding["mask_logits"]), encoding.sizes)
        first = first_equal(probabilities.T)

        def of_rows(rows: slice) -> np.ndarray:
            band = masks(rows)
            scores = probabilities.T @ band.reshape(len(band), -1)
            return scores[first].reshape(-1, *band.shape[1:])

        return of_rows

    def explain(self, segmentation: Segmentation, x: int, y: int, *, otherwise: bool = True) -> Explanation:
        """Explain the word of a pixel; see `Segmentation.explain`."""
        encoding, vocabulary = segmentation.encoding, segmentation.vocabulary
        check_pixel(encoding.sizes, x, y)
        masks = to_array(encoding["mask_logits"])
        probabilities = to_array(self.class_probabilities(encoding, vocabulary))
        found = explain_pixel(masks, probabilities, encoding.sizes, vocabulary, x, y)
        if not otherwise:
            return found
        plain = Vocabulary(tuple(Word(word.name) for word in bundled_words().words))
        others = bundled_words(self.text.unseen_texts(plain))
        return named_otherwise(found, to_array(self.class_probabilities(encoding, others)), others)

    def separating(
        self, segmentation: Segmentation, x: int, y: int, first: str, second: str
    ) -> list[tuple[int, float]]:
        """Return what separates two words at a pixel; see `Segmentation.separating`."""
        encoding, vocabulary = segmentation.encoding, segmentation.vocabulary
        check_pixel(encoding.sizes, x, y)
        names = [word.name for word in vocabulary.words]
        for name in (first, second):
            if name not in names:
                raise UserError(f"this segmentation has no word {short(name)}{did_you_mean(str(name), names)}")
        probabilities = to_array(self.class_probabilities(encoding, vocabulary))
        pair = names.index(first), names.index(second)
        return separating(to_array(encoding["mask_logits"]), probabilities, encoding.sizes, x, y, pair)

    def with_rest(self, vocabulary: Vocabulary) -> Vocabulary:
        """Add a background word that takes the pixels that no asked word deserves; see `Vocabulary.with_rest`."""
        if not self.has_no_object:
            raise UserError(f'the rest needs a model that learned "no object", and {self.identity.name} did not')
        return vocabulary.with_rest(self.rest_share)

    def segments(self, segmentation: Segmentation) -> Segments:
        """Return the segments by `segmentation.rules`; see `Segmentation.segments`."""
        encoding, vocabulary, rules = segmentation.encoding, segmentation.vocabulary, segmentation.rules
        return find_segments(
            to_array(encoding["mask_logits"]),
            to_array(self.class_probabilities(encoding, vocabulary)),
            encoding.sizes,
            word_kinds(vocabulary, rules.stuff, rules.things),
            rules,
        )

    def prepare_words(self, vocabulary: Vocabulary, progress: Callable[[int, int], None] | None = None) -> None:
        """Embed the words; see `Segmenter.prepare_words`."""
        self.text.classifier(vocabulary, progress=progress)

    def unseen_texts(self, vocabulary: Vocabulary) -> list[str]:
        """Return words and synonyms that the text tower was never trained on; see `Segmenter.unseen_texts`."""
        return self.text.unseen_texts(vocabulary)

    def check_encoding(self, encoding: Encoding) -> None:
        """Raise ValueError, one line, unless this model made the encoding and its arrays are mask proposals."""
        super().check_encoding(encoding)
        masks, embeddings = encoding.arrays.get("mask_logits"), encoding.arrays.get("mask_embeddings")
        if (
            masks is None
            or embeddings is None
            or not (
                masks.ndim == 3
                and embeddings.ndim == 2
                and len(masks) == len(embeddings)
                and str(masks.dtype) == str(embeddings.dtype) in ("float32", "torch.float32")
                and all(
                    padded <= 256 * grid for padded, grid in zip(encoding.sizes.padded, masks.shape[1:], strict=True)
                )
            )
        ):
            raise UserError("this encoding holds no mask proposals (its arrays and sizes contradict each other)")


Probabilities = TypeVar("Probabilities", "torch.Tensor", np.ndarray)


def with_nothing(probabilities: Probabilities, vocabulary: Vocabulary) -> Probabilities:
    """Give words without a text (`Word.nothing`) their part of "no object", in class probabilities [Q, K], in place.

    The other words' probabilities become those of the softmax without these words.
    """
    for word, share in vocabulary.nothing:
        no_object = 1 - probabilities.sum(1)
        others = 1 - probabilities[:, word]
        probabilities /= others[:, None]
        probabilities[:, word] = share * no_object / others
    return probabilities


def with_proposals(segmenter: Segmenter, purpose: str, *, vectors_suffice: bool = False) -> ProposalSegmenter:
    """Return the segmenter itself.

    Raises UserError, one line with `purpose`, if it has no mask proposals, or, with `vectors_suffice`, if their vectors
    do not suffice to classify them.
    """
    if not isinstance(segmenter, ProposalSegmenter):
        raise UserError(f"{purpose} needs a model with mask proposals, and {segmenter.identity.name} has none")
    if vectors_suffice and not segmenter.vectors_suffice:
        name = segmenter.identity.name
        raise UserError(f"{purpose} keeps a vector of each proposal, and {name} needs more than that")
    return segmenter
