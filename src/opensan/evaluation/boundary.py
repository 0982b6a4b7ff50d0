"""Boundary IoU (Cheng et al., CVPR 2021) of label maps: measures how well contours fit, which IoU hardly shows.

A class's band is the part of its mask within d pixels (chessboard distance) of another label or of the image's edge:
what d erosions by a 3 x 3 square take away. One pass over a label map gives the bands of all its classes.
"""

import math

import numpy as np

BAND_SHARE = 0.02
"""Width of the band as a share of the image's diagonal (the paper's, section 4)."""

_OUTSIDE = -2
"""Value of pixels beyond the image's edge; not a label."""


def band_width(shape: tuple[int, int]) -> int:
    """Return the band's width in pixels for an image of (H, W)."""
    return max(1, round(BAND_SHARE * math.hypot(*shape)))


def boundary_band(labels: np.ndarray, width: int) -> np.ndarray:
    """Return bool [H, W]: pixels within `width` of another label or the image's edge; labels [H, W] are -1 or more.

    A square has one label exactly if no two neighbours in it differ, so it is enough to look for differing neighbours.
    """
    padded = np.pad(labels, width, constant_values=_OUTSIDE)
    across = padded[:, 1:] != padded[:, :-1]
    down = padded[1:] != padded[:-1]
    square = 2 * width + 1
    return _any_of_next(_any_of_next(across, square - 1, axis=1), square, axis=0) | _any_of_next(
        _any_of_next(down, square, axis=1), square - 1, axis=0
    )


def _any_of_next(flags: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Return whether any of the `length` flags from each index on is set; `length` - 1 fewer along `axis`."""
    flags = flags.swapaxes(0, axis)
    reach = 1
    while reach < length:
        step = min(reach, length - reach)
        flags = flags[:-step] | flags[step:]
        reach += step
    return flags.swapaxes(0, axis)


def band_counts(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return [K, 3] int64: pixels of each class's band in the truth, in the prediction, and in both.

    truth and predicted are [H, W] with 0..K-1 or -1. Where the truth is unlabelled nothing is counted, and both maps
    end there as they end at the image's edge.
    """
    predicted = np.where(truth < 0, -1, predicted)
    width = band_width(truth.shape)
    in_truth = boundary_band(truth, width) & (truth >= 0)
    in_prediction = boundary_band(predicted, width) & (predicted >= 0)
    shared = in_truth & in_prediction & (truth == predicted)
    bands = truth[in_truth], predicted[in_prediction], truth[shared]
    return np.stack([np.bincount(band, minlength=num_classes) for band in bands], axis=1)
