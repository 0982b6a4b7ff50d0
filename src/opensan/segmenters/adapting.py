"""Adapt a SAN to each image at test time, without labels: by the affine parameters of its norm layers alone.

    san = opensan.load("photo")
    adapting = san.adapting("road, car, sky")
    adapting.segment("night.jpg", "road, car, sky")

A few gradient steps lower the entropy of the pixels' predictions, a mean over single prompt templates and over the side
blocks that training supervised: the idea of Noori et al., "Test-Time Adaptation of Vision-Language Models for
Open-Vocabulary Semantic Segmentation" (NeurIPS 2025, arXiv 2505.21844), who did it for plain CLIP, over the layers of
its image encoder. The entropy alone is lowest where one word takes all pixels, so the entropy of the image's mean
prediction is raised at the same time, as in the information maximization of Liang et al. (SHOT, ICML 2020).

The model that it is made from stays as it is: a snapshot of it adapts, whose weights are not written to either. Each
forward pass is given the changed parameters in their stead, by turns, because it borrows the module meanwhile.
Letters: B batch, Q queries, K words, h w stride-16 grid.
"""

import hashlib
import json
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from opensan.choices import Adapt
from opensan.errors import UserError, short
from opensan.model import SAN
from opensan.segmenters.results import Encoding, InputImage
from opensan.segmenters.san import SanSegmenter
from opensan.structures import Identity, ImageSizes, Proposals, TextClassifier
from opensan.vocabulary import Vocabulary

STEPS = 2
"""Gradient steps for an image. More cost more where the model is right already, and gain little where it is not."""

LEARNING_RATE = 3e-3
"""Adam's learning rate."""

MOST_TEMPLATES = 3
"""Templates whose predictions are taken, the first ones of the words'."""

_RECIPE = {"steps": STEPS, "learning_rate": LEARNING_RATE, "templates": MOST_TEMPLATES, "loss": "information"}
"""Settings that an adapted encoding depends on, besides image, model and words."""

Weights = dict[str, Tensor]
"""Parameters by their name in `_Supervised`."""


class AdaptingSegmenter(SanSegmenter):
    """A SAN that adapts to every image that it encodes; `SanSegmenter.adapting` makes one.

    Its encodings are those of a model of its own name and identity, so that no cache, index or folder mixes them with
    others. They can be labelled with any words, but are adapted to the words that it was made with. Threads may share
    one object; they take turns.
    """

    def __init__(self, segmenter: SanSegmenter, vocabulary: Vocabulary, adapt: Adapt = "each") -> None:
        """Use `SanSegmenter.adapting`, which describes arguments and errors."""
        if adapt not in get_args(Adapt):
            raise UserError(f"adapt {short(adapt)} is not one of {', '.join(get_args(Adapt))}")
        if segmenter.speed != "exact" or segmenter.dtype != torch.float32:
            raise UserError("a model adapts to images in float32 alone: leave speed at exact, and out dtype")
        # The rest has no text of its own.
        vocabulary = replace(vocabulary, words=tuple(word for word in vocabulary.words if not word.nothing))
        if len(vocabulary.words) < 2:
            raise UserError("one word alone is always sure: give at least two to adapt to images")
        self.__dict__.update(segmenter.__dict__)
        # The text half and the layers without a gradient are shared; matrices laid out for oneDNN have none, so these
        # are copied as plain ones.
        self.model = segmenter.model.snapshot()
        self.adapt = adapt
        self.vocabulary = vocabulary
        """The words whose predictions are made sure."""
        self.identity = _identity(segmenter.identity, vocabulary, adapt)
        self.source = None
        if self.calibration is not None:
            self.calibration = None
            warnings.warn("the calibration is of answers without adaptation, and is not used", stacklevel=3)
        self._texts = _single_templates(segmenter, vocabulary)
        self._network = _Supervised(self.model)
        self._own = _affine(self._network)
        if not self._own:
            raise UserError(f"{segmenter.identity.name} has no norm layers that can adapt")
        self._kept = self._own
        self._turn = threading.Lock()

    def encode_prepared(self, batch: Sequence[InputImage]) -> list[Encoding]:
        """Adapt to each image by itself, and encode it."""
        return [self._encode(image) for image in batch]

    def reset(self) -> None:
        """Go back to the model's own weights: with "keep", the next image is as the first one."""
        with self._turn:
            self._kept = self._own

    def _encode(self, image: InputImage) -> Encoding:
        # Gradients are needed even where the caller is in inference mode, and float32 under autocast.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            pixels = torch.as_tensor(image.prepared.pixels).clone().unsqueeze(0).to(self.device)
            with self._turn:
                weights = self._adapted(pixels, image.prepared.sizes, self._kept)
                if self.adapt == "keep":
                    self._kept = weights
                with torch.no_grad():
                    found = functional_call(self._network, weights, (pixels, False))
        arrays = {"mask_logits": found.mask_logits[0].clone(), "mask_embeddings": found.mask_embeddings[0].clone()}
        return Encoding(arrays, image.prepared.sizes, self.identity.encodings, image.image)

    def _adapted(self, pixels: Tensor, sizes: ImageSizes, start: Weights) -> Weights:
        """Return the parameters after a few steps from `start`, or after those whose gradients were finite."""
        weights = {name: value.clone().requires_grad_(True) for name, value in start.items()}
        optimizer = torch.optim.Adam(list(weights.values()), lr=LEARNING_RATE)
        for _ in range(STEPS):
            proposals = functional_call(self._network, weights, (pixels, True))
            loss = self._loss(proposals, sizes)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            if not all(gradient is None or gradient.isfinite().all() for gradient in gradients):
                break
            for value, gradient in zip(weights.values(), gradients, strict=True):
                value.grad = gradient
            optimizer.step()
        return {name: value.detach() for name, value in weights.items()}

    def _loss(self, proposals: Proposals, sizes: ImageSizes) -> Tensor:
        """Return the negative information of the predictions, a mean over supervised side blocks and templates."""
        layers = (proposals, *proposals.auxiliary)
        return -torch.stack(
            [information(self.model, layer, text, sizes) for layer in layers for text in self._texts]
        ).mean()

    def _pixels(self, encoding: Encoding) -> Tensor | None:
        """Return None: what the network attended to when it was adapted is not known afterwards."""
        return None


class _Supervised(nn.Module):
    """A model whose forward pass makes proposals, which is what `functional_call` can call."""

    def __init__(self, model: SAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, supervise: bool) -> Proposals:
        return self.model.propose(pixels, supervise=supervise)


def information(model: SAN, proposals: Proposals, text: TextClassifier, sizes: ImageSizes) -> Tensor:
    """Return how much a pixel's position tells of its word, in nats, at stride 16 of one image.

    It is the entropy of the mean prediction less the mean entropy of the pixels' predictions. A prediction is what part
    of the pixel's score each word has. Pixels of the padding are left out.
    """
    height, width = proposals.mask_logits.shape[-2:]
    height = max(1, round(height * sizes.network[0] / sizes.padded[0]))
    width = max(1, round(width * sizes.network[1] / sizes.padded[1]))
    masks = proposals.mask_logits[0, :, :height, :width].sigmoid().flatten(1)  # [Q, h w]
    words = model.classify(proposals, text).softmax(dim=-1)[0, :, :-1]  # [Q, K]
    scores = words.T @ masks
    shares = scores / scores.sum(dim=0, keepdim=True).clamp(min=1e-6)
    return _entropy(shares.mean(dim=1)) - _entropy(shares).mean()


def _entropy(shares: Tensor) -> Tensor:
    """Return the entropy, in nats, over the first dimension."""
    return -(shares * shares.clamp(min=1e-9).log()).sum(dim=0)


def _affine(network: _Supervised) -> Weights:
    """Return the scale and the offset of all norm layers but the text tower's."""
    model = network.model
    return {
        f"model.{name}.{leaf}": parameter.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
        for leaf, parameter in module.named_parameters(recurse=False)
        if not (name.startswith("clip.") and model.clip.is_text(f"{name}.{leaf}".removeprefix("clip.")))
    }


def _single_templates(segmenter: SanSegmenter, vocabulary: Vocabulary) -> list[TextClassifier]:
    """Return the words in each of the first templates alone; texts that no template changes, once."""
    texts = [
        segmenter.text.classifier(replace(vocabulary, templates=(template,)))
        for template in vocabulary.templates[:MOST_TEMPLATES]
    ]
    return texts[:1] if all(torch.equal(text.rows, texts[0].rows) for text in texts) else texts


def _identity(identity: Identity, vocabulary: Vocabulary, adapt: Adapt) -> Identity:
    """Identify the model together with all that an adapted encoding depends on besides the image."""
    settings = [identity.image, identity.text, vocabulary.to_dict(), adapt, _RECIPE]
    image = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Identity(f"{identity.name}-adapted", image, identity.text)
