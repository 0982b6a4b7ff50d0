"""The set criterion against a plain reading of its definition: full masks, loops over images, brute-force matching."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from opensan.train.criterion import SetCriterion, mask_normalizer
from opensan.train.matcher import LayerOutput
from opensan.train.points import FixedPoints, RandomPoints, corners, read_at_points
from opensan.train.targets import LabelMapTargets, MaskTargets

QUERIES, WORDS = 4, 5


def plain_read(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """maps [M, H, W] at points [P, 2] -> [M, P], by grid_sample on the masks themselves."""
    grid = (2 * points - 1)[None, :, None]
    return functional.grid_sample(maps[None], grid, align_corners=False)[0, :, :, 0]


def plain_losses(outputs, masks, classes, points, normalizer):
    """The definition: for every layer and image, try all assignments; then sum."""
    losses = {}
    for layer, output in enumerate(outputs):
        wanted = torch.full(output.class_logits.shape[:2], WORDS)
        bce_sum, dice_sum = 0.0, 0.0
        for image, (image_masks, image_classes) in enumerate(zip(masks, classes, strict=True)):
            logits = plain_read(output.mask_logits[image], points)
            values = plain_read(image_masks.double(), points)
            probabilities = output.class_logits[image].softmax(-1)

            def bce(query, segment, logits=logits, values=values):
                return functional.binary_cross_entropy_with_logits(logits[query], values[segment])

            def dice(query, segment, logits=logits, values=values):
                share, value = logits[query].sigmoid(), values[segment]
                return 1 - (2 * (share * value).sum() + 1) / (share.sum() + value.sum() + 1)

            def cost(query, segment, p=probabilities, c=image_classes, bce=bce, dice=dice):
                return -2 * p[query, c[segment]] + 5 * bce(query, segment) + 5 * dice(query, segment)

            best = min(
                itertools.permutations(range(QUERIES), len(image_classes)),
                key=lambda queries, cost=cost: sum(float(cost(q, s)) for s, q in enumerate(queries)),
            )
            for segment, query in enumerate(best):
                wanted[image, query] = image_classes[segment]
                bce_sum = bce_sum + bce(query, segment)
                dice_sum = dice_sum + dice(query, segment)
        weights = torch.tensor([1.0] * WORDS + [0.1]).double()
        suffix = "" if layer == 0 else f"_{layer - 1}"
        flat = output.class_logits.flatten(0, 1)
        losses["loss_ce" + suffix] = 2 * functional.cross_entropy(flat, wanted.flatten(), weights)
        losses["loss_mask" + suffix] = 5 * bce_sum / normalizer
        losses["loss_dice" + suffix] = 5 * dice_sum / normalizer
    return losses


@pytest.fixture
def layers():
    """Two supervised blocks' outputs of a batch of three."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, QUERIES, 4, 6), (3, QUERIES, WORDS + 1)]
    return [
        LayerOutput(*(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))
        for _ in range(2)
    ]


def random_label_maps(images: int) -> list[np.ndarray]:
    """Maps [16, 24] with up to three of five classes and unlabelled pixels; the last one has none at all."""
    generator = np.random.default_rng(7)
    maps = [generator.choice([*generator.permutation(WORDS)[:3].tolist(), -1], size=(16, 24)) for _ in range(images)]
    maps[-1][:] = -1
    return [labels.astype(np.int16) for labels in maps]


def as_masks(maps: list[np.ndarray]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    classes = [np.unique(labels[labels >= 0]) for labels in maps]
    masks = [
        torch.from_numpy(np.stack([labels == c for c in own]) if len(own) else np.zeros((0, 16, 24), bool)).to(
            torch.uint8
        )
        for labels, own in zip(maps, classes, strict=True)
    ]
    return masks, [torch.from_numpy(own.astype(np.int64)) for own in classes]


@pytest.mark.parametrize("kind", ["label maps", "masks"])
def test_losses_equal_the_definition(layers, kind):
    maps = random_label_maps(3)
    masks, classes = as_masks(maps)
    targets = LabelMapTargets.from_maps(maps) if kind == "label maps" else MaskTargets.from_masks(masks, classes)
    points = torch.rand(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    normalizer = mask_normalizer([targets], "cpu")
    assert normalizer == 6

    ours, matches = SetCriterion(FixedPoints(points))(layers, targets, normalizer)
    theirs = plain_losses(layers, masks, classes, points, normalizer)

    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.item() == pytest.approx(theirs[name].item(), rel=1e-12), name
    assert [len(set(zip(m.image.tolist(), m.query.tolist(), strict=True))) for m in matches] == [6, 6]


def test_overlapping_masks_of_one_class_are_separate_segments(layers):
    masks = torch.zeros(2, 16, 24, dtype=torch.uint8)
    masks[0, :, :12] = 1
    masks[1, :, 6:18] = 1
    classes = torch.tensor([2, 2])
    empty = torch.zeros(0, 16, 24, dtype=torch.uint8)
    nothing = torch.zeros(0, dtype=torch.int64)
    targets = MaskTargets.from_masks([masks, empty, empty], [classes, nothing, nothing])
    points = FixedPoints.grid(8)
    ours, _ = SetCriterion(points)(layers, targets, 2.0)
    theirs = plain_losses(layers, [masks, empty, empty], [classes, nothing, nothing], points.points, 2.0)
    assert {n: v.item() for n, v in ours.items()} == pytest.approx({n: float(v) for n, v in theirs.items()}, rel=1e-12)


def test_a_batch_without_targets_trains_the_words_only(layers):
    layers = [LayerOutput(o.mask_logits.requires_grad_(), o.class_logits.requires_grad_()) for o in layers]
    targets = LabelMapTargets.from_maps([np.full((16, 24), -1, np.int16)] * 3)
    normalizer = mask_normalizer([targets], "cpu")
    assert normalizer == 1
    losses, _ = SetCriterion(RandomPoints(64))(layers, targets, normalizer)
    sum(losses.values()).backward()
    assert losses["loss_mask"].item() == losses["loss_dice_0"].item() == 0
    no_object = functional.cross_entropy(layers[0].class_logits.flatten(0, 1), torch.full((3 * QUERIES,), WORDS))
    assert losses["loss_ce"].item() == pytest.approx(2 * no_object.item())
    assert layers[0].class_logits.grad.abs().sum() > 0
    assert layers[0].mask_logits.grad.abs().sum() == 0  # there, but zero: no rank waits for it


def test_a_loss_that_is_not_finite_is_answered_not_raised(layers):
    layers[0].mask_logits[0, 0, 0, 0] = float("nan")
    targets = LabelMapTargets.from_maps(random_label_maps(3))
    losses, _ = SetCriterion(FixedPoints.grid(32))(layers, targets, 6.0)
    assert "nan" in {str(value.item()) for value in losses.values()}


def test_corners_read_a_mask_as_grid_sample_does():
    generator = torch.Generator().manual_seed(1)
    masks = (torch.rand(2, 3, 9, 13, generator=generator) < 0.5).double()
    edges = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.0]], dtype=torch.float64)
    points = torch.cat((torch.rand(2, 300, 2, generator=generator, dtype=torch.float64), edges.expand(2, -1, -1)), 1)
    indices, weights = corners(points, 9, 13)
    ours = masks.flatten(2)[:, :, None].expand(-1, -1, 4, -1).gather(3, indices[:, None].expand(-1, 3, -1, -1))
    ours = (ours * weights[:, None]).sum(2)
    assert torch.allclose(ours, read_at_points(masks, points), atol=1e-12)


def test_importance_sampling_prefers_uncertain_points():
    # Logits grow from left to right through 0 at the middle: uncertain points lie near x = 1/2.
    ramp = torch.linspace(-8, 8, 32).expand(2, 32, 32).contiguous()
    torch.manual_seed(0)
    source = RandomPoints(400, oversampling=3.0, importance=0.75)
    points = source.for_masks(ramp)
    distance = (points[..., 0] - 0.5).abs()
    assert points.shape == (2, 400, 2)
    # Of 1200 uniform points the 300 most uncertain fill the middle quarter; a quarter is uniform.
    assert distance[:, :300].quantile(0.9) < 0.13
    assert distance[:, 300:].quantile(0.9) > 0.4


def test_micro_batches_share_one_normalizer():
    maps = random_label_maps(3)
    both = [LabelMapTargets.from_maps(maps[:1]), LabelMapTargets.from_maps(maps[1:])]
    assert [sum(one.counts) for one in both] == [3, 3]
    assert mask_normalizer(both, "cpu") == 3
    assert mask_normalizer([LabelMapTargets.from_maps(maps[2:])], "cpu") == 1


def test_unlabelled_pixels_can_be_spared_from_no_object():
    """A query on unlabelled pixels need not say no-object; one on labelled pixels must, and so must all by default."""
    labels = np.full((8, 8), -1, dtype=np.int16)
    labels[:, :3] = 1  # class 1 on the left, nothing known about the rest
    targets = LabelMapTargets.from_maps([labels])
    masks = torch.full((1, 3, 8, 8), -9.0)
    masks[0, 0, :, :3], masks[0, 1, :, 4:], masks[0, 2, :, :2] = 9.0, 9.0, 9.0
    words = torch.zeros(1, 3, WORDS + 1, requires_grad=True)
    output = LayerOutput(masks, words + torch.eye(WORDS + 1)[1])
    for spare, silent in ((True, {1}), (False, set())):
        criterion = SetCriterion(FixedPoints.grid(8), spare_unlabelled=spare)
        losses, _ = criterion([output], targets, 1.0)
        (gradient,) = torch.autograd.grad(losses["loss_ce"], words, retain_graph=True)
        assert {query for query in range(3) if not gradient[0, query].any()} == silent


def test_masks_leave_nothing_unlabelled():
    targets = MaskTargets.from_masks([torch.zeros(1, 4, 4)], [torch.tensor([0])])
    assert targets.labelled_at(torch.rand(1, 5, 2)).all()
