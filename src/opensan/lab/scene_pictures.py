"""Training samples of the lab's small CLIP: images of lab scenes, windows in them, and a caption for each window.

A window is a rectangle of an image that is encoded by itself; the whole image is a window too. A caption names
the objects in its window. It never gives their position, and no mask is used.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opensan.lab.captions import caption, wrong_caption
from opensan.lab.scenes import Scene, SceneRegion, make_scene
from opensan.text.encoder import pad_tokens, tokenize

CONTEXT_LENGTH = 77


@dataclass(frozen=True)
class WindowBatch:
    """Images of one size, Q windows in each, and their captions."""

    images: Tensor
    """[B, 3, H, W] uint8 RGB."""
    windows: Tensor
    """[B, Q, h, w] bool on the grid of patches; the first is the whole image."""
    tokens: Tensor
    """[B * Q, L] int64."""
    wrong_tokens: Tensor
    """[B * Q, L] int64: captions in which one word is wrong."""

    def to(self, device: torch.device) -> "WindowBatch":
        tensors = (self.images, self.windows, self.tokens, self.wrong_tokens)
        return WindowBatch(*(tensor.to(device) for tensor in tensors))


@dataclass(frozen=True)
class PictureKind:
    """Settings of the scenes that are drawn and of the crops taken from them."""

    side: int
    """Scenes are square; their side in pixels."""
    crop: int
    """Side in pixels of the crop around an object; equal to `side` for the whole scene."""
    objects: tuple[int, int]
    radius: tuple[float, float]
    windows: int = 0
    """Windows in each image, besides the whole."""


CLOSE_UPS = PictureKind(side=64, crop=40, objects=(1, 1), radius=(0.16, 0.38))
WHOLE_SCENES = PictureKind(side=96, crop=96, objects=(1, 5), radius=(0.11, 0.24), windows=3)


Picture = tuple[np.ndarray, np.ndarray, list[tuple[int, ...]], list[tuple[int, ...]]]
"""Image [H, W, 3], windows [Q, h, w], and for each window the tokens of a right and of a wrong caption."""


class ScenePictures:
    """Images of lab scenes with captions (a `TrainingSource`). Every sample is a scene of its own."""

    def __init__(self, seed: int, count: int, kind: PictureKind, patch_size: int) -> None:
        self.seed = seed
        self.count = count
        self.kind = kind
        self.patch_size = patch_size

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"scene {index}"

    def scene(self, index: int) -> Scene:
        """Draw the scene of sample `index`."""
        kind = self.kind
        return make_scene(self.seed, index, (kind.side, kind.side), objects=kind.objects, radius=kind.radius)

    def load(self, index: int, generator: np.random.Generator) -> Picture:
        return self.look_at(self.scene(index), generator)

    def look_at(self, scene: Scene, generator: np.random.Generator) -> Picture:
        """Crop and turn the scene at random, and choose windows and captions."""
        kind = self.kind
        boxes = [_around(_draw(scene.objects, generator), kind.crop, kind.side, generator)]
        boxes += _windows(scene, kind.windows, generator)
        regions_of_boxes = [regions_in(scene, box) for box in boxes]
        texts = [tokens(caption(regions, generator)) for regions in regions_of_boxes]
        wrong = [tokens(wrong_caption(regions, generator)) for regions in regions_of_boxes]
        top, left, side = boxes[0]
        image = scene.image[top : top + side, left : left + side]
        windows = np.stack([_on_grid(box, (top, left), side, self.patch_size) for box in boxes])
        if generator.random() < 0.5:
            image, windows = image[:, ::-1], windows[:, :, ::-1]
        if kind.crop < kind.side and generator.random() < 0.3:
            turns = int(generator.integers(1, 4))
            image, windows = np.rot90(image, turns), np.rot90(windows, turns, axes=(1, 2))
        return np.ascontiguousarray(image), np.ascontiguousarray(windows), texts, wrong

    @staticmethod
    def collate(samples: list[Picture]) -> WindowBatch:
        images, windows, texts, wrong = zip(*samples, strict=True)
        count = sum(map(len, texts))
        padded = pad_tokens([row for rows in (*texts, *wrong) for row in rows])
        return WindowBatch(
            torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
            torch.from_numpy(np.stack(windows)),
            padded[:count],
            padded[count:],
        )


Box = tuple[int, int, int]
"""(top, left, side) in pixels of the scene."""


def regions_in(scene: Scene, box: Box) -> list[SceneRegion]:
    """Return the regions that a caption of the box may name: objects mostly inside, and grounds of a large share."""
    top, left, side = box
    window = scene.index_map[top : top + side, left : left + side]
    everywhere = np.bincount(scene.index_map.ravel(), minlength=len(scene.regions))
    inside = np.bincount(window.ravel(), minlength=len(scene.regions))
    return [
        region
        for region, total, count in zip(scene.regions, everywhere, inside, strict=True)
        if count > (0.15 * window.size if region.ground else 0.6 * total)
    ] or [scene.regions[int(inside.argmax())]]


@functools.lru_cache(maxsize=200_000)
def tokens(text: str) -> tuple[int, ...]:
    """Return token ids, cut to CLIP's context length with the end token kept: captions of other data may be long."""
    numbers = tokenize(text)
    return tuple(numbers if len(numbers) <= CONTEXT_LENGTH else [*numbers[: CONTEXT_LENGTH - 1], numbers[-1]])


def _draw(objects: Sequence[SceneRegion], generator: np.random.Generator) -> SceneRegion:
    return objects[int(generator.integers(len(objects)))]


def _around(region: SceneRegion, side: int, room: int, generator: np.random.Generator) -> Box:
    """Return a box of `side` pixels around the object, off its middle, inside a scene of `room` pixels."""
    slack = 0.8 * max(side / 2 - region.radius, 0) + 2
    top, left = (round(c - side / 2 + generator.uniform(-slack, slack)) for c in region.centre)
    return min(max(top, 0), room - side), min(max(left, 0), room - side), side


def _windows(scene: Scene, count: int, generator: np.random.Generator) -> list[Box]:
    """Return windows on up to count - 1 objects, the rest on ground that has the fewest objects of a few tries."""
    room = len(scene.image)
    chosen = generator.permutation(len(scene.objects))[: max(count - 1, 0)]
    boxes = []
    for index in chosen:
        region = scene.objects[index]
        side = int(np.clip(2 * region.radius * generator.uniform(1.05, 1.5), 20, 56))
        boxes.append(_around(region, side, room, generator))
    while len(boxes) < count:
        tries = []
        for _ in range(8):
            side = int(generator.integers(20, 41))
            top, left = (int(corner) for corner in generator.integers(0, room - side + 1, 2))
            tries.append((top, left, side))
        boxes.append(min(tries, key=lambda box: _share_of_objects(scene, box)))
    return boxes


def _share_of_objects(scene: Scene, box: Box) -> float:
    top, left, side = box
    return float((scene.index_map[top : top + side, left : left + side] >= len(scene.grounds)).mean())


def _on_grid(box: Box, origin: tuple[int, int], side: int, patch_size: int) -> np.ndarray:
    """Return [h, w] bool: the patches that the box covers, at least one, of the image at `origin` of `side` pixels."""
    grid = np.zeros((side // patch_size,) * 2, dtype=bool)
    first = [round((corner - start) / patch_size) for corner, start in zip(box[:2], origin, strict=True)]
    last = [round((corner - start + box[2]) / patch_size) for corner, start in zip(box[:2], origin, strict=True)]
    grid[tuple(slice(a, max(b, a + 1)) for a, b in zip(first, last, strict=True))] = True
    return grid
