"""Fit a calibration: the temperature with which confidence tells best whether a pixel is right.

One pass over labelled images gathers, for a grid of temperatures, how well each would do, in constant memory. Some
pixels of each image are enough: neighbours tell the same.

Letters: K words, N pixels, T temperatures, S steps of the best score.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import numpy as np

from opensan.assemble.bands import BAND_FLOATS, row_bands, to_array
from opensan.assemble.calibration import Calibration
from opensan.data.dataset import SegmentationDataset
from opensan.errors import UserError
from opensan.evaluation.measure import SAVE_EVERY, MeasurableDataset
from opensan.journal import Journal
from opensan.segmenters.base import Segmenter
from opensan.segmenters.results import Encoding
from opensan.vocabulary import Vocabulary

TEMPERATURES = np.geomspace(0.1, 10, 93)
"""The grid, in steps of 5 %."""

STEPS = 20
"""Pixels are told apart by their best score in so many steps from 0 to 1; those above 1 are the last one's."""

BINS = 15
"""Bins of the calibration error."""

PIXELS = 2000
"""Pixels of an image that are used."""

GAIN = 0.005
"""Share of the loss that a second temperature must save on images it was not fitted on."""

_SUMS = "sums"
_LEAST = 1e-6
"""A probability is at least this, and at most 1 less this, so that one pixel cannot cost without bound."""


class Fit:
    """Sums over pixels. Even and odd images are kept apart: what is fitted on one half is tested on the other."""

    def __init__(self) -> None:
        shape = 2, STEPS + 1, len(TEMPERATURES)
        self.loss = np.zeros(shape)
        """[2, S + 1, T]: negative log-likelihood of "right" or "wrong" by the confidence."""
        self.bins = np.zeros((*shape, BINS, 3))
        """[2, S + 1, T, bins, 3]: pixels, right pixels, summed confidence."""
        self.plain = np.zeros((BINS, 3))
        """The same of the best score, clipped: the confidence without a calibration."""
        self.images = 0

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return int(self.plain[:, 0].sum())

    def add(self, scores: np.ndarray, truth: np.ndarray, words: int) -> None:
        """Add an image.

        Args:
            scores: [K, N] float32, 0 or more.
            truth: [N] integers in 0..K-1.
            words: number of words that are reported, the first ones; pixels that the others win are not counted.
        """
        winner = scores.argmax(axis=0)
        reported = winner < words
        scores, truth, winner = scores[:, reported], truth[reported], winner[reported]
        half, self.images = self.images % 2, self.images + 1
        best, right = scores.max(axis=0), (truth == winner).astype(np.float64)
        self.plain += _binned(best.clip(0, 1), right, np.zeros(len(best), dtype=np.int64), 1)[0]
        step = (best * STEPS).astype(np.int64).clip(0, STEPS)
        logs = np.log(np.maximum(scores, np.float32(1e-30)))
        logs -= logs.max(axis=0)
        for number, temperature in enumerate(TEMPERATURES):
            confidence = (1 / np.exp(logs / np.float32(temperature)).sum(axis=0)).astype(np.float64)
            kept = confidence.clip(_LEAST, 1 - _LEAST)
            loss = -np.where(right > 0, np.log(kept), np.log1p(-kept))
            self.loss[half, :, number] += np.bincount(step, loss, STEPS + 1)
            bins = self.bins[half, :, number]
            bins += _binned(confidence, right, step, STEPS + 1)

    def calibration(self, model: str, words: tuple[str, ...], data: str) -> Calibration:
        """Return the best calibration. Raises UserError, one line, without pixels."""
        if self.pixels == 0:
            raise UserError(f"{data}: no pixel has both a label and a word: nothing to fit on")
        first = self._split()
        low, high = _temperatures(self.loss.sum(axis=0), first)
        bins = self.bins.sum(axis=0)  # [S + 1, T, bins, 3]
        after = bins[:first, low].sum(axis=0) + bins[first:, high].sum(axis=0)
        return Calibration(
            model=model,
            temperature=round(float(TEMPERATURES[high]), 4),
            words=words,
            data=data,
            images=self.images,
            pixels=self.pixels,
            ece_before=round(calibration_error(self.plain), 6),
            ece_after=round(calibration_error(after), 6),
            doubtful_temperature=round(float(TEMPERATURES[low]), 4) if first else None,
            doubtful_below=first / STEPS,
        )

    def to_bytes(self) -> bytes:
        """Return all sums; `restore` reads them."""
        return b"".join(np.ascontiguousarray(sums, dtype="<f8").tobytes() for sums in self._sums)

    def restore(self, data: bytes, images: int) -> bool:
        """Take over sums of `to_bytes` over so many images. Returns whether they were such."""
        values = np.frombuffer(data, dtype="<f8") if len(data) % 8 == 0 else np.empty(0)
        sizes = [sums.size for sums in self._sums]
        if len(values) != sum(sizes) or not np.isfinite(values).all():
            return False
        for sums, part in zip(self._sums, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
            sums[:] = part.reshape(sums.shape)
        self.images = images
        return True

    @property
    def _sums(self) -> tuple[np.ndarray, ...]:
        return self.loss, self.bins, self.plain

    def _split(self) -> int:
        """Return the step of the best score below which a second temperature helps; 0 if none does."""
        losses = np.zeros(STEPS + 1)
        for fitted, tested in (self.loss, self.loss[::-1]):
            for first in range(STEPS + 1):
                low, high = _temperatures(fitted, first)
                losses[first] += tested[:first, low].sum() + tested[first:, high].sum()
        best = int(losses.argmin())
        return best if losses[0] - losses[best] > GAIN * losses[0] else 0


def _temperatures(loss: np.ndarray, first: int) -> tuple[int, int]:
    """Return the best temperatures (indices) of the steps below `first` and of the others, by losses [S + 1, T]."""
    return int(loss[:first].sum(axis=0).argmin()), int(loss[first:].sum(axis=0).argmin())


def calibration_error(bins: np.ndarray) -> float:
    """Return the expected calibration error of bins [B, 3] of pixels, right pixels and summed confidence."""
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum())


def _binned(confidence: np.ndarray, right: np.ndarray, step: np.ndarray, steps: int) -> np.ndarray:
    """Return [steps, bins, 3]: pixels, right pixels and summed confidence, of pixels [N] in their steps."""
    index = step * BINS + (confidence * BINS).astype(np.int64).clip(0, BINS - 1)
    columns = (np.ones(len(right)), right, confidence)
    sums = [np.bincount(index, values, steps * BINS).reshape(steps, BINS) for values in columns]
    return np.stack(sums, axis=-1)


def fit_calibration(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    name: str,
    *,
    images: int | None = None,
    kept: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Calibration, list[str]]:
    """Fit a calibration on a data set with its own words; and name the images that could not be read.

    Args:
        segmenter: the model; a calibration that it uses has no effect.
        dataset: images and labels on which the model was not trained.
        name: what the data is called in the file.
        images: only so many, spread evenly over the data set.
        kept: a file for the progress, from which the same call continues if it was stopped; removed at the end. The
            data set must have a `fingerprint` then.
        progress: called with the number of images that are done, and of all.

    Raises:
        ValueError: one line: no image can be read, or none has a labelled pixel.
    """
    vocabulary, fit = dataset.vocabulary, Fit()
    count = len(dataset) if images is None else min(images, len(dataset))
    broken: list[str] = []
    state = None if kept is None else _State(kept, _work(segmenter, dataset, count))
    begun = 0 if state is None else state.restore(fit, broken)
    for done in range(begun + 1, count + 1):
        index = (done - 1) * len(dataset) // count
        try:
            image, truth = dataset[index]
        except (UserError, OSError) as error:
            broken.append(f"{dataset.name(index)}: {error}")
        else:
            chosen = _chosen(truth, index)
            if len(chosen):
                encoding = segmenter.encode(image)
                fit.add(
                    scores_at(segmenter, encoding, vocabulary, chosen), truth.ravel()[chosen], len(vocabulary.names)
                )
        progress(done, count)
        if state is not None:
            state.save(fit, done, broken)
    if state is not None:
        state.end()
    words = tuple(dict.fromkeys(text for word in vocabulary.words for text in (word.name, *word.synonyms)))
    return fit.calibration(str(segmenter.identity), words, name), broken


def _work(segmenter: Segmenter, dataset: SegmentationDataset, count: int) -> dict[str, object]:
    """Return all that a fit depends on."""
    return {
        "model": str(segmenter.identity),
        "speed": [segmenter.speed, str(segmenter.dtype)],
        "data": cast(MeasurableDataset, dataset).fingerprint(),
        "images": count,
    }


class _State:
    """The progress of a fit on disk: sums over the first images, written now and then."""

    def __init__(self, path: Path, work: Mapping[str, object]) -> None:
        self._journal = Journal(path)
        if self._journal.damaged:
            self._journal.damaged.unlink()
        self._journal.begin(work)
        self._saved = time.monotonic()

    def restore(self, fit: Fit, broken: list[str]) -> int:
        """Take over what an earlier run did, and return its number of images."""
        value = self._journal.get(_SUMS)
        if not isinstance(value, dict) or not fit.restore(self._journal.data(_SUMS), int(value.get("images", 0))):
            return 0
        broken += map(str, value.get("broken", []))
        return int(value.get("done", 0))

    def save(self, fit: Fit, done: int, broken: list[str]) -> None:
        """Write the sums over the first `done` images, if the last time is long ago."""
        if time.monotonic() - self._saved >= SAVE_EVERY:
            self._journal.put(_SUMS, {"done": done, "images": fit.images, "broken": broken}, fit.to_bytes())
            self._saved = time.monotonic()

    def end(self) -> None:
        """Remove the file."""
        self._journal.close()
        self._journal.path.unlink(missing_ok=True)


def _chosen(truth: np.ndarray, seed: int) -> np.ndarray:
    """Return the flat indices of PIXELS labelled pixels, or of all if there are fewer; ascending."""
    labelled = np.flatnonzero(truth >= 0)
    if len(labelled) > PIXELS:
        labelled = np.sort(np.random.default_rng(seed).choice(labelled, PIXELS, replace=False))
    return labelled


def scores_at(segmenter: Segmenter, encoding: Encoding, vocabulary: Vocabulary, pixels: np.ndarray) -> np.ndarray:
    """Return the scores [K, N] float32 of all words at flat pixels (ascending), a band of rows at a time."""
    height, width = encoding.sizes.image
    words = len(vocabulary.words)
    scores, found = segmenter.scores(encoding, vocabulary), []
    for rows in row_bands(height, words * width, BAND_FLOATS):
        inside = pixels[(pixels >= rows.start * width) & (pixels < rows.stop * width)]
        if len(inside):
            found.append(to_array(scores(rows)).reshape(words, -1)[:, inside - rows.start * width])
    return np.concatenate(found, axis=1)
