"""Find the words that can win somewhere in a block of pixels, from the block's corners.

Within a block the mask logits are bilinear, so a mask's probability is a bilinear surface through its values at the
corners, give or take an error that its curvature bounds. A score is a weighted sum of masks: it too is a bilinear
surface, give or take the weighted errors, and two bilinear surfaces that do not cross at the corners cross nowhere.

Letters: Q queries, K words, G groups of blocks that share words, C candidate words, n blocks.
"""

import math

import torch
from torch import Tensor

STEEPEST = 0.5 - math.sqrt(1 / 12)
"""The mask probability below one half at which the sigmoid's second derivative is largest; it falls on either side."""

ROUNDING = 1e-6
"""Relative error of a float32 weighted sum over the queries, with room to spare."""


def corners(lattice: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return top left, top right, bottom left, bottom right of each cell of the lattice in `dim` and `dim` + 1."""
    top, bottom = lattice.narrow(dim, 0, lattice.shape[dim] - 1), lattice.narrow(dim, 1, lattice.shape[dim] - 1)
    width = lattice.shape[dim + 1] - 1
    four = [half.narrow(dim + 1, side, width) for half in (top, bottom) for side in (0, 1)]
    return four[0], four[1], four[2], four[3]


def mask_errors(masks: Tensor, steps: Tensor) -> Tensor:
    """Bound how far masks deviate from the bilinear surfaces through the corners of a lattice's cells.

    Args:
        masks: [n, a, b, Q], sigmoid of logits that are bilinear in each cell.
        steps: [n, 1, 1, Q], square of the logits' largest change along a cell's upper or lower edge, plus that along
            its left or right edge.

    Returns:
        [n, a - 1, b - 1, Q], with an allowance for the rounding of weighted sums of such masks.

    The interpolation error of f along an edge of length l is at most l^2 / 8 max|f''|; along an edge, the second
    derivative of sigmoid(z) is sigmoid''(z) times the square of z's slope. An error is never more than the range.
    In terms of v, the mask or one minus it, whichever is smaller, |sigmoid''| is v (1 - v) (1 - 2 v).
    """
    low, high = _range(*corners(masks, 1))
    nearest = torch.minimum(high, 1 - low).clamp_(max=STEEPEST)
    v = torch.maximum(nearest, torch.minimum(low, 1 - high))
    curvature = (1 - v).mul_(v).mul_(torch.rsub(v, 1, alpha=2))
    errors = torch.minimum(curvature.mul_(steps / 8), high - low)
    return errors.add_(high, alpha=ROUNDING)


def possible_winners(scores: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the words that lose to one other word at all corners of a block by more than both may deviate.

    Args:
        scores: [G, C, a, b, N] of each candidate at the lattice's points.
        errors: [G, C, a - 1, b - 1, N], how far each strays from its bilinear surface in a cell of the lattice.

    Returns:
        The word they were compared with, [G, a - 1, b - 1, N] int64 in 0..C-1, the best of the cell by its worst
        corner; and those that may win a pixel of the cell, [G, C, a - 1, b - 1, N] bool: it, and whoever may beat it.
    """
    at_corners = corners(scores, 2)
    low, _ = _range(*at_corners)
    best = first_maximum((low - errors).flatten(2)).view(low.shape[0], 1, *low.shape[2:])
    allowance = errors.gather(1, best)
    lead: Tensor | None = None
    for score in at_corners:
        over = score - (score.gather(1, best) - allowance)
        lead = over if lead is None else torch.maximum(lead, over, out=lead)
    assert lead is not None  # there are four corners
    return best.squeeze(1), lead.add_(errors) >= 0


def _range(*values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest of four."""
    a, b, c, d = values
    return (
        torch.minimum(torch.minimum(a, b), torch.minimum(c, d)),
        torch.maximum(torch.maximum(a, b), torch.maximum(c, d)),
    )


def group_size(words: int) -> int:
    """Return the size of the groups into which `first_maximum` splits so many words; 1 for no split."""
    return 1 if words <= 64 else 1 << round(math.log2(words) / 2)


def first_maximum(scores: Tensor) -> Tensor:
    """Return the index of the largest in dimension 1, the first of equals: [G, C, m] -> [G, m] int64.

    torch finds the largest value of many rows several times faster than its index; so first the group that holds it,
    where C divides into groups, then the index within.
    """
    count = scores.shape[1]
    size = group_size(count)
    if count % size or size == 1:
        return scores.max(dim=1).indices
    grouped = scores.unflatten(1, (count // size, size))
    group = grouped.amax(dim=2).max(dim=1).indices
    index = group[:, None, None].expand(-1, 1, size, -1)
    return group * size + grouped.gather(1, index).squeeze(1).max(dim=1).indices
