"""Label the images in a column of a table: for `map` of Hugging Face's `datasets`, and anything with such batches.

    labelled = dataset.map(opensan.Labeller("road, car, sky", model="photo"), batched=True, batch_size=8)

The module imports no `datasets`: batches are mappings from a column's name to its values.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from opensan.assemble.calibration import checked_threshold
from opensan.errors import UserError, short
from opensan.jobs.ledger import settings_of
from opensan.outputs import label_map_picture
from opensan.segmenters.base import Segmenter
from opensan.segmenters.load import load
from opensan.vocabulary import Templates, Vocabulary

_IMPORTED_BY = os.getpid()
"""The process that imported this module: another one was forked from it."""


class Labeller:
    """Function of a batch that adds a column of label maps, pictures with a palette or arrays.

    `datasets` recognises it: a pickle holds the words and the model's identity, not the model, so that its cache is
    used again for the same words and the same weights, and for no others. Another process (`num_proc`) loads the model
    by its name.
    """

    def __init__(
        self,
        words: Any,
        *,
        model: Segmenter | str | os.PathLike[str] = "san-vit-b16",
        image: str = "image",
        labels: str = "labels",
        arrays: bool = False,
        background: Iterable[Any] = (),
        templates: Templates | None = None,
        rest: bool = False,
        threshold: float = 0.0,
        batch: int = 4,
    ) -> None:
        """Load the model and embed the words.

        Args:
            words: as for `Segmenter.segment`; so are `background`, `templates`, `rest` and `threshold`.
            model: a segmenter that `opensan.load` returned, or what `opensan.load` takes. With `num_proc`, each process
                must load it: give its name or path.
            image: the column of images: PIL images, encoded ones ({"bytes", "path"}), paths or uint8 arrays. A missing
                image (None) gets no labels (None).
            labels: the new column. Its pictures (PIL) have the value of a word's index in `names`, and 255 (65,535 with
                more than 255 words) where no word is; `datasets` stores them as PNG.
            arrays: arrays [H, W] int32 instead of pictures, -1 where no word is.
            batch: images of one shape that go through the model together.

        Raises:
            ValueError: one line: unusable words, or an unknown model.
        """
        self.image, self.labels, self.arrays, self.batch = image, labels, arrays, batch
        self._threshold = checked_threshold(threshold)
        vocabulary = Vocabulary.parse(words, background=background, templates=templates)
        self._source = None if isinstance(model, Segmenter) else os.fspath(model)
        segmenter = model if isinstance(model, Segmenter) else load(model)
        self._segmenter: Segmenter | None = segmenter
        segmenter.prepare_words(vocabulary)
        self._vocabulary = segmenter.with_rest(vocabulary) if rest else vocabulary
        self._settings = self._settings_with(segmenter)

    @property
    def names(self) -> list[str]:
        """The words: the value of a pixel is the index of its word."""
        return self._vocabulary.names

    @property
    def id2label(self) -> dict[int, str]:
        """The words by value, as the configuration of a model of `transformers` has them."""
        return dict(enumerate(self.names))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the new column for a batch, or for a single row.

        Raises UserError, one line, if the column is missing or an image can't be used.
        """
        if self.image not in batch:
            raise UserError(f"there is no column {short(self.image)}: the columns are {', '.join(map(short, batch))}")
        images = batch[self.image]
        if not (isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4 or _is_list_of_arrays(images)):
            return {self.labels: self._label([images])[0]}
        return {self.labels: self._label(list(images))}

    def _label(self, images: list[Any]) -> list[Any]:
        given = [_source(image) for image in images if image is not None]
        answers = iter(self._model().segment(given, self._vocabulary, threshold=self._threshold, batch_size=self.batch))
        return [None if image is None else self._column_value(next(answers).labels) for image in images]

    def _column_value(self, labels: np.ndarray) -> Any:
        if self.arrays:
            return labels
        picture = label_map_picture(labels, len(self.names))
        picture.format = "PNG"  # by which `datasets` stores a picture; without, it writes an uncompressed TIFF
        return picture

    def _model(self) -> Segmenter:
        """Return the model, which a process that got a pickle loads at the first batch."""
        if self._segmenter is None:
            if self._source is None:
                raise UserError(
                    "a loaded model can't go to another process: give Labeller the model's name or path (model=...)"
                )
            if os.getpid() != _IMPORTED_BY and "torch" in sys.modules:
                # The threads of OpenMP do not survive a fork: a computation that uses them would wait for ever.
                sys.modules["torch"].set_num_threads(1)
            segmenter = load(self._source)
            if self._settings_with(segmenter) != self._settings:
                raise UserError(f"model {self._source} has changed since this Labeller was made: make another")
            self._segmenter = segmenter
        return self._segmenter

    def _settings_with(self, segmenter: Segmenter) -> str:
        return json.dumps(settings_of(segmenter, self._vocabulary, self._threshold), sort_keys=True)

    def __getstate__(self) -> dict[str, Any]:
        words = json.dumps(self._vocabulary.to_dict(vectors=True))  # as text: equal ones have equal pickles
        return self.__dict__ | {"_segmenter": None, "_vocabulary": words}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _vocabulary=Vocabulary.parse(json.loads(state["_vocabulary"])))


def _is_list_of_arrays(images: object) -> bool:
    """Return whether it is numpy's array of images of different sizes."""
    return isinstance(images, np.ndarray) and images.dtype == object


def _source(image: Any) -> Any:
    """Return an image in a form that `Segmenter.segment` takes: `datasets` gives encoded ones as bytes or path."""
    if isinstance(image, Mapping) and {"bytes", "path"} <= image.keys():
        return image["path"] if image["bytes"] is None else image["bytes"]
    return image
