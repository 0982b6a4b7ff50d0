"""Compute class probabilities, and scores of words where they are needed.

Letters: Q queries, K words, h w stride-16 grid, H0 W0 the answer.
"""

import torch
from torch import Tensor

from opensan.assemble.bands import row_bands
from opensan.assemble.resize import MaskBand, mask_bands
from opensan.structures import ImageSizes

BAND_FLOATS = 1 << 20
"""Number of floats of a band's scores and masks, about (4 MB: a processor's cache)."""


def class_probabilities(class_logits: Tensor) -> Tensor:
    """Return the softmax of class logits [..., K + 1], "no object" last, without the latter: [..., K]."""
    return class_logits.softmax(dim=-1)[..., :-1]


def label_scores(mask_logits: Tensor, probabilities: Tensor, sizes: ImageSizes, labels: Tensor) -> Tensor:
    """Return the score of each pixel's word in `labels` [H0, W0]: [H0, W0] float, 0 or more, may exceed 1.

    The other arguments as for `label_map`. Only words that occur are computed, a band of rows at a time.
    """
    scores = torch.empty(labels.shape, dtype=mask_logits.dtype, device=mask_logits.device)
    height, width = labels.shape
    queries, words = probabilities.shape
    weights = probabilities.T
    masks = mask_bands(mask_logits, sizes)
    for rows in row_bands(height, (queries + words) * width, BAND_FLOATS):
        winners = labels[rows].long().flatten()
        occurs = winners.bincount(minlength=words) > 0
        band = weights[occurs] @ masks(rows).flatten(1)
        index = (occurs.cumsum(0) - 1)[winners]
        scores[rows] = band.gather(0, index.unsqueeze(0)).view(-1, width)
    return scores


def band_scores(masks: MaskBand, probabilities: Tensor, rows: slice) -> Tensor:
    """Return all scores [K, rows, W0] of a band of rows, from class probabilities [Q, K]."""
    band = masks(rows)
    return (probabilities.T @ band.flatten(1)).unflatten(1, band.shape[1:])


def score_maps(mask_logits: Tensor, probabilities: Tensor, sizes: ImageSizes) -> Tensor:
    """Return all scores [K, H0, W0], for inspection and tests; needs the memory that `label_map` avoids."""
    return band_scores(mask_bands(mask_logits, sizes), probabilities, slice(0, sizes.image[0]))
