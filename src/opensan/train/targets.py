"""Training targets of a batch of images: segments, each with a class.

Letters: B batch, M most segments of an image in the batch, N matched masks, P points, H W image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from opensan.data.objects import class_of
from opensan.train.points import corners

NO_SEGMENT = -2
"""Fills `classes` where an image has fewer segments than M; -1 would mean unlabelled, as in label maps."""


class Targets(Protocol):
    """Segments of a batch, whose masks are read at points only."""

    @property
    def classes(self) -> Tensor:
        """[B, M] int64: the class of each segment, NO_SEGMENT after an image's last."""

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of segments of each of the B images; known without a transfer from the device."""

    def at_shared_points(self, points: Tensor) -> Tensor:
        """Return every segment's mask at its image's `points` [B, P, 2]: [B, M, P] in [0, 1]."""

    def at_own_points(self, image: Tensor, segment: Tensor, points: Tensor) -> Tensor:
        """Return N segments' masks (`image`, `segment`: [N] int64), each at its own `points` [N, P, 2]: [N, P]."""

    def labelled_at(self, points: Tensor, image: Tensor | None = None) -> Tensor:
        """Mark [N, P] the `points` [N, P, 2] whose pixels have a label, in images `image` [N] (None: in order)."""


@dataclass(frozen=True)
class LabelMapTargets:
    """Targets from maps: a segment for each value in an image's map; no mask is held in memory.

    The values are classes, or objects and classes as `opensan.data.objects.with_objects` joins them.
    """

    maps: Tensor
    """[B, H, W] integer: value of each pixel, negative where unlabelled."""
    classes: Tensor
    counts: tuple[int, ...]
    values: Tensor
    """[B, M] int64: the value of each segment's pixels, NO_SEGMENT after an image's last."""

    @classmethod
    def from_maps(cls, maps: Sequence[np.ndarray]) -> "LabelMapTargets":
        """Collect label maps [H, W] of equal size (integers; negative: unlabelled)."""
        present = [np.unique(labels[labels >= 0]) for labels in maps]
        counts = tuple(len(values) for values in present)
        values, classes = (np.full((len(maps), max(counts)), NO_SEGMENT, dtype=np.int64) for _ in range(2))
        for row, found in enumerate(present):
            values[row, : len(found)] = found
            classes[row, : len(found)] = class_of(found)
        return cls(torch.from_numpy(np.stack(maps)), torch.from_numpy(classes), counts, torch.from_numpy(values))

    def to(self, device: torch.device | str) -> "LabelMapTargets":
        """Return the targets on `device`."""
        maps, classes, values = (
            tensor.to(device, non_blocking=True) for tensor in (self.maps, self.classes, self.values)
        )
        return replace(self, maps=maps, classes=classes, values=values)

    def pin_memory(self) -> "LabelMapTargets":
        """Return the targets in pinned memory, from which a GPU copies asynchronously."""
        maps, classes, values = (tensor.pin_memory() for tensor in (self.maps, self.classes, self.values))
        return replace(self, maps=maps, classes=classes, values=values)

    def at_shared_points(self, points: Tensor) -> Tensor:
        height, width = self.maps.shape[1:]
        indices, weights = corners(points, height, width)
        pixels = self.maps.flatten(1)
        values = points.new_zeros(*self.classes.shape, points.shape[1])
        for corner in range(4):  # one at a time, which takes a fourth of the memory
            labels = pixels.gather(1, indices[:, corner]).unsqueeze(1)
            values += weights[:, None, corner] * (labels == self.values.unsqueeze(2))
        return values

    def at_own_points(self, image: Tensor, segment: Tensor, points: Tensor) -> Tensor:
        height, width = self.maps.shape[1:]
        indices, weights = corners(points, height, width)
        labels = self.maps.flatten()[indices + image[:, None, None] * (height * width)]
        return (weights * (labels == self.values[image, segment][:, None, None])).sum(1)

    def labelled_at(self, points: Tensor, image: Tensor | None = None) -> Tensor:
        height, width = self.maps.shape[1:]
        columns = (points[..., 0] * width).long().clamp(0, width - 1)
        rows = (points[..., 1] * height).long().clamp(0, height - 1)
        image = torch.arange(len(points), device=points.device) if image is None else image
        return self.maps.flatten()[(image[:, None] * height + rows) * width + columns] >= 0


@dataclass(frozen=True)
class MaskTargets:
    """Targets with a mask for each segment: masks may overlap, and several may share a class."""

    masks: Tensor
    """[B, M, H, W] of 0 and 1, any dtype."""
    classes: Tensor
    counts: tuple[int, ...]

    @classmethod
    def from_masks(cls, masks: Sequence[Tensor], classes: Sequence[Tensor]) -> "MaskTargets":
        """Collect per image `masks` [M, H, W] and `classes` [M]; smaller images get 0 at the bottom and right."""
        counts = tuple(map(len, classes))
        height, width = (max(image_masks.shape[axis] for image_masks in masks) for axis in (1, 2))
        all_masks = masks[0].new_zeros(len(masks), max(counts), height, width)
        all_classes = torch.full((len(masks), max(counts)), NO_SEGMENT, dtype=torch.int64)
        for index, (image_masks, image_classes) in enumerate(zip(masks, classes, strict=True)):
            count, rows, columns = image_masks.shape
            all_masks[index, :count, :rows, :columns] = image_masks
            all_classes[index, :count] = image_classes
        return cls(all_masks, all_classes, counts)

    def to(self, device: torch.device | str) -> "MaskTargets":
        """Return the targets on `device`."""
        return replace(
            self, masks=self.masks.to(device, non_blocking=True), classes=self.classes.to(device, non_blocking=True)
        )

    def at_shared_points(self, points: Tensor) -> Tensor:
        height, width = self.masks.shape[2:]
        indices, weights = corners(points, height, width)
        pixels = self.masks.flatten(2)
        values = points.new_zeros(*self.classes.shape, points.shape[1])
        for corner in range(4):
            inside = pixels.gather(2, indices[:, None, corner].expand(-1, pixels.shape[1], -1))
            values += weights[:, None, corner] * inside
        return values

    def at_own_points(self, image: Tensor, segment: Tensor, points: Tensor) -> Tensor:
        count, height, width = self.masks.shape[1:]
        indices, weights = corners(points, height, width)
        start = (image * count + segment) * (height * width)
        return (weights * self.masks.flatten()[indices + start[:, None, None]]).sum(1)

    def labelled_at(self, points: Tensor, image: Tensor | None = None) -> Tensor:
        """Masks leave nothing unlabelled: what none of them covers is none of them."""
        return torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
