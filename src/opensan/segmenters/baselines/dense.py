"""MaskCLIP (Zhou et al., ECCV 2022): CLIP's last block without its attention gives every position an embedding.

Nothing is trained, and there are no mask proposals: a word's score at a position is the cosine of the two.
Letters: B batch, K words, L positions, C channels, D embedding, h w CLIP's grid, H0 W0 the image.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensan.assemble.bands import Scores, first_equal, to_array
from opensan.assemble.resize import interpolation_matrices
from opensan.devices import checked_device
from opensan.errors import UserError
from opensan.images import MAX_PIXELS
from opensan.model import SAN
from opensan.model.backbones.base import ShallowFeatures
from opensan.model.identity import model_identity
from opensan.segmenters.base import Segmenter
from opensan.segmenters.baselines.counting import Stage
from opensan.segmenters.baselines.options import DenseOptions, Options
from opensan.segmenters.results import Encoding, InputImage
from opensan.segmenters.san import undisturbed
from opensan.structures import Identity, Proposals, TextClassifier
from opensan.text.encoder import TextEncoder
from opensan.vocabulary import Vocabulary

POOLED_BY_MEANS = ("align", "convnet", "efficientnet_lite")
"""Families whose image embedding is that of the mean position, so that a position has an embedding too."""


class DenseSegmenter(Segmenter):
    """Labels by MaskCLIP. Encodings hold "dense_embeddings" [h, w, D], and "keys" [h, w, C] for key smoothing."""

    device: torch.device

    def __init__(
        self,
        model: SAN,
        options: DenseOptions,
        *,
        device: str | torch.device = "cpu",
        max_pixels: int = MAX_PIXELS,
        text_cache: bool = True,
    ) -> None:
        """Use `opensan.load("maskclip:MODEL")` to make one. Raises UserError if the backbone has no dense form."""
        check_dense(model, options)
        self.options = options
        self.device = checked_device(device)
        self.speed, self.dtype = "exact", torch.float32
        self.max_pixels = max_pixels
        self.image_config = model.config.image
        self.model = model.snapshot()
        own = model_identity(self.model)
        self.identity = baseline_identity(own, "maskclip", options)
        self.model.to(self.device)
        self.text = TextEncoder(self.model, disk_cache=text_cache, identity=own.text)
        self.text.model = self.identity

    @undisturbed
    def encode_prepared(self, batch: Sequence[InputImage]) -> list[Encoding]:
        """Run images of one padded shape through CLIP."""
        pixels = torch.stack([torch.as_tensor(image.prepared.pixels) for image in batch]).to(self.device)
        embeddings, keys = dense_embeddings(self.model, pixels, self.options)
        arrays = [{"dense_embeddings": own.clone()} for own in embeddings.float()]
        if keys is not None and self.options.smooth is not None:
            for of_image, own in zip(arrays, keys.float(), strict=True):
                of_image["keys"] = own.clone()
        return [
            Encoding(of_image, image.prepared.sizes, self.identity.encodings, image.image)
            for of_image, image in zip(arrays, batch, strict=True)
        ]

    def prepare_words(self, vocabulary: Vocabulary, progress: Callable[[int, int], None] | None = None) -> None:
        """Embed the words; see `Segmenter.prepare_words`."""
        self.text.classifier(vocabulary, progress=progress)

    @undisturbed
    def scores(self, encoding: Encoding, vocabulary: Vocabulary) -> Scores:
        """Return the function that scores all words in a band of rows; see `Segmenter.scores`."""
        embeddings = torch.as_tensor(encoding["dense_embeddings"], device=self.device)
        keys = torch.as_tensor(encoding["keys"], device=self.device) if "keys" in encoding.arrays else None
        maps, probable = word_maps(self.model, embeddings, keys, self.text.classifier(vocabulary), self.options)
        down, across = interpolation_matrices(maps, encoding.sizes)
        first = torch.from_numpy(first_equal(to_array(maps.flatten(1)))).to(self.device)

        def of_rows(rows: slice) -> Tensor:
            band = down[rows] @ maps @ across.T
            return (band if probable else band.softmax(dim=0))[first]

        return of_rows

    def check_encoding(self, encoding: Encoding) -> None:
        """Raise UserError, one line, unless this model made the encoding and its arrays are dense embeddings."""
        super().check_encoding(encoding)
        embeddings = encoding.arrays.get("dense_embeddings")
        if embeddings is None or embeddings.ndim != 3 or embeddings.shape[2] != self.model.config.clip.embed_dim:
            raise UserError("this encoding holds no dense embeddings (its arrays contradict each other)")


def baseline_identity(model: Identity, method: str, options: Options) -> Identity:
    """Return the identity of a method with `options` on a model: another one for each."""
    about = f"{model.image} {method} {options.model_dump_json()}"
    return Identity(f"{method}-{model.name}", hashlib.sha256(about.encode()).hexdigest(), model.text)


def check_dense(model: SAN, options: DenseOptions) -> None:
    """Raise UserError, one line, if the model's backbone has no dense form, or none with these options."""
    kind = model.config.clip.kind
    if kind not in ("clip_vit", "clip_resnet", *POOLED_BY_MEANS):
        raise UserError(
            f"maskclip: {model.config.name} has a backbone of the family {kind}, whose last layer cannot be read "
            "without its attention; take one of clip_vit, clip_resnet, convnet, align or efficientnet_lite"
        )
    if kind != "clip_vit":
        for option in ("plain", "smooth"):
            if getattr(options, option) not in (None, False):
                raise UserError(
                    f"maskclip: {option} is about the last block of a ViT, and {model.config.name} has none ({kind})"
                )


def dense_embeddings(model: SAN, pixels: Tensor, options: DenseOptions) -> tuple[Tensor, Tensor | None]:
    """Embed every position of padded, normalised images [B, 3, H, W]: unit embeddings [B, h, w, D], keys [B, h, w, C].

    A ViT's last block: norm, value and output projection, then, unless `plain`, the residual sum and the MLP with its
    own; final norm, projection. A ResNet's attention pooling: value and output projection. A pooling by means: what
    it makes of the position alone. Only a ViT gives keys.
    """
    if options.scale != 1:
        pixels = F.interpolate(pixels, scale_factor=options.scale, mode="bilinear", align_corners=False)
    clip: Any = model.clip
    kind = model.config.clip.kind
    keys = None
    if kind == "clip_vit":
        *_, last = clip.blocks()
        features = clip.shallow_features(pixels, len(clip.blocks()) - 1, ())
        x, keys = last.values_alone(features.tokens[:, 1:], residual=not options.plain)
        embeddings = clip.visual.ln_post(x) @ clip.visual.proj
    else:
        features = clip.shallow_features(pixels, model.config.recognition_layer, ())
        if kind == "clip_resnet":
            pool = clip.visual.attnpool
            embeddings = pool.c_proj(pool.v_proj(features.tokens))
        else:
            embeddings = clip.recognise(features, _one_position_each(features))
    grid = features.grid
    unit = F.normalize(embeddings, dim=-1).unflatten(1, grid)
    return unit, None if keys is None else keys.unflatten(1, grid)


def _one_position_each(features: ShallowFeatures) -> Tensor:
    """Return a bias [B, 1, L, h, w] with which query number l sees position l alone."""
    tokens = features.tokens
    count = features.grid[0] * features.grid[1]
    # exp(-100) vanishes in float32; minus infinity would become nan where a family resizes the bias.
    bias = torch.full((count, count), -100.0, device=tokens.device).fill_diagonal_(0)
    return bias.unflatten(1, features.grid).expand(len(tokens), 1, -1, -1, -1)


def word_maps(
    model: SAN, embeddings: Tensor, keys: Tensor | None, text: TextClassifier, options: DenseOptions
) -> tuple[Tensor, bool]:
    """Return maps of the words [K, h, w], and whether they are probabilities rather than logits.

    `embeddings` [h, w, D]; `keys` [h, w, C], for key smoothing. Denoising comes first, as in the authors' code; where
    no word reaches its probability, none is dropped. Smoothed probabilities are divided by the sum of the weights'
    magnitudes, which changes no label.
    """
    grid = embeddings.shape[:2]
    flat = embeddings.flatten(0, 1)
    empty = flat.new_empty(1, 0, 1, 1)
    logits = model.classify(Proposals(empty, flat.unsqueeze(0)), text)[0, :, :-1]  # [L, K]
    if options.denoise is not None:
        absent = logits.softmax(dim=1).amax(dim=0) < options.denoise
        logits = logits.masked_fill(absent & ~absent.all(), -torch.inf)
    if options.smooth is None or keys is None:
        # A finite number in the place of minus infinity: interpolation would make it nan.
        return logits.clamp(min=-1e4).T.unflatten(1, grid), False
    probabilities = logits.softmax(dim=1)
    unit = F.normalize(keys.flatten(0, 1), dim=1)
    similarity = unit @ unit.T
    smoothed = similarity @ probabilities / similarity.abs().sum(dim=1, keepdim=True)
    unsure = probabilities.amax(dim=1, keepdim=True) < options.smooth
    return torch.where(unsure, smoothed, probabilities).T.unflatten(1, grid), True


def stages(model: SAN, options: DenseOptions, pixels: Tensor, text: TextClassifier) -> list[Stage]:
    """Return the method's work on one image, `pixels` [1, 3, H, W], by parts."""
    embeddings, keys = dense_embeddings(model, pixels, options)
    own = None if keys is None else keys[0]
    return [
        Stage("CLIP, dense", lambda: dense_embeddings(model, pixels, options)),
        Stage("classification", lambda: word_maps(model, embeddings[0], own, text, options)),
    ]
