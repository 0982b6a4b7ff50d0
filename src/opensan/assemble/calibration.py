"""Turn the scores of words into probabilities that hold: of pixels with 0.8, eight of ten are right. Needs no torch.

A calibration is fitted on labelled images (`opensan.evaluation.calibrate`), for one model, and kept as a JSON file.

Letters: K words, H0 W0 the image.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from opensan.assemble.bands import BAND_FLOATS, Scores, row_bands, to_array
from opensan.errors import UserError, short
from opensan.files import check_regular, json_text, write_text
from opensan.vocabulary import Vocabulary

FILE_NAME = "calibration.json"
"""Name of the file in a model's folder that is used without being asked for."""

FORM = 1
"""Number of the file's form."""

LARGEST_FILE = 1 << 24
"""Bytes of a file that is read."""

_KEY = "opensan_calibration"
_TINY = np.float32(1e-30)


@dataclass(frozen=True)
class Calibration:
    """A fitted calibration. It changes no label: only how sure the label is said to be.

    The probability of word k at a pixel with scores s is s_k^(1/T), divided by the sum of this over all words: a
    temperature T as of Guo et al. ("On Calibration of Modern Neural Networks", ICML 2017), as log s_k / T are logits.
    If `doubtful_temperature` is given, pixels whose best score is below `doubtful_below` have that one: selective
    scaling (Wang et al., "On Calibrating Semantic Segmentation Models", CVPR 2023), by a threshold in place of a
    network.

    Raises UserError, one line, on values that cannot be.
    """

    model: str
    """Identity of the model (`str(segmenter.identity)`)."""
    temperature: float
    """T, above 0: below 1 for a model that is too modest."""
    words: tuple[str, ...]
    """The words that it was fitted with."""
    data: str
    """The data set and its list, for people."""
    images: int
    pixels: int
    """Number of pixels that it was fitted on."""
    ece_before: float
    """Expected calibration error of these pixels' scores without it, in [0, 1]."""
    ece_after: float
    """The same with it: on the pixels of the fit, so somewhat better than on others."""
    doubtful_temperature: float | None = None
    """T of pixels whose best score is below `doubtful_below`; None: as of the others."""
    doubtful_below: float = 0.0
    """A score (sum over proposals of class times mask probability), 0 or more."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words))
        doubtful = self.temperature if self.doubtful_temperature is None else self.doubtful_temperature
        for value in (self.temperature, doubtful):
            if not _is_number(value) or not 1e-3 <= value <= 1e3:
                raise UserError(f"a calibration's temperature must be from 0.001 to 1000, not {short(value)}")
        for name in ("ece_before", "ece_after"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) <= 1:
                raise UserError(f"a calibration's {name} must be from 0 to 1, not {short(getattr(self, name))}")
        if not _is_number(self.doubtful_below) or self.doubtful_below < 0:
            raise UserError(f"a calibration's doubtful_below must be 0 or more, not {short(self.doubtful_below)}")
        for name in ("images", "pixels"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise UserError(f"a calibration's {name} must be a whole number from 1, not {getattr(self, name)!r}")
        for text in (self.model, self.data, *self.words):
            if not isinstance(text, str):
                raise UserError(f"a calibration's model, data and words must be texts, not {short(text)}")

    def not_fitted(self, vocabulary: Vocabulary) -> list[str]:
        """Return the names of the asked words, background words included, that it was not fitted with."""
        known = {_key(word) for word in self.words}
        return [
            word.name
            for word in vocabulary.words
            if not word.nothing and not known & {_key(text) for text in (word.name, *word.synonyms)}
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` reads it back."""
        return {_KEY: FORM} | asdict(self) | {"words": list(self.words)}

    def summary(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """Return, for the record of a segmentation, what it was fitted on, and which asked words it was not."""
        plain = {name: value for name, value in asdict(self).items() if name != "words"}
        return plain | {"words": len(self.words), "words_not_fitted": self.not_fitted(vocabulary)}

    @classmethod
    def from_dict(cls, data: object) -> "Calibration":
        """Make one of plain data. Raises UserError, one line, on other data than `to_dict` returns."""
        if not isinstance(data, Mapping) or data.get(_KEY) != FORM:
            raise UserError(f'not a calibration: it has no "{_KEY}": {FORM} (`opensan calibrate` writes one)')
        values = {name: value for name, value in data.items() if name != _KEY}
        names = {field.name for field in fields(cls)}
        if values.keys() != names:
            wrong = sorted(map(str, values.keys() ^ names))[0]
            raise UserError(f"not a calibration: {short(wrong)} is {'unknown' if wrong in values else 'missing'}")
        if not isinstance(values["words"], list):
            raise UserError(f'not a calibration: "words" must be a list, not {short(values["words"])}')
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON file, all or nothing."""
        path = Path(path)
        write_text(path, json_text(self.to_dict(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Read a file that `save` wrote. Raises UserError, one line, on any other."""
        path = Path(path)
        check_regular(path)
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise UserError(f"not a calibration: larger than {LARGEST_FILE:,} bytes")
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror or error})") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a calibration, no JSON ({' '.join(str(error).split())})") from None


def checked_threshold(value: float) -> float:
    """Return a threshold of confidence. Raises UserError, one line, unless it is from 0 to 1."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise UserError(f"the threshold of confidence must be from 0 to 1, not {short(value)}")
    return float(value)


def distribution(scores: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Return the probabilities of words [K, ...], which sum to 1 over the K words, from their scores [K, ...] >= 0."""
    temperature = temperatures(scores.max(axis=0), calibration)
    powers = np.log(np.maximum(scores, _TINY, dtype=np.float32))
    powers -= powers.max(axis=0)
    np.exp(np.divide(powers, temperature, out=powers), out=powers)
    powers /= powers.sum(axis=0)
    return powers


def temperatures(best: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Return the temperature of each pixel, float32, from its best score."""
    if calibration.doubtful_temperature is None:
        return np.full(best.shape, calibration.temperature, dtype=np.float32)
    doubtful = best < calibration.doubtful_below
    return np.where(doubtful, calibration.doubtful_temperature, calibration.temperature).astype(np.float32)


def calibrated_confidence(scores: Scores, winners: np.ndarray, words: int, calibration: Calibration) -> np.ndarray:
    """Return the probability of the word that `winners` [H0, W0] names at each pixel: [H0, W0] float32 in [0, 1].

    All K = `words` scores are computed, a band of rows at a time.
    """
    confidence = np.empty(winners.shape, dtype=np.float32)
    for rows in row_bands(winners.shape[0], words * winners.shape[1], BAND_FLOATS):
        shares = distribution(to_array(scores(rows)), calibration)
        confidence[rows] = np.take_along_axis(shares, winners[None, rows], axis=0)[0]
    return confidence.clip(0, 1, out=confidence)


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def _key(text: str) -> str:
    return " ".join(text.lower().split())
