"""Process an image by bands of rows, in bounded memory for any image size; needs no torch.

Letters: K words, H0 W0 the image.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Scores = Callable[[slice], "torch.Tensor | np.ndarray"]
"""Function from a band of rows to the scores of all words there, [K, rows, W0] float32; the highest is the label's.
"""

BAND_FLOATS = 1 << 21
"""Number of floats that a band of scores may need, about (8 MB)."""


def to_array(tensor: "torch.Tensor | np.ndarray") -> np.ndarray:
    """Return a tensor of any device as a contiguous array."""
    return np.ascontiguousarray(tensor if isinstance(tensor, np.ndarray) else tensor.detach().cpu().numpy())


def row_bands(height: int, floats_a_row: int, floats: int) -> Iterator[slice]:
    """Cut the rows 0..`height` - 1 into bands that need about `floats` floats each, and at least one row."""
    rows = max(1, floats // floats_a_row)
    for top in range(0, height, rows):
        yield slice(top, min(height, top + rows))


def best_words(scores: Scores, size: tuple[int, int], words: int) -> np.ndarray:
    """Return the word with the highest score at every pixel of an image of `size`: [H0, W0] int32 in 0..K-1.

    Ties go to the lowest word.
    """
    labels = np.empty(size, dtype=np.int32)
    for rows in row_bands(size[0], words * size[1], BAND_FLOATS):
        labels[rows] = to_array(scores(rows).argmax(0))
    return labels


def scores_of_words(scores: Scores, labels: np.ndarray, words: int) -> np.ndarray:
    """Return the score of the word that `labels` [H0, W0] names at each pixel: [H0, W0] float32."""
    scores_there = np.empty(labels.shape, dtype=np.float32)
    for rows in row_bands(labels.shape[0], words * labels.shape[1], BAND_FLOATS):
        scores_there[rows] = np.take_along_axis(to_array(scores(rows)), labels[None, rows], axis=0)[0]
    return scores_there


def first_equal(rows: np.ndarray) -> np.ndarray:
    """Return for each row of a matrix [n, D] the index of the first row with the same bytes: [n] int64."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(row.tobytes(), index) for index, row in enumerate(rows)], dtype=np.int64)
