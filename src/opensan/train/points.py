"""Compare masks at points of the unit square instead of at every pixel.

A point is (x, y) in [0, 1] x [0, 1], from the top left corner to the bottom right one, over an image's whole area
whatever its resolution. Reading is bilinear between pixel centres and zero outside (torch's grid_sample with
align_corners=False), so the stride-16 logits and a full-size label map are read at the same place.

Letters: B batch, Q queries, M segments of an image, N matched masks, P points, h w stride-16 grid, H W image.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


def read_at_points(maps: Tensor, points: Tensor) -> Tensor:
    """Read `maps` [B, C, h, w] at `points` [B, P, 2] of their image. Returns [B, C, P]."""
    grid = (2 * points - 1).unsqueeze(2)
    return functional.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(3)


def corners(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the four pixels that a bilinear reading at `points` [..., P, 2] mixes, and their weights.

    Returns flat pixel indices [..., 4, P] int64 in a `height` x `width` image, and weights [..., 4, P] in the points'
    dtype; a pixel outside of the image has weight 0 (and an index inside). For a binary mask b, the sum over the four
    of weight * b[index] is what `read_at_points` returns: with it, one label map serves for all of its segments at
    once, and no mask is ever made.
    """
    x = points[..., 0] * width - 0.5
    y = points[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    columns = torch.stack((left, left + 1, left, left + 1), dim=-2)
    rows = torch.stack((top, top, top + 1, top + 1), dim=-2)
    weights = (1 - (x.unsqueeze(-2) - columns).abs()) * (1 - (y.unsqueeze(-2) - rows).abs())
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    indices = rows.clamp(0, height - 1).long() * width + columns.clamp(0, width - 1).long()
    return indices, weights * inside


class PointSource(Protocol):
    """Source of the points at which the criterion compares masks; a test can use known points."""

    def shared(self, images: int, like: Tensor) -> Tensor:
        """Return points for matching, one set an image: [images, P, 2] on the device and in the dtype of `like`."""

    def for_masks(self, mask_logits: Tensor) -> Tensor:
        """Return points for the mask losses, one set a matched mask: [N, P, 2] for `mask_logits` [N, h, w]."""


class RandomPoints:
    """Random points: uniform for matching, mostly uncertain ones for losses (PointRend, section 3.1; SAN's recipe).

    Of `oversampling` times `count` uniform points a mask, the `importance` share of `count` with logits nearest to 0
    is kept; the rest are fresh uniform points. Random numbers come from torch's generator of the device.
    """

    def __init__(self, count: int = 12_544, oversampling: float = 3.0, importance: float = 0.75) -> None:
        self.count = count
        self.candidates = int(count * oversampling)
        self.uncertain = int(count * importance)

    def shared(self, images: int, like: Tensor) -> Tensor:
        return torch.rand(images, self.count, 2, device=like.device, dtype=like.dtype)

    @torch.no_grad()
    def for_masks(self, mask_logits: Tensor) -> Tensor:
        masks = len(mask_logits)
        candidates = torch.rand(masks, self.candidates, 2, device=mask_logits.device, dtype=mask_logits.dtype)
        logits = read_at_points(mask_logits.unsqueeze(1), candidates).squeeze(1)
        nearest = logits.abs().topk(self.uncertain, dim=1, largest=False, sorted=False).indices
        uncertain = candidates.gather(1, nearest.unsqueeze(2).expand(-1, -1, 2))
        fresh = torch.rand(masks, self.count - self.uncertain, 2, device=mask_logits.device, dtype=mask_logits.dtype)
        return torch.cat((uncertain, fresh), dim=1)


class FixedPoints:
    """The same points for every mask, for reproducible comparisons of losses."""

    def __init__(self, points: Tensor) -> None:
        """`points` [P, 2]."""
        self.points = points

    @classmethod
    def grid(cls, side: int) -> "FixedPoints":
        """Return the centres of `side` x `side` equal cells."""
        centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        return cls(torch.stack((columns.flatten(), rows.flatten()), dim=1))

    def shared(self, images: int, like: Tensor) -> Tensor:
        return self.points.to(like).expand(images, -1, -1)

    def for_masks(self, mask_logits: Tensor) -> Tensor:
        return self.points.to(mask_logits).expand(len(mask_logits), -1, -1)
