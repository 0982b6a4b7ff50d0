"""Fit text rows to labelled pixels by gradient descent: no part of the model runs but its last matrix product.

A pixel's scores are those by which it is labelled (sum over proposals of class times mask probability), divided by
their sum; the loss is their cross-entropy with the pixel's word, and how far the rows moved.
Letters: I images, Q queries, K words, R text rows, D embedding, n pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opensan.assemble.scores import class_probabilities
from opensan.choices import Tuned
from opensan.model import SAN
from opensan.structures import Proposals, TextClassifier

STEPS = (0, 5, 10, 20, 40, 80)
"""Numbers of steps at which rows are looked at."""

LENGTH = 0.02
"""Distance that a row moves in a step, about; rows have length 1."""

HOLD = 0.1
"""Weight of the squared distance of the rows from where they began, against the mean cross-entropy of a pixel."""

PIXELS = 400
"""Pixels of an image that a seed draws to train with."""


@dataclass(frozen=True, eq=False)
class Sample:
    """An encoded image at its labelled pixels."""

    embeddings: Tensor
    """[Q, D] of the mask proposals."""
    masks: Tensor
    """[n, Q] mask probabilities at the pixels."""
    labels: Tensor
    """[n] int64: index of each pixel's word."""
    counts: np.ndarray
    """[K] int64: all labelled pixels of each word in the image."""

    def draw(self, seed: int) -> tuple[Tensor, Tensor]:
        """Draw PIXELS pixels with replacement: masks and labels. A word's number grows as the root of its area."""
        chance = np.random.default_rng(seed)
        shares = np.sqrt(self.counts / max(1, self.counts.sum()))
        numbers = np.ceil(PIXELS * shares / max(shares.sum(), 1e-12)).astype(int)
        labels = self.labels.cpu().numpy()
        drawn = [chance.choice(np.flatnonzero(labels == word), number) for word, number in enumerate(numbers) if number]
        chosen = torch.from_numpy(np.concatenate(drawn)[: PIXELS + len(self.counts)]).to(self.labels.device)
        return self.masks[chosen], self.labels[chosen]


@dataclass(frozen=True, eq=False)
class Fitted:
    """Rows after some steps."""

    rows: Tensor
    """[R, D], unit length."""
    context: Tensor
    """[D]: what was added to all rows."""


def fit(
    model: SAN,
    text: TextClassifier,
    samples: Sequence[Sample],
    *,
    what: Tuned,
    seed: int,
    steps: Sequence[int] = STEPS,
) -> Iterator[tuple[int, Fitted]]:
    """Yield the rows after each of `steps`, ascending.

    A word without labelled pixels keeps its own row: it would only be pushed away from all that is labelled. (The
    context moves it all the same.)
    """
    base = text.rows.clone()
    drawn = [sample.draw(seed * 1_000 + number) for number, sample in enumerate(samples)]
    longest = max(len(labels) for _, labels in drawn)
    masks = torch.stack([F.pad(masks, (0, 0, 0, longest - len(masks))) for masks, _ in drawn])
    labels = torch.stack([F.pad(labels, (0, longest - len(labels)), value=-100) for _, labels in drawn])
    embeddings = torch.stack([sample.embeddings for sample in samples])
    labelled = torch.zeros(text.num_classes, dtype=torch.bool, device=base.device)
    labelled[labels[labels >= 0]] = True
    free = labelled[text.row_class] if what != "context" else torch.zeros_like(text.row_class, dtype=torch.bool)
    own = torch.zeros(int(free.sum()), base.shape[1], device=base.device, requires_grad=True)
    context = torch.zeros(base.shape[1], device=base.device, requires_grad=True)
    moved = [part for part, wanted in ((own, what != "context"), (context, what != "vectors")) if wanted]
    optimizer = torch.optim.Adam(moved, lr=LENGTH * base.shape[1] ** -0.5)

    def rows() -> Tensor:
        return F.normalize((base + context).index_add(0, free.nonzero()[:, 0], own), dim=1)

    for step in range(max(steps) + 1):
        if step in steps:
            yield step, Fitted(rows().detach(), context.detach().clone())
        scores = pixel_scores(model, embeddings, masks, TextClassifier(rows(), text.row_class, text.num_classes))
        probabilities = scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        loss = F.nll_loss(probabilities.clamp(min=1e-6).log().flatten(0, 1), labels.flatten(), ignore_index=-100)
        distance = context.square().sum() + own.square().sum() / max(1, len(own))
        optimizer.zero_grad()
        (loss + HOLD * distance).backward()
        optimizer.step()


def pixel_scores(model: SAN, embeddings: Tensor, masks: Tensor, text: TextClassifier) -> Tensor:
    """Return the scores [I, n, K] of pixels with mask probabilities [I, n, Q], of proposals [I, Q, D]."""
    probabilities = class_probabilities(model.classify(Proposals(masks, embeddings), text))
    return masks @ probabilities


def confusion(model: SAN, text: TextClassifier, sample: Sample) -> np.ndarray:
    """Return [K, K + 1] int64, as in `evaluation.metrics.Counts`: the whole image's, estimated from its sample."""
    with torch.no_grad():
        winners = pixel_scores(model, sample.embeddings[None], sample.masks[None], text)[0].argmax(dim=1).cpu().numpy()
    labels = sample.labels.cpu().numpy()
    seen = np.bincount(labels, minlength=text.num_classes)
    weights = np.divide(sample.counts, seen, out=np.zeros(len(seen)), where=seen > 0)
    pairs = labels * (text.num_classes + 1) + winners
    sums = np.bincount(pairs, weights[labels], text.num_classes * (text.num_classes + 1))
    return np.rint(sums).astype(np.int64).reshape(text.num_classes, -1)


def folds(count: int, most: int) -> list[list[int]]:
    """Return the images that are left out together: one at a time, or `most` groups where there are more."""
    groups = min(count, most)
    return [list(range(first, count, groups)) for first in range(groups)]


def left_out(
    model: SAN,
    text: TextClassifier,
    samples: Sequence[Sample],
    groups: Sequence[Sequence[int]],
    *,
    what: Tuned,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[int, np.ndarray]:
    """Return, for each number of steps, the confusion [K, K + 1] of images by rows that were fitted to the others."""
    sums = {step: np.zeros((text.num_classes, text.num_classes + 1), dtype=np.int64) for step in STEPS}
    for group in groups:
        rest = [sample for number, sample in enumerate(samples) if number not in group]
        for step, fitted in fit(model, text, rest, what=what, seed=seed):
            classifier = TextClassifier(fitted.rows, text.row_class, text.num_classes)
            for number in group:
                sums[step] += confusion(model, classifier, samples[number])
        advance()
    return sums
