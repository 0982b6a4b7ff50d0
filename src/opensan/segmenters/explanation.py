"""Explain the word of one pixel: which mask proposals decided, and what separates two words there.

Letters: Q queries, K words, h w stride-16 grid, H0 W0 the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opensan.assemble.bands import to_array
from opensan.assemble.interpolation import masks_at, resized_masks
from opensan.errors import UserError
from opensan.outputs.explained import ExplainedRow
from opensan.structures import ImageSizes
from opensan.vocabulary import Vocabulary, Word, ready_sets

MOST_WORDS = 20
MOST_PROPOSALS = 8


@dataclass(frozen=True)
class ExplainedWord:
    """A word at the pixel."""

    name: str
    background: bool
    score: float
    """Sum over proposals of class times mask probability, not clipped."""


@dataclass(frozen=True, eq=False)
class ExplainedProposal:
    """A mask proposal that contributes to the pixel's word."""

    index: int
    """Its number in the encoding, 0..Q-1."""
    share: float
    """Its share of the winner's score, in [0, 1]."""
    mask: float
    """Its mask at the pixel, in [0, 1]."""
    word_probability: float
    """Probability with which it is the pixel's word."""
    word: str
    """The asked word that it most probably is."""
    picture: NDArray[np.float32]
    """[h', w'] in [0, 1]: its mask over the whole image, coarse."""
    otherwise: tuple[tuple[str, float], ...] = ()
    """The words that it would most probably be among all that are bundled, with probabilities; empty if not wanted."""


@dataclass(frozen=True)
class Explanation:
    """Explanation of one pixel."""

    x: int
    y: int
    words: tuple[ExplainedWord, ...]
    """The words with the highest scores there, best first."""
    proposals: tuple[ExplainedProposal, ...]
    """The proposals that decide, largest share first."""

    @property
    def word(self) -> str:
        """The pixel's word."""
        return self.words[0].name

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, without pictures."""
        return {
            "x": self.x,
            "y": self.y,
            "words": [vars(word) for word in self.words],
            "proposals": [
                {name: value for name, value in vars(proposal).items() if name not in ("picture", "otherwise")}
                | {"otherwise": [list(pair) for pair in proposal.otherwise]}
                for proposal in self.proposals
            ],
        }


def check_pixel(sizes: ImageSizes, x: int, y: int) -> None:
    """Raise UserError, one line, unless the image has the pixel in column `x` and row `y`."""
    height, width = sizes.image
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(f"pixel ({x}, {y}) is outside the image of {width} x {height}")


def explain_pixel(
    mask_logits: np.ndarray, probabilities: np.ndarray, sizes: ImageSizes, vocabulary: Vocabulary, x: int, y: int
) -> Explanation:
    """Explain the word of a pixel.

    Args:
        mask_logits: [Q, h, w] float32.
        probabilities: [Q, K] float32: see `ProposalSegmenter.class_probabilities`.
        sizes: sizes of the image.
        vocabulary: the K words.
        x: column of the pixel.
        y: row of the pixel.
    """
    check_pixel(sizes, x, y)
    masks = masks_at(mask_logits, sizes, y, x)
    contributions = probabilities * masks[:, None]
    scores = contributions.sum(axis=0)
    winner = int(scores.argmax())
    shares = contributions[:, winner] / max(scores[winner], np.finfo(scores.dtype).tiny)
    leading = (-shares).argsort(kind="stable")[:MOST_PROPOSALS]
    words = vocabulary.words
    best = (-scores).argsort(kind="stable")[:MOST_WORDS].tolist()
    return Explanation(
        x,
        y,
        tuple(ExplainedWord(words[k].name, words[k].absorbs, float(scores[k])) for k in best),
        tuple(
            ExplainedProposal(
                index,
                float(shares[index]),
                float(masks[index]),
                float(probabilities[index, winner]),
                words[int(probabilities[index].argmax())].name,
                picture,
            )
            for index, picture in zip(leading.tolist(), _coarse_masks(mask_logits[leading], sizes), strict=True)
        ),
    )


def separating(
    mask_logits: np.ndarray,
    probabilities: np.ndarray,
    sizes: ImageSizes,
    x: int,
    y: int,
    pair: tuple[int, int],
) -> list[tuple[int, float]]:
    """Return what separates two words (indices) at a pixel: (proposal, how much more it gives to the first of them).

    The largest differences come first, whatever their sign; all of them sum up to the difference of the scores.
    """
    masks = masks_at(mask_logits, sizes, y, x)
    difference = (probabilities[:, pair[0]] - probabilities[:, pair[1]]) * masks
    order = (-np.abs(difference)).argsort(kind="stable")[:MOST_PROPOSALS]
    return [(int(index), float(difference[index])) for index in order]


def bundled_words(unseen: Sequence[str] = ()) -> Vocabulary:
    """Return the names of all bundled label sets with one prompt each, without those that a model never read."""
    names: dict[str, None] = {}
    for label_set in ready_sets():
        for entry in Vocabulary.ready(label_set).names:
            text = entry.split(",")[0].strip().lower()
            for ending in ("-other", "-stuff"):
                text = text.removesuffix(ending)
            names[text] = None
    left_out = set(unseen)
    return Vocabulary(tuple(Word(name, prompts=(f"a photo of a {name}.",)) for name in names if name not in left_out))


def named_otherwise(
    explanation: Explanation, probabilities: np.ndarray, vocabulary: Vocabulary, most: int = 3
) -> Explanation:
    """Add to each proposal what it would be among other words: `probabilities` [Q, K] of that `vocabulary`."""
    probabilities = to_array(probabilities)
    proposals = []
    for proposal in explanation.proposals:
        row = probabilities[proposal.index]
        best = (-row).argsort(kind="stable")[:most].tolist()
        otherwise = tuple((vocabulary.words[k].name, float(row[k])) for k in best)
        proposals.append(replace(proposal, otherwise=otherwise))
    return replace(explanation, proposals=tuple(proposals))


def rows_of(
    explanation: Explanation, bias: np.ndarray | None, attended: np.ndarray | None, most: int = 3
) -> list[ExplainedRow]:
    """Return the drawn parts of the leading proposals.

    `bias` [proposals, N, h, w] and `attended` [proposals, N, h', w'] are their attention bias and weights, if known.
    """
    rows = []
    for place, proposal in enumerate(explanation.proposals[:most]):
        otherwise = ", ".join(f"{name} {share:.2f}" for name, share in proposal.otherwise)
        caption = (
            f"proposal {proposal.index}: {100 * proposal.share:.0f} % of the score, {proposal.word} "
            f"{proposal.word_probability:.2f}" + (f"; among all words: {otherwise}" if otherwise else "")
        )
        maps = [("its mask", proposal.picture)]
        if attended is not None:
            weights = attended[place].mean(axis=0)
            maps.append(("its SLS token attended to", weights / max(float(weights.max()), 1e-12)))
        for head, values in enumerate(() if bias is None else bias[place]):
            low, high = float(values.min()), float(values.max())
            name = f"steered, head {head + 1}" if len(bias[place]) > 1 else "where it was steered"  # type: ignore[index]
            maps.append((name, (values - low) / max(high - low, 1e-12)))
        rows.append(ExplainedRow(caption, maps))
    return rows


def _coarse_masks(mask_logits: np.ndarray, sizes: ImageSizes) -> np.ndarray:
    """Return masks [q, h', w'] in [0, 1] of about as many pixels as the logits, without padding."""
    height, width = (
        max(1, round(cells * network / padded))
        for cells, network, padded in zip(mask_logits.shape[1:], sizes.network, sizes.padded, strict=True)
    )
    return resized_masks(mask_logits, replace(sizes, image=(height, width)))
