"""Scores, where somebody asks for them.

Letters: Q queries, K words, h w stride-16 grid, H0 W0 the answer.
"""

import torch
from torch import Tensor

from opensan.assemble.resize import mask_bands
from opensan.structures import ImageSizes

BAND_FLOATS = 1 << 20
"""About how many floats a band of rows may need for its scores and masks (4 MB: a processor's cache)."""


def label_scores(mask_logits: Tensor, probabilities: Tensor, sizes: ImageSizes, labels: Tensor) -> Tensor:
    """The score of the word that `labels` [H0, W0] names at each pixel: [H0, W0] float, 0 or more, may exceed 1.

    The other arguments as for `label_map`. Only words that occur are computed, a band of rows at a time.
    """
    scores = torch.empty(labels.shape, dtype=mask_logits.dtype, device=mask_logits.device)
    queries, words = probabilities.shape
    weights = probabilities.T
    rows = max(1, BAND_FLOATS // ((queries + words) * labels.shape[1]))
    for top, masks in mask_bands(mask_logits, sizes, rows):
        winners = labels[top : top + rows].long().flatten()
        occurs = winners.bincount(minlength=words) > 0
        band = weights[occurs] @ masks.flatten(1)
        index = (occurs.cumsum(0) - 1)[winners]
        scores[top : top + rows] = band.gather(0, index.unsqueeze(0)).view(masks.shape[1:])
    return scores


def score_maps(mask_logits: Tensor, probabilities: Tensor, sizes: ImageSizes) -> Tensor:
    """All scores [K, H0, W0]: the plain form, for inspection and tests; needs the memory that `label_map` avoids."""
    (_, masks), *_ = mask_bands(mask_logits, sizes, sizes.image[0])
    return torch.einsum("qk,qhw->khw", probabilities, masks)
