"""The base class of all segmenters; needs no torch.

Letters: H0 W0 the image.
"""

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from opensan.assemble.bands import Scores, best_words, scores_of_words, to_array
from opensan.assemble.calibration import Calibration, calibrated_confidence, checked_threshold
from opensan.assemble.kinds import word_kinds
from opensan.assemble.segments import USUAL_RULES, SegmentRules, Segments
from opensan.choices import Adapt
from opensan.config import ImageConfig
from opensan.errors import UserError, short
from opensan.images import ImageSource, open_image, prepare_array
from opensan.segmenters.explanation import Explanation, check_pixel
from opensan.segmenters.results import Encoding, InputImage, Segmentation
from opensan.structures import Identity
from opensan.vocabulary import UNLABELLED, Templates, Vocabulary

if TYPE_CHECKING:
    import torch

    from opensan.checkpoints.push import Pushed


class Segmenter:
    """Base class of all segmenters. Holds no state of any image, so threads may share one object.

    A subclass sets the attributes and defines how a batch is encoded (`encode_prepared`) and how words score in a band
    of rows (`scores`). Labels and confidence follow from the scores; a subclass overrides `winners` and `confidence`
    if it has a faster way.
    """

    identity: Identity
    """Identity of the model when the segmenter was built."""
    max_pixels: int
    """Larger images are refused."""
    image_config: ImageConfig
    """Settings that turn an image into network input."""
    device: "torch.device | str"
    speed: str
    """One of the speeds of `opensan.load`, or the format of an exported model."""
    dtype: "torch.dtype | str"
    """Precision of the image half's matrices."""
    calibration: Calibration | None = None
    """The calibration of the confidence of what it labels: see `calibrate`."""
    source: str | os.PathLike[str] | None = None
    """Argument of `opensan.load`; None for a model that was built otherwise."""
    adapt: Adapt | None = None
    """How it adapts to each image that it encodes: see `adapting`; None: it does not."""

    def __repr__(self) -> str:
        halves = f"image half {self.identity.image[:12]}, text half {self.identity.text[:12]}"
        return f"<{type(self).__name__} {self.identity.name} on {self.device}, {self.speed}: {halves}>"

    @staticmethod
    def from_pretrained(source: str | os.PathLike[str], *, revision: str | None = None, **options: Any) -> "Segmenter":
        """Load a model by the method's usual name: `opensan.load`, whose options it takes.

        `revision` is a commit, branch or tag of a hub id; `from_pretrained("lab/street", revision="v1")` is
        `opensan.load("lab/street@v1")`.
        """
        from opensan.segmenters.load import load

        return load(source if revision is None else f"{os.fspath(source)}@{revision}", **options)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        license: str | None = None,
        evaluations: Sequence[str | os.PathLike[str]] = (),
        token: str | None = None,
    ) -> "Pushed":
        """Upload the model that this segmenter was loaded from to a hub; see `opensan.checkpoints.push.push`.

        Raises UserError, one line, if it was not loaded from a folder, a file or a name, but built or exported.
        """
        raise UserError(f"{self.identity.name}: only a SAN that was loaded with torch can be pushed to a hub")

    def adapting(
        self, words: Any, adapt: Adapt = "each", *, background: Iterable[Any] = (), templates: Templates | None = None
    ) -> "Segmenter":
        """Return a segmenter that adapts to each image at test time, without labels; this one stays as it is.

        Args:
            words: as for `segment`; so are `background` and `templates`. What is lowered is the entropy of their
                predictions.
            adapt: "each" begins every image with the model's own weights; "keep" goes on from the image before, for a
                stream of images that are alike.

        Raises:
            ValueError: one line: fewer than two words, or a model that cannot adapt.
        """
        raise UserError(
            f"{self.identity.name} cannot adapt to images: only a SAN as torch runs it can, neither an exported model "
            "nor another method"
        )

    def encode_prepared(self, batch: Sequence[InputImage]) -> list[Encoding]:
        """Run images of one padded shape through the network."""
        raise NotImplementedError

    def scores(self, encoding: Encoding, vocabulary: Vocabulary) -> Scores:
        """Return the function that scores all words, background words included, in a band of rows of the image."""
        raise NotImplementedError

    def prepare(self, image: np.ndarray) -> InputImage:
        """Turn an image, [H0, W0, 3] uint8 RGB, into network input in the form that `encode_prepared` takes."""
        return InputImage(image, prepare_array(image, self.image_config))

    def prepare_words(self, vocabulary: Vocabulary, progress: Callable[[int, int], None] | None = None) -> None:
        """Do the slow steps of the first use of words. Raises UserError for words that can't be used.

        `progress` is called with the number of prompts that are embedded, and of all that must be.
        """

    def unseen_texts(self, vocabulary: Vocabulary) -> list[str]:
        """Return the words, by name, and the synonyms that the model never read; results for them mean nothing."""
        return []

    def winners(self, encoding: Encoding, vocabulary: Vocabulary) -> NDArray[np.int32]:
        """Return each pixel's word index, [H0, W0] int32, background words included, which come last."""
        return best_words(self.scores(encoding, vocabulary), encoding.sizes.image, len(vocabulary.words))

    def confidence(self, segmentation: Segmentation) -> NDArray[np.float32]:
        """Return `Segmentation.confidence`: [H0, W0] float32 in [0, 1]."""
        words, winners = len(segmentation.vocabulary.words), segmentation.winners
        scores = self.scores(segmentation.encoding, segmentation.vocabulary)
        if segmentation.calibration is not None:
            return calibrated_confidence(scores, winners, words, segmentation.calibration)
        return scores_of_words(scores, winners, words).clip(0, 1)

    def scores_at(self, segmentation: Segmentation, x: int, y: int) -> NDArray[np.float32]:
        """Return the scores of all words, [K] float32, of a pixel. Raises UserError for one outside the image."""
        check_pixel(segmentation.encoding.sizes, x, y)
        scores = self.scores(segmentation.encoding, segmentation.vocabulary)
        return to_array(scores(slice(y, y + 1)))[:, 0, x]

    def calibrate(self, calibration: Calibration | None) -> None:
        """Use a calibration from now on; None for none. Raises UserError, one line, if it is of another model.

        An exported model takes that of the model it was exported from, too.
        """
        if calibration is not None and calibration.model not in (str(self.identity), str(self.identity.source)):
            raise UserError(
                f"this calibration was fitted for the model {calibration.model}, not for {self.identity}: "
                "`opensan calibrate` fits one"
            )
        self.calibration = calibration

    def check_calibration(self, vocabulary: Vocabulary) -> None:
        """Warn, in one line, of words that the calibration in use was not fitted with."""
        words = [] if self.calibration is None else self.calibration.not_fitted(vocabulary)
        if words:
            shown = ", ".join(map(short, words[:5])) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
            warnings.warn(
                f"the calibration was fitted (on {self.calibration.data}) without {shown}: "  # type: ignore[union-attr]
                "how sure these words are may be wrong",
                stacklevel=1,
            )

    def segments(self, segmentation: Segmentation) -> Segments:
        """Return `Segmentation.segments`. Raises UserError, one line, if the model proposes no masks."""
        raise UserError(f"segments need a model with mask proposals, and {self.identity.name} has none")

    def explain(self, segmentation: Segmentation, x: int, y: int, *, otherwise: bool = True) -> Explanation:
        """Return `Segmentation.explain`. Raises UserError, one line, if the model proposes no masks."""
        raise UserError(f"an explanation needs a model with mask proposals, and {self.identity.name} has none")

    def separating(
        self, segmentation: Segmentation, x: int, y: int, first: str, second: str
    ) -> list[tuple[int, float]]:
        """Return `Segmentation.separating`. Raises UserError, one line, if the model proposes no masks."""
        raise UserError(f"an explanation needs a model with mask proposals, and {self.identity.name} has none")

    def attention_bias(self, encoding: Encoding, proposals: Sequence[int]) -> NDArray[np.float32] | None:
        """Return where attention was steered for some proposals, [n, heads, h, w]; None if that is not known."""
        return None

    def attended(self, encoding: Encoding, proposals: Sequence[int]) -> NDArray[np.float32] | None:
        """Return what some proposals' embeddings are made of, weights [n, heads, h, w]; None if that is not known."""
        return None

    def with_rest(self, vocabulary: Vocabulary) -> Vocabulary:
        """Add a background word for what no asked word fits. Raises UserError if the model proposes no masks."""
        raise UserError(f"the rest needs a model with mask proposals, and {self.identity.name} has none")

    def check_unadapted(self, what: str) -> None:
        """Raise UserError, one line, if it adapts to each image; `what` is what then does not work."""
        if self.adapt is not None:
            raise UserError(f"{what} with a model that adapts to each image: give the model itself")

    def check_encoding(self, encoding: Encoding) -> None:
        """Raise UserError, one line, unless this model made the encoding, of finite numbers."""
        if encoding.model != self.identity.encodings:
            raise UserError(f"this encoding was made by model {encoding.model}, not by {self.identity.encodings}")
        if not encoding.is_finite:
            raise UserError(f"model {encoding.model} gives no finite numbers for an image: its weights are not usable")

    @overload
    def encode(self, images: list[Any] | tuple[Any, ...], *, batch_size: int = 4) -> list[Encoding]: ...
    @overload
    def encode(self, images: ImageSource, *, batch_size: int = 4) -> Encoding: ...
    def encode(self, images: Any, *, batch_size: int = 4) -> Encoding | list[Encoding]:
        """Run the image half of the model.

        Args:
            images: one image (path, bytes of an image file, PIL image, numpy or torch array [H, W, 3] uint8 RGB),
                or a list or tuple of such.
            batch_size: images of equal padded shape that go through the network together.

        Returns:
            An Encoding, or a list of them in the order given. Images of different sizes never share padding
            (padding is not masked in this model), so a batch gives the same results as single images.

        Raises:
            ValueError: one line naming the image that cannot be read.
        """
        if not isinstance(images, list | tuple):
            return self._encode_all([images], 1)[0]
        return self._encode_all(images, batch_size)

    def _encode_all(self, images: Sequence[Any], batch_size: int) -> list[Encoding]:
        return self.encode_read([self.read(image) for image in images], batch_size=batch_size)

    def read(self, image: Any) -> InputImage:
        """Decode and resize one image, as `encode` takes them: the part that may run ahead, in another thread.

        Raises ImageError (a ValueError), one line naming the image that cannot be read.
        """
        prepared = self.prepare(open_image(image, max_pixels=self.max_pixels))
        return replace(prepared, stem=_stem(image))

    def encode_read(self, images: Sequence[InputImage], *, batch_size: int = 4) -> list[Encoding]:
        """Encode images that `read` returned; see `encode`."""
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        encodings: dict[int, Encoding] = {}
        for group in same_shape(images):
            for start in range(0, len(group), batch_size):
                indices = group[start : start + batch_size]
                encoded = self.encode_prepared([images[index] for index in indices])
                for index, encoding in zip(indices, encoded, strict=True):
                    encodings[index] = replace(encoding, stem=images[index].stem)
        return [encodings[index] for index in range(len(images))]

    @overload
    def segment(
        self,
        images: list[Any] | tuple[Any, ...],
        words: Any,
        *,
        background: Iterable[Any] = (),
        templates: Templates | None = None,
        segments: bool | SegmentRules = False,
        rest: bool = False,
        threshold: float = 0.0,
        batch_size: int = 4,
    ) -> list[Segmentation]: ...
    @overload
    def segment(
        self,
        images: "ImageSource | Encoding",
        words: Any,
        *,
        background: Iterable[Any] = (),
        templates: Templates | None = None,
        segments: bool | SegmentRules = False,
        rest: bool = False,
        threshold: float = 0.0,
        batch_size: int = 4,
    ) -> Segmentation: ...
    def segment(
        self,
        images: Any,
        words: Any,
        *,
        background: Iterable[Any] = (),
        templates: Templates | None = None,
        segments: bool | SegmentRules = False,
        rest: bool = False,
        threshold: float = 0.0,
        batch_size: int = 4,
    ) -> Segmentation | list[Segmentation]:
        """Label every pixel with one of `words`.

        Args:
            images: as for `encode`, or an Encoding, or a list or tuple of either.
            words: "road,car|automobile,sky", a list, a Vocabulary, or anything else `Vocabulary.parse` takes.
            background: words that absorb pixels and are reported as unlabelled (-1).
            templates: "vild" (the default), "single", a file with a template a line, or a list; each has one "{}".
            segments: True to compute `Segmentation.segments` (objects, and regions of stuff) right away; or the rules
                for them, with which they are computed on first access.
            rest: leave pixels that none of the words deserves unlabelled (-1): see `with_rest`.
            threshold: leave pixels of less confidence unlabelled (-1), in [0, 1]: see `Segmentation.above`.
            batch_size: as for `encode`.

        Returns:
            A Segmentation, or a list of them for a list of images.

        Raises:
            ValueError: one line naming the image or the word that cannot be used.
        """
        vocabulary = Vocabulary.parse(words, background=background, templates=templates)
        rules = USUAL_RULES if isinstance(segments, bool) else segments
        if rules.stuff or rules.things:
            word_kinds(vocabulary, rules.stuff, rules.things)  # a wrong word is reported before the work
        threshold = checked_threshold(threshold)
        self.check_calibration(vocabulary)
        if rest:
            vocabulary = self.with_rest(vocabulary)
        many = isinstance(images, list | tuple)
        encodings = self._encoded(images, batch_size) if many else self._encoded([images], 1)
        answers = [self._label(encoding, vocabulary, rules) for encoding in encodings]
        if threshold:
            answers = [answer.above(threshold) for answer in answers]
        if segments is True:
            for answer in answers:
                _ = answer.segments
        return answers if many else answers[0]

    def _encoded(self, images: Sequence[Any], batch_size: int) -> list[Encoding]:
        """Encode the images of a list that may hold encodings too, which are kept."""
        missing = [image for image in images if not isinstance(image, Encoding)]
        made = iter(self._encode_all(missing, batch_size))
        return [image if isinstance(image, Encoding) else next(made) for image in images]

    def _label(self, encoding: Encoding, vocabulary: Vocabulary, rules: SegmentRules) -> Segmentation:
        """Run the word half of the model and compute the label map."""
        self.check_encoding(encoding)
        winners = self.winners(encoding, vocabulary)
        names = vocabulary.names
        background = len(vocabulary.words) > len(names)
        labels = np.where(winners < len(names), winners, np.int32(UNLABELLED)) if background else winners
        return Segmentation(labels, names, winners, vocabulary, encoding, self, rules, self.calibration)


def same_shape(images: Sequence[InputImage]) -> list[list[int]]:
    """Group images by padded shape: those of one shape may go through the network together. Returns their indices."""
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        groups[image.prepared.sizes.padded].append(index)
    return list(groups.values())


def _stem(image: object) -> str:
    """Return the name of an image's file without suffix, also for a PIL image that was opened from one; else ""."""
    path = image if isinstance(image, str | os.PathLike) else getattr(image, "filename", "")
    return Path(os.fsdecode(path)).stem if isinstance(path, str | os.PathLike) else ""


AnySegmenter = Segmenter
"""Name of this class in version 0.1.0."""
