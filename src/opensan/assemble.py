"""From proposals and their class probabilities to one label a pixel, without the K x H x W score tensor.

Letters: Q queries, K words, h w stride-16 grid, H W the padded network image, H0 W0 the answer.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from opensan.structures import ImageSizes

BAND_ELEMENTS = 8_000_000
"""About how many floats a band of rows may need for its scores and masks (32 MB)."""


def interpolation_matrix(grid: int, padded: int, network: int, image: int, like: Tensor) -> Tensor:
    """One axis of "bilinear to the padded size, crop, bilinear to the answer's size" as a matrix [image, grid].

    Bilinear resizing is linear and separable, so the official sequence of two resizes and a crop is one product
    from each side; interpolating the identity gives exactly the weights that the resize itself would use.
    """
    identity = torch.eye(grid, dtype=like.dtype, device=like.device).unsqueeze(0)
    at_padded = F.interpolate(identity, size=padded, mode="linear", align_corners=False)
    at_image = F.interpolate(at_padded[..., :network], size=image, mode="linear", align_corners=False)
    return at_image.squeeze(0).T.contiguous()


def mask_bands(mask_logits: Tensor, sizes: ImageSizes, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, mask probabilities [Q, rows, W0]) from top to bottom; mask_logits is [Q, h, w]."""
    h, w = mask_logits.shape[-2:]
    down = interpolation_matrix(h, sizes.padded[0], sizes.network[0], sizes.image[0], mask_logits)
    across = interpolation_matrix(w, sizes.padded[1], sizes.network[1], sizes.image[1], mask_logits).T
    for top in range(0, sizes.image[0], rows):
        yield top, (down[top : top + rows] @ mask_logits @ across).sigmoid_()


def label_map(mask_logits: Tensor, probabilities: Tensor, sizes: ImageSizes) -> Tensor:
    """The word with the highest score at every pixel: score[k, y, x] = sum_q probabilities[q, k] mask[q, y, x].

    Args:
        mask_logits: [Q, h, w], stride-16 grid of the padded network image.
        probabilities: [Q, K] softmax over words and "no object", without the "no object" column.
        sizes: of the image these come from.

    Returns:
        [H0, W0] int32 in 0..K-1. Ties go to the lowest class, as argmax answers them.

    Memory is bounded by a band of rows, not by K x H0 x W0.
    """
    height, width = sizes.image
    labels = torch.empty(height, width, dtype=torch.int32, device=mask_logits.device)
    queries, words = probabilities.shape
    weights = probabilities.T.contiguous()
    rows = max(1, BAND_ELEMENTS // ((queries + words) * width))
    for top, masks in mask_bands(mask_logits, sizes, rows):
        band = (weights @ masks.flatten(1)).unflatten(1, masks.shape[1:])
        labels[top : top + rows] = band.argmax(dim=0)
    return labels


def label_scores(mask_logits: Tensor, probabilities: Tensor, sizes: ImageSizes, labels: Tensor) -> Tensor:
    """The score of the word that `labels` [H0, W0] names at each pixel: [H0, W0] float, 0 or more, may exceed 1.

    The other arguments as for `label_map`. Only words that occur are computed, a band of rows at a time.
    """
    scores = torch.empty(labels.shape, dtype=mask_logits.dtype, device=mask_logits.device)
    queries, words = probabilities.shape
    weights = probabilities.T
    rows = max(1, BAND_ELEMENTS // ((queries + words) * labels.shape[1]))
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
