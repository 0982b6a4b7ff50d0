"""Train queries that have a place: the one at a cell of a grid answers with the segment that covers its cell.

A DETR's queries must first divide the image among themselves, which takes many thousand samples. Here that is settled
beforehand: each starts at the position of its cell, attending to what lies there, and is always taught that segment.
So every query learns from every image, and a few hundred photographs are enough to learn what belongs together.
It is an initialisation and an assignment; the architecture is SAN's.

Letters: B batch, Q queries, K words, P points of the label grid, G its side, C channels.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.lab.informed_start import waves
from opensan.lab.photo.crops import CropBatch
from opensan.model import SAN
from opensan.model.fusion import MapProjection
from opensan.model.side_adapter import SideAdapter
from opensan.model.transformer import SideBlock
from opensan.structures import Proposals, TextClassifier
from opensan.train.matcher import LossWeights
from opensan.train.san import normalise
from opensan.vocabulary import UNLABELLED

POSITION = 1.0
"""Size of the position tables, beside contents of about 1."""
POSITION_CHANNELS = 40
"""Dimensions of the tokens that hold positions, and at the start nothing else."""
COPYING_BLOCKS = 3
NEARNESS = 4.0
"""Deviation of their attention logits at the start."""
COPIED = 0.5
"""Share of what they see at a token's position that they add to it."""
SPREAD = 2.5
"""Deviation of the mask logits at the start."""
OFFSET = -1.5
"""Added to them."""
ELSEWHERE = 0.2
"""Weight of the mask loss of queries whose cell is not labelled: they learn what they do not cover."""


def anchored_start(adapter: SideAdapter, grid: int) -> None:
    """Start the queries of `adapter` on the cells of a `grid` x `grid` grid, in place."""
    config = adapter.config
    assert config.queries == grid * grid
    side = config.image_size // config.patch_size
    table = waves(side, config.width)
    directions = torch.linalg.svd(table - table.mean(0), full_matrices=False).Vh[:POSITION_CHANNELS]
    table = POSITION * (table - table.mean(0)) @ directions.T @ directions
    with torch.no_grad():
        adapter.patch_position.copy_(table)
        maps = table.T.unflatten(1, (side, side))[None]
        cells = F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False)
        adapter.query_position.copy_(cells[0].flatten(1).T)
        content = torch.eye(config.width) - directions.T @ directions
        fused = (cast(MapProjection, projection).projection for projection in adapter.fusion.values())
        for into in (adapter.patch_embedding, *fused):
            weight, bias = cast(Tensor, into.weight), cast(Tensor, into.bias)
            weight.copy_((content @ weight.flatten(1)).view_as(weight))
            bias.copy_(content @ bias)
        for block in adapter.blocks[:COPYING_BLOCKS]:
            _copy_from_the_same_position(cast(SideBlock, block), directions, content, table)


def _copy_from_the_same_position(block: SideBlock, directions: Tensor, content: Tensor, table: Tensor) -> None:
    """Make the block's attention compare positions, and copy the contents that are there."""
    heads, width = block.attn.heads, len(content)
    near = F.layer_norm(table, (width,)) @ directions.T
    spread = (near @ near.T / math.sqrt(width / heads)).std()
    same = F.pad(directions, (0, 0, 0, width // heads - len(directions))).repeat(heads, 1)
    mixing = torch.linalg.qr(torch.randn(width, width)).Q
    block.attn.qkv.weight.copy_(torch.cat([*(2 * [same * (NEARNESS / spread).sqrt()]), mixing @ content]))
    block.attn.proj.weight.copy_(COPIED * content @ mixing.T)


@torch.no_grad()
def alike_is_together(model: SAN, batch: CropBatch) -> None:
    """Start the masks of `model`: pixels that look as a query does, compared with the mean of all, are in its mask."""
    head = model.side_adapter.head
    pixels, queries = (cast(nn.Linear, perceptron.layers[-1]) for perceptron in (head.pixel_mlp, head.query_mlp))
    head.query_mlp.load_state_dict(head.pixel_mlp.state_dict())
    seen: list[Tensor] = []
    with pixels.register_forward_hook(lambda _module, _inputs, answer: seen.append(answer)):
        inputs = normalise(batch.images, model.config.image)
        model.propose(inputs, features=batch.features)
        mean = seen[-1].flatten(0, -2).mean(0)
        pixels.bias.sub_(mean)
        queries.bias.sub_(mean)
        logits = model.propose(inputs, features=batch.features).mask_logits
    scale = (SPREAD / logits.std()).sqrt()
    for layer in (pixels, queries):
        layer.weight.mul_(scale)
        layer.bias.mul_(scale)
    pixels.weight[0], pixels.bias[0] = 0, 1
    queries.weight[0], queries.bias[0] = 0, OFFSET - SPREAD / logits.std() * logits.mean()


class AnchoredTask(nn.Module):
    """Crops to losses: each query's mask against its segment, and its name among the data set's words."""

    def __init__(
        self, model: SAN, texts: Sequence[TextClassifier], others: Sequence[Tensor], weights: LossWeights
    ) -> None:
        """Hold the model.

        Args:
            model: with a square number of queries.
            texts: the words of each data set.
            others: for each data set, [K + 1] bool: what its unlabelled pixels may be called, "no object" last.
            weights: of the losses.
        """
        super().__init__()
        self.model = model
        self.texts = tuple(texts)
        self.others = tuple(others)
        self.weights = weights
        self.grid = math.isqrt(model.config.side_adapter.queries)

    def prepare(self, batches: Sequence[CropBatch]) -> None:
        """Share nothing between the micro-batches of a step."""

    def forward(self, batch: CropBatch, prepared: None) -> dict[str, Tensor]:
        """Return weighted losses by name; those of an earlier supervised block end with its number."""
        pixels = normalise(batch.images, self.model.config.image)
        proposals = self.model.propose(pixels, supervise=True, features=batch.features)
        wanted = segments_of_queries(batch.labels, self.grid)
        losses: dict[str, Tensor] = {}
        for number, layer in enumerate((proposals, *proposals.auxiliary)):
            suffix = f"_{number - 1}" if number else ""
            layer_losses = self._losses(layer, batch, wanted)
            losses |= {f"loss_{name}{suffix}": value for name, value in layer_losses.items()}
        return losses

    def _losses(self, layer: Proposals, batch: CropBatch, wanted: Tensor) -> dict[str, Tensor]:
        share = _share_of_each(wanted)
        mask, dice, outside = mask_losses(layer.mask_logits, batch.labels, wanted)
        named = self.model.classify(layer, self.texts[batch.dataset]).log_softmax(-1)
        right = -named.gather(2, wanted.clamp(min=0).unsqueeze(2)).squeeze(2)
        rest = -named.masked_fill(~self.others[batch.dataset], -torch.inf).logsumexp(-1)
        unnamed = (wanted == UNLABELLED).float() / wanted.numel()
        return {
            "ce": self.weights.classification * (share * right + unnamed * rest).sum(),
            "mask": self.weights.mask * ((share * mask).sum() + ELSEWHERE * outside),
            "dice": self.weights.dice * (share * dice).sum(),
        }


def segments_of_queries(labels: Tensor, grid: int) -> Tensor:
    """Assign to each query the label of the segment that it must find: [B, Q] of `labels` [B, G, G].

    It is the label at the middle of the query's cell; a segment that covers no such point gets the query that is the
    nearest to one of its pixels.
    """
    side = labels.shape[-1]
    middle = ((torch.arange(grid) + 0.5) * side / grid).long()
    wanted = labels[:, middle][:, :, middle].flatten(1).clone()
    for image, own in zip(labels, wanted, strict=True):
        for label in sorted(set(image.unique().tolist()) - set(own.tolist())):
            if label >= 0:
                rows, columns = (image == label).nonzero(as_tuple=True)
                pixel = len(rows) // 2
                cell = (rows[pixel] * grid // side) * grid + columns[pixel] * grid // side
                own[cell] = label
    return wanted


def _share_of_each(wanted: Tensor) -> Tensor:
    """Weigh the queries [B, Q] that have a segment, by the root of how many have the same; the sum is 1."""
    same = (wanted[:, :, None] == wanted[:, None]).sum(2)
    weight = (wanted >= 0) / same.sqrt()
    return weight / weight.sum().clamp(min=1)


def mask_losses(logits: Tensor, labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compare masks with their segments.

    Args:
        logits: [B, Q, h, w].
        labels: [B, G, G].
        wanted: [B, Q] labels; negative: none.

    Returns:
        [B, Q] binary cross entropy and dice loss of each mask, which mean nothing where `wanted` is negative; and for
        those the mean cross entropy over what is labelled, which they do not cover.
    """
    side = labels.shape[-1]
    fine = F.interpolate(logits, size=(side, side), mode="bilinear", align_corners=False).flatten(2)
    labels = labels.flatten(1)
    inside = (labels[:, None] == wanted[:, :, None]).float()
    entropy = F.binary_cross_entropy_with_logits(fine, inside, reduction="none")
    shares = fine.sigmoid()
    dice = 1 - (2 * (shares * inside).sum(2) + 1) / (shares.sum(2) + inside.sum(2) + 1)
    other = ((wanted < 0)[:, :, None] & (labels >= 0)[:, None]).float()
    outside = (F.softplus(fine) * other).sum() / other.sum().clamp(min=1)
    return entropy.mean(2), dice, outside * (wanted < 0).float().mean()
