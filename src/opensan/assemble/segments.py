"""Turn mask proposals into segments: objects of words for things, one region of a word for stuff; needs no torch.

The rules are those of MaskFormer's family (Cheng et al., "Per-Pixel Classification is Not All You Need", NeurIPS 2021).

Letters: Q queries, K words, n kept proposals, h w stride-16 grid, H0 W0 the image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from opensan.assemble.bands import row_bands
from opensan.assemble.interpolation import mask_bands
from opensan.assemble.kinds import KindOfWord
from opensan.errors import UserError
from opensan.structures import ImageSizes

BAND_FLOATS = 1 << 22
"""Number of floats of a band's masks, about (16 MB)."""

WAYS = {
    True: "connected parts: a stop-gap for weights that were trained on regions, not on objects",
    False: "proposals: each is an object of its own",
}
"""How objects of one word are told apart, by `SegmentRules.parts`; written into results."""


@dataclass(frozen=True)
class SegmentRules:
    """The thresholds by which proposals become segments, and which words are stuff or things.

    Raises UserError, one line, on a threshold outside [0, 1] and on a word that is both stuff and thing.
    """

    score: float = 0.0
    """A proposal counts if the probability of its best word exceeds this, and that of "no object"."""
    mask: float = 0.5
    """A pixel belongs to a proposal where the proposal's mask is at least this."""
    overlap: float = 0.8
    """A proposal counts if it wins at least this share of its own area: other proposals hide the others."""
    parts: bool = True
    """Whether objects of a word are its connected parts: see `WAYS`. False for weights trained on objects."""
    smallest: float = 0.0005
    """With `parts`, smaller connected parts are left out; a share of the image's pixels."""
    stuff: tuple[str, ...] = ()
    """Words (names) that are stuff, whatever the bundled lists say."""
    things: tuple[str, ...] = ()
    """Words (names) that are things, whatever the bundled lists say."""

    def __post_init__(self) -> None:
        for name in ("score", "mask", "overlap", "smallest"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(f"the segments' threshold {name!r} must be from 0 to 1, not {value!r}")
        for name in ("stuff", "things"):
            if isinstance(getattr(self, name), str):
                raise UserError(f"{name!r} must be a list of words, not {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if both := sorted(set(self.stuff) & set(self.things)):
            raise UserError(f"the word {both[0]!r} can't be both stuff and thing: name it in one of the two lists")

    def to_dict(self) -> dict[str, Any]:
        """Return the rules as plain data."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


USUAL_RULES = SegmentRules()
"""The field's thresholds, and objects as connected parts."""


@dataclass(frozen=True, eq=False)
class Segment:
    """One segment of an image: an object of a thing, or all pixels of stuff."""

    id: int
    """Its number in `Segments.ids`, from 1."""
    word: str
    kind: str
    """ "thing" or "stuff"."""
    score: float
    """Probability of the word, in [0, 1], by the proposal that gave most of the segment's pixels; not calibrated."""
    area: int
    """Number of pixels."""
    box: tuple[int, int, int, int]
    """Left, top, width, height in pixels: the smallest box around the pixels."""
    ids: NDArray[np.int32]
    """[H0, W0]: `Segments.ids`, from which `mask` is read."""

    def __repr__(self) -> str:
        return f"<Segment {self.id}: {self.word} ({self.kind}), {self.area} pixels, score {self.score:.2f}>"

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[H0, W0] bool: the segment's pixels."""
        return self.ids == self.id

    def to_dict(self) -> dict[str, Any]:
        """Return all but the mask as plain data."""
        names = ("id", "word", "kind", "score", "area")
        return {name: getattr(self, name) for name in names} | {"box": list(self.box)}


@dataclass(frozen=True, eq=False)
class Segments(Sequence[Segment]):
    """The segments of an image: a sequence, in the vocabulary's order, of one word the largest first."""

    ids: NDArray[np.int32]
    """[H0, W0]: the number of each pixel's segment, 0 where there is none. Segments do not overlap."""
    kinds: dict[str, KindOfWord]
    """Why each word is stuff or a thing."""
    rules: SegmentRules
    found: tuple[Segment, ...]

    def __repr__(self) -> str:
        return f"<{len(self)} segments by {WAYS[self.rules.parts].split(':')[0]}>"

    def __len__(self) -> int:
        return len(self.found)

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Segment]: ...
    def __getitem__(self, index: int | slice) -> Segment | Sequence[Segment]:
        return self.found[index]

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.found)

    def of(self, word: str) -> list[Segment]:
        """Return the segments of a word, the largest first."""
        return [segment for segment in self if segment.word == word]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: the rules, why each word is stuff or a thing, and the segments without masks."""
        return {
            "objects_by": WAYS[self.rules.parts],
            "rules": self.rules.to_dict(),
            "words": {word: {"kind": kind.kind, "because": kind.because} for word, kind in self.kinds.items()},
            "segments": [segment.to_dict() for segment in self],
        }


def find_segments(
    mask_logits: np.ndarray,
    probabilities: np.ndarray,
    sizes: ImageSizes,
    kinds: dict[str, KindOfWord],
    rules: SegmentRules,
) -> Segments:
    """Find the segments of an image.

    Args:
        mask_logits: [Q, h, w] float32.
        probabilities: [Q, K] float32, softmax over words and "no object", without the "no object" column.
        sizes: sizes of the image.
        kinds: the reported words, in the order of the first columns of `probabilities`, and what they are. Proposals
            of further columns (background words) take pixels and give no segments.
        rules: thresholds.
    """
    words = probabilities.argmax(axis=1)
    best = probabilities.max(axis=1)
    nothing = 1 - probabilities.sum(axis=1)
    kept = (best > nothing) & (best > rules.score)
    words, best = words[kept], best[kept]
    winners, shown = _winners(mask_logits[kept], best, sizes, rules)
    names = list(kinds)
    segment_of = np.full(len(words) + 1, -1, dtype=np.int64)  # the last one for pixels without a proposal
    number_of: dict[tuple[int, int], int] = {}
    for proposal in np.flatnonzero(shown & (words < len(names))).tolist():
        word = int(words[proposal])
        together = rules.parts or kinds[names[word]].kind == "stuff"
        segment_of[proposal] = number_of.setdefault((word, -1 if together else proposal), len(number_of))
    word_of = [word for word, _ in number_of]
    regions = segment_of[winners]
    if rules.parts:
        regions, word_of = _parts(regions, word_of, [kinds[name].kind == "thing" for name in names], rules.smallest)
    return _listed(regions, word_of, winners, best, kinds, rules)


def _winners(
    mask_logits: np.ndarray, best: np.ndarray, sizes: ImageSizes, rules: SegmentRules
) -> tuple[np.ndarray, np.ndarray]:
    """Return each pixel's proposal, [H0, W0] int32 with -1 for none, and which of the n proposals count."""
    count = len(best)
    winners = np.full(sizes.image, -1, dtype=np.int32)
    if count == 0:
        return winners, np.zeros(0, dtype=bool)
    masks = mask_bands(mask_logits, sizes)
    won, own = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for rows in row_bands(sizes.image[0], count * sizes.image[1], BAND_FLOATS):
        band = masks(rows)
        first = (band * best[:, None, None]).argmax(axis=0)
        inside = np.take_along_axis(band, first[None], axis=0)[0] >= rules.mask
        own += np.count_nonzero(band >= rules.mask, axis=(1, 2))
        won += np.bincount(first.ravel(), minlength=count)
        winners[rows] = np.where(inside, first, -1)
    return winners, (own > 0) & (won >= rules.overlap * own)


def _parts(
    regions: np.ndarray, word_of: list[int], is_thing: Sequence[bool], smallest: float
) -> tuple[np.ndarray, list[int]]:
    """Divide the regions [H0, W0] of things into connected parts (also across corners), without very small ones."""
    from scipy import ndimage  # here, so that the package imports quickly

    divided = np.full(regions.shape, -1, dtype=np.int64)
    word_of_part: list[int] = []
    for region, word in enumerate(word_of):
        mask = regions == region
        if not is_thing[word]:
            divided[mask] = len(word_of_part)
            word_of_part.append(word)
            continue
        parts, _ = ndimage.label(mask, np.ones((3, 3)))
        areas = np.bincount(parts.ravel())
        areas[0] = 0
        large = areas >= max(1, smallest * regions.size)
        number = np.where(large, np.cumsum(large) - 1 + len(word_of_part), -1)
        divided[mask] = number[parts[mask]]
        word_of_part += [word] * int(large.sum())
    return divided, word_of_part


def _listed(
    regions: np.ndarray,
    word_of: Sequence[int],
    winners: np.ndarray,
    best: np.ndarray,
    kinds: dict[str, KindOfWord],
    rules: SegmentRules,
) -> Segments:
    """Number the regions [H0, W0] (-1 for none) by word and size, and describe them."""
    from scipy import ndimage

    names = list(kinds)
    areas = np.bincount(regions.ravel() + 1, minlength=len(word_of) + 1)[1:]
    order = sorted(np.flatnonzero(areas).tolist(), key=lambda region: (word_of[region], -areas[region], region))
    id_of = np.zeros(len(word_of) + 1, dtype=np.int32)
    id_of[order] = np.arange(1, len(order) + 1)
    ids = id_of[regions]
    boxes = ndimage.find_objects(ids)
    found = []
    for number, region in enumerate(order, 1):
        rows, columns = boxes[number - 1]
        proposals = winners[rows, columns][ids[rows, columns] == number]
        name = names[word_of[region]]
        box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        score = float(best[np.bincount(proposals).argmax()])
        area = int(areas[region])
        found.append(Segment(number, name, kinds[name].kind, score, area, tuple(map(int, box)), ids))  # type: ignore[arg-type]
    return Segments(ids, kinds, rules, tuple(found))
