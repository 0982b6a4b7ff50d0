"""Segment images of any size in overlapping tiles and blend the tiles' scores; memory does not grow with the area.

Each tile has its own mask proposals: query 7 may be the river in one tile and a roof in the next, so mask logits of two
tiles cannot be averaged. Words mean the same in all tiles. Where tiles t overlap,

    score[k] = sum_t w_t sum_q probabilities_t[q, k] mask_t[q],    w_t falling to zero at the tile's border,

which is the score of one image with the proposals of all these tiles, each mask multiplied by its tile's weight. So a
blend needs only more matrix products like those that label an image, a few rows at a time; neither scores of all words
nor masks of a whole tile are ever stored.

Letters: Q queries, K words, h w stride-16 grid, H0 W0 the image.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from opensan.assemble.bands import Scores, scores_of_words
from opensan.assemble.calibration import calibrated_confidence, checked_threshold
from opensan.assemble.labels import best_words_of_masks
from opensan.assemble.resize import interpolation_matrices
from opensan.errors import UserError
from opensan.segmenters.base import Segmenter
from opensan.segmenters.proposals import with_proposals
from opensan.segmenters.results import Encoding, InputImage
from opensan.vocabulary import UNLABELLED, Vocabulary

OVERLAP = 5
"""Default overlap of neighbouring tiles: one part in so many of a tile."""


class Raster(Protocol):
    """An image that is read by window."""

    size: tuple[int, int]
    """(H0, W0) in pixels."""

    def read(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Read a window: pixels, uint8 RGB [height, width, 3], and which of them have data (bool; None for all)."""
        ...


@dataclass(frozen=True)
class ArrayRaster:
    """An image in memory, [H0, W0, 3] uint8 RGB, as a Raster."""

    array: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        return self.array.shape[0], self.array.shape[1]

    def read(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, None]:
        return self.array[top : top + height, left : left + width], None


@dataclass(frozen=True)
class Tiling:
    """Positions of an image's tiles: all of one size, inside the image, evenly spread."""

    tops: tuple[int, ...]
    """First rows, ascending."""
    lefts: tuple[int, ...]
    """First columns, ascending."""
    height: int
    width: int
    overlap: int
    """Pixels at a tile's border over which its weight falls; neighbours overlap by at least as many."""
    size: tuple[int, int]
    """(H0, W0) of the image."""

    @classmethod
    def plan(cls, size: tuple[int, int], tile: int, overlap: int | None = None) -> "Tiling":
        """Place tiles of `tile` x `tile` pixels, less in a narrow image, that overlap by `overlap` or a bit more.

        Raises ValueError, one line, unless 0 <= overlap <= tile / 2 (the default is a fifth of the tile).
        """
        overlap = tile // OVERLAP if overlap is None else overlap
        if not 0 <= overlap <= tile // 2:
            raise UserError(f"an overlap of {overlap} does not fit tiles of {tile}: choose 0 to {tile // 2} pixels")
        tops, lefts = (tile_starts(length, tile, overlap) for length in size)
        return cls(tops, lefts, min(tile, size[0]), min(tile, size[1]), overlap, size)

    @property
    def strips(self) -> list[tuple[int, int]]:
        """First row and row after the last of the strip that each row of tiles completes, from top to bottom."""
        return list(pairwise((*self.tops, self.size[0])))

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.tops) * len(self.lefts)


def tile_starts(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Return where tiles begin on one axis: the fewest that cover it, evenly spread, overlap `overlap` or more."""
    if length <= tile:
        return (0,)
    count = math.ceil((length - overlap) / (tile - overlap))
    return tuple(index * (length - tile) // (count - 1) for index in range(count))


def label_by_tiles(
    segmenter: Segmenter,
    raster: Raster,
    vocabulary: Vocabulary,
    tiling: Tiling,
    *,
    first_strip: int = 0,
    threshold: float = 0.0,
    batch_size: int = 1,
    advance: Callable[[int], None] = lambda tiles: None,
) -> Iterator[np.ndarray]:
    """Label an image strip by strip, from top to bottom.

    Each tile goes through the model like an image of its own: its short side becomes the model's, so a tile of
    twice that many pixels shows everything at half size. Two rows of tiles are in memory, as proposals, and one strip.

    Args:
        segmenter: the model.
        raster: the image.
        vocabulary: the words.
        tiling: `Tiling.plan(raster.size, tile, overlap)`.
        first_strip: where to go on with work that was interrupted; the strips are those of an uninterrupted run.
        threshold: pixels of less confidence are unlabelled, in [0, 1]. Confidence is as of `Segmentation.confidence`,
            from the blended scores, where the weights of overlapping tiles sum to one.
        batch_size: tiles that go through the model together.
        advance: called with a number of tiles when they are done.

    Yields:
        [rows, W0] int32 for each of `tiling.strips` from `first_strip` on: index into `vocabulary.names`, or -1 where
        a background word won, the confidence is too low or the image has no data.
    """
    work = _Work(segmenter, raster, vocabulary, tiling, checked_threshold(threshold), batch_size, advance)
    rows: dict[int, list[_Tile | None]] = {}
    for strip, (top, bottom) in list(enumerate(tiling.strips))[first_strip:]:
        needed = [row for row in range(strip + 1) if tiling.tops[row] + tiling.height > top]
        rows = {row: rows[row] if row in rows else work.tiles(row) for row in needed}
        yield work.labels(rows, strip, top, bottom)


@dataclass(frozen=True)
class _Tile:
    mask_logits: Tensor
    """[Q, h, w] float32."""
    probabilities: Tensor
    """[Q, K] float32."""
    valid: np.ndarray | None
    """[height, width] bool: which pixels have data; None for all."""


class _Work:
    """Values that all tiles of one run share."""

    def __init__(
        self,
        segmenter: Segmenter,
        raster: Raster,
        vocabulary: Vocabulary,
        tiling: Tiling,
        threshold: float,
        batch_size: int,
        advance: Callable[[int], None],
    ) -> None:
        segmenter.check_unadapted("tiles of one image can't be labelled")
        self._segmenter = with_proposals(segmenter, "an image by tiles")
        self._raster = raster
        self._vocabulary = vocabulary
        self._tiling = tiling
        self._threshold = threshold
        self._batch_size = batch_size
        self._advance = advance
        self._weights = [
            border_weights(length, tiling.overlap).to(segmenter.device) for length in (tiling.height, tiling.width)
        ]
        self._matrices: tuple[Tensor, Tensor] | None = None  # tiles are of one size, so they share these

    def tiles(self, row: int) -> list[_Tile | None]:
        """Encode the tiles of one row, from left to right; None for a tile without data."""
        tiles: list[_Tile | None] = []
        lefts = self._tiling.lefts
        for start in range(0, len(lefts), self._batch_size):
            windows = [self._window(self._tiling.tops[row], left) for left in lefts[start : start + self._batch_size]]
            shown = [pixels for pixels, _ in windows if pixels is not None]
            encodings = iter(self._encode(shown))
            for pixels, valid in windows:
                tiles.append(None if pixels is None else self._ask(next(encodings), valid))
            self._advance(len(windows))
        return tiles

    def _window(self, top: int, left: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Read a tile's pixels, and which have data; return no pixels if none has."""
        pixels, valid = self._raster.read(top, left, self._tiling.height, self._tiling.width)
        if valid is None or valid.all():
            return pixels, None
        if not valid.any():
            return None, valid
        mean = np.round(self._segmenter.image_config.mean).astype(np.uint8)
        return np.where(valid[..., None], pixels, mean), valid  # pixels without data get the mean, as padding does

    def _encode(self, images: list[np.ndarray]) -> list[Encoding]:
        prepared = [self._segmenter.prepare(image).prepared for image in images]
        return self._segmenter.encode_prepared([InputImage(None, pixels) for pixels in prepared]) if prepared else []

    @torch.inference_mode()
    def _ask(self, encoding: Encoding, valid: np.ndarray | None) -> _Tile:
        masks = torch.as_tensor(encoding["mask_logits"])
        if self._matrices is None:
            self._matrices = interpolation_matrices(masks, encoding.sizes)
        probabilities = self._segmenter.class_probabilities(encoding, self._vocabulary)
        return _Tile(masks, torch.as_tensor(probabilities), valid)

    @torch.inference_mode()
    def labels(self, rows: dict[int, list[_Tile | None]], strip: int, top: int, bottom: int) -> np.ndarray:
        """Label rows `top` to `bottom`, [bottom - top, W0] int32, from the rows of tiles that reach them."""
        tiling = self._tiling
        width = tiling.size[1]
        winners = torch.empty(bottom - top, width, dtype=torch.int32, device=self._segmenter.device)
        ends = [tiling.tops[row] + tiling.height for row in rows]
        cuts_down = sorted({top, bottom, *(end for end in ends if end < bottom)})
        cuts_across = sorted({width, *tiling.lefts, *(left + tiling.width for left in tiling.lefts)})
        # Between two cuts on each axis, all pixels are in the same tiles.
        for up, down in pairwise(cuts_down):
            for left, right in pairwise(cuts_across):
                tiles = [
                    (tile, up - tiling.tops[row], left - tiling.lefts[column])
                    for row, tiles in rows.items()
                    if tiling.tops[row] + tiling.height > up
                    for column, tile in enumerate(tiles)
                    if tile is not None and tiling.lefts[column] <= left < tiling.lefts[column] + tiling.width
                ]
                self._label(tiles, winners[up - top : down - top, left:right])
        labels = winners.cpu().numpy()
        labels[labels >= len(self._vocabulary.names)] = UNLABELLED
        labels[~self._has_data(rows[strip], bottom - top)] = UNLABELLED
        return labels

    def _label(self, tiles: list[tuple[_Tile, int, int]], out: Tensor) -> None:
        """Write the winners of one rectangle to `out`, from the tiles that contain it and its first pixel in each."""
        if not tiles:
            out.fill_(0)  # without data; `labels` marks it as unlabelled
            return
        height, width = out.shape

        def masks(rows: slice) -> Tensor:
            return torch.cat(
                [
                    self._masks(
                        tile, slice(down + rows.start, down + rows.stop), slice(across, across + width), len(tiles) > 1
                    )
                    for tile, down, across in tiles
                ]
            )

        probabilities = torch.cat([tile.probabilities for tile, _, _ in tiles])
        out.copy_(best_words_of_masks(masks, probabilities, (height, width)))
        if self._threshold:
            weights = [
                self._border_weights(slice(down, down + height), slice(across, across + width))
                for _, down, across in tiles
            ]
            total = torch.stack(weights).sum(dim=0) if len(tiles) > 1 else torch.ones_like(weights[0])

            def scores(rows: slice) -> Tensor:
                band = masks(rows)
                return (probabilities.T @ band.flatten(1)).unflatten(1, band.shape[1:]).div_(total[rows])

            unsure = self._confidence(scores, out.cpu().numpy()) < self._threshold
            out[torch.from_numpy(unsure).to(out.device)] = len(self._vocabulary.words)  # no word: `labels` marks it

    def _confidence(self, scores: Scores, winners: np.ndarray) -> np.ndarray:
        """Return the confidence in the words that `winners` [rows, columns] names, in [0, 1]."""
        words, calibration = len(self._vocabulary.words), self._segmenter.calibration
        if calibration is not None:
            return calibrated_confidence(scores, winners, words, calibration)
        return scores_of_words(scores, winners, words).clip(0, 1)

    def _border_weights(self, rows: slice, columns: slice) -> Tensor:
        """Return a tile's weights in some of its rows and columns, [rows, columns] in (0, 1]."""
        return self._weights[0][rows, None] * self._weights[1][columns]

    def _masks(self, tile: _Tile, rows: slice, columns: slice, weigh: bool) -> Tensor:
        """Return [Q, rows, columns] in [0, 1]: mask probabilities, times the tile's weights if tiles overlap there.

        The weights of tiles that overlap are not made to sum to one: at a pixel that changes no argmax.
        """
        assert self._matrices is not None  # set with the first tile
        down, across = self._matrices
        masks = (down[rows] @ tile.mask_logits @ across[columns].T).sigmoid_()
        if not weigh:
            return masks
        return masks.mul_(self._border_weights(rows, columns))

    def _has_data(self, tiles: list[_Tile | None], rows: int) -> np.ndarray:
        """Return which pixels have data, [rows, W0] bool, from the row of tiles that begins with these rows."""
        valid = np.zeros((rows, self._tiling.size[1]), dtype=bool)
        for left, tile in zip(self._tiling.lefts, tiles, strict=True):
            if tile is not None:
                shown = slice(left, left + self._tiling.width)
                valid[:, shown] = True if tile.valid is None else tile.valid[:rows]
        return valid


def border_weights(length: int, overlap: int) -> Tensor:
    """Return weights [length] float32 in (0, 1]: a smooth rise over `overlap` pixels, 1, and a fall (cosines)."""
    distance = torch.arange(length, dtype=torch.float32) + 0.5
    distance = torch.minimum(distance, length - distance)
    if overlap == 0:
        return torch.ones(length)
    return torch.sin(math.pi / 2 * (distance / overlap).clamp(max=1)).square()
