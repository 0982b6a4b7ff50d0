"""Steady labels over time: average each frame's proposals with those of earlier frames, shifted by the motion.

A query of the model is learned and finds much the same region in two neighbouring frames, so the mask logits of query 7
in both frames may be averaged, and its embeddings too. Where the image moved, the earlier mask is shifted along; points
that are not visible in the earlier frame (a new object, another scene) are not averaged. No word is involved: the
result is an encoding like any other. (Matching queries by mask and embedding instead of by number gave equal results;
averages of the words' scores flickered as much, were less often right, and cost more with every word.)

Letters: Q queries, D embedding, h w stride-16 grid, FINER h, FINER w the grid of the motion.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import map_coordinates, uniform_filter
from scipy.special import expit

from opensan.assemble.bands import to_array
from opensan.segmenters.base import Segmenter
from opensan.segmenters.proposals import with_proposals
from opensan.segmenters.results import Encoding

PAST = 0.8
"""Weight of the past where a point is visible in both frames: an average over about five frames."""

DIFFERENT = 0.3
"""Difference of two grey values in network input (of deviation 1) that likely belong to different objects."""

CUT = 0.6
"""If a smaller share of the points is visible in both frames, a new scene has begun."""

FINER = 4
"""Motion is computed on a grid that is finer than the masks' by this factor."""

LEVELS, ITERATIONS, WINDOW, SMOOTHING, RIDGE = 3, 3, 9, 5, 0.02
"""Settings of `motion`: the number of image scales, the steps on each, the sides of the squares in which a displacement
is fitted and then averaged, and the regularization that keeps flat areas still (in squared grey values)."""


@dataclass(frozen=True)
class Past:
    """State of the steadier: averages over the frames before."""

    mask_logits: np.ndarray
    """[Q, h, w] float32."""
    mask_embeddings: np.ndarray
    """[Q, D] float32, unit length."""
    grey: np.ndarray
    """[FINER h, FINER w] float32: the frame before."""


class Steadier:
    """Averages a clip's encodings over time; it needs them in order."""

    def __init__(self, past: Past | None = None) -> None:
        """`past` is an earlier steadier's state, to continue from."""
        self.past = past

    @classmethod
    def of(cls, segmenter: Segmenter) -> "Steadier":
        """Make one for this model's encodings. Raises UserError, one line, if it has no mask proposals."""
        with_proposals(segmenter, "a steadied video (steady=False and --no-steady do without)")
        return cls()

    def steadied(self, encoding: Encoding, pixels: np.ndarray) -> Encoding:
        """Return the next frame's encoding, averaged with those before; `pixels` [3, H, W] is its network input."""
        masks, embeddings = to_array(encoding["mask_logits"]), to_array(encoding["mask_embeddings"])
        grid = masks.shape[1:]
        grey = _grey(to_array(pixels), grid)
        if self.past is not None:
            masks, embeddings = _mixed(masks, embeddings, grey, self.past)
        self.past = Past(masks, embeddings, grey)
        return replace(encoding, arrays={**encoding.arrays, "mask_logits": masks, "mask_embeddings": embeddings})


def _mixed(masks: np.ndarray, embeddings: np.ndarray, grey: np.ndarray, past: Past) -> tuple[np.ndarray, np.ndarray]:
    flow = motion(grey, past.grey)
    visible = _blocks(_found_again(grey, past.grey, flow), masks.shape[1:])
    if visible.mean() < CUT:
        return masks, embeddings
    flow = np.stack([_blocks(axis, masks.shape[1:]) for axis in flow]) / FINER
    share = (PAST * visible).astype(np.float32)
    # A query's weight of the past is the mean over its region.
    weights = expit(masks)
    of_query = ((weights * share).sum(axis=(1, 2)) / weights.sum(axis=(1, 2)))[:, None]
    before = np.stack([moved(mask, flow) for mask in past.mask_logits])
    masks = masks + share * (before - masks)
    embeddings = embeddings + of_query * (past.mask_embeddings - embeddings)
    return masks, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def _found_again(now: np.ndarray, before: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Return how likely each point [h', w'] is visible in the frame before, at `flow` [2, h', w'] from it: 0 to 1."""
    position = np.indices(now.shape) + flow
    limits = np.array(now.shape)[:, None, None] - 0.5
    inside = ((position >= -0.5) & (position <= limits)).all(axis=0)
    return inside * np.exp(-np.square((now - moved(before, flow)) / DIFFERENT))


def motion(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the displacement of each point of `now` in `before`, both [h', w']: rows and columns, [2, h', w'] float32.

    Pyramidal Lucas and Kanade (1981): in each small square one displacement explains the difference best, in the sense
    of least squares; found on small pictures first, then refined on larger ones.
    """
    pyramid = [(now, before)]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape) >= 2 * WINDOW:
        pyramid.append((_halved(pyramid[-1][0]), _halved(pyramid[-1][1])))
    flow = np.zeros((2, *pyramid[-1][0].shape), dtype=np.float32)
    for small_now, small_before in reversed(pyramid):
        if flow.shape[1:] != small_now.shape:
            flow = _doubled(flow, small_now.shape)
        for _ in range(ITERATIONS):
            step = _step(small_now, moved(small_before, flow))
            flow = np.stack([uniform_filter(axis, SMOOTHING, mode="nearest") for axis in flow + step.clip(-1, 1)])
    return flow


def _step(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the displacement [2, h', w'] that reduces the difference most, in the square around each point."""
    down, across = np.gradient(before)
    difference = now - before
    products = (down * down, across * across, down * across, down * difference, across * difference)
    dd, aa, da, df, af = (uniform_filter(product, WINDOW, mode="nearest") for product in products)
    dd, aa = dd + RIDGE, aa + RIDGE
    return np.stack([aa * df - da * af, dd * af - da * df]) / (dd * aa - da * da)


def moved(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Sample `picture` [h', w'] at `flow` [2, h', w'] from each point; its border is extended."""
    return map_coordinates(picture, np.indices(picture.shape, dtype=np.float32) + flow, order=1, mode="nearest")


def _grey(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    return _blocks(pixels.mean(axis=0), (FINER * grid[0], FINER * grid[1]))


def _blocks(picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the means of `shape` equal blocks."""
    height, width = (side // parts for side, parts in zip(picture.shape, shape, strict=True))
    return picture.reshape(shape[0], height, shape[1], width).mean(axis=(1, 3))


def _halved(picture: np.ndarray) -> np.ndarray:
    height, width = (side // 2 for side in picture.shape)
    return _blocks(picture[: 2 * height, : 2 * width], (height, width))


def _doubled(flow: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Scale displacements to a picture of about twice as many points each way."""
    position = (np.indices(shape, dtype=np.float32) - 0.5) / 2
    return 2 * np.stack([map_coordinates(axis, position, order=1, mode="nearest") for axis in flow])
