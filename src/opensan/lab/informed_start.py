"""Initialize a small image tower from image statistics, because it must learn from few images.

Patch embedding: the principal components of patches, whitened and mixed, so that every channel carries as much as any
other from the first step. Positions: sines and cosines of row and column, so that neighbours start as neighbours.
From noise, a tower this small sees colours at once but needs thousands of steps before it sees a shape.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from opensan.config import ImageConfig
from opensan.model.backbones.clip_vit import VisionTower
from opensan.train.san import normalise

PATCHES = 20_000
REGULARISATION = 0.03
"""Added to every component's variance: weak components are noise, and whitening must not make them loud."""

SCALE = 0.5
LONGEST_WAVE = 40.0


def informed_start(visual: VisionTower, pictures: Sequence[np.ndarray], image: ImageConfig, seed: int = 0) -> None:
    """Set patch embedding and position table of `visual` in place, from `pictures` [H, W, 3] uint8 of any sizes."""
    visual.conv1.weight.data.copy_(_whitening(pictures, visual.conv1.weight.shape, image, seed))
    tokens, width = visual.positional_embedding.shape
    side = math.isqrt(tokens - 1)
    visual.positional_embedding.data[0] = 0
    visual.positional_embedding.data[1:] = SCALE * waves(side, width)


def waves(side: int, width: int) -> torch.Tensor:
    """Return [side * side, width]: sines and cosines of the row in the first half, of the column in the second."""
    count = width // 4
    frequency = 1.5 * LONGEST_WAVE ** -(torch.arange(count) / count)
    phase = torch.arange(side)[:, None] * frequency
    axis = torch.cat([phase.sin(), phase.cos()], dim=1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, width)


def _whitening(pictures: Sequence[np.ndarray], shape: torch.Size, image: ImageConfig, seed: int) -> torch.Tensor:
    """Return convolution weights of `shape` [C, 3, p, p] that whiten random patches of `pictures`."""
    width, _, patch, _ = shape
    generator = np.random.default_rng([seed, 7])
    patches = []
    for _ in range(PATCHES):
        picture = pictures[int(generator.integers(len(pictures)))]
        y, x = (int(generator.integers(side - patch + 1)) for side in picture.shape[:2])
        patches.append(picture[y : y + patch, x : x + patch])
    pixels = normalise(torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2), image).flatten(1).double()
    variances, directions = torch.linalg.eigh(pixels.T @ pixels / len(pixels))
    variances, directions = variances.flip(0)[:width], directions.flip(1)[:, :width]
    whitened = (directions / (variances + REGULARISATION).sqrt()).T
    mixing = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double()).Q
    return (SCALE * mixing @ whitened).reshape(shape).float()
