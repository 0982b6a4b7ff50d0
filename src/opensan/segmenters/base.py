"""The base class of all segmenters; needs no torch.

Letters: Q queries, K words, D embedding, h w stride-16 grid, H0 W0 the image.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from opensan.config import ImageConfig
from opensan.errors import UserError
from opensan.images import ImageSource, PreparedImage, open_image
from opensan.segmenters.results import Encoding, ReadImage, Segmentation, is_finite
from opensan.structures import Identity
from opensan.text.rows import TextRows
from opensan.vocabulary import UNLABELLED, Templates, Vocabulary

if TYPE_CHECKING:
    import torch


class Segmenter:
    """A model ready to be asked. Holds no state of any image, so threads may share one object."""

    identity: Identity
    """Which model it is, taken when the segmenter was built."""
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
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
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
        if encoding.model != self.identity.encodings:
            raise UserError(f"this encoding was made by model {encoding.model}, not by {self.identity.encodings}")
        if not (is_finite(encoding.mask_logits) and is_finite(encoding.mask_embeddings)):
            raise UserError(
                f"model {encoding.model} gives no finite numbers for an image: its weights are not usable"
            )
        winners = self.winners(encoding, vocabulary)
        names = vocabulary.names
        background = len(vocabulary.words) > len(names)
        labels = np.where(winners < len(names), winners, np.int32(UNLABELLED)) if background else winners
        return Segmentation(labels, names, winners, vocabulary, encoding, self)


AnySegmenter = Segmenter
"""The name that this class had in version 0.1.0."""
