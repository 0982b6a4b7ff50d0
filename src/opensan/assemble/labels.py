"""Compute the label map by blocks: a block is labelled at once if a bound proves that one word wins, else divided.

Letters: Q queries, K words, C candidate words of a block, h w stride-16 grid, H0 W0 the image, n blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from opensan.assemble.bands import first_equal, row_bands, to_array
from opensan.assemble.best_row import best_row
from opensan.assemble.bounds import ROUNDING, first_maximum, group_size, mask_errors, possible_winners
from opensan.assemble.resize import MaskBand, interpolation_matrices, linear_pieces, mask_bands
from opensan.structures import ImageSizes

PARTS = 4
"""An undecided block is divided into so many parts each way."""

SMALL_BLOCK = 96
"""Pixels of a block up to which all its pixels are computed: fewer than twice those that a division computes."""

MOST_WORDS_BY_BANDS = 300
"""With more words, bounds gain even where they decide few blocks at first (docs/results.md)."""

MOST_UNDECIDED = 0.9
"""When more of the pixels are undecided after the first look, the masks are noise, and bounds cost more than they save.
"""

BAND_PIXELS = 1 << 20
"""Number of pixels that are processed together, about."""

BAND_FLOATS = 1 << 23
"""Number of floats of a band in `label_map_by_bands`, about (32 MB)."""

BAND_FLOATS_ON_CUDA = 1 << 26
"""Number of floats of a band on CUDA, about (256 MB)."""

CHUNK_FLOATS = 1 << 20
"""Number of floats of scores or masks that are made at once, about: they fit a processor's cache."""

FEW_WORDS = 64
"""With so many words or fewer, the first elimination of words does not pay."""

MOST_CANDIDATES = 2048
"""A block with more candidates is computed for all words, as is one with more than half of all words."""


def label_map(mask_logits: Tensor, probabilities: Tensor, sizes: ImageSizes) -> Tensor:
    """Return the word with the highest score at every pixel: score[k, y, x] = sum_q probabilities[q, k] mask[q, y, x].

    Args:
        mask_logits: [Q, h, w] float32, stride-16 grid of the padded network image.
        probabilities: [Q, K] float32, softmax over words and "no object", without the "no object" column.
        sizes: sizes of the image.

    Returns:
        [H0, W0] int32 in 0..K-1. Ties go to the lowest class, as in argmax; words with equal columns of
        `probabilities` always tie.

    Memory is bounded for any K x H0 x W0. The result is the plain computation's up to rounding. An accelerator
    has arithmetic to spare, and computes all words band by band.
    """
    if mask_logits.device.type == "cpu":
        return label_map_by_bounds(mask_logits, probabilities, sizes)
    return label_map_by_bands(mask_logits, probabilities, sizes)


def label_map_by_bands(mask_logits: Tensor, probabilities: Tensor, sizes: ImageSizes) -> Tensor:
    """Compute `label_map` in the simplest way: all words at all pixels of a band of rows at a time."""
    return best_words_of_masks(mask_bands(mask_logits, sizes), probabilities, sizes.image)


def best_words_of_masks(masks: MaskBand, probabilities: Tensor, size: tuple[int, int]) -> Tensor:
    """Return [H0, W0] int32: the word with the highest score at each pixel of an image of `size`, by bands."""
    labels = torch.empty(size, dtype=torch.int32, device=probabilities.device)
    names = distinct_words(probabilities)
    weights = probabilities[:, names].T.contiguous()
    # If the scores are not stored, only the masks take memory.
    on_cuda = weights.is_cuda
    floats_a_pixel = weights.shape[1] if on_cuda else sum(weights.shape)
    for rows in row_bands(size[0], floats_a_pixel * size[1], BAND_FLOATS_ON_CUDA if on_cuda else BAND_FLOATS):
        labels[rows] = names[best_row(weights, masks(rows).flatten(1))].view(-1, size[1]).int()
    return labels


def label_map_by_bounds(mask_logits: Tensor, probabilities: Tensor, sizes: ImageSizes) -> Tensor:
    """Compute `label_map` by blocks: each is labelled at once, or divided and tested again with the words left.

    Where the first look decides hardly any block, all pixels are computed instead, unless there are too many words.
    """
    labels = torch.empty(sizes.image, dtype=torch.int32, device=mask_logits.device)
    labeller = _Labeller(probabilities, labels)
    for rows, blocks in _grid_blocks(mask_logits, sizes, labeller.words):
        undecided = labeller.label(labeller.shortlist(blocks), parts=1)
        if undecided and labeller.words <= MOST_WORDS_BY_BANDS and undecided.pixels > MOST_UNDECIDED * blocks.pixels:
            size = rows.stop - rows.start, sizes.image[1]
            labels[rows] = best_words_of_masks(mask_bands(mask_logits, sizes, rows.start), probabilities, size)
            continue
        while undecided:
            undecided = labeller.label(undecided, PARTS)
    return labels


@dataclass(frozen=True)
class _Blocks:
    """Rectangles of pixels in which mask logits are bilinear, and the words that may win in each."""

    corners: Tensor
    """[n, 2, 2, Q] mask logits at the corner pixels."""
    origin: Tensor
    """[n, 2] int64: row and column of the first corner."""
    span: Tensor
    """[n, 2] int64: rows and columns from there to the opposite corner."""
    size: Tensor
    """[n, 2] int64: rows and columns to be labelled: `span`, if the last ones are a neighbour's, else one more."""
    count: Tensor
    """[n] int64: candidate words; K where all words are."""
    words: Tensor
    """int64: candidates of one block after the other, ascending in each; none for a block with all words."""

    def __len__(self) -> int:
        return len(self.corners)

    @property
    def pixels(self) -> int:
        """Pixels to be labelled."""
        return int(self.size.prod(dim=1).sum())

    def take(self, index: Tensor) -> "_Blocks":
        """Select blocks by `index`; `words` is unchanged."""
        corners, origin, span, size, count = (
            each[index] for each in (self.corners, self.origin, self.span, self.size, self.count)
        )
        return _Blocks(corners, origin, span, size, count, self.words)

    def rectangle(self) -> tuple[Tensor, Tensor]:
        """Return offsets of rows [n, a] and columns [n, b] to label; the last is repeated if other blocks have more."""
        rows, columns = (
            torch.minimum(torch.arange(int(size.max())), size.unsqueeze(1) - 1) for size in self.size.unbind(1)
        )
        return rows, columns

    def steps(self, share: Tensor) -> Tensor:
        """Return [n, 1, 1, Q]: the `steps` of `mask_errors`, for parts that are `share` [n, 2] of the block."""
        across = self.corners.diff(dim=2).abs_().amax(dim=1) * share[:, 1:, None]
        down = self.corners.diff(dim=1).abs_().amax(dim=2) * share[:, :1, None]
        return across.square_().add_(down.square_()).unsqueeze(1)

    def logits(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return mask logits [n, a, b, Q] at offsets [n, a] and [n, b]."""
        (down, across), step = (rows, columns), self.span.clamp(min=1).to(self.corners.dtype)
        down, across = (down / step[:, :1])[..., None, None], (across / step[:, 1:])[:, None, :, None]
        left, right = self.corners[:, :, :1], self.corners[:, :, 1:]
        top, bottom = torch.addcmul(left, right - left, across).split(1, dim=1)
        return torch.addcmul(top, bottom - top, down)


def _grid_blocks(mask_logits: Tensor, sizes: ImageSizes, words: int) -> Iterator[tuple[slice, _Blocks]]:
    """Yield the blocks that the grid's cells form in the image, a band of rows of them at a time, and their rows."""
    down, across = interpolation_matrices(mask_logits, sizes)
    (top, bottom), (left, right) = (
        linear_pieces(grid, padded, network, image)
        for grid, padded, network, image in zip(
            mask_logits.shape[-2:], sizes.padded, sizes.network, sizes.image, strict=True
        )
    )
    columns = mask_logits @ across[torch.cat([left, right])].T
    height = BAND_PIXELS // sizes.image[1]
    start = 0
    while start < len(top):
        stop = max(start + 1, int(torch.searchsorted(top, top[start] + height)))
        rows = down[torch.cat([top[start:stop], bottom[start:stop]])]
        corners = (rows @ columns).view(-1, 2, stop - start, 2, len(left)).permute(2, 4, 1, 3, 0)
        origin = torch.cartesian_prod(top[start:stop], left)
        span = torch.cartesian_prod(bottom[start:stop], right) - origin
        count = torch.full((len(origin),), words)
        band = slice(int(top[start]), int(bottom[stop - 1]) + 1)
        yield band, _Blocks(corners.flatten(0, 1).contiguous(), origin, span, span + 1, count, count.new_empty(0))
        start = stop


class _Labeller:
    """Decides blocks and writes their words into `labels`."""

    def __init__(self, probabilities: Tensor, labels: Tensor) -> None:
        self.labels = labels
        self.names = distinct_words(probabilities)
        self.words = len(self.names)
        probabilities = probabilities[:, self.names]
        # The part that all words have in common does not affect the argmax; without it, bounds are far tighter.
        weights = (probabilities - probabilities.mean(dim=1, keepdim=True)).T
        # The last word is repeated until the words divide into groups; a repetition never wins a tie.
        spare = -self.words % group_size(self.words)
        self.weights = torch.cat([weights, weights[-1:].expand(spare, -1)]).contiguous()
        self.magnitudes = self.weights.abs()
        self.probabilities = probabilities.contiguous()

    def shortlist(self, blocks: _Blocks) -> _Blocks:
        """Drop the words whose highest score is below some word's lowest, by one product a block.

        Which words can be that word is a guess: each query's most probable one.
        """
        if self.words <= FEW_WORDS:
            return blocks
        masks = blocks.corners.sigmoid().flatten(1, 2)
        likely = self.probabilities[:, self.probabilities.argmax(dim=1).unique()]
        low, high = masks.aminmax(dim=1)
        floor = (low @ likely).amax(dim=1, keepdim=True) * (1 - 10 * ROUNDING)
        counts, words = [], []
        for some in torch.arange(len(blocks)).split(max(1, CHUNK_FLOATS // self.words)):
            possible = high[some] @ self.probabilities >= floor[some]
            count = possible.count_nonzero(dim=1)
            many = self._many(count)
            counts.append(count.masked_fill(many, self.words))
            words.append(possible[~many].nonzero()[:, 1])
        return replace(blocks, count=torch.cat(counts), words=torch.cat(words))

    def label(self, blocks: _Blocks, parts: int) -> _Blocks | None:
        """Label these blocks, and return their parts in which more than one word may win, if any."""
        undecided = []
        for chunk, candidates, small in self._chunks(blocks, parts):
            if small:
                self._label_pixels(chunk, candidates)
            else:
                undecided.append(self._label_parts(chunk, candidates, parts))
        if not undecided:
            return None
        return _Blocks(*(torch.cat([getattr(block, part.name) for block in undecided]) for part in fields(_Blocks)))

    def _chunks(self, blocks: _Blocks, parts: int) -> Iterator[tuple[_Blocks, Tensor | None, bool]]:
        """Yield blocks of similar size and number of candidates, these candidates [n, C] (None: all), and if small."""
        small = (blocks.size.prod(dim=1) <= SMALL_BLOCK) & (parts > 1)
        key = small.long()
        for number in (blocks.count, *blocks.size.unbind(1)):
            key = 64 * key + torch.frexp((number - 1).double()).exponent
        order = key.argsort(stable=True)
        listed = blocks.count.where(blocks.count < self.words, 0)
        first_word = listed.cumsum(0) - listed
        for same in order.split(torch.unique_consecutive(key[order], return_counts=True)[1].tolist()):
            count, is_small = blocks.count[same], bool(small[same[0]])
            share_all = bool(count[0] == self.words)
            most = int(count.max())
            points = int(blocks.size[same].amax(dim=0).prod()) if is_small else (parts + 1) ** 2
            queries = self.weights.shape[1]
            floats = points * max(queries, most) + (0 if share_all else queries * most)
            for index in same.split(max(1, CHUNK_FLOATS // floats)):
                chunk = blocks.take(index)
                if share_all:
                    yield chunk, None, is_small
                else:
                    position = torch.minimum(torch.arange(most), chunk.count.unsqueeze(1) - 1)
                    yield chunk, blocks.words[first_word[index].unsqueeze(1) + position], is_small

    def _label_pixels(self, blocks: _Blocks, candidates: Tensor | None) -> None:
        """Label every pixel of the blocks separately."""
        rows, columns = blocks.rectangle()
        masks = blocks.logits(rows, columns).sigmoid_()
        weights = self.weights[None] if candidates is None else self.weights[candidates]
        scores = weights @ masks.view(len(weights), -1, masks.shape[-1]).transpose(1, 2)
        best = first_maximum(scores).view(len(blocks), -1)
        self._write(blocks, rows, columns, self._word(best, candidates).view(masks.shape[:3]))

    def _label_parts(self, blocks: _Blocks, candidates: Tensor | None, parts: int) -> _Blocks:
        """Label each part with one word, and return the parts that may have others."""
        cuts = blocks.span.unsqueeze(2) * torch.arange(parts + 1) // parts  # [n, 2, parts + 1]
        logits = blocks.logits(*cuts.unbind(1))
        masks = logits.sigmoid()
        share = cuts.diff(dim=2).amax(dim=2) / blocks.span.clamp(min=1).to(masks.dtype)
        errors = mask_errors(masks, blocks.steps(share))
        weights, magnitudes = (
            (each[None] if candidates is None else each[candidates]) for each in (self.weights, self.magnitudes)
        )
        best, possible = possible_winners(_weighted(weights, masks), _weighted(magnitudes, errors))
        best = best.permute(0, 3, 1, 2).reshape(len(blocks), -1)
        possible = possible.permute(0, 4, 2, 3, 1).reshape(len(blocks), parts, parts, -1)
        if candidates is None:
            possible = possible[..., : self.words]
        else:  # a block's last candidate is repeated if other blocks have more
            possible &= (torch.arange(possible.shape[-1]) < blocks.count.unsqueeze(1))[:, None, None]
        winners = self._word(best, candidates).view(-1, parts, parts)

        rows, columns = blocks.rectangle()
        part_of_row, part_of_column = (
            (offsets.unsqueeze(2) >= cut[:, None, 1:-1]).sum(dim=2)
            for offsets, cut in zip((rows, columns), cuts.unbind(1), strict=True)
        )
        block = torch.arange(len(blocks))[:, None, None]
        self._write(blocks, rows, columns, winners[block, part_of_row.unsqueeze(2), part_of_column.unsqueeze(1)])
        return self._undecided(blocks, candidates, cuts, logits, possible)

    def _undecided(
        self, blocks: _Blocks, candidates: Tensor | None, cuts: Tensor, logits: Tensor, possible: Tensor
    ) -> _Blocks:
        """Return the parts [n, parts, parts] of blocks in which more than one word is possible."""
        span = cuts.diff(dim=2)
        size = span.clone()
        size[:, :, -1] += blocks.size - blocks.span
        count = possible.sum(dim=3)
        undecided = (count > 1) & (size[:, 0, :, None] > 0) & (size[:, 1, None, :] > 0)
        block, row, column = undecided.nonzero().unbind(1)
        count = count[undecided]
        many = self._many(count)
        listed, words = possible[undecided][~many].nonzero().unbind(1)
        if candidates is not None:
            words = candidates[block[~many][listed], words]
        origin = torch.stack([row, column], dim=1)
        step = torch.arange(2)
        return _Blocks(
            logits[block[:, None, None], (row[:, None] + step)[:, :, None], (column[:, None] + step)[:, None, :]],
            blocks.origin[block] + cuts[block[:, None], torch.arange(2), origin],
            span[block[:, None], torch.arange(2), origin],
            size[block[:, None], torch.arange(2), origin],
            count.masked_fill(many, self.words),
            words,
        )

    def _many(self, count: Tensor) -> Tensor:
        """Return whether a block with so many candidates is better computed for all words."""
        return (count > MOST_CANDIDATES) | (2 * count > self.words)

    def _word(self, best: Tensor, candidates: Tensor | None) -> Tensor:
        """Return words [n, m] of indices [n, m] into candidates [n, C], or into all words."""
        return best.clamp(max=self.words - 1) if candidates is None else candidates.gather(1, best)

    def _write(self, blocks: _Blocks, rows: Tensor, columns: Tensor, words: Tensor) -> None:
        """Write words [n, a, b] at offsets [n, a] and [n, b] of the blocks."""
        rows, columns = blocks.origin[:, :1] + rows, blocks.origin[:, 1:] + columns
        self.labels[rows.unsqueeze(2), columns.unsqueeze(1)] = self.names[words].int()


def distinct_words(probabilities: Tensor) -> Tensor:
    """Return the first of each set of words with equal columns in probabilities [Q, K]: [K' <= K], ascending.

    Equal columns may differ in their products by rounding, which must not decide between them; nor could any bound.
    """
    first = np.unique(first_equal(to_array(probabilities.T)))
    return torch.from_numpy(first).to(probabilities.device)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Return [G, C, a, b, N] of weights [G, C, Q] (G = n, or shared) and masks [n, a, b, Q]."""
    _, a, b, queries = values.shape
    if len(weights) == 1:
        values = values.permute(1, 2, 0, 3)
    return (weights @ values.reshape(len(weights), -1, queries).transpose(1, 2)).unflatten(2, (a, b, -1))
