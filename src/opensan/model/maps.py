"""Functions on feature maps and their grids.

Letters: B batch, L patches, C channels, h w a grid.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.model.transformer import linear


def resize_position_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a square [L0, C] position table to [h * w, C], bicubically; untouched if it already fits."""
    side = round(table.shape[0] ** 0.5)
    assert side * side == table.shape[0], table.shape
    # An exported graph serves any grid, so it always resizes; resizing to the same size changes nothing.
    if not torch.compiler.is_exporting() and grid == (side, side):
        return table
    down, across = (_bicubic_matrix(side, size, table) for size in grid)
    rows = torch.einsum("hy,yxc->hxc", down, table.unflatten(0, (side, side)))
    return torch.einsum("wx,hxc->hwc", across, rows).flatten(0, 1)


def _bicubic_matrix(side: int, size: int, like: Tensor) -> Tensor:
    """Return the [size, side] matrix of bicubic resizing of one axis: on a GPU a product is faster than resizing."""
    identity = torch.eye(side, dtype=like.dtype, device=like.device).view(1, side, side, 1)
    return F.interpolate(identity, size=(size, 1), mode="bicubic", align_corners=False).view(side, size).T


def embed_patches(convolution: nn.Conv2d, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return patch tokens [B, h * w, C] of pixels [B, 3, H, W], and the grid (h, w); incomplete patches are dropped.

    A convolution whose patches do not overlap is one matrix product.
    """
    side = convolution.kernel_size[0]
    h, w = pixels.shape[2] // side, pixels.shape[3] // side
    inside = pixels[:, :, : h * side, : w * side]
    patches = inside.unflatten(3, (w, side)).unflatten(2, (h, side)).permute(0, 2, 4, 1, 3, 5)
    return linear(patches.flatten(3).flatten(1, 2), convolution.weight.flatten(1), convolution.bias), (h, w)


def _maximum_of_windows(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Compute `F.max_pool2d`, which takes ten times as long on a CPU because it notes where the maxima are."""
    maps = functools.reduce(torch.maximum, (maps[..., row::rows, :] for row in range(rows)))
    return functools.reduce(torch.maximum, (maps[..., column::columns] for column in range(columns)))


WIDEST_WINDOW = 5
"""Window of `adaptive_max_pool` when exported, in pixels: enough if each axis shrinks to a quarter or more."""


def adaptive_max_pool(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute `F.adaptive_max_pool2d`; when exported, by operations that other runtimes have for any size."""
    if not torch.compiler.is_exporting():
        if maps.shape[-2] % grid[0] == 0 == maps.shape[-1] % grid[1]:
            window = maps.shape[-2] // grid[0], maps.shape[-1] // grid[1]
            if maps.device.type == "cpu" and not torch.is_grad_enabled():
                return _maximum_of_windows(maps, *window)
            return F.max_pool2d(maps, window)
        if maps.device.type != "mps":  # Apple's GPUs support only the sizes above
            return F.adaptive_max_pool2d(maps, grid)
    for dim, size in zip((-2, -1), grid, strict=True):
        whole, position = maps.shape[dim], torch.arange(size, device=maps.device)
        first, last = position * whole // size, ((position + 1) * whole + size - 1) // size - 1
        windows = [maps.index_select(dim, torch.minimum(first + step, last)) for step in range(WIDEST_WINDOW)]
        maps = functools.reduce(torch.maximum, windows)
    return maps
