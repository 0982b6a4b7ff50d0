"""SAN's segmenter: encode an image once, then label it with any words.

    san = opensan.load("san-vit-b16")
    segmentation = san.segment("street.jpg", ["road", "car", "tree", "sky"])
    segmentation.relabel(["asphalt", "vehicle", "sky"])  # neither ViT runs

Letters: Q queries, K words, D embedding, h w stride-16 grid, H0 W0 the image.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, get_args

import numpy as np
import torch

from opensan.assemble.bands import Scores, first_equal, to_array
from opensan.assemble.labels import label_map
from opensan.assemble.resize import MaskBand, mask_bands
from opensan.assemble.scores import band_scores, class_probabilities, label_scores
from opensan.checkpoints import load_model, random_model
from opensan.checkpoints.push import Pushed, push
from opensan.choices import Adapt, Speed
from opensan.devices import checked_device
from opensan.errors import UserError
from opensan.images import MAX_PIXELS, prepare
from opensan.model import SAN
from opensan.model.identity import model_identity
from opensan.model.mapped import forgetting, keep
from opensan.segmenters.base import Segmenter
from opensan.segmenters.image_half import DTYPES, fastest_dtype, prepare_image_half
from opensan.segmenters.proposals import ProposalSegmenter, with_nothing
from opensan.segmenters.results import Encoding, InputImage, Segmentation
from opensan.structures import Proposals
from opensan.text.encoder import TextEncoder
from opensan.vocabulary import Templates, Vocabulary

__all__ = ["Encoding", "InputImage", "SanSegmenter", "Segmentation", "load_san"]


def undisturbed(method: Callable) -> Callable:
    """Run a method of a segmenter on torch without gradients, and in float32 even under the caller's autocast.

    Streams, CUDA graphs and Triton's kernels use the current device, not that of their tensors.
    """

    @wraps(method)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        current = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with current, torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return method(self, *arguments, **named)

    return call


class SanSegmenter(ProposalSegmenter):
    """A SAN model for inference. It holds no state of any image, so threads may share one object."""

    device: torch.device

    def __init__(
        self,
        model: SAN,
        *,
        device: str | torch.device = "cpu",
        speed: str = "exact",
        dtype: str | None = None,
        max_pixels: int = MAX_PIXELS,
        text_cache: bool = True,
        sole: bool = False,
    ) -> None:
        """Use `opensan.load`, which describes the arguments, to make one.

        `sole`: nobody else will use `model`, so what is in its file is kept out of memory until it is needed.
        """
        if speed not in get_args(Speed):
            raise UserError(f"speed {speed!r} is not one of {', '.join(get_args(Speed))}")
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.device = checked_device(device)
        self.speed = speed
        self.dtype = _matrix_dtype(self.device, speed, dtype)
        self.max_pixels = max_pixels
        self.image_config = model.config.image
        self.rest_share = model.config.rest_share
        # The caller's model is unchanged, so that a training may continue with it.
        self.model = model.snapshot()
        forget = forgetting() if sole else keep
        self.identity = model_identity(self.model, forget)
        self.model.to(self.device)
        # Words are computed in float32 at any speed: they take little time, and all speeds share their cache.
        self._propose = prepare_image_half(self.model, self.device, speed, self.dtype, forget)
        self.text = TextEncoder(self.model, disk_cache=text_cache, identity=self.identity.text, sole=sole)
        self.text.model = self.identity

    def prepare(self, image: np.ndarray) -> InputImage:
        """Turn an image, [H0, W0, 3] uint8 RGB, into network input; see `Segmenter.prepare`."""
        return InputImage(image, prepare(image, self.image_config))

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        license: str | None = None,
        evaluations: Sequence[str | os.PathLike[str]] = (),
        token: str | None = None,
    ) -> Pushed:
        """Upload the model that this segmenter was loaded from; see `Segmenter.push_to_hub`."""
        if self.source is None:  # its own matrices are laid out, and may be rounded, for speed
            raise UserError(
                "this segmenter was built from a model in memory: write that with opensan.checkpoints.save_folder, and "
                "push the folder with opensan.checkpoints.push.push"
            )
        return push(
            self.source,
            repository,
            private=private,
            license=license,
            evaluations=evaluations,
            token=token,
            identity=str(self.identity),
        )

    def adapting(
        self, words: Any, adapt: Adapt = "each", *, background: Iterable[Any] = (), templates: Templates | None = None
    ) -> Segmenter:
        """Return a segmenter that adapts to each image at test time; see `Segmenter.adapting`."""
        if type(self) is not SanSegmenter:  # other methods on its weights, or one that adapts already
            return super().adapting(words, adapt, background=background, templates=templates)
        from opensan.segmenters.adapting import AdaptingSegmenter

        return AdaptingSegmenter(self, Vocabulary.parse(words, background=background, templates=templates), adapt)

    @undisturbed
    def encode_prepared(self, batch: Sequence[InputImage]) -> list[Encoding]:
        """Run images of one padded shape through the network."""
        pixels = torch.stack([torch.as_tensor(image.prepared.pixels) for image in batch]).to(self.device)
        proposals = self._propose(pixels)
        # Copies, because a view would keep the whole batch's tensors in memory.
        return [
            Encoding(
                {"mask_logits": masks.clone(), "mask_embeddings": embeddings.clone()},
                image.prepared.sizes,
                self.identity.encodings,
                image.image,
            )
            for masks, embeddings, image in zip(
                proposals.mask_logits.float(), proposals.mask_embeddings.float(), batch, strict=True
            )
        ]

    @undisturbed
    def class_probabilities(self, encoding: Encoding, vocabulary: Vocabulary) -> torch.Tensor:
        """Return class probabilities [Q, K]; see `ProposalSegmenter.class_probabilities`."""
        embeddings = torch.as_tensor(encoding["mask_embeddings"], device=self.device)
        proposals = Proposals(self._masks(encoding).unsqueeze(0), embeddings.unsqueeze(0))
        logits = self.model.classify(proposals, self.text.classifier(vocabulary))
        return with_nothing(class_probabilities(logits)[0], vocabulary)

    @undisturbed
    def class_logits(self, embeddings: np.ndarray, vocabulary: Vocabulary) -> np.ndarray | None:
        """Return class logits [Q, K + 1], float32; see `ProposalSegmenter.class_logits`."""
        vectors = torch.as_tensor(embeddings, dtype=torch.float32, device=self.device)
        proposals = Proposals(vectors.new_zeros(1, len(vectors), 1, 1), vectors.unsqueeze(0))
        return self.model.classify(proposals, self.text.classifier(vocabulary))[0].float().cpu().numpy()

    @undisturbed
    def winners(self, encoding: Encoding, vocabulary: Vocabulary) -> np.ndarray:
        """Return each pixel's word index, [H0, W0] int32; see `Segmenter.winners`."""
        probabilities = self.class_probabilities(encoding, vocabulary)
        return label_map(self._masks(encoding), probabilities, encoding.sizes).cpu().numpy()

    @undisturbed
    def confidence(self, segmentation: Segmentation) -> np.ndarray:
        """Return the confidence, [H0, W0] float32; see `Segmentation.confidence`."""
        if segmentation.calibration is not None:
            return super().confidence(segmentation)
        encoding = segmentation.encoding
        probabilities = self.class_probabilities(encoding, segmentation.vocabulary)
        labels = torch.from_numpy(segmentation.winners).to(self.device)
        scores = label_scores(self._masks(encoding), probabilities, encoding.sizes, labels)
        return scores.clamp_(0, 1).cpu().numpy()

    @undisturbed
    def attention_bias(self, encoding: Encoding, proposals: Sequence[int]) -> np.ndarray | None:
        """Return where the side adapter steers CLIP's attention for some proposals: [len(proposals), N heads, h, w].

        Encodings do not keep it, so the image half runs again on the image. The part of the padding is cut off.
        None if the encoding did not keep its image, or the model steers nothing.
        """
        pixels = self._pixels(encoding)
        return None if pixels is None else _maps_of(self.model.propose(pixels).attention_bias, encoding, proposals)

    @undisturbed
    def attended(self, encoding: Encoding, proposals: Sequence[int]) -> np.ndarray | None:
        """Return how much some proposals' SLS tokens attended to each patch: [len(proposals), N heads, h, w].

        The mean over the recognition layers, by running the image half again, as for `attention_bias`.
        None if the encoding did not keep its image, or the model does not tell.
        """
        pixels = self._pixels(encoding)
        return None if pixels is None else _maps_of(self.model.attended(pixels), encoding, proposals)

    def _pixels(self, encoding: Encoding) -> torch.Tensor | None:
        """Return the network input [1, 3, H, W] of an encoding's image, if it was kept."""
        if encoding.image is None:
            return None
        return torch.as_tensor(prepare(encoding.image, self.image_config).pixels).unsqueeze(0).to(self.device)

    def scores(self, encoding: Encoding, vocabulary: Vocabulary) -> Scores:
        """Return the function from a band of rows to all scores (tensors on the device); see `Segmenter.scores`."""
        probabilities = self.class_probabilities(encoding, vocabulary)
        masks = mask_bands(self._masks(encoding), encoding.sizes)
        first = torch.from_numpy(first_equal(to_array(probabilities.T))).to(self.device)
        return lambda rows: self._band_scores(masks, probabilities, rows)[first]

    @undisturbed
    def _band_scores(self, masks: MaskBand, probabilities: torch.Tensor, rows: slice) -> torch.Tensor:
        return band_scores(masks, probabilities, rows)

    def _masks(self, encoding: Encoding) -> torch.Tensor:
        return torch.as_tensor(encoding["mask_logits"], device=self.device)


def _maps_of(maps: torch.Tensor | None, encoding: Encoding, proposals: Sequence[int]) -> np.ndarray | None:
    """Return the maps of some proposals, of [1, N, Q, h, w], without the part of the padding: [n, N, h', w']."""
    if maps is None:
        return None
    sides = zip(maps.shape[-2:], encoding.sizes.network, encoding.sizes.padded, strict=True)
    height, width = (max(1, round(cells * network / padded)) for cells, network, padded in sides)
    return to_array(maps[0, :, list(proposals), :height, :width].transpose(0, 1).float())


def load_san(
    source: str | os.PathLike = "san-vit-b16",
    *,
    device: str | torch.device = "auto",
    speed: str = "exact",
    dtype: str | None = None,
    random_weights: int | None = None,
    max_pixels: int = MAX_PIXELS,
    text_cache: bool = True,
) -> SanSegmenter:
    """Load a SAN, ready to segment.

    Args:
        source: "san-vit-b16", "san-vit-l14" (official weights, from the hub), "photo", "tiny" (in the package);
            a checkpoint folder, a .safetensors, an official .pth, or a hub id "owner/name" or "owner/name@REVISION".
        device: "auto" ("cuda" where torch finds a GPU, else "cpu"), "cpu", "cuda", "cuda:1", "mps".
        speed: "exact" computes the image half in float32; "fast" and "fastest" multiply matrices of the backbone, or of
            both networks, in bfloat16, with nearly the same labels (see docs/speed.md).
        dtype: "float32" or "bfloat16", the precision of the blocks that `speed` narrows ("exact": of all blocks); None
            lets `speed` choose.
        random_weights: a seed; builds the named preset with random weights and no download.
            For benchmarks and shape work only: labels are random.
        max_pixels: larger images are refused, before they are decoded.
        text_cache: keep text embeddings on disk (in the user's cache folder, or where OPENSAN_CACHE says).

    Raises:
        ValueError: unknown model or device, or a damaged file; one line.
        HubError: the hub did not answer; names the attempts and what works offline.
    """
    model = weights_of(source, random_weights)
    segmenter = SanSegmenter(
        model, device=device, speed=speed, dtype=dtype, max_pixels=max_pixels, text_cache=text_cache, sole=True
    )
    segmenter.source = None if random_weights is not None else source
    return segmenter


def weights_of(source: str | os.PathLike, random_weights: int | None) -> SAN:
    """Load the weights that `source` names, or make random ones from a seed, which warns; see `load_san`."""
    if random_weights is None:
        return load_model(source)
    model = random_model(os.fspath(source), random_weights)
    warnings.warn(f"{source} has random weights (seed {random_weights}): its answers mean nothing", stacklevel=3)
    return model


def _matrix_dtype(device: torch.device, speed: str, dtype: str | None) -> torch.dtype:
    if dtype is not None:
        return DTYPES[dtype]
    return torch.float32 if speed == "exact" else fastest_dtype(device)
