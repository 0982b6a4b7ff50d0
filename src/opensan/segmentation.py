"""What every segmenter offers and answers, whatever computes it; needs no torch.

Letters: Q queries, K words, D embedding, h w stride-16 grid, H0 W0 the photograph.
"""

import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opensan import outputs
from opensan.config import ImageConfig
from opensan.files import atomic_path
from opensan.images import ImageSource, PreparedImage, open_image
from opensan.structures import ImageSizes
from opensan.text_rows import TextRows
from opensan.vocabulary import UNLABELLED, Templates, Vocabulary

if TYPE_CHECKING:
    import torch


MOST_ANSWERED_PIXELS = 2**30
"""An encoding from a file may say that its photograph was no larger (4 GiB of labels), and no more can be checked."""


def to_array(tensor: "torch.Tensor | np.ndarray") -> np.ndarray:
    """A tensor of any device as a contiguous array."""
    return np.ascontiguousarray(tensor if isinstance(tensor, np.ndarray) else tensor.detach().cpu().numpy())


@dataclass(frozen=True, eq=False, repr=False)
class Encoding:
    """An image after both ViTs, before any word: all that `Segmenter.segment` needs to answer any vocabulary.

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
            raise ValueError(f"{os.fspath(path)}: not a saved encoding ({error})") from None
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
            and min(sizes.image) > 0
            and math.prod(sizes.image) <= MOST_ANSWERED_PIXELS
            and (self.image is None or self.image.shape == (*sizes.image, 3))
        )
        if not fits:
            raise ValueError(f"{source}: not a saved encoding (its tensors and sizes contradict each other)")


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
    segmenter: "AnySegmenter | None"
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
        """The same image asked with other words; neither ViT runs. Arguments as for `Segmenter.segment`."""
        if self.segmenter is None:
            raise ValueError(
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


class AnySegmenter:
    """A model ready to be asked. Holds no state of any image, so threads may share one object."""

    fingerprint: str
    """Of the model, for encodings."""
    max_pixels: int
    """Larger photographs are refused."""
    image_config: ImageConfig
    """How a photograph becomes network input."""
    device: "torch.device | str"
    speed: str
    """One of those of `opensan.load`, or the format of an exported model."""
    dtype: "torch.dtype | str"
    """Of the image half's matrices."""
    text: TextRows
    """What knows words."""

    def prepare(self, image: np.ndarray) -> ReadImage:
        """A photograph, [H0, W0, 3] uint8 RGB, with its network input in the form that `encode_prepared` takes."""
        raise NotImplementedError

    def encode_prepared(
        self, batch: Sequence[PreparedImage], arrays: Sequence[np.ndarray | None] | None = None
    ) -> list[Encoding]:
        """Images of one padded shape through the network; `arrays` are the photographs that the encodings keep."""
        raise NotImplementedError

    def class_probabilities(self, encoding: Encoding, vocabulary: Vocabulary) -> "torch.Tensor | np.ndarray":
        """[Q, K] float32: each proposal's softmax over the words and "no object", without the latter.

        K counts the background words too; they come last.
        """
        raise NotImplementedError

    def winners(self, encoding: Encoding, vocabulary: Vocabulary) -> np.ndarray:
        """[H0, W0] int32: each pixel's word, background words included, which come last."""
        raise NotImplementedError

    def confidence(self, segmentation: Segmentation) -> np.ndarray:
        """What `Segmentation.confidence` answers."""
        raise NotImplementedError

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
            (padding is not masked in this model), so a batch answers as its images would one by one.

        Raises:
            ValueError: one line naming the image that cannot be read.
        """
        if not isinstance(images, list | tuple):
            return self._encode_all([images], 1)[0]
        return self._encode_all(images, batch_size)

    def _encode_all(self, images: Sequence[Any], batch_size: int) -> list[Encoding]:
        return self.encode_read([self.read(image) for image in images], batch_size=batch_size)

    def read(self, image: Any) -> ReadImage:
        """Decode and resize one image, as `encode` takes them: the part that may run ahead, in another thread.

        Raises ImageError (a ValueError), one line naming the image that cannot be read.
        """
        return self.prepare(open_image(image, max_pixels=self.max_pixels))

    def encode_read(self, images: Sequence[ReadImage], *, batch_size: int = 4) -> list[Encoding]:
        """What `encode` does after reading; see there."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        by_shape = defaultdict(list)
        for index, image in enumerate(images):
            by_shape[image.prepared.sizes.padded].append(index)
        encodings: dict[int, Encoding] = {}
        for group in by_shape.values():
            for start in range(0, len(group), batch_size):
                indices = group[start : start + batch_size]
                batch = [images[index] for index in indices]
                found = self.encode_prepared([image.prepared for image in batch], [image.array for image in batch])
                encodings.update(zip(indices, found, strict=True))
        return [encodings[index] for index in range(len(images))]

    @overload
    def segment(
        self,
        images: list[Any] | tuple[Any, ...],
        words: Any,
        *,
        background: Iterable[Any] = (),
        templates: Templates | None = None,
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
        batch_size: int = 4,
    ) -> Segmentation: ...
    def segment(
        self,
        images: Any,
        words: Any,
        *,
        background: Iterable[Any] = (),
        templates: Templates | None = None,
        batch_size: int = 4,
    ) -> Segmentation | list[Segmentation]:
        """Label every pixel with one of `words`.

        Args:
            images: as for `encode`, or an Encoding, or a list or tuple of either.
            words: "road,car|automobile,sky", a list, a Vocabulary, or anything else `Vocabulary.parse` takes.
            background: words that absorb pixels and are reported as unlabelled (-1).
            templates: "vild" (the default), "single", a file with a template a line, or a list; each has one "{}".
            batch_size: as for `encode`.

        Returns:
            A Segmentation, or a list of them for a list of images.

        Raises:
            ValueError: one line naming the image or the word that cannot be used.
        """
        vocabulary = Vocabulary.parse(words, background=background, templates=templates)
        if not isinstance(images, list | tuple):
            return self._label(self._encoded([images], 1)[0], vocabulary)
        return [self._label(encoding, vocabulary) for encoding in self._encoded(images, batch_size)]

    def _encoded(self, images: Sequence[Any], batch_size: int) -> list[Encoding]:
        """Encodings of a mixed list: those given are kept, the others are made."""
        missing = [image for image in images if not isinstance(image, Encoding)]
        made = iter(self._encode_all(missing, batch_size))
        return [image if isinstance(image, Encoding) else next(made) for image in images]

    def _label(self, encoding: Encoding, vocabulary: Vocabulary) -> Segmentation:
        """The word half of the model, and the label map."""
        if encoding.model != self.fingerprint:
            raise ValueError(f"this encoding was made by model {encoding.model}, not by {self.fingerprint}")
        winners = self.winners(encoding, vocabulary)
        names = vocabulary.names
        background = len(vocabulary.words) > len(names)
        labels = np.where(winners < len(names), winners, np.int32(UNLABELLED)) if background else winners
        return Segmentation(labels, names, winners, vocabulary, encoding, self)
