"""The way from mask logits to the photograph's pixels, as matrices: `opensan.assemble.resize` without torch."""

import numpy as np

from opensan.structures import ImageSizes


def interpolation_matrix(grid: int, padded: int, network: int, image: int) -> np.ndarray:
    """[image, grid] float32: bilinear to the padded size, crop, bilinear to the answer's size, of one axis."""
    return (_bilinear(network, image) @ _bilinear(grid, padded)[:network]).astype(np.float32)


def interpolation_matrices(grid: tuple[int, int], sizes: ImageSizes) -> tuple[np.ndarray, np.ndarray]:
    """`interpolation_matrix` of both axes: [H0, h] and [W0, w]."""
    down, across = (
        interpolation_matrix(*axis) for axis in zip(grid, sizes.padded, sizes.network, sizes.image, strict=True)
    )
    return down, across


def _bilinear(size: int, wanted: int) -> np.ndarray:
    """[wanted, size] float64: pixel centres stand at halves, and the outermost pixels go on to the border."""
    place = np.clip((np.arange(wanted) + 0.5) * size / wanted - 0.5, 0, size - 1)
    first = np.minimum(place.astype(int), max(size - 2, 0))
    matrix = np.zeros((wanted, size))
    rows = np.arange(wanted)
    matrix[rows, first] = 1 - (place - first)
    matrix[rows, np.minimum(first + 1, size - 1)] += place - first
    return matrix
