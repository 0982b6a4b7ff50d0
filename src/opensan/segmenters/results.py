"""Results of a segmenter: an encoded image and a segmentation; needs no torch.

Letters: Q queries, K words, D embedding, h w stride-16 grid, H0 W0 the image.
"""

import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opensan import outputs
from opensan.errors import UserError
from opensan.files import atomic_path
from opensan.images import PreparedImage
from opensan.structures import ImageSizes
from opensan.vocabulary import UNLABELLED, Templates, Vocabulary

if TYPE_CHECKING:
    import torch

    from opensan.segmenters.base import Segmenter


MOST_ANSWERED_PIXELS = 2**30
"""An encoding from a file may say that its photograph was no larger (4 GiB of labels), and no more can be checked."""


def to_array(tensor: "torch.Tensor | np.ndarray") -> np.ndarray:
    """A tensor of any device as a contiguous array."""
    return np.ascontiguousarray(tensor if isinstance(tensor, np.ndarray) else tensor.detach().cpu().numpy())


def is_finite(tensor: "torch.Tensor | np.ndarray") -> bool:
    """Return whether no number is NaN or infinite (nor the sum of all so large): one quick pass."""
    return math.isfinite(float(tensor.sum()))


@dataclass(frozen=True, eq=False, repr=False)
class Encoding:
    """An image after both ViTs, before any word: all that `SanSegmenter.segment` needs to answer any vocabulary.

    Its tensors are arrays where torch is not installed, or an exported model made them.
    """

    mask_logits: "torch.Tensor | np.ndarray"
    """[Q, h, w] float32."""
    mask_embeddings: "torch.Tensor | np.ndarray"
    """[Q, D] float32, unit length."""
    sizes: ImageSizes
    model: str
    """Fingerprint of the model that made it; another model cannot read it."""
    image: np.ndarray | None = None
    """The photograph, [H0, W0, 3] uint8 RGB, for overlays; None if it was not kept."""

    def __repr__(self) -> str:
        height, width = self.sizes.image
        return f"<Encoding of a photograph of {width}x{height} by {self.model}>"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to `path` (a safetensors file), all or nothing."""
        path = Path(path)
        tensors = {"mask_logits": to_array(self.mask_logits), "mask_embeddings": to_array(self.mask_embeddings)}
        if self.image is not None:
            tensors["image"] = np.ascontiguousarray(self.image)
        sizes = {"image": self.sizes.image, "network": self.sizes.network, "padded": self.sizes.padded}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"opensan": json.dumps({"model": self.model, "sizes": sizes})})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Encoding":
        """Read what `save` wrote. Raises ValueError, one line, on anything else."""
        try:
            with safe_open(path, framework="pt" if find_spec("torch") else "np") as file:
                meta = json.loads(file.metadata()["opensan"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            sizes = ImageSizes(**{name: (int(size[0]), int(size[1])) for name, size in meta["sizes"].items()})
            image = np.asarray(tensors["image"]) if "image" in tensors else None
            encoding = cls(tensors["mask_logits"], tensors["mask_embeddings"], sizes, str(meta["model"]), image)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{os.fspath(path)}: not a saved encoding ({error})") from None
        encoding._check(os.fspath(path))
        return encoding

    def _check(self, source: str) -> None:
        """Sizes from a file must describe its tensors, or they would ask for memory of any amount."""
        masks, embeddings, sizes = self.mask_logits, self.mask_embeddings, self.sizes
        fits = (
            masks.ndim == 3
            and embeddings.ndim == 2
            and len(masks) == len(embeddings)
            and str(masks.dtype) == str(embeddings.dtype) in ("float32", "torch.float32")
            and all(0 < network <= padded for network, padded in zip(sizes.network, sizes.padded, strict=True))
            and all(padded <= 256 * grid for padded, grid in zip(sizes.padded, masks.shape[1:], strict=True))
            and is_finite(masks)
            and is_finite(embeddings)
            and min(sizes.image) > 0
            and math.prod(sizes.image) <= MOST_ANSWERED_PIXELS
            and (self.image is None or self.image.shape == (*sizes.image, 3))
        )
        if not fits:
            raise UserError(
                f"{source}: not a saved encoding (its tensors and sizes contradict each other, or hold NaN or infinity)"
            )


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """The answer: a word for every pixel.

    A pickle of it is complete, confidence included, but for the model: it can be shown and saved, not relabelled.
    """

    labels: np.ndarray
    """[H0, W0] int32: index into `names`, or -1 where a background word won."""
    names: list[str]
    """Display names in the vocabulary's order, background words left out."""
    winners: np.ndarray
    """[H0, W0] int32: index into `vocabulary.words`, background words included; `labels` itself if there are none."""
    vocabulary: Vocabulary
    encoding: Encoding
    segmenter: "Segmenter | None"
    """What answered; None in one that was unpickled."""

    def __repr__(self) -> str:
        height, width = self.labels.shape
        shares = sorted(self.areas.items(), key=lambda item: -item[1])
        found = [f"{name} {outputs.format_share(area)}" for name, area in shares[:5] if area]
        return f"<Segmentation of {width}x{height}: {', '.join(found) or 'unlabelled'}>"

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        content = io.BytesIO()
        self.overlay().save(content, "PNG")
        return content.getvalue()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"confidence": self.confidence, "segmenter": None}

    @cached_property
    def confidence(self) -> np.ndarray:
        """[H0, W0] float32 in [0, 1]: the winner's score, clipped (sum over proposals of class times mask probability).

        Computed when first asked for; labels do not need it.
        """
        assert self.segmenter is not None  # a pickle holds the confidence
        return self.segmenter.confidence(self)

    @property
    def image(self) -> np.ndarray | None:
        """The photograph, [H0, W0, 3] uint8 RGB."""
        return self.encoding.image

    @property
    def areas(self) -> dict[str, float]:
        """Each word's share of all pixels, in [0, 1], in the vocabulary's order."""
        counts = np.bincount(self.labels.ravel() - UNLABELLED, minlength=len(self.names) + 1)[1:]
        return {name: int(count) / self.labels.size for name, count in zip(self.names, counts, strict=True)}

    def relabel(
        self, words: Any, *, background: Iterable[Any] = (), templates: Templates | None = None
    ) -> "Segmentation":
        """The same image asked with other words; neither ViT runs. Arguments as for `SanSegmenter.segment`."""
        if self.segmenter is None:
            raise UserError(
                "an unpickled segmentation has no model: ask one with segment(segmentation.encoding, words)"
            )
        return self.segmenter.segment(self.encoding, words, background=background, templates=templates)

    def overlay(self) -> Image.Image:
        """The photograph under the words' colours, with a legend below; what `save` writes, to look at."""
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


@dataclass(frozen=True)
class ReadImage:
    """A photograph, decoded and as network input."""

    array: np.ndarray
    """[H0, W0, 3] uint8 RGB."""
    prepared: PreparedImage
