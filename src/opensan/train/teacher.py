"""Label images for a model in training by the moving average of its weights: a mean teacher.

Tarvainen and Valpola, "Mean teachers are better role models" (NeurIPS 2017): the average makes fewer mistakes than the
model of any one step. Only the trained parts differ; the frozen encoder is one for both.

Letters: B batch, K words, Q queries, H W image, h w the pseudo-labels' grid.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from opensan.assemble.scores import class_probabilities
from opensan.model import SAN
from opensan.structures import TextClassifier
from opensan.train.config import SelfTrainingConfig
from opensan.train.targets import LabelMapTargets
from opensan.vocabulary import UNLABELLED

STRIDE = 4
"""Pixels of a crop between two pseudo-labels: a fourth of the grid that masks are proposed on."""

LEAST_PIXELS = 8
"""Pseudo-labels that a word needs in a crop: fewer are specks, which no query should be matched with."""

_TINY = 1e-30


class MeanTeacher:
    """The moving average of a model's trained parameters, which labels images (a `Follower` of the training)."""

    def __init__(self, model: SAN, config: SelfTrainingConfig, thresholds: Sequence[float] = ()) -> None:
        """Begin as a copy of `model`, on its device.

        `thresholds`: the confidence that each of the K words needs, in place of the one of `config`; only where all
        images without labels have the same words.
        """
        self.config = config
        self.thresholds = tuple(thresholds)
        self.model = model.snapshot()
        self.step = 0
        own = dict(self.model.named_parameters())
        self._names = [trained.name for trained in model.trained()]
        self._followed = [trained.parameter for trained in model.trained()]
        self._averages: list[Tensor] = [own[name] for name in self._names]
        self._counted = self._confident = 0

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the averages towards the weights after `step` steps, by more than `decay` allows in the first steps."""
        self.step = step
        decay = min(self.config.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, [parameter.detach() for parameter in self._followed], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """Return the averages by their parameters' names."""
        return {name: average.detach().clone() for name, average in zip(self._names, self._averages, strict=True)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Take over the averages of `state`, of a run after `step` steps."""
        self.step = step
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(state[name])

    def weight(self) -> float:
        """Return the weight of losses on pseudo-labels at this step."""
        config = self.config
        return config.weight * (min(1.0, self.step / config.ramp_up) if config.ramp_up else 1.0)

    def figures(self) -> dict[str, float]:
        """Return the share of pixels that the teacher was sure about since the last call; nan if it saw none."""
        share = self._confident / self._counted if self._counted else float("nan")
        self._counted = self._confident = 0
        return {"pseudo_labelled": share}

    @torch.no_grad()
    def label(self, pixels: Tensor, inside: Tensor, text: TextClassifier) -> LabelMapTargets:
        """Return targets for crops: a segment for each word that the teacher is sure of somewhere.

        Args:
            pixels: [B, 3, H, W] float, normalised as `SAN.propose` needs them.
            inside: [B, H, W] bool: false where a crop is padding.
            text: the words.

        Returns:
            Targets on a grid of a pixel in STRIDE; pixels that it is not sure about are unlabelled.
        """
        proposals = self.model.propose(pixels)
        probabilities = class_probabilities(self.model.classify(proposals, text)).float()
        size = [side // STRIDE for side in pixels.shape[2:]]
        logits = functional.interpolate(proposals.mask_logits.float(), size=size, mode="bilinear", align_corners=False)
        maps = [
            self._label_map(of_words.T, masks.sigmoid(), where)
            for of_words, masks, where in zip(
                probabilities, logits, inside[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE], strict=True
            )
        ]
        self._counted += sum(labels.size for labels in maps)
        self._confident += sum(int((labels != UNLABELLED).sum()) for labels in maps)
        return LabelMapTargets.from_maps(maps).to(pixels.device)

    def _label_map(self, probabilities: Tensor, masks: Tensor, inside: Tensor) -> np.ndarray:
        """Return [h, w] int16 labels of a crop: probabilities [K, Q], masks [Q, h, w], inside [h, w]."""
        confidence, labels = confident_words((probabilities @ masks.flatten(1)), self.config)
        needed = torch.tensor(self.thresholds or [self.config.confidence] * len(probabilities), device=labels.device)
        sure = (confidence >= needed[labels]) & inside.flatten()
        pixels = labels[sure].bincount(minlength=len(probabilities))
        sure &= (pixels >= LEAST_PIXELS)[labels]
        found = labels.masked_fill(~sure, UNLABELLED)
        return found.view(inside.shape).to(torch.int16).cpu().numpy()


class KeptAnswers:
    """The answers of the model that training began with, for words that it is not to forget.

    Li and Hoiem, "Learning without forgetting" (ECCV 2016): on the new images, the trained model is to answer for the
    other words as the first one did. No old image is needed.
    """

    def __init__(self, model: SAN, text: TextClassifier, weight: float) -> None:
        """Keep the answers of `model` as it is now for the words of `text`; `weight` is the loss's."""
        self.model = model.snapshot()
        self.text = text
        self.weight = weight

    @torch.no_grad()
    def answers(self, pixels: Tensor) -> Tensor:
        """Return the class logits [B, Q, K + 1] of the first model, for pixels as `SAN.propose` needs them."""
        return self.model.classify(self.model.propose(pixels), self.text)

    def loss(self, answers: Tensor, expected: Tensor) -> Tensor:
        """Return the weighted divergence of class logits from `answers`, a mean over queries; both [B, Q, K + 1]."""
        logarithms = answers.float().log_softmax(dim=-1).flatten(0, 1)
        wanted = expected.float().log_softmax(dim=-1).flatten(0, 1)
        return self.weight * functional.kl_div(logarithms, wanted, reduction="batchmean", log_target=True)


def confident_words(scores: Tensor, config: SelfTrainingConfig) -> tuple[Tensor, Tensor]:
    """Return the best word of pixels with scores [K, n], and its probability among the words: both [n].

    The probability is that of `opensan.assemble.calibration.distribution`, with the temperatures of `config`.
    """
    best, labels = scores.max(dim=0)
    temperature = torch.full_like(best, config.temperature)
    if config.doubtful_temperature is not None:
        temperature[best < config.doubtful_below] = config.doubtful_temperature
    logarithms = scores.clamp(min=_TINY).log()
    shares = ((logarithms - logarithms.max(dim=0).values) / temperature).softmax(dim=0)
    return shares.max(dim=0).values, labels
