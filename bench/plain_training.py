"""A training step in the official order, as the thing to be faster than: masks, points and costs image by image.

Written from a description of the official computation. Kept on purpose, besides what `plain.PlainSAN` keeps:

- a full-size binary mask for every class of every image, on the device, as floating-point numbers where it is read;
- matching for each supervised block and image by itself, at points drawn for that image: class, BCE and dice costs;
- mask losses for each supervised block, the matched target masks collected at full size and read at own points;
- recognition run once for every supervised block.

Letters: B batch, Q queries, K words, M segments of an image, N matched masks, P points, H W image.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from plain import PlainSAN

POINTS = 12_544
OVERSAMPLED = 3 * POINTS
UNCERTAIN = 3 * POINTS // 4
WEIGHTS = {"ce": 2.0, "mask": 5.0, "dice": 5.0}
NO_OBJECT = 0.1

Target = tuple[Tensor, Tensor]
"""Masks [M, H, W] bool and classes [M] int64 of an image."""


def targets_of(labels: Tensor) -> Target:
    """One mask for each class of a label map [H, W]; negative labels belong to none."""
    classes = labels.unique()
    classes = classes[classes >= 0].long()
    return torch.stack([labels == number for number in classes]), classes


def losses(plain: PlainSAN, pixels: Tensor, targets: Sequence[Target], text: Tensor) -> dict[str, Tensor]:
    """Weighted losses by name, of normalised pixels [B, 3, H, W] and unit text rows [K, D]."""
    proposals = plain.propose(pixels, supervise=True)
    normalizer = max(float(sum(len(classes) for _, classes in targets)), 1.0)
    found = {}
    for number, layer in enumerate((proposals, *proposals.auxiliary)):
        logits = plain.class_logits(layer.mask_embeddings, text)
        pairs = [
            match(one_logits, one_masks, target)
            for one_logits, one_masks, target in zip(logits, layer.mask_logits, targets, strict=True)
        ]
        mask, dice = mask_losses(layer.mask_logits, targets, pairs, normalizer)
        suffix = "" if number == 0 else f"_{number - 1}"
        found[f"loss_ce{suffix}"] = WEIGHTS["ce"] * class_loss(logits, targets, pairs)
        found[f"loss_mask{suffix}"] = WEIGHTS["mask"] * mask
        found[f"loss_dice{suffix}"] = WEIGHTS["dice"] * dice
    return found


def read(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps [N, C, h, w] at points [N, P, 2]: [N, C, P]."""
    return F.grid_sample(maps, 2.0 * points.unsqueeze(2) - 1.0, align_corners=False).squeeze(3)


@torch.no_grad()
def match(class_logits: Tensor, mask_logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Queries and segments that belong together, of one image: class_logits [Q, K + 1], mask_logits [Q, h, w]."""
    masks, classes = target
    cost_class = -class_logits.softmax(-1)[:, classes]
    points = torch.rand(1, POINTS, 2, device=mask_logits.device)
    wanted = read(masks.unsqueeze(1).to(mask_logits), points.repeat(len(masks), 1, 1)).squeeze(1)
    said = read(mask_logits.unsqueeze(1), points.repeat(len(mask_logits), 1, 1)).squeeze(1)
    inside = F.binary_cross_entropy_with_logits(said, torch.ones_like(said), reduction="none")
    outside = F.binary_cross_entropy_with_logits(said, torch.zeros_like(said), reduction="none")
    cost_mask = torch.einsum("qp,mp->qm", inside, wanted) + torch.einsum("qp,mp->qm", outside, 1 - wanted)
    shares = said.sigmoid()
    common = 2 * torch.einsum("qp,mp->qm", shares, wanted)
    cost_dice = 1 - (common + 1) / (shares.sum(-1)[:, None] + wanted.sum(-1)[None] + 1)
    cost = WEIGHTS["ce"] * cost_class + WEIGHTS["mask"] * cost_mask / POINTS + WEIGHTS["dice"] * cost_dice
    queries, segments = linear_sum_assignment(cost.cpu())
    return torch.as_tensor(queries), torch.as_tensor(segments)


def class_loss(logits: Tensor, targets: Sequence[Target], pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """logits [B, Q, K + 1]."""
    no_object = logits.shape[2] - 1
    wanted = torch.full(logits.shape[:2], no_object, device=logits.device)
    for row, (_, classes), (queries, segments) in zip(wanted, targets, pairs, strict=True):
        row[queries] = classes[segments]
    weights = torch.ones(no_object + 1, device=logits.device)
    weights[-1] = NO_OBJECT
    return F.cross_entropy(logits.transpose(1, 2), wanted, weights)


def mask_losses(
    mask_logits: Tensor, targets: Sequence[Target], pairs: Sequence[tuple[Tensor, Tensor]], normalizer: float
) -> tuple[Tensor, Tensor]:
    """BCE and dice of the matched masks; mask_logits [B, Q, h, w]."""
    said = torch.cat([masks[queries] for masks, (queries, _) in zip(mask_logits, pairs, strict=True)])
    wanted = torch.cat([masks[segments] for (masks, _), (_, segments) in zip(targets, pairs, strict=True)])
    said, wanted = said.unsqueeze(1), wanted.unsqueeze(1).to(said)
    with torch.no_grad():
        points = uncertain_points(said)
        values = read(wanted, points).squeeze(1)
    logits = read(said, points).squeeze(1)
    mask = F.binary_cross_entropy_with_logits(logits, values, reduction="none").mean(1).sum() / normalizer
    shares = logits.sigmoid()
    dice = 1 - (2 * (shares * values).sum(-1) + 1) / (shares.sum(-1) + values.sum(-1) + 1)
    return mask, dice.sum() / normalizer


def uncertain_points(mask_logits: Tensor) -> Tensor:
    """[N, P, 2]: three quarters of the points where masks [N, 1, h, w] are least certain of many, the rest anywhere."""
    count = len(mask_logits)
    candidates = torch.rand(count, OVERSAMPLED, 2, device=mask_logits.device)
    uncertainty = -read(mask_logits, candidates).squeeze(1).abs()
    best = uncertainty.topk(UNCERTAIN, dim=1).indices
    best = best + OVERSAMPLED * torch.arange(count, device=mask_logits.device)[:, None]
    chosen = candidates.view(-1, 2)[best.view(-1)].view(count, UNCERTAIN, 2)
    anywhere = torch.rand(count, POINTS - UNCERTAIN, 2, device=mask_logits.device)
    return torch.cat([chosen, anywhere], dim=1)
