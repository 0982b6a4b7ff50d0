"""The one object a user holds: encode an image once, then ask any words.

    san = opensan.load("san-vit-b16")
    segmentation = san.segment("street.jpg", ["road", "car", "tree", "sky"])
    segmentation.relabel(["asphalt", "vehicle", "sky"])  # neither ViT runs

Letters: Q queries, K words, D embedding, h w stride-16 grid, H0 W0 the photograph.
"""

import hashlib
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opensan import outputs
from opensan.assemble import label_map, label_scores
from opensan.checkpoints import load_model, preset_config
from opensan.files import atomic_path
from opensan.images import MAX_PIXELS, PreparedImage, open_image, prepare
from opensan.model import SAN, build_san
from opensan.speed import DTYPES, SPEEDS, fastest_dtype, prepare_image_half
from opensan.structures import ImageSizes, Proposals
from opensan.text import TextEncoder
from opensan.vocabulary import UNLABELLED, Vocabulary


@dataclass(frozen=True)
class Encoding:
    """An image after both ViTs, before any word: all that `Segmenter.segment` needs to answer any vocabulary."""

    mask_logits: torch.Tensor
    """[Q, h, w] float32."""
    mask_embeddings: torch.Tensor
    """[Q, D] float32, unit length."""
    sizes: ImageSizes
    model: str
    """Fingerprint of the model that made it; another model cannot read it."""
    image: np.ndarray | None = None
    """The photograph, [H0, W0, 3] uint8 RGB, for overlays; None if it was not kept."""

    def save(self, path: str | os.PathLike) -> Path:
        """Write to `path` (a safetensors file), all or nothing."""
        path = Path(path)
        tensors = {
            "mask_logits": self.mask_logits.cpu().contiguous(),
            "mask_embeddings": self.mask_embeddings.cpu().contiguous(),
        }
        if self.image is not None:
            tensors["image"] = torch.from_numpy(np.ascontiguousarray(self.image))
        sizes = {"image": self.sizes.image, "network": self.sizes.network, "padded": self.sizes.padded}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"opensan": json.dumps({"model": self.model, "sizes": sizes})})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Encoding":
        """Read what `save` wrote. Raises ValueError, one line, on anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads(file.metadata()["opensan"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            sizes = ImageSizes(**{name: (int(size[0]), int(size[1])) for name, size in meta["sizes"].items()})
            image = tensors["image"].numpy() if "image" in tensors else None
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
            and masks.dtype == embeddings.dtype == torch.float32
            and all(0 < network <= padded for network, padded in zip(sizes.network, sizes.padded, strict=True))
            and all(padded <= 256 * grid for padded, grid in zip(sizes.padded, masks.shape[1:], strict=True))
            and all(0 < side <= 1_000_000 for side in sizes.image)
            and (self.image is None or self.image.shape == (*sizes.image, 3))
        )
        if not fits:
            raise ValueError(f"{source}: not a saved encoding (its tensors and sizes contradict each other)")


@dataclass(frozen=True)
class Segmentation:
    """The answer: a word for every pixel."""

    labels: np.ndarray
    """[H0, W0] int32: index into `names`, or -1 where a background word won."""
    names: list[str]
    """Display names in the vocabulary's order, background words left out."""
    winners: np.ndarray = field(repr=False)
    """[H0, W0] int32: index into `vocabulary.words`, background words included; `labels` itself if there are none."""
    vocabulary: Vocabulary
    encoding: Encoding = field(repr=False)
    segmenter: "Segmenter" = field(repr=False)

    @cached_property
    def confidence(self) -> np.ndarray:
        """[H0, W0] float32 in [0, 1]: the winner's score, clipped (sum over proposals of class times mask probability).

        Computed when first asked for; labels do not need it.
        """
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

    def relabel(self, words: Any, *, background: Iterable[str] = (), templates: Any = None) -> "Segmentation":
        """The same image asked with other words; neither ViT runs. Arguments as for `Segmenter.segment`."""
        return self.segmenter.segment(self.encoding, words, background=background, templates=templates)

    def overlay(self) -> Image.Image:
        """The photograph under the words' colours, with a legend below; what `save` writes, to look at."""
        return outputs.overlay(self.image, self.labels, self.names, self.areas)

    def save(
        self,
        folder: str | os.PathLike,
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


class Segmenter:
    """A model ready to be asked. Holds no state of any image, so threads may share one object."""

    def __init__(
        self,
        model: SAN,
        *,
        device: str | torch.device = "cpu",
        speed: str = "exact",
        dtype: str | None = None,
        max_pixels: int = MAX_PIXELS,
        text_cache: bool = True,
    ) -> None:
        """`opensan.load` makes one; see there for the arguments."""
        if speed not in SPEEDS:
            raise ValueError(f"speed {speed!r} is not one of {', '.join(SPEEDS)}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.device = checked_device(device)
        self.speed = speed
        self.dtype = _matrix_dtype(self.device, speed, dtype)
        self.max_pixels = max_pixels
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.fingerprint = fingerprint(self.model)
        # Words stay in float32 at any speed: they cost little there, and their cache is shared.
        self._propose = prepare_image_half(self.model, self.device, speed, self.dtype)
        self.text = TextEncoder(self.model, disk_cache=text_cache)

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
        array = open_image(image, max_pixels=self.max_pixels)
        return ReadImage(array, prepare(array, self.model.config.image))

    def encode_read(self, images: Sequence[ReadImage], *, batch_size: int = 4) -> list[Encoding]:
        """What `encode` does after reading; see there."""
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

    @torch.inference_mode()
    def encode_prepared(
        self, batch: Sequence[PreparedImage], arrays: Sequence[np.ndarray | None] | None = None
    ) -> list[Encoding]:
        """Images of one padded shape through the network; `arrays` are the photographs that the encodings keep."""
        pixels = torch.stack([prepared.pixels for prepared in batch]).to(self.device)
        proposals = self._propose(pixels)
        return [
            Encoding(masks, embeddings, prepared.sizes, self.fingerprint, array)
            for masks, embeddings, prepared, array in zip(
                proposals.mask_logits.float(),
                proposals.mask_embeddings.float(),
                batch,
                arrays or [None] * len(batch),
                strict=True,
            )
        ]

    def segment(
        self,
        images: Any,
        words: Any,
        *,
        background: Iterable[str] = (),
        templates: Any = None,
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

    @torch.inference_mode()
    def _label(self, encoding: Encoding, vocabulary: Vocabulary) -> Segmentation:
        """The word half of the model, and the label map."""
        if encoding.model != self.fingerprint:
            raise ValueError(f"this encoding was made by model {encoding.model}, not by {self.fingerprint}")
        probabilities = self.class_probabilities(encoding, vocabulary)
        winners = label_map(encoding.mask_logits.to(self.device), probabilities, encoding.sizes).cpu().numpy()
        names = vocabulary.names
        background = len(vocabulary.words) > len(names)
        labels = np.where(winners < len(names), winners, np.int32(UNLABELLED)) if background else winners
        return Segmentation(labels, names, winners, vocabulary, encoding, self)

    @torch.inference_mode()
    def confidence(self, segmentation: Segmentation) -> np.ndarray:
        """What `Segmentation.confidence` answers."""
        encoding = segmentation.encoding
        probabilities = self.class_probabilities(encoding, segmentation.vocabulary)
        labels = torch.from_numpy(segmentation.winners).to(self.device)
        scores = label_scores(encoding.mask_logits.to(self.device), probabilities, encoding.sizes, labels)
        return scores.clamp_(0, 1).cpu().numpy()

    @torch.inference_mode()
    def class_probabilities(self, encoding: Encoding, vocabulary: Vocabulary) -> torch.Tensor:
        """[Q, K] float32: each proposal's softmax over the words and "no object", without the latter.

        K counts the background words too; they come last.
        """
        text = self.text.classifier(vocabulary)
        masks, embeddings = encoding.mask_logits.to(self.device), encoding.mask_embeddings.to(self.device)
        proposals = Proposals(mask_logits=masks.unsqueeze(0), mask_embeddings=embeddings.unsqueeze(0))
        return self.model.classify(proposals, text)[0].softmax(dim=-1)[:, :-1]


def load(
    source: str | os.PathLike = "san-vit-b16",
    *,
    device: str | torch.device = "cpu",
    speed: str = "exact",
    dtype: str | None = None,
    random_weights: int | None = None,
    max_pixels: int = MAX_PIXELS,
    text_cache: bool = True,
) -> Segmenter:
    """Load a model, ready to segment.

    Args:
        source: "san-vit-b16", "san-vit-l14" (official weights, from the hub), "tiny" (ships with the package);
            a checkpoint folder, a .safetensors, an official .pth, or a hub id "owner/name".
        device: "cpu", "cuda", "cuda:1", "mps".
        speed: "exact" computes the image half in float32; "fast" as the device does it fastest, with nearly the same
            labels (docs/speed.md says what it gains and costs).
        dtype: "float32" or "bfloat16", of the matrices of both ViTs' blocks, where `speed` shall not choose it.
        random_weights: a seed; builds the named preset with random weights and no download.
            For benchmarks and shape work: the answers mean nothing.
        max_pixels: larger photographs are refused, before they are decoded.
        text_cache: keep text embeddings on disk (in the user's cache folder, or where OPENSAN_CACHE says).

    Raises:
        ValueError: unknown model or device, or a damaged file; one line.
        ConnectionError: the hub did not answer; says what was tried and what works offline.
    """
    if random_weights is None:
        model = load_model(source)
    else:
        config = preset_config(os.fspath(source))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_weights)
            model = build_san(config)
        warnings.warn(f"{source} has random weights (seed {random_weights}): its answers mean nothing", stacklevel=2)
    return Segmenter(model, device=device, speed=speed, dtype=dtype, max_pixels=max_pixels, text_cache=text_cache)


def checked_device(device: str | torch.device) -> torch.device:
    """Raises ValueError when torch does not know `device` or the machine does not have it."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return found


def _matrix_dtype(device: torch.device, speed: str, dtype: str | None) -> torch.dtype:
    if dtype is not None:
        return DTYPES[dtype]
    return fastest_dtype(device) if speed == "fast" else torch.float32


def fingerprint(model: SAN) -> str:
    """The model's name and a hash of trained tensors that no two trainings share: cheap, for any size of model."""
    state: Mapping[str, torch.Tensor] = model.state_dict()
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    for name in ("side_adapter.query_embedding", "side_adapter.patch_position", "no_object_embedding"):
        digest.update(state[name].float().cpu().contiguous().numpy().tobytes())
    return f"{model.config.name}-{digest.hexdigest()[:12]}"
