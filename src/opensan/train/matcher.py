"""Match queries with segments: minimum-cost bipartite matching (DETR; Mask2Former's costs at points).

Letters: B batch, Q queries, K words, M segments of an image, N matched masks, P points, h w stride-16 grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from opensan.config import Config, Weight
from opensan.train.points import read_at_points
from opensan.train.targets import NO_SEGMENT, Targets


class LossWeights(Config):
    """Weights of the three losses; the matching costs use the same."""

    classification: Weight = 2.0
    """Cross entropy."""
    mask: Weight = 5.0
    """Binary cross entropy at points."""
    dice: Weight = 5.0
    """Dice at points."""


@dataclass(frozen=True)
class LayerOutput:
    """The predictions of one supervised side block."""

    mask_logits: Tensor
    """[B, Q, h, w]."""
    class_logits: Tensor
    """[B, Q, K+1], no-object last."""


@dataclass(frozen=True)
class Matches:
    """N pairs of a query and a segment, by image, then by query."""

    image: Tensor
    """[N] int64: index in the batch."""
    query: Tensor
    """[N] int64."""
    segment: Tensor
    """[N] int64: index among the image's segments."""


def matching_costs(
    output: LayerOutput,
    targets: Targets,
    points: Tensor,
    values: Tensor,
    weights: LossWeights,
    known: Tensor | None = None,
) -> Tensor:
    """Return the cost of matching each query with each segment: [B, Q, M].

    `points` [B, P, 2] and the segments' `values` at them [B, M, P]. Columns beyond an image's segments mean nothing.
    `known` [B, P] bool: the points that count; None: all.
    """
    classes = targets.classes.masked_fill(targets.classes == NO_SEGMENT, 0)
    probabilities = output.class_logits.softmax(2)
    word = -probabilities.gather(2, classes.unsqueeze(1).expand(-1, probabilities.shape[1], -1))
    logits = read_at_points(output.mask_logits, points)
    shares, softplus = logits.sigmoid(), functional.softplus(logits)
    count: Tensor | int = points.shape[1]
    if known is not None:
        counted = known.unsqueeze(1)
        shares, softplus, values = shares * counted, softplus * counted, values * counted
        count = counted.sum(2, keepdim=True).clamp(min=1)
    # BCE at a point is softplus(x) - x t; only its second half depends on the pair.
    overlap = logits @ values.transpose(1, 2)
    mask = (softplus.sum(2, keepdim=True) - overlap) / count
    common = shares @ values.transpose(1, 2)
    dice = 1 - (2 * common + 1) / (shares.sum(2, keepdim=True) + values.sum(2).unsqueeze(1) + 1)
    return weights.classification * word + weights.mask * mask + weights.dice * dice


@torch.no_grad()
def match(
    outputs: Sequence[LayerOutput],
    targets: Targets,
    points: Tensor,
    weights: LossWeights,
    known: Tensor | None = None,
) -> list[Matches]:
    """Match every layer's queries with the segments, each layer for itself, at the shared `points` [B, P, 2].

    `known`: see `matching_costs`.
    """
    values = targets.at_shared_points(points)
    # One copy to the host for all layers, because each copy waits for the device.
    costs = torch.stack([matching_costs(output, targets, points, values, weights, known) for output in outputs]).cpu()
    # A loss that is not finite must be reported as a loss, not as an error of the assignment.
    matches = []
    for layer in costs.nan_to_num(nan=0.0).numpy():
        pairs = [linear_sum_assignment(cost[:, :count]) for cost, count in zip(layer, targets.counts, strict=True)]
        image = [index for index, (queries, _) in enumerate(pairs) for _ in queries]
        query = [int(value) for queries, _ in pairs for value in queries]
        segment = [int(value) for _, segments in pairs for value in segments]
        columns = torch.tensor([image, query, segment], dtype=torch.int64).to(points.device, non_blocking=True)
        matches.append(Matches(*columns))
    return matches
