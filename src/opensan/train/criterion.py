"""Set criterion: class, mask and dice losses of matched queries at every supervised block (Mask2Former, SAN).

Letters: B batch, Q queries, K words, N matched masks, P points, h w stride-16 grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from opensan.train.matcher import LayerOutput, LossWeights, Matches, match
from opensan.train.points import PointSource, read_at_points
from opensan.train.targets import Targets

NO_TARGET = -100
"""Marks queries that the class loss leaves out."""


def mask_normalizer(targets: Sequence[Targets], device: torch.device | str) -> float:
    """Return the divisor of mask losses: the mean number of segments over ranks and micro-batches, at least 1.

    `targets` are all micro-batches of one step on this rank. The mean, not the sum, because gradients are averaged over
    ranks and micro-batches afterwards; so n micro-batches, n ranks and one large batch give the same gradient.
    """
    total = float(sum(sum(batch.counts) for batch in targets))
    batches = len(targets)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shared = torch.tensor(total, device=device)
        torch.distributed.all_reduce(shared)
        total = shared.item()
        batches *= torch.distributed.get_world_size()
    return max(total / batches, 1.0)


class SetCriterion:
    """Set criterion that matches queries with segments and returns weighted losses by name.

    Names: `loss_ce`, `loss_mask`, `loss_dice` for the last block; with suffix `_0`, `_1`, ... for the auxiliary ones.
    """

    def __init__(
        self,
        points: PointSource,
        weights: LossWeights | None = None,
        no_object_weight: float = 0.1,
        spare_unlabelled: bool = False,
        ignore_unlabelled: bool = False,
    ) -> None:
        """Set the criterion up.

        `spare_unlabelled`: see `SanTrainingConfig`. `ignore_unlabelled`: pixels without a label count in no mask loss
        and in no matching, because any segment may lie there; without it, no segment does.
        """
        self.points = points
        self.weights = weights or LossWeights()
        self.no_object_weight = no_object_weight
        self.spare_unlabelled = spare_unlabelled
        self.ignore_unlabelled = ignore_unlabelled

    def sparing(self) -> "SetCriterion":
        """Return the same criterion for labels that are known in parts only: the rest counts in no loss."""
        return SetCriterion(
            self.points, self.weights, self.no_object_weight, spare_unlabelled=True, ignore_unlabelled=True
        )

    def __call__(
        self, outputs: Sequence[LayerOutput], targets: Targets, normalizer: float
    ) -> tuple[dict[str, Tensor], list[Matches]]:
        """Return the losses, already weighted (training minimises their sum), and each layer's matches.

        `outputs`: the last block's first, then the auxiliary ones. `normalizer`: from `mask_normalizer`.
        Computed in float32 at least, whatever the precision of the model.
        """
        outputs = [LayerOutput(_at_least_float32(o.mask_logits), _at_least_float32(o.class_logits)) for o in outputs]
        first = outputs[0].mask_logits
        with torch.autocast(first.device.type, enabled=False):
            shared = self.points.shared(len(first), first)
            known = targets.labelled_at(shared) if self.ignore_unlabelled else None
            matches = match(outputs, targets, shared, self.weights, known)
            losses = {}
            for layer, (output, pairs) in enumerate(zip(outputs, matches, strict=True)):
                suffix = "" if layer == 0 else f"_{layer - 1}"
                mask, dice = self._mask_losses(output.mask_logits, targets, pairs)
                spared = self._on_unlabelled(output, targets, shared) if self.spare_unlabelled else None
                class_loss = self._class_loss(output, targets, pairs, spared)
                losses["loss_ce" + suffix] = self.weights.classification * class_loss
                losses["loss_mask" + suffix] = self.weights.mask * mask / normalizer
                losses["loss_dice" + suffix] = self.weights.dice * dice / normalizer
        return losses, matches

    def _class_loss(self, output: LayerOutput, targets: Targets, pairs: Matches, spared: Tensor | None) -> Tensor:
        """Return the cross entropy over all queries; the class of a query without a segment is no-object (K).

        Queries without a segment that `spared` [B, Q] bool marks are left out.
        """
        logits = output.class_logits
        no_object = logits.shape[2] - 1
        classes = torch.full(logits.shape[:2], no_object, device=logits.device)
        if spared is not None:
            classes[spared] = NO_TARGET
        classes[pairs.image, pairs.query] = targets.classes[pairs.image, pairs.segment]
        if spared is not None and bool((classes == NO_TARGET).all()):
            return logits.sum() * 0  # the mean of nothing would be nan
        # The weight is a float32 number in the official code, also where the rest is float64.
        class_weights = torch.ones(no_object + 1, device=logits.device)
        class_weights[no_object] = self.no_object_weight
        weights = class_weights.to(logits.dtype)
        return functional.cross_entropy(logits.transpose(1, 2), classes, weights, ignore_index=NO_TARGET)

    @torch.no_grad()
    def _on_unlabelled(self, output: LayerOutput, targets: Targets, points: Tensor) -> Tensor:
        """Mark [B, Q] the queries with more than half of their mask (at `points` [B, P, 2]) on unlabelled pixels."""
        shares = read_at_points(output.mask_logits, points).sigmoid()
        labelled = targets.labelled_at(points).unsqueeze(1)
        return (shares * labelled).sum(2) < 0.5 * shares.sum(2)

    def _mask_losses(self, mask_logits: Tensor, targets: Targets, pairs: Matches) -> tuple[Tensor, Tensor]:
        """Return BCE (mean over points) and dice, summed over matched masks; without any, 0 with gradients of 0."""
        matched = mask_logits[pairs.image, pairs.query]
        points = self.points.for_masks(matched.detach())
        logits = read_at_points(matched.unsqueeze(1), points).squeeze(1)
        shares = logits.sigmoid()
        with torch.no_grad():
            values = targets.at_own_points(pairs.image, pairs.segment, points)
        if self.ignore_unlabelled:
            known = targets.labelled_at(points, pairs.image)
            each = functional.binary_cross_entropy_with_logits(logits, values, reduction="none") * known
            mask = (each.sum(1) / known.sum(1).clamp(min=1)).sum()
            shares, values = shares * known, values * known
        else:
            # .sum() / P and not .mean(): the mean of no masks would be nan.
            mask = functional.binary_cross_entropy_with_logits(logits, values, reduction="sum") / points.shape[1]
        dice = 1 - (2 * (shares * values).sum(1) + 1) / (shares.sum(1) + values.sum(1) + 1)
        return mask, dice.sum()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
