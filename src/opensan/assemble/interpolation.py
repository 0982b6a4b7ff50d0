"""Resize mask logits at stride 16 to the image's pixels in the official way, as matrices; needs no torch.

Letters: Q queries, h w stride-16 grid, H0 W0 the image.
"""

from collections.abc import Callable

import numpy as np

from opensan.structures import ImageSizes


def interpolation_matrix(
    grid: int, padded: int, network: int, image: int, dtype: type[np.floating] = np.float32
) -> np.ndarray:
    """Return one axis of "bilinear to the padded size, crop, bilinear to the image's size" as a matrix [image, grid].

    Bilinear resizing is linear and separable, so the official sequence of two resizes and a crop is one product
    from each side. In float32, the numbers are those that torch's resize of the identity gives, to the last bit.
    """
    first, second, below, above = _neighbours(grid, padded, dtype)
    at_padded = np.zeros((padded, grid), dtype)
    rows = np.arange(padded)
    at_padded[rows, first] = below
    at_padded[rows, second] += above
    first, second, below, above = _neighbours(network, image, dtype)
    return _fused(at_padded[first], below[:, None], at_padded[second] * above[:, None])


def interpolation_matrices(grid: tuple[int, int], sizes: ImageSizes) -> tuple[np.ndarray, np.ndarray]:
    """Return the `interpolation_matrix` of both axes: [H0, h] and [W0, w], float32."""
    down, across = (
        interpolation_matrix(*axis) for axis in zip(grid, sizes.padded, sizes.network, sizes.image, strict=True)
    )
    return down, across


def mask_bands(mask_logits: np.ndarray, sizes: ImageSizes) -> Callable[[slice], np.ndarray]:
    """Return the function from a band of rows to the mask probabilities there, [Q, rows, W0]; mask_logits [Q, h, w]."""
    down, across = interpolation_matrices((mask_logits.shape[1], mask_logits.shape[2]), sizes)
    return lambda rows: _sigmoid(down[rows] @ mask_logits @ across.T)


def resized_masks(mask_logits: np.ndarray, sizes: ImageSizes) -> np.ndarray:
    """Return mask probabilities [Q, H0, W0] of mask logits [Q, h, w]."""
    return mask_bands(mask_logits, sizes)(slice(None))


def masks_at(mask_logits: np.ndarray, sizes: ImageSizes, row: int, column: int) -> np.ndarray:
    """Return mask probabilities [Q] at one pixel of the image; mask_logits is [Q, h, w]."""
    down, across = interpolation_matrices((mask_logits.shape[1], mask_logits.shape[2]), sizes)
    return _sigmoid(down[row] @ mask_logits @ across[column])


def masks_of_pixels(mask_logits: np.ndarray, sizes: ImageSizes, pixels: np.ndarray) -> np.ndarray:
    """Return mask probabilities [n, Q] at pixels of the image, [n, 2] row and column; mask_logits is [Q, h, w]."""
    down, across = interpolation_matrices((mask_logits.shape[1], mask_logits.shape[2]), sizes)
    parts = [np.zeros((0, len(mask_logits)), np.float32)]
    for start in range(0, len(pixels), 512):  # [Q, 512, w] at a time
        rows, columns = pixels[start : start + 512].T
        parts.append(_sigmoid(((down[rows] @ mask_logits) * across[columns]).sum(axis=2)).T)
    return np.concatenate(parts)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)), in the steps that numpy computes many numbers at a time: objects wait for this most."""
    result = np.negative(x)
    with np.errstate(over="ignore"):  # of a far negative number, exp is infinite, and the quotient 0, as it should be
        np.exp(result, out=result)
    result += 1
    return np.reciprocal(result, out=result)


def _neighbours(size: int, wanted: int, dtype: type[np.floating]) -> tuple[np.ndarray, ...]:
    """Return the two pixels of `size` around each of `wanted`, and the weight of each, all [wanted].

    Pixel centres are at halves, and the outermost pixels extend to the border (`align_corners=False`).
    """
    centres = np.arange(wanted, dtype=dtype) + dtype(0.5)
    position = np.maximum(_fused(centres, dtype(size) / dtype(wanted), dtype(-0.5)), dtype(0))
    first = np.minimum(position.astype(np.int64), size - 1)
    above = np.clip(position - first.astype(dtype), dtype(0), dtype(1))
    return first, np.minimum(first + 1, size - 1), dtype(1) - above, above


def _fused(a: np.ndarray, b: np.ndarray | np.floating, c: np.ndarray | np.floating) -> np.ndarray:
    """Return a b + c, rounded once as by a processor's fused multiply-add, for float32; float64 is rounded twice."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)
