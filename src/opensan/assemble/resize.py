"""Resize mask logits at stride 16 to the image's pixels, one axis at a time.

Letters: Q queries, h w stride-16 grid, H W the padded network image, H0 W0 the answer.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from opensan.assemble import interpolation
from opensan.structures import ImageSizes

MaskBand = Callable[[slice], Tensor]
"""Function from a band of rows to the mask probabilities there, [Q, rows, W0] float32 in [0, 1]."""


def interpolation_matrices(mask_logits: Tensor, sizes: ImageSizes) -> tuple[Tensor, Tensor]:
    """Return the matrices of a resize, [H0, h] and [W0, w], on the device of the mask logits [Q, h, w]."""
    height, width = mask_logits.shape[-2:]
    down, across = interpolation.interpolation_matrices((height, width), sizes)
    return torch.from_numpy(down).to(mask_logits.device), torch.from_numpy(across).to(mask_logits.device)


def linear_pieces(grid: int, padded: int, network: int, image: int) -> tuple[Tensor, Tensor]:
    """Cut the pixels of one axis into pieces with linear weights: first and last pixel of each, both [pieces] int64.

    From one pixel to the next, the row of `interpolation_matrix` changes by the same amount throughout a piece, so
    that a resized value lies on the line between those at the piece's ends. Pieces neither overlap nor leave gaps.
    When an image is much smaller than the network image, a piece may be as short as one pixel.
    """
    rows = interpolation.interpolation_matrix(grid, padded, network, image, np.float64)
    second_difference = np.abs(rows[2:] - 2 * rows[1:-1] + rows[:-2]).sum(axis=1)
    bends = [*(np.flatnonzero(second_difference > 1e-9) + 1).tolist(), image - 1]
    first, last = [], []
    start = 0
    for bend in bends:
        # Between two neighbouring bends no pixel is left for a piece of its own.
        if bend > start or bend == image - 1 == start:
            first.append(start)
            last.append(bend)
            start = bend + 1
    return torch.tensor(first), torch.tensor(last)


def mask_bands(mask_logits: Tensor, sizes: ImageSizes, top: int = 0) -> MaskBand:
    """Return the function that resizes the mask logits [Q, h, w] for a band of rows, counted from row `top`."""
    down, across = interpolation_matrices(mask_logits, sizes)
    down = down[top:]
    return lambda rows: (down[rows] @ mask_logits @ across.T).sigmoid_()
