"""The two-stage baseline (Xu et al., SimSeg, ECCV 2022): masks are proposed, and CLIP sees a crop of each.

The proposals are those of the model that is given; trained without CLIP's features and with a class embedding of its
own (`opensan lab ablate`, variant two-stage), they are independent of CLIP, as in the paper.
Letters: B batch, Q queries, K words, V valid queries, D embedding, h w stride-16 grid, H W the network image.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opensan.assemble.resize import interpolation_matrices
from opensan.errors import UserError
from opensan.model import SAN
from opensan.segmenters.baselines.counting import Stage
from opensan.segmenters.baselines.dense import baseline_identity
from opensan.segmenters.baselines.options import TwoStageOptions
from opensan.segmenters.results import Encoding, InputImage
from opensan.segmenters.san import SanSegmenter, undisturbed
from opensan.structures import ImageSizes, Proposals, TextClassifier
from opensan.vocabulary import Vocabulary, ready_sets

CROPS_AT_ONCE = 10
"""Crops that go through CLIP together."""

DEFAULT_SIDE = 224
"""Side of the crops' pictures, for a backbone whose configuration does not say which images it was trained on."""


class TwoStageSegmenter(SanSegmenter):
    """Labels by SimSeg's method. Encodings hold also "crop_embeddings" [Q, D], rows of zeros for invalid proposals."""

    has_no_object = False
    vectors_suffice = False

    def __init__(self, model: SAN, options: TwoStageOptions, **settings: Any) -> None:
        """Use `opensan.load("two-stage:MODEL")` to make one."""
        super().__init__(model, **settings)
        self.options = options
        self.trained_words = _read_words(options.trained)
        words = options.model_copy(update={"trained": ",".join(sorted(self.trained_words))})
        self.identity = baseline_identity(self.identity, "two-stage", words)
        self.text.model = self.identity

    @undisturbed
    def encode_prepared(self, batch: Sequence[InputImage]) -> list[Encoding]:
        """Propose masks on images of one padded shape, and embed the crop of each mask."""
        answers = []
        for encoding, image in zip(super().encode_prepared(batch), batch, strict=True):
            pixels = torch.as_tensor(image.prepared.pixels, device=self.device)
            side = crop_side(self.model, self.options)
            crops, valid = crop_proposals(pixels, self._masks(encoding), encoding.sizes, side)
            embedded = pixels.new_zeros(len(valid), self.model.config.clip.embed_dim)
            embedded[valid] = embed_pictures(self.model, crops)
            answers.append(replace(encoding, arrays={**encoding.arrays, "crop_embeddings": embedded}))
        return answers

    @undisturbed
    def class_probabilities(self, encoding: Encoding, vocabulary: Vocabulary) -> Tensor:
        """Return the ensemble of the proposals' and the crops' probabilities, [Q, K]."""
        text = self.text.classifier(vocabulary)
        own = super().class_probabilities(encoding, vocabulary)
        crops = torch.as_tensor(encoding["crop_embeddings"], device=self.device)
        of_crops = crop_probabilities(self.model, crops, text)
        trained = [not self.trained_words.isdisjoint(_keys(word.synonyms)) for word in vocabulary.words]
        return ensemble(own, of_crops, torch.tensor(trained, device=self.device), self.options.weight)

    def class_logits(self, embeddings: np.ndarray, vocabulary: Vocabulary) -> None:
        """Return None: probabilities are an ensemble with those of crops."""
        return None

    def check_encoding(self, encoding: Encoding) -> None:
        """Raise UserError, one line, unless this model made the encoding, with crops."""
        super().check_encoding(encoding)
        crops = encoding.arrays.get("crop_embeddings")
        expected = (len(encoding["mask_logits"]), self.model.config.clip.embed_dim)
        if crops is None or tuple(crops.shape) != expected:
            raise UserError("this encoding holds no embeddings of crops (its arrays contradict each other)")


def _keys(names: Sequence[str]) -> set[str]:
    return {" ".join(name.lower().split()) for name in names}


def _read_words(source: str | None) -> frozenset[str]:
    """Read the words that had masks in training: a file, or the name of a ready set; none if `source` is None."""
    if source is None:
        return frozenset()
    if source in ready_sets():
        vocabulary = Vocabulary.ready(source)
    elif Path(source).is_file():
        vocabulary = Vocabulary.from_file(Path(source))
    else:
        raise UserError(f"two-stage: trained={source}: no such file, nor one of {', '.join(ready_sets())}")
    return frozenset(key for word in vocabulary.words for key in _keys(word.synonyms))


def crop_side(model: SAN, options: TwoStageOptions) -> int:
    """Return the side of the crops' pictures in pixels: CLIP's own, unless the options say another."""
    vision = getattr(model.config.clip, "vision", None)
    return options.side or int(getattr(vision, "image_size", DEFAULT_SIDE))


def crop_proposals(pixels: Tensor, mask_logits: Tensor, sizes: ImageSizes, side: int) -> tuple[Tensor, Tensor]:
    """Cut the tight box of each mask out of an image.

    Args:
        pixels: [3, H', W'] the padded network image, normalised, so that 0 is CLIP's mean colour.
        mask_logits: [Q, h, w].
        sizes: sizes of the image.
        side: the side of the pictures.

    Returns:
        [V, 3, side, side] the boxes resized bicubically, without their aspect; pixels whose mask is 0.5 or less are 0.
        [Q] bool: the proposals whose mask is above 0.5 somewhere, in their order.
    """
    height, width = sizes.network
    pixels = pixels[:, :height, :width]
    down, across = interpolation_matrices(mask_logits, ImageSizes(sizes.network, sizes.network, sizes.padded))
    crops = []
    valid = torch.zeros(len(mask_logits), dtype=torch.bool, device=mask_logits.device)
    for number, logits in enumerate(mask_logits):
        mask = down @ logits @ across.T > 0
        if not mask.any():
            continue
        valid[number] = True
        (top, bottom), (left, right) = (_extent(mask.any(dim=dim)) for dim in (1, 0))
        region = (pixels * mask)[None, :, top:bottom, left:right]
        crops.append(F.interpolate(region, size=(side, side), mode="bicubic", align_corners=False))
    return torch.cat(crops) if crops else pixels.new_empty(0, 3, side, side), valid


def _extent(line: Tensor) -> tuple[int, int]:
    """Return the first true element of a line, and the one after the last."""
    indices = line.nonzero()
    return int(indices[0]), int(indices[-1]) + 1


def embed_pictures(model: SAN, pictures: Tensor) -> Tensor:
    """Return CLIP's unit image embeddings [V, D] of normalised pictures [V, 3, H, W]."""
    if not len(pictures):
        return pictures.new_empty(0, model.config.clip.embed_dim)
    return torch.cat([_embed(model, some) for some in pictures.split(CROPS_AT_ONCE)])


def _embed(model: SAN, pictures: Tensor) -> Tensor:
    features = model.clip.shallow_features(pictures, model.config.recognition_layer, ())
    # Without a bias, a query is the backbone's own image embedding (`Backbone.recognise`).
    bias = pictures.new_zeros(len(pictures), model.clip.attention_heads, 1, *features.grid)
    return model.clip.recognise(features, bias)[:, 0]


def crop_probabilities(model: SAN, crops: Tensor, text: TextClassifier) -> Tensor:
    """Return the softmax over the words, [Q, K], of the crops' embeddings [Q, D]; 1 for a proposal without a crop."""
    empty = crops.new_empty(1, 0, 1, 1)
    probabilities = model.classify(Proposals(empty, crops.unsqueeze(0)), text)[0, :, :-1].softmax(dim=1)
    return probabilities.masked_fill(~crops.any(dim=1, keepdim=True), 1)


def ensemble(own: Tensor, of_crops: Tensor, trained: Tensor, weight: float) -> Tensor:
    """Return own^w crops^(1 - w), [Q, K], for words that had masks (`trained` [K] bool); else own^(1 - w) crops^w."""
    exponent = torch.where(trained, weight, 1 - weight)
    return own**exponent * of_crops ** (1 - exponent)


def stages(model: SAN, options: TwoStageOptions, pixels: Tensor, text: TextClassifier) -> list[Stage]:
    """Return the method's work on one image, `pixels` [1, 3, H, W], by parts; every proposal has a crop."""
    side, queries = crop_side(model, options), model.config.side_adapter.queries
    picture = pixels.new_empty(1, 3, side, side)
    proposals = model.propose(pixels)
    crops = pixels.new_empty(queries, model.config.clip.embed_dim)
    return [
        Stage("proposals", lambda: model.propose(pixels)),
        Stage(f"CLIP, {queries} crops of {side}x{side}", lambda: _embed(model, picture), queries),
        Stage("classification", lambda: (model.classify(proposals, text), crop_probabilities(model, crops, text))),
    ]
