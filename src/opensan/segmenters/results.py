"""Results of a segmenter: an encoded image and a segmentation; needs no torch.

Letters: Q queries, K words, D embedding, h w stride-16 grid, H0 W0 the image.
"""

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opensan import outputs
from opensan.assemble.bands import to_array
from opensan.errors import UserError
from opensan.files import atomic_path
from opensan.images import PreparedImage
from opensan.structures import ImageSizes
from opensan.vocabulary import UNLABELLED, Templates, Vocabulary

if TYPE_CHECKING:
    import torch

MOST_ANSWERED_PIXELS = 2**30
"""Limit of the image size in an encoding from a file (4 GiB of labels), which nothing else limits."""

_IMAGE = "image"
"""Name of the image itself among the tensors of a file."""


@dataclass(frozen=True)
class InputImage:
    """An image as network input, and the image itself."""

    image: np.ndarray | None
    """[H0, W0, 3] uint8 RGB, which the encoding keeps; None to keep none."""
    prepared: PreparedImage


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
    image: np.ndarray | None = None
    """The image, [H0, W0, 3] uint8 RGB, for overlays; None if it was not kept."""

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
        about = {"model": self.model, "sizes": asdict(self.sizes)}
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
            encoding = cls(arrays, sizes, str(meta["model"]), image)
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
        self, images: Encoding, words: Any, *, background: Iterable[Any] = (), templates: Templates | None = None
    ) -> "Segmentation": ...

    def confidence(self, segmentation: "Segmentation") -> np.ndarray: ...


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """Result of a segmentation: a word for every pixel.

    A pickle of it holds all but the model, confidence included: it can be shown and saved, not relabelled.
    """

    labels: np.ndarray
    """[H0, W0] int32: index into `names`, or -1 where a background word won."""
    names: list[str]
    """Display names in the vocabulary's order, background words left out."""
    winners: np.ndarray
    """[H0, W0] int32: index into `vocabulary.words`, background words included; `labels` itself if there are none."""
    vocabulary: Vocabulary
    encoding: Encoding
    segmenter: _Answers | None
    """The segmenter that made it; None after unpickling."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Further data about the image or its pixels, by name, for other methods and tools."""

    def __repr__(self) -> str:
        height, width = self.labels.shape
        shares = sorted(self.areas.items(), key=lambda item: -item[1])
        found = [f"{name} {outputs.format_share(area)}" for name, area in shares[:5] if area]
        return f"<Segmentation of {width}x{height}: {', '.join(found) or 'unlabelled'}>"

    def _repr_png_(self) -> bytes:
        """Return the overlay as a PNG, which notebooks show."""
        content = io.BytesIO()
        self.overlay().save(content, "PNG")
        return content.getvalue()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"confidence": self.confidence, "segmenter": None}

    @cached_property
    def confidence(self) -> np.ndarray:
        """[H0, W0] float32 in [0, 1]: the winner's score, clipped (sum over proposals of class times mask probability).

        Computed on first access; labels do not need it.
        """
        assert self.segmenter is not None  # a pickle holds the confidence
        return self.segmenter.confidence(self)

    @property
    def image(self) -> np.ndarray | None:
        """The image, [H0, W0, 3] uint8 RGB; None if the encoding did not keep it."""
        return self.encoding.image

    @property
    def areas(self) -> dict[str, float]:
        """Each word's share of all pixels, in [0, 1], in the vocabulary's order."""
        counts = np.bincount(self.labels.ravel() - UNLABELLED, minlength=len(self.names) + 1)[1:]
        return {name: int(count) / self.labels.size for name, count in zip(self.names, counts, strict=True)}

    def relabel(
        self, words: Any, *, background: Iterable[Any] = (), templates: Templates | None = None
    ) -> "Segmentation":
        """Label the same image with other words; neither ViT runs. Arguments as for `Segmenter.segment`."""
        if self.segmenter is None:
            raise UserError(
                "an unpickled segmentation has no model: use a model's segment(segmentation.encoding, words)"
            )
        return self.segmenter.segment(self.encoding, words, background=background, templates=templates)

    def overlay(self) -> Image.Image:
        """Draw the image under the words' colours, with a legend: the overlay that `save` writes."""
        return outputs.overlay(self.image, self.labels, self.names, self.areas)

    def save(
        self,
        folder: str | os.PathLike[str],
        stem: str = "segmentation",
        formats: Sequence[str] = ("png", "overlay", "json"),
    ) -> dict[str, Path]:
        """Write the label map (PNG with palette), overlay with legend, and JSON (COCO RLE per word) to `folder`.

        Returns format -> path. Raises ValueError on an unknown format or an unwritable folder.
        """
        return outputs.save(
            folder,
            stem,
            formats,
            image=self.image,
            labels=self.labels,
            names=self.names,
            areas=self.areas,
            confidence=lambda: self.confidence,
            vocabulary=self.vocabulary.to_dict(),
            model=self.encoding.model,
        )
