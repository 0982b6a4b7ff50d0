"""Which words can win somewhere in a block of pixels, told from the block's corners.

Within a block the mask logits are bilinear, so a mask's probability is a bilinear surface through its values at the
corners, give or take an error that its curvature bounds. A score is a weighted sum of masks: it too is a bilinear
surface, give or take the weighted errors, and two bilinear surfaces that do not cross at the corners cross nowhere.

Letters: Q queries, K words, G groups of blocks that share words, C candidate words, n blocks.
"""

import math

import torch
from torch import Tensor

STEEPEST = math.log(2 + math.sqrt(3))
"""Where the sigmoid's second derivative is largest; it falls on either side."""

ROUNDING = 1e-6
"""Relative error of a float32 weighted sum over the queries, with room to spare."""


def corners(lattice: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top left, top right, bottom left, bottom right of each cell of a lattice that lies in `dim` and `dim` + 1."""
    top, bottom = lattice.narrow(dim, 0, lattice.shape[dim] - 1), lattice.narrow(dim, 1, lattice.shape[dim] - 1)
    width = lattice.shape[dim + 1] - 1
    return tuple(half.narrow(dim + 1, side, width) for half in (top, bottom) for side in (0, 1))


def mask_errors(logits: Tensor, masks: Tensor) -> Tensor:
    """How far a mask strays from the bilinear surface through its corners, at most.

    Args:
        logits: [n, a, b, Q], bilinear within each cell of the lattice a x b.
        masks: their sigmoid.

    Returns:
        [n, a - 1, b - 1, Q], with an allowance for the rounding of weighted sums of such masks.

    The interpolation error of f along an edge of length l is at most l^2 / 8 max|f''|; of a bilinear z the sigmoid's
    second derivative along an edge is sigmoid''(z) times the square of z's slope. It is never more than the range.
    """
    top_left, top_right, bottom_left, bottom_right = corners(logits, 1)
    across = torch.maximum((top_right - top_left).abs_(), (bottom_right - bottom_left).abs_())
    down = torch.maximum((bottom_left - top_left).abs_(), (bottom_right - top_right).abs_())
    low, high = _range(top_left, top_right, bottom_left, bottom_right)
    nearest, farthest = torch.maximum(low, -high).clamp_(min=0), torch.maximum(-low, high)
    steepest = torch.minimum(nearest.clamp_(min=STEEPEST), farthest)
    slope = torch.sigmoid(-steepest)
    curvature = slope * (1 - slope) * (1 - 2 * slope)
    low, high = _range(*corners(masks, 1))
    errors = torch.minimum((across.square_() + down.square_()).mul_(curvature).div_(8), high - low)
    return errors.add_(high, alpha=ROUNDING)


def possible_winners(scores: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the words that lose to one and the same word at all corners of a block by more than both may stray.

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
    lead = None
    for score in at_corners:
        over = score - (score.gather(1, best) - allowance)
        lead = over if lead is None else torch.maximum(lead, over, out=lead)
    return best.squeeze(1), lead.add_(errors) >= 0


def _range(*values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of four."""
    a, b, c, d = values
    return (
        torch.minimum(torch.minimum(a, b), torch.minimum(c, d)),
        torch.maximum(torch.maximum(a, b), torch.maximum(c, d)),
    )


def group_size(words: int) -> int:
    """Into groups of how many `first_maximum` splits so many words; 1 if it doesn't."""
    return 1 if words <= 64 else 1 << round(math.log2(words) / 2)


def first_maximum(scores: Tensor) -> Tensor:
    """Index of the largest of dimension 1, the first of equals: [G, C, m] -> [G, m] int64.

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
