"""Make the JSON record of a segmentation: areas, confidences and exact masks (COCO run lengths) of every word."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opensan import __version__
from opensan.errors import UserError, short

_STRIP_PIXELS = 1 << 22
"""Label maps are processed in strips of about this many pixels, to keep temporary arrays of huge maps small."""


def record(
    labels: np.ndarray,
    names: Sequence[str],
    areas: Mapping[str, float],
    confidence: np.ndarray,
    vocabulary: Mapping[str, Any],
    model: str,
    about_confidence: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of the JSON file as plain data.

    `about_confidence`: what the confidence is (`Segmentation.about_confidence`).

    `words` has an entry for each of `names`, also for those that no pixel got: name, index (the value in the label
    map), area (share of pixels), pixels, confidence (mean over the word's pixels; None without any), and `rle`, a COCO
    mask {"size": [H, W], "counts": str} as pycocotools reads it (of an absent word: the mask without a pixel).
    """
    height, width = labels.shape
    pixels, confidence_sums = _totals(labels, confidence, len(names))
    masks = run_lengths(labels, len(names))
    empty = _compressed([labels.size], height, width)
    words = [
        {
            "name": name,
            "index": index,
            "area": areas[name],
            "pixels": int(pixels[index]),
            "confidence": round(float(confidence_sums[index] / pixels[index]), 6) if pixels[index] else None,
            "rle": masks.get(index, empty),
        }
        for index, name in enumerate(names)
    ]
    unlabelled = labels.size - int(pixels.sum())
    return {
        "format": 1,
        "opensan": __version__,
        "model": model,
        "image": {"width": width, "height": height},
        "vocabulary": dict(vocabulary),
        "confidence": dict(about_confidence),
        "words": words,
        "unlabelled": {"area": unlabelled / labels.size, "pixels": unlabelled},
    }


def mean_confidence(labels: np.ndarray, confidence: np.ndarray, count: int) -> list[float | None]:
    """Return the mean of `confidence` over the pixels of each of `count` words; None for a word without any."""
    pixels, sums = _totals(labels, confidence, count)
    return [float(total / number) if number else None for total, number in zip(sums, pixels, strict=True)]


def _totals(labels: np.ndarray, confidence: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each word's pixels [K] int64 and summed confidence [K] float64; strips, as bincount makes wide copies."""
    pixels, sums = np.zeros(count, dtype=np.int64), np.zeros(count)
    rows = max(1, _STRIP_PIXELS // labels.shape[1])
    for top in range(0, labels.shape[0], rows):
        strip = labels[top : top + rows]
        labelled = strip >= 0
        pixels += np.bincount(strip[labelled], minlength=count)
        sums += np.bincount(strip[labelled], weights=confidence[top : top + rows][labelled], minlength=count)
    return pixels, sums


def run_lengths(labels: np.ndarray, count: int) -> dict[int, dict[str, Any]]:
    """Return the COCO masks of the words that occur, by index, in one pass over the map."""
    height, width = labels.shape
    starts, values = _runs(labels)
    ends = np.append(starts[1:], labels.size)
    order = np.argsort(values, kind="stable")
    groups = np.split(order, np.searchsorted(values[order], np.arange(count + 1)))[1:-1]
    masks = {}
    for index, runs in enumerate(groups):
        if len(runs) == 0:
            continue
        # COCO alternates lengths of zeros and ones, zeros first; it omits a last run of no zeros.
        edges = np.concatenate([[0], np.stack([starts[runs], ends[runs]], axis=1).ravel(), [labels.size]])
        counts = np.diff(edges)
        masks[index] = _compressed(counts[:-1] if counts[-1] == 0 else counts, height, width)
    return masks


def _runs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the start of each run of equal labels, counted down the columns as COCO does, and its label; both [R]."""
    height, width = labels.shape
    columns = max(1, _STRIP_PIXELS // height)
    starts, values = [], []
    for left in range(0, width, columns):
        flat = labels[:, left : left + columns].T.ravel()
        begins = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
        starts.append(begins + left * height)
        values.append(flat[begins])
    start, value = np.concatenate(starts), np.concatenate(values)
    new = np.append(True, value[1:] != value[:-1])  # a strip's first run may continue the previous strip's last
    return start[new], value[new]


def _compressed(counts: Sequence[int] | np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Return run lengths as COCO's string."""
    from faster_coco_eval import mask as coco_mask  # slow to import, and only the JSON needs it

    plain = {"size": [height, width], "counts": np.asarray(counts).tolist()}
    packed = coco_mask.frPyObjects(plain, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode("ascii")}


def decode_mask(rle: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """Decode a COCO run-length encoding, with a list or the compressed string of counts, to [height, width] bool.

    For files from outside: memory depends only on the size that the caller knows, not on `rle`. Raises UserError if
    `rle` is not a run-length encoding of exactly that size.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise UserError(f"the mask's size is {short(size)}, the picture's [{height}, {width}] (height, width)")
    if isinstance(counts, str | bytes):
        runs = _uncompressed(counts.encode() if isinstance(counts, str) else counts)
    elif isinstance(counts, list) and all(type(count) is int and 0 <= count <= height * width for count in counts):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise UserError(f"the mask's counts are not a list of run lengths from 0 to {height * width}")
    outside = (runs < 0) | (runs > height * width)
    if outside.any() or runs.sum() != height * width:
        raise UserError(f"the mask's run lengths are not those of {height} x {width} = {height * width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _uncompressed(text: bytes) -> np.ndarray:
    """Return the run lengths [R] int64 in COCO's string, not yet checked against an image's size.

    A character holds 5 bits of a number, the lowest first, and one that says whether more follow; numbers are signed,
    and from the fourth on they are differences to the run before the previous one.
    """
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.append(0, ends + 1)[:-1]
    if len(codes) and (codes.min() < 0 or codes.max() > 63 or len(ends) == 0 or ends[-1] != len(codes) - 1):
        raise UserError("the mask's counts are not a COCO run-length string")
    lengths = ends - starts + 1
    if len(lengths) and lengths.max() > 7:  # 35 bits count more than any image's pixels
        raise UserError("the mask's counts hold a number that is too large for a run")
    position = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * position), starts) if len(starts) else np.zeros(0, dtype=np.int64)
    runs -= ((codes[ends] & 16) != 0).astype(np.int64) << (5 * lengths)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs
