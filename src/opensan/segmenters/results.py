"""Results of a segmenter: an encoded image and a segmentation; needs no torch.

Letters: Q queries, K words, D embedding, h w stride-16 grid, H0 W0 the image.
"""

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opensan import outputs
from opensan.assemble.bands import to_array
from opensan.assemble.calibration import Calibration, checked_threshold, distribution
from opensan.assemble.segments import USUAL_RULES, SegmentRules, Segments
from opensan.errors import UserError, did_you_mean, short
from opensan.files import atomic_path
from opensan.images import PreparedImage
from opensan.segmenters.conversions import Conversions
from opensan.segmenters.explanation import Explanation, rows_of
from opensan.structures import ImageSizes
from opensan.vocabulary import UNLABELLED, Templates, Vocabulary

if TYPE_CHECKING:
    import torch

MOST_ANSWERED_PIXELS = 2**30
"""Limit of the image size in an encoding from a file (4 GiB of labels), which nothing else limits."""

MOST_DRAWN = 3
"""Proposals in the picture of an explanation."""

_IMAGE = "image"
"""Name of the image itself among the tensors of a file."""


@dataclass(frozen=True)
class InputImage:
    """An image as network input, and the image itself."""

    image: NDArray[np.uint8] | None
    """[H0, W0, 3] uint8 RGB, which the encoding keeps; None to keep none."""
    prepared: PreparedImage
    stem: str = ""
    """Name of the image's file without suffix; "" if it is from no file."""


@dataclass(frozen=True, eq=False, repr=False)
class Encoding:
    """An image after the image half of a model: all that `Segmenter.segment` needs to label it with any words.

    Each kind of model has its own arrays. Those of SAN are its mask proposals: "mask_logits" [Q, h, w] and
    "mask_embeddings" [Q, D], unit length, both float32.
    """

    arrays: Mapping[str, "torch.Tensor | np.ndarray"]
    """Arrays by name: tensors, or numpy arrays if torch is not installed or an exported model made them."""
    sizes: ImageSizes
    model: str
    """Identity of the model that made it; another model cannot use it."""
    image: NDArray[np.uint8] | None = None
    """The image, [H0, W0, 3] uint8 RGB, for overlays; None if it was not kept."""
    stem: str = ""
    """Name of the image's file without suffix, which names the files of its results; "" if it is from no file."""

    def __repr__(self) -> str:
        height, width = self.sizes.image
        return f"<Encoding of an image of {width}x{height} by {self.model}>"

    def __getitem__(self, name: str) -> "torch.Tensor | np.ndarray":
        return self.arrays[name]

    @property
    def mask_logits(self) -> "torch.Tensor | np.ndarray":
        """`encoding["mask_logits"]`, for models that propose masks."""
        return self.arrays["mask_logits"]

    @property
    def mask_embeddings(self) -> "torch.Tensor | np.ndarray":
        """`encoding["mask_embeddings"]`, for models that propose masks."""
        return self.arrays["mask_embeddings"]

    @property
    def nbytes(self) -> int:
        """Bytes of memory of its arrays and its image."""
        arrays = [*self.arrays.values(), *([] if self.image is None else [self.image])]
        return sum(array.nbytes for array in arrays)

    @property
    def is_finite(self) -> bool:
        """Return whether all numbers of the arrays are finite (and their sum too): one quick pass."""
        return all(math.isfinite(float(array.sum())) for array in self.arrays.values())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to `path` (a safetensors file), all or nothing."""
        path = Path(path)
        tensors = {name: to_array(array) for name, array in self.arrays.items()}
        if self.image is not None:
            tensors[_IMAGE] = np.ascontiguousarray(self.image)
        about = {"model": self.model, "sizes": asdict(self.sizes), "stem": self.stem}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"opensan": json.dumps(about)})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Encoding":
        """Read a file that `save` wrote. Raises UserError, one line, on any other."""
        try:
            with safe_open(path, framework="pt" if find_spec("torch") else "np") as file:
                meta = json.loads(file.metadata()["opensan"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            sizes = ImageSizes(**{name: (int(size[0]), int(size[1])) for name, size in meta["sizes"].items()})
            image = np.asarray(arrays.pop(_IMAGE)) if _IMAGE in arrays else None
            encoding = cls(arrays, sizes, str(meta["model"]), image, Path(str(meta.get("stem", ""))).name)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{os.fspath(path)}: not a saved encoding ({error})") from None
        if not encoding._is_bounded():
            raise UserError(f"{os.fspath(path)}: not a saved encoding (its arrays and sizes contradict each other)")
        if not encoding.is_finite:
            raise UserError(f"{os.fspath(path)}: not a saved encoding (its arrays hold NaN or infinity)")
        return encoding

    def _is_bounded(self) -> bool:
        """Return whether the sizes fit the arrays: wrong sizes in a file could cause unbounded memory use."""
        sizes = self.sizes
        longest = max((side for array in self.arrays.values() for side in array.shape), default=0)
        return (
            all(
                0 < network <= padded <= 256 * longest
                for network, padded in zip(sizes.network, sizes.padded, strict=True)
            )
            and min(sizes.image) > 0
            and math.prod(sizes.image) <= MOST_ANSWERED_PIXELS
            and (self.image is None or self.image.shape == (*sizes.image, 3))
        )


class _Answers(Protocol):
    """Methods of its segmenter that a segmentation uses."""

    def segment(
        self,
        images: Encoding,
        words: Any,
        *,
        background: Iterable[Any] = (),
        templates: Templates | None = None,
        segments: bool | SegmentRules = False,
        rest: bool = False,
        threshold: float = 0.0,
    ) -> "Segmentation": ...

    def segments(self, segmentation: "Segmentation") -> Segments: ...

    def explain(self, segmentation: "Segmentation", x: int, y: int, *, otherwise: bool = True) -> Explanation: ...

    def separating(
        self, segmentation: "Segmentation", x: int, y: int, first: str, second: str
    ) -> list[tuple[int, float]]: ...

    def attention_bias(self, encoding: Encoding, proposals: Sequence[int]) -> NDArray[np.float32] | None: ...

    def attended(self, encoding: Encoding, proposals: Sequence[int]) -> NDArray[np.float32] | None: ...

    def confidence(self, segmentation: "Segmentation") -> NDArray[np.float32]: ...

    def scores_at(self, segmentation: "Segmentation", x: int, y: int) -> NDArray[np.float32]: ...


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation(Conversions):
    """Result of a segmentation: a word for every pixel.

    A pickle of it holds all but the model, confidence included: it can be shown and saved, not relabelled.
    """

    labels: NDArray[np.int32]
    """[H0, W0] int32: index into `names`, or -1 where a background word won."""
    names: list[str]
    """Display names in the vocabulary's order, background words left out."""
    winners: NDArray[np.int32]
    """[H0, W0] int32: index into `vocabulary.words`, background words included; `labels` itself if there are none."""
    vocabulary: Vocabulary
    encoding: Encoding
    segmenter: _Answers | None
    """The segmenter that made it; None after unpickling."""
    rules: SegmentRules = USUAL_RULES
    """The thresholds of `segments`, and which words are stuff or things."""
    calibration: Calibration | None = None
    """The calibration of `confidence`, that of its segmenter; None: it is a score, not a probability."""
    threshold: float = 0.0
    """Pixels of less confidence are unlabelled, in [0, 1]."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Further data about the image or its pixels, by name, for other methods and tools."""

    def __repr__(self) -> str:
        height, width = self.labels.shape
        shares = sorted(self.areas.items(), key=lambda item: -item[1])
        shown = [f"{name} {outputs.format_share(area)}" for name, area in shares[:5] if area]
        return f"<Segmentation of {width}x{height}: {', '.join(shown) or 'unlabelled'}>"

    def mask(self, word: str) -> NDArray[np.bool_]:
        """Return which pixels have the word, [H0, W0] bool; `segmentation["car"]` is `segmentation.mask("car")`.

        `word` is one of `names`. Raises UserError, one line, on another.
        """
        if word not in self.names:
            shown = ", ".join(map(short, self.names[:8])) + (", ..." if len(self.names) > 8 else "")
            hint = did_you_mean(word, self.names) if isinstance(word, str) else ""
            raise UserError(f"this segmentation has no word {short(word)}{hint or f': its words are {shown}'}")
        return self.labels == self.names.index(word)

    def __getitem__(self, word: str) -> NDArray[np.bool_]:
        return self.mask(word)

    def __contains__(self, word: object) -> bool:
        """Return whether `word` is one of `names`, found in the image or not."""
        return word in self.names

    def _repr_png_(self) -> bytes:
        """Return the overlay as a PNG, which notebooks show."""
        content = io.BytesIO()
        self.overlay().save(content, "PNG")
        return content.getvalue()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"confidence": self.confidence, "segmenter": None}

    @cached_property
    def confidence(self) -> NDArray[np.float32]:
        """[H0, W0] float32 in [0, 1]: how sure each pixel's word is, that of `winners`.

        With a calibration, the word's probability among all words of the vocabulary. Without, the word's score, clipped
        (sum over proposals of class times mask probability), which is not one. Computed on first access; labels do
        not need it.
        """
        assert self.segmenter is not None  # a pickle holds the confidence
        return self.segmenter.confidence(self)

    def above(self, threshold: float) -> "Segmentation":
        """Return the same segmentation with pixels of less confidence than `threshold`, in [0, 1], unlabelled.

        Raises UserError, one line, for another threshold.
        """
        threshold = checked_threshold(threshold)
        labels = np.where(self.winners < len(self.names), self.winners, np.int32(UNLABELLED))
        labels[self.confidence < threshold] = UNLABELLED
        kept = replace(self, labels=labels, threshold=threshold)
        kept.__dict__["confidence"] = self.confidence
        return kept

    @property
    def below_threshold(self) -> float:
        """Share of all pixels, in [0, 1], that are unlabelled for the threshold alone."""
        return float(((self.labels == UNLABELLED) & (self.winners < len(self.names))).mean())

    def distribution(self, x: int, y: int) -> dict[str, float]:
        """Return the probability of every word, background words included, at a pixel: they sum to 1.

        Raises UserError, one line, without a calibration, and for a pixel outside the image.
        """
        if self.calibration is None:
            raise UserError("without a calibration, scores are no probabilities: load the model with calibration=FILE")
        shares = distribution(self._model.scores_at(self, x, y), self.calibration)
        return {word.name: float(share) for word, share in zip(self.vocabulary.words, shares, strict=True)}

    @cached_property
    def segments(self) -> Segments:
        """Objects of things, and a region for each word of stuff, by `rules`; computed on first access.

        Raises UserError, one line, if the model proposes no masks.
        """
        if self.segmenter is None:
            raise UserError("an unpickled segmentation has no model: use its segments before pickling it")
        return self.segmenter.segments(self)

    def explain(self, x: int, y: int, *, otherwise: bool = True) -> Explanation:
        """Explain the word of the pixel in column `x` and row `y`: which proposals decide, and what they show.

        `otherwise`: also tell what each of them would be called among the words of all bundled label sets, which are
        embedded at the first use. Raises UserError, one line, for a pixel outside the image.
        """
        return self._model.explain(self, x, y, otherwise=otherwise)

    def separating(self, x: int, y: int, first: str, second: str) -> list[tuple[int, float]]:
        """Return what separates two words at a pixel: (proposal, how much more score it gives to the first of them).

        The proposals with the largest differences come first. Raises UserError, one line, for an unknown word.
        """
        return self._model.separating(self, x, y, first, second)

    def explained_picture(self, x: int, y: int) -> Image.Image:
        """Draw `explain(x, y)`: the three leading proposals' masks, what their SLS tokens attended to, the steering.

        The latter two are shown for models that run in torch, whose image half runs again for them.
        """
        found = self.explain(x, y)
        leading = [proposal.index for proposal in found.proposals[:MOST_DRAWN]]
        bias = self._model.attention_bias(self.encoding, leading)
        title = f"pixel ({x}, {y}): {found.word}, score {found.words[0].score:.2f}"
        if len(found.words) > 1:
            title += f"; next {found.words[1].name}, {found.words[1].score:.2f}"
        rows = rows_of(found, bias, self._model.attended(self.encoding, leading), MOST_DRAWN)
        return outputs.explained_picture(self.image, self.encoding.sizes.image, x, y, title, rows)

    @property
    def _model(self) -> _Answers:
        if self.segmenter is None:
            raise UserError("an unpickled segmentation has no model, which an explanation needs")
        return self.segmenter

    @property
    def image(self) -> NDArray[np.uint8] | None:
        """The image, [H0, W0, 3] uint8 RGB; None if the encoding did not keep it."""
        return self.encoding.image

    @property
    def areas(self) -> dict[str, float]:
        """Each word's share of all pixels, in [0, 1], in the vocabulary's order."""
        counts = np.bincount(self.labels.ravel() - UNLABELLED, minlength=len(self.names) + 1)[1:]
        return {name: int(count) / self.labels.size for name, count in zip(self.names, counts, strict=True)}

    def relabel(
        self,
        words: Any,
        *,
        background: Iterable[Any] = (),
        templates: Templates | None = None,
        segments: bool | SegmentRules = False,
        rest: bool = False,
        threshold: float = 0.0,
    ) -> "Segmentation":
        """Label the same image with other words; neither ViT runs. Arguments as for `Segmenter.segment`."""
        if self.segmenter is None:
            raise UserError(
                "an unpickled segmentation has no model: use a model's segment(segmentation.encoding, words)"
            )
        return self.segmenter.segment(
            self.encoding,
            words,
            background=background,
            templates=templates,
            segments=segments,
            rest=rest,
            threshold=threshold,
        )

    def overlay(self) -> Image.Image:
        """Draw the image under the words' colours, with a legend: the overlay that `save` writes."""
        return outputs.overlay(self.image, self.labels, self.names, self.areas)

    def show(self) -> None:
        """Open the overlay in the system's viewer of pictures; in a notebook, show it there.

        Raises UserError where there is no viewer, as on a server.
        """
        from PIL import ImageShow

        if not ImageShow.show(self.overlay(), self.encoding.stem or "segmentation"):
            raise UserError("no program that shows pictures was found here: write the overlay with save(folder)")

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the JSON file that `save` writes: plain data, with a mask (COCO RLE) for each word."""
        return outputs.record(
            self.labels,
            self.names,
            self.areas,
            self.confidence,
            self.vocabulary.to_dict(),
            self.encoding.model,
            self.about_confidence(),
        )

    def about_confidence(self) -> dict[str, Any]:
        """Return what the confidence is, for records: calibrated or not and on what, and the threshold's effect."""
        told: dict[str, Any] = {"calibrated": self.calibration is not None, "calibration": None}
        if self.calibration is not None:
            told["calibration"] = self.calibration.summary(self.vocabulary)
        return told | {"threshold": self.threshold, "below_threshold": self.below_threshold}

    def save(
        self,
        folder: str | os.PathLike[str],
        stem: str | None = None,
        formats: Sequence[str] = ("png", "overlay", "json"),
    ) -> dict[str, Path]:
        """Write the label map (PNG with palette), overlay with legend, and JSON (COCO RLE per word) to `folder`.

        Further formats are "panoptic" (a PNG of the segments' numbers) and "boxes" (JSON of the segments).

        Their names begin with `stem`: by default the name of the image's file without suffix, or "segmentation" for an
        image from no file. Files of the same names are replaced.

        Returns format -> path. Raises ValueError on an unknown format or an unwritable folder.
        """
        return outputs.save(
            folder,
            stem or self.encoding.stem or "segmentation",
            formats,
            image=self.image,
            labels=self.labels,
            names=self.names,
            areas=self.areas,
            confidence=lambda: self.confidence,
            vocabulary=self.vocabulary.to_dict(),
            model=self.encoding.model,
            segments=lambda: self.segments,
            about_confidence=self.about_confidence(),
        )
